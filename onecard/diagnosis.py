"""Finds what the numbers of a run show, as sentences with figures: does it fall, diverge, overfit, end as expected?

    for name, text in diagnose(run): print(name, text)

The first finding is the verdict. A finding whose name is in PROBLEMS asks for a change; the others describe the run.
A sentence is made only where the numbers support it beyond their noise. A spike of a single step supports nothing: 10
to 71 of them happen in each of eleven healthy public runs.
"""

import math
from collections import namedtuple
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from onecard import forecast, plan
from onecard.curve import Curve, change, critical, finite, medians, noise, risen
from onecard.verdict import REMEDY, outlook, verdict

PROBLEMS = {*REMEDY, "flat", "rate too high", "rate too low", "noisy val set", "val below train"}
PROBLEMS |= {"scaler trouble", "waits for data"}
FLAT = 0.004  # share of the loss: a decrease that is surely smaller than this, over a third of the steps, is flat


Finding = namedtuple("Finding", "name text")


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
    def end(self) -> int:
        return self.config.max_iters

    @property
    def finished(self) -> bool:
        return bool(self.config) and self.step >= self.end

    @property
    def warm(self) -> float:  # evaluations before this step are left out
        if not self.config:
            return 0.05 * self.step
        return max(2 * self.config.warmup_iters if self.config.decay_lr else 0, 0.05 * min(self.step, self.end))

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

    @cached_property
    def val(self) -> Curve:
        return finite(self.evals["step"], self.evals["val"])

    @cached_property
    def train(self) -> Curve:
        """Of the evaluations; of the log lines where the evaluations have none, or only the loss of their step."""
        lines = finite(self.lines["step"], self.lines.get("loss", np.full(len(self.lines["step"]), np.nan)))
        evals = finite(self.evals["step"], self.evals["train"])
        of_lines = set(zip(*lines, strict=True))
        same = sum(point in of_lines for point in zip(*evals, strict=True))
        return evals if len(evals.steps) > 2 * same and 2 * len(evals.steps) >= len(self.val.steps) else medians(lines)

    @cached_property
    def jump(self) -> tuple[int, int] | None:
        """The steps between which the learning rate last rose by a fifth or more after it had fallen, else None."""
        seen = finite(self.lines["step"], self.lines.get("lr", np.full(len(self.lines["step"]), np.nan)))
        steps, rates = (np.arange(len(self.rates)), np.array(self.rates)) if self.rates else seen
        rates = rates[steps <= self.step]
        rises, fallen = np.diff(rates) > 0, np.maximum.accumulate(rates)[:-1] > 1.01 * rates[:-1]
        for last in np.flatnonzero(rises & fallen)[-1:]:
            first = np.flatnonzero(~rises[:last])[-1] + 1
            if rates[last + 1] > 1.2 * rates[first]:
                return int(steps[first]), int(steps[last + 1])
        return None

    @property
    def start(self) -> float:  # of what shows the trend: after warm-up, and after a jump of the learning rate
        return max(self.warm, self.jump[1] if self.jump else 0)

    @cached_property
    def broken(self) -> Finding | None:
        return not_finite(self) or diverged(self)

    def forecast(self, split: str, until: float = math.inf) -> tuple[dict | None, str | None]:
        """The forecast (forecast.forecast) from the evaluations up to a step, or None and the reason."""
        if self.broken and until == math.inf:
            return None, "no forecast: the loss rises or is not finite"
        curve = finite(self.evals["step"], self.evals[split])
        seen = curve.steps <= until
        return forecast.forecast(curve.steps[seen], curve.values[seen], self.rates)


def diagnose(run: Run) -> list[Finding]:
    """The findings: the verdict, then problems, then what describes the run."""
    found = [run.broken]
    if not run.broken:
        found = [rate_jumped(run), overfitting(run), rate_too_high(run), rate_too_low(run), *val_set(run), trend(run)]
    found += [*(Finding(*pair) for pair in outlook(run)), *system(run)]
    found += [Finding("choice", text) for text in (run.plan["warnings"] if run.config else [])]
    findings = [finding for finding in [*found, not_logged(run)] if finding]
    findings.sort(key=lambda finding: finding.name not in PROBLEMS)
    problems = [finding.name for finding in findings if finding.name in PROBLEMS]
    return [Finding("verdict", verdict(run, problems)), *findings]


