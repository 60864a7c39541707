#!/usr/bin/env python3
"""Send frames that nobody normal sends through the guard of a bridge, and judge what arrives behind it.

As root: /usr/bin/python3 -B tests/fuzz.py [--frames N] [--seed N] [--br-netfilter 0|1] [--rules FILE]. The rules are
examples/nftables/bridge.nft with the chains of a small registry. Their limits on how often a guest may do something are
lifted, since they would stop what is to be judged. The last line has the seed, which repeats the run. Each finding is a
line with what is needed to send its frames once more, alone and in the same way:

    tests/fuzz.py --again SENDER raw|ring FRAME...        each frame in hexadecimal

--listed loads what a listing of the rules prints, as people save it. --without RULE... takes away rules, by number or
by a part of their listing: in a loop, it shows whether each rule's absence is found. Exit status: 1 if there was a
violation (what must not arrive did) or a false drop (what honest guests send did not), else 0.

fuzz_judge.py makes the frames and judges them: it knows the registry, the RFCs and Linux, and no rule.
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
from pathlib import Path

from fuzz_judge import (
    ADVERT,
    BRIDGE_GROUP,
    BROADCAST,
    CLAIMED,
    CLOCK,
    ELSEWHERE,
    EVERYONE,
    HOST,
    ICMP6,
    LEASED,
    MULTICAST6,
    NOBODY,
    REGISTRY,
    ROUTER,
    SENDERS,
    SLAAC,
    SOLICIT,
    SOLICITED_NODE,
    VICTIM,
    Generator,
    Judge,
    Reassembly,
    checksum,
    eui64,
    ip,
    read,
    seal,
    udp,
    untagged,
)
from lab import EXAMPLES, OPEN, PROCESS, Host, Namespace, environment

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


def unlimited(text: str) -> str:
    """Return rules without their limits on how often a guest may do something."""
    return re.sub(r"rate over [^}]* burst \d+ \w+", "rate over 1000000/second burst 1000000 packets", text)


def frame4(to: bytes, owner: bytes, source: bytes, target: bytes, layer: tuple[int, bytes]) -> bytes:
    """Return a frame with IPv4."""
    protocol, data = layer[0], seal(layer[0], source, target, layer[1])
    head, ends = struct.pack("!BxHHHBB", 0x45, 20 + len(data), 0, 0, 64, protocol), source + target
    return to + owner + b"\x08\0" + head + struct.pack("!H", checksum(head + ends)) + ends + data


def frame6(owner: bytes, source: bytes, target: bytes, layer: tuple[int, bytes], hops: int = 255) -> bytes:
    """Return a frame with IPv6, to all."""
    protocol, data = layer[0], seal(layer[0], source, target, layer[1])
    head = struct.pack("!IHBB", 6 << 28, len(data), protocol, hops)
    return MULTICAST6 + owner + b"\x86\xdd" + head + source + target + data


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
    found = {}
    while len(data) >= 4:
        size, number = struct.unpack_from("HH", data)
        found[number & 0x3FFF] = data[4:size]
        data = data[size + 3 & ~3 :]
    return found


class Bed(Host):
    """A guarded bridge with the senders, a victim, and sockets behind the guard."""

    def __init__(self, folder: Path, rules: Path, br_netfilter: int, listed: bool):
        super().__init__(folder, addresses=())
        self.listed = listed
        self.br_netfilter(bool(br_netfilter))
        self.ports, self.raw, self.rings, self.ears, self.ticks = {}, {}, {}, {}, 0
        for label, owner in {"victim": VICTIM, **SENDERS, "router": ROUTER}.items():
            self.ports[owner] = f"port{len(self.ports)}"
            client = self.client(label, owner.hex(":"), port=self.ports[owner], wait=False)
            client.set("net/ipv6/conf/all/disable_ipv6", "1")  # its own kernel is silent
            with inside(client.name):
                self.raw[owner], self.rings[owner] = packet_socket("eth0"), Ring("eth0")
                self.ears = {"guest": packet_socket("eth0", 3)} if owner == VICTIM else self.ears  # ETH_P_ALL
        self.guard = self.rules(rules)
        with inside(self.name):
            self.ears["host"], self.port, self.raw[HOST] = packet_socket("br0", 3), log_socket(), packet_socket("br0")
            self.snooping = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            self.snooping.bind((0, 0))
            self.snooping.setsockopt(270, 1, 26)  # SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_MDB

    def rules(self, file: Path) -> str:
        """Return the guard's rules, of a file that may include the chains of our registry."""
        registry = {owner.hex(":"): entry for owner, entry in REGISTRY.items()}
        Path(f"{self.base}.json").write_text(json.dumps(registry))
        self.run(sys.executable, PROCESS, "--force", env=environment(self.base, INSTANCES_SLAAC=SLAAC))
        text = self.example(str(file.absolute())).read_text()
        text = re.sub('include "(.*)"', lambda found: Path(found[1]).read_text(), text)
        text = text.replace('define uplink = "none"', f'define uplink = "{self.ports[ROUTER]}"')
        return unlimited(text)

    def load(self, *without: str) -> str:
        """Load the guard; take rules away, by number or by what is in them, and return them."""
        self.run("nft", "-f", "-", input=f"{self.guard}\n{LOGS}")
        if self.listed:
            self.run("nft", "-f", "-", input="flush ruleset\n" + self.run("nft", "list", "ruleset").stdout)
        rules = {f"{number}": rule for number, rule in enumerate(self.listing(), 1)}
        rules = [r for n, r in rules.items() if any(word == n if word.isdigit() else word in r[1] for word in without)]
        for place, _, handle in rules:
            self.run("nft", "delete", "rule", *place, "handle", handle)
        return "; ".join(f"{' '.join(place)}: {rule}" for place, rule, _ in rules)

    def claim(self) -> None:
        """Have guests claim addresses, the host and the router show theirs, and the host acknowledge leases."""
        for owner, addresses in CLAIMED.items():
            for address in addresses:
                group = SOLICITED_NODE + address[13:]
                message = ICMP6, bytes([SOLICIT]) + bytes(7) + address
                self.exchange(owner, "raw", [frame6(owner, NOBODY, group, message)])
        for address in ELSEWHERE[HOST]:
            message = ICMP6, bytes([ADVERT]) + bytes(7) + address
            self.raw[HOST].send(frame6(HOST, eui64(HOST), ip("ff02::1"), message))
        for address in ELSEWHERE[ROUTER]:
            message = ICMP6, bytes([SOLICIT]) + bytes(7) + eui64(ROUTER)
            self.raw[ROUTER].send(frame6(ROUTER, address, ip("ff02::1"), message))
        for owner, address in LEASED.items():
            message = b"\2\1\6" + bytes(13) + address + bytes(8) + owner + bytes(202) + b"\x63\x82\x53\x63\x35\1\5\xff"
            self.raw[HOST].send(frame4(EVERYONE, HOST, ip("10.83.0.1"), BROADCAST, udp((67, 68), message)))

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
        clock = EVERYONE + CLOCK + b"\x08\6\0\1\x08\0\6\4\0\1" + CLOCK + ip("10.83.0.15")
        clock += struct.pack("!6xI", self.ticks)
        self.raw[sender].send(clock)
        places = ("host",) if sender == VICTIM else self.ears
        arrived = {place: self.hear(self.ears[place], clock) for place in places}
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
        self.bed, self.judge, self.count = bed, Judge(), Counter()

    def found(self, what: str, why: str, sender: str, way: str, frames: list[bytes]) -> None:
        """Count a finding and print it with what is needed to send it again."""
        self.count[what] += 1
        print(f"{what}: {why}: --again {sender} {way} {' '.join(frame.hex() for frame in frames)}", flush=True)

    def send(self, sender: str, way: str, frames: list[bytes]) -> None:
        """Send a sender's frames and judge what arrived, and what did not."""
        owner = SENDERS[sender]
        arrived = self.bed.exchange(owner, way, frames)
        if self.bed.believed_query(owner):
            self.find_query(sender, way, frames)
        known = {}  # of two that would look alike, it is the one without tags
        for frame in sorted(frames, key=lambda frame: frame == untagged(frame)):
            known |= dict.fromkeys(aliases(frame), frame)
        known |= {frame: frame for frame in frames}
        for place in self.bed.ears:
            here = [(known.get(frame, frame), frame) for frame in arrived[place] if frame[6:12] == owner]
            self.judge_arrived(sender, way, place, here)
            for frame in set(frames) - {sent for sent, _ in here}:
                if self.judge.needed(frame, place) and not self.arrives(owner, way, frame, place):
                    self.found("false drop", f"at the {place}", sender, way, [frame])
            self.count["needed"] += sum(self.judge.needed(frame, place) for frame in frames)
            self.count["forbidden"] += sum(bool(self.judge.forbidden(frame, place)) for frame in frames)
        for frame in map(untagged, frames):
            passed = frame[:5] == BRIDGE_GROUP and frame[14:] in arrived["port"]
            if passed and (why := self.judge.forbidden(frame, "host")):
                self.found("violation", f"at the host, past the bridge: {why}", sender, way, [frame])
        self.count["frames"] += len(frames)

    def arrives(self, owner: bytes, way: str, frame: bytes, place: str) -> bool:
        """Tell whether a frame that did not arrive does so alone: then the machine lost it, not the guard."""
        return bool({*aliases(frame)} & {*self.bed.exchange(owner, way, [frame])[place]})

    def judge_arrived(self, sender: str, way: str, place: str, frames: list[tuple[bytes, bytes]]) -> None:
        """Judge what came to a place, as sent and as it arrived, in its order, and the packets that fragments make."""
        reassembly = Reassembly()
        for sent, frame in frames:
            frame = frame if sent == untagged(sent) else sent  # the socket tells tags elsewhere
            self.judge.settle(frame)
            parts, why = [sent], self.judge.forbidden(frame, place)
            while parts and not why and (packet := read(frame)) and packet.fragment:
                body, parts = reassembly.add(sent, packet)
                frame = frame[:14] + body
                why = parts and self.judge.forbidden(frame, place)
            if why:
                self.found("violation", f"at the {place}: {why}", sender, way, parts)

    def find_query(self, sender: str, way: str, frames: list[bytes]) -> None:
        """Send frames one by one to find those that the bridge believes to be a router's; all, if it is none alone."""
        believed = []
        for frame in frames:
            self.bed.exchange(SENDERS[sender], way, [frame])
            believed += [[frame]] if self.bed.believed_query(SENDERS[sender]) else []
        for culprit in believed or [frames]:
            self.found("violation", "the bridge believes a multicast query", sender, way, culprit)

    def run(self, frames: int, seed: int) -> None:
        generator = Generator(seed)
        renewal = 0
        try:
            while self.count["frames"] < frames:
                if time.monotonic() > renewal:
                    self.bed.claim()
                    renewal = time.monotonic() + 60
                sender, way = generator.pick(*SENDERS), generator.pick("raw", "ring")
                generator.start(SENDERS[sender])
                batch = {}
                while len(batch) < BATCH:
                    batch |= dict.fromkeys(generator.frames())
                self.send(sender, way, list(batch))
        except Deaf:
            self.found("false drop", Deaf.__doc__, "web", "raw", [])


