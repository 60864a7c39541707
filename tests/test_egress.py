"""The example egress."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import EXAMPLES, Namespace, environment, is_alive, wait_for

pytestmark = pytest.mark.slow


class Outside(Namespace):
    """What is beyond: a resolver on 192.0.2.53, and addresses that answer a ping."""

    def __init__(self, folder: Path):
        super().__init__("outside")
        self.folder, self.server = folder, None

    def connect(self, other: Namespace, device: str, address: str) -> None:
        """Connect another namespace's new device to it."""
        self.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", device, "netns", other.name)
        for last in ("53", "80", "81", "82"):
            self.run("ip", "address", "add", f"192.0.2.{last}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        other.run("ip", "address", "add", address, "dev", device)
        other.run("ip", "link", "set", device, "up")

    def resolve(self, **names: str) -> None:
        """Have the resolver know these names in the domain example."""
        if self.server:
            self.stop(self.server)
        options = [f"--host-record={name}.example,{address}" for name, address in names.items()]
        options += ["--no-resolv", "--no-hosts", "--pid-file", "--user=root", "--keep-in-foreground", "--local-ttl=0"]
        options += ["--conf-file=/dev/null", "--log-facility=-", "--local=/example/"]
        log = self.folder / "resolver.log"
        with open(log, "w") as file:
            self.server = self.start("dnsmasq", *options, stdout=file, stderr=file)
        wait_for(lambda: "started" in log.read_text(), "the resolver")


@pytest.fixture
def outside(tmp_path):
    outside = Outside(tmp_path)
    yield outside
    outside.close()


class Egress:
    """egress.sh with its files in a folder, run in a namespace."""

    def __init__(self, node: Namespace, folder: Path):
        self.node, self.folder = node, folder
        self.env = environment(folder / "instances", EGRESS_LISTS=str(folder / "lists"), EGRESS_RUN=str(folder))
        self.env |= {"EGRESS_CONFIG": str(folder / "egress.conf"), "EGRESS_RESTART": f"sh {folder}/restart"}

    def __call__(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        command = [EXAMPLES / "egress" / "egress.sh", *arguments]
        return self.node.run(*command, check=False, env=self.env | variables)


def test_egress_example_lets_an_instance_reach_what_is_allowed(host, outside):
    need("jq", *PROGRAMS)
    egress = Egress(host, host.folder)
    outside.connect(host, "uplink", "192.0.2.1/24")
    outside.run("ip", "route", "add", "10.83.0.0/24", "via", "192.0.2.1")
    outside.resolve(good="192.0.2.80", bad="192.0.2.81")
    host.set("net/ipv4/ip_forward", "1")
    host.update("--initialize", "br0", "host")
    web = host.client("web", "10:66:6a:4c:a1:11")
    web.run("ip", "address", "add", "10.83.0.11/24", "dev", "eth0")
    web.run("ip", "route", "add", "default", "via", "10.83.0.1")
    host.update("add", web.mac, "10.83.0.11", "web")
    host.process()
    host.run("nft", "-f", host.example("egress/egress.nft"))
    options = ["interface=br0", "bind-interfaces", "no-resolv", "no-hosts", "user=root", "server=192.0.2.53"]
    options += [f"pid-file={host.folder}/dnsmasq.pid", f"conf-file={host.folder}/egress.conf"]
    (host.folder / "main.conf").write_text("\n".join(options) + "\n")
    (host.folder / "restart").write_text(
        f"cd {host.folder}\n"
        "if pid=$(cat dnsmasq.pid 2>/dev/null); then\n"
        "    kill $pid; while grep -q . /proc/$pid/cmdline 2>/dev/null; do sleep 0.1; done\n"
        "fi\n"
        f"dnsmasq --conf-file={host.folder}/main.conf\n"
    )

    def reaches(name):
        addresses = web.resolve(name, "A")
        return bool(addresses) and web.pings(addresses[0])

    try:
        assert egress("allow", "*.Good.Example.").returncode == 0
        assert egress("apply").returncode == 0
        assert not web.pings("192.0.2.80"), "nobody has resolved it yet"
        wait_for(lambda: reaches("good.example"), "what is allowed")
        assert web.resolve("bad.example", "A") == ["192.0.2.81"] and not web.pings("192.0.2.81")
        assert web.run("dig", "+timeout=1", "+tries=1", "@192.0.2.53", "good.example", check=False).returncode != 0
        assert "expires" in host.run("nft", "list", "set", "inet", "egress", "allow_v4").stdout
        host.run("nft", "-f", host.folder / "egress.nft")
        assert web.pings("192.0.2.80"), "what was resolved stays when the rules are loaded again"
        outside.resolve(good="192.0.2.82", bad="192.0.2.81")
        wait_for(lambda: web.resolve("good.example", "A") == ["192.0.2.82"], "the changed address")
        assert web.pings("192.0.2.82")
        assert egress("deny", "good.example").returncode == 0 and egress("allow", "bad.example").returncode == 0
        assert egress("apply").returncode == 0 and egress("list").stdout == "bad.example\n"
        wait_for(lambda: reaches("bad.example"), "what is allowed now")
    finally:
        pid = (host.folder / "dnsmasq.pid").read_text()
        os.kill(int(pid), signal.SIGTERM)


def test_egress_example_merges_its_lists(host):
    egress = Egress(host, host.folder)
    (host.folder / "lists").mkdir()
    (host.folder / "lists" / "profile").write_text(
        "# ours\nA.example\n*.b.example\nbad name\n-x.example\n\nc.example.\n"
    )
    assert egress("allow", "d.example").returncode == 0 and egress("deny", "a.example").returncode == 0
    result = egress("list")
    assert result.stdout.split() == ["b.example", "c.example", "d.example"]
    assert "bad name is left out" in result.stderr and "-x.example is left out" in result.stderr
    assert egress("allow", "a.example").returncode == 0
    assert egress("list").stdout.split() == ["a.example", "b.example", "c.example", "d.example"]
    for wrong in (("allow", "no domain"), ("allow", "")):
        assert egress(*wrong).returncode == 1
    for wrong in (("allow",), ("begin",), (), ("stop", "x")):
        assert egress(*wrong).returncode == 2


@pytest.mark.parametrize("fault", ["nftset", "test"])
def test_egress_example_leaves_the_old_dnsmasq_where_a_check_fails(host, fault):
    egress = Egress(host, host.folder)
    (host.folder / "restart").write_text(f"touch {host.folder}/restarted\n")
    stand_in = host.folder / "bin" / "dnsmasq"  # for a dnsmasq that was built without, or refuses the configuration
    stand_in.parent.mkdir()
    built = "no-nftset" if fault == "nftset" else "nftset"
    stand_in.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "IPv6 {built} auth" && exit\necho "bad option" >&2; exit 1\n'
    )
    stand_in.chmod(0o755)
    (host.folder / "egress.conf").write_text("# old\n")
    egress("allow", "good.example")
    result = egress("apply", PATH=f"{stand_in.parent}:{egress.env['PATH']}")
    assert result.returncode == 1 and ("no nftset" if fault == "nftset" else "bad option") in result.stderr
    assert (host.folder / "egress.conf").read_text() == "# old\n" and not (host.folder / "restarted").exists()


def test_egress_example_guards_one_container_by_itself(tmp_path, outside):
    need("unshare", "nsenter", *PROGRAMS)
    box, etc = Namespace("box"), tmp_path / "etc"
    try:
        outside.connect(box, "eth0", "192.0.2.10/24")
        outside.resolve(good="192.0.2.80", bad="192.0.2.81")
        etc.mkdir()
        (etc / "resolv.conf").write_text("nameserver 192.0.2.53\n")
        (etc / "passwd").write_bytes(Path("/etc/passwd").read_bytes())
        (tmp_path / "pid").touch()
        inside = f"mount --bind {etc} /etc; echo $$ > {tmp_path}/pid; exec sleep 600"
        box.start("unshare", "-m", "sh", "-c", inside)
        wait_for(lambda: (tmp_path / "pid").read_text(), "the container")
        pid = (tmp_path / "pid").read_text().strip()
        egress = Egress(outside, tmp_path)
        egress("allow", "good.example")
        (tmp_path / f"egress.{pid}.pid").write_text("1\n")  # stale
        started = egress("start", pid, "192.0.2.53")
        assert started.returncode == 0, started.stderr
        assert egress("start", pid, "192.0.2.53").returncode == 1

        def dig(server, name):
            command = ["dig", "+short", "+timeout=1", "+tries=1", server, name, "A"]
            return box.run(*command, check=False).stdout.split()

        def pings(address):
            return box.run("ping", "-n", "-c", "1", "-W", "2", address, check=False).returncode == 0

        assert (etc / "resolv.conf").read_text() == "nameserver 127.0.0.1\n"
        assert not pings("192.0.2.80")
        assert dig("@127.0.0.1", "good.example") == ["192.0.2.80"] and pings("192.0.2.80")
        assert dig("@127.0.0.1", "bad.example") == ["192.0.2.81"] and not pings("192.0.2.81")
        assert dig("@192.0.2.53", "good.example") != ["192.0.2.80"]
        dnsmasq = (tmp_path / f"egress.{pid}.pid").read_text().strip()
        assert egress("stop", pid).returncode == 0 and not is_alive(dnsmasq)
        assert (etc / "resolv.conf").read_text() == "nameserver 192.0.2.53\n" and pings("192.0.2.81")
        assert "did not run" in egress("stop", pid).stderr
    finally:
        box.close()
