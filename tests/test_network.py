"""The example of one network on several hosts: three hosts, each with an etcd, in namespaces."""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import network_chaos
import pytest
from conftest import PROGRAMS, load, need
from lab import EXAMPLES, PROCESS, UPDATE, Host, Namespace, block, environment, has_ibrname, run, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FOLDER = EXAMPLES / "network"
SECONDS = 2  # how long what is without a majority, or without a change, is looked at
GATEWAY_MAC = "10:66:6a:4c:a1:fe"
SNIFFER = """
import socket, sys, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
while True:
    frame, (port, _, kind, *_) = s.recvfrom(2000)
    if frame[6:12].hex(":") == sys.argv[1] and port.startswith("lan-") and kind != 4:  # not what the switch sends there
        print(time.time(), port, flush=True)
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
        self.ttl = 60 + number  # by which a guest sees who answers it
        self.set("net/ipv4/ip_default_ttl", str(self.ttl))
        self.set("net/ipv4/conf/all/arp_ignore", "1")
        self.set("net/ipv4/conf/all/arp_notify", "1")
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

    def take_certificate(self, made, name="tls"):
        """Install this host's own of the certificates that were made, in a folder of this name."""
        (self.folder / name).mkdir(exist_ok=True)
        shutil.copy(made / "ca.crt", self.folder / name)
        for end in ("key", "crt"):
            shutil.copy(made / f"{self.letter}.{end}", self.folder / name / f"host.{end}")

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
        """Return etcd's own word on this host's member, None if it does not answer."""
        text = self.etcdctl("endpoint", "status", "-w", "json", check=False).strip()
        return json.loads(text)[0]["Status"] if text.startswith("[") else None

    def enter(self, number):
        """Have an instance entered by hand; return its MAC address."""
        mac = f"10:66:6a:4c:c0:{number:02x}"
        self.update("add", mac, f"10.85.0.{number}")
        return mac

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

    def kill(self):
        """Have the program, and what it has started, end at once, as systemd does, or a power cut."""
        self.program.kill()
        self.program.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.program.pid, signal.SIGKILL)  # its session's first group
        self.run("ip", "link", "delete", "gw0", check=False)

    def follows(self):
        """Return whom this host follows, "" if nobody."""
        path = Path(f"{self.base}.follows")
        return path.read_text() if path.exists() else ""

    def leads(self):
        """Tell whether this host is the gateway."""
        return self.run("ip", "link", "show", "gw0", check=False).returncode == 0

    def cut(self, port, state="down"):
        """Cut this host off from a network, or join it again."""
        self.site.switch.run("ip", "link", "set", f"{port}-{self.letter}", state)

    def said(self, log="lead.log"):
        """Return what a program has said."""
        return (self.folder / log).read_text() if (self.folder / log).exists() else ""


def make_certificates(folder):
    """Run the page's commands to make certificates, in a folder."""
    run("sh", "-euc", block("examples/network/README.md", "openssl req").replace("/root/etcd", str(folder)))


def copy_programs(folder):
    """Install the programs, etcd being asked more often though it tells of no change."""
    for script in (UPDATE, PROCESS, *FOLDER.glob("instances-*.py")):
        shutil.copy(script, folder)
    follow = folder / "instances-follow.py"
    follow.write_text(follow.read_text().replace("\nCHECK = 10 ", "\nCHECK = 2 "))


