"""Encoders cut to what is read of them: the same hidden states to the bit, and nothing above them."""

from pathlib import Path

import pytest
import torch
import transformers

from triptych.components.hollow import is_hollow
from triptych.components.need import HEAD, Need
from triptych.errors import RecipeError

from .support import from_pretrained, load, tensors, write_component

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,  # more than the text model has
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
CLASSES = {
    "Qwen3ForCausalLM": dict(TEXT),
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {"depth": 5, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 8},
    },
    "Mistral3ForConditionalGeneration": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 8},
    },
    "Gemma3ForConditionalGeneration": {"text_config": TEXT, "vision_config": TOWER, "mm_tokens_per_image": 4},
    "T5EncoderModel": {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_heads": 2},
    "UMT5EncoderModel": {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_heads": 2},
    "CLIPTextModel": {**TEXT, "max_position_embeddings": 20},
    "CLIPTextModelWithProjection": {**TEXT, "max_position_embeddings": 20},
    "CLIPVisionModel": {**TOWER, "num_hidden_layers": 4},
    "CLIPVisionModelWithProjection": {**TOWER, "num_hidden_layers": 4},
    "SiglipVisionModel": {**TOWER, "num_hidden_layers": 4},
}


@pytest.fixture(scope="module")
def repo_of(tmp_path_factory: pytest.TempPathFactory):
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            cls = getattr(transformers, name)
            torch.manual_seed(3)
            model = cls(cls.config_class(**CLASSES[name]))
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            built[name] = write_component(tmp_path_factory.mktemp(name), model)
        return built[name]

    return get


def run(module: torch.nn.Module, dtype: torch.dtype, **options: object):
    image = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)}
    text = {"input_ids": torch.arange(3, 15).reshape(2, 6)}
    with torch.no_grad():
        return module(**(image if "Vision" in type(module).__name__ else text), output_hidden_states=True, **options)


def present(module: torch.nn.Module) -> set[str]:
    return {name for name, tensor in tensors(module).items() if not tensor.is_meta}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", [(1, 3), (-2,), (2, -4), (0,), (-1,), (4,)], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_the_entries_read_are_the_same_to_the_bit(repo_of, name: str, read: tuple[int, ...], dtype) -> None:
    repo = repo_of(name)
    whole = from_pretrained(repo, "text_encoder", dtype)
    loaded = load(repo, "text_encoder", Need.hidden(*read), str(dtype).removeprefix("torch."))
    mine, expected = run(loaded.component, dtype).hidden_states, run(whole, dtype).hidden_states
    assert len(mine) == len(expected) == 5
    assert all(torch.equal(mine[entry], expected[entry]) for entry in read)
    last = max(1, *(entry % 5 for entry in read))  # entry 0 takes the first layer to be seen
    assert [entry is None for entry in mine] == [index > last for index in range(5)]
    assert loaded.nbytes < sum(tensor.nbytes for tensor in whole.state_dict().values()) or name in ("T5EncoderModel",
        "UMT5EncoderModel", "CLIPTextModel", "CLIPVisionModel")  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_above_the_last_entry_read_is_loaded(repo_of, name: str) -> None:
    module = load(repo_of(name), "text_encoder", Need.hidden(2)).component
    left = present(module)
    unread = ("layers.2.", "layers.3.", "block.2.", "block.3.", "visual", "vision_tower", "projection", "projector",
              "lm_head", "final_layer_norm", "post_layernorm", "model.norm.", "language_model.norm.", "head.")  # fmt: skip
    assert [key for key in left if any(part in key for part in unread)] == []
    assert any("1." in key for key in left)


def test_entries_selected_by_index_are_the_same(repo_of) -> None:
    """transformers itself keeps only the entries that are asked for, None elsewhere; ours follow it."""
    whole = from_pretrained(repo_of("Qwen3ForCausalLM"), "text_encoder", torch.float32)
    part = load(repo_of("Qwen3ForCausalLM"), "text_encoder", Need.hidden(1, 3)).component
    ids = torch.arange(6).reshape(1, 6)
    with torch.no_grad():
        mine, expected = (each(ids, output_hidden_states=[1, -2]).hidden_states for each in (part, whole))
    assert [each is None for each in mine] == [each is None for each in expected] == [True, False, True, False, True]
    assert torch.equal(mine[1], expected[1]) and torch.equal(mine[3], expected[3])


def test_entries_counted_from_the_end_are_the_same_in_a_plain_tuple(repo_of) -> None:
    for name in ("CLIPVisionModel", "Qwen3ForCausalLM"):
        whole = from_pretrained(repo_of(name), "text_encoder", torch.float32)
        part = load(repo_of(name), "text_encoder", Need.hidden(-2)).component
        mine, expected = (
            next(each for each in run(module, torch.float32, return_dict=False) if isinstance(each, tuple))
            for module in (part, whole)
        )
        assert torch.equal(mine[-2], expected[-2])


