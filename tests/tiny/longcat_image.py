"""A tiny LongCat-Image or LongCat-Image-Edit repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 16 (default 8), so a guessed factor changes every size; sizes are multiples of 32 then, and
  those that the pipeline derives from a picture are not always, because it rounds to 16;
- latents have a scale and a shift that both show;
- the scheduler's shift depends on the picture's size with other coefficients than the fallbacks in the pipeline;
- the processor cuts pictures into patches of 4 pixels (default 14), at most 48 of them, and looks at 2 copies of each.

The vision-language model ends what it writes at any of many tokens, so rewritten prompts are short.

Not free: the pipelines give latents 16 channels, pack them 2x2 and divide timesteps by 1000 themselves; they pad every
prompt to 512 tokens, scale every picture to a megapixel, and have the model read some thousand tokens of instructions
before it rewrites a prompt.
"""

import json
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)

from . import save, tokenizers
from .qwen_image_edit import TEXT_WIDTH, text_encoder, write_processor
from .weights import randomise

LATENT_CHANNELS = 16
ENDS_EVERY = 12  # each so many-th token ends a text
# Qwen's turns, whose content is a list of parts.
CHAT_TEMPLATE = (
    "{% for turn in messages %}"
    "<|im_start|>{{ turn['role'] }}\n"
    "{% for part in turn['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(
    path: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    edit: bool = False,
    generation: dict[str, object] | None = None,
) -> Path:
    """Write the repository to `path`; `generation` is what its settings for writing text say beside where it ends."""
    tokenizer = tokenizers.qwen()
    tokenizer.chat_template = CHAT_TEMPLATE
    vision_language_model = text_encoder(tokenizer, seed)
    ends = list(range(ENDS_EVERY, len(tokenizer), ENDS_EVERY))
    vision_language_model.config.text_config.eos_token_id = ends
    vision_language_model.generation_config.eos_token_id = ends
    transformer = LongCatImageTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(4, 4, 8, 8, 12),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=96,
        scaling_factor=0.61,
        shift_factor=0.23,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=2.0,
        use_dynamic_shifting=True,
        base_shift=0.6,
        max_shift=1.3,
        base_image_seq_len=64,
        max_image_seq_len=1024,
    )
    # A few words show among the padding, and the few tokens of a picture among those of the text.
    layers = [f"transformer_blocks.{block}.attn.{layer}" for block in range(2) for layer in ("to_v", "add_v_proj")]
    layers += [f"single_transformer_blocks.{block}.attn.to_v" for block in range(2)]
    gains = {f"{layer}.weight": 6.0 for layer in layers}
    randomise("transformer", transformer, seed=seed, gains=gains)
    # Pictures stay mostly inside [-1, 1]; a picture that is given shows in the result.
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 0.5, "encoder.conv_out.weight": 4.0})
    components = {
        "scheduler": scheduler,
        "vae": vae,
        "text_encoder": vision_language_model,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
    pipeline = LongCatImagePipeline(**components, text_processor=None)
    save(pipeline, path, dtype)
    write_processor(path, tokenizer)
    (path / "processor").rename(path / "text_processor")
    index = json.loads((path / "model_index.json").read_text())
    index["text_processor"] = index.pop("processor")
    if edit:
        index["_class_name"] = LongCatImageEditPipeline.__name__
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
    if generation:
        file = path / "text_encoder" / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **generation}))
    return path
