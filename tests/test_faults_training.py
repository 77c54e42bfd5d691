"""The rows of the fault list that concern training, each harm really done: to train.py as a process of its own where
the harm is to a process, in this process where it is to files or numbers."""

import contextlib
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from runs import NEVER, ROOT, TINY, Watched, flags_of, read_metrics

from onecard import checkpoint
from onecard import runtime
import train
from configurator import ConfigError, load_config
from onecard.durable import OwnedError
from onecard.shards import ShardError, ShardWriter, shuffled, write_manifest

FOREVER = 10**6
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills, limits and mounts as POSIX has them")
BASE = TINY | dict(max_iters=12, lr_decay_iters=12, eval_interval=4, log_interval=3, init_from="auto")


@pytest.fixture
def flags(tiny_data, tmp_path):
    """A function: keys -> the command line of a tiny run in tmp_path/`out`, which goes on if it has begun."""

    def build(out="run", **keys):
        data_dir, dataset = tiny_data
        return flags_of(**BASE | dict(data_dir=data_dir, dataset=dataset, out_dir=tmp_path / out) | keys)

    return build


class Training(Watched):
    """train.py as a process of its own."""

    def __init__(self, flags, script=("train.py",), **options):
        super().__init__(
            [sys.executable, *script, *flags], **dict(env={**os.environ, "OMP_NUM_THREADS": "1"}) | options
        )

    def end(self):
        code, said = super().end()
        assert "Traceback" not in said, said
        return code, said

    def send(self, number):
        self.process.send_signal(number)


@pytest.fixture
def start():
    started = []

    def build(*args, **options):
        started.append(Training(*args, **options))
        return started[-1]

    yield build
    for training in started:
        training.process.kill()
        training.process.wait()


