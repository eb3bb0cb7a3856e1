"""Tiny LoRA files for the tiny repositories: the layers of any component, under diffusers' own names."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .weights import generator

RANK = 2


def write(
    file: Path,
    repo: Path,
    layers: Mapping[str, Iterable[str]],
    *,
    seed: int = 0,
    strength: float = 0.3,
    rank: int = RANK,
) -> Path:
    """Write a LoRA of `layers` (component: names that begin or are contained in a linear layer's) of a repository.

    Every linear layer, by its weights' shape, whose name contains one of the texts is changed.
    """
    weights: dict[str, torch.Tensor] = {}
    for component, texts in layers.items():
        (source,) = (repo / component).glob("*.safetensors")
        with safe_open(source, framework="pt") as stored:
            for key in sorted(stored.keys()):
                shape = stored.get_slice(key).get_shape()
                if key.endswith(".weight") and len(shape) == 2 and any(text in key for text in texts):
                    layer = f"{component}.{key.removesuffix('.weight')}"
                    for side, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                        noise = torch.randn(size, generator=generator(seed, f"lora.{layer}.{side}"))
                        weights[f"{layer}.lora_{side}.weight"] = strength * noise
    if not weights:
        raise ValueError(f"no linear layer of {sorted(layers)} has such a name")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata={"format": "pt"})
    return file