class Site:
    """A switch for the guests' network, one for management, and three hosts."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        copy_programs(self.bin)
        self.hosts = []
        self.switch = Namespace("switch")
        for bridge in ("lan", "mgmt0"):
            self.switch.run("ip", "link", "add", bridge, "type", "bridge")
            self.switch.run("ip", "link", "set", bridge, "up")
        chain = "chain c { type filter hook prerouting priority 0; ether type 0x8035 counter; }"
        self.switch.run("nft", f"table bridge seen {{ {chain}; }}")
        for number in (1, 2, 3):
            self.hosts.append(Member(self, number))
        make_certificates(folder / "ca")
        for host in self.hosts:
            host.take_certificate(folder / "ca")
            host.start_etcd()
        wait_for(lambda: all(host.etcd_status() for host in self.hosts), "etcd", 60)

    def leader(self):
        """Return the host that leads, None if none does, or it is not known to all."""
        leading = [host for host in self.hosts if host.leads() and not host.follows()]
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
            self.switch.start(sys.executable, "-c", SNIFFER, GATEWAY_MAC, stdout=log)

    def sniffed(self):
        """Return when, and by which port of the switch, frames came from that address."""
        lines = [line.split() for line in (self.folder / "sniffed").read_text().splitlines()]
        return sorted((float(when), port) for when, port in lines)

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
    join(site)
    yield site


def join(site):
    """Have a guest on each host."""
    places = enumerate(site.hosts)
    site.guests = [host.client(f"guest-{host.letter}", f"10:66:6a:4c:b{n}:11", wait=False) for n, host in places]
    for guest in site.guests:
        guest.start_dhcp4(guest.label)
        guest.start_dhcp6(guest.label)
    for guest in site.guests:
        guest.wait_registered("bound 10.8", "BOUND6 2001", "BOUND6 fd83")


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


def write(host, registry):
    """Replace a registry, as by hand, and mark it."""
    new = Path(f"{host.base}.new")
    new.write_text(json.dumps(registry, indent=2) + "\n")
    new.rename(f"{host.base}.json")
    Path(f"{host.base}.updated").touch()


def fill(host, count):
    """Give the registry as many instances more, of which each has 24 octets that are nobody else's."""
    registry = host.registry()
    for number in range(count):
        six = [f"{digits[:4]}:{digits[4:8]}:{digits[8:]}" for digits in (os.urandom(6).hex(), os.urandom(6).hex())]
        mac, four = f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}", f"{number >> 8}.{number & 255}"
        registry[mac] = {"name": f"i{number}", "ipv6_lla": f"fe80::ff:fe00:{number:x}", "ipv4": f"10.84.{four}"}
        registry[mac] |= {"ipv6_gua": f"2001:67c:84::{six[0]}", "ipv6_ula": f"fd84:5eed::{six[1]}"}
    write(host, registry)


def known(site, mac):
    """Wait until all hosts have one registry, with this instance."""
    wait_for(lambda: equal(site) and mac in site.hosts[2].registry(), f"{mac} on all", 60)


def test_guests_of_all_hosts_are_registered_on_all_and_reach_each_other(followers):
    wait_for(lambda: equal(followers), "equal registries")
    for one, other in itertools.permutations(followers.guests, 2):
        entry = one.host.registry()[other.mac]
        for field in ("ipv4", "ipv6_gua", "ipv6_ula"):
            assert one.pings(entry[field]), f"{one.label} {other.label} {field}"


def test_each_host_answers_its_own_guests_for_names(followers):
    address = followers.hosts[0].registry()[followers.guests[0].mac]["ipv4"]

    def asks(guest, server, *options):
        asked = ("dig", "+short", *options, f"@{server}", "guest-a.instance.internal", "A")
        return guest.run(*asked, check=False)

    for case in itertools.product(followers.guests, ("10.83.0.2", "fd83:5eed::2"), ("+notcp", "+tcp")):
        wait_for(lambda case=case: asks(*case).stdout.split() == [address], f"a name for {case[0].label}, {case[1:]}")
    names = followers.hosts[2].names
    names.send_signal(signal.SIGSTOP)  # only its own guest is without
    try:
        answers = [asks(guest, "10.83.0.2", "+timeout=1", "+tries=1").returncode for guest in followers.guests]
        assert answers == [0, 0, 9]
    finally:
        names.send_signal(signal.SIGCONT)


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
        assert numbers, self.log.read_text()
        return numbers[-1] - numbers[0] + 1 - len(set(numbers))


def move(guest, host, port):
    """Unplug a guest, and plug it in at another host."""
    guest.host.run("ip", "link", "set", port, "netns", host.name)
    host.run("ip", "link", "set", port, "master", "br0", "up")
    guest.host.clients.remove(guest)
    host.clients.append(guest)
    guest.host = host


def leave(guest):
    """Take a guest away."""
    guest.host.clients.remove(guest)
    guest.close()


def rarp(mac):
    """Return what QEMU sends in its guest's name when it has arrived."""
    own = bytes.fromhex(mac.replace(":", ""))
    return b"\xff" * 6 + own + bytes.fromhex("80350001080006040003") + (own + bytes(4)) * 2 + bytes(18)


