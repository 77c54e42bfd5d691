"""checkpoint.py: whole or not at all, and which one a run continues from. Damage, full disks and kills are real."""

import contextlib
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from runs import ROOT, assert_same, assert_same_run, files_of, read_metrics, write_dataset

import sample
import train
from configurator import ConfigError
from model import GPT, GPTConfig
from onecard import checkpoint, plan
from onecard.checkpoint import CheckpointError
from onecard.durable import OwnedError

POSIX = pytest.mark.skipif(os.name != "posix", reason="kills and limits as POSIX has them")


def some_state(step, numbers=1000):
    """What a run saves, small; one tensor occurs twice, like the tied embedding."""
    generator = torch.Generator().manual_seed(step)
    tied = torch.randn(numbers, generator=generator)
    moments = {0: dict(step=torch.tensor(float(step)), exp_avg=torch.randn(7, generator=generator))}
    optimizer = dict(state=moments, param_groups=[dict(lr=1e-3, betas=(0.9, 0.95), params=[0])])
    return dict(iter_num=step, model=dict(wte=tied, lm_head=tied), optimizer=optimizer)


def assert_is(state, expected):
    """Bit for bit, with the version that `write` adds."""
    assert_same(state, {"version": checkpoint.VERSION, **expected})


def save_all(folder, steps, keep_every=0, best=()):
    for step in steps:
        checkpoint.save(folder, some_state(step), [checkpoint.BEST] * (step in best), keep_every)


def steps_of(folder):
    return {path.name: checkpoint.read_trailer(path)[0] for path in sorted(folder.glob("*"))}


def flip(path, position, bit):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


# ---- what is written is what is loaded


