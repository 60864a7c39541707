"""The example egress."""

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import DNSMASQ, EXAMPLES, Host, Namespace, environment, make_etc, mounted, process_file, run, wait_for

pytestmark = pytest.mark.slow
PROGRAM = EXAMPLES / "egress" / "instances-egress"
NAMES = {"good": "192.0.3.80", "ok.good": "192.0.3.82", "bad": "192.0.3.81"}  # public addresses, in these namespaces
SPECIAL = ("10.77.0.5", "169.254.169.254", "100.100.100.200", "fd77::5", "64:ff9b::a9fe:a9fe")


class Outside(Namespace):
    """What is beyond: a resolver on 192.0.3.53, and addresses that answer a ping."""

    def __init__(self, folder: Path):
        super().__init__("outside")
        self.folder, self.server, self.ports = folder, None, 0
        addresses = [*(f"192.0.3.{last}/24" for last in (53, 80, 81, 82)), *SPECIAL, "fd99::1/64"]
        self.ip("link add lan type bridge", "link set lan up", *(f"address add {a} dev lan nodad" for a in addresses))
        self.resolve(**NAMES)

    def connect(self, other: Namespace, device: str, address: str) -> None:
        """Connect another namespace's new device to it."""
        self.ports += 1
        port = f"port{self.ports}"
        self.ip(f"link add {port} type veth peer name {device} netns {other.name}", f"link set {port} master lan up")
        other.ip(
            f"address add {address} dev {device}",
            f"address add fd99::{self.ports + 1}/64 dev {device} nodad",
            f"link set {device} up",
            *(f"route add {special} dev {device}" for special in SPECIAL),
        )

    def resolve(self, **names: str) -> None:
        """Have the resolver know these names in the domain example, for an hour."""
        if self.server:
            self.stop(self.server)
        options = [f"--host-record={name}.example,{address}" for name, address in names.items()]
        options += [f"--host-record=s{number}.good.example,{address}" for number, address in enumerate(SPECIAL)]
        options += ["--log-queries", "--local=/example/", "--local-ttl=3600"]
        options += ["--listen-address=192.0.3.53", "--bind-interfaces"]
        with open(self.folder / "resolver.log", "w") as file:
            self.server = self.start(*DNSMASQ, *options, stdout=file, stderr=file)
        wait_for(lambda: "started" in self.log(), "the resolver")

    def log(self) -> str:
        """Return what the resolver has told, the questions it was asked among it."""
        return (self.folder / "resolver.log").read_text()


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    need("nsenter", "unshare", "getent", *PROGRAMS)
    outside = Outside(tmp_path_factory.mktemp("outside"))
    yield outside
    outside.close()


class Egress:
    """The program with files in a folder that is /etc for it, run in a namespace, and a systemctl that is a script."""

    def __init__(self, folder: Path, node: Namespace | None = None):
        self.folder, etc = folder, make_etc(folder / "outer")
        self.lists, self.config, self.restart = etc / "egress", etc / "dnsmasq.d" / "egress.conf", folder / "restart"
        for made in (self.lists, self.config.parent, folder / "bin"):
            made.mkdir(exist_ok=True)
        (etc / "resolv.conf").write_text("nameserver 192.0.3.53\n")
        self.program("systemctl", f'[ "$*" = "restart dnsmasq" ] && exec sh {self.restart}')
        self.prefix = [*(node.command() if node else []), *mounted({"/etc": etc})]
        self.env = environment(folder / "instances")
        self.env["PATH"] = f"{folder}/bin:{self.env['PATH']}"

    def program(self, name: str, text: str) -> None:
        """Put a script before another program of this name."""
        (self.folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, *arguments: str, stderr=subprocess.PIPE) -> subprocess.Popen:
        command = [*self.prefix, PROGRAM, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=self.env)

    def __call__(self, *arguments: str, by: tuple = ()) -> subprocess.CompletedProcess:
        return run(*self.prefix, *by, PROGRAM, *arguments, check=False, env=self.env, timeout=60)


# Lists


@pytest.fixture
def lists(tmp_path):
    """The program and its lists, without a network."""
    need("unshare")
    return Egress(tmp_path)


