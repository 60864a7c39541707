"""Incus and libvirt of three hosts with one registry, which a writes: run by incus.sh on a, which has ssh to b and c.

A domain moves between them, with and without its definition; Incus's cluster goes on while one of its members is down.
"""

import shlex
import time
from pathlib import Path

from incus import block, incus, known, leased, registry, run, until
from libvirt import DOMAIN, FILTERED, IMAGES

HOSTS = {"a": "192.0.2.1", "b": "192.0.2.2", "c": "192.0.2.3"}
FIRST, SECOND = "52:54:00:00:00:11", "52:54:00:00:00:12"


def on(host, *command, **options):
    """Run a command on a host; return what it says."""
    return run(*(command if host == "a" else ("ssh", host, shlex.join(map(str, command)))), **options)


def define(host, name, mac):
    """Define and start a domain on a host."""
    text = DOMAIN.format(name=name, images=IMAGES, mac=mac, filtered=FILTERED)
    on(host, "sh", "-c", "cat >/root/domain.xml", input=text)
    on(host, "virsh", "define", "/root/domain.xml")
    on(host, "virsh", "start", name)


def migrate(name, source, target, *options):
    on(source, "virsh", "migrate", "--live", "--persistent", *options, name, f"qemu+ssh://{target}/system")


def compare():
    """Do what the timer does; return the registry."""
    run("systemctl", "reset-failed", "instances-libvirt.service")
    run("systemctl", "start", "instances-libvirt.service")
    return registry()


def domains():
    before = set(registry())
    define("a", "my vm", FIRST)
    until("a lease", lambda: "" if "ipv4" in registry()[FIRST] else "none", 240)
    entry = registry()[FIRST]
    assert entry["name"] == "my-vm", entry
    migrate("my vm", "a", "b", "--undefinesource")
    left = {field: value for field, value in entry.items() if field != "libvirt"}
    assert compare()[FIRST] == left, "a domain that has moved is not what it was, without its mark"
    refused = "is not to be changed on this host: a writes it"
    assert refused in on("b", "journalctl", "--no-pager", "-t", "instances-libvirt")
    print("  moved with its definition", flush=True)

    run("sh", "-euc", block("examples/libvirt/README.md", "qemu+ssh"))
    assert compare()[FIRST] == entry, "it is not marked again where it runs"
    migrate("my vm", "b", "a")
    migrate("my vm", "a", "b")
    assert compare()[FIRST] == entry, "moved there and back without its definition"
    define("b", "far", SECOND)
    assert compare()[SECOND]["name"] == "far", "what runs on another host has no name"
    print("  compared with b's, and moved without its definition", flush=True)

    for name in ("my vm", "far"):
        on("b", "virsh", "destroy", name)
        on("b", "virsh", "undefine", name)
    assert FIRST in compare() and SECOND not in registry(), "only what no host has is removed"
    run("virsh", "undefine", "my vm")
    hosts = Path("/etc/hosts")
    whole = hosts.read_text()
    hosts.write_text(whole.replace(" b\n", " elsewhere\n"))
    assert FIRST in compare(), "something is removed while b does not answer"
    hosts.write_text(whole)
    assert set(compare()) == before
    print("  undefined everywhere", flush=True)


def marks():
    """Return {MAC address: (name, Incus's mark)} of the registry."""
    return {mac: (instance["name"], instance.get("incus")) for mac, instance in registry().items()}


def cluster():
    for host in HOSTS:
        if host == "a":
            incus("config", "set", "core.https_address", f"{HOSTS[host]}:8443")
            incus("cluster", "enable", host)
            incus("config", "set", "cluster.offline_threshold", "11")
            continue
        token = incus("cluster", "add", host).split()[-1]
        preseed = f'enabled: true, server_address: "{HOSTS[host]}:8443", cluster_token: "{token}", member_config: []'
        text = f"cluster: {{server_name: {host}, {preseed}}}\n"
        on(host, "incus", "admin", "init", "--preseed", input=text, timeout=120)
    for host in HOSTS:
        incus("launch", "guest", f"on-{host}", "--target", host, "--profile", "default", "--profile", "instances")
    until("names of the guests of all members", known)
    until("their leases", leased)
    incus("stop", "-f", "on-b")
    incus("rename", "on-b", "moved")
    incus("move", "moved", "--target", "c")
    incus("start", "moved")
    until("the name of one that has moved", known)
    print("  a cluster, and a guest that moves", flush=True)

    before = marks()
    on("c", "systemctl", "stop", "incus.socket", "incus.service")
    until("c is down", lambda: "" if "c,OFFLINE" in incus("cluster", "list", "-f", "csv", "-c", "ns") else "not yet")
    incus("launch", "guest", "late", "--target", "b", "--profile", "default", "--profile", "instances")
    until("the name of a new guest", lambda: "" if "late" in [i["name"] for i in registry().values()] else "none")
    incus("delete", "-f", "late")
    until("its end, and nobody else's", lambda: "" if marks() == before else f"{before}, and now {marks()}")
    on("c", "systemctl", "start", "incus.socket", "incus.service")
    until("c is back", lambda: "" if "c,ONLINE" in incus("cluster", "list", "-f", "csv", "-c", "ns") else "not yet")
    for name in ("on-a", "moved", "on-c"):
        incus("delete", "-f", name)
    until("all are gone", known)
    print("  goes on while a member is down", flush=True)


def main():
    domains()
    cluster()


if __name__ == "__main__":
    begun = time.monotonic()
    main()
    print(f"  {time.monotonic() - begun:.0f} s")
