"""True guidance is on where diffusers' pipelines have it on, and what is asked for in vain is remarked on."""

import logging

import pytest
import torch

from triptych.stages.guidance import true_guidance, warn_of_guidance


@pytest.mark.parametrize(
    ("scale", "negatives", "on"),
    [
        (4.0, ("", None), True),
        (4.0, (None, torch.zeros(1, 2, 3)), True),
        (4.0, (None, None), False),
        (1.0, ("ugly", None), False),
    ],
)
def test_true_guidance_takes_a_scale_above_one_and_a_negative_prompt_or_embeddings(
    scale: float, negatives: tuple[object, ...], on: bool
) -> None:
    assert true_guidance(scale, *negatives) is on


@pytest.mark.parametrize(
    ("scale", "prompt", "embeds", "remark"),
    [
        (4.0, None, None, "true_cfg_scale=4.0 has no effect"),
        (1.0, "ugly", None, "negative_prompt has no effect"),
        (1.0, None, torch.zeros(1, 2, 3), "negative_prompt has no effect"),
        (4.0, "", None, ""),
        (1.0, None, None, ""),
    ],
)
def test_half_of_what_guidance_needs_is_remarked_on(
    scale: float, prompt: str | None, embeds: object, remark: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_guidance({"true_cfg_scale": scale, "negative_prompt": prompt, "negative_prompt_embeds": embeds})
    assert caplog.text.count("has no effect") == bool(remark)
    assert remark in caplog.text
