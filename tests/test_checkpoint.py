"""Checkpoints: whole or not at all. Damage, full disks and kills are real; a save is killed at each of its stages."""

import contextlib
import copy
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from onecard import checkpoint
from onecard.checkpoint import CheckpointError, Saver
from model import GPT, GPTConfig

ROOT = Path(checkpoint.__file__).parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="kills and limits as POSIX has them")


def some_state(step, numbers=1000):
    """What a run saves, small; a tensor that stands in it twice is one tensor, like the tied embedding."""
    generator = torch.Generator().manual_seed(step)
    tied = torch.randn(numbers, generator=generator)
    moments = {0: dict(step=torch.tensor(float(step)), exp_avg=torch.randn(7, generator=generator))}
    optimizer = dict(state=moments, param_groups=[dict(lr=1e-3, betas=(0.9, 0.95), params=[0])])
    return dict(iter_num=step, model=dict(wte=tied, lm_head=tied), optimizer=optimizer)


def assert_is(state, expected):
    """Bit for bit, with the version that `write` adds."""
    flat, spec = torch.utils._pytree.tree_flatten({"version": checkpoint.VERSION, **expected})
    found, found_spec = torch.utils._pytree.tree_flatten(state)
    assert found_spec == spec
    for a, b in zip(found, flat, strict=True):
        assert type(a) is type(b) and (torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b)


def save_all(folder, steps, keep_every=0, best=()):
    saver = Saver(folder, keep_every)
    for step in steps:
        saver.save(some_state(step), ["ckpt_best.pt"] * (step in best))
    saver.close()


def steps_of(folder):
    return {path.name: checkpoint.read_trailer(path)[0] for path in sorted(folder.glob("*"))}


def flip(path, position, bit):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


# ---- what is written is what is loaded


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path):
    checkpoint.write(tmp_path / "ckpt.pt", some_state(3))
    assert_is(checkpoint.load(tmp_path / "ckpt.pt"), some_state(3))
    assert_is(torch.load(tmp_path / "ckpt.pt", weights_only=True), some_state(3))  # the trailer is in nobody's way
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_a_tensor_that_stands_twice_is_written_once(tmp_path):
    save_all(tmp_path, [3])
    state = checkpoint.load(tmp_path / "ckpt.pt")
    assert state["model"]["wte"].data_ptr() == state["model"]["lm_head"].data_ptr()
    with zipfile.ZipFile(tmp_path / "ckpt.pt") as file:
        assert [info.file_size for info in file.infolist()].count(4000) == 1


def test_training_goes_on_while_a_checkpoint_is_written_and_cannot_change_it(tmp_path, monkeypatch):
    go_on, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: go_on.wait(60) and write(*args))
    state, saver = some_state(1), Saver(tmp_path)
    expected = copy.deepcopy(state)
    saver.save(state)  # returns although nothing has been written
    assert not list(tmp_path.glob("*"))
    state["model"]["wte"].zero_()
    state["optimizer"]["state"][0]["exp_avg"].add_(1)
    go_on.set()
    saver.close()
    assert_is(checkpoint.load(tmp_path / "ckpt.pt"), expected)


def test_a_snapshot_is_the_state_of_its_time_in_the_memory_of_the_one_before():
    state, memory = some_state(1), {}
    first = checkpoint.snapshot(state, memory)
    assert torch.equal(first["model"]["wte"], state["model"]["wte"])
    assert first["model"]["lm_head"] is first["model"]["wte"] is not state["model"]["wte"]
    for moment in range(3):
        state["model"]["wte"].fill_(moment)
        again = checkpoint.snapshot(state, memory)
        assert again["model"]["wte"] is first["model"]["wte"] and again["model"]["wte"].eq(moment).all()
        assert_is({"version": checkpoint.VERSION, **again}, state)
    assert len(memory) == 3  # a tensor that stands in it twice is one


