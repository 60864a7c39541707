"""The example incus with an Incus that says what it should not; machines/incus.sh runs it with a real one."""

import json
import os
import shutil
import signal
import sys
import time

import pytest
from conftest import lock_held
from lab import EXAMPLES, HOST_MAC, TOP, run, wait_for
from test_release import Managed, serve

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
WEB, OLD, OTHER, NOBODYS = (f"10:66:6a:00:00:0{number}" for number in (1, 2, 3, 4))
BEFORE = {
    HOST_MAC: {"name": "host", "ipv4": "10.83.0.1"},
    WEB: {"name": "ubuntu", "ipv4": "10.83.0.11", "note": "stays"},
    OLD: {"name": "web", "ipv6_lla": "fe80::1266:6aff:fe00:2", "incus": "default/web"},
    NOBODYS: {"name": "Mail"},
}


def answer(metadata, code=0, error=""):
    return json.dumps({"error_code": code, "error": error, "metadata": metadata})


GONE = answer(None, 404, "Instance not found")


def instance(name, mac, project="default", parent="br0", **options):
    """Return an instance as Incus has it, with an eth0."""
    eth0 = {"type": "nic", "parent": parent, "security.mac_filtering": "true"} | options
    devices = {"eth0": eth0, "root": {"type": "disk", "path": "/"}}
    return {"name": name, "project": project, "config": {"volatile.eth0.hwaddr": mac}, "expanded_devices": devices}


class Incus(Managed):
    """A host with br0, the registry of before, and a command incus."""

    def __init__(self, host):
        super().__init__(host, BEFORE, incus=INCUS, one=GONE, events="", asked="")
        self.command = [sys.executable, EXAMPLES / "incus" / "instances-incus"]
        self.says(answer([instance("web", WEB)]))

    def says(self, text, one=GONE):
        (self.folder / "list").write_text(text)
        (self.folder / "one").write_text(one)

    def run(self, *arguments):
        return self.host.run(*self.command, *arguments, env=self.env, check=False)

    def compare(self, *instances, one=GONE):
        """Compare once, with what Incus lists now, and says of one that it does not list; return what is said."""
        self.says(answer(instances), one)
        result = self.run("--once")
        assert result.returncode == 0
        return result.stderr

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


def test_incus_example_gives_names_also_before_a_lease_and_removes_what_is_gone(incus):
    shown = incus.run("--show")
    assert shown.returncode == 0 and incus.entries() == BEFORE
    said = incus.compare(instance("web", WEB))
    assert said == shown.stderr and said.count("\n") == 3
    web = BEFORE[WEB] | {"name": "web", "incus": "default/web"}
    assert incus.entries() == {HOST_MAC: BEFORE[HOST_MAC], WEB: web, NOBODYS: BEFORE[NOBODYS]}
    assert incus.compare(instance("web", WEB)) == "" and os.path.exists(f"{incus.host.base}.updated")
    incus.compare(instance("web", WEB), instance("new", OTHER))  # before its first lease
    new = {"name": "new", "ipv6_lla": "fe80::1266:6aff:fe00:3", "incus": "default/new"}
    assert incus.entries()[OTHER] == new


def test_incus_example_changes_nothing_by_an_answer_that_is_none(incus):
    # Of one that is not listed, and then of all
    for one in (answer(None, 403, "not authorized"), "", "[]", "Error: connection refused"):
        incus.says(answer([]), one)
        refused(incus, "Incus")
    odd = {"name": "web", "project": "default"}
    odder = odd | {"expanded_devices": {"eth0": {"type": 1}}, "config": 1}
    lists = (None, {"a": 1}, [1], [odd], [odder], [instance(5, WEB)])
    cut = answer([instance("x", OTHER)])[:-40]
    for text in ("", "null", "not json", cut, answer(None, 500, "database is locked"), *map(answer, lists)):
        incus.says(text)
        refused(incus, "Incus")


def test_incus_example_keeps_what_incus_has_but_did_not_list(incus):
    said = incus.compare(one=answer(instance("web", OLD)))
    assert said.count("\n") == 1 and f"{OLD} stays: Incus has default/web" in said and incus.entries() == BEFORE
    incus.compare(one=answer(instance("web", OLD, parent="incusbr0")))
    assert OLD not in incus.names()


def test_incus_example_takes_nothing_from_the_host_or_from_others(incus):
    new = [f"10:66:6a:00:00:0{number}" for number in (5, 6, 7)]
    named = zip(["HOST", "mail", "x", "twice", "Twice"], [WEB, OTHER, HOST_MAC, *new])
    all_of_them = [*(instance(*pair) for pair in named), instance("a" * 60, new[2], project="shop")]
    incus.compare(*all_of_them)
    said = incus.compare(*all_of_them)
    assert said.count(" is not called ") == said.count("\n") == 5
    unnamed = dict.fromkeys([OTHER, *new], "")
    assert incus.names() == {HOST_MAC: "host", NOBODYS: "Mail", WEB: "ubuntu"} | unnamed


def test_incus_example_names_projects_and_further_interfaces(incus):
    two = instance("web", WEB, project="shop")
    two["expanded_devices"]["lan_1"] = {"type": "nic", "network": "br0", "hwaddr": OTHER.upper()}
    two["expanded_devices"]["eth2"] = {"type": "nic", "parent": "virbr0", "hwaddr": "10:66:6a:00:00:08"}
    assert f"{OTHER} web-shop-lan-1: without security.mac_filtering" in incus.compare(two)
    assert incus.names() == {HOST_MAC: "host", NOBODYS: "Mail", WEB: "web-shop", OTHER: "web-shop-lan-1"}