def test_egress_example_merges_its_lists_as_editors_leave_them_and_says_what_below_a_denied_domain_stays(lists):
    nothing = lists("list", by=("env", "-i"))  # without a PATH
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "")
    (lists.lists / "profile").write_bytes(
        b"\xef\xbb\xbfwindows.example.org\r\n\r\n# ours\nA.example.org\n*.b.example.org # why\n"
        b" \ttabs.example.org \nbad name\n-x.example.org\nc.d."
    )
    (lists.lists / "live").write_text("live.example.org\nnotexample.org")
    (lists.lists / "denied").write_bytes(b"tabs.example.org\r\n")
    result = lists("list")
    listed = ["a.example.org", "b.example.org", "c.d", "live.example.org", "notexample.org", "windows.example.org"]
    assert result.stdout.split() == listed and result.stderr.count("\n") == 2
    assert "bad name is left out" in result.stderr and "-x.example.org is left out" in result.stderr
    assert lists("allow", "d.example.org").returncode == 0 and lists("deny", "a.example.org").returncode == 0
    assert lists("list").stdout.split() == ["b.example.org", "c.d", "d.example.org", *listed[3:]]
    for name in ("a.example.org", "example.org"):
        lists("allow", name)
    told = lists("deny", "example.org").stderr
    assert "a.example.org stays allowed" in told and "notexample" not in told
    assert lists("list").stdout.split() == [*listed[:3], "d.example.org", *listed[3:]]


NO_DOMAINS = f"no domain||com|1.2.3.4|::1|a..org|-x.example.org|{'a' * 64}.org".split("|")
NO_USAGES = f"|allow|begin|container|container 1|container x ::1|container 1 2 3 4|container {9**30} ::1".split("|")
REFUSED = [(["allow", word], 1, "nothing is changed") for word in NO_DOMAINS]
REFUSED += [(["container", "1", word], 1, word) for word in ("resolver", "cafe", "1.2.3")]
REFUSED += [(words.split(), 2, ": no such usage: see --help\n") for words in NO_USAGES]


@pytest.mark.parametrize(("arguments", "status", "why"), REFUSED)
def test_egress_example_refuses_what_can_not_be_in_a_line(lists, arguments, status, why):
    result = lists(*arguments)
    assert result.returncode == status and why in result.stderr and result.stderr.count("\n") == 1
    assert os.listdir(lists.lists) == []


def test_egress_example_loses_none_of_many_changes_at_once_and_never_lists_what_is_denied(lists):
    (lists.lists / "profile").write_text("denied.example.org\n")
    lists("deny", "denied.example.org")
    names = [f"{number}.example.org" for number in "abcdefghijkl"]
    changing = [lists.start("allow", name) for name in names]
    reading = [lists.start("list") for _ in names]
    assert [process.communicate(timeout=30) and process.returncode for process in changing] == [0] * len(names)
    assert not any("denied" in process.communicate(timeout=30)[0] or process.returncode for process in reading)
    assert lists("list").stdout.split() == names


def test_egress_example_is_one_process_for_thousands_of_domains_and_has_a_list_on_disk_before_it_is_in_place(lists):
    need("strace")
    (lists.lists / "profile").write_text("".join(f"{number}.example.org\n" for number in range(3000)))
    log = lists.folder / "strace"
    traced = ("strace", "-f", "-qq", "-e", "trace=execve,fsync,rename", "-o", log)
    assert lists("config", by=traced).stdout.count("\nnftset=") == 3000
    assert len(set(re.findall("^[0-9]+", log.read_text(), re.MULTILINE))) == 1
    lists("deny", "bad.example.org", by=traced)
    assert re.findall(r"(fsync|rename)\(", log.read_text()) == ["fsync", "rename"] * 2


# dnsmasq's configuration

WORSE = ["s/;#delete/#delete/", "s/#;#delete.*//", "s/,4#.*//"]  # configurations that do not renew addresses
NEVER = [(f"sed '{worse}' | /usr/sbin/dnsmasq \"$@\"", (), "do not renew the time") for worse in WORSE]
NEVER += [('echo "recompile with HAVE_NFTSET defined" >&2; exit 1', (), "is changed: recompile with HAVE_NFTSET")]
NEVER += [("", ("env", "PATH=/nowhere", shutil.which("python3")), "there is no systemctl")]


@pytest.mark.parametrize(("dnsmasq", "by", "why"), NEVER)
def test_egress_example_leaves_the_old_configuration_where_the_new_one_could_not_work(lists, dnsmasq, by, why):
    lists.program("dnsmasq", dnsmasq)
    lists.restart.write_text(f"touch {lists.config.parent}/restarted\n")
    lists.config.write_text("# old\n")
    lists("allow", "good.example")
    result = lists("apply", by=by)
    assert result.returncode == 1 and why in result.stderr and result.stderr.count("\n") == 1
    assert lists.config.read_text() == "# old\n" and os.listdir(lists.config.parent) == ["egress.conf"]


