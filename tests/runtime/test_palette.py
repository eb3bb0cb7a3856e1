"""The palette: what a decoder learns of its colours, from random latents and from the pictures that it makes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import triptych
from triptych import embedded
from triptych.engine.local import LocalEngine
from triptych.roles import RoleType
from triptych.runtime import palette
from triptych.runtime.palette import ENOUGH, Palette, fitted, picture_of, recall, remember, rows_of
from triptych.runtime.preview import Projection
from triptych.runtime.segment import finish
from triptych.state import State

CHANNELS = 3
TRUE = torch.tensor(np.random.default_rng(0).normal(0, 0.2, (2 * CHANNELS + 1, 48)), dtype=torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    return tmp_path


def picture(number: int, wide: float = 0.3) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents, and what a decoder that is as linear as the map would make of them; colours end at 0 and 1."""
    latents = torch.randn((1, CHANNELS, 8, 8), generator=torch.Generator().manual_seed(number)) * wide
    return latents, {"images": Projection(TRUE + 0.5 * (torch.arange(7) == 6)[:, None]).colours(latents, 1.0)[None]}


def error(found: Projection | None) -> float:
    assert found is not None
    latents, fields = picture(99)
    return float((found.colours(latents, 1.0) - fields["images"][0]).abs().mean())


def prepared() -> Palette:
    """A palette that knows something, though nothing true, of random latents."""
    remember("model", Projection(torch.zeros_like(TRUE)), 0)
    return Palette("model")


def test_the_more_pictures_are_seen_the_better_is_the_map() -> None:
    made, errors = prepared(), []
    for number in range(ENOUGH + 2):
        made.see(*picture(number))
        errors.append(error(made.projection))
    assert errors[-1] < 0.5 * errors[1]
    assert made.seen == ENOUGH


def test_the_first_picture_counts_until_there_is_another() -> None:
    made, other = prepared(), prepared()
    latents, _ = picture(5)
    made.see(latents, {"images": torch.rand(1, 3, 32, 32)})  # what a warm-up makes
    for number in (0, 1, 2):
        made.see(*picture(number))
    for number in (9, 0, 1, 2):
        other.see(*picture(number))
    assert made.projection is not None and other.projection is not None
    assert torch.equal(made.projection.weight, other.projection.weight)


def test_what_is_kept_stands_for_the_pictures_it_was_made_of() -> None:
    kept = Projection(TRUE + 0.5 * (torch.arange(7) == 6)[:, None])
    errors = []
    for seen in (0, ENOUGH - 1):
        remember("model", kept, seen)
        again = Palette("model")
        again.see(picture(7)[0], {"images": torch.zeros(1, 3, 32, 32)})  # far from the truth
        assert again.seen == seen + 1
        errors.append(error(again.projection))
    assert 5 * errors[1] < errors[0], "one picture does not outweigh many"


def test_colours_that_end_at_black_and_white_do_not_bend_the_map() -> None:
    rows = [rows_of(latents, picture_of(fields)) for latents, fields in (picture(k, wide=1.5) for k in range(8))]
    cut = float(torch.cat([colours for _, colours in rows]).lt(0.001).double().mean())
    assert cut > 0.1, "much is black"
    free = fitted(rows, 1e-3)
    rounds, palette.ROUNDS = palette.ROUNDS, 1
    try:
        bent = fitted(rows, 1e-3)
    finally:
        palette.ROUNDS = rounds
    assert error(free) < 0.5 * error(bent)


@pytest.mark.parametrize(
    "fields",
    [
        {"images": [Image.new("RGB", (12, 8), (255, 0, 0))]},
        {"images": np.broadcast_to(np.array([1.0, 0, 0], np.float32), (2, 8, 12, 3))},
        {"images": torch.tensor([1.0, 0, 0])[None, :, None, None].expand(2, 3, 8, 12)},
        {"images": [[Image.new("RGBA", (12, 8), (255, 0, 0, 9))] * 2]},
        {"images": None, "frames": [[Image.new("RGB", (12, 8), each) for each in ("blue", "red", "blue")]]},
        {"frames": torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, 1]])[None, :, :, None, None].expand(1, 3, 3, 8, 12)},
    ],
    ids=["pil", "np", "pt", "layers", "film", "film-pt"],
)
def test_pictures_of_every_kind_are_looked_at(fields: dict[str, Any]) -> None:
    found = picture_of(fields)
    assert found.shape == (3, 8, 12)
    assert torch.equal(found.mean((1, 2)), torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("fields", [{}, {"images": []}, {"images": torch.rand(1, 4, 8, 8), "output_type": "latent"}])
def test_what_is_no_picture_is_told(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        picture_of(fields)


def test_latents_of_another_shape_than_the_picture_are_told() -> None:
    with pytest.raises(ValueError, match="8 x 8 positions"):
        rows_of(torch.rand(1, 3, 8, 8), torch.rand(3, 32, 64))


def test_large_latents_are_looked_at_here_and_there() -> None:
    latents, colours = rows_of(torch.rand(1, 3, 64, 64), torch.rand(3, 256, 256))
    assert len(latents) == len(colours) <= palette.POSITIONS
    assert len({float(each) for each in latents[:, 0]}) == len(latents)


@pytest.mark.parametrize("kept", [{"weight": torch.zeros(3)}, {"weight": torch.zeros(3, 48), "seen": -1}, {"seen": 3}])
def test_a_file_of_another_form_is_as_good_as_none(cache: Path, kept: dict[str, Any]) -> None:
    from triptych import wire

    (cache / "previews").mkdir()
    (cache / "previews" / "model.safetensors").write_bytes(wire.pack(kept, {}))
    assert recall("model") == (None, 0)


def test_a_fit_of_random_latents_keeps_what_was_seen(model: triptych.Model) -> None:
    state = model.admit(triptych.Request(prompt="red heart", seed=0, num_inference_steps=1, output_type="pt"))
    for _ in range(2):
        finish(model.segment(state))
    made, handed = Palette("model"), state.copy()
    finish(model.segment(state))
    made.see(handed.fields["latents"], {"images": state.result.images})
    assert made.projection is None, "one picture alone says too little"

    def decode(each: State) -> None:
        finish(model.segment(each))

    for _ in made.draw(handed, decode):
        pass
    assert made.projection is not None and made.seen == 1
    assert not torch.equal(made.projection.weight, made._prior.weight)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def model() -> triptych.Model:
    return triptych.load(embedded.path(), device="cpu")


def test_after_the_warm_up_previews_need_not_be_waited_for() -> None:
    devices: dict[str, Any] = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    with LocalEngine(embedded.path(), **devices, dtype="float32") as engine:
        (replica,) = engine.router.replicas
        lanes: dict[Any, Any] = replica.lanes  # type: ignore[attr-defined]
        decoder = lanes[RoleType.DECODER]
        assert decoder._fitted is not None, "it has begun"
        assert decoder._fitted.wait(60)
        assert engine.find_projection(0.0) is not None
        job = engine.submit(triptych.Request(prompt="a dog", seed=0, num_inference_steps=4), previews=1)
        job.result(60)
        assert [event.kind for event in job.events()].count("preview") == 1
