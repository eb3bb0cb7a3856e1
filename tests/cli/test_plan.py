"""`triptych plan`: a table, or JSON, of what each role would load."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from conftest import TinyRepo

import triptych
from triptych.cli import run
from triptych.cli.console import human


def test_json_is_the_plan(tiny_repo: TinyRepo, capsys: pytest.CaptureFixture[str]) -> None:
    repo = tiny_repo("flux2_klein")
    assert (
        run(["plan", str(repo), "--json", "--tasks", "text-to-image", "--dtype", "vae=float32,default=bfloat16"]) == 0
    )
    planned = triptych.plan(repo, tasks="text-to-image", dtype={"vae": "float32", "default": "bfloat16"})
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(planned.to_dict()))


def test_the_table_has_a_row_for_each_component_and_the_totals_of_each_role(
    tiny_repo: TinyRepo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    repo = tiny_repo("flux2_klein")
    assert run(["plan", str(repo)]) == 0
    shown = capsys.readouterr().out
    planned = triptych.plan(repo)
    for component in planned.whole:
        assert re.search(rf"^ ?{component}\b", shown, re.MULTILINE)
    total = next(line for line in shown.splitlines() if line.strip().startswith("total"))
    shares = next(line for line in shown.splitlines() if line.strip().startswith("of the whole"))
    for role in planned.roles:
        assert human(planned.role_bytes(role)) in total
        assert f"{100 * planned.role_bytes(role) / planned.whole_bytes:.1f} %" in shares
    assert human(planned.whole_bytes) in total
    assert shares.rstrip().endswith("100 %")


def test_headers_are_enough(tiny_repo: TinyRepo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = shutil.copytree(tiny_repo("flux2_klein"), tmp_path / "headers")
    tiny.header_only(repo)
    assert run(["plan", str(repo), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"]["bytes"] == triptych.plan(tiny_repo("flux2_klein")).whole_bytes


def test_notes_stand_below_the_table(tiny_repo: TinyRepo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = shutil.copytree(tiny_repo("flux2_klein"), tmp_path / "bare")
    for file in repo.rglob("*.safetensors"):
        file.unlink()
    assert run(["plan", str(repo)]) == 0
    assert "note: transformer has no weight file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "paint"], 2, "tasks='paint'"),
        (["--dtype", "float13"], 2, "float13"),
        (["--dtype", "vae=float32,transformer"], 2, "--dtype 'vae=float32,transformer'"),
        (["--nonsense"], 2, "No such option: --nonsense"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    tiny_repo: TinyRepo, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert run(["plan", str(tiny_repo("flux2_klein")), *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_empty_name_is_not_the_folder_one_is_in(
    tiny_repo: TinyRepo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_repo("flux2_klein"))
    assert run(["plan", ""]) == 3
    assert "an empty name is neither a folder nor a hub id" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(tmp_path)]) == 3
    assert "model_index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (123_456, "123 kB"), (999_999, "1 MB"), (23_150_000, "23.1 MB"),
     (7_900_000_000, "7.9 GB"), (123_400_000_000, "123 GB"), (2_000_000_000_000, "2000 GB")],
)  # fmt: skip
def test_sizes_are_shown_with_three_digits(size: int, text: str) -> None:
    assert human(size) == text
