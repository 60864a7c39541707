"""The example egress."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import (
    EXAMPLES,
    OPEN,
    Host,
    Namespace,
    block,
    environment,
    is_alive,
    make_etc,
    mounted,
    process_file,
    run,
    wait_for,
)

pytestmark = pytest.mark.slow
FOLDER = EXAMPLES / "egress"
NAMES = {"good": "192.0.3.80", "ok.good": "192.0.3.82", "bad": "192.0.3.81"}  # public addresses, in these namespaces
SPECIAL = ("10.77.0.5", "169.254.169.254", "100.100.100.200", "fd77::5", "64:ff9b::a9fe:a9fe")


class Outside(Namespace):
    """What is beyond: a resolver on 192.0.3.53, and addresses that answer a ping."""

    def __init__(self, folder: Path):
        super().__init__("outside")
        self.folder, self.server, self.ports = folder, None, 0
        self.run("ip", "link", "add", "lan", "type", "bridge")
        self.run("ip", "link", "set", "lan", "up")
        for last in ("53", "80", "81", "82"):
            self.run("ip", "address", "add", f"192.0.3.{last}/24", "dev", "lan")
        for address in (*SPECIAL, "fd99::1/64"):
            self.run("ip", "address", "add", address, "dev", "lan", *(["nodad"] if ":" in address else []))
        self.resolve(**NAMES)

    def connect(self, other: Namespace, device: str, address: str) -> None:
        """Connect another namespace's new device to it."""
        self.ports += 1
        port = f"port{self.ports}"
        self.run("ip", "link", "add", port, "type", "veth", "peer", "name", device, "netns", other.name)
        self.run("ip", "link", "set", port, "master", "lan", "up")
        other.run("ip", "address", "add", address, "dev", device)
        other.run("ip", "address", "add", f"fd99::{self.ports + 1}/64", "dev", device, "nodad")
        other.run("ip", "link", "set", device, "up")
        for address in SPECIAL:
            other.run("ip", "route", "add", address, "dev", device)

    def resolve(self, **names: str) -> None:
        """Have the resolver know these names in the domain example, for an hour."""
        if self.server:
            self.stop(self.server)
        options = [f"--host-record={name}.example,{address}" for name, address in names.items()]
        options += [f"--host-record=s{number}.good.example,{address}" for number, address in enumerate(SPECIAL)]
        options += ["--no-resolv", "--no-hosts", "--pid-file", "--user=root", "--keep-in-foreground"]
        options += [
            "--conf-file=/dev/null",
            "--log-facility=-",
            "--log-queries",
            "--local=/example/",
            "--local-ttl=3600",
        ]
        options += ["--listen-address=192.0.3.53", "--bind-interfaces"]
        with open(self.folder / "resolver.log", "w") as file:
            self.server = self.start("dnsmasq", *options, stdout=file, stderr=file)
        wait_for(lambda: "started" in self.log(), "the resolver")

    def log(self) -> str:
        """Return what the resolver has told, the questions it was asked among it."""
        return (self.folder / "resolver.log").read_text()


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    need("nsenter", "unshare", "chroot", "getent", *PROGRAMS)
    outside = Outside(tmp_path_factory.mktemp("outside"))
    yield outside
    if outside in OPEN:  # as it is not after a run that was broken off
        outside.close()


