"""bench/scaling.py: its arithmetic, on made-up losses whose law and multiplier are known."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def scaling(monkeypatch):
    """bench/scaling.py as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("scaling")
    for name in ("scaling", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def options(scaling):
    return Namespace(dataset="made", dtype="float32", times=1, **scaling.PRESETS["cpu"])


def loss_of(n, d):
    return 1.1 + 9.0 / n**0.3 + 20.0 / d**0.35


@pytest.fixture
def losses(scaling, options):
    """Of the whole study, as if a token of the new recipe were worth five, with seeds that differ by 0.01."""
    known = {}
    for keys in scaling.all_runs(options):
        size = f"{keys['n_layer']}x{keys['n_embd']}"
        tokens = keys["max_iters"] * keys["batch_size"] * keys["gradient_accumulation_steps"] * options.block_size
        worth = 1 if keys["arch"] == "gpt2" else 5
        loss = loss_of(scaling.parameters(options, size), worth * tokens) + 0.01 * (keys["seed"] - 1)
        known[scaling.name_of(keys)] = dict(keys=keys, val_loss=loss, ms_per_step=40 * worth)
    return scaling.Losses(options, known)


def test_no_run_reads_a_token_twice_and_none_is_done_twice(scaling, options):
    runs = {scaling.name_of(keys): keys for keys in scaling.all_runs(options)}
    assert max(keys["max_iters"] for keys in runs.values()) * 2048 < 84e6  # bytes of ../shared/corpus
    largest = [keys for keys in runs.values() if keys["n_layer"] == 4 and keys["n_embd"] == 96]
    assert len(largest) == 9  # one seed, one more rate, and the new recipe on 40 tokens a parameter
    sizes = [scaling.parameters(options, size) for size in options.sizes.split(",")]
    assert sizes == sorted(sizes)


def test_a_known_multiplier_is_found_at_every_size_and_does_not_change_with_it(scaling, options, losses, capsys):
    found = scaling.print_multipliers(options, losses)
    values = [value for by_size in found.values() for value, _ in by_size.values()]
    assert len(values) > 8 and values == pytest.approx([5.0] * len(values), rel=0.05)
    scaling.print_trend(options, found)
    trend = capsys.readouterr().out.splitlines()[-1].split("|")
    assert abs(float(trend[3].split()[0])) < 0.1 and float(trend[4].split()[0]) == pytest.approx(5, rel=0.2)


@pytest.mark.parametrize("sizes", ["2x48", "2x48,2x64"])
def test_a_part_of_the_sizes_is_a_study_too(scaling, options, sizes, capsys):
    options.sizes = sizes
    known = {scaling.name_of(keys): dict(keys=keys, val_loss=2.0, ms_per_step=40) for keys in scaling.all_runs(options)}
    losses = scaling.Losses(options, known)
    scaling.print_rates(options, known)
    scaling.print_changes(options, known)
    assert capsys.readouterr().out.count("(3)") >= 9  # rates with all seeds
    scaling.print_fits(options, losses)
    scaling.print_trend(options, scaling.print_multipliers(options, losses))


def test_the_gain_of_a_change_is_over_the_run_with_the_same_seed(scaling, options, capsys):
    known = {}
    for seed, before, after in ((0, 2.0, 1.9), (1, 3.0, 2.8)):
        base = scaling.keys_of(options, "2x64", "before", 20, seed=seed)
        for keys, loss in ((base, before), (base | dict(candidate="warmer", max_iters=7), after)):
            known[scaling.name_of(keys)] = dict(keys=keys, val_loss=loss)
    scaling.print_changes(options, known)
    assert "| warmer |  | +0.1500 +- 0.0500 (2) |" in capsys.readouterr().out


def test_a_loss_beyond_the_longest_run_has_no_multiplier(scaling):
    curve = [(10, 3.0), (20, 2.5), (40, 2.0)]
    assert scaling.crossing(curve, 2.5) == 20 and scaling.crossing(curve, 2.75) == pytest.approx(200**0.5)
    assert scaling.crossing(curve, 3.5) == 10 and scaling.crossing(curve, 1.9) is None


def test_the_fit_of_the_smaller_sizes_predicts_the_largest(scaling, options, losses):
    *smaller, largest = options.sizes.split(",")
    n = scaling.parameters(options, largest)
    for recipe, worth in (("old", 1), ("new", 5)):
        fitted = scaling.fit(scaling.points_of(options, losses, recipe, smaller))
        for tokens in scaling.TOKENS[recipe]:
            assert scaling.law(fitted, n, tokens * n) == pytest.approx(loss_of(n, worth * tokens * n), abs=0.02)