def test_latest_previous_best_and_every_nth_are_kept(tmp_path):
    save_all(tmp_path, [2, 4, 5, 6, 8, 10], keep_every=4, best=(2, 6))
    kept = {"ckpt_step_000000004.pt": 4, "ckpt_step_000000008.pt": 8}
    assert steps_of(tmp_path) == {"ckpt.pt": 10, "ckpt_best.pt": 6, "ckpt_previous.pt": 8, **kept}
    for name, step in steps_of(tmp_path).items():
        assert_is(checkpoint.load(tmp_path / name), some_state(step))


def test_an_old_one_loses_its_name_only_when_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    save_all(tmp_path, [1, 2])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    verify = checkpoint.verify

    def flip_and_verify(path):  # the disk that lies: what it was given is not what it has
        flip(path, 700, 3)
        verify(path)

    monkeypatch.setattr(checkpoint, "verify", flip_and_verify)
    saver = Saver(tmp_path)
    saver.save(some_state(3), ["ckpt_best.pt"])
    with pytest.raises(CheckpointError, match="damaged"):
        saver.close()
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_newest_is_by_step_and_not_by_the_time_of_the_file(tmp_path):
    save_all(tmp_path, [1, 2, 3], best=(1,))
    for days, name in enumerate(("ckpt.pt", "ckpt_previous.pt", "ckpt_best.pt")):  # the clock has been set back
        os.utime(tmp_path / name, (1e9 + 86400 * days,) * 2)
    assert checkpoint.load_newest(tmp_path)[0]["iter_num"] == 3
    (tmp_path / "ckpt.pt").unlink()
    assert checkpoint.load_newest(tmp_path)[0]["iter_num"] == 2


# ---- damage


def test_of_200_flipped_bits_200_are_noticed(tmp_path):
    path, draw = tmp_path / "ckpt.pt", random.Random(0)
    checkpoint.write(path, some_state(6))
    size, noticed = path.stat().st_size, 0
    for _ in range(200):
        position, bit = draw.randrange(size), draw.randrange(8)
        flip(path, position, bit)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            checkpoint.load(path)
        noticed += 1
        flip(path, position, bit)
    assert noticed == 200
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
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.load_newest(tmp_path / "none")


# ---- an attacker's file


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def with_trailer(path, step=9):
    """An attacker writes the right SHA-256 too."""
    data, digest = path.read_bytes(), checkpoint.hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(data + b"onecard step %012d %012d sha256 %s\n" % (step, step, digest.encode()))


