"""Token files: write, check and read them. Which windows of tokens a run reads when.

    windows = Windows("data/fineweb", "train", block_size=1024, seed=1337)
    rows = windows.batch(first_sequence=0, count=16)  # (16, 1025) uint16; inputs [:, :-1], targets [:, 1:]

A shard has llm.c's layout: 256 little-endian int32 words (magic 20240520, version 1, number of tokens, zeros), then one
little-endian uint16 per token. nanoGPT's files without a header are read too. manifest.json lists a dataset's shards.
The one thing to know: sequence k of a run is a pure function of (seed, k), so no random state has to be saved. A run
that is resumed, or that uses another micro batch, reads the same tokens in the same step.
"""

from __future__ import annotations

import bisect
import contextlib
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onecard import UserError
from onecard.durable import replacing, sha256_of, write_refused

MAGIC, VERSION = 20240520, 1
LLAMA_MAGIC = 20240801  # llm.c's files of Llama 3 tokens: uint32
HEADER_BYTES = 1024
MANIFEST = "manifest.json"
CHUNK = 1 << 23  # tokens that are checked at once
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: splitmix64's step


class ShardError(UserError):
    """A token file or dataset that cannot be used: which one, why, and what to do."""


# ---- write -------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one shard under a temporary name, streaming: `with ShardWriter(path) as shard: shard.write(ids)`.

    The end of the block hashes, syncs and renames the file; an exception removes it. Then `tokens` is the number of
    tokens and `sha256` the hash of the file. Raises ShardError if the system refuses a write.
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
        with refusals(self.path, HEADER_BYTES + 2 * self.tokens):
            self.file.write(np.ascontiguousarray(ids, dtype="<u2").data)
        self.tokens += len(ids)

    def __exit__(self, *raised):
        if raised[0] is not None:
            return self.opened.__exit__(*raised)
        with refusals(self.path, HEADER_BYTES + 2 * self.tokens), self.opened:
            self.file.seek(0)
            self.file.write(np.array([MAGIC, VERSION, self.tokens], dtype="<i4").data)
            self.file.seek(0)
            self.sha256 = sha256_of(self.file)


@contextlib.contextmanager
def refusals(path, reached=None):
    """Turns an OSError of the body into a ShardError."""
    try:
        yield
    except OSError as error:
        raise ShardError(write_refused(path, error, reached)) from error


def write_json(path: str | Path, content: dict) -> None:
    """Writes a JSON file whole or not at all: one line a key, and one line an item of its lists (shards, sources).

    Raises ShardError if the system refuses the write.
    """
    lines = []
    for key, value in content.items():
        items = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        lines.append(f" {json.dumps(key)}: " + (f"[\n  {items}\n ]" if items else json.dumps(value)))
    with refusals(path), replacing(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def write_manifest(folder: str | Path, manifest: dict) -> None:
    """Writes folder/manifest.json. It is written last: with it the dataset is complete."""
    write_json(Path(folder) / MANIFEST, manifest)


# ---- read and check ----------------------------------------------------------------------------------------


def layout(path: str | Path) -> tuple[int, int]:
    """(header bytes, tokens) of a token file, from its size and its first words alone. Raises ShardError."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(HEADER_BYTES), file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; run prepare.py again to replace it") from None
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
    magic, version, tokens = np.frombuffer(head[:12].ljust(12, b"\0"), dtype="<i4").tolist()
    if magic == MAGIC and version == VERSION:
        return HEADER_BYTES, tokens
    if magic == MAGIC:
        raise ShardError(f"{path}: version {version} of the llm.c format; only version {VERSION} is read")
    if magic == LLAMA_MAGIC:
        raise ShardError(f"{path}: holds Llama 3 tokens of 32 bits; only 16-bit tokens are read, such as GPT-2's")
    return 0, size // 2  # nanoGPT's files have no header


def open_tokens(path: str | Path) -> np.ndarray:
    """A token file as a read-only memory map, uint16 (n,), for files that nobody changes. Raises ShardError."""
    header, tokens = layout(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=header, shape=(tokens,))


def read_tokens(path, first_byte, count):
    """uint16 (count,). The file is open for this call only, so that a dataset can have any number of shards."""
    ids = np.empty(count, dtype="<u2")
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(first_byte)
            if file.readinto(ids.data) < ids.nbytes:
                raise ShardError(f"{path}: was cut short while in use; delete it and run prepare.py again")
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
    return ids


def check_shard(path: str | Path, entry: dict, tokenizer: dict) -> None:
    """Reads a whole shard and compares it with its entry in the manifest. Raises ShardError for the first difference.

    tokenizer: its n_vocab and eot; each document has one eot, before it.
    """
    header, tokens = layout(path)
    with open(path, "rb") as file:
        sha256 = sha256_of(file)
    first, separators, largest = int(read_tokens(path, header, 1)[0]), 0, 0
    for start in range(0, tokens, CHUNK):
        ids = read_tokens(path, header + 2 * start, min(CHUNK, tokens - start))
        separators += int(np.count_nonzero(ids == tokenizer["eot"]))
        largest = max(largest, int(ids.max()))
    for what, found, expected in (
        ("tokens", tokens, entry["tokens"]),
        ("SHA-256", sha256, entry["sha256"]),
        ("separators", separators, entry["documents"]),
        ("first token", first, tokenizer["eot"]),
        ("largest token", largest, min(largest, tokenizer["n_vocab"] - 1)),
    ):
        if found != expected:
            raise ShardError(f"{path}: damaged: {what} {found}, expected {expected}; delete it, run prepare.py again")


def read_json(path: Path, fits: Callable[[Any], bool], remedy: str) -> Any:
    """The content of a JSON file, None if there is none. Raises ShardError if it is damaged, or `fits` says no."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not fits(content):
            raise ValueError("its numbers do not fit together")
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: damaged ({type(error).__name__}: {error}); {remedy}") from error
    return content


def read_manifest(folder: str | Path) -> dict | None:
    """folder/manifest.json, or None if there is none. Raises ShardError if it is damaged."""
    return read_json(Path(folder) / MANIFEST, manifest_fits, "delete it and run prepare.py again")


def manifest_fits(manifest):
    shards = manifest["shards"]
    names = {shard["name"] for shard in shards if shard["split"] in ("train", "val") and shard["sha256"]}
    sums = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "text_bytes")}
    n_vocab = manifest.get("tokenizer", {}).get("n_vocab", 1)
    return len(names) == len(shards) and n_vocab > 0 and all(manifest.get(key, sums[key]) == sums[key] for key in sums)


