// The live triptych: every request is a card that moves from panel to panel.

import { bytes, calm, find, make, plural, write } from "./dom.js";

const DWELL = 320;  // ms that a card stays in a panel at least: on a small model the eye would see nothing else
const PATIENCE = 400;  // ms after which a request that has not been begun is shown to be waiting
const LINGER = 900;  // ms that a finished one is still shown
const MOVE = { duration: 420, easing: "cubic-bezier(.3,.7,.2,1)" };

const panels = new Map([...document.querySelectorAll(".panel")].map((panel) => [panel.dataset.role, panel]));
const placeOf = (role) => (role === null ? find("waiting") : panels.get(role)?.querySelector(".cards"));

class Card {
  constructor(id, title, cancel) {
    this.id = id;
    this.role = undefined;
    this.moves = [];
    this.busy = false;
    this.picture = make("img", { alt: "", hidden: true });
    this.title = make("p", { class: "title" }, title);
    this.text = make("p", { class: "step" });
    this.bar = make("progress", { "aria-label": `Steps of ${title}`, max: 1, hidden: true });
    this.cancel = cancel && make("button", { type: "button", class: "cancel", "aria-label": `Cancel: ${title}`, title: "Cancel", click: cancel }, "\u00d7");
    this.element = make("li", { class: "card" }, this.picture, make("div", {}, make("div", { class: "head" }, this.title, this.cancel), this.text, this.bar));
  }

  /** Go to a role's panel (null: the queue, undefined: away), after having been seen where it is. */
  go(role) {
    if ((this.moves.length ? this.moves.at(-1) : this.role) === role) return;
    this.moves.push(role);
    if (!this.busy) this.next();
  }

  next() {
    if (!this.moves.length) {
      this.busy = false;
      return;
    }
    this.busy = true;
    this.move(this.moves.shift());
    if (this.role !== undefined) setTimeout(() => this.next(), calm() || document.hidden ? 0 : DWELL);
  }

  move(role) {
    const element = this.element;
    const before = element.isConnected ? element.getBoundingClientRect() : null;
    this.role = role;
    const place = role === undefined ? null : placeOf(role);
    if (!place) {
      const gone = () => element.remove();
      if (calm()) gone();
      else element.animate([{}, { opacity: 0, transform: "scale(.96)" }], { duration: 250 }).finished.then(gone, gone);
      return;
    }
    place.append(element);
    this.show();
    if (calm()) return;
    const after = element.getBoundingClientRect();
    element.classList.add("moving");
    const still = () => element.classList.remove("moving");
    if (before) {
      const start = `translate(${before.left - after.left}px, ${before.top - after.top}px)`;
      element.animate([{ transform: start, opacity: 0.7 }, { transform: "none", opacity: 1 }], MOVE).finished.then(still, still);
    } else {
      element.animate([{ opacity: 0, transform: "translateY(6px)" }, {}], MOVE).finished.then(still, still);
    }
  }

  /** Show how far it is; what belongs to another panel than the one it is seen in waits. */
  show(state = this.state) {
    this.state = state;
    if (!state) return;
    const { step, steps, preview, result, ended } = state;
    const here = state.role === this.role;
    const stepping = here && steps > 0 && !ended;
    if (stepping) {
      this.bar.max = steps;
      this.bar.value = step;
    }
    this.bar.hidden = !stepping;
    write(this.text, ended && here ? ended : stepping ? `step ${step} of ${steps}` : words(this.role));
    const picture = result ?? preview;
    if (picture && this.picture.getAttribute("src") !== picture) this.picture.src = picture;
    this.picture.hidden = !picture;
    if (this.cancel) this.cancel.hidden = Boolean(ended);
    this.element.classList.toggle("working", here && this.role !== null && !ended);
    this.element.classList.toggle("failed", Boolean(state.failed));
  }
}

const words = (role) => ({ null: "waiting", encoder: "encoding", denoiser: "denoising", decoder: "decoding" })[String(role)] ?? "";

export class Triptych {
  constructor() {
    this.cards = new Map();
    this.own = new Set();
  }

