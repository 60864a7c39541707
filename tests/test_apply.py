"""instances-apply, and what it hands over: the examples dnsmasq, nftables, systemd and cron."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import need
from lab import APPLY, EXAMPLES, Host, run, wait_for

pytestmark = pytest.mark.slow
TABLES = {"bridge instances", "inet instances_group", "arp instances_group", "inet instances"}  # of the two examples
OWN = "it may change tables of its own only: "
WEB = ("10:66:6a:4c:a1:11", "10.83.0.11", "web")


def replacing(table: str, body: str) -> str:
    """Return a rule file that replaces a table."""
    return f"table {table}\ndelete table {table}\ntable {table} {{\n{body}\n}}\n"


class Applied:
    """A host with the examples' files in its folder, and instances-apply."""

    def __init__(self, host: Host):
        self.host, self.rules, self.notes = host, host.folder / "rules", host.folder / "run"
        self.hosts = host.folder / "instances.hosts.d" / "instances.hosts"
        self.rules.mkdir()
        for name in ("bridge.nft", "firewall.nft"):
            host.example(f"nftables/{name}").rename(self.rules / name)
        self.write_settings(INSTANCES_ADDRESS_SETS="host,web")
        host.update("--initialize", "br0", "host")

    def write_settings(self, **settings: str) -> None:
        """Write the settings, of this host and these."""
        self.settings = self.host.write_settings(**settings)

    def apply(self, check: bool = True, **options) -> subprocess.CompletedProcess:
        return self.host.run(*self.host.applying(), check=check, **options)

    def boot(self) -> None:
        """Do what a boot does to the rules and the notes."""
        self.host.run("nft", "flush", "ruleset")
        shutil.rmtree(self.notes, ignore_errors=True)

    def write(self, name: str, text: str) -> Path:
        """Write a rule file."""
        (self.rules / name).write_text(text)
        return self.rules / name

    def ruleset(self, *options: str) -> str:
        return self.host.run("nft", "-s", *options, "list", "ruleset").stdout

    def tables(self) -> set[str]:
        return set(re.findall("^table (.*) {", self.ruleset(), re.MULTILINE))


@pytest.fixture
def applied(host):
    return Applied(host)


def test_dnsmasq_example_leads_from_a_lease_to_a_name_and_a_guard(applied):
    host = applied.host
    (host.folder / "instances.hosts.d").mkdir()
    host.start_dnsmasq(config=host.example("dnsmasq/br0.conf"))
    web, wpad = host.client("web", "10:66:6a:4c:a1:11"), host.client("wpad", "10:66:6a:4c:a1:12")
    web.dhcp4("web")
    web.dhcp6("web")
    wpad.dhcp4("wpad")
    assert host.registry()[wpad.mac]["name"] == ""
    assert "3 instances" in applied.apply().stderr
    wait_for(lambda: web.resolve("web.v4.instance.internal", "A") == web.addresses("10"), "the name")
    assert sorted(web.resolve("web.v6.instance.internal", "AAAA")) == sorted(
        web.addresses("2001") + web.addresses("fd83")
    )
    wait_for(lambda: web.pings("10.83.0.1"), "the host behind the guard")
    assert applied.tables() == TABLES
    assert web.addresses("10")[0] in host.run("nft", "list", "set", "inet", "instances", "web.v4.instance").stdout
    assert (applied.apply().stdout, applied.apply().stderr) == ("", "")


