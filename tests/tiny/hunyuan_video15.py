"""Tiny HunyuanVideo 1.5 repositories: the published classes and layouts, other numbers everywhere.

Tasks, as published: `t2v` and `i2v` (which has SigLIP too). What differs from the defaults of diffusers, and what would
go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 4 in space and 2 in time (defaults 16 and 4): the video would get another size and length;
- 6 latent channels (default 32), so the transformer takes 6 + 6 + 1, and a scaling factor far from 1;
- `target_size` 32 (default 640), by which the pipelines choose a size; in `t2v` patches of 2x2 latents (default 1);
- SigLIP's width 20 (default 1152), of 28 x 28 pixels in patches of 14: 4 tokens (published 729);
- a shift of 3 in the scheduler, and a guider of scale 4 (default 7.5).

The text encoder has layers enough for two to be left out. The tokenizer counts the system message as the published one
does: 108 tokens, which the pipelines drop. ByT5 has no vocabulary but bytes.

Not free: the projection of ByT5's embeddings is 2048 wide, whatever the configuration.
"""

import json
from pathlib import Path
from unittest.mock import patch

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2TokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from . import save, tokenizers
from .weights import randomise

TASKS = ("t2v", "i2v")
LATENT_CHANNELS = 6
TEXT_WIDTH = 24
GLYPH_WIDTH = 18
SIGLIP_WIDTH = 20
SIGLIP_PIXELS = 28
SPARE_TOKENS = 7  # embeddings of no token, as in the published encoders

# Of the system message, each one token of the published tokenizer.
TEMPLATE_WORDS = (
    "system user assistant You are a helpful assistant Describe the video by detailing the following aspects The main"
    " content and theme of the video The color shape size texture quantity text and spatial relationships of the"
    " objects Actions events behaviors temporal relationships physical movement changes of the objects background"
    " environment light style and atmosphere camera angles movements and transitions used in the video"
)


def build(
    path: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    task: str = "t2v",
    guidance_scale: float = 4.0,
    use_meanflow: bool = False,
) -> Path:
    """Write the repository of one of `TASKS` to `path`.

    A distilled model is one with a `guidance_scale` of 1, which switches guidance off; the one distilled to few steps
    is told the next step's timestep too (`use_meanflow`).
    """
    if task not in TASKS:
        raise ValueError(f"task is one of {', '.join(TASKS)}, not {task}")
    tokenizer, glyph_tokenizer = _tokenizer(), ByT5Tokenizer()
    text_encoder = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=len(tokenizer) + SPARE_TOKENS,
            hidden_size=TEXT_WIDTH,
            intermediate_size=40,
            num_hidden_layers=5,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 20000.0, "mrope_section": [2, 1, 3]},
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(glyph_tokenizer) + SPARE_TOKENS,
            d_model=GLYPH_WIDTH,
            d_kv=6,
            d_ff=28,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=40,
            feed_forward_proj="gated-gelu",
            pad_token_id=glyph_tokenizer.pad_token_id,
            eos_token_id=glyph_tokenizer.eos_token_id,
        )
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(6, 12, 24),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        scaling_factor=0.6,
    )
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=14,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=2 if task == "t2v" else 1,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=GLYPH_WIDTH,
        image_embed_dim=SIGLIP_WIDTH,
        rope_theta=100.0,
        rope_axes_dim=(2, 4, 8),
        target_size=32,
        task_type=task,
        use_meanflow=use_meanflow,
    )
    modules = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "transformer": transformer, "vae": vae}
    pipeline: type = HunyuanVideo15Pipeline
    vision = {}
    if task == "i2v":
        pipeline = HunyuanVideo15ImageToVideoPipeline
        modules["image_encoder"] = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=SIGLIP_WIDTH,
                intermediate_size=36,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=SIGLIP_PIXELS,
                patch_size=14,
            )
        )
        vision["feature_extractor"] = SiglipImageProcessorPil(
            size={"height": SIGLIP_PIXELS, "width": SIGLIP_PIXELS},
            image_mean=[0.45, 0.4, 0.35],
            image_std=[0.3, 0.25, 0.35],
        )
    for name, module in modules.items():
        randomise(name, module, seed=seed)
    save(
        pipeline(
            tokenizer=tokenizer,
            tokenizer_2=glyph_tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            guider=ClassifierFreeGuidance(guidance_scale=guidance_scale),
            **modules,
            **vision,
        ),
        path,
        dtype,
    )
    if vision:
        index = json.loads((path / "model_index.json").read_text())
        index["feature_extractor"] = ["transformers", "SiglipImageProcessor"]  # as published
        (path / "model_index.json").write_text(json.dumps(index, indent=2))
    return path


def _tokenizer() -> Qwen2TokenizerFast:
    with patch.object(tokenizers, "TEMPLATE_WORDS", TEMPLATE_WORDS):
        tokenizer = tokenizers.qwen()
    tokenizer.add_tokens([" " * 8])  # the message's indentation
    return tokenizer
