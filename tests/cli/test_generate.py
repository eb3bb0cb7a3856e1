"""`triptych generate`: from a prompt to a file."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
import tiny
from conftest import TinyRepo
from PIL import Image
from tiny import lora

import triptych
from triptych import embedded
from triptych.cli import generate, main, output, run
from triptych.cli.arguments import parse_loras, parse_parameters
from triptych.cli.media import open_images, open_video
from triptych.errors import UsageError
from triptych.result import Result


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in a folder of its own, and leaves the libraries' logging as it is."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(generate, "quieten_libraries", lambda **_: None)
    return folder


@pytest.fixture
def klein(tiny_repo: TinyRepo) -> str:
    return str(tiny_repo("flux2_klein"))


@pytest.fixture
def headers(tiny_repo: TinyRepo, tmp_path: Path) -> str:
    """A model without weights: reading any of them is exit code 3."""
    repo = shutil.copytree(tiny_repo("flux2_klein"), tmp_path / "headers")
    tiny.header_only(repo)
    return str(repo)


QUICK = ["--steps", "1", "--size", "16x24", "--device", "cpu"]


def pixels(path: str | Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_the_file_is_what_the_python_interface_makes(klein: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seed", "7", "--steps", "2", "--size", "16x24", "--guidance", "2.5", "--max-sequence-length", "9"]
    options += ["--param", "sigmas=[1.0, 0.4]", "--num-images", "2", "--device", "cpu", "--no-exact"]
    assert run(["generate", klein, "a red fox", "-o", "fox.png", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["fox-0.png", "fox-1.png"]
    model = triptych.load(klein, device="cpu")
    result = model.generate(
        prompt="a red fox", seed=7, num_inference_steps=2, width=16, height=24, guidance_scale=2.5,
        max_sequence_length=9, sigmas=[1.0, 0.4], num_images_per_prompt=2, exact=False,
    )  # fmt: skip
    result.save("expected.png")
    for k in range(2):
        assert Path(f"fox-{k}.png").read_bytes() == Path(f"expected-{k}.png").read_bytes()
    with Image.open("fox-0.png") as image:
        assert image.size == (16, 24)
        assert json.loads(image.text["parameters"]) == {
            "prompt": "a red fox", "height": 24, "width": 16, "num_inference_steps": 2, "sigmas": [1.0, 0.4],
            "guidance_scale": 2.5, "num_images_per_prompt": 2, "max_sequence_length": 9, "exact": False,
            "output_type": "pil", "seed": 7,
        }  # fmt: skip


def test_seconds_of_each_stage_and_the_seed_are_told_on_stderr(klein: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", klein, "a fox", "--seed", "123456", *QUICK]) == 0
    shown = capsys.readouterr().err
    for row in ("loading", "text_encoding", "flux2_denoising", "decoding", "seed"):
        assert row in shown
    assert "123456" in shown
    assert "1/1" in shown  # the bar of steps


def test_quiet_leaves_only_the_path(klein: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", klein, "a fox", "-q", "-o", "fox.webp", *QUICK]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("fox.webp\n", "")


def test_verbose_tells_what_the_roles_loaded(klein: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", klein, "a fox", "-v", *QUICK]) == 0
    shown = capsys.readouterr().err
    assert "role monolithic" in shown
    assert "skipped stages: image_encoding" in shown  # only what the request's task needs is loaded


def test_without_output_the_prompt_and_the_seed_name_a_file_that_is_free(
    klein: str, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = Path("a-red-fox-7.png")
    taken.write_bytes(b"another run's")
    assert run(["generate", klein, "A red fox!", "--seed", "7", *QUICK]) == 0
    assert capsys.readouterr().out == "a-red-fox-7_2.png\n"
    assert taken.read_bytes() == b"another run's"
    assert pixels("a-red-fox-7_2.png")


def test_an_output_that_is_named_is_replaced(klein: str) -> None:
    Path("fox.png").write_bytes(b"old")
    assert run(["generate", klein, "a fox", "-o", "fox.png", *QUICK]) == 0
    assert pixels("fox.png")


def test_layers_do_not_replace_those_of_another_run(tiny_repo: TinyRepo, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (32, 32), "red").save("picture.png")
    arguments = [str(tiny_repo("qwen_image_layered")), "a fox", "--seed", "7", "--image", "picture.png"]
    arguments += ["--param", "layers=2", "--steps", "2", "--device", "cpu", "-q"]
    Path("a-fox-7-1.png").write_bytes(b"another run's")
    assert run(["generate", *arguments]) == 0
    written = capsys.readouterr().out.split()
    assert len(written) > 1
    assert written == [f"a-fox-7_2-{k}.png" for k in range(len(written))]
    assert Path("a-fox-7-1.png").read_bytes() == b"another run's"


def test_layers_are_of_what_is_transparent_and_others_see_opaque_pictures(tiny_repo: TinyRepo, klein: str) -> None:
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGBA")
    picture.putalpha(picture.getchannel("R"))
    for mode in ("RGBA", "RGB"):
        picture.convert(mode).save(f"{mode}.png")
    layered = str(tiny_repo("qwen_image_layered"))
    seed = ["--seed", "7"]
    few = ["--param", "layers=2", "--steps", "2", "--device", "cpu", "-q", *seed]
    for mode in ("RGBA", "RGB"):
        assert run(["generate", layered, "a fox", "--image", f"{mode}.png", *few, "-o", f"layers-{mode}.png"]) == 0
        assert (
            run(["generate", klein, "a fox", "--image", f"{mode}.png", "-o", f"edited-{mode}.png", *seed, *QUICK]) == 0
        )
    made = triptych.load(layered, device="cpu").generate(
        prompt="a fox", image=picture, layers=2, num_inference_steps=2, seed=7
    )
    for k, path in enumerate(made.save("expected.png")):
        assert pixels(path) == pixels(f"layers-RGBA-{k}.png") != pixels(f"layers-RGB-{k}.png")
    assert pixels("edited-RGBA.png") == pixels("edited-RGB.png")


def test_a_video_family_writes_a_video(tiny_repo: TinyRepo, capsys: pytest.CaptureFixture[str]) -> None:
    repo = str(tiny_repo("wan"))
    options = ["--num-frames", "3", "--num-images", "2", "--steps", "1", "--size", "32x16", "--seed", "1"]
    assert run(["generate", repo, "a fox", "--device", "cpu", *options]) == 0
    assert capsys.readouterr().out.split() == ["a-fox-1-0.mp4", "a-fox-1-1.mp4"]
    assert b"ftyp" in Path("a-fox-1-0.mp4").read_bytes()[:16]


def test_images_are_read_upright_and_travel_with_the_request(klein: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture = Image.linear_gradient("L").resize((72, 64)).convert("RGB")
    picture.save("turned.png", exif=exif)
    upright = open_images([Path("turned.png")])
    assert isinstance(upright, Image.Image)
    assert upright.size == (64, 72)
    arguments = ["a fox", "--image", "turned.png", "--image", "turned.png", "--seed", "3", "-o", "edit.png"]
    assert run(["generate", klein, *arguments, *QUICK]) == 0
    model = triptych.load(klein, device="cpu")
    expected = model.generate(
        prompt="a fox", image=[upright, upright], seed=3, num_inference_steps=1, width=16, height=24
    )
    assert expected.images[0].tobytes() == pixels("edit.png")


def test_a_picture_whose_exif_data_cannot_be_read_is_refused() -> None:
    # Turned by 90 degrees, and with a unit of resolution (296) that is larger than such a unit can be.
    fields = struct.pack("<IHHHIIHHIII", 8, 2, 274, 3, 1, 6, 296, 4, 1, 70_000, 0)
    Image.new("RGB", (8, 8)).save("turned.jpg", exif=b"Exif\0\0II*\0" + fields)
    with pytest.raises(UsageError, match="--image turned.jpg: cannot be read"):
        open_images([Path("turned.jpg")])


@pytest.mark.parametrize("degrees", [0, 90, -90, 180])
def test_a_video_is_read_upright(degrees: int) -> None:
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (0, 0, 32, 16))  # a corner tells how it lies
    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(degrees)  # counterclockwise
        container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    (frame,) = open_video(Path("clip.mp4"), "--param video")
    corner = {0: (0, 0), 90: (0, 1), -90: (1, 0), 180: (1, 1)}[degrees]  # of the picture as it is shown
    width, height = frame.size
    assert (width, height) == ((64, 32) if degrees in (0, 180) else (32, 64))
    for across in (0, 1):
        for down in (0, 1):
            light = frame.getpixel((width // 4 + across * width // 2, height // 4 + down * height // 2))[0] > 128
            assert light == ((across, down) == corner)


def test_a_parameter_takes_a_picture_or_a_video_from_a_file() -> None:
    frames = [Image.new("RGB", (16, 16), (shade, shade, shade)) for shade in (40, 120, 200)]
    Result(seed=1, frames=[frames], fps=8).save("clip.mp4")
    frames[0].save("end.png")
    given = dict(parse_parameters(["last_image=@end.png", "video=@clip.mp4"]))
    assert given["last_image"].tobytes() == frames[0].tobytes()
    shades = [frame.getpixel((8, 8))[0] for frame in given["video"]]
    assert shades == pytest.approx([40, 120, 200], abs=4)
    Path("2024-05-01T12:30:00.mp4").write_bytes(Path("clip.mp4").read_bytes())  # no protocol of FFmpeg's
    assert len(dict(parse_parameters(["video=@2024-05-01T12:30:00.mp4"]))["video"]) == 3
    Path("text.mp4").write_text("no video")
    for text, message in (("video=@text.mp4", "--param video text.mp4"), ("video=@none.mp4", "No such file"),
                          ("last_image=@text.png", "--param last_image text.png")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            list(parse_parameters([text]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a fox", "--height", "17"], "--height 17: a multiple of 8 is accepted"),
        (["a fox", "--size", "17x16"], "--size 17: a multiple of 8 is accepted"),
        (["a fox", "--size", "big"], "--size 'big'"),
        (["a fox", "--size", f"{'9' * 5000}x64"], "--size '999"),
        (["a fox", "--param", f"sigmas={'[' * 100_000}"], "--param sigmas: the value has too many brackets"),
        (["a fox", "--param", 'negative_prompt="\\ud800"'], "Flux2KleinPipeline has no parameter 'negative_prompt'"),
        (["half \udcf0 of a character"], "valid Unicode text is accepted"),
        (["a fox", "--param", 'output_type=["pil"]'], "--param output_type ['pil']: one of pil, np, pt, latent"),
        (["a fox", "-o", f"{'x' * 300}.png"], "a name of 304 bytes is too long"),
        (["a fox", "-o", f"{'x' * 300}/fox.png"], "there is no folder"),
        (["a fox", "--size", "16x16", "--width", "16"], "--width: width is given already, by --size"),
        (["a fox", "--steps", "0"], "--steps 0: a whole number of at least 1"),
        (["a fox", "--steps", "few"], "--steps"),
        (["a fox", "--true-cfg", "4"], "--true-cfg: Flux2KleinPipeline has no parameter 'true_cfg_scale'"),
        (["a fox", "--num-frames", "4"], "--num-frames: Flux2KleinPipeline has no parameter 'num_frames'"),
        (["a fox", "--param", "heigth=16"], "--param heigth: Flux2KleinPipeline has no parameter 'heigth'; did you"),
        (["a fox", "--param", "height"], "--param 'height': name=value is accepted"),
        (["a fox", "--param", "sigmas=[1,"], "--param 'sigmas=[1,': the value is not valid JSON"),
        (["a fox", "--param", "exact=True"], "write true"),
        (["a fox", "--param", 'output_type="latent"'], "latents cannot be saved"),
        (["a fox", "--image", "none.png"], "--image none.png: No such file"),
        (["a fox", "--image", "text.txt"], "--image text.txt: this is no image"),
        (["a fox", "--image", "broken.png"], "--image broken.png: "),
        (["a fox", "-o", "fox.mp4"], "fox.mp4: images cannot be saved"),
        (["a fox", "-o", "no/fox.png"], "no/fox.png: there is no folder 'no'"),
        (["a fox", "--dtype", "float13"], "float13"),
        (["a fox", "--tasks", "edit"], "'text-to-image'"),
        (["a fox", "--tasks", "paint"], "tasks='paint'"),
        (["a fox", "--device", "abacus"], "device='abacus'"),
        (["a", "red", "fox"], "quote the prompt"),
        ([], "the prompt is missing"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_before_weights_are_read(
    headers: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("text.txt").write_text("no image")
    Image.new("RGB", (64, 64), "red").save("whole.png")
    Path("broken.png").write_bytes(Path("whole.png").read_bytes()[:-40])
    before = sorted(os.listdir())
    assert run(["generate", headers, *arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("Opening ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert captured.out == ""
    assert sorted(os.listdir()) == before


def test_the_model_may_be_named_by_option_but_once(klein: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--model", klein, "a fox", "-o", "fox.png", *QUICK]) == 0
    assert run(["generate", "--model", klein, klein, "a fox"]) == 2
    assert "given twice" in capsys.readouterr().err


def test_without_a_model_the_embedded_one_is_taken() -> None:
    assert generate.model_and_prompt(["a red heart"], None) == (embedded.path(), "a red heart")


@pytest.mark.parametrize("argument", ["black-forest-labs/FLUX.2-klein-4B", "models", "./models", "and/or"])
def test_a_model_without_a_prompt_is_not_drawn(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("models").mkdir()
    assert run(["generate", argument, *QUICK]) == 2
    assert f"{argument!r} looks like a model, and the prompt is missing" in capsys.readouterr().err
    assert generate.model_and_prompt([argument], "some/model") == ("some/model", argument)
    assert generate.model_and_prompt([f"{argument} "], None) == (embedded.path(), f"{argument} ")


def test_an_empty_name_is_no_model_and_no_path(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model_index.json").write_text("{}")
    for arguments in (["", "a fox"], ["a fox", "--model", ""]):
        assert run(["generate", *arguments]) == 3
        assert "an empty name is neither a folder nor a hub id" in capsys.readouterr().err
    for option in ("-o", "--image"):
        assert run(["generate", "a fox", option, ""]) == 2
        assert "a path is accepted, and this is empty" in capsys.readouterr().err


def test_a_rate_that_the_file_cannot_have_is_told_before_weights_are_read(
    tiny_repo: TinyRepo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = shutil.copytree(tiny_repo("ltx2"), tmp_path / "headers")
    tiny.header_only(repo)
    asked = ["a fox", "--param", "frame_rate=60", "--device", "cpu"]
    assert run(["generate", str(repo), *asked, "-o", "clip.gif"]) == 2
    assert "fps=60.0: GIF plays at least 0.01 and at most 50 frames a second" in capsys.readouterr().err
    assert run(["generate", str(repo), *asked, "-o", "clip.mp4"]) == 3  # it has no weights to be read


@pytest.mark.parametrize("prompt", ["a red heart " * 22, "a red heart/" * 400, "a\0heart"])
def test_a_prompt_need_not_be_fit_for_a_path(prompt: str) -> None:
    assert generate.model_and_prompt([prompt], None) == (embedded.path(), prompt)


def test_damaged_weights_are_exit_code_3(headers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", headers, "a fox", *QUICK]) == 3
    assert "error: " in capsys.readouterr().err
    assert os.listdir() == []


def test_errors_of_recipe_or_wire_are_exit_code_4(
    klein: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise triptych.errors.WireError("bits fell over")

    monkeypatch.setattr("triptych.load", fails)
    assert run(["generate", klein, "a fox"]) == 4
    assert capsys.readouterr().err.endswith("error: bits fell over\n")


def test_an_unexpected_error_is_exit_code_1_and_its_traceback_is_shown_on_request(
    klein: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("on two\nlines")

    monkeypatch.setattr("triptych.load", fails)
    assert run(["generate", klein, "a fox"]) == 1
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith("error: unexpected KeyError")
    assert "--debug" in shown
    assert "Traceback" not in shown
    assert run(["generate", klein, "a fox", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("A red fox!", "a-red-fox"), ("  ", "untitled"), ("...", "untitled"), ("赤い狐", "赤い狐"),
     ("a/../b", "a-b"), ("x" * 200, "x" * 60), ("snake_case", "snake-case"), ("𠀀" * 60, "𠀀" * 45)],
)  # fmt: skip
def test_a_prompt_becomes_a_file_name(prompt: str, expected: str) -> None:
    assert output.slug(prompt) == expected


def test_a_free_name_is_free_for_all_outputs() -> None:
    Path("fox-7-1.png").touch()
    assert output.free_path(Path("fox-7.png"), 1) == Path("fox-7.png")
    assert output.free_path(Path("fox-7.png"), 2) == Path("fox-7_2.png")


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    options["env"] = {**os.environ, **options.get("env", {}), "PYTHONPATH": str(Path(triptych.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "triptych", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_path_of_any_bytes_is_printed_as_it_was_given(klein: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = b"caf\xe9.png"
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="utf-8", errors="strict"))
    monkeypatch.setattr(sys, "argv", ["triptych", "generate", klein, "a fox", "-o", os.fsdecode(path), *QUICK])
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.flush()
    assert (ended.value.code, printed.getvalue()) == (0, path + b"\n")
    assert os.listdir(b".") == [path]


def test_split_in_three_processes_writes_the_same_bytes_and_no_noise(tiny_repo: TinyRepo) -> None:
    repo = str(tiny_repo("flux2_klein", dtype="bfloat16"))
    Image.radial_gradient("L").convert("RGB").resize((64, 72)).save("reference.png")
    arguments = ["generate", repo, "a fox", "--image", "reference.png", "--seed", "5"]
    arguments += ["--num-images", "2", "--steps", "2", "--dtype", "bfloat16"]
    arguments += ["--device", "cpu", "--height", "24"]  # the width is the model's default
    shown = []
    for name, option in (("whole.png", []), ("split.png", ["--split", "-v"])):
        process = command(*arguments, *option, "-o", name, env={"OMP_NUM_THREADS": "1"})  # quicker
        output, error = process.communicate()
        assert process.returncode == 0, error
        assert output.split() == [name.replace(".", f"-{k}.") for k in range(2)]
        shown.append(error)
    for k in range(2):
        assert Path(f"whole-{k}.png").read_bytes() == Path(f"split-{k}.png").read_bytes()
    rows = ["Opening", "flux2_denoising", "libraries,", "loading", "text_encoding", "image_encoding", "flux2_denoising"]
    assert [line.split()[0] for line in shown[0].splitlines()] == [*rows, "decoding", "writing", "seed"]
    loaded = [line for line in shown[1].splitlines() if line.startswith("role ") and "server" not in line]
    assert [line.split()[1] for line in loaded] == ["encoder", "denoiser", "decoder"]
    assert ["transformer (full)" in line for line in loaded] == [False, True, False]


def test_ctrl_c_is_one_line_exit_code_130_and_no_file(klein: str, here: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    arguments = ["generate", klein, "a fox", "--steps", "100000", "--device", "cpu", "-v", "--split", "-o", "fox.png"]
    process = command(*arguments, start_new_session=True, env={"TMPDIR": str(temporary)})
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("role encoder") for line in lines)
    time.sleep(1)  # the denoiser is being loaded, or at work
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the parent and to its child
    rest = [line for line in lines if line.strip() and not line.startswith(("role ", "flux2_denoising"))]
    assert process.wait(timeout=20) == 130
    assert rest == ["interrupted\n"]
    assert list(here.iterdir()) == []
    assert list(temporary.glob("triptych-*")) == []  # torch may leave an empty folder of its own
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no child is left
    process.stderr.close()


INTERRUPTED_IMPORT = """
import importlib.abc, os, signal, sys

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), {number})
                for _ in range(1000): pass  # a signal is seen between two instructions
            except BaseException as error:
                raise RuntimeError("Failed to import") from error

