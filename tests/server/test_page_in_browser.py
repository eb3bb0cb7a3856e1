"""The page in a headless Chromium, in front of the real server and the real engine on the embedded model.

Needs Playwright and a Chromium: the one of `playwright install chromium`, one on the path, or `TRIPTYCH_CHROMIUM`.
"""

import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image
from serving import LONG, Caller, engine, served

from triptych.components.dtypes import emulated
from triptych.server.app import create_app
from triptych.server.front import Front
from triptych.server.guard import Access, Guard
from triptych.server.keys import read_keys
from triptych.server.service import Service

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
pytestmark = pytest.mark.browser

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_SEEN = """
window.seen = [];
document.addEventListener("DOMContentLoaded", () => {
  for (const cards of document.querySelectorAll(".cards"))
    new MutationObserver((records) => records.forEach((record) => record.addedNodes.forEach((card) =>
      window.seen.push([cards.closest(".panel").dataset.role, card.querySelector(".title").textContent]))))
      .observe(cards, { childList: true });
});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium."""
    found = os.environ.get("TRIPTYCH_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    with playwright.sync_playwright() as started:
        if found is None and not os.path.exists(started.chromium.executable_path):
            pytest.skip("there is no Chromium: `playwright install chromium`")
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Caller]:
    """A server of this file's own."""
    with served() as caller:
        yield caller


@contextmanager
def opened(browser: Any, url: str, *, ready: bool = True, **options: Any) -> Iterator[Any]:
    """The page in a tab of its own; at the end nothing may have gone wrong in it, and no other host been asked."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith((url, "blob:", "data:")) or wrong.append(request.url))
    page.add_init_script(_SEEN)
    page.goto(url)
    if ready:
        page.wait_for_selector("#submit:enabled")
    yield page
    context.close()
    # A refusal that the page handles is still an error to the console.
    assert [each for each in wrong if "the server responded with a status of 4" not in each] == []


@pytest.fixture
def page(browser: Any, server: Caller) -> Iterator[Any]:
    """The page, ready."""
    with opened(browser, server.url) as page:
        yield page
        server.service.cancel_all()


def fill(page: Any, prompt: str, **fields: int) -> None:
    page.fill("#prompt", prompt)
    for name, value in fields.items():
        page.fill(f"#field-{name}", str(value))


def pixels(page: Any, nth: int) -> list[int]:
    """The pixels of a picture in the gallery."""
    script = """async (image) => {
      await image.decode();
      const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
    }"""
    found: list[int] = page.locator(".gallery img").nth(nth).evaluate(script)
    return found


def test_a_prompt_passes_the_three_panels_and_becomes_a_picture_that_can_be_made_again(page: Any) -> None:
    fill(page, "a red heart", seed=7, num_inference_steps=4)
    page.click("#submit")
    page.wait_for_selector(".gallery li")
    page.wait_for_selector(".card", state="detached")
    assert page.evaluate("seen") == [[role, "a red heart"] for role in ("encoder", "denoiser", "decoder")]
    assert "seed 7" in page.inner_text(".gallery .facts")
    first = pixels(page, 0)
    assert len(first) == 64 * 64 * 4 and first[(32 * 64 + 32) * 4] > 180 > first[(32 * 64 + 32) * 4 + 1]  # red
    page.get_by_role("button", name="Make again with the same seed: a red heart, seed 7").click()
    page.wait_for_selector(".gallery li:nth-child(2)")
    assert pixels(page, 0) == first
    page.get_by_role("button", name="Make again with a new seed").first.click()
    page.wait_for_selector(".gallery li:nth-child(3)")
    assert "seed 7" not in page.inner_text(".gallery .facts >> nth=0")
    assert pixels(page, 0) != first


def test_everything_can_be_done_with_the_keyboard_and_is_told_to_a_screen_reader(page: Any) -> None:
    page.evaluate("""() => {
      window.told = [];
      new MutationObserver(() => told.push(document.getElementById("announcer").textContent.trim()))
        .observe(document.getElementById("announcer"), { childList: true, characterData: true, subtree: true });
    }""")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("a yellow star")
    page.evaluate("document.getElementById('field-num_inference_steps').value = '4'")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".gallery li")
    told = page.evaluate("told")
    assert [f"In the {role}" in told for role in ("encoder", "denoiser", "decoder")] == [True] * 3
    assert re.fullmatch(r"Done: 1 result, seed \d+", told[-1])
    page.focus(".gallery .open")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("#viewer[open] img")
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer[open]", state="detached")
    for _ in range(12):  # to the last of the tools
        page.keyboard.press("Tab")
        if (page.evaluate("document.activeElement.ariaLabel") or "").startswith("Remove"):
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#empty", state="visible")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_every_control_has_a_name(page: Any) -> None:
    fill(page, "a red heart", num_inference_steps=1)
    page.click("#submit")
    page.wait_for_selector(".gallery li")
    page.set_input_files("#field-image", {"name": "a.png", "mimeType": "image/png", "buffer": png("red")})
    page.wait_for_selector(".thumbs img")
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, a, input, textarea, summary, img, progress")]
      .filter((each) => !(each.ariaLabel || each.textContent.trim() || each.labels?.length || each.hasAttribute("alt")))
      .map((each) => each.outerHTML)""")
    assert nameless == []
    snapshot = page.locator("body").aria_snapshot()
    for line in ("banner", "main", "contentinfo", 'form "New request"', 'region "Encoder"', 'region "Gallery"'):
        assert f"- {line}" in snapshot


