"""Predicts the final loss of a run from its evaluations so far, by the law of learning-rate annealing.

    fit, reason = forecast(steps, losses, rates)  # rates: the learning rate of every step of the schedule
    print(fit["loss"], fit["band"])

The law (Tissue, Wang, Wang 2024, arXiv 2408.11029) is L = L0 + A S1^-a - C S2. S1 is the sum of the learning rates
so far. S2 sums their decreases, with momentum. In this file both are 1 at the end of the schedule.
train.py logs the forecast from half of the schedule on; report.py draws it.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

MOMENTUM = 0.999  # of S2, as in the paper
EXPONENTS = np.arange(0.1, 1.5, 0.02)  # the values of a that are tried
TO_COME = 0.25  # error of the law, as a share of the decrease that it predicts; measured by bench/forecast.py
MIN_EVALUATIONS = 7
Numbers = Sequence[float] | np.ndarray


def annealing(rates: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """rates (n,) of n steps -> S1 and S2 (n + 1,) after 0 to n steps, with the rates in units of their maximum."""
    units = np.asarray(rates, dtype=float) / max(rates)
    falls = np.maximum(0.0, -np.diff(units, prepend=units[0]))
    momentum = np.fromiter(accumulate(falls.tolist(), lambda m, fall: MOMENTUM * m + fall), float, len(falls))
    return np.append(0.0, np.cumsum(units)), np.append(0.0, np.cumsum(momentum))


def forecast(steps: Numbers, losses: Numbers, rates: Numbers) -> tuple[dict | None, str | None]:
    """Predicts the loss at the end of the schedule -> (fit, None), or (None, the reason why there is no forecast).

    steps, losses (m,): the evaluations so far. rates (n,): the learning rate of every step of the schedule.
    fit["loss"] is the loss after step fit["end"] = n. fit["band"], two standard deviations, combines three errors: the
    uncertainty of the fit, the scatter of one evaluation, and TO_COME of the decrease that is still predicted.
    fit["now"] is the law's value at the last evaluation, fit["step"].
    """
    steps, losses, n = np.asarray(steps, dtype=int), np.asarray(losses, dtype=float), len(rates)
    if not len(steps) or 2 * steps[-1] < n:
        return None, f"no forecast before step {-(-n // 2):,}, half of the schedule"
    s1, s2 = annealing(rates)
    now = min(int(steps[-1]), n)
    if s2[-1] > 0 and s2[now] < 0.1 * s2[-1]:
        return None, "no forecast before the learning rate has begun to fall: the effect of its decay is unknown"
    warmup = int(np.argmax(rates))
    fit = None
    for share in (0.05, 0.1, 0.15, 0.2):  # skip early evaluations as long as that lowers the scatter by a third
        use = (steps >= max(2 * warmup, share * n)) & (steps <= n)
        if use.sum() < MIN_EVALUATIONS:
            break
        scale = (s1[-1], s2[-1] or 1)
        later_fit = fit_law(s1[steps[use]] / scale[0], s2[steps[use]] / scale[1], losses[use])
        if fit and later_fit["scatter"] > 0.67 * fit["scatter"]:
            break
        fit = later_fit | dict(first_step=int(steps[use][0]), scale=scale)
    if fit is None:
        first = int(max(2 * warmup, 0.05 * n))
        return None, f"no forecast: it needs at least {MIN_EVALUATIONS} evaluations after step {first:,}"
    curve = follow(fit, rates)
    to_come = TO_COME * (curve[now] - curve[-1])
    band = 2 * math.sqrt(fit["fit_error"] ** 2 + fit["scatter"] ** 2 + to_come**2)
    return fit | dict(loss=float(curve[-1]), band=band, now=float(curve[now]), step=now, end=n), None


def fit_law(x1: np.ndarray, x2: np.ndarray, y: np.ndarray) -> dict:
    """Least squares of y (m,) = L0 + A x1^-a - C x2. x1, x2 (m,) are S1 and S2, 1 at the end of the schedule.

    Returns a, b = (L0, A, C), the scatter of y about the law and the standard error of the law's value at the end.
    """
    columns = 3 if x2.any() else 2  # a constant learning rate says nothing about C
    residuals = min(solve(a, x1, x2, y, columns)[2] for a in EXPONENTS)
    scatter = math.sqrt(residuals / (len(y) - columns - 1)) + 1e-9
    fits = [solve(a, x1, x2, y, columns, prior_weight=scatter) for a in EXPONENTS]
    misfits = np.array([residuals for _, _, residuals in fits]) / scatter**2
    best = int(misfits.argmin())
    at_end = np.array([1.0, 1.0, -1.0])[:columns]
    ends = np.array([b @ at_end for b, _, _ in fits])
    variances = [
        scatter**2 * at_end @ np.linalg.pinv(X.T @ X) @ at_end + (end - ends[best]) ** 2
        for end, (_, X, _) in zip(ends, fits, strict=True)
    ]
    likelihoods = np.exp((misfits.min() - misfits) / 2)
    fit_error = math.sqrt(np.average(variances, weights=likelihoods))
    return dict(a=float(EXPONENTS[best]), b=np.append(fits[best][0], 0.0)[:3], scatter=scatter, fit_error=fit_error)


def solve(a, x1, x2, y, columns, prior_weight=0.0):
    """-> b = (L0, A, C)[:columns] for one exponent, the design matrix, the sum of squared residuals.

    The last row of the matrix is a weak prior, for when few evaluations see the decay: C is 3 +- 5 percent of the loss.
    """
    X = np.stack((np.ones_like(x1), x1**-a, -x2), axis=1)[:, :columns]
    prior = np.array([0.0, 0.0, 1.0])[:columns] / (0.05 * y[-1])
    target = 0.03 / 0.05 * (columns == 3)
    X, t = np.vstack((X, prior_weight * prior)), np.append(y, prior_weight * target)
    b = np.linalg.lstsq(X, t, rcond=None)[0]
    if b[1] <= 0:  # the loss does not fall: no power law
        b = np.array([y.mean(), 0.0, 0.0])[:columns]
    return b, X, float(np.sum((t - X @ b) ** 2))


def follow(fit: dict, rates: Numbers) -> np.ndarray:
    """rates (n,) of n steps -> the loss (n + 1,) by the law of a fit after 0 to n steps."""
    s1, s2 = annealing(rates)
    s1[0] = s1[1]  # the law is infinite at 0
    L0, A, C = fit["b"]
    return L0 + A * (s1 / fit["scale"][0]) ** -fit["a"] - C * s2 / fit["scale"][1]


def stretch(rates: Numbers, factor: float) -> list[float]:
    """The same schedule over `factor` times as many steps."""
    n = max(1, round(len(rates) * factor))
    return np.asarray(rates)[np.arange(n) * len(rates) // n].tolist()


def forecast_line(evals: Sequence[tuple[int, float, float]], rates: Numbers) -> str:
    """A log line from the evaluations (step, train loss, val loss); "" before half of the schedule and at its end."""
    steps, _, val = zip(*evals, strict=True)
    if 2 * steps[-1] < len(rates) or steps[-1] >= len(rates):
        return ""
    fit, _ = forecast(steps, val, rates)
    return f"forecast: val loss {fit['loss']:.4f} +- {fit['band']:.4f} at step {fit['end']:,}" if fit else ""
