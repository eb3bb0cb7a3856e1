"""The OpenAPI schema, completed by what all routes have in common: who stands before them, and how they fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from triptych.server.guard import OPEN, OPEN_BELOW, SAFE

_METHODS = ("get", "post", "delete")
_MEANINGS = {
    400: "Something that was sent is not accepted; `code` and `param` tell what.",
    401: "A key is needed, or this one is none of the server's.",
    403: "The key is for something else, or a page of another site has sent this.",
    404: "There is nothing of that name (any more).",
    406: "It cannot be had in a format that is accepted.",
    408: "The body did not come in time.",
    409: "It is not done yet.",
    410: "There will be no result.",
    413: "The body is too large.",
    415: "The body is of a kind that is not read.",
    429: "There are too many requests; `Retry-After` says when to come back.",
    500: "The server failed.",
    503: "Nothing can be served now; `Retry-After` may say when to come back.",
    504: "The request's deadline passed.",
    507: "There is no space left on the disk of the server.",
}
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}


def completed(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return what makes an application's schema, once."""
    made: dict[str, Any] = {}

    def schema() -> dict[str, Any]:
        if not made:
            made.update(get_openapi(title=app.title, version=app.version, routes=app.routes))
            for path, operations in made["paths"].items():
                for method in _METHODS:
                    if method in operations:
                        _complete(path, method, operations[method])
            for unused in ("HTTPValidationError", "ValidationError"):
                made["components"]["schemas"].pop(unused, None)
        return made

    return schema


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    """Add to one operation what it shares with others, and say what its statuses mean."""
    responses: dict[str, Any] = operation["responses"]
    if responses.pop("422", None) is not None:  # the framework's own: ours is 400
        responses.setdefault("400", {})
    common = {"500"}
    if path not in OPEN and not path.startswith(OPEN_BELOW):
        common |= {"401", "403"}
    if method.upper() not in SAFE:
        common |= {"403"}
    if "requestBody" in operation:
        common |= {"408", "413", "503"}
    for status in common:
        responses.setdefault(status, {})
    for status, response in responses.items():
        if status >= "400" and (not response or "ErrorBody" in str(response.get("content"))):
            response["description"] = _MEANINGS[int(status)]
            response["content"] = _ERROR
    operation["responses"] = dict(sorted(responses.items()))
