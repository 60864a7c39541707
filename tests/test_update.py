"""instances-update.py: what each action does to the registry, and what it says."""

import ipaddress
import json
import os
import pty
import signal
import stat
import subprocess
import sys

import pytest
from conftest import lock_held, locked_out, need, waiting_for_the_lock
from hypothesis import given
from hypothesis import strategies as st
from lab import EDIT, HOST_MAC, UPDATE, environment, run_script, wait_for

MAC, OTHER, NEW = (f"10:66:6a:4c:a1:1{number}" for number in (1, 2, 3))
LINK_LOCAL = "fe80::1266:6aff:fe4c:a111"
# QEMU's MAC addresses have the local bit set; the name is the longest
QEMU = ("52:54:00:12:34:56", "fe80::5054:ff:fe12:3456", "W" + "-1" * 31)
LEASES = [("10.83.0.11", "10.83.0.12", "ipv4"), ("fd83:5eed::11", "fd83:5eed::12", "ipv6_ula")]
REMINDER = {"DNSMASQ_DATA_MISSING": "1"}


def run(base, *arguments, by=(sys.executable,), **variables):
    """Run the script, by another command if given."""
    command, env = [*by, UPDATE, *arguments], environment(base, **variables)
    return subprocess.run(command, env=env, capture_output=True, text=True)


def lease(base, *arguments, **variables):
    """Run the script as dnsmasq does."""
    return run(base, *arguments, DNSMASQ_LEASE_EXPIRES="1795000000", **variables)


def read(base):
    return json.loads(base.with_suffix(".json").read_text())


def write(base, registry, layout=None):
    base.with_suffix(".json").write_text(json.dumps(registry, indent=layout))


def files(base):
    """Return the contents of all files but the lock, which some releases of filelock take away."""
    paths = [path for path in base.parent.iterdir() if path.is_file() and path.suffix != ".lock"]
    return {path.name: path.read_bytes() for path in paths}


def unchanged(run, base, *arguments, status=0, **options):
    """Run the script, by hand or as dnsmasq does, which changes nothing; return what it says: warnings."""
    before = files(base)
    result = run(base, *arguments, **options)
    assert (result.returncode, result.stdout, files(base)) == (status, "", before)
    return result.stderr


