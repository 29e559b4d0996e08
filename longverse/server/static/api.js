// Talking to the server: requests with the key, errors as sentences, and streams of events. No document here.

export class ServerError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Cuts a stream of text into the data of its events. Feed it pieces of any size. */
export class EventParser {
  #rest = "";

  push(text) {
    const found = [];
    this.#rest += text;
    let end;
    while ((end = this.#rest.search(/\r?\n\r?\n/)) >= 0) {
      const block = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end).replace(/^\r?\n\r?\n/, "");
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) found.push(lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n"));
    }
    return found;
  }
}

let key = null;
export function useKey(value) { key = value; }
function headers(more = {}) { return key ? { Authorization: `Bearer ${key}`, ...more } : more; }

async function failure(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: the status says it */ }
  const wait = response.headers.get("Retry-After");
  return new ServerError(response.status, message, wait === null ? null : Number(wait));
}

/** A JSON answer. Throws ServerError. */
export async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** The events of a POST, parsed, until [DONE]. Throws ServerError, also for an error in the middle. */
export async function* stream(path, body, signal) {
  const options = body === null ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  const response = await fetch(path, { method: "POST", signal, ...options, headers: headers(options.headers) });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError(0, "The connection broke before the answer was whole.");
      for (const data of parser.push(value)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(0, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Upload a file; `onSent(share)` tells how much of it is sent. Throws ServerError. */
export function upload(file, onSent) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file);
    request.upload.onprogress = (event) => event.lengthComputable && onSent(event.loaded / event.total);
    request.onerror = () => reject(new ServerError(0, ""));
    request.onload = () => {
      let body = null;
      try {
        body = JSON.parse(request.responseText);
      } catch { /* said below */ }
      if (request.status === 200 && body) resolve(body);
      else reject(new ServerError(request.status, body?.error?.message ?? `${request.status} ${request.statusText}`));
    };
    request.open("POST", "/v1/files");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.send(form);
  });
}
