#!/usr/bin/env python3
"""Breaks each promise of tests/README.md in a copy of this project, and sees that the test for it fails there.

usage: python3 tests/mutants.py [WORD...]   as root: those whose promise has one of these words, four at a time
Exit status: 0 all are noticed, 1 not so. The tests pass without that: the first page's command runs them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOP = Path(__file__).parent.parent
CHAINS, UPDATE = "instances-process.py", "instances-update.py"
RULES, DNSMASQ = "nftables/bridge.nft", "dnsmasq/br0.conf"  # of examples
SAME = "@ll,48,24 . @ll,72,24 . @th,288,24 . @th,312,24 \\\\\n        @instances_same_mac return"
CACHE = "bridge::test_neighbour_cache_is_not_poisoned[registered-host]"
LEASE = "identity::test_messages_in_the_name_of_another_or_for_an_address_of_nobody_are_dropped"
# (promise, file, text, its replacement, the test that must fail)
MUTANTS = [
    # Nobody is let in
    ("ARP", CHAINS, "@nh,112,32 @instances_taken goto instances_reason_arp_address",
     "@nh,112,32 @instances_taken return", CACHE),
    ("advertisements", CHAINS, "    icmpv6 type nd-neighbor-advert jump instances_drop_ndp\n", "", CACHE),
    ("advertisements behind options", CHAINS, "@th,64,128 . ether saddr @instances_ip6 return\n    @th,64,64",
     "@nh,384,128 . ether saddr @instances_ip6 return\n    @th,64,64", CACHE),
    ("IPv6 sources", CHAINS, "@nh,64,128 @instances_taken6 goto instances_reason_ipv6_source\n    goto",
     "@nh,64,128 @instances_taken6 return\n    goto", CACHE),
    ("IPv4 sources", CHAINS, "@nh,96,32 @instances_taken goto instances_reason_ipv4_source",
     "@nh,96,32 @instances_taken return",
     "bridge::test_datagram_from_a_forged_source_does_not_arrive[registered-host-ipv4]"),
    ("router advertisements", CHAINS, "{ nd-router-advert, nd-redirect } goto", "{ nd-redirect } goto",
     "bridge::test_router_advertisement_makes_no_route[registered]"),
    ("redirects", CHAINS, "{ nd-router-advert, nd-redirect } goto", "{ nd-router-advert } goto",
     "bridge::test_redirect_changes_no_route[registered]"),
    ("DHCP servers, to the client's port", CHAINS, "    udp dport { 68, 546 } goto instances_reason_dhcp_server\n", "",
     "bridge::test_rogue_server_gives_no_lease[bystander]"),
    ("DHCP servers, from theirs", CHAINS, "    udp sport { 67, 547 } goto instances_reason_dhcp_server\n", "",
     "bridge::test_datagram_from_or_to_a_port_of_dhcp_servers_or_clients_is_dropped"),
    ("duplicate address detection", CHAINS, "ip6 saddr :: icmpv6 type nd-neighbor-solicit goto instances_drop_ndp",
     "ip6 saddr :: icmpv6 type nd-neighbor-solicit return",
     "bridge::test_false_claim_makes_nobody_give_an_address_up[registered]"),
    ("first come, first served", CHAINS, "@th,64,128 @instances_claimed goto instances_reason_ndp_target",
     "@th,64,128 @instances_claimed return",
     "claims::test_link_local_address_is_its_first_sender_s[registered]"),
    ("claims without end", CHAINS, "10/hour burst 50 packets", "1000/second burst 5000 packets",
     "claims::test_guest_that_claims_without_end_keeps_nobody_out[registered]"),
    ("addresses behind an uplink", RULES,
     "        icmpv6 type { nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } jump",
     "        icmpv6 type 255 jump",
     "claims::test_link_local_address_of_a_router_behind_an_uplink_cannot_be_claimed[registered]"),
    ("addresses by SLAAC", CHAINS, "@th,64,64 @instances_prefixes goto instances_claim_target",
     "@th,64,64 @instances_prefixes return",
     "claims::test_address_that_a_guest_has_made_by_slaac_is_its_own[registered]"),
    ("claims outlive a load", RULES, "flush set bridge instances instances_macs\n",
     "flush set bridge instances instances_macs\nadd set bridge instances instances_claims { "
     "typeof @th,64,128 . ether saddr; size 65536; flags dynamic,timeout; timeout 1d; }\n"
     "flush set bridge instances instances_claims\n",
     "claims::test_claims_outlive_a_load_of_the_rule_file_by_hand_but_not_the_guest_s_entry_in_the_registry"),
    ("allowed networks", CHAINS, "    arp operation request arp saddr ip . ether saddr @instances_net",
     "    arp saddr ip . ether saddr @instances_net",
     "claims::test_allowed_address_is_used_and_announced_by_those_who_are_allowed_only[10.99.0.7]"),
    # Nobody is kept out
    ("a lease is known when it is given", CHAINS, "        goto instances_learn_ack\n", "        return\n",
     "joining::test_first_frames_after_a_lease_pass_before_the_registry_is_in_force"),
    ("newcomers", CHAINS, "@nh,128,24 . @nh,168,24 @instances_same_eui64 return",
     "@nh,128,24 . @nh,168,24 @instances_same_eui64 drop",
     "joining::test_ten_guests_that_start_at_once_are_all_registered_and_reach_the_host[0]"),
    ("honest clients are not told as dropped", CHAINS,
     "@nh,192,32 . @ll,48,24 . @ll,72,24 @instances_leased return\n", "\n",
     "clients::test_client_gets_registered_addresses_with_which_it_reaches_the_host_and_nothing_is_dropped[dhcpcd]"),
    ("who is not registered renews", CHAINS, "    udp sport 68 udp dport 67 ip daddr 255.255.255.255 accept\n", "",
     "claims::test_running_guest_that_is_not_registered_is_so_again_when_it_renews[registry lost]"),
    ("beside ufw", "nftables/README.md", "ufw route allow in on br0\n", "",
     "firewalls::test_guests_are_cut_off_until_the_page_s_lines_mend_it[Ufw]"),
    # Nobody joins as somebody else
    ("hardware addresses", CHAINS, SAME, "return", f"{LEASE}[registered]"),
    ("relay agents", CHAINS, "@th,256,32 0 ", "", f"{LEASE}[registered]"),
    ("client identifiers", DNSMASQ, "dhcp-ignore-clid\n", "#\n",
     "identity::test_client_identifier_of_another_gets_nothing[registered]"),
    ("Release", CHAINS, "{ 1, 3, 4, 5, 11 }", "{ 1, 3, 4, 5, 8, 11 }", f"{LEASE}[registered]"),
    ("an address that two share", CHAINS, "@nh,64,64 0xfe80000000000000 @th,64,8", "@th,64,8", f"{LEASE}[registered]"),
    ("DUIDs", UPDATE, 'kept += holders if kind != "add" or field != "ipv4" else []', "pass",
     "identity::test_lease_of_an_address_of_another_is_not_registered[registered-Request]"),
    ("link-layer address options", CHAINS,
     "    icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } jump instances_drop_lladdr\n", "",
     "identity::test_link_layer_option_with_the_address_of_another_is_not_believed[registered]"),
    ("names of others", DNSMASQ, "dhcp-fqdn\n", "#\n",
     "identity::test_guest_that_calls_itself_like_another_does_not_answer_for_the_name[registered]"),
    ("names of services", UPDATE, "if by_hand or hostname.lower() not in SERVICES else", "if True else",
     "update::test_no_lease_gives_a_name_that_programs_look_for"),
    ("Rebind", CHAINS, "{ 1, 3, 4, 5, 11 }", "{ 1, 3, 4, 5, 6, 11 }", f"{LEASE}[registered]"),
    ("messages for many leases", CHAINS, "400 bytes/minute burst 1200 bytes", "400000 bytes/minute burst 120000 bytes",
     "identity::test_messages_that_ask_for_many_leases_do_not_use_them_up"),
    ("floods of requests", CHAINS, "10/minute burst 10 packets", "1000/second burst 1000 packets",
     "identity::test_flood_of_requests_keeps_nobody_out_and_is_counted_on_when_the_guard_is_loaded_again[registered]"),
    # Frames that no normal guest sends
    ("groups of the link", RULES, "@ll,0,44 0x0180c200000 counter drop", "@ll,0,44 0x0180c200000 counter",
     "frames::test_frame_to_a_group_of_the_link_does_not_reach_the_host[datagram]"),
    ("two pieces of memory", RULES, "        ip6 hoplimit set ip6 hoplimit\n", "",
     "frames::test_advertisement_in_two_pieces_of_memory_is_not_believed"),
    ("DHCP in fragments", CHAINS, "    ip frag-off & 0x3fff != 0 goto instances_reason_malformed\n", "",
     "frames::test_release_in_fragments_with_another_message_behind_the_first_ends_no_lease[4]"),
    ("headers behind a fragment header", CHAINS, "frag nexthdr { 0, 43, 44, 51, 60 } goto", "frag nexthdr 255 goto",
     "frames::test_reply_behind_options_in_fragments_gives_no_lease[UDP]"),
    ("multicast queries", CHAINS, "{ mld-listener-query, 151,", "{ 151,",
     "frames::test_guest_that_speaks_as_a_multicast_router_is_not_believed"),
    ("tags", CHAINS, "    goto instances_reason_other_protocol\n}", "    return\n}",
     "frames::test_guest_that_speaks_as_a_multicast_router_is_not_believed"),
    ("IPv4 of another version", CHAINS, "    meta protocol { ip, ip6 } goto instances_reason_malformed\n", "",
     "frames::test_reply_in_ipv4_that_nftables_cannot_parse_gives_no_lease"),
    # Nothing lost
    ("a marker before each change", UPDATE,
     "                make_marker(base)  # before the change, so that none is ever without it\n", "",
     "faults::test_run_killed_at_any_point_loses_nothing[before]"),
    ("on disk", UPDATE, "            os.fsync(file.fileno())\n", "",
     "faults::test_all_is_done_under_the_lock_and_a_file_is_on_disk_before_its_rename_and_the_folder_after"),
    ("nothing half done", UPDATE, "            os.unlink(temporary)\n        raise", "            pass\n        raise",
     "faults::test_error_at_any_open_write_sync_or_rename_is_one_line"),
    ("one writer", UPDATE, "with locked(base):", "if True:", "faults::test_sixteen_writers_and_a_reader_at_once"),
    ("the marker stays until all is made", CHAINS, "make_marker(base)  # there", "None  # there",
     "faults::test_forced_run_killed_half_way_leaves_the_marker"),
    ("an edit by hand", UPDATE, "text.count(f'\"{address}\"'.encode()) == 1", "True",
     "properties::test_look_up_does_not_find_a_lease_in_an_edited_registry_that_has_it_not"),
]  # fmt: skip


def noticed(mutant) -> bool:
    """Make one of these changes in a copy, and say whether its test fails there."""
    promise, name, old, new, test = mutant
    file, _, case = test.partition("::")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        top = Path(folder) / "top"
        shutil.copytree(TOP, top, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        path = top / name if name in (CHAINS, UPDATE) else top / "examples" / name
        text = path.read_text()
        assert old in text, f"{promise}: {name} has not: {old}"
        path.write_text(text.replace(old, new))
        command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", f"tests/test_{file}.py::{case}"]
        result = subprocess.run(command, cwd=top, env=os.environ | {"CI": "true"}, capture_output=True, text=True)
    last = result.stdout.splitlines()[-1:] or result.stderr.splitlines()[-1:]
    failed = result.returncode == 1 and last[0].startswith("1 failed")  # and not before it was begun
    print(f"{'noticed' if failed else 'NOT NOTICED'}: {promise}: {' '.join(last)}", flush=True)
    return failed


def main(*words: str) -> int:
    """Try them; return the exit status."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant[0] for word in words)]
    with ThreadPoolExecutor(4) as pool:
        results = [*pool.map(noticed, chosen)]
    print(f"{sum(results)} of {len(chosen)} noticed")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
