"""What a run gives to Weights & Biases: read back from the files that an offline run leaves, without wandb's own code
but for the messages' definition. The file is LevelDB's log format behind a header of seven bytes."""

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

pytest.importorskip("wandb")
ROOT = Path(__file__).parent.parent
SETTINGS = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=96, block_size=16, batch_size=4, learning_rate=1e-2)
SETTINGS |= dict(gradient_accumulation_steps=1, eval_interval=2, log_interval=1, eval_tokens=64, warmup_iters=0)
SETTINGS |= dict(device="cpu", compile="false", wandb_log="true")


def records(path):
    """The messages in a .wandb file. A record is cut into parts of 32 KiB blocks; type 1 is whole, 2, 3 and 4 are the
    first, a middle and the last part; its checksum is over type and data."""
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


def train(tiny_data, out_dir, *arguments):
    data_dir, dataset = tiny_data
    settings = SETTINGS | dict(out_dir=out_dir, data_dir=data_dir, dataset=dataset)
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "train.py", *options, *arguments]
    env = os.environ | dict(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DATA_DIR=str(out_dir), OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def read_runs(out_dir):
    """-> [(run id, config, {step: {name: value}})] of the offline runs of a folder, in the order of their making."""
    found = []
    for path in sorted(out_dir.glob("wandb/offline-run-*/*.wandb")):
        run_id, config, history = "", {}, {}
        for record in records(path):
            if record.HasField("run"):
                run_id = record.run.run_id
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                history.setdefault(row.get("_step", record.history.step.num), {}).update(row)
        found.append((run_id, config, history))
    return found


def test_an_offline_run_holds_the_config_and_the_metrics_and_a_resumed_one_is_the_same_run(tiny_data, tmp_path):
    out_dir = tmp_path / "my run"
    train(tiny_data, out_dir, "--max_iters=4")
    train(tiny_data, out_dir, "--max_iters=6", "--init_from=resume")
    (first, config, before), (second, _, after) = read_runs(out_dir)
    assert first == second and re.fullmatch("[0-9a-f]{8}", first)
    assert (config["n_embd"], config["learning_rate"], config["dataset"]) == (16, 1e-2, "tiny")
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    for kind, name in (("train", "loss"), ("train", "lr"), ("eval", "val_loss")):
        expected = {line["step"]: line[name] for line in lines if line["kind"] == kind}
        found = {step: row[f"{kind}/{name}"] for step, row in (before | after).items() if f"{kind}/{name}" in row}
        assert expected == found and len(found) >= 4
    assert max(before) == 4 and min(after) >= 4


def test_the_samples_are_a_table_of_the_texts_in_the_metrics(tiny_data, tmp_path):
    train(tiny_data, tmp_path / "run", "--max_iters=2", "--sample_interval=2", "--vocab_size=50304")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (texts,) = [line["texts"] for line in lines if line["kind"] == "samples"]
    ((_, _, history),) = read_runs(tmp_path / "run")
    (table,) = [row["samples/texts.path"] for row in history.values() if "samples/texts.path" in row]
    (path,) = (tmp_path / "run").glob(f"wandb/offline-run-*/files/{table}")
    assert json.loads(path.read_text())["data"] == [[text] for text in texts] and len(texts) == 3


def test_the_checkpoint_is_an_artifact_if_asked(tiny_data, tmp_path):
    train(tiny_data, tmp_path / "run", "--max_iters=2", "--wandb_artifact=true")
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    (artifact,) = [record.artifact for record in records(path) if record.HasField("artifact")]
    assert artifact.type == "model" and artifact.name.startswith("checkpoint-")
    (entry,) = artifact.manifest.contents
    assert entry.path == "ckpt.pt" and entry.size == (tmp_path / "run" / "ckpt.pt").stat().st_size
