"""Text to tokens: parquet, .jsonl or .txt files in, shards and a manifest in data/<dataset> out. Never needs torch.

    python prepare.py                                        (data/quickstart, from text that is part of Python)
    python prepare.py fineweb/*.parquet --dataset=fineweb    (python prepare.py --help lists every key)

The one thing to know: a unit is one range of rows of one file. It writes its own shards and then its record, so a run
that was stopped continues with the units that have no record, and the bytes are the same with any number of workers.
The manifest is written last and makes the dataset complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import describe, key, load_config, run_script
from onecard import UserError, durable
from onecard.quickstart import write_quickstart
from onecard.shards import ShardError, check_shard, layout, open_tokens, read_manifest, write_json, write_manifest
from onecard.sources import DamagedError, SourceError, examine, find_files, read_texts, token_count
from onecard.tokenizer import GPT2Tokenizer, TokenizerError, check_parity, load_tokenizer
from onecard.units import STATE, decode, encode_texts, make_job, unit_record, work

BYTES_PER_TOKEN = 4.67  # of FineWeb; a file's footer gives bytes of text, shard_tokens and max_tokens are tokens
PLANNING_SECONDS = 5.0  # that a task waits for other tasks, which own the whole dataset only while they plan
INSPECT_TOKENS = 50_000_000  # read by --inspect


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    inputs: tuple[str, ...] = key((), "files, folders, globs, hf:// paths; none: the quickstart", inputs=True)
    dataset: str = key("", "name of the dataset: the folder data_dir/dataset")
    data_dir: str = key("data", "the folder of all datasets")
    text_column: str = key("text", "column of a parquet file, or key of a .jsonl line, with the text")
    val_fraction: float = key(0.005, "share of documents in val, by a hash of the text", low=0.0, high=0.5)
    shard_tokens: int = key(100_000_000, "approximate tokens per shard", low=1000, high=1_000_000_000)
    max_tokens: int = key(0, "stop with the row group that reaches this many tokens (0: take all)", low=0)
    workers: int = key(0, "worker processes (0: one per core)", low=0)
    encoder: str = key("auto", "auto: fastokens if it is installed", choices=("auto", "tiktoken", "fastokens"))
    task: str = key("", "3/16: only the third of 16 parts of the units; run --merge when all parts are done")
    merge: bool = key(False, "complete a dataset whose tasks are done")
    verify: bool = key(False, "check every byte of a finished dataset")
    inspect: bool = key(False, "show what is in a finished dataset")

    def problems(self) -> list[str]:
        found = []
        if self.inputs and not self.dataset:
            found.append(f"dataset: no name for the dataset made from {self.inputs[0]}; add --dataset=fineweb, say")
        task = re.fullmatch(r"(\d+)/(\d+)", self.task)
        if self.task and not (task and 1 <= int(task[1]) <= int(task[2])):
            found.append(f"task: {self.task!r} is not a task; the tasks of sixteen are 1/16 to 16/16")
        if self.task and (self.max_tokens or self.merge):
            found.append("task: max_tokens and merge need all units; leave out --task")
        return found


class PrepareError(UserError):
    """A user's mistake: which file or key, why, and what to do."""


# ---- the plan ----------------------------------------------------------------------------------------------


def examine_all(config: PrepareConfig) -> tuple[list[tuple[dict, list]], list[str]]:
    """([(source, its units)], problems of damaged files, which are left out). Raises PrepareError for all others."""
    found: dict[str, tuple] = {}  # by the id of the source
    damaged, problems = [], []
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


