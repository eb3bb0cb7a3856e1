"""What an encoder has encoded lately, so that a prompt that comes again, or a negative prompt, is not encoded again."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from triptych.stages.likeness import likeness


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

    def wrap(
        self,
        encode: Callable[..., Any],
        scope: Callable[[], object] = tuple,
        together: Callable[[], bool] = lambda: False,
    ) -> Callable[..., Any]:
        """Return `encode` with a memory. Arguments that cannot be compared bypass it.

        Args:
            scope: tells what else its results depend on, such as the LoRAs that are on: something hashable.
            together: tells whether `encode` may share its calls with other requests. What it returns then is only for
                others of which that holds too: an exact request has to get what it would get alone.
        """
        signature = inspect.signature(encode)

        def remembering(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            key = likeness({**bound.arguments})
            if key is None:
                return encode(*args, **kwargs)
            alone = (scope(), key)
            key = (*alone, "together") if together() else alone
            for known in (key, alone):
                if known in self._entries:
                    self.hits += 1
                    self._entries.move_to_end(known)
                    return self._entries[known][0]
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


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, (list, tuple)):
        return sum(_bytes(each) for each in value)
    return 256
