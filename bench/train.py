"""How fast a training step is, what it needs, and how that compares with the usual loop; on whatever device there is.

    python bench/train.py              # ours against the baseline, interleaved, under ten minutes
    python bench/train.py --scaling    # ms a step as T, B, C, L and V grow, against flops_per_token

The baseline is the same network as transformers' GPT2LMHeadModel with full logits in the usual loop: forward, loss,
backward, clip, AdamW. Every measurement is a process of its own, so that peaks of memory are its own too; the variants
take turns, and median and spread (smallest to largest) over the turns are printed.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from configurator import load_config  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from onecard.runtime import Batches  # noqa: E402
from onecard.shards import ShardWriter  # noqa: E402

SMALL = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=8, gradient_accumulation_steps=1)
LOGITS = dict(n_layer=2, n_head=6, n_embd=384, block_size=1024, batch_size=16, gradient_accumulation_steps=1)
M40 = dict(n_layer=12, n_head=6, n_embd=384, block_size=1024, batch_size=16, gradient_accumulation_steps=2)
M124 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16, gradient_accumulation_steps=2)
SETTINGS = {  # name: (network and batch, timed steps, turns, [variants: the first is what the others are divided by])
    "cpu": {
        "4 layers, 256 wide, T 256, B 8": (SMALL, 5, 5, ["baseline float32", "ours float32", "ours bfloat16"]),
        "peak at 16 x 1024 x 50304": (LOGITS, 1, 1, ["baseline float32", "ours float32", "ours bfloat16"]),
    },
    "cuda": {
        "40.56M, 16 x 1024": (M40, 10, 2, ["baseline float16 compile", "ours float16 compile", "ours float16"]),
        "124M, 16 x 1024": (M124, 10, 2, ["baseline float16 compile", "ours float16 compile"]),
    },
}


def make_data(folder):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        with ShardWriter(folder / f"bench_{split}_000000.bin") as shard:
            shard.write(rng.integers(0, 50257, 500_000).astype(np.uint16))


def config_of(network, dtype, compiled, folder):
    keys = dict(network, dtype=dtype, compile=compiled, data_dir=folder, dataset="data", out_dir=folder, eval_only=True)
    keys |= dict(learning_rate=1e-4, min_lr=0, warmup_iters=0, max_iters=1000)
    return load_config(train.TrainConfig, [f"--{k}={v}" for k, v in keys.items()])


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def hugging_face(config, runtime):
    """The baseline: -> (model whose call gives the loss, AdamW)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head)
    drop = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, **sizes, **drop)).to(runtime.device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)


