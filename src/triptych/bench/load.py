"""Load: clients that ask again as soon as they have their answer, and what that took."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Ask = Callable[[int], Mapping[str, float]]
"""Makes the request of a number and waits for its result; returns the seconds of its stages."""


@dataclass(frozen=True)
class Load:
    """What some clients measured.

    Attributes:
        clients: how many asked at a time: no more than there were requests.
        seconds: what each request took its client, in the order in which they ended.
        ended: when each ended, in seconds from the start.
        stages: the seconds of each request's stages, in the same order.
    """

    clients: int
    seconds: tuple[float, ...]
    ended: tuple[float, ...]
    stages: tuple[Mapping[str, float], ...]

    @property
    def rate(self) -> float:
        """Requests a second; while the clients began and ended, too."""
        return len(self.ended) / self.ended[-1]

    @property
    def busy_rate(self) -> float:
        """Requests a second while all clients had one on its way: neither while they began, nor while they ended.

        Raises:
            ValueError: there are too few requests for that: more than twice as many as clients are needed.
        """
        counted = self.ended[self.clients - 1 : 1 - self.clients or None]
        if len(counted) < 2:
            raise ValueError(f"{len(self.ended)} requests are too few for {self.clients} clients")
        return (len(counted) - 1) / (counted[-1] - counted[0])

    def percentile(self, share: float) -> float:
        """Return the seconds within which that share of the requests was answered."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def stage_seconds(self) -> dict[str, float]:
        """Return the median seconds of each stage, in the order of the first request's."""
        return {name: statistics.median(each[name] for each in self.stages if name in each) for name in self.stages[0]}

    def figures(self) -> dict[str, object]:
        """Return it as plain values."""
        return {
            "clients": self.clients,
            "requests": len(self.seconds),
            "requests/s": self.rate,
            "seconds": {name: self.percentile(share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))},
            "stages": self.stage_seconds(),
        }


def closed_loop(ask: Ask, requests: int, clients: int, on_answer: Callable[[int], None] | None = None) -> Load:
    """Have clients ask until so many requests are answered.

    Args:
        on_answer: told how many are.

    Raises:
        Exception: what the first request that failed was answered with; after it, and after an interrupt, no other is
            begun.
    """
    numbers = iter(range(requests))
    answers: list[tuple[float, float, Mapping[str, float]]] = []
    errors: list[BaseException] = []
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
                if number is None or errors:
                    return
            asked = time.perf_counter()
            try:
                stages = ask(number)
            except Exception as error:  # noqa: BLE001 (raised where the load was asked for)
                errors.append(error)
                return
            ended = time.perf_counter()
            with lock:
                answers.append((ended - asked, ended - began, stages))
                if on_answer is not None:
                    on_answer(len(answers))

    clients = min(clients, requests)
    began = time.perf_counter()
    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    except BaseException as error:
        errors.append(error)
        raise
    if errors:
        raise errors[0]
    seconds, ended, stages = zip(*answers)
    return Load(clients, seconds, ended, stages)
