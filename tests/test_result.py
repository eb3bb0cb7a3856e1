"""Results: what `save` writes is what was made, complete, and where it was asked for."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from triptych.errors import ParameterError, UsageError
from triptych.result import FASTEST, Result, check_path


def colours(*shape: int, seed: int = 0) -> np.ndarray:
    """Floats in [0, 1] that are exact multiples of 1/255, so that 8 bits lose nothing."""
    return (np.random.default_rng(seed).integers(0, 256, shape) / 255).astype(np.float32)


def as_bytes(floats: np.ndarray) -> np.ndarray:
    return (floats * 255).round().astype(np.uint8)


def smooth_video(frames: int, height: int, width: int) -> np.ndarray:
    """(frames, height, width, 3) in [0, 1]: gradients that a lossy codec keeps, a different brightness every frame."""
    y, x, t = np.linspace(0, 1, height), np.linspace(0, 1, width), np.linspace(0.2, 0.8, frames)
    video = np.empty((frames, height, width, 3), dtype=np.float32)
    video[..., 0], video[..., 1], video[..., 2] = y[:, None], x, t[:, None, None]
    return video


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def read_mp4(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(path) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream


def read_durations(path: Path) -> list[int]:
    """Milliseconds of every frame of an animated picture."""
    durations = []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()  # WebP knows a frame's duration only then
            durations.append(int(frame.info["duration"]))
    return durations


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_png_keeps_every_pixel(tmp_path: Path, output_type: str, channels: int) -> None:
    floats = colours(1, 5, 7, channels)
    expected = as_bytes(floats)[0, ..., 0] if channels == 1 else as_bytes(floats)[0]
    images = {
        "pil": [Image.fromarray(expected)],
        "np": floats,
        "pt": torch.from_numpy(floats).movedim(-1, 1),
    }[output_type]
    assert Result(seed=1, images=images).save(tmp_path / "fox.png") == [tmp_path / "fox.png"]
    assert np.array_equal(read_pixels(tmp_path / "fox.png"), expected)


def test_floats_become_bytes_as_in_diffusers(tmp_path: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    floats = np.random.default_rng(0).random((1, 9, 11, 3), dtype=np.float32)
    Result(seed=1, images=floats).save(tmp_path / "fox.png")
    assert np.array_equal(read_pixels(tmp_path / "fox.png"), np.asarray(VaeImageProcessor.numpy_to_pil(floats)[0]))


def test_bfloat16_tensors_can_be_saved(tmp_path: Path) -> None:
    Result(seed=1, images=torch.full((1, 3, 4, 4), 0.5, dtype=torch.bfloat16)).save(tmp_path / "grey.png")
    assert (read_pixels(tmp_path / "grey.png") == 128).all()


def test_several_images_are_numbered(tmp_path: Path) -> None:
    floats = colours(3, 4, 6, 3)
    paths = Result(seed=1, images=floats).save(tmp_path / "red.fox.png")
    assert [path.name for path in paths] == ["red.fox-0.png", "red.fox-1.png", "red.fox-2.png"]
    for path, expected in zip(paths, as_bytes(floats), strict=True):
        assert np.array_equal(read_pixels(path), expected)
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize(
    ("name", "format"), [("a.PNG", "PNG"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
@pytest.mark.parametrize("channels", [3, 4])
def test_the_suffix_decides_the_format(tmp_path: Path, name: str, format: str, channels: int) -> None:
    Result(seed=1, images=np.full((1, 8, 6, channels), 0.5, dtype=np.float32)).save(str(tmp_path / name))
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (format, (6, 8))
        assert abs(int(np.asarray(image)[..., :3].mean()) - 128) <= 2


def test_a_png_carries_seed_and_parameters(tmp_path: Path) -> None:
    parameters = {
        "prompt": "ein Fuchs 🦊",
        "guidance_scale": 3.0,
        "sigmas": [1.0, 0.5],
        "image": Image.new("RGB", (2, 2)),
    }
    Result(seed=7, images=[Image.new("RGB", (4, 4))], parameters=parameters).save(tmp_path / "fox.png")
    with Image.open(tmp_path / "fox.png") as image:
        told = json.loads(image.text["parameters"])
    assert told == {"prompt": "ein Fuchs 🦊", "guidance_scale": 3.0, "sigmas": [1.0, 0.5], "seed": 7}


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_mp4_keeps_frames_rate_size_and_colours(tmp_path: Path, output_type: str) -> None:
    floats = smooth_video(9, 48, 64)[None]
    frames = {
        "pil": [[Image.fromarray(frame) for frame in as_bytes(floats)[0]]],
        "np": floats,
        "pt": torch.from_numpy(floats).movedim(-1, 2),
    }[output_type]
    Result(seed=1, frames=frames, fps=24).save(tmp_path / "fox.mp4")
    video, stream = read_mp4(tmp_path / "fox.mp4")
    assert video.shape == (9, 48, 64, 3)
    assert stream.average_rate == 24
    assert float(stream.duration * stream.time_base) == pytest.approx(9 / 24)
    assert stream.codec_context.pix_fmt == "yuv420p"
    assert np.abs(video.astype(int) - as_bytes(floats)[0]).mean() < 4


@pytest.mark.parametrize(("fps", "rate"), [(None, 16), (23.976, Fraction(2997, 125)), (0.5, Fraction(1, 2))])
def test_mp4_plays_at_the_rate_of_the_result(tmp_path: Path, fps: float | None, rate: Fraction) -> None:
    Result(seed=1, frames=smooth_video(3, 32, 32)[None], fps=fps).save(tmp_path / "fox.mp4")
    assert read_mp4(tmp_path / "fox.mp4")[1].average_rate == rate


def test_mp4_of_odd_size_repeats_the_last_row_and_column(tmp_path: Path) -> None:
    floats = smooth_video(2, 33, 47)
    Result(seed=1, frames=floats[None]).save(tmp_path / "fox.mp4")
    video, _ = read_mp4(tmp_path / "fox.mp4")
    assert video.shape == (2, 34, 48, 3)
    assert np.abs(video[:, :33, :47].astype(int) - as_bytes(floats)).mean() < 4
    assert np.abs(video[:, 33].astype(int) - video[:, 32]).mean() < 4


@pytest.mark.parametrize("channels", [1, 2])
def test_mp4_has_the_sound_of_each_video(tmp_path: Path, channels: int) -> None:
    rate, seconds = 24000, 0.5
    time = np.arange(int(rate * seconds)) / rate
    tones = np.stack([[np.sin(2 * np.pi * (300 * (video + 1) + 200 * each) * time) * 0.5 for each in range(channels)]
                      for video in range(2)]).astype(np.float32)  # fmt: skip
    frames = np.stack([smooth_video(12, 32, 32)] * 2)
    paths = Result(seed=1, frames=frames, fps=24, audio=torch.from_numpy(tones), sample_rate=rate).save(
        tmp_path / "fox.mp4"
    )
    for path, expected in zip(paths, tones):
        with av.open(path) as container:
            stream = container.streams.audio[0]
            assert stream.rate == rate
            decoded = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1)
        assert len(decoded) == channels
        for heard, tone in zip(decoded, expected):
            assert np.corrcoef(heard[2048:10000], tone[2048:10000])[0, 1] > 0.95
        assert len(read_mp4(path)[0]) == 12


def test_other_formats_say_that_they_have_no_sound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    audio = torch.zeros(1, 1, 100)
    Result(seed=1, frames=smooth_video(2, 8, 8)[None], audio=audio, sample_rate=100).save(tmp_path / "fox.gif")
    assert "no sound: only MP4" in caplog.text


def test_mp4_is_written_where_pyav_has_no_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    floats = smooth_video(5, 33, 48)
    Result(seed=1, frames=floats[None]).save(tmp_path / "fox.mp4")
    video, stream = read_mp4(tmp_path / "fox.mp4")
    assert (stream.codec_context.name, stream.average_rate, video.shape) == ("mpeg4", 16, (5, 34, 48, 3))
    assert np.abs(video[:, :33].astype(int) - as_bytes(floats)).mean() < 4


@pytest.mark.parametrize("name", ["fox.mp4", "fox.gif", "fox.webp"])
def test_the_same_video_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    written = []
    for _ in range(2):
        Result(seed=1, frames=smooth_video(6, 32, 48)[None]).save(tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(("suffix", "unit"), [(".gif", 10), (".webp", 1)])
def test_animations_keep_every_frame_and_their_time(tmp_path: Path, suffix: str, unit: int) -> None:
    path = tmp_path / f"fox{suffix}"
    Result(seed=1, frames=smooth_video(8, 15, 17)[None], fps=16).save(path)
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (8, (17, 15), 0)
    durations = read_durations(path)
    assert abs(sum(durations) - 500) <= unit
    assert all(abs(duration - 62.5) <= unit for duration in durations)


def test_several_videos_are_numbered(tmp_path: Path) -> None:
    frames = np.stack([smooth_video(2, 16, 16), smooth_video(2, 16, 16)[::-1]])
    paths = Result(seed=1, frames=frames).save(tmp_path / "fox.mp4")
    assert [path.name for path in paths] == ["fox-0.mp4", "fox-1.mp4"]
    first, second = (read_mp4(path)[0] for path in paths)
    assert first[0, ..., 2].mean() < first[1, ..., 2].mean()
    assert second[0, ..., 2].mean() > second[1, ..., 2].mean()


@pytest.mark.parametrize("name", ["fox.mp4", "fox.webp"])
def test_the_fastest_rate_can_be_played(tmp_path: Path, name: str) -> None:
    frames = smooth_video(2, 32, 32)[None]
    Result(seed=1, frames=frames, fps=FASTEST).save(tmp_path / name)
    with pytest.raises(ParameterError, match=f"at most {FASTEST} frames a second"):
        Result(seed=1, frames=frames, fps=FASTEST + 1).save(tmp_path / name)


@pytest.mark.parametrize("fps", [0, 0.009, -1, float("nan"), float("inf"), 51])
def test_a_rate_that_cannot_be_played_is_refused(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ParameterError, match="fps") as caught:
        Result(seed=1, frames=smooth_video(2, 8, 8)[None], fps=fps).save(tmp_path / "fox.gif")
    assert caught.value.field == "fps"


@pytest.mark.parametrize(
    ("result", "accepted"),
    [
        (Result(seed=1, images=[Image.new("RGB", (4, 4))]), ".png, .jpg, .jpeg, .webp"),
        (Result(seed=1, frames=[[Image.new("RGB", (4, 4))]]), ".mp4, .gif, .webp"),
    ],
)
@pytest.mark.parametrize("name", ["fox", "fox.tiff", "fox."])
def test_an_unknown_suffix_is_refused_with_those_accepted(
    tmp_path: Path, result: Result, accepted: str, name: str
) -> None:
    with pytest.raises(UsageError, match=accepted):
        result.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "result",
    [
        Result(seed=1, images=torch.rand(1, 16, 32)),  # packed
        Result(seed=1, images=torch.rand(1, 16, 4, 4)),
        Result(seed=1, images=torch.randn(1, 4, 8, 8) * 3),
        Result(seed=1, images=torch.rand(1, 3, 8, 8), parameters={"output_type": "latent"}),
        Result(seed=1, images=np.full((1, 4, 4, 3), np.nan)),
        Result(seed=1, frames=torch.rand(1, 16, 5, 4, 4)),
    ],
)
def test_latents_are_refused_by_naming_output_type(tmp_path: Path, result: Result) -> None:
    with pytest.raises(UsageError, match="output_type"):
        result.save(tmp_path / "fox.webp")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("result", "name"),
    [
        (Result(seed=1), "fox.png"),
        (Result(seed=1, images=[]), "fox.png"),
        (Result(seed=1, images=["fox"]), "fox.png"),
        (Result(seed=1, frames=[[]]), "fox.mp4"),
        (Result(seed=1, frames=[Image.new("RGB", (4, 4))]), "fox.mp4"),
        (Result(seed=1, frames=smooth_video(2, 8, 8)[None], audio=torch.zeros(2, 100), sample_rate=16000), "fox.mp4"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path: Path, result: Result, name: str) -> None:
    with pytest.raises(UsageError):
        result.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing"):
        Result(seed=1, images=[Image.new("RGB", (4, 4))]).save(tmp_path / "missing" / "fox.png")
    assert list(tmp_path.iterdir()) == []


def test_a_path_can_be_checked_before_there_is_a_result(tmp_path: Path) -> None:
    assert check_path(tmp_path / "fox.webp", "images") == "WEBP"
    assert check_path(str(tmp_path / "fox.MP4"), "videos") == "MP4"
    with pytest.raises(UsageError, match="accepted are .mp4"):
        check_path(tmp_path / "fox.png", "videos")
    with pytest.raises(UsageError, match="missing"):
        check_path(tmp_path / "missing" / "fox.png", "images")


@pytest.mark.parametrize(("name", "problem"), [("x" * 300, "too long"), ("狐" * 90, "too long"), ("a\0b", "zero byte")])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        check_path(tmp_path / f"{name}.png", "images")
    with pytest.raises(UsageError, match="there is no folder"):
        check_path(tmp_path / name / "fox.png", "images")


def test_the_longest_name_that_is_accepted_can_be_written_and_numbered(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 246}.png"
    assert check_path(path, "images") == "PNG"
    written = Result(seed=1, images=[Image.new("RGB", (4, 4))] * 12).save(path)
    assert sorted(tmp_path.iterdir()) == sorted(written)


@pytest.mark.parametrize("path", ["12:30.mp4", "12:30/fox.mp4"])
def test_an_mp4_may_have_a_colon_in_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("12:30").mkdir()
    assert Result(seed=1, frames=smooth_video(3, 32, 32)[None], fps=8).save(path) == [Path(path)]
    assert len(read_mp4(Path(path).absolute())[0]) == 3


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "fox.png").mkdir()
    with pytest.raises(UsageError, match="folder"):
        Result(seed=1, images=[Image.new("RGB", (4, 4))]).save(tmp_path / "fox.png")


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    path.write_bytes(b"old")
    Result(seed=1, images=[Image.new("RGB", (4, 4), "red")]).save(path)
    assert read_pixels(path)[0, 0].tolist() == [255, 0, 0]


def test_a_failed_save_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []

    def encode(image: Image.Image, file: BinaryIO, *args: object, **options: object) -> None:
        file.write(b"half")
        encoded.append(image)
        if len(encoded) == 2:
            raise OSError("no space left")

    (tmp_path / "fox-0.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", encode)
    with pytest.raises(OSError, match="no space left"):
        Result(seed=1, images=colours(3, 4, 4, 3)).save(tmp_path / "fox.png")
    assert [path.name for path in tmp_path.iterdir()] == ["fox-0.png"]
    assert (tmp_path / "fox-0.png").read_bytes() == b"old"


def test_importing_the_module_loads_nothing_heavy() -> None:
    program = "import sys, triptych.result; print({'torch', 'numpy', 'PIL', 'av'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_the_layers_of_every_output_are_files_of_their_own(tmp_path: Path, kind: str) -> None:
    layers: Any = [np.full((2, 4, 4, 4), value) for value in (0.2, 0.8)]
    if kind == "pil":
        layers = [[Image.new("RGBA", (4, 4), value) for _ in range(2)] for value in ((51,) * 4, (204,) * 4)]
    elif kind == "pt":
        layers = [torch.from_numpy(each).movedim(-1, 1) for each in layers]
    written = Result(seed=1, images=layers).save(tmp_path / "fox.png")
    assert [path.name for path in written] == [f"fox-{k}.png" for k in range(4)]
    assert [Image.open(path).getpixel((0, 0)) for path in written] == [(51,) * 4, (51,) * 4, (204,) * 4, (204,) * 4]
