"""What the numbers of a run carry, as plain sentences with their figures; report.py reads the numbers and shows them.

    for finding in diagnose(run): print(finding.name, finding.text)

A finding whose name is in PROBLEMS asks for a change; the others say how the run stands. The one thing to know: a
sentence is made only from numbers that are there and beyond their noise. No torch here.
"""

import math
from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np

from onecard import plan

Finding = namedtuple("Finding", "name text")
PROBLEMS = ("flat", "too noisy to tell", "overfitting", "rate too high", "rate too low", "noisy val set")
PROBLEMS += ("scaler trouble", "waits for data")
FLAT = 0.008  # of the loss: a fall that is surely less over a third of the steps is none
WIDENS = 0.02  # nats


@dataclass
class Run:
    """What a run left behind. evals: arrays of step, train, val; groups: for each evaluation the means of fixed groups
    of val windows, or empty; lines: arrays of the log lines by name, `micro` if their loss is of one micro batch."""

    name: str
    evals: dict
    groups: list
    lines: dict
    micro: bool = False
    starts: list = field(default_factory=list)  # (step, config)
    about: dict = field(default_factory=dict)  # the last start line
    events: list = field(default_factory=list)
    samples: list = field(default_factory=list)

    @property
    def config(self):
        return self.starts[-1][1] if self.starts else None

    @property
    def step(self):
        return int(max([0, *self.evals["step"][-1:], *self.lines["step"][-1:]]))

    @property
    def end(self):
        """The step at which the schedule is at its end."""
        c = self.config
        return min(c.max_iters, c.lr_decay_iters or c.max_iters) if c.decay_lr else c.max_iters

    @property
    def warm(self):
        """Up to here evaluations say little."""
        return max(2 * self.config.warmup_iters, 0.05 * self.config.max_iters) if self.config else 0.05 * self.step

    def rates(self):
        """The learning rate of every step of the schedule; before a resume as it was then."""
        rates = plan.rates(self.config)
        for (step, config), (end, _) in zip(self.starts, self.starts[1:], strict=False):
            rates[step:end] = [plan.learning_rate(i, config) for i in range(step, min(end, len(rates)))]
        return rates

    def epochs(self, steps):
        tokens = self.about.get("data", {}).get("train_tokens")
        return steps * plan.step_tokens(self.config) / tokens if tokens else None

    def forecast(self, split):
        return plan.forecast(self.evals["step"], self.evals[split], self.rates())


def diagnose(run):
    """-> [Finding], how the run stands first."""
    use = window(run)
    if len(use) < 6:
        return [Finding("too early", f"{len(use)} evaluations behind the warm-up; a trend takes six"), *system(run)]
    high, gap = rate_too_high(run, use), overfitting(run, use)
    found = [high] if high else [gap] if gap.name == "overfitting" else [trend(run, use), gap]
    if run.config and len(found) == 2:  # else the loss does not follow the law
        found += [to_come(run), rate_too_low(run)]
    if run.config:
        found += [*limits(run), noisy_val(run, use), *choices(run)]
    return [finding for finding in [*found, *system(run), not_carried(run)] if finding]


# ---- a little statistics


def window(run):
    """The evaluations from which a trend is read: the last third of the steps, six at least; none of the warm-up."""
    steps = run.evals["step"]
    use = np.flatnonzero(steps >= run.warm)
    return use[-max(6, int(np.sum(steps >= run.step * 2 / 3))) :]


def line_fit(x, y):
    """-> change of y from the first x to the last by a straight line, its standard error, scatter about the line."""
    slope, level = np.polyfit(x - x.mean(), y, 1)
    scatter = math.sqrt(np.sum((y - level - slope * (x - x.mean())) ** 2) / (len(x) - 2))
    length = x[-1] - x[0]
    return float(slope * length), scatter * length / math.sqrt(np.sum((x - x.mean()) ** 2)), scatter


def critical(df, z):
    """Student's t that is exceeded as seldom as z by a normal deviate (Cornish and Fisher's expansion)."""
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def scatter_of(values):
    """Standard deviation of the noise on a smooth curve, from its second differences."""
    return math.sqrt(np.mean((values[:-2] - 2 * values[1:-1] + values[2:]) ** 2) / 6)


def span(run, use):
    return f"steps {run.evals['step'][use[0]]:,.0f} to {run.evals['step'][use[-1]]:,.0f}"


# ---- how the loss moves


