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
from common import ROOT, commit, header, machine, row

from onecard.law import usual_rate
from onecard.memory import network
from train import TrainConfig

OLD = dict(arch="gpt2", optimizer="adamw", lr_schedule="cosine", beta2=0.95, min_lr_share=0.1)
BEFORE = dict(arch="qwen3", optimizer="muon", lr_schedule="linear", beta2=0.95, min_lr_share=0.0)
NEW = BEFORE | dict(optimizer="normuon")  # the change that survived
RECIPES = {"old": OLD, "before": BEFORE, "new": NEW}
PRESETS = {  # sizes: layers x width, the smallest first; head: the head size; old_rate: 0 takes the usual one
    "cpu": dict(sizes="2x48,2x64,2x96,4x96", head=32, vocab_size=320, block_size=256, batch_size=8, sequences=8)
    | dict(old_rate=0.002),
    "card": dict(sizes="6x256,8x384,12x512,12x768", head=64, vocab_size=50304, block_size=1024, batch_size=8)
    | dict(sequences=128, old_rate=0),
}
TOKENS = {"old": (20, 40, 80), "new": (20, 10, 5, 2.5)}  # a parameter
LONGEST = 160  # of the old recipe, at the two smallest sizes
LONGEST_NEW = 40  # of the new one, at the largest size: with less it does not reach the old one's
SEEDS = 3  # below the largest size
ROOT2 = math.sqrt(2)
SEARCHED = {"old": range(-2, 3), "before": range(-2, 2)}  # rates over the rule's, in steps of the root of 2, all seeds
SEARCHED_ONCE = {  # recipe, number of the size, tokens a parameter: the same, one seed
    **{("old", size, 80): (-2, 0, 1, 2) for size in (0, 1)},
    ("before", 1, 20): range(-2, 2),
    ("new", 2, 20): range(-1, 2),
    ("new", 3, 20): (-1, 0),
}
LARGER_STEPS = (2, 4)  # number of the size that is also run with so many times the tokens a step, one seed
EXTRAPOLATED = (40e6, 124e6)  # parameters
COMPILED_FROM = 4000  # steps; on a CPU shorter runs end before compiling pays


def rate(options, size, recipe, per_parameter, steps=0):
    """The learning rate of a size and a number of tokens, extrapolated from those that were searched; or one that is so
    many steps of the root of 2 above it.

    The old recipe's is the same at every size of the CPU, and grows with the root of the tokens a parameter: at 80 the
    best one is twice that at 20. On a card it is that of Kaplan et al. (onecard/law.py) at 20. The new one's falls with
    the root of the width: then an update of Muon's size changes what a layer does by the same (Yang et al. 2023, arXiv
    2310.17813). From 48 to 96 channels the best one falls by a step. Both grow with the root of the tokens of a step
    (Malladi et al. 2022, arXiv 2205.10287, for Adam).
    """
    larger = math.sqrt(options.times)
    if recipe == "old":
        base = options.old_rate or usual_rate(blocks(options, size))
        return round(base * larger * math.sqrt(per_parameter / 20) * ROOT2**steps, 6)
    narrower = round(math.log2(int(size.split("x")[1]) / 48))
    return round(0.011314 * larger * ROOT2 ** (steps - narrower), 6)


def larger_steps(options):
    """(sizes, options) with more tokens a step, in the same micro batches."""
    number, times = LARGER_STEPS
    larger = dict(times=times * options.times, sequences=times * options.sequences)
    changed = argparse.Namespace(**vars(options) | larger)
    return options.sizes.split(",")[number : number + 1], changed


# ---- runs


def shape(options, size):
    layers, width = map(int, size.split("x"))
    return dict(n_layer=layers, n_embd=width, n_head=round(width / options.head))


def old_network(options, size):
    keys = dict(vocab_size=options.vocab_size, block_size=options.block_size)
    return network(TrainConfig(**shape(options, size), **keys))


def parameters(options, size):
    """Of GPT-2's network, without positions."""
    return old_network(options, size).num_params(positions=False)


def blocks(options, size):
    return old_network(options, size).parameter_counts()["blocks"]


