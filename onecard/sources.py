"""Where text comes from: parquet files here or on the hub, .jsonl, .json, .txt and .md files; and their rows.

    files = find_files(["fineweb/", "hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet"])
    source, units = examine(files[0], {"text_column": "text"}, shard_bytes=467_000_000)

A source is identified by its content. A unit is one contiguous range of its rows, which rows.py reads. The one thing to
know: units are planned from the file alone, of a parquet file from its footer, so the same file has the same units.
"""

import glob
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from onecard.durable import sha256_of
from onecard.remote import DamagedError, SourceError, hub, open_file, reading
from onecard.rows import describe_json, kind_of, read_texts

SUFFIXES = (".parquet", *(f".{kind}{pack}" for kind in ("jsonl", "json", "txt", "md") for pack in ("", ".gz", ".zst")))
FORMATS = ".parquet, .jsonl, .json, .txt or .md (the last four also .gz or .zst)"
UNITS, LEAST_UNIT = 16, 4_000_000  # of a file, so that a small one uses all cores; bytes of text
SMALL_FILE = 1_000_000  # bytes; smaller text files share a shard, because a window never crosses the end of a shard
CHECKED_BYTES = 100_000_000  # text files below this are read once more before any work, to find bytes that are not text
JSON_BYTES = 1 << 30  # a larger .json file is refused, because it is read as a whole
STATE = ".prepare"  # the folder in a dataset with the plan, the records and the locks
OUTPUT = ("manifest.json", "tokenizer.json")  # never text


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


def find_hub(name):
    """The parquet files of an hf:// path (a file, folder or glob)."""
    with reading(name):
        if not glob.has_magic(name) and hub().isdir(name):
            name = name.rstrip("/") + "/**/*.parquet"
        return [f"hf://{path}" for path in sorted(hub().glob(name)) if path.endswith(".parquet")]


def examine(path: str, settings: dict, shard_bytes: float) -> tuple[dict, list[dict]]:
    """(source, its units) of one file: what identifies it, and its ranges of text. settings: of the dataset.

    A unit has about a sixteenth of the text of its file, but at least LEAST_UNIT and at most shard_bytes.

    The id is a hash of a parquet file's footer, or of a text file's content. Raises SourceError or DamagedError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, column = kind_of(path), settings["text_column"]
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
        parts = min(max(1, round(size / most)), max(1, rows))
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


def check_texts(path: str, column: str, size: int, whole: bool) -> None:
    """Reads a text file, the whole of it or up to its first text.

    Raises DamagedError if it is damaged, SourceError if there is no text in the objects of a JSON file.
    """
    if kind_of(path) == "json" and size > JSON_BYTES:
        raise SourceError(f"{path}: larger than {JSON_BYTES >> 30} GiB; write one object per line to a .jsonl file")
    has_text, has_rows = False, False
    for positions, values in read_texts(path, {"range": [0, None]}, {"text_column": column}, {}):
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
