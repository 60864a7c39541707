#!/usr/bin/env python3
"""Keep the registry of instances: run by dnsmasq for every lease, and by administrators.

The registry is a JSON file with an object an instance, keyed by MAC address. It is replaced as a whole, under a lock,
by a run that changes it. Most of dnsmasq's runs change nothing, and must cost little more than Python's start: so
most imports wait until they are needed, and there are no annotations, whose compilation takes 0.7 ms.
"""

import gc
import os
import sys
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton  # the module socket takes 6 ms to import

USAGE = """\
usage: instances-update.py add|old MAC IP [HOSTNAME]      what dnsmasq tells of a lease
       instances-update.py --initialize INTERFACE NAME    register an interface of this host
       instances-update.py --rename MAC NAME              name an instance
       instances-update.py --remove MAC                   remove an instance
       instances-update.py --help

The MAC address of an IPv6 lease is DNSMASQ_MAC's. Other actions of dnsmasq's are ignored.
The registry is INSTANCES_BASE_PATH[-INSTANCES_BASE_ID].json, /var/lib/misc/instances.json by default.
Exit status: 0 done or nothing to do, 1 error and nothing changed, 2 wrong usage."""

LEASED = ("ipv4", "ipv6_gua", "ipv6_ula")  # the fields of a registry's addresses that a lease can set


# ---- Shared: these lines stand in both scripts, and a test keeps them the same ----
def say(message, descriptor=2):
    """Write one line, on standard error unless told otherwise, with all but printable ASCII escaped."""
    line = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in f"{os.path.basename(__file__)}: {message}")
    try:
        os.write(descriptor, f"{line}\n".encode())
    except OSError:  # what is done is done, whether or not anybody reads of it
        pass


def base_path():
    """Return the path that every file's name begins with. ValueError if INSTANCES_BASE_ID is bad."""
    path = os.environ.get("INSTANCES_BASE_PATH") or "/var/lib/misc/instances"
    suffix = os.environ.get("INSTANCES_BASE_ID") or ""
    if suffix[:1] in ("_", "-", ".") or not all(c.isascii() and c.isalnum() or c in "_-." for c in suffix):
        raise ValueError(f"INSTANCES_BASE_ID={suffix}: use letters, digits, _ - ., the first no _ - .")
    return f"{path}-{suffix}" if suffix else path


def is_mac(text):
    """Tell whether this is an Ethernet address as the registry has it: lower case, with colons."""
    digits = text.replace(":", "")
    return len(digits) == 12 and text[2::3] == ":::::" and len(text) == 17 and not digits.strip("0123456789abcdef")


def is_name(text):
    """Tell whether this is a label of RFC 1035, section 2.3.1: Incus's rule for names too."""
    plain = text.replace("-", "")
    return plain.isascii() and plain.isalnum() and text[0].isalpha() and text[-1] != "-" and len(text) < 64


def parse_address(text):
    """Return an address's field ("" if its kind has none), RFC 5952 form and bytes, or raise ValueError."""
    try:
        if ":" not in text:
            return "ipv4", text, inet_pton(AF_INET, text)
        packed = inet_pton(AF_INET6, text)
    except (OSError, TypeError, ValueError):
        raise ValueError(f"{text}: not an IP address") from None
    field = ""  # the ranges are written out, for those of the module ipaddress change with Python
    if b"\xfe\x80" <= packed < b"\xfe\xc0":  # fe80::/10, RFC 4291, section 2.5.6
        field = "ipv6_lla"
    elif b"\xfc" <= packed < b"\xfe":  # fc00::/7, RFC 4193, section 3.1
        field = "ipv6_ula"
    elif packed.startswith(b"\x20\x01\x0d\xb8") or b"\x3f\xff" <= packed < b"\x3f\xff\x10":
        pass  # documentation: 2001:db8::/32, RFC 3849, and 3fff::/20, RFC 9637
    elif b"\x20" <= packed < b"\x40":  # 2000::/3, RFC 4291, section 2.4
        field = "ipv6_gua"
    return field, inet_ntop(AF_INET6, packed), packed


def locked(base):
    """Take the registry's lock, to be held in a with statement. ValueError if it is not free for 10 s."""
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        how = "apt-get install python3-filelock, or pip install filelock"
        raise ValueError(f"{sys.executable} has no filelock: {how}") from None
    os.stat(os.path.dirname(base) or ".")  # newer releases of filelock would make the directory
    try:
        return FileLock(base + ".lock", timeout=10).acquire()
    except Timeout:
        raise ValueError(f"{base}.lock: held by another process for 10 s: try again") from None