@pytest.mark.parametrize("tag", ["VLAN tag", "other protocol"])
def test_nftables_example_drops_tags_and_other_protocols(applied, tag):
    host = applied.host
    client, other = host.client("web", "10:66:6a:4c:a1:11"), host.client("db", "10:66:6a:4c:a1:12")
    host.update("add", client.mac, "10.83.0.11", "web")
    applied.apply()
    header = "ffffffffffff" + client.mac.replace(":", "")
    arp = "08060001080006040001" + client.mac.replace(":", "") + "0a53000b" + 6 * "00" + "0a530001" + 18 * "00"
    frame = header + ("81000005" + arp if tag == "VLAN tag" else "88b5" + 46 * "00")

    def received():
        counters = other.run("ip", "-json", "-statistics", "link", "show", "dev", "eth0").stdout
        return json.loads(counters)[0]["stats64"]["rx"]["packets"]

    def dropped():
        listing = host.run("nft", "list", "table", "bridge", "instances").stdout
        return int(re.search(rf'packets (\d+) .*"{tag}"', listing)[1])

    before = received()
    client.send(*5 * [bytes.fromhex(frame)])
    wait_for(lambda: dropped() >= 5, f"five drops of a frame with {tag}")
    assert received() - before < 5


def test_firewall_example_lets_guests_reach_each_other_where_bridged_frames_pass_it(applied):
    host = applied.host
    guests = [host.client(name, f"10:66:6a:4c:a1:1{end}") for end, name in enumerate(("web", "db"), 1)]
    for end, guest in enumerate(guests, 1):
        host.update("add", guest.mac, f"10.83.0.1{end}")
        guest.run("ip", "address", "add", f"10.83.0.1{end}/24", "dev", "eth0")
    host.set("net/bridge/bridge-nf-call-iptables", "1")  # as Docker does
    applied.apply()
    server = "import socket; s = socket.create_server(('', 8080)); s.accept(); print('reached')"
    listener = guests[1].start(sys.executable, "-c", server, stdout=subprocess.PIPE, text=True)
    client = "import socket; socket.create_connection(('10.83.0.12', 8080), 2)"
    wait_for(lambda: guests[0].run(sys.executable, "-c", client, check=False).returncode == 0, "a guest's port")
    assert listener.communicate(timeout=10)[0] == "reached\n"


def test_nothing_changed_is_one_call_of_nft_and_no_load(applied):
    applied.apply()
    first, log = applied.ruleset("-a"), applied.host.folder / "strace"
    applied.host.run("strace", "-f", "-qq", "-e", "trace=execve", "-o", log, *applied.host.applying())
    calls = [line for line in log.read_text().splitlines() if '/nft"' in line and line.endswith("= 0")]
    assert len(calls) == 1 and '"list"' in calls[0] and "instances-process" not in log.read_text()
    assert applied.ruleset("-a") == first


def test_updates_and_a_run_of_the_processor_by_hand_come_into_force(applied):
    applied.apply()
    applied.host.update("add", *WEB)
    assert "2 instances" in applied.apply().stderr
    assert "10.83.0.11" in applied.ruleset() and "10.83.0.11 web.instance.internal" in applied.hosts.read_text()
    applied.host.update("add", WEB[0], "10.83.0.12")
    applied.host.process()
    applied.apply()
    assert "10.83.0.12" in applied.ruleset() and "10.83.0.12 web.instance.internal" in applied.hosts.read_text()


def test_changed_settings_come_into_force(applied):
    applied.host.update("add", *WEB)
    applied.apply()
    applied.write_settings(INSTANCES_ADDRESS_SETS="host,web,db", INSTANCES_HOSTS_DOMAIN=".example")
    applied.apply()
    assert "db.v4.instance" in applied.ruleset() and "web.example" in applied.hosts.read_text()
    applied.write_settings(INSTANCES_ADDRESS_SETS="web,host")
    applied.boot()
    applied.apply()
    assert "db.v4.instance" not in applied.ruleset() and applied.tables() == TABLES


def test_settings_are_those_of_the_file_whoever_runs_it(applied):
    applied.apply()
    applied.host.update("add", *WEB)
    others = {"INSTANCES_ADDRESS_SETS": "x", "INSTANCES_BASE_ID": "x", "INSTANCES_HOSTS_DOMAIN": ".x"}
    assert "2 instances" in applied.apply(env=others | {"PATH": "/nonexistent:/usr/bin:/bin"}).stderr
    assert "web.instance.internal" in applied.hosts.read_text() and "web.v4.instance" in applied.ruleset()
    first = applied.ruleset("-a")
    assert (applied.apply().stderr, applied.ruleset("-a")) == ("", first)