def dropped(host):
    """Return how many frames the host's guard has dropped, the limit of requests aside."""
    return host.dropped() - host.dropped(reason="DHCP too often")


def test_moved_guest_is_reached_at_once(followers):
    a, b, c = followers.hosts
    guest = a.client("mover", "10:66:6a:4c:b0:21", port="mover")
    guest.dhcp4("mover")
    guest.dhcp6("mover")
    known(followers, guest.mac)
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
        now = time.time()
        wait_for(lambda now=now: all(p.answered(now) for p in pingers), f"answers on {host.letter}")
        assert dropped(host) == before
    report(f"four moves: pings lost, of ten a second by two guests of each version: {[p.lost() for p in pingers]}")


@contextlib.contextmanager
def listening(guest):
    """Have a guest listen; give a function that returns the frames so far, with all that were sent before."""
    from attacks import SNIFFER, hearing  # which needs scapy

    with hearing(guest, SNIFFER) as heard:

        def all_heard():
            mark = os.urandom(4).hex()
            guest.run("ping", "-n", "-c", "1", "-p", mark, "10.83.0.1")
            wait_for(lambda: sum(mark * 2 in line for line in heard().splitlines()) > 1, "the answer to the mark")
            return heard().splitlines()

        yield all_heard


def spoofed(attacker, victim, entry):
    """Return frames of an attacker's in another's name, by the reasons to drop them."""
    from attacks import EVERYONE, NODES, bootp, datagram, scapy

    own, four, six = attacker.mac, entry["ipv4"], entry["ipv6_ula"]
    arp = scapy.ARP(op=2, hwsrc=own, psrc=four, hwdst=EVERYONE, pdst=four)
    advert = scapy.ICMPv6ND_NA(tgt=six, R=0, S=0, O=1) / scapy.ICMPv6NDOptDstLLAddr(lladdr=own)
    frames = {
        "ARP address": scapy.Ether(src=own, dst=EVERYONE) / arp,
        "NDP target": scapy.Ether(src=own, dst=NODES) / scapy.IPv6(src=six, dst="ff02::1") / advert,
        "IPv4 source": datagram(attacker, four, "255.255.255.255"),
        "IPv6 source": datagram(attacker, six, "ff02::1"),
        "DHCP message": bootp(attacker, "discover", chaddr=victim.mac),
    }
    return {reason: bytes(frame) for reason, frame in frames.items()}


def test_nobody_on_any_host_may_use_the_name_of_a_guest_of_another(followers):
    victim = followers.guests[0]
    entry = victim.host.registry()[victim.mac]
    for number, host in enumerate(followers.hosts):
        attacker = host.client("attacker", f"10:66:6a:4c:b{number}:31", port="attacker", wait=False)
        frames = spoofed(attacker, victim, entry)

        def arrived(attacker=attacker, frames=frames, listener=followers.guests[number - 2]):
            with listening(listener) as heard:
                attacker.send(*frames.values())
                found = heard()
            return [reason for reason, f in frames.items() if any(f[6:30].hex() in line for line in found)]

        host.run("nft", "delete", "table", "bridge", "instances")
        assert arrived() == [reason for reason in frames if reason != "DHCP message"]  # the other's guard keeps it out
        host.run("nft", "-f", host.rules / "network.nft")
        before = {reason: host.dropped(attacker.mac, reason) for reason in frames}
        assert arrived() == []
        assert all(host.dropped(attacker.mac, reason) > before[reason] for reason in frames)
        leave(attacker)
    for node in (*followers.hosts, *followers.guests):  # what they believed without the guard
        node.run("ip", "neighbour", "flush", "all")


def test_dhcp_of_guests_goes_to_the_server_and_to_no_guest(followers):
    from attacks import datagram, octets, scapy

    b = followers.hosts[1]
    guest = b.client("asks", "10:66:6a:4c:b1:41", port="asks", wait=False)
    with contextlib.ExitStack() as stack:
        heard = [stack.enter_context(listening(listener)) for listener in followers.guests]
        guest.dhcp4("asks")
        own, udp = guest.mac.replace(":", ""), "11"
        assert not [line for each in heard for line in each() if own in line and line[46:48] == udp]
    address = b.registry()[guest.mac]["ipv4"]
    wait_for(lambda: in_force(b, guest.mac, address), "its own address")
    before = b.dropped(guest.mac, "DHCP server")
    reply = datagram(guest, address, "255.255.255.255", 67, 68) / scapy.BOOTP(op=2, chaddr=octets(guest.mac))
    guest.send(bytes(reply))
    wait_for(lambda: b.dropped(guest.mac, "DHCP server") > before, "a reply of its own dropped")


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


