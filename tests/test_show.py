"""instances-show, on a guarded host with a real dnsmasq and real guests."""

import contextlib
import json
import os
import re
import shutil
from runpy import run_path

import pytest
from conftest import PROGRAMS, need
from lab import APPLY, EXAMPLES, HOST_MAC, TOP, Host, make_etc, mounted, run, wait_for
from test_incus import INCUS, answer, instance
from test_libvirt import FILTERED, INTERFACE, UUID, domain

pytestmark = pytest.mark.slow

SHOW = EXAMPLES / "show"
WEB, DB, STRANGER = (f"10:66:6a:4c:a1:{number}" for number in (11, 12, 77))


class Shown(Host):
    """A guarded host, whose settings are in a /etc of its own, with the guests web and db."""

    def __init__(self, folder):
        super().__init__(folder)
        self.etc, self.bin = make_etc(folder / "etc"), folder / "bin"
        for place in (self.etc / "default", self.bin, folder / "run"):
            place.mkdir(parents=True)
        programs = (self.bin, TOP, APPLY.parent, SHOW, EXAMPLES / "incus")
        self.path = ":".join(map(str, [*programs, "/usr/sbin", "/usr/bin", "/sbin", "/bin"]))
        self.start_guarded()
        self.settings = self.etc / "default" / "instances"
        self.config, self.web, self.db = folder / "br0.conf", self.client("web", WEB), self.client("db", DB)
        for client in (self.web, self.db):
            client.dhcp4(client.label)
        wait_for(lambda: self.web.resolve("db.instance.internal", "A"), "names")

    def write_settings(self, **variables):
        """Write the settings to where instances-apply finds them by itself."""
        file = super().write_settings(PATH=self.path, **variables)
        shutil.copy(file, self.etc / "default" / "instances")
        return file

    def applying(self):
        return self.on_host(str(APPLY))

    def on_host(self, *command):
        """Return the command for a host with these settings, the programs on the PATH."""
        places = {"/run": self.folder / "run", "/etc": self.etc}
        return [*mounted(places), "env", f"PATH={self.path}", *command]

    def show(self, *arguments):
        """Return what instances-show prints, its errors too, and its exit status."""
        result = self.run(*self.on_host("instances-show", *arguments), check=False)
        assert "Traceback" not in result.stderr
        return result.stdout + result.stderr, result.returncode

    def restart_dnsmasq(self, text):
        """Have dnsmasq run with this configuration."""
        self.stop_dnsmasq()
        self.config.write_text(text)
        self.start_dnsmasq(config=self.config)

    def faults(self):
        """Return what --check says; its exit status says whether there is a fault."""
        lines, status = self.show("--check")
        assert (status, lines == "nothing is wrong\n") in ((0, True), (1, False))
        return lines if status else ""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    need(*PROGRAMS, "bridge")
    with contextlib.closing(Shown(tmp_path_factory.mktemp("shown"))) as host:
        yield host


def test_table_has_a_line_for_each_instance(shown):
    text, status = shown.show()
    heads, *rows = text.splitlines()
    db, host, web = (row for name in ("db ", "host ", "web ") for row in rows if row.startswith(name))
    assert status == 0 and re.match("NAME +MAC ADDRESS ", heads) and db.split()[:3] == ["db", DB, shown.db.port]
    address, port = shown.web.addresses("10.")[0], shown.web.port
    assert re.fullmatch(rf"web +{WEB} +{port} +\d\d \w{{3}} \d\d:\d\d +(\d+ +)?{address}.*", web)
    assert f"{HOST_MAC}  br0 " in host and host.endswith("10.83.0.1 2001:67c:83::1 fd83:5eed::1")


