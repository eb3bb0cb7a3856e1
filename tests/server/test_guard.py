"""The guard: who is let in, and what everybody else is told."""

import hashlib
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import QUICK, Caller, engine

from triptych.errors import UsageError
from triptych.server import guard
from triptych.server.app import create_app
from triptych.server.front import Front, Tls
from triptych.server.guard import Access, check_exposure, is_loopback
from triptych.server.keys import Key, find, hash_of, make_key, read_keys
from triptych.server.service import Service

SECRET = "a-key-nobody-can-guess"
AUTHENTICATION = {("authentication_error", code) for code in ("missing_api_key", "invalid_api_key")}


@contextmanager
def guarded(access: Access, tls: Tls | None = None) -> Iterator[Caller]:
    service = Service(engine=engine())
    with Front(create_app(service, access), "127.0.0.1", 0, tls) as front, Caller(service, front.url) as caller:
        yield caller
    service.records.spool.close()


@pytest.fixture(scope="module")
def keys() -> dict[str, tuple[str, Key]]:
    """A key of each scope."""
    return {"all": make_key("root"), "requests": make_key("alice", "requests"), "metrics": make_key("graf", "metrics")}


@pytest.fixture(scope="module")
def closed(keys: dict[str, tuple[str, Key]]) -> Iterator[Caller]:
    """A server that asks for keys."""
    with guarded(Access(tuple(key for _, key in keys.values()))) as caller:
        yield caller


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def told(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "path", ["/v1/requests/x", "/v1/status", "/v1/models", "/metrics", "/openapi.json", "/nowhere"]
)
def test_without_a_key_every_path_is_401_in_openai_form(closed: Caller, path: str) -> None:
    response = closed.get(path)
    assert told(response, 401)["code"] == "missing_api_key"
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_whether_it_lives_and_its_page_are_open(closed: Caller, path: str) -> None:
    assert closed.get(path).status_code == 200


@pytest.mark.parametrize("header", ["Bearer wrong", "Basic abc", "Bearer", "Bearer \xff\xfe"])
def test_a_wrong_key_is_401(closed: Caller, header: str) -> None:
    response = closed.get("/v1/status", headers={"Authorization": header.encode("latin-1")})
    error = told(response, 401)
    assert (error["type"], error["code"]) in AUTHENTICATION


