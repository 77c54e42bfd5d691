"""forecast.py against the sums of the paper, curves that obey its law, and the ends of two real runs."""

import numpy as np
import pytest
from curves import ANCHORS, anchor, config, learning_rates

from onecard.forecast import annealing, follow, forecast, forecast_line, stretch


def test_annealing_sums_are_the_double_sums_of_the_paper():
    rates = learning_rates(config(max_iters=60, lr_decay_iters=60, warmup_iters=5))
    s1, s2 = annealing(rates)
    units = np.array(rates) / max(rates)
    for s in (1, 7, 30, 60):
        falls = [max(0.0, units[k - 1] - units[k]) for k in range(1, s)]
        double = sum(falls[k - 1] * 0.999 ** (i - k) for i in range(1, s) for k in range(1, i + 1))
        assert s1[s] == pytest.approx(units[:s].sum()) and s2[s] == pytest.approx(double)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_curve_that_obeys_the_law_is_forecast_exactly(schedule):
    rates = learning_rates(config(max_iters=10000, lr_decay_iters=10000, warmup_iters=200, lr_schedule=schedule))
    truth = follow(dict(a=0.5, b=(3.1, 0.2, 0.12), scale=[s[-1] for s in annealing(rates)]), rates)
    steps = np.arange(0, 9001, 250)
    found, _ = forecast(steps, truth[steps], rates)
    assert found["loss"] == pytest.approx(truth[-1], abs=0.002) and found["a"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "name, cut, within", [("40m", 10000, (0.01, 0.02)), ("40m", 14500, (0.01, 0.02)), ("124m", 8000, (0.03, 0.03))]
)
def test_the_ends_of_two_real_runs_are_forecast_from_their_beginnings(name, cut, within):
    (steps, *splits), rates = anchor(name), learning_rates(config(**ANCHORS[name]))
    for losses, largest in zip(splits, within, strict=True):  # of train, of val
        found, _ = forecast(steps[steps <= cut], losses[steps <= cut], rates)
        error = abs(follow(found, rates)[steps[-1]] - losses[-1])
        assert error < largest and error < found["band"] < 0.1


def test_no_forecast_before_half_of_the_schedule_before_the_decay_or_from_few_evaluations():
    (steps, _, val), keys = anchor("40m"), ANCHORS["40m"]
    rates, stable = (learning_rates(config(**keys, lr_schedule=name)) for name in ("cosine", "wsd"))
    assert "before step 10,000" in forecast(steps[:19], val[:19], rates)[1]
    assert "at least 7" in forecast([0, 2000, 4000, 6000, 8000, 10000, 12000], val[:7], rates)[1]
    assert "begun to fall" in forecast(steps[:30], val[:30], stable)[1]
    evals = list(zip(*anchor("40m"), strict=True))
    assert forecast_line(evals[:20], rates) == "" == forecast_line(evals, rates)
    assert forecast_line(evals[:30], rates) == "forecast: val loss 3.5353 +- 0.0341 at step 20,000"


def test_a_stretched_schedule_has_the_same_shape():
    rates = [1.0, 2.0, 3.0, 4.0]
    assert stretch(rates, 2) == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0] and stretch(rates, 0.5) == [1.0, 3.0]
