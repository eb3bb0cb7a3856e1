"""How much of a component a stage uses: all of it, a part of it, or only its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

HEAD = "<head>"
"""Stands for the output head of a language model, whatever the class calls it."""
VISION = "<vision>"
"""Stands for the vision tower of a vision-language model, with what projects its output."""


@dataclass(frozen=True)
class Need:
    """How much of one component a stage uses.

    Attributes:
        weights: False when only the configuration is used (the component is then built hollow, at zero bytes).
        unused: submodules that are not used: dotted paths (`*` stands for any text), or `HEAD` and `VISION`.
        hidden_states: which entries of a transformer's `hidden_states` are read, as in `output_hidden_states=True`;
            None when it is run to its end. Layers above the last entry read are not used.
        required: False for a component that some checkpoints do not have.
        condition: whether this checkpoint uses it, from the pipeline's own options in `model_index.json`.
    """

    weights: bool = True
    unused: frozenset[str] = frozenset()
    hidden_states: frozenset[int] | None = None
    required: bool = True
    condition: Callable[[Mapping[str, object]], bool] | None = None

    FULL: ClassVar[Need]
    CONFIG: ClassVar[Need]
    ENCODE: ClassVar[Need]
    DECODE: ClassVar[Need]

    @classmethod
    def hidden(cls, *entries: int, vision: bool = False) -> Need:
        """Return the need of reading these entries of `hidden_states` (negative: from the end), and no head.

        `vision` says whether images are encoded too.
        """
        unused = {HEAD} if vision else {HEAD, VISION}
        return cls(unused=frozenset(unused), hidden_states=frozenset(entries))

    @classmethod
    def without(cls, *unused: str) -> Need:
        """Return the need of everything but these submodules."""
        return cls(unused=frozenset(unused))

    def optional(self, when: Callable[[Mapping[str, object]], bool] | None = None) -> Need:
        """Return this need for a component that may be absent, or that only some checkpoints use (`when`)."""
        return replace(self, required=False, condition=when)

    @property
    def is_full(self) -> bool:
        return self.weights and not self.unused and self.hidden_states is None

    def __str__(self) -> str:
        if not self.weights:
            return "config"
        if self.is_full:
            return "full"
        if self.unused == Need.ENCODE.unused:
            return "encoding half"
        if self.unused == Need.DECODE.unused:
            return "decoding half"
        parts = [f"without {', '.join(sorted(self.unused))}"] if self.unused else []
        if self.hidden_states is not None:
            parts.append(f"hidden states {', '.join(map(str, sorted(self.hidden_states)))}")
        return "; ".join(parts)

    def __or__(self, other: Need) -> Need:
        """Return the need that satisfies both."""
        if self.weights != other.weights:
            return self if self.weights else other
        read = (
            self.hidden_states | other.hidden_states
            if self.hidden_states is not None and other.hidden_states is not None
            else None
        )
        return Need(self.weights, self.unused & other.unused, read, self.required or other.required)


Need.FULL = Need()
Need.CONFIG = Need(weights=False)
# Halves of an autoencoder; what belongs to neither (the latents' statistics) stays in both.
Need.ENCODE = Need.without("decoder", "post_quant_conv")
Need.DECODE = Need.without("encoder", "quant_conv")


def join(needs: Iterable[Mapping[str, Need]]) -> dict[str, Need]:
    """Return, per component, the need that satisfies all the given ones."""
    total: dict[str, Need] = {}
    for mapping in needs:
        for name, need in mapping.items():
            total[name] = total[name] | need if name in total else need
    return total
