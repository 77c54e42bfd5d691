"""Where text comes from: parquet files here or on the hub, .jsonl and .txt files. Which there are, and their rows.

    files = find_files(["fineweb/", "hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet"])
    source, units = examine(files[0], column="text", shard_bytes=467_000_000)
    for positions, values, group_end in read_texts(files[0], units[0], "text"): ...

A source is known by its content, a unit is one contiguous range of its rows. The one thing to know: a unit is planned
from a file's footer alone and read by itself, in batches of about BATCH_BYTES, so memory does not grow with a file.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
BATCH_BYTES = 1 << 20  # of text, about, that a reader holds at a time
TXT_BYTES = 8192  # a document of a .txt file ends at the first blank line after so many bytes
HUB_TRIES = 5  # on top of those that huggingface_hub itself makes


class SourceError(ValueError):
    """An input that cannot be taken: which, why, and what to do."""


class DamagedError(SourceError):
    """A file that cannot be read: it is left out, the others are prepared, and the exit code is 1."""


# ---- which files -------------------------------------------------------------------------------------------


def find_files(inputs):
    """The files that the inputs stand for, in order. Raises SourceError with a line for each that is none."""
    files, problems = [], []
    for name in inputs:
        try:
            found = find_hub(name) if name.startswith("hf://") else find_local(name)
        except DamagedError as error:
            problems.append(str(error))
            continue
        if not found:
            problems.append(f"{name}: no such file, or a folder without any; it takes {', '.join(SUFFIXES)}")
        problems += [f"{path}: not one of {', '.join(SUFFIXES)}" for path in found if not path.endswith(SUFFIXES)]
        files += found
    if problems:
        raise SourceError("\n".join(problems))
    return files


def find_local(name):
    """A file, the matches of a glob, or all below a folder: its parquet files if there are any."""
    path, found = Path(name), sorted(map(Path, glob.glob(name, recursive=True)))
    if path.is_dir():
        below = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES))
        found = [p for p in below if p.suffix == ".parquet"] or below
    return [p.as_posix() for p in ([path] if path.is_file() else found)]


def find_hub(name):
    """The parquet files of an hf:// path (a file, folder or glob)."""
    with reading(name):
        if not glob.has_magic(name) and hub().isdir(name):
            name = name.rstrip("/") + "/**/*.parquet"
        return [f"hf://{path}" for path in sorted(hub().glob(name)) if path.endswith(".parquet")]


def hub():
    """Hugging Face's file system: it reads ranges of files, and tries again by itself."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise SourceError("hf:// paths need huggingface_hub; pip install -e '.[hub]'") from error
    return HfFileSystem()


def open_file(path):
    return hub().open(path, "rb") if path.startswith("hf://") else open(path, "rb")


@contextlib.contextmanager
def reading(path):
    """Makes a DamagedError that names the file out of whatever its reading raises."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        remote = path.startswith("hf://")
        if not remote and not isinstance(error, OSError | pa.ArrowException):  # (a hub client's differ by version)
            raise
        remedy = "check its name and the network" if remote else "it is cut short or damaged: copy it again"
        raise DamagedError(f"{path}: cannot be read ({error}); {remedy}") from error


def examine(path, column, shard_bytes):
    """(source, its units) of one file: what identifies it, and its ranges of about shard_bytes each.

    A parquet file is known by its size and footer, a text file by its content; never by its name. Raises
    SourceError if there is no text in it, DamagedError if it cannot be read.
    """
    with reading(path), open_file(path) as file:
        size, footer_bytes = file.seek(0, os.SEEK_END), None
        if path.endswith(".parquet"):
            parquet = pq.ParquetFile(file)
            file.seek(size - 8)
            footer_bytes = int.from_bytes(file.read(4), "little") + 8
        file.seek(size - (footer_bytes or size))
        source = {"path": path, "bytes": size, "id": f"{size:x}-{digest(file)}"}
    if not footer_bytes:
        return source, cut_bytes(path, size, shard_bytes)
    if column not in parquet.schema_arrow.names:
        names = ", ".join(parquet.schema_arrow.names)
        raise SourceError(f"{path}: no column {column!r} among {names}; name the text by --text_column=")
    kind = parquet.schema_arrow.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in ("string", "large_string", "string_view"):
        raise SourceError(f"{path}: column {column!r} holds {kind}, not text; name another by --text_column=")
    return source | {"rows": parquet.metadata.num_rows}, cut_groups(text_sizes(parquet.metadata, column), shard_bytes)


def digest(file):
    """Hex SHA-256 of an open file from its position on."""
    sha256 = hashlib.sha256()
    while chunk := file.read(1 << 20):
        sha256.update(chunk)
    return sha256.hexdigest()


