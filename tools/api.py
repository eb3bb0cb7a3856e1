"""Write docs/api.md: every path of the server, from the schema that it serves at /openapi.json.

python tools/api.py            # write the page anew
python tools/api.py --check    # exit 1 where it is not what the code says
"""

from __future__ import annotations

import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# HTTP API

<!-- Written by `make api-page` from the code; changes here are lost. -->

This is what a server tells of itself at `/openapi.json`, as a page. How to use it: [Serving](serving.md),
[Images](images.md), [Videos](videos.md). The family's own parameters go beside the fields below;
`GET /v1/parameters` lists those of the model that is served.

Every error has the form of `ErrorBody`. If the server has keys, every path needs one but `/health`, `/ready`, the page at
`/`, and `/v1/images/files/`, where names cannot be guessed.
"""


def main() -> int:
    text = page(schema())
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.read_text() == text else 1
    PAGE.write_text(text)
    return 0


def schema() -> dict[str, Any]:
    """Return the server's OpenAPI schema."""
    from triptych.server.app import create_app
    from triptych.server.service import Service

    service = Service()
    try:
        return create_app(service).openapi()
    finally:
        service.records.spool.close()


def page(schema: dict[str, Any]) -> str:
    """Return the page of a schema."""
    paths = [
        operation(method, path, about) for path, methods in schema["paths"].items() for method, about in methods.items()
    ]
    kinds = [f"### {name}\n\n{fields(kind)}" for name, kind in schema["components"]["schemas"].items()]
    return "\n".join([HEAD, "## Paths\n", *paths, "## Objects\n", *kinds])


def operation(method: str, path: str, about: dict[str, Any]) -> str:
    """Return the section of one path and method."""
    parts = [f"### {method.upper()} {path}", about.get("description", about["summary"])]
    if given := about.get("parameters"):
        rows = [(each["name"], each["in"], kind_of(each["schema"]), each["schema"].get("default")) for each in given]
        parts.append(table(("parameter", "in", "type", "default"), rows))
    for media, content in about.get("requestBody", {}).get("content", {}).items():
        parts.append(f"Body, `{media}`:\n\n{fields(content['schema'])}".rstrip())
    rows = [(status, phrase(int(status)), answer_of(answer)) for status, answer in about["responses"].items()]
    parts.append(table(("status", "means", "body"), rows))
    return "\n\n".join(parts) + "\n"


def phrase(status: int) -> str:
    """Return what a status means: in RFC 9110's words, where older Pythons have others."""
    return {413: "Content Too Large", 416: "Range Not Satisfiable"}.get(status) or HTTPStatus(status).phrase


def answer_of(answer: dict[str, Any]) -> str:
    """Return the kinds of body that an answer has."""
    kinds = [
        kind_of(content["schema"]) if content.get("schema") else f"`{media}`"
        for media, content in answer.get("content", {}).items()
    ]
    return ", ".join(dict.fromkeys(kinds))


def fields(schema: dict[str, Any]) -> str:
    """Return an object's fields as a table; of another schema, its type."""
    if not schema.get("properties"):
        return kind_of(schema) + "\n"
    needed = schema.get("required", ())
    rows = [
        (name + ("" if name in needed else " (optional)"), kind_of(each), each.get("description", ""))
        for name, each in schema["properties"].items()
    ]
    return table(("field", "type", ""), rows) + "\n"


def kind_of(schema: dict[str, Any]) -> str:
    """Return a type in words: with a link, where it is described on the page."""
    if name := schema.get("$ref", "").rpartition("/")[2]:
        return f"[{name}](#{name.lower()})"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(kind_of(each) for each in options))
    if values := schema.get("enum"):
        return ", ".join(f"`{value}`" for value in values)
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {kind_of(schema.get('items', {}))}"
    kind = str(schema.get("type", "any")) + (f" ({schema['format']})" if "format" in schema else "")
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None:
        return f"{kind}, {least:g} to {most:g}"
    return kind if least is None else f"{kind}, at least {least:g}"


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in lines)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
