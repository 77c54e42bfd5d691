"""prepare.py: its datasets against sums by hand and against each other, and what it survives: kills, full disks, damage."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from texts import (
    count_tokens,
    documents_of,
    expected_documents,
    files_of,
    flip_bit,
    some_texts,
    wait_for,
    write_parquet,
)

import prepare
from onecard.durable import OwnedError
from onecard.shards import ShardError, Windows, check_shard, open_tokens, read_manifest
from onecard.sources import SourceError
from onecard.tokenizer import load_tokenizer
from onecard.units import in_val
from prepare import PrepareError, next_units

ROOT = Path(prepare.__file__).parent
CORPUS = sorted(ROOT.parent.glob("shared/corpus/*.parquet"))
POSIX = pytest.mark.skipif(os.name != "posix", reason="kills and limits as POSIX has them")


@pytest.fixture
def run(tmp_path, capsys):
    """prepare.py in this process: (exit code, what it printed). The default dataset is data/docs."""

    def run(*arguments, dataset="docs", data_dir=tmp_path / "data"):
        code, arguments = 0, ["--encoder=tiktoken", *map(str, arguments), f"--data_dir={data_dir}"]
        try:
            prepare.main([*arguments, f"--dataset={dataset}"] if dataset else arguments)
        except SystemExit as stop:
            code = stop.code
        return code, "".join(capsys.readouterr())

    return run


@pytest.fixture
def start(tmp_path):
    """Starts prepare.py in a process group of its own, which is killed at the end."""
    started = []

    def start(*arguments, **options):
        line = [sys.executable, "prepare.py", "--encoder=tiktoken", *map(str, arguments)]
        line += [f"--data_dir={tmp_path / 'data'}", "--dataset=docs", "--shard_tokens=3000"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen(line, cwd=ROOT, **pipes, **options))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def inputs(tmp_path):
    """A folder of three files, which are 18 units with --shard_tokens=3000."""
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


def group_is_empty(process):
    """Whether no process of its group is left. A dead one that nobody has waited for does not count."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = status.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state != "Z":
                return False
    return True


# ---- the dataset -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CORPUS, reason="../shared/corpus is not there")
@pytest.mark.parametrize("most", [2_000_000, pytest.param(0, marks=pytest.mark.slow)])
def test_the_corpus_has_its_own_token_counts_and_tiktokens_ids(run, tmp_path, most):
    assert run(*CORPUS, f"--max_tokens={most}")[0] == 0
    folder, rows = tmp_path / "data/docs", []
    manifest = read_manifest(folder)
    for path in CORPUS:
        rows += pq.read_table(path, columns=["text", "token_count"]).to_pylist()
    assert most or manifest["documents"] == len(rows)
    rows = rows[: manifest["documents"]]
    assert manifest["tokens"] == sum(row["token_count"] for row in rows) + len(rows) > most
    assert sum(Windows(folder, split, 1024).tokens for split in ("train", "val")) == manifest["tokens"]
    texts = [row["text"] for row in rows]
    train = [text for text in texts if not in_val(text.encode(), 0.005)]
    assert documents_of(folder, "val") == expected_documents(texts, "val")
    assert documents_of(folder, "train")[::50] == expected_documents(train[::50], "train")
    code, printed = run("--verify")
    assert code == 0 and "right" in printed and "token_count" not in printed


def test_bytes_do_not_depend_on_workers_or_encoder_and_duplicates_share_a_split(run, tmp_path):
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / "in" / f"{name}.parquet", some_texts(60, 0) + some_texts(60, ord(name)))
    options = (tmp_path / "in", "--val_fraction=0.3", "--shard_tokens=3000")
    folders = []
    for number, extra in enumerate((("--workers=1",), ("--workers=3",), ("--workers=2", "--encoder=auto"))):
        assert run(*options, *extra, dataset=f"d{number}")[0] == 0
        folders.append(files_of(tmp_path / "data" / f"d{number}"))
    assert len(folders[0]) > 8 and folders[0] == folders[1]
    different = {name for name in folders[0] if folders[0][name] != folders[2][name]}
    assert folders[0].keys() == folders[2].keys() and different <= {"manifest.json"}  # which names the encoder
    train, val = ({tuple(ids) for ids in documents_of(tmp_path / "data/d0", split)} for split in ("train", "val"))
    assert not train & val and len(val) > 20


