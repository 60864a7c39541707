"""What may happen to etcd and to the hosts of examples/network, as a table of what is promised and what came of it.

usage: python3 tests/network_chaos.py [WORD...]   as root: the cases with one of these words in their names
       python3 tests/network_chaos.py --soak INSTANCES SECONDS   a change each second: lag, etcd's size, memory

Three hosts in namespaces with an etcd each; test_network_lead.py runs the quick cases, too. In each case guests
ping the gateway, and changes are made before, and where somebody can, meanwhile. When it is healed, all hosts must soon
have one registry, in force, with all that the majority acknowledged; and there were never two gateways.
"""

import base64
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

from lab import UPDATE, block, environment, run, wait_for
from network_lab import Pinger, fault, fill, in_force, leading, leave, renew

PROMISE = 5  # seconds after healing in which all hosts have the same in force
ELECTION = 9  # seconds more, where a leader is to be elected first
SAVED = (".json", ".shared", ".leases", ".dhcp-hosts")  # what a backup of a host has of it


class Chaos:
    """The hosts, their guests' pings of the gateway, and what the majority has acknowledged."""

    def __init__(self, site):
        self.site, self.pingers = site, [Pinger(guest, "10.83.0.1") for guest in site.guests]
        self.numbers, self.acknowledged, self.entered = itertools.count(1), {}, {}

    @property
    def leader(self):
        """Return the host that leads."""
        return wait_for(self.site.leader, "a leader", 60)

    def change(self, host=None, acknowledged=True, times=1):
        """Enter an instance, as by hand, on the host that leads; return its MAC address when the majority has it."""
        for _ in range(times - 1):
            self.change()
        number = next(self.numbers)
        mac, address = f"10:66:6a:4d:{number >> 8:02x}:{number & 255:02x}", f"10.86.{number >> 8}.{number & 255}"

        def entered():
            on = host or self.leader
            command = (sys.executable, UPDATE, "add", mac, address)
            return on.run(*command, env=environment(on.base), check=False).returncode == 0 and on

        host, self.entered[mac] = wait_for(entered, "the change", 60), address
        if acknowledged:
            wait_for(lambda: self.stored(mac, host), "the majority's word", 60)
            self.acknowledged[mac] = address
        return mac

    def stored(self, mac, host):
        """Tell whether the majority has an instance."""
        found = json.loads(host.etcdctl("get", "/instances/part/", "--prefix", "-w", "json", check=False) or "{}")
        parts = [zlib.decompress(base64.b64decode(entry["value"])) for entry in found.get("kvs", [])]
        return any(mac.encode() in part for part in parts)

    def settled(self):
        """Tell whether all hosts have one registry in force, with all that was acknowledged."""
        try:
            registries = [host.registry() for host in self.site.hosts]
        except ValueError:  # one that is damaged
            return False
        addresses = {mac: instance.get("ipv4") for mac, instance in registries[0].items()}
        if registries.count(registries[0]) != len(registries) or not self.acknowledged.items() <= addresses.items():
            return False
        last = list(self.acknowledged.items())[-1:]
        return all(in_force(host, *item) for host in self.site.hosts for item in last)

    def settle(self):
        """Wait until it is so. AssertionError, with which addresses the hosts differ in."""
        try:
            wait_for(self.settled, "one registry in force", 60)
        except AssertionError as error:
            registries = [host.registry() for host in self.site.hosts]
            found = {mac: [registry.get(mac, {}).get("ipv4") for registry in registries] for mac in self.entered}
            differing = {mac: each for mac, each in found.items() if each != 3 * [self.entered[mac]]}
            raise AssertionError(f"{error}: {differing}") from None

    # ---- What is done to etcds ----
    def stop_etcds(self, *hosts):
        for host in hosts or self.site.hosts:
            host.stop(host.etcd, signal.SIGKILL)

    def start_etcds(self, *hosts, **settings):
        """Start them, and wait until they answer."""
        for host in hosts or self.site.hosts:
            host.etcd_settings |= settings
            host.start_etcd()
        for host in hosts or self.site.hosts:
            self.until(host, "Count", "get", "/", "-w", "fields")

    def until(self, host, word, *command):
        """Repeat a command of etcdctl on a host until its answer has this word."""
        wait_for(lambda: word in host.etcdctl(*command, check=False), f"{word}: {command}", 60)

    def members(self, host):
        """Return the members' IDs by name, as a host's etcd has them."""
        found = json.loads(host.etcdctl("member", "list", "-w", "json"))["members"]
        return {member.get("name", ""): f"{member['ID']:x}" for member in found}

    def replace_member(self, host, at):
        """Have a host's etcd replaced by an empty one, by the page's commands."""
        if host.letter in self.members(at):  # not removed while the others have not been up for 5 s
            self.until(at, "removed", "member", "remove", self.members(at)[host.letter])
        if host.etcd in host.processes:
            self.stop_etcds(host)
        shutil.rmtree(f"{host.folder}/etcd")
        self.until(at, "added", "member", "add", host.letter, f"--peer-urls={host.peer()}")
        members = {host.letter, *self.members(at)}
        self.start_etcds(host, ETCD_INITIAL_CLUSTER=self.cluster(members), ETCD_INITIAL_CLUSTER_STATE="existing")

    def cluster(self, members="abc"):
        """Return the URLs of etcd's members as its settings have them."""
        return ",".join(f"{host.letter}={host.peer()}" for host in self.site.hosts if host.letter in members)

    def restore(self, snapshot):
        """Restore a snapshot on all hosts."""
        self.stop_etcds()
        for host in self.site.hosts:
            shutil.rmtree(f"{host.folder}/etcd")
            options = [f"--name={host.letter}", f"--data-dir={host.folder}/etcd", "--initial-cluster-token=instances"]
            options += [f"--initial-cluster={self.cluster()}", f"--initial-advertise-peer-urls={host.peer()}"]
            host.etcdctl("snapshot", "restore", str(snapshot), *options)
        self.start_etcds(ETCD_INITIAL_CLUSTER=self.cluster())

    def snapshot(self):
        """Return a snapshot of etcd as it is."""
        path = self.site.folder / f"snapshot-{time.monotonic_ns()}"
        self.site.hosts[0].etcdctl("snapshot", "save", str(path))
        return path

    # ---- What is done to hosts ----
    def save(self, host):
        """Return a backup of a host: what each of its files has."""
        paths = [Path(f"{host.base}{end}") for end in SAVED]
        return {path: path.read_bytes() for path in paths if path.exists()}

    def bring_back(self, host, saved):
        """Have a host come back from a backup of its files."""
        host.kill()
        for end in SAVED:
            Path(f"{host.base}{end}").unlink(missing_ok=True)
        for path, content in saved.items():
            path.write_bytes(content)
        Path(f"{host.base}.updated").touch()  # a boot makes all files again
        host.start_lead()


