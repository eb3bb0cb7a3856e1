"""What the tests of components share: loading one component with triptych, and with its own library."""

import importlib
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import torch

from triptych.components import loading
from triptych.components.dtypes import parse_dtype
from triptych.components.loading import Loaded
from triptych.components.need import Need
from triptych.components.repository import Repository

CPU = torch.device("cpu")


def load(
    repo: Path,
    name: str,
    need: Need = Need.FULL,
    dtype: object = "auto",
    *,
    variant: str | None = None,
    by_library: bool = False,
) -> Loaded:
    """Load a component as the encoder role does; `by_library` when the library itself is expected to load it whole."""
    with patch.object(loading, "_load_whole", wraps=loading._load_whole) as whole:
        loaded = load_anyhow(repo, name, need, dtype, variant=variant)
    assert whole.called == by_library
    return loaded


def load_anyhow(
    repo: Path, name: str, need: Need = Need.FULL, dtype: object = "auto", *, variant: str | None = None
) -> Loaded:
    repository = Repository.open(repo, variant=variant)
    dtypes = parse_dtype(dtype, repository)
    return loading.load_component(repository, name, need, device=CPU, dtypes=dtypes, role="encoder")


def library_class(repo: Path, name: str) -> type:
    library, class_name = json.loads((repo / "model_index.json").read_text())[name]
    return getattr(importlib.import_module(library), class_name)


def from_pretrained(repo: Path, name: str, dtype: torch.dtype, **options: object) -> torch.nn.Module:
    """The independent side: the library's own way to load a component."""
    return library_class(repo, name).from_pretrained(repo / name, dtype=dtype, **options).eval()


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a module, tied ones under each name, non-persistent ones included."""
    found = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def assert_same_tensors(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, expected = tensors(ours), tensors(theirs)
    assert mine.keys() == expected.keys()
    assert {name: tensor.dtype for name, tensor in mine.items()} == {n: t.dtype for n, t in expected.items()}
    assert [name for name, tensor in mine.items() if not torch.equal(tensor, expected[name])] == []
    assert {type(part).__name__ for part in ours.modules() if part.training} == set()


def copy(repo: Path, path: Path) -> Path:
    shutil.copytree(repo, path, dirs_exist_ok=True)
    return path


def write_component(path: Path, module: torch.nn.Module, name: str = "text_encoder", **options: object) -> Path:
    """Write a repository of one component."""
    module.save_pretrained(path / name, **options)
    library = "transformers" if type(module).__module__.startswith("transformers") else "diffusers"
    index = {"_class_name": "SomePipeline", name: [library, type(module).__name__]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path
