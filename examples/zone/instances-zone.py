#!/usr/bin/env python3
"""Make the file that another name server reads, from the names that instances-process.py made for dnsmasq.

These are checked already. A zone's serial goes up with every change, and never back (RFC 1982).
"""

import fcntl
import os
import re
import signal
import sys
import time
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

USAGE = """\
usage: instances-zone.py zone|tinydns HOSTS FILE [NETWORK[=ZONE]] DOMAIN SERVER[=ADDRESS] ...
       instances-zone.py avahi HOSTS FILE local

Makes FILE from HOSTS (/var/lib/misc/instances.hosts): a zone file (RFC 1035), tinydns's data, or avahi's hosts.
NETWORK: the reverse zone of 10.83.0.0/24, say, for names in DOMAIN. It may have a name of its own (RFC 2317), ZONE.
SERVER is the name of a name server of the zone; one below it needs an ADDRESS, and is repeated for a second one.
FILE.own, if it is there, has records of your own, one on each line. Exit status: 0 done, 1 error, 2 wrong usage."""

LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # RFC 1123, section 2.1
PRIVATE = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"
# What IANA's registries do not call globally reachable, or do not assign. ipaddress's depends on Python's release.
SPECIAL = """
0.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3
::/3 2001::/23 2001:db8::/32 2002::/16 3fff::/20 4000::/2 8000::/1"""
SIDES = [(ip_network(text), "lan") for text in PRIVATE.split()] + [(ip_network(text), "") for text in SPECIAL.split()]
TYPES = {IPv4Address: ("A", "+{0}:{1}"), IPv6Address: ("AAAA", ":{0}:28:{2}"), str: ("PTR", "^{0}:{1}")}
OWN = {  # a record of one's own, with its name and type
    "zone": r"(?P<name>[^\s;$]\S*)\s+((\d\w*|IN)\s+){0,2}(?P<type>(?!IN\b|SOA\b)[A-Z]\w*)\s+[^\s;].*",
    "tinydns": r"(?P<type>[^\s#])(?P<name>[^\s:]+)(:.*)?",
    "avahi": r"(?P<type>)[\da-f.:]+\s+(?P<name>\S+)",
}
BESIDE = ("CAA", "HTTPS", "MX", "SRV", "SSHFP", "TLSA", "TXT", "@", "'")  # types that may stand beside an instance's


def say(message):
    """Write one line on standard error."""
    print(f"{os.path.basename(__file__)}: {message}", file=sys.stderr)


def check_domain(text, longest=253):
    """Return a domain unchanged. ValueError if it is not one of names, or has more characters than this."""
    if not re.fullmatch(rf"({LABEL}\.)*{LABEL}", text) or text.rpartition(".")[2].isdigit() or len(text) > longest:
        raise ValueError(f"{text!r}: not a domain name (without a dot at its end) of {longest} characters at most")
    if text.lower().endswith(".arpa"):
        raise ValueError(f"{text}: a reverse zone; give its network, and then the domain of the names")
    return text


def side(address):
    """Return "lan" for a private or unique local address, "wan" for a global one, "" for any other."""
    return next((name for network, name in SIDES if address in network), "wan")


def read_reverse(word):
    """Return the name of the zone of NETWORK[=ZONE], the network, and how many labels a record has before that name."""
    text, _, zone = word.lower().partition("=")
    network = ip_network(text)
    step, longest = (8, 24) if network.version == 4 else (4, 124)
    length = min(network.prefixlen, longest)
    labels, count = network[0].reverse_pointer.split("."), (network.max_prefixlen - length) // step
    usual = [f"{labels[0]}/{network.prefixlen}"] * (network.prefixlen > longest) + labels[count:]  # RFC 2317, section 4
    if length % step or not length or not re.fullmatch(r"([\w/-]{1,63}\.)+[a-z][\w-]*", zone or "usual.arpa", re.ASCII):
        raise ValueError(f"{word}: not one reverse zone (IPv4: /8, /16, /24 to /32; IPv6: /4, /8 ...)")
    if not side(network[0]) + side(network[-1]):
        raise ValueError(f"{network}: no instance's address there is published")
    return zone or ".".join(usual), network, count