# ---- The cases: each returns when what it did is healed ----
CASES = {}


def case(promise, seconds=PROMISE, quick=False, name=""):
    """Make a function a case, of its own name or another."""

    def enter(function):
        CASES[name or function.__name__.replace("_", " ")] = (function, promise, seconds, quick)
        return function

    return enter


@case("what was written since is given back", quick=True)
def snapshot_restored(chaos):
    snapshot = chaos.snapshot()
    chaos.change(times=3)
    chaos.restore(snapshot)


@case("what was written since is given back, also by hosts that follow, where the leader does not have it")
def snapshot_restored_and_the_leader_from_a_backup(chaos):
    leader, snapshot = chaos.leader, chaos.snapshot()
    saved = chaos.save(leader)
    chaos.change(times=3)
    wait_for(chaos.settled, "the changes on all")
    leader.kill()
    chaos.restore(snapshot)
    chaos.bring_back(leader, saved)


@case("what was written since is given back")
def all_etcds_emptied(chaos):
    chaos.change()
    wait_for(chaos.settled, "the change on all")
    chaos.stop_etcds()
    for host in chaos.site.hosts:
        shutil.rmtree(f"{host.folder}/etcd")
    chaos.start_etcds(ETCD_INITIAL_CLUSTER=chaos.cluster(), ETCD_INITIAL_CLUSTER_STATE="new")


