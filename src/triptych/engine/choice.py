"""Which replica is to run a segment."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from triptych.engine.replica import Replica, Ticket
from triptych.errors import UsageError
from triptych.roles import RoleType

Policy = Literal["predicted", "round_robin", "max_free_slots"]
POLICIES: tuple[Policy, ...] = ("predicted", "round_robin", "max_free_slots")
_PROMPTS = 4096
"""Prompts of which it is remembered where they were encoded."""


class Choice:
    """Chooses replicas by one policy. Not for several threads at a time.

    Raises:
        UsageError: there is no such policy.
    """

    def __init__(self, policy: Policy) -> None:
        if policy not in POLICIES:
            raise UsageError(f"policy={policy!r}: one of {', '.join(POLICIES)} is accepted")
        self._policy = policy
        self._turn = 0
        self._encoded: OrderedDict[object, str] = OrderedDict()  # prompts, and the encoder that had each last

    @property
    def predicts(self) -> bool:
        """Whether it goes by predicted seconds."""
        return self._policy == "predicted"

    def pick(self, ticket: Ticket, replicas: Sequence[Replica], parameters: Mapping[str, Any]) -> Replica | None:
        """Return the replica that is to run a ticket; None where it is better to wait.

        Args:
            parameters: plain ones of its request.
        """
        able = [each for each in replicas if ticket.role in each.roles and not each.draining]
        room = [each for each in able if each.has_room(ticket)]
        if not room:
            return None
        if self._policy == "round_robin":
            self._turn += 1
            return room[self._turn % len(room)]
        if self._policy == "max_free_slots" or ticket.alone:
            return max(room, key=lambda each: each.slots[ticket.role] - each.running(ticket.role))
        if ticket.role is RoleType.ENCODER and len(room) > 1:
            return self._holder((parameters.get("prompt"), parameters.get("negative_prompt")), room)
        # Waiting for the replica that will be free first beats joining the queue of a busy one that has a slot.
        best = min(able, key=lambda each: (each.backlog, each.name))
        return best if best in room else None

    def _holder(self, prompt: object, room: Sequence[Replica]) -> Replica:
        """Return the encoder that has a prompt in its cache already, or the one that will have it; an idle one first."""
        name = self._encoded.pop(prompt, None)
        free = [each for each in room if not each.tickets] or room
        replica = next((each for each in free if each.name == name), min(free, key=lambda each: each.backlog))
        self._encoded[prompt] = replica.name
        if len(self._encoded) > _PROMPTS:
            self._encoded.popitem(last=False)
        return replica