def test_settings_that_are_not_there_or_broken_change_nothing(applied):
    for text in (None, "INSTANCES_ADDRESS_SETS='host", "A=b\n$A=c", "A=$HOME", "A=`id`", "host,web", "A='b'c"):
        applied.settings.unlink() if text is None else applied.settings.write_text(text)
        result = applied.apply(check=False)
        assert result.returncode == 1 and result.stderr.count("\n") == 1 and str(applied.settings) in result.stderr
        assert applied.tables() == set() and not applied.hosts.exists()
    for wrong in (("a", "b"), ("--aply",), ("",)):
        result = applied.host.run(APPLY, *wrong, check=False)
        assert (result.returncode, result.stderr) == (2, "usage: instances-apply [-h] [SETTINGS]\n")


def test_another_base_refuses_the_rules_of_the_former_one(applied):
    applied.apply()
    first = applied.ruleset("-a")
    applied.write_settings(INSTANCES_BASE_ID="br0", INSTANCES_ADDRESS_SETS="host,web")
    result = applied.apply(check=False)
    assert result.returncode == 1
    assert re.search("bridge.nft: not loaded: .*/instances-br0, .*/instances.nftables_chains\n", result.stderr)
    assert applied.ruleset("-a") == first and Path(f"{applied.host.base}-br0.hosts.d/instances.hosts").exists()
    for file in applied.rules.iterdir():
        text = file.read_text().replace("instances.nftables_", "instances-br0.nftables_")
        file.write_text('# include "/other/instances.nftables_sets"\n' + text)
    assert applied.apply().returncode == 0 and applied.ruleset("-a") != first


def test_rule_file_that_is_edited_added_or_taken_away(applied):
    applied.apply()
    applied.host.run("nft", "add", "table", "inet", "mine")
    bridge = applied.rules / "bridge.nft"
    bridge.write_text(bridge.read_text().replace("VLAN tag", "edited"))
    applied.apply()
    assert '"edited"' in applied.ruleset()
    added = applied.write("added.nft", replacing("inet added", "chain a { counter; }"))
    applied.apply()
    assert "inet added" in applied.tables()
    added.write_text(replacing("ip other", "chain a { drop; }"))  # another table, and no word of the former one
    applied.apply()
    assert applied.tables() == TABLES | {"inet mine", "ip other"}
    added.unlink()
    (applied.rules / "firewall.nft").unlink()
    assert "no rule file has table inet instances, table ip other: deleted" in applied.apply().stderr
    assert applied.tables() == TABLES - {"inet instances"} | {"inet mine"}
    assert applied.apply().stderr == ""


@pytest.mark.parametrize(
    "text, told",
    [
        ("table inet a {\nchain a { counter; }\n}", "add 'table inet a' and 'delete table inet a'"),
        ("table a { }", "add 'table ip a' and 'delete table ip a'"),
        ("\ttable  inet\ta { }", "add 'table inet a'"),
        ("add table inet a", "add 'table inet a'"),
        ("# delete table inet a\ntable inet a { }", "add 'table inet a'"),
        ('table inet a { chain c { counter comment "; delete table inet a"; }; }', "add 'table inet a'"),
        ("table inet b; delete table inet b; table inet a { }", "add 'table inet a'"),
        ("add chain inet mine more", OWN + "add chain inet mine"),
        ("table inet a\ndelete table inet a\nadd rule inet mine kept drop", OWN + "add rule inet mine"),
        ("flush ruleset", OWN + "flush ruleset"),
        ("rename chain inet mine kept more", OWN + "rename chain inet mine"),
        ("chain inet mine more { }", OWN + "chain inet mine"),
        ("rule inet mine kept counter", OWN + "rule inet mine"),
        ("table inet $a { }", OWN + "table inet"),
        ('include "./b.nft"', "it includes ./b.nft: write its whole path"),
    ],
)
def test_rule_file_that_would_add_to_what_is_there_is_refused(applied, text, told):
    applied.host.run("nft", "add table inet mine; add chain inet mine kept")
    applied.write("a.nft", text + "\n")
    for _ in range(2):
        result = applied.apply(check=False)
        assert result.returncode == 1 and f"a.nft: not loaded: {told}" in result.stderr
        assert applied.tables() == TABLES | {"inet mine"} and "more" not in applied.ruleset()


