"""What a run did and will do, from its numbers: in words, on a page of plots; or how two runs differ.

    python report.py out/run                             (writes out/run/report.html; --watch=60 keeps it fresh)
    python report.py out/a out/b                         (compares them, group by group of the val windows)
    python report.py train.log --run_config=config/x.py  (nanoGPT's printed log; a CSV, wandb's export too)

Everything comes from metrics.jsonl, or from what another program printed; diagnosis.py makes the sentences. The one
thing to know: where the numbers do not carry a sentence, the report says so instead. No torch here.
"""

import csv
import html
import io
import json
import math
import re
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import configurator
from onecard import metrics
from onecard import plan
from configurator import ConfigError, key, load_config, run_script
from onecard.diagnosis import PROBLEMS, Run, diagnose, stretch


@dataclass(frozen=True)
class ReportConfig:
    runs: tuple[str, ...] = key((), "a run's folder or metrics.jsonl, a printed log, a CSV; two: compare", inputs=True)
    run_config: str = key("", "config file of a run of another program: its learning rates and sizes")
    until: int = key(0, "look at the steps up to this one only; 0: at all", low=0)
    page: bool = key(True, "write the page of plots too")
    out: str = key("", "file of the page; empty: report.html beside the run")
    watch: int = key(0, "write it anew after so many seconds, until the run is at its end; 0: once", low=0)

    def problems(self):
        wanted = "give one run (or two to compare): a folder with metrics.jsonl, a printed log, or a CSV"
        return [wanted] if len(self.runs) not in (1, 2) else []


class ReportError(ValueError):
    """A file that cannot be read as a run, or two runs that cannot be compared: which, why, what to do."""


# ---- reading

# nanoGPT's defaults: what its config files leave open. (Ours have all keys in the first line of the metrics.)
DEFAULTS = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, dropout=0.0, bias=False)
DEFAULTS |= dict(batch_size=12, gradient_accumulation_steps=40, tokens_per_step=0, max_iters=600_000, grad_clip=1.0)
DEFAULTS |= dict(learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000, lr_decay_iters=600_000, decay_lr=True)
DEFAULTS |= dict(lr_schedule="cosine", decay_iters=0, eval_interval=2000, eval_iters=200, eval_tokens=0, compile=True)
DEFAULTS |= dict(arch="gpt2", optimizer="adamw", dtype="bfloat16", activation_checkpointing=False, keep_every=0)
DEFAULTS |= dict(init_from="scratch")

LOG_EVAL = re.compile(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)")
LOG_ITER = re.compile(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms")
COLUMNS = {  # of a CSV, in small letters, without the name of the run that wandb puts before them
    "step": "step iter _step iteration global_step",
    "val_loss": "val_loss val/loss eval/val_loss valid/loss validation_loss",
    "train_loss": "eval/train_loss train_loss train/loss loss",
    "lr": "lr train/lr learning_rate",
    "grad_norm": "grad_norm train/grad_norm",
    "ms_per_step": "ms_per_step train/ms_per_step time_ms",
}


def read_run(path, run_config="", until=0):
    """-> Run, from a folder of train.py, its metrics.jsonl, a CSV, or nanoGPT's printed log."""
    path = Path(path)
    file = path / metrics.NAME if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file}: cannot be read ({error}); give a run's folder, a printed log, or a CSV") from None
    reader = {".jsonl": read_metrics, ".csv": read_csv}.get(file.suffix, read_log)
    records = [record for record in reader(text, file) if not until or record["step"] <= until]
    if run_config:
        records.insert(0, dict(kind="start", step=0, config=read_config(run_config)))
    run = assemble(str(path), records)
    if not len(run.evals["step"]) and not len(run.lines["step"]):
        raise ReportError(f"{file}: none of its lines is an evaluation or a step; {reader.__doc__}")
    return run


def read_config(path):
    """The keys of a config file, over nanoGPT's defaults; those that no plan needs are of no harm."""
    values = dict(DEFAULTS)
    for source, written, names, expression in configurator.read_file(path):
        try:
            if names and isinstance(expression, ConfigError):  # (a docstring has none)
                raise expression
            values |= {name: configurator.evaluate(expression, values) for name in names}
        except ConfigError as error:
            raise ConfigError(f"{source}: {written}{error}") from None
    return values


def read_metrics(text, path):
    """It is read as train.py's metrics.jsonl."""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            yield record | dict(kind=str(record["kind"]), step=int(record["step"]))
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last one may be being written
                raise ReportError(f"{path}:{number}: no line of metrics, the file is damaged; cut it there") from None


