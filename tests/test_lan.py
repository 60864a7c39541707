"""Guests on a LAN whose router gives the addresses: what a program at the uplink registers, and what the guard stops.

A switch has the router, two other machines and the host's uplink. The router is dnsmasq, systemd-networkd, or frames.
"""

import contextlib
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import pytest
from attacks import EVERYONE, HOST4, NODES, SERVERS, advertised, arp, bootp, datagram, ip6, octets, scapy, solicited
from conftest import PROGRAMS, lock_held, need
from hypothesis import given
from hypothesis import strategies as st
from lab import DNSMASQ, EXAMPLES, HOST_MAC, TOP, UPDATE, Host, environment, wait_for
from network_lab import leave
from test_clients import CLIENTS as PROGRAMS_OF
from test_clients import NETWORKD, Guest

pytestmark = pytest.mark.slow
SNOOP = EXAMPLES / "lan" / "instances-snoop"
PREFIX, ULA, NEW = "2001:67c:83::", "fd83:5eed::", "2001:67c:84::"
XID = 0xABADCAFE  # as attacks.bootp has it
ROUTER4, PC4, SILENT4, SILENT6 = "10.83.0.254", "10.83.0.50", "10.83.0.51", f"{ULA}51"
DHCP4 = "--dhcp-range=10.83.0.100,10.83.0.199,120"
DHCP6 = f"--dhcp-range={ULA}100,{ULA}1ff,64,120"
SLAAC = f"--dhcp-range={PREFIX},ra-only,64,120"
CLIENTS, RAPID = ("dhclient", "udhcpc", "dhcpcd"), ("dhcpcd", "networkd", "manager")
ROUTERS = {  # the guests' clients, dnsmasq's options, and how addresses begin that are in use
    "DHCPv6": (("dhclient6", "dhcpcd6", "networkd6"), [DHCP6], ["fd83"]),
    "SLAAC": (CLIENTS, [SLAAC], ["2001"]),
    "all": (CLIENTS, [DHCP4, DHCP6, SLAAC], ["10.83", "2001", "fd83"]),
    "rapid": (RAPID, [DHCP4, DHCP6, "--dhcp-rapid-commit"], ["10.83", "fd83"]),
}


class LanHost(Host):
    """A host whose bridge has an uplink, and whose dnsmasq serves names only."""

    def example(self, name: str) -> Path:
        copy = super().example(name)
        copy.write_text(re.sub('define (uplink|server) = "none"', r'define \1 = "up0"', copy.read_text()))
        return copy

    def start_dnsmasq(self, *_, **__) -> None:
        super().start_dnsmasq(config=self.example("lan/lan.conf"))


