// The sections of the page, each drawn from documents of the API.

import { longName } from "./calendar.js";
import { colourClass, StackedChart } from "./chart.js";
import { fill, find, h, noData, save } from "./dom.js";
import { approximate, durationOf, grouped, microOf, shownCredits, textOf } from "./exact.js";
import { quotaColumns, quotaRows } from "./quotas.js";
import { scrolling, tableCsv, tableOf } from "./tables.js";
import { ANSWERED, CACHED, chartOf, countOf, labelOf, recentSums, refusalsOf, share } from "./usage.js";

const MANY_QUOTAS = 12;

const count = (number) => grouped(String(number));

/** Today, this week and this month, and the balances. */
export function showRecent(document, who) {
  const sums = recentSums(document.rows, who.today);
  const cards = [
    card("Today", sums.day, [["Yesterday", sums.day.before]]),
    card("This week", sums.week, [["Last week", sums.week.before], ["by the same day", sums.week.soFar]]),
    card("This month", sums.month, [["Last month", sums.month.before], ["by the same day", sums.month.soFar]]),
  ];
  fill(find("recent"), cards, who.accounts.map((account) => balanceCard(account, who.accounts.length > 1)));
}

const credits = (sum) => (sum ? shownCredits(sum.credits) : noData());

function card(title, { now }, before) {
  const lines = before.map(([name, sum]) => h("div", {}, h("dt", {}, name), h("dd", {}, credits(sum))));
  return h("div", { className: "card" }, h("h3", {}, title), h("p", { className: "big" }, credits(now)), h("dl", {}, lines));
}

function balanceCard({ account, balance, balance_age_s: age }, isNamed) {
  const title = isNamed ? `RenderNet balance, ${account}` : "RenderNet balance";
  const seen = age === null ? noData("RenderNet has not told it yet") : `${durationOf(age)} ago`;
  const amount = balance === null ? noData() : grouped(balance);
  const lines = h("dl", {}, h("div", {}, h("dt", {}, "Last seen"), h("dd", {}, seen)));
  return h("div", { className: "card" }, h("h3", {}, title), h("p", { className: "big" }, amount), lines);
}

/** The chart of estimated credits, its legend, and the table with the same numbers. */
export class UsageSection {
  constructor(onSort) {
    this.chart = new StackedChart(find("chart"), { format: shownCredits, approximate });
    this.onSort = onSort;
    find("csv").onclick = () => save(this.fileName, "text/csv;charset=utf-8", tableCsv(this.table));
  }

  show(document, state) {
    const data = chartOf(document, { by: state.by, group: state.group, cumulative: Boolean(state.cumulative) });
    const isEmpty = !document.rows.length;
    const title = `Estimated credits by ${state.group}, ${state.cumulative ? "cumulative" : `each ${state.by}`}`;
    find("chart-title").textContent = title;
    fill(find("chart-total"), totalInWords(document));
    find("chart").hidden = find("legend").hidden = find("csv").hidden = find("table").hidden = isEmpty;
    this.table = state.table === "groups" ? groupTable(document, data, state) : intervalTable(data, state);
    this.fileName = `usage-by-${state.table === "groups" ? state.group : state.by}-${document.from}-${document.to}.csv`;
    if (isEmpty) {
      fill(find("usage-table"), h("p", { className: "empty" }, "No data: nothing was estimated in this period."));
      return;
    }
    this.chart.show(data, title, { lines: Boolean(state.cumulative) });
    showLegend(find("legend"), data, this.chart);
    const table = tableOf({ ...this.table, caption: title, onSort: this.onSort });
    fill(find("usage-table"), scrolling(`Table: ${title}`, table));
  }
}

function totalInWords({ sum, total, from, to }) {
  const days = from === to ? longName(to) : `${longName(from)} to ${longName(to)}`;
  if (!sum) return days;
  return [h("b", {}, grouped(total.estimated_credits)), ` in ${grouped(total.requests)} requests, ${days}`];
}

function showLegend(list, data, chart) {
  const items = data.series.map((series, index) => {
    const item = h("li", {}, swatch(series, index), series.label);
    item.onmouseenter = () => chart.emphasise(index);
    item.onmouseleave = () => chart.emphasise(null);
    return item;
  });
  fill(list, items);
}

const swatch = (series, index) => h("i", { className: `swatch ${colourClass(series, index)}` });