def span(part):
    return f"steps {part.steps[0]:,.0f} to {part.steps[-1]:,.0f}"


# ---- what ends or spoils a run


def not_finite(run):
    """A loss that is not finite in an evaluation, or in the last log lines; else None."""
    evals = ("val", run.evals["step"], run.evals["val"]), ("train", run.evals["step"], run.evals["train"])
    for what, steps, values in (*evals, ("train", run.lines["step"], run.lines.get("loss", np.array([])))):
        logged, infinite = ~np.isnan(values), np.isinf(values)
        lasting = infinite[logged][-3:].all() if logged.any() else False
        if infinite.any() and (lasting or values is run.evals["val"]):
            first, later = int(steps[infinite.argmax()]), int(np.sum(logged & (steps > steps[infinite.argmax()])))
            text = f"The {what} loss is not finite (nan or inf) from step {first:,} on"
            text += f", in {infinite.sum() - 1} of the {later} values after it" if later else ""
            return Finding("not finite", f"{text}. First {REMEDY['not finite']}.")
    skipped = [e["step"] for e in run.events if e.get("event") == "skipped" and (e.get("scale") or 0) < 1]
    evaluated = [e["step"] for e in run.events if e.get("event") == "evaluation not finite"]
    if evaluated or (skipped[-1:] >= [max(run.step, 1)] and len(skipped) > 2):
        what = "evaluation" if evaluated else f"gradient of the last of {len(skipped)} skipped steps"
        text = f"The {what} at step {[*skipped, *evaluated][-1]:,} is not finite."
        return Finding("not finite", f"{text} First {REMEDY['not finite']}.")
    return None


def diverged(run):
    """A loss far above its best, or train above its best after warm-up, and staying there; else None."""
    for split, curve, least in (("train", run.train, 0.15), ("val", run.val, 0.15), ("train", run.train, 0.01)):
        curve = curve if least > 0.1 else curve.since(run.start)
        up = risen(curve, least)
        of_train = risen(run.train.since(run.start), 0.005)
        if not up or (split == "val" and len(run.train.steps) > 3 and not of_train):
            continue  # val alone: that is overfitting
        best, rise = up
        name = "diverged" if least > 0.1 else "rising"
        text = f"The {split} loss was lowest at step {curve.steps[best]:,.0f} ({curve.values[best]:.3f}). It is "
        text += f"{rise:.3f} above that now and stays there. First {REMEDY[name]}."
        return Finding(name, text)
    return None


def rate_jumped(run):
    """The learning rate rose after it had fallen, as in a resume onto a longer schedule; what the loss did; or None."""
    if not run.jump:
        return None
    first, last = run.jump
    split, curve = ("val", run.val) if run.val.steps[-1:] > last else ("train", run.train)
    before, after = curve.values[curve.steps <= first][-1:], curve.values[curve.steps >= last]
    rates = (
        np.array(run.rates)[[first, min(last, len(run.rates) - 1)]]
        if run.rates
        else np.interp(run.jump, *finite(run.lines["step"], run.lines["lr"]))
    )
    text = f"The learning rate rose from {rates[0]:.2g} to {rates[1]:.2g} at step {last:,}"
    if not len(before) or not len(after):
        return Finding("rate rose", f"{text}; the loss will rise with it at first.")
    text += f", and {split} loss from {before[0]:.3f} to {after.max():.3f}. "
    if after[-1] <= before[0] + 2 * noise(curve):
        return Finding("rate rose", f"{text}It is {after[-1]:.3f} now: the rise is made good.")
    text += f"It is {after[-1]:.3f} now, {after[-1] - before[0]:.3f} above that; it falls again as the rate does. Or "
    return Finding("rate jumped", f"{text}{REMEDY['rate jumped']}.")