@pytest.mark.parametrize("before", [{"egress.conf": "# old\n"}, {}])
def test_egress_example_brings_the_old_configuration_back_where_dnsmasq_does_not_start(lists, before):
    log = lists.folder / "restarts"
    lists.restart.write_text(f"! grep -qs nftset {lists.config}; status=$?; echo $status >>{log}; exit $status\n")
    for text in before.values():
        lists.config.write_text(text)
    lists("allow", "good.example")
    result = lists("apply")
    assert result.returncode == 1 and "the old one is back" in result.stderr
    assert {path.name: path.read_text() for path in lists.config.parent.iterdir()} == before
    assert log.read_text().split() == ["1", "0"]


# A bridge, with the instance web on it


class Bridge(Host):
    """A host that holds web to what is allowed, with a dnsmasq that keeps a cache unless it is told otherwise."""

    def __init__(self, folder: Path, outside: Outside):
        super().__init__(folder)
        self.outside, self.egress = outside, Egress(folder, self)
        self.own = self.egress.config.with_name("own.conf")
        outside.connect(self, "uplink", "192.0.3.1/24")
        outside.ip("route replace 10.83.0.0/24 via 192.0.3.1")
        self.set("net/ipv4/ip_forward", "1")
        self.update("--initialize", "br0", "host")
        self.web, self.other = self.client("web", "10:66:6a:4c:a1:11"), self.client("other", "10:66:6a:4c:a1:12")
        self.web.ip("address add 10.83.0.11/24 dev eth0", "route add default via 10.83.0.1")
        self.other.ip("address add 10.83.0.12/24 dev eth0")
        self.update("add", self.web.mac, "10.83.0.11", "web")
        self.process()
        config = f"interface=br0\nbind-interfaces\nno-hosts\nuser=root\nhostsdir={folder}/hosts.d\n"
        config += f"pid-file={folder}/dnsmasq.pid\nconf-dir={self.own.parent}\n"
        (folder / "main.conf").write_text(config)
        ended = "while grep -qs 'State:.[^ZX]' /proc/$pid/status; do sleep 0.1; done"
        script = f"cd {folder}\npid=$(cat dnsmasq.pid) && kill $pid && {ended}\ndnsmasq --conf-file=main.conf\n"
        self.egress.restart.write_text(script)

    def load(self, held: str = "10:66:6a:4c:a1:11") -> None:
        """Load the example's rules, for this instance."""
        rules = self.example("egress/egress.nft")
        rules.write_text(rules.read_text().replace("10:66:6a:4c:a1:11", held))
        self.run("nft", "-f", rules)

    def allow(self, *names: str) -> None:
        """Allow these domains, and put all lists to use."""
        for name in names:
            assert self.egress("allow", name).returncode == 0
        result = self.egress("apply")
        assert result.returncode == 0, result.stderr

    def reaches(self, name: str) -> bool:
        """Tell whether web resolves a name and reaches the address."""
        addresses = self.web.resolve(name, "A")
        return bool(addresses) and self.web.pings(addresses[0])


@pytest.fixture(scope="module")
def one_bridge(tmp_path_factory, outside):
    bridge = Bridge(tmp_path_factory.mktemp("bridge"), outside)
    yield bridge
    bridge.close()


@pytest.fixture
def bridge(one_bridge):
    """The bridge, with the rules as the example has them and nothing allowed."""
    for name in ("live", "denied", "private", "resolver"):
        (one_bridge.egress.lists / name).unlink(missing_ok=True)
    one_bridge.own.write_text("server=192.0.3.53\n")
    one_bridge.run("nft", "flush", "ruleset")
    one_bridge.load()
    yield one_bridge
    one_bridge.outside.resolve(**NAMES)


