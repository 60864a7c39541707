"""Attacks on the bridge, with the guard and without it, and what must go on working with it.

Each attack is sent without the guard first, where its effect is seen, and then with it, where it is dropped and
counted and has no effect: by a client with a lease of its own, and by one that is not registered. The guard was loaded
before the bridge was made, as after a boot, and br_netfilter, where there is one, takes what the bridge forwards to the
hooks of IP and ARP.
"""

import contextlib
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from attacks import ATTACKERS, EVERYONE, HOST_LLA, gives_up, hearing, packed, scapy
from conftest import PROGRAMS, need
from lab import Client, Host, wait_for

pytestmark = pytest.mark.slow
FAR = "2001:67c:99::1"  # an address beyond the router
LEARNED = ("dropped", "asked", "asked6", "joining", "leased", "claims", "claimed", "claiming")


class Bridge:
    """A host whose bridge has a victim, a bystander, an attacker with a lease and one without."""

    def __init__(self, host: Host, rules: Path):
        self.host, self.rules = host, rules
        host.set("net/ipv6/conf/all/forwarding", "1")
        host.update("--initialize", "br0", "host")
        host.start_dnsmasq()
        names = ("victim", "bystander", "registered", "unregistered")
        clients = [host.client(name, f"10:66:6a:4c:a1:1{number}") for number, name in enumerate(names)]
        self.victim, self.bystander, self.registered, self.unregistered = clients
        for client in clients[:3]:
            client.start_dhcp4(client.label)
            client.start_dhcp6()
        for client in clients[:3]:
            client.wait_registered("bound 10.8", "BOUND6 2001", "BOUND6 fd83")
        self.unregistered.run("ip", "address", "add", "10.83.0.66/24", "dev", "eth0")
        self.unregistered.run("ip", "address", "add", "2001:67c:83::66/80", "dev", "eth0", "nodad")
        host.process()
        for client in clients:
            wait_for(lambda c=client: HOST_LLA in self.gateways(c), "a route by dnsmasq's router advertisement")

    def guard(self, on: bool) -> None:
        """Load the guard as it is now, or take its rules away: its hooks stay, in the order that they came in."""
        lines = [f'include "{self.rules}"']
        lines += [f"flush set bridge instances instances_{name}" for name in (LEARNED if on else ())]
        lines += [f"flush chain bridge instances at_{hook}" for hook in (() if on else ("prerouting", "forward"))]
        self.host.run("nft", "-f", "-", input="\n".join(lines))

    def gateways(self, client: Client | None = None) -> str:
        """Return a client's default routes, the bystander's if none is given."""
        return (client or self.bystander).run("ip", "-6", "route", "show", "default").stdout

    def is_dropped(self, attacker, frame, effect, reason: str) -> None:
        """Check that three frames are dropped for this reason, and have no effect, if given."""
        before = self.host.dropped(frame.src, reason)
        attacker.send(*3 * [bytes(frame)])
        wait_for(lambda: self.host.dropped(frame.src, reason) >= before + 3, f"three drops: {reason}")
        assert effect is None or not effect()


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    need(*PROGRAMS)
    host = Host(tmp_path_factory.mktemp("bridge"), bridge=False)
    try:
        Path(f"{host.base}.updated").touch()
        host.process()
        rules = host.example("nftables/bridge.nft")
        host.run("nft", "-f", rules)
        host.run("nft", "table inet other { chain c { type filter hook forward priority filter; counter; }; }")
        host.make_bridge()
        host.br_netfilter(True)
        yield Bridge(host, rules)
    finally:
        host.close()


def addresses(node) -> dict[str, str]:
    """Return a client's or the host's addresses, by how they begin."""
    if isinstance(node, Host):
        return {"10": "10.83.0.1", "2001": "2001:67c:83::1", "fe80": HOST_LLA}
    return {prefix: node.addresses(prefix)[0] for prefix in ("10", "2001", "fe80")}


