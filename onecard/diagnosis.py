"""Finds what the numbers of a run show, as sentences with figures: does it fall, diverge, overfit, end as expected?

    for name, text in diagnose(run): print(name, text)

The first finding is the verdict. A finding whose name is in PROBLEMS asks for a change; the others describe the run.
A sentence is made only where the numbers support it beyond their noise. A spike of a single step supports nothing: 10
to 71 of them happen in each of eleven healthy public runs.
"""

import math
from typing import NamedTuple

import numpy as np

from onecard.curve import Curve, calm_noise, change, coarse, critical, lasting_noise, noise, risen, without_outliers
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
PROBLEMS = {*SPOILED, "flat", "rate too high", "noisy val set", "val below train"}
PROBLEMS |= {"scaler trouble", "waits for data"}
FLAT = 0.004  # share of the loss: a decrease that is surely smaller than this, over a third of the steps, is flat


class Finding(NamedTuple):
    name: str
    text: str


def diagnose(run: Run) -> list[Finding]:
    """The findings: the verdict, then problems, then what describes the run."""
    found = [Finding(*run.broken)] if run.broken else []
    if not run.broken:
        gap = overfitting(run)
        found = [rate_jumped(run), gap, rate_too_high(run)]
        if not gap or gap.name != "overfitting":
            found += [*val_set(run), trend(run)]
    found += [*outlook(run), *system(run)]
    found += [Finding("choice", sentence(text)) for text in (run.plan["warnings"] if run.config else [])]
    findings = [finding for finding in [*found, not_logged(run)] if finding]
    findings.sort(key=lambda finding: finding.name not in PROBLEMS)
    return [Finding("verdict", verdict(run, [finding.name for finding in findings])), *findings]


def sentence(text):
    """With a capital letter, except where the first word is a key or its value."""
    return text if "=" in text.split()[0] else text[:1].upper() + text[1:]


def span(part):
    return f"steps {part.steps[0]:,.0f} to {part.steps[-1]:,.0f}"


def rate_jumped(run):
    """The learning rate rose after it had fallen, as in a resume onto a longer schedule; what the loss did; or None."""
    if not run.jump:
        return None
    first, last = run.jump
    old, new = np.interp(run.jump, *run.rates_so_far)
    text = f"The learning rate rose from {old:.2g} to {new:.2g} at step {last:,}"
    split, curve = ("val", run.val) if run.val.steps[-1:] > last else ("train", run.train)
    before, after = curve.take(curve.steps <= first), curve.since(last + 1)
    if len(before.steps) < 3 or not len(after.steps):
        return Finding("rate rose", f"{text}; the loss rises with it at first.")
    was, now = np.median(before.values[-2:]), after.values[-1]
    text += f", and {split} loss from {was:.3f} to {after.values.max():.3f}; it is {now:.3f} now. "
    if now <= was + 2 * min(noise(before), 0.01 * was):
        return Finding("rate rose", f"{text}The rise is made good.")
    return Finding("rate jumped", f"{text}It falls again as the rate falls.")


def overfitting(run):
    """Whether the gap between val and train widens, and whether val has turned up meanwhile; None without train loss.

    Both losses rose: that is not overfitting. The gap of smoothed log lines is at their middle steps.
    """
    train, val = run.train.since(run.start), run.val.since(run.start)
    if len(val.steps) < 6:
        return None
    train = train.take(train.steps <= val.steps[-1])
    if len(train.steps) < 6:
        return None
    gap = without_outliers(coarse(Curve(train.steps, np.interp(train.steps, *val) - train.values)))
    part = gap.late()
    widened, error = change(part, lasting_noise(gap))
    read = f", in {run.epochs:.2f} epochs" if run.epochs else ""
    text = f"The gap between val and train changed by {widened:+.4f} +- {error:.4f} ({span(part)}{read})"
    if up := risen(val, 0.005):
        best, rise = up
        learned = float(np.interp(val.steps[best], *train) - np.median(train.values[-3:]))
        if learned > max(3 * noise(train), 0.3 * rise):
            text = f"Val loss was lowest at step {val.steps[best]:,.0f} ({val.values[best]:.3f}) and is {rise:.3f} "
            text += f"above that now, while train loss fell by {learned:.3f}{read}."
            if run.epochs and run.epochs <= 1:
                return Finding("val rises", f"{text} No text was read twice: is val of other text than train?")
            return Finding("overfitting", f"{text} To lower it, {SPOILED['overfitting'][1]}.")
    now = np.median(part.values)
    text += f". Val is {abs(now):.3f} {'above' if now > 0 else 'below'} train"
    if widened > critical(gap, 3.5) * error:
        still = "val still improves" if surely_falls(coarse(val)) else "val no longer improves clearly"
        return Finding("gap widens", f"{text}, and {still}. Overfitting begins where val rises.")
    if widened > 2 * error:
        return Finding("gap", f"{text}: it may be widening.")
    return Finding("no overfitting", f"{text}. A gap that does not widen is not overfitting.")


