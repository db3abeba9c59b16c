// The page's flow: sign in, read the documents, draw the sections, read them again every minute.

import { ApiError, clock, read, session } from "./api.js";
import { daysOf } from "./calendar.js";
import { showState, startControls } from "./controls.js";
import { find } from "./dom.js";
import { startQuotes } from "./quote.js";
import { RefusalSection, showCache, showChanges, showQuotas, showRecent, UsageSection } from "./sections.js";
import { searchOf, stateOf } from "./state.js";
import { prepared, recentStart } from "./usage.js";

const REFRESH_MS = 60_000;
const REFRESH_FACTOR = 60; // what takes long to read is read less often: the gateway has other work
const RETRY_MS = [2_000, 4_000, 8_000, 15_000, 30_000];
const NEEDS_NO_READING = ["table", "sort", "cumulative"];

let state = stateOf(location.search);
let documents = null;
let reading = null;
let timer = 0;
let failures = 0;
let notice = "";
let allQuotas = false;
let sections = null;

/** Changes the state and the address, and shows what belongs to it. */
function change(changes) {
  state = stateOf(searchOf({ ...state, ...changes }));
  history.pushState(null, "", `${location.pathname}${searchOf(state)}`);
  if (documents && Object.keys(changes).every((name) => NEEDS_NO_READING.includes(name))) showUsage();
  else load();
}

/** Reads everything for the state, and draws it. An older reading that is still running is given up. */
async function load() {
  reading?.abort();
  clearTimeout(timer);
  reading = new AbortController();
  const { signal } = reading;
  const started = performance.now();
  document.body.classList.add("reading");
  if (!documents) show("loading");
  try {
    const who = await read("v1/token", { signal });
    if (who.role === "team") Object.assign(state, { group: "model", team: "" });
    documents = { who, named: documents?.named ?? [], ...(await readReports(who, signal)) };
    failures = 0;
    say(notice);
    notice = "";
    render();
    const took = performance.now() - started;
    documents.named = await readNames(who, documents.days, signal);
    showChoices();
    timer = setTimeout(load, Math.max(REFRESH_MS, took * REFRESH_FACTOR));
  } catch (error) {
    if (error.name !== "AbortError") explain(error);
  } finally {
    if (reading.signal === signal) document.body.classList.remove("reading");
  }
}

async function readReports(who, signal) {
  const [from, to] = daysOf(state, who.today);
  const { team, model, by, group } = state;
  const usage = async (query) => prepared(await read("v1/usage", { query, signal }));
  const seesAll = who.role !== "team";
  const [shown, recent, quota, prices] = await Promise.all([
    usage({ from, to, team, model, by: `${by},${group}` }),
    usage({ from: recentStart(who.today), to: who.today, team, model, by: "day" }),
    read("v1/quota", { signal }),
    seesAll ? read("v1/prices/changes", { query: { from }, signal }) : null,
  ]);
  return { shown, recent, quota, prices, days: [from, to] };
}

/** The teams and models of the period, to choose from. It is read after the rest, because nothing else needs it. */
async function readNames(who, [from, to], signal) {
  const by = who.role === "team" ? "model" : "team,model";
  return (await read("v1/usage", { query: { from, to, by }, signal })).rows;
}

/** Shows the sign-in, the note that the ledger is being read, or the usage. */
function show(wanted) {
  for (const id of ["sign-in", "loading", "usage"]) find(id).hidden = id !== wanted;
  for (const id of ["refresh", "sign-out"]) find(id).hidden = wanted === "sign-in";
}

function render() {
  const { who, shown, recent, quota, prices, days } = documents;
  show("usage");
  sections ??= { usage: new UsageSection((sort) => change({ sort })), refusals: new RefusalSection() };
  find("who").textContent = whoInWords(who);
  const time = clock.now().toLocaleTimeString("en-GB", { timeZone: who.timezone });
  find("as-of").textContent = `As of ${time} ${who.timezone}`;
  find("admin-note").hidden = who.role !== "admin";
  find("quote-card").hidden = who.role !== "team";
  find("changes-card").hidden = !prices;
  showUsage();
  showRecent(recent, who);
  showQuotas(quota, state, who, clock.now(), allQuotas);
  showCache(shown);
  if (prices) showChanges(prices, state, who, days[1]);
  sections.refusals.show(shown, state);
}

/** The chart, its table, and the controls. */
function showUsage() {
  showChoices();
  sections.usage.show(documents.shown, state);
}

const showChoices = () => showState(state, { days: documents.days, today: documents.who.today, ...choices() });

/** The teams and models to choose from; no teams for a team's own token. */
function choices() {
  const { who, named, quota } = documents;
  const ofTeam = named.filter((row) => !state.team || row.team === state.team);
  const models = new Map(ofTeam.map(({ model }) => [model, model === "-" ? "no price" : model]));
  if (who.role === "team") return { teams: null, models };
  const teams = [...quota.teams, ...named].map(({ team, team_name: name }) => [team, name || team]);
  return { teams: new Map(teams), models };
}

function whoInWords({ role, team, team_name: name, token_expires: expires }) {
  if (role !== "team") return role === "admin" ? "All teams, admin token" : "All teams, viewer token";
  return `Team ${name || team}${expires ? `, token works until ${expires}` : ""}`;
}

/** Says why there are no new numbers. A token that does not work is forgotten; everything else is tried again. */
function explain(error) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401 || error.code === "forbidden") return signOut(error.message);
  find("loading").hidden = true;
  if (error.code === "invalid-query" && searchOf(state)) {
    notice = `${error.message} The page shows everything instead.`; // a link may name a team that is gone
    return change({ team: "", model: "", period: "30d" });
  }
  const since = documents ? ` ${find("as-of").textContent}.` : "";
  const isAway = error.status === 0 || error.status >= 500;
  if (isAway) timer = setTimeout(load, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]);
  say(`${cause(error)}${isAway ? " Trying again." : ""}${since}`);
}

/** Shows a text at the top of the page; none: hides it. */
function say(text) {
  find("banner").textContent = text;
  find("banner").hidden = !text;
}

function cause({ status, code, message }) {
  if (code === "store-unavailable") return `No new numbers, because of the ledger. ${message}`;
  if (status === 0 || code === "draining" || !code) return "The gateway does not answer; it may be restarting.";
  return message;
}

function signOut(reason) {
  session.token = null;
  reading?.abort();
  clearTimeout(timer);
  documents = null;
  for (const id of ["who", "as-of"]) find(id).textContent = "";
  find("banner").hidden = true;
  show("sign-in");
  find("token-error").textContent = reason;
  find("token").focus();
}

async function signIn(event) {
  event.preventDefault();
  const token = find("token").value.trim();
  find("token-error").textContent = "";
  if (!/^[\x21-\x7e]+$/.test(token)) {
    find("token-error").textContent = "This is not a token: a token begins with ep_.";
    return;
  }
  try {
    await read("v1/token", { token });
  } catch (error) {
    find("token-error").textContent = error.status === 0 ? cause(error) : error.message;
    return;
  }
  session.token = token;
  find("token").value = "";
  await load();
  find("content").focus();
}

startControls(change);
startQuotes((error) => error.status === 401 && signOut(error.message));
find("token-form").onsubmit = signIn;
find("refresh").onclick = load;
find("sign-out").onclick = () => signOut("");
find("all-quotas").onclick = () => {
  allQuotas = !allQuotas;
  render();
};
addEventListener("popstate", () => {
  state = stateOf(location.search);
  if (session.token) load();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && documents) load();
});
if (session.token) load();
else show("sign-in");
