"""Whose an address is that no lease tells of: a link-local one that its owner made otherwise than from its MAC address,
one that is allowed, one whose registration was lost. And a guard that observes, that counts on, that is upgraded.
"""

import contextlib
from pathlib import Path

import pytest
from attacks import (
    HOST4,
    HOST6,
    SNIFFER,
    advertised,
    arp,
    bootp,
    datagram,
    dhcp6,
    flooding,
    gives_up,
    hearing,
    link_local,
    own_duid,
    packed,
    rarp,
    scapy,
    send_until,
    solicited,
)
from lab import HOST_MAC, block, environment, wait_for

pytestmark = pytest.mark.slow
CLAIMED, HOSTS_OWN = "fe80::8099:e2ff:5d8a:10", "fe80::8099:e2ff:5d8a:1"


@contextlib.contextmanager
def claim(bridge):
    """Have the victim use a link-local address of another form, which the host learns."""
    try:
        bridge.victim.run("ip", "address", "add", f"{CLAIMED}/64", "dev", "eth0", "nodad")
        wait_for(lambda: bridge.host.finds(f"{CLAIMED}%br0", bridge.victim.mac), "the victim's address")
        yield bridge
    finally:
        bridge.victim.run("ip", "address", "flush", "dev", "eth0", "to", CLAIMED)


@pytest.fixture
def claimed(bridge):
    bridge.reset()
    with claim(bridge):
        yield bridge


def test_link_local_address_is_its_first_sender_s(claimed, attacker):
    """Also when the registry has changed, after which those who were dropped before are still named."""
    host, victim = claimed.host, claimed.victim
    request = dhcp6(claimed, attacker, scapy.DHCP6_Request, duid=own_duid(attacker), addresses=[], source=CLAIMED)
    forged = [  # (the chain that drops it, the reason, frame)
        ("instances_claim_target", "NDP target", advertised(attacker, CLAIMED)),
        ("instances_claim_source", "IPv6 source", solicited(attacker, CLAIMED, HOST_MAC, HOST6)),
        ("instances_claim_source", "IPv6 source", request),
    ]

    def harm():
        return host.neighbour(CLAIMED) != victim.mac or claimed.harm(attacker)

    for name in ("other", "registered"):
        for _, reason, frame in forged:
            claimed.is_dropped(reason, attacker, frame)
        assert host.neighbour(CLAIMED) == victim.mac
        before = host.drops(attacker.mac)
        claimed.change("--rename", claimed.registered.mac, name)
        assert host.drops(attacker.mac) == before
    assert not gives_up(attacker, victim, CLAIMED)
    assert host.dropped(attacker.mac, "NDP target") >= before[attacker.mac, "NDP target"] + 3
    assert not harm()
    with claimed.without("instances_claim_target"):
        wait_for(lambda: gives_up(attacker, victim, CLAIMED), "a false claim that is believed")
    victim.ip(f"address flush dev eth0 to {CLAIMED}", f"address add {CLAIMED}/64 dev eth0 nodad")
    for chain, _, frame in forged:  # the last makes a lease, and has the service load the guard again
        host.run("ip", "neighbour", "flush", "dev", "br0")
        wait_for(lambda: host.finds(f"{CLAIMED}%br0", victim.mac), "the victim's address again")
        with claimed.without(chain):
            send_until(harm, attacker, frame)


def test_claims_outlive_a_load_of_the_rule_file_by_hand_but_not_the_guest_s_entry_in_the_registry(claimed):
    """Another may be the same guest, rebuilt with another MAC address, that makes the same link-local address."""
    newcomer, host, victim = claimed.unregistered, claimed.host, claimed.victim
    frame = solicited(newcomer, CLAIMED, HOST_MAC, HOST6)
    host.run("nft", "-f", claimed.rules)
    host.run(*host.applying())
    claimed.is_dropped("NDP target", newcomer, advertised(newcomer, CLAIMED))
    claimed.is_dropped("IPv6 source", newcomer, frame)
    assert host.finds(f"{CLAIMED}%br0", victim.mac)
    assert victim.pings(f"{link_local(HOST_MAC)}%eth0") and not host.dropped(victim.mac)
    claimed.change("--remove", victim.mac)
    host.run("ip", "neighbour", "flush", "dev", "br0")
    send_until(lambda: host.neighbour(CLAIMED) == newcomer.mac, newcomer, frame)