def test_the_manifest_names_the_rows_of_every_shard_and_counts_what_was_skipped_or_replaced(run, tmp_path):
    texts = [*some_texts(199), None, "", None, " "]
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=30)
    lines = [{"text": "a\ud800b"}, {"text": "\ud83d\ude00"}, {"text": "plain"}, {"text": None}, {"other": 1}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, printed = run(path, tmp_path / "b.jsonl", "--shard_tokens=4000", "--val_fraction=0.3")
    folder = tmp_path / "data/docs"
    manifest = read_manifest(folder)
    assert code == 0 and manifest["documents"] == 200 + 3 and "4 null, 1 empty" in printed
    assert manifest["skipped"] == {"null": 4, "empty": 1} and manifest["replaced"] == 1
    assert manifest["tokenizer"]["n_vocab"] == 50257 and manifest["libraries"]["tiktoken"]
    assert manifest["settings"]["val_fraction"] == 0.3 and manifest["encoder"] == "tiktoken"
    for shard in manifest["shards"]:
        content = (folder / shard["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"] and len(content) == 1024 + 2 * shard["tokens"]
        if shard["source"] != path.as_posix():
            continue
        first, last = shard["rows"]
        assert (shard["row_groups"][0] * 30, min(shard["row_groups"][1] * 30, len(texts))) == (first, last)
        chosen = [t.encode() for t in texts[first:last] if t and in_val(t.encode(), 0.3) == (shard["split"] == "val")]
        assert (shard["documents"], shard["text_bytes"]) == (len(chosen), sum(map(len, chosen)))
    decode, found = load_tokenizer().decode, documents_of(folder, "train") + documents_of(folder, "val")
    assert {"a\ufffdb", "😀", "plain"} <= {decode(ids[1:]) for ids in found}


def test_files_are_added_by_the_same_command_and_nothing_old_moves(run, tmp_path):
    paths = [write_parquet(tmp_path / f"{name}.parquet", some_texts(80, ord(name))) for name in "bca"]
    options = ("--val_fraction=0.2", "--shard_tokens=2000")
    assert run(paths[0], *options)[0] == 0
    before = files_of(tmp_path / "data/docs")
    code, printed = run(*paths, *options)
    after = files_of(tmp_path / "data/docs")
    assert code == 0 and all(after[name] == before[name] for name in before if name != "manifest.json")
    assert len(after) > len(before) and "done already" in printed
    assert run(*paths, *options, dataset="whole")[0] == 0
    assert files_of(tmp_path / "data/whole") == after


def test_a_finished_dataset_is_not_touched_and_files_are_known_by_their_content(run, tmp_path):
    one, two = (write_parquet(tmp_path / f"{n}/000.parquet", some_texts(50, n)) for n in (1, 2))
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(one.read_bytes())
    code, printed = run(one, two, copy, two)
    assert code == 0 and read_manifest(tmp_path / "data/docs")["documents"] == 100
    assert f"{copy.as_posix()}: the same as {one.as_posix()}" in printed and "no document is in val" in printed
    assert f"{two.as_posix()}: the same as {two.as_posix()}" in printed
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "data/docs").rglob("*") if p.suffix != ".lock"}
    for arguments in ((one, two), ()):
        code, printed = run(*arguments)
        assert code == 0 and "nothing to do" in printed
    assert all(p.stat().st_mtime_ns == before for p, before in times.items())
    moved = one.rename(tmp_path / "moved.parquet")
    assert "nothing to do" in run(moved)[1]
    assert read_manifest(tmp_path / "data/docs")["shards"][0]["source"] == moved.as_posix()
    write_parquet(two, some_texts(50, 3))
    with pytest.raises(PrepareError, match=r"2/000\.parquet: has changed"):
        run(two)


def test_settings_of_a_dataset_cannot_change(run, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(50))
    run(path, "--val_fraction=0.1")
    with pytest.raises(PrepareError) as error:
        run(path, "--val_fraction=0.2", "--shard_tokens=5000")
    first, second = str(error.value).splitlines()
    assert "0.1, not 0.2" in first and "100000000, not 5000" in second
    for arguments, value in (((path,), 0.005), (("--val_fraction=0.3",), 0.3)):
        with pytest.raises(PrepareError, match=f"0.1, not {value}"):
            run(*arguments)
    assert "nothing to do" in run()[1]  # without inputs, settings that are not given stay as they were


