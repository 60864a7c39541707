"""The judge of fuzz.py: who may send what, by the registry, the RFCs and what Linux does. It knows no rule.

It reads a frame as its receivers do, and says for each place, the host and another guest, whether it must not arrive
there (`forbidden`), is what an honest guest sends (`needed`), or neither. Where Linux drops what another system may
take, it judges what that system would see. It takes for granted that the Ethernet source address is the sender's own
(README: MAC filtering), and that the checksums behind IP are right, which an attacker can always see to.
"""

import struct
from ipaddress import ip_address
from typing import NamedTuple

# ---- Who is who


def ip(text: str) -> bytes:
    """Return an IP address as bytes."""
    return ip_address(text).packed


def eui64(mac: bytes, prefix: bytes = ip("fe80::")[:8]) -> bytes:
    """Return the address made from a MAC address, a link-local one if nothing is said (RFC 4291, appendix A)."""
    return prefix + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]


LINK_LOCAL = ip("fe80::")[:8]
HOST, WEB, VICTIM, MAIL, CLOCK, NEWCOMER = (
    bytes.fromhex(f"10666a4ca1{end}") for end in ("fe", "11", "12", "14", "15", "66")
)
REGISTRY = {
    HOST: {
        "ipv4": "10.83.0.1",
        "ipv6_gua": "2001:67c:83::1",
        "ipv6_ula": "fd83:5eed::1",
        "ipv6_lla": "fe80::8099:e2ff:5d8a:32",
    },
    WEB: {"ipv4": "10.83.0.11", "ipv6_gua": "2001:67c:83::11", "ipv6_ula": "fd83:5eed::11"},
    VICTIM: {"ipv4": "10.83.0.12"},
    MAIL: {"ipv6_ula": "fd83:5eed::14"},
    CLOCK: {"ipv4": "10.83.0.15"},
}
REGISTRY = {owner: {"name": "", "ipv6_lla": str(ip_address(eui64(owner)))} | entry for owner, entry in REGISTRY.items()}
OWNED = {owner: [ip(text) for text in entry.values() if text] for owner, entry in REGISTRY.items()}
REGISTRY[WEB]["allowed"] = ["10.83.0.50", "10.99.0.0/24", "2001:67c:83::50", "2001:67c:99::/64"]
OWNED[WEB] += [ip("10.83.0.50"), ip("2001:67c:83::50")]
# The first octets of an address, and how many it has
ROUTED = {WEB: [(ip("10.99.0.0")[:3], 4), (ip("2001:67c:99::")[:8], 16)]}
# Guests make addresses for themselves in this prefix
SLAAC = "2001:67c:83::/64"
PREFIX = ip("2001:67c:83::")[:8]
SENDERS = {"web": WEB, "mail": MAIL, "newcomer": NEWCOMER}
# Addresses that are not made from the MAC address: first come, first served
CLAIMED = {
    owner: [ip(f"{prefix}::c0de:{owner[5]:x}") for prefix in ("fe80", "2001:67c:83")]
    for owner in (VICTIM, *SENDERS.values())
}
# What the host and a router behind the uplink use, and are not registered with
ROUTER = bytes.fromhex("10666a4ca101")
ELSEWHERE = {HOST: [ip("fe80::ad"), ip("2001:67c:83::ad")], ROUTER: [ip("fe80::1"), ip("2001:67c:83::ff")]}
# What the host has just leased
LEASED = {MAIL: ip("10.83.0.34"), NEWCOMER: ip("10.83.0.36")}


# ---- The judge

