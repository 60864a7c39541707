"""Whose an address is that no lease tells of: a link-local one that its owner made otherwise than from its MAC address,
one that is allowed, one whose registration was lost. And a guard that observes, that counts on, that is upgraded.
"""

import contextlib
import re
import threading
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
    datagram,
    dhcp6,
    gives_up,
    hearing,
    link_local,
    own_duid,
    packed,
    rarp,
    scapy,
)
from lab import HOST_MAC, block, wait_for

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


FORGED = {  # what: (the chain that drops it, the reason, frame)
    "advertisement": ("instances_claim_target", "NDP target", lambda b, a: advertised(a, CLAIMED)),
    "solicitation": ("instances_claim_source", "IPv6 source", lambda b, a: solicited(a, CLAIMED, b.host, HOST6)),
    "DHCPv6": ("instances_claim_source", "IPv6 source", leased),
}


@pytest.mark.parametrize("who", ATTACKERS)
@pytest.mark.parametrize("attack", FORGED)
def test_link_local_address_is_its_first_sender_s(claimed, attack, who):
    attacker, host, (chain, reason, make) = getattr(claimed, who), claimed.host, FORGED[attack]
    frame = make(claimed, attacker)

    def harm():
        return host.neighbour(CLAIMED) != claimed.victim.mac or claimed.harm(attacker)

    claimed.is_dropped(reason, attacker, frame)
    assert not harm()
    host.update("--rename", claimed.registered.mac, "other")  # and so it stays when the registry changes
    claimed.settle()
    host.update("--rename", claimed.registered.mac, "registered")
    claimed.settle()
    claimed.is_dropped(reason, attacker, frame)
    assert not harm()
    with claimed.without(chain):
        wait_for(lambda: attacker.send(bytes(frame)) or harm(), "an effect without the claim")


def test_claims_outlive_a_load_of_the_rule_file_by_hand(claimed):
    attacker, host = claimed.registered, claimed.host
    host.run("nft", "-f", claimed.rules)
    host.run(*host.applying())
    claimed.is_dropped("NDP target", attacker, advertised(attacker, CLAIMED))
    assert host.neighbour(CLAIMED) == claimed.victim.mac


def test_address_of_a_guest_that_leaves_the_registry_is_free_for_another(claimed):
    """As for one that is rebuilt with another MAC address, and makes the same link-local address."""
    newcomer, host = claimed.unregistered, claimed.host
    frame = solicited(newcomer, CLAIMED, host, HOST6)
    claimed.is_dropped("IPv6 source", newcomer, frame)
    host.update("--rename", claimed.registered.mac, "other")
    claimed.settle()
    claimed.is_dropped("IPv6 source", newcomer, frame)
    host.update("--remove", claimed.victim.mac)
    claimed.settle()
    host.run("ip", "neighbour", "flush", "dev", "br0")
    wait_for(lambda: newcomer.send(bytes(frame)) or host.neighbour(CLAIMED) == newcomer.mac, "the newcomer's claim")


@pytest.mark.parametrize("who", ATTACKERS)
def test_false_detection_of_a_duplicate_makes_nobody_give_up_a_link_local_address(claimed, who):
    attacker, victim = getattr(claimed, who), claimed.victim
    before = claimed.host.dropped(attacker.mac, "NDP target")
    assert not gives_up(attacker, victim, CLAIMED)
    assert claimed.host.dropped(attacker.mac, "NDP target") >= before + 3
    with claimed.without("instances_claim_target"):
        wait_for(lambda: gives_up(attacker, victim, CLAIMED), "a false claim that is believed")


def test_registered_guest_may_send_all_from_a_private_link_local_address_and_a_newcomer_may_not(claimed):
    """Multicast DNS, for one."""
    victim, newcomer, own = claimed.victim, claimed.unregistered, f"{CLAIMED[:-2]}66"

    def mdns(guest, source, text):
        frame = datagram(guest, source, "ff02::fb", 5353, 5353) / text
        frame.dst = "33:33:00:00:00:fb"
        return frame

    newcomer.send(bytes(advertised(newcomer, own)))
    with hearing(claimed.registered, SNIFFER) as heard:
        claimed.is_dropped_silently(newcomer, mdns(newcomer, own, "of the newcomer"))
        frame = bytes(mdns(victim, CLAIMED, "of the guest"))
        wait_for(lambda: victim.send(frame) or b"of the guest".hex() in heard(), "multicast DNS")
        assert b"of the newcomer".hex() not in heard()