def test_wrong_inputs_are_all_named_before_any_work(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    good, names = write_parquet(tmp_path / "good.parquet", ["x"]), ("none.parquet", "empty", "notes.md", "*.nothing")
    with pytest.raises(SourceError) as error:
        run(good, *(tmp_path / name for name in names))
    for name, line in zip(names, str(error.value).splitlines(), strict=True):
        assert line.startswith(f"{tmp_path}/{name}: ")
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(good).rename_columns(["content"]).append_column("score", [[1]]), other)
    with pytest.raises(PrepareError, match=r"other\.parquet: no column 'text' in content, score; .*--text_column="):
        run(good, other)
    with pytest.raises(PrepareError, match="column 'score' holds int64, not text"):
        run(other, "--text_column=score")
    with pytest.raises(PrepareError, match="nothing is prepared here yet"):
        run(dataset="unknown")
    for task in ("0/4", "5/4", "x", "1/0", "3"):
        with pytest.raises(ValueError, match="1/16 to 16/16"):
            run(good, f"--task={task}")
    assert not list(tmp_path.glob("data/**/*.bin"))
    assert run(other, "--text_column=content")[0] == 0


@pytest.mark.parametrize("most", [1, 700, 3000, 9000, 15_000, 10_000_000])
def test_max_tokens_takes_the_fewest_row_groups_in_order(run, tmp_path, most):
    texts = [*some_texts(100, 1), *some_texts(100, 2, words=5), *some_texts(100, 3)]
    for part in range(3):
        write_parquet(tmp_path / f"in/{part}.parquet", texts[100 * part : 100 * part + 100], row_group_size=10)
    counts, rows = count_tokens(texts), 10
    while rows < 300 and sum(counts[:rows]) + rows < most:
        rows += 10
    found = []
    for workers in (1, 3):
        options = (f"--max_tokens={most}", "--shard_tokens=2500", f"--workers={workers}")
        assert run(tmp_path / "in", *options, dataset=f"d{workers}")[0] == 0
        found.append(files_of(tmp_path / f"data/d{workers}"))
    manifest = read_manifest(tmp_path / "data/d1")
    assert (manifest["documents"], manifest["tokens"]) == (rows, sum(counts[:rows]) + rows)
    assert found[0] == found[1]


def test_max_tokens_can_grow_and_ends_as_if_it_had_been_so_from_the_start(run, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(200))
    for most in (500, 4000, 4000, 0):
        assert run(path, f"--max_tokens={most}", "--shard_tokens=3000")[0] == 0
    assert run(path, "--shard_tokens=3000", dataset="whole")[0] == 0
    assert files_of(tmp_path / "data/docs") == files_of(tmp_path / "data/whole")
    with pytest.raises(PrepareError, match=r"max_tokens: .* tokens already"):
        run(path, "--max_tokens=500", "--shard_tokens=3000")


def test_a_unit_that_was_started_early_is_done_again_if_the_limit_lies_in_it():
    plan = {"units": [{"bytes": 4670}, {"bytes": 4670}, {"bytes": 4670}]}  # 1000 tokens each are expected
    first = {"tokens": 2500, "complete": True, "limit": 3100}
    whole = {"tokens": 2500, "complete": True, "limit": 0}
    cut = {"tokens": 650, "complete": False, "limit": 600}
    for records, running, most, expected in (
        ({}, (), 0, [(0, 0), (1, 0), (2, 0)]),
        ({}, (), 2000, [(0, 2000)]),
        ({}, (), 3100, [(0, 3100), (1, 0)]),
        ({0: first}, (1,), 3100, []),
        ({0: first, 1: whole}, (), 3100, [(1, 600)]),
        ({0: first, 1: cut, 2: whole}, (), 3100, []),
        ({0: first, 1: cut, 2: whole}, (), 0, [(1, 0)]),
    ):
        assert next_units(plan, records, range(3), running, {}, most) == expected


