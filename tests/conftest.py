"""What the tests share: few threads, tiny datasets made by the project's own writer, and small disks."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from onecard.shards import ShardWriter, write_manifest

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture
def tiny_data(tmp_path):
    """-> (data_dir, name): 5,000 train and 1,500 val tokens below 96, in a learnable pattern, two shards each."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    shards = []
    for split, tokens in (("train", 2500), ("val", 750)):
        for i in range(2):
            ids = (np.cumsum(rng.integers(1, 4, tokens)) % 96).astype(np.uint16)
            with ShardWriter(folder / f"{split}_{i:06d}.bin") as shard:
                shard.write(ids)
            row = dict(name=shard.path.name, split=split, tokens=tokens, documents=1, text_bytes=4 * tokens)
            shards.append(row | dict(sha256=shard.sha256, source="made up", row_groups=[0, 1]))
    tokenizer = dict(name="made up", sha256="0" * 64, n_vocab=96, eot=0)
    write_manifest(folder, dict(version=1, tokenizer=tokenizer, shards=shards, skipped={}, settings={}))
    return folder.parent, "tiny"


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