class Lan:
    def __init__(self, folder: Path):
        for name in ("switch", "host"):
            (folder / name).mkdir()
        self.switch, self.server, self.count = Host(folder / "switch", (), mac="10:66:6a:4c:a1:ff"), None, 0
        self.host = LanHost(folder / "host", (f"{HOST4}/24", f"{PREFIX}1/64", f"{ULA}1/64"))
        self.host.run(*f"ip link add up0 type veth peer name lan0 netns {self.switch.name}".split())
        for node, port in ((self.host, "up0"), (self.switch, "lan0")):
            node.run("ip", "link", "set", port, "master", "br0", "up")
        own = {"router": (ROUTER4, f"{PREFIX}fe", f"{ULA}fe", f"{NEW}fe"), "pc": (PC4, f"{ULA}50")}
        own |= {"silent": (SILENT4, SILENT6)}
        for number, (name, addresses) in enumerate(own.items(), 1):
            machine = self.switch.client(name, f"10:66:6a:4c:a1:0{number}")
            machine.set("net/ipv6/conf/eth0/accept_ra", "0")
            machine.set("net/ipv4/neigh/eth0/locktime", "0")  # what it knows of others it may learn anew at once
            machine.ip(*(f"address add {a}/{64 if ':' in a else 24} dev eth0 nodad" for a in addresses))
        self.router, self.pc, _ = self.switch.clients
        self.host.start_guarded()
        self.host.update("add", self.router.mac, ROUTER4, "router")
        self.host.settle()
        self.start()

    def start(self) -> None:
        """Start the program; return when it listens."""
        for script, long, short in ((UPDATE, "timeout=10", "timeout=2"), (SNOOP, "= 4096, 8, 5 ", "= 4096, 8, 1 ")):
            copy = self.host.folder / script.name  # which waits less long for the lock
            copy.write_text(script.read_text().replace(long, short))
            copy.chmod(0o755)
        env, log = environment(self.host.base), open(self.host.folder / "snoop.log", "w")
        env["PATH"] = f"{self.host.folder}:{env['PATH']}"
        self.process = self.host.start(sys.executable, copy, "up0", env=env, stdout=log, stderr=log)
        wait_for(lambda: " 0003 " in self.host.run("cat", "/proc/net/packet").stdout, "the program")

    def said(self) -> str:
        return (self.host.folder / "snoop.log").read_text()

    def guest(self, silent: bool = False):
        """Return a guest with a MAC address of its own, its kernel silent or not."""
        self.count += 1
        guest = self.host.client(f"guest{self.count}", f"10:66:6a:4c:a2:{self.count:02x}", wait=not silent)
        if silent:
            guest.set("net/ipv6/conf/eth0/disable_ipv6", "1")
            guest.run("ip", "link", "set", "eth0", "arp", "off")
        return guest

    def serve(self, *options: str) -> None:
        """Start the router's dnsmasq, in place of what runs there."""
        self.end_server()
        log, leases = self.router.folder / "log", self.router.folder / "leases"
        fixed = ["--port=0", "--interface=eth0", "--bind-interfaces", "--no-ping", "--dhcp-authoritative"]
        fixed += ["--enable-ra", "--ra-param=eth0,4", f"--dhcp-leasefile={leases}"]
        self.server = self.router.start(*DNSMASQ, *fixed, *options, stderr=log.open("w"))
        wait_for(lambda: "started, version" in log.read_text(), "the router")

    def end_server(self) -> None:
        if self.server in self.router.processes:
            self.router.stop(self.server)

    def prefixes(self) -> str:
        """Return in which prefixes the guard lets guests make addresses."""
        return self.host.run("nft", "list", "set", "bridge", "instances", "instances_prefixes").stdout

    def wait_prefix(self) -> None:
        """Wait for PREFIX: what is announced for the first time is in force a moment after guests hear it."""
        wait_for(lambda: "0x2001067c00830000" in self.prefixes(), "the prefix")

    def close(self) -> None:
        self.host.close()
        self.switch.close()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    need(*PROGRAMS)
    with contextlib.closing(Lan(tmp_path_factory.mktemp("lan"))) as lan:
        yield lan


@pytest.fixture
def lan(network):
    """The LAN, without a server."""
    yield network
    network.end_server()


def in_use(guest, *prefixes: str) -> list[str]:
    """Wait for an address that begins so of each kind, with which the guest reaches the router and the host."""
    others = {"10.83": (ROUTER4, HOST4), "2001": (f"{PREFIX}fe", f"{PREFIX}1"), "fd83": (f"{ULA}fe", f"{ULA}1")}
    for prefix in prefixes:
        wait_for(lambda p=prefix: guest.addresses(p), f"an address {prefix} of {guest.label}")
        guest.wait_pings(*others[prefix])
    return [address for prefix in prefixes for address in guest.addresses(prefix)]


@pytest.mark.parametrize("router", ROUTERS)
def test_guests_are_registered_by_their_own_clients_and_the_lan_s_machines_are_not(lan, router):
    names, options, used = ROUTERS[router]
    need(*(PROGRAMS_OF[name][1] for name in names))
    lan.serve(*options)
    if SLAAC in options:
        lan.wait_prefix()
    guests, machine = [Guest(lan.host, name) for name in names], lan.switch.client("laptop", "10:66:6a:4c:a1:04")
    clients = [machine, *(guest.client for guest in guests)]
    for guest in guests:
        guest.start()
    if "10.83" in used:
        machine.start_dhcp4("laptop")
    try:
        for client in clients:
            kinds = [kind for kind in used if kind != "fd83" or client.label not in ("udhcpc", "laptop")]
            leased = {address for address in in_use(client, *kinds) if not address.startswith("2001")}
            wanted = set() if client is machine else leased
            wait_for(lambda c=client, w=wanted: w <= {*lan.host.registry().get(c.mac, {}).values()}, f"{wanted}")
            entry = lan.host.registry().get(client.mac, {})
            assert {*entry.values()} - {entry.get("ipv6_lla")} == (wanted | {client.label} if wanted else set())
            assert lan.host.drops(client.mac) == {}
    finally:
        for client in clients:  # first, or what it sends meanwhile is dropped, and counted in the next test
            leave(client)
            lan.host.update("--remove", client.mac)


