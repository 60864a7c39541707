"""The frames of fuzz.py, what guests and attackers send and changes of it, and their judge: who may send what, by the
registry, the RFCs and what Linux does. Neither knows a rule.

The judge reads a frame as its receivers do, and says for each place, the host and another guest, whether it must not
arrive there (`forbidden`), is what an honest guest sends (`needed`), or neither. Where Linux drops what another system
may take, it judges what that system would see. It takes for granted that the Ethernet source address is the sender's
own (README: MAC filtering), and that the checksums behind IP are right, which an attacker can always see to.
"""

import random
import struct
from ipaddress import ip_address
from typing import NamedTuple

# ---- Who is who


def ip(text: str) -> bytes:
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


# ---- The frames

MULTICAST, MULTICAST6 = bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")
PORTS = (53, 67, 68, 546, 547, 1000, 5353, 6767)
LIKE_PORTS = struct.pack("!8H", 67, 68, 546, 547, 68, 67, 547, 546)


def seal(protocol: int, source: bytes, target: bytes, data: bytes) -> bytes:
    """Return the data of an upper layer with its checksum."""
    at = {ICMP: 2, IGMP: 2, PIM: 2, ICMP6: 2, TCP: 16, UDP: 6}.get(protocol, len(data))
    pseudo = b"" if protocol in (ICMP, IGMP, PIM) else source + target + struct.pack("!II", len(data), protocol)
    value = checksum(pseudo + data[:at] + data[at + 2 :]) or 0xFFFF
    return data[:at] + struct.pack("!H", value) + data[at + 2 :] if at + 2 <= len(data) else data


def udp(ports: tuple[int, int], data: bytes) -> tuple[int, bytes]:
    """Return a UDP datagram without its checksum, behind its protocol's number."""
    return UDP, struct.pack("!HHHH", *ports, 8 + len(data), 0) + data


