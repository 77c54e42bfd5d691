"""One unit of work of prepare.py: a range of rows of one file, or a few small files, in; its shards and record out.

    record = prepare_unit(job, job_tokenizer(job, "tiktoken"), report=lambda text_bytes, tokens: None)

`work` is what a worker process runs. The one thing to know: this module needs the package onecard alone, no script and
no torch, so a worker on another machine needs no clone. What a unit writes depends on its job alone; its record is
written last and means that the unit is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onecard.rows import cut_text, read_texts
from onecard.shards import MANIFEST, ShardError, ShardWriter, layout, read_json, write_json
from onecard.sources import STATE, DamagedError
from onecard.tokenizer import Tokenizer, TokenizerError, check_round_trip, from_state, replace_surrogates


def make_job(plan: dict, number: int, limit: int, folder: str | Path) -> dict:
    """All that a worker must know of a unit of this plan (the content of plan.json), as plain data."""
    unit = plan["units"][number]
    sources = plan["sources"][unit["source"] : unit["source"] + unit.get("files", 1)]
    job = {"number": number, "limit": limit, "folder": str(folder), "unit": unit}
    return plan["settings"] | job | {"paths": [source["path"] for source in sources]}


def job_tokenizer(settings: dict, folder: str | Path, encoder: str = "tiktoken") -> Tokenizer:
    """The tokenizer of a plan's settings, or of a job, of the dataset in this folder. Raises TokenizerError."""
    return from_state(settings.get("tokenizer"), encoder, folder)


def prepare_unit(job: dict, tokenizer: Tokenizer, report: Callable[[int, int], object]) -> dict:
    """Reads, encodes and writes one unit. Returns its record, which is on disk by then.

    job["limit"]: stop after the row group in which this many tokens are reached (0: no limit). report(bytes of text,
    tokens) is called after each batch of rows. Raises DamagedError if the source cannot be read or encoded,
    ShardError if a file cannot be written.
    """
    folder, number, limit = Path(job["folder"]), job["number"], job["limit"]
    if unit_record(folder, number).exists():  # the unit is done a second time: until then the dataset is incomplete
        (folder / MANIFEST).unlink(missing_ok=True)
        unit_record(folder, number).unlink()
    record = {"unit": number, **job["unit"], "limit": limit, "complete": True, "encoder": tokenizer.encoder}
    record |= new_record()
    writers: dict[str, ShardWriter] = {}  # by split; a split without documents gets no shard
    entries: dict[str, dict] = {}  # by split: what the record says of its shard
    with contextlib.ExitStack() as stack:
        for path, positions, values in read_unit(job, record["skipped"]):
            documents = as_documents(path, positions, values, job, record)
            encoded = encode_documents(documents, tokenizer)
            for document, ids in zip(documents, encoded, strict=True):
                split = document.split
                if split not in writers:
                    name = f"{split}_{number:06d}.bin"
                    writers[split] = stack.enter_context(ShardWriter(folder / name))
                    entries[split] = {"name": name, "split": split, "documents": 0, "text_bytes": 0}
                writers[split].write(ids)
                entries[split]["documents"] += 1
                entries[split]["text_bytes"] += document.size
            tokens = sum(map(len, encoded))
            record["documents"] += len(documents)
            record["tokens"] += tokens
            report(sum(document.size for document in documents), tokens)
            if limit and record["tokens"] >= limit:
                stop, record["complete"] = positions[-1] + 1, False
                for place, end in (("rows", stop), ("range", stop)):
                    if place in record:
                        record[place] = [record[place][0], end]
                break
    for split in sorted(writers):
        writer = writers[split]
        record["shards"].append(entries[split] | {"tokens": writer.tokens, "sha256": writer.sha256})
    write_json(unit_record(folder, number), record)
    return record


def new_record() -> dict:
    """The counts of a unit before its first row."""
    return {"documents": 0, "tokens": 0, "replaced": 0, "skipped": {"null": 0, "empty": 0}, "shards": []}


def read_unit(job: dict, skipped: dict) -> Iterator[tuple[str, Sequence[int], list]]:
    """The rows of the files of a unit in batches: (path, positions, values)."""
    for path in job["paths"]:
        for batch in read_texts(path, job["unit"], job, skipped):
            yield path, *batch


class Document(NamedTuple):
    place: str  # for messages: file and row
    text: str
    size: int  # bytes of UTF-8
    split: str  # "train" or "val"


def as_documents(path: str, positions: Sequence[int], values: list, job: dict, record: dict) -> list[Document]:
    """The documents of a batch of rows. Counts skipped rows and replaced characters in the record.

    Raises DamagedError for a row that is not UTF-8.
    """
    documents = []
    for position, value in zip(positions, values, strict=True):
        if not value:
            record["skipped"]["null" if value is None else "empty"] += 1
            continue
        place = f"{path}: row {position:,}" if "rows" in job["unit"] else f"{path}: the text at byte {position:,}"
        try:
            text, content, replaced = decode(value)
        except UnicodeDecodeError as error:
            raise DamagedError(f"{place} is not UTF-8 ({error.reason}); remove it") from error
        record["replaced"] += replaced
        documents += [Document(place, *part) for part in split_text(text, content, job)]
    return documents


