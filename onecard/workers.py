"""Who prepares the units: processes of this machine, or the workers of a Dask cluster on a shared file system.

    with processes(count=8, encoder="tiktoken") as workers:
        record = workers.submit(job).result()

Both hand out futures of concurrent.futures. The one thing to know: a process ends by itself when its parent is gone.
dask.distributed is imported by cluster() alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from onecard.records import STATE, PrepareError
from onecard.units import job_tokenizer, prepare_unit

CLUSTER_SECONDS = 30  # to reach a scheduler, and then for its first worker
INSTALL = "pip install -e '.[cluster]'"


class Workers(NamedTuple):
    submit: Callable[[dict], Future]  # a job of units.make_job -> the future of its unit's record
    count: Callable[[], int]  # how many units can run at once


def run(job: dict, encoder: str) -> dict:
    """What a worker does: prepares a unit and returns its record."""
    return prepare_unit(job, open_tokenizer(json.dumps(job.get("tokenizer")), job["folder"], encoder))


@functools.lru_cache(maxsize=1)
def open_tokenizer(state: str, folder: str, encoder: str):
    return job_tokenizer({"tokenizer": json.loads(state)}, folder, encoder)


# ---- this machine ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(count: int, encoder: str) -> Iterator[Workers]:
    """Up to `count` processes. Raises PrepareError if one of them dies. An error or Ctrl-C ends them at once."""
    others, started = set(multiprocessing.active_children()), set()
    context = multiprocessing.get_context("spawn")  # a process that has used fastokens must not be forked
    threads = max(1, cores() // count)
    pool = ProcessPoolExecutor(count, context, initializer=start_process, initargs=(threads,))

    def submit(job):
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the main process alone
        future = pool.submit(run, job, encoder)
        signal.signal(signal.SIGINT, handler)
        started.update(multiprocessing.active_children())
        return future

    try:
        yield Workers(submit, lambda: count)
    except BaseException as error:
        for process in started - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        if not isinstance(error, BrokenProcessPool):
            raise
        ended = [process.exitcode for process in started - others]
        code = next((code for code in ended if code not in (None, 0, -signal.SIGTERM)), "unknown")
        raise PrepareError(
            f"a worker process died (exit code {code}; -9 often means that memory ran out); finished units are kept: "
            "run it again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_process(threads: int) -> None:
    """The first thing that a new process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by fastokens and tokenizers
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=end_with, args=(sentinel,), daemon=True).start()


def end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)  # the parent is gone, and with it the reader of any result


# ---- a cluster -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(address: str, encoder: str, folder: Path) -> Iterator[Workers]:
    """The workers of the Dask scheduler at this address. A unit whose worker dies is given to another, however often.

    Raises PrepareError if there is no scheduler, or if its workers cannot do a unit.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise PrepareError(f"cluster: dask.distributed is not available ({error}); {INSTALL}") from error
    try:
        client = Client(address, timeout=CLUSTER_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise PrepareError(f"cluster: no scheduler at {address} ({error}); check the address") from error
    with client:
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 1 << 30))
        check_workers(client, address, folder.absolute())
        pool = client.get_executor(pure=False)

        def submit(job):
            places = {"folder": os.path.abspath(job["folder"]), "paths": list(map(absolute, job["paths"]))}
            return pool.submit(run, job | places, encoder)

        try:
            yield Workers(submit, lambda: len(client.nthreads()))
        except (CancelledError, OSError) as error:
            raise PrepareError(f"cluster: lost the scheduler at {address} ({error}); run it again") from error
        except ImportError as error:
            raise PrepareError(f"cluster: a worker cannot import onecard ({error}); {INSTALL} there") from error


def absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def check_workers(client, address: str, folder: Path) -> None:
    """Raises PrepareError, a line for each worker that has no onecard, several threads, or another file system."""

    def look(path):  # is sent by value, so it runs where onecard is missing
        import importlib.util
        import os

        if not importlib.util.find_spec("onecard"):
            return "has no onecard; install it there: pip install -e '.[cluster]'"
        return "" if os.path.exists(path) else f"does not see {path}; use a folder that all machines share"

    token = folder / STATE / f"cluster.{secrets.token_hex(4)}.tmp"
    token.touch()
    try:
        client.wait_for_workers(1, timeout=CLUSTER_SECONDS)
        problems = client.run(look, str(token))
    except TimeoutError as error:
        raise PrepareError(
            f"cluster: {address} has no workers; start some: dask worker {address} --nthreads 1"
        ) from error
    finally:
        token.unlink()
    for worker, threads in client.nthreads().items():
        if threads > 1:
            remedy = f"start it with dask worker {address} --nthreads 1 --nworkers {threads}"
            problems[worker] = f"has {threads} threads, and a unit needs a process; {remedy}"
    if lines := [f"cluster: worker {worker} {problem}" for worker, problem in problems.items() if problem]:
        raise PrepareError("\n".join(lines))
