"""Frames that no system sends by itself, and what they do where the rule against them is taken out of the guard.

br_netfilter straightens frames before the guard sees them, so it is off here. That later fragments which look like DHCP
arrive is in test_fuzz.py.
"""

import contextlib
import random
import subprocess

import pytest
from attacks import (
    EVERYONE,
    HOST4,
    HOST6,
    NODES,
    SNIFFER,
    advertised,
    arp,
    bootp,
    datagram,
    dhcp6,
    hearing,
    igmp,
    ip6,
    link_local,
    octets,
    own_duid,
    scapy,
    send_until,
    solicited,
    tagged,
)
from lab import wait_for

pytestmark = pytest.mark.slow
LLDP = "01:80:c2:00:00:0e"  # a group address that no bridge forwards


@pytest.fixture(autouse=True)
def straight(bridge):
    """Have each test begin without br_netfilter and with the whole guard."""
    bridge.host.br_netfilter(False)
    bridge.reset()


def split(packet, length, trailer=b""):
    """Return a packet in two fragments, the first of that length, with a trailer that is no part of it."""
    ether, ip, number = packet.copy(), packet.payload, random.randrange(65536)
    ether.remove_payload()
    if isinstance(ip, scapy.IP):
        body = bytes(ip)[20:]
        header = {"src": ip.src, "dst": ip.dst, "proto": ip.proto or 17, "id": number}
        first = scapy.IP(flags="MF", len=20 + length, **header) / scapy.Raw(body[:length] + trailer)
        return ether / first, ether / scapy.IP(frag=length // 8, **header) / scapy.Raw(body[length:])
    built = scapy.IPv6(bytes(ip))
    body = bytes(built)[40:]
    header = {"src": ip.src, "dst": ip.dst, "hlim": 64, "fl": ip.fl}
    fragment = {"nh": built.nh, "id": number}
    first = scapy.IPv6(plen=8 + length, **header) / scapy.IPv6ExtHdrFragment(m=1, **fragment)
    second = scapy.IPv6(**header) / scapy.IPv6ExtHdrFragment(offset=length // 8, **fragment)
    return ether / first / scapy.Raw(body[:length] + trailer), ether / second / scapy.Raw(body[length:])


@pytest.mark.parametrize("kind", ["datagram", "ARP"])
def test_frame_to_a_group_of_the_link_does_not_reach_the_host(bridge, kind):
    attacker, host, forged = bridge.unregistered, bridge.host, bridge.own["ipv4"]
    chain, frame = "inet instances_group prerouting", datagram(attacker, forged, HOST4) / b"forged"
    if kind == "ARP":
        chain, frame = "arp instances_group input", arp(attacker, forged, HOST4)
    frame.dst = LLDP
    host.run("ip", "neighbour", "flush", "dev", attacker.port)
    with hearing(host) as heard:

        def arrived():
            learnt = host.run("ip", "neighbour", "show", "dev", attacker.port).stdout
            return f"{forged} lladdr {attacker.mac}" in learnt or "forged" in heard()

        before = host.counted(chain)
        attacker.send(bytes(frame))
        wait_for(lambda: host.counted(chain) > before, "its drop")
        assert not arrived()
        with bridge.without(chain):
            send_until(arrived, attacker, frame)


def test_solicitation_to_a_group_of_the_link_makes_nobody_another(bridge):
    """dnsmasq takes the MAC address of an IPv6 client from any of the host's neighbour caches."""
    attacker, host = bridge.unregistered, bridge.host
    port = host.run("sh", "-c", f"ip -6 -o address show dev {attacker.port} scope link").stdout.split()[3].split("/")[0]
    frame = solicited(attacker, link_local(attacker.mac), LLDP, port)
    frame[scapy.ICMPv6NDOptSrcLLAddr].lladdr = bridge.victim.mac
    lease = bytes(dhcp6(bridge, attacker, scapy.DHCP6_Request, duid=own_duid(attacker), addresses=[]))
    before = host.counted("inet instances_group prerouting")
    attacker.send(bytes(frame))
    wait_for(lambda: host.counted("inet instances_group prerouting") > before, "its drop")
    assert not bridge.harm(attacker)
    with bridge.without("inet instances_group prerouting"):
        attacker.send(bytes(frame), lease)
        wait_for(lambda: host.registry()[bridge.victim.mac] != bridge.registry[bridge.victim.mac], "the victim's lease")


def test_advertisement_in_two_pieces_of_memory_is_not_believed(bridge):
    attacker, host, stolen = bridge.registered, bridge.host, bridge.addresses6[0]
    frame = advertised(attacker, stolen, host.mac, HOST6)

    def learn():
        host.run("ip", "neighbour", "flush", "dev", "br0")
        wait_for(lambda: host.finds(stolen, bridge.victim.mac), "the victim")

    learn()
    with bridge.without("before"):
        bridge.is_dropped("NDP target", attacker, frame)  # in one piece
        assert host.neighbour(stolen) == bridge.victim.mac
        send_until(lambda: host.neighbour(stolen) == attacker.mac, attacker, frame, ring=True)
    learn()
    bridge.is_dropped("NDP target", attacker, frame, ring=True)
    assert host.neighbour(stolen) == bridge.victim.mac


@pytest.mark.parametrize("version", [4, 6])
def test_release_in_fragments_with_another_message_behind_the_first_ends_no_lease(bridge, version):
    attacker = bridge.registered
    if version == 4:
        frame = bootp(attacker, "release", ("server_id", HOST4), chaddr=bridge.victim.mac, ciaddr=bridge.own["ipv4"])
        frame[scapy.IP].src, frame[scapy.IP].dst, frame.dst = bridge.registry[attacker.mac]["ipv4"], HOST4, EVERYONE
        frames = split(frame, 32, bytes(4) + octets(attacker.mac) + bytes(10))
    else:
        frames = split(dhcp6(bridge, attacker, scapy.DHCP6_Release), 8, b"\1\0\0\7")
    rule = "ip frag-off & 16383 != 0" if version == 4 else "exthdr frag exists goto"
    bridge.is_dropped("malformed", attacker, *frames, some=1)
    assert not bridge.harm(attacker)
    with bridge.without("instances_drop_dhcp", rule):
        send_until(lambda: bridge.harm(attacker), attacker, *frames)


@contextlib.contextmanager
def joining(bridge, start):
    """Have a new guest ask for a lease that the host's server does not give; yield it, and a function that returns its
    last message."""
    host = bridge.host
    host.stop_dnsmasq()
    client = host.client(f"new{len(host.clients)}", f"10:66:6a:4c:b0:0{len(host.clients)}")
    try:
        with hearing(client, SNIFFER) as sent:
            start(client)

            def last():
                own = [line for line in sent().split("\n")[:-1] if line[12:24] == octets(client.mac).hex()]
                frames = [scapy.Ether(bytes.fromhex(line)) for line in own]
                return [f for f in frames if scapy.UDP in f and f.dport in (67, 547)][-1:]

            yield client, lambda: wait_for(last, "a message of the client's")[0]
    finally:
        client.close()
        host.clients.remove(client)


def replies6(attacker, asked, address):
    """Return a server's answers to a DHCPv6 message."""
    lease = [scapy.DHCP6OptIAAddress(addr=address, preflft=99, validlft=99)]
    options = scapy.DHCP6OptServerId(duid=scapy.Raw(own_duid(attacker))) / scapy.DHCP6OptPref(prefval=255)
    options /= scapy.DHCP6OptClientId(duid=asked[scapy.DHCP6OptClientId].duid)
    options /= scapy.DHCP6OptIA_NA(iaid=asked[scapy.DHCP6OptIA_NA].iaid, ianaopts=lease)
    kind = scapy.DHCP6_Advertise if scapy.DHCP6_Solicit in asked else scapy.DHCP6_Reply
    reply = scapy.UDP(sport=547, dport=546) / kind(trid=asked[scapy.UDP].payload.trid) / options
    return ip6(attacker, asked.src, asked[scapy.IPv6].src), reply


@pytest.mark.parametrize("disguise", ["UDP", "TCP"])
def test_reply_behind_options_in_fragments_gives_no_lease(bridge, disguise):
    """The first fragment ends between two extension headers, and a trailer says that what follows is something else."""
    attacker, host, address = bridge.registered, bridge.host, "2001:67c:83::bad"
    upper = scapy.UDP(sport=5000, dport=5000) if disguise == "UDP" else scapy.TCP()
    trailer = bytes(scapy.IPv6ExtHdrDestOpt() / upper)
    with joining(bridge, lambda client: client.start_dhcp6()) as (client, last):

        def answer():
            ip, reply = replies6(attacker, last(), address)
            options = scapy.IPv6ExtHdrDestOpt(nh=60) / scapy.IPv6ExtHdrDestOpt(nh=17)
            attacker.send(*map(bytes, split(ip / options / reply, 8, trailer)))

        before = host.dropped(attacker.mac, "malformed")
        for _ in range(3):
            answer()
        wait_for(lambda: host.dropped(attacker.mac, "malformed") >= before + 3, "drops")
        assert "BOUND6" not in client.events()
        with bridge.without("instances_drop_rogue", "exthdr frag exists frag nexthdr"):
            wait_for(lambda: answer() or f"BOUND6 {address}" in client.events(), "the attacker's lease")


def test_reply_in_ipv4_that_nftables_cannot_parse_gives_no_lease(bridge):
    """dhclient reads raw frames, and does not ask for the version."""
    attacker, host, address = bridge.registered, bridge.host, "10.83.0.222"

    def start(client):
        files = ["-cf", "/dev/null", "-lf", client.folder / "leases4", "-pf", client.folder / "pid4"]
        client.start("dhclient", "-4", "-d", *files, "-sf", client.script, "eth0", stderr=subprocess.DEVNULL)

    with joining(bridge, start) as (client, last):

        def answer():
            asked = last()
            ip = scapy.Ether(src=attacker.mac, dst=client.mac)
            ip /= scapy.IP(version=5, src=bridge.registry[attacker.mac]["ipv4"], dst=address)
            message = scapy.BOOTP(op=2, xid=asked.xid, yiaddr=address, chaddr=octets(client.mac)) / scapy.DHCP()
            lease = [("server_id", ip[scapy.IP].src), ("lease_time", 99), ("subnet_mask", "255.255.255.0"), "end"]
            frames = []
            for kind in ("offer", "ack"):
                message[scapy.DHCP].options = [("message-type", kind), *lease]
                frames.append(bytes(ip / scapy.UDP(sport=67, dport=68) / message))
            attacker.send(*frames)

        def leased():
            leases = client.folder / "leases4"
            return leases.exists() and f"fixed-address {address};" in leases.read_text()

        before = host.dropped(attacker.mac, "malformed")
        answer()
        wait_for(lambda: host.dropped(attacker.mac, "malformed") >= before + 2, "drops")
        assert not leased()
        with bridge.without("instances_drop_rogue", "meta protocol { ip, ip6 } goto"):
            wait_for(lambda: answer() or leased(), "the attacker's lease")


def queries(attacker, source):
    """Return what only a multicast router sends, of IPv4 from this source: {what: (a rule against it, frame)}."""
    ip = ip6(attacker, NODES, "ff02::1") / scapy.IPv6ExtHdrHopByHop(options=[scapy.RouterAlert()])
    listener, asks = scapy.ICMPv6MLQuery(mrd=1), igmp.IGMP(type=0x11, mrcode=1)
    ip.hlim = 1
    discovery = ip / scapy.ICMPv6Unknown(type=151, code=20, msgbody=bytes(4))  # RFC 4286, section 3.1
    discovery[scapy.IPv6].dst = "ff02::6a"
    ether = scapy.Ether(src=attacker.mac, dst="01:00:5e:00:00:01")

    def of_ip(group, message, **fields):
        return ether / scapy.IP(src=source, dst=group, ttl=1, **fields) / message

    return {
        "IPv6": ("icmpv6 type", ip / listener),
        "behind a VLAN tag": ("other_protocol", tagged(ip / listener)),
        "behind an Authentication Header": ("exthdr hbh", ip / scapy.AH(nh=58, payloadlen=2, icv=bytes(4)) / listener),
        "discovery, IPv6": ("icmpv6 type", discovery),
        "IPv4": ("igmp type", of_ip("224.0.0.1", asks, proto=2)),
        "IPv4 in a later fragment": ("ip frag-off", of_ip("224.0.0.1", asks, proto=2, frag=100)),
        "discovery, IPv4": ("igmp type", of_ip("224.0.0.106", igmp.IGMP(type=0x30, mrcode=20), proto=2)),
        "PIM": ("pim goto", of_ip("224.0.0.13", scapy.Raw(b"\x20\0\xdf\xff"), proto=103)),
    }


def test_guest_that_speaks_as_a_multicast_router_is_not_believed(bridge):
    """A bridge that believes it sends the guest all multicast, and multicast of others only to those who answered."""
    attacker, host = bridge.registered, bridge.host

    def is_believed():
        return f"router ports on br0: {attacker.port}" in host.run("bridge", "-d", "mdb", "show").stdout

    for kind, (rule, frame) in queries(attacker, bridge.registry[attacker.mac]["ipv4"]).items():
        in_pieces = "fragment" in kind
        reason, chain = "multicast query", "instances_drop_query"
        if "tag" in kind:
            reason, chain = "other protocol", "instances_guard"
        for state in ("0", "1"):  # what was believed before is forgotten
            host.run("ip", "link", "set", attacker.port, "type", "bridge_slave", "mcast_router", state)
        bridge.is_dropped(reason, attacker, frame, ring=in_pieces)
        assert not is_believed(), kind
        with bridge.without(chain, rule):
            send_until(is_believed, attacker, frame, ring=in_pieces)
