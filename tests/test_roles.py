"""Roles: parsing, the default owner of a component, and filtering by role."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.errors import RoleError
from triptych.roles import WORKERS, RoleType, filter_modules_for_role, get_module_role, parse_roles, role_name

ENCODER = "text_encoder tokenizer image_encoder image_processor processor connectors vision_language_encoder " \
    "feature_extractor duration_head prompt_enhancer hy3dshape_conditioner hy3dshape_image_processor"  # fmt: skip
DENOISER = "transformer unconditional_transformer video_dit audio_dit dual_tower_bridge hy3dshape_model"
DECODER = "vae video_vae audio_vae vocoder diffusion_decoder hy3dshape_vae"
OWNED = {
    RoleType.ENCODER: ENCODER.split(),
    RoleType.DENOISER: DENOISER.split(),
    RoleType.DECODER: DECODER.split(),
}
NAMES = st.one_of(
    st.sampled_from([name + suffix for names in OWNED.values() for name in names for suffix in ("", "_2", "_3")]),
    st.sampled_from(["scheduler", "hy3dshape_scheduler", "guider", "unet", "transformer_x", "vae2", ""]),
    st.text(max_size=12),
)


@pytest.mark.parametrize("spelling", ["encoder", "ENCODER", " Encoder ", "EnCoDeR"])
def test_a_role_is_parsed_whatever_its_case(spelling: str) -> None:
    assert RoleType(spelling) is RoleType.ENCODER


def test_denoising_is_another_name_for_denoiser() -> None:
    assert RoleType("Denoising") is RoleType.DENOISER


@pytest.mark.parametrize("wrong", ["encodr", "", "vae", None, 3])
def test_an_unknown_role_is_an_error_that_lists_the_choices(wrong: object) -> None:
    with pytest.raises(RoleError) as error:
        RoleType(wrong)
    for role in RoleType:
        assert role.value in str(error.value)


def test_a_misspelled_role_gets_a_suggestion() -> None:
    with pytest.raises(RoleError, match="did you mean 'encoder'"):
        RoleType("encodr")


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in OWNED.items() for name in names])
def test_a_component_has_its_default_role_with_and_without_a_number(role: RoleType, name: str) -> None:
    assert get_module_role(name) is role
    assert get_module_role(f"{name}_2") is role
    assert get_module_role(f"{name}_13") is role


@pytest.mark.parametrize(
    "name", ["scheduler", "hy3dshape_scheduler", "guider", "unheard_of", "vae_x", "my_vae", "vae2"]
)
def test_schedulers_and_unknown_components_have_no_role(name: str) -> None:
    assert get_module_role(name) is None


def test_filtering_keeps_a_role_s_own_the_shared_and_the_allowed_in_order() -> None:
    names = ["vae", "scheduler", "transformer_2", "text_encoder", "transformer", "tokenizer"]
    assert filter_modules_for_role(names, "denoising") == ["scheduler", "transformer_2", "transformer"]
    kept = filter_modules_for_role(names, RoleType.ENCODER, extra_allowed_modules={"vae"})
    assert kept == ["vae", "scheduler", "text_encoder", "tokenizer"]


@given(st.lists(NAMES), st.sampled_from([*RoleType]), st.sets(NAMES))
def test_filtering_follows_the_rule_for_any_names(names: list[str], role: RoleType, extra: set[str]) -> None:
    kept = filter_modules_for_role(names, role, extra_allowed_modules=extra)
    everything = role in (RoleType.MONOLITHIC, RoleType.SERVER)
    expected = [n for n in names if everything or get_module_role(n) in (role, None) or n in extra]
    assert kept == expected


@given(st.lists(NAMES))
def test_every_component_is_kept_by_at_least_one_worker(names: list[str]) -> None:
    kept = {name for role in WORKERS for name in filter_modules_for_role(names, role)}
    assert kept == set(names)


def test_filtering_refuses_what_is_no_role() -> None:
    with pytest.raises(RoleError):
        filter_modules_for_role(["vae"], "painter")


def test_roles_are_joined_by_a_plus() -> None:
    assert parse_roles("encoder+Decoder") == {RoleType.ENCODER, RoleType.DECODER}
    assert parse_roles("monolithic") == set(WORKERS)
    assert parse_roles(RoleType.SERVER) == frozenset()


@pytest.mark.parametrize("wrong", ["encoder+server", "monolithic+encoder", "encoder+", "encoder,decoder", "", 7])
def test_what_cannot_be_joined_is_refused(wrong: object) -> None:
    with pytest.raises(RoleError):
        parse_roles(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["monolithic", "server", "encoder", "encoder+decoder", "encoder+denoiser"])
def test_a_set_of_roles_gets_back_the_name_it_was_parsed_from(name: str) -> None:
    assert role_name(parse_roles(name)) == name
