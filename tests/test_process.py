"""instances-process.py: what it makes of a registry."""

import json
import os
from types import SimpleNamespace

import pytest
from conftest import check_nft
from lab import PROCESS, run_script

MAC, OTHER = "10:66:6a:4c:a1:11", "10:66:6a:4c:a1:12"
WEB = {"name": "Web", "ipv4": "10.0.0.1", "ipv6_gua": "2001:67c::1", "ipv6_ula": "fd00::1", "ipv6_lla": "fe80::1"}
OUTPUTS = (".hosts", ".nftables_chains", ".nftables_sets")


def run(base, *arguments, **variables):
    return run_script(PROCESS, *arguments, base=base, **variables)


def prepare(base, registry):
    base.with_suffix(".json").write_text(registry if isinstance(registry, str) else json.dumps(registry))
    base.with_suffix(".updated").touch()


def outputs(base):
    return {suffix: base.with_suffix(suffix).read_text() for suffix in OUTPUTS if base.with_suffix(suffix).exists()}


def sets_of(text):
    """Return {name: elements} of a text of sets."""
    parts = text.split("set ")[1:]
    elements = (part.partition("elements = {")[2].partition("}")[0] for part in parts)
    return {part.split()[0]: [e.strip() for e in body.split(",") if e.strip()] for part, body in zip(parts, elements)}


def make(base, registry, **variables):
    """Run the script on a registry; return what it says and what it makes: hosts, and {name: elements} of both sets."""
    prepare(base, registry)
    result = run(base, **variables)
    assert (result.returncode, result.stdout) == (0, "")
    check_nft(base)
    hosts, chains, sets = outputs(base).values()
    chains, sets = sets_of(chains.partition("chain")[0]), sets_of(sets)
    return SimpleNamespace(told=result.stderr, hosts=hosts, chains=chains, sets=sets)


def refused(base, *arguments, **variables):
    """Run the script, which changes nothing and says in one line what is wrong; return the line."""
    before, marked = outputs(base), base.with_suffix(".updated").exists()
    result = run(base, *arguments, **variables)
    assert (result.returncode, result.stdout, outputs(base)) == (1, "", before)
    assert result.stderr.count("\n") == 1 and base.with_suffix(".updated").exists() == marked
    return result.stderr


@pytest.mark.parametrize("option", [[], ["-f"], ["--force"]])
def test_marker_or_force_is_needed_a_marker_is_taken_away_and_one_line_sums_up(base, option):
    result = run(base, *option)  # without a registry, which counts as an empty one
    if option:
        assert result.returncode == 0 and outputs(base)[".hosts"] == ""
        check_nft(base)
    else:
        assert (result.returncode, result.stdout, result.stderr, outputs(base)) == (10, "", "", {})
    prepare(base, {MAC: WEB, OTHER: {"ipv4": "10.0.0.2"}})
    result = run(base, *option)
    assert (result.returncode, result.stdout) == (0, "")
    summary = "2 instances, 4 host addresses, 5 set elements, 10 address sets"
    assert result.stderr == f"instances-process.py: {summary}\n"
    assert run(base).returncode == 10


def test_each_kind_of_address_is_found_by_its_names_and_in_its_sets(base):
    made = make(base, {MAC: WEB}, INSTANCES_ADDRESS_SETS="web")
    ipv4, gua, ula, lla = (WEB[field] for field in ("ipv4", "ipv6_gua", "ipv6_ula", "ipv6_lla"))
    kinds = {"": [ipv4, gua, ula], "v4": [ipv4], "v6": [gua, ula], "g6": [gua], "u6": [ula], "l6": [lla]}
    lines = [line.split() for line in made.hosts.splitlines()]
    for kind, addresses in kinds.items():
        name = f"Web.{kind}.instance.internal".replace("..", ".")
        assert [address for address, *names in lines if name in names] == addresses
        if kind:
            assert made.sets[f"all_{kind}.instance"] == made.sets[f"web.{kind}.instance"] == addresses
    assert len(made.sets) == 2 * (len(kinds) - 1)


@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_marker_that_is_a_link_is_taken_away_and_truncates_nothing(base, target):
    (base.parent / "victim").write_text("precious")
    base.with_suffix(".updated").symlink_to(target)
    assert run(base).returncode == 0 and not os.path.lexists(base.with_suffix(".updated"))
    assert (base.parent / "victim").read_text() == "precious"


