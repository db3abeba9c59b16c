// What the page shows, as the query of its own address: a reload and a link show the same. The token is not part of it.

import { PERIODS, isDay } from "./calendar.js";

const DEFAULTS = {
  period: "30d",
  from: "",
  to: "",
  by: "day",
  group: "team",
  team: "",
  model: "",
  table: "groups",
  sort: "-credits",
  cumulative: "",
};

const CHOICES = {
  period: Object.keys(PERIODS),
  by: ["day", "week", "month"],
  group: ["team", "model"],
  table: ["groups", "intervals"],
  cumulative: ["", "yes"],
};

/** The state in a query string. Values that make no sense are the default's. */
export function stateOf(search) {
  const given = new URLSearchParams(search);
  const state = { ...DEFAULTS };
  for (const name in DEFAULTS) {
    const value = given.get(name);
    if (value !== null && (CHOICES[name]?.includes(value) ?? true)) state[name] = value;
  }
  const days = isDay(state.from) && isDay(state.to) && state.from <= state.to;
  if (!days) [state.from, state.to] = ["", ""];
  if (state.period === "custom" && !days) state.period = DEFAULTS.period;
  return state;
}

/** The query string of a state, without defaults. */
export function searchOf(state) {
  const changed = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]);
  const kept = changed.filter(([name]) => state.period === "custom" || (name !== "from" && name !== "to"));
  return kept.length ? `?${new URLSearchParams(kept)}` : "";
}
