// Draws the plots of a report (onecard/page.py) with plotly, over steps, tokens or hours.
const page = JSON.parse(document.getElementById("numbers").textContent);
const form = document.forms[0].elements;
const touch = matchMedia("(pointer: coarse)").matches; // a finger scrolls the page, so it zooms by buttons
const ink = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

function along(curve, axis) { // the x values of a curve, which are steps
  const tokens = curve.step_tokens || page.runs[curve.run].step_tokens;
  return axis === "tokens" ? curve.x.map(step => step * tokens) : axis === "hours" ? curve.hours : curve.x;
}

function smooth(y, weight) { // exponential mean, without its bias towards 0
  let mean = 0, sum = 0;
  return y.map(value => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    sum = weight * sum + (1 - weight);
    return mean / sum;
  });
}

function lossRange(chart, scale) { // of what comes after warm-up
  const seen = chart.curves.flatMap(c => c.visible ? [] : c.y.filter((y, i) => y !== null && c.x[i] >= chart.first));
  if (!seen.length) return undefined;
  const low = seen.reduce((a, b) => Math.min(a, b)), high = seen.reduce((a, b) => Math.max(a, b));
  const pad = 0.05 * (high - low) + 0.001;
  return scale === "log" ? [Math.log10(Math.max(low - pad, low / 2)), Math.log10(high + pad)] : [low - pad, high + pad];
}

function decades(chart) {
  const seen = chart.curves.flatMap(curve => curve.y.filter(y => y > 0));
  return Math.log10(seen.reduce((a, b) => Math.max(a, b), 1e-9) / seen.reduce((a, b) => Math.min(a, b), Infinity));
}

function draw() {
  const axis = form.axis.value, weight = Number(form.smoothing.value);
  const lines = {gridcolor: ink("grid"), zerolinecolor: ink("grid"), linecolor: ink("grid"), automargin: true};
  for (const chart of page.charts) {
    const scale = chart.scale || form.scale.value;
    const curves = chart.curves.filter(curve => axis !== "hours" || !curve.step_tokens).map(curve => ({
      ...curve,
      type: "scatter",
      x: along(curve, axis),
      y: curve.smooth ? smooth(curve.y, weight) : curve.y,
      hovertemplate: curve.hoverinfo ? undefined : "%{y} at %{x}",
      line: {...curve.line, color: ink(curve.colour)},
      marker: {...curve.marker, color: ink(curve.colour)},
      fillcolor: ink(curve.colour) + "30",
    }));
    Plotly.react(chart.id, curves, {
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      font: {color: ink("ink"), family: "system-ui, sans-serif", size: 12},
      margin: {l: 8, r: 8, t: touch ? 30 : 8, b: 8},
      hovermode: "x unified",
      hoverlabel: {bgcolor: ink("box"), namelength: -1},
      showlegend: page.runs.length > 1 || chart.curves.filter(curve => curve.showlegend !== false).length > 1,
      legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, traceorder: "normal"},
      dragmode: touch ? false : "zoom",
      modebar: {bgcolor: "transparent", color: ink("soft"), activecolor: ink("ink")},
      xaxis: {
        ...lines, title: {text: axis, standoff: 4}, type: form.across.value, nticks: 8,
        hoverformat: axis === "hours" ? ".2f" : ",d",
      },
      yaxis: {
        ...lines, title: {text: chart.unit, standoff: 8}, type: scale, nticks: 9, hoverformat: chart.format,
        dtick: chart.scale === "log" && decades(chart) > 1 ? "D2" : undefined,
        range: "first" in chart ? lossRange(chart, scale) : undefined,
        rangemode: chart.zero ? "tozero" : "normal", exponentformat: "none", separatethousands: true,
      },
    }, {responsive: true, displaylogo: false, displayModeBar: touch, modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d"]]});
  }
}

for (const field of form) field.value = sessionStorage.getItem(field.name) || field.value; // after a reload
document.forms[0].addEventListener("input", () => {
  for (const field of form) sessionStorage.setItem(field.name, field.value);
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
