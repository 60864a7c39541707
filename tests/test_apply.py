"""instances-apply, and what it hands over: the examples dnsmasq, nftables, systemd and cron."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from runpy import run_path

import pytest
from conftest import need
from lab import APPLY, EXAMPLES, HOST_MAC, PROCESS, Host, environment, make_etc, mounted, run, wait_for

pytestmark = pytest.mark.slow
TABLES = {"bridge instances", "inet instances_group", "arp instances_group", "inet instances"}  # of the two examples
ABSENT = "No such file or directory"
WEB = ("10:66:6a:4c:a1:11", "10.83.0.11", "web")
READ_SETTINGS = run_path(str(APPLY))["read_settings"]


def replacing(table: str, body: str) -> str:
    """Return a rule file that replaces a table."""
    return f"table {table}\ndelete table {table}\ntable {table} {{\n{body}\n}}\n"


class Applied:
    """A host with the examples' files in its folder, and instances-apply."""

    def __init__(self, host: Host):
        self.host, self.rules, self.notes = host, host.folder / "rules", host.folder / "run"
        self.hosts = host.folder / "instances.hosts.d"
        self.rules.mkdir()
        for name in ("bridge.nft", "firewall.nft"):
            host.example(f"nftables/{name}").rename(self.rules / name)
        self.write_settings()
        host.update("--initialize", "br0", "host")

    def write_settings(self, sets: str = "host,web", **settings: str) -> None:
        self.settings = self.host.write_settings(INSTANCES_ADDRESS_SETS=sets, **settings)

    def run(self, **options) -> subprocess.CompletedProcess:
        return self.host.run(*self.host.applying(), **options)

    def apply(self, *arguments: str, **options) -> str:
        """Run it; return what it says."""
        return self.run(*arguments, **options).stderr

    def fails(self, message: str = "", **options) -> str:
        """Run it; see that it fails, and says this; return all that it says."""
        result = self.run(check=False, **options)
        assert result.returncode == 1 and re.search(message, result.stderr), result.stderr
        return result.stderr

    def names(self) -> str:
        """Return all lines that dnsmasq is given."""
        return "".join(path.read_text() for path in sorted(self.hosts.glob("[!.]*")))

    def boot(self) -> None:
        """Do what a boot does to the rules and the notes."""
        self.host.run("nft", "flush", "ruleset")
        shutil.rmtree(self.notes, ignore_errors=True)

    def stand_in(self, name: str, script: str) -> Path:
        """Have a shell script run in place of a program, {real}; return its file."""
        file = self.host.folder / name
        file.write_text("#!/bin/sh\n" + script.replace("{real}", f"/usr/sbin/{name}") + "\n")
        file.chmod(0o755)
        self.write_settings(PATH=f"{self.host.folder}:{environment(self.host.base)['PATH']}")
        return file

    def write_rules(self, name: str, text: str) -> Path:
        (self.rules / name).write_text(text)
        return self.rules / name

    def nft_log(self) -> Path:
        """Have what nft is given written to a file, a line of dashes behind each."""
        self.stand_in("nft", 'cat >"$0.in"; (cat "$0.in"; echo; echo --) >>"$0.log"; exec {real} "$@" <"$0.in"')
        return self.host.folder / "nft.log"

    def ruleset(self, *options: str) -> str:
        return self.host.run("nft", "-s", *options, "list", "ruleset").stdout

    def listing(self, table: str) -> str:
        return self.host.run("nft", "list", "table", *table.split(), check=False).stdout

    def state(self) -> tuple:
        """Return what is in force: names and rules, in whatever order, without what was counted."""
        rules = re.sub(r"packets \d+ bytes \d+|elements = |[\n\t {},]+", " ", self.ruleset())
        return sorted(self.names().splitlines()), sorted(rules.split())

    def tables(self) -> set[str]:
        return set(re.findall("^table (.*) {", self.ruleset(), re.MULTILINE))

    def web_has(self, address: str) -> None:
        """See that of the addresses that web has in these tests, rules and names have this one only."""
        for text in (self.ruleset(), self.names()):
            assert {*re.findall(r"10\.83\.0\.1\d\b", text)} == {address}


@pytest.fixture
def applied(host):
    return Applied(host)


def test_firewall_example_lets_guests_reach_each_other_where_bridged_frames_pass_it(applied):
    host, log = applied.host, applied.host.folder / "heard"
    for number in (11, 12):
        guest = host.client(f"guest{number}", f"10:66:6a:4c:a1:{number}")
        host.update("add", guest.mac, f"10.83.0.{number}")
        guest.run("ip", "address", "add", f"10.83.0.{number}/24", "dev", "eth0")
    host.set("net/bridge/bridge-nf-call-iptables", "1")  # as Docker does
    applied.apply()
    guest.hear(log, "::", 5000)
    sending = ("bash", "-c", "echo >/dev/udp/10.83.0.12/5000")
    wait_for(lambda: host.clients[0].run(*sending) and "10.83.0.11" in log.read_text(), "a guest's datagram")


