"""What only a distribution's own kernel shows: the guard as shipped, beside br_netfilter, other bridges and VLANs.

kernel.sh boots Debian's and runs these there; elsewhere, the kernel runs what it can. Each is run with br_netfilter
passing packets to iptables and not.
"""

import pytest
import test_bridge
from attacks import datagram, hearing, link_local, send_until
from lab import HAS_BR_NETFILTER, has_ibrname

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_BR_NETFILTER, reason="needs br_netfilter")]
# A kernel without `meta ibrname` may know no VLANs either.
debian_s_kernel = pytest.mark.skipif(not has_ibrname(), reason="needs `meta ibrname`, as kernel.sh has it")


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["without br_netfilter", "with br_netfilter"])
def br_netfilter(bridge, request):
    bridge.host.br_netfilter(request.param)


@pytest.mark.parametrize("kind", ["ipv4", "ipv6_gua"])
def test_datagram_from_a_forged_source_does_not_arrive(bridge, kind):
    test_bridge.test_datagram_from_a_forged_source_does_not_arrive(bridge, bridge.registered, "bystander", kind)


def test_neighbour_cache_is_not_poisoned(bridge):
    test_bridge.test_neighbour_cache_is_not_poisoned(bridge, bridge.registered, "bystander")


def test_router_advertisement_makes_no_route(bridge):
    test_bridge.test_router_advertisement_makes_no_route(bridge, bridge.registered)


def test_guests_reach_each_other(bridge):
    bridge.guard(True)
    for kind in ("ipv4", "ipv6_gua"):
        assert bridge.bystander.pings(bridge.own[kind])


@debian_s_kernel
def test_other_bridge_of_the_host_is_left_alone_unless_it_is_named_too(bridge, request):
    host, text = bridge.host, bridge.rules.read_text()
    host.run("ip", "link", "add", "br1", "type", "bridge")
    host.run("ip", "link", "set", "br1", "up")
    number = len(host.clients)
    guests = [host.client(f"other{n}", f"10:66:6a:4c:a2:{number}{n}", bridge="br1") for n in (1, 2)]
    for number, guest in enumerate(guests, 1):
        guest.run("ip", "address", "add", f"10.84.0.{number}/24", "dev", "eth0")
    attacker, target = guests
    frame = datagram(attacker, bridge.own["ipv4"], "10.84.0.2")

    def reached():
        return [attacker.pings(address) for address in ("10.84.0.2", f"{link_local(target.mac)}%eth0")]

    bridge.guard(True)
    assert text.count('define guarded = "br0"') == 1
    with hearing(target) as heard:
        assert all(reached())
        send_until(lambda: "open" in heard(), attacker, frame / "open")
        bridge.rules.write_text(text.replace('define guarded = "br0"', 'define guarded = { "br0", "br1" }'))
        try:
            bridge.guard(True)
            assert not any(reached())
            for number, guest in enumerate(guests, 1):
                host.update("add", guest.mac, f"10.84.0.{number}")
            bridge.settle()
            assert all(reached())
            bridge.is_dropped("IPv4 source", attacker, frame / "guarded")
            assert "guarded" not in heard()
            test_guests_reach_each_other(bridge)
        finally:
            bridge.rules.write_text(text)
            host.run("ip", "link", "delete", "br1")


@debian_s_kernel
def test_bridge_with_vlans_is_guarded_alike(bridge):
    host = bridge.host
    host.run("ip", "link", "set", "br0", "type", "bridge", "vlan_filtering", "1")
    try:
        for port in ("br0", *(client.port for client in host.clients[:4])):
            own = ["self"] if port == "br0" else []
            host.run("bridge", "vlan", "add", "dev", port, "vid", "10", "pvid", "untagged", *own)
        test_guests_reach_each_other(bridge)
        test_datagram_from_a_forged_source_does_not_arrive(bridge, "ipv4")
    finally:
        host.run("ip", "link", "set", "br0", "type", "bridge", "vlan_filtering", "0")