def read_log(text, _path):
    """It is read as nanoGPT's printed log: "step 500: train loss 5.4, val loss 5.5"."""
    for line in text.splitlines():
        if found := LOG_EVAL.match(line):
            yield dict(kind="eval", step=int(found[1]), train_loss=float(found[2]), val_loss=float(found[3]))
        elif found := LOG_ITER.match(line):
            yield dict(kind="micro", step=int(found[1]), loss=float(found[2]), ms_per_step=float(found[3]))


def read_csv(text, path):
    """It is read as a CSV with a first line of names: step, val_loss, train_loss, lr and the like."""
    rows = csv.reader(io.StringIO(text))
    names = [name.rsplit(" - ", 1)[-1].strip().lower() for name in next(rows, [])]
    columns = {ours: next((n for n in theirs.split() if n in names), None) for ours, theirs in COLUMNS.items()}
    for row in rows:
        cells = dict(zip(names, row, strict=False))
        try:
            found = {n: float(cells[c]) for n, c in columns.items() if cells.get(c, "") not in ("", "NaN")}
        except ValueError as error:
            raise ReportError(f"{path}:{rows.line_num}: {error}; mend that line") from None
        if "step" not in found or "train_loss" not in found:
            continue
        kind = "eval" if "val_loss" in found else "micro" if cells.get("kind") == "iter" else "train"
        yield found | dict(kind=kind, step=int(found["step"]), loss=found["train_loss"])


def assemble(name, records):
    """Records -> Run. Of a step that stands there twice (a log that was gone on with) the last one counts."""
    kinds = {kind: {r["step"]: r for r in records if r["kind"] == kind} for kind in ("eval", "train", "micro")}
    evals, train, micro = ([record for _, record in sorted(kind.items())] for kind in kinds.values())
    evals = [r for r in evals if r.get("val_loss") is not None and r.get("train_loss") is not None]
    starts = [r for r in records if r["kind"] == "start"]
    names = dict(train="train_loss", val="val_loss")
    keys = DEFAULTS | dict(lr_decay_iters=0, eval_iters=0)  # those that an older train.py did not have
    return Run(
        name=name,
        evals={n: column(evals, names.get(n, n)) for n in ("step", "train", "val", "bits_per_byte", "eval_seconds")},
        groups=[r["val_groups"] for r in evals if "val_groups" in r],
        lines={n: column(train or micro, n) for n in {"step"}.union(*(train or micro))},
        micro=not train and bool(micro),
        starts=[(r["step"], SimpleNamespace(**(keys | r["config"]))) for r in starts],
        about=starts[-1] if starts else {},
        events=[r for r in records if r["kind"] == "event"],
        samples=[r for r in records if r["kind"] == "samples"],
    )


def column(records, name):
    """The numbers of one name, NaN where there is none."""
    values = [r.get(name) for r in records]
    return np.array([v if isinstance(v, int | float) else math.nan for v in values], dtype=float)


# ---- in words


def headline(run):
    text = f"{run.name}: step {run.step:,}" + (f" of {run.config.max_iters:,}" if run.config else "")
    if len(run.evals["step"]):
        text += f", at step {run.evals['step'][-1]:,.0f} train loss {run.evals['train'][-1]:.4f}, "
        text += f"val {val_loss(run)}"
    return text


def val_loss(run):
    """Words on the last val loss, with what can be compared across tokenizers where it is known."""
    loss, bits = run.evals["val"][-1], run.evals["bits_per_byte"][-1]
    text = f"loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):,.2f}"
    return text if math.isnan(bits) else f"{text}, {bits:.4f} bits a byte"


def in_words(findings):
    """The findings, a paragraph each; those that ask for a change are marked."""
    for name, text in findings:
        mark = "! " if name in PROBLEMS else "  "
        yield textwrap.fill(text, 110, initial_indent=f"{mark}{name}".ljust(22), subsequent_indent=" " * 22)


def plan_of(run):
    """The plan of a run of ours, as it was at its start; None for those of others."""
    data, device = run.about.get("data", {}), run.about.get("device")
    if not run.config or not device:
        return None
    n = run.config.eval_tokens or run.config.eval_iters * run.config.batch_size * run.config.block_size or 10_485_760
    given = dict(train_tokens=data.get("train_tokens"), val_tokens=data.get("val_tokens"), eval_tokens=n)
    return plan.plan(run.config, device=device, wide=run.about.get("dtype") == "float32", **given)


