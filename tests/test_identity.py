"""Attacks on who a guest is: nobody joins as somebody else, and nobody loses an address to another.

Attackers whose own kernel is silent send what no kernel would, one with leases of its own and one that is not
registered: first without what stops it, where its effect is seen, and then with it, where it has none.
"""

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from attacks import (
    ATTACKERS,
    EVERYONE,
    HOST4,
    HOST6,
    HOST_MAC,
    SERVERS,
    SNIFFER,
    bootp,
    datagram,
    dhcp6,
    hearing,
    link_local,
    octets,
    own_duid,
    rarp,
    scapy,
    solicitation,
    take,
)
from lab import UPDATE, wait_for

pytestmark = pytest.mark.slow


def relayed(bridge, attacker):
    """Return what a relay agent sends for a client that has the host's MAC address, as it says (RFC 6939)."""
    inner = bytes(
        dhcp6(
            bridge, attacker, scapy.DHCP6_Solicit, scapy.DHCP6OptRapidCommit(), duid=b"\0\3\0\1relayed", addresses=[]
        )[scapy.DHCP6_Solicit]
    )
    ip = scapy.Ether(src=attacker.mac, dst=SERVERS) / scapy.IPv6(src=link_local(attacker.mac), dst="ff02::1:2")
    packet = (
        ip
        / scapy.UDP(sport=546, dport=547)
        / scapy.DHCP6_RelayForward(linkaddr=HOST6, peeraddr=link_local(bridge.host.mac))
    )
    return packet / scapy.Raw(
        b"\0\x4f\0\x08\0\1" + octets(bridge.host.mac) + b"\0\x09" + len(inner).to_bytes(2, "big") + inner
    )


def request_from_a_shared_address(bridge, attacker):
    """Return a DHCPv6 request from an address by which the host's neighbour cache may have another's MAC address."""
    frame = dhcp6(bridge, attacker, scapy.DHCP6_Request, duid=own_duid(attacker), addresses=[])
    frame[scapy.IPv6].src = bridge.addresses6[0]
    return frame


NONCE = b"\x0e\1nonce!"
DROPPED = {  # for what they say
    "chaddr of the victim": lambda b, a: take(a, "10.83.0.150", chaddr=b.victim.mac),
    "chaddr of the host": lambda b, a: take(a, "10.83.0.151", chaddr=HOST_MAC),
    "chaddr of nobody": lambda b, a: take(a, "10.83.0.152", chaddr="10:66:6a:4c:a1:99"),
    "hardware length 16": lambda b, a: take(a, "10.83.0.153", chaddr=a.mac + ":00" * 10, hlen=16),
    "option overload": lambda b, a: take(a, "10.83.0.154", chaddr=b.victim.mac, file=b"\x0c\4evil\xff"),
    "Release": lambda b, a: bootp(a, "release", ("server_id", HOST4), chaddr=b.victim.mac, ciaddr=b.own["ipv4"]),
    "Decline": lambda b, a: bootp(
        a, "decline", ("server_id", HOST4), ("requested_addr", b.own["ipv4"]), chaddr=b.victim.mac
    ),
    "Request from a shared address": request_from_a_shared_address,
    "Release, IPv6": lambda b, a: dhcp6(b, a, scapy.DHCP6_Release),
    "Decline, IPv6": lambda b, a: dhcp6(b, a, scapy.DHCP6_Decline),
    "Relay-forward": lambda b, a: relayed(b, a),
}


@pytest.mark.parametrize("who", ATTACKERS)
def test_messages_in_the_name_of_another_are_dropped(bridge, who):
    attacker = getattr(bridge, who)
    frames = {attack: make(bridge, attacker) for attack, make in DROPPED.items()}
    for attack, frame in frames.items():
        bridge.reset(guard=False)
        wait_for(lambda f=bytes(frame): attacker.send(f) or bridge.harm(attacker), f"an effect of {attack}")
    bridge.reset()
    for frame in frames.values():
        bridge.is_dropped("DHCP message", attacker, frame)
    assert not bridge.harm(attacker)
    bridge.victim_is_well()


