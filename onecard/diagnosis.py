"""Finds what the numbers of a run show, as sentences with figures: is it still falling, overfitting, too noisy to tell?

    for name, text in diagnose(run): print(name, text)

A finding whose name is in PROBLEMS asks for a change; the others describe the run. report.py makes the Run and shows
the findings. A sentence is made only where the numbers support it, beyond their noise.
"""

import math
from collections import namedtuple
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from onecard import forecast, plan

Finding = namedtuple("Finding", "name text")
PROBLEMS = {"flat", "too noisy to tell", "overfitting", "rate too high", "rate too low"}
PROBLEMS |= {"noisy val set", "scaler trouble", "waits for data"}
FLAT = 0.008  # share of the loss: a decrease that is surely smaller than this, over a third of the steps, is flat
WIDENS = 0.02  # nats: the gap between val and train has to widen by at least this much


@dataclass
class Run:
    """What is known of a run. A report of a printed log has no config, and then no rates.

    In evals and lines NaN is what was not logged, inf what was logged and is not finite (nan, inf).
    """

    name: str
    evals: dict[str, np.ndarray]  # (n,) for n evaluations: step, train, val, bits_per_byte, eval_seconds
    groups: list[list[float]]  # of each evaluation, the mean losses of fixed groups of val windows; may be empty
    lines: dict[str, np.ndarray]  # (m,) for m log lines: step and what else they have
    micro: bool = False  # whether the loss of a log line is that of one micro batch
    config: Any = None  # train.TrainConfig
    rates: list[float] = field(default_factory=list)  # of every step of the schedule; before a resume, as it was then
    about: dict = field(default_factory=dict)  # the last "start" record of the metrics
    events: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)

    @property
    def step(self) -> int:
        return int(max([0, *self.evals["step"][-1:], *self.lines["step"][-1:]]))

    @property
    def end(self) -> int:  # of the schedule
        c = self.config
        return min(c.max_iters, c.lr_decay_iters or c.max_iters) if c.decay_lr else c.max_iters

    @property
    def warm(self) -> float:  # evaluations before this step are left out
        return max(2 * self.config.warmup_iters, 0.05 * self.config.max_iters) if self.config else 0.05 * self.step

    @property
    def epochs(self) -> float | None:
        tokens = self.about.get("data", {}).get("train_tokens")
        return self.step * self.config.step_tokens / tokens if self.config and tokens else None

    @cached_property
    def plan(self) -> dict:
        """What was planned (plan.plan), without the memory of a step, which takes seconds."""
        c, data = self.config, self.about.get("data", {})
        facts = {name: data.get(name) for name in ("train_tokens", "val_tokens")}
        if eval_tokens := c.eval_tokens or c.eval_iters * c.batch_size * c.block_size:
            facts["eval_tokens"] = eval_tokens
        dtype = getattr(torch, self.about.get("dtype", "bfloat16"))
        return plan.plan(c, self.rates, **facts, device=self.about.get("device", "cpu"), dtype=dtype, trace=False)

    def forecast(self, split: str) -> tuple[dict | None, str | None]:
        return forecast.forecast(self.evals["step"], self.evals[split], self.rates)


def diagnose(run: Run) -> list[Finding]:
    """The findings, first how the loss moves."""
    use = window(run)
    if len(use) < 6:
        return [Finding("too early", f"{len(use)} evaluations after warm-up; a trend needs at least 6."), *system(run)]
    high, gap = rate_too_high(run, use), overfitting(run, use)
    follows_law = not high and gap.name != "overfitting"
    found = [trend(run, use), gap] if follows_law else [high or gap]
    if run.config and follows_law:
        found += [to_come(run), rate_too_low(run)]
    if run.config:
        found += [*limits(run), noisy_val(run, use), *(Finding("choice", text) for text in run.plan["warnings"])]
    return [finding for finding in [*found, *system(run), not_logged(run)] if finding]


def window(run):
    """Indices of the evaluations that show the trend: the last third of the steps, at least six, none of warm-up."""
    steps = run.evals["step"]
    use = np.flatnonzero(steps >= run.warm)
    return use[-max(6, int(np.sum(steps >= run.step * 2 / 3))) :]


def line_fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Fits a line to y (n,) -> its change from x[0] to x[-1], that change's standard error, scatter about the line."""
    slope, level = np.polyfit(x - x.mean(), y, 1)
    scatter = math.sqrt(np.sum((y - level - slope * (x - x.mean())) ** 2) / (len(x) - 2))
    length = x[-1] - x[0]
    return float(slope * length), scatter * length / math.sqrt(np.sum((x - x.mean()) ** 2)), scatter


