"""The Debian package: its contents, its pages, and its life in an overlay of this machine."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import need
from lab import APPLY, EDIT, EXAMPLES, PROCESS, TOP, UPDATE, block, bound, environment, run

FOLDER = EXAMPLES / "debian"
DEBIAN = FOLDER / "debian"
DOCUMENTS = "root/usr/share/doc/instances"  # in the folder of what was built
PROGRAMS = (UPDATE, PROCESS, APPLY, EDIT, EXAMPLES / "show" / "instances-show")
UNITS = [EXAMPLES / "systemd" / f"instances{end}" for end in (".path", "@.path", ".service", ".timer")]
pytestmark = pytest.mark.slow
VARIABLE = re.compile(r"\b(?:INSTANCES|DNSMASQ)_[A-Z_]+\b")
DEFAULTS = re.findall(r"^\| `(INSTANCES_\w+)` \| .* \| `?(.*?)`? \|$", (TOP / "README.md").read_text(), re.MULTILINE)


def indented(text: str) -> str:
    """Return the lines of a text that are indented by two spaces."""
    return "".join(re.findall("^  (.*\n)", text, re.MULTILINE))


def links(text: str) -> list[str]:
    """Return the links of a page to files."""
    return re.findall(r"\]\((?!https?:|#)([^)#]+)", text)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with all that build.sh made, and in `root` the contents of the package."""
    need("dh", "dpkg-buildpackage")
    folder, here = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("here")
    keep = folder / "keep"
    keep.write_text(f'#!/bin/sh\ncp "${{1%/*}}"/instances_* {folder}\n')
    keep.chmod(0o755)
    (here / "instances_0.1_all.deb").touch()  # of a former build
    run(FOLDER / "build.sh", cwd=here, env=os.environ | {"DEB_CHECK_COMMAND": str(keep), "TMPDIR": str(folder)})
    (package,) = here.iterdir()  # and nothing else is here
    run("dpkg-deb", "-x", package, folder / "root")
    run("dpkg-deb", "-e", package, folder / "control")
    return folder


def test_package_has_the_scripts_with_debians_python_and_units_and_examples_with_its_own_paths(built):
    for program in (*PROGRAMS, EXAMPLES / "show" / "instances-check"):  # which has no page of its own
        installed = built / "root" / "usr" / "sbin" / program.name
        assert installed.stat().st_mode & 0o777 == 0o755
        assert installed.read_text() == re.sub("^#!.*", "#!/usr/bin/python3", program.read_text())
    documents = built / DOCUMENTS
    (units,) = (path.parent for path in (built / "root").rglob("system/instances.service"))
    named = set()
    for source in [*UNITS, EXAMPLES / "dnsmasq" / "br0.conf"]:
        installed = units / source.name if source in UNITS else documents / source.relative_to(TOP)
        assert installed.read_text() == source.read_text().replace("/usr/local/sbin/instances", "/usr/sbin/instances")
        named |= set(re.findall("/usr/[a-z/]*sbin/instances[a-z.-]*", installed.read_text()))
    assert named == {"/usr/sbin/instances-update.py", "/usr/sbin/instances-apply"}
    for source in [path for name in ("incus", "libvirt", "nftables", "egress") for path in (EXAMPLES / name).iterdir()]:
        installed = documents / source.relative_to(TOP)
        assert source.name == "README.md" or installed.read_text() == source.read_text()
        assert installed.stat().st_mode & 0o777 == source.stat().st_mode & 0o755


def test_package_has_every_page_and_what_its_pages_link_to(built):
    documents = built / DOCUMENTS
    for page in documents.rglob("README.md*"):
        for link in links(run("zcat", "-f", page).stdout):
            there = page.parent / link
            assert there.exists() or Path(f"{there}.gz").exists(), f"{page}: {link}"
    readmes = (TOP / "README.md", EXAMPLES / "README.md")
    named = {(readme.parent / link).resolve() for readme in readmes for link in links(readme.read_text())}
    pages = {path / "README.md" for path in named if path.is_dir()} - {EXAMPLES / "README.md", TOP / "tests/README.md"}
    assert pages == {*EXAMPLES.glob("*/README.md")}
    for page in pages:
        assert [*documents.glob(f"{page.relative_to(TOP)}*")], page


def test_version_is_that_of_the_changelog_and_grows_with_each_build(built):
    version = run("dpkg-parsechangelog", "-l", DEBIAN / "changelog", "-S", "Version").stdout.strip()
    (package,) = built.glob("instances_*_all.deb")
    stamp = re.fullmatch(rf"instances_{re.escape(version)}\+(\d{{14}})_all.deb", package.name)[1]
    made = time.mktime(time.strptime(stamp + "UTC", "%Y%m%d%H%M%S%Z"))
    assert abs(package.stat().st_mtime - made + time.timezone) < 300


