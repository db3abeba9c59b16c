// Tables that sort, and the same cells as CSV.

import { csvOf } from "./csv.js";
import { h, noData } from "./dom.js";
import { sorted } from "./usage.js";

/**
 * A table. Each column is {key, label, value, show, text, csv, isName, onlyCsv}. `value` is what is sorted, null for no
 * data; `show` makes its cell and `text` its CSV, if these are not the value; `csv` is its header there.
 */
export function tableOf({ caption, columns, rows, sort, onSort, total }) {
  const shown = columns.filter((column) => !column.onlyCsv);
  const line = (row) => h("tr", {}, shown.map((column, at) => dataCell(column, row, at)));
  const head = h("tr", {}, shown.map((column) => headerCell(column, sort, onSort)));
  const body = h("tbody", {}, inOrder(rows, shown, sort).map(line));
  const foot = total && h("tfoot", {}, line(total));
  return h("table", {}, h("caption", { className: "visually-hidden" }, caption), h("thead", {}, head), body, foot);
}

/** What the table shows as CSV, in the same order and without the total. */
export function tableCsv({ columns, rows, sort }) {
  const names = columns.filter((column) => column.isName).length;
  const header = columns.map((column) => column.csv ?? column.label);
  const line = (row) => columns.map((column) => (column.text ?? column.value)(row));
  return csvOf([header, ...inOrder(rows, columns, sort).map(line)], names);
}

const inOrder = (rows, columns, sort) =>
  sorted(rows, sort, (row, key) => columns.find((column) => column.key === key)?.value(row) ?? null);

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
