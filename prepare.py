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
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import sysconfig
import textwrap
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from configurator import describe, key, load_config, run_script
from onecard.durable import OwnedError, owned, replacing
from onecard.shards import (
    MANIFEST,
    ShardError,
    ShardWriter,
    check_shard,
    layout,
    open_tokens,
    read_manifest,
    write_json,
    write_manifest,
)
from onecard.sources import DamagedError, SourceError, examine, find_files, read_texts, token_count
from onecard.tokenizer import TokenizerError, check_parity, load_tokenizer, mend, pieces

BYTES_PER_TOKEN = 4.67  # FineWeb's; turns shard_tokens into bytes of text, which is what a footer knows
LOOK_TOKENS = 50_000_000  # that --inspect reads


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    inputs: tuple[str, ...] = key((), "files, folders, globs, hf:// paths; none: the quickstart", inputs=True)
    dataset: str = key("", "name of the dataset: the folder data_dir/dataset")
    data_dir: str = key("data", "the folder of all datasets")
    text_column: str = key("text", "column of a parquet file, or key of a .jsonl line, with the text")
    val_fraction: float = key(0.005, "share of documents in val, by a hash of the text", low=0.0, high=0.5)
    shard_tokens: int = key(100_000_000, "tokens in a shard, about", low=1000, high=1_000_000_000)
    max_tokens: int = key(0, "stop with the row group that reaches so many; 0: take all", low=0)
    workers: int = key(0, "processes; 0: one a core", low=0)
    encoder: str = key("auto", "auto is fastokens if installed", choices=("auto", "tiktoken", "fastokens"))
    task: str = key("", "3/16: only the third sixteenth of the units; then --merge, when all are done")
    merge: bool = key(False, "complete a dataset whose tasks are done")
    verify: bool = key(False, "check every byte of a finished dataset")
    inspect: bool = key(False, "show what is in a finished dataset")

    def problems(self):
        found = []
        if self.inputs and not self.dataset:
            found.append(f"dataset: no name under which to prepare {self.inputs[0]}; write --dataset=fineweb, say")
        task = re.fullmatch(r"(\d+)/(\d+)", self.task)
        if self.task and not (task and 1 <= int(task[1]) <= int(task[2])):
            found.append(f"task: {self.task!r} is none; the tasks of sixteen are 1/16 to 16/16")
        if self.task and (self.max_tokens or self.merge):
            found.append("task: max_tokens and merge need all units; leave out --task")
        return found


class PrepareError(ValueError):
    """A user's mistake: which file or key, why, and what to do."""


# ---- one unit ----------------------------------------------------------------------------------------------


def prepare_unit(job, tokenizer, report):
    """Reads, encodes and writes one unit; returns its record, which is then on disk too.

    job: number, folder, path, unit, text_column, val_fraction, limit (stop with the row group that reaches so many
    tokens; 0: none). report(bytes of text, tokens) is called now and then. Raises DamagedError for the source,
    ShardError for the output.
    """
    folder, number, limit = Path(job["folder"]), job["number"], job["limit"]
    if unit_record(folder, number).exists():  # done again: the dataset is not complete until it is
        (folder / MANIFEST).unlink(missing_ok=True)
        unit_record(folder, number).unlink()
    record = {"unit": number, **job["unit"], "limit": limit, "complete": True, "encoder": tokenizer.encoder}
    record |= {"documents": 0, "tokens": 0, "replaced": 0, "skipped": {"null": 0, "empty": 0}, "shards": []}
    with contextlib.ExitStack() as stack:
        shards = {}  # {split: (its writer, its entry in the record)}; a split without documents has none
        for positions, values, group_end in read_texts(job["path"], job["unit"], job["text_column"]):
            texts, contents = as_texts(positions, values, job["path"], record)
            tokens = 0
            for content, ids in zip(contents, encode_texts(tokenizer, texts), strict=True):
                split = "val" if in_val(content, job["val_fraction"]) else "train"
                if split not in shards:
                    path = folder / shard_name(split, number)
                    entry = {"name": path.name, "split": split, "documents": 0, "text_bytes": 0}
                    shards[split] = stack.enter_context(ShardWriter(path)), entry
                shard, entry = shards[split]
                shard.write(ids)
                entry["documents"] += 1
                entry["text_bytes"] += len(content)
                tokens += len(ids)
            record["documents"] += len(texts)
            record["tokens"] += tokens
            report(sum(map(len, contents)), tokens)
            if limit and group_end and record["tokens"] >= limit:
                record["complete"], stop = False, positions[-1] + 1
                ends = {"row_groups": group_end, "rows": stop, "range": stop}
                record |= {name: [record[name][0], end] for name, end in ends.items() if name in record}
                break
    for shard, entry in sorted(shards.values(), key=lambda pair: pair[1]["split"]):
        record["shards"].append(entry | {"tokens": shard.tokens, "sha256": shard.sha256})
    write_json(unit_record(folder, number), record)
    return record


