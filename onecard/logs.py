"""Reads the numbers of runs: metrics.jsonl of train.py, nanoGPT's printed log, a CSV (also wandb's export).

    runs, damaged = read_records("train.log", defaults)     # {name: records}, the numbers of lines that were skipped

Records are those of metrics.jsonl: dicts with "kind" and "step". One more kind, "micro", has the loss of one micro
batch, as nanoGPT prints it. A number that is not finite is kept, an absent one is left out.
"""

import ast
import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from configurator import evaluate
from onecard import UserError, metrics

Damaged = list[int]  # numbers of lines
MAX_STEP = 10**9
LOSSES = ("train_loss", "val_loss", "loss")
NUMBER = r"([-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf))"
LOG_EVAL = re.compile(rf"\bstep (\d{{1,9}}): train loss {NUMBER}, val loss {NUMBER}")
LOG_ITER = re.compile(rf"\biter (\d{{1,9}}): loss {NUMBER}, time {NUMBER}ms")
LOG_FILE = re.compile(r"Overriding config with .*:$")
LOG_TOKENS = re.compile(r"tokens per iteration will be: ([\d,]{1,20})\b")
LOG_VOCAB = re.compile(r"found vocab_size = (\d{1,6})\b")
LOG_KEY = re.compile(r"Overriding: (\w+) = (.*)")
LOG_ASSIGNMENT = re.compile(r"(\w+)\s*=\s*(.*)")
COLUMNS = {  # of a CSV, in small letters, without the run's name that wandb puts in front
    "step": "step iter _step iteration global_step trainer/global_step",
    "val_loss": "val_loss val/loss eval/val_loss valid/loss valid_loss validation_loss eval_loss eval/loss val",
    "train_loss": "eval/train_loss train_loss train/loss loss train",
    "loss": "loss train/loss train_loss train_mean train",
    "bits_per_byte": "bits_per_byte eval/bits_per_byte",
    "lr": "lr train/lr learning_rate train/learning_rate",
    "grad_norm": "grad_norm train/grad_norm",
    "ms_per_step": "ms_per_step train/ms_per_step time_ms",
    "tokens": "tokens train/tokens",
    "seconds": "_runtime seconds",
}
RUN_COLUMNS = "run run_name run_id experiment name"
NEEDED = dict(start="config", event="event", samples="texts")  # what a record of this kind has to hold
TYPES: dict[str, type] = dict(config=dict, data=dict, device=str, event=str, texts=list, val_groups=list)
DTYPES = ("float32", "bfloat16", "float16")


class LogError(UserError):
    """A file cannot be read as the numbers of a run."""


def read_records(path: str | Path, defaults: dict) -> tuple[dict[str, list[dict]], Damaged]:
    """Reads a run's folder, its metrics.jsonl, a printed log or a CSV -> {name of a run: its records}, damaged lines.

    A file has one run, named "", or several, if it is a CSV. defaults: the keys of a run of nanoGPT whose log does not
    change them. Raises LogError.
    """
    path = Path(path)
    file = path / metrics.NAME if path.is_dir() else path
    text = read_text(file)
    damaged: Damaged = []
    if file.suffix == ".jsonl":
        runs = {"": list(read_metrics(text, damaged))}
    elif file.suffix in (".csv", ".tsv"):
        runs = read_csv(text, damaged)
    else:
        runs = {"": read_log(text, defaults)}
    if not any(record["kind"] in ("eval", "train", "micro") for records in runs.values() for record in records):
        lines = text.split("\n")
        shown = "; ".join(f"line {i}: {lines[i - 1].strip()[:60]!r}" for i in sorted({1, *damaged})[:2])
        raise LogError(
            f"{file}: no evaluation and no step found ({shown}); give metrics.jsonl, nanoGPT's printed log "
            '("step 500: train loss 5.4, val loss 5.5"), or a CSV with the columns step, and train_loss or val_loss'
        )
    return runs, sorted(set(damaged))


