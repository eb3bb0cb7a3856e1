"""Telemetry: what is counted of requests and replicas, and the spans that a collector is sent."""

import errno
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from serving import LONG, QUICK, Caller, engine, running

from triptych.engine.job import Event
from triptych.request import Request
from triptych.server import telemetry, traces
from triptych.server.limits import Limits
from triptych.server.metrics import Metrics
from triptych.server.phases import phases
from triptych.server.records import Record
from triptych.server.traces import Traces

ROLES = {"text": "encoder", "denoise": "denoiser", "decode": "decoder"}


def metrics_of(caller: Caller) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample by its name and the values of its labels, in the order of their names."""
    response = caller.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return samples(response.text)


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    families = text_string_to_metric_families(text)
    return {
        (each.name, tuple(value for _, value in sorted(each.labels.items()))): each.value
        for family in families
        for each in family.samples
    }


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_requests_their_roles_and_their_steps_are_counted(serve: Callable[..., Caller]) -> None:
    caller = serve()
    before = metrics_of(caller)
    for _ in range(2):
        caller.wait(caller.submit({**QUICK, "num_inference_steps": 3}))
    cancelled = caller.submit(LONG)
    caller.until(cancelled, running)
    caller.post(cancelled["links"]["cancel"])
    until(lambda: metrics_of(caller).get(("triptych_requests_total", ("cancelled",))) == 1)
    after = metrics_of(caller)
    assert after["triptych_requests_total", ("done",)] == 2
    assert after["triptych_request_seconds_count", ("done",)] == 2
    for role, least in (("encoder", 3), ("denoiser", 3), ("decoder", 2)):
        assert after["triptych_queue_seconds_count", (role,)] == least
        assert after["triptych_role_seconds_count", (role,)] == least
        assert after["triptych_role_seconds_sum", (role,)] > 0
    (pool,) = {labels[0] for name, labels in after if name == "triptych_loaded_bytes"}
    assert pool == "decoder+denoiser+encoder"
    assert after["triptych_loaded_bytes", (pool,)] > 20e6
    grown = {name: after[name, (pool,)] - before.get((name, (pool,)), 0) for name, _ in after if name.endswith("total")
             and (name, (pool,)) in after}  # fmt: skip
    assert grown["triptych_steps_total"] >= 7
    cached = grown["triptych_prompt_cache_hits_total"] + grown["triptych_prompt_cache_misses_total"]
    assert cached >= 3
    assert (
        after["triptych_forward_requests_bucket", ("+Inf", pool)] == after["triptych_forward_requests_count", (pool,)]
    )
    assert (after["triptych_ready", ()], after["triptych_replicas", (pool, "ready")]) == (1, 1)


def test_a_result_is_let_go_of_with_the_end_of_its_request(serve: Callable[..., Caller]) -> None:
    """Without waiting for Python to look for circles, which it may not do for hours."""
    caller = serve()
    gc.disable()
    try:
        request = caller.submit({**QUICK, "num_inference_steps": 20})
        job = caller.service.records.get(request["id"]).job
        assert job is not None
        known, late = weakref.ref(job), Late()
        caller.wait(request)
        job.listen(late.hear)
        assert late.heard[-1].kind == "done"
        known_late = weakref.ref(late)
        del late
        assert known_late() is None, "who comes late is told and not kept"
        del job
        engine().submit(Request(**QUICK, exact=False)).result(60)  # what the engine's threads last had in hand
        until(lambda: known() is None)
    finally:
        gc.enable()


class Late:
    """Listens when all is over."""

    def __init__(self) -> None:
        self.heard: list[Event] = []

    def hear(self, event: Event) -> None:
        self.heard.append(event)


def test_what_is_not_taken_on_is_counted_by_its_reason(
    serve: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_space(_: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    caller = serve()
    caller.post("/v1/requests", content=b"{")
    caller.post("/v1/requests", json={}, headers={"Origin": "https://evil.example"})
    caller.get("/v1/requests/nothing")
    unread = caller.post("/v1/images/generations", content=b"prompt", headers={"Content-Type": "text/plain"})
    assert unread.status_code == 415
    with monkeypatch.context() as full:
        full.setattr(caller.service, "submit", no_space)
        assert caller.post("/v1/requests", json={"parameters": QUICK}).status_code == 507
    assert caller.post("/v1/pools/denoiser", json={"replicas": 4}).status_code == 400
    told = metrics_of(caller)
    assert told["triptych_rejections_total", ("not_accepted",)] == 2, "a pool is no request"
    assert told["triptych_rejections_total", ("no_space",)] == 1
    assert told["triptych_rejections_total", ("not_allowed",)] == 1
    assert told["triptych_http_responses_total", ("404",)] == 1


def test_a_result_that_cannot_be_kept_is_counted_as_its_caller_is_told(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(kept_bytes=2000))
    assert caller.wait(caller.submit(QUICK))["status"] == "failed"
    told = metrics_of(caller)
    assert told["triptych_requests_total", ("failed",)] == 1
    assert ("triptych_requests_total", ("done",)) not in told


def test_an_observer_that_fails_harms_no_request(
    serve: Callable[..., Caller], caplog: pytest.LogCaptureFixture
) -> None:
    def observe() -> Any:
        return lambda record: record.nothing

    caller = serve()
    caller.service.records.observers.insert(0, observe)
    assert caller.wait(caller.submit(QUICK))["status"] == "done"
    assert metrics_of(caller)["triptych_requests_total", ("done",)] == 1
    assert "an observer failed" in caplog.text


def test_a_request_that_ends_without_a_job_is_counted(serve: Callable[..., Caller]) -> None:
    caller = serve()
    record = Record("req_0", None, 7, "images", time.time())
    caller.service.records.add(record)
    assert caller.post("/v1/requests/req_0/cancel").json()["status"] == "cancelled"
    assert metrics_of(caller)["triptych_requests_total", ("cancelled",)] == 1


def test_before_the_model_is_there_metrics_are_too(serve: Callable[..., Caller]) -> None:
    caller = serve()
    caller.service.engine = None
    told = metrics_of(caller)
    assert (told["triptych_ready", ()], told["triptych_requests_in_progress", ()]) == (0, 0)


def test_sums_over_replicas_that_come_and_go_never_fall() -> None:
    def replica(name: str, hits: int, forwards: dict[Any, int], hops: int) -> dict[str, Any]:
        return {
            "name": name,
            "roles": ["denoiser"],
            "prompt_cache": {"hits": hits, "misses": 1},
            "forwards": forwards,
            "hops": {"count": hops, "bytes": hops * 100, "seconds": hops * 0.5},
        }

    told: dict[str, Any] = {}
    metrics = Metrics(lambda: told)
    seen = []
    for replicas in (
        [replica("a", 5, {1: 10, 4: 2}, 4), replica("b", 1, {}, 1)],
        [replica("a", 2, {1: 1}, 1), replica("b", 1, {"8": 1}, 1)],  # a was restarted; keys may be text
        [],
        [replica("c", 3, {40: 1}, 2)],
    ):
        told["replicas"] = replicas
        seen.append(samples(metrics.text("")[0].decode()))
    pool = ("denoiser",)
    assert [each["triptych_prompt_cache_hits_total", pool] for each in seen] == [6, 8, 8, 11]
    assert [each["triptych_steps_total", pool] for each in seen] == [18, 27, 27, 67]
    assert [each["triptych_hop_bytes_total", pool] for each in seen] == [500, 600, 600, 800]
    assert seen[-1]["triptych_hop_seconds_total", pool] == 4.0
    buckets = [
        seen[-1]["triptych_forward_requests_bucket", (most, "denoiser")] for most in ("1.0", "4.0", "8.0", "+Inf")
    ]
    assert buckets == [11, 13, 14, 15]


def events(*told: tuple[str, float, str]) -> list[Event]:
    return [
        Event(k, kind, at, {"role": role, "replica": f"{role}-0", "reason": "it died"} if role else {})
        for k, (kind, at, role) in enumerate(told)
    ]


def test_a_request_is_cut_into_waits_and_segments() -> None:
    happened = events(("queued", 0, ""), ("started", 1, "encoder"), ("started", 4, "denoiser"), ("step", 5, "denoiser"),
                      ("started", 9, "decoder"), ("done", 11, ""))  # fmt: skip
    told = phases(happened, {"text": 2, "denoise": 4, "decode": 1.5}, ROLES)
    assert [(each.name, each.role, each.start, each.end) for each in told] == [
        ("queue", "encoder", 0, 1), ("encoder", "encoder", 1, 3),
        ("queue", "denoiser", 3, 4), ("denoiser", "denoiser", 4, 8),
        ("queue", "decoder", 8, 9), ("decoder", "decoder", 9, 10.5),
    ]  # fmt: skip


def test_a_lost_attempt_is_a_phase_of_its_own() -> None:
    happened = events(("queued", 0, ""), ("started", 0, "encoder"), ("started", 2, "denoiser"), ("retried", 5, "denoiser"),
                      ("started", 6, "denoiser"), ("started", 9, "decoder"), ("done", 10, ""))  # fmt: skip
    told = phases(happened, {"text": 1, "denoise": 2, "decode": 1}, ROLES)
    assert [(each.name, each.start, each.end, each.lost) for each in told if not each.waiting] == [
        ("encoder", 0, 1, None), ("denoiser", 2, 5, "it died"), ("denoiser", 6, 8, None), ("decoder", 9, 10, None)
    ]  # fmt: skip
    assert [(each.start, each.end) for each in told if each.waiting] == [(0, 0), (1, 2), (5, 6), (8, 9)]


def test_a_segment_that_is_made_again_for_a_damaged_hand_over_has_its_own_seconds() -> None:
    happened = events(("queued", 0, ""), ("started", 0, "encoder"), ("started", 2, "denoiser"), ("retried", 3, "denoiser"),
                      ("started", 3, "encoder"), ("started", 5, "denoiser"), ("started", 8, "decoder"), ("done", 9, ""))  # fmt: skip
    told = phases(happened, {"text": 1, "denoise": 2, "decode": 1}, ROLES)
    assert [(each.name, each.seconds) for each in told if not each.waiting] == [
        ("encoder", 1), ("denoiser", 1), ("encoder", 1), ("denoiser", 2), ("decoder", 1)
    ]  # fmt: skip


def test_a_request_that_did_not_get_there_has_the_phases_it_had() -> None:
    failed = events(("queued", 0, ""), ("started", 1, "encoder"), ("started", 3, "denoiser"), ("failed", 7, ""))
    told = phases(failed, {}, ROLES)
    assert [(each.name, each.seconds) for each in told] == [("queue", 1), ("encoder", 2), ("queue", 0), ("denoiser", 4)]
    assert phases(events(("queued", 0, ""), ("cancelled", 1, "")), {}, ROLES) == []


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What the servers of a test trace."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry.traces, "traces_of_environment", lambda: Traces(provider))
    return exporter


def test_a_request_is_a_span_with_one_for_each_wait_and_segment(
    exported: InMemorySpanExporter, serve: Callable[..., Caller]
) -> None:
    caller = serve()
    began = time.time()
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    sent = {"parameters": {**QUICK, "num_inference_steps": 3}}
    request = caller.post("/v1/requests", json=sent, headers={"traceparent": traceparent}).json()
    caller.wait(request)
    until(lambda: any(each.name == "request" for each in exported.get_finished_spans()))
    *children, root = exported.get_finished_spans()
    assert [each.name for each in children] == ["queue", "encoder", "queue", "denoiser", "queue", "decoder"]
    assert root.attributes == {"triptych.request.id": request["id"], "triptych.outcome": "done"}
    assert root.parent is not None and f"{root.parent.span_id:x}" == "b7ad6b7169203331"
    assert {f"{each.context.trace_id:032x}" for each in (*children, root) if each.context} == {traceparent[3:35]}
    for span in children:
        assert span.parent is not None and root.context is not None
        assert span.parent.span_id == root.context.span_id
        assert start(root) <= start(span) <= end(span) <= end(root) + 1e-3
    assert began - 1 < start(root) < end(root) < time.time() + 1
    assert all(end(one) <= start(other) + 1e-3 for one, other in itertools.pairwise(children))


def start(span: ReadableSpan) -> float:
    return (span.start_time or 0) / 1e9


def end(span: ReadableSpan) -> float:
    return (span.end_time or 0) / 1e9


def test_a_failed_request_says_so_in_its_span(exported: InMemorySpanExporter, serve: Callable[..., Caller]) -> None:
    caller = serve()
    caller.wait(caller.submit(LONG, deadline=0.3))
    until(lambda: bool(exported.get_finished_spans()))
    root = exported.get_finished_spans()[-1]
    assert root.status.is_ok is False
    assert "deadline" in str(root.status.description)


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A collector's address, and what it was sent."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()


def test_spans_reach_the_collector_that_the_environment_names(
    collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    made = traces.traces_of_environment()
    assert made is not None
    job = engine().submit(Request(**QUICK, exact=False))
    job.result(60)
    record = Record(job.id, None, 7, "images", time.time(), events=list(job.events()), status=job.status)
    made.ended(record, phases(record.events, job.result().timings, {}), None)
    made.close()
    (resource,) = received[0].resource_spans
    names = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert names["service.name"] == "triptych"
    assert [span.name for scope in resource.scope_spans for span in scope.spans][-1] == "request"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nothing_is_traced_unless_asked_for(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert traces.traces_of_environment() is None


def test_without_a_collector_the_sdk_is_not_even_imported() -> None:
    code = (
        "import json, sys; from triptych.server.service import Service; from triptych.server.app import create_app; "
        "create_app(Service()); print(json.dumps([name for name in sys.modules if name.startswith("
        "('opentelemetry.sdk', 'opentelemetry.exporter', 'opentelemetry.proto'))]))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout
    assert json.loads(output.splitlines()[-1]) == []
