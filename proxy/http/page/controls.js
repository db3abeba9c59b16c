// The filters: they show the state, and call `change` with what the reader has changed of it.

import { PERIODS, addDays } from "./calendar.js";
import { fill, find, h } from "./dom.js";

const BY = { day: "Day", week: "Week", month: "Month" };
const GROUP = { team: "Team", model: "Model" };
const TABLE = { groups: "", intervals: "" };

export function startControls(change) {
  fill(find("period"), options(Object.entries(PERIODS)));
  radios("by", BY, change);
  radios("group", GROUP, change);
  radios("table", TABLE, change);
  for (const name of ["team", "model"]) find(name).onchange = (event) => change({ [name]: event.target.value });
  find("cumulative").onchange = (event) => change({ cumulative: event.target.checked ? "yes" : "" });
  find("clear").onclick = () => change({ team: "", model: "" });
  find("filters").onsubmit = (event) => event.preventDefault();
  find("period").onchange = (event) => {
    const custom = event.target.value === "custom";
    change({ period: event.target.value, ...(custom && { from: find("from").value, to: find("to").value }) });
  };
  for (const name of ["from", "to"]) {
    find(name).onchange = () => {
      const [from, to] = [find("from").value, find("to").value];
      if (from && to && from <= to && find("filters").checkValidity()) change({ period: "custom", from, to });
    };
  }
}

/** Puts the state into the controls. teams and models: pairs of id and label. */
export function showState(state, { days, today, teams, models }) {
  find("period").value = state.period;
  find("days").hidden = state.period !== "custom";
  [find("from").value, find("to").value] = days;
  for (const name of ["from", "to"]) Object.assign(find(name), { min: addDays(today, -399), max: today });
  for (const name of ["by", "group", "table"]) find(`${name}-${state[name]}`).checked = true;
  find("table-groups").nextSibling.textContent = state.group === "team" ? "By team" : "By model";
  find("table-intervals").nextSibling.textContent = `By ${state.by}`;
  find("cumulative").checked = Boolean(state.cumulative);
  choose("team", "All teams", teams, state.team);
  choose("model", "All models", models, state.model);
  const seesOneTeam = teams === null;
  find("team-label").hidden = find("group").hidden = seesOneTeam;
  find("clear").hidden = !state.team && !state.model;
}

function choose(name, all, pairs, value) {
  const known = [...(pairs ?? [])].sort((one, other) => one[1].localeCompare(other[1]));
  if (value && !known.some(([id]) => id === value)) known.push([value, value]);
  fill(find(name), options([["", all], ...known]));
  find(name).value = value;
}

const options = (pairs) => pairs.map(([value, label]) => h("option", { value }, label));

function radios(name, labels, change) {
  for (const [value, label] of Object.entries(labels)) {
    const input = h("input", { type: "radio", name, id: `${name}-${value}`, value });
    input.onchange = () => change({ [name]: value });
    find(name).append(input, h("label", { htmlFor: input.id }, label));
  }
}
