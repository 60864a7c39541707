#!/usr/bin/env python3
"""Make the files that follow from the registry of instances: run by a systemd unit or cron.

They are a hosts file for dnsmasq, chains for nftables that hold instances on a bridge to their addresses, and sets
of addresses for firewall rules. Without an update it ends at once, so most imports wait until they are needed.
"""

import gc
import os
import sys
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton  # the module socket takes 6 ms to import

USAGE = """\
usage: instances-process.py [-f | --force]
       instances-process.py --help | --version

Where instances-update.py left its marker, or with --force: make BASE.hosts, BASE.nftables_chains and
BASE.nftables_sets of BASE.json. BASE is INSTANCES_BASE_PATH[-INSTANCES_BASE_ID], by default
/var/lib/misc/instances. INSTANCES_ADDRESS_SETS lists names that get address sets (host), and
INSTANCES_HOSTS_DOMAIN the domains of host names (.instance.internal), with commas between them.
With INSTANCES_GUARD=observe the chains count and name what they would drop, and let it pass (enforce).
INSTANCES_SLAAC lists /64 prefixes in which guests make addresses for themselves (none).
Exit status: 0 done, 10 no marker so nothing to do, 1 error and the marker left, 2 wrong usage."""

REASONS = (  # for a drop, in the set instances_dropped; 15 characters at most
    "ARP address",  # another's
    "IPv4 source",
    "IPv6 source",
    "NDP target",
    "NDP option",
    "not registered",  # an address that nobody has
    "too many claims",
    "DHCP message",
    "DHCP too often",
    "DHCP server",
    "router message",
    "multicast query",
    "malformed",
    "other protocol",
)
CHAINS = """\
# Fields that nftables has no name for, by their offset and length in bits:
#   @ll,0,24 . @ll,24,24       the two halves of the frame's destination MAC address, and of its source's
#   @ll,48,24 . @ll,72,24
#   @nh,64,24 . @nh,88,24      the sender's hardware address of ARP (RFC 826), its IPv4 address, and the one it asks for
#   @nh,112,32, @nh,192,32
#   @nh,96,32, @nh,128,32      the source and destination address of IPv4
#   @nh,64,128                 the source address of IPv6
#   @nh,64,64                  its prefix
#   @nh,128,24 . @nh,168,24    the halves of the MAC address that it is made from (RFC 4291, appendix A), and between
#   @nh,152,16                 them ff:fe
#   @th,64,128, @th,64,64 ...  the same of the target of a neighbour solicitation or advertisement (RFC 4861)
#   @th,64,16 or @th,192,16    the type and length of the first option of a router solicitation, or of one of these two,
#   @th,80,24 . @th,104,24     and the MAC address in that option
#   @th,208,24 . @th,232,24
#   @th,64,24, @th,256,32      operation, hardware type and length, and relay agent of a DHCP message (RFC 2131)
#   @th,192,32                 the address that the server gives by it
#   @th,288,24 . @th,312,24    the client's MAC address in it
#   @th,1984,24                its first option
#   @th,64,8                   the type of a DHCPv6 message (RFC 8415)
# What is counted from @th is found behind extension headers, too; what is counted from @nh would not be.
#
# nftables can't compare two fields of a frame, a and b. So (a, a) is put into a set, and (a, b) looked up there: it is
# found only if they are equal. In the last set, one bit of the MAC address is flipped.
set instances_same_mac {
    typeof @ll,48,24 . @ll,72,24 . @th,288,24 . @th,312,24
    size 65536; flags dynamic,timeout; timeout 1m
}
set instances_same_address {
    typeof @nh,128,32 . @th,192,32
    size 65536; flags dynamic,timeout; timeout 1m
}
set instances_same_eui64 {
    typeof @ll,48,24 . @ll,72,24 . @th,128,24 . @th,168,24
    size 65536; flags dynamic,timeout; timeout 1m
}
# An address in instances_prefixes that is not made from a MAC address belongs to who sends from it first (RFC 6620):
# these are the owners of addresses, the addresses that have an owner, and how many each MAC address has claimed lately.
set instances_claims {
    typeof @th,64,128 . ether saddr
    size 65536; flags dynamic,timeout; timeout 1d
}
set instances_claimed {
    typeof @th,64,128
    size 65536; flags dynamic,timeout; timeout 1d
}
set instances_claiming {
    type ether_addr
    size 65536; flags dynamic,timeout; timeout 1d
}
# The addresses of that kind that the host itself, or anybody behind an uplink, uses: they can't be claimed.
set instances_elsewhere {
    typeof @th,64,128 . ether saddr
    size 65536; flags dynamic,timeout; timeout 1d
}
set instances_elsewhere_used {
    typeof @th,64,128
    size 65536; flags dynamic,timeout; timeout 1d
}
# What the DHCP server has leased a moment ago, until the registry has it: the address, and the client's MAC address
set instances_leased {
    typeof @th,192,32 . @th,288,24 . @th,312,24
    size 65536; flags dynamic,timeout; timeout 5m
}
# Who has asked for an IPv6 lease lately, which the registry may not have yet
set instances_joining {
    type ether_addr
    size 65536; flags dynamic,timeout; timeout 5m
}
# How often each MAC address has asked for leases of each IP version, and of IPv6 how many octets: one message may ask
# for many leases.
set instances_asked {
    type ether_addr . inet_service
    size 65536; flags dynamic,timeout; timeout 1m
}
set instances_asked6 {
    type ether_addr
    size 65536; flags dynamic,timeout; timeout 5m
}
# Use, for what comes in by a guest's port, in prerouting: goto instances_guard
chain instances_guard {
    ether type vmap {
        ip : goto instances_guard_ip, ip6 : goto instances_guard_ip6, arp : goto instances_drop_arp
    }
    # A tag of priority only, as Windows sends it, is taken off by who receives it. Behind it, some rules match nothing.
    ether type 8021q vlan id 0 ip protocol { 1, 6, 17 } goto instances_guard_ip
    ether type 8021q vlan id 0 ip6 nexthdr { 6, 17 } goto instances_guard_ip6
    goto instances_reason_other_protocol
}
# Of TCP, and of datagrams with other ports than DHCP's, the source is all that there is to look at. What the fixed
# header says counts: behind extension headers, in a fragment, TCP may be said to be there where it is not.
chain instances_guard_ip {
    udp dport { 67, 547 } jump instances_ask
    jump instances_drop_ip
    ip protocol 6 return
    udp sport != { 67, 547 } udp dport != { 67, 68, 546, 547 } return
    meta l4proto { 2, 51, 58, 103 } jump instances_drop_query
    jump instances_drop_rogue
}
chain instances_guard_ip6 {
    udp dport { 67, 547 } jump instances_ask
    icmpv6 type nd-neighbor-advert jump instances_drop_ndp
    jump instances_drop_ip6
    ip6 nexthdr 6 return
    ip6 nexthdr 17 udp sport != { 67, 547 } udp dport != { 67, 68, 546, 547 } return
    meta l4proto { 2, 51, 58, 103 } jump instances_drop_query
    jump instances_drop_rogue
}
# A client asks once or twice when it boots. A DHCP server serves one after the other.
chain instances_ask {
    ip frag-off & 0x1fff != 0 return
    exthdr frag exists frag frag-off != 0 return
    jump instances_drop_dhcp
    update @instances_asked { ether saddr . udp dport limit rate over 10/minute burst 10 packets } \\
        goto instances_reason_dhcp_too_often
    udp dport 547 update @instances_joining { ether saddr }
    udp dport 547 update @instances_asked6 { ether saddr limit rate over 400 bytes/minute burst 1200 bytes } \\
        goto instances_reason_dhcp_too_often
    # From any address: a lease that is not registered is renewed, too, and the server then tells the registry.
    udp sport 68 udp dport 67 ip daddr . ether daddr @instances_ip accept
    udp sport 68 udp dport 67 ip daddr 255.255.255.255 accept
}
# Use, in forward, but for what goes to the DHCP server's port: goto instances_drop_request
chain instances_drop_request {
    # What clients ask all is for no guest, and not held against them.
    ip frag-off & 0x1fff != 0 return
    exthdr frag exists frag frag-off != 0 return
    udp dport { 67, 547 } goto instances_verdict
}
# Use, for what the host sends, in output: goto instances_sent
chain instances_sent {
    # In its own name, since it may route what looks like a lease of its own.
    udp sport 67 udp dport 68 ip saddr . ether saddr @instances_ip goto instances_learn_lease
    icmpv6 type { nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } goto instances_learn
}
# Use, for what comes in by an uplink: icmpv6 type { nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } jump \\
# instances_learn
chain instances_learn {
    ip6 hoplimit != 255 return
    icmpv6 type nd-neighbor-advert jump instances_learn_target
    ip6 saddr :: icmpv6 type nd-neighbor-solicit goto instances_learn_probe
    @nh,64,64 @instances_prefixes @nh,152,16 != 0xfffe \\
        update @instances_elsewhere { @nh,64,128 . ether saddr } update @instances_elsewhere_used { @nh,64,128 }
}
chain instances_learn_target {
    @th,64,64 @instances_prefixes @th,152,16 != 0xfffe \\
        update @instances_elsewhere { @th,64,128 . ether saddr } update @instances_elsewhere_used { @th,64,128 }
}
# Duplicate address detection tells of a new address, but for a guest that has it already.
chain instances_learn_probe {
    @th,64,128 != @instances_claimed jump instances_learn_target
}
# Use, for what comes in by the port of the DHCP server: udp sport 67 udp dport 68 jump instances_learn_lease
chain instances_learn_lease {
    # A DHCPACK to an Ethernet client: servers write its type as the first option.
    ip frag-off & 0x3fff == 0 @th,64,24 0x020106 @th,1984,24 0x350105 @th,192,32 != @instances_taken \\
        goto instances_learn_ack
}
chain instances_learn_ack {
    # It is sent to all, or to the client, at the address that it gives (RFC 2131, section 4.1). What looks like one,
    # but was routed here, is sent to somebody who has another address.
    ip daddr 255.255.255.255 update @instances_leased { @th,192,32 . @th,288,24 . @th,312,24 }
    update @instances_same_address { @nh,128,32 . @nh,128,32 }
    update @instances_same_mac { @ll,0,24 . @ll,24,24 . @ll,0,24 . @ll,24,24 }
    @nh,128,32 . @th,192,32 @instances_same_address @ll,0,24 . @ll,24,24 . @th,288,24 . @th,312,24 \\
        @instances_same_mac update @instances_leased { @th,192,32 . @th,288,24 . @th,312,24 }
}
# Use: ether type arp goto instances_drop_arp
chain instances_drop_arp {
    arp saddr ip . ether saddr @instances_ip arp saddr ip . arp saddr ether @instances_ip return
    arp saddr ip 0.0.0.0 goto instances_drop_probe
    @nh,112,32 @instances_taken goto instances_reason_arp_address
    update @instances_same_mac { @ll,48,24 . @ll,72,24 . @ll,48,24 . @ll,72,24 }
    @nh,112,32 . @ll,48,24 . @ll,72,24 @instances_leased \\
        @ll,48,24 . @ll,72,24 . @nh,64,24 . @nh,88,24 @instances_same_mac return
    # Linux asks from any of its addresses, also from one in a network that it routes.
    arp operation request arp saddr ip . ether saddr @instances_net arp saddr ip . arp saddr ether @instances_net return
    goto instances_reason_not_registered
}
# A probe asks whether anybody has an address that the sender is to use (RFC 5227).
chain instances_drop_probe {
    arp daddr ip . ether saddr @instances_ip return
    @nh,192,32 @instances_taken goto instances_reason_arp_address
    @nh,192,32 . @ll,48,24 . @ll,72,24 @instances_leased return
    goto instances_reason_not_registered
}
# Use: ether type ip6 icmpv6 type nd-neighbor-advert jump instances_drop_ndp
chain instances_drop_ndp {
    # Neighbour discovery does not come in fragments (RFC 6980).
    exthdr frag exists goto instances_reason_malformed
    @th,64,128 . ether saddr @instances_ip6 return
    @th,64,64 @instances_prefixes goto instances_claim_target
    @th,64,128 @instances_taken6 goto instances_reason_ndp_target
    # Who has asked for a lease may have one that is not registered yet: this is not held against it.
    ether saddr @instances_joining goto instances_verdict
    goto instances_reason_not_registered
}
# Use: ether type ip jump instances_drop_ip
chain instances_drop_ip {
    ip saddr . ether saddr @instances_ip return
    ip saddr . ether saddr @instances_net return
    ip saddr 0.0.0.0 ip daddr 255.255.255.255 ip frag-off & 0x3fff == 0 udp sport 68 udp dport 67 return
    # Without an address, systems join multicast groups.
    ip saddr 0.0.0.0 goto instances_verdict
    @nh,96,32 @instances_taken goto instances_reason_ipv4_source
    @nh,96,32 . @ll,48,24 . @ll,72,24 @instances_leased return
    goto instances_drop_stranger
}
# Use: ether type ip6 jump instances_drop_ip6
chain instances_drop_ip6 {
    # Of what is not ICMPv6, which may speak of further addresses, the source is all that there is to look at.
    meta l4proto != 58 @nh,64,128 . ether saddr @instances_ip6 return
    # Duplicate address detection, router solicitation and listener reports of a sender without an address
    ip6 saddr :: icmpv6 type nd-neighbor-solicit goto instances_drop_ndp
    ip6 saddr :: icmpv6 type { nd-router-solicit, mld-listener-report, mld2-listener-report } return
    icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } jump instances_drop_lladdr
    @nh,64,128 . ether saddr @instances_ip6 return
    ip6 saddr . ether saddr @instances_net6 return
    @nh,64,64 @instances_prefixes goto instances_drop_self_made
    @nh,64,128 @instances_taken6 goto instances_reason_ipv6_source
    goto instances_drop_stranger
}
# A link-layer address option (RFC 4861, section 4.6.1) is a message's first option, and is the frame's MAC address.
chain instances_drop_lladdr {
    exthdr frag exists goto instances_reason_malformed
    update @instances_same_mac { @ll,48,24 . @ll,72,24 . @ll,48,24 . @ll,72,24 }
    icmpv6 type nd-router-solicit @th,64,16 != 0x0101 goto instances_reason_ndp_option
    icmpv6 type nd-router-solicit @ll,48,24 . @ll,72,24 . @th,80,24 . @th,104,24 \\
        != @instances_same_mac goto instances_reason_ndp_option
    icmpv6 type nd-neighbor-solicit @th,192,16 != 0x0101 goto instances_reason_ndp_option
    icmpv6 type nd-neighbor-advert @th,192,16 != 0x0201 goto instances_reason_ndp_option
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } @ll,48,24 . @ll,72,24 . @th,208,24 . @th,232,24 \\
        != @instances_same_mac goto instances_reason_ndp_option
}
# From an address that the sender has made itself, all is let through, but for the link-local one of a newcomer.
chain instances_drop_self_made {
    jump instances_claim_source
    @nh,64,64 != 0xfe80000000000000 return
    ether saddr @instances_macs return
    icmpv6 type {
        nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert,
        mld-listener-report, mld-listener-done, mld2-listener-report
    } return
    ip6 daddr ff02::1:2 udp sport 546 udp dport 547 return
    goto instances_drop_stranger
}
# Of who is not registered, the reason is the worst that it does. What systems send to all while they start, such as
# multicast DNS, is not held against them, nor an answer that a former address is no longer theirs (Linux sends it when
# a neighbour still probes for that), nor the use of a lease that is not registered yet.
chain instances_drop_stranger {
    jump instances_drop_query
    jump instances_drop_rogue
    meta l4proto 17 ip6 daddr ff00::/8 goto instances_verdict
    icmpv6 type destination-unreachable goto instances_verdict
    meta protocol ip6 ether saddr @instances_joining goto instances_verdict
    goto instances_reason_not_registered
}
# A guest's own address is made from its MAC address, or was claimed by it: its use renews the claim. What is registered
# to another, or used elsewhere or by another, is dropped. What has no owner is claimed, so many addresses an hour. Who
# was elsewhere, and has moved to a port of this bridge, claims what it had.
chain instances_claim_target {
    @th,64,128 @instances_taken6 goto instances_reason_ndp_target
    @th,152,16 0xfffe goto instances_own_target
    @th,64,128 @instances_elsewhere_used jump instances_moved_target
    @th,64,128 . ether saddr @instances_claims update @instances_claims { @th,64,128 . ether saddr } \\
        update @instances_claimed { @th,64,128 } return
    @th,64,128 @instances_claimed goto instances_reason_ndp_target
    update @instances_claiming { ether saddr limit rate over 10/hour burst 50 packets } \\
        goto instances_reason_too_many_claims
    add @instances_claimed { @th,64,128 } add @instances_claims { @th,64,128 . ether saddr } return
    goto instances_reason_too_many_claims
}
chain instances_own_target {
    update @instances_same_eui64 { @ll,48,24 . @ll,72,24 . @ll,48,24 ^ 0x020000 . @ll,72,24 }
    @ll,48,24 . @ll,72,24 . @th,128,24 . @th,168,24 @instances_same_eui64 return
    goto instances_reason_ndp_target
}
chain instances_moved_target {
    @th,64,128 . ether saddr @instances_elsewhere update @instances_claims { @th,64,128 . ether saddr } \\
        update @instances_claimed { @th,64,128 } return
    goto instances_reason_ndp_target
}
chain instances_claim_source {
    @nh,64,128 @instances_taken6 goto instances_reason_ipv6_source
    @nh,152,16 0xfffe goto instances_own_source
    @nh,64,128 @instances_elsewhere_used jump instances_moved_source
    @nh,64,128 . ether saddr @instances_claims update @instances_claims { @nh,64,128 . ether saddr } \\
        update @instances_claimed { @nh,64,128 } return
    @nh,64,128 @instances_claimed goto instances_reason_ipv6_source
    update @instances_claiming { ether saddr limit rate over 10/hour burst 50 packets } \\
        goto instances_reason_too_many_claims
    add @instances_claimed { @nh,64,128 } add @instances_claims { @nh,64,128 . ether saddr } return
    goto instances_reason_too_many_claims
}
chain instances_own_source {
    update @instances_same_eui64 { @ll,48,24 . @ll,72,24 . @ll,48,24 ^ 0x020000 . @ll,72,24 }
    @ll,48,24 . @ll,72,24 . @nh,128,24 . @nh,168,24 @instances_same_eui64 return
    goto instances_reason_ipv6_source
}
chain instances_moved_source {
    @nh,64,128 . ether saddr @instances_elsewhere update @instances_claims { @nh,64,128 . ether saddr } \\
        update @instances_claimed { @nh,64,128 } return
    goto instances_reason_ipv6_source
}
# Use: udp dport { 67, 547 } jump instances_drop_dhcp
chain instances_drop_dhcp {
    # Behind a first fragment there are no ports, whatever it looks like; and no client sends DHCP in fragments.
    ip frag-off & 0x1fff != 0 return
    exthdr frag exists frag frag-off != 0 return
    ip frag-off & 0x3fff != 0 goto instances_reason_malformed
    exthdr frag exists goto instances_reason_malformed
    # A client's own request (RFC 2131, section 2): of Ethernet, not relayed, its hardware address the frame's. The
    # server's field for an address is empty: in its answer to an Inform it might repeat it, as if it were a lease.
    update @instances_same_mac { @ll,48,24 . @ll,72,24 . @ll,48,24 . @ll,72,24 }
    udp dport 67 @th,64,24 0x010106 @th,256,32 0 @th,192,32 0 @ll,48,24 . @ll,72,24 . @th,288,24 . @th,312,24 \\
        @instances_same_mac return
    # Solicit, Request, Confirm, Renew, Information-request (RFC 8415, section 7.3), from a link-local address, which no
    # two guests share: by it the server finds the client's MAC address. By Rebind, dnsmasq grants any address.
    udp dport 547 @nh,64,64 0xfe80000000000000 @th,64,8 { 1, 3, 4, 5, 11 } return
    goto instances_reason_dhcp_message
}
# Use: meta l4proto { 2, 51, 58, 103 } jump instances_drop_query
chain instances_drop_query {
    # A bridge that believes a query sends multicast, and with it neighbour solicitations, only to those who answered:
    # nobody, if the query never came to them. Whoever speaks as a multicast router (PIM, and RFC 4286) hears all
    # multicast. A query may hide in a fragment of IGMP, or of IPv6 behind an authentication header (51), where its type
    # can't be looked at.
    icmpv6 type { mld-listener-query, 151, 152, 153 } goto instances_reason_multicast_query
    ip protocol 2 ip frag-off & 0x1fff != 0 goto instances_reason_multicast_query
    ip protocol 2 igmp type != { 0x12, 0x16, 0x17, 0x22 } goto instances_reason_multicast_query
    exthdr hbh exists meta l4proto 51 goto instances_reason_multicast_query
    meta l4proto 103 goto instances_reason_multicast_query
}
# Use: jump instances_drop_rogue
chain instances_drop_rogue {
    ip frag-off & 0x1fff != 0 return
    exthdr frag exists frag frag-off != 0 return
    icmpv6 type { nd-router-advert, nd-redirect } goto instances_reason_router_message
    udp sport { 67, 547 } goto instances_reason_dhcp_server
    udp dport { 68, 546 } goto instances_reason_dhcp_server
    # A first fragment has all headers up to the upper layer's (RFC 7112, section 5), and that right behind its own.
    exthdr frag exists frag nexthdr { 0, 43, 44, 51, 60 } goto instances_reason_malformed
    # What nftables can't parse has no protocol and does not match; a client that reads raw frames may parse it.
    meta l4proto != 255 return
    meta protocol { ip, ip6 } goto instances_reason_malformed
}
"""
SETS = {"v4": ["ipv4"], "v6": ["ipv6_gua", "ipv6_ula"], "g6": ["ipv6_gua"], "u6": ["ipv6_ula"], "l6": ["ipv6_lla"]}
# Of addresses, in the order of the hosts file, with the subdomains of the names that have them. dnsmasq answers reverse
# questions with the first.
FIELDS = {
    "ipv4": ("", ".v4"),
    "ipv6_gua": ("", ".v6", ".g6"),
    "ipv6_ula": ("", ".v6", ".u6"),
    "ipv6_lla": (".l6",),
}


