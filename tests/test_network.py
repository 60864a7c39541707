"""The example of one network on several hosts: three hosts, each with an etcd, in namespaces."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import network_chaos
import pytest
from conftest import PROGRAMS, need
from lab import EXAMPLES, PROCESS, UPDATE, Host, Namespace, block, environment, has_ibrname, run, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FOLDER = EXAMPLES / "network"
SECONDS = float(os.environ.get("NETWORK_SECONDS", "5"))  # how long what costs, or is without a majority, is looked at
GATEWAY_MAC = "10:66:6a:4c:a1:fe"
SNIFFER = """
import socket, select, sys, time
ports = {}
for port in sys.argv[2:]:
    ports[socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))] = port
for s, port in ports.items():
    s.bind((port, 0))
mac = bytes.fromhex(sys.argv[1].replace(":", ""))
while True:
    for s in select.select(list(ports), [], [])[0]:
        try:
            frame, address = s.recvfrom(2000)
        except OSError:  # a port that is cut
            continue
        if frame[6:12] == mac and address[2] != 4:  # not what the switch itself sends there
            print(time.time(), ports[s], flush=True)
"""


def report(text):
    """Print a measurement: see it with pytest's -rP."""
    print(f"{text}; load {os.getloadavg()[0]:.1f}")


class Member(Host):
    """A host of the network, with an etcd, an uplink eth0 and a management interface."""

    def __init__(self, site, number):
        self.letter, self.site = "abc"[number - 1], site
        folder = site.folder / self.letter
        folder.mkdir()
        super().__init__(folder, (), f"10:66:6a:4c:a0:0{number}")
        self.rules = folder / "rules"
        self.rules.mkdir()
        for port, bridge in (("eth0", "lan"), ("mgmt", "mgmt0")):
            peer = f"{bridge}-{self.letter}"
            self.run("ip", "link", "add", port, "type", "veth", "peer", "name", peer, "netns", site.switch.name)
            self.run("ip", "link", "set", port, "up")
            site.switch.run("ip", "link", "set", peer, "master", bridge, "up")
        self.run("ip", "link", "set", "eth0", "master", "br0")
        self.run("ip", "address", "add", f"192.0.2.{number}/24", "dev", "mgmt")
        self.set("net/ipv4/ip_default_ttl", str(60 + number))  # by which a guest sees who answers it
        for variable in ("arp_ignore", "arp_notify"):
            self.set(f"net/ipv4/conf/all/{variable}", "1")
        text = self.shipped("etcd").replace("ETCD_NAME=a", f"ETCD_NAME={self.letter}")
        text = re.sub(r"(_PEER_URLS=https://192\.0\.2\.)1", rf"\g<1>{number}", text)
        self.etcd_settings = dict(line.split("=", 1) for line in text.splitlines() if line[0] != "#")
        self.etcd = self.program = self.names = None

    def shipped(self, name):
        """Return the text of one of the example's files, with this host's paths."""
        text = (FOLDER / name).read_text()
        for there, here in (
            ("/var/lib/misc", self.folder),
            ("/usr/local/sbin", self.site.bin),
            ("/etc/etcd", self.folder / "tls"),
        ):
            text = text.replace(there, str(here))
        return text if has_ibrname() else re.sub("^ *meta [io]brname .*\n", "", text, flags=re.MULTILINE)

    def start_logged(self, log, *command, **variables):
        """Start a command in a session of its own, with its output in a log."""
        variables = {"INSTANCES_HOST": self.letter, "INSTANCES_TLS": f"{self.folder}/tls"} | variables
        env = environment(self.base, **variables)
        env |= {"PATH": f"{self.site.bin}:{env['PATH']}", "INSTANCES_RULES": str(self.rules)}
        with open(self.folder / log, "a") as file:
            return self.start(*command, env=env, stdout=file, stderr=file, start_new_session=True)

    def start_etcd(self):
        """Start this host's etcd."""
        self.etcd = self.start_logged(
            "etcd.log", "etcd", **self.etcd_settings, ETCD_DATA_DIR=f"{self.folder}/etcd", ETCD_LOGGER="zap"
        )

    def etcdctl(self, *arguments, check=True, **options):
        """Return what etcdctl prints on this host."""
        tls = [f"--cacert={self.folder}/tls/ca.crt", f"--cert={self.folder}/tls/host.crt"]
        tls += [f"--key={self.folder}/tls/host.key", "--endpoints=https://127.0.0.1:2379", "--command-timeout=3s"]
        env = {"ETCDCTL_API": "3", "PATH": os.environ["PATH"]}
        return self.run("etcdctl", *tls, *arguments, check=check, env=env, **options).stdout

    def etcd_status(self):
        """Return etcd's own word on this host's member."""
        text = self.etcdctl("endpoint", "status", "-w", "json", check=False).strip()
        return json.loads(text)[0]["Status"] if text.startswith("[") else None

    def guard(self):
        """Load the guard, and do the service's work on each marker."""
        self.rules.joinpath("network.nft").write_text(self.shipped("network.nft"))
        self.write_settings()
        self.run(*self.applying())
        service = 'while sleep 0.1; do [ ! -e "$0" ] || ("$@"); done'
        self.start_logged("service.log", "sh", "-c", service, f"{self.base}.updated", *self.applying())

    def start_names(self):
        """Do what instances-names.service does."""
        self.rules.joinpath("names.ip").write_text(self.shipped("names.ip"))
        self.rules.joinpath("names.conf").write_text(self.shipped("names.conf") + "user=root\nlog-facility=-\n")
        unit = self.shipped("instances-names.service").replace("/etc/instances/", f"{self.rules}/")
        for command in re.findall("^ExecStartPre=(.*)", unit, re.MULTILINE):
            self.run(*command.split())
        command = re.findall("^ExecStart=(.*)", unit, re.MULTILINE)[0]
        self.names = self.start_logged("names.log", *command.split())

    def start_lead(self):
        """Start instances-lead.py."""
        self.rules.joinpath("gateway.ip").write_text(self.shipped("gateway.ip"))
        self.rules.joinpath("gateway.conf").write_text(
            self.shipped("gateway.conf") + f"user=root\nlog-facility={self.folder}/dnsmasq.log\nlog-dhcp\n"
        )
        self.program = self.start_logged("lead.log", sys.executable, self.site.bin / "instances-lead.py")

    def start_follow(self, writer, **variables):
        """Start instances-follow.py."""
        command = (sys.executable, self.site.bin / "instances-follow.py")
        self.program = self.start_logged("follow.log", *command, INSTANCES_WRITER=writer, **variables)

    def end_group(self):
        """End what a program has started, as systemd does when it ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.program.pid, signal.SIGKILL)  # its session's first group
        self.run("ip", "link", "delete", "gw0", check=False)

    def leads(self):
        """Tell whether this host is the gateway."""
        return self.run("ip", "link", "show", "gw0", check=False).returncode == 0

    def cut(self, port, state="down"):
        """Cut this host off from a network, or join it again."""
        self.site.switch.run("ip", "link", "set", f"{port}-{self.letter}", state)

    def said(self, log="lead.log"):
        """Return what a program has said."""
        return (self.folder / log).read_text() if (self.folder / log).exists() else ""


def certificates(folder):
    """Return the page's commands to make certificates, in a folder."""
    return block("examples/network/README.md", "openssl req").replace("/root/etcd", str(folder))