def usual_loop(model, optimizer, scaler, batches, config, runtime, micro_steps):
    for _ in range(micro_steps):
        inputs, targets = batches.next()
        with runtime.autocast():
            logits = model(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / micro_steps
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def measure(variant, network, steps, folder):
    """In a process of its own: -> tokens/s, parts of a step in ms, peak memory in bytes."""
    who, dtype, *rest = variant.split()
    run = train.start_run(config_of(network, dtype, who == "ours" and "compile" in rest, folder))
    config, runtime = run.config, run.runtime
    batches = Batches(run.train_blocks, run.batch_size, runtime)
    if who == "ours":
        step = lambda: train.train_step(run, batches)  # noqa: E731
    else:
        run.model = run.compiled = run.optimizers = None
        model, optimizer = hugging_face(config, runtime)
        model = torch.compile(model) if "compile" in rest else model
        step = lambda: usual_loop(model, optimizer, run.scaler, batches, config, runtime, run.micro_steps)  # noqa: E731
    for _ in range(1 if steps == 1 else 3):
        step()
    synchronize(runtime.device)
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        synchronize(runtime.device)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    result = dict(tokens_per_s=config.step_tokens / seconds, ms=1000 * seconds)
    if runtime.peak_flops:
        result["mfu"] = result["tokens_per_s"] * run.model.flops_per_token() / runtime.peak_flops if run.model else 0
    cuda = runtime.device.type == "cuda"
    result["peak"] = (
        torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    if who == "ours":
        result |= parts(run, batches, steps)
    return result


def parts(run, batches, steps):
    """ms of one micro batch's data wait, forward and backward, and of the optimizer, each with synchronisation."""
    device, seconds = run.runtime.device, dict(data=[], forward=[], backward=[], optimizer=[])
    for _ in range(steps):
        marks = [time.perf_counter()]

        def mark(marks=marks):
            synchronize(device)
            marks.append(time.perf_counter())

        inputs, targets = batches.next()
        mark()
        with run.runtime.autocast():
            loss = run.compiled(inputs, targets)
        mark()
        run.scaler.scale(loss).backward()
        mark()
        run.scaler.unscale_(run.optimizers[-1])
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.scaler.step(run.optimizers[-1])
        run.scaler.update()
        run.optimizers[-1].zero_grad(set_to_none=True)
        mark()
        for name, a, b in zip(seconds, marks, marks[1:], strict=False):
            seconds[name].append(b - a)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def in_a_process(variant, network, steps, folder):
    command = [sys.executable, __file__, "--measure", json.dumps([variant, network, steps, str(folder)])]
    environment = dict(os.environ)
    if variant.startswith("baseline"):
        environment["THP_MEM_ALLOC_ENABLE"] = "0"  # torch's default: our huge pages are part of what is compared
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{variant}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values, digits=0):
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def compare(folder, device):
    for name, (network, steps, turns, variants) in SETTINGS[device].items():
        print(f"\n{name}: {turns} turns of {steps} steps\n")
        print("| variant | tokens/s | over the first | ms a step | data, forward, backward, optimizer | GiB | MFU |")
        print("|---|---|---|---|---|---|---|")
        results = {variant: [] for variant in variants}
        for _ in range(turns):
            for variant in variants:
                results[variant].append(in_a_process(variant, network, steps, folder))
        for variant, rows in results.items():
            ratios = [r["tokens_per_s"] / b["tokens_per_s"] for r, b in zip(rows, results[variants[0]], strict=True)]
            split = ", ".join(f"{rows[0][k]:.1f}" for k in ("data", "forward", "backward", "optimizer") if k in rows[0])
            cells = [
                variant,
                spread([r["tokens_per_s"] for r in rows]),
                spread(ratios, 2),
                spread([r["ms"] for r in rows]),
            ]
            cells += [split, f"{max(r['peak'] for r in rows) / 2**30:.2f}"]
            print(
                "| " + " | ".join([*cells, f"{rows[0]['mfu']:.1%}" if rows[0].get("mfu") else "-"]) + " |", flush=True
            )


def scaling(folder, device):
    """ms a step at five points of each dimension, and nanoseconds a GFLOP of flops_per_token: level where it holds."""
    base = dict(SMALL, n_layer=2, block_size=128, batch_size=4) if device == "cpu" else dict(M40, n_layer=4)
    dtype = "float32" if device == "cpu" else "float16"
    points = dict(block_size=2, batch_size=2, n_embd=2, n_layer=2)
    print("\n| grown | value | ms a step | GFLOP a step | ms a GFLOP |\n|---|---|---|---|---|")
    for name in [*points, "vocab_size"]:
        for power in range(5):
            first = 50304 if name == "vocab_size" else base[name] // 2 or 1
            value = first * (power + 1) if name == "vocab_size" else first * 2**power
            network = {**base, name: value}
            row = in_a_process(f"ours {dtype}", network, 3, folder)
            tokens = network["batch_size"] * network["block_size"] * network["gradient_accumulation_steps"]
            with torch.device("meta"):
                config = config_of(network, dtype, False, folder)
                gflop = tokens * GPT(GPTConfig(**config.model_args())).flops_per_token() / 1e9
            print(f"| {name} | {value} | {row['ms']:.0f} | {gflop:.1f} | {row['ms'] / gflop:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure)[:3], Path(json.loads(options.measure)[3]))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, commit {commit or 'unknown'}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        make_data(Path(folder) / "data")
        (scaling if options.scaling else compare)(Path(folder), device)


if __name__ == "__main__":
    main()
