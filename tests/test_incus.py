"""The example incus with an Incus that says what it should not; machines/incus.sh runs it with a real one."""

import json
import os
import shutil
import signal
import sys
import time

import pytest
from conftest import lock_held
from lab import EXAMPLES, HOST_MAC, TOP, environment, run, wait_for
from test_release import serve

pytestmark = pytest.mark.slow

# A command incus that says what stands in the files beside it, and notes how often it was asked for all.
INCUS = """\
#!/bin/sh
here=${0%/*}
case $1:$* in
monitor:*) exec tail -n +1 -f "$here/events" ;;
*recursion=1*) echo >>"$here/asked"; cat "$here/list" ;;
*) cat "$here/one" ;;
esac
"""
GONE = {"error_code": 404, "error": "Instance not found", "metadata": None}
WEB, OLD, OTHER, NOBODYS = (f"10:66:6a:00:00:0{number}" for number in (1, 2, 3, 4))
BEFORE = {
    HOST_MAC: {"name": "host", "ipv4": "10.83.0.1"},
    WEB: {"name": "ubuntu", "ipv4": "10.83.0.11", "note": "stays"},
    OLD: {"name": "web", "ipv6_lla": "fe80::1266:6aff:fe00:2", "incus": "default/web"},
    NOBODYS: {"name": "Mail"},
}


def answer(instances):
    return json.dumps({"error_code": 0, "error": "", "metadata": instances})


def instance(name, mac, project="default", parent="br0", **options):
    """Return an instance as Incus has it, with an eth0."""
    eth0 = {"type": "nic", "parent": parent, "security.mac_filtering": "true"} | options
    devices = {"eth0": eth0, "root": {"type": "disk", "path": "/"}}
    return {"name": name, "project": project, "config": {"volatile.eth0.hwaddr": mac}, "expanded_devices": devices}


class Incus:
    """A host with br0, the registry of before, and a command incus."""

    def __init__(self, host):
        self.host, self.folder = host, host.folder / "bin"
        self.folder.mkdir()
        self.registry = host.folder / "instances.json"
        self.registry.write_text(json.dumps(BEFORE))
        for name, text in (("incus", INCUS), ("one", json.dumps(GONE)), ("events", ""), ("asked", "")):
            (self.folder / name).write_text(text)
        (self.folder / "incus").chmod(0o755)
        serve(host)
        self.says(answer([instance("web", WEB)]))
        self.env = environment(host.base)
        self.env["PATH"] = f"{self.folder}:{EXAMPLES}/dnsmasq:{self.env['PATH']}"

    def says(self, text, one=None):
        (self.folder / "list").write_text(text)
        if one is not None:
            (self.folder / "one").write_text(one)

    def run(self, *arguments):
        command = [sys.executable, EXAMPLES / "incus" / "instances-incus", *arguments]
        return self.host.run(*command, env=self.env, check=False)

    def names(self):
        return {mac: i["name"] for mac, i in json.loads(self.registry.read_text()).items()}

    def asked(self):
        return (self.folder / "asked").read_text().count("\n")


@pytest.fixture
def incus(host):
    return Incus(host)


def refused(incus, *told):
    """Compare once: nothing is changed, and one line says why."""
    before = incus.registry.read_text()
    result = incus.run("--once")
    assert result.returncode == 1 and incus.registry.read_text() == before
    assert result.stderr.count("\n") == 1 and all(words in result.stderr for words in told), result.stderr


def test_incus_example_gives_names_and_removes_what_is_gone(incus):
    shown = incus.run("--show")
    assert shown.returncode == 0 and json.loads(incus.registry.read_text()) == BEFORE
    done = incus.run("--once")
    assert done.returncode == 0 and done.stderr == shown.stderr and done.stderr.count("\n") == 3
    registry = json.loads(incus.registry.read_text())
    assert registry[WEB] == BEFORE[WEB] | {"name": "web", "incus": "default/web"}
    assert registry.keys() == BEFORE.keys() - {OLD} and registry[HOST_MAC] == BEFORE[HOST_MAC]
    assert incus.run("--once").stderr == ""
    assert os.path.exists(f"{incus.host.base}.updated")


