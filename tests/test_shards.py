"""Token files and the order of a run: layout byte by byte, permutations by chi-square, hand-made datasets."""

import hashlib
import json
import math
import os
import resource
import struct

import numpy as np
import pytest
from runs import write_dataset

from onecard import shards
from onecard.shards import ShardError, ShardWriter, Windows, check_shard, open_tokens, shuffled


def write_shard(path, ids):
    with ShardWriter(path) as shard:
        for part in np.array_split(np.asarray(ids, dtype=np.uint16), 3):
            shard.write(part)
    return shard


@pytest.fixture
def dataset(tmp_path):
    """A function: splits, train=[ids of a shard, ...] -> the folder of a finished dataset of them."""
    return lambda name="docs", **splits: write_dataset(tmp_path / name, **splits) or tmp_path / name


def test_a_shard_is_llm_c_s_layout_byte_by_byte(tmp_path):
    path = tmp_path / "a.bin"
    shard = write_shard(path, [50256, 1, 2, 300])
    content = path.read_bytes()
    assert content == struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + struct.pack("<4H", 50256, 1, 2, 300)
    assert shard.sha256 == hashlib.sha256(content).hexdigest() and shard.tokens == 4
    assert open_tokens(path).tolist() == [50256, 1, 2, 300] and not open_tokens(path).flags.writeable


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        ([20240520, 1, 1000], 3023, "3,023 bytes, expected 3,024 for the 1,000 tokens"),
        ([20240520, 1, 1000], 4048, "4,048 bytes, expected 3,024"),
        ([20240520, 1, 0], 1024, "0 tokens"),
        ([20240520, 2, 0], 1024, "version 2"),
        ([20240801, 7, 1], 1028, "Llama 3"),
        ([], 0, "0 bytes, expected 0 for the 0 tokens"),
        ([], 3, "3 bytes, expected 2 for the 1 tokens"),
    ],
)
def test_a_file_of_the_wrong_size_or_format_is_refused(tmp_path, words, size, message):
    (tmp_path / "a.bin").write_bytes(struct.pack(f"<{len(words)}i", *words))
    os.truncate(tmp_path / "a.bin", size)
    with pytest.raises(ShardError, match=rf"a\.bin: .*{message}"):
        open_tokens(tmp_path / "a.bin")


def test_check_shard_names_what_differs_from_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 4)
    shard = write_shard(tmp_path / "a.bin", [50256, 1, 50256, 0, 300, 7])
    facts = {"tokens": 6, "sha256": shard.sha256, "documents": 2, "n_vocab": 50257, "eot": 50256}
    check_shard(shard.path, facts, facts)
    for change, message in (
        ({"tokens": 5}, "tokens 6, expected 5"),
        ({"sha256": "0"}, f"SHA-256 {shard.sha256}, expected 0"),
        ({"documents": 1}, "separators 2, expected 1"),
        ({"eot": 300, "documents": 1}, "first token 50256, expected 300"),
        ({"n_vocab": 50256}, "largest token 50256, expected 50255"),
    ):
        with pytest.raises(ShardError, match=rf"a\.bin: damaged: {message}; .*prepare\.py"):
            check_shard(shard.path, facts | change, facts | change)


def test_a_manifest_is_whole_or_an_error(dataset, tmp_path):
    assert shards.read_manifest(tmp_path) is None
    path = dataset(train=[range(9)]) / "manifest.json"
    content = path.read_text()
    manifest = json.loads(content)
    edits = [("text_bytes", "bytes"), (": 36", ': "x"'), ('"train"', '"test"'), ('"version": 1', '"tokens": 8')]
    edited = [content.replace(*edit) for edit in edits]
    twice = json.dumps(manifest | {"shards": manifest["shards"] * 2})
    for damaged in ("", "[]", "null", content[:-20], twice, *edited):
        path.write_text(damaged)
        with pytest.raises(ShardError, match=r"manifest\.json: damaged .*; delete it and run prepare\.py again"):
            shards.read_manifest(path.parent)


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
        write_shard(tmp_path / name, ids) if header else ids.tofile(tmp_path / name)
        assert open_tokens(tmp_path / name).tolist() == ids.tolist()
    for split, first in (("train", 0), ("val", 1000 * len(names["train"]))):
        windows = Windows(tmp_path, split, 9)
        assert [shard.path.name for shard in windows.shards] == names[split]
        assert windows.tokenizer is None and windows.text_bytes is None
        assert windows.rows([0])[0].tolist() == list(range(first, first + 10))