TARGETS = {  # addresses that an attacker wants, and the reasons why its frames are dropped
    "router": (ROUTER4, {"ARP address"}),
    "host": (HOST4, {"ARP address"}),
    "guest": ("", {"ARP address"}),
    "silent machine": (SILENT4, {"not registered"}),
    "router, IPv6": (f"{ULA}fe", {"not registered"}),
    "router, link-local": ("fe80::1266:6aff:fe4c:a101", {"NDP target", "IPv6 source"}),
    "host, IPv6": (f"{ULA}1", {"NDP target", "IPv6 source"}),
    "silent machine, link-local": ("fe80::1266:6aff:fe4c:a103", {"NDP target", "IPv6 source"}),
}


def claims(attacker, address, observer):
    """Return frames in which an attacker says that it has an address, and asks the observer from there."""
    if "." in address:
        return arp(attacker, address, PC4, 2), arp(attacker, address, PC4)
    return advertised(attacker, address), solicited(attacker, address, observer.mac, f"{ULA}50")


def test_guest_takes_nobody_s_address(lan):
    """Neither one with a lease nor a newcomer."""
    leased, newcomer, victim, pc, host = lan.guest(silent=True), lan.guest(silent=True), lan.guest(), lan.pc, lan.host
    lease(lan, leased)
    lan.serve(DHCP4)
    victim.dhcp4()
    host.settle()
    for attacker, (target, (address, reasons)) in itertools.product((leased, newcomer), TARGETS.items()):
        address = address or victim.addresses("10.83")[0]
        place = f"{address}%eth0" if address.startswith("fe80") else address
        for frame in claims(attacker, address, pc):
            pc.wait_pings(place)
            owner = pc.neighbour(address)
            host.run("nft", "flush", "set", "bridge", "instances", "instances_dropped")
            attacker.send(*3 * [bytes(frame)])
            wait_for(lambda mac=attacker.mac: host.dropped(mac) == 3, f"drops: {target}: {frame.summary()}")
            assert {why for _, why in host.drops(attacker.mac)} <= reasons
            assert pc.neighbour(address) == owner != attacker.mac, target
            host.take_out("instances_verdict")
            taken = f"an effect: {frame.summary()}"
            wait_for(lambda a=attacker, f=bytes(frame), ip=address: a.send(f) or pc.neighbour(ip) == a.mac, taken)
            host.run("nft", "add rule bridge instances instances_verdict drop")
            for machine in (pc, host):
                machine.run("ip", "neighbour", "flush", "all")


def advertisement(sender, prefix=NEW, **fields):
    option = scapy.ICMPv6NDOptPrefixInfo(**{"prefix": prefix, "prefixlen": 64} | fields)
    return ip6(sender, NODES, "ff02::1") / scapy.ICMPv6ND_RA(routerlifetime=1800) / scapy.ICMPv6NDOptMTU() / option


def answer(sender, mac, address, seconds=120, kind="ack", ip="255.255.255.255", to=EVERYONE, options=(), **fields):
    """Return a DHCP server's answer to what bootp asks."""
    frame = scapy.Ether(src=sender.mac, dst=to) / scapy.IP(src=ROUTER4, dst=ip) / scapy.UDP(sport=67, dport=68)
    frame /= scapy.BOOTP(op=2, chaddr=octets(mac), yiaddr=address, **{"xid": XID} | fields)
    listed = [("message-type", kind)] if kind else []
    listed += [("server_id", ROUTER4)] + ([("lease_time", seconds)] if seconds else [])
    return frame / scapy.DHCP(options=[*listed, *options, "end"])