class Egress:
    """The program with files in a folder that is /etc for it, run in a namespace, and a systemctl that is a script."""

    def __init__(self, folder: Path, node: Namespace | None = None):
        self.folder, etc = folder, make_etc(folder / "outer")
        self.lists, self.config, self.restart = etc / "egress", etc / "dnsmasq.d" / "egress.conf", folder / "restart"
        for made in (self.lists, self.config.parent, folder / "bin"):
            made.mkdir(exist_ok=True)
        self.program("systemctl", f'[ "$*" = "restart dnsmasq" ] && exec sh {self.restart}')
        self.prefix = [*(node.command() if node else []), *mounted({"/etc": etc})]
        self.env = environment(folder / "instances")
        self.env["PATH"] = f"{folder}/bin:{self.env['PATH']}"

    def program(self, name: str, text: str) -> None:
        """Put a script before another program of this name."""
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        """Start the program."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": self.env} | options
        return subprocess.Popen([*self.prefix, FOLDER / "instances-egress", *arguments], **streams)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


# Lists


@pytest.fixture
def lists(tmp_path):
    """The program and its lists, without a network."""
    need("unshare")
    return Egress(tmp_path)


def test_egress_example_merges_its_lists(lists):
    (lists.lists / "profile").write_text("# ours\nA.example.org\n*.b.example.org\nbad name\n-x.example.org\n\nc.d.\n")
    assert lists("allow", "d.example.org").returncode == 0 and lists("deny", "a.example.org").returncode == 0
    result = lists("list")
    assert result.stdout.split() == ["b.example.org", "c.d", "d.example.org"]
    assert "bad name is left out" in result.stderr and "-x.example.org is left out" in result.stderr
    assert lists("allow", "a.example.org").returncode == 0
    assert lists("list").stdout.split() == ["a.example.org", "b.example.org", "c.d", "d.example.org"]
    for wrong in (("allow",), ("begin",), ()):
        result = lists(*wrong)
        assert result.returncode == 2 and result.stderr.endswith(": no such usage: see --help\n")


@pytest.mark.parametrize(
    "word", ["no domain", "", "com", "1.2.3.4", "::1", "-x.example.org", "a..org", f"{'a' * 64}.org"]
)
def test_egress_example_refuses_what_is_no_domain(lists, word):
    result = lists("allow", word)
    assert result.returncode == 1 and "nothing is changed" in result.stderr
    assert os.listdir(lists.lists) == []


def test_egress_example_reads_lists_as_editors_leave_them(lists):
    (lists.lists / "profile").write_bytes(
        b"\xef\xbb\xbfwindows.example.org\r\n\r\nbehind.example.org # why\n \ttabs.example.org \nlast.example.org"
    )
    (lists.lists / "live").write_text("live.example.org")
    (lists.lists / "denied").write_bytes(b"tabs.example.org\r\n")
    result = lists("list")
    expected = ["behind.example.org", "last.example.org", "live.example.org", "windows.example.org"]
    assert result.stdout.split() == expected and result.stderr == ""


def test_egress_example_keeps_all_of_many_domains_allowed_at_once(lists):
    names = [f"{number}.example.org" for number in "abcdefghijkl"]
    processes = [lists.start("allow", name) for name in names]
    assert [process.communicate(timeout=30) and process.returncode for process in processes] == [0] * len(names)
    assert lists("list").stdout.split() == names


def test_egress_example_keeps_a_denied_domain_out_of_many_runs_at_once(lists):
    (lists.lists / "profile").write_text("".join(f"{number}.example.org\n" for number in range(300)))
    lists("deny", "7.example.org")
    expected = lists("list").stdout
    assert "\n7.example.org" not in expected and expected.count("\n") == 299
    processes = [lists.start("list") for _ in range(30)]
    assert {process.communicate(timeout=30)[0] for process in processes} == {expected}


def test_egress_example_says_which_domain_below_a_denied_one_stays_allowed(lists):
    for name in ("example.org", "ok.example.org", "notexample.org"):
        lists("allow", name)
    result = lists("deny", "example.org")
    assert "ok.example.org stays allowed" in result.stderr and "notexample" not in result.stderr
    assert lists("list").stdout.split() == ["notexample.org", "ok.example.org"]


def test_egress_example_takes_no_time_for_thousands_of_domains(lists):
    (lists.lists / "profile").write_text("".join(f"{number}.example.org\n" for number in range(3000)))
    begin = time.monotonic()
    assert lists("config").stdout.count("\nnftset=") == 3000
    assert time.monotonic() - begin < 5, "a process a line took ten seconds for a thousand"


def test_egress_example_has_nothing_to_list_where_nothing_is_allowed(lists):
    result = lists("list")
    assert result.returncode == 0 and result.stdout == ""


def test_egress_example_has_a_list_on_disk_before_it_is_in_place(lists):
    need("strace")
    log = lists.folder / "strace"
    traced = ("strace", "-f", "-qq", "-e", "trace=fsync,rename", "-o", log)
    run(*lists.prefix, *traced, FOLDER / "instances-egress", "deny", "bad.example.org", env=lists.env)
    assert re.findall(r"(fsync|rename)\(", log.read_text()) == ["fsync", "rename"] * 2


def test_egress_example_runs_where_the_environment_has_no_path(lists):
    result = run(*lists.prefix, "env", "-i", FOLDER / "instances-egress", "config", check=False)
    assert result.returncode == 0 and result.stderr == ""


# dnsmasq's configuration


def refused(lists: Egress, text: str) -> subprocess.CompletedProcess:
    """Apply with this stand-in for a dnsmasq, and nothing to be seen of it afterwards."""
    lists.program("dnsmasq", text)
    lists.restart.write_text(f"touch {lists.folder}/restarted\n")
    lists.config.write_text("# old\n")
    lists("allow", "good.example")
    result = lists("apply")
    assert lists.config.read_text() == "# old\n" and not (lists.folder / "restarted").exists()
    assert [path.name for path in lists.config.parent.iterdir()] == ["egress.conf"]
    return result


def test_egress_example_leaves_the_old_dnsmasq_where_it_does_not_know_the_options(lists):
    result = refused(lists, 'echo "recompile with HAVE_NFTSET defined" >&2; exit 1')
    assert result.returncode == 1 and "nothing is changed: recompile with HAVE_NFTSET" in result.stderr


@pytest.mark.parametrize("harm", ["s/;#delete/#delete/", "s/#;#delete.*//", "s/,4#.*//"])
def test_egress_example_leaves_the_old_dnsmasq_where_it_would_not_renew_addresses(lists, harm):
    result = refused(lists, f"sed '{harm}' | /usr/sbin/dnsmasq \"$@\"")
    assert result.returncode == 1 and "do not renew the time" in result.stderr
    lists.program("dnsmasq", 'exec /usr/sbin/dnsmasq "$@"')
    assert lists("apply").returncode == 0 and (lists.folder / "restarted").exists()


def test_egress_example_leaves_the_old_configuration_where_there_is_no_systemctl(lists):
    (lists.folder / "bin" / "systemctl").unlink()
    for program in ("python3", "dnsmasq", "nft", "unshare", "ip"):
        (lists.folder / "bin" / program).symlink_to(shutil.which(program, path=environment(lists.folder)["PATH"]))
    lists.prefix += ["env", f"PATH={lists.folder}/bin"]
    lists.config.write_text("# old\n")
    result = lists("apply")
    assert result.returncode == 1 and "there is no systemctl" in result.stderr and result.stderr.count("\n") == 1
    assert lists.config.read_text() == "# old\n"


@pytest.mark.parametrize("before", ["# old\n", None])
def test_egress_example_brings_the_old_configuration_back_where_dnsmasq_does_not_start(lists, before):
    log = lists.folder / "restarts"  # with the old configuration, and only with that, it starts
    there = f"grep -qx '# old' {lists.config}" if before else f"[ ! -e {lists.config} ]"
    lists.restart.write_text(f"{there}; status=$?; echo $status >>{log}; exit $status\n")
    if before:
        lists.config.write_text(before)
    lists("allow", "good.example")
    result = lists("apply")
    assert result.returncode == 1 and "the old one is back" in result.stderr
    assert (lists.config.read_text() if lists.config.exists() else None) == before
    assert log.read_text().split() == ["1", "0"]
    assert len(list(lists.config.parent.iterdir())) == (1 if before else 0)


# A bridge, with the instance web on it


class Bridge(Host):
    """A host that holds web to what is allowed, with a dnsmasq that keeps a cache unless it is told otherwise."""

    def __init__(self, folder: Path, outside: Outside):
        super().__init__(folder)
        self.outside, self.egress = outside, Egress(folder, self)
        outside.connect(self, "uplink", "192.0.3.1/24")
        outside.run("ip", "route", "replace", "10.83.0.0/24", "via", "192.0.3.1")
        self.set("net/ipv4/ip_forward", "1")
        self.update("--initialize", "br0", "host")
        self.web = self.client("web", "10:66:6a:4c:a1:11")
        self.web.run("ip", "address", "add", "10.83.0.11/24", "dev", "eth0")
        self.web.run("ip", "route", "add", "default", "via", "10.83.0.1")
        self.update("add", self.web.mac, "10.83.0.11", "web")
        self.process()
        options = ["interface=br0", "bind-interfaces", "no-resolv", "no-hosts", "user=root", "server=192.0.3.53"]
        options += [f"pid-file={folder}/dnsmasq.pid", f"conf-file={self.egress.config}", f"hostsdir={folder}/hosts.d"]
        (folder / "main.conf").write_text("\n".join(options) + "\n")
        self.egress.restart.write_text(
            f"cd {folder}\n"
            "if pid=$(cat dnsmasq.pid 2>/dev/null); then\n"
            "    kill $pid; while grep -qs 'State:.[^ZX]' /proc/$pid/status; do sleep 0.1; done\n"
            "fi\n"
            f"dnsmasq --conf-file={folder}/main.conf\n"
        )

    def main(self, line: str, *, there: bool) -> None:
        """Put a line into dnsmasq's own configuration, or take it out."""
        path = self.folder / "main.conf"
        lines = [each for each in path.read_text().splitlines() if each != line] + [line] * there
        path.write_text("\n".join(lines) + "\n")

    def load(self, *, timeout: str = "10m", held: str = "10:66:6a:4c:a1:11") -> None:
        """Load the example's rules, with another timeout of the sets, or for another instance."""
        rules = self.example("egress/egress.nft")
        text = rules.read_text().replace("timeout 10m", f"timeout {timeout}").replace("10:66:6a:4c:a1:11", held)
        rules.write_text(text)
        self.run("nft", "-f", rules)

    def allow(self, *names: str) -> None:
        """Allow these domains and put that to use."""
        for name in names:
            assert self.egress("allow", name).returncode == 0
        self.apply()

    def apply(self) -> None:
        """Put the lists to use."""
        result = self.egress("apply")
        assert result.returncode == 0, result.stderr

    def reaches(self, name: str) -> bool:
        """Tell whether web resolves a name and reaches the address."""
        addresses = self.web.resolve(name, "A")
        return bool(addresses) and self.web.pings(addresses[0])

    def drops(self, address: str) -> bool:
        """Tell whether web gets no answer from an address, by one ping."""
        return self.web.run("ping", "-n", "-c", "1", "-W", "0.5", address, check=False).returncode != 0

    def seconds_left(self) -> list[int]:
        """Return how long each address stays in the set of allowed ones."""
        listing = json.loads(self.run("nft", "-j", "list", "set", "inet", "egress", "allow_v4").stdout)["nftables"]
        return [element["elem"]["expires"] for element in listing[-1]["set"].get("elem", [])]

    def end_dnsmasq(self) -> None:
        """End the dnsmasq that apply has started."""
        pid = self.folder / "dnsmasq.pid"
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGTERM)


