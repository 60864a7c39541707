"""What holds for any sequence of events, any registry and any argument."""

import ipaddress
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import check_nft
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from lab import PROCESS, UPDATE, environment

FIELDS = ("ipv4", "ipv6_gua", "ipv6_ula", "ipv6_lla")
MACS = st.sampled_from([f"10:66:6a:00:00:0{n}" for n in range(4)])
# Few values, so that they meet; each kind of address, valid names in both cases, and what is neither
ADDRESSES = [
    "10.0.0.1",
    "10.0.0.2",
    "2001:67c::1",
    "2001:67c::2",
    "fd00::1",
    "fd00::2",
    "fe80::1",
    "2001:db8::1",
]
NAMES = ["web", "WEB", "db", "build-runner"]
BAD_NAMES = ["", "3cx", "my_host", "-x", "x-", "a" * 64, 'a"', "a\n", "ä", "host.example"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([*ADDRESSES, *NAMES, "}{"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | MACS | st.sampled_from(FIELDS), inner, max_size=3)
    ),
    max_leaves=6,
)
UNKNOWN = st.dictionaries(st.text(min_size=1).filter(lambda key: key not in ("name", *FIELDS)), JSON, max_size=2)
KINDS = st.sampled_from(["add", "old", "reminder"])
LEASE = st.tuples(st.just("lease"), MACS, st.sampled_from(ADDRESSES), st.sampled_from(NAMES + BAD_NAMES), KINDS)
RENAME = st.tuples(st.just("rename"), MACS, st.sampled_from(NAMES))
REMOVE = st.tuples(st.just("remove"), MACS)
INITIALIZE = st.tuples(
    st.just("initialize"),
    MACS,
    st.fixed_dictionaries(
        {"name": st.sampled_from(NAMES), "ipv6_lla": st.just("fe80::83")},
        optional={
            "ipv4": st.just("10.0.0.1"),
            "ipv6_gua": st.just("2001:67c::1"),
            "ipv6_ula": st.just("fd00::1"),
        },
    ),
)
EVENT = LEASE | RENAME | REMOVE | INITIALIZE


def apply(update, registry, event):
    """Do an event to a registry; return what the script would print."""
    kind, mac, *rest = event
    if kind == "lease":
        return update.register(registry, mac, *rest)
    if kind == "initialize":
        return update.initialize(registry, mac, *rest)
    return update.edit(registry, mac, *(rest or [None]))


def copy(registry):
    return json.loads(json.dumps(registry))


def check_invariants(update, registry):
    for mac, instance in registry.items():
        assert update.is_mac(mac) and (instance["name"] == "" or update.is_name(instance["name"]))
        for field in FIELDS:
            if field in instance:
                assert update.parse_address(instance[field])[:2] == (field, instance[field])
    for field in ("name", "ipv4", "ipv6_gua", "ipv6_ula"):
        values = [i[field].lower() for i in registry.values() if i.get(field)]
        assert len(values) == len(set(values))


@given(st.lists(EVENT, max_size=30))
def test_invariants_hold_after_any_events(update, events):
    registry = {}
    for event in events:
        before = copy(registry)
        message, warnings = apply(update, registry, event)
        check_invariants(update, registry)
        assert bool(message) == (registry != before)
        assert "\n" not in message
        again = copy(registry)
        assert apply(update, registry, event)[0] == "" and registry == again


@given(st.lists(EVENT, max_size=20), LEASE)
def test_lease_changes_another_instance_only_by_taking_its_address(update, events, lease):
    registry = {}
    for event in events:
        apply(update, registry, event)
    before = copy(registry)
    apply(update, registry, lease)
    for mac in before.keys() - {lease[1]}:
        taken = {field: value for field, value in before[mac].items() if registry[mac].get(field) != value}
        assert (
            list(taken.values()) in ([], [lease[2]] if lease[4] == "add" else [])
            and registry[mac].keys() <= before[mac].keys()
        )
    if lease[1] in before:
        assert registry[lease[1]]["name"] == before[lease[1]]["name"]
        if lease[4] == "reminder":
            assert before[lease[1]].items() <= registry[lease[1]].items()


