"""What holds of the files themselves."""

import os
import re
import subprocess
import sys

import pytest
from lab import EXAMPLES, PROCESS, TOP, UPDATE

PROGRAMS = [UPDATE, PROCESS, EXAMPLES / "demo.py"]
PROGRAMS += [path for path in EXAMPLES.glob("*/*") if path.is_file() and path.read_bytes()[:2] == b"#!"]
# libvirt runs the first, and it never fails; others load the other two
OTHERS = {"qemu", "instances-etcd.py", "instances-check"}


def test_shared_block_is_the_same_in_both_scripts_which_the_python3_on_the_path_runs():
    texts = [path.read_text() for path in (UPDATE, PROCESS)]
    assert all(text.startswith("#!/usr/bin/env python3\n") for text in texts)
    blocks = [re.search("^# ---- Shared.*^# ---- End", text, re.MULTILINE | re.DOTALL)[0] for text in texts]
    assert blocks[0] == blocks[1] and blocks[0].count("\n") > 50


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.name not in OTHERS], ids=lambda program: program.name)
def test_programs_have_help_and_a_version_and_say_first_what_is_wrong(program):
    version = re.match(r"instances \((.*)\)", (EXAMPLES / "debian" / "debian" / "changelog").read_text())[1]
    path = f"{TOP}:{EXAMPLES}/systemd:{EXAMPLES}/network:{EXAMPLES}/show:{os.environ['PATH']}"
    said = {}
    for word in ("--help", "-h", "--version", "--no-such"):
        command = [program] if program.suffix == ".sh" or program.name == "vmbridge" else [sys.executable, program]
        result = subprocess.run([*command, word], capture_output=True, text=True, env=os.environ | {"PATH": path})
        said[word] = result.returncode, result.stdout, result.stderr
    assert os.access(program, os.X_OK)
    assert said["--version"] == (0, f"{program.name}: {version}\n", "")
    assert said["--help"] == said["-h"] and said["--help"][::2] == (0, "") and said["--help"][1].startswith("usage: ")
    assert said["--no-such"][:2] == (2, "")
    assert re.fullmatch(f"{program.name}: error: --no-such.*\n", said["--no-such"][2])


def test_top_level_holds_nothing_else():
    names = {path.name for path in TOP.iterdir() if not path.name.startswith(".") and path.suffix != ".deb"}
    assert names == {UPDATE.name, PROCESS.name, "README.md", "LICENSE", "tests", "examples"}


@pytest.mark.parametrize("rules", ["nftables/bridge.nft", "network/network.nft"])
def test_rule_file_declares_and_empties_each_set_that_the_registry_fills(rules):
    generated, text = (EXAMPLES / "output" / "instances.nftables_chains").read_text(), (EXAMPLES / rules).read_text()
    declaration = r"(?m)^set (\w+) {\n    (typeof .*)\n(    flags interval\n)?(?:    elements|})"
    declared = re.findall(declaration, generated)
    assert len(declared) == 8
    assert re.findall(r"^flush set bridge instances (\w+)$", text, re.MULTILINE) == [name for name, *_ in declared]
    for name, key, interval in declared:
        flags = " flags interval;" if interval else ""
        assert f"    set {name} {{ {key};{flags} }}\n" in text


def test_functions_that_matter_most_are_where_the_page_says():
    page, file = (TOP / "tests" / "README.md").read_text(), None
    functions = re.findall(r"^\| (\S*) *\| `(\w+)` \|", page, re.MULTILINE)
    paths = {path.name: path for path in (UPDATE, PROCESS, EXAMPLES / "systemd" / "instances-apply")}
    for name, function in functions:
        file = paths[name] if name else file
        assert f"def {function}(" in file.read_text(), function
    assert len(functions) == 10
