"""The example egress."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import EXAMPLES, OPEN, Host, Namespace, environment, is_alive, run, wait_for

pytestmark = pytest.mark.slow
FOLDER = EXAMPLES / "egress"
NAMES = {"good": "192.0.2.80", "ok.good": "192.0.2.82", "bad": "192.0.2.81"}


class Outside(Namespace):
    """What is beyond: a resolver on 192.0.2.53, and addresses that answer a ping."""

    def __init__(self, folder: Path):
        super().__init__("outside")
        self.folder, self.server, self.ports = folder, None, 0
        self.run("ip", "link", "add", "lan", "type", "bridge")
        self.run("ip", "link", "set", "lan", "up")
        for last in ("53", "80", "81", "82"):
            self.run("ip", "address", "add", f"192.0.2.{last}/24", "dev", "lan")
        self.resolve(**NAMES)

    def connect(self, other: Namespace, device: str, address: str) -> None:
        """Connect another namespace's new device to it."""
        self.ports += 1
        port = f"port{self.ports}"
        self.run("ip", "link", "add", port, "type", "veth", "peer", "name", device, "netns", other.name)
        self.run("ip", "link", "set", port, "master", "lan", "up")
        other.run("ip", "address", "add", address, "dev", device)
        other.run("ip", "link", "set", device, "up")

    def resolve(self, **names: str) -> None:
        """Have the resolver know these names in the domain example, for an hour."""
        if self.server:
            self.stop(self.server)
        options = [f"--host-record={name}.example,{address}" for name, address in names.items()]
        options += ["--no-resolv", "--no-hosts", "--pid-file", "--user=root", "--keep-in-foreground"]
        options += ["--conf-file=/dev/null", "--log-facility=-", "--local=/example/", "--local-ttl=3600"]
        options += ["--listen-address=192.0.2.53", "--bind-interfaces"]
        log = self.folder / "resolver.log"
        with open(log, "w") as file:
            self.server = self.start("dnsmasq", *options, stdout=file, stderr=file)
        wait_for(lambda: "started" in log.read_text(), "the resolver")


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    need("flock", "nsenter", "unshare", "chroot", "getent", *PROGRAMS)
    outside = Outside(tmp_path_factory.mktemp("outside"))
    yield outside
    if outside in OPEN:  # as it is not after a run that was broken off
        outside.close()


