"""What the page of examples/plain does: run by incus.sh in the machine that it boots, as root.

The guests are LXC's busybox, a folder with busybox for systemd-nspawn, and what qemu boots for libvirt.py.
"""

import subprocess
import time
from pathlib import Path

from incus import block, registry, run, until
from libvirt import IMAGES

PORTS = {"lxc-web": "10:66:6a:00:00:21", "vb-db": "10:66:6a:00:00:22", "vm-mail": "10:66:6a:00:00:23"}
INIT = """\
#!/bin/sh
ip link set host0 up
exec udhcpc -f -i host0 -s /lease -x hostname:db -T 2
"""
LEASE = '#!/bin/sh\ncase $1 in bound | renew) ip address replace "$ip/24" dev "$interface" ;; esac\n'


def follow(page, words):
    run("sh", "-euc", f"cd /root/instances/examples/plain; {block(page, words)}")


def is_there():
    """Tell whether the bridge has its MAC address, and addresses that can be used."""
    listed = run("ip", "address", "show", "br0", check=False)
    wanted = ["10:66:6a:4c:a1:fe", "10.83.0.1/24", "2001:67c:83::1/80", "fd83:5eed::1/80"]
    return all(text in listed for text in wanted) and "tentative" not in listed


def bridge():
    """The bridge by ifupdown, then by networkd, in place of the one that is there."""
    run("ifdown", "br0")
    Path("/etc/network/interfaces").write_text("source /etc/network/interfaces.d/*\nauto lo\niface lo inet loopback\n")
    run("ip", "link", "delete", "br0")
    follow("examples/plain/README.md", "ifup br0")
    assert is_there()
    run("ifdown", "br0")
    assert not Path("/sys/class/net/br0").exists()
    follow("examples/plain/README.md", "br0.netdev")
    until("the bridge by networkd", lambda: "" if is_there() else run("networkctl", "status", "br0", check=False))
    run("systemctl", "restart", "dnsmasq")


def guests():
    """One of each kind, as the page starts it."""
    run("lxc-create", "-n", "web", "-t", "busybox")
    run("sed", "-i", "/^lxc.net/d", "/var/lib/lxc/web/config")
    follow("examples/plain/README.md", "lxc-start")
    root = Path("/var/lib/machines/db")
    for name in ("bin", "sbin", "etc", "proc", "sys", "dev", "run", "tmp", "usr", "root", "var"):
        (root / name).mkdir(parents=True)
    run("cp", "/bin/busybox", root / "bin")
    for name in ("sh", "ip", "udhcpc"):
        (root / "bin" / name).symlink_to("busybox")
    for name, text in (("etc/os-release", "ID=busybox\n"), ("sbin/init", INIT), ("lease", LEASE)):
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    follow("examples/plain/README.md", "machinectl start db")
    follow("examples/plain/README.md", "ip tuntap")
    options = block("examples/plain/README.md", "-netdev tap").split()
    options += [
        "-kernel",
        IMAGES / "vmlinuz",
        "-initrd",
        IMAGES / "initrd",
        "-append",
        "quiet panic=-1 mitigations=off",
    ]
    return subprocess.Popen(["qemu-system-x86_64", "-accel", "tcg", "-m", "128", "-display", "none", *options])


def inside(*command):
    """Run a command in the network of the guest db; tell whether it succeeds."""
    leader = run("machinectl", "show", "-P", "Leader", "db").strip()
    return subprocess.run(["nsenter", "-t", leader, "-n", *command], capture_output=True).returncode == 0


def main():
    bridge()
    machine = guests()
    for port, mac in PORTS.items():
        until(f"a lease of {port}", lambda m=mac: "" if "ipv4" in registry().get(m, {}) else "none", 240)
        assert "master br0" in run("ip", "link", "show", port)
    print("  leases of a guest of each kind", flush=True)
    follow("examples/plain/README.md", "cp ports.nft")
    until("db reaches the host", lambda: "" if inside("ping", "-c", "1", "-W", "1", "10.83.0.1") else "not so")
    run("lxc-attach", "-n", "web", "--", "ping", "-c", "1", "-W", "2", "10.83.0.1")
    inside("ip", "link", "set", "host0", "address", PORTS["lxc-web"])
    assert not inside("ping", "-c", "1", "-W", "1", "10.83.0.1"), "db is web"
    run("lxc-stop", "-r", "-n", "web")
    until("its port after a reboot", lambda: "" if Path("/sys/class/net/lxc-web/master").exists() else "not there")
    machine.kill()
    print("  each held to its port's MAC address", flush=True)


if __name__ == "__main__":
    begun = time.monotonic()
    main()
    print(f"  {time.monotonic() - begun:.0f} s")