@pytest.fixture
def uplinked(bridge):
    """The bridge with an uplink, behind which a router is in use; yields the bridge and the router."""
    host, text = bridge.host, bridge.text
    if "up0" not in {client.port for client in host.clients}:
        router = host.client("router", "10:66:6a:4c:a1:01", port="up0")
        router.run("ip", "address", "add", "fe80::1/64", "dev", "eth0", "nodad")
    router = next(client for client in host.clients if client.port == "up0")
    bridge.text = text.replace('define uplink = "none"', 'define uplink = "up0"')
    try:
        bridge.reset()
        wait_for(lambda: router.pings(f"{link_local(host.mac)}%eth0"), "the host, for the router")
        yield bridge, router
    finally:
        bridge.text = text


@pytest.mark.parametrize("who", ATTACKERS)
def test_link_local_address_of_a_router_behind_an_uplink_cannot_be_claimed(uplinked, who):
    bridge, router = uplinked
    attacker, victim = getattr(bridge, who), bridge.victim
    wait_for(lambda: victim.pings("fe80::1%eth0") and victim.neighbour("fe80::1") == router.mac, "the router")
    frames = {
        "NDP target": advertised(attacker, "fe80::1"),
        "IPv6 source": solicited(attacker, "fe80::1", victim, HOST6),
    }
    frames["IPv6 source"][scapy.ICMPv6ND_NS].tgt = frames["IPv6 source"][scapy.IPv6].dst = link_local(victim.mac)
    for reason, frame in frames.items():
        bridge.is_dropped(reason, attacker, frame)
        assert victim.neighbour("fe80::1") == router.mac
    for chain in ("claim_target", "claim_source"):
        bridge.host.take_out(f"instances_{chain}", "@instances_elsewhere_used")
    for frame in frames.values():
        victim.run("ip", "neighbour", "flush", "dev", "eth0")
        wait_for(lambda: victim.pings("fe80::1%eth0"), "the router")
        wait_for(
            lambda f=bytes(frame): attacker.send(f) or victim.neighbour("fe80::1") == attacker.mac,
            "an effect without the rules",
        )


@pytest.mark.parametrize("who", ATTACKERS)
def test_new_address_behind_an_uplink_is_not_lost_to_a_guest_that_answers_for_it(uplinked, who):
    """By duplicate address detection, its owner tells of it before it is in use."""
    bridge, router = uplinked
    attacker = getattr(bridge, who)
    router.run("ip", "address", "add", "fe80::2/64", "dev", "eth0")
    try:
        answer = scapy.Ether(src=attacker.mac, dst=NODES) / scapy.IPv6(
            src=link_local(attacker.mac), dst="ff02::1", hlim=255
        )
        answer /= scapy.ICMPv6ND_NA(tgt="fe80::2", R=0, S=0, O=1) / scapy.ICMPv6NDOptDstLLAddr(lladdr=attacker.mac)

        def learned():
            return (
                "00000002 . "
                in bridge.host.run("nft", "list", "set", "bridge", "instances", "instances_elsewhere").stdout
            )

        wait_for(learned, "its solicitation")
        bridge.is_dropped("NDP target", attacker, answer)
    finally:
        router.run("ip", "address", "delete", "fe80::2/64", "dev", "eth0")


def test_machine_that_moves_from_behind_an_uplink_to_a_port_of_its_own_goes_on(uplinked):
    """Its link-local address was in use there, with the same MAC address."""
    bridge, router = uplinked
    guest = bridge.unregistered
    frame = solicited(router, "fe80::1", bridge.host, link_local(bridge.host.mac))
    bridge.host.run("ip", "neighbour", "flush", "dev", "br0")
    wait_for(lambda: guest.send(bytes(frame)) or bridge.host.neighbour("fe80::1") == router.mac, "its solicitation")
    assert not bridge.host.dropped(router.mac)


SLAAC, PRIVATE, OTHER_PREFIX = "2001:67c:83::/64", "2001:67c:83:0:a1b2:c3d4:e5f6:10", "2001:67c:84::10"


