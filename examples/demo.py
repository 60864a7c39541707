#!/usr/bin/python3
"""Show the two scripts at work with real programs, in network namespaces of its own: an attack without the guard and
with it, then names, sets and a rename.

usage: demo.py     as root, on Debian 12 or 13

It changes nothing else. Exit status: 0 every step came out as expected, 1 one did not, 2 wrong usage.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
HOST, WEB, DB = (f"demo{os.getpid()}-{name}" for name in ("host", "web", "db"))
MAC = {HOST: "10:66:6a:4c:a1:fe", WEB: "10:66:6a:4c:a1:11", DB: "10:66:6a:4c:a1:12"}
# What both DHCP clients run: it takes the address.
CLIENT = """\
#!/bin/sh
case "${1-}${reason-}" in
bound | renew) ip address replace "$ip/24" dev "$interface" ;;
BOUND6 | RENEW6) ip address replace "$new_ip6_address/$new_ip6_prefixlen" dev "$interface" ;;
esac
"""
# An ARP reply: this MAC address has that IPv4 address (RFC 826).
FORGE = """\
import socket, sys
target, sender, victim, asker = map(bytes.fromhex, sys.argv[1:])
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
s.send(target + sender + b"\\x08\\6\\0\\1\\x08\\0\\6\\4\\0\\2" + sender + victim + target + asker)
"""
processes = []


class Unexpected(Exception):
    """A step that did not come out as expected."""


def run(namespace, command, **options):
    """Run a command in a namespace; return its output, standard error too."""
    arguments = command if isinstance(command, list) else shlex.split(command)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(["ip", "netns", "exec", namespace, *arguments], text=True, **both, **options).stdout


def wait(namespace, command, pattern, lines=1):
    """Run a command until so many lines of its output match; return these. Unexpected after 20 s."""
    deadline = time.monotonic() + 20
    while len(found := [line for line in run(namespace, command).splitlines() if re.search(pattern, line)]) < lines:
        if time.monotonic() > deadline:
            raise Unexpected(f"expected '{pattern}' of: {command}\n{run(namespace, command)}".rstrip())
        time.sleep(0.1)
    return found


def show(namespace, command, pattern, lines=1, title=""):
    """Wait for a command's output, and print the command and the lines that match."""
    found = wait(namespace, command, pattern, lines)
    print(f"{namespace.rpartition('-')[2]}$ {title or command}", *(f"    {line.strip()}" for line in found), sep="\n")


def start(namespace, command, log):
    """Start a command that is ended with the demonstration."""
    arguments = ["ip", "netns", "exec", namespace, *shlex.split(command)]
    processes.append(subprocess.Popen(arguments, stdout=log, stderr=log))


def step(text):
    """Print what comes next."""
    print(f"\n== {text}")


def make_host(folder):
    """Make the host's bridge; copy the examples' files, with this folder's paths; return instances-apply's command."""
    for command in (
        f"ip link add br0 address {MAC[HOST]} type bridge",
        "ip link set br0 up",
        "ip address add 10.83.0.1/24 dev br0",
        "ip address add 2001:67c:83::1/80 dev br0 nodad",
        "ip address add fd83:5eed::1/80 dev br0 nodad",
    ):
        run(HOST, command)
    (folder / "rules").mkdir()
    (folder / "instances.hosts.d").mkdir()
    settings = {"INSTANCES_BASE_PATH": f"{folder}/instances", "INSTANCES_RULES": f"{folder}/rules"}
    settings |= {"INSTANCES_ADDRESS_SETS": "host,web", "PATH": os.environ["PATH"]}
    (folder / "settings").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    dnsmasq = (TOP / "examples/dnsmasq/br0.conf").read_text().replace("/usr/local/sbin", str(TOP))
    (folder / "dnsmasq.conf").write_text(dnsmasq.replace("/var/lib/misc", str(folder)))
    (folder / "run").mkdir()  # its notes are not for this machine's own /run
    return f"sh -c 'mount --bind {folder}/run /run && {TOP}/examples/systemd/instances-apply {folder}/settings'"


def make_guard(folder):
    """Copy the guard; without the lines that want a frame's bridge, where the kernel can't tell it: here is but one."""
    text = (TOP / "examples/nftables/bridge.nft").read_text().replace("/var/lib/misc", str(folder))
    if run(HOST, ["nft", "-c", "table bridge t { chain c { meta ibrname br0 accept; }; }"]):
        text = re.sub("^ *meta [io]brname .*\n", "", text, flags=re.MULTILINE)
    (folder / "rules" / "bridge.nft").write_text(text)


def make_guest(folder, guest, log):
    """Make a guest on the bridge, with DHCP clients."""
    name = guest.rpartition("-")[2]
    run(HOST, f"ip link add {name} type veth peer name eth0 address {MAC[guest]} netns {guest}")
    run(HOST, f"ip link set {name} master br0 up")
    run(guest, "ip link set eth0 up")
    start(guest, f"udhcpc -f -i eth0 -x hostname:{name} -s {folder}/client", log)
    wait(guest, "ip -6 address show dev eth0 -tentative", "fe80")  # dhclient needs an address that is in use
    (folder / f"{name}.conf").write_text(f'send fqdn.fqdn "{name}";\n')
    files = f"-cf {folder}/{name}.conf -lf {folder}/{name}.leases -pf {folder}/{name}.pid -sf {folder}/client"
    start(guest, f"dhclient -6 -d {files} eth0", log)


