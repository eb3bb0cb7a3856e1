// The server: calls with the key where one is asked for, and streams of events.
// EventSource cannot send a key, so streams are read with fetch.

const KEY = "triptych.key";
let asking = null;

export class Problem extends Error {
  constructor(status, details, wait) {
    super(details.message || `the server answered ${status}`);
    this.status = status;
    this.field = details.field ?? details.param ?? null;
    this.wait = wait;
  }
}

/** Call the server; a path is relative to the page. Throws a Problem for what is no success. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, { message: "the server does not answer" });
    }
    if (response.ok) return response;
    const details = await response.json().then((body) => body.error ?? {}, () => ({}));
    const problem = new Problem(response.status, details, Number(response.headers.get("Retry-After")) || null);
    if (response.status !== 401) throw problem;
    if (sessionStorage.getItem(KEY) !== key) continue;  // another call has asked meanwhile
    if (!(await askForKey(key ? problem.message : null))) throw problem;
  }
}

export const get = async (path, options) => (await call(path, options)).json();

export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return (await call(path, { method: "POST", headers, body: JSON.stringify(body ?? {}) })).json();
}

/** Ask for the key once, however many calls need it; tells whether there is one now. */
function askForKey(complaint) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    if (complaint) document.getElementById("key-about").textContent = complaint;
    field.value = "";
    dialog.addEventListener("close", () => {
      const key = dialog.returnValue === "ok" ? field.value.trim() : "";
      if (key) sessionStorage.setItem(KEY, key);
      asking = null;
      resolve(key !== "");
    }, { once: true });
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

/** Yield a request's events {kind, ...details} to the last, taking the stream up again where it breaks. */
export async function* events(id, signal) {
  let last = null;
  for (;;) {
    try {
      const headers = { Accept: "text/event-stream", ...(last === null ? {} : { "Last-Event-ID": last }) };
      const response = await call(`v1/requests/${id}/events`, { headers, signal });
      if (response.status === 204) return;
      for await (const event of parse(response.body)) {
        last = event.id;
        yield event;
        if (["done", "failed", "cancelled"].includes(event.kind)) return;
      }
    } catch (error) {
      if (error instanceof Problem && error.status > 0) throw error;
      if (signal?.aborted) return;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

/** Yield the events of a stream of bytes: https://html.spec.whatwg.org/multipage/server-sent-events.html */
export async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = {};
        for (const line of block.split("\n")) {
          const colon = line.indexOf(": ");
          if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
        }
        if (fields.event) yield { ...JSON.parse(fields.data), id: fields.id, kind: fields.event };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