ARP, IP, IP6, TAGS = 0x0806, 0x0800, 0x86DD, (0x8100, 0x88A8)
ICMP, IGMP, TCP, UDP, ESP, AH, ICMP6, PIM = 1, 2, 6, 17, 50, 51, 58, 103
HOP_BY_HOP, ROUTING, FRAGMENT, NO_NEXT, DESTINATION = 0, 43, 44, 59, 60
MLD_QUERY, MLD_REPORT, MLD_DONE, MLD2_REPORT = 130, 131, 132, 143
MRD, MRD6 = (0x30, 0x31, 0x32), (151, 152, 153)  # multicast router discovery (RFC 4286)
ROUTER_SOLICIT, ROUTER_ADVERT, SOLICIT, ADVERT, REDIRECT = 133, 134, 135, 136, 137
ND_LENGTH = {ROUTER_SOLICIT: 8, ROUTER_ADVERT: 16, SOLICIT: 24, ADVERT: 24, REDIRECT: 40}
NOBODY, ZERO, BROADCAST, EVERYONE = bytes(16), bytes(4), b"\xff" * 4, b"\xff" * 6
DHCP_CLIENT, DHCP_SERVER, DHCP6_CLIENT, DHCP6_SERVER = 68, 67, 546, 547
DHCP6_AGENTS, SOLICITED_NODE = ip("ff02::1:2"), ip("ff02::1:ff00:0")[:13]
BRIDGE_GROUP = b"\x01\x80\xc2\0\0"  # not forwarded, or by rules of its own (IEEE 802.1D, table 7-10)
PADDING, ROUTER_ALERT, SKIPPED = b"\1\4" + bytes(4), b"\5\2\0\0\1\0", b"\x1e\4" + bytes(4)
SKIPPED_LONG = b"\x1e\x14"  # and 20 octets: an option that is not known is passed over (RFC 8200, section 4.2)


class Packet(NamedTuple):
    """An IP packet as its receiver reads it: nothing of what is behind the length that it tells."""

    source: bytes
    target: bytes
    hop_limit: int
    headers: tuple  # the numbers of IPv6 extension headers
    protocol: int  # of the upper layer, or AH or ESP, whose inside only holders of a key read
    data: bytes  # of the upper layer
    fragment: tuple  # (identification, offset, more follow), or () of a whole packet
    head: bytes  # the headers of a whole packet to which the data belongs
    length: int
    sound: bool = True  # the lengths and options are ordinary ones


def checksum(data: bytes) -> int:
    """Return the internet checksum of data (RFC 1071): 0 if the right one is within."""
    return -int.from_bytes(data + bytes(len(data) & 1), "big") % 0xFFFF


def read_ip(body: bytes) -> Packet | None:
    """Read IPv4 as Linux's ip_rcv does; None is what it drops."""
    if len(body) < 20 or body[0] >> 4 != 4:
        return None
    header, (length, number, bits) = (body[0] & 15) * 4, struct.unpack_from("!HHH", body, 2)
    if not 20 <= header <= length <= len(body):
        return None
    fragment = (number, (bits & 0x1FFF) * 8, bool(bits & 0x2000)) if bits & 0x3FFF else ()
    head, data = body[:header], body[header:length]
    return Packet(body[12:16], body[16:20], body[8], (), body[9], data, fragment, head, length, not checksum(head))


def read_ip6(body: bytes) -> Packet | None:
    """Read IPv6 as Linux's ip6_rcv does, with its extension headers, passing over options; None is what it drops."""
    if len(body) < 40 or body[0] >> 4 != 6 or body[8] == 0xFF:
        return None
    length, following, sound = 40 + int.from_bytes(body[4:6], "big"), body[6], True
    if length == 40 and following == HOP_BY_HOP:
        length, sound = len(body), False  # a jumbo payload option is to tell it
    if length > len(body):
        return None
    body, at, headers, fragment, head = body[:length], 40, [], (), b""
    named = 6  # where the number of the following header stands
    while following in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT) and not fragment:
        if at + 8 > length or (following == HOP_BY_HOP and headers):
            return None
        end = at + (8 if following == FRAGMENT else 8 + 8 * body[at + 1])
        bits = int.from_bytes(body[at + 2 : at + 4], "big") & 0xFFF9
        if end > length:
            return None
        if following == FRAGMENT and bits:  # without offset and more it is whole (RFC 6946)
            fragment = (body[at + 4 : end], bits & 0xFFF8, bool(bits & 1))
            head = body[:named] + body[at : at + 1] + body[named + 1 : at]
        elif following in (HOP_BY_HOP, DESTINATION):
            options = body[at + 2 : end]
            sound &= options in (PADDING, ROUTER_ALERT, SKIPPED) or options[:2] == SKIPPED_LONG and len(options) == 22
        headers.append(following)
        following, named, at = body[at], at, end
    return Packet(body[8:24], body[24:40], body[7], tuple(headers), following, body[at:], fragment, head, length, sound)


