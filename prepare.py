"""Text to tokens: parquet, .jsonl, .json, .txt or .md files in, shards and a manifest in data/<dataset> out.

    python prepare.py                                        (data/quickstart, from text that is part of Python)
    python prepare.py my.txt notes/ --dataset=mine           (your own text)
    python prepare.py fineweb/*.parquet --dataset=fineweb    (python prepare.py --help lists every key)

It never needs torch. The one thing to know: a unit is one range of rows of one file, or a few small files. It writes
its own files and then gets its record, so a run that was stopped continues with the units that have no record, and the
bytes are the same with any number of workers. The manifest is written last and makes the dataset complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from configurator import key, load_config, run_script, sources_of
from onecard import dataset, durable, records, workers
from onecard.jsonfiles import ShardError
from onecard.records import STATE, PrepareError, Progress, amount, read_plan
from onecard.remote import DamagedError
from onecard.shards import MANIFEST, check_shard, keys_of, open_tokens, other_datasets, read_manifest, write_manifest
from onecard.tokenizer import GPT2Tokenizer, TokenizerError, check_parity, dataset_tokenizer, load_tokenizer
from onecard.units import encode_texts, first_texts, job_tokenizer, make_job

MANIFEST_KEYS = {"tokenizer", "encoder", "libraries", "settings", *records.COUNTS, "failed", "sources", "shards"}
INSPECT_TOKENS = 50_000_000  # read by --inspect
FAST_BYTES = 10_000_000  # of text; checking fastokens takes longer than encoding less
SMALL_RUN_BYTES = 50_000_000  # config/own_text.py is for less text than this
UNITS_OF_MAX_TOKENS = 50  # that a new dataset with max_tokens is cut into
QUEUED = 2  # units that are submitted in addition to those that can run at once
LINES = 5  # of problems that are printed one by one
REASONS = {"null": "without text", "where": "by --where"}  # why rows are left out; the others are shown as they are
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
    max_tokens: int = key(0, "stop with the unit that reaches this many tokens (0: take all)", low=0)
    where: str = key("", "take the rows with ... only: 'language_score > 0.9 and token_count > 50'")
    skip_bad_rows: bool = key(False, "leave out rows that cannot be read, and count them")
    workers: int = key(0, "worker processes (0: one per core)", low=0)
    encoder: str = key("auto", "auto: fastokens for 10 MB or more", choices=("auto", "tiktoken", "fastokens"))
    cluster: str = key("", "tcp://host:8786: the units are prepared by the workers of this Dask scheduler")
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
        if self.cluster and "workers" in sources_of(self):
            found.append("workers: the cluster has its own; leave out --workers")
        return found


# ---- the units ---------------------------------------------------------------------------------------------


def asked_settings(config: PrepareConfig, folder: Path) -> dict:
    """The settings of a dataset that the user has given. The others are those of the dataset, or the defaults."""
    names = (*dataset.SETTINGS, *dataset.RARE_SETTINGS, "tokenizer", "train_tokenizer")
    asked = {name: getattr(config, name) for name in names if name in sources_of(config)}
    if records.stamp(folder):
        return asked
    if config.max_tokens:
        asked.setdefault("shard_tokens", min(max(config.max_tokens // UNITS_OF_MAX_TOKENS, 200_000), 100_000_000))
    return (QUICKSTART if folder.name == "quickstart" else {}) | asked


def inputs_of(config: PrepareConfig, folder: Path) -> tuple[str, ...]:
    """The inputs; without any the file of the quickstart, which is made if it is missing."""
    if config.inputs or folder.name != "quickstart":
        return config.inputs
    path = folder / "quickstart.parquet"
    if not path.exists():
        from onecard.quickstart import write_quickstart

        write_quickstart(path)
    return (str(path),)


def read_done(plan: dict, config: PrepareConfig, folder: Path) -> dict[int, dict]:
    """{unit: record} of the units that are done. Prints why others have to be prepared again."""
    done, problems = records.read_records(plan, folder)
    for line in problems[:LINES] + [f"and {len(problems) - LINES:,} more like these"] * (len(problems) > LINES):
        print(f"  {line}")
    if problems:
        records.write_records(done.values(), folder)
    tokens = 0
    for number, record in sorted(done.items()):
        tokens += record["tokens"]
        if not record.get("complete", True) and not 0 < config.max_tokens <= tokens:
            del done[number]  # an older version cut this unit at another max_tokens
    return done


def run_units(plan: dict, done: dict, config: PrepareConfig, folder: Path, encoder: str, size: float, ratio: float):
    """Prepares the units that have no record, in order, and adds theirs to `done`. Returns {unit: why it failed}.

    size: bytes of text to read, about; ratio: bytes per token. With max_tokens a unit is started only while all before
    it are expected to have fewer tokens. Raises ShardError if a file cannot be written.
    """
    failed: dict[int, str] = {}
    running: dict[Future, tuple[int, float]] = {}  # unit, and the tokens that are expected of it
    units, number, tokens = plan["units"], 0, 0.0  # tokens: of the units before `number`; estimated while they run
    most = min(config.workers or workers.cores(), len(units) - len(done))
    pool = workers.cluster(config.cluster, encoder, folder) if config.cluster else workers.processes(most, encoder)
    with pool as (submit, count), Progress(size, "prepared") as progress:
        while True:
            while number < len(units) and len(running) < count() + QUEUED and not 0 < config.max_tokens <= tokens:
                if number in done:
                    tokens += done[number]["tokens"]
                else:
                    expected = units[number]["bytes"] / ratio
                    running[submit(make_job(plan, number, folder))] = number, expected
                    tokens += expected
                number += 1
            if not running:
                return failed
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                ended, expected = running.pop(future)
                tokens -= expected
                try:
                    record = done[ended] = future.result()
                except DamagedError as error:
                    failed[ended] = str(error)
                    progress.bar.write(f"  failed: {error}", file=sys.stderr)
                else:
                    records.append_record(record, folder)
                    tokens += record["tokens"]
                    progress.update(units[ended]["bytes"], record["tokens"])
                    ratio = progress.done / max(1, progress.tokens)  # as measured, --where included
            progress.update()


def remove_leftovers(folder: Path) -> None:
    """Removes unfinished files. A worker of a killed run cannot rename a file that was removed."""
    durable.remove_leftovers(folder)
    durable.remove_leftovers(folder / STATE)


# ---- the dataset -------------------------------------------------------------------------------------------


def prepare(config: PrepareConfig, folder: Path) -> int:
    """Plans, prepares what is missing, and completes the dataset. Returns the exit code."""
    started, before = time.monotonic(), records.stamp(folder)
    plan, damaged, content = dataset.plan_dataset(inputs_of(config, folder), asked_settings(config, folder), folder)
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    with durable.owned(folder / STATE / "all.lock", str(folder)):
        records.write_plan(plan, content, before, folder)
        remove_leftovers(folder)
        for problem in damaged:
            print(f"  left out: {problem}", file=sys.stderr)
        known, done = read_finished(folder), read_done(plan, config, folder)
        if known and 0 < config.max_tokens < min(known["tokens"], known["settings"].get("max_tokens") or math.inf):
            raise PrepareError(f"max_tokens: {folder} has {known['tokens']:,} tokens already; use another --dataset")
        try:
            failed = prepare_missing(plan, done, known, config, folder)
        finally:
            remove_leftovers(folder)
        finish(plan, done, config, folder, failed, time.monotonic() - started)
    return 1 if failed or damaged else 0


def prepare_missing(plan: dict, done: dict, known: dict | None, config: PrepareConfig, folder: Path) -> dict:
    """Prints and does what is missing; known: the manifest. Returns {unit: why it failed}. Raises PrepareError."""
    tokens, units = sum(record["tokens"] for record in done.values()), plan["units"]
    todo = [number for number in range(len(units)) if number not in done]
    if not todo or 0 < config.max_tokens <= tokens:
        return {}
    texts = first_texts(make_job(plan, todo[0], folder)) or ["some text"]
    tokenizer = job_tokenizer(plan["settings"], folder)
    ratio = sum(len(text.encode()) for text in texts) / sum(map(len, encode_texts(tokenizer, texts)))
    size = sum(units[number]["bytes"] for number in todo)  # of text to read, about
    if config.max_tokens and not config.where:
        size = min(size, int((config.max_tokens - tokens) * ratio))
    encoder = choose_encoder(config, plan["settings"], texts, size, folder)
    need, free = int(2 * size / ratio), shutil.disk_usage(folder).free
    print(f"{folder}: files: {len(plan['sources']):,}, units: {len(units):,}, done already: {len(done):,}")
    print(f"  to do: {amount(size)} of text, about {amount(need / 2, '')} tokens ({tokenizer.name}, by {encoder})")
    print(f"  disk:  {amount(need)} needed, {amount(free)} free")
    if need > free:
        raise PrepareError(f"{folder}: {need:,} bytes are needed and {free:,} are free; make room, or use --max_tokens")
    records.write_records(done.values(), folder)
    if known and records.units_of(known) & set(todo):  # until they are done again the dataset is incomplete
        (folder / MANIFEST).unlink()
    return run_units(plan, done, config, folder, encoder, size, ratio)


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


def finish(plan: dict, done: dict, config: PrepareConfig, folder: Path, failed: dict, seconds: float) -> None:
    """Joins the val parts, writes the manifest, unless all is there already, and prints what the dataset is."""
    kept, tokens = {}, 0
    for number, record in sorted(done.items()):
        if not 0 < config.max_tokens <= tokens:  # units that were started too early are left out
            kept[number] = record
            tokens += record["tokens"]
    if not any(record["shards"] for record in kept.values()):
        why = "; ".join(failed.values()) or "all rows are empty or left out"
        raise PrepareError(f"{folder}: no document was found; {why}")
    val, known = records.join_val(kept, plan["settings"]["shard_tokens"], folder), read_finished(folder)
    manifest = make_manifest(plan, kept, val, config, failed)
    hashes, known_hashes = ([(s["name"], s["sha256"]) for s in m["shards"]] for m in (manifest, known or manifest))
    if known and hashes == known_hashes and manifest["failed"] == known["failed"]:
        manifest["libraries"] = known["libraries"]  # the versions that made the shards
        print(f"{folder} is as before: the same units failed" if failed else f"{folder} is finished; nothing to do")
    else:
        print(f"{folder} is ready, in {seconds:.1f} s by {manifest['encoder']}")
    if config.max_tokens and tokens != config.max_tokens:
        why = f"units are whole, {tokens // len(kept):,} each" if tokens > config.max_tokens else "all that there are"
        print(f"  max_tokens: {config.max_tokens:,} asked, {tokens:,} taken ({why})")
    if manifest != known:  # a source may have moved
        write_manifest(folder, manifest)
        remove_others(manifest, kept, folder)
    print(summary(manifest))
    print(f"next: python train.py {next_config(manifest, folder)}")


def remove_others(manifest: dict, done: dict, folder: Path) -> None:
    """Removes the files of units that belong to the dataset no more."""
    files = [*manifest["shards"], *(part for record in done.values() for part in record["shards"])]
    names = {file["name"] for file in files}
    records.write_records(done.values(), folder)
    for path in [*folder.glob("*.bin"), *folder.glob(f"{STATE}/*.bin")]:
        if re.fullmatch(r"(train|val)_\d{6,}\.bin", path.name) and path.relative_to(folder).as_posix() not in names:
            path.unlink()


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


def make_manifest(plan: dict, done: dict, val: list[dict], config: PrepareConfig, failed: dict) -> dict:
    """done: the records, in order; val: the entries of the joined val shards."""
    settings, shards = dict(plan["settings"]), []
    tokenizer = settings.pop("tokenizer", None) or {
        name: getattr(GPT2Tokenizer, name) for name in ("name", "sha256", "n_vocab", "eot")
    }
    encoder = "tokenizers" if tokenizer.get("kind") == "bpe" else "tiktoken"
    libraries: dict[str, str | None] = dict.fromkeys(("numpy", "pyarrow", encoder, "fastokens"))
    for name in libraries:
        with contextlib.suppress(PackageNotFoundError):  # some are optional
            libraries[name] = version(name)
    for number, record in done.items():
        place = {name: record[name] for name in ("row_groups", "rows", "range", "files") if name in record}
        place["source"] = plan["sources"][record["source"]]["path"]
        shards += [(number, shard | place) for shard in record["shards"] if not shard["name"].startswith(STATE)]
    shards = sorted([*shards, *((entry["units"][0], entry) for entry in val)], key=lambda pair: pair[0])
    reasons = dict.fromkeys(reason for record in done.values() for reason in record["skipped"])
    return {
        "version": 1,
        "tokenizer": tokenizer,
        "encoder": " and ".join(sorted({record["encoder"] for record in done.values()})),
        "libraries": libraries | {"python": sys.version.split()[0]},
        "settings": settings | {"max_tokens": config.max_tokens},
        **{name: sum(record[name] for record in done.values()) for name in ("documents", "tokens", "replaced")},
        "skipped": {reason: sum(record["skipped"].get(reason, 0) for record in done.values()) for reason in reasons},
        "failed": [failed[number] for number in sorted(failed)],
        "sources": plan["sources"],
        "shards": [shard for _, shard in shards],
    }


def read_finished(folder: Path) -> dict | None:
    """The manifest of a finished dataset, or None. Raises ShardError if it is damaged, or not made by prepare.py."""
    manifest = read_manifest(folder)
    if manifest and (missing := MANIFEST_KEYS - manifest.keys()):
        raise ShardError(f"{folder / MANIFEST}: has no {', '.join(sorted(missing))}; delete it, run prepare.py again")
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
        lines.append("  no document is in val, which train.py needs: use another --dataset with --val_fraction=0.1")
    if skipped := [f"{REASONS.get(reason, reason)}: {n:,}" for reason, n in manifest["skipped"].items() if n]:
        lines.append(f"  rows left out: {', '.join(skipped)}")
    if manifest["replaced"]:
        lines.append(f"  lone surrogates, replaced by U+FFFD: {manifest['replaced']:,}")
    if manifest["failed"]:
        lines.append(f"  FAILED: {len(manifest['failed'])} units, the first because {manifest['failed'][0]}")
    return "\n".join(lines)


def verify(folder: Path, manifest: dict) -> int:
    """Checks every byte of every shard. Returns the exit code."""
    problems, plan = [], read_plan(folder)
    dataset_tokenizer(folder)  # its file is the one of the manifest
    if plan:
        problems += records.load_records(folder)[1]
        tokenizer = plan["settings"].get("tokenizer", manifest["tokenizer"])
        if tokenizer["sha256"] != manifest["tokenizer"]["sha256"]:
            problems.append(f"{folder / MANIFEST}: its tokenizer is not the one of {folder / STATE / records.PLAN}")
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


def inspect(folder: Path, manifest: dict) -> None:
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
            print(f"--- {which}: {textwrap.shorten(tokenizer.decode(document[document != tokenizer.eot]), 400)}")


# ---- the command ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    config = load_config(PrepareConfig, argv)
    folder = Path(config.data_dir) / (config.dataset or "quickstart")
    if config.verify or config.inspect:
        manifest = read_finished(folder)
        if manifest is None:
            unfinished = "run prepare.py again to finish it" if read_plan(folder) else other_datasets(folder)
            raise PrepareError(f"{folder}: no finished dataset; {unfinished}")
        if config.inspect:
            inspect(folder, manifest)
        code = verify(folder, manifest) if config.verify else 0
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the stop of a batch system does what Ctrl-C does
    run_script(main)
