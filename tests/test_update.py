"""instances-update.py: what each action does to the registry, and what it says."""

import ipaddress
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys

import pytest
from conftest import lock_held, locked_out, need
from hypothesis import given
from hypothesis import strategies as st
from lab import EDIT, EXAMPLES, HOST_MAC, UPDATE, environment, run_script, wait_for

MAC, OTHER = "10:66:6a:4c:a1:11", "10:66:6a:4c:a1:12"


def run(base, *arguments, **variables):
    return run_script(UPDATE, *arguments, base=base, **variables)


def lease(base, *arguments, **variables):
    """Run the script as dnsmasq does."""
    return run(base, *arguments, DNSMASQ_LEASE_EXPIRES="1795000000", **variables)


def read(base):
    return json.loads(base.with_suffix(".json").read_text())


def write(base, registry):
    base.with_suffix(".json").write_text(registry if isinstance(registry, str) else json.dumps(registry))


def files(base):
    return {path.name: path.read_bytes() for path in base.parent.iterdir() if path.is_file()}


def test_new_lease_makes_instance_marker_and_one_line(base):
    result = run(base, "add", MAC, "10.83.0.11", "web")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"instances-update.py: {MAC} web: new, ipv4 10.83.0.11\n"
    assert read(base) == {MAC: {"name": "web", "ipv6_lla": "fe80::1266:6aff:fe4c:a111", "ipv4": "10.83.0.11"}}
    assert base.with_suffix(".updated").exists()


@pytest.mark.parametrize("action", ["add", "old"])
def test_repeated_lease_changes_and_prints_nothing(base, action):
    run(base, "add", MAC, "10.83.0.11", "web")
    base.with_suffix(".updated").unlink()
    before = files(base)
    result = run(base, action, MAC, "10.83.0.11", "other")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert files(base) == before


@pytest.fixture(scope="module", autouse=True)
def held_up(tmp_path_factory):
    """A run that changes something, while somebody holds the lock: begun first, since it takes 10 s."""
    base = tmp_path_factory.mktemp("held") / "instances"
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11"}})
    with locked_out(base, UPDATE, "old", MAC, "10.83.0.12", "web") as future:
        yield base, future


@pytest.mark.parametrize("layout", [None, 2])
@pytest.mark.parametrize(
    "arguments", [("old", MAC, "10.83.0.11"), ("--rename", MAC, "web"), ("--rename", OTHER, "db"), ("--remove", OTHER)]
)
@pytest.mark.parametrize("variables", [{}, {"DNSMASQ_DATA_MISSING": "1"}])
def test_run_that_changes_nothing_waits_for_nobody(base, arguments, layout, variables):
    write(base, json.dumps({MAC: {"name": "web", "ipv4": "10.83.0.11", "ipv6_lla": "fe80::1"}}, indent=layout))
    with lock_held(base) as holder:
        result = run(base, *arguments, **variables)
        assert (result.returncode, result.stdout) == (0, "") and holder.poll() is None
        assert result.stderr == "" or OTHER in arguments


def test_what_others_did_while_a_run_waited_is_not_done_again(base):
    need("strace")
    log = base.parent / "strace"
    command = ["strace", "-o", log, sys.executable, UPDATE, "add", MAC, "10.0.0.1", "web"]
    with lock_held(base) as holder:
        waiting = subprocess.Popen(command, env=environment(base), stdout=subprocess.PIPE, text=True)
        wait_for(lambda: log.exists() and "EAGAIN" in log.read_text(), "a try to lock")
        write(base, {MAC: {"name": "db", "ipv4": "10.0.0.1"}})
        holder.kill()
        assert waiting.communicate()[0] == "" and waiting.returncode == 0
    assert read(base) == {MAC: {"name": "db", "ipv4": "10.0.0.1"}} and not base.with_suffix(".updated").exists()


def test_unregistered_address_of_known_instance_waits_for_nobody(base):
    write(base, {MAC: {"name": "web"}})
    with lock_held(base):
        result = run(base, "add", "x", "fe80::1", DNSMASQ_MAC=MAC)
    assert (result.returncode, result.stdout) == (0, "") and "fe80::1 is not registered" in result.stderr


def test_ipv6_lease_is_registered_by_dnsmasq_mac(base):
    duid = "00:01:00:01:2f:8a:5b:10:66:6a:4c:a1:11"
    run(base, "add", duid, "2001:67c:83::11", "web", DNSMASQ_MAC=MAC.upper())
    run(base, "add", duid, "fd83:5eed::11", "web", DNSMASQ_MAC=MAC)
    assert list(read(base)) == [MAC]
    assert read(base)[MAC]["ipv6_gua"] == "2001:67c:83::11" and read(base)[MAC]["ipv6_ula"] == "fd83:5eed::11"


@pytest.mark.parametrize("variables", [{}, {"DNSMASQ_MAC": ""}])
@pytest.mark.parametrize("duid", ["00:04:9c:11", "00:02:00:00:00:01"])  # one of them as long as a MAC address
def test_ipv6_lease_without_mac_does_nothing(base, duid, variables):
    result = lease(base, "old", duid, "fd83:5eed::14", "mail", **variables)
    assert (result.returncode, result.stdout, result.stderr, files(base)) == (0, "", "", {})


@pytest.mark.parametrize(
    "name", ["3cx", "my_host", "-x", "x-", "a" * 64, 'a"b', "a\nb", "a b", "a.b", "ä", "\udcff", "web\x1b[2J"]
)
def test_unusable_name_leaves_new_instance_unnamed(base, name):
    result = run(base, "add", MAC, "10.83.0.11", name)
    assert result.returncode == 0 and read(base)[MAC]["name"] == "" and read(base)[MAC]["ipv4"] == "10.83.0.11"
    assert result.stderr.count("\n") == 1 and result.stderr.isascii() and result.stderr[:-1].isprintable()
    assert "warning" in result.stderr and "name" in result.stderr


def test_longest_name_is_taken_as_given(base):
    run(base, "add", MAC, "10.83.0.11", "W" + "-1" * 31)
    assert read(base)[MAC]["name"] == "W" + "-1" * 31


def test_taken_name_in_other_case_leaves_new_instance_unnamed(base):
    run(base, "add", MAC, "10.83.0.11", "web")
    result = run(base, "add", OTHER, "10.83.0.12", "WEB")
    assert (read(base)[MAC]["name"], read(base)[OTHER]["name"]) == ("web", "")
    assert "WEB is taken" in result.stderr and result.returncode == 0


@pytest.mark.parametrize("name", ["web", ""])
def test_name_of_known_instance_never_changes_by_lease(base, name):
    run(base, "add", MAC, "10.83.0.11", name)
    run(base, "add", MAC, "10.83.0.12", "other")
    assert read(base)[MAC]["name"] == name and read(base)[MAC]["ipv4"] == "10.83.0.12"


