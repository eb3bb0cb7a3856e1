"""Train the embedded emoji model: the image autoencoder, the text encoder and the transformer, from nothing.

    npm pack emojibase-data@17.0.0            # names and tags (MIT)
    apt-get install fonts-noto-color-emoji    # pictures (SIL OFL 1.1)
    python tools/train_emoji.py --out DIR --emojibase emojibase-data-17.0.0.tgz

It runs on a CPU in bfloat16 (quick where the processor has matrix instructions for it, such as Intel AMX) and
continues from its last checkpoint when started again. ``DIR/emoji-64`` is the finished model repository.
The constants below are the ones that made the shipped weights.
"""

import argparse
import copy
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from emoji_data import SIZE, Example, load_examples, load_pictures
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SEED = 0
TEXT_LENGTH = 16
"""Every caption is padded to this many tokens; the pipeline has to be called with the same number."""

VAE_STEPS, VAE_BATCH, VAE_RATE = 850, 16, 2e-3
VAE_GROUPS = (0, 3, 4, 5, 6, 7, 8)
"""The autoencoder sees all pictures but people and flags: more kinds of edges than the captioned ones have."""

BATCH = 48
WARMUP = 200
MUON_RATE, ADAM_RATE = 4e-3, 2e-3
EMA_EVERY, EMA_DECAY = 4, 0.992
RECOLOURED_SHARE = 0.25
FOCUS_FROM = 1000
"""The step from which the familiar pictures are drawn more often; before it all are drawn alike."""
TIME_MEAN, TIME_STD = 1.2, 1.2
"""Noise levels are drawn logit-normally, high ones more often: the sampler, too, spends most of its steps there."""

WIDTH = 64
ACTIVE_LAYERS = (0, 1, 9, 18)
"""Text-encoder layers that are trained. The pipeline reads the hidden states 9, 18 and 27, so there must be at least
27 layers, but short captions need only a few: the others add nothing (zero output weights), and training skips them."""
READ_STATES = (9, 18, 27)

DEFAULTS = {
    "height": SIZE,
    "width": SIZE,
    "num_inference_steps": 16,
    "guidance_scale": 3.0,
    "max_sequence_length": TEXT_LENGTH,
}
"""Written to ``triptych.json``: how the model wants to be called."""

# Lower case, no punctuation, and a space before every word, so that a word is the same token wherever it stands.
# The tokenizer class sets its own normalizer when it is loaded, so this has to happen in the template.
CHAT_TEMPLATE = (
    "{% set s = namespace(t=messages[0]['content'] | lower | replace('’', \"'\") | replace(\"'s\", '')) %}"
    "{% for c in '.,;:!?()[]\"-_/*#' %}{% set s.t = s.t | replace(c, ' ') %}{% endfor %}"
    "{{ ' ' ~ (s.t.split() | join(' ')) }}"
)


def patchify(latents: Tensor) -> Tensor:
    """Fold 2x2 squares of latents into channels, the way the pipeline does."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def to_tensor(pixels: list) -> Tensor:
    """Stack uint8 pictures into an image tensor between -1 and 1."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(pictures: Tensor, out: Path) -> None:
    """Train the autoencoder and set the latent statistics that the pipeline normalises with."""
    torch.manual_seed(SEED)
    vae = AutoencoderKLFlux2(
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    for step in range(VAE_STEPS):
        rate = VAE_RATE * min(1, step / 50) * (0.5 * (1 + math.cos(math.pi * step / VAE_STEPS)) + 0.01)
        optimizer.param_groups[0]["lr"] = rate
        x = pictures[torch.randint(len(pictures), (VAE_BATCH,))]
        if torch.rand(1) < 0.5:
            x = x.flip(-1)
        x = torch.roll(x, torch.randint(-4, 5, (2,)).tolist(), (2, 3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
        loss = F.l1_loss(y, x) + 0.5 * edges + F.mse_loss(y, x) + 1e-3 * posterior.kl().mean() / (8 * 256)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"vae {step} loss {loss.item():.4f}", flush=True)
    vae.eval()
    latents = patchify(encode(vae, pictures))
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))
    vae.save_pretrained(out)


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pictures: Tensor) -> Tensor:
    """Encode pictures in batches, without sampling."""
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(64)])


