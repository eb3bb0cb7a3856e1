// The gallery: what this tab has made, the last asked for first, each with its seed and one click to make it again.

import { announce, find, make, plural, seconds, write } from "./dom.js";

export class Gallery {
  /** `actions` are again(run), vary(run), reuse(run), edit(run, output) or null, forget(run). */
  constructor(actions) {
    this.actions = actions;
    this.count = 0;
  }

  add(run) {
    run.outputs.forEach((output, index) => this.addOutput(run, output, index));
  }

  addOutput(run, output, index) {
    const { again, vary, reuse, edit, forget } = this.actions;
    const prompt = run.parameters.prompt || "untitled";
    const told = `${prompt}, seed ${run.seed}${run.outputs.length > 1 ? `, ${index + 1} of ${run.outputs.length}` : ""}`;
    const button = (text, action, label, kind = "quiet") => make("button", { type: "button", class: kind, "aria-label": `${label}: ${told}`, title: label, click: action }, text);
    const item = make("li", { "data-run": run.id, "data-created": run.created });
    const suffix = output.blob.type.split("/")[1].replace("jpeg", "jpg");
    item.append(make("figure", {},
      make("button", { type: "button", class: "open", "aria-label": `Open: ${told}`, click: () => this.open(output, told) }, media(output, told, true)),
      make("figcaption", {},
        make("p", { class: "title", title: prompt }, prompt),
        make("p", { class: "facts" }, `seed ${run.seed}`, run.seconds ? ` \u00b7 ${seconds(run.seconds)}` : null),
        make("div", { class: "tools" },
          button("Re-run", () => again(run), "Make again with the same seed", "again"),
          button("New seed", () => vary(run), "Make again with a new seed"),
          button("Use", () => reuse(run), "Put into the form"),
          edit && run.makes === "images" ? button("Edit", () => edit(run, output), "Edit this picture") : null,
          make("a", { href: output.address, download: `${run.id}-${index}.${suffix}`, "aria-label": `Save: ${told}` }, "Save"),
          button("Remove", () => {
            const next = item.nextElementSibling ?? item.previousElementSibling;
            for (const each of find("gallery").querySelectorAll(`[data-run="${run.id}"]`)) each.remove();
            this.count -= run.outputs.length;
            forget(run);
            this.tell();
            (next?.isConnected ? next.querySelector("button") : find("prompt")).focus();
            announce("removed");
          }, "Remove from the gallery")))));
    const older = [...find("gallery").children].find((each) => Number(each.dataset.created) < run.created);
    find("gallery").insertBefore(item, older ?? null);
    this.count += 1;
    this.tell();
  }

  tell() {
    find("empty").hidden = this.count > 0;
    write(find("count"), this.count ? plural(this.count, "result") : "");
  }

  open(output, told) {
    find("viewer-content").replaceChildren(media(output, told, false), make("p", {}, told));
    find("viewer").showModal();
  }
}

function media({ address, blob }, told, small) {
  if (!blob.type.startsWith("video/")) return make("img", { src: address, alt: told, decoding: "async" });
  const video = make("video", { src: address, "aria-label": told, playsinline: true, loop: true, controls: !small, preload: "auto" });
  video.muted = small;
  return video;
}
