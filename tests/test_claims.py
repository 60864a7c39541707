"""Whose an address is that no lease tells of: a link-local one that its owner made otherwise than from its MAC address, one
that is allowed, one whose registration was lost; and what a guard that only observes does.
"""

import contextlib
import re
from pathlib import Path

import pytest
from attacks import (
    ATTACKERS,
    EVERYONE,
    HOST4,
    HOST6,
    NODES,
    SNIFFER,
    bootp,
    dhcp6,
    gives_up,
    hearing,
    link_local,
    own_duid,
    scapy,
)
from lab import wait_for

pytestmark = pytest.mark.slow
CLAIMED, HOSTS_OWN = "fe80::8099:e2ff:5d8a:10", "fe80::8099:e2ff:5d8a:1"


def advertised(attacker, target, destination=NODES):
    """Return a neighbour advertisement of a target, from the sender's own address."""
    ip = scapy.Ether(src=attacker.mac, dst=destination) / scapy.IPv6(
        src=link_local(attacker.mac), dst="ff02::1", hlim=255
    )
    return ip / scapy.ICMPv6ND_NA(tgt=target, R=0, S=0, O=1) / scapy.ICMPv6NDOptDstLLAddr(lladdr=attacker.mac)


def solicited(attacker, source, node, target):
    """Return a neighbour solicitation from a source, for an address of a node's."""
    ip = scapy.Ether(src=attacker.mac, dst=node.mac) / scapy.IPv6(src=source, dst=target, hlim=255)
    return ip / scapy.ICMPv6ND_NS(tgt=target) / scapy.ICMPv6NDOptSrcLLAddr(lladdr=attacker.mac)


def leased(bridge, attacker):
    """Return a request for addresses of the sender's own, from the victim's link-local address."""
    packet = dhcp6(bridge, attacker, scapy.DHCP6_Request, duid=own_duid(attacker), addresses=[])
    packet[scapy.IPv6].src = CLAIMED
    return packet


@contextlib.contextmanager
def claim(bridge):
    """Have the victim use a link-local address of another form, which the host learns."""

    def learnt():
        bridge.host.run("ping", "-n", "-c", "1", "-W", "0.1", f"{CLAIMED}%br0", check=False)
        return bridge.host.neighbour(CLAIMED) == bridge.victim.mac

    try:
        bridge.victim.run("ip", "address", "add", f"{CLAIMED}/64", "dev", "eth0", "nodad")
        wait_for(learnt, "the victim's address")
        yield bridge
    finally:
        bridge.victim.run("ip", "address", "flush", "dev", "eth0", "to", CLAIMED)


@pytest.fixture
def claimed(bridge):
    bridge.reset()
    with claim(bridge):
        yield bridge


FORGED = {  # what: (chain, frame)
    "advertisement": ("instances_claim_target", lambda b, a: advertised(a, CLAIMED)),
    "solicitation": ("instances_claim_source", lambda b, a: solicited(a, CLAIMED, b.host, HOST6)),
    "DHCPv6": ("instances_claim_source", leased),
}


@pytest.mark.parametrize("who", ATTACKERS)
@pytest.mark.parametrize("attack", FORGED)
def test_link_local_address_is_its_first_sender_s(claimed, attack, who):
    attacker, host, (chain, make) = getattr(claimed, who), claimed.host, FORGED[attack]
    frame = make(claimed, attacker)

    def harm():
        return host.neighbour(CLAIMED) != claimed.victim.mac or claimed.harm(attacker)

    claimed.is_dropped(chain, attacker, frame, rule="@instances_claimed counter")
    assert not harm()
    host.update("--rename", claimed.registered.mac, "other")  # and so it stays when the registry changes
    claimed.settle()
    host.update("--rename", claimed.registered.mac, "registered")
    claimed.settle()
    claimed.is_dropped(chain, attacker, frame, rule="@instances_claimed counter")
    assert not harm()
    with claimed.without(chain):
        wait_for(lambda: attacker.send(bytes(frame)) or harm(), "an effect without the claim")


