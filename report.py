"""Reports on a run from its numbers, as sentences and a page of plots; or compares two runs.

    python report.py out/run                             (writes out/run/report.html; --watch=60 repeats it)
    python report.py out/a out/b                         (compares them, by groups of the same val windows)
    python report.py train.log --run_config=config/fineweb_4070.py  (nanoGPT's printed log; a CSV, also wandb's export)

Reads metrics.jsonl, or what another program printed. onecard/diagnosis.py makes the sentences, onecard/page.py the
page. The report is silent where the data cannot support a claim.
"""

import csv
import io
import json
import math
import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np

from configurator import key, load_config, read_values, run_script
from onecard import UserError, forecast, metrics, plan
from onecard.diagnosis import PROBLEMS, Finding, Run, diagnose
from onecard.page import write_page
from train import TrainConfig, learning_rate


@dataclass(frozen=True)
class ReportConfig:
    runs: tuple[str, ...] = key((), "a run's folder or metrics.jsonl, a printed log, a CSV; two: compare", inputs=True)
    run_config: str = key("", "config file of another program's run: gives its learning rates and sizes")
    until: int = key(0, "use the steps up to this one only; 0: all", low=0)
    page: bool = key(True, "write the page of plots")
    out: str = key("", "file of the page; empty: report.html beside the run")
    watch: int = key(0, "write the report every N seconds until the run ends; 0: once", low=0)

    def problems(self) -> list[str]:
        wanted = "give one run, or two to compare: a folder with metrics.jsonl, a printed log, a CSV"
        return [] if len(self.runs) in (1, 2) else [wanted]


class ReportError(UserError):
    """A file cannot be read as a run, two runs cannot be compared, or the page cannot be written."""


DEFAULTS = dict(lr_decay_iters=600_000, eval_iters=200, dtype="bfloat16", gelu="none")  # nanoGPT's, other than ours
LOG_EVAL = re.compile(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)")
LOG_ITER = re.compile(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms")
COLUMNS = {  # of a CSV, in small letters, without the run's name that wandb puts in front
    "step": "step iter _step iteration global_step",
    "val_loss": "val_loss val/loss eval/val_loss valid/loss validation_loss",
    "train_loss": "eval/train_loss train_loss train/loss loss",
    "lr": "lr train/lr learning_rate",
    "grad_norm": "grad_norm train/grad_norm",
    "ms_per_step": "ms_per_step train/ms_per_step time_ms",
}


def read_run(path: str | Path, run_config: str | Path = "", until: int = 0) -> Run:
    """Reads a folder of train.py, its metrics.jsonl, a CSV, or nanoGPT's printed log, up to step `until` (0: all).

    run_config: config file of a run of another program. Raises ReportError; ConfigError if run_config is bad.
    """
    path = Path(path)
    file = path / metrics.NAME if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file}: cannot be read ({error}); give a run's folder, a printed log, or a CSV") from None
    reader = {".jsonl": read_metrics, ".csv": read_csv}.get(file.suffix, read_log)
    records = [record for record in reader(text, file) if not until or record["step"] <= until]
    if run_config:
        keys = read_values(str(run_config), asdict(TrainConfig()) | DEFAULTS)
        records.insert(0, dict(kind="start", step=0, config=keys))
    run = assemble(str(path), records)
    if not len(run.evals["step"]) and not len(run.lines["step"]):
        raise ReportError(
            f"{file}: no evaluation and no step found; give metrics.jsonl, nanoGPT's printed log "
            '("step 500: train loss 5.4, val loss 5.5"), or a CSV with columns step, train_loss, val_loss'
        )
    return run


def read_metrics(text: str, path: Path) -> Iterator[dict]:
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            yield record | dict(kind=str(record["kind"]), step=int(record["step"]))
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last line may be incomplete while the run writes it
                raise ReportError(f"{path}:{number}: damaged, not a line of metrics; delete that line") from None


def read_log(text: str, _path: Path) -> Iterator[dict]:
    for line in text.splitlines():
        if found := LOG_EVAL.match(line):
            yield dict(kind="eval", step=int(found[1]), train_loss=float(found[2]), val_loss=float(found[3]))
        elif found := LOG_ITER.match(line):
            yield dict(kind="micro", step=int(found[1]), loss=float(found[2]), ms_per_step=float(found[3]))


def read_csv(text: str, path: Path) -> Iterator[dict]:
    rows = csv.reader(io.StringIO(text))
    names = [name.rsplit(" - ", 1)[-1].strip().lower() for name in next(rows, [])]
    columns = {ours: next((n for n in theirs.split() if n in names), "") for ours, theirs in COLUMNS.items()}
    for row in rows:
        cells = dict(zip(names, row, strict=False))
        given = {ours: cells[name] for ours, name in columns.items() if cells.get(name, "") not in ("", "NaN")}
        try:
            record: dict = {ours: float(cell) for ours, cell in given.items()}
        except ValueError as error:
            raise ReportError(f"{path}:{rows.line_num}: {error}; correct that line") from None
        if "step" in record and "train_loss" in record:
            kind = "eval" if "val_loss" in record else "micro" if cells.get("kind") == "iter" else "train"
            yield record | dict(kind=kind, step=int(record["step"]), loss=record["train_loss"])