@case("its last entry, and what was entered on both sides, is there in the end", seconds=PROMISE + ELECTION)
def force_new_cluster_of_a_member_that_lags(chaos):
    a = chaos.site.others(chaos.leader)[0]
    chaos.site.move_etcd_leader(chaos.leader)
    a.cut("mgmt0")
    chaos.change()
    others = chaos.site.others(a)
    wait_for(lambda: all(host.registry() == chaos.leader.registry() for host in others), "the change on two")
    a.stop(a.etcd)  # one that is killed may have applied entries that it does not know to be committed, and so drops
    chaos.stop_etcds(*others)
    a.cut("mgmt0", "up")
    chaos.start_etcds(a, ETCD_FORCE_NEW_CLUSTER="true")
    wait_for(lambda: chaos.site.leader() is a, "its host leads alone", 60)
    chaos.change(a)
    del a.etcd_settings["ETCD_FORCE_NEW_CLUSTER"]
    for host in others:
        chaos.replace_member(host, a)


@case("another leads; what the host had not is taken", quick=True)
def leaders_host_from_a_backup(chaos):
    leader = chaos.leader
    saved = chaos.save(leader)
    chaos.change(times=2)
    chaos.bring_back(leader, saved)


@case("its etcd does not start with data of before; an empty one takes its place, and what the host had not is taken")
def leaders_host_from_a_backup_with_its_etcd(chaos):
    leader = chaos.leader
    chaos.site.move_etcd_leader(chaos.site.others(leader)[0])  # only who led meanwhile knows what it has lost
    chaos.stop_etcds(leader)
    saved = chaos.save(leader)
    shutil.copytree(f"{leader.folder}/etcd", f"{leader.folder}/etcd.saved")
    chaos.start_etcds(leader)
    chaos.change(times=2)
    chaos.stop_etcds(leader)
    leader.kill()
    shutil.rmtree(f"{leader.folder}/etcd")
    Path(f"{leader.folder}/etcd.saved").rename(f"{leader.folder}/etcd")
    leader.start_etcd()
    wait_for(lambda: leader.etcd.poll() is not None, "the end of its etcd")
    leader.processes.remove(leader.etcd)
    chaos.bring_back(leader, saved)
    chaos.replace_member(leader, chaos.site.others(leader)[0])


@case("the leader goes on; what waited is written after the alarm", quick=True)
def no_space(chaos):
    alarm(chaos)
    leader = chaos.leader
    mac = chaos.change(leader, acknowledged=False)
    wait_for(lambda: "space exceeded" in leader.said(), "the leader says so")
    assert leader.leads() and leader.registry()[mac]
    end_alarm(chaos)
    chaos.acknowledged[mac] = chaos.entered[mac]


@case("nobody leads until the page's commands end the alarm", seconds=PROMISE + ELECTION)
def no_space_and_all_programs_restarted(chaos):
    alarm(chaos)
    for host in chaos.site.hosts:
        host.kill()
        host.start_lead()
    end_alarm(chaos)


def alarm(chaos):
    """Have the alarm NOSPACE raised: one member's quota is smaller than what there is."""
    host = chaos.site.others(chaos.leader)[0]
    chaos.stop_etcds(host)
    chaos.start_etcds(host, ETCD_QUOTA_BACKEND_BYTES="16384")
    host.etcdctl("put", "/other", "x" * 20000, check=False)
    chaos.until(host, "NOSPACE", "alarm", "list")
    chaos.stop_etcds(host)
    del host.etcd_settings["ETCD_QUOTA_BACKEND_BYTES"]
    chaos.start_etcds(host)


