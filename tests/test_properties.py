"""What holds for any sequence of events, any registry and any argument."""

import ipaddress
import json
import os
import re
import subprocess
import sys
import tempfile
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
from conftest import check_nft
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from lab import PROCESS, UPDATE, environment, run_script
from test_process import outputs, sets_of

FIELDS = ("ipv4", "ipv6_gua", "ipv6_ula", "ipv6_lla")
MACS = st.sampled_from([f"10:66:6a:00:00:0{n}" for n in range(4)])
# Few values, so that they meet; each kind of address, valid names in both cases, and what is neither
ADDRESSES = ["10.0.0.1", "10.0.0.2", "2001:67c::1", "2001:67c::2", "fd00::1", "fd00::2", "fe80::1", "2001:db8::1"]
NAMES = ["web", "WEB", "db", "build-runner"]
BAD_NAMES = ["", "3cx", "my_host", "-x", "x-", "a" * 64, 'a"', "a\n", "ä", "host.example"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*ADDRESSES, *NAMES, "}{"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | MACS | st.sampled_from(FIELDS), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.text(min_size=1).filter(lambda key: key not in ("name", *FIELDS))
UNKNOWN = st.dictionaries(KEYS, JSON, max_size=2)
KINDS = st.sampled_from(["by hand", "add", "old", "reminder"])
LEASE = st.tuples(st.just("lease"), MACS, st.sampled_from(ADDRESSES), st.sampled_from(NAMES + BAD_NAMES), KINDS)
RENAME = st.tuples(st.just("rename"), MACS, st.sampled_from(NAMES))
REMOVE = st.tuples(st.just("remove"), MACS)
OWN = {"ipv4": "10.0.0.1", "ipv6_gua": "2001:67c::1", "ipv6_ula": "fd00::1", "allowed": ["10.0.0.2", "2001:67c::2"]}
OWN_FIELDS = st.fixed_dictionaries(
    {"name": st.sampled_from(NAMES), "ipv6_lla": st.just("fe80::83")},
    optional={field: st.just(value) for field, value in OWN.items()},
)
INITIALIZE = st.tuples(st.just("initialize"), MACS, OWN_FIELDS)
NETWORKS = [*ADDRESSES[:6], "10.0.0.0/31", "10.9.0.0/24", "10.9.0.128/25", "2001:67c:9::/64", "fd00::/126"]
ALLOW = st.tuples(st.just("allow"), MACS, st.lists(st.sampled_from(NETWORKS), max_size=4))
EVENT = LEASE | RENAME | REMOVE | INITIALIZE | ALLOW


def apply(update, registry, event):
    """Do an event to a registry; return what the script would print."""
    kind, mac, *rest = event
    if kind == "lease":
        return update.register(registry, mac, *rest)
    if kind == "initialize":
        return update.initialize(registry, mac, *rest)
    if kind == "allow":
        try:
            return update.change_instance(registry, update.allow, mac, *rest[0])
        except ValueError:
            return "", []
    return update.change_instance(registry, update.rename if kind == "rename" else update.remove, mac, *rest)


def check_invariants(update, registry):
    for mac, instance in registry.items():
        assert update.is_mac(mac) and (instance["name"] == "" or update.is_name(instance["name"]))
        for field in FIELDS:
            if field in instance:
                assert update.parse_address(instance[field])[:2] == (field, instance[field])
    for field in ("name", "ipv4", "ipv6_gua", "ipv6_ula"):
        values = [i[field].lower() for i in registry.values() if i.get(field)]
        assert len(values) == len(set(values))


def check_lease(before, registry, lease):
    """Check that a lease changes another instance only by taking its address, and its own name only if that is none."""
    _, mac, address, hostname, kind = lease
    for other in before.keys() - {mac}:
        taken = [value for field, value in before[other].items() if registry[other].get(field) != value]
        assert taken in ([], [address] if kind == "by hand" or kind == "add" and "." in address else [])
        assert registry[other].keys() <= before[other].keys()
    if mac in before:
        old, new = before[mac], registry[mac]
        assert old["name"] == new["name"] or (kind != "by hand" and (old["name"], new["name"]) == ("", hostname))
        if kind == "reminder":
            assert new | old | {"name": new["name"]} == new


@given(st.lists(EVENT, max_size=30))
@settings(max_examples=500)
def test_invariants_hold_after_any_events_and_a_lease_changes_another_only_by_taking_its_address(update, events):
    registry = {}
    for event in events:
        before = deepcopy(registry)
        message, warnings = apply(update, registry, event)
        check_invariants(update, registry)
        if event[0] == "lease":
            check_lease(before, registry, event)
        assert bool(message) == (registry != before) and "\n" not in message
        again = deepcopy(registry)
        assert apply(update, registry, event)[0] == "" and registry == again


VALUES = st.sampled_from([*ADDRESSES, *NAMES]) | JSON
KNOWN = st.dictionaries(st.sampled_from(["name", *FIELDS]), VALUES, max_size=5)
ENTRY = st.builds(lambda unknown, known: unknown | known, UNKNOWN, KNOWN)
VALID = st.fixed_dictionaries({"name": st.sampled_from(["web", "db-1"]), "ipv4": st.sampled_from(ADDRESSES[:2])})
REGISTRY = st.dictionaries(MACS | st.text(), ENTRY | VALID, max_size=4)


def is_registered(update, text, mac, address, hostname):
    """Tell what the look-up without parsing says of a lease; where it says yes, check that it changes nothing."""
    field, text = update.parse_address(address)[0], text.encode(errors="surrogatepass")
    found = update.is_registered(text, mac, field, address, hostname)
    if found:
        assert update.register(json.loads(text), mac, address, hostname, "add") == ("", [])
    return found


@given(REGISTRY, MACS, st.sampled_from(ADDRESSES[:6]), st.sampled_from(["", *NAMES]))
@example({"10:66:6a:00:00:00": {"ipv4": "10.0.0.1"}}, "10:66:6a:00:00:00", "10.0.0.1", "web")  # named in no layout
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_look_up_says_of_no_registry_that_a_lease_is_in_it_where_it_is_not(update, registry, mac, address, hostname):
    # In every layout that a tool has: on one line, or evenly indented
    for indent, ensure_ascii, end in product((None, 0, 1, 2, 3, 4, "\t"), (True, False), ("", "\n")):
        text = json.dumps(registry, indent=indent, ensure_ascii=ensure_ascii)
        is_registered(update, text + end, mac, address, hostname)


NOTE = st.text() | st.sampled_from(["}", '"}",', "ü", "\n  }"]) | st.lists(st.text(), max_size=2) | st.just({"x": {}})


@given(st.lists(LEASE, min_size=1, max_size=10), st.dictionaries(KEYS, NOTE, max_size=3))
def test_look_up_finds_every_lease_in_what_we_and_jq_and_json_write(update, events, notes):
    registry = {}
    for event in events:
        apply(update, registry, event)
    more = {f"{key}2": note for key, note in notes.items()}
    registry = {mac: notes | instance | more for mac, instance in registry.items()}
    by_json = [json.dumps(registry, indent=2, ensure_ascii=ascii_only) for ascii_only in (True, False)]
    for text in (update.registry_text(registry), *by_json):
        for mac, instance in registry.items():
            for field in set(update.LEASED) & instance.keys():
                assert is_registered(update, text, mac, instance[field], "")


MAC = "10:66:6a:00:00:00"
EDITED = {  # by hand, in the layout that the look-up reads, here without quotes
    "another address behind it": "{\n  MAC: {\n    ipv4: A,\n    ipv4: B\n  }\n}\n",
    "another address behind a note": "{\n  MAC: {\n    ipv4: A,\n    x: },\n    ipv4: B\n  }\n}\n",
    "the instance again": "{\n  MAC: {\n    ipv4: A\n  },\n  MAC: {\n    ipv4: B\n  }\n}\n",
    "the address again": "{\n  MAC: {\n    ipv4: A\n  },\n  x: {\n    ipv4: A\n  }\n}\n",
    "an instance in an instance": "{\n  x: {\n    MAC: {\n      ipv4: A\n    }\n  }\n}\n",
    "an instance in a list": "[\n  {\n    MAC: {\n      ipv4: A\n    }\n  }\n]\n",
    "a note with a MAC address as its key": "{\n  x: {\n    MAC: {\n      y: z\n    },\n    ipv4: A\n  }\n}\n",
    "the address in a note": "{\n  MAC: {\n    x: {\n      ipv4: A\n    }\n  }\n}\n",
    "a MAC address as a note": "{\n  x: {\n    y: MAC,\n    ipv4: A\n  }\n}\n",
}


@pytest.mark.parametrize("text", EDITED.values(), ids=EDITED.keys())
def test_look_up_does_not_find_a_lease_in_an_edited_registry_that_has_it_not(update, text):
    words = {"MAC": MAC, "A": "10.0.0.1", "B": "10.0.0.2"}
    text = re.sub(r"\w+", lambda word: json.dumps(words.get(word[0], word[0])), text).replace(": },", ': "}",')
    assert json.loads(text)
    assert not update.is_registered(text.encode(), MAC, "ipv4", "10.0.0.1", "")


@given(REGISTRY | JSON)
@example({f"{MAC[:-1]}{n}": {"name": "web", "ipv4": "10.0.0.1", "ipv6_lla": "fe80::1"} for n in (1, 2)})
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_refused_or_makes_outputs_that_parse_and_say_what_it_says(process, registry):
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "instances"
        base.with_suffix(".json").write_text(json.dumps(registry))
        base.with_suffix(".updated").touch()
        result = run_script(PROCESS, base=base, INSTANCES_ADDRESS_SETS="web")
        assert "Traceback" not in result.stderr
        if not (isinstance(registry, dict) and all(isinstance(i, dict) for i in registry.values())):
            assert result.returncode == 1 and result.stderr.count("\n") == 1
            assert sorted(os.listdir(folder)) == ["instances.json", "instances.lock", "instances.updated"]
            return
        assert result.returncode == 0
        hosts, chains, sets = outputs(base).values()
        known = [(mac, field, instance.get(field)) for mac, instance in registry.items() for field in FIELDS]
        valid = [row for row in known if process.is_mac(row[0]) and is_kind(process, *row[1:])]
        ours4 = [(a, mac) for mac, field, a in valid if field == "ipv4"]
        ours6 = [(ipaddress.ip_address(a).packed.hex(), mac) for mac, field, a in valid if field != "ipv4"]
        listed = sets_of(sets) | sets_of(chains.partition("chain")[0])
        found = {name: sorted(e.partition(" comment ")[0] for e in elements) for name, elements in listed.items()}
        assert found["all_v4.instance"] == sorted(a for a, _ in ours4)
        assert found["all_l6.instance"] == sorted(a for _, field, a in valid if field == "ipv6_lla")
        assert found["instances_ip"] == sorted(f"{a} . {mac}" for a, mac in ours4)
        assert found["instances_ip6"] == sorted(f"0x{a} . {mac}" for a, mac in ours6)
        line = re.compile(r"[0-9a-f.:]+( [A-Za-z][A-Za-z0-9-]*(\.(v4|v6|g6|u6|l6))?\.instance\.internal)+")
        assert all(line.fullmatch(text) for text in hosts.splitlines())
        check_nft(base)


def is_kind(process, field, value):
    try:
        return process.parse_address(value)[:2] == (field, value)
    except ValueError:
        return False


WORDS = [b"add", b"old", b"10:66:6a:00:00:01", b"10.0.0.1", b"fd00::1", b"web", b"x" * 100_000, b"\x1b[2J\r\n", b"%s%n"]
OCTETS = st.binary(max_size=40).map(lambda octets: octets.replace(b"\0", b""))
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20).map(str.encode)
ARGUMENT = OCTETS | st.sampled_from(WORDS) | TEXT
VARIABLES = dict.fromkeys([b"DNSMASQ_MAC", b"DNSMASQ_SUPPLIED_HOSTNAME", b"DNSMASQ_TAGS"], ARGUMENT)