class Site:
    """A switch for the guests' network, one for management, and three hosts."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for script in (UPDATE, PROCESS, *FOLDER.glob("instances-*.py")):
            shutil.copy(script, self.bin)
        self.hosts = []
        self.switch = Namespace("switch")
        for bridge in ("lan", "mgmt0"):
            self.switch.run("ip", "link", "add", bridge, "type", "bridge")
            self.switch.run("ip", "link", "set", bridge, "up")
        chain = "chain c { type filter hook prerouting priority 0; ether type 0x8035 counter; }"
        self.switch.run("nft", f"table bridge seen {{ {chain}; }}")
        for number in (1, 2, 3):
            self.hosts.append(Member(self, number))
        self.make_certificates()
        for host in self.hosts:
            host.start_etcd()
        wait_for(lambda: all(host.etcd_status() for host in self.hosts), "etcd", 60)
        self.ports = [f"lan-{host.letter}" for host in self.hosts]

    def make_certificates(self):
        """Run the page's own commands."""
        folder = self.folder / "ca"
        run("sh", "-euc", certificates(folder))
        for host in self.hosts:
            tls = host.folder / "tls"
            tls.mkdir()
            shutil.copy(folder / "ca.crt", tls)
            for end in ("crt", "key"):
                shutil.copy(folder / f"{host.letter}.{end}", tls / f"host.{end}")

    def leader(self):
        """Return the host that leads, None if none does, or it is not known to all."""
        leading = [host for host in self.hosts if host.leads() and not Path(f"{host.base}.follows").exists()]
        return leading[0] if len(leading) == 1 else None

    def others(self, host):
        """Return the other hosts."""
        return [other for other in self.hosts if other is not host]

    def move_etcd_leader(self, host):
        """Have a host's etcd lead the others."""
        status = wait_for(lambda: all(s := [h.etcd_status() for h in self.hosts]) and s, "etcd", 60)
        member = status[self.hosts.index(host)]["header"]["member_id"]
        at = next((h for h, s in zip(self.hosts, status) if s["header"]["member_id"] == s["leader"]), host)
        if at is not host:
            at.etcdctl("move-leader", f"{member:x}")

    def rarps(self):
        """Return how many RARP frames the switch has had."""
        return int(re.search(r"packets (\d+)", self.switch.run("nft", "list", "table", "bridge", "seen").stdout)[1])

    def sniff(self):
        """Record which hosts send by the gateway's MAC address, and when."""
        with open(self.folder / "sniffed", "w") as log:
            self.switch.start(sys.executable, "-c", SNIFFER, GATEWAY_MAC, *self.ports, stdout=log)

    def close(self):
        """Take all away."""
        for host in self.hosts:
            host.close()
        self.switch.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Three hosts with etcd, the guard and names."""
    need(*PROGRAMS, "etcd", "etcdctl", "openssl", "prlimit")
    site = None
    try:
        site = Site(tmp_path_factory.mktemp("network"))
        for host in site.hosts:
            host.guard()
            host.start_names()
        yield site
    finally:
        if site:
            site.close()


# ---- One host writes, all follow ----
@pytest.fixture(scope="module")
def followers(site):
    """Host a has dnsmasq and writes, b and c follow; a guest on each."""
    a = site.hosts[0]
    for address in ("10.83.0.1/24", "2001:67c:83::1/80", "fd83:5eed::1/80"):
        a.run("ip", "address", "add", address, "dev", "br0", "nodad")
    for host in site.hosts:
        host.start_follow("a")
    initialize = (sys.executable, UPDATE, "--initialize", "br0", "host")  # refused until etcd was asked
    wait_for(lambda: a.run(*initialize, env=environment(a.base), check=False).returncode == 0, "the host's entry")
    a.start_dnsmasq(config=a.example("dnsmasq/br0.conf"))
    site.guests = [host.client(f"guest-{host.letter}", f"10:66:6a:4c:b{n}:11") for n, host in enumerate(site.hosts)]
    for guest in site.guests:
        guest.dhcp4(guest.label)
        guest.dhcp6(guest.label)
    yield site


def equal(site):
    """Tell whether all hosts have the same registry, and nothing left to do."""
    registries = [host.registry() for host in site.hosts]
    marked = [host for host in site.hosts if Path(f"{host.base}.updated").exists()]
    return registries[0] and registries.count(registries[0]) == len(registries) and not marked


def in_force(host, mac, address):
    """Tell whether a host's guard lets this pass."""
    element = f"{{ {address} . {mac} }}"
    return (
        host.run("nft", "get", "element", "bridge", "instances", "instances_ip", element, check=False).returncode == 0
    )