@pytest.fixture(scope="module")
def one_bridge(tmp_path_factory, outside):
    bridge = Bridge(tmp_path_factory.mktemp("bridge"), outside)
    yield bridge
    bridge.end_dnsmasq()
    if bridge in OPEN:
        bridge.close()


@pytest.fixture
def bridge(one_bridge):
    """The bridge, with the rules as the example has them and nothing allowed."""
    for name in ("live", "denied", "private", "resolver"):
        (one_bridge.egress.lists / name).unlink(missing_ok=True)
    one_bridge.run("nft", "flush", "ruleset")
    one_bridge.load()
    return one_bridge


def test_egress_example_lets_an_instance_reach_what_is_allowed(bridge):
    web = bridge.web
    bridge.allow("*.Good.Example.")
    assert bridge.drops("192.0.3.80"), "nobody has resolved it yet"
    assert bridge.reaches("good.example") and bridge.reaches("ok.good.example")
    assert web.resolve("bad.example", "A") == ["192.0.3.81"] and bridge.drops("192.0.3.81")
    assert web.run("dig", "+timeout=1", "+tries=1", "@192.0.3.53", "good.example", check=False).returncode != 0
    assert web.resolve("web.instance.internal", "A") == ["10.83.0.11"], "the registry's names are answered as before"
    bridge.load()
    assert web.pings("192.0.3.80"), "what was resolved stays when the rules are loaded again"
    bridge.outside.resolve(**NAMES | {"good": "192.0.3.82"})
    try:
        assert web.resolve("good.example", "A") == ["192.0.3.82"] and web.pings("192.0.3.82")
    finally:
        bridge.outside.resolve(**NAMES)
    assert bridge.egress("deny", "good.example").returncode == 0
    bridge.allow("bad.example")
    assert bridge.egress("list").stdout == "bad.example\n"
    assert bridge.reaches("bad.example")


def test_egress_example_reaches_an_allowed_name_when_its_answer_outlives_the_set(bridge):
    bridge.run("nft", "delete", "table", "inet", "egress")
    bridge.load(timeout="2s")
    bridge.allow("good.example")
    wait_for(lambda: bridge.reaches("good.example"), "what is allowed")
    wait_for(lambda: not bridge.seconds_left(), "the end of the address in the set")
    wait_for(lambda: bridge.reaches("good.example"), "what is allowed still")


