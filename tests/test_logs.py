"""onecard/logs.py: what is read of metrics.jsonl, nanoGPT's printed log and CSVs, and what is refused, in one line."""

import json
import math

import pytest

from onecard.logs import LogError, read_records

DEFAULTS = dict(batch_size=12, block_size=1024, gradient_accumulation_steps=40, learning_rate=6e-4, min_lr=6e-5)
DEFAULTS |= dict(max_iters=600_000, lr_decay_iters=600_000, vocab_size=50304, dataset="openwebtext", n_layer=12)


@pytest.fixture
def read(tmp_path):
    """-> function(name, text) -> what read_records makes of a file with this text."""

    def write_and_read(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_records(tmp_path / name, DEFAULTS)

    return write_and_read


def evals(records):
    return [(r["step"], r.get("train_loss"), r["val_loss"]) for r in records if r["kind"] == "eval"]


def lines(records):
    return [(r["step"], r["loss"]) for r in records if r["kind"] in ("train", "micro")]


# ---- metrics.jsonl


def test_damaged_lines_are_counted_and_the_good_ones_stay_and_a_line_being_written_is_no_damage(read):
    bad = """{"kind": "eval", "st
[1, 2]
7
null
{]
{"kind": "eval"}
{"kind": "eval", "step": "x"}
{"kind": "train", "step": -5, "loss": 1.0}
{"kind": "train", "step": 1e30, "loss": 1.0}
{"kind": "train", "step": 1.5, "loss": 1.0}
{"kind": "eval", "step": 3, "val_loss": "low"}
{"kind": "eval", "step": 3, "val_loss": 4.0, "val_groups": [1e999, 3.0]}
{"kind": "start", "step": 0, "config": 3}
{"kind": "start", "step": 0, "config": {}, "data": "text"}
{"kind": "start", "step": 0, "config": {}, "data": {"train_tokens": "many"}}
{"kind": "start", "step": 0, "config": {}, "dtype": "torch"}
{"kind": "start", "step": 0, "config": {}, "planned_memory": [1]}
{"kind": "start", "step": 0, "config": {}, "planned_hours": "long"}
{"kind": "event", "step": 0, "event": "skipped", "scale": "x"}
{"kind": "samples", "step": 0, "texts": [null]}
{"kind": "event", "step": 0}"""
    bad = [*bad.split("\n"), "[" * 100_000, '{"kind": "train", "step": 4, "loss": 1' + "0" * 400 + "}"]
    good = [json.dumps(dict(kind="eval", step=step, val_loss=5.0)) for step in (0, 10, 20.0)]
    runs, damaged = read("metrics.jsonl", "\n".join([good[0], *bad, *good[1:], '{"kind": "ev']))
    assert [repr(record["step"]) for record in runs[""]] == ["0", "10", "20"]
    assert damaged == list(range(2, 2 + len(bad)))


# ---- nanoGPT's log

LOG = """Overriding config with config/mine.py:
# a comment
import time
out_dir = 'out-mine'
wandb_run_name = 'run' + str(time.time())
dataset = 'fineweb'
learning_rate = 1e-3 # peak
max_iters = 2000
lr_decay_iters = max_iters
min_lr = learning_rate / 10

Overriding: batch_size = 4
Overriding: dataset = other
tokens per iteration will be: 491,520
found vocab_size = 65 (inside data/other/meta.pkl)
number of parameters: 40.56M
step 0: train loss 10.9, val loss 11.0
iter 0: loss 10.9541, time 29485.98ms, mfu -100.00%
"""


def test_the_config_that_nanogpt_prints_is_read_from_its_log(read):
    start, first, micro = read("x.log", LOG)[0][""]
    c = start["config"]
    assert start["kind"] == "start" and start["step"] == 0
    assert (c["learning_rate"], c["max_iters"], c["lr_decay_iters"], c["min_lr"]) == (1e-3, 2000, 2000, 1e-4)
    assert (c["batch_size"], c["dataset"], c["vocab_size"], c["n_layer"]) == (4, "other", 65, 12)
    assert c["batch_size"] * c["block_size"] * c["gradient_accumulation_steps"] == 491_520  # with all its processes
    assert first["val_loss"] == 11.0 and micro["loss"] == 10.9541 and micro["ms_per_step"] == 29485.98


def test_a_log_that_was_resumed_counts_from_there_on_with_its_new_config(read):
    steps = "".join(f"step {s}: train loss 3.0, val loss {9 - s / 1000}\n" for s in (500, 1000, 1500))
    again = LOG[: LOG.index("step 0")].replace("max_iters = 2000", "max_iters = 4000")
    records = read("x.log", LOG + steps + again + "step 1000: train loss 2.0, val loss 2.5\n")[0][""]
    assert [(r["step"], r["config"]["max_iters"]) for r in records if r["kind"] == "start"] == [(0, 2000), (1000, 4000)]
    assert evals(records) == [(0, 10.9, 11.0), (500, 3.0, 8.5), (1000, 2.0, 2.5)]


def test_a_log_without_a_config_a_prefix_a_nan_and_another_encoding_are_read(read):
    text = "[rank0]: step 5: train loss nan, val loss inf\n[rank0]: iter 5: loss nan, time 1.00ms\n"
    for data in (text.encode(), text.encode("utf-16"), b"\xff progress \r" + text.encode()):
        first, micro = read("x.log", data)[0][""]
        assert math.isnan(first["train_loss"]) and first["val_loss"] == math.inf and math.isnan(micro["loss"])


@pytest.mark.parametrize(
    "head",
    [
        "tokens per iteration will be: " + "9" * 5000,
        "found vocab_size = " + "9" * 5000,
        "Overriding: batch_size = None\ntokens per iteration will be: 491,520",
        "Overriding: batch_size = 0\ntokens per iteration will be: 491,520",
        "Overriding: n_layer = " + "-" * 100_000 + "1",
        "iter " + "9" * 5000 + ": loss 3.0, time 1.00ms",
    ],
)
def test_what_cannot_be_understood_before_the_steps_does_not_hide_them(read, head):
    assert evals(read("x.log", f"{head}\nstep 5: train loss 3.0, val loss 4.0\n")[0][""]) == [(5, 3.0, 4.0)]


# ---- CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
def test_one_metric_is_enough_with_any_delimiter_comments_and_empty_cells(read, delimiter):
    val = "\n".join(delimiter.join(row) for row in (("Step", "val/loss"), ("0", "5.5"), ("10", "4.5"), ("20", "nan")))
    (_, _, (step, train, loss)) = evals(read("a.csv", f"# a comment\n\n{val}\n")[0][""])
    assert step == 20 and train is None and math.isnan(loss)
    train = f"\ufeffiter{delimiter}loss\n0{delimiter}5.5\n10{delimiter}-inf\n"
    records = read("b.csv", train)[0][""]
    assert not evals(records) and lines(records) == [(0, 5.5), (10, -math.inf)]


def test_a_decimal_comma_is_read_where_semicolons_part_the_cells(read):
    assert evals(read("a.csv", "step;train_loss;val_loss\n100;3,5;3,25\n")[0][""]) == [(100, 3.5, 3.25)]


def test_columns_of_wandb_and_a_column_of_names_are_runs_to_compare(read):
    names = ["Step", "big - val/loss", "big - val/loss__MIN", "small - run - val/loss", "small - run - train/loss"]
    rows = [[0, 5, 5, 6, 6.5], [10, 4, 4, "", ""], [20, "", "", 5, 5.5]]
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in [names, *rows])
    runs, damaged = read("wandb.csv", text)
    assert {name: evals(records) for name, records in runs.items()} == {
        "big": [(0, None, 5), (10, None, 4)],
        "small - run": [(0, 6.5, 6), (20, 5.5, 5)],
    }
    runs, damaged = read("x.csv", "run,step,val_loss\na,0,5\nb,0,6\na,10,4\n")
    assert [evals(runs[name]) for name in "ab"] == [[(0, None, 5), (10, None, 4)], [(0, None, 6)]] and not damaged


