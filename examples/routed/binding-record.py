#!/usr/bin/env python3
"""usage: ip -json address show | binding-record.py FILE RECORDS

Check a binding file of nfdhcpd against the addresses of gw0 and of this host, and against the bindings that there are
(the files in the folder RECORDS). Print the record of it, a line KEY=VALUE each, quoted for the shell.
"""

import ipaddress
import json
import os
import re
import shlex
import sys


def refuse(text: str) -> None:
    """Say what is wrong in one line, and exit."""
    sys.exit(f"binding.sh: {sys.argv[1]}: {text}")


def read(path: str) -> dict[str, str]:
    """Return what a binding file says, "" for what it does not."""
    values = dict.fromkeys(("INDEV", "MAC", "IP", "HOSTNAME", "GATEWAY6", "SUBNET6", "EUI64", "MTU"), "")
    with open(path, errors="replace") as file:
        for line in file:
            if match := re.fullmatch(r"(\w+)=(['\"]?)(.*)\2", line.strip()):
                values[match[1]] = match[3].strip()
    return values


def parse(kind, values: dict[str, str], key: str):
    """Return a key's value as that kind, None if it has none."""
    try:
        return kind(values[key]) if values[key] else None
    except ValueError as error:
        refuse(f"{key}={values[key]}: {error}")


def eui64(network: ipaddress.IPv6Network, mac: str) -> ipaddress.IPv6Address:
    """Return the address that a guest makes for itself (modified EUI-64, RFC 4291 appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    octets = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return network[int.from_bytes(octets, "big")]


def gateway_of(address, key: str, gateways: list, own: set):
    """Return the address of gw0 in whose network a guest's address is."""
    found = [g for g in gateways if g.version == address.version and address in g.network]
    if not found or "%" in str(address):
        refuse(f"{key}={address}: not in a network of gw0")
    if address in own or address in (found[0].network[0], found[0].network.broadcast_address):
        refuse(f"{key}={address}: an address of this host, or of the network as a whole")
    return found[0]


def record_of(values: dict[str, str], interfaces: list) -> dict:
    """Return the record of a binding that can be."""
    addresses = [(i["ifname"], a) for i in interfaces for a in i["addr_info"] if "local" in a]
    own = {ipaddress.ip_address(a["local"]) for _, a in addresses}
    gw0 = [f"{a['local']}/{a['prefixlen']}" for name, a in addresses if name == "gw0" and a["scope"] == "global"]
    gw0 = [ipaddress.ip_interface(text) for text in gw0]

    device, mac = values["INDEV"], values["MAC"].lower()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}", device):
        refuse(f"INDEV={device}: not the name of a device")
    if not re.fullmatch(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", mac) or mac == "00:00:00:00:00:00":
        refuse(f"MAC={mac}: not the MAC address of one interface")
    name = values["HOSTNAME"].split(".")[0]
    if name and not re.fullmatch(r"[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", name):
        print(f"binding.sh: {sys.argv[1]}: {name} can't be a host name: the guest has none", file=sys.stderr)
        name = ""
    mtu = parse(int, values, "MTU")
    if mtu is not None and not 1280 <= mtu <= 65535:
        refuse(f"MTU={mtu}: not between 1280 and 65535")
    record = {
        "device": device,
        "mac": mac,
        "name": name,
        "mtu": mtu,
        "ip": "",
        "gateway": "",
        "ip6": "",
        "gateway6": "",
    }

    if ip := parse(ipaddress.IPv4Address, values, "IP"):
        record |= {"ip": ip, "gateway": gateway_of(ip, "IP", gw0, own).ip}
    subnet6, said6 = parse(ipaddress.IPv6Network, values, "SUBNET6"), parse(ipaddress.IPv6Address, values, "GATEWAY6")
    if subnet6 and (subnet6.prefixlen != 64 or subnet6 not in [g.network for g in gw0]):
        refuse(f"SUBNET6={subnet6}: not the /64 of gw0")
    if ip6 := parse(ipaddress.IPv6Address, values, "EUI64") or (subnet6 and eui64(subnet6, mac)):
        gateway6 = gateway_of(ip6, "EUI64", [g for g in gw0 if subnet6 in (None, g.network)], own)
        if said6 not in (None, gateway6.ip):
            refuse(f"GATEWAY6={said6}: gw0 has {gateway6.ip}")
        # A prefix on the device is advertised there, a single address is not
        record |= {"ip6": ip6, "gateway6": gateway6 if subnet6 else f"{gateway6.ip}/128"}
    if not ip and not ip6:
        refuse("neither IP nor SUBNET6")
    return record


def main() -> None:
    """Check the file, and print its record."""
    path, records = sys.argv[1:]
    try:
        values = read(path)
    except OSError as error:
        refuse(error.strerror)
    record = record_of(values, json.load(sys.stdin)) | {"file": os.path.realpath(path)}
    record = {key: "" if value is None else str(value) for key, value in record.items()}
    for entry in os.scandir(records):
        with open(entry.path) as file:
            other = dict(word.split("=", 1) for word in shlex.split(file.read()))
        for key in ("device", "file", "mac", "ip", "ip6"):
            if record[key] and record[key] == other[key]:
                refuse(f"{record[key]} has a binding already, on {other['device']}: remove it first")
    for key, value in record.items():
        print(f"{key}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