def make_tokenizer(captions: list[str], out: Path) -> None:
    """Make a byte-pair tokenizer in which every word of the captions is one token, and others fall to pieces."""
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    shell = Qwen2Tokenizer()
    shell.chat_template = CHAT_TEMPLATE
    words = sorted({word for caption in captions for word in render(shell, caption).split()})
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer, learner.decoder = normalizers.NFC(), pre_tokenizer, decoders.ByteLevel()
    learner.train_from_iterator(
        [" " + " ".join(words)],
        trainers.BpeTrainer(
            vocab_size=1 << 16,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(out)


def render(tokenizer: Qwen2Tokenizer, prompt: str) -> str:
    """Apply the chat template, with the arguments that the pipeline gives it."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def tokenize(tokenizer: Qwen2Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and the attention mask, padded to TEXT_LENGTH, exactly as the pipeline makes them."""
    texts = [render(tokenizer, prompt) for prompt in prompts]
    tokens = tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=TEXT_LENGTH)
    return tokens["input_ids"], tokens["attention_mask"]


class Denoiser(nn.Module):
    """The text encoder and the transformer as one function from caption and noisy latents to a velocity.

    It computes what the pipeline computes (``check`` makes sure of it), but skips the text encoder's idle layers and
    keeps the time in float32, where the transformer's own forward would round it to bfloat16.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=28,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=WIDTH // 2,
                vocab_size=vocabulary,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=None,
            )
        )
        self.transformer = Flux2Transformer2DModel(
            in_channels=32,
            num_layers=2,
            num_single_layers=5,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=3 * WIDTH,
            timestep_guidance_channels=128,
            axes_dims_rope=(16, 16, 16, 16),
            guidance_embeds=False,
        )
        nn.init.normal_(self.text_encoder.model.embed_tokens.weight, std=0.1)
        for index, layer in enumerate(self.text_encoder.model.layers):
            if index not in ACTIVE_LAYERS:
                nn.init.zeros_(layer.self_attn.o_proj.weight)
                nn.init.zeros_(layer.mlp.down_proj.weight)
                layer.requires_grad_(False)
        self.text_encoder.model.norm.requires_grad_(False)
        t = self.transformer
        for linear in (
            t.double_stream_modulation_img.linear,
            t.double_stream_modulation_txt.linear,
            t.single_stream_modulation.linear,
            t.norm_out.linear,
            t.proj_out,
        ):
            nn.init.zeros_(linear.weight)
        side = SIZE // 8
        zero, one = torch.arange(1), torch.arange(side)
        self.register_buffer("image_ids", torch.cartesian_prod(zero, one, one, zero), persistent=False)
        text_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(TEXT_LENGTH))
        self.register_buffer("text_ids", text_ids, persistent=False)
        rotary = [t.pos_embed(ids) for ids in (text_ids, self.image_ids)]
        self.register_buffer("cos", torch.cat([rotary[0][0], rotary[1][0]]), persistent=False)
        self.register_buffer("sin", torch.cat([rotary[0][1], rotary[1][1]]), persistent=False)
        positions = torch.arange(TEXT_LENGTH)[None]
        text_rotary = self.text_encoder.model.rotary_emb(torch.zeros(1), positions)
        self.register_buffer("text_cos", text_rotary[0], persistent=False)
        self.register_buffer("text_sin", text_rotary[1], persistent=False)

    def read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Encode captions: hidden states 9, 18 and 27, side by side."""
        model = self.text_encoder.model
        causal = torch.ones(TEXT_LENGTH, TEXT_LENGTH, dtype=torch.bool).tril()
        allowed = causal[None, None] & mask[:, None, None, :].bool()
        state = model.embed_tokens(tokens)
        rotary = (self.text_cos.to(state.dtype), self.text_sin.to(state.dtype))
        states = []
        for index in range(READ_STATES[-1]):
            if index in READ_STATES:
                states.append(state)
            if index in ACTIVE_LAYERS:
                state = model.layers[index](state, attention_mask=allowed, position_embeddings=rotary)
        return torch.cat([*states, state], -1)

    def forward(self, tokens: Tensor, mask: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        t = self.transformer
        dtype = t.x_embedder.weight.dtype
        waves = t.time_guidance_embed.time_proj(times.float() * 1000).to(dtype)
        time_embedding = t.time_guidance_embed.timestep_embedder(waves)
        image_mod = t.double_stream_modulation_img(time_embedding)
        text_mod = t.double_stream_modulation_txt(time_embedding)
        single_mod = t.single_stream_modulation(time_embedding)
        image = t.x_embedder(noisy.to(dtype))
        text = t.context_embedder(self.read(tokens, mask))
        rotary = (self.cos, self.sin)
        for block in t.transformer_blocks:
            text, image = block(image, text, image_mod, text_mod, rotary)
        both = torch.cat([text, image], 1)
        for block in t.single_transformer_blocks:
            both = block(both, None, single_mod, rotary)
        return t.proj_out(t.norm_out(both[:, TEXT_LENGTH:], time_embedding))

    @torch.no_grad()
    def check(self, tokens: Tensor, mask: Tensor) -> None:
        """Make sure that this is the same function as the one the pipeline evaluates."""
        other = copy.deepcopy(self).float()
        for parameter in other.parameters():
            if parameter.requires_grad and not parameter.any():  # zero weights would hide a difference
                nn.init.normal_(parameter, std=0.05)
        noisy, times = torch.randn(len(tokens), len(self.image_ids), 32), torch.rand(len(tokens))
        output = other.text_encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
        expected = other.transformer(
            hidden_states=noisy,
            timestep=times,
            encoder_hidden_states=torch.cat([output.hidden_states[k] for k in READ_STATES], -1),
            txt_ids=self.text_ids[None].expand(len(tokens), -1, -1),
            img_ids=self.image_ids[None].expand(len(tokens), -1, -1),
            return_dict=False,
        )[0]
        torch.testing.assert_close(other(tokens, mask, noisy, times), expected, rtol=1e-3, atol=1e-3)


class Muon(torch.optim.Optimizer):
    """Muon (orthogonalised momentum), as in ``torch.optim.Muon`` with ``match_rms_adamw``.

    Matrices of the same shape are orthogonalised together, which on a CPU is three times as fast as one by one.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]).bfloat16())
                scale = 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.float(), alpha=-group["lr"] * scale)


def orthogonalise(x: Tensor) -> Tensor:
    """Bring the singular values of a stack of matrices near one, by five Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
    """Attention written out: with short sequences its backward is far quicker on a CPU than the fused kernel's."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1e4)
    return scores.softmax(-1) @ value


class Data:
    """Latents and pre-tokenised captions, from which batches are drawn."""

    def __init__(self, examples: list[Example], plain: int, vae: AutoencoderKLFlux2, tokenizer: Qwen2Tokenizer):
        latents = patchify(encode(vae, to_tensor([example.pixels for example in examples])))
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        self.latents = ((latents - mean) / std).flatten(2).transpose(1, 2).contiguous()
        texts = sorted({text for example in examples for text, _ in example.captions})
        self.tokens, self.mask = tokenize(tokenizer, texts)
        row = {text: index for index, text in enumerate(texts)}
        longest = max(len(example.captions) for example in examples)
        self.captions = torch.zeros(len(examples), longest, dtype=torch.long)
        self.weights = torch.zeros(len(examples), longest)
        for index, example in enumerate(examples):
            for column, (text, weight) in enumerate(example.captions):
                self.captions[index, column], self.weights[index, column] = row[text], weight
        self.plain = plain
        self.priority = torch.tensor([example.weight for example in examples])

    def batch(self, size: int, focused: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Draw token ids, their mask, and latents."""
        priority = self.priority if focused else torch.ones_like(self.priority)
        recoloured = round(size * RECOLOURED_SHARE)
        index = torch.cat(
            [
                torch.multinomial(priority[: self.plain], size - recoloured, replacement=True),
                torch.multinomial(priority[self.plain :], recoloured, replacement=True) + self.plain,
            ]
        )
        row = self.captions[index].gather(1, torch.multinomial(self.weights[index], 1))[:, 0]
        return self.tokens[row], self.mask[row], self.latents[index]


def draw_times(size: int) -> Tensor:
    """Draw noise levels between 0 and 1, spread evenly over their distribution to make the gradient less noisy."""
    even = (torch.randperm(size) + torch.rand(size)) / size
    return torch.sigmoid(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)) * TIME_STD + TIME_MEAN)


