// Builds elements. Text is always text content: no name or message is ever read as HTML.

export const find = (id) => document.getElementById(id);

/** An element with properties and children; children may be text, and null ones are left out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...present(children));
  return element;
}

/** Replaces the content of an element, and puts the focus back on the control that had it. */
export function fill(element, ...children) {
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  element.replaceChildren(...present(children));
  if (focused) element.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

const present = (children) => children.flat().filter((child) => child !== null && child !== undefined);

/** For values that are absent. Screen readers say "no data". */
export function noData(text = "no data") {
  return h("span", { className: "none", title: text }, h("span", { "aria-hidden": "true" }, "–"), hidden(text));
}

export const hidden = (text) => h("span", { className: "visually-hidden" }, text);

/** A file that the browser saves. */
export function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