def test_made_up_hardware_addresses_make_no_instance(bridge):
    attacker = bridge.unregistered
    frames = [take(attacker, f"10.83.0.1{n}", chaddr=f"10:66:6a:4c:c0:{n}") for n in range(20, 60)]
    bridge.reset(guard=False)
    attacker.send(*map(bytes, frames))
    wait_for(lambda: len(bridge.host.registry()) >= len(bridge.registry) + 40, "forty more instances without the guard")
    bridge.reset()
    bridge.is_dropped("DHCP message", attacker, *frames)
    assert not bridge.harm(attacker)


@pytest.mark.parametrize("who", ATTACKERS)
def test_link_layer_option_with_the_address_of_another_is_not_believed(bridge, who):
    """In a router or neighbour solicitation or an advertisement (133, 135, 136), also behind a nonce option."""
    attacker, host = getattr(bridge, who), bridge.host
    rows = [(k, m, n) for k in (133, 135, 136) for m in (bridge.victim.mac, HOST_MAC) for n in (b"", NONCE)]
    honest = bytes(solicitation(attacker, 133))
    own = link_local(attacker.mac)
    bridge.reset(guard=False)
    for row in rows:
        host.run("ip", "neighbour", "flush", "dev", "br0")
        frame = bytes(solicitation(attacker, *row))
        wait_for(lambda f=frame, m=row[1]: attacker.send(honest, f) or host.neighbour(own) == m, "an effect")
    bridge.reset()
    for row in rows:
        host.run("ip", "neighbour", "flush", "dev", "br0")
        bridge.is_dropped("NDP option", attacker, solicitation(attacker, *row))
        assert not bridge.harm(attacker)
        wait_for(lambda: attacker.send(honest) or host.neighbour(own) == attacker.mac, "its own address to be believed")
    bridge.victim_is_well()


FORGED = {  # what the registry itself does not believe, as dnsmasq does
    "Solicit with rapid commit": lambda b, a: dhcp6(b, a, scapy.DHCP6_Solicit, scapy.DHCP6OptRapidCommit()),
    "Request": lambda b, a: dhcp6(b, a, scapy.DHCP6_Request),
    "Renew": lambda b, a: dhcp6(b, a, scapy.DHCP6_Renew),
    "Rebind": lambda b, a: dhcp6(b, a, scapy.DHCP6_Rebind),
    "Rebind with a DUID of its own": lambda b, a: dhcp6(b, a, scapy.DHCP6_Rebind, duid=own_duid(a)),
    "Rebind of the host's address": lambda b, a: dhcp6(
        b, a, scapy.DHCP6_Rebind, duid=own_duid(a), addresses=[HOST6, "fd83:5eed::1"]
    ),
}


def credulous(script):
    """Write a copy of our script that believes all that dnsmasq tells it."""
    text, count = re.subn('elif (keepers|kind == "reminder") and .*:', "elif False:", UPDATE.read_text())
    assert count == 2
    script.write_text(text)
    script.chmod(0o755)


@pytest.mark.parametrize("who", ATTACKERS)
@pytest.mark.parametrize("attack", FORGED)
def test_lease_of_an_address_of_another_is_not_registered(bridge, attack, who):
    attacker, script = getattr(bridge, who), bridge.host.folder / "credulous.py"
    credulous(script)
    frames = solicitation(attacker, 133), FORGED[attack](bridge, attacker)
    for believed in (script, UPDATE):
        bridge.reset("Rebind" not in attack, script=believed)  # by itself: the guard drops Rebind
        attacker.send(bytes(frames[0]))
        wait_for(lambda: bridge.host.neighbour(link_local(attacker.mac)) == attacker.mac, "its MAC address")
        attacker.send(bytes(frames[1]))
        if believed == script:
            wait_for(lambda: "stolen" in str(bridge.harm(attacker)), "an address that is stolen")
    wait_for(lambda: bridge.log().count("has it") == 2, "both addresses told")
    assert not bridge.harm(attacker)
    bridge.victim_is_well()


