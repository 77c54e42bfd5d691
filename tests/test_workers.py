"""workers.py: processes that end with their parent; a Dask cluster whose workers die, and what is wrong with one."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import flags_of
from texts import files_of, some_texts, write_parquet

import prepare
from onecard import workers
from onecard.records import STATE, PrepareError

ROOT = Path(prepare.__file__).parent
SMALL = ("--shard_tokens=3000", "--val_fraction=0.2", "--encoder=tiktoken")


@pytest.fixture
def inputs(tmp_path):
    return [write_parquet(tmp_path / f"{number}.parquet", some_texts(300, number), 50) for number in range(2)]


@pytest.fixture
def run(tmp_path):
    """A function: name of a dataset, arguments -> its files when prepare.py has made it."""

    def run(name, *arguments):
        prepare.main([*map(str, arguments), *SMALL, *flags_of(dataset=name, data_dir=tmp_path / "data")])
        assert not list(tmp_path.rglob("*.tmp"))
        return files_of(tmp_path / "data" / name)

    return run


def test_ctrl_c_while_a_unit_is_given_to_the_processes_is_not_lost(monkeypatch):
    monkeypatch.setattr(workers.ProcessPoolExecutor, "submit", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` has it ignored
    try:
        with pytest.raises(KeyboardInterrupt), workers.processes(1, "tiktoken") as (submit, _):
            submit({})
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    os.environ["PYTHONPATH"] = str(ROOT)
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster:
        yield cluster


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_processes_end_within_seconds_of_a_kill_of_their_parent(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(1000, words=500), 50)
    command = [sys.executable, "prepare.py", path, *SMALL, *flags_of(dataset="docs", data_dir=tmp_path, workers=2)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(tmp_path.rglob("*.bin*")):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    paths, deadline = [Path(f"/proc/{child}/cmdline") for child in children], time.monotonic() + 10
    while any(path.exists() and path.read_bytes() for path in paths):  # a zombie has no command line
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_cluster_makes_the_bytes_of_one_machine_and_a_file_is_added_later(cluster, run, inputs):
    address = f"--cluster={cluster.scheduler_address}"
    assert run("cluster", inputs[0], address) == run("local", inputs[0])
    assert run("cluster", *inputs, address) == run("local", *inputs)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_workers_of_a_cluster_are_killed_and_nothing_is_lost(cluster, run, tmp_path, kills, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", some_texts(600 * kills, words=300), 50)
    draw, killed, done = random.Random(kills), [], threading.Event()

    def kill():
        while len(killed) < kills and not done.wait(draw.uniform(0.1, 0.4)):
            pids = [worker.pid for worker in cluster.workers.values() if getattr(worker, "pid", None)]
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(pids), signal.SIGKILL)
                killed.append(pids)

    killer = threading.Thread(target=kill)
    monkeypatch.setattr(workers, "check_workers", lambda *_: killer.start())
    try:
        found = run("cluster", path, f"--cluster={cluster.scheduler_address}")
    finally:
        done.set()
        killer.join()
    assert len(killed) == kills and found == run("local", path)


def test_a_cluster_that_cannot_be_used_is_a_line(tmp_path, monkeypatch, inputs, run):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(workers, "CLUSTER_SECONDS", 1)
    for address in ("tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1:x"):
        with pytest.raises(PrepareError, match=rf"^cluster: {address} cannot be reached \(.*\); check .*$"):
            run("docs", inputs[0], f"--cluster={address}")
    keys = dict(processes=False, dashboard_address=":0", silence_logs=50)
    with (
        distributed.LocalCluster(1, threads_per_worker=2, **keys) as cluster,
        pytest.raises(PrepareError, match=r"^cluster: worker inproc://.* has 2 threads, .* --nthreads 1 --nworkers 2$"),
    ):
        run("docs", inputs[0], f"--cluster={cluster.scheduler_address}")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(PrepareError, match=r"dask\.distributed is not available .*; pip install -e '\.\[cluster\]'$"):
        run("docs", inputs[0], "--cluster=tcp://127.0.0.1:1")


class Client:
    """A Dask client with two workers, one on a machine that has other files, and one that has just died."""

    waited = None

    def wait_for_workers(self, count, timeout):
        if self.waited:
            raise self.waited

    def nthreads(self):
        return {"here": 1, "there": 1}

    def run(self, function, path, on_error):
        return {"here": function(path), "there": function(path + "x"), "dead": OSError()}


def test_a_worker_without_onecard_or_with_other_files_is_named(tmp_path, monkeypatch):
    (tmp_path / STATE).mkdir()
    with pytest.raises(PrepareError, match=r"^cluster: worker there does not see .*/cluster.*; use a --data_dir that"):
        workers.check_workers(Client(), "tcp://host:8786", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PrepareError, match="worker here has no onecard; install it there: pip install"):
        workers.check_workers(Client(), "tcp://host:8786", tmp_path)
    monkeypatch.setattr(Client, "waited", asyncio.TimeoutError())
    with pytest.raises(PrepareError, match="8786 has no workers; start some: dask worker tcp://host:8786 --nthreads 1"):
        workers.check_workers(Client(), "tcp://host:8786", tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
