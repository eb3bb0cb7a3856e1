"""A tiny FLUX.1 Kontext repository: the published classes and layout, other numbers everywhere.

Text encoders, transformer and scheduler are those of `tiny.flux`. The autoencoder shrinks by 16 (default 8), because the
pipeline brings every reference image to about a megapixel, unless it is told not to: that is then a thousand tokens.

Not free: the sizes that reference images are brought to, and the area of the picture (`max_area` in a call).
"""

import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline

from . import flux, save
from .weights import randomise


def build(path: Path, *, seed: int = 0, dtype: str = "float32", guidance_embeds: bool = True) -> Path:
    """Write the repository to `path`."""
    with tempfile.TemporaryDirectory() as folder:
        plain = FluxPipeline.from_pretrained(flux.build(Path(folder), seed=seed, guidance_embeds=guidance_embeds))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(4, 4, 8, 8, 12),
        layers_per_block=1,
        latent_channels=flux.LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=96,
        scaling_factor=0.61,
        shift_factor=0.23,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # Pictures stay mostly inside [-1, 1].
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 0.5})
    components = {name: part for name, part in plain.components.items() if part is not None}
    return save(FluxKontextPipeline(**{**components, "vae": vae}), path, dtype)
