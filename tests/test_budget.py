"""budget.py: what it offers fits the card's time and memory, and the config that it writes is the row it marks."""

import re
from dataclasses import replace

import pytest
import torch

from configurator import load_config
from onecard import budget, plan
from onecard.cards import card
from onecard.memory import BUDGET, GiB, trace_memory
from train import TrainConfig, main

CARD, FREE = card("RTX 4070"), 1.0 * GiB
FITS = {"weights": 1, "activations and gradients": 1}  # bytes
SMALL = ((2, 256), (2, 512), (4, 1024))


@pytest.fixture
def rows(monkeypatch):
    """A function: config keys -> the rows for an hour on an RTX 4070 with little free memory, from small shapes."""
    monkeypatch.setattr(budget, "SHAPES", SMALL)

    def choose(train_tokens=None, **keys):
        config = TrainConfig(**dict(block_size=256, vocab_size=4096) | keys)
        return budget.choices(config, 1.0, CARD, FREE, torch.bfloat16, train_tokens)

    return choose


@pytest.mark.parametrize(
    "keys, count",  # AdamW's state of the largest network is too large, Muon's is not
    [(dict(), 2), (dict(arch="qwen3", optimizer="muon", lr_schedule="linear"), 3)],
)
def test_every_row_fits_the_time_and_the_memory_and_the_marked_one_has_the_lowest_loss(rows, keys, count):
    found = rows(**keys)
    for row in found:
        planned = plan.plan(row.config, [1.0, 0.1], device="RTX 4070", eval_tokens=row.config.eval_tokens, trace=False)
        assert planned["hours"] == pytest.approx(1.0, rel=0.05) and row.hours <= 1.0
        assert sum(trace_memory(row.config, "cuda", torch.bfloat16).values()) == row.memory <= BUDGET * FREE
        assert row.tokens == row.config.step_tokens * row.config.max_iters
    assert len(found) == count
    assert min(found, key=lambda row: row.rank) == found[budget.best(found)]
    assert budget.table(found, 1)[2].startswith("*")


def test_of_many_networks_only_those_with_the_lowest_losses_are_traced_and_shown(rows, monkeypatch):
    monkeypatch.setattr(budget, "SHOWN", 2)
    monkeypatch.setattr(budget, "trace_memory", lambda config, *_: traced.append(config.n_embd) or FITS)
    traced = []
    found = rows(block_size=96)  # no power of two: a step is whole sequences
    assert [row.config.n_embd for row in found] == [512, 1024] and sorted(set(traced)) == [512, 1024]
    assert all(row.config.problems() == [] for row in found)


def test_a_small_dataset_is_read_four_times_at_most(rows, monkeypatch):
    monkeypatch.setattr(budget, "trace_memory", lambda *_: FITS)
    assert [row.tokens for row in rows(train_tokens=10**8)] == pytest.approx([4 * 10**8] * 3, rel=0.01)


def test_the_written_config_is_the_row_and_is_never_overwritten(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "trace_memory", lambda *_: FITS)
    row, path = rows(activation_checkpointing=True, bias=True)[0], tmp_path / "mine.py"
    budget.write_config(str(path), row, CARD.name)
    loaded = load_config(TrainConfig, [str(path)])
    assert replace(loaded, out_dir="") == replace(row.config, vocab_size=0, out_dir="", gradient_accumulation_steps=40)
    keys = dict(plan_only=True, budget_hours=1.0)
    for file, reason in ((path, "exists already"), (tmp_path / "mine", "ends in .py"), (path / "x.py", "ends in .py")):
        (problem,) = TrainConfig(**keys, write_config=str(file)).problems()
        assert f"write_config={file}: " in problem and reason in problem


def test_with_gpt2s_recipe_the_keys_of_the_newer_one_are_named_and_give_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "trace_memory", lambda *_: FITS)
    keys = ["--plan_only=True", "--gpu=RTX 4070", "--budget_hours=10", f"--data_dir={tmp_path}"]
    main(keys)
    printed = re.search(r"should reach val loss (.*) in the same hours: add (.*)", capsys.readouterr().out)
    main(keys + printed[2].split())
    chosen = re.search(r"^\*.*", capsys.readouterr().out, re.M)[0]
    assert chosen.endswith(printed[1]) and 3.2 < float(printed[1].split()[0]) < 3.4  # public runs: 3.28 in 1.7B tokens


def test_a_budget_that_cannot_be_planned_is_refused_with_the_reason(rows, tmp_path, capsys):
    with pytest.raises(budget.BudgetError, match="no network of the table fits"):
        budget.choices(TrainConfig(), 0.001, CARD, FREE, torch.bfloat16)
    with pytest.raises(budget.BudgetError, match="the speed of cpu is not known"):
        main(["--plan_only=True", "--device=cpu", "--budget_hours=1", f"--data_dir={tmp_path}"])
