"""A tiny Qwen-Image-Layered repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of diffusers is what differs in a tiny Qwen-Image-Edit (see `qwen_image_edit`). Beside
that, as published: pictures have four channels, layers have positions of their own, and the transformer is told whether
a picture lacks transparency. The vision-language model ends a caption at any of many tokens, so captions are short.

Not free: the pipeline scales every picture to 640 x 640 pixels or 1024 x 1024, and writes up to 512 tokens of caption.
"""

import json
from pathlib import Path

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)

from . import save, tokenizers
from .qwen_image_edit import TEXT_WIDTH, Z_DIM, text_encoder, write_processor
from .weights import randomise, statistics

ENDS_EVERY = 12  # each so many-th token ends a caption


def build(path: Path, *, seed: int = 0, dtype: str = "float32", generation: dict[str, object] | None = None) -> Path:
    """Write the repository to `path`; `generation` is what its settings for writing captions say beside that."""
    tokenizer = tokenizers.qwen()
    vision_language_model = text_encoder(tokenizer, seed)
    ends = list(range(ENDS_EVERY, len(tokenizer), ENDS_EVERY))
    vision_language_model.config.text_config.eos_token_id = ends
    vision_language_model.generation_config.eos_token_id = ends
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * Z_DIM,
        out_channels=Z_DIM,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        use_additional_t_cond=True,
        use_layer3d_rope=True,
    )
    means, deviations = statistics("qwen_image_layered.latents", Z_DIM, seed)
    vae = AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=Z_DIM,
        dim_mult=[1, 1, 2, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False, True, False, True],
        input_channels=4,
        latents_mean=means,
        latents_std=deviations,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.05, shift=2.0)

    # The few tokens of a picture show among the others.
    gains = {f"transformer_blocks.{block}.attn.to_v.weight": 4.0 for block in range(2)}
    randomise("transformer", transformer, seed=seed, gains=gains)
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 1.5, "encoder.conv_out.weight": 6.0})
    save(
        QwenImageLayeredPipeline(
            scheduler=scheduler,
            vae=vae,
            text_encoder=vision_language_model,
            tokenizer=tokenizer,
            processor=None,
            transformer=transformer,
        ),
        path,
        dtype,
    )
    write_processor(path, tokenizer)
    if generation:
        file = path / "text_encoder" / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **generation}))
    return path
