"""This process among others: how they find each other, which of them is missing, and why this one is to stop.

    watch = join("gloo", device, rank, world_size, minutes=10)
    with Stop(max_hours=8) as stop: ...

torch waits for a process that is stuck, and then says that a collective timed out, not whose fault it was. A Watch says
it before that.
"""

import atexit
import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from onecard import UserError

# ---- several processes


def join(backend: str, device: torch.device, rank: int, world_size: int, minutes: float) -> "Watch":
    """Joins the other processes. minutes: how long to wait for one, now and whenever they meet."""
    store = fresh_store(rank, world_size, minutes)
    options: dict = dict(device_id=device) if backend == "nccl" else {}
    timeout = timedelta(minutes=minutes + 1)  # a Watch says more than torch, so it comes first
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **options)
    watch = Watch(dist.PrefixStore("watch", store), rank, world_size, minutes)
    watch.start()
    return watch


def fresh_store(rank: int, world_size: int, minutes: float) -> dist.Store:
    """A store that only the processes of this start share. UserError names those that do not come within `minutes`.

    torchrun keeps one store over its restarts, and in it the addresses of dead processes, for which the new ones would
    wait (pytorch issue 135712). So rank 0 picks a random name for this start and confirms it to each other rank. A rank
    that read the name of an earlier start gets no answer and reads again.
    """
    mine, deadline, missing = secrets.token_hex(8), time.monotonic() + 60 * minutes, "another process"
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))
        if rank == 0:
            store.set("name", mine)
            for other in range(1, world_size):
                missing = f"process {other}"
                store.set(store.get(f"{mine}/{other}").decode(), mine)
            return dist.PrefixStore(mine, store)
        missing = "process 0"
        while not store.check([mine]):
            store.set(f"{store.get('name').decode()}/{rank}", mine)
            time.sleep(0.05)
            if time.monotonic() > deadline:
                raise dist.DistStoreError("no answer")
        return dist.PrefixStore(store.get(mine).decode(), store)
    except dist.DistError as error:
        raise UserError(
            f"process {rank} of {world_size} waited {minutes:g} minutes for {missing} ({str(error).splitlines()[0]}): "
            "start all processes, or wait longer with --ddp_timeout_minutes"
        ) from None


class Watch(threading.Thread):
    """Ends this process, and names those it waited for, if it has not gone on for `minutes` and others are missing.

    Each process publishes, every second, how often it has gone on. Missing is who is behind or publishes no more.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, minutes: float):
        super().__init__(daemon=True)
        self.store, self.rank, self.world_size, self.minutes = store, rank, world_size, minutes
        self.count = self.beats = 0
        atexit.register(self.publish, 2**62)  # a process that has ended is not missing

    def publish(self, count):
        self.beats += 1
        with contextlib.suppress(dist.DistError):  # the process with the store has ended
            self.store.set(str(self.rank), f"{count} {self.beats}")

    def published(self):
        """[count, beats] of each process, as text."""
        keys = [str(rank) for rank in range(self.world_size)]
        return [self.store.get(key).decode().split() if self.store.check([key]) else ["0", "0"] for key in keys]

    def missing(self, seen):
        before = self.published()
        self.publish(seen)
        time.sleep(5)
        pairs = enumerate(zip(before, self.published(), strict=True))
        return [str(rank) for rank, (a, b) in pairs if int(b[0]) < seen or (a == b and int(b[0]) == seen)]

    def run(self):
        seen, since = 0, time.monotonic()
        with contextlib.suppress(dist.DistError):  # without a store torch's own timeout remains
            while time.monotonic() < since + 60 * self.minutes or not (missing := self.missing(seen)):
                if self.count > seen:
                    seen, since = self.count, time.monotonic()
                self.publish(seen)
                time.sleep(1)
            waited = f"process {self.rank} waited {self.minutes:g} minutes for process {', '.join(missing)}"
            remedy = "look at its machine and its last lines, or wait longer with --ddp_timeout_minutes"
            print(f"train.py: {waited} of {self.world_size}, which is stuck or gone: {remedy}", file=sys.stderr)
            os._exit(2)


# ---- stopping


class Stopped(Exception):
    """Raised inside an evaluation when the run is to stop; its argument is the reason."""


class Stop:
    """Why a run is to end early: SIGINT, SIGTERM, SIGHUP, or max_hours.

    After the first signal the step is finished and saved; one that comes AGAIN seconds later ends the process at once.
    An earlier one counts as the same: torchrun passes on a signal that its workers may have got themselves.
    """

    TIME_IS_UP = 64  # the reason that is no signal
    AGAIN = 2.0

    def __init__(self, max_hours: float = 0.0):
        self.signal, self.seconds = 0, 3600 * max_hours or float("inf")
        self.began = self.asked = self.received = time.monotonic()

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
            numbers.append(signal.SIGHUP)  # the terminal was closed
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        if self.signal:
            if time.monotonic() >= self.received + self.AGAIN:
                os._exit(128 + number)
            return
        self.signal, self.received, name = number, time.monotonic(), signal.Signals(number).name
        text = f"finishing the step and saving; {name} again after {self.AGAIN:.0f} s stops at once"
        os.write(2, f"\n{name}: {text}\n".encode())

    def reason(self, save_seconds: float = 0.0) -> int:
        """0, the number of a signal, or TIME_IS_UP: another step as long as the last, and a save, would be too late.

        Called once a step.
        """
        now = time.monotonic()
        step, self.asked = now - self.asked, now
        late = now + step + save_seconds > self.began + self.seconds
        return int(self.signal) or self.TIME_IS_UP * late
