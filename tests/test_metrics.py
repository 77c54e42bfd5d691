"""metrics.py: metrics.jsonl, the numbers in it, and what wandb gets, read back from the files of an offline run."""

import json
import math
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
from runs import read_metrics, write_characters, write_dataset

import train
from onecard import checkpoint, metrics
from onecard.metrics import MetricsError, MetricsWriter
from onecard.shards import Windows
from onecard.tokenizer import dataset_tokenizer, load_tokenizer

# ---- metrics.jsonl


def test_a_resumed_run_drops_the_lines_after_its_checkpoint_and_the_half_line_of_a_kill(tmp_path):
    writer = MetricsWriter(tmp_path)
    for kind, step in (("start", 0), ("eval", 0), ("train", 3), ("train", 4), ("eval", 4), ("train", 5)):
        writer.write(kind, step, loss=1.0)
    writer.close()
    path = tmp_path / metrics.NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "eva')
    for step, last_eval_step, left in ((5, 4, 6), (4, 4, 5), (4, 0, 4), (3, 0, 3), (-1, -1, 0)):  # (4, 0): by a signal
        MetricsWriter(tmp_path, step, last_eval_step).close()
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:left]), (step, last_eval_step)


def test_metrics_that_are_gone_at_a_resume_begin_again(flags, tmp_path):
    train.main(flags(max_iters=4))
    (tmp_path / "run/metrics.jsonl").unlink()
    train.main(flags())
    assert [line["step"] for line in read_metrics(tmp_path / "run", "start", "train")] == [4, 6, 9, 12]


def test_a_full_disk_is_named_with_the_bytes_and_the_lines_before_stay(small_disk):
    folder = small_disk(64 * 1024)
    writer = MetricsWriter(folder)
    with pytest.raises(MetricsError, match=r"metrics\.jsonl: could not be written \(No space left .* after 65,536"):
        for step in range(2000):
            writer.write("train", step, loss=step / 7, text="x" * 100)
    MetricsWriter(folder, step=10**6).close()  # drops the half line
    lines = [json.loads(line) for line in (folder / metrics.NAME).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(step)) and step > 300


def test_the_start_line_has_the_commit_of_the_clone_and_none_outside_of_one(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "onecard" / "metrics.py"))
    assert metrics.commit() is None
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert len(metrics.commit()) >= 7 and head.startswith(metrics.commit())
    monkeypatch.setenv("PATH", "")
    assert metrics.commit() is None


# ---- the numbers


def test_z_score_is_0_for_50_steps_and_then_counts_standard_deviations_and_a_jump_hides_no_other():
    draw, running = np.random.default_rng(0), dict(n=0, mean=0.0, variance=0.0)
    losses = draw.normal(3.0, 0.1, 2000)
    scores = np.array([metrics.z_score(running, loss) for loss in losses])
    assert (scores[:50] == 0).all()
    assert abs(scores[200:].mean()) < 0.1 and scores[200:].std() == pytest.approx(1, abs=0.1)
    assert running["mean"] == pytest.approx(3.0, abs=0.05) and running["n"] == 2000
    assert all(metrics.z_score(running, 13.0) > 60 for _ in range(3))  # 10 / 0.1 = 100 standard deviations


def test_the_speed_leaves_out_the_first_step_of_the_process_where_there_is_another():
    """Steps of 9, 1 and 2 s, of which 3, 0.1 and 0.2 s were spent waiting for data."""
    steps, times = [(9.0, 3.0), (1.0, 0.1), (2.0, 0.2)], metrics.StepTimes()
    for expected in ((1.5, 0.1), (4.0, 3.3 / 12)):
        for step in steps:
            times.add(*step)
        assert times.means() == pytest.approx(expected)
    times = metrics.StepTimes()
    for seconds in (9.0, 1.0):
        times.add(seconds, 0.0)
        assert times.means() == (seconds, 0.0)


def test_an_evaluation_has_perplexity_standard_error_and_bits_per_byte():
    val = np.array([math.log(2), math.log(2), math.log(8), math.log(8)])
    numbers = metrics.eval_numbers(val + 1, val, tokens=1000, text_bytes=4000)
    assert numbers["val_loss"] == pytest.approx(math.log(4)) and numbers["train_loss"] == pytest.approx(math.log(4) + 1)
    assert numbers["perplexity"] == pytest.approx(4)
    assert numbers["bits_per_byte"] == pytest.approx(2 / 4)  # 2 bits per token of 4 bytes
    assert numbers["val_error"] == pytest.approx(math.log(2) * math.sqrt(4 / 3) / math.sqrt(4))
    assert numbers["val_groups"] == pytest.approx(val, abs=1e-6)


