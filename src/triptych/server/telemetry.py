"""Telemetry: has every request of a service counted and traced when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastapi import APIRouter, FastAPI, Header, Response

from triptych.server import traces
from triptych.server.metrics import Metrics, Responses
from triptych.server.phases import phases
from triptych.server.records import Record
from triptych.server.service import Service


class Telemetry:
    """Follows the requests of a service.

    Attributes:
        metrics: what is counted.
        traces: where spans go; None where nobody asked for them.
    """

    def __init__(self, service: Service) -> None:
        self.metrics = Metrics(service.snapshot)
        self.traces = traces.traces_of_environment()
        self._service = service
        service.records.observers.append(self.watch)

    def watch(self) -> Callable[[Record], None]:
        """Return what is to be called at the end of a record; asked for where its HTTP request is answered."""
        return partial(self._ended, traces.parent.get())

    def close(self) -> None:
        """Send what has not been sent; waits for the collector for some seconds."""
        if self.traces is not None:
            self.traces.close()

    def install(self, app: FastAPI) -> None:
        """Count the responses of an application, and know whose children its requests are."""
        if self.traces is not None:
            app.add_middleware(traces.Parents)
        app.add_middleware(Responses, metrics=self.metrics)

    def router(self) -> APIRouter:
        """Return the route of the metrics."""
        router = APIRouter()

        @router.get("/metrics", response_class=Response)
        def metrics(accept: str = Header("")) -> Response:
            """Tell the metrics, in Prometheus' form."""
            text, media_type = self.metrics.text(accept)
            return Response(text, headers={"Content-Type": media_type})

        return router

    def _ended(self, traceparent: str | None, record: Record) -> None:
        engine = self._service.engine
        recipe = [] if engine is None else engine.front.family.recipe
        past = phases(record.events, record.timings, {name: stage.role.value for name, stage in recipe})
        self.metrics.ended(record.status, record.events, past)
        if self.traces is not None:
            self.traces.ended(record, past, traceparent)
