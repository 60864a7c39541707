"""Attacks on the bridge, with the guard and without it, and what must go on working with it.

Each attack is sent without the guard first, where its effect is seen, and then with it, where it is dropped and
counted and has no effect: by a client with a lease of its own, and by one that is not registered. The guard was loaded
before the bridge was made, as after a boot, and br_netfilter, where there is one, takes what the bridge forwards to the
hooks of IP and ARP.
"""

import contextlib
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from attacks import (
    HOST4,
    HOST6,
    HOST_LLA,
    NODES,
    SERVERS,
    advertised,
    arp,
    bootp,
    datagram,
    gives_up,
    hearing,
    ip6,
    link_local,
    scapy,
    send_until,
    solicited,
)
from lab import DNSMASQ, wait_for

pytestmark = pytest.mark.slow
FAR = "2001:67c:99::1"  # an address beyond the router


def poison(attacker, mac, own, stolen):
    """Return frames for whoever has a MAC address and own ones that say that the attacker has stolen addresses: (the
    reason of its drop, the kind of address, frame). The last two only a router takes."""
    own4, own6, own_lla = own["ipv4"], own["ipv6_gua"], own["ipv6_lla"]
    stolen4, stolen6, stolen_lla = stolen["ipv4"], stolen["ipv6_gua"], stolen["ipv6_lla"]
    asks_router = scapy.ICMPv6ND_RS() / scapy.ICMPv6NDOptSrcLLAddr(lladdr=attacker.mac)
    return [
        ("ARP address", "ipv4", arp(attacker, stolen4, own4, 2, mac)),
        ("ARP address", "ipv4", arp(attacker, stolen4, own4)),
        ("ARP address", "ipv4", arp(attacker, stolen4, stolen4)),
        ("NDP target", "ipv6_gua", advertised(attacker, stolen6, mac, own6)),
        ("NDP target", "ipv6_lla", advertised(attacker, stolen_lla, mac, own_lla)),
        ("NDP target", "ipv6_gua", advertised(attacker, stolen6, mac, own6, scapy.IPv6ExtHdrDestOpt)),
        ("NDP target", "ipv6_gua", advertised(attacker, stolen6, mac, own6, scapy.IPv6ExtHdrHopByHop)),
        ("IPv6 source", "ipv6_gua", solicited(attacker, stolen6, mac, own6)),
        ("IPv6 source", "ipv6_lla", solicited(attacker, stolen_lla, mac, own_lla)),
        ("IPv6 source", "ipv6_lla", ip6(attacker, mac, own_lla, stolen_lla) / asks_router),
        ("IPv6 source", "ipv6_gua", ip6(attacker, mac, own6, stolen6) / asks_router),
    ]


@pytest.mark.parametrize("where", ["host", "bystander"])
def test_neighbour_cache_is_not_poisoned(bridge, attacker, where):
    target, device = getattr(bridge, where), "br0" if where == "host" else "eth0"
    rows = poison(attacker, target.mac, bridge.registry[target.mac], bridge.own)
    for reason, kind, frame in rows if where == "host" else rows[:-2]:
        stolen = bridge.own[kind]

        def learn(address=stolen + (f"%{device}" if kind == "ipv6_lla" else "")):
            target.run("ip", "neighbour", "flush", "dev", device)
            wait_for(lambda: target.finds(address, bridge.victim.mac), f"the victim at {address}")

        bridge.guard(False)
        learn()
        send_until(lambda s=stolen: target.neighbour(s) == attacker.mac, attacker, frame)
        bridge.guard(True)
        learn()
        bridge.is_dropped(reason, attacker, frame)
        assert target.neighbour(stolen) == bridge.victim.mac, frame.summary()


def test_router_advertisement_makes_no_route(bridge, attacker):
    # The host is no target: as a router it takes no advertisement by itself
    own = link_local(attacker.mac)
    frame = ip6(attacker, NODES, "ff02::1") / scapy.ICMPv6ND_RA(routerlifetime=600)
    frame /= scapy.ICMPv6NDOptSrcLLAddr(lladdr=attacker.mac)

    def has_route():
        return own in bridge.bystander.run("ip", "-6", "route", "show", "default").stdout

    bridge.guard(False)
    send_until(has_route, attacker, frame)
    bridge.bystander.run("ip", "-6", "route", "delete", "default", "via", own, "dev", "eth0")
    bridge.guard(True)
    bridge.is_dropped("router message", attacker, frame)
    assert not has_route()