@contextlib.contextmanager
def one_line(site, host, words):
    """Wait until a host says that something fails: in one line, with these words, and nothing is taken meanwhile."""
    before, lines = site.hosts[2].registry(), len(told(host))
    yield
    found = wait_for(lambda: told(host)[lines:], f"a line of {words}", 60)
    assert len(found) == 1 and words in found[0] and site.hosts[2].registry() == before


VALUES = [b"", b"{", *map(zlib.compress, (b"{", b"[]", b"{}", b'{"changes": {}}', b"[" * 100000))]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_value_that_is_no_history_is_invalid(monkeypatch, value):
    monkeypatch.setenv("PATH", f"{UPDATE.parent}:{os.environ['PATH']}")
    etcd = load(FOLDER / "instances-etcd.py")
    entry = {"key": etcd.encoded("/instances/history"), "value": base64.b64encode(value).decode()}
    with pytest.raises(etcd.Invalid):
        etcd.checked(entry)


@pytest.mark.parametrize("number, value", [(1, b"{"), (2, zlib.compress(b'{"changes": {"a": 1}}'))], ids="12")
def test_history_that_is_none_is_not_taken_and_the_writer_replaces_it(followers, number, value):
    a, _, c = followers.hosts
    (c.folder / "value").write_bytes(value)
    a.program.send_signal(signal.SIGSTOP)
    with one_line(followers, c, "not taken"), open(c.folder / "value") as file:
        c.etcdctl("put", "/instances/history", stdin=file)
    assert followers.guests[2].pings(c.registry()[followers.guests[1].mac]["ipv4"])
    a.program.send_signal(signal.SIGCONT)
    known(followers, a.enter(number))


def test_registry_too_large_for_etcd_is_told_in_one_line_and_all_goes_on(followers):
    a = followers.hosts[0]
    before = a.registry()
    with one_line(followers, a, "larger than max"):
        write(
            a, before | {f"02:00:00:01:00:{n:02x}": {"name": "", "note": os.urandom(40000).hex()} for n in range(220)}
        )
    write(a, before)
    known(followers, a.enter(3))


def test_full_disk_is_told_in_one_line_and_what_was_missed_comes_later(followers):
    a, _, c = followers.hosts
    fill(a, 100)  # larger than the log
    wait_for(lambda: equal(followers), "equal registries")
    with one_line(followers, c, "File too large"):
        c.run("prlimit", "--pid", str(c.program.pid), "--fsize=10000:")
        mac = a.enter(4)
    c.run("prlimit", "--pid", str(c.program.pid), "--fsize=unlimited:")
    known(followers, mac)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_host_whose_etcd_is_gone_goes_on_and_follows_when_it_is_back(followers, number):
    a, b, c = followers.hosts
    lines = len(told(c))
    with one_line(followers, c, "etcd "):
        if number == signal.SIGKILL:
            c.stop(c.etcd, number)
        else:
            c.etcd.send_signal(number)
        mac = a.enter(0x10 + number)
        wait_for(lambda: mac in b.registry(), "the change on b")
    assert followers.guests[2].pings(c.registry()[followers.guests[1].mac]["ipv4"])
    if number == signal.SIGKILL:
        c.start_etcd()
    else:
        c.etcd.send_signal(signal.SIGCONT)
    known(followers, mac)
    assert len(told(c)) - lines <= 3  # a line for each thing that failed, and one at its end


