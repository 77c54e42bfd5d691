"""Where the loss of a run will end, from its beginning: the law of learning-rate annealing, fitted to the evaluations.

    found, reason = forecast(steps, losses, rates)   # rates: the learning rate of every step of the schedule
    print(found["loss"], found["band"])
"""

import math
from itertools import accumulate

import numpy as np

MOMENTUM = 0.999  # Tissue et al.'s, of the falls of the rate
EXPONENTS = np.arange(0.1, 1.5, 0.02)
TO_COME = 0.25  # error of the law, as a share of the fall that it sees to come; bench/forecast.py measures it


def annealing(rates):
    """rates (n,) of n steps -> S1 and S2 (n + 1,) after 0 .. n steps, with the rate in units of its peak.

    S1 sums the rates, S2 the momentum of their falls (Tissue, Wang, Wang 2024, arXiv 2408.11029).
    """
    rates = np.asarray(rates, dtype=float) / max(rates)
    falls = np.maximum(0.0, -np.diff(rates, prepend=rates[0]))
    momentum = np.fromiter(accumulate(falls.tolist(), lambda m, fall: MOMENTUM * m + fall), float, len(falls))
    return np.append(0.0, np.cumsum(rates)), np.append(0.0, np.cumsum(momentum))


def forecast(steps, losses, rates):
    """-> (dict, None), or (None, the reason why there is none). The loss at the end of a schedule from its beginning.

    steps (m,) at which the losses (m,) were evaluated; rates: the learning rate of every step of the schedule. The law
    is L = L0 + A S1^-a - C S2: for each a on a grid a linear least squares problem. Early evaluations, which the law
    does not describe, are left out as long as that lowers the scatter by a third. "band" (two standard deviations) has
    three parts: the uncertainty of the fit (its likelihood along a), the scatter of one evaluation, and a quarter of
    the fall that is still to come: so much was the law wrong by, on runs that were not used to find it.
    """
    steps, losses, n = np.asarray(steps, dtype=int), np.asarray(losses, dtype=float), len(rates)
    if not len(steps) or 2 * steps[-1] < n:
        return None, f"no forecast before step {-(-n // 2):,}, half of the schedule"
    s1, s2 = annealing(rates)
    if 0 < s2[-1] * 0.1 > s2[min(steps[-1], n)]:
        return None, "no forecast before the learning rate has begun to fall: what its fall brings is not known yet"
    warm, best = int(np.argmax(rates)), None
    for share in (0.05, 0.1, 0.15, 0.2):
        use = (steps >= max(2 * warm, share * n)) & (steps <= n)
        if use.sum() < 7:
            break
        fit = fit_law(s1[steps[use]] / s1[-1], s2[steps[use]] / (s2[-1] or 1), losses[use])
        if best and fit["scatter"] > 0.67 * best["scatter"]:
            break
        best = fit | dict(first_step=int(steps[use][0]), scale=(s1[-1], s2[-1] or 1))
    if best is None:
        return None, f"no forecast from fewer than seven evaluations behind step {int(max(2 * warm, 0.05 * n)):,}"
    now = min(int(steps[-1]), n)
    curve = follow(best, rates)
    band = 2 * math.sqrt(best["fit_error"] ** 2 + best["scatter"] ** 2 + (TO_COME * (curve[now] - curve[-1])) ** 2)
    return best | dict(loss=float(curve[-1]), band=band, now=float(curve[now]), step=now, end=n), None


def fit_law(x1, x2, y):
    """Least squares of y = L0 + A x1^-a - C x2, x1 and x2 being 1 at the end of the schedule.

    A weak prior holds C where few points do: the rate's fall brings 3 +- 5 percent of the loss.
    """
    columns = 3 if x2.any() else 2
    prior = np.array([0.0, 0.0, 1.0])[:columns] / (0.05 * y[-1])
    aim = 0.03 / 0.05 * (columns == 3)

    def solve(a, weight):
        X = np.stack((np.ones_like(x1), x1**-a, -x2), axis=1)[:, :columns]
        X, t = np.vstack((X, weight * prior)), np.append(y, weight * aim)
        b = np.linalg.lstsq(X, t, rcond=None)[0]
        b = b if b[1] > 0 else np.array([y.mean(), 0.0, 0.0])[:columns]  # it does not fall: no power law
        return b, X, float(np.sum((t - X @ b) ** 2))

    scatter = math.sqrt(min(solve(a, 0.0)[2] for a in EXPONENTS) / (len(y) - columns - 1)) + 1e-9
    fits = [solve(a, scatter) for a in EXPONENTS]
    misfits = np.array([fit[2] for fit in fits]) / scatter**2
    i, weights = int(misfits.argmin()), np.exp((misfits.min() - misfits) / 2)
    end = np.array([1.0, 1.0, -1.0])[:columns]
    ends = np.array([b @ end for b, *_ in fits])
    spread = [
        scatter**2 * end @ np.linalg.pinv(X.T @ X) @ end + (e - ends[i]) ** 2
        for e, (_, X, _) in zip(ends, fits, strict=True)
    ]
    b = np.append(fits[i][0], 0.0)[:3]
    return dict(a=float(EXPONENTS[i]), b=b, scatter=scatter, fit_error=math.sqrt(np.average(spread, weights=weights)))


def follow(fit, rates):
    """What the law of a fit says after 1 .. n steps at these rates (index 0: after the first): (n + 1,)."""
    s1, s2 = annealing(rates)
    s1[0] = s1[1]  # the law is infinite at 0
    L0, A, C = fit["b"]
    return L0 + A * (s1 / fit["scale"][0]) ** -fit["a"] - C * s2 / fit["scale"][1]


def forecast_line(evals, rates):
    """One line for the log from the evaluations (step, train loss, val loss); empty before half of the schedule."""
    steps, _, val = zip(*evals, strict=True)
    if 2 * steps[-1] < len(rates) or steps[-1] >= len(rates):
        return ""
    found, _ = forecast(steps, val, rates)
    return f"forecast: val loss {found['loss']:.4f} +- {found['band']:.4f} at step {found['end']:,}" if found else ""
