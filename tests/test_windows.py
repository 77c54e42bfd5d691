"""The windows of a run and their order: permutations by chi-square, hand-made datasets, files that change in use."""

import hashlib
import math
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from runs import write_dataset

from onecard import shards
from onecard.shards import ShardError, ShardWriter, open_tokens
from onecard.windows import OPEN_FILES, Windows, open_windows, shuffled


@pytest.fixture
def dataset(tmp_path):
    """A function: splits, train=[ids of a shard, ...] -> the folder of a finished dataset of them."""
    return lambda name="docs", **splits: write_dataset(tmp_path / name, **splits) or tmp_path / name


def test_consecutive_integers_give_targets_one_above_inputs_and_windows_at_multiples(dataset):
    folder = dataset(train=[range(100), range(1000, 1051)], val=[range(20)])
    windows = Windows(folder, "train", block_size=10)
    assert (windows.tokens, len(windows), windows.text_bytes) == (151, 9 + 5, 4 * 151)
    rows = windows.rows(range(14)).astype(int)
    assert rows.shape == (14, 11) and (rows[:, 1:] == rows[:, :-1] + 1).all()
    assert rows[:, 0].tolist() == [*range(0, 90, 10), *range(1000, 1050, 10)]
    for block_size, count in ((5, 3), (9, 2), (10, 1), (18, 1), (19, 1)):  # (tokens - 1) // block_size
        assert len(Windows(folder, "val", block_size)) == count


def test_each_epoch_has_every_window_once_in_an_order_of_seed_and_epoch_alone(dataset):
    folder, orders = dataset(train=[range(1000), range(2000, 2777), range(5)]), set()
    for seed in (5, 6):
        windows = Windows(folder, "train", 7, seed=seed)
        whole = windows.batch(0, 3 * len(windows))
        parts = [windows.batch(first, 3) for first in range(0, len(whole), 3)]
        assert np.array_equal(whole, np.concatenate(parts))
        starts = windows.rows(range(len(windows)))[:, 0].tolist()
        for order in whole[:, 0].reshape(3, -1).tolist():
            assert sorted(order) == sorted(starts)
            orders.add(tuple(order))
    assert len(orders) == 6