def fill(host, count):
    """Give the registry as many instances more."""
    registry = host.registry()
    for number in range(count):
        mac = f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"
        registry[mac] = {
            "name": f"i{number}",
            "ipv6_lla": f"fe80::ff:fe00:{number:x}",
            "ipv4": f"10.84.{number >> 8}.{number & 255}",
        }
        registry[mac] |= {"ipv6_gua": f"2001:67c:84::{number:x}", "ipv6_ula": f"fd84:5eed::{number:x}"}
    write(host, registry)


def write(host, registry):
    """Replace a registry, as by hand, and mark it."""
    new = Path(f"{host.base}.new")
    new.write_text(json.dumps(registry, indent=2) + "\n")
    new.rename(f"{host.base}.json")
    Path(f"{host.base}.updated").touch()


def test_guests_of_all_hosts_are_registered_on_all_and_reach_each_other(followers):
    wait_for(lambda: equal(followers), "equal registries")
    for one, other in itertools.permutations(followers.guests, 2):
        entry = one.host.registry()[other.mac]
        for field in ("ipv4", "ipv6_gua", "ipv6_ula"):
            assert one.pings(entry[field]), f"{one.label} {other.label} {field}"


def test_each_host_answers_its_own_guests_for_names(followers):
    a, b, c = followers.hosts
    address = a.registry()[followers.guests[0].mac]["ipv4"]

    def answers(guest, server, option):
        asked = ("dig", "+short", "+timeout=3", option, f"@{server}", "guest-a.instance.internal", "A")
        return guest.run(*asked, check=False).stdout.split() == [address]

    for case in itertools.product(followers.guests, ("10.83.0.2", "fd83:5eed::2"), ("+notcp", "+tcp")):
        wait_for(lambda case=case: answers(*case), f"a name for {case[0].label}, {case[1:]}")
    c.names.send_signal(signal.SIGSTOP)  # only its own guest is without
    try:
        asked = ("dig", "+short", "+timeout=1", "+tries=1", "@10.83.0.2", "guest-a.instance.internal", "A")
        assert [guest.run(*asked, check=False).returncode for guest in followers.guests] == [0, 0, 9]
    finally:
        c.names.send_signal(signal.SIGCONT)


class Pinger:
    """A ping that goes on, and who answered it when."""

    def __init__(self, guest, address):
        self.guest, self.log = guest, guest.folder / f"ping-{address}-{time.monotonic_ns()}"
        with open(self.log, "w") as log:
            self.process = guest.start("ping", "-D", "-n", "-O", "-i", "0.1", address, stdout=log, stderr=log)

    def answers(self):
        """Return (time, number, TTL) of the answers so far."""
        pattern = r"^\[([\d.]+)\] \d+ bytes.*icmp_seq=(\d+) (?:ttl|hop limit)=(\d+)"
        found = re.findall(pattern, self.log.read_text(), re.MULTILINE)
        return [(float(when), int(number), int(ttl)) for when, number, ttl in found]

    def answered(self, since=0.0):
        """Tell whether there was an answer after a time."""
        return any(when > since for when, _, _ in self.answers())

    def lost(self):
        """End it; return how many pings were lost between the first answer and the last."""
        self.guest.stop(self.process, signal.SIGINT)
        numbers = [number for _, number, _ in self.answers()]
        return numbers[-1] - numbers[0] + 1 - len(set(numbers))


def move(guest, host, port):
    """Unplug a guest, and plug it in at another host."""
    guest.host.run("ip", "link", "set", port, "netns", host.name)
    host.run("ip", "link", "set", port, "master", "br0", "up")
    guest.host.clients.remove(guest)
    host.clients.append(guest)
    guest.host = host


def rarp(mac):
    """Return what QEMU sends in its guest's name when it has arrived."""
    own = bytes.fromhex(mac.replace(":", ""))
    return b"\xff" * 6 + own + bytes.fromhex("80350001080006040003") + (own + bytes(4)) * 2 + bytes(18)


def heard(guest, action, wanted):
    """Return the frames with these octets that a guest hears while something is done."""
    code = "import socket as s; e = s.socket(s.AF_PACKET, s.SOCK_RAW, s.ntohs(3)); e.bind(('eth0', 0))\n"
    code += "print('ready', flush=True)\nwhile True: print(e.recv(2000).hex(), flush=True)"
    log = guest.folder / f"heard-{time.monotonic_ns()}"
    with open(log, "w") as file:
        process = guest.start(sys.executable, "-c", code, stdout=file)
    wait_for(lambda: "ready" in log.read_text(), "the listener")
    action()
    mark = f"{time.monotonic_ns() & 0xFFFFFFFF:08x}"  # what came before this answer has been heard
    guest.run("ping", "-n", "-c", "1", "-p", mark, "10.83.0.1", check=False)
    wait_for(lambda: mark * 2 in log.read_text(), "the mark")
    guest.stop(process)
    return [line for line in log.read_text().split() if wanted in line]


