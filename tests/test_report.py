"""report.py: what it reads, how it compares two runs, the page."""

import json
import math
import re
import runpy
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from curves import anchor_rows, config, learning_rates, write_founding_run

import report
from configurator import ConfigError
from onecard.diagnosis import diagnose
from onecard.forecast import annealing, follow
from train import TrainConfig, learning_rate

ROOT = Path(__file__).parent.parent


@pytest.fixture
def own_run(tmp_path):
    """-> function(name, difference, **keys): a folder with metrics as train.py writes them."""

    def write(name, difference=0.0, noise=0.0, fingerprint="f", **keys):
        schedule = dict(max_iters=4000, lr_decay_iters=4000, warmup_iters=100, eval_interval=100, eval_iters=0)
        c = config(**(schedule | keys))
        truth, rng = obeys_the_law(learning_rates(c)) + difference, np.random.default_rng(len(name))
        each = np.linspace(-0.4, 0.4, 64)  # windows differ, in all runs alike
        data = dict(train_tokens=10**9, val_tokens=10**6, val_fingerprint=fingerprint)
        records = [dict(kind="start", step=0, config=asdict(c), device="cpu", dtype="bfloat16", data=data)]
        line = dict(kind="train", grad_norm=0.5, lr=1e-3, skipped=0, ms_per_step=50.0, tokens_per_s=1e4)
        for step in range(0, c.max_iters + 1, 100):
            groups = truth[step] + each + rng.normal(0, noise, 64)
            loss = dict(train_loss=truth[step] - 0.01, val_loss=groups.mean(), val_groups=groups.tolist())
            loss |= dict(eval_seconds=1.0, bits_per_byte=groups.mean() / math.log(2) / 4)
            records += [dict(line, step=step, loss=truth[step])] * (step > 0) + [dict(loss, kind="eval", step=step)]
        records.append(dict(kind="samples", step=c.max_iters, texts=["<b>Once</b> upon"]))
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / name

    return write


def compared(a, b):
    return "\n".join(report.compare(report.read_run(a), report.read_run(b)))


def obeys_the_law(rates, scale_of=None):
    """The losses of a run with these rates by a law, whose scale is that of another run where one is given."""
    scale = [s[-1] for s in annealing(scale_of or rates)]
    return follow(dict(a=0.5, b=(3.1, 0.2, 0.1), scale=scale), rates)


# ---- reading


