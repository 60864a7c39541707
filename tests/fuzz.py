#!/usr/bin/env python3
"""Send frames that nobody normal sends through the guard of a bridge, and judge what arrives behind it.

As root: /usr/bin/python3 -B tests/fuzz.py [--frames N] [--seed N] [--br-netfilter 0|1] [--rules FILE]. The guard is
examples/nftables/bridge.nft with the chains of REGISTRY, or a rule file that needs neither. The last line has the seed, which repeats
the run. Each finding is a line with what is needed to send its frames again, alone and in the same way:

    tests/fuzz.py --again SENDER raw|ring FRAME...        frames in hexadecimal, as the line has them

--without-each-rule takes the guard's rules away by turns and prints which of them a run missed; --without N takes away the one.

Exit status: 0 nothing found, 1 a violation (what must not arrive did) or a false drop (what an honest guest sends did not).
Limits on how often a guest may do something are lifted first, since they would stop what is to be judged.

The judge knows the registry, the RFCs, and what Linux does with a frame; of the guard's rules it knows nothing. It reads a frame as
its receivers do and says of each place, the host and another guest, whether the frame must not arrive (`forbidden`), is what an
honest guest sends (`needed`), or neither. Where Linux drops a malformed frame but some other system may not, it is read as the
other system reads it. It takes for granted that the Ethernet source address is the sender's own (README: MAC filtering), and does
not verify checksums behind IP, which an attacker can always get right.
"""

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import random
import re
import select
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple

from lab import PROCESS, Host, environment

# ---- Who is who


def mac(last: str) -> bytes:
    """Return the MAC address of the registry that ends so."""
    return bytes.fromhex("10666a4ca1" + last)


def eui64(owner: bytes) -> bytes:
    """Return the link-local address made from a MAC address (RFC 4291, appendix A)."""
    return LINK_LOCAL + bytes([owner[0] ^ 2]) + owner[1:3] + b"\xff\xfe" + owner[3:]


LINK_LOCAL = bytes.fromhex("fe80000000000000")
HOST, WEB, VICTIM, MAIL, CLOCK, NEWCOMER = (mac(end) for end in ("fe", "11", "12", "14", "15", "66"))
REGISTERED = {
    HOST: ["10.83.0.1", "2001:67c:83::1", "fd83:5eed::1", "fe80::8099:e2ff:5d8a:32"],
    WEB: ["10.83.0.11", "2001:67c:83::11", "fd83:5eed::11", "10.83.0.50", "2001:67c:83::50"],
    VICTIM: ["10.83.0.12"],
    MAIL: ["fd83:5eed::14"],
    CLOCK: ["10.83.0.15"],
}
NETWORKS = {WEB: ["10.99.0.0/24", "2001:67c:99::/64"]}
ALLOWED = {WEB: ["10.83.0.50", "10.99.0.0/24", "2001:67c:83::50", "2001:67c:99::/64"]}
FIRST_COME = {m: ip_address(f"fe80::c0de:{m[5]:x}").packed for m in (WEB, VICTIM, MAIL, NEWCOMER)}
SENDERS = {"web": WEB, "mail": MAIL, "newcomer": NEWCOMER}


def registry_text() -> str:
    """Return the registry as instances.json has it."""
    registry = {}
    for owner, addresses in REGISTERED.items():
        entry = {"name": "", "ipv6_lla": str(ip_address(eui64(owner)))}
        for address in addresses:
            field = {"1": "ipv4", "2": "ipv6_gua", "fd": "ipv6_ula", "fe": "ipv6_lla"}
            key = next(f for start, f in field.items() if address.startswith(start))
            if address not in ALLOWED.get(owner, []):
                entry[key] = address
        registry[owner.hex(":")] = entry | ({"allowed": ALLOWED[owner]} if owner in ALLOWED else {})
    return json.dumps(registry, indent=2)


# ---- The judge

ARP, IP, IP6, TAGS = 0x0806, 0x0800, 0x86DD, (0x8100, 0x88A8)
ICMP, IGMP, TCP, UDP, ESP, AH, ICMP6 = 1, 2, 6, 17, 50, 51, 58
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
ROUTER_SOLICIT, ROUTER_ADVERT, SOLICIT, ADVERT, REDIRECT = 133, 134, 135, 136, 137
MLD_QUERY, MLD_REPORT, MLD_DONE, MLD2_REPORT = 130, 131, 132, 143
ND_LENGTH = {ROUTER_SOLICIT: 8, ROUTER_ADVERT: 16, SOLICIT: 24, ADVERT: 24, REDIRECT: 40}
NOBODY = bytes(16)
BROADCAST, ZERO = b"\xff" * 4, bytes(4)
DHCP_AGENTS = ip_address("ff02::1:2").packed
BRIDGE_GROUP = bytes.fromhex("0180c20000")  # IEEE 802.1D, table 7-10: not forwarded, or by special rules
EVERYONE = b"\xff" * 6
SOUND_OPTIONS = (b"\1\4\0\0\0\0", b"\5\2\0\0\1\0", b"\x1e\4", b"\x1e\x14")  # padding, router alert, one to skip (RFC 8200, 4.2)


class Packet(NamedTuple):
    """An IP packet as its receiver reads it: nothing behind the length that it tells."""

    source: bytes
    destination: bytes
    hop_limit: int
    headers: tuple  # the IPv6 extension headers
    protocol: int  # of the upper layer; what is encrypted or authenticated counts as one
    data: bytes  # of the upper layer
    fragment: tuple  # (identification, offset, more follow) or ()
    length: int
    head: bytes  # what comes before the part that is in fragments
    sound: bool = True  # the options are such that every receiver passes over them


def checksum(data: bytes) -> int:
    """Return the internet checksum of data (RFC 1071): 0 if data has the right one within it."""
    return -int.from_bytes(data + bytes(len(data) & 1), "big") % 0xFFFF


def read_ip(body: bytes) -> Packet | None:
    """Read IPv4 as Linux's ip_rcv does; None is what it drops."""
    if len(body) < 20 or body[0] >> 4 != 4:
        return None
    header, (length, number, bits) = (body[0] & 15) * 4, struct.unpack_from("!HHH", body, 2)
    if not 20 <= header <= length <= len(body):
        return None
    offset, more = (bits & 0x1FFF) * 8, bool(bits & 0x2000)
    fragment = (number, offset, more) if offset or more else ()
    data = body[header:length]
    return Packet(body[12:16], body[16:20], body[8], (), body[9], data, fragment, length, body[:header])


