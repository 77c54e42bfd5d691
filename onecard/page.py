"""The page that report.py writes: findings, curves, plan and samples, in one HTML file that loads nothing else.

    write_page("out/run/report.html", run, heading, findings, planned)

matplotlib draws the plots as SVG (ImportError without it). `plot` replaces its colours, which are placeholders, with
the variables of the style sheet, so that plots follow the light and the dark theme.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from onecard.diagnosis import PROBLEMS, Finding, Run
from onecard.durable import replacing
from onecard.forecast import follow
from onecard.plan import BAND

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


def write_page(path: str, run: Run, heading: str, findings: Sequence[Finding], planned: list, refresh: int = 0) -> None:
    """Writes the page in one go, so that a browser never reads half of it. Raises OSError.

    planned: rows of what, planned, actual. refresh: seconds until a browser loads the page again; 0: never.
    """
    items = "".join(
        f"<div{' class=problem' if name in PROBLEMS else ''}><dt>{escape(name)}<dd>{escape(text)}</div>"
        for name, text in findings
    )
    plots = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for caption, svg in draw(run))
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in planned)
    table = f"<h2>Planned vs actual</h2><table><tr><th><th>planned<th>actual{rows}</table>" if rows else ""
    texts = [f"<pre>{escape(text)}</pre>" for text in run.samples[-1]["texts"]] if run.samples else []
    samples = f"<h2>Samples at step {run.samples[-1]['step']:,}</h2>{''.join(texts)}" if texts else ""
    reload = f"<meta http-equiv=refresh content={refresh}>" if refresh else ""
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{reload}<title>{escape(run.name)}</title><style>{STYLE}</style>"
        f"<h1>{escape(heading)}</h1><dl>{items}</dl>"
        f"<h2>Curves</h2><div class=plots>{plots}</div>{table}{samples}\n"
    )
    with replacing(path) as file:
        file.write(page.encode())


def draw(run: Run) -> Iterator[tuple[str, str]]:
    """The plots that the run has numbers for: (caption, SVG)."""
    lines = run.lines
    if len(run.evals["step"]) > 1:
        yield "Loss. Dots: evaluations. Thin line: training steps. Band: expected at the end.", plot(run, draw_loss)
    if "lr" in lines or run.config:
        yield "Learning rate. Dotted: the current step.", plot(run, draw_rate)
    if "grad_norm" in lines:
        yield "Gradient norm before clipping.", plot(run, draw_norm)
    if "tokens_per_s" in lines or "ms_per_step" in lines:
        yield "Speed and memory." if "peak_memory_gib" in lines else "Speed.", plot(run, draw_speed)


def plot(run, draw_axes):
    """SVG of one plot, 389 by 252 points. draw_axes(run, axes) draws it on matplotlib's axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink, grid = INK["ink"], INK["grid"]
    style = {f"{what}.{part}": ink for what in ("xtick", "ytick") for part in ("color", "labelcolor")}
    style |= {"axes.edgecolor": grid, "axes.labelcolor": ink, "text.color": ink, "grid.color": grid}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "savefig.transparent": True}
    style |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 12, "svg.hashsalt": draw_axes.__name__}
    with rc_context(style):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
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
    evals, lines = run.evals, run.lines
    late = evals["step"] >= min(run.warm, evals["step"][-2])
    if "loss" in lines and not run.micro:
        shown = lines["step"] >= run.warm
        axes.plot(lines["step"][shown], lines["loss"][shown], color=INK["train"], lw=0.8, alpha=0.35)
    errors = np.zeros(len(late))
    if len(run.groups) == len(late):
        errors = np.array([2 * np.std(g, ddof=1) / math.sqrt(len(g)) if len(g) > 1 else 0 for g in run.groups])
    axes.plot(evals["step"][late], evals["train"][late], "o-", color=INK["train"], ms=3.5, lw=1.3, label="train")
    label = "val, 2 standard errors" if errors.any() else "val"
    style = dict(color=INK["val"], fmt="o-", ms=3.5, lw=1.3, elinewidth=0.8, label=label)
    axes.errorbar(evals["step"][late], evals["val"][late], errors[late], **style)
    fit = run.forecast("val")[0] if run.config and run.step < run.end else None
    if fit:
        ahead = np.linspace(fit["step"], fit["end"], 60).astype(int)
        axes.plot(ahead, follow(fit, run.rates)[ahead], color=INK["band"], ls="--", lw=1.2, label="val, forecast")
        axes.errorbar(fit["end"], fit["loss"], fit["band"], color=INK["band"], fmt="none", capsize=4)
    if loss := run.config and run.plan["loss"]:
        axes.axhspan(loss - BAND, loss + BAND, color=INK["band"], alpha=0.15, lw=0, label="expected at the end")
    axes.legend(frameon=False, fontsize=11)
    axes.set_ylabel("nats per token")


def draw_rate(run, axes):
    if run.config:
        rates = np.array(run.rates[: 2 * 10**6])
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
    name, label = ("tokens_per_s", "tokens/s") if "tokens_per_s" in lines else ("ms_per_step", "ms/step")
    axes.plot(lines["step"], lines[name], color=INK["train"], lw=1.2)
    axes.set_ylabel(label)
    axes.set_ylim(0, 2 * np.nanmedian(lines[name]))  # nanoGPT's time of a step may include an evaluation
    if "peak_memory_gib" in lines:
        other = axes.twinx()
        other.plot(lines["step"], lines["peak_memory_gib"], color=INK["val"], lw=1.2)
        other.set_ylabel("peak memory, GiB")
        other.set_ylim(0)