def read_servers(words, zone):
    """Return {name: [addresses]} of SERVER[=ADDRESS] ...; ValueError if a zone with them would not be loaded."""
    servers = {}
    for word in words:
        name, _, text = word.partition("=")
        addresses = servers.setdefault(check_domain(name).lower(), [])
        addresses += [ip_address(text)] if text else []
    for name, addresses in servers.items():
        if f".{name}".endswith(f".{zone.lower()}") != bool(addresses):
            raise ValueError(f"{name}: give its address, as {name}=ADDRESS, if it is below {zone}, and only then")
        if any(ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified for ip in addresses):
            raise ValueError(f"{name}: no name server is asked at such an address")
    return servers


def read_hosts(path):
    """Return (name, side, address) of each line, each once. ValueError if it is no file of instances-process.py."""
    rows = {}
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            match = re.fullmatch(rf"(\S+) (?=[A-Za-z])({LABEL})\.\S.*\n", line)
            if not match:
                raise ValueError(f"{path}: not a file of instances-process.py: {line!r}")
            address = ip_address(match[1])
            rows[match[2], side(address), address] = None
    return [row for row in rows if row[1]]


def read_own(path, kind, zone):
    """Return the lines of one's own records, and the names at which no instance's may stand beside them."""
    text = Path(path).read_text(encoding="ascii", errors="replace") if os.path.exists(path) else ""
    lines, taken = [line.rstrip() for line in text.splitlines() if line.strip() and line[0] not in "#;"], set()
    for line in lines:
        match = re.fullmatch(OWN[kind], line, re.IGNORECASE)
        if not match or "\ufffd" in line:
            raise ValueError(f"{path}: not a record on one line as {kind} has it, or one that it can't have: {line!r}")
        if match["type"].upper() not in BESIDE:
            name = match["name"] + f".{zone}." * (kind == "zone" and not match["name"].endswith("."))
            taken.add(name.removeprefix("@.").removesuffix(".").lower())
    return lines, taken


def records_of(rows, kind, domain, zone, network=None, count=0):
    """Return (name, address or the name that it points to, location) of each record; "" is tinydns's for all."""
    if network:
        rows = [(".".join(row[2].reverse_pointer.split(".")[:count]), *row[:2]) for row in rows if row[2] in network]
        return [(f"{labels}.{zone}", f"{name}.{where}.{domain}.", "") for labels, name, where in rows]
    plain = [(f"{name}.{domain}", address, {"lan": "in", "wan": "ex"}[where]) for name, where, address in rows]
    sides = [(f"{name}.{where}.{domain}", address, "") for name, where, address in rows]
    return {"avahi": plain, "zone": sides, "tinydns": sides + plain}[kind]


def zone_lines(records, zone, domain, servers):
    """Return the lines of a zone file, RFC 1035, section 5."""
    lines = [f"{zone}. SOA {next(iter(servers))}. hostmaster.{domain}. @SERIAL@ 3600 600 604800 60"]
    lines += [f"{zone}. NS {server}." for server in servers]
    return ["$TTL 60", *lines, *(f"{name}. {TYPES[type(data)][0]} {data}" for name, data, _ in records)]


def tinydns_lines(records, zone, domain, servers):
    """Return tinydns's data: a client at a private IPv4 address is at the location "in", any other at "ex"."""
    lines = ["%in:10", "%in:192.168", *(f"%in:172.{number}" for number in range(16, 32)), "%ex:"]
    soa = f"Z{zone}:{next(iter(servers))}:hostmaster.{domain}:@SERIAL@:3600:600:604800:60:60"
    lines += [soa, *(f"&{zone}::{server}:60" for server in servers)]
    for name, data, location in records:
        octets = "".join(f"\\{byte:03o}" for byte in getattr(data, "packed", b""))
        lines.append(f"{TYPES[type(data)][1].format(name, data, octets)}:60::{location}")
    return lines