def advertisement(attacker, target, stolen, header=None):
    """Return an unasked neighbour advertisement of a stolen address, behind an extension header if given."""
    ip = scapy.Ether(src=attacker.mac, dst=target.mac) / scapy.IPv6(
        src=addresses(attacker)["fe80"], dst=addresses(target)["fe80"], hlim=255
    )
    claim = scapy.ICMPv6ND_NA(tgt=stolen, R=0, S=1, O=1) / scapy.ICMPv6NDOptDstLLAddr(lladdr=attacker.mac)
    if header is None:
        return ip / claim
    # 24 octets with an unknown option, which is skipped (RFC 8200, section 4.2). Its last 16 are octets 48 to
    # 63 of the packet, where a check at a fixed offset looks for the target: an address of its own.
    own = packed(addresses(attacker)["fe80"])
    return ip / header(nh=58, options=[scapy.HBHOptUnknown(otype=0x1E, optlen=20, optdata=bytes(4) + own)]) / claim


def arp(attacker, target, stolen, operation, asked, destination):
    """Return an ARP packet that says that the attacker has a stolen address."""
    frame = scapy.Ether(src=attacker.mac, dst=destination)
    return frame / scapy.ARP(op=operation, hwsrc=attacker.mac, psrc=stolen, hwdst=target.mac, pdst=asked)


def solicitation(attacker, target, stolen, destination):
    """Return a neighbour solicitation that says that the attacker has a stolen address."""
    ip = scapy.Ether(src=attacker.mac, dst=target.mac) / scapy.IPv6(src=stolen, dst=destination, hlim=255)
    return ip / scapy.ICMPv6ND_NS(tgt=destination) / scapy.ICMPv6NDOptSrcLLAddr(lladdr=attacker.mac)


def router_solicitation(attacker, target, stolen):
    """Return a router solicitation that says that the attacker has a stolen address."""
    ip = scapy.Ether(src=attacker.mac, dst=target.mac) / scapy.IPv6(src=stolen, dst=HOST_LLA, hlim=255)
    return ip / scapy.ICMPv6ND_RS() / scapy.ICMPv6NDOptSrcLLAddr(lladdr=attacker.mac)


POISON = {  # what: (the reason of its drop, beginning of the stolen address, packet)
    "ARP reply": ("ARP address", "10", lambda a, t, s: arp(a, t, s, 2, addresses(t)["10"], t.mac)),
    "ARP request": ("ARP address", "10", lambda a, t, s: arp(a, t, s, 1, addresses(t)["10"], EVERYONE)),
    "gratuitous ARP": ("ARP address", "10", lambda a, t, s: arp(a, t, s, 1, s, EVERYONE)),
    "advertisement": ("NDP target", "2001", advertisement),
    "advertisement of a link-local address": ("NDP target", "fe80", advertisement),
    "advertisement behind destination options": (
        "NDP target",
        "2001",
        lambda a, t, s: advertisement(a, t, s, scapy.IPv6ExtHdrDestOpt),
    ),
    "advertisement behind hop-by-hop options": (
        "NDP target",
        "2001",
        lambda a, t, s: advertisement(a, t, s, scapy.IPv6ExtHdrHopByHop),
    ),
    "solicitation": ("IPv6 source", "2001", lambda a, t, s: solicitation(a, t, s, addresses(t)["2001"])),
    "solicitation from a link-local address": (
        "IPv6 source",
        "fe80",
        lambda a, t, s: solicitation(a, t, s, addresses(t)["fe80"]),
    ),
    "router solicitation": ("IPv6 source", "fe80", router_solicitation),
    "router solicitation from a global address": ("IPv6 source", "2001", router_solicitation),
}


# Only a router takes router solicitations: the kernel of a bystander resists by itself
TARGETS = [(a, t) for a in POISON for t in ("host", "bystander") if t == "host" or not a.startswith("router")]


@pytest.mark.parametrize("who", ATTACKERS)
@pytest.mark.parametrize(("attack", "where"), TARGETS)
def test_neighbour_cache_is_not_poisoned(bridge, attack, where, who):
    attacker, target, (reason, prefix, packet) = getattr(bridge, who), getattr(bridge, where), POISON[attack]
    device = "br0" if where == "host" else "eth0"
    stolen = addresses(bridge.victim)[prefix]
    frame = packet(attacker, target, stolen)

    def learn():
        target.run("ip", "neighbour", "flush", "dev", device)
        zone = f"%{device}" if prefix == "fe80" else ""
        target.run("ping", "-n", "-c", "1", "-W", "5", f"{stolen}{zone}")
        assert target.neighbour(stolen) == bridge.victim.mac

    def poisoned():
        return target.neighbour(stolen) == attacker.mac

    bridge.guard(False)
    learn()
    wait_for(lambda: attacker.send(bytes(frame)) or poisoned(), "an effect without the guard")
    bridge.guard(True)
    learn()
    bridge.is_dropped(attacker, frame, poisoned, reason)