def aliases(frame: bytes) -> list[bytes]:
    """Return the forms in which a frame may arrive: without tags, and without what is behind its packet's length."""
    plain = untagged(frame)
    packet = read(plain)
    return [frame, plain, plain[: 14 + packet.length]] if packet else [frame, plain]


@contextlib.contextmanager
def on_one_processor():
    """Give a folder for a host, whose namespaces go in the end. On one processor what is sent first arrives first."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        finally:
            for namespace in reversed(OPEN.copy()):
                Namespace.close(namespace)


def options_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that sequences.py has, too."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--br-netfilter", type=int, choices=(0, 1), default=0)
    parser.add_argument("--rules", type=Path, default=EXAMPLES / "nftables" / "bridge.nft", metavar="FILE")
    return parser


def main() -> int:
    parser = options_parser(__doc__)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--listed", action="store_true")
    parser.add_argument("--without", nargs="+", default=[], metavar="RULE")
    parser.add_argument("--again", nargs="+", metavar="WORD")
    options = parser.parse_args()
    with on_one_processor() as folder:
        here = Bed(folder, options.rules, options.br_netfilter, options.listed)
        if rules := here.load(*options.without):
            print(f"without {rules}")
        trial, begin = Trial(here), time.monotonic()
        if options.again:
            sender, way, *frames = options.again
            here.claim()
            trial.send(sender, way, [bytes.fromhex(frame) for frame in frames])
        else:
            trial.run(options.frames, options.seed)
    count = trial.count
    print(f"{count['frames']} frames, {count['needed']} arrivals needed, {count['forbidden']} forbidden, ", end="")
    print(f"{count['violation']} violations, {count['false drop']} false drops, ", end="")
    print(f"{time.monotonic() - begin:.0f} s, br_netfilter {options.br_netfilter}, seed {options.seed}")
    return int(count["violation"] + count["false drop"] > 0)


if __name__ == "__main__":
    sys.exit(main())
