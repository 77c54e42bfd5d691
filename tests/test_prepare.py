"""prepare.py: its datasets against sums by hand and against each other; kills, full disks and damage survived."""

import functools
import hashlib
import itertools
import json
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from runs import flags_of
from texts import documents_of, expected_documents, files_of, some_texts, strings_of_bytes, write_parquet

import prepare
from onecard import UserError, records
from onecard.durable import OwnedError
from onecard.jsonfiles import ShardError
from onecard.records import PrepareError, load_records, read_plan, read_records, write_records
from onecard.remote import SourceError
from onecard.shards import check_shard, open_tokens, read_manifest
from onecard.tokenizer import TokenizerError, dataset_tokenizer, load_tokenizer
from onecard.units import in_val

ROOT = Path(prepare.__file__).parent
NO_SPACE = r"\.bin: could not be written \(No space left on device\); [\d,]+ bytes are free"
SMALL = ("--shard_tokens=3000", "--val_fraction=0.2")  # 18 units of the files of `inputs`


@pytest.fixture
def run(tmp_path, capsys):
    """A function: arguments -> what prepare.py printed in this process. One worker, unless given, and data/docs."""

    def run(*arguments, dataset="docs", data_dir=tmp_path / "data", code=0):
        found, fixed = 0, flags_of(encoder="tiktoken", workers=1, dataset=dataset, data_dir=data_dir)
        try:
            prepare.main([*fixed, *map(str, arguments)])
        except SystemExit as stop:
            found = stop.code
        assert found == code
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def docs(tmp_path):
    return tmp_path / "data/docs"


@pytest.fixture
def whole(run, tmp_path):
    """A function: arguments -> the files that one undisturbed run with two workers makes, in another dataset."""
    return lambda *arguments, name="whole": (
        run("--workers=2", *arguments, dataset=name) and files_of(tmp_path / "data" / name)
    )


@pytest.fixture
def start(docs):
    """A function: arguments -> prepare.py as a process in a group of its own. Its output ends with its last worker."""
    started, fixed = [], [*flags_of(encoder="tiktoken", dataset="docs", data_dir=docs.parent), *SMALL]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # `pytest &` has it ignored

    def start(*arguments):
        command = [sys.executable, "prepare.py", *map(str, arguments), *fixed]
        started.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=30)


@pytest.fixture
def inputs(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"in/{number}.parquet", some_texts(250, number), row_group_size=50)
    return tmp_path / "in"


def assert_nothing_is_half(folder):
    """Every file with a final name is whole: each shard has its size, each record its shards and their hashes."""
    for path in folder.glob("*.bin"):
        open_tokens(path)
    plan = read_plan(folder)
    for record in read_records(plan, folder)[0].values() if plan else ():
        for shard in record["shards"]:
            check_shard(folder / shard["name"], shard, {"n_vocab": 50257, "eot": 50256})


