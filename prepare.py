"""Text to tokens: parquet, .jsonl or .txt files in, shards and a manifest in data/<dataset> out. Never needs torch.

    python prepare.py                                        (data/quickstart, from text that Python carries)
    python prepare.py fineweb/*.parquet --dataset=fineweb    (python prepare.py --help lists every key)

The one thing to know: a unit is one contiguous range of rows of one file, planned from the file's footer alone. It
makes its own shards and, last, its record; so a run that was stopped goes on with the units that have no record,
and the bytes are the same with any number of workers. The manifest is written last and makes a dataset complete.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from configurator import describe, key, load_config, run_script
from shards import ShardError, ShardWriter, hash_file, layout, write_json, write_manifest
from tokenizer import TokenizerError, check_parity, load_tokenizer, mend, pieces

BYTES_PER_TOKEN = 4.67  # FineWeb's; turns shard_tokens into bytes of text, which is what a footer knows
BATCH_ROWS = 256
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
TXT_BYTES = 8192  # a document of a .txt file ends at the first blank line after so many bytes


class PrepareError(ValueError):
    """A user's mistake: which file or key, why, and what to do."""


class DamagedError(PrepareError):
    """A file that cannot be read: it is left out, and the others are prepared."""


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    inputs: tuple[str, ...] = key((), "files, folders, globs; none: the quickstart's text", inputs=True)
    dataset: str = key("", "name of the dataset: the folder data_dir/dataset")
    data_dir: str = key("data", "the folder of all datasets")
    text_column: str = key("text", "column of a parquet file, or key of a .jsonl line, with the text")
    val_fraction: float = key(0.005, "share of documents in val, by a hash of the text", low=0.0, high=0.5)
    shard_tokens: int = key(100_000_000, "tokens in a shard, about", low=1000, high=1_000_000_000)
    max_tokens: int = key(0, "stop with the row group that reaches so many; 0: take all", low=0)
    workers: int = key(0, "processes; 0: one a core", low=0)
    encoder: str = key("auto", "auto is fastokens if installed", choices=("auto", "tiktoken", "fastokens"))

    def problems(self):
        if self.inputs and not self.dataset:
            return ["dataset: the files need a name to be prepared under; write --dataset=fineweb, say"]
        return []


# ---- which files -------------------------------------------------------------------------------------------