def test_the_line_of_an_evaluation_begins_with_bits_per_byte_where_the_tokenizer_is_not_gpt2s():
    numbers = metrics.eval_numbers(np.array([1.5]), np.array([1.0]), tokens=1000, text_bytes=4000)
    bits = f"{1 / math.log(2) / 4:.4f} bits per byte"
    for tokenizer in (None, load_tokenizer()):
        assert metrics.eval_line(8, numbers, 2.0, tokenizer) == (
            f"step 8: train loss 1.5000, val loss 1.0000, perplexity 2.72, {bits} (2 s)"
        )
    line = metrics.eval_line(8, numbers, 2.0, load_tokenizer("bytes"))
    assert line == f"step 8: val {bits}, train loss 1.5000, val loss 1.0000, perplexity 2.72 (2 s)"
    assert "bits" not in metrics.eval_line(8, metrics.eval_numbers(*[np.ones(1)] * 2, 9, None), 2.0, None)


def test_the_bytes_of_nanogpts_characters_are_counted_and_others_are_the_manifests(tmp_path):
    write_characters(tmp_path / "letters", text := "naïve 日本 " * 50)
    write_dataset(tmp_path / "docs", train=[range(9)], val=[range(9)])
    for split, part in (("train", text[:405]), ("val", text[405:])):
        windows = Windows(tmp_path / "letters", split, 4)
        assert windows.text_bytes is None
        assert metrics.text_bytes(windows, dataset_tokenizer(tmp_path / "letters")) == len(part.encode())
        assert metrics.text_bytes(windows, load_tokenizer()) is None is metrics.text_bytes(windows, None)
    assert metrics.text_bytes(Windows(tmp_path / "docs", "val", 4), None) == 36


# ---- wandb


@pytest.fixture
def train_with_wandb(flags, tmp_path, monkeypatch):
    """A function: keys -> trains in tmp_path/run with an offline wandb run."""
    wandb = pytest.importorskip("wandb")
    for name, value in dict(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DATA_DIR=str(tmp_path / "run")).items():
        monkeypatch.setenv(name, value)

    def run(**keys):
        train.main(flags(wandb_log=True, log_interval=1, eval_interval=2, **keys))
        wandb.teardown()  # ends its process, which has then written everything

    return run


def records(path):
    """The messages of a .wandb file: LevelDB's log format after a header of seven bytes.

    A record is cut into parts in blocks of 32 KiB: type 1 is whole, 2, 3 and 4 are the first, a middle and the last
    part. The checksum covers type and data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        rest = 32768 - place % 32768
        if rest < 7:
            place += rest
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part = data[place + 7 : place + 7 + size]
        assert zlib.crc32(data[place + 6 : place + 7 + size]) == int.from_bytes(data[place : place + 4], "little")
        parts = parts + part if kind in (3, 4) else part
        place += 7 + size
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record


def read_runs(out_dir):
    """[(run id, config, {step: {name: value}})] of the offline runs of a folder, oldest first."""
    found = []
    for path in sorted(out_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run_id, config, history = "", {}, {}
        for record in records(path):
            if record.HasField("run"):
                run_id = record.run.run_id
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                items = record.history.item
                row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
                history.setdefault(row.get("_step", record.history.step.num), {}).update(row)
        found.append((run_id, config, history))
    return found


def test_an_offline_run_has_the_config_and_the_metrics_and_a_resumed_one_is_the_same_run(train_with_wandb, tmp_path):
    train_with_wandb(max_iters=4)
    train_with_wandb(max_iters=6)
    (first, config, before), (second, _, after) = read_runs(tmp_path / "run")
    assert first == second == checkpoint.load(tmp_path / "run/ckpt.pt")["wandb_id"]
    assert re.fullmatch("[0-9a-f]{8}", first)
    assert (config["n_embd"], config["learning_rate"], config["dataset"]) == (32, 1e-2, "tiny")
    for kind, name in (("train", "loss"), ("train", "lr"), ("eval", "val_loss")):
        expected = {line["step"]: line[name] for line in read_metrics(tmp_path / "run", kind)}
        found = {step: row[f"{kind}/{name}"] for step, row in (before | after).items() if f"{kind}/{name}" in row}
        assert expected == found and len(found) >= 4
    assert max(before) == 4 and min(after) >= 4


def test_the_samples_are_a_table_and_the_checkpoint_is_an_artifact(train_with_wandb, tmp_path):
    train_with_wandb(max_iters=2, sample_interval=2, vocab_size=50304, n_embd=8, wandb_artifact=True)
    (texts,) = [line["texts"] for line in read_metrics(tmp_path / "run", "samples")]
    ((_, _, history),) = read_runs(tmp_path / "run")
    (table,) = [row["samples/texts.path"] for row in history.values() if "samples/texts.path" in row]
    (path,) = (tmp_path / "run").glob(f"wandb/offline-run-*/files/{table}")
    assert json.loads(path.read_text())["data"] == [[text] for text in texts] and len(texts) == 3
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    (artifact,) = [record.artifact for record in records(path) if record.artifact.type == "model"]
    assert artifact.name.startswith("checkpoint-")
    (entry,) = artifact.manifest.contents
    assert entry.path == "ckpt.pt" and entry.size == (tmp_path / "run/ckpt.pt").stat().st_size


def test_without_wandb_one_line_says_so_and_the_run_goes_on(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train.main(flags(wandb_log=True, max_iters=2))
    assert "wandb does not start: it is not installed (pip install wandb)" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"] == 2
