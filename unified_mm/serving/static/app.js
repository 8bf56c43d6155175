// The page: search, captions, questions, and the attention behind each word.
// All text is set by textContent; nothing is loaded from elsewhere.

const $ = (id) => document.getElementById(id);
const TOKEN = "unified_mm token";
let server = { routes: [], limits: {} };
let chosen = null; // the picture that is looked at: a Blob
let turn = 0; // of pictures: what an earlier one still asks for is thrown away
let pinned = null; // the word whose map stays
let maps = new Map(); // word button -> { map, fit }

class Problem extends Error {}

// ---- asking the server

async function ask(path, fields, signal) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers, signal };
  if (fields) {
    const form = new FormData();
    for (const [name, value] of Object.entries(fields)) {
      for (const each of [value].flat()) form.append(name, each);
    }
    Object.assign(options, { method: "POST", body: form });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached.");
  }
  if (response.status === 401) {
    await askForToken();
    return ask(path, fields, signal);
  }
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    throw new Problem(said.message || `The server answers ${response.status}.`);
  }
  return response;
}

let asking = null; // one dialog, however many requests wait for its token
function askForToken() {
  asking ??= new Promise((resolve) => {
    $("gate").addEventListener("close", () => {
      sessionStorage.setItem(TOKEN, $("token").value.trim());
      asking = null;
      resolve();
    }, { once: true });
    $("token").value = "";
    $("gate").showModal();
  });
  return asking;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const line = (name) => block.split("\n").find((l) => l.startsWith(`${name}: `))?.slice(name.length + 2);
      yield { name: line("event"), data: JSON.parse(line("data")) };
    }
  }
}

function complain(error) {
  if (error.name === "AbortError") return;
  $("problem").textContent = error.message;
  $("problem").hidden = false;
  if (!(error instanceof Problem)) console.error(error);
}

// Runs a form's work with its button held, and says what went wrong.
async function during(button, work) {
  if (button?.ariaBusy === "true") return;
  $("problem").hidden = true;
  if (button) button.ariaBusy = "true"; // disabled, it would lose the keyboard's focus
  try {
    await work();
  } catch (error) {
    complain(error);
  } finally {
    if (button) button.ariaBusy = "false";
  }
}

const can = (route) => server.routes.includes(route);
const canShow = () => can("/search") && can("/pictures/{number}"); // what is found

function tooLarge(blob, what) {
  const most = server.limits.upload_bytes || Infinity;
  if (blob.size > most) complain(new Problem(`${what} has ${blob.size} bytes; ${most} are taken at most.`));
  return blob.size > most;
}

// ---- the picture and what is said about it

function look(blob) {
  if (blob.type && !blob.type.startsWith("image/")) return complain(new Problem("That is no picture."));
  if (tooLarge(blob, "The picture")) return;
  chosen = blob;
  turn += 1;
  for (const button of $("found").querySelectorAll("[aria-pressed=true]")) button.ariaPressed = "false";
  maps = new Map();
  hideMap(true);
  $("texts").replaceChildren();
  $("ranking").hidden = true;
  URL.revokeObjectURL($("picture").src);
  $("picture").src = URL.createObjectURL(blob);
  $("drop").classList.add("small");
  $("looked-at").hidden = false;
  $("together-part").hidden = !canShow();
  if (can("/caption")) during(null, () => write("/caption", {}, "", ""));
}

// Streams a text about the picture into the page, then makes its words buttons with maps.
async function write(path, fields, prompt, label) {
  const mine = turn;
  const image = chosen;
  const said = document.createElement("div");
  said.className = "said";
  const small = document.createElement("small");
  small.textContent = label || "Caption";
  const words = document.createElement("div");
  words.className = "words writing";
  said.append(small, words);
  $("texts").append(said);
  try {
    const response = await ask(path, { image, stream: "true", ...fields });
    let text = "";
    for await (const { name, data } of events(response)) {
      if (mine !== turn) return;
      if (name === "failed") throw new Problem(data.message);
      text = name === "done" ? data.text : text + data.text;
      words.textContent = text;
    }
    words.classList.remove("writing");
    if (!text) words.textContent = "(nothing)";
    else if (can("/attention")) await attend(words, image, prompt, text, mine);
  } catch (error) {
    if (mine === turn) said.remove();
    throw error;
  }
}

