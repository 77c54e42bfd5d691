"""What .prepare in a dataset holds: the plan, a record of each unit that is done, val parts. How far a long task is.

    plan = read_plan(folder)
    records, problems = read_records(plan, folder)
    append_record(record, folder)

records.jsonl has one line a unit; a later line of a unit replaces an earlier one. The one thing to know: plan and
records have a checksum, so that a file or a line that was edited or cut is named and never used.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from onecard import UserError
from onecard.durable import replacing, sha256_of
from onecard.jsonfiles import ShardError, check, count, parse, read_json, refusals, sealed, text, write_json
from onecard.shards import MANIFEST, SHARD, SOURCE, TOKENIZER, ShardWriter, layout, open_tokens, read_manifest
from onecard.tokenizer import FILE

STATE = ".prepare"  # the folder in a dataset with all that this module reads and writes, and the lock
PLAN, RECORDS = "plan.json", "records.jsonl"
LINE_SECONDS = 30  # between two lines of progress where there is no terminal for a bar
COUNTS = {"documents": count, "tokens": count, "replaced": count, "skipped": {"null": count, "empty": count}}
RECORD = {"unit": count, "source": count, "bytes": count, "encoder": text, **COUNTS, "shards": [SHARD]}


class PrepareError(UserError):
    """Inputs or settings that cannot become a dataset: which, why, and what to do."""


def fraction(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def place(value: object) -> bool:
    """[first, last]; the last of a compressed text is not known."""
    return isinstance(value, list) and len(value) == 2 and count(value[0]) and (value[1] is None or count(value[1]))


SETTINGS = {"text_column": text, "val_fraction": fraction, "shard_tokens": count}
PLAN_FORM = {"settings": SETTINGS, "sources": [SOURCE], "units": [{"source": count, "bytes": count}]}


# ---- the plan ------------------------------------------------------------------------------------------------


def read_plan(folder: Path) -> dict | None:
    """The plan of a dataset, or None if it has none. Raises ShardError if the file is damaged."""
    remedy = f"delete {folder} and prepare all its files again"
    return read_json(folder / STATE / PLAN, plan_fits, remedy)


def plan_fits(plan):
    check(plan, PLAN_FORM)
    if "tokenizer" in plan["settings"]:
        check(plan["settings"]["tokenizer"], TOKENIZER, "tokenizer")
    for unit in plan["units"]:
        for name in unit.keys() & {"rows", "row_groups", "range"}:
            check(unit[name], place, name)
        if unit["source"] + unit.get("files", 1) > len(plan["sources"]):
            raise ValueError("a unit has no source")
    return bool(plan["units"])


def stamp(folder: Path) -> tuple[int, ...] | None:
    """What changes whenever the plan is written; None without a plan."""
    try:
        found = os.stat(folder / STATE / PLAN)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def write_plan(plan: dict, content: str, before: tuple[int, ...] | None, folder: Path) -> None:
    """Writes the plan and the dataset's tokenizer.json. before: the stamp of the plan that this one was made from.

    Raises PrepareError if another process has changed the plan since, unless it has made the same.
    """
    there = read_plan(folder)
    if there != plan and stamp(folder) != before:
        raise PrepareError(f"{folder}: another process has changed its plan; run this command again")
    path = folder / FILE
    if content and not (path.exists() and path.read_bytes() == content.encode()):
        with refusals(path), replacing(path) as file:
            file.write(content.encode())
    if there != plan:
        write_json(folder / STATE / PLAN, plan)


# ---- the records ---------------------------------------------------------------------------------------------


def load_records(folder: Path) -> tuple[dict[int, dict], list[str]]:
    """({unit: record}, a line for each record that is damaged or that the manifest needs)."""
    problems, found = [], {}
    for path in sorted((folder / STATE).glob("unit_*.json")):  # of datasets that are older than records.jsonl
        try:
            record = read_json(path, record_fits, "prepare.py makes its unit again")
            found[record["unit"]] = record
        except ShardError as error:
            problems.append(str(error))
    path = folder / STATE / RECORDS
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines[:-1], 1):  # after the last line end is what a killed process began to write
        try:
            record = parse(line, record_fits)
            found[record["unit"]] = record
        except ValueError as error:
            problems.append(f"{path}: line {number} is damaged ({error}); prepare.py makes its unit again")
    manifest = read_manifest(folder) or {"shards": []}
    if len(lost := units_of(manifest) - found.keys()) > len(problems):
        some = ", ".join(map(str, sorted(lost)[:9]))
        problems.append(f"{path}: has no record of units {some}; prepare.py makes them again")
    return found, problems


def read_records(plan: dict, folder: Path) -> tuple[dict[int, dict], list[str]]:
    """({unit: record} of the units that are done and whose files are there, problems of others)."""
    found, problems = load_records(folder)
    for number, record in list(found.items()):
        if problem := not_done(record, plan, folder):
            problems.append(f"unit {number} is prepared again: {problem}")
            del found[number]
    return found, problems


def record_fits(record):
    check(record, RECORD)
    for name in ("documents", "tokens"):
        if record[name] != sum(shard[name] for shard in record["shards"]):
            raise ValueError(f"{name} is not the sum of the shards")
    return True


def not_done(record: dict, plan: dict, folder: Path) -> str:
    """Why a unit with this record has to be prepared again, or ""."""
    if record["unit"] >= len(plan["units"]):
        return f"{folder / STATE / PLAN} has no such unit"
    unit = plan["units"][record["unit"]]
    if any(record.get(name) != unit.get(name) for name in ("source", "bytes", "files")):
        return "files were added to it"
    try:
        for shard in record["shards"]:
            if layout(folder / shard["name"])[1] != shard["tokens"]:
                return f"{folder / shard['name']}: not the size that was written"
    except ShardError as error:
        return str(error)
    return ""


def units_of(manifest: dict) -> set[int]:
    """The units that a manifest names by their train shards, train_000123.bin."""
    names = [shard["name"] for shard in manifest["shards"]]
    return {int(name[6:-4]) for name in names if name.startswith("train_") and name[6:-4].isdigit()}


def append_record(record: dict, folder: Path) -> None:
    """Adds a line to records.jsonl: with it the unit is done. Raises ShardError if the system refuses the write."""
    path = folder / STATE / RECORDS
    with refusals(path), open(path, "ab") as file:
        file.write(json.dumps(sealed(record)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_records(records: Iterable[dict], folder: Path) -> None:
    """Writes records.jsonl with one line a unit. The files of older datasets, one a unit, are removed."""
    path = folder / STATE / RECORDS
    with refusals(path), replacing(path) as file:
        for record in records:
            file.write(json.dumps(sealed(record)).encode() + b"\n")
    for old in (folder / STATE).glob("unit_*.json"):
        old.unlink(missing_ok=True)


# ---- the val split -------------------------------------------------------------------------------------------


def join_val(records: dict[int, dict], shard_tokens: int, folder: Path) -> list[dict]:
    """Joins the val parts of the units, in order, into shards of at most shard_tokens. Returns their manifest entries.

    A shard has the name of its first unit. One that is in the manifest with the same parts is kept.
    """
    groups: list[list[tuple[int, dict]]] = []
    size = shard_tokens
    for number, record in sorted(records.items()):
        for part in record["shards"]:
            if part["name"].startswith(STATE):  # not a shard of the dataset
                if size + part["tokens"] > shard_tokens:
                    groups.append([])
                    size = 0
                groups[-1].append((number, part))
                size += part["tokens"]
    known = {shard["name"]: shard for shard in (read_manifest(folder) or {"shards": []})["shards"]}
    entries = []
    for group in groups:
        parts = [part for _, part in group]
        entry = {"name": f"val_{group[0][0]:06d}.bin", "split": "val", "units": [group[0][0], group[-1][0]]}
        entry |= {name: sum(part[name] for part in parts) for name in ("documents", "text_bytes", "tokens")}
        path, old = folder / entry["name"], known.get(entry["name"], {})
        if entry.items() <= old.items() and path.exists() and layout(path)[1] == entry["tokens"]:
            entries.append(entry | {"sha256": old["sha256"]})
        else:
            (folder / MANIFEST).unlink(missing_ok=True)  # the dataset is incomplete until it is written again
            entries.append(entry | {"sha256": join_parts(parts, path)})
    return entries


def join_parts(parts: list[dict], path: Path) -> str:
    """Writes a shard from parts. Returns its SHA-256. Raises ShardError for a part that is not what was written."""
    with ShardWriter(path) as shard:
        for part in parts:
            place = path.parent / part["name"]
            with open(place, "rb") as file:
                if sha256_of(file) != part["sha256"]:
                    raise ShardError(f"{place}: damaged: its SHA-256 is another; delete it and run prepare.py again")
            shard.write(open_tokens(place))
    return shard.sha256


# ---- progress ------------------------------------------------------------------------------------------------


def amount(number: float, unit: str = "B") -> str:
    """1234567 -> "1.23 MB"."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}".strip()
        number /= 1000
    return f"{number:.3g} T{unit}"