def test_rows_without_a_val_loss_are_log_lines_and_nan_between_evaluations_is_no_value(read):
    rows = "".join(f"{s},{5 - s / 100},{4.0 if s % 10 == 0 else 'NaN'}\n" for s in range(35))
    records = read("x.csv", f"step,train_loss,val_loss\n{rows}")[0][""]
    assert [e[0] for e in evals(records)] == [0, 10, 20, 30] and len(lines(records)) == 35
    diverged = "".join(f"{s},{'nan' if s > 6 else 4.0}\n" for s in range(35))
    losses = [e[2] for e in evals(read("y.csv", f"step,val_loss\n{diverged}")[0][""])]
    assert len(losses) == 35 and math.isnan(losses[-1])


def test_a_bad_row_is_counted_and_a_row_without_an_evaluation_keeps_what_it_has(read):
    text = f"step,lr,val_loss\n0,1e-3,5\n1,x,5\n-4,1e-3,5\n2.5,1e-3,5\n3,1e-3,\n4,{'1' * 200_000},5\n,1e-3,\n"
    runs, damaged = read("x.csv", text)
    assert evals(runs[""]) == [(0, None, 5)] and damaged == [3, 4, 5, 7, 8]
    assert [r["lr"] for r in runs[""] if r["kind"] == "train"] == [1e-3, 1e-3]


# ---- what is no run


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("x.pt", b"PK\x03\x04\x00\x00", "binary file"),
        ("x.csv", b"", "no evaluation and no step"),
        ("x.csv", b"0,5.5\n1,5.4\n", "line 1: '0,5.5'"),
        ("x.csv", b"step,val_loss\n1,x\n", "line 2: '1,x'"),
        ("metrics.jsonl", b"[]\n7\n", "no evaluation and no step"),
        ("notes.txt", b"nothing\n", "nanoGPT's printed log"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(read, name, data, why):
    with pytest.raises(LogError, match=why) as error:
        read(name, data)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("name", [".", "none"])
def test_a_folder_without_metrics_and_a_missing_file_are_refused(tmp_path, name):
    with pytest.raises(LogError, match=r"cannot be read \(No such file"):
        read_records(tmp_path / name, DEFAULTS)
