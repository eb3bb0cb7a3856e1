"""A broken repository is one clear error that names the file or the component; a sound one opens without its weights."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from conftest import TinyRepo
from huggingface_hub.errors import GatedRepoError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import triptych
from triptych.components import dtypes, files
from triptych.components.blueprint import component_class, draw
from triptych.components.dtypes import parse_dtype, resolve_dtype, suited
from triptych.components.files import FolderFiles, open_files
from triptych.components.headers import FIRST_READ, read_header
from triptych.components.need import Need
from triptych.components.repository import Repository
from triptych.errors import (
    ComponentFileError,
    ModelError,
    ParameterError,
    TriptychError,
    UnknownDtypeError,
    UsageError,
)

from .support import CPU, assert_same_tensors, copy, load

INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "_diffusers_version": "0.42.1",
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def repo(tiny_repo: TinyRepo, tmp_path: Path) -> Path:
    return copy(tiny_repo("flux2_klein"), tmp_path / "repo")


def write_index(repo: Path, **changes: object) -> None:
    index = json.loads((repo / "model_index.json").read_text())
    (repo / "model_index.json").write_text(json.dumps({**index, **changes}))


def write_config(repo: Path, component: str, **changes: object) -> None:
    file = repo / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_repository_says_what_it_holds(tiny_repo: TinyRepo) -> None:
    repository = Repository.open(tiny_repo("wan", version="2.2"))
    assert repository.family == "WanPipeline"
    assert list(repository.components) == [
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "transformer_2",
        "vae",
    ]
    assert repository.options == {"boundary_ratio": 0.8, "expand_timesteps": False}
    assert repository.defaults == {}


def test_an_absent_optional_component_is_left_out(tiny_repo: TinyRepo) -> None:
    assert "transformer_2" not in Repository.open(tiny_repo("wan", version="2.1")).components


def test_better_defaults_come_from_triptych_json(repo: Path) -> None:
    (repo / "triptych.json").write_text('{"defaults": {"height": 64}}')
    assert Repository.open(repo).defaults == {"height": 64}
    (repo / "triptych.json").write_text('{"defaults": [64]}')
    with pytest.raises(ComponentFileError, match="triptych.json: `defaults` should be an object"):
        Repository.open(repo)


# --- places that are no model


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nothing/here", "nothing/here: no such folder"),
        ("/nothing/here", "/nothing/here: no such folder"),
        ("models/of/mine/klein", "'models/of/mine/klein' is neither a folder nor a hub id"),
        ("no such model", "'no such model' is neither a folder nor a hub id"),
        ("", "neither a folder nor a hub id|has no model_index.json"),
        ("a\0b", "neither a folder nor a hub id"),
        ("x" * 5000, "neither a folder nor a hub id"),
        ("~nobody-of-that-name/x", "no such folder|neither a folder nor a hub id"),
        ("owner/name", "'owner/name' is not a folder and not in the hub's cache, and the hub cannot be reached"),
    ],
)
def test_a_source_that_is_no_model_is_an_error_that_says_why(source: str, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        Repository.open(source)


def test_a_path_that_is_no_folder_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no model_index.json: it is not a model in the diffusers layout"):
        Repository.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; a model is a folder with a model_index.json"):
        Repository.open(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no such folder"):
        Repository.open(tmp_path / "nothing")


def test_a_linked_component_folder_is_found_and_deeper_folders_are_not_searched(repo: Path, tmp_path: Path) -> None:
    shutil.move(repo / "vae", tmp_path / "elsewhere")
    (repo / "vae").symlink_to(tmp_path / "elsewhere")
    (repo / "vae/loop").symlink_to(repo)
    assert Repository.open(repo).weight_files("vae") == ["vae/diffusion_pytorch_model.safetensors"]
    assert "vae/loop/model_index.json" not in open_files(repo).list()


# --- the index


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "model_index.json: is not valid JSON"),
        ("\xff", "model_index.json: is not valid JSON"),
        ("[" * 100_000, "model_index.json: is not valid JSON"),
        ("[]", "model_index.json: should hold a JSON object, not a list"),
        ("{}", "names no pipeline class"),
        ('{"_class_name": 3}', "names no pipeline class"),
        ('{"_class_name": "P"}', "lists no components"),
        ('{"_class_name": "P", "vae": [null, null]}', "lists no components"),
    ],
)
def test_a_wrong_index_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model_index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ComponentFileError, match=message) as error:
        Repository.open(tmp_path)
    assert error.value.path == "model_index.json"


@pytest.mark.parametrize(
    "entry", ["diffusers", 3, None, {}, [], ["diffusers"], ["diffusers", None], ["diffusers", "A", "B"], [None, "A"]]
)
def test_a_wrong_entry_of_a_component_is_an_error(repo: Path, entry: object) -> None:
    write_index(repo, vae=entry)
    with pytest.raises(ComponentFileError, match=r"model_index.json: entry 'vae' should be \[library, class\]"):
        Repository.open(repo)


def test_a_component_that_the_index_does_not_list_is_an_error(repo: Path) -> None:
    with pytest.raises(ModelError, match="has no component 'transfomer'; did you mean 'transformer'.*It.* lists: "):
        load(repo, "transfomer")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            ["diffusers", "AutoencoderKLFlux3"],
            r"'AutoencoderKLFlux3', which the installed diffusers [\d.]+ does not have",
        ),
        (["diffusers", "AutoencoderKLFlux22"], "did you mean 'AutoencoderKLFlux2'"),
        (["diffusers", "logging"], "does not have"),
        (["transformers", "Trainer"], "nothing that can be loaded"),
        (
            ["transformers", "AutoModelForCausalLM"],
            "'AutoModelForCausalLM', which says of any model .* `architectures`",
        ),
        (
            ["my_models", "MyVae"],
            "class of 'my_models'; only classes of diffusers and transformers are loaded, never code",
        ),
        (["os", "system"], "only classes of diffusers and transformers"),
        (["vae.my_vae", "MyVae"], "only classes of diffusers and transformers"),
        (["..vae", "MyVae"], "only classes of diffusers and transformers"),
    ],
)
@pytest.mark.parametrize("need", [Need.FULL, Need.CONFIG])
def test_a_class_that_is_not_there_or_not_trusted_is_refused(repo: Path, need: Need, entry, message: str) -> None:
    (repo / "vae/my_vae.py").write_text("raise SystemExit('code of the repository was run')")
    write_index(repo, vae=entry)
    with pytest.raises(ModelError, match=message):
        load(repo, "vae", need)


@pytest.mark.parametrize("kind", ["AutoTokenizer", None])
def test_code_that_a_repository_brings_is_not_run_whatever_is_answered(
    repo: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (repo / "tokenizer/theirs.py").write_text("raise SystemExit('code of the repository was run')")
    file = repo / "tokenizer/tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    file.write_text(json.dumps({**settings, **({"tokenizer_class": "Theirs"} if kind else {})}))
    if kind is None:  # the class is one of transformers: what else the repository has is not looked at
        load(repo, "tokenizer")
        return
    write_index(repo, tokenizer=["transformers", kind])
    with pytest.raises(ModelError, match="component 'tokenizer' of .* could not be loaded"):
        load(repo, "tokenizer")


def test_what_a_quantiser_keeps_beside_the_weights_does_not_decide_over_the_dtype(repo: Path) -> None:
    weights = {"a.weight": torch.zeros(64, dtype=torch.uint8), "b.weight": torch.zeros(4, dtype=torch.bfloat16)}
    kept = {
        f"a.weight.{name}": torch.zeros(99) for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    }
    save_file({**weights, **kept, "c.absmaximum": torch.zeros(1)}, repo / WEIGHTS)
    assert dtypes.checkpoint_dtype(Repository.open(repo), "transformer") == "bfloat16"


def test_a_gated_repository_says_how_to_get_at_it() -> None:
    words = "403 Client Error.\n\nCannot access gated repo for url https://hub/a/b.\nVisit https://hub/a/b to ask for access."
    error = GatedRepoError.__new__(GatedRepoError)  # as the hub's client words it, without an answer of the hub
    error.args = (words,)
    told = files._reason(error)
    assert "Visit https://hub/a/b to ask for access. Then log in" in told and "HF_TOKEN" in told, told


def test_a_model_may_have_the_configuration_of_the_whole_that_it_is_a_part_of(
    tiny_repo: TinyRepo, tmp_path: Path
) -> None:
    repo = copy(tiny_repo("flux"), tmp_path / "repo")
    expected = load(repo, "text_encoder").component
    file = repo / "text_encoder/config.json"
    part = {**json.loads(file.read_text()), "model_type": "clip_text_model"}
    file.write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"], "text_config": part}))
    assert_same_tensors(load(repo, "text_encoder").component, expected)


def test_a_class_of_a_diffusers_pipeline_is_trusted(repo: Path) -> None:
    write_index(repo, vae=["ltx2", "LTX2Vocoder"])
    assert component_class(Repository.open(repo), "vae").__module__.startswith("diffusers.pipelines.ltx2")


# --- files of a component


def test_a_missing_file_is_an_error_that_names_it(repo: Path) -> None:
    (repo / "vae/config.json").unlink()
    with pytest.raises(ComponentFileError, match="vae/config.json: is missing"):
        load(repo, "vae")
    (repo / WEIGHTS).unlink()
    with pytest.raises(ComponentFileError, match="transformer/: has no weight file"):
        load(repo, "transformer", dtype="float32")
    repository = Repository.open(repo)
    with pytest.raises(UnknownDtypeError, match="the dtype of 'transformer'.*pass dtype="):
        resolve_dtype(repository, "transformer", parse_dtype("auto", repository))
    shutil.rmtree(repo / "tokenizer")
    with pytest.raises(ComponentFileError, match="tokenizer/: is missing"):
        load(repo, "tokenizer")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_an_error_of_its_component(repo: Path, name: str) -> None:
    (repo / "tokenizer" / name).write_text('{"version": 3, "model": {"type": "nothing"}, "added_tokens": 5}'[:-9])
    with pytest.raises(ModelError, match="component 'tokenizer' of .*could not be loaded"):
        load(repo, "tokenizer")


def test_a_missing_shard_is_an_error_that_names_it(repo: Path) -> None:
    shard = tiny.shard(repo, "transformer")[1]
    shard.unlink()
    with pytest.raises(ComponentFileError, match=f"transformer/{shard.name}: is missing, but .*index.json names it"):
        load(repo, "transformer")


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": []}', '{"weight_map": {"a": "../../x"}}', "{}"])
def test_a_wrong_shard_index_is_an_error(repo: Path, index: str) -> None:
    tiny.shard(repo, "transformer")
    (repo / f"{WEIGHTS}.index.json").write_text(index)
    with pytest.raises(ComponentFileError, match="transformer/"):
        load(repo, "transformer")


def test_a_truncated_weight_file_is_found_before_anything_is_read(repo: Path) -> None:
    whole = (repo / WEIGHTS).stat().st_size
    with (repo / WEIGHTS).open("r+b") as file:
        file.truncate(whole - 1)
    with pytest.raises(ComponentFileError, match=f"{WEIGHTS}: is truncated or damaged: {whole - 1} bytes .* {whole}"):
        load(repo, "transformer")


def test_headers_alone_are_enough_to_draw_every_component(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    whole = Repository.open(tiny_repo("wan", version="2.2"))
    tiny.header_only(copy(whole.files.local([]), tmp_path / "headers"))
    headers = Repository.open(tmp_path / "headers")
    for name in ("text_encoder", "transformer", "transformer_2", "vae"):
        needs = [Need.FULL, Need.DECODE] if name == "vae" else [Need.FULL]
        for need in needs:
            dtype = getattr(torch, resolve_dtype(headers, name, parse_dtype("auto", headers)))
            sizes = [draw(each, name, need, dtype=dtype, device=CPU, role="plan").nbytes for each in (whole, headers)]
            assert sizes[0] == sizes[1] > 0
        with pytest.raises(ComponentFileError, match="is truncated"):
            load(tmp_path / "headers", name)


# --- configurations


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("vae", {"latent_channels": 8}, r"holds '.*' as \[\d.*, but its configuration says \["),
        ("transformer", {"num_layers": 3}, "transformer/: missing keys of .*: transformer_blocks.2."),
        ("text_encoder", {"hidden_size": 16}, r"model.safetensors: holds '.*' as \["),
        ("vae", {"block_out_channels": "wide"}, "vae/config.json: does not fit AutoencoderKLFlux2"),
        ("vae", {"block_out_channels": []}, "vae/config.json: does not fit AutoencoderKLFlux2"),
        ("vae", {"down_block_types": ["NoSuchBlock"]}, "vae/config.json: does not fit AutoencoderKLFlux2"),
        ("transformer", {"num_layers": "two"}, "transformer/config.json: does not fit Flux2Transformer2DModel"),
        ("text_encoder", {"num_attention_heads": 0}, "text_encoder/config.json: does not fit Qwen3ForCausalLM"),
        ("text_encoder", {"hidden_size": "wide"}, "text_encoder/config.json: does not fit Qwen3ForCausalLM"),
        ("text_encoder", {"layer_types": ["x"]}, "text_encoder/config.json: does not fit Qwen3ForCausalLM"),
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error(repo: Path, component: str, change: dict, message: str) -> None:
    write_config(repo, component, **change)
    with pytest.raises(ModelError, match=message):
        load(repo, component, by_library=True)


def test_a_configuration_of_another_class_is_an_error(repo: Path) -> None:
    shutil.copy(repo / "text_encoder/config.json", repo / "vae/config.json")
    with pytest.raises(ModelError, match="vae/"):
        load(repo, "vae")
    (repo / "vae/config.json").write_text("[]")
    with pytest.raises(ComponentFileError, match="vae/config.json: should hold a JSON object, not a list"):
        load(repo, "vae", Need.CONFIG)


# --- headers


def safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file"),
        (b"\0" * 4, "is not a safetensors file"),
        (b"\xff" * 64, "header length makes no sense"),
        (struct.pack("<Q", 10**8 + 1), "header length makes no sense"),
        (struct.pack("<Q", 10**8), "is truncated: 0 of 100000000 header bytes"),
        (struct.pack("<Q", 10**7) + b"{" * (FIRST_READ + 5), f"is truncated: {FIRST_READ + 5} of 10000000"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (safetensors(b"\xff\xfe{}"), "broken safetensors header"),
        (safetensors(b"not JSON"), "broken safetensors header"),
        (safetensors([1]), "broken safetensors header"),
        (safetensors({"a": 3}), "broken safetensors header"),
        (safetensors({"a": {}}), "broken safetensors header"),
        (safetensors({"a": entry(dtype="F33")}), "unknown dtype 'F33'"),
        (safetensors({"a": entry(dtype=[1])}), "unknown dtype"),
        (safetensors({"a": entry(shape=[3])}), "12 bytes by its shape and 8 by its offsets"),
        (safetensors({"a": entry(shape=[-2], offsets=[8, 0])}), "should be a list of sizes"),
        (safetensors({"a": entry(shape=[2.0])}), "should be a list of sizes"),
        (safetensors({"a": entry(shape=[True, 2])}), "should be a list of sizes"),
        (safetensors({"a": entry(shape="2")}), "should be a list of sizes"),
        (safetensors({"a": entry(offsets=[0, 8, 9])}), "broken safetensors header"),
        (safetensors({"a": entry(offsets=[8, 16])}), "starts at 8, but the one before it ends at 0"),
        (safetensors({"a": entry(), "b": entry(offsets=[4, 12])}), "starts at 4, but the one before it ends at 8"),
        (safetensors({"a": entry(shape=[2**20, 2**20], offsets=[0, 2**42])}), "is truncated or damaged"),
        (safetensors({"a": entry(shape=[2**70, 2**70], offsets=[0, 2**142])}), "should be a list of sizes"),
        (safetensors({"a": entry(shape=[2**62] * 20_000)}), "should be a list of sizes"),  # their product takes seconds
    ],
)
def test_a_broken_header_is_an_error_that_says_what_is_wrong(repo: Path, content: bytes, message: str) -> None:
    (repo / WEIGHTS).write_bytes(content)
    with pytest.raises(ComponentFileError, match=message) as error:
        repository = Repository.open(repo)
        repository.check_complete("transformer")
    assert error.value.path == WEIGHTS


def test_a_long_header_is_read_whole(tmp_path: Path) -> None:
    header = {f"{'x' * 90}.{i}": entry(shape=[1], offsets=[4 * i, 4 * i + 4]) for i in range(2000)}
    content = safetensors({**header, "__metadata__": {"format": "pt"}})
    (tmp_path / "a.safetensors").write_bytes(content)
    assert len(content) > FIRST_READ
    tensors, size = read_header(FolderFiles(tmp_path), "a.safetensors")
    assert len(tensors) == 2000 and size == len(content) + 8000


def test_the_single_file_and_the_shards_are_preferred_as_the_libraries_do(repo: Path) -> None:
    single = {name: (repo / name).read_bytes() for name in (WEIGHTS, "text_encoder/model.safetensors")}
    for name in ("transformer", "text_encoder"):
        tiny.shard(repo, name)
    for name, content in single.items():
        (repo / name).write_bytes(content)
    repository = Repository.open(repo)
    assert repository.weight_files("text_encoder") == ["text_encoder/model.safetensors"]
    assert len(repository.weight_files("transformer")) > 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["F32", "BF16"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
Mutate = Callable[[bytes], bytes]


@st.composite
def mutations(draw_value: st.DrawFn) -> Mutate:
    """Change some bytes, cut the end off, or replace one value somewhere in the JSON."""
    kind = draw_value(st.sampled_from(["bytes", "cut", "json"]))
    if kind == "bytes":
        edits = draw_value(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
        return lambda raw: bytes({place % len(raw): byte for place, byte in edits}.get(i, b) for i, b in enumerate(raw))
    if kind == "cut":
        keep = draw_value(st.integers(0, 4000))
        return lambda raw: raw[: keep % len(raw)]
    place, value = draw_value(st.integers(0, 10_000)), draw_value(json_values)
    return lambda raw: json.dumps(replace_in(json.loads(raw), place, value)).encode()


def replace_in(tree: object, place: int, value: object) -> object:
    """Replace one of all the values of a JSON tree."""
    spots: list[tuple[dict | list, object]] = []

    def visit(node: object) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            spots.append((node, key))
            visit(node[key])

    visit(tree)
    node, key = spots[place % len(spots)]
    node[key] = value
    return tree


fuzz = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def open_and_draw(repo: Path) -> None:
    try:
        repository = Repository.open(repo)
        for name in repository.components:
            repository.tensors(name)
            repository.check_complete(name)
        assert repository.fingerprint
    except TriptychError as error:
        assert isinstance(error, ModelError) and str(error)


@fuzz
@given(mutate=mutations())
def test_a_mutated_index_is_an_error_of_the_model_or_fine(repo: Path, mutate: Mutate) -> None:
    original = (repo / "model_index.json").read_bytes()
    (repo / "model_index.json").write_bytes(mutate(original))
    try:
        open_and_draw(repo)
    finally:
        (repo / "model_index.json").write_bytes(original)


@fuzz
@given(mutate=mutations(), length=st.none() | st.integers(0, 2**64 - 1))
def test_a_mutated_header_is_an_error_of_the_model_or_fine(repo: Path, mutate: Mutate, length: int | None) -> None:
    file = repo / "vae/diffusion_pytorch_model.safetensors"
    original = file.read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    header = mutate(original[8:end])
    prefix = struct.pack("<Q", len(header) if length is None else length)
    file.write_bytes(prefix + header + original[end:])
    try:
        open_and_draw(repo)
        try:
            load(repo, "vae", Need.DECODE, "float32")
        except ModelError as error:
            assert str(error)
    finally:
        file.write_bytes(original)


# --- dtypes and fingerprints


@pytest.mark.parametrize("dtype", ["float33", "int8", {"vae": "wide"}, {"vea": "float32"}, 7])
def test_a_wrong_dtype_is_the_callers_error(tiny_repo: TinyRepo, dtype: object) -> None:
    with pytest.raises(ParameterError) as error:
        parse_dtype(dtype, Repository.open(tiny_repo("flux2_klein")))
    assert isinstance(error.value, UsageError) and not isinstance(error.value, ModelError)


@pytest.mark.parametrize(("given_as", "name"), [("BF16", "bfloat16"), (torch.float16, "float16"), (None, "auto")])
def test_a_dtype_is_understood_under_its_names(tiny_repo: TinyRepo, given_as: object, name: str) -> None:
    assert parse_dtype(given_as, Repository.open(tiny_repo("flux2_klein"))) == {"default": name}


def test_a_dtype_that_is_only_emulated_here_is_not_chosen_but_kept_where_it_is_named(
    tiny_repo: TinyRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository.open(tiny_repo("flux2_klein", dtype="float16"))
    asked = parse_dtype({"vae": "float16", "default": "auto"}, repository)
    for slow, expected in (((), "float16"), (("bfloat16",), "float16"), (("float16", "bfloat16"), "float32")):
        monkeypatch.setattr(dtypes, "emulated", lambda slow=slow: slow)
        assert resolve_dtype(repository, "transformer", suited(asked)) == expected
        assert resolve_dtype(repository, "vae", suited(asked)) == "float16"


@pytest.mark.parametrize("slow", [(), ("float16",)])
def test_a_model_is_loaded_in_a_dtype_that_this_machine_computes_and_says_so(
    tiny_repo: TinyRepo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, slow: tuple[str, ...]
) -> None:
    monkeypatch.setattr(dtypes, "emulated", lambda: slow)
    denoiser = triptych.load(tiny_repo("flux2_klein", dtype="float16"), role="denoiser", device="cpu")
    assert denoiser.components["transformer"].dtype is (torch.float32 if slow else torch.float16)
    assert ("transformer: loaded as float32" in caplog.text) is bool(slow)
    caplog.clear()
    triptych.load(tiny_repo("flux2_klein", dtype="float16"), role="denoiser", device="cpu", dtype="float32")
    assert "loaded as float32" not in caplog.text  # nothing was chosen for the caller


def test_models_that_differ_have_other_fingerprints(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    first = Repository.open(tiny_repo("flux2_klein")).fingerprint
    assert first == Repository.open(copy(tiny_repo("flux2_klein"), tmp_path / "same")).fingerprint
    assert first != Repository.open(tiny_repo("flux2_klein", dtype="bfloat16")).fingerprint
    assert first != Repository.open(tiny_repo("flux2_klein", is_distilled=True)).fingerprint
    write_config(tmp_path / "same", "scheduler" if (tmp_path / "same/scheduler/config.json").exists() else "vae", x=1)
    assert first != Repository.open(tmp_path / "same").fingerprint
