"""What an encoder has encoded lately, so that a prompt that comes again, or a negative prompt, is not encoded again."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash


@dataclass
class PromptCache:
    """The results of `encode_prompt` by its arguments; the least recently used go first.

    Only exact matches count: every argument equal, tensors bit by bit. One thread at a time may use it.

    Attributes:
        max_bytes: of tensors held.
        nbytes: held now.
        hits, misses: calls so far.
    """

    max_bytes: int
    nbytes: int = 0
    hits: int = 0
    misses: int = 0
    _entries: OrderedDict[object, tuple[Any, int]] = field(default_factory=OrderedDict)

    def wrap(self, encode: Callable[..., Any], scope: Callable[[], object] = tuple) -> Callable[..., Any]:
        """Return `encode` with a memory. Arguments that cannot be compared bypass it.

        Args:
            scope: tells what else its results depend on, such as the LoRAs that are on: something hashable.
        """
        signature = inspect.signature(encode)

        def remembering(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            key = _key({**bound.arguments})
            if key is None:
                return encode(*args, **kwargs)
            key = (scope(), key)
            if key in self._entries:
                self.hits += 1
                self._entries.move_to_end(key)
                return self._entries[key][0]
            self.misses += 1
            encoded = encode(*args, **kwargs)
            self._keep(key, encoded)
            return encoded

        return remembering

    def _keep(self, key: object, encoded: Any) -> None:
        size = _bytes(encoded)
        if size > self.max_bytes or key in self._entries:  # two requests may have asked at the same time
            return
        self._entries[key] = encoded, size
        self.nbytes += size
        while self.nbytes > self.max_bytes:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.nbytes -= dropped


def _key(value: Any) -> object | None:
    """Return something hashable that equals only for equal values; None for values that cannot be compared."""
    if value is None or isinstance(value, (str, bool, int, float, torch.dtype, torch.device)):
        return type(value).__name__, str(value)
    if isinstance(value, torch.Tensor):
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() if value.numel() else b""
        return "tensor", str(value.dtype), tuple(value.shape), xxhash.xxh3_128_hexdigest(memoryview(bits))  # type: ignore[arg-type]
    if isinstance(value, (list, tuple)):
        keys = [_key(each) for each in value]
        return None if None in keys else (type(value).__name__, *keys)
    if isinstance(value, dict):
        entries = [(name, _key(each)) for name, each in sorted(value.items())]
        return None if any(each is None for _, each in entries) else ("dict", *entries)
    return None


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, (list, tuple)):
        return sum(_bytes(each) for each in value)
    return 256
