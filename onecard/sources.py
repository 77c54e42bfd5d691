"""Where text comes from: parquet files here or on the hub, .jsonl, .json, .txt and .md files; and their rows.

    files = find_files(["fineweb/", "hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet"])
    source, units = examine(files[0], column="text", shard_bytes=467_000_000)
    for positions, values, group_end in read_texts(files[0], units[0], "text"): ...

A source is identified by its content. A unit is one contiguous range of its rows. The one thing to know: units are
planned from a file's footer alone, and read in batches of about BATCH_BYTES, so memory does not grow with the file.
"""

import contextlib
import glob
import io
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onecard import UserError
from onecard.durable import sha256_of

SUFFIXES = (".parquet", *(f".{kind}{pack}" for kind in ("jsonl", "json", "txt", "md") for pack in ("", ".gz", ".zst")))
FORMATS = ".parquet, .jsonl, .json, .txt or .md (the last four also .gz or .zst)"
BATCH_BYTES = 1 << 20  # of text in a batch of rows, about
TXT_BYTES = 8192  # a document of a .txt file ends at the first blank line after this many bytes
SMALL_FILE = 1_000_000  # bytes; smaller text files share a shard, because a window never crosses the end of a shard
CHECKED_BYTES = 100_000_000  # text files below this are read once more before any work, to find bytes that are not text
JSON_BYTES = 1 << 30  # a larger .json file is refused, because it is read as a whole
STATE = ".prepare"  # the folder in a dataset with the plan, the records and the locks
OUTPUT = ("manifest.json", "tokenizer.json")  # never text
HUB_TRIES = 5  # in addition to those of huggingface_hub
TEXT_KEYS = ("text", "content", "body", "value")  # of a message in a chat export
AUTHOR_KEYS = ("from", "sender", "sender_name", "role", "user")


class SourceError(UserError):
    """An input that cannot be used: which, why, and what to do."""


class DamagedError(SourceError):
    """A file that cannot be read. The other files are still prepared, and the exit code is 1."""


def find_files(inputs: Sequence[str]) -> list[str]:
    """The files behind files, folders, globs and hf:// paths, in order. Raises SourceError, a line for each problem."""
    files, problems = [], []
    for name in inputs:
        try:
            found = find_hub(name) if name.startswith("hf://") else find_local(name)
        except DamagedError as error:
            problems.append(str(error))
            continue
        if not found and os.path.isdir(name):
            problems.append(f"{name}: no file in this folder ends in {FORMATS}, besides datasets and hidden files")
        elif not found:
            problems.append(f"{name}: no such file or folder; check the name")
        for path in found:
            if not path.lower().endswith(SUFFIXES):
                problems.append(f"{path}: does not end in {FORMATS}; leave it out, or convert it to .txt")
        files += found
    if problems:
        raise SourceError("\n".join(problems))
    return files


def find_local(name):
    """A file, the matches of a glob, or the files below a folder: only its parquet files if it has any."""
    path = Path(name)
    if not path.is_dir():
        found = [path] if path.is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
    else:
        below = [p for p in sorted(path.rglob("*")) if p.name.lower().endswith(SUFFIXES) and is_input(p, path)]
        found = [p for p in below if kind_of(p.name) == "parquet"] or below
        if len(found) < len(below):
            print(f"  {name}: has parquet files, so its {len(below) - len(found)} other files are left out")
    return [p.as_posix() for p in found]


def is_input(path, folder):
    """Whether a path below a folder is an input: a file that is not hidden, not in a dataset, and not made by us."""
    below = path.relative_to(folder)
    hidden = any(part.startswith(".") for part in below.parts)
    datasets = (parent for parent in below.parents if parent.name and (folder / parent / STATE).is_dir())
    return not hidden and path.name not in OUTPUT and path.is_file() and not any(datasets)


def kind_of(path: str) -> str:
    """The format of a file by its name: "parquet", "jsonl", "json", "txt" or "md", compressed or not."""
    return path.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]


def find_hub(name):
    """The parquet files of an hf:// path (a file, folder or glob)."""
    with reading(name):
        if not glob.has_magic(name) and hub().isdir(name):
            name = name.rstrip("/") + "/**/*.parquet"
        return [f"hf://{path}" for path in sorted(hub().glob(name)) if path.endswith(".parquet")]


def hub():
    """Hugging Face's file system. It reads ranges of files and repeats failed requests."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise SourceError("hf:// paths need huggingface_hub: pip install -e '.[hub]'") from error
    return HfFileSystem()


def open_file(path):
    return hub().open(path, "rb") if path.startswith("hf://") else open(path, "rb")


@contextlib.contextmanager
def open_text(path):
    """A text file as its uncompressed bytes."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower())
    with open_file(path) as plain:
        yield io.BufferedReader(pa.input_stream(plain, compression)) if compression else plain


