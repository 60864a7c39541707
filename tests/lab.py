"""A host with a bridge, and clients on it, in network namespaces: nothing outside of them is touched."""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

TOP = Path(__file__).parent.parent
UPDATE = TOP / "instances-update.py"
PROCESS = TOP / "instances-process.py"
EXAMPLES = TOP / "examples"
APPLY = EXAMPLES / "systemd" / "instances-apply"
EDIT = EXAMPLES / "systemd" / "instances-edit"
DOMAIN = "instance.internal"
HOST_MAC = "10:66:6a:4c:a1:fe"
BRIDGE_ADDRESSES = ("10.83.0.1/24", "2001:67c:83::1/80", "fd83:5eed::1/80")
DHCP_RANGES = ("10.83.0.100,10.83.0.199", "2001:67c:83::100,2001:67c:83::1ff,80", "fd83:5eed::100,fd83:5eed::1ff,80")
HAS_BR_NETFILTER = Path("/proc/sys/net/bridge").exists()
PATIENCE = int(os.environ.get("TEST_PATIENCE", "1"))  # how many times as slow as others a machine may be
OPEN = []  # the namespaces that are there
# Another dnsmasq than the bridge's, which takes nothing from the machine
DNSMASQ = ["dnsmasq", "--conf-file=/dev/null", "--keep-in-foreground", "--user=root", "--pid-file", "--log-facility=-"]
DNSMASQ += ["--no-resolv", "--no-hosts"]
_numbers = itertools.count()


@functools.cache
def has_ibrname() -> bool:
    """Tell whether this kernel can tell the bridge of a frame (README says what to do where it can't)."""
    rule = "table bridge t { chain c { meta ibrname br0 accept; }; }"
    return subprocess.run(["unshare", "--net", "nft", rule], capture_output=True).returncode == 0


# Waits until the process of this number is over, however it ended, and takes away the namespaces that it has left.
KEEPER = """\
trap '' INT TERM HUP
cat
for namespace in $(ip netns | grep -o "^inst$0-[^ ]*"); do
    for _ in 1 2 3; do ip netns pids "$namespace" | xargs -r kill -KILL; done
    ip netns delete "$namespace"
done
"""


@functools.cache
def keep_order() -> subprocess.Popen:
    """Have somebody clear up where this process can't, since it was killed: a pipe tells of its end."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = ["sh", "-c", KEEPER, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **quiet)


def bound(*command) -> list[str]:
    """Return a command, of some length, that is to end in order when the process that started it has ended."""
    return ["setpriv", "--pdeathsig", "TERM", *map(str, command)]


# What both DHCP clients run, each with variables of its own, to take an address and to tell that it did.
CLIENT_SCRIPT = """\
#!/bin/sh
set -eu
case "${1-}${reason-}" in
bound | renew) ip address replace "$ip/24" dev "$interface" ;;
BOUND6 | RENEW6 | REBIND6) ip address replace "$new_ip6_address/$new_ip6_prefixlen" dev "$interface" nodad ;;
esac
echo "${1-}${reason-} ${ip-}${new_ip6_address-} router=${router-} mtu=${mtu-}" >> "$0.log"
"""


# What puts on eth0, even if it is another device by now, what each line says, and says so
SOCKET = """\
import socket, sys
packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
for line in sys.stdin:
    packets.sendto(bytes.fromhex(line), ("eth0", 0))
    print("sent", flush=True)
"""
# struct tpacket_hdr: its status, TP_STATUS_SEND_REQUEST, and the frame's length; the frame is behind these 32 octets.
RING = """\
import mmap, socket, struct, sys
packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
SOL_PACKET, PACKET_TX_RING = 263, 13
packets.setsockopt(SOL_PACKET, PACKET_TX_RING, struct.pack("4I", 4096, 1, 4096, 1))
ring = mmap.mmap(packets.fileno(), 4096)
for line in sys.stdin:
    frame = bytes.fromhex(line)
    ring[32 : 32 + len(frame)] = frame
    ring[:12] = struct.pack("LI", 1, len(frame))
    packets.sendto(b"", ("eth0", 0))
    print("sent", flush=True)
"""
# Prints what comes to an address, in IPv6's form, and a UDP port, and from where
LISTENER = """\
import socket, sys
heard = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
heard.bind((sys.argv[1], int(sys.argv[2])))
print("listens", flush=True)
while True:
    print(*heard.recvfrom(2000), flush=True)
"""


def wait_for(condition, what: str, seconds: float = 30):
    """Return the condition's first true value; AssertionError when the deadline has passed without one."""
    start = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - start
        assert waited < seconds * PATIENCE, f"waited {seconds} s in vain: {what}"
        time.sleep(min(0.02 + waited / 5, 0.2))  # many wait beside each other, and to look costs more than to sleep
    return value