def test_redirect_changes_no_route(bridge, attacker):
    # A client takes it from its router's address only; the host, being a router, takes none by itself
    target, own = bridge.bystander, link_local(attacker.mac)
    redirect = scapy.ICMPv6ND_Redirect(tgt=own, dst=FAR) / scapy.ICMPv6NDOptDstLLAddr(lladdr=attacker.mac)
    frame, by_itself = (ip6(attacker, target.mac, link_local(target.mac), s) / redirect for s in (HOST_LLA, own))

    def via():
        return target.run("ip", "-6", "route", "get", FAR, check=False).stdout

    wait_for(lambda: HOST_LLA in via(), "a route by dnsmasq's router advertisement")
    bridge.guard(False)
    send_until(lambda: own in via(), attacker, frame)
    target.run("ip", "-6", "route", "flush", "cache")
    assert own not in via()
    bridge.guard(True)
    bridge.is_dropped("IPv6 source", attacker, frame)
    bridge.is_dropped("router message", attacker, by_itself)
    assert own not in via()


@pytest.mark.parametrize("kind", ["ipv4", "ipv6_gua"])
@pytest.mark.parametrize("where", ["host", "bystander"])
def test_datagram_from_a_forged_source_does_not_arrive(bridge, attacker, where, kind):
    target, victim = getattr(bridge, where), bridge.victim
    address = bridge.registry[target.mac][kind]
    with hearing(target) as heard:
        bridge.guard(False)
        send_until(lambda: "open" in heard(), attacker, datagram(attacker, bridge.own[kind], address) / "open")
        bridge.guard(True)
        reason = "IPv4 source" if kind == "ipv4" else "IPv6 source"
        bridge.is_dropped(reason, attacker, datagram(attacker, bridge.own[kind], address) / "guarded")
        send_until(lambda: "honest" in heard(), victim, datagram(victim, bridge.own[kind], address) / "honest")
        assert "guarded" not in heard()


@pytest.fixture(scope="module")
def stranger(bridge):
    """A client that nobody has registered, with addresses of its own choice."""
    client = bridge.host.client("stranger", "10:66:6a:4c:a1:66")
    client.run("ip", "address", "add", "10.83.0.66/24", "dev", "eth0")
    client.run("ip", "address", "add", "2001:67c:83::66/80", "dev", "eth0", "nodad")
    return client


@contextlib.contextmanager
def rogue_server(bridge, attacker):
    """In place of the host's DHCP server, have one of the attacker's that answers from other ports."""
    ranges = ("10.83.0.210,10.83.0.219", "2001:67c:83::300,2001:67c:83::3ff,80")
    own = attacker.addresses("2001")[0]
    attacker.run("ip", "address", "flush", "dev", "eth0", "to", own)
    attacker.run("ip", "address", "add", f"{own}/80", "dev", "eth0", "nodad")
    chain = "type filter hook output priority 0; udp sport 67 udp sport set 6767; udp sport 547 udp sport set 6547;"
    attacker.run("nft", f"table inet ports {{ chain c {{ {chain} }}; }}")
    options = ["--port=0", "--interface=eth0", "--no-ping", "--dhcp-authoritative", "--dhcp-leasefile=/dev/null"]
    options += ["--leasefile-ro", *(f"--dhcp-range={addresses},120" for addresses in ranges)]
    bridge.host.stop(bridge.host.dnsmasq)
    log = bridge.host.folder / "rogue.log"
    with open(log, "w") as file:
        server = attacker.start(*DNSMASQ, *options, stdout=file, stderr=file)
    try:
        wait_for(lambda: "started" in log.read_text(), "the rogue server")
        yield log
    finally:
        attacker.stop(server)
        attacker.run("nft", "flush", "ruleset")
        bridge.host.start_dnsmasq(config=bridge.host.folder / "br0.conf")


@pytest.mark.parametrize("who", ["bystander", "stranger"])
def test_rogue_server_gives_no_lease(bridge, stranger, who):
    host, attacker = bridge.host, stranger if who == "stranger" else bridge.bystander
    deceived, guarded = (host.client(f"{n}-{who}", f"10:66:6a:4c:b{n}:{attacker.mac[-2:]}") for n in range(2))
    with rogue_server(bridge, attacker) as log:
        bridge.guard(False)
        deceived.start_dhcp4()
        deceived.start_dhcp6()
        for event in ("bound 10.83.0.21", "BOUND6 2001:67c:83::3"):
            wait_for(lambda e=event: e in deceived.events(), f"{event}: a rogue lease without the guard")
        bridge.guard(True)
        with bridge.without("at_forward", "instances_drop_request"):  # or the server is never asked
            for start, reply in ((guarded.start_dhcp4, "DHCPOFFER"), (guarded.start_dhcp6, "DHCPADVERTISE")):
                told, before = log.read_text().count(reply), host.dropped(attacker.mac, "DHCP server")
                start()
                wait_for(lambda r=reply, t=told: log.read_text().count(r) > t, f"{reply} of the rogue")
                wait_for(lambda b=before: host.dropped(attacker.mac, "DHCP server") > b, f"the drop of {reply}")
        assert "bound" not in guarded.events().lower()
    wait_for(lambda: "bound 10.83" in guarded.events(), "a lease of the host's own server")


