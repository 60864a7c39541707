#!/usr/bin/env python3
"""Make the file that another name server reads, from the names that instances-process.py made for dnsmasq.

These are checked already. A zone's serial goes up with every change, and never back (RFC 1982).
"""

import fcntl
import os
import re
import shutil
import sys
import time
from ipaddress import ip_address, ip_network

USAGE = """\
usage: instances-zone.py zone|tinydns HOSTS FILE DOMAIN SERVER[=ADDRESS] ...
       instances-zone.py avahi HOSTS FILE local

Makes FILE from HOSTS (/var/lib/misc/instances.hosts): a zone file (RFC 1035), tinydns's data, or avahi's hosts.
SERVER is the name of a name server of DOMAIN; one below DOMAIN needs an ADDRESS, and is repeated for a second one.
Exit status: 0 done, or nothing to do; 1 error, FILE is as it was; 2 wrong usage."""

LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # RFC 1123, section 2.1
PRIVATE = "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"
# What IANA's special-purpose address registries do not call globally reachable, multicast, and what is not assigned.
# It is written out, since that of ipaddress changes between releases of Python.
SPECIAL = """
0.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24
198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3
::/3 2001::/23 2001:db8::/32 2002::/16 3fff::/20 4000::/2 8000::/1"""
SIDES = [(ip_network(text), "lan") for text in PRIVATE.split()] + [(ip_network(text), "") for text in SPECIAL.split()]


def say(message):
    """Write one line on standard error."""
    print(f"{os.path.basename(__file__)}: {message}", file=sys.stderr)


def check_domain(text, longest=253):
    """Return a domain unchanged. ValueError if it is not one, or has more characters than this."""
    if not re.fullmatch(rf"({LABEL}\.)*{LABEL}", text) or text.rpartition(".")[2].isdigit() or len(text) > longest:
        raise ValueError(f"{text!r}: not a domain name (without a dot at its end) of {longest} characters at most")
    return text


def read_servers(words, domain):
    """Return {name: [addresses]} of SERVER[=ADDRESS] ...; ValueError if a zone with them would not be loaded."""
    servers = {}
    for word in words:
        name, _, address = word.partition("=")
        addresses = servers.setdefault(check_domain(name).lower(), [])
        if "%" in address:
            raise ValueError(f"{word!r}: a link-local address is no name server's")
        addresses += [ip_address(address)] if address else []
    for name, addresses in servers.items():
        if f".{name}".endswith(f".{domain.lower()}") != bool(addresses):
            raise ValueError(f"{name}: give its address, as {name}=ADDRESS, if it is below {domain}, and only then")
    return servers


def side(address):
    """Return "lan" for a private or unique local address, "wan" for a global one, "" for any other."""
    return next((name for network, name in SIDES if address in network), "wan")


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


def records_of(rows, kind, domain, servers):
    """Return (domain name, address, location) of what is published; the location is tinydns's, "" for all clients."""
    records = []
    for name, where, address in rows:
        if kind in ("zone", "tinydns"):
            records.append((f"{name}.{where}.{domain}", address, ""))
        if kind in ("tinydns", "avahi"):
            records.append((f"{name}.{domain}", address, {"lan": "in", "wan": "ex"}[where]))
    for name in sorted({name.lower() for name, _, _ in records} & servers.keys()):
        say(f"warning: {name} is the name server, no instance's address is published by it")
    glue = [(server, address, "") for server, addresses in servers.items() for address in addresses]
    return glue + [record for record in records if record[0].lower() not in servers]


def zone_text(records, domain, servers):
    """Return a zone file, RFC 1035, section 5."""
    lines = [f"{domain}. SOA {next(iter(servers))}. hostmaster.{domain}. @SERIAL@ 3600 600 604800 60"]
    lines += [f"{domain}. NS {server}." for server in servers]
    lines += [f"{name}. {'A' if address.version == 4 else 'AAAA'} {address}" for name, address, _ in records]
    return "\n".join(["; zone made by instances-zone.py", "$TTL 60", *lines, ""])


