#!/usr/bin/env python3
"""Keep the registry of instances: run by dnsmasq for every lease, and by administrators.

The registry is a JSON file with one object per instance, keyed by MAC address. It is replaced as a whole, under a lock,
by a run that changes it. Most of dnsmasq's runs change nothing, take no lock, and must cost little more than Python's
start: so most imports wait until they are needed, and there are no annotations, whose compilation takes 0.7 ms.
"""

import gc
import os
import sys
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton  # the module socket takes 6 ms to import

USAGE = """\
usage: instances-update.py add|old MAC IP [HOSTNAME]      what dnsmasq tells of a lease
       instances-update.py --initialize INTERFACE NAME    register an interface of this host
       instances-update.py --rename MAC NAME              name an instance
       instances-update.py --allow MAC [IP|NETWORK ...]   let an instance send from these, too, and from no others
       instances-update.py --remove MAC                   remove an instance
       instances-update.py --help

The MAC address of an IPv6 lease is DNSMASQ_MAC's. Other actions of dnsmasq's are ignored.
The registry is INSTANCES_BASE_PATH[-INSTANCES_BASE_ID].json, /var/lib/misc/instances.json by default.
Exit status: 0 done or nothing to do, 1 error, 2 wrong usage."""

LEASED = ("ipv4", "ipv6_gua", "ipv6_ula")  # the fields of a registry's addresses that a lease can set


# ---- Shared: these lines stand in both scripts, and a test keeps them the same ----
def say(message, descriptor=2):
    """Write one line of printable ASCII, on standard error unless told otherwise."""
    line = ascii(f"{os.path.basename(sys.argv[0])}: {message}")[1:-1]
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


RANGES = (  # first, end, field; written out, since those of the module ipaddress change with Python
    (b"\xfe\x80", b"\xfe\xc0", "ipv6_lla"),  # fe80::/10, RFC 4291, section 2.5.6
    (b"\xfc", b"\xfe", "ipv6_ula"),  # fc00::/7, RFC 4193, section 3.1
    (b"\x20\x01\x0d\xb8", b"\x20\x01\x0d\xb9", ""),  # 2001:db8::/32, documentation, RFC 3849
    (b"\x3f\xff", b"\x3f\xff\x10", ""),  # 3fff::/20, documentation, RFC 9637
    (b"\x20", b"\x40", "ipv6_gua"),  # 2000::/3, RFC 3587, section 3
)


def is_mac(text):
    """Tell whether this is an Ethernet address as the registry has it: lower case, with colons."""
    digits = text.replace(":", "")
    return len(digits) == 12 and text[2::3] == ":::::" and not digits.strip("0123456789abcdef")


def is_name(text):
    """Tell whether this is a label of RFC 1035, section 2.3.1: Incus's rule for names too."""
    plain = text.replace("-", "")
    return plain.isascii() and plain.isalnum() and text[0].isalpha() and text[-1] != "-" and len(text) < 64


def parse_address(text):
    """Return an address's field ("" if its kind has none) and RFC 5952 form. ValueError if it is no address."""
    try:
        if ":" not in text:
            inet_pton(AF_INET, text)
            return "ipv4", text
        packed = inet_pton(AF_INET6, text)
    except (OSError, TypeError, ValueError):
        raise ValueError(f"{text}: not an IP address") from None
    field = next((field for first, end, field in RANGES if first <= packed < end), "")
    return field, inet_ntop(AF_INET6, packed)


def parse_allowed(text):
    """Return an address or network to be allowed as a network of the module ipaddress. ValueError if it must not be."""
    import ipaddress

    if "%" in text:
        raise ValueError(f"{text}: an address without a zone, please")
    network = ipaddress.ip_network(text)
    # Unspecified, link-local and multicast: RFC 6890, section 2.2, and RFC 5771; RFC 4291, section 2.4
    for never in ("0.0.0.0/32", "169.254.0.0/16", "224.0.0.0/4", "::/128", "fe80::/10", "ff00::/8"):
        if network.overlaps(ipaddress.ip_network(never)):
            raise ValueError(f"{text}: has addresses of {never}, which can't be allowed")
    return network


