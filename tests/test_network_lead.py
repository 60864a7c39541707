"""The example of one network on several hosts: any host can be the one that leads."""

import itertools
import os
import signal
import time
from pathlib import Path

import network_chaos
import pytest
from conftest import PROGRAMS, need
from lab import wait_for
from network_lab import Pinger, check_nothing_is_written, equal, fault, leading, leave, renew, report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def leaders(tmp_path_factory):
    """Three hosts, one of which leads, with a guest on each."""
    need(*PROGRAMS, "etcd", "etcdctl", "openssl")
    with leading(tmp_path_factory.mktemp("network")) as site:
        wait_for(lambda: equal(site), "equal registries")
        yield site


def runs(values):
    """Return a sequence without its repetitions."""
    return [value for value, _ in itertools.groupby(values)]


FAULTS = ["SIGTERM", "SIGKILL", "stop program", "stop etcd", "kill etcd", "stop both", "cut off", "cut management"]
CASES = [*((what, "the same host") for what in FAULTS), ("cut off", "another host")]  # where etcd's own leader is


@pytest.mark.parametrize("what, etcd_leader", CASES)
def test_another_host_leads_and_never_two(leaders, what, etcd_leader):
    old, number = leaders.leader(), CASES.index((what, etcd_leader))
    leaders.move_etcd_leader(old if etcd_leader == "the same host" else leaders.others(old)[0])
    others = [guest for guest in leaders.guests if guest.host is not old]
    entries = old.registry()
    gateway = [Pinger(guest, "10.83.0.1") for guest in leaders.guests]
    between = [Pinger(others[0], entries[others[1].mac][field]) for field in ("ipv4", "ipv6_ula")]
    wait_for(lambda: all(p.answered() for p in gateway + between), "answers before")
    new_guest = others[0].host.client("new", f"10:66:6a:4c:d0:{number:02x}", port=f"new{number}", wait=False)
    begun = time.time()
    heal = fault(old, what)

    def another_answers():
        return any(when > begun and ttl != old.ttl for p in gateway for when, _, ttl in p.answers())

    wait_for(another_answers, "another leads", 90)
    new = leaders.another_leads(old)
    new_guest.dhcp4(f"new-{number}")  # a lease while the other host is away
    heal()
    wait_for(lambda: equal(leaders) and new_guest.mac in old.registry(), "equal registries", 90)
    wait_for(lambda: not old.leads() and new.leads(), "one gateway")
    now = time.time()
    wait_for(lambda: all(p.answered(now) for p in gateway), "answers to all")
    renew(leaders.guests)
    answers = sorted((when, ttl) for p in gateway for when, _, ttl in p.answers())
    assert runs(ttl for _, ttl in answers) == [old.ttl, new.ttl]
    senders = runs(port for when, port in leaders.sniffed() if when > begun)
    assert senders in ([f"lan-{old.letter}", f"lan-{new.letter}"], [f"lan-{new.letter}"])
    last = max((when for when, ttl in answers if ttl == old.ttl), default=begun)
    first = min(when for when, ttl in answers if ttl == new.ttl)
    lost = [p.lost() for p in between], [p.lost() for p in gateway]
    report(
        f"{what}, etcd's leader on {etcd_leader}: another answers after {first - begun:.1f} s, {first - last:.1f} "
        f"s after the last answer; of ten pings a second lost between other hosts {lost[0]}, to the gateway {lost[1]}"
    )
    leave(new_guest)
    assert entries.items() <= old.registry().items()


def test_gateway_is_not_reached_when_its_program_hangs_even_if_no_other_can_lead(leaders):
    old = leaders.leader()
    pinger = Pinger(next(guest for guest in leaders.guests if guest.host is old), "10.83.0.1")
    wait_for(pinger.answered, "answers before")
    heal = [fault(host, "stop program") for host in leaders.others(old)]
    begun = time.time()
    heal.append(fault(old, "stop program"))
    wait_for(lambda: time.time() - max(when for when, _, _ in pinger.answers()) > 2, "no answer for 2 s")
    report(f"a program that hangs: the last answer after {max(w for w, _, _ in pinger.answers()) - begun:.1f} s")
    for each in heal:
        each()
    wait_for(lambda: leaders.leader() and pinger.answered(time.time() - 1), "a leader", 60)
    wait_for(lambda: equal(leaders), "equal registries")


def test_nothing_is_written_to_etcd_while_a_leader_leads(leaders):
    check_nothing_is_written(leaders, 7)


def test_dnsmasq_that_ends_has_another_host_lead(leaders):
    old = leaders.leader()
    children = Path(f"/proc/{old.program.pid}/task/{old.program.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    leaders.another_leads(old)
    assert old.program.wait(30) == 1
    old.processes.remove(old.program)
    old.start_lead()
    wait_for(lambda: equal(leaders), "equal registries")


def test_change_where_no_host_leads_or_another_is_refused_with_its_name(leaders):
    leader, mac = leaders.leader(), leaders.guests[0].mac
    for host in leaders.others(leader):
        wait_for(lambda host=host: host.follows() == f"{leader.letter} leads", "the leader's name")
        assert host.refusal("--remove", mac).endswith(f": {leader.letter} leads\n")
    leader.update("--rename", mac, "renamed")
    wait_for(lambda: all(h.registry()[mac]["name"] == "renamed" for h in leaders.hosts), "the name on all")


# ---- What happens to etcd once a year ----
@pytest.fixture(scope="module")
def chaos(leaders):
    """The same, with guests that ping the gateway."""
    return network_chaos.Chaos(leaders)


@pytest.mark.parametrize("case", [name for name, (*_, quick) in network_chaos.CASES.items() if quick])
def test_all_hosts_have_what_was_acknowledged_after(chaos, case):
    took, times = network_chaos.play(chaos, case)
    report(f"{case}: one registry in force after {took:.1f} s; a host began to lead {times} times")
