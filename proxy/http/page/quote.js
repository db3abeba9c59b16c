// For a team: what would a body cost? Asks POST /v1/quote.

import { read } from "./api.js";
import { fill, find, h, noData } from "./dom.js";
import { grouped } from "./exact.js";
import { tableOf } from "./tables.js";

/** The request for what was typed. A body alone becomes one variant, in its own text: numbers are not rounded. */
export function quoteRequest(text) {
  const trimmed = text.trim();
  return trimmed.startsWith("[") ? `{"variants":[{"label":"this body","body":${trimmed}}]}` : trimmed;
}

const COLUMNS = [
  { key: "label", label: "Variant", isName: true, value: (row) => row.label },
  {
    key: "estimated",
    label: "Estimated credits",
    value: (row) => (row.estimated === null ? null : Number(row.estimated)),
    show: (row) => (row.estimated === null ? noData(row.error?.message ?? "no price") : grouped(row.estimated)),
  },
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
  const table = tableOf({ caption: "Prices of the variants", columns: COLUMNS, rows: quote.variants, sort: "" });
  const fits = (quote.quotas ?? []).map((quota) => {
    const name = `${quota.scope === "org" ? "organisation's" : "team's"} ${quota.measure.replace("_", " ")} a ${quota.per}`;
    const count = quota.how_many === null || quota.how_many === undefined ? "" : ` ${grouped(quota.how_many)} times`;
    return h("li", {}, quota.fits === false ? `Does not fit into the ${name}.` : `Fits${count} into the ${name}.`);
  });
  const total = quote.total === undefined ? null : h("p", {}, "Total: ", h("b", {}, grouped(quote.total)), " credits.");
  const best = quote.variants.length > 1 && quote.cheapest ? h("p", {}, "Cheapest: ", h("b", {}, quote.cheapest)) : null;
  fill(find("quote-result"), h("div", { className: "scroll" }, table), best, total, h("ul", {}, fits));
}