def test_the_manifest_names_the_rows_of_every_shard_and_counts_what_was_skipped_or_replaced(run, docs, tmp_path):
    texts = [*some_texts(199), None, "", None, " "]
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=30)
    lines = [{"text": "a\ud800b"}, {"text": "\ud83d\ude00"}, {"text": "plain"}, {"text": None}, {"other": 1}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    surrogates = strings_of_bytes([b"c \xed\xa0\x80 d", b"\xed\xa0\xbd\xed\xb8\x80!"])
    run(path, tmp_path / "b.jsonl", write_parquet(tmp_path / "c.parquet", surrogates), *SMALL)
    manifest = read_manifest(docs)
    assert manifest["skipped"] == {"null": 4, "empty": 1} and manifest["replaced"] == 2
    assert manifest["documents"] == 200 + 3 + 2 and manifest["settings"]["val_fraction"] == 0.2
    assert manifest["libraries"]["tiktoken"] and manifest["encoder"] == "tiktoken"
    for shard in manifest["shards"]:
        content = (docs / shard["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"] and len(content) == 1024 + 2 * shard["tokens"]
        if shard.get("source") == path.as_posix():
            first, last = shard["rows"]
            assert (shard["row_groups"][0] * 30, min(shard["row_groups"][1] * 30, len(texts))) == (first, last)
            contents = [text.encode() for text in texts[first:last] if text]
            chosen = [content for content in contents if not in_val(content, 0.2)]
            assert (shard["documents"], shard["text_bytes"]) == (len(chosen), sum(map(len, chosen)))
    val = [shard for shard in manifest["shards"] if shard["split"] == "val"]  # each has the val documents of many units
    assert len(val) < 4 and all(shard["tokens"] <= 3000 for shard in val)
    assert [shard["name"] for shard in val] == [f"val_{shard['units'][0]:06d}.bin" for shard in val]
    assert all(a["units"][0] <= a["units"][1] < b["units"][0] for a, b in itertools.pairwise(val))
    assert sum(shard["documents"] for shard in val) > len(expected_documents([t for t in texts if t], "val", 0.2)) > 20
    decode, found = load_tokenizer().decode, documents_of(docs, "train") + documents_of(docs, "val")
    assert {"a\ufffdb", "😀", "plain", "c \ufffd d", "😀!"} <= {decode(ids[1:]) for ids in found}


def test_files_are_added_nothing_old_moves_and_bytes_do_not_depend_on_workers_or_encoder(run, docs, tmp_path, whole):
    same = some_texts(60, 0)
    paths = [write_parquet(tmp_path / f"in/{n}.parquet", same + some_texts(60, n)) for n in (1, 2, 3)]
    run(paths[0], *SMALL)
    before = files_of(docs)
    assert "done already" in run(*paths, *SMALL)
    after = files_of(docs)
    assert all(after[name] == before[name] for name in before if name.startswith("train")) and len(after) > 8
    assert after["val_000000.bin"][1024:].startswith(before["val_000000.bin"][1024:])
    assert after == whole(*paths, *SMALL, "--workers=3")
    other = whole(*paths, *SMALL, "--encoder=auto", name="other")
    del after["manifest.json"], other["manifest.json"]  # which names the encoder
    assert after == other
    train, val = ({tuple(ids) for ids in documents_of(docs, split)} for split in ("train", "val"))
    assert not train & val and len(val) > 20  # duplicates are in the same split


def test_a_finished_dataset_is_not_touched_and_files_are_known_by_their_content(run, docs, tmp_path):
    one, two = (write_parquet(tmp_path / f"{number}/000.parquet", some_texts(50, number)) for number in (1, 2))
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(one.read_bytes())
    printed = run(one, two, copy, two)
    assert read_manifest(docs)["documents"] == 100 and "next: python train.py config/own_text.py" in printed
    for again, first in ((copy, one), (two, two)):
        assert f"{again.as_posix()}: the same as {first.as_posix()}" in printed
    times = {path: path.stat().st_mtime_ns for path in docs.rglob("*") if path.suffix != ".lock"}
    assert "nothing to do" in run(one, two) and "nothing to do" in run()
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    moved = one.rename(tmp_path / "moved.parquet")
    assert "nothing to do" in run(moved)
    assert read_manifest(docs)["shards"][0]["source"] == moved.as_posix()
    write_parquet(two, some_texts(50, 3))
    with pytest.raises(PrepareError, match=r"2/000\.parquet: has changed"):
        run(two)


def test_wrong_inputs_are_all_named_before_any_work(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.doc").write_text("x")
    good, other = write_parquet(tmp_path / "good.parquet", ["x"]), tmp_path / "other.parquet"
    pq.write_table(pq.read_table(good).rename_columns(["content"]).append_column("score", [[1]]), other)
    names = ("none.parquet", "empty", "notes.doc", "*.nothing")
    with pytest.raises(SourceError) as error:
        run(good, *(tmp_path / name for name in names))
    for name, line in zip(names, str(error.value).splitlines(), strict=True):
        assert line.startswith(f"{tmp_path}/{name}: ")
    with pytest.raises(UserError, match=r"other\.parquet: no column 'text' in content, score; .*--text_column="):
        run(good, other)
    with pytest.raises(UserError, match="column 'score' holds int64, not text"):
        run(other, "--text_column=score")
    assert not list(tmp_path.glob("data/**/*.bin"))
    run(other, "--text_column=content", "--val_fraction=0")


@pytest.mark.parametrize("keys", [("--tokenizer=gpt2",), ("--tokenizer=bytes",), ("--train_tokenizer=512",)], ids=str)
def test_a_folder_of_notes_becomes_a_dataset_of_any_tokenizer_and_one_more_note_joins(run, docs, tmp_path, keys):
    """30 notes share one shard a split."""
    pytest.importorskip("tokenizers")
    notes, draw = tmp_path / "notes", random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(500)]
    texts = [f"# Note {number}\n\n" + " ".join(draw.choices(words, k=400)) for number in range(31)]
    notes.mkdir()
    for number, text in enumerate(texts[:30]):
        (notes / f"{number:02d}.md").write_text(text)
    printed = run(notes, *keys)
    assert "few documents (30): split by paragraphs" in printed and len(list(docs.glob("*.bin"))) == 2
    command = f"train.py config/own_text.py --dataset=docs --data_dir={docs.parent} --out_dir=out/docs"
    assert f"next: python {command}" in printed and "nothing to do" in run(notes, *keys)
    (notes / "30.md").write_text(texts[30])
    assert "unit 0 is prepared again: files were added to it" in run(notes, *keys)
    tokenizer, found = dataset_tokenizer(docs), {}
    for split in ("train", "val"):
        ids = np.array(open_tokens(docs / f"{split}_000000.bin"))
        documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot))[1:]
        found[split] = [tokenizer.decode(document[1:]) for document in documents]
    assert sorted("".join(found["train"] + found["val"])) == sorted("".join(texts))
    assert all(any(part in text for text in texts) for part in found["train"] + found["val"])
    assert sum(map(len, found["val"])) > 1200
    assert "are right" in run("--verify") and "first: # Note 0 " in run("--inspect")
    if "--train_tokenizer=512" in keys:
        assert read_manifest(docs)["tokenizer"]["n_vocab"] == 512
        (docs / "tokenizer.json").write_bytes((docs / "tokenizer.json").read_bytes() + b" ")
        (notes / "31.md").write_text("one more")
        for command in (("--verify",), ("--inspect",), (notes,)):
            with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
                run(*command)