@pytest.mark.parametrize(
    "text",
    [
        "table inet a; delete table inet a; table inet a { chain c { counter; }; }",
        "add table inet a\n\tdelete\ttable inet a # words\ntable inet a { # words\nchain c { counter; }\n}",
        "table inet a\nflush table inet a\ntable inet a {\nchain c { counter; }\n}",
        'table inet a { chain c { }; }\nflush table inet a\nadd rule inet a c counter comment "# }"',
        "add \\\ntable inet a\ndelete table inet a\ndefine n = { 1 }\ntable inet a { chain c { counter; }; }",
    ],
)
def test_rule_file_that_replaces_its_table_is_loaded_as_it_is_written(applied, text):
    file = applied.write("a.nft", text + "\n")
    applied.apply()
    file.write_text(text + "\ntable ip b\ndelete table ip b\n")
    applied.apply()
    applied.host.run("nft", "add rule inet a c drop")
    applied.apply()
    assert applied.host.run("nft", "list", "table", "inet", "a").stdout.count("counter packets") == 1
    assert "drop" not in applied.host.run("nft", "list", "table", "inet", "a").stdout
    assert applied.apply().stderr == ""
    file.unlink()
    applied.apply()
    assert applied.tables() == TABLES


def test_renamed_rule_file_keeps_its_table(applied):
    applied.apply()
    (applied.rules / "bridge.nft").rename(applied.rules / "a-bridge.nft")
    (applied.rules / "firewall.nft").rename(applied.rules / "z-firewall.nft")
    applied.apply()
    assert applied.tables() == TABLES
    first = applied.ruleset("-a")
    assert applied.apply().stderr == "" and applied.ruleset("-a") == first


def test_tables_that_others_make_while_it_loads_stay(applied):
    file = applied.write("filter.nft", replacing("inet own", "chain filter { }"))
    nft = applied.host.folder / "nft"  # nft, and beside the first load another program
    real = shutil.which("nft", path="/usr/sbin:/usr/bin")
    others = "table inet filter { chain input { drop; }; }"
    nft.write_text(f"#!/bin/sh\ncase $* in '-f -') {real} '{others}' ;; esac\nexec {real} \"$@\"\n")
    nft.chmod(0o755)
    path = f"{applied.host.folder}:" + re.search("PATH='(.*)'", applied.settings.read_text())[1]
    applied.write_settings(INSTANCES_ADDRESS_SETS="host,web", PATH=path)
    applied.apply()
    applied.write_settings(INSTANCES_ADDRESS_SETS="host,web")
    for text in (file.read_text().replace("own", "other"), None):
        file.write_text(text) if text else file.unlink()
        for path in applied.rules.iterdir():  # each is edited
            path.write_text(path.read_text() + "redefine edited = 1\n")
        applied.apply()
        assert "inet filter" in applied.tables() and "inet own" not in applied.tables()
    assert applied.tables() == TABLES | {"inet filter"}


def test_what_a_rule_file_includes_is_noticed(applied):
    included = applied.rules / "ports"
    included.write_text("tcp dport 8080 drop\n")
    applied.write(
        "mine.nft",
        f'table inet mine\ndelete table inet mine\ntable inet mine {{ chain a {{\ninclude "{included}"\n}}\n}}\n',
    )
    applied.apply()
    included.write_text("tcp dport 8081 drop\n")
    applied.apply()
    assert "8081" in applied.ruleset() and "8080" not in applied.ruleset()