def end_alarm(chaos):
    """Do what the page says."""
    for host in chaos.site.hosts:
        host.etcdctl("compact", str(host.etcd_status()["header"]["revision"]), check=False)
        host.etcdctl("defrag")
        host.etcdctl("alarm", "disarm")


@case("it takes all that it missed", quick=True)
def compaction_while_a_host_is_away(chaos):
    host = chaos.site.others(chaos.leader)[0]
    host.program.send_signal(signal.SIGSTOP)
    chaos.change(times=3)
    chaos.leader.etcdctl("compact", str(chaos.leader.etcd_status()["header"]["revision"]))
    host.program.send_signal(signal.SIGCONT)


@case("what was changed on it in its last moment is handed over when it is back")
def change_in_the_last_moment_of_a_leader_that_is_cut_off(chaos):
    leader = chaos.leader
    leader.cut("mgmt0")
    mac = chaos.change(leader, acknowledged=False)
    chaos.change(chaos.site.another_leads(leader))
    leader.cut("mgmt0", "up")
    chaos.acknowledged[mac] = chaos.entered[mac]


@case("another leads; what was changed on it in its last moment is handed over after its next boot")
def change_in_the_last_moment_of_a_leader_that_loses_power(chaos):
    leader = chaos.leader
    leader.etcd.send_signal(signal.SIGSTOP)
    mac = chaos.change(leader, acknowledged=False)
    leader.kill()
    chaos.stop_etcds(leader)
    removed = chaos.change(chaos.site.another_leads(leader))
    chaos.leader.update("--remove", removed)
    del chaos.acknowledged[removed]
    chaos.start_etcds(leader)
    leader.start_lead()
    chaos.acknowledged[mac] = chaos.entered[mac]


@case("another leads; its guest has network again within a minute of that, by both versions")
def lease_in_the_last_moment_of_a_leader_that_loses_power(chaos):
    leader = chaos.leader
    host, number = chaos.site.others(leader)[0], next(chaos.numbers)
    guest = host.client("late", f"10:66:6a:4e:00:{number:02x}", port=f"late{number}")
    leader.etcd.send_signal(signal.SIGSTOP)
    guest.start_dhcp4()
    guest.start_dhcp6()
    wait_for(lambda: leader.registry().get(guest.mac, {}).keys() >= {"ipv4", "ipv6_ula", "ipv6_gua"}, "its leases")
    leader.kill()
    chaos.stop_etcds(leader)
    assert guest.mac not in chaos.site.another_leads(leader).registry()
    begun = time.monotonic()
    wait_for(lambda: guest.pings("10.83.0.1") and guest.pings("fd83:5eed::1"), "its network", 70)
    assert time.monotonic() - begun < 60
    chaos.start_etcds(leader)
    leader.start_lead()
    leave(guest)


def leader_lost(chaos, what):
    leader = chaos.leader
    heal = fault(leader, what)
    chaos.change(chaos.site.another_leads(leader))
    heal()
    wait_for(leader.etcd_status, "etcd", 60)


case("another leads", PROMISE + ELECTION, name="leaders program hangs")(partial(leader_lost, what="stop program"))
case("another leads", name="leaders etcd killed")(partial(leader_lost, what="kill etcd"))
case("another leads", name="leader cut off from everything")(partial(leader_lost, what="cut off"))


def etcds_killed(chaos, number):
    killed = chaos.site.hosts[:number]
    chaos.change()
    chaos.stop_etcds(*killed)
    wait_for(lambda: not any(host.leads() for host in chaos.site.hosts), "no gateway", 30)
    chaos.start_etcds(*killed)


for name, number in (("all etcds killed", 3), ("majority lost", 2)):
    killing = partial(etcds_killed, number=number)
    case("nobody leads; what is in force stays", PROMISE + ELECTION, name=name)(killing)


