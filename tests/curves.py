"""The loss curves of real runs in tests/data, whose README.md describes them. `curves()` reads them all."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from report import DEFAULTS
from train import TrainConfig, learning_rates

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
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    settings = dict(setting.split("=") for setting in comments[-1].removeprefix("# keys: ").split())
    kinds = dict(lr_schedule=str, learning_rate=float, min_lr=float)
    c = config(**{name: kinds.get(name, int)(value) for name, value in settings.items()})
    rows = list(csv.DictReader(lines[len(comments) :]))
    for split, column in (("train", "train_mean"), ("val", "val_loss")):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if points:
            steps, losses = (np.array(values) for values in zip(*points, strict=True))
            yield Curve(path.stem, split, c.lr_schedule, steps, losses, learning_rates(c))


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