def test_egress_example_lets_an_instance_reach_what_is_allowed(bridge):
    web = bridge.web
    bridge.allow("*.Good.Example.")
    assert not web.pings("192.0.3.80", "-W0.5"), "nobody has resolved it yet"
    assert bridge.reaches("good.example") and bridge.reaches("ok.good.example")
    assert web.resolve("bad.example", "A") == ["192.0.3.81"] and not web.pings("192.0.3.81", "-W0.5")
    assert web.run("dig", "+timeout=1", "+tries=1", "@192.0.3.53", "good.example", check=False).returncode != 0
    assert web.resolve("web.instance.internal", "A") == ["10.83.0.11"], "the registry's names are answered as before"
    bridge.load()
    assert web.pings("192.0.3.80"), "what was resolved stays when the rules are loaded again"
    bridge.run("nft", "flush", "ruleset")
    bridge.load()
    assert not web.pings("192.0.3.80", "-W0.5") and bridge.reaches("good.example"), (
        "the answer outlives what is in the set"
    )
    bridge.outside.resolve(**NAMES | {"good": "192.0.3.82"})
    assert web.resolve("good.example", "A") == ["192.0.3.82"] and web.pings("192.0.3.82")
    assert bridge.egress("deny", "good.example").returncode == 0
    bridge.allow("bad.example")
    assert bridge.egress("list").stdout == "bad.example\n"
    assert bridge.reaches("bad.example")


def test_egress_example_gives_an_address_of_the_longest_domain_its_whole_time_with_each_answer(bridge):
    name = f"{'a' * 61}.{'a' * 61}.{'a' * 61}.{'a' * 57}.example"
    assert len(name) == 251
    bridge.outside.resolve(**{name.removesuffix(".example"): "192.0.3.80"})
    bridge.allow(name)
    bridge.run("nft", "add element inet egress allow_v4 { 192.0.3.80 expires 1m }")
    assert bridge.reaches(name)
    listing = bridge.run("nft", "-j", "list set inet egress allow_v4").stdout
    assert int(re.search(r'"expires": (\d+)', listing)[1]) > 500
    ttl = bridge.web.run("dig", "+noall", "+answer", "@10.83.0.1", name).stdout.split()[1]
    assert int(ttl) <= 1, "the client's own cache ends long before the set's timeout"


def test_egress_example_holds_an_instance_by_whatever_name_and_address(bridge):
    web = bridge.web
    bridge.allow("good.example")
    bridge.update("--allow", web.mac, "10.83.0.99")
    bridge.update("--rename", web.mac, "other")
    web.ip("address add 10.83.0.99/24 dev eth0")
    assert bridge.reaches("good.example")
    for options in ((), ("-s", "4000"), ("-I", "10.83.0.99")):  # 4000 octets: in fragments
        assert web.pings("192.0.3.80", *options) and not web.pings("192.0.3.81", "-W0.5", *options)
    bridge.load(held="02:00:00:00:00:01")
    assert web.pings("192.0.3.81", "-I", "10.83.0.99"), "who is not held"


def test_egress_example_has_private_and_denied_names_below_an_allowed_one_and_asks_its_resolver_for_no_others(bridge):
    web = bridge.web
    bridge.allow("good.example")
    assert web.resolve("s0.good.example", "A") == [SPECIAL[0]] and not web.pings(SPECIAL[0], "-W0.5")
    (bridge.egress.lists / "private").write_text("s0.good.example\n")
    assert bridge.egress("deny", "ok.good.example").returncode == 0
    bridge.allow()
    assert bridge.egress("list").stdout == "+s0.good.example\n-ok.good.example\ngood.example\n"
    assert bridge.reaches("good.example") and bridge.reaches("s0.good.example")
    for name, address in (("s1", SPECIAL[1]), ("ok", "192.0.3.82")):
        assert web.resolve(f"{name}.good.example", "A") == [address] and not web.pings(address, "-W0.5")
    web.resolve("secret1.bad.example", "A")
    assert "secret1" in bridge.outside.log(), "without it"
    (bridge.egress.lists / "resolver").write_text("192.0.3.53\n")
    refused = bridge.egress("apply")
    assert refused.returncode == 1 and "nothing is changed: /etc/dnsmasq.d/own.conf has" in refused.stderr
    bridge.own.unlink()
    bridge.allow()
    assert bridge.reaches("good.example") and web.resolve("web.instance.internal", "A") == ["10.83.0.11"]
    for kind in ("A", "TXT", "PTR"):
        for name in ("secret2.bad.example", "secret2", "secret2.ok.good.example", "secret2.in-addr.arpa"):
            web.resolve(name, kind)
    assert "secret2" not in bridge.outside.log()


# The firewall by name, on the same bridge

# Sends datagrams to an address, in IPv6's form, from so many sockets to each port of a range
FLOOD = """\
import socket, sys
for _ in range(int(sys.argv[2])):
    flood = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    for port in range(*map(int, sys.argv[3:])):
        flood.sendto(b"x", (sys.argv[1], port))
"""


