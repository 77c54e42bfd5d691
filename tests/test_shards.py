"""Token files, and the list of those of a dataset: layout byte by byte, every bit, edits of the manifest."""

import hashlib
import json
import math
import os
import random
import struct

import numpy as np
import pytest
from runs import write_dataset

from onecard import shards
from onecard.jsonfiles import checksum, write_json
from onecard.shards import ShardError, ShardWriter, check_shard, find_shards, open_tokens, read_manifest


def write_shard(path, ids):
    with ShardWriter(path) as shard:
        for part in np.array_split(np.asarray(ids, dtype=np.uint16), 3):
            shard.write(part)
    return shard


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
    monkeypatch.setattr(shards, "CHECK_BYTES", 8)
    shard = write_shard(tmp_path / "a.bin", [50256, 1, 50256, 0, 300, 7])
    facts = {"tokens": 6, "sha256": shard.sha256, "documents": 2, "n_vocab": 50257, "eot": 50256}
    check_shard(shard.path, facts, facts)
    for change, message in (
        ({"tokens": 5}, "tokens 6, expected 5"),
        ({"sha256": "0"}, f"SHA-256 {shard.sha256}, expected 0"),
        ({"documents": 1}, "separators 2, expected 1"),
        ({"eot": 8}, "separators 0, expected 2"),
        ({"n_vocab": 50256}, "largest token 50256, expected 50255"),
    ):
        with pytest.raises(ShardError, match=rf"a\.bin: damaged: {message}; .*prepare\.py"):
            check_shard(shard.path, facts | change, facts | change)


def test_each_of_200_flipped_bits_is_named_with_its_file(tmp_path):
    write_dataset(tmp_path / "docs", train=[range(1, 90), [0, 1, 2]], val=[range(9)])
    paths = sorted((tmp_path / "docs").iterdir())

    def verify():
        manifest = read_manifest(tmp_path / "docs")
        for shard in manifest["shards"]:
            check_shard(tmp_path / "docs" / shard["name"], shard | {"documents": 1}, {"n_vocab": 96, "eot": 1})

    rng = random.Random(0)
    for number in range(200):
        path = paths[number % len(paths)]
        before = path.read_bytes()
        place = before.find(b"checksum") if path.suffix == ".json" else len(before)  # its own name may change
        bit = 8 * rng.randrange(place) + rng.randrange(8)
        path.write_bytes(before[: bit // 8] + bytes([before[bit // 8] ^ 1 << bit % 8]) + before[bit // 8 + 1 :])
        with pytest.raises(ShardError, match=rf"{path.name}: ") as raised:
            verify()
        assert "\n" not in str(raised.value)
        path.write_bytes(before)


EDITS = [  # keys, and the value that is put there; None: the key is removed
    *[(("shards", 0, key), []) for key in ("name", "split", "sha256", "tokens", "text_bytes")],
    *[(("shards", 0, key), None) for key in ("name", "split", "sha256", "tokens", "text_bytes")],
    *[(("shards", 0, "name"), f"{name}_000000.bin") for name in ("../docs/train", "/train", "val", "a")],
    *[(("shards", 0, "tokens"), value) for value in (8, -9, 9.0, True, math.nan, math.inf)],
    *[(("tokenizer", key), []) for key in ("name", "sha256", "n_vocab", "eot")],
    *[((key,), 7) for key in ("sources", "settings", "shards", "tokenizer", "skipped", "failed", "libraries")],
    *[((key,), [7]) for key in ("sources", "settings", "shards", "tokenizer", "failed", "encoder")],
    (("sources",), [{"path": "a", "id": "b"}]),
    (("shards", 0, "split"), "val"),
    (("tokens",), 8),
]


def test_a_manifest_that_is_cut_or_edited_is_an_error_in_one_line(tmp_path):
    """Without a checksum, as in older datasets. With one every edit is found, also that of a name or a setting."""
    assert read_manifest(tmp_path) is None
    write_dataset(tmp_path / "docs", train=[range(9)])
    path = tmp_path / "docs/manifest.json"
    content, manifest = path.read_text(), read_manifest(path.parent) | {"documents": 1, "tokens": 9}
    contents = ["", "[]", "null", "7", content[:-20], "[" * 100_000, '{"shards": ' + "1" * 5000, "\ud800"]
    contents += [content.replace(*edit) for edit in (('"made up"', '"made"'), ('"settings": {', '"settings": {"a": 1'))]
    contents.append(json.dumps(manifest | {"shards": manifest["shards"] * 2}))
    for keys, value in EDITS:
        edited = json.loads(json.dumps(manifest))
        part = edited
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        if value is None:
            del part[keys[-1]]
        contents.append(json.dumps(edited))
    for damaged in contents:
        path.write_bytes(damaged.encode(errors="surrogatepass"))
        with pytest.raises(
            ShardError, match=r"manifest\.json: damaged .*; delete it and run prepare\.py again"
        ) as raised:
            read_manifest(path.parent)
        assert "\n" not in str(raised.value), damaged
    path.write_text(json.dumps(manifest))
    assert read_manifest(path.parent) == manifest
    path.unlink()
    path.mkdir()
    with pytest.raises(ShardError, match=r"manifest\.json: damaged \(Is a directory\)"):
        read_manifest(path.parent)


def test_a_json_file_has_a_line_for_each_key_and_item_and_is_read_back(tmp_path):
    content = {"a": 1, "shards": [{"name": "é", "rows": [0, 1]}, {"name": "y"}], "none": [], "settings": {"x": [1, 2]}}
    write_json(tmp_path / "a.json", content)
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert json.loads("".join(lines)) == content | {"checksum": checksum(content)} and len(lines) == 10


def test_a_directory_in_place_of_a_shard_is_a_line_with_its_name(tmp_path):
    write_dataset(tmp_path / "docs", train=[range(9)])
    (tmp_path / "docs/train_000000.bin").unlink()
    for folder, name in (("docs", "train_000000.bin"), ("gpt", "train.bin")):
        (tmp_path / folder / name).mkdir(parents=True)
        with pytest.raises(ShardError, match=rf"{folder}/{name}: cannot be read \(Is a directory\); check"):
            find_shards(tmp_path / folder)


def test_no_dataset_comes_with_a_remedy(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "begun/.prepare").mkdir(parents=True)
    (tmp_path / "begun/.prepare/plan.json").write_text("{}")
    for folder, message in (
        ("none", r"has begun, small\. To make it: python prepare\.py FILES --dataset=none"),
        ("smal", r"did you mean small\? To make it: "),
        ("begun", r"not finished here; run it again"),
    ):
        with pytest.raises(ShardError, match=message):
            find_shards(tmp_path / folder)
