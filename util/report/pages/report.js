"use strict";
/* Curves, the film of pictures, light and dark. The numbers are in #data; see util/results/curves.py. */
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent).runs;
  const root = document.documentElement;
  const panels = [...document.querySelectorAll(".panel")];
  const touch = matchMedia("(pointer: coarse)").matches;
  const DASHES = ["solid", "dash", "dot", "dashdot"]; // for more runs than there are colours
  const COLOURS = 8;
  const state = { axis: "updates", smoothing: 0, hidden: new Set(), range: null };

  // ---- drawing ---------------------------------------------------------------------------------------

  const longest = Math.max(0, ...runs.map((run) => (run.clock ? run.clock.seconds.at(-1) : 0)));
  const [unit, seconds] = longest > 7200 ? ["hours", 3600] : longest > 180 ? ["minutes", 60] : ["seconds", 1];
  const has = { updates: () => true, epochs: (run) => run.updatesPerEpoch, time: (run) => run.clock, share: (run) => run.updates };
  const titles = { updates: "updates", epochs: "epochs", time: unit, share: "% of what each run has done" };

  /** Seconds at update `step` by a clock, linear between its points. */
  function timeAt(clock, step) {
    const { x, seconds: s } = clock;
    let high = x.findIndex((known) => known >= step);
    if (high < 0) high = x.length - 1;
    const [x0, s0] = high ? [x[high - 1], s[high - 1]] : [0, 0];
    return x[high] > x0 ? s0 + ((s[high] - s0) * (step - x0)) / (x[high] - x0) : s[high];
  }

  function horizontal(run, steps) {
    if (state.axis === "epochs") return steps.map((step) => step / run.updatesPerEpoch);
    if (state.axis === "time") return steps.map((step) => timeAt(run.clock, step) / seconds);
    if (state.axis === "share") return steps.map((step) => (100 * step) / run.updates); // short and long runs alike
    return steps;
  }

  /** Exponential mean, corrected for its start; gaps stay gaps. */
  function smoothed(values) {
    let mean = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = state.smoothing * mean + (1 - state.smoothing) * value;
      weight = state.smoothing * weight + (1 - state.smoothing);
      return mean / weight;
    });
  }

  const css = (name, property = "color") => {
    const probe = document.body.appendChild(document.createElement("span"));
    probe.style.color = `var(${name})`;
    const value = getComputedStyle(probe)[property];
    probe.remove();
    return value;
  };
  const faint = (colour, opacity) => colour.replace("rgb(", "rgba(").replace(")", `, ${opacity})`);
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function tracesOf(name, colours) {
    return runs.flatMap((run, number) => {
      const curve = run.curves[name];
      if (!curve || state.hidden.has(number) || !has[state.axis](run)) return [];
      const x = horizontal(run, curve.x), colour = colours[number % COLOURS], few = curve.x.length <= 30;
      const dash = DASHES[Math.floor(number / COLOURS) % DASHES.length];
      const common = { x, name: escaped(run.label), type: "scatter", mode: "lines", line: { color: colour, width: 1.8, dash } };
      const silent = { hoverinfo: "skip", showlegend: false };
      const traces = [];
      if (curve.low && !state.smoothing) {
        const edge = { ...common, ...silent, line: { width: 0 } };
        traces.push({ ...edge, y: curve.low }, { ...edge, y: curve.high, fill: "tonexty", fillcolor: faint(colour, 0.22) });
      }
      if (state.smoothing) traces.push({ ...common, ...silent, y: curve.y, line: { color: faint(colour, 0.3), width: 1 } });
      const y = state.smoothing ? smoothed(curve.y) : curve.y;
      traces.push({ ...common, y, mode: few ? "lines+markers" : "lines", marker: { size: 5, color: colour } });
      return traces;
    });
  }

  /** From the first to the last point of any curve, the same for all panels. */
  function extent() {
    const ends = runs.flatMap((run, number) => {
      if (state.hidden.has(number) || !has[state.axis](run)) return [];
      return Object.values(run.curves).flatMap((curve) => horizontal(run, [curve.x[0], curve.x.at(-1)]));
    });
    const [low, high] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
    const margin = 0.02 * (high - low || 1);
    return [low - margin, high + margin];
  }

  function draw(panel, theme) {
    const plot = panel.querySelector(".plot");
    const log = panel.querySelector(".log").getAttribute("aria-pressed") === "true";
    const lines = { gridcolor: theme.line, zerolinecolor: theme.line, linecolor: theme.line, tickfont: { size: 11 } };
    const layout = {
      margin: { l: 52, r: 12, t: 26, b: 36 }, // the buttons stand above the curves
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: theme.text, family: "system-ui, sans-serif", size: 12 },
      showlegend: false, hovermode: "x unified", dragmode: touch ? false : "zoom",
      hoverlabel: { bgcolor: theme.card, bordercolor: theme.line, font: { color: theme.text } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.soft, activecolor: theme.accent },
      xaxis: { ...lines, range: state.range ?? extent(), title: { text: titles[state.axis], font: { size: 11 }, standoff: 6 } },
      yaxis: { ...lines, type: log ? "log" : "linear", exponentformat: "power", nticks: 6, automargin: true },
      annotations: [],
    };
    const traces = tracesOf(panel.dataset.panel, theme.runs);
    if (!traces.length) {
      layout.annotations.push({ text: "nothing to show", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 });
    }
    const config = {
      responsive: true, displaylogo: false, displayModeBar: touch ? true : "hover", doubleClick: false,
      // listed one by one: some of the default buttons upload the numbers
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
      toImageButtonOptions: { filename: panel.dataset.panel },
    };
    return Plotly.react(plot, traces, layout, config);
  }

  function drawAll() {
    const theme = { runs: [] };
    for (const name of ["text", "soft", "line", "card", "accent"]) theme[name] = css(`--${name}`);
    for (let i = 0; i < COLOURS; i++) theme.runs.push(css(`--run-${i}`));
    panels.forEach((panel) => draw(panel, theme));
  }

  // ---- zoom: all panels follow the dragged one -------- -------------------------------------------------

  let following = false;
  function follow(source, event) {
    if (following) return;
    const home = event["xaxis.autorange"] || event["yaxis.autorange"];
    if (home) zoom(null);
    else if (event["xaxis.range[0]"] !== undefined) zoom([event["xaxis.range[0]"], event["xaxis.range[1]"]], source);
  }

  /** Zoom all panels but `source`, which has this range of the horizontal axis already; null shows all of it. */
  function zoom(range, source) {
    following = true;
    state.range = range;
    const change = { "xaxis.range": range ?? extent(), ...(range ? {} : { "yaxis.autorange": true }) };
    const others = panels.map((panel) => panel.querySelector(".plot")).filter((plot) => plot !== source);
    Promise.all(others.map((plot) => Plotly.relayout(plot, change))).finally(() => { following = false; });
  }

  drawAll();
  for (const panel of panels) {
    const plot = panel.querySelector(".plot"), log = panel.querySelector(".log"), large = panel.querySelector(".large");
    const values = runs.flatMap((run) => run.curves[panel.dataset.panel]?.y ?? []);
    log.hidden = !values.length || values.some((value) => value !== null && value <= 0);
    plot.on("plotly_relayout", (event) => follow(plot, event));
    plot.on("plotly_doubleclick", () => zoom(null));
    log.addEventListener("click", () => { press(log); drawAll(); });
    large.addEventListener("click", () => { press(large); panel.classList.toggle("big"); Plotly.Plots.resize(plot); });
  }

  function press(button) {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", now);
    return now;
  }

  // ---- controls ----------------------------------------------------------------------------------------

  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.disabled = !runs.some(has[input.value]);
    input.checked = input.value === state.axis;
    input.addEventListener("change", () => { state.axis = input.value; state.range = null; drawAll(); });
  }
  const smoothing = document.getElementById("smoothing");
  smoothing.value = 0;
  smoothing.addEventListener("input", () => { state.smoothing = Number(smoothing.value); drawAll(); });
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const number = Number(chip.dataset.run);
      press(chip) ? state.hidden.delete(number) : state.hidden.add(number);
      drawAll();
    });
  }
  document.getElementById("reset").addEventListener("click", () => zoom(null));

  // ---- pictures over the epochs ------------------------------------------------------------------------

  const slider = document.getElementById("film");
  if (slider) {
    const films = [...document.querySelectorAll(".film")];
    const frames = films.map((film) => [...film.querySelectorAll("[data-epoch]")]);
    const epochs = [...new Set(frames.flat().map((frame) => Number(frame.dataset.epoch)))].sort((a, b) => a - b);
    const play = document.getElementById("play");
    let timer = 0;
    const show = (place) => {
      slider.value = place;
      document.getElementById("epoch").textContent = epochs[place] ?? "";
      films.forEach((film, number) => {
        // the newest picture that the run had by then
        const past = frames[number].filter((frame) => Number(frame.dataset.epoch) <= epochs[place]);
        const shown = past.at(-1) ?? frames[number][0];
        frames[number].forEach((frame) => { frame.hidden = frame !== shown; });
        if (shown) film.querySelector(".when").textContent = `epoch ${shown.dataset.epoch}`;
      });
    };
    const stop = () => { clearInterval(timer); play.setAttribute("aria-pressed", "false"); play.textContent = "▶ Play"; };
    slider.max = Math.max(0, epochs.length - 1);
    show(Math.max(0, epochs.length - 1));
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    play.addEventListener("click", () => {
      if (!press(play)) return stop();
      play.textContent = "❚❚ Pause";
      timer = setInterval(() => show((Number(slider.value) + 1) % epochs.length), 600);
    });
  }

  // ---- copy, light and dark ------------------------------------------------------------------------------

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const text = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch { // without access to the clipboard, select the text
        getSelection().selectAllChildren(text);
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* a page from disk may have no storage */ }
    drawAll();
  });
  dark.addEventListener("change", drawAll);
})();
