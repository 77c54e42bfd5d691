"""Text to ids and back: GPT-2's vocabulary, bytes, nanoGPT's characters, or a Hugging Face tokenizer.json.

    tokenizer = load_tokenizer()  # or "bytes", or the path of a tokenizer.json or of nanoGPT's meta.pkl
    ids = tokenizer.encode("Hello")  # uint16; `<|endoftext|>` in a text is ordinary text
    text = tokenizer.decode(ids)

Nothing is downloaded. The one thing to know: a long text is encoded in pieces where that cannot change its ids
(`pieces`), so memory is bounded.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import io
import itertools
import json
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from onecard import UserError
from onecard.shards import read_manifest

INSTALLED = Path(__file__).resolve().parent / "data" / "gpt2.tiktoken"  # where `pip install .` puts it
VOCABULARY = INSTALLED if INSTALLED.exists() else Path(__file__).resolve().parent.parent / "data" / "gpt2.tiktoken"
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
FILE = "tokenizer.json"  # its name in the folder of a dataset
MAX_IDS = 1 << 16  # an id is stored in 16 bits
ENDOFTEXT = "<|endoftext|>"
SEPARATORS = (ENDOFTEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")  # names in known models
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
FAST_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's own: the same
FAST_DIFFERS = "\u180e"  # white space for fastokens, none for tiktoken; of all other characters the ids are the same

# A run of white space begins a token. So does its last character if a word follows, because the two are one token.
# A text can be cut at both places without a change of ids. (Python's \s has four characters more than SPACE.)
SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
CUT = re.compile(f"(?<!{SPACE})(?={SPACE})|(?<={SPACE})(?={SPACE}[^{SPACE[1:]})")
PIECE = 1 << 17  # characters; tiktoken fails on a run of a million spaces

# GPT-2's alphabet: a visible letter for each byte. The tokens of a byte-level tokenizer.json are spelled in it.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {byte: chr(byte) for byte in VISIBLE}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in LETTERS)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}

HARD_STRINGS = (
    "",
    " ",
    "  two  spaces  ",
    "don't we'll I'VE 'tis",
    "a<|endoftext|>b",
    "\r\n\r\n\t x\n",
    " \xa0\u2003\u3000x\x1c\x1d\x85",
    "naïve cafe\u0301 ﬁ İ ß Σς",
    "日本語のテキスト 한국어 العربية ไทย हिन्दी",
    "👩\u200d👩\u200d👧 🏳️\u200d🌈 \U000e0001",
    "1234567890 ٣٤٥ Ⅳ ½ x²",
    "\0\x01\ufffd\ufeff\U0010ffff",
    "a\u180e's  \u180eb",
    "a" * 5000 + " " * 5000 + "b" + "\n" * 5000 + "c",
    "!" * 3000 + "_" * 3000 + "0" * 3000,
)


class TokenizerError(UserError):
    """A vocabulary, an encoder or a text that cannot be used."""


# ---- open ----------------------------------------------------------------------------------------------------


def load_tokenizer(source: str | Path = "gpt2", encoder: str = "tiktoken") -> Tokenizer:
    """source: gpt2, gpt2-1024 (or another number of ids: its first), bytes, or the path of a tokenizer.json or of
    nanoGPT's meta.pkl. Raises TokenizerError.

    encoder: fastokens is many times faster, for gpt2 and a tokenizer.json with GPT-2's splitting pattern; check_parity
    compares its ids. With any other value the library that defines the ids encodes: tiktoken or tokenizers.
    """
    if source == "gpt2":
        return GPT2Tokenizer(encoder)
    if source == "bytes":
        return ByteTokenizer()
    if match := re.fullmatch(r"gpt2-(\d+)", str(source)):
        return ShortTokenizer(int(match[1]))
    path = Path(source)
    try:
        content = path.read_bytes()
    except OSError as error:
        kinds = "gpt2, gpt2-1024, bytes, or the path of a tokenizer.json or of nanoGPT's meta.pkl"
        raise TokenizerError(f"{path}: cannot be read as a tokenizer ({error.strerror}); give {kinds}") from None
    full = path.resolve()
    name = full.parent.name if full.stem in ("tokenizer", "meta") else full.stem
    if path.suffix == ".pkl":
        return CharTokenizer(read_meta(content, path), name)
    return open_json(content, path, name, encoder)


def from_state(state: dict[str, Any] | None, encoder: str = "tiktoken", folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a `state()`. None, or a dict without kind, is GPT-2's: so in old datasets and checkpoints.

    folder: of a dataset, whose manifest names a file there (state["file"]) instead of the content.
    """
    state = state or {}
    kind, content, sha256 = state.get("kind", "gpt2"), state.get("content"), str(state.get("sha256"))
    where, remedy = f"tokenizer {state.get('name')}", "copy it again"
    if kind in ("gpt2", "bytes", "short"):
        tokenizer = load_tokenizer(state["name"] if kind == "short" else kind, encoder)
        if state and sha256 != tokenizer.sha256:
            raise TokenizerError(f"{where}: its SHA-256 {sha256[:12]}... is not that of {tokenizer.name}; {remedy}")
        return tokenizer
    if kind not in ("chars", "bpe"):
        raise TokenizerError(f"{where}: kind={kind} is not known; use the version of onecard that wrote it")
    if folder is not None and "file" in state:
        path = Path(folder) / state["file"]
        content = path.read_bytes().decode(errors="replace") if path.exists() else None
        where = f"{path}: {where}"
        remedy += f", or run prepare.py --dataset={Path(folder).name} --tokenizer=FILE, as at first"
        remedy += "; if prepare.py trained it, prepare the same text with another --dataset"
    if content is None or hashlib.sha256(content.encode()).hexdigest() != sha256:
        problem = "missing" if content is None else "changed or damaged"
        raise TokenizerError(f"{where}: {problem}, its SHA-256 has to be {sha256[:12]}...; {remedy}")
    if kind == "chars":
        return CharTokenizer(json.loads(content), state["name"])
    return JsonTokenizer(content, state["name"], state["eot"], encoder)