def make_plan(found: list[tuple[dict, list]], config: PrepareConfig, folder: Path) -> dict:
    """The plan: settings, sources, units. New units are added at its end; a unit's number never changes.

    Raises PrepareError for a changed setting or source.
    """
    path = folder / STATE / "plan.json"
    settings = {name: getattr(config, name) for name in ("text_column", "val_fraction", "shard_tokens")}
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    plan: dict = json.loads(before) if before else {"sources": [], "units": [], "settings": settings}
    problems = []
    for name, value in settings.items():
        known = plan["settings"][name]
        if value != known and (config.inputs or value != getattr(PrepareConfig, name)):
            remedy = f"use --{name}={known}, or another --dataset"
            problems.append(f"{name}: {folder} was started with {known!r}, not {value!r}; {remedy}")
    by_id = {source["id"]: source for source in plan["sources"]}
    paths = {source["path"] for source in plan["sources"]}
    for source, units in found:
        if source["id"] in by_id:
            by_id[source["id"]]["path"] = source["path"]  # the file may have moved
        elif source["path"] in paths:
            problems.append(f"{source['path']}: has changed since {folder} was started; use another --dataset")
        else:
            plan["units"] += [{"source": len(plan["sources"]), **unit} for unit in units]
            plan["sources"].append(source)
    if not plan["units"]:
        problems.append(f"{folder}: nothing to prepare; name files that have rows")
    if problems:
        raise PrepareError("\n".join(problems))
    if json.dumps(plan, indent=1) != before:
        write_json(path, plan)
    return plan


def read_records(plan: dict, numbers: range, folder: Path) -> dict[int, dict]:
    """{unit number: record} of the finished units whose shards have their full size."""
    records = {}
    for number in numbers:
        try:
            record = json.loads(unit_record(folder, number).read_text(encoding="utf-8"))
            for shard in record["shards"]:
                if layout(folder / shard["name"])[1] != shard["tokens"]:
                    raise ShardError(f"{folder / shard['name']}: not the size that was written")
            records[number] = record
        except FileNotFoundError:
            continue
        except (ShardError, ValueError, KeyError) as error:
            print(f"  unit {number} is prepared again: {error}")
    return records


def next_units(plan: dict, records: dict, numbers, running, failed, max_tokens: int) -> list[tuple[int, int]]:
    """[(unit, limit)] of the units that can start now, in order. limit 0: no limit.

    With max_tokens, a unit starts when all before it are done, because then its limit is exact. Or it starts without
    a limit when it is surely needed whole, even if it has 1.5 times the expected tokens. A record that was made with
    another limit than the exact one is not used: the result is the same with any number of workers.
    """
    ready, before, exact = [], 0.0, True  # before: tokens of the units before this one; exact: no estimate among them
    for number in numbers:
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


def fits(record: dict, limit: float) -> bool:
    """Whether a unit's record is the one that this limit gives."""
    return record["limit"] == limit or (record["complete"] and record["tokens"] < limit)


# ---- the workers -------------------------------------------------------------------------------------------


def run_units(plan, records, numbers, config, folder, encoder, size):
    """Prepares the units that have no record and adds theirs to `records`. Returns {unit: why it failed}.

    size: bytes of text to read, about. Raises ShardError if a file cannot be written, PrepareError if a worker
    process dies. No worker and no temporary file is left then, or after Ctrl-C.
    """
    failed, jobs, tokens, started = {}, {}, 0, time.monotonic()  # jobs: {connection: job}
    todo = next_units(plan, records, numbers, (), failed, config.max_tokens)
    pool = start_workers(config.workers, len(todo), encoder)
    bar = tqdm(total=size, unit="B", unit_scale=True, disable=None)
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
                todo = next_units(plan, records, numbers, running, failed, config.max_tokens)
    except (EOFError, ConnectionError) as error:
        pool[connection].join()
        raise PrepareError(
            f"{jobs[connection]['path']}: its worker process died (exit code {pool[connection].exitcode}; -9 often "
            "means that memory ran out); finished units are kept: run it again with fewer --workers"
        ) from error
    finally:
        bar.close()
        for process in pool.values():
            process.terminate()
            process.join()
        remove_leftovers(folder, numbers, plan)
    return failed