def as_texts(positions, values, path, record):
    """([str], [their UTF-8 bytes]) of bytes, str and None; what is skipped or mended is counted in the record."""
    texts, contents = [], []
    for position, value in zip(positions, values, strict=True):
        if not value:
            record["skipped"]["null" if value is None else "empty"] += 1
            continue
        try:
            text, content = (value, value.encode()) if isinstance(value, str) else (value.decode(), value)
        except UnicodeError:
            try:
                text = value if isinstance(value, str) else value.decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                place = f"row {position:,}" if "rows" in record else f"the text at byte {position:,}"
                raise DamagedError(f"{path}: {place} is not UTF-8 ({error.reason}); leave it out") from error
            text, replaced = mend(text)
            content = text.encode()
            record["replaced"] += replaced
        texts.append(text)
        contents.append(content)
    return texts, contents


def encode_texts(tokenizer, texts):
    """[str] -> [uint16 (n,)]: `<|endoftext|>` first, then the ordinary ids of the text."""
    parts = [pieces(text) for text in texts]
    encoded = iter(tokenizer.encode_pieces([piece for part in parts for piece in part]))
    separator = np.array([tokenizer.eot], dtype=np.uint16)
    return [np.concatenate([separator, *(next(encoded) for _ in part)]) for part in parts]


def in_val(content, val_fraction):
    """Whether a document is in val: by a hash of its text, so duplicates stay together and nothing ever moves."""
    drawn = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return drawn < val_fraction * 2**64


def shard_name(split, number):
    return f"{split}_{number:06d}.bin"


def unit_record(folder, number):
    return folder / ".prepare" / f"unit_{number:06d}.json"


# ---- the plan ----------------------------------------------------------------------------------------------


def examine_all(config):
    """([(source, units)] of the inputs, problems of files that are left out). Raises PrepareError for all others."""
    found, damaged, problems = {}, [], []
    for path in find_files(config.inputs):
        try:
            source, units = examine(path, config.text_column, config.shard_tokens * BYTES_PER_TOKEN)
            if source["id"] in found:
                print(f"  {path}: the same as {found[source['id']][0]['path']}; taken once")
            found.setdefault(source["id"], (source, units))
        except DamagedError as error:
            damaged.append(str(error))
        except SourceError as error:
            problems.append(str(error))
    if problems or (damaged and not found):
        raise PrepareError("\n".join(problems + damaged))
    return list(found.values()), damaged


