"""What examples/libvirt does with a real libvirt: run by incus.sh in the machine that it boots, as root.

The domains are emulated by qemu, with Debian's kernel and an initial file system of busybox that asks for a lease.
"""

import time
from pathlib import Path

from incus import MISC, registry, resolve, run, until

FOLDER = Path("/root/guest")
IMAGES = Path("/var/lib/libvirt/images")
MODULES = ("net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net")
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in failover net_failover virtio_net; do insmod /$module.ko; done
ip link set eth0 up
udhcpc -f -i eth0 -s /bin/true -x hostname:ubuntu -T 2 -t 20
"""
DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>128</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{images}/vmlinuz</kernel><initrd>{images}/initrd</initrd><cmdline>quiet panic=-1 mitigations=off</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <interface type='bridge'>
      <source bridge='br0'/><mac address='{mac}'/><model type='virtio'/>{filtered}
    </interface>
  </devices>
</domain>
"""
FILTERED = "<filterref filter='no-mac-spoofing'/>"
FIRST, SECOND, THIRD = (f"52:54:00:00:00:0{number}" for number in (1, 2, 3))


def virsh(*arguments):
    return run("virsh", "--connect", "qemu:///system", *arguments)


def prepare():
    """Make what the domains boot."""
    kernel = next(Path("/usr/lib/modules").iterdir())
    for name in ("bin", "proc", "sys", "dev"):
        (FOLDER / name).mkdir(parents=True)
    run("cp", "/bin/busybox", FOLDER / "bin")
    for module in MODULES:
        name = module.rpartition("/")[2]
        run("sh", "-c", f"xz -dc {kernel}/kernel/{module}.ko.xz >{FOLDER}/{name}.ko")
    (FOLDER / "init").write_text(INIT)
    (FOLDER / "init").chmod(0o755)
    run("sh", "-c", f"cd {FOLDER} && find . | cpio -o -H newc --quiet | gzip -1 >{IMAGES}/initrd")
    run("cp", f"/boot/vmlinuz-{kernel.name}", IMAGES / "vmlinuz")


def start(name, mac, filtered=FILTERED):
    """Define and start a domain; return its entry in the registry as it is then, before the guest's kernel is there."""
    Path("/root/domain.xml").write_text(DOMAIN.format(name=name, images=IMAGES, mac=mac, filtered=filtered))
    virsh("define", "/root/domain.xml")
    virsh("start", name)
    return registry().get(mac)


def leased(name, mac):
    """Wait until a domain's lease is registered and its name leads there."""
    until(f"a lease of {name}", lambda: "" if "ipv4" in registry()[mac] else "none")
    until(f"the name {name}", lambda: "" if resolve(name) == {registry()[mac]["ipv4"]} else "not so")


def removed(mac):
    """Compare, and return what is left of a domain: its entry, and whether it has leases."""
    run("systemctl", "reset-failed", "instances-libvirt.service")  # which systemd would start five times in 10 s only
    run("systemctl", "start", "instances-libvirt.service")
    return registry().get(mac), mac in (MISC / "dnsmasq.br0.leases").read_text()


def said():
    return run("journalctl", "--no-pager", "-o", "cat", "-t", "instances-libvirt")


def main():
    prepare()
    others = registry()
    entry = start("box", FIRST)
    assert entry["name"] == "box" and "ipv4" not in entry, entry
    leased("box", FIRST)
    virsh("destroy", "box")
    assert removed(FIRST)[0]["name"] == "box", "a domain that is defined was removed"
    virsh("undefine", "box")
    assert removed(FIRST) == (None, False)
    until("the end of its name", lambda: resolve("box"))
    print("  define, start, lease, destroy, undefine", flush=True)

    start("box", FIRST)
    virsh("destroy", "box")
    virsh("undefine", "box")
    entry = start("box", SECOND)
    assert (entry["name"], registry().get(FIRST, {"name": ""})["name"]) == ("box", "")
    leased("box", SECOND)
    assert removed(FIRST) == (None, False) and removed(SECOND) == (registry()[SECOND], True)
    assert "filter" not in said()
    print("  started again with another MAC address", flush=True)

    name = registry()["10:66:6a:4c:a1:fe"]["name"]
    assert start(name, THIRD, filtered="")["name"] == "", "the host's name was taken"
    assert "without libvirt's filter no-mac-spoofing" in said() and f"not called {name}" in said()
    virsh("destroy", name)
    virsh("undefine", name)
    run("systemctl", "stop", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket", "libvirtd.service")
    assert removed(THIRD)[0], "something is removed while libvirt does not answer"
    run("systemctl", "start", "libvirtd.socket", "libvirtd.service")
    assert removed(THIRD) == (None, False)
    print("  the host's name, no filter, libvirt stopped", flush=True)

    whole = (MISC / "instances.json").read_text()
    (MISC / "instances.json").write_text("{")
    virsh("destroy", "box")
    virsh("start", "box")
    assert "mend it" in said()
    (MISC / "instances.json").write_text(whole)
    virsh("destroy", "box")
    virsh("undefine", "box")
    assert removed(SECOND) == (None, False)
    assert registry() == others
    print("  a domain starts, though the registry is broken", flush=True)


if __name__ == "__main__":
    begun = time.monotonic()
    main()
    print(f"  {time.monotonic() - begun:.0f} s")
