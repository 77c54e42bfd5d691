"""The page of report.py: one small file that loads nothing; it draws no forecast that the text withholds."""

import json
import re
import sys

import numpy as np
import pytest
from curves import write_founding_run
from made_runs import write_run

import report
from onecard import page as page_module

LIBRARY = pytest.importorskip("plotly.offline").get_plotlyjs()


def page_of(out, *arguments):
    """Writes the page to `out` -> the page without plotly's script, and the numbers in it."""
    report.main([*map(str, arguments), f"--out={out}"])
    text = out.read_text(encoding="utf-8")
    assert text.count(LIBRARY) == 1
    numbers = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)
    return text.replace(LIBRARY, ""), json.loads(numbers[1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The page, its numbers and the run: 4,000 steps with a log line and an evaluation every 100."""
    folder = tmp_path_factory.mktemp("finished")
    run = write_run(folder / "a", about=dict(date="2026-11-25 12:00", commit="abc123"))
    return *page_of(folder / "x.html", run), report.read_run(run)


def curves_of(numbers, chart):
    return [curve for c in numbers["charts"] if c["id"] == chart for curve in c["curves"]]


def names(numbers, chart):
    return [curve["name"] for curve in curves_of(numbers, chart) if curve.get("showlegend") is not False]


def test_the_page_is_one_small_file_that_loads_nothing_and_follows_the_theme(finished):
    page, numbers, _ = finished
    assert len(LIBRARY) < 5e6 and len(page) < 1e6
    assert not re.findall(r"https?:|src=|<link|@import|url\(", page) and "prefers-color-scheme: dark" in page
    assert "&lt;b&gt;Once&lt;/b&gt; upon" in page and "<b>Once" not in page
    for colour in {curve["colour"] for chart in numbers["charts"] for curve in chart["curves"]}:
        assert page.count(f"--{colour}: #") == 2, "light and dark"


def test_verdict_and_headings_come_first_and_every_plot_has_a_text(finished):
    page, numbers, _ = finished
    charts = [chart["id"] for chart in numbers["charts"]]
    assert charts[:3] == ["loss", "forecasts-of-the-last-val-loss", "learning-rate"]
    assert page.index("<h1>") < page.index("class=verdict") < page.index("<h2>Curves") < page.index("<h2>Samples")
    texts = re.findall(r'role=img aria-label="([^"]+)"', page)
    assert len(texts) == len(charts) and all(re.search(r"\d at step [\d,]+", text) for text in texts)
    for fact in ("hardware<td>cpu", "started<td>2026-11-25 12:00", "commit<td>abc123"):
        assert f"<td>{fact}" in page


def test_earlier_forecasts_stand_beside_what_came(finished):
    page, numbers, run = finished
    came = curves_of(numbers, "forecasts-of-the-last-val-loss")[-1]
    assert came["name"] == "what came" and came["y"][0] == pytest.approx(run.evals["val"][-1], abs=1e-4)
    first = run.earlier_forecasts[0]
    assert f"<td>50% (step 2,000)<td>{first['loss']:.3f} +- {first['band']:.3f}<td>" in page


def test_axes_are_tokens_and_hours_where_they_are_known(finished):
    page, numbers, _ = finished
    assert "<option>steps<option>tokens<option>hours" in page
    assert numbers["runs"] == [dict(step_tokens=12 * 40 * 1024)]
    seconds = 4000 * 0.05 + 40 * 1.0  # 50 ms a step and 40 evaluations before the last log line
    val = next(curve for curve in curves_of(numbers, "loss") if curve["name"] == "val")
    assert val["hours"][0] == 0 and val["hours"][-1] * 3600 == pytest.approx(seconds, rel=1e-3)


def test_the_values_are_those_of_the_run_and_gaps_where_they_are_not_finite(tmp_path):
    (tmp_path / "x.csv").write_text("step,val_loss\n0,5\n10,4.25\n20,nan\n30,4\n40,3.75\n50,3.5\n")
    page, numbers = page_of(tmp_path / "x.html", tmp_path / "x.csv")
    (val,) = curves_of(numbers, "loss")
    assert val["x"] == [0, 10, 20, 30, 40, 50] and val["y"] == [5, 4.25, None, 4, 3.75, 3.5]
    assert "<option>steps</select>" in page


def test_a_long_run_is_thinned_to_means_and_stays_small(tmp_path):
    (tmp_path / "x.csv").write_text(
        "step,loss,grad_norm\n" + "".join(f"{s},{3 + s % 2},{s % 7}\n" for s in range(30_000))
    )
    page, numbers = page_of(tmp_path / "x.html", tmp_path / "x.csv")
    (loss,) = curves_of(numbers, "loss")
    assert len(page) < 3e5 and len(loss["x"]) == page_module.POINTS and abs(np.mean(loss["y"]) - 3.5) < 1e-3


def test_a_forecast_is_drawn_while_the_text_has_one_and_not_where_it_is_withheld(tmp_path, capsys):
    log, keys = write_founding_run(tmp_path)
    page, numbers = page_of(tmp_path / "x.html", log, f"--run_config={keys}")
    *_, fan = (curve for curve in curves_of(numbers, "loss") if curve["name"] == "forecast")
    assert f"{fan['y'][-1]:.3f}" in capsys.readouterr().out and fan["x"][-1] == 20000
    assert "Earlier forecasts" in page and "not yet" in page and "GPT-2 124M by llm.c" in names(numbers, "loss")
    text = log.read_text().replace("val loss 3.5", "val loss 8.5")  # the last evaluations
    log.write_text(text.replace("train loss 3.6", "train loss 8.6"))
    page, numbers = page_of(tmp_path / "x.html", log, f"--run_config={keys}")
    assert "forecast" not in names(numbers, "loss") and "Earlier forecasts" not in page
    assert not curves_of(numbers, "forecasts-of-the-last-val-loss")


def test_runs_laid_over_each_other_differ_in_dashes_and_markers_too_and_their_keys_are_side_by_side(tmp_path):
    a, b = write_run(tmp_path / "first"), write_run(tmp_path / "second", beta2=0.5, last=2000)
    page, numbers = page_of(tmp_path / "x.html", a, b)
    one, two = (curve for curve in curves_of(numbers, "loss") if "marker" in curve and curve["legendgroup"])
    assert (one["name"], two["name"]) == ("a first", "b second")
    assert one["line"]["dash"] != two["line"]["dash"] and one["marker"]["symbol"] != two["marker"]["symbol"]
    assert f"<th>key<th>{a}<th>{b}<th>default" in page and "<td>beta2<td>0.95<td>0.5<td>0.95" in page


def test_runs_with_two_tokenizers_are_drawn_in_bits_per_byte_without_gpt2s_curve(tmp_path):
    runs = [write_run(tmp_path / name, about=dict(tokenizer=dict(kind="bpe", sha256=name))) for name in "ab"]
    _, numbers = page_of(tmp_path / "x.html", *runs)
    bits = report.read_run(runs[0]).evals["bits_per_byte"]
    assert numbers["charts"][0]["unit"] == "bits per byte" and len(curves_of(numbers, "loss")) == 2
    assert curves_of(numbers, "loss")[0]["y"] == pytest.approx(bits, rel=1e-4)
    assert "forecasts-of-the-last-val-loss" not in [chart["id"] for chart in numbers["charts"]]
    _, numbers = page_of(tmp_path / "x.html", runs[0])
    assert "GPT-2 124M by llm.c" not in names(numbers, "loss") and numbers["charts"][0]["unit"] == "nats per token"


def test_a_watched_page_loads_itself_again_until_the_run_has_ended(tmp_path, monkeypatch, finished):
    monkeypatch.setattr(report.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    folder = write_run(tmp_path / "a", last=3000)
    with pytest.raises(KeyboardInterrupt):
        report.main([str(folder), "--watch=60"])
    assert "<meta http-equiv=refresh content=60>" in (folder / "report.html").read_text(encoding="utf-8")
    assert "http-equiv" not in page_of(tmp_path / "x.html", finished[2].name, "--watch=60")[0]


def test_without_plotly_the_words_still_come(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    folder = write_run(tmp_path / "a")
    report.main([str(folder)])
    said = capsys.readouterr().out
    assert "verdict" in said and "plotly is not installed (pip install plotly, or -e '.[plot]')" in said
    assert not (folder / "report.html").exists()
