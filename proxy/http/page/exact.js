// Exact amounts. Numbers of the API stay text, and are added as whole micro-credits (BigInt): no rounding anywhere.

const MICRO = 1000000n;
const DECIMALS = 6;
// A number after a member's name. Inside a string, a quotation mark before a colon has a backslash before it.
const NUMBER_OF_MEMBER = /([^\\]":)(-?\d[\d.eE+-]*)/g;

/** A JSON document in which each member's number is its text. */
export function parseExact(text) {
  return JSON.parse(text.replace(NUMBER_OF_MEMBER, '$1"$2"'));
}

/** A decimal number of credits, with at most six decimals, in micro-credits. */
export function microOf(text) {
  const [whole, part = ""] = text.split(".");
  if (part.length > DECIMALS) throw new RangeError(`not an exact amount: ${text}`);
  return BigInt(whole + part.padEnd(DECIMALS, "0"));
}

/** Micro-credits as the API writes them: without needless zeros. */
export function textOf(micro) {
  const size = micro < 0n ? -micro : micro;
  const part = String(size % MICRO).padStart(DECIMALS, "0").replace(/0+$/, "");
  return `${micro < 0n ? "-" : ""}${size / MICRO}${part && `.${part}`}`;
}

/** The text of a number with commas between thousands. */
export function grouped(text) {
  const [whole, part] = String(text).split(".");
  const commas = whole.replace(/\B(?=(\d{3})+$)/g, ",");
  return part === undefined ? commas : `${commas}.${part}`;
}

export const shownCredits = (micro) => grouped(textOf(micro));

/** `part` as a percentage of `whole` to one decimal, as /v1/usage rounds it; null if `whole` is 0. */
export function percentOf(part, whole) {
  if (whole === 0n) return null;
  let tenths = (2000n * part + whole) / (2n * whole);
  if (part < whole && tenths > 999n) tenths = 999n;
  const decimal = tenths % 10n;
  return `${tenths / 10n}${decimal ? `.${decimal}` : ""}`;
}

/** For drawing only. */
export const approximate = (micro) => Number(micro) / 1e6;

/** For axes and forecasts: three digits are enough. */
const THREE_DIGITS = { maximumSignificantDigits: 3 };
export const rounded = (number) => new Intl.NumberFormat("en", THREE_DIGITS).format(number);
export const rough = (number) => new Intl.NumberFormat("en", { ...THREE_DIGITS, notation: "compact" }).format(number);

/** A whole or decimal number of seconds in words. */
export function durationOf(seconds) {
  const total = Math.round(Number(seconds));
  if (total < 60) return `${total} s`;
  const units = [[86400, "d"], [3600, "h"], [60, "min"]];
  const first = units.findIndex(([size]) => total >= size);
  const [size, unit] = units[first];
  const rest = units[first + 1] && Math.floor((total % size) / units[first + 1][0]);
  return `${Math.floor(total / size)} ${unit}${rest ? ` ${rest} ${units[first + 1][1]}` : ""}`;
}
