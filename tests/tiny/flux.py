"""A tiny FLUX.1 repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 4 (default 8), so a guessed factor changes the size of the picture and the positions;
- 5 latent channels, 20 packed (defaults 16 and 64), with a scale and a shift that both show;
- the CLIP tokenizer's longest text is 39 tokens (published: 77), which the pipeline's constructor reads;
- the scheduler's shift depends on the picture's size with other coefficients than the fallbacks in the pipeline.

`guidance_embeds=False` is a transformer without embedded guidance, as in the published schnell.

Not free: the pipeline packs 2x2 latents and divides timesteps by 1000 itself; the transformer's `patch_size` is 1.
"""

from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from . import save, tokenizers
from .weights import randomise

LATENT_CHANNELS = 5
CLIP_WIDTH = 12
CLIP_LENGTH = 39
T5_WIDTH = 20
WORDS = ("red", "fox", "blue", "cat", "ugly")  # one token each


def build(path: Path, *, seed: int = 0, dtype: str = "float32", guidance_embeds: bool = True) -> Path:
    """Write the repository to `path`."""
    tokenizer, tokenizer_2 = clip(), tokenizers.unigram()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer) + 3,
            hidden_size=CLIP_WIDTH,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            projection_dim=CLIP_WIDTH,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2) + 6,
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
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
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
        use_dynamic_shifting=True,
        base_shift=0.6,
        max_shift=1.3,
        base_image_seq_len=64,
        max_image_seq_len=1024,
    )

    randomise("text_encoder", text_encoder, seed=seed)
    randomise("text_encoder_2", text_encoder_2, seed=seed)
    randomise("transformer", transformer, seed=seed)
    # Pictures stay mostly inside [-1, 1].
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 0.5})
    return save(
        FluxPipeline(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        ),
        path,
        dtype,
    )


def clip() -> CLIPTokenizer:
    """Byte-level BPE whose last piece of a word is marked, with CLIP's two special tokens; it knows a few words whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
    joined = dict.fromkeys("".join(pair) for pair in merges)
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *joined, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=CLIP_LENGTH)
