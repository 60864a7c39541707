"""Docker, ufw and firewalld beside the guard: what they cut guests off from, and that the page's lines mend it.

Each is the real program as Debian has it, in the namespace of a guarded host, with folders of its own as /etc, /run and
/var/log.
"""

import contextlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_bridge
from attacks import HOST4, HOST6, NEEDS_BR_NETFILTER, Guarded, dhcp6, scapy, solicitation
from conftest import PROGRAMS, need
from lab import Host, block, environment, make_etc, mounted, wait_for

pytestmark = [pytest.mark.slow, NEEDS_BR_NETFILTER]
HOST, INSIDE = {4: HOST4, 6: HOST6}, {4: "10.83.0.20", 6: "2001:67c:83::20"}
OUTSIDE = {4: "10.84.0.20", 6: "2001:67c:84::20"}
SERVER = """\
import socket
server = socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    server.accept()[0].close()
"""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 80), 2)"


class Guests(Guarded):
    """A guarded host that routes, with a victim, a server on the bridge, and one beyond the host's eth0."""

    def __init__(self, host: Host):
        super().__init__(host)
        self.inside = host.client("inside", "10:66:6a:4c:a1:20", wait=False)
        self.outside = host.client("outside", "10:66:6a:4c:b0:01", port="eth0", bridge="", wait=False)
        host.ip("address add 10.84.0.1/24 dev eth0", "address add 2001:67c:84::1/80 dev eth0 nodad")
        for server, own in ((self.inside, INSIDE), (self.outside, OUTSIDE)):
            server.ip(f"address add {own[4]}/24 dev eth0", f"address add {own[6]}/80 dev eth0 nodad")
            server.start(sys.executable, "-c", SERVER)
        self.victim.ip("route add default via 10.83.0.1")
        self.outside.ip("route add default via 10.84.0.1", "route add default via 2001:67c:84::1")
        host.update("add", self.inside.mac, INSIDE[4], "inside")
        host.update("add", self.inside.mac, INSIDE[6], DNSMASQ_MAC=self.inside.mac)
        self.settle()
        self.told = 0

    def asks(self) -> bool:
        """Tell whether a DHCPv4 client gets an answer."""
        options = ["-f", "-q", "-n", "-t", "2", "-T", "1", "-i", "eth0", "-s", "/bin/true"]
        return self.victim.run("udhcpc", *options, check=False).returncode == 0

    def renews(self) -> bool:
        """Tell whether the victim's IPv6 lease is renewed."""
        reply = f"DHCPREPLY(br0) {self.addresses6[0]} {self.duid.hex(':')}"
        times = self.log().count(reply) + 1
        self.victim.send(bytes(solicitation(self.victim, 133)), bytes(dhcp6(self, self.victim, scapy.DHCP6_Renew)))
        return self.heard(reply, times, 2)

    def resolves(self, *options: str) -> bool:
        """Tell whether the host's dnsmasq answers."""
        command = ["dig", "+short", "+timeout=2", "+tries=1", *options, "inside.v4.instance.internal", "A"]
        return INSIDE[4] in self.victim.run(*command, check=False).stdout

    def connects(self, address: str) -> bool:
        """Tell whether a server accepts a connection."""
        return self.victim.run(sys.executable, "-c", CONNECT, address, check=False).returncode == 0

    def reached(self) -> set[str]:
        """Return which of the checks succeed, none of them by what neighbours' caches still have."""
        for limit in ("asked", "asked6"):  # or the victim, who asks in each round, has asked too often
            self.host.run("nft", "flush", "set", "bridge", "instances", f"instances_{limit}")
        for node in (self.host, self.victim, self.inside):
            node.run("ip", "neighbour", "flush", "all")
        with ThreadPoolExecutor(len(CHECKS)) as pool:
            results = pool.map(lambda check: check(self), CHECKS.values())
            return {name for name, success in zip(CHECKS, results) if success}

    def tables(self) -> set[str]:
        """Return the tables, as "table ip filter"."""
        return set(self.host.run("nft", "list", "tables").stdout.splitlines())

    def guard_s_tables(self) -> list[str]:
        """Return the listings of the guard's tables, with handles, which are never given twice."""
        tables = ("bridge instances", "inet instances_group", "arp instances_group")
        return [self.host.run("nft", "-a", "-s", "-t", "list", "table", *table.split()).stdout for table in tables]

    def reach(self, expected: set[str]) -> None:
        """Wait until these checks succeed and no others."""
        seen = []
        with contextlib.suppress(AssertionError):
            wait_for(lambda: seen.append(self.reached()) or seen[-1] == expected, "what is reached")
        assert seen[-1] == expected