def test_egress_example_reaches_an_allowed_name_when_the_rules_were_flushed(bridge):
    bridge.allow("good.example")
    assert bridge.reaches("good.example")
    bridge.run("nft", "flush", "ruleset")
    bridge.load()
    assert bridge.reaches("good.example")


def test_egress_example_gives_an_address_its_whole_time_with_each_answer(bridge):
    bridge.allow("good.example")
    assert bridge.reaches("good.example")
    before = wait_for(lambda: [left for left in bridge.seconds_left() if left < 596], "four seconds")
    assert bridge.web.resolve("good.example", "A") and bridge.seconds_left() > before
    ttl = bridge.web.run("dig", "+noall", "+answer", "@10.83.0.1", "good.example").stdout.split()[1]
    assert int(ttl) <= 1, "the client's own cache ends long before the set's timeout"


def test_egress_example_denies_a_name_below_an_allowed_one(bridge):
    bridge.allow("good.example")
    assert bridge.egress("deny", "ok.good.example").returncode == 0
    bridge.apply()
    assert bridge.egress("list").stdout == "-ok.good.example\ngood.example\n"
    assert bridge.web.resolve("ok.good.example", "A") == ["192.0.3.82"] and bridge.drops("192.0.3.82")
    assert bridge.reaches("good.example")


def test_egress_example_takes_the_longest_domain_there_is(bridge):
    label = "a" * 61
    name = f"{label}.{label}.{label}.{label[:-4]}.example"
    assert len(name) == 251
    bridge.outside.resolve(**{name.removesuffix(".example"): "192.0.3.80"})
    try:
        bridge.allow(name)
        assert bridge.reaches(name)
    finally:
        bridge.outside.resolve(**NAMES)


def test_egress_example_holds_an_instance_by_whatever_name_and_address(bridge):
    web = bridge.web
    bridge.allow("good.example")
    bridge.update("--allow", web.mac, "10.83.0.99")
    bridge.update("--rename", web.mac, "other")
    web.run("ip", "address", "add", "10.83.0.99/24", "dev", "eth0")
    big = ("-s", "4000")  # in fragments

    def pings(address: str, *options: str) -> bool:
        return web.run("ping", "-n", "-c", "1", "-W", "1", *options, address, check=False).returncode == 0

    try:
        assert bridge.reaches("good.example") and pings("192.0.3.80", *big) and pings("192.0.3.80", "-I", "10.83.0.99")
        assert not pings("192.0.3.81") and not pings("192.0.3.81", *big) and not pings("192.0.3.81", "-I", "10.83.0.99")
        bridge.load(held="02:00:00:00:00:01")
        assert pings("192.0.3.81", "-I", "10.83.0.99"), "who is not held"
    finally:
        web.run("ip", "address", "delete", "10.83.0.99/24", "dev", "eth0")


def test_egress_example_reaches_a_private_address_only_by_a_name_that_may_have_one(bridge):
    bridge.allow("good.example")
    assert not bridge.reaches("s0.good.example") and bridge.reaches("ok.good.example")
    (bridge.egress.lists / "private").write_text("s0.good.example\n")
    bridge.apply()
    assert bridge.egress("list").stdout == "+s0.good.example\ngood.example\n"
    assert bridge.reaches("s0.good.example") and bridge.web.resolve("s1.good.example", "A") == [SPECIAL[1]]
    assert bridge.drops(SPECIAL[1])


def test_egress_example_asks_nobody_for_other_names_where_a_resolver_is_given(bridge):
    bridge.allow("good.example")
    assert bridge.egress("deny", "ok.good.example").returncode == 0
    bridge.web.resolve("secret1.bad.example", "A")
    assert "secret1" in bridge.outside.log(), "without it"
    (bridge.egress.lists / "resolver").write_text("192.0.3.53\n")
    own = bridge.egress.config.with_name("own.conf")
    own.write_text("server=192.0.3.53\n")
    refused = bridge.egress("apply")
    assert refused.returncode == 1 and "nothing is changed: /etc/dnsmasq.d/own.conf has" in refused.stderr
    own.unlink()
    bridge.main("server=192.0.3.53", there=False)
    try:
        bridge.apply()
        assert bridge.reaches("good.example") and bridge.web.resolve("web.instance.internal", "A") == ["10.83.0.11"]
        for kind in ("A", "TXT", "PTR"):
            for name in ("secret2.bad.example", "secret2", "secret2.ok.good.example", "secret2.in-addr.arpa"):
                bridge.web.resolve(name, kind)
        assert "secret2" not in bridge.outside.log()
    finally:
        bridge.main("server=192.0.3.53", there=True)
        (bridge.egress.lists / "resolver").unlink()
        bridge.apply()


# The firewall by name, on the same bridge

# Sends datagrams to an address, from so many sockets to each of some ports
FLOOD = """\
import contextlib, socket, sys
address, sockets, first, last = sys.argv[1], *map(int, sys.argv[2:])
for _ in range(sockets):
    flood = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    for port in range(first, last):
        with contextlib.suppress(ConnectionRefusedError):
            flood.sendto(b"x", (address, port))
"""
# Has the kernel forget all connections (IPCTNL_MSG_CT_DELETE, without one to delete)
FORGET = """\
import socket, struct
netfilter = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
netfilter.send(struct.pack("IHHIIBBH", 20, 0x102, 5, 1, 0, 0, 0, 0))
assert netfilter.recv(100)[16:20] == bytes(4)
"""


