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


def reconcile(host, *arguments, incus=INCUS, text="", settings="/dev/null"):
    env = environment(host.base, INSTANCES_SETTINGS=str(settings))
    command = [EXAMPLES / "incus" / "reconcile.sh", *arguments]
    return host.run(*command, env=env, input=text or json.dumps(incus), check=False)


def names(host):
    return {mac: instance["name"] for mac, instance in host.registry().items()}


@pytest.fixture
def registry(host):
    """The registry's file, with what was there before."""
    need("jq")
    path = Path(f"{host.base}.json")
    path.write_text(json.dumps(BEFORE))
    return path


def test_incus_example_brings_the_registry_in_line(host, registry):
    planned = reconcile(host)
    assert json.loads(registry.read_text()) == BEFORE and planned.returncode == 0
    assert sorted(planned.stdout.splitlines()) == [
        "instances-update.py --remove 10:66:6a:00:00:99",
        "instances-update.py --rename 10:66:6a:00:00:01 web",
        "instances-update.py --rename 10:66:6a:00:00:03 db-eth1",
        "instances-update.py --rename 10:66:6a:00:00:04 web-shop",
    ]
    assert planned.stderr.count("10:66:6a:00:00:05") == 1 and planned.stderr.count("10:66:6a:00:00:06") == 1
    assert reconcile(host, "--apply", "--force").returncode == 0
    changed = {"10:66:6a:00:00:01": "web", "10:66:6a:00:00:03": "db-eth1", "10:66:6a:00:00:04": "web-shop"}
    expected = {mac: i["name"] for mac, i in BEFORE.items() if mac != "10:66:6a:00:00:99"} | changed
    assert names(host) == expected
    assert reconcile(host).stdout == ""


@pytest.mark.parametrize(
    ("incus", "missing"),
    [
        ([], 6),
        ([instance for instance in INCUS if instance["project"] == "shop"], 5),
        ([{"name": instance["name"], "project": instance["project"]} for instance in INCUS], 6),
    ],
    ids=["empty", "one project", "no config"],
)
def test_incus_example_removes_what_a_list_lacks_only_if_told(host, registry, incus, missing):
    for arguments, status in ((("--apply",), 1), ((), 0)):
        result = reconcile(host, *arguments, incus=incus)
        assert result.returncode == status and host.registry().keys() == BEFORE.keys()
        told = f"not in the list: {missing}; removed with --apply --force only\n"
        assert result.stderr.endswith(told) and result.stderr.count(told) == 1
    assert reconcile(host, "--apply", "--force", incus=incus).returncode == 0
    assert len(host.registry()) == len(BEFORE) - missing


@pytest.mark.parametrize("text", [" ", "{}", "null", "not json", "[1]", "[] []"])
def test_incus_example_refuses_what_is_no_list(host, registry, text):
    result = reconcile(host, "--apply", "--force", text=text)
    assert (result.returncode, result.stdout) == (1, "") and host.registry() == BEFORE
    assert "incus list --all-projects" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--force",), ("--aply",), ("--apply", "--force", "x")])
def test_incus_example_refuses_other_arguments(host, registry, arguments):
    result = reconcile(host, *arguments)
    assert (result.returncode, result.stdout) == (2, "") and host.registry() == BEFORE
    assert result.stderr == "usage: incus list --all-projects --format json | reconcile.sh [--apply [--force]]\n"


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"10:66:6a:00:00:01": 1}'])
def test_incus_example_refuses_without_a_registry(host, registry, content):
    registry.unlink() if content is None else registry.write_text(content)
    result = reconcile(host, "--apply")
    assert result.returncode == 1 and f"{registry}: not there, or no registry" in result.stderr
    assert result.stderr.count("\n") == 1


def nic(name, hwaddr, **others):
    """Return an instance of the default project with an eth0."""
    return {"name": name, "project": "default", "config": {"volatile.eth0.hwaddr": hwaddr}} | others


def test_incus_example_leaves_names_that_cannot_be_given(host, registry):
    before = {
        host.mac: {"name": "host"},
        "52:54:00:00:00:01": {"name": "Mail"},
        "10:66:6a:00:00:01": {"name": "one"},
        "10:66:6a:00:00:02": {"name": "two"},
        "10:66:6a:00:00:03": {"name": "three"},
        "10:66:6a:00:00:04": {"name": "four"},
    }
    registry.write_text(json.dumps(before))
    incus = [
        nic("HOST", "10:66:6a:00:00:01"),
        nic("mail", "10:66:6a:00:00:02"),
        nic("a" * 60, "10:66:6a:00:00:03", project="shop"),
        nic("web", "10:66:6a:00:00:04", project="my_shop"),
    ]
    for arguments in ((), ("--apply",)):
        result = reconcile(host, *arguments, incus=incus)
        assert (result.returncode, result.stdout) == (0, "") and host.registry() == before
        why = [line.split(" is left as it is: ")[1] for line in result.stderr.splitlines()]
        assert why == [
            "HOST is the name of another",
            "mail is the name of another",
            f"{'a' * 60}-shop is no name in DNS",
            "web-my_shop is no name in DNS",
        ]


def test_incus_example_believes_a_mac_address_that_was_set(host, registry):
    old, new, made = (f"10:66:6a:00:00:0{n}" for n in (1, 2, 3))
    registry.write_text(json.dumps({mac: {"name": ""} for mac in (old, new, made)}))
    expanded = {"eth0": {"type": "nic", "hwaddr": new.upper()}, "root": {"type": "disk", "path": "/"}}
    incus = [
        nic("set", old, expanded_devices=expanded),
        nic("made", made, devices={"eth0": {"type": "nic", "hwaddr": "10:66:6a:xx:xx:xx"}}),
    ]
    assert reconcile(host, "--apply", "--force", incus=incus).returncode == 0
    assert names(host) == {new: "set", made: "made"}
    config = [{"name": "other", "config": incus[0]["config"], "devices": expanded}]
    reconcile(host, "--apply", incus=config)
    assert names(host) == {new: "other", made: "made"}


def test_incus_example_finds_the_registry_by_the_settings(host, registry, tmp_path):
    settings = tmp_path / "settings"
    settings.write_text("INSTANCES_BASE_ID=br0\n")
    mine = registry.rename(f"{host.base}-br0.json")
    assert reconcile(host, "--apply", "--force", settings=settings).returncode == 0
    assert json.loads(mine.read_text())["10:66:6a:00:00:01"]["name"] == "web"
