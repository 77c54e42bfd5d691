"""GPT-2's vocabulary: text to ids and back. Read from data/gpt2.tiktoken in this repository; nothing is downloaded.

    tokenizer = load_tokenizer()
    ids = tokenizer.encode("Hello")  # uint16; `<|endoftext|>` in a text is ordinary text
    text = tokenizer.decode(ids)

The ids are tiktoken's. `load_tokenizer("fastokens")` gives the same ids several times faster, if that package is
installed. The one thing to know: a long text is cut where no token can reach over the cut, so memory stays bounded
and a million spaces cost no more than a million letters.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

import numpy as np
import tiktoken

VOCABULARY = Path(__file__).resolve().parent.parent / "data" / "gpt2.tiktoken"
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
ENDOFTEXT = "<|endoftext|>"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
FAST_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's own: the same

# A run of white space begins a new token, and so does its last character when something follows: that one goes with
# the word behind it. At both places a text can be cut without changing any id. (Python's \s has four more.)
SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
CUT = re.compile(f"(?<!{SPACE})(?={SPACE})|(?<={SPACE})(?={SPACE}[^{SPACE[1:]})")
PIECE = 1 << 17  # characters: far below the run of white space at which tiktoken gives up

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


class TokenizerError(ValueError):
    """The vocabulary or the encoder cannot be used: why, and what to do."""


def load_tokenizer(encoder="tiktoken"):
    """GPT-2's Tokenizer; `encoder` is tiktoken or fastokens. Raises TokenizerError."""
    try:
        content = VOCABULARY.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"{VOCABULARY}: {error.strerror}; it is part of the repository: git checkout {VOCABULARY.name}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != VOCABULARY_SHA256:
        raise TokenizerError(f"{VOCABULARY}: damaged (SHA-256 {found[:12]}...); restore it: git checkout data")
    return Tokenizer(content, encoder)


class Tokenizer:
    """Encodes and decodes; `name`, `n_vocab` (50257), `eot` (50256) and `sha256` identify the vocabulary."""

    name, n_vocab, eot, sha256 = "gpt2", 50257, 50256, VOCABULARY_SHA256

    def __init__(self, content, encoder):
        self.content, self.encoder = content, encoder
        self.fast = fast_encoding() if encoder == "fastokens" else None

    @functools.cached_property
    def reference(self):
        """tiktoken's Encoding; fastokens needs it for decoding only."""
        pairs = (line.split() for line in self.content.splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        special = {ENDOFTEXT: self.eot}
        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text):
        """str -> uint16 (n,). Lone surrogates, which no UTF-8 can hold, are taken as U+FFFD."""
        return np.concatenate(self.encode_pieces(pieces(mend(text)[0])))

    def encode_pieces(self, texts):
        """[str] -> [uint16 (n,)]: each text by itself; none longer than what `pieces` gives."""
        if self.fast is None:
            encode = self.reference.encode_to_numpy
            return [encode(text, disallowed_special=()).astype(np.uint16) for text in texts]
        ids, offsets = self.fast.encode_batch_flat(texts, split_special_tokens=True)
        ids = np.frombuffer(ids, dtype="<u4").astype(np.uint16)
        return np.split(ids, np.frombuffer(offsets, dtype="<u8").astype(np.int64)[1:-1])

    def decode(self, ids):
        """Ids -> str; bytes that are not UTF-8 (half a character at an end) come out as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """Ids -> bytes. Raises TokenizerError for an id beyond the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.n_vocab:
            raise TokenizerError(f"ids {min(ids)} to {max(ids)} are not all GPT-2's 0 to {self.n_vocab - 1}")
        return self.reference.decode_bytes(ids)


def fast_encoding():
    """fastokens' tokenizer of the same vocabulary. Raises TokenizerError where the package is not installed."""
    try:
        import fastokens
    except ImportError as error:
        raise TokenizerError(f"fastokens cannot be used ({error}); pip install -e '.[fast]'") from error
    return fastokens.Tokenizer.from_tiktoken(str(VOCABULARY), pattern=FAST_PATTERN)


def check_parity(tokenizer, texts):
    """Raises TokenizerError if the fast encoder differs from tiktoken on HARD_STRINGS or on one of these texts."""
    for text in (*HARD_STRINGS, *texts):
        parts = pieces(text)
        expected = [tokenizer.reference.encode_to_numpy(part, disallowed_special=()) for part in parts]
        found = tokenizer.encode_pieces(parts)
        if not all(map(np.array_equal, expected, found)):
            raise TokenizerError(f"{tokenizer.encoder} gives other ids than tiktoken, first for {text[:40]!r}")


def mend(text):
    """(text that UTF-8 can hold, lone surrogates replaced by U+FFFD)."""
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError:  # pairs of surrogates become the character that they mean
        mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return mended, mended.count("\ufffd") - text.count("\ufffd")


def pieces(text):
    """Cuts a long text where its ids are those of the parts: [str], about PIECE characters each."""
    parts, start = [], 0
    while len(text) - start > PIECE:
        match = CUT.search(text, start + PIECE)
        if match is None:
            break
        parts.append(text[start : match.start()])
        start = match.start()
    return [*parts, text[start:]]
