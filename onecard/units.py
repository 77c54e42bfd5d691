"""One unit of work of prepare.py: a range of rows of one file, or a few small files, in; its shard and its record out.

    record = prepare_unit(job, job_tokenizer(job, job["folder"]))

This is what a worker runs. The one thing to know: it needs the package onecard alone, no script and no torch. What a
unit writes depends on its job alone. It is done when prepare.py has written its record to .prepare/records.jsonl.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onecard.documents import cut_text
from onecard.records import STATE
from onecard.remote import DamagedError
from onecard.rows import read_texts
from onecard.shards import ShardWriter
from onecard.tokenizer import Tokenizer, TokenizerError, check_round_trip, from_state, replace_surrogates


def make_job(plan: dict, number: int, folder: str | Path) -> dict:
    """All that a worker must know of a unit of this plan (the content of plan.json), as plain data."""
    unit = plan["units"][number]
    sources = plan["sources"][unit["source"] : unit["source"] + unit.get("files", 1)]
    job = {"number": number, "folder": str(folder), "unit": unit, "paths": [source["path"] for source in sources]}
    return plan["settings"] | job


def job_tokenizer(settings: dict, folder: str | Path, encoder: str = "tiktoken") -> Tokenizer:
    """The tokenizer of a plan's settings, or of a job, of the dataset in this folder. Raises TokenizerError."""
    return from_state(settings.get("tokenizer"), encoder, folder)


def prepare_unit(job: dict, tokenizer: Tokenizer) -> dict:
    """Reads, encodes and writes one unit. Returns its record, when its files are on disk.

    Train documents become a shard of the dataset, train_000123.bin. Val documents become a part of a shard,
    .prepare/val_000123.bin. Raises DamagedError if the source cannot be read or encoded, ShardError if a file cannot
    be written.
    """
    folder, number = Path(job["folder"]), job["number"]
    names = {"train": f"train_{number:06d}.bin", "val": f"{STATE}/val_{number:06d}.bin"}
    record = {"unit": number, **job["unit"], "encoder": tokenizer.encoder, **new_record()}
    writers: dict[str, ShardWriter] = {}  # by split; a split without documents gets no file
    entries: dict[str, dict] = {}  # by split: what the record says of its file
    with contextlib.ExitStack() as stack:
        for documents in read_documents(job, record):
            encoded = encode_documents(documents, tokenizer)
            for document, ids in zip(documents, encoded, strict=True):
                split = document.split
                if split not in writers:
                    writers[split] = stack.enter_context(ShardWriter(folder / names[split]))
                    entries[split] = {"name": names[split], "split": split, "documents": 0, "text_bytes": 0}
                writers[split].write(ids)
                entries[split]["documents"] += 1
                entries[split]["text_bytes"] += document.size
            record["documents"] += len(documents)
            record["tokens"] += sum(map(len, encoded))
    for split in sorted(writers):
        writer = writers[split]
        record["shards"].append(entries[split] | {"tokens": writer.tokens, "sha256": writer.sha256})
    return record


def new_record() -> dict:
    """The counts of a unit before its first row."""
    return {"documents": 0, "tokens": 0, "replaced": 0, "skipped": {"null": 0, "empty": 0}, "shards": []}


def read_unit(job: dict, skipped: dict) -> Iterator[tuple[str, Sequence[int], list]]:
    """The rows of the files of a unit in batches: (path, positions, values). Counts in `skipped` what is left out."""
    for path in job["paths"]:
        for positions, values in read_texts(path, job["unit"], job, skipped):
            yield path, positions, values


class Document(NamedTuple):
    place: str  # for messages: file and row
    text: str
    size: int  # bytes of UTF-8
    split: str  # "train" or "val"


def read_documents(job: dict, record: dict) -> Iterator[list[Document]]:
    """The documents of a unit, a list for each batch of rows. Counts what is skipped and replaced in the record."""
    skipped = record["skipped"]
    for path, positions, values in read_unit(job, skipped):
        documents = []
        for position, value in zip(positions, values, strict=True):
            if not value:
                skipped["null" if value is None else "empty"] += 1
                continue
            place = f"{path}: row {position:,}" if "rows" in job["unit"] else f"{path}: the text at byte {position:,}"
            text, replaced = replace_surrogates(value)
            record["replaced"] += replaced
            documents += [Document(place, *part) for part in split_text(text, job)]
        yield documents


def first_texts(job: dict) -> list[str]:
    """Up to 100 rows of a unit; [] if they cannot be read: the unit itself reports why."""
    with contextlib.suppress(DamagedError):
        for _, _, values in read_unit(job, {}):
            if texts := [replace_surrogates(value)[0] for value in values[:100] if value]:
                return texts
    return []


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


def split_text(text: str, settings: dict) -> Iterator[tuple[str, int, str]]:
    """The documents of a row: (text, bytes, split). The row is one document, or it is split by paragraphs.

    Then a hash decides for each group of paragraphs, and groups that follow each other in one split are one document.
    """
    rule = settings["val_fraction"], settings.get("split_seed", 0)
    if "paragraph_chars" not in settings:
        content = text.encode()
        yield text, len(content), "val" if in_val(content, *rule) else "train"
        return
    groups = cut_text(text, settings["paragraph_chars"])
    for chosen, run in itertools.groupby(groups, key=lambda group: in_val(group.encode(), *rule)):
        part = "".join(run)
        yield part, len(part.encode()), "val" if chosen else "train"