def test_what_is_wrong_is_told_at_its_field(page: Any) -> None:
    fill(page, "a red heart", width=63)
    page.click("#submit")
    page.wait_for_selector("#field-width-error", state="visible")
    assert "a multiple of 8 is accepted" in page.inner_text("#field-width-error")
    assert page.evaluate("document.activeElement.id") == "field-width"
    assert page.get_attribute("#field-width", "aria-invalid") == "true"
    page.fill("#field-width", "")
    page.fill("#field-num_inference_steps", "many")
    page.click("#submit")
    page.wait_for_selector("#field-num_inference_steps-error", state="visible")
    assert page.is_hidden("#field-width-error") and page.get_attribute("#field-width", "aria-invalid") is None
    page.click("button[type=reset]")
    assert page.input_value("#prompt") == "" and page.locator(".error:visible").count() == 0


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def test_pictures_are_dropped_sent_and_taken_back(page: Any) -> None:
    transfer = page.evaluate_handle(
        """(bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
          transfer.items.add(new File(["no picture"], "a.txt", { type: "text/plain" }));
          return transfer;
        }""",
        list(png("blue")),
    )
    page.dispatch_event(".drop", "drop", {"dataTransfer": transfer})
    page.wait_for_selector(".thumbs img")
    page.set_input_files("#field-image", {"name": "b.png", "mimeType": "image/png", "buffer": png("red")})
    page.wait_for_selector(".thumbs li:nth-child(2)")
    page.get_by_role("button", name="Remove picture 2").click()
    assert page.locator(".thumbs img").count() == 1
    fill(page, "make it red", num_inference_steps=1)
    with page.expect_request(lambda request: request.method == "POST") as sent:
        page.click("#submit")
    assert sent.value.post_data_json["parameters"]["image"][0].startswith("data:image/png;base64,")
    page.wait_for_selector(".gallery li")
    page.get_by_role("button", name="Edit this picture").click()
    page.wait_for_selector(".thumbs img")
    assert page.input_value("#prompt") == ""