@pytest.mark.parametrize("who", ATTACKERS)
def test_router_advertisement_makes_no_route(bridge, who):
    # The host is no target: as a router it takes no advertisement by itself
    attacker, target = getattr(bridge, who), bridge.bystander
    own = addresses(attacker)["fe80"]
    ip = scapy.Ether(src=attacker.mac, dst="33:33:00:00:00:01") / scapy.IPv6(src=own, dst="ff02::1", hlim=255)
    frame = ip / scapy.ICMPv6ND_RA(routerlifetime=600) / scapy.ICMPv6NDOptSrcLLAddr(lladdr=attacker.mac)
    bridge.guard(False)
    wait_for(lambda: attacker.send(bytes(frame)) or own in bridge.gateways(), "a route without the guard")
    target.run("ip", "-6", "route", "delete", "default", "via", own, "dev", "eth0")
    bridge.guard(True)
    bridge.is_dropped(attacker, frame, lambda: own in bridge.gateways(), "router message")


@pytest.mark.parametrize("who", ATTACKERS)
def test_redirect_changes_no_route(bridge, who):
    # A client takes it from its router's address only; the host, being a router, takes none by itself
    attacker, target = getattr(bridge, who), bridge.bystander
    own = addresses(attacker)["fe80"]
    ip = scapy.Ether(src=attacker.mac, dst=target.mac)
    ip /= scapy.IPv6(src=HOST_LLA, dst=addresses(target)["fe80"], hlim=255)
    redirect = scapy.ICMPv6ND_Redirect(tgt=own, dst=FAR) / scapy.ICMPv6NDOptDstLLAddr(lladdr=attacker.mac)

    def redirected():
        return own in target.run("ip", "-6", "route", "get", FAR).stdout

    bridge.guard(False)
    wait_for(lambda: attacker.send(bytes(ip / redirect)) or redirected(), "a redirect without the guard")
    target.run("ip", "-6", "route", "flush", "cache")
    assert not redirected()
    bridge.guard(True)
    bridge.is_dropped(attacker, ip / redirect, redirected, "IPv6 source")
    own_source = scapy.Ether(src=attacker.mac, dst=target.mac) / scapy.IPv6(src=own, dst=ip[scapy.IPv6].dst, hlim=255)
    bridge.is_dropped(attacker, own_source / redirect, redirected, "router message")


@pytest.mark.parametrize("who", ATTACKERS)
@pytest.mark.parametrize("where", ["host", "bystander"])
@pytest.mark.parametrize("prefix", ["10", "2001"])
def test_datagram_from_a_forged_source_does_not_arrive(bridge, prefix, where, who):
    attacker, target = getattr(bridge, who), getattr(bridge, where)
    ip = scapy.IP if prefix == "10" else scapy.IPv6
    header = ip(src=addresses(bridge.victim)[prefix], dst=addresses(target)[prefix])
    frame = scapy.Ether(src=attacker.mac, dst=target.mac) / header / scapy.UDP(sport=5000, dport=5000)
    with hearing(target) as heard:
        bridge.guard(False)
        wait_for(lambda: attacker.send(bytes(frame / b"open")) or "open" in heard(), "a forged datagram")
        bridge.guard(True)
        reason = "IPv4 source" if prefix == "10" else "IPv6 source"
        bridge.is_dropped(attacker, frame / b"guarded", lambda: "guarded" in heard(), reason)
        honest = frame / b"honest"
        honest.src = bridge.victim.mac
        wait_for(lambda: bridge.victim.send(bytes(honest)) or "honest" in heard(), "an honest datagram")
        assert "guarded" not in heard()