@pytest.mark.parametrize("who", ATTACKERS)
def test_false_detection_of_a_duplicate_makes_nobody_give_up_a_link_local_address(claimed, who):
    attacker, victim = getattr(claimed, who), claimed.victim
    before = claimed.host.counted("instances_claim_target", "@instances_claimed counter")
    assert not gives_up(attacker, victim, CLAIMED)
    assert claimed.host.counted("instances_claim_target", "@instances_claimed counter") >= before + 3
    with claimed.without("instances_claim_target"):
        wait_for(lambda: gives_up(attacker, victim, CLAIMED), "a false claim that is believed")


HOSTS = {
    "advertisement": ("instances_claim_target", lambda b, a: advertised(a, HOSTS_OWN)),
    "solicitation": (
        "instances_claim_source",
        lambda b, a: solicited(a, HOSTS_OWN, b.victim, b.addresses6[0]),
    ),
}


@pytest.mark.parametrize("who", ATTACKERS)
@pytest.mark.parametrize("attack", HOSTS)
def test_link_local_address_of_the_host_cannot_be_claimed(bridge, attack, who):
    attacker, victim, host, (chain, make) = getattr(bridge, who), bridge.victim, bridge.host, HOSTS[attack]
    frame = make(bridge, attacker)
    bridge.reset()
    host.run("ip", "address", "delete", f"{link_local(host.mac)}/64", "dev", "br0")
    try:
        host.run("ip", "address", "add", f"{HOSTS_OWN}/64", "dev", "br0", "nodad")
        host.update("--initialize", "br0", "host")
        bridge.settle()
        assert host.registry()[host.mac]["ipv6_lla"] == HOSTS_OWN
        victim.run("ip", "neighbour", "flush", "dev", "eth0")
        wait_for(lambda: victim.pings(f"{HOSTS_OWN}%eth0"), "the host's address")
        bridge.is_dropped(chain, attacker, frame, rule="@instances_reserved counter")
        assert victim.neighbour(HOSTS_OWN) == host.mac
        with bridge.without(chain, "@instances_reserved counter"):
            wait_for(lambda: attacker.send(bytes(frame)) or victim.neighbour(HOSTS_OWN) == attacker.mac, "an effect")
    finally:
        host.run("ip", "address", "flush", "dev", "br0", "to", HOSTS_OWN)
        host.run("ip", "address", "add", f"{link_local(host.mac)}/64", "dev", "br0", "nodad")


@pytest.mark.parametrize("who", ATTACKERS)
def test_guest_that_claims_without_end_keeps_nobody_out(bridge, who):
    attacker, host = getattr(bridge, who), bridge.host
    frames = [advertised(attacker, f"fe80::8099:e2ff:1:{number:x}") for number in range(200)]

    def claims():
        return len(
            re.findall(attacker.mac, host.run("nft", "list", "set", "bridge", "instances", "instances_claims").stdout)
        )

    bridge.reset()
    with bridge.without("instances_claim_target", "@instances_claiming"):
        attacker.send(*map(bytes, frames))
        wait_for(lambda: claims() == 200, "a set that grows")
    bridge.reset()
    bridge.is_dropped("instances_claim_target", attacker, *frames[11:], rule="@instances_claiming")
    assert claims() <= 11  # 10 at once and 10 an hour
    with claim(bridge):
        pass


@pytest.fixture(scope="module")
def outside(bridge):
    """A node that is reached through the host, by another of its interfaces."""
    node = bridge.host.client("outside", "10:66:6a:4c:a1:99", port="out", bridge="")
    node.run("ip", "address", "add", "10.84.0.2/24", "dev", "eth0")
    bridge.host.run("ip", "address", "add", "10.84.0.1/24", "dev", "out")
    return node