def keys_of(options, size, recipe, per_parameter, *, steps=0, seed=0):
    """The keys of train.py of a run, which identify it in the results too; steps: see rate."""
    keys, step_tokens = dict(RECIPES[recipe]), options.sequences * options.block_size
    iters = round(per_parameter * parameters(options, size) / step_tokens)
    learning_rate = rate(options, size, recipe, per_parameter, steps)
    keys |= shape(options, size) | dict(block_size=options.block_size, batch_size=options.batch_size)
    keys |= dict(gradient_accumulation_steps=options.sequences // options.batch_size, dataset=options.dataset)
    keys |= dict(learning_rate=learning_rate, max_iters=iters, seed=seed, dtype=options.dtype)
    keys |= dict(min_lr=learning_rate * keys.pop("min_lr_share"), warmup_iters=max(10, iters // 20))
    return keys


def all_runs(options):
    """Every run, in an order in which each part of the study is useful without what follows."""
    sizes = options.sizes.split(",")
    for seed in range(SEEDS):
        for recipe, searched in SEARCHED.items():
            for steps in searched:
                yield keys_of(options, sizes[0], recipe, 20, steps=steps, seed=seed)
    for (recipe, number, tokens), searched in SEARCHED_ONCE.items():
        for size in sizes[number : number + 1]:
            for steps in searched:
                yield keys_of(options, size, recipe, tokens, steps=steps)
    for size in sizes:
        for seed in range(SEEDS if size != sizes[-1] else 1):
            for recipe, tokens in TOKENS.items():
                for per_parameter in tokens:
                    yield keys_of(options, size, recipe, per_parameter, seed=seed)
            if size in sizes[:2]:
                yield keys_of(options, size, "old", LONGEST, seed=seed)
    yield keys_of(options, sizes[-1], "new", LONGEST_NEW)
    sizes, larger = larger_steps(options)
    for size in sizes:
        for recipe, tokens in TOKENS.items():
            for per_parameter in tokens:
                for steps in (-1, 0, 1) if per_parameter == 20 else (0,):
                    yield keys_of(larger, size, recipe, per_parameter, steps=steps)


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
    here = dict(init_from="auto", out_dir=out_dir, data_dir=options.data_dir, vocab_size=0, eval_interval=5000)
    here |= dict(compile=torch.cuda.is_available() or keys["max_iters"] >= COMPILED_FROM)
    here |= dict(max_hours=(deadline - time.time()) / 3600, log_interval=max(1, keys["max_iters"] // 20))
    here |= dict(eval_tokens=options.eval_tokens)
    arguments = [f"--{key}={value}" for key, value in (keys | here).items()]
    done = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"train.py {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval" and line["step"] == keys["max_iters"]]
    if not last:
        return None
    logged = [line for line in lines if line["kind"] == "train"]
    result = dict(keys=keys, commit=commit(), val_loss=last[0]["val_loss"])
    result |= dict(ms_per_step=statistics.median(line["ms_per_step"] for line in logged))
    result |= dict(skipped=sum(line["skipped"] for line in logged), parameters=lines[0]["parameters"])
    result["device"] = lines[0]["device"]
    for path in out_dir.glob("ckpt*.pt"):
        path.unlink()
    return result


def do(options):
    """Does the runs, --jobs at once, until none is left or the time is up -> {name of a run: its result}."""
    known, lock, stop = read(options), threading.Lock(), threading.Event()
    deadline = time.time() + 3600 * options.budget_hours
    waiting = iter({name_of(keys): keys for keys in all_runs(options)}.values())

    def work():
        while deadline - time.time() > 20 and not stop.is_set():
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
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        stop.set()  # the runs have had the signal too, and save
        raise SystemExit(130) from None
    return known


# ---- what came out


class Losses(dict):
    """{(recipe, size, tokens a parameter): {seed: result}} of the study itself, without searched rates."""

    def __init__(self, options, known):
        super().__init__()
        for size in options.sizes.split(","):
            for recipe, tokens in TOKENS.items():
                for per_parameter in (*tokens, LONGEST, LONGEST_NEW):
                    for seed in range(SEEDS):
                        if result := known.get(name_of(keys_of(options, size, recipe, per_parameter, seed=seed))):
                            self.setdefault((recipe, size, per_parameter), {})[seed] = result
        self.scatter = self.deviation()

    def deviation(self):
        """The standard deviation of the seeds over their mean, from all cells with several seeds; at least two."""
        cells = [[result["val_loss"] for result in cell.values()] for cell in self.values()]
        shares = [statistics.variance(cell) / statistics.mean(cell) ** 2 for cell in cells if len(cell) > 1]
        return math.sqrt(statistics.mean(shares)) if shares else math.nan

    def mean(self, cell, draw=None):
        """The mean over the seeds; with a generator of random numbers, the mean that as many other seeds might have."""
        losses = [result["val_loss"] for result in self[cell].values()]
        error = draw.normal(0, self.scatter / math.sqrt(len(losses))) if draw else 0.0
        return statistics.mean(losses) * (1 + error)

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
    """Tokens of a run of the old recipe over the tokens with which the new one has its loss; None: it ends above."""
    tokens = crossing(losses.curve("new", size, draw), losses.mean(("old", size, per_parameter), draw))
    return tokens and per_parameter / tokens


def with_error(value, resampled, digits=1):
    """The value, and the 16th to 84th percentile of resampled ones, if any is inside the measured runs (not nan)."""
    inside = np.asarray(resampled)[np.isfinite(resampled)]
    if not len(inside):  # each run has one seed
        return f"{value:.{digits}f}"
    low, high = np.percentile(inside, (16, 84))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def fit(points):
    """(E, A, a, B, b) of L = E + A / N^a + B / D^b with the least squares, none of them negative; points: (N, D, L).

    None if there are no such numbers.
    """
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


def points_of(options, losses, recipe, sizes):
    """[(N, D, mean loss)]"""
    counts = {size: parameters(options, size) for size in sizes}
    return [(n, tokens * n, loss) for size, n in counts.items() for tokens, loss in losses.curve(recipe, size)]


def print_rates(options, known):
    print("\n## Learning rates: val loss, mean of the seeds there are (their number)")
    header("recipe", "size", "tokens a parameter", "rate: loss")
    sizes = options.sizes.split(",")
    cells = {(recipe, sizes[0], 20): searched for recipe, searched in SEARCHED.items()}
    cells |= {(r, sizes[i], tokens): steps for (r, i, tokens), steps in SEARCHED_ONCE.items() if i < len(sizes)}
    for (recipe, size, tokens), searched in cells.items():
        row(recipe, size, tokens, shown_rates(known, options, recipe, size, tokens, searched))


def shown_rates(known, options, recipe, size, tokens, searched):
    """Each rate with its loss, as a cell of a table."""
    shown = []
    for steps in searched:
        runs = [keys_of(options, size, recipe, tokens, steps=steps, seed=seed) for seed in range(2 * SEEDS)]
        if losses := [known[name_of(keys)]["val_loss"] for keys in runs if name_of(keys) in known]:
            shown.append(f"{runs[0]['learning_rate']:.2g}: {statistics.mean(losses):.3f} ({len(losses)})")
    return ", ".join(shown)


def print_changes(options, known):
    """Gains of changes of the recipe over runs with the same seed, from --results: such runs are no longer made."""
    gains = defaultdict(lambda: defaultdict(list))  # {change: {size: gain of each seed}}
    for result in known.values():
        keys = result["keys"]
        size = f"{keys['n_layer']}x{keys['n_embd']}"
        before = known.get(name_of(keys_of(options, size, "before", 20, seed=keys["seed"])))
        same = before and all(before["keys"][key] == keys[key] for key in ("optimizer", "learning_rate"))
        if "candidate" in keys and same:
            gains[keys["candidate"]][size].append(before["val_loss"] - result["val_loss"])
    if not gains:
        return
    sizes = options.sizes.split(",")[:2]
    print("\n## Changes: by how much the val loss is lower, mean of the seeds +- standard error (seeds)")
    header("change", *sizes)
    for change, by_size in gains.items():
        cells = []
        for size in sizes:
            found = by_size[size]
            error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
            cells.append(f"{statistics.mean(found):+.4f} +- {error:.4f} ({len(found)})" if found else "")
        row(change, *cells)


def print_study(options, losses):
    print("\n## Losses, nats a token: mean over the seeds (smallest to largest), steps, ms a step")
    header("size", "parameters", "recipe", "tokens a parameter", "val loss", "seeds", "steps", "ms a step")
    for (recipe, size, tokens), results in losses.items():
        found = [result["val_loss"] for result in results.values()]
        spread = f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})"
        steps = next(iter(results.values()))["keys"]["max_iters"]
        row(
            size,
            f"{parameters(options, size):,}",
            recipe,
            tokens,
            spread,
            len(found),
            steps,
            f"{min(result['ms_per_step'] for result in results.values()):.0f}",
        )


def print_multipliers(options, losses):
    """-> {tokens a parameter of the old recipe: {size: (multiplier, resampled ones)}} of those that are no bounds."""
    print("\n## Tokens of the old recipe over those of the new one with the same loss")
    print("Interpolated between runs of the new recipe; in brackets the 16th to 84th percentile of 1,000 draws of the")
    print(
        "means, which scatter as the seeds do. In time: by the least milliseconds a step of each recipe at that size."
    )
    header("size", "old: tokens a parameter", "loss", "times fewer tokens", "times less time")
    found, draw = defaultdict(dict), np.random.default_rng(0)
    for recipe, size, tokens in losses:
        if recipe == "new" or not (curve := losses.curve("new", size)):
            continue
        value, loss = multiplier(losses, size, tokens), losses.mean((recipe, size, tokens))
        if value is None or loss >= curve[0][1]:
            word = f"less than {tokens / curve[-1][0]:.0f}" if value is None else f"more than {value:.0f}"
            row(size, tokens, f"{loss:.4f}", word, "")
            continue
        drawn = np.array([multiplier(losses, size, tokens, draw) or np.nan for _ in range(1000)])
        faster = milliseconds(losses, "old", size) / milliseconds(losses, "new", size)
        row(size, tokens, f"{loss:.4f}", with_error(value, drawn), with_error(value * faster, drawn * faster))
        found[tokens][size] = value, drawn
    return found


def milliseconds(losses, recipe, size):
    """A step's, the least of all runs: other work on the machine only adds to it."""
    cells = [results for cell, results in losses.items() if cell[:2] == (recipe, size)]
    return min(result["ms_per_step"] for results in cells for result in results.values())


def print_fits(options, losses):
    """The law L = E + A / N^a + B / D^b of each recipe; what that of the smaller sizes says of the largest one."""
    *smaller, largest = sizes = options.sizes.split(",")
    print("\n## L = E + A / N^a + B / D^b; N: parameters, D: tokens")
    header("recipe", "sizes", "E", "A", "a", "B", "b", "root mean square error")
    predicted = {}
    for recipe in TOKENS:
        for which in (smaller, sizes):
            points = points_of(options, losses, recipe, which)
            fitted = fit(points) if len(points) >= 6 and losses.curve(recipe, which[-1]) else None
            if fitted is None:
                continue
            if which is smaller:
                predicted[recipe] = fitted
            e, x, a, y, b = fitted
            error = math.sqrt(statistics.mean((law(fitted, n, d) - loss) ** 2 for n, d, loss in points))
            row(recipe, f"up to {which[-1]}", *(f"{z:.3g}" for z in (e, x, a, y, b)), f"{error:.3f}")
    print(f"\n## {largest}, predicted from the smaller sizes")
    header("recipe", "tokens a parameter", "predicted", "measured")
    n = parameters(options, largest)
    for recipe, fitted in predicted.items():
        measured = dict(losses.curve(recipe, largest))
        for tokens in sorted({*TOKENS[recipe], *measured}):
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
        values = np.log([[value, *drawn] for value, drawn in by_size.values()])  # (sizes, 1 + draws)
        values = values[:, np.isfinite(values).all(axis=0)]
        slope, start = np.polyfit(n, values, 1)
        larger = [np.exp(start + slope * math.log(size)) for size in EXTRAPOLATED]
        row(tokens, " ".join(by_size), with_error(slope[0], slope[1:], 2), *(with_error(m[0], m[1:]) for m in larger))


def print_larger_steps(options, known, scatter):
    """Losses and multipliers of the runs with more tokens a step. scatter: of the seeds, from the other runs."""
    sizes, larger = larger_steps(options)
    losses = Losses(larger, known)
    losses.scatter = scatter
    if sizes and losses:
        print(f"\n## With {larger.times} times the tokens a step ({larger.sequences} x {larger.block_size})")
        header("recipe", "size", "tokens a parameter", "rate: loss")
        for recipe in TOKENS:
            row(recipe, sizes[0], 20, shown_rates(known, larger, recipe, sizes[0], 20, (-1, 0, 1)))
        print_study(larger, losses)
        print_multipliers(larger, losses)


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
    left.legend(fontsize=7, loc="lower left")
    for i, (tokens, by_size) in enumerate(sorted(found.items())):
        n = [parameters(options, size) for size in by_size]
        middle = np.array([value for value, _ in by_size.values()])
        low, high = np.transpose([np.nanpercentile([value, *drawn], (16, 84)) for value, drawn in by_size.values()])
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
    parser.add_argument("--batch_size", type=int, help="sequences of a micro batch, instead of the preset's")
    parser.add_argument("--times", type=int, default=1, help="so many times the tokens a step of the preset")
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
    options.sequences *= options.times
    print(f"{machine('torch')}; {options.sizes}", flush=True)
    known = do(options)
    missing = len({name_of(keys) for keys in all_runs(options)} - known.keys())
    print(f"{missing} runs are missing: repeat the command" if missing else "complete")
    losses = Losses(options, known)
    print_rates(options, known)
    print_changes(options, known)
    print_study(options, losses)
    found = print_multipliers(options, losses)
    print_fits(options, losses)
    print_trend(options, found)
    print_larger_steps(options, known, losses.scatter)
    draw_figure(options, losses, found)
    if missing and options.budget_hours:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