@case("they are what etcd has again", quick=True)
def registries_damaged(chaos):
    leader, (one, other) = chaos.leader, chaos.site.others(chaos.leader)
    chaos.change()
    Path(f"{one.base}.json").write_text("{")
    Path(f"{other.base}.json").write_text("{}")
    Path(f"{leader.base}.json").unlink()
    one.program.send_signal(signal.SIGSTOP)  # and nothing is to be told by etcd
    one.program.send_signal(signal.SIGCONT)


@case("the gateway moves with etcd's leader at most; what is in force stays", seconds=PROMISE + ELECTION)
def etcds_restarted_one_after_the_other(chaos):
    """As in an upgrade."""
    for host in chaos.site.hosts:
        host.stop(host.etcd)
        chaos.start_etcds(host)
        chaos.change()


@case("that host says so, and takes all that it missed")
def certificate_expired_and_renewed(chaos):
    host, made = chaos.site.others(chaos.leader)[0], chaos.site.folder / "expired"
    shutil.copytree(chaos.site.folder / "ca", made)
    loop = re.search("(?ms)^for host.*?^done$", block("examples/network/README.md", "openssl req"))[0]
    past = os.environ | {"LD_PRELOAD": libfaketime(), "FAKETIME": "-3d"}
    run("sh", "-euc", loop.replace("-days 3650", "-days 1"), cwd=made, env=past)
    host.take_certificate(made)
    host.kill()
    host.start_lead()
    wait_for(lambda: "expired" in host.said(), "it says so")
    chaos.change(times=3)
    host.take_certificate(chaos.site.folder / "ca")


def libfaketime():
    """Return the path of this library. OSError if Debian's package is not installed."""
    for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1"):
        return str(path)
    raise OSError("needs libfaketime")


FAKED = """\
#!/bin/sh
export FAKETIME_TIMESTAMP_FILE={0} FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1
exec env LD_PRELOAD={1} /usr/sbin/dnsmasq "$@"
"""


@case("nobody notices, dnsmasq's leases aside, which end by its clock")
def leaders_clock_jumps_by_a_day(chaos):
    """By libfaketime, for dnsmasq: our programs and etcd go by the monotonic clock, certificates aside."""
    dnsmasq, clock = chaos.site.bin / "dnsmasq", chaos.site.folder / "clock"
    clock.write_text("+0")
    dnsmasq.write_text(FAKED.format(clock, libfaketime()))
    dnsmasq.chmod(0o755)
    former, led = chaos.leader, leads(chaos.site)
    former.stop(former.program)
    wait_for(lambda: leads(chaos.site) > led, "another leads, with such a dnsmasq")
    dnsmasq.unlink()
    former.start_lead()
    leader, led = chaos.leader, leads(chaos.site)
    registry = leader.registry()
    for days in (1, -1, 0):
        clock.with_suffix(".new").write_text(f"{days:+}d")
        clock.with_suffix(".new").rename(clock)
        chaos.change()
        renew(chaos.site.guests)
        end = int(Path(f"{leader.base}.leases").read_text().split()[0])
        assert abs(end - time.time() - 43200 - days * 86400) < 600, f"a lease that ends at {end}"
    assert leads(chaos.site) == led and registry.items() <= leader.registry().items()


def play(chaos, name):
    """Run a case; return the seconds from healing until all have the same in force, and how often who led. May fail."""
    function = CASES[name][0]
    begun, led = time.time(), leads(chaos.site)
    chaos.change()
    function(chaos)
    healed = time.monotonic()
    chaos.settle()
    took = time.monotonic() - healed
    wait_for(chaos.site.leader, "a leader", 60)
    chaos.change()
    chaos.settle()
    now = time.time()
    wait_for(lambda: all(pinger.answered(now) for pinger in chaos.pingers), f"{name}: the gateway")
    turns = len([*itertools.groupby(port for when, port in chaos.site.sniffed() if when > begun)])
    assert turns <= leads(chaos.site) - led + 1, f"{name}: two gateways: {turns} turns"
    return took, leads(chaos.site) - led