@contextlib.contextmanager
def rogue_server(bridge, attacker, ports):
    """In place of the host's DHCP server, have one of the attacker's that answers from these ports."""
    ranges = ("10.83.0.210,10.83.0.219", "2001:67c:83::300,2001:67c:83::3ff,80")
    own = attacker.addresses("2001")[0]
    attacker.run("ip", "address", "flush", "dev", "eth0", "to", own)
    attacker.run("ip", "address", "add", f"{own}/80", "dev", "eth0", "nodad")
    for server, port in zip((67, 547), ports):
        rule = f"udp sport {server} udp sport set {port}"
        attacker.run(
            "nft", f"add table inet p{server}; add chain inet p{server} c {{ type filter hook output priority 0; }}"
        )
        attacker.run("nft", f"add rule inet p{server} c {rule}")
    options = ["--conf-file=/dev/null", "-k", "--user=root", "--port=0", "--interface=eth0", "--pid-file", "--no-ping"]
    options += ["--dhcp-authoritative", "--dhcp-leasefile=/dev/null", "--leasefile-ro", "--log-facility=-"]
    bridge.host.stop(bridge.host.dnsmasq)
    log = bridge.host.folder / "rogue.log"
    with open(log, "w") as file:
        server = attacker.start(
            "dnsmasq", *options, *(f"--dhcp-range={r},120" for r in ranges), stdout=file, stderr=file
        )
    try:
        wait_for(lambda: "started" in log.read_text(), "the rogue server")
        yield log
    finally:
        attacker.stop(server)
        attacker.run("nft", "flush", "ruleset")
        bridge.host.start_dnsmasq()


@pytest.mark.parametrize("ports", [(67, 547), (6767, 6547)])
@pytest.mark.parametrize("who", ATTACKERS)
def test_rogue_server_gives_no_lease(bridge, who, ports):
    attacker, host = getattr(bridge, who), bridge.host
    number = 2 * ATTACKERS.index(who) + (ports[0] == 67)
    clients = [host.client(f"new{n}-{number}", f"10:66:6a:4c:b{n}:0{number}") for n in range(2)]
    with rogue_server(bridge, attacker, ports) as log:
        bridge.guard(False)
        clients[0].start_dhcp4()
        clients[0].start_dhcp6()
        wait_for(lambda: "bound 10.83.0.21" in clients[0].events(), "a rogue IPv4 lease without the guard")
        wait_for(lambda: "BOUND6 2001:67c:83::3" in clients[0].events(), "a rogue IPv6 lease without the guard")
        bridge.guard(True)
        host.take_out("at_forward", "instances_drop_request")  # or the server is never asked
        for start, reply in ((clients[1].start_dhcp4, "DHCPOFFER"), (clients[1].start_dhcp6, "DHCPADVERTISE")):
            told, before = log.read_text().count(reply), host.dropped(attacker.mac, "DHCP server")
            start()
            wait_for(lambda r=reply, t=told: log.read_text().count(r) > t, f"{reply} of the rogue")
            wait_for(lambda b=before: host.dropped(attacker.mac, "DHCP server") > b, f"the drop of {reply}")
        assert "bound" not in clients[1].events().lower()
    wait_for(lambda: "bound 10.83" in clients[1].events(), "a lease of the host's own server")


def claim(attacker, mac, address):
    """Return an ARP request of a sender that says to have this MAC and this IPv4 address."""
    frame = scapy.Ether(src=attacker.mac, dst=EVERYONE)
    return frame / scapy.ARP(op=1, hwsrc=mac, psrc=address, hwdst=EVERYONE, pdst="10.83.0.1")


def probe(attacker, address):
    """Return an ARP probe for an address (RFC 5227)."""
    frame = scapy.Ether(src=attacker.mac, dst=EVERYONE)
    return frame / scapy.ARP(op=1, hwsrc=attacker.mac, psrc="0.0.0.0", hwdst="00:00:00:00:00:00", pdst=address)


def advertised(attacker, target):
    """Return a neighbour advertisement of any target, from an address of one's own."""
    ip = scapy.Ether(src=attacker.mac, dst="33:33:00:00:00:01")
    ip /= scapy.IPv6(src=addresses(attacker)["fe80"], dst="ff02::1", hlim=255)
    return ip / scapy.ICMPv6ND_NA(tgt=target, R=0, S=0, O=1) / scapy.ICMPv6NDOptDstLLAddr(lladdr=attacker.mac)


