// The form: a field for every parameter of the loaded model's family.

import { find, make } from "./dom.js";
import { Pictures } from "./pictures.js";

const NAMES = {
  width: "Width", height: "Height", num_inference_steps: "Steps", guidance_scale: "Guidance",
  true_cfg_scale: "Guidance (CFG)", num_frames: "Frames", frame_rate: "Frame rate",
  num_images_per_prompt: "Pictures", num_videos_per_prompt: "Videos", seed: "Seed",
  negative_prompt: "Without", image: "Picture", last_image: "Last frame", lora: "LoRAs",
};
const FIRST = [
  "width", "height", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale",
  "num_images_per_prompt", "num_videos_per_prompt", "seed",
];

export class Form {
  constructor(family) {
    this.family = family;
    this.element = find("form");
    this.pictures = [];
    const rank = ({ name }) => (FIRST.indexOf(name) + 1 || FIRST.length + 1);
    for (const parameter of [...family.parameters].sort((a, b) => rank(a) - rank(b))) this.addField(parameter);
    find("more").hidden = !find("more-fields").children.length;
    this.element.addEventListener("reset", () => {
      this.clear();
      for (const each of this.pictures) each.set([]);
    });
  }

  addField(parameter) {
    const { name, kind, default: value } = parameter;
    if (name === "prompt") return;
    if (kind === "image" || kind === "images") {
      const most = kind === "image" ? 1 : this.family.images;
      const pictures = new Pictures(name, NAMES[name] ?? name, most, () => this.complain(null));
      this.pictures.push(pictures);
      find("pictures").append(pictures.element);
      return;
    }
    const id = `field-${name}`;
    const label = make("label", { for: id, title: name }, NAMES[name] ?? name.replaceAll("_", " "));
    const error = make("p", { class: "error", id: `${id}-error`, hidden: true });
    const told = value === null ? (name === "seed" ? "random" : "auto") : Array.isArray(value) ? value.join(", ") : String(value);
    const shared = { id, name, "data-kind": kind, "aria-describedby": error.id };
    const input = {
      flag: () => make("input", { ...shared, type: "checkbox", checked: value === true }),
      text: () => make("textarea", { ...shared, rows: 1, placeholder: value ?? "" }),
      loras: () => make("input", { ...shared, placeholder: "style.safetensors:0.8, ...", autocomplete: "off" }),
      list: () => make("input", { ...shared, placeholder: told, autocomplete: "off" }),
      integer: () => make("input", { ...shared, inputmode: "numeric", placeholder: told, autocomplete: "off" }),
      number: () => make("input", { ...shared, inputmode: "decimal", placeholder: told, autocomplete: "off" }),
    }[kind]();
    input.dataset.default = JSON.stringify(value);
    const field = make("div", { class: `field ${kind}` }, ...(kind === "flag" ? [input, label] : [label, input]), error);
    find(FIRST.includes(name) ? "main-fields" : "more-fields").append(field);
  }

  inputs() {
    return [...this.element.querySelectorAll("[data-kind]")];
  }

  /** What was filled in, as parameters; throws a {field, message} for what is no number. */
  values() {
    const values = {};
    for (const input of this.inputs()) {
      const value = valueOf(input);
      if (value !== undefined) values[input.name] = value;
    }
    for (const each of this.pictures) if (each.data.length) values[each.name] = each.value();
    return values;
  }

  /** Put parameters back into the form. */
  fill(parameters) {
    this.element.reset();
    for (const input of this.inputs()) {
      const value = parameters[input.name];
      if (value == null) continue;
      if (input.type === "checkbox") input.checked = value;
      else if (input.dataset.kind === "loras") input.value = value.map(({ path, scale }) => `${path}:${scale ?? 1}`).join(", ");
      else input.value = Array.isArray(value) ? value.join(", ") : value;
    }
    for (const each of this.pictures) each.set([parameters[each.name] ?? []].flat());
    if (this.inputs().some((input) => input.value && find("more").contains(input) && input.type !== "checkbox")) find("more").open = true;
  }

  clear() {
    for (const error of this.element.querySelectorAll(".error")) error.hidden = true;
    for (const input of this.element.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  }

  /** Show what was wrong, at its field where it has one; null for nothing. */
  complain(problem) {
    this.clear();
    if (!problem) return;
    const input = problem.field ? this.element.elements.namedItem(problem.field) : null;
    const error = input && find(input.getAttribute("aria-describedby"));
    const place = error || find("form-error");
    place.textContent = problem.message;
    place.hidden = false;
    if (error) {
      if (find("more").contains(input)) find("more").open = true;
      input.setAttribute("aria-invalid", "true");
      input.focus();
    }
  }
}

function valueOf(input) {
  const { kind, default: fallback } = input.dataset;
  if (kind === "flag") return input.checked === (JSON.parse(fallback) === true) ? undefined : input.checked;
  const text = input.value.trim();
  if (text === "") return undefined;
  if (kind === "text") return input.value;
  if (kind === "loras") return text.split(",").map((each) => each.trim()).filter(Boolean).map(loraOf);
  const numbers = (kind === "list" ? text.split(/[\s,]+/).filter(Boolean) : [text]).map(Number);
  if (numbers.some(Number.isNaN)) throw { field: input.name, message: `${text}: a number is accepted` };
  if (kind === "integer" && !Number.isSafeInteger(numbers[0])) throw { field: input.name, message: `${text}: a whole number is accepted` };
  return kind === "list" ? numbers : numbers[0];
}

/** The LoRA that `path` or `path:scale` names. */
function loraOf(text) {
  const [, path, scale] = text.match(/^(.*?)(?::([-+]?[0-9.]+))?$/s);
  return { path, scale: scale === undefined ? 1 : Number(scale) };
}
