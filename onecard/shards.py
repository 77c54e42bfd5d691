"""Token files: write, read and check them; the list of a dataset's files.

    with ShardWriter("data/mine/train_000000.bin") as shard:
        shard.write(ids)  # uint16 (n,)

A shard has llm.c's layout: 256 little-endian int32 words (magic 20240520, version 1, number of tokens, zeros), then one
little-endian uint16 per token. nanoGPT's files without a header are read too. manifest.json lists a dataset's shards
and is written last. The one thing to know: what reads or writes a file raises ShardError, one line with the file's
name, if the file is missing or damaged or the system refuses.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onecard.durable import replacing, sha256_of
from onecard.jsonfiles import ShardError, check, count, counts, read_json, refusals, text, write_json

MAGIC, VERSION = 20240520, 1
LLAMA_MAGIC = 20240801  # llm.c's files of Llama 3 tokens: uint32
HEADER_BYTES = 1024
MANIFEST = "manifest.json"
CHECK_BYTES = 1 << 24  # of a shard, that are checked at once
# What a manifest has, as jsonfiles.check reads it
SPLITS = ("train", "val")
SHARD = {"name": text, "split": text, "documents": count, "tokens": count, "text_bytes": count, "sha256": text}
SOURCE = {"path": text, "id": text, "bytes": count}
TOKENIZER = {"name": text, "sha256": text, "n_vocab": count, "eot": count}
FORM = {"tokenizer": TOKENIZER, "encoder": text, "libraries": {}, "settings": {}, "replaced": count, "skipped": counts}
FORM |= {"failed": [text], "sources": [SOURCE], "shards": [SHARD]}


# ---- write -------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one shard under a temporary name, streaming: `with ShardWriter(path) as shard: shard.write(ids)`.

    The end of the block hashes, syncs and renames the file; an exception removes it. Then `tokens` is the number of
    tokens and `sha256` the hash of the file.
    """

    def __init__(self, path: str | Path):
        self.path, self.opened = Path(path), contextlib.ExitStack()
        self.tokens, self.sha256 = 0, ""

    def __enter__(self) -> ShardWriter:
        with refusals(self.path):
            self.file = self.opened.enter_context(replacing(self.path))
            self.file.write(bytes(HEADER_BYTES))
        return self

    def write(self, ids: np.ndarray) -> None:
        """Appends uint16 ids of shape (n,)."""
        with refusals(self.path):
            self.file.write(np.ascontiguousarray(ids, dtype="<u2").data)
        self.tokens += len(ids)

    def __exit__(self, *raised):
        if raised[0] is not None:
            return self.opened.__exit__(*raised)
        with refusals(self.path), self.opened:
            self.file.seek(0)
            self.file.write(np.array([MAGIC, VERSION, self.tokens], dtype="<i4").data)
            self.file.seek(0)
            self.sha256 = sha256_of(self.file)


def write_manifest(folder: str | Path, manifest: dict) -> None:
    write_json(Path(folder) / MANIFEST, manifest)


# ---- a token file ------------------------------------------------------------------------------------------


def layout(path: str | Path) -> tuple[int, int]:
    """(header bytes, tokens) of a token file, from its size and its first words alone."""
    with refusals(path, reading=True), open(path, "rb", buffering=0) as file:
        head, size = file.read(12), file.seek(0, os.SEEK_END)
    header_bytes, tokens = read_header(path, head, size)
    expected = header_bytes + 2 * tokens
    if tokens < 1 or size != expected:
        raise ShardError(
            f"{path}: {size:,} bytes, expected {expected:,} for the {tokens:,} tokens in it: cut short or overwritten; "
            "copy it again, or delete it and run prepare.py again"
        )
    return header_bytes, tokens


def read_header(path, head, size):
    """(header bytes, tokens) as the first bytes of a file say; without a header its size says it. One `if` a format."""
    magic, version, tokens = np.frombuffer(head.ljust(12, b"\0"), dtype="<i4").tolist()
    if magic == MAGIC and version == VERSION:
        return HEADER_BYTES, tokens
    if magic == MAGIC:
        raise ShardError(f"{path}: version {version} of the llm.c format; only version {VERSION} is read")
    if magic == LLAMA_MAGIC:
        raise ShardError(f"{path}: holds Llama 3 tokens of 32 bits; only 16-bit tokens are read, such as GPT-2's")
    return 0, size // 2  # nanoGPT's files have no header


def open_tokens(path: str | Path) -> np.ndarray:
    """A token file as a read-only memory map, uint16 (n,), for files that nobody changes."""
    header, tokens = layout(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=header, shape=(tokens,))


