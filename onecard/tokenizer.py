"""GPT-2's vocabulary: text to ids and back. Read from data/gpt2.tiktoken; nothing is downloaded.

    tokenizer = load_tokenizer()
    ids = tokenizer.encode("Hello")  # uint16; `<|endoftext|>` in a text is ordinary text
    text = tokenizer.decode(ids)

The ids are tiktoken's; `load_tokenizer("fastokens")` gives the same several times faster. The one thing to know: a long
text is encoded in pieces, cut where no token spans the cut. So memory is bounded and a million spaces are no problem.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken

from onecard import UserError

INSTALLED = Path(__file__).resolve().parent / "data" / "gpt2.tiktoken"  # where `pip install .` puts it
VOCABULARY = INSTALLED if INSTALLED.exists() else Path(__file__).resolve().parent.parent / "data" / "gpt2.tiktoken"
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
ENDOFTEXT = "<|endoftext|>"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
FAST_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's own: the same

# A run of white space begins a token. So does its last character if a word follows, because the two are one token.
# A text can be cut at both places without a change of ids. (Python's \s has four characters more than SPACE.)
SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
CUT = re.compile(f"(?<!{SPACE})(?={SPACE})|(?<={SPACE})(?={SPACE}[^{SPACE[1:]})")
PIECE = 1 << 17  # characters; tiktoken fails on a run of a million spaces

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
    "a" * 5000 + " " * 5000 + "b" + "\n" * 5000 + "c",
    "!" * 3000 + "_" * 3000 + "0" * 3000,
)


class TokenizerError(UserError):
    """The vocabulary or the encoder cannot be used."""


def load_tokenizer(encoder: str = "tiktoken") -> Tokenizer:
    """GPT-2's tokenizer. encoder: tiktoken or fastokens. Raises TokenizerError."""
    remedy = "restore it with git checkout data/gpt2.tiktoken, or install onecard again"
    try:
        content = VOCABULARY.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{VOCABULARY}: {error.strerror}; {remedy}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != VOCABULARY_SHA256:
        raise TokenizerError(f"{VOCABULARY}: damaged (SHA-256 {found[:12]}...); {remedy}")
    return Tokenizer(content, encoder)


class Tokenizer:
    """Encodes and decodes. `name`, `n_vocab`, `eot` (the document separator) and `sha256` identify the vocabulary."""

    name, n_vocab, eot, sha256 = "gpt2", 50257, 50256, VOCABULARY_SHA256

    def __init__(self, content: bytes, encoder: str):
        self.content, self.encoder = content, encoder
        self.fast = fast_encoding() if encoder == "fastokens" else None

    @functools.cached_property
    def reference(self) -> tiktoken.Encoding:
        """tiktoken's encoding. With fastokens it is needed to decode only."""
        lines = (line.split() for line in self.content.splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        special = {ENDOFTEXT: self.eot}
        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> np.ndarray:
        """str -> uint16 (n,). A lone surrogate, which UTF-8 cannot hold, is encoded as U+FFFD."""
        return np.concatenate(self.encode_pieces(pieces(replace_surrogates(text)[0])))

    def encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        """[str] -> [uint16 (n,)], each text by itself. Longer texts than `pieces` gives are slow, or fail."""
        if self.fast is None:
            encode = self.reference.encode_to_numpy
            return [encode(text, disallowed_special=()).astype(np.uint16) for text in texts]
        ids, offsets = self.fast.encode_batch_flat(texts, split_special_tokens=True)
        ids = np.frombuffer(ids, dtype="<u4").astype(np.uint16)
        return np.split(ids, np.frombuffer(offsets, dtype="<u8").astype(np.int64)[1:-1])

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> str. Bytes that are not UTF-8, such as half a character at an end, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> bytes. Raises TokenizerError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            raise TokenizerError(f"ids {min(ids)} to {max(ids)}: GPT-2's vocabulary has 0 to {self.n_vocab - 1}")
        return self.reference.decode_bytes(ids)


def fast_encoding():
    """fastokens' tokenizer of the same vocabulary. Raises TokenizerError if the package is not installed."""
    try:
        import fastokens
    except ImportError as error:
        raise TokenizerError(f"fastokens is not available ({error}); pip install -e '.[fast]'") from error
    return fastokens.Tokenizer.from_tiktoken(str(VOCABULARY), pattern=FAST_PATTERN)


def check_parity(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Raises TokenizerError if the encoder differs from tiktoken on HARD_STRINGS or on one of these texts."""
    for text in (*HARD_STRINGS, *texts):
        parts = pieces(text)
        expected = [tokenizer.reference.encode_to_numpy(part, disallowed_special=()) for part in parts]
        found = tokenizer.encode_pieces(parts)
        if not all(map(np.array_equal, expected, found)):
            raise TokenizerError(f"{tokenizer.encoder} gives other ids than tiktoken for {text[:40]!r}; use tiktoken")


def replace_surrogates(text: str) -> tuple[str, int]:
    """(text that UTF-8 can hold, number of lone surrogates in it that became U+FFFD)."""
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError:  # a pair of surrogates becomes the character that it stands for
        valid = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return valid, valid.count("\ufffd") - text.count("\ufffd")


def pieces(text: str) -> list[str]:
    """Cuts a text into parts of about PIECE characters whose ids together are the ids of the text."""
    parts, start = [], 0
    while match := CUT.search(text, start + PIECE):
        parts.append(text[start : match.start()])
        start = match.start()
    return [*parts, text[start:]]
