"""Metrics in Prometheus' form: what requests took, and how things stand in the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.engine.job import Event
from triptych.server.phases import Phase

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
"""Bounds of every histogram of seconds."""
TOGETHER = (1, 2, 4, 8, 16, 32)
"""Bounds of the histogram of requests that share a forward."""
_REASONS = {
    400: "not_accepted",
    401: "no_key",
    403: "not_allowed",
    408: "too_slow",
    413: "too_large",
    415: "not_accepted",
    422: "not_accepted",
    429: "overloaded",
    503: "not_ready",
    507: "no_space",
}
_TAKING = ("/v1/requests", "/v1/images/generations", "/v1/images/edits", "/v1/videos", "/v1/videos/sync")
"""Paths that requests are posted to."""

Snapshot = Callable[[], Mapping[str, Any]]


class Metrics:
    """The metrics of one service. Labels are roles, pools, outcomes, reasons and statuses: none grows with its use."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("triptych_requests", "Requests that have ended.", ["outcome"], **own)
        self._seconds = Histogram(
            "triptych_request_seconds", "From a request's arrival to its end.", ["outcome"], buckets=SECONDS, **own
        )
        self._queue = Histogram(
            "triptych_queue_seconds", "Waiting for a role, hand-over included.", ["role"], buckets=SECONDS, **own
        )
        self._roles = Histogram(
            "triptych_role_seconds", "A request in the stages of a role.", ["role"], buckets=SECONDS, **own
        )
        self._retries = Counter("triptych_retries", "Attempts that were lost and made again.", ["role"], **own)
        self._rejections = Counter("triptych_rejections", "Requests that were not taken on.", ["reason"], **own)
        self._responses = Counter("triptych_http_responses", "Responses of the HTTP server.", ["status"], **own)
        self.registry.register(_Standing(snapshot))
        ProcessCollector(registry=self.registry)

    def ended(self, outcome: str, events: Iterable[Event], past: Iterable[Phase]) -> None:
        """Count a request that has ended."""
        told = list(events)
        self._requests.labels(outcome).inc()
        self._seconds.labels(outcome).observe(told[-1].time - told[0].time)
        for phase in past:
            if phase.lost is None:
                (self._queue if phase.waiting else self._roles).labels(phase.role).observe(phase.seconds)
            else:
                self._retries.labels(phase.role).inc()

    def responded(self, method: str, path: str, status: int) -> None:
        """Count a response."""
        self._responses.labels(str(status)).inc()
        if method == "POST" and path.rstrip("/") in _TAKING and (reason := _REASONS.get(status)) is not None:
            self._rejections.labels(reason).inc()

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return all of them in the form that an `Accept` header asks for, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


class Responses:
    """Counts what the server answers."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status: int | None = None

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.metrics.responded(scope["method"], scope["path"], message["status"])
            await send(message)

        try:
            await self.app(scope, receive, counting)
        except Exception:  # whatever it is, it is counted and raised again
            if status is None:  # answered further out
                self.metrics.responded(scope["method"], scope["path"], 500)
            raise


class _Standing(Collector):
    """How things stand when somebody asks, from a snapshot that every engine gives."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._grown = _Grown()
        self._lock = Lock()

    def describe(self) -> Iterable[Metric]:
        return ()  # without it, registering would ask for a snapshot

    def collect(self) -> Iterator[Metric]:
        told = self._snapshot()
        yield _gauge("triptych_ready", "Whether requests can be served.", float(bool(told.get("ready"))))
        info = GaugeMetricFamily("triptych_info", "What is served, by which version.", labels=["version", "family"])
        info.add_metric([str(told.get("version") or ""), str(told.get("family") or "")], 1)
        yield info
        yield _gauge("triptych_requests_in_progress", "Requests on their way.", float(told.get("requests") or 0))
        kept = told.get("kept") or {}
        yield _gauge("triptych_results_bytes", "Results on disk.", float(kept.get("result_bytes") or 0))
        yield _labelled("triptych_waiting", "Segments that wait for a replica.", "role", told.get("waiting") or {})
        replicas = [each for each in told.get("replicas") or [] if isinstance(each, Mapping)]
        yield from _replicas(replicas)
        with self._lock:
            self._grown.hear(replicas)
            yield from self._grown.families()