def test_tasks_and_a_merge_make_what_one_run_makes(run, inputs, tmp_path):
    options = (inputs, "--shard_tokens=3000", "--val_fraction=0.2")
    for task in ("2/3", "1/3"):
        code, printed = run(*options, f"--task={task}")
        assert code == 0 and "--merge" in printed
    assert not (tmp_path / "data/docs/manifest.json").exists()
    with pytest.raises(PrepareError, match=r"units \[2, 5, .* are not done"):
        run("--merge")
    assert run(*options, "--task=3/3")[0] == 0
    assert run("--merge")[0] == 0
    assert run(*options, dataset="whole")[0] == 0
    assert files_of(tmp_path / "data/docs") == files_of(tmp_path / "data/whole")


# ---- a look at a dataset -----------------------------------------------------------------------------------


def test_inspect_shows_counts_lengths_sources_and_texts(run, tmp_path):
    texts = [f"word{' word' * (i % 10)}" for i in range(200)]
    path = write_parquet(tmp_path / "a.parquet", ["FIRST document", *texts, "LAST document"])
    run(path, "--val_fraction=0.0")
    code, printed = run("--inspect")
    assert code == 0
    for part in ("202", path.as_posix(), "first: FIRST document", "last: LAST document", "0 null, 0 empty"):
        assert part in printed, part
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "long " * 30_000}))  # one document, longer than is decoded
    assert run(tmp_path / "a.jsonl", dataset="long")[0] == 0
    code, printed = run("--inspect", dataset="long")
    assert code == 0 and "30,001, 30,001" in printed and "last: long long" in printed


def test_verify_compares_with_token_count(run, tmp_path):
    texts = some_texts(100)
    counts = count_tokens(texts)
    right = write_parquet(tmp_path / "right.parquet", texts, token_count=counts)
    assert run(right, "--shard_tokens=1500", "--max_tokens=4000")[0] == 0
    code, printed = run("--verify")
    assert code == 0 and "are right" in printed and "token_count" not in printed
    wrong = write_parquet(tmp_path / "wrong.parquet", texts, token_count=[counts[0] + 1, *counts[1:]])
    run(wrong, dataset="wrong")
    code, printed = run("--verify", dataset="wrong")
    assert code == 1 and f"rows 0 to 100 is {sum(counts) + 1:,}, not {sum(counts):,}" in printed
    with pytest.raises(PrepareError, match="no finished dataset"):
        run("--verify", dataset="none")


def test_the_quickstart_is_half_a_million_tokens_of_english_with_fineweb_s_columns(run, tmp_path):
    code, printed = run(dataset="")
    folder = tmp_path / "data/quickstart"
    table, manifest = pq.read_table(folder / "quickstart.parquet"), read_manifest(folder)
    columns = ["text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count"]
    assert code == 0 and table.column_names == columns and str(table.schema.field("token_count").type) == "int64"
    assert manifest["tokens"] == sum(table["token_count"].to_pylist()) + len(table)
    assert 400_000 < manifest["tokens"] < 800_000
    val = Windows(folder, "val", 128).tokens
    assert 0.03 < val / manifest["tokens"] < 0.07 and "next: python train.py config/quickstart.py" in printed
    code, printed = run(dataset="")
    assert code == 0 and "nothing to do" in printed


# ---- kills -------------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_run_again_the_bytes_are_those_of_a_run_never_stopped(
    start, run, inputs, tmp_path, kills
):
    options = (inputs, "--val_fraction=0.1", "--shard_tokens=3000")
    assert run(*options, dataset="whole")[0] == 0
    folder, draw, killed, tries = tmp_path / "data/docs", random.Random(kills), 0, 0
    while killed < kills:
        tries += 1
        assert tries < 6 * kills, "it is done before it can be killed"
        process = start(*options, f"--workers={1 + tries % 3}")
        begun = len(list(folder.glob("*")))
        if tries % 2:  # half of the kills come when there is new work to harm
            wait_for(lambda: process.poll() is not None or len(list(folder.glob("*"))) > begun)  # noqa: B023
        time.sleep(draw.uniform(0, 0.05 if tries % 2 else 1.5))
        done = process.poll() is not None
        killed += not done
        process.kill()
        process.wait()
        wait_for(lambda: group_is_empty(process))  # noqa: B023
        assert_nothing_is_half(folder)
        if done or tries % 3 == 2:  # take half of the units away, so that the next kills find work
            for path in list(folder.glob(".prepare/unit_*.json"))[::2]:
                path.unlink()
                for shard in folder.glob(f"*{path.stem.removeprefix('unit')}.bin"):
                    shard.unlink()
    assert run(*options)[0] == 0
    assert files_of(folder) == files_of(tmp_path / "data/whole") and not list(folder.rglob("*.tmp"))