def start_workers(workers: int, most: int, encoder: str) -> dict:
    """{connection: process}: `workers` of them (0: one per core), but not more than `most`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count, pool = min(workers or cores, most), {}
    context = multiprocessing.get_context("spawn")  # a process that has used fastokens must not be forked
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the main process alone
    for _ in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, encoder, max(1, cores // count)), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death closes the connection
        pool[ours] = process
    signal.signal(signal.SIGINT, handler)
    return pool


def remove_leftovers(folder: Path, numbers: range, plan: dict) -> None:
    """Removes unfinished files. With --task only those of its own units: other tasks may be running."""
    if len(numbers) == len(plan["units"]):
        durable.remove_leftovers(folder)
        durable.remove_leftovers(folder / STATE)
        return
    for path in [*folder.glob(f"*{durable.TEMPORARY}"), *folder.glob(f"{STATE}/*{durable.TEMPORARY}")]:
        number = re.search(r"_(\d{6,})\.", path.name)
        if number and int(number[1]) in numbers:
            path.unlink(missing_ok=True)


# ---- the dataset -------------------------------------------------------------------------------------------


def prepare(config: PrepareConfig, folder: Path) -> int:
    """Plans, prepares what is missing, and completes the dataset. Returns the exit code."""
    state, started = folder / STATE, time.monotonic()
    found, damaged = examine_all(config)
    if not found and not state.exists():
        raise PrepareError(f"{folder}: nothing is prepared here yet; name the files to prepare")
    state.mkdir(parents=True, exist_ok=True)
    task, tasks = map(int, config.task.split("/")) if config.task else (1, 1)
    whole, own = state / "all.lock", state / f"task_{task}_of_{tasks}.lock"
    with contextlib.ExitStack() as locks:
        if config.task:
            locks.enter_context(durable.owned(own, f"task {config.task} of {folder}"))
            with durable.owned(whole, str(folder), patience=PLANNING_SECONDS):
                plan = make_plan(found, config, folder)
        else:
            for path in (whole, *state.glob("task_*.lock")):
                locks.enter_context(durable.owned(path, f"{folder} ({path.name})"))
            plan = make_plan(found, config, folder)
        numbers = range(task - 1, len(plan["units"]), tasks)
        remove_leftovers(folder, numbers, plan)
        for problem in damaged:
            print(f"  left out: {problem}", file=sys.stderr)
        records = read_records(plan, numbers, folder)
        failed = prepare_missing(plan, records, numbers, config, folder)
        if config.task:
            tokens = sum(record["tokens"] for record in records.values())
            print(f"task {config.task}: {len(records)} of {len(numbers)} units are done, {tokens:,} tokens")
            print(f"when all tasks are done: python prepare.py --merge --dataset={config.dataset}")
        else:
            finish(plan, records, config, folder, failed, time.monotonic() - started)
    return 1 if failed or damaged else 0


def prepare_missing(plan: dict, records: dict, numbers: range, config: PrepareConfig, folder: Path) -> dict:
    """Prints what is to be done and does it. Returns {unit: why it failed}. Raises PrepareError if it is impossible."""
    todo = next_units(plan, records, numbers, (), {}, config.max_tokens)
    if not todo:
        return {}
    if config.merge:
        missing = [number for number in numbers if number not in records]
        remedy = "run their tasks, or leave out --merge"
        raise PrepareError(f"{folder}: units {missing[:9]} of {len(numbers)} are not done; {remedy}")
    there = read_manifest(folder)
    if there and 0 < config.max_tokens < min(there["tokens"], there["settings"].get("max_tokens") or math.inf):
        remedy = "leave it out, or use another --dataset"
        raise PrepareError(f"max_tokens: {folder} holds {there['tokens']:,} tokens already; {remedy}")
    texts = first_texts(plan, todo[0][0])
    encoder = choose_encoder(config, texts)
    tokens = sum(map(len, encode_texts(load_tokenizer(), texts)))
    bytes_per_token = sum(len(text.encode()) for text in texts) / tokens if tokens else BYTES_PER_TOKEN
    size = sum(plan["units"][number]["bytes"] for number in numbers if number not in records)  # of text to read, about
    if config.max_tokens:
        done = sum(record["tokens"] for record in records.values())
        size = min(size, int(max(0, config.max_tokens - done) * BYTES_PER_TOKEN))
    need, free = int(2 * size / bytes_per_token), shutil.disk_usage(folder).free
    print(f"{folder}: {len(numbers)} units of {len(plan['sources'])} files, {len(records)} of them done already")
    print(f"  to do: {size / 1e6:,.1f} MB of text, about {need / 2e6:,.1f}M tokens; {encoder}")
    print(f"  disk:  {need / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")
    if need > free:
        remedy = "make room, use another --data_dir, or take fewer tokens with --max_tokens"
        raise PrepareError(f"{folder}: {need:,} bytes are needed and {free:,} are free; {remedy}")
    return run_units(plan, records, numbers, config, folder, encoder, size)


def first_texts(plan: dict, number: int) -> list[str]:
    """Up to 100 documents of a unit. None if they cannot be read: the unit itself reports why."""
    job = make_job(plan, number, 0, "")
    with contextlib.suppress(DamagedError, UnicodeDecodeError):
        for _, values, _ in read_texts(job["path"], job["unit"], job["text_column"]):
            return [decode(value)[0] for value in values[:100] if value]
    return []


def choose_encoder(config: PrepareConfig, texts: list[str]) -> str:
    """fastokens if it is installed and gives tiktoken's ids for hard strings and these texts."""
    if config.encoder == "tiktoken":
        return "tiktoken"
    try:
        check_parity(GPT2Tokenizer("fastokens"), texts)
        return "fastokens"
    except TokenizerError as error:
        if config.encoder == "fastokens":
            raise
        print(f"  encoder: tiktoken, because {error}")
        return "tiktoken"