def test_several_at_once_do_it_once_and_where_nothing_changed_it_is_two_lists_and_no_load(applied):
    log = applied.nft_log()
    runs = [applied.host.start(*applied.host.applying(), stderr=subprocess.PIPE, text=True) for _ in range(4)]
    output = "".join(run.communicate(timeout=60)[1] for run in runs)
    assert [run.returncode for run in runs] == 4 * [0]
    assert output.count("instances,") == output.count("bridge.nft: loaded") == 1 and applied.tables() == TABLES
    first = applied.ruleset("-a")
    log.write_text("")
    result = applied.run()
    assert result.stdout + result.stderr == "" and applied.ruleset("-a") == first
    assert log.read_text() == "list ruleset\n--\nlist set bridge instances instances_dropped\n--\n"


def test_updates_a_run_of_the_processor_by_hand_and_settings_come_into_force_whoever_runs_it(applied):
    applied.apply()
    applied.host.update("add", *WEB)
    others = {"INSTANCES_ADDRESS_SETS": "x", "INSTANCES_BASE_ID": "x", "INSTANCES_HOSTS_DOMAIN": ".x"}
    assert "2 instances" in applied.apply(env=others | {"PATH": "/nonexistent:/usr/bin:/bin"})
    assert applied.apply() == "" and "web.v4.instance" in applied.ruleset()
    assert "10.83.0.11 web.instance.internal" in applied.names()
    applied.web_has("10.83.0.11")
    applied.host.update("add", WEB[0], "10.83.0.12")
    applied.host.process()
    applied.apply()
    applied.web_has("10.83.0.12")
    applied.write_settings("host,web,db", INSTANCES_HOSTS_DOMAIN=".example")
    applied.apply()
    assert "db.v4.instance" in applied.ruleset() and "web.example" in applied.names()
    applied.write_settings("host")
    applied.fails(r"firewall.nft: not loaded: .*web.v4.instance .* \(is web in INSTANCES_ADDRESS_SETS\?\)\n")
    assert "web.v4.instance" in applied.listing("inet instances")
    applied.write_settings()
    applied.apply()
    assert "db.v4.instance" not in applied.ruleset() and applied.tables() == TABLES


def test_settings_that_are_not_there_or_broken_change_nothing(applied):
    sets = "INSTANCES_ADDRESS_SETS="
    values = ["'host", "$HOME", "`id`", "'b'c", "'a' 'b'", '"$HOME"', "a\\b", "host\r", "host;", "=", " host"]
    wrong = [sets + value for value in (*values, "host, web", "host # words", f"a\n{sets}a\n")]
    for text in (*wrong, f"$A={sets}", "host,web", "export A=b", "INSTANCE_GUARD=observe", "; a"):
        applied.settings.write_text(text)
        with pytest.raises(ValueError, match="^line [12] is "):
            READ_SETTINGS(applied.settings)
    for _ in range(2):
        assert applied.fails(str(applied.settings)).count("\n") == 1
        assert applied.tables() == set() and not applied.names()
        applied.settings.unlink(missing_ok=True)
    for words in (("a", "b"), ("",), ("--remove", "--help")):
        result = applied.host.run(APPLY, *words, check=False)
        message = f"instances-apply: error: {' '.join(words) or 'nothing'}: no such usage: see --help\n"
        assert (result.returncode, result.stderr) == (2, message)


def test_settings_mean_the_same_to_sh(tmp_path):
    need("dash")
    lines = ["INSTANCES_GUARD=observe", " \tINSTANCES_HOSTS_DOMAIN='.a, .b' \t", "# a comment", "\t# one more", ""]
    lines += ['INSTANCES_ADDRESS_SETS="host, web"', "INSTANCES_SLAAC=", "INSTANCES_BASE_ID='br0'"]
    (tmp_path / "settings").write_text("\n".join(lines))
    ours = READ_SETTINGS(tmp_path / "settings")
    shown = "".join(f'echo "{name}=${name}"\n' for name in ours)
    theirs = run("dash", "-euc", f". {tmp_path}/settings\n{shown}").stdout
    assert len(ours) == 5 and theirs == "".join(f"{name}={value}\n" for name, value in ours.items())


def test_another_base_refuses_the_rules_of_the_former_one(applied):
    applied.apply()
    first = applied.ruleset("-a")
    applied.write_settings(INSTANCES_BASE_ID="br0")
    applied.fails("bridge.nft: not loaded: .*/instances-br0, .*/instances.nftables_chains\n")
    assert applied.ruleset("-a") == first and Path(f"{applied.host.base}-br0.hosts").exists()
    for file in applied.rules.iterdir():
        text = file.read_text().replace("instances.nftables_", "instances-br0.nftables_")
        file.write_text('# include "/other/instances.nftables_sets"\n' + text)
    applied.apply()
    assert applied.ruleset("-a") != first


