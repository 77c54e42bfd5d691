"""The rows of one unit of a file of text: parquet, .jsonl, .json, .txt and .md.

for positions, values in read_texts(path, unit, {"text_column": "text"}, skipped): ...
"""

import contextlib
import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onecard.remote import DamagedError, open_file, reading

BATCH_BYTES = 1 << 20  # of text in a batch of rows, about
TXT_BYTES = 8192  # a document of a .txt file ends at the first blank line after this many bytes
HUB_TRIES = 5  # in addition to those of huggingface_hub
TEXT_KEYS = ("text", "content", "body", "value")  # of a message in a chat export
AUTHOR_KEYS = ("from", "sender", "sender_name", "role", "user")


def kind_of(path: str) -> str:
    """The format of a file by its name: "parquet", "jsonl", "json", "txt" or "md", compressed or not."""
    return path.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]


@contextlib.contextmanager
def open_text(path):
    """A text file as its uncompressed bytes."""
    import pyarrow as pa

    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower())
    with open_file(path) as plain:
        yield io.BufferedReader(pa.input_stream(plain, compression)) if compression else plain


def read_texts(path: str, unit: dict, settings: dict, skipped: dict) -> Iterator[tuple[Sequence[int], list]]:
    """The rows of a unit in batches: (positions, values).

    A value is bytes, str or None. Its position is its row in a parquet file, its byte in a text. Raises DamagedError.
    """
    column = settings["text_column"]
    if "row_groups" in unit:
        yield from read_parquet(path, unit, column)
        return
    positions, values, size = [], [], 0
    start, stop = unit.get("range", (0, None))
    if kind_of(path) == "json":
        rows = read_json(path, column)
    elif kind_of(path) == "jsonl":
        rows = read_jsonl(path, start, stop, column)
    else:
        rows = read_txt(path, start, stop)
    with reading(path):
        for position, value in rows:
            positions.append(position)
            values.append(value)
            size += len(value or "")
            if size > BATCH_BYTES:
                yield positions, values
                positions, values, size = [], [], 0
        yield positions, values


def read_parquet(path, unit, column):
    """Reads row group by row group. If a connection to the hub breaks, it continues after the last row that it gave."""
    row, tries = unit["rows"][0], 0
    while True:
        try:
            with reading(path), open_file(path) as file:
                for rows, values in parquet_batches(file, path, unit, column, row):
                    yield rows, values
                    row, tries = rows.stop, 0
            return
        except DamagedError:
            tries += 1
            if not path.startswith("hf://") or tries > HUB_TRIES:
                raise
            time.sleep(2**tries)


