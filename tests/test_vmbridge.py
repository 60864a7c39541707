"""The example bridge."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import DOMAIN, EXAMPLES, UPDATE, Client, Host, Namespace, is_alive, make_etc, mounted, wait_for

pytestmark = pytest.mark.slow


class VMBridge:
    """A host with vmbridge installed as README says, in a mount namespace where all that it writes to is ours."""

    def __init__(self, host: Host):
        self.host = host
        self.etc, self.runtime, self.sbin = (host.folder / name for name in ("etc", "run", "sbin"))
        hooks = (self.etc / "network" / f"if-{when}.d" for when in ("pre-up", "up", "down", "post-down"))
        for folder in (*hooks, self.runtime, self.sbin):
            folder.mkdir(parents=True)
        host.folder.chmod(0o755)  # dnsmasq's user reads /var/lib/misc
        make_etc(self.etc)
        (self.etc / "hosts").write_text("10.83.0.20 fixed\n10.83.0.1 router\n")
        (self.etc / "ethers").write_text("10:66:6a:4c:a1:20 10.83.0.20\n")
        (self.etc / "resolv.conf").write_text("nameserver 192.0.2.53\n")
        shutil.copy(EXAMPLES / "bridge" / "vmbr0", self.etc / "network" / "interfaces")
        self.script = self.sbin / UPDATE.name
        for program in (UPDATE, EXAMPLES / "bridge" / "vmbridge"):
            shutil.copy(program, self.sbin)
        self.mounts = {
            "/etc": self.etc,
            "/run": self.runtime,
            "/usr/local/sbin": self.sbin,
            "/var/lib/misc": host.folder,
        }

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs another in the mount namespace."""
        return [*mounted(self.mounts), *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run a command in the mount namespace, in the environment of a boot: with a PATH only."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return self.host.run(*self.command(*arguments), check=False, env={"PATH": path})

    def __call__(self, *arguments: str, bridge: str = "br0") -> subprocess.CompletedProcess:
        return self.run("vmbridge", bridge, *arguments)

    def pid(self) -> str:
        path = self.runtime / "vmbridge.br0.pid"
        return path.read_text().strip() if path.exists() else ""

    def ruleset(self) -> str:
        return self.host.run("nft", "list", "ruleset").stdout

    def forwards(self) -> bool:
        return self.host.run("cat", "/proc/sys/net/ipv4/ip_forward").stdout == "1\n"

    def left(self) -> list:
        """Return what there is of ours on the host."""
        return [path.name for path in self.runtime.glob("vmbridge*")] + self.ruleset().splitlines()


@pytest.fixture
def vmbridge(tmp_path):
    need(*PROGRAMS, "unshare", "flock")
    host = Host(tmp_path, ("10.83.0.1/24",))
    host.set("net/ipv4/ip_forward", "0")
    vmbridge = VMBridge(host)
    yield vmbridge
    for pid in subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):  # dnsmasq, also where a pid file does not tell of it
            os.kill(int(pid), signal.SIGKILL)
    host.close()


@pytest.fixture
def outside(vmbridge):
    """A machine beyond the host, 192.0.2.53, that knows no route to the guests."""
    outside = Namespace("outside")
    vmbridge.host.run("ip", "link", "add", "out", "type", "veth", "peer", "name", "eth0", "netns", outside.name)
    for node, device, address in ((vmbridge.host, "out", "192.0.2.1/24"), (outside, "eth0", "192.0.2.53/24")):
        node.run("ip", "address", "add", address, "dev", device)
        node.run("ip", "link", "set", device, "up")
    outside.pings = partial(Client.pings, outside)
    yield outside
    outside.close()


def guest(vmbridge, label, number, gateway="", bridge="br0"):
    """Return a guest with a fixed address and a default route, or with a lease where no gateway is said."""
    client = vmbridge.host.client(label, f"10:66:6a:4c:a1:{number}", bridge=bridge)
    if not gateway:
        client.dhcp4(label)
        gateway = "10.83.0.1"
    else:
        client.run("ip", "address", "add", f"{gateway[:-1]}{number}/24", "dev", "eth0")
    client.run("ip", "route", "add", "default", "via", gateway)
    return client


