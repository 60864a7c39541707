"""The examples, run for real, or read by the tool that they are for."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import PROCESS, TOP, UPDATE, Client, Host, Namespace, environment, wait_for

pytestmark = pytest.mark.slow
EXAMPLES = TOP / "examples"


@pytest.fixture
def folder():
    """A folder that dnsmasq may read when it is no longer root, as it may not those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_demo_comes_out_as_expected_and_leaves_nothing(folder):
    need(*PROGRAMS)
    env = os.environ | {"TMPDIR": str(folder)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    demo = subprocess.Popen([EXAMPLES / "demo.sh"], text=True, env=env, **pipes)
    output = demo.communicate()[0]
    assert demo.returncode == 0, output
    assert f"demo{demo.pid}-" not in run("ip", "netns").stdout
    assert not os.listdir(folder)
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if bytes(folder) in path.read_bytes()]


def run(*command, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a command; an AssertionError shows the output of one that failed."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


class Applied:
    """A host with the examples' files in its folder, and instances-apply."""

    def __init__(self, host: Host):
        self.host, self.rules = host, host.folder / "rules"
        self.rules.mkdir()
        for name in ("bridge.nft", "firewall.nft"):
            host.example(f"nftables/{name}").rename(self.rules / name)
        self.variables = {"INSTANCES_SETTINGS": "/dev/null", "INSTANCES_RULES": str(self.rules)}
        self.variables |= {"RUNTIME_DIRECTORY": str(host.folder / "run"), "INSTANCES_ADDRESS_SETS": "host,web"}

    def apply(self, **options) -> subprocess.CompletedProcess:
        env = environment(self.host.base, **self.variables)
        return self.host.run(EXAMPLES / "systemd" / "instances-apply", env=env, **options)


@pytest.fixture
def applied(host):
    return Applied(host)


def test_dnsmasq_example_leads_from_a_lease_to_a_name_and_a_guard(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    (host.folder / "instances.hosts.d").mkdir()
    host.start_dnsmasq(config=host.example("dnsmasq/br0.conf"))
    web, wpad = host.client("web", "10:66:6a:4c:a1:11"), host.client("wpad", "10:66:6a:4c:a1:12")
    web.dhcp4("web")
    web.dhcp6("web")
    wpad.dhcp4("wpad")
    assert host.registry()[wpad.mac]["name"] == ""
    assert "3 instances" in applied.apply().stderr
    wait_for(lambda: web.resolve("web.v4.instance.internal", "A") == web.addresses("10"), "the name")
    assert sorted(web.resolve("web.v6.instance.internal", "AAAA")) == sorted(
        web.addresses("2001") + web.addresses("fd83")
    )
    wait_for(lambda: web.pings("10.83.0.1"), "the host behind the guard")
    tables = host.run("nft", "list", "tables").stdout
    assert "table bridge instances" in tables and "table inet instances" in tables
    assert web.addresses("10")[0] in host.run("nft", "list", "set", "inet", "instances", "web.v4.instance").stdout
    assert (applied.apply().stdout, applied.apply().stderr) == ("", "")


@pytest.mark.parametrize("tag", ["VLAN tag", "other protocol"])
def test_nftables_example_drops_tags_and_other_protocols(applied, tag):
    host = applied.host
    host.update("--initialize", "br0", "host")
    client, other = host.client("web", "10:66:6a:4c:a1:11"), host.client("db", "10:66:6a:4c:a1:12")
    host.update("add", client.mac, "10.83.0.11", "web")
    applied.apply()
    header = "ffffffffffff" + client.mac.replace(":", "")
    arp = "08060001080006040001" + client.mac.replace(":", "") + "0a53000b" + 6 * "00" + "0a530001" + 18 * "00"
    frame = header + ("81000005" + arp if tag == "VLAN tag" else "88b5" + 46 * "00")

    def received():
        counters = other.run("ip", "-json", "-statistics", "link", "show", "dev", "eth0").stdout
        return json.loads(counters)[0]["stats64"]["rx"]["packets"]

    def dropped():
        listing = host.run("nft", "list", "chain", "bridge", "instances", "guard").stdout
        return int(re.search(rf'packets (\d+) .*"{tag}"', listing)[1])

    before = received()
    client.send(*5 * [bytes.fromhex(frame)])
    wait_for(lambda: dropped() >= 5, f"five drops of a frame with {tag}")
    assert received() - before < 5


def test_nftables_examples_load_again_and_again_and_touch_no_other_table(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    host.run("nft", "add", "table", "inet", "mine")
    applied.apply()
    first = host.run("nft", "list", "ruleset").stdout
    (host.folder / "run" / "instances.applied").unlink()
    applied.apply()
    assert host.run("nft", "list", "ruleset").stdout == first and "table inet mine" in first


def test_broken_rules_keep_the_old_ones_and_the_update_arrives_when_they_are_mended(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    applied.apply()
    (applied.rules / "broken.nft").write_text("table inet broken {")
    host.update("add", "10:66:6a:4c:a1:11", "10.83.0.11", "web")
    for _ in range(2):  # the first takes the marker away
        result = applied.apply(check=False)
        assert result.returncode == 1 and "syntax error" in result.stderr
        assert "10.83.0.11" not in host.run("nft", "list", "ruleset").stdout
    (applied.rules / "broken.nft").unlink()
    assert applied.apply().returncode == 0
    assert "10.83.0.11" in host.run("nft", "list", "ruleset").stdout
    hosts = (host.folder / "instances.hosts.d" / "instances.hosts").read_text()
    assert "10.83.0.11 web.instance.internal" in hosts


def test_broken_registry_is_told_and_tried_again(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    applied.apply()
    registry = (host.folder / "instances.json").read_bytes()
    (host.folder / "instances.json").write_bytes(registry[:-9])
    (host.folder / "instances.updated").touch()
    assert applied.apply(check=False).returncode == 1
    (host.folder / "instances.json").write_bytes(registry)
    assert applied.apply().returncode == 0


def test_rules_are_loaded_again_after_a_flush_and_a_boot(applied):
    host = applied.host
    host.update("--initialize", "br0", "host")
    applied.apply()
    first = host.run("nft", "list", "ruleset").stdout
    host.run("nft", "flush", "ruleset")
    applied.apply()
    assert host.run("nft", "list", "ruleset").stdout == first
    host.run("nft", "delete", "table", "inet", "instances")
    applied.apply()
    assert host.run("nft", "list", "ruleset").stdout == first
    (host.folder / "run" / "instances.applied").unlink()  # what a boot does
    (host.folder / "instances.hosts.d" / "instances.hosts").unlink()
    applied.apply()
    assert (host.folder / "instances.hosts.d" / "instances.hosts").exists()


def test_systemd_units_are_valid_and_hardened(tmp_path):
    need("systemd-analyze")
    units = [EXAMPLES / "systemd" / f"instances.{kind}" for kind in ("path", "service", "timer")]
    for unit in units:
        command = "/usr/local/sbin/instances-apply"
        (tmp_path / unit.name).write_text(
            unit.read_text().replace(command, str(EXAMPLES / "systemd" / "instances-apply"))
        )
    result = run("systemd-analyze", "verify", *[tmp_path / unit.name for unit in units])
    assert (result.stdout, result.stderr) == ("", "")
    exposure = run("systemd-analyze", "security", "--offline=true", tmp_path / "instances.service", check=False).stdout
    assert float(re.search(r"Overall exposure level.*: ([0-9.]+)", exposure)[1]) < 3


def test_cron_example_is_a_line_a_minute_for_root():
    lines = [line for line in (EXAMPLES / "cron" / "instances").read_text().splitlines() if line[:1] == "*"]
    assert len(lines) == 1 and lines[0].startswith("* * * * * root ")
    assert run("sh", "-n", "-c", lines[0].removeprefix("* * * * * root ")).returncode == 0


INCUS = [
    {"name": "web", "project": "default", "status": "Running", "config": {"volatile.eth0.hwaddr": "10:66:6A:00:00:01"}},
    {
        "name": "db",
        "project": "default",
        "status": "Stopped",
        "config": {"volatile.eth1.hwaddr": "10:66:6a:00:00:03", "volatile.eth0.hwaddr": "10:66:6a:00:00:02"},
    },
    {
        "name": "web",
        "project": "shop",
        "config": {"image.os": "Debian"},
        "expanded_devices": {"eth0": {"hwaddr": "10:66:6a:00:00:04"}, "root": {"path": "/"}},
    },
    {"name": "x", "project": "default", "config": {"volatile.eth0.hwaddr": "10:66:6a:00:00:05"}},
    {"name": "X", "project": "default", "config": {"volatile.eth0.hwaddr": "10:66:6a:00:00:06"}},
    {"name": "new", "project": "default", "config": {"volatile.eth0.hwaddr": "10:66:6a:00:00:07"}},
]
BEFORE = {
    "10:66:6a:4c:a1:fe": {"name": "host"},
    "10:66:6a:00:00:01": {"name": "old"},
    "10:66:6a:00:00:02": {"name": "db"},
    "10:66:6a:00:00:03": {"name": ""},
    "10:66:6a:00:00:04": {"name": "web"},
    "10:66:6a:00:00:05": {"name": "five"},
    "10:66:6a:00:00:99": {"name": "deleted"},
    "52:54:00:00:00:01": {"name": "not-of-incus"},
}


INCUS_LIST = json.dumps(INCUS)


def reconcile(host, *arguments, text=INCUS_LIST, **options):
    return host.run(EXAMPLES / "incus" / "reconcile.sh", *arguments, env=environment(host.base), input=text, **options)


def test_incus_example_brings_the_registry_in_line(host):
    need("jq")
    path = Path(f"{host.base}.json")
    path.write_text(json.dumps(BEFORE))
    planned = reconcile(host)
    assert json.loads(path.read_text()) == BEFORE
    assert sorted(planned.stdout.splitlines()) == [
        "instances-update.py --remove 10:66:6a:00:00:99",
        "instances-update.py --rename 10:66:6a:00:00:01 web",
        "instances-update.py --rename 10:66:6a:00:00:03 db-eth1",
        "instances-update.py --rename 10:66:6a:00:00:04 web-shop",
    ]
    assert planned.stderr.count("10:66:6a:00:00:05") == 1 and planned.stderr.count("10:66:6a:00:00:06") == 1
    reconcile(host, "--apply")
    names = {mac: instance["name"] for mac, instance in host.registry().items()}
    changed = {"10:66:6a:00:00:01": "web", "10:66:6a:00:00:03": "db-eth1", "10:66:6a:00:00:04": "web-shop"}
    expected = {mac: i["name"] for mac, i in BEFORE.items() if mac != "10:66:6a:00:00:99"} | changed
    assert names == expected
    assert reconcile(host).stdout == ""


@pytest.mark.parametrize("text", ["", "{}", "null", "not json"])
def test_incus_example_changes_nothing_where_incus_says_nothing(host, text):
    need("jq")
    Path(f"{host.base}.json").write_text(json.dumps(BEFORE))
    assert reconcile(host, "--apply", text=text, check=False).stdout == "" and host.registry() == BEFORE


def test_cluster_example_resolves_names_across_hosts(tmp_path):
    need(*PROGRAMS)
    hosts = []
    try:
        for number, letter in ((1, "a"), (2, "b")):
            folder = tmp_path / letter
            folder.mkdir()
            addresses = (f"10.84.{number}.1/24", f"fd84:{number}::1/80")
            hosts.append(Host(folder, addresses, f"10:66:6a:4c:a{number}:fe"))
        a, b = hosts
        a.run("ip", "link", "add", "routed", "type", "veth", "peer", "name", "routed", "netns", b.name)
        for host, number, other in ((a, 1, 2), (b, 2, 1)):
            host.run("ip", "address", "add", f"192.0.2.{number}/24", "dev", "routed")
            host.run("ip", "link", "set", "routed", "up")
            host.run("ip", "route", "add", f"10.84.{other}.0/24", "via", f"192.0.2.{other}")
            host.set("net/ipv4/ip_forward", "1")
            host.update("--initialize", "br0", "host")
            (host.folder / "instances.hosts.d").mkdir()
            host.start_dnsmasq(config=host.example(f"cluster/{host.folder.name}.conf"))
            host.update("add", f"10:66:6a:4c:a{number}:11", f"10.84.{number}.11", "web")
            domain = {"INSTANCES_HOSTS_DOMAIN": f".{host.folder.name}.instance.internal"}
            host.run(sys.executable, PROCESS, env=environment(host.base, **domain))
            Path(f"{host.base}.hosts").rename(host.folder / "instances.hosts.d" / "instances.hosts")
        client = a.client("client", "10:66:6a:4c:a1:12")
        client.run("ip", "address", "add", "10.84.1.12/24", "dev", "eth0")

        def ask(*question):
            return client.run(
                "dig", "+short", "+timeout=1", "+tries=1", "@10.84.1.1", *question, check=False
            ).stdout.split()

        wait_for(lambda: ask("web.b.instance.internal", "A") == ["10.84.2.11"], "a name of the other host")
        assert ask("web.v4.a.instance.internal", "A") == ["10.84.1.11"]
        assert ask("-x", "10.84.2.11") == ["web.b.instance.internal."] and ask("-x", "10.84.1.11") == [
            "web.a.instance.internal."
        ]
        assert ask("-x", "fd84:2::1") == ["host.b.instance.internal."]
        b.stop(b.dnsmasq)
        assert ask("web.a.instance.internal", "A") == ["10.84.1.11"]
        assert "10.84.2.11" not in ask("web.b.instance.internal", "A")
    finally:
        for host in hosts:
            host.close()


def test_output_example_is_current(golden_host):
    names = ("instances.json", "instances.hosts", "instances.nftables_chains", "instances.nftables_sets")
    made = {name: (golden_host.folder / name).read_text() for name in names}
    assert made == {name: (EXAMPLES / "output" / name).read_text() for name in names}


class VMBridge:
    """A host with vmbridge, and an /etc of its own with hosts and ethers."""

    def __init__(self, host: Host):
        self.host, self.etc = host, host.folder / "etc"
        self.etc.mkdir()
        for name in ("passwd", "group", "nsswitch.conf"):
            (self.etc / name).write_bytes(Path("/etc", name).read_bytes())
        (self.etc / "hosts").write_text("10.83.0.20 fixed\n10.83.0.1 router\n")
        (self.etc / "ethers").write_text("10:66:6a:4c:a1:20 10.83.0.20\n")
        (self.etc / "resolv.conf").write_text("nameserver 192.0.2.53\n")
        names = {"RUN": host.folder, "STATE": host.folder, "SCRIPT": UPDATE}
        self.env = environment(host.base, **{f"VMBRIDGE_{name}": str(path) for name, path in names.items()})

    def __call__(self, *arguments: str, bridge: str = "br0") -> subprocess.CompletedProcess:
        inside = 'mount --bind "$1" /etc; shift; exec "$@"'
        command = [
            "unshare",
            "-m",
            "sh",
            "-c",
            inside,
            "sh",
            self.etc,
            EXAMPLES / "bridge" / "vmbridge",
            bridge,
            *arguments,
        ]
        return self.host.run(*command, check=False, env=self.env)

    def pid(self) -> str:
        path = self.host.folder / "vmbridge.br0.pid"
        return path.read_text().strip() if path.exists() else ""

    def ruleset(self) -> str:
        return self.host.run("nft", "list", "ruleset").stdout


def is_alive(pid: str) -> bool:
    """Tell whether a process runs: one that ended has no command line, even before its parent asks for its status."""
    path = Path(f"/proc/{pid}/cmdline")
    return path.exists() and path.read_text() != ""


@pytest.fixture
def vmbridge(tmp_path):
    need(*PROGRAMS, "unshare")
    host = Host(tmp_path, ("10.83.0.1/24",))
    vmbridge = VMBridge(host)
    yield vmbridge
    vmbridge("stop")
    host.close()


def test_vmbridge_starts_once_and_stops_its_own_only(vmbridge):
    vmbridge.host.run("nft", "add", "table", "inet", "mine")
    assert vmbridge("status").returncode == 3
    started = vmbridge("start")
    assert started.returncode == 0 and "from 10.83.0.192 to 10.83.0.223" in started.stdout, started.stderr
    pid = vmbridge.pid()
    assert vmbridge("status").returncode == 0 and f"process {pid}" in vmbridge("status").stdout
    again = vmbridge("start")
    assert again.returncode == 0 and "runs already" in again.stdout and vmbridge.pid() == pid
    assert "masquerade" not in vmbridge.ruleset() and "vmbridge-br0" in vmbridge.ruleset()
    assert vmbridge("stop").returncode == 0 and not is_alive(pid)
    assert vmbridge.ruleset().split() == ["table", "inet", "mine", "{", "}"]
    assert vmbridge("stop").returncode == 0 and vmbridge("status").returncode == 3


def test_vmbridge_leaves_a_process_that_is_not_its_own(vmbridge):
    sleeper = vmbridge.host.start("sleep", "60")
    (vmbridge.host.folder / "vmbridge.br0.pid").write_text(f"{sleeper.pid}\n")
    assert vmbridge("status").returncode == 1
    assert vmbridge("reload").returncode == 1
    assert vmbridge("start").returncode == 0 and vmbridge.pid() != str(sleeper.pid)
    assert vmbridge("stop").returncode == 0 and sleeper.poll() is None
    (vmbridge.host.folder / "vmbridge.br0.pid").write_text("999999999\n")
    assert vmbridge("status").returncode == 1 and vmbridge("stop").returncode == 0 and vmbridge.pid() == ""


@pytest.mark.parametrize(
    ("bridge", "arguments", "status", "message"),
    [
        ("br0", ("begin",), 2, "usage: vmbridge BRIDGE start [nat] | stop | status | reload"),
        ("br0", (), 2, "usage: vmbridge"),
        ("br0", ("stop", "nat"), 2, "usage: vmbridge"),
        ("none", ("start",), 1, "none: no such bridge"),
        ("lo", ("start",), 1, "lo: no such bridge"),
        ("../x", ("start",), 1, "../x: no name of a bridge"),
        ("empty", ("start",), 1, "empty: has no IPv4 address"),
        ("small", ("start",), 1, "small: 10.9.9.1/29 is too small"),
        ("br0", ("reload",), 1, "br0: does not run"),
    ],
)
def test_vmbridge_refuses_in_one_line(vmbridge, bridge, arguments, status, message):
    for name in ("empty", "small"):
        vmbridge.host.run("ip", "link", "add", name, "type", "bridge")
    vmbridge.host.run("ip", "address", "add", "10.9.9.1/29", "dev", "small")
    result = vmbridge(*arguments, bridge=bridge)
    assert (result.returncode, result.stdout) == (status, "")
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert vmbridge.ruleset() == ""


def test_vmbridge_serves_clients_and_reads_ethers_and_hosts_again(vmbridge):
    host = vmbridge.host
    host.run("ip", "link", "set", "br0", "mtu", "1400")
    vmbridge("start")
    fixed, other, late = (
        host.client(name, f"10:66:6a:4c:a1:2{n}") for n, name in enumerate(("fixed", "other", "late"))
    )
    fixed.dhcp4()
    assert fixed.addresses("10") == ["10.83.0.20"]
    other.dhcp4("other")
    assert 192 <= int(other.addresses("10")[0].split(".")[3]) <= 223
    assert host.registry()[other.mac]["name"] == "other"
    assert other.resolve("fixed", "A") == ["10.83.0.20"]
    options = other.events().splitlines()[-1]
    assert "router= " in options + " " and "mtu=1400" in options
    (vmbridge.etc / "ethers").write_text("10:66:6a:4c:a1:22 late\n")
    (vmbridge.etc / "hosts").write_text("10.83.0.30 late\n")
    assert vmbridge("reload").returncode == 0
    wait_for(lambda: other.resolve("late", "A") == ["10.83.0.30"], "the new /etc/hosts")
    late.dhcp4()
    assert late.addresses("10") == ["10.83.0.30"]


LISTENER = """\
import socket
listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
listener.bind(("eth0", 0))
print("ready", flush=True)
while True:
    print(listener.recv(2000).hex(), flush=True)
"""


def test_vmbridge_replies_have_no_udp_checksum(vmbridge):
    host = vmbridge.host
    vmbridge("start")
    client = host.client("old", "10:66:6a:4c:a1:22")
    log = client.folder / "frames"
    with open(log, "w") as file:
        client.start(sys.executable, "-c", LISTENER, stdout=file)
    wait_for(lambda: "ready" in log.read_text(), "the listener")
    client.dhcp4()
    frames = [bytes.fromhex(line) for line in log.read_text().splitlines()[1:]]
    checksums = [frame[40:42] for frame in frames if frame[23] == 17 and frame[34:38] == b"\x00\x43\x00\x44"]
    assert checksums and set(checksums) == {b"\0\0"}


def test_vmbridge_does_nat_if_asked(vmbridge, tmp_path):
    host = vmbridge.host
    outside = Namespace("outside")
    try:
        host.run("ip", "link", "add", "out", "type", "veth", "peer", "name", "eth0", "netns", outside.name)
        for node, device, address in ((host, "out", "192.0.2.1/24"), (outside, "eth0", "192.0.2.53/24")):
            node.run("ip", "address", "add", address, "dev", device)
            node.run("ip", "link", "set", device, "up")
        assert vmbridge("start", "nat").returncode == 0
        client = host.client("web", "10:66:6a:4c:a1:11")
        client.dhcp4("web")
        assert "router=10.83.0.1" in client.events()
        client.run("ip", "route", "add", "default", "via", "10.83.0.1")
        assert client.pings("192.0.2.53")
        assert vmbridge("stop").returncode == 0 and vmbridge.ruleset() == ""
    finally:
        outside.close()


ZONE_REGISTRY = {
    "10:66:6a:4c:a1:11": {
        "name": "web",
        "ipv4": "10.83.0.11",
        "ipv6_gua": "2001:67c:83::11",
        "ipv6_ula": "fd83:5eed::11",
    },
    "10:66:6a:4c:a1:12": {"name": "mail", "ipv4": "203.0.113.9", "ipv6_gua": "2001:67c:83:1:2:3:4:5"},
    "10:66:6a:4c:a1:13": {"name": "", "ipv4": "10.83.0.13"},
    "10:66:6a:4c:a1:14": {"name": "hand\n", "ipv4": "10.83.0.14"},
    "10:66:6a:4c:a1:15": {"name": "edited", "ipv4": "10.83.0.15\n+evil.instance.example:1.2.3.4"},
}


def zone(program: str, folder: Path, **arguments: str) -> str:
    """Return what one of the zone example's programs makes of a registry."""
    (folder / "registry.json").write_text(json.dumps(ZONE_REGISTRY))
    options = [word for name, value in arguments.items() for word in ("--arg", name, value)]
    options += ["--argjson", "serial", "7"]
    folder_of = EXAMPLES / "zone"
    return run("jq", "-r", "-L", folder_of, *options, "-f", folder_of / program, folder / "registry.json").stdout


@pytest.fixture
def two_sides(host):
    """Return the host and two clients: one inside, one with an address from outside; and a way to ask the host."""
    inside, outside = host.client("inside", "10:66:6a:4c:a1:21"), host.client("outside", "10:66:6a:4c:a1:22")
    host.run("ip", "address", "add", "192.0.2.53/24", "dev", "br0")
    inside.run("ip", "address", "add", "10.83.0.21/24", "dev", "eth0")
    outside.run("ip", "address", "add", "192.0.2.22/24", "dev", "eth0")

    def ask(name, kind):
        answers = []
        for client, server in ((inside, "10.83.0.1"), (outside, "192.0.2.53")):
            command = ["dig", "+short", "+norecurse", "+timeout=1", "+tries=1", f"@{server}", name, kind]
            answers.append(client.run(*command, check=False).stdout.split())
        return answers

    return host, ask


def test_zone_example_passes_the_checker_and_is_served(two_sides):
    need("nsd", "nsd-checkzone", "jq")
    host, ask = two_sides
    file = host.folder / "zone"
    file.write_text(zone("zone.jq", host.folder, domain="instance.example", server="ns.instance.example"))
    assert "ok" in run("nsd-checkzone", "instance.example", file).stdout and "evil" not in file.read_text()
    config = host.folder / "nsd.conf"
    places = ("database", "pidfile", "xfrdfile", "zonelistfile")
    lines = ["server:", "ip-address: 10.83.0.1", "ip-address: 192.0.2.53", 'username: ""', 'zonesdir: "/"']
    lines += [f'{name}: "{host.folder}/nsd.{name}"' for name in places]
    lines += ["remote-control:", "control-enable: no", "zone:", "name: instance.example", f'zonefile: "{file}"']
    config.write_text("\n".join(lines) + "\n")
    host.start("nsd", "-d", "-c", config, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: ask("web.lan.instance.example", "A") == 2 * [["10.83.0.11"]], "nsd")
    assert ask("web.wan.instance.example", "AAAA") == 2 * [["2001:67c:83::11"]]
    assert ask("web.lan.instance.example", "AAAA") == 2 * [["fd83:5eed::11"]]
    assert ask("mail.wan.instance.example", "A") == 2 * [["203.0.113.9"]]
    assert ask("web.wan.instance.example", "A") == 2 * [[]] and ask("hand.lan.instance.example", "A") == 2 * [[]]
    assert "7" in ask("instance.example", "SOA")[0]


def test_tinydns_example_answers_by_where_the_client_is(two_sides):
    need("tinydns", "tinydns-data", "jq")
    host, ask = two_sides
    root = host.folder / "tinydns"
    root.mkdir()
    text = zone(
        "tinydns.jq", host.folder, domain="instance.example", server="ns.instance.example", address="192.0.2.53"
    )
    assert "evil" not in text
    (root / "data").write_text(text)
    run("tinydns-data", cwd=root)
    env = environment(host.base) | {"ROOT": str(root), "UID": "0", "GID": "0"}
    for address in ("10.83.0.1", "192.0.2.53"):
        host.start("tinydns", env=env | {"IP": address}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: ask("web.lan.instance.example", "A") == 2 * [["10.83.0.11"]], "tinydns")
    assert ask("web.instance.example", "A") == [["10.83.0.11"], []]
    assert ask("web.instance.example", "AAAA") == [["fd83:5eed::11"], ["2001:67c:83::11"]]
    assert ask("mail.instance.example", "A") == [[], ["203.0.113.9"]]
    assert ask("mail.wan.instance.example", "AAAA") == 2 * [["2001:67c:83:1:2:3:4:5"]]


def test_avahi_example_answers_on_the_bridge(host):
    need("avahi-daemon", "unshare", "jq")
    client, etc = host.client("asks", "10:66:6a:4c:a1:21"), host.folder / "avahi"
    client.run("ip", "address", "add", "10.83.0.21/24", "dev", "eth0")
    etc.mkdir()
    (etc / "hosts").write_text(zone("avahi.jq", host.folder))
    (etc / "avahi-daemon.conf").write_text("[server]\nenable-dbus=no\nallow-interfaces=br0\n")
    places = 'mount --bind "$1" /etc/avahi; mount -t tmpfs tmpfs /run; '
    avahi = places + "exec avahi-daemon --no-drop-root --no-chroot --no-rlimits"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    host.start("unshare", "-m", "sh", "-c", avahi, "sh", etc, **quiet)

    def ask(name, kind):
        command = ["dig", "+short", "+norecurse", "+timeout=1", "+tries=1", "-p", "5353", "@10.83.0.1", name, kind]
        return sorted(client.run(*command, check=False).stdout.split())

    wait_for(lambda: ask("web.local", "A") == ["10.83.0.11"], "avahi")
    wait_for(lambda: ask("web.local", "AAAA") == ["2001:67c:83::11", "fd83:5eed::11"], "avahi's IPv6 addresses")
    wait_for(lambda: ask("mail.local", "A") == ["203.0.113.9"], "avahi's other name")


class Routed:
    """A host with the routed example, and guests whose devices are veth pairs."""

    def __init__(self, host: Host):
        self.host, self.state = host, host.folder / "routed"
        for name in ("hosts", "options", "bindings"):
            (self.state / name).mkdir(parents=True)
        (host.folder / "instances.hosts.d").mkdir()
        for command in (
            "link add gw0 type bridge",
            "link set gw0 up",
            "address add 10.85.0.1/24 dev gw0",
            "address add 2001:67c:85::1/64 dev gw0 nodad",
        ):
            host.run("ip", *command.split())
        for variable in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            host.set(variable, "1")
        host.run("nft", "-f", EXAMPLES / "routed" / "routed.nft")
        config = host.example("routed/gw0.conf")
        config.write_text(config.read_text().replace("/run/dnsmasq", f"{host.folder}/dnsmasq"))
        self.env = environment(host.base, ROUTED_STATE=str(self.state), ROUTED_PID=f"{host.folder}/dnsmasq.gw0.pid")
        with open(host.log, "a") as log:
            dnsmasq = ["dnsmasq", f"--conf-file={config}", "--keep-in-foreground", "--user=root", "--no-resolv"]
            host.start(*dnsmasq, "--log-facility=-", "--log-dhcp", env=self.env, stdout=log, stderr=log)
        wait_for(lambda: "started, version" in host.log.read_text(), "dnsmasq")

    def guest(self, number: int) -> Client:
        """Add a guest on the device tapNUMBER, which has no binding yet."""
        return self.host.client(f"guest{number}", f"10:66:6a:4c:a1:1{number}", port=f"tap{number}", bridge="")

    def binding(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run binding.sh."""
        return self.host.run(EXAMPLES / "routed" / "binding.sh", *arguments, env=self.env, check=False)

    def file(self, number: int, *lines: str, **changes: str) -> Path:
        """Write a binding file."""
        values = {"INDEV": f"tap{number}", "MAC": f"10:66:6A:4C:A1:1{number}", "IP": f'"10.85.0.1{number}"'}
        values |= {"HOSTNAME": f"'guest{number}'", "SUBNET6": "2001:67c:85::/64", "GATEWAY6": "2001:67c:85::1"}
        values |= {"GATEWAY": "10.85.0.1", "SUBNET": "10.85.0.0/24", "MTU": "1400", "UNKNOWN": "$(reboot)"} | changes
        path = self.host.folder / f"binding{number}"
        path.write_text("\n".join([f"{key}={value}" for key, value in values.items() if value] + list(lines)) + "\n")
        return path


@pytest.fixture
def routed(host):
    return Routed(host)


def test_routed_example_binds_guests_to_their_devices(routed):
    host = routed.host
    guests = [routed.guest(number) for number in range(3)]
    for number in range(2):
        result = routed.binding("add", routed.file(number))
        assert result.returncode == 0, result.stderr
        guests[number].dhcp4()
        assert guests[number].addresses("10") == [f"10.85.0.1{number}"] and "mtu=1400" in guests[number].events()
        guests[number].run("ip", "route", "add", "default", "via", "10.85.0.1")
        wait_for(lambda n=number: guests[n].addresses("2001"), "an address by SLAAC")
    assert routed.binding("list").stdout.count("\n") == 2
    assert {i["name"]: i["ipv4"] for i in host.registry().values()} == {"guest0": "10.85.0.10", "guest1": "10.85.0.11"}
    one, two = guests[:2]
    assert two.addresses("2001") == ["2001:67c:85::1266:6aff:fe4c:a111"] or two.addresses("2001")[0].endswith(
        "fe4c:a111"
    )
    for address in ("10.85.0.1", "2001:67c:85::1", *two.addresses("10"), *two.addresses("2001")):
        wait_for(lambda a=address: one.pings(a), f"a ping of {address}")
    reply = one.run("dig", "+short", "@10.85.0.1", "guest1.instance.internal", "A", check=False).stdout
    assert reply.split() == ["10.85.0.11"]

    # A guest without a binding gets nothing
    def dropped():
        listing = host.run("nft", "list", "chain", "inet", "routed", "prerouting").stdout
        return int(re.search(r"bound counter packets (\d+)", listing)[1])

    before = dropped()
    guests[2].start_dhcp4()
    wait_for(lambda: dropped() >= before + 2, "the drop of its requests")
    assert "bound" not in guests[2].events() and guests[2].mac not in host.registry()
    assert not guests[2].addresses("2001")

    # A guest can't use another's address
    one.run("ip", "address", "add", "10.85.0.11/24", "dev", "eth0")
    assert one.pings("10.85.0.1")
    forged = one.run("ping", "-n", "-c", "1", "-W", "2", "-I", "10.85.0.11", "10.85.0.1", check=False)
    assert forged.returncode == 1
    assert re.search(r"counter packets [1-9]", host.run("nft", "list", "chain", "inet", "routed", "prerouting").stdout)

    one.run("ip", "address", "delete", "10.85.0.11/24", "dev", "eth0")
    assert routed.binding("remove", host.folder / "binding1").returncode == 0
    assert not one.pings("10.85.0.11") and "tap1" not in routed.binding("list").stdout
    assert (
        "10.85.0.11" not in host.run("ip", "route").stdout + host.run("nft", "list", "table", "inet", "routed").stdout
    )
    assert routed.binding("remove", host.folder / "binding1").returncode == 1


def test_routed_example_makes_and_deletes_a_tap(routed):
    binding = routed.file(7)
    assert routed.binding("add", binding).returncode == 0
    assert "tun type tap" in routed.host.run("ip", "-details", "link", "show", "tap7").stdout
    assert routed.binding("add", binding).returncode == 1
    assert routed.binding("remove", binding).returncode == 0
    assert (
        not Path("/sys/class/net/tap7").exists()
        and routed.host.run("ip", "link", "show", "tap7", check=False).returncode
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"INDEV": ""},
        {"MAC": ""},
        {"IP": ""},
        {"INDEV": "eth0"},
        {"INDEV": "tap0/../x"},
        {"MAC": "06-10:66:6a:4c:a1:11"},
        {"IP": "10.85.0.300"},
        {"HOSTNAME": "3cx"},
        {"HOSTNAME": "a,b"},
        {"MTU": "9"},
        {"SUBNET6": "2001:67c:85::/80"},
        {"GATEWAY6": "2001::67c::1"},
    ],
)
def test_routed_example_refuses_a_bad_binding_and_does_nothing(routed, changes):
    before = routed.host.run("ip", "-details", "link").stdout
    result = routed.binding("add", routed.file(5, **changes))
    assert (
        result.returncode != 0
        and result.stderr
        and "binding" in result.stderr
        or changes == {"GATEWAY6": "2001::67c::1"}
    )
    assert routed.binding("list").stdout == "" and not list((routed.state / "hosts").iterdir())
    assert "10.85.0.15" not in routed.host.run("nft", "list", "ruleset").stdout
    assert routed.host.run("ip", "-details", "link").stdout.count("tap") == before.count("tap")


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
