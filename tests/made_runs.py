"""Made-up runs. `made(name, seed)` -> (a Run, what is true of it): some have one fault, some are healthy.

Their curves are stretched exponentials, sums of powers or a logistic of the logarithm of the step, none of them by
forecast's law, with noise that is normal, autocorrelated or heavy-tailed. `write_run(folder)`: a folder with metrics.
"""

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
from curves import config

from onecard.run import Run
from train import learning_rates


@dataclass
class Truth:
    """What a diagnosis may say. problems: exactly these. clean: val loss without noise at the evaluations."""

    problems: set[str]
    clean: np.ndarray
    gap: np.ndarray


def stretched(t, rng):
    return rng.uniform(2.8, 3.4) + rng.uniform(4, 7) * np.exp(-((t * rng.uniform(30, 90)) ** rng.uniform(0.3, 0.45)))


def powers(t, rng):
    a, b = rng.uniform(0.15, 0.35, 2)
    return rng.uniform(2.2, 2.8) + a * (t + 0.002) ** -0.35 + b * (t + 0.004) ** -0.12


def logistic(t, rng):
    return 2.9 + rng.uniform(5, 7) / (1 + (t * rng.uniform(60, 150)) ** rng.uniform(0.7, 0.9))


def gaussian(rng, n, sd):
    return rng.normal(0, sd, n)


def slow(rng, n, sd):
    """Autocorrelated: each value keeps half of the one before."""
    steps, out = rng.normal(0, sd * np.sqrt(0.75), n), np.zeros(n)
    for i in range(1, n):
        out[i] = 0.5 * out[i - 1] + steps[i]
    return out


def heavy(rng, n, sd):
    return sd * rng.standard_t(3, n) / np.sqrt(3)


SCHEDULES = {
    "cosine": dict(lr_schedule="cosine", min_lr=6e-5),
    "linear": dict(lr_schedule="linear", min_lr=0.0),
    "wsd": dict(lr_schedule="wsd", min_lr=0.0),
    "constant": dict(decay_lr=False),
}
HEALTHY = {  # schedule, curve, noise of an evaluation and its size, evaluations, steps
    "healthy cosine": ("cosine", stretched, gaussian, 0.004, 40, 20000),
    "healthy linear, bytes": ("linear", logistic, gaussian, 0.012, 14, 400),
    "healthy wsd": ("wsd", powers, gaussian, 0.003, 50, 10000),
    "healthy constant rate": ("constant", powers, slow, 0.005, 40, 6000),
    "healthy, few evaluations": ("cosine", stretched, gaussian, 0.02, 9, 5000),
    "healthy, 200 evaluations": ("wsd", stretched, slow, 0.006, 200, 20000),
    "healthy, heavy tails": ("cosine", powers, heavy, 0.008, 40, 8000),
    "healthy, slow noise": ("linear", powers, slow, 0.012, 60, 8000),
    "healthy, fixed windows": ("cosine", logistic, gaussian, 0.0006, 80, 20000),
    "healthy, noisy": ("linear", stretched, gaussian, 0.05, 30, 3000),
}
FAULTS: dict[str, set[str]] = {
    "diverged at once": {"diverged"},
    "diverged slowly": {"diverged"},
    "diverged in warm-up": {"diverged"},
    "diverged, train alone logged": {"diverged"},
    "nan to the end": {"not finite"},
    "infinite train loss": {"not finite"},
    "skipped to the end": {"not finite"},
    "one nan, and on": set(),
    "overfitting": {"overfitting"},
    "overfitting, noisy": {"overfitting"},
    "overfitting, late": {"overfitting"},
    "gap widens, val falls": set(),
    "constant gap": set(),
    "val turns up, train not logged": {"rising"},
    "both rise": {"rising"},
    "resumed onto a longer schedule": {"rate jumped"},
    "resumed, and back": set(),
    "spikes reach val": {"rate too high"},
    "spikes of single steps": set(),
    "outliers of val alone": set(),
    "flat at a high rate": {"flat"},
    "flat, slow noise": {"flat"},
    "noise only": set(),
    "noisy val set": {"noisy val set"},
    "both noisy": set(),
    "val below train": {"val below train"},
    "val from other text": set(),
    "scaler trouble": {"scaler trouble"},
    "waits for data": {"waits for data"},
}


