"""Where a run stands: against what was expected before it and forecast during it, and what would lower its loss most.

diagnosis.py shows `verdict` first, and the sentences of `outlook`. Both take a run.Run.
"""

import math
from collections.abc import Iterator

import numpy as np

from onecard.curve import noise
from onecard.law import best_size, law
from onecard.metrics import duration
from onecard.run import Run

SPOILED = {  # what spoils a run: in a word or two, and what to do first
    "not finite": ("not finite", "resume from a checkpoint before it, with a third of the learning rate"),
    "diverged": ("diverged", "resume from a checkpoint before the rise, with a third of the learning rate"),
    "rising": ("rising", "resume from the best checkpoint, with a third of the learning rate"),
    "rate jumped": (
        "not back from a jump of the learning rate",
        "let it run on, because the loss falls again as the rate falls; at a next resume, use a peak no higher than "
        "the rate at that step",
    ),
    "overfitting": ("overfitting", "add text, train for fewer steps, or use dropout"),
}
Words = Iterator[tuple[str, str]]  # of a finding: its name, its text


def verdict(run: Run, findings: list[str]) -> str:
    """A sentence on where the run stands, then the change that would lower its loss most; from the findings' names."""
    spoiled = next((name for name in findings if name in SPOILED), "")
    change = after_spoiled(run, spoiled) if spoiled else best_change(run, findings)
    if run.broken:
        return f"{standing(run, spoiled)}. {run.broken[1]} {change}"
    words = [standing(run, spoiled), *loss_now(run)]
    if spoiled:
        words.append(SPOILED[spoiled][0])
    if run.config:
        words += against(run)
    return f"{'; '.join(words)}. {change}".strip()


def standing(run, spoiled):
    if not run.config:
        return f"Step {run.step:,}"
    if run.step > run.end:
        return f"Step {run.step:,}, beyond max_iters={run.end:,} (is it the config of this run?)"
    if run.finished:
        return f"Finished at step {run.end:,}"
    left = f", {hours(run, run.end - run.step)} left" if seconds_per_step(run) and not spoiled else ""
    return f"Step {run.step:,} of {run.end:,}{left}"


def loss_now(run):
    if len(run.val.steps):
        factor, unit = unit_of(run)
        bits = "" if unit == "nats" else f" ({factor * run.val.values[-1]:.3f} {unit})"
        yield f"val loss {run.val.values[-1]:.3f}{bits}"
    elif len(run.train.steps):
        yield f"train loss {run.train.values[-1]:.3f}"


def against(run):
    """The forecast, and how the loss or its forecast compares with what was expected before the run."""
    end, error = run.val.values[-1] if len(run.val.steps) and run.finished else None, 0.0
    if end is not None and (earlier := run.earlier_forecasts):
        yield f"the forecast at step {earlier[0]['step']:,} was {earlier[0]['loss']:.3f} +- {earlier[0]['band']:.3f}"
    elif not run.finished and (fit := run.forecast[0]):
        end, error = fit["loss"], fit["band"]
        yield f"forecast of the end {end:.3f} +- {error:.3f}"
    if end is not None and (expected := run.plan["loss"]):
        away = end - expected.loss
        off = abs(away) > expected.band + error
        words = f"{abs(away):.2f} {'above' if away > 0 else 'below'} what" if off else "as"
        yield f"{words} was expected before it ({expected})"


# ---- the change that would bring most


def after_spoiled(run, spoiled):
    """What to do first, and the time since the best loss."""
    curve = run.val if len(run.val.steps) else run.train
    best = curve.steps[curve.values.argmin()] if len(curve.steps) else run.step
    lost = f" The {hours(run, run.step - best)} since step {best:,.0f} gained nothing." if best < run.step else ""
    return f"First {SPOILED[spoiled][1]}.{lost}"


def best_change(run, findings):
    """What the scaling law, or where it does not hold the curve itself, shows to bring most; "" if neither does."""
    if run.config and run.plan["loss"]:
        return by_the_law(run)
    if run.config and (run.plan["epochs"] or 0) > 4:
        return f"More text would bring most: the run reads it {run.plan['epochs']:.1f} times (Muennighoff et al. 2023)."
    if run.config and not run.finished:
        return "Let it run." if "falling" in findings else ""
    curve = (run.val if len(run.val.steps) >= 4 else run.train).since(run.warm / 2)
    unclear = {"flat", "settled", "gap", "gap widens", "val rises", "train rises", "too noisy to tell"}
    if len(curve.steps) < 4 or unclear & {*findings}:
        return ""
    gain = float(np.interp(curve.steps[-1] / 2, *curve) - np.median(curve.values[-2:]))
    scatter = noise(curve)
    if gain < (5 * scatter if np.isfinite(scatter) else 0.02 * curve.values[-1]):
        return ""
    factor, unit = unit_of(run)
    spent = f" in {hours(run, curve.steps[-1] / 2)}" if seconds_per_step(run) else ""
    return f"More steps would bring most: the second half of these brought {factor * gain:.3f} {unit}{spent}."


