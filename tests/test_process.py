"""instances-process.py: what it makes of a registry."""

import json
import os

import pytest
from conftest import check_nft, locked_out
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


@pytest.fixture(scope="module", autouse=True)
def held_up(tmp_path_factory):
    """A run with a marker, while somebody holds the lock: begun first, since it takes 10 s."""
    base = tmp_path_factory.mktemp("held") / "instances"
    prepare(base, {MAC: {"name": "web", "ipv4": "10.0.0.1"}})
    with locked_out(base, PROCESS) as future:
        yield base, future


def test_without_marker_nothing_is_done(base):
    base.with_suffix(".json").write_text("{}")
    result = run(base)
    assert (result.returncode, result.stdout, result.stderr, outputs(base)) == (10, "", "", {})


@pytest.mark.parametrize("option", ["-f", "--force"])
def test_force_works_without_a_marker(base, option):
    assert run(base, option).returncode == 0 and len(outputs(base)) == 3


@pytest.mark.parametrize("option", [[], ["-f"], ["--force"]])
def test_marker_is_taken_away_and_one_line_sums_up(base, option):
    prepare(base, {MAC: WEB, OTHER: {"ipv4": "10.0.0.2"}})
    result = run(base, *option)
    assert (result.returncode, result.stdout) == (0, "")
    summary = "2 instances, 4 host addresses, 5 set elements, 10 address sets"
    assert result.stderr == f"instances-process.py: {summary}\n"
    assert run(base).returncode == 10


def test_dangling_link_is_a_marker_too(base):
    prepare(base, {})
    base.with_suffix(".updated").unlink()
    base.with_suffix(".updated").symlink_to("nowhere")
    assert run(base).returncode == 0 and not os.path.lexists(base.with_suffix(".updated"))


def test_marker_that_is_a_link_truncates_nothing(base):
    prepare(base, {})
    base.with_suffix(".updated").unlink()
    (base.parent / "victim").write_text("precious")
    base.with_suffix(".updated").symlink_to("victim")
    assert run(base).returncode == 0 and (base.parent / "victim").read_text() == "precious"


def test_missing_registry_counts_as_empty(base):
    base.with_suffix(".updated").touch()
    assert run(base).returncode == 0 and outputs(base)[".hosts"] == ""
    check_nft(base)


@pytest.mark.parametrize("text", ["[]", "null", '{"x": 1}', "", '{"a": {"name"', pytest.param("[" * 100000, id="deep")])
def test_broken_registry_leaves_outputs_and_marker(base, text):
    prepare(base, {MAC: {"name": "web", "ipv4": "10.0.0.1"}})
    run(base)
    before = outputs(base)
    prepare(base, text)
    result = run(base)
    assert (result.returncode, result.stdout) == (1, "") and result.stderr.count("\n") == 1
    assert f"{base}.json" in result.stderr and outputs(base) == before and base.with_suffix(".updated").exists()


def test_registry_that_is_a_directory_is_an_error(base):
    base.with_suffix(".updated").touch()
    base.with_suffix(".json").mkdir()
    result = run(base)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and base.with_suffix(".updated").exists()


@pytest.mark.parametrize("arguments", [("-x",), ("-f", "-f"), ("web",), ("--forc",)])
def test_wrong_usage_exits_2(base, arguments):
    result = run(base, *arguments)
    assert (result.returncode, result.stdout) == (2, "") and ": no such usage: " in result.stderr


@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_help_is_on_standard_output(base, argument):
    result = run(base, argument)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("usage:")


def test_bad_base_id_is_an_error_and_not_10(base):
    result = run(base, INSTANCES_BASE_ID="../x")
    assert result.returncode == 1 and result.stderr.count("\n") == 1


KINDS = {"v4": ["ipv4"], "v6": ["ipv6_gua", "ipv6_ula"], "g6": ["ipv6_gua"], "u6": ["ipv6_ula"], "l6": ["ipv6_lla"]}


def test_each_name_has_the_addresses_of_its_kind_in_each_domain(base):
    prepare(base, {MAC: WEB, OTHER: {"name": "", "ipv4": "10.0.0.2"}})
    run(base, INSTANCES_HOSTS_DOMAIN=".one,.two.example")
    found = {}
    for line in outputs(base)[".hosts"].splitlines():
        address, *names = line.split()
        for name in names:
            found.setdefault(name, []).append(address)
    subdomains = {"": ["ipv4", "ipv6_gua", "ipv6_ula"], **{f".{kind}": fields for kind, fields in KINDS.items()}}
    assert found == {
        f"Web{subdomain}{domain}": [WEB[field] for field in fields]
        for subdomain, fields in subdomains.items()
        for domain in (".one", ".two.example")
    }