def test_moved_guest_is_reached_at_once_and_nobody_else_may_use_its_name(followers):
    a, b, c = followers.hosts
    guest = a.client("mover", "10:66:6a:4c:b0:21", port="mover")
    guest.dhcp4("mover")
    guest.dhcp6("mover")
    wait_for(lambda: equal(followers), "equal registries")
    entry = a.registry()[guest.mac]
    pingers = [Pinger(followers.guests[n], entry[field]) for n in (1, 2) for field in ("ipv4", "ipv6_ula")]
    wait_for(lambda: all(p.answered() for p in pingers), "answers before the move")
    for host, announced in ((b, False), (c, True), (a, False), (b, True)):
        before = dropped(host)
        move(guest, host, "mover")
        if announced:
            seen = followers.rarps()
            guest.send(rarp(guest.mac))
            wait_for(lambda seen=seen: followers.rarps() > seen, "the switch hears of the move")
        guest.wait_link_local()
        guest.run("ip", "address", "replace", f"{entry['ipv6_ula']}/80", "dev", "eth0", "nodad")
        now = time.time()
        wait_for(lambda now=now: all(p.answered(now) for p in pingers), f"answers on {host.letter}")
        assert dropped(host) == before
    report(
        f"four moves, each with ten pings a second by two guests of each version: lost {[p.lost() for p in pingers]}"
    )
    check_spoofing(followers, guest, entry)


def dropped(host):
    """Return how many frames the host's guard has dropped, the limit of requests aside."""
    return host.dropped() - host.dropped(reason="DHCP too often")


def spoofed(own, victim, entry):
    """Return frames in another's name: ARP, NDP, IPv4, IPv6 and DHCP."""
    from scapy.layers.dhcp import BOOTP, DHCP
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
    from scapy.layers.l2 import ARP, Ether

    link, address, address6 = Ether(src=own, dst="ff:ff:ff:ff:ff:ff"), entry["ipv4"], entry["ipv6_ula"]
    all_nodes = Ether(src=own, dst="33:33:00:00:00:01")
    advert = ICMPv6ND_NA(tgt=address6, R=0, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=own)
    frames = {
        "ARP address": link / ARP(op=2, hwsrc=own, psrc=address, hwdst="ff:ff:ff:ff:ff:ff", pdst=address),
        "NDP target": all_nodes / IPv6(src=address6, dst="ff02::1") / advert,
        "IPv4 source": link / IP(src=address, dst="255.255.255.255") / UDP(sport=7, dport=7) / b"spoofed",
        "IPv6 source": all_nodes / IPv6(src=address6, dst="ff02::1") / UDP(sport=7, dport=7) / b"spoofed",
        "DHCP message": link
        / IP(src="0.0.0.0", dst="255.255.255.255")
        / UDP(sport=68, dport=67)
        / BOOTP(chaddr=bytes.fromhex(victim.replace(":", "")), xid=83)
        / DHCP(options=[("message-type", "discover"), "end"]),
    }
    return {kind: bytes(frame) for kind, frame in frames.items()}


def check_spoofing(site, guest, entry):
    """Have a guest of each host speak in another's name: nothing arrives, and each frame is counted with its reason."""
    table = ("nft", "delete", "table", "bridge", "instances")
    for host in site.hosts:
        mac = f"10:66:6a:4c:b{site.hosts.index(host)}:31"
        attacker = host.client(f"attacker-{host.letter}", mac, port="attacker")
        listener = site.guests[(site.hosts.index(host) + 1) % 3]
        frames = spoofed(mac, guest.mac, entry)
        host.run(*table)
        for (
            kind,
            frame,
        ) in frames.items():  # without the guard each arrives, but DHCP, which the other's guard keeps out
            assert kind == "DHCP message" or heard(
                listener, lambda a=attacker, f=frame: a.send(f), frame[6:30].hex()
            ), kind
        host.run("nft", "-f", host.rules / "network.nft")
        for kind, frame in frames.items():
            before = host.dropped(mac, kind)
            assert not heard(listener, lambda a=attacker, f=frame: a.send(f), frame[6:30].hex()), kind
            assert host.dropped(mac, kind) > before, kind
        leave(attacker)


def test_dhcp_of_guests_goes_to_the_server_and_to_no_guest(followers):
    a, b, c = followers.hosts
    asks = b.client("asks", "10:66:6a:4c:b1:41", port="asks")
    for listener in followers.guests:
        assert not [
            f for f in heard(listener, lambda: asks.dhcp4("asks"), asks.mac.replace(":", "")) if f[46:48] == "11"
        ]
        for process in list(asks.processes):
            asks.stop(process)
    rogue = b.client("rogue", "10:66:6a:4c:b1:42", port="rogue")
    own = bytes.fromhex(rogue.mac.replace(":", ""))
    before = b.dropped(rogue.mac, "DHCP server")
    from scapy.layers.dhcp import BOOTP
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether

    rogue.dhcp4("rogue")
    wait_for(lambda: in_force(b, rogue.mac, b.registry()[rogue.mac]["ipv4"]), "the rogue's own address")
    reply = Ether(src=rogue.mac, dst="ff:ff:ff:ff:ff:ff") / IP(
        src=b.registry()[rogue.mac]["ipv4"], dst="255.255.255.255"
    )
    rogue.send(bytes(reply / UDP(sport=67, dport=68) / BOOTP(op=2, chaddr=own)))
    wait_for(lambda: b.dropped(rogue.mac, "DHCP server") > before, "the rogue's reply dropped")


def test_change_on_a_follower_is_refused_with_the_name_of_the_host_to_make_it_on(followers):
    b = followers.hosts[1]
    before = Path(f"{b.base}.json").read_bytes()
    for arguments in (["--rename", followers.guests[1].mac, "x"], ["--remove", followers.guests[1].mac]):
        result = b.run(sys.executable, UPDATE, *arguments, env=environment(b.base), check=False)
        assert result.returncode == 1 and result.stderr.endswith(": a writes it\n")
    assert Path(f"{b.base}.json").read_bytes() == before
    Path(f"{b.base}.json").write_text("{}\n")  # by hand: it does not last
    wait_for(lambda: Path(f"{b.base}.json").read_bytes() == before, "what etcd has")