@pytest.mark.parametrize("known", [True, False])
def test_address_that_moves_leaves_its_former_holder(base, known):
    run(base, "add", MAC, "10.83.0.11", "web")
    if known:
        run(base, "add", OTHER, "10.83.0.12", "db")
    run(base, "add", OTHER, "10.83.0.11", "db")
    assert "ipv4" not in read(base)[MAC] and read(base)[OTHER]["ipv4"] == "10.83.0.11"


def test_address_that_two_hold_in_an_edited_registry_is_taken_from_the_other(base):
    write(base, {MAC: {"name": "a", "ipv4": "10.0.0.1"}, OTHER: {"name": "b", "ipv4": "10.0.0.1"}})
    run(base, "add", MAC, "10.0.0.1")
    assert read(base) == {MAC: {"name": "a", "ipv4": "10.0.0.1"}, OTHER: {"name": "b"}}


LEASES = [("10.83.0.11", "10.83.0.12", "ipv4"), ("fd83:5eed::11", "fd83:5eed::12", "ipv6_ula")]
REMINDER = {"DNSMASQ_DATA_MISSING": "1"}


@pytest.mark.parametrize(("address", "other_address", "field"), LEASES)
@pytest.mark.parametrize("variables", [{}, REMINDER])
def test_old_takes_no_address_from_another_and_says_who_has_it(base, address, other_address, field, variables):
    run(base, "add", MAC, address, "web", DNSMASQ_MAC=MAC)
    run(base, "add", OTHER, other_address, "db", DNSMASQ_MAC=OTHER)
    before = files(base)
    result = lease(base, "old", OTHER, address, "db", DNSMASQ_MAC=OTHER, **variables)
    assert (result.returncode, result.stdout, files(base)) == (0, "", before)
    assert result.stderr == f"instances-update.py: warning: {OTHER}: {address} is not registered, {MAC} web has it\n"
    result = lease(base, "old", "10:66:6a:4c:a1:13", address, "new", DNSMASQ_MAC="10:66:6a:4c:a1:13", **variables)
    assert result.returncode == 0 and "has it" in result.stderr
    assert read(base)[MAC][field] == address and field not in read(base)["10:66:6a:4c:a1:13"]


@pytest.mark.parametrize("address", ["fd83:5eed::11", "2001:67c:83::11"])
def test_add_takes_no_ipv6_address_from_another(base, address):
    run(base, "add", MAC, address, "web", DNSMASQ_MAC=MAC)
    before = read(base)[MAC]
    result = lease(base, "add", OTHER, address, "db", DNSMASQ_MAC=OTHER)
    assert result.returncode == 0 and f"{address} is not registered, {MAC} web has it" in result.stderr
    assert read(base)[MAC] == before and address not in read(base)[OTHER].values()


@pytest.mark.parametrize(("address", "other_address", "field"), LEASES)
def test_old_sets_an_address_that_nobody_has(base, address, other_address, field):
    run(base, "add", MAC, address, DNSMASQ_MAC=MAC)
    run(base, "old", MAC, other_address, DNSMASQ_MAC=MAC)
    assert read(base)[MAC][field] == other_address


@pytest.mark.parametrize(("address", "other_address", "field"), LEASES)
def test_reminder_fills_an_empty_field_and_replaces_none(base, address, other_address, field):
    lease(base, "old", MAC, address, "web", DNSMASQ_MAC=MAC, **REMINDER)
    assert read(base)[MAC]["name"] == "web" and read(base)[MAC][field] == address
    before = files(base)
    result = lease(base, "old", MAC, other_address, "web", DNSMASQ_MAC=MAC, **REMINDER)
    assert (result.returncode, result.stdout, files(base)) == (0, "", before)
    assert result.stderr == f"instances-update.py: warning: {MAC} keeps {address}: {other_address} is not registered\n"


def test_reminder_fills_a_field_that_was_emptied_by_hand(base):
    write(base, {MAC: {"name": "web", "ipv4": ""}})
    lease(base, "old", MAC, "10.83.0.11", **REMINDER)
    assert read(base)[MAC]["ipv4"] == "10.83.0.11"


def test_add_is_never_a_reminder(base):
    run(base, "add", MAC, "10.83.0.11")
    lease(base, "add", OTHER, "10.83.0.11", **REMINDER)
    assert "ipv4" not in read(base)[MAC] and read(base)[OTHER]["ipv4"] == "10.83.0.11"


def test_documentation_address_makes_instance_without_address(base):
    result = run(base, "add", "x", "2001:db8::1", "web", DNSMASQ_MAC="00:16:3e:00:00:01")
    assert read(base) == {"00:16:3e:00:00:01": {"name": "web", "ipv6_lla": "fe80::216:3eff:fe00:1"}}
    assert result.returncode == 0 and "2001:db8::1 is not registered" in result.stderr


@pytest.mark.parametrize("address", ["fe80::5", "fe80::1266:6aff:fe4c:a112", "fec0::1", "::1", "ff02::1"])
def test_address_that_is_neither_global_nor_unique_local_is_not_registered(base, address):
    for _ in range(2):
        result = run(base, "add", "x", address, "web", DNSMASQ_MAC=MAC)
        assert read(base) == {MAC: {"name": "web", "ipv6_lla": "fe80::1266:6aff:fe4c:a111"}}
        assert result.returncode == 0 and f"warning: {MAC}: {address} is not registered" in result.stderr


@pytest.mark.parametrize(
    ("mac", "address"),
    [
        ("52:54:00:12:34:56", "fe80::5054:ff:fe12:3456"),  # QEMU's and Docker's have the local bit set
        ("02:42:ac:11:00:02", "fe80::42:acff:fe11:2"),
        ("00:16:3e:00:00:01", "fe80::216:3eff:fe00:1"),
        ("fe:ff:ff:ff:ff:ff", "fe80::fcff:ffff:feff:ffff"),
    ],
)
def test_link_local_address_is_made_from_the_mac_address(base, mac, address):
    run(base, "add", mac, "10.0.0.1")
    assert read(base)[mac]["ipv6_lla"] == address