def test_table_that_an_included_file_names_is_the_rule_files_own(applied):
    included = applied.rules / "included"
    applied.write("mine.nft", f'include "{applied.rules}/incl*"\n')
    for text, tables in ((replacing("inet mine", "chain c { }"), TABLES | {"inet mine"}), ("", TABLES)):
        included.write_text(text)
        applied.apply()
        assert applied.tables() == tables


def test_second_rule_file_of_a_table_is_refused(applied):
    shutil.copy(applied.rules / "bridge.nft", applied.rules / "old-bridge.nft")
    for _ in range(2):
        result = applied.apply(check=False)
        told = r"old-bridge.nft: not loaded: bridge.nft has table \w+ instances\w*, too: leave it in one of them\n"
        assert result.returncode == 1 and re.search(told, result.stderr)
    applied.write("a.nft", "table bridge instances\ndelete table bridge instances\ntable bridge instances { wrong\n")
    applied.host.update("add", *WEB)
    assert "bridge.nft: loaded" in applied.apply(check=False).stderr, "a broken file keeps no other out"
    for name in ("a.nft", "old-bridge.nft"):
        (applied.rules / name).unlink()
    applied.apply()
    assert applied.tables() == TABLES


@pytest.mark.parametrize(
    "change",
    [
        "flush ruleset",
        "flush table bridge instances",
        "flush chain bridge instances guard",
        "delete table bridge instances",
        "add rule bridge instances guard accept",
        "add chain bridge instances more { type filter hook forward priority 1; policy drop; }",
    ],
)
def test_rules_that_anybody_changed_are_loaded_again(applied, change):
    applied.apply()
    first = applied.ruleset()
    applied.host.run("nft", change)
    assert applied.ruleset() != first
    applied.apply()
    assert sorted(applied.ruleset().splitlines()) == sorted(first.splitlines())
    assert applied.apply().stderr == ""


def test_what_sets_learned_outlives_an_update_and_not_an_edit(applied):
    learned = "10:66:6a:4c:a1:99"
    bridge = applied.rules / "bridge.nft"
    applied.apply()
    for mac, count in ((learned, 7), (WEB[0], 9)):
        element = f"{{ {mac} counter packets {count} bytes 1 }}"
        applied.host.run("nft", f"add element bridge instances instances_dropped {element}")
    applied.host.update("add", *WEB)
    assert "the guard dropped 9 of web, 7 of 10:66:6a:4c:a1:99\n" in applied.apply().stderr
    applied.host.update("add", WEB[0], "10.83.0.12")
    result = applied.apply()
    assert "bridge.nft: loaded" in result.stderr and "dropped" not in result.stderr
    assert learned in applied.host.run("nft", "list", "set", "bridge", "instances", "instances_dropped").stdout
    bridge.write_text(bridge.read_text().replace("other protocol", "edited"))
    applied.apply()
    assert learned not in applied.host.run("nft", "list", "set", "bridge", "instances", "instances_dropped").stdout


def test_who_was_dropped_is_one_line_of_ten(applied):
    applied.apply()
    elements = ", ".join(f"10:66:6a:00:00:{n:02x} counter packets {n} bytes 1" for n in range(1, 100))
    applied.host.run("nft", f"add element bridge instances instances_dropped {{ {elements} }}")
    applied.host.update("add", *WEB)
    (line,) = [line for line in applied.apply().stderr.splitlines() if "dropped" in line]
    assert line.count(" of 10:66:6a:00:00:") == 10 and "99 of 10:66:6a:00:00:63, 98 of" in line
    assert line.endswith(", and of 89 others")