# ---- Shared: these lines stand in both scripts, and a test keeps them the same ----
VERSION = "4.0"


def say(message, descriptor=2):
    """Write one line of printable ASCII, on standard error unless told otherwise."""
    line = ascii(f"{os.path.basename(sys.argv[0])}: {message}")[1:-1]
    try:
        os.write(descriptor, f"{line}\n".encode())
    except OSError:  # what is done is done, whether or not anybody reads of it
        pass


def base_path():
    """Return the path that every file's name begins with. ValueError if INSTANCES_BASE_ID is bad."""
    path = os.environ.get("INSTANCES_BASE_PATH") or "/var/lib/misc/instances"
    suffix = os.environ.get("INSTANCES_BASE_ID") or ""
    if suffix[:1] in ("_", "-", ".") or not all(c.isascii() and c.isalnum() or c in "_-." for c in suffix):
        raise ValueError(f"INSTANCES_BASE_ID={suffix}: use letters, digits, _ - ., the first no _ - .")
    return f"{path}-{suffix}" if suffix else path


def is_mac(text):
    """Tell whether this is one station's Ethernet address as the registry has it: lower case, with colons."""
    digits = text.replace(":", "")
    plain = len(digits) == 12 and text[2::3] == ":::::" and not digits.strip("0123456789abcdef")
    return plain and digits[1] in "02468ace"


