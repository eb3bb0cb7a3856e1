"""`triptych generate --server`: a running service makes the same files."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from rich.console import Console
from serving import QUICK, Caller, engine, idle, settled

import triptych
from triptych import embedded
from triptych.cli import client, run
from triptych.cli.arguments import Asked
from triptych.cli.client import Client
from triptych.cli.remote import generate_remotely


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_with_exact_the_files_are_those_made_locally(caller: Caller, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["a red heart", "--seed", "7", "--steps", "2", "--num-images", "2", "--guidance", "2.5", "--exact"]
    asked += ["--param", "sigmas=[1.0, 0.4]"]
    assert run(["generate", "--server", caller.url, *asked, "-o", "remote.png"]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["remote-0.png", "remote-1.png"]
    for row in ("Asking http", "2/2", "text_encoding", "flux2_denoising", "decoding", "fetching", "seed"):
        assert row in captured.err
    local = triptych.load(embedded.path(), device="cpu").generate(
        prompt="a red heart", seed=7, num_inference_steps=2, num_images_per_prompt=2, guidance_scale=2.5,
        sigmas=[1.0, 0.4],
    )  # fmt: skip
    local.save("local.png")
    for k in range(2):
        assert Path(f"remote-{k}.png").read_bytes() == Path(f"local-{k}.png").read_bytes()


def test_without_output_the_file_is_named_as_it_would_be_locally(
    caller: Caller, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a-fox-7.png").write_bytes(b"another run's")
    assert run(["generate", "--server", caller.url, "A fox!", "--seed", "7", "--steps", "1", "-q"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a-fox-7_2.png\n", "")
    with Image.open("a-fox-7_2.png") as image:
        assert image.size == (64, 64)


def test_pictures_travel_with_the_request(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    submit = engine().submit
    monkeypatch.setattr(engine(), "submit", lambda request, **more: seen.append(request) or submit(request, **more))
    picture = Image.linear_gradient("L").resize((64, 72)).convert("RGB")
    picture.save("picture.png")
    arguments = ["--image", "picture.png", "--image", "picture.png", "--steps", "1", "-o", "edit.webp", "-q"]
    assert run(["generate", "--server", caller.url, "a fox", *arguments]) == 0
    assert [each.tobytes() for each in seen[0].parameters["image"]] == [picture.tobytes()] * 2
    assert Path("edit.webp").read_bytes()[8:12] == b"WEBP"


def test_a_service_that_counts_videos_is_asked_for_videos(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def submit(_: Client, parameters: dict[str, Any]) -> dict[str, Any]:
        seen.append(parameters)
        known = ["num_videos_per_prompt", "prompt"]
        for name in parameters:
            if name not in known:
                raise triptych.errors.UnknownParameterError(name, "the service's model", known)
        raise triptych.errors.ParameterError("num_videos_per_prompt", parameters["num_videos_per_prompt"], "too many")

    monkeypatch.setattr(Client, "submit", submit)
    with pytest.raises(triptych.errors.UsageError, match="--num-images 3: too many"):
        generate_remotely(caller.url, asked_for(prompt="a fox", num_images_per_prompt=3), None, Console(quiet=True))
    assert [set(each) for each in seen] == [
        {"prompt", "num_images_per_prompt"},
        {"prompt", "num_videos_per_prompt"},
    ]


def asked_for(**values: Any) -> Asked:
    asked = Asked()
    for name, value in values.items():
        asked.add(name, value)
    return asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a fox", "--height", "17"], "--height 17: a multiple of 8 is accepted"),
        (["a fox", "--true-cfg", "4"], "--true-cfg: the service's model has no parameter 'true_cfg_scale'"),
        (
            ["a fox", "--param", "heigth=16"],
            "--param heigth: the service's model has no parameter 'heigth'; did you mean",
        ),
        (["a fox", "--param", "output_type=latent"], "--param output_type 'latent': one of pil, np, pt is accepted"),
        (["a fox", "--num-images", "0"], "--num-images 0: a whole number of at least 1"),
        (["a fox", "--guidance", "nan"], "--guidance nan: finite numbers are accepted"),
        (["a fox", "--param", "sigmas=[Infinity]"], "--param sigmas [inf]: finite numbers are accepted"),
        (["half \udcf0 of a character"], "valid Unicode text is accepted"),
        (["a fox", "-o", f"{'x' * 300}.png"], "a name of 304 bytes is too long"),
        (["a fox", "-o", "fox.mp4"], "fox.mp4: images cannot be saved"),
        (["a fox", "-o", "no/fox.png"], "no/fox.png: there is no folder 'no'"),
        (["a fox", "--device", "cpu"], "--server: --device is the service's to choose"),
        (["a fox", "--split"], "--server: --split is the service's to choose"),
        (["a fox", "--dtype", "float32"], "--server: --dtype is the service's to choose"),
        (["some/model", "a fox"], "--server: only the prompt is accepted"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_as_it_would_be_locally(
    caller: Caller, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(["generate", "--server", caller.url, *options]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if not line.startswith("Asking ")]
    assert line.startswith("error: ") and message in line
    assert captured.out == ""
    assert os.listdir() == []
    assert idle()  # a request that was taken on before its output was refused is taken back


@pytest.mark.parametrize(
    "url", ["", "http://", "ftp://example.org", "http://host:port", "http://a..b", f"http://{'x' * 70}"]
)
def test_a_url_that_is_none_is_exit_code_2(capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert run(["generate", "--server", url, "a fox"]) == 2
    assert "URL" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["secret\nkey", "sécret", "secret key"])
def test_a_key_that_is_none_is_refused_and_not_told(
    caller: Caller, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("TRIPTYCH_API_KEY", key)
    assert run(["generate", "--server", caller.url, "a fox"]) == 2
    told = capsys.readouterr().err
    assert "TRIPTYCH_API_KEY: a key of printable ASCII characters" in told
    assert not any(part in told for part in (key, "secret", "sécret"))


def test_the_service_says_how_many_outputs_there_are(
    caller: Caller, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may have its own default of how many it makes."""
    defaults = {**engine().front.family.repository.defaults, "num_images_per_prompt": 2}
    monkeypatch.setattr(engine().front.family.repository, "defaults", defaults)
    Path("a-fox-7-1.png").write_bytes(b"another run's")
    assert run(["generate", "--server", caller.url, "a fox", "--seed", "7", "--steps", "1", "-q"]) == 0
    assert capsys.readouterr().out.split() == ["a-fox-7_2-0.png", "a-fox-7_2-1.png"]
    assert Path("a-fox-7-1.png").read_bytes() == b"another run's"


