"""The rows of the fault list that concern data: each harm is really done to prepare.py."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare
from prepare import PrepareError
from onecard.shards import open_tokens, read_manifest
from onecard.tokenizer import load_tokenizer

ROOT = Path(prepare.__file__).parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="kills and limits as POSIX has them")
WORDS = ["the", "of", "and", "quick", "brown", "1234", "document", "<|endoftext|>", "naïve", "don't\n\n"]


def some_texts(count, seed=0, words=60):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 2 * words))) for _ in range(count)]


def write_parquet(path, texts, row_group_size=50, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    column = texts if isinstance(texts, pa.Array) else pa.array(texts)
    pq.write_table(pa.table({"text": column}), path, row_group_size=row_group_size, **options)
    return path


@pytest.fixture
def inputs(tmp_path):
    """A folder of three files with 18 units of 3000 tokens, about."""
    for number in range(3):
        write_parquet(tmp_path / f"in/{number}.parquet", some_texts(250, number))
    return tmp_path / "in"


@pytest.fixture
def start(tmp_path):
    """Starts prepare.py in a process group of its own; whatever is left of it is killed at the end."""
    started = []

    def start(*arguments, dataset="docs", **options):
        line = [sys.executable, "prepare.py", "--encoder=tiktoken", *map(str, arguments)]
        line += [f"--data_dir={tmp_path / 'data'}", f"--dataset={dataset}", "--shard_tokens=3000"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen(line, cwd=ROOT, **pipes, **options))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def run(start):
    """Runs prepare.py to its end: (exit code, what it printed)."""

    def run(*arguments, **options):
        process = start(*arguments, **options)
        said = "".join(process.communicate(timeout=300))
        assert "Traceback" not in said, said
        return process.returncode, said

    return run


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def assert_nothing_is_half(folder):
    """Every file with a final name is whole: each shard has its size, each record its shards and their hashes."""
    for path in folder.glob("*.bin"):
        open_tokens(path)
    for path in folder.glob(".prepare/unit_*.json"):
        for shard in json.loads(path.read_text())["shards"]:
            prepare.check_shard(folder / shard["name"], shard, {"n_vocab": 50257, "eot": 50256})


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def group_is_empty(process):
    """Whether no process of its group is left (a dead one that nobody has waited for does not count)."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = status.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state != "Z":
                return False
    return True


# ---- kills -------------------------------------------------------------------------------------------------


@POSIX
def test_killed_at_ten_random_moments_and_run_again_the_bytes_are_those_of_a_run_never_stopped(
    start, run, inputs, tmp_path
):
    assert run(inputs, "--val_fraction=0.1", dataset="whole")[0] == 0
    whole, folder, draw = files_of(tmp_path / "data/whole"), tmp_path / "data/docs", random.Random(0)
    kills = tries = 0
    while kills < 10:
        tries += 1
        assert tries < 60, "it is done before it can be killed"
        process = start(inputs, "--val_fraction=0.1", f"--workers={1 + tries % 3}")
        begun = len(list(folder.glob("*")))
        if tries % 2:  # half of them once there is new work to be harmed
            wait_for(lambda: process.poll() is not None or len(list(folder.glob("*"))) > begun)  # noqa: B023
        time.sleep(draw.uniform(0, 0.05 if tries % 2 else 1.5))
        done = process.poll() is not None
        kills += not done
        process.kill()
        process.wait()
        wait_for(lambda: group_is_empty(process))  # noqa: B023
        assert_nothing_is_half(folder)
        if done or tries % 3 == 2:  # as if half had not been done yet, so that ten kills find work
            for path in list(folder.glob(".prepare/unit_*.json"))[::2]:
                path.unlink()
                for shard in folder.glob(f"*{path.stem.removeprefix('unit')}.bin"):
                    shard.unlink()
    assert run(inputs, "--val_fraction=0.1")[0] == 0
    assert files_of(folder) == whole


