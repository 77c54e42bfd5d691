"""One training state on disk: saved whole or not at all, checked after writing and when loaded, kept and pruned.

A checkpoint is a torch file with the keys that nanoGPT users know (model, optimizer, model_args, iter_num,
best_val_loss, config) and more; torch.load reads it. Behind its end stands a trailer with its step and the SHA-256 of
all before it, because torch.load notices hardly any flipped bit. Only tensors and plain Python are in it, and it is
loaded with weights_only=True: nothing of it can run. In out_dir: ckpt.pt is the latest, ckpt_previous.pt the one before
it, ckpt_best.pt the one with the best val loss, ckpt_step_*.pt those that keep_every asks for.
"""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from onecard import durable
from model import GPT, GPTConfig

VERSION = 1
LATEST, PREVIOUS, BEST, STEP = "ckpt.pt", "ckpt_previous.pt", "ckpt_best.pt", "ckpt_step_{:09d}.pt"
BEFORE_DECAY = "ckpt_before_decay.pt"  # where a longer wsd run can go on from
NEW = "ckpt_new.pt"  # of a save that has not ended
TRAILER = re.compile(rb"onecard step (\d{12}) \1 sha256 ([0-9a-f]{64})\n")  # the step twice: a flip in it is seen
TRAILER_BYTES = 13 + 12 + 1 + 12 + 8 + 64 + 1


class CheckpointError(ValueError):
    """A checkpoint that is not there, not whole, or cannot be written: which file, why, what to do."""


class _HashingFile:
    """Just enough of a file for torch.save: what is written is hashed too, and an OSError kept, which torch hides."""

    def __init__(self, file):
        self.file, self.sha256, self.error, self.bytes = file, hashlib.sha256(), None, 0

    def write(self, data):
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        self.bytes += len(data)
        return written

    def flush(self):
        self.file.flush()


def write(path, state):
    """Writes `state` (nested dicts and lists of tensors and plain Python) so that `path` is the old file or the new
    one, and the new one only after it has been read back. Raises CheckpointError with the bytes that did not fit."""
    path, hashing = Path(path), None
    try:
        with durable.replacing(path, check=verify) as file:
            hashing = _HashingFile(file)
            torch.save({"version": VERSION, **state}, hashing)
            step, digest = state["iter_num"], hashing.sha256.hexdigest().encode()
            file.write(b"onecard step %012d %012d sha256 %s\n" % (step, step, digest))
    except (OSError, RuntimeError) as error:
        error = (hashing and hashing.error) or error
        if not isinstance(error, OSError):
            raise
        raise not_written(path, error, hashing.bytes if hashing else 0) from error


def not_written(path, error, reached):
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    return CheckpointError(
        f"{path}: could not be written ({error.strerror}, after {reached:,} bytes); {free:,} bytes are free there: "
        "make room and resume; the older checkpoints are as they were"
    )


