"""Three hosts of one network, each with an etcd, in namespaces, for the tests of examples/network."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from lab import EXAMPLES, PROCESS, UPDATE, Host, Namespace, block, environment, has_ibrname, run, wait_for

FOLDER = EXAMPLES / "network"
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
        text, tls = (FOLDER / name).read_text(), self.folder / "tls"
        for there, here in (("/var/lib/misc", self.folder), ("/usr/local/sbin", self.site.bin), ("/etc/etcd", tls)):
            text = text.replace(there, str(here))
        return text if has_ibrname() else re.sub("^ *meta [io]brname .*\n", "", text, flags=re.MULTILINE)

    def start_logged(self, log, *command, **variables):
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
        settings = self.etcd_settings | {"ETCD_DATA_DIR": f"{self.folder}/etcd", "ETCD_LOGGER": "zap"}
        settings["ETCD_UNSAFE_NO_FSYNC"] = "true"  # or three on one disk, which other tests keep busy, are too slow
        self.etcd = self.start_logged("etcd.log", "etcd", **settings)

    def peer(self):
        """Return by which URL the other members reach this host's etcd."""
        return self.etcd_settings["ETCD_INITIAL_ADVERTISE_PEER_URLS"]

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

    def refusal(self, *arguments):
        """Return what instances-update.py says where it refuses a change."""
        result = self.run(sys.executable, UPDATE, *arguments, env=environment(self.base), check=False)
        assert result.returncode == 1, result
        return result.stderr

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
        self.rules.joinpath("gateway.ip").write_text(self.shipped("gateway.ip"))
        own = f"user=root\nlog-facility={self.folder}/dnsmasq.log\nlog-dhcp\n"
        self.rules.joinpath("gateway.conf").write_text(self.shipped("gateway.conf") + own)
        self.program = self.start_logged("lead.log", sys.executable, self.site.bin / "instances-lead.py")

    def start_follow(self, writer, **variables):
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
        self.switch = Namespace("switch")
        for bridge in ("lan", "mgmt0"):
            self.switch.run("ip", "link", "add", bridge, "type", "bridge")
            self.switch.run("ip", "link", "set", bridge, "up")
        chain = "chain c { type filter hook prerouting priority 0; ether type 0x8035 counter; }"
        self.switch.run("nft", f"table bridge seen {{ {chain}; }}")
        self.hosts = [Member(self, number) for number in (1, 2, 3)]
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
        return [other for other in self.hosts if other is not host]

    def another_leads(self, former):
        """Wait until another host leads; return it."""
        others = self.others(former)
        return wait_for(lambda: next((host for host in others if host.leads()), None), "another leads", 60)

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
        for host in self.hosts:
            host.close()
        self.switch.close()


def join(site):
    places = enumerate(site.hosts)
    site.guests = [host.client(f"guest-{host.letter}", f"10:66:6a:4c:b{n}:11", wait=False) for n, host in places]
    for guest in site.guests:
        guest.start_dhcp4(guest.label)
        guest.start_dhcp6(guest.label)
    for guest in site.guests:
        guest.wait_registered("bound 10.8", "BOUND6 2001", "BOUND6 fd83")


@contextlib.contextmanager
def leading(folder):
    """Three hosts, one of which leads, with a guest on each."""
    with contextlib.closing(Site(folder)) as site:
        for host in site.hosts:
            host.guard()
        site.sniff()
        for host in site.hosts:
            host.start_lead()
        wait_for(site.leader, "a leader", 60)
        join(site)
        yield site


def equal(site):
    """Tell whether all hosts have the same registry, and nothing left to do."""
    registries = [host.registry() for host in site.hosts]
    marked = [host for host in site.hosts if Path(f"{host.base}.updated").exists()]
    return registries[0] and registries.count(registries[0]) == len(registries) and not marked


def fault(host, what):
    """Do this to a host; return what heals it."""
    if what in ("SIGTERM", "SIGKILL"):
        host.stop(host.program) if what == "SIGTERM" else host.kill()
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


def in_force(host, mac, address):
    """Tell whether a host's guard lets this pass."""
    get = ["nft", "get", "element", "bridge", "instances", "instances_ip", f"{{ {address} . {mac} }}"]
    return host.run(*get, check=False).returncode == 0


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


def leave(guest):
    guest.host.clients.remove(guest)
    guest.close()


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


def check_nothing_is_written(site, number):
    """Compare etcd's revision before and after a while without a change, and with one."""

    def revision():
        wait_for(lambda: equal(site), "equal registries")
        return site.hosts[0].etcd_status()["header"]["revision"]

    before = revision()
    time.sleep(2)
    assert revision() == before
    known(site, next(host for host in site.hosts if not host.follows()).enter(number))
    assert revision() > before