def test_the_fingerprint_is_of_the_tokens_and_not_of_the_block_size(dataset):
    one = dataset("one", train=[range(300)], val=[range(50)])
    same = dataset("same", train=[range(300)], val=[range(90)])
    other = dataset("other", train=[[*range(299), 0]], val=[range(50)])
    prints = [Windows(folder, "train", 10).fingerprint for folder in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert Windows(one, "train", 20).fingerprint == prints[0]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("name", ["{}.bin", "TinyStories_{}.bin", "fineweb_{}_000001.bin fineweb_{}_000002.bin"])
def test_datasets_made_by_others_are_found_by_their_names(tmp_path, name, header):
    names = {split: name.format(split, split).split() for split in ("train", "val")}
    for number, name in enumerate(names["train"] + names["val"]):
        ids = np.arange(1000 * number, 1000 * number + 100, dtype=np.uint16)
        ids.tofile(tmp_path / name)
        if header:
            with ShardWriter(tmp_path / name) as shard:
                shard.write(ids)
        assert open_tokens(tmp_path / name).tolist() == ids.tolist()
    for split, first in (("train", 0), ("val", 1000 * len(names["train"]))):
        windows = Windows(tmp_path, split, 9)
        assert [shard.path.name for shard in windows.shards] == names[split]
        assert windows.text_bytes is None
        assert windows.rows([0])[0].tolist() == list(range(first, first + 10))


def test_both_splits_are_opened_with_one_look_at_each_file(dataset, monkeypatch):
    folder, looked, layout = dataset(train=[range(9)] * 3, val=[range(9)]), [], shards.layout
    alone = [Windows(folder, split, 4, 7).fingerprint for split in ("train", "val")]
    monkeypatch.setattr(shards, "layout", lambda path: looked.append(path.name) or layout(path))
    assert [windows.fingerprint for windows in open_windows(folder, 4, 7)] == alone
    assert sorted(looked) == [*(f"train_{number:06d}.bin" for number in range(3)), "val_000000.bin"]


@pytest.mark.parametrize("harm", ["another", "short", "removed"])
def test_a_shard_that_is_cut_short_or_removed_is_named_at_the_start_and_while_in_use(dataset, harm):
    windows = Windows(dataset(train=[range(5000)], val=[range(100)]), "train", 10)
    path = windows.folder / "train_000000.bin"
    if harm == "another":
        with ShardWriter(path) as shard:  # whole
            shard.write(np.arange(4000, dtype=np.uint16))
        message, in_use = r"holds 4,000 tokens and .*manifest\.json says 5,000", "was cut short"
    elif harm == "short":
        assert windows.rows([len(windows) - 1])[0, -1] == 4990  # a memory map would end the process with SIGBUS
        os.truncate(path, 9000)
        message, in_use = r"9,000 bytes, expected 11,024", "was cut short"
    else:
        path.unlink()
        message = in_use = r"cannot be read \(No such file"
    for split in ("train", "val"):  # all shards are looked at before any is read
        with pytest.raises(ShardError, match=rf"train_000000\.bin: {message}"):
            Windows(windows.folder, split, 10)
    with pytest.raises(ShardError, match=rf"train_000000\.bin: {in_use}"):
        windows.rows([len(windows) - 1])


@pytest.mark.parametrize("has_pread", [True, False])
def test_300_shards_are_read_by_threads_and_forked_processes_with_few_files_open(tmp_path, monkeypatch, has_pread):
    """Under a limit of 200 open files: macOS has 256. has_pread: Windows has no pread."""
    for number in range(300):
        np.arange(number, number + 41, dtype=np.uint16).tofile(tmp_path / f"train_{number:06d}.bin")
    windows = Windows(tmp_path, "train", 10)
    opened, limits = len(os.listdir("/dev/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    if not has_pread:
        monkeypatch.delattr(os, "pread")
    try:
        with ThreadPoolExecutor(4) as threads:
            batches = list(threads.map(windows.batch, range(0, 2400, 24), [24] * 100))
        child = os.fork() if has_pread else 0
        whole = windows.batch(0, 2400)
        if has_pread and child == 0:  # it reads with the descriptors of its parent, at the same time
            os._exit(int(not np.array_equal(whole, np.concatenate(batches))))
        assert not child or os.waitpid(child, 0)[1] == 0
        assert len(os.listdir("/dev/fd")) - opened <= OPEN_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    order = shuffled(np.arange(2400), 1200, 0)
    assert np.array_equal(whole, np.concatenate(batches)) and (np.diff(whole.astype(int)) == 1).all()
    assert whole[:, 0].tolist() == (order // 4 + order % 4 * 10).tolist()


def test_an_id_outside_the_vocabulary_is_named_by_shard_and_position(dataset):
    ids = np.zeros(1000, dtype=np.uint16)
    ids[777] = 50304
    folder = dataset(train=[np.zeros(500), ids])
    windows = Windows(folder, "train", 10, vocab_size=50304)
    with pytest.raises(ShardError, match=r"train_000001\.bin: token 50304 at position 777 .* 50,304: .*--verify"):
        windows.rows(range(len(windows)))
    assert Windows(folder, "train", 10).rows(range(len(windows))).max() == 50304


def test_too_few_tokens_come_with_a_remedy(dataset):
    folder = dataset(train=[range(10)], val=[])
    for split, message in (
        ("train", r"train split has 10 tokens .*prepare more text, or use --block_size=9"),
        ("val", r"val split has 0 tokens in 0 files.* larger val_fraction"),
    ):
        with pytest.raises(ShardError, match=message):
            Windows(folder, split, 10)


def test_ten_billion_tokens_are_opened_without_reading_them(tmp_path):
    """A hundred sparse files of 200 MB that take no space."""
    for number in range(100):
        with open(tmp_path / f"train_{number:06d}.bin", "wb") as file:
            file.truncate(200_000_000)
    windows = Windows(tmp_path, "train", 1024, vocab_size=50304)
    assert windows.tokens == 10**10 and windows.batch(10**9, 16).shape == (16, 1025)


@pytest.mark.parametrize(
    "windows",
    [1, 2, 3, 4, 5, 7, 10, 101, 1000, 65537, 99991, 1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)],
)
def test_in_an_epoch_each_window_is_read_once_and_many_are_in_no_order(windows):
    places = np.arange(windows)
    for epoch in (0, 1, 12345):
        order = shuffled(places + epoch * windows, windows, seed=1337)
        assert (np.bincount(order, minlength=windows) == 1).all()
    if windows >= 1_000_000:
        for a, b in ((order, places), *((order[:-shift], order[shift:]) for shift in (1, 2, 1000))):
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(windows)  # of a random order: 0, deviation 1 / sqrt(n)


def chi_square(counts, expected):
    """How many standard deviations the chi-square statistic lies above its mean (normal for many cells)."""
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("windows", [2, 3, 4, 5, pytest.param(6, marks=pytest.mark.slow)])
def test_all_orders_of_a_few_windows_are_equally_likely(windows):
    orders = []
    for seed in range(15 * math.factorial(windows)):
        orders += shuffled(np.arange(windows * 20), windows, seed).reshape(20, windows).tolist()
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert counts.size == math.factorial(windows)
    assert abs(chi_square(counts, len(orders) / counts.size)) < 5


@pytest.mark.parametrize("windows", [97, 100_003])
def test_every_window_is_as_likely_at_every_place(windows):
    """Place in the epoch against window, both in 16 cells, over 200 epochs of each of 5 seeds."""
    places, cells = np.linspace(0, windows - 1, min(windows, 400)).astype(np.int64), np.zeros((16, 16))
    for seed in range(5):
        for epoch in range(200):
            order = shuffled(places + epoch * windows, windows, seed)
            np.add.at(cells, (places * 16 // windows, order * 16 // windows), 1)
    rows = np.bincount(places * 16 // windows, minlength=16) / places.size
    columns = np.bincount(np.arange(windows) * 16 // windows, minlength=16) / windows
    assert abs(chi_square(cells, np.outer(rows, columns) * cells.sum())) < 6


def test_the_order_is_the_same_forever():
    """Golden figures, so that a run goes on with its data under any later version of numpy or of this file. They were
    also computed with Python's integers, from splitmix64's definition."""
    assert shuffled(np.arange(8), 1000, 1337).tolist() == [115, 835, 803, 430, 971, 853, 387, 140]
    ks = [0, 1, 999, 1000, 123_456_789, 2**40]
    assert shuffled(ks, 2, 3).tolist() == [1, 0, 0, 1, 0, 1]
    assert shuffled(ks, 777, 1337).tolist() == [217, 131, 124, 443, 233, 530]
    assert shuffled(ks, 10**7, 2**64 - 1).tolist() == [2473374, 1122120, 44932, 5224381, 8039996, 8319879]
    order = shuffled(np.arange(20_000), 9999, 42).astype("<i8")
    assert hashlib.sha256(order.tobytes()).hexdigest().startswith("5b2c402807cfc2fed29581e23c8a91d9")