def plan_beside(run):
    """(what, as planned, as it came) of each number that there is on both sides."""
    found, lines, c = plan_of(run), run.lines, run.config
    if not found:
        return []
    seconds = np.nanmedian(lines["ms_per_step"]) / 1000 if "ms_per_step" in lines else None
    came_tokens = run.step * found["step_tokens"]
    rows = [("steps", f"{c.max_iters:,}", f"{run.step:,}"), ("tokens", f"{found['tokens']:,}", f"{came_tokens:,}")]
    if found["epochs"]:
        rows.append(("epochs", f"{found['epochs']:.2f}", f"{run.epochs(run.step):.2f}"))
    if seconds:
        speed = found["tokens"] / found["hours"] / 3600 if found["hours"] else None
        rows.append(("tokens a second", f"{speed:,.0f}" if speed else "", f"{found['step_tokens'] / seconds:,.0f}"))
        evaluation = run.evals["eval_seconds"][-1] if len(run.evals["step"]) else 0.0
        hours = plan.hours_left(c, 0, seconds, 0.0 if math.isnan(evaluation) else evaluation)
        rows.append(
            ("hours, all of it", f"{found['hours']:.1f}" if found["hours"] else "", f"{hours:.2f} at this speed")
        )
    if found["memory"] and "peak_memory_gib" in lines:
        peak = np.nanmax(lines["peak_memory_gib"])
        rows.append(("memory, GiB", f"{sum(found['memory'].values()) / plan.GiB:.2f}", f"{peak:.2f}"))
    if run.groups:
        error = np.std(run.groups[-1], ddof=1) / math.sqrt(len(run.groups[-1]))
        rows.append(("standard error of val", f"{found['eval_error']:.4f}", f"{error:.4f}"))
    if len(run.evals["step"]):
        expected = f"{found['loss']:.2f} +- {plan.BAND} at the end" if found["loss"] else "no expectation"
        rows.append(("val loss", expected, f"{run.evals['val'][-1]:.4f}"))
    return rows


# ---- two runs


def compare(a, b):
    """How b differs from a at the last evaluation of each: the loss by pairs of the same val windows, the keys."""
    for letter, run in (("a", a), ("b", b)):
        yield f"{letter}  {run.name}: val {val_loss(run)} at step {run.evals['step'][-1]:,.0f}"
    fingerprints = [run.about.get("data", {}).get("val_fingerprint") for run in (a, b)]
    pairs = [run.groups[-1] if run.groups else [] for run in (a, b)]
    sizes = [
        (run.config.block_size, run.config.eval_tokens, run.config.eval_iters) if run.config else () for run in (a, b)
    ]
    difference = b.evals["val"][-1] - a.evals["val"][-1]
    word = "lower" if difference < 0 else "higher"
    if None in fingerprints or len(set(fingerprints)) > 1 or len(set(sizes)) > 1 or len(pairs[0]) < 8:
        yield f"b is {word} by {abs(difference):.4f}; not evaluated on the same windows, so its error is unknown" + (
            " (of two tokenizers only the bits a byte compare)"
        )
    else:
        each = np.subtract(pairs[1], pairs[0])
        error = np.std(each, ddof=1) / math.sqrt(len(each))
        text = f"b is {word} by {abs(each.mean()):.4f} +- {error:.4f} ({len(each)} pairs of the same val windows)"
        yield text + (fewer_tokens(a, b) if abs(each.mean()) > 2 * error else ": that may be chance")
    if a.config and b.config:
        values = {
            k: (x, vars(b.config).get(k, x)) for k, x in vars(a.config).items() if k not in ("out_dir", "overwrite")
        }
        changed = [f"{k} {x!r} -> {y!r}" for k, (x, y) in values.items() if x != y]
        yield f"config: {', '.join(changed) or 'the same'}"


def fewer_tokens(a, b):
    """Words on how many tokens the better run saves: by the law fitted to the worse one, over other lengths."""
    better, worse = sorted((a, b), key=lambda run: run.evals["val"][-1])
    fit = worse.forecast("val")[0] if better.config and worse.config and worse.step >= worse.end else None
    if not fit:
        return ""
    rates, target = worse.rates(), better.evals["val"][-1] - worse.evals["val"][-1] + fit["loss"]
    factors = np.geomspace(1, 4, 57)
    losses = [plan.follow(fit, stretch(rates, factor))[-1] for factor in factors]
    longer = next((f for f, loss in zip(factors, losses, strict=True) if loss <= target), math.inf)
    used, needed = (run.step * plan.step_tokens(run.config) for run in (better, worse))
    if longer == math.inf:
        return ": the law of the other does not reach it with four times its tokens"
    share = used / (longer * needed) - 1
    word = "more" if share > 0 else "fewer"
    return f": that is {abs(share):.0%} {word} tokens to the same loss, by the law of the other"