def test_instance_is_found_by_whatever_one_has_of_it_and_by_an_address_that_it_made_itself(shown):
    shown.update("--allow", "web", "10.83.0.50", "10.99.0.0/24")
    made = "2001:67c:83:0:1266:6aff:fe4c:a111"  # by SLAAC, RFC 4291, appendix A
    for text in ("WEB", WEB.upper(), shown.web.addresses("10.")[0], "10.99.0.7", shown.web.addresses("fe80")[0], made):
        said, status = shown.show(text)
        assert status == 0 and said.startswith(f"web: {WEB} in ") and said.count(" in /") == 1, text
    assert "  may also send from: 10.99.0.0/24\n" in said and f"  port: {shown.web.port}, heard " in said
    assert shown.show("nobody") == ("instances-show: nobody: nobody has it, and nothing was dropped of it\n", 1)
    shown.db.run("ip", "address", "add", "fe80::db/64", "dev", "eth0", "nodad")
    shown.db.run("ping", "-c", "1", "-I", "fe80::db%eth0", "fe80::1266:6aff:fe4c:a1fe%eth0")
    said = wait_for(lambda: (text := shown.show("fe80::db"))[1] == 0 and text[0], "a claim")
    assert said.startswith(f"db: {DB} ") and "  uses by itself: fe80::db\n" in said


@contextlib.contextmanager
def sending(client, address, to="10.83.0.1"):
    """Have a guest use an address, of either version in a prefix that the host is in, and send from it."""
    client.run("ip", "address", "add", f"{address}/24", "dev", "eth0", "nodad")
    ping = client.start("ping", "-q", "-i", "0.2", "-I", address, to)
    try:
        yield
    finally:
        client.stop(ping)
        client.run("ip", "address", "delete", f"{address}/24", "dev", "eth0")


def follow_remedy(shown, said, client, address, host="10.83.0.1", name=()):
    """Do what is said of an address, and wait until the guest reaches the host from there."""
    remedy = re.search(f"from {address}, .*have that: '(.*)'", said)[1]
    shown.run("env", f"PATH={shown.path}", f"INSTANCES_BASE_PATH={shown.base}", *remedy.split(), *name)
    shown.run("ip", "neighbour", "flush", "dev", "br0")  # of the former holder, which has not given it up
    reached = ["ping", "-c", "1", "-W", "1", "-I", address, host]
    wait_for(lambda: client.run(*reached, check=False).returncode == 0, "an answer")


def test_guest_with_a_wrong_address_is_told_which_and_whose_and_how_it_gets_it(shown):
    """Another's, and nobody's, of both versions. Each remedy is followed, and then the guest reaches the host."""
    own, others = shown.web.addresses("10.")[0], shown.db.addresses("10.")[0]
    shown.update("--allow", "web", "10.83.0.50")
    for address, whose in ((others, "db's"), ("10.83.0.60", "nobody's"), ("fd83:5eed::60", "nobody's")):
        host = "fd83:5eed::1" if ":" in address else "10.83.0.1"
        with sending(shown.web, address, host):
            said = wait_for(lambda: address in (text := shown.show("web")[0]) and text, "what it sends")  # noqa: B023
            assert "): with an address, IP or MAC, that is not its sender's\n" in said
            assert f"  it sends from {address}, which is {whose}. If it is to have that: '" in said
            follow_remedy(shown, said, shown.web, address, host)
        assert shown.show(address)[0].startswith(f"web: {WEB}")
    assert shown.show("10.83.0.50")[0].startswith(f"web: {WEB}")
    assert "  for two seconds it has sent from no such IP address" in shown.show("web")[0]
    shown.update("--allow", "web")
    shown.update("add", WEB, own)
    shown.update("add", DB, others)
    shown.run("ip", "neighbour", "flush", "dev", "br0")


def test_sender_that_is_not_registered_is_shown_and_how_to_register_it(shown):
    """So is a guest that has another MAC address than before."""
    stranger = shown.client("stranger", STRANGER)
    with sending(stranger, "10.83.0.61"):
        said = wait_for(lambda: "10.83.0.61" in (text := shown.show(STRANGER)[0]) and text, "what it sends")
        assert said.startswith(f"{STRANGER} is not registered in ") and "frames (not registered)" in said
        assert shown.show()[0].splitlines()[-1].startswith(f"(not registered)  {STRANGER}  {stranger.port}")
        shown.update("add", "10:66:6a:4c:a1:78", "10.83.0.78", "moved")
        told = f"another MAC address now, not registered and dropped: see 'instances-show {STRANGER}'"
        assert told in shown.show("moved")[0]
        follow_remedy(shown, said, stranger, "10.83.0.61", name=["known"])
    assert shown.show("10.83.0.61")[0].startswith(f"known: {STRANGER} in ")


