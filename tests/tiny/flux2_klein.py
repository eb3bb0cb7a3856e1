"""A tiny FLUX.2-klein repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 4 (default 8), so a guessed factor changes the size of the picture;
- 6 latent channels, 24 packed (defaults 32 and 128), and the decoder has other widths than the encoder;
- the batch-norm statistics are far from 0 and 1, and `batch_norm_eps` is large enough to be visible in float32;
- the text encoder has 31 layers of which 27 are read (published: 36), and an output head nobody reads.

Not free: the pipeline packs 2x2 latents whatever `patch_size` says and divides timesteps by 1000 itself; it reads the
hidden states 9, 18 and 27; the transformer's own `patch_size` has to be 1; reference images need 64 pixels a side.
"""

from pathlib import Path

from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from . import save, tokenizers
from .weights import randomise

LATENT_CHANNELS = 6
PACKED_CHANNELS = 4 * LATENT_CHANNELS
TEXT_WIDTH = 12
HIDDEN_STATES_READ = 3
SPARE_TOKENS = 7  # embeddings of no token, as in every published Qwen


def build(path: Path, *, seed: int = 0, dtype: str = "float32", is_distilled: bool = False) -> Path:
    """Write the repository to `path`; `is_distilled` switches guidance off, as in the published 4-step models."""
    tokenizer = tokenizers.qwen()
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer) + SPARE_TOKENS,
            hidden_size=TEXT_WIDTH,
            intermediate_size=20,
            num_hidden_layers=31,
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
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=PACKED_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=HIDDEN_STATES_READ * TEXT_WIDTH,
        timestep_guidance_channels=18,
        mlp_ratio=2.5,
        axes_dims_rope=(4, 2, 4, 6),
        rope_theta=1500,
        eps=1e-5,
        guidance_embeds=False,  # as in the published klein: the pipeline always passes `guidance=None`
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 12, 16),
        decoder_block_out_channels=(12, 12, 20),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=96,
        use_quant_conv=True,
        use_post_quant_conv=True,
        batch_norm_eps=0.013,
        batch_norm_momentum=0.2,
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
    # Pictures stay mostly inside [-1, 1], and a reference image changes more than the last digits.
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 0.5, "encoder.conv_out.weight": 2.0})
    return save(
        Flux2KleinPipeline(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            is_distilled=is_distilled,
        ),
        path,
        dtype,
    )