def trend(run, use):
    """Falling, flat, or not to be told apart: beyond an error that is met by chance once in 400 runs."""
    steps, t = run.evals["step"][use], critical(len(use) - 2, 2.8)
    fits = {split: line_fit(steps, run.evals[split][use]) for split in ("val", "train")}
    clear = [split for split, (change, error, _) in fits.items() if -change > t * error]
    split = (clear or ["val"])[0]
    change, error, scatter = fits[split]
    per = min(1000, 10 ** int(math.log10(steps[-1] - steps[0]))) / (steps[-1] - steps[0])
    fall = f"{-change * per:.4f} +- {error * per:.4f} per {per * (steps[-1] - steps[0]):,.0f} steps ({span(run, use)})"
    if run.config and run.step >= run.end:
        return Finding("finished", f"the schedule is at its end; lately the {split} loss fell by {fall}")
    if clear:
        aside = "" if split == "val" else "; val is too noisy to tell"
        return Finding("falling", f"no plateau: the {split} loss still falls, by {fall}{aside}")
    width, little = critical(len(use) - 2, 2.0) * error, FLAT * run.evals["val"][-1]
    if max(width, width - change) < little:
        return Finding("flat", f"val falls by {fall}: by {width - change:.4f} at the most in all of these steps")
    text = f"val falls by {fall}: evaluations scatter by {scatter:.3f}, so that a fall of less than {t * error:.3f}"
    return Finding("too noisy to tell", f"{text} in these steps cannot be seen; evaluate on more tokens")


def overfitting(run, use):
    """A gap that widens beyond noise while val gains less than half of what train does; a gap alone is none."""
    steps, train, val = (run.evals[name][use] for name in ("step", "train", "val"))
    change, error, _ = line_fit(steps, val - train)
    train_change, val_change = line_fit(steps, train)[0], line_fit(steps, val)[0]
    epochs = run.config and run.epochs(run.step)
    moved = f"the gap between val and train moved by {change:+.4f} +- {error:.4f} ({span(run, use)})"
    if change < max(critical(len(use) - 2, 3.5) * error, WIDENS):
        gap = f"the gap itself, now {(val - train)[-1]:+.3f}, is no overfitting"
        return Finding("no overfitting", f"{moved}, no more than noise; {gap}")
    moved += f": train by {train_change:+.3f}, val by {val_change:+.3f}"
    moved += f", in {epochs:.2f} epochs" if epochs else ""
    if epochs and epochs <= 1:
        return Finding("no overfitting", f"{moved}: nothing was seen twice")
    if -val_change > -0.5 * train_change:
        return Finding("no overfitting", f"{moved}: both gain")
    best = int(np.argmin(run.evals["val"]))
    best = f"{run.evals['val'][best]:.4f} at step {run.evals['step'][best]:,.0f}"
    return Finding("overfitting", f"{moved}; val was best with {best}: more text, fewer steps, or dropout")


def spikes(run):
    """The steps behind the warm-up at which the loss jumped."""
    steps = [event["step"] for event in run.events if event.get("event") == "spike"]
    if run.micro and len(run.lines["step"]) > 20:
        loss = run.lines["loss"]
        off = loss - [np.median(loss[max(0, i - 5) : i + 6]) for i in range(len(loss))]
        steps = run.lines["step"][off > 8 * 1.4826 * np.median(np.abs(off))].tolist()
    return [step for step in steps if step > run.warm]


def rate_too_high(run, use):
    """A loss that jumps again and again, that rises in both splits, or that fell only when the learning rate did."""
    jumps, (steps, train, val) = spikes(run), (run.evals[name] for name in ("step", "train", "val"))
    rises = [line_fit(steps[use], y[use]) for y in (train, val)]
    text, top, low = "", [], []
    if run.config and run.config.decay_lr:
        rates = run.rates()
        share = np.array(rates)[np.minimum(steps, len(rates) - 1).astype(int)] / max(rates)
        late = steps >= max(run.warm, 0.1 * run.end)  # before it every loss falls fast
        top, low = (np.flatnonzero(late & part) for part in (share > 0.7, share < 0.5))
    if len(jumps) >= 3:
        text = f"the loss jumped {len(jumps)} times behind the warm-up (first at step {jumps[0]:,.0f})"
    elif all(up > max(critical(len(use) - 2, 3.5) * error, 0.01 * val[-1]) for up, error, _ in rises):
        text = f"both losses rise: train by {rises[0][0]:.3f}, val by {rises[1][0]:.3f} ({span(run, use)})"
    elif len(top) >= 4 and len(low) >= 3:
        at_top, later = val[top[:2]].mean() - val[top[-2:]].mean(), val[top[-2:]].mean() - val[low[-2:]].mean()
        if later > max(5 * scatter_of(val[top[0] :]), 0.02 * val[-1]) and at_top < 0.7 * later:
            text = f"val fell by {at_top:.3f} while the learning rate was high, by {later:.3f} when it fell"
    advice = "try a third of the learning rate, or a longer warm-up"
    return Finding("rate too high", f"{text}{clipping(run)}: {advice}") if text else None


