// Shows openapi.json. Every text of it becomes the content of a text node, never HTML.

const gateway = new URL(".", location).href.replace(/\/$/, "");
let description;

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

/** The nodes of a text in which `code` stands between backquotes. */
function marked(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function paragraphs(text) {
  return text.split("\n\n").map((part) => element("p", {}, ...marked(part)));
}

function code(text) {
  return element("pre", { tabindex: "0" }, element("code", {}, text));
}

function folded(title, ...children) {
  return element("details", {}, element("summary", {}, ...marked(title)), ...children);
}

function table(caption, headings, rows) {
  if (!rows.length) return "";
  const cells = (kind, row) => row.map((cell) => element(kind, kind === "th" ? { scope: "col" } : {}, ...[cell].flat()));
  return element("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" }, element("table", {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...cells("th", headings))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells("td", row))))));
}

/** What a `$ref` stands for. */
function resolved(object) {
  if (!object?.$ref) return object;
  return object.$ref.slice(2).split("/").reduce((inside, name) => inside[name], description);
}

function typeOf(schema) {
  if (schema.enum) return schema.enum.join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  const type = [schema.type ?? "any"].flat().join(" or ");
  if (schema.type === "array") return `array of ${typeOf(resolved(schema.items))}`;
  return schema.format ? `${type} (${schema.format})` : type;
}

/** One row for each member of a schema, nested ones with their whole path. */
function memberRows(schema, path = "") {
  schema = resolved(schema);
  if (schema.items) return memberRows(schema.items, `${path}[]`);
  return Object.entries(schema.properties ?? {}).flatMap(([name, member]) => {
    const here = path ? `${path}.${name}` : name;
    const found = resolved(member);
    const needed = schema.required?.includes(name) ? "always" : "optional";
    return [[element("code", {}, here), typeOf(found), needed, marked(found.description ?? "")], ...memberRows(found, here)];
  });
}

function members(schema) {
  const alternatives = resolved(schema).oneOf ?? [schema];
  return alternatives.map((one) => table(resolved(one).title ?? "Members", ["name", "type", "given", "meaning"], memberRows(one)));
}

function examplesOf(content) {
  if ("example" in content) return [["", content.example]];
  return Object.entries(content.examples ?? {}).map(([name, example]) => [name, resolved(example).value]);
}

function shown(value) {
  return typeof value === "string" ? value : JSON.stringify(value, null, 2);
}

// Snippets

