#!/usr/bin/env python3
"""Show what the scripts and the chains cost: medians, and ratios of runs that took turns. Nothing is asserted.

As root, with the Python to be measured: /usr/bin/python3 -B tests/bench.py. It takes about four minutes.
With --svg FILE, only frames are measured, and the first page's picture is made of that.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path

import scapy.all as scapy
from conftest import load
from lab import PROCESS, UPDATE, Host, environment, process_file, run, wait_for

SIZES = (1, 100, 1_000, 10_000)
PAIRS = 20
PYTHON = [sys.executable]
BARE = [*PYTHON, "-c", "pass"]
UPDATE_MODULE = load(UPDATE)
# Send a frame so many times, and print the microseconds of the processor that each took.
SENDER = """\
import socket, sys, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
frame, count = bytes.fromhex(sys.argv[1]), 20000
begin = time.process_time()
for _ in range(count):
    s.send(frame)
print((time.process_time() - begin) / count * 1e6)
"""


def mac(number: int) -> str:
    return f"10:66:6a:00:{number >> 8:02x}:{number & 255:02x}"


def ipv4(number: int, network: int = 83) -> str:
    return f"10.{network}.{number >> 8}.{number & 255}"


def write_registry(base: Path, count: int) -> None:
    """Write a registry of instances with an IPv4, a global, a unique local and a link-local address each."""
    registry = {
        mac(n): {
            "name": f"web-{n}",
            "ipv6_lla": UPDATE_MODULE.link_local(mac(n)),
            "ipv4": ipv4(n),
            "ipv6_gua": f"2001:67c:83::{n + 1:x}",
            "ipv6_ula": f"fd83:5eed::{n + 1:x}",
        }
        for n in range(count)
    }
    Path(f"{base}.json").write_text(UPDATE_MODULE.registry_text(registry))


def timed(command: list, env: dict | None = None) -> float:
    """Run a command; return the milliseconds that it took."""
    begin = time.perf_counter()
    status = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    assert status in (0, 10), command
    return (time.perf_counter() - begin) * 1000


def peak_memory(command: list, env: dict) -> str:
    """Run a command below a small parent, whose memory counts at first; return the most that it had."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stderr=-3); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)"
    return f"{run(*PYTHON, '-c', code, *command, env=env).stdout.strip()} MiB at the most"


def show(what: str, size: int | str, ours: str, other: str, ratio: float | str, note: str = "") -> None:
    """Print a line of the table."""
    ratio = f"{ratio:.2f}" if isinstance(ratio, float) else ratio
    print(f"| {what} | {size} | {ours} | {other} | {ratio} | {note} |", flush=True)


def row(what: str, base: Path, *commands: list, marker: bool = False) -> float:
    """Print a row: a command (of several, one after the other) in turn with a bare start; return the ratio."""
    env, pairs = environment(base), []
    for number in range(PAIRS + 2):
        if marker:
            Path(f"{base}.updated").touch()
        pairs.append((timed([*PYTHON, *commands[number % len(commands)]], env), timed(BARE, env)))
    pairs = pairs[2:]  # the first two warmed up
    ratio = statistics.median(ours / bare for ours, bare in pairs)
    ours, bare = (f"{statistics.median(column):.1f} ms" for column in zip(*pairs))
    note = peak_memory([*PYTHON, *commands[0], "-f"], env) if marker else ""
    show(what, f"{int(base.name):,}", ours, bare, ratio, note)
    return ratio


def rows(what: str, folder: Path, commands, marker: bool = False) -> None:
    """Print a row for each size, and how the ratio grows."""
    ratios = [row(what, folder / str(size), *commands(size - 1), marker=marker) for size in SIZES]
    show("… growth", "100 to 10,000", "", "", ratios[3] / ratios[1])


