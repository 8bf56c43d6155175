// Draws openapi.json: each route with its fields, its answers and a command to try.

const made = (tag, text, name) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
};

const followed = (document_, schema) =>
  schema?.$ref ? schema.$ref.slice(2).split("/").reduce((node, key) => node[key], document_) : schema;

function kind(schema) {
  if (schema.anyOf) return schema.anyOf.map(kind).filter((each) => each !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(" or ");
  if (schema.const) return schema.const;
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  if (schema.format === "binary") return "file";
  return schema.type || schema.$ref?.split("/").pop() || "any";
}

function table(rows) {
  const element = made("table");
  for (const row of rows) {
    const line = made("tr");
    line.append(...row.map((text) => made("td", text)));
    element.append(line);
  }
  return element;
}

function fieldRows(schema) {
  const required = new Set(schema.required || []);
  return Object.entries(schema.properties || {}).map(([name, field]) => {
    const preset = field.default === undefined || field.default === "" ? "" : ` (${JSON.stringify(field.default)})`;
    return [name, kind(field) + (required.has(name) ? "" : ", optional"), (field.description || "") + preset];
  });
}

function command(method, path, schema, token) {
  const words = ["curl"];
  if (token) words.push('-H "Authorization: Bearer $TOKEN"');
  const required = new Set(schema?.required || Object.keys(schema?.properties || {}).slice(0, 1));
  for (const [name, field] of Object.entries(schema?.properties || {})) {
    if (!required.has(name)) continue;
    const file = field.format === "binary" || field.items?.format === "binary";
    words.push(file ? `-F ${name}=@photo.jpg` : `-F ${name}='a red cube'`);
  }
  return [...words, `${location.origin}${path.replace(/\{.*?\}/, "0")}`].join(" ");
}

function route(document_, path, method, operation) {
  const section = made("section", undefined, "card route");
  const title = made("h2");
  title.append(made("span", method.toUpperCase(), "method"), path);
  section.append(title, made("p", operation.description || operation.summary));
  const form = operation.requestBody?.content["multipart/form-data"]?.schema;
  if (form) section.append(made("h3", "Fields, as a form or (pictures in base64) as JSON"), table(fieldRows(form)));
  const answers = Object.entries(operation.responses).map(([status, answer]) => {
    const schema = followed(document_, answer.content?.["application/json"]?.schema);
    const fields = Object.keys(schema?.properties || {}).join(", ");
    return [status, Object.keys(answer.content || {}).join(", "), fields ? `${answer.description.replace(/\.$/, "")}: ${fields}` : answer.description];
  });
  section.append(made("h3", "Answers"), table(answers), made("h3", "Try it"));
  section.append(made("pre", command(method, path, form, document_.security)));
  return section;
}

const description = await (await fetch("/openapi.json")).json();
document.getElementById("about").textContent = description.info.description;
for (const [path, methods] of Object.entries(description.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    document.getElementById("routes").append(route(description, path, method, operation));
  }
}
