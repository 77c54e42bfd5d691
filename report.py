"""Reports on a run from its numbers, as sentences and a page of plots; or compares runs.

    python report.py out/run                             (writes out/run/report.html; --watch=60 repeats it)
    python report.py out/a out/b [...]                   (compares them with the first; writes report.html here)
    python report.py train.log --run_config=config/fineweb_4070.py  (nanoGPT's printed log; a CSV, also wandb's export)

onecard/logs.py reads metrics.jsonl and what other programs print, onecard/diagnosis.py makes the sentences,
onecard/page.py the page. The report is silent where the data cannot support a claim.
"""

import math
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from configurator import key, load_config, read_values, run_script
from onecard import UserError, logs, plan
from onecard.checkpoint import saved_config
from onecard.compare import compare, last_losses
from onecard.diagnosis import PROBLEMS, Finding, diagnose
from onecard.memory import GiB
from onecard.page import write_page
from onecard.run import EVALS, Run
from train import TrainConfig, learning_rate

DEFAULTS = dict(lr_decay_iters=600_000, eval_iters=200, dtype="bfloat16", gelu="none")  # nanoGPT's, other than ours
DEFAULTS |= dict(vocab_size=50304)
HUGE = 1e15
MAX_RUNS = 12


@dataclass(frozen=True)
class ReportConfig:
    runs: tuple[str, ...] = key(
        (), "a run's folder or metrics.jsonl, a printed log, a CSV; several: compare", inputs=True
    )
    run_config: str = key("", "config file of another program's run: gives its learning rates and sizes")
    until: int = key(0, "use the steps up to this one only; 0: all", low=0)
    page: bool = key(True, "write the page of plots")
    out: str = key("", "file of the page; empty: report.html beside the run, of several runs here")
    watch: int = key(0, "write the report every N seconds until the run ends; 0: once", low=0)

    def problems(self) -> list[str]:
        wanted = "give one run, or several to compare: a folder with metrics.jsonl, a printed log, a CSV"
        return [] if self.runs else [wanted]


class ReportError(UserError):
    """The numbers of a run cannot be used, or the page cannot be written."""


# ---- from records to runs


def read_runs(path: str | Path, run_config: str | Path = "", until: int = 0) -> list[Run]:
    """The runs in a folder, a metrics.jsonl, a printed log or a CSV, up to step `until` (0: all).

    run_config: config file of a run of another program. Raises LogError, ReportError; ConfigError if run_config is bad.
    """
    defaults = asdict(TrainConfig()) | DEFAULTS
    found, damaged = logs.read_records(path, defaults)
    keys = read_values(str(run_config), defaults) if run_config else None
    runs = []
    for name, records in found.items():
        records = [record for record in records if not until or record["step"] <= until]
        if keys:
            records = [record for record in records if record["kind"] != "start"]
            records.insert(0, dict(kind="start", step=0, config=keys))
        run = assemble(name or str(path), records)
        if damaged:
            run.events.append(dict(event="damaged lines", step=0, lines=damaged))
        if len(run.evals["step"]) or len(run.lines["step"]):
            runs.append(run)
    if not runs:
        where = f"up to --until={until}; give a later one" if until else "in it; wait for the first, or give another"
        raise ReportError(f"{path}: no val loss and no log line {where}")
    return runs


def read_run(path: str | Path, run_config: str | Path = "", until: int = 0) -> Run:
    """The first run in a file, see read_runs."""
    return read_runs(path, run_config, until)[0]