def test_each_reason_of_the_guard_is_explained(process, monkeypatch):
    monkeypatch.setenv("PATH", f"{SHOW}:{TOP}:/usr/bin:/bin")
    assert run_path(SHOW / "instances-check")["REASONS"].keys() == set(process.REASONS)


def test_guest_that_asks_too_often_is_told(shown):
    client = shown.db.start("udhcpc", "-f", "-i", "eth0", "-s", "/bin/true", "-T", "0", "-t", "30", "-n")
    wait_for(lambda: "(DHCP too often): more DHCP requests than 10 a minute" in shown.show("db")[0], "a drop")
    shown.db.stop(client)


def test_what_a_terminal_is_too_narrow_for_is_put_beneath(shown):
    need("script")
    command = " ".join(f"'{word}'" for word in shown.on_host("instances-show"))
    for columns in (60, 80, 200):
        text = shown.run("script", "-qec", f"stty cols {columns}; {command}", "/dev/null").stdout
        lines = re.sub("\x1b\\[[01]m", "", text).splitlines()
        assert (lines[1] == "    ADDRESSES, AND + WHAT ELSE IS ALLOWED") == (columns < 200)
        assert columns < 80 or max(map(len, lines)) <= columns
    assert text.count("\x1b[1mNAME") == 1 and "\x1b" not in shown.show()[0]


# ---- --check: each fault is made, and mended ----
def test_rules_that_somebody_flushed(shown):
    """What guests can then do is told, too."""
    assert shown.faults() == ""
    shown.run("nft", "flush", "ruleset")
    with sending(shown.db, "10.83.0.77"):
        told = f"{DB} has 10.83.0.77 on br0, which is not its own: see 'instances-show {DB}'"
        lines = wait_for(lambda: told in (lines := shown.faults()) and lines, told)
    assert f"{shown.folder}/rules/bridge.nft is not in force as it stands: run 'instances-apply'" in lines
    shown.run("ip", "neighbour", "flush", "dev", "br0")
    shown.run(*shown.applying())
    assert shown.faults() == ""


GUARDED, TWO = 'guarded = "br0"', 'guarded = { "br0",\n "br7" }'
FILES = {  # what is wrong with a file: the file, its text, or what is replaced in it and by what, and what is said
    "rules for no bridge": ("rules/bridge.nft", GUARDED, TWO, "guards br7, and there is no such bridge: put yours in"),
    "rules that fail": ("rules/a.nft", "", "table inet a {}\n", "a.nft is not in force as it stands: run 'instances-"),
    "nothing, it has no table": ("rules/a.nft", "", "define for_others = 10.83.0.1\n", ""),
    "nobody's marker": ("instances-br9.updated", "", "", "instances-br9.updated is of no registry in /etc/default"),
    "a remark": ("etc/default/instances", "", "INSTANCES_GUARD=observe # later\n", ": line 1 is not NAME=value"),
    "twice": ("etc/default/instances", "", "PATH=/bin\nPATH=/bin\n", ": line 2 is there twice"),
    "no registry": ("instances.json", "", "[]", "instances.json: mend it or move it away"),
}


@pytest.mark.parametrize("what", FILES)
def test_file_that_is_wrong_is_told_in_a_line(shown, what):
    name, old, new, said = FILES[what]
    file = shown.folder / name
    before = file.read_text() if file.exists() else None
    file.write_text(before.replace(old, new) if old else new)
    shown.run(*shown.applying(), check=False)
    assert re.fullmatch(f".*{re.escape(said)}.*\n" if said else "", shown.faults())
    assert not said.startswith("instances.json") or shown.show()[1] == 1
    file.write_text(before) if before else file.unlink()
    shown.run(*shown.applying())