def test_lease_of_a_further_address_of_the_host_or_of_what_another_is_allowed_is_not_registered(bridge):
    attacker, host, script = bridge.unregistered, bridge.host, bridge.host.folder / "credulous.py"
    registered, new, allowed = ([f"2001:67c:83::5{n}", f"fd83:5eed::5{n}"] for n in (3, 4, 5))
    wanted = {*registered, *new, *allowed}
    credulous(script)

    def given():
        return wanted & {*host.registry().get(attacker.mac, {}).values()}

    try:
        for believed in (script, UPDATE):
            bridge.reset(False, script=believed)
            for address in registered + new:
                host.run("ip", "address", "replace", f"{address}/80", "dev", "br0", "nodad", "preferred_lft", "0")
                if address == registered[-1]:
                    host.update("--initialize", "br0", "host")
            host.update("--allow", "victim", *allowed)
            bridge.settle()
            attacker.send(bytes(solicitation(attacker, 133)))
            wait_for(lambda: host.neighbour(link_local(attacker.mac)) == attacker.mac, "its MAC address")
            rebind = dhcp6(bridge, attacker, scapy.DHCP6_Rebind, duid=own_duid(attacker), addresses=[*wanted])
            attacker.send(bytes(rebind))
            if believed == script:
                wait_for(lambda: len(given()) == 2, "addresses of both kinds")
        wait_for(lambda: bridge.log().count("has it") == len(wanted), "all of them told")
        assert bridge.log().count("this host has it") == 4 and not given()
        bridge.victim_is_well()
    finally:
        for address in registered + new:
            host.run("ip", "address", "del", f"{address}/80", "dev", "br0", check=False)


@pytest.mark.parametrize("who", ATTACKERS)
def test_rebind_gives_no_address_that_nobody_has_registered(bridge, who):
    """A router's behind an uplink, say, or one that a guest has made itself: dnsmasq grants any of the prefix."""
    attacker, address = getattr(bridge, who), "2001:67c:83::fe"
    frame = dhcp6(bridge, attacker, scapy.DHCP6_Rebind, duid=own_duid(attacker), addresses=[address])

    def given():
        return address in bridge.host.registry().get(attacker.mac, {}).values()

    bridge.reset(guard=False)
    attacker.send(bytes(solicitation(attacker, 133)))
    wait_for(lambda: bridge.host.neighbour(link_local(attacker.mac)) == attacker.mac, "its MAC address")
    wait_for(lambda: attacker.send(bytes(frame)) or given(), "the address without the guard")
    bridge.reset()
    bridge.is_dropped("DHCP message", attacker, frame)
    assert not given()


def test_name_that_programs_look_for_is_given_to_nobody_in_any_spelling(bridge):
    names = [b"wpad", b"WPAD.x", b"isatap.instance.internal", b"localhost.localdomain", b"other.x"]
    bridge.reset()
    for number, name in enumerate(names):
        guest = SimpleNamespace(mac=f"10:66:6a:4c:e1:0{number}")
        options = ("server_id", HOST4), ("requested_addr", f"10.83.0.16{number}"), ("hostname", name)
        bridge.unregistered.send(bytes(bootp(guest, "request", *options)))

    def named():
        return [i["name"] for m, i in sorted(bridge.host.registry().items()) if m.startswith("10:66:6a:4c:e1:")]

    wait_for(lambda: len(named()) == len(names), "their leases")
    assert named() == ["", "", "", "", "other"]


def test_address_whose_lease_was_ended_by_another_is_not_registered(bridge):
    """Whoever repeats a DUID can have its lease end in two minutes: that is not waited for, but written."""
    attacker = bridge.unregistered
    ended = "".join(line for line in bridge.was.splitlines(True) if f" {bridge.iaid} " not in line)
    bridge.reset(leases=ended)
    attacker.send(bytes(solicitation(attacker, 133)))
    wait_for(lambda: bridge.host.neighbour(link_local(attacker.mac)) == attacker.mac, "its MAC address")
    attacker.send(bytes(dhcp6(bridge, attacker, scapy.DHCP6_Request, duid=own_duid(attacker))))
    wait_for(lambda: bridge.log().count("has it") == 2, "both addresses told")
    assert not bridge.harm(attacker)


