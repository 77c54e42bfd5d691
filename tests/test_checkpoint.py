"""checkpoint.py: whole or not at all, and which one a run continues from. Damage, full disks and kills are real."""

import contextlib
import hashlib
import itertools
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import zipfile

import numpy as np
import pytest
import runs
import torch
from runs import ROOT, assert_same, assert_same_run, files_of, read_metrics, write_dataset

import sample
import train
from configurator import ConfigError
from onecard import UserError, checkpoint, metrics, plan
from onecard.checkpoint import CheckpointError
from onecard.durable import OwnedError

POSIX = pytest.mark.skipif(os.name != "posix", reason="kills and limits as POSIX has them")


def some_state(step, numbers=1000):
    """What a run saves, small; one tensor occurs twice, like the tied embedding."""
    generator = torch.Generator().manual_seed(step)
    tied = torch.randn(numbers, generator=generator)
    moments = {0: dict(step=torch.tensor(float(step)), exp_avg=torch.randn(7, generator=generator))}
    optimizer = dict(state=moments, param_groups=[dict(lr=1e-3, betas=(0.9, 0.95), params=[0])])
    return dict(iter_num=step, model=dict(wte=tied, lm_head=tied), optimizer=optimizer, model_args={}, config={})


def assert_is(state, expected):
    """Bit for bit, with what `write` and `save` add."""
    assert_same({name: state[name] for name in expected}, expected)
    assert state["version"] == checkpoint.VERSION and state.keys() <= {"version", "launch", *expected}


def save_all(folder, steps, keep_every=0, best=()):
    for step in steps:
        checkpoint.save(folder, some_state(step), [checkpoint.BEST] * (step in best), keep_every)


def steps_of(folder):
    return {path.name: checkpoint.read_trailer(path)[0] for path in sorted(folder.glob("*"))}


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


def test_a_runs_checkpoint_has_nanogpts_keys_and_its_model_is_loaded_for_sampling(flags, tmp_path):
    train.main(flags(max_iters=1, bias=True))
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= state.keys()
    assert {"transformer.h.1.attn.c_attn.weight", "transformer.ln_f.bias", "lm_head.weight"} <= state["model"].keys()
    model, rest = checkpoint.load_model(tmp_path / "run/ckpt.pt")
    assert_same(dict(model.state_dict()), dict(state["model"]))
    assert model.lm_head.weight is model.transformer.wte.weight and not model.training and rest["iter_num"] == 1


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


def test_latest_previous_best_and_every_nth_are_kept_and_the_newest_is_by_step_not_by_file_time(tmp_path):
    save_all(tmp_path, [2, 4, 5, 6, 8, 10], keep_every=4, best=(2, 6))
    kept = {"ckpt_step_000000004.pt": 4, "ckpt_step_000000008.pt": 8}
    assert steps_of(tmp_path) == {"ckpt.pt": 10, "ckpt_best.pt": 6, "ckpt_previous.pt": 8, **kept}
    for name, step in steps_of(tmp_path).items():
        assert_is(checkpoint.load(tmp_path / name), some_state(step))
        os.utime(tmp_path / name, (2e9 - step,) * 2)  # the clock was set back: a later one has an earlier time
    assert checkpoint.load_newest(tmp_path)[0]["iter_num"] == 10
    (tmp_path / "ckpt.pt").unlink()
    assert checkpoint.load_newest(tmp_path)[0]["iter_num"] == 8


def test_an_old_one_loses_its_name_only_when_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    save_all(tmp_path, [1, 2])
    before, verify = files_of(tmp_path), checkpoint.verify

    def damage_and_verify(path):  # a disk that lies
        os.truncate(path, 5000)
        verify(path)

    monkeypatch.setattr(checkpoint, "verify", damage_and_verify)
    with pytest.raises(CheckpointError, match="not a complete"):
        save_all(tmp_path, [3], best=(3,))
    assert before == files_of(tmp_path, "*")


def test_a_users_own_copies_are_never_resumed_from_and_never_deleted(flags, tmp_path, capsys):
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
    capsys.readouterr()
    train.main(flags(max_iters=5))
    assert capsys.readouterr().out.count(f"resuming from {tmp_path}/run/ckpt.pt at step 4\n") == 1
    train.main(flags(max_iters=1, init_from="scratch", overwrite=True))
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"] == 1
    assert {path.read_bytes() for path in copies} == {(tmp_path / "other/ckpt.pt").read_bytes()}
    assert not set(copies) & set(checkpoint.candidates(tmp_path / "run"))


# ---- damage