def finish(plan: dict, records: dict, config: PrepareConfig, folder: Path, failed: dict, seconds: float) -> None:
    """Writes the manifest from the records, unless it is there already, and prints what the dataset is."""
    kept, tokens = [], 0
    for number, record in sorted(records.items()):
        if config.max_tokens and tokens >= config.max_tokens:  # started early, and not needed after all
            for path in (unit_record(folder, number), *(folder / shard["name"] for shard in record["shards"])):
                path.unlink(missing_ok=True)
        else:
            kept.append(record)
            tokens += record["tokens"]
    manifest, known = make_manifest(plan, kept, config, failed), read_manifest(folder)
    if not manifest["shards"]:
        raise PrepareError(f"{folder}: no document was found; {'; '.join(failed.values()) or 'all rows are empty'}")
    hashes, known_hashes = ([(s["name"], s["sha256"]) for s in m["shards"]] for m in (manifest, known or manifest))
    if known and hashes == known_hashes and manifest["failed"] == known["failed"]:
        manifest["libraries"] = known["libraries"]  # the versions that made the shards
        print(f"{folder} is finished; nothing to do")
    else:
        print(f"{folder} is ready, in {seconds:.1f} s by {manifest['encoder']}")
    if manifest != known:  # a source may have moved
        write_manifest(folder, manifest)
    print(summary(manifest))
    run = "quickstart.py" if folder.name == "quickstart" else f"fineweb_4070.py --dataset={folder.name}"
    print(f"next: python train.py config/{run}")


def make_manifest(plan: dict, records: list[dict], config: PrepareConfig, failed: dict) -> dict:
    tokenizer, shards = load_tokenizer(), []
    libraries: dict[str, str | None] = dict.fromkeys(("numpy", "pyarrow", "tiktoken", "fastokens"))
    for name in libraries:
        with contextlib.suppress(PackageNotFoundError):  # fastokens is optional
            libraries[name] = version(name)
    for record in records:
        place = {name: record[name] for name in ("row_groups", "rows", "range") if name in record}
        place["source"] = plan["sources"][record["source"]]["path"]
        shards += [shard | place for shard in record["shards"]]
    return {
        "version": 1,
        "tokenizer": {name: getattr(tokenizer, name) for name in ("name", "sha256", "n_vocab", "eot")},
        "encoder": " and ".join(sorted({record["encoder"] for record in records})),
        "libraries": libraries | {"python": sys.version.split()[0]},
        "settings": plan["settings"] | {"max_tokens": config.max_tokens},
        **{name: sum(record[name] for record in records) for name in ("documents", "tokens", "replaced")},
        "skipped": {reason: sum(record["skipped"][reason] for record in records) for reason in ("null", "empty")},
        "failed": [failed[number] for number in sorted(failed)],
        "sources": plan["sources"],
        "shards": shards,
    }