@pytest.fixture
def slaac(bridge):
    """The bridge with a prefix for SLAAC, and the victim's two addresses in it, of which one is made from its MAC."""
    bridge.reset()
    bridge.host.write_settings(INSTANCES_SLAAC=SLAAC)
    Path(f"{bridge.host.base}.updated").touch()
    bridge.settle()
    own = (PRIVATE, link_local(bridge.victim.mac).replace("fe80::", "2001:67c:83:0:"))
    bridge.host.run("ip", "-6", "route", "replace", SLAAC, "dev", "br0")
    for address in own:
        bridge.victim.run("ip", "address", "add", f"{address}/64", "dev", "eth0", "nodad")
    yield bridge, own
    for address in own:
        bridge.victim.run("ip", "address", "delete", f"{address}/64", "dev", "eth0")
    bridge.host.run("ip", "-6", "route", "delete", SLAAC, "dev", "br0")
    bridge.host.write_settings()


@pytest.mark.parametrize("who", ATTACKERS)
def test_address_that_a_guest_has_made_by_slaac_is_its_own(slaac, who):
    bridge, own = slaac
    attacker, host = getattr(bridge, who), bridge.host

    def reached(address):
        answers = host.run("ping", "-n", "-c", "1", "-W", "1", address, check=False).returncode == 0
        return answers and host.neighbour(address) == bridge.victim.mac

    for address in own:
        wait_for(lambda a=address: reached(a), f"the guest at {address}")
        bridge.is_dropped("NDP target", attacker, advertised(attacker, address))
        bridge.is_dropped("IPv6 source", attacker, datagram(attacker, address, HOST6))
        assert reached(address)
    # Of what is registered, and of another prefix, nobody makes addresses
    bridge.is_dropped("NDP target", attacker, advertised(attacker, HOST6))
    bridge.is_dropped("IPv6 source", attacker, datagram(attacker, bridge.addresses6[0], HOST6))
    bridge.is_dropped("not registered", attacker, datagram(attacker, OTHER_PREFIX, HOST6))
    assert not host.dropped(bridge.victim.mac)
    with bridge.without("instances_claim_target", "@instances_claimed goto"):
        poisoned = "an effect without the rule"
        wait_for(
            lambda: attacker.send(bytes(advertised(attacker, PRIVATE))) or host.neighbour(PRIVATE) == attacker.mac,
            poisoned,
        )


HOSTS = {
    "advertisement": ("instances_claim_target", "NDP target", lambda b, a: advertised(a, HOSTS_OWN)),
    "solicitation": (
        "instances_claim_source",
        "IPv6 source",
        lambda b, a: solicited(a, HOSTS_OWN, b.victim, b.addresses6[0]),
    ),
}


@pytest.mark.parametrize("who", ATTACKERS)
@pytest.mark.parametrize("attack", HOSTS)
def test_link_local_address_of_the_host_cannot_be_claimed(bridge, attack, who):
    attacker, victim, host, (chain, reason, make) = getattr(bridge, who), bridge.victim, bridge.host, HOSTS[attack]
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
        bridge.is_dropped(reason, attacker, frame)
        assert victim.neighbour(HOSTS_OWN) == host.mac
        with bridge.without(chain, "@instances_taken6"), bridge.without(chain, "@instances_elsewhere_used"):
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
    bridge.is_dropped("too many claims", attacker, *frames, some=149)
    assert claims() <= 51  # 50 at once and 10 an hour
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


WAYS = {  # to whom: (to which address, by whose MAC address)
    "another guest": ("guest", "guest"),
    "another guest by all": ("guest", "all"),
    "another guest by the host": ("guest", "host"),
    "elsewhere": ("outside", "host"),
}


@pytest.mark.parametrize("name", ["own", "other"])
@pytest.mark.parametrize("way", WAYS)
def test_renewal_from_another_s_address_goes_nowhere_but_to_the_host(bridge, outside, way, name):
    attacker, host, (whom, by) = bridge.unregistered, bridge.host, WAYS[way]
    target = {"guest": bridge.registered, "outside": outside}[whom]
    address = bridge.registry[target.mac]["ipv4"] if whom == "guest" else "10.84.0.2"
    mac = {"guest": target.mac, "all": EVERYONE, "host": host.mac}[by]
    chaddr = bridge.victim.mac if name == "other" else ""
    frame = renewal(attacker, "request", bridge.own["ipv4"], address, mac, chaddr)
    bridge.reset()
    with hearing(target, SNIFFER) as heard:
        if way == "another guest" and name == "own":  # as a client asks its server
            bridge.is_dropped_silently(attacker, frame)
        else:
            bridge.is_dropped("DHCP message" if name == "other" else "IPv4 source", attacker, frame)
        assert attacker.mac not in bridge.host.neighbour(bridge.own["ipv4"])
        text = bytes(frame[scapy.UDP].payload).hex()[:200]
        assert text not in heard()
        host.run(
            "ip", "neighbour", "replace", address, "lladdr", target.mac, "dev", "out" if whom == "outside" else "br0"
        )
        host.run("nft", "insert rule bridge instances instances_guard accept; flush chain bridge instances at_forward")
        wait_for(lambda: attacker.send(bytes(frame)) or text in heard(), "its arrival without the rules")


