"""Noise levels are those of diffusers' pipelines."""

import numpy as np
import pytest
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from triptych.stages.noise_levels import even_sigmas, resolution_shift


@pytest.mark.parametrize("steps", [1, 3, 28])
def test_even_sigmas_go_from_one_to_the_last_step_and_not_to_zero(steps: int) -> None:
    sigmas = even_sigmas(steps)
    assert sigmas.dtype == np.float64 and len(sigmas) == steps
    assert sigmas[0] == 1 and sigmas[-1] == pytest.approx(1 / steps)
    assert np.allclose(np.diff(sigmas), -1 / steps)


def test_the_shift_is_that_of_the_configuration() -> None:
    config = {"base_image_seq_len": 10, "max_image_seq_len": 20, "base_shift": 1.0, "max_shift": 3.0}
    assert [resolution_shift(calculate_shift, config, tokens) for tokens in (10, 15, 20)] == pytest.approx([1, 2, 3])


def test_without_a_configuration_the_shift_is_that_of_the_pipelines() -> None:
    for tokens in (256, 1000, 4096):
        assert resolution_shift(calculate_shift, {}, tokens) == calculate_shift(tokens)
    assert resolution_shift(calculate_shift, {}, 4096, max_shift=1.16) == pytest.approx(1.16)