def critical(df: int, z: float) -> float:
    """Student's t with the tail probability of the normal quantile z (Cornish and Fisher's expansion)."""
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def scatter_of(values):
    """Standard deviation of the noise on a smooth curve, from its second differences."""
    return math.sqrt(np.mean((values[:-2] - 2 * values[1:-1] + values[2:]) ** 2) / 6)


def span(run, use):
    return f"steps {run.evals['step'][use[0]]:,.0f} to {run.evals['step'][use[-1]]:,.0f}"


def trend(run, use):
    """Finished, falling, flat, or too noisy to tell; a fall has to exceed an error that occurs once in 400 runs."""
    steps, t = run.evals["step"][use], critical(len(use) - 2, 2.8)
    fits = {split: line_fit(steps, run.evals[split][use]) for split in ("val", "train")}
    clear = [split for split, (change, error, _) in fits.items() if -change > t * error]
    split = clear[0] if clear else "val"
    change, error, scatter = fits[split]
    length = steps[-1] - steps[0]
    unit = min(1000, 10 ** int(math.log10(length)))  # steps
    fall = f"{-change * unit / length:.4f} +- {error * unit / length:.4f} per {unit:,.0f} steps ({span(run, use)})"
    if run.config and run.step >= run.end:
        return Finding("finished", f"The schedule has ended. In its last part {split} loss fell by {fall}.")
    if clear:
        aside = "" if split == "val" else " Val loss is too noisy to tell."
        return Finding("falling", f"No plateau: {split} loss still falls by {fall}.{aside}")
    width = critical(len(use) - 2, 2.0) * error
    if max(width, width - change) < FLAT * run.evals["val"][-1]:
        return Finding("flat", f"Val loss is flat: it falls by {fall}, by at most {width - change:.4f} in total.")
    text = f"Val loss falls by {fall}. Evaluations vary by {scatter:.3f}, so a fall of less than {t * error:.3f} in "
    return Finding("too noisy to tell", f"{text}these steps cannot be seen: evaluate on more tokens.")


def overfitting(run, use):
    """Overfitting: the gap widens beyond noise, and val gains less than half of what train gains."""
    steps, train, val = (run.evals[name][use] for name in ("step", "train", "val"))
    change, error, _ = line_fit(steps, val - train)
    train_change, val_change = line_fit(steps, train)[0], line_fit(steps, val)[0]
    text = f"The gap between val and train changed by {change:+.4f} +- {error:.4f} ({span(run, use)})"
    if change < max(critical(len(use) - 2, 3.5) * error, WIDENS):
        gap = f"{abs(val[-1] - train[-1]):.3f} {'above' if val[-1] > train[-1] else 'below'} train"
        text += f", no more than noise. Val is {gap}. A constant gap is not overfitting."
        return Finding("no overfitting", text)
    text += f": train by {train_change:+.3f}, val by {val_change:+.3f}"
    text += f", in {run.epochs:.2f} epochs" if run.epochs else ""
    if run.epochs and run.epochs <= 1:
        return Finding("no overfitting", f"{text}. No text was read twice.")
    if -val_change > -0.5 * train_change:
        return Finding("no overfitting", f"{text}. Both improve.")
    best = int(np.argmin(run.evals["val"]))
    text += f". Val loss was lowest at step {run.evals['step'][best]:,.0f} ({run.evals['val'][best]:.4f})."
    return Finding("overfitting", f"{text} Add text, train for fewer steps, or use dropout.")


def spikes(run):
    """The steps after warm-up at which the loss jumped."""
    steps = [event["step"] for event in run.events if event.get("event") == "spike"]
    if run.micro and len(run.lines["step"]) > 20:
        loss = run.lines["loss"]
        above = loss - [np.median(loss[max(0, i - 5) : i + 6]) for i in range(len(loss))]
        steps = run.lines["step"][above > 8 * 1.4826 * np.median(np.abs(above))].tolist()
    return [step for step in steps if step > run.warm]


