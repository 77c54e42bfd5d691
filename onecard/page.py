"""The page that report.py writes: verdict, findings, plots, tables and samples in one HTML file that loads nothing.

    write_page("out/run/report.html", [run], heading, findings, [planned], defaults)

onecard/plots.py gathers the curves. The page has a copy of plotly's script (ImportError without plotly), which draws
them as page.js says; page.css says what the page looks like.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np

from onecard.diagnosis import PROBLEMS, Finding
from onecard.durable import replacing
from onecard.plots import all_charts, axes_of
from onecard.run import Run

HERE = Path(__file__).parent
SAMPLES, CHARACTERS = 12, 3000  # steps with samples that are shown, length of a sample
Rows = Sequence[Sequence]


def write_page(
    path: str | Path,
    runs: Sequence[Run],
    heading: str,
    findings: Sequence[Finding],
    planned: Sequence[Rows],
    defaults: dict,
    refresh: int = 0,
) -> None:
    """Writes the page in one go, so that a browser never reads half of it. Raises ImportError, OSError.

    findings: the verdict first. planned: of each run, rows of what, planned, actual. defaults: of the keys of a config.
    refresh: seconds until a browser loads the page again; 0: never.
    """
    from plotly.offline import get_plotlyjs

    charts = [chart for chart in all_charts(runs) if chart["curves"]]
    axes = [axes_of(run) for run in runs]
    sections = [
        f"<h1>{escape(heading)}</h1><p class=verdict>{escape(findings[0].text)}</p><dl>{items(findings[1:])}</dl>",
        f"<h2>Curves</h2>{controls(axes)}<div class=plots>{''.join(map(figure, charts))}</div>",
        *map(run_tables, runs, planned, [run.name for run in runs] if len(runs) > 1 else ["This run"]),
        keys_section(runs, defaults),
        *(samples_section(run, CHARACTERS // len(runs)) for run in runs),
    ]
    reload = f"<meta http-equiv=refresh content={refresh}>" if refresh else ""
    data = json.dumps(dict(runs=axes, charts=charts), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{reload}<title>{escape(heading)}</title><style>{(HERE / 'page.css').read_text()}</style>"
        f"<main>{''.join(sections)}</main>\n"
        f'<script type="application/json" id="numbers">{data}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{(HERE / 'page.js').read_text()}</script>\n"
    )
    with replacing(path) as file:
        file.write(page.encode())


# ---- its parts


def items(findings: Sequence[Finding]) -> str:
    marks = [(" class=problem", "! ") if finding.name in PROBLEMS else ("", "") for finding in findings]
    rows = zip(findings, marks, strict=True)
    return "".join(f"<dt{css}>{sign}{escape(name)}<dd{css}>{escape(text)}" for (name, text), (css, sign) in rows)


def controls(axes: Sequence[dict]) -> str:
    """The form that page.js reads. tokens and hours can be chosen where they are known of all runs."""
    known = {"tokens": "step_tokens", "hours": "hours"}
    names = ["steps", *(name for name, key in known.items() if all(key in run for run in axes))]
    scales = "<option>linear<option>log"
    return (
        f"<form><label>x axis <select name=axis>{''.join(f'<option>{name}' for name in names)}</select></label>"
        f"<label>x scale <select name=across>{scales}</select></label>"
        f"<label>loss scale <select name=scale>{scales}</select></label>"
        "<label>smoothing <input name=smoothing type=range min=0 max=.98 step=.02 value=0></label></form>"
        "<p class=soft>Drag to zoom, double-click to zoom out, click on a name below a plot to hide it.</p>"
        "<noscript>The plots need JavaScript.</noscript>"
    )


def figure(chart):
    alt, title, caption = (escape(chart[name], quote=True) for name in ("text", "title", "caption"))
    plot = f'<div class=plot id="{chart["id"]}" role=img aria-label="{alt}"></div>'
    return f"<figure><h3>{title}</h3>{plot}<figcaption>{caption}</figcaption></figure>"


def table(head: Sequence[str], rows: Rows) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}' for cell in row)}" for row in rows)
    return f"<div class=wide><table><thead><tr>{''.join(f'<th>{escape(h)}' for h in head)}<tbody>{cells}</table></div>"


def run_tables(run: Run, planned: Rows, title: str) -> str:
    """Tables on one run: earlier forecasts, planned and actual, what it ran on."""
    names = dict(device="hardware", dtype="precision", torch="torch", date="started", commit="commit")
    facts = [(label, run.about[name]) for name, label in names.items() if run.about.get(name)]
    earlier = [forecast_row(run, found) for found in run.earlier_forecasts]
    tables = {
        "Earlier forecasts": (("at", "it said", "it ended"), earlier),
        "Planned vs actual": (("", "planned", "actual"), planned),
        "Machine and version": (("", ""), facts),
    }
    found = [f"<section><h3>{name}</h3>{table(*content)}</section>" for name, content in tables.items() if content[1]]
    return f"<h2>{escape(title)}</h2><div class=tables>{''.join(found)}</div>" if found else ""


def forecast_row(run, found):
    step, loss, band, last = found["step"], found["loss"], found["band"], run.val.values[-1]
    ended = f"{last:.3f}, {'inside' if abs(last - loss) <= band else 'outside'}" if run.finished else "not yet"
    return f"{step / run.end:.0%} (step {step:,})", f"{loss:.3f} +- {band:.3f}", ended


def keys_section(runs: Sequence[Run], defaults: dict) -> str:
    """The keys of the configs that differ from the default, or between the runs; the others folded away."""
    if not all(run.config for run in runs):
        return ""
    configs = [asdict(run.config) for run in runs]
    rows = [(name, *(config[name] for config in configs), value) for name, value in defaults.items()]
    changed = [row for row in rows if len(set(row[1:])) > 1]
    same = [row for row in rows if len(set(row[1:])) == 1]
    head = ("key", *(run.name if len(runs) > 1 else "this run" for run in runs), "default")
    shown = f"<h2>Keys that differ from their default</h2>{table(head, changed)}" if changed else ""
    return f"{shown}<details><summary>The other {len(same)} keys</summary>{table(head, same)}</details>"


def samples_section(run: Run, characters: int) -> str:
    """Samples over time, evenly chosen, the last ones open."""
    if not run.samples:
        return ""
    section = f"<h2>Samples of {escape(run.name)}</h2>"
    for i in np.unique(np.linspace(0, len(run.samples) - 1, SAMPLES).round().astype(int)):
        step, texts = run.samples[i]["step"], run.samples[i]["texts"][:5]
        shown = "".join(f"<pre>{escape(str(text)[:characters])}</pre>" for text in texts)
        state = " open" if i == len(run.samples) - 1 else ""
        section += f"<details{state}><summary>Step {step:,}</summary><div class=tables>{shown}</div></details>"
    return section
