"""What examples/incus does with a real Incus: run by incus.sh in the machine that it boots, as root.

Each case does something to Incus and then waits until all is true: the registry, dnsmasq's answers and the address sets
say what Incus has and what the guests' own interfaces say, no more and no less.
usage: incus.py [prepare | measure SECONDS | CASE...]
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MISC = Path("/var/lib/misc")
BYSTANDER = "10:66:6a:4c:a1:77"  # a guest of nobody's, with the first half of Incus's MAC addresses
FIELDS = {"ipv4": "v4", "ipv6_gua": "g6", "ipv6_ula": "u6"}
WITHIN = 2  # seconds, in the middle of all cases: with other work on the machine, one may take longer
INIT = """\
#!/bin/sh
rm -f /run/eth*
while true; do
    for path in /run/eth*; do
        [ -e "/sys/class/net/${path##*/}" ] || rm -f "$path"
    done
    for path in /sys/class/net/eth*; do
        name=${path##*/}
        [ -e "/run/$name" ] && continue
        : >"/run/$name"
        ip link set "$name" up
        udhcpc -f -i "$name" -s /lease -x hostname:ubuntu -T 2 &
        { sleep 2; udhcpc6 -f -i "$name" -s /lease -T 2; } &
    done
    sleep 1
done
"""
LEASE = """\
#!/bin/sh
case $1 in bound | renew) ip address replace "${ip:-$ipv6}/${mask:-128}" dev "$interface" ;; esac
"""
took = []


def run(*command, check=True, **options):
    """Run a command; return what it says."""
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def incus(*arguments, **options):
    return run("incus", *arguments, stdin=subprocess.DEVNULL, timeout=120, **options)


def prepare():
    """Set Incus up, with an image of busybox whose host name and DHCP clients are always the same."""
    run("incus", "admin", "init", "--preseed", input="storage_pools: [{name: default, driver: dir}]\n", timeout=60)
    incus("profile", "device", "add", "default", "root", "disk", "path=/", "pool=default")
    folder = Path("/root/image")
    for name in ("bin", "sbin", "etc", "proc", "sys", "dev", "tmp", "run", "root"):
        (folder / "rootfs" / name).mkdir(parents=True)
    (folder / "metadata.yaml").write_text("architecture: x86_64\ncreation_date: 1\n")
    run("cp", "/bin/busybox", folder / "rootfs/bin/busybox")
    run("/bin/busybox", "--install", "-s", folder / "rootfs/bin")
    for link in (folder / "rootfs/bin").iterdir():
        if link.is_symlink():
            link.unlink()
            link.symlink_to("busybox")
    for name, text in (("sbin/init", INIT), ("lease", LEASE)):
        (folder / "rootfs" / name).write_text(text)
        (folder / "rootfs" / name).chmod(0o755)
    run("tar", "-C", folder, "-czf", "/root/image.tar.gz", "metadata.yaml", "rootfs")
    incus("image", "import", "/root/image.tar.gz", "--alias", "guest")


def block(page, words):
    """Return the commands of a page's block that has these words."""
    return run("/root/instances/tests/block.sh", page, words)


def registry():
    return json.loads((MISC / "instances.json").read_text())


def resolve(name):
    """Return the addresses that dnsmasq has for a name."""
    name += ".instance.internal"
    found = run("dig", "+short", "+timeout=1", "@10.83.0.1", name, "A", name, "AAAA")
    return set(found.split())


def elements(name):
    """Return the elements of an address set."""
    listed = json.loads(run("nft", "-j", "list", "set", "inet", "instances", name))["nftables"]
    return {element for item in listed if "set" in item for element in item["set"].get("elem", [])}


def dnsmasq_leases():
    """Return {MAC address: addresses} of dnsmasq's leases; the guests' DUIDs are made from the MAC address."""
    leases = {}
    for line in (MISC / "dnsmasq.br0.leases").read_text().splitlines():
        if not line.startswith("duid"):
            _, mac, address, _, duid = line.split()
            leases.setdefault(duid[-17:] if ":" in address else mac, set()).add(address)
    return leases


