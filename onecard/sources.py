"""Where text comes from: parquet, .jsonl, .json, .txt and .md files, here or in a store, and how a file is cut.

    files = find_files(["fineweb/", "hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet"])
    source, units = examine(files[0], {"text_column": "text"}, shard_bytes=467_000_000)

A source is identified by its content. A unit is one contiguous range of its rows, which rows.py reads. The one thing to
know: units are planned from the file alone, of a parquet file from its footer, so the same file has the same units.
"""

import glob
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onecard.durable import sha256_of
from onecard.records import STATE
from onecard.remote import DamagedError, RefusedError, SourceError, connect, is_remote, open_file, reading, retried
from onecard.rows import column_of, has_lines, kind_of, open_text, read_texts
from onecard.where import parse_where

SUFFIXES = (".parquet", *(f".{kind}{pack}" for kind in ("jsonl", "json", "txt", "md") for pack in ("", ".gz", ".zst")))
FORMATS = ".parquet, .jsonl, .json, .txt or .md (the last four also .gz or .zst)"
UNITS, LEAST_UNIT = 16, 4_000_000  # of a file, so that a small one uses all cores; bytes of text
GROUP_PARTS = 4  # of a row group, at most, unless it is larger than as many shards: each part reads from its beginning
SMALL_FILE = 1_000_000  # bytes; smaller text files share a shard, because a window never crosses the end of a shard
CHECKED_BYTES = 100_000_000  # text files below this are read once more before any work, to find bytes that are not text
JSON_BYTES = 1 << 30  # a larger .json file is refused, because it is read as a whole
OUTPUT = ("manifest.json", "tokenizer.json")  # never text
TAIL_BYTES = 1 << 16  # read of a parquet file at first; a longer footer is a second request
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def find_files(inputs: Sequence[str]) -> list[str]:
    """The files behind files, folders and globs, in order. Raises SourceError, with a line for each problem."""
    files, problems = [], []
    for name in inputs:
        try:
            found = find_remote(name) if is_remote(name) else find_local(name)
        except SourceError as error:
            problems.append(str(error))
            continue
        if not found and (is_remote(name) or os.path.isdir(name)):
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


def find_local(name: str) -> list[str]:
    """A file, the matches of a glob, or the files below a folder."""
    path = Path(name)
    if path.is_dir():
        below = (p for p in sorted(path.rglob("*")) if p.name.lower().endswith(SUFFIXES) and is_input(p, path))
        return only_parquet(name, [p.as_posix() for p in below])
    found = [path] if path.is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
    return [p.as_posix() for p in found]


def only_parquet(name: str, files: list[str]) -> list[str]:
    """The parquet files below a folder; if it has none, all its files."""
    found = [path for path in files if kind_of(path) == "parquet"] or files
    if len(found) < len(files):
        print(f"  {name}: has parquet files, so its {len(files) - len(found)} other files are left out")
    return found


def is_input(path, folder):
    """Whether a path below a folder is an input: a file that is not hidden, not in a dataset, and not made by us."""
    below = path.relative_to(folder)
    hidden = any(part.startswith(".") for part in below.parts)
    datasets = (parent for parent in below.parents if parent.name and (folder / parent / STATE).is_dir())
    return not hidden and path.name not in OUTPUT and path.is_file() and not any(datasets)


def find_remote(name: str) -> list[str]:
    """A file, the matches of a glob, or the files below a folder of a store."""
    if name.lower().endswith(SUFFIXES) and not glob.has_magic(name):
        return [name]
    system, folder = connect(name)
    depth, pattern = sys.maxsize, None
    if glob.has_magic(name):
        from fsspec.utils import glob_translate

        path, pattern = folder, re.compile(glob_translate(folder))
        folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        depth = path.count("/") - folder.count("/") if "**" not in path else depth
    found = []
    for file in walk(system, name, folder, depth):
        chosen = pattern.match(file) if pattern else "/." not in file[len(folder) :]  # nothing hidden
        if chosen and file.lower().endswith(SUFFIXES):
            found.append(system.unstrip_protocol(file))
    return sorted(found) if pattern else only_parquet(name, sorted(found))


def walk(system: Any, name: str, folder: str, depth: int) -> Iterator[str]:
    """The files down to this depth. (fsspec's own find and glob pass over folders that cannot be listed.)"""
    for entry in retried(name, lambda: system.ls(folder, detail=True)):
        if entry["type"] != "directory":
            yield entry["name"]
        elif depth > 1:
            yield from walk(system, name, entry["name"], depth - 1)


def examine(path: str, settings: dict, shard_bytes: float) -> tuple[dict, list[dict]]:
    """(source, its units) of one file: what identifies it, and its ranges of text. settings: of the dataset.

    A unit has about a sixteenth of the text of its file, but at least LEAST_UNIT and at most shard_bytes. The id is a
    hash of a parquet file's footer, or of a text file's content. Threads may call this. Raises SourceError for a
    mistake, DamagedError for a file that cannot be read.
    """
    try:
        with reading(path), open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            footer = read_footer(path, file, size) if kind_of(path) == "parquet" else b""
            file.seek(0)
            digest = hashlib.sha256(footer).hexdigest() if footer else sha256_of(file)
        source = {"path": path, "bytes": size, "id": f"{size:x}-{digest}"}
        if footer:
            rows, groups = examine_footer(path, footer, settings)
            return source | {"rows": rows}, cut_groups(groups, shard_bytes) if rows else []
        units = cut_bytes(path, size, shard_bytes)
        whole = "files" in units[0] or (kind_of(path) in ("txt", "md") and size < CHECKED_BYTES)
        check_texts(path, settings, size, whole)
        return source, units
    except RefusedError as error:
        raise SourceError(str(error)) from error


