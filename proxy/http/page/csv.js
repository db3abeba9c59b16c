// CSV as /v1/usage writes it (RFC 4180): a name that a spreadsheet could read as a formula gets an apostrophe.

const FORMULA = /^[=+\-@\t\r]/;

function cell(value, isName) {
  const text = value === null ? "" : String(value);
  const safe = isName && text !== "-" && FORMULA.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** The first row and the first `names` columns are names, the other cells are numbers or null. */
export function csvOf(rows, names) {
  const lines = rows.map((row, at) => row.map((value, column) => cell(value, at === 0 || column < names)).join(","));
  return `${lines.join("\r\n")}\r\n`;
}
