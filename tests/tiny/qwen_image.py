"""A tiny Qwen-Image repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 4 (default 8): a guessed factor changes the size of the picture and the positions;
- 6 latent channels, 24 packed (defaults 16 and 64), with means and deviations of their own;
- the scheduler's shift depends on the picture's size with other coefficients than the fallbacks in the pipeline, and
  `shift_terminal` stretches the last sigma.

The text encoder is the whole vision-language model, with a vision tower and an output head that text-to-image never
touches. The tokenizer counts the prompt template as the published one does: 34 tokens, which the pipeline drops.

Not free: the pipeline packs 2x2 latents, so the transformer's `patch_size` is 2 and its `in_channels` 4 x `z_dim`; it
divides timesteps by 1000 itself; the number of levels decides the scale factor, and a text head is hidden size / heads.
"""

from pathlib import Path

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from . import save, tokenizers
from .weights import randomise, statistics

Z_DIM = 6
TEXT_WIDTH = 24
SPARE_TOKENS = 7  # embeddings of no token, as in every published Qwen


def build(path: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write the repository to `path`."""
    tokenizer = tokenizers.qwen()
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer) + SPARE_TOKENS,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 40,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "mrope_section": [2, 1, 3]},
                "bos_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 16,
                "out_hidden_size": TEXT_WIDTH,
                "fullatt_block_indexes": [1],
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
            tie_word_embeddings=False,
        )
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * Z_DIM,
        out_channels=Z_DIM,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    means, deviations = statistics("qwen_image.latents", Z_DIM, seed)
    vae = AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=means,
        latents_std=deviations,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.6,
        max_shift=1.1,
        base_image_seq_len=16,
        max_image_seq_len=512,
        shift_terminal=0.05,
        shift=2.0,
    )

    randomise("text_encoder", text_encoder, seed=seed)
    randomise("transformer", transformer, seed=seed)
    # Pictures fill [-1, 1], and stay mostly inside.
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 1.5})
    return save(
        QwenImagePipeline(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        ),
        path,
        dtype,
    )