def read_trailer(path):
    """-> (step, SHA-256 in hex, bytes before the trailer). Raises CheckpointError if there is no trailer."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TRAILER_BYTES))
        found = TRAILER.fullmatch(file.read())
    if not found:
        raise CheckpointError(f"{path}: no whole checkpoint of onecard: no SHA-256 at the end of its {size:,} bytes")
    return int(found[1]), found[2].decode(), size - TRAILER_BYTES


def verify(path):
    """Raises CheckpointError unless every bit of the file is as it was written."""
    _, expected, size = read_trailer(path)
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 22))):
            sha256.update(chunk)
            size -= len(chunk)
    if sha256.hexdigest() != expected:
        raise CheckpointError(f"{path}: damaged: its bytes do not have the SHA-256 that was written with them")


def load(path):
    """The state that `write` wrote, its tensors on the CPU. Raises CheckpointError unless every bit is as written."""
    try:
        verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no checkpoint here; train first, or mend out_dir") from None
    except (pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def candidates(out_dir):
    """The checkpoints of a run, the newest first: by the step in them, for clocks can be set back. Those without a
    readable step come before them, so that whoever takes the first whole one has met and named what is broken."""
    found = []
    for path in Path(out_dir).glob("ckpt*.pt"):
        try:
            step = read_trailer(path)[0]
        except (CheckpointError, OSError):
            step = 10**12
        found.append((step, path.name == LATEST, path))
    return [path for *_, path in sorted(found, reverse=True)]


def newest(out_dir):
    """-> "ckpt.pt of step 2000": the checkpoint that `load_newest` would load, or None."""
    for path in candidates(out_dir):
        with contextlib.suppress(CheckpointError, OSError):
            verify(path)
            return f"{path.name} of step {read_trailer(path)[0]}"


def load_newest(out_dir):
    """-> (state, path, [what is wrong with each newer one that is damaged]). CheckpointError if none is whole."""
    problems = []
    for path in candidates(out_dir):
        try:
            return load(path), path, problems
        except CheckpointError as error:
            problems.append(str(error))
    where = Path(out_dir) / LATEST
    raise CheckpointError("; ".join(problems) or f"{where}: there is no checkpoint; start a run first")


def remove_all(out_dir):
    """Makes room for a new run: takes every checkpoint out of a folder."""
    for path in candidates(out_dir):
        path.unlink(missing_ok=True)


def load_model(path):
    """-> (GPT with the trained weights on the CPU, in eval mode; the rest of the checkpoint as a dict)."""
    state = load(path)
    model = GPT(GPTConfig(**state["model_args"]))
    model.load_state_dict(state.pop("model"))
    return model.eval(), state


def snapshot(state, memory, copied=None):
    """A copy of nested dicts and lists with all tensors on the CPU, which training can no longer change.

    memory: dict that keeps the copies, for the next snapshot to write over: new memory takes several times as long as
    the copying. A tensor that stands in it twice (the tied embedding) is copied once and stands in the copy twice.
    """
    copied = set() if copied is None else copied
    if isinstance(state, torch.Tensor):
        place = (state.data_ptr(), state.shape, state.dtype)
        if place not in memory:
            memory[place] = state.detach().to("cpu", copy=True)
        elif place not in copied:
            memory[place].copy_(state.detach())
        copied.add(place)
        return memory[place]
    if isinstance(state, dict):
        return {key: snapshot(value, memory, copied) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value, memory, copied) for value in state)
    return state


class Saver:
    """Writes the checkpoints of one run in a thread: training waits for the copy to host memory only.

    keep_every: every so many steps one is kept for good. `seconds`: how long the last write took. A failed write is
    raised at the next call of any method.
    """

    def __init__(self, out_dir, keep_every=0):
        self.out_dir, self.keep_every = Path(out_dir), keep_every
        self.thread, self.writing, self.seconds, self.memory = ThreadPoolExecutor(1), None, 0.0, {}

    def save(self, state, names=()):
        """Saves as ckpt.pt, and under other names (BEST, BEFORE_DECAY) too."""
        self.wait()
        self.writing = self.thread.submit(self._write, snapshot(state, self.memory), names)

    def _write(self, state, names):
        began = time.monotonic()
        new, latest, step = self.out_dir / NEW, self.out_dir / LATEST, state["iter_num"]
        write(new, state)  # and read back: only then does an older one lose a name
        keep = self.keep_every and step % self.keep_every == 0
        try:
            if latest.exists():
                durable.second_name(latest, PREVIOUS)
            for name in [LATEST, *names, *[STEP.format(step)] * keep]:
                durable.second_name(new, name)
            new.unlink()
        except OSError as error:
            raise not_written(latest, error, 0) from error
        self.seconds = time.monotonic() - began

    def poll(self):
        """Raises what went wrong in a write that has ended; does not wait for one that has not."""
        if self.writing and self.writing.done():
            self.wait()

    def wait(self):
        """Returns when the last save is on disk."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()

    def close(self):
        self.thread.shutdown()
        self.wait()


def check_room(out_dir, parameters, steps, keep_every, resumed):
    """Raises CheckpointError if the checkpoints of a run will not fit: weights and two moments in float32, five files
    at once (a new one while latest, previous, best and before_decay stand) and those kept for good.

    The ones that are there make room, but for those kept for good; two names of a file are one file.
    """
    out_dir = Path(out_dir)
    kept = {path.stat().st_ino for path in out_dir.glob(STEP.replace("{:09d}", "*"))} if resumed else ()
    old = {path.stat().st_ino: path.stat().st_size for path in candidates(out_dir)}
    free = shutil.disk_usage(out_dir).free + sum(size for inode, size in old.items() if inode not in kept)
    need = (12 * parameters + 2**20) * (5 + (steps // keep_every if keep_every else 0))
    if need > free:
        raise CheckpointError(
            f"out_dir={out_dir}: the checkpoints of this run need {need:,} bytes at their most, {free:,} are free: "
            "make room, or give an --out_dir on another disk" + ", or a larger --keep_every" * bool(keep_every)
        )