def parquet_batches(file, path, unit, column, start):
    """(range of rows, values) of a unit's rows, from row `start` on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    remote = path.startswith("hf://")
    buffer_size = 0 if remote else 1 << 20
    parquet = pq.ParquetFile(file, pre_buffer=remote, buffer_size=buffer_size, page_checksum_verification=True)
    (first, last), (_, stop) = unit["row_groups"], unit["rows"]
    row = sum(parquet.metadata.row_group(group).num_rows for group in range(first))
    rows_per_batch = max(1, min(1024, BATCH_BYTES * (stop - unit["rows"][0]) // max(1, unit["bytes"])))
    for group in range(first, last):
        end = row + parquet.metadata.row_group(group).num_rows
        if end <= start:
            row = end
            continue
        batches = parquet.iter_batches(rows_per_batch, row_groups=[group], columns=[column], use_threads=False)
        for batch in batches:  # without threads: for one column they only cost memory
            begin, finish = max(row, start), min(row + len(batch), stop)
            if begin < finish:
                texts = batch.column(0)[begin - row : finish - row]
                texts = texts.dictionary_decode() if isinstance(texts, pa.DictionaryArray) else texts
                values = texts.cast(pa.large_binary()).to_pylist()
                yield range(begin, finish), values
            row += len(batch)


def read_lines(path, start, stop):
    """(position, line) of the lines that begin in these bytes."""
    with open_text(path) as file:
        if start:
            file.seek(start - 1)
            start += len(file.readline()) - 1
        while (stop is None or start < stop) and (line := file.readline()):
            yield start, line if start else line.removeprefix(b"\xef\xbb\xbf")
            start += len(line)


def read_jsonl(path, start, stop, column):
    for position, line in read_lines(path, start, stop):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            value = found.get(column)
            plain = isinstance(value, str) or (value is None and column in found)
            texts = [value] if plain else documents_in(found, column) or [None]
        except (ValueError, AttributeError, RecursionError) as error:
            raise DamagedError(f"{path}: the line at byte {position:,} is not a JSON object ({error})") from error
        if value is not None and texts == [None]:
            raise DamagedError(f"{path}: {column!r} in the line at byte {position:,} is not text")
        for text in texts:
            yield position, text


def read_json(path, column):
    """(number, text) of the documents of a .json file: a list of strings or objects, an object with a list, lines."""
    with open_text(path) as file:
        content = file.read()
    try:
        try:
            found = json.loads(content)
        except ValueError:
            found = [json.loads(line) for line in content.splitlines() if line.strip()]
        strings = isinstance(found, list) and all(isinstance(item, str) for item in found)
        texts = found if strings else documents_in(found, column)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is not JSON ({error}); check that the file is complete") from error
    yield from enumerate(texts or [None])


def documents_in(value: Any, column: str) -> list[str]:
    """The documents in a JSON value: texts of objects, and chats, whose messages become lines "name: text".

    A chat is a list of objects of which one has an author. A long one is cut into several documents. An object
    without a text may contain one list or object with texts. Without any text: [].
    """
    if isinstance(value, dict):
        if text := text_of(value, column):
            return [text]
        if isinstance(tree := value.get("mapping"), dict):  # ChatGPT's: the messages are nodes of a tree
            return documents_in([node.get("message") for node in tree.values() if isinstance(node, dict)], column)
        found = list(filter(None, (documents_in(part, column) for part in value.values())))
        return found[0] if len(found) == 1 else []  # of several lists none is chosen
    objects = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    messages = [(author_of(item), text) for item in objects if (text := text_of(item, column))]
    if any(author for author, _ in messages):
        chat = "\n".join(f"{author}: {text}" if author else text for author, text in messages)
        return list(cut_text(chat, TXT_BYTES))
    return [text for item in objects for text in documents_in(item, column)]


def text_of(item: dict, column: str) -> str | None:
    """The text of an object that is not empty: a string or a list of parts."""
    for key in TEXT_KEYS if column == "text" else (column,):
        value = item.get(key)
        parts = value.get("parts") if isinstance(value, dict) else value
        parts = parts if isinstance(parts, list) else [parts]
        parts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if text := "".join(part for part in parts if isinstance(part, str)):
            return text
    return None


def author_of(item: dict) -> str | None:
    """Who wrote a message. An author that is text is no sign of a chat: articles have that too."""
    author = item.get("author")
    if isinstance(author, dict):
        return author.get("name") or author.get("role")
    return next((item[key] for key in AUTHOR_KEYS if isinstance(item.get(key), str)), None)


def describe_json(path):
    """What is in a JSON file without text, for the message."""
    with open_text(path) as file:
        keys = re.findall(rb'"([^"\\]{1,40})"\s*:', file.read(1 << 16))
    names = ", ".join(dict.fromkeys(key.decode("utf-8", "replace") for key in keys[:100]))
    return f"keys are {names[:200]}" if names else "content has no objects and no strings"


def cut_text(text: str, size: int) -> Iterator[str]:
    """Cuts a text into parts of `size` to 2 * `size` characters, at a blank line, a line end, a space or anywhere."""
    start = 0
    while len(text) - start > 2 * size:
        for mark in (r"\n\s*\n", r"\n", r"\s", ""):
            if found := re.compile(mark).search(text, start + size, start + 2 * size):
                break
        yield text[start : found.end()]
        start = found.end()
    if start < len(text):
        yield text[start:]


def read_txt(path, start, stop):
    """Documents of a .txt file: whole lines, up to the first blank one after TXT_BYTES, or to 8 x TXT_BYTES."""
    lines, size = [], 0
    for position, line in read_lines(path, start, stop):
        lines.append(line)
        size += len(line)
        if size >= (8 if line.strip() else 1) * TXT_BYTES:
            yield position + len(line) - size, b"".join(lines)
            lines, size = [], 0
    if lines:
        yield position + len(line) - size, b"".join(lines)