def test_registry_edited_to_no_object_of_objects_keeps_no_rules_out(applied):
    applied.apply()
    applied.host.run(
        "nft", "add element bridge instances instances_dropped { 10:66:6a:00:00:01 counter packets 9 bytes 1 }"
    )
    (applied.host.folder / "instances.json").write_text("[]")
    applied.host.run("nft", "add rule bridge instances guard accept")
    result = applied.apply()
    assert "dropped 9 of 10:66:6a:00:00:01\n" in result.stderr and "bridge.nft: loaded\n" in result.stderr


def test_set_of_another_type_than_the_one_there_replaces_its_table(applied):
    included = applied.rules / "registry"
    applied.write_settings(INSTANCES_ADDRESS_SETS="host,web", INSTANCES_BASE_PATH=str(included))
    for name in ("bridge.nft", "firewall.nft"):
        (applied.rules / name).unlink()
    text = f'table inet a\nflush table inet a\ntable inet a {{\ninclude "{included}.nftables_sets"\n}}\n'
    applied.write("a.nft", text)
    applied.apply()
    sets = Path(f"{included}.nftables_sets")
    sets.write_text(sets.read_text().replace("type ipv4_addr", "type ether_addr"))
    assert applied.apply().stderr == "instances-apply: a.nft: loaded\n"
    assert "ether_addr" in applied.ruleset() and "ipv4_addr" not in applied.ruleset()


def test_guard_of_the_former_release_is_replaced(applied):
    former = """table bridge instances_asked {
        set asked { typeof ether saddr . udp dport; size 65536; flags dynamic,timeout; timeout 1m; }
        chain input { type filter hook input priority 10; policy accept; }
    }
    table bridge instances {
        set instances_ip { type ipv4_addr; }
        chain prerouting { type filter hook prerouting priority 0; policy accept; }
    }"""
    applied.host.run("nft", former)
    assert "Error" not in applied.apply().stderr
    assert applied.tables() == TABLES
    assert "chain prerouting {" not in applied.host.run("nft", "list", "table", "bridge", "instances").stdout
    assert applied.apply().stderr == ""


def test_missing_set_is_told_with_the_setting_that_makes_it(applied):
    applied.write_settings(INSTANCES_ADDRESS_SETS="host")
    told = "instances-apply: firewall.nft: not loaded: add web to INSTANCES_ADDRESS_SETS\n"
    assert told in applied.apply(check=False).stderr and applied.tables() == TABLES - {"inet instances"}
    applied.write_settings(INSTANCES_ADDRESS_SETS="host,web")
    applied.apply()
    assert applied.tables() == TABLES


def test_only_the_broken_file_is_tried_again(applied):
    applied.write("broken.nft", replacing("inet broken", "wrong"))
    applied.apply(check=False)
    first = applied.ruleset("-a")
    result = applied.apply(check=False)
    assert result.returncode == 1 and "syntax error" in result.stderr and ": loaded" not in result.stderr
    assert applied.ruleset("-a") == first


def test_guard_that_only_observes_is_a_setting(applied):
    applied.apply()
    for settings, verdict in (({"INSTANCES_GUARD": "observe"}, "accept"), ({}, "drop")):
        applied.write_settings(INSTANCES_ADDRESS_SETS="host,web", **settings)
        applied.apply()
        chain = applied.host.run("nft", "list", "chain", "bridge", "instances", "instances_verdict").stdout
        assert re.search(rf"^\s*{verdict}$", chain, re.MULTILINE)
    applied.settings.write_text(applied.settings.read_text() + '; also systemd\'s\n # words\nB="c d" # words\nE=\n')
    assert applied.apply().returncode == 0


def test_all_is_in_force_after_a_boot(applied):
    applied.apply()
    first = applied.ruleset()
    applied.boot()
    applied.hosts.unlink()
    applied.apply()
    assert applied.ruleset() == first and applied.hosts.exists()