def overfitting(run):
    """Whether the gap between val and train widens, and whether val has turned up meanwhile; None without train loss.

    Both losses rose: that is not overfitting. The gap of smoothed log lines is at their middle steps.
    """
    train, val = run.train.since(run.start), run.val.since(run.start)
    if len(val.steps) < 6:
        return None
    train = Curve(*(values[train.steps <= val.steps[-1]] for values in train))
    if len(train.steps) < 6:
        return None
    gap = Curve(train.steps, np.interp(train.steps, *val) - train.values)
    part, scatter = gap.late(), noise(gap)
    widened, error = change(part, scatter)
    read = f", in {run.epochs:.2f} epochs" if run.epochs else ""
    text = f"The gap between val and train changed by {widened:+.4f} +- {error:.4f} ({span(part)}{read})"
    if up := risen(val, 0.005):
        best, rise = up
        learned = float(np.interp(val.steps[best], *train) - np.median(train.values[-3:]))
        if learned > max(3 * noise(train), 0.3 * rise):
            text = (
                f"Val loss was lowest at step {val.steps[best]:,.0f} ({val.values[best]:.3f}) and is {rise:.3f} above "
            )
            text += f"that now, while train loss fell by {learned:.3f}{read}."
            if run.epochs and run.epochs <= 1:
                return Finding("val rises", f"{text} No text was read twice: is val of other text than train?")
            return Finding("overfitting", f"{text} To lower it, {REMEDY['overfitting']}.")
    if widened > max(critical(len(part.steps), 4.0), 5) * error:
        still = "val still improves" if change(val.late(), 0)[0] < 0 else "val no longer improves"
        return Finding("gap widens", f"{text}; {still}. Overfitting begins where val rises.")
    side = "above" if part.values[-1] > 0 else "below"
    text += f". Val is {abs(np.median(part.values)):.3f} {side} train. A constant gap is not overfitting."
    return Finding("no overfitting", text)


