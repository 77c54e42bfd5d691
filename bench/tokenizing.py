"""How fast is prepare.py, and how much memory does a worker need? Compared with a pool of one document per task.

    python bench/tokenizing.py ../shared/corpus --rounds=5

Every way reads the same parquet files and writes the same tokens to disk. Each is a process of its own, timed from its
start to its end, imports included; the ways take turns and ratios are taken within a round. Printed are median
(smallest to largest) over the rounds. (A file called tokenize.py would hide the standard library's.)
"""

import argparse
import importlib.util
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import ROOT, header, interleaved, machine, ratios, row, run, spread

from onecard.shards import ShardWriter
from onecard.tokenizer import load_tokenizer


def start_worker():
    global tokenizer
    tokenizer = load_tokenizer()


def encode_document(text):
    return np.array([50256, *tokenizer.reference.encode_ordinary(text)], dtype=np.uint16)


def usual_way(out, workers, chunk, *files):
    """What most scripts do: the main process reads and writes, a pool gets `chunk` documents per task."""
    with multiprocessing.Pool(workers, start_worker) as pool, ShardWriter(out) as shard:
        for path in files:
            parquet = pq.ParquetFile(path)
            for group in range(parquet.num_row_groups):
                texts = parquet.read_row_group(group, columns=["text"]).column(0).to_pylist()
                for ids in pool.imap(encode_document, texts, chunksize=chunk):
                    shard.write(ids)


def finish(way, workers, files):
    """Runs a way, prepare.py's encoder or the documents per task of the usual way, into a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(way, int):
            arguments = json.dumps([f"{folder}/train.bin", workers, way, *map(str, files)])
            done = run([sys.executable, __file__, "--measure", arguments])
        else:
            options = [f"--data_dir={folder}", "--dataset=bench", f"--workers={workers}", f"--encoder={way}"]
            done = run([sys.executable, ROOT / "prepare.py", *files, *options])
    return done


def speeds(files, size, encoders, rounds):
    """MB/s of each way with 1 and 2 workers. With 2: ratios to the usual way, and the largest worker's peak memory."""
    usual = 1  # document per task
    ways = [(way, workers) for way in (usual, 16, *encoders) for workers in (1, 2)]
    results = interleaved(ways, rounds, lambda way: finish(*way, files))
    header("way", "MB/s, 1 worker", "MB/s, 2 workers", "ratio, 2 workers", "ratio per processor second", "worker, MB")
    for way in (usual, 16, *encoders):
        name = f"pool, documents per task: {way}" if isinstance(way, int) else f"prepare.py, {way}"
        cells = [spread([size / 1e6 / done.seconds for done in results[way, workers]], 1) for workers in (1, 2)]
        for measure in ("seconds", "cpu_seconds"):
            ours, theirs = ([getattr(done, measure) for done in results[each, 2]] for each in (way, usual))
            cells.append(spread(ratios(theirs, ours), 2))
        row(name, *cells, f"{max(done.child_peak_bytes for done in results[way, 2]) / 1e6:.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of parquet files with a text column")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return usual_way(*json.loads(options.measure))
    sources = sorted(options.folder.glob("*.parquet")) if options.folder else []
    if not sources:
        parser.error(f"no .parquet file in {options.folder}: give a folder of them")
    encoders = ["tiktoken", *(["fastokens"] if importlib.util.find_spec("fastokens") else [])]
    print(machine(*encoders, "pyarrow", "numpy"), flush=True)
    table = pa.concat_tables([pq.read_table(path, columns=["text"]) for path in sources])
    size = sum(len(text.as_buffer()) for text in table.column(0))
    print(f"{len(sources)} files, {size / 1e6:.0f} MB of text, {options.rounds} rounds", flush=True)
    speeds(sources, size, encoders, options.rounds)


if __name__ == "__main__":
    main()