def inform(attacker, **fields):
    """Return a DHCP message of one's own but for these fields."""
    ip = scapy.Ether(src=attacker.mac, dst=EVERYONE) / scapy.IP(src="0.0.0.0", dst="255.255.255.255")
    message = scapy.BOOTP(chaddr=bytes.fromhex(attacker.mac.replace(":", "")), **fields)
    return ip / scapy.UDP(sport=68, dport=67) / message / scapy.DHCP(options=[("message-type", "inform"), "end"])


def message6(attacker, kind):
    """Return a DHCPv6 message of a type, with nothing in it."""
    ip = scapy.Ether(src=attacker.mac, dst="33:33:00:01:00:02")
    ip /= scapy.IPv6(src=addresses(attacker)["fe80"], dst="ff02::1:2")
    return ip / scapy.UDP(sport=546, dport=547) / bytes([kind, 0, 0, 7])


CLIENTS = (1, 3, 4, 5, 11)  # Solicit, Request, Confirm, Renew, Information-request
CLOSE = {  # what is let through but for one field: (the reason of its drop, frame)
    "ARP with another's hardware address": ("ARP address", lambda a, v: claim(a, v.mac, addresses(a)["10"])),
    "ARP with another's addresses": ("ARP address", lambda a, v: claim(a, v.mac, addresses(v)["10"])),
    "ARP probe for another's address": ("ARP address", lambda a, v: probe(a, addresses(v)["10"])),
    "advertisement of another prefix": ("not registered", lambda a, v: advertised(a, "fd83:99::1266:6aff:fe4c:a112")),
    "advertisement of another subnet": ("not registered", lambda a, v: advertised(a, "fe80:0:0:1:1266:6aff:fe4c:a112")),
    "advertisement without the bit flipped": ("NDP target", lambda a, v: advertised(a, "fe80::1066:6aff:fe4c:a112")),
    "advertisement of another first half": ("NDP target", lambda a, v: advertised(a, "fe80::1266:6bff:fe4c:a112")),
    "advertisement of another second half": ("NDP target", lambda a, v: advertised(a, "fe80::1266:6aff:fe4c:a113")),
    "DHCP of another kind of hardware": ("DHCP message", lambda a, v: inform(a, htype=6)),
    "DHCP of another length": ("DHCP message", lambda a, v: inform(a, hlen=16)),
    "DHCP of a server": ("DHCP message", lambda a, v: inform(a, op=2)),
    "DHCP by a relay agent": ("DHCP message", lambda a, v: inform(a, giaddr=addresses(a)["10"])),
    **{
        f"DHCPv6 message {kind}": ("DHCP message", lambda a, v, k=kind: message6(a, k))
        for kind in (0, 2, 6, 7, 8, 9, 10, 12, 13, 14, 255)
    },
}
OWN = {  # the same without that
    "ARP": lambda a, v: claim(a, a.mac, addresses(a)["10"]),
    "ARP probe": lambda a, v: probe(a, addresses(a)["10"]),
    "advertisement": lambda a, v: advertised(a, "fe80::1266:6aff:fe4c:a112"),
    "DHCP": lambda a, v: inform(a),
    **{f"DHCPv6 message {kind}": lambda a, v, k=kind: message6(a, k) for kind in CLIENTS},
}


@pytest.mark.parametrize(("reason", "frame"), CLOSE.values(), ids=CLOSE.keys())
def test_frame_with_one_field_that_is_not_the_sender_s_is_dropped(bridge, reason, frame):
    assert bridge.registered.mac == "10:66:6a:4c:a1:12"
    bridge.guard(True)
    bridge.is_dropped(bridge.registered, frame(bridge.registered, bridge.victim), None, reason)


def test_frames_with_fields_of_the_sender_s_own_are_not_dropped(bridge):
    bridge.guard(True)
    bridge.registered.send(*(bytes(frame(bridge.registered, bridge.victim)) for frame in OWN.values()))
    assert bridge.registered.pings("10.83.0.1")  # what came before is done with
    assert not bridge.host.dropped(bridge.registered.mac)