def test_without_a_majority_guests_go_on_and_changes_wait(followers):
    a, b, c = followers.hosts
    before = b.registry()
    pinger = Pinger(followers.guests[0], before[followers.guests[2].mac]["ipv4"])
    guest = a.client("alone", "10:66:6a:4c:b0:51", port="alone", wait=False)
    with one_line(followers, a, "etcd at"):
        for host in (b, c):
            host.cut("mgmt0")
        guest.dhcp4("alone")  # registered on a
    time.sleep(SECONDS)
    assert b.registry() == c.registry() == before
    for host in (b, c):
        host.cut("mgmt0", "up")
    known(followers, guest.mac)
    report(f"without a majority: pings lost between guests {pinger.lost()}")


def test_wrong_certificate_is_told_in_one_line_and_nothing_is_taken(followers):
    c = followers.hosts[2]
    make_certificates(followers.folder / "other")
    c.take_certificate(followers.folder / "other", "wrong")
    for words in ("certificate verify failed", "etcd at 127.0.0.1:2379"):
        with one_line(followers, c, words):
            c.stop(c.program)
            c.start_follow("a", INSTANCES_TLS=f"{c.folder}/wrong")
        shutil.copy(c.folder / "tls" / "ca.crt", c.folder / "wrong")  # now it is etcd that does not believe
    c.stop(c.program)
    c.start_follow("a")
    known(followers, followers.hosts[0].enter(5))


def check_nothing_is_written(site, number):
    """Compare etcd's revision before and after a while without a change, and with one."""

    def revision():
        wait_for(lambda: equal(site), "equal registries")
        return site.hosts[0].etcd_status()["header"]["revision"]

    before = revision()
    time.sleep(SECONDS)
    assert revision() == before
    known(site, next(host for host in site.hosts if not host.follows()).enter(number))
    assert revision() > before


def test_nothing_is_written_to_etcd_while_nothing_changes(followers):
    check_nothing_is_written(followers, 6)


def test_new_writer_begins_with_the_registry_of_the_others(followers):
    a, b, c = followers.hosts
    before = a.registry()

    def have_write(writer):
        for host in followers.hosts:
            host.stop(host.program)
            if host is writer:
                Path(f"{host.base}.json").unlink()  # even if its own is lost
            host.start_follow(writer.letter)
        following = [host for host in followers.hosts if host is not writer]
        wait_for(
            lambda: not writer.follows() and all(f"{writer.letter} w" in h.follows() for h in following), "a writer"
        )

    have_write(b)
    assert b.registry() == before
    known(followers, b.enter(8))
    have_write(a)


def test_writer_from_a_backup_takes_what_it_lacks_and_keeps_what_it_entered_since(followers):
    a, _, c = followers.hosts
    saved = {end: Path(f"{a.base}{end}").read_bytes() for end in (".json", ".shared")}
    known(followers, since := a.enter(9))
    a.stop(a.program)
    for end, old in saved.items():
        Path(f"{a.base}{end}").write_bytes(old)
    own = a.enter(10)
    a.start_follow("a")
    known(followers, own)
    assert since in c.registry()


@pytest.mark.parametrize("word", ["--take", "--give"])
def test_writer_that_can_not_tell_which_is_newer_changes_nothing_and_asks(followers, word):
    a, b, c = followers.hosts
    before, gone = c.registry(), followers.guests[2].mac
    with one_line(followers, a, "--take goes on with etcd's, --give with this host's"):
        a.stop(a.program)
        Path(f"{a.base}.shared").unlink()
        a.update("--remove", gone)
        a.start_follow("a")
    own = a.registry()
    assert gone not in own

    def decide(host):
        env = environment(host.base, INSTANCES_TLS=f"{host.folder}/tls")
        env["PATH"] = f"{followers.bin}:{env['PATH']}"
        return host.run(sys.executable, followers.bin / "instances-follow.py", word, env=env, check=False)

    assert decide(a).returncode == 0
    wait_for(lambda: equal(followers) and c.registry() == {"--take": before, "--give": own}[word], "one registry")
    refused = decide(b)
    assert refused.returncode == 1 and refused.stderr.endswith("does not write: a writes it\n")
    write(a, before)
    wait_for(lambda: equal(followers) and c.registry() == before, "all as before")


