"""Loading gives what the component's own library gives, tensor by tensor; a part of it, exactly that part."""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import tiny
import torch
from conftest import TinyRepo
from safetensors.torch import load_file, save_file

from triptych.components import loading
from triptych.components.hollow import is_hollow, running_stage
from triptych.components.need import Need
from triptych.errors import ComponentFileError, HollowComponentError, ModelError, RecipeError, UnknownDtypeError

from .support import assert_same_tensors, copy, from_pretrained, load, load_anyhow, tensors, write_component

COMPONENTS = [
    ("flux2_klein", {}, ("text_encoder", "transformer", "vae")),
    ("qwen_image", {}, ("text_encoder", "transformer", "vae")),
    ("wan", {"version": "2.1"}, ("text_encoder", "transformer", "vae")),
    ("wan", {"version": "2.2"}, ("text_encoder", "transformer", "transformer_2", "vae")),
    ("wan", {"version": "2.2-5b"}, ("text_encoder", "transformer", "vae")),
]
EACH = [
    pytest.param(family, variant, name, id="-".join([family, *variant.values(), name]))
    for family, variant, names in COMPONENTS
    for name in names
]
EACH_CLASS = [each for each in EACH if each.id and "2.2-" not in each.id] + [EACH[-1]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VAES = [pytest.param(*each.values[:2], id=each.id) for each in EACH_CLASS if each.values[2] == "vae"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "variant", "name"), EACH)
def test_a_whole_component_equals_from_pretrained(tiny_repo: TinyRepo, family, variant, name, dtype) -> None:
    repo = tiny_repo(family, **variant)
    loaded = load(repo, name, dtype=dtype)
    theirs = from_pretrained(repo, name, DTYPES[dtype])
    assert_same_tensors(loaded.component, theirs)
    assert loaded.nbytes == sum({id(each): each.nbytes for each in theirs.state_dict(keep_vars=True).values()}.values())
    mine, its = (
        {name: each.requires_grad for name, each in module.named_parameters()} for module in (loaded.component, theirs)
    )
    assert mine == its  # PyTorch multiplies in another form where a weight may have gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "variant", "name"), EACH_CLASS)