def trend(run):
    """How much the loss falls in the last third of the steps: val, or train where val is missing or unclear."""
    curves = [("val", run.val.since(run.start)), ("train", run.train.since(run.start))]
    curves = [(name, without_outliers(coarse(curve))) for name, curve in curves if len(curve.steps) >= 6]
    if not curves:
        return few_evaluations(run)
    falls = [(name, curve) for name, curve in curves if surely_falls(curve)]
    name, curve = (falls or curves)[0]
    part = curve.late()
    moved, error = change(part, lasting_noise(curve))
    changed = f"{name} loss changed by {moved:+.4f} +- {error:.4f} ({span(part)})"
    if run.finished:
        return Finding("finished", f"In the last part {changed}.")
    if falls:
        length = part.steps[-1] - part.steps[0]
        unit = min(1000, 10 ** int(math.log10(length)))  # steps
        known = -moved >= 3 * error  # else there are few evaluations, each lower than the one before
        rate = f"{-moved * unit / length:.4f}" + (f" +- {error * unit / length:.4f}" if known else "")
        text = f"No plateau: {name} loss still falls by {rate} per {unit:,} steps ({span(part)})."
        return Finding("falling", text)
    if moved > critical(curve, 3.5) * error:
        return Finding(f"{name} rises", f"{changed}. Keep the checkpoint with the best val loss.")
    most = max(-moved, 0) + 1.65 * error  # at 95%
    if most < FLAT * part.values[-1] and moved < 2 * error:
        text = f"{name} loss falls by at most {most:.4f} in {span(part)}."
        share = run.rate_shares[run.step] if run.rates else 0.0
        if share < 0.1:
            return Finding("settled", text)
        advice = f"The learning rate is {share:.2f} of its peak: let it decay, or train a larger network."
        return Finding("flat", f"{text} {advice}")
    seen = "it may be falling" if moved < -2 * error else "no clear trend"
    text = f"{changed}: {seen}. Evaluate on more tokens, or wait for more evaluations."
    return Finding("too noisy to tell", text)


def few_evaluations(run):
    count, losses = len(run.val.since(run.start).steps), run.val.values
    if not run.finished:
        return Finding("too early", f"{count} evaluations since step {run.start:,.0f}; a trend needs at least 6.")
    if len(losses) < 2:
        return None
    return Finding("finished", f"val loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} evaluations.")


