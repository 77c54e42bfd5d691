"""prepare.py: its datasets against sums by hand and against each other; kills, full disks and damage survived."""

import functools
import hashlib
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
from onecard import UserError, dataset
from onecard.durable import OwnedError
from onecard.shards import ShardError, check_shard, open_tokens, read_manifest
from onecard.sources import SourceError
from onecard.tokenizer import TokenizerError, dataset_tokenizer, load_tokenizer
from onecard.units import in_val
from prepare import PrepareError, next_units

ROOT = Path(prepare.__file__).parent
NO_SPACE = r"\.bin: could not be written \(No space left on device, after [\d,]+ bytes\); [\d,]+ bytes are free"
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
    for path in folder.glob(".prepare/unit_*.json"):
        for shard in json.loads(path.read_text())["shards"]:
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
        if shard["source"] == path.as_posix():
            first, last = shard["rows"]
            assert (shard["row_groups"][0] * 30, min(shard["row_groups"][1] * 30, len(texts))) == (first, last)
            contents = [text.encode() for text in texts[first:last] if text]
            chosen = [content for content in contents if in_val(content, 0.2) == (shard["split"] == "val")]
            assert (shard["documents"], shard["text_bytes"]) == (len(chosen), sum(map(len, chosen)))
    decode, found = load_tokenizer().decode, documents_of(docs, "train") + documents_of(docs, "val")
    assert {"a\ufffdb", "😀", "plain", "c \ufffd d", "😀!"} <= {decode(ids[1:]) for ids in found}


def test_files_are_added_nothing_old_moves_and_bytes_do_not_depend_on_workers_or_encoder(run, docs, tmp_path, whole):
    same = some_texts(60, 0)
    paths = [write_parquet(tmp_path / f"in/{n}.parquet", same + some_texts(60, n)) for n in (1, 2, 3)]
    run(paths[0], *SMALL)
    before = files_of(docs)
    assert "done already" in run(*paths, *SMALL)
    after = files_of(docs)
    assert all(after[name] == before[name] for name in before if name != "manifest.json") and len(after) > 8
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
    monkeypatch.setattr(dataset, "LINE_SECONDS", -1)
    assert re.search(r"\n  prepared 0 of about 0 MB  \d\.\d\dM tokens/s\n", run(inputs, *SMALL, dataset="more"))
    assert "checked 0 of about 0 MB" in run("--verify")


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
        *(((book, f"--task={task}"), "x", "1/16 to 16/16") for task in ("0/4", "5/4", "x", "1/0", "3")),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments, dataset=name)
        assert capsys.readouterr().out == ""


def test_max_tokens_takes_the_fewest_row_groups_and_can_grow_as_if_it_had_been_so_from_the_start(
    run, docs, tmp_path, whole
):
    texts = [*some_texts(100, 1), *some_texts(100, 2, words=5), *some_texts(100, 3)]
    for part in range(3):
        write_parquet(tmp_path / f"in/{part}.parquet", texts[100 * part : 100 * part + 100], row_group_size=10)
    counts, rows = [len(ids) for ids in expected_documents(texts, "train", 0.0)], 10
    for most in (1, 3000, 15_000, 10_000_000, 0):
        while rows < 300 and sum(counts[:rows]) < (most or 10_000_000):
            rows += 10
        options = (tmp_path / "in", f"--max_tokens={most}", "--shard_tokens=2500")
        run(*options)
        manifest = read_manifest(docs)
        assert (manifest["documents"], manifest["tokens"]) == (rows, sum(counts[:rows]))
        if most:  # 0 adds nothing to the last one
            assert files_of(docs) == whole(*options, name=f"whole{most}")
    with pytest.raises(PrepareError, match=r"max_tokens: .* tokens already"):
        run(tmp_path / "in", "--max_tokens=500", "--shard_tokens=2500")


def test_a_unit_that_was_started_early_is_done_again_if_the_limit_lies_in_it():
    plan = {"settings": {}, "units": [{"bytes": 4670}] * 3}  # 1000 tokens each are expected
    first = {"tokens": 2500, "complete": True, "limit": 3100}
    early = {"tokens": 2500, "complete": True, "limit": 0}
    cut = {"tokens": 650, "complete": False, "limit": 600}
    assert next_units(plan, {}, range(3), (), {}, 0) == [(0, 0), (1, 0), (2, 0)]
    assert next_units(plan, {}, range(3), (), {}, 2000) == [(0, 2000)]
    assert next_units(plan, {}, range(3), (), {}, 3100) == [(0, 3100), (1, 0)]
    assert next_units(plan, {0: first}, range(3), (1,), {}, 3100) == []
    assert next_units(plan, {0: first, 1: early}, range(3), (), {}, 3100) == [(1, 600)]
    assert next_units(plan, {0: first, 1: cut, 2: early}, range(3), (), {}, 3100) == []
    assert next_units(plan, {0: first, 1: cut, 2: early}, range(3), (), {}, 0) == [(1, 0)]


