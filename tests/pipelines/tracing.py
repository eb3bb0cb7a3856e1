"""Which of the weights a role loaded it works with, and the table of what every family is asked for.

Two measures. A weight is *read* when an operation computes with its values: views, and operations that look at shape
and dtype only, are no reading; neither is copying or casting, but computing with the copy is. A weight is *used* when
what was computed from it reaches the state that the role hands on: a layer that runs for nothing is read, not used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, reduce
from itertools import chain
from operator import or_
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import triptych
from triptych import Request, State
from triptych.pipelines.registry import open_family

from .parity import ROLES

_COPIES = {"_to_copy", "clone", "copy_"}
_VIEWS = {"_unsafe_view"}  # whose schemas do not say so
_WRITES = {"zero_", "fill_", "normal_", "uniform_", "random_"}
_FILLS = ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
_MAKES = {f"{fill}_like" for fill in _FILLS} | {f"new_{fill}" for fill in _FILLS}


class Tracer(TorchDispatchMode):
    """Follows some modules' tensors through every operation. It goes by memory, so views and ties need no bookkeeping.

    Attributes:
        sizes: bytes of every tensor held, by its name; a tied one has all its names, joined by `=`.
    """

    def __init__(self, modules: Mapping[str, Any]) -> None:
        super().__init__()
        spans: dict[tuple[int, int], list[str]] = {}
        for component, module in modules.items():
            for name, tensor in tensors_of(module):
                spans.setdefault(span(tensor), []).append(f"{component}.{name}")
        self._spans = sorted(spans)
        names = ["=".join(spans[each]) for each in self._spans]
        self.sizes = {name: end - start for name, (start, end) in zip(names, self._spans)}
        # Sets of held tensors are the bits of integers, in the order of `sizes`.
        self._read = self._used = 0
        # No storage takes the place of a dead one while this refers to it.
        self._origins: dict[StorageWeakRef, int] = {}
        for module in modules.values():
            if isinstance(module, torch.nn.Module) and hasattr(module, "generate"):
                module.generate = self._following(module.generate)

    def _following(self, generate: Any) -> Any:
        """Count what a model writes as used: it becomes text, which no operation follows."""

        def follow(*args: Any, **kwargs: Any) -> Any:
            output = generate(*args, **kwargs)
            self._used |= self._origin(tree_leaves(output))
            return output

        return follow

    @property
    def unread(self) -> dict[str, int]:
        """Bytes of every tensor that no operation computed with, by its name."""
        return self._without(self._read)

    @property
    def unused(self) -> dict[str, int]:
        """Bytes of every tensor that had no part in what `arrived`, by its name."""
        return self._without(self._used)

    def arrived(self, outputs: object) -> None:
        """Tell the tracer what came out: tensors, nested in anything."""
        self._used |= self._origin(tree_leaves(outputs))
        self._origins.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _VIEWS or name in _WRITES or is_view(func):
            return output
        # The target of `copy_` is written, not read.
        origin = 0 if name in _MAKES else self._origin(args[1] if name == "copy_" else (args, kwargs))
        if name not in _COPIES:
            self._read |= origin
        written = written_arguments(func, args, kwargs)
        for each in tensors_in(written or output):
            storage = StorageWeakRef(each.untyped_storage())
            self._origins[storage] = origin | (self._origins.get(storage, 0) if written else 0)
        return output

    def _origin(self, values: object) -> int:
        return reduce(or_, map(self._origin_of, tensors_in(values)), 0)

    def _origin_of(self, tensor: torch.Tensor) -> int:
        """Return the set of held tensors that a tensor is, lies in or was computed from."""
        position = bisect_right(self._spans, (tensor.data_ptr(), float("inf"))) - 1
        if position >= 0 and tensor.data_ptr() < self._spans[position][1]:
            return 1 << position
        return self._origins.get(StorageWeakRef(tensor.untyped_storage()), 0)

    def _without(self, some: int) -> dict[str, int]:
        return {name: size for bit, (name, size) in enumerate(self.sizes.items()) if not some >> bit & 1}


def tensors_in(values: object) -> list[torch.Tensor]:
    """Return the tensors with data, out of what operations take and give: lists, tuples and dicts."""
    if isinstance(values, torch.Tensor):
        return [] if values.is_meta else [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [found for each in values for found in tensors_in(each)] if isinstance(values, (list, tuple)) else []


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to, by its schema."""
    return [args[k] if k < len(args) else kwargs.get(name) for k, name in written_places(func)]


