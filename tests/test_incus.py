"""The example incus."""

import json
from pathlib import Path

import pytest
from conftest import need
from lab import EXAMPLES, environment

pytestmark = pytest.mark.slow


INCUS = [
    {"name": "web", "project": "default", "status": "Running", "config": {"volatile.eth0.hwaddr": "10:66:6A:00:00:01"}},
    {
        "name": "db",
        "project": "default",
        "status": "Stopped",
        "config": {"volatile.eth1.hwaddr": "10:66:6a:00:00:03", "volatile.eth0.hwaddr": "10:66:6a:00:00:02"},
    },
    {
        "name": "web",
        "project": "shop",
        "config": {"image.os": "Debian"},
        "expanded_devices": {"eth0": {"hwaddr": "10:66:6a:00:00:04"}, "root": {"path": "/"}},
    },
    {"name": "x", "project": "default", "config": {"volatile.eth0.hwaddr": "10:66:6a:00:00:05"}},
    {"name": "X", "project": "default", "config": {"volatile.eth0.hwaddr": "10:66:6a:00:00:06"}},
    {"name": "new", "project": "default", "config": {"volatile.eth0.hwaddr": "10:66:6a:00:00:07"}},
]
BEFORE = {
    "10:66:6a:4c:a1:fe": {"name": "host"},
    "10:66:6a:00:00:01": {"name": "old"},
    "10:66:6a:00:00:02": {"name": "db"},
    "10:66:6a:00:00:03": {"name": ""},
    "10:66:6a:00:00:04": {"name": "web"},
    "10:66:6a:00:00:05": {"name": "five"},
    "10:66:6a:00:00:99": {"name": "deleted"},
    "52:54:00:00:00:01": {"name": "not-of-incus"},
}


INCUS_LIST = json.dumps(INCUS)


def reconcile(host, *arguments, text=INCUS_LIST, **options):
    return host.run(EXAMPLES / "incus" / "reconcile.sh", *arguments, env=environment(host.base), input=text, **options)


def test_incus_example_brings_the_registry_in_line(host):
    need("jq")
    path = Path(f"{host.base}.json")
    path.write_text(json.dumps(BEFORE))
    planned = reconcile(host)
    assert json.loads(path.read_text()) == BEFORE
    assert sorted(planned.stdout.splitlines()) == [
        "instances-update.py --remove 10:66:6a:00:00:99",
        "instances-update.py --rename 10:66:6a:00:00:01 web",
        "instances-update.py --rename 10:66:6a:00:00:03 db-eth1",
        "instances-update.py --rename 10:66:6a:00:00:04 web-shop",
    ]
    assert planned.stderr.count("10:66:6a:00:00:05") == 1 and planned.stderr.count("10:66:6a:00:00:06") == 1
    reconcile(host, "--apply")
    names = {mac: instance["name"] for mac, instance in host.registry().items()}
    changed = {"10:66:6a:00:00:01": "web", "10:66:6a:00:00:03": "db-eth1", "10:66:6a:00:00:04": "web-shop"}
    expected = {mac: i["name"] for mac, i in BEFORE.items() if mac != "10:66:6a:00:00:99"} | changed
    assert names == expected
    assert reconcile(host).stdout == ""


@pytest.mark.parametrize("text", ["", "{}", "null", "not json"])
def test_incus_example_changes_nothing_where_incus_says_nothing(host, text):
    need("jq")
    Path(f"{host.base}.json").write_text(json.dumps(BEFORE))
    assert reconcile(host, "--apply", text=text, check=False).stdout == "" and host.registry() == BEFORE
