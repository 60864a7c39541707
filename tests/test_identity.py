"""Attacks on who a guest is: nobody joins as somebody else, and nobody loses an address to another.

Attackers whose own kernel is silent send what no kernel would, one with leases of its own and one that is not
registered: first without what stops it, where its effect is seen, and then with it, where it has none.
"""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from attacks import (
    EVERYONE,
    HOST4,
    HOST6,
    HOST_MAC,
    SERVERS,
    SNIFFER,
    advertised,
    bootp,
    datagram,
    dhcp6,
    flooding,
    hearing,
    ip6,
    link_local,
    octets,
    own_duid,
    rarp,
    scapy,
    send_until,
    solicitation,
    tagged,
    take,
)
from lab import UPDATE, wait_for

pytestmark = pytest.mark.slow


def relayed(bridge, attacker):
    """Return what a relay agent sends for a client that has the host's MAC address, as it says (RFC 6939)."""
    commit = scapy.DHCP6OptRapidCommit()
    asked = dhcp6(bridge, attacker, scapy.DHCP6_Solicit, commit, duid=b"\0\3\0\1relayed", addresses=[])
    inner = bytes(asked[scapy.DHCP6_Solicit])
    relay = scapy.DHCP6_RelayForward(linkaddr=HOST6, peeraddr=link_local(HOST_MAC))
    options = b"\0\x4f\0\x08\0\1" + octets(HOST_MAC) + b"\0\x09" + len(inner).to_bytes(2, "big") + inner
    return ip6(attacker, SERVERS, "ff02::1:2") / scapy.UDP(sport=546, dport=547) / relay / scapy.Raw(options)


OF_HOST = ("server_id", HOST4)
NONCE, NOBODYS = b"\x0e\1nonce!", "2001:67c:83::fe"
DROPPED = {  # for what they say
    "chaddr of the victim": lambda b, a: take(a, "10.83.0.150", chaddr=b.victim.mac),
    "chaddr of the host": lambda b, a: take(a, "10.83.0.151", chaddr=HOST_MAC),
    "chaddr of nobody": lambda b, a: take(a, "10.83.0.152", chaddr="10:66:6a:4c:a1:99"),
    "hardware length 16": lambda b, a: take(a, "10.83.0.153", chaddr=a.mac + ":00" * 10, hlen=16),
    "option overload": lambda b, a: take(a, "10.83.0.154", chaddr=b.victim.mac, file=b"\x0c\4evil\xff"),
    "Release": lambda b, a: bootp(a, "release", OF_HOST, chaddr=b.victim.mac, ciaddr=b.own["ipv4"]),
    "Decline": lambda b, a: bootp(a, "decline", ("requested_addr", b.own["ipv4"]), OF_HOST, chaddr=b.victim.mac),
    # For which the host's neighbour cache may have another's MAC address
    "Request from a shared address": lambda b, a: dhcp6(
        b, a, scapy.DHCP6_Request, duid=own_duid(a), addresses=[], source=b.addresses6[0]
    ),
    # A router's behind an uplink, say, or one that a guest has made itself: dnsmasq grants any of the prefix
    "Rebind of nobody's": lambda b, a: dhcp6(b, a, scapy.DHCP6_Rebind, duid=own_duid(a), addresses=[NOBODYS]),
    "relay agent's address": lambda b, a: bootp(a, "discover", giaddr=b.own["ipv4"]),
    "Release, IPv6": lambda b, a: dhcp6(b, a, scapy.DHCP6_Release),
    "Decline, IPv6": lambda b, a: dhcp6(b, a, scapy.DHCP6_Decline),
    "Relay-forward": relayed,
}


def test_messages_in_the_name_of_another_or_for_an_address_of_nobody_are_dropped(bridge, attacker):
    frames = [make(bridge, attacker) for make in DROPPED.values()]

    def effect():
        given = bridge.host.registry().get(attacker.mac, {}).values()
        return bridge.harm(attacker) or NOBODYS in given or "DHCPOFFER" in bridge.log()

    for frame in frames:
        bridge.reset(guard=False)
        send_until(effect, attacker, solicitation(attacker, 133), frame)  # which tells the host its MAC address
    bridge.reset()
    for frame in frames:
        bridge.is_dropped("DHCP message", attacker, frame)
    assert not effect()
    bridge.victim_is_well()


