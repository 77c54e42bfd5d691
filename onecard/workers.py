"""Who prepares the units: processes of this machine, or the workers of a Dask cluster on a shared file system.

    with processes(8, "tiktoken") as (submit, count):  # count(): how many units can run at once
        record = submit(job).result()

Futures are those of concurrent.futures. The one thing to know: a process ends by itself when its parent is gone.
"""

import contextlib
import functools
import json
import logging
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
from typing import Any

from onecard.records import STATE, PrepareError
from onecard.units import job_tokenizer, prepare_unit

Workers = tuple[Callable[[dict], Future], Callable[[], int]]
CLUSTER_SECONDS = 30  # to reach a scheduler, and then for its first worker
INSTALL = "pip install -e '.[cluster]'"


def run(job: dict, encoder: str) -> dict:
    """What a worker does: prepares a unit and returns its record."""
    return prepare_unit(job, open_tokenizer(json.dumps(job.get("tokenizer")), job["folder"], encoder))


@functools.lru_cache(maxsize=1)
def open_tokenizer(state, folder, encoder):
    return job_tokenizer({"tokenizer": json.loads(state)}, folder, encoder)


# ---- this machine ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(most: int, encoder: str) -> Iterator[Workers]:
    """Up to `most` processes. An error or Ctrl-C ends them at once. Raises PrepareError if one of them dies."""
    others, started = set(multiprocessing.active_children()), set()
    context = multiprocessing.get_context("spawn")  # a process that has used fastokens must not be forked
    pool = ProcessPoolExecutor(most, context, initializer=start_process, initargs=(max(1, cores() // most),))

    def submit(job):
        with no_interrupt():
            future = pool.submit(run, job, encoder)
            started.update(set(multiprocessing.active_children()) - others)
        return future

    try:
        yield submit, lambda: most
    except BaseException as error:
        for process in started:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        if not isinstance(error, BrokenProcessPool):
            raise
        codes = {process.exitcode for process in started} - {None, 0, -signal.SIGTERM}
        why = f"exit code {codes.pop() if codes else 'unknown'}; -9 often means that memory ran out"
        remedy = "finished units are kept: run it again with fewer --workers"
        raise PrepareError(f"a worker process died ({why}); {remedy}") from error
    pool.shutdown()


@contextlib.contextmanager
def no_interrupt():
    """Ctrl-C waits until the end. Processes that are started here never get it: it is for the main process alone."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_process(threads: int) -> None:
    """The first thing that a new process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by fastokens and tokenizers
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


# ---- a cluster -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(address: str, encoder: str, folder: Path) -> Iterator[Workers]:
    """The workers of a Dask scheduler. A unit whose worker dies is given to another one, however often.

    Raises PrepareError if the scheduler is not there, or if its workers cannot do a unit.
    """
    import asyncio  # here, because each worker process imports this module

    try:
        from distributed import Client

        client = Client(address, timeout=CLUSTER_SECONDS, set_as_default=False)
    except ImportError as error:
        raise PrepareError(f"cluster: dask.distributed is not available ({error}); {INSTALL}") from error
    except (OSError, asyncio.TimeoutError, ValueError) as error:
        raise PrepareError(f"cluster: {address} cannot be reached ({error}); check that its scheduler runs") from error
    logging.disable(logging.ERROR)  # Dask logs tracebacks; what ends a run is a line of ours
    with client:
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 1 << 30))
        check_workers(client, address, folder.absolute())
        pool = client.get_executor(pure=False)

        def submit(job):
            paths = [path if "://" in path else os.path.abspath(path) for path in job["paths"]]
            return pool.submit(run, job | {"folder": os.path.abspath(job["folder"]), "paths": paths}, encoder)

        try:
            yield submit, lambda: len(client.nthreads())
        except ImportError as error:
            raise PrepareError(f"cluster: a worker cannot import onecard ({error}); {INSTALL} there") from error
        except (CancelledError, OSError) as error:
            remedy = "finished units are kept: check the scheduler, and run it again"
            raise PrepareError(f"cluster: the connection to {address} is lost; {remedy}") from error


def check_workers(client: Any, address: str, folder: Path) -> None:
    """Raises PrepareError, a line for each worker that has no onecard, several threads, or another file system."""
    import asyncio

    def problem_of(path):  # sent by value, so it runs where onecard is missing
        import importlib.util
        import os

        if not importlib.util.find_spec("onecard"):
            return "has no onecard; install it there: pip install -e '.[cluster]'"
        return "" if os.path.exists(path) else f"does not see {path}; use a --data_dir that all machines share"

    token = folder / STATE / f"cluster.{secrets.token_hex(4)}.tmp"
    token.touch()
    start = f"dask worker {address} --nthreads 1"
    try:
        client.wait_for_workers(1, timeout=CLUSTER_SECONDS)
        problems = client.run(problem_of, str(token), on_error="return")  # an exception: it has died, so it is not used
    except asyncio.TimeoutError as error:
        raise PrepareError(f"cluster: {address} has no workers; start some: {start} --nworkers 8") from error
    finally:
        token.unlink()
    for worker, threads in client.nthreads().items():
        if threads > 1:
            problems[worker] = f"has {threads} threads, but units need processes; use {start} --nworkers {threads}"
    if lines := [f"cluster: worker {name} {text}" for name, text in problems.items() if text and isinstance(text, str)]:
        raise PrepareError("\n".join(lines))