def test_guest_is_no_router_and_no_server(lan):
    """Nor is anything registered or learned from what it sends."""
    attacker, other = lan.guest(silent=True), lan.guest(silent=True)
    other.send(bytes(bootp(other, "request")))
    prefixes, registry = lan.prefixes(), lan.host.registry()
    attacker.send(bytes(advertisement(attacker, "2001:67c:86::")), bytes(answer(attacker, other.mac, "10.83.0.77")))
    for reason in ("router message", "IPv4 source"):
        wait_for(lambda why=reason: lan.host.dropped(attacker.mac, why) == 1, reason)
    lease(lan, attacker)
    assert lan.prefixes() == prefixes and lan.host.registry().keys() == {*registry, attacker.mac}


def ask(lan, guest, address="", seconds=120):
    """Have a guest ask, and the router answer; return the address."""
    address = address or f"10.83.0.{200 + lan.count}"
    guest.send(bytes(bootp(guest, "request")))
    lan.router.send(bytes(answer(lan.router, guest.mac, address, seconds)))
    return address


def lease(lan, guest, *terms):
    """The same; return when the address is registered."""
    address = ask(lan, guest, *terms)
    wait_for(lambda: lan.host.registry().get(guest.mac, {}).get("ipv4") == address, f"{address} registered")


def test_lease_is_taken_from_another_guest_only_when_it_must_be_over(lan):
    """Servers lease an address to another MAC address if that repeats the client's identifier."""
    first, second = lan.guest(silent=True), lan.guest(silent=True)
    lan.host.stop(lan.process)
    lan.start()
    before = time.monotonic()
    lease(lan, first, "10.83.0.60", 5)

    def leased():
        lan.host.run("nft", "flush set bridge instances instances_asked")  # or it would be asked once in 6 s
        ask(lan, second, "10.83.0.60", 5)
        return lan.host.registry().get(second.mac, {}).get("ipv4")

    wait_for(lambda: leased() or "10.83.0.60 is not registered" in lan.said(), "a refusal")
    assert "ipv4" not in lan.host.registry()[second.mac]
    wait_for(lambda: leased(), "the lease after the other's")
    assert time.monotonic() - before > 5 and "ipv4" not in lan.host.registry()[first.mac]


def test_client_identifier_of_another_guest_takes_nothing_from_it(lan):
    """Also if the router goes by it, as all do by default."""
    lan.serve(DHCP4)
    victim, attacker = lan.guest(), lan.guest()
    for guest in (victim, attacker):
        command = ["udhcpc", "-C", "-i", "eth0", "-s", guest.script, "-x", f"0x3d:01{victim.mac.replace(':', '')}"]
        guest.start(*command, "-f", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda g=guest: "bound" in g.events(), "the lease")
        lan.host.settle()
    address = victim.addresses("10.83")[0]
    assert attacker.addresses("10.83") == [address]
    wait_for(lambda: f"{address} is not registered" in lan.said(), "the refusal")
    assert lan.host.registry()[victim.mac]["ipv4"] == address
    assert victim.pings(HOST4) and victim.pings(PC4) and not attacker.pings(HOST4)
    assert lan.host.dropped(attacker.mac, "ARP address")


def test_lease_of_a_time_without_the_program_is_registered_when_it_is_renewed(lan):
    """The guard lets a renewal through, since the router is registered."""
    lan.serve(DHCP4)
    lan.host.stop(lan.process)
    guest = lan.guest()
    guest.start_dhcp4("late")
    wait_for(lambda: "bound" in guest.events(), "the lease")
    address = guest.addresses("10.83")[0]
    assert guest.pings(HOST4) and guest.mac not in lan.host.registry()
    lan.host.run("nft", "flush", "set", "bridge", "instances", "instances_leased")  # five minutes later
    assert not guest.pings(HOST4)
    lan.start()
    renewal = bootp(guest, "request", ("hostname", b"late"), ciaddr=address)
    renewal.dst, renewal[scapy.IP].src, renewal[scapy.IP].dst = lan.router.mac, address, ROUTER4
    guest.send(bytes(renewal))
    wait_for(lambda: lan.host.registry().get(guest.mac, {}).get("ipv4") == address, "its renewal")
    assert lan.host.registry()[guest.mac]["name"] == "late"
    wait_for(lambda: guest.pings(HOST4), "the host")