def test_incus_example_enters_names_before_the_first_lease(incus):
    incus.says(answer([instance("new", OTHER)]))
    incus.run("--once")
    entry = json.loads(incus.registry.read_text())[OTHER]
    assert entry == {"name": "new", "ipv6_lla": "fe80::1266:6aff:fe00:3", "incus": "default/new"}


@pytest.mark.parametrize(
    ("text", "one"),
    [
        (answer([]), json.dumps({"error_code": 403, "error": "not authorized", "metadata": None})),
        (answer([]), ""),
        (answer([]), "[]"),
        (answer([instance("x", OTHER)]), "Error: connection refused"),
        ("", ""),
        ("null", ""),
        ("not json", ""),
        (answer(None), ""),
        (answer({"a": 1}), ""),
        (answer([1]), ""),
        (answer([{"name": "web", "project": "default"}]), ""),
        (answer([instance(5, WEB)]), json.dumps(GONE)),
        (answer([{"name": "web", "project": "default", "expanded_devices": {"eth0": {"type": 1}}, "config": 1}]), ""),
        (answer([instance("x", OTHER)])[:-40], ""),
        (json.dumps({"error_code": 500, "error": "database is locked", "metadata": None}), ""),
    ],
)
def test_incus_example_changes_nothing_by_an_answer_that_is_none(incus, text, one):
    incus.says(text, one)
    refused(incus, "Incus")


def test_incus_example_keeps_what_incus_has_but_did_not_list(incus):
    incus.says(answer([]), answer(instance("web", OLD)))
    result = incus.run("--once")
    assert result.returncode == 0 and json.loads(incus.registry.read_text()) == BEFORE
    assert result.stderr.count("\n") == 1 and f"{OLD} stays: Incus has default/web" in result.stderr
    incus.says(answer([]), answer(instance("web", OLD, parent="incusbr0")))
    incus.run("--once")
    assert OLD not in incus.names()


def test_incus_example_takes_nothing_from_the_host_or_from_others(incus):
    web, others = instance("HOST", WEB), [instance("mail", OTHER), instance("x", HOST_MAC)]
    others += [instance("twice", "10:66:6a:00:00:05"), instance("Twice", "10:66:6a:00:00:06")]
    others += [instance("a" * 60, "10:66:6a:00:00:07", project="shop")]
    incus.says(answer([web, *others]))
    incus.run("--once")
    result = incus.run("--once")
    assert result.stderr.count(" is not called ") == result.stderr.count("\n") == 5
    names = incus.names()
    assert (names[HOST_MAC], names[NOBODYS], names[WEB], names[OTHER]) == ("host", "Mail", "ubuntu", "")
    assert set(names) == {HOST_MAC, NOBODYS, WEB, OTHER, *(f"10:66:6a:00:00:0{n}" for n in (5, 6, 7))}


def test_incus_example_names_projects_and_further_interfaces(incus):
    two = instance("web", WEB, project="shop")
    two["expanded_devices"]["lan_1"] = {"type": "nic", "network": "br0", "hwaddr": OTHER.upper()}
    two["expanded_devices"]["eth2"] = {"type": "nic", "parent": "virbr0", "hwaddr": "10:66:6a:00:00:08"}
    incus.says(answer([two]))
    assert f"{OTHER} web-shop-lan-1: without security.mac_filtering" in incus.run("--once").stderr
    assert incus.names() == {HOST_MAC: "host", NOBODYS: "Mail", WEB: "web-shop", OTHER: "web-shop-lan-1"}