def test_each_set_has_the_addresses_of_its_kind(base):
    prepare(base, {MAC: WEB, OTHER: {"name": "", "ipv4": "10.0.0.2"}})
    run(base, INSTANCES_ADDRESS_SETS="web,ghost")
    text = outputs(base)[".nftables_sets"]
    for kind, fields in KINDS.items():
        web = [WEB[field] for field in fields]
        others = ["10.0.0.2"] if kind == "v4" else []
        for name, elements in (("all_", web + others), ("web.", web), ("ghost.", [])):
            assert sets_of(text)[f"{name}{kind}.instance"] == elements
            declared = text.partition(f"set {name}{kind}.instance {{\n")[2].splitlines()[0]
            assert declared == f"    type {'ipv4' if kind == 'v4' else 'ipv6'}_addr"
    check_nft(base)


def test_listed_name_with_hyphens_in_any_case_is_filled(base):
    prepare(base, {MAC: {"name": "build-runner", "ipv4": "10.0.0.1"}, OTHER: {"name": "Web", "ipv4": "10.0.0.2"}})
    run(base, INSTANCES_ADDRESS_SETS="build-runner, WEB")
    sets = sets_of(outputs(base)[".nftables_sets"])
    assert sets["build_runner.v4.instance"] == ["10.0.0.1"] and sets["WEB.v4.instance"] == ["10.0.0.2"]
    check_nft(base)


def test_bad_set_names_and_domains_are_left_out_with_a_warning(base):
    prepare(base, {MAC: {"name": "web", "ipv4": "10.0.0.1"}})
    names, domains = "x y,web,3cx,web,}", "..a.b,ok.example,.ok.example,.bad..dots,.-x,.x-,." + "a." * 100 + "b,.3.ok"
    result = run(base, INSTANCES_ADDRESS_SETS=names, INSTANCES_HOSTS_DOMAIN=domains)
    assert result.returncode == 0
    assert result.stderr.count("warning: INSTANCES_ADDRESS_SETS") == 3
    assert result.stderr.count("warning: INSTANCES_HOSTS_DOMAIN") == 5
    assert [name for name in sets_of(outputs(base)[".nftables_sets"]) if "v4" in name] == [
        "all_v4.instance",
        "web.v4.instance",
    ]
    assert outputs(base)[".hosts"] == "10.0.0.1 web.ok.example web.v4.ok.example\n10.0.0.1 web.3.ok web.v4.3.ok\n"


@pytest.mark.parametrize(
    ("domain", "valid"),
    [
        (".internal", True),
        (".a1.3-b.x", True),
        ("." + "a" * 63, True),
        ("." + "a" * 64, False),
        (".ä.example", False),
        (".example.ä", False),
        (".a_b", False),
        (".a b", False),
        (".", False),
        (",", False),
        (".a.", False),
        ("..a", False),
        (".-a", False),
        (".a-", False),
        (".a" * 93 + "b", True),  # 187 characters: with the longest name and .v4 before it, a name's 253
        (".a" * 94, False),
    ],
)
def test_domain_is_taken_or_left_out_with_a_warning(base, domain, valid):
    prepare(base, {MAC: {"name": "w" * 63, "ipv4": "10.0.0.1"}})
    result = run(base, INSTANCES_HOSTS_DOMAIN=domain)
    assert result.returncode == 0 and result.stderr.count("warning: INSTANCES_HOSTS_DOMAIN") == (not valid)
    line = f"10.0.0.1 {'w' * 63}{domain} {'w' * 63}.v4{domain}\n"
    assert outputs(base)[".hosts"] == (line if valid else "") and max(map(len, line.split())) <= 253 + 64 * (not valid)


def test_empty_lists_take_their_defaults(base):
    prepare(base, {MAC: {"name": "host", "ipv4": "10.0.0.1"}})
    run(base, INSTANCES_ADDRESS_SETS="", INSTANCES_HOSTS_DOMAIN="", INSTANCES_BASE_ID="")
    assert outputs(base)[".hosts"] == "10.0.0.1 host.instance.internal host.v4.instance.internal\n"
    assert sets_of(outputs(base)[".nftables_sets"])["host.v4.instance"] == ["10.0.0.1"]


LINK_LOCAL = "0xfe80000000000000"
HOSTILE = 'x" }\n}\ninclude "/etc/passwd"\nadd rule # {'


