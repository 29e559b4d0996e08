// What the page says, in English and Chinese, and how it writes numbers. Pure functions: no document, no network.

const EN = {
  skip: "Skip to the question", clear: "New chat", theme: "Light or dark", views: "Views", documents: "Documents",
  chat: "Chat", source: "Source", drop: "Drop files here, or choose some",
  kinds: "PDF, Word, EPUB, HTML, Markdown, text, CSV, code", saved: "Saved documents", conversation: "Conversation",
  welcome: "Choose a document and ask about it, or just talk.", question: "Your question", ask: "Ask…", send: "Ask",
  stop: "Stop", close: "Back to the answer", sourceText: "Text of the document",
  sourceEmpty: "Click a number in an answer to see its passage here.", keyTitle: "This server asks for a key",
  keyLabel: "API key", keySend: "Use it", you: "You", uploading: "Sending {name}", parsing: "Opening {name}",
  words: "{n} words", tokens: "{n} tokens", pages: "{n} pages", sections: "{n} sections", fits: "fits",
  tooLong: "too long: this model reads {n} tokens", read: "read", unread: "not read yet", reading: "Reading: {percent}%",
  left: "{time} left", remove: "Delete", removeName: "Delete {name}", open: "Open", openName: "Open {name}",
  readNow: "Read", readName: "Read {name} now", stopReading: "Stop reading {name}", talk: "No document chosen: this is a talk.",
  about: "About {names}", over: "Together these have {n} tokens, and this model reads {window}.",
  window: "reads {n} tokens", waiting: "Waiting for its turn…", writing: "Answering, and checking it…", stopped: "Stopped.", empty: "The model said nothing.",
  notFound: "The document does not bear an answer out.", guess: "What the model guessed", first: "What the model answered before the passage was read again", cited: "Citation {n}: {place}",
  verified: "verified", repaired: "quoted with slips", unverified: "not borne out", sources: "Sources", cut: "Cut at the length limit.",
  figures: "{fresh} tokens read, {kept} kept from before · {rate} tokens a second", page: "Page {n}", section: "Section {n}",
  earlier: "Earlier", later: "Later", uploaded: "{name} is here.", ready: "{name} is read.", busy: "The server is busy; it says to try again in {n} s.",
  offline: "The server does not answer.", deleted: "{name} is deleted.", answered: "Answer: {text}",
};

const ZH = {
  skip: "跳到提问框", clear: "新对话", theme: "浅色或深色", views: "视图", documents: "文档", chat: "对话", source: "原文",
  drop: "把文件拖到这里，或点击选择", kinds: "PDF、Word、EPUB、HTML、Markdown、文本、CSV、代码", saved: "已保存的文档",
  conversation: "对话", welcome: "选择一份文档来提问，或直接聊天。", question: "你的问题", ask: "提问…", send: "提问", stop: "停止",
  close: "回到回答", sourceText: "文档原文", sourceEmpty: "点击回答中的编号，在这里查看原文。", keyTitle: "此服务器需要密钥",
  keyLabel: "API 密钥", keySend: "使用", you: "你", uploading: "正在上传 {name}", parsing: "正在打开 {name}", words: "{n} 词",
  tokens: "{n} 个词元", pages: "{n} 页", sections: "{n} 节", fits: "放得下", tooLong: "太长：此模型只能读 {n} 个词元", read: "已读",
  unread: "未读", reading: "正在阅读：{percent}%", left: "还需 {time}", remove: "删除", removeName: "删除 {name}", open: "打开",
  openName: "打开 {name}", readNow: "阅读", readName: "现在阅读 {name}", stopReading: "停止阅读 {name}", talk: "未选择文档：自由聊天。",
  about: "关于 {names}", over: "这些文档共 {n} 个词元，此模型只能读 {window} 个。", window: "可读 {n} 个词元",
  waiting: "排队中…", writing: "正在回答并核对…", stopped: "已停止。", empty: "模型没有回答。", notFound: "文档不支持任何回答。", guess: "模型的猜测", first: "重读原文之前的回答",
  cited: "引用 {n}：{place}", verified: "已核实", repaired: "引文略有出入", unverified: "原文不支持", sources: "出处",
  cut: "已达长度上限。", figures: "读入 {fresh} 个词元，沿用 {kept} 个 · 每秒 {rate} 个", page: "第 {n} 页", section: "第 {n} 节",
  earlier: "上文", later: "下文", uploaded: "{name} 已就绪。", ready: "{name} 已读完。", busy: "服务器繁忙，请在 {n} 秒后再试。",
  offline: "服务器没有应答。", deleted: "{name} 已删除。", answered: "回答：{text}",
};

export const LANGUAGES = { en: EN, zh: ZH };

/** The sentence of a name in a language, with its {gaps} filled. */
export function say(language, name, gaps = {}) {
  const text = (LANGUAGES[language] ?? EN)[name] ?? EN[name] ?? name;
  return text.replace(/\{(\w+)\}/g, (whole, gap) => (gap in gaps ? String(gaps[gap]) : whole));
}

/** A whole number with its thousands apart. */
export function count(number, language = "en") {
  return new Intl.NumberFormat(language === "zh" ? "zh-CN" : "en-GB").format(Math.round(number));
}

/** Seconds as a person says them: "8 s", "2 min 5 s", "1 h 10 min". */
export function duration(seconds, language = "en") {
  const [s, min, h] = language === "zh" ? ["秒", "分", "小时"] : ["s", "min", "h"];
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} ${s}`;
  if (whole < 3600) return whole % 60 ? `${Math.floor(whole / 60)} ${min} ${whole % 60} ${s}` : `${whole / 60} ${min}`;
  return `${Math.floor(whole / 3600)} ${h} ${Math.floor((whole % 3600) / 60)} ${min}`;
}

/** How far a reading is, and the seconds it still takes; `seconds` is null before there is a speed to go by. */
export function progress({ total, cache, processed, time_ms }) {
  const fresh = processed - cache;
  const percent = total ? Math.floor((100 * processed) / total) : 100;
  const seconds = fresh > 0 && time_ms > 200 ? ((total - processed) * time_ms) / fresh / 1000 : null;
  return { percent, seconds };
}

/** An answer cut at its citation marks: [{text, citations}], so that citations stand behind their text. The offsets
 *  count characters, as the server does, and not UTF-16 units. */
export function parts(answer, marks) {
  const characters = Array.from(answer);
  const made = [];
  let begin = 0;
  for (const mark of [...marks].sort((a, b) => a.offset - b.offset)) {
    const end = Math.min(Math.max(mark.offset, begin), characters.length);
    made.push({ text: characters.slice(begin, end).join(""), citations: mark.citations });
    begin = end;
  }
  if (begin < characters.length || !made.length) made.push({ text: characters.slice(begin).join(""), citations: [] });
  return made;
}

/** A paragraph parted into before, inside and after a passage of the document; inside is "" where they do not meet. */
export function highlighted(paragraph, start, end) {
  const characters = Array.from(paragraph.text);
  const from = Math.min(Math.max(start - paragraph.start, 0), characters.length);
  const to = Math.min(Math.max(end - paragraph.start, from), characters.length);
  const piece = (a, b) => characters.slice(a, b).join("");
  return { before: piece(0, from), inside: piece(from, to), after: piece(to, characters.length) };
}
