"""Traces: one span for a request, one for each wait and each segment, sent by OTLP where the environment asks for it."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

import triptych
from triptych.server.phases import Phase
from triptych.server.records import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

parent: ContextVar[str | None] = ContextVar("triptych_traceparent", default=None)
"""The `traceparent` header of the HTTP request that is being answered."""


def asked_for() -> bool:
    """Return whether the environment names a collector, as OpenTelemetry specifies it."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(os.environ.get(f"OTEL_EXPORTER_OTLP_{what}ENDPOINT") for what in ("", "TRACES_"))


def traces_of_environment() -> Traces | None:
    """Return where traces go; None, with nothing imported, where nobody asked for any."""
    if not asked_for():
        return None
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        log.warning('no traces are sent: OpenTelemetry is not installed; to get it: pip install "triptych[otel]"')
        return None
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    if protocol != "http/protobuf":
        log.warning("OTEL_EXPORTER_OTLP_PROTOCOL=%s: traces are sent as http/protobuf, port 4318 as a rule", protocol)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "triptych"}
    provider = TracerProvider(
        resource=Resource.create({**own, "service.version": triptych.__version__}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)


class Traces:
    """Turns requests that have ended into spans."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("triptych", triptych.__version__)

    def ended(self, record: Record, past: Iterable[Phase], traceparent: str | None) -> None:
        """Tell of a request; it is a child of whatever its caller was doing."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        caller = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
        root = self._tracer.start_span(
            "request",
            context=caller,
            kind=SpanKind.SERVER,
            start_time=_ns(record.events[0].time),
            attributes={"triptych.request.id": record.id, "triptych.outcome": record.status},
        )
        for event in record.events:
            if event.kind == "retried":
                told = {"triptych.role": str(event.details["role"]), "triptych.reason": str(event.details["reason"])}
                root.add_event("retried", told, _ns(event.time))
        inside = set_span_in_context(root)
        for phase in past:
            attributes = {"triptych.role": phase.role}
            if phase.replica is not None:
                attributes["triptych.replica"] = phase.replica
            span = self._tracer.start_span(
                phase.name, context=inside, start_time=_ns(phase.start), attributes=attributes
            )
            if phase.lost is not None:
                span.set_status(Status(StatusCode.ERROR, phase.lost))
            span.end(_ns(phase.end))
        if record.status == "failed":
            reason = None if record.error is None else record.error.message
            root.set_status(Status(StatusCode.ERROR, reason))
        root.end(_ns(record.events[-1].time))

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


class Parents:
    """Remembers, while an HTTP request is answered, whose child it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            parent.set(Headers(scope=scope).get("traceparent"))
        await self.app(scope, receive, send)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