CHECKS = {
    "DHCP 4": Guests.asks,
    "DHCP 6": Guests.renews,
    **{f"DNS by UDP {v}": lambda g, v=v: g.resolves(f"@{HOST[v]}") for v in HOST},
    **{f"DNS by TCP {v}": lambda g, v=v: g.resolves(f"@{HOST[v]}", "+tcp") for v in HOST},
    **{f"ping host {v}": lambda g, v=v: g.victim.pings(HOST[v]) for v in HOST},
    **{f"ping inside {v}": lambda g, v=v: g.victim.pings(INSIDE[v]) for v in INSIDE},
    **{f"ping outside {v}": lambda g, v=v: g.victim.pings(OUTSIDE[v]) for v in OUTSIDE},
    **{f"TCP inside {v}": lambda g, v=v: g.connects(INSIDE[v]) for v in INSIDE},
    **{f"TCP outside {v}": lambda g, v=v: g.connects(OUTSIDE[v]) for v in OUTSIDE},
}
ALL = set(CHECKS)
BRIDGED = {check for check in ALL if " inside " in check}


class Firewall:
    """A firewall in a host's namespace."""

    def __init__(self, host: Host, folder: Path):
        self.host, self.folder, self.output, self.programs = host, folder, folder / "output", []
        for name in ("etc", "run", "log"):
            (folder / name).mkdir()
        shutil.copytree("/etc/alternatives", make_etc(folder / "etc") / "alternatives", symlinks=True)
        self.places = mounted({"/etc": folder / "etc", "/run": folder / "run", "/var/log": folder / "log"})
        self.env = environment(host.base, DBUS_SYSTEM_BUS_ADDRESS="unix:path=/run/bus")

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        """Run a command where the firewall is."""
        return self.host.run(*self.places, *command, check=check, env=self.env)

    def begin(self, *command: str) -> None:
        """Start a program of the firewall."""
        with open(self.output, "w") as file:
            program = self.host.start(*self.places, *command, env=self.env, stdout=file, stderr=file)
        self.programs.append(program)

    def mend(self) -> None:
        """Run the page's lines."""
        self.run("sh", "-euxc", self.lines)

    def end(self) -> None:
        """End the programs of the firewall."""
        for program in reversed(self.programs):
            self.host.stop(program)


class Docker(Firewall):
    """Docker, without a container."""

    needs, lines = ("dockerd", "containerd", "iptables"), block("examples/nftables/README.md", "ACCEPT\niptables")
    left = ALL - {"ping inside 4", "TCP inside 4", "ping outside 4", "TCP outside 4"}

    def start(self, forwarding: str = "0") -> None:
        self.host.set("net/ipv4/ip_forward", forwarding)
        (self.folder / "daemon.json").write_text("{}")
        options = f"--config-file={self.folder}/daemon.json --data-root={self.folder}/docker --storage-driver=vfs"
        self.begin("sh", "-ec", f"mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec dockerd {options}")
        wait_for(lambda: "API listen on" in self.output.read_text(), "dockerd")

    def reload(self) -> None:
        self.host.stop(self.programs.pop())
        self.start("1")

    def end(self) -> None:
        super().end()
        self.host.run("ip", "link", "delete", "docker0")