def told(host):
    """Return the lines of what has failed."""
    return [line for line in host.said("follow.log").splitlines() if not line.endswith(": goes on")]


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"{}", b'{"changes": {"a": 1}}', b"[" * 100000], ids="123456")
def test_history_that_is_none_is_not_taken_and_the_writer_replaces_it(followers, value, request):
    a, b, c = followers.hosts
    before, lines_before = c.registry(), told(c)
    a.program.send_signal(signal.SIGSTOP)
    Path(c.folder, "value").write_bytes(zlib.compress(value) if value != b"{" else value)
    with open(c.folder / "value", "rb") as file:
        c.etcdctl("put", "/instances/history", stdin=file)
    lines = wait_for(lambda: told(c)[len(lines_before) :], "a line")
    assert len(lines) == 1 and "not taken" in lines[0]
    assert c.registry() == before == b.registry() and followers.guests[2].pings(before[followers.guests[1].mac]["ipv4"])
    a.program.send_signal(signal.SIGCONT)
    number = request.node.callspec.id
    a.update("add", f"10:66:6a:4c:c3:0{number}", f"10.85.1.{number}")
    wait_for(lambda: equal(followers) and f"10:66:6a:4c:c3:0{number}" in c.registry(), "the next change")


def test_registry_too_large_for_etcd_is_told_in_one_line_and_all_goes_on(followers):
    a, b, c = followers.hosts
    before, lines_before = a.registry(), told(a)
    large = before | {
        f"02:00:00:01:{n >> 8:02x}:{n & 255:02x}": {"name": "", "note": os.urandom(1200).hex()} for n in range(7000)
    }
    write(a, large)
    lines = wait_for(lambda: told(a)[len(lines_before) :], "a line")
    assert len(lines) == 1 and "larger than max" in lines[0]
    assert c.registry() == before
    write(a, before)
    a.update("add", "10:66:6a:4c:c1:02", "10.85.2.1")
    wait_for(lambda: equal(followers) and "10:66:6a:4c:c1:02" in c.registry(), "the next change")


def test_full_disk_is_told_in_one_line_and_what_was_missed_comes_later(followers):
    a, _, c = followers.hosts
    fill(a, 100)  # larger than the log
    wait_for(lambda: equal(followers), "equal registries")
    before, lines_before = c.registry(), told(c)
    c.run("prlimit", "--pid", str(c.program.pid), "--fsize=10000:")
    a.update("add", "10:66:6a:4c:c1:03", "10.85.3.1")
    lines = wait_for(lambda: told(c)[len(lines_before) :], "a line")
    assert len(lines) == 1 and "File too large" in lines[0] and c.registry() == before
    c.run("prlimit", "--pid", str(c.program.pid), "--fsize=unlimited:")
    wait_for(lambda: equal(followers) and "10:66:6a:4c:c1:03" in c.registry(), "the change")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_host_whose_etcd_is_gone_goes_on_and_follows_when_it_is_back(followers, number):
    a, _, c = followers.hosts
    before, lines_before = c.registry(), told(c)
    mac = f"10:66:6a:4c:c2:{number:02x}"
    if number == signal.SIGKILL:
        c.stop(c.etcd, number)
    else:
        c.etcd.send_signal(number)
    a.update("add", mac, f"10.85.4.{number}")
    wait_for(lambda: mac in followers.hosts[1].registry(), "the change on b")
    wait_for(lambda: told(c)[len(lines_before) :], "a line")
    assert c.registry() == before and followers.guests[2].pings(before[followers.guests[1].mac]["ipv4"])
    if number == signal.SIGKILL:
        c.start_etcd()
    else:
        c.etcd.send_signal(signal.SIGCONT)
    wait_for(lambda: equal(followers) and mac in c.registry(), "the change on c", 60)
    assert len(told(c)) - len(lines_before) <= 3  # a line for each thing that failed, and one at its end


def test_without_a_majority_guests_go_on_and_changes_wait(followers):
    a, b, c = followers.hosts
    before, lines_before = c.registry(), told(a)
    pinger = Pinger(followers.guests[0], before[followers.guests[2].mac]["ipv4"])
    for host in (b, c):
        host.cut("mgmt0")
    guest = a.client("alone", "10:66:6a:4c:b0:51", port="alone")
    guest.dhcp4("alone")  # registered on a
    wait_for(lambda: len(told(a)) > len(lines_before), "a line of the writer's", 60)
    time.sleep(SECONDS)
    assert b.registry() == c.registry() == before
    for host in (b, c):
        host.cut("mgmt0", "up")
    wait_for(lambda: equal(followers) and guest.mac in c.registry(), "the change", 60)
    report(f"without a majority: pings lost between guests {pinger.lost()}")


def test_wrong_certificate_is_told_in_one_line_and_nothing_is_taken(followers):
    c = followers.hosts[2]
    before, lines_before = c.registry(), told(c)
    tls = c.folder / "wrong"
    run("sh", "-euc", certificates(tls))
    for end in ("crt", "key"):
        (tls / f"c.{end}").rename(tls / f"host.{end}")
    c.stop(c.program)
    right = c.program
    c.start_follow("a", INSTANCES_TLS=str(tls))
    lines = wait_for(lambda: told(c)[len(lines_before) :], "a line")
    assert len(lines) == 1 and "certificate verify failed" in lines[0] and c.registry() == before and right
    shutil.copy(c.folder / "tls" / "ca.crt", tls)  # now it is etcd that does not believe
    c.stop(c.program)
    c.start_follow("a", INSTANCES_TLS=str(tls))
    lines = wait_for(lambda: told(c)[len(lines_before) + 1 :], "a line")
    assert "etcd at 127.0.0.1:2379" in lines[0] and c.registry() == before
    c.stop(c.program)
    c.start_follow("a")


def cost(process):
    """Return a process's seconds of processor time, with that of what it has run, and KiB of memory."""
    stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    return sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK"), int(memory)


