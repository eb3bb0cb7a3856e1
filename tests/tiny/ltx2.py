"""Tiny LTX-2 repositories: the published classes and layouts, other numbers everywhere.

Versions, as published: `2.0` projects the text once for both modalities and has a plain vocoder; `2.3` projects it for
each, gates attention, modulates the text by the noise level, perturbs blocks for guidance and widens the audio's band.
`2.5` takes
its text from Gemma 4, predicts the length of a video, and with `diffusion=True` decodes it by a diffusion model.
`image=True` names the image-to-video pipeline; `upsampler=True` adds the latent upsampler, as an entry of the index,
and `upsampler="folder"` only its folder, as published; `conditioned=True` has an autoencoder that is told a timestep.
`lora=True` puts the second stage's LoRA beside the index, bfloat16 and with the published names of its layers, and
`lora="connectors"` (of 2.0) one that changes the connectors too.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 8 in space and 2 in time (default 32 and 8): another size, length and grid of positions;
- 6 latent channels (default 128), with means and deviations that lie in the weights, and a scaling factor;
- audio of 8000 Hz in hops of 100 and 20 mel bins (default 16000, 160, 64): 20 latents a second instead of 25, 5 mel
  bins of 3 channels each, and the vocoder gives 12000 Hz (`2.3`: 16000);
- connectors with 8 and 4 registers (default 128), which decide the lengths that a text may have;
- text in 4 hidden states (published: 49), all of which are read, beside a vision tower and a head nobody reads.

Not free: sizes in pixels are multiples of 32; patches are 1x1x1, because the pipeline counts its channels in patches of
that size; the audio autoencoder shrinks by 4, and has as many base channels as a latent frame has numbers; the latent
upsampler normalises in 32 groups.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoderModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.duration_head import LTX2DurationHead
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    GemmaTokenizer,
)

from . import cast, save, tokenizers
from .weights import generator, randomise, statistics

VERSIONS = ("2.0", "2.3", "2.5")
LATENT_CHANNELS = 6
AUDIO_CHANNELS, MEL_BINS = 3, 20
AUDIO_WIDTH = AUDIO_CHANNELS * MEL_BINS // 4  # numbers in one latent frame of audio
TEXT_WIDTH, TEXT_LAYERS = 20, 3
VIDEO_WIDTH, SOUND_WIDTH = 24, 16
SAMPLE_RATE, HOP = 8000, 100
SPARE_TOKENS = 7  # embeddings of no token

LORA = "ltx-2-tiny-distilled-lora-3.safetensors"
# The layers that it changes: their published names, and where they are.
LORA_LAYERS = {
    "diffusion_model.patchify_proj": ("transformer", "proj_in"),
    "diffusion_model.audio_patchify_proj": ("transformer", "audio_proj_in"),
    "diffusion_model.adaln_single.linear": ("transformer", "time_embed.linear"),
    "diffusion_model.transformer_blocks.0.attn1.to_q": ("transformer", "transformer_blocks.0.attn1.to_q"),
    "diffusion_model.transformer_blocks.1.attn2.to_out.0": ("transformer", "transformer_blocks.1.attn2.to_out.0"),
    "diffusion_model.transformer_blocks.1.audio_ff.net.2": ("transformer", "transformer_blocks.1.audio_ff.net.2"),
    "diffusion_model.proj_out": ("transformer", "proj_out"),
    "text_embedding_projection.aggregate_embed": ("connectors", "text_proj_in"),
}


def build(
    path: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    version: str = "2.0",
    image: bool = False,
    upsampler: bool | str = False,
    diffusion: bool = False,
    conditioned: bool = False,
    lora: bool | str = False,
) -> Path:
    """Write the repository of one of `VERSIONS` to `path`."""
    if version not in VERSIONS:
        raise ValueError(f"version is one of {', '.join(VERSIONS)}, not {version}")
    tokenizer = gemma()
    parts = {
        "text_encoder": _text_encoder(tokenizer) if version != "2.5" else _gemma4(tokenizer),
        "connectors": _connectors(version),
        "transformer": _transformer(version),
        "vae": _vae(conditioned),
        "audio_vae": _audio_vae(),
        "vocoder": _vocoder(version),
        **({"duration_head": _duration_head()} if version == "2.5" else {}),
    }
    beside = {
        **({"latent_upsampler": _latent_upsampler()} if upsampler else {}),
        **({"diffusion_decoder": _diffusion_decoder()} if diffusion else {}),
    }
    gains = {"vae": {"decoder.conv_out.conv.weight": 0.5}, "diffusion_decoder": {"decoder.conv_out.weight": 0.5}}
    if version != "2.0":
        gains["vocoder"] = {"vocoder.conv_out.weight": 0.2, "bwe_generator.conv_out.weight": 0.2}
    for name, part in {**parts, **beside}.items():
        randomise(name, part, seed=seed, gains=gains.get(name))
    for name in ("vae", "audio_vae"):
        means, deviations = statistics(f"ltx2.{name}", len(parts[name].latents_mean), seed)
        parts[name].latents_mean.copy_(torch.tensor(means))
        parts[name].latents_std.copy_(torch.tensor(deviations))
    if conditioned:
        parts["vae"].decoder.timestep_scale_multiplier.data.fill_(900.0)
    if version != "2.0":
        _fill_bases(parts["vocoder"], seed)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=2.0,
        use_dynamic_shifting=True,
        base_shift=0.8,
        max_shift=1.7,
        base_image_seq_len=512,
        max_image_seq_len=2048,
        shift_terminal=0.15,
    )
    pipeline = LTX2ImageToVideoPipeline if image else LTX2Pipeline
    save(pipeline(tokenizer=tokenizer, scheduler=scheduler, **parts), path, "float32")
    index = json.loads((path / "model_index.json").read_text())
    for name, part in beside.items():
        part.save_pretrained(path / name)
        if name != "latent_upsampler" or upsampler is True:
            library = "diffusers" if name == "diffusion_decoder" else "ltx2"
            index[name] = [library, type(part).__name__]
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
    if dtype != "float32":
        cast(path, dtype)
    if lora:
        _write_lora(path, parts, ("transformer", "connectors") if lora == "connectors" else ("transformer",), seed)
    return path


def _write_lora(path: Path, parts: dict[str, nn.Module], changed: tuple[str, ...], seed: int) -> None:
    weights: dict[str, torch.Tensor] = {}
    for published, (component, layer) in LORA_LAYERS.items():
        if component in changed:
            linear = parts[component].get_submodule(layer)
            rank = 2 if ".attn" in layer else 3
            for side, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
                noise = torch.randn(shape, generator=generator(seed, f"lora.{component}.{layer}.{side}"))
                weights[f"{published}.lora_{side}.weight"] = (0.3 * noise).to(torch.bfloat16)
    save_file(weights, path / LORA)


def gemma() -> GemmaTokenizer:
    """Gemma's tokenizer: padding on the left, spaces as `▁`, and bytes for what it does not know."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    words = sorted(set(tokenizers.TEMPLATE_WORDS.split()))
    letters = sorted({letter for word in words for letter in word} | set("▁.,ABCDEFGHIJKLMNOPQRSTUVWXYZ-'"))
    vocab = {token: number for number, token in enumerate([*special, *bytes_, *letters])}
    return GemmaTokenizer(vocab=vocab, merges=[], model_max_length=64)