class Egress:
    """The scripts with their files in a folder, run in a namespace."""

    def __init__(self, folder: Path, node: Namespace | None = None):
        self.folder, self.lists = folder, folder / "lists"
        self.prefix = node.command() if node else []
        self.env = environment(folder / "instances", EGRESS_LISTS=str(self.lists), EGRESS_RUN=str(folder))
        self.env |= {"EGRESS_CONFIG": str(folder / "egress.conf"), "EGRESS_RESTART": f"sh {folder}/restart"}
        self.lists.mkdir(exist_ok=True)

    def start(self, *arguments: str, script: str = "egress.sh", **variables: str) -> subprocess.Popen:
        """Start a script."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*self.prefix, FOLDER / script, *arguments], env=self.env | variables, **streams)

    def __call__(self, *arguments: str, **options: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


# Lists


@pytest.fixture
def lists(tmp_path):
    """The script and its lists, without a network."""
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
        assert result.returncode == 2 and result.stderr.startswith("usage: ") and result.stderr.count("\n") == 1


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


# dnsmasq's configuration


def refused(lists: Egress, text: str) -> subprocess.CompletedProcess:
    """Apply with this stand-in for a dnsmasq that says no."""
    stand_in = lists.folder / "bin" / "dnsmasq"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/sh\n{text}\n")
    stand_in.chmod(0o755)
    (lists.folder / "restart").write_text(f"touch {lists.folder}/restarted\n")
    (lists.folder / "egress.conf").write_text("# old\n")
    lists("allow", "good.example")
    return lists("apply", PATH=f"{stand_in.parent}:{lists.env['PATH']}")


@pytest.mark.parametrize("fault", ["nftset", "test"])
def test_egress_example_leaves_the_old_dnsmasq_where_a_check_fails(lists, fault):
    built = "no-nftset" if fault == "nftset" else "nftset"
    text = f'[ "$1" = --version ] && echo "IPv6 {built} auth" && exit\necho "bad option" >&2; exit 1'
    result = refused(lists, text)
    assert result.returncode == 1 and ("no nftset" if fault == "nftset" else "bad option") in result.stderr
    assert (lists.folder / "egress.conf").read_text() == "# old\n" and not (lists.folder / "restarted").exists()
    assert not list(lists.folder.glob(".egress*"))


@pytest.mark.parametrize("before", ["# old\n", None])
def test_egress_example_brings_the_old_configuration_back_where_dnsmasq_does_not_start(lists, before):
    main, config = lists.folder / "main.conf", lists.folder / "egress.conf"
    main.write_text(f"cache-size=1000\nconf-file={config}\n")  # twice: dnsmasq refuses that
    (lists.folder / "restart").write_text(f"dnsmasq --test --conf-file={main}; echo $? >>{lists.folder}/restarts\n")
    with open(lists.folder / "restart", "a") as file:
        file.write(f'test "$(tail -n 1 {lists.folder}/restarts)" = 0\n')
    config.write_text(before or "")
    if before is None:
        main.write_text(f"cache-size=1000\nconf-dir={lists.folder},egress.conf\n")
        config.unlink()
        (lists.folder / "restart").write_text(
            f'test ! -e {config}; echo $? >>{lists.folder}/restarts; test "$(tail -n 1 {lists.folder}/restarts)" = 0\n'
        )
    lists("allow", "good.example")
    result = lists("apply")
    assert result.returncode == 1 and "the old one is back" in result.stderr
    assert (config.read_text() if config.exists() else None) == before
    statuses = (lists.folder / "restarts").read_text().split()
    assert statuses[0] != "0" and statuses[1] == "0"
    assert not list(lists.folder.glob(".egress*"))


# A bridge, with the instance web on it


class Bridge(Host):
    """A host that holds web to what is allowed, with a dnsmasq that keeps a cache unless it is told otherwise."""

    def __init__(self, folder: Path, outside: Outside):
        super().__init__(folder)
        self.outside, self.egress = outside, Egress(folder, self)
        outside.connect(self, "uplink", "192.0.2.1/24")
        outside.run("ip", "route", "replace", "10.83.0.0/24", "via", "192.0.2.1")
        self.set("net/ipv4/ip_forward", "1")
        self.update("--initialize", "br0", "host")
        self.web = self.client("web", "10:66:6a:4c:a1:11")
        self.web.run("ip", "address", "add", "10.83.0.11/24", "dev", "eth0")
        self.web.run("ip", "route", "add", "default", "via", "10.83.0.1")
        self.update("add", self.web.mac, "10.83.0.11", "web")
        self.process()
        options = ["interface=br0", "bind-interfaces", "no-resolv", "no-hosts", "user=root", "server=192.0.2.53"]
        options += [f"pid-file={folder}/dnsmasq.pid", f"conf-file={folder}/egress.conf", f"hostsdir={folder}/hosts.d"]
        (folder / "main.conf").write_text("\n".join(options) + "\n")
        (folder / "restart").write_text(
            f"cd {folder}\n"
            "if pid=$(cat dnsmasq.pid 2>/dev/null); then\n"
            "    kill $pid; while grep -qs 'State:.[^ZX]' /proc/$pid/status; do sleep 0.1; done\n"
            "fi\n"
            f"dnsmasq --conf-file={folder}/main.conf\n"
        )

    def load(self, *, timeout: str = "10m") -> None:
        """Load the example's rules, with another timeout of the sets."""
        rules = self.example("egress/egress.nft")
        rules.write_text(rules.read_text().replace("timeout 10m", f"timeout {timeout}"))
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
    for name in ("live", "denied"):
        (one_bridge.egress.lists / name).unlink(missing_ok=True)
    one_bridge.run("nft", "flush", "ruleset")
    one_bridge.load()
    return one_bridge


def test_egress_example_lets_an_instance_reach_what_is_allowed(bridge):
    web = bridge.web
    bridge.allow("*.Good.Example.")
    assert not web.pings("192.0.2.80"), "nobody has resolved it yet"
    assert bridge.reaches("good.example") and bridge.reaches("ok.good.example")
    assert web.resolve("bad.example", "A") == ["192.0.2.81"] and not web.pings("192.0.2.81")
    assert web.run("dig", "+timeout=1", "+tries=1", "@192.0.2.53", "good.example", check=False).returncode != 0
    assert web.resolve("web.instance.internal", "A") == ["10.83.0.11"], "the registry's names are answered as before"
    bridge.load()
    assert web.pings("192.0.2.80"), "what was resolved stays when the rules are loaded again"
    bridge.outside.resolve(**NAMES | {"good": "192.0.2.82"})
    try:
        assert web.resolve("good.example", "A") == ["192.0.2.82"] and web.pings("192.0.2.82")
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
    assert bridge.web.resolve("ok.good.example", "A") == ["192.0.2.82"] and not bridge.web.pings("192.0.2.82")
    assert bridge.reaches("good.example")


