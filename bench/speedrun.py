"""How much sooner does the new recipe reach the old recipe's loss: D0 / D1 in tokens, T0 / T1 in time?

    python bench/speedrun.py --data_dir=data --dataset=docs     # --only=sweep, ladder or race is a part of it

Every number is the val loss at the end of a finished schedule. sweep: the best learning rate of each recipe, on half of
the steps. ladder: four recipes over D0 tokens; with --dtype=float16 GradScaler may skip steps. race: the last recipe on
fewer and fewer tokens; at D1 it has L0, the loss of the first one. Trainings of this commit in --results are kept.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from common import M40, SMALL, commit, header, machine, row, spread, train_py

GPT2 = dict(arch="gpt2", optimizer="adamw", lr_schedule="cosine", min_lr_share=0.1, beta2=0.95)
QWEN3, MUON, LINEAR = dict(arch="qwen3"), dict(optimizer="muon"), dict(lr_schedule="linear", min_lr_share=0.0)
RECIPES = {  # name: (keys, where the search for its learning rate begins); each is the one above with one more change
    "gpt2 + AdamW": (GPT2, 2e-3),
    "qwen3 + AdamW": (GPT2 | QWEN3, 2e-3),
    "+ Muon": (GPT2 | QWEN3 | MUON, 4e-3),
    "+ linear to zero": (GPT2 | QWEN3 | MUON | LINEAR, 4e-3),
}
OLD, NEW = "gpt2 + AdamW", "+ linear to zero"
SIZES = {"small": SMALL, "40m": M40}
STEPS = {"small": 400, "40m": 10_000}
SHARES = (1, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12)  # of D0, in the race


def finish(options, name, rate, steps, seed=0):
    """val_loss, seconds per step and skipped steps of one training, a process of its own, unless it is done already."""
    recipe = dict(RECIPES[name][0])
    keys = SIZES[options.size] | dict(dtype=options.dtype, dataset=options.dataset, eval_tokens=options.eval_tokens)
    keys |= dict(learning_rate=rate, min_lr=rate * recipe.pop("min_lr_share"), max_iters=steps, seed=seed, **recipe)
    keys |= dict(warmup_iters=max(10, steps // 20), eval_interval=steps, log_interval=max(1, steps // 10))
    known_as = keys | dict(commit=commit(), torch=torch.__version__)
    results = Path(options.results)
    for line in results.read_text().splitlines() if results.exists() else []:
        if json.loads(line)["keys"] == known_as:
            return json.loads(line)
    here = dict(data_dir=options.data_dir, compile=torch.cuda.is_available(), always_save_checkpoint=False)
    lines, _ = train_py(keys | here)
    logged = [line for line in lines if line["kind"] == "train"]
    result = dict(val_loss=[line["val_loss"] for line in lines if line["kind"] == "eval"][-1])
    result["seconds"] = statistics.median(line["ms_per_step"] for line in logged) / 1000
    result["skipped"] = sum(line["skipped"] for line in logged)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(dict(keys=known_as, **result)) + "\n")
    print(f"  {name}, {steps} steps, rate {rate:.1e}, seed {seed}: {result}", file=sys.stderr, flush=True)
    return result


def each_seed(options, name, rate, steps):
    return [finish(options, name, rate, steps, seed) for seed in range(options.seeds)]


def spread_of(results, name):
    return spread([result[name] for result in results], 4, statistics.mean)


def sweep(options):
    """The best learning rate of each recipe: half and double of it both end higher."""
    steps = max(20, options.steps // 2)
    print(f"\nLearning rates, one seed, {steps} steps; * the best")
    header("recipe", "rate: val loss")
    best = {}
    for name, (_, first) in RECIPES.items():
        losses, wanted = {}, {first / 2, first, 2 * first}
        while new := sorted(wanted - losses.keys()):
            losses |= {rate: finish(options, name, rate, steps)["val_loss"] for rate in new}
            best[name] = min(losses, key=losses.get)
            wanted = {best[name] / 2, 2 * best[name]}
        row(name, ", ".join(f"{rate:.1e}: {losses[rate]:.3f}{' *' * (rate == best[name])}" for rate in sorted(losses)))
    return best


def ladder(options, rates):
    print(f"\nFour recipes, {options.steps} steps, {options.seeds} seeds: mean (smallest to largest)")
    header("recipe", "learning rate", "val loss", "skipped steps")
    for name, rate in rates.items():
        results = each_seed(options, name, rate, options.steps)
        row(name, f"{rate:.1e}", spread_of(results, "val_loss"), sum(result["skipped"] for result in results))


def race(options, rates):
    """Prints D0 / D1 and T0 / T1, means over the seeds of the new recipe, unless one of them does not cross L0."""
    size = SIZES[options.size]
    step_tokens = size["batch_size"] * size["gradient_accumulation_steps"] * size["block_size"]
    old = each_seed(options, OLD, rates[OLD], options.steps)
    target = statistics.mean(r["val_loss"] for r in old)
    print(f"\n{OLD}, D0 = {options.steps * step_tokens:,} tokens: L0 = {spread_of(old, 'val_loss')}")
    header(f"{NEW}, tokens", "share of D0", "val loss", "seconds per step, over the old recipe's")
    curves = {seed: [] for seed in range(options.seeds)}  # (steps, val loss), fewer and fewer steps
    for share in SHARES:
        steps = max(20, round(options.steps * share))
        new = each_seed(options, NEW, rates[NEW], steps)
        for seed, result in enumerate(new):
            curves[seed].append((steps, result["val_loss"]))
        slower = statistics.median(r["seconds"] for r in new) / statistics.median(r["seconds"] for r in old)
        row(f"{steps * step_tokens:,}", f"1/{options.steps / steps:.1f}", spread_of(new, "val_loss"), f"{slower:.2f}")
        if min(r["val_loss"] for r in new) > target:
            break
    crossings = [crossing(curve, target) for curve in curves.values()]
    if None in crossings:
        still = sum(curve[-1][1] <= target for curve in curves.values())
        print(f"\nno D0/D1: {still} of {len(curves)} seeds are still below L0 with 1/{options.steps / steps:.1f} of D0")
    else:
        shares = [options.steps / steps for steps in crossings]
        print(f"\nD0/D1 = {spread(shares, 2, statistics.mean)}; T0/T1 = {statistics.mean(shares) / slower:.2f}")


def crossing(curve, target):
    """Where the loss first rises above the target, in steps, on a line over their logarithm; None if it does not."""
    for (n2, loss2), (n1, loss1) in itertools.pairwise(curve):
        if loss2 <= target < loss1:
            return n2 * (n1 / n2) ** ((target - loss2) / (loss1 - loss2))
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--dataset", default="docs")
    parser.add_argument("--size", choices=SIZES, help="of the network; 40m on a card, else small")
    parser.add_argument("--steps", type=int, default=0, help="of the old recipe: D0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval_tokens", type=int, default=65_536)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rates", type=float, nargs=4, help="of the four recipes, instead of the sweep")
    parser.add_argument("--only", choices=("sweep", "ladder", "race"))
    parser.add_argument("--results", default="out/speedrun.jsonl", help="file for finished runs")
    options = parser.parse_args()
    options.size = options.size or ("40m" if torch.cuda.is_available() else "small")
    options.steps = options.steps or STEPS[options.size]
    print(f"{machine('torch')}; {SIZES[options.size]}", flush=True)
    rates = dict(zip(RECIPES, options.rates, strict=True)) if options.rates else sweep(options)
    if options.only in (None, "ladder"):
        ladder(options, rates)
    if options.only in (None, "race"):
        race(options, rates)


if __name__ == "__main__":
    main()
