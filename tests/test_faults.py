"""Nothing lost: a kill or an error at every system call on our files, a full disk, many writers at once."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import need, waiting_for_the_lock
from lab import PROCESS, UPDATE, environment, run_script

pytestmark = pytest.mark.slow
MAC, OTHER = "10:66:6a:4c:a1:11", "10:66:6a:4c:a1:12"
OUTPUTS = ("instances.hosts", "instances.nftables_chains", "instances.nftables_sets")
# What is run where all is as before a change, after it, and after it without a marker
RUNS = {"before": (UPDATE, "add", MAC, "10.0.0.2"), "changed": (PROCESS,), "unmarked": (PROCESS, "--force")}
CHANGING = ("openat", "write", "fsync", "rename", "unlink")
OTHERS = ("flock", "close", "fchown", "fchmod")  # a kill before a call that changes nothing is one before the next
KILL = "signal=KILL"


def traced(folder: Path, run: tuple, *options: str) -> subprocess.CompletedProcess:
    """Run a script under strace, with its files in a folder."""
    command = ["strace", "-y", "-o", str(folder.with_suffix(".strace")), *options, sys.executable, *map(str, run)]
    env = environment(folder / "instances", PYTHONHASHSEED="0")
    return subprocess.run(command, env=env, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


FINISHED = set()  # what runs have left, with which later runs were tried


def finish(folder: Path, *steps) -> None:
    """Check that later runs, each with its exit statuses, lead to these contents: (run, statuses, contents)."""
    left = (steps[0][0], frozenset(contents(folder).items()))
    if left not in FINISHED:  # many faults leave the same
        for run, statuses, expected in steps:
            assert run_script(*run, base=folder / "instances").returncode in statuses
            assert contents(folder) == expected
        FINISHED.add(left)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Folders: before a change (outputs up to date), after it (a marker, or none), and after the processor's run."""
    need("strace")
    root = tmp_path_factory.mktemp("stages")
    folders = {name: root / name for name in ("before", "changed", "unmarked", "done")}
    folders["before"].mkdir()
    for run in ((UPDATE, "add", MAC, "10.0.0.1", "web"), (UPDATE, "add", OTHER, "10.0.0.9", "db"), (PROCESS,)):
        run_script(*run, base=root / "before" / "instances")
    for former, name, run in (("before", "changed", RUNS["before"]), ("changed", "done", RUNS["changed"])):
        shutil.copytree(root / former, root / name)
        run_script(*run, base=root / name / "instances")
    shutil.copytree(root / "changed", root / "unmarked")
    (root / "unmarked" / "instances.updated").unlink(missing_ok=True)
    return folders


def points(stages, start: str, folder: Path) -> list[tuple[str, int]]:
    """Return (name, number) of each system call of a run that touches a file of ours."""
    shutil.copytree(stages[start], folder)
    assert traced(folder, RUNS[start]).returncode == 0
    counts, found = {}, []
    for line in folder.with_suffix(".strace").read_text().splitlines():
        name = re.match(r"\w*", line)[0]
        counts[name] = counts.get(name, 0) + 1
        if f"{folder}" in line and name != "execve":
            found.append((name, counts[name]))
    return found


def inject(stages, start: str, tmp_path, faults: tuple, check, names: tuple) -> list:
    """Run once for each point and fault, and check(stages, folder, result, point's name); return what it returns."""
    places = [p for p in points(stages, start, tmp_path / "record") if p[0] in names]
    assert len(places) >= 4

    def one(job):
        number, ((name, count), fault) = job
        folder = tmp_path / f"run{number}"
        shutil.copytree(stages[start], folder)
        result = traced(folder, RUNS[start], "-e", f"inject={name}:{fault}:when={count}")
        print(f"{name} {count} {fault}: {result.stderr}")  # shown where a check fails
        assert (abs(result.returncode) == signal.SIGKILL) == (fault == KILL)
        return check(stages, folder, result, name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, enumerate((place, fault) for place in places for fault in faults)))


