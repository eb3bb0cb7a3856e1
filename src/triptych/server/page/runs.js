// Requests of this tab: handed in, followed event by event, and remembered until the tab is closed.

import { call, events, get, post, Problem } from "./api.js";

const STREAMS = 3;  // a browser opens six connections to a server that speaks HTTP/1.1
const PREVIEWS = 3;  // of each request, as many as the server makes
const REMEMBERED = 60;
const STORE = "triptych.runs";

/** One request. Tells of changes with events: `change` with what happened, `end` at its end. */
export class Run extends EventTarget {
  constructor({ id, seed, makes, parameters, created = Date.now() / 1000 }) {
    super();
    Object.assign(this, { id, seed, makes, parameters, created });
    this.status = "queued";
    this.role = null;
    this.step = this.steps = this.preview = this.error = this.seconds = null;
    this.outputs = [];
  }

  get ended() {
    return ["done", "failed", "cancelled"].includes(this.status);
  }

  take(event) {
    if (event.kind === "started") Object.assign(this, { status: "running", role: event.role, step: null, steps: null });
    else if (event.kind === "step") Object.assign(this, { step: event.step, steps: event.steps });
    else if (event.kind === "preview") this.preview = event.png ? `data:image/png;base64,${event.png}` : this.preview;
    else if (event.kind === "retried") Object.assign(this, { step: null, steps: null });
    else if (event.kind === "failed") Object.assign(this, { status: "failed", error: event.reason });
    else if (event.kind === "cancelled") this.status = "cancelled";
    else if (event.kind === "done") Object.assign(this, { status: "done", seconds: event.seconds, count: event.outputs });
    this.dispatchEvent(new CustomEvent("change", { detail: event }));
  }

  /** Take an end of which no event has told. */
  settle({ status, seconds, outputs, error }) {
    this.take({ kind: status, seconds, outputs, reason: error?.message });
  }

  cancel() {
    return post(`v1/requests/${this.id}/cancel`).catch(() => {});
  }

  /** Fetch the results as blobs' addresses. */
  async fetchOutputs(count) {
    const one = async (index) => {
      const blob = await (await call(`v1/requests/${this.id}/result?index=${index}`)).blob();
      return { address: URL.createObjectURL(blob), blob };
    };
    this.outputs = await Promise.all(Array.from({ length: count }, (_, index) => one(index)));
  }
}

/** The requests of this tab. Tells of new ones with the event `run`. */
export class Runs extends EventTarget {
  constructor() {
    super();
    this.all = new Map();
    this.free = STREAMS;
    this.pending = [];
    this.submitting = 0;
    this.unrestored = [];  // what is remembered of requests that the server has not told of since the page was loaded
  }

  /** Hand a request in. */
  async submit(parameters) {
    this.submitting += 1;
    const status = await post("v1/requests", { parameters, previews: PREVIEWS }).finally(() => (this.submitting -= 1));
    const run = new Run({ ...status, parameters });
    this.add(run);
    this.follow(run);
    return run;
  }

  /** Take up what this tab knew before it was reloaded, as far as the server still has it. */
  async restore() {
    let known = [];
    try {
      known = JSON.parse(sessionStorage.getItem(STORE)) ?? [];
    } catch {
      sessionStorage.removeItem(STORE);
    }
    this.unrestored = known;
    for (const each of known) {
      const run = new Run(each);
      let status = null;
      try {
        status = await get(`v1/requests/${run.id}`);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        if (error.status === 401) break;  // nobody gave a key, and nobody is to be asked again for each of them
        if (error.status !== 404) continue;  // it is still remembered: the next time the page is loaded may bring it
      }
      this.unrestored = this.unrestored.filter((other) => other !== each);
      if (status === null || status.status === "failed" || status.status === "cancelled") continue;
      this.add(run);
      this.follow(run, status);
    }
    this.remember();
  }

  add(run) {
    this.all.set(run.id, run);
    this.remember();
    this.dispatchEvent(new CustomEvent("run", { detail: run }));
  }

  async follow(run, status = null) {
    if (status?.status !== "done") {
      await this.slot();
      try {
        for await (const event of events(run.id)) run.take(event);
        if (!run.ended) run.settle(await get(`v1/requests/${run.id}`));  // the server has no event that was not told
      } catch (error) {
        run.take({ kind: "failed", reason: error.message });
      } finally {
        this.free += 1;
        this.pending.shift()?.();
      }
    } else {
      run.settle(status);
    }
    if (run.status === "done") {
      try {
        await run.fetchOutputs(run.count);
      } catch (error) {
        Object.assign(run, { status: "failed", error: error.message });
      }
    }
    run.dispatchEvent(new CustomEvent("end"));
  }

  async slot() {
    while (this.free === 0) await new Promise((resolve) => this.pending.push(resolve));
    this.free -= 1;
  }

  forget(run) {
    for (const { address } of run.outputs) URL.revokeObjectURL(address);
    this.all.delete(run.id);
    this.remember();
  }

  remember() {
    const runs = [...this.all.values()].filter((run) => !["failed", "cancelled"].includes(run.status));
    const kept = runs.map((run) => {
      const { id, seed, makes, created } = run;
      const entries = Object.entries(run.parameters).filter(([, value]) => !isPicture(value));
      return { id, seed, makes, created, parameters: Object.fromEntries(entries) };
    });
    for (let all = [...this.unrestored, ...kept].slice(-REMEMBERED); ; all = all.slice(Math.ceil(all.length / 2))) {
      try {
        return sessionStorage.setItem(STORE, JSON.stringify(all));
      } catch {
        if (all.length === 0) return;  // there is no room: the oldest are not remembered
      }
    }
  }
}

const isPicture = (value) => [value].flat().some((each) => typeof each === "string" && each.startsWith("data:"));
