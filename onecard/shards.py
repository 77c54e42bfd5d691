"""Token files: write, open, check; and which sequence of a run stands where. No torch in here.

A shard is llm.c's layout: 256 little-endian int32 words (magic 20240520, version 1, number of tokens, zeros)
and that many little-endian uint16. nanoGPT's files without a header are read too. `prepare.py` writes shards
and their manifest.json; `train.py` reads them through `Windows`:

    blocks = Windows("data/fineweb", "train", block_size=1024, seed=1337)
    rows = blocks.batch(first_sequence=0, count=16)  # (16, 1025) uint16; inputs [:, :-1], targets [:, 1:]

The one thing to know: sequence k of a run is a pure function of (seed, k). Nothing is drawn, so nothing has
to be saved, and a resumed run, or one with another micro batch, meets the same tokens in the same step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

from onecard.durable import replacing

MAGIC, VERSION = 20240520, 1
LLAMA_MAGIC = 20240801  # llm.c's files of Llama 3 tokens: uint32
HEADER_BYTES = 1024
MANIFEST = "manifest.json"
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: splitmix64's step


class ShardError(ValueError):
    """A token file or dataset that cannot be used: which one, why, and what to do."""


# ---- one file ----------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one shard under a temporary name, streaming: `with ShardWriter(path) as shard: shard.write(ids)`.

    Leaving the block flushes, syncs, hashes and renames; an exception (a full disk too) removes the temporary
    file. Afterwards `tokens` is the count and `sha256` the hash of the file's bytes. Raises ShardError for what
    the system refuses to write.
    """

    def __init__(self, path):
        self.path, self.opened = Path(path), contextlib.ExitStack()
        self.tokens, self.sha256 = 0, None

    def __enter__(self):
        try:
            self.file = self.opened.enter_context(replacing(self.path))
        except OSError as error:
            raise self.refused(error) from error
        self.file.write(bytes(HEADER_BYTES))
        return self

    def write(self, ids):
        """Appends uint16 ids of shape (n,)."""
        try:
            self.file.write(np.ascontiguousarray(ids, dtype="<u2").data)
        except OSError as error:
            raise self.refused(error) from error
        self.tokens += len(ids)

    def __exit__(self, *raised):
        if raised[0] is not None:
            return self.opened.__exit__(*raised)
        try:
            with self.opened:
                self.file.seek(0)
                self.file.write(np.array([MAGIC, VERSION, self.tokens], dtype="<i4").data)
                self.file.seek(0)
                self.sha256 = hash_file(self.file)
        except OSError as error:
            raise self.refused(error) from error

    def refused(self, error):
        reached = HEADER_BYTES + 2 * self.tokens
        remedy = "make room and run it again: what is finished is kept"
        return ShardError(f"{self.path}: could not be written past {reached:,} bytes ({error.strerror}); {remedy}")


def hash_file(file):
    """Hex SHA-256 of an open binary file from its position on."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def layout(path):
    """(header bytes, tokens) of a token file, from its size and first words alone. Raises ShardError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(12)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; prepare the dataset again to replace it") from None
    magic, version, tokens = np.frombuffer(head.ljust(12, b"\0"), dtype="<i4").tolist()
    if magic == LLAMA_MAGIC:
        raise ShardError(f"{path}: holds Llama 3 tokens of 32 bits; only GPT-2's 16-bit tokens are read")
    if magic == MAGIC:
        expected = HEADER_BYTES + 2 * tokens
        if version != VERSION:
            raise ShardError(f"{path}: version {version} of the llm.c format, only {VERSION} is read")
        if tokens < 1 or size != expected:
            raise ShardError(
                f"{path}: {size:,} bytes, expected {expected:,} for the {tokens:,} tokens of its header: cut "
                "short or overwritten; delete it and run prepare.py again (or copy it again)"
            )
        return HEADER_BYTES, tokens
    if size == 0 or size % 2:
        raise ShardError(f"{path}: {size:,} bytes is no whole number of 16-bit tokens; make or copy it again")
    return 0, size // 2


def open_tokens(path):
    """The tokens of a file as a read-only memory map, uint16 of shape (n,): llm.c's layout or nanoGPT's.

    Sizes are checked before the map exists, so that a file cut short is a ShardError and not a SIGBUS.
    """
    header, tokens = layout(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=header, shape=(tokens,))


