"""What the tests share: few threads, a tiny dataset and tiny runs on it, processes that end with their test, disks."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from runs import TINY, Watched, flags_of, write_dataset

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture
def tiny_data(tmp_path):
    """(data_dir, name): 5,000 train and 1,500 val tokens below 96, in a learnable pattern, two shards each.

    From a generator whose numbers never change: the runs in tests/data/old_* were trained on these tokens.
    """
    draw = np.random.RandomState(0)
    shards = [np.cumsum(draw.randint(1, 4, tokens)) % 96 for tokens in (2500, 2500, 750, 750)]
    write_dataset(tmp_path / "data" / "tiny", train=shards[:2], val=shards[2:])
    return tmp_path / "data", "tiny"


@pytest.fixture
def flags(tiny_data, tmp_path):
    """A function: keys -> the command line of a tiny run in tmp_path/`out`, which is resumed if it has begun."""
    tiny = TINY | dict(max_iters=12, lr_decay_iters=12, eval_interval=4, log_interval=3, init_from="auto")

    def build(out="run", **keys):
        data_dir, dataset = tiny_data
        return flags_of(**tiny | dict(data_dir=data_dir, dataset=dataset, out_dir=tmp_path / out) | keys)

    return build


@pytest.fixture
def start():
    """A function: arguments of Python -> runs.Watched. It is killed at the end of the test."""
    started = []

    def build(*command):
        started.append(Watched(command))
        return started[-1]

    yield build
    for watched in started:
        watched.process.kill()
        watched.process.wait()


@pytest.fixture
def small_disk(tmp_path):
    """A function: bytes -> a folder on a real file system of that size; skips where mounting is not allowed."""
    mounted = []

    def mount(size, options=""):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)