def assemble(name: str, records: Sequence[dict]) -> Run:
    def of_kind(kind):  # in order of steps; if a step is there twice (a resumed log), the later record counts
        by_step = {record["step"]: record for record in records if record["kind"] == kind}
        return [by_step[step] for step in sorted(by_step)]

    evals = [r for r in of_kind("eval") if r.get("val_loss") is not None and r.get("train_loss") is not None]
    train, micro = of_kind("train"), of_kind("micro")
    lines = train or micro
    starts = [record for record in records if record["kind"] == "start"]
    configs = [(record["step"], known_config(record["config"])) for record in starts]
    names = dict(train="train_loss", val="val_loss")
    return Run(
        name=name,
        evals={n: column(evals, names.get(n, n)) for n in ("step", "train", "val", "bits_per_byte", "eval_seconds")},
        groups=[record["val_groups"] for record in evals if "val_groups" in record],
        lines={n: column(lines, n) for n in {"step"}.union(*lines)},
        micro=not train and bool(micro),
        config=configs[-1][1] if configs else None,
        rates=learning_rates(configs) if configs else [],
        about=starts[-1] if starts else {},
        events=[record for record in records if record["kind"] == "event"],
        samples=[record for record in records if record["kind"] == "samples"],
    )


def column(records, name):
    """The numbers of one name, NaN where there is none."""
    values = [record.get(name) for record in records]
    return np.array([value if isinstance(value, int | float) else math.nan for value in values], dtype=float)


def known_config(keys: dict) -> TrainConfig:
    """TrainConfig of saved keys. Keys that this version does not know are left out, missing ones have their default."""
    return TrainConfig(**{field.name: keys[field.name] for field in fields(TrainConfig) if field.name in keys})


def learning_rates(configs: Sequence[tuple[int, TrainConfig]]) -> list[float]:
    """The learning rate of every step. configs: (first step, config) of each start; the last one plans the rest."""
    rates = [learning_rate(step, configs[-1][1]) for step in range(configs[-1][1].max_iters)]
    for (first, config), (end, _) in pairwise(configs):
        rates[first:end] = [learning_rate(step, config) for step in range(first, min(end, len(rates)))]
    return rates


def headline(run: Run) -> str:
    text = f"{run.name}: step {run.step:,}" + (f" of {run.config.max_iters:,}" if run.config else "")
    if len(run.evals["step"]):
        text += f"; at step {run.evals['step'][-1]:,.0f} train loss {run.evals['train'][-1]:.4f}, val {val_loss(run)}"
    return text


def val_loss(run):
    """The last val loss, perplexity and, if known, bits per byte, which compare across tokenizers."""
    loss, bits = run.evals["val"][-1], run.evals["bits_per_byte"][-1]
    text = f"loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):,.2f}"
    return text if math.isnan(bits) else f"{text}, {bits:.4f} bits per byte"


def paragraphs(findings: Sequence[Finding]) -> Iterator[str]:
    """A paragraph for each finding; those that ask for a change are marked."""
    for name, text in findings:
        mark = "! " if name in PROBLEMS else "  "
        yield textwrap.fill(text, 110, initial_indent=f"{mark}{name}".ljust(22), subsequent_indent=" " * 22)


def plan_beside(run: Run) -> list[tuple[str, str, str]]:
    """Rows of what, planned, actual, of a run of train.py; "" where there is no plan."""
    if not run.config or not run.about.get("device"):
        return []
    c, found, lines = run.config, run.plan, run.lines
    rows = [("steps", f"{c.max_iters:,}", f"{run.step:,}")]
    rows.append(("tokens", f"{found['tokens']:,}", f"{run.step * c.step_tokens:,}"))
    if found["epochs"]:
        rows.append(("epochs", f"{found['epochs']:.2f}", f"{run.epochs:.2f}"))
    if "ms_per_step" in lines:
        seconds, hours = np.nanmedian(lines["ms_per_step"]) / 1000, found["hours"]
        speed = f"{found['tokens'] / hours / 3600:,.0f}" if hours else ""
        rows.append(("tokens per second", speed, f"{c.step_tokens / seconds:,.0f}"))
        eval_seconds = float(np.nan_to_num(run.evals["eval_seconds"][-1:].sum()))
        measured = plan.hours_left(c, 0, seconds, eval_seconds)
        rows.append(("hours in total", f"{hours:.1f}" if hours else "", f"{measured:.2f} at this speed"))
    if "peak_memory_gib" in lines:
        planned = sum((run.about.get("planned_memory") or {}).values()) / plan.GiB  # for an eager step
        actual = np.nanmax(lines["peak_memory_gib"])
        rows.append(("peak memory, GiB", f"{planned:.2f}" if planned else "", f"{actual:.2f}"))
    if run.groups:
        error = np.std(run.groups[-1], ddof=1) / math.sqrt(len(run.groups[-1]))
        rows.append(("standard error of val", f"{found['eval_error']:.4f}", f"{error:.4f}"))
    if len(run.evals["step"]):
        expected = f"{found['loss']:.2f} +- {plan.BAND} at the end" if found["loss"] else "no expectation"
        rows.append(("val loss", expected, f"{run.evals['val'][-1]:.4f}"))
    return rows