def check_shard(path, entry, tokenizer):
    """Reads a shard wholly and holds it against its entry in the manifest. Raises ShardError, saying what differs.

    tokenizer: dict with n_vocab and eot; every document has one eot, before it.
    """
    header, tokens = layout(path)
    digest, documents, largest, first = hashlib.sha256(), 0, 0, None
    with open(path, "rb") as file:
        digest.update(file.read(header))
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            ids = np.frombuffer(chunk, dtype="<u2")
            first = int(ids[0]) if first is None else first
            documents += int(np.count_nonzero(ids == tokenizer["eot"]))
            largest = max(largest, int(ids.max()))
    for what, found, expected in (
        ("tokens", tokens, entry["tokens"]),
        ("SHA-256", digest.hexdigest(), entry["sha256"]),
        ("separators", documents, entry["documents"]),
        ("first token", first, tokenizer["eot"]),
        ("largest token", largest, min(largest, tokenizer["n_vocab"] - 1)),
    ):
        if found != expected:
            raise ShardError(f"{path}: {what} {found}, expected {expected}: damaged")


# ---- the manifest ------------------------------------------------------------------------------------------


def write_json(path, content):
    """Writes JSON whole or not at all. Raises ShardError for what the system refuses to write."""
    try:
        with replacing(path) as file:
            file.write(json.dumps(content, indent=1).encode())
    except OSError as error:
        raise ShardError(f"{path}: could not be written ({error.strerror}); make room and run it again") from error


def write_manifest(folder, manifest):
    """Writes folder/manifest.json; the last thing that is written, and what makes a dataset complete."""
    write_json(Path(folder) / MANIFEST, manifest)


def read_manifest(folder):
    """The dict of folder/manifest.json, or None where there is none. Raises ShardError if it is damaged."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards = [(s["name"], s["split"], int(s["tokens"]), s["sha256"]) for s in manifest["shards"]]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: is no manifest ({error!r}); delete it and run prepare.py again") from error
    if len({name for name, *_ in shards}) < len(shards):
        raise ShardError(f"{path}: names a shard twice; delete it and run prepare.py again")
    return manifest


def find_shards(folder, split):
    """([(path, tokens, identity)] of one split, manifest or None); the sizes of all shards are checked.

    Without a manifest: nanoGPT's train.bin, or llm.c's and modded-nanogpt's names (fineweb_train_000001.bin).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder; make it with: python prepare.py --dataset={folder.name}")
    manifest = read_manifest(folder)
    if manifest is None and (folder / ".prepare" / "plan.json").exists():
        raise ShardError(f"{folder}: prepare.py has not finished here; run it again and it goes on")
    if manifest is None:
        named = [p for p in sorted(folder.glob("*.bin")) if re.search(rf"(^|[_-]){split}([_-]|$)", p.stem)]
        return [(p, layout(p)[1], sample_hash(p)) for p in named], None
    found = []
    for shard in manifest["shards"]:
        path, (_, tokens) = folder / shard["name"], layout(folder / shard["name"])
        if tokens != shard["tokens"]:
            raise ShardError(
                f"{path}: holds {tokens:,} tokens and {folder / MANIFEST} says {shard['tokens']:,}; "
                "delete it and run prepare.py again"
            )
        if shard["split"] == split:
            found.append((path, tokens, shard["sha256"]))
    return found, manifest