@pytest.mark.parametrize(
    ("registry", "left_out"),
    [
        ({MAC: {"name": HOSTILE, "ipv4": "10.0.0.1"}}, "name"),
        ({MAC: {"name": ["web"], "ipv4": "10.0.0.1"}}, "name"),
        ({MAC: {"name": None, "ipv4": "10.0.0.1"}}, "name"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1", "ipv6_ula": HOSTILE}}, "ipv6_ula"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1", "ipv6_ula": "2001:67c::1"}}, "ipv6_ula"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1", "ipv6_ula": "FD00::1"}}, "ipv6_ula"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1", "ipv6_ula": 5}}, "ipv6_ula"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1", "ipv6_ula": ["fd00::1"]}}, "ipv6_ula"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1", "ipv6_ula": ""}}, "ipv6_ula"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1", "ipv6_gua": "2001:db8::1"}}, "ipv6_gua"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1", "ipv6_lla": "10.0.0.1"}}, "ipv6_lla"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1"}, HOSTILE: {"name": "web", "ipv4": "10.0.0.2"}}, "MAC"),
        ({MAC: {"name": "", "ipv4": "10.0.0.1"}, MAC.upper(): {"name": "web", "ipv4": "10.0.0.2"}}, "MAC"),
    ],
)
def test_invalid_entry_is_left_out_with_a_warning_and_reaches_no_output(base, registry, left_out):
    prepare(base, registry)
    result = run(base)
    lines = result.stderr.splitlines()
    assert result.returncode == 0 and len(lines) == 2 and "warning" in lines[0] and left_out in lines[0]
    texts = outputs(base)
    assert texts[".hosts"] == "" and "include" not in "".join(texts.values())
    sets = sets_of(texts[".nftables_sets"]) | sets_of(texts[".nftables_chains"].partition("chain")[0])
    assert sets.pop("all_v4.instance") == ["10.0.0.1"] and sets.pop("instances_ip") == [f"10.0.0.1 . {MAC}"]
    assert sets.pop("instances_taken") == ["0x00000000", "0x0a000001"] and sets.pop("instances_macs") == [MAC]
    assert sets.pop("instances_prefixes") == [LINK_LOCAL] and not any(sets.values())
    check_nft(base)


def test_same_address_and_name_twice_in_an_edited_registry_still_load(base):
    prepare(base, {mac: {"name": "web", "ipv4": "10.0.0.1", "ipv6_lla": "fe80::1"} for mac in (MAC, OTHER)})
    assert run(base, INSTANCES_ADDRESS_SETS="web").returncode == 0
    check_nft(base)


def test_outputs_keep_mode_owner_and_link(base):
    prepare(base, {})
    (base.parent / "far").touch()
    (base.parent / "far").chmod(0o600)
    base.with_suffix(".hosts").symlink_to("far")
    assert run(base).returncode == 0
    assert base.with_suffix(".hosts").is_symlink() and (base.parent / "far").stat().st_mode & 0o777 == 0o600
    assert not [name for name in os.listdir(base.parent) if name.endswith(".tmp")]


def test_run_waits_ten_seconds_for_the_lock_and_says_which(held_up):
    base, future = held_up
    result, seconds = future.result()
    assert 10 <= seconds < 19
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and f"{base}.lock" in result.stderr
    assert not outputs(base) and base.with_suffix(".updated").exists()


def test_domain_may_leave_its_first_dot_out(base):
    prepare(base, {MAC: {"name": "web", "ipv4": "10.0.0.1"}})
    result = run(base, INSTANCES_HOSTS_DOMAIN="vm.example.org,.vm.example.org")
    assert "warning" not in result.stderr
    assert outputs(base)[".hosts"] == "10.0.0.1 web.vm.example.org web.v4.vm.example.org\n"


@pytest.mark.parametrize(("domain", "warned"), [("vm.LOCAL", True), (".local", True), (".local.example.org", False)])
def test_domain_below_local_is_taken_with_a_warning(base, domain, warned):
    prepare(base, {MAC: {"name": "web", "ipv4": "10.0.0.1"}})
    result = run(base, INSTANCES_HOSTS_DOMAIN=domain)
    assert result.returncode == 0 and ("multicast DNS" in result.stderr) == warned
    assert outputs(base)[".hosts"].startswith(f"10.0.0.1 web.{domain.removeprefix('.')} ")


