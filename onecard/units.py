"""One unit of work of prepare.py: a range of rows of one file in, its shards and its record out.

    record = prepare_unit(job, load_tokenizer(), report=lambda text_bytes, tokens: None)

`work` is what a worker process runs. The one thing to know: this module needs the package onecard alone, no script and
no torch, so a worker on another machine needs no clone. What a unit writes depends on its job alone; its record is
written last and means that the unit is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from onecard.shards import MANIFEST, ShardError, ShardWriter, write_json
from onecard.sources import DamagedError, read_texts
from onecard.tokenizer import Tokenizer, load_tokenizer, replace_surrogates

STATE = ".prepare"  # the folder in a dataset with the plan, the records and the locks


def make_job(plan: dict, number: int, limit: int, folder: str | Path) -> dict:
    """All that a worker must know of a unit of this plan (the content of plan.json), as plain data."""
    unit = plan["units"][number]
    job = {"number": number, "limit": limit, "folder": str(folder), "unit": unit}
    return plan["settings"] | job | {"path": plan["sources"][unit["source"]]["path"]}


def prepare_unit(job: dict, tokenizer: Tokenizer, report: Callable[[int, int], object]) -> dict:
    """Reads, encodes and writes one unit. Returns its record, which is on disk by then.

    job["limit"]: stop after the row group in which this many tokens are reached (0: no limit). report(bytes of text,
    tokens) is called after each batch of rows. Raises DamagedError if the source cannot be read, ShardError if a
    file cannot be written.
    """
    folder, number, limit = Path(job["folder"]), job["number"], job["limit"]
    if unit_record(folder, number).exists():  # the unit is done a second time: until then the dataset is incomplete
        (folder / MANIFEST).unlink(missing_ok=True)
        unit_record(folder, number).unlink()
    record: dict = {"unit": number, **job["unit"], "limit": limit, "complete": True, "encoder": tokenizer.encoder}
    record |= {"documents": 0, "tokens": 0, "replaced": 0, "skipped": {"null": 0, "empty": 0}, "shards": []}
    writers: dict[str, ShardWriter] = {}  # by split; a split without documents gets no shard
    entries: dict[str, dict] = {}  # by split: what the record says of its shard
    with contextlib.ExitStack() as stack:
        for positions, values, group_end in read_texts(job["path"], job["unit"], job["text_column"]):
            texts, contents = as_texts(positions, values, job, record)
            tokens = 0
            for content, ids in zip(contents, encode_texts(tokenizer, texts), strict=True):
                split = "val" if in_val(content, job["val_fraction"]) else "train"
                if split not in writers:
                    name = f"{split}_{number:06d}.bin"
                    writers[split] = stack.enter_context(ShardWriter(folder / name))
                    entries[split] = {"name": name, "split": split, "documents": 0, "text_bytes": 0}
                writers[split].write(ids)
                entries[split]["documents"] += 1
                entries[split]["text_bytes"] += len(content)
                tokens += len(ids)
            record["documents"] += len(texts)
            record["tokens"] += tokens
            report(sum(map(len, contents)), tokens)
            if limit and group_end and record["tokens"] >= limit:
                stop, record["complete"] = positions[-1] + 1, False
                for place, end in (("row_groups", group_end), ("rows", stop), ("range", stop)):
                    if place in record:
                        record[place] = [record[place][0], end]
                break
    for split in sorted(writers):
        writer = writers[split]
        record["shards"].append(entries[split] | {"tokens": writer.tokens, "sha256": writer.sha256})
    write_json(unit_record(folder, number), record)
    return record


def as_texts(positions: Sequence[int], values: list, job: dict, record: dict) -> tuple[list[str], list[bytes]]:
    """A batch of rows as texts and as their UTF-8 bytes. Counts skipped rows and replaced characters in the record.

    Raises DamagedError for a row that is not UTF-8.
    """
    texts, contents = [], []
    for position, value in zip(positions, values, strict=True):
        if not value:
            record["skipped"]["null" if value is None else "empty"] += 1
            continue
        try:
            text, content, replaced = decode(value)
        except UnicodeDecodeError as error:
            place = f"row {position:,}" if "rows" in job["unit"] else f"the text at byte {position:,}"
            raise DamagedError(f"{job['path']}: {place} is not UTF-8 ({error.reason}); remove it") from error
        record["replaced"] += replaced
        texts.append(text)
        contents.append(content)
    return texts, contents


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


def in_val(content: bytes, val_fraction: float) -> bool:
    """Whether a document is in the val split: by a hash of its text, so that duplicates are in the same split."""
    drawn = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return drawn < val_fraction * 2**64


def unit_record(folder: Path, number: int) -> Path:
    return folder / STATE / f"unit_{number:06d}.json"


def work(connection: Connection, encoder: str, threads: int) -> None:
    """A worker process: takes jobs from the connection, sends (progress | done | failed | stop, content)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends the workers
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by fastokens and tokenizers
    tokenizer = load_tokenizer(encoder=encoder)

    with contextlib.suppress(EOFError, ConnectionError):  # the main process is gone; temporary files are removed
        while True:
            job = connection.recv()
            try:
                record = prepare_unit(job, tokenizer, lambda *counts: connection.send(("progress", counts)))
                connection.send(("done", record))
            except ShardError as error:
                connection.send(("stop", str(error)))
            except DamagedError as error:
                connection.send(("failed", str(error)))
