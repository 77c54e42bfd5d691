"""metrics.py: metrics.jsonl, the numbers in it, and what wandb gets, read back from the files of an offline run."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from runs import read_metrics, write_characters, write_dataset

import train
from onecard import UserError, checkpoint, metrics, tracking
from onecard.metrics import MetricsWriter
from onecard.tokenizer import dataset_tokenizer, load_tokenizer
from onecard.tracking import Tracker
from onecard.windows import Windows

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


def test_damaged_lines_are_reported_at_a_resume_and_the_good_ones_after_them_stay(tmp_path, capsys):
    path = tmp_path / metrics.NAME
    lines = [f'{{"kind": "train", "step": {step}}}\n' for step in range(5)]
    path.write_text("".join([lines[0], "{\x00\n", "[1]\n", *lines[1:]]))
    MetricsWriter(tmp_path, step=3).close()
    assert path.read_text() == "".join([lines[0], "{\x00\n", "[1]\n", *lines[1:4]])
    assert capsys.readouterr().out == f"{path}: 2 lines cannot be read, first line 2; all others are kept\n"


@pytest.mark.parametrize("harm", ["at a resume", "deleted", "replaced", "with its folder"])
def test_metrics_that_are_gone_are_reported_once_and_begin_again(flags, tmp_path, monkeypatch, capsys, harm):
    path, write = tmp_path / "run/metrics.jsonl", MetricsWriter.write

    def harm_and_write(self, kind, step, **numbers):
        if (kind, step) == ("train", 6) and harm == "with its folder":
            shutil.rmtree(path.parent)
        elif (kind, step) == ("train", 6):
            path.unlink()
            if harm == "replaced":
                path.write_text("")
        write(self, kind, step, **numbers)

    if harm == "at a resume":
        train.main(flags(max_iters=4))
        path.unlink()
    else:
        monkeypatch.setattr(MetricsWriter, "write", harm_and_write)
    train.main(flags())
    first = 4 if harm == "at a resume" else 0  # a start line comes first, so that report.py knows the config
    assert [line["step"] for line in read_metrics(tmp_path / "run", "start", "train")] == [first, 6, 9, 12]
    assert capsys.readouterr().out.count("are lost, a new file begins\n") == 1
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"] == 12  # in a new folder if that was deleted


def test_a_full_disk_is_named_with_the_bytes_and_the_lines_before_stay(small_disk):
    folder = small_disk(64 * 1024)
    writer = MetricsWriter(folder)
    with pytest.raises(UserError, match=r"metrics\.jsonl: could not be written \(No space left .* after 65,536"):
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
    times.add(9.0, 0.0)
    assert times.means() == (9.0, 0.0)


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


def records(path):
    """The messages of a .wandb file: LevelDB's log format after a header of seven bytes.

    A record is cut into parts in blocks of 32 KiB: type 1 is whole, 2, 3 and 4 are the first, a middle and the last.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_offline_run(path):
    """(run id, config, {step: {name: value}}, artifacts) of a .wandb file."""
    run_id, config, history, artifacts = "", {}, {}, []
    for record in records(path):
        if record.HasField("run"):
            run_id = record.run.run_id
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("history"):
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            history.setdefault(row.get("_step", record.history.step.num), {}).update(row)
        elif record.artifact.type == "model":
            artifacts.append(record.artifact)
    return run_id, config, history, artifacts


def test_offline_wandb_has_all_that_a_run_sends_and_a_resumed_run_is_the_same(flags, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in dict(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DATA_DIR=str(tmp_path / "run")).items():
        monkeypatch.setenv(name, value)
    keys = dict(wandb_log=True, wandb_artifact=True, log_interval=1, eval_interval=2, sample_interval=6)
    for max_iters in (4, 6):
        train.main(flags(max_iters=max_iters, vocab_size=50304, n_embd=8, **keys))
    files = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    (first, config, before, _), (second, _, after, (artifact,)) = map(read_offline_run, files)
    assert first == second == checkpoint.load(tmp_path / "run/ckpt.pt")["wandb_id"]
    assert re.fullmatch("[0-9a-f]{8}", first) and max(before) == 4 and min(after) >= 4
    assert (config["n_embd"], config["learning_rate"], config["dataset"]) == (8, 1e-2, "tiny")
    for kind, name in (("train", "loss"), ("train", "lr"), ("eval", "val_loss")):
        expected = {line["step"]: line[name] for line in read_metrics(tmp_path / "run", kind)}
        found = {step: row[f"{kind}/{name}"] for step, row in (before | after).items() if f"{kind}/{name}" in row}
        assert expected == found and len(found) >= 4
    (last,) = read_metrics(tmp_path / "run", "samples")
    (path,) = (tmp_path / "run").glob(f"wandb/offline-run-*/files/{after[last['step']]['samples/texts.path']}")
    assert json.loads(path.read_text())["data"] == [[text] for text in last["texts"]] and len(last["texts"]) == 3
    (entry,) = artifact.manifest.contents
    assert artifact.name.startswith("checkpoint-") and entry.path == "ckpt.pt"
    assert entry.size == (tmp_path / "run/ckpt.pt").stat().st_size


def kill_wandb_core(tracker):
    """kill -9 of the process of wandb's own that its library starts."""
    for _ in range(1200):
        listed = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
        for pid, parent, *command in map(str.split, listed.splitlines()[1:]):
            if int(parent) == tracker.process.pid and "wandb-core" in " ".join(command):
                return os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
    raise AssertionError("no wandb-core")


HARMS = {  # what is done: a fake of wandb, or an action at the first step; what the run prints
    "not installed": ("raise ImportError", "it is not installed (pip install wandb)"),
    "does not start": ("import time; time.sleep(60)", "wandb has not finished after 0.1 s"),
    "wrong mode": ("", "wandb does not work: 1 validation error"),
    "its process killed": (lambda tracker: tracker.process.kill(), "does not take messages"),
    "its process stopped": (lambda tracker: tracker.process.send_signal(signal.SIGSTOP), "no answer for 0.1 s"),
    "its core killed": (kill_wandb_core, "wandb does not work: "),
}


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("harm", HARMS)
def test_whatever_happens_to_wandb_is_one_line_and_the_run_goes_on(flags, tmp_path, monkeypatch, capfd, harm):
    action, line = HARMS[harm]
    if callable(action) or not action:
        pytest.importorskip("wandb")
    else:
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake/wandb.py").write_text(action)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    if harm in ("does not start", "its process stopped"):
        monkeypatch.setattr(tracking, "LAST_PATIENCE", 0.1)
        monkeypatch.setattr(tracking, "PATIENCE", 0.1)
    for name, value in dict(WANDB_MODE="offline" if action else "junk", WANDB_SILENT="true").items():
        monkeypatch.setenv(name, value)
    send, trackers = Tracker.send, []

    def harm_and_send(self, message):
        send(self, message | ({"padding": "x" * 100_000} if "step" in message else {}))  # more than the pipe holds
        if self not in trackers and message.get("step") == 1:
            trackers.append(self)
            if callable(action):
                action(self)

    monkeypatch.setattr(Tracker, "send", harm_and_send)
    train.main(flags(wandb_log=True, log_interval=1, max_iters=6))
    printed = capfd.readouterr()
    said = [text for text in printed.out.splitlines() if text.startswith("wandb")]
    assert len(said) == 1 and line in said[0] and "Traceback" not in printed.err, printed
    assert len(read_metrics(tmp_path / "run", "train")) == 6 == checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"]
    trackers[0].process.kill()