@pytest.mark.parametrize("who", ATTACKERS)
def test_client_identifier_of_another_gets_nothing(bridge, who):
    attacker = getattr(bridge, who)
    identifier = ("client_id", b"\1" + octets(bridge.victim.mac))
    frame = bytes(bootp(attacker, "request", ("requested_addr", bridge.own["ipv4"]), identifier))
    honest = bytes(bootp(bridge.victim, "request", ("requested_addr", bridge.own["ipv4"]), identifier))
    for option in ("dhcp-ignore-clid", ""):
        bridge.reset(option=option)
        bridge.victim.send(honest)
        wait_for(lambda: f"DHCPACK(br0) {bridge.own['ipv4']} {bridge.victim.mac}" in bridge.log(), "the victim's lease")
        attacker.send(frame)
        what = "NAK" if option == "" else "ACK"
        wait_for(lambda w=what: f"DHCP{w}(br0) {bridge.own['ipv4']} {attacker.mac}" in bridge.log(), f"a DHCP{what}")
    assert not bridge.harm(attacker)
    bridge.victim_is_well()


@pytest.fixture
def sniffer(bridge):
    """A function that returns all frames that came to the victim, a line each."""
    with hearing(bridge.victim, SNIFFER) as heard:
        yield heard


def headless(bridge, attacker):
    """Return a first fragment that ends before its upper layer's header."""
    ip = scapy.Ether(src=attacker.mac, dst=EVERYONE) / scapy.IPv6(
        src=bridge.registry[attacker.mac]["ipv6_gua"], dst=bridge.addresses6[0]
    )
    return ip / scapy.IPv6ExtHdrFragment(nh=60, offset=0, m=1) / scapy.IPv6ExtHdrDestOpt(nh=17)


TWIN = "12:66:6a:4c:a1:10"  # differs from the victim's MAC address in the bit that a link-local address has flipped
BOTH, LEASED, NEW = ATTACKERS, ["registered"], ["unregistered"]
STRAY = {  # what: (from whom, the reason of its drop, "" if it is not counted, frame)
    "UDP from 0.0.0.0": (BOTH, "", lambda b, a: datagram(a, "0.0.0.0", b.own["ipv4"])),
    "UDP from 0.0.0.0 to all": (BOTH, "", lambda b, a: datagram(a, "0.0.0.0", "255.255.255.255")),
    "UDP from ::": (BOTH, "not registered", lambda b, a: datagram(a, "::", b.addresses6[0])),
    "UDP to ff02::1:2, another port": (NEW, "", lambda b, a: datagram(a, link_local(a.mac), "ff02::1:2", 546, 548)),
    "UDP to ff02::1:2, from another port": (
        NEW,
        "",
        lambda b, a: datagram(a, link_local(a.mac), "ff02::1:2", 548, 549),
    ),
    "UDP to a guest": (NEW, "not registered", lambda b, a: datagram(a, link_local(a.mac), b.own["ipv6_lla"])),
    "first fragment without a header": (LEASED, "malformed", headless),
    "link-local address of a twin": (
        BOTH,
        "IPv6 source",
        lambda b, a: datagram(a, b.own["ipv6_lla"], b.addresses6[0], mac=TWIN),
    ),
    "advertisement of a twin": (
        BOTH,
        "NDP target",
        lambda b, a: (
            scapy.Ether(src=TWIN, dst=EVERYONE)
            / scapy.IPv6(src=link_local(TWIN), dst=b.addresses6[0], hlim=255)
            / scapy.ICMPv6ND_NA(tgt=b.own["ipv6_lla"])
            / scapy.ICMPv6NDOptDstLLAddr(lladdr=TWIN)
        ),
    ),
    "answer of a DHCP server": (
        LEASED,
        "DHCP server",
        lambda b, a: datagram(a, b.registry[a.mac]["ipv4"], b.own["ipv4"], 6767, 68),
    ),
    "answer of a DHCPv6 server": (
        BOTH,
        "DHCP server",
        lambda b, a: datagram(a, link_local(a.mac), b.own["ipv6_lla"], 6547, 546),
    ),
    "DHCP for another guest to hear": (BOTH, "", lambda b, a: bootp(a, "discover")),
    "DHCPv6 for another guest to hear": (BOTH, "", lambda b, a: dhcp6(b, a, scapy.DHCP6_Solicit)),
    "VLAN tag": (
        BOTH,
        "other protocol",
        lambda b, a: (
            scapy.Ether(src=a.mac, dst=EVERYONE) / scapy.Dot1Q(vlan=7) / datagram(a, "::", b.addresses6[0]).payload
        ),
    ),
    "forged source behind a tag of priority": (
        BOTH,
        "IPv4 source",
        lambda b, a: (
            scapy.Ether(src=a.mac, dst=EVERYONE)
            / scapy.Dot1Q(vlan=0, prio=5)
            / datagram(a, b.own["ipv4"], b.own["ipv4"]).payload
        ),
    ),
    "router advertisement behind a tag of priority": (
        BOTH,
        "other protocol",
        lambda b, a: (
            scapy.Ether(src=a.mac, dst=EVERYONE)
            / scapy.Dot1Q(vlan=0, prio=5)
            / scapy.IPv6(src=link_local(a.mac), dst="ff02::1", hlim=255)
            / scapy.ICMPv6ND_RA()
        ),
    ),
    "802.3 frame": (
        BOTH,
        "other protocol",
        lambda b, a: (
            scapy.Dot3(src=a.mac, dst=EVERYONE)
            / scapy.LLC(dsap=0xAA, ssap=0xAA, ctrl=3)
            / scapy.SNAP(code=0x800)
            / datagram(a, "10.83.0.66", b.own["ipv4"]).payload
        ),
    ),
    "RARP": (BOTH, "other protocol", lambda b, a: rarp(a)),
    "ARP with addresses of other lengths": (
        BOTH,
        "ARP address",
        lambda b, a: (
            scapy.Ether(src=a.mac, dst=EVERYONE, type=0x806)
            / scapy.Raw(b"\0\1\x08\0\x08\4\0\2" + octets(b.victim.mac) + bytes(18))
        ),
    ),
}