def test_incus_example_registers_fixed_addresses_but_the_hosts_and_one_of_two_guests_for_one_of_them(incus):
    """The one that has it, though the list may name the other, its copy, first."""
    web = instance("web", WEB, **{"ipv4.address": "10.83.0.50", "ipv6.address": "fd83:5eed:0::50"})
    copy, another = (instance("copy", OTHER, **{"ipv4.address": f"10.83.0.{number}"}) for number in (50, 1))
    assert f"{OTHER}: 10.83.0.1 is not registered" in incus.compare(web, another)
    assert f"{OTHER}: 10.83.0.50 is not registered" in incus.compare(copy, web)
    entries = incus.entries()
    assert (entries[WEB]["ipv4"], entries[WEB]["ipv6_ula"]) == ("10.83.0.50", "fd83:5eed::50")
    assert "ipv4" not in entries[OTHER] and entries[HOST_MAC]["ipv4"] == "10.83.0.1"
    assert incus.compare(copy, web).count("\n") == 1 and incus.entries() == entries


def test_incus_example_says_in_one_line_what_is_missing_and_changes_nothing(incus):
    with lock_held(incus.host.base):
        refused(incus, "instances.lock")
    (incus.folder / "incus").unlink()
    refused(incus, "'incus'")
    for text, told in (("{}", "--initialize br0 host"), ("[]", "mend it")):
        incus.registry.write_text(text)
        refused(incus, told)
    incus.env["PATH"] = "/usr/sbin:/usr/bin"
    refused(incus, "no instances-update.py on the PATH\n")


def test_incus_example_keeps_an_instance_until_its_leases_are_ended_on_no_host_that_follows_another(incus):
    """dnsmasq is stopped, and at first the program that asks it is missing."""
    incus.host.stop_dnsmasq()
    shutil.copy(TOP / "instances-update.py", incus.folder)
    asking = incus.env["PATH"]
    for path, told in ((f"{incus.folder}:/usr/bin:/bin", "instances-release"), (asking, OLD)):
        incus.env["PATH"] = path
        result = incus.run("--once")
        assert result.returncode == 1 and told in result.stderr.splitlines()[-1]
        assert incus.names() == {HOST_MAC: "host", WEB: "web", OLD: "", NOBODYS: "Mail"}
    leases = serve(incus.host, f"{OLD} 10.83.0.112 ubuntu *")
    follows = incus.host.folder / "instances.follows"
    follows.write_text("a writes it")
    refused(incus, "is not to be changed on this host: a writes it")
    assert OLD in leases.read_text()
    follows.unlink()
    assert incus.run("--once").returncode == 0 and OLD not in incus.names() and leases.read_text() == ""


def test_incus_example_leaves_alone_what_is_on_a_member_of_the_cluster_that_is_not_reached(incus):
    lost = {"name": "web", "project": "default", "status": "Error", "status_code": 400, "location": "c", "config": None}
    said = incus.compare(lost, instance("new", OTHER), one=answer(None, 503, "no"))
    assert "default/web stays as it is: Incus does not reach c" in said
    assert incus.names() == {**{m: i["name"] for m, i in BEFORE.items()}, OTHER: "new"}


@pytest.fixture
def follower(incus):
    """The program at work, and what it says."""
    log = incus.host.folder / "follower.log"
    with open(log, "w") as file:
        process = incus.host.start(*incus.command, env=incus.env, stdout=file, stderr=file)
    wait_for(lambda: incus.names()[WEB] == "web", "the comparison at the start")
    yield process, log
    for child in run("pgrep", "-P", process.pid, check=False).stdout.split():
        os.kill(int(child), signal.SIGTERM)


def compared(incus, text="{}\n"):
    """Have the monitor say something, and wait until Incus was asked for all."""
    asked = incus.asked()
    with open(incus.folder / "events", "a") as events:
        events.write(text)
    wait_for(lambda: incus.asked() > asked, "the comparison", 5)


def test_incus_example_compares_whatever_the_monitor_says(incus, follower):
    incus.says(answer([instance("renamed", WEB)]))
    time.sleep(0.5)  # it would not look by itself for a minute
    assert incus.names()[WEB] == "web"
    unknown = '{"type": "unheard-of", "metadata": [1]}\n'
    for number, text in enumerate(('{"type": "life', unknown, "\0\n", "\n" * 300000)):
        incus.says(answer([instance(f"renamed{number}", WEB)]))
        compared(incus, text)
        wait_for(lambda n=number: incus.names()[WEB] == f"renamed{n}", "the name", 5)


def test_incus_example_compares_seldom_while_events_come(incus, follower):
    asked, begun = incus.asked(), time.monotonic()
    while time.monotonic() < begun + 2:
        with open(incus.folder / "events", "a") as events:
            events.write("{}\n")
        time.sleep(0.01)
    wait_for(lambda: incus.asked() > asked, "the comparison", 5)
    assert incus.asked() <= asked + 10  # two seconds, by the fifth of one


def test_incus_example_says_once_what_stands_goes_on_and_ends_when_the_monitor_does(incus, follower):
    process, log = follower
    incus.says("not json")
    for _ in range(3):
        compared(incus)
    assert log.read_text().count("Incus doesn't answer") == 1
    incus.says(answer([instance("again", WEB)]))
    wait_for(lambda: incus.names()[WEB] == "again", "another try", 10)
    os.kill(int(run("pgrep", "-P", process.pid).stdout), signal.SIGKILL)
    assert process.wait(10) == 1 and "incus monitor has ended" in log.read_text().splitlines()[-1]