def leads(site):
    """Return how often a host began to lead."""
    return sum(host.said().count(": leads\n") for host in site.hosts)


def cost(process):
    """Return a process's seconds of processor time, with that of what it has run, and KiB of memory."""
    stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    return sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK"), int(memory)


def idle(chaos, seconds=30):
    """Print what an hour without a change costs each host."""
    chaos.settle()
    processes = {f"{host.letter} program": host.program for host in chaos.site.hosts}
    processes |= {f"{host.letter} etcd": host.etcd for host in chaos.site.hosts}
    before = {name: cost(process)[0] for name, process in processes.items()}
    time.sleep(seconds)
    for name, process in processes.items():
        used, memory = cost(process)
        print(f"{name}: {(used - before[name]) * 3600 / seconds:.0f} s an hour, {memory / 1024:.0f} MiB")


def soak(chaos, count, seconds):
    """Make a change each second; print a line of what it costs each minute."""
    idle(chaos)
    leader, led = chaos.leader, leads(chaos.site)
    fill(leader, count)
    begun = time.monotonic()
    wait_for(lambda: all(len(host.registry()) > count for host in chaos.site.hosts), "the instances on all", 120)
    print(f"{count} instances: on all hosts after {time.monotonic() - begun:.1f} s")
    follower = chaos.site.others(leader)[0]
    wait_for(lambda: not Path(f"{follower.base}.updated").exists(), "the guard of a follower", 120)
    print("minute | a change is in a follower's registry; guard: median, maximum | etcd's file, in use | memory")
    begun = time.monotonic()
    for minute in range(seconds // 60):
        lags, mac = [], None
        for second in range(60):
            time.sleep(max(0, begun + minute * 60 + second - time.monotonic()))
            if mac:
                leader.update("--remove", mac)
            mac, changed = chaos.change(leader, acknowledged=False), time.monotonic()
            if second % 10 == 5:
                wait_for(lambda mac=mac: mac in follower.registry(), "the change on a follower", 60)
                there = time.monotonic() - changed
                wait_for(lambda new=(mac, chaos.entered[mac]): in_force(follower, *new), "the change in its guard", 60)
                lags.append((there, time.monotonic() - changed))
        status, programs = leader.etcd_status(), (leader.etcd, leader.program, follower.program)
        columns = [f"{sorted(lag)[len(lag) // 2]:.2f}, {max(lag):.2f} s" for lag in zip(*lags)]
        columns += [f"{status['dbSize'] / 1e6:.1f}, {status['dbSizeInUse'] / 1e6:.1f} MB"]
        columns += [f"{cost(program)[1] / 1024:.0f} MiB" for program in programs]
        print(f"{minute + 1}:", *columns, f"load {os.getloadavg()[0]:.0f}", sep=" | ", flush=True)
    print(f"a host began to lead {leads(chaos.site) - led} times")


def main(words):
    """Run cases and print the table; return the exit status."""
    failed = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, leading(Path(folder)) as site:
        chaos = Chaos(site)
        if words[:1] == ["--soak"]:
            return soak(chaos, *map(int, words[1:]))
        print("| case | promise | one registry in force after | times that a host began to lead |")
        print("| --- | --- | --- | --- |")
        for name, (_, promise, seconds, _) in CASES.items():
            if not words or any(word in name for word in words):
                try:
                    took, times = play(chaos, name)
                    outcome = f"{took:.1f} s" if took < seconds else f"**{took:.1f} s, not {seconds}**"
                    failed += took > seconds
                except (AssertionError, OSError, ValueError) as error:
                    outcome, times, failed = f"**{str(error).splitlines()[0]}**", "", failed + 1
                print(f"| {name} | {promise} | {outcome} | {times} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
