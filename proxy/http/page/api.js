// Requests to the gateway. Addresses are relative to the page, so it also works under a path of a reverse proxy.

import { parseExact } from "./exact.js";

const KEY = "estimate-proxy-token";

/** The token is kept in this tab alone: sessionStorage ends with it. It is sent in a header, and never in a URL. */
export const session = {
  get token() {
    return sessionStorage.getItem(KEY);
  },
  set token(token) {
    if (token) sessionStorage.setItem(KEY, token);
    else sessionStorage.removeItem(KEY);
  },
};

/** The gateway's clock, by the `Date` of its answers: this machine's may be wrong. */
export const clock = { ahead: 0, now: () => new Date(Date.now() + clock.ahead) };

/** An answer other than 200, or none at all. `status` is 0 where the gateway did not answer. */
export class ApiError extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

/** The document at a path, with numbers as text. Throws `ApiError`; an `AbortError` if `signal` says so. */
export async function read(path, { query = {}, body, signal, token = session.token } = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) if (value) url.searchParams.set(name, value);
  const headers = { accept: "application/json", "x-api-key": token };
  if (body !== undefined) headers["content-type"] = "application/json";
  const options = { method: body === undefined ? "GET" : "POST", headers, body, signal, cache: "no-store" };
  let response, text;
  try {
    response = await fetch(url, { ...options, redirect: "error" });
    text = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The gateway does not answer.");
  }
  const date = Date.parse(response.headers.get("date"));
  if (date) clock.ahead = date - Date.now();
  const found = parsed(text);
  if (response.ok && found) return found;
  const detail = found?.detail ?? `The answer has the status ${response.status} and is not from the gateway.`;
  throw new ApiError(response.status, found?.error?.code ?? "", detail);
}

function parsed(text) {
  try {
    return parseExact(text);
  } catch {
    return null;
  }
}
