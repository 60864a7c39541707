"""What the tests share: the two scripts as modules, and a host with a bridge in namespaces."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest
from lab import OPEN, PROCESS, UPDATE, Host, Namespace, environment, run_script, wait_for

signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a shell's background job, whose children ignore it
sys.dont_write_bytecode = True  # pytest-xdist's workers do not inherit -B, and the top level is to hold nothing else
hypothesis.settings.register_profile("here", database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile("here")

if os.environ.get("CI") == "true":
    assert importlib.util.find_spec("scapy"), "needs scapy"  # where it is missing elsewhere, its tests are skipped
PROGRAMS = ("dnsmasq", "nft", "ip", "udhcpc", "dhclient", "dig", "ping", "strace")


def load(script: Path):
    """Return a script as a module; its main is not run."""
    spec = importlib.util.spec_from_file_location(script.stem.replace("-", "_"), script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LONGEST = ["network_lead", "apply", "fuzz", "claims", "identity", "lan", "clients", "routed", "pages", "show"]
LONGEST += ["network", "joining", "egress"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Have --dist loadfile begin with the longest files: newer pytest-xdist go by how many tests a file has."""
    from xdist.scheduler import LoadFileScheduling

    class LongestFirst(LoadFileScheduling):
        def _assign_work_unit(self, node):
            waiting = [file for name in LONGEST for file in self.workqueue if file.endswith(f"test_{name}.py")]
            if waiting:
                self.workqueue.move_to_end(waiting[0], last=False)
            super()._assign_work_unit(node)

    return LongestFirst(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(trylast=True)  # when the fixtures have ended: -x ends those of a module only here
def pytest_sessionfinish():
    """Take away the namespaces of a fixture that failed before it could do so itself."""
    for namespace in reversed(OPEN.copy()):
        Namespace.close(namespace)


@pytest.fixture(scope="session")
def update():
    """instances-update.py as a module."""
    return load(UPDATE)


@pytest.fixture(scope="session")
def process():
    """instances-process.py as a module."""
    return load(PROCESS)


@pytest.fixture
def base(tmp_path):
    """The path that the scripts' files begin with."""
    return tmp_path / "instances"


def need(*programs: str) -> None:
    """Skip the test where root or a program is missing; with CI=true, fail."""
    missing = [
        program for program in programs if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    missing += ["root"] if os.geteuid() else []
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"needs {', '.join(missing)}")


@contextlib.contextmanager
def lock_held(base):
    """Have another process hold the registry's lock; give the process."""
    code = "import filelock as f, sys; l = f.FileLock(sys.argv[1]); l.acquire(); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, f"{base}.lock"], **pipes) as holder:
        try:
            holder.stdout.readline()
            yield holder
        finally:
            holder.kill()


@contextlib.contextmanager
def waiting_for_the_lock(base, *command):
    """Have a script wait for the lock, which another process holds; give that process and the script's."""
    need("strace")
    log, pipes = base.parent / "strace", {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    traced = ["strace", "-o", log, sys.executable, *command]
    with lock_held(base) as holder:
        waiting = subprocess.Popen(traced, env=environment(base), text=True, start_new_session=True, **pipes)
        wait_for(lambda: log.exists() and "EAGAIN" in log.read_text(), "a try to lock")
        yield holder, waiting


@contextlib.contextmanager
def locked_out(base, *command):
    """Run a script while the lock is held, in the background of a module's tests; give (result, seconds), a future."""

    def timed():
        start = time.monotonic()
        return run_script(*command, base=base), time.monotonic() - start

    with ThreadPoolExecutor(1) as pool, lock_held(base):
        yield pool.submit(timed)


def check_nft(base):
    """Have nft parse both outputs, in a namespace of its own."""
    need("nft", "unshare")
    chains, sets = f'include "{base}.nftables_chains"', f'include "{base}.nftables_sets"'
    tables = f"table bridge b {{\n{chains}\n}}\ntable inet i {{\n{sets}\n}}\n"
    command = ["unshare", "-n", "nft", "-c", "-f", "-"]
    result = subprocess.run(command, input=tables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    """A guarded bridge with a victim, a bystander and two silent attackers. What tests do to it, reset() undoes."""
    from attacks import Guarded  # needs scapy

    need(*PROGRAMS)
    host = Host(tmp_path_factory.mktemp("bridge"), bridge=False)
    try:
        yield Guarded(host)
    finally:
        host.close()


@pytest.fixture(params=["registered", "unregistered"])
def attacker(request, bridge):
    """One of the bridge's attackers: who has leases of its own, and who is not registered."""
    return getattr(bridge, request.param)


@pytest.fixture
def host(tmp_path):
    """A host with the bridge br0."""
    need(*PROGRAMS)
    host = Host(tmp_path)
    yield host
    host.close()


EVENTS = [
    ("--initialize br0 host", ""),
    ("add 10:66:6a:4c:a1:11 10.83.0.11 web", ""),
    ("add 00:01:00:01:2f:8a:5b:10:66:6a:4c:a1:11 2001:67c:83::11 web", "10:66:6a:4c:a1:11"),
    ("add 00:01:00:01:2f:8a:5b:10:66:6a:4c:a1:11 fd83:5eed::11 web", "10:66:6a:4c:a1:11"),
    ("add 10:66:6a:4c:a1:12 10.83.0.12", ""),
    ("add 10:66:6a:4c:a1:13 10.83.0.13 build-runner", ""),
    ("add 00:04:9c:11 fd83:5eed::14 mail", "10:66:6a:4c:a1:14"),
    ("add 10:66:6a:4c:a1:15 10.83.0.15 web", ""),
    ("old 10:66:6a:4c:a1:13 10.83.0.23 build-runner", ""),
]


@pytest.fixture
def golden_host(host):
    """The host after the events and a run of the processor."""
    for arguments, mac in EVENTS:
        host.update(*arguments.split(), DNSMASQ_MAC=mac)
    variables = {"INSTANCES_ADDRESS_SETS": "host,web,ghost", "INSTANCES_HOSTS_DOMAIN": ".instance.internal"}
    host.run(sys.executable, PROCESS, env=environment(host.base, **variables))
    return host