@pytest.mark.parametrize("kind", ["request", "inform", "decline", "release"])
def test_message_of_one_s_own_from_another_s_address_does_the_other_no_harm(bridge, kind):
    attacker, host = bridge.unregistered, bridge.host
    bridge.reset()
    message = (attacker, kind, bridge.own["ipv4"], HOST4, host.mac)
    attacker.send(bytes(renewal(*message)))
    wait_for(lambda: f"DHCP{kind.upper()}(br0)" in bridge.log(), "it to be heard")
    assert not bridge.harm(attacker)
    bridge.is_dropped("DHCP message", attacker, renewal(*message, chaddr=bridge.victim.mac))
    assert not bridge.harm(attacker)


@pytest.mark.parametrize("who", ATTACKERS)
def test_request_for_the_host_s_mac_address_from_another_s_address_is_not_believed(bridge, who):
    attacker, stolen = getattr(bridge, who), bridge.own["ipv4"]
    request = scapy.ARP(op=1, hwsrc=attacker.mac, psrc=stolen, pdst=HOST4)
    frame = bytes(scapy.Ether(src=attacker.mac, dst=HOST_MAC) / request)
    bridge.reset(guard=False)
    wait_for(
        lambda: attacker.send(frame) or bridge.host.neighbour(stolen) == attacker.mac, "an effect without the guard"
    )
    bridge.reset()
    attacker.send(*3 * [frame])
    bridge.victim_is_well()
    assert bridge.host.neighbour(stolen) == bridge.victim.mac


def lose_registry(bridge):
    Path(f"{bridge.host.base}.json").unlink(missing_ok=True)
    Path(f"{bridge.host.base}.updated").touch()


def remove(bridge):
    bridge.host.update("--remove", bridge.victim.mac)


def renew_guard(bridge):
    bridge.host.run("nft", "delete", "table", "bridge", "instances")
    lose_registry(bridge)


LOST = {"registry lost": lose_registry, "removed": remove, "guard new here": renew_guard}


@pytest.mark.parametrize("how", LOST)
def test_running_guest_that_is_not_registered_is_so_again_when_it_renews(bridge, how):
    bridge.reset()

    def cut_off():  # for good: dnsmasq has just started, and tells all leases
        LOST[how](bridge)
        bridge.settle()
        return not bridge.victim.pings(HOST4) and bridge.victim.mac not in bridge.host.registry()

    wait_for(cut_off, "a guest that is cut off")
    # With the host's MAC address forgotten, as after some time without an answer: what it sends to all gets through.
    bridge.victim.run("ip", "neighbour", "flush", "dev", "eth0")
    bridge.renew()
    wait_for(
        lambda: {*bridge.own.values()} <= {*bridge.host.registry().get(bridge.victim.mac, {}).values()}, "its entry"
    )
    bridge.victim_is_well()


SHARED, SHARED6, ROUTED, ROUTED6 = "10.83.0.50", "2001:67c:83::50", "10.99.0.7", "2001:67c:99::7"


@pytest.fixture
def allowed(bridge):
    """Two guests share an address of each version, and the first of them routes a network of each."""
    bridge.reset()
    host = bridge.host
    host.update("--allow", bridge.victim.mac, SHARED, SHARED6, "10.99.0.0/24", "2001:67c:99::/64")
    host.update("--allow", bridge.registered.mac, SHARED, SHARED6)
    host.run("ip", "-6", "route", "replace", "2001:67c:99::/64", "dev", "br0")
    host.run("ip", "route", "replace", "10.99.0.0/24", "dev", "br0")
    bridge.settle()
    return bridge


# From which address: (to which, the chain, the reason, whose it is)
SOURCES = {
    SHARED: (HOST4, "instances_drop_ip", "IPv4 source", ["victim", "registered"]),
    SHARED6: (HOST6, "instances_drop_ip6", "IPv6 source", ["victim", "registered"]),
    ROUTED: (HOST4, "instances_drop_ip", "not registered", ["victim"]),
    ROUTED6: (HOST6, "instances_drop_ip6", "not registered", ["victim"]),
}