async function attend(place, image, prompt, text, mine) {
  const found = await (await ask("/attention", { image, prompt, text })).json();
  if (mine !== turn) return;
  const parts = found.words.map((word, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "word";
    button.textContent = word;
    button.setAttribute("aria-pressed", "false");
    maps.set(button, { map: found.maps[number], fit: found.fit });
    return button;
  });
  place.replaceChildren(...parts.flatMap((part) => [part, " "]));
  $("heat-says").textContent = "Point at a word, or tab to it, to see where attention lay; press to keep it.";
}

// ---- heat maps

// Dark indigo, violet, orange, light yellow: even steps of lightness.
const RAMP = [[18, 10, 60, 0.62], [106, 28, 129, 0.6], [229, 92, 48, 0.6], [252, 236, 150, 0.62]];

function colour(share) {
  const place = Math.min(share, 0.9999) * (RAMP.length - 1);
  const at = Math.floor(place);
  return RAMP[at].map((value, i) => value + (RAMP[at + 1][i] - value) * (place - at));
}

function showMap(button) {
  const { map, fit } = maps.get(button);
  const rows = map.length, columns = map[0].length;
  const most = Math.max(...map.flat()), least = Math.min(...map.flat());
  const small = new OffscreenCanvas(columns, rows);
  const pixels = new ImageData(columns, rows);
  map.flat().forEach((value, i) => {
    const [r, g, b, a] = colour((value - least) / (most - least || 1));
    pixels.data.set([r, g, b, 255 * a], 4 * i);
  });
  small.getContext("2d").putImageData(pixels, 0, 0);

  const picture = $("picture"), canvas = $("heat");
  const { width, height } = picture.getBoundingClientRect();
  const scale = Math.min(width / picture.naturalWidth, height / picture.naturalHeight);
  const seen = [picture.naturalWidth * scale, picture.naturalHeight * scale];
  const [w, h] = fit === "squash" ? seen : [Math.min(...seen), Math.min(...seen)];
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(small, (width - w) / 2, (height - h) / 2, w, h);
  canvas.classList.add("on");
  canvas.dataset.word = button.textContent;
  $("heat-says").textContent = `Attention while “${button.textContent}” was written: light is much, dark is little.`;
}

function hideMap(unpin) {
  if (unpin && pinned) {
    pinned.setAttribute("aria-pressed", "false");
    pinned = null;
  }
  if (pinned) return showMap(pinned);
  $("heat").classList.remove("on");
  delete $("heat").dataset.word;
}

const wordOf = (event) => (maps.has(event.target) ? event.target : null);
for (const [name, show] of [["mouseover", true], ["focusin", true], ["mouseout", false], ["focusout", false]]) {
  $("texts").addEventListener(name, (event) => {
    const word = wordOf(event);
    if (word) show ? showMap(word) : hideMap(false);
  });
}
$("texts").addEventListener("click", (event) => {
  const word = wordOf(event);
  if (!word) return;
  const again = word === pinned;
  hideMap(true);
  if (again) return;
  pinned = word;
  word.setAttribute("aria-pressed", "true");
  showMap(word);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideMap(true);
});
new ResizeObserver(() => pinned && showMap(pinned)).observe($("picture"));

// ---- searching

async function find(fields, what) {
  $("found-says").textContent = "Looking …";
  let results;
  try {
    results = (await (await ask("/search", { count: "24", ...fields })).json()).results;
  } catch (error) {
    $("found-says").textContent = "";
    throw error;
  }
  for (const image of $("found").querySelectorAll("img")) URL.revokeObjectURL(image.src);
  $("found").replaceChildren(...results.map(hit));
  $("found-says").textContent = `${results.length} pictures nearest to ${what}; press one to look at it.`;
}

// What may be searched by but pictures: each modality with the suffixes of its files.
const others = () => Object.entries(server.files || {}).filter(([name]) => name !== "image");

// The modality, other than pictures, that a file may be searched by: '' for none.
function modalityOf(file) {
  const named = (suffix) => file.name.toLowerCase().endsWith(suffix);
  return others().find(([, suffixes]) => suffixes.some(named))?.[0] ?? "";
}