class Progress:
    """A bar on a terminal, elsewhere a line every LINE_SECONDS. It is shown by update(), which may add nothing."""

    def __init__(self, total: float, what: str, unit: str = "B"):
        self.total, self.what, self.unit, self.done, self.tokens = total, what, unit, 0, 0
        self.started = self.shown = time.monotonic()
        from tqdm import tqdm  # here, because each worker process imports this module

        self.bar = tqdm(total=int(total), unit=unit, unit_scale=True, desc=f"  {what}", disable=None, leave=False)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.bar.close()

    def update(self, size: int = 0, tokens: int = 0) -> None:
        self.done += size
        self.tokens += tokens
        now = time.monotonic()
        rate = f"{self.tokens / max(now - self.started, 1e-3) / 1e6:.2f}M tokens/s" if self.tokens else ""
        self.bar.set_postfix_str(rate, refresh=False)
        self.bar.update(size)
        if not self.bar.disable and now - self.shown > 1:
            self.shown = now
            self.bar.refresh()
        if self.bar.disable and now - self.shown > LINE_SECONDS:
            self.shown = now
            done, total = (amount(n) if self.unit == "B" else f"{n:,}" for n in (self.done, self.total))
            print(f"  {self.what} {done} of {total}{self.unit.strip('B')}  {rate}".rstrip(), flush=True)