def _replicas(replicas: list[Mapping[str, Any]]) -> Iterator[Metric]:
    """Yield what adds up over the replicas of a pool."""
    running: dict[str, float] = defaultdict(float)
    slots: dict[str, float] = defaultdict(float)
    loaded: dict[str, float] = defaultdict(float)
    backlog: dict[str, float] = defaultdict(float)
    count: dict[tuple[str, str], float] = defaultdict(float)
    for each in replicas:
        pool = pool_of(each)
        state = "draining" if each.get("draining") else str(each.get("state") or "ready")
        count[pool, state] += 1
        loaded[pool] += each.get("loaded_bytes") or 0
        backlog[pool] += each.get("backlog") or 0
        for sums, name in ((running, "running"), (slots, "slots")):
            for role, number in (each.get(name) or {}).items():
                sums[str(role)] += number
    yield _labelled("triptych_running", "Segments given to replicas.", "role", running)
    yield _labelled("triptych_slots", "Segments that replicas take at a time.", "role", slots)
    yield _labelled("triptych_loaded_bytes", "Weights held.", "pool", loaded)
    yield _labelled("triptych_backlog_seconds", "Predicted seconds of work at replicas.", "pool", backlog)
    states = GaugeMetricFamily("triptych_replicas", "Replicas that take part.", labels=["pool", "state"])
    for labels, number in count.items():
        states.add_metric(list(labels), number)
    yield states


class _Grown:
    """Sums by pool of what replicas count from their start, so that one that restarts or leaves takes nothing back."""

    def __init__(self) -> None:
        self._last: dict[str, dict[str, float]] = {}
        self._sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def hear(self, replicas: list[Mapping[str, Any]]) -> None:
        now = {str(each.get("name")): (pool_of(each), counted(each)) for each in replicas}
        for name, (pool, counts) in now.items():
            before = self._last.get(name, {})
            restarted = any(counts.get(what, 0) < number for what, number in before.items())
            for what, number in counts.items():
                self._sums[pool][what] += number - (0 if restarted else before.get(what, 0))
        self._last = {name: counts for name, (_, counts) in now.items()}

    def families(self) -> Iterator[Metric]:
        for what, told in (
            ("steps", "Denoising steps of requests."),
            ("prompt_cache_hits", "Prompts that had been encoded already."),
            ("prompt_cache_misses", "Prompts that were encoded."),
            ("hops", "Hand-overs that replicas read or wrote."),
            ("hop_bytes", "Bytes of these hand-overs."),
            ("hop_seconds", "Seconds of reading and writing them."),
        ):
            family = CounterMetricFamily(f"triptych_{what}", told, labels=["pool"])
            for pool, counts in self._sums.items():
                if what in counts:
                    family.add_metric([pool], counts[what])
            yield family
        shared = HistogramMetricFamily(
            "triptych_forward_requests", "Requests that shared a denoising forward.", labels=["pool"]
        )
        for pool, counts in self._sums.items():
            sizes = {int(what.partition(" ")[2]): n for what, n in counts.items() if what.startswith("forwards ")}
            if sizes:
                buckets = [(str(float(most)), sum(n for size, n in sizes.items() if size <= most)) for most in TOGETHER]
                buckets.append(("+Inf", sum(sizes.values())))
                shared.add_metric([pool], buckets, sum(size * n for size, n in sizes.items()))
        yield shared


def counted(replica: Mapping[str, Any]) -> dict[str, float]:
    """Return what a replica has counted since its start, by name."""
    counts: dict[str, float] = {}
    if cache := replica.get("prompt_cache"):
        counts |= {f"prompt_cache_{what}": float(cache[what]) for what in ("hits", "misses")}
    if hops := replica.get("hops"):
        counts |= {"hops": hops["count"], "hop_bytes": hops["bytes"], "hop_seconds": hops["seconds"]}
    if forwards := replica.get("forwards"):
        counts |= {f"forwards {int(size)}": float(number) for size, number in forwards.items()}
        counts["steps"] = sum(int(size) * float(number) for size, number in forwards.items())
    return counts


def pool_of(replica: Mapping[str, Any]) -> str:
    """Return the name of the pool that a replica belongs to."""
    return "+".join(str(role) for role in replica.get("roles") or [])


def _gauge(name: str, told: str, value: float) -> Metric:
    return GaugeMetricFamily(name, told, value=value)


def _labelled(name: str, told: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, told, labels=[label])
    for key, value in values.items():
        family.add_metric([str(key)], float(value))
    return family