def by_the_law(run):
    """Another size for the same compute, or twice the parameters or tokens; or why the run misses its expectation."""
    n, d, expected = run.plan["parameters"]["total"], run.plan["tokens"], run.plan["loss"]
    missing = run.val.values[-1] - expected.loss if run.finished and len(run.val.steps) else 0.0
    if missing > expected.band:
        return f"First find what costs {missing:.2f} nats: check the learning rate, the data and the val set."
    size, tokens = best_size(n, d)
    same, larger, longer = law(n, d) - law(size, tokens), expected.gain(2 * n, d), expected.gain(n, 2 * d)
    if same > 0.05:
        text = f"{size / 1e6:.0f}M parameters on {tokens / 1e9:.2f}B tokens would bring most: {same:.2f} nats"
        return f"{text} for the same {hours(run, run.end)}, by the scaling law."
    what, gain = ("parameters", larger) if larger > longer else ("tokens", longer)
    return f"Twice the {what} would bring most: {gain:.2f} nats for {hours(run, run.end)} more, by the scaling law."


def seconds_per_step(run: Run) -> float | None:
    """Measured, with evaluations; None where no time was logged."""
    times = run.lines.get("ms_per_step", np.array([]))
    if not np.isfinite(times).any():
        return None
    evaluations = np.nan_to_num(run.evals["eval_seconds"]).sum() / max(run.step, 1)
    return float(np.median(times[np.isfinite(times)]) / 1000 + evaluations)


def hours(run, steps):
    """So many steps as a time at the run's measured speed; without one, as steps."""
    seconds = seconds_per_step(run)
    return duration(steps * seconds) if seconds else f"{steps:,.0f} steps"


def unit_of(run):
    """(factor, name) of the unit of a difference: nats per token, or bits per byte if the tokens are not GPT-2's."""
    if not run.bytes_per_token or (run.config and 50257 <= run.config.vocab_size <= 51200):
        return 1.0, "nats"
    return 1 / run.bytes_per_token / math.log(2), "bits per byte"


# ---- the sentences about the end


def outlook(run: Run) -> Words:
    """The forecast, or what came of earlier ones; the expected loss; what limits it. Nothing without a config."""
    if not run.config:
        return
    val = run.val.values[-1] if len(run.val.steps) else None
    if run.finished and val is not None and not run.broken:
        earlier = run.earlier_forecasts
        said = ", ".join(f"{f['loss']:.3f} +- {f['band']:.3f} at step {f['step']:,}" for f in earlier)
        if said:
            yield "forecasts", f"The end was forecast as {said}; val ended at {val:.3f}."
    elif not run.finished and not run.broken:
        yield "forecast", to_come(run)
    yield from limits(run)


def to_come(run):
    share, (val, reason) = run.rate_shares, run.forecast
    text = f"The learning rate is {share[run.step]:.2f} of its peak and will be {share[-1]:.2f}. "
    if not val:
        return f"{text}There is {reason}."
    text += f"By the law of annealing, val ends at {val['loss']:.3f} +- {val['band']:.3f} (step {val['end']:,}), "
    return f"{text}{val['now'] - val['loss']:.3f} below now."


def limits(run) -> Words:
    """The expected loss, and whether more parameters or more tokens would lower it more, by the scaling law."""
    epochs, expected, n, d = run.plan["epochs"], run.plan["loss"], run.plan["parameters"]["total"], run.plan["tokens"]
    if (epochs or 0) > 4:
        text = f"The run reads the data {epochs:.1f} times. Beyond 4 passes repeats help little: add text"
        yield "limited by data", f"{text} (Muennighoff et al. 2023)."
    elif expected is None:
        compare = "Only runs on the same data tell whether it is good: python report.py RUN ANOTHER"
        yield "no expectation", f"No loss to expect: {run.plan['no_loss']}. {compare}."
    else:
        wanted = f"{expected} on FineWeb ({expected.source})"
        ended = f"; it is {run.val.values[-1]:.3f}" if run.finished and len(run.val.steps) else ""
        yield "expected", f"Val loss at the end should be {wanted}{ended}."
        size, data = expected.gain(2 * n, d), expected.gain(n, 2 * d)
        name = "size" if size > 1.5 * data else "tokens" if data > 1.5 * size else ""
        text = f"Loss would fall by {size:.2f} with twice the {n / 1e6:.0f}M parameters"
        yield f"limited by {name}" if name else "balanced", f"{text}, {data:.2f} with twice the tokens."