@pytest.mark.parametrize("who", ATTACKERS)
def test_stray_frame_does_not_arrive(bridge, sniffer, who):
    attacker = getattr(bridge, who)
    rows = {what: (reason, make(bridge, attacker)) for what, (senders, reason, make) in STRAY.items() if who in senders}
    for guard in (False, True):
        bridge.reset(guard)
        begin = len(sniffer())
        for what, (reason, frame) in rows.items():
            if "to hear" not in what:
                frame.dst = bridge.victim.mac
            text = bytes(frame)[18:].hex()  # without its Ethernet header and VLAN tag

            def heard(text=text, begin=begin):
                return text in sniffer()[begin:]

            if not guard:
                wait_for(lambda f=bytes(frame), h=heard: attacker.send(f) or h(), f"{what} to arrive")
            elif reason:
                bridge.is_dropped(reason, attacker, frame)
            else:
                bridge.is_dropped_silently(attacker, frame)
            assert heard() != guard, what
    bridge.victim_is_well()


def test_datagram_behind_a_tag_of_priority_arrives(bridge):
    """As Windows sends it, with the tag that its receiver takes off."""
    attacker, victim = bridge.registered, bridge.victim
    bridge.reset()
    with hearing(victim) as heard:
        for kind in ("ipv4", "ipv6_gua"):
            plain = datagram(attacker, bridge.registry[attacker.mac][kind], bridge.own[kind]) / f"by {kind}"
            frame = scapy.Ether(src=attacker.mac, dst=victim.mac) / scapy.Dot1Q(vlan=0, prio=5) / plain.payload
            wait_for(lambda f=bytes(frame), k=kind: attacker.send(f) or f"by {k}" in heard(), f"a datagram of {kind}")


@pytest.mark.parametrize("who", ATTACKERS)
def test_relay_agents_address_is_answered_by_nothing(bridge, who):
    attacker = getattr(bridge, who)
    frame = bootp(attacker, "discover", giaddr=bridge.own["ipv4"])
    bridge.reset(guard=False)
    wait_for(lambda: attacker.send(bytes(frame)) or "DHCPOFFER" in bridge.log(), "an offer to the victim")
    bridge.reset()
    bridge.is_dropped("DHCP message", attacker, frame)
    assert "DHCPOFFER" not in bridge.log()


