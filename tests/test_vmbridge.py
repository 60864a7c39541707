"""The example bridge."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import PROGRAMS, need
from lab import DNSMASQ, DOMAIN, EXAMPLES, UPDATE, Host, is_alive, make_etc, mounted, process_file, wait_for

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
        places = {"/etc": self.etc, "/run": self.runtime, "/usr/local/sbin": self.sbin}
        self.mounts = places | {"/var/lib/misc": host.folder}
        self.pid_file = self.runtime / "vmbridge.br0.pid"

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run a command in the mount namespace, in the environment of a boot: with a PATH only."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return self.host.run(*mounted(self.mounts), *arguments, check=False, env={"PATH": path})

    def __call__(self, *arguments: str, bridge: str = "br0", status: int = 0) -> str:
        """Run vmbridge, and check its exit status; return what it says."""
        result = self.run("vmbridge", bridge, *arguments)
        assert result.returncode == status, result.stdout + result.stderr
        return result.stdout + result.stderr

    def refuses(self, status: int, message: str, *words: str) -> None:
        """Check that vmbridge says in one line of standard error why not, and that nothing of ours is on the host."""
        result = self.run("vmbridge", *words)
        assert (result.returncode, result.stdout) == (status, "")
        assert message in result.stderr and result.stderr.count("\n") == 1
        assert self.left() == [] and not self.forwards()

    def pid(self) -> str:
        return self.pid_file.read_text().strip()

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
    yield VMBridge(host)
    host.close()


def guest(vmbridge, label, number, gateway="", bridge="br0"):
    """Return a guest with a fixed address and a default route, or with a lease where no gateway is said."""
    client = vmbridge.host.client(label, f"10:66:6a:4c:a1:{number}", bridge=bridge)
    if not gateway:
        client.dhcp4(label)
        gateway = "10.83.0.1"
    else:
        client.ip(f"address add {gateway[:-1]}{number}/24 dev eth0")
    client.ip(f"route add default via {gateway}")
    return client


def test_vmbridge_starts_once_without_forwarding_and_stops_its_own_only(vmbridge):
    vmbridge.host.run("nft", "add", "table", "inet", "mine")
    vmbridge("status", status=3)
    assert "from 10.83.0.192 to 10.83.0.223" in vmbridge("start")
    pid = vmbridge.pid()
    assert f"process {pid}" in vmbridge("status")
    again = vmbridge("start")
    assert "runs already" in again and "restored" not in again and vmbridge.pid() == pid
    assert "masquerade" not in vmbridge.ruleset() and "vmbridge-br0" in vmbridge.ruleset() and not vmbridge.forwards()
    vmbridge("stop")
    assert not is_alive(pid) and vmbridge.left() == ["table inet mine {", "}"]
    vmbridge("stop")
    vmbridge("status", status=3)
    # Also for a bridge whose name is that of the rule that would need it
    vmbridge.host.ip("link add masquerade type bridge", "address add 10.9.9.1/24 dev masquerade")
    vmbridge("start", bridge="masquerade")
    vmbridge("status", bridge="masquerade")


def test_vmbridge_leaves_a_process_that_is_not_its_own(vmbridge):
    sleeper = vmbridge.host.start("sleep", "60")
    vmbridge.pid_file.write_text(f"{sleeper.pid}\n")
    vmbridge("status", status=1)
    vmbridge("reload", status=1)
    vmbridge("start")
    assert vmbridge.pid() != str(sleeper.pid)
    vmbridge("stop")
    assert sleeper.poll() is None
    vmbridge.pid_file.write_text("999999999\n")
    vmbridge("status", status=1)
    vmbridge("stop")
    assert not vmbridge.pid_file.exists()


def test_vmbridge_starts_at_once_are_one_start_and_one_with_other_options_waits_for_its_ports(vmbridge):
    at_once = " ".join(["vmbridge br0 start nat &"] * 6)
    for _ in range(5):
        result = vmbridge.run("sh", "-c", f"{at_once} wait")
        said = sorted(line.split(": ")[2].split()[0] for line in result.stdout.splitlines())
        assert said == ["runs"] * 5 + ["started"] and result.stderr == ""
        vmbridge("status")
        assert "masquerade" in vmbridge.ruleset()
        vmbridge("stop")
    for number in range(20):
        vmbridge("start", *["nat"] * (number % 2))


def test_vmbridge_status_tells_what_is_gone_and_start_restores_it(vmbridge):
    vmbridge("start", "nat")
    made, pid = vmbridge.ruleset(), vmbridge.pid()
    for harm, told in (
        (("nft", "flush", "ruleset"), "its table"),
        (("nft", "flush", "chain", "inet", "vmbridge-br0", "postrouting"), "its table"),
        (("sh", "-c", "echo 0 >/proc/sys/net/ipv4/ip_forward"), "does not forward"),
    ):
        vmbridge.host.run(*harm)
        assert told in vmbridge("status", status=1)
        assert "runs already" in vmbridge("start", "nat")
        vmbridge("status")
        assert vmbridge.ruleset() == made and vmbridge.forwards()
    os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: not is_alive(pid), "its end")
    assert "ended by itself" in vmbridge("status", status=1)
    vmbridge("start", "nat")
    vmbridge("status")


def test_vmbridge_takes_over_what_a_killed_start_has_left(vmbridge):
    (vmbridge.sbin / "dnsmasq").write_text("#!/bin/sh\nkill -9 $PPID\n")
    (vmbridge.sbin / "dnsmasq").chmod(0o755)
    assert vmbridge.run("vmbridge", "br0", "start", "nat").returncode and "masquerade" in vmbridge.ruleset()
    vmbridge("status", status=3)
    (vmbridge.sbin / "dnsmasq").unlink()
    vmbridge("start")
    vmbridge("status")
    assert "masquerade" not in vmbridge.ruleset()
    vmbridge("stop")
    assert vmbridge.left() == []


def test_vmbridge_refuses_in_one_line_and_changes_nothing(vmbridge):
    vmbridge.host.ip(*(f"link add {name} type bridge" for name in ("empty", "small", "single")))
    vmbridge.host.ip("address add 10.9.9.1/29 dev small", "address add 10.9.8.1 peer 10.9.8.2 dev single")
    for words in ("br0 begin", "br0", "br0 stop nat"):
        vmbridge.refuses(2, f"error: {words}: no such usage: see --help", *words.split())
    for bridge, why in (
        ("none", "no such bridge"),
        ("lo", "no such bridge"),
        ("../x", "not the name of a bridge"),
        ("empty", "has no IPv4 address"),
        ("single", "has no IPv4 address with a network"),
        ("small", "10.9.9.1/29 is too small"),
    ):
        vmbridge.refuses(1, f"{bridge}: {why}", bridge, "start")
    vmbridge.refuses(1, "br0: does not run", "br0", "reload")
    vmbridge.script.chmod(0o644)
    vmbridge.refuses(1, f"{UPDATE.name}: not there or not executable", "br0", "start", "nat")
    vmbridge.script.unlink()
    vmbridge.refuses(1, f"{UPDATE.name}: not there or not executable", "br0", "start", "nat")
    shutil.copy(UPDATE, vmbridge.script)
    for program in ("dnsmasq", "nft"):
        vmbridge.mounts[shutil.which(program, path="/usr/sbin:/usr/bin")] = Path("/dev/null")
        vmbridge.refuses(1, f"no program {program}", "br0", "start", "nat")
        vmbridge.mounts.popitem()
    vmbridge("start", "nat")


def test_vmbridge_start_that_fails_leaves_nothing_and_then_works(vmbridge):
    other = vmbridge.host.start(*DNSMASQ, "--listen-address=10.83.0.1", "--bind-interfaces", stderr=subprocess.PIPE)
    assert b"started" in other.stderr.readline()
    assert vmbridge("start", "nat", status=1).endswith("did not start; nothing of ours is left\n")
    assert vmbridge.left() == [] and not vmbridge.forwards()
    vmbridge("status", status=3)
    vmbridge.host.stop(other)
    other.stderr.close()
    vmbridge("start", "nat")


def test_vmbridge_serves_clients_without_udp_checksums_and_reads_ethers_and_hosts_again(vmbridge):
    host = vmbridge.host
    host.ip("link set br0 mtu 1400")
    vmbridge("start")
    names = ("fixed", "other", "late")
    fixed, other, late = [host.client(name, f"10:66:6a:4c:a1:2{number}") for number, name in enumerate(names)]
    count = "udp sport 67 udp checksum 0 counter; udp sport 67 udp checksum != 0 counter"
    fixed.run("nft", f"table ip c {{ chain c {{ type filter hook prerouting priority 0; {count}; }}; }}")
    fixed.dhcp4()
    assert fixed.addresses("10") == ["10.83.0.20"]
    without, others = re.findall(r"packets (\d+)", fixed.run("nft", "list", "table", "ip", "c").stdout)
    assert int(without) > 0 and int(others) == 0
    other.dhcp4("other")
    assert 192 <= int(other.addresses("10")[0].split(".")[3]) <= 223
    assert host.registry()[other.mac]["name"] == "other"
    assert other.resolve("fixed", "A") == ["10.83.0.20"]
    assert other.resolve(f"other.lease.{DOMAIN}", "A") == other.addresses("10")
    options = other.events().splitlines()[-1]
    assert "router= " in options + " " and "mtu=1400" in options
    (vmbridge.etc / "ethers").write_text("10:66:6a:4c:a1:22 late\n")
    (vmbridge.etc / "hosts").write_text("10.83.0.30 late\n")
    vmbridge("reload")
    wait_for(lambda: other.resolve("late", "A") == ["10.83.0.30"], "the new /etc/hosts")
    late.dhcp4()
    assert late.addresses("10") == ["10.83.0.30"]


def test_vmbridge_evaluates_no_setting_and_its_names_are_the_registrys_and_not_the_clients(vmbridge):
    host, domain = vmbridge.host, "a.example"
    (vmbridge.etc / "default").mkdir()
    text = "# settings\nINSTANCES_BASE_ID='br0' # ours\nINSTANCES_HOSTS_DOMAIN=\".a.example,.b.example\"\n"
    text += "INSTANCES_ADDRESS_SETS=$(touch /run/vmbridge-evaluated)\ntouch /run/vmbridge-run\nexit 7"
    (vmbridge.etc / "default" / "instances").write_text(text)
    host.base = host.folder / "instances-br0"
    vmbridge("start")
    assert sorted(path.name for path in vmbridge.runtime.glob("vmbridge*")) == ["vmbridge.br0.nft", "vmbridge.br0.pid"]
    assert f"--local=/{domain}/\0" in process_file(vmbridge.pid(), "cmdline")
    web, wpad = guest(vmbridge, "web", 11), guest(vmbridge, "wpad", 12)
    [address] = web.addresses("10")
    assert [host.registry()[client.mac]["name"] for client in (web, wpad)] == ["web", ""]
    assert web.resolve(f"web.lease.{domain}", "A") == [address]
    for name in ("web", f"web.{domain}", "wpad", f"wpad.{domain}", f"wpad.lease.{domain}"):
        assert web.resolve(name, "A") == [], name
    new = host.folder / "new"
    new.write_text(f"{address} web.{domain}\n")
    new.rename(host.folder / "instances-br0.hosts.d" / "instances.hosts")
    wait_for(lambda: wpad.resolve(f"web.{domain}", "A") == [address], "the registry's names")

    # A guest that says another's client identifier, and asks for the search domain
    thief = host.client("thief", "10:66:6a:4c:a1:13")
    thief.script.write_text('#!/bin/sh\necho "$1 $ip domain=$domain search=$search" >>"$0.log"\n')
    identifier = f"0x3d:01{web.mac.replace(':', '')}"
    thief.run("udhcpc", "-qfn", "-i", "eth0", "-s", thief.script, "-O", "search", "-C", "-x", identifier)
    bound = thief.events().splitlines()[-1]
    assert bound.startswith("bound 10.83.0.") and f"bound {address} " not in bound
    assert bound.endswith(f" domain={domain} search={domain}")


def test_vmbridge_does_nat_if_asked_lets_nobody_in_and_asks_nobody_about_its_own_network(vmbridge):
    host = vmbridge.host
    # A machine beyond the host, that of its resolver, that knows no route to the guests
    outside, asked = host.client("outside", "10:66:6a:4c:b0:01", "out", bridge="", wait=False), host.folder / "asked"
    outside.ip("address add 192.0.2.53/24 dev eth0")
    outside.hear(asked, "::ffff:192.0.2.53", 53)
    host.ip("address add 192.0.2.1/24 dev out", "address add 10.84.0.1/24 dev br0")
    host.ip("link add br1 type bridge", "link set br1 up", "address add 10.85.0.1/24 dev br1")
    for bridge in ("br0", "br1"):
        vmbridge("start", "nat", bridge=bridge)
    web = guest(vmbridge, "web", 11)
    assert "router=10.83.0.1" in web.events()
    second = guest(vmbridge, "second", 12, "10.84.0.1")
    other = guest(vmbridge, "other", 13, "10.85.0.1", "br1")
    [address] = web.addresses("10")
    for unknown in ("10.83.0.99", "198.51.100.99"):
        web.run("dig", "+timeout=1", "+tries=1", "@10.83.0.1", "-x", unknown, check=False)
    wait_for(lambda: "198" in asked.read_text(), "a question about another network")
    assert "\\x0283" not in asked.read_text()

    # Out: all networks of the bridge behind the host's address, for outside knows no route back.
    assert all(client.pings("192.0.2.53") for client in (web, second, other))
    # In: neither from outside nor from another bridge
    networks = ("10.83.0.0/24", "10.84.0.0/24", "10.85.0.0/24", "198.51.100.0/24")
    outside.ip(*(f"route add {network} via 192.0.2.1" for network in networks))
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
    assert "with other options" in vmbridge("start")
    assert "Packet filtered" in web.run("ping", "-n", "-c", "1", "-W", "2", "192.0.2.53", check=False).stdout
    assert web.pings("10.83.0.1") and other.pings("192.0.2.53")
    assert "router= " in guest(vmbridge, "late", 14).events()
    for bridge in ("br0", "br1"):
        vmbridge("status", bridge=bridge)
        vmbridge("stop", bridge=bridge)
    assert "vmbridge" not in vmbridge.ruleset()


def test_ifup_after_a_failed_one_works_and_ifdown_leaves_nothing(vmbridge):
    need("ifup")
    vmbridge.script.chmod(0o644)
    for _ in range(2):
        failed = vmbridge.run("ifup", "vmbr0")
        assert failed.returncode and "not executable" in failed.stderr and "File exists" not in failed.stderr
    client = vmbridge.host.client("web", "10:66:6a:4c:a1:11", bridge="vmbr0")
    vmbridge.script.chmod(0o755)
    assert vmbridge.run("ifup", "vmbr0").returncode == 0
    vmbridge("status", bridge="vmbr0")
    assert "masquerade" in vmbridge.ruleset()
    client.dhcp4("web")  # its port is on the bridge still
    for command in ("ifdown", "ifup"):
        assert vmbridge.run(command, "vmbr0").returncode == 0
        assert (vmbridge.left() == []) == (command == "ifdown")
    wait_for(lambda: client.pings("10.83.1.1"), "the guest is on the bridge that is up again")
    client.ip("link delete eth0")
    assert vmbridge.run("ifdown", "vmbr0").returncode == 0 and vmbridge.left() == []
    assert vmbridge.host.run("ip", "link", "show", "vmbr0", check=False).returncode
