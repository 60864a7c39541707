"""What is allowed to guests beside their own addresses, with the programs that people use it for."""

import signal
import time

import pytest
from conftest import PROGRAMS, need
from lab import Host, wait_for

scapy = pytest.importorskip("scapy.all")
pytestmark = pytest.mark.slow
SHARED4, SHARED6 = "10.83.0.50", "2001:67c:83::50"
ROUTED4, ROUTED6 = "10.99.0.2", "2001:67c:99::2"
EVERYONE, NODES = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"
# VRRP of both versions (RFC 9568). An address is given up and taken within a few seconds.
KEEPALIVED = """\
global_defs {{
    router_id {name}
}}
vrrp_instance four {{
    state BACKUP
    interface eth0
    virtual_router_id 50
    priority {priority}
    advert_int 1
    virtual_ipaddress {{
        10.83.0.50/24
    }}
}}
vrrp_instance six {{
    state BACKUP
    interface eth0
    virtual_router_id 51
    priority {priority}
    advert_int 1
    virtual_ipaddress {{
        2001:67c:83::50/80
    }}
}}
"""


@pytest.fixture(scope="module")
def guests(tmp_path_factory):
    """A guarded host, and three guests with leases: the first two may have the shared addresses."""
    need(*PROGRAMS)
    host = Host(tmp_path_factory.mktemp("allowed"))
    try:
        host.start_guarded()
        guests = [host.client(name, f"10:66:6a:4c:a1:1{n}") for n, name in enumerate(("one", "two", "third"))]
        for guest in guests:
            guest.dhcp4(guest.label)
            guest.dhcp6(guest.label)
        for guest in guests[:2]:
            host.update("--allow", guest.mac, SHARED4, SHARED6)
        for guest in guests:
            for address in ("10.83.0.1", "2001:67c:83::1"):
                wait_for(lambda g=guest, a=address: g.pings(a), f"{guest.label} behind the guard")
        yield host, *guests
    finally:
        host.close()


def start_keepalived(guest, priority):
    """Start keepalived in a guest; return its process."""
    config = guest.folder / "keepalived.conf"
    config.write_text(KEEPALIVED.format(name=guest.label, priority=priority))
    files = ["--pid", guest.folder / "pid", "--vrrp_pid", guest.folder / "vrrp.pid"]
    log = open(guest.folder / "keepalived.log", "a")
    command = ["keepalived", "--dont-fork", "--vrrp", "--log-console", "--use-file", config, *files]
    return guest.start(*command, stdout=log, stderr=log)


def holder(host, address):
    """Return the MAC address by which the host reaches an address now, "" if it does not."""
    answers = host.run("ping", "-n", "-c", "1", "-W", "1", address, check=False).returncode == 0
    return host.neighbour(address) if answers else ""


def wait_taken(host, guest, seconds=30):
    """Wait until the host reaches both shared addresses at a guest; return how many seconds that took."""
    begin = time.monotonic()
    for address in (SHARED4, SHARED6):
        wait_for(lambda a=address: holder(host, a) == guest.mac, f"{address} at {guest.label}", seconds)
    return time.monotonic() - begin


def test_shared_addresses_of_keepalived_go_to_the_other_guest_and_back(guests):
    need("keepalived")
    host, one, two, _ = guests
    first, second = start_keepalived(one, 150), start_keepalived(two, 100)
    wait_taken(host, one)
    one.stop(first, signal.SIGKILL)
    wait_for(lambda: SHARED4 not in one.addresses() and SHARED6 not in one.addresses(), "the end of what it started")
    there = wait_taken(host, two)
    first = start_keepalived(one, 150)
    back = wait_taken(host, one)
    print(f"reached at the other guest after {there:.1f} s, and back after {back:.1f} s")
    for guest, process in ((one, first), (two, second)):
        guest.stop(process)


@pytest.fixture
def held(guests):
    """The same, where the first guest has the shared addresses."""
    host, one, *others = guests
    for address in (f"{SHARED4}/24", f"{SHARED6}/80"):
        one.run("ip", "address", "replace", address, "dev", "eth0", "nodad")
    wait_taken(host, one)
    yield host, one, *others
    for address in (f"{SHARED4}/24", f"{SHARED6}/80"):
        one.run("ip", "address", "delete", address, "dev", "eth0")


