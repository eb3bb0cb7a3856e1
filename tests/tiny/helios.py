"""Tiny Helios repositories: the published classes and layouts, other numbers everywhere.

Versions, as published: `base` denoises a chunk at one size (`HeliosPipeline`); `mid` in a pyramid of sizes with
CFG-Zero* (`HeliosPyramidPipeline`, `is_cfg_zero_star`); `distilled` in a pyramid by DMD (`is_distilled`).

The text encoder and the autoencoder are those of `tiny.wan` (6 latent channels, shrinking by 4 in space and 2 in
time). What else would go wrong if it were guessed:

- pyramids have 2 levels (default 3), that meet at 0.6 of the way (defaults 1/3 and 2/3) and have a gamma of 0.25
  (default 1/3), so sizes in pixels are multiples of 16, not of 32;
- 800 training timesteps (default 1000); the shift depends on the number of tokens (default: it does not), so the
  levels of a pyramid and videos of different sizes have different timesteps;
- the rotary embedding gives time 6 and the two sides 4 of a head's 14 dimensions (44, 42 and 42 of 128).

Not free: patches are 1x2x2, because the transformer pads its history for those; sizes in pixels are multiples of 16;
keys of the history are not amplified, because diffusers' transformer fails in bfloat16 where they are. In bfloat16,
videos higher than 32 pixels must be wider than 32 too: torch 2.13's convolution of 4x8x8 reads memory that nobody
wrote where its output is one column of several rows.
"""

import tempfile
from pathlib import Path

from diffusers import (
    AutoencoderKLWan,
    HeliosDMDScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
)
from transformers import UMT5EncoderModel

from . import save, tokenizers, wan
from .weights import randomise

VERSIONS = ("base", "mid", "distilled")
SAMPLING = {"num_train_timesteps": 800, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
PYRAMID = {"stages": 2, "stage_range": [0, 0.6, 1], "gamma": 0.25}


def build(path: Path, *, seed: int = 0, dtype: str = "float32", version: str = "base") -> Path:
    """Write the repository of one of `VERSIONS` to `path`."""
    if version not in VERSIONS:
        raise ValueError(f"version is one of {', '.join(VERSIONS)}, not {version}")
    with tempfile.TemporaryDirectory() as folder:
        text = wan.build(Path(folder), seed=seed)
        text_encoder = UMT5EncoderModel.from_pretrained(text / "text_encoder")
        vae = AutoencoderKLWan.from_pretrained(text / "vae")
    transformer = HeliosTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=14,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=wan.TEXT_WIDTH,
        freq_dim=20,
        ffn_dim=44,
        num_layers=2,
        eps=1e-5,
        rope_dim=(6, 4, 4),
        rope_theta=2000.0,
    )
    randomise("transformer", transformer, seed=seed)
    components = {
        "tokenizer": tokenizers.unigram(),
        "text_encoder": text_encoder,
        "vae": vae,
        "transformer": transformer,
    }
    if version == "base":
        pipeline = HeliosPipeline(scheduler=HeliosScheduler(**SAMPLING, stages=1), **components)
    elif version == "mid":
        scheduler = HeliosScheduler(**SAMPLING, **PYRAMID)
        pipeline = HeliosPyramidPipeline(scheduler=scheduler, is_cfg_zero_star=True, **components)
    else:
        scheduler = HeliosDMDScheduler(**SAMPLING, **PYRAMID)
        pipeline = HeliosPyramidPipeline(scheduler=scheduler, is_distilled=True, **components)
    return save(pipeline, path, dtype)