def surely_falls(curve):
    """The line through the last third falls beyond its error, or each point is below the one before."""
    part = curve.late()
    moved, error = change(part, lasting_noise(curve))
    half = part.take(slice(len(part.steps) // 2, None))
    clear = -moved > critical(curve, 2.8) * error and change(half, 0)[0] < 0
    return clear or (np.diff(part.values) < 0).all()


def rate_too_high(run):
    """Spikes that reach the evaluations: val and train far above both neighbours, three times or more; else None."""
    val, train = run.val.since(run.start), run.train.since(run.start)
    if len(val.steps) < 10 or not np.array_equal(val.steps, train.steps):
        return None
    high = np.ones(len(val.steps) - 2, dtype=bool)
    for curve in (val, train):
        y = curve.values
        high &= y[1:-1] - np.maximum(y[:-2], y[2:]) > np.maximum(6 * calm_noise(curve), 0.01 * y[1:-1])
    if high.sum() < 3:
        return None
    steps = ", ".join(f"{step:,.0f}" for step in val.steps[1:-1][high][:5])
    text = f"{high.sum()} spikes reached the evaluations of both splits (steps {steps})."
    return Finding("rate too high", f"{text} Try half of the learning rate, or a longer warm-up.")


def val_set(run):
    """Val scatters more than its number of tokens allows and than train does, or lies far below train."""
    val, train = run.val.since(run.start), run.train.since(run.start)
    if run.groups and len(run.groups[-1]) >= 8:
        fair = float(np.std(run.groups[-1], ddof=1) / math.sqrt(len(run.groups[-1])))
        if fair > 0.02:
            text = f"The last val loss has a standard error of {fair:.3f}. To compare runs, evaluate on more tokens "
            text += "(--eval_tokens), or with a larger val split."
            yield Finding("val error", text)
    elif run.micro and run.config and run.config.eval_iters:
        fair = run.plan["eval_error"]
    else:
        return
    if len(val.steps) < 12 or not np.array_equal(val.steps, train.steps):
        return
    scatter, of_train = calm_noise(val), calm_noise(train)
    even = noise(val) < 2 * scatter  # not a matter of some outliers
    if even and scatter > 2 * fair and scatter > math.exp(7 / math.sqrt(len(val.steps))) * of_train:
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


# ---- the end of the run


def outlook(run):
    """The forecast, or what came of earlier ones; the expected loss; what limits it. Nothing without a config."""
    if not run.config:
        return
    val = run.val.values[-1] if len(run.val.steps) else None
    if run.finished and val is not None and not run.broken:
        earlier = run.earlier_forecasts
        said = ", ".join(f"{f['loss']:.3f} +- {f['band']:.3f} at step {f['step']:,}" for f in earlier)
        if said:
            yield Finding("forecasts", f"The end was forecast as {said}; val ended at {val:.3f}.")
    elif not run.finished and not run.broken:
        yield Finding("forecast", to_come(run))
    yield from limits(run)


def to_come(run):
    share, (val, reason) = run.rate_shares, run.forecast
    text = f"The learning rate is {share[run.step]:.2f} of its peak and will be {share[-1]:.2f}. "
    if not val:
        return f"{text}There is {reason}."
    text += f"By the law of annealing, val ends at {val['loss']:.3f} +- {val['band']:.3f} (step {val['end']:,}), "
    return f"{text}{val['now'] - val['loss']:.3f} below now."


def limits(run):
    """The expected loss, and whether more parameters or more tokens would lower it more, by the scaling law."""
    epochs, expected, n, d = run.plan["epochs"], run.plan["loss"], run.plan["parameters"]["total"], run.plan["tokens"]
    if (epochs or 0) > 4:
        text = f"The run reads the data {epochs:.1f} times. Beyond 4 passes repeats help little: add text"
        yield Finding("limited by data", f"{text} (Muennighoff et al. 2023).")
    elif expected is None:
        compare = "Only runs on the same data tell whether it is good: python report.py RUN ANOTHER"
        yield Finding("no expectation", f"No loss to expect: {run.plan['no_loss']}. {compare}.")
    else:
        wanted = f"{expected} on FineWeb ({expected.source})"
        ended = f"; it is {run.val.values[-1]:.3f}" if run.finished and len(run.val.steps) else ""
        yield Finding("expected", f"Val loss at the end should be {wanted}{ended}.")
        size, data = expected.gain(2 * n, d), expected.gain(n, 2 * d)
        name = "size" if size > 1.5 * data else "tokens" if data > 1.5 * size else ""
        text = f"Loss would fall by {size:.2f} with twice the {n / 1e6:.0f}M parameters"
        name = f"limited by {name}" if name else "balanced"
        yield Finding(name, f"{text}, {data:.2f} with twice the tokens.")


# ---- the verdict: where the run stands, and what would lower its loss most


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