def test_guests_use_addresses_in_a_new_prefix_and_in_the_former_one(lan):
    lan.serve(SLAAC)
    guest = lan.guest()
    old = wait_for(lambda: guest.addresses(PREFIX[:-1]), "an address")[0]
    lan.serve(SLAAC.replace(PREFIX, NEW))
    new = wait_for(lambda: guest.addresses(NEW[:-1]), "an address with the new prefix")[0]
    for source, router in ((new, f"{NEW}fe"), (old, f"{PREFIX}fe")):
        ping = ("ping", "-nc1", "-W0.2", "-I", source, router)
        wait_for(lambda ping=ping: guest.run(*ping, check=False).returncode == 0, f"an answer to {source}")
    assert "0x2001067c00830000" in lan.prefixes() and "0x2001067c00840000" in lan.prefixes()


def test_new_address_of_the_host_is_registered_and_a_former_one_is_not(lan):
    for verb, there in (("add", True), ("delete", False)):
        lan.host.run("ip", "address", verb, "10.83.0.9/24", "dev", "br0")
        wait_for(lambda t=there: ("'10.83.0.9'" in str(lan.host.registry()[HOST_MAC])) == t, f"{verb} the address")
    assert lan.host.registry()[HOST_MAC]["name"] == "host"


def test_lease_is_not_lost_while_the_registry_is_locked(lan):
    guest = lan.guest(silent=True)
    with lock_held(lan.host.base):
        ask(lan, guest)
        wait_for(lambda: f"{lan.host.base}.lock" in lan.said(), "an error")
    wait_for(lambda: "ipv4" in lan.host.registry().get(guest.mac, {}), "the lease")


def test_program_says_why_it_does_not_start(lan):
    lan.host.ip("link add br1 type bridge", "link add p1 type veth peer name p2", "link set p1 master br1 up")
    for interface, error in (("none", "none"), ("lo", "lo"), ("br1", "br1 host"), ("p1", "br1 host")):
        result = lan.host.run(sys.executable, SNOOP, interface, env=environment(lan.host.base), check=False)
        assert result.returncode == 1 and re.fullmatch(f"instances-snoop: error: .*{error}.*\n", result.stderr)


def test_program_hears_no_other_frames(lan):
    calls = lan.host.folder / "calls"
    tracing = lan.host.start("strace", "-p", str(lan.process.pid), "-o", calls, "-e", "trace=recvfrom")

    def heard():
        return calls.read_text().count("recvfrom(") if calls.exists() else 0

    wait_for(lambda: lan.router.send(bytes(advertisement(lan.router, PREFIX))) or heard(), "strace")
    lan.router.send(*500 * [bytes(datagram(lan.router, ROUTER4, HOST4, dport=53))])
    lan.router.send(bytes(advertisement(lan.router, "2001:67c:85::")))
    wait_for(lambda: "2001:67c:85:" in lan.said(), "the advertisement behind them")
    assert heard() < 100
    lan.host.stop(tracing)
    lease(lan, lan.guest(silent=True))


def test_networkd_is_a_router_too(lan):
    need(NETWORKD)
    config = lan.router.folder / "networkd"
    config.mkdir()
    lan.router.run("ip", "address", "flush", "dev", "eth0", "to", f"{ROUTER4}/24")  # or it would configure it for ever
    text = f"[Match]\nName=eth0\n[Network]\nKeepConfiguration=static\nAddress={ROUTER4}/24\nIPv6AcceptRA=no\n"
    text += "DHCPServer=yes\nIPv6SendRA=yes\n[DHCPServer]\nPoolOffset=20\nPoolSize=20\n"  # no other guest has any
    text += f"PersistLeases=no\n[IPv6Prefix]\nPrefix={PREFIX}/64\n"  # or a newer one waits for a unit of the system's
    (config / "eth0.network").write_text(text)
    commands = "mount -t tmpfs none /run; mkdir -p /run/systemd/network; mount --bind $0 /run/systemd/network"
    commands += f"; mount -o remount,ro /sys; SYSTEMD_LOG_TARGET=console exec {NETWORKD}"
    with open(lan.router.folder / "networkd.log", "w") as log:
        lan.server = lan.router.start("unshare", "--mount", "sh", "-ec", commands, config, stdout=log, stderr=log)
    lan.wait_prefix()
    guest = lan.guest()
    guest.dhcp4("web")
    in_use(guest, "10.83", "2001")
    assert lan.host.drops(guest.mac) == {}


