"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#4878a8", "#d1813a", "#5a9b5e", "#b5545b", "#8b6fb0", "#8a7a5c"];
const MARGIN = { left: 52, right: 10, top: 8, bottom: 22 };

// Numbers

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e5) return Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
  if (size >= 100 || value === 0) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  if (size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) {
    found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  }
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
    for (const k of high - low > 3 ? [1] : [1, 2, 5]) {
      const value = power + Math.log10(k);
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found;
}

// A mean over the neighbours on both sides, so that the trend of a noisy curve shows.
function smooth(values) {
  const sums = [0];
  for (const value of values) sums.push(sums.at(-1) + value);
  const reach = Math.ceil(values.length / 50);
  return values.map((_, i) => {
    const side = Math.min(reach, i, values.length - 1 - i);
    return (sums[i + side + 1] - sums[i - side]) / (2 * side + 1);
  });
}

// Drawing

function node(name, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

function html(name, parent, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  parent.append(made);
  return made;
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

class Chart {
  constructor(spec, parent) {
    this.kind = spec.kind;
    const names = Object.keys(spec.lines);
    this.lines = names.map((name, i) => {
      const [steps, mean, low, high] = spec.lines[name];
      const smoothed = spec.kind === "log" && mean.length > 30 ? smooth(mean) : null;
      return { name, steps, mean, low, high, smoothed, colour: this.colour(i, names.length) };
    });
    this.canLog = spec.kind === "log" && this.lines.every((l) => (l.low || l.mean).every((v) => v > 0));
    const card = html("div", parent, "", "chart" + (spec.title === "Loss" ? " wide" : ""));
    this.height = spec.title === "Loss" ? 260 : 170;
    const head = html("h2", card, spec.title);
    if (this.canLog) this.addSwitch(head);
    if (names.length === 1) this.now = html("b", head);
    this.svg = node("svg", { role: "img", "aria-label": spec.title, height: this.height }, card);
    this.legend = html("div", card, "", "legend");
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.tell(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  colour(i, count) {
    if (this.kind !== "rising") return COLOURS[i % COLOURS.length];
    return `hsl(${(205 - 185 * (i / Math.max(count - 1, 1))).toFixed(0)} 60% 52%)`;
  }

  addSwitch(head) {
    const label = html("label", head);
    this.switch = html("input", label);
    this.switch.type = "checkbox";
    label.append(" log");
    this.switch.addEventListener("change", () => this.draw());
  }

  format(value) {
    return this.kind === "percent" ? `${short(100 * value)} %` : short(value);
  }

  // The axes' ends, from what is drawn; a flat curve gets some room.
  scale() {
    this.log = this.switch?.checked;
    const height = this.log ? Math.log10 : (v) => v;
    const values = this.lines.flatMap((l) => l.low ? [...l.low, ...l.high] : l.mean).map(height);
    let low = Math.min(...values), high = Math.max(...values);
    if (this.kind === "percent") [low, high] = [0, Math.max(high, 0.01)];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    if (this.kind !== "percent" && (low < 0 || low - room > 0 || this.log)) low -= room;
    high += room;
    const first = Math.min(...this.lines.map((l) => l.steps[0]));
    const last = Math.max(...this.lines.map((l) => l.steps.at(-1)), first + 1);
    const width = this.svg.clientWidth - MARGIN.left - MARGIN.right;
    const tall = this.height - MARGIN.top - MARGIN.bottom;
    this.x = (step) => MARGIN.left + ((step - first) / (last - first)) * width;
    this.y = (value) => MARGIN.top + ((high - height(value)) / (high - low)) * tall;
    this.step = (x) => first + ((x - MARGIN.left) / width) * (last - first);
    this.ends = { first, last, low, high, width };
  }

  draw() {
    if (!this.svg.clientWidth) return;
    this.scale();
    this.svg.replaceChildren();
    const { first, last, low, high, width } = this.ends;
    for (const tick of this.log ? logTicks(low, high) : ticks(low, high, this.height / 40)) {
      const value = this.log ? 10 ** tick : tick;
      const y = this.y(value);
      node("line", { class: "grid", x1: MARGIN.left, x2: MARGIN.left + width, y1: y, y2: y }, this.svg);
      node("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, this.svg).textContent = this.format(value);
    }
    for (const tick of ticks(first, last, Math.max(width / 80, 3))) {
      const mark = node("text", { x: this.x(tick), y: this.height - 6, "text-anchor": "middle" }, this.svg);
      mark.textContent = short(tick);
    }
    for (const line of this.lines) this.drawLine(line);
    this.cursor = node("line", { class: "cursor", y1: MARGIN.top, y2: this.height - MARGIN.bottom, visibility: "hidden" }, this.svg);
    this.tell(null);
  }

  path(steps, values) {
    return values.map((v, i) => `${this.x(steps[i]).toFixed(1)},${this.y(v).toFixed(1)}`);
  }

  drawLine({ steps, mean, low, high, smoothed, colour }) {
    if (low) {
      const edge = [...this.path(steps, high), ...this.path(steps, low).reverse()];
      node("path", { class: "band", d: `M${edge.join("L")}Z`, style: `fill:${colour}` }, this.svg);
    }
    const draw = (values, name) =>
      node("path", { class: name, d: `M${this.path(steps, values).join("L")}`, stroke: colour }, this.svg);
    draw(mean, smoothed ? "raw" : "");
    if (smoothed) draw(smoothed, "");
    if (steps.length === 1) {
      node("circle", { cx: this.x(steps[0]), cy: this.y(mean[0]), r: 2.5, fill: colour }, this.svg);
    }
  }

  point(event) {
    const step = this.step(event.clientX - this.svg.getBoundingClientRect().left);
    const { steps } = this.lines[0];
    this.tell(steps[nearest(steps, step)]);
  }

  // What stands below the chart: the values at a step, or else the last ones.
  tell(step) {
    this.cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) {
      this.cursor.setAttribute("x1", this.x(step));
      this.cursor.setAttribute("x2", this.x(step));
    }
    this.legend.replaceChildren();
    if (step !== null) html("span", this.legend, `iteration ${step.toLocaleString("en")}`);
    for (const { name, steps, mean, colour } of this.lines) {
      const value = this.format(mean[step === null ? mean.length - 1 : nearest(steps, step)]);
      if (this.now) this.now.textContent = value;
      else {
        const item = html("span", this.legend);
        html("i", item).style.background = colour;
        item.append(name.replace(/^.*\/t_/, ""));
        html("b", item, value);
      }
    }
  }
}

const charts = document.getElementById("charts");
for (const spec of data.charts) new Chart(spec, charts);

// Samples

const clip = document.getElementById("clip");
if (clip) {
  const at = document.getElementById("clip-at");
  const show = () => {
    const { step, video } = data.samples[at.value];
    document.getElementById("clip-step").textContent = `iteration ${step.toLocaleString("en")}`;
    clip.src = `data:video/mp4;base64,${video}`;
    clip.play().catch(() => (clip.controls = true)); // not every browser lets videos start
  };
  clip.addEventListener("click", () => (clip.paused ? clip.play() : clip.pause()));
  at.addEventListener("input", show);
  show();
}