def test_change_of_a_large_registry_is_in_force_on_another_host(followers):
    a, b, c = followers.hosts
    before = a.registry()
    fill(a, 1000)
    wait_for(lambda: equal(followers) and len(c.registry()) > 1000, "the registry on c", 120)
    times = []
    for number in (11, 12, 13):
        mac, begun = a.enter(number), time.monotonic()
        wait_for(lambda new=(mac, f"10.85.0.{number}"): in_force(c, *new), "in force on c", 120)
        times.append(time.monotonic() - begun)
        wait_for(lambda: equal(followers), "equal registries", 120)
    report(f"1,000 instances: from a change to its element on another host {' '.join(f'{t:.2f}' for t in times)} s")
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
        host.kill()
        return host.start_lead
    if what == "kill etcd":
        host.stop(host.etcd, signal.SIGKILL)
        return host.start_etcd
    if what.startswith("cut"):
        ports = ("lan", "mgmt0") if what == "cut off" else ("mgmt0",)
        for port in ports:
            host.cut(port)
        return lambda: [host.cut(port, "up") for port in ports]
    stopped = {"stop program": [host.program], "stop etcd": [host.etcd], "stop both": [host.program, host.etcd]}[what]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    return lambda: [process.send_signal(signal.SIGCONT) for process in stopped]


def runs(values):
    """Return a sequence without its repetitions."""
    return [value for value, _ in itertools.groupby(values)]


def renew(guests):
    """Have guests' clients renew, IPv6 with its server as of before; AssertionError if an address changes."""
    wanted = {}
    for guest in guests:
        for limit in ("instances_asked", "instances_asked6"):
            guest.host.run("nft", "flush", "set", "bridge", "instances", limit)
        addresses = guest.addresses("10.83") + guest.addresses("fd83") + guest.addresses("2001")
        wanted[guest] = len(guest.events().splitlines()), addresses
        four, six = (next(p for p in guest.processes if name in p.args) for name in ("udhcpc", "dhclient"))
        four.send_signal(signal.SIGUSR1)
        guest.stop(six)
        leases = guest.folder / "leases6-a"
        leases.write_text(re.sub(r"(?<=starts )\d+", lambda m: str(int(m[0]) - 30000), leases.read_text()))  # past T1
        guest.start_dhcp6(guest.label)

    def renewed(guest):
        since, addresses = wanted[guest]
        kinds = {tuple(line.split()[:2]) for line in guest.events().splitlines()[since:]}
        return {a for kind, a in kinds if kind in ("renew", "RENEW6", "REBIND6", "BOUND6")} >= {*addresses}

    for guest in guests:
        wait_for(lambda g=guest: renewed(g), f"renewals of {guest.label}: {wanted[guest]}: {guest.events()}", 60)


FAULTS = ["SIGTERM", "SIGKILL", "stop program", "stop etcd", "kill etcd", "stop both", "cut off", "cut management"]
CASES = [(what, "the same host") for what in FAULTS] + [("SIGKILL", "another host"), ("cut off", "another host")]


@pytest.mark.parametrize("what, etcd_leader", CASES)
def test_another_host_leads_and_never_two(leaders, what, etcd_leader):
    old, number = leaders.leader(), CASES.index((what, etcd_leader))
    leaders.move_etcd_leader(old if etcd_leader == "the same host" else leaders.others(old)[0])
    others = [guest for guest in leaders.guests if guest.host is not old]
    entries = old.registry()
    gateway = [Pinger(guest, "10.83.0.1") for guest in leaders.guests]
    between = [Pinger(others[0], entries[others[1].mac][field]) for field in ("ipv4", "ipv6_ula")]
    wait_for(lambda: all(p.answered() for p in gateway + between), "answers before")
    new_guest = others[0].host.client("new", f"10:66:6a:4c:d0:{number:02x}", port=f"new{number}", wait=False)
    begun = time.time()
    heal = fault(old, what)

    def another_answers():
        return any(when > begun and ttl != old.ttl for p in gateway for when, _, ttl in p.answers())

    wait_for(another_answers, "another leads", 90)
    new = wait_for(lambda: next((h for h in leaders.others(old) if h.leads()), None), "another leads")
    new_guest.dhcp4(f"new-{number}")  # a lease while the other host is away
    heal()
    wait_for(lambda: equal(leaders) and new_guest.mac in old.registry(), "equal registries", 90)
    wait_for(lambda: not old.leads() and new.leads(), "one gateway")
    now = time.time()
    wait_for(lambda: all(p.answered(now) for p in gateway), "answers to all")
    renew(leaders.guests)
    answers = sorted((when, ttl) for p in gateway for when, _, ttl in p.answers())
    assert runs(ttl for _, ttl in answers) == [old.ttl, new.ttl]
    senders = runs(port for when, port in leaders.sniffed() if when > begun)
    assert senders in ([f"lan-{old.letter}", f"lan-{new.letter}"], [f"lan-{new.letter}"])
    last = max((when for when, ttl in answers if ttl == old.ttl), default=begun)
    first = min(when for when, ttl in answers if ttl == new.ttl)
    lost = [p.lost() for p in between], [p.lost() for p in gateway]
    report(
        f"{what}, etcd's leader on {etcd_leader}: another answers after {first - begun:.1f} s, {first - last:.1f} "
        f"s after the last answer; of ten pings a second lost between other hosts {lost[0]}, to the gateway {lost[1]}"
    )
    leave(new_guest)
    assert entries.items() <= old.registry().items()