@pytest.mark.parametrize(
    ("address", "field"),
    [
        ("2000::", "ipv6_gua"),
        ("3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "ipv6_gua"),
        ("2001:db7:ffff::1", "ipv6_gua"),
        ("2001:db9::1", "ipv6_gua"),
        ("3fff:1000::1", "ipv6_gua"),
        ("2001:db8:ffff::1", ""),
        ("3fff:fff::1", ""),
        ("1fff::1", ""),
        ("4000::1", ""),
        ("fbff::1", ""),
        ("fc00::1", "ipv6_ula"),
        ("fdff::1", "ipv6_ula"),
        ("fe00::1", ""),
        ("fe80::1", "ipv6_lla"),
        ("febf::1", "ipv6_lla"),
        ("fec0::1", ""),
        ("::1", ""),
        ("ff02::1", ""),
        ("::ffff:10.0.0.1", ""),
        ("10.0.0.1", "ipv4"),
    ],
)
def test_field_of_an_address(update, address, field):
    assert update.parse_address(address) == (field, address)


@given(st.ip_addresses())
def test_addresses_are_in_the_form_of_rfc_5952(update, address):
    forms = {str(address), address.exploded, address.exploded.upper()}
    texts = {update.parse_address(form)[1] for form in forms}
    assert len(texts) == 1 and ipaddress.ip_address(texts.pop()) == address
    if not (address.version == 6 and address.packed[:10] == bytes(10)):  # whose last 32 bits have two forms
        assert update.parse_address(str(address))[1] == str(address)


@pytest.mark.parametrize(
    "arguments",
    [
        ("add", "06-01:23:45:67:89:ab", "10.0.0.1"),
        ("add", "", "10.0.0.1"),
        ("add", "10:66:6a:4c:a1", "10.0.0.1"),
        ("add", "10:66:6a:4c:a1:1g", "10.0.0.1"),
        ("add", "10-66-6a-4c-a1-11", "10.0.0.1"),
        ("add", "10666a4ca111", "10.0.0.1"),
        ("add", "1:066:6a:4c:a1:11", "10.0.0.1"),
        ("add", "10:66:6a:4c:a11:1", "10.0.0.1"),
        ("add", "10:66:6a:4c:a1:11:", "10.0.0.1"),
        ("add", ":10:66:6a:4c:a1:11", "10.0.0.1"),
        ("add", "10:66:6a:4c:a1::11", "10.0.0.1"),
        ("add", "10:66:6a:4c:a1:11:12", "10.0.0.1"),
        ("add", "10:66:6a:4c:a1:1 ", "10.0.0.1"),
        ("add", MAC, ""),
        ("add", MAC, "10.0.0.256"),
        ("add", MAC, "10.0.0.01"),
        ("add", MAC, "10.0.0.1\n"),
        ("add", MAC, "web"),
        ("--rename", MAC, "3cx"),
        ("--rename", MAC, "-x"),
        ("--rename", MAC, ""),
        ("--rename", "06-01:23:45:67:89:ab", "web"),
        ("--remove", "06-01:23:45:67:89:ab"),
        ("--remove", "my_host"),
        ("--allow", "10:66:6a:4c:a1:1g", "10.0.0.1"),
        ("add", "11:66:6a:4c:a1:11", "10.0.0.1"),
        ("add", "33:33:00:00:00:01", "10.0.0.1"),
        ("add", "ff:ff:ff:ff:ff:ff", "10.0.0.1"),
        ("add", MAC, "0.0.0.0"),
        ("add", MAC, "127.0.0.1"),
        ("add", MAC, "169.254.1.1"),
        ("old", MAC, "224.0.0.1"),
        ("old", MAC, "255.255.255.255"),
        ("--remove", "10:66:6a:4c:a1:1"),
        ("--remove", "10:66:6a:4c:a1:1g"),
        ("--initialize", "$(reboot)", "host"),
        ("--initialize", "-x", "host"),
        ("--initialize", "", "host"),
        ("--initialize", "lo", "host"),
        ("--initialize", "lo", "my_host"),
    ],
)
def test_bad_argument_is_one_line_and_changes_nothing(base, arguments):
    need("ip")
    write(base, {MAC: {"name": "web"}})
    before = files(base)
    result = run(base, *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("instances-update.py: error: ")
    assert files(base) == before


@pytest.mark.parametrize("base_id", [".", "-a", "_a", "../x", "a/b", "a b", "ä", "a\n"])
def test_bad_base_id_is_an_error(base, base_id):
    result = run(base, "add", MAC, "10.0.0.1", INSTANCES_BASE_ID=base_id)
    assert result.returncode == 1 and "INSTANCES_BASE_ID" in result.stderr and result.stderr.count("\n") == 1


def test_base_id_follows_the_path_after_a_hyphen(base):
    run(base, "add", MAC, "10.0.0.1", INSTANCES_BASE_ID="br0.1_a-b")
    names = {"instances-br0.1_a-b.json", "instances-br0.1_a-b.updated", "instances-br0.1_a-b.lock"}
    assert names - set(files(base)) <= {"instances-br0.1_a-b.lock"}  # which some releases of filelock take away


def test_variables_that_are_empty_or_unset_take_their_defaults(update, monkeypatch):
    for value in (None, ""):
        for variable in ("INSTANCES_BASE_PATH", "INSTANCES_BASE_ID"):
            monkeypatch.delenv(variable, raising=False) if value is None else monkeypatch.setenv(variable, value)
        assert update.base_path() == "/var/lib/misc/instances"


def test_relative_path_without_a_folder_is_in_the_working_folder(base):
    command = [sys.executable, str(UPDATE), "add", MAC, "10.0.0.1"]
    result = subprocess.run(command, env=environment("here"), cwd=base.parent, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert {"here.json", "here.updated"} <= files(base).keys() and MAC in read(base.parent / "here")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("add",),
        ("add", MAC),
        ("--renam", MAC, "web"),
        ("--rename", MAC),
        ("--rename", MAC, "web", "x"),
        ("--remove", MAC, "x"),
        ("--initialize", "br0"),
        ("-x",),
        ("--",),
        ("--edit",),
    ],
)
def test_wrong_usage_is_one_line_that_shows_it_and_exits_2(base, arguments):
    result = run(base, *arguments)
    said = f"instances-update.py: error: {' '.join(arguments) or 'nothing'}: "
    assert (result.returncode, result.stdout) == (2, "") and not files(base)
    assert result.stderr.startswith(said) and result.stderr.count("\n") == 1 and "--help" in result.stderr


@pytest.mark.parametrize(("action", "status"), [("ad", 2), ("remove", 2), ("del", 0), ("tftp", 0)])
def test_action_that_is_neither_ours_nor_dnsmasqs_is_wrong_usage_at_a_terminal(base, action, status):
    terminal, end = pty.openpty()
    command = [sys.executable, str(UPDATE), action, MAC, "10.0.0.1"]
    result = subprocess.run(command, env=environment(base), stdin=end, stdout=end, stderr=end)
    os.close(end)
    said = os.read(terminal, 1000).decode() if status else ""
    os.close(terminal)
    assert result.returncode == status and (f"{action} {MAC} 10.0.0.1: " in said) == bool(status) and not files(base)


def test_version_is_that_of_the_package(base):
    result = run(base, "--version")
    changelog = (EXAMPLES / "debian" / "debian" / "changelog").read_text()
    version = re.match(r"instances \((.*)\)", changelog)[1]
    assert (result.returncode, result.stdout) == (0, f"instances-update.py: {version}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], ["--help", "--rename"]])
def test_help_is_on_standard_output(base, arguments):
    result = run(base, *arguments)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("usage:")


@pytest.mark.parametrize("action", ["del", "init", "tftp", "arp-add", "arp-del", "relay-snoop", "new-one", ""])
@pytest.mark.parametrize("arguments", [(), (MAC, "10.0.0.1", "web")])
def test_other_action_is_ignored_without_a_byte(base, action, arguments):
    result = run(base, action, *arguments, INSTANCES_BASE_ID="/bad")
    assert (result.returncode, result.stdout, result.stderr, files(base)) == (0, "", "", {})


def test_rename_takes_the_name_from_any_other(base):
    write(base, {MAC: {"name": "web"}, OTHER: {"name": "db"}})
    result = run(base, "--rename", OTHER.upper(), "WEB")
    assert result.returncode == 0 and result.stdout.count("\n") == 1
    assert read(base) == {MAC: {"name": ""}, OTHER: {"name": "WEB"}}


def test_instance_without_a_name_does_not_have_the_name_none(base):
    write(base, {MAC: {"ipv4": "10.0.0.1"}, "10:66:6a:4c:a1:13": {"name": None}})
    run(base, "add", OTHER, "10.0.0.2", "none")
    assert read(base)[OTHER]["name"] == "none" and "name" not in read(base)[MAC]


def test_remove_forgets_the_instance(base):
    write(base, {MAC: {"name": "web"}, OTHER: {"name": "db"}})
    result = run(base, "--remove", MAC.upper())
    assert result.returncode == 0 and result.stdout.count("\n") == 1 and read(base) == {OTHER: {"name": "db"}}
    assert "web: removed" in result.stdout and result.stderr == ""


def test_remove_of_what_may_have_a_lease_says_how_it_does_not_come_back(base):
    write(base, {MAC: {"name": "web", "ipv6_ula": "fd83:5eed::11"}})
    result = run(base, "--remove", MAC)
    assert result.stderr.count("\n") == 1 and MAC in result.stderr and "instances-release" in result.stderr


@pytest.mark.parametrize("arguments", [("--rename", OTHER, "db"), ("--remove", OTHER)])
def test_unknown_mac_is_said_and_changes_nothing(base, arguments):
    write(base, {MAC: {"name": "web"}})
    result = run(base, *arguments)
    assert (result.returncode, result.stdout) == (0, "") and OTHER in result.stderr
    assert read(base) == {MAC: {"name": "web"}} and not base.with_suffix(".updated").exists()


def test_rename_to_the_same_name_changes_nothing(base):
    write(base, {MAC: {"name": "web"}})
    result = run(base, "--rename", MAC, "web")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not base.with_suffix(".updated").exists()


def test_unknown_fields_survive_every_rewrite(base):
    unknown = {"note": "a } b {", "list": [1, {"x": None}], "ü": "\ud800"}
    write(base, {MAC: {"name": "web", **unknown}})
    for arguments in (("add", MAC, "10.0.0.1"), ("--rename", MAC, "db"), ("add", OTHER, "10.0.0.1")):
        assert run(base, *arguments).returncode == 0
        assert unknown.items() <= read(base)[MAC].items()


BROKEN = [
    "[]",
    "null",
    '{"x": 1}',
    '{"x": []}',
    "",
    '{"10:66:6a:4c:a1:11": {"name"',
    pytest.param("[" * 100000, id="deep"),
    "\udcff",
    '{"a": {}} x',
]


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("arguments", [("add", MAC, "10.0.0.1"), ("--rename", MAC, "db"), ("--remove", MAC)])
def test_broken_registry_is_an_error_and_left_alone(base, text, arguments):
    base.with_suffix(".json").write_bytes(text.encode(errors="surrogateescape"))
    before = files(base)
    result = run(base, *arguments)
    assert (result.returncode, result.stdout) == (1, "") and result.stderr.count("\n") == 1
    assert f"{base}.json" in result.stderr
    assert {k: v for k, v in files(base).items() if not k.endswith(".lock")} == before


def test_registry_cut_at_any_place_is_never_taken_for_whole(base, update):
    run(base, "add", MAC, "10.83.0.11", "web")
    run(base, "add", OTHER, "10.83.0.12", "db")
    text = base.with_suffix(".json").read_bytes()
    assert update.is_registered(text, MAC, "ipv4", "10.83.0.11", "web")
    for end in range(len(text) - 1):  # the last is a line break
        assert not update.is_registered(text[:end], MAC, "ipv4", "10.83.0.11", "web")


@pytest.mark.parametrize("arguments", [("add", MAC, "10.0.0.1"), ("--rename", MAC, "web")])
def test_registry_that_is_a_directory_is_an_error(base, arguments):
    base.with_suffix(".json").mkdir()
    result = run(base, *arguments)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and f"{base}.json" in result.stderr


def test_unreadable_registry_is_an_error(base):
    need()
    base.with_suffix(".json").write_text("{}")
    base.with_suffix(".json").chmod(0)
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, str(UPDATE), "add", MAC, "10.0.0.1"]
    result = subprocess.run(command, env=environment(base), capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert f"{base}.json" in result.stderr and "Permission denied" in result.stderr


def test_missing_directory_is_an_error_and_not_made(base):
    result = run(base.parent / "none" / "instances", "add", MAC, "10.0.0.1")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and f"{base.parent}/none" in result.stderr
    assert not (base.parent / "none").exists()


def test_host_that_follows_refuses_changes_and_names_the_host_to_make_them_on(base):
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11"}})
    base.with_suffix(".follows").write_text("a writes it\n")
    before = files(base)
    for arguments in (["--rename", MAC, "db"], ["--remove", MAC], ["add", OTHER, "10.83.0.12"]):
        result = run(base, *arguments)
        error = f"instances-update.py: error: {base}.json is not to be changed on this host: a writes it\n"
        assert (result.returncode, result.stdout, result.stderr) == (1, "", error)
    assert run(base, "old", MAC, "10.83.0.11").returncode == 0  # nothing to change
    assert {name: text for name, text in files(base).items() if not name.endswith(".lock")} == before


def test_missing_filelock_is_said_in_one_line(base):
    command = [sys.executable, "-S", str(UPDATE), "add", MAC, "10.0.0.1"]  # -S: without installed packages
    result = subprocess.run(command, env=environment(base), capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "apt-get install python3-filelock" in result.stderr and "pip install filelock" in result.stderr


def test_mode_and_owner_of_the_registry_are_kept(base):
    write(base, {MAC: {"name": "web"}})
    base.with_suffix(".json").chmod(0o1640)
    if os.geteuid() == 0:
        os.chown(base.with_suffix(".json"), 65534, 65534)
    before = base.with_suffix(".json").stat()
    assert run(base, "add", MAC, "10.0.0.1").returncode == 0
    after = base.with_suffix(".json").stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


def test_nothing_is_made_wider_than_0644(base):
    command = ["sh", "-c", 'umask 0; exec "$@"', "sh", sys.executable, str(UPDATE), "add", MAC, "10.0.0.1"]
    assert subprocess.run(command, env=environment(base), capture_output=True).returncode == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in base.parent.iterdir()}
    assert len(modes) >= 2 and not [name for name, mode in modes.items() if mode & ~0o644]


def test_narrower_umask_is_kept(base):
    command = ["sh", "-c", 'umask 077; exec "$@"', "sh", sys.executable, str(UPDATE), "add", MAC, "10.0.0.1"]
    assert subprocess.run(command, env=environment(base), capture_output=True).returncode == 0
    made = (base.with_suffix(suffix) for suffix in (".json", ".updated"))  # the lock is filelock's, and empty
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o600, 0o600]


def test_registry_behind_a_symbolic_link_stays_there(base):
    (base.parent / "far").mkdir()
    target = base.parent / "far" / "registry"
    target.write_text("{}")
    base.with_suffix(".json").symlink_to("far/registry")
    assert run(base, "add", MAC, "10.0.0.1").returncode == 0
    assert base.with_suffix(".json").is_symlink() and MAC in json.loads(target.read_text())


@pytest.mark.parametrize("suffix", [".json.tmp", ".updated"])
def test_planted_link_truncates_nothing(base, suffix):
    victim = base.parent / "victim"
    victim.write_text("precious")
    base.with_suffix(suffix).symlink_to(victim)
    assert run(base, "add", MAC, "10.0.0.1").returncode == 0
    assert victim.read_text() == "precious" and MAC in read(base) and not os.path.lexists(f"{base}.json.tmp")


def test_dangling_link_in_the_temporary_file_is_not_followed(base):
    base.with_suffix(".json.tmp").symlink_to("victim")
    assert run(base, "add", MAC, "10.0.0.1").returncode == 0
    assert MAC in read(base) and not {"victim", "instances.json.tmp"} & set(os.listdir(base.parent))


def test_interrupt_is_an_error_in_one_line(base):
    need("strace")
    log = base.parent / "strace"
    command = ["strace", "-o", log, sys.executable, UPDATE, "add", MAC, "10.0.0.1"]
    with lock_held(base):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        waiting = subprocess.Popen(command, env=environment(base), text=True, start_new_session=True, **pipes)
        wait_for(lambda: log.exists() and "EAGAIN" in log.read_text(), "a try to lock")
        os.killpg(waiting.pid, signal.SIGINT)  # as a terminal does
        assert waiting.communicate() == ("", "instances-update.py: error: interrupted\n")
    assert waiting.returncode == 1 and not base.with_suffix(".json").exists()


def test_file_system_without_locks_is_an_error_in_one_line(base):
    """A stand-in for newer releases of filelock, which raise this: an older one tries again until its time is over."""
    text = "class FileLock:\n    def __init__(*_, **__):\n        raise NotImplementedError('use SoftFileLock')\n"
    (base.parent / "filelock.py").write_text(text)
    result = run(base, "add", MAC, "10.0.0.1", PYTHONPATH=str(base.parent), PYTHONDONTWRITEBYTECODE="1")
    assert (result.returncode, result.stdout) == (1, "") and not base.with_suffix(".json").exists()
    assert result.stderr == "instances-update.py: error: use SoftFileLock\n"


def test_help_that_nobody_reads_is_an_error_in_one_line(base):
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, str(UPDATE), "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1


def test_output_that_nobody_reads_changes_nothing(base):
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(UPDATE), "add", MAC, "10.0.0.1"]
        result = subprocess.run(command, env=environment(base), stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "") and MAC in read(base)