def test_rule_file_that_is_edited_renamed_added_or_taken_away_and_what_it_includes(applied):
    assert "bridge.nft: loaded\n" in applied.apply()
    applied.host.run("nft", "add", "table", "inet", "mine")
    text = (applied.rules / "bridge.nft").read_text().replace('guarded = "br0"', 'guarded = { "br0", "br7" }')
    applied.write_rules("bridge.nft", text.replace("goto instances_guard", 'goto instances_guard comment "edited"'))
    assert "bridge.nft: loaded; there is no bridge br7 yet\n" in applied.apply()
    assert '"edited"' in applied.ruleset()
    for new, old in (("a-bridge.nft", "bridge.nft"), ("z-firewall.nft", "firewall.nft")):
        (applied.rules / old).rename(applied.rules / new)
    applied.apply()
    assert applied.tables() == TABLES | {"inet mine"} and applied.apply() == ""
    applied.write_rules("added.nft", f'include "{applied.rules}/incl*"\n')
    for table, verdict in (("inet added", "accept"), ("inet added", "drop"), ("ip other", "drop")):
        applied.write_rules("included", replacing(table, f"chain a {{ {verdict}; }}"))  # no word of the former table
        applied.apply()
        assert applied.tables() == TABLES | {"inet mine", table}
        assert re.findall("accept|drop", applied.listing(table)) == [verdict]
    applied.write_rules("included", "")
    (applied.rules / "z-firewall.nft").unlink()
    assert "no rule file has table inet instances, table ip other: deleted" in applied.apply()
    assert applied.tables() == TABLES - {"inet instances"} | {"inet mine"} and applied.apply() == ""


REFUSED = {  # rule files, and what is told of each
    "table inet a {\nchain a { counter; }\n}": "add 'table inet a' and 'delete table inet a'",
    "table a { }": "add 'table ip a' and 'delete table ip a'",
    "add\ttable  inet\ta { }": "add 'table inet a'",
    "# delete table inet a\ntable inet a { }": "add 'table inet a'",
    'table inet a { chain c { counter comment "; delete table inet a"; }; }': "add 'table inet a'",
    "table inet b; delete table inet b; table inet a { }": "add 'table inet a'",
    "table inet a\nflush chain inet a c\ntable inet a {\nchain c { drop; }\n}": "add 'table inet a'",
    "add chain inet mine more": ABSENT,
    "table inet a\ndelete table inet a\nadd rule inet mine kept drop": ABSENT,
    "table inet a\ndelete table inet a\n  flush  ruleset": "it may change tables of its own only: flush ruleset",
    "delete table inet mine": ABSENT,
    'include "b.nft"': "it includes b.nft: write its whole path",
    replacing("bridge instances", "wrong"): "Error: syntax error",
}


def test_rule_files_that_would_add_to_what_is_there_or_have_a_table_of_another_are_refused(applied):
    applied.host.run("nft", "add table inet mine; add chain inet mine kept")
    mine = applied.listing("inet mine")
    shutil.copy(applied.rules / "bridge.nft", applied.rules / "old.nft")
    for number, text in enumerate(REFUSED):
        applied.write_rules(f"{number}.nft", text + "\n")
    for address in ("10.83.0.11", "10.83.0.12"):
        applied.host.update("add", WEB[0], address)
        said = applied.fails(r"old.nft: not loaded: .*/bridge.nft has table \w+ instances\w*, too: leave it in one of")
        for number, told in enumerate(REFUSED.values()):
            assert re.search(f"/{number}.nft: not loaded: .*{told}", said)
        assert applied.tables() == TABLES | {"inet mine"} and applied.listing("inet mine") == mine
        assert address in applied.listing("bridge instances")
    for path in applied.rules.glob("[0-9o]*"):
        path.unlink()
    applied.apply()
    assert applied.tables() == TABLES | {"inet mine"}


REPLACING = [
    "table inet a; delete table inet a; table inet a { chain c { counter; }; }",
    "add table inet a\n\tdelete\ttable inet a # words\ntable inet a { # words\nchain c { counter; }\n}",
    "table inet a\nflush table inet a\ntable inet a {\nchain c { counter; }\n}",
    'table inet a { chain c { }; }\nflush table inet a\nadd rule inet a c counter comment "# }"',
    "add \\\ntable inet a\ndelete table inet a\ndefine n = { 1 }\ntable inet a { chain c { counter; }; }",
]


def test_rule_files_that_replace_their_tables_are_loaded_as_they_are_written(applied):
    for more in ("", "table ip b\ndelete table ip b\n"):
        for number, text in enumerate(REPLACING):
            text = f"{text}\n{more}".replace("inet a", f"inet a{number}").replace("ip b", f"ip b{number}")
            applied.write_rules(f"{number}.nft", text)
        applied.apply()
    tables = [f"inet a{number}" for number in range(len(REPLACING))]
    applied.host.run("nft", "; ".join(f"add rule {table} c drop" for table in tables))
    applied.apply()
    for table in tables:
        listing = applied.listing(table)
        assert listing.count("counter packets") == 1 and "drop" not in listing
    assert applied.apply() == ""
    for file in applied.rules.glob("[0-9].nft"):
        file.unlink()
    applied.apply()
    assert applied.tables() == TABLES