def test_gateway_is_not_reached_when_its_program_hangs_even_if_no_other_can_lead(leaders):
    old = leaders.leader()
    pinger = Pinger(next(guest for guest in leaders.guests if guest.host is old), "10.83.0.1")
    wait_for(pinger.answered, "answers before")
    for host in leaders.others(old):
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
    check_nothing_is_written(leaders, 7)


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
    leader, mac = leaders.leader(), leaders.guests[0].mac
    for host in leaders.others(leader):
        wait_for(lambda host=host: host.follows() == f"{leader.letter} leads", "the leader's name")
        result = host.run(sys.executable, UPDATE, "--remove", mac, env=environment(host.base), check=False)
        assert result.returncode == 1 and result.stderr.endswith(f": {leader.letter} leads\n")
    leader.update("--rename", mac, "renamed")
    wait_for(lambda: all(h.registry()[mac]["name"] == "renamed" for h in leaders.hosts), "the name on all")


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
@pytest.fixture(params=["instances-follow.py", "instances-lead.py"])
def alone(host, request):
    """A program on a host without an etcd: its path, and a function to start it that returns what it says."""
    need(*PROGRAMS, "openssl")
    (host.folder / "bin").mkdir()
    copy_programs(host.folder / "bin")
    path, log = host.folder / "bin" / request.param, host.folder / "said"

    def start(**variables):
        env = environment(host.base, INSTANCES_WRITER="b", INSTANCES_TLS=f"{host.folder}/tls", **variables)
        with open(log, "w") as file:
            host.program = host.start(sys.executable, path, env=env, stderr=file)
        return log.read_text

    return path, start


def test_settings_that_are_none_are_told_in_one_line_and_so_is_an_interruption(alone, host):
    said = alone[1]()
    wait_for(lambda: "No such file" in said() or host.program.poll() is not None, "the error")
    assert re.fullmatch(rf"{alone[0].name}: etcd .*certificates in {host.folder}/tls: .*\n", said())
    make_certificates(host.folder / "tls")
    for end in ("crt", "key"):
        shutil.copy(host.folder / "tls" / f"a.{end}", host.folder / "tls" / f"host.{end}")
    said = alone[1](INSTANCES_ETCD="127.0.0.1:etcd")
    wait_for(lambda: "127.0.0.1:etcd" in said() or host.program.poll() is not None, "the error")
    assert re.fullmatch(rf"{alone[0].name}: .*127.0.0.1:etcd.*: nonnumeric port: 'etcd'\n", said())
    host.program.send_signal(signal.SIGINT)
    assert host.program.wait(30) == 1 and "Traceback" not in said() and said().count("\n") == 2, said()


def test_program_without_the_registrys_script_says_so_and_runs_no_other(alone, host):
    (host.folder / "bin" / "instances-update.py").unlink()
    (host.folder / "elsewhere").mkdir()
    (host.folder / "elsewhere" / "instances-update.py").write_text("print('anybody has written this')\n")
    env = environment(host.base, PATH="/usr/sbin:/usr/bin:/sbin:/bin")
    command = ("sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", host.folder / "elsewhere", sys.executable, alone[0])
    result = host.run(*command, env=env, check=False)
    assert result.stdout == "" and result.returncode == 1 and result.stderr.count("\n") == 1, result
