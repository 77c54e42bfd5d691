"""How much sooner the new recipe reaches the old recipe's loss: D0 / D1 in tokens, T0 / T1 in time.

    python bench/speedrun.py --data_dir=data --dataset=docs            # on whatever device there is
    python bench/speedrun.py --data_dir=data --dataset=docs --ladder   # four recipes in a row, one change each
    python bench/speedrun.py --data_dir=data --dataset=docs --sweep    # learning rates of each recipe

Every number is the val loss at the end of a complete schedule, never a point in the middle of one. The GPT-2 recipe
takes the best of its learning rates over D0 tokens and ends at L0; then the new recipe is run over fewer and fewer
tokens, each time to the end of its own schedule. D1 is where the line through the last two of these crosses L0.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
GPT2 = dict(arch="gpt2", optimizer="adamw", lr_schedule="cosine", min_lr_share=0.1, learning_rate=1e-3, beta2=0.95)
RECIPES = {  # each is the one above with one change more
    "gpt2 + AdamW": GPT2,
    "qwen3 + AdamW": GPT2 | dict(arch="qwen3", learning_rate=3e-3),
    "+ Muon": GPT2 | dict(arch="qwen3", optimizer="muon", learning_rate=6e-3),
    "+ linear to zero": GPT2
    | dict(arch="qwen3", optimizer="muon", lr_schedule="linear", min_lr_share=0.0, learning_rate=6e-3),
}
OLD, NEW = "gpt2 + AdamW", "+ linear to zero"
SIZES = {
    "cpu": dict(n_layer=4, n_head=3, n_embd=192, block_size=128, batch_size=8, gradient_accumulation_steps=1),
    "cuda": dict(n_layer=12, n_head=6, n_embd=384, block_size=1024, batch_size=16, gradient_accumulation_steps=2),
}
STEPS = {"cpu": 400, "cuda": 10_000}


def run(recipe, steps, seed, size, options):
    """Trains to the end of the schedule in a process of its own -> (val loss, its standard error, seconds a step)."""
    keys = dict(size, **recipe)
    keys["min_lr"] = keys["learning_rate"] * keys.pop("min_lr_share")
    keys |= dict(max_iters=steps, warmup_iters=max(10, steps // 20), seed=seed, eval_interval=steps)
    keys |= dict(eval_tokens=options.eval_tokens, log_interval=max(1, steps // 10), always_save_checkpoint=False)
    keys |= dict(data_dir=options.data_dir, dataset=options.dataset, compile=options.device == "cuda")
    keys |= dict(dtype=options.dtype)
    with tempfile.TemporaryDirectory() as out_dir:
        arguments = [f"--{k}={v}" for k, v in keys.items()] + [f"--out_dir={out_dir}"]
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if line["kind"] == "eval"][-1]
    groups = np.array(final["val_groups"])
    seconds = statistics.median(line["ms_per_step"] for line in lines if line["kind"] == "train") / 1000
    skipped = sum(line["skipped"] for line in lines if line["kind"] == "train")
    print(
        f"  {steps:6} steps, seed {seed}, lr {keys['learning_rate']:.1e}: val loss {final['val_loss']:.4f}, "
        f"{1000 * seconds:.0f} ms a step, {skipped} skipped",
        flush=True,
    )
    return final["val_loss"], groups.std(ddof=1) / len(groups) ** 0.5, seconds


def sweep(recipe, steps, size, options):
    """-> (best learning rate, its loss) among factors of two around the recipe's, one seed each."""
    losses = {}
    for factor in options.rates:
        rate = recipe["learning_rate"] * factor
        losses[rate] = run(recipe | dict(learning_rate=rate), steps, 0, size, options)[0]
    best = min(losses, key=losses.get)
    if best in (min(losses), max(losses)):
        print(f"  the best rate, {best:.1e}, is at the edge of the grid: the true best may lie beyond")
    return best, losses[best]


def spread(values):
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def ladder(steps, size, options):
    print("\n| recipe | learning rate | val loss over seeds | ms a step |\n|---|---|---|---|")
    rows = []
    for name, recipe in RECIPES.items():
        results = [run(recipe, steps, seed, size, options) for seed in range(options.seeds)]
        seconds = statistics.median(r[2] for r in results)
        rows.append(
            f"| {name} | {recipe['learning_rate']:.0e} | {spread([r[0] for r in results])} | {1000 * seconds:.0f} |"
        )
    print("\n" + "\n".join(rows))


def race(steps, size, options):
    tokens = size["batch_size"] * size["gradient_accumulation_steps"] * size["block_size"]
    print(f"{OLD}: its best learning rate over {steps} steps = {steps * tokens:,} tokens")
    rate, _ = sweep(RECIPES[OLD], steps, size, options)
    old = [run(RECIPES[OLD] | dict(learning_rate=rate), steps, seed, size, options) for seed in range(options.seeds)]
    target, old_seconds = statistics.mean(r[0] for r in old), statistics.median(r[2] for r in old)
    print(f"L0 = {spread([r[0] for r in old])}\n{NEW}: fewer and fewer steps")
    points = []
    for share in (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12):
        n = max(20, round(steps * share))
        results = [run(RECIPES[NEW], n, seed, size, options) for seed in range(options.seeds)]
        points.append((n, statistics.mean(r[0] for r in results), statistics.median(r[2] for r in results)))
        if points[-1][1] > target:
            break
    n1 = crossing(points, target)
    if n1 is None:
        print(f"{NEW} does not cross L0 = {target:.4f} in {[p[0] for p in points]} steps")
        return
    seconds = statistics.median(p[2] for p in points)
    print(f"D0/D1 = {steps / n1:.2f} ({steps * tokens:,} to {round(n1 * tokens):,} tokens)")
    print(
        f"time a step, new over old = {seconds / old_seconds:.2f}; T0/T1 = {steps * old_seconds / (n1 * seconds):.2f}"
    )


def crossing(points, target):
    """Where the line through the last two (steps, loss, ...) meets the target, in log steps; None if they do not."""
    if len(points) < 2 or not points[-1][1] >= target >= points[-2][1]:
        return None
    (n2, l2, _), (n1, l1, _) = points[-2:]
    share = (target - l2) / (l1 - l2)
    return float(np.exp(np.log(n2) + share * (np.log(n1) - np.log(n2))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--dataset", default="docs")
    parser.add_argument("--steps", type=int, default=0, help="of the old recipe: D0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2, 4], help="factors on the learning rate")
    parser.add_argument("--eval_tokens", type=int, default=65_536)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    size, steps = SIZES[options.device], options.steps or STEPS[options.device]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{card} ({platform.machine()}), torch {torch.__version__}, commit {commit.strip() or 'unknown'}; {size}")
    if options.sweep:
        for name, recipe in RECIPES.items():
            print(name)
            print(f"  best learning rate {sweep(recipe, steps, size, options)[0]:.1e}")
    elif options.ladder:
        ladder(steps, size, options)
    else:
        race(steps, size, options)


if __name__ == "__main__":
    main()
