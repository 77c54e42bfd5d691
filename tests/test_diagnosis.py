"""diagnosis.py on real runs of which the truth is known, and on made ones, healthy or with one fault each."""

import math
from dataclasses import replace

import numpy as np
import pytest
from curves import config, curves, write_founding_run
from made_runs import FAULTS, HEALTHY, made

from onecard.curve import Curve, calm_noise, change, lasting_noise, noise, risen, student, without_outliers
from onecard.diagnosis import PROBLEMS, diagnose
from onecard.run import Run
from report import read_run
from train import learning_rates


def problems(run):
    return {finding.name for finding in diagnose(run) if finding.name in PROBLEMS}


def a_run(steps, val, lines=()):
    """A run with these losses; lines: (step, loss) of log lines."""
    nothing = np.full(len(steps), np.nan)
    evals = dict(step=np.array(steps, dtype=float), val=np.array(val, dtype=float), train=nothing)
    evals |= dict(bits_per_byte=nothing, eval_seconds=nothing)
    at, loss = np.array(lines, dtype=float).reshape(-1, 2).T
    return Run("run", evals, [], dict(step=at, loss=loss))


def with_config(run, **keys):
    c = config(**(dict(n_layer=2, n_embd=384, n_head=6, warmup_iters=100, eval_interval=500) | keys))
    return replace(run, config=c, rates=learning_rates(c))


# ---- real runs


def test_the_founding_run_is_told_what_was_true_of_it(tmp_path):
    findings = diagnose(read_run(*write_founding_run(tmp_path)))
    found = dict(findings)
    assert [name for name in found if name in PROBLEMS] == ["val below train"]
    assert "Val is 0.067 +- 0.003 below train" in found["val below train"]  # its val set had 5,500 tokens
    assert "val loss still falls by" in found["falling"] and "0.27 of its peak and will be 0.10" in found["forecast"]
    assert "A gap that does not widen is not overfitting" in found["no overfitting"]
    assert "fall by 0.22 with twice the 41M parameters, 0.11 with twice the tokens" in found["limited by size"]
    assert "3.60 +- 0.08" in found["expected"] and "gradient norm" in found["not logged"]
    assert findings[0].name == "verdict" and "Step 14,500 of 20,000" in found["verdict"]
    assert "as was expected before it (3.60 +- 0.08)" in found["verdict"]
    assert "124M parameters on 3.48B tokens would bring most: 0.10 nats for the same 21.7 h" in found["verdict"]
    choices = [text for name, text in findings if name == "choice"]
    assert any("Head size 32" in text for text in choices)


def test_without_a_config_nothing_is_said_that_needs_one(tmp_path):
    found = dict(diagnose(read_run(write_founding_run(tmp_path)[0])))
    assert set(found) == {"verdict", "falling", "no overfitting", "not logged"}
    assert "--run_config" in found["not logged"]


VAL = {curve.run: curve for curve in curves() if curve.split == "val"}


@pytest.mark.parametrize("name", VAL)
def test_no_public_run_is_told_a_problem_at_any_cut(name):
    _, _, schedule, steps, val, rates = VAL[name]
    keys = dict(max_iters=len(rates), lr_decay_iters=len(rates), lr_schedule=schedule, min_lr=0.0)
    for cut in (0.3, 0.5, 0.7, 0.9, 1.0):
        seen = steps <= cut * len(rates)
        run = replace(with_config(a_run(steps[seen], val[seen]), **keys), rates=rates)
        assert not problems(run)
        if "falling" in (found := dict(diagnose(run))):
            assert "val loss still falls" in found["falling"]
            assert cut == 1 or val[~seen].min() < val[seen].min() + 0.005


# ---- made runs


def false_sentences(run, truth):
    """What a diagnosis says of a made run that is not so: problems, and trends that its curves without noise lack."""
    found = dict(diagnose(run))
    false = PROBLEMS & set(found) - truth.problems
    late = run.val.late().steps
    if not len(late) or run.jump:
        return false
    val, gap = (np.interp(late, run.evals["step"], clean) for clean in (truth.clean, truth.gap))
    falling = val if "val loss" in found.get("falling", "") else val - gap
    rose = {"falling": falling, "settled": val[::-1] - 0.02 * val[-1], "gap widens": -gap}
    rose |= {"val rises": -val, "train rises": gap - val}
    return false | {name for name, values in rose.items() if name in found and values[-1] - values[0] > -1e-3}