def read_text(file):
    """The text of a file. PowerShell writes a printed log in UTF-16."""
    wanted = "give a run's folder, a printed log, or a CSV"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise LogError(f"{file}: cannot be read ({error.strerror}); {wanted}") from None
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors="replace")
    if "\0" in text:
        raise LogError(f"{file}: a binary file; {wanted}")
    return text


def read_metrics(text: str, damaged: Damaged) -> Iterator[dict]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield checked(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            if number < len(lines):  # the last line may be incomplete while the run writes it
                damaged.append(number)


def checked(record: dict) -> dict:
    """The record, with its step as an integer. Raises ValueError, KeyError, TypeError or OverflowError."""
    step = record["step"]
    if isinstance(step, bool) or not 0 <= step <= MAX_STEP or step != int(step):
        raise ValueError("not a step")
    if NEEDED.get(record["kind"], "step") not in record:
        raise ValueError("incomplete")
    for name, value in record.items():
        if isinstance(value, int) or (name in LOSSES and value is not None):
            float(value)
        if name in TYPES and not isinstance(value, TYPES[name]):
            raise ValueError(f"{name} has another type")
    if not all(isinstance(loss, int | float) and math.isfinite(loss) for loss in record.get("val_groups", [])):
        raise ValueError("losses of groups are not finite")
    data, memory = record.get("data", {}), record.get("planned_memory") or {}
    numbers = [data.get("train_tokens"), data.get("val_tokens"), record.get("planned_hours"), record.get("scale")]
    for number in (*numbers, *memory.values()):
        if isinstance(number, bool) or not isinstance(number, int | float | None) or (number or 0) < 0:
            raise TypeError("not a number from 0 on")
    if record.get("dtype", DTYPES[0]) not in DTYPES or not all(isinstance(t, str) for t in record.get("texts", [])):
        raise ValueError("not a dtype of torch, or not a text")
    return record | dict(step=int(step))


# ---- nanoGPT's printed log


def read_log(text: str, defaults: dict) -> list[dict]:
    """nanoGPT prints its config before the first step. A log that goes back to an earlier step was resumed there."""
    records: list[dict] = []
    config: dict = {}  # printed, and no step since
    in_file = False  # the lines of a config file are being printed
    for line in text.split("\n"):
        line = line.rstrip()
        if record := log_record(line):
            step = record["step"]
            if records and step < records[-1]["step"]:
                records = [earlier for earlier in records if earlier["step"] < step]
            if config:
                records.append(dict(kind="start", step=step, config=config))
            records.append(record)
            config, in_file = {}, False
        elif in_file and (assignment := LOG_ASSIGNMENT.match(line)):
            set_key(config, *assignment.groups())
        elif any(head.match(line) for head in (LOG_FILE, LOG_KEY, LOG_TOKENS, LOG_VOCAB)):
            config, in_file = config or defaults.copy(), bool(LOG_FILE.match(line))
            read_head(config, line)
    return records


def read_head(config, line):
    if key := LOG_KEY.match(line):
        set_key(config, *key.groups())
    elif vocab := LOG_VOCAB.match(line):
        config["vocab_size"] = int(vocab[1])
    elif tokens := LOG_TOKENS.match(line):
        sizes = config["batch_size"], config["block_size"]
        if all(isinstance(size, int) and size > 0 for size in sizes):
            config["gradient_accumulation_steps"] = max(1, int(tokens[1].replace(",", "")) // math.prod(sizes))


def log_record(line):
    """The record of an "iter" or "step" line, None for another line."""
    if found := LOG_EVAL.search(line):
        return dict(kind="eval", step=int(found[1]), train_loss=float(found[2]), val_loss=float(found[3]))
    if found := LOG_ITER.search(line):
        return dict(kind="micro", step=int(found[1]), loss=float(found[2]), ms_per_step=float(found[3]))
    return None


def set_key(config, name, text):
    """Sets a key to the value of a printed expression; to the text itself where nanoGPT printed it without quotes."""
    try:
        config[name] = evaluate(ast.parse(text.strip(), mode="eval").body, config)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # a ConfigError is a ValueError
        if isinstance(config.get(name), str):
            config[name] = text


# ---- CSV


def read_csv(text: str, damaged: Damaged) -> dict[str, list[dict]]:
    """Runs of a CSV: the only one, those of wandb's columns ("run - metric"), or those named in a column."""
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip() and line.lstrip()[0] != "#"]
    header = lines[0][1] if lines else ""
    delimiter = max(",;\t", key=header.count)
    if delimiter not in header:
        delimiter = " "
    rows = []
    for number, line in lines:
        try:
            rows.append((number, next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))))
        except csv.Error:  # a cell of more than 131,072 characters
            damaged.append(number)
    names = [name.strip() for name in rows[0][1]] if rows else []
    small = [name.lower() for name in names]
    kind_column, run_column = position(small, "kind"), position(small, RUN_COLUMNS)
    runs: dict[str, list[dict]] = {}
    for run, columns in columns_of_runs(names).items():
        for number, cells in rows[1:]:
            try:
                record = csv_record(cells, columns, decimal_comma=delimiter == ";")
                if kind_column is not None:
                    record["kind"] = cells[kind_column]
                name = run if run_column is None else cells[run_column].strip()
                runs.setdefault(name, []).append(record)
            except (ValueError, IndexError, KeyError):
                damaged.append(number)
    return {name: records_of_rows(records) for name, records in runs.items()}