def read(frame: bytes) -> Packet | None:
    """Return the IP packet of a frame."""
    return {b"\x08\0": read_ip, b"\x86\xdd": read_ip6}.get(frame[12:14], lambda body: None)(frame[14:])


def untagged(frame: bytes) -> bytes:
    """Return a frame without its VLAN tags."""
    while len(frame) >= 18 and int.from_bytes(frame[12:14], "big") in TAGS:
        frame = frame[:12] + frame[16:]
    return frame


def unprioritized(frame: bytes) -> bytes:
    """Return a frame without a tag that has a priority, but no VLAN: receivers pass over it (IEEE 802.1Q, 6.9.1)."""
    tagged = frame[12:14] == b"\x81\0" and not int.from_bytes(frame[14:16], "big") & 0xFFF and len(frame) >= 18
    return frame[:12] + frame[16:] if tagged else frame


class Reassembly:
    """Puts fragments together as Linux does (inet_frag_queue_insert): overlapping ones end the packet (RFC 5722)."""

    def __init__(self):
        self.queues = {}

    def add(self, frame: bytes, packet: Packet) -> tuple[bytes, list[bytes]]:
        """Take a fragment; return the whole packet as a frame, and the frames that it came in, or both empty."""
        number, begin, more = packet.fragment
        key = (packet.source, packet.target, number, packet.protocol if len(packet.source) == 4 else 0)
        end = begin + (len(packet.data) & (~7 if more and len(packet.source) == 4 else ~0))
        queue = self.queues.setdefault(key, [])
        if end == begin or (more and end % 8) or any(first <= begin and end <= last for first, last, *_ in queue):
            return b"", []  # Linux passes over it
        if any(begin < last and first < end for first, last, *_ in queue):
            del self.queues[key]
            return b"", []
        queue.append((begin, end, more, packet, frame))
        data = b""
        for first, last, more, part, _ in sorted(queue, key=lambda item: item[0]):
            if first != len(data):
                break
            data += part.data[: last - first]
            if not more:
                del self.queues[key]
                return self.whole(next(p.head for f, _, _, p, _ in queue if f == 0), data), [item[-1] for item in queue]
        return b"", []

    @staticmethod
    def whole(head: bytes, data: bytes) -> bytes:
        """Return a frame's body with all the data behind the first fragment's headers."""
        if head[0] >> 4 == 4:
            return head[:2] + struct.pack("!H", len(head + data)) + head[4:6] + bytes(2) + head[8:] + data
        return head[:4] + struct.pack("!H", len(head + data) - 40) + head[6:] + data