# ---- What is read of a frame ----

MAC, ADDRESS = "10:66:6a:4c:a1:11", "10.83.0.77"
GUEST, SERVER = SimpleNamespace(mac=MAC), SimpleNamespace(mac="10:66:6a:4c:a1:01")


@pytest.fixture(scope="module")
def snoop():
    """The program, whose main is not run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{TOP}:{os.environ['PATH']}")
        return SimpleNamespace(**run_path(str(SNOOP)))


def reply(message=scapy.DHCP6_Reply, source="fe80::1", destination="fe80::2", addresses=(f"{ULA}77",), mac=MAC):
    """Return a DHCPv6 server's answer, with an association for each address."""
    packet = ip6(SERVER, mac, destination, source) / scapy.UDP(sport=547, dport=546)
    packet /= message(trid=7) / scapy.DHCP6OptClientId(duid=scapy.Raw(b"\0\3\0\1" + octets(MAC)))
    for number, address in enumerate(addresses):
        listed = [scapy.DHCP6OptIAAddress(addr=address, preflft=60, validlft=120)]
        packet /= scapy.DHCP6OptIA_NA(iaid=number, T1=30, T2=60, ianaopts=listed)
    return packet


def request6(message=scapy.DHCP6_Request):
    """Return a client's DHCPv6 message with its name (RFC 4704)."""
    packet = ip6(GUEST, SERVERS, "ff02::1:2") / scapy.UDP(sport=546, dport=547) / message(trid=7)
    return packet / scapy.Raw(b"\0\x27\0\x0e" + b"\0\3web\7example\0")


def ack(mac=MAC, address=ADDRESS, **fields):
    return answer(SERVER, mac, address, **fields)


NAMED, LONG = ("hostname", b"web"), ("hostname", b"web.example.org")
REQUEST, LEASE, WEB, WEB6 = bootp(GUEST, "request"), ("", ADDRESS), ("web", ADDRESS), ("web", f"{ULA}77")
HEARD = {  # what was asked, what the answers to it are, and the leases that makes: name and address
    "acknowledged": (REQUEST, [ack()], [LEASE]),
    "to its own address": (REQUEST, [ack(ip=ADDRESS, to=MAC)], [LEASE]),
    "by two servers": (bootp(GUEST, "discover"), [ack(), ack(address="10.83.0.78")], [LEASE]),
    "by a relay agent": (REQUEST, [ack(giaddr=ROUTER4)], [LEASE]),
    "offered": (bootp(GUEST, "discover"), [ack(kind="offer")], []),
    "refused": (REQUEST, [ack(kind="nak", address="0.0.0.0")], []),
    "informed": (bootp(GUEST, "inform"), [ack()], []),
    "informed, after a request": (REQUEST, [ack(seconds=0)], []),
    "BOOTP": (bootp(GUEST, ""), [ack(kind="")], []),
    "released": (bootp(GUEST, "release"), [ack()], []),
    "another transaction": (REQUEST, [ack(xid=1)], []),
    "another client": (REQUEST, [ack(SERVER.mac)], []),
    "asked in another's name": (bootp(GUEST, "request", chaddr=SERVER.mac), [ack(SERVER.mac)], []),
    "routed": (REQUEST, [ack(ip="10.83.0.66", to=MAC)], []),
    "routed to its owner": (REQUEST, [ack(ip=ADDRESS, to=SERVER.mac)], []),
    "host name": (bootp(GUEST, "request", NAMED), [ack()], [WEB]),
    "host name with a domain": (bootp(GUEST, "request", LONG), [ack()], [WEB]),
    "host name with an end": (bootp(GUEST, "request", ("hostname", b"web\0")), [ack()], [WEB]),
    "full name": (bootp(GUEST, "request", (81, b"\1\0\0web.example.org")), [ack()], [WEB]),
    "encoded name": (bootp(GUEST, "request", (81, b"\5\0\0\3web\7example\0")), [ack()], [WEB]),
    "empty names": (bootp(GUEST, "request", ("hostname", b""), (81, b"")), [ack()], [LEASE]),
    "both names": (bootp(GUEST, "request", NAMED, (81, b"\1\0\0db")), [ack()], [WEB]),
    "name by the server": (bootp(GUEST, "request", ("hostname", b"db")), [ack(options=[LONG])], [WEB]),
    "two addresses": (request6(), [reply(addresses=(f"{ULA}77", f"{PREFIX}77"))], [WEB6, ("web", f"{PREFIX}77")]),
    "rapid commit": (request6(scapy.DHCP6_Solicit), [reply()], [WEB6]),
    "renewed": (request6(scapy.DHCP6_Renew), [reply()], [WEB6]),
    "without an address": (request6(), [reply(addresses=())], []),
    "advertised": (request6(scapy.DHCP6_Solicit), [reply(scapy.DHCP6_Advertise)], []),
    "confirmed": (request6(scapy.DHCP6_Confirm), [reply()], []),
    "routed, IPv6": (request6(), [reply(source=f"{PREFIX}fe", destination=f"{PREFIX}66")], []),
    "another client, IPv6": (request6(), [reply(mac=SERVER.mac)], []),
}