def check_update(stages, folder: Path, *_) -> bool:
    """The registry is old, or new and marked; a further run finishes. Return whether it is old."""
    name = "instances.json"
    old, new = ((stages[stage] / name).read_bytes() for stage in ("before", "changed"))
    assert (folder / name).read_bytes() in (old, new)
    was_old = (folder / name).read_bytes() == old
    assert was_old or (folder / "instances.updated").exists()
    last = (RUNS["changed"], (0,), contents(stages["done"]))
    finish(folder, (RUNS["before"], (0,), contents(stages["changed"])), last)
    return was_old


def check_process(stages, folder: Path, *_) -> bool:
    """Each output is whole, and the marker is there if one is old, which is returned; a further run finishes."""
    old, new = contents(stages["changed"]), contents(stages["done"])
    now = contents(folder)
    assert now["instances.json"] == new["instances.json"]
    assert all(now[name] in (old[name], new[name]) for name in OUTPUTS)
    up_to_date = all(now[name] == new[name] for name in OUTPUTS)
    assert up_to_date or "instances.updated" in now
    finish(folder, (RUNS["changed"], (0, 10) if up_to_date else (0,), new))
    return not up_to_date


CHECKS = {"before": check_update, "changed": check_process}
EACH = pytest.mark.parametrize("start", CHECKS)


@EACH
def test_run_killed_at_any_point_loses_nothing(stages, tmp_path, start):
    assert {*inject(stages, start, tmp_path, (KILL,), CHECKS[start], CHANGING + OTHERS)} == {True, False}


def test_forced_run_killed_half_way_leaves_the_marker(stages, tmp_path):
    def check(stages, folder, *_):
        now, old, new = contents(folder), contents(stages["changed"]), contents(stages["done"])
        made = [now[name] == new[name] for name in OUTPUTS]
        assert all(now[name] in (old[name], new[name]) for name in OUTPUTS)
        assert "instances.updated" in now or all(made) or not any(now[name] != old[name] for name in OUTPUTS)
        return any(made) and not all(made)

    assert True in inject(stages, "unmarked", tmp_path, (KILL,), check, ("rename", "unlink"))


@EACH
def test_all_is_done_under_the_lock_and_a_file_is_on_disk_before_its_rename_and_the_folder_after(
    stages, tmp_path, start
):
    points(stages, start, tmp_path / "record")
    log, folder = (tmp_path / "record.strace").read_text(), re.escape(str(tmp_path / "record"))
    sync_folder = rf"fsync\(\d+<{folder}>"
    files = ["instances.json"] if start == "before" else OUTPUTS
    read, mark = (rf'openat\(.*"{folder}/instances\.{end}"' for end in ("json", "updated"))
    lock = r"flock\(.*LOCK_EX"
    order = [lock, read, mark, sync_folder] if start == "before" else [lock, mark, sync_folder, read]
    for name in files:
        file = rf"{folder}/{re.escape(name)}\.tmp"
        order += [rf'openat\(.*"{file}", .*O_EXCL', rf"write\(\d+<{file}>", rf"fsync\(\d+<{file}>"]
        order += [rf'rename\("{file}"', sync_folder]
    order += [rf'unlink\("{folder}/instances\.updated"\)'] if start == "changed" else []
    position = 0
    for call in [*order, r"flock\(.*LOCK_UN"]:
        found = re.compile(call).search(log, position)
        assert found, call
        position = found.end()


@EACH
def test_error_at_any_open_write_sync_or_rename_is_one_line(stages, tmp_path, start):
    def check(stages, folder, result, call):
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.count("\n") == 1 and "error: " in result.stderr and str(folder) in result.stderr
        assert re.search("No space left on device|Permission denied", result.stderr)
        assert not list(folder.glob("*.tmp")) or call == "unlink"
        was_old = CHECKS[start](stages, folder)
        # Where the new registry is in place, the error was of the folder, at last
        assert start == "changed" or was_old or call in ("openat", "fsync")

    # Of these two errors, Python makes exceptions of different kinds
    inject(stages, start, tmp_path, ("error=ENOSPC", "error=EACCES"), check, CHANGING)


@EACH
def test_error_at_any_lock_close_or_change_of_mode_loses_nothing(stages, tmp_path, start):
    def check(stages, folder, result, call):  # a lock that fails once is tried again
        assert result.returncode in (0, 1) and "Traceback" not in result.stderr and result.stderr.count("\n") <= 1
        assert result.returncode == 0 or "error: " in result.stderr and not list(folder.glob("*.tmp"))
        CHECKS[start](stages, folder)
        return call

    assert set(inject(stages, start, tmp_path, ("error=EIO",), check, OTHERS)) == set(OTHERS)


