"""How fast and how lean prepare.py is, beside the usual way: a pool that is handed one document a task.

    python bench/tokenizing.py ../shared/corpus --rounds=5 (its tables go into bench/RESULTS.md)

Every way reads the same parquet files and writes the same tokens to disk; each is a process of its own, timed from
its start to its end, so imports and start-up count. Rounds are interleaved and ratios are taken within a round, so
that other work on the machine falls on all alike. (Not called tokenize.py: that would hide the standard library's.)
"""

import argparse
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from onecard.shards import ShardWriter, read_manifest  # noqa: E402
from onecard.tokenizer import load_tokenizer  # noqa: E402

# ---- the ways ----------------------------------------------------------------------------------------------


def start_worker():
    global tokenizer
    tokenizer = load_tokenizer()


def encode_document(text):
    ids = [50256]
    ids.extend(tokenizer.reference.encode_ordinary(text))
    return np.array(ids, dtype=np.uint16)


def usual_way(files, out, workers, chunk):
    """What most scripts do: the main process reads and writes, a pool gets one document a task (or a few)."""
    with multiprocessing.Pool(workers, start_worker) as pool, ShardWriter(out / "train.bin") as shard:
        for path in files:
            parquet = pq.ParquetFile(path)
            for group in range(parquet.num_row_groups):
                texts = parquet.read_row_group(group, columns=["text"]).column(0).to_pylist()
                for ids in pool.imap(encode_document, texts, chunksize=chunk):
                    shard.write(ids)


def only_read(files):
    """The limit: reading and decoding the text column, as prepare.py does it."""
    for path in files:
        parquet = pq.ParquetFile(path, buffer_size=1 << 20)
        for batch in parquet.iter_batches(1024, columns=["text"]):
            for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                value.decode()


def prepare_command(files, out, workers, encoder, *options):
    line = [sys.executable, str(ROOT / "prepare.py"), *map(str, files), f"--data_dir={out}", "--dataset=bench"]
    return [*line, f"--workers={workers}", f"--encoder={encoder}", *options]


def self_command(*arguments):
    return [sys.executable, str(Path(__file__)), *map(str, arguments)]


# ---- measuring ---------------------------------------------------------------------------------------------


def timed(command):
    """(wall seconds, processor seconds of it and all its children) of a command, from its start to its end."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime


def peak_of_workers(command):
    """Largest resident size in MB (VmHWM) that a child of prepare.py reached, looked at every 20 ms."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                status = Path(f"/proc/{child}/status").read_text()
                if "VmHWM:" in status:
                    peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) // 1024)
        except OSError:
            pass  # it has just ended
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