def test_change_waits_ten_seconds_for_the_lock_and_says_which(held_up):
    base, future = held_up
    result, seconds = future.result()
    assert 10 <= seconds < 19
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and f"{base}.lock" in result.stderr
    assert read(base)[MAC]["ipv4"] == "10.83.0.11" and files(base).keys() <= {"instances.json", "instances.lock"}


@pytest.fixture
def change(base, tmp_path):
    """A function that runs a program's change of the registry, given as the code of a function; it gives the result."""
    program = tmp_path / "program"
    loading = f"import runpy, sys\nupdate = runpy.run_path({str(UPDATE)!r})\n"

    def run_change(code, keywords=""):
        call = f"def change(registry):\n{code}\ndef main(_):\n    print(update['change_registry'](change{keywords}))\n"
        program.write_text(f"{loading}{call}sys.exit(update['run'](main))\n")
        return run_script(program, base=base)

    return run_change


def test_program_changes_the_registry_by_one_call_and_is_refused_as_this_script_is(base, change):
    write(base, {MAC: {"name": "web"}})
    code = "    registry['x'] = {}; return 'made x', ['a warning']"
    base.with_suffix(".follows").write_text("a writes it")
    before = files(base)
    result = change(code)
    refused = f"program: error: {base}.json is not to be changed on this host: a writes it\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", refused)
    assert {n: t for n, t in files(base).items() if n not in ("program", "instances.lock")} == before
    base.with_suffix(".follows").unlink()
    assert change(code).stdout == "('made x', ['a warning'])\n"
    assert read(base) == {MAC: {"name": "web"}, "x": {}} and base.with_suffix(".updated").exists()
    assert "error: " in change("    registry.clear(); raise ValueError('no')").stderr and "x" in read(base)
    with lock_held(base):
        assert change("    registry.clear(); return '', ['nothing']").stdout == "('', ['nothing'])\n"