@contextlib.contextmanager
def reading(path):
    """Turns an error of the body, which reads a file, into a DamagedError that names the file."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        remote = path.startswith("hf://")
        if not remote and not isinstance(error, OSError | pa.ArrowException):  # the hub client's differ by version
            raise
        remedy = "check its name and the network" if remote else "if it is cut short or damaged, copy it again"
        raise DamagedError(f"{path}: cannot be read ({error}); {remedy}") from error


def examine(path: str, column: str, shard_bytes: float) -> tuple[dict, list[dict]]:
    """(source, its units) of one file: what identifies it, and its ranges of about shard_bytes of text each.

    The id is a hash of a parquet file's footer, or of a text file's content. Raises SourceError or DamagedError.
    """
    kind = kind_of(path)
    with reading(path), open_file(path) as file:
        size, start = file.seek(0, os.SEEK_END), 0
        if kind == "parquet":
            parquet = pq.ParquetFile(file)
            file.seek(size - 8)
            start = size - 8 - int.from_bytes(file.read(4), "little")  # of the footer
        file.seek(start)
        source = {"path": path, "bytes": size, "id": f"{size:x}-{sha256_of(file)}"}
    if kind != "parquet":
        units = cut_bytes(path, size, shard_bytes)
        check_texts(path, column, size, "files" in units[0] or (kind in ("txt", "md") and size < CHECKED_BYTES))
        return source, units
    names = parquet.schema_arrow.names
    if column not in names:
        raise SourceError(f"{path}: no column {column!r} in {', '.join(names)}; choose one with --text_column=")
    if names.count(column) > 1:
        raise DamagedError(f"{path}: has {names.count(column)} columns {column!r}; rename all but one")
    kind = parquet.schema_arrow.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise SourceError(f"{path}: column {column!r} holds {kind}, not text; choose another with --text_column=")
    columns = [parquet.metadata.schema.column(i).path for i in range(parquet.metadata.num_columns)]
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    sizes = [(g.num_rows, g.column(columns.index(column)).total_uncompressed_size) for g in groups]
    return source | {"rows": parquet.metadata.num_rows}, cut_groups(sizes, shard_bytes)


def cut_groups(groups: list[tuple[int, int]], shard_bytes: float) -> list[dict]:
    """Units of about equal size, near shard_bytes. A larger row group is cut by its rows.

    groups: [(rows, bytes of the text column before compression)] of the row groups, from the footer.
    """
    total = sum(size for _, size in groups)
    target = total / max(1, round(total / shard_bytes))
    units: list[dict] = []
    row, joins = 0, False  # joins: the last unit is of whole row groups
    for number, (rows, size) in enumerate(groups):
        parts = min(max(1, round(size / shard_bytes)), max(1, rows))
        if parts == 1 and joins and units[-1]["bytes"] + size / 2 <= target:
            units[-1]["row_groups"][1], units[-1]["rows"][1] = number + 1, row + rows
            units[-1]["bytes"] += size
        else:
            ends = [row + rows * part // parts for part in range(parts + 1)]
            for start, stop in itertools.pairwise(ends):
                units.append({"row_groups": [number, number + 1], "rows": [start, stop], "bytes": size // parts})
        joins, row = parts == 1, row + rows
    return units


def cut_bytes(path: str, size: int, shard_bytes: float) -> list[dict]:
    """Units of a text file: the lines that begin in a range of bytes. A .json or compressed file is one unit.

    A small file is one unit that the plan may join with others: its entry "files" counts them.
    """
    compressed = path.lower().endswith((".gz", ".zst"))
    text_bytes = 3 * size if compressed else size  # compressed to a third, about: for the estimate
    if size < min(SMALL_FILE, shard_bytes / 2):
        return [{"files": 1, "bytes": text_bytes}]
    if compressed or kind_of(path) == "json":
        return [{"range": [0, None], "bytes": text_bytes}]
    parts = max(1, round(size / shard_bytes))
    ends = [size * part // parts for part in range(parts + 1)]
    return [{"range": [start, stop], "bytes": stop - start} for start, stop in itertools.pairwise(ends)]


def check_texts(path: str, column: str, size: int, whole: bool) -> None:
    """Reads a text file, the whole of it or up to its first text.

    Raises DamagedError if it is damaged, SourceError if there is no text in the objects of a JSON file.
    """
    if kind_of(path) == "json" and size > JSON_BYTES:
        raise SourceError(f"{path}: larger than {JSON_BYTES >> 30} GiB; write one object per line to a .jsonl file")
    has_text, has_rows = False, False
    for positions, values, _ in read_texts(path, {"range": [0, None]}, column):
        for position, value in zip(positions, values, strict=True):
            has_text, has_rows = has_text or value is not None, True
            try:
                if isinstance(value, bytes):
                    value.decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                at = position + error.start
                raise DamagedError(f"{path}: byte {at:,} is not UTF-8; save it as UTF-8 text") from error
        if has_text and not whole:
            return
    if has_rows and not has_text:
        raise SourceError(f"{path}: no text in {column!r}; its {describe_json(path)}; name a key with --text_column=")


def read_texts(path: str, unit: dict, column: str) -> Iterator[tuple[Sequence[int], list, int | None]]:
    """The rows of a unit in batches: (positions, values, end of a row group or None).

    A value is bytes, str or None. Its position is its row in a parquet file, its byte in a text. Raises DamagedError.
    """
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
                yield positions, values, position + 1
                positions, values, size = [], [], 0
        yield positions, values, None


def read_parquet(path, unit, column):
    """Reads row group by row group. If a connection to the hub breaks, it continues after the last row that it gave."""
    row, tries = unit["rows"][0], 0
    while True:
        try:
            with reading(path), open_file(path) as file:
                for rows, values, group_end in parquet_batches(file, path, unit, column, row):
                    yield rows, values, group_end
                    row, tries = rows.stop, 0
            return
        except DamagedError:
            tries += 1
            if not path.startswith("hf://") or tries > HUB_TRIES:
                raise
            time.sleep(2**tries)


def parquet_batches(file, path, unit, column, start):
    """(range of rows, values, end of the row group or None) of a unit's rows, from row `start` on."""
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
                yield range(begin, finish), values, group + 1 if finish == min(end, stop) else None
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
