"""What a dataset is to be made of: its settings, its tokenizer, its split into train and val, its files and units.

    plan, damaged, content = plan_dataset(["my.txt", "notes/"], {"tokenizer": "bytes"}, Path("data/mine"))

records.write_plan writes the plan to .prepare/plan.json. The one thing to know: planning writes nothing and depends on
the inputs alone, so each mistake is reported before any work.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from onecard.documents import cut_text
from onecard.durable import sha256_of
from onecard.records import PrepareError, Progress, read_plan
from onecard.remote import DamagedError, SourceError, open_file, reading
from onecard.rows import kind_of
from onecard.shards import other_datasets
from onecard.sources import examine, find_files
from onecard.tokenizer import (
    FILE,
    Tokenizer,
    TokenizerError,
    check_round_trip,
    load_tokenizer,
    open_json,
    replace_surrogates,
)
from onecard.tokenizer import train_tokenizer as train_bpe
from onecard.units import first_texts, in_val, make_job, new_record, read_documents, read_unit
from onecard.where import parse_where

SETTINGS = {"text_column": "text", "val_fraction": 0.005, "shard_tokens": 100_000_000}  # of a dataset, with defaults
RARE_SETTINGS = {"where": "", "skip_bad_rows": False}  # in a plan only if they were given
OWN_TOKENIZER, OWN_TEXT_BYTES = "gpt2-1024", 10_000_000  # the default for less text of files of text
SAMPLE_BYTES, SAMPLE_UNITS = 100_000_000, 100  # what a tokenizer is trained on, at most
SMALL_BYTES, SMALL_ROWS = 100_000_000, 2000  # a dataset below both is read before it is split into train and val
LEAST_BYTES = 10_000  # of text in a dataset
USUAL_VAL_BYTES, LEAST_VAL_BYTES = 500_000, 2500  # in val, of a small dataset, unless val_fraction is given
ENOUGH_VAL_BYTES = 20_000  # in val, if that is less than half of its share because a few documents are long
FEW_DOCUMENTS = 5  # expected in val; with fewer the documents are split by paragraphs (of more text: twice as many)
PARAGRAPH_CHARS = 4000  # in a group of paragraphs, at most
SPLIT_SEEDS = 64  # tried, until val gets about its share
EXAMINERS = 8  # threads that read footers: most of the time is waiting for a hub; a footer takes about 40 MB


# ---- the plan ----------------------------------------------------------------------------------------------


def plan_dataset(inputs: Sequence[str], asked: dict, folder: Path) -> tuple[dict, list[str], str]:
    """(plan, problems of damaged files, which are left out; the text of a tokenizer.json to keep, or "").

    Writes nothing. asked: the settings that the user gave: those of SETTINGS and RARE_SETTINGS, tokenizer (gpt2, bytes
    or a path) and train_tokenizer (how many ids). The others are those of the dataset, or the defaults. Raises a
    UserError for what cannot be used.
    """
    plan, tokenizer = read_plan(folder), load_tokenizer(asked["tokenizer"]) if "tokenizer" in asked else None
    if tokenizer and tokenizer.eot is None:
        raise TokenizerError(f"{asked['tokenizer']}: has no document separator; use a tokenizer.json, gpt2 or bytes")
    if plan:
        check_settings(plan["settings"], asked, tokenizer, folder)
        found, damaged = examine_all(inputs, plan["settings"], plan["sources"])
        return add_sources(plan, found, folder), damaged, (tokenizer and tokenizer.content) or ""
    if not inputs:
        raise PrepareError(f"{folder}: nothing is prepared here yet; {other_datasets(folder)}")
    settings, content = {name: asked.get(name, default) for name, default in SETTINGS.items()}, ""
    settings |= {name: asked[name] for name, default in RARE_SETTINGS.items() if asked.get(name, default) != default}
    if tokenizer and tokenizer.kind != "gpt2":
        settings["tokenizer"], content = split_state(tokenizer)
    if n_vocab := asked.get("train_tokenizer", 0):
        settings["train_tokenizer"] = n_vocab
    found, damaged = examine_all(inputs, settings, [])
    plan = add_sources({"sources": [], "units": [], "settings": settings}, found, folder)
    if settings["val_fraction"]:
        settings |= choose_split(plan, folder, asked.get("val_fraction"))
    if not tokenizer and not n_vocab and is_own_text(plan):
        settings["tokenizer"], content = split_state(load_tokenizer(OWN_TOKENIZER))
        print(f"  little text: tokenizer {OWN_TOKENIZER}, for a small network (to finetune GPT-2 use --tokenizer=gpt2)")
    if tokenizer and not tokenizer.lossless:
        check_round_trip(tokenizer, first_texts(make_job(plan, 0, folder)))
    if n_vocab:
        settings["tokenizer"], content = split_state(train_on_sample(plan, n_vocab, folder))
    return plan, damaged, content


def split_state(tokenizer: Tokenizer) -> tuple[dict, str]:
    """(a tokenizer's entry in settings and manifest, the text of its tokenizer.json, which is a file of its own)."""
    state = tokenizer.state()
    content = state.pop("content", "")
    return state | ({"file": FILE} if content else {}), content


def check_settings(known: dict, asked: dict, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Raises PrepareError if the dataset was started with other settings than are asked for."""
    known = RARE_SETTINGS | known
    pairs = [(name, known[name], asked[name]) for name in (*SETTINGS, *RARE_SETTINGS) if name in asked]
    state = known.get("tokenizer") or load_tokenizer().state()
    here = f"{state['name']} ({state['sha256'][:8]})"
    if tokenizer and tokenizer.sha256 != state["sha256"]:
        pairs.append(("tokenizer", here, f"{tokenizer.name} ({tokenizer.sha256[:8]})"))
    if n_vocab := asked.get("train_tokenizer"):
        pairs.append(("train_tokenizer", known.get("train_tokenizer", here), n_vocab))
    problems = [
        f"{name}: {folder} was started with {value}, not {other}; leave out --{name}, or use another --dataset"
        for name, value, other in pairs
        if value != other
    ]
    if problems:
        raise PrepareError("\n".join(problems))


def bytes_per_token(settings: dict) -> float:
    """Of English text, about: 4.67 with GPT-2's 50,257 ids (on FineWeb), 1 with bytes; the logarithm between."""
    ids = settings.get("train_tokenizer") or (settings.get("tokenizer") or {}).get("n_vocab", 50257)
    return 1 + 3.67 * math.log(ids / 257) / math.log(50257 / 257)


def examine_all(inputs: Sequence[str], settings: dict, known: Sequence[dict]) -> tuple[list[tuple], list[str]]:
    """([(source, its units)], problems of damaged files, which are left out). Raises PrepareError for all others.

    known: the sources that are in the plan.
    """
    found: dict[str, tuple] = {}  # by the id of the source
    parse_where(settings.get("where", ""))  # a mistake in it is reported once
    damaged, problems, paths = [], [], find_files(inputs)
    first, ids = {source["id"]: source["path"] for source in known}, {source["path"]: source["id"] for source in known}
    for path, result in examine_in_threads(paths, settings):
        if isinstance(result, DamagedError):
            damaged.append(str(result))
        elif isinstance(result, SourceError) and (path in inputs or kind_of(path) == "parquet"):
            problems.append(str(result))
        elif isinstance(result, SourceError):  # a folder of notes may hold .json files of other programs
            print(f"  left out: {result}")
        elif not result[1]:
            print(f"  left out: {path}: has no rows")
        else:
            source, units = result
            source["id"] = own_id(source, first, ids)
            if source["id"] in found:
                print(f"  {path}: the same as {found[source['id']][0]['path']}; taken once")
            found.setdefault(source["id"], (source, units))
    if problems or (damaged and not found):
        raise PrepareError("\n".join(problems + damaged))
    return list(found.values()), damaged


def examine_in_threads(paths: list[str], settings: dict) -> Iterator[tuple[str, Any]]:
    """(path, what sources.examine returns or raises) of each file, in order."""
    shard_bytes = settings["shard_tokens"] * bytes_per_token(settings)

    def look(path):
        try:
            return examine(path, settings, shard_bytes)
        except SourceError as error:
            return error

    # Not a ThreadPoolExecutor, whose end waits for each thread: one that repeats a request would delay Ctrl-C.
    with ThreadPool(EXAMINERS) as threads, Progress(len(paths), "examined", " files") as progress:
        for path, result in zip(paths, threads.imap(look, paths), strict=True):
            progress.update(1)
            yield path, result


def own_id(source: dict, first: dict[str, str], ids: dict[str, str]) -> str:
    """The id of a source. A parquet file with the footer of another one, but other rows, gets a hash of all its bytes.

    first: {id: the first file with it}, which is added to; ids: {path: id} of the files in the plan.
    """
    path, id = source["path"], source["id"]
    other, known = first.setdefault(id, path), ids.get(path, id)
    if (path == other and known == id) or kind_of(path) != "parquet":
        return id
    whole = whole_id(source, path) or id
    differs = path != other and whole_id(source, other) not in (whole, None)  # None: the other file has moved here
    return whole if known == whole or differs else id


def whole_id(source: dict, path: str) -> str | None:
    with contextlib.suppress(DamagedError), reading(path), open_file(path) as file:
        return f"{source['bytes']:x}-{sha256_of(file)}"
    return None


def add_sources(plan: dict, found: list[tuple[dict, list]], folder: Path) -> dict:
    """The plan with the new sources and their units at its end. Raises PrepareError for a file that has changed.

    A unit's number never changes. Small files join the last unit if that is of small files: it is prepared again.
    """
    problems, shard_bytes = [], plan["settings"]["shard_tokens"] * bytes_per_token(plan["settings"])
    by_id = {source["id"]: source for source in plan["sources"]}
    paths = {source["path"] for source in plan["sources"]}
    for source, units in found:
        last = plan["units"][-1] if plan["units"] else {}
        if source["id"] in by_id:
            by_id[source["id"]]["path"] = source["path"]  # the file may have moved
        elif source["path"] in paths:
            remedy = f"use another --dataset, or delete {folder} to make it again"
            problems.append(f"{source['path']}: has changed since {folder} was started; {remedy}")
        elif "files" in units[0] and "files" in last and last["bytes"] + units[0]["bytes"] <= shard_bytes:
            plan["sources"].append(source)
            last["files"] += 1
            last["bytes"] += units[0]["bytes"]
        else:
            plan["units"] += [{"source": len(plan["sources"]), **unit} for unit in units]
            plan["sources"].append(source)
    if not plan["units"]:
        problems.append(f"{folder}: nothing to prepare; name files that have rows")
    if problems:
        raise PrepareError("\n".join(problems))
    return plan


def is_own_text(plan: dict) -> bool:
    """Whether it is a few MB of .txt, .md or .json: text for a small network, and so for a small vocabulary."""
    kinds = {kind_of(source["path"]) for source in plan["sources"]}
    return kinds <= {"txt", "md", "json"} and sum(unit["bytes"] for unit in plan["units"]) < OWN_TEXT_BYTES


# ---- train and val -----------------------------------------------------------------------------------------


def choose_split(plan: dict, folder: Path, asked: float | None) -> dict:
    """The settings of the split: val_fraction, and with few documents how they are split by paragraphs.

    asked: the val_fraction that was asked for. A small dataset is read, of a large one the documents are estimated.
    """
    size, rows = sum(unit["bytes"] for unit in plan["units"]), sum(source.get("rows", 0) for source in plan["sources"])
    if size < SMALL_BYTES and rows < SMALL_ROWS:
        return split_small([make_job(plan, number, folder) for number in range(len(plan["units"]))], asked)
    fraction, documents = SETTINGS["val_fraction"] if asked is None else asked, count_documents(plan, folder)
    if fraction * documents >= 2 * FEW_DOCUMENTS:
        return {"val_fraction": fraction}
    return by_paragraphs(documents, max(fraction, 2 * FEW_DOCUMENTS * PARAGRAPH_CHARS / size), PARAGRAPH_CHARS, 0)


def count_documents(plan: dict, folder: Path) -> int:
    """How many documents there are: the rows of parquet files; of text files about, by the size of some documents."""
    numbers = [number for number, unit in enumerate(plan["units"]) if "rows" not in unit]
    documents, chars = 0, 1
    for number in numbers[:: math.ceil(len(numbers) / SAMPLE_UNITS) or 1]:
        texts = first_texts(make_job(plan, number, folder))
        documents, chars = documents + len(texts), chars + sum(map(len, texts))
    text_bytes = sum(plan["units"][number]["bytes"] for number in numbers)
    return sum(source.get("rows", 0) for source in plan["sources"]) + round(documents * text_bytes / chars)


def by_paragraphs(documents: int, fraction: float, chars: int, seed: int) -> dict:
    print(f"  few documents ({documents}): split by paragraphs, about {fraction:.1%} of the text is val")
    return {"val_fraction": fraction, "paragraph_chars": chars, "split_seed": seed}


def split_small(jobs: list[dict], val_fraction: float | None) -> dict:
    """The split of a small dataset. Of the seeds of the hash the first is taken with which val gets about its share.

    val_fraction: what was asked for; None: a tenth, less of more than 5 MB, more of less than 25 KB. Raises
    PrepareError if there is too little text.
    """
    problems: list[str] = []  # of files that cannot be read to their end
    contents = [content for job in jobs for content in readable(job, problems)]
    total = sum(map(len, contents))
    if not total or (total < LEAST_BYTES and val_fraction is None):
        files = sum(len(job["paths"]) for job in jobs)
        others = f" and {files - 1} more" * (files > 1)
        need = f"{total:,} bytes of text; at least {LEAST_BYTES:,} are needed, better 1,000,000"
        raise PrepareError("\n".join([*problems[:1], f"{jobs[0]['paths'][0]}{others}: {need}"]))
    usual = round(max(0.005, min(0.1, USUAL_VAL_BYTES / total), min(0.25, LEAST_VAL_BYTES / total)), 4)
    asked = usual if val_fraction is None else val_fraction
    enough = min(asked / 2, ENOUGH_VAL_BYTES / total)
    if len(contents) * asked >= FEW_DOCUMENTS and enough <= val_share(contents, asked, 0) <= 0.9:
        return {"val_fraction": asked}
    chars = min(PARAGRAPH_CHARS, max(1000, total // 200))
    groups = [group.encode() for content in contents for group in cut_text(content.decode(), chars)]
    for fraction in (asked, usual):  # what was asked for may be less than one group
        for seed in range(SPLIT_SEEDS):
            if fraction / 2 <= val_share(groups, fraction, seed) <= min(2 * fraction, 0.9):
                return by_paragraphs(len(contents), fraction, chars, seed)
    raise PrepareError(
        f"{jobs[0]['paths'][0]}: too few different paragraphs to split {total:,} bytes of text into train and val "
        f"({len(set(groups)):,} of about {chars:,} characters); add other text"
    )


def readable(job: dict, problems: list[str]) -> Iterator[bytes]:
    """The UTF-8 bytes of each row of a unit, up to one that cannot be read: the unit itself reports that."""
    try:
        for _, _, values in read_unit(job, {}):
            for value in filter(None, values):
                yield replace_surrogates(value)[0].encode()
    except DamagedError as error:
        problems.append(str(error))


def val_share(contents: list[bytes], val_fraction: float, seed: int) -> float:
    """The share of the bytes that the hash puts into val."""
    val = sum(len(content) for content in contents if in_val(content, val_fraction, seed))
    return val / sum(map(len, contents))


# ---- the tokenizer -----------------------------------------------------------------------------------------


def train_on_sample(plan: dict, n_vocab: int, folder: Path) -> Tokenizer:
    """A tokenizer of the inputs, the same from the same plan.

    It is trained on the train split of at most SAMPLE_UNITS units, evenly spaced, and of each on the texts at its
    beginning, in all about SAMPLE_BYTES.
    """
    units, started = plan["units"], time.monotonic()
    numbers = range(0, len(units), math.ceil(len(units) / SAMPLE_UNITS))
    size, total = sum(units[number]["bytes"] for number in numbers), sum(unit["bytes"] for unit in units)
    share = SAMPLE_BYTES / size if size > SAMPLE_BYTES else math.inf
    with Progress(min(size, SAMPLE_BYTES), "tokenizer: read") as progress:
        texts = (text for number in numbers for text in sample(make_job(plan, number, folder), share, progress))
        tokenizer = open_json(train_bpe(texts, n_vocab).encode(), folder / FILE, folder.name)
    few = "" if tokenizer.n_vocab == n_vocab else f" (no more pairs occur twice, so not {n_vocab:,})"
    read, seconds = f"{progress.done / 1e6:,.1f} of {total / 1e6:,.1f} MB of text", time.monotonic() - started
    print(f"  tokenizer: {tokenizer.n_vocab:,} ids{few}, trained in {seconds:.0f} s on {read}")
    return tokenizer


def sample(job: dict, share: float, progress: Progress) -> Iterator[str]:
    """The train split's texts at the beginning of a unit, until this share of its bytes is read."""
    taken = 0
    with contextlib.suppress(DamagedError):  # the unit itself reports it
        for documents in read_documents(job, new_record()):
            yield from (document.text for document in documents if document.split == "train")
            size = sum(document.size for document in documents)
            progress.update(size)
            taken += size
            if taken >= share * job["unit"]["bytes"]:
                return
