"""`triptych scale`, `triptych drain`, `triptych key`: what they ask a service for, and what they print."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from serving import Caller, engine

from triptych.cli import run
from triptych.errors import UsageError
from triptych.server.app import create_app
from triptych.server.front import Front
from triptych.server.guard import Access
from triptych.server.keys import Key, hash_of, read_keys
from triptych.server.service import Service

SECRET = "an-operator-s-secret"


@pytest.fixture
def scalable(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the engine behind `caller` is asked for, as one on Ray would be."""
    asked: list[tuple[object, ...]] = []

    def scale(pool: str, replicas: int) -> None:
        if pool != "encoder+decoder":
            raise UsageError(f"pool={pool!r}: there are encoder+decoder")
        asked.append(("scale", pool, replicas))

    monkeypatch.setattr(engine(), "scale", scale)
    monkeypatch.setattr(engine(), "drain", lambda name: asked.append(("drain", name)))
    return asked


def test_scaling_a_pool_reaches_the_engine(
    scalable: list[tuple[object, ...]], caller: Caller, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["scale", "encoder+decoder", "3", "--server", caller.url]) == 0
    assert scalable == [("scale", "encoder+decoder", 3)]
    out = capsys.readouterr().out
    assert out.startswith("encoder+decoder: 3 replicas are wanted; there are monolithic-0\n")


def test_draining_a_replica_reaches_the_engine(
    scalable: list[tuple[object, ...]], caller: Caller, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["drain", "denoiser-3f09c1", "--server", caller.url]) == 0
    assert scalable == [("drain", "denoiser-3f09c1")]
    assert capsys.readouterr().out.startswith("denoiser-3f09c1 is drained; there are ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["scale", "denoisr", "3"], "pool='denoisr': there are encoder+decoder"),
        (["scale", "encoder+decoder", "5000"], "replicas"),
        (["scale", "encoder+decoder", "-1"], "-1"),
        (["scale", "encoder+decoder", "many"], "replicas"),
    ],
)
def test_what_cannot_be_is_exit_code_2(
    scalable: list[tuple[object, ...]], caller: Caller, capsys: pytest.CaptureFixture[str], command: list[str],
    message: str,
) -> None:  # fmt: skip
    assert run([*command, "--server", caller.url]) == 2
    assert message in capsys.readouterr().err
    assert scalable == []


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/json", None])
def test_a_pool_is_scaled_whatever_kind_the_body_says_it_is(
    scalable: list[tuple[object, ...]], caller: Caller, kind: str | None
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = caller.post("/v1/pools/encoder+decoder", content=b'{"replicas": 4}', headers=headers)
    assert (response.status_code, scalable) == (202, [("scale", "encoder+decoder", 4)])


@pytest.mark.parametrize(
    ("body", "code", "parameter", "message"),
    [
        (
            b'{"replicas": 4',
            "bad_request",
            None,
            'the body is not what is accepted, as in {"replicas": 4}: Invalid JSON',
        ),
        (b"[4]", "bad_request", None, "the body is not what is accepted"),
        (b"{}", "bad_parameter", "replicas", "replicas=None: Field required"),
        (b'{"replicas": "4"}', "bad_parameter", "replicas", "replicas='4': Input should be a valid integer"),
        (b'{"replica": 4, "replicas": 4}', "bad_parameter", "replica", "replica=4: Extra inputs are not permitted"),
    ],
)
def test_a_body_that_says_no_size_is_refused_by_what_is_wrong_with_it(
    scalable: list[tuple[object, ...]], caller: Caller, body: bytes, code: str, parameter: str | None, message: str
) -> None:
    response = caller.post("/v1/pools/encoder+decoder", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, parameter)
    assert message in error["message"]
    assert scalable == []


@pytest.mark.parametrize("command", [["scale", "denoiser", "2"], ["drain", "denoiser-0"]])
def test_a_service_in_one_process_says_why_its_replicas_are_fixed(
    caller: Caller, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert run([*command, "--server", caller.url]) == 2
    assert "runs in one process, whose replicas are settled at its start" in capsys.readouterr().err


@contextmanager
def closed() -> Iterator[str]:
    service = Service(engine=engine())
    access = Access((Key("operator", hash_of(SECRET)),))
    with Front(create_app(service, access), "127.0.0.1", 0) as front:
        yield front.url
    service.records.spool.close()


def test_commands_take_their_key_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed() as url:
        assert run(["top", url, "--once"]) == 4
        assert "an API key is needed" in capsys.readouterr().err
        monkeypatch.setenv("TRIPTYCH_API_KEY", SECRET)
        assert run(["top", url, "--once"]) == 0
        assert run(["generate", "--server", url, "a heart", "--steps", "1", "-o", "-"]) in (0, 2)
        monkeypatch.setenv("TRIPTYCH_API_KEY", "@keys")
        assert run(["top", url, "--once"]) == 2
        assert "the key itself is needed" in capsys.readouterr().err


def test_a_new_key_is_a_line_for_the_file_and_a_secret_that_it_does_not_tell(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert run(["key", "alice", "--scope", "requests"]) == 0
    captured = capsys.readouterr()
    found = re.fullmatch(r"The key, which is shown only now: (tk-\S{43})\n", captured.err)
    assert found
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(captured.out)
    assert read_keys(f"@{file}") == (Key("alice", hash_of(found[1]), "requests"),)
    assert found[1] not in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alice", "--scope", "request"], "one of all, requests, metrics is accepted; did you mean 'requests'?"),
        (["two words"], "name 'two words'"),
    ],
)
def test_a_key_that_cannot_be_is_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["key", *arguments]) == 2
    captured = capsys.readouterr()
    assert (message in captured.err, captured.out) == (True, "")


def test_serving_beyond_this_machine_without_a_key_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Caller]
) -> None:
    monkeypatch.delenv("TRIPTYCH_API_KEY", raising=False)
    monkeypatch.setattr("triptych.cli.serve.quieten_libraries", lambda **_: None)
    monkeypatch.setattr("triptych.engine.local.LocalEngine", None)  # it would be an error to ask for it
    for options, message in (
        (["--host", "0.0.0.0"], "set --api-key, or --insecure"),
        (["--api-key", "short"], "16 or more ASCII characters"),
        (["--ssl-keyfile", "key.pem"], "give --ssl-certfile too"),
        (["--cors-origin", "example.org"], "https://host[:port] is accepted"),
        (["--ssl-certfile", "missing.pem"], "missing.pem cannot be used"),
    ):
        assert run(["serve", "--port", "0", "--no-state", *options]) == 2
        assert message in capsys.readouterr().err
