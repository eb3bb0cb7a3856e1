"""The graph of a recipe: what is refused at start-up, how it is cut, and what travels."""

import pytest

from triptych.errors import RecipeError
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.graph import check_recipe, live_after, route_of

E, D, C = RoleType.ENCODER, RoleType.DENOISER, RoleType.DECODER


def stage(role: RoleType, reads: str = "", writes: str = "", tasks: str | None = None) -> type[Stage]:
    body = {
        "role": role,
        "reads": set(reads.split()),
        "writes": set(writes.split()),
        "tasks": set(tasks.split()) if tasks else None,
        "run": lambda self, state: None,
    }
    return type("Some", (Stage,), body)


TEXT = ("text", stage(E, "prompt", "prompt_embeds"))
IMAGE = ("image", stage(E, "image", "image_latents", tasks="edit"))
NOISE = ("noise", stage(D, "prompt_embeds image_latents generator", "latents generator"))
DECODE = ("decode", stage(C, "latents", "images"))
RECIPE = [TEXT, IMAGE, NOISE, DECODE]
PARAMETERS = {"prompt", "image", "seed"}


def test_a_sound_recipe_passes() -> None:
    check_recipe(RECIPE, PARAMETERS, "Family")


def test_a_field_nobody_writes_is_refused_with_stage_field_and_a_guess() -> None:
    broken = [TEXT, ("noise", stage(D, "promt_embeds", "images"))]
    with pytest.raises(RecipeError, match="'noise' of Family reads 'promt_embeds'.*did you mean 'prompt_embeds'"):
        check_recipe(broken, PARAMETERS, "Family")


def test_a_field_written_only_later_is_refused() -> None:
    with pytest.raises(RecipeError, match="'noise'.*'prompt_embeds'.*written only later, by 'text'"):
        check_recipe([NOISE, TEXT, IMAGE, DECODE], {*PARAMETERS, "image_latents"}, "Family")


def test_a_cycle_is_called_one() -> None:
    one, other = ("one", stage(E, "b", "a")), ("other", stage(E, "a", "b images"))
    with pytest.raises(RecipeError, match="cycle: stage 'one' reads 'b', which 'other' writes"):
        check_recipe([one, other], PARAMETERS, "Family")


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(RecipeError, match="two stages named 'text'"):
        check_recipe([TEXT, TEXT, IMAGE, NOISE, DECODE], PARAMETERS, "Family")


def test_a_recipe_without_a_result_is_refused() -> None:
    with pytest.raises(RecipeError, match="no stage of Family writes a result"):
        check_recipe([TEXT, IMAGE, NOISE], PARAMETERS, "Family")


def test_segments_are_maximal_runs_of_one_role() -> None:
    assert route_of(RECIPE, "edit") == [(E, ["text", "image"]), (D, ["noise"]), (C, ["decode"])]
    assert route_of(RECIPE, "text-to-image") == [(E, ["text"]), (D, ["noise"]), (C, ["decode"])]


def test_a_recipe_may_return_to_a_role() -> None:
    recipe = [TEXT, NOISE, ("up", stage(C, "latents", "latents")), ("refine", stage(D, "latents", "latents")), DECODE]
    assert [role for role, _ in route_of(recipe, "any")] == [E, D, C, D, C]


def test_what_travels_is_what_a_later_stage_of_the_task_reads() -> None:
    carried = live_after(RECIPE, "edit", "image")
    assert {"prompt_embeds", "image_latents", "generator"} <= carried
    assert "image" not in carried
    assert "prompt_embeds" not in live_after(RECIPE, "edit", "noise")
    assert "latents" in live_after(RECIPE, "edit", "noise")
    assert "latents" not in live_after(RECIPE, "edit", "decode")


def test_a_field_that_is_written_anew_before_it_is_read_does_not_travel() -> None:
    recipe = [TEXT, ("fresh", stage(D, "prompt_embeds", "latents")), DECODE]
    assert "latents" not in live_after(recipe, "any", "text")