def test_egress_example_takes_the_longest_domain_there_is(bridge):
    label = "a" * 61
    name = f"{label}.{label}.{label}.{label[:-4]}.example"
    assert len(name) == 251
    bridge.outside.resolve(**{name.removesuffix(".example"): "192.0.2.80"})
    try:
        bridge.allow(name)
        assert bridge.reaches(name)
    finally:
        bridge.outside.resolve(**NAMES)


def test_egress_example_with_the_guard_its_page_asks_for_holds_an_address_that_is_not_registered(bridge):
    bridge.allow("good.example")
    assert bridge.reaches("good.example")
    page = (FOLDER / "README.md").read_text()
    (files,) = re.findall(r"^cp (.*\.nft) /etc/instances/$", page, re.MULTILINE)
    for file in files.split():
        bridge.run("nft", "-f", bridge.example(f"egress/{file}"))
    web = bridge.web
    web.run("ip", "address", "add", "10.83.0.99/24", "dev", "eth0")
    try:
        assert web.run("ping", "-n", "-c", "1", "-W", "2", "-I", "10.83.0.99", "192.0.2.81", check=False).returncode
    finally:
        web.run("ip", "address", "delete", "10.83.0.99/24", "dev", "eth0")
    assert web.pings("192.0.2.80")


# One container by itself


class Container(Namespace):
    """A process with a network, and a root or an /etc, of its own."""

    def __init__(self, outside: Outside, folder: Path, kind: str, label: str = "box"):
        super().__init__(label)
        self.folder, self.etc = folder, folder / "etc"
        outside.connect(self, "eth0", f"192.0.2.{100 + outside.ports}/24")
        self.etc.mkdir(exist_ok=True)
        (folder / "root").mkdir(exist_ok=True)
        if not (self.etc / "resolv.conf").exists():
            (self.etc / "resolv.conf").write_text("nameserver 192.0.2.53\noptions timeout:1 attempts:1\n")
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
        return Path(f"/proc/{pid}/cmdline").read_text() if pid else ""

    def inside(self, *command: str) -> subprocess.CompletedProcess:
        """Run a command in the container."""
        enter = ["nsenter", "-t", self.pid, "-m", "-n", "-r", *command]
        return subprocess.run(enter, capture_output=True, text=True, timeout=60)

    def reaches(self, name: str) -> bool:
        """Tell whether a name or address answers, resolved as the container's programs do."""
        return self.inside("ping", "-n", "-c", "1", "-W", "2", name).returncode == 0

    def tables(self) -> str:
        """Return the container's tables."""
        return self.run("nft", "list", "tables").stdout