function groupTable(document, data, { group, sort }) {
  const positions = new Map(data.series.map((series, index) => [series.id, index]));
  const name = (row) => {
    const at = positions.get(row.id) ?? data.series.length - 1;
    const id = row.name && h("span", { className: "muted" }, ` ${row.id}`);
    return h("span", {}, swatch(data.series[at], at), labelOf(row), id);
  };
  const percent = (member) => (row) => row[member] === null ? noData() : `${row[member]} %`;
  const columns = [
    { key: "name", label: group === "team" ? "Team" : "Model", isName: true, value: labelOf, show: name, text: (row) => row.id, csv: group },
    ...(group === "team" ? [{ key: "id", onlyCsv: true, isName: true, value: (row) => row.name, csv: "team_name" }] : []),
    { key: "requests", label: "Requests", value: (row) => row.requests, show: (row) => count(row.requests), csv: "requests" },
    { key: "refused", label: "Refused", value: (row) => row.refused, show: (row) => count(row.refused), csv: "refused" },
    {
      key: "credits",
      label: "Estimated credits",
      value: (row) => row.credits,
      show: (row) => shownCredits(row.credits),
      text: (row) => textOf(row.credits),
      csv: "estimated_credits",
    },
    { key: "share", label: "Share", value: (row) => number(row.share), show: percent("share"), text: (row) => row.share, csv: "share_percent" },
    {
      key: "cached",
      label: "From cache",
      value: (row) => number(row.cached),
      show: percent("cached"),
      text: (row) => row.cached,
      csv: "from_cache_percent",
    },
  ];
  const { sum, total } = document;
  const footer = sum && {
    requests: total.requests,
    refused: total.refused,
    credits: microOf(total.estimated_credits),
    share: null,
    cached: share(sum, CACHED),
    isTotal: true,
  };
  columns[0].show = (row) => (row.isTotal ? "Total" : name(row));
  columns.find(({ key }) => key === "share").show = (row) => (row.isTotal ? "" : percent("share")(row));
  return { columns, rows: data.ranked, sort: known(sort, columns, "-credits"), total: footer };
}

const number = (text) => (text === null ? null : Number(text));

const known = (sort, columns, otherwise) => (columns.some(({ key }) => key === sort.replace(/^-/, "")) ? sort : otherwise);

function intervalTable(data, { by, sort }, format = shownCredits, text = textOf) {
  const cells = (values) => ({
    value: ({ at }) => values[at],
    show: ({ at }) => (values[at] === null ? noData() : format(values[at])),
    text: ({ at }) => (values[at] === null ? null : text(values[at])),
  });
  const columns = [
    { key: "interval", label: { day: "Day", week: "Week", month: "Month" }[by], isName: true, value: (row) => row.label, csv: by },
    { key: "total", label: "Total", ...cells(data.totals), csv: "total" },
    ...data.series.map((series, index) => ({ key: `series-${index}`, label: series.label, csv: series.id ?? series.label, ...cells(series.values) })),
  ];
  columns[0].show = (row) => longName(row.label, by);
  const rows = data.labels.map((label, at) => ({ label, at }));
  return { columns, rows, sort: known(sort, columns, "-interval") };
}

/** Quotas: the fullest, or all of them. */
export function showQuotas(document, state, who, now, isAll) {
  const all = quotaRows(document).filter((row) => !state.team || row.scope === "org" || row.team === state.team);
  const rows = isAll ? all : all.slice(0, MANY_QUOTAS);
  const button = find("all-quotas");
  button.hidden = all.length <= MANY_QUOTAS;
  button.textContent = isAll ? "Show only the fullest" : `Show all ${all.length} quotas`;
  if (!all.length) return fill(find("quotas"), h("p", { className: "empty" }, "No quotas are set."));
  const columns = quotaColumns({ timeZone: who.timezone, now });
  fill(find("quotas"), scrolling("Table of quotas", tableOf({ caption: "Quotas", columns, rows, sort: "" })));
  find("quotas").querySelector("table").className = "quotas";
}