@POSIX
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("harm", ["SIGINT", "SIGTERM", "a dead worker"])
def test_a_signal_or_a_dead_worker_ends_all_processes_at_once_and_leaves_nothing_half(start, tmp_path, harm):
    path = write_parquet(tmp_path / "a.parquet", some_texts(4000, words=2000), row_group_size=1000)
    process, folder = start(path, "--workers=2"), tmp_path / "data/docs"
    wait_for(lambda: list(folder.glob("*.tmp")) or process.poll() is not None)
    begun = time.monotonic()
    if harm == "a dead worker":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        os.kill(int(workers[0]), signal.SIGKILL)
    else:
        (os.killpg if harm == "SIGINT" else os.kill)(process.pid, signal.Signals[harm])
    printed = "".join(process.communicate(timeout=20))
    wait_for(lambda: group_is_empty(process))
    assert time.monotonic() - begun < 10 and "Traceback" not in printed
    assert_nothing_is_half(folder)
    if harm == "SIGINT":
        assert process.returncode == 130 and "the same command continues" in printed
    if harm == "a dead worker":
        assert process.returncode == 2 and "died (exit code -9" in printed and "--workers" in printed
    assert harm == "SIGTERM" or not list(folder.glob("*.tmp"))


# ---- full disks and two writers ----------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_reported_before_any_work(run, inputs, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(PrepareError, match=r"[\d,]+ bytes are needed and 10,000 are free; .*--max_tokens"):
        run(inputs)
    assert not list((tmp_path / "data").rglob("*.bin"))


@POSIX
def test_a_limit_on_file_size_is_named_with_file_and_bytes_and_leaves_the_rest_intact(start, run, inputs, tmp_path):
    import resource

    assert run(write_parquet(tmp_path / "small.parquet", ["a few words"]), "--shard_tokens=3000")[0] == 0
    folder = tmp_path / "data/docs"
    before = files_of(folder)
    process = start(inputs, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)))
    printed = "".join(process.communicate(timeout=60))
    assert process.returncode == 2 and "could not be written" in printed and "Traceback" not in printed
    assert "File too large" in printed and "bytes" in printed
    assert not list(folder.rglob("*.tmp")) and before.items() <= files_of(folder).items()
    assert_nothing_is_half(folder)


