// The page: keeps its state, listens, and redraws what changed. The conversation lives in this tab's storage alone.

import { ServerError, call, stream, upload, useKey } from "./api.js";
import { LANGUAGES, count, say } from "./text.js";
import { make, shelfItem, showPassages, showTurn, translate } from "./view.js";

const $ = (id) => document.getElementById(id);
const SPAN = 60; // paragraphs of a source shown at once

const state = {
  language: localStorage.getItem("language") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"),
  model: null, window: 0,
  files: [], // as the server lists them
  chosen: new Set(JSON.parse(sessionStorage.getItem("chosen") ?? "[]")),
  readings: new Map(), // id -> {controller, event}
  problems: new Map(), // id -> sentence
  turns: JSON.parse(sessionStorage.getItem("turns") ?? "[]"),
  answering: null, // AbortController
  source: null, // {file, first, start, end}
  from: null, // the button that opened the source
};
if (!(state.language in LANGUAGES)) state.language = "en";
const t = (name, gaps) => say(state.language, name, gaps);

// ---- small things -----------------------------------------------------------------------------------------

function announce(text) { $("said").textContent = text; }

function sentence(error) {
  if (error instanceof ServerError && error.status === 429 && error.retryAfter) return t("busy", { n: error.retryAfter });
  if (error instanceof TypeError || !error.message) return t("offline");
  return error.message;
}

function keep() {
  sessionStorage.setItem("chosen", JSON.stringify([...state.chosen]));
  const whole = state.turns.map(({ role, text, cited, figures, note, error, about }) => ({ role, text, cited, figures, note, error, about }));
  try {
    sessionStorage.setItem("turns", JSON.stringify(whole.slice(-200)));
  } catch { /* the storage is full: this tab forgets on reload */ }
}

function tab(name) {
  document.body.dataset.tab = name;
  for (const button of document.querySelectorAll(".tabs button")) button.setAttribute("aria-pressed", String(button.dataset.tab === name));
}

/** Run an action; where the server asks for a key, ask the user and try again. */
async function withKey(action) {
  for (;;) {
    try {
      return await action();
    } catch (error) {
      if (!(error instanceof ServerError) || error.status !== 401) throw error;
      $("key").showModal();
      await new Promise((resolve) => $("key").addEventListener("close", resolve, { once: true }));
      const value = $("key-value").value.trim();
      sessionStorage.setItem("key", value);
      useKey(value);
    }
  }
}

// ---- documents --------------------------------------------------------------------------------------------

async function refresh() {
  state.files = (await call("/v1/files")).data;
  for (const id of [...state.chosen]) if (!state.files.some((file) => file.id === id)) state.chosen.delete(id);
  drawShelf();
}

function drawShelf() {
  const focus = document.activeElement?.closest?.("#shelf li")?.dataset.id;
  const label = document.activeElement?.getAttribute?.("aria-label");
  const on = { choose, open: (file) => openSource(file.id, 0, 0, null), read, stopReading, remove };
  const rows = state.files.map((file) => shelfItem(
    file,
    { chosen: state.chosen.has(file.id), reading: state.readings.get(file.id)?.event, problem: state.problems.get(file.id) },
    state.language, on,
  ));
  const sending = [...$("shelf").querySelectorAll("li.sending")];
  $("shelf").replaceChildren(...sending, ...rows);
  if (focus) { // a redraw must not throw the keyboard out
    const row = rows.find((item) => item.dataset.id === focus);
    const same = [...(row?.querySelectorAll("button") ?? [])].find((button) => button.getAttribute("aria-label") === label);
    (same ?? row?.querySelector("input"))?.focus();
  }
  const chosen = state.files.filter((file) => state.chosen.has(file.id));
  const tokens = chosen.reduce((sum, file) => sum + file.document.tokens, 0);
  const over = tokens > state.window;
  $("fits").textContent = over ? t("over", { n: count(tokens, state.language), window: count(state.window, state.language) }) : "";
  $("fits").className = over ? "bad" : "quiet";
  $("scope").textContent = chosen.length ? t("about", { names: chosen.map((file) => file.filename).join(", ") }) : t("talk");
}

function choose(id, chosen) {
  if (chosen) state.chosen.add(id);
  else state.chosen.delete(id);
  keep();
  drawShelf();
}