def sample_hash(path):
    """Stands for the hash of a file without a manifest: of its first and last 64 KiB."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        return hashlib.sha256(head + file.read()).hexdigest()


# ---- the order of a run ------------------------------------------------------------------------------------


def mix(x):
    """splitmix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"): a
    bijection of uint64 arrays in which every input bit moves every output bit. Written out, so that no numpy
    version can change it."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(sequences, blocks, seed):
    """Which window stands at each sequence number: int64 (n,) -> int64 (n,), below `blocks`.

    In every epoch (sequences // blocks) a permutation of all windows, keyed by (seed, epoch) and computed one
    by one: a Feistel network on the two digits of the position (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"); a result beyond `blocks` goes through it again until it falls below. The lower digit has an
    even number of values, so that odd permutations occur too; eight double rounds make all orders equally likely.
    """
    sequences = np.asarray(sequences, dtype=np.uint64)
    epoch, position = sequences // np.uint64(blocks), sequences % np.uint64(blocks)
    keys = mix(mix(np.array([seed % 2**64], dtype=np.uint64) + GOLDEN) + epoch * GOLDEN)
    upper = math.isqrt(blocks - 1) + 1
    lower = -(-blocks // upper)
    upper, lower = np.uint64(upper), np.uint64(lower + lower % 2)
    outside = np.ones(position.shape, dtype=bool)
    while outside.any():
        left, right, key = position[outside] // lower, position[outside] % lower, keys[outside]
        for _ in range(8):
            key = mix(key + GOLDEN)
            left = (left + mix(key + right)) % upper
            key = mix(key + GOLDEN)
            right = (right + mix(key + left)) % lower
        position[outside] = left * lower + right
        outside = position >= np.uint64(blocks)
    return position.astype(np.int64)


class Windows:
    """The windows of one split: block_size + 1 tokens each, block_size apart, none over a shard's end.

    `tokens`, `blocks` (windows), `text_bytes` and `tokenizer` (None without a manifest), `fingerprint` (hex
    SHA-256 of the shards' names, counts and hashes). Opening is cheap: only sizes are looked at, a file is mapped
    when it is first used. Raises ShardError: no such dataset, a shard of the wrong size, too few tokens, an id
    outside `vocab_size`.
    """

    def __init__(self, folder, split, block_size, seed=0, vocab_size=None):
        self.folder, self.split = Path(folder), split
        self.block_size, self.seed, self.vocab_size = block_size, seed, vocab_size
        self.shards, manifest = find_shards(folder, split)
        self.tokens = sum(tokens for _, tokens, _ in self.shards)
        counts = [(tokens - 1) // block_size for _, tokens, _ in self.shards]
        self.ends = np.cumsum(counts, dtype=np.int64)  # windows up to and with shard i
        self.count = sum(counts)
        self.tokenizer = manifest and manifest.get("tokenizer")
        in_split = [s for s in manifest["shards"] if s["split"] == split] if manifest else []
        self.text_bytes = sum(s["text_bytes"] for s in in_split) if manifest else None
        listing = [[path.name, tokens, identity] for path, tokens, identity in self.shards]
        self.fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        self.maps = {}
        if len(self) == 0:
            more = "more text or a larger val_fraction" if split == "val" else "more text"
            raise ShardError(
                f"{self.folder}: the {split} split has {self.tokens:,} tokens in {len(self.shards)} files, "
                f"too few for one window of {block_size} + 1; prepare {more}, or train with a smaller block_size"
            )

    def __len__(self):
        return self.count

    @property
    def blocks(self):  # the old name of len(windows), until its users have switched
        return self.count

    def rows(self, indices):
        """The windows of these numbers: (n,) -> uint16 (n, block_size + 1)."""
        indices = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(indices), self.block_size + 1), dtype=np.uint16)
        for row, index in enumerate(indices.tolist()):
            shard, start = self.place(index)
            if shard not in self.maps:
                self.maps[shard] = open_tokens(self.shards[shard][0])
            out[row] = self.maps[shard][start : start + self.block_size + 1]
        if self.vocab_size is not None and out.size and int(out.max()) >= self.vocab_size:
            self.refuse(indices, out)
        return out

    def batch(self, first_sequence, count):
        """Sequences first_sequence .. + count - 1 of the run: uint16 (count, block_size + 1)."""
        return self.rows(shuffled(np.arange(first_sequence, first_sequence + count), len(self), self.seed))

    def place(self, index):
        """(shard, first token in it) of a window."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        shard = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[shard - 1]) if shard else 0
        return shard, (index - before) * self.block_size

    def refuse(self, indices, out):
        row, column = np.argwhere(out >= self.vocab_size)[0].tolist()
        shard, start = self.place(int(indices[row]))
        raise ShardError(
            f"{self.shards[shard][0]}: token {out[row, column]} at position {start + column:,} is outside the "
            f"model's vocabulary of {self.vocab_size:,}: a damaged file, or another tokenizer's; "
            f"look with: python prepare.py --verify --dataset={self.folder.name}"
        )


TokenBlocks = Windows  # the old name, until its users have switched