@pytest.fixture(scope="module")
def router(bridge):
    """A router at the port up0."""
    router = bridge.host.client("router", "10:66:6a:4c:a1:01", port="up0")
    router.run("ip", "address", "add", "fe80::1/64", "dev", "eth0", "nodad")
    return router


@pytest.fixture
def uplinked(bridge, router):
    """The bridge with an uplink, behind which the router is in use."""
    text = bridge.text
    bridge.text = text.replace('define uplink = "none"', 'define uplink = "up0"')
    bridge.reset()
    bridge.text = text
    router.wait_pings(f"{link_local(HOST_MAC)}%eth0")
    return bridge


def test_link_local_address_of_a_router_behind_an_uplink_cannot_be_claimed(uplinked, router, attacker):
    """Nor can a new one before it is in use: its owner tells of it by duplicate address detection."""
    victim, host = uplinked.victim, uplinked.host
    victim.wait_pings("fe80::1%eth0")
    frames = {
        "NDP target": advertised(attacker, "fe80::1"),
        "IPv6 source": solicited(attacker, "fe80::1", victim.mac, link_local(victim.mac)),
    }
    for reason, frame in frames.items():
        uplinked.is_dropped(reason, attacker, frame)
        assert victim.neighbour("fe80::1") == router.mac
    new = f"fe80::2{attacker.mac[-1]}"
    router.run("ip", "address", "add", f"{new}/64", "dev", "eth0")
    listing = ("nft", "list", "set", "bridge", "instances", "instances_elsewhere")
    wait_for(lambda: f"000000{new[-2:]} . " in host.run(*listing).stdout, "its solicitation")
    uplinked.is_dropped("NDP target", attacker, advertised(attacker, new))
    for chain in ("claim_target", "claim_source"):
        host.take_out(f"instances_{chain}", "@instances_elsewhere_used")
    for frame in frames.values():
        victim.run("ip", "neighbour", "flush", "dev", "eth0")
        victim.wait_pings("fe80::1%eth0")
        send_until(lambda: victim.neighbour("fe80::1") == attacker.mac, attacker, frame)


def test_machine_that_moves_from_behind_an_uplink_to_a_port_of_its_own_goes_on(uplinked, router):
    """Its link-local address was in use there, with the same MAC address."""
    host = uplinked.host
    frame = solicited(router, "fe80::1", HOST_MAC, link_local(HOST_MAC))
    host.run("ip", "neighbour", "flush", "dev", "br0")
    send_until(lambda: host.neighbour("fe80::1") == router.mac, uplinked.unregistered, frame)
    assert not host.dropped(router.mac)


def test_address_that_a_guest_has_made_by_slaac_is_its_own(bridge, attacker):
    """Of what is registered, and of another prefix, nobody makes addresses."""
    host, victim, private = bridge.host, bridge.victim, "2001:67c:83:0:a1b2:c3d4:e5f6:10"
    bridge.reset()
    bridge.configure(INSTANCES_SLAAC="2001:67c:83::/64")
    host.run("ip", "-6", "route", "replace", "2001:67c:83::/64", "dev", "br0")
    for address in (private, link_local(victim.mac).replace("fe80::", "2001:67c:83:0:")):
        # Deprecated, so that the victim prefers its leased address, also in later tests
        victim.run("ip", "address", "replace", f"{address}/64", "dev", "eth0", "nodad", "preferred_lft", "0")
        wait_for(lambda a=address: host.finds(a, victim.mac), f"the guest at {address}")
        bridge.is_dropped("NDP target", attacker, advertised(attacker, address))
        bridge.is_dropped("IPv6 source", attacker, datagram(attacker, address, HOST6))
        assert host.finds(address, victim.mac)
    bridge.is_dropped("NDP target", attacker, advertised(attacker, HOST6))
    bridge.is_dropped("IPv6 source", attacker, datagram(attacker, bridge.addresses6[0], HOST6))
    bridge.is_dropped("not registered", attacker, datagram(attacker, "2001:67c:84::10", HOST6))
    assert not host.dropped(victim.mac)
    with bridge.without("instances_claim_target", "@instances_claimed goto"):
        send_until(lambda: host.neighbour(private) == attacker.mac, attacker, advertised(attacker, private))


