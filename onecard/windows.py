"""The windows of tokens that a run reads, and their order.

    train_windows, val_windows = open_windows("data/fineweb", block_size=1024, seed=1337)
    rows = train_windows.batch(first_sequence=0, count=16)  # (16, 1025) uint16; inputs [:, :-1], targets [:, 1:]

The one thing to know: sequence k of a run is a pure function of (seed, k), so no random state has to be saved. A run
that is resumed, or that uses another micro batch, reads the same tokens in the same step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onecard.jsonfiles import ShardError
from onecard.shards import SPLITS, Shard, find_shards, keys_of

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: splitmix64's step
ORDER_PART = 1024  # sequences whose windows are computed at once
OPEN_FILES = 128  # token files that are open at the same time; macOS allows a process 256
SEEKING = threading.Lock()  # held between a seek and its read, where the system has no pread


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


@functools.lru_cache(4)  # the next batches are of the same part
def part_of_order(part: int, windows: int, seed: int) -> np.ndarray:
    return shuffled(np.arange(part * ORDER_PART, (part + 1) * ORDER_PART), windows, seed)


class OpenFile:
    """A descriptor that is closed when nothing refers to it: the cache has dropped it and no thread reads from it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


@functools.lru_cache(OPEN_FILES)
def open_shard(shard: Shard) -> OpenFile:
    return OpenFile(os.open(shard.path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))


def read_tokens(shard: Shard, start: int, count: int) -> np.ndarray:
    """uint16 (count,): tokens of a shard, from `start` on. Safe in threads and after a fork. Raises ShardError."""
    first_byte = shard.header + 2 * start
    try:
        file = open_shard(shard)
        if hasattr(os, "pread"):
            content = os.pread(file.descriptor, 2 * count, first_byte)
        else:
            with SEEKING:
                os.lseek(file.descriptor, first_byte, os.SEEK_SET)
                content = os.read(file.descriptor, 2 * count)
    except OSError as error:
        raise ShardError(f"{shard.path}: cannot be read ({error.strerror}); check the disk") from error
    if len(content) < 2 * count:
        raise ShardError(f"{shard.path}: was cut short while in use; delete it and run prepare.py again")
    return np.frombuffer(content, dtype="<u2")


class Windows:
    """The windows of one split: block_size + 1 tokens each, block_size apart, none across the end of a shard.

    len(windows) is their number. tokens: of all shards. text_bytes: from the manifest, or None. fingerprint: hex
    SHA-256 of the shards' names, sizes and hashes. found: what find_shards gave, if it was called before. Threads may
    read at the same time. Raises ShardError: no such dataset, a shard of the wrong size or cut short, too few tokens
    for a window, an id outside `vocab_size`.
    """

    def __init__(self, folder: str | Path, split: str, block_size: int, seed=0, vocab_size=None, found=None):
        self.folder, self.split = Path(folder), split
        self.block_size, self.seed, self.vocab_size = block_size, seed, vocab_size
        shards, manifest = found or find_shards(folder)
        self.shards = shards[split]
        self.tokens = sum(shard.tokens for shard in self.shards)
        self.ends = np.cumsum([(shard.tokens - 1) // block_size for shard in self.shards], dtype=np.int64)
        self.text_bytes = None
        if manifest:
            tokenizer = manifest.get("tokenizer") or {"n_vocab": 0}
            if vocab_size is not None and tokenizer["n_vocab"] > vocab_size:
                raise ShardError(
                    f"{self.folder}: its tokenizer {tokenizer['name']} has {tokenizer['n_vocab']} ids, more "
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
        return int(self.ends[-1]) if len(self.ends) else 0

    def batch(self, first_sequence: int, count: int) -> np.ndarray:
        """Sequences first_sequence to first_sequence + count - 1 of the run: uint16 (count, block_size + 1)."""
        parts = range(first_sequence // ORDER_PART, (first_sequence + count - 1) // ORDER_PART + 1)
        order = np.concatenate([part_of_order(part, len(self), self.seed) for part in parts])
        first = first_sequence - parts.start * ORDER_PART
        return self.rows(order[first : first + count])

    def rows(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """The windows with these numbers: (n,) -> uint16 (n, block_size + 1)."""
        indices = np.asarray(indices, dtype=np.int64)
        numbers = np.searchsorted(self.ends, indices, side="right")  # of the shard of each window
        starts = (indices - self.ends[numbers - 1] * (numbers > 0)) * self.block_size
        rows = np.empty((len(indices), self.block_size + 1), dtype=np.uint16)
        for row, number, start in zip(rows, numbers.tolist(), starts.tolist(), strict=True):
            row[:] = read_tokens(self.shards[number], start, len(row))
        if self.vocab_size is not None and rows.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0].tolist()
            raise ShardError(
                f"{self.shards[numbers[row]].path}: token {rows[row, column]} at position {starts[row] + column:,} is "
                f"outside the model's vocabulary of {self.vocab_size:,}: a damaged file, or another tokenizer's; "
                f"check with: python prepare.py --verify {keys_of(self.folder)}"
            )
        return rows


def open_windows(folder: str | Path, block_size: int, seed: int = 0, vocab_size: int | None = None) -> list[Windows]:
    """[train windows, val windows]. The manifest is read once, and each shard is looked at once."""
    found = find_shards(folder)
    return [Windows(folder, split, block_size, seed, vocab_size, found) for split in SPLITS]