@POSIX
@pytest.mark.parametrize(
    ("call", "number"), [("os.fsync", 2), ("os.fsync", 4), *(("os.replace", n) for n in (1, 2, 3, 4))]
)
def test_killed_at_each_step_of_writing_a_unit(start, run, tmp_path, call, number):
    """The step: before the sync or the rename of plan, train shard, val shard, record."""
    path = write_parquet(tmp_path / "a.parquet", some_texts(60))
    assert run(path, "--val_fraction=0.3", dataset="whole")[0] == 0
    folder = tmp_path / "data/docs"
    options = f"data_dir={str(tmp_path / 'data')!r}, dataset='docs', val_fraction=0.3, shard_tokens=3000"
    code = f"""if True:
        import durable, os, pathlib, prepare, tokenizer
        real, calls = {call}, []
        def deadly(*arguments):
            calls.append(arguments)
            if len(calls) == {number}:
                os.kill(os.getpid(), 9)
            return real(*arguments)
        durable.sync_folder = lambda folder: None
        {call} = deadly
        folder = pathlib.Path({str(folder)!r})
        (folder / ".prepare").mkdir(parents=True)
        config = prepare.PrepareConfig(inputs=({str(path)!r},), {options})
        plan = prepare.make_plan(prepare.examine_all(config)[0], config, folder)
        prepare.prepare_unit(prepare.make_job(plan, 0, 0, folder), tokenizer.load_tokenizer(), print)
    """
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    assert_nothing_is_half(folder)
    assert run(path, "--val_fraction=0.3")[0] == 0
    assert files_of(folder) == files_of(tmp_path / "data/whole")
    assert not list(folder.rglob("*.tmp"))


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_all_workers_at_once_without_a_traceback_and_leaves_nothing_half(start, run, tmp_path, number):
    texts = some_texts(4000, words=2000)
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=1000)
    process = start(path, "--workers=2")
    wait_for(lambda: list((tmp_path / "data/docs").glob("*.tmp")) or process.poll() is not None)
    begun = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = "".join(process.communicate(timeout=20))
    wait_for(lambda: group_is_empty(process))
    assert time.monotonic() - begun < 10 and "Traceback" not in said
    assert_nothing_is_half(tmp_path / "data/docs")
    if number == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on" in said
        assert not list((tmp_path / "data/docs").glob("*.tmp"))