def test_follower_replaces_also_a_registry_that_cannot_be_read(base, change):
    write(base, "{")
    base.with_suffix(".follows").write_text("a writes it")
    code = "    registry['x'] = {}; return True, []"
    assert "mend it or move it away" in change(code).stderr
    assert change(code, ", follower=True").returncode == 0 and read(base) == {"x": {}}


def initialize(host, *arguments):
    return host.update("--initialize", *arguments)


def test_initialize_registers_a_bridge_without_a_port(host):
    result = initialize(host, "br0", "host")
    assert result.stdout == f"instances-update.py: {HOST_MAC} host: initialized\n"
    expected = {"name": "host", "ipv4": "10.83.0.1", "ipv6_gua": "2001:67c:83::1", "ipv6_ula": "fd83:5eed::1"}
    assert host.registry() == {HOST_MAC: expected | {"ipv6_lla": "fe80::1266:6aff:fe4c:a1fe"}}


def test_initialize_again_changes_nothing(host):
    initialize(host, "br0", "host")
    os.unlink(f"{host.base}.updated")
    before = files(host.base)
    assert initialize(host, "br0", "host").stdout == ""
    assert files(host.base) == before


def test_initialize_replaces_the_instance_and_takes_from_others(host):
    write(
        host.base,
        {
            HOST_MAC: {"name": "old", "ipv4": "10.9.9.9", "ipv6_ula": "fd83:5eed::1", "note": "x"},
            MAC: {"name": "Host", "ipv4": "10.83.0.1"},
        },
    )
    host.run("ip", "address", "flush", "dev", "br0", "to", "fd83:5eed::1")
    initialize(host, "br0", "host")
    own = {"name": "host", "ipv4": "10.83.0.1", "ipv6_gua": "2001:67c:83::1", "ipv6_lla": "fe80::1266:6aff:fe4c:a1fe"}
    assert host.registry() == {HOST_MAC: own | {"note": "x"}, MAC: {"name": ""}}