def clipping(run):
    """Words on the norm of the gradient, or none."""
    norms = run.lines.get("grad_norm", np.full(len(run.lines["step"]), np.nan))
    norms = norms[np.isfinite(norms) & (run.lines["step"] > run.warm)]
    if len(norms) < 10 or not run.config:
        return ""
    third, clip = len(norms) // 3, run.config.grad_clip
    share = f", clipped in {np.mean(norms > clip):.0%} of the lines" if clip else ""
    return f"; the gradient's norm was {np.median(norms[:third]):.2f}, lately {np.median(norms[-third:]):.2f}{share}"


def rate_too_low(run):
    """A fifth of the usual rate or less, and a fall of it that brought nothing: there was no noise to anneal."""
    c = run.config
    usual = 0.003239 - 0.0001395 * math.log(plan.parameters(c)["blocks"])  # Kaplan et al. 2020, eq. D.1, for Adam
    if not c.decay_lr or c.optimizer != "adamw" or c.learning_rate > usual / 5 or spikes(run):
        return None
    found, _ = run.forecast("val")
    if not found or run.step < 0.6 * run.end or found["b"][2] > 0.005 * found["loss"]:
        return None
    text = f"its peak is {c.learning_rate / usual:.2g} of the usual ({usual:.1e}, Kaplan et al. 2020), its fall"
    return Finding("rate too low", f"{text} has brought nothing{clipping(run)}: try three times the rate")


# ---- what is to come, and what would be better