class Shard(NamedTuple):
    path: Path
    header: int  # bytes before the first token
    tokens: int
    identity: str  # its SHA-256 in the manifest; without a manifest, that of its first and last 64 KiB


def find_shards(folder: str | Path) -> tuple[dict[str, list[Shard]], dict | None]:
    """({split: its shards}, the manifest or None). Looks at each file of the dataset once and checks its size.

    Without a manifest: nanoGPT's train.bin, or llm.c's and modded-nanogpt's names (fineweb_train_000001.bin).
    """
    folder = Path(folder)
    shards: dict[str, list[Shard]] = {"train": [], "val": []}
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder; {other_datasets(folder)}")
    manifest = read_manifest(folder)
    if manifest is None and (folder / ".prepare" / "plan.json").exists():
        raise ShardError(f"{folder}: prepare.py has not finished here; run it again to complete the dataset")
    if manifest is None:
        for path in sorted(folder.glob("*.bin")):
            for split in shards:
                if re.search(rf"(^|[_-]){split}([_-]|$)", path.stem):
                    shards[split].append(Shard(path, *layout(path), hash_of_ends(path)))
        return shards, None
    for entry in manifest["shards"]:
        shard = Shard(folder / entry["name"], *layout(folder / entry["name"]), entry["sha256"])
        if shard.tokens != entry["tokens"]:
            raise ShardError(
                f"{shard.path}: holds {shard.tokens:,} tokens and {folder / MANIFEST} says {entry['tokens']:,}; "
                "delete the file and run prepare.py again"
            )
        shards[entry["split"]].append(shard)
    return shards, manifest


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


def hash_of_ends(path):
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        return hashlib.sha256(head + file.read()).hexdigest()


# ---- the order of a run ------------------------------------------------------------------------------------


