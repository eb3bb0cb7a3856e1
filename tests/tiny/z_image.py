"""A tiny Z-Image repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 4 (default 8), so a guessed factor changes the size of the picture;
- 6 latent channels (default 16), with a scale and a shift that both show;
- the scheduler's shift depends on the picture's size with other coefficients than the fallbacks in the pipeline;
- the transformer knows fewer positions of tokens, rows and columns than by default (1024, 512 and 512).

The text encoder is a `Qwen3Model` of four layers: the pipeline reads the last hidden state but one, so its last layer
and its norm are idle.

Not free: the pipeline runs the transformer at the patch size 2 (one frame); its text and its picture are padded to
multiples of 32 tokens; a text position must lie within `axes_lens[0]`; the timestep embedding is 1024 wide inside.
"""

from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from . import save, tokenizers
from .weights import randomise

LATENT_CHANNELS = 6
TEXT_WIDTH = 20
SPARE_TOKENS = 7  # embeddings of no token, as in every published Qwen


def build(path: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write the repository to `path`."""
    tokenizer = tokenizers.qwen()
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer) + SPARE_TOKENS,
            hidden_size=TEXT_WIDTH,
            intermediate_size=28,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-6,
        cap_feat_dim=TEXT_WIDTH,
        rope_theta=190.0,
        t_scale=900.0,
        axes_dims=[4, 6, 6],
        axes_lens=[140, 130, 136],
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 12, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=96,
        scaling_factor=0.61,
        shift_factor=0.23,
        use_quant_conv=True,
        use_post_quant_conv=True,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=2.0,
        use_dynamic_shifting=True,
        base_shift=0.6,
        max_shift=1.3,
        base_image_seq_len=64,
        max_image_seq_len=1024,
    )

    randomise("text_encoder", text_encoder, seed=seed)
    randomise("transformer", transformer, seed=seed)
    # Pictures stay mostly inside [-1, 1].
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 0.5})
    return save(
        ZImagePipeline(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        ),
        path,
        dtype,
    )
