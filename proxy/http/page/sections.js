// The sections of the page, each drawn from documents of the API.

import { longName } from "./calendar.js";
import { StackedChart, swatch } from "./chart.js";
import { fill, find, h, noData, save } from "./dom.js";
import { approximate, durationOf, grouped, microOf, shownCredits, textOf } from "./exact.js";
import { quotaColumns, quotaRows } from "./quotas.js";
import { scrolling, tableCsv, tableOf } from "./tables.js";
import { ANSWERED, CACHED, chartOf, countOf, labelOf, recentSums, refusalsOf, share } from "./usage.js";

const MANY_QUOTAS = 12;

const count = (number) => grouped(String(number));

/** Today, this week and this month, and the balances. */
export function showRecent(document, who) {
  const { day, week, month } = recentSums(document.rows, who.today);
  const bySameDay = (period) => ["by the same day", credits(period.soFar)];
  const cards = [
    card("Today", credits(day.now), [["Yesterday", credits(day.before)]]),
    card("This week", credits(week.now), [["Last week", credits(week.before)], bySameDay(week)]),
    card("This month", credits(month.now), [["Last month", credits(month.before)], bySameDay(month)]),
  ];
  fill(find("recent"), cards, who.accounts.map((account) => balanceCard(account, who.accounts.length > 1)));
}

const credits = (sum) => (sum ? shownCredits(sum.credits) : noData());

function balanceCard({ account, balance, balance_age_s: age }, isNamed) {
  const title = isNamed ? `RenderNet balance, ${account}` : "RenderNet balance";
  const seen = age === null ? noData("RenderNet has not told it yet") : `${durationOf(age)} ago`;
  return card(title, balance === null ? noData() : grouped(balance), [["Last seen", seen]]);
}

function card(title, amount, lines) {
  const list = h("dl", {}, lines.map(([name, value]) => figure(name, value)));
  return h("div", { className: "card" }, h("h3", {}, title), h("p", { className: "big" }, amount), list);
}

const figure = (name, ...value) => h("div", {}, h("dt", {}, name), h("dd", {}, ...value));

const empty = (text) => h("p", { className: "empty" }, text);

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
    if (isEmpty) return fill(find("usage-table"), empty("No data: nothing was estimated in this period."));
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
  const emphasise = (index) => ({
    onmouseenter: () => chart.emphasise(index),
    onmouseleave: () => chart.emphasise(null),
  });
  fill(list, data.series.map((series, index) => h("li", emphasise(index), swatch(series, index), series.label)));
}

function groupTable(document, data, { group, sort }) {
  const positions = new Map(data.series.map((series, index) => [series.id, index]));
  const name = (row) => {
    const at = positions.get(row.id) ?? data.series.length - 1;
    const id = row.name && h("span", { className: "muted" }, ` ${row.id}`);
    return h("span", {}, swatch(data.series[at], at), labelOf(row), id);
  };
  const counts = (key, label) => ({ key, label, csv: key, value: (row) => row[key], show: (row) => count(row[key]) });
  const percents = (key, label, csv) => {
    const text = (row) => row[key];
    const show = (row) => (text(row) === null ? noData() : text(row) && `${text(row)} %`);
    return { key, label, csv, value: (row) => (text(row) === null ? null : Number(text(row))), show, text };
  };
  const columns = [
    {
      key: "name",
      label: group === "team" ? "Team" : "Model",
      csv: group,
      isName: true,
      value: labelOf,
      show: (row) => (row.isTotal ? "Total" : name(row)),
      text: (row) => row.id,
    },
    ...(group === "team" ? [{ key: "id", onlyCsv: true, isName: true, value: (row) => row.name, csv: "team_name" }] : []),
    counts("requests", "Requests"),
    counts("refused", "Refused"),
    {
      key: "credits",
      label: "Estimated credits",
      csv: "estimated_credits",
      value: (row) => row.credits,
      show: (row) => shownCredits(row.credits),
      text: (row) => textOf(row.credits),
    },
    percents("share", "Share", "share_percent"),
    percents("cached", "From cache", "from_cache_percent"),
  ];
  const { sum, total } = document;
  const credits = microOf(total.estimated_credits);
  const footer = sum && { ...total, credits, share: "", cached: share(sum, CACHED), isTotal: true };
  return { columns, rows: data.ranked, sort: known(sort, columns, "-credits"), total: footer };
}