def read_ip6(body: bytes) -> Packet | None:
    """Read IPv6 as Linux's ip6_rcv and its extension headers do, options unread; None is what it drops."""
    if len(body) < 40 or body[0] >> 4 != 6 or body[8] == 0xFF:
        return None
    length, following, sound = 40 + int.from_bytes(body[4:6], "big"), body[6], True
    if length == 40 and following == HOP_BY_HOP:
        length, sound = len(body), False  # left to a jumbo payload option
    if length > len(body):
        return None
    body, at, headers, fragment, named_at = body[:length], 40, [], (), 6
    while following in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT) and not fragment:
        size = 8 if following == FRAGMENT else 8 * (1 + body[at + 1]) if at + 8 <= length else 8
        if at + size > length or (following == HOP_BY_HOP and headers):
            return None
        if following == FRAGMENT:
            bits = int.from_bytes(body[at + 2 : at + 4], "big")
            if bits & 0xFFF9:  # otherwise it is whole (RFC 6946)
                head = body[:named_at] + body[at : at + 1] + body[named_at + 1 : at]
                fragment = (body[at + 4 : at + 8], bits & 0xFFF8, bool(bits & 1))
        elif following != ROUTING:
            sound &= body[at + 2 : at + size].startswith(SOUND_OPTIONS)
        headers.append(following)
        following, named_at, at = body[at], at, at + size
    return Packet(
        body[8:24], body[24:40], body[7], tuple(headers), following, body[at:], fragment, length, head if fragment else b"", sound
    )


def untagged(frame: bytes) -> bytes:
    """Return a frame without its VLAN tags."""
    while int.from_bytes(frame[12:14], "big") in TAGS and len(frame) >= 18:
        frame = frame[:12] + frame[16:]
    return frame


def read(frame: bytes) -> Packet | None:
    """Read the IP packet of a frame."""
    kind = int.from_bytes(frame[12:14], "big")
    return read_ip(frame[14:]) if kind == IP else read_ip6(frame[14:]) if kind == IP6 else None


class Reassembly:
    """Puts fragments together as Linux does (inet_frag_queue_insert): what overlaps ends the datagram (RFC 5722)."""

    def __init__(self):
        self.queues = {}

    def add(self, frame: bytes) -> tuple[bytes, list[bytes]] | None:
        """Take a fragment; return the whole as a frame, and the frames it came in, when it is the last that was missing."""
        packet = read(frame)
        number, begin, more = packet.fragment
        end = begin + len(packet.data)
        if more and len(packet.source) == 4:
            end &= ~7
        key = (packet.source, packet.destination, number, packet.protocol if len(packet.source) == 4 else 0)
        queue = self.queues.setdefault(key, {"length": 0, "last": False, "runs": [], "parts": {}, "frames": [], "head": b""})
        if (more and (end & 7 or queue["last"] and end > queue["length"])) or end == begin:
            return None
        if not more and (end < queue["length"] or queue["last"] and end != queue["length"]):
            return None
        if any(first <= begin and end <= last for first, last in queue["runs"]):
            return None  # had already
        if any(begin < last and first < end for first, last in queue["runs"]):
            del self.queues[key]
            return None
        queue["runs"] = self.joined([*queue["runs"], (begin, end)])
        queue["last"] |= not more
        queue["length"] = max(queue["length"], end)
        queue["parts"][begin] = packet.data[: end - begin]
        queue["frames"].append(frame)
        queue["head"] = queue["head"] or (frame[:14] + packet.head if begin == 0 else b"")
        if not queue["last"] or queue["runs"] != [(0, queue["length"])]:
            return None
        del self.queues[key]
        return self.whole(queue["head"], b"".join(queue["parts"][at] for at in sorted(queue["parts"]))), queue["frames"]

    @staticmethod
    def joined(runs: list) -> list:
        """Return runs of octets with those made one that follow each other."""
        result = []
        for begin, end in sorted(runs):
            if result and result[-1][1] == begin:
                begin = result.pop()[0]
            result.append((begin, end))
        return result

    @staticmethod
    def whole(head: bytes, data: bytes) -> bytes:
        """Return the frame with a whole datagram, of the first fragment's headers and all the data."""
        ip = bytearray(head[14:])
        if ip[0] >> 4 == 4:
            struct.pack_into("!H2xH", ip, 2, len(ip) + len(data), 0)
        else:
            struct.pack_into("!H", ip, 4, len(ip) - 40 + len(data))
        return head[:14] + bytes(ip) + data


