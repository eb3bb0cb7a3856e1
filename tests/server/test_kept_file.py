"""A result that is dropped just before it is sent."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import QUICK, Caller


def test_a_result_that_is_dropped_before_it_is_sent_is_404(
    serve: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = serve()
    request = caller.submit(QUICK)
    caller.wait(request)
    spool, made = caller.service.records.spool, caller.service.records.spool.file

    def make_and_drop(*work: object) -> Path:
        path = made(*work)  # type: ignore[arg-type]
        shutil.rmtree(path.parent)
        return path

    response = caller.get(request["links"]["result"])
    assert (response.status_code, response.headers["content-length"]) == (200, str(len(response.content)))
    head = caller.head(request["links"]["result"])
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", response.headers["etag"])
    assert [caller.head(path).status_code for path in ("/health", "/ready")] == [200, 200]
    monkeypatch.setattr(spool, "file", make_and_drop)
    response = caller.get(request["links"]["result"])
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