@pytest.mark.parametrize("table", ["instances", "egress"])
def test_firewall_and_egress_example_keep_room_in_the_table_of_connections(bridge, table):
    web, other = bridge.web, bridge.other
    web.ip("address replace 2001:67c:83::11/80 dev eth0 nodad", "route replace default via 2001:67c:83::1")
    bridge.set("net/ipv6/conf/all/forwarding", "1")
    bridge.set("net/netfilter/nf_conntrack_udp_timeout", "600")
    bridge.load(held="02:00:00:00:00:01")
    if table == "instances":
        bridge.run("nft", "-f", bridge.example("nftables/firewall.nft"))
        bridge.run("nft", "delete table inet egress")

    def tracked(sender, *flood) -> int:
        """Return how many more connections the host remembers after a flood."""
        counting = ("cat", "/proc/sys/net/netfilter/nf_conntrack_count")
        before = int(bridge.run(*counting).stdout)
        sender.run("python3", "-c", FLOOD, *flood)
        return int(bridge.run(*counting).stdout) - before

    assert 3900 < tracked(web, "fd99::1", 3, 1000, 3000) < 4100
    assert tracked(web, "::ffff:192.0.3.81", 3, 1000, 3000) < 100 and other.pings("10.83.0.1"), "and others go on"
    if table == "instances":
        assert tracked(other, "::ffff:10.83.0.1", 50, 67, 68) < 10, "DHCP"
        bridge.run("nft", "flush chain inet instances dhcp_in")
        assert tracked(other, "::ffff:10.83.0.1", 50, 67, 68) > 40
    bridge.run("nft", f"flush chain inet {table} connections")
    assert tracked(web, "::ffff:192.0.3.81", 1, 1000, 3000) > 1500


# One container by itself


class Container(Namespace):
    """A process with a network and an /etc of its own."""

    def __init__(self, outside: Outside, folder: Path):
        super().__init__("box")
        outside.connect(self, "eth0", f"192.0.3.{100 + outside.ports}/24")
        (folder / "etc").mkdir()
        (folder / "etc" / "resolv.conf").write_text("nameserver 192.0.3.53\noptions timeout:2 attempts:4\n")
        self.first = self.start(*mounted({"/etc": folder / "etc"}), "sleep", "600")
        self.pid = str(self.first.pid)
        wait_for(lambda: process_file(self.pid, "cmdline").startswith("sleep"), "the container")

    def inside(self, *command: str) -> subprocess.CompletedProcess:
        return run("nsenter", "-t", self.pid, "-m", "-n", "-r", *command, check=False, timeout=60)

    def wait_reaches(self, *names: str) -> None:
        """Wait until names answer, resolved as the container's programs do."""
        for name in names:
            ping = ("ping", "-n", "-c", "1", "-W", "2", name)
            wait_for(lambda p=ping: self.inside(*p).returncode == 0, f"an answer of {name}")

    def dnsmasq(self) -> list[int]:
        """Return the process IDs of the dnsmasqs in the container's network."""
        pids = run("ip", "netns", "pids", self.name).stdout.split()
        return [int(pid) for pid in pids if process_file(pid, "comm") == "dnsmasq\n"]


class Guard:
    """The program for one container, run where /etc is a folder of ours, so that no fault changes the machine's."""

    def __init__(self, folder: Path, outside: Outside):
        self.egress, self.started, self.group = Egress(folder, outside), [], f"inst{os.getpid()}"
        shutil.copy(EXAMPLES / "egress" / "container.nft", self.egress.lists)
        self.egress("allow", "good.example")
        self.egress.prefix += self.in_group('echo 0 >"$1/cgroup.procs"')

    def in_group(self, command: str) -> list[str]:
        """Return the beginning of a command that is run after one in which $1 is the folder of a control group."""
        script = 'mount -t cgroup2 cgroup2 /sys/fs/cgroup; mkdir -p "$1"; ' + command + '; shift; exec "$@"'
        return ["unshare", "--mount", "sh", "-ec", script, "sh", f"/sys/fs/cgroup/{self.group}"]

    def kill(self) -> None:
        """End all that was started and their dnsmasq, as a crash and systemd do."""
        run(*self.in_group('echo 1 >"$1/cgroup.kill"'), "true")
        for process in self.started:
            process.wait(10)

    def begin(self, pid: str, *resolvers: str) -> subprocess.Popen:
        log = self.egress.folder / f"log{len(self.started)}"
        with open(log, "w") as file:
            process = self.egress.start("container", pid, *(resolvers or ["192.0.3.53"]), stderr=file)
        process.log = log
        self.started.append(process)
        return process

    def start(self, *arguments: str) -> subprocess.Popen:
        """Start it; return when all is in force, or it has ended."""
        process = self.begin(*arguments)
        wait_for(lambda: "is held" in process.log.read_text() or process.poll() is not None, "the start")
        return process

    def refuses(self, pid: str, why: str) -> None:
        """Check that it does not start, and says why."""
        process = self.start(pid)
        assert process.wait(30) == 1 and why in process.log.read_text()

    def reload(self, process: subprocess.Popen) -> None:
        """Have it read its lists; return when it has."""
        held = process.log.read_text().count("is held")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: process.log.read_text().count("is held") > held, "the lists")

    def stop(self, process: subprocess.Popen) -> int:
        """Tell it to end; return its exit status."""
        process.terminate()
        return process.wait(30)


