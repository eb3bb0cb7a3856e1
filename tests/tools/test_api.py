"""docs/api.md, and the script that writes it from the server's schema."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import api


def test_the_page_is_what_the_code_says() -> None:
    assert api.PAGE.read_text() == api.page(api.schema()), "run `make api-page`"


def test_the_page_has_every_path_with_its_body_and_its_answers() -> None:
    schema = api.schema()
    page = api.page(schema)
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            section = page.partition(f"### {method.upper()} {path}\n")[2].partition("\n### ")[0]
            assert all(f"| {status} |" in section for status in about["responses"]), path
    generations = page.partition("### POST /v1/images/generations\n")[2].partition("\n### ")[0]
    assert "| prompt | string |" in generations
    assert "| n (optional) | integer, 1 to 10 |" in generations
    assert "[ImagesAnswer](#imagesanswer), `text/event-stream`" in generations


def test_types_are_told_in_words() -> None:
    assert api.kind_of({"anyOf": [{"type": "string"}, {"type": "null"}]}) == "string or null"
    assert api.kind_of({"type": "array", "items": {"$ref": "#/components/schemas/Video"}}) == "list of [Video](#video)"
    assert api.kind_of({"type": "integer", "minimum": 1}) == "integer, at least 1"
    assert api.kind_of({"enum": ["a", "b"]}) == "`a`, `b`"
