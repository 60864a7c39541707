"""What is allowed to guests beside their own addresses, with the programs that people use it for."""

import time

import pytest
from conftest import PROGRAMS, need
from lab import Host, Namespace, block, process_file, run, wait_for

scapy = pytest.importorskip("scapy.all")
pytestmark = pytest.mark.slow
SHARED4, SHARED6 = "10.83.0.50", "2001:67c:83::50"
NETWORKS = ("10.99.0.0/24", "2001:67c:99::/64")
ROUTERS, ROUTED4, ROUTED6 = ("10.99.0.1", "2001:67c:99::1"), "10.99.0.2", "2001:67c:99::2"
EVERYONE, NODES = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"
# VRRP of both versions (RFC 9568). An address is given up and taken within a few seconds.
KEEPALIVED = """\
vrrp_instance {address} {{
    state BACKUP
    interface eth0
    virtual_router_id {router}
    priority {priority}
    advert_int 1
    virtual_ipaddress {{
        {address}
    }}
}}
"""
# The recipe's line in bridge.nft: who may speak VRRP, which are one and two
SPEAKERS = block("examples/nftables/README.md", "meta l4proto 112")
LAST = "        goto instances_guard\n"


@pytest.fixture(scope="module")
def guests(tmp_path_factory):
    """A guarded host, and three guests with leases: the first two may have the shared addresses."""
    need(*PROGRAMS)
    host = Host(tmp_path_factory.mktemp("allowed"))
    try:
        host.start_guarded()
        guests = [host.client(name, f"10:66:6a:4c:a1:1{n}") for n, name in ((1, "one"), (2, "two"), (3, "third"))]
        for guest in guests:
            guest.dhcp4(guest.label)
            guest.dhcp6(guest.label)
        for guest in guests[:2]:
            host.update("--allow", guest.mac, SHARED4, SHARED6)
        host.settle()
        for guest in guests:
            for address in ("10.83.0.1", "2001:67c:83::1"):
                wait_for(lambda g=guest, a=address: g.pings(a), f"{guest.label} behind the guard")
        yield host, *guests
    finally:
        host.close()


def start_keepalived(guest, priority):
    """Start keepalived in a guest; return its process."""
    config, text = guest.folder / "keepalived.conf", f"global_defs {{\n    router_id {guest.label}\n}}\n"
    for router, address in ((50, f"{SHARED4}/24"), (51, f"{SHARED6}/80")):
        text += KEEPALIVED.format(router=router, address=address, priority=priority)
    config.write_text(text)
    files = ["--pid", guest.folder / "pid", "--vrrp_pid", guest.folder / "vrrp.pid"]
    command = ["keepalived", "--dont-fork", "--vrrp", "--log-console", "--use-file", config, *files]
    with open(guest.folder / "keepalived.log", "a") as log:
        return guest.start(*command, stdout=log, stderr=log)


def stop_keepalived(guest, process):
    """End it in order, so that it gives up its addresses, and wait for the end of what it started."""
    guest.stop(process)

    def running():
        pids = run("ip", "netns", "pids", guest.name).stdout.split()
        return any(process_file(pid, "comm") == "keepalived\n" for pid in pids)

    wait_for(lambda: not running(), f"the end of keepalived in {guest.label}")


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


@pytest.fixture
def shared(guests):
    """A function that starts keepalived in the first two guests; returns when the first has the shared addresses."""
    need("keepalived")
    host, one, two, _ = guests
    started = []

    def start():
        for guest, priority in ((one, 150), (two, 100)):
            started.append((guest, start_keepalived(guest, priority)))
        wait_taken(host, one)

    yield start
    for guest, process in started:
        stop_keepalived(guest, process)


@pytest.fixture
def stable(guests):
    """The first two guests have link-local addresses that are not made from their MAC addresses."""
    swaps = [(guest, guest.addresses("fe80")[0], f"fe80::a1b2:c3d4:e5f6:{guest.port[-1]}") for guest in guests[1:3]]

    def swap(guest, old, new):
        guest.run("ip", "address", "add", f"{new}/64", "dev", "eth0", "nodad")
        guest.run("ip", "address", "delete", f"{old}/64", "dev", "eth0")

    for guest, own, other in swaps:
        swap(guest, own, other)
    yield
    for guest, own, other in swaps:
        swap(guest, other, own)


def fail_over(host, one, two):
    """Cut the first guest's cable and plug it in again; nothing that the guests send is dropped."""
    before = host.dropped()
    host.run("ip", "link", "set", one.port, "down")
    there = wait_taken(host, two)
    host.run("ip", "link", "set", one.port, "up")
    back = wait_taken(host, one)
    print(f"reached at the other guest {there:.1f} s after the cut, and back after {back:.1f} s")
    assert host.dropped() == before


def test_shared_addresses_of_keepalived_go_to_the_other_guest_and_back(guests, shared):
    host, one, two, _ = guests
    shared()
    fail_over(host, one, two)


def test_shared_addresses_of_guests_with_private_link_local_addresses_do_too(guests, stable, shared):
    host, one, two, _ = guests
    shared()
    fail_over(host, one, two)


def test_vrrp_of_a_third_guest_takes_nothing_where_the_bridge_has_a_line_against_it(guests, shared):
    host, one, two, third = guests
    shared()

    def held():
        return {SHARED4, SHARED6} & {*one.addresses(), *two.addresses()}

    process = start_keepalived(third, 255)
    wait_for(lambda: not held(), "both guests give way to the third")
    stop_keepalived(third, process)
    wait_taken(host, one)
    rules = host.folder / "rules" / "bridge.nft"
    text = rules.read_text()
    assert text.count(LAST) == 1
    rules.write_text(text.replace(LAST, SPEAKERS + LAST))
    try:
        host.run(*host.applying())
        process = start_keepalived(third, 255)
        # For each of two versions three advertisements, any of which had that effect
        wait_for(lambda: host.dropped(third.mac, "other protocol") >= 6, "drops of VRRP")
        assert {SHARED4, SHARED6} <= {*one.addresses()}
        wait_taken(host, one)
        stop_keepalived(third, process)
    finally:
        rules.write_text(text)
        host.run(*host.applying())