def watch_cost(site, seconds):
    """Report what the programs cost while nothing changes; return how many revisions etcd has more."""
    wait_for(lambda: equal(site), "equal registries")
    status = site.hosts[0].etcd_status()
    before = {host.letter: (cost(host.program)[0], cost(host.etcd)[0]) for host in site.hosts}
    time.sleep(seconds)
    for host in site.hosts:
        after, hours = (cost(host.program), cost(host.etcd)), seconds / 3600
        used = [f"{(now[0] - then) / hours:.0f} s, {now[1]} KiB" for now, then in zip(after, before[host.letter])]
        report(f"{host.letter}: processor time in an hour, and memory: program {used[0]}, etcd {used[1]}")
    after = site.hosts[0].etcd_status()
    report(f"etcd's log: {after['raftIndex'] - status['raftIndex']} entries more")
    return after["header"]["revision"] - status["header"]["revision"]


def test_nothing_is_written_to_etcd_while_nothing_changes(followers):
    assert watch_cost(followers, SECONDS) == 0


def test_new_writer_begins_with_the_registry_of_the_others(followers):
    a, b, c = followers.hosts
    before = a.registry()
    for host in followers.hosts:
        host.stop(host.program)
    Path(f"{b.base}.json").unlink()  # even if its own is lost
    for host in (b, c, a):
        host.start_follow("b")
    wait_for(lambda: not Path(f"{b.base}.follows").exists() and Path(f"{a.base}.follows").exists(), "the new writer")
    assert b.registry() == before
    b.update("add", "10:66:6a:4c:c1:05", "10.85.5.1")
    wait_for(lambda: equal(followers) and "10:66:6a:4c:c1:05" in a.registry(), "its change")
    for host in followers.hosts:
        host.stop(host.program)
        host.start_follow("a")
    wait_for(lambda: not Path(f"{a.base}.follows").exists() and Path(f"{b.base}.follows").exists(), "the former writer")


def add_one(followers, mac, address):
    """Have a guest entered on the writer's host, and wait until all have it."""
    followers.hosts[0].update("add", mac, address)
    wait_for(lambda: equal(followers) and mac in followers.hosts[1].registry(), f"{mac} on all")


def test_writer_from_a_backup_takes_what_it_lacks_and_keeps_what_it_entered_since(followers):
    a, _, c = followers.hosts
    saved = [Path(f"{a.base}{end}").read_bytes() for end in (".json", ".shared")]
    add_one(followers, "10:66:6a:4c:c6:01", "10.85.6.1")
    a.stop(a.program)
    for end, old in zip((".json", ".shared"), saved):
        Path(f"{a.base}{end}").write_bytes(old)
    a.update("add", "10:66:6a:4c:c6:02", "10.85.6.2")
    a.start_follow("a")
    wait_for(lambda: equal(followers) and "10:66:6a:4c:c6:02" in c.registry(), "its own")
    assert "10:66:6a:4c:c6:01" in c.registry()


@pytest.mark.parametrize("word", ["--take", "--give"])
def test_writer_that_can_not_tell_which_is_newer_changes_nothing_and_asks(followers, word):
    a, b, c = followers.hosts
    add_one(followers, f"10:66:6a:4c:c7:0{len(word)}", "10.85.7.1")
    before, lines_before = c.registry(), told(a)
    a.stop(a.program)
    Path(f"{a.base}.shared").unlink()
    a.update("--remove", followers.guests[2].mac)
    a.start_follow("a")
    lines = wait_for(lambda: told(a)[len(lines_before) :], "a line")
    assert len(lines) == 1 and "--take goes on with etcd's, --give with this host's" in lines[0]
    own = a.registry()
    assert followers.guests[2].mac not in own and c.registry() == before
    command = (sys.executable, followers.bin / "instances-follow.py", word)
    env = environment(a.base, INSTANCES_TLS=f"{a.folder}/tls")
    env["PATH"] = f"{followers.bin}:{env['PATH']}"
    a.run(*command, env=env)
    wait_for(lambda: equal(followers) and c.registry() == {"--take": before, "--give": own}[word], "one registry")
    refused = b.run(*command, env=env | environment(b.base, INSTANCES_TLS=f"{b.folder}/tls"), check=False)
    assert refused.returncode == 1 and refused.stderr.endswith("does not write: a writes it\n")
    write(a, before)
    wait_for(lambda: equal(followers) and c.registry() == before, "all as before")


@pytest.mark.parametrize("count", [10, 1000, 5000])
def test_change_is_in_force_on_another_host(followers, count):
    a, b, c = followers.hosts
    before = a.registry()
    fill(a, count)
    wait_for(lambda: equal(followers) and c.registry() == a.registry(), "the registry on c", 120)
    times = []
    for number in range(3):
        mac, address = f"10:66:6a:4c:c0:{number:02x}", f"10.85.0.{number + 1}"
        a.update("add", mac, address)
        begun = time.monotonic()
        wait_for(lambda new=(mac, address): in_force(c, *new), "in force on c", 120)
        times.append(time.monotonic() - begun)
        wait_for(lambda: equal(followers), "equal registries", 120)
    report(f"{count} instances: from a change to its element on another host {' '.join(f'{t:.2f}' for t in times)} s")
    write(a, before)
    wait_for(lambda: equal(followers) and b.registry() == before, "the former registry", 120)


# ---- Any host can be the one ----
@pytest.fixture(scope="module")
def leaders(followers):
    """The same three hosts, after the change to the second step."""
    a = followers.hosts[0]
    a.stop(a.dnsmasq, signal.SIGKILL)  # it may be busy with names
    a.run("ip", "address", "flush", "dev", "br0", "scope", "global")
    followers.sniff()
    for host in followers.hosts:
        host.stop(host.program)
    for host in followers.hosts:
        host.start_lead()
    wait_for(followers.leader, "a leader")
    wait_for(lambda: equal(followers) and GATEWAY_MAC in followers.hosts[0].registry(), "its entry")
    return followers