def said_by_incus():
    """Return {MAC address: (name, PROJECT/NAME, addresses, None unless it runs)} of what Incus has on the bridge."""
    said = {}
    for instance in json.loads(incus("list", "--all-projects", "--format", "json")):
        project = instance["project"]
        name = instance["name"] + ("" if project == "default" else f"-{project}")
        nics = [d for d, nic in sorted(instance["expanded_devices"].items()) if nic.get("parent") == "br0"]
        for device in nics:
            state = ((instance.get("state") or {}).get("network") or {}).get(device)
            addresses = state and {a["address"] for a in state["addresses"] if a["scope"] == "global"}
            own = name if device == nics[0] else f"{name}-{device}"
            mac = instance["expanded_devices"][device].get("hwaddr") or instance["config"][f"volatile.{device}.hwaddr"]
            said[mac] = (own, f"{project}/{instance['name']}", addresses)
    return said


def wrong(dead=()):
    """Return what is not true, "" if all is."""
    said, known, leases = said_by_incus(), registry(), dnsmasq_leases()
    if set(known) - {"10:66:6a:4c:a1:fe", BYSTANDER} != set(said):
        return f"the registry has {set(known) - set(said)} too many, {set(said) - set(known)} too few"
    if (known["10:66:6a:4c:a1:fe"]["name"], known[BYSTANDER]["name"]) != ("host", "mail") or known[BYSTANDER] != mail:
        return "the host or a guest of nobody's was changed"
    for mac, (name, instance, addresses) in said.items():
        entry = known[mac]
        leased = {entry[field] for field in FIELDS if field in entry}
        if (entry["name"], entry["incus"]) != (name, instance):
            return f"{mac} is {entry}, and should be {name}, {instance}"
        if not leased <= leases.get(mac, set()) or not (addresses or set()) <= leased:
            return f"{name} has {addresses}, leases of {leases.get(mac)}, and in the registry {leased}"
        if resolve(name) != leased:
            return f"{name}: dnsmasq says {resolve(name)}, the registry {leased}"
    for name in dead:
        if resolve(name):
            return f"{name} is {resolve(name)}, which is dead"
    for field, kind in FIELDS.items():
        if elements(f"all_{kind}.instance") != {entry[field] for entry in known.values() if field in entry}:
            return f"all_{kind}.instance has {elements(f'all_{kind}.instance')}"
        if elements(f"web.{kind}.instance") != {e[field] for e in known.values() if field in e and e["name"] == "web"}:
            return f"web.{kind}.instance"
    if "goto instances_guard" not in run("nft", "list", "table", "bridge", "instances"):
        return "the guard is not on"
    if set(leases) - set(said) - {BYSTANDER}:
        return f"dnsmasq has leases of {set(leases) - set(said)}"
    return ""


def until(what, condition, seconds=60):
    """Wait until a condition says "", and note how long that took."""
    begun = time.monotonic()
    while why := condition():
        assert time.monotonic() < begun + seconds, f"{what}, not within {seconds} s: {why}"
        time.sleep(0.05)
    return time.monotonic() - begun


def leased():
    """Say who runs and has no address of each version yet, by its own word."""
    return [name for name, _, addresses in said_by_incus().values() if addresses is not None and len(addresses) != 2]


def known():
    """Say what of Incus's is not in the registry as it should be, whatever its addresses."""
    said, now = said_by_incus(), registry()
    names = {mac: (i["name"], i["incus"]) for mac, i in now.items() if "incus" in i}
    return (
        ""
        if names == {mac: (name, instance) for mac, (name, instance, _) in said.items()}
        else f"{names}, Incus {said}"
    )


