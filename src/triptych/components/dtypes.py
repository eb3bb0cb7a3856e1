"""Which dtype a component's weights have: what the caller says, or what the checkpoint's headers say."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Union

from triptych.components.repository import Repository
from triptych.errors import ParameterError, UnknownDtypeError, did_you_mean

if TYPE_CHECKING:
    import torch

DtypeSpec = Union[str, "torch.dtype", Mapping[str, Union[str, "torch.dtype"]]]
"""`"auto"` (the checkpoint's, see `suited`), a dtype by name, or a mapping from component to either, with a `"default"`."""

_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
NAMES = ("float32", "bfloat16", "float16", "float64")
_WITHOUT = " without "
HEADER_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
                "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # fmt: skip
"""A header's floating-point dtypes, under torch's names."""
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
"""Those of them in which weights are kept, and never computed with."""


def parse_dtype(spec: DtypeSpec | None, repository: Repository) -> dict[str, str]:
    """Return the dtype asked for per component, as torch's name or `"auto"`; `"default"` for the rest.

    Raises:
        ParameterError: a name is no dtype that weights can have, or a component the repository does not have.
    """
    if not isinstance(spec, Mapping):
        return {"default": _name("dtype", spec or "auto")}
    for component in spec:
        if component != "default" and component not in repository.components:
            known = ["default", *repository.components]
            raise ParameterError("dtype", component, f"no such component{did_you_mean(component, known)}; {known}")
    return {"default": "auto"} | {component: _name(f"dtype[{component}]", dtype) for component, dtype in spec.items()}


def _name(field: str, dtype: object) -> str:
    name = str(dtype).removeprefix("torch.").lower()
    name = _ALIASES.get(name, name)
    if name not in ("auto", *NAMES):
        raise ParameterError(field, dtype, f"not a dtype of weights; one of: auto, {', '.join(NAMES)}")
    return name


def suited(asked: Mapping[str, str]) -> dict[str, str]:
    """Return the dtypes asked for, `auto` without those that this machine can only emulate.

    A convolution is tens of times slower then than in float32, which is what such weights are loaded as.
    """
    here = _WITHOUT.join(("auto", *emulated()))
    return {component: here if name == "auto" else name for component, name in asked.items()}


_OF_QUANTISER = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB)$")
"""Keys of what bitsandbytes keeps beside the weights, as float32 in most."""


@functools.cache
def emulated() -> tuple[str, ...]:
    """Return the half-precision dtypes that PyTorch has no fast kernels for on this machine: a CPU without a GPU."""
    import torch

    if torch.accelerator.is_available() or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ()
    kernels = torch.ops.mkldnn
    known = {"float16": kernels._is_mkldnn_fp16_supported(), "bfloat16": kernels._is_mkldnn_bf16_supported()}
    return tuple(name for name, fast in known.items() if not fast)


def checkpoint_dtype(repository: Repository, component: str) -> str | None:
    """Return the floating-point dtype that most of a component's bytes have, by its headers; None without headers.

    What a quantiser keeps beside its weights does not count. Nor do floats of 8 bits, as nothing is computed in them; where
    there are no others, it is float32, which diffusers makes of them unless told otherwise.
    """
    count: Counter[str] = Counter()
    for tensor in repository.tensors(component).values():
        if _OF_QUANTISER.search(tensor.key):
            continue
        if tensor.dtype in EIGHT_BITS:
            count["float32"] += 0
        elif tensor.dtype in HEADER_NAMES:
            count[HEADER_NAMES[tensor.dtype]] += tensor.nbytes
    return count.most_common(1)[0][0] if count else None


def resolve_dtype(repository: Repository, component: str, asked: Mapping[str, str]) -> str:
    """Return the name of the dtype a component has once loaded, whether or not its weights are loaded here.

    Raises:
        UnknownDtypeError: it is left to the checkpoint, and no header tells.
    """
    name, *without = asked.get(component, asked["default"]).split(_WITHOUT)
    if name != "auto":
        return name
    found = checkpoint_dtype(repository, component)
    if found is None:
        raise UnknownDtypeError(
            f"the dtype of {component!r} of {repository.name} cannot be known: it has no safetensors file and no dtype "
            "was given; pass dtype= (or --dtype)"
        )
    return "float32" if found in without else found


def is_widened(repository: Repository, component: str, asked: Mapping[str, str]) -> bool:
    """Return whether a component does not have its checkpoint's dtype because this machine only emulates that."""
    _, *without = asked.get(component, asked["default"]).split(_WITHOUT)
    return checkpoint_dtype(repository, component) in without