def test_tables_that_others_make_while_it_loads_or_later_stay(applied):
    file = applied.write_rules("filter.nft", replacing("inet own", "chain filter { }"))
    others = "table inet filter { chain input { drop; }; }"
    nft = applied.stand_in("nft", f"{{real}} '{others}'; exec {{real}} \"$@\"")  # beside nft, another program
    applied.apply()
    nft.unlink()
    for text in (file.read_text().replace("own", "other"), None):
        file.write_text(text) if text else file.unlink()
        for path in applied.rules.iterdir():  # each is edited
            path.write_text(path.read_text() + "redefine edited = 1\n")
        if not text:
            applied.host.run("nft", "delete table inet other")  # and somebody makes such a table later
        applied.apply()
        assert "inet filter" in applied.tables() and "inet own" not in applied.tables()
    applied.host.run("nft", "add table inet other")
    assert applied.apply() == "" and applied.tables() == TABLES | {"inet filter", "inet other"}


CHANGES = [
    "flush ruleset",
    "flush chain bridge instances at_prerouting",
    "delete table bridge instances",
    "delete table inet instances",
]


def test_rules_that_anybody_changed_are_loaded_again(applied):
    applied.apply()
    first = sorted(applied.ruleset().splitlines())
    more = "add chain bridge instances more { type filter hook forward priority 1; policy drop; }"
    for change in (*CHANGES, "add rule bridge instances at_prerouting accept", more):
        applied.host.run("nft", change)
        assert "loaded" in applied.apply() and applied.apply() == ""
        assert sorted(applied.ruleset().splitlines()) == first


@pytest.mark.parametrize("when", ["before", "after"])
def test_rules_that_are_changed_in_the_midst_of_an_update_are_in_force_in_the_end(applied, when):
    expected = {}
    for address in ("10.83.0.12", "10.83.0.11"):
        applied.host.update("add", WEB[0], address, "web")
        applied.apply()
        applied.web_has(address)
        expected[address] = applied.state()
    for change, address in zip(CHANGES, [*expected, *expected]):
        applied.host.update("add", WEB[0], address)
        flush = f'grep -q element "$0.in" && {{real}} {change} && touch "$0.done"'
        load = '{real} "$@" <"$0.in"'
        script = f"{flush}; exec {load}" if when == "before" else f"{load} || exit; {flush}; true"
        nft = applied.stand_in("nft", f'cat >"$0.in"; {script}')
        applied.apply(check=False)
        nft.unlink()
        nft.with_suffix(".done").unlink()
        applied.apply()
        assert applied.state() == expected[address] and applied.apply() == "", change


def test_who_was_dropped_and_why_is_told_once_by_each_run_that_finds_news(applied):
    """By the guard's set of who was dropped, in a table of another name."""
    sets = "set instances_dropped { type ether_addr . ifname; size 65536; flags dynamic; counter; }"

    def load(verdict):
        body = f"{sets}\nchain instances_verdict {{\n{verdict}\n}}"
        applied.write_rules("other.nft", replacing("bridge other", body).replace("delete", "flush"))

    def told(*dropped):
        """Have frames counted as dropped; return what is said of it."""
        for mac, reason, count in dropped:
            element = f'{mac} . "{reason}" counter packets {count} bytes 99'
            applied.host.run("nft", f"add element bridge other instances_dropped {{ {element} }}")
        return re.findall("^instances-apply: (.* dropped.*)$", applied.apply(), re.MULTILINE)

    load("drop")
    applied.host.update("add", *WEB)
    assert told() == []
    web, other = WEB[0], "10:66:6a:4c:a1:99"
    lines = ["web: 8 dropped (6 ARP address, 2 DHCP too often)", f"{other}: 7 dropped (7 malformed)"]
    assert told((web, "ARP address", 6), (web, "DHCP too often", 2), (other, "malformed", 7)) == lines
    assert told() == []
    applied.host.run("nft", f'delete element bridge other instances_dropped {{ {web} . "ARP address" }}')
    assert told((web, "ARP address", 9), (web, "NDP target", 1)) == ["web: 4 dropped (3 ARP address, 1 NDP target)"]
    load("accept")  # the table is replaced, and counts from 0
    assert told() == []
    assert told((web, "ARP address", 1)) == ["web: 1 would be dropped (1 ARP address)"]
    first, *lines, last = told(*((f"10:66:6a:00:00:{number:02x}", "malformed", number) for number in range(1, 14)))
    assert first == "10:66:6a:00:00:0d: 13 would be dropped (13 malformed)" and len(lines) == 9
    assert last == "3 others: would be dropped"


