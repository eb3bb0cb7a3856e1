"""The life of a request: who hears of it, whatever they do."""

import pytest

from triptych.engine.job import Event, Job
from triptych.engine.replica import Handover
from triptych.engine.router import Router
from triptych.errors import Cancelled
from triptych.result import Result
from triptych.roles import RoleType


def fail(event: Event) -> None:
    raise ValueError(f"I cannot hear {event.kind}")


def test_a_listener_that_raises_holds_up_neither_the_job_nor_the_others(caplog: pytest.LogCaptureFixture) -> None:
    job, heard = Job(), list[str]()
    job.tell("queued", position=0)
    job.listen(fail)
    job.listen(lambda event: heard.append(event.kind))
    job.tell("started", role="encoder", replica="one")
    assert job.end(Result(seed=7))
    assert job.result(0).seed == 7
    assert heard == [event.kind for event in job.events()] == ["queued", "started", "done"]
    assert caplog.text.count(f"{job.id}: a listener failed at ") == len(heard)
    assert "I cannot hear done" in caplog.text


def test_a_job_whose_listener_raises_leaves_the_router() -> None:
    router, job = Router(lambda handover: Result(seed=0)), Job()
    job.listen(fail)
    router.submit(job, Handover(RoleType.ENCODER, 0), {})
    assert len(router.waiting(RoleType.ENCODER)) == 1
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(0)
    assert len(router) == 0