def compare(a: Run, b: Run) -> Iterator[str]:
    """Lines on how b differs from a at the last evaluation of each: val loss, with its error, and config keys."""
    for letter, run in (("a", a), ("b", b)):
        yield f"{letter}  {run.name}: val {val_loss(run)} at step {run.evals['step'][-1]:,.0f}"
    difference = b.evals["val"][-1] - a.evals["val"][-1]
    word = "lower" if difference < 0 else "higher"
    if val_windows(a) and val_windows(a) == val_windows(b):
        pairs = np.subtract(b.groups[-1], a.groups[-1])
        error = np.std(pairs, ddof=1) / math.sqrt(len(pairs))
        text = f"b is {word} by {abs(pairs.mean()):.4f} +- {error:.4f} ({len(pairs)} pairs of the same val windows)"
        yield text + (fewer_tokens(a, b) if abs(pairs.mean()) > 2 * error else "; the difference may be chance")
    else:
        reason = "not evaluated on the same windows; with two tokenizers, compare bits per byte"
        yield f"b is {word} by {abs(difference):.4f}, with unknown error ({reason})"
    if a.config and b.config:
        before, after = asdict(a.config), asdict(b.config)
        names = [name for name in before if before[name] != after[name] and name not in ("out_dir", "overwrite")]
        yield f"config: {', '.join(f'{n} {before[n]!r} -> {after[n]!r}' for n in names) or 'the same'}"


def val_windows(run):
    """What decides which val windows are in each group of the last evaluation; None if that is not known."""
    fingerprint, c = run.about.get("data", {}).get("val_fingerprint"), run.config
    if not fingerprint or not run.groups or len(run.groups[-1]) < 8:
        return None
    return fingerprint, c.block_size, c.eval_tokens or c.eval_iters * c.batch_size


def fewer_tokens(a, b):
    """How many tokens the better run saves, by the law of annealing fitted to the worse one; "" if that is unknown."""
    better, worse = sorted((a, b), key=lambda run: run.evals["val"][-1])
    fit = worse.forecast("val")[0] if better.config and worse.config and worse.step >= worse.end else None
    if not fit:
        return ""
    target = better.evals["val"][-1] - worse.evals["val"][-1] + fit["loss"]
    for factor in np.geomspace(1, 4, 57):  # the worse run, longer and longer
        if forecast.follow(fit, forecast.stretch(worse.rates, factor))[-1] <= target:
            break
    else:
        return "; by its law of annealing the worse run does not reach that loss with four times its tokens"
    used, needed = better.step * better.config.step_tokens, factor * worse.step * worse.config.step_tokens
    name, word = "b" if better is b else "a", "more" if used > needed else "fewer"
    return f"; {name} needs {abs(used / needed - 1):.0%} {word} tokens for that loss (by the law of annealing)"


def report(config: ReportConfig) -> bool:
    """Prints the findings and writes the page -> True if the run has ended."""
    run = read_run(config.runs[0], config.run_config, config.until)
    findings = diagnose(run)
    print(headline(run), *paragraphs(findings), sep="\n", flush=True)
    done = not run.config or run.step >= run.end
    if config.page:
        path = Path(config.out or (run.name if Path(run.name).is_dir() else Path(run.name).parent))
        path = path / "report.html" if path.is_dir() else path
        try:
            write_page(str(path), run, headline(run), findings, plan_beside(run), 0 if done else config.watch)
            print(f"plots: {path}")
        except ImportError:
            print("no plots: matplotlib is not installed (pip install matplotlib, or -e '.[plot]')")
        except OSError as error:
            raise ReportError(f"{path}: cannot be written ({error.strerror}); give another --out") from None
    return done


def main(argv: Sequence[str] | None = None) -> None:
    config = load_config(ReportConfig, argv)
    if len(config.runs) == 2:
        a, b = (read_run(path, config.run_config, config.until) for path in config.runs)
        if not len(a.evals["step"]) or not len(b.evals["step"]):
            raise ReportError(f"{a.name}, {b.name}: a comparison needs an evaluation of each")
        print(*compare(a, b), sep="\n")
        return
    while not report(config) and config.watch:
        time.sleep(config.watch)


if __name__ == "__main__":
    run_script(main)