def renewal(attacker, kind, source, destination, mac, chaddr=""):
    """Return a client's message from an address that it says to have, to one."""
    wanted = [("requested_addr", source)] if kind == "decline" else []
    frame = bootp(attacker, kind, ("server_id", HOST4), *wanted, chaddr=chaddr, ciaddr=source)
    frame.dst, frame[scapy.IP].src, frame[scapy.IP].dst = mac, source, destination
    return frame


WAYS = {  # to whom: (to which address, by whose MAC address, what drops it)
    "another guest": ("guest", "guest", "instances_drop_ip"),
    "another guest by all": ("guest", "all", "instances_drop_ip"),
    "another guest by the host": ("guest", "host", "instances_drop_ip"),
    "elsewhere": ("outside", "host", "instances_drop_ip"),
}


@pytest.mark.parametrize("name", ["own", "other"])
@pytest.mark.parametrize("way", WAYS)
def test_renewal_from_another_s_address_goes_nowhere_but_to_the_host(bridge, outside, way, name):
    attacker, host, (whom, by, chain) = bridge.unregistered, bridge.host, WAYS[way]
    target = {"guest": bridge.registered, "outside": outside}[whom]
    address = bridge.registry[target.mac]["ipv4"] if whom == "guest" else "10.84.0.2"
    mac = {"guest": target.mac, "all": EVERYONE, "host": host.mac}[by]
    chaddr = bridge.victim.mac if name == "other" else ""
    frame = renewal(attacker, "request", bridge.own["ipv4"], address, mac, chaddr)
    if name == "other" and by != "guest":
        chain = "instances_drop_dhcp"
    bridge.reset()
    with hearing(target, SNIFFER) as heard:
        bridge.is_dropped(chain, attacker, frame)
        assert attacker.mac not in bridge.host.neighbour(bridge.own["ipv4"])
        text = bytes(frame[scapy.UDP].payload).hex()[:200]
        assert text not in heard()
        host.run(
            "ip", "neighbour", "replace", address, "lladdr", target.mac, "dev", "out" if whom == "outside" else "br0"
        )
        host.run("nft", "insert rule bridge instances renewal accept; insert rule bridge instances at_forward accept")
        wait_for(lambda: attacker.send(bytes(frame)) or text in heard(), "its arrival without the rules")


@pytest.mark.parametrize("kind", ["request", "inform", "decline", "release"])
def test_message_of_one_s_own_from_another_s_address_does_the_other_no_harm(bridge, kind):
    attacker, host = bridge.unregistered, bridge.host
    bridge.reset()
    own = renewal(attacker, kind, bridge.own["ipv4"], HOST4, host.mac)
    attacker.send(bytes(own))
    wait_for(lambda: f"DHCP{kind.upper()}(br0)" in bridge.log(), "it to be heard")
    assert not bridge.harm(attacker)
    bridge.is_dropped(
        "instances_drop_dhcp", attacker, renewal(attacker, kind, bridge.own["ipv4"], HOST4, host.mac, bridge.victim.mac)
    )
    assert not bridge.harm(attacker)


def lose_registry(bridge):
    Path(f"{bridge.host.base}.json").unlink(missing_ok=True)
    Path(f"{bridge.host.base}.updated").touch()


def remove(bridge):
    bridge.host.update("--remove", bridge.victim.mac)


LOST = {"the registry is lost": lose_registry, "it was removed": remove}


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("how", LOST)
def test_running_guest_that_is_not_registered_is_so_again_when_it_renews(bridge, how, cold):
    bridge.reset()

    def cut_off():  # for good: dnsmasq has just started, and tells all leases
        LOST[how](bridge)
        bridge.settle()
        return not bridge.victim.pings(HOST4) and bridge.victim.mac not in bridge.host.registry()

    wait_for(cut_off, "a guest that is cut off")
    if cold:
        bridge.victim.run("ip", "neighbour", "flush", "dev", "eth0")
    bridge.renew()
    known = {address for field, address in bridge.own.items()}
    wait_for(lambda: known <= {*bridge.host.registry()[bridge.victim.mac].values()}, "its entry")
    bridge.victim_is_well()
