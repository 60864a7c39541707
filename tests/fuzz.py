#!/usr/bin/env python3
"""Send frames that nobody normal sends through the guard of a bridge, and judge what arrives behind it.

As root: /usr/bin/python3 -B tests/fuzz.py [--frames N] [--seed N] [--br-netfilter 0|1]. The guard is
examples/nftables/bridge.nft with the chains of REGISTRY, or a file given by --rules. Its limits on how often a guest may do something are
lifted, since they would stop what is to be judged. The last line has the seed, which repeats the run. Each finding is a line with
what is needed to send its frames once more, alone and in the same way:

    tests/fuzz.py --again SENDER raw|ring FRAME...        each frame in hexadecimal

--without N takes away the Nth rule of the guard, --without-each-rule all of them by turns, and prints which were missed. Exit
status: 1 if there was a violation (what must not arrive did) or a false drop (what honest guests send did not), else 0.

The judge knows the registry, the RFCs and what Linux does with a frame, and nothing of the guard's rules. It reads a frame as
its receivers do and says for each place, the host and another guest, whether it must not arrive there (`forbidden`), is what an
honest guest sends (`needed`), or neither. Where Linux drops what another system may take, it judges what that system would see. It
takes it that the Ethernet source address is the sender's own (README: MAC filtering), and that the checksums behind IP are right.
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


def ip(text: str) -> bytes:
    """Return an IP address as bytes."""
    return ip_address(text).packed


def eui64(mac: bytes) -> bytes:
    """Return the link-local address made from a MAC address (RFC 4291, appendix A)."""
    return LINK_LOCAL + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]


LINK_LOCAL = ip("fe80::")[:8]
HOST, WEB, VICTIM, MAIL, CLOCK, NEWCOMER = (bytes.fromhex(f"10666a4ca1{end}") for end in ("fe", "11", "12", "14", "15", "66"))
REGISTRY = {
    HOST: {"ipv4": "10.83.0.1", "ipv6_gua": "2001:67c:83::1", "ipv6_ula": "fd83:5eed::1", "ipv6_lla": "fe80::8099:e2ff:5d8a:32"},
    WEB: {"ipv4": "10.83.0.11", "ipv6_gua": "2001:67c:83::11", "ipv6_ula": "fd83:5eed::11", "allowed": []},
    VICTIM: {"ipv4": "10.83.0.12"},
    MAIL: {"ipv6_ula": "fd83:5eed::14"},
    CLOCK: {"ipv4": "10.83.0.15"},
}
REGISTRY[WEB]["allowed"] = ["10.83.0.50", "10.99.0.0/24", "2001:67c:83::50", "2001:67c:99::/64"]
for owner, entry in REGISTRY.items():
    entry.setdefault("ipv6_lla", str(ip_address(eui64(owner))))
OWNED = {
    owner: [ip(text) for text in (*entry.get("allowed", ()), *entry.values()) if isinstance(text, str) and "/" not in text]
    for owner, entry in REGISTRY.items()
}
ROUTED = {WEB: [ip_network("10.99.0.0/24"), ip_network("2001:67c:99::/64")]}
CLAIMED = {owner: ip(f"fe80::c0de:{owner[5]:x}") for owner in (WEB, VICTIM, MAIL, NEWCOMER)}  # first come, first served
SENDERS = {"web": WEB, "mail": MAIL, "newcomer": NEWCOMER}

# ---- The judge

ARP, IP, IP6, TAGS = 0x0806, 0x0800, 0x86DD, (0x8100, 0x88A8)
ICMP, IGMP, TCP, UDP, ESP, AH, ICMP6 = 1, 2, 6, 17, 50, 51, 58
HOP_BY_HOP, ROUTING, FRAGMENT, NO_NEXT, DESTINATION = 0, 43, 44, 59, 60
MLD_QUERY, MLD_REPORT, MLD_DONE, MLD2_REPORT = 130, 131, 132, 143
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
            sound &= body[at + 2 : end].startswith((PADDING, ROUTER_ALERT, SKIPPED, SKIPPED_LONG))
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


class Reassembly:
    """Puts fragments together as Linux does (inet_frag_queue_insert): those that overlap end the datagram (RFC 5722)."""

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
        self.claims = {address: owner for owner, address in CLAIMED.items()}
        self.registered = {address for addresses in OWNED.values() for address in addresses}
        prefixes = {o: [(n.max_prefixlen // 8, n.network_address.packed[: n.prefixlen // 8]) for n in ROUTED[o]] for o in ROUTED}
        self.prefixes = prefixes

    def standing(self, sender: bytes, address: bytes) -> str:
        """Tell what an address is to a sender: "own", "routed", one to join with ("new"), "free" to claim, "none", "foreign"."""
        if address in OWNED.get(sender, ()):
            return "own"
        if any(len(address) == size and address.startswith(prefix) for size, prefix in self.prefixes.get(sender, ())):
            return "routed"
        if address == NOBODY:
            return "none"
        if address[:8] != LINK_LOCAL or address in self.registered:
            return "foreign"
        if address[11:13] == b"\xff\xfe":
            return "new" if address == eui64(sender) else "foreign"
        unclaimed = "new" if address[8:10] == b"\0" + sender[5:] else "free"  # "new": the generator gives it to one sender only
        return {None: unclaimed, sender: "new"}.get(self.claims.get(address), "foreign")

    def settle(self, frame: bytes) -> None:
        """Note the addresses that a frame has claimed by its arrival."""
        packet = read(frame)
        if packet and len(packet.source) == 16:
            kind = packet.data[0] if packet.protocol == ICMP6 and packet.data else None
            claims = kind == ADVERT or (kind == SOLICIT and packet.source == NOBODY)
            for address in (packet.source, packet.data[8:24] if claims else b""):
                if self.standing(frame[6:12], address) == "free":
                    self.claims[address] = frame[6:12]

    # What must not arrive: the reason, "" if it may

    def forbidden(self, frame: bytes, at: str) -> str:
        """Return why a frame must not arrive at the "host" or at a "guest"."""
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
        """Linux takes hardware types of Ethernet and IEEE 802, requests and replies; a probe is one from 0.0.0.0 (RFC 5227)."""
        ordinary = body[:2] in (b"\0\1", b"\0\6") and body[2:6] == b"\x08\0\6\4" and body[6:8] in (b"\0\1", b"\0\2")
        if len(body) < 28 or not ordinary:
            return ""
        hardware, address, target = body[8:14], body[14:18], body[24:28]
        if address == ZERO:
            return "" if self.standing(sender, target) == "own" else "probe for an address that is not the sender's"
        if self.standing(sender, address) != "own":
            return "ARP of an address that is not the sender's"
        return "" if hardware == sender else "ARP of another's hardware address"

    def forbidden_ip(self, sender: bytes, packet: Packet, at: str, to: bytes) -> str:
        """IPv4: who sends it, and what a whole packet says."""
        data, whole_udp = packet.data, packet.protocol == UDP and not packet.fragment and len(packet.data) >= 8
        source, target = struct.unpack_from("!HH", data) if whole_udp else (0, 0)
        if target == DHCP_SERVER and len(data) >= 44:
            if at == "guest":
                return "DHCP request that another guest hears"
            if data[8:11] != b"\1\1\6" or data[32:36] != ZERO or data[36:42] != sender:
                return "DHCP request in another's name"
            if source == DHCP_CLIENT and (packet.target == BROADCAST or (to, packet.target) == (HOST, ip("10.83.0.1"))):
                return ""  # from any address: a lease that is not registered is renewed by its server only
        if self.standing(sender, packet.source) not in ("own", "routed"):
            return "IPv4 from an address that is not the sender's"
        if source == DHCP_SERVER or target == DHCP_CLIENT:
            return "DHCP server's message"
        return "IGMP query" if packet.protocol == IGMP and not packet.fragment and data[:1] == b"\x11" and len(data) >= 8 else ""

    def forbidden_ip6(self, sender: bytes, packet: Packet, at: str, _: bytes) -> str:
        """IPv6: who sends it, and what a whole packet says."""
        standing, data = self.standing(sender, packet.source), packet.data
        if standing == "foreign":
            return "IPv6 from an address that is not the sender's"
        if packet.fragment or (packet.protocol == ICMP6 and len(data) < 8):
            return ""
        kind = data[0] if packet.protocol == ICMP6 else None
        why = self.forbidden_icmp6(sender, packet, kind) if kind else self.forbidden_dhcp6(packet, at)
        if why or standing in ("own", "routed"):
            return why
        if standing == "none":
            joins = kind in (ROUTER_SOLICIT, SOLICIT, MLD_REPORT, MLD2_REPORT)
        else:
            joins = kind in (ROUTER_SOLICIT, SOLICIT, ADVERT, MLD_REPORT, MLD_DONE, MLD2_REPORT) or (
                packet.protocol == UDP and data[:4] == b"\x02\x22\x02\x23" and packet.target == DHCP6_AGENTS
            )
        return "" if joins else "IPv6 of a newcomer, not for joining"

    def forbidden_icmp6(self, sender: bytes, packet: Packet, kind: int) -> str:
        """Queries, and neighbour discovery if a receiver takes it: hop limit 255, code 0, whole (RFC 4861, section 7.1)."""
        if kind == MLD_QUERY and len(packet.data) >= 24:
            return "MLD query"
        if kind not in ND_LENGTH or packet.hop_limit != 255 or packet.data[1] or len(packet.data) < ND_LENGTH[kind]:
            return ""
        if kind in (ROUTER_ADVERT, REDIRECT):
            return "router's message"
        if kind == ADVERT or (kind == SOLICIT and packet.source == NOBODY):  # the latter is duplicate address detection
            if self.standing(sender, packet.data[8:24]) not in ("own", "new", "free"):
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
        return "" if packet.data[8] in (1, 3, 4, 5, 6, 11) else "DHCPv6 message that no client may send"

    # What must arrive: well-formed in every way, and of a kind that honest guests send

    def needed(self, frame: bytes, at: str) -> bool:
        """Tell whether a frame has to arrive at the "host" or at a "guest"."""
        if not (frame[0] & 1 or frame[:6] == (HOST if at == "host" else VICTIM)) or frame[:5] == BRIDGE_GROUP:
            return False  # it is for others
        if self.forbidden(frame, at):
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
        standing, data, headers, fragment = self.standing(sender, packet.source), packet.data, packet.headers, packet.fragment
        icmp6 = packet.protocol == ICMP6
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
        if standing not in ("own", "routed") or kind in (MLD_QUERY, MLD2_REPORT):
            return False
        if packet.protocol == AH:
            return not headers and data[:1] in (b"\x06", b"\x11", b"\x3a") and whole_header(packet)
        others = (HOP_BY_HOP, ICMP, IGMP, ROUTING, FRAGMENT, NO_NEXT, DESTINATION, 255)
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
    """Tell whether the packet filter of a DHCP client's raw socket takes a frame: it looks at little (dhclient, udhcpc)."""
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
    """Tell whether the upper layer's header is whole and of no DHCP port, or a fragment follows one that has it (RFC 7112)."""
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