def read_registry(path):
    """Return the registry, empty where there is no file. ValueError if it is not an object of objects."""
    import json

    try:
        with open(path, "rb") as file:
            registry = json.loads(file.read())
        if not isinstance(registry, dict) or not all(isinstance(i, dict) for i in registry.values()):
            raise ValueError("no JSON object of objects")
        return registry
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: mend it or move it away: {error}") from None


def replace_file(path, text):
    """Replace a file as a whole, on disk on return; keep mode, owner and a link. OSError leaves old or new, whole."""
    path = os.path.realpath(path)
    temporary = path + ".tmp"
    if os.path.lexists(temporary):  # of a run that was killed
        os.unlink(temporary)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        with open(temporary, "x", encoding="ascii") as file:  # x follows no link
            if os.path.exists(path):
                old = os.stat(path)
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), old.st_mode & 0o7777)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        os.fsync(directory)
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(directory)


def run(main):
    """Return main's exit status; an error becomes one line and the status 1."""
    os.umask(os.umask(0o133) | 0o133)  # nothing is made wider than 0644, not even by filelock
    try:
        return main(sys.argv[1:])
    except (OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
        say(f"error: {str(error) or 'interrupted'}")
        return 1


# ---- End of the shared lines ----


def link_local(mac):
    """Return the link-local address made from a MAC address: modified EUI-64, RFC 4291, appendix A."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return inet_ntop(AF_INET6, b"\xfe\x80" + bytes(6) + identifier)


def holders(registry, field, value):
    """Return the MAC addresses of the instances that have an address, or a name in any case (RFC 4343)."""
    if field == "name":
        return [mac for mac, i in registry.items() if str(i.get("name") or "").lower() == value.lower()]
    return [mac for mac, i in registry.items() if i.get(field) == value]


def assign(registry, mac, field, value):
    """Give a name or address to one instance and take it from all others; return whether that changed any."""
    others = [other for other in holders(registry, field, value) if other != mac]
    for other in others:
        if field == "name":
            registry[other]["name"] = ""
        else:
            del registry[other][field]
    changed = bool(others) or registry[mac].get(field) != value
    registry[mac][field] = value
    return changed


def register(registry, mac, ip, hostname, kind):
    """Enter a lease; return what changed, "" if nothing did, and warnings. A bad host name is no error.

    The kind is "add", "old" or "reminder". Only an "add" says that a former lease of the address is over: an "old"
    comes also for a client that repeats another's identifier, and a reminder may be of an older lease than the last.
    """
    field, address, _ = parse_address(ip)
    changes, warnings = [], []
    if mac not in registry:
        if hostname and (not is_name(hostname) or holders(registry, "name", hostname)):
            warnings.append(f"{mac} stays without a name: {hostname} is taken, or none")
            hostname = ""
        registry[mac] = {"name": hostname, "ipv6_lla": link_local(mac)}
        changes.append("new")
    instance = registry[mac]
    others = [other for other in holders(registry, field, address) if other != mac]
    if field not in LEASED:
        warnings.append(f"{mac}: {address} is not registered, being neither global nor unique local")
    elif others and kind != "add":
        warnings.append(f"{mac}: {address} is not registered, {others[0]} has it")
    elif kind == "reminder" and instance.get(field) not in (None, "", address):
        warnings.append(f"{mac} keeps {instance[field]}: {address} is not registered")
    elif assign(registry, mac, field, address):
        changes.append(f"{field} {address}")
    return f"{mac} {instance.get('name', '')}: {', '.join(changes)}" if changes else "", warnings


def initialize(registry, mac, fields):
    """Replace the name and addresses of the instance of a host's interface; return as register does."""
    old = registry.get(mac, {})
    registry[mac] = {k: v for k, v in old.items() if k not in LEASED} | fields
    taken = [assign(registry, mac, field, value) for field, value in fields.items()]
    return f"{mac} {fields['name']}: initialized" if any(taken) or registry[mac] != old else "", []


def edit(registry, mac, name):
    """Name an instance, or remove it where the name is None; return as register does."""
    if mac not in registry:
        return "", [f"{mac}: no such instance"]
    if name is None:
        return f"{mac} {registry.pop(mac).get('name', '')}: removed", []
    return f"{mac} {name}: renamed" if assign(registry, mac, "name", name) else "", []


def registry_text(registry):
    """Return the registry as JSON with a line a field, the form that is_registered reads."""
    from json import dumps

    text = dumps(registry, separators=(",\n", ": "))
    return f"{{\n{text[1:]}\n"


def is_registered(text, mac, field, address):
    """Tell whether a registry's JSON (bytes) has a lease, without parsing it: True is proof, False is none."""
    key = f'"{mac}"'.encode()
    start = text.find(key)
    end = text.find(b"}", start) + 1
    instance = text[start:end]
    return (
        # The instance has the address, and the field once.
        f'"{field}": "{address}"'.encode() in instance
        and instance.count(f'"{field}"'.encode()) == 1
        # Without a backslash each quote begins or ends a string, and a string of JSON has no line break: so the
        # instance begins and ends where it seems to, with no other object inside, in a text that was not cut off.
        and b"\\" not in text
        and text.startswith(b"\n" + key + b": {", start - 1)
        and instance.count(b"{") == 1
        and text.startswith((b",\n", b"}\n"), end)
        and text.endswith(b"}}\n")
        # It is in the outermost object: above, no brace opens but that one's and those that close at a line's end.
        and text.count(b"{", 0, start) == text.count(b"},\n", 0, start) + 1
        # Neither it nor the address stands elsewhere.
        and text.find(key, end) == -1
        and text.count(f'"{address}"'.encode()) == 1
    )


def interface_fields(interface):
    """Return the MAC address of an interface of this host and the fields of its own addresses."""
    import json
    import subprocess

    result = subprocess.run(["ip", "-json", "address", "show", "dev", interface], capture_output=True)
    if result.returncode:
        raise ValueError(f"{interface}: {result.stderr.decode().strip()}")
    link = next(filter(None, json.loads(result.stdout)), {})
    if link.get("link_type") != "ether":
        raise ValueError(f"{interface}: has no Ethernet address")
    fields = {}
    for entry in link["addr_info"]:
        if not (entry.get("secondary") or entry.get("temporary") or entry.get("deprecated")):
            field, address, _ = parse_address(entry["local"])
            fields.setdefault(field, address)
    fields.pop("", None)
    fields.setdefault("ipv6_lla", link_local(link["address"]))  # a bridge without a port has none yet
    return link["address"], fields


def update(change, mac, *arguments):
    """Change the registry by change(registry, mac, *arguments), under the lock; return the exit status."""
    if not is_mac(mac):
        raise ValueError(f"{mac}: not an Ethernet MAC address, such as 10:66:6a:00:00:01")
    base = base_path()
    gc.disable()  # there is no garbage to look for
    with locked(base):
        registry = read_registry(base + ".json")
        message, warnings = change(registry, mac, *arguments)
        if message:
            open(base + ".updated", "w").close()  # before the change, so that none is ever without it
            replace_file(base + ".json", registry_text(registry))
    for warning in warnings:
        say(f"warning: {warning}")
    if message:
        say(message, 1)
    return 0


def lease(action, mac, ip, hostname="", *_):
    """Register a lease that dnsmasq tells of; return the exit status."""
    if ":" in ip:  # an IPv6 lease's first argument is a DUID
        mac = os.environ.get("DNSMASQ_MAC", "")
        if not mac:
            return 0
    mac = mac.lower()
    field, address, _ = parse_address(ip)
    path = base_path() + ".json"
    if is_mac(mac) and field in LEASED and os.path.exists(path):
        with open(path, "rb") as file:  # always whole, so without the lock
            if is_registered(file.read(), mac, field, address):
                return 0
    # Data are missing where no message of the client's is behind it: at a renewal, a SIGHUP, a restart
    kind = "reminder" if action == "old" and os.environ.get("DNSMASQ_DATA_MISSING") else action
    return update(register, mac, address, hostname, kind)


def main(arguments):
    """Do what the arguments say; return the exit status."""
    match arguments:
        case ["add" | "old", _, _, *_]:
            return lease(*arguments)
        case ["--initialize" | "--rename", _, name] if not is_name(name):
            raise ValueError(f"{name}: not a name: a letter, then letters, digits, hyphens, 63 at most")
        case ["--initialize", interface, name]:
            mac, fields = interface_fields(interface)
            return update(initialize, mac, {"name": name, **fields})
        case ["--rename", mac, name]:
            return update(edit, mac.lower(), name)
        case ["--remove", mac]:
            return update(edit, mac.lower(), None)
        case ["--help" | "-h" | "help", *_]:
            os.write(1, f"{USAGE}\n".encode())
            return 0
        case [action, *_] if action not in ("add", "old") and not action.startswith("-"):
            return 0
    os.write(2, f"{USAGE}\n".encode())
    return 2


if __name__ == "__main__":
    sys.exit(run(main))
