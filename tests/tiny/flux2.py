"""A tiny FLUX.2 repository: the published classes and layout, other numbers everywhere.

What differs from the defaults of diffusers, and what would go wrong if a constant were guessed instead of read:

- the autoencoder shrinks by 4 (default 8), so a guessed factor changes the size of the picture;
- 5 latent channels, 20 packed (defaults 32 and 128), and the decoder has other widths than the encoder;
- the batch-norm statistics are far from 0 and 1, and `batch_norm_eps` is large enough to be visible in float32;
- the text encoder is the whole vision-language model: 33 layers of which 30 are read (published: 40), and a vision
  tower, a projector and an output head nobody reads.

The tokenizer folder is the published one's: a chat template that puts the system message before the prompt, padding on
the left, and a byte-level BPE that knows the system message's words (with single letters, the system message alone would
fill the sequence). Published repositories hold a `PixtralProcessor`, whose text half this is; `processor=True` writes
one, which needs torchvision, as reading it does.

Not free: the pipeline packs 2x2 latents whatever `patch_size` says and divides timesteps by 1000 itself; it reads the
hidden states 10, 20 and 30; the transformer's own `patch_size` has to be 1; reference images need 64 pixels a side.
"""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from . import save
from .weights import randomise

LATENT_CHANNELS = 5
PACKED_CHANNELS = 4 * LATENT_CHANNELS
TEXT_WIDTH = 12
HIDDEN_STATES_READ = 3
SPARE_TOKENS = 5  # embeddings of no token
SPECIAL = (
    "<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)  # fmt: skip

# Every message's content is a list of parts, as the pipeline writes them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'][0]['text'] }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}[IMG]{% endif %}"
    "{% endfor %}[/INST]{% endif %}"
    "{% endfor %}"
)


def build(path: Path, *, seed: int = 0, dtype: str = "float32", processor: bool = False) -> Path:
    """Write the repository to `path`."""
    tokenizer = mistral()
    text_encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": len(tokenizer) + SPARE_TOKENS,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 20,
                "num_hidden_layers": 33,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 6,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_type": "default", "rope_theta": 30000.0},
                "sliding_window": None,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 20,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "head_dim": 8,
                "image_size": 56,
                "patch_size": 7,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
            spatial_merge_size=2,
            tie_word_embeddings=False,
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
        timestep_guidance_channels=22,
        mlp_ratio=2.5,
        axes_dims_rope=(2, 4, 6, 4),
        rope_theta=1200,
        eps=1e-5,
        guidance_embeds=True,
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
        batch_norm_eps=0.017,
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
        Flux2Pipeline(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=pixtral(tokenizer) if processor else tokenizer,
            transformer=transformer,
        ),
        path,
        dtype,
    )


def mistral() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Mistral's special tokens and a chat template."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=list(SPECIAL),
    )
    trained.train_from_iterator([SYSTEM_MESSAGE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL[4:]),
        padding_side="left",
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def pixtral(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The processor of the published repositories, around a tokenizer."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    images = PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7})
    return PixtralProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=7, spatial_merge_size=2, chat_template=CHAT_TEMPLATE
    )
