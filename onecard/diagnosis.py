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
from onecard.run import Run
from onecard.verdict import SPOILED, outlook, verdict

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
    found += [*(Finding(*pair) for pair in outlook(run)), *system(run)]
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
    """In place of a trend."""
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