def read_footer(path: str, file: Any, size: int) -> bytes:
    """The footer of a parquet file to its end, in one or two requests."""
    file.seek(max(0, size - TAIL_BYTES))
    tail = file.read(TAIL_BYTES)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or length > size:
        raise DamagedError(f"{path}: cannot be read (no parquet footer); if it is cut short or damaged, copy it again")
    if length > len(tail):
        file.seek(size - length)
        tail = file.read(length)
    return tail[-length:]


def examine_footer(path: str, footer: bytes, settings: dict) -> tuple[int, list[tuple[int, int]]]:
    """(rows, [(rows, bytes of the text column before compression)] of the row groups). Checks the columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path):
        metadata = pq.read_metadata(pa.BufferReader(footer))
        schema = metadata.schema.to_arrow_schema()
    column, where = settings["text_column"], parse_where(settings.get("where", ""))
    for name, option in ((column, "--text_column="), *((name, "--where=") for name in (where.names if where else ()))):
        count = schema.names.count(name) or schema.names.count(name.split(".")[0])
        if count == 0:
            raise SourceError(f"{path}: no column {name!r} in {', '.join(schema.names)}; choose one with {option}")
        if count > 1:
            raise DamagedError(f"{path}: has {count} columns {name!r}; rename all but one")
    try:
        empty = schema.empty_table()
        kind = column_of(empty, column).type
        if where:
            where.rows({name: column_of(empty, name) for name in where.names})
    except pa.ArrowException as error:
        fields = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise SourceError(f"{path}: {error}; check --text_column and --where; its columns are {fields}") from error
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind).partition("[")[0] not in TEXT_TYPES:
        raise SourceError(f"{path}: column {column!r} holds {kind}, not text; choose another with --text_column=")
    columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return metadata.num_rows, [
        (group.num_rows, group.column(columns.index(column)).total_uncompressed_size) for group in groups
    ]


def unit_bytes(text_bytes: int, shard_bytes: float) -> float:
    """The size of a unit of a file with so much text."""
    return min(max(text_bytes / UNITS, LEAST_UNIT), shard_bytes)


def cut_groups(groups: list[tuple[int, int]], shard_bytes: float) -> list[dict]:
    """Units of about equal size, near the target of unit_bytes. A larger row group is cut by its rows.

    groups: [(rows, bytes of the text column before compression)] of the row groups, from the footer.
    """
    total = sum(size for _, size in groups)
    most = unit_bytes(total, shard_bytes)
    target = total / max(1, round(total / most))
    units: list[dict] = []
    row, joins = 0, False  # joins: the last unit is of whole row groups
    for number, (rows, size) in enumerate(groups):
        parts = max(1, min(round(size / most), max(GROUP_PARTS, round(size / shard_bytes)), rows))
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
    parts = max(1, round(size / unit_bytes(size, shard_bytes)))
    ends = [size * part // parts for part in range(parts + 1)]
    return [{"range": [start, stop], "bytes": stop - start} for start, stop in itertools.pairwise(ends)]


def check_texts(path: str, settings: dict, size: int, whole: bool) -> None:
    """Reads a text file, the whole of it or up to its first text.

    Raises DamagedError if it is damaged, SourceError if there is no text in the objects of a JSON file.
    """
    column, where = settings["text_column"], parse_where(settings.get("where", ""))
    with reading(path):
        lines = kind_of(path) == "jsonl" or (kind_of(path) == "json" and has_lines(path))
    if kind_of(path) == "json" and not lines and size > JSON_BYTES:
        raise SourceError(f"{path}: larger than {JSON_BYTES >> 30} GiB; write one object per line to a .jsonl file")
    keys = json_keys(path) if kind_of(path) in ("json", "jsonl") else []
    shown = f"its keys are {', '.join(keys)[:200]}" if keys else "its content has no objects and no strings"
    for name in where.names if where else ():
        if not lines:
            raise SourceError(f"{path}: has no columns for --where; leave out the file, or --where")
        if name.split(".")[-1] not in keys:
            raise SourceError(f"{path}: has no {name!r}, which --where names; {shown}")
    has_text, has_rows = False, False
    for _, values in read_texts(path, {"range": [0, None]}, settings, {}):
        has_rows = has_rows or len(values) > 0
        has_text = has_text or any(value is not None for value in values)
        if has_text and not whole:
            return
    if has_rows and not has_text:
        raise SourceError(f"{path}: no text in {column!r}; {shown}; name a key with --text_column=")


def json_keys(path: str) -> list[str]:
    """The keys at the beginning of a JSON file."""
    with reading(path), open_text(path) as file:
        keys = re.findall(rb'"([^"\\]{1,40})"\s*:', file.read(1 << 20))
    return list(dict.fromkeys(key.decode("utf-8", "replace") for key in keys))