def test_registry_that_is_broken_or_a_directory_leaves_outputs_and_marker(base):
    make(base, {MAC: {"name": "web", "ipv4": "10.0.0.1"}})
    for text in ("[]", "null", '{"x": 1}', "", '{"a": {"name"', "[" * 100000):
        prepare(base, text)
        assert f"{base}.json" in refused(base)
    base.with_suffix(".json").unlink()
    base.with_suffix(".json").mkdir()
    assert f"{base}.json" in refused(base)


@pytest.mark.parametrize("arguments", [("-x",), ("-f", "-f"), ("web",), ("--forc",)])
def test_wrong_usage_exits_2(base, arguments):
    result = run(base, *arguments)
    assert (result.returncode, result.stdout) == (2, "") and ": no such usage: " in result.stderr


BAD = {
    "INSTANCES_BASE_ID": ["../x"],
    "INSTANCES_GUARD": ["off"],
    "INSTANCES_SLAAC": ["fe80::/64", "2001:db8::/64", "fd83::/80", "fd83::1/64", "10.0.0.0/24", "fd83::/64,x"],
}


@pytest.mark.parametrize("variable", BAD)
def test_bad_variable_is_an_error_that_names_it_and_its_value(base, variable):
    make(base, {})
    prepare(base, {MAC: WEB})
    for value in BAD[variable]:
        told = refused(base, "-f", **{variable: value})
        assert variable in told and f"{value.rpartition(',')[2]}: " in told


def test_listed_names_with_hyphens_and_in_any_case_are_filled_and_bad_ones_left_out(base):
    registry = {MAC: {"name": "build-runner", "ipv4": "10.0.0.1"}, OTHER: {"name": "Web", "ipv4": "10.0.0.2"}}
    made = make(base, registry, INSTANCES_ADDRESS_SETS="x y,build-runner, WEB,3cx,WEB,}")
    assert made.told.count("warning: INSTANCES_ADDRESS_SETS") == 3
    sets = {name.removesuffix(".v4.instance"): elements for name, elements in made.sets.items() if ".v4" in name}
    assert sets == {"build_runner": ["10.0.0.1"], "WEB": ["10.0.0.2"]}


# The last has 187 characters: with the longest name and .v4 before it, a name's 253
VALID = [
    ".internal",
    ".vm.LOCAL",
    ".local",
    ".local.example.org",
    ".a1.3-b.x",
    ".3.ok",
    "." + "a" * 63,
    ".a" * 93 + "b",
]
INVALID = ["." + "a" * 64, ".ä.example", ".example.ä", ".a_b", ".a b", ".", "", ".a.", "..a", ".-a", ".a-", ".a" * 94]


def test_domains_are_taken_each_once_or_left_out_with_a_warning(base):
    name, domains = "w" * 63, ",".join(["internal", *VALID, *INVALID, *INVALID])
    made = make(base, {MAC: {"name": name, "ipv4": "10.0.0.1"}}, INSTANCES_HOSTS_DOMAIN=domains)
    assert made.told.count("multicast DNS") == 2
    for domain in INVALID:
        assert f"warning: INSTANCES_HOSTS_DOMAIN: '{ascii(domain)[1:-1]}' is left out" in made.told
    assert made.told.count("warning: INSTANCES_HOSTS_DOMAIN") == len(INVALID) + 2
    assert made.hosts == "".join(f"10.0.0.1 {name}{domain} {name}.v4{domain}\n" for domain in VALID)


def test_empty_lists_take_their_defaults(base):
    empty = dict.fromkeys(["INSTANCES_ADDRESS_SETS", "INSTANCES_HOSTS_DOMAIN", "INSTANCES_BASE_ID"], "")
    made = make(base, {MAC: {"name": "host", "ipv4": "10.0.0.1"}}, **empty)
    assert made.hosts == "10.0.0.1 host.instance.internal host.v4.instance.internal\n"
    assert made.sets["host.v4.instance"] == ["10.0.0.1"]


