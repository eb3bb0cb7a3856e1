// The page, put together.

import { get, Problem } from "./api.js";
import { announce, calm, find, plural, seconds, write } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { asDataUrl } from "./pictures.js";
import { Runs } from "./runs.js";
import { Triptych } from "./triptych.js";

const BUSY = 700;  // ms between two looks at the server while something runs
const IDLE = 3000;

const runs = new Runs();
const triptych = new Triptych();
let form = null;
let gallery = null;
let poll = null;

async function look() {
  clearTimeout(poll);
  let pause = IDLE;
  try {
    const status = await get("v1/status");
    triptych.status(status, runs.submitting > 0);
    const model = (status.model ?? "").replace(/\/+$/, "").split("/").pop();
    write(find("model"), model);
    find("model").title = status.family ?? "";
    write(find("version"), status.version ?? "");
    tell(status.ready ? "ready" : status.model === null ? "loading the model" : "not ready", status.ready);
    if (status.model !== null && form === null) await begin();
    if (status.requests || !status.ready) pause = BUSY;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    tell(error.status ? error.message : "the server does not answer", false);
    if (error.status === 401) {  // the key was not given: the button asks again
      find("submit").disabled = false;
      return;
    }
  }
  clearTimeout(poll);
  if (!document.hidden) poll = setTimeout(look, pause);
}

function tell(text, good) {
  write(find("state"), text);
  find("state").classList.toggle("good", good);
}

/** Build the form and the gallery, once the model is known. */
async function begin() {
  const family = await get("v1/parameters");
  if (form !== null) return;
  form = new Form(family);
  const pictures = form.pictures[0];
  gallery = new Gallery({
    again: (run) => submit({ ...run.parameters, seed: run.seed }),
    vary: ({ parameters: { seed, ...others } }) => submit(others),
    reuse: (run) => {
      form.fill({ ...run.parameters, seed: run.seed });
      find("prompt").focus();
    },
    edit: pictures && (async (run, output) => {
      form.fill({ prompt: "" });
      pictures.set([await asDataUrl(output.blob)]);
      find("prompt").focus();
      announce("The picture is in the form: say what to change");
    }),
    forget: (run) => runs.forget(run),
  });
  find("submit").disabled = false;
  await runs.restore();
}

async function submit(parameters) {
  form.complain(null);
  const busy = (is) => find("submit").classList.toggle("busy", is);
  try {
    busy(true);
    await runs.submit(parameters).finally(() => busy(runs.submitting > 0));
    find("stage").scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
    look();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    form.complain(error.wait ? { message: `${error.message} (again in ${seconds(error.wait)})` } : error);
  }
}

runs.addEventListener("run", ({ detail: run }) => {
  triptych.follow(run);
  let told = null;
  run.addEventListener("change", ({ detail: event }) => {
    if (event.kind === "started" && event.role !== told) announce(`In the ${(told = event.role)}`);
    if (event.kind === "retried") announce("A replica was lost: the work is done again");
    const half = event.kind === "step" && event.steps > 3 && event.step === Math.ceil(event.steps / 2);
    if (half) announce(`Step ${event.step} of ${event.steps}`);
  });
  run.addEventListener("end", () => {
    if (run.status === "done") {
      gallery.add(run);
      announce(`Done: ${plural(run.outputs.length, "result")}, seed ${run.seed}`);
    } else if (run.status === "failed") {
      form.complain({ message: run.error ?? "the request failed" });
    }
    runs.remember();
    look();
  });
});

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (form === null) return look();
  try {
    submit(form.values());
  } catch (problem) {
    form.complain(problem);
  }
});

find("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !find("submit").disabled) {
    event.preventDefault();
    find("form").requestSubmit();
  }
});

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length && form?.pictures.length) form.pictures[0].read(files);
});

for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();  // a picture that misses would replace the page
    if (kind === "drop" && !event.target.closest(".drop")) form?.pictures[0]?.read([...event.dataTransfer.files]);
  });
}

document.addEventListener("visibilitychange", () => !document.hidden && look());
if (/Mac|iPhone|iPad/.test(navigator.userAgent)) document.querySelector(".hint kbd").textContent = "\u2318";

look();