def test_update_of_the_registry_takes_addresses_away_and_then_is_one_transaction_for_all_tables(applied):
    log = applied.nft_log()
    applied.write_rules("broken.nft", replacing("inet broken", "wrong"))
    applied.host.update("add", *WEB)
    applied.host.update("add", "-", "2001:67c:83::12", DNSMASQ_MAC=WEB[0])
    applied.host.update("add", "10:66:6a:4c:a1:12", "10.83.0.12", "db")
    applied.fails()
    rules = re.sub("elements = {.*?}", "", applied.ruleset("-a"), flags=re.DOTALL)
    log.write_text("")
    applied.host.update("add", "10:66:6a:4c:a1:13", "10.83.0.11")
    applied.host.update("--rename", "10:66:6a:4c:a1:13", "web")
    applied.host.update("add", "-", "2001:67c:83::11", DNSMASQ_MAC="10:66:6a:4c:a1:13")
    assert ": loaded" not in applied.fails()
    first, load = [text for text in log.read_text().split("--\n") if "10.83.0.11" in text]
    changed = [set(re.findall("^(?:delete|add) element (.*) {", text, re.MULTILINE)) for text in (first, load)]
    assert changed[0] == {"bridge instances instances_ip"} and "add" not in first
    assert {"bridge instances instances_ip", "inet instances web.v6.instance"} <= changed[1]
    assert "include" not in load and "delete element bridge instances instances_ip {" not in load
    listing = applied.ruleset("-a")
    assert rules == re.sub("elements = {.*?}", "", listing, flags=re.DOTALL)
    assert re.findall(r"10\.83\.0\.11 \. (\S+) .*?comment \"(.*?)\"", listing) == [("10:66:6a:4c:a1:13", "web")]


def test_changes_by_elements_lead_to_what_loading_leads_to(applied, update, monkeypatch):
    monkeypatch.setenv("INSTANCES_BASE_PATH", str(applied.host.base))
    chance = random.Random(1)
    for number in range(3):
        update.main(["add", f"10:66:6a:4c:a1:0{number}", f"10.83.0.{number + 2}", f"g{number}"])
    applied.apply()
    for turn in range(6):
        for _ in range(chance.randrange(2, 6)):
            mac, address = f"10:66:6a:4c:a1:0{chance.randrange(5)}", f"10.83.0.{chance.randrange(2, 9)}"
            name = chance.choice(["web", "db", "host2", "g1", "web-2"])
            changes = [["add", mac, address, name], ["--rename", mac, name], ["--remove", mac]]
            changes += [["--allow", mac, f"10.83.1.{chance.randrange(4)}"], ["--allow", mac, "10.99.0.0/24"]]
            update.main(chance.choice(changes))
        assert ": loaded" not in applied.apply()
        first = applied.state()
        if turn % 2:
            applied.boot()
            applied.apply()
            assert first == applied.state()


def test_what_sets_learned_outlives_all_but_an_edit(applied):
    bridge = applied.rules / "bridge.nft"
    applied.apply()
    applied.host.run("nft", "add element bridge instances instances_claiming { 10:66:6a:4c:a1:99 }")
    for number, by in enumerate(("elements", "an interval", "settings", "a load by hand", "an edit"), 11):
        applied.host.run("nft", "add element bridge instances instances_ip { 10.83.0.66 . 10:66:6a:4c:a1:66 }")
        applied.host.update("add", WEB[0], f"10.83.0.{number}", "web")
        if by == "an interval":
            applied.host.update("--allow", WEB[0], "10.99.0.0/24")
        if by == "settings":
            applied.write_settings("host,web,db", INSTANCES_GUARD="observe")
        if by in ("a load by hand", "an edit"):
            applied.host.run("nft", "-f", bridge)
        if by == "an edit":
            bridge.write_text(bridge.read_text() + "table bridge more\ndelete table bridge more\n")
        by_elements = by in ("elements", "an interval")
        assert ("bridge.nft: loaded" in applied.apply()) == (not by_elements), by
        assert ("10:66:6a:4c:a1:99" in applied.ruleset()) == (by != "an edit"), by
        assert ("10.83.0.66" in applied.ruleset()) == by_elements, by  # which has nothing to do with it
        applied.web_has(f"10.83.0.{number}")
        assert applied.apply() == "", by


def test_rule_file_that_does_not_empty_the_sets_keeps_no_former_address_and_no_former_type(applied):
    (applied.rules / "firewall.nft").unlink()
    body = f'include "{applied.host.base}.nftables_sets"\nchain c {{\ncounter\n}}'
    applied.write_rules("a.nft", replacing("inet a", body).replace("delete", "flush"))
    applied.host.update("add", *WEB)
    applied.apply()
    applied.host.update("add", WEB[0], "10.83.0.12")
    applied.write_settings("host,web,db")  # loaded whole
    assert "a.nft: loaded" in applied.apply()
    listing = applied.listing("inet a")
    assert "10.83.0.12" in listing and "10.83.0.11" not in listing and listing.count("counter packets") == 1
    for mac in (HOST_MAC, WEB[0]):
        applied.host.update("--remove", mac)
    applied.apply()
    script = f"sed -i s/ipv4_addr/ether_addr/ {applied.host.base}.nftables_sets"
    applied.stand_in("instances-process.py", f'{PROCESS} "$@" && {script}')  # of a new release
    assert "a.nft: loaded" in applied.apply() and applied.apply() == ""
    listing = applied.listing("inet a")
    assert "ether_addr" in listing and "ipv4_addr" not in listing


