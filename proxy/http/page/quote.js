// For a team: what would a body cost? Asks POST /v1/quote.

import { read } from "./api.js";
import { fill, find, h, noData } from "./dom.js";
import { grouped } from "./exact.js";
import { scrolling, tableOf } from "./tables.js";

/** The request for what was typed. A body alone becomes one variant, in its own text: numbers are not rounded. */
export function quoteRequest(text) {
  const trimmed = text.trim();
  return trimmed.startsWith("[") ? `{"variants":[{"label":"this body","body":${trimmed}}]}` : trimmed;
}

/** A column of prices. Where there is none, it says why. */
const prices = (key, label) => ({
  key,
  label,
  value: (row) => (row[key] === null ? null : Number(row[key])),
  show: (row) => (row[key] === null ? noData(row.error?.message ?? "no price") : grouped(row[key])),
});

const COLUMNS = [
  { key: "label", label: "Variant", isName: true, value: (row) => row.label },
  prices("estimated", "Estimated credits"),
  {
    key: "delta",
    label: "Compared with the first",
    value: (row) => (row.delta ? Number(row.delta) : null),
    show: (row) => (row.delta ? (Number(row.delta) > 0 ? "+" : "") + grouped(row.delta) : noData()),
  },
  { key: "basis", label: "Price is", isName: true, value: (row) => row.basis ?? row.error?.message ?? "unknown" },
];

export function startQuotes(onError) {
  find("quote-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = find("quote-form").querySelector("button");
    button.disabled = true;
    fill(find("quote-result"), h("p", { className: "muted" }, "Asking …"));
    try {
      show(await read("v1/quote", { body: quoteRequest(find("quote-body").value) }));
    } catch (error) {
      fill(find("quote-result"), h("p", { className: "error" }, error.message));
      onError(error);
    } finally {
      button.disabled = false;
    }
  });
}

function show(quote) {
  const { variants, cheapest, total } = quote;
  const table = tableOf({ caption: "Prices of the variants", columns: COLUMNS, rows: variants, sort: "" });
  const best = variants.length > 1 && cheapest ? h("p", {}, "Cheapest: ", h("b", {}, cheapest)) : null;
  const amount = total && h("b", {}, grouped(total));
  const sum = total === undefined ? null : h("p", {}, "Total of the cheapest, in credits: ", amount ?? noData());
  const parts = variants.filter(({ breakdown }) => breakdown).flatMap(breakdownOf);
  const fits = (quote.quotas ?? []).map((quota) => h("li", {}, fitInWords(quota)));
  fill(find("quote-result"), scrolling("Table of prices", table), best, sum, parts, h("ul", {}, fits));
}

/** What each item costs alone, or how much less the body costs without a member. */
function breakdownOf({ label, breakdown }) {
  const rows = breakdown.map(({ item, member, estimated, marginal, mode_changes: other, error }) => ({
    part: item === undefined ? `${member}${other ? " (another mode wins without it)" : ""}` : `item ${item}`,
    amount: marginal ?? estimated ?? null,
    error,
  }));
  const title = `Parts of ${label}`;
  const columns = [
    { key: "part", label: title, isName: true, value: (row) => row.part },
    prices("amount", breakdown[0]?.item === undefined ? "Less without it" : "Alone"),
  ];
  return scrolling(title, tableOf({ caption: title, columns, rows, sort: "" }));
}

function fitInWords({ scope, measure, per, fits, how_many: times }) {
  const quota = `the ${scope === "org" ? "organisation's" : "team's"} ${measure.replace("_", " ")} a ${per}`;
  if ((fits ?? null) === null) return `Not known whether it fits into ${quota}.`;
  if (!fits) return `The cheapest does not fit into ${quota}.`;
  return `The cheapest fits ${(times ?? null) === null ? "" : `${grouped(times)} times `}into ${quota}.`;
}
