"""The frames of fuzz.py: what guests and attackers send, and changes of it."""

import random
import struct

from fuzz_judge import (
    ADVERT,
    AH,
    ARP,
    BRIDGE_GROUP,
    BROADCAST,
    CLAIMED,
    DESTINATION,
    DHCP6_AGENTS,
    ELSEWHERE,
    ESP,
    EVERYONE,
    FRAGMENT,
    HOP_BY_HOP,
    HOST,
    ICMP,
    ICMP6,
    IGMP,
    IP,
    IP6,
    LEASED,
    LINK_LOCAL,
    MLD2_REPORT,
    MLD_DONE,
    MLD_QUERY,
    MLD_REPORT,
    MRD,
    MRD6,
    ND_LENGTH,
    NEWCOMER,
    NO_NEXT,
    NOBODY,
    OWNED,
    PADDING,
    PIM,
    PREFIX,
    REDIRECT,
    ROUTED,
    ROUTER_ADVERT,
    ROUTER_ALERT,
    ROUTER_SOLICIT,
    ROUTING,
    SKIPPED,
    SKIPPED_LONG,
    SOLICIT,
    SOLICITED_NODE,
    TCP,
    UDP,
    VICTIM,
    ZERO,
    checksum,
    eui64,
    ip,
)

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
        """Return one of the things."""
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
        """Return UDP ports."""
        return (self.pick(*PORTS), self.pick(*PORTS)) if self.one_in(2) else (1000, 5353)

    # What guests and attackers send, each without a checksum, behind its protocol's number

    def dhcp(self) -> tuple[int, bytes]:
        """Return a message of a DHCP client or server."""
        server, relay = self.one_in(3), self.address(4) if self.one_in(7) else ZERO
        given = self.address(4) if server or self.one_in(7) else ZERO
        message = struct.pack("!BBBBI8x", 2 if server else 1, 1, 6, 0, self.dice.getrandbits(32))
        message += given + ZERO + relay + self.hardware() + bytes(202)
        message += b"\x63\x82\x53\x63\x35\1" + bytes([self.dice.randrange(1, 9), 255])
        return udp(self.ports() if self.one_in(4) else (67, 68) if server else (68, 67), message)

    def dhcp6(self) -> tuple[int, bytes]:
        """Return a message of DHCPv6, of any kind."""
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
        """Return ARP: a request, a reply or a probe."""
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