def make_plan(found, config, folder):
    """The plan: settings, sources, units. It only grows, at its end: numbers once given stay. Raises PrepareError."""
    path = folder / ".prepare" / "plan.json"
    settings = {name: getattr(config, name) for name in ("text_column", "val_fraction", "shard_tokens")}
    plan = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sources": [], "units": []}
    before, problems = json.dumps(plan), []
    for name, value in settings.items():
        known = plan.setdefault("settings", settings)[name]
        if value != known and (config.inputs or value != getattr(PrepareConfig, name)):
            remedy = "keep it, or name a new dataset"
            problems.append(f"{name}: {folder} was begun with {known!r}, not {value!r}; {remedy}")
    ids, paths = {known["id"]: known for known in plan["sources"]}, {known["path"] for known in plan["sources"]}
    for source, units in found:
        if source["id"] in ids:
            ids[source["id"]]["path"] = source["path"]  # it may have been moved
        elif source["path"] in paths:
            problems.append(f"{source['path']}: has changed since this dataset was begun; name a new dataset")
        else:
            plan["units"] += [{"source": len(plan["sources"]), **unit} for unit in units]
            plan["sources"].append(source)
    if not plan["units"]:
        problems.append(f"{folder}: nothing to prepare; name files with rows in them")
    if problems:
        raise PrepareError("\n".join(problems))
    if json.dumps(plan) != before:
        write_json(path, plan)
    return plan


def read_records(plan, mine, folder):
    """{unit: record} of the finished units whose shards are there in their full size."""
    records = {}
    for number in mine:
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


def next_units(plan, records, mine, running, failed, max_tokens):
    """[(unit, limit)] of our units that can start now, in order; limit 0 is no limit.

    With max_tokens, a unit starts when all before it are done, so that its limit is exact, or without a limit
    when it is surely needed whole (even if half as many tokens again came out as are expected). A record that was
    made by another limit than turns out right is not taken: the result is the same with any number of workers.
    """
    ready, before, exact = [], 0, True
    for number in mine:
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
            ready.append((number, limit if exact and max_tokens else 0))
        exact, before = False, before + most
    return ready


def fits(record, limit):
    """Whether a unit's record is what a run with this limit makes."""
    return record["limit"] == limit or (record["complete"] and record["tokens"] < limit)


# ---- the work ----------------------------------------------------------------------------------------------


def work(connection, encoder, threads):
    """A worker process: takes jobs from the connection, sends (progress | done | failed | stop, content)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends us
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # fastokens' own
    tokenizer = load_tokenizer(encoder)

    def send(kind, content):
        try:
            connection.send((kind, content))
        except OSError:
            raise SystemExit(1) from None  # likewise; temporary files go on our way out

    with contextlib.suppress(EOFError, ConnectionError):  # the main process is gone
        while True:
            job = connection.recv()
            try:
                send("done", prepare_unit(job, tokenizer, lambda *counts: send("progress", counts)))
            except ShardError as error:
                send("stop", str(error))
            except DamagedError as error:
                send("failed", str(error))


def run_units(plan, records, mine, config, folder, encoder):
    """Prepares our units that have no record, and puts theirs into `records`; returns {unit: why it failed}.

    Raises ShardError if the output cannot be written, PrepareError if a worker process dies. Then, and on Ctrl-C,
    no worker and no temporary file is left.
    """
    failed, jobs, tokens, started = {}, {}, 0, time.monotonic()  # jobs: {connection: job}
    todo = next_units(plan, records, mine, (), failed, config.max_tokens)
    pool = start_workers(min(config.workers or cores(), len(todo)), encoder)  # {connection: process}
    bar = tqdm(total=expected_bytes(plan, records, mine, config), unit="B", unit_scale=True, disable=None)
    try:
        while todo or jobs:
            for connection in [c for c in pool if c not in jobs][: len(todo)]:
                jobs[connection] = make_job(plan, *todo.pop(0), folder)
                connection.send(jobs[connection])
            for connection in multiprocessing.connection.wait(list(jobs)):
                kind, content = connection.recv()
                if kind == "progress":
                    tokens += content[1]
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - started) / 1e6:.2f}M tokens/s", False)
                    bar.update(content[0])
                    continue
                number = jobs.pop(connection)["number"]
                if kind == "stop":
                    raise ShardError(content)
                if kind == "failed":
                    failed[number] = content
                    bar.write(f"  failed: {content}", file=sys.stderr)
                else:
                    records[number] = content
                running = [job["number"] for job in jobs.values()]
                todo = next_units(plan, records, mine, running, failed, config.max_tokens)
    except (EOFError, ConnectionError) as error:
        pool[connection].join()
        raise PrepareError(
            f"{jobs[connection]['path']}: the process at it died (exit code {pool[connection].exitcode}; -9 is often "
            "the system's, for want of memory); what is finished is kept: run it again, with fewer --workers"
        ) from error
    finally:
        bar.close()
        for process in pool.values():
            process.terminate()
            process.join()
        remove_leftovers(folder, mine, plan)
    return failed


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_workers(count, encoder):
    """{connection: process}, spawned: a process that has used fastokens must not be forked."""
    context, pool = multiprocessing.get_context("spawn"), {}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the main process alone
    for _ in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, encoder, max(1, cores() // count)), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death closes the connection
        pool[ours] = process
    signal.signal(signal.SIGINT, handler)
    return pool


def make_job(plan, number, limit, folder):
    unit = plan["units"][number]
    job = {"number": number, "limit": limit, "folder": str(folder), "unit": unit}
    return plan["settings"] | job | {"path": plan["sources"][unit["source"]]["path"]}


def expected_bytes(plan, records, mine, config):
    """Bytes of text that are still to be read, about."""
    missing = sum(plan["units"][number]["bytes"] for number in mine if number not in records)
    if not config.max_tokens:
        return missing
    done = sum(record["tokens"] for record in records.values())
    return min(missing, int(max(0, config.max_tokens - done) * BYTES_PER_TOKEN))


def remove_leftovers(folder, mine, plan):
    """Removes the temporary files of our units, and if these are all, of the dataset."""
    for path in [*folder.glob("*.tmp"), *folder.glob(".prepare/*.tmp")]:
        number = re.search(r"_(\d{6,})\.", path.name)
        if int(number[1]) in mine if number else len(mine) == len(plan["units"]):
            path.unlink(missing_ok=True)


def own(locks, path, what, patience=0.0):
    """Owns a lock file as long as `locks` is open; waits `patience` seconds for others that only plan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    while True:
        try:
            return locks.enter_context(owned(path, what))
        except OwnedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