class Ufw(Firewall):
    """ufw, as it is when it is enabled for the first time."""

    needs, lines = ("ufw", "iptables"), block("examples/nftables/README.md", "ufw allow")
    left = {"ping host 4", "ping host 6", "ping inside 4", "ping outside 4", "ping outside 6"}

    def start(self) -> None:
        shutil.copytree("/etc/ufw", self.folder / "etc/ufw")
        (self.folder / "etc/default").mkdir()
        shutil.copy("/etc/default/ufw", self.folder / "etc/default")
        self.run("ufw", "--force", "reset")
        self.run("ufw", "--force", "enable")

    def reload(self) -> None:
        self.run("ufw", "reload")


class Firewalld(Firewall):
    """firewalld without a configuration, and a bus for it."""

    needs, lines = ("firewalld", "firewall-cmd", "dbus-daemon"), block("examples/nftables/README.md", "firewall-cmd")
    left = {"ping host 4", "ping host 6"}

    def start(self) -> None:
        (self.folder / "etc/firewalld").mkdir()
        shutil.copy("/etc/protocols", self.folder / "etc")
        self.begin("dbus-daemon", "--session", "--nofork", "--address=unix:path=/run/bus")
        wait_for((self.folder / "run/bus").exists, "the bus")
        self.begin("firewalld", "--nofork", "--nopid")
        wait_for(lambda: self.run("firewall-cmd", "--state", check=False).returncode == 0, "firewalld")

    def reload(self) -> None:
        self.run("firewall-cmd", "--reload")


@pytest.fixture(scope="module")
def guests(tmp_path_factory):
    """The guarded host with its guests, on which each firewall is tried."""
    need(*PROGRAMS)
    with contextlib.closing(Host(tmp_path_factory.mktemp("guests"), bridge=False)) as host:
        yield Guests(host)


@pytest.fixture(params=[Docker, Ufw, Firewalld], ids=lambda kind: kind.__name__)
def firewall(request, guests, tmp_path):
    """A firewall that is not started. It ends, and its tables go."""
    need(*request.param.needs)
    tables = guests.tables()
    guests.host.br_netfilter(True)
    firewall = request.param(guests.host, tmp_path)
    yield firewall
    firewall.end()
    guests.host.run("nft", "".join(f"delete {table}\n" for table in guests.tables() - tables))


def test_guests_are_cut_off_until_the_page_s_lines_mend_it(guests, firewall):
    guests.reach(ALL)
    firewall.start()
    guests.reach(firewall.left)
    guests.host.br_netfilter(False)
    guests.reach(firewall.left | BRIDGED)
    guests.host.br_netfilter(True)
    firewall.mend()
    guests.reach(ALL)


@pytest.mark.parametrize("firewall", [Docker], indirect=True)
def test_docker_cuts_nobody_off_where_forwarding_was_on(guests, firewall):
    firewall.start(forwarding="1")
    firewall.run("iptables", "-C", "FORWARD", "-j", "DOCKER-USER")
    guests.reach(ALL)


def test_guard_works_beside_it_and_a_reload_leaves_the_guard_and_the_lines(guests, firewall):
    guests.settle()
    firewall.start()
    assert guests.host.run(*guests.host.applying()).stderr == ""  # the service has nothing to say
    firewall.mend()
    for kind in ("ipv4", "ipv6_gua"):
        test_bridge.test_datagram_from_a_forged_source_does_not_arrive(guests, guests.registered, "bystander", kind)
    guard = guests.guard_s_tables()
    firewall.reload()
    assert guests.guard_s_tables() == guard
    guests.reach(ALL)


def test_lines_for_a_boot_are_those_for_docker():
    drop_in = block("examples/nftables/README.md", "[Service]").removeprefix("[Service]\n")
    assert drop_in.replace("ExecStartPost=", "") == Docker.lines
