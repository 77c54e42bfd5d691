"""How much sooner the new recipe reaches the old recipe's loss: D0 / D1 in tokens, T0 / T1 in time.

    python bench/speedrun.py --data_dir=data --dataset=docs     # on whatever device there is; tables for RESULTS.md
    python bench/speedrun.py --dataset=docs --only=race         # one part of it; the others are ladder, float16, time
    python bench/speedrun.py --dataset=docs --size=bytes        # the same text as bytes: no embedding to speak of
    python bench/speedrun.py --dataset=docs --only=time --size=40m --steps=3 --turns=2 --rates 2e-3 2e-3 4e-3 4e-3

Every number is the val loss at the end of a complete schedule, never a point in the middle of one. sweep: the best
learning rate of each recipe, on schedules of half the length, by factors of two until both neighbours are worse.
ladder: four recipes at their own best rates over D0 tokens, one change more each. race: the last of them over fewer and
fewer tokens; D1 is where the line between two of those runs crosses L0, the loss of the first. time: a step of both,
taking turns. Runs that this commit has finished lie in --results and are not done again.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import run_script  # noqa: E402
from onecard.shards import ShardError, find_shards, open_tokens  # noqa: E402
from onecard.tokenizer import load_tokenizer  # noqa: E402

GPT2 = dict(arch="gpt2", optimizer="adamw", lr_schedule="cosine", min_lr_share=0.1, beta2=0.95)
QWEN3, MUON, LINEAR = dict(arch="qwen3"), dict(optimizer="muon"), dict(lr_schedule="linear", min_lr_share=0.0)
RECIPES = {  # name: (keys, where the search for its learning rate begins); each is the one above with one change more
    "gpt2 + AdamW": (GPT2, 2e-3),
    "qwen3 + AdamW": (GPT2 | QWEN3, 2e-3),
    "+ Muon": (GPT2 | QWEN3 | MUON, 4e-3),
    "+ linear to zero": (GPT2 | QWEN3 | MUON | LINEAR, 4e-3),
}
OLD, NEW = "gpt2 + AdamW", "+ linear to zero"
SIZES = {
    "small": dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=8, gradient_accumulation_steps=1),
    "bytes": dict(
        n_layer=4, n_head=2, n_embd=128, block_size=256, vocab_size=256, batch_size=8, gradient_accumulation_steps=1
    ),
    "40m": dict(n_layer=12, n_head=6, n_embd=384, block_size=1024, batch_size=16, gradient_accumulation_steps=2),
}
STEPS = {"small": 400, "bytes": 2000, "40m": 10_000}
SHARES = (1, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12)


def write_bytes(source, folder):
    """The text of a dataset as bytes, in nanoGPT's format: for networks that a CPU trains for thousands of steps."""
    folder.mkdir()
    for split in ("train", "val"):
        with open(folder / f"{split}.bin", "wb") as file:
            for path, *_ in find_shards(source, split)[0]:
                for ids in np.array_split(open_tokens(path), 100):
                    text = np.frombuffer(load_tokenizer().decode_bytes(ids), dtype=np.uint8)
                    file.write(text.astype("<u2").tobytes())