def measure_scripts(folder: Path) -> None:
    for size in SIZES:
        write_registry(folder / str(size), size)
    layouts = folder / "jq"
    layouts.mkdir()
    for size in SIZES:  # also as jq writes it, with notes
        registry = json.loads((folder / f"{size}.json").read_text())
        registry[mac(0)] |= {"note": "für } {", "tags": ["a", {"b": "c"}]}
        (layouts / f"{size}.json").write_text(run("jq", ".", input=json.dumps(registry)).stdout)

    def old(n: int, *networks: int) -> list:
        return [[UPDATE, "old", mac(n), ipv4(n, network)] for network in networks]

    row("ignored action (`del`)", folder / "10000", [UPDATE, "del", mac(1), ipv4(1)])
    rows("registered lease (`old`)", folder, lambda n: old(n // 2, 83))
    rows("… in a registry with notes as jq writes it", layouts, lambda n: old(n // 2, 83))
    row("processor without a marker", folder / "10000", [PROCESS])
    rows("processor with a marker", folder, lambda n: [[PROCESS]], marker=True)
    rows("lease that changes an address", folder, lambda n: old(n, 98, 99))


@contextmanager
def registered(folder: Path, size: int, addresses: tuple = ("10.83.0.1/16",)):
    """Give a host with so many instances in its registry."""
    (folder / str(size)).mkdir()
    with closing(Host(folder / str(size), addresses)) as host:
        write_registry(host.base, size)
        yield host


def measure_restart(folder: Path) -> None:
    """Measure a dnsmasq that starts with 1,000 leases, all registered but the first and the last of its file.

    Registering these two shows that all are done, whichever way dnsmasq goes through them.
    """
    count = 1000
    with registered(folder, count - 1) as host:
        registry = host.registry()
        del registry[mac(0)]
        Path(f"{host.base}.json").write_text(UPDATE_MODULE.registry_text(registry))
        expiry = int(time.time()) + 86400
        leases = "".join(f"{expiry} {mac(n)} {ipv4(n)} web-{n} *\n" for n in range(count))
        (host.folder / "leases").write_text(leases.replace(ipv4(0), ipv4(2000)))
        begin = time.perf_counter()
        host.start_dnsmasq("10.83.0.0,10.83.255.254,255.255.0.0")
        ends = {mac(0), mac(count - 1)}
        wait_for(lambda: ends <= host.registry().keys(), "the last lease", 120)
        restart = time.perf_counter() - begin
        bare = sum(timed(BARE, environment(host.base)) for _ in range(count)) / 1000
        what, both = "dnsmasq restart with 1,000 registered leases", (f"{restart:.1f} s", f"{bare:.1f} s")
        show(what, f"{count:,}", *both, restart / bare)


def frames(sender: str, receiver: str) -> dict[str, str]:
    """Return what crosses a bridge most, of the first instance's, in hexadecimal; receiver is a MAC address."""
    ether = scapy.Ether(src=sender, dst=receiver)
    headers = {
        "IPv4": scapy.IP(src=ipv4(0), dst=ipv4(1)),
        "IPv6": scapy.IPv6(src="2001:67c:83::1", dst="2001:67c:83::2"),
    }
    packets = {
        f"{version} {kind}": ether / ip / upper(dport=5000) / bytes(1000)
        for version, ip in headers.items()
        for kind, upper in (("TCP", scapy.TCP), ("UDP", scapy.UDP))
    }
    everyone = scapy.Ether(src=sender, dst="ff:ff:ff:ff:ff:ff")
    packets["ARP to all"] = everyone / scapy.ARP(hwsrc=sender, psrc=ipv4(0), pdst=ipv4(9))
    routers = scapy.Ether(src=sender, dst="33:33:00:00:00:02") / scapy.IPv6(src="fe80::1234", dst="ff02::2", hlim=255)
    packets["from a first-come link-local address to all"] = routers / scapy.ICMPv6ND_RS()
    return {what: bytes(packet).hex() for what, packet in packets.items()}


def measure_frames(folder: Path) -> dict:
    """Measure frames across a bridge with four ports: bridge.nft, and rules by address, against empty chains.

    Return how many times as much as with empty chains a frame of IPv4 TCP costs: {(what, number of instances): ratio}.
    """
    with closing(Host(folder)) as host:
        sender, receiver, *_ = (host.client(f"port{number}", mac(number)) for number in range(4))
        files = {"empty": folder / "empty.nft"}
        guard = host.example("nftables/bridge.nft").read_text()
        hooks = re.findall("type filter hook .*;", guard.partition("table inet")[0])
        chains = "".join(f"chain c{number} {{ {hook} }}\n" for number, hook in enumerate(hooks))
        files["empty"].write_text(f"table bridge empty {{\n{chains}}}\n")
        for size in SIZES:
            base = folder / str(size)
            write_registry(base, size)
            timed([*PYTHON, PROCESS, "-f"], environment(base))
            files["bridge.nft", size] = folder / f"{size}.nft"
            files["bridge.nft", size].write_text(guard.replace(f"{folder}/instances.", f"{base}."))
        for size in SIZES[:-1]:
            files["a rule per address", size] = folder / f"rules-{size}.nft"
            files["a rule per address", size].write_text(rule_an_address(size))
        costs, kinds = {}, frames(mac(0), mac(1))
        for turn in range(PAIRS // 2 + 1):
            for file in files.values():
                host.run("nft", "flush", "ruleset")
                host.run("nft", "-f", file)
                receiver.pings("10.83.0.1")  # so that the bridge knows its port
                for kind, frame in kinds.items():
                    microseconds = float(sender.run(*PYTHON, "-c", SENDER, frame).stdout)
                    costs.setdefault((file, kind), []).extend([microseconds] if turn else [])
        pictured = {}
        for kind in kinds:
            ratios = {}
            pictured = pictured or ratios  # of the first kind
            for what, size in [*files][1:]:
                ours, empty = costs[files[what, size], kind], costs[files["empty"], kind]
                ratios[what, size] = statistics.median(a / b for a, b in zip(ours, empty))
                both = (f"{statistics.median(column):.2f} µs" for column in (ours, empty))
                show(f"frame, {kind}: {what} / hooks with empty chains", f"{size:,}", *both, ratios[what, size])
            growth = ratios["bridge.nft", 10_000] / ratios["bridge.nft", 1]
            show("… growth of bridge.nft", "1 to 10,000", "", "", growth)
        return pictured


SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 250" font-family="sans-serif" font-size="13">
<title>Cost of a frame by number of guests</title>
<style>
text {{ fill: #333 }} .axis {{ stroke: #999; stroke-width: .5 }} .line {{ fill: none; stroke-width: 2 }}
.ours {{ color: #06c }} .rules {{ color: #c50 }} .line {{ stroke: currentColor }} .dot {{ fill: currentColor }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #ddd }} .ours {{ color: #6bf }} .rules {{ color: #fa6 }} }}
</style>
<text x="20" y="20">Cost of a frame, in multiples of its cost without rules, by number of guests</text>
{body}</svg>
"""


def picture(ratios: dict) -> str:
    """Return a picture of what measure_frames returns, on two logarithmic axes."""
    ticks = [tick for tick in (1, 3, 10, 30, 100, 300, 1000) if tick / 3 < max(ratios.values())]
    body = ""

    def x(size: int) -> int:
        return round(60 + 105 * math.log10(size))

    def y(ratio: float) -> int:
        return round(210 - 165 * max(math.log(ratio), 0) / math.log(ticks[-1]))

    for size in SIZES:
        body += f'<text x="{x(size)}" y="232" text-anchor="middle">{size:,}</text>\n'
    for tick in ticks:
        body += f'<path class="axis" d="M60 {y(tick)}H480"/>\n'
        body += f'<text x="50" y="{y(tick) + 4}" text-anchor="end">{tick}</text>\n'
    for style, what in (("ours", "bridge.nft"), ("rules", "a rule per address")):
        places = [(x(size), y(ratio), ratio) for (name, size), ratio in ratios.items() if name == what]
        body += f'<g class="{style}"><path class="line" d="M{" L".join(f"{a} {b}" for a, b, _ in places)}"/>\n'
        body += "".join(f'<circle class="dot" cx="{a}" cy="{b}" r="3"/>\n' for a, b, _ in places)
        a, b, last = places[-1]
        body += f'<text class="dot" x="{a + 10}" y="{b + 4}">{what}: {last:.2g}</text></g>\n'
    return SVG.format(body=body)


def measure_loading(folder: Path) -> None:
    with registered(folder, 10_000) as host:
        timed([*PYTHON, PROCESS, "-f"], environment(host.base))
        ours, one_a_rule = host.example("nftables/bridge.nft"), host.folder / "rules.nft"
        one_a_rule.write_text(rule_an_address(10_000))
        times = {file: [] for file in (ours, one_a_rule)}
        for _ in range(5):
            for file, elapsed in times.items():
                elapsed.append(timed(host.command("nft", "-f", file)))
        ours, rules = (statistics.median(elapsed) for elapsed in times.values())
        what = "`nft -f bridge.nft` / of a rule per address"
        show(what, "10,000", f"{ours:.0f} ms", f"{rules:.0f} ms", ours / rules)


def rule_an_address(count: int) -> str:
    """Return a table with a rule per address, as other filters have them; the first instance's are in the middle."""
    rules = []
    for n in [*range(1, (count + 1) // 2), 0, *range((count + 1) // 2, count)]:
        own = f"ether saddr {mac(n)}"
        rules += [f"{own} arp saddr ip {ipv4(n)} accept", f"{own} ip saddr {ipv4(n)} accept"]
        for address in ("fe80::1234" if n == 0 else UPDATE_MODULE.link_local(mac(n)), f"2001:67c:83::{n + 1:x}"):
            rules.append(f"{own} ip6 saddr {address} accept")
    hook = "type filter hook prerouting priority filter; policy drop;"
    body = "\n".join(rules)
    return f"table bridge rules\ndelete table bridge rules\ntable bridge rules {{\nchain c {{\n{hook}\n{body}\n}}\n}}\n"


def measure_way_in(folder: Path) -> None:
    """Measure from a client's DHCPACK to its first answered ping, while nothing puts the registry in force."""
    for size in (1, 1_000, 10_000):
        with registered(folder, size, ("10.84.0.1/24",)) as host:
            host.update("--initialize", "br0", "host")
            host.process()
            host.run("nft", "-f", host.example("nftables/bridge.nft"))
            host.start_dnsmasq("10.84.0.100,10.84.0.199")
            client = host.client("new", "10:66:6a:ff:00:01")
            client.start_dhcp4()
            wait_for(lambda c=client: "bound" in c.events(), "the lease")
            pings = client.run("ping", "-n", "-D", "-i", "0.002", "-w", "10", "-c", "1", "10.84.0.1").stdout
            answered = float(re.search(r"^\[(.*?)\] 64 bytes", pings, re.MULTILINE)[1])
            bound = Path(f"{client.script}.log").stat().st_mtime
            show("from DHCPACK to the first answered ping", f"{size:,}", f"{answered - bound:.3f} s", "", "")


def measure_applying(folder: Path) -> None:
    """Measure a change of one address, until it is in the guard and dnsmasq has its name, beside a load of it all."""
    for size in SIZES[1:]:
        with registered(folder, size) as host:
            (host.folder / "rules").mkdir()
            guard = host.example("nftables/bridge.nft").rename(host.folder / "rules" / "bridge.nft")
            host.write_settings()
            host.run(*host.applying())
            host.start_dnsmasq(config=host.example("dnsmasq/br0.conf"))
            times = {"update": [], "apply": [], "all": [], "dnsmasq": [], "whole": [], "nothing": [], "bare": []}
            for turn in range(PAIRS // 4):
                address, used = f"10.83.200.{turn + 1}", processor_time(host.dnsmasq.pid)
                begin = time.perf_counter()
                host.update("add", mac(size // 2), address)
                times["update"].append(time.perf_counter() - begin)
                host.run(*host.applying())
                times["apply"].append(time.perf_counter() - begin - times["update"][-1])
                question = ["dig", "+short", "@10.83.0.1", f"web-{size // 2}.instance.internal", "A"]
                wait_for(lambda h=host, q=question, a=address: h.run(*q, check=False).stdout.split() == [a], "the name")
                times["all"].append(time.perf_counter() - begin)
                times["dnsmasq"].append(processor_time(host.dnsmasq.pid) - used)
                times["nothing"].append(timed(host.command(*host.applying())) / 1000)
                times["whole"].append(timed(host.command("nft", "-f", guard)) / 1000)
                host.run(*host.applying())  # which notices that
                times["bare"].append(timed(host.command(*BARE)) / 1000)
            medians = {what: statistics.median(values) for what, values in times.items()}
            split = f"update {medians['update']:.2f} s, instances-apply {medians['apply']:.2f} s; dnsmasq's processor"
            note = f"{split} {medians['dnsmasq']:.2f} s"
            ours, other = f"{medians['all']:.2f} s", f"{medians['whole']:.2f} s"
            ratio = medians["all"] / medians["whole"]
            what = "from an update to element and name / `nft -f` of bridge.nft"
            show(what, f"{size:,}", ours, other, ratio, note)
            ours, other = f"{medians['nothing'] * 1000:.0f} ms", f"{medians['bare'] * 1000:.0f} ms"
            show("instances-apply, nothing changed", f"{size:,}", ours, other, medians["nothing"] / medians["bare"])


def processor_time(pid: int) -> float:
    """Return how many seconds of the processor the dnsmasq that a process has started has used."""
    ticks = process_file(pid, "stat").rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--svg"] and len(arguments) == 2:
        with tempfile.TemporaryDirectory() as name:
            Path(arguments[1]).write_text(picture(measure_frames(Path(name))))
        return
    nft = run("nft", "--version").stdout.split()[1]
    python = f"Python {platform.python_version()}, filelock {version('filelock')}"
    print(f"{python}, nftables {nft}, Linux {platform.release()}, {os.cpu_count()} CPUs\n")
    print("| what | instances | ours | bare Python or other | ratio | |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        measures = (measure_scripts, measure_restart, measure_frames, measure_loading, measure_applying, measure_way_in)
        for measure in measures:
            folder = Path(name) / measure.__name__
            folder.mkdir()
            measure(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