def test_frame_with_one_field_that_is_not_the_sender_s_is_dropped(bridge):
    attacker, another, others = bridge.registered, bridge.victim.mac, bridge.own["ipv4"]
    own, lla = (bridge.registry[attacker.mac][kind] for kind in ("ipv4", "ipv6_lla"))
    frames = [
        ("ARP address", arp(attacker, own, HOST4, hardware=another)),
        ("ARP address", arp(attacker, others, HOST4, hardware=another)),
        ("ARP address", arp(attacker, "0.0.0.0", others)),  # a probe
        ("DHCP message", bootp(attacker, "inform", htype=6)),
        ("DHCP message", bootp(attacker, "inform", hlen=16)),
        ("DHCP message", bootp(attacker, "inform", op=2)),  # of a server
        ("DHCP message", bootp(attacker, "inform", giaddr=own)),  # by a relay agent
        ("not registered", advertised(attacker, lla.replace("fe80::", "fd83:99::"))),
        ("not registered", advertised(attacker, lla.replace("fe80::", "fe80:0:0:1:"))),
        ("NDP target", advertised(attacker, lla.replace(":12", ":10"))),  # without the bit flipped
        ("NDP target", advertised(attacker, lla.replace("6aff", "6bff"))),
        ("NDP target", advertised(attacker, lla.replace("a111", "a112"))),
    ]
    message6 = ip6(attacker, SERVERS, "ff02::1:2") / scapy.UDP(sport=546, dport=547)
    kinds = (0, 2, 6, 7, 8, 9, 10, 12, 13, 14, 255)
    frames += [("DHCP message", message6 / bytes([kind, 0, 0, 7])) for kind in kinds]
    bridge.guard(True)
    for reason, frame in frames:
        bridge.is_dropped(reason, attacker, frame)


def test_datagram_from_or_to_a_port_of_dhcp_servers_or_clients_is_dropped(bridge):
    attacker = bridge.registered
    bridge.guard(True)
    for kind in ("ipv4", "ipv6_gua"):
        for ports in ((67, 5000), (547, 5000), (5000, 68), (5000, 546)):
            frame = datagram(attacker, bridge.registry[attacker.mac][kind], bridge.own[kind], *ports)
            bridge.is_dropped("DHCP server", attacker, frame / b"x")


def test_new_client_gets_and_renews_its_leases_and_reaches_all_behind_the_guard(bridge):
    bridge.guard(True)
    client = bridge.host.client("late", "10:66:6a:4c:a1:77")
    lease4 = client.dhcp4("late")
    lease6 = client.dhcp6("late")
    wait_for(lambda: client.resolve("late.v4.instance.internal", "A"), "the new name")
    wait_for(lambda: all(client.addresses(prefix) for prefix in ("10", "2001", "fd83", "fe80")), "its addresses")
    for node, other in ((client, bridge.victim), (bridge.victim, client)):
        node.wait_pings(*(a + "%eth0" * a.startswith("fe80") for a in other.addresses()))
    for kind, subdomain in (("A", "v4"), ("AAAA", "g6"), ("AAAA", "u6"), ("AAAA", "l6")):
        assert client.resolve(f"victim.{subdomain}.instance.internal", kind)
    lease4.send_signal(signal.SIGUSR1)
    wait_for(lambda: "renew 10.83" in client.events(), "a renewal over IPv4")
    client.stop(lease6, signal.SIGKILL)
    leases = client.folder / "leases6-a"  # by what stands there it is time to renew
    leases.write_text(re.sub(r"\brenew \d+;", "renew 1;", leases.read_text()))
    client.start_dhcp6("late")
    wait_for(lambda: all(f"RENEW6 {p}" in client.events() for p in ("2001", "fd83")), "a renewal over IPv6")


def test_false_claim_makes_nobody_give_an_address_up(bridge, attacker):
    bridge.guard(False)
    wait_for(lambda: gives_up(attacker, bridge.victim, bridge.own["ipv6_gua"]), "a false claim that is believed")
    bridge.guard(True)
    before = bridge.host.dropped(attacker.mac, "NDP target")
    assert not gives_up(attacker, bridge.victim, bridge.own["ipv6_gua"])
    assert bridge.host.dropped(attacker.mac, "NDP target") >= before + 3


def test_unregistered_client_reaches_nobody_behind_the_guard(bridge, stranger):
    others = (HOST4, HOST6, f"{HOST_LLA}%eth0", bridge.own["ipv4"])
    bridge.guard(False)
    for address in others:
        wait_for(lambda a=address: stranger.pings(a), f"a ping of {address} without the guard")
    bridge.guard(True)
    with ThreadPoolExecutor() as pool:  # each waits in vain for two seconds
        assert not any(pool.map(stranger.pings, others))