@pytest.mark.parametrize("table", ["instances", "egress"])
def test_firewall_and_egress_example_keep_room_in_the_table_of_connections(bridge, table):
    last = 12 + (table == "egress")
    web, other = bridge.web, bridge.client("other", f"10:66:6a:4c:a1:{last}")
    other.run("ip", "address", "add", f"10.83.0.{last}/24", "dev", "eth0")
    web.run("ip", "address", "replace", "2001:67c:83::11/80", "dev", "eth0", "nodad")
    web.run("ip", "route", "replace", "default", "via", "2001:67c:83::1")
    bridge.set("net/ipv6/conf/all/forwarding", "1")
    if table == "instances":
        bridge.run("nft", "-f", bridge.example("nftables/firewall.nft"))
        bridge.run("nft", "delete table inet egress")
    else:
        bridge.load(held="02:00:00:00:00:01")

    def tracked(sender, address: str, sockets: int, first: int, last: int) -> int:
        """Return how many connections the host remembers after a flood."""
        sender.run("python3", "-c", FLOOD, address, str(sockets), str(first), str(last))
        return int(bridge.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count").stdout)

    bridge.run("python3", "-c", FORGET)
    assert 3900 < tracked(web, "fd99::1", 3, 1000, 3000) < 4100
    full = tracked(web, "192.0.3.81", 3, 1000, 3000)
    assert full < 4100 and other.pings("10.83.0.1"), "and others go on"
    if table == "instances":
        assert tracked(other, "10.83.0.1", 50, 67, 68) < full + 10, "DHCP"
        bridge.run("nft", "flush chain inet instances dhcp_in")
        assert tracked(other, "10.83.0.1", 50, 67, 68) >= full + 50
    bridge.run("nft", f"flush chain inet {table} connections")
    assert tracked(web, "192.0.3.81", 1, 1000, 3000) > 5500


# One container by itself


class Container(Namespace):
    """A process with a network, and a root or an /etc, of its own."""

    def __init__(self, outside: Outside, folder: Path, kind: str, label: str = "box"):
        super().__init__(label)
        self.folder, self.etc = folder, folder / "etc"
        outside.connect(self, "eth0", f"192.0.3.{100 + outside.ports}/24")
        self.etc.mkdir(exist_ok=True)
        (folder / "root").mkdir(exist_ok=True)
        if not (self.etc / "resolv.conf").exists():
            (self.etc / "resolv.conf").write_text("nameserver 192.0.3.53\noptions timeout:1 attempts:1\n")
        (folder / "pid").write_text("")
        script = f"echo $$ >{folder}/pid\n"
        if kind == "etc":
            script += f"mount --bind {self.etc} /etc\nexec sleep 600\n"
        else:
            script += f"cd {folder}\nmount --bind / root\nmount --bind /proc root/proc\nmount --bind /dev root/dev\n"
            script += "mount --bind etc root/etc\n"
            script += "mount -o remount,bind,ro root/etc\nmount -o remount,bind,ro root\n" * (kind == "read-only")
            script += "exec chroot root sleep 600\n"
        self.first = self.start("unshare", "-m", "sh", "-euc", script)
        wait_for(lambda: "sleep" in self.program(), "the container")
        self.pid = (folder / "pid").read_text().strip()

    def program(self) -> str:
        """Return the command line of the container's first process."""
        pid = (self.folder / "pid").read_text().strip()
        return process_file(pid, "cmdline") if pid else ""

    def inside(self, *command: str) -> subprocess.CompletedProcess:
        """Run a command in the container."""
        enter = ["nsenter", "-t", self.pid, "-m", "-n", "-r", *command]
        return subprocess.run(enter, capture_output=True, text=True, timeout=60)

    def reaches(self, name: str, wait: str = "2") -> bool:
        """Tell whether a name or address answers, resolved as the container's programs do."""
        return self.inside("ping", "-n", "-c", "1", "-W", wait, name).returncode == 0

    def wait_reaches(self, name: str) -> None:
        """Wait until a name answers."""
        wait_for(lambda: self.reaches(name), f"an answer of {name}")

    def open(self) -> None:
        """Take the rules away, as the page does."""
        lines = block("examples/egress/README.md", "nft delete table inet egress").splitlines()
        self.run("nft", *next(line for line in lines if "nft delete" in line).partition("nft ")[2].split())

    def tables(self) -> str:
        """Return the container's tables."""
        return self.run("nft", "list", "tables").stdout

    def dnsmasq(self) -> list[str]:
        """Return the process IDs of the dnsmasqs in the container's network."""
        pids = run("ip", "netns", "pids", self.name).stdout.split()
        return [pid for pid in pids if process_file(pid, "comm") == "dnsmasq\n"]


class Guard:
    """The program for one container, run where /etc is a folder of ours, so that no fault changes the machine's."""

    def __init__(self, folder: Path, outside: Outside):
        self.egress, self.started, self.group = Egress(folder, outside), [], f"inst{os.getpid()}"
        shutil.copy(FOLDER / "container.nft", self.egress.lists)
        self.egress("allow", "good.example")
        self.egress.prefix += self.in_group('echo 0 >"$1/cgroup.procs"')

    def in_group(self, command: str) -> list[str]:
        """Return the beginning of a command that is run after one in which $1 is the folder of a control group."""
        script = 'mount -t cgroup2 cgroup2 /sys/fs/cgroup; mkdir -p "$1"; ' + command + '; shift; exec "$@"'
        return ["unshare", "--mount", "sh", "-ec", script, "sh", f"/sys/fs/cgroup/{self.group}"]

    def close(self) -> None:
        """End what was started, and take the control group away."""
        for process in self.started:
            process.kill()
            process.wait()
        run(*self.in_group("sleep 0.2; rmdir $1"), "true")

    def start(self, pid: str, *resolvers: str, **variables: str) -> subprocess.Popen:
        """Start it; return when all is in force, or it has ended."""
        log = self.egress.folder / f"log{len(self.started)}"
        with open(log, "w") as file:
            self.started.append(
                self.egress.start(
                    "container", pid, *(resolvers or ["192.0.3.53"]), stderr=file, env=self.egress.env | variables
                )
            )
        process = self.started[-1]
        wait_for(lambda: "is held" in log.read_text() or process.poll() is not None, "the start")
        process.log = log
        return process

    def reload(self, process: subprocess.Popen) -> None:
        """Have it read its lists; return when it has."""
        held = process.log.read_text().count("is held")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: process.log.read_text().count("is held") > held, "the lists")

    def kill(self, process: subprocess.Popen) -> None:
        """End it and its dnsmasq, as a crash and systemd do."""
        process.kill()
        process.wait(10)
        for pid in self.egress_group():
            os.kill(pid, signal.SIGKILL)

    def egress_group(self) -> list[int]:
        """Return the processes of its control group."""
        return [int(pid) for pid in run(*self.in_group('cat "$1/cgroup.procs"'), "true").stdout.split()]

    def stop(self, process: subprocess.Popen) -> int:
        """Tell it to end; return its exit status."""
        process.terminate()
        return process.wait(30)