// A file that was chosen or dropped: a picture is looked at, by anything else pictures are found.
function take(file) {
  const of = file.type.startsWith("image/") ? "" : modalityOf(file);
  if (!of || !canShow()) return look(file);
  if (tooLarge(file, file.name)) return;
  URL.revokeObjectURL($("heard").src);
  $("heard").hidden = of !== "audio";
  if (of === "audio") $("heard").src = URL.createObjectURL(file);
  during(null, () => find({ item: file, of }, file.name));
}

// Pictures of the index from all over it, so that one can be asked about before anything is at hand.
function browse(count) {
  const most = Math.min(count, 24);
  const step = count / most;
  const some = Array.from({ length: most }, (_, i) => ({ picture: Math.floor(i * step) }));
  $("found").replaceChildren(...some.map(hit));
  $("found-says").textContent = `${most} of the ${count.toLocaleString("en")} pictures here; press one to look at it, or search.`;
}

function hit({ picture, name, score }) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  const image = document.createElement("img");
  image.alt = name || `Picture ${picture}`;
  button.title = image.alt;
  button.append(image);
  if (score !== undefined) {
    image.alt += `, similarity ${score.toFixed(2)}`;
    const number = document.createElement("span");
    number.className = "number";
    number.textContent = score.toFixed(2);
    button.append(number);
  }
  item.append(button);
  const loaded = ask(`/pictures/${picture}`).then((response) => response.blob());
  loaded.then((blob) => (image.src = URL.createObjectURL(blob)), complain);
  button.addEventListener("click", () => during(null, async () => {
    look(await loaded);
    button.ariaPressed = "true";
    $("picture").scrollIntoView({ block: "nearest", behavior: "smooth" });
  }));
  return item;
}

// ---- forms

function onSubmit(id, work) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    during(event.submitter, work);
  });
}

onSubmit("search", () => {
  const text = $("query").value;
  const both = chosen && $("together").checked;
  return find(both ? { text, image: chosen } : { text }, both ? `“${text}” and the picture` : `“${text}”`);
});
onSubmit("ask", () => {
  const question = $("question").value;
  return write("/answer", { question }, question, question);
});
onSubmit("classify", async () => {
  const names = $("classes").value.split(",").map((name) => name.trim()).filter(Boolean);
  const mine = turn;
  const { classes } = await (await ask("/classify", { image: chosen, classes: names })).json();
  if (mine !== turn) return;
  $("ranking").replaceChildren(...classes.map(ranked));
  $("ranking").hidden = false;
});
$("like").addEventListener("click", (event) => during(event.target, () => find({ image: chosen }, "the picture")));

function ranked({ name, similarity }) {
  const item = document.createElement("li");
  const label = document.createElement("span");
  label.textContent = name;
  const meter = document.createElement("meter");
  Object.assign(meter, { min: -1, max: 1, value: similarity });
  meter.setAttribute("aria-label", `${name}: similarity`);
  const number = document.createElement("span");
  number.className = "number";
  number.textContent = similarity.toFixed(2);
  item.append(label, meter, number);
  return item;
}

// ---- pictures come by choosing, dropping and pasting

for (const id of ["file", "item"]) {
  $(id).addEventListener("change", () => {
    if ($(id).files.length) take($(id).files[0]);
    $(id).value = "";
  });
}
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file) look(file);
});

during(null, async () => {
  server = await fetch("/healthz").then((response) => response.json());
  const pictures = server.pictures ? `, ${server.pictures.toLocaleString("en")} pictures` : "";
  const state = server.status === "ok" ? "" : " (stopping)";
  $("status").textContent = `${server.fusion.replaceAll("_", " ")}, step ${server.step.toLocaleString("en")}${pictures}${state}`;
  $("ask").hidden = !can("/answer");
  $("classify").hidden = !can("/classify");
  $("like").hidden = $("search-part").hidden = !canShow();
  document.querySelector("main").classList.toggle("alone", !canShow());
  $("item-part").hidden = !canShow() || !others().length;
  $("item").accept = others().flatMap(([, suffixes]) => suffixes).join(",");
  $("item").nextElementSibling.textContent = `Search by ${others().map(([name]) => name).join(" or ")}`;
  if (canShow() && server.pictures) browse(server.pictures);
});
