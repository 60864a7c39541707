"""A guarded bridge to attack, and frames to attack it with, for several files of tests."""

import contextlib
import fcntl
import json
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from lab import HAS_BR_NETFILTER, HOST_MAC, LISTENER, UPDATE, Client, Host, wait_for

scapy = pytest.importorskip("scapy.all")
igmp = pytest.importorskip("scapy.contrib.igmp")
NEEDS_BR_NETFILTER = pytest.mark.skipif(not HAS_BR_NETFILTER, reason="needs br_netfilter")
HOST4, HOST6, HOST_LLA = "10.83.0.1", "2001:67c:83::1", "fe80::1266:6aff:fe4c:a1fe"
EVERYONE, NODES, ROUTERS, SERVERS = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01", "33:33:00:00:00:02", "33:33:00:01:00:02"
SNIFFER = """\
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(("eth0", 0))
print("listens", flush=True)
while True:
    print(s.recv(2000).hex(), flush=True)
"""


def link_local(mac: str) -> str:
    """Return the link-local address made from a MAC address."""
    return scapy.in6_ptop("fe80::" + scapy.in6_mactoifaceid(mac))


def octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


class Guarded:
    """A guarded host, made without a bridge, whose bridge has a victim and a bystander with leases, and two attackers
    whose kernels are silent, with leases and without."""

    def __init__(self, host: Host):
        self.host, self.pause = host, contextlib.ExitStack()
        # The guard is there before the bridge, as after a boot
        Path(f"{host.base}.updated").touch()
        host.process()
        host.run("nft", "-f", host.example("nftables/bridge.nft"))
        host.make_bridge()
        host.br_netfilter(True)
        host.set("net/ipv4/ip_forward", "1")
        host.set("net/ipv6/conf/all/forwarding", "1")
        # The bridge forgets who joined a multicast group, and who queried, in one second and two, not in four minutes
        for interval in (("mcast_membership_interval", "100"), ("mcast_querier_interval", "200")):
            host.run("ip", "link", "set", "br0", "type", "bridge", *interval)
        host.start_guarded()
        names = ("victim", "registered", "unregistered", "bystander")
        clients = [host.client(name, f"10:66:6a:4c:a1:1{number}") for number, name in enumerate(names)]
        self.victim, self.registered, self.unregistered, self.bystander = clients
        leased = (self.victim, self.bystander, self.registered)
        started = [(client.start_dhcp4(client.label), client.start_dhcp6(client.label)) for client in leased]
        for client in leased:
            client.wait_registered("bound 10.8", "BOUND6 2001", "BOUND6 fd83")
        self.lease4 = started[0][0]
        for process in started[2]:
            self.registered.stop(process, signal.SIGKILL)
        for client in (self.registered, self.unregistered):
            client.set("net/ipv6/conf/eth0/disable_ipv6", "1")
            client.run("ip", "address", "flush", "dev", "eth0")
            client.run("ip", "link", "set", "eth0", "arp", "off")
        self.rules, self.leases = host.folder / "rules" / "bridge.nft", host.folder / "dnsmasq.br0.leases"
        self.text, self.config = self.rules.read_text(), (host.folder / "br0.conf").read_text()
        self.settle()
        self.was, self.registry = self.leases.read_text(), host.registry()
        self.expected_state = self.state()
        self.learned = re.findall(r"set (\w+) {(?=[^}]*dynamic)", self.expected_state[0])
        self.server_duid = octets(re.search("^duid (.*)$", self.was, re.MULTILINE)[1])
        rows = [line.split() for line in self.was.splitlines()]
        self.own = {k: v for k, v in self.registry[self.victim.mac].items() if k != "name"}
        self.addresses6 = [self.own["ipv6_gua"], self.own["ipv6_ula"]]
        self.iaid, self.duid = next((int(r[1]), octets(r[4])) for r in rows if r[2:3] == self.addresses6[:1])

    def hold(self) -> None:
        """Keep the service off until the pause is closed: where a rule is missing, it loads all, and counts anew."""
        self.pause.close()
        fcntl.flock(self.pause.enter_context(open(f"{self.host.base}.updated.service", "a")), fcntl.LOCK_EX)

    def settle(self) -> None:
        """Do the service's work, so that it has none to do afterwards."""
        self.pause.close()
        self.host.settle()

    def change(self, *arguments: str) -> None:
        """Change the registry, and have the service put it in force."""
        self.host.update(*arguments)
        self.settle()

    def configure(self, **variables: str) -> None:
        """Have the service put settings in force. reset() takes them back."""
        self.host.write_settings(**variables)
        Path(f"{self.host.base}.updated").touch()
        self.settle()

    def state(self) -> list[str]:
        """Return what is in force, with handles, which are never given twice, and what that was made from."""
        listing = self.host.run("nft", "-a", "-s", "-t", "list", "ruleset").stdout
        made = [Path(f"{self.host.base}.{end}").read_text() for end in ("hosts", "nftables_chains")]
        return [listing, self.rules.read_text(), *made]

    def reset(self, guard: bool = True, option: str = "", script: Path = UPDATE, leases: str = "") -> None:
        """Put all back as it was, with the guard or without, without one of dnsmasq's options, with another script."""
        host, marker = self.host, Path(f"{self.host.base}.updated")
        host.stop_dnsmasq(at_once=True)
        self.hold()
        self.expected = leases or self.was
        self.leases.write_text(self.expected)
        Path(f"{host.base}.json").write_text(json.dumps(self.registry, indent=2) + "\n")
        self.rules.unlink(missing_ok=True)
        host.write_settings()
        if guard:
            self.rules.write_text(self.text)
        if guard and not marker.exists() and self.state() == self.expected_state:
            host.run("nft", "\n".join(f"flush set bridge instances {name}" for name in self.learned))
        else:
            host.run("nft", "table bridge instances; delete table bridge instances")
            if guard:
                marker.touch()
                host.run(*host.applying())
                self.expected_state = self.state()
        self.pause.close()
        host.run("ip", "neighbour", "flush", "all")
        assert f"\n{option}\n" in self.config + "\n\n"
        config = host.folder / "now.conf"
        config.write_text(self.config.replace(f"\n{option}\n", "\n", 1).replace(str(UPDATE), str(script)))
        self.told = len(host.log.read_text())
        host.start_dnsmasq(config=config)

    def guard(self, on: bool) -> None:
        """Load the guard, with nothing learned, or take its rules away, but not its hooks, and keep the service off."""
        self.hold()
        lines = [f'include "{self.rules}"', *(f"flush set bridge instances {name}" for name in self.learned)]
        lines += [] if on else [f"flush chain bridge instances at_{hook}" for hook in ("prerouting", "forward")]
        self.host.run("nft", "-f", "-", input="\n".join(lines))
        if on:
            self.pause.close()

    def log(self) -> str:
        """Return what dnsmasq has logged since all was put back."""
        return self.host.log.read_text()[self.told :]

    def heard(self, text: str, times: int, seconds: int = 5) -> bool:
        """Wait some seconds until dnsmasq has logged a text so often; tell whether it has."""
        with contextlib.suppress(AssertionError):
            return wait_for(lambda: self.log().count(text) >= times, text, seconds)
        return False

    def harm(self, attacker) -> list[str]:
        """Return what is not as it was, but for the attacker's own entry and leases."""
        now = self.host.registry()
        found = [
            f"{m}: {now.get(m)}" for m in {*now, *self.registry} - {attacker.mac} if now.get(m) != self.registry.get(m)
        ]
        others = {a for m, i in self.registry.items() if m != attacker.mac for a in i.values()}
        found += [f"stolen: {a}" for a in others.intersection(now.get(attacker.mac, {}).values()) if a]
        # Of a lease: who has it, and when it ends at the earliest. While dnsmasq writes its file anew, that is empty.
        listed = wait_for(self.leases.read_text, "leases").splitlines()
        leases = {tuple(w[1:3] + w[4:]): int(w[0]) for w in map(str.split, listed) if w[4:]}
        before = {tuple(w[1:3] + w[4:]): int(w[0]) for w in map(str.split, self.expected.splitlines()) if w[4:]}
        found += [f"ends early: {k}" for k, end in before.items() if leases.get(k, 0) < end and k[0] != attacker.mac]
        found += [f"new: {k}" for k in {*leases} - {*before} if ":" in k[0] and k[0] != attacker.mac]
        learnt = self.host.neighbour(link_local(attacker.mac))
        return found + ([f"neighbour: {learnt}"] if learnt not in ("", attacker.mac) else [])

    def introduce(self, attacker: Client) -> None:
        """Have the host learn an attacker's MAC address, by which dnsmasq knows it."""
        attacker.send(bytes(solicitation(attacker, 133)))
        wait_for(lambda: self.host.neighbour(link_local(attacker.mac)) == attacker.mac, "its MAC address")

    def victim_is_well(self) -> None:
        """Check that the victim pings and renews its leases."""
        self.victim.wait_pings(HOST4, HOST6, "fd83:5eed::1")
        self.renew()

    def renew(self) -> None:
        renewals = self.victim.events().count("renew 10.83")

        def renewed():
            self.lease4.send_signal(signal.SIGUSR1)  # by itself, udhcpc asks again only after hours
            with contextlib.suppress(AssertionError):
                return wait_for(lambda: self.victim.events().count("renew 10.83") > renewals, "an answer", 12)

        wait_for(renewed, "a renewal over IPv4")
        self.victim.send(bytes(solicitation(self.victim, 133)), bytes(dhcp6(self, self.victim, scapy.DHCP6_Renew)))
        wait_for(
            lambda: f"DHCPREPLY(br0) {self.addresses6[0]} {self.duid.hex(':')}" in self.log(), "a renewal over IPv6"
        )

    def is_dropped(self, reason: str, attacker: Client, *frames, some: int = 0, ring: bool = False) -> None:
        """Send frames, and wait until the guard has dropped as many, or at least some of them, for this reason."""
        before, number = self.host.dropped(frames[0].src, reason), some or len(frames)
        attacker.send(*map(bytes, frames), ring=ring)
        wait_for(
            lambda: self.host.dropped(frames[0].src, reason) >= before + number,
            f"drops: {reason}: {frames[0].summary()}",
        )

    def is_dropped_silently(self, attacker: Client, frame) -> None:
        """Send a frame that is not counted, and one that is, which arrives later; return when that is dropped."""
        before = self.host.dropped(attacker.mac)
        attacker.send(bytes(frame))
        self.is_dropped("other protocol", attacker, rarp(attacker))
        assert self.host.dropped(attacker.mac) == before + 1

    @contextlib.contextmanager
    def without(self, chain: str, *texts: str):
        """Take a chain's rules, or those with these in their listing, out of the guard; load it again afterwards."""
        self.hold()
        for text in texts or ("",):
            self.host.take_out(chain, text)
        try:
            yield
        finally:
            self.host.run("nft", "-f", self.rules)
            self.pause.close()