LINK_LOCAL = "0xfe80000000000000"
HOSTILE = 'x" }\n}\ninclude "/etc/passwd"\nadd rule # {'
NOT_ALLOWED = ["10.0.0.1/8", "0.0.0.0/0", "fe80::1", "fd00::1%x", "224.0.0.1", 5, None, {}, ["10.0.0.2"], HOSTILE, ""]
INVALID_FIELDS = {
    "name": [HOSTILE, ["web"], None],
    "ipv6_ula": [HOSTILE, "2001:67c::1", "FD00::1", 5, ["fd00::1"], ""],
    "ipv6_gua": ["2001:db8::1"],
    "ipv6_lla": ["10.0.0.1"],
    "allowed": [*([item] for item in NOT_ALLOWED), "10.0.0.1/8", 5, None, {}],
    "MAC": [HOSTILE, MAC.upper()],
}


@pytest.mark.parametrize("field", INVALID_FIELDS)
def test_invalid_entry_is_left_out_with_a_warning_and_reaches_no_output(base, field):
    for value in INVALID_FIELDS[field]:
        valid = {"name": "", "ipv4": "10.0.0.1"}
        other = {"name": "web", "ipv4": "10.0.0.2"}
        registry = {MAC: valid, value: other} if field == "MAC" else {MAC: valid | {field: value}}
        made = make(base, registry)
        warning = made.told.splitlines()[0]
        assert made.told.count("\n") == 2 and "warning" in warning and field in warning
        assert made.hosts == "" and "include" not in "".join(outputs(base).values())
        sets = {name: elements for name, elements in (made.sets | made.chains).items() if elements}
        assert sets == {
            "all_v4.instance": ["10.0.0.1"],
            "instances_ip": [f"10.0.0.1 . {MAC}"],
            "instances_taken": ["0x00000000", "0x0a000001"],
            "instances_macs": [MAC],
            "instances_prefixes": [LINK_LOCAL],
        }


def test_allowed_addresses_and_networks_are_elements_of_the_chains_sets_only(base):
    allowed = ["10.0.0.50", "10.0.0.1", "10.9.0.0/24", "10.9.0.128/25", "2001:67c::50", "x", "2001:67c:9::/64"]
    registry = {MAC: {"name": "web", "ipv4": "10.0.0.1", "allowed": allowed}, OTHER: {"name": "", "allowed": allowed}}
    made = make(base, registry)
    assert made.told.count("warning: ") == 2  # of x
    chains, both = made.chains, (f'{MAC} comment "web"', OTHER)
    assert sorted(chains["instances_ip"]) == sorted(f"{a} . {m}" for a in ("10.0.0.1", "10.0.0.50") for m in both)
    assert chains["instances_ip6"] == [f"0x2001067c{0x50:024x} . {m}" for m in both]
    assert chains["instances_net"] == [f"10.9.0.0/24 . {m}" for m in both]
    assert chains["instances_taken"] == ["0x00000000", "0x0a000001", "0x0a000032"]
    assert chains["instances_taken6"] == [f"0x2001067c{0x50:024x}"] and chains["instances_macs"] == [MAC, OTHER]
    assert chains["instances_net6"] == [f"2001:67c:9::/64 . {m}" for m in both]
    assert "10.0.0.50" not in made.hosts + outputs(base)[".nftables_sets"]


def test_link_local_address_not_made_from_a_mac_address_is_taken_and_the_prefixes_for_slaac_are_elements(base):
    ours = {MAC: "fe80::8099:e2ff:5d8a:32", OTHER: "fe80::1266:6aff:fe4c:a112"}
    registry = {mac: {"name": "", "ipv6_lla": address} for mac, address in ours.items()}
    chains = make(base, registry, INSTANCES_SLAAC=" 2001:67c:83:1::/64,fd83:5eed:0:1::/64, ").chains
    assert chains["instances_taken6"] == ["0xfe800000000000008099e2ff5d8a0032"]
    assert chains["instances_prefixes"] == [LINK_LOCAL, "0x2001067c00830001", "0xfd835eed00000001"]


def test_guard_that_observes_lets_pass(base):
    for word, verdict in (("observe", "accept"), ("enforce", "drop"), ("", "drop")):
        make(base, {}, INSTANCES_GUARD=word)
        assert f"chain instances_verdict {{\n    {verdict}\n}}\n" in outputs(base)[".nftables_chains"]