def settle(what, dead=()):
    """Wait until the registry has the names, then until the guests have leases, then until all is true."""
    first = until(what, known)
    until(what, leased)
    second = until(what, lambda: wrong(dead))
    took.extend([first, second])
    print(f"  {first:.2f} s, {second:.2f} s after the leases: {what}", flush=True)


def follower():
    """Return the program's process."""
    return int(run("systemctl", "show", "-P", "MainPID", "instances-incus"))


def launched():
    incus("launch", "guest", "web", "--profile", "default", "--profile", "instances")
    settle("launched, by the name ubuntu")


def renamed():
    incus("stop", "-f", "web")
    incus("rename", "web", "shop")
    settle("renamed", ["web"])
    incus("start", "shop")
    settle("started again", ["web"])
    incus("stop", "-f", "shop")
    incus("rename", "shop", "web")
    incus("start", "web")
    settle("renamed back", ["shop"])


def copied():
    incus("copy", "web", "web2")
    settle("copied")
    incus("start", "web2")
    settle("the copy started")
    incus("delete", "-f", "web2")
    settle("the copy deleted", ["web2"])


def replaced():
    old = registry()
    incus("delete", "-f", "web")
    incus("launch", "guest", "web", "--profile", "default", "--profile", "instances")
    settle("deleted, and launched under the same name")
    assert not {m for m, i in old.items() if i["name"] == "web"} & set(registry())
    run("systemctl", "reload", "dnsmasq")
    run("systemctl", "restart", "dnsmasq")
    settle("dnsmasq restarted: the dead one's leases do not come back")


def other_project():
    incus("project", "create", "shop", "-c", "features.images=false", "-c", "features.profiles=false")
    incus("launch", "guest", "web", "--project", "shop", "--profile", "default", "--profile", "instances")
    settle("in another project")
    incus("delete", "-f", "web", "--project", "shop")
    incus("project", "delete", "shop")
    settle("and no longer", ["web-shop"])


def second_interface():
    incus("config", "device", "add", "web", "eth1", "nic", "nictype=bridged", "parent=br0", "hwaddr=00:16:3e:00:00:01")
    settle("a second interface, with LXD's MAC address")
    warned = run("journalctl", "-u", "instances-incus")
    assert "00:16:3e:00:00:01 web-eth1: without security.mac_filtering" in warned, warned
    incus("config", "device", "remove", "web", "eth1")
    settle("and no longer", ["web-eth1"])


def stopped_program():
    """While it does not read, nor anybody tell it, things happen for a minute."""
    os.kill(follower(), signal.SIGSTOP)
    incus("launch", "guest", "late", "--profile", "default", "--profile", "instances")
    incus("delete", "-f", "web")
    incus("launch", "guest", "web", "--profile", "default", "--profile", "instances")
    time.sleep(60)
    assert registry() and "late" not in [i["name"] for i in registry().values()]
    os.kill(follower(), signal.SIGCONT)
    settle("stopped for a minute")


def restarted_incus():
    before = registry()
    run("systemctl", "restart", "incus")
    incus("delete", "-f", "late")
    settle("Incus restarted", ["late"])
    assert {m: i for m, i in before.items() if i["name"] != "late"} == registry()
    run("systemctl", "stop", "incus.socket", "incus.service")
    until(
        "it ends with Incus", lambda: run("systemctl", "is-active", "instances-incus", check=False).strip() == "active"
    )
    run("systemctl", "start", "incus.socket", "incus.service")
    incus("stop", "-f", "web")
    incus("start", "web")
    settle("Incus stopped and started")


def killed_program():
    os.kill(follower(), signal.SIGKILL)
    incus("launch", "guest", "new", "--profile", "default", "--profile", "instances")
    settle("killed, and a new guest")
    os.kill(follower(), signal.SIGKILL)
    incus("delete", "-f", "new")
    settle("killed, and one less", ["new"])