async function addFiles(files) {
  tab("documents");
  for (const file of files) {
    const text = make("p", {}, t("uploading", { name: file.name }));
    const bar = make("progress", { max: 1, value: 0 });
    const row = make("li", { class: "sending" }, text, bar);
    $("shelf").prepend(row);
    try {
      const stored = await withKey(() => upload(file, (share) => {
        if (share < 1) bar.value = share;
        else {
          bar.removeAttribute("value");
          text.textContent = t("parsing", { name: file.name });
        }
      }));
      row.remove();
      announce(t("uploaded", { name: stored.filename }));
      if (stored.document.fits) state.chosen.add(stored.id);
      keep();
      await refresh();
      if (stored.document.fits) read(stored.id);
    } catch (error) {
      bar.remove();
      text.replaceChildren(make("strong", {}, file.name), make("br"), sentence(error));
      row.className = "sending problem";
      row.setAttribute("role", "alert");
      const away = make("button", { type: "button", "aria-label": t("removeName", { name: file.name }) }, "✕");
      away.addEventListener("click", () => row.remove());
      row.append(away);
    }
  }
}

async function read(id) {
  if (state.readings.has(id)) return;
  const controller = new AbortController();
  const reading = { controller, event: { total: 1, cache: 0, processed: 0, time_ms: 0 } };
  state.readings.set(id, reading);
  state.problems.delete(id);
  drawShelf();
  try {
    for await (const event of stream(`/v1/files/${id}/read`, null, controller.signal)) {
      if (event.prompt_progress) {
        reading.event = event.prompt_progress;
        drawShelf();
      } else if (event.file) announce(t("ready", { name: event.file.filename }));
    }
  } catch (error) {
    if (error.name !== "AbortError") state.problems.set(id, sentence(error));
  }
  state.readings.delete(id);
  await refresh().catch(() => drawShelf());
}

function stopReading(id) { state.readings.get(id)?.controller.abort(); }

async function remove(file) {
  stopReading(file.id);
  try {
    await call(`/v1/files/${file.id}`, { method: "DELETE" });
    announce(t("deleted", { name: file.filename }));
  } catch (error) {
    state.problems.set(file.id, sentence(error));
  }
  await refresh().catch(() => {});
  $("file").focus();
}

// ---- conversation -----------------------------------------------------------------------------------------

function drawTurn(turn) {
  const log = $("log");
  turn.element ??= log.appendChild(make("article", {}));
  const low = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  showTurn(turn.element, turn, state.language, cite);
  if (low) log.scrollTop = log.scrollHeight;
}

function drawAll() {
  $("welcome").hidden = state.turns.length > 0;
  for (const turn of state.turns) drawTurn(turn);
}

/** What the model reads: with documents the question alone, else the whole talk. */
function messages(question, documents) {
  if (documents.length) {
    const parts = documents.map((id) => ({ type: "file", file: { file_id: id } }));
    return [{ role: "user", content: [...parts, { type: "text", text: question }] }];
  }
  const talk = [];
  for (const turn of state.turns) {
    if (turn.about?.length) continue;
    if (turn.role === "assistant" && (turn.error || !turn.text)) talk.pop(); // with the question that it failed
    else if (turn.text) talk.push({ role: turn.role, content: turn.text });
  }
  return talk;
}

async function ask(question) {
  const documents = state.files.map((file) => file.id).filter((id) => state.chosen.has(id));
  state.turns.push({ role: "user", text: question, about: documents });
  const turn = { role: "assistant", text: "", waiting: true, about: documents };
  const body = { model: state.model, messages: messages(question, documents), stream: true, return_progress: true };
  state.turns.push(turn);
  drawAll();
  $("log").scrollTop = $("log").scrollHeight;
  const controller = new AbortController();
  state.answering = controller;
  $("stop").hidden = false;
  $("send").disabled = true;
  try {
    await withKey(async () => {
      for await (const event of stream("/v1/chat/completions", body, controller.signal)) take(turn, event);
    });
    if (!turn.text && !turn.cited) turn.note = "empty";
  } catch (error) {
    if (error.name === "AbortError") turn.note = "stopped";
    else turn.error = sentence(error);
  }
  turn.waiting = turn.writing = false;
  turn.progress = null;
  state.answering = null;
  const stopHadFocus = document.activeElement === $("stop");
  $("stop").hidden = true;
  $("send").disabled = false;
  if (stopHadFocus) $("question").focus();
  drawTurn(turn);
  keep();
  announce(t("answered", { text: turn.cited?.answer ?? (turn.text || t(turn.note ?? "empty")) }));
  if (documents.length) refresh().catch(() => {});
}