def test_listing_of_what_has_been_in_use_loads_again_and_lists_the_same(bridge):
    bridge.reset()
    bridge.victim_is_well()
    for attacker in (bridge.registered, bridge.unregistered):
        attacker.send(bytes(solicitation(attacker, 133)), bytes(datagram(attacker, "::", bridge.addresses6[0])))
        bridge.is_dropped("DHCP message", attacker, take(attacker, "10.83.0.150", chaddr=HOST_MAC))
    # One that has had no address before: with an address that is no longer a guest's, what is leased is forgotten
    bridge.unregistered.send(bytes(take(bridge.unregistered, "10.83.0.150")))

    def listing():
        listed = bridge.host.run("nft", "list", "ruleset").stdout
        names = ("same_mac", "same_eui64", "dropped", "asked", "leased")
        return all(re.search(f"set instances_{name} {{[^}}]*elements = ", listed) for name in names) and listed

    saved = wait_for(listing, "elements in each of these sets")
    bridge.unregistered.run("nft", "-f", "-", input=saved)
    try:
        loaded = re.sub(r"expires \w+", "expires", bridge.unregistered.run("nft", "list", "ruleset").stdout)
        assert loaded == re.sub(r"expires \w+", "expires", saved)
    finally:
        bridge.unregistered.run("nft", "flush", "ruleset")


def test_what_is_dropped_is_not_let_through_when_the_set_of_senders_is_full(bridge):
    attacker, host = bridge.unregistered, bridge.host
    frame = take(attacker, "10.83.0.150", chaddr=HOST_MAC)
    bridge.reset()
    bridge.is_dropped("DHCP message", attacker, *[frame] * 3)
    others = ", ".join(f'02:00:00:00:{n >> 8:02x}:{n & 255:02x} . "malformed"' for n in range(65536))
    host.run("nft", "flush set bridge instances instances_dropped")
    host.run("nft", "-f", "-", input=f"add element bridge instances instances_dropped {{ {others} }}")
    attacker.send(*[bytes(frame)] * 3)
    bridge.victim_is_well()
    assert not host.dropped(attacker.mac) and not bridge.harm(attacker)


@pytest.mark.parametrize("who", ATTACKERS)
def test_guest_that_calls_itself_like_another_does_not_answer_for_the_name(bridge, who):
    attacker, host = getattr(bridge, who), bridge.host
    name, request = b"victim", ("requested_addr", "10.83.0.160")
    frames = [bytes(bootp(attacker, "request", ("server_id", HOST4), request, ("hostname", name)))]
    fqdn = scapy.DHCP6OptClientFQDN(fqdn=name.decode() + ".", flags="S")
    frames += [bytes(solicitation(attacker, 133))]
    frames += [bytes(dhcp6(bridge, attacker, scapy.DHCP6_Request, fqdn, duid=own_duid(attacker), addresses=[]))]
    names = {"victim": (), "victim.instance.internal": (bridge.own["ipv4"], *bridge.addresses6)}

    def answers(name):
        return {*bridge.victim.resolve(name, "A"), *bridge.victim.resolve(name, "AAAA")}

    for option in ("dhcp-fqdn", ""):
        bridge.reset(option=option)
        # As a client does, it asks again, since dnsmasq may not have found its MAC address in time
        told = f"instances-update.py: {attacker.mac}"
        wait_for(lambda t=told: attacker.send(*frames) or bridge.heard(t, 2), "its leases")
        if option:
            wait_for(lambda: "10.83.0.160" in answers("victim"), "the attacker's address for the plain name")
    assert "10.83.0.160" in answers("victim.lease.instance.internal")
    for name, expected in names.items():
        assert answers(name) == set(expected), name
    assert not bridge.harm(attacker)
    assert host.registry()[attacker.mac]["name"] == bridge.registry.get(attacker.mac, {"name": ""})["name"]