def test_upgrade_stops_no_unit_and_restarts_those_that_run(built):
    scripts = {path.name: path.read_text() for path in (built / "control").glob("p*")}
    assert scripts.keys() == {"postinst", "prerm", "postrm"}  # debhelper's preinst would stop them
    (invoked,) = re.findall(r"deb-systemd-invoke (\S+) (.*) >", scripts["postinst"])
    assert invoked[0] == "try-restart"
    assert {*re.findall(r"instances\.\w+", invoked[1])} == {"instances.path", "instances.service", "instances.timer"}


def test_settings_are_a_conffile_in_which_nothing_is_set(built):
    assert (built / "control" / "conffiles").read_text() == "/etc/default/instances\n"
    text = (built / "root" / "etc" / "default" / "instances").read_text()
    assert all(line.startswith("#") for line in text.splitlines() if line)
    assert len(DEFAULTS) == 6
    shown = [(name, value or "none") for name, value in re.findall("^#(INSTANCES.*)=(.*)", text, re.MULTILINE)]
    assert shown == DEFAULTS


def test_lintian_finds_no_error_or_warning(built):
    need("lintian")
    (changes,) = built.glob("*.changes")
    result = run("lintian", "--fail-on=error,warning", changes, check=False)
    assert result.returncode == 0 and not re.search("^[EW]:", result.stdout, re.MULTILINE), result.stdout


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_manual_page_says_what_the_program_does(built, program):
    need("man")
    (page,) = (built / "root" / "usr" / "share" / "man" / "man8").glob(f"{program.name}.8*")
    result = run("man", "--warnings", "-l", page, env=os.environ | {"MANWIDTH": "200", "LC_ALL": "C.UTF-8"})
    assert result.stderr == ""
    text = re.sub(".\b", "", result.stdout)
    sections = dict(re.findall("^([A-Z ]+)\n(.*?)(?=^[A-Z])", text, re.MULTILINE | re.DOTALL))
    variables = set(VARIABLE.findall(program.read_text()))
    usage = run(program, "--help", env=environment(TOP)).stdout
    lines = re.findall(rf"^(?:usage: | {{7}}){program.name}(.*?)(?:  .*)?$", usage, re.MULTILINE)
    synopsis = [line.split(program.name)[1] for line in sections["SYNOPSIS"].splitlines() if line.strip()]
    spelled, printed = ([re.sub(" *\\| *", "|", line).strip() for line in which] for which in (synopsis, lines))
    assert spelled == printed
    assert set(VARIABLE.findall(sections["ENVIRONMENT"])) == variables
    assert set(re.findall(r"--[a-z]+", text)) - {"--help"} == set(re.findall(r"--[a-z]+", usage)) - {"--help"}
    statuses = re.findall(r"^ {5}(\d+)", sections["EXIT STATUS"], re.MULTILINE)
    assert set(statuses) == set(re.findall(r"(?:Exit status: |, )(\d+) ", usage))
    for name, default in DEFAULTS:
        if name in variables:
            assert re.search(rf"{name}\n[^\n]*by default ‘?{re.escape(default)}’?$", text, re.MULTILINE), name


def test_printed_next_steps_and_the_lines_that_build_and_install_are_those_of_the_pages():
    steps = indented((DEBIAN / "instances.postinst").read_text().split("STEPS")[1])
    assert steps.startswith("mkdir") and steps.endswith("dnsmasq\n")
    readme = (DEBIAN / "README.Debian").read_text()
    assert indented(readme.split("Next steps\n---")[1].split("\n---")[0]) == steps
    by_hand = block("README.md", "install -m 755")
    for command in ("instances-update.py --initialize", "systemctl enable", "systemctl restart"):
        assert re.search(f"^{command}.*", steps, re.MULTILINE)[0] in by_hand
    lines = block("README.md", "examples/debian/build.sh")
    assert lines == block("examples/debian/README.md", "examples/debian/build.sh") and lines.count("\n") == 2


def test_apparmor_takes_the_snippet_in_a_profile_of_dnsmasq(tmp_path):
    need("apparmor_parser")
    profile, snippet = tmp_path / "profile", f'include "{FOLDER / "usr.sbin.dnsmasq"}"'
    profile.write_text(f"include <tunables/global>\nprofile dnsmasq /usr/sbin/dnsmasq {{\n{snippet}\n}}\n")
    parser = shutil.which("apparmor_parser", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    run(parser, "-Q", "-K", profile)
    assert run(parser, "-N", profile).stdout.split() == ["dnsmasq", "dnsmasq//instances_update"]


def test_life_of_the_package_from_build_to_purge():
    need("dh", "dpkg", "unshare", "nsenter", "nft", "ip", "dnsmasq", "udhcpc", "systemctl")
    result = subprocess.run(bound(TOP / "tests" / "machines" / "debian.sh", "here"), capture_output=True, text=True)
    if result.returncode == 77:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, result.stderr
