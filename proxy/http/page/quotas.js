// Quotas: how much is used, how fast, and when the limit will be reached, in words.

import { dayInWords } from "./calendar.js";
import { grouped, microOf, percentOf, rounded } from "./exact.js";
import { h, hidden, noData } from "./dom.js";

/** A quota's share at which it stands out, the highest first, as percent, class and words. */
const LEVELS = [
  [100n, "full", "used up"],
  [95n, "critical", "over 95 %"],
  [80n, "high", "over 80 %"],
  [50n, "half", "over 50 %"],
];

const UNIT = { estimated_credits: "credits", requests: "requests" };

const SHORT = ["minute", "hour", "day"];

/** The quotas of all teams, those of the organisation once, the fullest first. */
export function quotaRows(document) {
  const rows = new Map();
  for (const { team, team_name: name, quotas } of document.teams ?? [document]) {
    for (const quota of quotas) {
      const isShared = quota.scope === "org";
      const key = `${isShared ? "" : team} ${quota.measure} ${quota.per}`;
      if (!rows.has(key)) rows.set(key, { ...quota, owner: isShared ? "All teams" : name || team, team });
    }
  }
  return [...rows.values()].sort((one, other) => Number(other.used_percent ?? 101) - Number(one.used_percent ?? 101));
}

export function levelOf({ used, limit }) {
  const [usedMicro, limitMicro] = [microOf(used), microOf(limit)];
  const found = LEVELS.find(([percent]) => usedMicro * 100n >= limitMicro * percent);
  return found ? { name: found[1], words: found[2] } : { name: "", words: "" };
}

/** Use compared with an even use of the window: 1 is even. Null for short windows, and at the beginning of one. */
export function paceOf({ used, limit, per, window_start: start, resets_at: end }, now) {
  if (per === "minute" || per === "hour" || Number(limit) === 0) return null;
  const passed = (now - new Date(start)) / (new Date(end) - new Date(start));
  return passed < 0.02 ? null : Number(used) / Number(limit) / passed;
}

export function paceInWords(pace) {
  if (pace === null) return null;
  if (pace === 0) return "not used yet";
  const percent = Math.round(Math.abs(pace - 1) * 100);
  if (percent <= 2) return "even";
  if (pace > 1) return pace >= 2.5 ? `${pace.toFixed(1)} times even use` : `${percent} % above even`;
  return `${percent} % below even`;
}

/** When a quota will be reached: a date and a range. */
export function forecastInWords(quota, timeZone) {
  const { forecast, resets_at: reset } = quota;
  if (Number(quota.limit) === 0) return "Every request is refused.";
  const isReached = microOf(quota.used) >= microOf(quota.limit);
  const resets = SHORT.includes(quota.per) ? "" : ` Resets on ${dayInWords(reset, timeZone)}.`;
  if (!forecast) return isReached ? `Reached.${resets}` : null;
  const day = (instant) => dayInWords(instant, timeZone);
  const { reached_at: at, reached_from: from, reached_until: until } = forecast;
  if (isReached) return at ? `Reached about ${day(at)}.` : "Reached.";
  if (at && until) {
    const range = day(from) === day(until) ? "" : `, between ${day(from)} and ${day(until)}`;
    return `Reached about ${day(at)}${range}.`;
  }
  if (at) return `Reached about ${day(at)}, at the earliest on ${day(from)}, perhaps not at all.`;
  const [end, low, high] = [forecast.at_end, forecast.low, forecast.high].map((amount) => rounded(Number(amount)));
  const expected = `about ${end} (${low} to ${high}) by then`;
  if (from) return `Probably not reached before it resets: ${expected}. At the earliest on ${day(from)}.`;
  return `Not reached before it resets: ${expected}.`;
}

/** The columns of the table of quotas. */
export function quotaColumns({ timeZone, now }) {
  return [
    { key: "quota", label: "Quota", isName: true, value: nameOf, show: shownName },
    { key: "used", label: "Used", value: (row) => Number(row.used_percent ?? 0), show: shownUse },
    { key: "left", label: "Left", value: (row) => Number(row.remaining), show: (row) => grouped(row.remaining) },
    {
      key: "pace",
      label: "Pace",
      value: (row) => paceOf(row, now),
      show: (row) => paceInWords(paceOf(row, now)) ?? noData("no pace for short windows"),
    },
    {
      key: "forecast",
      label: "Will be reached",
      isName: true,
      value: (row) => row.forecast?.reached_at ?? null,
      show: (row) => forecastInWords(row, timeZone) ?? noData("no forecast: it needs 14 days of use"),
    },
    { key: "resets", label: "Resets", isName: true, value: (row) => row.resets_at, show: (row) => resetOf(row, timeZone) },
  ];
}

const nameOf = (row) => `${row.owner} ${row.measure} ${row.per}`;

function shownName(row) {
  const rule = `${row.measure === "requests" ? "Requests" : "Estimated credits"} per ${row.per}`;
  const warns = row.on_exceed === "warn" ? "; only warns" : "";
  return h("span", { className: "two-lines" }, h("b", {}, row.owner), h("span", {}, rule + warns));
}

function shownUse(row) {
  const level = levelOf(row);
  const percent = percentOf(microOf(row.used), microOf(row.limit));
  const bar = h("span", { className: `bar ${level.name}` }, h("span"));
  bar.firstChild.style.width = `${Math.min(100, Number(percent ?? 100))}%`;
  const badge = level.name ? h("span", { className: `badge ${level.name}` }, level.words) : null;
  const amounts = h("span", { className: "amounts" }, h("b", {}, grouped(row.used)), ` of ${grouped(row.limit)}`);
  const share = h("span", { className: "share" }, percent === null ? "" : `${percent} %`, badge);
  return h("span", { className: "use" }, amounts, bar, share, hidden(UNIT[row.measure]));
}

function resetOf(row, timeZone) {
  const parts = SHORT.includes(row.per) ? { hour: "2-digit", minute: "2-digit" } : { day: "numeric", month: "short" };
  return new Intl.DateTimeFormat("en-GB", { timeZone, ...parts }).format(new Date(row.resets_at));
}