def to_come(run):
    """The annealing that is left, the forecast of the end, and what other lengths would give by the same law."""
    if run.step >= run.end:
        return None
    rates, step = run.rates(), run.step
    now, end = rates[step] / max(rates), rates[-1] / max(rates)
    name = "annealing to come" if now > 1.1 * end else "forecast"
    text = f"the learning rate is {now:.2f} of its peak and will be {end:.2f}; " if now > 1.1 * end else ""
    val, reason = run.forecast("val")
    if not val:
        return Finding(name, text + reason)
    train, tail = run.forecast("train")[0], np.linspace(rates[step], min(rates), max(2, step // 10)).tolist()
    others = {f"stopping now and decaying over {len(tail):,} steps": rates[:step] + tail}
    others |= {"a run of twice the steps": stretch(rates, 2), "of half the steps": stretch(rates, 0.5)}
    others = ", ".join(f"{name} {would_end(val, rates)}" for name, rates in others.items())
    text += f"by the law of annealing val ends at {val['loss']:.3f} +- {val['band']:.3f} (step {val['end']:,}), "
    text += f"{val['now'] - val['loss']:.3f} below now, train at {train['loss']:.3f} +- {train['band']:.3f}"
    return Finding(name, f"{text}. The same law gives for {others}")


def would_end(fit, rates):
    """The loss at the end of another schedule, as far as the law and its own error go."""
    loss = plan.follow(fit, rates)[-1]
    return f"{loss:.2f} +- {2 * math.hypot(fit['fit_error'], plan.TO_COME * (fit['now'] - loss)):.2f}"


def stretch(rates, factor):
    """The same schedule over another number of steps."""
    n = max(1, round(len(rates) * factor))
    return np.asarray(rates)[np.arange(n) * len(rates) // n].tolist()


def limits(run):
    """The loss to expect, and which of parameters and tokens to grow, by the law."""
    epochs = run.epochs(run.config.max_iters) or 0
    expected, reason = plan.expected_loss(run.config, epochs)
    if epochs > 4:
        text = (
            f"{epochs:.1f} epochs: past four a repeated token teaches little (Muennighoff et al. 2023); more text would"
        )
        return [Finding("limited by data", text)]
    if reason:
        return [Finding("no expectation", reason)]
    n, d = plan.parameters(run.config)["total"], plan.step_tokens(run.config) * run.config.max_iters
    size, data = (plan.law(n, d) - plan.law(*more) for more in ((2 * n, d), (n, 2 * d)))
    name = "limited by size" if size > 1.5 * data else "limited by tokens" if data > 1.5 * size else "balanced"
    text = f"twice the {n / 1e6:.0f}M parameters would bring {size:.2f}, twice the {d / 1e9:.2f}B tokens {data:.2f}"
    law = f"a val loss of {expected:.2f} +- {plan.BAND} on FineWeb at the end (law of Hoffmann et al. 2022)"
    return [Finding("expected", law), Finding(name, text)]


def choices(run):
    """What the plan warns of: keys of the config that cost something."""
    data = run.about.get("data", {})
    tokens = {f"{split}_tokens": data.get(f"{split}_tokens") for split in ("train", "val")}
    for text in plan.plan(run.config, **tokens, device=run.about.get("device", "cpu"))["warnings"]:
        yield Finding("choice", text)


# ---- the numbers themselves


def noisy_val(run, use):
    """Is an evaluation as exact as one would like, and as its number of tokens should make it?"""
    if run.groups and len(run.groups[-1]) >= 16:
        error = float(np.std(run.groups[-1], ddof=1) / math.sqrt(len(run.groups[-1])))
        text = f"the val loss of {run.evals['val'][-1]:.3f} has a standard error of {error:.3f}"
        return Finding("noisy val set", f"{text}: evaluate on more tokens") if error > 0.02 else None
    later = run.lines["step"] >= max(run.warm, 0.1 * run.step)
    if not run.micro or not run.config.eval_iters or later.sum() < 20:
        return None
    one, batches = scatter_of(run.lines["loss"][later]), run.config.eval_iters
    fair, scatter = one / math.sqrt(batches), {}
    for name in ("train", "val"):
        fit, df = run.forecast(name)[0], len(use) - 2
        scatter[name] = line_fit(run.evals["step"][use], run.evals[name][use])[2]
        if fit:
            scatter[name], df = fit["scatter"], int(np.sum(run.evals["step"] >= fit["first_step"])) - 4
    limit = (1 - 2 / (9 * df) + 3 * math.sqrt(2 / (9 * df))) ** 1.5  # of chi / sqrt(df), Wilson and Hilferty 1931
    if scatter["val"] < fair * max(1.3, limit):
        return None
    gap = (run.evals["val"] - run.evals["train"])[use]
    below = f", and lies {-gap.mean():.3f} below train" if gap.mean() < -5 * gap.std() / math.sqrt(len(use)) else ""
    text = f"batches scatter by {one:.3f}, so an evaluation on {batches} of them should by {fair:.4f}; train does "
    text += f"by {scatter['train']:.4f}, val by {scatter['val']:.4f}{below}: look at the val set"
    return Finding("noisy val set", f"{text}, it is small or no fair sample")


def system(run):
    """GradScaler's scale and skipped steps; waiting for data; over the second half of the lines."""
    half = len(run.lines["step"]) // 2
    late = {name: values[half:] for name, values in run.lines.items()}
    if np.isfinite(late.get("scale", np.nan)).any():
        steps, lost = late["step"][-1] - late["step"][0] or 1, np.nansum(late["skipped"])
        scale = late["scale"][np.isfinite(late["scale"])][-1]
        if lost > max(3, 0.01 * steps) or scale < 16:
            text = f"{lost:.0f} of the last {steps:,.0f} steps were skipped, GradScaler's scale is {scale:g}"
            yield Finding("scaler trouble", f"{text}: use bfloat16 where the card has it, or a lower rate")
    waits = np.nanmean(late["data_share"]) if len(late.get("data_share", [])) else 0
    if waits > 0.05:
        text = f"{waits:.0%} of the time of a step is spent on waiting for tokens"
        yield Finding("waits for data", f"{text}: a slow or busy disk; copy the shards to a local one")


def not_carried(run):
    """What one would like to know and these numbers do not say."""
    missing = {
        "learning rates, sizes, a forecast (--run_config gives them)": not run.config,
        "the gradient": "grad_norm" not in run.lines,
        "waiting for data": "data_share" not in run.lines,
        "the error of an evaluation": not run.groups and not run.micro,
    }
    missing = [name for name, absent in missing.items() if absent]
    return Finding("not carried", f"these numbers say nothing of {', '.join(missing)}") if missing else None
