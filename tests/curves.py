"""Loss curves for the tests and benches of forecast.py and diagnosis.py: real ones, and made ones of known cause.

The real ones are in tests/data, whose README.md describes them. `curves()` reads them all.
"""

import csv
import math
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onecard.diagnosis import Run
from report import DEFAULTS
from train import TrainConfig, learning_rate

SHARED = dict(warmup_iters=500, eval_interval=500, eval_iters=200)
ANCHORS = {  # by parameters: the keys of the run
    "40m": SHARED
    | dict(n_embd=384, batch_size=16, gradient_accumulation_steps=32, learning_rate=1e-3, min_lr=1e-4)
    | dict(max_iters=20000, lr_decay_iters=20000, dropout=0.1),
    "124m": SHARED
    | dict(n_embd=768, batch_size=8, gradient_accumulation_steps=64, learning_rate=3e-4, min_lr=3e-5)
    | dict(max_iters=12000, lr_decay_iters=12000, dropout=0.0),
}


def config(**keys):
    """nanoGPT's defaults, and these."""
    return TrainConfig(**(DEFAULTS | keys))


def learning_rates(config):
    return [learning_rate(step, config) for step in range(config.max_iters)]


def anchor_rows(name):
    with open(Path(__file__).parent / "data" / f"fineweb_{name}_rtx4070.csv", newline="") as file:
        return list(csv.DictReader(file))


def anchor(name):
    """-> steps, train, val of the evaluations."""
    rows = [row for row in anchor_rows(name) if row["kind"] == "eval"]
    columns = np.array([[row["step"], row["train_loss"], row["val_loss"]] for row in rows], dtype=float).T
    return columns[0].astype(int), columns[1], columns[2]


class Curve(NamedTuple):
    run: str  # name of the file
    split: str  # train or val
    schedule: str  # cosine, linear or wsd
    steps: np.ndarray  # (m,) of the evaluations
    losses: np.ndarray  # (m,)
    rates: list[float]  # (n,) the learning rate of every step


def curves() -> list[Curve]:
    """All curves of tests/data, of each split that was logged."""
    found = []
    for name, keys in ANCHORS.items():
        steps, train, val = anchor(name)
        rates = learning_rates(config(**keys))
        found += [Curve(name, split, "cosine", steps, y, rates) for split, y in (("train", train), ("val", val))]
    for path in sorted((Path(__file__).parent / "data").glob("*.csv")):
        if not path.name.startswith("fineweb_"):
            found += public_curves(path)
    return found


def public_curves(path: Path) -> Iterator[Curve]:
    """The curves of a CSV whose header names the keys of the schedule; of the train loss the means (train_mean)."""
    keys, rows = read_public(path)
    c = config(**keys)
    for split, column in (("train", "train_mean"), ("val", "val_loss")):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if points:
            steps, losses = (np.array(values) for values in zip(*points, strict=True))
            yield Curve(path.stem, split, c.lr_schedule, steps, losses, learning_rates(c))


def read_public(path: Path) -> tuple[dict, list[dict]]:
    """-> the keys of the run that the header names, and the rows."""
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    settings = dict(setting.split("=") for setting in comments[-1].removeprefix("# keys: ").split())
    kinds = dict(lr_schedule=str, learning_rate=float, min_lr=float)
    keys = {name: kinds.get(name, int)(value) for name, value in settings.items()}
    return keys, list(csv.DictReader(lines[len(comments) :]))


def write_founding_run(folder):
    """Writes what nanoGPT printed of the 40M run up to step 14,500, and its config file -> their paths."""
    lines = ["number of parameters: 40.56M"]
    for row in anchor_rows("40m"):
        if int(row["step"]) > 14500:
            break
        if row["kind"] == "eval":
            lines.append(f"step {row['step']}: train loss {row['train_loss']}, val loss {row['val_loss']}")
        else:
            lines.append(f"iter {row['step']}: loss {row['train_loss']}, time {row['time_ms']}ms, mfu 12.87%")
    keys = ANCHORS["40m"] | dict(n_layer=12, n_head=12, wandb_project="fineweb", seed=7)
    settings = [f"{key} = {value!r}" for key, value in keys.items()]
    (folder / "train.log").write_text("\n".join(lines) + "\n")
    (folder / "fineweb.py").write_text("\n".join(['"""Its config."""', "", *settings]) + "\n")
    return folder / "train.log", folder / "fineweb.py"


# what is made -> the names of PROBLEMS that a diagnosis has to give, and no others
CAUSES = {
    "healthy": set(),
    "a gap, nothing else": set(),
    "overfitting": {"overfitting"},
    "flat": {"flat"},
    "rate too high: spikes": {"rate too high"},
    "rate too high: diverges": {"rate too high"},
    "rate too high: falls with the rate only": {"rate too high"},
    "rate too low": {"rate too low"},
    "noise only": {"too noisy to tell"},
    "noisy val set": {"noisy val set"},
    "scaler trouble": {"scaler trouble"},
    "waits for data": {"waits for data"},
}