@pytest.mark.parametrize("theirs", [{"name": "HOST"}, {"name": "", "ipv6_ula": "fd83:5eed::1"}])
def test_initialize_takes_from_others_where_its_own_entry_is_right_already(host, theirs):
    initialize(host, "br0", "host")
    own = host.registry()
    write(host.base, {MAC: theirs, **own})
    assert "initialized" in initialize(host, "br0", "host").stdout
    assert host.registry() == {MAC: {"name": ""}, **own}


def test_initialize_takes_no_temporary_address(host):
    host.run("ip", "address", "flush", "dev", "br0", "to", "2001:67c:83::1")
    host.client("port", MAC)  # an interface without a carrier has no temporary addresses
    host.set("net/ipv6/conf/br0/use_tempaddr", "2")
    lifetimes = ("valid_lft", "2000", "preferred_lft", "1000")
    host.run("ip", "address", "add", "2001:67c:83::8/64", "dev", "br0", "nodad", "mngtmpaddr", *lifetimes)
    wait_for(lambda: "temporary" in host.run("ip", "address", "show", "dev", "br0").stdout, "a temporary address")
    initialize(host, "br0", "host")
    assert host.registry()[HOST_MAC]["ipv6_gua"] == "2001:67c:83::8"


def test_initialize_takes_the_primary_address_and_none_that_is_deprecated(host):
    host.run("ip", "address", "add", "10.83.0.2/24", "dev", "br0")
    host.run("ip", "address", "del", "2001:67c:83::1/80", "dev", "br0")
    host.run("ip", "address", "add", "2001:67c:83::8/80", "dev", "br0", "nodad", "preferred_lft", "0")
    host.run("ip", "address", "add", "2001:db8::9/64", "dev", "br0", "nodad")
    host.run("ip", "address", "add", "169.254.7.7/16", "dev", "br0")
    initialize(host, "br0", "host")
    assert host.registry()[HOST_MAC].keys() == {"name", "ipv4", "ipv6_ula", "ipv6_lla", "allowed"}
    assert host.registry()[HOST_MAC]["ipv4"] == "10.83.0.1"
    assert host.registry()[HOST_MAC]["allowed"] == ["10.83.0.2", "2001:67c:83::8"]


SECOND = [("10.83.0.120", "10.83.0.120/24"), ("fd83:5eed::120", "fd83:5eed::120/80")]


def lease_on(host, address, mac=MAC):
    """Have a lease of the host's dnsmasq told; return what is said."""
    variables = {"DNSMASQ_LEASE_EXPIRES": "1795000000", "DNSMASQ_MAC": mac}
    return host.update("add", mac, address, "web", **variables).stderr


@pytest.mark.parametrize(("address", "with_length"), SECOND)
def test_no_lease_gives_an_address_of_the_host_whether_it_is_registered_or_not(host, address, with_length):
    initialize(host, "br0", "host")
    assert lease_on(host, address) == "" and address in host.registry()[MAC].values()
    host.update("--remove", MAC)
    host.run("ip", "address", "add", with_length, "dev", "br0", "nodad")
    assert f"{address} is not registered, this host has it" in lease_on(host, address)
    initialize(host, "br0", "host")
    host.run("ip", "address", "del", with_length, "dev", "br0")  # which the registry does not know yet
    assert f"{address} is not registered, {HOST_MAC} host has it" in lease_on(host, address)
    assert address not in host.registry()[MAC].values() and "allowed" in host.registry()[HOST_MAC]
    initialize(host, "br0", "host")
    assert "allowed" not in host.registry()[HOST_MAC]
    assert lease_on(host, address) == "" and address in host.registry()[MAC].values()


@pytest.mark.parametrize(("address", "with_length"), SECOND)
def test_initialize_takes_further_addresses_from_others_and_says_so(host, address, with_length):
    host.run("ip", "address", "add", with_length, "dev", "br0", "nodad")
    field = "ipv4" if "." in address else "ipv6_ula"
    write(host.base, {MAC: {"name": "web", field: address}, OTHER: {"name": "", "ipv4": "10.83.0.1"}})
    host.run("ip", "address", "flush", "dev", "br0", "to", "2001:67c:83::1")
    said = initialize(host, "br0", "host").stdout
    own = host.registry()[HOST_MAC]
    assert address in (own[field], *own["allowed"]) and field not in host.registry()[MAC]
    assert f"{address} (taken from {MAC} web)" in said and f"10.83.0.1 (taken from {OTHER} (no name))" in said
    before = files(host.base)
    assert initialize(host, "br0", "host").stdout == "" and files(host.base) == before


@pytest.mark.parametrize(
    ("arguments", "why"), [(("br1", "host"), "br1: Device "), (("br0", "my_host"), "my_host: not a name")]
)
def test_initialize_says_what_is_wrong_and_changes_nothing(host, arguments, why):
    command = [sys.executable, UPDATE, "--initialize", *arguments]
    result = host.run(*command, env=environment(host.base), check=False)
    assert result.returncode == 1 and why in result.stderr and host.registry() == {}


def test_initialize_takes_the_link_local_address_that_the_interface_has(host):
    host.run("ip", "address", "add", "fe80::83/64", "dev", "br0", "nodad")
    initialize(host, "br0", "host")
    assert host.registry()[HOST_MAC]["ipv6_lla"] == "fe80::83"


# What an administrator enters is as in the original: it is believed, whatever it takes from others, and names nobody.
@pytest.mark.parametrize("action", ["add", "old"])
@pytest.mark.parametrize(("address", "other_address", "field"), LEASES)
def test_by_hand_an_address_is_taken_from_another_and_no_name_is_given(base, action, address, other_address, field):
    write(base, {MAC: {"name": "web", field: address}, OTHER: {"name": "", field: other_address}})
    result = run(base, action, OTHER, address, "db", DNSMASQ_MAC=OTHER, **REMINDER if action == "add" else {})
    assert (result.returncode, result.stderr) == (0, "")
    change = f"{field} {address} in place of {other_address} (taken from {MAC} web)"
    assert result.stdout == f"instances-update.py: {OTHER} (no name): {change}\n"
    assert read(base) == {MAC: {"name": "web"}, OTHER: {"name": "", field: address}}


def test_by_hand_a_guest_gets_its_name_before_its_first_lease_with_its_link_local_address(base):
    result = run(base, "add", MAC, "fe80::1266:6aff:fe4c:a111", "web", DNSMASQ_MAC=MAC)
    assert (result.returncode, result.stderr) == (0, "")
    assert read(base) == {MAC: {"name": "web", "ipv6_lla": "fe80::1266:6aff:fe4c:a111"}}
    lease(base, "add", MAC, "10.83.0.11", "ubuntu")
    assert read(base)[MAC]["name"] == "web"


