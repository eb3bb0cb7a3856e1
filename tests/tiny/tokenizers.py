"""Tokenizers made on the spot, in the classes and files that the published repositories have.

They are small (a few hundred tokens) so that embeddings stay small, and they accept any text: the byte-level one falls
back to bytes, the unigram one knows every printable ASCII character and has `<unk>` for the rest.
"""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, T5TokenizerFast

# The words of Qwen-Image's prompt template. Its pipeline drops the first 34 tokens, counted with the published
# tokenizer, where each of these words is one token. The BPE below learns each of them whole, so the count holds here.
TEMPLATE_WORDS = (
    "system user assistant Describe the image by detailing the color shape size texture quantity text spatial"
    " relationships of the objects and background"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Added to the vocabulary, but ordinary text for `skip_special_tokens`, as in Qwen3.
THINK = ("<think>", "</think>")

# Turns by role, and an empty thought before the answer when thinking is switched off: leaving out either argument
# (`add_generation_prompt`, `enable_thinking`) changes the ids.
CHAT_TEMPLATE = (
    "{% for turn in messages %}"
    "<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def qwen(*, model_max_length: int = 4096) -> Qwen2TokenizerFast:
    """Byte-level BPE with Qwen's pre-tokenizer, special tokens and a chat template."""
    trained = Tokenizer(models.BPE())
    # `Qwen2TokenizerFast` brings the published normaliser and pre-tokenizer; train under the same ones.
    published = Qwen2TokenizerFast().backend_tokenizer
    trained.normalizer = published.normalizer
    trained.pre_tokenizer = published.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    words = TEMPLATE_WORDS.split()
    trained.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Qwen2TokenizerFast(
        vocab=trained.get_vocab(with_added_tokens=False),
        merges=merges,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=model_max_length,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens(list(THINK))
    return tokenizer


def unigram(*, model_max_length: int = 512) -> T5TokenizerFast:
    """Unigram pieces with T5's conventions: `<pad>` 0, `</s>` 1 appended to every text, `<unk>` 2.

    The pieces are listed, not trained: the unigram trainer gives another vocabulary in every process.
    """
    characters = sorted(set(string.printable) - set(string.whitespace))
    words = sorted(set(TEMPLATE_WORDS.split()))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -4.0 - 0.01 * rank) for rank, word in enumerate(words)]
    pieces += [(ending, -4.5 - 0.01 * rank) for rank, ending in enumerate(("ed", "er", "ing", "ion", "s,", "ox"))]
    pieces += [(character, -6.0 - 0.01 * rank) for rank, character in enumerate(characters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=model_max_length)