@POSIX
def test_a_disk_that_fills_up_all_the_same(run, tmp_path, small_disk):
    """Prose comes first, by which the need is estimated, then digits, which need four times as much."""
    disk, draw = small_disk("300k"), random.Random(0)
    digits = ["".join(draw.choices("1234567890 +-*/", k=2000)) for _ in range(250)]
    prose = ["some quite ordinary words about nothing much " * 20 for _ in range(300)]
    path = write_parquet(tmp_path / "a.parquet", prose + digits, row_group_size=300)
    options = (path, "--shard_tokens=3000", "--workers=1")
    with pytest.raises(ShardError, match=r"\.bin: could not be written .*No space left on device.* bytes"):
        run(*options, data_dir=disk)
    assert_nothing_is_half(disk / "docs")
    assert not list(disk.rglob("*.tmp")) and list(disk.rglob("train_*.bin"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    assert run(*options, data_dir=disk)[0] == run(*options)[0] == 0
    assert files_of(tmp_path / "data/docs") == files_of(disk / "docs")


@pytest.mark.parametrize(
    ("held", "arguments", "free"),
    [
        ("all.lock", (), False),
        ("all.lock", ("--task=1/2",), False),
        ("task_1_of_2.lock", ("--merge",), False),
        ("task_1_of_2.lock", ("--task=1/2",), False),
        ("task_1_of_2.lock", ("--task=2/2",), True),
    ],
)
def test_a_second_prepare_names_the_first_and_a_kill_frees_it(
    run, inputs, tmp_path, monkeypatch, held, arguments, free
):
    monkeypatch.setattr(prepare, "PLANNING_SECONDS", 0.2)
    lock = tmp_path / "data/docs/.prepare" / held
    lock.parent.mkdir(parents=True)
    code = f"import time\nfrom onecard import durable\nwith durable.owned({str(lock)!r}, ''): print(1, flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        if not free:
            with pytest.raises(OwnedError, match=f"process {first.pid} on "):
                run(inputs, *arguments)
        else:
            assert run(inputs, *arguments)[0] == 0
        first.kill()
    if "--merge" not in arguments:
        assert run(inputs, *arguments)[0] == 0


def test_all_tasks_may_begin_at_the_same_moment(start, run, inputs, tmp_path):
    processes = [start(inputs, f"--task={task}/5", "--workers=1") for task in range(1, 6)]
    for process in processes:
        printed = process.communicate(timeout=120)
        assert process.returncode == 0, printed
    options = ("--shard_tokens=3000",)
    assert run("--merge", *options)[0] == 0 and run(inputs, *options, dataset="whole")[0] == 0
    assert files_of(tmp_path / "data/docs") == files_of(tmp_path / "data/whole")


# ---- damage ------------------------------------------------------------------------------------------------


def test_broken_files_are_named_the_others_are_prepared_and_once_repaired_they_are_added(run, inputs, tmp_path):
    content = (inputs / "1.parquet").read_bytes()
    harms = {"cut": content[: len(content) // 2], "cut in the footer": content[:-100], "empty": b""}
    harms["not parquet"] = b"not parquet at all, but long enough"
    for name, harmed in harms.items():
        (inputs / f"{name}.parquet").write_bytes(harmed)
    code, printed = run(inputs)
    assert code == 1 and read_manifest(tmp_path / "data/docs")["documents"] == 750
    for number, name in enumerate(harms):
        path = inputs / f"{name}.parquet"
        assert f"left out: {path.as_posix()}: cannot be read" in printed
        write_parquet(path, some_texts(50, 10 + number))
    assert run(inputs)[0] == 0
    assert read_manifest(tmp_path / "data/docs")["documents"] == 950


def test_a_flipped_bit_in_a_page_fails_its_unit_alone_until_it_is_repaired(run, tmp_path):
    good = write_parquet(tmp_path / "good.parquet", some_texts(100, 1))
    path = write_parquet(tmp_path / "bad.parquet", some_texts(600, 2), row_group_size=50, write_page_checksum=True)
    group = pq.ParquetFile(path).metadata.row_group(6).column(0)
    position = group.data_page_offset + group.total_compressed_size // 2
    flip_bit(path, position)
    for _ in range(2):  # the second run tries it again
        code, printed = run(good, path, "--shard_tokens=3000")
        manifest = read_manifest(tmp_path / "data/docs")
        assert code == 1 and f"failed: {path.as_posix()}: cannot be read" in printed
        assert 100 < manifest["documents"] < 700 and len(manifest["failed"]) == 1
    flip_bit(path, position)
    assert run(good, path, "--shard_tokens=3000")[0] == 0
    assert read_manifest(tmp_path / "data/docs")["documents"] == 700


def test_whatever_of_a_dataset_is_damaged_lost_or_cut_is_named_and_made_again(run, inputs, tmp_path):
    options = (inputs, "--val_fraction=0.2", "--shard_tokens=3000")
    run(*options)
    folder = tmp_path / "data/docs"
    before, path = files_of(folder), folder / "train_000004.bin"
    for position in (10, 2000, len(before[path.name]) - 1):
        flip_bit(path, position, bit=64)
        code, printed = run("--verify")
        assert code == 1 and f"{path}: " in printed and printed.count(".bin: ") == 1
        path.write_bytes(before[path.name])
    path.unlink()
    (folder / "val_000003.bin").unlink()
    (folder / "train_000002.bin").write_bytes(before["train_000002.bin"][:-2])
    record = folder / ".prepare/unit_000006.json"
    record.write_text(record.read_text()[:50])
    code, printed = run(*options)
    assert code == 0 and files_of(folder) == before
    assert all(f"unit {number} is prepared again" in printed for number in (2, 3, 4, 6))
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match=r"manifest\.json: "):
        run(*options)
    (folder / "manifest.json").unlink()
    assert run(*options)[0] == 0 and files_of(folder) == before
    assert run("--verify")[0] == 0