def check_shard(path: str | Path, entry: dict, tokenizer: dict) -> None:
    """Reads every byte of a shard and compares it with its entry in the manifest.

    tokenizer: its n_vocab and eot. Each document has one eot, before it.
    """
    header, tokens = layout(path)
    digest, separators, largest = hashlib.sha256(), 0, 0
    with refusals(path, reading=True), open(path, "rb") as file:
        digest.update(file.read(header))
        while chunk := file.read(CHECK_BYTES):
            digest.update(chunk)
            ids = np.frombuffer(chunk, "<u2", len(chunk) // 2)
            separators += int(np.count_nonzero(ids == tokenizer["eot"]))
            largest = max(largest, int(ids.max(initial=0)))
    for what, found, expected in (
        ("tokens", tokens, entry["tokens"]),
        ("SHA-256", digest.hexdigest(), entry["sha256"]),
        ("separators", separators, entry["documents"]),
        ("largest token", largest, min(largest, tokenizer["n_vocab"] - 1)),
    ):
        if found != expected:
            raise ShardError(f"{path}: damaged: {what} {found}, expected {expected}; delete it, run prepare.py again")


# ---- a dataset ---------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> dict | None:
    """folder/manifest.json, or None if there is none. Raises ShardError if it is damaged."""
    return read_json(Path(folder) / MANIFEST, manifest_fits, "delete it and run prepare.py again")


def manifest_fits(manifest):
    keys = FORM.keys() & manifest.keys() | {"shards"}  # those of other programs need no more than the shards
    check(manifest, {key: FORM[key] for key in keys})
    shards = manifest["shards"]
    for shard in shards:
        if not re.fullmatch(rf"{shard['split']}_[0-9]{{6,}}\.bin", shard["name"]) or shard["split"] not in SPLITS:
            raise ValueError(f"{shard['name'][:60]!r} is not the name of a {shard['split'][:60]} shard")
    sums = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "text_bytes")}
    names = {shard["name"] for shard in shards}
    return len(names) == len(shards) and all(manifest.get(key, sums[key]) == sums[key] for key in sums)


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    path: Path
    header: int  # bytes before the first token
    tokens: int
    identity: str  # its SHA-256 in the manifest; without a manifest, that of its first and last 64 KiB


def find_shards(folder: str | Path) -> tuple[dict[str, list[Shard]], dict | None]:
    """({split: its shards}, the manifest or None). Looks at each file once, and checks its size.

    Without a manifest: nanoGPT's train.bin, or llm.c's and modded-nanogpt's names (fineweb_train_000001.bin).
    """
    folder = Path(folder)
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder; {other_datasets(folder)}")
    manifest = read_manifest(folder)
    if manifest is None and (folder / ".prepare" / "plan.json").exists():
        raise ShardError(f"{folder}: prepare.py has not finished here; run it again to complete the dataset")
    if manifest is None:
        for path in sorted(folder.glob("*.bin")):
            if split := re.search(r"(^|[_-])(train|val)([_-]|$)", path.stem):
                shards[split[2]].append(Shard(path, *layout(path), hash_of_ends(path)))
        return shards, None
    for entry in manifest["shards"]:
        path = folder / entry["name"]
        header, tokens = layout(path)
        if tokens != entry["tokens"]:
            said = f"holds {tokens:,} tokens and {folder / MANIFEST} says {entry['tokens']:,}"
            raise ShardError(f"{path}: {said}; delete the file and run prepare.py again")
        shards[entry["split"]].append(Shard(path, header, tokens, entry["sha256"]))
    return shards, manifest


def hash_of_ends(path):
    with refusals(path, reading=True), open(path, "rb") as file:
        head = file.read(1 << 16)
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        return hashlib.sha256(head + file.read()).hexdigest()


def other_datasets(folder: Path) -> str:
    """What to do where there is no such dataset: the nearest name in the same folder, or all names, and prepare.py."""
    names = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
    near = difflib.get_close_matches(folder.name, names, n=1)
    known = f"did you mean {near[0]}?" if near else f"{folder.parent} has {', '.join(names) or 'no dataset'}."
    files = "" if folder.name == "quickstart" else " FILES"
    return f"{known} To make it: python prepare.py{files} {keys_of(folder)}"


def keys_of(folder: Path) -> str:
    """The keys that name a dataset on the command line."""
    place = "" if folder.parent == Path("data") else f" --data_dir={shlex.quote(str(folder.parent))}"
    return f"--dataset={shlex.quote(folder.name)}{place}"
