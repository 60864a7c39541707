"""Nothing lost: a kill or an error at every system call on our files, a full disk, many writers at once."""

import json
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import need, waiting_for_the_lock
from lab import PROCESS, UPDATE, environment, run, run_script

pytestmark = pytest.mark.slow
MAC, OTHER = "10:66:6a:4c:a1:11", "10:66:6a:4c:a1:12"
OUTPUTS = ("instances.hosts", "instances.nftables_chains", "instances.nftables_sets")
# What is run where all is as before a change, after it, and after it without a marker; and the folder where it has run
RUNS = {"before": (UPDATE, "add", MAC, "10.0.0.2"), "changed": (PROCESS,), "unmarked": (PROCESS, "--force")}
ENDS = {"before": "changed", "changed": "done", "unmarked": "forced"}
CHANGING = ("openat", "write", "fsync", "rename", "unlink")
OTHERS = ("flock", "close", "fchown", "fchmod")  # a kill before a call that changes nothing is one before the next
KILL = "signal=KILL"
FAST = ("-f", "--seccomp-bpf")  # strace stops at the traced calls only, but sends no signals then


def traced(folder: Path, script: tuple, *options: str):
    """Run a script under strace, with its files in a folder."""
    command = ["strace", "-y", "-e", f"trace={','.join(CHANGING + OTHERS)}", *options]
    command += ["-o", folder.with_suffix(".strace"), sys.executable, *script]
    return run(*command, check=False, env=environment(folder / "instances", PYTHONHASHSEED="0"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder of folders: of what is before each of the runs, and after it, with what strace saw of it beside that."""
    need("strace")
    root = tmp_path_factory.mktemp("stages")
    (root / "before").mkdir()
    for script in ((UPDATE, "add", MAC, "10.0.0.1", "web"), (UPDATE, "add", OTHER, "10.0.0.9", "db"), (PROCESS,)):
        run_script(*script, base=root / "before" / "instances")
    for start, end in ENDS.items():
        if start == "unmarked":
            shutil.copytree(root / "changed", root / start)
            (root / start / "instances.updated").unlink(missing_ok=True)
        shutil.copytree(root / start, root / end)
        traced(root / end, RUNS[start])
    return root


FINISHED = set()  # what runs have left, with which later runs were tried


def check(stages: Path, start: str, folder: Path) -> list[bool]:
    """Check that a run has left old or new files, and the marker where it is to be, and that later runs do the rest;
    return of each file that it changes whether the new one is there."""
    old, new, now = (contents(place) for place in (stages / start, stages / ENDS[start], folder))
    assert all(now[name] in (old[name], new[name]) for name in ("instances.json", *OUTPUTS))
    made = [now[name] == new[name] for name in ("instances.json", *OUTPUTS) if old[name] != new[name]]
    half = any(made) and not all(made)
    marked = {"before": all(made), "changed": not all(made), "unmarked": half}[start]
    assert "instances.updated" in now or not marked
    left = (start, frozenset(now.items()))
    if left not in FINISHED:  # many faults leave the same
        for later in ("before", "changed") if start == "before" else (start,):
            status = run_script(*RUNS[later], base=folder / "instances").returncode
            assert status == 0 or (start, status, all(made)) == ("changed", 10, True)
            assert contents(folder) == contents(stages / ENDS[later])
        FINISHED.add(left)
    return made


def inject(stages: Path, start: str, tmp_path: Path, names: tuple, *faults: str) -> list[tuple]:
    """Do a run once for each such system call on a file of ours, and each fault, and check what it leaves; return of
    each (name of the call, result, names of files that it left, which files are new)."""
    end, counts, jobs = stages / ENDS[start], Counter(), []
    for line in end.with_suffix(".strace").read_text().splitlines():
        name = re.match(r"\w*", line)[0]
        counts[name] += 1
        if f"{end}" in line and name in names:
            jobs += [(name, counts[name], fault) for fault in faults]
    assert len(jobs) >= 4

    def one(job):
        name, count, fault = job
        folder = tmp_path / f"{name}-{count}-{fault}"
        shutil.copytree(stages / start, folder)
        fast = () if fault == KILL else FAST
        result = traced(folder, RUNS[start], *fast, "-e", f"inject={name}:{fault}:when={count}")
        print(f"{name} {count} {fault}: {result.stderr}")  # shown where a check fails
        assert (abs(result.returncode) == signal.SIGKILL) == (fault == KILL)
        left = [path.name for path in folder.iterdir()]
        return name, result, left, check(stages, start, folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, jobs))


EACH = pytest.mark.parametrize("start", ["before", "changed"])


@EACH
def test_run_killed_at_any_point_loses_nothing(stages, tmp_path, start):
    rows = inject(stages, start, tmp_path, CHANGING + OTHERS, KILL)
    assert {all(made) for *_, made in rows} == {True, False}


def test_forced_run_killed_half_way_leaves_the_marker(stages, tmp_path):
    rows = inject(stages, "unmarked", tmp_path, ("rename", "unlink"), KILL)
    assert any(any(made) and not all(made) for *_, made in rows)


@EACH
def test_all_is_done_under_the_lock_and_a_file_is_on_disk_before_its_rename_and_the_folder_after(stages, start):
    log, folder = (stages / f"{ENDS[start]}.strace").read_text(), re.escape(str(stages / ENDS[start]))
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
    for call in [*order, r"flock\(.*LOCK_UN"]:
        found = re.search(call, log)
        assert found, call
        log = log[found.end() :]


@EACH
def test_error_at_any_open_write_sync_or_rename_is_one_line(stages, tmp_path, start):
    # Of these two errors, Python makes exceptions of different kinds
    for call, result, left, made in inject(stages, start, tmp_path, CHANGING, "error=ENOSPC", "error=EACCES"):
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.count("\n") == 1 and "error: " in result.stderr and str(tmp_path) in result.stderr
        assert re.search("No space left on device|Permission denied", result.stderr)
        assert ".tmp" not in " ".join(left) or call == "unlink"
        # Where the new registry is in place, the error was of the folder, at last
        assert start == "changed" or not all(made) or call in ("openat", "fsync")


@EACH
def test_error_at_any_lock_close_or_change_of_mode_loses_nothing(stages, tmp_path, start):
    rows = inject(stages, start, tmp_path, OTHERS, "error=EIO")
    for _, result, left, _ in rows:  # a lock that fails once is tried again
        assert result.returncode in (0, 1) and "Traceback" not in result.stderr and result.stderr.count("\n") <= 1
        assert result.returncode == 0 or "error: " in result.stderr and ".tmp" not in " ".join(left)
    assert {call for call, *_ in rows} == {*OTHERS}


def test_full_disk_leaves_the_old_files(tmp_path):
    need("unshare", "mount")
    inside = """
        mount -t tmpfs -o size=64k tmpfs "$1"
        export INSTANCES_BASE_PATH="$1/instances"
        "$2" "$3" add 10:66:6a:4c:a1:11 10.0.0.1 web
        "$2" "$4"
        cat "$1/instances.json" "$1/instances.hosts" >"$1.before"
        touch "$1/instances.updated"
        cat /dev/zero >"$1/fill" 2>/dev/null || :
        "$2" "$3" add 10:66:6a:4c:a1:11 10.0.0.2 || echo "update $?"
        "$2" "$4" || echo "process $?"
        cat "$1/instances.json" "$1/instances.hosts" | cmp "$1.before"
        ls "$1"
        rm "$1/fill"
        "$2" "$3" add 10:66:6a:4c:a1:11 10.0.0.2
        "$2" "$4"
        cat "$1/instances.hosts"
    """
    (tmp_path / "small").mkdir()
    result = run("unshare", "-m", "sh", "-euc", inside, "sh", tmp_path / "small", sys.executable, UPDATE, PROCESS)
    assert "update 1\nprocess 1\n" in result.stdout and ".tmp" not in result.stdout
    assert result.stderr.count("No space left on device") == 2 and "Traceback" not in result.stderr
    hosts = "10.0.0.2 web.instance.internal web.v4.instance.internal\n"
    assert result.stdout.endswith(f"{hosts}fe80::1266:6aff:fe4c:a111 web.l6.instance.internal\n")


def test_sixteen_writers_and_a_reader_at_once(tmp_path):
    """Each writer has 10 leases of its own; renames and removals come in between."""
    base, writers, leases = tmp_path / "instances", 16, 10

    def does(*command):
        result = run_script(*command, base=base)
        assert result.returncode in (0, 1, 10) and "Traceback" not in result.stderr and result.stderr.count("\n") <= 1
        return result.returncode == 0

    def write(writer):
        chance, own = random.Random(writer), {}
        for number in range(leases):
            mac, entry = f"10:66:6a:00:{writer:02x}:{number:02x}", (f"10.{writer}.0.{number}", f"w{writer}-{number}")
            if does(UPDATE, "add", mac, *entry):
                own[mac] = entry
            renamed, removed = chance.choice([*own, None]), chance.choice([*own, None])
            if renamed and chance.random() < 0.2 and does(UPDATE, "--rename", renamed, f"r{writer}-{number}"):
                own[renamed] = own[renamed][0], f"r{writer}-{number}"
            if removed and chance.random() < 0.1 and does(UPDATE, "--remove", removed):
                del own[removed]
        return own

    with ThreadPoolExecutor(writers) as pool:
        jobs = [pool.submit(write, writer) for writer in range(writers)]
        while not all(job.done() for job in jobs):
            does(PROCESS)
    expected = {mac: entry for job in jobs for mac, entry in job.result().items()}
    registry = json.loads(base.with_suffix(".json").read_text())
    assert {mac: (i["ipv4"], i["name"]) for mac, i in registry.items()} == expected
    assert len(expected) > writers * leases * 0.8
    does(PROCESS)
    outputs = contents(tmp_path)
    assert run_script(PROCESS, base=base).returncode == 10 and does(PROCESS, "--force")
    assert outputs == contents(tmp_path)


def test_killed_holder_of_the_lock_holds_nobody_up(tmp_path):
    with waiting_for_the_lock(tmp_path / "instances", UPDATE, "add", MAC, "10.0.0.1") as (holder, waiting):
        holder.kill()
        assert waiting.communicate()[0] and waiting.returncode == 0