@pytest.fixture
def guard(tmp_path, outside):
    guard = Guard(tmp_path, outside)
    before = {path: path.read_bytes() for path in (tmp_path / "outer").iterdir() if path.is_file()}
    yield guard
    guard.close()
    assert before == {path: path.read_bytes() for path in (tmp_path / "outer").iterdir() if path.is_file()}


@pytest.fixture
def container(tmp_path, outside, guard, request):
    container = Container(outside, tmp_path, getattr(request, "param", "chroot"))
    yield container
    for pid in container.dnsmasq():  # where a test failed
        os.kill(int(pid), signal.SIGKILL)
    container.close()


@pytest.mark.parametrize("container", ["etc", "read-only"], indirect=True)
def test_egress_example_guards_one_container_by_itself(container, guard):
    before = (container.etc / "resolv.conf").read_bytes()
    started = guard.start(container.pid)
    assert started.poll() is None and "CAP_NET_RAW" in started.log.read_text()
    assert (container.etc / "resolv.conf").read_bytes() == before
    again = guard.start(container.pid)
    assert again.wait(30) == 1 and "nothing is changed" in again.log.read_text()
    assert not container.reaches("192.0.3.80", wait="0.5"), "nobody has resolved it yet"
    container.wait_reaches("good.example")
    assert not container.reaches("192.0.3.81", wait="0.5")
    other = container.inside("dig", "+short", "+timeout=1", "+tries=1", "@192.0.3.80", "good.example").stdout
    assert other == "192.0.3.80\n", "whichever resolver is asked, it is ours that answers"
    assert container.dnsmasq() and guard.stop(started) == 0 and container.dnsmasq() == []
    assert not container.reaches("192.0.3.81", wait="0.5"), "it stays closed"
    container.open()
    container.wait_reaches("bad.example")
    assert (container.etc / "resolv.conf").read_bytes() == before


def test_egress_example_asks_nobody_for_names_that_a_container_may_not_reach(container, guard, outside):
    def ask(number: int) -> None:
        """Ask for names in all ways, with a number in them."""
        script = (
            f"for kind in A TXT PTR; do dig +time=1 +tries=1 secret{number}.bad.example $kind @192.0.3.53\n"
            f"dig +time=1 +tries=1 +tcp secret{number} $kind @192.0.3.53; done\n"
        )
        container.inside("setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", script)

    ask(1)
    assert "secret1.bad.example" in outside.log() and "secret1 " in outside.log()
    guard.start(container.pid)
    ask(2)
    container.wait_reaches("good.example")
    assert "secret2" not in outside.log(), "not by dnsmasq's user either"


def test_egress_example_opens_a_private_or_special_address_only_to_a_private_name(container, guard):
    names = {f"s{number}.good.example": address for number, address in enumerate(SPECIAL)}
    for name in names:
        container.wait_reaches(name)
    started = guard.start(container.pid)
    container.wait_reaches("good.example")
    for name, address in names.items():
        kind = "AAAA" if ":" in address else "A"
        assert container.inside("dig", "+short", name, kind).stdout == f"{address}\n"
    listing = container.run("nft", "list", "table", "inet", "egress").stdout
    assert all(address in listing for address in SPECIAL), "by dnsmasq's word they are allowed"
    assert not any(container.reaches(address, wait="0.3") for address in SPECIAL)
    (guard.egress.lists / "private").write_text("".join(f"{name}\n" for name in names))
    guard.reload(started)
    for name in names:
        container.wait_reaches(name)


# Connects to an address that is not allowed, as often as it can, sends to where it is answered, and counts its tries
TRIES = """\
import contextlib, itertools, socket, sys
old = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in itertools.count(1):
    with contextlib.suppress(OSError):
        old.sendto(b"x", ("192.0.3.81", 9000))
    with socket.socket() as tried:
        tried.setblocking(False)
        tried.connect_ex(("192.0.3.81", 80))
    if number % 100 == 0:
        print(number, file=open(sys.argv[1], "w"))
"""
ECHO = """\
import socket
echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
echo.bind(("192.0.3.81", 9000))
while True:
    echo.sendto(b"y", echo.recvfrom(9)[1])
"""


def test_egress_example_lets_no_try_through_whatever_happens_to_its_programs(container, guard, outside):
    count = "add table ip seen; add chain ip seen c { type filter hook input priority 0; }; add rule ip seen c ip daddr"
    outside.run("nft", f"{count} 192.0.3.81 counter")
    tried = container.folder / "tried"

    def seen() -> int:
        return int(re.search(r"packets (\d+)", outside.run("nft", "list", "table", "ip", "seen").stdout)[1])

    def tries() -> int:
        return int((tried.exists() and tried.read_text()) or 0)

    try:
        echo = outside.start("python3", "-c", ECHO)
        trying = container.start("python3", "-c", TRIES, tried)
        conntrack = "add table ip t; add chain ip t c { type filter hook output priority 0; }; add rule ip t c ct state"
        container.run("nft", f"{conntrack} established counter")
        wait_for(lambda: "packets 0 " not in container.run("nft", "list", "table", "ip", "t").stdout, "an answer")
        started = guard.start(container.pid)
        before, first = seen(), tries()
        for number in range(20):
            guard.reload(started)
            if number == 5:
                (dnsmasq,) = container.dnsmasq()
                os.kill(int(dnsmasq), signal.SIGKILL)
                assert started.wait(30) == 1
            elif number == 10:
                guard.kill(started)
            elif number == 15:
                assert guard.stop(started) == 0
            started = guard.start(container.pid) if started.poll() is not None else started
        wait_for(lambda: tries() - first > 10000 or trying.poll() is not None, "ten thousand tries", 120)
        assert trying.poll() is None
        assert seen() == before
        assert guard.stop(started) == 0
        container.open()
        wait_for(lambda: seen() > before, "a try that gets through at the end")
    finally:
        outside.run("nft", "delete table ip seen")
        outside.stop(echo)