# ---- the dataset -------------------------------------------------------------------------------------------


def prepare(config, folder):
    """Plans, does what is missing, and completes the dataset; returns the exit code."""
    state, started = folder / ".prepare", time.monotonic()
    found, damaged = examine_all(config)
    if not found and not state.exists():
        raise PrepareError(f"{folder}: nothing is prepared here yet; name the files to take")
    task, tasks = map(int, config.task.split("/")) if config.task else (1, 1)
    with contextlib.ExitStack() as locks:
        if config.task:
            own(locks, state / f"task_{task}_of_{tasks}.lock", f"task {config.task} of {folder}")
            with contextlib.ExitStack() as planning:
                own(planning, state / "all.lock", str(folder), patience=5.0)
                plan = make_plan(found, config, folder)
        else:
            for path in (state / "all.lock", *state.glob("task_*.lock")):
                own(locks, path, f"{folder} ({path.name})")
            plan = make_plan(found, config, folder)
        mine = range(task - 1, len(plan["units"]), tasks)
        remove_leftovers(folder, mine, plan)
        for problem in damaged:
            print(f"  left out: {problem}", file=sys.stderr)
        records = read_records(plan, mine, folder)
        failed = do_missing(plan, records, mine, config, folder)
        if config.task:
            tokens = sum(record["tokens"] for record in records.values())
            print(f"task {config.task}: {len(records)} of {len(mine)} units are done, {tokens:,} tokens")
            print(f"when all tasks are done: python prepare.py --merge --dataset={config.dataset}")
        else:
            finish(plan, records, config, folder, failed, time.monotonic() - started)
    return 1 if failed or damaged else 0


