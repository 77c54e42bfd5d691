"""Predicts the final loss of a run from its evaluations so far, by a law of learning-rate annealing.

    fit, reason = forecast(steps, losses, rates)  # rates: the learning rate of every step of the schedule
    print(fit["loss"], fit["band"])

The law is L = L0 + A S1^-a - C D. S1 is the sum of the learning rates so far, as in Tissue, Wang, Wang 2024 (arXiv
2408.11029). D is the decay of the rate. Most of its effect comes at once, as in Luo et al. 2025 (arXiv 2503.12811), a
smaller part grows as long as the rate is low. bench/RESULTS.md has the errors of its forecasts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Numbers = Sequence[float] | np.ndarray
Forecast = tuple[dict | None, str | None]  # a fit, or the reason why there is none
EXPONENTS = np.arange(0.1, 1.45, 0.1)  # the values of a that are tried
MIN_EVALUATIONS = 4  # after warm-up
EARLIEST = 0.48  # of the schedule: an evaluation shortly before half of it counts as half


class Constants(NamedTuple):
    """What other runs say. bench/forecast.py fits it, and tests it on runs that it was not fitted to."""

    decay: tuple[float, float] = (0.046, 0.053)  # C as a share of the loss: mean, twice the deviation found
    exponent: tuple[float, float] = (0.52, 0.41)  # a: median and standard deviation of its logarithm
    power: float = 1.1  # of the learning rate in D
    slow: float = 0.35  # weight of the part of D that grows as long as the rate is low
    to_come: float = 0.04  # error of the law in the decrease to come, as a share of it, when the decay is complete
    floor: float = 0.025  # the narrowest band, in nats (set, not fitted)
    misfit: float = 0.003  # the least scatter of evaluations about the law, in nats (set, not fitted)


CONSTANTS = Constants()


def annealing(rates: Numbers, constants: Constants = CONSTANTS) -> tuple[np.ndarray, np.ndarray]:
    """rates (n,) of n steps -> S1 and D (n + 1,) after 0 to n steps, with the rates in units of their maximum."""
    units = np.asarray(rates, dtype=float)
    units = units / units.max()
    below = 1 - units**constants.power
    below[: warmup_steps(units)] = 0.0
    decay = below + constants.slow * np.cumsum(below) / len(units)
    return np.append(units[0], np.cumsum(units)), np.append(0.0, decay)


def warmup_steps(rates: Numbers) -> int:
    return int(np.argmin(np.append(np.diff(rates) > 0, False)))  # until the rate stops rising for the first time


def forecast(
    steps: Numbers, losses: Numbers, rates: Numbers, constants: Constants = CONSTANTS, train: Numbers | None = None
) -> Forecast:
    """Predicts the loss at the end of the schedule -> (fit, None), or (None, the reason why there is no forecast).

    steps, losses (m,): the evaluations so far. rates (n,): the learning rate of every step of the schedule; after a
    resume, of the steps before it as they were. Outliers have little weight; values that are not finite have none.
    fit: the loss after step "end" = n, its error ("band"), the law's value at the last evaluation ("now", at "step").
    train (m,): train losses beside val losses. The law is for new text; on text that is read again and again val falls
    behind train, and what it has fallen behind so far widens the band.
    """
    steps, losses, rates = (np.asarray(values, dtype=float) for values in (steps, losses, rates))
    n = len(rates)
    if not len(steps) or steps[-1] < EARLIEST * n:
        return None, f"no forecast before step {math.ceil(EARLIEST * n):,}, {EARLIEST:.0%} of the schedule"
    if not math.isfinite(losses[-1]):
        return None, f"no forecast: the loss of step {steps[-1]:,.0f} is not finite"
    if not rates.any():
        return None, "no forecast: the learning rate is 0 in every step"
    first = max(warmup_steps(rates) + n // 20, n // 10)
    use = np.isfinite(losses) & (steps >= first) & (steps <= n)
    if use.sum() < MIN_EVALUATIONS:
        return None, f"no forecast: it needs at least {MIN_EVALUATIONS} evaluations from step {first:,} on"
    x, y, (s1, decay) = steps[use].astype(int), losses[use], annealing(rates, constants)
    if reason := rising(x, y, decay):
        return None, reason
    seen = max(0.05, decay[x[-1]] / decay[-1]) if decay[-1] > 0 else 1.0  # share of the decay
    fit = fit_law(s1[x] / s1[-1], decay[x], y, decay[-1], constants)
    fit |= dict(scale=s1[-1], constants=constants, seen=seen, step=int(x[-1]), end=n)
    fit["now"], fit["loss"] = follow(fit, rates)[[x[-1], -1]].tolist()
    fit["band"] = band(fit, fit["loss"])
    if train is not None:
        gaps = y - np.asarray(train, dtype=float)[use]
        behind = float(np.median(gaps[-3:]) - np.median(gaps[:3]))
        fit["band"] = math.hypot(fit["band"], max(0.0, behind)) if math.isfinite(behind) else fit["band"]
    if decay[x[-1]] < 0.03 * decay[-1]:
        others = f"the loss ends at {fit['loss']:.2f} +- {abs(fit['loss']) * constants.decay[1]:.2f}"
        return None, f"no forecast before the learning rate has begun to fall; with a decay as in other runs, {others}"
    return fit, None


def rising(steps: np.ndarray, losses: np.ndarray, decay: np.ndarray) -> str | None:
    """The reason not to forecast a run whose loss went up by more than noise and learning rate explain; else None."""
    best = losses.argmin()
    noise = 1.05 * np.median(np.abs(np.diff(losses)))  # the standard deviation of one evaluation, roughly
    explained = 0.05 + 0.15 * max(0.0, decay[steps[best]] - decay[steps[-1]])  # a rate that rose again, at a resume
    rise = losses[-2:].min() - losses[best]
    risen = rise > explained * abs(losses[best]) + 6 * noise
    return f"no forecast: the loss has risen by {rise:.2f} since step {steps[best]:,}" if risen else None


def fit_law(x1: np.ndarray, decay: np.ndarray, y: np.ndarray, decay_end: float, constants: Constants) -> dict:
    """Least squares of y (m,) = L0 + A x1^-a - C decay, for each a with what other runs say of C; x1 is 1 at the end.

    Returns a, b = (L0, A, C), the scatter of y about the law and the standard error of the law's value at the end.
    """
    level = abs(float(np.median(y[-3:]))) or 1.0
    X = np.stack([np.stack((np.ones_like(x1), x1**-a, -decay), axis=1) for a in EXPONENTS])  # (G, m, 3), G exponents
    mean = level * np.array([1.0, 0.0, constants.decay[0]])  # of L0, A, C before any evaluation
    weights = (level * np.array([10.0, 1.0, constants.decay[1]])) ** -2
    unlikely = (np.log(EXPONENTS / constants.exponent[0]) / constants.exponent[1]) ** 2
    sigma = np.full(len(y), 0.02)  # of each evaluation
    for _ in range(6):  # evaluations beyond three times the scatter lose weight
        W = X / sigma[:, None]
        precision = W.transpose(0, 2, 1) @ W + np.diag(weights)  # (G, 3, 3)
        b = np.linalg.solve(precision, (W.transpose(0, 2, 1) @ (y / sigma) + weights * mean)[..., None])  # (G, 3, 1)
        residuals, b = y - (X @ b)[..., 0], b[..., 0]  # (G, m), (G, 3)
        cost = np.sum((residuals / sigma) ** 2, axis=1) + np.sum(weights * (b - mean) ** 2, axis=1)
        cost += np.linalg.slogdet(precision)[1] + unlikely + 100 * (b[:, 1] <= 0)  # -2 log of the evidence of each a
        best = int(cost.argmin())
        scatter = max(constants.misfit, 1.48 * float(np.median(np.abs(residuals[best]))))
        sigma = scatter * np.maximum(1, np.abs(residuals[best]) / (3 * scatter))
    ends = b @ (at_end := np.array([1.0, 1.0, -decay_end]))
    variances = at_end @ np.linalg.inv(precision) @ at_end + (ends - ends[best]) ** 2
    fit_error = math.sqrt(np.average(variances, weights=np.exp((cost.min() - cost) / 2)))
    few = 1 + 10 / len(y) ** 2  # few evaluations understate their scatter
    return dict(a=float(EXPONENTS[best]), b=b[best], scatter=few * scatter, fit_error=few * fit_error)


def follow(fit: dict, rates: Numbers) -> np.ndarray:
    """rates (n,) of n steps, the run's own or others -> the loss (n + 1,) by the law of a fit after 0 to n steps."""
    s1, decay = annealing(rates, fit.get("constants", CONSTANTS))
    L0, A, C = fit["b"]
    return L0 + A * (np.maximum(s1, 1e-9) / fit["scale"]) ** -fit["a"] - C * decay


