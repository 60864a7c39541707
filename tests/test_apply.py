"""instances-apply, and what it hands over: the examples dnsmasq, nftables, systemd and cron."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import need
from lab import APPLY, EXAMPLES, Host, run, wait_for

pytestmark = pytest.mark.slow
TABLES = {"bridge instances", "bridge instances_asked", "inet instances"}  # of the two examples
WEB = ("10:66:6a:4c:a1:11", "10.83.0.11", "web")


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
        return self.host.run(APPLY, self.settings, check=check, **options)

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
    applied.host.run("strace", "-f", "-qq", "-e", "trace=execve", "-o", log, APPLY, applied.settings)
    calls = [line for line in log.read_text().splitlines() if '/nft"' in line and line.endswith("= 0")]
    assert len(calls) == 1 and '"list"' in calls[0] and "python" not in log.read_text()
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
    for text in (None, "INSTANCES_ADDRESS_SETS='host"):
        applied.settings.unlink() if text is None else applied.settings.write_text(text)
        assert applied.apply(check=False).returncode != 0
        assert applied.tables() == set() and not applied.hosts.exists()
    for wrong in (("a", "b"), ("--help",), ("",)):
        result = applied.host.run(APPLY, *wrong, check=False)
        assert (result.returncode, result.stderr) == (2, "usage: instances-apply [SETTINGS]\n")


def test_another_base_refuses_the_rules_of_the_former_one(applied):
    applied.apply()
    first = applied.ruleset("-a")
    applied.write_settings(INSTANCES_BASE_ID="br0", INSTANCES_ADDRESS_SETS="host,web")
    result = applied.apply(check=False)
    assert result.returncode == 1
    assert re.search(
        r"^instances-apply: bridge.nft: not loaded: .*/instances-br0,.*/instances.nftables_chains$", result.stderr, re.M
    )
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
    added = applied.write("added.nft", "table inet added { chain a { counter; }; }\n")
    applied.apply()
    assert "inet added" in applied.tables()
    added.write_text("table ip other { chain a { drop; }; }\n")  # another table, and no word of the former one
    applied.apply()
    assert applied.tables() == TABLES | {"inet mine", "ip other"}
    added.unlink()
    (applied.rules / "firewall.nft").unlink()
    assert "firewall.nft is gone" in applied.apply().stderr
    assert applied.tables() == TABLES - {"inet instances"} | {"inet mine"}
    assert applied.apply().stderr == ""


def test_rule_file_without_words_to_replace_is_loaded_once(applied):
    file = applied.write("plain.nft", "table inet plain {\n\tchain a {\n\t\tcounter accept\n\t}\n}\n")
    for text in (file.read_text(), file.read_text() + "# edited\n"):
        file.write_text(text)
        applied.apply()
        assert applied.host.run("nft", "list", "table", "inet", "plain").stdout.count("accept") == 1


def test_renamed_rule_file_keeps_its_table(applied):
    applied.apply()
    (applied.rules / "bridge.nft").rename(applied.rules / "a-bridge.nft")
    (applied.rules / "firewall.nft").rename(applied.rules / "z-firewall.nft")
    applied.apply()
    assert applied.tables() == TABLES
    first = applied.ruleset("-a")
    assert applied.apply().stderr == "" and applied.ruleset("-a") == first


def test_tables_of_others_stay_when_a_file_that_adds_to_them_is_taken_away(applied):
    applied.host.run("nft", "add table inet mine; add chain inet mine kept")
    file = applied.write("more.nft", "table inet mine { chain more { }\n }\ntable inet own { }\n")
    applied.apply()
    file.unlink()
    applied.apply()
    assert "inet own" not in applied.tables() and "chain kept" in applied.ruleset()


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


def test_two_rule_files_of_one_table_are_told(applied):
    shutil.copy(applied.rules / "bridge.nft", applied.rules / "old-bridge.nft")
    result = applied.apply(check=False)
    assert result.returncode == 1 and "table bridge instances" in result.stderr
    (applied.rules / "old-bridge.nft").unlink()
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
        "delete table inet one; delete table inet indented; delete table inet commented",
    ],
)
def test_rules_that_anybody_changed_are_loaded_again(applied, change):
    styles = "table inet one { chain a { drop; }; }\n  table inet indented {\n}\ntable inet commented { # words\n}\n"
    applied.write("styles.nft", styles)
    applied.apply()
    first = applied.ruleset()
    applied.host.run("nft", change)
    assert applied.ruleset() != first
    applied.apply()
    assert sorted(applied.ruleset().splitlines()) == sorted(first.splitlines())
    assert applied.apply().stderr == ""


def test_all_is_in_force_after_a_boot(applied):
    applied.apply()
    first = applied.ruleset()
    applied.boot()
    applied.hosts.unlink()
    applied.apply()
    assert applied.ruleset() == first and applied.hosts.exists()


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
    bridge.write_text("table bridge instances {")
    applied.host.update("add", *WEB)
    for _ in range(2):
        result = applied.apply(check=False)
        assert result.returncode == 1 and "bridge.nft:" in result.stderr and "syntax error" in result.stderr
        assert "10.83.0.11" in applied.host.run("nft", "list", "table", "inet", "instances").stdout
        assert "10.83.0.11" not in applied.host.run("nft", "list", "table", "bridge", "instances").stdout
        assert "web.instance.internal" in applied.hosts.read_text()
    bridge.write_text(good)
    assert applied.apply().stderr == "instances-apply: bridge.nft: loaded\n" and "10.83.0.11" in applied.ruleset()
    applied.write("broken.nft", "table inet broken {")
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
    applied.host.run("sh", "-c", f"umask 077; mkdir {applied.hosts.parent}; exec {APPLY} {applied.settings}")
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


def test_several_at_once_do_it_once(applied):
    applied.write("plain.nft", "table inet plain { chain a { counter accept; }; }\n")
    runs = [applied.host.start(APPLY, applied.settings, stderr=subprocess.PIPE, text=True) for _ in range(4)]
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
        process = subprocess.Popen(applied.host.command(APPLY, applied.settings), stderr=subprocess.DEVNULL)
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


def test_cron_example_is_a_line_a_minute_for_root():
    lines = [line for line in (EXAMPLES / "cron" / "instances").read_text().splitlines() if line[:1] == "*"]
    assert len(lines) == 1 and lines[0].startswith("* * * * * root ")
    assert run("sh", "-n", "-c", lines[0].removeprefix("* * * * * root ")).returncode == 0