def claims(third):
    """Return what a guest sends that claims the shared addresses: (chain, frame)."""
    ether, own = scapy.Ether(src=third.mac, dst=EVERYONE), third.addresses("fe80")[0]
    advertised = scapy.Ether(src=third.mac, dst=NODES) / scapy.IPv6(src=own, dst="ff02::1", hlim=255)
    advertised /= scapy.ICMPv6ND_NA(tgt=SHARED6, R=0, S=0, O=1) / scapy.ICMPv6NDOptDstLLAddr(lladdr=third.mac)
    udp = scapy.UDP(sport=5000, dport=5000)
    return [
        ("arp", ether / scapy.ARP(op=2, hwsrc=third.mac, psrc=SHARED4, pdst="10.83.0.1")),
        ("ndp", advertised),
        ("ip", ether / scapy.IP(src=SHARED4, dst="10.83.0.1") / udp),
        ("ip6", ether / scapy.IPv6(src=SHARED6, dst="2001:67c:83::1") / udp),
    ]


def test_third_guest_that_claims_a_shared_address_is_dropped(held):
    host, one, two, third = held
    for chain, frame in claims(third):
        before = host.dropped(f"instances_drop_{chain}")
        third.send(*3 * [bytes(frame)])
        wait_for(lambda c=chain, b=before: host.dropped(f"instances_drop_{c}") >= b + 3, f"three drops by {chain}")
    assert (host.neighbour(SHARED4), host.neighbour(SHARED6)) == (one.mac, one.mac)
    before = host.dropped(*(f"instances_drop_{chain}" for chain in ("arp", "ndp", "ip", "ip6")))
    two.send(*(bytes(frame) for _, frame in claims(two)))  # to whom they are allowed, too
    wait_for(lambda: host.neighbour(SHARED4) == two.mac == host.neighbour(SHARED6), "the second guest's claims")
    assert host.dropped(*(f"instances_drop_{chain}" for chain in ("arp", "ndp", "ip", "ip6"))) == before


def test_network_behind_a_guest_is_reached_through_it_and_used_by_no_other(guests):
    host, one, two, _ = guests
    host.set("net/ipv4/ip_forward", "1")
    one.set("net/ipv6/conf/eth0/accept_ra", "2")  # a router that takes its own route from the host
    for variable in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
        one.set(variable, "1")
    one.run("ip", "link", "add", "behind", "type", "bridge")
    one.run("ip", "link", "set", "behind", "up")
    for address in (f"{ROUTED4}/24", f"{ROUTED6}/64"):
        one.run("ip", "address", "add", address, "dev", "behind", "nodad")
    own = host.registry()[one.mac]
    host.run("ip", "route", "replace", "10.99.0.0/24", "via", own["ipv4"])
    host.run("ip", "route", "replace", "2001:67c:99::/64", "via", own["ipv6_gua"])
    pings = [["ping", "-n", "-c", "1", "-W", "1", address] for address in (ROUTED4, ROUTED6)]
    before = host.dropped("instances_drop_ip", "instances_drop_ip6")
    for ping in pings:
        assert host.run(*ping, check=False).returncode
    wait_for(lambda: host.dropped("instances_drop_ip", "instances_drop_ip6") >= before + 2, "drops of both answers")
    host.update("--allow", one.mac, "10.99.0.0/24", "2001:67c:99::/64")
    for ping in pings:
        wait_for(lambda p=ping: host.run(*p, check=False).returncode == 0, f"{ping[-1]} through the guest")
    host.update("--allow", one.mac, SHARED4, SHARED6, "10.99.0.0/24", "2001:67c:99::/64")
    udp = scapy.UDP(sport=5000, dport=5000)
    for chain, packet in (
        ("ip", scapy.IP(src=ROUTED4, dst="10.83.0.1")),
        ("ip6", scapy.IPv6(src=ROUTED6, dst="2001:67c:83::1")),
    ):
        before = host.dropped(f"instances_drop_{chain}")
        two.send(*3 * [bytes(scapy.Ether(src=two.mac, dst=host.mac) / packet / udp)])
        wait_for(lambda c=chain, b=before: host.dropped(f"instances_drop_{c}") >= b + 3, f"three drops by {chain}")