def environment(base: Path, **variables: str) -> dict[str, str]:
    """Return the environment for a script with its files at base: our scripts and this Python are on the PATH."""
    path = f"{TOP}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "INSTANCES_BASE_PATH": str(base)} | variables


def run_script(script: Path, *arguments: str, base: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a script as a user would; return its status and output."""
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment(base, **variables), capture_output=True, text=True)


def run(*command, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a command; an AssertionError shows the output of one that failed."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def block(page: str, words: str) -> str:
    """Return the fenced block of a page (examples/cron/README.md) that has these words."""
    return run(TOP / "tests" / "block.sh", page, words.replace("\n", "\\n")).stdout


def process_file(pid: str | int, name: str) -> str:
    """Return what /proc has in a file of a process, "" where the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: str | int) -> bool:
    """Tell whether a process has not ended; the sockets of one that has are closed, even before its parent asks."""
    return re.search(r"^State:\s[^ZX]", process_file(pid, "status"), re.MULTILINE) is not None


def mounted(mounts: dict[str, Path]) -> list[str]:
    """Return the beginning of a command that is run where these paths are other files or folders, {path: other}."""
    mounting = "".join(f"mount --bind '{other}' '{path}'\n" for path, other in mounts.items())
    return ["unshare", "--mount", "sh", "-ec", f'{mounting}exec "$@"', "sh"]