/** What the cache has answered and saved. */
export function showCache(document) {
  const { sum } = document;
  const cached = sum && share(sum, CACHED);
  if (!cached) return fill(find("cache"), h("p", { className: "empty" }, "No data: nothing was answered in this period."));
  const all = countOf(sum, Object.keys(ANSWERED));
  const seconds = document.total.upstream_seconds_saved;
  const present = Object.keys(ANSWERED).filter((name) => sum.outcomes[name]);
  const bar = h("div", { className: "stack", "aria-hidden": "true" });
  for (const name of present) {
    const part = h("span", { className: `outcome-${name}` });
    part.style.flexGrow = String(sum.outcomes[name] / all);
    bar.append(part);
  }
  const lines = present.map((name) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, h("i", { className: `swatch outcome-${name}` }), ANSWERED[name]),
      h("td", { className: "number" }, count(sum.outcomes[name])),
      h("td", { className: "number" }, `${share(sum, [name])} %`)
    )
  );
  const head = h("thead", { className: "visually-hidden" }, h("tr", {}, ["Outcome", "Requests", "Share"].map((text) => h("th", { scope: "col" }, text))));
  const table = h("table", {}, h("caption", { className: "visually-hidden" }, "Answers by outcome"), head, h("tbody", {}, lines));
  const figures = [
    ["Answered from the cache", `${cached} %`, "hits, inferred, stale and shared answers"],
    ["Calls to RenderNet saved", count(document.total.upstream_calls_saved), "requests that were not needed"],
    ["Waiting saved", seconds === null ? noData() : durationOf(seconds), seconds === null ? "" : `${grouped(seconds)} s`],
  ];
  const list = figures.map(([name, value, more]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, value, more && h("small", {}, more)))
  );
  fill(find("cache"), h("dl", { className: "figures" }, list), bar, table);
}

/** Refused and failed requests by outcome and interval. */
export class RefusalSection {
  constructor() {
    this.chart = new StackedChart(find("refusal-chart"), { format: count, approximate: Number, height: 12 });
  }

  show(document, { by, model }) {
    const data = refusalsOf(document, by);
    const isEmpty = !data.series.length;
    find("refusal-chart").hidden = find("refusal-legend").hidden = find("refusal-table").hidden = isEmpty;
    find("refusal-text").textContent = isEmpty ? refusalText(document, model) : "";
    if (isEmpty) return;
    const title = `Refused and failed requests by outcome, each ${by}`;
    this.chart.show(data, title);
    showLegend(find("refusal-legend"), data, this.chart);
    const table = intervalTable(data, { by, sort: "-interval" }, count, String);
    const rows = table.rows.filter(({ at }) => data.totals[at]);
    fill(find("refusal-table"), scrolling(`Table: ${title}`, tableOf({ ...table, rows, caption: title })));
  }
}

const FOUND_BY = {
  ask: "a client's request",
  audit: "an audit",
  doubt: "an inferred price that did not hold",
};

/** RenderNet's price changes in the period. */
export function showChanges({ changes, not_kept: dropped }, { model }, who, last) {
  const rows = changes.filter((change) => change.at.slice(0, 10) <= last && (!model || change.model === model));
  const time = new Intl.DateTimeFormat("en-GB", { timeZone: who.timezone, dateStyle: "medium", timeStyle: "short" });
  const price = (key) => ({ value: (row) => Number(row[key]), show: (row) => grouped(row[key]) });
  const columns = [
    { key: "at", label: "Found", isName: true, value: (row) => row.at, show: (row) => time.format(new Date(row.at)) },
    { key: "model", label: "Model", isName: true, value: (row) => row.model },
    { key: "old", label: "Old price", ...price("old") },
    { key: "new", label: "New price", ...price("new") },
    { key: "by", label: "Found by", isName: true, value: (row) => FOUND_BY[row.found_by] ?? row.found_by },
  ];
  if (who.accounts.length > 1) {
    columns.splice(1, 0, { key: "account", label: "Account", isName: true, value: (row) => row.account });
  }
  const table = tableOf({ caption: "Price changes", columns, rows, sort: "-at" });
  const more = Number(dropped) ? h("p", { className: "muted" }, `${grouped(dropped)} more changes were not kept.`) : null;
  const none = h("p", { className: "empty" }, "No price has changed in this period.");
  fill(find("changes"), rows.length ? scrolling("Table of price changes", table) : none, more);
}

function refusalText(document, model) {
  if (model) return "Refused and failed requests have no model: choose all models to see them.";
  return document.rows.length ? "None in this period." : "No data: there were no requests in this period.";
}