def locked(base):
    """Take the registry's lock, to be held in a with statement. OSError, with its name, if it is not free for 10 s."""
    try:
        from filelock import FileLock
    except ImportError:
        how = "apt-get install python3-filelock, or pip install filelock"
        raise ValueError(f"{sys.executable} has no filelock: {how}") from None
    os.stat(os.path.dirname(base) or ".")  # newer releases of filelock would make the directory
    return FileLock(base + ".lock", timeout=10).acquire()


def read_registry(path):
    """Return the registry, empty where there is no file. ValueError if it is not an object of objects."""
    import json

    try:
        with open(path, "rb") as file:
            registry = json.loads(file.read())
        if isinstance(registry, dict) and all(isinstance(instance, dict) for instance in registry.values()):
            return registry
        raise ValueError("no JSON object of objects")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: mend it or move it away: {error}") from None


def sync_folder(path):
    """Have the names in a file's folder on disk."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(folder)


def make_marker(base):
    """Make the marker that the outputs are older than the registry, on disk on return."""
    open(base + ".updated", "a").close()
    sync_folder(base)


def replace_file(path, text):
    """Replace a file as a whole, on disk on return; keep mode, owner and a link. OSError leaves old or new, whole."""
    path = os.path.realpath(path)
    temporary = path + ".tmp"
    try:
        if os.path.lexists(temporary):  # of a run that was killed
            os.unlink(temporary)
        with open(temporary, "x", encoding="ascii") as file:  # x follows no link
            if os.path.exists(path):
                old = os.stat(path)
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), old.st_mode & 0o7777)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        sync_folder(path)
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from None


def run(main):
    """Return main's exit status; an error becomes one line and the status 1."""
    os.umask(os.umask(0o133) | 0o133)  # nothing is made wider than 0644, not even by filelock
    try:
        return main(sys.argv[1:])
    # filelock says by a RuntimeError that a file system has no locks
    except (OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
        say(f"error: {str(error) or 'interrupted'}")
        return 1


# ---- End of the shared lines ----


def link_local(mac):
    """Return the link-local address made from a MAC address: modified EUI-64, RFC 4291, appendix A."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return inet_ntop(AF_INET6, b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:])


def others(registry, mac, field, value):
    """Return the MAC addresses of the other instances that have an address, or a name in any case (RFC 4343)."""
    if field == "name":
        return [m for m, i in registry.items() if m != mac and str(i.get(field) or "").lower() == value.lower()]
    return [m for m, i in registry.items() if m != mac and i.get(field) == value]


def assign(registry, mac, field, value, holders):
    """Give a name or address to one instance and take it from its other holders; return whether that changed any."""
    for other in holders:
        if field == "name":
            registry[other]["name"] = ""
        else:
            del registry[other][field]
    changed = bool(holders) or registry[mac].get(field) != value
    registry[mac][field] = value
    return changed


def register(registry, mac, ip, hostname, kind):
    """Enter a lease; return what changed, "" if nothing did, and warnings. A bad host name is no error.

    The kind is "by hand", "add", "old" or "reminder". By hand, an address is taken from whoever has it, and a known
    instance stays without a name. Of dnsmasq's, only an "add" of IPv4 says that a former lease of the address is over:
    by DHCPv6 Rebind it gives anybody any address of the prefix, and by another's DUID anybody can end a lease. An "old"
    comes for that, too, and a reminder may be of a lease before the last.
    """
    field, address = parse_address(ip)
    changes, warnings = [], []
    if mac not in registry:
        registry[mac] = {"name": "", "ipv6_lla": link_local(mac)}
        changes.append("new")
    instance = registry[mac]
    if hostname and not instance.get("name") and (changes or kind != "by hand"):
        if is_name(hostname) and not others(registry, mac, "name", hostname):
            instance["name"] = hostname
            changes = changes or ["named"]
        elif changes:
            warnings.append(f"{mac} stays without a name: {hostname} is taken, or not a name")
    holders = others(registry, mac, field, address)
    if field not in LEASED and address != instance.get("ipv6_lla"):  # with its own, a guest is entered before its lease
        warnings.append(f"{mac}: {address} is not registered, being neither global nor unique local")
    elif holders and kind != "by hand" and (kind != "add" or field != "ipv4"):
        warnings.append(f"{mac}: {address} is not registered, {holders[0]} has it")
    elif kind == "reminder" and instance.get(field) not in (None, "", address):
        warnings.append(f"{mac} keeps {instance[field]}: {address} is not registered")
    elif assign(registry, mac, field, address, holders):
        changes.append(f"{field} {address}")
    return f"{mac} {instance.get('name', '')}: {', '.join(changes)}" if changes else "", warnings


def initialize(registry, mac, fields):
    """Replace the name and addresses of the instance of a host's interface; return as register does."""
    old = registry.get(mac, {})
    registry[mac] = {k: v for k, v in old.items() if k not in LEASED} | fields
    taken = [assign(registry, mac, *item, others(registry, mac, *item)) for item in fields.items()]  # from others
    return f"{mac} {fields['name']}: initialized" if any(taken) or registry[mac] != old else "", []


def rename(registry, mac, name):
    """Name an instance; return as register does."""
    if mac not in registry:
        return "", [f"{mac}: no such instance"]
    holders = others(registry, mac, "name", name)
    if not assign(registry, mac, "name", name, holders):
        return "", []
    return f"{mac} {name}: renamed" + "".join(f", {other} has no name now" for other in holders), []


def allow(registry, mac, *texts):
    """Let an instance send from these addresses and networks, and no longer from others; return as register does."""
    from ipaddress import ip_address

    if mac not in registry:
        return "", [f"{mac}: no such instance"]
    networks = {parse_allowed(text) for text in texts}
    for other, instance in registry.items():
        for address in [instance[field] for field in LEASED if instance.get(field) and other != mac]:
            for network in networks:
                if ip_address(address) in network:
                    raise ValueError(f"{network}: {other} {instance.get('name', '')} has {address}")
    ordered = sorted(networks, key=lambda network: (network.version, network))
    new = [str(n.network_address if n.num_addresses == 1 else n) for n in ordered]
    old = registry[mac].pop("allowed", [])
    if new:
        registry[mac]["allowed"] = new
    message = f"{mac} {registry[mac].get('name', '')}: allowed {', '.join(new) or 'nothing more'}"
    return message if new != old else "", []


def remove(registry, mac):
    """Remove an instance; return as register does."""
    if mac not in registry:
        return "", [f"{mac}: no such instance"]
    again = f"{mac} comes back with a lease that dnsmasq still has: dhcp_release ends that"
    return f"{mac} {registry.pop(mac).get('name', '')}: removed", [again]


def registry_text(registry):
    """Return the registry as json.dumps(registry, indent=2) has it, and a line break."""
    import json

    # The same in half the time, where all braces are the registry's own. JSON escapes line breaks in strings.
    text = json.dumps(registry, separators=(",\n    ", ": "), check_circular=False)
    if "[" in text or text.count("{") != len(registry) + 1 or not all([registry, *registry.values()]):
        return json.dumps(registry, indent=2) + "\n"
    text = text.replace("},\n    ", "\n  },\n  ").replace("{", "{\n    ")
    return f"{{\n  {text[6:-2]}\n  }}\n}}\n"


def is_registered(text, mac, field, address, hostname):
    """Tell whether a registry's JSON (bytes) has a lease already, and no use for its host name, without parsing it.

    It is found only as json.dumps(registry, indent=2) and jq write it: strings have no line breaks, and of what is
    indented evenly only an instance begins with two spaces and has its fields behind four.
    """
    start = text.rfind(f'\n  "{mac}": {{\n'.encode())  # the last: of two with one key, JSON has that one
    instance = text[start : text.find(b"\n  }", start) + 1]  # empty if there is none
    line = f'\n    "{field}": "{address}"'.encode()
    return (
        (line + b",\n" in instance or line + b"\n" in instance)
        and instance.count(f'"{field}"'.encode()) == 1  # no second field, which would count
        and text.count(f'"{address}"'.encode()) == 1  # nobody else has the address
        and text.endswith((b"\n  }\n}\n", b"\n  }\n}"))  # the file is not cut off
        and not (hostname and b'\n    "name": ""' in instance and is_name(hostname))  # no name that may be given
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
        field, address = parse_address(entry["local"])
        if field and not (entry.get("temporary") or entry.get("deprecated")):
            fields.setdefault(field, address)  # the first: a primary one
            if field in ("ipv6_gua", "ipv6_ula") and entry["prefixlen"] <= 64:
                prefix = f"{interface} has {address}/{entry['prefixlen']}"
                say(f"warning: {prefix}: what guests make of a prefix of 64 or fewer bits by SLAAC is not registered")
    fields.setdefault("ipv6_lla", link_local(link["address"]))  # a bridge without a port has none yet
    return link["address"], fields


def version(path):
    """Return what is another after each replacement or edit of a file, None where there is no file."""
    if os.path.exists(path):
        status = os.stat(path)
        return status.st_ino, status.st_mtime_ns, status.st_size


def change_registry(change, follower=False):
    """Change the registry by change(registry) and make the marker; return what change returned.

    Programs in examples load this file and call this: nobody else takes the lock, reads and replaces. change(registry)
    changes the registry in place and nothing else, and returns a pair: what it changed (false: nothing, and nothing is
    written) and warnings. It is called without the lock first, so that who changes nothing waits for nobody, and under
    the lock again, with the registry read anew, if somebody was faster. ValueError on a host that follows another, or
    from change: nothing is changed. The follower itself is not refused, and replaces also what is no registry.
    """
    base = base_path()
    path, follows = base + ".json", base + ".follows"

    def read():
        try:
            return read_registry(path)
        except ValueError:
            if not follower:
                raise
            return {}

    seen, registry = version(path), read()
    result = change(registry)
    if result[0]:  # there is something to change
        with locked(base):
            if os.path.exists(follows) and not follower:  # made by examples/network: another host's changes come here
                with open(follows) as file:
                    raise ValueError(f"{path} is not to be changed on this host: {file.read().strip()}")
            if version(path) != seen:  # somebody was first: decide again
                registry = read()
                result = change(registry)
            if result[0]:
                make_marker(base)  # before the change, so that none is ever without it
                replace_file(path, registry_text(registry))
    return result


def update(change, mac, *arguments):
    """Change the registry by change(registry, mac, *arguments), and say what changed; return the exit status."""
    if not is_mac(mac):
        raise ValueError(f"{mac}: not an Ethernet MAC address, such as 10:66:6a:00:00:01")
    gc.disable()  # there is no garbage to look for
    message, warnings = change_registry(lambda registry: change(registry, mac, *arguments))
    for warning in warnings:
        say(f"warning: {warning}")
    if message:
        say(message, 1)
    return 0


def lease(action, mac, ip, hostname="", *_):
    """Register a lease that dnsmasq tells of, or what is entered by hand; return the exit status."""
    by_hand = not (os.environ.get("DNSMASQ_LEASE_EXPIRES") or os.environ.get("DNSMASQ_LEASE_LENGTH"))
    if ":" in ip:  # an IPv6 lease's first argument is a DUID
        mac = os.environ.get("DNSMASQ_MAC", "")
        if not mac:
            if by_hand:
                say(f"warning: {ip} is not registered: set DNSMASQ_MAC to the MAC address")
            return 0
    mac = mac.lower()
    field, address = parse_address(ip)
    path = base_path() + ".json"
    if os.path.exists(path):
        with open(path, "rb") as file:  # always whole, so without the lock
            if is_registered(file.read(), mac, field, address, "" if by_hand else hostname):
                return 0
    # Data are missing where no message of the client's is behind it: at a renewal, a SIGHUP, a restart
    kind = "reminder" if action == "old" and os.environ.get("DNSMASQ_DATA_MISSING") else action
    return update(register, mac, address, hostname, "by hand" if by_hand else kind)


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
            return update(rename, mac.lower(), name)
        case ["--allow", mac, *texts]:
            return update(allow, mac.lower(), *texts)
        case ["--remove", mac]:
            return update(remove, mac.lower())
        case ["--help" | "-h" | "help", *_]:
            os.write(1, f"{USAGE}\n".encode())
            return 0
        case [action, *_] if action not in ("add", "old") and not action.startswith("-"):
            return 0
    os.write(2, f"{USAGE}\n".encode())
    return 2


if __name__ == "__main__":
    os._exit(run(main))  # at once: to take Python apart costs a lease event a sixth of its time
