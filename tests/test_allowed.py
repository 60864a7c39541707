"""What is allowed to guests beside their own addresses, with the programs that people use it for."""

import contextlib
import time

import pytest
from attacks import HOST4, HOST6, datagram
from conftest import PROGRAMS, need
from lab import Host, Namespace, block, process_file, run, wait_for

pytestmark = pytest.mark.slow
SHARED4, SHARED6 = "10.83.0.50", "2001:67c:83::50"
NETWORKS = ("10.99.0.0/24", "2001:67c:99::/64")
ROUTERS, ROUTED = ("10.99.0.1", "2001:67c:99::1"), ("10.99.0.2", "2001:67c:99::2")
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
    with contextlib.closing(Host(tmp_path_factory.mktemp("allowed"))) as host:
        host.start_guarded()
        guests = [host.client(name, f"10:66:6a:4c:a1:1{n}") for n, name in ((1, "one"), (2, "two"), (3, "third"))]
        for guest in guests:
            guest.dhcp4(guest.label)
            guest.dhcp6(guest.label)
        for guest in guests[:2]:
            host.update("--allow", guest.mac, SHARED4, SHARED6)
        host.settle()
        for guest in guests:
            guest.wait_pings(HOST4, HOST6)
        yield host, *guests


@contextlib.contextmanager
def keepalived(guest, priority):
    """keepalived runs in a guest; at the end it gives up its addresses, and what it started has ended, too."""
    config, text = guest.folder / "keepalived.conf", f"global_defs {{\n    router_id {guest.label}\n}}\n"
    for router, address in ((50, f"{SHARED4}/24"), (51, f"{SHARED6}/80")):
        text += KEEPALIVED.format(router=router, address=address, priority=priority)
    config.write_text(text)
    files = ["--pid", guest.folder / "pid", "--vrrp_pid", guest.folder / "vrrp.pid"]
    command = ["keepalived", "--dont-fork", "--vrrp", "--log-console", "--use-file", config, *files]
    with open(guest.folder / "keepalived.log", "a") as log:
        process = guest.start(*command, stdout=log, stderr=log)

    def running():
        pids = run("ip", "netns", "pids", guest.name).stdout.split()
        return any(process_file(pid, "comm") == "keepalived\n" for pid in pids)

    try:
        yield
    finally:
        guest.stop(process)
        wait_for(lambda: not running(), f"the end of keepalived in {guest.label}")


def wait_taken(host, guest):
    """Wait until the host reaches both shared addresses at a guest; return how many seconds that took."""
    begin = time.monotonic()
    for address in (SHARED4, SHARED6):
        wait_for(lambda a=address: host.finds(a, guest.mac), f"{address} at {guest.label}")
    return time.monotonic() - begin


@pytest.fixture(params=["made from the MAC address", "private"])
def link_local(request, guests):
    """The first two guests have link-local addresses of this kind."""
    swapping = guests[1:3] if request.param == "private" else ()
    swaps = [(guest, guest.addresses("fe80")[0], f"fe80::a1b2:c3d4:e5f6:{guest.port[-1]}") for guest in swapping]
    for guest, own, other in swaps:
        guest.ip(f"address add {other}/64 dev eth0 nodad", f"address delete {own}/64 dev eth0")
    yield
    for guest, own, other in swaps:
        guest.ip(f"address add {own}/64 dev eth0 nodad", f"address delete {other}/64 dev eth0")


@pytest.fixture
def shared(guests):
    """keepalived runs in the first two guests, of which the first has the shared addresses."""
    need("keepalived")
    host, one, two, _ = guests
    with keepalived(one, 150), keepalived(two, 100):
        wait_taken(host, one)
        yield


def test_shared_addresses_of_keepalived_go_to_the_other_guest_and_back(guests, link_local, shared):
    """When the first guest's cable is cut, and plugged in again; nothing that the guests send is dropped."""
    host, one, two, _ = guests
    before = host.dropped()
    host.run("ip", "link", "set", one.port, "down")
    there = wait_taken(host, two)
    host.run("ip", "link", "set", one.port, "up")
    back = wait_taken(host, one)
    print(f"reached at the other guest {there:.1f} s after the cut, and back after {back:.1f} s")
    assert host.dropped() == before


def test_vrrp_of_a_third_guest_takes_nothing_where_the_bridge_has_a_line_against_it(guests, shared):
    host, one, two, third = guests

    def held():
        return {SHARED4, SHARED6} & {*one.addresses(), *two.addresses()}

    with keepalived(third, 255):
        wait_for(lambda: not held(), "both guests give way to the third")
    wait_taken(host, one)
    rules = host.folder / "rules" / "bridge.nft"
    text = rules.read_text()
    assert text.count(LAST) == 1
    rules.write_text(text.replace(LAST, SPEAKERS + LAST))
    try:
        host.run(*host.applying())
        with keepalived(third, 255):
            # For each of two versions three advertisements, any of which had that effect
            wait_for(lambda: host.dropped(third.mac, "other protocol") >= 6, "drops of VRRP")
            assert {SHARED4, SHARED6} <= {*one.addresses()}
            wait_taken(host, one)
    finally:
        rules.write_text(text)
        host.run(*host.applying())


@pytest.fixture
def behind(guests):
    """A system with a network of its own behind the first guest, to which the host has routes by that guest."""
    host, one, *_ = guests
    with contextlib.closing(Namespace("behind")) as system:
        one.run("ip", "link", "add", "net0", "type", "veth", "peer", "name", "eth0", "netns", system.name)
        for end, device, addresses in ((one, "net0", ROUTERS), (system, "eth0", ROUTED)):
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


def test_network_behind_a_guest_is_reached_through_it_and_used_by_no_other(guests, behind):
    host, one, two, _ = guests
    host.run("nft", "flush", "set", "bridge", "instances", "instances_joining")  # it has not asked for a lease lately
    for address in ROUTED:
        before = host.dropped(one.mac, "not registered")

        def dropped(address=address, before=before):  # only when duplicate address detection on net0 is over
            assert not host.pings(address)
            return host.dropped(one.mac, "not registered") > before

        wait_for(dropped, f"the drop of an answer from {address}")
    host.update("--allow", one.mac, SHARED4, SHARED6, *NETWORKS)
    for node, addresses in ((host, ROUTED), (behind, (HOST4, HOST6))):
        for address in addresses:
            wait_for(lambda n=node, a=address: n.pings(a), f"{address} through the guest")
    one.run("ip", "neighbour", "flush", "dev", "eth0")  # the guest asks from there, too
    wait_for(lambda: one.pings(HOST4, "-I", ROUTERS[0]), "it")
    for source, destination in zip(ROUTED, (HOST4, HOST6)):
        before = host.dropped(two.mac, "not registered")
        two.send(bytes(datagram(two, source, destination)))
        wait_for(lambda b=before: host.dropped(two.mac, "not registered") > b, "its drop")