def decode(value: bytes | str) -> tuple[str, bytes, int]:
    """(text, its UTF-8 bytes, number of lone surrogates that became U+FFFD). Raises UnicodeDecodeError."""
    text = value if isinstance(value, str) else value.decode("utf-8", "surrogatepass")
    text, replaced = replace_surrogates(text)
    return text, text.encode(), replaced


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """The tokens of each text, uint16 (n,): `<|endoftext|>` first, then the text's ordinary ids."""
    parts = [tokenizer.pieces(text) for text in texts]
    encoded = iter(tokenizer.encode_pieces([piece for part in parts for piece in part]))
    separator = np.array([tokenizer.eot], dtype=np.uint16)
    return [np.concatenate([separator, *(next(encoded) for _ in part)]) for part in parts]


def encode_documents(documents: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The tokens of each document, as encode_texts gives them. Raises DamagedError if its ids do not keep the text."""
    try:
        encoded = encode_texts(tokenizer, [document.text for document in documents])
    except TokenizerError as error:
        raise DamagedError(f"{documents[0].place} or one after it: {error}") from error
    if not tokenizer.lossless:
        for document, ids in zip(documents, encoded, strict=True):
            if tokenizer.decode(ids[1:]) != document.text:
                try:
                    check_round_trip(tokenizer, [document.text])
                except TokenizerError as error:
                    raise DamagedError(f"{document.place}: {error}") from error
    return encoded


# ---- train and val -----------------------------------------------------------------------------------------


def in_val(content: bytes, val_fraction: float, split_seed: int = 0) -> bool:
    """Whether a document is in the val split: by a hash of its text, so that duplicates are in the same split."""
    drawn = hashlib.blake2b(content, digest_size=8, salt=split_seed.to_bytes(8, "little")).digest()
    return int.from_bytes(drawn, "little") < val_fraction * 2**64


def split_text(text: str, content: bytes, settings: dict) -> Iterator[tuple[str, int, str]]:
    """The documents of a row: (text, bytes, split). The row is one document, or it is split by paragraphs.

    Then a hash decides for each group of paragraphs, and groups that follow each other in one split are one document.
    """
    rule = settings["val_fraction"], settings.get("split_seed", 0)
    if "paragraph_chars" not in settings:
        yield text, len(content), "val" if in_val(content, *rule) else "train"
        return
    groups = cut_text(text, settings["paragraph_chars"])
    for chosen, run in itertools.groupby(groups, key=lambda group: in_val(group.encode(), *rule)):
        part = "".join(run)
        yield part, len(part.encode()), "val" if chosen else "train"


def unit_record(folder: Path, number: int) -> Path:
    return folder / STATE / f"unit_{number:06d}.json"


def read_record(folder: Path, number: int, unit: dict) -> dict | None:
    """The record of a unit that is done, or None. Raises ShardError if it or a shard is not as it was written."""
    record = read_json(unit_record(folder, number), record_fits, "nothing to do")
    if record and any(record.get(name) != unit.get(name) for name in ("source", "bytes", "files")):
        raise ShardError("files were added to it")
    for shard in record["shards"] if record else ():
        if layout(folder / shard["name"])[1] != shard["tokens"]:
            raise ShardError(f"{folder / shard['name']}: not the size that was written")
    return record


def record_fits(record):
    sums = {name: sum(shard[name] for shard in record["shards"]) for name in ("documents", "tokens")}
    numbers = [record[name] for name in ("source", "bytes", "limit", "complete", "replaced", "documents", "tokens")]
    numbers += [record["skipped"]["null"], record["skipped"]["empty"]]
    texts = [record["encoder"], *(shard["name"] for shard in record["shards"])]
    return sums.items() <= record.items() and min(numbers) >= 0 and min(texts) > ""


def work(connection: Connection, encoder: str, threads: int) -> None:
    """A worker process: takes jobs from the connection, sends (progress | done | failed | stop, content)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends the workers
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by fastokens and tokenizers
    tokenizer = None
    with contextlib.suppress(EOFError, ConnectionError):  # the main process is gone; temporary files are removed
        while True:
            job = connection.recv()
            try:
                tokenizer = tokenizer or job_tokenizer(job, job["folder"], encoder)
                record = prepare_unit(job, tokenizer, lambda *counts: connection.send(("progress", counts)))
                connection.send(("done", record))
            except (ShardError, TokenizerError) as error:
                connection.send(("stop", str(error)))
            except DamagedError as error:
                connection.send(("failed", str(error)))
