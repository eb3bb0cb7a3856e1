"""A tiny Qwen-Image-Edit or Edit-Plus repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 32 (default 8), so a guessed factor changes every size; sizes are multiples of 64 then, and
  those that the pipeline derives from a picture are often none, because it rounds to 32;
- 6 latent channels, 24 packed (defaults 16 and 64), with means and deviations of their own;
- the processor cuts pictures into patches of 4 pixels (default 14), at most 48 of them, and looks at 2 copies of each.

Not free: the pipelines scale every picture to a megapixel before they encode it, so the autoencoder has few channels
and shrinks much, or a test would take minutes. They drop 64 tokens of the template, as the published tokenizer counts
it; this one cuts it into more, so some of the template stays in the prompt.
"""

import json
from pathlib import Path

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from . import save, tokenizers
from .weights import randomise, statistics

Z_DIM = 6
TEXT_WIDTH = 24
SPARE_TOKENS = 7  # embeddings of no token, as in every published Qwen
PATCH, MERGED, FRAMES = 4, 2, 2  # pixels, patches a side that become one token, copies of a picture
# transformers' default for Qwen2-VL, as numbers.
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def build(path: Path, *, seed: int = 0, dtype: str = "float32", plus: bool = False, zero_cond_t: bool = False) -> Path:
    """Write the repository to `path`; `plus` makes it one for several pictures, `zero_cond_t` one as of 2511."""
    tokenizer = tokenizers.qwen()
    vision_language_model = text_encoder(tokenizer, seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * Z_DIM,
        out_channels=Z_DIM,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    means, deviations = statistics("qwen_image_edit.latents", Z_DIM, seed)
    vae = AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=Z_DIM,
        dim_mult=[1, 1, 2, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False, True, False, True],
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
    # The few tokens of a picture show among the many of the text.
    gains = {f"transformer_blocks.{block}.attn.to_v.weight": 4.0 for block in range(2)}
    randomise("transformer", transformer, seed=seed, gains=gains)
    # Pictures fill [-1, 1], and stay mostly inside; a picture that is given shows in the result.
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 1.5, "encoder.conv_out.weight": 6.0})
    pipeline = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    save(
        pipeline(
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
    return path


def text_encoder(tokenizer: Qwen2TokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Build the whole vision-language model; its vision tower sees patches as `write_processor` cuts them."""
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer) + SPARE_TOKENS,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 40,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 4096,
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
                "patch_size": PATCH,
                "spatial_merge_size": MERGED,
                "temporal_patch_size": FRAMES,
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
    randomise("text_encoder", model, seed=seed)
    return model


def write_processor(path: Path, tokenizer: Qwen2TokenizerFast) -> None:
    """Add the processor's files and its entry in the index.

    They are written by hand: transformers makes a `Qwen2VLProcessor` only where torchvision is, for its videos.
    """
    tokenizer.save_pretrained(path / "processor")
    config = {
        "processor_class": "Qwen2VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": MERGED,
        "temporal_patch_size": FRAMES,
        "min_pixels": 16 * 16,
        "max_pixels": 24 * 32,
        "image_mean": MEAN,
        "image_std": DEVIATION,
    }
    (path / "processor" / "preprocessor_config.json").write_text(json.dumps(config, indent=2))
    index = json.loads((path / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