@pytest.mark.parametrize("source", SOURCES)
def test_allowed_address_is_a_source_for_those_who_are_allowed_only(allowed, source):
    destination, chain, reason, owners = SOURCES[source]
    others = [who for who in ATTACKERS if who not in owners]

    def sent(who, text):
        guest = getattr(allowed, who)
        return scapy.Ether(bytes(datagram(guest, source, destination) / text))

    with hearing(allowed.host) as heard:
        for who in owners:
            getattr(allowed, who).send(bytes(sent(who, f"of the {who}")))
            wait_for(lambda w=who: f"of the {w}" in heard(), f"a datagram of the {who}")
        for who in others:
            allowed.is_dropped(reason, getattr(allowed, who), sent(who, "forged"))
            assert "forged" not in heard()
        with allowed.without(chain):
            for who in others:
                getattr(allowed, who).send(bytes(sent(who, f"forged by {who}")))
                wait_for(lambda w=who: f"forged by {w}" in heard(), f"a datagram of {who} without the chain")


def announced(sender, address, host):
    """Return an ARP reply, or a neighbour advertisement, that says that the sender has an address."""
    if ":" in address:
        return advertised(sender, address)
    return scapy.Ether(src=sender.mac, dst=host.mac) / scapy.ARP(op=2, hwsrc=sender.mac, psrc=address, pdst=HOST4)


# Of which address: (the chain, the reason, who may say that he has it)
ANNOUNCED = {
    SHARED: ("instances_drop_arp", "ARP address", ["victim", "registered"]),
    SHARED6: ("instances_drop_ndp", "NDP target", ["victim", "registered"]),
    ROUTED: ("instances_drop_arp", "not registered", []),
    ROUTED6: ("instances_drop_ndp", "not registered", []),
}


@pytest.mark.parametrize("address", ANNOUNCED)
def test_allowed_address_is_announced_by_those_who_are_allowed_only_and_a_network_s_by_nobody(allowed, address):
    host, (chain, reason, owners) = allowed.host, ANNOUNCED[address]

    def believed(guest):
        host.run("ping", "-n", "-c", "1", "-W", "0.1", address, check=False)  # a host asks before it believes
        guest.send(bytes(announced(guest, address, host)))
        return host.neighbour(address) == guest.mac

    others = [who for who in ("victim", *ATTACKERS) if who not in owners]
    for who in owners:
        wait_for(lambda w=who: believed(getattr(allowed, w)), f"the host to believe the {who}")
    for who in others:
        host.run("ip", "neighbour", "flush", "to", address)
        allowed.is_dropped(reason, getattr(allowed, who), announced(getattr(allowed, who), address, host))
        assert not believed(getattr(allowed, who))
    with allowed.without(chain):
        for who in others:
            wait_for(lambda w=who: believed(getattr(allowed, w)), f"the host to believe {who} without the chain")


def test_guard_that_observes_lets_pass_what_it_counts_by_sender_and_reason(bridge):
    attacker, host, victim = bridge.registered, bridge.host, bridge.victim
    own = bridge.registry[attacker.mac]
    forged = {  # the reason: the frame
        "IPv4 source": datagram(attacker, bridge.own["ipv4"], bridge.own["ipv4"]),
        "IPv6 source": datagram(attacker, bridge.addresses6[0], bridge.addresses6[0]),
        "ARP address": scapy.Ether() / scapy.ARP(hwsrc=attacker.mac, psrc=HOST4, pdst=bridge.own["ipv4"]),
        "NDP target": advertised(attacker, HOST6),
        "DHCP server": datagram(attacker, own["ipv4"], bridge.own["ipv4"], 67, 68),
        "other protocol": rarp(attacker),
    }
    for reason, frame in forged.items():
        frame.src, frame.dst = attacker.mac, victim.mac
        forged[reason] = scapy.Ether(bytes(frame))
    request = bootp(attacker, "discover")
    bridge.reset()
    try:
        with hearing(victim, SNIFFER) as heard:
            for mode in ("observe", "enforce"):
                host.write_settings(INSTANCES_GUARD=mode)
                Path(f"{host.base}.updated").touch()
                bridge.settle()
                host.run("nft", "flush set bridge instances instances_asked")
                begin, told = len(heard()), len(bridge.log())
                for reason, frame in forged.items():
                    bridge.is_dropped(reason, attacker, frame)
                    text = bytes(frame).hex()
                    if mode == "observe":
                        wait_for(lambda t=text, b=begin: t in heard()[b:], f"what is counted as {reason}")
                    assert (text in heard()[begin:]) == (mode == "observe"), reason
                bridge.is_dropped("DHCP too often", attacker, *[request] * 30, some=20)

                def asked(told=told):
                    return bridge.log()[told:].count(f"DHCPDISCOVER(br0) {attacker.mac}")

                if mode == "observe":
                    wait_for(lambda a=asked: a() == 30, "all of them")
                else:
                    bridge.renew()
                    assert asked() <= 10
                assert (bytes(request).hex() in heard()[begin:]) == (mode == "observe")
    finally:
        host.write_settings()


