"""What the tests of prepare.py and its rooms share: texts, files of them, and what is in a dataset."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onecard.rows import read_texts
from onecard.shards import open_tokens
from onecard.sources import examine
from onecard.tokenizer import load_tokenizer
from onecard.units import in_val

WORDS = ["the", "of", "and", "quick", "1234", "naïve", "—", "''", "don't", "<|endoftext|>", "日本", "\n\n", "", "x"]


def some_texts(count, seed=0, words=60):
    """`count` different texts of 1 to 2 * `words` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 2 * words))) + f" {seed}.{i}" for i in range(count)]


def write_parquet(path, texts, row_group_size=20, token_count=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"text": texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())}
    columns |= {"token_count": token_count} if token_count else {}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, **options)
    return path


def strings_of_bytes(contents):
    """A string column of any bytes, UTF-8 or not."""
    return pa.Array.from_buffers(pa.string(), len(contents), pa.array(contents, pa.binary()).buffers())


def rows_of(path, shard_bytes=1e9, skipped=None, **settings):
    """[(position, value)] of all units of a file, and the number of units."""
    name, settings = str(path), {"text_column": "text"} | settings
    _, units = examine(name, settings, shard_bytes)
    skipped = {} if skipped is None else skipped
    batches = [batch for unit in units for batch in read_texts(name, unit, settings, skipped)]
    return [row for positions, values in batches for row in zip(positions, values, strict=True)], len(units)


def files_of(folder):
    """{name: bytes} of a dataset, without the folder .prepare."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


def documents_of(folder, split):
    """[ids] of each document of a split, in the order of the shards; each begins with 50256."""
    documents = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        tokens = np.array(open_tokens(path))
        starts = np.flatnonzero(tokens == 50256)
        assert starts[0] == 0
        documents += [ids.tolist() for ids in np.split(tokens, starts[1:])]
    return documents


def expected_documents(texts, split, val_fraction=0.005):
    """The same from tiktoken's own encoding of the texts."""
    encode = load_tokenizer().reference.encode_ordinary
    chosen = [text for text in texts if in_val(text.encode(), val_fraction) == (split == "val")]
    return [[50256, *encode(text)] for text in chosen]