def test_a_service_that_cannot_be_reached_is_exit_code_4(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--server", "127.0.0.1:1", "a fox"]) == 4
    assert "http://127.0.0.1:1 cannot be reached" in capsys.readouterr().err


def test_a_service_that_is_full_says_when_to_come_back(
    caller: Caller, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine().router, "max_waiting", 0)
    assert run(["generate", "--server", caller.url, "a fox"]) == 4
    assert "try again in" in capsys.readouterr().err


def test_a_request_that_is_given_up_says_why(
    caller: Caller, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise triptych.errors.WireError("bits fell over")

    monkeypatch.setattr(engine().router, "_finish", fails)
    assert run(["generate", "--server", caller.url, "a fox", "--steps", "1"]) == 4
    assert "the service gave the request up: bits fell over" in capsys.readouterr().err
    assert os.listdir() == []


def test_a_stream_that_breaks_is_taken_up_where_it_broke(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    request = caller.submit({"prompt": "a fox", "num_inference_steps": 2})
    parse, broken = client._events, []

    def breaking(lines: Any) -> Any:
        for k, event in enumerate(parse(lines)):
            if k == 2 and not broken:
                broken.append(event)
                raise httpx.ReadError("the line went dead")
            yield event

    monkeypatch.setattr(client, "_events", breaking)
    monkeypatch.setattr(client.time, "sleep", lambda _: None)
    with Client(caller.url) as other:
        kinds = [kind for kind, _ in other.events(request)]
    assert broken
    assert kinds == ["queued", "started", "started", "step", "step", "started", "done"]


def test_a_service_may_be_silent_while_it_makes_the_file(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    request, spool, file = caller.submit(QUICK), caller.service.records.spool, io.BytesIO()
    caller.wait(request)
    make = spool.file
    monkeypatch.setattr(spool, "file", lambda *work: time.sleep(1) or make(*work))
    with Client(caller.url) as other:
        other._http.timeout = httpx.Timeout(0.3)
        other.fetch(request, 0, "png", file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_as_many_requests_are_on_their_way_as_there_are_clients() -> None:
    clients = 120
    together = threading.Barrier(clients)

    class Meeting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            together.wait(10)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = clients

    with Server(("127.0.0.1", 0), Meeting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as other, ThreadPoolExecutor(clients) as pool:
            assert list(pool.map(other.get, ["/"] * clients)) == [{}] * clients
        server.shutdown()


def test_a_result_is_forgotten_once_it_is_written(caller: Caller) -> None:
    before = {record.id for record in caller.service.records.all()}
    assert run(["generate", "--server", caller.url, "a fox", "--steps", "1", "-q"]) == 0
    assert {record.id for record in caller.service.records.all()} == before


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (client.ServiceError("the line went dead"), 4),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
def test_a_result_that_cannot_be_brought_here_stays_and_can_be_fetched(
    caller: Caller, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, failure: Any, code: int
) -> None:
    def fails(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(Client, "fetch", fails)
    assert run(["generate", "--server", caller.url, "a fox", "--steps", "1", "-q"]) == code
    (where,) = re.findall(r"the service still has the result; to get it: curl -o FILE '(.*)'", capsys.readouterr().err)
    assert httpx.get(where).content.startswith(b"\x89PNG")
    assert os.listdir() == []


def test_ctrl_c_takes_the_request_back(caller: Caller, tmp_path: Path) -> None:
    arguments = ["generate", "--server", caller.url, "a fox", "--steps", "900"]
    process = subprocess.Popen(
        [sys.executable, "-m", "triptych", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(triptych.__file__).parents[1])},
    )
    assert process.stderr is not None
    while not any(each.tickets and each.tickets[0].progress for each in engine().router.replicas):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert process.stderr.read().splitlines()[-1] == "interrupted"
    assert idle()
    assert settled(caller.service)
    assert os.listdir() == []


def test_nothing_heavy_is_imported_for_it(caller: Caller) -> None:
    code = (
        "import sys; from triptych.cli import run; "
        f"assert run(['generate', '--server', {caller.url!r}, 'a fox', '--steps', '1', '-q']) == 0; "
        "assert not {'torch', 'diffusers', 'fastapi'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(triptych.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=env)