def test_registry_whose_updates_nobody_applies(shown, tmp_path):
    settings, marker = shown.settings.with_name("instances-two"), tmp_path / "two.updated"
    settings.write_text(f"INSTANCES_BASE_PATH={tmp_path}/two\nINSTANCES_RULES={tmp_path}\nPATH='{shown.path}'\n")
    marker.touch()
    told = "has no rule file, so nothing is guarded: copy bridge.nft of examples/nftables there"
    assert shown.faults() == f"{tmp_path} {told}\n"
    os.utime(marker, (0, 0))
    assert f"{marker} waits for more than a minute: 'instances-apply'" in shown.faults()
    shown.run(*shown.on_host(str(APPLY)))
    assert str(marker) not in shown.faults()
    settings.unlink()


def test_prefix_in_which_guests_make_addresses_for_themselves(shown):
    """Where dnsmasq tells them not to, nothing is wrong; nor where the settings have it."""
    shown.run("ip", "address", "add", "2001:67c:99::1/64", "dev", "br0", "nodad")
    text, settings = shown.config.read_text(), shown.settings.read_text()
    fault = "br0 has 2001:67c:99::/64, "
    assert fault not in shown.faults()
    shown.restart_dnsmasq(f"{text}dhcp-range=2001:67c:99::,ra-only\n")
    assert fault in shown.faults()
    shown.settings.write_text(f"{settings}INSTANCES_SLAAC=2001:67c:99::/64\n")
    assert fault not in shown.faults()
    shown.settings.write_text(settings)
    shown.run("ip", "address", "delete", "2001:67c:99::1/64", "dev", "br0")
    shown.restart_dnsmasq(text)


def test_dnsmasq_with_a_lease_that_is_not_registered_or_without_names_or_the_script_or_stopped(shown):
    text, address = shown.config.read_text(), shown.web.addresses("10.")[0]
    shown.stop_dnsmasq()
    shown.update("--remove", "web")
    lines = shown.faults()
    assert f"the lease of {address} is not registered" in lines
    assert "10.83.0.1 does not give db's address: 'systemctl status dnsmasq'" in lines
    shown.update("add", WEB, address, "web")
    shown.restart_dnsmasq(re.sub("^(dhcp-script|hostsdir)=.*\n", "", text, flags=re.MULTILINE))
    lines = shown.faults()
    assert "the dnsmasq that serves br0 reports no lease to the registry" in lines
    assert "10.83.0.1 does not give db's address" in lines
    shown.restart_dnsmasq(text)


def test_guests_that_can_take_another_mac_address(shown):
    """By what Incus and libvirt say of them: of each one guest with a filter, and one without."""
    registry = shown.folder / "instances.json"
    text = registry.read_text()
    marks = {WEB: {"incus": "default/web"}, DB: {"libvirt": UUID}}
    registry.write_text(json.dumps({mac: i | marks.get(mac, {}) for mac, i in json.loads(text).items()}, indent=2))
    filtered, bare = instance("box", "10:66:6a:00:00:05"), instance("web", WEB, **{"security.mac_filtering": "false"})
    interfaces = INTERFACE.format(DB, "br0", ""), INTERFACE.format(STRANGER, "br0", FILTERED)
    xml = domain("db", *interfaces).replace("<domain>", "<domain type='kvm'>").replace("</domain>", "\n</domain>")
    virsh = f"#!/bin/sh\ncase $1 in list) echo {UUID} ;; *) cat {shown.bin}/xml ;; esac\n"
    answers = {"list": answer([filtered, bare]), "one": answer({}), "asked": "", "xml": xml}
    for name, content in (answers | {"incus": INCUS, "virsh": virsh}).items():
        (shown.bin / name).write_text(content)
        (shown.bin / name).chmod(0o755)
    lines = shown.faults()
    assert f"{WEB} web: without security.mac_filtering it can be anybody" in lines
    assert lines.count("can be anybody") == 2 and f"{DB}: without libvirt's filter" in lines
    registry.write_text(text)
    for name in ("incus", "virsh"):
        (shown.bin / name).unlink()


