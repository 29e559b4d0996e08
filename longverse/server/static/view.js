// What is shown: documents, turns of the conversation, passages. Text only ever becomes text nodes, never markup.

import { count, duration, highlighted, parts, progress, say } from "./text.js";

/** An element with properties and children; strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Every fixed text of the page, in a language. */
export function translate(language) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(language, element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", say(language, element.dataset.label));
  for (const element of document.querySelectorAll("[data-placeholder]")) element.placeholder = say(language, element.dataset.placeholder);
  const other = document.getElementById("language");
  other.textContent = language === "zh" ? "English" : "中文";
  other.lang = language === "zh" ? "en" : "zh";
  other.setAttribute("aria-label", language === "zh" ? "Switch to English" : "切换到中文");
}

/** One document of the shelf. `state`: {chosen, reading: progress event or null, problem}. */
export function shelfItem(file, state, language, on) {
  const about = file.document;
  const t = (name, gaps) => say(language, name, gaps);
  const pages = about.unit ? t(about.unit === "page" ? "pages" : "sections", { n: count(about.pages, language) }) : null;
  const size = [pages, t("words", { n: count(about.words, language) }), t("tokens", { n: count(about.tokens, language) })];
  const status = about.fits
    ? make("span", { class: "good" }, state.reading ? t("fits") : `${t("fits")} · ${t(about.read ? "read" : "unread")}`)
    : make("span", { class: "bad" }, t("tooLong", { n: count(about.window, language) }));
  const box = make("input", { type: "checkbox", checked: state.chosen, disabled: !about.fits });
  box.addEventListener("change", () => on.choose(file.id, box.checked));
  const button = (text, label, action) => {
    const made = make("button", { type: "button", "aria-label": label }, text);
    made.addEventListener("click", action);
    return made;
  };
  const row = make("div", { class: "row" }, button(t("open"), t("openName", { name: file.filename }), () => on.open(file)));
  if (state.reading) row.append(button(t("stop"), t("stopReading", { name: file.filename }), () => on.stopReading(file.id)));
  else if (about.fits && !about.read) row.append(button(t("readNow"), t("readName", { name: file.filename }), () => on.read(file.id)));
  row.append(button(t("remove"), t("removeName", { name: file.filename }), () => on.remove(file)));
  const item = make(
    "li", { class: state.chosen ? "chosen" : "" },
    make("label", {}, box, make("span", {}, file.filename)),
    make("p", { class: "quiet" }, size.filter(Boolean).join(" · ")),
    make("p", { class: "quiet" }, status),
    ...(about.notes ?? []).map((note) => make("p", { class: "quiet warn" }, note)),
    state.reading ? readingBar(state.reading, language) : null,
    state.problem ? make("p", { class: "problem", role: "alert" }, state.problem) : null,
    row,
  );
  item.dataset.id = file.id;
  return item;
}

/** A bar with percent and time left. */
export function readingBar(event, language) {
  const { percent, seconds } = progress(event);
  const text = say(language, "reading", { percent }) + (seconds === null ? "" : ` · ${say(language, "left", { time: duration(seconds, language) })}`);
  return make("div", { class: "reading" }, make("progress", { max: 100, value: percent, "aria-label": text }), make("p", { class: "quiet" }, text));
}

/** Show a turn in its element. `turn`: {role, text, cited, progress, note, error, figures, scope}. */
export function showTurn(element, turn, language, onCite) {
  const t = (name, gaps) => say(language, name, gaps);
  element.className = `turn ${turn.role === "user" ? "question" : "answer"}`;
  const who = make("p", { class: "who" }, turn.role === "user" ? t("you") : "longverse");
  const inside = [who];
  if (turn.role === "user" || !turn.cited) inside.push(make("p", { class: "text" }, turn.text));
  else inside.push(...citedText(turn.cited, t, onCite));
  if (turn.progress) inside.push(readingBar(turn.progress, language));
  if (turn.waiting) inside.push(make("p", { class: "quiet" }, t("waiting")));
  if (turn.writing && !turn.text) inside.push(make("p", { class: "quiet" }, t("writing")));
  if (turn.note) inside.push(make("p", { class: "quiet notice" }, t(turn.note)));
  if (turn.error) inside.push(make("p", { class: "error", role: "alert" }, turn.error));
  if (turn.figures) inside.push(make("p", { class: "quiet" }, figures(turn.figures, language)));
  element.replaceChildren(...inside);
}

function figures(timings, language) {
  const gaps = { fresh: count(timings.prompt_n, language), kept: count(timings.cache_n, language), rate: timings.predicted_per_second.toFixed(1) };
  return say(language, "figures", gaps);
}

function citedText(cited, t, onCite) {
  const button = (number) => {
    const citation = cited.citations[number - 1];
    const made = make("button", { type: "button", class: "cite", "aria-label": t("cited", { n: number, place: citation.place }) }, String(number));
    made.addEventListener("click", () => onCite(citation, made));
    return made;
  };
  const text = make("p", { class: "text" });
  for (const part of cited.found ? parts(cited.answer, cited.marks) : [{ text: cited.answer, citations: [] }]) {
    text.append(part.text, ...part.citations.map(button));
  }
  const inside = [text];
  // What the model wrote before it was checked: a guess that nothing bears out, or an answer that its passage corrected.
  if (cited.model_answer) inside.push(make("details", { class: "quiet" }, make("summary", {}, t(cited.found ? "first" : "guess")), make("p", {}, cited.model_answer)));
  if (!cited.found) {
    text.classList.add("notice");
    return inside;
  }
  const rows = cited.citations.map((citation, place) => {
    const kind = { verified: "good", repaired: "warn", unverified: "bad" }[citation.status] ?? "quiet";
    const about = make("span", {}, `${citation.document_title}, ${citation.place} · `, make("span", { class: kind }, t(citation.status)), " ", make("q", {}, citation.cited_text));
    return make("li", {}, button(place + 1), about);
  });
  if (rows.length) inside.push(make("ul", { class: "sources", "aria-label": t("sources") }, ...rows));
  return inside;
}

/** The paragraphs of a source, those of [start, end) highlighted. Returns the first highlighted element. */
export function showPassages(element, page, start, end, language, onMore) {
  let first = null;
  let shown = null;
  const rows = [];
  const more = (name, direction) => {
    const made = make("button", { type: "button", class: "more" }, say(language, name));
    made.addEventListener("click", () => onMore(direction));
    return made;
  };
  if (page.data.length && page.data[0].number > 1) rows.push(more("earlier", -1));
  for (const paragraph of page.data) {
    if (page.unit && paragraph.page !== shown) {
      shown = paragraph.page;
      rows.push(make("div", { class: "page" }, say(language, page.unit === "page" ? "page" : "section", { n: shown })));
    }
    const row = make(paragraph.level ? "h3" : "p", {});
    const { before, inside, after } = highlighted(paragraph, start, end);
    if (paragraph.level && !inside) row.append(paragraph.text.replace(/^#{1,6} /, ""));
    else if (inside) {
      const mark = make("mark", { tabIndex: -1 }, inside);
      first ??= mark;
      row.append(before, mark, after);
    } else row.append(paragraph.text);
    rows.push(row);
  }
  const last = page.data.at(-1);
  if (last && last.number < page.total) rows.push(more("later", 1));
  element.replaceChildren(...rows);
  return first;
}