def echoes(node):
    """Return how many echo requests have come to a machine."""
    names, values = (line.split() for line in node.run("grep", "^Icmp:", "/proc/net/snmp").stdout.splitlines())
    return int(values[names.index("InEchos")])


def test_vmbridge_starts_once_and_stops_its_own_only(vmbridge):
    vmbridge.host.run("nft", "add", "table", "inet", "mine")
    assert vmbridge("status").returncode == 3
    started = vmbridge("start")
    assert started.returncode == 0 and "from 10.83.0.192 to 10.83.0.223" in started.stdout, started.stderr
    pid = vmbridge.pid()
    assert vmbridge("status").returncode == 0 and f"process {pid}" in vmbridge("status").stdout
    again = vmbridge("start")
    assert again.returncode == 0 and "runs already" in again.stdout and vmbridge.pid() == pid
    assert "restored" not in again.stdout
    assert "masquerade" not in vmbridge.ruleset() and "vmbridge-br0" in vmbridge.ruleset() and not vmbridge.forwards()
    assert vmbridge("stop").returncode == 0 and not is_alive(pid)
    assert vmbridge.left() == ["table inet mine {", "}"]
    assert vmbridge("stop").returncode == 0 and vmbridge("status").returncode == 3


def test_vmbridge_leaves_a_process_that_is_not_its_own(vmbridge):
    sleeper = vmbridge.host.start("sleep", "60")
    (vmbridge.runtime / "vmbridge.br0.pid").write_text(f"{sleeper.pid}\n")
    assert vmbridge("status").returncode == 1
    assert vmbridge("reload").returncode == 1
    assert vmbridge("start").returncode == 0 and vmbridge.pid() != str(sleeper.pid)
    assert vmbridge("stop").returncode == 0 and sleeper.poll() is None
    (vmbridge.runtime / "vmbridge.br0.pid").write_text("999999999\n")
    assert vmbridge("status").returncode == 1 and vmbridge("stop").returncode == 0 and vmbridge.pid() == ""


def test_vmbridge_starts_at_once_are_one_start(vmbridge):
    at_once = " ".join(["vmbridge br0 start nat &"] * 6)
    for _ in range(5):
        result = vmbridge.run("sh", "-c", f"{at_once} wait")
        said = sorted(line.split(": ")[2].split()[0] for line in result.stdout.splitlines())
        assert said == ["runs"] * 5 + ["started"] and result.stderr == ""
        status = vmbridge("status")
        assert status.returncode == 0 and "masquerade" in vmbridge.ruleset(), status.stdout
        vmbridge("stop")


def test_vmbridge_status_tells_what_is_gone_and_start_restores_it(vmbridge):
    vmbridge("start", "nat")
    made, pid = vmbridge.ruleset(), vmbridge.pid()
    for harm, told in (
        (("nft", "flush", "ruleset"), "its table"),
        (("nft", "flush", "chain", "inet", "vmbridge-br0", "postrouting"), "its table"),
        (("sh", "-c", "echo 0 >/proc/sys/net/ipv4/ip_forward"), "does not forward"),
    ):
        vmbridge.host.run(*harm)
        status = vmbridge("status")
        assert status.returncode == 1 and told in status.stdout
        assert "runs already" in vmbridge("start", "nat").stdout
        assert vmbridge("status").returncode == 0 and vmbridge.ruleset() == made and vmbridge.forwards()
    os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: not is_alive(pid), "its end")
    assert vmbridge("status").returncode == 1 and "ended by itself" in vmbridge("status").stdout
    assert vmbridge("start", "nat").returncode == 0 and vmbridge("status").returncode == 0