@POSIX
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_worker_that_dies_is_said_and_not_waited_for(start, run, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", some_texts(4000, words=2000), row_group_size=1000)
    process = start(path, "--workers=1")
    folder = tmp_path / "data/docs"
    wait_for(lambda: list(folder.glob("*.tmp")) or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    said = "".join(process.communicate(timeout=20))
    assert process.returncode == 2 and "died (exit code -9" in said and "--workers" in said
    assert workers and "Traceback" not in said and not list(folder.glob("*.tmp"))


# ---- full disks --------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_said_before_any_work(inputs, tmp_path, monkeypatch, capsys):
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(PrepareError, match=r"[\d,]+ bytes are needed and 10,000 are free; .*--max_tokens"):
        prepare.main([str(inputs), "--dataset=docs", f"--data_dir={tmp_path / 'data'}"])
    assert not list((tmp_path / "data").rglob("*.bin"))


@POSIX
def test_a_limit_on_file_size_is_named_with_file_and_bytes_and_leaves_the_rest_intact(run, inputs, tmp_path):
    import resource

    assert run(inputs, dataset="whole")[0] == 0
    write_parquet(tmp_path / "small.parquet", ["a few words"])
    assert run(tmp_path / "small.parquet")[0] == 0
    folder = tmp_path / "data/docs"
    before = files_of(folder)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # noqa: E731
    code, said = run(inputs, preexec_fn=limit)
    assert code == 2 and "could not be written" in said and "File too large" in said and "bytes" in said
    assert not list(folder.rglob("*.tmp")) and before.items() <= files_of(folder).items()
    assert_nothing_is_half(folder)


@POSIX
def test_a_disk_that_fills_up_all_the_same(run, tmp_path):
    """A file system of 300 KB: prose first, by which the need is judged, then digits, which need four times that."""
    disk = tmp_path / "data"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        draw = random.Random(0)
        digits = ["".join(draw.choices("1234567890 +-*/", k=2000)) for _ in range(250)]
        prose = ["some quite ordinary words about nothing much " * 20 for _ in range(300)]
        path = write_parquet(tmp_path / "a.parquet", prose + digits, row_group_size=300)
        code, said = run(path, "--max_tokens=0", "--workers=1")
        assert code == 2 and "No space left on device" in said and ".bin: could not be written past" in said
        assert_nothing_is_half(disk / "docs")
        assert not list(disk.rglob("*.tmp")) and list(disk.rglob("train_*.bin"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert run(path)[0] == 0
        found = files_of(disk / "docs")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert run(path)[0] == 0
    assert files_of(tmp_path / "data/docs") == found


# ---- two writers -------------------------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path):
    """A process that holds a lock of the dataset `docs`; its pid is what others must name."""
    processes = []

    def hold(name):
        path = str(tmp_path / "data/docs/.prepare" / name)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        code = f"import time, durable\nwith durable.owned({path!r}, ''): print(1, flush=True); time.sleep(99)"
        processes.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE))
        processes[-1].stdout.readline()
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("held", "arguments", "free"),
    [
        ("all.lock", (), False),
        ("all.lock", ("--task=1/2",), False),
        ("task_1_of_2.lock", (), False),
        ("task_1_of_2.lock", ("--merge",), False),
        ("task_1_of_2.lock", ("--task=1/2",), False),
        ("task_1_of_2.lock", ("--task=2/2",), True),
    ],
)
def test_a_second_prepare_of_a_dataset_or_task_names_the_first_and_a_kill_frees_it(
    run, inputs, holder, held, arguments, free
):
    first = holder(held)
    begun = time.monotonic()
    code, said = run(inputs, *arguments)
    if free:
        assert code == 0, said
        return
    assert code == 2 and f"process {first.pid} on " in said and time.monotonic() - begun < 20
    first.kill()
    first.wait()
    if "--merge" not in arguments:
        assert run(inputs, *arguments)[0] == 0


def test_all_tasks_may_begin_at_the_same_moment(start, run, inputs, tmp_path):
    processes = [start(inputs, f"--task={task}/5", "--workers=1") for task in range(1, 6)]
    for process in processes:
        said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert run("--merge")[0] == 0 and run(inputs, dataset="whole")[0] == 0
    assert files_of(tmp_path / "data/docs") == files_of(tmp_path / "data/whole")


# ---- damaged files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["cut", "cut in the footer", "no parquet", "empty"])
def test_a_broken_parquet_is_named_the_others_are_prepared_and_once_repaired_it_is_added(run, inputs, tmp_path, harm):
    broken = inputs / "1.parquet"
    content = broken.read_bytes()
    kept = {"cut": len(content) // 2, "cut in the footer": len(content) - 100, "no parquet": 0, "empty": 0}[harm]
    broken.write_bytes(b"no parquet at all, but long enough" if harm == "no parquet" else content[:kept])
    code, said = run(inputs)
    assert code == 1 and f"left out: {broken.as_posix()}: cannot be read" in said
    assert read_manifest(tmp_path / "data/docs")["documents"] == 500
    broken.write_bytes(content)
    assert run(inputs)[0] == 0
    assert read_manifest(tmp_path / "data/docs")["documents"] == 750


def test_a_flipped_bit_in_a_page_fails_its_unit_alone(run, tmp_path):
    good = write_parquet(tmp_path / "good.parquet", some_texts(100, 1))
    path = write_parquet(tmp_path / "bad.parquet", some_texts(600, 2), write_page_checksum=True)
    group = pq.ParquetFile(path).metadata.row_group(6).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset + group.total_compressed_size // 2] ^= 16
    path.write_bytes(content)
    code, said = run(good, path)
    manifest = read_manifest(tmp_path / "data/docs")
    assert code == 1 and f"failed: {path.as_posix()}: cannot be read" in said
    assert 100 < manifest["documents"] < 700 and len(manifest["failed"]) == 1
    code, said = run(good, path)
    assert code == 1 and "failed" in said  # tried again, and said again
    content[group.data_page_offset + group.total_compressed_size // 2] ^= 16
    path.write_bytes(content)
    assert run(good, path)[0] == 0
    assert read_manifest(tmp_path / "data/docs")["documents"] == 700


def test_bytes_that_are_not_utf8_are_named_by_file_and_row(run, tmp_path):
    texts = [text.encode() for text in some_texts(120)]
    texts[77] = b"good \xff\xfe bad"
    binary = pa.array(texts, pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(texts), binary.buffers())
    path = write_parquet(tmp_path / "a.parquet", column)
    good = write_parquet(tmp_path / "b.parquet", some_texts(30))
    code, said = run(path, good)
    assert code == 1 and f"{path.as_posix()}: row 77 is not UTF-8" in said
    assert read_manifest(tmp_path / "data/docs")["documents"] >= 30


def test_surrogates_written_as_bytes_are_replaced_and_counted(run, tmp_path):
    binary = pa.array([b"a \xed\xa0\x80 b", b"\xed\xa0\xbd\xed\xb8\x80"], pa.binary())
    path = write_parquet(tmp_path / "a.parquet", pa.Array.from_buffers(pa.string(), 2, binary.buffers()))
    assert run(path)[0] == 0
    folder = tmp_path / "data/docs"
    assert read_manifest(folder)["replaced"] == 1
    assert load_tokenizer().decode(open_tokens(folder / "train_000000.bin")) == "<|endoftext|>a \ufffd b<|endoftext|>😀"


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"text": 5}', '"text"'])
def test_a_broken_line_is_named_by_file_and_byte(run, tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    good = write_parquet(tmp_path / "b.parquet", ["x"])
    code, said = run(tmp_path / "a.jsonl", good)
    assert code == 1 and "a.jsonl: " in said and "line at byte 17" in said


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_cut_short_is_named(run, tmp_path, suffix):
    path = tmp_path / f"a.txt.{suffix}"
    with pa.CompressedOutputStream(str(path), "gzip" if suffix == "gz" else "zstd") as file:
        file.write(np.random.default_rng(0).integers(32, 126, 100_000, dtype=np.uint8).tobytes())
    path.write_bytes(path.read_bytes()[:-1000])
    good = write_parquet(tmp_path / "b.parquet", ["x"])
    code, said = run(path, good)
    assert code == 1 and f"{path.as_posix()}: cannot be read" in said


# ---- damaged shards ----------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_shard_is_named_by_verify_and_only_its_unit_is_done_again(run, inputs, tmp_path):
    run(inputs)
    folder = tmp_path / "data/docs"
    before, path = files_of(folder), folder / "train_000004.bin"
    for place in (10, 2000, len(before[path.name]) - 1):
        content = bytearray(before[path.name])
        content[place] ^= 64
        path.write_bytes(content)
        code, said = run("--verify")
        assert code == 1 and f"{path}: " in said and said.count(".bin: ") == 1
    path.unlink()
    code, said = run(inputs)
    assert code == 0 and f"unit 4 is done again: {path}" in said and files_of(folder) == before
    assert run("--verify")[0] == 0


@pytest.mark.parametrize("harm", ["cut shard", "lost val", "broken record", "lost manifest", "broken manifest"])
def test_whatever_of_a_dataset_is_lost_or_cut_is_made_again(run, inputs, tmp_path, harm):
    run(inputs, "--val_fraction=0.2")
    folder = tmp_path / "data/docs"
    before = files_of(folder)
    shard, record = folder / "train_000002.bin", folder / ".prepare/unit_000002.json"
    if "shard" in harm:
        shard.write_bytes(before[shard.name][:-2])
    elif "record" in harm:
        record.write_text(record.read_text()[:50])
    elif harm == "broken manifest":
        (folder / "manifest.json").write_text("{")
        assert "manifest.json: is no manifest" in run(inputs, "--val_fraction=0.2")[1]
        (folder / "manifest.json").unlink()
    else:
        (folder / {"lost val": "val_000003.bin", "lost manifest": "manifest.json"}[harm]).unlink()
    assert run(inputs, "--val_fraction=0.2")[0] == 0
    assert files_of(folder) == before


# ---- hard documents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["tiktoken", "fastokens"])
def test_a_million_spaces_and_a_million_letters_and_separators_in_texts_go_through(run, tmp_path, encoder):
    if encoder == "fastokens":
        pytest.importorskip("fastokens")
    texts = [" " * 1_000_000 + "end", "a" * 1_000_000, "<|endoftext|>" * 1000, "\n" * 300_000 + "x" * 10, "plain"]
    code, said = run(write_parquet(tmp_path / "a.parquet", texts), f"--encoder={encoder}", "--val_fraction=0.0")
    assert code == 0, said
    found = []
    for path in sorted((tmp_path / "data/docs").glob("*.bin")):
        tokens = np.array(open_tokens(path))
        found += np.split(tokens, np.flatnonzero(tokens == 50256)[1:])
    decode = load_tokenizer().decode_bytes
    assert [decode(ids[1:]) for ids in found] == [text.encode() for text in texts]
    assert found[0][1:].tolist() == [220] * 999_999 + load_tokenizer().encode(" end").tolist()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory in /proc")
@pytest.mark.slow
def test_a_document_of_100_mb_and_ten_million_letters_in_bounded_memory(tmp_path):
    """Memory: a few copies of the text (page, column, bytes, str, pieces, ids), whatever else is in the file."""
    path = write_parquet(tmp_path / "a.parquet", ["word " * 20_000_000, "b" * 10_000_000, "small"], row_group_size=1)
    code = f"""if True:
        import pathlib, prepare, tokenizer
        folder = pathlib.Path({str(tmp_path / "docs")!r})
        (folder / ".prepare").mkdir(parents=True)
        config = prepare.PrepareConfig(inputs=({str(path)!r},), dataset="docs")
        plan = prepare.make_plan(prepare.examine_all(config)[0], config, folder)
        record = prepare.prepare_unit(prepare.make_job(plan, 0, 0, folder), tokenizer.load_tokenizer(), lambda *_: 0)
        status = pathlib.Path("/proc/self/status").read_text()  # (ru_maxrss would count what forked us)
        print(record["tokens"], int(status.split("VmHWM:")[1].split()[0]) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens, megabytes = map(int, done.stdout.split())
    letters = len(load_tokenizer().encode("b" * 10_000_000))
    assert tokens == 3 + 20_000_001 + letters + 1  # "word", then 19,999,999 of " word", then " "
    assert megabytes < 1200
