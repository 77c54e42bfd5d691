"""How fast is a step of training, how much memory does it need, and is the predicted memory right?

    python bench/train.py                        # ours and the usual loop; --setting=small --turns=3 is a part of it
    python bench/train.py --against=FOLDER       # ours and train.py in FOLDER, a checkout of another commit
    python bench/train.py --scaling              # ms per step as T, B, C, L and V grow; or --memory, see below
    python bench/train.py --gpu --out=out/gpu    # all that needs a card, into a folder; again for what is left

Ours is train.py as a user runs it, with two evaluations and a checkpoint in its peak memory. The usual loop has the
same network as transformers' GPT2LMHeadModel, and all logits. Each measurement is a process of its own; the variants
take turns. Printed are median (smallest to largest) over the turns; ratios are taken within a turn.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import M40, ROOT, SMALL, header, in_a_process, interleaved, machine, ratios, row, spread, train_py

import train
from model import GPTConfig
from onecard import plan, pretrained
from onecard.memory import trace_memory
from onecard.runtime import Batches, start_runtime
from onecard.shards import ShardWriter
from onecard.windows import Windows

GiB = 2**30
WARM_UP = 3  # steps at the start that are not counted
LOGITS = dict(n_layer=2, n_head=6, n_embd=384, block_size=1024, batch_size=16, gradient_accumulation_steps=1)
ON_CPU, ON_CARD = ["float32", "bfloat16"], ["float16 compile", "float16 compile fast", "float16"]
FAST = dict(arch="qwen3", optimizer="normuon")  # of the kinds with "fast" in their name
SETTINGS = {  # name: network and batch, steps that are counted, turns, kinds; the usual loop is of the first kind
    "cpu": {"small": (SMALL, 5, 5, ON_CPU), "logits": (LOGITS, 1, 1, ON_CPU)},
    "cuda": {"40M": (M40, 10, 2, ON_CARD), "124M": (M40 | dict(n_head=12, n_embd=768), 10, 2, ON_CARD[:2])},
}

# ---- one measurement


def write_data(folder):
    """Random tokens: neither speed nor memory depends on what they are."""
    rng = np.random.default_rng(0)
    (folder / "random").mkdir()
    for split in ("train", "val"):
        with ShardWriter(folder / "random" / f"bench_{split}_000000.bin") as shard:
            shard.write(rng.integers(0, 500, 500_000).astype(np.uint16))


def short_run(keys, steps, folder):
    """The keys of a run of so many steps, with an evaluation on one micro batch at its start and its end."""
    fixed = dict(data_dir=str(folder), dataset="random", max_iters=steps, eval_interval=steps, log_interval=1)
    fixed |= dict(learning_rate=1e-4, min_lr=0.0, warmup_iters=0, eval_tokens=keys["batch_size"] * keys["block_size"])
    return fixed | keys


def run_train_py(checkout, keys, steps, folder):
    """Runs train.py of a checkout: seconds per step, peak memory in bytes, and MFU where it is known."""
    lines, done = train_py(short_run(keys, WARM_UP + steps, folder), checkout)
    counted = [line for line in lines if line["kind"] == "train"][WARM_UP:]
    seconds = statistics.median(line["ms_per_step"] for line in counted) / 1000
    on_card = GiB * counted[-1].get("peak_memory_gib", 0)
    return dict(seconds=seconds, peak=on_card or done.peak_bytes, mfu=counted[-1].get("mfu", 0))


def peak_of_card():
    return dict(peak=torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else {}


def run_usual_loop(keys, steps, folder):
    """The same numbers of the usual loop. Runs in a process of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = train.TrainConfig(**short_run(keys, steps, folder))
    runtime = start_runtime(config)
    batches = Batches(Windows(Path(folder) / "random", "train", config.block_size), config.batch_size, runtime)
    network = GPTConfig(**config.model_args())
    sizes = dict(vocab_size=network.vocab_size, **pretrained.hf_network(network))
    drop = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **drop)).to(runtime.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    model = torch.compile(model) if config.compile else model
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    seconds = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        for _ in range(config.gradient_accumulation_steps):
            inputs, targets = batches.next()  # (B, T) each
            with runtime.autocast():
                logits = model(inputs).logits  # (B, T, V)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            scaler.scale(loss / config.gradient_accumulation_steps).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return dict(seconds=statistics.median(seconds[WARM_UP:]), mfu=0, **peak_of_card())


# ---- speed


def compare(folder, device, options):
    """A table for each setting. Ratios are to the usual loop, or with --against to the same kind there."""
    for name, (network, steps, turns, kinds) in SETTINGS[device].items():
        if options.setting not in (None, name):
            continue
        bases = [("other", kind) for kind in kinds] if options.against else [("usual", kinds[0])]

        def measure(variant, network=network, steps=steps):
            who, kind = variant
            words = kind.split()
            keys = network | dict(dtype=words[0], compile="compile" in words) | (FAST if "fast" in words else {})
            if who == "usual":  # without our huge pages, which are part of what is compared
                no_huge_pages = {"THP_MEM_ALLOC_ENABLE": "0"}
                return in_a_process(__file__, keys, steps, str(folder), environment=no_huge_pages)
            return run_train_py(options.against if who == "other" else ROOT, keys, steps, folder)

        turns = options.turns or turns
        results = interleaved([*bases, *(("ours", kind) for kind in kinds)], turns, measure)
        print(f"\n{name}: {network}; {turns} turns of {steps} steps")
        header("variant", "tokens/s", "ratio", "ms per step", "peak GiB", "MFU")
        for (who, kind), measured in results.items():
            base = results.get(("other", kind), results[bases[0]])
            seconds, base_seconds = ([result["seconds"] for result in each] for each in (measured, base))
            tokens = train.TrainConfig(**network).step_tokens
            speed, ms = spread([tokens / s for s in seconds]), spread([1000 * s for s in seconds])
            peak, mfu = max(result["peak"] for result in measured) / GiB, measured[-1]["mfu"]
            ratio = spread(ratios(base_seconds, seconds), 2)
            row(f"{who} {kind}", speed, ratio, ms, f"{peak:.2f}", f"{mfu:.1%}" if mfu else "-")


def scaling(folder, device):
    """ms per step at five values of each size, and ms per GFLOP by flops_per_token: level where that counts right."""
    base = M40 | dict(n_layer=4, dtype="float16")
    if device == "cpu":
        base = SMALL | dict(n_layer=2, block_size=128, batch_size=4, dtype="float32")
    header("size", "value", "ms per step", "GFLOP per step", "ms per GFLOP")
    for name in ("block_size", "batch_size", "n_embd", "n_layer", "vocab_size"):
        for i in range(5):
            value = 50304 * (i + 1) if name == "vocab_size" else max(1, base[name] // 2) * 2**i
            keys = base | {name: value, "compile": False}
            ms = 1000 * run_train_py(ROOT, keys, 3, folder)["seconds"]
            config = train.TrainConfig(**keys)
            gflop = config.step_tokens * plan.network(config).flops_per_token() / 1e9
            row(name, value, f"{ms:.0f}", f"{gflop:.1f}", f"{ms / gflop:.2f}")


# ---- memory: predicted and measured

MEDIUM = dict(n_layer=6, n_head=6, n_embd=384, block_size=512, batch_size=8, gradient_accumulation_steps=1)
LARGE = dict(n_layer=12, n_head=12, n_embd=768, block_size=256, batch_size=4, gradient_accumulation_steps=1)
SMALLEST = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=1, vocab_size=512)
QWEN3, RECOMPUTE = dict(arch="qwen3", optimizer="muon"), dict(activation_checkpointing=True)
BF16, FP32 = dict(dtype="bfloat16", compile=False), dict(dtype="float32", compile=False)
MEMORY_SETTINGS = {
    "gpt2 16M, 8 x 256, bf16": SMALL | BF16,
    "gpt2 16M, 8 x 256, bf16, vocabulary of 512": SMALL | BF16 | dict(vocab_size=512),
    "gpt2 16M, 8 x 256, fp32, two micro batches": SMALL | FP32 | dict(gradient_accumulation_steps=2),
    "gpt2 30M, 8 x 512, bf16": MEDIUM | BF16,
    "gpt2 30M, 8 x 512, bf16, dropout": MEDIUM | BF16 | dict(dropout=0.1),
    "gpt2 30M, 8 x 512, fp32, activation checkpointing": MEDIUM | FP32 | RECOMPUTE,
    "gpt2 124M, 4 x 256, bf16": LARGE | BF16,
    "qwen3 16M, 8 x 256, bf16": SMALL | BF16 | QWEN3,
    "qwen3 30M, 8 x 512, fp32": MEDIUM | FP32 | QWEN3,
    "qwen3 30M, 8 x 512, bf16, activation checkpointing": MEDIUM | BF16 | QWEN3 | RECOMPUTE,
}
# glibc keeps freed memory for later. With these it returns blocks of 64 KiB and more to the system as soon as they are
# freed, and takes smaller ones from a single heap. So resident memory is memory in use.
RETURN_FREED = dict(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")


def peak_of_run(keys, folder):
    """Runs train.py for two steps, two evaluations and a checkpoint. Runs in a process of its own."""
    trace_memory(train.TrainConfig(**SMALLEST), "cpu")  # train.py does so for a large network: loads modules
    with tempfile.TemporaryDirectory() as out_dir:
        keys = short_run(keys, 2, folder) | dict(out_dir=out_dir)
        train.main([f"--{name}={value}" for name, value in keys.items()])
    return peak_of_card()


def memory(folder, device):
    """Predicted: all tensors of an eager step (onecard/memory.py). Measured: what a real run needs above an idle one.

    On a CPU both are the peak of resident memory; the idle run is the smallest network with the same keys. So Python,
    torch and their threads are not in the difference. In it are the tensors, and what is not predicted: workspaces
    inside kernels, and oneDNN's packed matrices. Not in it is what glibc keeps of freed memory, which RETURN_FREED
    avoids; a run without that needs more, 5% to 10% in two of these settings. On a card: the peak of torch's allocator.
    """
    header("network, micro batch", "predicted GiB", "measured GiB", "error")
    idle = {}
    for name, keys in MEMORY_SETTINGS.items():
        predicted = sum(trace_memory(train.TrainConfig(**keys), device, getattr(torch, keys["dtype"])).values())
        kind = keys["dtype"], keys.get("arch")
        if device == "cpu" and kind not in idle:
            idle[kind] = in_a_process(__file__, keys | SMALLEST, str(folder), environment=RETURN_FREED)["peak"]
        measured = in_a_process(__file__, keys, str(folder), environment=RETURN_FREED)["peak"] - idle.get(kind, 0)
        row(name, f"{predicted / GiB:.3f}", f"{measured / GiB:.3f}", f"{predicted / measured - 1:+.1%}")


# ---- everything that a card can show


def gpu(options):
    """Runs the GPU tests and the benches; each that has ended has a file in --out and is not run again."""
    out, end = Path(options.out), time.monotonic() + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    commands = {
        "tests": ["-m", "pytest", "-m", "gpu", "-q"],
        "train": ["bench/train.py"],
        "memory": ["bench/train.py", "--memory"],
        "sample": ["bench/sample.py", "--tokens=500"],
        "scaling": ["bench/train.py", "--scaling"],
        "recipe": [
            *("bench/scaling.py", f"--results={out.resolve()}/recipe.jsonl", f"--runs={out.resolve()}/runs"),
            *(f"--figure={out.resolve()}/recipe.png", *options.recipe),
        ],
    }
    for name, command in commands.items():
        part, left = out / f"{name}.part", end - time.monotonic()
        if (out / f"{name}.txt").exists() or left < 30:
            continue
        if name == "recipe":  # which goes on where it was stopped
            command = [*command, f"--budget_hours={max(0, left - 60) / 3600}"]
        with open(part, "w") as file:
            command = [sys.executable, *command]
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(left)
            print(f"{name}: exit {code}", flush=True)
            if code == 0 or name != "recipe":  # the recipe has runs left
                os.replace(part, out / f"{name}.txt")
        except subprocess.TimeoutExpired:
            print(f"{name}: not finished; what it printed is in {part}", flush=True)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="FOLDER", help="compare with train.py of this checkout")
    parser.add_argument("--setting", help="small or logits on a CPU, 40M or 124M on a card; all if not given")
    parser.add_argument("--turns", type=int, help="measurements of each variant")
    for name in ("scaling", "memory", "gpu"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--out", default="out/gpu", help="with --gpu: folder for what the commands print")
    parser.add_argument("--minutes", type=float, default=9.0, help="with --gpu: stop after this time")
    parser.add_argument("recipe", nargs="*", help="with --gpu, after --: options of bench/scaling.py, say --dataset")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        arguments = json.loads(options.measure)
        print(json.dumps(run_usual_loop(*arguments) if len(arguments) == 3 else peak_of_run(*arguments)))
        return
    print(machine("torch", "transformers"), flush=True)
    if options.gpu:
        return gpu(options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        if options.scaling:
            scaling(folder, device)
        elif options.memory:
            memory(folder, device)
        else:
            compare(folder, device, options)


if __name__ == "__main__":
    main()