def test_a_checkpoint_in_bfloat16_is_cast_as_the_library_casts_it(tiny_repo, family, variant, name, dtype) -> None:
    repo = tiny_repo(family, **variant, dtype="bfloat16")
    assert_same_tensors(load(repo, name, dtype=dtype).component, from_pretrained(repo, name, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
def test_shards_of_a_variant_are_found(tiny_repo: TinyRepo, tmp_path: Path, name: str, dtype: str) -> None:
    repo = copy(tiny_repo("wan", version="2.1"), tmp_path)
    whole = from_pretrained(repo, name, DTYPES[dtype])
    assert len(tiny.shard(repo, name)) > 1
    assert_same_tensors(load(repo, name, dtype=dtype).component, whole)
    tiny.as_variant(repo, name)
    loaded = load(repo, name, dtype=dtype, variant="fp16").component
    assert_same_tensors(loaded, from_pretrained(repo, name, DTYPES[dtype], variant="fp16"))
    with pytest.raises(ComponentFileError, match=rf"{name}/: has no weight file, except in variant 'fp16'"):
        load(repo, name, dtype=dtype)


def test_a_component_without_files_of_the_variant_gives_its_plain_ones_and_says_so(tiny_repo, caplog) -> None:
    repo = tiny_repo("flux2_klein")
    with caplog.at_level(logging.WARNING):
        loaded = load(repo, "vae", variant="fp16").component
    assert_same_tensors(loaded, from_pretrained(repo, "vae", torch.float32))
    assert "no 'fp16' files for vae" in caplog.text


def test_the_dtype_is_the_checkpoints_unless_one_is_given(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("flux2_klein", dtype="bfloat16")
    assert load(repo, "vae").component.dtype == torch.bfloat16
    assert load(repo, "vae", Need.CONFIG).component.dtype == torch.bfloat16
    given = {"vae": "float32", "default": "float16"}
    assert load(repo, "vae", Need.DECODE, given).component.dtype == torch.float32
    assert load(repo, "transformer", Need.CONFIG, given).component.dtype == torch.float16


def test_tied_weights_are_one_tensor_and_counted_once(tiny_repo: TinyRepo) -> None:
    module = load(tiny_repo("wan"), "text_encoder", dtype="bfloat16").component
    assert module.shared.weight is module.encoder.embed_tokens.weight


@pytest.mark.parametrize("first", ["shared.weight", "encoder.embed_tokens.weight"])
def test_tied_weights_that_are_stored_twice_and_differ_are_untied_as_the_library_does(
    tiny_repo, tmp_path, first
) -> None:
    repo = copy(tiny_repo("wan"), tmp_path)
    (file,) = (repo / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    (stored,) = {"shared.weight", "encoder.embed_tokens.weight"} & weights.keys()
    alike = weights.pop(stored)
    second = ({"shared.weight", "encoder.embed_tokens.weight"} - {first}).pop()
    save_file({**weights, first: alike, second: alike.clone()}, file, {"format": "pt"})
    module = load(repo, "text_encoder").component
    assert module.shared.weight is module.encoder.embed_tokens.weight
    assert_same_tensors(module, from_pretrained(repo, "text_encoder", torch.float32))
    save_file({**weights, first: alike, second: alike + 1}, file, {"format": "pt"})
    module = load(repo, "text_encoder", by_library=True).component
    assert not torch.equal(module.shared.weight, module.encoder.embed_tokens.weight)
    assert_same_tensors(module, from_pretrained(repo, "text_encoder", torch.float32))


def test_weights_of_8_bits_are_loaded_in_the_dtype_of_the_others_with_a_warning(tiny_repo, tmp_path, caplog) -> None:
    repo = copy(tiny_repo("flux2_klein", dtype="bfloat16"), tmp_path)
    (file,) = (repo / "transformer").glob("*.safetensors")
    weights = load_file(file)
    small = {key: each.to(torch.float8_e4m3fn) if each.ndim == 2 else each for key, each in weights.items()}
    assert {each.dtype for each in small.values()} == {torch.float8_e4m3fn, torch.bfloat16}
    save_file(small, file, {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        module = load(repo, "transformer").component
    assert_same_tensors(module, from_pretrained(repo, "transformer", torch.bfloat16))
    assert load(repo, "transformer", Need.CONFIG).component.dtype == torch.bfloat16
    assert "transformer of" in caplog.text and "is stored as float8_e4m3fn" in caplog.text
    caplog.clear()
    save_file({key: each.to(torch.float8_e4m3fn) for key, each in weights.items()}, file, {"format": "pt"})
    assert_same_tensors(load(repo, "transformer").component, from_pretrained(repo, "transformer", torch.float32))
    assert "it is loaded as float32, in more memory, unless a dtype is named" in caplog.text
    caplog.clear()
    load(repo, "transformer", dtype="bfloat16")
    assert not caplog.text


def test_a_component_without_weights_comes_from_its_library(tiny_repo: TinyRepo) -> None:
    loaded = load(tiny_repo("flux2_klein"), "tokenizer")
    assert loaded.nbytes == 0
    assert loaded.component("a fox")["input_ids"]


# --- parts


def hidden_states(module: torch.nn.Module, **inputs: object) -> tuple[torch.Tensor, ...]:
    ids = torch.arange(2 * 7).reshape(2, 7)
    with torch.no_grad():
        return module(input_ids=ids, output_hidden_states=True, **inputs).hidden_states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "read"), [("flux2_klein", (9, 18, 27)), ("qwen_image", (-1,))])
def test_a_text_encoder_cut_to_the_hidden_states_read_gives_the_same_ones(tiny_repo, family, read, dtype) -> None:
    repo = tiny_repo(family)
    loaded, theirs = (
        load(repo, "text_encoder", Need.hidden(*read), dtype),
        from_pretrained(repo, "text_encoder", DTYPES[dtype]),
    )
    mine, expected = hidden_states(loaded.component), hidden_states(theirs)
    assert len(mine) == len(expected)
    assert all(torch.equal(mine[entry], expected[entry]) for entry in read)
    assert_part_of(loaded, theirs)
    gone = {"lm_head.weight"} | {name for name in tensors(theirs) if "visual" in name or ".layers.27" in name}
    assert not gone & real(loaded.component).keys()


def real(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors(module).items() if not tensor.is_meta}


def assert_part_of(loaded, theirs: torch.nn.Module) -> None:
    """Every tensor that is there equals the library's, and the bytes are those of the ones there."""
    kept, expected = real(loaded.component), tensors(theirs)
    assert {name: each.dtype for name, each in kept.items()} == {name: expected[name].dtype for name in kept}
    assert [name for name, tensor in kept.items() if not torch.equal(tensor, expected[name])] == []
    persistent = loaded.component.state_dict(keep_vars=True).keys() & kept.keys()
    assert loaded.nbytes == sum(kept[name].nbytes for name in persistent)
    assert 0 < loaded.nbytes < sum(tensor.nbytes for tensor in theirs.state_dict().values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "variant"), VAES)
def test_halves_of_an_autoencoder_encode_and_decode_as_the_whole_one(tiny_repo, family, variant, dtype) -> None:
    repo = tiny_repo(family, **variant)
    theirs = from_pretrained(repo, "vae", DTYPES[dtype])
    encoding, decoding = load(repo, "vae", Need.ENCODE, dtype), load(repo, "vae", Need.DECODE, dtype)
    shape = (1, 3, 32, 48) if family == "flux2_klein" else (1, 3, 5, 32, 48)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(DTYPES[dtype])
    with torch.no_grad():
        latents = theirs.encode(image).latent_dist.mode()
        assert torch.equal(encoding.component.encode(image).latent_dist.mode(), latents)
        assert torch.equal(decoding.component.decode(latents).sample, theirs.decode(latents).sample)
        assert_part_of(encoding, theirs)
        assert_part_of(decoding, theirs)
        token = running_stage.set("editing")
        with pytest.raises(
            HollowComponentError, match="'editing' ran '(post_quant_conv|decoder)' of component 'vae'.*'encoder'"
        ) as error:
            encoding.component.decode(latents)
        running_stage.reset(token)
        assert (error.value.component, error.value.role, error.value.stage) == ("vae", "encoder", "editing")
        with pytest.raises(HollowComponentError, match="code outside any stage ran '(quant_conv|encoder)"):
            decoding.component.encode(image)
    assert {str(half.component.device) for half in (encoding, decoding)} == {"cpu"}
    assert {half.component.dtype for half in (encoding, decoding)} == {DTYPES[dtype]}
    assert type(encoding.component).__name__ == type(theirs).__name__ and isinstance(encoding.component, type(theirs))


def test_running_an_unused_vision_tower_raises(tiny_repo: TinyRepo) -> None:
    module = load(tiny_repo("qwen_image"), "text_encoder", Need.hidden(-1)).component
    for run in (module.model.visual, module.model.visual.blocks[0], module.get_image_features):
        with pytest.raises(HollowComponentError, match=r"'model\.visual.*' of component 'text_encoder'"):
            run(torch.zeros(64, 96), torch.tensor([[1, 8, 8]]))


def test_a_need_of_a_part_that_the_class_has_not_is_a_bug_of_the_family(tiny_repo: TinyRepo) -> None:
    with pytest.raises(RecipeError, match="'vae' .* has no part 'refiner'"):
        load(tiny_repo("flux2_klein"), "vae", Need.without("refiner"))
    with pytest.raises(RecipeError, match="names no hidden state"):
        Need.hidden()


@pytest.mark.parametrize("entry", [32, -33])
def test_a_hidden_state_that_the_model_has_not_is_an_error_of_the_model(tiny_repo: TinyRepo, entry: int) -> None:
    with pytest.raises(
        ComponentFileError, match=rf"text_encoder/config.json: has 31 layers, .* no hidden state {entry}"
    ):
        load(tiny_repo("flux2_klein"), "text_encoder", Need.hidden(entry))


# --- hollow


@pytest.mark.parametrize(("family", "variant", "name"), EACH_CLASS)
def test_a_hollow_component_answers_for_itself_and_raises_when_run(tiny_repo, family, variant, name) -> None:
    repo = tiny_repo(family, **variant)
    loaded = load(repo, name, Need.CONFIG, "bfloat16")
    module, theirs = loaded.component, from_pretrained(repo, name, torch.bfloat16)
    assert loaded.nbytes == 0 and real(module) == {} and is_hollow(module) and not is_hollow(theirs)
    assert str(module.device) == "cpu" and module.dtype == torch.bfloat16
    assert isinstance(module, type(theirs))
    private = ("_name_or_path", "_use_default_values")
    ours, expected = dict(module.config.to_dict() if name == "text_encoder" else module.config), theirs.config
    expected = dict(expected.to_dict() if name == "text_encoder" else expected)
    for config in (ours, expected):
        for key in (*private, "dtype"):
            config.pop(key, None)
        [each.pop("dtype", None) for each in config.values() if isinstance(each, dict)]
    assert ours == expected
    for run in ("__call__", "forward", "encode", "decode"):
        if run != "encode" and run != "decode" or hasattr(theirs, run):
            with pytest.raises(HollowComponentError, match=f"ran component '{name}', but role 'encoder'"):
                getattr(module, run)(torch.zeros(1))
    for path, part in module.named_children():
        if not isinstance(part, torch.nn.ModuleList):
            with pytest.raises(HollowComponentError, match=f"ran '{path}' of component '{name}'"):
                part(torch.zeros(1))


def test_the_dtype_of_a_hollow_component_is_never_guessed(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    repo = copy(tiny_repo("flux2_klein"), tmp_path)
    (repo / "vae/diffusion_pytorch_model.safetensors").unlink()
    module = load(repo, "vae", Need.CONFIG).component
    assert module.config.batch_norm_eps == 0.013
    with pytest.raises(UnknownDtypeError, match="the dtype of 'vae'"):
        _ = module.dtype


# --- nothing outside the need is read


def test_a_role_loads_where_the_weights_of_other_components_are_missing(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    repo = copy(tiny_repo("flux2_klein"), tmp_path)
    whole = from_pretrained(repo, "vae", torch.float32)
    tiny.shard(repo, "transformer")[0].unlink()
    (repo / "text_encoder/model.safetensors").unlink()
    assert_same_tensors(load(repo, "vae").component, whole)
    assert load(repo, "transformer", Need.CONFIG).component.config.in_channels == 24
    with pytest.raises(ComponentFileError, match=r"text_encoder/: has no weight file"):
        load(repo, "text_encoder", dtype="float32")


def test_unneeded_tensors_are_not_read(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    """Their bytes are gone from the disk (a hole): reading them would be reading zeros, so look at what was mapped."""
    repo = copy(tiny_repo("flux2_klein"), tmp_path)
    shards = tiny.shard(repo, "text_encoder", max_shard_size="6KB")
    index = json.loads((repo / "text_encoder/model.safetensors.index.json").read_text())["weight_map"]
    layers = tuple(f"model.layers.{layer}." for layer in range(27))
    needed = {file for key, file in index.items() if key.startswith((*layers, "model.embed_tokens"))}
    idle = [shard for shard in shards if shard.name not in needed]
    assert idle, "shards are small enough to hold unneeded layers only"
    for shard in idle:  # the header stays, for the plan; the data goes
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        with shard.open("r+b") as file:
            file.truncate(header)
    expected = hidden_states(load(tiny_repo("flux2_klein"), "text_encoder").component)
    mine = hidden_states(load(repo, "text_encoder", Need.hidden(9, 18, 27)).component)
    assert all(torch.equal(mine[entry], expected[entry]) for entry in (9, 18, 27))
    with pytest.raises(ComponentFileError, match=r"\.safetensors: is truncated or damaged"):
        load(repo, "text_encoder")


def test_only_needed_tensors_are_asked_for(tiny_repo: TinyRepo, monkeypatch) -> None:
    asked: list[str] = []
    real_open = safetensors.safe_open

    class Watched:
        def __init__(self, *arguments: object, **options: object) -> None:
            self.file = real_open(*arguments, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, key: str) -> torch.Tensor:
            asked.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    load(tiny_repo("flux2_klein"), "vae", Need.DECODE)
    assert asked and not [key for key in asked if key.startswith(("encoder.", "quant_conv."))]
    asked.clear()
    load(tiny_repo("qwen_image"), "text_encoder", Need.hidden(1))
    assert asked and not [
        key for key in asked if "visual" in key or "layers.1" in key or "norm.weight" == key[-11:][1:]
    ]


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The weight files that are opened, once for each time."""
    names: list[str] = []
    real_open = safetensors.safe_open

    def watched(file: Path, **options: object):
        names.append(Path(file).name)
        return real_open(file, **options)

    monkeypatch.setattr(safetensors, "safe_open", watched)
    return names


def mapped(module: torch.nn.Module, repo: Path) -> list[str]:
    """The tensors whose memory is a weight file of `repo`, not a copy."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(repo) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    named = tensors(module).items()
    return [name for name, each in named if any(start <= each.data_ptr() < stop for start, stop in spans)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads what is mapped from Linux's /proc")
def test_weights_that_need_no_cast_stay_mapped_and_cast_ones_let_go_of_their_file(
    tiny_repo, opened, monkeypatch
) -> None:
    repo = tiny_repo("flux2_klein")
    monkeypatch.setattr(loading, "MAPPED_AT_ONCE", 4096)
    module = load(repo, "transformer").component
    assert set(mapped(module, repo)) == set(dict(module.named_parameters()))
    assert opened == ["diffusion_pytorch_model.safetensors"]
    del module
    opened.clear()
    module = load(repo, "transformer", dtype="bfloat16").component
    assert mapped(module, repo) == [] and str(repo) not in Path("/proc/self/maps").read_text()
    assert len(opened) > 10, "a file is opened anew for each batch, so that the pages of the one before are released"
    assert_same_tensors(module, from_pretrained(repo, "transformer", torch.bfloat16))


def test_components_load_in_several_threads_at_once(tiny_repo: TinyRepo) -> None:
    """The libraries build models under a default dtype that belongs to the whole process."""
    repo = tiny_repo("qwen_image")
    jobs = [(name, dtype) for dtype in DTYPES for name in ("text_encoder", "vae")] * 2
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda job: load_anyhow(repo, job[0], dtype=job[1]).component, jobs))
    for (name, dtype), module in zip(jobs, loaded, strict=True):
        assert_same_tensors(module, from_pretrained(repo, name, DTYPES[dtype]))
    assert torch.get_default_dtype() == torch.float32
    assert not torch.nn.Linear(1, 1).weight.is_meta


def test_components_that_libraries_load_whole_leave_the_process_as_it_was(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    repo = copy(tiny_repo("flux2_klein"), tmp_path)
    (file,) = (repo / "vae").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    jobs = [(name, dtype) for dtype in ("bfloat16", "float32") for name in ("vae", "text_encoder")] * 3
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda job: load_anyhow(repo, job[0], dtype=job[1]).component, jobs))
    for (name, dtype), module in zip(jobs, loaded, strict=True):
        assert_same_tensors(module, from_pretrained(tiny_repo("flux2_klein"), name, DTYPES[dtype]))
    assert torch.get_default_dtype() == torch.float32
    assert not torch.nn.Linear(1, 1).weight.is_meta


# --- other checkpoints


KEYS = {
    "flux2_klein": {
        "as saved": lambda key: key,
        "without the base model's prefix": lambda key: key.removeprefix("model."),
        "wrapped once more": lambda key: f"model.{key}" if key.startswith("model.") else key,
    },
    "qwen_image": {
        "as saved, and as before transformers 4.52": lambda key: key,
        "as the modules are named": lambda key: re.sub(
            r"^(model|visual)\.",
            lambda found: {"model.": "model.language_model.", "visual.": "model.visual."}[found[0]],
            key,
        ),
    },
    "wan": {"as saved": lambda key: key, "wrapped in another model": lambda key: f"transformer.{key}"},
}


@pytest.mark.parametrize(
    ("family", "layout"), [(family, layout) for family, layouts in KEYS.items() for layout in layouts]
)
def test_keys_of_older_checkpoints_are_renamed_as_the_library_does(tiny_repo, tmp_path, family, layout) -> None:
    repo = copy(tiny_repo(family), tmp_path)
    file = repo / "text_encoder/model.safetensors"
    saved = load_file(file)
    assert family != "qwen_image" or {key.split(".")[0] for key in saved} == {"model", "visual", "lm_head"}
    save_file({KEYS[family][layout](key): value for key, value in saved.items()}, file, {"format": "pt"})
    theirs, info = type(from_pretrained(tiny_repo(family), "text_encoder", torch.float32)).from_pretrained(
        file.parent, output_loading_info=True
    )
    if info["missing_keys"]:  # the library itself would make those weights up
        with pytest.raises(ComponentFileError, match="text_encoder/: missing keys of"):
            load(repo, "text_encoder", by_library=True)
        return
    assert_same_tensors(load(repo, "text_encoder").component, theirs.eval())
    mine = hidden_states(load(repo, "text_encoder", Need.hidden(-1)).component)
    assert torch.equal(mine[-1], hidden_states(load(tiny_repo(family), "text_encoder").component)[-1])


def test_tensors_that_the_class_does_not_know_are_left_alone(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    repo = copy(tiny_repo("flux2_klein"), tmp_path)
    for file in (repo / "text_encoder/model.safetensors", repo / "vae/diffusion_pytorch_model.safetensors"):
        save_file({**load_file(file), "old.buffer": torch.zeros(3)}, file, {"format": "pt"})
    for name in ("text_encoder", "vae"):
        assert_same_tensors(load(repo, name).component, load(tiny_repo("flux2_klein"), name).component)


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_a_missing_tensor_is_an_error_and_never_made_up(tiny_repo: TinyRepo, tmp_path: Path, name: str) -> None:
    repo = copy(tiny_repo("flux2_klein"), tmp_path)
    (file,) = (repo / name).glob("*.safetensors")
    weights = load_file(file)
    key = "model.layers.3.mlp.up_proj.weight" if name == "text_encoder" else "encoder.conv_in.weight"
    del weights[key]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=key):
        load(repo, name)
    if name == "vae":  # what is not needed may be missing
        assert_part_of(load(repo, name, Need.DECODE), from_pretrained(tiny_repo("flux2_klein"), name, torch.float32))


@pytest.mark.parametrize("need", [Need.FULL, Need.ENCODE])
@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_a_pickled_checkpoint_is_loaded_whole_with_a_warning(tiny_repo, tmp_path, caplog, name, need) -> None:
    repo = copy(tiny_repo("flux2_klein"), tmp_path)
    (file,) = (repo / name).glob("*.safetensors")
    target = "pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(target))
    file.unlink()
    with caplog.at_level(logging.WARNING):
        loaded = load(repo, name, need, dtype="bfloat16", by_library=True)
    assert_same_tensors(loaded.component, from_pretrained(repo, name, torch.bfloat16))
    assert loaded.nbytes >= sum(each.nbytes for each in loaded.component.parameters())
    assert f"{name}/{target} is a pickle: it is read by torch.load(weights_only=True)" in caplog.text
    assert "is loaded whole" in caplog.text


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_code_in_a_pickle_is_refused(tiny_repo: TinyRepo, tmp_path: Path, name: str) -> None:
    repo = copy(tiny_repo("flux2_klein"), tmp_path / "repo")
    (file,) = (repo / name).glob("*.safetensors")
    target = "pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({**load_file(file), "x": Exploit(tmp_path / "ran")}, file.with_name(target))
    file.unlink()
    with pytest.raises(ModelError, match=f"component '{name}' of .* could not be loaded"):
        load(repo, name, dtype="float32")
    assert not (tmp_path / "ran").exists()


def test_a_quantised_checkpoint_is_left_to_its_library(tiny_repo: TinyRepo, tmp_path: Path, caplog) -> None:
    repo = copy(tiny_repo("flux2_klein"), tmp_path)
    config = json.loads((repo / "transformer/config.json").read_text())
    config["quantization_config"] = {"quant_method": "no such method"}
    (repo / "transformer/config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match="component 'transformer'.*no such method"):
        load(repo, "transformer")
    assert "its checkpoint is quantised" in caplog.text
    assert load(repo, "transformer", Need.CONFIG).component.config.in_channels == 24


def test_scalar_and_empty_tensors_load(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 8, "patch_size": 4}))
    repo = write_component(tmp_path, model)
    assert_same_tensors(load(repo, "text_encoder").component, from_pretrained(repo, "text_encoder", torch.float32))


def test_a_processor_whose_libraries_are_missing_gives_its_tokenizer_with_a_warning(
    tiny_repo: TinyRepo, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    repo = copy(tiny_repo("flux2_klein"), tmp_path)
    index = repo / "model_index.json"
    entries = json.loads(index.read_text())
    index.write_text(json.dumps({**entries, "tokenizer": ["transformers", "PixtralProcessor"]}))
    dummy = type("PixtralProcessor", (), {"is_dummy": True, "_backends": ["torchvision"]})
    monkeypatch.setattr(transformers, "PixtralProcessor", dummy)
    tokenizer = load(repo, "tokenizer", Need.FULL).component
    assert tokenizer("a fox")["input_ids"]
    assert "PixtralProcessor needs libraries that are not installed" in caplog.text
    index.write_text(json.dumps({**entries, "scheduler": ["transformers", "PixtralProcessor"]}))
    with pytest.raises(ModelError, match="needs torchvision to be installed"):
        load(repo, "scheduler", Need.FULL)