def test_link_layer_option_with_the_address_of_another_is_not_believed(bridge, attacker):
    """In a router or neighbour solicitation or an advertisement (133, 135, 136), also behind a nonce option."""
    host, own, honest = bridge.host, link_local(attacker.mac), solicitation(attacker, 133)
    rows = [(k, m, n) for k in (133, 135, 136) for m in (bridge.victim.mac, HOST_MAC) for n in (b"", NONCE)]
    bridge.reset(guard=False)
    for row in rows:
        host.run("ip", "neighbour", "flush", "dev", "br0")
        send_until(lambda m=row[1]: host.neighbour(own) == m, attacker, honest, solicitation(attacker, *row))
    bridge.reset()
    for row in rows:
        host.run("ip", "neighbour", "flush", "dev", "br0")
        bridge.is_dropped("NDP option", attacker, solicitation(attacker, *row))
        assert not bridge.harm(attacker)
        bridge.introduce(attacker)
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


@pytest.fixture(scope="module")
def credulous(bridge):
    """A copy of our script that believes all that dnsmasq tells it."""
    script = bridge.host.folder / "credulous.py"
    text, count = re.subn('elif (keepers|kind == "reminder") and .*:', "elif False:", UPDATE.read_text())
    assert count == 2
    script.write_text(text)
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("attack", FORGED)
def test_lease_of_an_address_of_another_is_not_registered(bridge, attacker, credulous, attack):
    for script in (credulous, UPDATE):
        bridge.reset("Rebind" not in attack, script=script)  # by itself: the guard drops Rebind
        bridge.introduce(attacker)
        attacker.send(bytes(FORGED[attack](bridge, attacker)))
        if script == credulous:
            wait_for(lambda: "stolen" in str(bridge.harm(attacker)), "an address that is stolen")
    wait_for(lambda: bridge.log().count("has it") == 2, "both addresses told")
    assert not bridge.harm(attacker)
    bridge.victim_is_well()


def test_lease_of_a_further_address_of_the_host_or_of_what_another_is_allowed_is_not_registered(bridge, credulous):
    attacker, host = bridge.unregistered, bridge.host
    registered, new, allowed = ([f"2001:67c:83::5{n}", f"fd83:5eed::5{n}"] for n in (3, 4, 5))
    wanted = {*registered, *new, *allowed}

    def given():
        return wanted & {*host.registry().get(attacker.mac, {}).values()}

    try:
        for script in (credulous, UPDATE):
            bridge.reset(False, script=script)
            for address in registered + new:
                host.run("ip", "address", "replace", f"{address}/80", "dev", "br0", "nodad", "preferred_lft", "0")
                if address == registered[-1]:
                    host.update("--initialize", "br0", "host")
            bridge.change("--allow", "victim", *allowed)
            bridge.introduce(attacker)
            rebind = dhcp6(bridge, attacker, scapy.DHCP6_Rebind, duid=own_duid(attacker), addresses=[*wanted])
            attacker.send(bytes(rebind))
            if script == credulous:
                wait_for(lambda: len(given()) == 2, "addresses of both kinds")
        wait_for(lambda: bridge.log().count("has it") == len(wanted), "all of them told")
        assert bridge.log().count("this host has it") == 4 and not given()
        bridge.victim_is_well()
    finally:
        for address in registered + new:
            host.run("ip", "address", "del", f"{address}/80", "dev", "br0", check=False)


def test_address_whose_lease_was_ended_by_another_is_not_registered(bridge):
    """Whoever repeats a DUID can have its lease end in two minutes: that is not waited for, but written."""
    attacker = bridge.unregistered
    ended = "".join(line for line in bridge.was.splitlines(True) if f" {bridge.iaid} " not in line)
    bridge.reset(leases=ended)
    bridge.introduce(attacker)
    attacker.send(bytes(dhcp6(bridge, attacker, scapy.DHCP6_Request, duid=own_duid(attacker))))
    wait_for(lambda: bridge.log().count("has it") == 2, "both addresses told")
    assert not bridge.harm(attacker)


def test_client_identifier_of_another_gets_nothing(bridge, attacker):
    address, identifier = bridge.own["ipv4"], ("client_id", b"\1" + octets(bridge.victim.mac))
    frame, honest = (
        bytes(bootp(sender, "request", ("requested_addr", address), identifier)) for sender in (attacker, bridge.victim)
    )
    for option, answer in (("dhcp-ignore-clid", "ACK"), ("", "NAK")):
        bridge.reset(option=option)
        bridge.victim.send(honest)
        wait_for(lambda: f"DHCPACK(br0) {address} {bridge.victim.mac}" in bridge.log(), "the victim's lease")
        attacker.send(frame)
        wait_for(lambda a=answer: f"DHCP{a}(br0) {address} {attacker.mac}" in bridge.log(), f"a DHCP{answer}")
    assert not bridge.harm(attacker)
    bridge.victim_is_well()


TWIN = SimpleNamespace(mac="12:66:6a:4c:a1:10")  # the victim's but for the bit that a link-local address has flipped


