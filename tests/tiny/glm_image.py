"""A tiny GLM-Image repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of the libraries, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 4 and the transformer cuts patches of 4 (defaults 8 and 2);
- 5 latent channels (default 16), with means and deviations of their own;
- the codebook has 37 entries (default 16384), and the ids of its tokens come before those of the text;
- `generation_config.json` rules out the tokens that are in no codebook: sampling without it makes the pipeline fail.
  Its temperature and top-p are not the libraries' either;
- the autoregressive model takes pictures of 32 to 192 pixels a side (published: 512 to 2048).

Not free: transformers' processor counts 32 pixels a token of the autoregressive model, whatever the configuration, so
the factors of autoencoder, patches and vision tower multiply to that. A preview of about 256 tokens comes before every
picture made from a prompt alone.
"""

from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from . import save
from .weights import randomise, statistics

LATENT_CHANNELS = 5
GLYPH_WIDTH = 20
CODES = 37  # tokens of pictures; the next two begin and end one
START, END = CODES, CODES + 1
SPARE_TOKENS = 2  # that the model can write and no codebook has
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|image|>", "<sop>", "<eop>")
VISION_PATCH = 16  # pixels, of a picture at half its size
SMALLEST, LARGEST = 32, 192  # pixels a side
# transformers' default for the image processor, as numbers.
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

CHAT_TEMPLATE = (
    "{% for turn in messages %}<|user|>\n"
    "{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}"
    f"<|code_{START}|><|image|><|code_{END}|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def build(path: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Write the repository to `path`."""
    words = text_tokenizer()
    vision_language_encoder = autoregressive_model(words, seed)
    glyphs = ByT5Tokenizer(extra_ids=0)
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(glyphs) + 5,
            d_model=GLYPH_WIDTH,
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
    transformer = GlmImageTransformer2DModel(
        patch_size=4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=GLYPH_WIDTH,
        time_embed_dim=24,
        condition_dim=12,
        prior_vq_quantizer_codebook_size=CODES,
    )
    means, deviations = statistics("glm_image.latents", LATENT_CHANNELS, seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 12, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=96,
        latents_mean=means,
        latents_std=deviations,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.3, max_shift=0.9, base_image_seq_len=16
    )

    randomise("text_encoder", text_encoder, seed=seed)
    # The few tokens of glyphs and of pictures that are given show among the others.
    gains = {f"transformer_blocks.{block}.attn1.to_v.weight": 4.0 for block in range(2)}
    randomise("transformer", transformer, seed=seed, gains=gains)
    # Pictures stay mostly inside [-1, 1]; one that is given shows in the result.
    randomise("vae", vae, seed=seed, gains={"decoder.conv_out.weight": 0.5, "encoder.conv_out.weight": 4.0})
    return save(
        GlmImagePipeline(
            tokenizer=glyphs,
            processor=processor(words),
            text_encoder=text_encoder,
            vision_language_encoder=vision_language_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        ),
        path,
        dtype,
    )


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, after the tokens of pictures, and the special tokens that the processor asks for by name."""
    codes = [f"<|code_{number}|>" for number in range(CODES + 2 + SPARE_TOKENS)]
    tokens = [*codes, *sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    bytes_only = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token=codes[START],
        eos_token=codes[END],
        pad_token=SPECIAL[0],
        additional_special_tokens=[*codes, *SPECIAL],
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
        padding_side="left",
    )


def processor(tokenizer: PreTrainedTokenizerFast) -> GlmImageProcessor:
    """What turns messages into the autoregressive model's tokens, and pictures into its patches."""
    image_processor = GlmImageImageProcessorPil(
        size={"shortest_edge": SMALLEST**2, "longest_edge": LARGEST**2},
        patch_size=VISION_PATCH,
        merge_size=1,
        temporal_patch_size=1,
        image_mean=MEAN,
        image_std=DEVIATION,
    )
    return GlmImageProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def autoregressive_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> GlmImageForConditionalGeneration:
    """The model that writes a picture's tokens, with its vision tower and its codebook."""
    width, codes = 24, CODES + 2 + SPARE_TOKENS
    model = GlmImageForConditionalGeneration(
        GlmImageConfig(
            text_config={
                "vocab_size": len(tokenizer) + 3,
                "vision_vocab_size": codes,
                "hidden_size": width,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "mrope_section": [2, 1, 3]},
                "pad_token_id": tokenizer.pad_token_id,
                "eos_token_id": END,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_heads": 2,
                "image_size": 64,
                "patch_size": VISION_PATCH,
            },
            vq_config={"embed_dim": 10, "num_embeddings": CODES, "latent_channels": 16},
            image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
            image_start_token_id=START,
            image_end_token_id=END,
        )
    )
    randomise("vision_language_encoder", model, seed=seed)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.9,
        top_p=0.8,
        eos_token_id=END,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=list(range(CODES, codes)),
    )
    return model