def fault(host, what):
    """Do this to a host; return what heals it."""
    if what == "SIGTERM":
        host.stop(host.program)
        return host.start_lead
    if what == "SIGKILL":
        host.program.kill()
        host.program.wait()
        host.end_group()
        return host.start_lead
    if what.startswith("cut"):
        ports = ("lan", "mgmt0") if what == "cut off" else ("mgmt0",)
        for port in ports:
            host.cut(port)
        return lambda: [host.cut(port, "up") for port in ports]
    stopped = {"stop program": [host.program], "stop etcd": [host.etcd], "stop both": [host.program, host.etcd]}
    for process in stopped.get(what, []):
        process.send_signal(signal.SIGSTOP)
    if what == "kill etcd":
        host.stop(host.etcd, signal.SIGKILL)
        return host.start_etcd
    return lambda: [process.send_signal(signal.SIGCONT) for process in stopped[what]]


def runs(values):
    """Return a sequence without its repetitions."""
    return [value for value, _ in itertools.groupby(values)]


def renew(guest):
    """Have a guest's clients renew, IPv6 with its server as of before; AssertionError if an address changes."""
    addresses = guest.addresses("10.83") + guest.addresses("fd83") + guest.addresses("2001")
    four, six = (next(p for p in guest.processes if name in p.args) for name in ("udhcpc", "dhclient"))
    events = len(guest.events().splitlines())
    four.send_signal(signal.SIGUSR1)
    guest.stop(six)
    leases = guest.folder / "leases6-a"
    for start in re.findall(r"starts (\d+)", leases.read_text()):  # past T1 of 12 h
        leases.write_text(leases.read_text().replace(f"starts {start}", f"starts {int(start) - 30000}"))
    guest.start_dhcp6(guest.label)

    def renewed():
        kinds = {tuple(line.split()[:2]) for line in guest.events().splitlines()[events:]}
        return all(
            any(k in ("renew", "RENEW6", "REBIND6", "BOUND6") and a == address for k, a in kinds)
            for address in addresses
        )

    wait_for(renewed, f"renewals of {guest.label}: {addresses}: {guest.events()}", 60)


FAULTS = ["SIGTERM", "SIGKILL", "stop program", "stop etcd", "kill etcd", "stop both", "cut off", "cut management"]
CASES = [(what, "the same host") for what in FAULTS] + [("SIGKILL", "another host"), ("cut off", "another host")]


@pytest.mark.parametrize("what, etcd_leader", CASES)
def test_another_host_leads_and_never_two(leaders, what, etcd_leader):
    old = leaders.leader()
    leaders.move_etcd_leader(old if etcd_leader == "the same host" else leaders.others(old)[0])
    others = [guest for guest in leaders.guests if guest.host is not old]
    entries = old.registry()
    gateway = [Pinger(guest, "10.83.0.1") for guest in leaders.guests]
    between = [Pinger(others[0], entries[others[1].mac][field]) for field in ("ipv4", "ipv6_ula")]
    wait_for(lambda: all(p.answered() for p in gateway + between), "answers before")
    begun = time.time()
    heal = fault(old, what)
    wait_for(
        lambda: any(t > begun and ttl != gateway_ttl(old) for p in gateway for t, _, ttl in p.answers()),
        "another leads",
        90,
    )
    new = wait_for(lambda: next((h for h in leaders.others(old) if h.leads()), None), "another leads")
    number = CASES.index((what, etcd_leader))
    new_guest = new.client("new", f"10:66:6a:4c:d0:{number:02x}", port=f"new{number}")
    new_guest.dhcp4(f"new-{number}")  # a lease while the other host is away
    heal()
    wait_for(lambda: equal(leaders) and new_guest.mac in old.registry(), "equal registries", 90)
    wait_for(lambda: not old.leads() and new.leads(), "one gateway")
    now = time.time()
    wait_for(lambda: all(p.answered(now) for p in gateway), "answers to all")
    for guest in leaders.guests:
        renew(guest)
    answers = sorted((when, ttl) for p in gateway for when, _, ttl in p.answers())
    assert runs(ttl for _, ttl in answers) == [gateway_ttl(old), gateway_ttl(new)]
    sent = [line.split() for line in (leaders.folder / "sniffed").read_text().splitlines()]
    senders = runs(port for when, port in sorted((float(when), port) for when, port in sent) if when > begun)
    assert senders in ([f"lan-{old.letter}", f"lan-{new.letter}"], [f"lan-{new.letter}"])
    last = max((when for when, ttl in answers if ttl == gateway_ttl(old)), default=begun)
    first = min(when for when, ttl in answers if ttl == gateway_ttl(new))
    lost = [p.lost() for p in between], [p.lost() for p in gateway]
    report(
        f"{what}, etcd's leader on {etcd_leader}: another answers after {first - begun:.1f} s, {first - last:.1f} "
        f"s after the last answer; of ten pings a second lost between other hosts {lost[0]}, to the gateway {lost[1]}"
    )
    leave(new_guest)
    assert entries.items() <= old.registry().items()


def gateway_ttl(host):
    """Return the TTL that a host's answers have."""
    return 60 + "abc".index(host.letter) + 1


def leave(guest):
    """Take a guest away."""
    guest.host.clients.remove(guest)
    guest.close()