function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, member]) => `${JSON.stringify(name)}: ${python(member)}`).join(", ")}}`;
}

function urlOf(path, operation) {
  const query = operation.parameters.map(resolved).filter((one) => one.in === "query" && "example" in one);
  const pairs = query.map((one) => `${one.name}=${[one.example].flat().join(",")}`);
  return gateway + path + (pairs.length ? `?${pairs.join("&")}` : "");
}

function snippets(method, path, operation) {
  const url = urlOf(path, operation);
  const needsToken = operation.security.length > 0;
  const content = operation.requestBody?.content["application/json"];
  const body = content && examplesOf(content)[0][1];
  const isJson = "application/json" in (operation.responses["200"].content ?? {});
  const text = body && JSON.stringify(body);
  const curl = [`curl -i '${url}'`];
  if (needsToken) curl.push('-H "X-API-KEY: $TOKEN"');
  if (body) curl.push("-H 'Content-Type: application/json'", `-d '${text.replaceAll("'", "'\\''")}'`);
  const pythonArguments = [JSON.stringify(url)];
  if (needsToken) pythonArguments.push('headers={"X-API-KEY": os.environ["TOKEN"]}');
  if (body) pythonArguments.push(`json=${python(body)}`);
  const headers = [];
  if (needsToken) headers.push('"X-API-KEY": process.env.TOKEN');
  if (body) headers.push('"Content-Type": "application/json"');
  const options = [];
  if (method !== "get") options.push(`method: "${method.toUpperCase()}"`);
  if (headers.length) options.push(`headers: {${headers.join(", ")}}`);
  if (body) options.push(`body: JSON.stringify(${text})`);
  const init = options.length ? `, {\n  ${options.join(",\n  ")},\n}` : "";
  return {
    curl: curl.join(" \\\n  "),
    Python: `import os\n\nimport requests\n\nresponse = requests.${method}(\n    ${pythonArguments.join(",\n    ")},\n)\n`
      + `print(response.status_code, response.${isJson ? "json()" : "text"})`,
    JavaScript: `const response = await fetch(${JSON.stringify(url)}${init});\n`
      + `console.log(response.status, await response.${isJson ? "json" : "text"}());`,
  };
}

// Parts of the page

function tokensOf(operation) {
  const kinds = operation.security.flatMap(Object.keys).map((name) => name.replace("Token", "").toLowerCase());
  return kinds.length ? `Token: ${kinds.join(", ")}` : "No token";
}

function parameterRow(parameter) {
  return [element("code", {}, parameter.name), parameter.in, typeOf(resolved(parameter.schema)), marked(parameter.description)];
}

function responseNodes(status, response) {
  const headers = Object.entries(response.headers ?? {}).map(([name, header]) =>
    [element("code", {}, name), marked(resolved(header).description)]);
  const contents = Object.entries(response.content ?? {}).filter(([type]) => type !== "application/problem+json");
  return folded(`\`${status}\` ${response.description}`,
    ...contents.flatMap(([type, content]) => [
      element("p", { class: "muted" }, type),
      ...examplesOf(content).map(([, value]) => code(shown(value))),
      ...members(content.schema),
    ]),
    table("Headers", ["name", "meaning"], headers));
}

function operationNodes(method, path, operation) {
  const content = operation.requestBody?.content["application/json"];
  const bodies = content
    ? [element("h3", {}, "Body"), ...examplesOf(content).map(([, value]) => code(shown(value))), ...members(content.schema)]
    : [];
  return element("section", { id: operation.operationId },
    element("h2", {}, element("code", {}, `${method.toUpperCase()} ${path}`)),
    element("p", { class: "summary" }, `${operation.summary}.`),
    ...paragraphs(operation.description),
    element("p", { class: "muted" }, tokensOf(operation)),
    table("Parameters", ["name", "in", "type", "meaning"], operation.parameters.map(resolved).map(parameterRow)),
    ...bodies,
    element("h3", {}, "Try it"),
    ...Object.entries(snippets(method, path, operation)).map(([name, text]) => folded(name, code(text))),
    element("h3", {}, "Responses"),
    ...Object.entries(operation.responses).map(([status, response]) => responseNodes(status, response)));
}

function errorNodes() {
  const problems = Object.values(description.components.examples);
  return element("section", { id: "errors" },
    element("h2", {}, "Errors"),
    element("p", {}, "Every error has this form. Other members depend on its code."),
    ...members({ $ref: "#/components/schemas/Problem" }),
    ...problems.map(({ summary, value }) => folded(`${value.status} \`${value.error.code}\` ${summary}`, code(shown(value)))));
}

function show() {
  const operations = Object.entries(description.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => [method, path, operation]));
  const links = operations.map(([method, path, operation]) => element("li", {},
    element("a", { href: `#${operation.operationId}` }, element("code", {}, `${method.toUpperCase()} ${path}`)),
    element("br", {}), operation.summary));
  document.querySelector("#content").replaceChildren(
    element("p", { class: "muted" }, `Version ${description.info.version}`),
    ...paragraphs(description.info.description),
    element("nav", { "aria-label": "Paths" }, element("ul", {}, ...links,
      element("li", {}, element("a", { href: "#errors" }, "Errors")))),
    ...operations.map((operation) => operationNodes(...operation)),
    errorNodes());
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

try {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`the gateway answered ${response.status}`);
  description = await response.json();
  show();
} catch (error) {
  document.querySelector("#content").replaceChildren(
    element("p", { role: "alert" }, `openapi.json could not be loaded: ${error.message}. Reload the page to try again.`));
}