def test_by_hand_an_ipv6_address_without_a_mac_address_is_told_what_is_missing(base):
    result = run(base, "add", MAC, "fd83:5eed::11")
    assert (result.returncode, result.stdout, files(base)) == (0, "", {})
    assert result.stderr.count("\n") == 1 and "DNSMASQ_MAC" in result.stderr


@pytest.mark.parametrize("variables", [{}, {"DNSMASQ_DATA_MISSING": "1"}])
@pytest.mark.parametrize("action", ["add", "old"])
@pytest.mark.parametrize("layout", [None, 2])
def test_nameless_instance_gets_the_name_of_a_later_lease(base, action, variables, layout):
    write(base, json.dumps({MAC: {"name": "", "ipv4": "10.83.0.11"}}, indent=layout))
    result = lease(base, action, MAC, "10.83.0.11", "web", **variables)
    assert result.stdout == f"instances-update.py: {MAC} web: named\n" and read(base)[MAC]["name"] == "web"
    assert base.with_suffix(".updated").exists()
    before = files(base)
    assert lease(base, action, MAC, "10.83.0.11", "db", **variables).stdout == "" and files(base) == before


@pytest.mark.parametrize("hostname", ["", "3cx", "DB"])
def test_nameless_instance_stays_so_without_a_word_where_the_name_is_unusable(base, hostname):
    write(base, {MAC: {"name": "", "ipv4": "10.83.0.11"}, OTHER: {"name": "db"}})
    before = files(base)
    result = lease(base, "old", MAC, "10.83.0.11", hostname)
    assert (result.returncode, result.stdout, result.stderr, files(base)) == (0, "", "", before)


ALLOWED = ["2001:67c:99::/64", "10.83.0.50", "10.99.0.0/24", "2001:67C:83::50", "10.83.0.50"]


def test_allow_replaces_what_was_allowed_and_is_idempotent(base):
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11", "note": 1}, OTHER: {"name": "db", "ipv4": "10.83.0.12"}})
    result = run(base, "--allow", MAC.upper(), *ALLOWED)
    assert result.stdout.count("\n") == 1 and f"{MAC} web: allowed 10.83.0.50, 10.99.0.0/24" in result.stdout
    allowed = ["10.83.0.50", "10.99.0.0/24", "2001:67c:83::50", "2001:67c:99::/64"]
    assert read(base)[MAC] == {"name": "web", "ipv4": "10.83.0.11", "note": 1, "allowed": allowed}
    base.with_suffix(".updated").unlink()
    before = files(base)
    assert run(base, "--allow", MAC, *reversed(ALLOWED)).stdout == "" and files(base) == before
    run(base, "--allow", OTHER, "10.83.0.50")  # shared, as by VRRP
    assert read(base)[OTHER]["allowed"] == ["10.83.0.50"]
    run(base, "--allow", MAC)
    assert "allowed" not in read(base)[MAC] and base.with_suffix(".updated").exists()


def test_leases_and_names_leave_what_is_allowed_alone(base):
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11", "allowed": ["10.83.0.50"]}})
    lease(base, "add", MAC, "10.83.0.12", "web")
    run(base, "--rename", MAC, "db")
    assert read(base)[MAC] == {"name": "db", "ipv4": "10.83.0.12", "allowed": ["10.83.0.50"]}


@pytest.mark.parametrize(
    "text",
    [
        "10.83.0.12",  # registered to another
        "10.83.0.0/24",
        "2001:67c:83::/64",
        "10.99.0.1/24",
        "0.0.0.0/0",
        "::/0",
        "::",
        "0.0.0.0",
        "169.254.7.7",
        "fe80::1",
        "fe80::1%eth0",
        "fd83::1%eth0",
        "224.0.0.18",
        "224.0.0.0/3",
        "127.0.0.1",
        "255.255.255.255",
        "::1",
        "ff02::12",
        "web",
        "",
        "10.83.0.50,10.83.0.51",
        "10.83.0.50/33",
    ],
)
def test_what_must_not_be_allowed_is_an_error_that_names_it(base, text):
    write(base, {MAC: {"name": "web"}, OTHER: {"name": "db", "ipv4": "10.83.0.12", "ipv6_gua": "2001:67c:83::12"}})
    before = files(base)
    result = run(base, "--allow", MAC, "10.83.0.50", text)
    assert (result.returncode, result.stdout, files(base)) == (1, "", before)
    assert result.stderr.count("\n") == 1 and text in result.stderr


@pytest.mark.parametrize("text", ["0.0.0.0/0", "::/0"])
def test_default_route_is_refused_with_a_word_on_what_a_router_needs(base, text):
    write(base, {MAC: {"name": "web"}})
    result = run(base, "--allow", MAC, text)
    assert result.returncode == 1 and "uplink in bridge.nft" in result.stderr


@pytest.mark.parametrize("allowed", ["10.83.0.50", "10.83.0.48/29", "fd83:5eed::50", "fd83:5eed::/120"])
@pytest.mark.parametrize("action", ["add", "old"])
def test_no_lease_gives_what_another_is_allowed_but_by_hand_it_is_given(base, action, allowed):
    address = "10.83.0.50" if "." in allowed else "fd83:5eed::50"
    write(base, {MAC: {"name": "web", "allowed": [1, None, ["10.0.0.0", 8], "x", allowed]}, OTHER: {"name": "db"}})
    result = lease(base, action, OTHER, address, DNSMASQ_MAC=OTHER)
    warning = f"warning: {OTHER}: {address} is not registered, {MAC} web has it\n"
    assert (result.returncode, result.stderr) == (0, f"instances-update.py: {warning}")
    assert read(base)[OTHER] == {"name": "db"}
    assert lease(base, action, MAC, address, DNSMASQ_MAC=MAC).stderr == "" and address in read(base)[MAC].values()
    run(base, action, OTHER, address, DNSMASQ_MAC=OTHER)
    assert address in read(base)[OTHER].values()
    assert lease(base, action, OTHER, address, DNSMASQ_MAC=OTHER).stderr == ""  # it is registered


@pytest.mark.parametrize("name", ["wpad", "WPAD", "Isatap", "localHost"])
@pytest.mark.parametrize("layout", [None, 2])
def test_no_lease_gives_a_name_that_programs_look_for(base, name, layout):
    write(base, json.dumps({MAC: {"name": "", "ipv4": "10.83.0.11"}}, indent=layout))
    assert lease(base, "old", MAC, "10.83.0.11", name).stdout == ""
    assert "(no name): new" in lease(base, "add", OTHER, "10.83.0.12", name).stdout
    assert (read(base)[MAC]["name"], read(base)[OTHER]["name"]) == ("", "")
    assert run(base, "--rename", MAC, name).returncode == 0 and read(base)[MAC]["name"] == name


@pytest.mark.parametrize("entry", [{}, {"name": None}, {"name": ""}])
@pytest.mark.parametrize("layout", [None, 2])
def test_entry_without_a_name_is_named_by_a_later_lease_in_any_layout(base, entry, layout):
    write(base, json.dumps({MAC: {"ipv4": "10.83.0.11", **entry}}, indent=layout))
    assert lease(base, "old", MAC, "10.83.0.11", "web").stdout == f"instances-update.py: {MAC} web: named\n"
    assert read(base)[MAC]["name"] == "web"