class Runs:
    """Trainings, each in a process of its own, `jobs` of them at a time; one that this commit has finished is not done
    again."""

    def __init__(self, options, commit):
        self.options, self.size, self.lock = options, SIZES[options.size], threading.Lock()
        self.path, self.commit = Path(options.results), commit
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {json.dumps(row["keys"], sort_keys=True): row for row in map(json.loads, lines)}

    def of(self, recipes):
        """recipes: list of (keys of the recipe, learning rate, steps, seed) -> list of dict(val_loss, seconds, ...)."""
        with ThreadPoolExecutor(self.options.jobs) as pool:
            return list(pool.map(lambda recipe: self.one(*recipe), recipes))

    def one(self, recipe, rate, steps, seed, again="", dtype=""):
        keys = dict(self.size, **recipe, learning_rate=rate, max_iters=steps, seed=seed)
        keys["min_lr"] = rate * keys.pop("min_lr_share")
        keys |= dict(warmup_iters=max(10, steps // 20), eval_interval=steps, eval_tokens=self.options.eval_tokens)
        keys |= dict(log_interval=max(1, steps // 10), dtype=dtype or self.options.dtype, dataset=self.options.dataset)
        name = json.dumps(keys | dict(again=again, commit=self.commit, torch=torch.__version__), sort_keys=True)
        if name not in self.done:
            row = self.train(keys)
            with self.lock, self.path.open("a") as file:
                self.done[name] = row
                file.write(json.dumps(dict(keys=json.loads(name), **row)) + "\n")
            print(
                f"  {recipe['arch']} {recipe['optimizer']} {recipe['lr_schedule']}, {steps} steps, rate {rate:.1e}, "
                f"seed {seed}: val loss {row['val_loss']:.4f}, {1000 * row['seconds']:.0f} ms a step, "
                f"{row['skipped']} skipped",
                file=sys.stderr,
                flush=True,
            )
        return self.done[name]

    def train(self, keys):
        options, environment = self.options, dict(os.environ)
        if options.device == "cpu":
            environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // options.jobs))
        extra = dict(data_dir=options.data_dir, compile=options.device == "cuda", always_save_checkpoint=False)
        with tempfile.TemporaryDirectory() as out_dir:
            arguments = [f"--{k}={v}" for k, v in (keys | extra).items()] + [f"--out_dir={out_dir}"]
            command = [sys.executable, str(ROOT / "train.py"), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")
            lines = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
        final = [line for line in lines if line["kind"] == "eval"][-1]
        logged = [line for line in lines if line["kind"] == "train"]
        row = dict(val_loss=final["val_loss"], val_error=final["val_error"])
        row |= dict(seconds=statistics.median(line["ms_per_step"] for line in logged) / 1000)
        return row | dict(skipped=sum(line["skipped"] for line in logged), scale=[line.get("scale") for line in logged])


def spread(values, digits=4):
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def best_rate(name, runs, steps):
    """-> the learning rate whose two neighbours, half and double, both end higher; one seed. Prints what it tried."""
    recipe, rate = RECIPES[name]
    losses, wanted = {}, {rate / 2, rate, 2 * rate}
    while wanted - losses.keys():
        new = sorted(wanted - losses.keys())
        rows = runs.of([(recipe, r, max(20, steps // 2), 0) for r in new])
        losses |= {r: row["val_loss"] for r, row in zip(new, rows, strict=True)}
        best = min(losses, key=losses.get)
        wanted = {best / 2, 2 * best}
    tried = ", ".join(f"{r:.1e}: {losses[r]:.3f}" + " *" * (r == best) for r in sorted(losses))
    print(f"| {name} | {tried} |", flush=True)
    return best


def sweep(runs, steps):
    print(
        f"\nLearning rates, one seed, {max(20, steps // 2)} steps; * the best\n\n| recipe | rate: val loss |\n|---|---|"
    )
    return {name: best_rate(name, runs, steps) for name in RECIPES}


def seeds_of(name, rate, steps, runs):
    return runs.of([(RECIPES[name][0], rate, steps, seed) for seed in range(runs.options.seeds)])


def ladder(runs, steps, rates):
    print(f"\nFour recipes, {steps} steps, {runs.options.seeds} seeds: mean (least to most)\n")
    print("| recipe | learning rate | val loss | skipped steps |\n|---|---|---|---|")
    for name, rate in rates.items():
        rows = seeds_of(name, rate, steps, runs)
        skipped = sum(row["skipped"] for row in rows)
        print(f"| {name} | {rate:.1e} | {spread([row['val_loss'] for row in rows])} | {skipped} |", flush=True)


def race(runs, steps, rates):
    """-> D0 / D1, the mean over seeds; None if a seed of the new recipe does not cross L0."""
    size = runs.size
    tokens = size["batch_size"] * size["gradient_accumulation_steps"] * size["block_size"]
    old = [row["val_loss"] for row in seeds_of(OLD, rates[OLD], steps, runs)]
    target = statistics.mean(old)
    print(f"\n{OLD}, D0 = {steps * tokens:,} tokens: L0 = {spread(old)}\n")
    print(f"| {NEW}, tokens | share of D0 | val loss |\n|---|---|---|")
    points = {seed: [] for seed in range(runs.options.seeds)}
    for share in SHARES:
        n = max(20, round(steps * share))
        losses = [row["val_loss"] for row in seeds_of(NEW, rates[NEW], n, runs)]
        print(f"| {n * tokens:,} | 1/{steps / n:.1f} | {spread(losses)} |", flush=True)
        for seed, loss in enumerate(losses):
            points[seed].append((n, loss))
        if min(losses) > target:
            break
    crossings = [steps / n for n in (crossing(p, target) for p in points.values()) if n]
    if not crossings and max(losses) <= target:
        print(f"\nD0/D1 is more than {steps / n:.0f}: with {n * tokens:,} tokens all seeds are still below L0")
        return None
    if len(crossings) < len(points):
        print(f"\n{NEW} crosses L0 for {len(crossings)} of {len(points)} seeds only: no figure")
        return None
    print(f"\nD0/D1 = {spread(crossings, 2)} over the seeds of the new recipe")
    return statistics.mean(crossings)


def crossing(points, target):
    """Where (steps, loss) of ever fewer steps first rise above the target, in log steps; None if they do not."""
    for (n2, l2), (n1, l1) in itertools.pairwise(points):
        if l2 <= target < l1:
            return float(np.exp(np.log(n2) + (target - l2) / (l1 - l2) * (np.log(n1) - np.log(n2))))
    return None


def float16(runs, steps, rates):
    """Both recipes in float16 with a GradScaler: steps that it skipped, and its scale along the run."""
    print("\nfloat16 with GradScaler\n\n| recipe | val loss | in the dtype above | skipped | scale at tenths |")
    print("|---|---|---|---|---|")
    for name in (OLD, NEW):
        usual, half = (runs.one(RECIPES[name][0], rates[name], steps, 0, dtype=dtype) for dtype in ("", "float16"))
        losses = f"{half['val_loss']:.4f} | {usual['val_loss']:.4f}"
        scales = ", ".join(f"{scale:,.0f}" for scale in half["scale"])
        print(f"| {name} | {losses} | {half['skipped']} of {steps} | {scales} |", flush=True)


def step_time(runs, steps, rates):
    """-> seconds a step of the new recipe over the old one's: short runs that take turns, nothing else beside them."""
    ratios, turns = [], runs.options.turns
    for turn in range(turns):
        old, new = (
            runs.one(RECIPES[name][0], rates[name], min(40, steps), 0, again=f"turn {turn}") for name in (OLD, NEW)
        )
        ratios.append(new["seconds"] / old["seconds"])
    middle = statistics.median(ratios)
    print(f"\ntime a step, new over old: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) in {turns} turns")
    return middle


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--dataset", default="docs")
    parser.add_argument("--size", choices=SIZES, help="of the network; 40m on a card, else small")
    parser.add_argument("--steps", type=int, default=0, help="of the old recipe: D0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; the time of a step is taken alone")
    parser.add_argument("--turns", type=int, default=5, help="of the comparison of time")
    parser.add_argument("--eval_tokens", type=int, default=65_536)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rates", type=float, nargs=4, help="of the four recipes, instead of the sweep")
    parser.add_argument("--only", choices=("sweep", "ladder", "race", "float16", "time"))
    parser.add_argument("--results", default="out/speedrun.jsonl", help="file for finished runs")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.size = options.size or ("40m" if options.device == "cuda" else "small")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    commit = commit.strip()
    runs, steps = Runs(options, commit), options.steps or STEPS[options.size]
    card = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{card} ({platform.machine()}), torch {torch.__version__}, commit {commit or 'unknown'}; {runs.size}")
    if options.size == "bytes":
        folder = tempfile.TemporaryDirectory()
        write_bytes(Path(options.data_dir) / options.dataset, Path(folder.name) / options.dataset)
        options.data_dir = folder.name
    rates = dict(zip(RECIPES, options.rates, strict=True)) if options.rates else sweep(runs, steps)
    if options.only in (None, "ladder"):
        ladder(runs, steps, rates)
    tokens = race(runs, steps, rates) if options.only in (None, "race") else None
    if options.only is None and options.device == "cpu":
        print("\nfloat16: left out, a CPU takes minutes a step; --only=float16 does it all the same")
    elif options.only in (None, "float16"):
        float16(runs, steps, rates)
    if options.only in (None, "time"):
        options.jobs = 1
        time = step_time(runs, steps, rates)
        if tokens:
            print(f"T0/T1 = {tokens / time:.2f}")


if __name__ == "__main__":
    run_script(main, ShardError)
