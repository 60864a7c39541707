#!/usr/bin/env python3
"""Lease, claim, move, register, load and forge in random order on a guarded bridge, and compare it with a model.

As root: /usr/bin/python3 -B tests/sequences.py [--seconds N] [--seed N] [--br-netfilter 0|1] [--rules FILE]. The
guests a, b and v have silent kernels; their frames are made here, and each attacks the others. Behind the uplink u is a
router r, behind the uplink w a machine l. The DHCP server is the host h and, where a sequence begins so, another one
behind u. Each sequence begins with nothing learned. A guest's frame that arrives where it must not is a violation, one
that does not where it must is a false drop. Each is printed with what repeats it, without the steps that it does not
need:

    tests/sequences.py --again "STEP; STEP; ..."

sequences_model.py is the model: it knows the policy, and no rule. Exit status: 1 if anything was found, else 0.
"""

import contextlib
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from conftest import load
from fuzz import Bed, frame4, frame6, inside, on_one_processor, options_parser, packet_socket, unlimited
from fuzz_judge import ADVERT, EVERYONE, ICMP6, ROUTER_ADVERT, ROUTER_SOLICIT, SOLICIT, udp
from lab import PROCESS, UPDATE, Host
from sequences_model import MACS, MAYBE, NO, PREFIXES, SLACK, YES, Model, Now, is_claimed, made, packed

PORTS = {"h": "h", "a": "a", "b": "b", "v": "v", "r": "u", "l": "w"}  # where each is at first
UPLINKS = ("u", "w")
REGISTRY = {
    "h": {"name": "host", "ipv4": "10.83.0.1", "ipv6_gua": "2001:67c:83::1", "ipv6_lla": "fe80::8099:e2ff:5d8a:32"},
    "a": {"name": "a", "ipv4": "10.83.0.10", "ipv6_gua": "2001:67c:83::10", "ipv6_lla": made("fe80::", "a")},
    "v": {"name": "v", "ipv4": "10.83.0.17", "ipv6_ula": "fd83:5eed::17", "ipv6_lla": made("fe80::", "v")},
    "c": {"name": "clock", "ipv4": "10.83.0.15"},
}
SERVERS = {"h": "10.83.0.1", "r": "10.83.0.254", "l": "10.83.0.253"}
V4 = ["10.83.0.1", "10.83.0.10", "10.83.0.17", "10.83.0.21", "10.83.0.22", "10.83.0.254", "10.99.0.7", "0.0.0.0"]
PRIVATE = ["fe80::1", "fe80::a", "fe80::8099:e2ff:5d8a:32", "2001:67c:83::aa", "2001:67c:83::bb", "2001:67c:83::10"]
V6 = [*PRIVATE, "2001:67c:83::1", "fd83:5eed::17", "2001:67c:84::5", "2001:67c:99::7"]
V6 += [made(prefix, who) for prefix in PREFIXES for who in "abv"]
KINDS = {"discover": 1, "offer": 2, "request": 3, "ack": 5, "nak": 6, "inform": 8}  # of DHCP messages
CHANGES = {"register": "add", "rename": "--rename", "remove": "--remove", "allow": "--allow"}  # steps of the registry
ALLOWED = ("10.83.0.21", "10.83.0.22 2001:67c:83::bb", "10.99.0.0/24 2001:67c:99::/64", "")


# ---- Frames


def ip4(who: str, source: str, target: str, layer: tuple[int, bytes], to: bytes = EVERYONE) -> bytes:
    return frame4(to, MACS[who], packed(source), packed(target), layer)


def ip6(who: str, source: str, layer: tuple[int, bytes], hops: int = 255, target: str = "ff02::1") -> bytes:
    return frame6(MACS[who], packed(source), packed(target), layer, hops)


