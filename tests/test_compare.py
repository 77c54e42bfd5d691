"""onecard/compare.py: runs are compared at equal steps and tokens, with the error that is known."""

import math
import re

import numpy as np
from made_runs import write_run

from onecard.compare import compare
from report import read_run


def compared(*folders):
    return list(compare([read_run(folder) for folder in folders]))


def test_two_runs_are_compared_by_pairs_of_windows_and_a_difference_within_its_error_may_be_chance(tmp_path):
    a = write_run(tmp_path / "a", 0, 0.01)
    b = write_run(tmp_path / "bb", -0.012, 0.01, n_head=6, beta2=0.5, out_dir="x")
    found, (first, second) = compared(a, b), (read_run(run).groups[-1] for run in (a, b))
    each = np.subtract(second, first)
    (_, verdict), keys = found[0], dict(found)["keys of b"]
    error = each.std(ddof=1) / 8
    assert f"At step 4,000, 1.97B tokens each, b is lower by {-each.mean():.4f} +- {error:.4f}" in verdict
    assert keys == "n_head 12 -> 6, beta2 0.95 -> 0.5."
    assert error < 0.003 < np.std(first) / 8  # pairs see what two errors would hide
    c, d = write_run(tmp_path / "c", 0.0, 0.02), write_run(tmp_path / "dd", 0.0, 0.02)
    assert "may be chance" in compared(c, d)[0][1]
    other = write_run(tmp_path / "e", -0.1, fingerprint="another val set")
    assert "error unknown: not evaluated on the same windows" in compared(a, other)[0][1]


def test_a_run_that_is_not_as_far_is_compared_at_the_last_step_of_both_and_its_learning_rate_is_named(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", -0.01, last=1500)
    (_, verdict), *_ = compared(a, b)
    assert verdict.startswith("At step 1,500, ") and "b is lower by 0.0100 +- 0.0000" in verdict
    assert "learning rate" not in verdict  # both have the same schedule
    short = write_run(tmp_path / "s", max_iters=2000, lr_decay_iters=2000)
    found = compared(a, short)
    rate = read_run(a).rates[2000] / max(read_run(a).rates)
    assert f"The learning rate of a is {rate:.2f} of its peak there, that of b 0.10" in found[0][1]
    (ends,) = (text for name, text in found if text.startswith("At their ends"))
    last = [read_run(folder).evals["val"][-1] for folder in (a, short)]
    assert f"a is lower by {last[1] - last[0]:.4f}, with 2.00 of the tokens of b (step 4,000, b: step 2,000)" in ends


def test_runs_with_other_numbers_of_tokens_in_a_step_are_compared_at_equal_tokens_too(tmp_path):
    a = write_run(tmp_path / "a", gradient_accumulation_steps=40)
    b = write_run(tmp_path / "b", -0.02, gradient_accumulation_steps=80)
    at_steps, at_tokens = (text for name, text in compared(a, b) if re.match("At [s0-9]", text))
    assert at_steps.startswith("At step 4,000, b is lower by 0.0200 +- 0.0000")
    assert at_tokens.startswith("At 1.97B tokens (a: step 4,000, b: step 2,000), b is higher by ")
    losses = read_run(a).evals["val"], read_run(b).evals["val"]
    assert f"{losses[1][20] - losses[0][40]:.4f} " in at_tokens


def test_the_tokens_saved_are_counted_to_where_the_better_run_has_the_last_loss_of_the_other(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", -0.05)
    losses = read_run(a).evals["val"], read_run(b).evals["val"]
    first = int(np.argmax(losses[1] <= losses[0][-1]))
    (text,) = (text for _, text in compared(a, b) if "fewer tokens" in text)
    assert f"({losses[0][-1]:.4f}) by step {100 * first:,}, with {1 - first / 40:.0%} fewer tokens" in text


def test_an_evaluation_that_only_one_run_has_is_compared_with_the_others_value_between_two_of_its_own(tmp_path):
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    a.write_text("step,val_loss\n0,9\n300,4.5\n")
    b.write_text("step,val_loss\n0,9\n200,5\n400,3\n")
    (_, verdict), *_ = compared(a, b)
    assert verdict.startswith("At step 300, b is lower by 0.5000 (error unknown: not evaluated on the same windows)")
    assert "Learning rates are not known" in verdict
    assert compared(a, a)[0][1].startswith("At step 300, b is equal ")


def test_two_tokenizers_are_compared_in_bits_per_byte_or_not_at_all(tmp_path):
    mine, theirs = (dict(tokenizer=dict(kind="bpe", sha256=sha)) for sha in ("1", "2"))
    a = write_run(tmp_path / "a", about=mine)
    b = write_run(tmp_path / "b", -1.0, about=theirs, bytes_per_token=2.0)
    bits = [read_run(folder).evals["bits_per_byte"][-1] for folder in (a, b)]
    assert f"b is higher by {bits[1] - bits[0]:.4f} bits per byte" in compared(a, b)[0][1]
    loss = read_run(b).evals["val"][-1]
    words = f"val loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {bits[1]:.4f} bits per byte at step 4,000 of 4,000."
    assert dict(compared(a, b))["b"].endswith(words)
    path = b / "metrics.jsonl"
    path.write_text(path.read_text().replace("bits_per_byte", "unknown"))
    assert "b and a cannot be compared: not both have bits per byte" in compared(a, b)[0][1]


def test_the_best_of_three_runs_is_named_at_the_last_step_of_all(tmp_path):
    runs = (("a", 0, None), ("b", -0.2, 3000), ("c", -0.1, None))
    folders = [write_run(tmp_path / name, difference, last=last) for name, difference, last in runs]
    losses = [read_run(folder).evals["val"][30] for folder in folders]
    order = f"b is lowest with {losses[1]:.4f} (c {losses[2]:.4f}, a {losses[0]:.4f})."
    assert compared(*folders)[0] == ("verdict", f"At step 3,000, the last that all have reached, {order}")


def test_a_run_without_a_val_loss_and_a_diverged_one_are_shown_in_words(tmp_path):
    a = write_run(tmp_path / "a")
    (tmp_path / "t.csv").write_text("step,loss\n0,9\n10,8\n")
    found = dict(compared(a, tmp_path / "t.csv"))
    assert "cannot be compared: not both have a val loss" in found["verdict"]
    assert found["b"].endswith("step 10, no evaluation.")
    (tmp_path / "n.csv").write_text("step,val_loss\n0,9\n10,8\n20,nan\n")
    found = dict(compared(a, tmp_path / "n.csv"))
    assert found["b"].endswith("val loss not finite at step 20.")
    assert "At step 10, " in found["verdict"] and "not finite" in found["verdict"]