def test_gateway_is_not_reached_when_its_program_hangs_even_if_no_other_can_lead(leaders):
    old = leaders.leader()
    others = leaders.others(old)
    pinger = Pinger(next(guest for guest in leaders.guests if guest.host is old), "10.83.0.1")
    wait_for(pinger.answered, "answers before")
    for host in others:
        host.program.send_signal(signal.SIGSTOP)
    begun = time.time()
    old.program.send_signal(signal.SIGSTOP)
    wait_for(lambda: time.time() - max(when for when, _, _ in pinger.answers()) > 2, "no answer for 2 s")
    report(f"a program that hangs: the last answer after {max(w for w, _, _ in pinger.answers()) - begun:.1f} s")
    for host in leaders.hosts:
        host.program.send_signal(signal.SIGCONT)
    wait_for(lambda: leaders.leader() and pinger.answered(time.time() - 1), "a leader", 60)
    wait_for(lambda: equal(leaders), "equal registries")


def test_nothing_is_written_to_etcd_while_a_leader_leads(leaders):
    assert watch_cost(leaders, SECONDS) == 0


def test_dnsmasq_that_ends_has_another_host_lead(leaders):
    old = leaders.leader()
    children = Path(f"/proc/{old.program.pid}/task/{old.program.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    wait_for(lambda: any(host.leads() for host in leaders.others(old)), "another leads", 60)
    assert old.program.wait(30) == 1
    old.processes.remove(old.program)
    old.start_lead()
    wait_for(lambda: equal(leaders), "equal registries")


def test_change_where_no_host_leads_or_another_is_refused_with_its_name(leaders):
    leader = leaders.leader()
    for host in leaders.others(leader):
        reason = f": {leader.letter} leads\n"
        wait_for(lambda of=(host, reason): Path(f"{of[0].base}.follows").read_text() in of[1], "the leader's name")
        result = host.run(
            sys.executable, UPDATE, "--remove", leaders.guests[0].mac, env=environment(host.base), check=False
        )
        assert result.returncode == 1 and result.stderr.endswith(reason)
    leader.update("--rename", leaders.guests[0].mac, "renamed")
    wait_for(
        lambda: all(h.registry()[leaders.guests[0].mac]["name"] == "renamed" for h in leaders.hosts), "the name on all"
    )


# ---- What happens to etcd once a year ----
@pytest.fixture(scope="module")
def chaos(leaders):
    """The same, with guests that ping the gateway."""
    return network_chaos.Chaos(leaders, [Pinger(guest, "10.83.0.1") for guest in leaders.guests])


@pytest.mark.parametrize("case", [name for name, (*_, quick) in network_chaos.CASES.items() if quick])
def test_all_hosts_have_what_was_acknowledged_after(chaos, case):
    took, times = network_chaos.play(chaos, case)
    report(f"{case}: one registry in force after {took:.1f} s; a host began to lead {times} times")


# ---- One program by itself ----
REFUSER = """
import http.server, json, ssl, sys

class Refuser(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(503)
        self.end_headers()
        self.wfile.write(json.dumps({"code": 14, "message": "etcdserver: no leader"}).encode())

tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
tls.load_cert_chain(sys.argv[1] + "/a.crt", sys.argv[1] + "/a.key")
server = http.server.HTTPServer(("127.0.0.1", 2379), Refuser)
server.socket = tls.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture
def lone(host):
    """A host with the programs and certificates, and without an etcd."""
    need(*PROGRAMS, "openssl")
    run("sh", "-euc", certificates(host.folder / "tls"))
    for end in ("crt", "key"):
        shutil.copy(host.folder / "tls" / f"a.{end}", host.folder / "tls" / f"host.{end}")
    (host.folder / "bin").mkdir()
    for script in (UPDATE, *FOLDER.glob("instances-*.py")):
        shutil.copy(script, host.folder / "bin")
    return host


def start_lone(host, name, **variables):
    """Start a program; return it, and a way to read what it says."""
    log = host.folder / "said"
    env = environment(host.base, INSTANCES_WRITER="b", INSTANCES_TLS=f"{host.folder}/tls", **variables)
    with open(log, "w") as file:
        program = host.start(sys.executable, host.folder / "bin" / name, env=env, stderr=file)
    return program, log.read_text


PAIR = pytest.mark.parametrize("name", ["instances-follow.py", "instances-lead.py"])


@PAIR
def test_error_of_an_etcd_of_3_6_is_told_in_one_line_and_all_goes_on(lone, name):
    lone.start(sys.executable, "-c", REFUSER, lone.folder / "tls", stderr=subprocess.DEVNULL)
    program, said = start_lone(lone, name)
    wait_for(lambda: "no leader" in said() or program.poll() is not None, "the error")
    assert program.poll() is None and said().splitlines()[-1].endswith(": etcdserver: no leader")


@PAIR
def test_address_of_etcd_that_is_none_is_told_in_one_line(lone, name):
    program, said = start_lone(lone, name, INSTANCES_ETCD="127.0.0.1:etcd")
    wait_for(lambda: "127.0.0.1:etcd" in said() or program.poll() is not None, "the error")
    assert re.fullmatch(rf"{name}: .*127.0.0.1:etcd.*: nonnumeric port: 'etcd'\n", said())


@PAIR
def test_program_that_is_interrupted_says_so_in_one_line(lone, name):
    program, said = start_lone(lone, name)
    wait_for(lambda: "refused" in said(), "its start")
    program.send_signal(signal.SIGINT)
    assert program.wait(30) == 1 and "Traceback" not in said() and said().count("\n") == 2, said()


@PAIR
def test_program_without_the_registrys_script_says_so_and_runs_no_other(lone, name):
    (lone.folder / "bin" / "instances-update.py").unlink()
    (lone.folder / "elsewhere").mkdir()
    (lone.folder / "elsewhere" / "instances-update.py").write_text("print('anybody has written this')\n")
    env = environment(lone.base, PATH="/usr/sbin:/usr/bin:/sbin:/bin")
    command = ("sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", lone.folder / "elsewhere")
    result = lone.run(*command, sys.executable, lone.folder / "bin" / name, env=env, check=False)
    assert result.stdout == "" and result.returncode == 1 and result.stderr.count("\n") == 1, result
