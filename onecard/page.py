"""The page that report.py writes: verdict, findings, plots, tables and samples in one HTML file that loads nothing.

    write_page("out/run/report.html", [run], heading, findings, [planned], defaults)

The curves are gathered here, in plotly's terms. The page has a copy of plotly's script (ImportError without plotly),
which draws them as page.js says; page.css says what the page looks like. A single run has a colour for each curve; of
several runs, each has its own colour, dashes and markers. What is not finite is a gap.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np

from onecard import forecast
from onecard.compare import measure
from onecard.curve import Curve, finite
from onecard.diagnosis import PROBLEMS, Finding
from onecard.durable import replacing
from onecard.run import Run

HERE = Path(__file__).parent
SAMPLES, CHARACTERS = 12, 3000  # steps with samples that are shown, length of a sample
Rows = Sequence[Sequence]
POINTS = 2400  # of one kind of curve, for all runs together
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
# Val loss of GPT-2 124M on FineWeb by llm.c, from its public log (KellerJordan/modded-nanogpt, records): (step, loss).
LLMC_STEP_TOKENS = 524_288
LLMC = [(250, 6.1710), (500, 5.3743), (750, 4.7097), (1000, 4.3170), (1500, 4.0060), (2000, 3.8585), (3000, 3.6973)]
LLMC += [(4000, 3.6176), (5000, 3.5535), (6000, 3.5069), (8000, 3.4431), (10000, 3.3924), (12000, 3.3509)]
LLMC += [(14000, 3.3149), (16000, 3.2882), (18000, 3.2746), (19560, 3.2722)]
LINES = {  # of the log lines: title, unit, scale
    "grad_norm": ("Gradient norm before clipping", "", "log"),
    "tokens_per_s": ("Speed", "tokens per second", "linear"),
    "ms_per_step": ("Time of a step", "ms (nanoGPT's with evaluations)", "linear"),
    "peak_memory_gib": ("Peak memory", "GiB", "linear"),
}


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
    sizes = [dict(step_tokens=run.config.step_tokens) if run.config else {} for run in runs]
    sections = [
        f"<h1>{escape(heading)}</h1><p class=verdict>{escape(findings[0].text)}</p><dl>{items(findings[1:])}</dl>",
        f"<h2>Curves</h2>{controls(runs)}<div class=plots>{''.join(map(figure, charts))}</div>",
        *map(run_tables, runs, planned, [run.name for run in runs] if len(runs) > 1 else ["This run"]),
        keys_section(runs, defaults),
        *(samples_section(run, CHARACTERS // len(runs)) for run in runs),
    ]
    reload = f"<meta http-equiv=refresh content={refresh}>" if refresh else ""
    data = json.dumps(dict(runs=sizes, charts=charts), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
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


def controls(runs: Sequence[Run]) -> str:
    """The form that page.js reads. tokens and hours can be chosen where they are known of all runs."""
    known = dict(steps=True, tokens=all(run.config for run in runs), hours=all(hours_of(run) for run in runs))
    names = [name for name in known if known[name]]
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


# ---- its plots


class Drawn:
    """A run as it is drawn, number `index` of `count`."""

    def __init__(self, run: Run, index: int, count: int):
        self.run, self.index, self.count = run, index, count
        self.label = f"{chr(ord('a') + index)} {Path(run.name).stem[:24]}"  # its letter as in the sentences of compare
        self.dash, self.symbol = DASHES[index % len(DASHES)], SYMBOLS[index % len(SYMBOLS)]
        self.hours = hours_of(run)

    def curve(self, name: str, x, y, colour: int, main: bool = True, **look) -> dict:
        """A curve of y over the steps x, without those where y is NaN.

        colour: where the run is alone. main: of several runs, the legend names this curve; it shows and hides the run.
        """
        x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        x, y = x[~np.isnan(y)], y[~np.isnan(y)]
        y = np.where(np.isfinite(y), y, np.nan)
        limit = max(100, POINTS // self.count)
        if len(x) > limit:
            starts = np.linspace(0, len(x), limit, endpoint=False).astype(int)
            x, y = (np.add.reduceat(values, starts) / np.diff(starts, append=len(values)) for values in (x, y))
        found = {
            "run": self.index,
            "name": name,
            "x": [int(step) for step in x],
            "y": [None if math.isnan(value) else float(f"{value:.6g}") for value in y],
            "colour": f"c{colour}",
            "mode": "lines",
        }
        if self.hours:
            found["hours"] = [float(f"{hour:.5g}") for hour in np.interp(x, *self.hours)]
        if self.count > 1:
            found |= dict(name=self.label if main else f"{self.label}, {name}", colour=f"c{self.index % 6}")
            found |= dict(legendgroup=self.label, showlegend=main)
        return found | look

    def band(self, name: str, x, y, half, **look) -> Iterator[dict]:
        """A dashed curve, and a band of y +- half that is filled."""
        edge: dict = dict(line=dict(width=0), showlegend=False, hoverinfo="skip")
        yield self.curve(name, x, y - half, 2, **edge)
        yield self.curve(name, x, y + half, 2, fill="tonexty", **edge)
        yield self.curve(name, x, y, 2, line=dict(dash="dash", width=2), **look)


def all_charts(runs: Sequence[Run]) -> Iterator[dict]:
    """Each plot with its title, unit, caption, text for those who cannot see it, and curves, of which it may have none.

    scale: of its vertical axis, if the reader does not choose it; zero: the axis starts at 0; first: the step from
    which on its values have to be seen.
    """
    drawn = [Drawn(run, i, len(runs)) for i, run in enumerate(runs)]
    first = min(max(run.warm, 0.1 * run.step) for run in runs)
    if measure(runs)[0] == "bits_per_byte":
        bits = [evaluations(d, "bits_per_byte") for d in drawn if len(d.run.evals["step"])]
        yield chart("Loss", "bits per byte", bits, format=".4f", first=first)
    else:
        losses = [curve for d in drawn for curve in loss_curves(d)] + reference(drawn)
        caption = "Marks: evaluations, with two standard errors where known. Thin line: training steps."
        yield chart("Loss", "nats per token", losses, caption, format=".4f", first=first)
        ends = [curve for d in drawn for curve in forecast_curves(d)]
        caption = "The loss that was forecast for the end, with its band, over the step of the forecast."
        yield chart("Forecasts of the last val loss", "nats per token", ends, caption, format=".3f", scale="linear")
    tests = [evaluations(d, "choices_acc_norm") for d in drawn if np.isfinite(d.run.evals["choices_acc_norm"]).any()]
    yield chart("Multiple choice", "accuracy by length", tests, format=".3f", scale="linear")
    rates = [curve for d in drawn for curve in rate_curves(d)]
    yield chart("Learning rate", "", rates, format=".3~e", scale="linear", zero=True)
    for name, (title, unit, scale) in LINES.items():
        if name != "ms_per_step" or not any("tokens_per_s" in run.lines for run in runs):
            lines = [line_curve(d, name) for d in drawn if np.isfinite(d.run.lines.get(name, [])).any()]
            yield chart(title, unit, lines, format=",.4~g", scale=scale, zero=scale == "linear")


def chart(title: str, unit: str, curves: list[dict], caption: str = "", **options) -> dict:
    named = [described(curve) for curve in curves if curve.get("showlegend") is not False]
    text = f"{title}{f' in {unit}' if unit else ''}, over steps. {' '.join(named)}"
    name = title.lower().replace(" ", "-")
    return dict(id=name, title=title, unit=unit, caption=caption, text=text, curves=curves, **options)


def described(curve):
    points = [(x, y) for x, y in zip(curve["x"], curve["y"], strict=True) if y is not None]
    if not points:
        return f"{curve['name']}: no finite value."
    (x0, y0), (x1, y1), (low_x, low_y) = points[0], points[-1], min(points, key=lambda point: point[1])
    return f"{curve['name']}: {y0:.4g} at step {x0:,}, {y1:.4g} at step {x1:,}, lowest {low_y:.4g} at step {low_x:,}."


def loss_curves(d: Drawn) -> Iterator[dict]:
    """Training steps and evaluations of a run; of a single run also the forecast and the expected loss."""
    run, evals = d.run, d.run.evals
    if np.isfinite(run.lines.get("loss", [])).any():
        name = "one micro batch" if run.micro else "training steps"
        look: dict = dict(line=dict(width=1, dash=d.dash), opacity=0.4 if len(evals["step"]) else 1, smooth=True)
        yield d.curve(name, run.lines["step"], run.lines["loss"], 1, main=not len(evals["step"]), **look)
    if d.count == 1 and np.isfinite(evals["train"]).any():
        look = dict(line=dict(width=1.2, dash="dot"), marker=dict(symbol=f"{d.symbol}-open", size=6))
        yield d.curve("train", evals["step"], evals["train"], 1, mode="lines+markers", **look)
    if len(evals["step"]):
        errors: dict = {}
        if len(run.groups) == len(evals["step"]) <= 100:
            twice = [2 * np.std(g, ddof=1) / math.sqrt(len(g)) if len(g) > 1 else 0 for g in run.groups]
            errors["error_y"] = dict(array=[float(f"{error:.3g}") for error in twice], width=2, thickness=1)
        yield evaluations(d, "val", **errors)
    if d.count == 1 and run.config:
        yield from end_curves(d)


def evaluations(d: Drawn, name: str, **look) -> dict:
    look |= dict(line=dict(width=1.8, dash=d.dash), marker=dict(symbol=d.symbol, size=6))
    return d.curve("val", d.run.evals["step"], d.run.evals[name], 0, mode="lines+markers", **look)


def end_curves(d: Drawn) -> Iterator[dict]:
    """The forecast, and the loss that was expected before the run."""
    run = d.run
    if not run.finished and (fit := run.forecast[0]):
        ahead = np.unique(np.linspace(fit["step"], fit["end"], 60).astype(int))
        half = fit["band"] * (ahead - ahead[0]) / max(1, ahead[-1] - ahead[0])
        yield from d.band("forecast", ahead, forecast.follow(fit, run.rates)[ahead], half)
    if expected := run.plan["loss"]:
        end: dict = dict(mode="markers", error_y=dict(array=[expected.band], width=9, thickness=2))
        end["marker"] = dict(symbol="line-ew-open", size=12)
        yield d.curve("expected before the run", [run.end], [expected.loss], 3, **end)


def forecast_curves(d: Drawn) -> Iterator[dict]:
    """The forecasts that were possible at earlier evaluations, and what came."""
    earlier = d.run.earlier_forecasts
    if len(earlier) < 2:
        return
    steps, losses, bands = (np.array([row[name] for row in earlier]) for name in ("step", "loss", "band"))
    look: dict = dict(mode="lines+markers", marker=dict(symbol=d.symbol, size=6))
    yield from d.band("forecast", steps, losses, bands, **look)
    if d.run.finished:
        yield d.curve("what came", steps, np.full(len(steps), d.run.val.values[-1]), 0, main=False, line=dict(width=2))


def rate_curves(d: Drawn) -> Iterator[dict]:
    if d.run.rates:
        steps = np.unique(np.linspace(0, len(d.run.rates) - 1, 400).astype(int))
        rates = np.array(d.run.rates)[steps]
        yield d.curve("learning rate", steps, rates, 3, line=dict(width=1.8, dash=d.dash))
    elif "lr" in d.run.lines:
        yield line_curve(d, "lr")


def line_curve(d: Drawn, name: str) -> dict:
    line = dict(width=1.3, dash=d.dash)
    return d.curve(name.replace("_", " "), d.run.lines["step"], d.run.lines[name], 1, line=line, smooth=name != "lr")


def reference(drawn: Sequence[Drawn]) -> list[dict]:
    """GPT-2 124M by llm.c as far as the runs go, where their tokens are GPT-2's."""
    kinds = {(d.run.about.get("tokenizer") or {}).get("kind", "gpt2") for d in drawn}
    if kinds != {"gpt2"} or not all(d.run.config and 50257 <= d.run.config.vocab_size <= 51200 for d in drawn):
        return []
    tokens = max(d.run.step * d.run.config.step_tokens for d in drawn)
    seen = [(step, loss) for step, loss in LLMC if step * LLMC_STEP_TOKENS <= tokens]
    if len(seen) < 3:
        return []
    look: dict = dict(mode="lines+markers", marker=dict(symbol="x-thin-open", size=6), line=dict(width=1, dash="dot"))
    look |= dict(name="GPT-2 124M by llm.c", colour="soft", legendgroup="", step_tokens=LLMC_STEP_TOKENS)
    steps, losses = zip(*seen, strict=True)
    return [drawn[0].curve("", steps, losses, 0) | look]


def hours_of(run: Run) -> Curve | None:
    """Hours since the start over the steps, after the last one at the median pace; None if not known."""
    steps, seconds = run.lines["step"], run.lines.get("seconds")
    if seconds is None and "ms_per_step" in run.lines:
        each = np.nan_to_num(run.lines["ms_per_step"] / 1000, posinf=0)
        each = np.minimum(each, 2 * np.median(each)) if run.micro else each  # nanoGPT's may include an evaluation
        evaluations = np.append(0, np.nancumsum(run.evals["eval_seconds"]))
        seconds = np.cumsum(each * np.diff(steps, prepend=0)) + evaluations[np.searchsorted(run.evals["step"], steps)]
    if seconds is None or np.isfinite(seconds).sum() < 2:
        return None
    steps, seconds = (np.append(0, values) for values in finite(steps, seconds).since(1))
    pace, far = np.median(np.diff(seconds) / np.diff(steps)), 1000 * steps[-1]
    return Curve(np.append(steps, far), np.append(seconds, seconds[-1] + pace * (far - steps[-1])) / 3600)