def test_allowed_addresses_and_networks_are_elements_of_the_chains_sets_only(base):
    allowed = ["10.0.0.50", "10.0.0.1", "10.9.0.0/24", "10.9.0.128/25", "2001:67c::50", "2001:67c:9::/64"]
    prepare(
        base, {MAC: {"name": "web", "ipv4": "10.0.0.1", "allowed": allowed}, OTHER: {"name": "", "allowed": allowed}}
    )
    assert run(base).returncode == 0
    texts = outputs(base)
    sets = sets_of(texts[".nftables_chains"].partition("chain")[0])
    both = (f'{MAC} comment "web"', OTHER)
    assert sorted(sets["instances_ip"]) == sorted(f"{a} . {m}" for a in ("10.0.0.1", "10.0.0.50") for m in both)
    assert sets["instances_ip6"] == [f"0x2001067c{0x50:024x} . {m}" for m in both]
    assert sets["instances_net"] == [f"10.9.0.0/24 . {m}" for m in both]
    assert sets["instances_taken"] == ["0x00000000", "0x0a000001", "0x0a000032"]
    assert sets["instances_taken6"] == [f"0x2001067c{0x50:024x}"] and sets["instances_macs"] == [MAC, OTHER]
    assert sets["instances_net6"] == [f"2001:67c:9::/64 . {m}" for m in both]
    assert "10.0.0.50" not in texts[".hosts"] + texts[".nftables_sets"]
    check_nft(base)


@pytest.mark.parametrize(
    "item", ["10.0.0.1/8", "0.0.0.0/0", "fe80::1", "fd00::1%x", "224.0.0.1", 5, None, {}, ["10.0.0.1"], 'x" }\n}', ""]
)
def test_invalid_allowed_entry_is_left_out_with_a_warning(base, item):
    prepare(base, {MAC: {"name": "", "allowed": [item, "10.0.0.2"]}, OTHER: {"name": "", "allowed": item}})
    result = run(base)
    assert result.returncode == 0 and result.stderr.count(f"warning: {MAC}: allowed ") == 1
    assert result.stderr.count("warning: ") == (1 if item == ["10.0.0.1"] else 2)
    sets = sets_of(outputs(base)[".nftables_chains"].partition("chain")[0])
    others = [f"10.0.0.1 . {OTHER}"] if item == ["10.0.0.1"] else []
    assert sets.pop("instances_ip") == [f"10.0.0.2 . {MAC}", *others] and sets.pop("instances_macs") == [MAC, OTHER]
    assert sets.pop("instances_taken") == ["0x00000000", "0x0a000002", *["0x0a000001"] * len(others)]
    assert sets.pop("instances_prefixes") == [LINK_LOCAL] and not any(sets.values())
    check_nft(base)


def test_link_local_address_that_is_not_made_from_a_mac_address_is_taken(base):
    prepare(
        base,
        {
            MAC: {"name": "", "ipv6_lla": "fe80::8099:e2ff:5d8a:32"},
            OTHER: {"name": "", "ipv6_lla": "fe80::1266:6aff:fe4c:a112"},
        },
    )
    run(base)
    sets = sets_of(outputs(base)[".nftables_chains"].partition("chain")[0])
    assert sets["instances_taken6"] == ["0xfe800000000000008099e2ff5d8a0032"]


def test_prefixes_in_which_guests_make_addresses_are_elements_beside_the_link_local_one(base):
    prepare(base, {})
    assert run(base, INSTANCES_SLAAC=" 2001:67c:83:1::/64,fd83:5eed:0:1::/64, ").returncode == 0
    sets = sets_of(outputs(base)[".nftables_chains"].partition("chain")[0])
    assert sets["instances_prefixes"] == [LINK_LOCAL, "0x2001067c00830001", "0xfd835eed00000001"]
    check_nft(base)


@pytest.mark.parametrize(
    "prefix", ["fe80::/64", "2001:db8::/64", "2001:67c:83::/80", "2001:67c:83::1/64", "10.0.0.0/24", "fd00::", "x"]
)
def test_prefix_in_which_guests_cannot_make_addresses_is_an_error(base, prefix):
    prepare(base, {})
    result = run(base, INSTANCES_SLAAC=f"2001:67c:84::/64,{prefix}")
    assert (result.returncode, result.stdout) == (1, "") and result.stderr.count("\n") == 1
    assert f"INSTANCES_SLAAC: {prefix}: " in result.stderr and base.with_suffix(".updated").exists()


def test_guard_that_observes_lets_pass_and_any_other_word_is_an_error(base):
    prepare(base, {})
    for word, verdict in (("observe", "accept"), ("enforce", "drop"), ("", "drop")):
        assert run(base, "-f", INSTANCES_GUARD=word).returncode == 0
        assert f"chain instances_verdict {{\n    {verdict}\n}}\n" in outputs(base)[".nftables_chains"]
    before = outputs(base)
    result = run(base, "-f", INSTANCES_GUARD="off")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "INSTANCES_GUARD=off" in result.stderr
    assert outputs(base) == before