def test_without_a_terminal_progress_is_a_line_now_and_then(run, inputs, monkeypatch):
    assert "prepared" not in run(inputs, *SMALL)
    monkeypatch.setattr(records, "LINE_SECONDS", -1)
    printed = run(inputs, *SMALL, dataset="more")
    assert re.search(r"\n  prepared [\d.]+ kB of [\d.]+ kB  \d\.\d\dM tokens/s\n", printed)
    assert "examined 3 of 3 files" in printed and re.search(r"checked [\d.]+ kB of [\d.]+ kB", run("--verify"))


def test_mistakes_are_lines_without_settings_and_names_are_suggested(run, tmp_path, capsys):
    book = tmp_path / "my book.txt"
    book.write_text(" ".join(some_texts(300)))
    run(book, "--val_fraction=0.1", "--tokenizer=bytes", dataset="books")
    assert "nothing to do" in run(dataset="books")  # what is not given stays as it was
    capsys.readouterr()
    for arguments, name, message in (
        (("--verify",), "book", r"book: no finished dataset; did you mean books\?"),
        (("--inspect",), "xyz", r"xyz: no finished dataset; .*data has books\. .* --dataset=xyz --data_dir=.*data$"),
        ((), "bookss", r"nothing is prepared here yet; did you mean books\?"),
        ((book,), "", r"dataset: no name for .*; add --dataset=my_book, say"),
        ((tmp_path / "my book.tx",), "x", r"my book\.tx: no such file or folder; check the name"),
        ((book, "--val_fraction=0.2", "--shard_tokens=5000"), "books", r"0\.1, not 0\.2; leave.*\n.*000, not 5000"),
        ((book, "--tokenizer=gpt2"), "books", r"tokenizer: .* was started with bytes \(\w{8}\), not gpt2"),
        ((book, "--train_tokenizer=500"), "books", r"train_tokenizer: .* was started with bytes .*, not 500"),
        ((book, "--tokenizer=bytes", "--train_tokenizer=400"), "x", "train_tokenizer: excludes --tokenizer"),
        ((book, "--train_tokenizer=100"), "x", "train_tokenizer: 256 bytes and a separator are ids; give 257 or more"),
        ((book, "--cluster=tcp://127.0.0.1:1", "--workers=2"), "x", "workers: the cluster has its own"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments, dataset=name)
        assert capsys.readouterr().out == ""


def test_max_tokens_takes_the_fewest_units_and_can_grow_as_if_it_had_been_so_from_the_start(run, docs, tmp_path, whole):
    texts = [*some_texts(100, 1), *some_texts(100, 2, words=5), *some_texts(100, 3)]
    for part in range(3):
        write_parquet(tmp_path / f"in/{part}.parquet", texts[100 * part : 100 * part + 100], row_group_size=10)
    options = (tmp_path / "in", "--shard_tokens=1000")
    run(*options, "--val_fraction=0", dataset="none")
    sizes = [shard["tokens"] for shard in read_manifest(docs.with_name("none"))["shards"]]
    ends = [0, *itertools.accumulate(sizes)]
    for most, workers in ((1, 2), (3000, 3), (15_000, 1), (10_000_000, 1), (0, 1)):
        printed = run(*options, f"--max_tokens={most}", f"--workers={workers}")
        taken = next((end for end in ends if end >= most), ends[-1]) if most else ends[-1]
        assert read_manifest(docs)["tokens"] == taken
        if most:  # 0 adds nothing to the last one
            assert f"max_tokens: {most:,} asked, {taken:,} taken (" in printed
            assert most > 15_000 or files_of(docs) == whole(*options, f"--max_tokens={most}", name=f"whole{most}")
            assert not list(docs.rglob("*.tmp")) and len(list(docs.glob("train*"))) == ends.index(taken)
    with pytest.raises(PrepareError, match=r"max_tokens: .* tokens already"):
        run(*options, "--max_tokens=500")


def test_a_new_dataset_with_max_tokens_comes_within_two_percent_of_it(run, docs, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(6000, words=500), row_group_size=50)
    run(path, "--max_tokens=1000000", "--encoder=auto")
    manifest = read_manifest(docs)
    assert manifest["settings"]["shard_tokens"] == 200_000
    assert 0 <= manifest["tokens"] - 1_000_000 <= max(s["tokens"] for s in manifest["shards"])


def test_inspect_shows_counts_lengths_sources_and_the_first_and_last_documents(run, tmp_path):
    texts = ["FIRST document", *some_texts(198), "LAST document"]
    path = write_parquet(tmp_path / "a.parquet", texts)
    run(path, "--val_fraction=0.0")
    printed = run("--inspect")
    for part in (" 200 ", path.as_posix(), "first: FIRST document", "last: LAST document"):
        assert part in printed, part
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "long " * 30_000}))  # more tokens than are shown as text
    run(tmp_path / "a.jsonl", "--val_fraction=0", dataset="long")
    printed = run("--inspect", dataset="long")
    assert "30,001, 30,001" in printed and "last: long long" in printed


