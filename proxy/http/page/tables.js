// Tables that sort, and the same cells as CSV.

import { csvOf } from "./csv.js";
import { h, noData } from "./dom.js";
import { sorted } from "./usage.js";

/**
 * A table. Each column is {key, label, value, show, text, csv, isName, onlyCsv}. `value` is what is sorted, null for no
 * data; `show` makes its cell and `text` its CSV, if these are not the value; `csv` is its header there.
 */
export function tableOf({ caption, columns: all, rows, sort, onSort, total, onRow }) {
  const columns = all.filter((column) => !column.onlyCsv);
  const valueOf = (row, key) => columns.find((column) => column.key === key)?.value(row) ?? null;
  const ordered = sorted(rows, sort, valueOf);
  const head = columns.map((column) => headerCell(column, sort, onSort));
  const body = ordered.map((row) => {
    const line = h("tr", {}, columns.map((column, at) => dataCell(column, row, at)));
    if (onRow) onRow(line, row);
    return line;
  });
  const foot = total && h("tfoot", {}, h("tr", {}, columns.map((column, at) => dataCell(column, total, at))));
  return h(
    "table",
    {},
    h("caption", { className: "visually-hidden" }, caption),
    h("thead", {}, h("tr", {}, head)),
    h("tbody", {}, body),
    foot
  );
}

/** What the table shows as CSV, in the same order and without the total. */
export function tableCsv({ columns, rows, sort }) {
  const valueOf = (row, key) => columns.find((column) => column.key === key)?.value(row) ?? null;
  const names = columns.filter((column) => column.isName).length;
  const header = columns.map((column) => column.csv ?? column.label);
  const text = (column, row) => (column.text ?? column.value)(row);
  return csvOf([header, ...sorted(rows, sort, valueOf).map((row) => columns.map((c) => text(c, row)))], names);
}

function headerCell(column, sort, onSort) {
  const ascending = sort === column.key;
  const descending = sort === `-${column.key}`;
  const properties = { scope: "col", className: column.isName ? "" : "number" };
  if (!onSort) return h("th", properties, column.label);
  const wanted = ascending || (!descending && !column.isName) ? `-${column.key}` : column.key;
  const arrow = h("span", { className: "arrow", "aria-hidden": "true" }, ascending ? "▲" : descending ? "▼" : "");
  const button = h("button", { type: "button", onclick: () => onSort(wanted) }, column.label, arrow);
  button.dataset.key = `sort-${column.key}`;
  if (ascending || descending) properties["aria-sort"] = ascending ? "ascending" : "descending";
  return h("th", properties, button);
}

function dataCell(column, row, at) {
  const value = column.value(row);
  const shown = column.show ? column.show(row) : value === null ? noData() : String(value);
  return h(at === 0 ? "th" : "td", { scope: at === 0 ? "row" : null, className: column.isName ? "" : "number" }, shown);
}

/** A table in a region that scrolls, which the keyboard can reach. */
export const scrolling = (label, table) =>
  h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": label }, table);