def refused(base, *arguments, **options):
    """Run the script, which changes nothing and says in one line what is wrong; return the line."""
    said = unchanged(run, base, *arguments, status=1, **options)
    assert said.startswith("instances-update.py: error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(("mac", "link_local", "name"), [(MAC, LINK_LOCAL, "web"), QEMU])
def test_new_lease_makes_instance_marker_and_one_line(base, mac, link_local, name):
    result = run(base, "add", mac, "10.83.0.11", name)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"instances-update.py: {mac} {name}: new, ipv4 10.83.0.11\n"
    assert read(base) == {mac: {"name": name, "ipv6_lla": link_local, "ipv4": "10.83.0.11"}}
    assert base.with_suffix(".updated").exists()


@pytest.fixture(scope="module", autouse=True)
def held_up(tmp_path_factory):
    """A run that changes something, while somebody holds the lock: begun first, since it takes 10 s."""
    base = tmp_path_factory.mktemp("held") / "instances"
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11"}})
    with locked_out(base, UPDATE, "old", MAC, "10.83.0.12", "web") as future:
        yield base, future


NOTHING = {  # and what is said
    f"old {MAC} 10.83.0.11": "",
    f"old {NEW} 10.83.0.13": "",
    f"add {MAC} 10.83.0.11 other": "",
    "add x fe80::2": "fe80::2 is not registered",
    f"--rename {MAC} web": "",
    f"--rename {OTHER} db": f"{OTHER}: no such instance",
    f"--remove {OTHER}": f"{OTHER}: no such instance",
    f"--allow {OTHER} 10.83.0.50": f"{OTHER}: no such instance",
}


@pytest.mark.parametrize("by", [run, lease])
@pytest.mark.parametrize("layout", [None, 2])
def test_run_that_changes_nothing_waits_for_nobody(base, layout, by):
    web = {"name": "web", "ipv4": "10.83.0.11", "ipv6_lla": "fe80::1"}
    write(base, {MAC: web, NEW: {"name": "", "ipv4": "10.83.0.13"}}, layout)
    with lock_held(base) as holder:
        for words, warning in NOTHING.items():
            said = unchanged(by, base, *words.split(), DNSMASQ_MAC=MAC, **REMINDER)
            assert warning in said and said.count("\n") == bool(warning) and holder.poll() is None, words


def test_what_others_did_while_a_run_waited_is_not_done_again(base):
    with waiting_for_the_lock(base, UPDATE, "add", MAC, "10.0.0.1", "web") as (holder, waiting):
        write(base, {MAC: {"name": "db", "ipv4": "10.0.0.1"}})
        holder.kill()
        assert waiting.communicate()[0] == "" and waiting.returncode == 0
    assert read(base) == {MAC: {"name": "db", "ipv4": "10.0.0.1"}} and not base.with_suffix(".updated").exists()


# The first is as long as a MAC address
@pytest.mark.parametrize(("duid", "variables"), [("00:02:00:00:00:01", {}), ("00:04:9c:11", {"DNSMASQ_MAC": ""})])
def test_ipv6_lease_without_mac_does_nothing_and_by_hand_says_what_is_missing(base, duid, variables):
    assert unchanged(lease, base, "old", duid, "fd83:5eed::14", "mail", **variables) == ""
    told = unchanged(run, base, "add", duid, "fd83:5eed::14", **variables)
    assert told.count("\n") == 1 and "DNSMASQ_MAC" in told and not os.listdir(base.parent)


@pytest.mark.parametrize(
    "name", ["3cx", "my_host", "-x", "x-", "a" * 64, 'a"b', "a\nb", "a b", "a.b", "ä", "\udcff", "web\x1b[2J", "DB"]
)
def test_unusable_or_taken_name_leaves_new_instance_unnamed_and_afterwards_without_a_word(base, name):
    write(base, {OTHER: {"name": "db"}})
    result = run(base, "add", MAC, "10.83.0.11", name)
    assert result.returncode == 0 and read(base)[MAC]["name"] == "" and read(base)[MAC]["ipv4"] == "10.83.0.11"
    assert result.stderr.count("\n") == 1 and result.stderr.isascii() and result.stderr[:-1].isprintable()
    assert "warning" in result.stderr and "is taken, or not a name" in result.stderr
    assert read(base)[OTHER] == {"name": "db"}
    assert unchanged(lease, base, "old", MAC, "10.83.0.11", name) == ""


@pytest.mark.parametrize(("address", "other_address", "field"), LEASES)
def test_reminder_fills_an_empty_field_but_replaces_no_address_as_another_old_does(base, address, other_address, field):
    write(base, {MAC: {"name": "web"} | ({field: ""} if field == "ipv4" else {})})
    lease(base, "old", MAC, address, DNSMASQ_MAC=MAC, **REMINDER)
    assert read(base)[MAC][field] == address
    told = unchanged(lease, base, "old", MAC, other_address, DNSMASQ_MAC=MAC, **REMINDER)
    assert told == f"instances-update.py: warning: {MAC} keeps {address}: {other_address} is not registered\n"
    lease(base, "old", MAC, other_address, DNSMASQ_MAC=MAC)
    assert read(base)[MAC][field] == other_address


# The first is made from the MAC address, the last for documents
@pytest.mark.parametrize("address", [LINK_LOCAL, "fe80::5", "fec0::1", "::1", "ff02::1", "2001:db8::1"])
def test_by_hand_a_guest_is_named_before_its_first_lease_and_no_special_address_is_registered(base, address):
    for _ in range(2):
        result = run(base, "add", "x", address, "web", DNSMASQ_MAC=MAC)
        assert result.returncode == 0 and read(base) == {MAC: {"name": "web", "ipv6_lla": LINK_LOCAL}}
        warned = f"warning: {MAC}: {address} is not registered" in result.stderr
        assert warned == (address != LINK_LOCAL) and (warned or not result.stderr)
    lease(base, "add", MAC, "10.83.0.11", "ubuntu")
    assert read(base)[MAC]["name"] == "web"


KINDS = {
    "ipv4": "10.0.0.1",
    "ipv6_gua": "2000:: 2001:db7:ffff::1 2001:db9::1 3fff:1000::1 3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "ipv6_ula": "fc00::1 fdff::1",
    "ipv6_lla": "fe80::1 febf::1",
    "": "2001:db8:ffff::1 3fff:fff::1 1fff::1 4000::1 fbff::1 fe00::1 fec0::1 ::1 ff02::1 ::ffff:10.0.0.1",
}


@pytest.mark.parametrize("field", KINDS)
def test_field_of_an_address(update, field):
    for address in KINDS[field].split():
        assert update.parse_address(address) == (field, address)


@given(st.ip_addresses())
def test_addresses_are_in_the_form_of_rfc_5952(update, address):
    forms = {str(address), address.exploded, address.exploded.upper()}
    texts = {update.parse_address(form)[1] for form in forms}
    assert len(texts) == 1 and ipaddress.ip_address(texts.pop()) == address
    if not (address.version == 6 and address.packed[:10] == bytes(10)):  # whose last 32 bits have two forms
        assert update.parse_address(str(address))[1] == str(address)


BAD_MACS = "06-01:23:45:67:89:ab||10:66:6a:4c:a1|10:66:6a:4c:a1:1|10:66:6a:4c:a1:1g|10:66:6a:4c:a1:1 |10-66-6a-4c-a1-11"
BAD_MACS += "|10666a4ca111|1:066:6a:4c:a1:11|10:66:6a:4c:a11:1|10:66:6a:4c:a1:11:|:10:66:6a:4c:a1:11|10:66:6a:4c:a1::11"
BAD_MACS += "|10:66:6a:4c:a1:11:12|11:66:6a:4c:a1:11|33:33:00:00:00:01|ff:ff:ff:ff:ff:ff"
NOT_ALLOWED = "10.83.0.12|10.83.0.0/24|2001:67c:83::/64"  # registered to another
NOT_ALLOWED += "|10.99.0.1/24|0.0.0.0/0|::/0|::|0.0.0.0|169.254.7.7|fe80::1|fe80::1%eth0|fd83::1%eth0|224.0.0.18"
NOT_ALLOWED += "|224.0.0.0/3|127.0.0.1|255.255.255.255|::1|ff02::12|web||10.83.0.50,10.83.0.51|10.83.0.50/33"

BAD = {
    "add ? 10.0.0.1": BAD_MACS,
    f"add {MAC} ?": "|10.0.0.256|10.0.0.01|10.0.0.1\n|web|0.0.0.0|127.0.0.1|169.254.1.1",
    f"old {MAC} ?": "224.0.0.1|255.255.255.255",
    f"--rename {MAC} ?": "3cx|-x|",
    "--rename ? web": "06-01:23:45:67:89:ab",
    "--remove ?": "06-01:23:45:67:89:ab|my_host|10:66:6a:4c:a1:1|10:66:6a:4c:a1:1g",
    "--allow ? 10.0.0.1": "10:66:6a:4c:a1:1g",
    f"--allow {MAC} 10.83.0.50 ?": NOT_ALLOWED,
    "--initialize ? host": "$(reboot)|-x||lo",
    "--initialize lo ?": "my_host",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_argument_is_named_in_one_line_and_changes_nothing(base, words):
    need("ip")
    write(base, {MAC: {"name": "web"}, OTHER: {"name": "db", "ipv4": "10.83.0.12", "ipv6_gua": "2001:67c:83::12"}})
    for bad in BAD[words].split("|"):
        assert bad.strip() in refused(base, *(bad if word == "?" else word for word in words.split()))


def test_files_are_where_valid_variables_say_or_in_var_lib_and_no_directory_is_made(base, update, monkeypatch):
    for base_id in (".", "-a", "_a", "../x", "a/b", "a b", "ä", "a\n"):
        assert "INSTANCES_BASE_ID=" in refused(base, "add", MAC, "10.0.0.1", INSTANCES_BASE_ID=base_id)
    none = base.parent / "none"
    assert str(none) in refused(base, "add", MAC, "10.0.0.1", INSTANCES_BASE_PATH=f"{none}/instances")
    for variables in ({}, {"INSTANCES_BASE_PATH": "", "INSTANCES_BASE_ID": ""}):
        monkeypatch.setattr(os, "environ", variables)
        assert update.base_path() == "/var/lib/misc/instances"
    run(base, "add", MAC, "10.0.0.1", INSTANCES_BASE_ID="br0.1_a-b")
    here = ("env", f"--chdir={base.parent}", sys.executable)
    result = run("here", "add", MAC, "10.0.0.1", by=here)  # without a folder: in the working folder
    assert (result.returncode, result.stderr) == (0, "")
    made = {"instances-br0.1_a-b.json", "instances-br0.1_a-b.updated", "here.json", "here.updated"}
    assert files(base).keys() == made and not none.exists()


WRONG = "|add|add MAC|--renam MAC web|--rename MAC|--rename MAC web x|--remove MAC x|--initialize br0|-x|--|--edit"


@pytest.mark.parametrize("words", WRONG.split("|"))
def test_wrong_usage_is_one_line_that_shows_it_and_exits_2(base, words):
    result = run(base, *words.split())
    assert (result.returncode, result.stdout) == (2, "") and not os.listdir(base.parent)
    assert result.stderr.startswith(f"instances-update.py: error: {words or 'nothing'}: ")
    assert result.stderr.count("\n") == 1 and "--help" in result.stderr


@pytest.mark.parametrize(("status", "actions"), [(0, "del|init|tftp|arp-add|arp-del|relay-snoop"), (2, "ad|remove|x|")])
def test_other_action_is_ignored_silently_but_at_a_terminal_is_wrong_usage_unless_dnsmasq_has_it(base, status, actions):
    for action in actions.split("|"):
        for arguments in ((), (MAC, "10.0.0.1", "web")):
            assert unchanged(run, base, action, *arguments, INSTANCES_BASE_ID="/bad") == ""
        terminal, end = pty.openpty()
        command = [sys.executable, str(UPDATE), action, MAC, "10.0.0.1"]
        result = subprocess.run(command, env=environment(base), stdin=end, stdout=end, stderr=end)
        os.close(end)
        said = os.read(terminal, 1000).decode() if status else ""
        os.close(terminal)
        assert result.returncode == status and (f"{action} {MAC} 10.0.0.1: " in said) == bool(status), action
    assert not os.listdir(base.parent)


@pytest.mark.parametrize("arguments", [("add", MAC, "10.0.0.1"), ("--rename", MAC, "db")])
def test_registry_that_is_broken_or_a_directory_is_an_error_and_left_alone(base, arguments):
    path = base.with_suffix(".json")
    cut = '{"10:66:6a:4c:a1:11": {"name"'
    for text in ("[]", "null", '{"x": 1}', '{"x": []}', "", cut, "[" * 100000, "\udcff", '{"a": {}} x'):
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert str(path) in refused(base, *arguments)
    path.unlink()
    path.mkdir()
    assert str(path) in refused(base, *arguments)


def test_registry_cut_at_any_place_is_never_taken_for_whole(update):
    registry = {MAC: {"name": "web", "ipv4": "10.83.0.11"}, OTHER: {"name": "db", "ipv4": "10.83.0.12"}}
    text = update.registry_text(registry).encode()
    assert update.is_registered(text, MAC, "ipv4", "10.83.0.11", "web")
    for end in range(len(text) - 1):  # the last is a line break
        assert not update.is_registered(text[:end], MAC, "ipv4", "10.83.0.11", "web")


def test_run_without_the_rights_for_it_is_an_error_in_one_line(base):
    need()
    write(base, {})
    base.with_suffix(".json").chmod(0)
    reads = "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"  # Python may be root's alone to read
    ends = {"--bounding-set=-all --inh-caps=-all": "'\n", f"--reuid=65534 --clear-groups {reads}": ": run it as root\n"}
    for rights, end in ends.items():
        said = refused(base, "add", MAC, "10.0.0.1", by=("setpriv", *rights.split(), sys.executable))
        assert "Permission denied" in said and said.endswith(end)


def test_filelock_that_is_missing_or_has_no_locks_here_is_an_error_in_one_line(base):
    said = refused(base, "add", MAC, "10.0.0.1", by=(sys.executable, "-S"))  # without installed packages
    assert "apt-get install python3-filelock" in said and "pip install filelock" in said
    # A stand-in for newer releases, which raise this: an older one tries again until its time is over
    text = "class FileLock:\n    def __init__(*_, **__):\n        raise NotImplementedError('use SoftFileLock')\n"
    (base.parent / "filelock.py").write_text(text)
    variables = {"PYTHONPATH": str(base.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    assert refused(base, "add", MAC, "10.0.0.1", **variables) == "instances-update.py: error: use SoftFileLock\n"


def test_registry_keeps_its_mode_and_owner_and_stays_behind_a_symbolic_link(base):
    (base.parent / "far").mkdir()
    target = base.parent / "far" / "registry"
    target.write_text("{}")
    target.chmod(0o1640)
    if os.geteuid() == 0:
        os.chown(target, 65534, 65534)
    base.with_suffix(".json").symlink_to("far/registry")
    before = target.stat()
    assert run(base, "add", MAC, "10.0.0.1").returncode == 0
    after = target.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino and base.with_suffix(".json").is_symlink() and MAC in read(base)


@pytest.mark.parametrize(("umask", "mode"), [("0", 0o644), ("077", 0o600)])
def test_files_have_the_mode_that_the_umask_lets_but_none_wider_than_0644(base, umask, mode):
    by = ("sh", "-c", f'umask {umask}; exec "$@"', "sh", sys.executable)
    assert run(base, "add", MAC, "10.0.0.1", by=by).returncode == 0
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in base.parent.iterdir()}
    assert modes.pop(".lock", 0) & ~0o644 == 0  # filelock's, and empty
    assert modes == {".json": mode, ".updated": mode}


@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_planted_link_is_not_written_through(base, target):
    victim = base.parent / "victim"
    victim.write_text("precious")
    base.with_suffix(".json.tmp").symlink_to(target)
    base.with_suffix(".updated").symlink_to(victim)
    assert run(base, "add", MAC, "10.0.0.1").returncode == 0
    assert victim.read_text() == "precious" and MAC in read(base)
    assert not {"nowhere", "instances.json.tmp"} & set(os.listdir(base.parent))


def test_interrupt_is_an_error_in_one_line(base):
    with waiting_for_the_lock(base, UPDATE, "add", MAC, "10.0.0.1") as (_, waiting):
        os.killpg(waiting.pid, signal.SIGINT)  # as a terminal does
        assert waiting.communicate() == ("", "instances-update.py: error: interrupted\n")
    assert waiting.returncode == 1 and not base.with_suffix(".json").exists()


def test_output_that_cannot_be_written_stops_no_change_but_is_an_error_of_help(base):
    full = ("sh", "-c", 'exec "$@" >/dev/full', "sh", sys.executable)
    result = run(base, "add", MAC, "10.0.0.1", by=full)
    assert (result.returncode, result.stderr) == (0, "") and MAC in read(base)
    for words in (["help"], ["--help", "--rename"]):
        refused(base, *words, by=full)
        result = run(base, *words)
        assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("usage:")


def test_change_waits_ten_seconds_for_the_lock_and_says_which(held_up):
    base, future = held_up
    result, seconds = future.result()
    assert (result.returncode, result.stdout) == (1, "") and 10 <= seconds < 19
    assert result.stderr.count("\n") == 1 and f"{base}.lock" in result.stderr
    assert read(base)[MAC]["ipv4"] == "10.83.0.11" and files(base).keys() == {"instances.json"}


PROGRAM = """\
import runpy, sys
update = runpy.run_path({!r})
def change(registry):
    {}
sys.exit(update["run"](lambda _: print(update["change_registry"](change{}))))
"""
MADE = "registry['x'] = {}; return 'made x', ['a warning']"


def change(base, code, keywords=""):
    """Run a program that changes the registry by a function of this code; return the result."""
    program = base.parent / "program"
    program.write_text(PROGRAM.format(str(UPDATE), code, keywords))
    return run_script(program, base=base)


def test_program_changes_the_registry_by_one_call(base):
    write(base, {MAC: {"name": "web"}})
    assert change(base, MADE).stdout == "('made x', ['a warning'])\n"
    assert read(base) == {MAC: {"name": "web"}, "x": {}} and base.with_suffix(".updated").exists()
    assert "error: " in change(base, "registry.clear(); raise ValueError('no')").stderr and "x" in read(base)
    with lock_held(base):
        assert change(base, "registry.clear(); return '', ['nothing']").stdout == "('', ['nothing'])\n"


def test_host_that_follows_refuses_changes_and_names_the_host_to_make_them_on_but_to_the_follower(base):
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11"}})
    base.with_suffix(".follows").write_text("a writes it\n")
    error = f"error: {base}.json is not to be changed on this host: a writes it\n"
    for arguments in (["--rename", MAC, "db"], ["--remove", MAC], ["add", OTHER, "10.83.0.12"]):
        assert refused(base, *arguments) == f"instances-update.py: {error}"
    assert unchanged(run, base, "old", MAC, "10.83.0.11") == ""
    assert error[:-1] in edit(base, 'sed -i s/web/mail/ "$1"', 1) and "mail" in copies(base)[0].read_text()
    result = change(base, MADE)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"program: {error}")
    assert read(base) == {MAC: {"name": "web", "ipv4": "10.83.0.11"}} and not base.with_suffix(".updated").exists()
    base.with_suffix(".json").write_text("{")
    assert "mend it or move it away" in change(base, MADE).stderr
    assert change(base, MADE, ", follower=True").returncode == 0 and list(read(base)) == ["x"]


def initialize(host):
    """Register the bridge; return what is said."""
    return host.update("--initialize", "br0", "host").stdout


def test_initialize_registers_a_bridge_without_a_port_once_and_replaces_the_instance_and_takes_from_others(host):
    assert initialize(host) == f"instances-update.py: {HOST_MAC} host: initialized\n"
    os.unlink(f"{host.base}.updated")
    before = files(host.base)
    assert initialize(host) == "" and files(host.base) == before
    assert "no-such: Device " in refused(host.base, "--initialize", "no-such", "host")
    host.ip("address flush dev br0 to fd83:5eed::1", "address add fe80::83/64 dev br0 nodad")
    old = {"name": "old", "ipv4": "10.9.9.9", "ipv6_ula": "fd83:5eed::1", "note": "x"}
    write(host.base, {HOST_MAC: old, MAC: {"name": "Host", "ipv4": "10.83.0.1"}})
    initialize(host)
    own = {"name": "host", "ipv4": "10.83.0.1", "ipv6_gua": "2001:67c:83::1", "ipv6_lla": "fe80::83", "note": "x"}
    assert host.registry() == {HOST_MAC: own, MAC: {"name": ""}}
    for theirs in ({"name": "HOST"}, {"name": "", "ipv6_gua": "2001:67c:83::1"}):
        write(host.base, {MAC: theirs, HOST_MAC: own})
        assert "initialized" in initialize(host)  # though its own entry is right already
        assert host.registry() == {MAC: {"name": ""}, HOST_MAC: own}


def test_initialize_takes_the_primary_address_and_none_that_is_temporary_or_deprecated(host):
    host.client("port", MAC)  # an interface without a carrier has no temporary addresses
    host.set("net/ipv6/conf/br0/use_tempaddr", "2")
    added = ["2001:67c:83::9/64 mngtmpaddr valid_lft 2000 preferred_lft 1000", "2001:67c:83::8/80 preferred_lft 0"]
    added += ["10.83.0.2/24", "2001:db8::9/64", "169.254.7.7/16"]
    host.ip("address del 2001:67c:83::1/80 dev br0", *(f"address add dev br0 nodad {address}" for address in added))
    wait_for(lambda: "temporary" in host.run("ip", "address", "show", "dev", "br0").stdout, "a temporary address")
    initialize(host)
    own = {"name": "host", "ipv4": "10.83.0.1", "ipv6_gua": "2001:67c:83::9", "ipv6_ula": "fd83:5eed::1"}
    own |= {"ipv6_lla": "fe80::1266:6aff:fe4c:a1fe", "allowed": ["10.83.0.2", "2001:67c:83::8"]}
    assert host.registry()[HOST_MAC] == own


@pytest.mark.parametrize(("with_length", "field"), [("10.83.0.120/24", "ipv4"), ("fd83:5eed::120/80", "ipv6_ula")])
def test_no_lease_gives_a_further_address_of_the_host_and_initialize_takes_it_from_others(host, with_length, field):
    address = with_length.partition("/")[0]
    told, options = (host.base, "add", MAC, address, "web"), {"by": host.command(sys.executable), "DNSMASQ_MAC": MAC}
    initialize(host)
    host.run("ip", "address", "add", with_length, "dev", "br0", "nodad")
    assert f"{address} is not registered, this host has it" in lease(*told, **options).stderr
    own = host.registry()[HOST_MAC]
    write(host.base, {HOST_MAC: own, MAC: {"name": "web", field: address}, OTHER: {"name": "", "ipv4": "10.83.0.1"}})
    said = initialize(host)
    assert f"{address} (taken from {MAC} web)" in said and f"10.83.0.1 (taken from {OTHER} (no name))" in said
    now = host.registry()
    assert address in (now[HOST_MAC][field], *now[HOST_MAC]["allowed"])
    assert (now[MAC], now[OTHER]) == ({"name": "web"}, {"name": ""})
    host.run("ip", "address", "del", with_length, "dev", "br0")  # which the registry does not know yet
    assert f"{address} is not registered, {HOST_MAC} host has it" in lease(*told, **options).stderr
    assert host.registry()[MAC] == {"name": "web"}
    initialize(host)
    assert host.registry()[HOST_MAC] == own
    assert lease(*told, **options).stderr == "" and host.registry()[MAC][field] == address


# What an administrator enters is as in the original: it is believed, whatever it takes from others, and names nobody.
@pytest.mark.parametrize("action", ["add", "old"])
@pytest.mark.parametrize(("address", "other_address", "field"), LEASES)
def test_by_hand_an_address_is_taken_from_another_and_no_name_is_given(base, action, address, other_address, field):
    write(base, {MAC: {"name": "web", field: address}, OTHER: {"name": "", field: other_address}})
    variables = REMINDER if action == "add" else {}
    result = run(base, action, OTHER.upper(), address, "db", DNSMASQ_MAC=OTHER.upper(), **variables)
    assert (result.returncode, result.stderr) == (0, "")
    change = f"{field} {address} in place of {other_address} (taken from {MAC} web)"
    assert result.stdout == f"instances-update.py: {OTHER} (no name): {change}\n"
    assert read(base) == {MAC: {"name": "web"}, OTHER: {"name": "", field: address}}


@pytest.mark.parametrize("entry", [{}, {"name": None}, {"name": ""}])
@pytest.mark.parametrize(("action", "variables"), [("add", {}), ("old", REMINDER)])
def test_nameless_instance_gets_the_name_of_a_later_lease(base, entry, action, variables):
    write(base, {MAC: {"ipv4": "10.83.0.11", **entry}, OTHER: entry}, layout=2)
    result = lease(base, action, MAC, "10.83.0.11", "None", **variables)  # which the other has not
    assert result.stdout == f"instances-update.py: {MAC} None: named\n" and read(base)[MAC]["name"] == "None"
    assert read(base)[OTHER] == entry and base.with_suffix(".updated").exists()
    assert unchanged(lease, base, action, MAC, "10.83.0.11", "db", **variables) == ""


def test_allow_replaces_what_was_allowed_and_is_idempotent(base):
    emptied = {"ipv4": "", "ipv6_ula": None}  # by hand, which keeps nothing from being allowed
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11", "note": 1}, OTHER: {"name": "db", **emptied}})
    texts = ["2001:67c:99::/64", "10.83.0.50", "10.99.0.0/24", "2001:67C:83::50", "10.83.0.50"]
    result = run(base, "--allow", MAC.upper(), *texts)
    assert result.stdout.count("\n") == 1 and f"{MAC} web: allowed 10.83.0.50, 10.99.0.0/24" in result.stdout
    allowed = ["10.83.0.50", "10.99.0.0/24", "2001:67c:83::50", "2001:67c:99::/64"]
    assert read(base)[MAC] == {"name": "web", "ipv4": "10.83.0.11", "note": 1, "allowed": allowed}
    base.with_suffix(".updated").unlink()
    assert unchanged(run, base, "--allow", MAC, *reversed(texts)) == ""
    run(base, "--allow", OTHER, "10.83.0.50")  # shared, as by VRRP
    assert read(base)[OTHER]["allowed"] == ["10.83.0.50"]
    run(base, "--allow", MAC)
    assert "allowed" not in read(base)[MAC] and base.with_suffix(".updated").exists()
    for text in ("0.0.0.0/0", "::/0"):
        assert "uplink in bridge.nft" in refused(base, "--allow", MAC, text)  # as a router needs


def test_lease_changes_only_the_address_and_rename_only_the_name(base):
    rest = {"allowed": ["10.83.0.50"], "note": "a } b {", "list": [1, {"x": None}], "ü": "\ud800"}
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11", **rest}})
    lease(base, "add", MAC, "10.83.0.12", "other")
    assert read(base)[MAC] == {"name": "web", "ipv4": "10.83.0.12", **rest}
    run(base, "--rename", MAC.upper(), "db")
    assert read(base)[MAC] == {"name": "db", "ipv4": "10.83.0.12", **rest}


@pytest.mark.parametrize("allowed", ["10.83.0.50", "10.83.0.48/29", "fd83:5eed::50", "fd83:5eed::/120"])
def test_no_lease_gives_what_another_is_allowed_but_by_hand_it_is_given(base, allowed):
    address, action = "10.83.0.50" if "." in allowed else "fd83:5eed::50", "old" if "/" in allowed else "add"
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
    write(base, {MAC: {"name": "", "ipv4": "10.83.0.11"}}, layout)
    assert lease(base, "old", MAC, "10.83.0.11", name).stdout == ""
    assert "(no name): new" in lease(base, "add", OTHER, "10.83.0.12", name).stdout
    assert (read(base)[MAC]["name"], read(base)[OTHER]["name"]) == ("", "")
    assert run(base, "--rename", MAC, name).returncode == 0 and read(base)[MAC]["name"] == name


def test_add_that_takes_an_address_or_replaces_one_says_of_whom_and_which(base):
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11"}, OTHER: {"name": "", "ipv6_gua": "2001:67c:83::12"}})
    taken = lease(base, "add", OTHER, "10.83.0.11", **REMINDER).stdout  # an add is none
    assert taken == f"instances-update.py: {OTHER} (no name): ipv4 10.83.0.11 (taken from {MAC} web)\n"
    assert "ipv4" not in read(base)[MAC] and read(base)[OTHER]["ipv4"] == "10.83.0.11"
    replaced = lease(base, "add", "x", "2001:67c:84::12", DNSMASQ_MAC=OTHER).stdout  # a second prefix of the bridge
    assert replaced.endswith(f"{OTHER} (no name): ipv6_gua 2001:67c:84::12 in place of 2001:67c:83::12\n")
    write(base, {MAC: {"name": "web", "ipv4": "10.83.0.11"}, OTHER: {"name": "db", "ipv4": "10.83.0.11"}})  # edited
    lease(base, "add", MAC, "10.83.0.11")
    assert read(base) == {MAC: {"name": "web", "ipv4": "10.83.0.11"}, OTHER: {"name": "db"}}


def test_name_stands_for_the_mac_address_and_is_taken_from_any_other_and_who_is_removed_may_come_back(base):
    write(base, {MAC: {"name": "Web"}, OTHER: {"name": "db", "ipv6_ula": "fd83:5eed::11"}})
    assert "allowed 10.83.0.50" in run(base, "--allow", "web", "10.83.0.50").stdout
    assert read(base)[MAC]["allowed"] == ["10.83.0.50"]
    said = f"instances-update.py: {MAC} DB: renamed (taken from {OTHER} db)\n"
    assert run(base, "--rename", "WEB", "DB").stdout == said
    assert unchanged(run, base, "--remove", "web") == "instances-update.py: warning: web: no such instance\n"
    result = run(base, "--remove", "dB")
    assert (result.stdout, result.stderr) == (f"instances-update.py: {MAC} DB: removed\n", "")
    assert read(base) == {OTHER: {"name": "", "ipv6_ula": "fd83:5eed::11"}}
    said = run(base, "--remove", OTHER.upper()).stderr
    assert said.count("\n") == 1 and f"instances-release {OTHER}" in said and read(base) == {}


def edit(base, commands, status=0):
    """Edit the registry by shell commands that get its copy as $1; return what is said, on an error one line."""
    editor = base.parent / "editor"
    editor.write_text(f"set -e\nf() {{ {UPDATE} --rename {OTHER} $1; }}\n{commands}\n")
    env = environment(base, EDITOR=f"sh {editor}")
    result = subprocess.run([sys.executable, EDIT], env=env, start_new_session=True, capture_output=True, text=True)
    assert result.returncode == status and (not status or result.stderr.count("\n") == 1)
    return result.stderr if status else result.stdout


def copies(base):
    return [path for path in base.parent.iterdir() if path.name.startswith("instances.json.")]


def test_edit_puts_in_place_what_was_edited_and_keeps_what_others_change_meanwhile_but_of_the_same_instance(base):
    write(base, {MAC: {"name": "web", "ipv4": "10.0.0.1"}, OTHER: {"name": "db"}})
    interrupted = "trap : INT; kill -INT 0"  # as by a terminal: all of the group, but it is the editor's only
    assert edit(base, f'{interrupted}; sed -i s/web/www/ "$1"') == f"instances-edit: {MAC}: edited\n"
    assert read(base) == {MAC: {"name": "www", "ipv4": "10.0.0.1"}, OTHER: {"name": "db"}}
    assert base.with_suffix(".updated").exists() and not copies(base)
    base.with_suffix(".updated").unlink()
    assert edit(base, "true") == "" and not base.with_suffix(".updated").exists() and not copies(base)
    edit(base, 'f mail; sed -i s/www/web/ "$1"')
    assert read(base) == {MAC: {"name": "web", "ipv4": "10.0.0.1"}, OTHER: {"name": "mail"}} and not copies(base)
    said = edit(base, 'f mail2; sed -i s/mail/files/ "$1"', 1)
    assert f"{OTHER} was changed meanwhile" in said and str(copies(base)[0]) in said
    assert read(base)[OTHER]["name"] == "mail2" and "files" in copies(base)[0].read_text()


def test_edit_that_is_no_registry_stays_in_a_copy_with_which_the_next_goes_on(base):
    assert f"{base}.json" in edit(base, "true", 1)  # there is none
    write(base, {MAC: {"name": "web"}, OTHER: {"name": "db"}})
    before = base.with_suffix(".json").read_bytes()
    edit(base, 'rm "$1"', 1)  # which removes nobody
    assert base.with_suffix(".json").read_bytes() == before
    for commands in ('sed -i "s/web/mail/; s/}//" "$1"', "exit 1", 'grep mail "$1"'):
        said = edit(base, commands, 1)
        assert base.with_suffix(".json").read_bytes() == before and len(copies(base)) == 1
        assert str(copies(base)[0]) in said
    edit(base, """grep mail "$1"; echo '{"x": {"name": "mail"}}' >"$1" """)
    assert read(base) == {"x": {"name": "mail"}} and not copies(base)