def test_every_flipped_bit_and_every_cut_is_named_and_the_previous_one_is_loaded(tmp_path):
    save_all(tmp_path, [4, 6])
    path, draw = tmp_path / "ckpt.pt", random.Random(0)
    whole = path.read_bytes()
    trailer = range(len(whole) - checkpoint.TRAILER_BYTES, len(whole))
    flips = [(draw.randrange(len(whole)), draw.randrange(8)) for _ in range(200)]
    flips += [(position, bit) for position in trailer for bit in range(8)]
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at, bit in flips]
    damaged += [whole[:size] for size in (0, 1, 97, 500, len(whole) // 2, len(whole) - 100, len(whole) - 1)]
    for content in damaged:
        path.write_bytes(content)
        state, used, problems = checkpoint.load_newest(tmp_path)
        assert_is(state, some_state(4))
        assert used.name == "ckpt_previous.pt" and len(problems) == 1 and str(path) in problems[0]
    assert checkpoint.newest(tmp_path) == "ckpt_previous.pt of step 4"
    path.write_bytes(whole)
    assert checkpoint.load_newest(tmp_path)[1:] == (path, [])
    os.truncate(path, 1000)
    os.truncate(tmp_path / "ckpt_previous.pt", 1000)
    with pytest.raises(CheckpointError, match=r"/ckpt\.pt: .*/ckpt_previous\.pt: "):
        checkpoint.load_newest(tmp_path)
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("left", [0, 0.5])
def test_a_run_continues_from_the_previous_checkpoint_and_names_the_damaged_one(flags, tmp_path, capsys, left):
    train.main(flags("whole"))
    train.main(flags(max_iters=8))
    (tmp_path / "run/ckpt_best.pt").unlink(missing_ok=True)  # may be the same file
    path = tmp_path / "run/ckpt.pt"
    os.truncate(path, int(left * path.stat().st_size))
    train.main(flags())
    assert re.search(rf"{path}: .*; using ckpt_previous\.pt of step 4 instead", capsys.readouterr().out)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def add_trailer(path):
    """As checkpoint.write does it, to a file of any content."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data + b"onecard step %012d %012d sha256 %s\n" % (4, 4, digest))


def changed_states(state):
    """(what, state) of a later version, with each part removed, with a part of these parts removed."""
    yield "a later version", state | dict(version=checkpoint.VERSION + 1)
    for name in state.keys() - {"tokenizer", "launch"}:
        yield f"without {name}", {key: value for key, value in state.items() if key != name}
    for part in ("model_args", "data", "model"):
        for name in state[part]:
            rest = {key: value for key, value in state[part].items() if key != name}
            yield f"{part} without {name}", state | {part: rest}
    yield "a key of the config of a wrong type", state | dict(config=state["config"] | dict(n_layer="two"))


def test_a_checkpoint_of_a_later_version_or_without_a_part_is_one_line(flags, tmp_path):
    train.main(flags(max_iters=4, n_layer=1, n_embd=8))
    good, path, seen = torch.load(tmp_path / "run/ckpt.pt", weights_only=True), tmp_path / "changed/ckpt.pt", set()
    path.parent.mkdir()
    ours = dict(version=0, iter_num=0, model=0, model_args=0)
    for what, state in changed_states(good):
        torch.save(state, path)
        add_trailer(path)
        actions = [lambda: train.main(flags("changed", n_layer=1, n_embd=8, init_from="resume"))]
        if what.startswith("model") or (what.startswith("without") and what.split()[-1] in ours):
            actions.append(lambda: checkpoint.load_model(path))
        for number, action in enumerate(actions):
            with pytest.raises(UserError, match=re.escape(str(path))) as error:
                action()
            assert "\n" not in str(error.value), what
            seen.add((what, number))
    assert len(seen) > 50


def test_a_folder_in_place_of_a_file_is_one_line(flags, tmp_path):
    (tmp_path / "a/ckpt_best.pt").mkdir(parents=True)
    (tmp_path / "b/metrics.jsonl").mkdir(parents=True)
    for out, name in (("a", "ckpt_best.pt"), ("b", "metrics.jsonl")):
        with pytest.raises(UserError, match=f"{tmp_path}/{out}/{name}: .*: move it away"):
            train.main(flags(out))


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
        add_trailer(path)
        checkpoint.verify(path)  # so torch.load really sees it
    for action in (
        lambda: checkpoint.load(path),
        lambda: checkpoint.load_model(path),
        lambda: train.main(flags(init_from="resume")),
        lambda: train.main(flags(init_from="auto")),
        lambda: sample.main([f"--out_dir={path.parent}", "--device=cpu"]),
    ):
        with pytest.raises(UserError, match=re.escape(str(path))):
            action()
    assert not mark.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert mark.exists()  # the attack is a real one


# ---- disks


@POSIX
@pytest.mark.parametrize("limit", [0, 100, 3000, 150_000])
def test_a_full_disk_is_named_and_harms_nothing_and_the_run_goes_on(flags, small_disk, tmp_path, monkeypatch, limit):
    """limit: of the size of files, in bytes; 0: a disk of 7 MiB is filled up to 64 KiB."""
    folder, save, before = tmp_path if limit else small_disk(7 << 20), checkpoint.save, {}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_and_save(out_dir, state, *rest):
        if state["iter_num"] == 8:
            before.update(files_of(folder / "run"))
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            else:
                (folder / "filler").write_bytes(bytes(shutil.disk_usage(folder).free - 64 * 1024))
        save(out_dir, state, *rest)

    too_large, full = r"File too large, after [\d,]+ bytes\)", r"No space left .*, after [1-9][\d,]+ bytes\); 65,536 "
    reason = too_large if limit else full
    with monkeypatch.context() as patch, pytest.raises(UserError, match=rf"could not be written \({reason}"):
        patch.setattr(checkpoint, "save", fill_and_save)
        train.main(flags(out_dir=folder / "run"))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(folder / "run") == before and not list((folder / "run").glob("*.tmp"))
    (folder / "filler").unlink(missing_ok=True)
    train.main(flags(out_dir=folder / "run"))
    train.main(flags("whole"))
    assert_same_run(tmp_path / "whole", folder / "run")


def test_a_name_that_cannot_be_given_is_reported_and_harms_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    save_all(tmp_path, [1, 2])
    before = files_of(tmp_path, "*")
    monkeypatch.setattr(checkpoint.durable, "second_name", full)
    with pytest.raises(CheckpointError, match=r"/ckpt\.pt: could not be written \(No space left on device"):
        save_all(tmp_path, [3])
    assert files_of(tmp_path, "*") == before


def test_room_for_the_checkpoints_and_those_kept_is_checked_before_the_model_is_built(flags, small_disk, monkeypatch):
    folder, MiB = small_disk(6 << 20), 2**20
    need = plan.checkpoint_bytes(10_000, kept=0)
    assert need == 5 * (12 * 10_000 + MiB)  # latest, previous, best, before_decay and a new one
    checkpoint.check_room(folder, need, keep_every=0)
    (folder / "ckpt.pt").write_bytes(bytes(2 * MiB))
    os.link(folder / "ckpt.pt", folder / "ckpt_best.pt")
    checkpoint.check_room(folder, need, keep_every=0)  # they will be replaced
    with pytest.raises(CheckpointError, match="up to 7,000,000 bytes, 6,291,456 are free"):  # two names of one file
        checkpoint.check_room(folder, 7_000_000, keep_every=0)
    os.rename(folder / "ckpt.pt", folder / "ckpt_step_000000004.pt")
    os.unlink(folder / "ckpt_best.pt")
    checkpoint.check_room(folder, need, keep_every=2)  # `need` counts it
    with pytest.raises(CheckpointError, match=r"4,1.*are free"):  # nobody counts or replaces it
        checkpoint.check_room(folder, need, keep_every=3)
    monkeypatch.setattr(train, "GPT", None)
    with pytest.raises(CheckpointError, match=r"need up to [5-9],\d+,\d+ bytes, 4,1\d+,\d+ are free"):
        train.main(flags(out_dir=small_disk(4 << 20) / "run"))
    with pytest.raises(CheckpointError, match="or a larger --keep_every"):
        train.main(flags("kept", max_iters=10**7, keep_every=4))


def test_an_out_dir_that_cannot_be_written_is_refused_at_once(flags, small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "GPT", None)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "made", tmp_path / "new/run"):  # a mistyped dataset leaves nothing there
        (tmp_path / "made").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="no such folder"):
            train.main(flags(out_dir=folder, dataset="mistyped"))
    assert not list((tmp_path / "made").iterdir()) and not (tmp_path / "new").exists()
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


def test_a_run_that_torchrun_restarts_goes_on_from_its_own_newest_checkpoint(flags, tmp_path, monkeypatch):
    """torchrun starts the same command again. The kills are exceptions that train.py does not know."""
    train.main(flags("whole"))
    train.main(flags(seed=1, max_iters=8))  # the run that is replaced
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none_abc/attempt_0/0/error.json"))
    step, kept = metrics.add_step, []

    def killed(count, owner, name, replacement):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, replacement)
            train.main(flags(init_from="scratch", overwrite=True))

    def kill_in_step(number):
        def wrapped(*numbers):
            kept.append(number)
            if len(kept) == number:
                raise KeyboardInterrupt
            step(*numbers)

        kept.clear()
        return wrapped

    def kill(*_, **__):
        raise KeyboardInterrupt

    killed(0, checkpoint, "remove_all", kill)  # the replaced run is still there
    killed(1, checkpoint.Path, "unlink", kill)  # so it is here, in part
    killed(1, metrics, "add_step", kill_in_step(3))  # before the first save
    assert not checkpoint.candidates(tmp_path / "run")
    killed(2, metrics, "add_step", kill_in_step(6))  # after the save of step 4
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    monkeypatch.setattr(metrics, "add_step", lambda *numbers: kept.append(0) or step(*numbers))
    train.main(flags(init_from="scratch", overwrite=True))
    assert len(kept) == 6 + 8  # steps 5 to 12
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # another torchrun replaces it
    train.main(flags(init_from="scratch", overwrite=True, max_iters=4))
    assert checkpoint.load(tmp_path / "run/ckpt.pt")["iter_num"] == 4


def test_resume_from_beside_a_run_that_is_resumed_is_refused_or_reported(flags, tmp_path, capsys):
    train.main(flags("other", max_iters=8))
    other = dict(resume_from=tmp_path / "other/ckpt.pt")
    with pytest.raises(ConfigError, match=r"init_from=resume and resume_from=.* exclude each other"):
        train.main(flags(init_from="resume", **other))
    for expected in (f"resuming from {tmp_path}/other/ckpt.pt at step 8", "is not used: "):
        train.main(flags(max_iters=9, **other))
        assert expected in capsys.readouterr().out


def test_a_max_iters_below_the_step_that_is_reached_is_refused_and_changes_nothing(flags, tmp_path):
    train.main(flags(max_iters=8))
    before = files_of(tmp_path / "run", "*")
    with pytest.raises(ConfigError, match=r"nothing to do: .*/ckpt.pt is at step 8, max_iters=4: .*raise --max_iters"):
        train.main(flags(max_iters=4))
    assert files_of(tmp_path / "run", "*") == before


def test_a_second_training_in_an_out_dir_stops_at_once_and_changes_nothing(flags, tmp_path):
    """test_durable.py and test_train.py have the kill of the first one, which frees the folder."""
    train.main(flags(max_iters=4))
    before = files_of(tmp_path / "run", "[cm]*")
    with checkpoint.owned(tmp_path / "run"):
        for init_from in ("auto", "resume", "scratch"):
            with pytest.raises(OwnedError, match=f"out_dir={tmp_path}/run is in use by process {os.getpid()} on"):
                train.main(flags(init_from=init_from, overwrite=True))
    assert files_of(tmp_path / "run", "[cm]*") == before


# ---- kill -9 at each stage of a save


def kill_at_every_call(folder):
    """Forks processes that save steps 4, 5 and 6. In folder/n one is killed before the n-th call of the third save."""

    def save_until_killed(out_dir, number):
        save_all(out_dir, [4, 5], keep_every=2, best=(4,))
        runs.kill_before_call(number)
        save_all(out_dir, [6], keep_every=2, best=(6,))

    for number in itertools.count(1):
        out_dir = pathlib.Path(folder, str(number))
        out_dir.mkdir()
        if runs.fork(save_until_killed, out_dir, number) == 0:
            return


@POSIX
def test_killed_at_any_stage_of_a_save_the_newest_whole_checkpoint_loads(start, tmp_path):
    code = "import sys, test_checkpoint; test_checkpoint.kill_at_every_call(sys.argv[1])"
    returned, printed = start("-c", code, tmp_path).end()
    stages = re.findall(r"^killed before (.+)", printed, re.M)
    assert returned == 0 and {"fsync", "verify", "replace", "unlink", "second half of a write"} < set(stages), printed
    assert stages.count("write") >= 2 and stages.count("link") == 3  # previous, best, step
    assert stages.index("fsync") < stages.index("verify") < stages.index("replace")  # on the disk, read back, renamed
    kept = stages.index("replace") + 1  # ckpt_previous.pt has its name
    renamed = stages.index("replace", kept) + 2  # killed here or later, the new one has its first name
    for number, stage in enumerate(stages, start=1):
        folder = tmp_path / str(number)
        state, _, problems = checkpoint.load_newest(folder)
        assert state["iter_num"] == (6 if number >= renamed else 5) and not problems, (number, stage)
        best = 6 if number >= renamed else 4  # it goes on after the evaluation, so the best must have its name already
        assert checkpoint.read_trailer(folder / "ckpt_best.pt")[0] == best, (number, stage)
        for path in checkpoint.candidates(folder):  # nothing partial has a final name
            assert_is(checkpoint.load(path), some_state(checkpoint.read_trailer(path)[0]))
        checkpoint.durable.remove_leftovers(folder)
        save_all(folder, [7, 8], keep_every=2, best=(8,))  # and the run goes on
        expected = {"ckpt.pt": 8, "ckpt_best.pt": 8, "ckpt_previous.pt": 7, "ckpt_step_000000004.pt": 4}
        found = steps_of(folder)
        assert found.pop("ckpt_step_000000006.pt", 6) == 6
        assert found == expected | {"ckpt_step_000000008.pt": 8}, (number, stage)
