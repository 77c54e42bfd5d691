"""Trains, is killed with kill -9 at random moments, resumes, and is compared with a run never stopped, bit for bit.

    python bench/soak.py --kills=50       # five to twenty minutes on a CPU

A quarter of the kills come at a random time, from outside; the others at a random system call of a save (inside a
write, before a sync, a rename, a second name, a removal), by a hook that this script sets before it calls train.main.
After every kill the newest checkpoint must be, bit for bit, what the uninterrupted run had at that step, and nothing
broken may bear a final name; a run that has reached its end must have its weights, moments and metrics.
"""

import argparse
import collections
import os
import pathlib
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from runs import read_metrics  # noqa: E402

from onecard import checkpoint  # noqa: E402
import train  # noqa: E402
from onecard.shards import ShardWriter, write_manifest  # noqa: E402

STEPS, SAVE_EVERY = 400, 10
SETTINGS = dict(
    block_size=32,
    vocab_size=256,
    n_layer=2,
    n_head=2,
    n_embd=64,
    batch_size=2,
    gradient_accumulation_steps=4,
    max_iters=STEPS,
    warmup_iters=20,
    learning_rate=3e-3,
    min_lr=3e-4,
    eval_interval=SAVE_EVERY,
    keep_every=SAVE_EVERY,
    log_interval=3,
    eval_tokens=256,
    dropout=0.1,
    device="cpu",
    dtype="float32",
    compile=False,
    init_from="auto",
    dataset="words",
)


def make_data(folder):
    """Half a million bytes of this project's own code as tokens: one shard to train on, one to validate on."""
    text = b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))
    ids = np.frombuffer((text * 3)[:500_000], dtype=np.uint8)
    (folder / "words").mkdir()
    rows = []
    for split, part in (("train", ids[20_000:]), ("val", ids[:20_000])):
        with ShardWriter(folder / "words" / f"{split}_000000.bin") as shard:
            shard.write(part)
        row = dict(name=shard.path.name, split=split, tokens=len(part), documents=1, text_bytes=len(part))
        rows.append(row | dict(sha256=shard.sha256, source="code", row_groups=[0, 1]))
    tokenizer = dict(name="bytes", sha256="0" * 64, n_vocab=256, eot=0)
    write_manifest(folder / "words", dict(version=1, tokenizer=tokenizer, shards=rows, skipped={}, settings={}))


# ---- the process that is killed