def test_a_key_is_refused_before_the_body_is_read(closed: Caller) -> None:
    address = httpx.URL(closed.url)
    with socket.create_connection((address.host, address.port or 0), timeout=5) as opened:
        opened.sendall(b"POST /v1/requests HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert opened.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_a_picture_s_own_url_needs_no_key(closed: Caller) -> None:
    assert closed.get("/v1/images/files/req_0/0.png").status_code == 404


def test_each_key_opens_its_scope_and_no_more(closed: Caller, keys: dict[str, tuple[str, Key]]) -> None:
    opens = {
        "all": {"/v1/status": 200, "/metrics": 200},
        "requests": {"/v1/status": 200, "/metrics": 403},
        "metrics": {"/v1/status": 403, "/metrics": 200},
    }
    for scope, paths in opens.items():
        for path, status in paths.items():
            response = closed.get(path, headers=bearer(keys[scope][0]))
            assert response.status_code == status, (scope, path)
            if status == 403:
                assert told(response, 403)["code"] == "insufficient_scope"
    response = closed.post("/v1/pools/denoiser", json={"replicas": 1}, headers=bearer(keys["requests"][0]))
    assert told(response, 403)["code"] == "insufficient_scope"


def test_with_a_key_requests_are_served(closed: Caller, keys: dict[str, tuple[str, Key]]) -> None:
    response = closed.post("/v1/requests", json={"parameters": QUICK}, headers=bearer(keys["requests"][0]))
    assert response.status_code == 202


def test_the_openai_client_raises_its_own_error_for_a_wrong_key(closed: Caller) -> None:
    client = openai.OpenAI(base_url=f"{closed.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_only_hashes_are_kept() -> None:
    secret, key = make_key("alice")
    assert secret not in key.line()
    assert key.hash == f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"
    assert find((Key("other", hash_of("x" * 20)), key), secret) is key
    assert find((key,), secret + " ") is None


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    compare = guard.keys.hmac.compare_digest
    monkeypatch.setattr(guard.keys.hmac, "compare_digest", lambda a, b: compared.append(a) or compare(a, b))
    keys = tuple(Key(str(k), hash_of(str(k) * 20)) for k in range(3))
    assert find(keys, "0" * 20) is keys[0]
    assert compared == [key.hash for key in keys]


def test_a_file_of_keys_is_read_with_comments_and_scopes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    one, two = make_key("alice", "requests")[1], make_key("root")[1]
    file.write_text(f"# who may ask\n\n{one.line()}\n{two.name} {two.hash}\n")
    assert read_keys(f"@{file}") == (one, two)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no key"),
        ("alice", "line 1: NAME sha256:DIGEST"),
        (f"alice {SECRET}", "line 1: NAME sha256:DIGEST"),
        (f"# keys\nalice {hash_of(SECRET)} request", "line 2: scope 'request': one of all, requests, metrics"),
        (f"alice {hash_of(SECRET)} all more", "line 1: NAME sha256:DIGEST"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_another_form_is_told_by_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_keys(f"@{tmp_path / 'keys'}")
    assert SECRET not in str(caught.value)


def test_a_key_that_can_be_guessed_is_refused() -> None:
    for weak in ("short", "with a space in it", "x" * 15, "schlüssel-schlüssel"):
        with pytest.raises(UsageError, match="16 or more ASCII characters") as caught:
            read_keys(weak)
        assert weak not in str(caught.value)


def test_what_a_foreign_page_makes_a_browser_send_is_403(caller: Caller) -> None:
    sent = {"parameters": QUICK}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "null"},
        {"Origin": "http://["},
    ):
        assert told(caller.post("/v1/requests", json=sent, headers=headers), 403)["code"] == "foreign_origin"
    own = ({"Origin": caller.url}, {"Sec-Fetch-Site": "same-origin", "Origin": "https://proxied.example"}, {})
    for headers in own:
        assert caller.post("/v1/requests", json=sent, headers=headers).status_code == 202
    assert caller.get("/v1/status", headers={"Origin": "https://evil.example"}).status_code == 200


HOSTS = {
    "localhost": 200, "LOCALHOST:1": 200, "127.0.0.1": 200, "127.8.9.1:80": 200, "[::1]": 200, "[::1]:8000": 200,
    "evil.example": 403, "evil.example:8000": 403, "localhost.evil.example": 403, "127.0.0.1.evil.example": 403,
    "10.0.0.1": 403, "0.0.0.0": 403, "[::1": 403, "": 403,
}  # fmt: skip


@pytest.mark.parametrize(("host", "status"), HOSTS.items())
def test_without_a_key_loopback_is_only_for_those_who_ask_for_this_machine(
    keyless: Caller, host: str, status: int
) -> None:
    response = keyless.get("/v1/status", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert told(response, 403)["code"] == "foreign_host"
        assert "takes only requests to localhost or 127.0.0.1" in told(response, 403)["message"]
        sent = {"parameters": QUICK}
        assert keyless.post("/v1/requests", json=sent, headers={"Host": host}).status_code == 403
    assert keyless.get("/health", headers={"Host": host}).status_code == 200, "it tells nothing"


@pytest.fixture(scope="module")
def keyless() -> Iterator[Caller]:
    """A server as `triptych serve` makes it."""
    with guarded(Access().listening_on("127.0.0.1")) as caller:
        yield caller


def test_a_server_may_be_asked_for_by_the_name_that_it_listens_on() -> None:
    with guarded(Access(host="Studio.Internal")) as caller:
        for host, status in (("studio.internal:8000", 200), ("localhost", 200), ("internal", 403)):
            assert caller.get("/v1/status", headers={"Host": host}).status_code == status


def test_with_a_key_or_beyond_this_machine_any_name_will_do(keys: dict[str, tuple[str, Key]]) -> None:
    secret, key = keys["all"]
    for access in (Access((key,)).listening_on("127.0.0.1"), Access().listening_on("0.0.0.0")):
        with guarded(access) as caller:
            assert caller.get("/v1/status", headers={"Host": "x.example", **bearer(secret)}).status_code == 200


def test_cors_is_off_unless_an_origin_is_named(caller: Caller) -> None:
    asked = {"Origin": "https://studio.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in caller.options("/v1/requests", headers=asked).headers
    assert "access-control-allow-origin" not in caller.get("/health", headers=asked).headers
    with guarded(Access((Key("k", hash_of(SECRET)),), ("https://studio.example",))) as named:
        allowed = named.options("/v1/requests", headers=asked)  # a browser sends no key along with this question
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://studio.example"
        foreign = named.options("/v1/requests", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in foreign.headers
        refusal = named.post("/v1/requests", json={}, headers={"Origin": "https://studio.example"})
        assert told(refusal, 401)
        assert (
            refusal.headers["access-control-allow-origin"] == "https://studio.example"
        )  # so that its page can read it


def test_a_failure_of_the_server_can_be_read_by_pages_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with guarded(Access(origins=("https://studio.example",))) as named:
        monkeypatch.setattr(engine(), "snapshot", None)
        failure = named.get("/v1/status", headers={"Origin": "https://studio.example"})
    assert told(failure, 500)["code"] == "internal"
    assert failure.headers["access-control-allow-origin"] == "https://studio.example"
    assert failure.headers["connection"] == "close"
    assert caplog.text.count("a request to the server failed") == 1


@pytest.mark.parametrize("origin", ["studio.example", "https://studio.example/", "ftp://x", "https://", ""])
def test_an_origin_of_another_form_is_refused(origin: str) -> None:
    with pytest.raises(UsageError, match="--cors-origin"):
        Access(origins=(origin,))


def test_listening_beyond_this_machine_needs_a_key_or_a_word(caplog: pytest.LogCaptureFixture) -> None:
    key = Access((Key("k", hash_of(SECRET)),))
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.9"):
        assert is_loopback(host)
        check_exposure(host, Access(), encrypted=False, insecure=False)
    assert not caplog.records
    with pytest.raises(UsageError, match="--host 0.0.0.0: whoever reaches this address.*--api-key, or --insecure"):
        check_exposure("0.0.0.0", Access(), encrypted=False, insecure=False)
    with pytest.raises(UsageError, match=r"--host \*: whoever reaches this address"):  # all addresses, as 0.0.0.0 is
        check_exposure("*", Access(), encrypted=False, insecure=False)
    check_exposure("0.0.0.0", Access(), encrypted=True, insecure=True)
    assert "without a key" in caplog.text
    caplog.clear()
    check_exposure("0.0.0.0", key, encrypted=False, insecure=False)
    assert "clear text" in caplog.text
    caplog.clear()
    check_exposure("::", key, encrypted=True, insecure=False)
    assert not caplog.records


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    folder = tmp_path_factory.mktemp("tls")
    made = Tls(folder / "cert.pem", folder / "key.pem")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    try:
        subprocess.run(
            [*command.split(), "-keyout", str(made.key), "-out", str(made.certificate)], check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return made


def test_with_a_certificate_the_server_encrypts(certificate: Tls) -> None:
    with guarded(Access(), certificate) as caller:
        assert caller.url.startswith("https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=str(certificate.certificate))
        assert httpx.get(f"{caller.url}/health", verify=trust).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{caller.url}/health")


def test_a_certificate_that_cannot_be_used_is_told_before_anything_is_loaded(
    certificate: Tls, tmp_path: Path, serve: Callable[..., Caller]
) -> None:
    (tmp_path / "no.pem").write_text("not a certificate")
    for tls in (Tls(tmp_path / "no.pem"), Tls(tmp_path / "missing"), Tls(certificate.certificate)):
        with pytest.raises(UsageError, match="--ssl-certfile, --ssl-keyfile: .* cannot be used"):
            Front(create_app(Service()), "127.0.0.1", 0, tls)
