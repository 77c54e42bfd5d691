"""Token files and the order of a run: layout byte by byte, permutations by chi-square, hand-made datasets."""

import hashlib
import json
import math
import struct

import numpy as np
import pytest

from onecard import shards
from onecard.shards import ShardError, ShardWriter, Windows, open_tokens, read_manifest, shuffled, write_manifest

TOKENIZER = {"name": "gpt2", "sha256": "0", "n_vocab": 50257, "eot": 50256}


def write_shard(path, ids):
    with ShardWriter(path) as shard:
        for part in np.array_split(np.asarray(ids, dtype=np.uint16), 3):
            shard.write(part)
    return shard


def make_dataset(folder, **splits):
    """A dataset of shards with the given ids: train=[ids, ids], val=[ids]."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for split, parts in splits.items():
        for number, ids in enumerate(parts):
            shard = write_shard(folder / f"{split}_{number:06d}.bin", ids)
            entry = {"name": shard.path.name, "split": split, "tokens": shard.tokens, "sha256": shard.sha256}
            entries.append(entry | {"documents": 1, "text_bytes": 5 * shard.tokens})
    write_manifest(folder, {"version": 1, "tokenizer": TOKENIZER, "shards": entries})
    return folder


# ---- files -------------------------------------------------------------------------------------------------


def test_a_shard_is_llm_c_s_layout_byte_by_byte(tmp_path):
    shard = write_shard(tmp_path / "a.bin", [50256, 1, 2, 300])
    content = (tmp_path / "a.bin").read_bytes()
    assert content == struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + struct.pack("<4H", 50256, 1, 2, 300)
    assert shard.sha256 == hashlib.sha256(content).hexdigest() and shard.tokens == 4
    assert open_tokens(tmp_path / "a.bin").tolist() == [50256, 1, 2, 300]
    assert not open_tokens(tmp_path / "a.bin").flags.writeable
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_nanogpts_file_without_a_header_is_read(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert open_tokens(tmp_path / "train.bin").tolist() == list(range(1000))


@pytest.mark.parametrize("change", [-1, -2, -1500, 1, 2, 1024])
def test_a_shard_of_the_wrong_size_is_named_with_both_sizes(tmp_path, change):
    write_shard(tmp_path / "a.bin", range(1000))
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(ShardError, match=rf"a\.bin: {len(content) + change:,} bytes, expected 3,024"):
        open_tokens(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes is no whole number"),
        (b"123", "3 bytes is no whole number"),
        (struct.pack("<256i", 20240520, 2, 0, *[0] * 253), "version 2"),
        (struct.pack("<256i", 20240520, 1, 0, *[0] * 253), "0 tokens"),
        (struct.pack("<256i", 20240801, 7, 1, *[0] * 253) + bytes(4), "Llama 3"),
    ],
)
def test_what_is_no_shard_is_refused(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ShardError, match=message):
        open_tokens(tmp_path / "a.bin")


def test_an_exception_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path / "a.bin") as shard:
        shard.write(np.arange(10, dtype=np.uint16))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_is_whole_or_an_error(tmp_path):
    assert read_manifest(tmp_path) is None
    make_dataset(tmp_path, train=[range(9)])
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ShardError, match=r"manifest\.json: is no manifest"):
        read_manifest(tmp_path)


# ---- windows -----------------------------------------------------------------------------------------------


def test_consecutive_integers_give_targets_one_above_inputs_and_windows_at_multiples(tmp_path):
    make_dataset(tmp_path, train=[range(100), range(1000, 1051)], val=[range(20)])
    blocks = Windows(tmp_path, "train", block_size=10)
    assert (blocks.tokens, len(blocks), blocks.text_bytes) == (151, 9 + 5, 755)
    rows = blocks.rows(range(14)).astype(int)
    assert rows.shape == (14, 11) and (rows[:, 1:] == rows[:, :-1] + 1).all()
    assert rows[:, 0].tolist() == [*range(0, 90, 10), *range(1000, 1050, 10)]
    assert Windows(tmp_path, "val", 10).count == 1


@pytest.mark.parametrize("tokens", [11, 12, 20, 21, 22])
def test_a_shard_of_n_tokens_has_the_windows_of_n_minus_1(tmp_path, tokens):
    make_dataset(tmp_path, train=[range(tokens)])
    assert Windows(tmp_path, "train", 10).count == (tokens - 1) // 10


def test_each_epoch_has_every_window_once_and_slices_do_not_matter(tmp_path):
    make_dataset(tmp_path, train=[range(1000), range(2000, 2777), range(5)])
    blocks = Windows(tmp_path, "train", 7, seed=5)
    for epoch in range(3):
        starts = blocks.batch(epoch * len(blocks), len(blocks))[:, 0]
        assert sorted(starts) == sorted(blocks.rows(range(len(blocks)))[:, 0])
    whole = blocks.batch(200, 120)  # over the end of an epoch
    parts = [blocks.batch(first, 8) for first in range(200, 320, 8)]
    assert len(blocks) < 320 and np.array_equal(whole, np.concatenate(parts))


def test_seed_and_epoch_change_the_order_and_nothing_else_does(tmp_path):
    make_dataset(tmp_path, train=[range(3000)])
    first = Windows(tmp_path, "train", 10, seed=1).batch(0, 299)
    assert np.array_equal(first, Windows(tmp_path, "train", 10, seed=1).batch(0, 299))
    assert not np.array_equal(first, Windows(tmp_path, "train", 10, seed=2).batch(0, 299))
    assert not np.array_equal(first, Windows(tmp_path, "train", 10, seed=1).batch(299, 299))


def test_the_fingerprint_is_of_the_tokens_and_not_of_the_block_size(tmp_path):
    one = make_dataset(tmp_path / "one", train=[range(300)], val=[range(50)])
    same = make_dataset(tmp_path / "same", train=[range(300)], val=[range(90)])
    other = make_dataset(tmp_path / "other", train=[[*range(299), 0]], val=[range(50)])
    prints = [Windows(folder, "train", 10).fingerprint for folder in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert Windows(one, "train", 20).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (["train.bin"], ["val.bin"]),
        (["fineweb_train_000001.bin", "fineweb_train_000002.bin"], ["fineweb_val_000000.bin"]),
        (["TinyStories_train.bin"], ["TinyStories_val.bin"]),
    ],
)
@pytest.mark.parametrize("header", [True, False])
def test_datasets_made_by_others_are_found_by_their_names(tmp_path, train, val, header):
    for number, name in enumerate(train + val):
        ids = np.arange(1000 * number, 1000 * number + 100, dtype=np.uint16)
        write_shard(tmp_path / name, ids) if header else ids.tofile(tmp_path / name)
    for split, names in (("train", train), ("val", val)):
        blocks = Windows(tmp_path, split, 9)
        assert [path.name for path, *_ in blocks.shards] == names
        assert blocks.tokenizer is None and blocks.text_bytes is None
        first = 0 if split == "train" else 1000 * len(train)
        assert blocks.rows([0])[0].tolist() == list(range(first, first + 10))


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_every_shard_of_the_manifest_is_looked_at_before_any_is_read(tmp_path):
    make_dataset(tmp_path, train=[range(100)] * 3, val=[range(100)])
    path = tmp_path / "val_000000.bin"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ShardError, match=r"val_000000\.bin: 1,174 bytes, expected 1,224"):
        Windows(tmp_path, "train", 10)
    path.unlink()
    with pytest.raises(ShardError, match=r"val_000000\.bin: no such file"):
        Windows(tmp_path, "train", 10)
    write_shard(path, range(90))  # whole, but not the one that the manifest means
    with pytest.raises(ShardError, match=r"holds 90 tokens and .*manifest\.json says 100"):
        Windows(tmp_path, "train", 10)


def test_an_id_outside_the_vocabulary_is_named_by_shard_and_position(tmp_path):
    ids = np.zeros(1000, dtype=np.uint16)
    ids[777] = 50304
    make_dataset(tmp_path, train=[np.zeros(500), ids])
    blocks = Windows(tmp_path, "train", 10, vocab_size=50304)
    with pytest.raises(ShardError, match=r"train_000001\.bin: token 50304 at position 777 .* 50,304: .*--verify"):
        blocks.rows(range(len(blocks)))
    assert Windows(tmp_path, "train", 10).rows(range(len(blocks))).max() == 50304


def test_too_few_tokens_and_no_dataset_come_with_a_remedy(tmp_path):
    make_dataset(tmp_path / "small", train=[range(10)], val=[])
    with pytest.raises(ShardError, match=r"train split has 10 tokens .* smaller block_size"):
        Windows(tmp_path / "small", "train", 10)
    with pytest.raises(ShardError, match=r"val split has 0 tokens in 0 files.* larger val_fraction"):
        Windows(tmp_path / "small", "val", 10)
    with pytest.raises(ShardError, match=r"python prepare\.py --dataset=none"):
        Windows(tmp_path / "none", "train", 10)
    (tmp_path / "begun" / ".prepare").mkdir(parents=True)
    (tmp_path / "begun" / ".prepare" / "plan.json").write_text("{}")
    with pytest.raises(ShardError, match=r"not finished here; run it again"):
        Windows(tmp_path / "begun", "train", 10)


# ---- the shuffle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 7, 10, 101, 1000, 65537, 99991])
def test_an_epoch_is_a_permutation(blocks):
    for epoch in (0, 1, 12345):
        order = shuffled(np.arange(blocks) + epoch * blocks, blocks, seed=1337)
        assert np.array_equal(np.sort(order), np.arange(blocks))


def test_ten_million_windows_are_each_met_once_and_in_no_order():
    blocks = 10_000_000
    order = shuffled(np.arange(blocks), blocks, seed=0)
    assert (np.bincount(order, minlength=blocks) == 1).all()
    for shift in (1, 2, 1000):  # serial correlation of a random order: 0 with standard deviation 1 / sqrt(n)
        assert abs(np.corrcoef(order[:-shift], order[shift:])[0, 1]) < 5 / math.sqrt(blocks)
    assert abs(np.corrcoef(order, np.arange(blocks))[0, 1]) < 5 / math.sqrt(blocks)


def chi_square(counts, expected):
    """How many standard deviations the chi-square statistic lies above its mean (normal for many cells)."""
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("blocks", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_windows_are_equally_likely(blocks):
    orders = []
    for seed in range(15 * math.factorial(blocks)):
        orders += shuffled(np.arange(blocks * 20), blocks, seed).reshape(20, blocks).tolist()
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert counts.size == math.factorial(blocks)
    assert abs(chi_square(counts, len(orders) / counts.size)) < 5


@pytest.mark.parametrize("blocks", [97, 1000, 100_003])
def test_every_window_is_as_likely_at_every_place(blocks):
    """Place in the epoch against window, both in 16 cells, over 200 epochs of each of 5 seeds."""
    places = np.linspace(0, blocks - 1, min(blocks, 400)).astype(np.int64)
    cells = np.zeros((16, 16))
    for seed in range(5):
        for epoch in range(200):
            order = shuffled(places + epoch * blocks, blocks, seed)
            np.add.at(cells, (places * 16 // blocks, order * 16 // blocks), 1)
    rows = np.bincount(places * 16 // blocks, minlength=16) / places.size
    columns = np.bincount(np.arange(blocks) * 16 // blocks, minlength=16) / blocks
    expected = np.outer(rows, columns) * cells.sum()
    assert abs(chi_square(cells, expected)) < 6


def test_two_epochs_and_two_seeds_have_nothing_in_common():
    """Two random orders of n agree in 1 place on average (Poisson)."""
    blocks, orders = 10_000, {}
    for seed in (0, 1, 2**63, -1):
        for epoch in (0, 1):
            orders[seed, epoch] = shuffled(np.arange(blocks) + epoch * blocks, blocks, seed)
    pairs = [(a, b) for i, a in enumerate(orders.values()) for b in list(orders.values())[:i]]
    assert max((a == b).sum() for a, b in pairs) <= 8


def test_the_order_is_the_same_forever():
    """Golden figures, so that a run goes on with its data under any later version of numpy or of this file."""
    assert shuffled(np.arange(8), 1000, 1337).tolist() == [115, 835, 803, 430, 971, 853, 387, 140]
    order = shuffled(np.arange(20_000), 9999, 42).astype("<i8")
    assert hashlib.sha256(order.tobytes()).hexdigest().startswith("5b2c402807cfc2fed29581e23c8a91d9")


def test_sequence_k_is_splitmix64_s_arithmetic_in_plain_python():
    """The same network in Python's integers."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def sequence(k, blocks, seed):
        golden = 0x9E3779B97F4A7C15
        epoch, position = divmod(k, blocks)
        first = mix((mix((seed + golden) % 2**64) + epoch * golden) % 2**64)
        upper = math.isqrt(blocks - 1) + 1
        lower = -(-blocks // upper)
        lower += lower % 2
        while True:
            (left, right), key = divmod(position, lower), first
            for _ in range(8):
                key = mix((key + golden) % 2**64)
                left = (left + mix((key + right) % 2**64)) % 2**64 % upper
                key = mix((key + golden) % 2**64)
                right = (right + mix((key + left) % 2**64)) % 2**64 % lower
            position = left * lower + right
            if position < blocks:
                return position

    ks = [0, 1, 5, 999, 1000, 123_456_789, 2**40]
    for blocks, seed in ((1, 0), (2, 3), (777, 1337), (10**7, 2**64 - 1)):
        assert shuffled(ks, blocks, seed).tolist() == [sequence(k, blocks, seed) for k in ks]


def test_opening_ten_billion_tokens_reads_headers_only(tmp_path, monkeypatch):
    """Sparse files of the real size: a hundred shards of 100M tokens, 20 GB that are not there."""
    entries = []
    for number in range(100):
        path = tmp_path / f"train_{number:06d}.bin"
        with open(path, "wb") as file:
            file.write(struct.pack("<3i", 20240520, 1, 100_000_000))
            file.truncate(1024 + 200_000_000)
        entry = {"name": path.name, "split": "train", "tokens": 100_000_000, "sha256": str(number)}
        entries.append(entry | {"documents": 1, "text_bytes": 1})
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": entries, "tokenizer": TOKENIZER}))
    opened = []
    monkeypatch.setattr(shards, "open_tokens", lambda path: opened.append(path) or open_tokens(path))
    blocks = Windows(tmp_path, "train", 1024, vocab_size=50304)
    assert blocks.tokens == 10_000_000_000 and opened == []
    assert blocks.batch(10**9, 16).shape == (16, 1025) and len(opened) <= 16