def test_log_and_csv_of_one_run_are_one_run(tmp_path):
    log, keys = write_founding_run(tmp_path)
    rows = [row for row in anchor_rows("40m") if int(row["step"]) <= 14500]
    csv = tmp_path / "run.csv"
    csv.write_text(",".join(rows[0]) + "\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    a, b = report.read_run(log, keys), report.read_run(csv, keys)
    assert diagnose(a) == diagnose(b)
    assert len(a.evals["step"]) == 30 and a.micro and b.micro


def test_a_csv_of_wandb_is_read(tmp_path):
    path = tmp_path / "wandb.csv"
    names = ["Step", "gpt2 - train/loss", "gpt2 - train/loss__MIN", "gpt2 - val/loss", "gpt2 - lr"]
    rows = [[100 * i, 4 - i / 100, 4 - i / 100, 4.1 - i / 100, 1e-3] for i in range(20)]
    path.write_text("\n".join(",".join(f'"{cell}"' for cell in row) for row in [names, *rows]))
    run = report.read_run(path)
    assert run.evals["val"].tolist() == [4.1 - i / 100 for i in range(20)] and run.step == 1900


def test_a_log_that_was_gone_on_with_counts_the_later_lines(tmp_path):
    lines = [f"step {s}: train loss {5 - s / 1000:.4f}, val loss 5.0000" for s in (0, 100, 200, 300)]
    (tmp_path / "x.log").write_text("\n".join([*lines, "step 200: train loss 1.0000, val loss 2.0000"]))
    run = report.read_run(tmp_path / "x.log")
    assert run.evals["step"].tolist() == [0, 100, 200, 300] and run.evals["val"][2] == 2.0


def test_a_line_of_metrics_that_is_being_written_is_left_out_and_a_damaged_one_is_named(own_run):
    path = own_run("a") / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "eval", "st')
    assert len(report.read_run(path).evals["step"]) == 41
    path.write_text('{"kind": "eval", "st\n' + whole)
    with pytest.raises(report.ReportError, match=r"metrics.jsonl:1: .*damaged"):
        report.read_run(path)


def test_the_config_of_another_version_or_program_is_read_with_the_defaults_it_had(own_run, tmp_path):
    path = own_run("a") / "metrics.jsonl"
    first, rest = path.read_text().split("\n", 1)
    record = json.loads(first)
    del record["config"]["eval_iters"], record["config"]["gelu"]
    record["config"]["a_key_of_later"] = 1
    path.write_text(f"{json.dumps(record)}\n{rest}")
    assert report.read_run(path).config.gelu == TrainConfig().gelu and report.read_run(path).config.eval_iters == 0
    (tmp_path / "nano.py").write_text("n_layer = 6\nlearning_rate = 1e-4 * n_layer\nbackend_of_theirs = 'x'\n")
    (tmp_path / "x.log").write_text("step 0: train loss 5.0, val loss 5.0")
    c = report.read_run(tmp_path / "x.log", tmp_path / "nano.py").config
    assert (c.n_layer, c.eval_iters, c.lr_decay_iters) == (6, 200, 600_000) and c.learning_rate == pytest.approx(6e-4)


def test_the_learning_rates_before_a_resume_are_those_of_then():
    before, after = config(max_iters=1000), config(max_iters=1000, learning_rate=5e-3)
    rates = report.learning_rates([(0, before), (500, after)])
    assert len(rates) == 1000
    assert rates[499] == learning_rate(499, before) and rates[500] == learning_rate(500, after)


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    texts = {"notes.txt": "nothing\n", "x.csv": "a,b\n1,2\n", "y.csv": "step,train_loss,val_loss\n1,2,x\n"}
    texts |= {"bad.py": "import os\n", "x.log": "step 0: train loss 5.0, val loss 5.0"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    named = {"notes.txt": "nanoGPT's printed log", "x.csv": "a CSV with", "y.csv": "y.csv:2", "none": "none"}
    for name, why in named.items():
        with pytest.raises(report.ReportError, match=why):
            report.read_run(tmp_path / name)
    with pytest.raises(ConfigError, match=r"bad.py:1: import os: .*not executed"):
        report.read_run(tmp_path / "x.log", tmp_path / "bad.py")
    with pytest.raises(ConfigError, match="one run"):
        report.main([])


# ---- comparing


def test_two_runs_are_compared_by_pairs_of_windows_and_a_difference_within_its_error_may_be_chance(own_run):
    a, b = own_run("a", 0, 0.01), own_run("bb", -0.012, 0.01, n_head=6)
    said, (first, second) = compared(a, b), (report.read_run(run).groups[-1] for run in (a, b))
    each = np.subtract(second, first)
    assert f"b is lower by {-each.mean():.4f} +- {each.std(ddof=1) / 8:.4f} (64 pairs" in said
    assert "n_head 12 -> 6" in said and "learning_rate" not in said
    assert each.std(ddof=1) / 8 < 0.003 < np.std(first) / 8  # pairs see what two errors would hide
    said = compared(own_run("c", 0.0, 0.02), own_run("dd", 0.0, 0.02))
    assert ("may be chance" in said) == ("fewer tokens" not in said)


def test_tokens_saved_are_those_by_which_a_longer_run_of_the_law_is_better(own_run):
    a, longer = own_run("a"), learning_rates(config(max_iters=5000, lr_decay_iters=5000, warmup_iters=125))
    rates = report.read_run(a).rates
    gain = obeys_the_law(longer, scale_of=rates)[-1] - obeys_the_law(rates)[-1]
    fewer = re.search(r"needs (\d+)% fewer tokens for that loss", compared(a, own_run("b", gain)))
    assert int(fewer[1]) == pytest.approx(20, abs=3)
    twice = own_run("bb", gain, gradient_accumulation_steps=80)  # the same loss with twice the tokens a step
    more = re.search(r"needs (\d+)% more tokens for that loss", compared(a, twice))
    assert int(more[1]) == pytest.approx(60, abs=6)


def test_runs_on_other_val_sets_are_not_compared_by_pairs(own_run):
    a, b = (own_run(name, fingerprint=name) for name in ("a", "b"))
    loss = report.read_run(b).evals["val"][-1]
    bits = loss / math.log(2)
    words = f"val loss {loss:.4f}, perplexity {2**bits:.2f}, {bits / 4:.4f} bits per byte"
    assert "not evaluated on the same windows" in compared(a, b) and words in compared(a, b)


# ---- the page


def test_the_page_is_one_file_whose_plots_follow_its_colours(own_run):
    pytest.importorskip("matplotlib")
    folder = own_run("a")
    report.main([str(folder), "--until=3000"])
    page = (folder / "report.html").read_text()
    addresses = set(re.findall(r"https?://[^\"' )<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched
    assert "src=" not in page and "<link" not in page and "prefers-color-scheme: dark" in page
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 4 and "<dt>forecast" in page and "<td>epochs" in page
    for plot in plots:
        ElementTree.fromstring(plot)
        fixed = set(re.findall(r"(?:fill|stroke): (?!none|var)([^;\"]+)", plot))
        assert not fixed, f"a colour that does not follow the page's: {fixed}"
    report.main([str(folder)])
    assert "&lt;b&gt;Once&lt;/b&gt; upon" in (folder / "report.html").read_text()


def test_without_matplotlib_the_words_still_come(own_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = own_run("a")
    report.main([str(folder)])
    said = capsys.readouterr().out
    assert "finished" in said and "matplotlib is not installed (pip install" in said
    assert not (folder / "report.html").exists()


def test_a_page_that_cannot_be_written_and_a_run_that_is_not_there_end_with_2(own_run, tmp_path, monkeypatch, capsys):
    page = tmp_path / "no" / "page.html"
    with pytest.raises(report.ReportError, match=r"page.html: cannot be written .*--out"):
        report.main([str(own_run("a")), f"--out={page}"])
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "report.py"), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("report.py: ")


def test_standard_error_and_epochs_stand_beside_the_plan(own_run):
    rows = {name: (planned, came) for name, planned, came in report.plan_beside(report.read_run(own_run("a")))}
    groups = report.read_run(own_run("b")).groups[-1]
    assert rows["standard error of val"][1] == f"{np.std(groups, ddof=1) / math.sqrt(64):.4f}"
    assert rows["epochs"] == ("1.97", "1.97") and rows["val loss"][0].startswith("3.")