class Judge:
    """Says what a sender's frame may do; knows who has come first with which link-local address."""

    def __init__(self):
        self.claims = {address: owner for owner, address in FIRST_COME.items()}
        self.owned = {owner: {ip_address(a).packed for a in addresses} for owner, addresses in REGISTERED.items()}
        for owner in REGISTERED:
            if owner != HOST:
                self.owned[owner].add(eui64(owner))
        networks = {owner: map(ip_network, names) for owner, names in NETWORKS.items()}
        self.prefixes = {o: [(n.max_prefixlen // 8, n.network_address.packed[: n.prefixlen // 8]) for n in ns] for o, ns in networks.items()}
        self.reserved = set().union(*self.owned.values())

    def standing(self, sender: bytes, address: bytes) -> str:
        """Tell whose an address is: the sender's "own" or "routed", one to join with ("new"), "free" to claim, "none", or "foreign"."""
        if address in self.owned.get(sender, ()):
            return "own"
        if any(len(address) == size and address.startswith(prefix) for size, prefix in self.prefixes.get(sender, ())):
            return "routed"
        if address == NOBODY:
            return "none"
        if address[:8] == LINK_LOCAL and address not in self.reserved:
            if address[11:13] == b"\xff\xfe":
                return "new" if address == eui64(sender) else "foreign"
            unclaimed = "new" if address[8:10] == b"\0" + sender[5:] else "free"  # the generator gives it to nobody else
            return {None: unclaimed, sender: "new"}.get(self.claims.get(address), "foreign")
        return "foreign"

    def settle(self, sender: bytes, frame: bytes) -> None:
        """Note the addresses that a frame claimed, once it has arrived."""
        packet = read(frame)
        if packet and len(packet.source) == 16:
            kind = packet.data[0] if packet.protocol == ICMP6 and packet.data else None
            target = packet.data[8:24] if kind == ADVERT or kind == SOLICIT and packet.source == NOBODY else b""
            for address in (packet.source, target):
                if len(address) == 16 and self.standing(sender, address) == "free":
                    self.claims[address] = sender

    def forbidden(self, frame: bytes, at: str) -> str:
        """Return why a frame must not arrive at the "host", a "guest" or, past the bridge, at the host's "port"; "" if it may."""
        sender, kind = frame[6:12], int.from_bytes(frame[12:14], "big")
        if kind in TAGS:
            return "VLAN tag" if at != "port" else self.forbidden(untagged(frame), "host")
        if kind == ARP:
            return self.forbidden_arp(sender, frame[14:])
        if kind not in (IP, IP6):
            return "other protocol" if at != "port" else ""  # the kernel hands it to nobody
        if kind == IP and at == "guest" and self.raw_dhcp(frame):
            return "DHCP server's message, as a client's raw socket reads it"
        packet = read(frame)
        if not packet:
            return ""
        return (self.forbidden_ip if kind == IP else self.forbidden_ip6)(sender, frame[:6], packet, at)

    def forbidden_arp(self, sender: bytes, body: bytes) -> str:
        """Linux takes hardware of Ethernet and of IEEE 802; RFC 5227 says what a probe does to its target."""
        if len(body) < 28 or body[:2] not in (b"\0\1", b"\0\6") or body[2:6] != b"\x08\0\6\4" or body[6:8] not in (b"\0\1", b"\0\2"):
            return ""
        hardware, address, target = body[8:14], body[14:18], body[24:28]
        if address == ZERO:
            return "" if self.standing(sender, target) == "own" else "probe for an address that is not the sender's"
        if self.standing(sender, address) != "own":
            return "ARP of an address that is not the sender's"
        return "" if hardware == sender else "ARP of another's hardware address"

    @staticmethod
    def raw_dhcp(frame: bytes) -> bool:
        """Tell whether the packet filter of a DHCP client takes a frame: it looks at little (dhclient's common/bpf.c, udhcpc)."""
        if len(frame) < 34 or frame[23] != UDP or frame[20] & 0x1F or frame[21]:
            return False
        return frame[16 + (frame[14] & 15) * 4 :][:2] == b"\0\x44"

    def forbidden_ip(self, sender: bytes, to: bytes, packet: Packet, at: str) -> str:
        """IPv4: by source, then by what the whole packet says."""
        ports, fragment, data = packet.data[:4], packet.fragment, packet.data
        request = packet.protocol == UDP and not fragment and ports[2:] == b"\0\x43" and len(data) >= 42
        if request:
            if at == "guest":
                return "DHCP request that another guest hears"
            if data[8:11] != b"\1\1\6" or data[32:36] != ZERO or data[36:42] != sender:
                return "DHCP request in another's name"
            # A client whose lease is not registered renews it: its server only is to hear that.
            if ports[:2] == b"\0\x44" and (packet.destination == BROADCAST or (to, packet.destination) == (HOST, b"\x0a\x53\0\1")):
                return ""
        if self.standing(sender, packet.source) not in ("own", "routed"):
            return "IPv4 from an address that is not the sender's"
        if not fragment and packet.protocol == UDP and len(data) >= 8 and (ports[:2] == b"\0\x43" or ports[2:] == b"\0\x44"):
            return "DHCP server's message"
        if not fragment and packet.protocol == IGMP and data[:1] == b"\x11" and len(data) >= 8:
            return "IGMP query"
        return ""

    def forbidden_ip6(self, sender: bytes, to: bytes, packet: Packet, at: str) -> str:
        """IPv6: by source, then by what the whole packet says."""
        standing = self.standing(sender, packet.source)
        if standing == "foreign":
            return "IPv6 from an address that is not the sender's"
        if packet.fragment or (packet.protocol == ICMP6 and len(packet.data) < 8):
            return ""  # says nothing, or not until it is whole
        kind = packet.data[0] if packet.protocol == ICMP6 else None
        why = self.forbidden_nd(sender, kind, packet) or self.forbidden_dhcp6(packet, at)
        if why or standing in ("own", "routed"):
            return why
        if standing == "none":
            joins = (ROUTER_SOLICIT, SOLICIT, MLD_REPORT, MLD2_REPORT)
            return "" if kind in joins else "IPv6 from no address that is not to join"
        joins = (ROUTER_SOLICIT, SOLICIT, ADVERT, MLD_REPORT, MLD_DONE, MLD2_REPORT)
        dhcp = packet.protocol == UDP and packet.data[:4] == b"\x02\x22\x02\x23" and packet.destination == DHCP_AGENTS
        return "" if kind in joins or dhcp else "IPv6 of a newcomer that is not to join"

    def forbidden_nd(self, sender: bytes, kind: int | None, packet: Packet) -> str:
        """Neighbour discovery (RFC 4861) that a receiver takes: hop limit 255, code 0, whole; and multicast queries."""
        if kind == MLD_QUERY and len(packet.data) >= 24:
            return "MLD query"
        if kind not in ND_LENGTH or packet.hop_limit != 255 or packet.data[1] or len(packet.data) < ND_LENGTH[kind]:
            return ""
        if kind in (ROUTER_ADVERT, REDIRECT):
            return "router's message"
        target = packet.data[8:24]
        if kind == ADVERT or (kind == SOLICIT and packet.source == NOBODY):
            if self.standing(sender, target) not in ("own", "new", "free"):
                return "neighbour discovery of an address that is not the sender's"
        options = read_options(packet.data[ND_LENGTH[kind] :])
        link_layer = next((value for number, value in options or () if number == (2 if kind == ADVERT else 1)), sender)
        if link_layer != sender and len(link_layer) == 6 and packet.source != NOBODY:
            return "link-layer address that is not the sender's"
        return ""

    @staticmethod
    def forbidden_dhcp6(packet: Packet, at: str) -> str:
        """DHCPv6 (RFC 8415): a guest is a client, and ends no lease."""
        if packet.protocol != UDP or len(packet.data) < 9:
            return ""
        source, destination = struct.unpack_from("!HH", packet.data)
        if source == 547 or destination == 546:
            return "DHCPv6 server's message"
        if destination != 547:
            return ""
        if at == "guest":
            return "DHCPv6 request that another guest hears"
        return "" if packet.data[8] in (1, 3, 4, 5, 6, 11) else "DHCPv6 message that is no client's own"

    def needed(self, frame: bytes, at: str) -> bool:
        """Tell whether an honest guest sends such a frame to the "host" or a "guest": it is well-formed in every way."""
        sender, kind = frame[6:12], int.from_bytes(frame[12:14], "big")
        to_one = frame[:6] == (HOST if at == "host" else VICTIM)
        if not (to_one or frame[0] & 1) or frame[:5] == BRIDGE_GROUP or self.forbidden(frame, at):
            return False
        if kind == ARP:
            return frame[14:20] == b"\0\1\x08\0\6\4" and frame[20:22] in (b"\0\1", b"\0\2") and (
                len(frame) >= 42 and frame[22:28] == sender
            )
        packet = read(frame)
        if not packet or len(frame) != 14 + packet.length and (len(frame) > 60 or any(frame[14 + packet.length :])):
            return False
        return (self.needed_ip if kind == IP else self.needed_ip6)(sender, packet, at)

    def needed_ip(self, sender: bytes, packet: Packet, at: str) -> bool:
        """IPv4 from an own address, but for protocols that are not in use; and DHCP of one that joins or renews."""
        if checksum(packet.head):
            return False
        if at == "host" and packet.protocol == UDP and not packet.fragment and packet.data[:4] == b"\0\x44\0\x43":
            return len(packet.data) >= 44
        if packet.protocol == IGMP:
            return not packet.fragment and len(packet.data) == 8 and packet.data[0] in (0x12, 0x16, 0x17) and not checksum(packet.data)
        return packet.protocol not in (0, 255, ICMP6) and needed_upper(packet)

    def needed_ip6(self, sender: bytes, packet: Packet, at: str) -> bool:
        """IPv6 from an own address, with ordinary extension headers, and what a newcomer sends to join."""
        standing, data, headers, fragment = self.standing(sender, packet.source), packet.data, packet.headers, packet.fragment
        if standing == "free" or not packet.sound or ROUTING in headers or (FRAGMENT in headers and not fragment):
            return False
        if packet.protocol == ICMP6 and headers[:1] == (HOP_BY_HOP,) and (fragment or not right_checksum(packet)):
            return False  # a bridge that listens to reports drops it as a broken one
        kind = data[0] if packet.protocol == ICMP6 and len(data) >= 8 and not (fragment and fragment[1]) else None
        if kind in ND_LENGTH:
            return not headers and self.needed_nd(sender, kind, packet)
        if kind in (MLD_REPORT, MLD_DONE):
            return headers == (HOP_BY_HOP,) and packet.hop_limit == 1 and needed_mld(packet) and (kind == MLD_REPORT or any(packet.source))
        if not headers and at == "host" and packet.protocol == UDP and data[:4] == b"\x02\x22\x02\x23":
            return len(data) > 8
        if standing not in ("own", "routed") or kind in (MLD_QUERY, MLD2_REPORT):
            return False
        if packet.protocol in (HOP_BY_HOP, ICMP, IGMP, ROUTING, FRAGMENT, 59, DESTINATION, 255):
            return False
        if packet.protocol == AH and (headers or data[:1] not in (b"\x06", b"\x11", b"\x3a")):
            return False  # before an upper layer at once
        return needed_upper(packet)

    def needed_nd(self, sender: bytes, kind: int, packet: Packet) -> bool:
        """The link-layer address option is the first, as all systems send it, or there is none."""
        options = read_options(packet.data[ND_LENGTH[kind] :])
        if packet.hop_limit != 255 or packet.data[1] or len(packet.data) < ND_LENGTH[kind] or options is None:
            return False
        if packet.source == NOBODY:
            to_group = packet.destination == bytes.fromhex("ff0200000000000000000001ff") + packet.data[21:24]
            new = self.standing(sender, packet.data[8:24]) != "free"
            return not any(n == 1 for n, _ in options) and (kind == ROUTER_SOLICIT or kind == SOLICIT and to_group and new)
        if kind == SOLICIT and packet.data[8] == 0xFF or kind == ADVERT and self.standing(sender, packet.data[8:24]) == "free":
            return False
        return not options or options[0] == (2 if kind == ADVERT else 1, sender)


def read_options(data: bytes) -> list[tuple[int, bytes]] | None:
    """Return the options of neighbour discovery; None if they are not well-formed, and the message is dropped."""
    options = []
    while data:
        size = data[1] * 8 if len(data) > 1 else 0
        if not 0 < size <= len(data):
            return None
        options.append((data[0], data[2:size]))
        data = data[size:]
    return options


def needed_upper(packet: Packet) -> bool:
    """Tell whether an upper layer is whole (RFC 7112), or a later fragment follows the rules of its IP version."""
    if packet.fragment:
        _, offset, more = packet.fragment
        if not packet.data or more and len(packet.data) % 8 or offset + len(packet.data) > 65000:
            return False
        if offset:
            return True
    shortest = {TCP: 20, UDP: 8, ICMP: 8, ICMP6: 8, AH: 24, ESP: 8}.get(packet.protocol, 4)
    if len(packet.data) < shortest:
        return False
    if packet.protocol == UDP:
        ports = struct.unpack_from("!HH", packet.data)
        return not {67, 68, 546, 547} & set(ports)
    return True


def needed_mld(packet: Packet) -> bool:
    """Tell whether a listener report is whole (RFC 2710)."""
    return len(packet.data) == 24 and packet.data[8] == 0xFF


def right_checksum(packet: Packet) -> bool:
    """Tell whether ICMPv6 has the right checksum."""
    return not checksum(packet.source + packet.destination + struct.pack("!II", len(packet.data), ICMP6) + packet.data)


# ---- The generator

PORTS = (53, 67, 68, 546, 547, 1000, 5353, 6767, 6547)
SERVER_LIKE = struct.pack("!8H", 67, 68, 546, 547, 68, 67, 547, 546)  # what later fragments' data may look like


def seal(protocol: int, source: bytes, destination: bytes, data: bytes) -> bytes:
    """Return the data of an upper layer with its checksum."""
    at = {ICMP: 2, IGMP: 2, ICMP6: 2, TCP: 16, UDP: 6}.get(protocol)
    if at is None or len(data) < at + 2:
        return data
    pseudo = b"" if protocol in (ICMP, IGMP) else source + destination + struct.pack("!II", len(data), protocol)
    data = data[:at] + bytes(2) + data[at + 2 :]
    return data[:at] + (checksum(pseudo + data) or 0xFFFF).to_bytes(2, "big") + data[at + 2 :]


def udp(source: int, destination: int, data: bytes) -> bytes:
    """Return a UDP datagram without its checksum."""
    return struct.pack("!HHHH", source, destination, 8 + len(data), 0) + data


def join_headers(parts: list[tuple[int, bytes]], protocol: int) -> tuple[int, bytes]:
    """Return IPv6 extension headers, each without its first octet, in a row before a protocol, and the first one's number."""
    row = b""
    for number, rest in reversed(parts):
        row, protocol = bytes([protocol]) + rest + row, number
    return protocol, row


class Generator:
    """Makes frames of one sender: first what guests or attackers send, then changes of it. The seed decides all."""

    def __init__(self, seed: int):
        self.dice = random.Random(seed)
        others = [ip_address(a).packed for addresses in REGISTERED.values() for a in addresses]
        others += [eui64(owner) for owner in (HOST, VICTIM, MAIL, NEWCOMER)] + list(FIRST_COME.values())
        others += [ip_address(a).packed for a in ("10.83.0.66", "10.99.0.7", "10.98.0.7", "0.0.0.0", "255.255.255.255")]
        others += [ip_address(a).packed for a in ("::", "2001:67c:99::7", "2001:67c:98::7", "fe80:0:0:1::7", "ff02::1")]
        others += [ip_address(f"fe80::f00d:{self.dice.randrange(1 << 16):x}").packed for _ in range(6)]
        self.others = {size: [a for a in others if len(a) == size] for size in (4, 16)}
        self.sender = NEWCOMER

    def likely(self, percent: float) -> bool:
        """Tell whether something with this likelihood happens."""
        return self.dice.random() * 100 < percent

    def start(self, sender: bytes) -> None:
        """Make frames of this sender from now on."""
        addresses = [ip_address(a).packed for a in REGISTERED.get(sender, [])]
        addresses += [ip_network(network)[7].packed for network in NETWORKS.get(sender, [])]
        addresses += [eui64(sender), FIRST_COME[sender], LINK_LOCAL + b"\0" + sender[5:] + self.dice.randbytes(6)]
        self.sender, self.own = sender, {size: [a for a in addresses if len(a) == size] for size in (4, 16)}

    def address(self, size: int, own: float = 70) -> bytes:
        """Return an address, the sender's own with this likelihood."""
        address = self.dice.choice(self.own[size] if self.own[size] and self.likely(own) else self.others[size])
        return self.changed(address) if self.likely(2) else address

    def hardware(self) -> bytes:
        """Return a hardware address, mostly the sender's own."""
        return self.sender if self.likely(75) else self.dice.choice((VICTIM, HOST, self.changed(self.sender)))

    def changed(self, data: bytes, first: int = 0, last: int = 48) -> bytes:
        """Return data with one of its octets changed."""
        last = min(last, len(data))
        if first >= last:
            return data
        at = self.dice.randrange(first, last)
        new = self.dice.choice((0, 1, 0xFF, data[at] ^ 1 << self.dice.randrange(8), self.dice.randrange(256)))
        return data[:at] + bytes([new]) + data[at + 1 :]

    def filling(self) -> bytes:
        """Return data of no meaning, which may look like ports."""
        size = self.dice.choice((0, 4, 16, 40, 120, 600))
        return (SERVER_LIKE * (size // 16 + 1))[:size] if self.likely(50) else self.dice.randbytes(size)

    def ports(self) -> tuple[int, int]:
        """Return UDP ports, half of the time such as everybody may use."""
        return (1000, 5353) if self.likely(50) else (self.dice.choice(PORTS), self.dice.choice(PORTS))

    # What guests and attackers send: (protocol, data without a checksum)

    def bootp(self) -> tuple[int, bytes]:
        """Return DHCP: a client's or a server's message."""
        server = self.likely(35)
        relay = bytes(4) if self.likely(85) else self.address(4)
        hardware = self.hardware()
        head = struct.pack("!BBBBI4x", 2 if server else 1, 1, 6, 0, self.dice.getrandbits(32)) + bytes(12) + relay
        message = head + hardware + bytes(202) + b"\x63\x82\x53\x63\x35\1" + bytes([self.dice.randrange(1, 9), 255])
        if self.likely(25):
            return UDP, udp(*self.ports(), message)
        return UDP, udp(*((67, 68) if server else (68, 67)), message)

    def dhcp6(self) -> tuple[int, bytes]:
        """Return DHCPv6: a message of any kind."""
        kind = self.dice.randrange(14)
        message = bytes([kind]) + self.dice.randbytes(3) + b"\0\1\0\x0a\0\3\0\1" + self.hardware()
        if self.likely(25):
            return UDP, udp(*self.ports(), message)
        return UDP, udp(*((547, 546) if kind in (2, 7, 10, 13) else (546, 547)), message)

    def discovery(self) -> tuple[int, bytes]:
        """Return neighbour discovery of any kind, with the options that it has, or others."""
        kind = self.dice.choice((ROUTER_SOLICIT, SOLICIT, SOLICIT, ADVERT, ADVERT, ROUTER_ADVERT, REDIRECT))
        data = bytes([kind, 0]) + bytes(2) + self.dice.choice((bytes(4), b"\x60\0\0\0", b"\x40\0\x07\x08"))
        data += {ROUTER_ADVERT: bytes(8), ROUTER_SOLICIT: b""}.get(kind, self.address(16))
        data += self.address(16) if kind == REDIRECT else b""
        option = bytes([1 + (kind in (ADVERT, REDIRECT)), 1]) + self.hardware()
        nonce = b"\x0e\1" + self.hardware()
        several = (nonce + option, option + nonce, option + option[:2] + self.hardware(), option[:1] + b"\2" + option[2:] + bytes(8), nonce)
        return ICMP6, data + (self.dice.choice((option, option, option, b"")) if self.likely(80) else self.dice.choice(several))

    def listener(self) -> tuple[int, bytes]:
        """Return multicast listener discovery of IPv6."""
        kind = self.dice.choice((MLD_QUERY, MLD_QUERY, MLD_REPORT, MLD_DONE, MLD2_REPORT))
        group = self.dice.choice((NOBODY, ip_address("ff02::fb").packed, ip_address("ff02::1:ff00:12").packed))
        if kind == MLD2_REPORT:
            return ICMP6, bytes([kind]) + bytes(6) + b"\1\4" + bytes(3) + group
        return ICMP6, bytes([kind]) + bytes(3) + b"\0\x64\0\0" + group + (bytes(4) if kind == MLD_QUERY and self.likely(50) else b"")

    def igmp(self) -> tuple[int, bytes]:
        """Return group management of IPv4."""
        group = self.dice.choice((ZERO, bytes((224, 0, 0, 251)), bytes((239, 1, 2, 3))))
        kind = self.dice.choice((0x11, 0x11, 0x12, 0x16, 0x17))
        return IGMP, bytes([kind, self.dice.choice((0, 100))]) + bytes(2) + group + (bytes(4) if kind == 0x11 and self.likely(50) else b"")

    def ordinary(self) -> tuple[int, bytes]:
        """Return data of TCP, UDP, echo, or another protocol."""
        kind = self.dice.randrange(8)
        if kind < 3:
            return UDP, udp(*self.ports(), self.filling())
        if kind == 3:
            return TCP, struct.pack("!HHIIBBHHH", *self.ports(), 1, 0, 0x50, 2, 9999, 0, 0) + self.filling()
        if kind < 6:
            return ICMP, b"\x08\0" + bytes(2) + self.dice.randbytes(4) + self.filling()  # an echo request
        if kind == 6:
            return AH, bytes([self.dice.choice((ICMP6, UDP)), 4]) + bytes(22) + self.discovery()[1]
        return self.dice.choice((ESP, 47, 59, 132, 135, 255)), self.filling()

    # Packets and frames around it

    def split(self, data: bytes, other: bytes) -> list[tuple[int, bool, bytes, bytes]]:
        """Return fragments, in any order: (offset, more follow, data, trailer behind it), the trailer as if of other data."""
        size = self.dice.choice((8, 8, 16, 24, 40, 64, 200))
        cuts = [(at, at + size < len(data), data[at : at + size]) for at in range(0, len(data), size)][:6] or [(0, True, data)]
        if len(cuts) == 6:
            cuts[5] = (cuts[5][0], False, data[cuts[5][0] :])
        if self.likely(15):
            at, more, part = self.dice.choice(cuts)
            cuts.insert(self.dice.randrange(len(cuts) + 1), (max(0, at + self.dice.choice((-8, 0, 8))), more, self.changed(part)))
        if self.likely(30):
            self.dice.shuffle(cuts)
        if self.likely(10):
            cuts.pop()
        if self.likely(10):
            cuts = [(self.dice.choice((8, 64)), False, data)]
        trailers = self.likely(60)
        return [(at, more, part, other[at + len(part) :][:80] if trailers else b"") for at, more, part in cuts]

    def packets_ip(self, protocol: int, data: bytes, other: bytes) -> list[bytes]:
        """Return IPv4 packets with this data, sometimes in fragments."""
        source, destination = self.address(4), self.address(4, 0)
        if protocol == UDP and data[:4] == b"\0\x44\0\x43" and self.likely(70):
            source, destination = self.dice.choice(((ZERO, BROADCAST), (source, self.others[4][0])))
        if protocol == IGMP:
            destination = bytes((224, 0, 0, self.dice.choice((1, 2, 251))))
        data = seal(protocol, source, destination, data)
        options = b"\x94\4\0\0" if protocol == IGMP or self.likely(5) else b""
        number = self.dice.randrange(1 << 16)
        parts = self.split(data, other) if self.likely(25) else [(0, False, data, b"")]
        result = []
        for at, more, part, trailer in parts:
            head = struct.pack("!BBHHH", 0x45 + len(options) // 4, 0, 20 + len(options + part), number, at // 8 | more << 13)
            head += struct.pack("!BBH", 1 if protocol == IGMP else 64, protocol, 0) + source + destination + options
            if self.likely(4):
                head = self.changed(head)
            if not self.likely(2):
                head = head[:10] + checksum(head[:10] + bytes(2) + head[12:]).to_bytes(2, "big") + head[12:]
            result.append(head + part + trailer)
        return result

    def extension_headers(self) -> list[tuple[int, bytes]]:
        """Return up to three extension headers, the fragment header not among them."""
        result = []
        for _ in range(self.dice.choice((1, 1, 1, 2, 3))):
            number = self.dice.choice((HOP_BY_HOP, DESTINATION, DESTINATION, ROUTING, AH, AH))
            long = self.likely(20)  # with an address where a check at a fixed offset looks for a target
            options = b"\x1e\x14" + bytes(4) + self.address(16, 90) if long else (self.dice.choice(SOUND_OPTIONS[:3]) + bytes(4))[:6]
            rest = {ROUTING: bytes([0, self.dice.choice((0, 2, 4)), 0]) + bytes(4), AH: b"\4" + bytes(22)}
            result.append((number, rest.get(number, bytes([len(options) // 8]) + options)))
        return result

    def packets_ip6(self, protocol: int, data: bytes, other: bytes) -> list[bytes]:
        """Return IPv6 packets with this data, sometimes behind extension headers and in fragments."""
        source = self.address(16)
        destination = self.dice.choice((DHCP_AGENTS, DHCP_AGENTS, self.others[16][0])) if protocol == UDP and self.likely(60) else None
        kind = data[0] if protocol == ICMP6 else 0
        if kind == SOLICIT and self.likely(30):
            source, data = NOBODY, data[:24] + (data[24:] if self.likely(10) else b"")
            destination = bytes.fromhex("ff0200000000000000000001ff") + data[21:24]
        elif kind in (ROUTER_SOLICIT, MLD_REPORT, MLD2_REPORT) and self.likely(30):
            source, data = NOBODY, data[:8] if kind == ROUTER_SOLICIT and self.likely(90) else data
        destination = destination or self.address(16, 0)
        hops = 255 if kind in ND_LENGTH else 1 if kind in (*range(MLD_QUERY, MLD_DONE + 1), MLD2_REPORT) else 64
        data = seal(protocol, source, destination, data)
        before, after = [], []
        if hops == 1 and self.likely(80):
            before = [(HOP_BY_HOP, b"\0" + SOUND_OPTIONS[1])]
        elif self.likely(20):
            before = self.extension_headers()
        if hops == 1 and self.likely(25):
            before += self.extension_headers()
        parts = [None]
        if self.likely(20):
            after = self.extension_headers() if self.likely(30) else []
            protocol, row = join_headers(after, protocol)
            parts = self.split(row + data, self.dice.choice((b"", row, bytes(8), bytes(16))) + other)
            if self.likely(20):
                parts = [(0, False, row + data, other)]
            data = None
        number, flow, result = self.dice.randbytes(4), self.dice.choice((*PORTS, self.dice.randrange(1 << 20))), []
        for part in parts:
            first, row, trailer = protocol, data, b""
            headers = before
            if part:
                at, more, row, trailer = part
                headers = [*before, (FRAGMENT, b"\0" + struct.pack("!H", at | more) + number)]
            first, chain = join_headers(headers, protocol)
            row = chain + row
            head = struct.pack("!IHBB", 0x60000000 | flow, len(row), first, hops) + source + destination
            if self.likely(3):
                head = self.changed(head)
            result.append(head + row + trailer)
        return result

    def arp(self) -> bytes:
        """Return ARP: a request, a reply or a probe."""
        source = self.address(4) if self.likely(80) else ZERO
        data = struct.pack("!HHBBH", 1, IP, 6, 4, self.dice.choice((1, 2))) + self.hardware() + source
        data += self.dice.choice((bytes(6), VICTIM)) + self.address(4, 60 if source == ZERO else 20)
        return self.changed(data, 0, 28) if self.likely(10) else data

    def frames(self) -> list[bytes]:
        """Return the next frame, or a datagram's fragments as frames."""
        target = self.dice.choice((VICTIM, HOST, EVERYONE, bytes.fromhex("333300000001"), bytes.fromhex("01005e000001")))
        if self.likely(6):
            target = BRIDGE_GROUP + bytes([self.dice.choice((0, 2, 3, 14, 14, 14, 15))])
        version = self.dice.choices((ARP, IP, IP6), (8, 35, 57))[0]
        if version == ARP:
            packets = [self.arp()]
        else:
            makers = (self.bootp, self.igmp, self.ordinary) if version == IP else (self.dhcp6, self.listener, self.discovery, self.ordinary)
            make = self.dice.choices(makers, (3, 2, 5) if version == IP else (2, 2, 4, 3))[0]
            protocol, data = make()
            other = make()[1]
            if protocol == ICMP and version == IP6:
                protocol, data = ICMP6, b"\x80" + data[1:]
            if self.likely(5):
                data = self.changed(data)
            if make in (self.igmp, self.listener):
                target = bytes.fromhex("01005e000001" if version == IP else "333300000001")
            packets = (self.packets_ip if version == IP else self.packets_ip6)(protocol, data, other)
        return [self.framed(target, version, packet) for packet in packets]

    def framed(self, target: bytes, kind: int, packet: bytes) -> bytes:
        """Return a packet as a frame, sometimes one that is cut off, tagged, changed or of another form."""
        frame = target + self.sender + kind.to_bytes(2, "big") + packet
        form = self.dice.random() * 100
        if form < 2:
            tags = self.dice.choice(("81000000", "81000007", "88a80007", "88a8000781000000"))
            return frame[:12] + bytes.fromhex(tags) + frame[12:1490]
        if form < 3:
            return frame[:12] + struct.pack("!H", len(frame) - 6) + b"\xaa\xaa\3\0\0\0" + frame[12:1490]
        if form < 4:
            return frame[:12] + self.dice.choice((b"\x08\x35", b"\x88\xcc", b"\x88\x47", b"\x91\0")) + frame[14:1500]
        if form < 6:
            return frame[: self.dice.randrange(15, len(frame))] if len(frame) > 16 else frame
        if form < 9:
            return frame[:1400] + self.filling()[:100]
        if form < 11:
            return frame[:14] + self.changed(frame[14:], 0, 80)
        return frame[:1514]


# ---- The bridge, and what sees behind the guard


@contextlib.contextmanager
def inside(namespace: str):
    """Be in a network namespace: sockets that are made there stay there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as here, open(f"/run/netns/{namespace}") as there:
        assert libc.setns(there.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(here.fileno(), 0) == 0


def packet_socket(interface: str, protocol: int = 0) -> socket.socket:
    """Return a raw socket of an interface, which hears that protocol, but not what is sent there."""
    result = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    result.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
    result.setsockopt(263, 23, 1)  # SOL_PACKET, PACKET_IGNORE_OUTGOING
    result.bind((interface, protocol))
    return result


class Ring:
    """A PACKET_TX_RING: the kernel has only the Ethernet header of its frames in one piece (linux/if_packet.h)."""

    SIZE, COUNT = 2048, 128

    def __init__(self, interface: str):
        self.socket, self.next = packet_socket(interface), 0
        self.socket.setsockopt(263, 10, 1)  # PACKET_VERSION, TPACKET_V2
        self.socket.setsockopt(263, 13, struct.pack("4I", self.SIZE * 32, self.COUNT // 32, self.SIZE, self.COUNT))
        self.memory = mmap.mmap(self.socket.fileno(), self.SIZE * self.COUNT)

    def send(self, frames: list[bytes]) -> None:
        """Send fewer frames than the ring has room for."""
        for frame in frames:
            at = self.next * self.SIZE
            self.memory[at + 32 : at + 32 + len(frame)] = frame
            self.memory[at + 4 : at + 8] = struct.pack("I", len(frame))
            self.memory[at : at + 4] = struct.pack("I", 1)  # TP_STATUS_SEND_REQUEST
            self.next = (self.next + 1) % self.COUNT
        self.socket.send(b"")


def netlink_socket(family: int, membership: int = 0) -> socket.socket:
    """Return a netlink socket, a member of a multicast group if given."""
    result = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
    result.bind((0, 0))
    if membership:
        result.setsockopt(270, 1, membership)  # SOL_NETLINK, NETLINK_ADD_MEMBERSHIP
    return result


def log_socket() -> socket.socket:
    """Return a socket that is told whole packets by nftables' `log group 1` (linux/netfilter/nfnetlink_log.h)."""
    result = netlink_socket(12)
    bind, mode, threshold = struct.pack("HHB3x", 5, 1, 1), struct.pack(">6xIBxxx", 0xFFFF, 2)[2:], struct.pack(">4xI", 1)
    for attribute in (bind, struct.pack("HH", 10, 2) + mode[4:], struct.pack("HH", 8, 5) + threshold[4:]):
        result.send(struct.pack("IHHIIBB", 20 + len(attribute), 0x401, 5, 0, 0, 0, 0) + b"\0\1" + attribute)
        assert not any(result.recv(100)[16:20]), "nfnetlink_log"
    return result


def attributes(data: bytes):
    """Give the netlink attributes of data: (number, value)."""
    while len(data) >= 4:
        size, number = struct.unpack_from("HH", data)
        yield number & 0x3FFF, data[4:size]
        data = data[size + 3 & ~3 :]


# What the host's own stack takes from a port of the bridge, past the bridge's hooks and behind the guard's
LOGS = """
table inet fuzz {
    chain prerouting {
        type filter hook prerouting priority -299
        iifname != "br0" @ll,0,44 0x0180c200000 log group 1
    }
}
table arp fuzz {
    chain input {
        type filter hook input priority -299
        iifname != "br0" @ll,0,44 0x0180c200000 log group 1
    }
}
"""


class Bed(Host):
    """A guarded bridge with the senders, a victim, and sockets behind the guard."""

    def __init__(self, folder: Path, rules: Path | None, br_netfilter: int):
        super().__init__(folder, addresses=())
        for family in ("ip", "ip6", "arp"):
            self.set(f"net/bridge/bridge-nf-call-{family}tables", str(br_netfilter))
        self.guard, self.ports, self.raw, self.rings, self.ticks = self.rules(rules), {}, {}, {}, 0
        for label, owner in {"victim": VICTIM, **SENDERS}.items():
            self.ports[owner] = f"veth{len(self.ports)}"
            client = self.client(label, owner.hex(":"), port=self.ports[owner], wait=False)
            client.set("net/ipv6/conf/all/disable_ipv6", "1")
            with inside(client.name):
                self.raw[owner], self.rings[owner] = packet_socket("eth0"), Ring("eth0")
                if owner == VICTIM:
                    guest = packet_socket("eth0", 3)  # ETH_P_ALL
        with inside(self.name):
            self.ears = {"guest": guest, "host": packet_socket("br0", 3)}
            self.port, self.snooping = log_socket(), netlink_socket(socket.NETLINK_ROUTE, 26)  # RTNLGRP_MDB

    def rules(self, file: Path | None) -> str:
        """Return the guard's rules: of a file, or the example's with the chains of our registry."""
        if file:
            text = file.read_text()
        else:
            Path(f"{self.base}.json").write_text(registry_text())
            self.run(sys.executable, PROCESS, "--force", env=environment(self.base))
            chains = Path(f"{self.base}.nftables_chains").read_text()
            text = re.sub('include ".*nftables_chains"', lambda _: chains, self.example("nftables/bridge.nft").read_text())
        text = re.sub("^ *meta ibrname .*\n", "", text, flags=re.MULTILINE)  # not in every kernel; one bridge is here
        return re.sub(r"limit rate over \S+ burst \S+ packets", "limit rate over 1000000/second burst 1000000 packets", text)

    def load(self, without: int | None = None) -> str:
        """Load the guard anew and let everybody claim an address; then take a rule away. Return the rule."""
        self.run("nft", "-f", "-", input=f"flush ruleset\n{self.guard}\n{LOGS}")
        for owner, address in FIRST_COME.items():
            group = bytes.fromhex("ff0200000000000000000001ff") + address[13:]
            data = seal(ICMP6, NOBODY, group, bytes([SOLICIT]) + bytes(7) + address)
            packet = struct.pack("!IHBB", 6 << 28, len(data), ICMP6, 255) + NOBODY + group + data
            self.exchange(owner, "raw", [b"\x33\x33\xff" + address[13:] + owner + b"\x86\xdd" + packet])
        if without is None:
            return ""
        place, rule, handle = self.listing()[without]
        self.run("nft", "delete", "rule", *place, "handle", handle)
        return f"{' '.join(place)}: {rule}"

    def listing(self) -> list[tuple[list[str], str, str]]:
        """Return the guard's rules: (family, table and chain), text, handle."""
        rules, place = [], []
        for line in self.run("nft", "-a", "list", "ruleset").stdout.splitlines():
            words, _, handle = line.strip().partition(" # handle ")
            if words.startswith("table "):
                place = words.split()[1:3]
            elif words.startswith("chain "):
                place = [*place[:2], words.split()[1]]
            elif handle and not words.startswith(("set ", "type ")) and place[1] != "fuzz":
                rules.append((place, words, handle))
        return rules

    def exchange(self, sender: bytes, way: str, frames: list[bytes]) -> dict[str, list[bytes]]:
        """Send frames, and one that is known to pass; return what arrived until that one did: place, frames."""
        if way == "ring":
            self.rings[sender].send(frames)
        else:
            for frame in frames:
                self.raw[sender].send(frame)
        self.ticks += 1
        clock = EVERYONE + CLOCK + b"\x08\6\0\1\x08\0\6\4\0\1" + CLOCK + b"\x0a\x53\0\x0f" + bytes(6)
        clock += struct.pack("!I", self.ticks)
        self.raw[sender].send(clock)
        places = ("host",) if sender == VICTIM else self.ears
        arrived = {place: self.hear(self.ears[place], clock) for place in places}
        arrived["port"] = []
        with contextlib.suppress(BlockingIOError):
            while message := self.port.recv(65536, socket.MSG_DONTWAIT):
                arrived["port"] += [value for number, value in attributes(message[20:]) if number == 9]  # NFULA_PAYLOAD
        return arrived

    @staticmethod
    def hear(ear: socket.socket, clock: bytes) -> list[bytes]:
        """Return the frames that a socket hears before that of the clock."""
        heard, deadline = [], time.monotonic() + 5
        while True:
            try:
                frame = ear.recv(2048, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Deaf from None
                select.select([ear], [], [], 0.1)
                continue
            if frame == clock:
                return heard
            heard.append(frame)

    def believed_query(self, sender: bytes) -> bool:
        """Tell whether the bridge took a port for that of a multicast router since the last call; make it forget that."""
        routers = False
        with contextlib.suppress(BlockingIOError):
            while message := self.snooping.recv(65536, socket.MSG_DONTWAIT):
                new = struct.unpack_from("H", message, 4)[0] == 84  # RTM_NEWMDB
                routers |= new and any(number == 2 for number, _ in attributes(message[24:]))  # MDBA_ROUTER
        if routers:
            variable = f"/sys/class/net/{self.ports[sender]}/brport/multicast_router"
            self.run("sh", "-c", f"echo 0 > {variable}; echo 1 > {variable}")
            self.believed_query(sender)
        return routers


class Deaf(Exception):
    """Not even an ordinary ARP request of an honest guest arrived."""


# ---- A run


class Trial:
    """Frames sent and judged, and what was found."""

    def __init__(self, bed: Bed):
        self.bed, self.judge, self.count, self.findings = bed, Judge(), Counter(), []

    def found(self, what: str, why: str, sender: str, way: str, frames: list[bytes]) -> None:
        """Note a finding and print what is needed to send it again."""
        self.count[what] += 1
        self.findings.append(f"{what} {why}")
        print(f"{what}: {why}: {sender} {way} {' '.join(frame.hex() for frame in frames)}", flush=True)

    def send(self, sender: str, way: str, frames: list[bytes]) -> None:
        """Send a sender's frames and judge what arrived, and what did not."""
        owner = SENDERS[sender]
        arrived = self.bed.exchange(owner, way, frames)
        if self.bed.believed_query(owner):
            self.blame_query(sender, way, frames)
        known = {alias: frame for frame in frames for alias in aliases(frame)} | {frame: frame for frame in frames}
        here = {place: [known.get(f, f) for f in heard if f[6:12] == owner] for place, heard in arrived.items() if place != "port"}
        payloads = {frame[14:]: frame for frame in map(untagged, frames) if frame[:5] == BRIDGE_GROUP}
        here["port"] = [payloads[p] for p in arrived["port"] if p in payloads]
        for place, heard in here.items():
            self.judge_arrived(sender, way, place, heard)
        for place in self.bed.ears:
            missing = set(frames) - set(here[place])
            for frame in frames:
                needed = self.judge.needed(frame, place)
                self.count["needed"] += needed
                if needed and frame in missing and not self.arrives(owner, way, frame, place):
                    self.found("false drop", f"at the {place}", sender, way, [frame])
        self.count["frames"] += len(frames)

    def arrives(self, owner: bytes, way: str, frame: bytes, place: str) -> bool:
        """Tell whether a frame that did not arrive does so alone: then the machine lost it, not the guard."""
        arrived = self.bed.exchange(owner, way, [frame])[place]
        return any(alias in arrived for alias in aliases(frame))

    def judge_arrived(self, sender: str, way: str, place: str, heard: list[bytes]) -> None:
        """Judge the frames that came to a place, in their order, and the datagrams that their fragments make."""
        reassembly = Reassembly()
        for frame in heard:
            parts = [frame]
            self.judge.settle(SENDERS[sender], frame)
            why = self.judge.forbidden(frame, place)
            while not why and (packet := read(frame)) and packet.fragment:
                frame, parts = reassembly.add(frame) or (b"", [])
                why = frame and self.judge.forbidden(frame, place)
            if why:
                self.found("violation", f"at the {place}: {why}", sender, way, parts)

    def blame_query(self, sender: str, way: str, frames: list[bytes]) -> None:
        """Find the frames by which the bridge took the sender for a multicast router, which queries."""
        for frame in frames:
            self.bed.exchange(SENDERS[sender], way, [frame])
            if self.bed.believed_query(SENDERS[sender]):
                self.found("violation", "the bridge believes a multicast query", sender, way, [frame])

    def run(self, frames: int, seed: int, patient: bool = True) -> None:
        """Send so many frames of a seed; without patience, only until something is found."""
        generator = Generator(seed)
        try:
            while self.count["frames"] < frames and (patient or not self.findings):
                sender, way = generator.dice.choice([*SENDERS]), generator.dice.choice(("raw", "ring"))
                generator.start(SENDERS[sender])
                batch = {}
                while len(batch) < BATCH:
                    batch.update(dict.fromkeys(generator.frames()))
                self.send(sender, way, list(batch))
        except Deaf:
            self.found("false drop", Deaf.__doc__, sender, way, [])


BATCH = 64


def aliases(frame: bytes) -> list[bytes]:
    """Return the forms in which a frame may arrive: as it is, without tags, without what is behind its packet's length."""
    plain = untagged(frame)
    packet = read(plain)
    return [frame, plain, plain[: 14 + packet.length]] if packet else [frame, plain]


@contextlib.contextmanager
def bed(options):
    """Give a bed, as the options have it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Bed(Path(folder), options.rules, options.br_netfilter)) as bed:
        yield bed


def without_each_rule(options) -> None:
    """Run without each of the guard's rules by turns; print what was found first, and after how many frames."""
    count = number = 1
    while number <= count:
        with bed(options) as here:
            rule = here.load(number - 1)
            trial, count = Trial(here), len(here.listing()) + 1
            with contextlib.redirect_stdout(None):
                trial.run(options.frames, options.seed, patient=False)
        found = trial.findings[0] if trial.findings else "NOT NOTICED"
        print(f"{number} | {trial.count['frames']} | {found} | {rule}", flush=True)
        number += 1


def main() -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--br-netfilter", type=int, choices=(0, 1), default=0)
    parser.add_argument("--rules", type=Path, help="a rule file in place of the example with our chains")
    parser.add_argument("--without", type=int, metavar="N", help="take away the Nth rule of the guard")
    parser.add_argument("--without-each-rule", action="store_true")
    parser.add_argument("--again", nargs="+", metavar=("SENDER", "WAY"))
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # so that what is sent first arrives first
    if options.without_each_rule:
        without_each_rule(options)
        return 0
    with bed(options) as here:
        if rule := here.load(options.without - 1 if options.without else None):
            print(f"without {rule}")
        trial, begin = Trial(here), time.monotonic()
        if options.again:
            sender, way, *frames = options.again
            trial.send(sender, way, [bytes.fromhex(frame) for frame in frames])
        else:
            trial.run(options.frames, options.seed)
        count = trial.count
        print(
            f"{count['frames']} frames, {count['needed']} arrivals needed, {count['violation']} violations, "
            f"{count['false drop']} false drops, br_netfilter {options.br_netfilter}, {time.monotonic() - begin:.0f} s, "
            f"seed {options.seed}"
        )
        return 1 if trial.findings else 0


if __name__ == "__main__":
    sys.exit(main())
