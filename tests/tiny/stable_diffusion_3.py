"""A tiny Stable Diffusion 3 repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 4 (default 8), and the transformer's sample size is 22 (default 128), so a guessed factor or
  sample size changes the size of the picture;
- 5 latent channels (default 16), with a scale and a shift that both show;
- the CLIP tokenizers' longest text is 39 tokens (published: 77), which the pipeline's constructor reads;
- the CLIPs differ in width and depth, together they are narrower than T5, and the second pads with "!" as published;
- there are positions for 26 x 26 patches (default 96 x 96).

As in the published 3.5 medium, queries and keys are normalised and the first blocks attend twice. `t5=False` leaves out
the third text encoder, `dynamic_shifting=True` lets the scheduler's shift depend on the picture's size.
"""

from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from . import save, tokenizers
from .flux import CLIP_LENGTH, clip
from .weights import randomise

LATENT_CHANNELS = 5
CLIP_WIDTHS = {"text_encoder": 12, "text_encoder_2": 16}
CLIP_LAYERS = {"text_encoder": 3, "text_encoder_2": 4}
CLIP_PROJECTIONS = {"text_encoder": 10, "text_encoder_2": 14}
T5_WIDTH = 36
BLOCKS = 3


def build(
    path: Path, *, seed: int = 0, dtype: str = "float32", t5: bool = True, dynamic_shifting: bool = False
) -> Path:
    """Write the repository to `path`."""
    tokenizer, tokenizer_2 = clip(), clip()
    tokenizer_2.pad_token = "!"
    text_encoders = {
        name: CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer) + 3,
                hidden_size=width,
                intermediate_size=20,
                num_hidden_layers=CLIP_LAYERS[name],
                num_attention_heads=2,
                max_position_embeddings=CLIP_LENGTH,
                projection_dim=CLIP_PROJECTIONS[name],
                layer_norm_eps=1e-6,
                hidden_act="gelu",
                bos_token_id=0,  # these two as published: the end of a text is then its largest id
                eos_token_id=2,
                pad_token_id=1,
            )
        )
        for name, width in CLIP_WIDTHS.items()
    }
    tokenizer_3 = tokenizers.unigram() if t5 else None
    text_encoder_3 = None
    if t5:
        text_encoder_3 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_3) + 6,
                d_model=T5_WIDTH,
                d_kv=6,
                d_ff=28,
                num_layers=2,
                num_heads=2,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=40,
                feed_forward_proj="gated-gelu",
                layer_norm_epsilon=1e-5,
                dropout_rate=0.0,
            )
        )
    transformer = SD3Transformer2DModel(
        sample_size=22,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=14,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=28,
        pooled_projection_dim=sum(CLIP_PROJECTIONS.values()),
        pos_embed_max_size=26,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
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
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=2.0,
        use_dynamic_shifting=dynamic_shifting,
        base_shift=0.6,
        max_shift=1.3,
        base_image_seq_len=64,
        max_image_seq_len=1024,
    )

    for name, module in {**text_encoders, "text_encoder_3": text_encoder_3, "transformer": transformer}.items():
        if module is not None:
            randomise(name, module, seed=seed)
    # Pictures stay mostly inside [-1, 1].
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 0.5})
    return save(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            **text_encoders,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        ),
        path,
        dtype,
    )
