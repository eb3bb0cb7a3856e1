"""The stage contract: a role, a name, and no component that was not declared."""

import pytest
import torch

from triptych.components.need import Need
from triptych.errors import UndeclaredError
from triptych.roles import RoleType
from triptych.stages.base import Stage, Undeclared, stage_name
from triptych.state import View


class Blurring(Stage):
    role = RoleType.DECODER
    needs = {"vae": Need.DECODE}
    reads = {"latents"}
    writes = {"images"}

    def run(self, state: View) -> None:
        state.images = state.latents


def test_a_stage_without_a_role_is_a_type_error_when_it_is_defined() -> None:
    with pytest.raises(TypeError, match="Roleless declares no role"):

        class Roleless(Stage):
            def run(self, state: View) -> None: ...


def test_a_role_that_is_only_a_word_is_no_role() -> None:
    with pytest.raises(TypeError, match="declares no role"):

        class Worded(Stage):
            role = "encoder"  # type: ignore[assignment]

            def run(self, state: View) -> None: ...


def test_a_stage_inherits_the_role_of_its_base() -> None:
    class SharperBlurring(Blurring):
        pass

    assert SharperBlurring.role is RoleType.DECODER


def test_a_stage_without_run_cannot_be_built() -> None:
    class Idle(Stage):
        role = RoleType.ENCODER

    with pytest.raises(TypeError, match="abstract"):
        Idle("idle", {}, None, torch.device("cpu"))  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LTX2Refinement", "ltx2_refinement"),
        ("TextEncoding", "text_encoding"),
        ("I2VEncoding", "i2v_encoding"),
        ("VAEEncoding", "vae_encoding"),
        ("SD3TextEncoding", "sd3_text_encoding"),
        ("HunyuanVideo15Decoding", "hunyuan_video15_decoding"),
        ("T5Encoding", "t5_encoding"),
        ("Decoding", "decoding"),
    ],
)
def test_a_stage_is_named_after_its_class_with_acronyms_and_digits_together(name: str, expected: str) -> None:
    assert stage_name(type(name, (Blurring,), {})) == expected


def test_a_component_is_an_attribute_and_an_undeclared_one_names_stage_and_component() -> None:
    stage = Blurring("blurring", {"vae": "the vae", "transformer": Undeclared("blurring", "transformer")}, None, None)
    assert stage.vae == "the vae"
    with pytest.raises(UndeclaredError, match="'blurring' uses component 'transformer' without declaring it"):
        _ = stage.transformer
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
        _ = stage.unheard_of


def test_a_view_gives_declared_fields_only() -> None:
    fields = {"latents": 1, "prompt": "secret"}
    view = View(fields, "blurring", {"latents", "mask"}, {"images"})
    assert view.latents == 1
    assert view.mask is None
    view.images = 2
    assert fields["images"] == view.images == 2
    with pytest.raises(UndeclaredError, match="'blurring' uses field 'prompt'"):
        _ = view.prompt
    with pytest.raises(UndeclaredError, match="'blurring' uses field 'latents'"):
        view.latents = 3


def test_a_field_that_is_only_written_cannot_be_read_before_it_was() -> None:
    view = View({"images": "someone else's"}, "blurring", {"latents"}, {"images"})
    with pytest.raises(UndeclaredError, match="'blurring' uses field 'images'"):
        _ = view.images