def test_what_was_made_is_there_after_a_reload_and_can_be_put_into_the_form(page: Any) -> None:
    fill(page, "a green frog", seed=11, num_inference_steps=2)
    page.click("#submit")
    page.wait_for_selector(".gallery li")
    fill(page, "a red heart", num_inference_steps=1, num_images_per_prompt=2)
    page.click("#submit")
    page.wait_for_selector(".gallery li:nth-child(3)")
    before = [pixels(page, nth) for nth in range(3)]
    page.reload()
    page.wait_for_selector(".gallery li:nth-child(3)")
    assert [pixels(page, nth) for nth in range(3)] == before
    assert page.locator(".gallery .title").all_inner_texts() == ["a red heart", "a red heart", "a green frog"]
    assert page.input_value("#prompt") == ""
    page.get_by_role("button", name="Put into the form: a green frog, seed 11").click()
    values = [page.input_value(f"#{name}") for name in ("prompt", "field-seed", "field-num_inference_steps")]
    assert values == ["a green frog", "11", "2"]


def test_a_request_that_is_cancelled_leaves_the_panels(page: Any, server: Caller) -> None:
    fill(page, "a red heart", num_inference_steps=900)
    page.click("#submit")
    page.wait_for_selector(".denoiser .card progress:not([hidden])")
    assert re.fullmatch(r"step \d+ of 900", page.inner_text(".denoiser .card .step"))
    page.get_by_role("button", name="Cancel: a red heart").click()
    page.wait_for_selector(".card", state="detached")
    assert page.locator(".gallery li").count() == 0
    assert server.service.records.unfinished() == []


def test_the_requests_of_others_are_seen_on_their_way(page: Any, server: Caller) -> None:
    request = server.submit(LONG)
    page.wait_for_selector(".denoiser .card progress:not([hidden])")
    assert page.inner_text(".denoiser .card .title") == f"request {request['id'][4:10]}"
    assert page.locator(".card .cancel").count() == 0
    assert "1 request on the way" in page.inner_text("#queue")
    assert re.search(r"1\s*/\s*\d+", page.inner_text(".denoiser .load"))
    size = "47.3 MB" if "float16" in emulated() else "23.6 MB"
    assert size in page.inner_text(".denoiser .replicas") and size in page.inner_text("#totals")
    server.post(request["links"]["cancel"])
    page.wait_for_selector(".card", state="detached")


def test_requests_that_have_to_wait_are_seen_waiting(page: Any, server: Caller) -> None:
    router = engine().router
    replica = router.replicas[0]
    slots, replica.slots = replica.slots, dict.fromkeys(replica.slots, 0)
    try:
        fill(page, "a red heart", num_inference_steps=1)
        page.click("#submit")
        page.wait_for_selector("#waiting .card")
        assert page.inner_text("#waiting .card .step") == "waiting"
        page.wait_for_selector("#queue:has-text('1 for the encoder')")
    finally:
        replica.slots = slots
    other = server.submit({"prompt": "a", "num_inference_steps": 1})  # has the router look again
    server.wait(other)
    page.wait_for_selector(".gallery li")
    assert page.locator("#waiting .card").count() == 0


def test_more_requests_than_a_browser_has_connections_all_end(page: Any) -> None:
    for number in range(8):
        fill(page, f"a red heart {number}", num_inference_steps=2)
        page.click("#submit")
    page.wait_for_selector(".gallery li:nth-child(8)")
    page.wait_for_selector(".card", state="detached")
    roles = page.evaluate("seen")
    for number in range(8):
        mine = [role for role, title in roles if title == f"a red heart {number}"]
        assert mine == ["encoder", "denoiser", "decoder"]