def stray(bridge, attacker):
    """Return frames that arrive nowhere: {what: (the reason of its drop, "" if it is not counted, frame)}."""
    a, own, own_lla, everyone6 = attacker, bridge.registry.get(attacker.mac), link_local(attacker.mac), "ff02::1:2"
    address4, address6, lla = bridge.own["ipv4"], bridge.addresses6[0], bridge.own["ipv6_lla"]
    snap = scapy.Dot3(src=a.mac, dst=EVERYONE) / scapy.LLC(dsap=0xAA, ssap=0xAA, ctrl=3) / scapy.SNAP(code=0x800)
    lengths = scapy.Ether(src=a.mac, dst=EVERYONE, type=0x806) / b"\0\1\x08\0\x08\4\0\2"
    rows = {
        "UDP from 0.0.0.0": ("", datagram(a, "0.0.0.0", address4)),
        "UDP from 0.0.0.0 to all": ("", datagram(a, "0.0.0.0", "255.255.255.255")),
        "UDP from ::": ("not registered", datagram(a, "::", address6)),
        "link-local address of a twin": ("IPv6 source", datagram(a, lla, address6, mac=TWIN.mac)),
        "advertisement of a twin": ("NDP target", advertised(TWIN, lla, EVERYONE, address6)),
        "answer of a DHCPv6 server": ("DHCP server", datagram(a, own_lla, lla, 6547, 546)),
        "DHCP for another guest to hear": ("", bootp(a, "discover")),
        "DHCPv6 for another guest to hear": ("", dhcp6(bridge, a, scapy.DHCP6_Solicit)),
        "VLAN tag": ("other protocol", tagged(datagram(a, "::", address6), vlan=7)),
        "forged source behind a tag of priority": ("IPv4 source", tagged(datagram(a, address4, address4))),
        "router advertisement behind a tag of priority": (
            "other protocol",
            tagged(ip6(a, EVERYONE, "ff02::1") / scapy.ICMPv6ND_RA()),
        ),
        "802.3 frame": ("other protocol", snap / datagram(a, "10.83.0.66", address4).payload),
        "RARP": ("other protocol", rarp(a)),
        "ARP with addresses of other lengths": ("ARP address", lengths / (octets(bridge.victim.mac) + bytes(18))),
    }
    if not own:
        joining = {  # before it has asked for a lease
            "UDP to ff02::1:2, another port": ("", datagram(a, own_lla, everyone6, 546, 548)),
            "UDP to ff02::1:2, from another port": ("", datagram(a, own_lla, everyone6, 548, 549)),
            "UDP to a guest": ("not registered", datagram(a, own_lla, lla)),
            "multicast DNS": ("", datagram(a, "fe80::8099:e2ff:5d8a:66", "ff02::fb", 5353, 5353)),
            "answer to a probe for a former address": ("", ip6(a, EVERYONE, lla) / scapy.ICMPv6DestUnreach(code=3)),
        }
        return joining | rows
    fragment = scapy.IPv6ExtHdrFragment(nh=60, offset=0, m=1) / scapy.IPv6ExtHdrDestOpt(nh=17)
    return rows | {
        "first fragment without a header": ("malformed", ip6(a, EVERYONE, address6, own["ipv6_gua"]) / fragment),
        "answer of a DHCP server": ("DHCP server", datagram(a, own["ipv4"], address4, 6767, 68)),
    }


def test_stray_frame_does_not_arrive(bridge, attacker):
    rows = stray(bridge, attacker)
    with hearing(bridge.victim, SNIFFER) as sniffed:
        for guard in (False, True):
            bridge.reset(guard)
            begin = len(sniffed())
            for what, (reason, frame) in rows.items():
                if "to hear" not in what:
                    frame.dst = bridge.victim.mac
                text = bytes(frame)[18:].hex()  # without its Ethernet header and VLAN tag

                def heard(text=text, begin=begin):
                    return text in sniffed()[begin:]

                if not guard:
                    send_until(heard, attacker, frame)
                elif reason:
                    bridge.is_dropped(reason, attacker, frame)
                else:
                    bridge.is_dropped_silently(attacker, frame)
                assert heard() != guard, what
    bridge.victim_is_well()


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
    others = ", ".join(f'02:00:00:00:{n >> 8:02x}:{n & 255:02x} . "malformed"' for n in range(65536))
    host.run("nft", "-f", "-", input=f"add element bridge instances instances_dropped {{ {others} }}")
    attacker.send(*[bytes(frame)] * 3)
    bridge.victim_is_well()
    assert not host.dropped(attacker.mac) and not bridge.harm(attacker)