def position(names: list[str], wanted: str) -> int | None:
    """Index of the first wanted name that there is."""
    return next((names.index(name) for name in wanted.split() if name in names), None)


def columns_of_runs(names: list[str]) -> dict[str, dict[str, int]]:
    """{run: {our name of a column: its index}}. A column without the name of a run, such as Step, is of all runs."""
    split = [name.lower().rpartition(" - ") for name in names]
    runs = list(dict.fromkeys(name[: len(run)] for name, (run, _, _) in zip(names, split, strict=True) if run))
    found: dict[str, dict[str, int]] = {}
    for run in runs or [""]:
        metrics_of_run = [metric.strip() if of in ("", run.lower()) else "" for of, _, metric in split]
        columns = {ours: position(metrics_of_run, theirs) for ours, theirs in COLUMNS.items()}
        found[run] = {ours: i for ours, i in columns.items() if i is not None}
    return found


def csv_record(cells: list[str], columns: dict[str, int], decimal_comma: bool) -> dict:
    """The numbers of a row; an empty cell is left out. Raises ValueError, or KeyError for a row without a step."""
    record: dict = {}
    for name, index in columns.items():
        cell = cells[index].strip() if index < len(cells) else ""
        if cell.lower() not in ("", "null", "none", "n/a", "-"):
            record[name] = float(cell.replace(",", ".") if decimal_comma else cell)
    return checked(record | dict(kind="row"))


def records_of_rows(rows: list[dict]) -> list[dict]:
    """Rows of a CSV as records: a row with a val loss is an evaluation; the others, and those between, are log lines.

    "nan" is a loss that is not finite; in a column that has it where others leave a cell empty, it is no loss at all.
    """
    for name in COLUMNS:
        finite = [math.isfinite(row[name]) for row in rows if name in row]
        while finite and not finite[-1]:  # a diverged run ends with losses that are not finite
            finite.pop()
        if finite.count(False) > finite.count(True):
            rows = [{k: v for k, v in row.items() if k != name or math.isfinite(v)} for row in rows]
    steps_alone = any("loss" in row and "val_loss" not in row for row in rows)  # the train loss is not an evaluation's
    records = []
    for row in rows:
        kind = row["kind"]
        if "val_loss" in row:
            records.append(row | dict(kind="eval"))
        line = {k: v for k, v in row.items() if k not in ("val_loss", "train_loss", "bits_per_byte")}
        if not steps_alone:
            line.pop("loss", None)
        if kind != "eval" and len(line) > 2:
            records.append(line | dict(kind="micro" if kind == "iter" else "train"))
    return records
