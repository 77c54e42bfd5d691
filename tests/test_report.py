"""report.py: what a run is made of, what is printed, when it ends, what is refused."""

import json
import math
import sys

import numpy as np
import pytest
from curves import anchor_rows, config, write_founding_run
from made_runs import write_run

import report
from configurator import ConfigError, run_script
from onecard import UserError
from onecard.diagnosis import diagnose
from train import TrainConfig, learning_rate

# ---- from records to runs


def test_log_and_csv_of_one_run_are_one_run(tmp_path):
    log, keys = write_founding_run(tmp_path)
    rows = [row for row in anchor_rows("40m") if int(row["step"]) <= 14500]
    csv = tmp_path / "run.csv"
    csv.write_text(",".join(rows[0]) + "\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    a, b = report.read_run(log, keys), report.read_run(csv, keys)
    assert diagnose(a) == diagnose(b)
    assert len(a.evals["step"]) == 30 and a.micro and b.micro


def test_what_is_not_logged_is_nan_and_what_is_not_finite_or_far_too_large_is_inf(tmp_path):
    rows = "0,5,5,1\n10,,4,1\n20,nan,-inf,1\n30,3,,1\n40,2,1e300,1\n"
    (tmp_path / "x.csv").write_text(f"step,train_loss,val_loss,lr\n{rows}")
    run = report.read_run(tmp_path / "x.csv")
    assert run.evals["step"].tolist() == [0, 10, 20, 40]
    assert run.evals["val"].tolist() == [5, 4, math.inf, math.inf] and run.evals["train"][2] == math.inf
    assert math.isnan(run.evals["train"][1]) and np.isnan(run.evals["bits_per_byte"]).all()


def change_config(folder, **keys):
    """Changes the config in the start record of a run; None takes a key away."""
    path = folder / "metrics.jsonl"
    first, rest = path.read_text().split("\n", 1)
    record = json.loads(first)
    changed = record["config"] | keys
    record["config"] = {name: value for name, value in changed.items() if value is not None}
    path.write_text(f"{json.dumps(record)}\n{rest}")
    return folder


def test_the_config_of_another_version_or_program_is_read_with_the_defaults_it_had(tmp_path):
    folder = change_config(write_run(tmp_path / "a"), eval_iters=None, gelu=None, a_key_of_later=1)
    c = report.read_run(folder).config
    assert c.gelu == TrainConfig().gelu and c.eval_iters == 0
    (tmp_path / "nano.py").write_text("n_layer = 6\nlearning_rate = 1e-4 * n_layer\nbackend_of_theirs = 'x'\n")
    (tmp_path / "x.log").write_text("step 0: train loss 5.0, val loss 5.0")
    c = report.read_run(tmp_path / "x.log", tmp_path / "nano.py").config
    assert (c.n_layer, c.eval_iters, c.lr_decay_iters) == (6, 200, 600_000) and c.learning_rate == pytest.approx(6e-4)


def test_the_learning_rates_before_a_resume_are_those_of_then():
    before, after = config(max_iters=1000), config(max_iters=1000, learning_rate=5e-3)
    rates = report.learning_rates([(0, before), (500, after)])
    assert rates == [learning_rate(step, before if step < 500 else after) for step in range(1000)]


@pytest.mark.parametrize(("key", "value"), [("max_iters", 10**12), ("n_head", 0), ("learning_rate", "fast")])
def test_a_saved_config_that_cannot_be_used_is_named(tmp_path, key, value):
    with pytest.raises(UserError, match=rf"\A.*{key}.*\Z"):
        report.read_run(change_config(write_run(tmp_path / "a"), **{key: value}))


# ---- what is printed


def test_the_verdict_comes_first_and_damaged_lines_are_reported(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    path = folder / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())
    report.main([str(folder), "--page=False"])
    heading, verdict, *rest = capsys.readouterr().out.splitlines()
    assert heading.startswith(f"{folder}: val loss 3.") and heading.endswith(" bits per byte at step 4,000 of 4,000")
    assert verdict.startswith("  verdict  ")
    assert rest[-1] == "  damaged lines       1 could not be read and are left out (line 1)."


def test_train_loss_alone_or_an_evaluation_without_a_step_gives_sentences_and_a_page(tmp_path, capsys):
    rows = "".join(f"{s},{3 + 20 / (s + 10):.4f}\n" for s in range(0, 2000, 10))
    (tmp_path / "t.csv").write_text(f"step,loss\n{rows}")
    (tmp_path / "z.log").write_text("Overriding: max_iters = 0\nstep 0: train loss 5.0, val loss 5.0\n")
    for name, words in (("t.csv", "train loss"), ("z.log", "Finished at step 0; val loss 5.0")):
        report.main([str(tmp_path / name), f"--out={tmp_path / name}.html"])
        said = capsys.readouterr().out
        assert words in said and "plots: " in said and (tmp_path / f"{name}.html").exists()


def test_several_runs_are_compared_and_a_csv_may_hold_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.csv").write_text("Step,one - val/loss,two - val/loss\n0,9,9\n10,5,4\n")
    a = write_run(tmp_path / "a")
    report.main([str(a), "w.csv"])
    said = capsys.readouterr().out
    assert "3 runs compared" in said and "two: val loss 4.0000" in said
    assert "c is lowest" in said and "plots: report.html" in said
    with pytest.raises(report.ReportError, match=r"13 runs in .*at most 12"):
        report.main([str(a)] * 13)


def test_standard_error_and_epochs_stand_beside_the_plan(tmp_path):
    run = report.read_run(write_run(tmp_path / "a"))
    rows = {name: (planned, actual) for name, planned, actual in report.plan_beside(run)}
    assert rows["standard error of val"][1] == f"{np.std(run.groups[-1], ddof=1) / math.sqrt(64):.4f}"
    assert rows["epochs"] == ("1.97", "1.97") and rows["val loss"][0].startswith("3.")


# ---- when it ends


def test_a_run_goes_on_after_its_learning_rate_has_ended(tmp_path, monkeypatch):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        report.main([str(write_run(tmp_path / "a", lr_decay_iters=2000, last=3000)), "--watch=7", "--page=False"])
    report.main([str(write_run(tmp_path / "b", lr_decay_iters=2000)), "--watch=7", "--page=False"])
    assert slept == [7, 7]


# ---- what is refused


def test_what_cannot_be_used_or_written_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("import os\n")
    (tmp_path / "x.log").write_text("step 500: train loss 5.0, val loss 5.0")
    with pytest.raises(ConfigError, match=r"bad.py:1: import os: .*not executed"):
        report.read_run(tmp_path / "x.log", tmp_path / "bad.py")
    with pytest.raises(report.ReportError, match="up to --until=3"):
        report.read_run(tmp_path / "x.log", until=3)
    with pytest.raises(ConfigError, match="one run"):
        report.main([])
    with pytest.raises(report.ReportError, match=r"page.html: cannot be written .*--out"):
        report.main([str(tmp_path / "x.log"), f"--out={tmp_path / 'no' / 'page.html'}"])


def test_what_is_no_run_ends_with_2_and_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        run_script(report.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("report.py: ")
