"""How long a save holds up training, in milliseconds, and how long the whole of it takes in its thread.

    python bench/save_stall.py --repeats=9        # minutes on a CPU; needs 10 GB of memory and of disk

A real save of the 40M and the 124M network with AdamW's two moments, by train.save: what stalls is the check that the
weights are finite, the sync of the metrics and the copy to host memory; the SHA-256, the write, the sync and the
reading back happen meanwhile. Between two repeats the write is waited for, as training longer than a write would. The
processor time of the stall is what it would be on a machine that does nothing else (on a CPU; a card is waited for).
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from onecard import checkpoint  # noqa: E402
import train  # noqa: E402
from configurator import load_config  # noqa: E402
from onecard.shards import ShardWriter  # noqa: E402

NETWORKS = {"40M": dict(n_layer=12, n_head=12, n_embd=384), "124M": dict(n_layer=12, n_head=12, n_embd=768)}


def start(folder, network, device):
    """-> a Run at its beginning, with moments as after a step."""
    settings = dict(data_dir=folder, dataset="random", out_dir=folder / "out", overwrite=True, device=device)
    settings |= dict(NETWORKS[network], block_size=1024, vocab_size=50304, batch_size=1, compile=False)
    (folder / "out").mkdir(exist_ok=True)
    run = train.start_run(load_config(train.TrainConfig, [f"--{key}={value}" for key, value in settings.items()]))
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in run.optimizers:
        optimizer.step()
    run.model.zero_grad(set_to_none=True)
    return run


def measure(run, repeats):
    """-> milliseconds of (stall, its processor time, the copy alone, the whole write in the thread), a list of each."""
    stalls, processor, copies, writes = [], [], [], []
    for repeat in range(repeats + 1):  # the first is not counted: memory and disk are touched for the first time
        run.progress.step += 1
        began, used = time.perf_counter(), time.thread_time()
        train.save(run)
        stalls.append(1000 * (time.perf_counter() - began))
        processor.append(1000 * (time.thread_time() - used))
        run.saver.wait()
        writes.append(1000 * run.saver.seconds)
        began = time.perf_counter()
        state = dict(model=run.model.state_dict(), optimizers=[o.state_dict() for o in run.optimizers])
        checkpoint.snapshot(state, run.saver.memory)
        copies.append(1000 * (time.perf_counter() - began))
        print(f"  {repeat}: stall {stalls[-1]:.0f} ms, {processor[-1]:.0f} of the processor", flush=True)
    run.saver.close()
    run.metrics.close()
    return stalls[1:], processor[1:], copies[1:], writes[1:]


def spread(numbers):
    return f"{statistics.median(numbers):,.0f} ({min(numbers):,.0f} to {max(numbers):,.0f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "random").mkdir()
        for split in ("train", "val"):
            with ShardWriter(folder / "random" / f"{split}.bin") as shard:
                shard.write(np.random.default_rng(0).integers(0, 50257, 5000))
        for network in NETWORKS:
            run = start(folder, network, args.device)
            results = measure(run, args.repeats)
            size = (folder / "out" / checkpoint.LATEST).stat().st_size / 1e6
            rows.append(f"| {network} | {size:,.0f} | {' | '.join(map(spread, results))} |")
            del run
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    print(f"\n{platform.platform()}, {name}, {args.threads} torch threads, torch {torch.__version__}", end="")
    print(f", commit {commit.stdout.strip()}, {args.repeats} repeats, median (least to most)\n")
    head = ("network", "MB", "stall of training, ms", "its processor time", "the copy alone", "write in the thread")
    print("\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]))


if __name__ == "__main__":
    main()