def test_lease_that_takes_an_address_or_replaces_one_says_of_whom_and_which(base):
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11"}, OTHER: {"name": "", "ipv6_gua": "2001:67c:83::12"}})
    taken = lease(base, "add", OTHER, "10.83.0.11").stdout
    assert taken == f"instances-update.py: {OTHER} (no name): ipv4 10.83.0.11 (taken from {MAC} web)\n"
    replaced = lease(base, "add", "x", "2001:67c:84::12", DNSMASQ_MAC=OTHER).stdout  # a second prefix of the bridge
    assert replaced.endswith(f"{OTHER} (no name): ipv6_gua 2001:67c:84::12 in place of 2001:67c:83::12\n")


def test_name_stands_for_the_mac_address(base):
    write(base, {MAC: {"name": "Web"}, OTHER: {"name": "db"}})
    assert "allowed 10.83.0.50" in run(base, "--allow", "web", "10.83.0.50").stdout
    assert read(base)[MAC]["allowed"] == ["10.83.0.50"]
    assert f"{MAC} mail: renamed" in run(base, "--rename", "WEB", "mail").stdout
    result = run(base, "--remove", "web")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == "instances-update.py: warning: web: no such instance\n"
    assert f"{OTHER} db: removed" in run(base, "--remove", "dB").stdout and list(read(base)) == [MAC]


def edit(base, commands):
    """Edit the registry by shell commands that get its copy as $1."""
    editor = base.parent / "editor"
    editor.write_text(f"set -e\nf() {{ {UPDATE} --rename {OTHER} $1; }}\n{commands}\n")
    return run_script(EDIT, base=base, EDITOR=f"sh {editor}")


def copies(base):
    return [path for path in base.parent.iterdir() if path.name.startswith("instances.json.")]


def test_edit_puts_what_was_edited_in_place(base):
    write(base, {MAC: {"name": "web", "ipv4": "10.0.0.1"}, OTHER: {"name": "db"}})
    result = edit(base, 'sed -i s/web/mail/ "$1"')
    assert (result.returncode, result.stdout) == (0, f"instances-edit: {MAC}: edited\n")
    assert read(base) == {MAC: {"name": "mail", "ipv4": "10.0.0.1"}, OTHER: {"name": "db"}}
    assert base.with_suffix(".updated").exists() and not copies(base)
    base.with_suffix(".updated").unlink()
    assert edit(base, "true").stdout == "" and not base.with_suffix(".updated").exists() and not copies(base)


def test_edit_that_is_no_registry_stays_in_a_copy_with_which_the_next_goes_on(base):
    write(base, {MAC: {"name": "web"}, OTHER: {"name": "db"}})
    before = base.with_suffix(".json").read_bytes()
    for commands in ('sed -i "s/web/mail/; s/}//" "$1"', "exit 1", 'grep mail "$1"'):
        result = edit(base, commands)
        assert (result.returncode, base.with_suffix(".json").read_bytes()) == (1, before) and len(copies(base)) == 1
        assert result.stderr.count("\n") == 1 and str(copies(base)[0]) in result.stderr
    assert edit(base, """grep mail "$1"; echo '{"x": {"name": "mail"}}' >"$1" """).returncode == 0
    assert read(base) == {"x": {"name": "mail"}} and not copies(base)


def test_interrupt_in_the_editor_is_the_editors_only(base):
    write(base, {MAC: {"name": "web"}})
    editor = base.parent / "editor"
    editor.write_text("trap : INT; kill -INT 0; sed -i s/web/mail/ $1")  # 0: all that a terminal would interrupt
    variables = environment(base, EDITOR=f"sh {editor}")
    subprocess.run([sys.executable, EDIT], env=variables, start_new_session=True, capture_output=True)
    assert read(base) == {MAC: {"name": "mail"}} and not copies(base)


def test_edit_whose_copy_is_gone_removes_nobody(base):
    write(base, {MAC: {"name": "web"}})
    result = edit(base, 'rm "$1"')
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and read(base) == {MAC: {"name": "web"}}


def test_edit_keeps_what_others_change_meanwhile_and_is_refused_where_both_change_one_instance(base):
    write(base, {MAC: {"name": "web"}, OTHER: {"name": "db"}})
    assert edit(base, 'f mail; sed -i s/web/www/ "$1"').returncode == 0
    assert read(base) == {MAC: {"name": "www"}, OTHER: {"name": "mail"}} and not copies(base)
    result = edit(base, 'f mail2; sed -i s/mail/files/ "$1"')
    assert result.returncode == 1 and f"{OTHER} was changed meanwhile" in result.stderr
    assert read(base)[OTHER]["name"] == "mail2" and "files" in copies(base)[0].read_text()
    assert str(copies(base)[0]) in result.stderr and result.stderr.count("\n") == 1


def test_edit_is_refused_on_a_host_that_follows_and_where_there_is_no_registry(base):
    result = edit(base, "true")
    assert result.returncode == 1 and f"{base}.json" in result.stderr and result.stderr.count("\n") == 1
    write(base, {MAC: {"name": "web"}})
    base.with_suffix(".follows").write_text("a writes it")
    result = edit(base, 'sed -i s/web/mail/ "$1"')
    assert result.returncode == 1 and "a writes it" in result.stderr and read(base) == {MAC: {"name": "web"}}
    assert "mail" in copies(base)[0].read_text()


def test_who_is_not_root_is_told_to_be(base):
    need()
    write(base, {})
    reads = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]  # Python may be root's alone to read
    nobody = ["setpriv", "--reuid=65534", "--clear-groups", *reads]
    command = [*nobody, sys.executable, str(UPDATE), "add", MAC, "10.0.0.1"]
    result = subprocess.run(command, env=environment(base), capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.endswith(": run it as root\n") and result.stderr.count("\n") == 1


def test_field_that_was_emptied_by_hand_keeps_nothing_from_being_allowed(base):
    write(base, {MAC: {"name": "web"}, OTHER: {"name": "db", "ipv4": "", "ipv6_ula": None}})
    assert run(base, "--allow", MAC, "10.9.0.0/24").returncode == 0
    assert read(base)[MAC]["allowed"] == ["10.9.0.0/24"]


def test_allow_of_an_unknown_mac_says_so_and_changes_nothing(base):
    result = run(base, "--allow", MAC, "10.83.0.50")
    assert (result.returncode, result.stdout, files(base)) == (0, "", {}) and "no such instance" in result.stderr


def test_rename_says_who_lost_the_name(base):
    write(base, {MAC: {"name": "web"}, OTHER: {"name": "Host"}})
    result = run(base, "--rename", MAC, "host")
    assert result.stdout == f"instances-update.py: {MAC} host: renamed (taken from {OTHER} Host)\n"
