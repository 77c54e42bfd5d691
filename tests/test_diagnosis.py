"""diagnosis.py on a real run of which the truth is known, and on made curves with one fault each."""

import numpy as np
import pytest
from curves import CAUSES, made, write_founding_run

from onecard.diagnosis import PROBLEMS, Run, critical, diagnose, line_fit
from report import read_run


def test_the_founding_run_is_told_what_was_true_of_it(tmp_path):
    findings = diagnose(read_run(*write_founding_run(tmp_path)))
    found = dict(findings)
    assert [name for name in found if name in PROBLEMS] == ["noisy val set"]
    assert "val loss still falls by 0.0152 +- 0.0026 per 1,000 steps" in found["falling"]
    assert "0.27 of its peak and will be 0.10" in found["forecast"]
    assert "val ends at 3.535 +- 0.034 (step 20,000), 0.035 below now" in found["forecast"]
    assert "no more than noise" in found["no overfitting"] and "Val is 0.072 below train." in found["no overfitting"]
    assert "fall by 0.22 with twice the 41M parameters, 0.11 with twice the tokens" in found["limited by size"]
    assert "3.60 +- 0.08" in found["expected"]
    assert "200 batches should vary by 0.0071; train varies by 0.0084, val by 0.0115" in found["noisy val set"]
    assert "Val is 0.067 below train. Check the val set" in found["noisy val set"]
    assert "gradient norm" in found["not logged"]
    choices = [text for name, text in findings if name == "choice"]
    assert any("head size 32" in text for text in choices) and len(choices) == 2


def test_without_a_config_nothing_is_said_that_needs_one(tmp_path):
    found = dict(diagnose(read_run(write_founding_run(tmp_path)[0])))
    assert set(found) == {"falling", "no overfitting", "not logged"}
    assert "--run_config" in found["not logged"]


@pytest.mark.parametrize("cause", CAUSES)
def test_a_made_curve_is_named_by_its_fault_and_by_nothing_else(cause):
    """Four seeds each; bench/forecast.py counts a hundred."""
    for seed in range(4):
        assert {f.name for f in diagnose(made(cause, seed)) if f.name in PROBLEMS} == CAUSES[cause], f"seed {seed}"


def test_a_gap_in_the_first_epoch_is_not_overfitting():
    run = made("overfitting", 0)
    run.about["data"]["train_tokens"] = 10**13
    assert "No text was read twice" in dict(diagnose(run))["no overfitting"]


def test_a_trend_is_not_read_from_the_warm_up_or_from_a_few_evaluations():
    run, nothing = made("healthy", 0), np.array([])
    run.evals = {name: values[:7] for name, values in run.evals.items()}
    empty = Run("empty", dict(step=nothing, train=nothing, val=nothing), [], dict(step=np.array([1.0])))
    assert diagnose(run)[0].name == diagnose(empty)[0].name == "too early"


def test_line_fit_is_least_squares_with_its_textbook_error():
    rng, x = np.random.default_rng(0), np.arange(20.0)
    changes = np.array([line_fit(x, 3 - 0.1 * x + rng.normal(0, 0.5, 20))[:2] for _ in range(2000)])
    assert changes[:, 0].mean() == pytest.approx(-1.9, abs=0.03)
    assert changes[:, 0].std() == pytest.approx(np.sqrt(np.mean(changes[:, 1] ** 2)), rel=0.05)


def test_critical_values_are_those_of_students_tables():
    for df, z, t in ((8, 2.5758, 3.355), (20, 2.5758, 2.845), (10, 1.96, 2.228), (5, 1.96, 2.571)):
        assert critical(df, z) == pytest.approx(t, rel=0.02)