@cache
def written_places(func: Any) -> list[tuple[int, str]]:
    """Return the positions and names of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(k, each.name) for k, each in arguments if each.alias_info and each.alias_info.is_write]


@cache
def is_view(func: Any) -> bool:
    """Return whether an operation's result is a view of its argument, by its schema."""
    aliases = [each.alias_info for each in func._schema.returns]
    return any(each is not None and not each.is_write for each in aliases)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the memory a tensor lies in, from its first to behind its last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def tensors_of(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Go through the parameters and buffers that have data, under each of their names."""
    if isinstance(module, torch.nn.Module):
        parameters = module.named_parameters(remove_duplicate=False)
        for name, tensor in chain(parameters, module.named_buffers(remove_duplicate=False)):
            if not tensor.is_meta:
                yield name, tensor


@dataclass(frozen=True)
class Case:
    """One checkpoint of a family, and requests that between them use all of it; for each task those that use all of it.

    Attributes:
        family: the module of `tiny` that builds the checkpoint, with the arguments `variant`.
        requests: for each task, the parameters of its requests.
    """

    family: str
    variant: Mapping[str, object]
    requests: Mapping[str, tuple[Mapping[str, Any], ...]]

    @property
    def name(self) -> str:
        return " ".join([self.family, *(f"{name}={value}" for name, value in self.variant.items())])


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 96)).convert("RGB")


_KLEIN: Mapping[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16}
_KLEIN_TASKS = {"text-to-image": (_KLEIN,), "edit": ({**_KLEIN, "image": picture()},)}
_QWEN: Mapping[str, Any] = {
    "height": 64, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16, "negative_prompt": "ugly",
}  # fmt: skip
_WAN: Mapping[str, Any] = {
    "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "max_sequence_length": 16,
}  # fmt: skip
_FLUX2: Mapping[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2, "max_sequence_length": 64}
_FLUX: Mapping[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16}
_Z_IMAGE: Mapping[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2}
_WAN_I2V: Mapping[str, Any] = {**_WAN, "image": picture()}
_WAN_CLIP: Mapping[str, Any] = {**_WAN_I2V, "max_sequence_length": 512}
_FASTWAN: Mapping[str, Any] = {**_WAN, "num_inference_steps": 3}
_QWEN_EDIT: Mapping[str, Any] = {
    "height": 128, "width": 64, "num_inference_steps": 2, "negative_prompt": "ugly", "image": picture(),
}  # fmt: skip
_QWEN_LAYERED: Mapping[str, Any] = {
    "layers": 1,
    "num_inference_steps": 2,
    "negative_prompt": "ugly",
    "image": picture(),
}
_QWEN_LAYERED_TASKS = {
    "image-to-layers": (_QWEN_LAYERED,),
    "image-to-layers-captioned": ({**_QWEN_LAYERED, "prompt": ""},),
}

_SD3: Mapping[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16}
_KONTEXT: Mapping[str, Any] = {
    "height": 160, "width": 96, "max_area": 160 * 96, "num_inference_steps": 2, "max_sequence_length": 16,
}  # fmt: skip
_KONTEXT_TASKS = {
    "edit": ({**_KONTEXT, "image": picture(), "_auto_resize": False},),
    "text-to-image": (_KONTEXT,),
}
_GLM_IMAGE: Mapping[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 2}
_LONGCAT: Mapping[str, Any] = {"height": 64, "width": 32, "num_inference_steps": 2, "negative_prompt": "ugly"}
_LONGCAT_TASKS = {
    "text-to-image": ({**_LONGCAT, "enable_prompt_rewrite": False},),
    "text-to-image-rewritten": (_LONGCAT,),
}
_LONGCAT_EDIT: Mapping[str, Any] = {"num_inference_steps": 2, "negative_prompt": "ugly", "image": picture()}
_HUNYUAN: Mapping[str, Any] = {"num_frames": 5, "num_inference_steps": 2}
_QUOTED: Mapping[str, Any] = {"prompt": 'a sign "SLOW"'}  # ByT5 reads quotations, and nothing else
_HUNYUAN_T2V = ({**_HUNYUAN, "height": 32, "width": 48}, {**_HUNYUAN, **_QUOTED, "height": 32, "width": 48})
_HUNYUAN_I2V = ({**_HUNYUAN, "image": picture()}, {**_HUNYUAN, **_QUOTED, "image": picture()})
_HELIOS: Mapping[str, Any] = {
    "height": 16, "width": 32, "num_frames": 5, "num_latent_frames_per_chunk": 3, "max_sequence_length": 16,
}  # fmt: skip
_HELIOS_STEPS = {"base": {"num_inference_steps": 1}, "pyramid": {"pyramid_num_inference_steps_list": [1, 1]}}


def helios_tasks(steps: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], ...]]:
    given = {"text-to-video": {}, "image-to-video": {"image": picture()}, "video-to-video": {"video": [picture()] * 5}}
    return {task: ({**_HELIOS, **steps, **each},) for task, each in given.items()}


_LTX2: Mapping[str, Any] = {
    "height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 24,
    "spatio_temporal_guidance_blocks": [1],
}  # fmt: skip
_LTX2_GIVEN = {"latents": torch.ones(1, 6, 3, 4, 8), "audio_latents": torch.ones(1, 3, 4, 5)}
_LTX2_IMAGE = {**_LTX2, "image": picture()}
_LTX2_TASKS = {
    "text-to-video": (_LTX2, {**_LTX2, **_LTX2_GIVEN}),
    "image-to-video": (_LTX2_IMAGE, {**_LTX2_IMAGE, **_LTX2_GIVEN}),
}
_LTX2_TWO_STAGES = {
    "text-to-video-two-stage": ({**_LTX2, "two_stage": True},),
    "image-to-video-two-stage": ({**_LTX2_IMAGE, "two_stage": True},),
}
_LTX2_PREDICTED = {"num_frames": None, "frame_rate": 6.0, "max_seconds": 1.2}
_LTX25_TASKS = {task: (*calls, {**calls[0], **_LTX2_PREDICTED}) for task, calls in _LTX2_TASKS.items()}

CASES = (
    Case("flux2_klein", {}, _KLEIN_TASKS),
    Case("flux2_klein", {"is_distilled": True}, _KLEIN_TASKS),
    Case("qwen_image", {}, {"text-to-image": (_QWEN,)}),
    Case("qwen_image_edit", {}, {"edit": (_QWEN_EDIT,)}),
    Case("qwen_image_edit", {"plus": True}, {"edit": (_QWEN_EDIT,)}),
    Case("qwen_image_layered", {}, _QWEN_LAYERED_TASKS),
    Case("wan", {"version": "2.1"}, {"text-to-video": (_WAN,)}),
    Case("wan", {"version": "2.2"}, {"text-to-video": (_WAN,)}),
    Case("wan", {"version": "2.2-5b"}, {"text-to-video": (_WAN,)}),
    Case("flux2", {}, {"text-to-image": (_FLUX2,), "edit": ({**_FLUX2, "image": picture()},)}),
    Case("flux", {}, {"text-to-image": (_FLUX,)}),
    Case("flux", {"guidance_embeds": False}, {"text-to-image": (_FLUX,)}),
    Case("flux_kontext", {}, _KONTEXT_TASKS),
    Case("flux_kontext", {"guidance_embeds": False}, _KONTEXT_TASKS),
    Case("stable_diffusion_3", {}, {"text-to-image": (_SD3,)}),
    Case("stable_diffusion_3", {"t5": False}, {"text-to-image": (_SD3,)}),
    Case("glm_image", {}, {"text-to-image": (_GLM_IMAGE,), "edit": ({**_GLM_IMAGE, "image": picture()},)}),
    Case("longcat_image", {}, _LONGCAT_TASKS),
    Case("longcat_image", {"edit": True}, {"edit": (_LONGCAT_EDIT,)}),
    Case("hunyuan_video15", {"task": "t2v"}, {"text-to-video": _HUNYUAN_T2V}),
    Case("hunyuan_video15", {"task": "t2v", "guidance_scale": 1.0}, {"text-to-video": _HUNYUAN_T2V}),
    Case("hunyuan_video15", {"task": "i2v"}, {"image-to-video": _HUNYUAN_I2V}),
    Case(
        "hunyuan_video15",
        {"task": "i2v", "guidance_scale": 1.0, "use_meanflow": True},
        {"image-to-video": _HUNYUAN_I2V},
    ),
    Case("helios", {"version": "base"}, helios_tasks(_HELIOS_STEPS["base"])),
    Case("helios", {"version": "mid"}, helios_tasks(_HELIOS_STEPS["pyramid"])),
    Case("helios", {"version": "distilled"}, helios_tasks(_HELIOS_STEPS["pyramid"])),
    Case("ltx2", {"version": "2.0", "upsampler": True}, {**_LTX2_TASKS, **_LTX2_TWO_STAGES}),
    Case("ltx2", {"version": "2.3"}, _LTX2_TASKS),
    Case("ltx2", {"version": "2.5"}, _LTX25_TASKS),
    Case("ltx2", {"version": "2.0", "image": True}, {"image-to-video": _LTX2_TASKS["image-to-video"]}),
    Case("z_image", {}, {"text-to-image": (_Z_IMAGE,)}),
    Case("wan_i2v", {"version": "2.1"}, {"image-to-video": (_WAN_CLIP,)}),
    Case("wan_i2v", {"version": "2.1-flf"}, {"image-to-video": ({**_WAN_CLIP, "last_image": picture().rotate(180)},)}),
    Case("wan_i2v", {"version": "2.2"}, {"image-to-video": (_WAN_I2V,)}),
    Case("wan_i2v", {"version": "2.2-5b"}, {"image-to-video": (_WAN_I2V,)}),
    Case("wan_dmd", {"version": "2.1"}, {"text-to-video": (_FASTWAN,)}),
    Case("wan_dmd", {"version": "2.2-5b"}, {"text-to-video": (_FASTWAN,)}),
    Case("wan_dmd", {"version": "i2v"}, {"image-to-video": ({**_WAN_CLIP, "num_inference_steps": 3},)}),
)


@dataclass(frozen=True)
class Trace:
    """What one role held, did not read and did not use, in bytes by name, while it served some tasks."""

    case: str
    role: str
    tasks: str
    held: Mapping[str, int] = field(repr=False)
    unread: Mapping[str, int]
    unused: Mapping[str, int]


def selections(case: Case, repo: Path) -> list[tuple[str, ...] | None]:
    """Return what `tasks=` is given: None for all, then each task alone where there are several."""
    tasks = open_family(repo).tasks
    if set(tasks) != set(case.requests):
        raise ValueError(f"{case.name} has requests for {', '.join(case.requests)}; its tasks are {', '.join(tasks)}")
    return [None, *((task,) for task in tasks if len(tasks) > 1)]


def trace(case: Case, repo: Path, tasks: tuple[str, ...] | None = None) -> list[Trace]:
    """Serve every request of the tasks, by three roles and by a whole model; tell what each of them worked with."""
    label = "all" if tasks is None else ", ".join(tasks)
    requests = [parameters for task in tasks or case.requests for parameters in case.requests[task]]
    traces = []
    for roles in (ROLES, ("monolithic",)):
        models = {role: triptych.load(repo, role=role, device="cpu", dtype="float32", tasks=tasks) for role in roles}
        tracers = {role: Tracer(model.components) for role, model in models.items()}
        for parameters in requests:
            serve(models, tracers, Request(**{"prompt": "a red fox", "seed": 7, "output_type": "pt", **parameters}))
        traces += [
            Trace(case.name, role, label, each.sizes, each.unread, each.unused) for role, each in tracers.items()
        ]
    return traces


def serve(models: Mapping[str, triptych.Model], tracers: Mapping[str, Tracer], work: Request | State) -> State:
    """Bring a request from role to role until its result is there."""
    role = next(iter(models))
    while True:
        with tracers[role]:
            state = models[role].run(work)
        tracers[role].arrived(state.fields)
        if state.next_role is None:
            return state
        role, work = state.next_role.value, State.from_bytes(bytes(state.to_bytes()))


def table(build: Callable[..., Path], cases: tuple[Case, ...] = CASES) -> Iterator[Trace]:
    """Trace every case, role and selection of tasks; `build(family, **variant)` gives the repositories."""
    for case in cases:
        repo = build(case.family, **case.variant)
        for tasks in selections(case, repo):
            yield from trace(case, repo, tasks)