def band(fit: dict, loss: float) -> float:
    """Two standard deviations of a predicted loss: errors of the fit, of one evaluation, of the law."""
    to_come = fit["constants"].to_come * (fit["now"] - loss) / fit["seen"]
    return max(fit["constants"].floor, 2 * math.hypot(fit["fit_error"], fit["scatter"], to_come))


def earlier_forecasts(steps: Numbers, losses: Numbers, rates: Numbers, train: Numbers | None = None) -> list[dict]:
    """The forecasts from what was known at 50, 60, ... 90% of the schedule: step, loss and band of each."""
    steps, losses, train = np.asarray(steps), np.asarray(losses), None if train is None else np.asarray(train)
    known = {int(np.searchsorted(steps, tenth * len(rates) / 10, side="right")) for tenth in range(5, 10)}
    cuts = sorted(known - {len(steps)})
    fits = [forecast(steps[:m], losses[:m], rates, train=None if train is None else train[:m])[0] for m in cuts]
    return [{name: fit[name] for name in ("step", "loss", "band")} for fit in fits if fit]


def forecast_line(evals: Sequence[tuple[int, float, float]], rates: Numbers) -> str:
    """A log line from the evaluations (step, train loss, val loss); "" where there is no forecast and at the end."""
    steps, train, val = zip(*evals, strict=True)
    fit, _ = forecast(steps, val, rates, train=train)
    if not fit or fit["step"] >= fit["end"]:
        return ""
    return f"forecast: val loss {fit['loss']:.4f} +- {fit['band']:.4f} at step {fit['end']:,}"