def test_incus_example_registers_fixed_addresses(incus):
    fixed = {"ipv4.address": "10.83.0.50", "ipv6.address": "fd83:5eed:0::50"}
    incus.says(answer([instance("web", WEB, **fixed), instance("x", OTHER, **{"ipv4.address": "10.83.0.1"})]))
    result = incus.run("--once")
    registry = json.loads(incus.registry.read_text())
    assert (registry[WEB]["ipv4"], registry[WEB]["ipv6_ula"]) == ("10.83.0.50", "fd83:5eed::50")
    assert "ipv4" not in registry[OTHER] and registry[HOST_MAC]["ipv4"] == "10.83.0.1"
    assert f"{OTHER}: 10.83.0.1 is not registered" in result.stderr


def test_incus_example_needs_the_bridge_to_be_registered(incus):
    incus.registry.write_text("{}")
    refused(incus, "--initialize br0 host")
    incus.registry.write_text("[]")
    refused(incus, "mend it")


def test_incus_example_says_that_instances_update_is_not_there(incus):
    incus.env["PATH"] = "/usr/sbin:/usr/bin"
    result = incus.run("--once")
    assert (result.returncode, result.stderr) == (1, "no instances-update.py on the PATH\n")


def test_incus_example_says_that_incus_is_not_there(incus):
    (incus.folder / "incus").unlink()
    refused(incus, "'incus'")


@pytest.mark.parametrize("arguments", [("--force",), ("--show", "x")])
def test_incus_example_refuses_other_arguments(incus, arguments):
    result = incus.run(*arguments)
    assert result.returncode == 2 and ": no such usage: " in result.stderr and incus.asked() == 0


def test_incus_example_waits_for_the_lock(incus):
    with lock_held(incus.host.base):
        refused(incus, "instances.lock")
    assert incus.run("--once").returncode == 0


def test_incus_example_leaves_the_registry_whole_on_a_full_disk(incus):
    shutil.rmtree(incus.host.folder / "full", ignore_errors=True)
    full = incus.host.folder / "full"
    full.mkdir()
    script = 'mount -t tmpfs -o size=16k tmpfs "$1" && cp "$2" "$1" && cd "$1" && cp "$2" a.json && : >a.lock'
    script += ' && { cat /dev/zero >fill || :; } && INSTANCES_BASE_PATH="$1/a" "$3" "$4" --once || cat a.json'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", full, incus.registry, sys.executable]
    result = incus.host.run(*command, EXAMPLES / "incus" / "instances-incus", env=incus.env, check=False)
    assert "No space left" in result.stderr.splitlines()[-1] and json.loads(result.stdout) == BEFORE


def test_incus_example_keeps_an_instance_until_its_leases_are_ended(incus):
    """dnsmasq is stopped, and then the program that asks it is missing."""
    incus.host.stop_dnsmasq()
    shutil.copy(TOP / "instances-update.py", incus.folder)
    for path, told in ((incus.env["PATH"], OLD), (f"{incus.folder}:/usr/bin:/bin", "instances-release")):
        incus.env["PATH"] = path
        result = incus.run("--once")
        assert result.returncode == 1 and told in result.stderr.splitlines()[-1]
        assert incus.names() == {HOST_MAC: "host", WEB: "web", OLD: "", NOBODYS: "Mail"}
    incus.env["PATH"] = f"{EXAMPLES}/dnsmasq:{incus.env['PATH']}"
    leases = serve(incus.host, f"{OLD} 10.83.0.112 ubuntu *")
    assert incus.run("--once").returncode == 0 and OLD not in incus.names() and leases.read_text() == ""


def test_incus_example_changes_nothing_on_a_host_that_follows_another(incus):
    """Nor does it end a lease: who writes the registry does."""
    incus.host.stop_dnsmasq()
    leases = serve(incus.host, f"{OLD} 10.83.0.112 ubuntu *")
    follows = incus.host.folder / "instances.follows"
    follows.write_text("a writes it")
    refused(incus, "is not to be changed on this host: a writes it")
    assert OLD in leases.read_text()
    follows.unlink()
    assert incus.run("--once").returncode == 0 and OLD not in incus.names()


