"""What the tests of training share: a tiny run, what it leaves, and a process that is watched while it runs."""

import itertools
import json
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from onecard import checkpoint
from onecard.shards import ShardWriter, write_manifest

ROOT = Path(__file__).resolve().parents[1]
WALL_CLOCK = ("ms_per_step", "tokens_per_s", "eval_seconds", "data_share", "hours_left")
NEVER = "(?!)"  # a pattern that no line matches
TINY = dict(
    block_size=16,
    vocab_size=96,
    n_layer=2,
    n_head=2,
    n_embd=32,
    batch_size=2,
    gradient_accumulation_steps=4,
    warmup_iters=2,
    learning_rate=1e-2,
    min_lr=1e-3,
    eval_tokens=320,
    dropout=0.1,
    device="cpu",
    dtype="float32",
    compile=False,
)


def flags_of(**keys):
    return [f"--{k}={v}" for k, v in keys.items()]


def write_dataset(folder, n_vocab=96, **splits):
    """A finished dataset. splits: train=[ids of a shard, ...], val=[...]."""
    folder.mkdir(parents=True)
    rows = []
    for split, shards in splits.items():
        for number, ids in enumerate(shards):
            with ShardWriter(folder / f"{split}_{number:06d}.bin") as shard:
                shard.write(ids)
            row = dict(name=shard.path.name, split=split, tokens=len(ids), documents=1, text_bytes=4 * len(ids))
            rows.append(row | dict(sha256=shard.sha256, source="made up", row_groups=[0, 1]))
    tokenizer = dict(name="made up", sha256="0" * 64, n_vocab=n_vocab, eot=0)
    write_manifest(folder, dict(version=1, tokenizer=tokenizer, shards=rows, skipped={}, settings={}))


def write_characters(folder, text, characters=None):
    """What nanoGPT's data/shakespeare_char/prepare.py makes of a text: nine tenths are for training."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted(set(text)) if characters is None else characters
    id_of = {character: i for i, character in enumerate(characters)}
    ids, n = np.array([id_of[character] for character in text], dtype=np.uint16), int(len(text) * 0.9)
    ids[:n].tofile(folder / "train.bin")
    ids[n:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": id_of}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


# ---- what a run leaves


def read_metrics(out_dir, *kinds):
    """The lines of some kinds, without the numbers that a clock measured."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines if line["kind"] in kinds]


def files_of(folder, pattern="ckpt*"):
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def assert_same(a, b):
    """Bit for bit, through nested dicts and lists."""
    flat_a, spec_a = torch.utils._pytree.tree_flatten(a)
    flat_b, spec_b = torch.utils._pytree.tree_flatten(b)
    assert spec_a == spec_b
    for x, y in zip(flat_a, flat_b, strict=True):
        assert type(x) is type(y)
        assert (x.dtype == y.dtype and torch.equal(x, y)) if isinstance(x, torch.Tensor) else x == y


def assert_same_run(a, b):
    """Weights, optimizers, progress and metrics of two finished runs are the same bit for bit; b has no leftovers."""
    states = [checkpoint.load(folder / "ckpt.pt") for folder in (a, b)]
    for state in states:
        del state["config"]  # names the folder
        state.pop("launch", None)  # of torchrun
    assert_same(*states)
    lines = [read_metrics(folder, "train", "eval", "event") for folder in (a, b)]
    assert lines[0] == lines[1] and len(lines[0]) > 1
    assert not list(b.glob("*.tmp"))


# ---- processes


class Watched:
    """A process whose lines are read while it runs; `printed`: those that were waited for."""

    def __init__(self, command):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self.process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **pipes)
        self.printed, self.lines = [], queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def wait_for(self, pattern):
        """The next line that has `pattern` in it; None if the process ended without one."""
        while (line := self.lines.get(timeout=120)) is not None:
            self.printed.append(line)
            if re.search(pattern, line):
                return line
        return None

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """(exit code, everything printed), when the process has ended."""
        self.wait_for(NEVER)
        return self.process.wait(120), "".join(self.printed)


def fork(action, *args, seconds=0.0):
    """action(*args) in a forked process, killed after so many seconds if given -> 0, or -9 if it was killed.

    For processes that Watched started for it: to fork takes milliseconds, to import torch seconds.
    """
    child = os.fork()
    if child == 0:
        try:
            action(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    if seconds and code:
        print("\nkilled at a random time", flush=True)
    return code


def kill_before_call(number):
    """This process will kill itself before the system call of a save with this number. Large writes count twice."""
    numbers = itertools.count(1)

    def counted(name, call):
        def wrapped(*args, **keys):
            if next(numbers) == number:
                os.write(1, f"\nkilled before {name}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **keys)

        return wrapped

    def write_halves(self, data, write=checkpoint._HashingFile.write):
        if len(data) < 300:  # about a hundred writes of padding
            return write(self, data)
        half = len(data) // 2
        first = counted("write", write)(self, data[:half])
        self.file.flush()  # a kill leaves what was written
        return first + counted("second half of a write", write)(self, data[half:])

    checkpoint._HashingFile.write = write_halves
    for owner, name in ((os, "fsync"), (os, "replace"), (os, "link"), (Path, "unlink"), (checkpoint, "verify")):
        setattr(owner, name, counted(name, getattr(owner, name)))
