"""Does plan.py predict the peak memory and the hours of a run? Runs train.py, a process of its own for each setting.

    python bench/plan_memory.py                 (CPU, about ten minutes; prints two tables)
    python bench/plan_memory.py --seconds       (the second table only)

Measured is the peak resident memory that the system reports for the process when it has ended (Linux). A setting is
good to 15%. Tokens are random: neither table depends on what the network learns.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from onecard import plan  # noqa: E402
from configurator import load_config  # noqa: E402
from train import TrainConfig  # noqa: E402

SMALL = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=8, gradient_accumulation_steps=1)
MEDIUM = dict(n_layer=6, n_head=6, n_embd=384, block_size=512, batch_size=8, gradient_accumulation_steps=1)
LARGE = dict(n_layer=12, n_head=12, n_embd=768, block_size=256, batch_size=4, gradient_accumulation_steps=1)
SETTINGS = {
    "16M, 2,048 tokens, bf16": SMALL,
    "16M, 2,048 tokens, fp32, two micro batches": SMALL | dict(dtype="float32", gradient_accumulation_steps=2),
    "16M, 2,048 tokens, bf16, compiled": SMALL | dict(compile=True),
    "16M, 2,048 tokens, bf16, vocabulary of 512": SMALL | dict(vocab_size=512),
    "30M, 4,096 tokens, bf16": MEDIUM,
    "30M, 4,096 tokens, bf16, dropout": MEDIUM | dict(dropout=0.1),
    "30M, 4,096 tokens, fp32, activation checkpointing": MEDIUM | dict(activation_checkpointing=True, dtype="float32"),
    "30M, 4,096 tokens, bf16, qwen3 with Muon": MEDIUM | dict(arch="qwen3", optimizer="muon"),
    "124M, 1,024 tokens, bf16": LARGE,
    "124M, 1,024 tokens, fp32": LARGE | dict(dtype="float32"),
}


def make_data(folder):
    (folder / "random").mkdir()
    for split, tokens in (("train", 2_000_000), ("val", 200_000)):
        np.random.default_rng(0).integers(0, 500, tokens).astype("<u2").tofile(folder / "random" / f"{split}.bin")


def run(folder, settings):
    """-> (peak bytes, [(seconds since the start, line)]) of train.py with these keys."""
    keys = dict(data_dir=folder, dataset="random", out_dir=folder / "out", overwrite=True, compile=False) | settings
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in keys.items())]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process, lines = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, **pipes), []
    for line in process.stdout:
        lines.append((time.perf_counter(), line))
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("".join(line for _, line in lines[-5:]))
    return usage.ru_maxrss * 1024, lines


def memory_table(folder):
    print("| network, micro batch | predicted GiB | measured GiB | error |\n|---|---|---|---|")
    for name, settings in SETTINGS.items():
        keys = settings | dict(max_iters=4, eval_interval=2, eval_tokens=4096, warmup_iters=1, log_interval=1)
        measured, _ = run(folder, keys)
        config = load_config(TrainConfig, ["--compile=False", *(f"--{key}={value}" for key, value in keys.items())])
        predicted = sum(plan.memory(config, "cpu", wide=config.dtype == "float32").values())
        row = f"| {name} | {predicted / 2**30:.2f} | {measured / 2**30:.2f} | {predicted / measured - 1:+.0%} |"
        print(row, flush=True)


def seconds_table(folder):
    """The time from step 50 to the end: what the first 50 steps say, and what it took."""
    print("\n| network, micro batch | predicted seconds | measured seconds | error |\n|---|---|---|---|")
    tiny = dict(n_layer=2, n_head=2, n_embd=128, block_size=128, batch_size=8, gradient_accumulation_steps=1)
    for name, steps in {"2 layers, 128 wide": 150, "the same, vocabulary of 512": 1500}.items():
        keys = tiny | dict(vocab_size=512 if steps > 150 else 50304)
        keys |= dict(max_iters=steps, eval_interval=steps // 3, eval_tokens=16384, log_interval=50, warmup_iters=10)
        _, lines = run(folder, keys)
        records = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
        left = next(record["hours_left"] for record in records if record["kind"] == "train")  # at step 50
        begun = next(t for t, line in lines if re.match(r"step +50 ", line))
        took = next(t for t, line in lines if line.startswith("done")) - begun
        print(f"| {name} | {3600 * left:.0f} | {took:.0f} | {3600 * left / took - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name))
        if "--seconds" not in sys.argv:
            memory_table(Path(name))
        seconds_table(Path(name))