def shuffled_copies(sources, folder, copies, name):
    """Parquet files of FineWeb's row groups: the rows of the sources, in another order in each copy."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.concat_tables([pq.read_table(path, columns=["text"]) for path in sources])
    paths = []
    for copy in range(copies):
        order = np.random.default_rng(copy).permutation(len(table))
        paths.append(folder / f"{name}_{copy}.parquet")
        pq.write_table(table.take(order), paths[-1], row_group_size=1000)
    return paths, copies * sum(len(text.as_buffer()) for text in table.column(0))


def write_large(sources, path, size):
    """One uncompressed parquet file of about `size` bytes, rows of the sources in ever new orders."""
    table = pa.concat_tables([pq.read_table(source, columns=["text"]) for source in sources])
    draw, written = np.random.default_rng(0), 0
    with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        while written < size:
            writer.write_table(table.take(draw.permutation(len(table))), row_group_size=1000)
            written = path.stat().st_size
    return path


def speeds(files, size, folder, rounds):
    """{way: [(MB a second, MB a processor second) of each round]}; their order is drawn anew in each round."""
    encoders = ["tiktoken", "fastokens"] if installed("fastokens") else ["tiktoken"]
    ways = {("reading alone", 1): self_command("read", *files)}
    for workers in (1, 2):
        for chunk in (1, 16):
            name = f"usual way, {chunk} document{'s' * (chunk > 1)} a task"
            ways[name, workers] = self_command("usual", folder / "usual", workers, chunk, *files)
        for encoder in encoders:
            ways[f"prepare.py, {encoder}", workers] = prepare_command(files, folder / "ours", workers, encoder)
    results = {way: [] for way in ways}
    for round_ in range(rounds):
        for way in random.Random(round_).sample(list(ways), len(ways)):
            shutil.rmtree(folder / "ours", ignore_errors=True)
            shutil.rmtree(folder / "usual", ignore_errors=True)
            (folder / "usual").mkdir()
            results[way].append([size / seconds / 1e6 for seconds in timed(ways[way])])
            print(f"round {round_}: {way} {results[way][-1]}", file=sys.stderr)
    return results


def kills(files, folder, count):
    """How many of `count` runs, killed at a random moment and run again, ended with the bytes of a whole run."""
    options = ("--shard_tokens=1000000",)

    def hashes(name):
        return [shard["sha256"] for shard in read_manifest(folder / name / "bench")["shards"]]

    seconds, _ = timed(prepare_command(files, folder / "whole", 2, "auto", *options))
    equal, moments, draw = 0, [], random.Random(0)
    for number in range(count):
        command = prepare_command(files, folder / f"kill{number}", 2, "auto", *options)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.wait()
        moments.append(len(list((folder / f"kill{number}").glob("bench/.prepare/unit_*.json"))))
        subprocess.run(command, check=True, capture_output=True)
        equal += hashes(f"kill{number}") == hashes("whole")
        shutil.rmtree(folder / f"kill{number}")
    return equal, moments, len(hashes("whole"))


def installed(package):
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


# ---- the report --------------------------------------------------------------------------------------------


def report_speeds(results, files, size):
    rounds = len(next(iter(results.values())))
    print(f"\n{len(files)} files, {size / 1e6:.0f} MB of text, {rounds} rounds; median (smallest to largest).\n")
    print("| way | MB/s, 1 worker | MB/s, 2 workers | MB a processor second, 2 workers |\n|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in results):
        cells = [[rates[0] for rates in results.get((name, workers), [])] for workers in (1, 2)]
        cells.append([rates[1] for rates in results.get((name, 2), results.get((name, 1)))])
        print(f"| {name} | {' | '.join(map(spread, cells))} |")
    print("\n| ratio, within each round | of seconds | of processor seconds | wanted |\n|---|---|---|---|")
    usual, ours = "usual way, 1 document a task", "prepare.py, {}"
    for over, under, wanted in (
        ((ours.format("tiktoken"), 2), (usual, 2), "1.25"),
        ((ours.format("tiktoken"), 2), (ours.format("tiktoken"), 1), "1.5 of seconds"),
        ((ours.format("fastokens"), 2), (usual, 2), "3"),
        ((ours.format("fastokens"), 1), (usual, 1), "3"),
        ((ours.format("tiktoken"), 2), ("usual way, 16 documents a task", 2), ""),
        ((ours.format("fastokens"), 2), ("usual way, 16 documents a task", 2), ""),
    ):
        if over in results:
            pairs = list(zip(results[over], results[under], strict=True))
            cells = [spread([a[kind] / b[kind] for a, b in pairs], 2) for kind in (0, 1)]
            print(f"| {over[0]}, {over[1]} workers / {under[0]}, {under[1]} | {' | '.join(cells)} | {wanted} |")


def spread(rates, digits=1):
    if not rates:
        return ""
    return f"{statistics.median(rates):.{digits}f} ({min(rates):.{digits}f} to {max(rates):.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", help="a folder of parquet files with a text column")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=4, help="files to make of the rows, each in another order")
    parser.add_argument("--large", type=float, default=2.0, help="GB of the large parquet file")
    arguments = parser.parse_args()
    sources = [path for source in arguments.sources for path in sorted(Path(source).glob("*.parquet"))]
    commit = subprocess.run(["git", "-C", ROOT, "log", "-1", "--format=%h"], capture_output=True, text=True).stdout
    libraries = ", ".join(f"{name} {installed(name)}" for name in ("tiktoken", "fastokens", "pyarrow", "numpy"))
    print("## Tokenising (bench/tokenizing.py)\n")
    print(f"Commit {commit.strip()}; {os.cpu_count()} cores, {processor()}; Python {platform.python_version()},")
    print(f"{libraries}. Load by other work at the start: {os.getloadavg()[0]:.1f}.", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, size = shuffled_copies(sources, folder / "in", arguments.copies, "copy")
        report_speeds(speeds(files, size, folder, arguments.rounds), files, size)

        print("\n| peak memory of a worker, MB | the sources | one file of", f"{arguments.large:g} GB |\n|---|---|---|")
        large = write_large(sources, folder / "large.parquet", arguments.large * 1e9)
        for encoder in ("tiktoken", "fastokens"):
            if installed(encoder):
                peaks = []
                for inputs in (sources, [large]):
                    shutil.rmtree(folder / "ours", ignore_errors=True)
                    peaks.append(peak_of_workers(prepare_command(inputs, folder / "ours", 2, encoder)))
                print(f"| {encoder}, 2 workers | {peaks[0]} | {peaks[1]} ({peaks[1] / peaks[0]:.2f} times) |")
        equal, moments, shards = kills(sources, folder, 10)
        print(f"\nkill -9 at ten random moments, then run again: {equal} of 10 gave the bytes of a run never stopped")
        print(f"({shards} shards; finished units at the kill: {', '.join(map(str, moments))}).")


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


if __name__ == "__main__":
    if sys.argv[1:2] == ["usual"]:
        usual_way(sys.argv[5:], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["read"]:
        only_read(sys.argv[2:])
    else:
        main()