def test_incus_example_leaves_alone_what_is_on_a_member_of_the_cluster_that_is_not_reached(incus):
    lost = {"name": "web", "project": "default", "status": "Error", "status_code": 400, "location": "c", "config": None}
    incus.says(answer([lost, instance("new", OTHER)]), json.dumps({"error_code": 503, "error": "no", "metadata": None}))
    result = incus.run("--once")
    assert result.returncode == 0 and "default/web stays as it is: Incus does not reach c" in result.stderr
    assert incus.names() == {**{m: i["name"] for m, i in BEFORE.items()}, OTHER: "new"}


def test_incus_example_gives_a_fixed_address_of_two_guests_to_one_for_good(incus):
    """The one that has it, though the list may name the other, its copy, first."""
    fixed = {"ipv4.address": "10.83.0.50"}
    incus.says(answer([instance("web", WEB, **fixed)]))
    incus.run("--once")
    incus.says(answer([instance("copy", OTHER, **fixed), instance("web", WEB, **fixed)]))
    assert f"{OTHER}: 10.83.0.50 is not registered" in incus.run("--once").stderr
    before = incus.registry.read_text()
    assert incus.run("--once").stderr.count("\n") == 1 and incus.registry.read_text() == before
    assert json.loads(before)[WEB]["ipv4"] == "10.83.0.50" and "ipv4" not in json.loads(before)[OTHER]


@pytest.fixture
def follower(incus):
    """The program at work, and what it says."""
    log = incus.host.folder / "follower.log"
    with open(log, "w") as file:
        command = [sys.executable, EXAMPLES / "incus" / "instances-incus"]
        process = incus.host.start(*command, env=incus.env, stdout=file, stderr=file)
    wait_for(lambda: incus.names()[WEB] == "web", "the comparison at the start")
    yield process, log
    for child in run("pgrep", "-P", process.pid, check=False).stdout.split():
        os.kill(int(child), signal.SIGTERM)


MONITOR_SAYS = {
    "half a line": '{"type": "life',
    "an unknown kind": '{"type": "unheard-of", "metadata": [1]}\n',
    "no text": "\0\n",
    "much": "\n" * 300000,
}


def compared(incus, text="{}\n"):
    """Have the monitor say something, and wait until Incus was asked for all."""
    asked = incus.asked()
    with open(incus.folder / "events", "a") as events:
        events.write(text)
    wait_for(lambda: incus.asked() > asked, "the comparison", 5)


@pytest.mark.parametrize("kind", MONITOR_SAYS)
def test_incus_example_compares_whatever_the_monitor_says(incus, follower, kind):
    incus.says(answer([instance("renamed", WEB)]))
    time.sleep(0.5)  # it would not look by itself for a minute
    assert incus.names()[WEB] == "web"
    compared(incus, MONITOR_SAYS[kind])
    wait_for(lambda: incus.names()[WEB] == "renamed", "the name", 5)


def test_incus_example_compares_seldom_while_events_come(incus, follower):
    asked, begun = incus.asked(), time.monotonic()
    while time.monotonic() < begun + 2:
        with open(incus.folder / "events", "a") as events:
            events.write("{}\n")
        time.sleep(0.01)
    wait_for(lambda: incus.asked() > asked, "the comparison", 5)
    assert incus.asked() <= asked + 10  # two seconds, by the fifth of one


def test_incus_example_says_once_what_stands_and_goes_on(incus, follower):
    _, log = follower
    incus.says("not json")
    for _ in range(3):
        compared(incus)
    assert log.read_text().count("Incus doesn't answer") == 1
    incus.says(answer([instance("again", WEB)]))
    wait_for(lambda: incus.names()[WEB] == "again", "another try", 10)


def test_incus_example_ends_when_the_monitor_does(incus, follower):
    process, log = follower
    os.kill(int(run("pgrep", "-P", process.pid).stdout), signal.SIGKILL)
    assert process.wait(10) == 1 and "incus monitor has ended" in log.read_text().splitlines()[-1]
