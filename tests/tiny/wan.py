"""Tiny Wan text-to-video repositories: the published classes and layouts, other numbers everywhere.

Versions, as published: `2.1` has one transformer; `2.2` has two, the second below `boundary_ratio`; `2.2-5b` has one,
takes a timestep for every token (`expand_timesteps`) and has the autoencoder with residual blocks and pixel patches.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 4 in space and 2 in time (defaults 8 and 4): the video would get another size and length;
- 6 latent channels (5 in `2.2-5b`; default 16), with means and deviations of their own;
- patches of 1x1x2, not square, so swapped height and width show (`2.2-5b`: below);
- 800 training timesteps (default 1000): the boundary is a share of them, and four steps divide two and two around it.

Not free: `2.2-5b` needs patches of 1x2x2, because the pipeline takes every second row and column of its timesteps; the
temporal patch is 1, because the number of latent frames is odd or even; sizes in pixels are multiples of 16;
`scale_factor_spatial` and `_temporal` only declare what levels and pixel patches do, so they are computed here.
"""

from pathlib import Path

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from . import save, tokenizers
from .weights import randomise, statistics

VERSIONS = ("2.1", "2.2", "2.2-5b")
TEXT_WIDTH = 18
SPARE_TOKENS = 13  # embeddings of no token, as in the published encoder
BOUNDARY_RATIO = 0.8


def build(path: Path, *, seed: int = 0, dtype: str = "float32", version: str = "2.1") -> Path:
    """Write the repository of one of `VERSIONS` to `path`."""
    if version not in VERSIONS:
        raise ValueError(f"version is one of {', '.join(VERSIONS)}, not {version}")
    per_token = version == "2.2-5b"
    tokenizer = tokenizers.unigram()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer) + SPARE_TOKENS,
            d_model=TEXT_WIDTH,
            d_kv=6,
            d_ff=28,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=40,
            layer_norm_epsilon=1e-5,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    vae = _residual_vae(seed) if per_token else _vae(seed)
    transformers = {
        name: WanTransformer3DModel(
            patch_size=(1, 2, 2) if per_token else (1, 1, 2),
            num_attention_heads=2,
            attention_head_dim=14,
            in_channels=vae.config.z_dim,
            out_channels=vae.config.z_dim,
            text_dim=TEXT_WIDTH,
            freq_dim=20,
            ffn_dim=44,
            num_layers=2,
            eps=1e-5,
            rope_max_seq_len=128,
        )
        for name in (("transformer", "transformer_2") if version == "2.2" else ("transformer",))
    }
    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=800,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=2.5,
    )

    randomise("text_encoder", text_encoder, seed=seed)
    for name, transformer in transformers.items():
        randomise(name, transformer, seed=seed)
    # Frames stay mostly inside [-1, 1]; the autoencoder clamps them itself.
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 0.5})
    return save(
        WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformers["transformer"],
            transformer_2=transformers.get("transformer_2"),
            boundary_ratio=BOUNDARY_RATIO if version == "2.2" else None,
            expand_timesteps=per_token,
        ),
        path,
        dtype,
    )


def _vae(seed: int) -> AutoencoderKLWan:
    """The autoencoder of 2.1 and of the larger 2.2 models."""
    z_dim, shrinks_time = 6, [True, False]
    means, deviations = statistics("wan.latents", z_dim, seed)
    return AutoencoderKLWan(
        base_dim=6,
        z_dim=z_dim,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=shrinks_time,
        latents_mean=means,
        latents_std=deviations,
        scale_factor_spatial=2 ** len(shrinks_time),
        scale_factor_temporal=2 ** sum(shrinks_time),
    )


def _residual_vae(seed: int) -> AutoencoderKLWan:
    """The autoencoder of 2.2-5b: residual levels over patches of 2x2 pixels, a decoder wider than the encoder."""
    z_dim, shrinks_time, patch = 5, [True], 2
    means, deviations = statistics("wan.latents", z_dim, seed)
    return AutoencoderKLWan(
        base_dim=6,
        decoder_base_dim=8,
        z_dim=z_dim,
        dim_mult=[2, 2],  # its shortcuts average channels: the last level has to keep their number
        num_res_blocks=1,
        temperal_downsample=shrinks_time,
        latents_mean=means,
        latents_std=deviations,
        is_residual=True,
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        patch_size=patch,
        scale_factor_spatial=patch * 2 ** len(shrinks_time),
        scale_factor_temporal=2 ** sum(shrinks_time),
    )
