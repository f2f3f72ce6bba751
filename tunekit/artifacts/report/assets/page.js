// Draws every chart of the page from the JSON beside it: drag to zoom, double-click to go back, one cursor for all.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const number = (value) => value == null ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3)
  ? value.toExponential(1) : value.toLocaleString("en", {maximumSignificantDigits: 5});
const bytes = (value) => {
  if (value == null) return "–";
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (Math.abs(value) >= 1024 && place < 4) { value /= 1024; place += 1; }
  return `${value.toLocaleString("en", {maximumFractionDigits: place ? 2 : 0})} ${units[place]}`;
};
const memoryTicks = (low, high) => {  // round numbers of the unit that the largest one is shown in
  const unit = 1024 ** Math.min(4, Math.floor(Math.log2(Math.max(high, 1)) / 10));
  const rough = (high - low) / unit / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough) * unit;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) found.push(at);
  return found;
};

// the value under the cursor; without a cursor, the last value
const shownOrLast = (show) => (plot, value, series, place) =>
  show(place == null ? plot.data[series].findLast((each) => each != null) : value);

function options(chart, width) {
  const show = chart.unit === "bytes" ? bytes : number;
  const axis = {stroke: color("--soft"), grid: {stroke: color("--grid"), width: 1}, ticks: {stroke: color("--line"), width: 1}};
  const series = chart.series.map((line) => {
    const paint = color(`--c${line.color}`);
    const points = line.kind === "points";
    return {
      label: line.label, stroke: line.kind === "faint" ? `${paint}59` : paint, spanGaps: true,
      width: points ? 1 : line.kind === "faint" ? 1 : 2, dash: line.kind === "dash" ? [6, 5] : undefined,
      points: points ? {show: true, size: 7, fill: paint} : {show: false}, value: shownOrLast(show),
    };
  });
  // evaluations are points, and their mark in the legend is filled
  const fill = (plot, at) => chart.series[at - 1]?.kind === "points" ? color(`--c${chart.series[at - 1].color}`) : null;
  return {
    width, height: 240, legend: {markers: {fill}}, cursor: {sync: {key: "steps"}, drag: {x: true, y: false}},
    scales: {x: {time: false}, y: {distr: chart.log ? 3 : 1}},
    axes: [axis, {...axis, size: 76,
      ...(chart.unit === "bytes" && !chart.log ? {splits: (u, side, low, high) => memoryTicks(low, high)} : {}),
      values: (u, ticks) => ticks.map((tick) => tick == null ? "" : show(tick))}],
    series: [{label: "step", value: shownOrLast(number)}, ...series],
  };
}

const plots = new Map();
function draw() {
  for (const chart of data.charts) {
    const place = document.getElementById(chart.id);
    if (plots.has(chart.id)) plots.get(chart.id).destroy();
    const joined = uPlot.join(chart.series.map((line) => [line.x, line.y]));
    const plot = new uPlot(options(chart, place.clientWidth), joined, place);
    plot.setLegend({idx: null});
    plots.set(chart.id, plot);
  }
}
draw();
new ResizeObserver(() => {
  for (const [id, plot] of plots) {
    const width = document.getElementById(id).clientWidth;
    if (width && width !== plot.width) plot.setSize({width, height: 240});
  }
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
