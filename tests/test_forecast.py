"""forecast.py against a law of its own kind, the ends of public runs, and logs with faults."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from curves import ANCHORS, anchor, config, curves

from onecard.forecast import annealing, band, earlier_forecasts, follow, forecast, forecast_line, warmup_steps
from train import learning_rates

BENCH = Path(__file__).parent.parent / "bench"
SCHEDULES = ["cosine", "linear", "wsd"]


@pytest.fixture(scope="module")
def bench():
    """bench/forecast.py as a module."""
    sys.path.insert(0, str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_forecast", BENCH / "forecast.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCH))
    return module


def llmc():
    return next(curve for curve in curves() if (curve.run, curve.split) == ("llmc_124m", "val"))


def test_forecasts_of_runs_that_the_constants_were_not_fitted_to(bench):
    """Per schedule 95% of the ends are in the band; none is withheld; per run better than the last value; narrow."""
    left_out = {name: bench.score(c, bench.fit_constants(name[0]), bench.FINE) for name, c in bench.CURVES.items()}
    for schedule in SCHEDULES:
        scores = [s for name, found in left_out.items() if bench.CURVES[name].schedule == schedule for s in found]
        assert len(scores) >= 20 and all(s["fit"] for s in scores)
        assert bench.inside(scores) >= 0.95 * len(scores), schedule
    for name, scores in left_out.items():
        assert bench.rms(s["law"] for s in scores) < 0.6 * bench.rms(s["last"] for s in scores), name
    for share, widest in (("0.500", 0.06), ("0.900", 0.03)):
        assert np.mean([s["band"] for scores in left_out.values() for s in scores if s["share"] == share]) <= widest


def test_the_constants_are_those_that_the_bench_fits_to_all_runs(bench):
    assert bench.fit_constants() == bench.CONSTANTS


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_curve_that_obeys_the_law_is_forecast_exactly(schedule):
    rates = learning_rates(config(max_iters=10000, lr_decay_iters=10000, warmup_iters=200, lr_schedule=schedule))
    truth = follow(dict(a=0.5, b=(3.1, 0.2, 0.17), scale=annealing(rates)[0][-1]), rates)
    steps = np.arange(0, 9001, 250)
    found, _ = forecast(steps, truth[steps], rates)
    assert found["loss"] == pytest.approx(truth[-1], abs=0.003) and found["a"] == pytest.approx(0.5)


def test_annealing_sums_the_rates_and_begins_to_decay_after_warmup():
    rates = learning_rates(config(max_iters=60, lr_decay_iters=60, warmup_iters=5, min_lr=0.0, lr_schedule="linear"))
    s1, decay = annealing(rates)
    units = np.array(rates) / max(rates)
    assert warmup_steps(rates) == 5 and s1[1:] == pytest.approx(np.cumsum(units))
    assert (decay[:7] == 0).all() and (np.diff(decay[6:]) > 0).all()
    slow = sum(1 - unit**1.1 for unit in units[5:]) / 60
    assert decay[-1] == pytest.approx(1 - units[-1] ** 1.1 + 0.35 * slow)


def test_no_forecast_early_nor_from_few_evaluations_and_before_the_decay_only_what_other_runs_say():
    (steps, _, val), keys = anchor("40m"), ANCHORS["40m"]
    rates, stable = (learning_rates(config(**keys, lr_schedule=name)) for name in ("cosine", "wsd"))
    assert "before step 9,600" in forecast(steps[:20], val[:20], rates)[1] and forecast(steps[:21], val[:21], rates)[0]
    assert "at least 4" in forecast([0, 3000, 6000, 10000], val[:4], rates)[1]
    fit, reason = forecast(steps[:30], val[:30], stable)
    assert fit is None and "begun to fall; with a decay as in other runs, the loss ends at 3.39 +- 0.18" in reason
    evals = list(zip(*anchor("40m"), strict=True))
    assert forecast_line(evals[:20], rates) == "" == forecast_line(evals, rates)
    assert re.match(r"forecast: val loss 3\.5.* at step 20,000$", forecast_line(evals[:30], rates))


@pytest.mark.parametrize("at, change", [(10, 3.0), (40, 0.5), (-1, 0.5), (-2, 1.0), (20, np.nan), (30, np.inf)])
def test_one_spike_or_nan_changes_no_forecast(at, change):
    run = llmc()
    steps, losses = run.steps[:57], run.losses[:57].copy()
    before, _ = forecast(steps, losses, run.rates)
    losses[at] += change
    after, reason = forecast(steps, losses, run.rates)
    assert after, reason
    assert after["loss"] == pytest.approx(before["loss"], abs=0.003) and after["band"] < 0.03


@pytest.mark.parametrize("end, word", [([3.7, 5.0, 6.1, 7.2], "risen"), ([7.2, 7.2], "risen"), ([np.nan], "finite")])
def test_a_run_that_diverged_has_no_forecast(end, word):
    run = llmc()
    fit, reason = forecast(run.steps[:57], np.append(run.losses[: 57 - len(end)], end), run.rates)
    assert fit is None and word in reason


def test_a_resume_onto_a_longer_schedule_is_forecast():
    first, second = (learning_rates(config(max_iters=n, lr_decay_iters=n, warmup_iters=300)) for n in (10000, 20000))
    rates = first + second[10000:]
    truth = follow(dict(a=0.5, b=(3.1, 0.2, 0.17), scale=annealing(rates)[0][-1]), rates)
    assert truth[11000] > truth[10000] + 0.05  # the rate rose again, and the loss with it
    steps = np.arange(0, 14001, 250)
    losses = truth[steps] + np.random.default_rng(0).normal(0, 0.003, len(steps))
    found, _ = forecast(steps, losses, rates)
    assert found["loss"] == pytest.approx(truth[-1], abs=0.01)


def test_few_uneven_evaluations_and_losses_of_micro_batches_are_forecast_inside_their_bands():
    run, rng = llmc(), np.random.default_rng(1)
    truth = run.losses[-1]
    for count in (7, 10, 15):
        use = np.sort(rng.choice(np.arange(9, 57), count, replace=False))
        found, _ = forecast(run.steps[use], run.losses[use], run.rates)
        assert abs(found["loss"] - truth) < found["band"] < 0.08
    noisy, _ = forecast(run.steps[:57], run.losses[:57] + rng.normal(0, 0.1, 57), run.rates)
    assert abs(noisy["loss"] - truth) < noisy["band"] < 0.3


@pytest.mark.filterwarnings("error")
def test_odd_curves_do_no_harm():
    steps, rates = np.arange(0, 801, 40), learning_rates(config(max_iters=1000, lr_decay_iters=1000, warmup_iters=50))
    for level in (0.0, 3.3):
        assert forecast(steps, np.full(21, level), rates)[0]["loss"] == pytest.approx(level, abs=0.01)
    constant, _ = forecast(steps, 3 + 1 / np.sqrt(steps + 1), np.full(1000, 1e-3))
    assert constant["loss"] == pytest.approx(3 + 1 / np.sqrt(1001), abs=0.02)
    nothing = np.full(21, np.nan)
    for odd in ((steps[:2], [3.0, 3.1], rates), ([], [], []), (steps, nothing, rates), (steps, steps, [0] * 1000)):
        assert forecast(*odd)[0] is None and forecast(*odd)[1]


def test_earlier_forecasts_are_those_of_what_was_known_then():
    run = llmc()
    earlier = earlier_forecasts(run.steps, run.losses, run.rates)
    assert [row["step"] for row in earlier] == [9750, 11500, 13500, 15500, 17500]
    then, _ = forecast(run.steps[:40], run.losses[:40], run.rates)
    assert earlier[0] == {name: then[name] for name in ("step", "loss", "band")}
    assert all(abs(row["loss"] - run.losses[-1]) < row["band"] for row in earlier)
    assert earlier_forecasts(run.steps[:45], run.losses[:45], run.rates) == earlier[:1]


def test_the_law_goes_on_to_other_schedules():
    run = llmc()
    found, _ = forecast(run.steps[:57], run.losses[:57], run.rates)
    longer = follow(found, np.repeat(run.rates, 2))[-1]
    higher = follow(found, [*run.rates[:14000], *[run.rates[13999]] * 5560])[-1]  # without the rest of the decay
    assert 0.02 < found["loss"] - longer < 0.15 and 0.01 < higher - found["loss"] < 0.1
    assert band(found, longer) >= found["band"]


def test_the_band_holds_where_val_falls_behind_train_on_text_that_is_read_again():
    """config/quickstart.py reads its text 3.3 times: evaluations of a real run, every 50 of 600 steps."""
    quick = config(max_iters=600, lr_schedule="linear", learning_rate=8e-3, min_lr=0.0, warmup_iters=20)
    rates, steps = learning_rates(quick), range(50, 650, 50)
    train = [4.0083, 3.6094, 3.4388, 3.2541, 3.0192, 2.9223, 2.8129, 2.7130, 2.5831, 2.5095, 2.4562, 2.4081]
    val = [4.0736, 3.7464, 3.5874, 3.4211, 3.3020, 3.1811, 3.0941, 3.0187, 2.9697, 2.9077, 2.8730, 2.8553]
    for m in range(6, 12):
        fit, _ = forecast(steps[:m], val[:m], rates, train=train[:m])
        assert abs(fit["loss"] - val[-1]) < fit["band"]