@pytest.fixture
def held(guests):
    """The same, where the first guest has the shared addresses."""
    host, one, *others = guests
    for address in (f"{SHARED4}/24", f"{SHARED6}/80"):
        one.run("ip", "address", "replace", address, "dev", "eth0", "nodad")
    host.run("ip", "neighbour", "flush", "dev", "br0")
    wait_taken(host, one)
    yield host, one, *others
    for address in (f"{SHARED4}/24", f"{SHARED6}/80"):
        one.run("ip", "address", "delete", address, "dev", "eth0")


def claims(third):
    """Return what a guest sends that claims the shared addresses: (the reason of its drop, frame)."""
    ether, own = scapy.Ether(src=third.mac, dst=EVERYONE), third.addresses("fe80")[0]
    advertised = scapy.Ether(src=third.mac, dst=NODES) / scapy.IPv6(src=own, dst="ff02::1", hlim=255)
    advertised /= scapy.ICMPv6ND_NA(tgt=SHARED6, R=0, S=0, O=1) / scapy.ICMPv6NDOptDstLLAddr(lladdr=third.mac)
    udp = scapy.UDP(sport=5000, dport=5000)
    return [
        ("ARP address", ether / scapy.ARP(op=2, hwsrc=third.mac, psrc=SHARED4, pdst="10.83.0.1")),
        ("NDP target", advertised),
        ("IPv4 source", ether / scapy.IP(src=SHARED4, dst="10.83.0.1") / udp),
        ("IPv6 source", ether / scapy.IPv6(src=SHARED6, dst="2001:67c:83::1") / udp),
    ]


def test_third_guest_that_claims_a_shared_address_is_dropped(held):
    host, one, two, third = held
    for reason, frame in claims(third):
        before = host.dropped(third.mac, reason)
        third.send(*3 * [bytes(frame)])
        wait_for(lambda r=reason, b=before: host.dropped(third.mac, r) >= b + 3, f"three drops: {reason}")
    assert (host.neighbour(SHARED4), host.neighbour(SHARED6)) == (one.mac, one.mac)
    before = host.dropped()

    def taken():  # which the host's kernel believes only a second after it learnt another
        two.send(*(bytes(frame) for _, frame in claims(two)))
        return host.neighbour(SHARED4) == two.mac == host.neighbour(SHARED6)

    wait_for(taken, "the claims of the second guest, to whom they are allowed, too")
    assert host.dropped() == before


@pytest.fixture
def behind(guests):
    """A system with a network of its own behind the first guest, to which the host has routes by that guest."""
    host, one, *_ = guests
    system = Namespace("behind")
    try:
        one.run("ip", "link", "add", "net0", "type", "veth", "peer", "name", "eth0", "netns", system.name)
        for end, device, addresses in ((one, "net0", ROUTERS), (system, "eth0", (ROUTED4, ROUTED6))):
            end.run("ip", "link", "set", device, "up")
            for address, length in zip(addresses, (24, 64)):
                end.run("ip", "address", "add", f"{address}/{length}", "dev", device, "nodad")
        one.set("net/ipv6/conf/eth0/accept_ra", "2")  # a router that takes its own route from the host
        for variable in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            one.set(variable, "1")
        own = host.registry()[one.mac]
        for network, field, router in zip(NETWORKS, ("ipv4", "ipv6_gua"), ROUTERS):
            host.run("ip", "route", "replace", network, "via", own[field])
            system.run("ip", "route", "replace", "default", "via", router)
        yield system
    finally:
        system.close()


def reaches(namespace, address):
    return namespace.run("ping", "-n", "-c", "1", "-W", "1", address, check=False).returncode == 0


def test_network_behind_a_guest_is_reached_through_it_and_used_by_no_other(guests, behind):
    host, one, two, _ = guests
    host.run("nft", "flush", "set", "bridge", "instances", "instances_joining")  # it has not asked for a lease lately
    for address in (ROUTED4, ROUTED6):
        before = host.dropped(one.mac, "not registered")

        def is_dropped(address=address, before=before):
            assert not reaches(host, address)
            return host.dropped(one.mac, "not registered") > before

        wait_for(is_dropped, f"the drop of an answer from {address}")
    host.update("--allow", one.mac, SHARED4, SHARED6, *NETWORKS)
    for address in (ROUTED4, ROUTED6):
        wait_for(lambda a=address: reaches(host, a), f"{address} through the guest")
    for address in ("10.83.0.1", "2001:67c:83::1"):
        wait_for(lambda a=address: reaches(behind, a), f"{address} from behind the guest")
    one.run("ip", "neighbour", "flush", "dev", "eth0")  # the guest asks from there, too
    wait_for(
        lambda: one.run("ping", "-c", "1", "-W", "1", "-I", ROUTERS[0], "10.83.0.1", check=False).returncode == 0, "it"
    )
    udp = scapy.UDP(sport=5000, dport=5000)
    for packet in (scapy.IP(src=ROUTED4, dst="10.83.0.1"), scapy.IPv6(src=ROUTED6, dst="2001:67c:83::1")):
        before = host.dropped(two.mac, "not registered")
        two.send(*3 * [bytes(scapy.Ether(src=two.mac, dst=host.mac) / packet / udp)])
        wait_for(lambda b=before: host.dropped(two.mac, "not registered") >= b + 3, "three drops")
