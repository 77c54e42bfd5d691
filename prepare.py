"""Text to tokens: parquet, .jsonl, .json, .txt or .md files in, shards and a manifest in data/<dataset> out.

    python prepare.py                                        (data/quickstart, from text that is part of Python)
    python prepare.py my.txt notes/ --dataset=mine           (your own text)
    python prepare.py fineweb/*.parquet --dataset=fineweb    (python prepare.py --help lists every key)

It never needs torch. The one thing to know: a unit is one range of rows of one file, or a few small files. It writes
its own shards and then its record, so a run that was stopped continues with the units that have no record, and the
bytes are the same with any number of workers. The manifest is written last and makes the dataset complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import key, load_config, run_script, sources_of
from onecard import dataset, durable
from onecard.dataset import PrepareError, Progress, bytes_per_token, read_plan
from onecard.quickstart import write_quickstart
from onecard.shards import (
    MANIFEST,
    ShardError,
    check_shard,
    keys_of,
    open_tokens,
    other_datasets,
    read_manifest,
    write_manifest,
)
from onecard.sources import STATE
from onecard.tokenizer import GPT2Tokenizer, TokenizerError, check_parity, dataset_tokenizer, load_tokenizer
from onecard.units import encode_texts, job_tokenizer, make_job, read_record, unit_record, work

PLANNING_SECONDS = 5.0  # that a task waits for other tasks, which own the whole dataset only while they plan
INSPECT_TOKENS = 50_000_000  # read by --inspect
FAST_BYTES = 10_000_000  # of text; checking fastokens takes longer than encoding less
SMALL_RUN_BYTES = 50_000_000  # config/own_text.py is for less text than this
COUNTS = ("documents", "tokens", "replaced")
MANIFEST_KEYS = {*COUNTS, "tokenizer", "encoder", "libraries", "settings", "skipped", "failed", "sources", "shards"}
QUICKSTART = {"tokenizer": "gpt2-1024", "val_fraction": 0.1}  # its settings


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    inputs: tuple[str, ...] = key((), "files, folders, globs, hf:// paths; none: the quickstart", inputs=True)
    dataset: str = key("", "name of the dataset: the folder data_dir/dataset")
    data_dir: str = key("data", "the folder of all datasets")
    tokenizer: str = key("gpt2", "gpt2, gpt2-1024 (its first ids; for a small text), bytes, or a tokenizer.json")
    train_tokenizer: int = key(0, "train a tokenizer with so many ids on the inputs, 8192 say", low=0, high=65536)
    text_column: str = key("text", "column of a parquet file, or key of a JSON object, with the text")
    val_fraction: float = key(0.005, "share of val, by a hash of the text; up to 0.25 of a small text", low=0, high=0.5)
    shard_tokens: int = key(100_000_000, "approximate tokens per shard", low=1000, high=1_000_000_000)
    max_tokens: int = key(0, "stop with the row group that reaches this many tokens (0: take all)", low=0)
    workers: int = key(0, "worker processes (0: one per core)", low=0)
    encoder: str = key("auto", "auto: fastokens for 10 MB or more", choices=("auto", "tiktoken", "fastokens"))
    task: str = key("", "3/16: only the third of 16 parts of the units; run --merge when all parts are done")
    merge: bool = key(False, "complete a dataset whose tasks are done")
    verify: bool = key(False, "check every byte of a finished dataset")
    inspect: bool = key(False, "show what is in a finished dataset")

    def problems(self) -> list[str]:
        found = []
        if self.inputs and not self.dataset:
            name = re.sub(r"\W+", "_", Path(self.inputs[0]).name.split(".")[0]).strip("_") or "mine"
            found.append(f"dataset: no name for the dataset made from {self.inputs[0]}; add --dataset={name}, say")
        if self.train_tokenizer and "tokenizer" in sources_of(self):
            found.append("train_tokenizer: excludes --tokenizer; give one of the two")
        if 0 < self.train_tokenizer < 257:
            found.append("train_tokenizer: 256 bytes and a separator are ids; give 257 or more")
        task = re.fullmatch(r"(\d+)/(\d+)", self.task)
        if self.task and not (task and 1 <= int(task[1]) <= int(task[2])):
            found.append(f"task: {self.task!r} is not a task; the tasks of sixteen are 1/16 to 16/16")
        if self.task and (self.max_tokens or self.merge):
            found.append("task: max_tokens and merge need all units; leave out --task")
        return found


# ---- the units ---------------------------------------------------------------------------------------------


def asked_settings(config: PrepareConfig, folder: Path) -> dict:
    """The settings of a dataset that the user has given. The others are those of the dataset, or the defaults."""
    names = [name for name in (*dataset.SETTINGS, "tokenizer", "train_tokenizer") if name in sources_of(config)]
    new_quickstart = folder.name == "quickstart" and not read_plan(folder)
    return (QUICKSTART if new_quickstart else {}) | {name: getattr(config, name) for name in names}


def inputs_of(config: PrepareConfig, folder: Path) -> tuple[str, ...]:
    """The inputs; without any the file of the quickstart, which is made if it is missing."""
    if config.inputs or folder.name != "quickstart":
        return config.inputs
    path = folder / "quickstart.parquet"
    if not path.exists():
        write_quickstart(path)
    return (str(path),)


def read_records(plan: dict, numbers: range, folder: Path) -> dict[int, dict]:
    """{unit number: record} of the units that are done. One that is damaged is reported and prepared again."""
    records = {}
    for number in numbers:
        try:
            if record := read_record(folder, number, plan["units"][number]):
                records[number] = record
        except ShardError as error:
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
        limit, record = (max_tokens or math.inf) - before, records.get(number)
        most = 1.5 * plan["units"][number]["bytes"] / bytes_per_token(plan["settings"])
        if limit <= 0:
            break
        if number in failed:
            continue
        fits = record and (record["limit"] == limit or (record["complete"] and record["tokens"] < limit))
        if record and (fits or not exact):
            before += record["tokens"]
            continue
        if number not in running and (exact or most < limit):
            ready.append((number, int(limit) if exact and max_tokens else 0))
        exact, before = False, before + most
    return ready


# ---- the workers -------------------------------------------------------------------------------------------


def run_units(plan, records, numbers, config, folder, encoder, size):
    """Prepares the units that have no record and adds theirs to `records`. Returns {unit: why it failed}.

    size: bytes of text to read, about. Raises ShardError if a file cannot be written, PrepareError if a worker
    process dies. No worker and no temporary file is left then, or after Ctrl-C.
    """
    failed, jobs = {}, {}  # jobs: {connection: job}
    todo = next_units(plan, records, numbers, (), failed, config.max_tokens)
    pool = start_workers(config.workers, len(todo), encoder)
    progress = Progress(size, "prepared")
    try:
        while todo or jobs:
            for connection in [c for c in pool if c not in jobs][: len(todo)]:
                jobs[connection] = make_job(plan, *todo.pop(0), folder)
                connection.send(jobs[connection])
            for connection in multiprocessing.connection.wait(list(jobs)):
                kind, content = connection.recv()
                if kind == "progress":
                    progress.update(*content)
                    continue
                number = jobs.pop(connection)["number"]
                if kind == "stop":
                    raise ShardError(content)
                if kind == "failed":
                    failed[number] = content
                    progress.bar.write(f"  failed: {content}", file=sys.stderr)
                else:
                    records[number] = content
                running = [job["number"] for job in jobs.values()]
                todo = next_units(plan, records, numbers, running, failed, config.max_tokens)
    except (EOFError, ConnectionError) as error:
        pool[connection].join()
        raise PrepareError(
            f"{jobs[connection]['paths'][0]}: its worker process died (exit code {pool[connection].exitcode}; -9 often "
            "means that memory ran out); finished units are kept: run it again with fewer --workers"
        ) from error
    finally:
        progress.bar.close()
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
    state, started, before = folder / STATE, time.monotonic(), read_plan(folder)
    plan, damaged, content = dataset.plan_dataset(inputs_of(config, folder), asked_settings(config, folder), folder)
    state.mkdir(parents=True, exist_ok=True)
    task, tasks = map(int, config.task.split("/")) if config.task else (1, 1)
    whole, own = state / "all.lock", state / f"task_{task}_of_{tasks}.lock"
    with contextlib.ExitStack() as locks:
        if config.task:
            locks.enter_context(durable.owned(own, f"task {config.task} of {folder}"))
            with durable.owned(whole, str(folder), patience=PLANNING_SECONDS):
                dataset.write_plan(plan, content, before, folder)
        else:
            for path in (whole, *state.glob("task_*.lock")):
                locks.enter_context(durable.owned(path, f"{folder} ({path.name})"))
            dataset.write_plan(plan, content, before, folder)
        numbers = range(task - 1, len(plan["units"]), tasks)
        remove_leftovers(folder, numbers, plan)
        for problem in damaged:
            print(f"  left out: {problem}", file=sys.stderr)
        records = read_records(plan, numbers, folder)
        failed = prepare_missing(plan, records, numbers, config, folder)
        if config.task:
            tokens = sum(record["tokens"] for record in records.values())
            print(f"task {config.task}: {len(records)} of {len(numbers)} units are done, {tokens:,} tokens")
            print(f"when all tasks are done: python prepare.py --merge {keys_of(folder)}")
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
    there = read_finished(folder)
    if there and 0 < config.max_tokens < min(there["tokens"], there["settings"].get("max_tokens") or math.inf):
        remedy = "leave it out, or use another --dataset"
        raise PrepareError(f"max_tokens: {folder} holds {there['tokens']:,} tokens already; {remedy}")
    texts = dataset.first_texts(make_job(plan, todo[0][0], 0, folder))
    tokenizer = job_tokenizer(plan["settings"], folder)
    tokens = sum(map(len, encode_texts(tokenizer, texts)))
    ratio = sum(len(text.encode()) for text in texts) / tokens if tokens else bytes_per_token(plan["settings"])
    size = sum(plan["units"][number]["bytes"] for number in numbers if number not in records)  # of text to read, about
    if config.max_tokens:
        done = sum(record["tokens"] for record in records.values())
        size = min(size, int(max(0, config.max_tokens - done) * ratio))
    encoder = choose_encoder(config, plan["settings"], texts, size, folder)
    need, free = int(2 * size / ratio), shutil.disk_usage(folder).free
    print(f"{folder}: files: {len(plan['sources']):,}, units: {len(numbers):,}, done already: {len(records):,}")
    print(f"  to do: {amount(size)}B of text, about {amount(need / 2)} tokens ({tokenizer.name}, by {encoder})")
    print(f"  disk:  {amount(need)}B needed, {amount(free)}B free")
    if need > free:
        remedy = "make room, use another --data_dir, or take fewer tokens with --max_tokens"
        raise PrepareError(f"{folder}: {need:,} bytes are needed and {free:,} are free; {remedy}")
    return run_units(plan, records, numbers, config, folder, encoder, size)


def amount(number: float) -> str:
    """1234567 -> "1.23 M"."""
    return re.sub("(?<=\\d)(?=[kMGT]?$)", " ", tqdm.format_sizeof(number, divisor=1000))


def choose_encoder(config: PrepareConfig, settings: dict, texts: list[str], size: float, folder: Path) -> str:
    """fastokens for much text, if it is installed and gives the same ids for hard strings and these texts."""
    usual = job_tokenizer(settings, folder).encoder
    if config.encoder == "tiktoken" or (config.encoder == "auto" and size < FAST_BYTES):
        return usual
    try:
        fast = job_tokenizer(settings, folder, "fastokens")
        check_parity(fast, texts)
        return fast.encoder
    except TokenizerError as error:
        if config.encoder == "fastokens":
            raise
        print(f"  encoder: {usual}, because {error}")
        return usual


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
    manifest, known = make_manifest(plan, kept, config, failed), read_finished(folder)
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
    print(f"next: python train.py {next_config(manifest, folder)}")


def next_config(manifest: dict, folder: Path) -> str:
    """The config file and the keys of train.py that suit the size of a dataset."""
    if folder.name == "quickstart":
        return f"config/quickstart.py {keys_of(folder)}"
    if sum(shard["text_bytes"] for shard in manifest["shards"]) >= SMALL_RUN_BYTES:
        return f"config/fineweb_4070.py {keys_of(folder)}"
    tokens = sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "train")
    steps = max(50, 8 * tokens // 2048 // 10 * 10)  # 8 epochs; a shorter run than the config's for less text
    fewer = f" --max_iters={steps} --eval_interval={steps // 10}" if steps < 1000 else ""
    return f"config/own_text.py {keys_of(folder)} --out_dir=out/{shlex.quote(folder.name)}{fewer}"


def make_manifest(plan: dict, records: list[dict], config: PrepareConfig, failed: dict) -> dict:
    settings, shards = dict(plan["settings"]), []
    tokenizer = settings.pop("tokenizer", None) or {
        name: getattr(GPT2Tokenizer, name) for name in ("name", "sha256", "n_vocab", "eot")
    }
    encoder = "tokenizers" if tokenizer.get("kind") == "bpe" else "tiktoken"
    libraries: dict[str, str | None] = dict.fromkeys(("numpy", "pyarrow", encoder, "fastokens"))
    for name in libraries:
        with contextlib.suppress(PackageNotFoundError):  # some are optional
            libraries[name] = version(name)
    for record in records:
        place = {name: record[name] for name in ("row_groups", "rows", "range", "files") if name in record}
        place["source"] = plan["sources"][record["source"]]["path"]
        shards += [shard | place for shard in record["shards"]]
    return {
        "version": 1,
        "tokenizer": tokenizer,
        "encoder": " and ".join(sorted({record["encoder"] for record in records})),
        "libraries": libraries | {"python": sys.version.split()[0]},
        "settings": settings | {"max_tokens": config.max_tokens},
        **{name: sum(record[name] for record in records) for name in COUNTS},
        "skipped": {reason: sum(record["skipped"][reason] for record in records) for reason in ("null", "empty")},
        "failed": [failed[number] for number in sorted(failed)],
        "sources": plan["sources"],
        "shards": shards,
    }


def read_finished(folder: Path) -> dict | None:
    """The manifest of a finished dataset, or None. Raises ShardError if it is damaged, or not made by prepare.py."""
    manifest = read_manifest(folder)
    if missing := MANIFEST_KEYS - (manifest or dict.fromkeys(MANIFEST_KEYS)).keys():
        what = f"has no {', '.join(sorted(missing))}"
        raise ShardError(f"{folder / MANIFEST}: {what}; delete it and run prepare.py again")
    return manifest


def summary(manifest: dict) -> str:
    """What is in a dataset, as lines for a person."""
    lines = ["         documents            tokens  bytes/token  shards"]
    for split in ("train", "val"):
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        documents, tokens, size = (sum(s[name] for s in shards) for name in ("documents", "tokens", "text_bytes"))
        ratio = size / max(1, tokens - documents)
        lines.append(f"  {split:5} {documents:>11,} {tokens:>17,} {ratio:>12.2f} {len(shards):>7,}")
    if all(shard["split"] == "train" for shard in manifest["shards"]):
        remedy = "make another --dataset with --val_fraction=0.1, say, or from more text"
        lines.append(f"  no document is in val, which train.py needs: {remedy}")
    if any(manifest["skipped"].values()) or manifest["replaced"]:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["skipped"].items())
        lines.append(f"  skipped: {skipped}; lone surrogates replaced: {manifest['replaced']:,}")
    if manifest["failed"]:
        lines.append(f"  FAILED: {len(manifest['failed'])} units, the first because {manifest['failed'][0]}")
    return "\n".join(lines)


def verify(folder: Path, manifest: dict) -> int:
    """Checks every byte of every shard. Returns the exit code."""
    problems = []
    dataset_tokenizer(folder)  # its file is the one of the manifest
    with Progress(sum(2 * shard["tokens"] for shard in manifest["shards"]), "checked") as progress:
        for shard in manifest["shards"]:
            try:
                check_shard(folder / shard["name"], shard, manifest["tokenizer"])
            except ShardError as error:
                problems.append(str(error))
            progress.update(2 * shard["tokens"])
    print(f"{folder}: {len(manifest['shards'])} shards, {manifest['tokens']:,} tokens")
    print("\n".join(problems) or "  sizes, hashes, ids and separators are right")
    return 1 if problems else 0


def inspect(folder: Path, manifest: dict) -> int:
    """Prints a dataset: counts, lengths of documents, sources, and the first and last documents as text."""
    print(f"{folder}: {manifest['encoder']}, settings {manifest['settings']}")
    print(summary(manifest))
    tokenizer, count, lengths = dataset_tokenizer(folder) or load_tokenizer(), 0, []
    for shard in manifest["shards"]:
        tokens = open_tokens(folder / shard["name"])[:INSPECT_TOKENS]
        lengths.append(np.diff(np.flatnonzero(tokens == tokenizer.eot), append=len(tokens)) - 1)
        count += len(tokens)
        if count >= INSPECT_TOKENS:
            break
    percentiles = np.percentile(np.concatenate(lengths), (0, 5, 25, 50, 75, 95, 100)).astype(int)
    print(f"  tokens per document, of the first {count:,} tokens: " + ", ".join(f"{p:,}" for p in percentiles))
    print("    (minimum, 5%, 25%, median, 75%, 95%, maximum)")
    for source in manifest["sources"][:20]:
        print(f"  {source['bytes']:>15,} bytes  {source['path']}")
    print(f"  {len(manifest['sources']):,} sources")
    train = [shard for shard in manifest["shards"] if shard["split"] == "train"] or manifest["shards"]
    first, last = (open_tokens(folder / shard["name"]) for shard in (train[0], train[-1]))
    for which, tokens, shown in (("first", first[:10_000], slice(3)), ("last", last[-10_000:], slice(-3, None))):
        documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))[1:] or [tokens]
        for document in documents[shown]:
            text = tokenizer.decode(document[document != tokenizer.eot])
            print(f"--- {which}: {textwrap.shorten(text, 400)}")
    return 0


# ---- the command ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    config = load_config(PrepareConfig, argv)
    folder = Path(config.data_dir) / (config.dataset or "quickstart")
    if config.verify or config.inspect:
        manifest = read_finished(folder)
        if manifest is None:
            unfinished = "run prepare.py again to finish it" if read_plan(folder) else other_datasets(folder)
            raise PrepareError(f"{folder}: no finished dataset; {unfinished}")
        code = inspect(folder, manifest) if config.inspect else verify(folder, manifest)
    else:
        try:
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