def test_egress_example_leaves_no_dnsmasq_where_it_is_told_to_end_at_its_start(container, guard):
    process = guard.egress.start("container", container.pid, "192.0.3.53")
    while process.poll() is None and not container.dnsmasq():
        pass
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0 and container.dnsmasq() == []


def test_egress_example_ends_with_the_container_and_leaves_nothing(container, guard, outside):
    before = (container.etc / "resolv.conf").read_bytes()
    started = guard.start(container.pid)
    (dnsmasq,) = container.dnsmasq()
    container.stop(container.first, signal.SIGKILL)
    assert started.wait(30) == 0 and not is_alive(dnsmasq)
    assert (container.etc / "resolv.conf").read_bytes() == before
    restarted = Container(outside, container.folder, "chroot", "again")
    try:
        restarted.wait_reaches("bad.example")  # as before
        again = guard.start(restarted.pid)
        restarted.wait_reaches("good.example")
        assert not restarted.reaches("192.0.3.81") and guard.stop(again) == 0
    finally:
        restarted.close()


def test_egress_example_fails_and_keeps_the_rules_where_the_dnsmasq_of_a_container_ends(container, guard):
    started = guard.start(container.pid)
    container.wait_reaches("good.example")
    (dnsmasq,) = container.dnsmasq()
    os.kill(int(dnsmasq), signal.SIGKILL)
    assert started.wait(30) == 1 and "its dnsmasq has ended" in started.log.read_text()
    assert not container.reaches("192.0.3.81")
    again = guard.start(container.pid)
    container.wait_reaches("good.example")
    assert guard.stop(again) == 0


def test_egress_example_tells_systemd_when_a_container_is_guarded(container, guard):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(guard.egress.folder / "notify"))
        systemd.settimeout(30)
        guard.start(container.pid, NOTIFY_SOCKET=str(guard.egress.folder / "notify"))
        assert systemd.recv(100) == b"READY=1" and "inet egress" in container.tables()


def test_egress_example_lets_a_container_have_its_leases(container, guard, outside):
    folder = guard.egress.folder
    outside.run("ip", "address", "replace", "fd83:5eed::1/80", "dev", "lan", "nodad")
    options = [
        "--conf-file=/dev/null",
        "--port=0",
        "--user=root",
        "--pid-file",
        "--keep-in-foreground",
        "--interface=lan",
    ]
    options += ["--dhcp-range=fd83:5eed::100,fd83:5eed::1ff,80,120", f"--dhcp-leasefile={folder}/leases"]
    server = outside.start("dnsmasq", *options)
    try:
        assert guard.start(container.pid).poll() is None
        (folder / "script").write_text("#!/bin/sh\n")
        (folder / "script").chmod(0o755)
        files = ["-lf", folder / "lease6", "-pf", folder / "pid6", "-sf", folder / "script"]
        show = ("ip", "-6", "address", "show", "dev", "eth0", "scope", "link", "-tentative")
        wait_for(lambda: container.run(*show).stdout, "the link-local address")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        container.start("dhclient", "-6", "-d", "-cf", "/dev/null", *files, "eth0", **quiet)
        lease = folder / "lease6"
        wait_for(lambda: lease.exists() and "iaaddr fd83:5eed::" in lease.read_text(), "a lease")
    finally:
        outside.stop(server)


def test_egress_example_keeps_a_container_closed_where_its_port_is_taken(container, guard):
    code = "import socket, time\ntaken = [socket.socket(2, kind) for kind in (1, 2)]\n"
    code += (
        "for each in taken:\n    each.bind(('127.0.0.1', 10053))\ntaken[0].listen()\nprint(flush=True)\ntime.sleep(600)"
    )
    program = container.start("python3", "-c", code, stdout=subprocess.PIPE)
    program.stdout.readline()
    started = guard.start(container.pid)
    assert started.wait(30) == 1 and "dnsmasq does not start at port 10053" in started.log.read_text()
    assert not container.reaches("192.0.3.81", wait="0.5") and container.dnsmasq() == []
    container.stop(program)
    assert guard.start(container.pid).poll() is None
    container.wait_reaches("good.example")


def test_egress_example_refuses_a_container_of_its_own_control_group(container, guard):
    run(*guard.in_group(f'echo {container.pid} >"$1/cgroup.procs"'), "true")
    started = guard.start(container.pid)
    assert started.wait(30) == 1 and "control group beside" in started.log.read_text() and container.tables() == ""
    os.kill(int(container.pid), signal.SIGKILL)


def test_egress_example_changes_nothing_where_its_rules_are_not_loaded(container, guard):
    (guard.egress.lists / "container.nft").write_text("table inet egress { broken }\n")
    started = guard.start(container.pid)
    assert started.wait(30) == 1 and "nothing is changed" in started.log.read_text()
    assert container.tables() == "" and container.dnsmasq() == []
    container.wait_reaches("bad.example")