def dataset_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer that a dataset's manifest names, or nanoGPT's meta.pkl beside files without a manifest.

    None if it names none that onecard knows. Raises TokenizerError, and ShardError if the manifest is damaged.
    """
    manifest, meta = read_manifest(folder), Path(folder) / "meta.pkl"
    if manifest is None:
        return load_tokenizer(meta) if meta.exists() else None
    state = manifest.get("tokenizer") or {}
    return from_state(state, folder=folder) if "kind" in state or state.get("sha256") == VOCABULARY_SHA256 else None


# ---- the kinds -----------------------------------------------------------------------------------------------


class Tokenizer:
    """Encodes and decodes. Each kind has `encode_reference`, and `token_bytes` or its own `decode_bytes`."""

    kind: str  # gpt2, short, bytes, chars or bpe (any tokenizer.json)
    name: str
    n_vocab: int
    eot: int | None  # the id that separates documents; characters have none
    sha256: str  # of what defines the vocabulary
    encoder: str
    content: str | None = None  # the JSON list of the characters, or the text of the tokenizer.json
    lossless = True  # decode(encode(text)) is the text, for every text that can be encoded
    gpt2_split = True  # texts are split by GPT-2's pattern, or in a way that any cut leaves as it is
    fast: Any = None  # fastokens' tokenizer of the same vocabulary
    token_bytes: list[bytes]  # of each id

    def state(self) -> dict[str, Any]:
        """What a manifest or a checkpoint keeps: plain data, read again by `from_state`."""
        state = {name: getattr(self, name) for name in ("kind", "name", "sha256", "n_vocab", "eot")}
        return state if self.content is None else state | {"content": self.content}

    @property
    def identity(self) -> str:
        """Equal for tokenizers that give the same ids. A tokenizer.json that was saved again has another sha256."""
        return self.sha256

    def encode(self, text: str) -> np.ndarray:
        """str -> uint16 (n,). A lone surrogate, which UTF-8 cannot hold, is encoded as U+FFFD."""
        return np.concatenate(self.encode_pieces(self.pieces(replace_surrogates(text)[0])))

    def pieces(self, text: str) -> list[str]:
        """Parts of a text whose ids together are the ids of the text. The whole text, where no exact cut is known."""
        return pieces(text) if self.gpt2_split else [text]

    def encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        """[str] -> [uint16 (n,)], each text by itself. Longer texts than `pieces` gives are slow, or fail.

        fastokens and tokenizers use as many threads as the environment's RAYON_NUM_THREADS says.
        """
        if self.fast is None:
            return self.encode_reference(texts)
        flat, offsets = self.fast.encode_batch_flat(texts, split_special_tokens=True)
        ids = np.frombuffer(flat, dtype="<u4").astype(np.uint16)
        rows = np.split(ids, np.frombuffer(offsets, dtype="<u8").astype(np.int64)[1:-1])
        if differing := [i for i, text in enumerate(texts) if FAST_DIFFERS in text]:
            for i, row in zip(differing, self.encode_reference([texts[i] for i in differing]), strict=True):
                rows[i] = row
        return rows

    def encode_reference(self, texts: list[str]) -> list[np.ndarray]:
        """encode_pieces by the library that defines the ids."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> str. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> bytes. Raises TokenizerError for an id outside the vocabulary."""
        return b"".join([self.token_bytes[i] for i in self.checked(ids)])

    def checked(self, ids: Iterable[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            found = f"ids {min(ids)} to {max(ids)}"
            raise TokenizerError(f"{found}: the vocabulary of {self.name} has 0 to {self.n_vocab - 1}")
        return ids

    def decoder(self, before: Iterable[int] = ()) -> Callable[[int], str]:
        """A function that takes one id after another and returns the new characters, each when it is complete.

        before: the ids that precede. With some vocabularies the space before a word depends on them.
        """
        ids = list(before)
        shown = len(self.decode(ids))

        def step(id: int) -> str:
            nonlocal shown
            ids.append(id)
            text = self.decode(ids).rstrip("\ufffd")  # the end of a character that is not complete is held back
            new, shown = text[shown:], max(shown, len(text))
            if len(ids) > 64 and "\ufffd" not in (tail := self.decode(ids[-16:])):  # a long text takes no longer
                del ids[:-16]
                shown = len(tail)
            return new

        return step


class GPT2Tokenizer(Tokenizer):
    """GPT-2's, read from data/gpt2.tiktoken. The ids are tiktoken's."""

    kind, name, n_vocab, eot, sha256 = "gpt2", "gpt2", 50257, 50256, VOCABULARY_SHA256

    def __init__(self, encoder: str = "tiktoken"):
        remedy = "restore it with git checkout data/gpt2.tiktoken, or install onecard again"
        try:
            content = VOCABULARY.read_bytes()
        except OSError as error:
            raise TokenizerError(f"{VOCABULARY}: {error.strerror}; {remedy}") from error
        found = hashlib.sha256(content).hexdigest()
        if found != VOCABULARY_SHA256:
            raise TokenizerError(f"{VOCABULARY}: damaged (SHA-256 {found[:12]}...); {remedy}")
        ranks = (line.split()[0] for line in content.splitlines())  # sorted by id
        self.token_bytes = [*map(base64.b64decode, ranks), ENDOFTEXT.encode()]
        self.encoder = encoder
        if encoder == "fastokens":
            fastokens = need("fastokens", "fast")
            self.fast = fastokens.Tokenizer.from_tiktoken(str(VOCABULARY), pattern=FAST_PATTERN)

    @functools.cached_property
    def reference(self) -> tiktoken.Encoding:
        """tiktoken's encoding. With fastokens it is only needed to check the ids."""
        ranks = {token: id for id, token in enumerate(self.token_bytes[: self.eot])}
        special = {ENDOFTEXT: self.eot}
        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode_reference(self, texts: list[str]) -> list[np.ndarray]:
        encode = self.reference.encode_to_numpy
        return [encode(text, disallowed_special=()).astype(np.uint16) for text in texts]


class ShortTokenizer(GPT2Tokenizer):
    """The first ids of GPT-2's vocabulary, which are its most frequent parts of words, and the separator as last id.

    For small networks: gpt2-1024 has 1,024 ids and about 2.4 bytes per token of English. No training, no file.
    """

    kind = "short"

    def __init__(self, n_vocab: int):
        super().__init__()
        if not 257 <= n_vocab < GPT2Tokenizer.n_vocab:
            raise TokenizerError(f"gpt2-{n_vocab}: has to be gpt2-257 to gpt2-{GPT2Tokenizer.n_vocab - 1}, or gpt2")
        self.name, self.n_vocab, self.eot = f"gpt2-{n_vocab}", n_vocab, n_vocab - 1
        self.token_bytes = [*self.token_bytes[: self.eot], ENDOFTEXT.encode()]
        self.sha256 = hashlib.sha256(f"{VOCABULARY_SHA256}, the first {self.eot} ids".encode()).hexdigest()


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 are the ids 0 to 255; 256 is the separator."""

    kind, name, n_vocab, eot, encoder = "bytes", "bytes", 257, 256, "numpy"
    sha256 = hashlib.sha256(b"onecard bytes: ids 0 to 255 are the bytes, 256 separates documents").hexdigest()

    def __init__(self):
        self.token_bytes = [*(bytes([i]) for i in range(256)), ENDOFTEXT.encode()]

    def encode_reference(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) for text in texts]


class CharTokenizer(Tokenizer):
    """nanoGPT's characters, as its data/shakespeare_char/prepare.py makes them: one id a character, no separator."""

    kind, eot, encoder = "chars", None, "numpy"

    def __init__(self, characters: list[str], name: str):
        self.name, self.n_vocab = name, len(characters)
        self.content = json.dumps(characters)
        self.sha256 = hashlib.sha256(self.content.encode()).hexdigest()
        self.token_bytes = [character.encode() for character in characters]
        self.id_of = np.full(0x110000, -1, dtype=np.int32)  # by code point
        self.id_of[[ord(character) for character in characters]] = np.arange(self.n_vocab)

    def encode_reference(self, texts: list[str]) -> list[np.ndarray]:
        """Raises TokenizerError for characters that are not in the vocabulary."""
        rows = [self.id_of[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] for text in texts]
        unknown = {text[i] for text, row in zip(texts, rows, strict=True) for i in np.flatnonzero(row < 0)}
        if unknown:
            shown = " ".join(map(repr, sorted(unknown)[:10]))
            raise TokenizerError(
                f"{len(unknown)} characters of the text are not among the {self.n_vocab} of {self.name}: {shown}; "
                "leave them out, or use a model with another tokenizer"
            )
        return [row.astype(np.uint16) for row in rows]


class JsonTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json, read by the library `tokenizers`. The separator is never found in a text.

    A byte-level one without a normalizer is lossless. check_round_trip tells whether another one loses text.
    """

    kind = "bpe"

    def __init__(self, content: str, name: str, eot: int, encoder: str = "tokenizers"):
        self.content, self.name, self.eot = content, name, eot
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        self.library = read_json(content.encode(), name)
        self.n_vocab = max(self.library.get_vocab(with_added_tokens=True).values()) + 1
        separator = self.library.id_to_token(eot)
        if separator is None:
            raise TokenizerError(f"{name}: its separator {eot} is not one of its ids; copy it again")
        self.library.add_special_tokens([separator])
        layout = json.loads(content)
        splits = layout.get("pre_tokenizer") or {}
        self.byte_level = (layout.get("decoder") or {}).get("type") == "ByteLevel"
        self.lossless = self.byte_level and keeps_every_byte(layout)
        self.gpt2_split = self.lossless and splits["type"] == "ByteLevel" and splits.get("use_regex", True)
        self.encoder = "fastokens" if encoder == "fastokens" else "tokenizers"
        if encoder == "fastokens":
            if not self.gpt2_split:  # its ids differ here and there
                raise TokenizerError(f"{name}: fastokens is used with GPT-2's splitting pattern only; use tokenizers")
            self.fast = need("fastokens", "fast").Tokenizer.from_json_str(self.library.to_str())

    @functools.cached_property
    def identity(self) -> str:  # type: ignore[override]
        layout = json.loads(self.library.to_str())  # in the library's own form, whatever wrote the file
        parts = [self.eot, *(layout[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model"))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:  # type: ignore[override]
        """Of a byte-level vocabulary. A token with a letter outside of the alphabet stands for itself."""
        tokens = (self.library.id_to_token(id) or "" for id in range(self.n_vocab))
        return [
            bytes(map(BYTES.__getitem__, token)) if BYTES.keys() >= set(token) else token.encode() for token in tokens
        ]

    def encode_reference(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self.library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint16) for encoding in encoded]

    def encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        rows = super().encode_pieces(texts)
        for text, row in zip(texts, rows, strict=True):
            if (row == self.eot).any():
                raise TokenizerError(f"{self.name}: gives its separator's id for the text {text[:40]!r}")
        return rows

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self.byte_level:
            return super().decode_bytes(ids)
        return self.library.decode(self.checked(ids), skip_special_tokens=False).encode()


# ---- tokenizer.json ------------------------------------------------------------------------------------------


def open_json(content: bytes, path: Path, name: str, encoder: str = "tokenizers") -> JsonTokenizer:
    """The tokenizer of a tokenizer.json. Its separator is the end-of-text token that the model names, or a new one."""
    library = read_json(content, path)
    size = library.get_vocab_size()
    eot = choose_separator(library, path)
    text = content.decode() if library.get_vocab_size() == size else library.to_str()
    tokenizer = JsonTokenizer(text, name, eot, encoder)
    if (n := tokenizer.n_vocab) > MAX_IDS:
        raise TokenizerError(f"{path}: has {n:,} ids; at most {MAX_IDS:,} fit into 16 bits; use a smaller one")
    return tokenizer


def read_json(content: bytes, where: str | Path):
    """The library's tokenizer: every text is ordinary text, and nothing is added, cut off or left to chance."""
    library = need("tokenizers", "tokenizers", str(where))
    try:
        tokenizer = library.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exceptions
        what = f"not a tokenizer.json that the library tokenizers can read ({error})"
        remedy = "give the tokenizer.json of a Hugging Face model, or gpt2, or bytes"
        raise TokenizerError(f"{where}: {what}; {remedy}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def choose_separator(library, path: Path) -> int:
    """The id of the document separator: the model's end of text, or `<|endoftext|>` added. No text may contain it."""
    names = [*declared_ends(path.parent), *SEPARATORS]
    known = [name for name in names if library.token_to_id(name) is not None]
    for name in [*known, ENDOFTEXT]:
        library.add_special_tokens([name])
        eot = library.token_to_id(name)
        texts = [name, f"a{name}b", f"a {name} b"]  # some models, such as Unigram, find their own special tokens
        if not any(eot in found.ids for found in library.encode_batch_fast(texts, add_special_tokens=False)):
            return eot
    raise TokenizerError(f"{path}: no token of it can separate documents, because texts can contain all of {known}")


def declared_ends(folder: Path) -> list[str]:
    """The eos_token that the model's files beside tokenizer.json name."""
    names = []
    for path in filter(Path.exists, (folder / "tokenizer_config.json", folder / "special_tokens_map.json")):
        try:
            name = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise TokenizerError(f"{path}: cannot be read ({error}); copy it again, or remove it") from None
        names.append(name.get("content") if isinstance(name, dict) else name)
    return [name for name in names if isinstance(name, str)]


def keeps_every_byte(layout: dict) -> bool:
    """Whether a byte-level tokenizer.json is lossless by construction: no step may drop, add or replace text."""
    model, splits = layout["model"], layout.get("pre_tokenizer") or {"type": None}
    steps = splits["pretokenizers"] if splits["type"] == "Sequence" else [splits]
    return (
        all(map(keeps_text, steps))
        and any(step["type"] == "ByteLevel" for step in steps)
        and not layout.get("normalizer")
        and all(token["special"] for token in layout.get("added_tokens") or [])
        and "merges" in model
        and model["vocab"].keys() >= BYTES.keys()
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
    )


def keeps_text(step: dict) -> bool:
    """Whether a step of splitting gives back the whole text, and nothing else."""
    if step["type"] == "ByteLevel":
        return not step.get("add_prefix_space", True)
    return step["type"] == "Digits" or (step["type"] == "Split" and step["behavior"] != "Removed")


def train_tokenizer(texts: Iterable[str], n_vocab: int) -> str:
    """The text of a tokenizer.json: byte-level BPE with GPT-2's splitting pattern, `<|endoftext|>` as its last id.

    It has fewer than n_vocab ids if too few pairs occur twice. Raises TokenizerError.
    """
    if not 257 <= n_vocab <= MAX_IDS:
        why = "256 bytes and the separator" if n_vocab < 257 else "ids have 16 bits"
        raise TokenizerError(f"a vocabulary of {n_vocab:,} ids cannot be trained ({why}); use 257 to {MAX_IDS:,}")
    library = need("tokenizers", "tokenizers", "training a tokenizer")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=n_vocab - 1, min_frequency=2, initial_alphabet=sorted(BYTES), show_progress=False
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(replace_surrogates(text)[0])), trainer)
    tokenizer.add_special_tokens([ENDOFTEXT])
    return tokenizer.to_str(pretty=True)


# ---- nanoGPT's meta.pkl --------------------------------------------------------------------------------------


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers. Everything else in a pickle has to be imported, which is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it contains code, {module}.{name}")


def read_meta(content: bytes, path: Path) -> list[str]:
    """The characters of nanoGPT's meta.pkl in the order of their ids. Code in the file is not run."""
    remedy = "make it again with nanoGPT's prepare.py"
    try:
        meta = PlainUnpickler(io.BytesIO(content)).load()
        characters = [meta["itos"][i] for i in range(len(meta["itos"]))]
        valid = meta["stoi"] == {character: i for i, character in enumerate(characters)}
        valid = valid and all(len(c) == 1 and not "\ud800" <= c <= "\udfff" for c in characters)
    except Exception as error:  # a damaged pickle can raise any
        what = f"{type(error).__name__}: {error}"
        raise TokenizerError(f"{path}: not nanoGPT's meta.pkl ({what}); no code was run; {remedy}") from None
    if not valid or not 0 < len(characters) <= MAX_IDS:
        what = f"itos and stoi have to map 0, 1, 2 ... to characters and back, at most {MAX_IDS:,}"
        raise TokenizerError(f"{path}: not nanoGPT's meta.pkl: {what}; {remedy}")
    return characters


# ---- checks and pieces ---------------------------------------------------------------------------------------


def need(module: str, extra: str, user: str = ""):
    """Imports an optional library, for the file or key that needs it. Raises TokenizerError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        place = f"{user}: " if user else ""
        raise TokenizerError(f"{place}{module} is not available ({error}); pip install -e '.[{extra}]'") from error


def check_parity(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Raises TokenizerError if fastokens gives other ids than tiktoken or tokenizers on HARD_STRINGS or these texts."""
    reference = "tokenizers" if tokenizer.kind == "bpe" else "tiktoken"
    for text in (*HARD_STRINGS, *texts):
        parts = tokenizer.pieces(text)
        if not all(map(np.array_equal, tokenizer.encode_reference(parts), tokenizer.encode_pieces(parts))):
            what = f"{tokenizer.encoder} has other ids than {reference} for {text[:40]!r}"
            raise TokenizerError(f"{what}; leave fastokens out with --encoder=tiktoken")


def check_round_trip(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Raises TokenizerError for the first text that decode(encode(text)) changes. Not needed if it is lossless."""
    for text in texts:
        text = replace_surrogates(text)[0]
        found = tokenizer.decode(tokenizer.encode(text))
        if found != text:
            at = next(i for i, pair in enumerate(itertools.zip_longest(text, found)) if pair[0] != pair[1])
            raise TokenizerError(
                f"{tokenizer.name}: loses text: in the document {text[:40]!r}, {text[at : at + 20]!r} at character "
                f"{at:,} comes back as {found[at : at + 20]!r}; use gpt2, bytes or a byte-level tokenizer"
            )


def replace_surrogates(text: str) -> tuple[str, int]:
    """(text that UTF-8 can hold, number of lone surrogates in it that became U+FFFD)."""
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError:  # a pair of surrogates becomes the character that it stands for
        valid = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return valid, valid.count("\ufffd") - text.count("\ufffd")


def pieces(text: str) -> list[str]:
    """Cuts a text into parts of about PIECE characters whose ids by GPT-2's pattern together are those of the text."""
    parts, start = [], 0
    while match := CUT.search(text, start + PIECE):
        parts.append(text[start : match.start()])
        start = match.start()
    return [*parts, text[start:]]