@pytest.mark.parametrize("width", [320, 390, 768, 1920])
def test_nothing_is_cut_off_at_any_width(browser: Any, server: Caller, width: int) -> None:
    with opened(browser, server.url, viewport={"width": width, "height": 800}) as page:
        page.click("summary")
        fill(page, "a red heart with a very long prompt " * 4, num_inference_steps=1)
        page.click("#submit")
        page.wait_for_selector(".gallery li")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        small = page.evaluate("""() => [...document.querySelectorAll("button, input:not(.drop input), summary")]
          .map((each) => [each.outerHTML, each.getBoundingClientRect()])
          .filter(([, box]) => box.width && (box.width < 24 && box.height < 24)).map(([html]) => html)""")
        assert [each for each in small if "checkbox" not in each] == []  # WCAG 2.2, 2.5.8; a checkbox has its label


def test_nothing_moves_for_those_who_ask_for_calm(browser: Any, server: Caller) -> None:
    with opened(browser, server.url, reduced_motion="reduce", color_scheme="dark") as page:
        page.evaluate("() => void (Element.prototype.animate = () => { throw new Error('moved') })")
        fill(page, "a red heart", num_inference_steps=4)
        page.click("#submit")
        page.wait_for_selector(".card")
        assert page.evaluate("document.getAnimations().length") == 0
        page.wait_for_selector(".gallery li")
        assert page.evaluate("document.getAnimations().length") == 0
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 17, 22)"


def test_a_key_is_asked_for_once_and_kept_in_the_tab(browser: Any) -> None:
    key = "a-key-of-enough-characters"
    service = Service(engine=engine())
    guarded: Any = Guard(create_app(service), Access(read_keys(key)))
    with Front(guarded, "127.0.0.1", 0) as front, opened(browser, front.url, ready=False) as page:
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#key-dialog[open]", state="detached")
        page.click("#submit")  # asks again
        page.wait_for_selector("#key-dialog[open]")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("a-key-that-is-wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-about:has-text('not one of')")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#submit:enabled")
        assert page.locator("#key-dialog[open]").count() == 0
        fill(page, "a red heart", num_inference_steps=1)
        page.click("#submit")
        page.wait_for_selector(".gallery li")
        page.reload()
        page.wait_for_selector(".gallery li")
        assert page.locator("#key-dialog[open]").count() == 0
        assert page.evaluate("Object.values(localStorage).length") == 0
    service.records.spool.close()


def test_events_are_read_however_the_network_cuts_them(page: Any) -> None:
    text = 'retry: 1000\n\n: still here\n\nid: 4\nevent: step\ndata: {"step": 1, "stage": "d\u00e9: nois"}\n\nid: 5\nevent: done\ndata: {}\n\nid: 6\nevent: half'
    read = page.evaluate(
        """async ([text, size]) => {
          const { parse } = await import(document.querySelector("script").src.replace("main.js", "api.js"));
          const bytes = new TextEncoder().encode(text), found = [];
          for (const size of [1, 2, 7, bytes.length]) {
            const stream = new ReadableStream({ start(controller) {
              for (let k = 0; k < bytes.length; k += size) controller.enqueue(bytes.slice(k, k + size));
              controller.close();
            } });
            const events = [];
            for await (const event of parse(stream)) events.push(event);
            found.push(events);
          }
          return found;
        }""",
        [text, 1],
    )
    expected = [{"step": 1, "stage": "d\u00e9: nois", "id": "4", "kind": "step"}, {"id": "5", "kind": "done"}]
    assert read == [expected] * 4


def test_a_preview_is_shown_where_a_request_has_one(page: Any) -> None:
    preview = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
    lines = [
        ("started", '{"role": "denoiser", "replica": "d"}'),
        ("step", '{"role": "denoiser", "step": 1, "steps": 4}'),
        ("preview", f'{{"step": 1, "steps": 4, "png": "{preview}"}}'),
    ]
    body = "".join(f"id: {k}\nevent: {kind}\ndata: {data}\n\n" for k, (kind, data) in enumerate(lines))
    page.route("**/events", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    fill(page, "a red heart", num_inference_steps=1)
    page.click("#submit")
    page.wait_for_selector(f'.denoiser .card img[src="data:image/png;base64,{preview}"]')
    page.unroute("**/events")
