// Pictures for edits: dropped, pasted or chosen; sent as data URLs.

import { announce, make, plural } from "./dom.js";

export class Pictures {
  constructor(name, label, most, changed) {
    Object.assign(this, { name, most, changed, data: [] });
    const id = `field-${name}`;
    this.input = make("input", { id, name, type: "file", accept: "image/*", multiple: most > 1, "aria-describedby": `${id}-error`, change: () => this.read([...this.input.files]) });
    this.list = make("ul", { class: "thumbs", "aria-label": "Chosen pictures" });
    const hint = most > 1 ? "Drop, paste or choose pictures to edit" : "Drop, paste or choose a picture";
    this.element = make("div", {
      class: "drop",
      dragover: (event) => {
        event.preventDefault();
        this.element.classList.add("over");
      },
      dragleave: () => this.element.classList.remove("over"),
      drop: (event) => {
        event.preventDefault();
        this.element.classList.remove("over");
        this.read([...event.dataTransfer.files]);
      },
    }, this.input, make("label", { for: id }, make("strong", {}, label), ` ${hint}`), this.list, make("p", { class: "error", id: `${id}-error`, hidden: true }));
  }

  value() {
    return this.most === 1 ? this.data[0] : this.data;
  }

  /** Add files; what is no picture is left out. */
  async read(files) {
    const pictures = files.filter((file) => file.type.startsWith("image/"));
    const added = await Promise.all(pictures.map(asDataUrl));
    this.input.value = "";
    if (added.length) this.set(this.most === 1 ? added.slice(-1) : [...this.data, ...added]);
    announce(plural(this.data.length, "picture"));
  }

  set(data) {
    this.data = data.slice(0, this.most);
    this.changed();
    this.list.replaceChildren(...this.data.map((each, index) => make("li", {},
      make("img", { src: each, alt: `Picture ${index + 1}` }),
      make("button", {
        type: "button", "aria-label": `Remove picture ${index + 1}`,
        click: () => {
          this.set(this.data.filter((_, other) => other !== index));
          this.input.focus();
        },
      }, "\u00d7"))));
    this.element.classList.toggle("full", this.data.length > 0);
  }
}

export function asDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });
}
