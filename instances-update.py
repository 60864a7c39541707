#!/usr/bin/env python3
"""Keep the registry of instances: run by dnsmasq for every lease, and by administrators.

usage: instances-update.py add|old MAC IP [HOSTNAME]            what dnsmasq tells of a lease, or you enter by hand
       instances-update.py --initialize INTERFACE NAME          register an interface of this host
       instances-update.py --rename INSTANCE NAME               name an instance
       instances-update.py --allow INSTANCE [IP|NETWORK ...]    what else it may send from, in place of what was allowed
       instances-update.py --remove INSTANCE                    remove an instance
       instances-update.py --help | --version

INSTANCE is a name or a MAC address. That of an IPv6 lease is DNSMASQ_MAC's. Other actions of dnsmasq's are ignored.
The registry is INSTANCES_BASE_PATH[-INSTANCES_BASE_ID].json, /var/lib/misc/instances.json by default.
Exit status: 0 done or nothing to do, 1 error, 2 wrong usage.
"""

# Most of dnsmasq's runs change nothing, take no lock, and must cost little more than Python's start: so most imports
# wait until they are needed, and there are no annotations, whose compilation takes 0.7 ms.
import os
import sys
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton  # the module socket takes 6 ms to import

LEASED = ("ipv4", "ipv6_gua", "ipv6_ula")  # the fields of a registry's addresses that a lease can set
IGNORED = ("del", "init", "tftp", "arp-add", "arp-del", "relay-snoop")  # other actions of dnsmasq's
SERVICES = ("isatap", "localhost", "wpad")  # names that programs look for by themselves: no lease gives them


# ---- Shared: these lines stand in both scripts, and a test keeps them the same ----
VERSION = "4.0"


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


def is_mac(text):
    """Tell whether this is one station's Ethernet address as the registry has it: lower case, with colons."""
    digits = text.replace(":", "")
    plain = len(digits) == 12 and text[2::3] == ":::::" and not digits.strip("0123456789abcdef")
    return plain and digits[1] in "02468ace"


def is_name(text):
    """Tell whether this is a label of RFC 1035, section 2.3.1: Incus's rule for names too."""
    plain = text.replace("-", "")
    return plain.isascii() and plain.isalnum() and text[0].isalpha() and text[-1] != "-" and len(text) < 64


def parse_address(text):
    """Return an address's field ("" if its kind has none) and RFC 5952 form. ValueError if it is no address."""
    try:
        packed = inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except (OSError, TypeError, ValueError):
        raise ValueError(f"{text}: not an IP address") from None
    if len(packed) == 4:
        return "ipv4", text
    # RFC 3587; documentation: RFC 3849, RFC 9637; RFC 4193, section 3.1; RFC 4291, section 2.5.6. Written out, since
    # what the module ipaddress says changes with Python
    first = packed.hex()
    gua = "2" <= first < "4" and not first.startswith(("20010db8", "3fff0"))
    other = "ipv6_ula" if "fc" <= first < "fe" else "ipv6_lla" if "fe8" <= first < "fec" else ""
    return "ipv6_gua" if gua else other, inet_ntop(AF_INET6, packed)