@pytest.mark.parametrize("cut", [0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_problem_and_is_told_nothing_false(name, cut):
    assert not false_sentences(*made(name, 0, cut))


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_run_is_told_its_fault_or_nothing(name):
    for seed in (10, 11):
        assert not false_sentences(*made(name, seed)), f"seed {seed}"
    assert problems(made(name, 0)[0]) == FAULTS[name] or name == "both rise"  # at times silent


def test_widening_while_val_falls_is_reported_as_what_it_is():
    found = dict(diagnose(made("gap widens, val falls", 0)[0]))
    assert "val still improves" in found["gap widens"] and "fewer steps" not in found["verdict"]


def test_rising_val_in_the_first_epoch_is_not_overfitting():
    run = made("overfitting", 0)[0]
    run.about["data"]["train_tokens"] = 10**13
    assert "No text was read twice" in dict(diagnose(run))["val rises"]


# ---- what is logged, and when the run ends


def test_a_loss_that_is_not_finite_comes_first_and_says_where():
    steps = np.arange(0, 20001, 500)
    val = np.where(steps < 15000, 3 + 5 * np.exp(-((steps / 500) ** 0.5)), np.inf)
    verdict, first = diagnose(with_config(a_run(steps, val), max_iters=40000, lr_decay_iters=40000))[:2]
    assert first.name == "not finite" and "from step 15,000 on, in 11 of 11 values" in first.text
    assert "resume from a checkpoint before it" in verdict.text


def test_a_run_is_finished_at_max_iters_only():
    steps = np.arange(0, 12001, 500)
    run = a_run(steps, 3 + 5 * np.exp(-((steps / 500) ** 0.5)))
    assert "falling" in dict(diagnose(with_config(run, max_iters=20000, lr_decay_iters=10000)))
    found = dict(diagnose(with_config(run, max_iters=12000, lr_decay_iters=0)))
    assert "finished" in found and "Finished at step 12,000" in found["verdict"]
    assert "beyond max_iters=9,000" in dict(diagnose(with_config(run, max_iters=9000)))["verdict"]


def test_a_short_run_that_is_finished_is_not_too_early():
    run = with_config(a_run([0, 120, 240], [10.8, 6.4, 5.9]), max_iters=240, warmup_iters=20)
    found = dict(diagnose(run))
    assert "too early" not in found and "from 10.800 to 5.900 in 3 evaluations" in found["finished"]
    running = with_config(a_run([0, 120], [10.8, 6.4]), max_iters=240, warmup_iters=20)
    assert "too early" in dict(diagnose(running))


def test_train_loss_alone_gives_a_trend():
    steps, rng = np.arange(0, 10000, 10), np.random.default_rng(0)
    loss = 3 + 5 * np.exp(-((steps / 300 + 0.1) ** 0.4)) + rng.normal(0, 0.05, len(steps))
    found = dict(diagnose(a_run([], [], lines=np.stack((steps, loss), axis=1))))
    assert "train loss still falls" in found["falling"] and "val loss" in found["not logged"]
    assert "train loss 3" in found["verdict"]


def test_a_loss_that_rises_a_little_is_not_flat():
    steps = np.arange(0, 12001, 250)
    val = 3.2 + np.random.default_rng(0).normal(0, 0.001, len(steps)) + 0.02 * np.maximum(0, steps / 12000 - 0.6)
    found = dict(diagnose(a_run(steps, val + 5 * np.exp(-steps / 300))))
    assert "flat" not in found and "settled" not in found and "val loss changed by +0.0" in found["val rises"]


@pytest.mark.filterwarnings("error")
def test_a_learning_rate_of_0_is_a_share_of_0():
    steps = np.arange(0, 12001, 500)
    keys = dict(learning_rate=0.0, min_lr=0.0, max_iters=20000, lr_decay_iters=20000)
    found = dict(diagnose(with_config(a_run(steps, 3 + 5 * np.exp(-((steps / 500) ** 0.5))), **keys)))
    assert "is 0.00 of its peak" in found["forecast"] and "learning_rate=0" in found["choice"]


def test_an_empty_run_is_too_early():
    assert [name for name, _ in diagnose(a_run([], []))] == ["verdict", "too early", "not logged"]


# ---- the arithmetic of curves


def noisy(rng, n=40, sd=0.01, keep=0.0):
    values = np.zeros(n)
    for i in range(n):
        values[i] = keep * values[max(0, i - 1)] + rng.normal(0, sd * math.sqrt(1 - keep**2))
    return Curve(np.arange(1, n + 1) * 100.0, 3 + 4 * (np.arange(1, n + 1) / 2.0) ** -0.7 + values)


def test_noise_is_that_of_the_evaluations_and_not_the_bend_of_the_curve():
    rng = np.random.default_rng(0)
    assert 0.009 < np.median([noise(noisy(rng)) for _ in range(200)]) < 0.014
    assert 0.008 < np.median([noise(noisy(rng, keep=0.5)) for _ in range(200)]) < 0.014


def test_single_outliers_are_left_out_and_calm_noise_ignores_them():
    rng = np.random.default_rng(1)
    curve = noisy(rng)
    curve.values[[22, 27, 33]] += 0.5
    assert set(curve.steps) - set(without_outliers(curve).steps) == {2300.0, 2800.0, 3400.0}
    assert noise(curve) < 0.02 and calm_noise(curve) < 0.03


def test_a_rise_has_to_stay():
    for raised, rise in ((0, None), (2, None), (3, 3.0)):
        values = np.append(np.linspace(4, 3, 20), np.full(10, 3.0))
        values[30 - raised :] += 3
        found = risen(Curve(np.arange(30.0), values), 0.01)
        assert (found and found[1]) == (rise and pytest.approx(rise))


def test_the_error_of_a_trend_in_autocorrelated_noise_is_that_of_fewer_points():
    rng = np.random.default_rng(0)
    for keep, factor in ((0.0, 1.0), (0.5, math.sqrt(3))):  # (1 + r) / (1 - r) = 3
        trends, ratios = [], []
        for _ in range(400):
            curve = noisy(rng, n=100, keep=keep)
            curve.values[:] -= 4 * (curve.steps / 200) ** -0.7
            moved, error = change(curve.late(), 0.01)
            trends.append(moved / error)
            ratios.append(lasting_noise(curve) / noise(curve))
        assert np.std(trends) == pytest.approx(factor, rel=0.15) and np.median(ratios) == pytest.approx(
            factor, rel=0.15
        )


def test_outliers_at_the_end_are_no_trend():
    rng, x = np.random.default_rng(0), np.arange(1.0, 21.0)
    values = 3 + rng.normal(0, 0.01, 20)
    values[-3:] += 1
    moved, error = change(Curve(x, values), 0.01)
    assert abs(moved) < 3 * error


def test_critical_values_are_those_of_students_tables():
    for df, z, t in ((8, 2.5758, 3.355), (20, 2.5758, 2.845), (10, 1.96, 2.228), (5, 1.96, 2.571)):
        assert student(df, z) == pytest.approx(t, rel=0.02)
