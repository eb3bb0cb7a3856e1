"""Calls of a model, alone or as rows of one: whether they fit together, and how what comes back is parted again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from triptych.components.interruption import interruptible

log = logging.getLogger(__name__)

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_FURTHER = ("cache", "past_key_values")
"""What transformers' outputs keep for further tokens, by its name from 5.24 on and before."""


@dataclass(eq=False)
class Call:
    """A call that a stage makes of one of its models.

    Attributes:
        target: identifies the model and its method.
        context: what it is run in: the values of context variables where it was made.
        answer: returns what the stage is to get, or raises what went wrong; set once it has been run.
        seconds: its share of the time that took.
    """

    target: object
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context
    answer: Callable[[], Any] | None = None
    seconds: float = 0.0

    @property
    def rows(self) -> int | None:
        """How many rows each of its tensors has; None where it has none, or they differ: then it has no rows."""
        counts = {len(each) if each.ndim else 0 for each in _tensors((self.args, self.kwargs))}
        return next(iter(counts)) or None if len(counts) == 1 else None

    def form(self) -> object:
        """Return something hashable that equals only for calls that can be rows of one."""
        return self.target, _form(self.args), _form(self.kwargs)

    def content(self) -> object:
        """Return something hashable that equals only for calls of the same tokens; of other tensors, for none."""
        tensors = list(_tensors((self.args, self.kwargs)))
        if any(each.is_floating_point() or each.is_complex() for each in tensors):
            return id(self)
        return tuple(each.cpu().numpy().tobytes() for each in tensors)

    def run(self) -> Any:
        """Run it by itself."""
        return self.context.run(self.function, *self.args, **self.kwargs)

    def give(self, value: Any) -> None:
        """Let the stage get a value."""
        self.answer = partial(_give, value)

    def fail(self, error: BaseException) -> None:
        """Let it fail where the stage made it."""
        self.answer = partial(_fail, error)


def answer_alone(call: Call) -> bool:
    """Make a call by itself; returns whether it did not fail."""
    try:
        call.give(call.run())
    except Exception as error:  # noqa: BLE001 (raised where the call was made)
        call.fail(error)
        return False
    return True


def answer_joined(calls: Sequence[Call]) -> bool:
    """Make calls of one form as rows of one; returns whether it did not fail, and what it has computed is gone if so."""
    try:
        for call, part in zip(calls, run_joined(calls)):
            call.answer = partial(own, part)
    except Exception as error:  # noqa: BLE001 (a request must not fail because of those beside it)
        # As text: a record of the log may be kept, and the error would keep what the call has computed.
        log.warning("a shared call of %d failed (%s); so many run apart for now", len(calls), repr(error))
        return False
    return True


def pass_on(first: Call, others: Sequence[Call]) -> None:
    """Give calls of the same content what the first of them got: copies, because the model's hooks change them."""
    assert first.answer is not None
    try:
        value = first.answer()
        own(value)
    except Exception:  # noqa: BLE001 (it cannot be copied, or the call failed: then each fails by itself)
        for each in others:
            answer_alone(each)
        return
    first.seconds /= 1 + len(others)
    for call in (first, *others):
        call.answer, call.seconds = partial(own, value), first.seconds


def run_joined(calls: Sequence[Call]) -> list[Any]:
    """Run calls of the same form as rows of one; returns what each is to get: views of what comes back.

    The end of one request does not interrupt it: the others want theirs.

    Raises:
        ValueError: something comes back that has not a row for each.
    """
    first, counts = calls[0], [call.rows or 0 for call in calls]
    args = [_join([call.args[k] for call in calls]) for k in range(len(first.args))]
    kwargs = {name: _join([call.kwargs[name] for call in calls]) for name in first.kwargs}

    def run() -> Any:
        with interruptible(None):
            return first.function(*args, **kwargs)

    output, parts, start = first.context.run(run), [], 0
    for count in counts:
        parts.append(_map(output, _slicer(start, count, sum(counts))))
        start += count
    return parts


def own(value: Any) -> Any:
    """Return a copy whose tensors are no views, so that keeping one row keeps no other."""
    return _map(value, torch.clone)


def _slicer(start: int, count: int, total: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def part(value: torch.Tensor) -> torch.Tensor:
        if not value.ndim or len(value) != total:
            raise ValueError(f"a tensor of shape {tuple(value.shape)} came back for {total} rows")
        return value[start : start + count]

    return part


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _form(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return "tensor", value.shape[1:], value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value), *map(_form, value)
    if isinstance(value, dict):
        return type(value), *((name, _form(each)) for name, each in sorted(value.items()))
    return (type(value), value) if isinstance(value, _PLAIN) else id(value)


def _join(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(values)
    if isinstance(first, (list, tuple)):
        return type(first)(_join(list(each)) for each in zip(*values))
    if isinstance(first, dict):
        return {name: _join([value[name] for value in values]) for name in first}
    return first


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the same structure with every tensor changed.

    Keys and values kept for further tokens have no rows that could be told apart from outside, and nobody reads them
    after one call: they are left out.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):  # the libraries' outputs are such too
        changed = {name: None if name in _FURTHER else _map(each, change) for name, each in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, (list, tuple)):
        return type(value)([_map(each, change) for each in value])
    if isinstance(value, _PLAIN):
        return value
    raise ValueError(f"a {type(value).__name__} came back, which cannot be parted into rows")


def _give(value: Any) -> Any:
    return value


def _fail(error: BaseException) -> Any:
    raise error