def test_files_and_names_are_made_once_where_rules_cannot_be_listed(applied):
    nft = applied.host.folder / "nft"
    nft.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    nft.chmod(0o755)
    path = f"{applied.host.folder}:" + re.search("PATH='(.*)'", applied.settings.read_text())[1]
    applied.write_settings(INSTANCES_ADDRESS_SETS="host,web", PATH=path)
    failed = "instances-apply: nft can't list the rules: broken\n"
    assert re.fullmatch(f".*1 instances, .*\n{failed}", applied.apply(check=False).stderr)
    assert applied.apply(check=False).stderr == failed


def test_addresses_that_dnsmasq_resolved_stay_at_an_update(applied):
    applied.host.example("egress/egress.nft").rename(applied.rules / "egress.nft")
    applied.apply()
    applied.host.run("nft", "add element inet egress allow_v4 { 192.0.2.1 }")
    applied.host.update("add", *WEB)
    applied.apply()
    assert "192.0.2.1" in applied.ruleset() and "10.83.0.11" in applied.ruleset()
    (applied.rules / "egress.nft").unlink()
    applied.apply()
    assert applied.tables() == TABLES


def test_broken_rule_file_keeps_what_it_made_and_no_other_out(applied):
    bridge = applied.rules / "bridge.nft"
    good = bridge.read_text()
    applied.apply()
    bridge.write_text("table bridge instances\ndelete table bridge instances\ntable bridge instances {")
    applied.host.update("add", *WEB)
    for _ in range(2):
        result = applied.apply(check=False)
        assert result.returncode == 1 and "bridge.nft:" in result.stderr and "syntax error" in result.stderr
        assert "10.83.0.11" in applied.host.run("nft", "list", "table", "inet", "instances").stdout
        assert "10.83.0.11" not in applied.host.run("nft", "list", "table", "bridge", "instances").stdout
        assert "web.instance.internal" in applied.hosts.read_text()
    bridge.write_text(good)
    assert applied.apply().stderr == "instances-apply: bridge.nft: loaded\n" and "10.83.0.11" in applied.ruleset()
    applied.write("broken.nft", "table inet broken\ndelete table inet broken\ntable inet broken {")
    applied.boot()
    assert applied.apply(check=False).returncode == 1
    assert applied.tables() == TABLES


def test_broken_registry_is_told_and_keeps_nothing_that_is_made_out(applied):
    applied.apply()
    registry = applied.host.folder / "instances.json"
    whole = registry.read_bytes()
    registry.write_bytes(whole[:-9])
    (applied.host.folder / "instances.updated").touch()
    applied.boot()
    applied.hosts.unlink()
    for _ in range(2):
        result = applied.apply(check=False)
        assert result.returncode == 1 and "mend it" in result.stderr
        assert applied.tables() == TABLES and applied.hosts.exists()
    registry.write_bytes(whole)
    assert applied.apply().returncode == 0 and applied.apply().stderr == ""


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_names_are_made_without_rules(applied, folder):
    shutil.rmtree(applied.rules)
    if folder == "empty":
        applied.rules.mkdir()
    applied.apply()
    assert "10.83.0.1 host.instance.internal" in applied.hosts.read_text() and applied.tables() == set()


def test_names_are_readable_to_dnsmasq_whatever_the_umask_was(applied):
    applied.host.run("sh", "-c", f'umask 077; mkdir {applied.hosts.parent}; exec "$@"', "sh", *applied.host.applying())
    modes = [path.stat().st_mode & 0o777 for path in (applied.hosts.parent, applied.hosts)]
    assert modes == [0o755, 0o644]
    applied.hosts.chmod(0o600)  # of a run of another script
    applied.apply()
    assert applied.hosts.stat().st_mode & 0o777 == 0o644