def forge(address):
    """Have web tell the host, by a forged ARP reply, that it has db's address."""
    macs = [MAC[namespace].replace(":", "") for namespace in (HOST, WEB)]
    addresses = [bytes(map(int, text.split("."))).hex() for text in (address, "10.83.0.1")]
    run(WEB, [sys.executable, "-c", FORGE, *macs, *addresses])


def demonstrate(folder, log):
    """Go through the steps."""
    step("Two guests get leases of both IP versions; dnsmasq's script registers them")
    apply = make_host(folder)
    show(HOST, "instances-update.py --initialize br0 host", "initialized")
    start(HOST, f"dnsmasq --conf-file={folder}/dnsmasq.conf --no-resolv --pid-file -k --log-facility=-", log)
    for guest in (WEB, DB):
        make_guest(folder, guest, log)
    show(HOST, f"grep -o instances-update.py:.* {log.name}", "ipv", lines=6)
    registry = (folder / "instances.json").read_text()
    address = re.search(f'"{MAC[DB]}".*?"ipv4": "(.*?)"', registry, re.DOTALL)[1]
    cache = f"ip neighbour show {address} dev br0"

    step("Without the guard: web says by ARP that it has db's address, and the host believes it")
    show(HOST, f"ping -n -c 1 -W 2 {address}", "1 received")
    show(HOST, cache, MAC[DB])
    print(f"web$ (sends an ARP reply: {address} is at {MAC[WEB]})")
    deadline = time.monotonic() + 20
    while MAC[WEB] not in run(HOST, cache) and time.monotonic() < deadline:
        forge(address)  # the kernel takes news of an address once a second
        time.sleep(0.2)
    show(HOST, cache, MAC[WEB])

    step("With the guard: the same again is dropped and counted, and the host knows db")
    make_guard(folder)
    show(HOST, apply, "bridge.nft", title="instances-apply")
    run(HOST, "ip neighbour flush dev br0")
    show(HOST, f"ping -n -c 1 -W 2 {address}", "1 received")
    for _ in range(8):
        forge(address)
        time.sleep(0.2)
    show(HOST, cache, MAC[DB])
    show(HOST, "nft list set bridge instances instances_dropped", f'{MAC[WEB]} . "ARP address" counter packets [1-9]')

    step("Names, for every kind of address, asked of dnsmasq by the other guest")
    for kind, name in (("A", "db"), ("AAAA", "db.g6"), ("AAAA", "db.u6"), ("AAAA", "db.l6")):
        show(WEB, f"dig +noall +answer @10.83.0.1 {name}.instance.internal {kind}", kind)

    step("Sets of addresses by name, for firewall rules")
    show(HOST, f"grep -A 3 @web.v4.instance {folder}/instances.nftables_sets", "set|elements", lines=2)

    step("The administrator renames db to store: the names follow, and the journal says who was dropped")
    show(HOST, f"instances-update.py --rename {MAC[DB]} store", "store: renamed")
    show(HOST, apply, "3 instances|dropped", lines=2, title="instances-apply")
    show(WEB, "dig +noall +answer @10.83.0.1 store.instance.internal", address)
    show(WEB, "dig +noall +comments @10.83.0.1 db.instance.internal", "NXDOMAIN")


def main():
    """Make the namespaces and go through the steps; take all away whatever happens; return the exit status."""
    if sys.argv[1:] in (["-h"], ["--help"], ["--version"]):
        print("demo.py: 4.0\n" if sys.argv[1] == "--version" else __doc__.partition("\n\n")[2], end="")
        return 0
    if len(sys.argv) > 1 or os.geteuid() != 0:
        wrong = f"{' '.join(sys.argv[1:])}: no such usage: see --help" if sys.argv[1:] else "run it as root"
        print(f"demo.py: error: {wrong}", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(line_buffering=True)  # in a pipe, too: an error comes behind what led to it
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="demo"))
    path = f"{TOP}:/usr/sbin:/usr/bin:/sbin:/bin"  # as a service has it: with Debian's Python
    os.environ |= {"PATH": path, "INSTANCES_BASE_PATH": f"{folder}/instances"}
    try:
        folder.chmod(0o755)  # dnsmasq is not always root
        (folder / "client").write_text(CLIENT)
        (folder / "client").chmod(0o755)
        for namespace in MAC:
            subprocess.run(["ip", "netns", "add", namespace], check=True)
            run(namespace, "ip link set lo up")
        with open(folder / "log", "a") as log:
            demonstrate(folder, log)
        print("\ndemo.py: all came out as expected")
        return 0
    except (Unexpected, OSError, subprocess.SubprocessError, KeyboardInterrupt) as error:
        print(f"demo.py: {str(error) or 'interrupted'}", file=sys.stderr)
        return 1
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        for namespace in MAC:
            subprocess.run(["ip", "netns", "delete", namespace], stderr=subprocess.DEVNULL)
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