def test_egress_example_refuses_a_process_with_the_network_of_the_host(guard, outside):
    process = outside.start("sleep", "600")
    for pid in (str(process.pid), "1"):
        started = guard.start(pid)
        assert started.wait(30) == 1 and "host's network" in started.log.read_text()
    outside.stop(process)
    started = guard.start(str(process.pid))
    assert started.wait(30) == 1 and "No such process" in started.log.read_text()
    assert outside.run("nft", "list", "tables").stdout == ""


def test_egress_example_starts_once_when_started_twice_at_once(container, guard):
    started = [guard.egress.start("container", container.pid, "192.0.3.53") for _ in range(3)]
    try:
        wait_for(lambda: [process.poll() for process in started].count(1) == 2, "the end of two")
        wait_for(lambda: "inet egress" in container.tables(), "the start of one")
        assert [process.poll() for process in started].count(None) == 1 and len(container.dnsmasq()) == 1
        container.wait_reaches("good.example")
    finally:
        for process in started:
            process.terminate()
            process.communicate(timeout=30)


@pytest.mark.parametrize(
    "arguments",
    ["container", "container 1", "container x 192.0.3.53", f"container {9**30} 192.0.3.53", "container 1 2 3 4"],
)
def test_egress_example_container_usage(lists, arguments):
    result = lists(*arguments.split())
    assert result.returncode == 2 and result.stderr.endswith(": no such usage: see --help\n")


@pytest.mark.parametrize("resolver", ["resolver", "cafe", "1.2.3"])
def test_egress_example_refuses_what_is_no_address_of_a_resolver(lists, resolver):
    result = lists("container", "1", resolver)
    assert result.returncode == 1 and resolver in result.stderr and result.stderr.count("\n") == 1


# Containers of Docker

SERVICE = "import socket\nserver = socket.create_server(('', 80))\nwhile True:\n    server.accept()[0].close()"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 80), 2)"


class Docker(Namespace):
    """A host with a resolver, a dockerd, and containers web, db and cache on a network of their own."""

    def __init__(self, outside: Outside, folder: Path):
        super().__init__("docker")
        outside.connect(self, "eth0", f"192.0.3.{100 + outside.ports}/24")
        (folder / "run").mkdir()
        (folder / "daemon.json").write_text("{}")
        options = [
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--pid-file",
            "--user=root",
            "--keep-in-foreground",
        ]
        self.start("dnsmasq", *options, "--server=192.0.3.53", "--listen-address=127.0.0.2", "--bind-interfaces")
        (folder / "resolv.conf").write_text("nameserver 127.0.0.2\n")
        options = f"--config-file={folder}/daemon.json --data-root={folder}/docker --storage-driver=vfs"
        begin = ["sh", "-ec", f"mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec dockerd {options}"]
        with open(folder / "dockerd.log", "w") as log:
            self.dockerd = self.start(
                *mounted({"/run": folder / "run", "/etc/resolv.conf": folder / "resolv.conf"}),
                *begin,
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: "API listen on" in (folder / "dockerd.log").read_text(), "dockerd")
        (folder / "image" / "usr").mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (folder / "image" / name).symlink_to(f"usr/{name}")
        run("tar", "-C", folder / "image", "-cf", folder / "image.tar", ".")
        self.docker("import", folder / "image.tar", "image")
        self.docker("network", "create", "app")
        for name in ("web", "db", "cache"):
            options = ["-d", "--name", name, "--network", "app", "--cap-drop=NET_RAW", "-v", "/usr:/usr:ro"]
            self.docker("run", *options, "image", "python3", "-c", SERVICE)
        self.pid = self.docker("inspect", "-f", "{{.State.Pid}}", "web").stdout.strip()

    def docker(self, *arguments, check: bool = True) -> subprocess.CompletedProcess:
        """Run a command of Docker."""
        return self.run("nsenter", "-m", "-t", self.dockerd.pid, "docker", *arguments, check=check)

    def connects(self, name: str) -> bool:
        """Tell whether web connects to a name."""
        return self.docker("exec", "web", "python3", "-c", CONNECT, name, check=False).returncode == 0

    def ask(self, name: str, *options: str) -> None:
        """Have web ask Docker's resolver."""
        self.docker("exec", "web", "dig", "+tries=1", "+time=1", *options, "@127.0.0.11", name, check=False)

    def close(self) -> None:
        """End the containers and dockerd."""
        self.docker("rm", "-f", "web", "db", "cache", check=False)
        self.stop(self.dockerd)
        super().close()
        run(
            "unshare",
            "--mount",
            "sh",
            "-c",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup; rmdir /sys/fs/cgroup/docker || :",
        )


def test_egress_example_lets_a_container_of_docker_have_services_of_its_network(guard, outside, tmp_path):
    need("dockerd", "docker", "runc")
    docker = Docker(outside, tmp_path)
    try:
        rules = docker.run("nsenter", "-n", "-t", docker.pid, "iptables-save", "-t", "nat").stdout
        behind = re.search(r"-p udp .*--to-destination 127\.0\.0\.11:(\d+)", rules)[1]
        docker.ask("secret1.bad.example")
        docker.ask("secret2.bad.example", "-p", behind)
        assert "secret1" in outside.log() and "secret2" in outside.log() and docker.connects("cache")
        (guard.egress.lists / "private").write_text("db\n")
        started = guard.start(docker.pid, "192.0.3.53", "127.0.0.11")
        assert started.poll() is None and "warning" not in started.log.read_text()
        assert docker.connects("db") and not docker.connects("cache")
        resolved = docker.docker("exec", "web", "getent", "ahostsv4", "good.example").stdout
        assert "192.0.3.80" in resolved
        docker.ask("secret3.bad.example")
        docker.ask("secret4.bad.example", "-p", behind)
        docker.docker("stop", "-t", "0", "db")
        asked = outside.log().count("query")
        docker.ask("db")
        assert "secret3" not in outside.log() and "secret4" not in outside.log()
        assert outside.log().count("query") < asked + 10, "no loop"
        assert guard.stop(started) == 0
    finally:
        docker.close()