def send_until(effect, attacker, *frames, ring: bool = False) -> None:
    """Send frames again and again until they have an effect."""
    wait_for(lambda: attacker.send(*map(bytes, frames), ring=ring) or effect(), f"an effect: {frames[0].summary()}")


def ip6(attacker, mac, address, source=""):
    """Return the headers of IPv6 to a MAC and an IP address, from one's own link-local address or from a source."""
    source = source or link_local(attacker.mac)
    return scapy.Ether(src=attacker.mac, dst=mac) / scapy.IPv6(src=source, dst=address, hlim=255)


def arp(attacker, source, asked, operation=1, mac=EVERYONE, hardware=""):
    """Return an ARP request, or a reply (2), that says that the attacker has a source address."""
    message = scapy.ARP(op=operation, hwsrc=hardware or attacker.mac, psrc=source, pdst=asked)
    return scapy.Ether(src=attacker.mac, dst=mac) / message


def advertised(attacker, target, mac=NODES, address="ff02::1", header=None):
    """Return a neighbour advertisement of a target, from one's own address, behind an extension header if given."""
    ip = ip6(attacker, mac, address)
    if header:
        # 24 octets with an unknown option, which is skipped (RFC 8200, section 4.2). Its last 16 are octets 48 to
        # 63 of the packet, where a check at a fixed offset looks for the target: an address of its own.
        own = packed(link_local(attacker.mac))
        ip /= header(nh=58, options=[scapy.HBHOptUnknown(otype=0x1E, optlen=20, optdata=bytes(4) + own)])
    return ip / scapy.ICMPv6ND_NA(tgt=target, R=0, S=0, O=1) / scapy.ICMPv6NDOptDstLLAddr(lladdr=attacker.mac)