function take(turn, event) {
  const choice = event.choices?.[0];
  if (event.prompt_progress) {
    turn.waiting = false;
    const { total, processed } = event.prompt_progress;
    turn.progress = processed < total ? event.prompt_progress : null;
    turn.writing = processed >= total;
  }
  if (choice?.delta?.content) {
    turn.waiting = false;
    turn.progress = null;
    turn.text += choice.delta.content;
  }
  if (choice?.delta?.cited) {
    turn.cited = choice.delta.cited;
    turn.text = turn.cited.answer;
  }
  if (choice?.finish_reason === "length") turn.note = "cut";
  if (event.timings) turn.figures = event.timings;
  drawTurn(turn);
}

// ---- sources ----------------------------------------------------------------------------------------------

function cite(citation, button) {
  openSource(citation.file_id, citation.start_char_index, citation.end_char_index, button);
}

async function openSource(id, start, end, button) {
  const file = state.files.find((one) => one.id === id);
  for (const one of document.querySelectorAll('.cite[aria-current="true"]')) one.removeAttribute("aria-current");
  button?.setAttribute("aria-current", "true");
  state.from = button;
  $("source-title").textContent = file?.filename ?? t("source");
  $("source-title").removeAttribute("data-text");
  $("source-empty").hidden = true;
  $("close").hidden = false;
  try {
    const page = await withKey(() => call(`/v1/files/${id}/paragraphs?at=${start}&count=${SPAN}`));
    state.source = { id, start, end, first: page.data[0]?.number ?? 1 };
    tab("source");
    const mark = drawSource(page);
    (mark ?? $("passages")).focus({ preventScroll: true });
    if (mark) mark.scrollIntoView({ block: "center" });
    else $("passages").scrollTop = 0;
  } catch (error) {
    $("passages").replaceChildren(make("p", { class: "error", role: "alert" }, sentence(error)));
    tab("source");
  }
}

function drawSource(page) {
  return showPassages($("passages"), page, state.source.start, state.source.end, state.language, async (direction) => {
    const first = Math.max(1, state.source.first + direction * SPAN);
    const next = await call(`/v1/files/${state.source.id}/paragraphs?first=${first}&count=${SPAN}`);
    state.source.first = next.data[0]?.number ?? 1;
    drawSource(next);
    $("passages").scrollTop = 0;
    $("passages").focus();
  });
}

function closeSource() {
  tab("chat");
  (state.from?.isConnected ? state.from : $("question")).focus();
}

// ---- listening --------------------------------------------------------------------------------------------

$("file").addEventListener("change", () => {
  const files = [...$("file").files];
  $("file").value = "";
  addFiles(files);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer?.files.length) addFiles([...event.dataTransfer.files]);
  });
}
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || state.answering) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => state.answering?.abort());
$("close").addEventListener("click", closeSource);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("key").open) return;
  if ($("source").contains(document.activeElement)) closeSource();
  else state.answering?.abort();
});
$("clear").addEventListener("click", () => {
  state.answering?.abort();
  state.turns = [];
  for (const turn of $("log").querySelectorAll(".turn")) turn.remove();
  $("welcome").hidden = false;
  keep();
  tab("chat");
  $("question").focus();
});
$("language").addEventListener("click", () => {
  state.language = state.language === "zh" ? "en" : "zh";
  localStorage.setItem("language", state.language);
  draw();
});
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme === "dark";
  localStorage.setItem("theme", dark ? "light" : "dark");
  theme();
});
for (const button of document.querySelectorAll(".tabs button")) button.addEventListener("click", () => tab(button.dataset.tab));

function theme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? system;
}

function draw() {
  translate(state.language);
  $("model").textContent = state.model ? `${state.model} · ${t("window", { n: count(state.window, state.language) })}` : "";
  drawShelf();
  drawAll();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
theme();
useKey(sessionStorage.getItem("key"));
draw();
try {
  const { data } = await withKey(() => call("/v1/models"));
  state.model = data[0].id;
  state.window = data[0].max_model_len;
  await refresh();
  draw();
  document.body.dataset.ready = "true";
} catch (error) {
  $("log").append(make("p", { class: "error", role: "alert" }, sentence(error)));
}
