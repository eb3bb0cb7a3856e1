"""Seeded noise for every tensor of a module.

Freshly built diffusion transformers are dead: gates, modulations and output heads start at zero, so the output is the
same for every prompt and every seed, and comparing two pipelines on it proves nothing. Everything is overwritten here.
Each tensor draws from a generator of its own (seeded by its name), so changing one layer leaves the others alone.
"""

import math
import zlib
from collections.abc import Mapping

import torch
from torch import nn

VECTOR_NOISE = 0.05


def generator(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the seed and the name only, not on the order of the calls."""
    return torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


def statistics(name: str, size: int, seed: int) -> tuple[list[float], list[float]]:
    """Random means and standard deviations of latents; no deviation is near 1, so forgetting them shows."""
    draw = generator(seed, name)
    means = torch.randn(size, generator=draw) * 0.5
    magnitudes = 0.4 + 0.5 * torch.rand(size, generator=draw)
    signs = torch.randint(0, 2, (size,), generator=draw) * 2 - 1
    return [round(x, 4) for x in means.tolist()], [round(x, 4) for x in torch.exp(magnitudes * signs).tolist()]


@torch.no_grad()
def randomise(component: str, module: nn.Module, *, seed: int, gains: Mapping[str, float] | None = None) -> None:
    """Overwrite every parameter and every batch-norm statistic of `module` in place.

    The component's name goes into the seed: two components of one class (two transformers) must not be equal.
    `gains` scales single parameters by name, for the few places where unit variance would saturate an output or
    leave an input without effect.
    """
    scale = dict(gains or {})
    names: set[str] = set()
    for prefix, part in module.named_modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            names.add(name)
            noise = torch.randn(parameter.shape, generator=generator(seed, f"{component}.{name}")) * scale.pop(
                name, 1.0
            )
            parameter.copy_(_centre(part, leaf) + noise * _deviation(part, parameter))
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            means, deviations = statistics(f"{component}.{prefix}", part.num_features, seed)
            part.get_buffer("running_mean").copy_(torch.tensor(means))
            part.get_buffer("running_var").copy_(torch.tensor(deviations) ** 2)
            part.get_buffer("num_batches_tracked").fill_(3)
    if scale:
        raise KeyError(f"gains for parameters that do not exist: {sorted(scale)}; there are {sorted(names)}")


def _is_vector(parameter: torch.Tensor) -> bool:
    return parameter.numel() == max(parameter.shape, default=1)


def _centre(part: nn.Module, leaf: str) -> float:
    is_norm = "norm" in type(part).__name__.lower()
    return 1.0 if is_norm and leaf in {"weight", "gamma"} else 0.0


def _deviation(part: nn.Module, parameter: torch.Tensor) -> float:
    if isinstance(part, nn.Embedding):
        return 1.0
    if _is_vector(parameter):
        return VECTOR_NOISE
    return 1.0 / math.sqrt(parameter.numel() / parameter.shape[0])