def test_link_local_address_of_the_host_cannot_be_claimed(bridge, attacker):
    victim, host = bridge.victim, bridge.host
    attacks = [
        ("instances_claim_target", "NDP target", advertised(attacker, HOSTS_OWN)),
        ("instances_claim_source", "IPv6 source", solicited(attacker, HOSTS_OWN, victim.mac, bridge.addresses6[0])),
    ]
    bridge.reset()
    host.run("ip", "address", "delete", f"{link_local(host.mac)}/64", "dev", "br0")
    try:
        host.run("ip", "address", "add", f"{HOSTS_OWN}/64", "dev", "br0", "nodad")
        bridge.change("--initialize", "br0", "host")
        assert host.registry()[host.mac]["ipv6_lla"] == HOSTS_OWN
        for chain, reason, frame in attacks:
            victim.run("ip", "neighbour", "flush", "dev", "eth0")
            victim.wait_pings(f"{HOSTS_OWN}%eth0")
            bridge.is_dropped(reason, attacker, frame)
            assert victim.neighbour(HOSTS_OWN) == host.mac
            with bridge.without(chain, "@instances_taken6", "@instances_elsewhere_used"):
                send_until(lambda: victim.neighbour(HOSTS_OWN) == attacker.mac, attacker, frame)
    finally:
        host.run("ip", "address", "flush", "dev", "br0", "to", HOSTS_OWN)
        host.run("ip", "address", "add", f"{link_local(host.mac)}/64", "dev", "br0", "nodad")