def test_vmbridge_takes_over_what_a_killed_start_has_left(vmbridge):
    (vmbridge.sbin / "dnsmasq").write_text("#!/bin/sh\nkill -9 $PPID\n")
    (vmbridge.sbin / "dnsmasq").chmod(0o755)
    assert vmbridge("start", "nat").returncode and "masquerade" in vmbridge.ruleset()
    assert vmbridge("status").returncode == 3
    (vmbridge.sbin / "dnsmasq").unlink()
    assert vmbridge("start").returncode == 0 and vmbridge("status").returncode == 0
    assert "masquerade" not in vmbridge.ruleset()
    assert vmbridge("stop").returncode == 0 and vmbridge.left() == []


def test_vmbridge_without_nat_wants_no_forwarding_whatever_the_bridge_is_called(vmbridge):
    vmbridge.host.run("ip", "link", "add", "masquerade", "type", "bridge")
    vmbridge.host.run("ip", "address", "add", "10.9.9.1/24", "dev", "masquerade")
    assert vmbridge("start", bridge="masquerade").returncode == 0
    assert vmbridge("status", bridge="masquerade").returncode == 0


@pytest.mark.parametrize(
    ("bridge", "arguments", "status", "message"),
    [
        ("br0", ("begin",), 2, "error: br0 begin: no such usage: see --help"),
        ("br0", (), 2, "error: br0: no such usage: see --help"),
        ("br0", ("stop", "nat"), 2, "error: br0 stop nat: no such usage: see --help"),
        ("none", ("start",), 1, "none: no such bridge"),
        ("lo", ("start",), 1, "lo: no such bridge"),
        ("../x", ("start",), 1, "../x: not the name of a bridge"),
        ("empty", ("start",), 1, "empty: has no IPv4 address"),
        ("small", ("start",), 1, "small: 10.9.9.1/29 is too small"),
        ("single", ("start",), 1, "single: has no IPv4 address with a network"),
        ("br0", ("reload",), 1, "br0: does not run"),
    ],
)
def test_vmbridge_refuses_in_one_line(vmbridge, bridge, arguments, status, message):
    for name in ("empty", "small", "single"):
        vmbridge.host.run("ip", "link", "add", name, "type", "bridge")
    vmbridge.host.run("ip", "address", "add", "10.9.9.1/29", "dev", "small")
    vmbridge.host.run("ip", "address", "add", "10.9.8.1", "peer", "10.9.8.2", "dev", "single")
    refuses(vmbridge, status, message, *arguments, bridge=bridge)


def refuses(vmbridge, status, message, *arguments, bridge="br0"):
    """Assert that vmbridge says why not, in one line, and changes nothing."""
    result = vmbridge(*arguments, bridge=bridge)
    assert (result.returncode, result.stdout) == (status, "")
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert vmbridge.left() == [] and not vmbridge.forwards()


def test_vmbridge_refuses_where_it_could_not_register_or_serve(vmbridge):
    vmbridge.script.chmod(0o644)
    refuses(vmbridge, 1, f"{UPDATE.name}: not there or not executable", "start", "nat")
    vmbridge.script.unlink()
    refuses(vmbridge, 1, f"{UPDATE.name}: not there or not executable", "start", "nat")
    shutil.copy(UPDATE, vmbridge.script)
    for program in ("dnsmasq", "nft"):
        vmbridge.mounts[shutil.which(program, path="/usr/sbin:/usr/bin")] = Path("/dev/null")
        refuses(vmbridge, 1, f"no program {program}", "start", "nat")
        vmbridge.mounts.popitem()
    assert vmbridge("start", "nat").returncode == 0