@pytest.mark.parametrize("case", HEARD)
def test_answer_is_a_lease_only_to_who_asked_for_it(snoop, case):
    (request, answers, leases), asked = HEARD[case], {}
    assert snoop.hear(bytes(request), True, asked) == []
    found = [row for frame in answers for row in snoop.hear(bytes(frame), False, asked)]
    assert found == [(MAC, address, name, 120) for name, address in leases]
    assert not any(snoop.hear(bytes(frame), False, {}) for frame in answers)  # nobody has asked


FRAMES = [bytes(frame) for request, answers, _ in HEARD.values() for frame in (request, *answers)]
FRAMES += [bytes(advertisement(SERVER))]


@given(st.data())
def test_no_frame_ends_it(snoop, tmp_path_factory, data):
    """Random octets, or octets of a sound frame exchanged."""
    frame = bytearray(data.draw(st.sampled_from(FRAMES) | st.binary(max_size=400)))
    for at, octet in data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8)):
        frame[at : at + 1] = bytes([octet])
    frame = bytes(frame[: data.draw(st.integers(0, 500))])
    asked = {octets(MAC) + transaction: "" for transaction in (XID.to_bytes(4), b"\0\0\7")}
    for asks in (False, True):
        for mac, ip, name, seconds in snoop.hear(frame, asks, asked):
            assert snoop.update.is_mac(mac) and snoop.update.parse_address(ip) and seconds > 0 and isinstance(name, str)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSTANCES_BASE_PATH", str(tmp_path_factory.getbasetemp() / "frames"))
        snoop.learn(frame)


def test_prefixes_of_an_advertisement(snoop, base, monkeypatch):
    """Those of 64 bits in which addresses are made; those of before stay, up to eight."""
    monkeypatch.setenv("INSTANCES_BASE_PATH", str(base))

    def learned(prefix, **fields):
        snoop.learn(bytes(advertisement(SERVER, prefix, **fields)))
        path = Path(f"{base}.prefixes")
        return path.read_text().split() if path.exists() else []

    assert not any(learned(PREFIX, **fields) for fields in ({"A": 0}, {"prefixlen": 80}, {"validlifetime": 0}))
    assert not any(map(learned, ("fe80::", "ff05::", "2001:db8::")))
    assert not Path(f"{base}.updated").exists()
    assert learned(PREFIX) == [f"{PREFIX}/64"] and Path(f"{base}.updated").exists()
    for number in range(1, 10):
        learned(f"fd00:{number}::")
    assert learned(ULA) == [f"{ULA}/64", *(f"fd00:{number}::/64" for number in range(9, 2, -1))]