def is_name(text):
    """Tell whether this is a label of RFC 1035, section 2.3.1: Incus's rule for names too."""
    plain = text.replace("-", "")
    return plain.isascii() and plain.isalnum() and text[0].isalpha() and text[-1] != "-" and len(text) < 64


def parse_address(text):
    """Return an address's field ("" if its kind has none) and RFC 5952 form. ValueError if it is no address."""
    try:
        packed = inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except (OSError, TypeError, ValueError):
        raise ValueError(f"{text}: not an IP address") from None
    if len(packed) == 4:
        return "ipv4", text
    # RFC 3587; documentation: RFC 3849, RFC 9637; RFC 4193, section 3.1; RFC 4291, section 2.5.6. Written out, since
    # what the module ipaddress says changes with Python
    first = packed.hex()
    gua = "2" <= first < "4" and not first.startswith(("20010db8", "3fff0"))
    other = "ipv6_ula" if "fc" <= first < "fe" else "ipv6_lla" if "fe8" <= first < "fec" else ""
    return "ipv6_gua" if gua else other, inet_ntop(AF_INET6, packed)


def parse_allowed(text):
    """Return an address or network to be allowed as a network of the module ipaddress. ValueError if it must not be."""
    import ipaddress

    network = ipaddress.ip_network(text)
    if "%" in text:
        raise ValueError(f"{text}: an address without a zone, please")
    if not network.prefixlen:
        raise ValueError(f"{text}: can't be allowed: a port that leads to a router is an uplink in bridge.nft")
    # Unspecified, of the host itself, link-local, multicast, broadcast: RFC 6890, section 2.2; RFC 4291, section 2.4
    never = ["0.0.0.0/32", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"]
    for other in [*never, "::/127", "fe80::/10", "ff00::/8"]:
        if network.overlaps(ipaddress.ip_network(other)):
            raise ValueError(f"{text}: has addresses of {other}, which can't be a guest's")
    return network


def locked(base):
    """Take the registry's lock, to be held in a with statement. OSError, with its name, if it is not free for 10 s."""
    try:
        from filelock import FileLock
    except ImportError:
        how = "apt-get install python3-filelock, or pip install filelock"
        raise ValueError(f"{sys.executable} has no filelock: {how}") from None
    os.stat(os.path.dirname(base) or ".")  # newer releases of filelock would make the directory
    return FileLock(base + ".lock", timeout=10).acquire()


def read_registry(path, lenient=False):
    """Return the registry, {} where there is no file. ValueError if it is no object of objects; if lenient, {}."""
    import json

    try:
        with open(path, "rb") as file:
            registry = json.loads(file.read())
        if isinstance(registry, dict) and all(isinstance(instance, dict) for instance in registry.values()):
            return registry
        raise ValueError("no JSON object of objects")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        if lenient:
            return {}
        raise ValueError(f"{path}: mend it or move it away: {error}") from None


def sync_folder(path):
    """Have the names in a file's folder on disk."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(folder)


def make_marker(base):
    """Make the marker that the outputs are older than the registry, on disk on return."""
    open(base + ".updated", "a").close()
    sync_folder(base)


def replace_file(path, text):
    """Replace a file as a whole, on disk on return; keep mode, owner and a link. OSError leaves old or new, whole."""
    path = os.path.realpath(path)
    temporary = path + ".tmp"
    try:
        if os.path.lexists(temporary):  # of a run that was killed
            os.unlink(temporary)
        with open(temporary, "x", encoding="ascii") as file:  # x follows no link
            if os.path.exists(path):
                old = os.stat(path)
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), old.st_mode & 0o7777)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        sync_folder(path)
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from None


def run(main):
    """Return main's exit status; an error becomes one line and the status 1."""
    os.umask(os.umask(0o133) | 0o133)  # nothing is made wider than 0644, not even by filelock
    try:
        if sys.argv[1:] == ["--version"]:
            say(VERSION, 1)
            return 0
        return main(sys.argv[1:])
    # filelock says by a RuntimeError that a file system has no locks
    except (OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
        root = ": run it as root" if isinstance(error, PermissionError) and os.geteuid() else ""
        say(f"error: {str(error) or 'interrupted'}{root}")
        return 1


# ---- End of the shared lines ----


def is_domain(text):
    """Tell whether this is a domain, its labels as in RFC 1123, section 2.1; its first dot may be left out."""
    subdomain = max(len(sub) for subs in FIELDS.values() for sub in subs)
    longest = 253 - 63 - subdomain  # RFC 1035, section 2.3.4: 255 octets, less a name before it
    labels = text.removeprefix(".").split(".")
    valid = all(is_name("a" + label[1:]) and label[:1].isalnum() for label in labels)  # or with a digit first
    return valid and text.isascii() and len(text) <= longest


def listed(variable, default, is_valid):
    """Return the valid items of an environment variable's list, each once; warn of the others."""
    items = dict.fromkeys(item.strip() for item in (os.environ.get(variable) or default).split(","))
    for item in items:
        if not is_valid(item):
            say(f"warning: {variable}: '{item}' is left out, it is not valid")
    return [item for item in items if is_valid(item)]


def slaac_prefix(text):
    """Return the 8 octets of a prefix for SLAAC (RFC 4862). ValueError if it is no global or unique local /64."""
    address, _, length = text.partition("/")
    try:
        field, packed = parse_address(address)[0], inet_pton(AF_INET6, address)
    except (OSError, ValueError):
        field, packed = "", b""
    if length != "64" or field not in ("ipv6_gua", "ipv6_ula") or any(packed[8:]):
        raise ValueError(f"INSTANCES_SLAAC: {text}: write a global or unique local prefix such as 2001:67c:83::/64")
    return packed[:8]


def read_allowed(allowed):
    """Return the packed addresses and the networks of a list of what is allowed, and why others are left out."""
    addresses, networks, left = [], [], []
    for item in allowed if isinstance(allowed, list) else [allowed]:
        try:
            network = parse_allowed(str(item))
        except ValueError as error:
            left.append(str(error))
            continue
        if network.num_addresses == 1:
            addresses.append(network.network_address.packed)
        else:
            networks.append(network)
    networks = [n for n in networks if not any(n != m and n.version == m.version and n.subnet_of(m) for m in networks)]
    return dict.fromkeys(addresses), dict.fromkeys(networks), left


def read_instances(registry):
    """Return (MAC address, name, {field: address}, allowed addresses, networks) of each instance, and a warning of each
    thing that is left out."""
    instances, warnings = [], []
    for mac, instance in registry.items():
        if not is_mac(mac):
            warnings.append(f"{mac}: left out, it is no MAC address in lower case")
            continue
        name = instance.get("name", "")
        if name != "" and not (isinstance(name, str) and is_name(name)):
            warnings.append(f"{mac}: name {name} left out, it is not valid")
            name = ""
        addresses = {}
        for field in FIELDS:
            if field in instance:
                text = instance[field]
                try:
                    valid = parse_address(text) == (field, text)
                except ValueError:
                    valid = False
                if valid:
                    addresses[field] = text
                else:
                    warnings.append(f"{mac}: {field} {text} left out, no {field} in RFC 5952 form")
        *allowed, left = read_allowed(instance["allowed"]) if "allowed" in instance else ((), (), ())
        warnings += [f"{mac}: allowed {error}, left out" for error in left]
        instances.append((mac, name, addresses, *allowed))
    return instances, warnings


def hosts_text(instances, domains):
    """Return the hosts file: for each domain, a line for each address of a named instance."""
    lines = []
    for domain in domains:
        names = {field: " ".join(f"*{sub}{domain}" for sub in subs) for field, subs in FIELDS.items()}
        for _, name, addresses, *_ in instances:
            if name:  # to replace once a line is twice as fast as to format each name
                lines += [f"{address} {names[field].replace('*', name)}\n" for field, address in addresses.items()]
    return "".join(lines)


def sets_text(instances, names):
    """Return five sets of the addresses of all instances, and five for each of the names."""
    groups = {"all_": instances}
    for name in names:
        groups[name.replace("-", "_") + "."] = [row for row in instances if row[1].lower() == name.lower()]
    lines = []
    for prefix, rows in groups.items():
        for suffix, fields in SETS.items():
            name = f"{prefix}{suffix}.instance"
            elements = [addresses[field] for _, _, addresses, *_ in rows for field in fields if field in addresses]
            lines += [f"# Use: @{name}", f"set {name} {{", f"    type {'ipv4' if suffix == 'v4' else 'ipv6'}_addr"]
            lines += [f"    elements = {{ {', '.join(elements)}, }}", "}"] if elements else ["}"]
    return "\n".join([*lines, ""])


def chains_text(instances, prefixes, verdict):
    """Return the chains, behind the sets in which they look up who may send from an address.

    The prefixes (packed, 8 octets) are those in which guests make addresses for themselves, beside the link-local one.
    """
    ip, ip6, net, net6, taken, taken6, macs = [], [], [], [], {bytes(4): None}, {}, []
    for mac, name, addresses, allowed, networks in instances:
        owner = f' . {mac} comment "{name}",\n' if name else f" . {mac},\n"
        packed = {inet_pton(AF_INET if field == "ipv4" else AF_INET6, text): field for field, text in addresses.items()}
        for address in {**packed, **dict.fromkeys(allowed)}:
            if len(address) == 4:
                ip.append(f"        {inet_ntop(AF_INET, address)}{owner}")
                taken[address] = None
            else:
                ip6.append(f"        0x{address.hex()}{owner}")
                # An address that is made from a MAC address is that MAC address's alone as it is.
                if packed.get(address) != "ipv6_lla" or address[11:13] != b"\xff\xfe":
                    taken6[address] = None
        for network in networks:
            (net if network.version == 4 else net6).append(f"        {network}{owner}")
        macs.append(f"        {mac},\n")
    own = dict.fromkeys((b"\xfe\x80" + bytes(6), *prefixes))
    hexadecimal = [[f"        0x{value.hex()},\n" for value in values] for values in (taken, taken6, own)]
    text = ""
    for name, key, options, elements in (
        ("ip", "ip saddr . ether saddr", "", ip),
        ("ip6", "@th,64,128 . ether saddr", "", ip6),
        ("net", "ip saddr . ether saddr", "    flags interval\n", net),
        ("net6", "ip6 saddr . ether saddr", "    flags interval\n", net6),
        ("taken", "@th,192,32", "", hexadecimal[0]),
        ("taken6", "@th,64,128", "", hexadecimal[1]),
        ("prefixes", "@th,64,64", "", hexadecimal[2]),
        ("macs", "ether saddr", "", macs),
    ):
        body = f"    elements = {{\n{''.join(elements)}    }}\n" if elements else ""
        text += f"set instances_{name} {{\n    typeof {key}\n{options}{body}}}\n"
    # Who sent what was dropped, why, and how much of it. To count and to drop are two rules: a full set ends a rule.
    text += "set instances_dropped {\n    type ether_addr . ifname\n    size 65536; flags dynamic; counter\n}\n"
    text += f"chain instances_verdict {{\n    {verdict}\n}}\n"
    for reason in REASONS:
        text += f"chain instances_reason_{reason.lower().replace(' ', '_')} {{\n"
        text += f'    update @instances_dropped {{ ether saddr . "{reason}" }}\n    goto instances_verdict\n}}\n'
    return text + CHAINS


def main(arguments):
    """Make the files; return the exit status."""
    if arguments in (["-h"], ["--help"]):
        os.write(1, f"{USAGE}\n".encode())
        return 0
    if arguments not in ([], ["-f"], ["--force"]):
        say(f"error: {' '.join(arguments) or 'nothing'}: no such usage: see --help")
        return 2
    base = base_path()
    if not arguments and not os.path.lexists(base + ".updated"):
        return 10
    guard = os.environ.get("INSTANCES_GUARD") or "enforce"
    if guard not in ("enforce", "observe"):
        raise ValueError(f"INSTANCES_GUARD={guard}: it is enforce or observe")
    prefixes = [slaac_prefix(text.strip()) for text in os.environ.get("INSTANCES_SLAAC", "").split(",") if text.strip()]
    names = listed("INSTANCES_ADDRESS_SETS", "host", is_name)
    domains = listed("INSTANCES_HOSTS_DOMAIN", ".instance.internal", is_domain)
    domains = dict.fromkeys("." + domain.removeprefix(".") for domain in domains)
    for domain in domains:
        if domain.lower().endswith(".local"):
            say(f"warning: INSTANCES_HOSTS_DOMAIN: names in {domain} may be asked by multicast DNS only (RFC 6762)")
    gc.disable()  # there is no garbage to look for
    with locked(base):
        make_marker(base)  # there until all three files are made, also where a run by force is killed half-way
        registry = read_registry(base + ".json")
        if os.path.exists(base + ".prefixes"):  # examples/lan learns them from the LAN's router
            with open(base + ".prefixes") as file:
                prefixes += map(slaac_prefix, file.read().split())
        instances, warnings = read_instances(registry)
        hosts, sets = hosts_text(instances, domains), sets_text(instances, names)
        chains = chains_text(instances, prefixes, "accept" if guard == "observe" else "drop")
        replace_file(base + ".hosts", hosts)
        replace_file(base + ".nftables_chains", chains)
        replace_file(base + ".nftables_sets", sets)
        os.unlink(base + ".updated")
    for warning in warnings:
        say(f"warning: {warning}")
    lines, count = hosts.count("\n"), sets.count("# Use")
    elements = sum(len(column) for _, _, *columns in instances for column in columns)
    say(f"{len(registry)} instances, {lines} host addresses, {elements} set elements, {count} address sets")
    return 0


if __name__ == "__main__":
    os._exit(run(main))  # at once: to take Python apart costs a lease event a sixth of its time
