"""The plots of a report: the curves of its runs over steps, in plotly's terms, ready to be written as JSON.

    charts = [chart for chart in all_charts(runs) if chart["curves"]]

page.js draws them. A single run has a colour for each curve; of several runs, each has its own colour, dashes and
markers. What is not finite is a gap. A long curve is thinned to the means of equal parts.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from onecard import forecast
from onecard.compare import measure
from onecard.run import Run

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


class Drawn:
    """A run as it is drawn, number `index` of `count`."""

    def __init__(self, run: Run, index: int, count: int):
        self.run, self.index, self.count = run, index, count
        self.label = f"{chr(ord('a') + index)} {Path(run.name).stem[:24]}"  # its letter as in the sentences of compare
        self.dash, self.symbol = DASHES[index % len(DASHES)], SYMBOLS[index % len(SYMBOLS)]

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
    """A curve in words."""
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
    """The learning rate of the whole schedule, or of the log lines."""
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


def axes_of(run: Run) -> dict:
    """What turns the steps of a run into tokens (step_tokens) and into hours ([steps, hours]), where it is known."""
    found: dict = dict(step_tokens=run.config.step_tokens) if run.config else {}
    steps, seconds = run.lines["step"], run.lines.get("seconds")
    if seconds is None and "ms_per_step" in run.lines:
        each = np.nan_to_num(run.lines["ms_per_step"] / 1000, posinf=0)
        each = np.minimum(each, 2 * np.median(each)) if run.micro else each  # nanoGPT's may include an evaluation
        evaluations = np.append(0, np.nancumsum(run.evals["eval_seconds"]))
        seconds = np.cumsum(each * np.diff(steps, prepend=0)) + evaluations[np.searchsorted(run.evals["step"], steps)]
    if seconds is not None and np.isfinite(seconds).sum() > 1:
        steps, seconds = steps[np.isfinite(seconds)], seconds[np.isfinite(seconds)]
        chosen = np.unique(np.linspace(0, len(steps) - 1, 300).astype(int))
        chosen = chosen[steps[chosen] > 0]
        found["hours"] = [[0, *steps[chosen].tolist()], [0, *(float(f"{s / 3600:.5g}") for s in seconds[chosen])]]
    return found