def summary(manifest: dict) -> str:
    """What is in a dataset, as lines for a person."""
    lines = ["         documents            tokens  bytes/token  shards"]
    for split in ("train", "val"):
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        documents, tokens, size = (sum(s[name] for s in shards) for name in ("documents", "tokens", "text_bytes"))
        ratio = size / max(1, tokens - documents)
        lines.append(f"  {split:5} {documents:>11,} {tokens:>17,} {ratio:>12.2f} {len(shards):>7,}")
    if all(shard["split"] == "train" for shard in manifest["shards"]):
        lines.append("  no document is in val, which train.py needs: make a new dataset with --val_fraction=0.1, say")
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["skipped"].items())
    lines.append(f"  skipped: {skipped}; lone surrogates replaced: {manifest['replaced']:,}")
    if manifest["failed"]:
        lines.append(f"  FAILED: {len(manifest['failed'])} units, the first because {manifest['failed'][0]}")
    return "\n".join(lines)


def verify(folder: Path, manifest: dict) -> int:
    """Checks every byte of every shard, and the number of tokens against the sources. Returns the exit code."""
    problems, unchecked = [], set()
    tokens_of: dict[tuple, int] = {}  # {(source, rows): tokens without separators}
    with tqdm(total=sum(2 * s["tokens"] for s in manifest["shards"]), unit="B", unit_scale=True, disable=None) as bar:
        for shard in manifest["shards"]:
            try:
                check_shard(folder / shard["name"], shard, manifest["tokenizer"])
            except ShardError as error:
                problems.append(f"{error}; delete the file and prepare again: only its unit is prepared again")
            place = (shard["source"], *shard.get("row_groups", ()), *shard.get("rows", ()))
            tokens_of[place] = tokens_of.get(place, 0) + shard["tokens"] - shard["documents"]
            bar.update(2 * shard["tokens"])
    for (path, *rows), tokens in tokens_of.items():
        expected = token_count(path, *rows) if rows else None
        if expected is None:
            unchecked.add(path)
        elif expected != tokens:
            problems.append(f"{path}: token_count of rows {rows[2]:,} to {rows[3]:,} is {expected:,}, not {tokens:,}")
    print(f"{folder}: {len(manifest['shards'])} shards, {manifest['tokens']:,} tokens")
    print("\n".join(problems) or "  sizes, hashes, ids and separators are right")
    if unchecked:
        print(f"  {len(unchecked)} sources have no token_count to compare with")
    return 1 if problems else 0


def inspect(folder: Path, manifest: dict) -> int:
    """Prints a dataset: counts, lengths of documents, sources, and the first and last documents as text."""
    print(f"{folder}: {manifest['encoder']}, settings {manifest['settings']}")
    print(summary(manifest))
    tokenizer, counted, lengths = load_tokenizer(), 0, []
    for shard in manifest["shards"]:
        tokens = open_tokens(folder / shard["name"])[:INSPECT_TOKENS]
        lengths.append(np.diff(np.flatnonzero(tokens == tokenizer.eot), append=len(tokens)) - 1)
        counted += len(tokens)
        if counted >= INSPECT_TOKENS:
            break
    percentiles = np.percentile(np.concatenate(lengths), (0, 5, 25, 50, 75, 95, 100)).astype(int)
    print(f"  tokens per document, of the first {counted:,} tokens: " + ", ".join(f"{p:,}" for p in percentiles))
    print("    (minimum, 5%, 25%, median, 75%, 95%, maximum)")
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
    return 0


# ---- the command ---------------------------------------------------------------------------------------------


def with_quickstart(config: PrepareConfig) -> PrepareConfig:
    """The config of a run without inputs: it prepares the quickstart's file, which is made if it is missing."""
    path = Path(config.data_dir) / "quickstart" / "quickstart.parquet"
    if not path.exists():
        write_quickstart(path)
    fraction = 0.05 if config.val_fraction == PrepareConfig.val_fraction else config.val_fraction
    return dataclasses.replace(config, inputs=(str(path),), dataset="quickstart", val_fraction=fraction)


def main(argv: list[str] | None = None) -> None:
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
                config = with_quickstart(config)
            code = prepare(config, folder)
        except BrokenPipeError:  # of this program's own output, `| head`
            raise
        except OSError as error:
            refused = durable.write_refused(error.filename or folder, error)
            raise PrepareError(f"{refused}, or use another --data_dir") from error
        except KeyboardInterrupt:
            print("stopped; finished units are kept: the same command continues from here", file=sys.stderr)
            raise
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    run_script(main)