@given(st.dictionaries(MACS, UNKNOWN), st.lists(LEASE | RENAME | INITIALIZE, max_size=10))
def test_unknown_fields_survive_any_events_and_rewrites(update, unknown, events):
    registry = {mac: {"name": "", **fields} for mac, fields in unknown.items()}
    for event in events:
        apply(update, registry, event)
        registry = json.loads(update.registry_text(registry))
    for mac, fields in unknown.items():
        assert json.dumps({key: registry[mac][key] for key in fields}) == json.dumps(fields)


ENTRY = st.dictionaries(
    st.sampled_from(["name", *FIELDS]), st.sampled_from([*ADDRESSES, *NAMES]) | JSON, max_size=5
).flatmap(lambda entry: UNKNOWN.map(lambda unknown: {**unknown, **entry}))
REGISTRY = st.dictionaries(MACS | st.text(), ENTRY, max_size=4)


@st.composite
def written(draw, registry):
    """Return a registry as JSON in some form: ours, indented, or with white space where JSON allows it."""
    separators = draw(st.sampled_from([(", ", ": "), (",", ":"), (",\n", ": "), (" ,\n", ":\n")]))
    indent = draw(st.sampled_from([None, 0, 1, 2]))
    text = json.dumps(registry, separators=separators, indent=indent, ensure_ascii=draw(st.booleans()))
    for old in draw(st.lists(st.sampled_from(["{", "}", "},", '": {', "}, ", '": ']), max_size=3)):
        outside_strings = r'("(?:\\.|[^"\\])*")|' + re.escape(old.strip('"')[:1] if old.startswith('"') else old)
        new = draw(st.sampled_from([old, f"{old}\n", f"\n{old}", f" {old} "])) if not old.startswith('"') else None
        if new:
            text = re.sub(outside_strings, lambda m, new=new: m[1] or new, text)
    return draw(st.sampled_from([text, text + "\n", "{\n" + text[1:] + "\n"]))


def lookup_agrees(update, text, mac, address):
    """The way without the lock says that a lease is registered only where the way with it changes nothing."""
    field, address, _ = update.parse_address(address)
    assume(field in update.LEASED)
    try:
        registry = json.loads(text)
    except ValueError:
        assume(False)
    found = update.is_registered(text.encode(errors="surrogatepass"), mac, field, address)
    if found:
        assert mac in registry and update.register(registry, mac, address, "", "add") == ("", [])
    return found


REGISTERED = ("10:66:6a:00:00:00", "10.0.0.1")  # for M and A in the examples


@given(REGISTRY.flatmap(written), MACS, st.sampled_from(ADDRESSES))
@example('{\n"10:66:6a:00:00:00": {"ipv4": "10.0.0.1", "ipv4": "10.0.0.2"}\n}\n', "10:66:6a:00:00:00", "10.0.0.1")
@example('{\n"a": {"x": {},\n"10:66:6a:00:00:00": {"ipv4": "10.0.0.1"}\n}\n}\n', "10:66:6a:00:00:00", "10.0.0.1")
@example(
    '{\n"a": {"}": "}", "x":\n{\n"10:66:6a:00:00:00": {"ipv4": "10.0.0.1"}}\n}\n}\n',
    "10:66:6a:00:00:00",
    "10.0.0.1",
)
@example("""{\nM: {"ipv4": A, "ipv4": "10.0.0.2"}}\n""", *REGISTERED)
@example("""{\n"a": {"x": {},\nM: {"ipv4": A}}}\n""", *REGISTERED)
@example("""{\n"a": {"}": "},", "x":\n{\nM: {"ipv4": A}}}}\n""", *REGISTERED)
@example("""{\nM: {"x": {"ipv4": A},\n"y": 1}}\n""", *REGISTERED)
@example("""{\n"a": "10:66:6a:00:00:00",\n"b": {"ipv4": A}}\n""", *REGISTERED)
@example("""{\n"a": {"x": {},\nM: {"ipv4": A},\n"y": {}}}\n""", *REGISTERED)
@example("""{\nM: {"x": {"y": 1}, "ipv4": A}}\n""", *REGISTERED)
@example("""{\nM: {"ipv4": A, "x": "}",\n"ipv4": "10.0.0.2"}}\n""", *REGISTERED)
@example("""{\nM: {"ipv4": A},\n"a": {"ipv4": A}}\n""", *REGISTERED)
@example("""{\nM: {"ipv4": A},\n"a": {"ipv4": "10.0\\u002e0.1"}}\n""", *REGISTERED)
@example("""{\nM: {"ipv4": A},\nM: {"ipv4": "10.0.0.2"}}\n""", *REGISTERED)
@example("""{\n"10\\u003a66:6a:00:00:00": {},\nM: {"ipv4": A}}\n""", *REGISTERED)
@example("""[{\nM: {"ipv4": A}}\n]""", *REGISTERED)
@example("""[{\nM: {"ipv4": A}},\n{"x": {}}]\n""", *REGISTERED)
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_lookup_without_the_lock_agrees_with_the_way_with_it(update, text, mac, address):
    lookup_agrees(update, text.replace("M:", f'"{mac}":').replace("A", f'"{address}"'), mac, address)