def files_of(folder, pattern="ckpt*"):
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def assert_same(a, b):
    """Bit for bit, through nested dicts and lists."""
    flat_a, spec_a = torch.utils._pytree.tree_flatten(a)
    flat_b, spec_b = torch.utils._pytree.tree_flatten(b)
    assert spec_a == spec_b
    for x, y in zip(flat_a, flat_b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def assert_same_run(a, b):
    """Weights, moments, progress and metrics of two runs that have ended are the same bit for bit."""
    states = [checkpoint.load(folder / "ckpt.pt") for folder in (a, b)]
    for state in states:
        del state["config"]  # names the folder
    assert_same(*states)
    lines = [read_metrics(folder, "train", "eval", "event") for folder in (a, b)]
    assert lines[0] == lines[1] and len(lines[0]) > 1
    assert not list(b.glob("*.tmp")) and not (b / checkpoint.NEW).exists()


# ---- kill -9


def test_killed_at_random_moments_and_resumed_it_is_the_run_that_never_stopped(flags, start, tmp_path):
    keys = dict(max_iters=70, lr_decay_iters=70, eval_interval=7)
    train.main(flags("whole", **keys))
    draw = random.Random(0)
    for kill in range(3):
        training = start(flags("killed", **keys))
        for _ in range(draw.randint(1, 12)):
            training.wait_for("^step")
        time.sleep(draw.uniform(0, 0.03))
        training.send(signal.SIGKILL)
        training.wait_for(NEVER)
        assert training.process.wait() == -signal.SIGKILL, kill
    train.main(flags("killed", **keys))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


KILLED_IN_A_SAVE = """
import os, signal, sys
import train
from onecard import checkpoint, durable

deadly, argv = sys.argv[1], sys.argv[2:]
saves, stage = 0, ""

def die_at(name):
    if saves == 2 and name == deadly:
        os.kill(os.getpid(), signal.SIGKILL)

def write(self, data, call=checkpoint._HashingFile.write):
    if self.bytes > 50_000:
        self.file.flush()
        die_at("half written")
    return call(self, data)

def save(self, *args, call=checkpoint.Saver._write):
    global saves
    saves += 1
    call(self, *args)

checkpoint._HashingFile.write = write
checkpoint.Saver._write = save
replace = os.replace
os.replace = lambda a, b: die_at("before " + os.path.basename(b)) or replace(a, b)
train.main(argv)
"""
KILLS = ["half written", "before ckpt_new.pt", "before ckpt.pt"]  # test_checkpoint.py has them all, without training


@pytest.mark.parametrize("stage", KILLS)
def test_killed_inside_a_save_and_resumed_it_is_the_run_that_never_stopped(flags, start, tmp_path, stage):
    train.main(flags("whole"))
    training = start(flags("killed"), script=("-c", KILLED_IN_A_SAVE, stage))
    training.wait_for(NEVER)
    assert training.process.wait() == -signal.SIGKILL, training.said
    state, path, problems = checkpoint.load_newest(tmp_path / "killed")
    renamed = stage == "before ckpt.pt"
    assert not problems and (state["iter_num"], path.name) == ((8, "ckpt_new.pt") if renamed else (4, "ckpt.pt"))
    assert list((tmp_path / "killed").glob("*.tmp"))
    train.main(flags("killed"))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# ---- disks


def test_a_run_whose_checkpoints_will_not_fit_is_refused_before_it_starts(flags, small_disk, monkeypatch):
    monkeypatch.setattr(train, "train_step", None)
    out_dir = small_disk(4 << 20) / "run"
    with pytest.raises(
        checkpoint.CheckpointError, match=r"need [5-9],\d+,\d+ bytes at their most, 4,1\d+,\d+ are free"
    ):
        train.main(flags(out_dir=out_dir))
    assert not files_of(out_dir)
    with pytest.raises(checkpoint.CheckpointError, match="or a larger --keep_every"):
        train.main(flags("kept", max_iters=10**10, keep_every=4))


def test_a_disk_that_is_full_in_a_save_stops_the_run_and_harms_nothing(flags, start, small_disk, tmp_path):
    folder = small_disk(7 << 20)
    keys = dict(out_dir=folder / "run", eval_interval=20, log_interval=1000, max_iters=60, lr_decay_iters=60)
    training = start(flags(**keys))
    training.wait_for("^step 20:")
    while not (folder / "run/ckpt.pt").exists() or (folder / "run" / checkpoint.NEW).exists():
        time.sleep(0.01)
    before = files_of(folder / "run")
    with open(folder / "filler", "wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - 64 * 1024))
    code, said = training.end()
    assert code == 2 and re.search(r"/run/ckpt_new\.pt: could not be written \(No space left on device, after", said), (
        said
    )
    assert re.search(r"[\d,]+ bytes are free there", said)
    assert files_of(folder / "run") == before and not list((folder / "run").glob("*.tmp"))
    (folder / "filler").unlink()
    train.main(flags(**keys))
    train.main(flags("whole", **{**keys, "out_dir": tmp_path / "whole"}))
    assert_same_run(tmp_path / "whole", folder / "run")


def test_a_disk_too_full_for_the_metrics_stops_the_run_in_a_sentence(flags, start, small_disk):
    folder = small_disk(7 << 20)
    training = start(flags(out_dir=folder / "run", log_interval=1, eval_interval=20, max_iters=FOREVER))
    training.wait_for("^step 20:")
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    code, said = training.end()
    assert code == 2 and "No space left on device" in said.splitlines()[-1] and str(folder / "run") in said, said
    for path in checkpoint.candidates(folder / "run"):
        checkpoint.verify(path)


def test_a_limit_on_the_size_of_files_stops_the_run_and_harms_nothing(flags, start, tmp_path):
    train.main(flags(max_iters=4))
    before = files_of(tmp_path / "run")
    limit = len(before["ckpt.pt"]) - 1000
    training = start(flags(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    code, said = training.end()
    assert code == 2 and re.search(
        r"ckpt_new\.pt: could not be written \(File too large, after [1-9][\d,]+ bytes\)", said
    )
    assert files_of(tmp_path / "run") == before and not list((tmp_path / "run").glob("*.tmp"))


def test_an_out_dir_that_cannot_be_written_is_said_before_the_model_is_built(flags, small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("run.GPT", None)
    (tmp_path / "file").touch()
    read_only = small_disk(1 << 20, ",ro")
    for out_dir, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "run", "Not a directory"),
        (read_only / "run", "Read-only file system"),
        (read_only, "Read-only file system"),
    ):
        with pytest.raises(ConfigError, match=f"out_dir={out_dir} cannot be written to: {reason}; give another"):
            train.main(flags(out_dir=out_dir))


# ---- data


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000001.bin"])
def test_a_shard_cut_short_is_found_at_the_start(flags, tiny_data, name, monkeypatch):
    monkeypatch.setattr("run.GPT", None)
    path = tiny_data[0] / tiny_data[1] / name
    size = path.stat().st_size
    for left in (size - 1, size - 2, 1024, 500, 0):
        os.truncate(path, left)
        with pytest.raises(ShardError, match=rf"{name}: .*\b{left:,} bytes") as error:
            train.main(flags())
        assert left == 0 or left == 500 or f"expected {size:,}" in str(error.value)


def test_an_id_outside_the_vocabulary_stops_the_run_before_the_step_that_has_it(flags, start, tiny_data, tmp_path):
    path = tiny_data[0] / tiny_data[1] / "train_000001.bin"
    with open(path, "r+b") as file:
        file.seek(1024 + 2 * 1000 + 1)
        file.write(b"\x80")  # the highest bit of token 1000
    keys = dict(max_iters=60, lr_decay_iters=60, eval_tokens=32)  # more than an epoch: it is met at some step
    code, said = start(flags(**keys)).end()
    assert code == 2 and re.search(rf"{path}: token 32\d+ at position 1,000 is outside .* 96.*--verify", said), said
    assert checkpoint.load_newest(tmp_path / "run")[0]["iter_num"] > 0


FLIPS = """
import random, sys
import torch
import train
from onecard.shards import ShardError

torch.set_num_threads(1)
train.save = lambda *_: None  # a good part of the time, and no matter here
path, argv, draw, refused, trained = sys.argv[1], sys.argv[2:], random.Random(0), 0, 0
for flip in range(200):
    with open(path, "r+b") as file:
        data = file.read()
        position, bit = draw.randrange(len(data)), draw.randrange(8)
        for byte in (data[position] ^ 1 << bit, data[position]):
            file.seek(position)
            file.write(bytes([byte]))
            file.flush()
            if byte != data[position]:
                try:
                    train.main(argv)
                    trained += 1
                except ShardError as error:
                    assert path in str(error)
                    refused += 1
print("refused", refused, "trained", trained)
"""


def test_of_200_flipped_bits_in_a_shard_none_crashes_the_training(flags, start, tmp_path):
    folder = tmp_path / "small"
    make_dataset(folder, np.arange(600) % 96, np.arange(100) % 96)
    keys = dict(data_dir=tmp_path, dataset="small", overwrite=True, init_from="scratch", max_iters=5, eval_interval=9)
    keys |= dict(n_layer=1, n_embd=8, eval_tokens=16, log_interval=9)
    keys |= dict(batch_size=8, gradient_accumulation_steps=1)  # 5 steps see 40 windows, of which there are 37
    training = start(flags(**keys), script=("-c", FLIPS, folder / "train_000000.bin"))
    code, said = training.end()
    refused, trained = map(int, re.search(r"refused (\d+) trained (\d+)", said).groups())
    assert code == 0 and refused + trained == 200 and min(refused, trained) > 20


def make_dataset(folder, train_ids, val_ids):
    """One shard a split."""
    folder.mkdir(parents=True)
    rows = []
    for split, ids in (("train", train_ids), ("val", val_ids)):
        with ShardWriter(folder / f"{split}_000000.bin") as shard:
            shard.write(ids)
        row = dict(name=shard.path.name, split=split, tokens=len(ids), documents=1, text_bytes=len(ids))
        rows.append(row | dict(sha256=shard.sha256, source="made up", row_groups=[0, 1]))
    tokenizer = dict(name="made up", sha256="0" * 64, n_vocab=96, eot=0)
    write_manifest(folder, dict(version=1, tokenizer=tokenizer, shards=rows, skipped={}, settings={}))


# ---- checkpoints


@pytest.mark.parametrize("damage", ["flipped", "empty", "cut short"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(flags, tmp_path, capsys, damage):
    train.main(flags("whole"))
    train.main(flags(max_iters=8))
    path = tmp_path / "run/ckpt.pt"
    (tmp_path / "run/ckpt_best.pt").unlink(missing_ok=True)  # may be the same file
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.unlink()
    path.write_bytes({"flipped": data, "empty": b"", "cut short": data[:-5000]}[damage])
    train.main(flags())
    said = capsys.readouterr().out
    assert re.search(rf"{path}: .*; going on from ckpt_previous\.pt of step 4 instead", said), said
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_nothing_of_an_attackers_checkpoint_runs_in_training_or_sampling(flags, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "mark"),)

    path = tmp_path / "run/ckpt.pt"
    path.parent.mkdir()
    torch.save(dict(iter_num=1, model={}, config=Attack()), path)
    digest = checkpoint.hashlib.sha256(path.read_bytes()).hexdigest().encode()
    with open(path, "ab") as file:
        file.write(b"onecard step %012d %012d sha256 %s\n" % (1, 1, digest))
    checkpoint.verify(path)
    for init_from in ("resume", "auto"):
        with pytest.raises(checkpoint.CheckpointError, match=f"{path}: cannot be read"):
            train.main(flags(init_from=init_from))
    command = [sys.executable, "sample.py", f"--out_dir={path.parent}", "--device=cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and f"{path}: cannot be read" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "mark").exists()


def test_other_settings_that_make_another_run_are_refused_with_both_values(flags, tmp_path):
    train.main(flags(max_iters=4))
    before = files_of(tmp_path / "run", "*")
    with pytest.raises(ConfigError) as error:
        train.main(flags(n_layer=1, n_head=4, bias=True, seed=1, block_size=8, gradient_accumulation_steps=8))
    for text in ("n_layer=1 (checkpoint: 2)", "n_head=4 (checkpoint: 2)", "bias=True (checkpoint: False)"):
        assert text in str(error.value)
    assert "seed=1 (checkpoint: 1337)" in str(error.value) and "block_size=8 (checkpoint: 16)" in str(error.value)
    assert "tokens_per_step" not in str(error.value)  # 8 x 2 x 8 = 4 x 2 x 16
    assert files_of(tmp_path / "run", "*") == before


def test_other_data_is_refused_unless_it_is_meant(flags, tiny_data, tmp_path, capsys):
    train.main(flags(max_iters=4))
    make_dataset(tiny_data[0] / "more", np.arange(6000) % 96, np.arange(1500) % 90)
    other = dict(dataset="more", max_iters=8)
    with pytest.raises(ConfigError) as error:
        train.main(flags(**other))
    assert "train_tokens=6000 (checkpoint: 5000)" in str(error.value) and "train_fingerprint" in str(error.value)
    assert "val_tokens" not in str(error.value) and "--allow_new_data=True" in str(error.value)
    with pytest.raises(ConfigError, match="seed=1"):  # that alone is allowed by it
        train.main(flags(**other, allow_new_data=True, seed=1))
    train.main(flags(**other, allow_new_data=True))
    assert "goes on with other data: 6,000 tokens, 5,000 before" in capsys.readouterr().out
    starts = read_metrics(tmp_path / "run", "start")
    assert [line["data"]["train_tokens"] for line in starts] == [5000, 6000]
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["data"]["train_tokens"] == 6000


def test_what_may_change_takes_effect_and_a_jump_of_the_learning_rate_is_said(flags, tmp_path, capsys):
    train.main(flags(max_iters=4))
    capsys.readouterr()
    train.main(flags(max_iters=4))  # nothing to do, nothing changed
    assert "WARNING: with these settings" not in capsys.readouterr().out
    changed = dict(
        learning_rate=1e-1, max_iters=5, weight_decay=0.3, beta2=0.5, grad_clip=0.5, dropout=0.2, log_interval=1
    )
    train.main(
        flags(**changed, batch_size=1, gradient_accumulation_steps=8, dtype="bfloat16", always_save_checkpoint=False)
    )
    said = capsys.readouterr().out
    before, after = 5.5e-3 + 4.5e-3 * math.cos(math.pi * 2 / 10), 5.05e-2 + 4.95e-2 * math.cos(math.pi * 2 / 10)
    jump = f"WARNING: with these settings the learning rate jumps from {before:.2e} to {after:.2e} at step 4: the loss"
    assert jump in said
    for text in ("weight_decay 0.1 -> 0.3", "beta2 0.95 -> 0.5", "batch_size 2 -> 1", "dropout 0.1 -> 0.2"):
        assert text in said
    state = checkpoint.load(tmp_path / "run/ckpt.pt")
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0] and groups[0]["betas"] == (0.9, 0.5)
    assert (
        read_metrics(tmp_path / "run", "train")[-1]["lr"] == pytest.approx(groups[0]["lr"]) and groups[0]["lr"] > 0.09
    )


def test_file_times_do_not_matter(flags, tmp_path):
    train.main(flags("whole"))
    train.main(flags(max_iters=8))
    names = ["ckpt.pt", "ckpt_previous.pt", "metrics.jsonl"]
    for i, name in enumerate(names):  # the newest seems to be the oldest, and all from before this program was written
        os.utime(tmp_path / "run" / name, (1e9 + 1e6 * i,) * 2)
    train.main(flags())
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# ---- numbers that go wrong


def blow_up(flags, tmp_path, **keys):
    """A run of 4 good steps, then at a learning rate of 1e30. -> the exit code and the checkpoints before."""
    train.main(flags(max_iters=4, **keys))
    before = files_of(tmp_path / "run")
    with pytest.raises(SystemExit) as error:
        train.main(flags(max_iters=60, lr_decay_iters=60, learning_rate=1e30, **keys))
    return error.value.code, before


def test_five_steps_in_a_row_that_are_not_finite_end_the_run_with_3_and_the_good_weights(flags, tmp_path, capsys):
    code, before = blow_up(flags, tmp_path)
    assert code == 3 and files_of(tmp_path / "run") == before
    skipped = [line for line in read_metrics(tmp_path / "run", "event") if line["event"] == "skipped"]
    assert [line["step"] for line in skipped] == [6, 7, 8, 9, 10]  # step 5 made the weights what they are
    assert [line["sequences"] for line in skipped] == [[8 * step - 8, 8 * step - 1] for step in range(6, 11)]
    events = [line for line in read_metrics(tmp_path / "run", "event") if line["event"] != "skipped"]
    assert [line["step"] for line in events] == [8, 8]  # its evaluation was not finite, and its weights not saved
    said = capsys.readouterr().err
    assert re.search(r"stopped at step 10: 5 steps in a row .* sequences 72 to 79\..* from ckpt\.pt of step 4", said)
    assert "lower --learning_rate or a lower --grad_clip" in said and "bfloat16" not in said
    train.main(flags("whole"))
    train.main(flags())  # and it goes on from there at the old rate
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_float16_skips_until_its_scale_is_below_1_and_then_five_more(flags, tmp_path, capsys):
    code, before = blow_up(flags, tmp_path, dtype="float16", eval_interval=50)
    assert code == 3 and files_of(tmp_path / "run") == before
    scales = [line["scale"] for line in read_metrics(tmp_path / "run", "event") if line["step"] > 5]
    assert scales[-5:] == [2.0**-k for k in range(1, 6)] and len(scales) > 15
    assert all(a == 2 * b for a, b in itertools.pairwise(scales))
    assert "Try --dtype=bfloat16, a lower --learning_rate" in capsys.readouterr().err


def test_a_damaged_checkpoint_beside_it_does_not_hide_why_a_run_gave_up(flags, tmp_path, capsys):
    train.main(flags(max_iters=8))
    (tmp_path / "run/ckpt_old.pt").write_bytes(b"no checkpoint at all")
    with pytest.raises(SystemExit) as error:
        train.main(flags(max_iters=60, learning_rate=1e30))
    assert error.value.code == 3 and "goes on from ckpt.pt of step 8" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved_on_a_signal_either(flags, start, tmp_path):
    train.main(flags(max_iters=4))
    before = files_of(tmp_path / "run")
    run = train.start_run(load_config(train.TrainConfig, flags(max_iters=8)))
    with torch.no_grad():
        next(run.model.parameters())[0, 0] = float("nan")
    train.save(run)
    run.saver.close()
    assert files_of(tmp_path / "run") == before
    assert read_metrics(tmp_path / "run", "event")[-1]["event"] == "weights not finite, not saved"


def test_a_spike_of_the_loss_is_an_event_with_its_sequences(flags, tmp_path, capsys):
    windows, spike, garbage = 400, 250, np.random.default_rng(0)
    ids = np.arange(windows * 16 + 1) % 7
    window = int(shuffled(np.array([spike]), windows, seed=1337)[0])
    ids[16 * window + 1 : 16 * window + 16] = garbage.integers(7, 96, 15)
    make_dataset(tmp_path / "data/spiky", ids, np.arange(500) % 7)
    keys = dict(batch_size=1, gradient_accumulation_steps=1, max_iters=300, eval_interval=1000, log_interval=100)
    train.main(flags(**keys, lr_decay_iters=300, dataset="spiky", dropout=0.0))
    events = read_metrics(tmp_path / "run", "event")
    assert events[0]["event"] == "spike" and events[0]["sequences"] == [spike, spike] and events[0]["step"] == spike + 1
    assert events[0]["loss"] > 4 > 1 > events[0]["mean"]
    assert f"(sequences {spike} to {spike})" in capsys.readouterr().out


# ---- signals and time


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_be_finished_and_saved_and_nothing_is_lost(flags, start, tmp_path, number, code):
    keys = dict(max_iters=120, lr_decay_iters=120, eval_interval=50)
    training = start(flags("stopped", **keys))
    training.wait_for("^step +1[0-9] ")
    training.send(number)
    found, said = training.end()
    step = checkpoint.load(tmp_path / "stopped/ckpt.pt")["iter_num"]
    assert found == code and f"{signal.Signals(number).name}: finishing the step and saving" in said
    assert 12 <= step < 120 and f"stopped at step {step}; --init_from=resume goes on" in said
    train.main(flags("stopped", **keys))
    train.main(flags("whole", **keys))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_at_the_step_of_an_evaluation_and_a_kill_after_it_write_no_line_twice(flags, tmp_path, monkeypatch):
    train.main(flags("whole"))
    step_of, stop = train.train_step, runtime.Stop()

    def step_then_signal(run, batches):
        loss, norm, wish = step_of(run, batches)
        return loss, norm, signal.SIGTERM if run.progress.step == 4 else wish

    monkeypatch.setattr(train, "train_step", step_then_signal)
    with pytest.raises(SystemExit, match="143"):
        train.main(flags())
    monkeypatch.undo()

    def killed(run, is_best=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", killed)  # after the evaluation of step 4 has been written
    with pytest.raises(KeyboardInterrupt):
        train.main(flags())
    monkeypatch.undo()
    assert [line["step"] for line in read_metrics(tmp_path / "run", "eval")] == [0, 4] and not stop.signal
    train.main(flags())
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "keys",
    [dict(), dict(dtype="float16", lr_schedule="wsd"), dict(dtype="bfloat16", arch="qwen3", optimizer="muon")],
)
def test_a_run_stopped_after_each_of_its_steps_is_the_run_that_never_stopped(flags, tmp_path, monkeypatch, keys):
    train.main(flags("whole", **keys))
    step_of = train.train_step

    def step_with_signal(run, batches):
        signal.raise_signal(signal.SIGTERM)
        return step_of(run, batches)

    monkeypatch.setattr(train, "train_step", step_with_signal)
    for step in range(1, BASE["max_iters"] + 1):
        with pytest.raises(SystemExit, match="143"):
            train.main(flags("stopped", **keys))
        assert checkpoint.load(tmp_path / "stopped/ckpt.pt")["iter_num"] == step
    train.main(flags("stopped", **keys))  # the evaluation of the last step
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("eval_only", [False, True])
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(flags, start, tmp_path, eval_only):
    keys = dict(n_layer=6, n_embd=64, batch_size=1, gradient_accumulation_steps=1, eval_tokens=0, max_iters=2)
    training = start(flags("stopped", **keys, eval_only=eval_only))
    training.wait_for("^model")
    time.sleep(0.3)
    training.send(signal.SIGTERM)
    code, said = training.end()
    assert code == 143 and ", val loss" not in said
    if eval_only:
        assert not (tmp_path / "stopped").exists()
        return
    assert read_metrics(tmp_path / "stopped", "eval") == []
    assert checkpoint.load(tmp_path / "stopped/ckpt.pt")["iter_num"] == 0
    keys |= dict(eval_tokens=32)  # that may change, and saves time
    train.main(flags("stopped", **keys))
    train.main(flags("whole", **keys))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_signal_stops_at_once(flags, start, tmp_path):
    training = start(flags(gradient_accumulation_steps=100_000, eval_tokens=32))  # a step takes minutes
    training.wait_for("^step 0:")
    time.sleep(0.3)
    training.send(signal.SIGTERM)
    training.wait_for("SIGTERM: finishing the step")
    training.send(signal.SIGINT)
    assert training.end()[0] == 130
    assert not files_of(tmp_path / "run")


def test_max_hours_stops_and_saves_and_the_run_can_go_on(flags, tmp_path, capsys):
    keys = dict(eval_interval=FOREVER, log_interval=FOREVER, warmup_iters=0, decay_lr=False)
    train.main(flags(max_iters=FOREVER, max_hours=0.5 / 3600, **keys))  # returns: exit code 0
    step = checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"]
    assert f"stopped at step {step}; --init_from=resume" in capsys.readouterr().out and step > 0
    for out in ("run", "whole"):
        train.main(flags(out, max_iters=step + 2, **keys))
    states = [checkpoint.load(tmp_path / out / "ckpt.pt") for out in ("run", "whole")]
    assert_same(*([state[key] for key in ("model", "optimizer", "running", "iter_num")] for state in states))


def test_max_hours_counts_the_step_and_the_save_to_come(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: clock[0])
    stop, wishes = runtime.Stop(max_hours=1.0), []
    for _ in range(36):  # steps of 100 s, saves of 250 s: the save behind step 33 ends at 3550 s, behind 34 at 3650 s
        clock[0] += 100
        wishes.append(stop.wish(seconds_to_save=250))
    assert wishes == [0] * 32 + [stop.TIME_IS_UP] * 4
    assert runtime.Stop().wish(1e9) == 0


# ---- owners


def test_the_second_training_in_an_out_dir_stops_at_once_and_a_kill_of_the_first_frees_it(flags, start, tmp_path):
    first = start(flags(max_iters=FOREVER, eval_interval=5))
    first.wait_for("^step 15:")  # the checkpoint of step 5 is on disk
    before = read_metrics(tmp_path / "run", "start")
    for init_from in ("auto", "resume", "scratch"):
        with pytest.raises(
            OwnedError, match=rf"out_dir={tmp_path / 'run'} is in use by process {first.process.pid} on"
        ):
            train.main(flags(init_from=init_from, overwrite=True))
    assert read_metrics(tmp_path / "run", "start") == before and first.process.poll() is None
    first.send(signal.SIGKILL)
    first.process.wait()
    step = checkpoint.load_newest(tmp_path / "run")[0]["iter_num"]
    train.main(flags(max_iters=step + 1))
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"] == step + 1


# ---- what is not there, and what must not run


def test_code_in_a_config_file_is_not_run(flags, start, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(f"batch_size = 2\nimport os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    code, said = start([config, *flags()]).end()
    assert code == 2 and "config.py:2" in said.replace(", line ", ":") and "os.mkdir" in said, said
    assert not (tmp_path / "mark").exists() and not (tmp_path / "run").exists()


def test_without_wandb_one_line_says_so_and_the_run_goes_on(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train.main(flags(wandb_log=True, max_iters=2))
    assert (
        "wandb does not start: it is not installed (pip install wandb); going on without it" in capsys.readouterr().out
    )
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"] == 2


def test_without_a_compiler_one_line_says_so_and_the_run_goes_on(flags, start, tmp_path):
    environment = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **environment, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    code, said = start(flags(compile=True, n_layer=1, max_iters=2), env=environment).end()
    assert code == 0 and said.count("torch.compile does not work here (") == 1
    assert "going on without it, slower" in said and "step 2: train loss" in said


def test_no_cuda_is_said_before_any_work(flags, start, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    code, said = start(flags(device="cuda")).end()
    assert code == 2 and "sees no CUDA device; use --device=cpu" in said and "model " not in said
