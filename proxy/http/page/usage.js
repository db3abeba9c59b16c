// What the page shows of documents of /v1/usage: sums, the series of a chart, and the rows of tables.

import { addDays, intervals, monthStart, previousMonthStart, weekStart } from "./calendar.js";
import { microOf, percentOf } from "./exact.js";

export const SERIES = 6;

/** Outcomes of answered estimates, and what they mean for the cache. */
export const ANSWERED = {
  hit: "Hits: a stored price of the same body",
  inferred: "Inferred: a price of the same setting",
  stale: "Stale prices, served while a new one was fetched",
  collapsed: "Shared: waited for an equal request",
  miss: "Misses: RenderNet was asked",
  bypass: "Asked without the price book",
  unpriced: "Answered without a price",
};
export const CACHED = ["hit", "inferred", "stale", "collapsed"];

/** A document of /v1/usage with its amounts as numbers: micro-credits as BigInt, counts as safe integers. */
export function prepared(document) {
  for (const row of document.rows) {
    row.credits = microOf(row.estimated_credits);
    row.requests = Number(row.requests);
    row.refused = Number(row.refused);
    for (const outcome in row.outcomes) row.outcomes[outcome] = Number(row.outcomes[outcome]);
  }
  return { ...document, sum: sumOf(document.rows) };
}

/** The sums of some rows; null if there are none, because no data is not 0. */
export function sumOf(rows) {
  if (!rows.length) return null;
  const sum = nothing();
  for (const row of rows) add(sum, row);
  return sum;
}

const nothing = () => ({ requests: 0, refused: 0, credits: 0n, outcomes: {} });

function add(sum, row) {
  sum.requests += row.requests;
  sum.refused += row.refused;
  sum.credits += row.credits;
  for (const outcome in row.outcomes) sum.outcomes[outcome] = (sum.outcomes[outcome] ?? 0) + row.outcomes[outcome];
}

/** Sums by the values of a member. */
function sumsBy(rows, key) {
  const sums = new Map();
  for (const row of rows) {
    const name = row[key];
    let sum = sums.get(name);
    if (!sum) sums.set(name, (sum = nothing()));
    add(sum, row);
  }
  return sums;
}

/** Today, this week and this month, each with the period before and its part up to the same day. */
export function recentSums(rows, today) {
  const between = (first, last) => sumOf(rows.filter((row) => row.day >= first && row.day <= last));
  const monday = weekStart(today);
  const first = monthStart(today);
  const lastMonth = previousMonthStart(today);
  const sameDay = `${lastMonth.slice(0, 8)}${today.slice(8)}`;
  const endOfLast = addDays(first, -1);
  return {
    day: { now: between(today, today), before: between(addDays(today, -1), addDays(today, -1)) },
    week: {
      now: between(monday, today),
      before: between(addDays(monday, -7), addDays(monday, -1)),
      soFar: between(addDays(monday, -7), addDays(today, -7)),
    },
    month: {
      now: between(first, today),
      before: between(lastMonth, endOfLast),
      soFar: between(lastMonth, sameDay < endOfLast ? sameDay : endOfLast),
    },
  };
}

/** The first day that `recentSums` needs. */
export function recentStart(today) {
  const week = addDays(weekStart(today), -7);
  const month = previousMonthStart(today);
  return week < month ? week : month;
}

/** How many requests had one of these outcomes. */
export const countOf = (sum, names) => names.reduce((all, name) => all + (sum.outcomes[name] ?? 0), 0);

/** Their percentage of all answered requests; null if there are none. */
export const share = (sum, names) => percentOf(BigInt(countOf(sum, names)), BigInt(countOf(sum, Object.keys(ANSWERED))));

/** One row for each group, with its share of all credits. */
export function groupRows(document, group) {
  const names = new Map(document.rows.map((row) => [row[group], row.team_name ?? ""]));
  const total = microOf(document.total.estimated_credits);
  return [...sumsBy(document.rows, group)].map(([id, sum]) => ({
    id,
    name: group === "team" ? names.get(id) : "",
    ...sum,
    share: percentOf(sum.credits, total),
    cached: share(sum, CACHED),
  }));
}

/**
 * The chart: the groups with the most credits as series, the rest as one series, and a value for each interval.
 * A value is null where there is no row. Cumulative values start at the first row, and continue to the last day.
 */
export function chartOf(document, { by, group, cumulative }) {
  const labels = intervals(document.from, document.to, by);
  const position = new Map(labels.map((label, index) => [label, index]));
  const ranked = groupRows(document, group).sort(byCredits);
  const top = new Map(ranked.slice(0, SERIES).map((row, index) => [row.id, index]));
  const rest = ranked.length - top.size;
  const series = ranked.slice(0, SERIES).map((row) => ({ id: row.id, label: labelOf(row), values: [] }));
  if (rest) series.push({ id: null, label: `Other: ${rest} more ${group}${rest > 1 ? "s" : ""}`, values: [] });
  const values = series.map(() => new Array(labels.length).fill(null));
  const totals = new Array(labels.length).fill(null);
  for (const row of document.rows) {
    const index = position.get(row[by]);
    const one = values[top.get(row[group]) ?? SERIES];
    one[index] = (one[index] ?? 0n) + row.credits;
    totals[index] = (totals[index] ?? 0n) + row.credits;
  }
  const shown = cumulative ? runningSum : (all) => all;
  series.forEach((one, index) => (one.values = shown(values[index])));
  return { labels, series, totals: shown(totals), by, ranked };
}

function runningSum(values) {
  let sum = null;
  return values.map((value) => (sum = value === null ? sum : (sum ?? 0n) + value));
}

const byCredits = (one, other) =>
  one.credits === other.credits ? (one.id < other.id ? -1 : 1) : one.credits > other.credits ? -1 : 1;

export const labelOf = (row) => row.name || (row.id === "-" ? "no price" : row.id);

/** Requests without an answer, by outcome and interval, as a chart. The values are counts. */
export function refusalsOf(document, by) {
  const labels = intervals(document.from, document.to, by);
  const sums = sumsBy(document.rows, by);
  const all = document.sum;
  const outcomes = Object.keys(all?.outcomes ?? {}).filter((name) => !(name in ANSWERED));
  outcomes.sort((one, other) => all.outcomes[other] - all.outcomes[one]);
  const series = outcomes.slice(0, SERIES).map((id) => ({ id, label: id, values: [] }));
  const rest = outcomes.slice(SERIES);
  if (rest.length) series.push({ id: null, label: `Other: ${rest.join(", ")}`, values: [] });
  for (const one of series) {
    const names = one.id ? [one.id] : rest;
    one.values = labels.map((label) => (sums.has(label) ? countOf(sums.get(label), names) : null));
  }
  return { labels, series, totals: labels.map((l) => (sums.has(l) ? countOf(sums.get(l), outcomes) : null)), by };
}

/** Rows in the order of a column; `-credits` is descending. Rows without a value come last. */
export function sorted(rows, sort, valueOf) {
  const descending = sort.startsWith("-");
  const column = sort.replace(/^-/, "");
  return [...rows].sort((one, other) => {
    const [a, b] = [valueOf(one, column), valueOf(other, column)];
    if (a === b) return 0;
    if (a === null || b === null) return a === null ? 1 : -1;
    return a < b === descending ? 1 : -1;
  });
}