def text_sizes(metadata, column):
    """[(rows, bytes of the text column before compression)] of a footer's row groups."""
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [(g.num_rows, g.column(names.index(column)).total_uncompressed_size) for g in groups]


def cut_groups(groups, shard_bytes):
    """Units of about equal size, near shard_bytes; a row group that is larger is cut by its rows."""
    total = sum(size for _, size in groups)
    target = total / max(1, round(total / shard_bytes))
    units, row, joins = [], 0, False
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


def cut_bytes(path, size, shard_bytes):
    """Units of a text file: the lines that begin in a range of bytes; a compressed file is one unit."""
    if path.endswith((".gz", ".zst")):
        return [{"range": [0, None], "bytes": 3 * size}]  # 3: a usual ratio; only for the bar and the estimate
    parts = max(1, round(size / shard_bytes))
    ends = [size * part // parts for part in range(parts + 1)]
    return [{"range": [start, stop], "bytes": stop - start} for start, stop in itertools.pairwise(ends)]


# ---- what is in a file -------------------------------------------------------------------------------------


def read_texts(path, unit, column):
    """The rows of a unit in batches of about BATCH_BYTES: (positions, values, end of a row group or None).

    A value is bytes, str or None; its position is its row in a parquet file, its byte in a text file. Raises
    DamagedError.
    """
    if "row_groups" in unit:
        yield from read_parquet(path, unit, column)
        return
    positions, values, size = [], [], 0
    with reading(path):
        for position, value in (read_jsonl if ".jsonl" in path else read_txt)(path, *unit["range"], column):
            positions.append(position)
            values.append(value)
            size += len(value or "")
            if size > BATCH_BYTES:
                yield positions, values, position + 1
                positions, values, size = [], [], 0
        yield positions, values, None


def read_parquet(path, unit, column):
    """Row group by row group; from the hub each is fetched whole, and again where the connection fails."""
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
    """(range of rows, values, end of the row group or None) of a unit's rows from `start` on."""
    remote = path.startswith("hf://")
    parquet = pq.ParquetFile(
        file, pre_buffer=remote, buffer_size=0 if remote else 1 << 20, page_checksum_verification=True
    )
    (first, last), (_, stop) = unit["row_groups"], unit["rows"]
    row = sum(parquet.metadata.row_group(group).num_rows for group in range(first))
    rows_a_batch = max(1, min(1024, BATCH_BYTES * (stop - unit["rows"][0]) // max(1, unit["bytes"])))
    for group in range(first, last):
        end = row + parquet.metadata.row_group(group).num_rows
        if end <= start:
            row = end
            continue
        batches = parquet.iter_batches(rows_a_batch, row_groups=[group], columns=[column], use_threads=False)
        for batch in batches:  # (one column: a thread for it would only hold memory of its own)
            begin, finish = max(row, start), min(row + len(batch), stop)
            if begin < finish:
                texts = batch.column(0)[begin - row : finish - row]
                texts = texts.dictionary_decode() if isinstance(texts, pa.DictionaryArray) else texts
                values = texts.cast(pa.large_binary()).to_pylist()
                yield range(begin, finish), values, group + 1 if finish == min(end, stop) else None
            row += len(batch)


def read_lines(path, start, stop):
    """(position, line) of the lines that begin in these bytes."""
    compression = "gzip" if path.endswith(".gz") else "zstd" if path.endswith(".zst") else None
    with open_file(path) as plain:
        file = io.BufferedReader(pa.input_stream(plain, compression)) if compression else plain
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
            value = json.loads(line).get(column)
        except (ValueError, AttributeError) as error:
            raise DamagedError(f"{path}: the line at byte {position:,} is no JSON object ({error})") from error
        if not isinstance(value, str | None):
            raise DamagedError(f"{path}: {column!r} in the line at byte {position:,} is no text")
        yield position, value


def read_txt(path, start, stop, _):
    """Documents of a .txt file: whole lines, to the first blank one after TXT_BYTES, or any after 8 x TXT_BYTES."""
    lines, size = [], 0
    for position, line in read_lines(path, start, stop):
        lines.append(line)
        size += len(line)
        if size >= (8 if line.strip() else 1) * TXT_BYTES:
            yield position + len(line) - size, b"".join(lines)
            lines, size = [], 0
    if lines:
        yield position + len(line) - size, b"".join(lines)


def token_count(path, first, last, start, stop):
    """The sum of the column token_count over some rows of a parquet file; None where there is none."""
    try:
        with reading(path), open_file(path) as file:
            parquet = pq.ParquetFile(file)
            if "token_count" not in parquet.schema_arrow.names:
                return None
            skipped = sum(parquet.metadata.row_group(group).num_rows for group in range(first))
            column = parquet.read_row_groups(range(first, last), columns=["token_count"]).column(0)
            return sum(filter(None, column.slice(start - skipped, stop - start).to_pylist()))
    except DamagedError:
        return None
