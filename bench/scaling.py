"""How many times fewer tokens does the new recipe need, at which size, and what does that give for larger networks?

    python bench/scaling.py --data_dir=data --dataset=docs --budget_hours=2    # repeat it until it says "complete"
    python bench/scaling.py --budget_hours=0                                   # the tables and the figure alone

Every number is the val loss at the end of a finished schedule, on tokens that are not repeated. Each run is a process
of its own that continues from its checkpoint; its result is a line of --results, which is read again. Tokens are
counted per parameter of GPT-2's network without positions, so both recipes see the same tokens at one size.
"""

import argparse
import hashlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from candidates import CANDIDATES, SHORTER_STEPS
from common import ROOT, commit, header, machine, row

from onecard.memory import network
from train import TrainConfig

OLD = dict(arch="gpt2", optimizer="adamw", lr_schedule="cosine", beta2=0.95, min_lr_share=0.1)
BEFORE = dict(arch="qwen3", optimizer="muon", lr_schedule="linear", beta2=0.95, min_lr_share=0.0)
NEW = BEFORE | dict(optimizer="normuon")  # with the candidate that survived
RECIPES = {"old": OLD, "before": BEFORE, "new": NEW}
PRESETS = {  # sizes: layers x width, the smallest first; head: the head size
    "cpu": dict(sizes="2x48,2x64,2x96,4x96", head=32, vocab_size=320, block_size=256, batch_size=8, sequences=8),
    "card": dict(sizes="6x256,8x384,12x512,12x768", head=64, vocab_size=50304, block_size=1024, batch_size=8)
    | dict(sequences=128),
}
TOKENS = {"old": (20, 40, 80), "new": (20, 10, 5, 2.5)}  # a parameter
LONGEST = 160  # of the old recipe, at the two smallest sizes
SEEDS = 3  # below the largest size
ROOT2 = math.sqrt(2)
RATES = {"old": (0.001, 0.001414, 0.002, 0.002828, 0.004), "before": (0.005657, 0.008, 0.011314, 0.016)}
NEXT_RATES = {("old", 80): (0.002, 0.004, 0.005657, 0.008), ("before", 20): (0.005657, 0.008, 0.011314, 0.016)}
WIDER_RATES = (0.005657, 0.008, 0.011314)  # of the new recipe at the third size, on 20 tokens a parameter
EXTRAPOLATED = (40e6, 124e6)  # parameters
COMPILED_FROM = 4000  # steps; on a CPU shorter runs end before compiling pays


def rate(recipe, size, per_parameter):
    """The rule by which a learning rate is carried over, in steps of the root of 2.

    The old recipe's is the same at every size, and grows with the root of the tokens a parameter: at 80 the best one is
    twice that at 20. The new one's falls with the root of the width: then an update of Muon's size changes what a layer
    does by the same (Yang et al. 2023, arXiv 2310.17813). From 48 to 96 channels the best one falls by a step.
    """
    if recipe == "old":
        return round(0.002 * math.sqrt(per_parameter / 20), 6)
    steps = round(math.log2(int(size.split("x")[1]) / 48))
    return round(0.011314 / ROOT2**steps, 6)


# ---- runs


def shape(options, size):
    layers, width = map(int, size.split("x"))
    return dict(n_layer=layers, n_embd=width, n_head=round(width / options.head))


def size_of(keys):
    return f"{keys['n_layer']}x{keys['n_embd']}"


def parameters(options, size):
    """Of GPT-2's network, without positions."""
    config = TrainConfig(**shape(options, size), vocab_size=options.vocab_size, block_size=options.block_size)
    return network(config).num_params(positions=False)


