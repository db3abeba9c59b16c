// Stacked charts, drawn by uPlot: bars, or areas for running sums. The numbers are in the table below each chart.

import { longName, shortName } from "./calendar.js";
import { rough } from "./exact.js";
import { fill, h } from "./dom.js";

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The colours of series; the last series of more than `SERIES` is the rest, in grey. */
const colourClass = (series, index) => (series.id === null ? "series-rest" : `series-${index}`);

/** A square in the colour of a series, for legends. */
export const swatch = (series, index) => h("i", { className: `swatch ${colourClass(series, index)}` });

/**
 * A chart in a container. `show` draws it again with other data.
 * format: an amount as exact text. approximate: the amount as a number, for drawing. height: in rem.
 */
export class StackedChart {
  #plot = null;
  #data = null;
  #focus = null;

  constructor(container, { format, approximate, height = 19 }) {
    this.container = container;
    this.format = format;
    this.approximate = approximate;
    this.height = height;
    this.tip = h("div", { className: "tip", hidden: true });
    this.status = h("p", { className: "visually-hidden", role: "status" });
    this.canvas = h("div", { className: "plot", tabIndex: 0, role: "img" });
    container.replaceChildren(this.canvas, this.tip, this.status);
    this.canvas.addEventListener("keydown", (event) => this.#move(event));
    this.canvas.addEventListener("blur", () => this.#point(null));
    new ResizeObserver(() => this.#resize()).observe(container);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  show(data, label, { lines = false } = {}) {
    this.#data = { ...data, lines };
    this.canvas.setAttribute("aria-label", `${label}. Arrow keys read the values; the table has all of them.`);
    this.#draw();
  }

  /** Shows one series, given by its position, in full colour, and the others pale; null: all in full colour. */
  emphasise(position) {
    if (this.#focus === position) return;
    this.#focus = position;
    this.#draw();
  }

  #draw() {
    this.#plot?.destroy();
    this.#plot = null;
    if (!this.#data || !this.container.clientWidth) return;
    const { labels, series } = this.#data;
    const sums = labels.map(() => null);
    const stacked = series.map(({ values }) =>
      values.map((value, at) => (value === null ? sums[at] : (sums[at] = (sums[at] ?? 0) + this.approximate(value))))
    );
    const options = {
      ...this.#size(),
      padding: [12, 8, 0, 0],
      legend: { show: false },
      cursor: { points: { show: false }, drag: { setScale: false, x: false, y: false }, y: false },
      scales: {
        x: { time: false, range: [-0.5, labels.length - 0.5] },
        y: { range: (_, low, high) => [0, high > 0 ? high * 1.06 : 1] },
      },
      axes: this.#axes(labels),
      series: [{}, ...this.#layers().reverse()],
      hooks: { setCursor: [(plot) => this.#tell(plot.cursor.idx, plot.cursor.left)] },
    };
    this.#plot = new uPlot(options, [labels.map((_, at) => at), ...stacked.reverse()], this.canvas);
  }

  /** How each series looks. */
  #layers() {
    const { labels, series, lines } = this.#data;
    const bars = uPlot.paths.bars({ size: [0.76, 56], gap: 0 });
    return series.map((one, index) => {
      const colour = style(`--${colourClass(one, index)}`);
      return {
        label: one.label,
        fill: this.#focus === null || this.#focus === index ? colour : `${colour}38`,
        stroke: style("--surface"),
        width: lines ? 1 : labels.length > 120 ? 0 : 0.75,
        paths: lines ? undefined : bars,
        points: { show: false },
      };
    });
  }

  #axes(labels) {
    const rem = this.#rem();
    const axis = { stroke: style("--muted"), font: `${0.8 * rem}px ${style("--font")}`, ticks: { show: false } };
    const days = {
      ...axis,
      grid: { show: false },
      size: 2 * rem,
      space: 4.5 * rem,
      incrs: [1, 2, 3, 5, 7, 10, 14, 20, 28, 50, 100],
      values: (_, splits) => splits.map((at) => (Number.isInteger(at) && labels[at] ? shortName(labels[at]) : "")),
    };
    const amounts = {
      ...axis,
      grid: { stroke: style("--line"), width: 1 },
      size: 3.6 * rem,
      space: 3 * rem,
      values: (_, splits) => splits.map(rough),
    };
    return [days, amounts];
  }

  #size() {
    return { width: this.container.clientWidth, height: this.height * this.#rem() };
  }

  #rem() {
    return Number.parseFloat(getComputedStyle(document.documentElement).fontSize);
  }

  #resize() {
    if (this.#plot) this.#plot.setSize(this.#size());
    else this.#draw();
  }

  #move(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.#point(null);
    if (!step || !this.#plot) return;
    event.preventDefault();
    const count = this.#data.labels.length;
    const next = (this.at ?? (step > 0 ? -1 : count)) + step;
    this.#point(Math.min(count - 1, Math.max(0, next)));
    this.status.textContent = [...this.tip.children].map((line) => line.innerText.replace("\n", ": ")).join("; ");
  }

  #point(at) {
    this.at = at;
    this.#plot?.setCursor(at === null ? { left: -10, top: -10 } : { left: this.#plot.valToPos(at, "x"), top: 20 });
  }

  #tell(at, left) {
    this.at = left < 0 ? null : at ?? null;
    this.tip.hidden = this.at === null;
    if (this.tip.hidden) return;
    const { labels, series, totals, by } = this.#data;
    const lines = series
      .map(({ label, values, ...one }, index) => ({ label, value: values[at], mark: swatch(one, index) }))
      .filter(({ value }) => Number(value) !== 0) // null counts as 0
      .map(({ label, value, mark }) => h("div", {}, h("span", {}, mark, label), h("b", {}, this.format(value))));
    const total = totals[at] === null ? "no data" : this.format(totals[at]);
    const heading = h("div", { className: "tip-heading" }, h("span", {}, longName(labels[at], by)), h("b", {}, total));
    fill(this.tip, heading, lines);
    const middle = this.#plot.bbox.left / devicePixelRatio + left;
    const isRight = middle > this.container.clientWidth / 2;
    this.tip.style.left = isRight ? "" : `${middle + 14}px`;
    this.tip.style.right = isRight ? `${this.container.clientWidth - middle + 14}px` : "";
  }
}
