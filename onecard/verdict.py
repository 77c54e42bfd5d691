"""Where a run stands: against what was expected before it and forecast during it, and what would lower its loss most.

diagnosis.py shows `verdict` first, and the sentences of `outlook`. Both take a diagnosis.Run.
"""

from collections.abc import Iterator

import numpy as np

from onecard import plan
from onecard.curve import noise

REMEDY = {  # of what spoils a run: what to do first
    "not finite": "resume from a checkpoint before it, with a third of the learning rate",
    "diverged": "resume from a checkpoint before the rise, with a third of the learning rate",
    "rising": "resume from the best checkpoint, with a third of the learning rate",
    "rate jumped": "resume from a checkpoint before the jump, with a peak no higher than the rate it had reached",
    "overfitting": "add text, train for fewer steps, or use dropout",
}
CUTS = (0.5, 0.7, 0.9)  # shares of a finished run at which its forecasts are looked up


def seconds_per_step(run) -> float | None:
    """Measured, evaluations included; None where no time was logged."""
    times = run.lines.get("ms_per_step", np.array([]))
    if not np.isfinite(times).any():
        return None
    evaluations = np.nan_to_num(run.evals["eval_seconds"]).sum() / max(run.step, 1)
    return float(np.median(times[np.isfinite(times)]) / 1000 + evaluations)


def hours(run, steps: float) -> str:
    """ "5.3 h" for so many steps at the run's measured speed; "the same compute again" is said in steps without it."""
    seconds = seconds_per_step(run)
    return plan.duration(steps * seconds / 3600) if seconds else f"the compute of {steps:,.0f} steps"


def verdict(run, problems: list[str]) -> str:
    """One sentence on where the run stands, then the change that would lower its loss most."""
    words = [standing(run)]
    if len(run.val.steps) or len(run.train.steps):
        words.append(loss_now(run))
    if run.config and not run.broken:
        words += against(run)
    return f"{'; '.join(words)}. {best_change(run, problems)}".strip()


def standing(run) -> str:
    if not run.config:
        return f"Step {run.step:,}"
    if run.step > run.end:
        return f"Step {run.step:,}, past max_iters={run.end:,} of the config: check that it is this run's"
    if run.finished:
        return f"Finished at step {run.end:,}"
    left = f", {hours(run, run.end - run.step)} left" if seconds_per_step(run) else ""
    return f"Step {run.step:,} of {run.end:,}{left}"


def loss_now(run) -> str:
    if not len(run.val.steps):
        return f"train loss {run.train.values[-1]:.3f}"
    text = f"val loss {run.val.values[-1]:.3f}"
    factor, unit = units(run)
    return text if unit == "nats" else f"{text} ({factor * run.val.values[-1]:.3f} {unit})"


def units(run) -> tuple[float, str]:
    """(factor, name) of the unit in which differences are given: bits per byte, unless the tokens are GPT-2's."""
    bits, val = run.evals["bits_per_byte"], run.evals["val"]
    known = np.flatnonzero(np.isfinite(bits) & np.isfinite(val))
    if not len(known) or (run.config and 50257 <= run.config.vocab_size <= 51200):
        return 1.0, "nats"
    return float(bits[known[-1]] / val[known[-1]]), "bits per byte"


def against(run) -> Iterator[str]:
    """The forecast, and how the loss, or its forecast, compares with what was expected before the run."""
    fit, _ = run.forecast("val") if len(run.val.steps) else (None, None)
    end, expected = run.val.values[-1] if run.finished and len(run.val.steps) else None, run.plan["loss"]
    if fit and not run.finished:
        end = fit["loss"]
        yield f"the forecast of the end is {end:.3f} +- {fit['band']:.3f}"
    elif run.finished and (earlier := earlier_forecasts(run)):
        step, fit = earlier[0]
        yield f"at step {step:,} the forecast of it was {fit['loss']:.3f} +- {fit['band']:.3f}"
    if expected and end:
        away = end - expected
        verb = f"{abs(away):.2f} {'above' if away > 0 else 'below'}" if abs(away) > plan.BAND else "as"
        yield f"{verb} {'the ' if verb != 'as' else ''}expected ({expected:.2f} +- {plan.BAND})"


def earlier_forecasts(run) -> list[tuple[int, dict]]:
    """(step, forecast) at each of CUTS that has one."""
    found = [(int(cut * run.end), run.forecast("val", until=int(cut * run.end))[0]) for cut in CUTS]
    return [(step, fit) for step, fit in found if fit]