def test_messages_that_ask_for_many_leases_do_not_use_them_up(bridge):
    """A message of DHCPv6 may have as many identity associations as there is room for: seven take all 1,000 leases."""
    attacker, host = bridge.registered, bridge.host
    requests = []
    for number in range(7):
        packet = dhcp6(bridge, attacker, scapy.DHCP6_Solicit, scapy.DHCP6OptRapidCommit(), duid=own_duid(attacker))
        packet /= scapy.Raw(b"".join(b"\0\3\0\x0c\0\0" + bytes([number, n]) + bytes(8) for n in range(80)))
        requests.append(packet)

    def leases():
        return bridge.leases.read_text().count(own_duid(attacker).hex(":"))

    bridge.reset(script=Path("/bin/true"))  # of as many leases, the registry's script would have to be run for a minute
    attacker.send(bytes(solicitation(attacker, 133)))
    bridge.is_dropped("DHCP too often", attacker, *requests, some=6)
    wait_for(leases, "those of the first message")
    bridge.victim_is_well()
    assert leases() < 200
    host.take_out("instances_ask", "@instances_asked6")
    attacker.send(*map(bytes, requests))
    wait_for(lambda: leases() > 400, "leases without the rule")


HOSTILE = [b"a b", b"x\n10.83.0.1 host", b"-", b"$(id)", b'a"b', b"\xff\xfe", b"a" * 64, b"*", b"host", b"Victim"]


def test_hostile_host_name_is_left_out(bridge):
    bridge.reset()
    for number, name in enumerate(HOSTILE):
        guest = SimpleNamespace(mac=f"10:66:6a:4c:e0:0{number}")
        options = ("server_id", HOST4), ("requested_addr", f"10.83.0.16{number}"), ("hostname", name)
        bridge.unregistered.send(bytes(bootp(guest, "request", *options)))

    def named():
        return {m: i["name"] for m, i in bridge.host.registry().items() if m.startswith("10:66:6a:4c:e0:")}

    wait_for(lambda: len(named()) == len(HOSTILE), "their leases")
    assert set(named().values()) == {""}
    wait_for(lambda: bridge.victim.resolve("host.v4.instance.internal", "A") == [HOST4], "the host's own name")


@pytest.mark.parametrize("who", ATTACKERS)
def test_flood_of_requests_keeps_nobody_out_and_is_counted_on_when_the_guard_is_loaded_again(bridge, who):
    attacker, host = getattr(bridge, who), bridge.host
    if who == "registered":
        frame, said = bootp(attacker, "discover"), f"DHCPDISCOVER(br0) {attacker.mac}"
    else:  # dnsmasq waits half a second for its neighbour advertisement, each time, in vain
        duid = own_duid(attacker)
        frame, said = (
            dhcp6(bridge, attacker, scapy.DHCP6_Solicit, duid=duid, addresses=[]),
            "DHCPSOLICIT(br0) " + duid.hex(":"),
        )
    frames = [bytes(frame)] * 100

    def joins(number):
        """Return how many seconds a new guest takes to its leases of both versions."""
        guest = host.client(f"new{number}{who[0]}", f"10:66:6a:4c:d{ATTACKERS.index(who)}:0{number}")
        begin = time.monotonic()
        guest.start_dhcp4()
        guest.start_dhcp6()
        wait_for(lambda: "bound 10" in guest.events() and guest.events().count("BOUND6") == 2, "its leases", 60)
        return time.monotonic() - begin

    bridge.reset()
    over = threading.Event()

    def flood():
        while not over.is_set():
            attacker.send(*frames)
            time.sleep(0.05)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        wait_for(lambda: host.dropped(attacker.mac, "DHCP too often") > 1000, "drops by the limit")
        flooded, asked = joins(1), bridge.log().count(said)
        host.update("--rename", bridge.victim.mac, "other")
        bridge.settle()
        before = host.dropped(attacker.mac, "DHCP too often")
        again = joins(2)
        wait_for(lambda: host.dropped(attacker.mac, "DHCP too often") > before + 1000, "later drops")
    finally:
        over.set()
        thread.join()
    print(f"leases after {flooded:.1f} s in a flood, {again:.1f} s after the guard was loaded again")
    # 10 at once and 10 a minute, and no other 10
    assert 10 <= asked <= 10 + flooded / 6 + 2 and bridge.log().count(said) <= asked + again / 6 + 2