def do_missing(plan, records, mine, config, folder):
    """Announces and runs what has no record yet; returns {unit: why it failed}. Raises PrepareError if it cannot."""
    todo = next_units(plan, records, mine, (), {}, config.max_tokens)
    if not todo:
        return {}
    if config.merge:
        missing = [number for number in mine if number not in records]
        remedy = "run their tasks, or leave out --merge"
        raise PrepareError(f"{folder}: units {missing[:9]} of {len(mine)} are not done; {remedy}")
    there = read_manifest(folder)
    if there and 0 < config.max_tokens < min(there["tokens"], there["settings"].get("max_tokens") or math.inf):
        remedy = "leave it out, or name a new dataset"
        raise PrepareError(f"max_tokens: {folder} holds {there['tokens']:,} tokens already; {remedy}")
    texts = first_texts(plan, todo[0][0])
    encoder = choose_encoder(config, texts)
    tokens = sum(map(len, encode_texts(load_tokenizer(), texts)))
    bytes_per_token = sum(len(text.encode()) for text in texts) / tokens if tokens else BYTES_PER_TOKEN
    size, free = expected_bytes(plan, records, mine, config), shutil.disk_usage(folder).free
    need = int(2 * size / bytes_per_token)
    print(f"{folder}: {len(mine)} units of {len(plan['sources'])} files, {len(records)} of them done already")
    print(f"  to do: {size / 1e6:,.1f} MB of text, about {need / 2e6:,.1f}M tokens; {encoder}")
    print(f"  disk:  {need / 1e6:,.1f} MB, of {free / 1e6:,.1f} MB that are free")
    if need > free:
        remedy = "free some, or take another --data_dir, or fewer tokens by --max_tokens"
        raise PrepareError(f"{folder}: {need:,} bytes are needed and {free:,} are free; {remedy}")
    return run_units(plan, records, mine, config, folder, encoder)


def choose_encoder(config, texts):
    """fastokens if it is installed and gives tiktoken's ids for hard strings and these texts."""
    if config.encoder == "tiktoken":
        return "tiktoken"
    try:
        check_parity(load_tokenizer("fastokens"), texts)
        return "fastokens"
    except TokenizerError as error:
        if config.encoder == "fastokens":
            raise
        print(f"  encoder: tiktoken, for {error}")
        return "tiktoken"


def first_texts(plan, number):
    """Up to 100 documents of a unit; none if they cannot be read, which the unit's own run will say."""
    job, counts = make_job(plan, number, 0, ""), {"skipped": {"null": 0, "empty": 0}, "replaced": 0}
    with contextlib.suppress(DamagedError):
        positions, values, _ = next(read_texts(job["path"], job["unit"], job["text_column"]))
        return as_texts(positions[:100], values[:100], job["path"], counts)[0]
    return []


def finish(plan, records, config, folder, failed, seconds):
    """Writes the manifest from the records, if it does not stand there yet, and says what the dataset is."""
    kept, total = {}, 0
    for number, record in sorted(records.items()):
        if config.max_tokens and total >= config.max_tokens:  # it was begun by a guess, and is not needed
            for path in (unit_record(folder, number), *(folder / shard["name"] for shard in record["shards"])):
                path.unlink(missing_ok=True)
        else:
            kept[number] = record
            total += record["tokens"]
    manifest = make_manifest(plan, kept.values(), config, failed)
    if not manifest["shards"]:
        raise PrepareError(f"{folder}: no document came out; {'; '.join(failed.values()) or 'all rows are empty'}")
    known = read_manifest(folder)
    hashes, old = ([(s["name"], s["sha256"]) for s in m["shards"]] for m in (manifest, known or {"shards": []}))
    if hashes == old and manifest["failed"] == known["failed"]:
        manifest["libraries"] = known["libraries"]  # those that made it
        print(f"{folder} is finished; nothing to do")
    else:
        print(f"{folder} is ready, in {seconds:.1f} s by {manifest['encoder']}")
    if manifest != known:  # a source may have been moved
        write_manifest(folder, manifest)
    print(summary(manifest))
    run = "quickstart.py" if folder.name == "quickstart" else f"fineweb_4070.py --dataset={folder.name}"
    print(f"next: python train.py config/{run}")


