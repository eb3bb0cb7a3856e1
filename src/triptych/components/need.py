"""How much of a component a stage uses: all of it, a part of it, or only its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from triptych.errors import RecipeError

HEAD = "<head>"
"""Stands for what a transformer puts its hidden states through at the end: output head, projection or pooler."""
VISION = "<vision>"
"""Stands for the vision tower of a vision-language model, with what projects its output."""

Condition = Callable[[Mapping[str, object]], bool]


@dataclass(frozen=True)
class Need:
    """How much of one component a stage uses.

    Attributes:
        weights: False when only the configuration is used (the component is then built hollow, at zero bytes).
        unused: submodules that do not run: dotted paths (`*` stands for any text, and may match nothing), or `VISION`.
        hidden_states: which entries of a transformer's `hidden_states` are read, as in `output_hidden_states=True`;
            None when it is run to its end. Layers above the last entry read are not used.
        unread: submodules that the component runs, but whose result nobody reads: paths, or `HEAD`.
        required: False for a component that some checkpoints do not have.
        condition: whether this checkpoint uses it, from the pipeline's own options in `model_index.json`.
    """

    weights: bool = True
    unused: frozenset[str] = frozenset()
    hidden_states: frozenset[int] | None = None
    unread: frozenset[str] = frozenset()
    required: bool = True
    condition: Condition | None = None

    FULL: ClassVar[Need]
    CONFIG: ClassVar[Need]
    ENCODE: ClassVar[Need]
    DECODE: ClassVar[Need]
    BODY: ClassVar[Need]

    @classmethod
    def hidden(cls, *entries: int, vision: bool = False) -> Need:
        """Return the need of reading these entries of `hidden_states` (negative: from the end), and nothing else.

        `vision` says whether a vision-language model encodes images too.

        Raises:
            RecipeError: no entry is given.
        """
        if not entries:
            raise RecipeError("Need.hidden() names no hidden state; say which are read, or use Need.FULL")
        unused = frozenset() if vision else frozenset({VISION})
        return cls(unused=unused, unread=frozenset({HEAD}), hidden_states=frozenset(entries))

    @classmethod
    def without(cls, *unused: str) -> Need:
        """Return the need of everything but these submodules, which do not run."""
        return cls(unused=frozenset(unused))

    def optional(self, when: Condition | None = None) -> Need:
        """Return this need for a component that may be absent, or that only some checkpoints use (`when`)."""
        return replace(self, required=False, condition=when)

    @property
    def is_full(self) -> bool:
        return self.weights and not self.unused and not self.unread and self.hidden_states is None

    def __str__(self) -> str:
        if not self.weights:
            return "config"
        if self.is_full:
            return "full"
        words, idle = [], self.unused | self.unread
        for half, name in ((Need.ENCODE, "encoding half"), (Need.DECODE, "decoding half")):
            if half.unused <= idle:
                words.append(name)
                idle -= half.unused
        if self.hidden_states is not None:
            entries = ", ".join(str(entry) for entry in sorted(self.hidden_states))
            words.append("last hidden state" if self.hidden_states == {-1} else f"hidden states {entries}")
        words += sorted(f"no {part.split('.')[-1].strip('<>')}" for part in idle)
        return ", ".join(words)

    def __or__(self, other: Need) -> Need:
        """Return the need that satisfies both."""
        required, condition = self.required or other.required, _either(self.condition, other.condition)
        if self.weights != other.weights:
            return replace(self if self.weights else other, required=required, condition=condition)
        unused = self.unused & other.unused
        unread = ((self.unused | self.unread) & (other.unused | other.unread)) - unused
        both = self.hidden_states is not None and other.hidden_states is not None
        read = (self.hidden_states or frozenset()) | (other.hidden_states or frozenset()) if both else None
        return Need(self.weights, unused, read, unread, required, condition)


Need.FULL = Need()
Need.CONFIG = Need(weights=False)
# Halves of an autoencoder; what belongs to neither (the latents' statistics) stays in both.
Need.ENCODE = Need.without("decoder", "post_quant_conv")
Need.DECODE = Need.without("encoder", "quant_conv")
# A transformer read at its `last_hidden_state`, after the final norm.
Need.BODY = Need(unread=frozenset({HEAD}))


def join(needs: Iterable[Mapping[str, Need]]) -> dict[str, Need]:
    """Return, per component, the need that satisfies all the given ones."""
    total: dict[str, Need] = {}
    for mapping in needs:
        for name, need in mapping.items():
            total[name] = total[name] | need if name in total else need
    return total


def _either(one: Condition | None, other: Condition | None) -> Condition | None:
    """Return the condition under which one of two needs holds; a need without a condition always does."""
    if one is None or other is None or one is other:
        return one if one is other else None
    first, second = one, other
    return lambda options: first(options) or second(options)