def test_without_inputs_it_prepares_the_quickstart_with_its_own_vocabulary(run, docs, monkeypatch):
    library = Path(sysconfig.get_paths()["stdlib"], "email")  # the docstrings of one package
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"stdlib": library})
    assert "next: python train.py config/quickstart.py" in run(dataset="")
    folder = docs.with_name("quickstart")
    texts, manifest = pq.read_table(folder / "quickstart.parquet")["text"].to_pylist(), read_manifest(folder)
    encode = load_tokenizer("gpt2-1024").encode
    assert manifest["tokens"] == sum(len(encode(text)) for text in texts) + manifest["documents"]
    val = sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val")
    assert manifest["settings"]["val_fraction"] == 0.1 and 0.05 < val / manifest["tokens"] < 0.2
    assert "nothing to do" in run(dataset="")
    run("--val_fraction=0.1", dataset="")
    with pytest.raises(PrepareError, match=r"started with gpt2-1024 .*, not gpt2"):
        run("--tokenizer=gpt2", dataset="")


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_run_again_the_bytes_are_those_of_a_run_never_stopped(
    start, run, docs, inputs, whole, kills
):
    draw, killed, tries = random.Random(kills), 0, 0
    while killed < kills:
        tries += 1
        assert tries < 6 * kills, "it is done before it can be killed"
        process = start(inputs, f"--workers={1 + tries % 3}")
        begun = len(list(docs.glob("*")))
        while tries % 2 and process.poll() is None and len(list(docs.glob("*"))) <= begun:
            time.sleep(0.01)  # half of the kills come when there is new work to harm
        time.sleep(draw.uniform(0, 0.05 if tries % 2 else 1.5))
        done = process.poll() is not None
        killed += not done
        process.kill()
        process.communicate(timeout=30)  # no worker is left
        assert_nothing_is_half(docs)
        if done or tries % 3 == 2:  # take half of the units away, so that the next kills find work
            found = read_records(read_plan(docs), docs)[0]
            write_records(list(found.values())[::2], docs)
            for record in list(found.values())[1::2]:
                for shard in record["shards"]:
                    (docs / shard["name"]).unlink()
    run(inputs, *SMALL)
    assert files_of(docs) == whole(inputs, *SMALL) and not list(docs.rglob("*.tmp"))