def arp(who: str, address: str, named: str = "", target: str = "10.83.0.1") -> bytes:
    """Return an ARP request, which names its own hardware address or another's."""
    sender, asked = MACS[named or who] + packed(address), bytes(6) + packed(target)
    return EVERYONE + MACS[who] + b"\x08\6\0\1\x08\0\6\4\0\1" + sender + asked


def dhcp(kind: str, who: str, given: str = "0.0.0.0", held: str = "0.0.0.0") -> tuple[int, bytes]:
    """Return a DHCP message of a client or to it, with yiaddr and ciaddr."""
    reply = kind in ("offer", "ack", "nak")
    message = struct.pack("!BBBBI4x", 1 + reply, 1, 6, 0, 7) + packed(held) + packed(given) + bytes(8) + MACS[who]
    message += bytes(202) + b"\x63\x82\x53\x63\x35\1" + bytes([KINDS[kind], 255])
    return udp((67, 68) if reply else (68, 67), message)


def discovery(kind: int, target: str = "", who: str = "") -> tuple[int, bytes]:
    """Return neighbour discovery, of a target, with the link-layer address of who as its option."""
    option = bytes([2 if kind == ADVERT else 1, 1]) + MACS[who] if who else b""
    body = bytes(8) if kind == ROUTER_ADVERT else packed(target) if target else b""
    return ICMP6, bytes([kind]) + bytes(7) + body + option


# ---- The bridge