def _text_encoder(tokenizer: GemmaTokenizer) -> Gemma3ForConditionalGeneration:
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={
                "model_type": "gemma3_text",
                "vocab_size": len(tokenizer) + SPARE_TOKENS,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 28,
                "num_hidden_layers": TEXT_LAYERS,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 6,
                "query_pre_attn_scalar": 6,
                "max_position_embeddings": 256,
                "sliding_window": 12,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "rms_norm_eps": 1e-5,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 12,
                "intermediate_size": 20,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
        )
    )


def _gemma4(tokenizer: GemmaTokenizer) -> Gemma4UnifiedForConditionalGeneration:
    """Gemma 4 without towers: patches of images and frames of sound go through embedders, which nobody reads here."""
    encoder = Gemma4UnifiedForConditionalGeneration(
        Gemma4UnifiedConfig(
            text_config={
                "model_type": "gemma4_unified_text",
                "vocab_size": len(tokenizer) + SPARE_TOKENS,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 28,
                "num_hidden_layers": TEXT_LAYERS,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 6,
                "global_head_dim": 8,
                "max_position_embeddings": 256,
                "sliding_window": 12,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "rms_norm_eps": 1e-5,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                "model_type": "gemma4_unified_vision",
                "patch_size": 4,
                "pooling_kernel_size": 1,
                "mm_embed_dim": 12,
                "mm_posemb_size": 9,
                "output_proj_dims": 12,
            },
            audio_config={"model_type": "gemma4_unified_audio", "audio_embed_dim": 10},
        )
    )
    for number, layer in enumerate(encoder.model.language_model.layers):
        layer.layer_scalar.fill_(0.8 + 0.1 * number)
    return encoder


def _duration_head() -> LTX2DurationHead:
    return LTX2DurationHead(
        video_cross_attention_dim=VIDEO_WIDTH,
        audio_cross_attention_dim=SOUND_WIDTH,
        pooler_hidden_dim=12,
        num_queries=2,
        num_pooler_heads=3,
        mlp_hidden_dim=10,
    )


def _diffusion_decoder() -> LTX2VideoDiffusionDecoderModel:
    return LTX2VideoDiffusionDecoderModel(
        latent_channels=LATENT_CHANNELS,
        patch_size=2,
        decoder_head_dim=8,
        decoder_stage_channels=(32, 16, 16),
        decoder_stage_depths=(1, 1, 1),
        decoder_stage_kernels=((1, 3, 3), (3, 3, 3)),
        decoder_upsample_strides=((1, 2, 2), (2, 2, 2)),
        decoder_upsample_channel_reductions=(2, 1),
        decoder_stage5_kernel=(3, 3, 3),
        decoder_t_emb_dim=20,
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    )