@pytest.fixture
def guard(tmp_path, outside):
    guard, contents = Guard(tmp_path, outside), f"cat {tmp_path}/outer/* {tmp_path}/etc/*"
    before = run("sh", "-c", contents, check=False).stdout  # of the machine and of the container, if that is there
    yield guard
    guard.kill()
    wait_for(lambda: run(*guard.in_group("rmdir $1"), "true", check=False).returncode == 0, "an empty control group")
    assert run("sh", "-c", contents, check=False).stdout == before


@pytest.fixture
def container(tmp_path, outside):
    container = Container(outside, tmp_path)
    yield container
    container.close()


def test_egress_example_guards_one_container_by_itself_and_tells_systemd_when_it_does(container, guard):
    guard.egress.env["NOTIFY_SOCKET"] = notify = str(guard.egress.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(notify)
        systemd.settimeout(30)
        started = guard.start(container.pid)
        assert systemd.recv(100) == b"READY=1" and "inet egress" in container.run("nft", "list", "tables").stdout
    assert started.poll() is None and "CAP_NET_RAW" in started.log.read_text()
    guard.refuses(container.pid, "nothing is changed")
    assert not container.pings("192.0.3.80", "-W0.5"), "nobody has resolved it yet"
    container.wait_reaches("good.example")
    assert not container.pings("192.0.3.81", "-W0.5")
    other = container.inside("dig", "+short", "+timeout=9", "+tries=1", "@192.0.3.80", "good.example").stdout
    assert other == "192.0.3.80\n", "whichever resolver is asked, it is ours that answers"
    assert container.dnsmasq() and guard.stop(started) == 0 and container.dnsmasq() == []
    assert not container.pings("192.0.3.81", "-W0.5"), "it stays closed"
    container.run("nft", "delete", "table", "inet", "egress")
    container.wait_reaches("bad.example")


def test_egress_example_asks_only_for_names_that_a_container_may_reach_and_opens_special_addresses_to_private_ones(
    container, guard, outside
):
    script = 'for kind in A TXT PTR; do for question in $0.bad.example "+tcp $0"; do'
    script += " dig +time=1 +tries=1 $question $kind @192.0.3.53; done; done"
    asking = ("setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", script)
    container.inside(*asking, "secret1")
    wait_for(lambda: "secret1.bad.example" in outside.log() and "secret1 " in outside.log(), "both questions")
    names = {f"s{number}.good.example": address for number, address in enumerate(SPECIAL)}
    container.wait_reaches(*names)
    started = guard.start(container.pid)
    container.inside(*asking, "secret2")
    container.wait_reaches("good.example")
    assert "secret2" not in outside.log(), "not by dnsmasq's user either"
    for name, address in names.items():
        assert container.inside("dig", "+short", "+timeout=9", name, "A", name, "AAAA").stdout == f"{address}\n"
    listing = container.run("nft", "list", "table", "inet", "egress").stdout
    assert all(address in listing for address in SPECIAL), "by dnsmasq's word they are allowed"
    assert not any(container.pings(address, "-W0.5") for address in SPECIAL)
    (guard.egress.lists / "private").write_text("".join(f"{name}\n" for name in names))
    guard.reload(started)
    container.wait_reaches(*names)


# Connects to an address that is not allowed, as often as it can
TRIES = """\
import socket
while True:
    with socket.socket() as tried:
        tried.setblocking(False)
        tried.connect_ex(("192.0.3.81", 80))
"""


def test_egress_example_lets_no_try_through_whatever_happens_to_its_programs(container, guard, outside):
    count = "table ip seen {{ chain c {{ type filter hook {} priority -1; ip daddr 192.0.3.81 {} counter; }}; }}"
    outside.run("nft", count.format("input", ""))
    container.run("nft", count.format("output", "tcp dport 80 ct state new"))  # has the kernel remember connections

    def seen(node) -> int:
        return int(re.search(r"packets (\d+)", node.run("nft", "list", "table", "ip", "seen").stdout)[1])

    container.start("ping", "-i", "0.01", "192.0.3.81", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: seen(outside) > 1, "an answer before the rules are there")
    container.start("python3", "-c", TRIES)
    started = guard.start(container.pid)
    before, first = seen(outside), seen(container)
    for number in range(20):
        guard.reload(started)
        if number == 5:
            [dnsmasq] = container.dnsmasq()
            os.kill(dnsmasq, signal.SIGKILL)
            assert started.wait(30) == 1 and "its dnsmasq has ended" in started.log.read_text()
        elif number == 10:
            guard.kill()
        elif number == 15:
            assert guard.stop(started) == 0
        started = guard.start(container.pid) if started.poll() is not None else started
    container.wait_reaches("good.example")
    wait_for(lambda: seen(container) - first > 10000, "ten thousand tries", 120)
    assert seen(outside) == before
    assert guard.stop(started) == 0
    container.run("nft", "delete", "table", "inet", "egress")
    wait_for(lambda: seen(outside) > before, "a try that gets through at the end")


def test_egress_example_lets_a_container_have_its_leases(container, guard, outside, tmp_path):
    outside.ip("address replace fd83:5eed::1/80 dev lan nodad")
    options = ["--port=0", "--interface=lan", "--dhcp-range=fd83:5eed::100,fd83:5eed::1ff,80,120"]
    outside.start(*DNSMASQ, *options, f"--dhcp-leasefile={tmp_path}/leases", stderr=subprocess.DEVNULL)
    assert guard.start(container.pid).poll() is None
    show = ("ip", "-6", "address", "show", "dev", "eth0", "scope", "link", "-tentative")
    wait_for(lambda: container.run(*show).stdout, "the link-local address")
    lease = tmp_path / "lease6"
    files = ["-cf", "/dev/null", "-lf", lease, "-pf", tmp_path / "pid6", "-sf", "/bin/true"]
    container.start("dhclient", "-6", "-d", *files, "eth0", stderr=subprocess.DEVNULL)
    wait_for(lambda: lease.exists() and "iaaddr fd83:5eed::" in lease.read_text(), "a lease")


def test_egress_example_keeps_a_container_closed_where_its_port_is_taken_and_leaves_no_dnsmasq(container, guard):
    program = container.start("python3", "-m", "http.server", "--bind", "127.0.0.1", "10053")
    wait_for(lambda: ":10053" in container.run("ss", "-ltn").stdout, "its port")
    guard.refuses(container.pid, "dnsmasq does not start at port 10053")
    assert not container.pings("192.0.3.81", "-W0.5") and container.dnsmasq() == []
    container.stop(program)
    process = guard.begin(container.pid)
    while process.poll() is None and not container.dnsmasq():
        pass
    assert guard.stop(process) == 0 and container.dnsmasq() == [], "nor where it is told to end at its start"
    assert guard.start(container.pid).poll() is None
    container.wait_reaches("good.example")


def test_egress_example_changes_nothing_where_it_can_not_hold_a_container(container, guard, outside):
    (guard.egress.lists / "container.nft").write_text("table inet egress { broken }\n")
    guard.refuses(container.pid, "nothing is changed")
    assert container.dnsmasq() == []
    shutil.copy(EXAMPLES / "egress" / "container.nft", guard.egress.lists)
    run(*guard.in_group(f'echo {container.pid} >"$1/cgroup.procs"'), "true")
    guard.refuses(container.pid, "control group beside")
    assert container.run("nft", "list", "tables").stdout == ""
    container.wait_reaches("bad.example")
    process = outside.start("sleep", "600")
    for pid in (str(process.pid), "1"):
        guard.refuses(pid, "host's network")
    outside.stop(process)
    guard.refuses(str(process.pid), "No such process")
    assert "egress" not in outside.run("nft", "list", "tables").stdout


def test_egress_example_starts_once_when_started_thrice_at_once_and_ends_with_the_container(container, guard):
    started = [guard.begin(container.pid) for _ in range(3)]
    wait_for(lambda: [process.poll() for process in started].count(1) == 2, "the end of two")
    wait_for(lambda: any("is held" in process.log.read_text() for process in started), "the start of one")
    assert len(container.dnsmasq()) == 1
    container.wait_reaches("good.example")
    container.stop(container.first, signal.SIGKILL)
    assert sorted(process.wait(30) for process in started) == [0, 1, 1] and container.dnsmasq() == []


# Containers of Docker


class Docker(Namespace):
    """A host with a resolver, a dockerd, and containers web, db and cache on a network of their own."""

    def __init__(self, outside: Outside, folder: Path):
        super().__init__("docker")
        outside.connect(self, "eth0", f"192.0.3.{100 + outside.ports}/24")
        (folder / "run").mkdir()
        (folder / "daemon.json").write_text("{}")
        (folder / "resolv.conf").write_text("nameserver 127.0.0.2\n")
        own = {"/run": folder / "run", "/etc/resolv.conf": folder / "resolv.conf"}
        options = f"--config-file={folder}/daemon.json --data-root={folder}/docker --storage-driver=vfs"
        begin = f"mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec dockerd {options}"
        with open(folder / "dockerd.log", "w") as log:
            resolver = ["--server=192.0.3.53", "--listen-address=127.0.0.2", "--bind-interfaces"]
            self.start(*DNSMASQ, *resolver, stdout=log, stderr=log)
            self.dockerd = self.start(*mounted(own), "sh", "-ec", begin, stdout=log, stderr=log)
        wait_for(lambda: "API listen on" in (folder / "dockerd.log").read_text(), "dockerd")
        run("tar", "-cf", folder / "image.tar", "--files-from=/dev/null")
        self.docker("import", folder / "image.tar", "image")
        self.docker("network", "create", "app")
        for name in ("web", "db", "cache"):
            options = ["-d", "--name", name, "--network", "app", "--cap-drop=NET_RAW"]
            options += [f"-v{path}:{path}:ro" for path in ("/usr", "/bin", "/lib", "/lib64")]
            self.docker("run", *options, "image", "python3", "-m", "http.server", "80")
        self.pid = self.docker("inspect", "-f", "{{.State.Pid}}", "web").stdout.strip()

    def docker(self, *arguments, check: bool = True) -> subprocess.CompletedProcess:
        return self.run("nsenter", "-m", "-r", "-t", self.dockerd.pid, "docker", *arguments, check=check)

    def connects(self, name: str) -> bool:
        code = "import socket, sys; socket.create_connection((sys.argv[1], 80), 2)"
        return self.docker("exec", "web", "python3", "-c", code, name, check=False).returncode == 0

    def ask(self, name: str, *options: str) -> None:
        self.docker("exec", "web", "dig", "+tries=1", "+time=1", *options, "@127.0.0.11", name, check=False)

    def close(self) -> None:
        self.docker("rm", "-f", "web", "db", "cache", check=False)
        self.stop(self.dockerd)
        super().close()
        script = "mount -t cgroup2 cgroup2 /sys/fs/cgroup; rmdir /sys/fs/cgroup/docker || :"
        run("unshare", "--mount", "sh", "-c", script)


def test_egress_example_lets_a_container_of_docker_have_services_of_its_network(guard, outside, tmp_path):
    need("dockerd", "docker", "runc")
    docker = Docker(outside, tmp_path)
    try:
        rules = docker.run("nsenter", "-n", "-t", docker.pid, "iptables-save", "-t", "nat").stdout
        behind = re.search(r"-p udp .*--to-destination 127\.0\.0\.11:(\d+)", rules)[1]
        docker.ask("docker1.bad.example")
        docker.ask("docker2.bad.example", "-p", behind)
        wait_for(lambda: "docker1" in outside.log() and "docker2" in outside.log(), "both questions")
        wait_for(lambda: docker.connects("cache") and docker.connects("db"), "the services")
        (guard.egress.lists / "private").write_text("db\n")
        started = guard.start(docker.pid, "192.0.3.53", "127.0.0.11")
        assert started.poll() is None and "warning" not in started.log.read_text()
        assert docker.connects("db") and not docker.connects("cache")
        assert "192.0.3.80" in docker.docker("exec", "web", "getent", "ahostsv4", "good.example").stdout
        docker.ask("docker3.bad.example")
        docker.ask("docker4.bad.example", "-p", behind)
        docker.docker("stop", "-t", "0", "db")
        asked = outside.log().count("query")
        docker.ask("db")
        assert "docker3" not in outside.log() and "docker4" not in outside.log()
        assert outside.log().count("query") < asked + 10, "no loop"
        assert guard.stop(started) == 0
    finally:
        docker.close()