def test_guest_that_sends_to_addresses_of_nobody_does_not_fill_the_host_s_table_of_neighbours(bridge):
    attacker, host = bridge.registered, bridge.host
    source, nobody = (
        bridge.registry[attacker.mac]["ipv6_gua"],
        [f"2001:67c:83::f00:{number:x}" for number in range(300)],
    )
    frames = [datagram(attacker, source, address) for address in [*nobody, bridge.addresses6[0]]]
    for frame in frames:
        frame.dst = host.mac

    def asked():
        """Return for how many the host asks, after all has come, the last for the victim."""
        host.run("ip", "neighbour", "flush", "dev", "br0")
        with hearing(bridge.victim) as heard:
            attacker.send(*[bytes(frame / "all") for frame in frames])
            wait_for(lambda: "all" in heard(), "the last one")
        return host.run("ip", "-6", "neighbour", "show", "dev", "br0").stdout.count("2001:67c:83::f00:")

    bridge.reset()
    assert asked() == 300
    host.write_settings(INSTANCES_ADDRESS_SETS="host,web")
    Path(f"{host.base}.updated").touch()
    bridge.settle()
    host.run("nft", "-f", host.example("nftables/firewall.nft"))
    try:
        assert asked() == 0
    finally:
        host.run("nft", "delete", "table", "inet", "instances")
        host.write_settings()


def test_senders_of_what_was_dropped_are_still_named_when_the_registry_has_changed(bridge):
    attacker, host = bridge.unregistered, bridge.host
    bridge.reset()
    bridge.is_dropped("IPv4 source", attacker, *[datagram(attacker, HOST4, bridge.own["ipv4"])] * 3)
    before = host.dropped(attacker.mac, "IPv4 source")
    host.update("--rename", bridge.registered.mac, "other")
    bridge.settle()
    assert host.dropped(attacker.mac, "IPv4 source") == before >= 3


def test_upgrade_from_the_former_guard_lets_nothing_through(bridge):
    """By hand, with nft, as the page says; then again, without the lines that delete the table."""
    attacker, host = bridge.registered, bridge.host
    frames = [datagram(attacker, bridge.own["ipv4"], HOST4), datagram(attacker, bridge.addresses6[0], HOST6)]
    bridge.reset(guard=False)
    elements = [f"instances_ip {{ {bridge.own['ipv4']} . {bridge.victim.mac} }}"]
    elements += [f"instances_ip6 {{ 0x{packed(a).hex()} . {bridge.victim.mac} }}" for a in bridge.addresses6]
    old = (Path(__file__).parent / "former-guard.nft").read_text()
    host.run("nft", "-f", "-", input=old + "".join(f"add element bridge instances {e}\n" for e in elements))
    bridge.rules.write_text(bridge.text)
    upgrade = block("examples/nftables/README.md", "delete table").replace("/etc/instances", str(bridge.rules.parent))
    with hearing(host) as heard:
        attacker.send(*[bytes(frame / "forged") for frame in frames])
        wait_for(lambda: host.counted("guard") >= 2, "drops by the former guard")
        over, sent = threading.Event(), [0]

        def flood():
            while not over.is_set():
                attacker.send(*[bytes(frame / "forged") for frame in frames])
                sent[0] += 1

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for command in (("sh", "-ec", upgrade), ("nft", "-f", bridge.rules)):
                before = sent[0]
                wait_for(lambda b=before: sent[0] > b + 10, "frames")
                host.run(*command)
            before = sent[0]
            wait_for(lambda b=before: sent[0] > b + 10, "frames")
        finally:
            over.set()
            thread.join()
        assert heard().count("forged") == 0
        assert "at_input" not in host.run("nft", "list", "ruleset").stdout
        bridge.victim_is_well()
        host.run("nft", "flush chain bridge instances at_prerouting")
        wait_for(
            lambda: attacker.send(bytes(frames[0] / "forged")) or "forged" in heard(), "an effect without the guard"
        )