def find_files(inputs):
    """The files that the inputs stand for, in order. Raises PrepareError with a line for each that is none."""
    files, problems = [], []
    for name in inputs:
        if Path(name).is_dir():
            below = sorted(p for p in Path(name).rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            found = [p for p in below if p.suffix == ".parquet"] or below
            why = f"no {', '.join(SUFFIXES[:2])} or .txt file below this folder"
        else:
            found = [Path(name)] if Path(name).is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
            why = "no such file; check the path, from this folder"
        files += found
        problems += [] if found else [f"{name}: {why}"]
        problems += [f"{p}: not one of {', '.join(SUFFIXES)}" for p in found if not p.name.endswith(SUFFIXES)]
    if problems:
        raise PrepareError("\n".join(problems))
    return [path.as_posix() for path in files]


def examine(path, config):
    """(source, its units) of one file: what identifies it, and its ranges of about shard_tokens each.

    A parquet file is known by its size and footer, a text file by its content: never by its name. Raises
    PrepareError if there is no text in it, DamagedError if it cannot be read.
    """
    size, shard_bytes = os.path.getsize(path), config.shard_tokens * BYTES_PER_TOKEN
    source = {"path": path, "bytes": size}
    if not path.endswith(".parquet"):
        with open(path, "rb") as file:
            source["id"] = hash_file(file)
        return source, cut_bytes(path, size, shard_bytes)
    try:
        with open(path, "rb") as file:
            file.seek(max(0, size - 8))
            footer_bytes = int.from_bytes(file.read(4), "little") + 8
            file.seek(max(0, size - footer_bytes))
            source["id"] = hashlib.sha256(size.to_bytes(8, "little") + file.read()).hexdigest()
            footer = pq.ParquetFile(file)
            schema, metadata = footer.schema_arrow, footer.metadata
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(f"{path}: cut short or no parquet file ({error}); copy it again") from error
    if config.text_column not in schema.names:
        raise PrepareError(
            f"{path}: no column {config.text_column!r}; it has {', '.join(schema.names)}: "
            "name the one with the text by --text_column="
        )
    kind = schema.field(config.text_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise PrepareError(f"{path}: column {config.text_column!r} is {kind}, not text; name another: --text_column=")
    source["rows"] = metadata.num_rows
    return source, cut_groups(text_sizes(metadata, config.text_column), shard_bytes)


def text_sizes(metadata, column):
    """[(rows, bytes of the text column before compression)] of a footer's row groups."""
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [(g.num_rows, g.column(names.index(column)).total_uncompressed_size) for g in groups]


def cut_groups(groups, shard_bytes):
    """Units of about equal size, none much above shard_bytes; a row group larger than that is cut by its rows."""
    total = sum(size for _, size in groups)
    target = total / max(1, round(total / shard_bytes))
    units, row = [], 0
    for number, (rows, size) in enumerate(groups):
        parts = min(max(1, round(size / shard_bytes)), max(1, rows))
        last = units[-1] if units else None
        if parts == 1 and last and not last["part"] and last["bytes"] + size / 2 <= target:
            last["row_groups"][1], last["rows"][1] = number + 1, row + rows
            last["bytes"] += size
        else:
            for part in range(parts):
                span = [row + rows * part // parts, row + rows * (part + 1) // parts]
                unit = {"row_groups": [number, number + 1], "rows": span, "bytes": size // parts}
                units.append(unit | {"part": parts > 1})
        row += rows
    return [{name: unit[name] for name in unit if name != "part"} for unit in units]


def cut_bytes(path, size, shard_bytes):
    """Units of a text file: the lines or documents that begin in a range of bytes; a compressed file is one unit."""
    if path.endswith((".gz", ".zst")):
        return [{"range": [0, None], "bytes": 3 * size}]  # 3: a usual ratio; only the bar and the estimate use it
    parts = max(1, round(size / shard_bytes))
    return [
        {"range": [size * part // parts, size * (part + 1) // parts], "bytes": size // parts} for part in range(parts)
    ]


# ---- what is in a file -------------------------------------------------------------------------------------


def read_texts(path, unit, column):
    """The rows of a unit, in batches: (positions, values, end of a row group).

    A value is bytes, str or None; its position is its row in a parquet file, its byte in a text file.
    """
    if "row_groups" in unit:
        yield from read_parquet(path, unit, column)
        return
    read = read_jsonl if ".jsonl" in path else read_txt
    positions, values = [], []
    for position, value in read(path, *unit["range"], column):
        positions.append(position)
        values.append(value)
        if len(values) == BATCH_ROWS or len(value or "") > 1 << 20:
            yield positions, values, True
            positions, values = [], []
    yield positions, values, True


def read_parquet(path, unit, column):
    (first_group, last_group), (start, stop) = unit["row_groups"], unit["rows"]
    parquet = pq.ParquetFile(path, buffer_size=1 << 20)  # pages, not whole column chunks, are held
    row = sum(parquet.metadata.row_group(i).num_rows for i in range(first_group))
    for group in range(first_group, last_group):
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
            skip, take = max(0, start - row), max(0, min(len(batch), stop - row))
            texts = batch.column(0)[skip:take]
            if isinstance(texts, pa.DictionaryArray):
                texts = texts.dictionary_decode()
            yield range(row + skip, row + take), texts.cast(pa.large_binary()).to_pylist(), False
            row += len(batch)
        yield range(0), [], True


def read_lines(path, start, stop):
    """(position, line) of the lines that begin in these bytes."""
    compression = {"gz": "gzip", "st": "zstd"}.get(path[-2:])
    with open(path, "rb") as plain:
        file = io.BufferedReader(pa.input_stream(plain, compression=compression)) if compression else plain
        if start:
            file.seek(start - 1)
            start += len(file.readline()) - 1
        while (stop is None or start < stop) and (line := file.readline()):
            yield start, line if start else line.removeprefix(b"\xef\xbb\xbf")
            start += len(line)


def read_jsonl(path, start, stop, column):
    for position, line in read_lines(path, start, stop):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            value = row.get(column)
        except (ValueError, AttributeError) as error:
            raise DamagedError(f"{path}: the line at byte {position:,} is no JSON object ({error})") from error
        if not isinstance(value, str | None):
            raise DamagedError(f"{path}: {column!r} in the line at byte {position:,} is no text")
        yield position, value


def read_txt(path, start, stop, _):
    position, lines, size = start, [], 0
    for begin, line in read_lines(path, start, stop):
        position = position if lines else begin
        lines.append(line)
        size += len(line)
        if size >= TXT_BYTES * (1 if not line.strip() else 8):
            yield position, b"".join(lines)
            lines, size = [], 0
    if lines:
        yield position, b"".join(lines)


# ---- one unit ----------------------------------------------------------------------------------------------


def as_text(value):
    """bytes or str -> (str that UTF-8 can hold, lone surrogates replaced). Raises UnicodeDecodeError."""
    if isinstance(value, str):
        return mend(value)
    try:
        return value.decode(), 0
    except UnicodeDecodeError:
        return mend(value.decode("utf-8", "surrogatepass"))


def in_val(text, val_fraction):
    """Whether a document is in val: by a hash of its text, so duplicates stay together and nothing ever moves."""
    drawn = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return drawn < val_fraction * 2**64


def encode_texts(tokenizer, texts):
    """[str] -> [uint16 (n,)]: `<|endoftext|>` first, then the ordinary ids of the text."""
    parts = [pieces(text) for text in texts]
    encoded = iter(tokenizer.encode_pieces([piece for part in parts for piece in part]))
    separator = np.array([tokenizer.eot], dtype=np.uint16)
    return [np.concatenate([separator, *(next(encoded) for _ in part)]) for part in parts]


def prepare_unit(job, tokenizer, report):
    """Reads, encodes and writes one unit; returns its record, which stands on disk when this returns.

    job: number, path, unit, folder, column, val_fraction, limit (stop at the row group that reaches so many tokens;
    0: none). Raises DamagedError or an error of the system or of pyarrow for the source, ShardError for the output.
    """
    record_path = unit_record(job["folder"], job["number"])
    record_path.unlink(missing_ok=True)
    record = {"unit": job["number"], **job["unit"], "limit": job["limit"], "complete": True}
    record |= {"documents": 0, "tokens": 0, "replaced": 0, "skipped": {"null": 0, "empty": 0}}
    record |= {"encoder": tokenizer.encoder, "shards": []}
    with contextlib.ExitStack() as stack:
        shards = {}
        for positions, values, group_ends in read_texts(job["path"], job["unit"], job["column"]):
            texts = clean(positions, values, job["path"], record)
            size = tokens = 0
            for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
                split = "val" if in_val(text, job["val_fraction"]) else "train"
                if split not in shards:
                    path = Path(job["folder"]) / shard_name(split, job["number"])
                    entry = {"name": path.name, "split": split, "documents": 0, "text_bytes": 0}
                    shards[split] = stack.enter_context(ShardWriter(path)), entry
                shard, entry = shards[split]
                shard.write(ids)
                entry["documents"] += 1
                entry["text_bytes"] += len(text.encode())
                size += len(text.encode())
                tokens += len(ids)
            record["tokens"] += tokens
            record["documents"] += len(texts)
            report(size, tokens)
            if group_ends and 0 < job["limit"] <= record["tokens"]:
                record["complete"] = False
                break
    for split in sorted(shards):
        shard, entry = shards[split]
        record["shards"].append(entry | {"tokens": shard.tokens, "sha256": shard.sha256})
    write_json(record_path, record)
    return record


def clean(positions, values, path, record):
    """The texts among these values; what is skipped or mended is counted in the record."""
    texts = []
    for position, value in zip(positions, values, strict=True):
        if not value:
            record["skipped"]["null" if value is None else "empty"] += 1
            continue
        try:
            text, replaced = as_text(value)
        except UnicodeDecodeError as error:
            where = "row" if "rows" in record else "byte"
            raise DamagedError(f"{path}: {where} {position:,} is not UTF-8 ({error.reason})") from error
        texts.append(text)
        record["replaced"] += replaced
    return texts


def shard_name(split, number):
    return f"{split}_{number:06d}.bin"


def unit_record(folder, number):
    return Path(folder) / ".prepare" / f"unit_{number:06d}.json"


# ---- the plan ----------------------------------------------------------------------------------------------


def make_plan(config, folder):
    """The dataset's plan (settings, sources, units), extended by what is new in the inputs, and files left out.

    A plan only ever grows at its end: numbers that were given stay. Raises PrepareError.
    """
    path = folder / ".prepare" / "plan.json"
    settings = {name: getattr(config, name) for name in ("text_column", "val_fraction", "shard_tokens")}
    plan = {"settings": settings, "sources": [], "units": []}
    if path.exists():
        plan = json.loads(path.read_text(encoding="utf-8"))
    elif not config.inputs:
        raise PrepareError(f"{folder}: nothing is prepared here yet; name the files to take")
    problems = [
        f"{name}: {config.dataset} was begun with {plan['settings'][name]!r}, not {value!r}; "
        f"leave it so, or take another name for the dataset"
        for name, value in settings.items()
        if plan["settings"][name] != value
    ]
    damaged = []
    for file in find_files(config.inputs):
        try:
            source, units = examine(file, config)
            problems += add_source(plan, source, units)
        except DamagedError as error:
            damaged.append(str(error))
        except PrepareError as error:
            problems.append(str(error))
    if problems or (damaged and not plan["sources"]):
        raise PrepareError("\n".join(problems + damaged))
    return plan, damaged


def add_source(plan, source, units):
    """Appends a source to the plan, if it is new there; returns the problems that it makes."""
    for known in plan["sources"]:
        if known["id"] == source["id"]:
            if os.path.exists(known["path"]) and not os.path.samefile(known["path"], source["path"]):
                print(f"  {source['path']}: the same file as {known['path']}, taken once")
            else:
                known["path"] = source["path"]  # it was moved
            return []
        if known["path"] == source["path"]:
            remedy = "give the new file another name, or the dataset"
            return [f"{source['path']}: not what it was when this dataset was begun; {remedy}"]
    number = len(plan["sources"])
    plan["sources"].append(source)
    plan["units"] += [{"source": number, **unit} for unit in units]
    return []


def read_records(plan, folder):
    """{unit number: record} of the finished units whose shards are there in their full size."""
    records = {}
    for number in range(len(plan["units"])):
        try:
            record = json.loads(unit_record(folder, number).read_text(encoding="utf-8"))
            for shard in record["shards"]:
                if layout(folder / shard["name"])[1] != shard["tokens"]:
                    raise ShardError(f"{folder / shard['name']}: not the size that was written")
            records[number] = record
        except FileNotFoundError:
            continue
        except (ShardError, ValueError, KeyError) as error:
            print(f"  unit {number} is done again: {error}")
    return records


def next_units(plan, records, owned, running, failed, max_tokens):
    """[(number, limit)] of the owned units that can start now, in order; limit 0 is no limit.

    With max_tokens, a unit starts when all before it are done, so that its limit is exact, or without a limit when
    it is surely needed whole (even if half as many tokens again came out as are expected). A record that was made
    by another limit than turns out right is not taken, so the result is the same with any number of workers.
    """
    ready, before, exact = [], 0, True
    for number in owned:
        limit = (max_tokens or math.inf) - before
        record, most = records.get(number), 1.5 * plan["units"][number]["bytes"] / BYTES_PER_TOKEN
        if limit <= 0:
            break
        if number in failed:
            continue
        if record and (not exact or fits(record, limit)):
            before += record["tokens"]
            continue
        if number not in running and (exact or most < limit):
            ready.append((number, int(limit) if exact and max_tokens else 0))
        exact, before = False, before + most
    return ready


def fits(record, limit):
    """Whether a unit's record is what a run with this limit would make."""
    return record["limit"] == limit or (record["complete"] and record["tokens"] < limit)


# ---- the work ----------------------------------------------------------------------------------------------


def work(connection, encoder, threads):
    """A worker process: takes jobs from the connection, sends ("progress" | "done" | "failed" | "full", ...)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends us
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # fastokens' own

    def send(*message):
        try:
            connection.send(message)
        except OSError:
            raise SystemExit(1) from None  # the main process is gone; the temporary files go on our way out

    tokenizer = load_tokenizer(encoder)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            send("done", prepare_unit(job, tokenizer, lambda *counts: send("progress", counts)))
        except ShardError as error:
            send("full", str(error))
        except PrepareError as error:
            send("failed", str(error))
        except (OSError, pa.ArrowException) as error:
            send("failed", f"{job['path']}: cannot be read ({error}); copy it again")


def run_units(plan, records, owned, config, folder, encoder):
    """Prepares the owned units that have no record, and puts theirs into `records`; returns {unit: why it failed}.

    Raises ShardError if the output cannot be written, PrepareError if a worker process dies; either way, and on
    Ctrl-C, no worker and no temporary file is left.
    """
    failed, jobs, tokens, started = {}, {}, 0, time.monotonic()  # jobs: {connection: job}
    todo = next_units(plan, records, owned, jobs, failed, config.max_tokens)
    pool = start_workers(min(config.workers or cores(), max(1, len(todo))), encoder)  # {connection: process}
    bar = tqdm(total=expected_bytes(plan, records, owned, config), unit="B", unit_scale=True, disable=None)
    try:
        while todo or jobs:
            for connection, (number, limit) in zip([c for c in pool if c not in jobs], todo, strict=False):
                jobs[connection] = make_job(plan, number, limit, folder)
                connection.send(jobs[connection])
            for connection in multiprocessing.connection.wait(list(jobs)):
                kind, content = receive(connection, pool[connection], jobs[connection])
                if kind == "progress":
                    size, more = content
                    tokens += more
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - started) / 1e6:.2f}M tokens/s", False)
                    bar.update(size)
                    continue
                number = jobs.pop(connection)["number"]
                if kind == "full":
                    raise ShardError(content)
                if kind == "failed":
                    failed[number] = content
                    tqdm.write(f"  unit {number} failed: {content}", file=sys.stderr)
                else:
                    records[number] = content
            running = [job["number"] for job in jobs.values()]
            todo = next_units(plan, records, owned, running, failed, config.max_tokens)
    finally:
        bar.close()
        for process in pool.values():
            process.terminate()
            process.join()
        remove_leftovers(folder, owned)
    return failed


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_workers(count, encoder):
    """{connection: process}, spawned: a process that has used fastokens must not be forked."""
    context, pool = multiprocessing.get_context("spawn"), {}
    for _ in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, encoder, max(1, cores() // count)), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death closes the connection
        pool[ours] = process
    return pool


def receive(connection, process, job):
    try:
        return connection.recv()
    except (EOFError, OSError):
        process.join()
        raise PrepareError(
            f"unit {job['number']} of {job['path']}: its process died (exit code {process.exitcode}; -9 is often the "
            "system, for want of memory); what is finished is kept: run it again, with fewer --workers"
        ) from None


def make_job(plan, number, limit, folder):
    unit = plan["units"][number]
    for split in ("train", "val"):
        if (folder / shard_name(split, number)).exists():  # a unit that is done again: the dataset is not complete
            (folder / "manifest.json").unlink(missing_ok=True)
    names = ("row_groups", "rows", "range")
    return {
        "number": number,
        "limit": limit,
        "folder": str(folder),
        "path": plan["sources"][unit["source"]]["path"],
        "unit": {name: unit[name] for name in ("source", *names) if name in unit},
        "column": plan["settings"]["text_column"],
        "val_fraction": plan["settings"]["val_fraction"],
    }


def expected_bytes(plan, records, owned, config):
    """Bytes of text that are still to be read."""
    missing = sum(plan["units"][number]["bytes"] for number in owned if number not in records)
    if not config.max_tokens:
        return missing
    done = sum(record["tokens"] for record in records.values())
    return min(missing, int(max(0, config.max_tokens - done) * BYTES_PER_TOKEN))


def remove_leftovers(folder, owned):
    """Removes temporary files of the owned units, and of the dataset if all units are."""
    for path in [*folder.glob("*.tmp"), *folder.glob(".prepare/*.tmp")]:
        digits = path.name.partition("_")[2][:6]
        if int(digits) in owned if digits.isdecimal() else len(owned) == owned.stop:
            path.unlink(missing_ok=True)


# ---- the dataset -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path, what):
    """Holds a lock that dies with this process. Raises PrepareError that names the process that has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(1 << 20)  # beyond the text, which others must be able to read
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise PrepareError(f"{what}: {file.read() or 'another process'} is at it; wait, or stop it") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def prepare(config, folder):
    """Plans, does what is missing, and completes the dataset. Returns the exit code."""
    started = time.monotonic()
    plan, damaged = make_plan(config, folder)
    owned = range(len(plan["units"]))
    remove_leftovers(folder, owned)
    records = read_records(plan, folder)
    write_json(folder / ".prepare" / "plan.json", plan)
    for problem in damaged:
        print(f"  left out: {problem}", file=sys.stderr)
    failed = {}
    todo = next_units(plan, records, owned, (), failed, config.max_tokens)
    if not todo and (folder / "manifest.json").exists() and not damaged:
        print(f"{folder} is finished: nothing to do")
        return 0
    encoder = choose_encoder(config, plan)
    announce(plan, records, owned, config, folder, encoder)
    if todo:
        failed = run_units(plan, records, owned, config, folder, encoder)
    manifest = finish(plan, records, config, folder, failed)
    summarize(manifest, config, folder, time.monotonic() - started)
    return 1 if failed or damaged else 0


def choose_encoder(config, plan):
    """fastokens if it is installed and gives tiktoken's ids for hard strings and the first documents."""
    if config.encoder == "tiktoken":
        return "tiktoken"
    try:
        check_parity(load_tokenizer("fastokens"), first_texts(plan))
        return "fastokens"
    except TokenizerError as error:
        if config.encoder == "fastokens":
            raise
        print(f"  encoder: tiktoken, for {error}")
        return "tiktoken"


def first_texts(plan):
    """The first documents of the first source; none if they cannot be read (the unit's own run will say so)."""
    unit = plan["units"][0]
    path, column = plan["sources"][unit["source"]]["path"], plan["settings"]["text_column"]
    try:
        _, values, _ = next(read_texts(path, unit, column))
        return [as_text(value)[0] for value in values if value]
    except (PrepareError, UnicodeDecodeError, OSError, pa.ArrowException):
        return []


def announce(plan, records, owned, config, folder, encoder):
    """Says what is to come. Raises PrepareError if the disk cannot hold it."""
    size, free = expected_bytes(plan, records, owned, config), shutil.disk_usage(folder).free
    tokens = size / BYTES_PER_TOKEN
    print(f"{folder}: {len(plan['sources'])} files, {len(plan['units'])} units, {len(records)} of them done")
    print(f"  to do: {size / 1e6:,.1f} MB of text, about {tokens / 1e6:,.1f}M tokens by {encoder}")
    print(f"  disk: about {2 * tokens / 1e6:,.1f} MB needed, {free / 1e6:,.0f} MB free")
    if 2 * tokens > free:
        raise PrepareError(
            f"{folder}: about {2 * tokens / 1e9:,.2f} GB are needed and {free / 1e9:,.2f} GB are free; "
            "free some, take another --data_dir, or fewer tokens by --max_tokens"
        )


def finish(plan, records, config, folder, failed):
    """Writes the manifest from the records, and returns it; files of units beyond max_tokens are removed."""
    shards, counts = [], {"documents": 0, "tokens": 0, "replaced": 0}
    skipped, encoders = {"null": 0, "empty": 0}, set()
    for number, record in sorted(records.items()):
        if config.max_tokens and counts["tokens"] >= config.max_tokens:
            unit_record(folder, number).unlink(missing_ok=True)
            for shard in record["shards"]:
                (folder / shard["name"]).unlink(missing_ok=True)
            continue
        place = {name: record[name] for name in ("row_groups", "rows", "range") if name in record}
        path = plan["sources"][record["source"]]["path"]
        shards += [shard | {"source": path, **place} for shard in record["shards"]]
        counts = {name: count + record[name] for name, count in counts.items()}
        skipped = {reason: count + record["skipped"][reason] for reason, count in skipped.items()}
        encoders.add(record["encoder"])
    if not shards:
        raise PrepareError(f"{folder}: no document came out of {len(records)} units; nothing to train on")
    tokenizer = load_tokenizer()
    names = ("name", "sha256", "n_vocab", "eot")
    manifest = {
        "version": 1,
        "tokenizer": {name: getattr(tokenizer, name) for name in names},
        "encoder": ", ".join(sorted(encoders)),
        "libraries": {"python": sys.version.split()[0]}
        | dict(map(installed, ("numpy", "pyarrow", "tiktoken", "fastokens"))),
        "settings": plan["settings"],
        **counts,
        "skipped": skipped,
        "failed": [failed[number] for number in sorted(failed)],
        "sources": plan["sources"],
        "shards": shards,
    }
    write_manifest(folder, manifest)
    return manifest


def installed(package):
    try:
        return package, version(package)
    except PackageNotFoundError:
        return package, None


def summarize(manifest, config, folder, seconds):
    """Prints what was made, and the next command."""
    text_bytes = sum(shard["text_bytes"] for shard in manifest["shards"])
    print(f"{folder} is ready: {manifest['documents']:,} documents")
    for split in ("train", "val"):
        chosen = [shard for shard in manifest["shards"] if shard["split"] == split]
        tokens, documents = (sum(shard[name] for shard in chosen) for name in ("tokens", "documents"))
        print(f"  {split:7} {tokens:>15,} tokens, {documents:,} documents, {len(chosen)} shards")
    if not chosen:
        print("          no document fell into val: train.py needs some; a new dataset with a larger --val_fraction")
    print(f"  text    {text_bytes:>15,} bytes, {text_bytes / (manifest['tokens'] - manifest['documents']):.2f} a token")
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["skipped"].items())
    print(f"  skipped {skipped}; {manifest['replaced']:,} lone surrogates replaced")
    print(f"  encoder {manifest['encoder']}; {seconds:.1f} s")
    if config.dataset == "quickstart":
        print("next: python train.py config/quickstart.py")
    else:
        print(f"next: python train.py config/fineweb_4070.py --dataset={config.dataset}")


# ---- the quickstart's text ---------------------------------------------------------------------------------


def quickstart(config):
    """The config of a run without inputs: English that every Python carries, as a parquet file like FineWeb's."""
    path = Path(config.data_dir) / "quickstart" / "quickstart.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [*manual_texts(), *docstrings(Path(sysconfig.get_paths()["stdlib"]))]
        write_fineweb(path, texts)
    fraction = 0.05 if config.val_fraction == PrepareConfig.val_fraction else config.val_fraction
    return dataclasses.replace(config, inputs=(str(path),), dataset="quickstart", val_fraction=fraction)


def manual_texts():
    """[(name, text)] of the pages of Python's language manual that help() shows."""
    from pydoc_data.topics import topics

    return [(f"pydoc:{name}", topics[name]) for name in sorted(topics)]


def docstrings(library):
    """[(name, text)]: the docstrings of each class, and of the rest of each file, of the standard library.

    The files are parsed, never imported; those that are no Python (templates, samples) are passed over.
    """
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = []
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if left_out & set(place.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        tree.body = [node for node in tree.body if node not in classes]
        for part in (tree, *classes):
            texts = [ast.get_docstring(node) for node in ast.walk(part) if isinstance(node, documented)]
            if text := "\n\n".join(filter(None, texts)):
                found.append((f"{place.as_posix()}:{getattr(part, 'name', '')}", text))
    return found


def write_fineweb(path, texts):
    """Writes [(name, text)] as a parquet file with FineWeb's columns and row groups; token_count is right."""
    tokenizer = load_tokenizer()
    names, texts = zip(*texts, strict=True)
    same = {"dump": "python", "date": "", "file_path": "", "language": "en", "language_score": 1.0}
    table = {"text": texts, "id": [hashlib.sha256(t.encode()).hexdigest() for t in texts]}
    table |= {"url": names} | {name: [value] * len(texts) for name, value in same.items()}
    table["token_count"] = [len(tokenizer.encode(text)) for text in texts]
    order = ("text", "id", "dump", "url", "date", "file_path", "language", "language_score", "token_count")
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table({name: table[name] for name in order}), temporary, row_group_size=1000)
    os.replace(temporary, path)


def main(argv=None):
    config = load_config(PrepareConfig, argv)
    print(describe(config))
    if not config.inputs and config.dataset in ("", "quickstart"):
        config = quickstart(config)
    folder = Path(config.data_dir) / config.dataset
    with lock(folder / ".prepare" / "lock", str(folder)):
        code = prepare(config, folder)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    run_script(main, PrepareError, ShardError, TokenizerError)