sys.meta_path.insert(0, Interrupting())
from triptych.cli import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "module", "number"),
    [
        (["generate", "a heart"], "rich.console", signal.SIGINT),
        (["generate", "a heart"], "diffusers", signal.SIGTERM),
        (["generate", "a heart"], "diffusers.pipelines.flux2.pipeline_flux2_klein", signal.SIGINT),
        (["serve"], "diffusers", signal.SIGINT),
        (["serve", "--no-state", "--port", "0"], "transformers.models.qwen3.modeling_qwen3", signal.SIGINT),
        (["bench", "load"], "diffusers", signal.SIGINT),
        (["plan"], "diffusers", signal.SIGINT),
    ],
)
def test_a_signal_ends_a_command_while_libraries_are_imported(
    here: Path, arguments: list[str], module: str, number: signal.Signals
) -> None:
    program = INTERRUPTED_IMPORT.format(module=module, number=int(number))
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + number
    told = [line for line in ended.stderr.splitlines() if not line.startswith("Opening ")]
    assert told == (["interrupted"] if number == signal.SIGINT else [])
    assert list(here.iterdir()) == []


def test_signals_that_are_ignored_stay_so_as_nohup_wants_it() -> None:
    program = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from triptych.cli import leaving\n"
        "from triptych.server.serve import _signals\n"
        "for handling in (leaving.at_once, leaving.in_order, _signals):\n"
        "    with handling(): signal.raise_signal(signal.SIGHUP)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "with _signals() as stop: signal.raise_signal(signal.SIGHUP)\n"
        "assert stop.asked == 1\n"
        "with leaving.in_order(): signal.raise_signal(signal.SIGHUP)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGHUP, "")


