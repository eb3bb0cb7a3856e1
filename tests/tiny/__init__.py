"""Tiny model repositories with random weights, built from the libraries' own classes in the published layout.

This is the independent side of every comparison: nothing here imports the package under test. A family is one module
with `build(path, *, seed=0, dtype="float32", **variant) -> Path`; adding one changes no other file.

The helpers below change a repository in place, to give it the other shapes that published ones come in. A cached
repository belongs to every test, so copy it first (`shutil.copytree`).
"""

import importlib
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

HEADER_LENGTH_BYTES = 8


def build(family: str, path: Path, **variant: object) -> Path:
    """Build the repository of `family` (the name of a module of this package) in `path`."""
    repo: Path = importlib.import_module(f".{family}", __name__).build(path, **variant)
    return repo


def save(pipeline: DiffusionPipeline, path: Path, dtype: str) -> Path:
    """Write `pipeline` to `path` with its weights stored as `dtype`."""
    pipeline.save_pretrained(path)
    if dtype != "float32":
        cast(path, dtype)
    return path


def shard(repo: Path, component: str, max_shard_size: str = "25KB") -> list[Path]:
    """Split the single weight file of a component into shards with an index; returns the shards."""
    (single,) = (repo / component).glob("*.safetensors")
    # Copies, because tensors on one storage would be kept in one shard.
    weights = {key: tensor.clone() for key, tensor in load_file(single).items()}
    single.unlink()
    pattern = single.name.replace(".safetensors", "{suffix}.safetensors")
    save_torch_state_dict(weights, single.parent, filename_pattern=pattern, max_shard_size=max_shard_size)
    shards = sorted(single.parent.glob("*.safetensors"))
    if len(shards) < 2:
        raise ValueError(f"{component} fits into one shard of {max_shard_size}")
    return shards


def as_variant(repo: Path, component: str, variant: str = "fp16") -> None:
    """Rename the weight files of a component (and rewrite its index) to those of a variant."""
    folder = repo / component
    renamed: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stem, dash, number = file.stem.partition("-")
        renamed[file.name] = f"{stem}.{variant}{dash}{number}.safetensors"
        file.rename(folder / renamed[file.name])
    for file in sorted(folder.glob("*.safetensors.index.json")):
        index = json.loads(file.read_text())
        index["weight_map"] = {key: renamed[name] for key, name in index["weight_map"].items()}
        target = file.with_name(file.name.replace(".index.json", f".index.{variant}.json"))
        target.write_text(json.dumps(index, indent=2))
        file.unlink()


def header_only(repo: Path) -> None:
    """Cut every safetensors file after its header, so that reading any weight fails and reading headers works."""
    for file in repo.rglob("*.safetensors"):
        with file.open("r+b") as stream:
            length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
            stream.truncate(HEADER_LENGTH_BYTES + length)


def cast(repo: Path, dtype: str) -> None:
    """Store every floating-point tensor of the repository as `dtype`, and say so in the configurations that do."""
    target = getattr(torch, dtype)
    for file in repo.rglob("*.safetensors"):
        weights = {k: v.to(target) if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    for file in repo.rglob("*.safetensors.index*.json"):
        index = json.loads(file.read_text())
        files = {file.parent / name for name in index["weight_map"].values()}
        index["metadata"]["total_size"] = sum(t.nbytes for shard in files for t in load_file(shard).values())
        file.write_text(json.dumps(index, indent=2))
    for file in repo.rglob("config.json"):
        config = json.loads(file.read_text())
        file.write_text(json.dumps(_with_dtype(config, dtype), indent=2))


def _with_dtype(config: object, dtype: str) -> object:
    if isinstance(config, list):
        return [_with_dtype(item, dtype) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in {"dtype", "torch_dtype"} and value is not None else _with_dtype(value, dtype)
        for key, value in config.items()
    }