def test_results_of_layers_that_are_not_there_are_not_given(repo_of) -> None:
    output = run(
        load(repo_of("CLIPVisionModelWithProjection"), "text_encoder", Need.hidden(-2)).component, torch.float32
    )
    assert output.image_embeds is None and output.last_hidden_state is None
    assert (
        run(load(repo_of("Qwen3ForCausalLM"), "text_encoder", Need.hidden(-1)).component, torch.float32).logits is None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["SiglipVisionModel", "T5EncoderModel", "UMT5EncoderModel"])
def test_a_model_read_at_its_last_hidden_state_loads_no_pooler(repo_of, name: str, dtype: torch.dtype) -> None:
    whole = from_pretrained(repo_of(name), "text_encoder", dtype)
    part = load(repo_of(name), "text_encoder", Need.BODY, str(dtype).removeprefix("torch.")).component
    assert torch.equal(run(part, dtype).last_hidden_state, run(whole, dtype).last_hidden_state)
    assert not [key for key in present(part) if key.startswith("head.")]
    assert present(part) == {key for key in tensors(whole) if not key.startswith("head.")}


def test_a_vision_language_model_keeps_its_tower_when_images_are_encoded(repo_of) -> None:
    name = "Gemma3ForConditionalGeneration"
    whole = from_pretrained(repo_of(name), "text_encoder", torch.float32)
    part = load(repo_of(name), "text_encoder", Need.hidden(2, vision=True)).component
    towers = {key for key in tensors(whole) if "vision_tower" in key or "projector" in key}
    assert towers and towers <= present(part)
    with torch.no_grad():
        pixels = torch.rand(1, 3, 16, 16)
        mine, expected = (each.get_image_features(pixels, return_dict=True) for each in (part, whole))
    assert torch.equal(mine.pooler_output, expected.pooler_output)


def test_the_family_pipeline_reads_a_cut_image_encoder(repo_of) -> None:
    """Wan's image-to-video helper itself, on the encoder cut to what it reads."""
    from diffusers import WanImageToVideoPipeline

    processor = transformers.CLIPImageProcessor(crop_size=16, size={"shortest_edge": 16})
    whole = from_pretrained(repo_of("CLIPVisionModel"), "text_encoder", torch.float32)
    part = load(repo_of("CLIPVisionModel"), "text_encoder", Need.hidden(-2)).component
    embeds = []
    for module in (whole, part):
        pipeline = WanImageToVideoPipeline(None, None, None, None, processor, module)
        image = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            embeds.append(pipeline.encode_image(image, torch.device("cpu")))
    assert torch.equal(*embeds)


def test_a_class_that_does_not_declare_its_layers_is_loaded_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(transformers.Qwen3Model, "_can_record_outputs", {})
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT))
    repo = write_component(tmp_path, model)
    module = load(repo, "text_encoder", Need.hidden(2), by_library=True).component
    assert present(module) == set(tensors(model)) and not is_hollow(module)


# --- joining needs


def test_joined_needs_satisfy_both() -> None:
    assert Need.CONFIG | Need.DECODE == Need.DECODE == Need.DECODE | Need.CONFIG
    assert Need.ENCODE | Need.DECODE == Need.FULL
    assert Need.hidden(3) | Need.hidden(-1) == Need.hidden(3, -1)
    assert Need.hidden(3) | Need.hidden(3, vision=True) == Need.hidden(3, vision=True)
    assert Need.hidden(3) | Need.FULL == Need.FULL
    assert (Need.hidden(3) | Need.BODY) == Need.BODY
    assert Need.without("a", "b") | Need(unread=frozenset({"b"})) == Need(unread=frozenset({"b"}))
    assert Need(unread=frozenset({HEAD, "b"})) | Need.BODY == Need.BODY


def test_a_joined_need_is_optional_only_where_both_are() -> None:
    def late(options) -> bool:
        return options["late"]

    def small(options) -> bool:
        return options["small"]

    assert (Need.CONFIG | Need.FULL.optional(late)).required
    assert (Need.CONFIG | Need.FULL.optional(late)).condition is None
    both = Need.CONFIG.optional(late) | Need.FULL.optional(small)
    assert both.weights and not both.required and both.condition is not None
    assert [both.condition({"late": late, "small": small}) for late in (0, 1) for small in (0, 1)] == [0, 1, 1, 1]
    assert (Need.CONFIG.optional(late) | Need.FULL.optional(late)).condition is late
    assert (Need.CONFIG.optional() | Need.FULL.optional(late)).condition is None


@pytest.mark.parametrize(
    ("need", "text"),
    [
        (Need.FULL, "full"),
        (Need.CONFIG, "config"),
        (Need.ENCODE, "encoding half"),
        (Need.DECODE.optional(), "decoding half"),
        (Need.hidden(9, 18), "hidden states 9, 18, no head, no vision"),
        (Need.BODY, "no head"),
        (Need.without("a", "b"), "no a, no b"),
    ],
)
def test_a_need_reads_as_words(need: Need, text: str) -> None:
    assert str(need) == text


def test_reading_no_hidden_state_is_a_bug_of_the_family() -> None:
    with pytest.raises(RecipeError, match="names no hidden state"):
        Need.hidden()