def rate_too_high(run, use):
    """The loss jumps repeatedly, or rises in both splits, or fell only while the learning rate did; else None."""
    jumps, val, text = spikes(run), run.evals["val"], ""
    rises = [line_fit(run.evals["step"][use], run.evals[split][use]) for split in ("train", "val")]
    if len(jumps) >= 3:
        text = f"The loss jumped {len(jumps)} times after warm-up (first at step {jumps[0]:,.0f})."
    elif all(rise > max(critical(len(use) - 2, 3.5) * error, 0.01 * val[-1]) for rise, error, _ in rises):
        text = f"Both losses rise: train by {rises[0][0]:.3f}, val by {rises[1][0]:.3f} ({span(run, use)})."
    elif run.config and run.config.decay_lr:
        text = fell_only_with_the_rate(run)
    advice = "Try a third of the learning rate, or a longer warm-up."
    return Finding("rate too high", f"{text}{clipping(run)} {advice}") if text else None


def fell_only_with_the_rate(run):
    """A sentence if val loss fell by far more while the learning rate fell than while it was high; else ""."""
    steps, val = run.evals["step"], run.evals["val"]
    share = np.array(run.rates)[np.minimum(steps, len(run.rates) - 1).astype(int)] / max(run.rates)
    late = steps >= max(run.warm, 0.1 * run.end)  # before this, every loss falls fast
    high, low = np.flatnonzero(late & (share > 0.7)), np.flatnonzero(late & (share < 0.5))
    if len(high) < 4 or len(low) < 3:
        return ""
    while_high = val[high[:2]].mean() - val[high[-2:]].mean()
    while_falling = val[high[-2:]].mean() - val[low[-2:]].mean()
    if while_falling <= max(5 * scatter_of(val[high[0] :]), 0.02 * val[-1]) or while_high >= 0.7 * while_falling:
        return ""
    return f"Val loss fell by {while_high:.3f} while the learning rate was high, by {while_falling:.3f} when it fell."


def clipping(run):
    """A sentence about the gradient norm, after a space; "" if there are few values."""
    norms = run.lines.get("grad_norm", np.full(len(run.lines["step"]), np.nan))
    norms = norms[np.isfinite(norms) & (run.lines["step"] > run.warm)]
    if len(norms) < 10 or not run.config:
        return ""
    third, clip = len(norms) // 3, run.config.grad_clip
    clipped = f"; it was clipped in {np.mean(norms > clip):.0%} of the log lines" if clip else ""
    return f" The gradient norm was {np.median(norms[:third]):.2f}, lately {np.median(norms[-third:]):.2f}{clipped}."


def rate_too_low(run):
    """The peak is at most a fifth of the usual one, and its decay brought nothing: there was no noise to anneal."""
    c = run.config
    usual = 0.003239 - 0.0001395 * math.log(run.plan["parameters"]["blocks"])  # Kaplan et al. 2020, eq. D.1, for Adam
    if not c.decay_lr or c.optimizer != "adamw" or c.learning_rate > usual / 5 or spikes(run):
        return None
    fit, _ = run.forecast("val")
    if not fit or run.step < 0.6 * run.end or fit["b"][2] > 0.005 * fit["loss"]:
        return None
    text = f"The peak learning rate is {c.learning_rate / usual:.2g} of the usual one ({usual:.1e}, Kaplan et al. 2020)"
    return Finding("rate too low", f"{text}. Its decay has brought nothing.{clipping(run)} Try three times the rate.")