# ---- the page

INK = {"ink": "#010101", "grid": "#020202", "train": "#030303", "val": "#040404", "band": "#050505", "third": "#060606"}
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2733; --soft: #5d6b7a; --grid: #d9dfe6; --train: #2f6fb5;
  --val: #c4501b; --band: #2c8a57; --third: #7a4fa3; --box: #f3f5f8; --warn: #fdeeda }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e9ef; --soft: #9aa7b5; --grid: #343d47;
  --train: #74acea; --val: #f08d5b; --band: #5cc48c; --third: #b48ddd; --box: #1e242b; --warn: #3d2c14 } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 68rem; padding: 1rem }
h1 { font-size: 1.35rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem }
figure { margin: 0 } figcaption { color: var(--soft); font-size: .9rem } svg { width: 100%; height: auto }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }
dl { margin: 0 } dt { font-weight: 600; margin-top: .6rem } dd { margin: 0; overflow-wrap: anywhere }
.problem { background: var(--warn); border-radius: .4rem; padding: .1rem .6rem .4rem; margin-top: .6rem }
table { border-collapse: collapse; width: 100%; font-size: .95rem } th { color: var(--soft) }
td, th { text-align: left; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid var(--grid); font-weight: 400 }
pre { background: var(--box); border-radius: .4rem; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere }
"""


def write_page(run, findings, path, refresh=0):
    """Writes the page: one file, nothing of it from a network. Raises ReportError where it cannot be written."""
    escape = html.escape
    items = "".join(
        f"<div{' class=problem' * (name in PROBLEMS)}><dt>{escape(name)}<dd>{escape(text)}</div>"
        for name, text in findings
    )
    plots = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for caption, svg in draw(run))
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in plan_beside(run))
    table = f"<h2>Planned, and come</h2><table><tr><th><th>planned<th>came{rows}</table>" if rows else ""
    texts = [f"<pre>{escape(text)}</pre>" for text in run.samples[-1]["texts"]] if run.samples else []
    samples = f"<h2>It wrote, at step {run.samples[-1]['step']:,}</h2>{''.join(texts)}" if texts else ""
    head = f"<meta http-equiv=refresh content={refresh}>" * bool(refresh) + f"<title>{escape(run.name)}</title>"
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{head}<style>{STYLE}</style>'
        f"<h1>{escape(headline(run))}</h1><dl>{items}</dl>"
        f"<h2>Curves</h2><div class=plots>{plots}</div>{table}{samples}\n"
    )
    try:
        new = Path(f"{path}.new")
        new.write_text(page, encoding="utf-8")
        new.replace(path)  # whole at any time: a browser may be reading it
    except OSError as error:
        raise ReportError(f"{path}: cannot be written ({error.strerror}); give another --out") from None


def draw(run):
    """(caption, SVG) of each plot; colours are the page's, so that they follow its light and dark."""
    steps, lines = run.evals["step"], run.lines
    if len(steps) > 1:
        yield (
            "loss: dots train and val at evaluations, line the steps, shade what is expected at the end",
            plot(run, draw_loss),
        )
    if "lr" in lines or run.config:
        yield "learning rate (dotted: where the run is)", plot(run, draw_rate)
    if "grad_norm" in lines:
        yield "norm of the gradient before clipping", plot(run, draw_norm)
    if "tokens_per_s" in lines or "ms_per_step" in lines:
        yield "speed" + (", and memory" if "peak_memory_gib" in lines else ""), plot(run, draw_speed)