# ---- What others wrote, and what programs read ----
def test_only_printable_text_is_shown_of_what_others_wrote(shown, tmp_path):
    """Of a registry edited by hand, and of dnsmasq's leases; in each form."""
    bad = '\x1b]0;x\x07\x9b31m\u202e\n\x7f"'
    registry = {WEB: {"name": bad, "ipv4": bad, "ipv6_gua": ["x"], "allowed": [bad, 7], "incus": bad}}
    registry |= {bad: {"name": {}}, DB: {"name": "db", "allowed": "no list", "ipv4": None}}
    (tmp_path / "instances.json").write_text(json.dumps(registry))
    leases = f"9999999999 {DB} {bad.strip()} {bad} *\n0 {DB} 10.83.0.9 x *\n\xff 1 2\n{'9' * 5000} {DB} 1 2 3\n"
    (tmp_path / "leases").write_bytes(leases.encode("latin-1", "replace"))
    settings = shown.settings.with_name("instances-bad")
    settings.write_text(f"INSTANCES_BASE_PATH={tmp_path}/instances\n")
    for arguments in ((), (WEB,), ("db",), ("10.83.0.9",), ("--json",), ("--metrics",), ("--check",)):
        text, status = shown.show(*arguments)
        assert status == (arguments in (("10.83.0.9",), ("--check",))), text
        assert text.replace("\n", "").isprintable() and text.isascii()
        if arguments == ("--metrics",) and shutil.which("promtool"):
            assert run("promtool", "check", "metrics", input=text).stdout == ""
    settings.unlink()


def test_metrics_are_numbers_of_what_is_there(shown):
    with sending(shown.web, "10.83.0.60"):
        wait_for(lambda: shown.dropped(WEB), "a drop")
    text, rows = shown.show("--metrics")[0], json.loads(shown.show("--json")[0])
    dropped = sum(sum(row["dropped"].values()) for row in rows)
    registered = sum(row["registered"] for row in rows)
    assert f'instances_registered{{registry="{shown.base}"}} {registered}\n' in text
    counts = re.findall(r"^instances_dropped_frames_total{.*} (\d+)$", text, re.MULTILINE)
    assert 0 < sum(map(int, counts)) <= dropped
    shown.update("--allow", "web", "10.83.0.51")

    def in_force():
        found = re.findall(r"^instances_\w+_timestamp_seconds{.*} (.*)$", shown.show("--metrics")[0], re.MULTILINE)
        return 0 < float(found[0]) <= float(found[1])

    wait_for(in_force, "rules newer than the registry")


# Samples of each minute, and which alerts there are later
ALERTS = """
rule_files: [{rules}]
tests:
  - interval: 1m
    input_series:
      - series: 'instances_registry_timestamp_seconds{{registry="r"}}'
        values: '100x3 200x8 200x20'
      - series: 'instances_in_force_timestamp_seconds{{registry="r"}}'
        values: '100x11 210x20'
      - series: 'instances_dropped_frames_total{{registry="r",mac="m",name="web",reason="ARP address"}}'
        values: '0x1 0+120x30'
    promql_expr_test:
      - {{expr: &firing 'ALERTS{{alertstate="firing"}}', eval_time: 5m, exp_samples: []}}
      - {{expr: *firing, eval_time: 8m, exp_samples: [{{labels: '{first}', value: 1}}]}}
      - {{expr: *firing, eval_time: 25m, exp_samples: [{{labels: '{second}', value: 1}}]}}
"""
FIRST = 'ALERTS{alertname="InstancesNotInForce",alertstate="firing",registry="r"}'
SECOND = 'ALERTS{alertname="InstancesDropped",alertstate="firing",mac="m",name="web",registry="r"}'


def test_prometheus_takes_the_numbers_and_alerts(shown, tmp_path):
    need("promtool")
    assert run("promtool", "check", "metrics", input=shown.show("--metrics")[0]).stdout == ""
    rules, tests = SHOW / "instances.rules.yml", tmp_path / "tests.yml"
    run("promtool", "check", "rules", rules)
    tests.write_text(ALERTS.format(rules=rules, first=FIRST, second=SECOND))
    run("promtool", "test", "rules", tests)