def test_guest_that_calls_itself_like_another_does_not_answer_for_the_name(bridge, attacker):
    request = bootp(attacker, "request", OF_HOST, ("requested_addr", "10.83.0.160"), ("hostname", b"victim"))
    fqdn = scapy.DHCP6OptClientFQDN(fqdn="victim.", flags="S")
    request6 = dhcp6(bridge, attacker, scapy.DHCP6_Request, fqdn, duid=own_duid(attacker), addresses=[])
    told = f"instances-update.py: {attacker.mac}"

    def answers(name):
        return {*bridge.victim.resolve(name, "A"), *bridge.victim.resolve(name, "AAAA")}

    for option in ("dhcp-fqdn", ""):
        bridge.reset(option=option)
        # As a client does, it asks again, since dnsmasq may not have found its MAC address in time
        send_until(lambda: bridge.heard(told, 2), attacker, request, solicitation(attacker, 133), request6)
        if option:
            wait_for(lambda: "10.83.0.160" in answers("victim"), "the attacker's address for the plain name")
    assert "10.83.0.160" in answers("victim.lease.instance.internal")
    assert not answers("victim")
    assert answers("victim.instance.internal") == {bridge.own["ipv4"], *bridge.addresses6}
    assert not bridge.harm(attacker)
    assert bridge.host.registry()[attacker.mac]["name"] == bridge.registry.get(attacker.mac, {"name": ""})["name"]


def test_messages_that_ask_for_many_leases_do_not_use_them_up(bridge):
    """A message of DHCPv6 may have as many identity associations as there is room for: seven take all 1,000 leases."""
    attacker, host = bridge.registered, bridge.host
    asked = dhcp6(bridge, attacker, scapy.DHCP6_Solicit, scapy.DHCP6OptRapidCommit(), duid=own_duid(attacker))
    associations = [[b"\0\3\0\x0c\0\0" + bytes([number, n]) + bytes(8) for n in range(80)] for number in range(7)]
    requests = [asked / b"".join(some) for some in associations]

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


def test_host_name_that_is_hostile_or_that_programs_look_for_is_left_out(bridge):
    names = [b"a b", b"x\n10.83.0.1 host", b"-", b"$(id)", b'a"b', b"\xff\xfe", b"a" * 64, b"*", b"host", b"Victim"]
    names += [b"wpad", b"WPAD.x", b"isatap.instance.internal", b"localhost.localdomain", b"other.x"]
    bridge.reset()
    for number, name in enumerate(names):
        guest = SimpleNamespace(mac=f"10:66:6a:4c:e0:{number:02x}")
        options = OF_HOST, ("requested_addr", f"10.83.0.{160 + number}"), ("hostname", name)
        bridge.unregistered.send(bytes(bootp(guest, "request", *options)))

    def named():
        return [i["name"] for m, i in sorted(bridge.host.registry().items()) if m.startswith("10:66:6a:4c:e0:")]

    wait_for(lambda: len(named()) == len(names), "their leases")
    assert named() == [""] * (len(names) - 1) + ["other"]
    wait_for(lambda: bridge.victim.resolve("host.v4.instance.internal", "A") == [HOST4], "the host's own name")


def test_flood_of_requests_keeps_nobody_out_and_is_counted_on_when_the_guard_is_loaded_again(bridge, attacker):
    host, duid = bridge.host, own_duid(attacker)
    frame, said = bootp(attacker, "discover"), f"DHCPDISCOVER(br0) {attacker.mac}"
    if attacker == bridge.unregistered:  # dnsmasq waits half a second for its neighbour advertisement, in vain
        frame = dhcp6(bridge, attacker, scapy.DHCP6_Solicit, duid=duid, addresses=[])
        said = "DHCPSOLICIT(br0) " + duid.hex(":")

    def dropped():
        return host.dropped(attacker.mac, "DHCP too often")

    def joins(number):
        """Return how many seconds a new guest takes to its leases of both versions."""
        guest = host.client(f"new{number}", f"10:66:6a:4c:d{number}:{attacker.mac[-2:]}")
        begin = time.monotonic()
        guest.start_dhcp4()
        guest.start_dhcp6()
        wait_for(lambda: "bound 10" in guest.events() and guest.events().count("BOUND6") == 2, "its leases", 60)
        return time.monotonic() - begin

    bridge.reset()
    begin = time.monotonic()
    with flooding(attacker, [bytes(frame)] * 100, pause=0.05):
        wait_for(lambda: dropped() > 1000, "drops by the limit")
        flooded = joins(1)
        bridge.change("--rename", bridge.victim.mac, "other")
        before = dropped()
        again = joins(2)
        wait_for(lambda: dropped() > before + 1000, "later drops")
    print(f"leases after {flooded:.1f} s in a flood, {again:.1f} s after the guard was loaded again")
    # 10 at once and 10 a minute, and no other 10
    assert 10 <= bridge.log().count(said) <= 12 + (time.monotonic() - begin) / 6
