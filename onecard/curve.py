"""A noisy curve: how much it scatters, how it changes, whether it has risen above its best. For diagnosis.py.

val = finite(steps, losses)
moved, error = change(val.late(), noise(val))
"""

import math
from typing import NamedTuple

import numpy as np

BINS = 60  # parts of log lines, or of many evaluations; the median loss of each is a point of a curve


class Curve(NamedTuple):
    """A loss over steps, finite numbers only."""

    steps: np.ndarray
    values: np.ndarray

    def take(self, part: np.ndarray | slice) -> "Curve":
        return Curve(self.steps[part], self.values[part])

    def since(self, step: float) -> "Curve":
        return self.take(self.steps >= step)

    def late(self) -> "Curve":
        """The last third of the steps, at least six points."""
        count = max(6, int(np.sum(self.steps >= self.steps[-1] * 2 / 3))) if len(self.steps) else 0
        return self.take(slice(-count, None))

    def later_half(self) -> "Curve":
        """The later half of the points, at least ten."""
        count = max(10, (len(self.steps) + 1) // 2)
        return self.take(slice(-count, None))


def finite(steps: np.ndarray, values: np.ndarray) -> Curve:
    return Curve(steps[np.isfinite(values)], values[np.isfinite(values)])


def medians(lines: Curve, least: int = 8) -> Curve:
    """The median of each of up to BINS parts, at its mean step; a part has at least `least` points."""
    count = min(BINS, len(lines.steps) // least)
    parts = np.array_split(np.arange(len(lines.steps)), count) if count else []
    steps = np.array([lines.steps[part].mean() for part in parts])
    return Curve(steps, np.array([np.median(lines.values[part]) for part in parts]))


def coarse(curve: Curve) -> Curve:
    """Fewer points, of a curve of more than BINS: the noise of close evaluations is not independent."""
    return medians(curve, 4) if len(curve.steps) > BINS else curve


def noise(curve: Curve) -> float:
    """Standard deviation of the noise on a smooth curve, from second differences in its later half; inf: unknown.

    The largest of those of points 1, 2 and 4 apart, because slow fluctuations do not show in neighbours; over the
    logarithm of the steps, where a loss is least curved. Single outliers are left out.
    """
    later = without_outliers(curve.later_half())
    x, y = np.log(later.steps + 1), later.values
    lags = [lag for lag in (1, 2, 4) if len(y) >= 2 * lag + 3]
    scatters = [float(np.sqrt(np.mean(second_differences(x, y, lag) ** 2))) for lag in lags]
    return max(scatters) + 1e-6 if lags else math.inf


def lasting_noise(curve: Curve) -> float:
    """The noise as it acts on a trend: larger where it is autocorrelated, because fewer points are independent.

    If neighbours have an autocorrelation r, n points tell as much as n (1 - r) / (1 + r) independent ones. r is that of
    the residuals about a parabola in the logarithm of the steps, whose fit takes away about 3 / n of it.
    """
    later = without_outliers(curve.later_half())
    x, y, n = np.log(later.steps + 1), later.values, len(later.steps)
    if n < 7:
        return noise(curve)
    residuals = y - np.polyval(np.polyfit(x - x.mean(), y, 2), x - x.mean())
    r = (n * (residuals[1:] @ residuals[:-1]) / (residuals @ residuals + 1e-30) + 3) / (n - 6)
    r = min(max(float(r), 0.0), 0.8)
    return noise(curve) * math.sqrt((1 + r) / (1 - r))


def without_outliers(curve: Curve) -> Curve:
    """The curve without points more than 6 deviations from the line between their neighbours, which show it too."""
    if len(curve.steps) < 7:
        return curve
    away = second_differences(np.log(curve.steps + 1), curve.values, 1)
    before, after = np.append(0, away[:-1]), np.append(away[1:], 0)  # beside a single outlier d: -d / 2 each
    single = (away * (before + after) < -0.4 * away**2) & (np.abs(away) > np.maximum(np.abs(before), np.abs(after)))
    outliers = 1 + np.flatnonzero(single & (np.abs(away) > 6 * calm_noise(curve)))
    return curve.take(np.delete(np.arange(len(away) + 2), outliers))


def calm_noise(curve: Curve) -> float:
    """As noise, of neighbours alone and of their calmest 40%: spikes and heavy tails do not count."""
    if len(curve.steps) < 5:
        return math.inf
    away = np.abs(second_differences(np.log(curve.steps + 1), curve.values, 1))
    return float(np.quantile(away, 0.4)) / 0.524 + 1e-6  # 40% of a normal distribution are below 0.524


def second_differences(x: np.ndarray, y: np.ndarray, lag: int) -> np.ndarray:
    """y (n,) less the line between the points `lag` before and after -> (n - 2 lag,), with the variance of y."""
    share = (x[lag:-lag] - x[: -2 * lag]) / (x[2 * lag :] - x[: -2 * lag])
    away = y[lag:-lag] - (1 - share) * y[: -2 * lag] - share * y[2 * lag :]
    return away / np.sqrt(1 + share**2 + (1 - share) ** 2)


def change(part: Curve, scatter: float) -> tuple[float, float]:
    """How much a part rises from its first to its last step, by the median slope of all pairs (Sen); standard error.

    The median slope ignores outliers, at the ends too. The error is that of least squares, a few percent less.
    """
    x, y = part.steps, part.values
    first, second = np.triu_indices(len(x), 1)
    slope = np.median((y[second] - y[first]) / (x[second] - x[first]))
    length = x[-1] - x[0]
    return float(slope * length), float(scatter * length / (math.sqrt(len(x)) * x.std()))


def critical(curve: Curve, z: float) -> float:
    """How many errors of a change are beyond chance, as z errors would be if the noise of the curve were known."""
    later = len(curve.later_half().steps)
    return student((later - 2) / 2, z)  # neighbouring second differences share points: two tell as much as one


def student(df: float, z: float) -> float:
    """Student's t with the tail probability of the normal quantile z (Cornish and Fisher's expansion)."""
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def risen(curve: Curve, least: float) -> tuple[int, float] | None:
    """(index of the lowest, rise) of a curve that stays above its best by 5 deviations and by a share `least`; or None.

    "Stays" means the last three points, or the last tenth of them. A best of one point only is no best: the curve is
    smoothed by medians of three.
    """
    y, n = curve.values, len(curve.values)
    if n < 5:
        return None
    smooth = np.array([np.median(y[max(0, i - 1) : i + 2]) for i in range(n)])
    best, tail = int(smooth[:-1].argmin()), y[-max(3, n // 10) :]
    scatter = noise(curve.take(slice(best + 1)) if best >= 12 else curve)
    limit = max(5 * scatter, least * smooth[best])
    lowest = max(0, best - 1) + int(y[max(0, best - 1) : best + 2].argmin())
    return (lowest, float(np.median(tail) - smooth[best])) if tail.min() > smooth[best] + limit else None