def solicited(attacker, source, mac, target):
    """Return a neighbour solicitation from a source, for an address of whoever has a MAC address."""
    ip = ip6(attacker, mac, target, source)
    return ip / scapy.ICMPv6ND_NS(tgt=target) / scapy.ICMPv6NDOptSrcLLAddr(lladdr=attacker.mac)


def rarp(attacker):
    """Return a frame of a protocol that the guard does not let through."""
    return scapy.Ether(src=attacker.mac, dst=EVERYONE, type=0x8035) / scapy.ARP(op=4, psrc=HOST4)


def bootp(attacker, kind, *options, chaddr="", hlen=6, **fields):
    """Return a client's DHCP message."""
    ip = scapy.Ether(src=attacker.mac, dst=EVERYONE) / scapy.IP(src="0.0.0.0", dst="255.255.255.255")
    message = scapy.BOOTP(hlen=hlen, chaddr=octets(chaddr or attacker.mac), xid=0xABADCAFE, **fields)
    kind = [("message-type", kind)] if kind else []
    return ip / scapy.UDP(sport=68, dport=67) / message / scapy.DHCP(options=[*kind, *options, "end"])


def take(attacker, address, **fields):
    """Return a DHCP request that gives up the sender's other lease for this address."""
    return bootp(attacker, "request", ("server_id", HOST4), ("requested_addr", address), **fields)