@pytest.mark.parametrize("harm", ["SIGINT", "SIGTERM", "a dead worker"])
def test_a_signal_or_a_dead_worker_ends_all_processes_at_once_and_leaves_nothing_half(start, docs, tmp_path, harm):
    process = start(write_parquet(tmp_path / "a.parquet", some_texts(1000, words=500), 50), "--workers=2")
    while process.poll() is None and not list(docs.glob("*.tmp")):
        time.sleep(0.01)
    begun = time.monotonic()
    if harm == "a dead worker":
        if not Path("/proc/self/task").exists():
            pytest.skip("finds its workers in /proc")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        os.kill(int(workers[0]), signal.SIGKILL)
    else:
        (os.killpg if harm == "SIGINT" else os.kill)(process.pid, signal.Signals[harm])
    printed, _ = process.communicate(timeout=20)  # until no worker is left
    assert time.monotonic() - begun < 10 and "Traceback" not in printed
    assert_nothing_is_half(docs)
    assert not list(docs.glob("*.tmp")) and "leaked" not in printed
    if harm != "a dead worker":
        assert process.returncode == 130 and "the same command continues" in printed
    if harm == "a dead worker":
        assert process.returncode == 2 and "died (exit code -9" in printed and "--workers" in printed


def test_a_disk_that_is_too_small_is_reported_before_any_work(run, docs, inputs, monkeypatch):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10_000}))
    with pytest.raises(PrepareError, match=r"[\d,]+ bytes are needed and 10,000 are free; .*--max_tokens"):
        run(inputs)
    assert not list(docs.glob("*.bin"))


def test_a_disk_that_fills_up_all_the_same(run, docs, tmp_path, small_disk):
    """Prose comes first, by which the need is estimated, then digits, which need four times as much."""
    disk, draw = small_disk("300k"), random.Random(0)
    prose = ["some quite ordinary words about nothing much " * 20 for _ in range(300)]
    digits = ["".join(draw.choices("1234567890 +-*/", k=2000)) for _ in range(250)]
    options = (write_parquet(tmp_path / "a.parquet", prose + digits, 300), "--shard_tokens=3000")
    with pytest.raises(ShardError, match=NO_SPACE.replace("bin", "(bin|jsonl)")):
        run(*options, data_dir=disk)
    assert_nothing_is_half(disk / "docs")
    before = files_of(disk / "docs")
    assert not list(disk.rglob("*.tmp")) and len(before) > 1
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    run(*options, data_dir=disk)
    run(*options)
    assert before.items() < files_of(docs).items() == files_of(disk / "docs").items()