FORMS = {"zone": "; zone", "tinydns": "# tinydns's data", "avahi": "# avahi's hosts"}
LINES = {"zone": zone_lines, "tinydns": tinydns_lines, "avahi": lambda rows, *_: [f"{row[1]} {row[0]}" for row in rows]}


def replace_file(path, text):
    """Replace a file as a whole; keep its mode and owner."""
    temporary = path + ".new"
    Path(temporary).unlink(missing_ok=True)  # of a run that was killed
    with open(temporary, "x", encoding="ascii") as file:  # x follows no link
        file.write(text)
        file.flush()
        if os.path.exists(path):
            os.fchmod(file.fileno(), os.stat(path).st_mode)
            os.fchown(file.fileno(), os.stat(path).st_uid, os.stat(path).st_gid)
        os.fsync(file.fileno())
    os.rename(temporary, path)


def read_made(path, kind, first):
    """Return a file's text and serial, "" and None if there is none. ValueError if it was not made so for the kind."""
    text = Path(path).read_text(encoding="ascii", errors="replace") if os.path.exists(path) else ""
    serial = re.search(r"^(?:\S+ SOA \S+ \S+ |Z[^:]*:[^:]*:[^:]*:)(\d+)", text, re.MULTILINE)
    if text and (not text.startswith(f"{first}\n") or not serial and kind != "avahi"):
        raise ValueError(f"{path}: not as this program makes it for {kind}: move it away")
    return text, int(serial[1]) if serial else None


def make_file(kind, hosts, path, *words):
    """Make the file where its content changed."""
    zone, *network = read_reverse(words[0]) if "/" in words[0] else words[:1]
    domain = check_domain(words[bool(network)], 253 - len(".wan.") - 63)
    servers = read_servers(words[1 + bool(network) :], zone)
    own, taken = read_own(path + ".own", kind, zone)
    path, taken = os.path.realpath(path), taken | servers.keys()
    signal.signal(
        signal.SIGALRM, lambda *_: sys.exit("instances-zone.py: error: another one has been at work for 30 s")
    )
    signal.alarm(30)
    fcntl.flock(os.open(os.path.dirname(path), os.O_RDONLY), fcntl.LOCK_EX)  # another run sees what this one wrote
    signal.alarm(0)
    records = records_of(read_hosts(hosts), kind, domain, zone, *network)
    for name in sorted({record[0].lower() for record in records} & taken):
        say(f"warning: {name} is the name server's or your own, no instance is published by it")
    records = [record for record in records if record[0].lower() not in taken]
    records = [(name, address, "") for name, addresses in servers.items() for address in addresses] + records
    first = f"{FORMS[kind]} made by instances-zone.py{f' for {network[0]}' if network else ''}"
    text = "\n".join([first, *LINES[kind](records, zone, domain, servers), *own, ""])
    old, serial = read_made(path, kind, first)
    if text.replace("@SERIAL@", str(serial)) != old:
        now = int(time.time()) % 2**32  # or the last serial and one, if that is not less: RFC 1982, section 3.2
        serial = now if serial is None or 0 < (now - serial) % 2**32 < 2**31 else (serial + 1) % 2**32
        replace_file(path, text.replace("@SERIAL@", str(serial)))
        say(f"{path}: {len(records)} records{f', serial {serial}' if servers else ''}")


def main(arguments):
    """Do what the arguments say; return the exit status."""
    match arguments:
        case ["-h" | "--help" | "--version" as word]:
            print("instances-zone.py: 4.0" if word == "--version" else USAGE)
        case ["zone" | "tinydns", _, _, word, _, *rest] if rest or "/" not in word:
            make_file(*arguments)
        case ["avahi", _, _, "local"]:
            make_file(*arguments)
        case _:
            say(f"error: {' '.join(arguments) or 'nothing'}: no such usage: see --help")
            return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError, KeyboardInterrupt) as error:
        sys.exit(f"instances-zone.py: error: {str(error) or 'interrupted'}")
