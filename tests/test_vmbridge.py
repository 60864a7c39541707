"""The example bridge."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import EXAMPLES, UPDATE, Host, Namespace, environment, is_alive, wait_for

pytestmark = pytest.mark.slow


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