def keys_of(options, size, recipe, per_parameter, learning_rate=None, seed=0, candidate=""):
    """The keys of train.py of a run. They identify it in the results too."""
    keys, step_tokens = dict(RECIPES[recipe]), options.sequences * options.block_size
    steps = round(per_parameter * parameters(options, size) / step_tokens)
    learning_rate = learning_rate or rate(recipe, size, per_parameter)
    keys |= shape(options, size) | dict(block_size=options.block_size, batch_size=options.batch_size)
    keys |= dict(gradient_accumulation_steps=options.sequences // options.batch_size, dataset=options.dataset)
    keys |= dict(learning_rate=learning_rate, max_iters=steps, seed=seed, dtype=options.dtype)
    keys |= dict(min_lr=learning_rate * keys.pop("min_lr_share"), warmup_iters=max(10, steps // 20))
    if candidate:
        keys["candidate"] = candidate
    if candidate in SHORTER_STEPS:
        keys |= dict(batch_size=keys["batch_size"] // 2, max_iters=2 * steps, warmup_iters=2 * keys["warmup_iters"])
    return keys


def all_runs(options):
    """Every run, in an order in which each part of the study is useful without what follows."""
    sizes = options.sizes.split(",")
    for seed in range(SEEDS):
        for recipe, rates in RATES.items():
            for learning_rate in rates:
                yield keys_of(options, sizes[0], recipe, 20, learning_rate, seed)
    for (recipe, tokens), rates in NEXT_RATES.items():
        for learning_rate in rates:
            for size in sizes[:2]:
                yield keys_of(options, size, recipe, tokens, learning_rate)
    for learning_rate in WIDER_RATES:
        yield keys_of(options, sizes[2], "new", 20, learning_rate)
    for seed in range(SEEDS):
        for size in sizes[:2]:
            for candidate in CANDIDATES:
                yield keys_of(options, size, "before", 20, seed=seed, candidate=candidate)
    for size in sizes:
        for seed in range(SEEDS if size != sizes[-1] else 1):
            for recipe, tokens in TOKENS.items():
                longer = (LONGEST,) if recipe == "old" and size in sizes[:2] else ()
                for per_parameter in tokens + longer:
                    yield keys_of(options, size, recipe, per_parameter, seed=seed)


def name_of(keys):
    return json.dumps(keys, sort_keys=True)


def read(options):
    """{name of a run: its result}."""
    path = Path(options.results)
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {name_of(line["keys"]): line for line in lines}


def finish(options, keys, deadline):
    """Does one run, or goes on with it, until the deadline -> its result, or None if it has not ended."""
    out_dir = Path(options.runs) / hashlib.sha256(name_of(keys).encode()).hexdigest()[:16]
    script, here = ["train.py"], dict(init_from="auto")
    if "candidate" in keys:  # a change of the recipe keeps nothing in the checkpoint
        script, here = ["bench/candidates.py", keys["candidate"]], dict(init_from="scratch", overwrite=True)
    here |= dict(out_dir=out_dir, data_dir=options.data_dir, vocab_size=0, eval_interval=5000)
    here |= dict(compile=torch.cuda.is_available() or keys["max_iters"] >= COMPILED_FROM)
    here |= dict(max_hours=(deadline - time.time()) / 3600, log_interval=max(1, keys["max_iters"] // 20))
    here |= dict(eval_tokens=options.eval_tokens)
    arguments = [f"--{key}={value}" for key, value in (keys | here).items() if key != "candidate"]
    done = subprocess.run([sys.executable, *script, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"{' '.join(script + arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    if last["step"] < keys["max_iters"]:
        return None
    logged = [line for line in lines if line["kind"] == "train"]
    result = dict(keys=keys, commit=commit(), val_loss=last["val_loss"], train_loss=last["train_loss"])
    result |= dict(ms_per_step=statistics.median(line["ms_per_step"] for line in logged))
    result |= dict(skipped=sum(line["skipped"] for line in logged), parameters=lines[0]["parameters"])
    for path in out_dir.glob("ckpt*.pt"):
        path.unlink()
    return result


def do(options):
    """Does the runs, --jobs at once, until none is left or the time is up -> {name of a run: its result}."""
    known, lock, deadline = read(options), threading.Lock(), time.time() + 3600 * options.budget_hours
    waiting = iter({name_of(keys): keys for keys in all_runs(options)}.values())

    def work():
        while deadline - time.time() > 20:
            with lock:
                keys = next((keys for keys in waiting if name_of(keys) not in known), None)
            if keys is None:
                return
            result = finish(options, keys, deadline)
            if result is None:
                continue
            with lock, open(options.results, "a") as file:
                known[name_of(keys)] = result
                file.write(json.dumps(result) + "\n")
                print(f"{result['val_loss']:.4f} {name_of(keys)}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=work) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return known


# ---- what came out


class Losses(dict):
    """{(recipe, size, tokens a parameter): {seed: result}} of the study itself, without rates and candidates."""

    def __init__(self, options, known):
        super().__init__()
        for size in options.sizes.split(","):
            for recipe, tokens in TOKENS.items():
                for per_parameter in (*tokens, LONGEST):
                    for seed in range(SEEDS):
                        if result := known.get(name_of(keys_of(options, size, recipe, per_parameter, seed=seed))):
                            self.setdefault((recipe, size, per_parameter), {})[seed] = result

    def mean(self, cell, draw=None):
        """The mean over the seeds; with a generator of random numbers, over as many that are drawn from them."""
        losses = [result["val_loss"] for result in self[cell].values()]
        return statistics.mean(losses if draw is None else draw.choice(losses, len(losses)))

    def curve(self, recipe, size, draw=None):
        """[(tokens a parameter, mean loss)], from few to many tokens."""
        cells = sorted(cell for cell in self if cell[:2] == (recipe, size))
        return [(cell[2], self.mean(cell, draw)) for cell in cells]


def crossing(curve, loss):
    """Where a curve of (tokens, loss) has this loss, on a line over the logarithm of the tokens between two points; its
    first point, if that is lower already; None if it ends above."""
    if loss >= curve[0][1]:
        return curve[0][0]
    for (d0, loss0), (d1, loss1) in itertools.pairwise(curve):
        if loss1 <= loss <= loss0:
            return d0 * (d1 / d0) ** ((loss0 - loss) / (loss0 - loss1))
    return None


def multiplier(losses, size, per_parameter, draw=None):
    """Tokens of a run of the old recipe over the tokens with which the new one has its loss; None: not measured."""
    tokens = crossing(losses.curve("new", size, draw), losses.mean(("old", size, per_parameter), draw))
    return tokens and per_parameter / tokens


def with_error(value, resampled, digits=1):
    """The value, and the range that 68% of the resampled values are in."""
    low, high = np.percentile(resampled, (16, 84))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def fit(points):
    """(E, A, a, B, b) of L = E + A / N^a + B / D^b with the least squares; points: (N, D, L). None of them negative."""
    n, d, loss = np.array(points).T
    best = (np.inf, None)
    for a in np.linspace(0.05, 1.5, 30):
        for b in np.linspace(0.05, 1.5, 30):
            columns = np.stack((np.ones_like(n), (n / n[0]) ** -a, (d / d[0]) ** -b), axis=1)
            solution = np.linalg.lstsq(columns, loss, rcond=None)[0]
            error = ((columns @ solution - loss) ** 2).sum()
            if (solution >= 0).all() and error < best[0]:
                e, x, y = solution
                best = (error, (e, x * n[0] ** a, a, y * d[0] ** b, b))
    return best[1]


def law(fitted, n, d):
    e, x, a, y, b = fitted
    return e + x / n**a + y / d**b


def fit_of(options, losses, recipe, sizes, draw=None):
    return fit(
        [
            (parameters(options, size), tokens * parameters(options, size), loss)
            for size in sizes
            for tokens, loss in losses.curve(recipe, size, draw)
        ]
    )


def print_rates(options, known):
    print("\n## Learning rates: val loss, mean of the seeds there are (their number)")
    header("recipe", "size", "tokens a parameter", "rate: loss")
    smallest, second = options.sizes.split(",")[:2]
    searched = {(recipe, smallest, 20): rates for recipe, rates in RATES.items()}
    for (recipe, tokens), rates in NEXT_RATES.items():
        searched[recipe, smallest, tokens] = searched.get((recipe, smallest, tokens), rates)
        searched[recipe, second, tokens] = rates
    searched["new", options.sizes.split(",")[2], 20] = WIDER_RATES
    for (recipe, size, tokens), rates in searched.items():
        cells = []
        for learning_rate in rates:
            runs = (keys_of(options, size, recipe, tokens, learning_rate, seed) for seed in range(2 * SEEDS))
            if found := [known[name_of(keys)]["val_loss"] for keys in runs if name_of(keys) in known]:
                cells.append(f"{learning_rate:.2g}: {statistics.mean(found):.3f} ({len(found)})")
        row(recipe, size, tokens, ", ".join(cells))


def print_candidates(options, known):
    """Gains of the same seed, so of the same initial weights and batches."""
    print("\n## Candidates: by how much the val loss is lower, mean of the seeds +- standard error")
    sizes = options.sizes.split(",")[:2]
    header("candidate", *sizes)
    for candidate in CANDIDATES:
        cells = []
        for size in sizes:
            gains = []
            for seed in range(2 * SEEDS):
                pair = [name_of(keys_of(options, size, "before", 20, None, seed, name)) for name in ("", candidate)]
                if all(name in known for name in pair):
                    gains.append(known[pair[0]]["val_loss"] - known[pair[1]]["val_loss"])
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            cells.append(f"{statistics.mean(gains):+.4f} +- {error:.4f} ({len(gains)})" if gains else "")
        row(candidate, *cells)


def print_study(options, losses):
    print("\n## Losses, nats a token: mean over the seeds (smallest to largest), steps, ms a step")
    header("size", "parameters", "recipe", "tokens a parameter", "val loss", "seeds", "steps", "ms a step")
    for (recipe, size, tokens), results in losses.items():
        found = [result["val_loss"] for result in results.values()]
        spread = f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})"
        ms = statistics.median(result["ms_per_step"] for result in results.values())
        steps = next(iter(results.values()))["keys"]["max_iters"]
        row(size, f"{parameters(options, size):,}", recipe, tokens, spread, len(found), steps, f"{ms:.0f}")


def print_multipliers(options, losses):
    """-> {tokens a parameter of the old recipe: {size: (multiplier, resampled ones)}} of those that are no bounds."""
    print("\n## Tokens of the old recipe over those of the new one with the same loss")
    print("Interpolated between runs of the new recipe; in brackets what 68% of 1,000 draws of seeds are in.")
    print("In time: times the old recipe's milliseconds a step over the new one's.")
    header("size", "old: tokens a parameter", "loss", "times fewer tokens", "times less time")
    found = defaultdict(dict)
    for recipe, size, tokens in losses:
        if recipe == "new" or not (curve := losses.curve("new", size)):
            continue
        milliseconds = {"old": [], "new": []}
        for cell in (cell for cell in losses if cell[1] == size):
            milliseconds[cell[0]] += [result["ms_per_step"] for result in losses[cell].values()]
        faster = statistics.median(milliseconds["old"]) / statistics.median(milliseconds["new"])
        value, loss = multiplier(losses, size, tokens), losses.mean((recipe, size, tokens))
        if value is None or loss >= curve[0][1]:
            word = "not measured" if value is None else f"more than {value:.0f}"
            row(size, tokens, f"{loss:.4f}", word, "")
            continue
        draw = np.random.default_rng(0)
        drawn = [multiplier(losses, size, tokens, draw) or np.nan for _ in range(1000)]
        drawn = np.array(drawn)[np.isfinite(drawn)]
        row(size, tokens, f"{loss:.4f}", with_error(value, drawn), with_error(value * faster, drawn * faster))
        found[tokens][size] = value, drawn
    return found


def print_fits(options, losses):
    """The law L = E + A / N^a + B / D^b of each recipe; what that of the smaller sizes says of the largest one."""
    print("\n## L = E + A / N^a + B / D^b; N: parameters, D: tokens")
    header("recipe", "sizes", "E", "A", "a", "B", "b", "root mean square error")
    *smaller, largest = sizes = options.sizes.split(",")
    predicted = {}
    for recipe in TOKENS:
        for name, which in ((f"up to {smaller[-1]}", smaller), ("all", sizes)):
            curves = {size: losses.curve(recipe, size) for size in which}
            if sum(map(len, curves.values())) < 6 or not curves[which[-1]]:
                continue
            e, x, a, y, b = fitted = fit_of(options, losses, recipe, which)
            predicted.setdefault(recipe, fitted)
            errors = [
                law(fitted, n := parameters(options, size), tokens * n) - loss
                for size, curve in curves.items()
                for tokens, loss in curve
            ]
            row(recipe, name, f"{e:.3f}", f"{x:.3g}", f"{a:.2f}", f"{y:.3g}", f"{b:.2f}", f"{np.std(errors):.3f}")
    print(f"\n## {largest}, predicted from the smaller sizes")
    header("recipe", "tokens a parameter", "predicted", "measured")
    n = parameters(options, largest)
    for recipe, fitted in predicted.items():
        measured = dict(losses.curve(recipe, largest))
        for tokens in TOKENS[recipe]:
            ended = f"{measured[tokens]:.4f}" if tokens in measured else ""
            row(recipe, tokens, f"{law(fitted, n, tokens * n):.4f}", ended)


def print_trend(options, found):
    """How the multiplier changes with the size, and what a line over the logarithm of the size gives."""
    print("\n## Trend: multiplier = c x N^slope, where the old recipe has the same tokens a parameter")
    header("old: tokens a parameter", "sizes", "slope", *(f"{n / 1e6:.0f}M" for n in EXTRAPOLATED))
    for tokens, by_size in sorted(found.items()):
        if len(by_size) < 2:
            continue
        n = np.log([parameters(options, size) for size in by_size])
        draws = min(len(drawn) for _, drawn in by_size.values())
        values = np.log([[value, *drawn[:draws]] for value, drawn in by_size.values()])
        slope, start = np.polyfit(n, values, 1)
        cells = [np.exp(start + slope * math.log(larger)) for larger in EXTRAPOLATED]
        row(tokens, " ".join(by_size), with_error(slope[0], slope[1:], 2), *(with_error(c[0], c[1:]) for c in cells))


def draw_figure(options, losses, found):
    """Losses over tokens, and multipliers over sizes, as a picture."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no {options.figure}: matplotlib is missing; pip install matplotlib")
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for i, size in enumerate(options.sizes.split(",")):
        n = parameters(options, size)
        for recipe, style in (("old", "o--"), ("new", "s-")):
            if curve := losses.curve(recipe, size):
                tokens, loss = np.array(curve).T
                left.plot(tokens * n, loss, style, color=f"C{i}", ms=4, label=f"{recipe}, {n / 1e6:.2f}M parameters")
    left.set(xscale="log", xlabel="tokens of the run", ylabel="val loss at its end, nats a token")
    left.legend(fontsize=8)
    for i, (tokens, by_size) in enumerate(sorted(found.items())):
        n = [parameters(options, size) for size in by_size]
        middle = np.array([value for value, _ in by_size.values()])
        low, high = np.transpose([np.percentile(drawn, (16, 84)) for _, drawn in by_size.values()])
        ends = np.clip([middle - low, high - middle], 0, None)
        right.errorbar(
            n, middle, ends, fmt="o-", color=f"C{i}", capsize=3, label=f"old recipe on {tokens} tokens a parameter"
        )
    right.set(xscale="log", yscale="log", xlabel="parameters", ylabel="times fewer tokens for the same loss")
    right.legend(fontsize=8)
    figure.savefig(options.figure, dpi=110)
    print(f"\nwrote {options.figure}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--dataset", default="docs", help="large enough that no token is read twice")
    parser.add_argument("--budget_hours", type=float, default=1.0, help="stop after this time; 0: no runs")
    parser.add_argument("--jobs", type=int, help="runs at a time; 2 on a CPU, with OMP_NUM_THREADS=1, and 1 on a card")
    parser.add_argument("--preset", choices=PRESETS, help="sizes and batch; card where there is one")
    parser.add_argument("--sizes", help="instead of the preset's: layers x width, smallest first")
    parser.add_argument("--vocab_size", type=int, help="of the dataset, to a multiple of 64: counts parameters")
    parser.add_argument("--eval_tokens", type=int, default=409_600)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--results", default="bench/scaling.jsonl", help="file of the results")
    parser.add_argument("--runs", default="out/scaling", help="folder of the runs")
    parser.add_argument("--figure", default="docs/recipe.png")
    options = parser.parse_args()
    on_card = torch.cuda.is_available()
    options.jobs = options.jobs or (1 if on_card else 2)
    for name, value in PRESETS[options.preset or ("card" if on_card else "cpu")].items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    print(f"{machine('torch')}; {options.sizes}", flush=True)
    known = do(options)
    missing = len({name_of(keys) for keys in all_runs(options)} - known.keys())
    print(f"{missing} runs are missing: repeat the command" if missing else "complete")
    losses = Losses(options, known)
    print_rates(options, known)
    print_candidates(options, known)
    print_study(options, losses)
    found = print_multipliers(options, losses)
    print_fits(options, losses)
    print_trend(options, found)
    draw_figure(options, losses, found)


if __name__ == "__main__":
    main()