@given(
    st.sampled_from([b"add", b"old"]) | ARGUMENT,
    st.lists(ARGUMENT, max_size=5),
    st.fixed_dictionaries({}, optional=VARIABLES),
)
@example(b"add", [b"10:66:6a:00:00:01", b"10.0.0.1", b"a\ninstances-update.py: 10:66:6a:00:00:02 x: removed"], {})
@example(b"add", [b"10:66:6a:00:00:01\n", b"10.0.0.1", b"web"], {})
@example(b"add", [b"x", b"fd00::1\x00"[:7], b"\xff\xfe"], {b"DNSMASQ_MAC": b"10:66:6a:00:00:01"})
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_hostile_arguments_make_no_traceback_no_second_line_and_no_invalid_change(update, action, arguments, variables):
    assume(action not in (b"--help", b"-h", b"help"))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "instances"
        base.with_suffix(".json").write_text('{"10:66:6a:00:00:09": {"name": "kept", "ipv4": "10.0.0.9"}}')
        env = {key.encode(): value.encode() for key, value in environment(base).items()} | variables
        command = [sys.executable.encode(), bytes(UPDATE), action, *arguments]
        result = subprocess.run(command, env=env, capture_output=True)
        assert result.returncode in (0, 1, 2) and b"Traceback" not in result.stderr
        if result.returncode != 2:
            for stream in (result.stdout, result.stderr):
                assert all(32 <= byte < 127 or byte == 10 for byte in stream)
                assert all(line.startswith(b"instances-update.py: ") for line in stream.splitlines())
            assert result.stdout.count(b"\n") <= 1 and result.stderr.count(b"\n") <= 2
        registry = json.loads(base.with_suffix(".json").read_text())
        check_invariants(update, registry)
        assert registry["10:66:6a:00:00:09"]["name"] == "kept" and len(registry) <= 2


@pytest.mark.parametrize("variable", ["INSTANCES_BASE_PATH", "INSTANCES_BASE_ID"])
@given(value=ARGUMENT.filter(lambda value: len(value) < 1000))
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_hostile_paths_are_one_line(variable, value, tmp_path):
    assume(not (variable == "INSTANCES_BASE_PATH" and (value == b"" or b"/" in value)))
    env = {b"PATH": b"/usr/bin:/bin", b"INSTANCES_BASE_PATH": bytes(tmp_path / "x"), variable.encode(): value}
    command = [sys.executable.encode(), bytes(UPDATE), b"add", b"10:66:6a:00:00:01", b"10.0.0.1"]
    result = subprocess.run(command, env=env, capture_output=True, cwd=tmp_path)
    assert result.returncode in (0, 1) and result.stderr.count(b"\n") <= 1 and b"Traceback" not in result.stderr