def _connectors(version: str) -> LTX2TextConnectors:
    split = version != "2.0"
    video, audio = (VIDEO_WIDTH, SOUND_WIDTH) if split else (TEXT_WIDTH, TEXT_WIDTH)
    return LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=TEXT_LAYERS + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=video // 2,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=8,
        video_gated_attn=split,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=audio // 2,
        audio_connector_num_layers=2,
        audio_connector_num_learnable_registers=4,
        audio_gated_attn=split,
        connector_rope_base_seq_len=96,
        rope_theta=7000.0,
        rope_type="split",
        per_modality_projections=split,
        video_hidden_dim=VIDEO_WIDTH,
        audio_hidden_dim=SOUND_WIDTH,
        proj_bias=split,
    )


def _transformer(version: str) -> LTX2VideoTransformer3DModel:
    split = version != "2.0"
    return LTX2VideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=VIDEO_WIDTH // 2,
        cross_attention_dim=VIDEO_WIDTH,
        vae_scale_factors=(2, 8, 8),
        pos_embed_max_pos=7,
        base_height=160,
        base_width=96,
        gated_attn=split,
        cross_attn_mod=split,
        audio_in_channels=AUDIO_WIDTH,
        audio_out_channels=AUDIO_WIDTH,
        audio_num_attention_heads=2,
        audio_attention_head_dim=SOUND_WIDTH // 2,
        audio_cross_attention_dim=SOUND_WIDTH,
        audio_scale_factor=4,
        audio_pos_embed_max_pos=5,
        audio_sampling_rate=SAMPLE_RATE,
        audio_hop_length=HOP,
        audio_gated_attn=split,
        audio_cross_attn_mod=split,
        num_layers=2,
        norm_eps=1e-5,
        caption_channels=TEXT_WIDTH,
        rope_theta=6000.0,
        rope_type="split",
        use_prompt_embeddings=not split,
        perturbed_attn=split,
        ff_bias=version != "2.5",
        use_prompt_adaln_single=version != "2.5",
        use_keyframes_abs_pos_embedding=version == "2.5",
    )


def _vae(conditioned: bool) -> AutoencoderKLLTX2Video:
    return AutoencoderKLLTX2Video(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 16),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("spatiotemporal", "spatial"),
        upsample_type=("spatial", "spatiotemporal"),
        upsample_residual=(True, True),
        upsample_factor=(2, 2),
        patch_size=2,
        scaling_factor=0.8,
        decoder_causal=False,
        timestep_conditioning=conditioned,
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
    )


def _audio_vae() -> AutoencoderKLLTX2Audio:
    return AutoencoderKLLTX2Audio(
        base_channels=AUDIO_WIDTH,
        ch_mult=(1, 1, 2),
        num_res_blocks=1,
        resolution=64,
        latent_channels=AUDIO_CHANNELS,
        sample_rate=SAMPLE_RATE,
        mel_hop_length=HOP,
        mel_bins=MEL_BINS,
    )


def _vocoder(version: str) -> LTX2Vocoder | LTX2VocoderWithBWE:
    shape: dict[str, Any] = {
        "in_channels": 2 * MEL_BINS,
        "hidden_channels": 16,
        "resnet_kernel_sizes": [3, 5],
        "resnet_dilations": [[1, 2], [1, 3]],
    }
    if version == "2.0":
        return LTX2Vocoder(
            **shape, upsample_kernel_sizes=[12, 11, 9], upsample_factors=[6, 5, 5], output_sampling_rate=12000
        )
    return LTX2VocoderWithBWE(
        **shape,
        upsample_kernel_sizes=[11, 9, 8],
        upsample_factors=[5, 5, 4],
        bwe_in_channels=2 * 6,
        bwe_hidden_channels=8,
        bwe_upsample_kernel_sizes=[9, 8],
        bwe_upsample_factors=[5, 4],
        bwe_resnet_kernel_sizes=[3],
        bwe_resnet_dilations=[[1, 2]],
        filter_length=16,
        hop_length=10,
        window_length=16,
        num_mel_channels=6,
        input_sampling_rate=SAMPLE_RATE,
        output_sampling_rate=2 * SAMPLE_RATE,
    )


def _fill_bases(vocoder: LTX2VocoderWithBWE, seed: int) -> None:
    """Overwrite the bases of the wider band's spectrogram, which a new model has as zeros."""
    for name, buffer in vocoder.mel_stft.named_buffers():
        noise = torch.randn(buffer.shape, generator=generator(seed, f"vocoder.{name}"))
        buffer.copy_(noise.abs() if name == "mel_basis" else noise * buffer.shape[-1] ** -0.5)


def _latent_upsampler() -> LTX2LatentUpsamplerModel:
    return LTX2LatentUpsamplerModel(in_channels=LATENT_CHANNELS, mid_channels=32, num_blocks_per_stage=1)
