"""The page as files: what is sent, with which headers, and that its parts fit together."""

import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from serving import Caller

from triptych.server.page import FOLDER, HEADERS
from triptych.server.parameters import kind_of

SOURCES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
MODULES = {name: text for name, text in SOURCES.items() if name.endswith(".js")}
VOID = frozenset(("br", "hr", "img", "input", "link", "meta"))


class Document(HTMLParser):
    """Elements of a document, and what is wrong with how they are nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.wrong: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.wrong += [f"<{tag}> is never closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len(dict(attrs)) != len(attrs):
            self.wrong.append(f"<{tag}> has an attribute twice")
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing, in line {self.getpos()[0]}")

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


INDEX = Document(SOURCES["index.html"])


def test_the_page_is_sent_with_headers_that_let_it_load_nothing_from_elsewhere(caller: Caller) -> None:
    response = caller.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(each.split(" ", 1) for each in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in str(policy) and "http" not in str(policy)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    assert caller.head("/").status_code == 200


def test_every_file_is_kept_by_browsers_for_ever_under_a_path_that_changes_with_it(caller: Caller) -> None:
    index = caller.get("/").text
    paths = set(re.findall(r'(?:href|src)="(page/[^"]+)"', index))
    assert {path.rpartition("/")[2] for path in paths} == set(SOURCES) - {"index.html"}
    assert len({path.rpartition("/")[0] for path in paths}) == 1 and "DIGEST" not in index
    media_types = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    for path in paths:
        response = caller.get(f"/{path}")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(media_types[path.rpartition(".")[2]])
        assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert {name: response.headers[name] for name in HEADERS} == HEADERS
        assert response.text == SOURCES[path.rpartition("/")[2]]
    assert caller.get("/page/0123456789abcdef/main.js").headers["cache-control"] == "no-cache"


def test_a_file_that_a_browser_has_is_not_sent_again(caller: Caller) -> None:
    response = caller.get("/")
    known = {"If-None-Match": f'"other", W/{response.headers["etag"]}'}
    again = caller.get("/", headers=known)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", response.headers["etag"])
    assert caller.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_files_are_packed_for_browsers_that_take_them_so(caller: Caller) -> None:
    packed = caller.get("/", headers={"Accept-Encoding": "gzip"})
    plain = caller.get("/", headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
    assert packed.text == plain.text
    assert packed.headers["vary"] == "Accept-Encoding"
    whole = sum(len(gzip.compress(text.encode())) for text in SOURCES.values())
    assert whole < 24_000  # bytes, the page and all that it needs


@pytest.mark.parametrize("path", ["nothing.js", "index.html", "..%2fpage.py", "%2e%2e/page.py"])
def test_nothing_but_the_files_of_the_page_is_sent(caller: Caller, path: str) -> None:
    response = caller.get(f"/page/x/{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_the_document_is_well_formed_and_its_references_lead_somewhere() -> None:
    assert SOURCES["index.html"].startswith("<!doctype html>\n<html lang=")
    assert INDEX.wrong == []
    ids = INDEX.ids()
    assert len(ids) == len(set(ids))
    references = [
        (name, target)
        for _, attributes in INDEX.elements
        for name in ("for", "aria-labelledby", "aria-describedby", "aria-controls")
        for target in attributes.get(name, "").split()
    ]
    assert references and [each for each in references if each[1] not in ids] == []
    anchors = [attributes["href"][1:] for _, attributes in INDEX.elements if attributes.get("href", "").startswith("#")]
    assert anchors and set(anchors) <= set(ids)


def test_every_field_has_a_label_and_every_region_a_name() -> None:
    labelled = {attributes["for"] for tag, attributes in INDEX.elements if tag == "label"}
    fields = [attributes for tag, attributes in INDEX.elements if tag in ("input", "textarea", "select")]
    assert fields and all(each["id"] in labelled for each in fields)
    for tag, attributes in INDEX.elements:
        if tag in ("section", "dialog", "ol", "form") and attributes.get("method") != "dialog":
            assert attributes.keys() & {"aria-label", "aria-labelledby"}, (tag, attributes)
    tags = [tag for tag, _ in INDEX.elements]
    assert [tags.count(tag) for tag in ("header", "main", "footer", "h1")] == [1, 1, 1, 1]
    headings = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(headings))


def test_nothing_is_inline_and_no_other_host_is_named() -> None:
    for tag, attributes in INDEX.elements:
        assert tag != "style" and "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "script" or attributes["src"]
    for name, text in SOURCES.items():
        told = re.sub(r'^\s*(//|/\*).*$|xmlns="[^"]*"', "", text, flags=re.MULTILINE)
        assert not re.search(r"https?://|@import|\burl\(|innerHTML|\beval\b|insertAdjacentHTML", told), name


def test_every_import_names_what_its_module_exports() -> None:
    exports = {
        name: set(re.findall(r"^export (?:async )?(?:function\*?|class|const) (\w+)", text, flags=re.MULTILINE))
        for name, text in MODULES.items()
    }
    imports = [
        (name, source, word.strip())
        for name, text in MODULES.items()
        for words, source in re.findall(r'^import \{([^}]*)\} from "\./([^"]+)";', text, flags=re.MULTILINE)
        for word in words.split(",")
    ]
    assert len(imports) > 15
    for name, source, word in imports:
        assert word in exports[source], f"{name} imports {word} from {source}"
        assert len(re.findall(rf"\b{word}\b", MODULES[name])) > 1, f"{name} imports {word} for nothing"
    assert sum(text.count("\nimport ") + text.startswith("import ") for text in MODULES.values()) == len(
        {(name, source) for name, source, _ in imports}
    )


def test_every_element_that_a_module_looks_for_is_there() -> None:
    looked_for = {
        word for text in MODULES.values() for word in re.findall(r'(?:find|getElementById)\("([^"]+)"\)', text)
    }
    assert len(looked_for) > 15
    assert looked_for <= set(INDEX.ids())


BROWSER = """
const store = new Map(), end = { status: "done", outputs: 1, seconds: 2 };
globalThis.sessionStorage = {
  getItem: (key) => store.get(key) ?? null,
  setItem: (key, value) => {
    if (value.length > room) throw new DOMException("full", "QuotaExceededError");
    store.set(key, value);
  },
  removeItem: (key) => store.delete(key),
};
globalThis.room = Infinity;
URL.createObjectURL = () => "blob:";
const answers = { "req_2": 503, "req_3": 404 };
globalThis.fetch = async (path, options) => {
  const [, , name, what] = path.split("/");
  if (options.method === "POST") return Response.json({ id: `req_${posted += 1}`, seed: 1, makes: "images" });
  if (answers[name]) return Response.json({ error: { message: "no" } }, { status: answers[name] });
  return what === "events" ? new Response(null, { status: 204 }) : what ? new Response("png") : Response.json(end);
};
let posted = 5;
const remembered = () => JSON.parse(store.get("triptych.runs")).map((each) => each.id);
const entry = (id) => ({ id, seed: 1, makes: "images", created: 1, parameters: { prompt: "a fox" } });
const { Runs } = await import("./runs.js");
store.set("triptych.runs", JSON.stringify([1, 2, 3, 4].map((number) => entry(`req_${number}`))));
const runs = new Runs(), told = {};
await runs.restore();
told.restored = [...runs.all.keys()];
told.remembered = remembered();
const run = await runs.submit({ prompt: "a fox" });
if (!run.ended) await new Promise((resolve) => run.addEventListener("end", resolve));
told.ended = [run.status, run.seconds, run.outputs.length];
room = store.get("triptych.runs").length;
told.submitted = (await runs.submit({ prompt: "a fox" })).id;
told.kept = remembered();
room = 0;
told.beyond = (await runs.submit({ prompt: "a fox" })).id;
console.log(JSON.stringify(told));
"""


@pytest.fixture(scope="module")
def told_of_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the module of the tab's requests does where answers are missing and the tab's store is full."""
    if (node := shutil.which("node")) is None:
        pytest.skip("Node.js is not installed")
    folder = tmp_path_factory.mktemp("page")
    for name, text in {**MODULES, "package.json": '{"type": "module"}', "browser.js": BROWSER}.items():
        (folder / name).write_text(text, encoding="utf-8")
    run = subprocess.run([node, "browser.js"], check=False, cwd=folder, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    told: dict[str, Any] = json.loads(run.stdout)
    return told


def test_a_request_that_cannot_be_asked_for_is_remembered_and_the_others_come_back(
    told_of_runs: dict[str, Any],
) -> None:
    assert told_of_runs["restored"] == ["req_1", "req_4"]
    assert told_of_runs["remembered"] == ["req_2", "req_1", "req_4"]


def test_an_end_of_which_no_event_tells_is_asked_for(told_of_runs: dict[str, Any]) -> None:
    assert told_of_runs["ended"] == ["done", 2, 1]


def test_a_request_that_there_is_no_room_to_remember_is_followed_and_the_oldest_are_forgotten(
    told_of_runs: dict[str, Any],
) -> None:
    assert told_of_runs["submitted"] == "req_7"
    assert told_of_runs["kept"] == ["req_6", "req_7"]
    assert told_of_runs["beyond"] == "req_8"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(scheme: str) -> None:
    """By WCAG 2.2, 1.4.3 and 1.4.11: https://www.w3.org/TR/WCAG22/#contrast-minimum"""
    light, dark = re.findall(r":root \{(.*?)\}", SOURCES["style.css"], flags=re.DOTALL)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", dark))

    def luminance(name: str) -> float:
        parts = [int(colours[name][k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for behind in ("paper", "panel", "raised"):
        for text in ("ink", "soft", "bad"):
            assert contrast(text, behind) >= 4.5, (text, behind)
    for text in ("encoder", "denoiser", "decoder"):
        assert contrast(text, "panel") >= 3.9, text  # headings
    assert contrast("on-accent", "denoiser") >= 4.5
    assert contrast("field", "panel") >= 3


def test_the_wheel_has_every_file_of_the_page() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    builder = wheel.WheelBuilder(str(Path(__file__).parents[2]))
    packed = {each.distribution_path for each in builder.recurse_included_files()}
    assert {f"triptych/server/page/{name}" for name in SOURCES} <= packed


def test_the_parameters_tell_a_form_its_fields_and_their_defaults(caller: Caller) -> None:
    told = caller.get("/v1/parameters").json()
    assert told["family"] == "Flux2KleinPipeline" and told["makes"] == "images" and told["images"] == 16
    assert list(told["tasks"]) == ["text-to-image", "edit"]
    kinds = {each["name"]: (each["kind"], each["default"]) for each in told["parameters"]}
    assert kinds == {
        "image": ("images", None),
        "prompt": ("text", None),
        "height": ("integer", 64),
        "width": ("integer", 64),
        "num_inference_steps": ("integer", 16),
        "sigmas": ("list", None),
        "guidance_scale": ("number", 3.0),
        "num_images_per_prompt": ("integer", 1),
        "max_sequence_length": ("integer", 16),
        "lora": ("loras", None),
        "seed": ("integer", None),
        "exact": ("flag", False),
    }
    assert (
        caller.post(
            "/v1/requests",
            json={"parameters": {name: None for name in kinds} | {"prompt": "a", "num_inference_steps": 1}},
        ).status_code
        == 202
    )


def test_parameters_are_told_only_once_the_model_is_loaded() -> None:
    from fastapi.testclient import TestClient

    from triptych.server.app import create_app
    from triptych.server.service import Service

    service = Service()
    with TestClient(create_app(service)) as client:
        assert client.get("/").status_code == 200
        refusal = client.get("/v1/parameters")
        assert (refusal.status_code, refusal.json()["error"]["message"]) == (503, "the model is being loaded")
    service.records.spool.close()


@pytest.mark.parametrize(
    ("name", "default", "annotation", "kind"),
    [
        ("prompt", None, str | list[str], "text"),
        ("seed", None, None, "integer"),
        ("true_cfg_scale", 4.0, float | None, "number"),
        ("decode_timestep", 0.0, float | list[float], "number"),
        ("use_zero_init", True, bool | None, "flag"),
        ("sigmas", None, list[float] | None, "list"),
        ("crops_coords_top_left", (0, 0), tuple[int, int], "list"),
        ("image", None, Any, "image"),
        ("lora", None, None, "loras"),
        ("adain_factor", 0.0, None, "number"),
        ("nothing_known", None, None, None),
    ],
)
def test_a_parameter_s_kind_follows_from_its_annotation_or_its_default(
    name: str, default: Any, annotation: Any, kind: str | None
) -> None:
    assert kind_of(name, default, {} if annotation is None else {name: annotation}) == kind