def trend(run):
    """How much the loss falls in the last third of the steps: val, or train where val is missing or unclear."""
    curves = [(name, curve.since(run.start)) for name, curve in (("val", run.val), ("train", run.train))]
    curves = [(name, curve) for name, curve in curves if len(curve.steps) >= 6]
    if not curves:
        text = f"{len(run.val.since(run.start).steps)} evaluations after warm-up; a trend needs at least 6."
        return None if run.finished else Finding("too early", text)
    tried = []
    for name, curve in curves:
        part, scatter = curve.late(), noise(curve)
        moved, error = change(part, scatter)
        half = Curve(*(values[len(part.steps) // 2 :] for values in part))
        clear = -moved > critical(len(part.steps), 2.8) * error and change(half, 0)[0] < 0
        tried.append((not clear, name, part, moved, error, scatter))
    unclear, name, part, moved, error, scatter = min(tried, key=lambda t: t[0])
    length = part.steps[-1] - part.steps[0]
    unit = min(1000, 10 ** int(math.log10(length)))  # steps
    text = f"{-moved * unit / length:.4f} +- {error * unit / length:.4f} per {unit:,} steps ({span(part)})."
    if not unclear:
        text = f"{name} loss fell by {text}" if run.finished else f"No plateau: {name} loss still falls by {text}"
        return Finding("finished" if run.finished else "falling", text)
    if run.finished:
        return Finding(
            "finished", f"In the last part {name} loss changed by {moved:+.4f} +- {error:.4f} ({span(part)})."
        )
    most = max(-moved, 0) + critical(len(part.steps), 2.0) * error
    if most < FLAT * part.values[-1]:
        share = run.rates[min(run.step, len(run.rates) - 1)] / max(run.rates) if run.rates else None
        text = f"{name} loss falls by at most {most:.4f} in {span(part)}."
        if share is None or share < 0.1:
            return Finding("settled", text)
        text += f" The learning rate is {share:.2f} of its peak: let it decay, or use a larger network."
        return Finding("flat", text)
    text = f"{name} loss changed by {moved:+.4f} +- {error:.4f} ({span(part)}). Evaluations vary by {scatter:.4f}: "
    return Finding("too noisy to tell", f"{text}evaluate on more tokens, or wait for more evaluations.")


def rate_too_high(run):
    """Spikes that reach the evaluations: val and train far above both neighbours, three times or more; else None."""
    val, train = run.val.since(run.start), run.train.since(run.start)
    if len(val.steps) < 10 or not np.array_equal(val.steps, train.steps):
        return None
    high = np.ones(len(val.steps) - 2, dtype=bool)
    for curve in (val, train):
        y = curve.values
        high &= y[1:-1] - np.maximum(y[:-2], y[2:]) > np.maximum(6 * noise(curve), 0.01 * y[1:-1])
    if high.sum() < 3:
        return None
    steps = ", ".join(f"{step:,.0f}" for step in val.steps[1:-1][high][:5])
    text = f"{high.sum()} spikes reached the evaluations of both splits (steps {steps})."
    return Finding("rate too high", f"{text} Try half of the learning rate, or a longer warm-up.")


def rate_too_low(run):
    """AdamW's peak is a fifth of the usual or less, and the loss gained no speed as the rate fell; else None.

    Where a rate is high enough, its decay takes noise out of the weights: the loss falls faster for each unit of the
    summed rate than before.
    """
    c = run.config
    if not c or not c.decay_lr or c.optimizer != "adamw" or c.from_pretrained or run.jump:
        return None
    usual, share = plan.usual_rate(run.plan["parameters"]["blocks"]), np.array(run.rates) / max(run.rates)
    val, summed = run.val.since(run.start), np.append(0.0, np.cumsum(share))
    share = share[np.minimum(val.steps.astype(int), len(share) - 1)]
    high, low = (Curve(summed[val.steps[part].astype(int)], val.values[part]) for part in (share > 0.5, share <= 0.5))
    if c.learning_rate > usual / 5 or min(len(high.steps), len(low.steps)) < 6:
        return None
    before = Curve(*(values[len(values) // 2 :] for values in high))
    (early, _), (late, error) = (np.divide(change(part, noise(val)), np.ptp(part.steps)) for part in (before, low))
    if late < early - 2 * error:
        return None
    text = (
        f"The peak of the learning rate is {c.learning_rate / usual:.2g} of the usual {usual:.1e} (Kaplan et al. 2020)"
    )
    return Finding("rate too low", f"{text}, and its decay brought nothing. Try three times the rate.")


def val_set(run):
    """Val scatters more than its number of tokens allows and than train does, or lies far below train."""
    val, train = run.val.since(run.start), run.train.since(run.start)
    if run.groups and len(run.groups[-1]) >= 8:
        fair = float(np.std(run.groups[-1], ddof=1) / math.sqrt(len(run.groups[-1])))
        if fair > 0.02:
            text = f"The last val loss has a standard error of {fair:.3f}: evaluate on more tokens to compare runs."
            yield Finding("val error", text)
    elif run.micro and run.config and run.config.eval_iters:
        fair = run.plan["eval_error"]
    else:
        return
    if len(val.steps) < 12 or not np.array_equal(val.steps, train.steps):
        return
    scatter, of_train = noise(val), noise(train)
    if scatter > 2 * fair and scatter > math.exp(3 * math.sqrt(2 / len(val.steps))) * of_train:
        text = f"Val loss varies by {scatter:.4f} between evaluations, train loss by {of_train:.4f}; "
        yield Finding("noisy val set", f"{text}the number of tokens allows {fair:.4f}. Check the val set: is it small?")
    gap = (val.values - train.values)[-len(val.late().steps) :]
    error = max(float(gap.std()) / math.sqrt(len(gap)), 1.4 * fair if run.groups else 0.0)
    if gap.max() < 0 and -gap.mean() > max(5 * error, 0.03):
        text = f"Val is {-gap.mean():.3f} +- {error:.3f} below train, in all of the last {len(gap)} evaluations. The "
        text += "val set is small, or its text is easier than the train text: check it before you compare val losses."
        yield Finding("val below train", text)


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
        "val loss, so overfitting cannot be seen": not len(run.val.steps),
        "train loss": not len(run.train.steps),
        "gradient norm": "grad_norm" not in run.lines,
        "data-loading time": "data_share" not in run.lines,
        "standard error of an evaluation": not run.groups and not run.micro,
    }
    missing = [what for what, absent in lacks.items() if absent]
    return Finding("not logged", f"{', '.join(missing)}.") if missing else None