def test_what_is_loaded_is_what_was_saved_bit_for_bit_and_a_tied_tensor_is_written_once(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint.write(path, some_state(3))
    state = checkpoint.load(path)
    assert_is(state, some_state(3))
    assert_is(torch.load(path, weights_only=True), some_state(3))  # the trailer does not disturb torch
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    assert state["model"]["wte"].data_ptr() == state["model"]["lm_head"].data_ptr()
    with zipfile.ZipFile(path) as file:
        assert [info.file_size for info in file.infolist()].count(4000) == 1


def test_a_model_saved_is_the_model_loaded(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
    state = dict(iter_num=1, model=model.state_dict(), model_args=vars(model.config), best_val_loss=float("inf"))
    checkpoint.write(tmp_path / "ckpt.pt", state)
    loaded, rest = checkpoint.load_model(tmp_path / "ckpt.pt")
    idx = torch.arange(8)[None]
    assert torch.equal(loaded(idx), model.eval()(idx)) and not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight and rest["best_val_loss"] == float("inf")


def test_a_runs_checkpoint_has_nanogpts_keys_and_names(flags, tmp_path):
    train.main(flags(max_iters=1, bias=True))
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= state.keys()
    assert state["model"].keys() == GPT(GPTConfig(**state["model_args"])).state_dict().keys()
    assert {"transformer.h.1.attn.c_attn.weight", "transformer.ln_f.bias", "lm_head.weight"} <= state["model"].keys()


@pytest.mark.parametrize(
    "name, keys", [("old_gpt2", dict(bias=True)), ("old_qwen3", dict(arch="qwen3", optimizer="muon"))]
)
def test_a_run_of_the_code_before_the_rebuild_is_resumed_with_the_losses_that_code_had(flags, tmp_path, name, keys):
    """The checkpoint is of step 6, the metrics of all 12 steps."""
    shutil.copytree(ROOT / "tests/data" / name, tmp_path / "run")
    before = read_metrics(tmp_path / "run", "train", "eval")
    train.main(flags(**keys, n_embd=8, dropout=0.0, log_interval=1))
    after = read_metrics(tmp_path / "run", "train", "eval")
    assert [(line["kind"], line["step"]) for line in after] == [(line["kind"], line["step"]) for line in before]
    assert len(after) == 12 + 4 and after[:8] == before[:8]
    for old, new in zip(before, after, strict=True):
        for key in old.keys() & {"loss", "grad_norm", "lr", "train_loss", "val_loss"}:
            assert new[key] == pytest.approx(old[key], rel=1e-4), (old["step"], key)
    assert read_metrics(tmp_path / "run", "start")[-1]["step"] == 6


# ---- which ones there are


def test_latest_previous_best_and_every_nth_are_kept(tmp_path):
    save_all(tmp_path, [2, 4, 5, 6, 8, 10], keep_every=4, best=(2, 6))
    kept = {"ckpt_step_000000004.pt": 4, "ckpt_step_000000008.pt": 8}
    assert steps_of(tmp_path) == {"ckpt.pt": 10, "ckpt_best.pt": 6, "ckpt_previous.pt": 8, **kept}
    for name, step in steps_of(tmp_path).items():
        assert_is(checkpoint.load(tmp_path / name), some_state(step))


def test_an_old_one_loses_its_name_only_when_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    save_all(tmp_path, [1, 2])
    before, verify = files_of(tmp_path), checkpoint.verify

    def flip_and_verify(path):  # a disk that lies
        flip(path, 700, 3)
        verify(path)

    monkeypatch.setattr(checkpoint, "verify", flip_and_verify)
    with pytest.raises(CheckpointError, match="damaged"):
        save_all(tmp_path, [3], best=(3,))
    assert before == files_of(tmp_path, "*")


def test_the_newest_is_by_step_and_not_by_the_time_of_the_file(tmp_path):
    save_all(tmp_path, [1, 2, 3], best=(1,))
    for days, name in enumerate(("ckpt.pt", "ckpt_previous.pt", "ckpt_best.pt")):  # the clock was set back
        os.utime(tmp_path / name, (1e9 + 86400 * days,) * 2)
    assert checkpoint.load_newest(tmp_path)[0]["iter_num"] == 3
    (tmp_path / "ckpt.pt").unlink()
    assert checkpoint.load_newest(tmp_path)[0]["iter_num"] == 2


def test_a_users_own_copies_are_never_resumed_from_and_never_deleted(flags, tmp_path):
    copies = [tmp_path / "run" / name for name in ("ckpt_mine.pt", "ckpt copy.pt", "ckpt_step_8.pt", "ckpt2.pt")]
    train.main(flags("other", max_iters=8))
    copies[0].parent.mkdir()
    for path in copies:
        shutil.copy(tmp_path / "other/ckpt.pt", path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train.main(flags(init_from="resume"))
    train.main(flags(max_iters=4))  # init_from=auto: a new run
    assert [line["step"] for line in read_metrics(tmp_path / "run", "train")] == [3]
    assert checkpoint.load_newest(tmp_path / "run")[0]["iter_num"] == 4
    train.main(flags(max_iters=1, init_from="scratch", overwrite=True))
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"] == 1
    assert {path.read_bytes() for path in copies} == {(tmp_path / "other/ckpt.pt").read_bytes()}
    assert not set(copies) & set(checkpoint.candidates(tmp_path / "run"))


# ---- damage


def test_of_200_flipped_bits_200_are_noticed(tmp_path):
    path, draw = tmp_path / "ckpt.pt", random.Random(0)
    checkpoint.write(path, some_state(6))
    size = path.stat().st_size
    for _ in range(200):
        position, bit = draw.randrange(size), draw.randrange(8)
        flip(path, position, bit)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            checkpoint.load(path)
        flip(path, position, bit)
    assert_is(checkpoint.load(path), some_state(6))


def test_every_flipped_bit_of_the_trailer_is_named_and_never_leads_to_an_older_one_in_silence(tmp_path):
    save_all(tmp_path, [4, 6])
    path = tmp_path / "ckpt.pt"
    size = path.stat().st_size
    for position in range(size - checkpoint.TRAILER_BYTES, size):
        for bit in range(8):
            flip(path, position, bit)
            state, used, problems = checkpoint.load_newest(tmp_path)
            assert state["iter_num"] == 4 and used.name == "ckpt_previous.pt"
            assert len(problems) == 1 and str(path) in problems[0], (position, bit, problems)
            flip(path, position, bit)
    assert checkpoint.load_newest(tmp_path)[1:] == (path, [])


@pytest.mark.parametrize("left", [0, 1, 97, 500, 0.5, 0.99])
def test_a_file_cut_short_is_named_and_the_previous_one_is_loaded(tmp_path, left):
    save_all(tmp_path, [4, 6])
    path = tmp_path / "ckpt.pt"
    os.truncate(path, left if left in (0, 1, 97, 500) else int(left * path.stat().st_size))
    state, used, problems = checkpoint.load_newest(tmp_path)
    assert_is(state, some_state(4))
    assert used.name == "ckpt_previous.pt" and len(problems) == 1 and str(path) in problems[0]
    assert checkpoint.newest(tmp_path) == "ckpt_previous.pt of step 4"


def test_where_all_are_damaged_each_is_named(tmp_path):
    save_all(tmp_path, [4, 6])
    for name in ("ckpt.pt", "ckpt_previous.pt"):
        flip(tmp_path / name, 1000, 0)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt: damaged.*ckpt_previous\.pt: damaged"):
        checkpoint.load_newest(tmp_path)
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load_newest(tmp_path / "none")


def test_a_run_continues_from_the_previous_checkpoint_and_names_the_damaged_one(flags, tmp_path, capsys):
    train.main(flags("whole"))
    train.main(flags("stopped", max_iters=8))
    (tmp_path / "stopped/ckpt_best.pt").unlink(missing_ok=True)  # may be the same file
    data = (tmp_path / "stopped/ckpt.pt").read_bytes()
    third = len(data) // 3
    flipped = data[:third] + bytes([data[third] ^ 4]) + data[third + 1 :]
    for name, content in (("flipped", flipped), ("empty", b""), ("cut", data[:-5000])):
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
        path = tmp_path / name / "ckpt.pt"
        path.unlink()
        path.write_bytes(content)
        capsys.readouterr()
        train.main(flags(name))
        assert re.search(rf"{path}: .*; using ckpt_previous\.pt of step 4 instead", capsys.readouterr().out)
        assert_same_run(tmp_path / "whole", tmp_path / name)


class Attack:
    """When it is unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy", "without trailer"])
def test_nothing_in_an_attackers_file_runs_in_loading_training_or_sampling(flags, tmp_path, kind):
    path, mark = tmp_path / "run/ckpt.pt", tmp_path / "mark"
    path.parent.mkdir()
    state = {**some_state(9), "config": Attack(str(mark))}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind != "without trailer":  # an attacker writes the right SHA-256 too
        data, digest = path.read_bytes(), checkpoint.hashlib.sha256(path.read_bytes()).hexdigest()
        path.write_bytes(data + b"onecard step %012d %012d sha256 %s\n" % (9, 9, digest.encode()))
        checkpoint.verify(path)  # so torch.load really sees it
    for action in (
        lambda: checkpoint.load(path),
        lambda: checkpoint.load_model(path),
        lambda: train.main(flags(init_from="resume")),
        lambda: train.main(flags(init_from="auto")),
        lambda: sample.main([f"--out_dir={path.parent}", "--device=cpu"]),
    ):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            action()
    assert not mark.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert mark.exists()  # the attack is a real one


# ---- disks


def test_a_full_disk_in_a_save_is_named_and_harms_nothing_and_the_run_can_go_on(
    flags, small_disk, tmp_path, monkeypatch
):
    folder, save = small_disk(7 << 20), checkpoint.save
    keys = dict(out_dir=folder / "run")
    before = {}

    def fill_and_save(out_dir, state, *rest):
        if state["iter_num"] == 8:
            before.update(files_of(folder / "run"))
            (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - 64 * 1024))
        save(out_dir, state, *rest)

    message = r"/run/ckpt_new\.pt: could not be written \(No space left on device, after [1-9][\d,]+ bytes\); 65,536 "
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=message):
        patch.setattr(checkpoint, "save", fill_and_save)
        train.main(flags(**keys))
    assert files_of(folder / "run") == before and not list((folder / "run").glob("*.tmp"))
    (folder / "filler").unlink()
    train.main(flags(**keys))
    train.main(flags("whole"))
    assert_same_run(tmp_path / "whole", folder / "run")


@POSIX
@pytest.mark.parametrize("size", [100, 3000, 150_000, 200_000])
def test_a_limit_on_the_size_of_files_is_named_and_harms_nothing(tmp_path, size):
    save_all(tmp_path, [1, 2])
    before, limits = files_of(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"ckpt_new\.pt: could not be written \(File too large"):
            checkpoint.save(tmp_path, some_state(3, numbers=50_000), [checkpoint.BEST])  # 203 kB
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == files_of(tmp_path, "*")


def test_a_folder_that_is_gone_or_a_name_that_cannot_be_given_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No such file or directory"):
        save_all(tmp_path / "gone", [1])
    save_all(tmp_path, [1])
    monkeypatch.setattr(checkpoint.durable, "second_name", full)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt: could not be written \(No space left on device"):
        save_all(tmp_path, [2])
    assert checkpoint.load_newest(tmp_path)[0]["iter_num"] == 2  # whole, under the name of an unfinished save


def test_room_for_the_checkpoints_and_those_kept_is_checked_before_the_model_is_built(flags, small_disk, monkeypatch):
    folder, MiB = small_disk(6 << 20), 2**20
    need = plan.checkpoint_bytes(10_000, kept=0)
    assert need == 5 * (12 * 10_000 + MiB)  # latest, previous, best, before_decay and a new one
    checkpoint.check_room(folder, need, resumed=False)
    (folder / "ckpt.pt").write_bytes(bytes(2 * MiB))
    os.link(folder / "ckpt.pt", folder / "ckpt_best.pt")
    checkpoint.check_room(folder, need, resumed=True)  # they will be replaced
    with pytest.raises(CheckpointError, match="up to 7,000,000 bytes, 6,291,456 are free"):  # two names of one file
        checkpoint.check_room(folder, 7_000_000, resumed=False)
    os.link(folder / "ckpt.pt", folder / "ckpt_step_000000100.pt")
    with pytest.raises(CheckpointError, match="4,194,304 are free"):  # kept for good
        checkpoint.check_room(folder, need, resumed=True)
    checkpoint.check_room(folder, need, resumed=False)
    monkeypatch.setattr(train, "GPT", None)
    with pytest.raises(CheckpointError, match=r"need up to [5-9],\d+,\d+ bytes, 4,1\d+,\d+ are free"):
        train.main(flags(out_dir=small_disk(4 << 20) / "run"))
    with pytest.raises(CheckpointError, match="or a larger --keep_every"):
        train.main(flags("kept", max_iters=10**7, keep_every=4))


def test_an_out_dir_that_cannot_be_written_is_refused_before_the_model_is_built(
    flags, small_disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "GPT", None)
    (tmp_path / "file").touch()
    read_only = small_disk(1 << 20, ",ro")
    for out_dir, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "run", "Not a directory"),
        (read_only / "run", "Read-only file system"),
        (read_only, "Read-only file system"),
    ):
        with pytest.raises(ConfigError, match=rf"out_dir={out_dir}: not writable \({reason}\); choose another"):
            train.main(flags(out_dir=out_dir))


# ---- whether a run may go on


def test_a_run_is_not_replaced_and_other_settings_are_refused_with_both_values(flags, tmp_path):
    train.main(flags(max_iters=4))
    before = files_of(tmp_path / "run", "*")
    with pytest.raises(ConfigError, match=r"holds a run.*--init_from=resume.*--overwrite=True"):
        train.main(flags(init_from="scratch"))
    with pytest.raises(ConfigError) as error:
        train.main(flags(n_layer=1, n_head=4, bias=True, seed=1, block_size=8, gradient_accumulation_steps=8))
    for text in ("n_layer=1 (checkpoint: 2)", "n_head=4 (checkpoint: 2)", "bias=True (checkpoint: False)"):
        assert text in str(error.value)
    assert "seed=1 (checkpoint: 1337)" in str(error.value) and "block_size=8 (checkpoint: 16)" in str(error.value)
    assert "tokens_per_step" not in str(error.value)  # 8 x 2 x 8 = 4 x 2 x 16
    with pytest.raises(ConfigError, match=r"tokens_per_step=64 \(checkpoint: 128\)"):
        train.main(flags(batch_size=1))
    assert files_of(tmp_path / "run", "*") == before


def test_other_data_is_refused_unless_it_is_meant(flags, tiny_data, tmp_path, capsys):
    train.main(flags(max_iters=4))
    write_dataset(tiny_data[0] / "more", train=[np.arange(6000) % 96], val=[np.arange(1500) % 90])
    other = dict(dataset="more", max_iters=8)
    with pytest.raises(ConfigError) as error:
        train.main(flags(**other))
    assert "train_tokens=6000 (checkpoint: 5000)" in str(error.value) and "train_fingerprint" in str(error.value)
    assert "val_tokens" not in str(error.value) and "--allow_new_data=True" in str(error.value)
    with pytest.raises(ConfigError, match="seed=1"):  # that key allows other data alone
        train.main(flags(**other, allow_new_data=True, seed=1))
    train.main(flags(**other, allow_new_data=True))
    assert "other data: 6,000 tokens, before 5,000" in capsys.readouterr().out
    starts = read_metrics(tmp_path / "run", "start")
    assert [line["data"]["train_tokens"] for line in starts] == [5000, 6000]
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["data"]["train_tokens"] == 6000


def test_what_may_change_takes_effect_and_a_jump_of_the_learning_rate_is_reported(flags, tmp_path, capsys):
    train.main(flags(max_iters=4))
    capsys.readouterr()
    train.main(flags(max_iters=4))  # nothing to do, nothing changed
    assert "the learning rate jumps" not in capsys.readouterr().out
    changed = dict(learning_rate=1e-1, max_iters=5, weight_decay=0.3, beta2=0.5, dropout=0.2, log_interval=1)
    changed |= dict(batch_size=1, gradient_accumulation_steps=8, dtype="bfloat16", always_save_checkpoint=False)
    train.main(flags(**changed))
    printed = capsys.readouterr().out
    share = (1 + np.cos(np.pi * 2 / 10)) / 2  # of the way from min_lr to the peak after 2 of 10 steps
    before, after = (1e-3 + share * (peak - 1e-3) for peak in (1e-2, 1e-1))
    assert f"WARNING: the learning rate jumps from {before:.2e} to {after:.2e}: the loss will rise" in printed
    for text in ("weight_decay 0.1 -> 0.3", "beta2 0.95 -> 0.5", "batch_size 2 -> 1", "dropout 0.1 -> 0.2"):
        assert text in printed
    groups = checkpoint.load(tmp_path / "run/ckpt.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.9, 0.5) for group in groups)
    assert read_metrics(tmp_path / "run", "train")[-1]["lr"] == pytest.approx(after) == groups[0]["lr"]


OWNER = """
import sys, time
from onecard import durable
with durable.owned(sys.argv[1], "it"):
    print("owns it", flush=True)
    time.sleep(600)
"""


@POSIX
def test_the_second_training_in_an_out_dir_stops_at_once_and_a_kill_of_the_first_frees_it(flags, start, tmp_path):
    train.main(flags(max_iters=4))
    first, before = start("-c", OWNER, tmp_path / "run/.lock"), files_of(tmp_path / "run", "[cm]*")
    first.wait_for("owns it")
    for init_from in ("auto", "resume", "scratch"):
        owner = rf"out_dir={tmp_path / 'run'} is in use by process {first.process.pid} on"
        with pytest.raises(OwnedError, match=owner):
            train.main(flags(init_from=init_from, overwrite=True))
    assert files_of(tmp_path / "run", "[cm]*") == before and first.process.poll() is None
    first.send(signal.SIGKILL)
    first.process.wait()
    train.main(flags(max_iters=5))
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"] == 5


# ---- kill -9 at each stage of a save

STAGES = """
import os, pathlib, signal, sys
from onecard import checkpoint
from test_checkpoint import some_state

stages = []  # of the third save, in order; before the one numbered `deadly` the process kills itself

def stage(name):
    if saves == 3:
        stages.append(name)
        if len(stages) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name):
    call = getattr(owner, name)
    def wrapped(*args, **keys):
        stage(name)
        return call(*args, **keys)
    setattr(owner, name, wrapped)

def write(self, data):
    for half in (data[: len(data) // 2], data[len(data) // 2 :]):
        if len(data) > 300:  # the other hundred or so are padding
            stage("write")
        self.file.write(half)
        self.file.flush()  # so that a kill leaves what was written
    self.sha256.update(data)
    self.bytes += len(data)
    return len(data)

checkpoint._HashingFile.write = write
for owner, name in ((os, "fsync"), (os, "replace"), (os, "link"), (pathlib.Path, "unlink"), (checkpoint, "verify")):
    before(owner, name)

folder = pathlib.Path(sys.argv[1])
for deadly in range(1, 1000):
    child, saves = os.fork(), 0
    if child == 0:
        out = folder / str(deadly)
        out.mkdir()
        for step in (4, 5, 6):
            saves += 1
            checkpoint.save(out, some_state(step), [checkpoint.BEST] * (step != 5), keep_every=2)
        saves = 0
        (folder / "stages").write_text(" ".join(stages))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(os.WEXITSTATUS(status))
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


@POSIX
def test_killed_at_any_stage_of_a_save_the_newest_whole_checkpoint_loads(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", STAGES, tmp_path], cwd=ROOT, check=True, env=environment)
    stages = (tmp_path / "stages").read_text().split()
    assert {"write", "fsync", "verify", "replace", "link", "unlink"} == set(stages)
    assert stages.count("write") >= 4 and stages.count("link") == 4  # previous, latest, best, step
    renamed = stages.index("replace") + 2  # killed here or later, the new one has its first name
    for deadly in range(1, len(stages) + 1):
        folder = tmp_path / str(deadly)
        where = f"before {stages[deadly - 1]}, stage {deadly} of {len(stages)}"
        state, path, problems = checkpoint.load_newest(folder)
        assert state["iter_num"] == (6 if deadly >= renamed else 5) and not problems, where
        for path in checkpoint.candidates(folder):  # nothing partial has a final name
            assert_is(checkpoint.load(path), some_state(checkpoint.read_trailer(path)[0]))
        checkpoint.durable.remove_leftovers(folder)
        save_all(folder, [7, 8], keep_every=2, best=(8,))  # and the run goes on
        expected = {"ckpt.pt": 8, "ckpt_best.pt": 8, "ckpt_previous.pt": 7, "ckpt_step_000000004.pt": 4}
        found = steps_of(folder)
        assert found.pop("ckpt_step_000000006.pt", 6) == 6
        assert found == expected | {"ckpt_step_000000008.pt": 8}, where