def best_change(run, problems: list[str]) -> str:
    """The remedy of a problem that spoils the run; else what the scaling law, or the curve, shows to bring most."""
    if spoiled := [name for name in problems if name in REMEDY]:
        curve = run.val if len(run.val.steps) else run.train
        best = curve.steps[curve.values.argmin()] if len(curve.steps) else run.step
        lost = f"; {hours(run, run.step - best)} since the best loss brought nothing" if best < run.step else ""
        return f"First {REMEDY[spoiled[0]]}{lost}."
    if run.config and run.plan["loss"]:
        return by_the_law(run)
    if run.config and (run.plan["epochs"] or 0) > 4:
        return f"More text would bring most: this is read {run.plan['epochs']:.1f} times (Muennighoff et al. 2023)."
    if run.config and not run.finished:
        return "Let it run." if not problems else ""
    curve = run.val if len(run.val.steps) >= 6 else run.train
    if len(curve.steps) < 6:
        return ""
    gain = float(np.interp(curve.steps[-1] / 2, *curve) - np.median(curve.values[-2:]))
    if gain < 5 * noise(curve):
        return ""
    factor, unit = units(run)
    text = f"More steps would bring most: the second half of these brought {factor * gain:.3f} {unit}"
    return f"{text} in {hours(run, curve.steps[-1] / 2)}." if seconds_per_step(run) else f"{text}."


def by_the_law(run) -> str:
    """The change that brings most by the scaling law: another size for the same compute, or twice of one."""
    n, d = run.plan["parameters"]["total"], run.plan["tokens"]
    end = run.val.values[-1] if run.finished and len(run.val.steps) else None
    if end and end - run.plan["loss"] > plan.BAND:
        away = end - run.plan["loss"]
        return (
            f"To find the missing {away:.2f} nats brings most: compare learning rate, data and val set with the law's."
        )
    size, tokens = plan.best_size(n, d)
    same, more, longer = (plan.law(n, d) - plan.law(*other) for other in ((size, tokens), (2 * n, d), (n, 2 * d)))
    if same > 0.05:
        text = (
            f"Most for the same compute ({hours(run, run.end)}): {size / 1e6:.0f}M parameters on {tokens / 1e9:.2f}B "
        )
        return f"{text}tokens, {same:.2f} nats lower by the scaling law."
    what, gain = ("parameters", more) if more > longer else ("tokens", longer)
    return f"Twice the {what} would bring most: {gain:.2f} nats for {hours(run, run.end)} more, by the scaling law."


# ---- the sentences about the end


def outlook(run) -> Iterator[tuple[str, str]]:
    """(name, text): the forecast, or what came of earlier ones; the expected loss; what limits it."""
    if not run.config:
        return
    if run.finished:
        said = [f"at {cut:,} steps {f['loss']:.3f} +- {f['band']:.3f}" for cut, f in earlier_forecasts(run)]
        if said and len(run.val.steps):
            yield "forecasts", f"The forecast was {', '.join(said)}; val ended at {run.val.values[-1]:.3f}."
    elif not run.broken:
        yield "forecast", to_come(run)
    yield from limits(run)


def to_come(run) -> str:
    rates, (val, reason) = run.rates, run.forecast("val")
    now, end = rates[run.step] / max(rates), rates[-1] / max(rates)
    text = f"The learning rate is {now:.2f} of its peak and will be {end:.2f}. "
    if not val:
        return f"{text}There is {reason}."
    text += f"By the law of annealing, val ends at {val['loss']:.3f} +- {val['band']:.3f} (step {val['end']:,}), "
    return f"{text}{val['now'] - val['loss']:.3f} below now."


def limits(run) -> Iterator[tuple[str, str]]:
    """The expected loss, and whether more parameters or more tokens would lower it more, by the scaling law."""
    epochs, expected, n, d = run.plan["epochs"], run.plan["loss"], run.plan["parameters"]["total"], run.plan["tokens"]
    if (epochs or 0) > 4:
        text = f"The run reads the data {epochs:.1f} times. Beyond 4 passes repeats help little: add text"
        yield "limited by data", f"{text} (Muennighoff et al. 2023)."
    elif expected is None:
        yield "no expectation", f"No loss to expect: {run.plan['no_loss']}."
    else:
        law = f"{expected:.2f} +- {plan.BAND} on FineWeb (law of Hoffmann et al. 2022)"
        ended = f"; it is {run.val.values[-1]:.3f}" if run.finished and len(run.val.steps) else ""
        yield "expected", f"Val loss at the end should be {law}{ended}."
        size, data = plan.law(n, d) - plan.law(2 * n, d), plan.law(n, d) - plan.law(n, 2 * d)
        name = "size" if size > 1.5 * data else "tokens" if data > 1.5 * size else ""
        text = (
            f"Loss would fall by {size:.2f} with twice the {n / 1e6:.0f}M parameters, {data:.2f} with twice the tokens."
        )
        yield f"limited by {name}" if name else "balanced", text