def to_come(run):
    """The decay that is left, the forecast of the end, and what other lengths would give by the same law."""
    if run.step >= run.end:
        return None
    rates, step = run.rates, run.step
    now, end = rates[step] / max(rates), rates[-1] / max(rates)
    text = f"The learning rate is {now:.2f} of its peak and will be {end:.2f}. "
    val, reason = run.forecast("val")
    if not val:
        return Finding("forecast", f"{text}There is {reason}.")
    train, _ = run.forecast("train")
    text += f"By the law of annealing, val ends at {val['loss']:.3f} +- {val['band']:.3f} (step {val['end']:,}), "
    text += f"{val['now'] - val['loss']:.3f} below now, and train at {train['loss']:.3f} +- {train['band']:.3f}. "
    decay = np.linspace(rates[step], min(rates), max(2, step // 10)).tolist()
    others = {f"a decay over {len(decay):,} steps from now on": rates[:step] + decay}
    others |= {f"a run of {name} the steps": forecast.stretch(rates, n) for name, n in (("twice", 2), ("half", 0.5))}
    ends = []
    for other, schedule in others.items():
        loss = forecast.follow(val, schedule)[-1]
        error = 2 * math.hypot(val["fit_error"], forecast.TO_COME * (val["now"] - loss))
        ends.append(f"{other} ends at {loss:.2f} +- {error:.2f}")
    return Finding("forecast", f"{text}By the same law, {', '.join(ends)}.")


def limits(run):
    """The expected loss, and whether more parameters or more tokens would lower it more, by the scaling law."""
    epochs, expected, n, d = run.plan["epochs"], run.plan["loss"], run.plan["parameters"]["total"], run.plan["tokens"]
    if (epochs or 0) > 4:
        text = f"The run reads the data {epochs:.1f} times. Beyond 4 passes repeats help little: add text"
        return [Finding("limited by data", f"{text} (Muennighoff et al. 2023).")]
    if expected is None:
        return [Finding("no expectation", f"No loss to expect: {run.plan['no_loss']}.")]
    size, data = plan.law(n, d) - plan.law(2 * n, d), plan.law(n, d) - plan.law(n, 2 * d)
    ratio = size / data
    name = "limited by size" if ratio > 1.5 else "limited by tokens" if ratio < 1 / 1.5 else "balanced"
    text = f"Loss would fall by {size:.2f} with twice the {n / 1e6:.0f}M parameters, {data:.2f} with twice the tokens."
    law = f"Val loss at the end should be {expected:.2f} +- {plan.BAND} on FineWeb (law of Hoffmann et al. 2022)."
    return [Finding("expected", law), Finding(name, text)]


def noisy_val(run, use):
    """Val loss has a large standard error, or varies more than its number of tokens explains; else None."""
    if run.groups and len(run.groups[-1]) >= 16:
        error = float(np.std(run.groups[-1], ddof=1) / math.sqrt(len(run.groups[-1])))
        text = f"The val loss of {run.evals['val'][-1]:.3f} has a standard error of {error:.3f}: "
        return Finding("noisy val set", f"{text}evaluate on more tokens.") if error > 0.02 else None
    later = run.lines["step"] >= max(run.warm, 0.1 * run.step)
    if not run.micro or not run.config.eval_iters or later.sum() < 20:
        return None
    one, batches = scatter_of(run.lines["loss"][later]), run.config.eval_iters
    fair, scatter = one / math.sqrt(batches), {}
    for split in ("train", "val"):
        fit, df = run.forecast(split)[0], len(use) - 2
        scatter[split] = line_fit(run.evals["step"][use], run.evals[split][use])[2]
        if fit:
            scatter[split], df = fit["scatter"], int(np.sum(run.evals["step"] >= fit["first_step"])) - 4
    limit = (1 - 2 / (9 * df) + 3 * math.sqrt(2 / (9 * df))) ** 1.5  # of chi / sqrt(df), Wilson and Hilferty 1931
    if scatter["val"] < fair * max(1.3, limit):
        return None
    gap = (run.evals["val"] - run.evals["train"])[use]
    text = f"One batch varies by {one:.3f}, so an evaluation on {batches} batches should vary by {fair:.4f}; "
    text += f"train varies by {scatter['train']:.4f}, val by {scatter['val']:.4f}. "
    if gap.mean() < -5 * gap.std() / math.sqrt(len(use)):
        text += f"Val is {-gap.mean():.3f} below train. "
    return Finding("noisy val set", f"{text}Check the val set: it is small, or not a fair sample.")


def system(run):
    """Problems of GradScaler and of data loading in the second half of the log lines."""
    half = len(run.lines["step"]) // 2
    late = {name: values[half:] for name, values in run.lines.items()}
    if np.isfinite(late.get("scale", np.nan)).any():
        steps, skipped = late["step"][-1] - late["step"][0] or 1, np.nansum(late["skipped"])
        scale = late["scale"][np.isfinite(late["scale"])][-1]
        if skipped > max(3, 0.01 * steps) or scale < 16:
            text = f"{skipped:.0f} of the last {steps:,.0f} steps were skipped; GradScaler's scale is {scale:g}. "
            yield Finding("scaler trouble", f"{text}Use bfloat16 if the card has it, or a lower learning rate.")
    waits = np.nanmean(late["data_share"]) if len(late.get("data_share", [])) else 0
    if waits > 0.05:
        yield Finding("waits for data", f"{waits:.0%} of the step time is waiting for data: use a faster, local disk.")


def not_logged(run):
    """What a report could use but these numbers do not have."""
    lacks = {
        "learning rates and sizes (--run_config gives them, and a forecast)": not run.config,
        "gradient norm": "grad_norm" not in run.lines,
        "data-loading time": "data_share" not in run.lines,
        "standard error of an evaluation": not run.groups and not run.micro,
    }
    missing = [what for what, absent in lacks.items() if absent]
    return Finding("not logged", f"{', '.join(missing)}.") if missing else None
