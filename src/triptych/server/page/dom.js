// The little that every module needs of the document: elements, and numbers as people read them.

export const find = (id) => document.getElementById(id);

/** An element: its attributes (a function listens, true stands alone, false and null are left out), its children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Set a text only where it changed: screen readers and the renderer are both spared. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let said = 0;

/** Have a screen reader say something. */
export function announce(text) {
  const announcer = find("announcer");
  announcer.textContent = text + (said++ % 2 ? "\u00a0" : "");  // the same words twice would be said once
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

export const seconds = (count) => (count < 10 ? `${count.toFixed(1)} s` : count < 90 ? `${Math.round(count)} s` : `${Math.round(count / 60)} min`);

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