def test_vmbridge_start_that_fails_leaves_nothing_and_then_works(vmbridge):
    code = "import socket, time\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    code += "s.bind(('10.83.0.1', 53)); print('ready', flush=True); time.sleep(60)"
    other = vmbridge.host.start(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"ready\n"
    failed = vmbridge("start", "nat")
    assert failed.returncode == 1 and failed.stderr.endswith("did not start; nothing of ours is left\n")
    assert vmbridge.left() == [] and not vmbridge.forwards() and vmbridge("status").returncode == 3
    vmbridge.host.stop(other)
    other.stdout.close()
    assert vmbridge("start", "nat").returncode == 0


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


def test_vmbridge_names_are_the_registrys_and_not_the_clients(vmbridge):
    host = vmbridge.host
    (vmbridge.etc / "default").mkdir()
    (vmbridge.etc / "default" / "instances").write_text("INSTANCES_BASE_ID=br0\n")
    host.base = host.folder / "instances-br0"
    vmbridge("start")
    web, wpad = guest(vmbridge, "web", 11), guest(vmbridge, "wpad", 12)
    [address] = web.addresses("10")
    assert [host.registry()[client.mac]["name"] for client in (web, wpad)] == ["web", ""]
    assert web.resolve(f"web.lease.{DOMAIN}", "A") == [address]
    for name in ("web", f"web.{DOMAIN}", "wpad", f"wpad.{DOMAIN}", f"wpad.lease.{DOMAIN}"):
        assert web.resolve(name, "A") == [], name
    new = host.folder / "new"
    new.write_text(f"{address} web.{DOMAIN}\n")
    new.rename(host.folder / "instances-br0.hosts.d" / "instances.hosts")
    wait_for(lambda: wpad.resolve(f"web.{DOMAIN}", "A") == [address], "the registry's names")

    # A guest that says another's client identifier, and asks for the search domain
    thief = host.client("thief", "10:66:6a:4c:a1:13")
    thief.script.write_text('#!/bin/sh\necho "$1 $ip domain=$domain search=$search" >>"$0.log"\n')
    identifier = f"0x3d:01{web.mac.replace(':', '')}"
    thief.run("udhcpc", "-qfn", "-i", "eth0", "-s", thief.script, "-O", "search", "-C", "-x", identifier)
    bound = thief.events().splitlines()[-1]
    assert bound.startswith("bound 10.83.0.") and f"bound {address} " not in bound
    assert bound.endswith(f" domain={DOMAIN} search={DOMAIN}")


RESOLVER = """\
import socket
asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asked.bind(("192.0.2.53", 53))
print("ready", flush=True)
while True:
    print(asked.recv(512), flush=True)
"""


def test_vmbridge_asks_nobody_about_addresses_of_its_own_network(vmbridge, outside):
    log = vmbridge.host.folder / "asked"
    with open(log, "w") as file:
        outside.start(sys.executable, "-c", RESOLVER, stdout=file)
    wait_for(lambda: "ready" in log.read_text(), "the host's resolver")
    vmbridge("start")
    web = guest(vmbridge, "web", 11)
    for address in ("10.83.0.99", "198.51.100.99"):
        web.run("dig", "+timeout=1", "+tries=1", "@10.83.0.1", "-x", address, check=False)
    wait_for(lambda: "198" in log.read_text(), "a question about another network")
    assert "\\x0283" not in log.read_text()


def test_vmbridge_reads_settings_and_evaluates_none(vmbridge):
    (vmbridge.etc / "default").mkdir()
    text = "# settings\nINSTANCES_BASE_ID='br0' # ours\nINSTANCES_HOSTS_DOMAIN=\".a.example,.b.example\"\nexit 7\n"
    text += "INSTANCES_ADDRESS_SETS=$(touch /run/vmbridge-evaluated)\ntouch /run/vmbridge-run"
    (vmbridge.etc / "default" / "instances").write_text(text)
    assert vmbridge("start").returncode == 0
    options = Path(f"/proc/{vmbridge.pid()}/cmdline").read_text().split("\0")
    assert "--local=/a.example/" in options and "--hostsdir=/var/lib/misc/instances-br0.hosts.d" in options
    assert sorted(path.name for path in vmbridge.runtime.glob("vmbridge*")) == ["vmbridge.br0.nft", "vmbridge.br0.pid"]


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


def test_vmbridge_does_nat_if_asked_and_lets_nobody_in(vmbridge, outside):
    host = vmbridge.host
    host.run("ip", "address", "add", "10.84.0.1/24", "dev", "br0")
    host.run("ip", "link", "add", "br1", "type", "bridge")
    host.run("ip", "link", "set", "br1", "up")
    host.run("ip", "address", "add", "10.85.0.1/24", "dev", "br1")
    for bridge in ("br0", "br1"):
        assert vmbridge("start", "nat", bridge=bridge).returncode == 0
    web = guest(vmbridge, "web", 11)
    assert "router=10.83.0.1" in web.events()
    second = guest(vmbridge, "second", 12, "10.84.0.1")
    other = guest(vmbridge, "other", 13, "10.85.0.1", "br1")
    [address] = web.addresses("10")

    # Out: all networks of the bridge behind the host's address, for outside knows no route back.
    assert all(client.pings("192.0.2.53") for client in (web, second, other))
    # In: neither from outside nor from another bridge
    for network in ("10.83.0.0/24", "10.84.0.0/24", "10.85.0.0/24", "198.51.100.0/24"):
        outside.run("ip", "route", "add", network, "via", "192.0.2.1")
    assert web.pings("10.84.0.12") and outside.pings("10.83.0.1")
    assert not any(outside.pings(guest) for guest in (address, "10.84.0.12", "10.85.0.13"))
    assert not web.pings("10.85.0.13") and not other.pings(address)
    # ... where the bridge's dnsmasq is not asked, either,
    assert web.resolve("router", "A") == ["10.83.0.1"]
    assert outside.run("dig", "+short", "+tries=1", "+time=1", "@10.83.0.1", "router", check=False).returncode
    # but by a destination NAT of the administrator's.
    host.run("nft", "add table ip mine; add chain ip mine in { type nat hook prerouting priority -100; }")
    host.run("nft", f"add rule ip mine in ip daddr 198.51.100.1 dnat to {address}")
    assert outside.pings("198.51.100.1")

    # Without nat after nat: nobody gets out, and none is told to.
    assert "with other options" in vmbridge("start").stdout
    before = echoes(outside)
    assert not web.pings("192.0.2.53") and echoes(outside) == before
    assert web.pings("10.83.0.1") and other.pings("192.0.2.53") and echoes(outside) == before + 1
    guest(vmbridge, "late", 14)
    assert "router= " in host.clients[-1].events()
    assert vmbridge("status").returncode == 0 and vmbridge("status", bridge="br1").returncode == 0
    for bridge in ("br0", "br1"):
        assert vmbridge("stop", bridge=bridge).returncode == 0
    assert "vmbridge" not in vmbridge.ruleset()


def test_ifup_after_a_failed_one_works_and_ifdown_leaves_nothing(vmbridge):
    need("ifup")
    vmbridge.script.chmod(0o644)
    for _ in range(2):
        failed = vmbridge.run("ifup", "vmbr0")
        assert failed.returncode and "not executable" in failed.stderr and "File exists" not in failed.stderr
    client = vmbridge.host.client("web", "10:66:6a:4c:a1:11", bridge="vmbr0")
    vmbridge.script.chmod(0o755)
    up = vmbridge.run("ifup", "vmbr0")
    assert up.returncode == 0, up.stderr
    assert vmbridge("status", bridge="vmbr0").returncode == 0 and "masquerade" in vmbridge.ruleset()
    client.dhcp4("web")  # its port is on the bridge still
    for command in ("ifdown", "ifup"):
        done = vmbridge.run(command, "vmbr0")
        assert done.returncode == 0, done.stderr
        assert (vmbridge.left() == []) == (command == "ifdown")
    wait_for(lambda: client.pings("10.83.1.1"), "the guest is on the bridge that is up again")
    client.run("ip", "link", "delete", "eth0")
    assert vmbridge.run("ifdown", "vmbr0").returncode == 0 and vmbridge.left() == []
    assert vmbridge.host.run("ip", "link", "show", "vmbr0", check=False).returncode


def test_another_start_with_other_options_never_finds_the_address_in_use(vmbridge):
    assert vmbridge("start").returncode == 0
    for options in (["nat"], []) * 4:
        again = vmbridge("start", *options)
        assert "started again, with other options" in again.stdout, again.stderr
