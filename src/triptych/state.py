"""State: everything one request carries between stages, and its form on the wire."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from triptych.errors import RecipeError, UndeclaredError, WireError, WrongRoleError
from triptych.roles import RoleType

if TYPE_CHECKING:
    import torch

    from triptych.result import Result

OUTPUTS = frozenset(("images", "frames", "fps", "audio", "sample_rate", "mesh"))
"""Fields that a family's last stages write: what a result is made of."""

TOLD = (
    "prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale",
    "output_type", "exact",
)  # fmt: skip
"""Parameters that a result tells even where they were not given: as they were settled, some by a stage. In order, so
that a saved result is the same bytes in every process."""


@dataclass
class State:
    """One request on its way.

    Attributes:
        family: the pipeline class that serves it.
        fingerprint: the model it belongs to; another model refuses it.
        task: which of the family's tasks it is.
        route: the role of each segment, in order.
        position: how many segments are done.
        fields: parameters, tensors, lists and dicts of tensors, and the random state (`generator`).
        timings: seconds that each stage took.
        parameters: what the result tells of the request: plain JSON values, which stay whatever stages read.
    """

    family: str
    fingerprint: str
    task: str
    route: tuple[RoleType, ...]
    position: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def next_role(self) -> RoleType | None:
        """The role whose turn it is; None when the result is there."""
        return self.route[self.position] if self.position < len(self.route) else None

    @property
    def result(self) -> Result:
        """The result.

        Raises:
            WrongRoleError: a segment is still to be run.
        """
        from triptych.result import Result

        if self.next_role is not None:
            raise WrongRoleError(f"there is no result yet: it is the {self.next_role}'s turn")
        outputs = {name: value for name, value in self.fields.items() if name in OUTPUTS}
        told, timings = dict(self.parameters), dict(self.timings)
        return Result(**outputs, seed=self.fields["seed"], timings=timings, parameters=told)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, arrays and pictures, lists and dicts included."""
        from PIL import Image
        from torch.utils._pytree import tree_leaves

        return sum(
            each.width * each.height * len(each.getbands())
            if isinstance(each, Image.Image)
            else getattr(each, "nbytes", 0)
            for each in tree_leaves(self.fields)
        )

    def copy(self) -> State:
        """Return a state that can be run without changing this one; tensors are shared, the random state is not."""
        import torch

        fields = {
            name: value.clone_state() if type(value) is torch.Generator else value
            for name, value in self.fields.items()
        }
        return replace(self, fields=fields, timings=dict(self.timings), parameters=dict(self.parameters))

    def tell(self) -> None:
        """Let the result tell the parameters that it always tells, as they are now; of those yet open, nothing."""
        self.parameters |= {name: self.fields[name] for name in TOLD if self.fields.get(name) is not None}

    def keep(self, live: Collection[str]) -> None:
        """Drop every field that no later stage reads, once what a stage settled is told."""
        self.tell()
        for name in [name for name in self.fields if name not in live]:
            del self.fields[name]

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device. The generator stays where its seed put it."""
        for name, value in self.fields.items():
            self.fields[name] = moved(value, device)

    def to_bytes(self, out: memoryview | bytearray | None = None) -> memoryview | bytes:
        """Return the state in its wire form: one safetensors file, checksummed.

        Args:
            out: a buffer to write into; the part of it that was filled is returned.

        Raises:
            WireError: a field holds what the wire cannot carry; the message names it.
        """
        from triptych import wire

        header: dict[str, wire.JSON] = {
            "family": self.family,
            "fingerprint": self.fingerprint,
            "task": self.task,
            "route": [role.value for role in self.route],
            "position": self.position,
            "timings": {**self.timings},
            "parameters": self.parameters,
        }
        return wire.pack(self.fields, header, out=out)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> State:
        """Return the state that `data` holds. Its tensors are views of `data`; nothing is copied.

        Raises:
            WireError: `data` is damaged, truncated or no state.
        """
        from triptych import wire

        fields, header = wire.unpack(data)
        try:
            state = cls(
                _typed(header, "family", str),
                _typed(header, "fingerprint", str),
                _typed(header, "task", str),
                tuple(RoleType(role) for role in _typed(header, "route", list)),
                _typed(header, "position", int),
                fields,
                {str(name): float(seconds) for name, seconds in _typed(header, "timings", dict).items()},
                _typed({"parameters": {}, **header}, "parameters", dict),
            )
        except (ValueError, TypeError) as error:
            raise WireError(f"not a state: {error}") from error
        if not 0 <= state.position <= len(state.route):
            raise WireError(f"not a state: position {state.position} of {len(state.route)} segments")
        return state


class View:
    """A state as one stage sees it: the fields it declares as attributes, and nothing else.

    A declared field that no stage wrote for this request's task is None. A field that a stage only writes can be read
    back once it was written; one that may be there before must be among its `reads`, or it would not have travelled.
    """

    def __init__(
        self,
        fields: dict[str, Any],
        stage: str,
        reads: Collection[str],
        writes: Collection[str],
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        object.__setattr__(self, "_fields", fields)
        object.__setattr__(self, "_stage", stage)
        object.__setattr__(self, "_readable", set(reads))
        object.__setattr__(self, "_writable", writes)
        object.__setattr__(self, "_report", report)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._readable:
            raise UndeclaredError(self._stage, "field", name)
        return self._fields.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._writable:
            raise UndeclaredError(self._stage, "field", name)
        self._readable.add(name)
        self._fields[name] = value

    def report_step(self, step: int, steps: int) -> None:
        """Tell whoever follows the request that `step` of `steps` is done; raises if it was cancelled."""
        if self._report is not None:
            self._report(step, steps)


def check_no_meta(fields: Mapping[str, Any], names: Collection[str], stage: str) -> None:
    """Check that a stage left no meta tensor behind: it would have come out of a hollow component.

    Raises:
        RecipeError: it did; the message names the field.
    """
    for name in names:
        if _has_meta(fields.get(name)):
            raise RecipeError(
                f"stage {stage!r} left a tensor without data in field {name!r}: it used a hollow component"
            )


def _typed(header: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    value = header.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise WireError(f"not a state: its header's {name!r} is {value!r}")
    return value


def moved(value: Any, device: torch.device) -> Any:
    """Return a value with the tensors in it, lists and dicts included, on a device."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        items = [moved(item, device) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value


def _has_meta(value: Any) -> bool:
    import torch

    if isinstance(value, torch.Tensor):
        return value.is_meta
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(_has_meta(item) for item in value)