def made(name: str, seed: int, until: float = 1.0) -> tuple[Run, Truth]:
    """A run up to a share `until` of its schedule; a faulty one is past its fault."""
    rng = np.random.default_rng([seed, *name.encode()])
    if name in HEALTHY:
        schedule, curve, noise, sd, count, n = HEALTHY[name]
    else:
        schedule = str(rng.choice(["cosine", "linear", "wsd"]))
        curve, noise = rng.choice([stretched, powers, logistic]), rng.choice([gaussian, slow, heavy])
        sd, count, n = rng.uniform(0.002, 0.006), int(rng.integers(24, 90)), int(rng.integers(20, 90)) * 200
        until = until * (rng.uniform(0.6, 0.75) if name.startswith("flat") else rng.uniform(0.7, 1.0))
    peak = float(rng.uniform(4e-4, 1.2e-3))
    keys = dict(max_iters=n, lr_decay_iters=n, warmup_iters=n // 40, learning_rate=peak)
    keys |= dict(n_layer=1, n_embd=384, n_head=6)
    c = config(**(keys | SCHEDULES[schedule]), eval_interval=max(1, n // count), eval_iters=200)
    rates = np.array(learning_rates(c))
    steps = np.arange(0, int(until * n) + 1, c.eval_interval)
    share = steps / n
    annealed = 1 - np.append(rates, rates[-1])[steps] / rates.max()
    annealed[steps < c.warmup_iters] = 0.0
    strength = rng.uniform(0.02, 0.15)
    val = np.minimum(curve(share, rng), 10.8)
    val -= strength * annealed ** rng.uniform(0.7, 1.5)
    return assembled(name, rng, c, rates, steps, val, noise, sd)


def assembled(name, rng, c, rates, steps, val, noise, sd):
    train, share, n = val - rng.uniform(0, 0.03), steps / steps[-1], len(steps)
    val, train = with_fault(name, rng, share, val.copy(), train.copy())
    truth = Truth(FAULTS.get(name, set()), val.copy(), val - train)
    sds = {"noisy val set": (0.06, 0.006), "both noisy": (0.03, 0.03), "noise only": (0.3, 0.3)}.get(name, (sd, sd))
    noisy_val, noisy_train = (y + noise(rng, n, s) for y, s in zip((val, train), sds, strict=True))
    if name == "outliers of val alone":
        noisy_val[rng.choice(np.arange(n // 3, n), 4, replace=False)] += 0.3
    at = np.arange(1, steps[-1] + 1, max(1, steps[-1] // 800))
    loss = np.interp(at, steps, train) + rng.normal(0, 0.04, len(at))
    spikes = rng.choice(np.arange(len(at) // 10, len(at)), int(rng.integers(10, 71)), replace=False)
    loss[spikes] += rng.uniform(0.3, 2, len(spikes))
    if name == "infinite train loss":
        loss[-len(loss) // 20 :] = np.inf
    if name == "one nan, and on":
        loss[len(loss) // 2] = np.inf
    if name == "nan to the end":
        noisy_val[-3:] = noisy_train[-3:] = np.inf
    events = [dict(kind="event", event="spike", step=int(at[i])) for i in sorted(spikes)]
    if name == "skipped to the end":
        events += [dict(kind="event", event="skipped", step=int(steps[-1]) - i) for i in (4, 3, 2, 1, 0)]
    lines = dict(step=at.astype(float), loss=loss, ms_per_step=rng.normal(1000, 20, len(at)))
    lines["skipped"] = rng.poisson(0.08 * np.diff(at, prepend=0)) if name == "scaler trouble" else np.zeros(len(at))
    lines["scale"] = np.full(len(at), 4.0 if name == "scaler trouble" else 65536.0)
    waits = 0.2 if name == "waits for data" else 0.01
    lines["data_share"] = np.clip(rng.normal(waits, waits / 5, len(at)), 0, 1)
    printed = name in ("noisy val set", "both noisy", "val below train", "healthy cosine", "healthy, noisy")
    groups = [] if printed else [(v + rng.normal(0, 0.03, 64)).tolist() for v in noisy_val]
    evals = dict(step=steps.astype(float), train=noisy_train, val=noisy_val)
    evals |= dict(bits_per_byte=np.full(n, np.nan), eval_seconds=np.full(n, 1.0))
    if name == "diverged, train alone logged":
        evals, groups = {key: values[:0] for key, values in evals.items()}, []
    if name == "val turns up, train not logged":
        evals["train"], lines["loss"] = np.full(n, np.nan), np.full(len(at), np.nan)
    epochs = rng.uniform(5, 40) if name.startswith("overfitting") else rng.uniform(0.3, 3)
    about = dict(data=dict(train_tokens=int(c.max_iters * c.step_tokens / epochs), val_tokens=10**7))
    if name.startswith("resumed"):  # a linear decay, and from half of the log on a second one
        cut = int(steps[int(0.5 * n)])
        rates = rates.max() * np.append(np.linspace(1, 0.1, cut), np.linspace(0.8, 0.1, len(rates) - cut))
    return Run(name, evals, groups, lines, printed, c, list(rates), about, events), truth


def with_fault(name, rng, share, val, train):
    """What is wrong, put on top of the curves; share: of the steps of the log, 0 to 1."""
    after = np.maximum(0, share - rng.uniform(0.3, 0.6))
    if name in ("diverged at once", "diverged, train alone logged"):
        bad = after > 0
        val[bad] = train[bad] = rng.uniform(6, 8)
    if name == "diverged slowly":
        rise = 6 * after
        val, train = np.minimum(val + rise, 9), np.minimum(train + rise, 9)
    if name == "diverged in warm-up":
        val[share > 0.1] = train[share > 0.1] = rng.uniform(8, 9.5) if val[share <= 0.1].min() < 7 else 12
    if name.startswith("overfitting"):
        begun = np.maximum(0, share - (0.7 if name.endswith("late") else rng.uniform(0.2, 0.5)))
        val, train = np.interp(share, share, val) + rng.uniform(0.5, 1.5) * begun, train - rng.uniform(0.5, 2) * begun
    if name == "gap widens, val falls":
        train = train - rng.uniform(0.08, 0.3) * after
    if name == "constant gap":
        val = val + rng.uniform(0.1, 0.6)
    if name == "val turns up, train not logged":
        val = val + rng.uniform(0.3, 0.6) * after
    if name == "both rise":
        val, train = (y + rng.uniform(0.4, 0.6) * after for y in (val, train))
    if name == "resumed onto a longer schedule":
        gone = (share < 0.5) * 0.25 * share / 0.5
        val, train = val - gone - 0.1 * (share < 0.5), train - gone - 0.1 * (share < 0.5)
    if name == "resumed, and back":
        gone = 0.1 * (share < 0.5) * share / 0.5 + (0.2 + 0.2 * share) * (share > 0.6)
        val, train = val - gone, train - gone
    if name == "spikes reach val":
        places = np.arange(len(share) // 4, len(share) - 2, 3)
        for i in rng.choice(places, min(5, len(places)), replace=False):
            height = rng.uniform(0.2, 1.0)
            val[i] += height
            train[i] += height
    if name.startswith("flat") or name == "noise only":
        stop = np.searchsorted(share, 0.35)
        val[stop:], train[stop:] = val[stop], train[stop]
    if name == "val below train":
        val = train - rng.uniform(0.06, 0.2)
    if name == "val from other text":
        val = val + 0.4 + 0.05 * np.sin(3 * share)
    if name == "noise only":
        val[:], train[:] = val[-1], train[-1]
    return val, train


# ---- a folder as train.py writes it

SCHEDULE = dict(max_iters=4000, lr_decay_iters=4000, warmup_iters=100, eval_interval=100, eval_iters=0)


def loss_of(rates):
    """Made-up losses after 0 to n steps: a power of the rates' sum, and a share of what the rate has fallen by."""
    rates = np.asarray(rates) / max(rates)
    done = np.append(0.001, np.cumsum(rates) / 4000)
    return 3.2 + 0.2 * (done + 0.002) ** -0.5 - 0.1 * np.append(0, 1 - rates) * (done > 0.05)


def write_run(folder, difference=0.0, noise=0.0, fingerprint="f", last=None, bytes_per_token=4.0, about=(), **keys):
    """Writes folder/metrics.jsonl of a run up to step `last` -> folder. difference: added to its losses."""
    c = config(**(SCHEDULE | keys))
    truth, rng = loss_of(learning_rates(c)) + difference, np.random.default_rng(len(folder.name))
    each = np.linspace(-0.4, 0.4, 64)  # windows differ, in all runs alike
    data = dict(train_tokens=10**9, val_tokens=10**6, val_fingerprint=fingerprint)
    start = dict(kind="start", step=0, config=asdict(c), device="cpu", dtype="bfloat16", data=data)
    records = [start | dict(about)]
    line = dict(kind="train", grad_norm=0.5, lr=1e-3, skipped=0, ms_per_step=50.0, tokens_per_s=1e4)
    for step in range(0, (last or c.max_iters) + 1, 100):
        groups = truth[step] + each + rng.normal(0, noise, 64)
        loss = dict(train_loss=truth[step] - 0.01, val_loss=groups.mean(), val_groups=groups.tolist())
        loss |= dict(eval_seconds=1.0, bits_per_byte=groups.mean() / math.log(2) / bytes_per_token)
        records += [dict(line, step=step, loss=truth[step])] * (step > 0) + [dict(loss, kind="eval", step=step)]
    records.append(dict(kind="samples", step=last or c.max_iters, texts=["<b>Once</b> upon"]))
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
