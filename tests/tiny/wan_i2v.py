"""Tiny Wan image-to-video repositories: the published classes and layouts, other numbers everywhere.

Versions, as published: `2.1` has CLIP and takes the first frame; `2.1-flf` has CLIP with a table of positions for two
images and takes the first and the last; `2.2` has two transformers and no CLIP, and takes either; `2.2-5b` has one
transformer, which takes a timestep for every token (`expand_timesteps`), and takes the first frame.

Text encoder, autoencoders and scheduler are those of `tiny.wan`. What else would go wrong if it were guessed:

- the transformer takes the latents, the mask (as many channels as one latent frame has frames) and the given frames'
  latents: 6 + 2 + 6 channels, and gives 6 (published 16 + 4 + 16 and 16);
- CLIP sees 28 x 28 pixels (default 224) in patches of 14 (default 32), so 5 tokens, of a width of its own; it has
  layers enough for its last one to be left out, and an image is cropped: pixels and CLIP see different parts of it.
"""

import json
import tempfile
from pathlib import Path

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from . import save, tokenizers, wan
from .weights import randomise

VERSIONS = ("2.1", "2.1-flf", "2.2", "2.2-5b")
TEXT_OF = {"2.1": "2.1", "2.1-flf": "2.1", "2.2": "2.2", "2.2-5b": "2.2-5b"}
CLIP_WIDTH = 20
CLIP_PIXELS = 28
CLIP_PATCH = 14
CLIP_TOKENS = (CLIP_PIXELS // CLIP_PATCH) ** 2 + 1


def build(path: Path, *, seed: int = 0, dtype: str = "float32", version: str = "2.1") -> Path:
    """Write the repository of one of `VERSIONS` to `path`."""
    if version not in VERSIONS:
        raise ValueError(f"version is one of {', '.join(VERSIONS)}, not {version}")
    with tempfile.TemporaryDirectory() as folder:
        text = wan.build(Path(folder), seed=seed, version=TEXT_OF[version])
        text_encoder = UMT5EncoderModel.from_pretrained(text / "text_encoder")
        vae = AutoencoderKLWan.from_pretrained(text / "vae")
        scheduler = UniPCMultistepScheduler.from_pretrained(text / "scheduler")
    per_token, sees = version == "2.2-5b", version.startswith("2.1")
    z_dim = vae.config.z_dim
    transformers = {
        name: WanTransformer3DModel(
            patch_size=(1, 2, 2) if per_token else (1, 1, 2),
            num_attention_heads=2,
            attention_head_dim=14,
            in_channels=z_dim if per_token else 2 * z_dim + vae.config.scale_factor_temporal,
            out_channels=z_dim,
            text_dim=wan.TEXT_WIDTH,
            freq_dim=20,
            ffn_dim=44,
            num_layers=2,
            eps=1e-5,
            rope_max_seq_len=128,
            image_dim=CLIP_WIDTH if sees else None,
            added_kv_proj_dim=28 if sees else None,
            pos_embed_seq_len=2 * CLIP_TOKENS if version == "2.1-flf" else None,
        )
        for name in (("transformer", "transformer_2") if version == "2.2" else ("transformer",))
    }
    for name, transformer in transformers.items():
        randomise(name, transformer, seed=seed)
    image_encoder = None
    if sees:
        image_encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=CLIP_WIDTH,
                intermediate_size=36,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=CLIP_PIXELS,
                patch_size=CLIP_PATCH,
                hidden_act="gelu",
            )
        )
        randomise("image_encoder", image_encoder, seed=seed)
    save(
        WanImageToVideoPipeline(
            tokenizer=tokenizers.unigram(),
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            image_processor=_image_processor() if sees else None,
            image_encoder=image_encoder,
            transformer=transformers["transformer"],
            transformer_2=transformers.get("transformer_2"),
            boundary_ratio=wan.BOUNDARY_RATIO if version == "2.2" else None,
            expand_timesteps=per_token,
        ),
        path,
        dtype,
    )
    if sees:
        index = json.loads((path / "model_index.json").read_text())
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]  # as published
        (path / "model_index.json").write_text(json.dumps(index, indent=2))
    return path


def _image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_PIXELS},
        crop_size={"height": CLIP_PIXELS, "width": CLIP_PIXELS},
        image_mean=[0.45, 0.4, 0.35],
        image_std=[0.3, 0.25, 0.35],
    )