  /** Show a request of this tab, from its own events. */
  follow(run) {
    this.own.add(run.id);
    const card = this.card(run.id, run.parameters.prompt || "untitled", () => run.cancel());
    card.element.classList.add("own");
    const update = () => {
      card.go(run.role);
      card.show({ role: run.role, step: run.step, steps: run.steps, preview: run.preview });
    };
    run.addEventListener("change", () => !run.ended && run.role !== null && update());
    run.addEventListener("end", () => {
      const failed = run.status === "failed";
      const picture = run.makes === "images" ? run.outputs[0]?.address : null;
      card.go(run.role);
      card.show({ role: run.role, result: picture, preview: run.preview, failed, ended: run.status === "done" ? "done" : run.status });
      const leave = () => (card.busy ? setTimeout(leave, 50) : setTimeout(() => this.remove(run.id), calm() ? 0 : LINGER));
      leave();
    });
    setTimeout(() => !run.ended && run.role === null && update(), PATIENCE);
  }

  card(id, title, cancel = null) {
    if (!this.cards.has(id)) this.cards.set(id, new Card(id, title, cancel));
    return this.cards.get(id);
  }

  remove(id) {
    this.cards.get(id)?.go(undefined);
    this.cards.delete(id);
    this.refresh();
  }

  /** Show what the server tells of itself: replicas, queue, the requests of others; new ones wait while it is `unsure`
   * whether they are of this tab. */
  status(status, unsure) {
    const current = new Map(status.current.map((each) => [each.id, each]));
    for (const each of current.values()) {
      if (this.own.has(each.id) || (unsure && !this.cards.has(each.id))) continue;
      const card = this.card(each.id, `request ${each.id.slice(4, 10)}`);
      const role = each.status === "running" ? each.progress?.role ?? null : null;
      card.go(role);
      card.show({ role, step: each.progress?.step, steps: each.progress?.steps });
    }
    for (const id of [...this.cards.keys()]) if (!this.own.has(id) && !current.has(id)) this.remove(id);
    for (const [role, panel] of panels) this.showReplicas(role, panel, status);
    const waiting = Object.entries(status.waiting).map(([role, count]) => `${count} for the ${role}`);
    const onTheirWay = status.requests ? `${plural(status.requests, "request")} on the way` : "idle";
    write(find("queue"), waiting.length ? `${onTheirWay} \u00b7 waiting: ${waiting.join(", ")}` : onTheirWay);
    const total = status.replicas.reduce((sum, each) => sum + (each.loaded_bytes ?? 0), 0);
    write(find("totals"), `${plural(status.replicas.length, "replica")} \u00b7 ${bytes(total)} of weights`);
    this.refresh();
  }

  showReplicas(role, panel, status) {
    const mine = status.replicas.filter((each) => each.roles.includes(role));
    const list = panel.querySelector(".replicas");
    const lines = mine.map((each) => {
      const others = each.roles.length > 1 ? ", shared" : "";
      const drains = each.draining ? " \u00b7 draining" : "";
      return [each.name, `${each.device ?? ""} \u00b7 ${bytes(each.loaded_bytes ?? 0)}${others}${drains}`, each.running[role] ?? 0, each.slots[role] ?? 0];
    });
    const known = JSON.stringify(lines);
    if (list.dataset.known !== known) {
      list.dataset.known = known;
      list.replaceChildren(...lines.map(([name, about, running, slots]) => make("li", {},
        make("span", { class: "name" }, name), make("span", { class: "about" }, about),
        make("span", { class: "load", title: `${running} of ${slots} slots in use` }, `${running}/${slots}`, make("span", { class: "hidden" }, " slots in use")))));
      if (!lines.length) list.append(make("li", { class: "none" }, status.ready ? "no replica" : "not ready"));
    }
    panel.classList.toggle("busy", mine.some((each) => each.running[role] > 0));
  }

  refresh() {
    find("waiting").classList.toggle("none", ![...this.cards.values()].some((card) => card.role === null));
  }
}