@given(st.lists(LEASE, min_size=1, max_size=10))
def test_lookup_without_the_lock_finds_every_lease_of_a_registry_that_we_wrote(update, events):
    registry = {}
    for event in events:
        apply(update, registry, event)
    text = update.registry_text(registry)
    for mac, instance in registry.items():
        for field in update.LEASED:
            if field in instance:
                assert lookup_agrees(update, text, mac, instance[field])


def elements(text, name):
    """Return the elements of a set in one of the outputs, without comments."""
    body = re.search(rf"^set {re.escape(name)} {{\n(.*?)^}}", text, re.DOTALL | re.MULTILINE)[1]
    listed = body.partition("elements = {")[2].partition("}")[0].split(",")
    return sorted(e.split(" comment ")[0].strip() for e in listed if e.strip())


@given(REGISTRY | JSON)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_refused_or_makes_outputs_that_parse_and_say_what_it_says(process, registry):
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "instances"
        base.with_suffix(".json").write_text(json.dumps(registry))
        base.with_suffix(".updated").touch()
        result = subprocess.run([sys.executable, PROCESS], env=environment(base), capture_output=True, text=True)
        assert "Traceback" not in result.stderr
        if not (isinstance(registry, dict) and all(isinstance(i, dict) for i in registry.values())):
            assert result.returncode == 1 and result.stderr.count("\n") == 1
            assert sorted(os.listdir(folder)) == ["instances.json", "instances.lock", "instances.updated"]
            return
        assert result.returncode == 0
        hosts, chains, sets = (
            Path(f"{base}.{end}").read_text() for end in ("hosts", "nftables_chains", "nftables_sets")
        )
        valid = [
            (mac, field, instance[field])
            for mac, instance in registry.items()
            for field in FIELDS
            if process.is_mac(mac) and is_kind(process, field, instance.get(field))
        ]
        assert elements(sets, "all_v4.instance") == sorted(a for _, field, a in valid if field == "ipv4")
        assert elements(sets, "all_l6.instance") == sorted(a for _, field, a in valid if field == "ipv6_lla")
        assert elements(chains, "instances_ip") == sorted(f"{a} . {mac}" for mac, field, a in valid if field == "ipv4")
        assert elements(chains, "instances_ip6") == sorted(
            f"0x{ipaddress.ip_address(a).packed.hex()} . {mac}" for mac, field, a in valid if field != "ipv4"
        )
        line = re.compile(r"[0-9a-f.:]+( [A-Za-z][A-Za-z0-9-]*(\.(v4|v6|g6|u6|l6))?\.instance\.internal)+")
        assert all(line.fullmatch(text) for text in hosts.splitlines())
        check_nft(base)


def is_kind(process, field, value):
    try:
        return process.parse_address(value)[:2] == (field, value)
    except ValueError:
        return False


ARGUMENT = (
    st.binary(max_size=40).map(lambda b: b.replace(b"\0", b""))
    | st.sampled_from(
        [
            b"add",
            b"old",
            b"10:66:6a:00:00:01",
            b"10.0.0.1",
            b"fd00::1",
            b"web",
            b"x" * 100_000,
            b"\x1b[2J\r\n",
            b"%s%n",
        ]
    )
    | st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20).map(str.encode)
)


@given(
    st.sampled_from([b"add", b"old"]) | ARGUMENT,
    st.lists(ARGUMENT, max_size=5),
    st.fixed_dictionaries(
        {},
        optional={
            b"DNSMASQ_MAC": ARGUMENT,
            b"DNSMASQ_SUPPLIED_HOSTNAME": ARGUMENT,
            b"DNSMASQ_TAGS": ARGUMENT,
        },
    ),
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
        result = subprocess.run(
            [sys.executable.encode(), bytes(UPDATE), action, *arguments], env=env, capture_output=True
        )
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