def make_manifest(plan, records, config, failed):
    tokenizer, packages = load_tokenizer(), ("numpy", "pyarrow", "tiktoken", "fastokens")
    shards = []
    for record in records:
        place = {name: record[name] for name in ("row_groups", "rows", "range") if name in record}
        place["source"] = plan["sources"][record["source"]]["path"]
        shards += [shard | place for shard in record["shards"]]
    reasons = {reason: sum(record["skipped"][reason] for record in records) for reason in ("null", "empty")}
    return {
        "version": 1,
        "tokenizer": {name: getattr(tokenizer, name) for name in ("name", "sha256", "n_vocab", "eot")},
        "encoder": " and ".join(sorted({record["encoder"] for record in records})),
        "libraries": {name: installed(name) for name in packages} | {"python": sys.version.split()[0]},
        "settings": plan["settings"] | {"max_tokens": config.max_tokens},
        **{name: sum(record[name] for record in records) for name in ("documents", "tokens", "replaced")},
        "skipped": reasons,
        "failed": [failed[number] for number in sorted(failed)],
        "sources": plan["sources"],
        "shards": shards,
    }


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def summary(manifest):
    """What is in a dataset, as lines for a person."""
    lines = ["         documents            tokens  bytes/token  shards"]
    for split in ("train", "val"):
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        documents, tokens, size = (sum(s[name] for s in shards) for name in ("documents", "tokens", "text_bytes"))
        ratio = size / max(1, tokens - documents)
        lines.append(f"  {split:5} {documents:>11,} {tokens:>17,} {ratio:>12.2f} {len(shards):>7,}")
    if not shards:
        lines.append("  no document fell into val, which train.py needs: a new dataset with --val_fraction=0.1, say")
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["skipped"].items())
    lines.append(f"  skipped: {skipped}; lone surrogates replaced: {manifest['replaced']:,}")
    lines += [f"  FAILED, with {len(manifest['failed'])} units: {reason}" for reason in manifest["failed"][:1]]
    return "\n".join(lines)


def verify(folder, manifest):
    """Checks every byte of every shard, and against the sources' token_count; returns the exit code."""
    problems, sums, unchecked = [], {}, set()
    with tqdm(total=sum(2 * s["tokens"] for s in manifest["shards"]), unit="B", unit_scale=True, disable=None) as bar:
        for shard in manifest["shards"]:
            try:
                check_shard(folder / shard["name"], shard, manifest["tokenizer"])
            except ShardError as error:
                problems.append(f"{error}; delete the file and prepare again: only its unit is done again")
            rows = (shard["source"], *shard.get("row_groups", ()), *shard.get("rows", ()))
            sums[rows] = sums.get(rows, 0) + shard["tokens"] - shard["documents"]
            bar.update(2 * shard["tokens"])
    for (path, *rows), tokens in sums.items():
        expected = token_count(path, *rows) if rows else None
        if expected is None:
            unchecked.add(path)
        elif expected != tokens:
            problems.append(f"{path}: token_count of rows {rows[2]:,} to {rows[3]:,} is {expected:,}, not {tokens:,}")
    print(f"{folder}: {len(manifest['shards'])} shards, {manifest['tokens']:,} tokens")
    print("\n".join(problems) or "  sizes, hashes, ids and separators are right")
    if unchecked:
        print(f"  not compared with a token_count, which is not there: {len(unchecked)} of the sources")
    return 1 if problems else 0