def test_an_interrupt_in_this_process_is_exit_code_130(
    klein: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("triptych.runtime.model.Model.run", interrupted)
    assert run(["generate", klein, "a fox", *QUICK]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert os.listdir() == []


def test_a_lora_is_named_with_its_weight(klein: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    style = lora.write(tmp_path / "style.safetensors", Path(klein), {"transformer": ["attn.to_q", "ff.linear_in"]})
    plain, styled = [*QUICK, "--seed", "7", "-o", "plain.png"], [*QUICK, "--seed", "7", "-o", "styled.png"]
    assert run(["generate", klein, "a red fox", *plain]) == 0
    assert run(["generate", klein, "a red fox", *styled, "--lora", f"{style}:1.5"]) == 0
    expected = triptych.load(klein, device="cpu").generate(
        prompt="a red fox", seed=7, num_inference_steps=1, width=16, height=24, lora=[{"path": style, "scale": 1.5}]
    )
    assert pixels("styled.png") == expected.images[0].tobytes() != pixels("plain.png")
    capsys.readouterr()
    assert run(["generate", klein, "a red fox", *styled, "--lora", str(tmp_path / "stile.safetensors")]) == 2
    assert "--lora" in (told := capsys.readouterr().err) and "did you mean" in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", {"path": "a.safetensors", "scale": 1.0}),
        ("a.safetensors:0.5", {"path": "a.safetensors", "scale": 0.5}),
        ("a.safetensors:-1", {"path": "a.safetensors", "scale": -1.0}),
        ("my:style/a.safetensors", {"path": "my:style/a.safetensors", "scale": 1.0}),
        ("a:b", {"path": "a:b", "scale": 1.0}),
    ],
)
def test_what_follows_a_loras_last_colon_is_its_weight_if_it_is_a_number(text: str, expected: dict[str, Any]) -> None:
    assert parse_loras([text]) == [expected]


def test_a_lora_without_a_path_is_refused() -> None:
    with pytest.raises(UsageError, match="--lora ':1': PATH or PATH:SCALE is accepted"):
        parse_loras([":1"])
    assert parse_loras([]) is None