def parse_allowed(text):
    """Return an address or network to be allowed as a network of the module ipaddress. ValueError if it must not be."""
    import ipaddress

    network = ipaddress.ip_network(text)
    if "%" in text:
        raise ValueError(f"{text}: an address without a zone, please")
    if not network.prefixlen:
        raise ValueError(f"{text}: can't be allowed: a port that leads to a router is an uplink in bridge.nft")
    # Unspecified, of the host itself, link-local, multicast, broadcast: RFC 6890, section 2.2; RFC 4291, section 2.4
    never = ["0.0.0.0/32", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"]
    for other in [*never, "::/127", "fe80::/10", "ff00::/8"]:
        if network.overlaps(ipaddress.ip_network(other)):
            raise ValueError(f"{text}: has addresses of {other}, which can't be a guest's")
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


def read_registry(path, lenient=False):
    """Return the registry, {} where there is no file. ValueError if it is no object of objects; if lenient, {}."""
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
        if lenient:
            return {}
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
        if sys.argv[1:] == ["--version"]:
            say(VERSION, 1)
            return 0
        return main(sys.argv[1:])
    # filelock says by a RuntimeError that a file system has no locks
    except (OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
        root = ": run it as root" if isinstance(error, PermissionError) and os.geteuid() else ""
        say(f"error: {str(error) or 'interrupted'}{root}")
        return 1


# ---- End of the shared lines ----


def link_local(mac):
    """Return the link-local address made from a MAC address: modified EUI-64, RFC 4291, appendix A."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return inet_ntop(AF_INET6, b"\xfe\x80" + bytes(6) + bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:])


def label(registry, mac):
    """Return how messages call an instance."""
    return f"{mac} {registry[mac].get('name') or '(no name)'}"


def others(registry, mac, field, value):
    """Return the MAC addresses of the other instances that have an address, or a name in any case (RFC 4343)."""
    return [m for m, i in registry.items() if m != mac and str(i.get(field) or "").lower() == str(value).lower()]


def take(registry, mac, field, value):
    """Take a name or an address from all other instances; return from whom, in words."""
    taken = ""
    for other in others(registry, mac, field, value):
        taken += f" (taken from {label(registry, other)})"
        registry[other][field] = ""
        if field != "name":
            del registry[other][field]
    return taken


def is_in(address, networks):
    """Tell whether an address is in one of these networks, which may be anything: a registry is edited by hand."""
    from ipaddress import ip_address, ip_network

    for network in networks if isinstance(networks, list) else []:
        try:
            if ip_address(address) in ip_network(network):
                return True
        except ValueError:
            pass
    return False


def register(registry, mac, ip, hostname, kind, keepers=()):
    """Enter a lease; return what changed, "" if nothing did, and warnings. A bad host name is no error.

    The kind is "by hand", "add", "old" or "reminder", which may be of a lease before the last. By hand, an address is
    taken from whoever has it. Of dnsmasq's, only an "add" of IPv4 says that a former lease of the address is over: by
    DHCPv6 Rebind it gives anybody any address of the prefix, and by another's DUID anybody can end a lease.
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
    old, holders = instance.get(field), others(registry, mac, field, address)
    if kind != "by hand":
        kept = [m for m, i in registry.items() if m != mac and i.get("allowed") and is_in(address, i["allowed"])]
        kept += holders if kind != "add" or field != "ipv4" else []
        keepers = [*keepers, *(label(registry, other) for other in kept)]
    if field not in LEASED and address != instance.get("ipv6_lla"):  # with its own, a guest is entered before its lease
        warnings.append(f"{mac}: {address} is not registered, being neither global nor unique local")
    elif keepers and (holders or old != address):
        warnings.append(f"{mac}: {address} is not registered, {keepers[0]} has it")
    elif kind == "reminder" and old and old != address:
        warnings.append(f"{mac} keeps {old}: {address} is not registered")
    elif holders or old != address:
        instance[field] = address
        before = f" in place of {old}" if old and old != address else ""
        changes.append(f"{field} {address}{before}{take(registry, mac, field, address)}")
    return label(registry, mac) + ": " + ", ".join(changes) if changes else "", warnings


def initialize(registry, mac, fields):
    """Replace the name, the addresses and what is allowed of a host's interface; return as register does."""
    old = registry.get(mac, {})
    registry[mac] = {k: v for k, v in old.items() if k not in (*LEASED, "allowed")} | fields
    own = [(field, value) for field, value in fields.items() if field != "allowed"]
    own += [(parse_address(address)[0], address) for address in fields.get("allowed", [])]
    taken = [value + taken for field, value in own if (taken := take(registry, mac, field, value))]
    changed = taken or registry[mac] != old
    return label(registry, mac) + ": " + ", ".join(["initialized", *taken]) if changed else "", []


def change_instance(registry, change, text, *arguments):
    """Do change(registry, mac, *arguments) to the instance that has this MAC address or name; return as it does."""
    mac = text.lower()
    if not is_mac(mac) and not is_name(text):
        raise ValueError(f"{text}: neither a MAC address, such as 10:66:6a:00:00:01, nor a name")
    found = [mac] if mac in registry else others(registry, "", "name", text)
    return change(registry, found[0], *arguments) if found else ("", [f"{text}: no such instance"])


def rename(registry, mac, name):
    """Name an instance; return as register does."""
    old, registry[mac]["name"] = registry[mac].get("name"), name
    taken = take(registry, mac, "name", name)
    return f"{mac} {name}: renamed{taken}" if taken or name != old else "", []


def allow(registry, mac, *texts):
    """Let an instance send from these addresses and networks, and no longer from others; return as register does."""
    networks = sorted({parse_allowed(text) for text in texts}, key=lambda n: (n.version, n))
    for other, instance in registry.items():
        for address in map(instance.get, LEASED):
            if other != mac and is_in(address, networks):
                raise ValueError(f"{' '.join(texts)}: {label(registry, other)} has {address}")
    new = [str(n.network_address if n.num_addresses == 1 else n) for n in networks]
    old = registry[mac].pop("allowed", [])
    registry[mac] |= {"allowed": new} if new else {}
    return label(registry, mac) + ": allowed " + (", ".join(new) or "nothing more") if new != old else "", []


def remove(registry, mac):
    """Remove an instance, if it is there; return as register does."""
    if mac not in registry:
        return "", []
    message = label(registry, mac) + ": removed"
    again = f"{mac} comes back if dnsmasq still has a lease of it: then run instances-release {mac}, and this again"
    return message, [again] if any(map(registry.pop(mac).get, LEASED)) else []


def registry_text(registry):
    """Return the registry as the file has it."""
    import json

    return json.dumps(registry, indent=2) + "\n"


def is_registered(text, mac, field, address, hostname):
    """Tell, without parsing a registry's JSON (bytes), whether a lease would change nothing."""
    # As json.dumps(registry, indent=2) and jq write it: strings have no line breaks, and of what is indented evenly
    # only an instance begins with two spaces and has its fields behind four
    start = text.rfind(f'\n  "{mac}": {{\n'.encode())  # the last: of two with one key, JSON has that one
    instance = text[start : text.find(b"\n  }", start) + 1]  # empty if there is none
    line = f'\n    "{field}": "{address}"'.encode()
    named = b'\n    "name": "' in instance and b'\n    "name": ""' not in instance
    return (
        (line + b",\n" in instance or line + b"\n" in instance)
        and instance.count(f'"{field}"'.encode()) == 1  # no second field, which would count
        and text.count(f'"{address}"'.encode()) == 1  # nobody else has the address
        and text.endswith((b"\n  }\n}\n", b"\n  }\n}"))  # the file is not cut off
        and (named or not hostname or not is_name(hostname))
    )


def interface_fields(interface):
    """Return the MAC address of an interface of this host and the fields of its own addresses."""
    import json
    import subprocess

    result = subprocess.run(["ip", "-json", "address", "show", "dev", interface], capture_output=True, text=True)
    link = next(filter(None, json.loads(result.stdout or "[]")), {})
    if link.get("link_type") != "ether":
        raise ValueError(f"{interface}: {result.stderr.strip() or 'has no Ethernet address'}")
    fields, further = {}, set()
    for entry in (entry for entry in link["addr_info"] if not entry.get("temporary")):
        field, address = parse_address(entry["local"])
        if field and not entry.get("deprecated"):
            fields.setdefault(field, address)  # the first: a primary one
        if field in LEASED and not address.startswith("169.254."):
            further.add(address)
    fields.setdefault("ipv6_lla", link_local(link["address"]))  # a bridge without a port has none yet
    if further := further - {*fields.values()}:
        fields["allowed"] = sorted(further, key=lambda a: (":" in a, inet_pton(AF_INET6 if ":" in a else AF_INET, a)))
    return link["address"], fields


def is_own(address):
    """Tell whether this host has an address now, registered or not."""
    entry = inet_pton(AF_INET6, address).hex() if ":" in address else f"|-- {address}\n"
    try:
        with open("/proc/net/if_inet6" if ":" in address else "/proc/net/fib_trie") as file:
            found = file.read().split(entry)[1:]
    except OSError:  # a host without IPv6, or AppArmor
        return False
    return any(":" in address or "/32 host LOCAL" in after.partition("|--")[0] for after in found)


def change_registry(change, follower=False):
    """Change the registry by change(registry) and make the marker; return what change returned.

    change() changes the registry in place, and returns what it changed (false: nothing, and nothing is written) and
    warnings. It is called without the lock, so that who changes nothing waits for nobody, and once more under the lock.
    ValueError on a host that follows another; not for the follower itself, which replaces also what is no registry.
    """
    base = base_path()
    path, follows = base + ".json", base + ".follows"
    result = change(read_registry(path, follower))
    if result[0]:
        with locked(base):
            if os.path.exists(follows) and not follower:  # made by examples/network: another host's changes come here
                with open(follows) as file:
                    raise ValueError(f"{path} is not to be changed on this host: {file.read().strip()}")
            registry = read_registry(path, follower)
            result = change(registry)
            if result[0]:
                make_marker(base)  # before the change, so that none is ever without it
                replace_file(path, registry_text(registry))
    return result


def report(change, *arguments):
    """Change the registry by change(registry, *arguments), and say what changed; return the exit status."""
    message, warnings = change_registry(lambda registry: change(registry, *arguments))
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
    name = hostname if by_hand or hostname.lower() not in SERVICES else ""
    path = base_path() + ".json"
    if os.path.exists(path):
        with open(path, "rb") as file:  # always whole, so without the lock
            if is_registered(file.read(), mac, field, address, "" if by_hand else name):
                return 0
    if not is_mac(mac):
        raise ValueError(f"{mac}: not an Ethernet MAC address, such as 10:66:6a:00:00:01")
    if by_hand and field == "ipv4":
        parse_allowed(address)
    # Data are missing where no message of the client's is behind it: at a renewal, a SIGHUP, a restart
    kind = "reminder" if action == "old" and os.environ.get("DNSMASQ_DATA_MISSING") else action
    keepers = ["this host"] if not by_hand and is_own(address) else []
    return report(register, mac, address, name, "by hand" if by_hand else kind, keepers)


def main(arguments):
    """Do what the arguments say; return the exit status."""
    changes = {"--rename": rename, "--allow": allow, "--remove": remove}
    match arguments:
        case ["add" | "old", _, _, *_]:
            return lease(*arguments)
        case ["--initialize" | "--rename", _, name] if not is_name(name):
            raise ValueError(f"{name}: not a name: a letter, then letters, digits, hyphens, 63 at most")
        case ["--initialize", interface, name]:
            mac, fields = interface_fields(interface)
            return report(initialize, mac, {"name": name, **fields})
        case ["--rename", _, _] | ["--allow", _, *_] | ["--remove", _]:
            return report(change_instance, changes[arguments[0]], *arguments[1:])
        case ["--help" | "-h" | "help", *_]:
            os.write(1, __doc__.partition("\n\n")[2].encode())
            return 0
        case ["add" | "old", *_]:
            pass
        case [action, *_] if action in IGNORED or action[:1] != "-" and not os.isatty(2):
            return 0
    say(f"error: {' '.join(arguments) or 'nothing'}: no action with its arguments: see --help")
    return 2


if __name__ == "__main__":
    os._exit(run(main))  # at once: to take Python apart costs a lease event a sixth of its time
