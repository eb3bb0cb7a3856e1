"""The schema: what it says of every operation's failures. That answers keep to it, `Caller` looks at with each."""

from typing import Any

import httpx
import pytest
from serving import Caller, check_declared

from triptych.errors import DeadlineExceeded, MemoryShortageError, OverloadedError, ParameterError, RequestLostError
from triptych.server.app import create_app
from triptych.server.problems import Problem, problem_of
from triptych.server.service import Service


@pytest.fixture(scope="module")
def paths() -> dict[str, Any]:
    service = Service()
    paths: dict[str, Any] = create_app(service).openapi()["paths"]
    service.records.spool.close()
    return paths


def statuses(operation: dict[str, Any]) -> set[str]:
    return set(operation["responses"])


def test_every_operation_names_what_the_guard_and_the_bounds_of_bodies_answer(paths: dict[str, Any]) -> None:
    for path, methods in paths.items():
        for method, operation in methods.items():
            told, where = statuses(operation), f"{method} {path}"
            assert "500" in told and "422" not in told, where
            keyless = path in ("/health", "/ready") or "files" in path
            assert ("401" in told) == (not keyless), where
            assert ("403" in told) == (not keyless or method != "get"), where
            assert ({"408", "413", "503"} <= told) == ("requestBody" in operation), where
    assert {"429", "507", "400", "202"} <= statuses(paths["/v1/requests"]["post"])
    assert {"204", "404"} <= statuses(paths["/v1/requests/{name}/events"]["get"])
    for path in ("/v1/requests/{name}/result", "/v1/videos/{video_id}/content", "/v1/images/files/{name}/{file}"):
        assert {"200", "206", "416", "404"} <= statuses(paths[path]["get"]), path
    assert {"410", "504", "429"} <= statuses(paths["/v1/images/generations"]["post"])


def test_bodies_are_described_in_every_kind_that_is_taken(paths: dict[str, Any]) -> None:
    for path in ("/v1/images/edits", "/v1/videos", "/v1/videos/sync"):
        content = paths[path]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data"}, path
    for each in paths["/v1/videos"]["post"]["requestBody"]["content"].values():
        assert {"user", "fps"} <= set(each["schema"]["properties"])
    size = paths["/v1/pools/{pool}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(size["properties"]) == {"replicas"}


def test_every_failure_has_the_one_form_and_a_meaning(paths: dict[str, Any]) -> None:
    for methods in paths.values():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if status >= "400" and status != "416":
                    assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
                    assert response["description"].endswith(".")


def test_an_answer_that_the_schema_does_not_name_is_noticed() -> None:
    request = httpx.Request("GET", "http://here/v1/requests/req_1")
    check_declared(httpx.Response(404, request=request))
    with pytest.raises(AssertionError, match="GET /v1/requests/req_1 answers 418"):
        check_declared(httpx.Response(418, request=request))


@pytest.mark.parametrize(
    ("problem", "status", "kind", "code"),
    [
        (problem_of(ParameterError("n", 0, "no")), 400, "invalid_request_error", "bad_parameter"),
        (problem_of(OverloadedError(3, 1.0)), 429, "rate_limit_error", "overloaded"),
        (problem_of(DeadlineExceeded("late")), 504, "server_error", "deadline_exceeded"),
        (problem_of(RequestLostError(["died"])), 500, "server_error", "lost"),
        (problem_of(MemoryShortageError("no room")), 500, "server_error", "no_memory"),
        (problem_of(KeyError("x")), 500, "server_error", "internal"),
        (Problem(401, "missing_api_key", ""), 401, "authentication_error", "missing_api_key"),
        (Problem(403, "insufficient_scope", ""), 403, "permission_error", "insufficient_scope"),
        (Problem(404, "not_found", ""), 404, "invalid_request_error", "not_found"),
        (Problem(503, "not_ready", ""), 503, "server_error", "not_ready"),
    ],
)
def test_errors_have_openai_s_types_and_codes_of_their_own(problem: Problem, status: int, kind: str, code: str) -> None:
    body = problem.body()
    assert (problem.status, body["type"], body["code"]) == (status, kind, code)
    assert {"message", "param"} <= set(body)


def test_the_fields_of_an_error_are_those_that_clients_read(caller: Caller) -> None:
    error = caller.post("/v1/images/generations", json={"prompt": "a fox", "n": 99}).json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "bad_parameter", "n")