def dhcp6(bridge, attacker, message, *options, duid=b"", addresses=None, times=0, server=True, source="", **fields):
    """Return a client's DHCPv6 message: with the victim's DUID, identity association and addresses, unless given."""
    packet = ip6(attacker, SERVERS, "ff02::1:2", source) / scapy.UDP(sport=546, dport=547) / message(trid=7, **fields)
    packet /= scapy.DHCP6OptClientId(duid=scapy.Raw(duid or bridge.duid))
    if server and message not in (scapy.DHCP6_Solicit, scapy.DHCP6_Rebind):
        packet /= scapy.DHCP6OptServerId(duid=scapy.Raw(bridge.server_duid))
    for option in options:
        packet /= option
    wanted = bridge.addresses6 if addresses is None else addresses
    listed = [scapy.DHCP6OptIAAddress(addr=a, preflft=times, validlft=times) for a in wanted]
    return packet / scapy.DHCP6OptIA_NA(iaid=bridge.iaid, T1=0, T2=0, ianaopts=listed)


def own_duid(attacker) -> bytes:
    return b"\0\3\0\1" + octets(attacker.mac)


def solicitation(attacker, kind, lladdr="", before=b""):
    """Return a router or neighbour solicitation (133, 135) or advertisement (136) with a link-layer address option."""
    mac, address, message = {
        133: (ROUTERS, "ff02::2", scapy.ICMPv6ND_RS()),
        135: (HOST_MAC, HOST_LLA, scapy.ICMPv6ND_NS(tgt=HOST_LLA)),
        136: (NODES, "ff02::1", scapy.ICMPv6ND_NA(tgt=link_local(attacker.mac), R=0, S=0, O=1)),
    }[kind]
    option = bytes([2 if kind == 136 else 1, 1]) + octets(lladdr or attacker.mac)
    return ip6(attacker, mac, address) / message / scapy.Raw(before + option)


def datagram(attacker, source, destination, sport=5000, dport=5000, mac=""):
    """Return a UDP datagram to the victim."""
    ip = (scapy.IPv6 if ":" in destination else scapy.IP)(src=source, dst=destination)
    return scapy.Ether(src=mac or attacker.mac, dst=EVERYONE) / ip / scapy.UDP(sport=sport, dport=dport)


def tagged(frame, vlan=0):
    """Return a frame with a VLAN tag, or with one of priority only."""
    return scapy.Ether(src=frame.src, dst=frame.dst) / scapy.Dot1Q(vlan=vlan, prio=5) / frame.payload


def packed(address: str) -> bytes:
    return scapy.inet_pton(scapy.socket.AF_INET6, address)


def gives_up(attacker, victim, address) -> bool:
    """Have the victim detect duplicates of its address while the attacker does so; tell whether it gives it up."""
    group = scapy.inet_ntop(scapy.socket.AF_INET6, scapy.in6_getnsma(packed(address)))
    frame = ip6(attacker, scapy.in6_getnsmac(packed(address)), group, "::") / scapy.ICMPv6ND_NS(tgt=address)
    victim.run("ip", "address", "flush", "dev", "eth0", "to", address)
    victim.run("ip", "address", "add", f"{address}/128", "dev", "eth0")
    attacker.send(*3 * [bytes(frame)])

    def detected():
        return victim.run("ip", "-6", "address", "show", "dev", "eth0", "to", address).stdout

    wait_for(lambda: "dadfailed" in detected() or "tentative" not in detected(), "the end of the detection")
    return "dadfailed" in detected()


@contextlib.contextmanager
def hearing(node, program=LISTENER):
    """Have a node listen, on port 5000 unless to all frames; give a function that returns what came to it so far."""
    path = node.folder / "heard"
    with open(path, "w") as file:
        process = node.start(sys.executable, "-c", program, "::", "5000", stdout=file)
        try:
            wait_for(path.read_text, "a listener")
            yield path.read_text
        finally:
            node.stop(process, signal.SIGKILL)


@contextlib.contextmanager
def flooding(attacker, frames: list[bytes], pause: float = 0):
    """Have an attacker send frames again and again; give a function that returns how often it has sent them."""
    over, sent = threading.Event(), [0]

    def flood():
        while not over.is_set():
            attacker.send(*frames)
            sent[0] += 1
            time.sleep(pause)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield lambda: sent[0]
    finally:
        over.set()
        thread.join()