# ---- The generator

MULTICAST, MULTICAST6 = bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")
PORTS = (53, 67, 68, 546, 547, 1000, 5353, 6767)
LIKE_PORTS = struct.pack("!8H", 67, 68, 546, 547, 68, 67, 547, 546)


def seal(protocol: int, source: bytes, target: bytes, data: bytes) -> bytes:
    """Return the data of an upper layer with its checksum."""
    at = {ICMP: 2, IGMP: 2, ICMP6: 2, TCP: 16, UDP: 6}.get(protocol, len(data))
    pseudo = b"" if protocol in (ICMP, IGMP) else source + target + struct.pack("!II", len(data), protocol)
    value = checksum(pseudo + data[:at] + data[at + 2 :]) or 0xFFFF
    return data[:at] + struct.pack("!H", value) + data[at + 2 :] if at + 2 <= len(data) else data


def udp(ports: tuple[int, int], data: bytes) -> tuple[int, bytes]:
    """Return a UDP datagram without its checksum, behind its protocol's number."""
    return UDP, struct.pack("!HHHH", *ports, 8 + len(data), 0) + data


class Generator:
    """Makes frames of one sender: what guests and attackers send, and changes of it. The seed decides all."""

    def __init__(self, seed: int):
        self.dice = random.Random(seed)
        others = [address for addresses in OWNED.values() for address in addresses]
        others += [eui64(HOST), eui64(NEWCOMER), *CLAIMED.values(), NOBODY, ZERO, BROADCAST]
        others += map(ip, ("10.83.0.66", "10.99.0.7", "10.98.0.7", "2001:67c:99::7", "2001:67c:98::7", "fe80:0:0:1::7", "ff02::1"))
        others += [ip(f"fe80::f00d:{self.dice.randrange(1 << 16):x}") for _ in range(6)]
        self.others = {size: [address for address in others if len(address) == size] for size in (4, 16)}
        self.honest = False  # then nothing unusual happens

    def start(self, sender: bytes) -> None:
        """Make frames of this sender from now on."""
        addresses = [*OWNED.get(sender, ()), *(network[7].packed for network in ROUTED.get(sender, ()))]
        addresses += [eui64(sender), CLAIMED[sender], LINK_LOCAL + b"\0" + sender[5:] + self.dice.randbytes(6)]
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
        address = self.pick(*(self.others[size] if self.one_in(others_one_in) or not self.own[size] else self.own[size]))
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
        message = struct.pack("!BBBBI16x", 2 if server else 1, 1, 6, 0, self.dice.getrandbits(32)) + relay + self.hardware()
        message += bytes(202) + b"\x63\x82\x53\x63\x35\1" + bytes([self.dice.randrange(1, 9), 255])
        return udp(self.ports() if self.one_in(4) else (67, 68) if server else (68, 67), message)

    def dhcp6(self) -> tuple[int, bytes]:
        """Return a message of DHCPv6, of any kind."""
        kind = self.dice.randrange(14) if self.one_in(2) else self.pick(1, 3, 5, 6, 11)
        message = bytes([kind]) + self.dice.randbytes(3) + b"\0\1\0\x0a\0\3\0\1" + self.hardware()
        return udp(self.ports() if self.one_in(4) else (547, 546) if kind in (2, 7, 10, 13) else (546, 547), message)

    def discovery(self) -> tuple[int, bytes]:
        """Return neighbour discovery, usually with the option that it has."""
        kind = self.pick(ROUTER_ADVERT, REDIRECT) if self.one_in(4) else self.pick(ROUTER_SOLICIT, SOLICIT, SOLICIT, ADVERT)
        data = bytes([kind, 0, 0, 0]) + self.pick(bytes(4), b"\x60\0\0\0", b"\x40\0\x07\x08")
        data += {ROUTER_ADVERT: bytes(8), ROUTER_SOLICIT: b""}.get(kind, self.address(16))
        data += self.address(16) if kind == REDIRECT else b""
        name = bytes([1 + (kind in (ADVERT, REDIRECT)), 1])
        option, second, nonce = name + self.hardware(), name + self.hardware(), b"\x0e\1" + self.hardware()
        long = name[:1] + b"\2" + self.hardware() + bytes(8)
        if self.one_in(4):
            return ICMP6, data + self.pick(nonce + option, option + nonce, option + second, long, nonce)
        return ICMP6, data + self.pick(option, option, option, b"")

    def listener(self) -> tuple[int, bytes]:
        """Return multicast listener discovery of IPv6."""
        kind = MLD_QUERY if self.one_in(2) else self.pick(MLD_REPORT, MLD_REPORT, MLD_DONE, MLD2_REPORT)
        group = NOBODY if kind == MLD_QUERY and not self.one_in(4) else self.pick(ip("ff02::fb"), ip("ff02::1:ff00:12"))
        if kind == MLD2_REPORT:
            return ICMP6, bytes([kind]) + bytes(6) + b"\1\4" + bytes(3) + group
        return ICMP6, bytes([kind]) + bytes(3) + b"\0\x64\0\0" + group + (bytes(4) if kind == MLD_QUERY and self.one_in(2) else b"")

    def igmp(self) -> tuple[int, bytes]:
        """Return group management of IPv4."""
        kind = 0x11 if self.one_in(2) else self.pick(0x12, 0x16, 0x17)
        group = ZERO if kind == 0x11 and not self.one_in(4) else self.pick(ip("224.0.0.251"), ip("239.1.2.3"))
        return IGMP, bytes([kind, self.pick(0, 100), 0, 0]) + group + (bytes(4) if kind == 0x11 and self.one_in(2) else b"")

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

    def fragments(self, data: bytes, fake: bytes) -> list[tuple[int, bool, bytes]]:
        """Return data in fragments, (offset, more follow, data): in any order, some behind others, with a fake trailer, or missing."""
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
        return [(*part, fake[part[0] + len(part[2]) :][:80]) for part in parts] if self.one_in(2) else [(*part, b"") for part in parts]

    def packets_ip(self, protocol: int, data: bytes, fake: bytes) -> list[bytes]:
        """Return an IPv4 packet with this data, or one in fragments."""
        source, target = self.address(4), self.address(4, 1)
        if protocol == UDP and data[:4] == b"\0\x44\0\x43" and not self.one_in(3):
            source, target = self.pick((ZERO, BROADCAST), (source, ip("10.83.0.1")))
        if protocol == IGMP:
            target = bytes((224, 0, 0, self.pick(1, 1, 2, 251)))
        options = b"\x94\4\0\0" if protocol == IGMP or self.one_in(20) else b""
        data, number = seal(protocol, source, target, data), self.dice.randrange(1 << 16)
        parts, packets = self.fragments(data, fake) if self.one_in(4) else [(0, False, data, b"")], []
        for at, more, part, trailer in parts:
            head = struct.pack("!BBHHH", 0x45 + len(options) // 4, 0, 20 + len(options + part), number, at // 8 | more << 13)
            head += struct.pack("!BBxx", 1 if protocol == IGMP else 64, protocol) + source + target + options
            head = self.changed(head) if self.one_in(25) else head
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
        elif kind == MLD_QUERY:
            target = ip("ff02::1")
        elif kind == SOLICIT and self.one_in(3):
            return NOBODY, SOLICITED_NODE + data[21:24], data if self.one_in(10) else data[:24]
        elif kind in (ROUTER_SOLICIT, MLD_REPORT, MLD2_REPORT) and self.one_in(3):
            return NOBODY, target, data if kind != ROUTER_SOLICIT or self.one_in(10) else data[:8]
        return source, target, data

    def packets_ip6(self, protocol: int, data: bytes, fake: bytes) -> list[bytes]:
        """Return an IPv6 packet with this data, or one in fragments, sometimes behind extension headers."""
        source, target, data = self.endpoints(protocol, data)
        kind = data[0] if protocol == ICMP6 and data else 0
        group = kind in (MLD_QUERY, MLD_REPORT, MLD_DONE, MLD2_REPORT)
        before = [(HOP_BY_HOP, b"\0" + ROUTER_ALERT)] if group and not self.one_in(6) else []
        before += self.extension_headers() if self.one_in(4) else []
        data = seal(protocol, source, target, data)
        parts, number = [(0, False, data, b"")], self.dice.randbytes(4)
        fragmented = self.one_in(4)
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
        data = struct.pack("!HHBBH", 1, IP, 6, 4, self.pick(1, 2)) + self.hardware() + source
        data += self.pick(bytes(6), VICTIM) + self.address(4, 2)
        return self.changed(data) if self.one_in(10) else data

    def frames(self) -> list[bytes]:
        """Return the next frame, or the fragments of a packet as frames."""
        target = BRIDGE_GROUP + bytes([self.pick(0, 2, 3, 14, 14, 14, 15)]) if self.one_in(16) else None
        kind = self.dice.choices((ARP, IP, IP6), (8, 35, 57))[0]
        if kind == ARP:
            return [self.framed(target or self.pick(VICTIM, HOST, EVERYONE), ARP, self.arp())]
        makers = {IP: (self.dhcp, self.igmp, self.ordinary), IP6: (self.dhcp6, self.listener, self.discovery, self.ordinary)}
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
        if form < 2:
            start += bytes.fromhex(self.pick("81000000", "81000007", "88a80007", "88a8000781000000"))
        elif form == 2:  # IEEE 802.3 with SNAP
            start += struct.pack("!H", len(packet) + 8) + b"\xaa\xaa\3\0\0\0"
        elif form == 3:
            return start + self.pick(b"\x80\x35", b"\x88\xcc", b"\x88\x47", b"\x91\0") + packet
        elif form < 6:
            packet = packet[: self.dice.randrange(1, len(packet) + 1)]
        elif form < 9:
            packet = packet[:1400] + self.dice.randbytes(self.pick(1, 8, 80))
        elif form < 11:
            packet = self.changed(packet, 80)
        return start + struct.pack("!H", kind) + packet


def in_a_row(headers: list[tuple[int, bytes]], protocol: int) -> tuple[int, bytes]:
    """Return extension headers in a row before a protocol, behind the number of the first."""
    row = b""
    for number, rest in reversed(headers):
        row, protocol = bytes([protocol]) + rest + row, number
    return protocol, row


# ---- The bridge, and what hears behind the guard

# What the host's own stack takes from a port, past the bridge's hooks: what would come behind the guard is logged
LOGS = "".join(
    f"""
table {family} fuzz {{
    chain {hook} {{
        type filter hook {hook} priority -299
        iifname != "br0" @ll,0,44 0x0180c200000 log group 1
    }}
}}"""
    for family, hook in (("inet", "prerouting"), ("arp", "input"))
)


class Deaf(Exception):
    """Not even an ordinary ARP request of an honest guest arrived."""


@contextlib.contextmanager
def inside(namespace: str):
    """Be in a network namespace: sockets that are made there stay there."""
    libc = ctypes.CDLL(None)
    with open("/proc/self/ns/net") as here, open(f"/run/netns/{namespace}") as there:
        assert libc.setns(there.fileno(), 0) == 0
        yield
        assert libc.setns(here.fileno(), 0) == 0


def packet_socket(interface: str, protocol: int = 0) -> socket.socket:
    """Return a raw socket of an interface, which hears a protocol, but not what is sent there."""
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
        """Send frames, no more than the ring has room for."""
        for frame in frames:
            at = self.next * self.SIZE
            self.memory[at + 32 : at + 32 + len(frame)] = frame
            self.memory[at : at + 8] = struct.pack("II", 1, len(frame))  # TP_STATUS_SEND_REQUEST
            self.next = (self.next + 1) % self.COUNT
        self.socket.send(b"")


def log_socket() -> socket.socket:
    """Return a socket that hears the whole packets of nftables' `log group 1`, one a message (nfnetlink_log.h)."""
    result = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    for command in ("0500010001000000", "0a000200ffffffff02000000", "0800050000000001"):  # bind, copy all, no waiting
        message = b"\0\0\0\1" + bytes.fromhex(command)
        result.send(struct.pack("IHHII", 16 + len(message), 0x401, 5, 0, 0) + message)
        assert not any(result.recv(100)[16:20]), "nfnetlink_log"
    return result


def heard(ear: socket.socket) -> list[bytes]:
    """Return the messages that a netlink socket has."""
    messages = []
    with contextlib.suppress(BlockingIOError):
        while True:
            messages.append(ear.recv(65536, socket.MSG_DONTWAIT))
    return messages


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes of a netlink message."""
    found = {}
    while len(data) >= 4:
        size, number = struct.unpack_from("HH", data)
        found[number & 0x3FFF] = data[4:size]
        data = data[size + 3 & ~3 :]
    return found


class Bed(Host):
    """A guarded bridge with the senders, a victim, and sockets behind the guard."""

    def __init__(self, folder: Path, rules: Path | None, br_netfilter: int):
        super().__init__(folder, addresses=())
        for family in ("ip", "ip6", "arp"):
            self.set(f"net/bridge/bridge-nf-call-{family}tables", str(br_netfilter))
        self.guard, self.ports, self.raw, self.rings, self.ticks = self.rules(rules), {}, {}, {}, 0
        for label, owner in {"victim": VICTIM, **SENDERS}.items():
            self.ports[owner] = f"port{len(self.ports)}"
            client = self.client(label, owner.hex(":"), port=self.ports[owner], wait=False)
            client.set("net/ipv6/conf/all/disable_ipv6", "1")  # its own kernel is silent
            with inside(client.name):
                self.raw[owner], self.rings[owner] = packet_socket("eth0"), Ring("eth0")
                guest = packet_socket("eth0", 3) if owner == VICTIM else guest  # ETH_P_ALL
        with inside(self.name):
            self.ears, self.port = {"guest": guest, "host": packet_socket("br0", 3)}, log_socket()
            self.snooping = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            self.snooping.setsockopt(270, 1, 26)  # SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_MDB

    def rules(self, file: Path | None) -> str:
        """Return the guard's rules: of a file, or the example's with the chains of our registry."""
        registry = {owner.hex(":"): {"name": "", **entry} for owner, entry in REGISTRY.items()}
        Path(f"{self.base}.json").write_text(json.dumps(registry))
        self.run(sys.executable, PROCESS, "--force", env=environment(self.base))
        text = (file or self.example("nftables/bridge.nft")).read_text()
        text = re.sub('include "(.*)"', lambda found: Path(found[1]).read_text(), text)
        text = re.sub("^ *meta ibrname .*\n", "", text, flags=re.MULTILINE)  # not in every kernel, and one bridge is here
        return re.sub(r"rate over \S+ burst \S+ packets", "rate over 1000000/second burst 1000000 packets", text)

    def load(self, without: int = 0) -> str:
        """Load the guard and have everybody claim an address; then take away a rule, if given, and return it."""
        self.run("nft", "-f", "-", input=f"flush ruleset\n{self.guard}\n{LOGS}")
        for owner, address in CLAIMED.items():
            group = SOLICITED_NODE + address[13:]
            data = seal(ICMP6, NOBODY, group, bytes([SOLICIT]) + bytes(7) + address)
            packet = struct.pack("!IHBB", 6 << 28, len(data), ICMP6, 255) + NOBODY + group + data
            self.exchange(owner, "raw", [MULTICAST6 + owner + b"\x86\xdd" + packet])
        if not without:
            return ""
        place, rule, handle = self.listing()[without - 1]
        self.run("nft", "delete", "rule", *place, "handle", handle)
        return f"{' '.join(place)}: {rule}"

    def listing(self) -> list[tuple[list[str], str, str]]:
        """Return the guard's rules: (family, table and chain; text; handle)."""
        rules, place = [], []
        for line in self.run("nft", "-a", "list", "ruleset").stdout.splitlines():
            text, _, handle = line.strip().partition(" # handle ")
            if text.startswith(("table ", "chain ")):
                place = text.split()[1:3] if text.startswith("table ") else [*place[:2], text.split()[1]]
            elif handle and not text.startswith(("set ", "type ")) and place[1] != "fuzz":
                rules.append((place, text, handle))
        return rules

    def exchange(self, sender: bytes, way: str, frames: list[bytes]) -> dict[str, list[bytes]]:
        """Send frames, and one that is known to pass; return what arrived before that one: place, frames.

        At "port" is what the host's stack takes from the sender's port, without its Ethernet header.
        """
        if way == "ring":
            self.rings[sender].send(frames)
        else:
            for frame in frames:
                self.raw[sender].send(frame)
        self.ticks += 1
        clock = EVERYONE + CLOCK + b"\x08\6\0\1\x08\0\6\4\0\1" + CLOCK + ip("10.83.0.15") + struct.pack("!6xI", self.ticks)
        self.raw[sender].send(clock)
        arrived = {place: self.hear(ear, clock) for place, ear in self.ears.items() if (sender, place) != (VICTIM, "guest")}
        return arrived | {"port": [attributes(message[20:]).get(9) for message in heard(self.port)]}  # NFULA_PAYLOAD

    @staticmethod
    def hear(ear: socket.socket, clock: bytes) -> list[bytes]:
        """Return the frames that a socket hears before that of the clock."""
        frames, deadline = [], time.monotonic() + 10
        while time.monotonic() < deadline:
            if select.select([ear], [], [], 0.1)[0]:
                frames.append(ear.recv(2048))
                if frames[-1] == clock:
                    return frames[:-1]
        raise Deaf

    def believed_query(self, sender: bytes) -> bool:
        """Tell whether the bridge has taken the sender for a multicast router, which queries; make it forget that."""
        new = [message for message in heard(self.snooping) if message[4] == 84]  # RTM_NEWMDB
        if not any(2 in attributes(message[24:]) for message in new):  # MDBA_ROUTER
            return False
        variable = f"/sys/class/net/{self.ports[sender]}/brport/multicast_router"
        self.run("sh", "-c", f"echo 0 > {variable}; echo 1 > {variable}")
        return True


# ---- A run

BATCH = 64


class Trial:
    """Frames sent and judged, and what was found."""

    def __init__(self, bed: Bed):
        self.bed, self.judge, self.count, self.first = bed, Judge(), Counter(), ""

    def found(self, what: str, why: str, sender: str, way: str, frames: list[bytes]) -> None:
        """Count a finding and print it with what is needed to send it again."""
        self.count[what] += 1
        self.first = self.first or f"{what}: {why}"
        print(f"{what}: {why}: --again {sender} {way} {' '.join(frame.hex() for frame in frames)}", flush=True)

    def send(self, sender: str, way: str, frames: list[bytes]) -> None:
        """Send a sender's frames and judge what arrived, and what did not."""
        owner = SENDERS[sender]
        arrived = self.bed.exchange(owner, way, frames)
        if self.bed.believed_query(owner):
            self.find_query(sender, way, frames)
        known = {}
        for frame in sorted(frames, key=lambda frame: frame == untagged(frame)):  # the last of two that look alike is it
            known |= dict.fromkeys(aliases(frame), frame)
        known |= {frame: frame for frame in frames}
        for place in self.bed.ears:
            here = [known.get(frame, frame) for frame in arrived[place] if frame[6:12] == owner]
            self.judge_arrived(sender, way, place, here)
            for frame in set(frames) - set(here):
                if self.judge.needed(frame, place) and not self.arrives(owner, way, frame, place):
                    self.found("false drop", f"at the {place}", sender, way, [frame])
            self.count["needed"] += sum(self.judge.needed(frame, place) for frame in frames)
            self.count["forbidden"] += sum(bool(self.judge.forbidden(frame, place)) for frame in frames)
        for frame in map(untagged, frames):
            if frame[:5] == BRIDGE_GROUP and frame[14:] in arrived["port"] and (why := self.judge.forbidden(frame, "host")):
                self.found("violation", f"at the host, past the bridge: {why}", sender, way, [frame])
        self.count["frames"] += len(frames)

    def arrives(self, owner: bytes, way: str, frame: bytes, place: str) -> bool:
        """Tell whether a frame that did not arrive does so alone: then the machine lost it, not the guard."""
        return bool({*aliases(frame)} & {*self.bed.exchange(owner, way, [frame])[place]})

    def judge_arrived(self, sender: str, way: str, place: str, frames: list[bytes]) -> None:
        """Judge what came to a place, in its order, and the packets that fragments make."""
        reassembly = Reassembly()
        for frame in frames:
            self.judge.settle(frame)
            parts, why = [frame], self.judge.forbidden(frame, place)
            while parts and not why and (packet := read(frame)) and packet.fragment:
                body, parts = reassembly.add(frame, packet)
                frame = frame[:14] + body
                why = parts and self.judge.forbidden(frame, place)
            if why:
                self.found("violation", f"at the {place}: {why}", sender, way, parts)

    def find_query(self, sender: str, way: str, frames: list[bytes]) -> None:
        """Send frames one by one to find those that the bridge believes to be a router's."""
        for frame in frames:
            self.bed.exchange(SENDERS[sender], way, [frame])
            if self.bed.believed_query(SENDERS[sender]):
                self.found("violation", "the bridge believes a multicast query", sender, way, [frame])

    def run(self, frames: int, seed: int, patient: bool = True) -> None:
        """Send so many frames of a seed; without patience, only until something is found."""
        generator = Generator(seed)
        while self.count["frames"] < frames and (patient or not self.first):
            sender, way = generator.pick(*SENDERS), generator.pick("raw", "ring")
            generator.start(SENDERS[sender])
            batch = {}
            while len(batch) < BATCH:
                batch |= dict.fromkeys(generator.frames())
            try:
                self.send(sender, way, list(batch))
            except Deaf:
                self.found("false drop", Deaf.__doc__, sender, way, list(batch))
                return


def aliases(frame: bytes) -> list[bytes]:
    """Return the forms in which a frame may arrive: without tags, and without what is behind its packet's length."""
    plain = untagged(frame)
    packet = read(plain)
    return [frame, plain, plain[: 14 + packet.length]] if packet else [frame, plain]


@contextlib.contextmanager
def bed(options: argparse.Namespace):
    """Give a bed as the options have it."""
    with tempfile.TemporaryDirectory() as folder:
        bed = Bed(Path(folder), options.rules, options.br_netfilter)
        with contextlib.closing(bed):
            yield bed


def without_each_rule(options: argparse.Namespace) -> None:
    """Run without each of the guard's rules by turns; print what was found first, and after how many frames."""
    number, count = 0, 1
    while number < count:
        number += 1
        with bed(options) as here:
            rule, trial, count = here.load(number), Trial(here), len(here.listing()) + 1
            with contextlib.redirect_stdout(open(os.devnull, "w")):
                trial.run(options.frames, options.seed, patient=False)
        print(f"{number} | {trial.count['frames']} | {trial.first or 'MISSED'} | {rule}", flush=True)


def main() -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--br-netfilter", type=int, choices=(0, 1), default=0)
    parser.add_argument("--rules", type=Path, metavar="FILE")
    parser.add_argument("--without", type=int, default=0, metavar="N")
    parser.add_argument("--without-each-rule", action="store_true")
    parser.add_argument("--again", nargs="+", metavar="WORD")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # on one processor what is sent first arrives first
    if options.without_each_rule:
        without_each_rule(options)
        return 0
    with bed(options) as here:
        if rule := here.load(options.without):
            print(f"without {rule}")
        trial, begin = Trial(here), time.monotonic()
        if options.again:
            sender, way, *frames = options.again
            trial.send(sender, way, [bytes.fromhex(frame) for frame in frames])
        else:
            trial.run(options.frames, options.seed)
    count = trial.count
    print(f"{count['frames']} frames, {count['needed']} arrivals needed, {count['forbidden']} forbidden, ", end="")
    print(f"{count['violation']} violations, {count['false drop']} false drops, ", end="")
    print(f"{time.monotonic() - begin:.0f} s, br_netfilter {options.br_netfilter}, seed {options.seed}")
    return 1 if trial.first else 0


if __name__ == "__main__":
    sys.exit(main())