def inspect(folder, manifest):
    """Prints a dataset: counts, lengths of documents, sources, and the first and last documents as text."""
    print(f"{folder}: {manifest['encoder']}, settings {manifest['settings']}")
    print(summary(manifest))
    tokenizer, counted, lengths = load_tokenizer(), 0, []
    for shard in manifest["shards"]:
        tokens = open_tokens(folder / shard["name"])[:LOOK_TOKENS]
        lengths.append(np.diff(np.flatnonzero(tokens == tokenizer.eot), append=len(tokens)) - 1)
        counted += len(tokens)
        if counted >= LOOK_TOKENS:
            break
    marks = np.percentile(np.concatenate(lengths), (0, 5, 25, 50, 75, 95, 100)).astype(int)
    print(f"  tokens a document, of the first {counted:,} tokens: " + ", ".join(f"{m:,}" for m in marks))
    print("    (least, 5%, 25%, half, 75%, 95%, most)")
    for source in manifest["sources"][:20]:
        print(f"  {source['bytes']:>15,} bytes  {source['path']}")
    if len(manifest["sources"]) > 20:
        print(f"  and {len(manifest['sources']) - 20} more sources")
    train = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    first, last = (open_tokens(folder / shard["name"]) for shard in (train[0], train[-1]))
    for name, tokens in (("first", first[:10_000]), ("last", last[-10_000:])):
        documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))[1:] or [tokens]
        for document in documents[:3] if name == "first" else documents[-3:]:
            text = tokenizer.decode(document[document != tokenizer.eot])
            print(f"--- {name}: {textwrap.shorten(text, 400)}")


# ---- the quickstart's text ---------------------------------------------------------------------------------


def quickstart(config):
    """The config of a run without inputs: English that every Python carries, as a parquet file like FineWeb's."""
    path = Path(config.data_dir) / "quickstart" / "quickstart.parquet"
    if not path.exists():
        from pydoc_data.topics import topics  # the language manual, as help() shows it

        texts = [(f"topics:{name}", topics[name]) for name in sorted(topics)]
        write_fineweb(path, texts + docstrings(Path(sysconfig.get_paths()["stdlib"])))
    fraction = 0.05 if config.val_fraction == PrepareConfig.val_fraction else config.val_fraction
    return dataclasses.replace(config, inputs=(str(path),), dataset="quickstart", val_fraction=fraction)


def docstrings(library):
    """[(name, text)]: the docstrings of each class, and of the rest of each file, of the standard library.

    The files are parsed, never imported; those that are no Python (templates, samples) are passed over.
    """
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
    documented, found = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, []
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if left_out & set(place.parts):
            continue
        with contextlib.suppress(SyntaxError, ValueError):
            tree = ast.parse(path.read_bytes())
            classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
            tree.body = [node for node in tree.body if node not in classes]
            for part in (tree, *classes):
                texts = [ast.get_docstring(node) for node in ast.walk(part) if isinstance(node, documented)]
                found.append((f"{place.as_posix()}:{getattr(part, 'name', '')}", "\n\n".join(filter(None, texts))))
    return [(name, text) for name, text in found if text]


def write_fineweb(path, texts):
    """Writes [(name, text)] as a parquet file with FineWeb's columns and row groups; token_count is right."""
    tokenizer = load_tokenizer()
    rows = [
        {"text": text, "id": hashlib.sha256(text.encode()).hexdigest(), "dump": "python", "url": name, "date": ""}
        | {"file_path": "", "language": "en", "language_score": 1.0, "token_count": len(tokenizer.encode(text))}
        for name, text in texts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1000)


def main(argv=None):
    config = load_config(PrepareConfig, argv)
    print(describe(config))
    folder = Path(config.data_dir) / (config.dataset or "quickstart")
    if config.verify or config.inspect:
        manifest = read_manifest(folder)
        if manifest is None:
            raise PrepareError(f"{folder}: no finished dataset; prepare it first")
        code = inspect(folder, manifest) if config.inspect else verify(folder, manifest)
    else:
        try:
            if not config.inputs and folder.name == "quickstart":
                config = quickstart(config)
            code = prepare(config, folder)
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # of our own output, `| head`
                raise
            raise PrepareError(f"{folder}: cannot be written ({error}); free it, or take another --data_dir") from error
        except KeyboardInterrupt:
            print("stopped; what is finished is kept: the same command goes on from there", file=sys.stderr)
            raise
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    run_script(main, PrepareError, SourceError, ShardError, TokenizerError, OwnedError)