class Judge:
    """Says what a sender may send; knows who came first with which link-local address."""

    def __init__(self):
        self.claims = {address: owner for owner, addresses in CLAIMED.items() for address in addresses}
        self.taken = {address for addresses in (*OWNED.values(), *ELSEWHERE.values()) for address in addresses}

    def standing(self, sender: bytes, address: bytes) -> str:
        """Tell what an address is to a sender: "own", "routed", "new" (for joining), "free", "none", "foreign"."""
        if address in OWNED.get(sender, ()) or address == LEASED.get(sender):
            return "own"
        if any(address.startswith(prefix) and len(address) == size for prefix, size in ROUTED.get(sender, ())):
            return "routed"
        if address == NOBODY:
            return "none"
        if address[:8] not in (LINK_LOCAL, PREFIX) or address in self.taken:
            return "foreign"
        own = "own" if sender in REGISTRY or address[:8] == PREFIX else "new"
        if address[11:13] == b"\xff\xfe":
            return own if address == eui64(sender, address[:8]) else "foreign"
        owner = self.claims.get(address)
        if owner == sender or (not owner and address[8:10] == b"\0" + sender[5:]):  # nobody else is given such ones
            return own
        return "foreign" if owner else "free"

    def settle(self, frame: bytes) -> None:
        """Note the addresses that a frame has claimed by its arrival."""
        packet = read(frame)
        if packet and len(packet.source) == 16:
            kind = packet.data[0] if packet.protocol == ICMP6 and packet.data else None
            claims = kind == ADVERT or (kind == SOLICIT and packet.source == NOBODY)
            claims &= not packet.fragment  # what is behind the header of a later one is anything
            for address in (packet.source, packet.data[8:24] if claims else b""):
                if self.standing(frame[6:12], address) == "free":
                    self.claims[address] = frame[6:12]

    # What must not arrive: the reason, "" if it may

    def forbidden(self, frame: bytes, at: str) -> str:
        """Return why a frame must not arrive at the "host" or at a "guest"."""
        frame = unprioritized(frame)
        sender, kind, packet = frame[6:12], int.from_bytes(frame[12:14], "big"), read(frame)
        if kind == ARP:
            return self.forbidden_arp(sender, frame[14:])
        if kind not in (IP, IP6):
            return "VLAN tag" if kind in TAGS else "other protocol"
        if kind == IP and at == "guest" and taken_by_dhclient(frame):
            return "DHCP server's message, as a client's raw socket reads it"
        if not packet:
            return ""
        return (self.forbidden_ip if kind == IP else self.forbidden_ip6)(sender, packet, at, frame[:6])

    def forbidden_arp(self, sender: bytes, body: bytes) -> str:
        """Linux takes Ethernet and IEEE 802, requests and replies; a probe is one from 0.0.0.0 (RFC 5227)."""
        ordinary = body[:2] in (b"\0\1", b"\0\6") and body[2:6] == b"\x08\0\6\4" and body[6:8] in (b"\0\1", b"\0\2")
        if len(body) < 28 or not ordinary:
            return ""
        hardware, address, target = body[8:14], body[14:18], body[24:28]
        if address == ZERO:
            return "" if self.standing(sender, target) == "own" else "probe for an address that is not the sender's"
        asks_routed = body[6:8] == b"\0\1" and self.standing(sender, address) == "routed"
        if self.standing(sender, address) != "own" and not asks_routed:
            return "ARP of an address that is not the sender's"
        return "" if hardware == sender else "ARP of another's hardware address"

    def forbidden_ip(self, sender: bytes, packet: Packet, at: str, to: bytes) -> str:
        """IPv4: who sends it, and what a whole packet says."""
        data, whole_udp = packet.data, packet.protocol == UDP and not packet.fragment and len(packet.data) >= 8
        source, target = struct.unpack_from("!HH", data) if whole_udp else (0, 0)
        if target == DHCP_SERVER:
            if at == "guest":
                return "DHCP request that another guest hears"
            if len(data) >= 44 and (data[8:11] + data[24:28] + data[32:42] != b"\1\1\6" + ZERO + ZERO + sender):
                return "DHCP request in another's name"
            if source == DHCP_CLIENT and (packet.target == BROADCAST or (to, packet.target) == (HOST, ip("10.83.0.1"))):
                return ""  # from any address: a lease that is not registered is renewed by its server only
        if self.standing(sender, packet.source) not in ("own", "routed"):
            return "IPv4 from an address that is not the sender's"
        if source == DHCP_SERVER or target == DHCP_CLIENT:
            return "DHCP server's message"
        if packet.protocol == PIM:
            return "multicast router's message"
        kind = data[0] if packet.protocol == IGMP and not packet.fragment and len(data) >= 8 else None
        return "IGMP query" if kind == 0x11 else "multicast router's message" if kind in MRD else ""

    def forbidden_ip6(self, sender: bytes, packet: Packet, at: str, _: bytes) -> str:
        """IPv6: who sends it, and what a whole packet says."""
        standing, data = self.standing(sender, packet.source), packet.data
        if standing == "foreign":
            return "IPv6 from an address that is not the sender's"
        if packet.fragment or (packet.protocol in (UDP, ICMP6) and len(data) < 8):
            return ""  # says nothing before it is whole
        kind = data[0] if packet.protocol == ICMP6 else None
        why = self.forbidden_icmp6(sender, packet, kind) if kind else self.forbidden_dhcp6(packet, at)
        if why or standing in ("own", "routed"):
            return why
        if standing == "free" and (sender in REGISTRY or packet.source[:8] == PREFIX):
            return ""
        if standing == "none":
            joins = kind in (ROUTER_SOLICIT, SOLICIT, MLD_REPORT, MLD2_REPORT)
        else:
            joins = kind in (ROUTER_SOLICIT, SOLICIT, ADVERT, MLD_REPORT, MLD_DONE, MLD2_REPORT) or (
                packet.protocol == UDP and data[:4] == b"\x02\x22\x02\x23" and packet.target == DHCP6_AGENTS
            )
        return "" if joins else "IPv6 of a newcomer, not for joining"

    def forbidden_icmp6(self, sender: bytes, packet: Packet, kind: int) -> str:
        """Queries, and neighbour discovery that a receiver takes: hop limit 255, code 0, whole (RFC 4861, 7.1)."""
        if kind == MLD_QUERY and len(packet.data) >= 24:
            return "MLD query"
        if kind in MRD6:
            return "multicast router's message"
        if kind not in ND_LENGTH or packet.hop_limit != 255 or packet.data[1] or len(packet.data) < ND_LENGTH[kind]:
            return ""
        if kind in (ROUTER_ADVERT, REDIRECT):
            return "router's message"
        claim = kind == ADVERT or (kind == SOLICIT and packet.source == NOBODY)  # the latter detects duplicates
        if claim and self.standing(sender, packet.data[8:24]) not in ("own", "new", "free"):
            return "neighbour discovery of an address that is not the sender's"
        options = read_options(packet.data[ND_LENGTH[kind] :]) or []
        named = next((value for number, value in options if number == (2 if kind == ADVERT else 1)), sender)
        if named != sender and len(named) == 6 and packet.source != NOBODY:
            return "link-layer address that is not the sender's"
        return ""

    @staticmethod
    def forbidden_dhcp6(packet: Packet, at: str) -> str:
        """DHCPv6 (RFC 8415): a guest is a client, ends no lease, and is heard by nobody but the server."""
        if packet.protocol != UDP or len(packet.data) < 9:
            return ""
        source, target = struct.unpack_from("!HH", packet.data)
        if source == DHCP6_SERVER or target == DHCP6_CLIENT:
            return "DHCPv6 server's message"
        if target != DHCP6_SERVER:
            return ""
        if at == "guest":
            return "DHCPv6 request that another guest hears"
        if packet.source[:8] != LINK_LOCAL:
            return "DHCPv6 from an address that two guests may share"
        return "" if packet.data[8] in (1, 3, 4, 5, 11) else "DHCPv6 message that no client may send"

    # What must arrive: well-formed in every way, and of a kind that honest guests send

    def needed(self, frame: bytes, at: str) -> bool:
        """Tell whether a frame has to arrive at the "host" or at a "guest"."""
        if not (frame[0] & 1 or frame[:6] == (HOST if at == "host" else VICTIM)) or frame[:5] == BRIDGE_GROUP:
            return False  # it is for others
        if self.forbidden(frame, at):
            return False
        if frame != unprioritized(frame):  # of what is tagged, data only
            frame = unprioritized(frame)
            if not (packet := read(frame)) or packet.headers or packet.protocol not in (ICMP, TCP, UDP):
                return False
        sender, packet = frame[6:12], read(frame)
        if frame[12:20] == b"\x08\6\0\1\x08\0\6\4":
            return len(frame) >= 42 and frame[20:22] in (b"\0\1", b"\0\2") and frame[22:28] == sender
        if not packet or not packet.sound or len(frame) != 14 + packet.length:
            return False
        return (self.needed_ip if len(packet.source) == 4 else self.needed_ip6)(sender, packet, at)

    def needed_ip(self, _: bytes, packet: Packet, at: str) -> bool:
        """IPv4 from an own address, or for a DHCP server, since nothing else is not forbidden."""
        if at == "host" and packet.protocol == UDP and not packet.fragment and packet.data[:4] == b"\0\x44\0\x43":
            return len(packet.data) >= 44
        if packet.protocol == IGMP:
            report = len(packet.data) == 8 and packet.data[0] in (0x12, 0x16, 0x17)
            return report and not packet.fragment and not checksum(packet.data)  # or the bridge drops it
        return packet.protocol not in (HOP_BY_HOP, ICMP6, 255) and whole_header(packet)

    def needed_ip6(self, sender: bytes, packet: Packet, at: str) -> bool:
        """IPv6 from an own address, behind usual extension headers, and what a newcomer sends to join."""
        standing, icmp6 = self.standing(sender, packet.source), packet.protocol == ICMP6
        data, headers, fragment = packet.data, packet.headers, packet.fragment
        if standing == "free" or ROUTING in headers or (FRAGMENT in headers and not fragment):
            return False
        pseudo = packet.source + packet.target + struct.pack("!II", len(data), ICMP6)
        if icmp6 and headers[:1] == (HOP_BY_HOP,) and (fragment or checksum(pseudo + data)):
            return False  # the bridge may drop it as a broken listener report
        kind = data[0] if icmp6 and len(data) >= 8 and not (fragment and fragment[1]) else None
        if kind in ND_LENGTH:
            return not headers and self.needed_discovery(sender, packet, kind)
        if kind in (MLD_REPORT, MLD_DONE):
            sound = headers == (HOP_BY_HOP,) and packet.hop_limit == 1 and len(data) == 24 and data[8] == 0xFF
            return sound and (standing != "none" or kind == MLD_REPORT)
        if not headers and at == "host" and packet.protocol == UDP and data[:4] == b"\x02\x22\x02\x23":
            return len(data) > 8
        if standing not in ("own", "routed") or kind in (MLD_QUERY, MLD2_REPORT, *MRD6):
            return False
        if packet.protocol == AH:
            return not headers and data[:1] in (b"\x06", b"\x11", b"\x3a") and whole_header(packet)
        others = (HOP_BY_HOP, ICMP, IGMP, PIM, ROUTING, FRAGMENT, NO_NEXT, DESTINATION, 255)
        return packet.protocol not in others and whole_header(packet)

    def needed_discovery(self, sender: bytes, packet: Packet, kind: int) -> bool:
        """Neighbour discovery with its link-layer address as the first option, as all systems have it, or with none."""
        options, target = read_options(packet.data[ND_LENGTH[kind] :]), packet.data[8:24]
        if packet.hop_limit != 255 or packet.data[1] or len(packet.data) < ND_LENGTH[kind] or options is None:
            return False
        if packet.source == NOBODY:
            group = packet.target == SOLICITED_NODE + target[13:] and self.standing(sender, target) != "free"
            return not any(number == 1 for number, _ in options) and (kind == ROUTER_SOLICIT or group)
        if kind == ADVERT and self.standing(sender, target) == "free":
            return False
        return not options or options[0] == (2 if kind == ADVERT else 1, sender)