const known = (sort, columns, otherwise) => (columns.some(({ key }) => key === sort.replace(/^-/, "")) ? sort : otherwise);

function intervalTable(data, { by, sort }, format = shownCredits, text = textOf) {
  const cells = (values) => ({
    value: ({ at }) => values[at],
    show: ({ at }) => (values[at] === null ? noData() : format(values[at])),
    text: ({ at }) => (values[at] === null ? null : text(values[at])),
  });
  const columns = [
    {
      key: "interval",
      label: { day: "Day", week: "Week", month: "Month" }[by],
      csv: by,
      isName: true,
      value: (row) => row.label,
      show: (row) => longName(row.label, by),
    },
    { key: "total", label: "Total", ...cells(data.totals), csv: "total" },
    ...data.series.map(({ id, label, values }, index) => ({ key: `series-${index}`, label, csv: id ?? label, ...cells(values) })),
  ];
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
  if (!all.length) return fill(find("quotas"), empty("No quotas are set."));
  const columns = quotaColumns({ timeZone: who.timezone, now });
  fill(find("quotas"), scrolling("Table of quotas", tableOf({ caption: "Quotas", columns, rows, sort: "" })));
  find("quotas").querySelector("table").className = "quotas";
}

/** What the cache has answered and saved. */
export function showCache(document) {
  const { sum } = document;
  const cached = sum && share(sum, CACHED);
  if (!cached) return fill(find("cache"), empty("No data: nothing was answered in this period."));
  const { upstream_calls_saved: calls, upstream_seconds_saved: seconds } = document.total;
  const figures = [
    figure("Answered from the cache", `${cached} %`, small("hits, inferred, stale and shared answers")),
    figure("Calls to RenderNet saved", count(calls), small("requests that were not needed")),
    seconds === null
      ? figure("Waiting saved", noData())
      : figure("Waiting saved", durationOf(seconds), small(`${grouped(seconds)} s`)),
  ];
  const present = Object.keys(ANSWERED).filter((name) => sum.outcomes[name]);
  fill(find("cache"), h("dl", { className: "figures" }, figures), answerBar(sum, present), answerTable(sum, present));
}

const small = (text) => h("small", {}, text);

function answerBar(sum, outcomes) {
  const all = countOf(sum, outcomes);
  const bar = h("div", { className: "stack", "aria-hidden": "true" });
  for (const name of outcomes) {
    const part = h("span", { className: `outcome-${name}` });
    part.style.flexGrow = String(sum.outcomes[name] / all);
    bar.append(part);
  }
  return bar;
}

function answerTable(sum, outcomes) {
  const name = (outcome) => [h("i", { className: `swatch outcome-${outcome}` }), ANSWERED[outcome]];
  const columns = [
    { key: "outcome", label: "Outcome", isName: true, value: (outcome) => ANSWERED[outcome], show: name },
    { key: "requests", label: "Requests", value: (outcome) => count(sum.outcomes[outcome]) },
    { key: "share", label: "Share", value: (outcome) => `${share(sum, [outcome])} %` },
  ];
  const table = tableOf({ caption: "Answers by outcome", columns, rows: outcomes, sort: "" });
  table.tHead.className = "visually-hidden";
  return table;
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
  const shown = rows.length ? scrolling("Table of price changes", table) : empty("No price has changed in this period.");
  fill(find("changes"), shown, more);
}

function refusalText(document, model) {
  if (model) return "Refused and failed requests have no model: choose all models to see them.";
  return document.rows.length ? "None in this period." : "No data: there were no requests in this period.";
}