def test_tasks_started_at_the_same_moment_and_a_merge_make_what_one_run_makes(run, docs, inputs, start, whole):
    run(inputs, "--task=2/4", *SMALL)
    with pytest.raises(PrepareError, match=r"units \[0, 2, .* are not done"):
        run("--merge", *SMALL)
    for process in [start(inputs, f"--task={task}/4", "--workers=1") for task in (1, 3, 4)]:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "--merge" in printed, printed
    assert not (docs / "manifest.json").exists()
    run("--merge", *SMALL)
    assert files_of(docs) == whole(inputs, *SMALL)


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
            for path in list(docs.glob(".prepare/unit_*.json"))[::2]:
                path.unlink()
                for shard in docs.glob(f"*{path.stem.removeprefix('unit')}.bin"):
                    shard.unlink()
    run(inputs, *SMALL)
    assert files_of(docs) == whole(inputs, *SMALL) and not list(docs.rglob("*.tmp"))


@pytest.mark.parametrize("harm", ["SIGINT", "SIGTERM", "a dead worker"])
def test_a_signal_or_a_dead_worker_ends_all_processes_at_once_and_leaves_nothing_half(start, docs, tmp_path, harm):
    process = start(write_parquet(tmp_path / "a.parquet", some_texts(1000, words=2000), 1000), "--workers=2")
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
    assert harm == "SIGTERM" or not list(docs.glob("*.tmp"))
    if harm == "SIGINT":
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
    with pytest.raises(ShardError, match=NO_SPACE):
        run(*options, data_dir=disk)
    assert_nothing_is_half(disk / "docs")
    before = files_of(disk / "docs")
    assert not list(disk.rglob("*.tmp")) and len(before) > 1
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    run(*options, data_dir=disk)
    run(*options)
    assert before.items() < files_of(docs).items() == files_of(disk / "docs").items()


@pytest.mark.parametrize("lock", ["all.lock", "task_1_of_2.lock"])
def test_a_second_prepare_names_the_first_and_a_kill_frees_it(run, docs, inputs, monkeypatch, lock):
    monkeypatch.setattr(prepare, "PLANNING_SECONDS", 0.2)
    (docs / ".prepare").mkdir(parents=True)
    code = f"import onecard.durable as d, time\nwith d.owned({str(docs / '.prepare' / lock)!r}, ''): print(flush=True)"
    with subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(99)"], stdout=subprocess.PIPE, cwd=ROOT) as first:
        first.stdout.readline()
        for refused in ((), ("--merge",), ("--task=1/2",)):
            with pytest.raises(OwnedError, match=f"process {first.pid} on "):
                run(inputs, *refused)
        if lock == "task_1_of_2.lock":
            run(inputs, "--task=2/2")
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
    (docs / ".prepare/unit_000007.json").unlink()  # as if killed after its shards, before its record
    leftover = docs / "val_000007.bin.0123abcd.tmp"
    leftover.write_bytes(b"half")
    printed = run(inputs, *SMALL)
    assert all(f"unit {number} is prepared again" in printed for number in (2, 4))
    assert files_of(docs) == before and not leftover.exists()


EDITS = {  # values that are replaced by a list
    "unit_000006.json": (("replaced",), ("encoder",), ("tokens",), ("shards", 0, "name"), ("skipped", "null")),
    "plan.json": (
        *(("settings", name) for name in ("val_fraction", "shard_tokens", "text_column", "tokenizer")),
        *(("units", 0, name) for name in ("source", "bytes", "rows")),
        *(("sources", 0, name) for name in ("path", "id")),
    ),
    "../manifest.json": (("tokenizer",), ("documents",), ("shards", 0, "split"), ("shards", 0, "tokens")),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_plan_a_record_or_a_manifest_that_is_empty_cut_or_edited_is_a_line_with_what_to_do(run, docs, inputs, name):
    run(inputs, *SMALL)
    before, path = files_of(docs), (docs / ".prepare" / name).resolve()
    content = path.read_text()
    for keys in (0, 50, *EDITS[name]):
        edited = json.loads(content)
        if isinstance(keys, tuple):
            functools.reduce(operator.getitem, keys[:-1], edited)[keys[-1]] = []
        path.write_text(json.dumps(edited) if isinstance(keys, tuple) else content[:keys])
        if name == "unit_000006.json":
            assert prepare.read_records(dataset.read_plan(docs), range(5, 7), docs).keys() == {5}
        for command in {"plan.json": [()], "../manifest.json": [(), ("--verify",), ("--inspect",)]}.get(name, []):
            with pytest.raises(ShardError, match=rf"{path.name}: damaged .*; delete (it|{docs}) and "):
                run(*command)
    if name == "plan.json":
        shutil.rmtree(docs)
    elif name == "../manifest.json":
        path.unlink()
    assert ("unit 6 is prepared again" in run(inputs, *SMALL)) == (name == "unit_000006.json")
    assert files_of(docs) == before