def test_packet_in_fragments_arrives(bridge):
    bridge.guard(True)
    for prefix in ("10", "2001"):
        bridge.registered.run("ping", "-n", "-c", "1", "-W", "5", "-s", "4000", addresses(bridge.victim)[prefix])


@pytest.mark.parametrize(("source", "destination"), [(67, 5000), (547, 5000), (5000, 68), (5000, 546)])
@pytest.mark.parametrize("prefix", ["10", "2001"])
def test_datagram_from_or_to_a_port_of_dhcp_servers_or_clients_is_dropped(bridge, prefix, source, destination):
    attacker, target = bridge.registered, bridge.bystander
    header = (scapy.IP if prefix == "10" else scapy.IPv6)(
        src=addresses(attacker)[prefix], dst=addresses(target)[prefix]
    )
    frame = scapy.Ether(src=attacker.mac, dst=target.mac) / header / scapy.UDP(sport=source, dport=destination) / b"x"
    bridge.guard(True)
    bridge.is_dropped(attacker, frame, None, "DHCP server")


def test_new_client_gets_and_renews_its_leases_and_reaches_all_behind_the_guard(bridge):
    host = bridge.host
    bridge.guard(True)
    client = host.client("late", "10:66:6a:4c:a1:77")
    lease4 = client.dhcp4("late")
    lease6 = client.dhcp6("late")
    host.process()
    bridge.guard(True)
    wait_for(lambda: client.resolve("late.v4.instance.internal", "A"), "the new name")
    wait_for(lambda: all(client.addresses(prefix) for prefix in ("10", "2001", "fd83", "fe80")), "its addresses")
    for node, other in ((client, bridge.victim), (bridge.victim, client)):
        for address in other.addresses():
            node.run("ping", "-n", "-c", "1", "-W", "5", address + ("%eth0" if address.startswith("fe80") else ""))
    for kind, subdomain in (("A", "v4"), ("AAAA", "g6"), ("AAAA", "u6"), ("AAAA", "l6")):
        assert client.resolve(f"victim.{subdomain}.instance.internal", kind)
    lease4.send_signal(signal.SIGUSR1)
    wait_for(lambda: "renew 10.83" in client.events(), "a renewal over IPv4")
    client.stop(lease6, signal.SIGKILL)
    leases = client.folder / "leases6-a"  # by what stands there it is time to renew
    leases.write_text(re.sub(r"\brenew \d+;", "renew 1;", leases.read_text()))
    client.start_dhcp6("late")
    wait_for(lambda: all(f"RENEW6 {p}" in client.events() for p in ("2001", "fd83")), "a renewal over IPv6")


def test_client_with_ipv6_only_gets_leases_behind_the_guard(bridge):
    bridge.guard(True)
    client = bridge.host.client("six", "10:66:6a:4c:a1:66")
    client.dhcp6("six")
    bridge.host.process()
    bridge.guard(True)
    for address in ("2001:67c:83::1", addresses(bridge.victim)["2001"]):
        wait_for(lambda a=address: client.pings(a), f"a ping of {address}")


@pytest.mark.parametrize("who", ATTACKERS)
def test_false_claim_makes_nobody_give_an_address_up(bridge, who):
    attacker, victim = getattr(bridge, who), bridge.victim
    address = addresses(victim)["2001"]

    bridge.guard(False)
    wait_for(lambda: gives_up(attacker, victim, address), "a false claim that is believed")
    bridge.guard(True)
    before = bridge.host.dropped(attacker.mac, "NDP target")
    assert not gives_up(attacker, victim, address)
    assert bridge.host.dropped(attacker.mac, "NDP target") >= before + 3


def test_unregistered_client_reaches_nobody_behind_the_guard(bridge):
    others = ("10.83.0.1", "2001:67c:83::1", f"{HOST_LLA}%eth0", addresses(bridge.victim)["10"])
    bridge.guard(False)
    for address in others:
        wait_for(lambda a=address: bridge.unregistered.pings(a), f"a ping of {address} without the guard")
    bridge.guard(True)
    with ThreadPoolExecutor() as pool:  # each waits in vain for two seconds
        assert not any(pool.map(bridge.unregistered.pings, others))