class Bridge(Host):
    """A guarded bridge with guests, uplinks, and a network outside, all with sockets."""

    def __init__(self, folder: Path, rules: Path, br_netfilter: bool):
        super().__init__(folder, addresses=())
        self.text, self.sockets, self.ticks = self.example(str(rules.absolute())).read_text(), {}, 0
        self.br_netfilter(br_netfilter)
        self.update_script, self.process_script = load(UPDATE), load(PROCESS)
        self.update_script.say = self.process_script.say = lambda *_: None
        os.environ |= {"INSTANCES_BASE_PATH": str(self.base), "INSTANCES_SLAAC": f"{PREFIXES[1]}/64"}
        for port in "abvuwo":
            mac, bridge = f"02:00:00:00:00:{ord(port):x}", "" if port == "o" else "br0"
            client = self.client(port, mac, f"port{port}", bridge, wait=False)
            client.set("net/ipv6/conf/all/disable_ipv6", "1")  # its own kernel is silent
            client.run("ip", "link", "set", "eth0", "arp", "off")
            with inside(client.name):
                self.sockets[port] = packet_socket("eth0", 3)  # ETH_P_ALL
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/br0/addr_gen_mode"):
            self.set(f"net/{name}", "1")
        self.run("ip", "-6", "address", "flush", "dev", "br0")
        for address in ("10.83.0.1/24", "2001:67c:83::1/64", "fe80::8099:e2ff:5d8a:32/64"):
            self.run("ip", "address", "add", address, "dev", "br0", "nodad")
        self.run("ip", "address", "add", "10.9.9.1/24", "dev", "porto")
        link = json.loads(self.run("ip", "-json", "link", "show", "porto").stdout)[0]
        self.gateway = bytes.fromhex(link["address"].replace(":", ""))
        for who in "abv":
            for address in reached(who):
                self.run("ip", "neighbour", "add", address, "lladdr", MACS[who].hex(":"), "dev", "br0")
        with inside(self.name):
            self.sockets["h"] = packet_socket("br0", 3)

    def nft(self, text: str) -> None:
        with inside(self.name):
            done = subprocess.run(["nft", "-f", "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def empty(self, server: str, claim: float, lease: float) -> dict:
        """Begin with the first registry, nothing learned, and such timeouts; return the registry."""
        text = self.text.replace('define uplink = "none"', 'define uplink = { "portu", "portw" }')
        text = text.replace('define server = "none"', f'define server = "{"portu" if server == "u" else "none"}"')
        self.guard, self.timeouts = text, {"1d": f"{claim * 1000:.0f}ms", "5m": f"{lease * 1000:.0f}ms"}
        Path(f"{self.base}.json").write_text(json.dumps({MACS[who].hex(":"): entry for who, entry in REGISTRY.items()}))
        self.nft("table bridge instances\ndelete table bridge instances\n")
        return self.load()

    def load(self) -> dict:
        """Load the guard of the registry as it is, with no limit on how often; return the registry."""
        self.process_script.main(["--force"])
        text = re.sub('include "(.*)"', lambda found: Path(found[1]).read_text(), self.guard)
        self.nft(re.sub(r"timeout (1d|5m)", lambda found: f"timeout {self.timeouts[found[1]]}", unlimited(text)))
        return json.loads(Path(f"{self.base}.json").read_text())

    def change(self, *arguments: str, **variables: str) -> None:
        """Change the registry, if instances-update.py does not refuse."""
        os.environ |= variables
        with contextlib.suppress(ValueError):
            self.update_script.main(list(arguments))
        for name in variables:
            del os.environ[name]

    def exchange(self, port: str, frame: bytes) -> tuple[set, Now]:
        """Send a frame, and one that passes; return where it had arrived when that one did, and when this was."""
        begin, self.ticks = time.monotonic(), self.ticks + 1
        clock = arp("c", "10.83.0.15")[:-4] + struct.pack("!I", self.ticks)
        self.sockets[port].send(frame)
        other = "h" if port == "o" else port
        self.sockets[other].send(clock)
        heard = {place: Bed.hear(ear, clock) for place, ear in self.sockets.items() if place not in ("o", other)}
        # The host gives another header to what it routes
        same = (lambda other: other[-30:] == frame[-30:]) if port == "o" else lambda other: other == frame
        arrived = {place for place, frames in heard.items() if any(map(same, frames))}
        return arrived, Now(begin - SLACK, time.monotonic() + SLACK)


def reached(who: str) -> tuple[str, str]:
    """Return addresses by which the host routes to a guest, whatever it has."""
    return f"10.83.0.{0xE0 + ord(who) % 16}", f"2001:67c:83::e{ord(who):x}"


# ---- A sequence


class Trial:
    """One sequence: each step is done, and what arrives is compared with the model."""

    def __init__(self, bridge: Bridge):
        self.bridge, self.model, self.ports, self.found, self.count = bridge, None, dict(PORTS), "", Counter()

    def play(self, steps: list[str]) -> int:
        """Do steps until something is found; return after how many."""
        for number, step in enumerate(steps, 1):
            word, *rest = step.split()
            if word in CHANGES:
                self.bridge.change(CHANGES[word], MACS[rest[0]].hex(":"), *rest[1:])
            else:
                getattr(self, f"do_{word}")(*rest)
            if self.found:
                self.found += f" ({step})"
                return number
        return len(steps)

    def do_start(self, server: str, claim: str, lease: str) -> None:
        self.model = Model(server, float(claim), float(lease))
        self.model.load(self.bridge.empty(server, float(claim), float(lease)))

    def do_wait(self, seconds: str) -> None:
        time.sleep(float(seconds))

    def do_move(self, who: str, port: str) -> None:
        self.ports[who] = port

    def do_load(self) -> None:
        self.model.load(self.bridge.load())

    def do_tell(self, who: str, address: str) -> None:
        """As dnsmasq tells of a lease."""
        mac = MACS[who].hex(":")
        self.bridge.change("add", mac, address, DNSMASQ_LEASE_EXPIRES="9", DNSMASQ_MAC=mac)

    def is_guest(self, who: str) -> bool:
        """Tell whether somebody is behind a port that is judged."""
        return self.ports[who] not in ("h", *UPLINKS)

    def send(self, who: str, frame: bytes, verdict, places=None, uses=(), renews: bool = True) -> tuple[set, Now]:
        """Send a frame; a guest's is judged, by the verdict at the time, and by where it may go."""
        port = self.ports[who]
        arrived, now = self.bridge.exchange(port, frame)
        if not self.is_guest(who):
            return arrived, now
        value = verdict(now)
        self.count["frames"] += 1
        self.count[("forbidden", "either", "needed")[value]] += 1
        for place in sorted({*"habvuw"} - {port}):
            wanted = value if places is None or place in places else NO
            if place in arrived and wanted == NO:
                self.found = f"violation: arrived at {place}"
            elif place not in arrived and wanted == YES:
                self.found = f"false drop: did not arrive at {place}"
        self.model.use(who, uses, now, bool(arrived), renews)
        return arrived, now

    # IPv4

    def do_arp(self, who: str, address: str) -> None:
        self.send(who, arp(who, address), lambda now: self.model.may_ask(who, address, now))

    def do_arp_of(self, who: str, named: str, address: str) -> None:
        """Name another's hardware address: two who share an address may."""
        shared = {who, named} <= self.model.holders(address)
        if who != named:
            self.send(who, arp(who, address, named), lambda now: MAYBE if shared else NO)

    def do_probe(self, who: str, address: str) -> None:
        self.send(who, arp(who, "0.0.0.0", target=address), lambda now: self.model.standing(who, address, now))

    def do_data4(self, who: str, address: str) -> None:
        frame = ip4(who, address, "255.255.255.255", udp((1000, 5353), b"data"))
        self.send(who, frame, lambda now: self.model.may_send(who, address, now, False))

    def servers(self) -> tuple:
        return ("h", "u") if self.model.server == "u" else ("h",)

    def do_ask(self, who: str, kind: str) -> None:
        frame = ip4(who, "0.0.0.0", "255.255.255.255", dhcp(kind, who))
        self.send(who, frame, lambda now: YES, self.servers())

    def do_renew(self, who: str, address: str) -> None:
        frame = ip4(who, address, "10.83.0.1", dhcp("request", who, held=address), MACS["h"])
        self.send(who, frame, lambda now: MAYBE if address == "0.0.0.0" else YES, ("h",))

    def do_inform(self, who: str, address: str, given: str) -> None:
        """Each server that hears it answers with what the request has given itself, as dnsmasq does."""
        frame = ip4(who, address, "255.255.255.255", dhcp("inform", who, given, address))
        value = MAYBE if given == "0.0.0.0" else NO
        arrived, _ = self.send(who, frame, lambda now: value, self.servers())
        for server in ("h", "r"):
            if self.ports[server] in arrived and self.is_guest(who):
                answer = ip4(server, SERVERS[server], "255.255.255.255", dhcp("ack", who, given, address))
                self.bridge.exchange(self.ports[server], answer)

    def do_answer(self, server: str, kind: str, who: str, address: str, cast: str) -> None:
        """Answer as a DHCP server, to all or to the address itself."""
        target, to = ("255.255.255.255", EVERYONE) if cast == "all" else (address, MACS[who])
        frame = ip4(server, SERVERS.get(server, cast), target, dhcp(kind, who, address), to)
        _, now = self.send(server, frame, lambda now: NO)
        if kind == "ack" and self.ports[server] in ("h", self.model.server):
            self.model.lease(who, address, now)

    def do_route(self, who: str, own: str, address: str, source: str) -> None:
        """A datagram that looks like a server's comes to a guest's own address from beyond the router r."""
        if own != address:  # the router looks for an address where its owner is
            self.bridge.exchange(self.ports["r"], ip4("r", source, own, dhcp("ack", who, address), MACS[who]))

    def do_enter(self, who: str, address: str, source: str) -> None:
        """The same from outside, by the host. What must not be believed has to arrive, or nothing was tried."""
        frame = ip4("l", source, reached(who)[0], dhcp("ack", who, address), self.bridge.gateway)
        arrived, _ = self.bridge.exchange("o", frame)
        if not arrived and source not in SERVERS.values():  # the host's own source is dropped by its kernel
            self.found = "false drop: not routed"

    # IPv6

    def do_enter6(self, who: str, source: str, target: str) -> None:
        """An advertisement comes from outside, by the host."""
        frame = ip6("l", source, discovery(ADVERT, target, "l"), 255, reached(who)[1])
        arrived, _ = self.bridge.exchange("o", self.bridge.gateway + frame[6:])
        if not arrived and not source.startswith("fe80:"):
            self.found = "false drop: not routed"

    def discover(self, who: str, frame: bytes, verdict, addresses: list[str], hops: int = 255) -> None:
        """Send what claims addresses, or shows that they are elsewhere."""
        _, now = self.send(who, frame, verdict, uses=addresses)
        if not self.is_guest(who) and hops == 255:
            self.model.learn(who, addresses, now)

    def do_dad(self, who: str, target: str) -> None:
        frame = ip6(who, "::", discovery(SOLICIT, target))
        _, now = self.send(who, frame, lambda now: self.model.standing(who, target, now), uses=[target])
        if not self.is_guest(who):
            self.model.probe(who, target, now)

    def do_ns(self, who: str, source: str) -> None:
        frame = ip6(who, source, discovery(SOLICIT, "2001:67c:83::1", who))
        self.discover(who, frame, lambda now: self.model.may_send(who, source, now, True), [source])

    def do_na(self, who: str, source: str, target: str, hops: str = "255") -> None:
        def verdict(now):
            value = min(self.model.may_send(who, source, now, True), self.model.standing(who, target, now))
            return value if hops == "255" else MAYBE  # whoever hears it drops it

        frame = ip6(who, source, discovery(ADVERT, target, who), int(hops))
        self.discover(who, frame, verdict, [source, target], int(hops))

    def do_ra(self, who: str, source: str) -> None:
        self.discover(who, ip6(who, source, discovery(ROUTER_ADVERT, "", who)), lambda now: NO, [source])

    def do_rs(self, who: str, source: str) -> None:
        frame = ip6(who, source, discovery(ROUTER_SOLICIT, "", who))
        self.send(who, frame, lambda now: self.model.may_send(who, source, now, True), uses=[source])

    def do_data6(self, who: str, source: str, layer: tuple = (17, b"\3\xe8\x14\xe9\0\x0c\0\0data")) -> None:
        """Data may renew a claim, and need not; an address is to be claimed before it is used."""

        def verdict(now):
            first = is_claimed(source) and not (self.model.holders(source) or self.model.has(who, source, now))
            return min(self.model.may_send(who, source, now, False), MAYBE if first else YES)

        self.send(who, ip6(who, source, layer, 64), verdict, uses=[source], renews=False)

    def do_echo(self, who: str, source: str) -> None:
        self.do_data6(who, source, (ICMP6, b"\x80" + bytes(15)))


# ---- Random sequences


def sequence(seed: str, number: int) -> list[str]:
    """Return so many random steps. Each sequence has few kinds of steps, and few addresses, so that they meet."""
    dice = random.Random(seed)
    pick, short = dice.choice, not dice.randrange(4)
    few4, few6, private = dice.sample(V4, 3), dice.sample(V6, 4), dice.sample(PRIVATE, 2)
    free = [a for a in (*few4, *few6, *private) if a not in ("0.0.0.0", *REGISTRY["h"].values())]
    # G: a guest, O: who is none, H: a server; 4, 6, P: addresses; F: one to register; g, p: the same in a whole kind
    kinds = {
        "arp G 4": 4, "arp_of G G 4": 1, "probe G 4": 2, "data4 G 4": 4,
        "ask G request": 1, "renew G 4": 1, "inform G 4 4": 1, "inform G 4 0.0.0.0": 1,
        "answer H ack G 4 all": 3, "answer H ack G 4 one": 3, "answer H offer G 4 all": 1, "answer H nak G 4 one": 1,
        "answer a ack G 4 10.83.0.1": 1, "route G 4 4 10.9.9.9": 1, "route G 4 4 10.83.0.254": 1,
        "enter G 4 10.9.9.9": 1, "enter G 4 10.83.0.1": 1, "enter G 4 10.83.0.254": 1, "enter6 G P P": 1,
        "dad G 6": 6, "ns G 6": 6, "rs G 6": 2, "na G 6 6": 6, "ra G 6": 1, "data6 G 6": 6, "echo G 6": 3,
        "ns O P": 2, "na O P P": 4, "na O P P 254": 1, "ra O P": 1,
        "move G a": 1, "move G b": 1, "move G u": 1, "move G w": 0.5, "move G v": 1, "move g u; ns g p; move g a": 1,
        "register G F; load": 0.5, "tell G F; load": 0.5, "tell G F": 0.5, "load": 0.2, "rename G x": 0.3,
        "remove G; load": 0.5, "wait 0.05": 0.6 * short, "wait 0.15": 0.6 * short, "wait 0.25": 0.3 * short,
        "ns g p; wait 0.15; ns g p; wait 0.1; dad G p": 1 * short,
        **{f"allow G {addresses}; load": 0.15 for addresses in ALLOWED},
    }  # fmt: skip
    letters = {
        "G": lambda: pick("aabbvv"), "O": lambda: pick("hrl"), "H": lambda: pick("hhrrl"), "4": lambda: pick(few4),
        "6": lambda: pick(few6 + private * 2), "P": lambda: pick(private), "F": lambda: pick(free or V4[3:5]),
    }  # fmt: skip
    steps = [f"start {pick(('none', 'u'))} {'0.2 0.12' if short else '1000 1000'}"]
    some = dice.sample(list(kinds), dice.randrange(6, 24))
    for kind in dice.choices(some, [kinds[kind] for kind in some], k=number):
        for letter in "gp":
            kind = re.sub(rf"\b{letter}\b", letters[letter.upper()](), kind)
        steps += re.sub(r"(?<= )[GOH46PF](?![^ ;])", lambda found: letters[found[0]](), kind).split("; ")
    return steps


def shorter(bridge: Bridge, steps: list[str]) -> list[str]:
    """Return steps without those that are not needed to find something."""
    number = len(steps) - 1
    while number > 0:
        trial = Trial(bridge)
        fewer = steps[:number] + steps[number + 1 :]
        end = trial.play(fewer)
        steps = fewer[:end] if trial.found else steps
        number = min(number, len(steps)) - 1
    return steps


def try_out(bridge: Bridge, steps: list[str]) -> Counter:
    """Play a sequence; print what is found; return the counts."""
    trial = Trial(bridge)
    number = trial.play(steps)
    if trial.found:
        steps = shorter(bridge, steps[:number])
        print(f'{trial.found}: --again "{"; ".join(steps)}"', flush=True)
        trial.count[trial.found.partition(":")[0]] += 1
    return trial.count + Counter({"sequences": 1})


def main() -> int:
    parser = options_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--again", metavar="STEPS")
    options = parser.parse_args()
    count, end = Counter(), time.monotonic() + options.seconds
    with on_one_processor() as folder:
        bridge = Bridge(folder, options.rules, bool(options.br_netfilter))
        while time.monotonic() < end and not (options.again and count):
            steps = sequence(f"{options.seed}/{count['sequences']}", 70)
            count += try_out(bridge, options.again.split("; ") if options.again else steps)
    print(", ".join(f"{count[name]} {name}" for name in ("sequences", "frames", "needed", "forbidden")), end=", ")
    print(f"{count['violation']} violations, {count['false drop']} false drops, seed {options.seed}")
    return int(count["violation"] + count["false drop"] > 0)


if __name__ == "__main__":
    sys.exit(main())