def die_at(deadly, argv):
    """Trains, and kills itself before the system call of a save that has this number; if negative, inside a write."""
    counts = collections.Counter()

    def stage(name, kind=1):
        counts[kind] += kind
        if counts[kind] == deadly:
            os.write(1, f"\nkilled before {name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name, describe):
        call = getattr(owner, name)

        def wrapped(*args, **keys):
            if what := describe(*args):
                stage(what)
            return call(*args, **keys)

        setattr(owner, name, wrapped)

    def short(path):
        name = os.path.basename(path)
        return "a temporary name" if name.endswith(".tmp") else "ckpt_step" if "ckpt_step" in name else name

    def write(self, data, call=checkpoint._HashingFile.write):
        if len(data) < 10_000:
            return call(self, data)
        call(self, data[: len(data) // 2])
        self.file.flush()
        stage("the second half of a write", kind=-1)
        return len(data) // 2 + call(self, data[len(data) // 2 :])

    checkpoint._HashingFile.write = write
    before(checkpoint, "verify", lambda path: "reading it back" if str(path).endswith(".tmp") else None)
    before(os, "fsync", lambda descriptor: "a sync")
    before(os, "replace", lambda a, b: f"renaming to {short(b)}")
    before(os, "link", lambda a, b: f"linking for {short(b.name.split('.')[0] + '.pt')}")
    before(pathlib.Path, "unlink", lambda path, **_: f"removing {short(path)}")
    torch.set_num_threads(1)
    train.main(argv)


# ---- the one that kills


def start(argv, deadly=0):
    hook = [str(Path(__file__).resolve()), f"--deadly={deadly}"] if deadly else [str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *hook, *argv], cwd=ROOT, env=environment, **pipe)


def kill_once(draw, argv, seconds):
    """Starts the training and kills it -> where, or None if it came to its end first."""
    deadly = draw.choice((0, draw.randint(1, 70), draw.randint(1, 70), -draw.randint(1, 90)))
    process = start(argv, deadly)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("device "):
            break
    reader = threading.Thread(target=lambda: said.extend(process.stdout))
    reader.start()
    if not deadly:
        time.sleep(draw.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
    code = process.wait()
    reader.join()
    if code == 0:
        return None
    assert code == -signal.SIGKILL, "".join(said)
    return said[-1].strip() if deadly else "killed at a random time"


def differences(a, b):
    """The names of what is not the same bit for bit in two states."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() ^ b.keys(), key=str)
        return keys + [f"{key}.{name}" for key in a.keys() & b.keys() for name in differences(a[key], b[key])]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [f"{i}.{name}" for i, (x, y) in enumerate(zip(a, b, strict=True)) for name in differences(x, y)]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [""]


def compare_state(out_dir, whole):
    """-> (step of the newest checkpoint or None, what is wrong with it)."""
    candidates = checkpoint.candidates(out_dir)
    if not candidates:
        return None, []
    state, _, problems = checkpoint.load_newest(out_dir)
    for other in candidates:
        checkpoint.verify(other)
    expected = checkpoint.load(whole / checkpoint.STEP.format(state["iter_num"]))
    for each in (state, expected):
        del each["config"]  # names the folder
    return state["iter_num"], problems + differences(state, expected)


def run_to_end(argv):
    process = start(argv)
    said = process.communicate()[0]
    assert process.returncode == 0, said


def soak(folder, kills, seed):
    """-> ([(where, step, what is wrong)], [what is wrong with each run that has ended])."""
    draw, whole = random.Random(seed), folder / "whole"
    flags = [f"--{key}={value}" for key, value in {**SETTINGS, "data_dir": folder}.items()]
    began = time.monotonic()
    run_to_end([*flags, f"--out_dir={whole}"])
    seconds = (time.monotonic() - began) / 8  # of training before a kill, at most
    done, ended, runs = [], [], 1
    while True:
        out_dir = folder / f"run{runs}"
        argv = [*flags, f"--out_dir={out_dir}"]
        where = kill_once(draw, argv, seconds) if len(done) < kills else run_to_end(argv)
        if where:
            step, wrong = compare_state(out_dir, whole)
            done.append((where, step, wrong))
            print(f"{len(done):>4}  run {runs:>2}  {where:<45} step {step}  {wrong or 'the same'}", flush=True)
            continue
        wrong = compare_state(out_dir, whole)[1] + ["metrics"] * (
            read_metrics(out_dir, "train", "eval", "event") != read_metrics(whole, "train", "eval", "event")
        )
        wrong += [str(path) for path in out_dir.glob("*.tmp")]
        ended.append(wrong)
        print(f"      run {runs:>2}  came to its end: {wrong or 'the same'}", flush=True)
        if len(done) >= kills:
            return done, ended
        runs += 1


def report(done, ended, seed):
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    print(f"\n{platform.platform()}, {os.cpu_count()} CPU cores, torch {torch.__version__}", end="")
    print(f", commit {commit.stdout.strip()}, seed {seed}\n\n| killed | times | checkpoint the same |\n|---|---|---|")
    places = collections.Counter(where for where, *_ in done)
    right = collections.Counter(where for where, _, wrong in done if not wrong)
    for where, times in sorted(places.items(), key=lambda pair: (-pair[1], pair[0])):
        print(f"| {where.removeprefix('killed ')} | {times} | {right[where]} |")
    print(
        f"\n{sum(right.values())} of {len(done)} kills left a newest checkpoint that is, bit for bit, that of the run "
        f"never stopped ({sum(step is None for _, step, _ in done)} of them before the first checkpoint); "
        f"{sum(not wrong for wrong in ended)} of {len(ended)} runs of {STEPS} steps ended with its weights, moments "
        "and metrics"
    )
    return 0 if not any(ended) and sum(right.values()) == len(done) else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadly", type=int, default=0, help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.deadly:
        die_at(args.deadly, rest)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        done, ended = soak(Path(folder), args.kills, args.seed)
    raise SystemExit(report(done, ended, args.seed))


if __name__ == "__main__":
    main()