def test_nft_that_fails_keeps_no_names_out_and_one_that_crashes_at_tables_of_others_nothing(applied):
    failed = "instances-apply: the rules stay as they are: "
    applied.stand_in("nft", "echo broken >&2; exit 1")
    assert re.fullmatch(f".*1 instances, .*\n{failed}broken\n", applied.fails()) and applied.names()
    applied.stand_in("nft", "kill -SEGV $$")
    assert re.fullmatch(f"{failed}nft ended with status -11 .*\n", applied.fails())
    applied.stand_in("nft", 'cat >"$0.in"; grep -q "list ruleset" "$0.in" && kill -SEGV $$; exec {real} "$@" <"$0.in"')
    for _ in range(2):
        applied.apply()
        assert applied.tables() == TABLES
    applied.host.update("add", *WEB)
    applied.apply()
    applied.web_has("10.83.0.11")
    applied.host.run("nft", "add rule bridge instances at_prerouting accept")
    assert "bridge.nft: loaded" in applied.apply() and applied.apply() == ""


def test_broken_rule_file_keeps_what_it_made_and_no_other_out_also_where_a_transaction_has_failed(applied):
    bridge = applied.rules / "bridge.nft"
    good = bridge.read_text()
    broken = applied.write_rules("broken.nft", replacing("inet broken", "wrong"))
    applied.fails("broken.nft: not loaded")
    assert applied.tables() == TABLES
    broken.unlink()
    bridge.write_text("table bridge instances\ndelete table bridge instances\ntable bridge instances {")
    applied.host.update("add", *WEB)
    for _ in range(2):
        assert ": loaded" not in applied.fails("bridge.nft:.*syntax error"), "only the broken one is tried again"
        assert "10.83.0.11" in applied.listing("inet instances")
        # What it made before stays, and goes on to agree with the firewall on whose an address is.
        assert "10.83.0.11 ." in applied.listing("bridge instances")
        assert "web.instance.internal" in applied.names()
    bridge.write_text(good)
    assert applied.apply() == "" and "10.83.0.11" in applied.ruleset()
    bridge.write_text(good + "wrong\n")
    applied.host.update("add", WEB[0], "10.83.0.12")
    flush = 'grep -q element "$0.in" && {real} delete table inet instances'
    applied.stand_in("nft", f'cat >"$0.in"; {flush}; exec {{real}} "$@" <"$0.in"')
    applied.fails()
    assert "10.83.0.12" in applied.listing("inet instances")


def test_broken_registry_or_missing_folder_of_rules_is_told_and_keeps_nothing_that_is_made_out(applied):
    applied.apply()
    registry = applied.host.folder / "instances.json"
    whole = registry.read_bytes()
    registry.write_bytes(whole[:-9])
    (applied.host.folder / "instances.updated").touch()
    applied.boot()
    shutil.rmtree(applied.hosts)
    for _ in range(2):
        applied.fails("mend it")
        assert applied.tables() == TABLES and applied.names()
    registry.write_bytes(whole)
    applied.apply()
    assert applied.apply() == ""
    shutil.rmtree(applied.rules)
    applied.host.update("add", *WEB)
    applied.fails(f"No such file or directory: '{applied.rules}'")
    assert "10.83.0.11 web.instance.internal" in applied.names() and applied.tables() == TABLES
    applied.rules.mkdir()
    assert "deleted\n" in applied.apply() and applied.tables() == set()


def test_names_that_were_deleted_or_changed_come_back_readable_to_dnsmasq_whatever_the_umask_was(applied):
    applied.host.run("sh", "-c", f'umask 077; mkdir {applied.hosts}; exec "$@"', "sh", *applied.host.applying())
    for change in (Path.unlink, lambda path: path.write_text("10.83.0.1 other\n"), lambda path: path.chmod(0o600)):
        (file,) = applied.hosts.iterdir()
        assert [path.stat().st_mode & 0o777 for path in (applied.hosts, file)] == [0o755, 0o644]
        change(file)
        applied.apply()
        assert "10.83.0.1 host.instance.internal" in applied.names() and "other" not in applied.names()
    assert file.stat().st_mode & 0o777 == 0o644
    for ending in ("hosts", "nftables_chains", "nftables_sets"):
        Path(f"{applied.host.base}.{ending}").unlink()
        applied.apply()
        assert Path(f"{applied.host.base}.{ending}").exists()


def test_update_while_the_names_are_given_comes_into_force_in_the_next_run(applied):
    applied.host.update("add", *WEB)
    stopping = ["strace", "-qq", "-o", applied.host.folder / "strace", "-e", "inject=rename:signal=STOP:when=1"]
    running = applied.host.start(*stopping, *applied.host.applying(), start_new_session=True)
    wait_for(lambda: applied.names() and [*applied.hosts.glob(".*")], "the names, some of them not in place yet")
    applied.host.update("add", WEB[0], "10.83.0.12")
    applied.host.process()
    os.killpg(running.pid, signal.SIGCONT)
    assert running.wait(60) == 0
    applied.apply()
    applied.web_has("10.83.0.12")


