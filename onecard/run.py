"""What is known of a run: its evaluations, log lines, config and learning rates; its curves; whether it is lost.

report.py makes a Run from what onecard/logs.py reads. diagnosis.py, compare.py and the page read it.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from onecard import forecast, plan
from onecard.curve import Curve, finite, medians, risen

EVALS = ("step", "train", "val", "bits_per_byte", "choices_acc_norm", "eval_seconds")


@dataclass
class Run:
    """What is known of a run. A report of a printed log has no config, and then no rates.

    In evals and lines NaN is what was not logged, inf what was logged and is not finite (nan, inf).
    """

    name: str
    evals: dict[str, np.ndarray]  # (n,) for n evaluations: those of EVALS
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
        facts["bytes_per_token"] = self.bytes_per_token
        if eval_tokens := c.eval_tokens or c.eval_iters * c.batch_size * c.block_size:
            facts["eval_tokens"] = eval_tokens
        dtype = getattr(torch, self.about.get("dtype", "bfloat16"))
        return plan.plan(c, self.rates, **facts, device=self.about.get("device", "cpu"), dtype=dtype, trace=False)

    @property
    def bytes_per_token(self) -> float | None:
        """Of the val text, from its loss in nats per token and in bits per byte."""
        ratios = self.evals["val"] / self.evals["bits_per_byte"] / math.log(2)
        return float(ratios[np.isfinite(ratios)][-1]) if np.isfinite(ratios).any() else None

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
    def rate_shares(self) -> np.ndarray:
        """The learning rate of every step of the schedule, as a share of its peak."""
        rates = np.array(self.rates)
        return rates / (rates.max(initial=0.0) or 1.0)

    @cached_property
    def rates_so_far(self) -> Curve:
        """The learning rate by step, from the schedule or else from the log lines."""
        if not self.rates:
            return finite(self.lines["step"], self.lines.get("lr", np.full(len(self.lines["step"]), np.nan)))
        return finite(np.arange(min(self.step + 1, len(self.rates))), np.array(self.rates[: self.step + 1]))

    @cached_property
    def jump(self) -> tuple[int, int] | None:
        """The steps between which the learning rate last rose by a fifth or more after it had fallen, else None."""
        steps, rates = self.rates_so_far
        rises, fallen = np.diff(rates) > 0, np.maximum.accumulate(rates)[:-1] > 1.01 * rates[:-1]
        for last in np.flatnonzero(rises & fallen)[-1:]:
            first = np.flatnonzero(~rises[:last])[-1] + 1
            if rates[last + 1] > 1.2 * rates[first]:
                return int(steps[first]), int(steps[last + 1])
        return None

    @property
    def start(self) -> float:
        """The first step of what shows the trend: after warm-up, and after the rise that follows a jump of the rate."""
        if not self.jump:
            return self.warm
        after = (self.val if self.val.steps[-1:] > self.jump[1] else self.train).since(self.jump[1] + 1)
        return max(self.warm, self.jump[1] + 1, *after.steps[after.values == after.values.max(initial=0)][:1])

    @cached_property
    def broken(self) -> tuple[str, str] | None:
        """(name, sentence) if the run is lost: its loss is not finite, or has risen and stays high."""
        return not_finite(self) or diverged(self)

    @cached_property
    def forecast(self) -> forecast.Forecast:
        """Of the val loss at the end, from the evaluations so far; or None and the reason."""
        if self.broken:
            return None, "no forecast: the loss has risen, or is not finite"
        return forecast.forecast(*self.val, self.rates, train=self.train_beside_val)

    @cached_property
    def earlier_forecasts(self) -> list[dict]:
        """Forecasts of val that were possible earlier (forecast.earlier_forecasts); none of a run that is lost."""
        if not self.config or self.broken:
            return []
        return forecast.earlier_forecasts(*self.val, self.rates, train=self.train_beside_val)

    @property
    def train_beside_val(self) -> np.ndarray:
        """The train losses of the evaluations that have a val loss; NaN where they have none."""
        return self.evals["train"][np.isfinite(self.evals["val"])]


def not_finite(run: Run) -> tuple[str, str] | None:
    """A loss that is not finite in a val evaluation or in the last values, or gradients that were not at the end."""
    logged = ("val", run.evals["step"], run.evals["val"]), ("train", run.evals["step"], run.evals["train"])
    for split, steps, values in (*logged, ("train", run.lines["step"], run.lines.get("loss", np.array([])))):
        bad = steps[np.isinf(values)]
        seen = steps[~np.isnan(values)]
        if len(bad) and (np.isin(seen[-3:], bad).all() or values is run.evals["val"]):
            count = f"in {len(bad)} of {np.sum(seen >= bad[0])} values"
            return "not finite", f"The {split} loss is not finite (nan or inf) from step {bad[0]:,.0f} on, {count}."
    skipped = [e["step"] for e in run.events if e.get("event") == "skipped" and (e.get("scale") or 0) < 1]
    evaluated = [e["step"] for e in run.events if e.get("event") == "evaluation not finite"]
    if evaluated and evaluated[-1] >= max([0, *run.val.steps]):
        return "not finite", f"The loss of the evaluation at step {evaluated[-1]:,} is not finite."
    if len(skipped) >= 3 and skipped[-3] >= run.step - 2:
        return "not finite", f"Steps {skipped[-3]:,} to {skipped[-1]:,} were skipped: their gradients are not finite."
    return None


def diverged(run: Run) -> tuple[str, str] | None:
    """A loss that stays far above its best, or the train loss above its best after warm-up; not val alone."""
    late = run.train.since(run.start)
    cases = [("diverged", "train", run.train, 0.15), ("rising", "train", late, 0.01)]
    if len(late.steps) < 6 or risen(late, 0.005):
        cases += [("diverged", "val", run.val, 0.15), ("rising", "val", run.val.since(run.start), 0.01)]
    for name, split, curve, least in cases:
        if up := risen(curve, least):
            text = f"The {split} loss was lowest at step {curve.steps[up[0]]:,.0f} ({curve.values[up[0]]:.3f}); it is "
            return name, f"{text}{up[1]:.3f} above that now and stays there."
    return None