def assemble(name: str, records: Sequence[dict]) -> Run:
    def of_kind(kind):  # in order of steps; if a step is there twice (a resumed log), the later record counts
        by_step = {record["step"]: record for record in records if record["kind"] == kind}
        return [by_step[step] for step in sorted(by_step)]

    evals = [r for r in of_kind("eval") if r.get("val_loss") is not None]
    train, micro = of_kind("train"), of_kind("micro")
    lines = train or micro
    starts = [record for record in records if record["kind"] == "start"]
    configs = [(record["step"], saved_config(TrainConfig, record["config"], name)) for record in starts]
    names = dict(train="train_loss", val="val_loss")
    return Run(
        name=name,
        evals={n: column(evals, names.get(n, n)) for n in EVALS},
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
    """The numbers of one name: NaN where there is none, inf where it is not finite, or too large to mean anything."""
    logged = (record.get(name) for record in records)
    numbers = (value if isinstance(value, int | float) else None for value in logged)
    return np.array([math.nan if n is None else n if abs(n) < HUGE else math.inf for n in numbers], dtype=float)


def learning_rates(configs: Sequence[tuple[int, TrainConfig]]) -> list[float]:
    """The learning rate of every step. configs: (first step, config) of each start; the last one plans the rest."""
    rates = [learning_rate(step, configs[-1][1]) for step in range(configs[-1][1].max_iters)]
    for (first, config), (end, _) in pairwise(configs):
        rates[first:end] = [learning_rate(step, config) for step in range(first, min(end, len(rates)))]
    return rates


# ---- the report


def heading(runs: Sequence[Run]) -> str:
    return f"{len(runs)} runs compared" if len(runs) > 1 else f"{runs[0].name}: {last_losses(runs[0])}"


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
        seconds, hours = np.nanmedian(lines["ms_per_step"]) / 1000, found["hours"] or run.about.get("planned_hours")
        speed = f"{found['tokens'] / hours / 3600:,.0f}" if hours else ""
        rows.append(("tokens per second", speed, f"{c.step_tokens / seconds:,.0f}"))
        eval_seconds = float(np.nan_to_num(run.evals["eval_seconds"][-1:].sum()))
        measured = plan.hours_left(c, 0, seconds, eval_seconds)
        rows.append(("hours in total", f"{hours:.1f}" if hours else "", f"{measured:.2f} at this speed"))
    if "peak_memory_gib" in lines:
        planned = sum((run.about.get("planned_memory") or {}).values()) / GiB  # for an eager step
        actual = np.nanmax(lines["peak_memory_gib"])
        rows.append(("peak memory, GiB", f"{planned:.2f}" if planned else "", f"{actual:.2f}"))
    if run.groups:
        error = np.std(run.groups[-1], ddof=1) / math.sqrt(len(run.groups[-1]))
        rows.append(("standard error of val", f"{found['eval_error']:.4f}", f"{error:.4f}"))
    if len(run.evals["step"]):
        expected = f"{found['loss']} at the end" if found["loss"] else "no expectation"
        rows.append(("val loss", expected, f"{run.evals['val'][-1]:.4f}"))
    return rows


def findings_of(runs: Sequence[Run]) -> list[Finding]:
    """The sentences on a run, or on the differences of several; lines that could not be read are one more."""
    found = diagnose(runs[0]) if len(runs) == 1 else list(compare(runs))
    for event in (event for run in runs for event in run.events if event.get("event") == "damaged lines"):
        lines = event["lines"]
        which = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
        found.append(Finding("damaged lines", f"{len(lines):,} could not be read and are left out (line {which})."))
    return found


def report(config: ReportConfig) -> bool:
    """Prints the findings and writes the page -> True if all runs have ended."""
    runs = [run for path in config.runs for run in read_runs(path, config.run_config, config.until)]
    if len(runs) > MAX_RUNS:
        raise ReportError(f"{len(runs)} runs in {', '.join(config.runs)}: give at most {MAX_RUNS}")
    findings = findings_of(runs)
    print(heading(runs), *paragraphs(findings), sep="\n", flush=True)
    done = bool(config.until) or not any(run.config and run.step < run.config.max_iters for run in runs)
    if config.page:
        path = Path(config.out or ("." if len(config.runs) > 1 else config.runs[0]))
        path = path / "report.html" if path.is_dir() else path if config.out else path.parent / "report.html"
        tables = [plan_beside(run) for run in runs]
        try:
            write_page(path, runs, heading(runs), findings, tables, asdict(TrainConfig()), 0 if done else config.watch)
            message = f"plots: {path}"
        except ImportError:
            message = "no plots: plotly is not installed (pip install plotly, or -e '.[plot]')"
        except OSError as error:
            raise ReportError(f"{path}: cannot be written ({error.strerror}); give another --out") from None
        print(message)
    return done


def main(argv: Sequence[str] | None = None) -> None:
    config = load_config(ReportConfig, argv)
    while not report(config) and config.watch:
        time.sleep(config.watch)


if __name__ == "__main__":
    run_script(main)
