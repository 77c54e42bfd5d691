"""The rows of one unit of a file: parquet, .jsonl, .json, .txt and .md, here or in a store.

    skipped = {}  # counts what is left out, by reason
    for positions, values in read_texts(path, unit, {"text_column": "text", "where": "score > 0.9"}, skipped): ...

The one thing to know: rows are read in batches of about BATCH_BYTES of text, so memory does not grow with the file.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onecard.documents import TXT_BYTES, documents_in, value_at
from onecard.remote import DamagedError, is_remote, open_file, reading
from onecard.where import parse_where

BATCH_BYTES = 1 << 20  # of text in a batch of rows, about


def kind_of(path: str) -> str:
    """The format of a file by its name: "parquet", "jsonl", "json", "txt" or "md", compressed or not."""
    return path.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]


@contextlib.contextmanager
def open_text(path: str) -> Iterator[io.BufferedIOBase]:
    """A text file as its uncompressed bytes."""
    import pyarrow as pa

    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower())
    with open_file(path) as plain:
        if compression:
            yield io.BufferedReader(pa.input_stream(plain, compression))
        else:
            yield io.BufferedReader(plain, BATCH_BYTES) if is_remote(path) else plain


def read_texts(path: str, unit: dict, settings: dict, skipped: dict) -> Iterator[tuple[list, list]]:
    """The rows of a unit in batches: (positions, values). settings: of the dataset; skipped: reason -> rows left out.

    A value is a str, in which there may be lone surrogates, or None. Its position is its row in a parquet file, its
    byte in a text. Raises DamagedError if the file cannot be read; for a row that cannot be used too, unless
    settings["skip_bad_rows"].
    """

    def bad(position: int, reason: str, cause: object) -> None:
        if not settings.get("skip_bad_rows"):
            place = f"row {position:,}" if "row_groups" in unit else f"the line at byte {position:,}"
            remedy = "correct it" if reason != "not UTF-8" else "save it as UTF-8 text"
            remedy += ", or leave such rows out with --skip_bad_rows=True"
            raise DamagedError(f"{path}: {place} is {reason} ({cause}); {remedy}")
        skipped[reason] = skipped.get(reason, 0) + 1

    start, stop = unit.get("range", (0, None))
    with reading(path):
        if "row_groups" in unit:
            yield from in_batches(read_parquet(path, unit, settings, skipped, bad))
        elif kind_of(path) == "json" and not has_lines(path):
            yield from in_batches(read_json(path, settings["text_column"]))
        elif kind_of(path) in ("json", "jsonl"):
            yield from in_batches(read_jsonl(path, start, stop, settings, skipped, bad))
        else:
            yield from in_batches(read_txt(path, start, stop, bad))


def in_batches(rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[list, list]]:
    positions, values, size = [], [], 0
    for position, value in rows:
        positions.append(position)
        values.append(value)
        size += 100 + len(value or "")  # a row takes memory without text too
        if size > BATCH_BYTES:
            yield positions, values
            positions, values, size = [], [], 0
    yield positions, values


# ---- parquet -----------------------------------------------------------------------------------------------


def read_parquet(path: str, unit: dict, settings: dict, skipped: dict, bad: Callable) -> Iterator:
    """(row, text) of the rows of a unit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where, ((first, last), (start, stop)) = parse_where(settings.get("where", "")), (unit["row_groups"], unit["rows"])
    columns = [settings["text_column"], *(where.names if where else ())]
    rows_per_batch = max(1, min(1024, BATCH_BYTES * (stop - start) // max(1, unit["bytes"])))
    with open_file(path) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=BATCH_BYTES, page_checksum_verification=True)
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(first))
        for group in range(first, last):
            batches = parquet.iter_batches(rows_per_batch, row_groups=[group], columns=columns, use_threads=False)
            for batch in batches:  # without threads: for one column they only cost memory
                positions: Any = range(max(row, start), min(row + len(batch), stop))
                part = batch.slice(max(row, start) - row, max(0, len(positions)))
                row += len(batch)
                texts = column_of(part, columns[0])
                if where and len(part):
                    chosen = where.rows({name: column_of(part, name) for name in where.names})
                    skipped["where"] = skipped.get("where", 0) + len(part) - len(chosen)
                    positions, texts = [positions[i] for i in chosen], texts.take(pa.array(chosen, pa.int64()))
                texts = texts.dictionary_decode() if isinstance(texts, pa.DictionaryArray) else texts
                for position, value in zip(positions, texts.cast(pa.large_binary()).to_pylist(), strict=True):
                    try:
                        yield position, None if value is None else value.decode("utf-8", "surrogatepass")
                    except UnicodeDecodeError as error:
                        bad(position, "not UTF-8", error.reason)
                if row >= stop:
                    return