class Generator:
    """Makes frames of one sender: what guests and attackers send, and changes of it. The seed decides all."""

    def __init__(self, seed: int):
        self.dice = random.Random(seed)
        others = [a for book in (OWNED, CLAIMED, ELSEWHERE) for addresses in book.values() for a in addresses]
        others += [eui64(HOST), eui64(NEWCOMER), eui64(VICTIM, PREFIX), *LEASED.values(), NOBODY, ZERO, BROADCAST]
        others += map(ip, ("10.83.0.66", "10.99.0.7", "10.98.0.7"))
        others += map(ip, ("2001:67c:99::7", "2001:67c:98::7", "fe80:0:0:1::7", "ff02::1"))
        for prefix in ("fe80", "2001:67c:83"):
            others += [ip(f"{prefix}::f00d:{self.dice.randrange(1 << 16):x}") for _ in range(4)]
        self.others = {size: [address for address in others if len(address) == size] for size in (4, 16)}
        self.honest = False  # then nothing unusual happens

    def start(self, sender: bytes) -> None:
        """Make frames of this sender from now on."""
        addresses = [prefix + bytes(size - len(prefix)) for prefix, size in ROUTED.get(sender, ())]
        addresses += [
            *OWNED.get(sender, ()),
            *CLAIMED[sender],
            LEASED.get(sender, b""),
            *(eui64(sender, prefix) for prefix in (LINK_LOCAL, PREFIX)),
            *(prefix + b"\0" + sender[5:] + self.dice.randbytes(6) for prefix in (LINK_LOCAL, PREFIX)),
        ]
        self.sender, self.own = sender, {size: [a for a in addresses if len(a) == size] for size in (4, 16)}

    def one_in(self, number: int) -> bool:
        """Tell whether something unusual happens."""
        return not self.dice.randrange(number) and not self.honest

    def pick(self, *things):
        return self.dice.choice(things)

    def changed(self, data: bytes, last: int = 48) -> bytes:
        """Return data with one of its first octets changed."""
        if not data:
            return data
        at = self.dice.randrange(min(last, len(data)))
        new = self.pick(0, 1, 0xFF, data[at] ^ 1 << self.dice.randrange(8), self.dice.randrange(256))
        return data[:at] + bytes([new]) + data[at + 1 :]

    def address(self, size: int, others_one_in: int = 3) -> bytes:
        """Return an address, the sender's own or, one in so many, any."""
        other = self.one_in(others_one_in) or not self.own[size]
        address = self.pick(*(self.others if other else self.own)[size])
        return self.changed(address) if self.one_in(50) else address

    def hardware(self) -> bytes:
        """Return the sender's hardware address, sometimes another's."""
        return self.pick(VICTIM, HOST, self.changed(self.sender)) if self.one_in(4) else self.sender

    def ports(self) -> tuple[int, int]:
        return (self.pick(*PORTS), self.pick(*PORTS)) if self.one_in(2) else (1000, 5353)

    # What guests and attackers send, each without a checksum, behind its protocol's number

    def dhcp(self) -> tuple[int, bytes]:
        server, relay = self.one_in(3), self.address(4) if self.one_in(7) else ZERO
        given = self.address(4) if server or self.one_in(7) else ZERO
        message = struct.pack("!BBBBI8x", 2 if server else 1, 1, 6, 0, self.dice.getrandbits(32))
        message += given + ZERO + relay + self.hardware() + bytes(202)
        message += b"\x63\x82\x53\x63\x35\1" + bytes([self.dice.randrange(1, 9), 255])
        return udp(self.ports() if self.one_in(4) else (67, 68) if server else (68, 67), message)

    def dhcp6(self) -> tuple[int, bytes]:
        kind = self.dice.randrange(14) if self.one_in(2) else self.pick(1, 3, 5, 6, 11)
        message = bytes([kind]) + self.dice.randbytes(3) + b"\0\1\0\x0a\0\3\0\1" + self.hardware()
        return udp(self.ports() if self.one_in(4) else (547, 546) if kind in (2, 7, 10, 13) else (546, 547), message)

    def discovery(self) -> tuple[int, bytes]:
        """Return neighbour discovery, usually with the option that it has."""
        kinds = (ROUTER_ADVERT, REDIRECT) if self.one_in(4) else (ROUTER_SOLICIT, SOLICIT, SOLICIT, ADVERT)
        kind = self.pick(*kinds)
        data = bytes([kind, 0, 0, 0]) + self.pick(bytes(4), b"\x60\0\0\0", b"\x40\0\x07\x08")
        data += {ROUTER_ADVERT: bytes(8), ROUTER_SOLICIT: b""}.get(kind, self.address(16))
        data += self.address(16) if kind == REDIRECT else b""
        name = bytes([1 + (kind in (ADVERT, REDIRECT)), 1])
        option, second, nonce = name + self.hardware(), name + self.hardware(), b"\x0e\1" + self.hardware()
        long = name[:1] + b"\2" + self.hardware() + bytes(8)
        if self.one_in(3):
            return ICMP6, data + self.pick(nonce + option, nonce + option, option + nonce, option + second, long, nonce)
        return ICMP6, data + self.pick(option, option, option, b"")

    def listener(self) -> tuple[int, bytes]:
        """Return multicast listener discovery of IPv6."""
        kind = MLD_QUERY if self.one_in(2) else self.pick(MLD_REPORT, MLD_REPORT, MLD_DONE, MLD2_REPORT)
        kind = self.pick(*MRD6) if self.one_in(6) else kind
        group = NOBODY if kind == MLD_QUERY and not self.one_in(4) else self.pick(ip("ff02::fb"), ip("ff02::1:ff00:12"))
        if kind == MLD2_REPORT:
            return ICMP6, bytes([kind]) + bytes(6) + b"\1\4" + bytes(3) + group
        version = bytes(4) if kind == MLD_QUERY and self.one_in(2) else b""
        return ICMP6, bytes([kind]) + bytes(3) + b"\0\x64\0\0" + group + version

    def igmp(self) -> tuple[int, bytes]:
        """Return group management of IPv4."""
        if self.one_in(6):
            return PIM, bytes([0x20, 0, 0, 0])  # a hello (RFC 7761, section 4.9.2)
        kind = self.pick(*MRD) if self.one_in(6) else 0x11 if self.one_in(2) else self.pick(0x12, 0x16, 0x17)
        group = ZERO if kind == 0x11 and not self.one_in(4) else self.pick(ip("224.0.0.251"), ip("239.1.2.3"))
        version = bytes(4) if kind == 0x11 and self.one_in(2) else b""
        return IGMP, bytes([kind, self.pick(0, 100), 0, 0]) + group + version

    def ordinary(self) -> tuple[int, bytes]:
        """Return data of TCP, UDP, an echo request, or another protocol."""
        size, kind = self.pick(0, 4, 16, 40, 120, 600), self.dice.randrange(8)
        data = (LIKE_PORTS * (size // 16 + 1))[:size] if self.one_in(2) else self.dice.randbytes(size)
        if kind < 3:
            return udp(self.ports(), data)
        if kind == 3:
            return TCP, struct.pack("!HHIIBBHHH", *self.ports(), 1, 0, 0x50, 2, 9999, 0, 0) + data
        if kind < 6:
            return ICMP, b"\x08\0\0\0" + self.dice.randbytes(4) + data
        if kind == 6:
            return AH, bytes([self.pick(ICMP6, UDP), 4]) + bytes(22) + self.discovery()[1]
        return self.pick(ESP, 47, NO_NEXT, 132, 135, 255), data

    # Packets and frames around it

    def fragments(self, data: bytes, fake: bytes) -> list[tuple[int, bool, bytes, bytes]]:
        """Return data in fragments, sometimes shuffled, doubled, lost: (offset, more follow, data, fake trailer)."""
        size = self.pick(8, 8, 16, 24, 40, 64, 200)
        last = min((len(data) - 1) // size, 5) * size if data else 0
        parts = [(at, True, data[at : at + size]) for at in range(0, last, size)] + [(last, False, data[last:])]
        if self.one_in(6):
            at, more, part = self.pick(*parts)
            extra = (max(0, at + self.pick(-8, 0, 8)), more, self.changed(part))
            parts.insert(self.dice.randrange(len(parts) + 1), extra)
        if self.one_in(3):
            self.dice.shuffle(parts)
        if self.one_in(10):
            parts.pop()
        if self.one_in(8):
            parts = [(self.pick(0, 8, 64), self.one_in(4), data)]
        fake = fake if self.one_in(2) else b""
        return [(at, more, part, fake[at + len(part) :][:80]) for at, more, part in parts]

    def packets_ip(self, protocol: int, data: bytes, fake: bytes) -> list[bytes]:
        """Return an IPv4 packet with this data, or one in fragments."""
        source, target = self.address(4), self.address(4, 1)
        if protocol == UDP and data[:4] == b"\0\x44\0\x43" and not self.one_in(3):
            source, target = self.pick((ZERO, BROADCAST), (source, ip("10.83.0.1")))
        if protocol == IGMP:
            target = bytes((224, 0, 0, 106 if data[0] in MRD else self.pick(1, 1, 2, 251)))
        elif protocol == PIM:
            target = ip("224.0.0.13")
        options = b"\x94\4\0\0" if protocol == IGMP or self.one_in(20) else b""
        data, number = seal(protocol, source, target, data), self.dice.randrange(1 << 16)
        parts, packets = self.fragments(data, fake) if self.one_in(3) else [(0, False, data, b"")], []
        for at, more, part, trailer in parts:
            head = struct.pack(
                "!BxHHH", 0x45 + len(options) // 4, 20 + len(options + part), number, at // 8 | more << 13
            )
            head += struct.pack("!BBxx", 1 if protocol == IGMP else 64, protocol) + source + target + options
            head = self.changed(head, self.pick(4, 24)) if self.one_in(15) else head
            right = checksum(head[:10] + head[12:])
            packets.append(head[:10] + struct.pack("!H", 0 if self.one_in(50) else right) + head[12:] + part + trailer)
        return packets

    def extension_headers(self) -> list[tuple[int, bytes]]:
        """Return extension headers, (number, all but the first octet), the fragment header not among them."""
        headers = []
        for _ in range(self.pick(1, 1, 1, 2, 3)):
            number = self.pick(HOP_BY_HOP, DESTINATION, DESTINATION, ROUTING, AH, AH)
            options = self.pick(PADDING, ROUTER_ALERT, SKIPPED)
            if self.one_in(4):  # an address where a check at a fixed offset looks for a target
                options = SKIPPED_LONG + bytes(4) + self.address(16, 10)
            bodies = {ROUTING: bytes([0, self.pick(0, 2, 4), 0]) + bytes(4), AH: b"\4" + bytes(22)}
            headers.append((number, bodies.get(number, bytes([len(options) // 8]) + options)))
        return headers

    def endpoints(self, protocol: int, data: bytes) -> tuple[bytes, bytes, bytes]:
        """Return source, target and data of an IPv6 packet, as its kind has them."""
        kind, source, target = data[0] if protocol == ICMP6 and data else 0, self.address(16), self.address(16, 1)
        if protocol == UDP and not self.one_in(2):
            target = DHCP6_AGENTS
        elif kind == MLD_QUERY or kind in MRD6:
            target = ip("ff02::1" if kind == MLD_QUERY else "ff02::6a")
        elif kind == SOLICIT and self.one_in(3):
            return NOBODY, SOLICITED_NODE + data[21:24], data if self.one_in(10) else data[:24]
        elif kind in (ROUTER_SOLICIT, MLD_REPORT, MLD2_REPORT) and self.one_in(3):
            return NOBODY, target, data if kind != ROUTER_SOLICIT or self.one_in(10) else data[:8]
        return source, target, data

    def packets_ip6(self, protocol: int, data: bytes, fake: bytes) -> list[bytes]:
        """Return an IPv6 packet with this data, or one in fragments, sometimes behind extension headers."""
        source, target, data = self.endpoints(protocol, data)
        kind = data[0] if protocol == ICMP6 and data else 0
        group = kind in (MLD_QUERY, MLD_REPORT, MLD_DONE, MLD2_REPORT, *MRD6)
        before = [(HOP_BY_HOP, b"\0" + ROUTER_ALERT)] if group and not self.one_in(6) else []
        before += self.extension_headers() if self.one_in(4) else []
        data = seal(protocol, source, target, data)
        parts, number = [(0, False, data, b"")], self.dice.randbytes(4)
        fragmented = self.one_in(3)
        if fragmented:
            protocol, row = in_a_row(self.extension_headers() if self.one_in(3) else [], protocol)
            parts = self.fragments(row + data, self.pick(row, row, b"", bytes(8)) + fake)
        hop_limit, flow, packets = 255 if kind in ND_LENGTH else 1 if group else 64, self.pick(*PORTS, 0x12345), []
        for at, more, part, trailer in parts:
            header = [(FRAGMENT, b"\0" + struct.pack("!H", at | more) + number)] if fragmented else []
            first, row = in_a_row(before + header, protocol)
            head = struct.pack("!IHBB", 6 << 28 | flow, len(row + part), first, hop_limit) + source + target
            packets.append((self.changed(head) if self.one_in(30) else head) + row + part + trailer)
        return packets

    def arp(self) -> bytes:
        source = ZERO if self.one_in(5) else self.address(4)
        data = struct.pack("!HHBBH", 6 if self.one_in(10) else 1, IP, 6, 4, self.pick(1, 2)) + self.hardware() + source
        data += self.pick(bytes(6), VICTIM) + self.address(4, 2)
        return self.changed(data) if self.one_in(10) else data

    def frames(self) -> list[bytes]:
        """Return the next frame, or the fragments of a packet as frames."""
        target = BRIDGE_GROUP + bytes([self.pick(0, 2, 3, 14, 14, 14, 15)]) if self.one_in(16) else None
        kind = self.dice.choices((ARP, IP, IP6), (8, 35, 57))[0]
        if kind == ARP:
            return [self.framed(target or self.pick(VICTIM, HOST, EVERYONE), ARP, self.arp())]
        makers = {
            IP: (self.dhcp, self.igmp, self.ordinary),
            IP6: (self.dhcp6, self.listener, self.discovery, self.ordinary),
        }
        make = self.dice.choices(makers[kind], (2, 2, 4, 3)[-len(makers[kind]) :])[0]
        protocol, data = make()
        self.honest = True
        fake = make()[1]
        self.honest = False
        if protocol == ICMP and kind == IP6:
            protocol, data = ICMP6, b"\x80" + data[1:]
        data = self.changed(data) if self.one_in(20) else data
        group = MULTICAST if kind == IP else MULTICAST6
        target = target or (group if make in (self.igmp, self.listener) else self.pick(VICTIM, HOST, EVERYONE, group))
        packets = (self.packets_ip if kind == IP else self.packets_ip6)(protocol, data, fake)
        return [self.framed(target, kind, packet) for packet in packets]

    def framed(self, target: bytes, kind: int, packet: bytes) -> bytes:
        """Return a packet as a frame, sometimes one that is tagged, cut off, longer, changed, or of another form."""
        start, form = target + self.sender, self.dice.randrange(100)
        packet = packet[:1480]
        if form < 3:
            tags = "81000000", "8100a000", "81000007", "88a80007", "88a8000781000000", "8100000081000000"
            start += bytes.fromhex(self.pick(*tags))
        elif form == 3:  # IEEE 802.3 with SNAP
            start += struct.pack("!H", len(packet) + 8) + b"\xaa\xaa\3\0\0\0"
        elif form == 4:
            return start + self.pick(b"\x80\x35", b"\x88\xcc", b"\x88\x47", b"\x91\0") + packet
        elif form < 7:
            packet = packet[: self.dice.randrange(1, len(packet) + 1)]
        elif form < 10:
            packet = packet[:1400] + self.dice.randbytes(self.pick(1, 8, 80))
        elif form < 12:
            packet = self.changed(packet, 80)
        return start + struct.pack("!H", kind) + packet


def in_a_row(headers: list[tuple[int, bytes]], protocol: int) -> tuple[int, bytes]:
    """Return extension headers in a row before a protocol, behind the number of the first."""
    row = b""
    for number, rest in reversed(headers):
        row, protocol = bytes([protocol]) + rest + row, number
    return protocol, row