class Guard:
    """container.sh, run where /etc/resolv.conf is a file of ours, so that a fault does not change the machine's."""

    def __init__(self, folder: Path, outside: Outside):
        self.outer = folder / "outer.conf"
        self.outer.write_text("# the machine's\n")
        self.egress = Egress(folder, outside)
        bound = f'mount --bind {self.outer} /etc/resolv.conf; exec "$@"'
        self.egress.prefix = outside.command("unshare", "-m", "sh", "-euc", bound, "-")
        self.egress("allow", "good.example")

    def __call__(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return self.egress(*arguments, script="container.sh", **variables)

    def dnsmasq(self) -> list[str]:
        """Return the process IDs of the dnsmasqs that were started."""
        return [path.read_text().strip() for path in self.egress.folder.glob("egress.*.pid")]


@pytest.fixture
def guard(tmp_path, outside):
    guard = Guard(tmp_path, outside)
    yield guard
    assert guard.outer.read_text() == "# the machine's\n"


@pytest.fixture
def container(tmp_path, outside, guard, request):
    container = Container(outside, tmp_path, getattr(request, "param", "chroot"))
    yield container
    guard("stop", container.pid)
    container.close()
    for process in filter(is_alive, guard.dnsmasq()):  # where a test failed
        os.kill(int(process), signal.SIGTERM)


@pytest.mark.parametrize("container", ["etc", "chroot", "read-only"], indirect=True)
def test_egress_example_guards_one_container_by_itself(container, guard):
    before = (container.etc / "resolv.conf").read_bytes()
    started = guard("start", container.pid, "192.0.2.53")
    assert started.returncode == 0 and "started" in started.stderr
    assert (container.etc / "resolv.conf").read_bytes() == before
    again = guard("start", container.pid, "192.0.2.53")
    assert again.returncode == 1 and "runs already" in again.stderr
    assert not container.reaches("192.0.2.80"), "nobody has resolved it yet"
    assert container.reaches("good.example")
    resolved = container.inside("getent", "ahostsv4", "bad.example").stdout
    assert "192.0.2.81" in resolved and not container.reaches("192.0.2.81")
    other = container.inside("dig", "+short", "+timeout=1", "+tries=1", "@192.0.2.80", "good.example").stdout
    assert other == "192.0.2.80\n", "whichever resolver is asked, it is ours that answers"
    (dnsmasq,) = guard.dnsmasq()
    assert guard("stop", container.pid).returncode == 0 and not is_alive(dnsmasq)
    assert container.tables() == "" and container.reaches("bad.example")
    assert (container.etc / "resolv.conf").read_bytes() == before
    assert "did not run" in guard("stop", container.pid).stderr


def test_egress_example_leaves_nothing_of_a_container_that_was_restarted(container, guard, outside):
    before = (container.etc / "resolv.conf").read_bytes()
    assert guard("start", container.pid, "192.0.2.53").returncode == 0
    (dnsmasq,) = guard.dnsmasq()
    container.stop(container.first, signal.SIGKILL)
    wait_for(lambda: not is_alive(dnsmasq) and not guard.dnsmasq(), "the end of the old dnsmasq")
    assert (container.etc / "resolv.conf").read_bytes() == before
    restarted = Container(outside, container.folder, "chroot", "again")
    try:
        assert restarted.reaches("bad.example"), "resolves as before"
        assert guard("start", restarted.pid, "192.0.2.53").returncode == 0
        assert restarted.reaches("good.example") and not restarted.reaches("bad.example")
        assert guard("stop", restarted.pid).returncode == 0
        assert (container.etc / "resolv.conf").read_bytes() == before and restarted.reaches("bad.example")
    finally:
        restarted.close()


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
        assert guard("start", container.pid, "192.0.2.53").returncode == 0
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


@pytest.mark.parametrize("fault", ["port", "nft"])
def test_egress_example_undoes_a_start_that_fails_half_way(container, guard, fault):
    variables = {}
    if fault == "port":
        code = "import socket, time\ntaken = [socket.socket(2, kind) for kind in (1, 1, 2, 2)]\n"
        code += "for each, port in zip(taken, (53, 10053) * 2):\n    each.bind(('127.0.0.1', port))\n"
        code += "for each in taken[:2]:\n    each.listen()\nprint(flush=True)\ntime.sleep(600)"
        container.start("python3", "-c", code, stdout=subprocess.PIPE).stdout.readline()
    else:
        stand_in = guard.egress.folder / "bin" / "nft"
        stand_in.parent.mkdir()
        stand_in.write_text("#!/bin/sh\nexit 1\n")
        stand_in.chmod(0o755)
        variables["PATH"] = f"{stand_in.parent}:{guard.egress.env['PATH']}"
    result = guard("start", container.pid, "192.0.2.53", **variables)
    assert result.returncode == 1 and "nothing is changed" in result.stderr
    assert container.tables() == "" and guard.dnsmasq() == [] and container.reaches("bad.example")
    pids = run("ip", "netns", "pids", container.name).stdout.split()
    assert pids and not [pid for pid in pids if "dnsmasq" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_egress_example_refuses_a_process_with_the_network_of_the_host(guard, outside):
    outside.run("nft", "add", "table", "inet", "egress")
    process = outside.start("sleep", "600")
    try:
        for pid in (str(process.pid), "1"):
            for arguments in (("start", pid, "192.0.2.53"), ("stop", pid)):
                result = guard(*arguments)
                assert result.returncode == 1
                assert "host's network" in result.stderr or (pid == "1" and "may look into" in result.stderr)
        assert outside.run("nft", "list", "tables").stdout == "table inet egress\n"
        outside.stop(process)
        assert "no such process" in guard("stop", str(process.pid)).stderr
    finally:
        outside.run("nft", "delete", "table", "inet", "egress")


def test_egress_example_starts_once_when_started_twice_at_once(container, guard):
    command = ("start", container.pid, "192.0.2.53")
    processes = [guard.egress.start(*command, script="container.sh") for _ in range(3)]
    assert sorted(process.communicate(timeout=30) and process.returncode for process in processes) == [0, 1, 1]
    assert container.reaches("good.example")


@pytest.mark.parametrize(
    "arguments", ["", "start", "start 1", "stop x", "start 1 resolver", "start 1 cafe", "start 1 1.2.3", "stop 1 2"]
)
def test_egress_example_container_usage(lists, arguments):
    result = lists(*arguments.split(), script="container.sh")
    assert result.returncode == 2 and result.stderr.startswith("usage: ") and result.stderr.count("\n") == 1