def rate_at(step: int, steps: int, decay: int) -> float:
    """Warm up, stay, and fall linearly to nothing over the last ``decay`` steps."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / decay)


def train(data: Data, vocabulary: int, checkpoint: Path, steps: int, decay: int, compiled: bool) -> None:
    """Train the denoiser with flow matching: Muon for the blocks' matrices, AdamW for everything else.

    The weights are kept in float32 and computed with in bfloat16. The rate stays the same until the decay, so the
    number of steps need not be known before: the signal USR1 begins the decay at once.
    """
    torch.manual_seed(SEED)
    model = Denoiser(vocabulary)
    model.check(data.tokens[:8], data.mask[:8])
    work = copy.deepcopy(model).bfloat16()
    work.cos, work.sin = model.cos, model.sin
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    master = [model.get_parameter(name) for name in trained]
    worker = [work.get_parameter(name) for name in trained]
    ema = [parameter.detach().clone() for parameter in master]
    for parameter in master:
        parameter.grad = torch.zeros_like(parameter)
    in_blocks = ["transformer_blocks." in name and p.ndim == 2 for name, p in zip(trained, master, strict=True)]
    optimizers = [
        Muon([p for p, inside in zip(master, in_blocks, strict=True) if inside], lr=MUON_RATE),
        torch.optim.AdamW(
            [p for p, inside in zip(master, in_blocks, strict=True) if not inside],
            lr=ADAM_RATE,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        ),
    ]
    rates = (MUON_RATE, ADAM_RATE)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved["step"]
        torch._foreach_copy_([p.data for p in master], saved["master"])
        ema = saved["ema"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(saved["random"])

    def loss_of(tokens: Tensor, mask: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        mix = times[:, None, None]
        velocity = work(tokens, mask, (1 - mix) * clean + mix * noise, times)
        return F.mse_loss(velocity.float(), noise - clean)

    function = torch.compile(loss_of) if compiled else loss_of
    done = start

    def finish(*_: object) -> None:
        nonlocal steps
        steps = min(steps, done + decay)
        print(f"will end at step {steps}", flush=True)

    signal.signal(signal.SIGUSR1, finish)
    mean, since, counted = 0.0, time.time(), 0
    while done < steps:
        step = done
        with torch.no_grad():
            torch._foreach_copy_(worker, master)
        tokens, mask, clean = data.batch(BATCH, step >= FOCUS_FROM)
        times = draw_times(BATCH)
        with mock.patch.object(F, "scaled_dot_product_attention", plain_attention):
            loss = function(tokens, mask, clean, torch.randn_like(clean), times)
        for parameter in worker:
            parameter.grad = None
        loss.backward()
        torch._foreach_copy_([p.grad for p in master], [p.grad for p in worker])
        nn.utils.clip_grad_norm_(master, 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(step, steps, decay)
            optimizer.step()
        done = step + 1
        if done % EMA_EVERY == 0:
            with torch.no_grad():
                torch._foreach_lerp_(ema, [p.detach() for p in master], 1 - min(EMA_DECAY, done / (done + 40)))
        mean += loss.item()
        counted += 1
        if done % 100 == 0:
            now = time.time()
            print(f"step {done} loss {mean / counted:.4f} {(now - since) / counted:.3f} s/step", flush=True)
            mean, since, counted = 0.0, now, 0
        if done % 500 == 0 or done == steps:
            state = {
                "step": done,
                "master": [p.detach() for p in master],
                "ema": ema,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "random": torch.get_rng_state(),
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)


def export(checkpoint: Path, vae: AutoencoderKLFlux2, tokenizer: Qwen2Tokenizer, out: Path) -> None:
    """Write the averaged weights as a model repository, in float16."""
    model = Denoiser(len(tokenizer))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        torch._foreach_copy_(trained, torch.load(checkpoint, weights_only=True)["ema"])
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        transformer=model.transformer,
        is_distilled=False,
    ).to(torch.float16)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part)
    for file in part.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (part / "triptych.json").write_text(json.dumps({"defaults": DEFAULTS}, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished model")
    parser.add_argument("--emojibase", type=Path, default=Path("emojibase-data-17.0.0.tgz"))
    parser.add_argument("--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--steps", type=int, default=4800, help="all steps of the text encoder and transformer")
    parser.add_argument("--decay", type=int, default=1000, help="how many of them, at the end, lower the rate")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile (needs a C++ compiler)")
    parser.add_argument("--export-only", action="store_true", help="write the model of the last checkpoint and stop")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "vae").exists():
        train_vae(to_tensor(list(load_pictures(options.emojibase, options.font, VAE_GROUPS))), out / "vae")
    vae = AutoencoderKLFlux2.from_pretrained(out / "vae", dtype=torch.float32).eval()
    checkpoint = out / "denoiser.pt"
    if not options.export_only:
        examples, plain = load_examples(options.emojibase, options.font)
        if not (out / "tokenizer").exists():
            make_tokenizer([text for e in examples for text, _ in e.captions], out / "tokenizer")
        tokenizer = Qwen2Tokenizer.from_pretrained(out / "tokenizer")
        data = Data(examples, plain, vae, tokenizer)
        train(data, len(tokenizer), checkpoint, options.steps, options.decay, not options.no_compile)
    export(checkpoint, vae, Qwen2Tokenizer.from_pretrained(out / "tokenizer"), out / "emoji-64")


if __name__ == "__main__":
    main()