@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy", "without trailer"])
def test_nothing_of_an_attackers_file_runs(tmp_path, kind):
    path, mark = tmp_path / "ckpt.pt", tmp_path / "mark"
    state = {**some_state(9), "config": Attack(str(mark))}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind != "without trailer":
        with_trailer(path)
        checkpoint.verify(path)  # so that torch.load really sees it
    for load in (checkpoint.load, checkpoint.load_model):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load(path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        checkpoint.load_newest(tmp_path)
    assert not mark.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert mark.exists()  # the attack is a real one


def test_a_model_saved_is_the_model_loaded(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
    state = dict(iter_num=1, model=model.state_dict(), model_args=vars(model.config), best_val_loss=float("inf"))
    checkpoint.write(tmp_path / "ckpt.pt", state)
    loaded, rest = checkpoint.load_model(tmp_path / "ckpt.pt")
    idx = torch.arange(8)[None]
    assert torch.equal(loaded(idx), model.eval()(idx)) and not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight and rest["best_val_loss"] == float("inf")


# ---- a full disk


def assert_unharmed(folder, before):
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "filler"}


def test_a_full_disk_in_a_save_is_named_and_harms_nothing(small_disk):
    folder = small_disk(2 << 20)
    save_all(folder, [1, 2])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with open(folder / "filler", "wb") as file:
        file.write(bytes(shutil.disk_usage(folder).free - 100_000))
    saver = Saver(folder)
    saver.save(some_state(3, numbers=50_000), ["ckpt_best.pt"])
    message = r"ckpt_new\.pt: could not be written \(No space left on device, after [\d,]+ bytes\); 98,304 bytes are"
    with pytest.raises(CheckpointError, match=message):
        saver.close()
    assert_unharmed(folder, before)
    (folder / "filler").unlink()
    save_all(folder, [4])
    assert steps_of(folder) == {"ckpt.pt": 4, "ckpt_previous.pt": 2}


@POSIX
@pytest.mark.parametrize("size", [100, 3000, 150_000, 200_000])
def test_a_limit_on_the_size_of_files_is_named_and_harms_nothing(tmp_path, size):
    save_all(tmp_path, [1, 2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        saver = Saver(tmp_path)
        saver.save(some_state(3, numbers=50_000), ["ckpt_best.pt"])  # 203 kB
        saver.thread.shutdown()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(CheckpointError, match=r"ckpt_new\.pt: could not be written \(File too large"):
        saver.poll()
    assert_unharmed(tmp_path, before)


def test_a_failed_save_is_said_at_the_next_call(tmp_path):
    shutil.rmtree(tmp_path)
    for call in ("poll", "wait", "close", "save"):
        saver = Saver(tmp_path)
        saver.save(some_state(3))
        saver.thread.shutdown()
        with pytest.raises(CheckpointError, match="No such file or directory"):
            getattr(saver, call)(*(some_state(4),) * (call == "save"))


def test_names_that_cannot_be_given_are_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    save_all(tmp_path, [1])
    monkeypatch.setattr(checkpoint.durable, "second_name", full)
    saver = Saver(tmp_path)
    saver.save(some_state(2))
    with pytest.raises(CheckpointError, match=r"ckpt\.pt: could not be written \(No space left on device"):
        saver.close()
    assert checkpoint.load_newest(tmp_path)[0]["iter_num"] == 2  # whole, under the name of an unfinished save


def test_room_for_the_checkpoints_and_those_kept_is_asked_for_before_the_run(small_disk):
    folder = small_disk(6 << 20)
    checkpoint.check_room(folder, 10_000, steps=100, keep_every=0, resumed=False)
    need = 7 * (12 * 10_000 + 2**20)  # latest, previous, best, before_decay, a new one, and two to keep
    with pytest.raises(CheckpointError, match=rf"need {need:,} bytes at their most, 6,291,456 are free.*--keep_every"):
        checkpoint.check_room(folder, 10_000, steps=100, keep_every=50, resumed=False)
    (folder / "ckpt.pt").write_bytes(bytes(2 << 20))
    os.link(folder / "ckpt.pt", folder / "ckpt_best.pt")
    checkpoint.check_room(folder, 10_000, steps=100, keep_every=0, resumed=True)  # they will be replaced
    with pytest.raises(CheckpointError, match=r"6,291,456 are free"):  # two names of one file make its room once
        checkpoint.check_room(folder, 50_000, steps=100, keep_every=0, resumed=False)
    os.link(folder / "ckpt.pt", folder / "ckpt_step_000000100.pt")
    with pytest.raises(CheckpointError, match=r"4,194,304 are free"):  # kept for good
        checkpoint.check_room(folder, 10_000, steps=100, keep_every=0, resumed=True)
    checkpoint.check_room(folder, 10_000, steps=100, keep_every=0, resumed=False)


# ---- kill -9 at each stage of a save

STAGES = """
import os, pathlib, signal, sys
from onecard import checkpoint, durable
from test_checkpoint import some_state

stages = []  # of the second save, in order; before the one numbered `deadly` the process kills itself

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
        self.file.flush()  # so that a kill leaves what has been written
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
        saver = checkpoint.Saver(out, keep_every=2)
        for step in (4, 5, 6):
            saves += 1
            saver.save(some_state(step), ["ckpt_best.pt"] * (step != 5))
            saver.wait()
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
        assert_is(state, some_state(state["iter_num"]))
        for path in checkpoint.candidates(folder):  # nothing partial bears a final name
            assert_is(checkpoint.load(path), some_state(checkpoint.read_trailer(path)[0]))
        checkpoint.durable.remove_leftovers(folder)
        save_all(folder, [7, 8], keep_every=2, best=(8,))  # and life goes on
        expected = {"ckpt.pt": 8, "ckpt_best.pt": 8, "ckpt_previous.pt": 7, "ckpt_step_000000004.pt": 4}
        found = steps_of(folder)
        assert found.pop("ckpt_step_000000006.pt", 6) == 6
        assert found == expected | {"ckpt_step_000000008.pt": 8}, where