def tinydns_text(records, domain, servers):
    """Return tinydns's data: a client at a private IPv4 address is at the location "in", any other at "ex"."""
    lines = ["%in:10", "%in:192.168", *(f"%in:172.{number}" for number in range(16, 32)), "%ex:"]
    lines += [f"Z{domain}:{next(iter(servers))}:hostmaster.{domain}:@SERIAL@:3600:600:604800:60:60"]
    lines += [f"&{domain}::{server}:60" for server in servers]
    for name, address, location in records:
        data = f"+{name}:{address}" if address.version == 4 else f":{name}:28:{octal(address)}"
        lines.append(f"{data}:60::{location}")
    return "\n".join(["# tinydns's data made by instances-zone.py", *lines, ""])


def octal(address):
    """Return an address's bytes as tinydns's data has them."""
    return "".join(f"\\{byte:03o}" for byte in address.packed)


def avahi_text(records, *_):
    """Return avahi's hosts file."""
    lines = [f"{address} {name}" for name, address, _ in records]
    return "\n".join(["# avahi's hosts made by instances-zone.py", *lines, ""])


def serial_of(text):
    """Return the serial of a zone or of tinydns's data, None if there is none."""
    match = re.search(r"^(?:\S+ SOA \S+ \S+ |Z[^:]*:[^:]*:[^:]*:)(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None


def next_serial(last, now):
    """Return the time in seconds, or the last serial and one if that is not less: RFC 1982, section 3.2."""
    return now % 2**32 if 0 < (now - last) % 2**32 < 2**31 else (last + 1) % 2**32


def replace_file(path, text):
    """Replace a file as a whole; keep its mode and owner."""
    temporary = path + ".new"
    if os.path.lexists(temporary):  # of a run that was killed
        os.unlink(temporary)
    with open(temporary, "x", encoding="ascii") as file:  # x follows no link
        file.write(text)
        file.flush()
        if os.path.exists(path):
            shutil.copymode(path, temporary)
            shutil.chown(temporary, os.stat(path).st_uid, os.stat(path).st_gid)
        os.fsync(file.fileno())
    os.rename(temporary, path)


def take_lock(path):
    """Take the lock of a file or folder, to the end of this run. TimeoutError if another run has it for 30 s."""
    descriptor = os.open(path, os.O_RDONLY)
    for _ in range(300):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
    raise TimeoutError(f"another one has been at work for 30 s: see fuser -v {path}")


def read_made(path, kind, head, has_serial):
    """Return a file's text, "" if there is none, and its serial. ValueError if it was not made so for the kind."""
    if not os.path.exists(path):
        return "", None
    with open(path, encoding="ascii", errors="replace") as file:
        text = file.read()
    serial = serial_of(text)
    if text and (not text.startswith(head) or has_serial and serial is None):
        raise ValueError(f"{path}: not as this program makes it for {kind}: move it away")
    return text, serial


def make_file(kind, hosts, path, domain, *words):
    """Make the file where its content changed."""
    servers = read_servers(words, check_domain(domain, 253 - len(".wan.") - 63))
    make = {"zone": zone_text, "tinydns": tinydns_text, "avahi": avahi_text}[kind]
    path = os.path.realpath(path)
    take_lock(os.path.dirname(path))  # another run sees what this one wrote
    records = records_of(read_hosts(hosts), kind, domain, servers)
    text = make(records, domain, servers)
    old, serial = read_made(path, kind, text.partition("\n")[0], bool(servers))
    if text.replace("@SERIAL@", str(serial)) != old:
        serial = next_serial(serial or 0, int(time.time()))
        replace_file(path, text.replace("@SERIAL@", str(serial)))
        say(f"{path}: {len(records)} addresses{f', serial {serial}' if servers else ''}")


def main(arguments):
    """Do what the arguments say; return the exit status."""
    match arguments:
        case ["zone" | "tinydns", _, _, _, _, *_] | ["avahi", _, _, "local"]:
            make_file(*arguments)
            return 0
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, ValueError, KeyboardInterrupt) as error:
        say(f"error: {str(error) or 'interrupted'}")
        sys.exit(1)
