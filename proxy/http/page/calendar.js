// Calendar days as text, such as 2026-11-30, and the intervals of charts. There is no time of day here, and no zone.

const DAY_MS = 86400000;

const dateOf = (day) => new Date(`${day}T00:00:00Z`);
const dayOf = (date) => date.toISOString().slice(0, 10);

export const isDay = (text) => /^\d{4}-\d{2}-\d{2}$/.test(text) && !Number.isNaN(dateOf(text).getTime());

export const addDays = (day, count) => dayOf(new Date(dateOf(day).getTime() + count * DAY_MS));
export const daysBetween = (first, last) => Math.round((dateOf(last) - dateOf(first)) / DAY_MS);
export const monthStart = (day) => `${day.slice(0, 7)}-01`;
export const weekStart = (day) => addDays(day, -((dateOf(day).getUTCDay() + 6) % 7));
export const previousMonthStart = (day) => monthStart(addDays(monthStart(day), -1));

/** The name that /v1/usage gives to the interval of a day. */
export function intervalOf(day, by) {
  return by === "month" ? day.slice(0, 7) : by === "week" ? weekStart(day) : day;
}

/** The names of all intervals from `first` to `last`. */
export function intervals(first, last, by) {
  const names = [];
  for (let day = first; day <= last; day = addDays(day, 1)) {
    const name = intervalOf(day, by);
    if (names.at(-1) !== name) names.push(name);
  }
  return names;
}

export const PERIODS = {
  "7d": "Last 7 days",
  "30d": "Last 30 days",
  "90d": "Last 90 days",
  month: "This month",
  "last-month": "Last month",
  "400d": "Last 400 days",
  custom: "From … to …",
};

/** First and last day of a period. */
export function daysOf(state, today) {
  if (state.period === "custom") return [state.from, state.to];
  if (state.period === "month") return [monthStart(today), today];
  if (state.period === "last-month") return [previousMonthStart(today), addDays(monthStart(today), -1)];
  return [addDays(today, 1 - Number.parseInt(state.period, 10)), today];
}

const MONTHS = "January February March April May June July August September October November December".split(" ");
const DAYS = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];

/** `2026-11-30` as `30 Nov`, `2026-11` as `Nov 2026`. */
export function shortName(interval) {
  const [year, month, day] = interval.split("-");
  const name = MONTHS[Number(month) - 1].slice(0, 3);
  return day ? `${Number(day)} ${name}` : `${name} ${year}`;
}

/** `2026-11-30` as `Mon 30 Nov 2026`. */
export function longName(interval, by) {
  const [year, month, day] = interval.split("-");
  const name = MONTHS[Number(month) - 1];
  if (!day) return `${name} ${year}`;
  const full = `${DAYS[dateOf(interval).getUTCDay()]} ${Number(day)} ${name.slice(0, 3)} ${year}`;
  return by === "week" ? `Week of ${full}` : full;
}

/** An instant as a day of a time zone, in words. */
export function dayInWords(instant, timeZone) {
  const options = instant.length === 10 ? { timeZone: "UTC" } : { timeZone };
  return new Intl.DateTimeFormat("en-GB", { ...options, day: "numeric", month: "long" }).format(new Date(instant));
}