@pytest.mark.parametrize("folder, program", [("systemd", "instances-apply"), ("lan", "instances-snoop")])
def test_systemd_units_are_valid_and_hardened(tmp_path, folder, program):
    need("systemd-analyze")
    for unit in (EXAMPLES / folder).glob("instances*.[pst]*"):
        (tmp_path / unit.name).write_text(unit.read_text().replace(f"/usr/local/sbin/{program}", "/bin/true"))
    result = run("systemd-analyze", "verify", *tmp_path.iterdir())
    assert (result.stdout, result.stderr) == ("", "")
    (service,) = tmp_path.glob("*.service")
    exposure = run("systemd-analyze", "security", "--offline=true", service, check=False).stdout
    assert float(re.search(r"Overall exposure level.*: ([0-9.]+)", exposure)[1]) < 3, exposure


def test_cron_example_runs_it_each_minute_with_the_settings_of_the_package_and_the_system_log_has_what_it_says(applied):
    lines = (EXAMPLES / "cron" / "instances").read_text().splitlines()
    (path,) = [line for line in lines if line.startswith("PATH=")]
    command = re.fullmatch(r"\* \* \* \* \* root (.*)", lines[-1])[1]
    device = applied.host.folder / "dev"
    device.mkdir()
    run("mknod", device / "null", "c", "1", "3")
    applying = shlex.join([*mounted({"/dev": device}), *applied.host.applying()])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.settimeout(10)
        log.bind(str(device / "log"))
        result = applied.host.run("env", "-i", "sh", "-c", f"{path}\n{command.replace('instances-apply', applying)}")
        while b"instances-apply: bridge.nft: loaded" not in log.recv(9999):
            pass
    assert applied.tables() == TABLES and result.stdout + result.stderr == ""


# ---- One more registry, removal, faults ----


class Etc(Applied):
    """A host where /etc is its own, with two registries: /etc/default/instances, and instances-br1 beside it."""

    def __init__(self, host: Host):
        super().__init__(host)
        self.etc, self.second = make_etc(host.folder / "etc"), host.folder / "rules-br1" / "bridge.nft"
        for folder in (self.etc / "default", self.second.parent):
            folder.mkdir()
        self.settings.rename(self.etc / "default" / "instances")
        self.write_settings(INSTANCES_RULES=str(self.second.parent), INSTANCES_BASE_ID="br1")
        self.settings.rename(self.etc / "default" / "instances-br1")
        text = (self.rules / "bridge.nft").read_text().replace("/instances.nft", "/instances-br1.nft")
        self.second.write_text(re.sub("(bridge|inet|arp) instances", r"\1 instances-br1", text))

    def run(self, *arguments: str, lib: Path = Path("/var/lib/misc"), **options) -> subprocess.CompletedProcess:
        """Run it without the name of a settings file, or with these arguments."""
        mounts = mounted({"/etc": self.etc, "/var/lib/misc": lib})
        return self.host.run(*mounts, *self.host.applying()[:-1], *arguments, **options)


def test_two_registries_keep_their_guards_and_one_with_tables_of_the_other_a_marker_or_a_backup_is_none(host):
    etc, other, lib = Etc(host), "10:66:6a:4c:a1:21", host.folder / "lib"
    host.update("add", *WEB)
    host.update("add", other, "10.84.0.11", "web", INSTANCES_BASE_ID="br1")
    for name in ("instances-br1.bak", "instances-br1~", "instances-br1.dpkg-old"):
        (etc.etc / "default" / name).write_text("a backup, which is no registry\n")
    good = etc.second.read_text()
    etc.second.write_text(re.sub("(bridge|inet|arp) instances-br1", r"\1 instances", good))
    for _ in range(2):
        etc.fails("br1: .*/default/instances has table")
        assert "10.83.0.11 " in etc.listing("bridge instances") and etc.tables() == TABLES
    etc.second.write_text(good)
    etc.apply()
    for _ in range(2):
        assert re.findall(r"10\.8.\.0\.11 ", etc.listing("bridge instances")) == ["10.83.0.11 "]
        assert re.findall(r"10\.8.\.0\.11 ", etc.listing("bridge instances-br1")) == ["10.84.0.11 "]
        assert etc.apply() == ""
        etc.apply("/etc/default/instances-br1")
    host.update("add", other, "10.84.0.12", INSTANCES_BASE_ID="br1")
    assert re.search("^instances-apply: br1: .*2? instances", etc.apply(), re.MULTILINE)
    assert "10.84.0.12" in etc.listing("bridge instances-br1") and "10.83.0.11" in etc.listing("bridge instances")
    lib.mkdir()
    (lib / "instances-br1.updated").touch()  # where the path unit looks, and neither registry is
    etc.fails("/var/lib/misc/instances-br1.updated is of another registry", lib=lib)
    etc.apply("--remove", "/etc/default/instances-br1")
    assert etc.tables() == TABLES
    assert not list(Path(f"{host.base}-br1.hosts.d").iterdir()) and etc.names()


def test_remove_takes_away_what_was_put_in_force_and_leaves_rule_files(host):
    etc = Etc(host)
    host.run("nft", "add table inet mine")
    etc.apply()
    (etc.rules / "firewall.nft").write_text(replacing("inet mine", "chain c { }"))  # not what is in force
    assert etc.apply("--remove").count(".nft is left in place\n") == 3
    assert etc.tables() == {"inet mine"} and etc.names() == ""
    etc.apply("--remove")
    assert {path.name for path in etc.notes.rglob("*") if path.is_file()} == {"lock"}