def taken_by_dhclient(frame: bytes) -> bool:
    """Tell whether the packet filter of a client's raw socket takes a frame (dhclient, udhcpc): it looks at little."""
    udp_first = len(frame) >= 34 and frame[23] == UDP and not frame[20] & 0x1F and not frame[21]
    return udp_first and frame[16 + (frame[14] & 15) * 4 :][:2] == b"\0\x44"


def read_options(data: bytes) -> list[tuple[int, bytes]] | None:
    """Return the options of neighbour discovery; None if they are malformed, and the message is dropped for it."""
    options = []
    while data:
        size = data[1] * 8 if len(data) > 1 else 0
        if not 0 < size <= len(data):
            return None
        options.append((data[0], data[2:size]))
        data = data[size:]
    return options


def whole_header(packet: Packet) -> bool:
    """Tell whether a header of an upper layer is there, whole, without a DHCP port, or in an earlier fragment."""
    size = len(packet.data)
    if packet.fragment:
        _, offset, more = packet.fragment
        if not size or (more and size % 8) or offset + size > 65000:
            return False
        if offset:
            return True
    if size < {TCP: 20, UDP: 8, ICMP: 8, ICMP6: 8, AH: 24}.get(packet.protocol, 4):
        return False
    ports = {DHCP_CLIENT, DHCP_SERVER, DHCP6_CLIENT, DHCP6_SERVER}
    return packet.protocol != UDP or not ports & set(struct.unpack_from("!HH", packet.data))
