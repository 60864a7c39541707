"""What only a distribution's own kernel shows: the guard as shipped, beside br_netfilter, other bridges and VLANs.

kernel.sh boots Debian's and runs these there; elsewhere, the kernel runs what it can. Each is run with br_netfilter
passing packets to iptables and not, with the rules loaded before the bridge is made, as after a boot. Their hooks then
stay: taken away and made again, they would come after br_netfilter's.
"""

import json
from pathlib import Path

import pytest
import test_bridge
from attacks import scapy
from conftest import PROGRAMS, need
from lab import HAS_BR_NETFILTER, Client, Host, has_ibrname, wait_for
from test_bridge import Bridge, addresses

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_BR_NETFILTER, reason="needs br_netfilter")]
# A kernel without `meta ibrname` may know no VLANs either.
debian_s_kernel = pytest.mark.skipif(not has_ibrname(), reason="needs `meta ibrname`, as kernel.sh has it")


@pytest.fixture(scope="module", params=[False, True], ids=["without br_netfilter", "with br_netfilter"])
def bridge(tmp_path_factory, request):
    need(*PROGRAMS)
    host = Host(tmp_path_factory.mktemp("kernel"), bridge=False)
    try:
        Path(f"{host.base}.updated").touch()
        host.process()
        rules = host.example("nftables/bridge.nft")
        host.run("nft", "-f", rules)
        host.make_bridge()
        host.br_netfilter(request.param)
        yield Bridge(host, rules)
    finally:
        host.close()


def echoes(client: Client) -> int:
    """Return how many echo requests a client has received."""
    counters = json.loads(client.run("nstat", "-asz", "--json", "IcmpInEchos", "Icmp6InEchos").stdout)["kernel"]
    return counters["IcmpInEchos"] + counters["Icmp6InEchos"]


@pytest.mark.parametrize("prefix", ["10", "2001"])
def test_spoofed_pings_between_guests_are_dropped(bridge, prefix):
    attacker, target = bridge.registered, bridge.bystander
    source, destination = addresses(bridge.victim)[prefix], addresses(target)[prefix]
    if prefix == "10":
        ping, reason = scapy.IP(src=source, dst=destination) / scapy.ICMP(), "IPv4 source"
    else:
        ping, reason = scapy.IPv6(src=source, dst=destination) / scapy.ICMPv6EchoRequest(), "IPv6 source"
    frame = scapy.Ether(src=attacker.mac, dst=target.mac) / ping
    bridge.guard(False)
    heard = echoes(target)
    wait_for(lambda: attacker.send(bytes(frame)) or echoes(target) > heard, "a spoofed ping without the guard")
    bridge.guard(True)
    heard = echoes(target)
    bridge.is_dropped(attacker, frame, lambda: echoes(target) > heard, reason)


@pytest.mark.parametrize("attack", ["ARP reply", "advertisement"])
def test_neighbour_cache_is_not_poisoned(bridge, attack):
    test_bridge.test_neighbour_cache_is_not_poisoned(bridge, attack, "bystander", "registered")


def test_router_advertisement_makes_no_route(bridge):
    test_bridge.test_router_advertisement_makes_no_route(bridge, "registered")


def test_guests_reach_each_other(bridge):
    bridge.guard(True)
    for prefix in ("10", "2001"):
        assert bridge.registered.pings(addresses(bridge.bystander)[prefix])


@debian_s_kernel
def test_other_bridge_of_the_host_is_left_alone_unless_it_is_named_too(bridge):
    host = bridge.host
    host.run("ip", "link", "add", "br1", "type", "bridge")
    host.run("ip", "link", "set", "br1", "up")
    guests = [host.client(f"other{n}", f"10:66:6a:4c:a2:0{n}", bridge="br1") for n in range(2)]
    for number, guest in enumerate(guests, 1):
        guest.run("ip", "address", "add", f"10.84.0.{number}/24", "dev", "eth0")
    attacker, stolen = guests[0], addresses(bridge.victim)["10"]
    ping = scapy.Ether(src=attacker.mac, dst=guests[1].mac) / scapy.IP(src=stolen, dst="10.84.0.2") / scapy.ICMP()

    def reached():
        return [attacker.pings(address) for address in ("10.84.0.2", guests[1].addresses("fe80")[0] + "%eth0")]

    bridge.guard(True)
    heard = echoes(guests[1])
    assert all(reached())
    wait_for(lambda: attacker.send(bytes(ping)) or echoes(guests[1]) > heard + 2, "a spoofed ping")
    text = bridge.rules.read_text()
    assert text.count('define guarded = "br0"') == 1
    bridge.rules.write_text(text.replace('define guarded = "br0"', 'define guarded = { "br0", "br1" }'))
    try:
        bridge.guard(True)
        assert not any(reached())
        for number, guest in enumerate(guests, 1):
            host.update("add", guest.mac, f"10.84.0.{number}")
        host.process()
        bridge.guard(True)
        assert all(reached())
        heard = echoes(guests[1])
        bridge.is_dropped(attacker, ping, lambda: echoes(guests[1]) > heard, "IPv4 source")
        test_guests_reach_each_other(bridge)
    finally:
        bridge.rules.write_text(text)


@debian_s_kernel
def test_bridge_with_vlans_is_guarded_alike(bridge):
    host = bridge.host
    host.run("ip", "link", "set", "br0", "type", "bridge", "vlan_filtering", "1")
    try:
        for port in ("br0", *(f"veth{number}" for number in range(4))):
            own = ["self"] if port == "br0" else []
            host.run("bridge", "vlan", "add", "dev", port, "vid", "10", "pvid", "untagged", *own)
        test_guests_reach_each_other(bridge)
        test_spoofed_pings_between_guests_are_dropped(bridge, "10")
    finally:
        host.run("ip", "link", "set", "br0", "type", "bridge", "vlan_filtering", "0")