def test_a_second_prepare_names_the_first_and_a_kill_frees_it(run, docs, inputs):
    (docs / ".prepare").mkdir(parents=True)
    code = "import onecard.durable as d, sys, time\nwith d.owned(sys.argv[1], ''): print(flush=True); time.sleep(99)"
    command = [sys.executable, "-c", code, docs / ".prepare/all.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as first:
        first.stdout.readline()
        with pytest.raises(OwnedError, match=f"process {first.pid} on "):
            run(inputs)
        first.kill()
    run(inputs)


def test_damaged_files_are_named_the_others_are_prepared_and_repaired_ones_are_added(run, docs, tmp_path):
    """Four cannot be opened; a flipped bit in a page with a checksum fails one unit of its file."""
    good = write_parquet(tmp_path / "good.parquet", some_texts(100, 1))
    page = write_parquet(tmp_path / "page.parquet", some_texts(600, 2), row_group_size=50, write_page_checksum=True)
    group, content = pq.ParquetFile(page).metadata.row_group(6).column(0), page.read_bytes()
    harmed = bytearray(content)
    harmed[group.data_page_offset + group.total_compressed_size // 2] ^= 16
    page.write_bytes(harmed)
    broken = [tmp_path / f"{number}.parquet" for number in range(4)]
    for path, harm in zip(broken, (content[:9000], content[:-100], b"", b"not parquet, but long enough"), strict=True):
        path.write_bytes(harm)
    for _ in range(2):  # the second run tries the failed unit again
        printed, manifest = run(good, page, *broken, *SMALL, code=1), read_manifest(docs)
        assert all(f"left out: {path.as_posix()}: cannot be read" in printed for path in broken)
        assert f"failed: {page.as_posix()}: cannot be read" in printed and len(manifest["failed"]) == 1
        units = json.loads((docs / ".prepare/plan.json").read_text())["units"]
        (lost,) = (u["rows"] for u in units if u["source"] == 1 and u["row_groups"][0] <= 6 < u["row_groups"][1])
        assert manifest["documents"] == 700 - (lost[1] - lost[0])
    for number, path in enumerate(broken):
        write_parquet(path, some_texts(50, 10 + number))
    page.write_bytes(content)
    run(good, page, *broken, *SMALL)
    assert read_manifest(docs)["documents"] == 900


def test_whatever_of_a_dataset_is_damaged_lost_cut_or_unfinished_is_made_again(run, docs, inputs):
    run(inputs, *SMALL)
    before, path = files_of(docs), docs / "train_000004.bin"
    for position in (10, 2000, len(before[path.name]) - 1):
        harmed = bytearray(before[path.name])
        harmed[position] ^= 64
        path.write_bytes(harmed)
        printed = run("--verify", code=1)
        assert f"{path}: " in printed and printed.count(".bin: ") == 1
    path.unlink()
    (docs / "train_000002.bin").write_bytes(before["train_000002.bin"][:-2])
    found = load_records(docs)[0]
    del found[7]  # as if killed after its shards, before its record
    write_records(found.values(), docs)
    leftover = docs / "val_000007.bin.0123abcd.tmp"
    leftover.write_bytes(b"half")
    printed = run(inputs, *SMALL)
    assert all(f"unit {number} is prepared again" in printed for number in (2, 4))
    assert files_of(docs) == before and not leftover.exists()


PREPARE, VERIFY, INSPECT = (), ("--verify",), ("--inspect",)
HARMS = {  # file: (keys of a value that is replaced, or bytes that are kept), and what it becomes
    "manifest.json": [
        *(0, 1, 300, -2),
        (("shards", 1, "rows"), [0, 9]),
        (("settings", "val_fraction"), 0.3),  # test_shards.py has more
    ],
    ".prepare/plan.json": [
        *(0, 1, 300, -2),
        *((("settings", name), []) for name in ("val_fraction", "shard_tokens", "text_column", "tokenizer")),
        *((("units", 0, name), value) for name in ("source", "bytes", "rows") for value in ([], -1, 99)),
        *((("sources", 0, name), 5) for name in ("path", "id")),
        *(((name,), {}) for name in ("units", "sources", "settings")),
        (("units", 1, "rows"), [0, 9]),
    ],
}


@pytest.mark.parametrize("name", HARMS)
def test_a_manifest_or_a_plan_that_is_empty_cut_or_edited_is_a_line_with_what_to_do(run, docs, inputs, name):
    run(inputs, *SMALL)
    before, path = files_of(docs), docs / name
    content = path.read_text()
    for harm in HARMS[name]:
        if isinstance(harm, int):
            path.write_text(content[:harm])
        else:
            edited, keys = json.loads(content), harm[0]
            functools.reduce(operator.getitem, keys[:-1], edited)[keys[-1]] = harm[1]
            path.write_text(json.dumps(edited))
        for command in (PREPARE, VERIFY, INSPECT):
            if command == INSPECT and name == ".prepare/plan.json":
                assert "last: " in run(*command)  # it needs no plan
                continue
            with pytest.raises(ShardError, match=rf"^{path}: damaged .*; delete (it|{docs}) and .*$"):
                run(*command)
    if name == "manifest.json":
        path.unlink()
    else:
        shutil.rmtree(docs)
    run(inputs, *SMALL)
    assert files_of(docs) == before


def test_a_record_that_is_empty_cut_or_edited_is_named_by_its_line_and_its_unit_is_prepared_again(run, docs, inputs):
    run(inputs, *SMALL)
    before, path = files_of(docs), docs / ".prepare/records.jsonl"
    content = path.read_text()
    lines = content.splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if '"unit": 6,' in line)
    for old, new in (
        ('"tokens": ', '"tokens": 1'),
        ('"encoder": "tiktoken"', '"encoder": 5'),
        ('"train_', '"train'),
        ('"shards": [', '"shards": [7, '),
        ('"null": 0', '"null": 3'),
        ('"unit": 6', '"unit": 7'),
        ("{", ""),
    ):
        path.write_text("".join(line.replace(old, new, 1) if i == number else line for i, line in enumerate(lines)))
        named = f"{path}: line {number + 1} is damaged ("
        assert "last: " in run("--inspect") and named in run("--verify", code=1)
        assert named in run(inputs, *SMALL) and "nothing to do" in run(inputs, *SMALL)
        assert files_of(docs) == before and "are right" in run("--verify")
    for cut in (0, len(content) // 2, len(content) - 3):
        path.write_text(content[:cut])
        assert f"{path}: has no record of units " in run("--verify", code=1)
        assert f"{path}: has no record of units " in run(inputs, *SMALL)
        assert files_of(docs) == before
    path.write_text(content + lines[0] + '{"unit": 3, "sou')  # twice a unit, and what a kill left
    assert "nothing to do" in run(inputs, *SMALL) and "are right" in run("--verify")


# ---- datasets of earlier versions


@pytest.fixture
def old(docs, tmp_path):
    """A copy of a dataset that an earlier version made, with a val shard for each unit, and its input."""
    shutil.copytree(ROOT / "tests/data/old_data", docs)
    (tmp_path / "old_data").mkdir()
    return Path(shutil.move(docs / "texts.jsonl", tmp_path / "old_data/texts.jsonl"))


def tokens_of(folder, split):
    return [token for document in documents_of(folder, split) for token in document]


def test_an_old_dataset_is_complete_and_its_tokens_are_those_of_a_new_one(run, docs, old, monkeypatch):
    monkeypatch.chdir(old.parent.parent)  # its plan names old_data/texts.jsonl
    before = files_of(docs)
    assert "nothing to do" in run(old.relative_to(Path.cwd())) and files_of(docs) == before
    assert "are right" in run("--verify") and "sources" in run("--inspect")
    run(old, "--shard_tokens=1000", "--val_fraction=0.2", dataset="new")
    for split in ("train", "val"):
        assert tokens_of(docs, split) == tokens_of(docs.with_name("new"), split)
    assert len(list(docs.with_name("new").glob("val*"))) == 1


def test_an_old_dataset_is_extended_and_a_half_finished_one_is_completed(run, docs, old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, more = files_of(docs), write_parquet(tmp_path / "more.parquet", some_texts(200))
    run(more)
    after, expected = files_of(docs), expected_documents(some_texts(200), "val", 0.2)
    assert all(after[name] == before[name] for name in before if name != "manifest.json")
    assert documents_of(docs, "val")[-len(expected) :] == expected and "are right" in run("--verify")
    (docs / "manifest.json").unlink()
    write_records([record for number, record in read_records(read_plan(docs), docs)[0].items() if number != 1], docs)
    run()
    assert len(documents_of(docs, "val")) == 13 + len(expected) and "are right" in run("--verify")
    assert sum(shard["tokens"] for shard in read_manifest(docs)["shards"]) == read_manifest(docs)["tokens"]