def column_of(table: Any, name: str) -> Any:
    """A column of a pyarrow batch, or a field of one: meta.text."""
    import pyarrow.compute as pc

    if name in table.schema.names:
        return table.column(name)
    column, *fields = name.split(".")
    return pc.struct_field(table.column(column), fields)


# ---- lines -------------------------------------------------------------------------------------------------


def read_lines(path: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(position, line) of the lines that begin in these bytes."""
    with open_text(path) as file:
        if start:
            file.seek(start - 1)
            start += len(file.readline()) - 1
        while (stop is None or start < stop) and (line := file.readline()):
            yield start, line if start else line.removeprefix(b"\xef\xbb\xbf")
            start += len(line)


def read_txt(path: str, start: int, stop: int | None, bad: Callable) -> Iterator[tuple[int, str]]:
    """Documents of a .txt file: whole lines, up to the first blank one after TXT_BYTES, or to 8 x TXT_BYTES."""
    lines: list[str] = []
    size = begin = 0
    for position, line in read_lines(path, start, stop):
        begin = begin if lines else position
        try:
            lines.append(line.decode("utf-8", "surrogatepass"))
            size += len(line)
        except UnicodeDecodeError as error:
            bad(position, "not UTF-8", f"{error.reason} {error.start:,} bytes after it")
        if size >= (8 if line.strip() else 1) * TXT_BYTES:
            yield begin, "".join(lines)
            lines, size = [], 0
    if lines:
        yield begin, "".join(lines)


def read_jsonl(path: str, start: int, stop: int | None, settings: dict, skipped: dict, bad: Callable) -> Iterator:
    """(position, text) of JSON objects, one a line."""
    column, where = settings["text_column"], parse_where(settings.get("where", ""))
    for positions, lines in in_batches(read_lines(path, start, stop)):
        objects = []
        for position, line in zip(positions, lines, strict=True):
            try:
                if line.strip():
                    objects.append((position, as_object(line)))
            except (ValueError, RecursionError) as error:
                bad(position, "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON", error)
        for position, found in choose_objects(objects, where, skipped, bad) if where else objects:
            value = value_at(found, column)
            plain = isinstance(value, str) or (value is None and column in found)
            try:
                texts: list = [value] if plain else documents_in(found, column) or [None]
            except RecursionError as error:
                bad(position, "nested too deep", error)
                continue
            if value is not None and texts == [None]:
                bad(position, "not text", f"{type(value).__name__} in {column!r}")
            else:
                yield from ((position, text) for text in texts)


def as_object(line: bytes) -> dict:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"{type(found).__name__} in place of an object")
    return found


def choose_objects(objects: list[tuple[int, dict]], where: Any, skipped: dict, bad: Callable) -> list:
    """The objects that --where takes. The others are counted."""
    import pyarrow as pa

    try:
        columns = {name: pa.array([value_at(found, name) for _, found in objects]) for name in where.names}
        chosen = [objects[row] for row in where.rows(columns)]
    except (pa.ArrowException, OverflowError) as error:  # a key has values of several types: one line after another
        if len(objects) > 1:
            return [chosen for one in objects for chosen in choose_objects([one], where, skipped, bad)]
        bad(objects[0][0], "not comparable", error)
        return []
    skipped["where"] = skipped.get("where", 0) + len(objects) - len(chosen)
    return chosen


# ---- a JSON file -------------------------------------------------------------------------------------------


def has_lines(path: str) -> bool:
    """Whether a .json file has an object in each line, as a .jsonl file has."""
    with open_text(path) as file:
        try:
            as_object(file.readline(16 * BATCH_BYTES))
            return any(line.strip() for line in file)
        except (ValueError, RecursionError):
            return False


def read_json(path: str, column: str) -> Iterator[tuple[int, str | None]]:
    """(number, text) of the documents of a .json file: a list of strings or objects, or an object with a list."""
    with open_text(path) as file:
        content = b"".join(iter(lambda: file.read(BATCH_BYTES), b""))  # a store's own read of all is not repeated
    try:
        found = json.loads(content)
        strings = isinstance(found, list) and all(isinstance(item, str) for item in found)
        texts = found if strings else documents_in(found, column)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is not JSON, or nested too deep ({error}); is it complete?") from error
    yield from enumerate(texts or [None])
