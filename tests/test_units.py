"""units.py: its ids against tiktoken's, what it refuses, and a worker without the repository."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from texts import documents_of, expected_documents, some_texts, write_parquet

from onecard.records import STATE
from onecard.sources import DamagedError, examine
from onecard.tokenizer import HARD_STRINGS, load_tokenizer, train_tokenizer
from onecard.units import in_val, make_job, prepare_unit, split_text

ROOT = Path(__file__).resolve().parents[1]


def jobs_of(path, folder, shard_bytes=1e9, val_fraction=0.0):
    """The jobs of all units of one file."""
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    source, units = examine(path.as_posix(), {"text_column": "text"}, shard_bytes)
    settings = {"text_column": "text", "val_fraction": val_fraction}
    plan = {"settings": settings, "sources": [source], "units": [{"source": 0, **unit} for unit in units]}
    return [make_job(plan, number, folder) for number in range(len(units))]


def prepare_file(path, folder, encoder="tiktoken", **options):
    """The records of all units of one file."""
    tokenizer = load_tokenizer(encoder=encoder)
    return [prepare_unit(job, tokenizer) for job in jobs_of(path, folder, **options)]


@pytest.mark.parametrize("encoder", ["tiktoken", "fastokens"])
def test_every_document_has_tiktokens_ids_after_one_separator_however_the_file_is_cut(tmp_path, encoder):
    pytest.importorskip(encoder)
    texts = [text for text in HARD_STRINGS if text] + some_texts(300) + ["many words " * 50_000, "last"]
    for row_group_size in (20, 500):
        path, folder = tmp_path / "a.parquet", tmp_path / str(row_group_size)
        write_parquet(path, texts, row_group_size)
        assert len(prepare_file(path, folder, encoder, shard_bytes=60_000, val_fraction=0.2)) > 5
        for split in ("train", "val"):
            found = documents_of(folder if split == "train" else folder / STATE, split)
            assert found == expected_documents(texts, split, 0.2) and found


def test_val_is_the_fraction_of_documents_that_was_asked_for():
    contents = [f"document {i}".encode() for i in range(100_000)]
    for fraction in (0.0, 0.005, 0.3):
        count = sum(in_val(content, fraction) for content in contents)
        deviation = (len(contents) * fraction * (1 - fraction)) ** 0.5
        assert abs(count - len(contents) * fraction) <= 4 * deviation


def test_val_by_paragraphs_keeps_every_character_and_decides_by_the_paragraphs_alone():
    text = "\n\n".join(f"{i} " + "word " * random.Random(i).randint(5, 100) for i in range(400))
    settings, found = {"val_fraction": 0.2, "paragraph_chars": 500}, []
    for seed in (3, 3, 4):
        parts = list(split_text(text, settings | {"split_seed": seed}))
        assert "".join(part for part, _, _ in parts) == text and len(parts) > 20
        assert all(size == len(part.encode()) for part, size, _ in parts)
        assert all(a != b for (_, _, a), (_, _, b) in itertools.pairwise(parts))  # runs of one split are one document
        assert 0.1 < sum(size for _, size, split in parts if split == "val") / len(text) < 0.3
        found.append(parts)
    assert found[0] == found[1] != found[2]


def test_a_document_that_the_tokenizer_changes_fails_the_unit_and_is_named_by_its_row(tmp_path):
    """A tokenizer.json with a lowercase normalizer keeps what is lowercase already."""
    pytest.importorskip("tokenizers")
    lower = json.loads(train_tokenizer(["some text"], 300)) | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "lower.json").write_text(json.dumps(lower))
    tokenizer = load_tokenizer(tmp_path / "lower.json")
    assert not tokenizer.lossless
    texts = [f"text {i}" for i in range(30)]
    (job,) = jobs_of(write_parquet(tmp_path / "fine.parquet", texts), tmp_path / "fine")
    assert prepare_unit(job, tokenizer)["documents"] == 30
    texts[17] = "so Much for that"
    (job,) = jobs_of(write_parquet(tmp_path / "a.parquet", texts), tmp_path / "docs")
    with pytest.raises(DamagedError, match=r"a\.parquet: row 17: .*'so Much for that'.*at character 3"):
        prepare_unit(job, tokenizer)
    assert {file.name for file in (tmp_path / "docs").rglob("*")} == {STATE}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory in /proc")
@pytest.mark.slow
def test_a_document_of_100_mb_and_ten_million_letters_in_bounded_memory(tmp_path):
    """Memory: a few copies of the text (page, column, bytes, str, pieces, ids), whatever else is in the file."""
    path = write_parquet(tmp_path / "a.parquet", ["word " * 20_000_000, "b" * 10_000_000, "small"], row_group_size=1)
    (job,) = jobs_of(path, tmp_path / "docs")
    code = """if True:
        import json, sys
        from onecard import units
        job = json.loads(sys.argv[1])
        units.prepare_unit(job, units.job_tokenizer(job, job["folder"]))
        print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # ru_maxrss may be that of the parent
    """
    command = [sys.executable, "-c", code, json.dumps(job)]
    most = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=300, check=True).stdout
    assert int(most) < 1200 * 1024
    found = [len(ids) for ids in documents_of(tmp_path / "docs", "train")]
    letters = len(load_tokenizer().encode("b" * 10_000_000))
    assert found == [1 + 20_000_001, 1 + letters, 1 + 1]  # "word", then 19,999,999 of " word", then " "