def mix(x):
    """splitmix64's finalizer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"): a bijection
    of uint64 arrays in which every input bit affects every output bit. Written out: no numpy version can change it."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(sequences: np.ndarray | Sequence[int], windows: int, seed: int) -> np.ndarray:
    """The window of each sequence of a run: int64 (n,) -> int64 (n,), all below `windows`.

    Each epoch (sequence // windows) is a permutation of all windows, keyed by (seed, epoch). It is computed entry by
    entry, by a Feistel network on the two digits of the position (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"); a result that is too large goes through the network again. The lower digit has an even number
    of values, so that odd permutations occur too. Eight double rounds make all orders equally likely.
    """
    sequences = np.asarray(sequences, dtype=np.uint64)
    epoch, position = sequences // np.uint64(windows), sequences % np.uint64(windows)
    keys = mix(mix(np.array([seed % 2**64], dtype=np.uint64) + GOLDEN) + epoch * GOLDEN)
    digit = math.isqrt(windows - 1) + 1
    upper, lower = np.uint64(digit), np.uint64(2 * -(-windows // (2 * digit)))  # how many values each digit has
    outside = np.ones(position.shape, dtype=bool)
    while outside.any():
        left, right, key = position[outside] // lower, position[outside] % lower, keys[outside]
        for _ in range(8):
            key = mix(key + GOLDEN)
            left = (left + mix(key + right)) % upper
            key = mix(key + GOLDEN)
            right = (right + mix(key + left)) % lower
        position[outside] = left * lower + right
        outside = position >= np.uint64(windows)
    return position.astype(np.int64)


class Windows:
    """The windows of one split: block_size + 1 tokens each, block_size apart, none across the end of a shard.

    len(windows) is their number. tokens: of all shards. text_bytes and tokenizer: from the manifest, or None.
    fingerprint: hex SHA-256 of the shards' names, sizes and hashes. Opening reads headers only. Raises ShardError: no
    such dataset, a shard of the wrong size or cut short, too few tokens for a window, an id outside `vocab_size`.
    """

    def __init__(self, folder: str | Path, split: str, block_size: int, seed=0, vocab_size=None, found=None):
        self.folder, self.split = Path(folder), split
        self.block_size, self.seed, self.vocab_size = block_size, seed, vocab_size
        shards, manifest = found or find_shards(folder)
        self.shards = shards[split]
        self.tokens = sum(shard.tokens for shard in self.shards)
        self.ends = list(itertools.accumulate((shard.tokens - 1) // block_size for shard in self.shards))
        self.tokenizer = self.text_bytes = None
        if manifest:
            self.tokenizer = manifest.get("tokenizer") or {}
            if vocab_size is not None and self.tokenizer.get("n_vocab", 0) > vocab_size:
                raise ShardError(
                    f"{self.folder}: its tokenizer {self.tokenizer['name']} has {self.tokenizer['n_vocab']} ids, more "
                    f"than vocab_size={vocab_size}; set --vocab_size=0, which takes the number of the dataset"
                )
            self.text_bytes = sum(entry["text_bytes"] for entry in manifest["shards"] if entry["split"] == split)
        listing = [[shard.path.name, shard.tokens, shard.identity] for shard in self.shards]
        self.fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        if len(self) == 0:
            larger = ", or another dataset with a larger val_fraction" if split == "val" else ""
            longest = max((shard.tokens for shard in self.shards), default=0)
            smaller = f", or use --block_size={longest - 1}" if longest > 1 else ""
            raise ShardError(
                f"{self.folder}: the {split} split has {self.tokens:,} tokens in {len(self.shards)} files, too few for "
                f"one window of {block_size} + 1; prepare more text{larger}{smaller}"
            )

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def batch(self, first_sequence: int, count: int) -> np.ndarray:
        """Sequences first_sequence to first_sequence + count - 1 of the run: uint16 (count, block_size + 1)."""
        return self.rows(shuffled(np.arange(first_sequence, first_sequence + count), len(self), self.seed))

    def rows(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """The windows with these numbers: (n,) -> uint16 (n, block_size + 1)."""
        rows = np.empty((len(indices), self.block_size + 1), dtype=np.uint16)
        for row, index in zip(rows, indices, strict=True):
            number = bisect.bisect_right(self.ends, index)
            before = self.ends[number - 1] if number else 0
            shard, start = self.shards[number], (int(index) - before) * self.block_size
            row[:] = read_tokens(shard.path, shard.header + 2 * start, len(row))
            if self.vocab_size is not None and row.max() >= self.vocab_size:
                column = int(np.argmax(row >= self.vocab_size))
                raise ShardError(
                    f"{shard.path}: token {row[column]} at position {start + column:,} is outside the model's "
                    f"vocabulary of {self.vocab_size:,}: a damaged file, or another tokenizer's; "
                    f"check with: python prepare.py --verify {keys_of(self.folder)}"
                )
        return rows


def open_windows(
    folder: str | Path, block_size: int, seed: int = 0, vocab_size: int | None = None
) -> tuple[Windows, Windows]:
    """(train windows, val windows). The manifest is read once, and each shard is looked at once."""
    found = find_shards(folder)
    train, val = (Windows(folder, split, block_size, seed, vocab_size, found) for split in ("train", "val"))
    return train, val