def made(cause, seed):
    """-> a Run with one thing wrong with it, everything else drawn at random from what healthy runs have.

    The loss is a power law of the steps with an annealing term and independent noise in each evaluation; what is wrong
    is put on top of it, by formulas that diagnosis.py does not know.
    """
    rng = np.random.default_rng([seed, *cause.encode()])
    c = made_config(cause, rng)
    n, rates = c.max_iters, learning_rates(c)
    complete = cause in ("rate too low", "rate too high: falls with the rate only")
    last = n if complete else int(rng.uniform(0.55, 0.95) * 40) * (n // 40)
    steps = np.arange(0, last + 1, n // 40)
    base, train, val = made_losses(cause, rng, steps, rates)
    noise = rng.uniform(0.003, 0.008)
    noises = {"noise only": (15 * noise, 15 * noise), "noisy val set": (noise, 3 * noise)}.get(cause, (noise, noise))
    train, val = (y + rng.normal(0, sd, len(y)) for y, sd in zip((train, val), noises, strict=True))
    as_printed = cause in ("noise only", "noisy val set")
    lines = made_lines(cause, rng, np.linspace(n // 200, last, 100 + 3 * len(steps)).astype(int), steps, train, n)
    if as_printed:
        one = 15 * noise if cause == "noise only" else noise * math.sqrt(200)
        loss = np.interp(lines["step"], steps, base) + rng.normal(0, one, len(lines["step"]))
        lines = dict(step=lines["step"], loss=loss)
    groups = [] if as_printed else [(v + rng.normal(0, 8 * noise, 64)).tolist() for v in val]
    events = []
    if cause.endswith("spikes"):
        at = rng.choice(np.arange(n // 10, last), int(rng.integers(3, 15)), replace=False)
        events = [dict(kind="event", event="spike", step=int(step)) for step in sorted(at)]
    tokens = n * c.step_tokens / (rng.uniform(8, 40) if cause == "overfitting" else rng.uniform(0.3, 3))
    about = {} if as_printed else dict(data=dict(train_tokens=int(tokens)))
    evals = dict(step=steps.astype(float), train=train, val=val)
    return Run(cause, evals, groups, lines, micro=as_printed, config=c, rates=rates, about=about, events=events)


def made_config(cause, rng):
    n, peak = int(rng.integers(20, 80)) * 250, float(rng.uniform(4e-4, 1.2e-3))
    if cause == "rate too low":
        peak = peak / rng.uniform(12, 30)
    schedule = dict(max_iters=n, lr_decay_iters=n, warmup_iters=n // 40, learning_rate=peak, min_lr=peak / 10)
    return config(**schedule, eval_interval=n // 40, eval_iters=1 if cause == "noise only" else 200, n_head=12)


def made_losses(cause, rng, steps, rates):
    """-> the loss at each evaluation without the effect of the decay, and without noise train and val loss."""
    share = steps / len(rates)
    shape = rng.uniform(0.1, 0.4) * np.maximum(share, 5 / len(rates)) ** -rng.uniform(0.4, 0.8)
    base = rng.uniform(2.9, 3.3) + np.minimum(shape, 7.5)
    drop = 0 if cause == "rate too low" else rng.uniform(0.05, 0.15)
    annealed = decay_with_momentum(rates)
    train = base - drop * annealed[steps] / annealed[-1]
    val = train + rng.normal(0, 0.02)
    if cause == "a gap, nothing else":
        val = val + rng.uniform(0.1, 0.5)
    if cause == "overfitting":
        begun = np.maximum(0, share - rng.uniform(0.05, 0.25))
        val, train = val + rng.uniform(0.5, 2) * begun ** rng.uniform(1, 1.5), train - rng.uniform(0.2, 0.8) * begun
    if cause == "noise only":
        train = val = np.where(steps > 0, train[-1], train)
    if cause == "flat":
        stop = int(rng.uniform(0.1, 0.25) * 40)
        train[stop:], val[stop:] = train[stop], val[stop]
    if cause.endswith("diverges"):
        rise = rng.uniform(0.8, 3) * np.maximum(0, share - rng.uniform(0.2, 0.35))
        train, val = train + rise, val + rise
    if cause.endswith("the rate only"):
        relative = np.append(rates, rates[-1])[steps] / max(rates)
        stuck = rng.uniform(0.3, 0.8) * np.minimum(relative, 1) ** rng.uniform(0.7, 1.3)
        train, val = (np.where(steps > len(rates) // 20, 3.2 + stuck + 0.05 * shape, y) for y in (train, val))
    return base, train, val


def decay_with_momentum(rates, momentum=0.999):
    """S2 of Tissue, Wang, Wang 2024: the falls of the rate, with momentum, summed. forecast.py has another law."""
    falls = np.maximum(0.0, -np.diff(rates, prepend=rates[0]))
    return np.append(0.0, np.cumsum(list(accumulate(falls, lambda m, fall: momentum * m + fall))))


def made_lines(cause, rng, at, steps, train, max_iters):
    """The log lines between the evaluations: loss, norm of the gradient, time, GradScaler's scale."""
    loss = np.interp(at, steps, train) + rng.normal(0, 0.02, len(at))
    norm = rng.uniform(0.3, 2.0) * np.exp(rng.normal(0, 0.2, len(at))) * np.linspace(1, rng.uniform(0.5, 3), len(at))
    skipped, scale = (rng.random(len(at)) < 0.01).astype(float), 65536.0 * 2.0 ** np.round(rng.normal(0, 1, len(at)))
    if cause == "scaler trouble":
        skipped = rng.poisson(0.05 * max_iters / len(at), len(at)).astype(float)
        scale = np.maximum(1, 65536 * 2.0 ** -np.cumsum(rng.random(len(at)) < 0.1))
    waits = rng.uniform(0.1, 0.4) if cause == "waits for data" else rng.uniform(0, 0.02)
    data_share = np.clip(rng.normal(waits, waits / 5, len(at)), 0, 1)
    lines = dict(step=at.astype(float), loss=loss, grad_norm=norm, skipped=skipped, scale=scale, data_share=data_share)
    return lines | dict(ms_per_step=rng.normal(1000, 20, len(at)), tokens_per_s=np.full(len(at), 1e5))