def test_full_disk_leaves_the_old_files(tmp_path):
    need("unshare", "mount")
    inside = """
        set -eu
        mount -t tmpfs -o size=64k tmpfs "$1"
        export INSTANCES_BASE_PATH="$1/instances"
        "$2" "$3" add 10:66:6a:4c:a1:11 10.0.0.1 web
        "$2" "$4"
        cat "$1/instances.json" "$1/instances.hosts" >"$5/before"
        touch "$1/instances.updated"
        cat /dev/zero >"$1/fill" 2>/dev/null || :
        "$2" "$3" add 10:66:6a:4c:a1:11 10.0.0.2 || echo "update $?"
        "$2" "$4" || echo "process $?"
        cat "$1/instances.json" "$1/instances.hosts" >"$5/after"
        ls "$1"
        rm "$1/fill"
        "$2" "$3" add 10:66:6a:4c:a1:11 10.0.0.2
        "$2" "$4"
        cat "$1/instances.hosts"
    """
    (tmp_path / "small").mkdir()
    command = ["unshare", "-m", "sh", "-c", inside, "sh", tmp_path / "small", sys.executable, UPDATE, PROCESS, tmp_path]
    result = subprocess.run(command, env=environment(Path("/none")), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "update 1\nprocess 1\n" in result.stdout and ".tmp" not in result.stdout
    assert result.stderr.count("No space left on device") == 2 and "Traceback" not in result.stderr
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    hosts = "10.0.0.2 web.instance.internal web.v4.instance.internal\n"
    assert result.stdout.endswith(f"{hosts}fe80::1266:6aff:fe4c:a111 web.l6.instance.internal\n")


def test_sixteen_writers_and_a_reader_at_once(tmp_path):
    """Each writer has 10 leases of its own; renames and removals come in between."""
    base, ended = tmp_path / "instances", threading.Event()
    writers, leases = 16, 10

    def does(*command):
        result = run_script(*command, base=base)
        assert result.returncode in (0, 1, 10) and "Traceback" not in result.stderr and result.stderr.count("\n") <= 1
        return result.returncode == 0

    def write(writer):
        chance, own = random.Random(writer), {}
        for number in range(leases):
            mac = f"10:66:6a:00:{writer:02x}:{number:02x}"
            entry = {"ipv4": f"10.{writer}.0.{number}", "name": f"w{writer}-{number}"}
            if does(UPDATE, "add", mac, *entry.values()):
                own[mac] = entry
            renamed, removed = chance.choice([*own, None]), chance.choice([*own, None])
            if renamed and chance.random() < 0.2 and does(UPDATE, "--rename", renamed, f"r{writer}-{number}"):
                own[renamed]["name"] = f"r{writer}-{number}"
            if removed and chance.random() < 0.1 and does(UPDATE, "--remove", removed):
                del own[removed]
        return own

    def read():
        while not ended.is_set():
            does(PROCESS)

    with ThreadPoolExecutor(writers + 1) as pool:
        reader = pool.submit(read)
        try:
            expected = {mac: entry for own in pool.map(write, range(writers)) for mac, entry in own.items()}
        finally:
            ended.set()
        reader.result()
    registry = json.loads(base.with_suffix(".json").read_text())
    assert {mac: {k: i[k] for k in ("ipv4", "name")} for mac, i in registry.items()} == expected
    assert len(expected) > writers * leases * 0.8
    does(PROCESS)
    outputs = [(tmp_path / name).read_bytes() for name in OUTPUTS]
    assert run_script(PROCESS, base=base).returncode == 10 and does(PROCESS, "--force")
    assert outputs == [(tmp_path / name).read_bytes() for name in OUTPUTS]


def test_killed_holder_of_the_lock_holds_nobody_up(tmp_path):
    with waiting_for_the_lock(tmp_path / "instances", UPDATE, "add", MAC, "10.0.0.1") as (holder, waiting):
        holder.kill()
        assert waiting.communicate()[0] and waiting.returncode == 0