def test_names_of_the_former_release_are_taken_over_and_never_double(applied):
    host, answers = applied.host, applied.host.folder / "answers"
    guests = {f"10:66:6a:4c:a2:{n:02x}": {"name": f"g{n}", "ipv4": f"10.83.0.{n + 20}"} for n in range(40)}
    Path(f"{host.base}.json").write_text(json.dumps(guests))
    host.process()
    applied.hosts.mkdir()
    shutil.copy(f"{host.base}.hosts", applied.hosts / "instances.hosts")
    (applied.hosts / "mine").write_text("10.83.0.9 mine.instance.internal\n")
    host.start_dnsmasq(config=host.example("dnsmasq/br0.conf"))
    script = "while true; do dig +short +tries=1 @10.83.0.1 g7.instance.internal A | tr '\\n' ' '; echo; done"
    with open(answers, "w") as file:
        asking = host.start("sh", "-c", script, stdout=file)
    wait_for(lambda: answers.read_text().count("\n") > 3, "answers")
    applied.apply()
    assert len([*applied.hosts.iterdir()]) > 2 and not (applied.hosts / "instances.hosts").exists()
    count = answers.read_text().count("\n")
    wait_for(lambda: answers.read_text().count("\n") > count + 20, "answers after it")
    host.stop(asking)
    # Never two. That none is missing meanwhile can't be had where the renames are not in one slice of the processor.
    lines = answers.read_text().split("\n")[:-1]
    assert {*lines} <= {"10.83.0.27 ", ""} and lines.count("") < 10
    host.update("--rename", "10:66:6a:4c:a2:07", "other")
    host.update("--remove", "10:66:6a:4c:a2:08")
    applied.apply()
    asked = [f"{name}.instance.internal" for name in ("g7", "other", "g8", "g9", "mine")]
    news = ["10.83.0.27", "10.83.0.29", "10.83.0.9"]  # of other, g9 and mine
    wait_for(lambda: host.run("dig", "+short", "@10.83.0.1", *asked).stdout.split() == news, "news")


def test_run_with_a_fault_at_any_system_call_is_mended_by_the_next(applied):
    applied.host.run("nft", "add table inet mine")
    applied.apply()
    address, log = iter(range(100, 250)), applied.host.folder / "strace"
    calls = "openat,write,rename,unlink,execve,clone,vfork,mkdir,flock,sendto"

    def traced(*options):
        applied.host.update("add", WEB[0], f"10.83.0.{next(address)}", "web")
        (applied.rules / "firewall.nft").write_text((applied.rules / "firewall.nft").read_text() + "\n")
        command = ["strace", "-qq", "-y", "-o", log, "-e", f"trace={calls}", *options, sys.executable, APPLY]
        return applied.host.run(*mounted({"/run": applied.notes}), *command, applied.settings, check=False)

    assert traced().returncode == 0
    counts, places, ours = Counter(), [], rf"/run/|{applied.host.folder}/ins|write\(\d+<pipe|^vfork|^clone"
    for line in log.read_text().splitlines():
        call = re.match(r"\w*", line)[0]
        counts[call] += 1
        if re.search(ours, line) and "settings" not in line:
            places.append((call, counts[call]))
    assert len(places) > 15
    places = [place for turn, place in enumerate(places) if place[0] not in ("openat", "write") or turn % 2]
    for turn, (call, number) in enumerate(places):
        # A kill before a call that changes nothing is one before the next.
        fault = "signal=KILL" if call not in ("openat", "write") else ("error=ENOSPC", "error=EACCES")[turn % 2]
        result = traced("-e", f"inject={call}:{fault}:when={number}")
        python = "Fatal Python error" in result.stderr  # which itself could not start
        why = (call, number, fault, result.stderr)
        first = applied.state()
        assert (python or "Traceback" not in result.stderr) and "mine" in first[1], why
        applied.apply()
        names, rules = last = applied.state()
        # What exited 0 was in force, and of former addresses nothing is left.
        assert result.returncode or first == last, why
        assert len({word for word in rules if re.fullmatch(r"10\.83\.0\.1\d\d", word)}) == 1, why
        assert "".join(names).count(" web.v4.") == 1, why
    assert applied.apply() == ""


def test_damaged_notes_are_as_none(applied):
    applied.host.update("add", *WEB)
    applied.apply()
    notes, copy = (next(applied.notes.rglob(name)) for name in ("notes", "copy"))
    first = copy.read_bytes()
    for number, path in enumerate((notes, notes, notes, copy, copy, copy)):
        whole = path.read_bytes()
        flipped = bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]])
        damaged = (whole[: len(whole) // 2], flipped, b"1", flipped, first, None)[number]
        path.write_bytes(damaged) if damaged else path.unlink()
        address = "10.83.0.11" if damaged == first else f"10.83.0.1{number + 2}"
        applied.host.update("add", WEB[0], address)
        applied.apply()
        applied.web_has(address)
    assert applied.apply() == ""