def test_guest_that_claims_without_end_keeps_nobody_out(bridge, attacker):
    frames = [advertised(attacker, f"fe80::8099:e2ff:1:{number:x}") for number in range(200)]

    def claims():
        return bridge.host.run("nft", "list", "set", "bridge", "instances", "instances_claims").stdout.count(
            attacker.mac
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


@pytest.mark.parametrize("kind", ["request", "inform", "decline", "release"])
def test_message_of_one_s_own_from_another_s_address_does_the_other_no_harm(bridge, kind):
    attacker, source = bridge.unregistered, bridge.own["ipv4"]
    options = [("server_id", HOST4)] + ([("requested_addr", source)] if kind == "decline" else [])

    def message(chaddr=""):
        frame = bootp(attacker, kind, *options, chaddr=chaddr, ciaddr=source)
        frame.dst, frame[scapy.IP].src, frame[scapy.IP].dst = HOST_MAC, source, HOST4
        return frame

    bridge.reset()
    attacker.send(bytes(message()))
    wait_for(lambda: f"DHCP{kind.upper()}(br0)" in bridge.log(), "it to be heard")
    bridge.renew()  # by then, what comes of it has come
    assert not bridge.harm(attacker)
    bridge.is_dropped("DHCP message", attacker, message(bridge.victim.mac))
    assert not bridge.harm(attacker)


LOST = {  # how: commands, for the files' base and the guest's MAC address
    "registry lost": 'rm -f "$0.json"',
    "removed": 'instances-update.py --remove "$1"',
    "guard new here": 'rm -f "$0.json"; nft delete table bridge instances || :',
}


@pytest.mark.parametrize("how", LOST)
def test_running_guest_that_is_not_registered_is_so_again_when_it_renews(bridge, how):
    host, victim = bridge.host, bridge.victim
    bridge.reset()

    def cut_off():  # for good: dnsmasq has just started, and tells all leases
        commands = f'{LOST[how]}; touch "$0.updated"'
        host.run("sh", "-c", commands, host.base, victim.mac, env=environment(host.base))
        bridge.settle()
        return not victim.pings(HOST4) and victim.mac not in host.registry()

    def entered(*addresses):
        return {*addresses} <= {*host.registry().get(victim.mac, {}).values()}

    wait_for(cut_off, "a guest that is cut off")
    # After some time without an answer, a client asks all, from its address (RFC 2131, section 4.4.5)
    own, rebinding = bridge.own["ipv4"], bootp(victim, "request", ciaddr=bridge.own["ipv4"])
    rebinding[scapy.IP].src = own
    victim.send(bytes(rebinding))  # once: more than ten in a minute would keep the client itself from renewing
    wait_for(lambda: entered(own), "its IPv4 address")
    bridge.renew()
    wait_for(lambda: entered(*bridge.own.values()), "its entry")
    bridge.victim_is_well()


SHARED, SHARED6, ROUTED, ROUTED6 = "10.83.0.50", "2001:67c:83::50", "10.99.0.7", "2001:67c:99::7"


# Of an address as a source, and then as it is announced: the reason of a drop, the chain, and how many guests may do so
ALLOWED = {
    SHARED: ("IPv4 source", "instances_drop_ip", 2, "ARP address", "instances_drop_arp", 2),
    SHARED6: ("IPv6 source", "instances_drop_ip6", 2, "NDP target", "instances_drop_ndp", 2),
    ROUTED: ("not registered", "instances_drop_ip", 1, "not registered", "instances_drop_arp", 0),
    ROUTED6: ("not registered", "instances_drop_ip6", 1, "not registered", "instances_drop_ndp", 0),
}


@pytest.mark.parametrize("address", ALLOWED)
def test_allowed_address_is_used_and_announced_by_those_who_are_allowed_only(bridge, address):
    """Two guests share an address of each version, and the first of them routes a network of each, which not even that
    guest announces."""
    host, guests = bridge.host, (bridge.victim, bridge.registered, bridge.unregistered)
    source_reason, source_chain, using, reason, chain, announcing = ALLOWED[address]
    bridge.reset()
    host.update("--allow", bridge.victim.mac, SHARED, SHARED6, "10.99.0.0/24", "2001:67c:99::/64")
    host.update("--allow", bridge.registered.mac, SHARED, SHARED6)
    host.run("ip", "-6", "route", "replace", "2001:67c:99::/64", "dev", "br0")
    host.run("ip", "route", "replace", "10.99.0.0/24", "dev", "br0")
    bridge.settle()

    def sent(guest, text):
        return guest, datagram(guest, address, HOST6 if ":" in address else HOST4) / f"{text} {guest.label}"

    def announced(guest):
        return advertised(guest, address) if ":" in address else arp(guest, address, HOST4, 2, HOST_MAC)

    def believed(guest):
        host.run("ping", "-n", "-c", "1", "-W", "0.1", address, check=False)  # a host asks before it believes
        guest.send(bytes(announced(guest)))
        return host.neighbour(address) == guest.mac

    with hearing(host) as heard:
        for guest in guests[:using]:
            send_until(lambda g=guest: f"of {g.label}" in heard(), *sent(guest, "of"))
        for guest in guests[using:]:
            bridge.is_dropped(source_reason, *sent(guest, "forged by"))
        assert "forged" not in heard()
        with bridge.without(source_chain):
            for guest in guests[using:]:
                send_until(lambda g=guest: f"forged by {g.label}" in heard(), *sent(guest, "forged by"))
    for guest in guests[:announcing]:
        wait_for(lambda g=guest: believed(g), f"the host to believe {guest.label}")
    for guest in guests[announcing:]:
        host.run("ip", "neighbour", "flush", "to", address)
        bridge.is_dropped(reason, guest, announced(guest))
        assert not believed(guest)
    with bridge.without(chain):
        for guest in guests[announcing:]:
            wait_for(lambda g=guest: believed(g), f"the host to believe {guest.label} without the chain")


def test_guard_that_observes_lets_pass_what_it_counts_by_sender_and_reason(bridge):
    attacker, victim = bridge.registered, bridge.victim
    forged = {  # the reason: the frame
        "IPv4 source": datagram(attacker, bridge.own["ipv4"], bridge.own["ipv4"]),
        "IPv6 source": datagram(attacker, bridge.addresses6[0], bridge.addresses6[0]),
        "ARP address": arp(attacker, HOST4, bridge.own["ipv4"]),
        "NDP target": advertised(attacker, HOST6),
        "DHCP server": datagram(attacker, bridge.registry[attacker.mac]["ipv4"], bridge.own["ipv4"], 67, 68),
        "other protocol": rarp(attacker),
    }
    request = bootp(attacker, "discover")
    bridge.reset()
    with hearing(victim, SNIFFER) as heard:
        for mode in ("observe", "enforce"):
            bridge.configure(INSTANCES_GUARD=mode)
            bridge.host.run("nft", "flush set bridge instances instances_asked")
            begin, told = len(heard()), len(bridge.log())
            for reason, frame in forged.items():
                frame.dst = victim.mac
                text = bytes(frame).hex()
                bridge.is_dropped(reason, attacker, frame)
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


def test_guest_that_sends_to_addresses_of_nobody_does_not_fill_the_host_s_table_of_neighbours(bridge):
    attacker, host = bridge.registered, bridge.host
    nobody = [f"2001:67c:83::f00:{number:x}" for number in range(300)]
    source = bridge.registry[attacker.mac]["ipv6_gua"]
    frames = [datagram(attacker, source, address) / "all" for address in [*nobody, bridge.addresses6[0]]]
    for frame in frames:
        frame.dst = HOST_MAC

    def asked():
        """Return for how many the host asks, after all has come, the last for the victim."""
        host.run("ip", "neighbour", "flush", "dev", "br0")
        with hearing(bridge.victim) as heard:
            attacker.send(*map(bytes, frames))
            wait_for(lambda: "all" in heard(), "the last one")
        return host.run("ip", "-6", "neighbour", "show", "dev", "br0").stdout.count("2001:67c:83::f00:")

    bridge.reset()
    host.set("net/ipv6/neigh/br0/mcast_solicit", "100")  # one a second; then the kernel forgets whom it asked for
    assert asked() == 300
    bridge.configure(INSTANCES_ADDRESS_SETS="host,web")
    host.run("nft", "-f", host.example("nftables/firewall.nft"))
    try:
        assert asked() == 0
    finally:
        host.run("nft", "delete", "table", "inet", "instances")
        host.set("net/ipv6/neigh/br0/mcast_solicit", "3")


def test_upgrade_from_the_former_guard_lets_nothing_through(bridge):
    """By hand, with nft, as the page says; then again, without the lines that delete the table."""
    attacker, host = bridge.registered, bridge.host
    stolen = ((bridge.own["ipv4"], HOST4), (bridge.addresses6[0], HOST6))
    frames = [bytes(datagram(attacker, source, destination) / "forged") for source, destination in stolen]
    bridge.reset(guard=False)
    elements = [f"instances_ip {{ {bridge.own['ipv4']} . {bridge.victim.mac} }}"]
    elements += [f"instances_ip6 {{ 0x{packed(a).hex()} . {bridge.victim.mac} }}" for a in bridge.addresses6]
    old = (Path(__file__).parent / "former-guard.nft").read_text()
    host.run("nft", "-f", "-", input=old + "".join(f"add element bridge instances {e}\n" for e in elements))
    bridge.rules.write_text(bridge.text)
    upgrade = block("examples/nftables/README.md", "delete table").replace("/etc/instances", str(bridge.rules.parent))
    with hearing(host) as heard:
        attacker.send(*frames)
        wait_for(lambda: host.counted("guard") >= 2, "drops by the former guard")
        with flooding(attacker, frames) as sent:
            for command in (("sh", "-ec", upgrade), ("nft", "-f", bridge.rules), ("true",)):
                before = sent()
                wait_for(lambda b=before: sent() > b + 10, "frames")
                host.run(*command)
        assert heard().count("forged") == 0
        assert "at_input" not in host.run("nft", "list", "ruleset").stdout
        bridge.victim_is_well()
        host.run("nft", "flush chain bridge instances at_prerouting")
        send_until(lambda: "forged" in heard(), attacker, datagram(attacker, *stolen[0]) / "forged")