def many():
    names = [f"c{number}" for number in range(20)]
    options = ("--profile", "default", "--profile", "instances")
    for what, command in (("launched", ["launch", "guest", None, *options]), ("deleted", ["delete", "-f", None])):
        jobs = [subprocess.Popen(["incus", *(word or name for word in command)], stdout=-3, stdin=-3) for name in names]
        assert [job.wait() for job in jobs] == [0] * len(jobs)
        settle(f"20 {what} at once", names if what == "deleted" else [])


def restored():
    incus("snapshot", "create", "web", "s")
    incus("stop", "-f", "web")
    incus("rename", "web", "was")
    settle("renamed after a snapshot", ["web"])
    incus("snapshot", "restore", "was", "s")
    incus("start", "was", check=False)
    settle("a snapshot restored", ["web"])
    incus("delete", "-f", "was")
    settle("the last one deleted", ["was"])


def last_words():
    """A list that lacks them removes nobody; a lost registry is made again."""
    incus("launch", "guest", "web", "--profile", "default", "--profile", "instances")
    settle("launched")
    (MISC / "instances.json").rename(MISC / "lost")
    run("instances-update.py", "--initialize", "br0", "host")
    assert "web" not in [i["name"] for i in registry().values()]
    incus("config", "set", "web", "user.x=1")
    until("the registry was lost", lambda: known())
    restore = "cd /var/lib/misc && touch instances.updated && mv lost instances.json"
    run("flock", MISC / "instances.lock", "sh", "-c", restore)
    settle("the registry is back")


CASES = [launched, renamed, copied, replaced, other_project, second_interface, stopped_program, restarted_incus]
CASES += [killed_program, many, restored, last_words]


def measure(seconds):
    """Print the processor time of the program and what it started, and its memory, without an event and for 100."""

    def spent():
        total = 0
        for process in run("systemctl", "show", "-P", "ControlGroup", "instances-incus").split():
            for pid in Path(f"/sys/fs/cgroup{process}/cgroup.procs").read_text().split():
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                total += sum(map(int, fields[11:15]))
        return total / os.sysconf("SC_CLK_TCK")

    group = run("systemctl", "show", "-P", "ControlGroup", "instances-incus").strip()
    for pid in Path(f"/sys/fs/cgroup{group}/cgroup.procs").read_text().split():
        status = Path(f"/proc/{pid}/status").read_text()
        lines = [line for line in status.splitlines() if line.startswith(("Name", "VmHWM", "RssAnon"))]
        print(" ".join(" ".join(line.split()) for line in lines))
    before = spent()
    time.sleep(seconds)
    print(f"{(spent() - before) * 3600 / seconds:.2f} s of processor time in an hour without an event")
    before = spent()
    for number in range(100):
        incus("config", "set", "web", f"user.x={number}")
    time.sleep(2)
    print(f"{spent() - before:.2f} s for 100 events")


def main(arguments):
    global mail
    if arguments == ["prepare"]:
        return prepare()
    if not Path("/run/netns/mail").exists():
        run("ip", "netns", "add", "mail")
        peer = ["peer", "name", "eth0", "address", BYSTANDER, "netns", "mail"]
        run("ip", "link", "add", "mail0", "master", "br0", "type", "veth", *peer)
        run("ip", "link", "set", "mail0", "up")
        run("ip", "-n", "mail", "link", "set", "eth0", "up")
        run("ip", "netns", "exec", "mail", "udhcpc", "-q", "-n", "-i", "eth0", "-s", "/bin/true", "-x", "hostname:mail")
    until("a guest of nobody's", lambda: "" if BYSTANDER in registry() else "not there")
    mail = registry()[BYSTANDER]
    if arguments[:1] == ["measure"]:
        return measure(int(arguments[1]))
    for case in CASES:
        if not arguments or case.__name__ in arguments:
            case()
    took.sort()
    print(f"  in the middle {took[len(took) // 2]:.2f} s, at the most {took[-1]:.2f} s")
    assert took[len(took) // 2] < WITHIN, "too slow"


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(sys.argv[1:])