def make_etc(folder: Path) -> Path:
    """Make a folder to be mounted in the place of /etc; return it."""
    for name in ("passwd", "group", "nsswitch.conf"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(Path("/etc", name).read_bytes())
    return folder


class Namespace:
    """A network namespace and the processes started in it."""

    def __init__(self, label: str):
        keep_order()
        self.name = f"inst{os.getpid()}-{next(_numbers)}-{label}"
        self.processes: list[subprocess.Popen] = []
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        OPEN.append(self)
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *arguments) -> list[str]:
        """Return the command that runs these arguments in the namespace."""
        # The usual way gives each command a /sys of its own, for which all others wait where many run
        lean = arguments[:1] in (("ip",), ("nft",), ("ping",))
        entering = ["nsenter", f"--net=/run/netns/{self.name}"] if lean else ["ip", "netns", "exec", self.name]
        return [*entering, *map(str, arguments)]

    def neighbour(self, address: str) -> str:
        """Return the MAC address that the kernel here has for a neighbour's IP address."""
        found = json.loads(self.run("ip", "-json", "neighbour", "show", address).stdout or "[]")
        return found[0].get("lladdr", "") if found else ""

    def set(self, variable: str, value: str) -> None:
        """Set a variable of the kernel's network configuration, as net/ipv6/conf/all/forwarding."""
        self.run("sh", "-c", f"echo {value} > /proc/sys/{variable}")

    def run(self, *arguments, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Run a command to its end; an AssertionError shows the output of one that failed."""
        result = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=120, **options)
        assert not check or result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
        return result

    def ip(self, *lines: str) -> None:
        """Run ip with each of these lines."""
        self.run("ip", "-batch", "-", input="\n".join(lines))

    def pings(self, address: str, *options: str) -> bool:
        """Tell whether an address answers."""
        return self.run("ping", "-n", "-c", "1", "-W", "2", *options, address, check=False).returncode == 0

    def finds(self, address: str, mac: str) -> bool:
        """Tell whether an address, with its zone or without, answers, and is the neighbour's with this MAC address."""
        return self.pings(address) and self.neighbour(address.partition("%")[0]) == mac

    def start(self, *arguments, **options) -> subprocess.Popen:
        """Start a command that is ended with the namespace."""
        self.processes.append(subprocess.Popen(self.command(*arguments), **options))
        return self.processes[-1]

    def hear(self, log: Path, address: str, port: int) -> None:
        """Write to a file what comes to an address, in IPv6's form, and a UDP port; return when it is listened to."""
        with open(log, "w") as file:
            self.start(sys.executable, "-c", LISTENER, address, port, stdout=file)
        wait_for(log.read_text, "a listener")

    def stop(self, process: subprocess.Popen, number: int = signal.SIGTERM) -> None:
        """End one of the started processes."""
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        process.wait(10)
        self.processes.remove(process)

    def close(self) -> None:
        """End the processes, and what they have left in the namespace, and take it away."""
        for process in list(self.processes):
            self.stop(process, signal.SIGKILL)
        for pid in run("ip", "netns", "pids", self.name).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", self.name], check=True)
        OPEN.remove(self)


class Client(Namespace):
    """A namespace with an interface eth0 on a host's bridge, as a container has it."""

    def __init__(self, host: "Host", label: str, mac: str, port: str, bridge: str, detects: bool):
        super().__init__(label)
        self.host, self.label, self.mac, self.port, self.senders = host, label, mac, port, {}
        self.folder = host.folder / self.name
        self.folder.mkdir()
        self.script = self.folder / "client-script"
        self.script.write_text(CLIENT_SCRIPT)
        self.script.chmod(0o755)
        peer = ["type", "veth", "peer", "name", "eth0", "address", mac, "netns", self.name]
        host.run("ip", "link", "add", port, *peer)
        host.run("ip", "link", "set", port, *(["master", bridge] if bridge else []), "up")
        up = "ip link set eth0 up"
        if not detects:  # duplicates of its link-local address, which takes a kernel two seconds
            transmits = "/proc/sys/net/ipv6/conf/eth0/dad_transmits"
            up = f"echo 0 >{transmits}; {up}; echo 1 >{transmits}"
        self.run("sh", "-c", up)

    def wait_link_local(self) -> None:
        """Wait until duplicate address detection of the link-local address is over: DHCPv6 needs it."""
        wait_for(lambda: self.addresses("fe80:"), f"link-local address of {self.label}")

    def addresses(self, prefix: str = "") -> list[str]:
        """Return the interface's addresses that are in use and begin so."""
        entries = json.loads(self.run("ip", "-json", "address", "show", "dev", "eth0").stdout)[0]["addr_info"]
        return [e["local"] for e in entries if e["local"].startswith(prefix) and not e.get("tentative")]

    def start_dhcp4(self, hostname: str = "") -> subprocess.Popen:
        """Start udhcpc; what it gets is in events()."""
        options = ["-x", f"hostname:{hostname}"] if hostname else []
        command = ["udhcpc", "-f", "-i", "eth0", "-s", self.script, "-T", "1", "-A", "1", "-O", "mtu", *options]
        return self.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start_dhcp6(self, hostname: str = "", system: str = "a") -> subprocess.Popen:
        """Start dhclient for DHCPv6; what it gets is in events(). Each system, a letter, has a DUID of its own."""
        self.wait_link_local()
        config, leases = self.folder / "dhclient.conf", self.folder / f"leases6-{system}"
        config.write_text(f'send fqdn.fqdn "{hostname}";\n' if hostname else "")
        if not leases.exists():  # DUID-EN, RFC 8415, section 11.3
            leases.write_text(f'default-duid "\\000\\002\\000\\000\\000\\001{self.mac}{system}";\n')
        files = ["-cf", config, "-lf", leases, "-pf", self.folder / "pid6", "-sf", self.script]
        command = ["dhclient", "-6", "-d", *files, "eth0"]
        return self.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def dhcp4(self, hostname: str = "") -> subprocess.Popen:
        """Start udhcpc; return when its lease is registered."""
        process = self.start_dhcp4(hostname)
        self.wait_registered("bound 10.8")
        return process

    def dhcp6(self, hostname: str = "") -> subprocess.Popen:
        """Start dhclient for DHCPv6; return when both leases are registered."""
        process = self.start_dhcp6(hostname)
        self.wait_registered("BOUND6 2001", "BOUND6 fd83")
        return process

    def events(self) -> str:
        """Return what the DHCP clients have told so far, a line an event: what, and the address."""
        log = Path(f"{self.script}.log")
        return log.read_text() if log.exists() else ""

    def wait_registered(self, *events: str) -> None:
        """Wait for events that begin so, and for their addresses to be registered."""
        wait_for(lambda: all(event in self.events() for event in events), f"{events} in {self.name}")
        leased = {line.split()[1] for line in self.events().splitlines() if line.startswith(events)}
        wait_for(lambda: leased <= set(self.host.registry().get(self.mac, {}).values()), f"{leased} registered")

    def wait_pings(self, *addresses: str) -> None:
        """Wait until each of these addresses has answered."""
        for address in addresses:
            wait_for(lambda a=address: self.pings(a), f"a ping of {address} from {self.label}")

    def send(self, *frames: bytes, ring: bool = False) -> None:
        """Put frames on the interface; return when they are sent. By a ring, all behind the first header lies apart."""
        code, pipes = RING if ring else SOCKET, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        if code not in self.senders or self.senders[code].poll() is not None:
            self.senders[code] = self.start(sys.executable, "-c", code, text=True, **pipes)
        for frame in frames:
            print(frame.hex(), file=self.senders[code].stdin, flush=True)
            assert self.senders[code].stdout.readline() == "sent\n"

    def resolve(self, name: str, kind: str) -> list[str]:
        """Return the addresses that dnsmasq tells this client for a name."""
        lines = self.run("dig", "+short", "+timeout=2", "@10.83.0.1", name, kind).stdout.splitlines()
        return [line for line in lines if not line.startswith(";")]  # which tells of a try that was in vain


class Host(Namespace):
    """A host with the bridge br0, a dnsmasq that runs our script, and our files in a folder."""

    def __init__(self, folder: Path, addresses: tuple = BRIDGE_ADDRESSES, mac: str = HOST_MAC, bridge: bool = True):
        super().__init__("host")
        self.folder, self.base, self.mac, self.dnsmasq = folder, folder / "instances", mac, None
        self.clients: list[Client] = []
        (folder / "hosts.d").mkdir()
        if bridge:
            self.make_bridge(addresses)

    def make_bridge(self, addresses: tuple = BRIDGE_ADDRESSES) -> None:
        """Make the bridge."""
        self.run("ip", "link", "add", "br0", "address", self.mac, "type", "bridge")
        self.run("ip", "link", "set", "br0", "up")
        for address in addresses:
            self.run("ip", "address", "add", address, "dev", "br0", "nodad")

    def client(self, label: str, mac: str, port: str = "", bridge: str = "br0", wait: bool = True) -> Client:
        """Add a client, to the bridge unless that is ""; return it with a link-local address, or while its kernel still
        detects duplicates of that."""
        self.clients.append(Client(self, label, mac, port or f"veth{len(self.clients)}", bridge, not wait))
        if wait:
            self.clients[-1].wait_link_local()
        return self.clients[-1]

    def start_dnsmasq(self, *ranges: str, config: Path = Path("/dev/null")) -> None:
        """Start the bridge's dnsmasq, by a configuration or for all kinds of addresses; return when it answers."""
        options = [
            f"--conf-file={config}",
            "--keep-in-foreground",
            "--user=root",
            "--no-resolv",
            "--no-poll",
            "--pid-file",
        ]
        options += ["--log-facility=-", "--log-dhcp"]
        if config == Path("/dev/null"):
            options += ["--interface=br0", "--bind-interfaces", "--no-hosts", f"--hostsdir={self.folder}/hosts.d"]
            options += [f"--dhcp-range={r},120" for r in ranges or DHCP_RANGES] + ["--enable-ra", "--script-on-renewal"]
            options += [f"--local=/{DOMAIN}/", f"--dhcp-script={UPDATE}", f"--dhcp-leasefile={self.folder}/leases"]
            options += ["--dhcp-authoritative", "--no-ping"]
        started = self.log.read_text().count("started, version") if self.log.exists() else 0
        with open(self.log, "a") as log:
            streams = {"stdout": log, "stderr": log, "start_new_session": True}
            self.dnsmasq = self.start("dnsmasq", *options, env=environment(self.base), **streams)
        wait_for(lambda: self.log.read_text().count("started, version") > started, "dnsmasq")

    def stop_dnsmasq(self, at_once: bool = False) -> None:
        """End dnsmasq, if it runs, and wait for the end of its helper, which runs the script: for all that there was to
        tell, or, at once, no longer than for the lease that it tells now."""
        if self.dnsmasq in self.processes:
            self.stop(self.dnsmasq, signal.SIGKILL if at_once else signal.SIGTERM)

        def running():
            if at_once:
                run("pkill", "-KILL", "-x", "--session", self.dnsmasq.pid, "dnsmasq", check=False)
            return re.search("[^ZX\n]", run("ps", "-o", "state=", "--sid", self.dnsmasq.pid, check=False).stdout)

        wait_for(lambda: not self.dnsmasq or not running(), "the end of dnsmasq")

    def write_settings(self, **variables: str) -> Path:
        """Write settings for instances-apply, which keep it to this host's folder, and these; return their file."""
        settings = environment(self.base, **({"INSTANCES_RULES": f"{self.folder}/rules"} | variables))
        file = self.folder / "settings"
        file.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))
        return file

    def applying(self) -> list[str]:
        """Return the command that runs instances-apply, with a /run of this host's own."""
        (self.folder / "run").mkdir(exist_ok=True)
        return [*mounted({"/run": self.folder / "run"}), str(APPLY), f"{self.folder}/settings"]

    def start_guarded(self) -> None:
        """As after a boot: the guard is on, then dnsmasq starts, and the service's work is done on each marker."""
        rules = self.folder / "rules"
        rules.mkdir()
        self.example("nftables/bridge.nft").rename(rules / "bridge.nft")
        self.update("--initialize", "br0", "host")
        self.write_settings()
        self.run(*self.applying())
        work = """flock "$0.service" sh -c '[ ! -e "$0" ] || "$@"' "$0" "$@" """
        service = f'while sleep 0.05; do [ ! -e "$0" ] || {work}; done'
        with open(self.folder / "service.log", "w") as log:
            self.service = self.start(
                "sh", "-c", service, f"{self.base}.updated", *self.applying(), stdout=log, stderr=log
            )
        self.start_dnsmasq(config=self.example("dnsmasq/br0.conf"))

    def settle(self) -> None:
        """Do the service's work, so that it has none to do afterwards."""
        self.run("flock", f"{self.base}.updated.service", *self.applying())

    def br_netfilter(self, on: bool) -> None:
        """Have this host's IP and ARP hooks see what its bridges forward, or not."""
        for hooks in ("arptables", "iptables", "ip6tables") if HAS_BR_NETFILTER else ():
            self.set(f"net/bridge/bridge-nf-call-{hooks}", str(int(on)))

    def example(self, name: str) -> Path:
        """Return a copy of an example's file with this host's paths."""
        copy = self.folder / Path(name).name
        text = (TOP / "examples" / name).read_text()
        for installed, here in (("/var/lib/misc", self.folder), ("/usr/local/sbin", TOP)):
            text = text.replace(installed, str(here))
        if not has_ibrname():
            text = re.sub("^ *meta [io]brname .*\n", "", text, flags=re.MULTILINE)
        copy.write_text(text)
        return copy

    @property
    def log(self) -> Path:
        """The file with dnsmasq's output, our script's messages among it."""
        return self.folder / "dnsmasq.log"

    def update(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """Run instances-update.py on the host."""
        return self.run(sys.executable, UPDATE, *arguments, env=environment(self.base, **variables))

    def process(self) -> None:
        """Do what the service does on an update: make the files, hand over the names, load the chains."""
        self.run(sys.executable, PROCESS, env=environment(self.base, INSTANCES_ADDRESS_SETS="host,web"))
        new = self.folder / "instances.hosts.new"
        new.write_bytes(Path(f"{self.base}.hosts").read_bytes())
        new.rename(self.folder / "hosts.d" / "instances.hosts")

    def registry(self) -> dict:
        """Return the registry, empty if there is none."""
        path = Path(f"{self.base}.json")
        return json.loads(path.read_text()) if path.exists() else {}

    def drops(self, sender: str = "", reason: str = "") -> dict[tuple[str, str], int]:
        """Return {(sender, reason): frames that the guard has dropped}, of one sender and reason if these are given."""
        listing = json.loads(self.run("nft", "-j", "list", "set", "bridge", "instances", "instances_dropped").stdout)
        elements = [element["elem"] for element in listing["nftables"][1]["set"].get("elem", [])]
        drops = {tuple(element["val"]["concat"]): element["counter"]["packets"] for element in elements}
        return {(mac, why): n for (mac, why), n in drops.items() if sender in ("", mac) and reason in ("", why)}

    def dropped(self, sender: str = "", reason: str = "") -> int:
        """Return how many frames that is."""
        return sum(self.drops(sender, reason).values())

    def rules(self, chain: str, text: str = "") -> dict[str, int]:
        """Return handles of a chain's rules with this in their listing, and what each has counted. A chain of another
        table than the guard's has its family and table in front."""
        place = chain if " " in chain else f"bridge instances {chain}"
        listing = self.run("nft", "-a", "list", "chain", *place.split()).stdout
        # nftables 1.1 lists masks as hexadecimal numbers
        listing = re.sub(r"frag-off & (0x\w+) != 0x0", lambda match: f"frag-off & {int(match[1], 0)} != 0", listing)
        rules = [line for line in listing.splitlines() if text in line and re.search(r"^\t\t(?!type .* hook)", line)]
        count = re.compile(r"counter packets (\d+)")
        return {line.rpartition(" ")[2]: int((count.search(line) or (0, 0))[1]) for line in rules}

    def counted(self, chain: str) -> int:
        """Return how many frames the counters of a chain's rules have counted."""
        return sum(self.rules(chain).values())

    def take_out(self, chain: str, text: str = "") -> None:
        """Delete such rules."""
        place = chain if " " in chain else f"bridge instances {chain}"
        handles = self.rules(chain, text)
        assert handles, f"no rule in {chain} with {text}"
        self.run("nft", "-f", "-", input="".join(f"delete rule {place} handle {handle}\n" for handle in handles))

    def close(self) -> None:
        """Take the clients and the host away."""
        for client in self.clients:
            client.close()
        super().close()