def test_names_that_were_deleted_come_back(applied):
    applied.apply()
    applied.hosts.unlink()
    applied.apply()
    assert "10.83.0.1 host.instance.internal" in applied.hosts.read_text()
    for ending in ("hosts", "nftables_chains", "nftables_sets"):
        Path(f"{applied.host.base}.{ending}").unlink()
        applied.apply()
        assert Path(f"{applied.host.base}.{ending}").exists()


def test_update_while_the_names_are_given_comes_into_force_in_the_next_run(applied):
    need("strace")
    applied.apply()
    applied.host.update("add", *WEB)
    applied.host.process()
    delayed = ["strace", "-qq", "-o", applied.host.folder / "strace", "-e", "inject=rename:delay_enter=3000000:when=1"]
    running = applied.host.start(*delayed, *applied.host.applying())
    wait_for((applied.hosts.parent / ".instances.hosts").exists, "the names, which are not in place yet")
    applied.host.update("add", WEB[0], "10.83.0.12")
    applied.host.process()
    assert running.wait(60) == 0
    applied.apply()
    assert "10.83.0.12 web.instance.internal" in applied.hosts.read_text()


def test_several_at_once_do_it_once(applied):
    applied.write("plain.nft", replacing("inet plain", "chain a { counter accept; }"))
    runs = [applied.host.start(*applied.host.applying(), stderr=subprocess.PIPE, text=True) for _ in range(4)]
    output = "".join(run.communicate(timeout=60)[1] for run in runs)
    assert [run.returncode for run in runs] == 4 * [0] and output.count("instances,") == 1
    assert applied.host.run("nft", "list", "table", "inet", "plain").stdout.count("accept") == 1


def test_run_that_is_killed_is_finished_by_the_next(applied):
    started = time.monotonic()
    applied.apply()
    whole = time.monotonic() - started
    for part in range(12):
        applied.boot()
        applied.host.update("add", WEB[0], f"10.83.0.{100 + part}", "web")
        process = subprocess.Popen(applied.host.command(*applied.host.applying()), stderr=subprocess.DEVNULL)
        time.sleep(whole * part / 12)
        process.kill()
        process.wait()
        applied.apply()
        assert f"10.83.0.{100 + part} web" in applied.hosts.read_text()
        assert applied.tables() == TABLES and applied.ruleset().count(f"10.83.0.{100 + part} ") == 3
        assert applied.apply().stderr == ""


def test_systemd_units_are_valid_and_hardened(tmp_path):
    need("systemd-analyze")
    units = [EXAMPLES / "systemd" / f"instances.{kind}" for kind in ("path", "service", "timer")]
    for unit in units:
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/local/sbin/instances-apply", str(APPLY)))
    result = run("systemd-analyze", "verify", *[tmp_path / unit.name for unit in units])
    assert (result.stdout, result.stderr) == ("", "")
    exposure = run("systemd-analyze", "security", "--offline=true", tmp_path / "instances.service", check=False).stdout
    assert float(re.search(r"Overall exposure level.*: ([0-9.]+)", exposure)[1]) < 3


def test_cron_example_runs_it_each_minute_with_the_settings_of_the_package(applied):
    lines = (EXAMPLES / "cron" / "instances").read_text().splitlines()
    (path,) = [line for line in lines if line.startswith("PATH=")]
    schedule, user, command = re.fullmatch(r"((?:\S+ ){5})(\w+) (.*)", lines[-1]).groups()
    assert (schedule.split(), user) == (5 * ["*"], "root")
    stand_in = applied.host.folder / "logger"  # syslog's, which is the machine's own
    stand_in.write_text(f"#!/bin/sh\ncat >>{applied.host.folder}/syslog\n")
    stand_in.chmod(0o755)
    apply = " ".join(map(shlex.quote, applied.host.applying()))
    script = f"{path.replace('=', f'={applied.host.folder}:')}\n" + command.replace("instances-apply", apply)
    applied.host.run("env", "-i", "sh", "-c", script)
    assert "bridge.nft: loaded" in (applied.host.folder / "syslog").read_text() and applied.tables() == TABLES