def plot(run, draw_axes):
    """SVG of one plot, 389 by 252 points, by a function that draws it on matplotlib's axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink, grid = INK["ink"], INK["grid"]
    colours = {f"{what}.{part}": ink for what in ("xtick", "ytick") for part in ("color", "labelcolor")}
    colours |= {"axes.edgecolor": grid, "axes.labelcolor": ink, "text.color": ink, "grid.color": grid}
    fonts = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 12, "svg.hashsalt": draw_axes.__name__}
    with rc_context(colours | fonts | {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw_axes(run, axes)
        axes.set_xlabel("step")
        axes.locator_params(axis="x", nbins=6)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace("'DejaVu Sans'", "system-ui")
    for name, colour in INK.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def draw_loss(run, axes):
    evals, lines, warm = run.evals, run.lines, run.warm
    late = evals["step"] >= min(warm, evals["step"][-2])
    if "loss" in lines and not run.micro:
        shown = lines["step"] >= warm
        axes.plot(lines["step"][shown], lines["loss"][shown], color=INK["train"], lw=0.8, alpha=0.35)
    errors = np.zeros(len(late))
    if len(run.groups) == len(late):
        errors = np.array([2 * np.std(g, ddof=1) / math.sqrt(len(g)) if len(g) > 1 else 0 for g in run.groups])
    axes.plot(evals["step"][late], evals["train"][late], "o-", color=INK["train"], ms=3.5, lw=1.3, label="train")
    words = "val, 2 standard errors" if errors.any() else "val"
    style = dict(color=INK["val"], fmt="o-", ms=3.5, lw=1.3, elinewidth=0.8, label=words)
    axes.errorbar(evals["step"][late], evals["val"][late], errors[late], **style)
    found = run.forecast("val")[0] if run.config and run.step < run.end else None
    if found:
        ahead = np.linspace(found["step"], found["end"], 60).astype(int)
        axes.plot(
            ahead, plan.follow(found, run.rates())[ahead], color=INK["band"], ls="--", lw=1.2, label="val, forecast"
        )
        axes.errorbar(found["end"], found["loss"], found["band"], color=INK["band"], fmt="none", capsize=4)
    expected = plan.expected_loss(run.config, run.epochs(run.config.max_iters))[0] if run.config else None
    if expected:
        axes.axhspan(
            expected - plan.BAND, expected + plan.BAND, color=INK["band"], alpha=0.15, lw=0, label="expected at the end"
        )
    axes.legend(frameon=False, fontsize=11)
    axes.set_ylabel("nats a token")


def draw_rate(run, axes):
    if run.config:
        rates = np.array(run.rates()[: 2 * 10**6])
        shown = np.unique(np.linspace(0, len(rates) - 1, 400).astype(int))
        axes.plot(shown, rates[shown], color=INK["third"], lw=1.5)
        axes.axvline(run.step, color=INK["ink"], lw=0.8, ls=":")
    else:
        axes.plot(run.lines["step"], run.lines["lr"], color=INK["third"], lw=1.5)
    axes.set_ylim(0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))


def draw_norm(run, axes):
    axes.plot(run.lines["step"], run.lines["grad_norm"], color=INK["third"], lw=1)
    if run.config and run.config.grad_clip:
        axes.axhline(run.config.grad_clip, color=INK["ink"], lw=0.8, ls=":")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 30 * low else "")


def draw_speed(run, axes):
    lines = run.lines
    name, label = ("tokens_per_s", "tokens a second") if "tokens_per_s" in lines else ("ms_per_step", "ms a step")
    axes.plot(lines["step"], lines[name], color=INK["train"], lw=1.2)
    axes.set_ylabel(label)
    axes.set_ylim(0, 2 * np.nanmedian(lines[name]))  # nanoGPT counts evaluations into a step
    if "peak_memory_gib" in lines:
        other = axes.twinx()
        other.plot(lines["step"], lines["peak_memory_gib"], color=INK["val"], lw=1.2)
        other.set_ylabel("peak memory, GiB")
        other.set_ylim(0)


# ---- the command


def report(config):
    """Reads, says, draws -> True when the run is at its end."""
    run = read_run(config.runs[0], config.run_config, config.until)
    findings = diagnose(run)
    print(headline(run), *in_words(findings), sep="\n", flush=True)
    done = not run.config or run.step >= run.end
    if config.page:
        path = Path(config.out or (run.name if Path(run.name).is_dir() else Path(run.name).parent))
        path = path / "report.html" if path.is_dir() else path
        try:
            write_page(run, findings, path, 0 if done else config.watch)
            print(f"plots: {path}")
        except ImportError:
            print("no plots: matplotlib is not installed (pip install matplotlib, or -e '.[plot]')")
    return done


def main(argv=None):
    config = load_config(ReportConfig, argv)
    if len(config.runs) == 2:
        a, b = (read_run(path, config.run_config, config.until) for path in config.runs)
        if not len(a.evals["step"]) or not len(b.evals["step"]):
            raise ReportError(f"{a.name}, {b.name}: both need an evaluation to be compared")
        print(*compare(a, b), sep="\n")
        return
    while not report(config) and config.watch:
        time.sleep(config.watch)


if __name__ == "__main__":
    run_script(main, ReportError)