def test_a_shard_that_is_cut_short_or_removed_is_named_at_the_start_and_while_in_use(dataset):
    windows = Windows(dataset(train=[range(5000)], val=[range(100)]), "train", 10)
    path = windows.folder / "train_000000.bin"
    write_shard(path, range(4000))  # whole, but another
    for harm, message, in_use in (
        (lambda: None, r"holds 4,000 tokens and .*manifest\.json says 5,000", "was cut short"),
        (lambda: os.truncate(path, 9000), r"9,000 bytes, expected 9,024", "was cut short"),
        (path.unlink, "no such file", r"cannot be read \(No such file"),
    ):
        harm()
        for split in ("train", "val"):  # all shards are looked at before any is read
            with pytest.raises(ShardError, match=rf"train_000000\.bin: {message}"):
                Windows(windows.folder, split, 10)
        with pytest.raises(ShardError, match=rf"train_000000\.bin: {in_use}"):
            windows.rows([len(windows) - 1])


def test_2000_shards_are_read_and_checked_under_a_limit_of_256_open_files(tmp_path):
    shard = write_shard(tmp_path / "train_000000.bin", range(11))
    facts = {"tokens": 11, "sha256": shard.sha256, "documents": 1, "n_vocab": 11, "eot": 0}
    for number in range(1, 2000):
        (tmp_path / f"train_{number:06d}.bin").hardlink_to(shard.path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        windows = Windows(tmp_path, "train", 10)
        assert (windows.batch(0, 2000) == np.arange(11)).all()
        for shard in windows.shards:
            check_shard(shard.path, facts, facts)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_id_outside_the_vocabulary_is_named_by_shard_and_position(dataset):
    ids = np.zeros(1000, dtype=np.uint16)
    ids[777] = 50304
    folder = dataset(train=[np.zeros(500), ids])
    windows = Windows(folder, "train", 10, vocab_size=50304)
    with pytest.raises(ShardError, match=r"train_000001\.bin: token 50304 at position 777 .* 50,304: .*--verify"):
        windows.rows(range(len(windows)))
    assert Windows(folder, "train", 10).rows(range(len(windows))).max() == 50304


def test_too_few_tokens_and_no_dataset_come_with_a_remedy(dataset, tmp_path):
    dataset("small", train=[range(10)], val=[])
    (tmp_path / "begun" / ".prepare").mkdir(parents=True)
    (tmp_path / "begun" / ".prepare" / "plan.json").write_text("{}")
    for folder, split, message in (
        ("small", "train", r"train split has 10 tokens .*prepare more text, or use --block_size=9"),
        ("small", "val", r"val split has 0 tokens in 0 files.* larger val_fraction"),
        ("none", "train", r"has begun, small\. To make it: python prepare\.py FILES --dataset=none"),
        ("smal", "train", r"did you mean small\? To make it: "),
        ("begun", "train", r"not finished here; run it again"),
    ):
        with pytest.raises(ShardError, match=message):
            Windows(tmp_path / folder, split, 10)


def test_opening_ten_billion_tokens_reads_headers_only(dataset, monkeypatch):
    """Sparse files of the real size: a hundred shards of 100M tokens, 20 GB that take no space."""
    folder = dataset(train=[range(9)] * 100)
    for path in folder.glob("*.bin"):
        path.write_bytes(struct.pack("<3i", 20240520, 1, 100_000_000))
        os.truncate(path, 1024 + 200_000_000)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens": 9,', '"tokens": 100000000,'))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_tokens", None)  # opening does not call it
        windows = Windows(folder, "train", 1024, vocab_size=50304)
    assert windows.tokens == 10_000_000_000 and windows.batch(10**9, 16).shape == (16, 1025)


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
