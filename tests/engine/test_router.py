"""The router: who runs what, and what becomes of a request whose replica is lost."""

from typing import Any

import pytest

from triptych.engine.job import Job
from triptych.engine.replica import Handover, Replica, Ticket
from triptych.engine.router import BESIDE, Router
from triptych.errors import (
    Cancelled,
    DeadlineExceeded,
    MemoryShortageError,
    OverloadedError,
    ReplicaLost,
    RequestLostError,
    UsageError,
    WireError,
)
from triptych.result import Result
from triptych.roles import RoleType

E, D, C = RoleType.ENCODER, RoleType.DENOISER, RoleType.DECODER
ROUTE = [E, D, C]


class Remote(Replica):
    """A replica whose process the test plays: it answers when told to."""

    def __init__(self, name: str, *roles: RoleType, slots: int = 2) -> None:
        super().__init__(name, frozenset(roles or ROUTE), dict.fromkeys(RoleType, slots))
        self.cancelled: list[Ticket] = []

    def start(self, ticket: Ticket, payload: Any) -> None:
        pass

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.append(ticket)

    def close(self) -> None:
        pass

    def answer(self, ticket: Ticket | None = None, outcome: Any = None, seconds: float = 1.0) -> None:
        """Say that a ticket (the oldest) is done; by default with what the next role starts from."""
        ticket = ticket or self.tickets[0]
        position = ticket.handover.payload + 1
        following = ROUTE[position] if position < len(ROUTE) else None
        ticket.done(ticket, outcome or Handover(following, position, seconds))


def router(*replicas: Replica, **options: Any) -> Router:
    made = Router(lambda handover: Result(seed=handover.payload), **options)
    for replica in replicas:
        made.add(replica)
    return made


def submit(made: Router, steps: int = 1, **options: Any) -> Job:
    job = Job(**options)
    made.submit(job, Handover(E, 0), {"num_inference_steps": steps, "height": 8, "width": 8, "prompt": "fox"})
    return job


def kinds(job: Job) -> list[str]:
    return [event.kind for event in job.events()]


def test_a_job_goes_through_its_segments_and_ends_once() -> None:
    replica = Remote("all")
    made = router(replica)
    job = submit(made)
    for _ in ROUTE:
        replica.answer()
    assert job.result(0).seed == 3
    assert kinds(job) == ["queued", "started", "started", "started", "done"]
    assert len(made) == 0
    assert replica.tickets == []


def test_segments_wait_for_a_replica_and_go_to_the_first_that_has_room() -> None:
    made = router()
    first, second = submit(made), submit(made)
    assert len(made.waiting(E)) == 2
    slow, free = Remote("a", slots=1), Remote("b", slots=1)
    made.add(slow)
    assert slow.tickets[0].job is first
    made.add(free)
    assert free.tickets[0].job is second


def test_a_replica_with_a_long_job_is_given_less_than_an_idle_one() -> None:
    one, two = Remote("one", D, slots=16), Remote("two", D, slots=16)
    made = router(one, two)
    encoder = Remote("encoder", E, slots=64)
    made.add(encoder)
    long = submit(made, steps=100)
    encoder.answer()
    for _ in range(10):
        submit(made, steps=10)
    while encoder.tickets:
        encoder.answer()
    busy = one if one.tickets[0].job is long else two
    other = two if busy is one else one
    assert len(busy.tickets) == 1
    assert len(other.tickets) == 10, "the long one is worth ten short ones"


def test_waiting_for_the_better_replica_beats_a_slot_at_a_busy_one() -> None:
    busy, quick = Remote("busy", D, slots=16), Remote("quick", D, slots=1)
    encoder = Remote("encoder", E, slots=64)
    made = router(busy, encoder)
    submit(made, steps=100)
    encoder.answer()
    made.add(quick)
    for _ in range(2):
        submit(made, steps=1)
        encoder.answer()
    assert len(quick.tickets) == 1
    assert len(made.waiting(D)) == 1, "it waits for the quick one"
    assert len(busy.tickets) == 1


@pytest.mark.parametrize("policy", ["round_robin", "max_free_slots"])
def test_the_other_policies_spread_requests(policy: Any) -> None:
    one, two = Remote("one"), Remote("two")
    made = router(one, two, policy=policy)
    for _ in range(4):
        submit(made)
    assert len(one.tickets) == len(two.tickets) == 2


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="predicted, round_robin, max_free_slots"):
        router(policy="random")


def test_a_prompt_goes_to_the_encoder_that_has_it_already() -> None:
    one, two = Remote("one", E, slots=8), Remote("two", E, slots=8)
    made = router(one, two)
    submit(made)
    holder, other = (one, two) if one.tickets else (two, one)
    holder.answer(outcome=Cancelled())
    for count in (1, 2):
        submit(made)
        assert (len(holder.tickets), len(other.tickets)) == (1, count - 1), (
            "an idle one first: it may hold as much by then"
        )
    submit(made)
    assert len(other.tickets) == 2, "and where none is idle, the one that had it last"


def test_a_replica_takes_part_once() -> None:
    one = Remote("one")
    made = router(one, one)
    made.remove(one, "it died")
    assert made.replicas == []


def test_what_a_lost_replica_ran_is_run_elsewhere_from_the_same_hand_over() -> None:
    first = Remote("first")
    made = router(first)
    job = submit(made)
    first.answer()
    made.remove(first, "it died")
    assert job.status == "running"
    second = Remote("second")
    made.add(second)
    assert second.tickets[0].role is D
    assert second.tickets[0].handover.payload == 1
    second.answer()
    second.answer()
    assert job.result(0).seed == 3
    assert "retried" in kinds(job)
    assert job.lost == ["denoiser: it died"]


def test_a_late_answer_of_a_lost_replica_changes_nothing() -> None:
    first, second = Remote("first"), Remote("second")
    made = router(first)
    job = submit(made)
    stale = first.tickets[0]
    made.remove(first, "it hung")
    made.add(second)
    first.answer(stale)
    assert [ticket.role for ticket in second.tickets] == [E]
    for _ in ROUTE:
        second.answer()
    assert job.status == "done"


def test_a_job_lost_three_times_fails_with_the_reasons_and_its_last_attempt_is_made_alone() -> None:
    made = router()
    job = submit(made)
    for number in range(2):
        replica = Remote(f"r{number}")
        made.add(replica)
        replica.tickets[0].computing = True
        made.remove(replica, f"death {number}")
    last = Remote("r2")
    made.add(last)
    assert last.tickets[0].alone
    submit(made)
    assert len(last.tickets) == 1, "nothing runs beside a suspect"
    made.remove(last, "death 2")
    with pytest.raises(RequestLostError, match="3 lost attempts.*death 0.*death 1.*death 2"):
        job.result(0)


def test_a_segment_that_lacked_memory_is_run_alone_and_the_next_one_beside_others_again() -> None:
    replica = Remote("r", slots=4)
    made = router(replica)
    job, other = submit(made), submit(made)
    replica.answer(outcome=MemoryShortageError("no room"))
    assert [ticket.job for ticket in replica.tickets] == [other], "it waits until nothing runs beside it"
    while replica.tickets[0].job is other:
        replica.answer()
    assert replica.tickets[0].alone
    replica.answer()
    assert {ticket.job for ticket in replica.tickets} == {job, other}
    while replica.tickets:
        replica.answer()
    assert {job.status, other.status} == {"done"}
    assert [event.details["reason"] for event in job.events() if event.kind == "retried"] == ["no room"]


def test_a_segment_that_lacks_memory_alone_too_is_its_requests_end() -> None:
    replica = Remote("r")
    made = router(replica)
    job = submit(made)
    for _ in range(2):
        replica.answer(outcome=MemoryShortageError("no room"))
    with pytest.raises(MemoryShortageError, match="no room"):
        job.result(0)
    assert not replica.tickets


def test_a_request_that_only_waited_at_a_lost_replica_is_not_blamed() -> None:
    replica = Remote("r", slots=4)
    made = router(replica)
    guilty, innocent = submit(made), submit(made)
    replica.tickets[0].computing = True
    made.remove(replica, "it died")
    assert guilty.lost
    assert not innocent.lost


def test_a_request_that_kills_before_it_shows_that_it_computes_is_found_among_others() -> None:
    """The others are blamed for it at first, and none of them fails."""
    made = router()
    poison, others, deaths = submit(made), [], 0
    while poison.status in ("queued", "running"):
        replica = Remote(f"r{deaths}", slots=3)
        made.add(replica)
        others += [submit(made) for _ in range(2)]
        while replica.tickets and all(ticket.job is not poison for ticket in replica.tickets):
            replica.answer()  # of somebody else who is made alone
        for ticket in replica.tickets:
            ticket.computing = ticket.job is not poison
        deaths += bool(replica.tickets)
        made.remove(replica, f"death {deaths}")
        assert deaths <= 6, "it kills and kills"
    with pytest.raises(RequestLostError):
        poison.result(0)
    last = Remote("last", slots=3)
    made.add(last)
    while last.tickets:
        last.answer()
    assert {job.status for job in others} == {"done"}


def suspect_that_waits(*replicas: Remote) -> tuple[Router, Job]:
    """A suspected request whose decoding waits, while the replicas encode as many others as they take."""
    denoiser = Remote("denoiser", D, slots=8)
    made = router(*replicas, denoiser)
    suspect = submit(made, beside=BESIDE)
    next(each for each in replicas if each.tickets).answer()
    for each in replicas:
        for _ in range(each.slots[E]):
            submit(made)
    denoiser.answer()
    assert made.waiting(C)[0].job is suspect
    assert all(len(each.tickets) == each.slots[E] for each in replicas)
    return made, suspect


def test_a_suspect_gets_its_turn_at_a_replica_that_other_roles_keep_busy() -> None:
    both = Remote("both", E, C)
    made, suspect = suspect_that_waits(both)
    next_one = submit(made)
    both.answer()
    assert len(both.tickets) == 1, "nothing is added before the suspect's turn"
    both.answer()
    assert [ticket.job for ticket in both.tickets] == [suspect]
    both.answer()
    assert suspect.status == "done"
    assert next_one in [ticket.job for ticket in both.tickets]


def test_only_one_replica_is_kept_for_suspects_and_the_others_go_on() -> None:
    kept, other = Remote("a", E, C), Remote("b", E, C)
    made, suspect = suspect_that_waits(kept, other)
    submit(made, beside=BESIDE)
    kept.answer()
    for _ in range(3):
        submit(made)
        other.answer()
        assert [len(kept.tickets), len(other.tickets)] == [1, 2]
    kept.answer()
    assert [ticket.job for ticket in kept.tickets] == [suspect]


@pytest.mark.parametrize("change", ["lost", "drained"])
def test_a_suspect_waits_for_another_replica_where_the_one_kept_for_it_goes(change: str) -> None:
    kept, other = Remote("a", E, C), Remote("b", E, C)
    made, suspect = suspect_that_waits(kept, other)
    submit(made)
    if change == "lost":
        made.remove(kept, "it died")
    else:
        kept.draining = True
    for _ in range(2):
        other.answer()
    assert [ticket.job for ticket in other.tickets] == [suspect]


def test_a_suspect_that_is_cancelled_keeps_no_replica_from_others() -> None:
    both = Remote("both", E, C)
    made, suspect = suspect_that_waits(both)
    both.answer()
    submit(made)
    assert len(both.tickets) == 1
    suspect.cancel()
    assert len(both.tickets) == 2


def test_a_damaged_hand_over_is_made_again_by_the_role_before() -> None:
    replica = Remote("all")
    made = router(replica)
    job = submit(made)
    replica.answer()
    replica.answer(outcome=WireError("checksum mismatch"))
    assert replica.tickets[0].role is E, "the encoder's hand-over was the damaged one"
    for _ in ROUTE:
        replica.answer()
    assert job.status == "done"


def test_an_error_of_the_request_is_not_tried_again() -> None:
    replica = Remote("all")
    job = submit(router(replica))
    replica.answer(outcome=UsageError("no such thing"))
    with pytest.raises(UsageError, match="no such thing"):
        job.result(0)


def test_a_replica_lost_answer_is_tried_again() -> None:
    replica = Remote("all")
    job = submit(router(replica))
    replica.answer(outcome=ReplicaLost("garbage"))
    for _ in ROUTE:
        replica.answer()
    assert job.status == "done"


def test_a_segment_that_cannot_be_given_leaves_no_slot_taken_and_is_tried_again() -> None:
    class Full(Remote):
        """A replica that for some time can be given nothing."""

        left = 1

        def start(self, ticket: Ticket, payload: Any) -> None:
            if self.left:
                self.left -= 1
                raise OSError("too many open files")

    replica = Full("all")
    made = router(replica)
    job = submit(made)
    assert len(replica.tickets) == 1
    for _ in ROUTE:
        replica.answer()
    assert job.status == "done" and len(job.lost) == 1
    replica.left = 9
    job = submit(made)
    with pytest.raises(RequestLostError, match="too many open files"):
        job.result(0)
    assert replica.tickets == [] and len(made) == 0


def test_a_cancelled_job_leaves_the_queue_or_stops_at_its_replica() -> None:
    replica = Remote("all", slots=1)
    made = router(replica)
    running, waiting = submit(made), submit(made)
    waiting.cancel()
    assert made.waiting(E) == []
    running.cancel()
    assert [ticket.job for ticket in replica.cancelled] == [running]
    for job in (running, waiting):
        with pytest.raises(Cancelled):
            job.result(0)
    replica.answer()
    assert replica.tickets == []
    assert len(made) == 0


def test_a_job_past_its_deadline_ends_wherever_it_is() -> None:
    made = router()
    job = submit(made, deadline=0.0)
    made.check_deadlines()
    with pytest.raises(DeadlineExceeded):
        job.result(0)
    assert len(made) == 0


def test_too_many_jobs_are_turned_away_with_a_time_to_come_back() -> None:
    made = router(max_waiting=2)
    submit(made)
    submit(made)
    with pytest.raises(OverloadedError) as caught:
        submit(made)
    assert caught.value.retry_after >= 1
    assert len(made) == 2


def test_a_router_that_refuses_all_ends_its_jobs_and_takes_none_on() -> None:
    replica = Remote("all")
    made = router(replica)
    running, waiting = submit(made), submit(made)
    made.refuse_all(ReplicaLost("no device is left"))
    for job in (running, waiting):
        with pytest.raises(ReplicaLost, match="no device is left"):
            job.result(0)
    errors = []
    for _ in range(2):
        with pytest.raises(ReplicaLost, match="no device is left") as caught:
            submit(made)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    replica.answer(replica.tickets[0])
    assert len(made) == 0


def test_a_draining_replica_is_given_nothing_more() -> None:
    replica = Remote("all")
    made = router(replica)
    replica.draining = True
    submit(made)
    assert replica.tickets == []


def test_seconds_are_predicted_from_what_was_measured() -> None:
    replica = Remote("all")
    made = router(replica)
    for steps in (10, 20, 30):
        submit(made, steps=steps)
        replica.answer(seconds=0.1)
        replica.answer(seconds=1 + steps * 0.5)
        replica.answer(seconds=0.1)
    submit(made, steps=40)
    replica.answer(seconds=0.1)
    assert replica.tickets[0].predicted == pytest.approx(21, rel=0.01)


class Passing(Remote):
    """A replica that sends what it leaves straight on, as those over Ray do."""

    def __init__(self, name: str, *roles: RoleType) -> None:
        super().__init__(name, *roles)
        self.started: list[tuple[Ticket, Any]] = []

    def start(self, ticket: Ticket, payload: Any) -> None:
        self.started.append((ticket, payload))


def passing() -> tuple[Router, Passing, Passing, Passing]:
    replicas = Passing("encoder", E), Passing("denoiser", D), Passing("decoder", C)
    return (router(*replicas), *replicas)


def hand_over(ticket: Ticket, position: int, *, handed: bool = True) -> None:
    turns = ROUTE[position:]
    outcome = Handover(turns[0] if turns else None, position, 1.0, then=tuple(turns[1:]), handed=handed)
    ticket.done(ticket, outcome)


def submit_ahead(made: Router) -> Job:
    job = Job()
    made.submit(job, Handover(E, 0, then=(D, C)), {"num_inference_steps": 1, "height": 8, "width": 8, "prompt": "fox"})
    return job


def test_idle_replicas_are_given_the_next_segments_before_their_states_are_there() -> None:
    made, encoder, denoiser, decoder = passing()
    job = submit_ahead(made)
    (first,), (second,), (third,) = encoder.tickets, denoiser.tickets, decoder.tickets
    assert encoder.started == [(first, 0)]
    assert denoiser.started == [(second, None)]
    assert decoder.started == [(third, None)]
    assert (first.ahead, second.ahead, second.after, third.after) == (second, third, first, second)
    hand_over(first, 1)
    assert (second.handover.payload, second.after) == (1, None)
    hand_over(second, 2)
    hand_over(third, 3)
    assert job.result(0).seed == 3
    assert kinds(job) == ["queued", "started", "started", "started", "done"]
    assert len(denoiser.started) == len(decoder.started) == 1, "nothing had to be brought to them"
    assert [replica.tickets for replica in (encoder, denoiser, decoder)] == [[], [], []]


def test_a_state_that_could_not_go_straight_is_brought_to_the_replica_that_waits_for_it() -> None:
    made, encoder, denoiser, decoder = passing()
    job = submit_ahead(made)
    hand_over(encoder.tickets[0], 1, handed=False)
    assert [payload for _, payload in denoiser.started] == [None, 1]
    hand_over(denoiser.tickets[0], 2, handed=False)
    assert [payload for _, payload in decoder.started] == [None, 2]
    hand_over(decoder.tickets[0], 3, handed=False)
    assert job.result(0).seed == 3


def test_answers_that_come_before_those_they_waited_for_are_kept_until_then() -> None:
    made, encoder, denoiser, decoder = passing()
    job = submit_ahead(made)
    hand_over(decoder.tickets[0], 3)
    hand_over(denoiser.tickets[0], 2)
    assert job.status == "running"
    hand_over(encoder.tickets[0], 1)
    assert job.result(0).seed == 3
    assert kinds(job) == ["queued", "started", "started", "started", "done"]
    assert [replica.tickets for replica in (encoder, denoiser, decoder)] == [[], [], []]


def test_what_was_given_ahead_is_taken_back_when_the_segment_before_fails() -> None:
    made, encoder, denoiser, decoder = passing()
    job = submit_ahead(made)
    (second,), (third,) = denoiser.tickets, decoder.tickets
    encoder.tickets[0].done(encoder.tickets[0], WireError("a bit flipped"))
    assert (denoiser.cancelled, decoder.cancelled) == ([second], [third])
    assert second not in denoiser.tickets
    assert third not in decoder.tickets
    hand_over(second, 2)  # too late: nobody listens
    assert (job.status, len(job.lost)) == ("running", 1)
    for replica, position in ((encoder, 1), (denoiser, 2)):
        hand_over(replica.tickets[0], position)
    assert job.status == "running"


def test_replicas_that_are_lost_before_their_turn_cost_the_request_nothing() -> None:
    made, encoder, denoiser, decoder = passing()
    job = submit_ahead(made)
    made.remove(denoiser, "killed")
    assert job.lost == []
    assert decoder.tickets == [], "what was to come from it is taken back"
    hand_over(encoder.tickets[0], 1)
    other = Passing("another", D)
    made.add(other)
    assert other.started[0][1] == 1
    assert [ticket.handover.payload for ticket in other.tickets] == [1]


def test_a_replica_lost_after_the_straight_hand_over_costs_one_attempt_from_there() -> None:
    made, encoder, denoiser, _ = passing()
    job = submit_ahead(made)
    hand_over(encoder.tickets[0], 1)
    made.remove(denoiser, "killed")
    assert job.lost == ["denoiser: killed"]
    other = Passing("another", D)
    made.add(other)
    assert [payload for _, payload in other.started] == [1]


def test_a_result_that_is_told_before_the_segment_before_waits_for_that() -> None:
    made, encoder, denoiser, decoder = passing()
    job = submit_ahead(made)
    (last,) = decoder.tickets
    hand_over(encoder.tickets[0], 1)
    assert made.find(last.name) is last
    last.done(last, Handover(None, 3, 5.0))
    assert job.status == "running", "it is not the decoder's turn yet"
    hand_over(denoiser.tickets[0], 2)
    assert job.result(0).seed == 3
    assert decoder.tickets == []
    assert made.find(last.name) is None
    assert made.costs.predict(C, last.work) == pytest.approx(5.0), "its seconds are learned all the same"


def test_a_replica_that_cannot_be_given_what_it_waits_for_costs_one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    made, encoder, denoiser, _ = passing()
    job = submit_ahead(made)

    def fail(ticket: Ticket, payload: Any) -> None:
        monkeypatch.undo()
        raise OSError("the store is full")

    monkeypatch.setattr(denoiser, "start", fail)
    hand_over(encoder.tickets[0], 1, handed=False)
    assert job.lost == ["denoiser: denoiser could not be given it (the store is full)"]
    (again,) = denoiser.tickets
    assert denoiser.started[-1] == (again, 1)


def test_the_one_that_was_given_first_is_blamed_and_not_one_that_had_its_place_ahead() -> None:
    made, encoder, denoiser, decoder = passing()
    ahead = submit_ahead(made)
    late = Job()
    made.submit(late, Handover(C, 2), {"num_inference_steps": 1, "height": 8, "width": 8, "prompt": "fox"})
    hand_over(encoder.tickets[0], 1)
    hand_over(denoiser.tickets[0], 2)
    assert [ticket.job for ticket in decoder.tickets] == [ahead, late]
    made.remove(decoder, "killed")
    assert (ahead.lost, late.lost) == ([], ["decoder: killed"])


def previewed(job: Job) -> list[int]:
    """The steps of the previews that are told of a job, as they come."""
    steps: list[int] = []
    job.listen(lambda event: steps.append(event.details["step"]) if event.kind == "preview" else None)
    return steps


def test_a_retry_shows_no_preview_again() -> None:
    made, encoder, denoiser, _ = passing()
    job = submit_ahead(made)
    shown = previewed(job)
    hand_over(encoder.tickets[0], 1)
    denoiser.tickets[0].show(10, 20, b"png")
    made.remove(denoiser, "killed")
    made.add(Passing("another", D))
    (again,) = made.replicas[-1].tickets
    again.show(10, 20, b"png")
    again.show(20, 20, b"png")
    assert shown == [10, 20]


def test_the_previews_of_a_second_loop_are_shown_from_its_first_on() -> None:
    denoiser = Passing("denoiser", D)
    made, job = router(denoiser), Job()
    shown = previewed(job)
    made.submit(job, Handover(D, 0), {"num_inference_steps": 1, "height": 8, "width": 8, "prompt": "fox"})
    for step, left in ((8, D), (1, None)):
        (ticket,) = denoiser.tickets
        ticket.show(step, 8, b"png")
        if left is not None:
            ticket.done(ticket, Handover(left, 1, 1.0))
    assert shown == [8, 1]


def test_a_replica_with_other_work_is_not_given_segments_ahead() -> None:
    made, encoder, denoiser, decoder = passing()
    submit_ahead(made)
    submit_ahead(made)
    assert [len(replica.tickets) for replica in (encoder, denoiser, decoder)] == [2, 1, 1]


def test_cancelling_takes_back_what_was_given_ahead() -> None:
    made, encoder, denoiser, decoder = passing()
    job = submit_ahead(made)
    (second,), (third,) = denoiser.tickets, decoder.tickets
    job.cancel()
    encoder.tickets[0].done(encoder.tickets[0], Cancelled("the request was cancelled"))
    assert second in denoiser.cancelled
    assert third in decoder.cancelled
    assert (denoiser.tickets, decoder.tickets, encoder.tickets, len(made)) == ([], [], [], 0)


def test_a_damaged_hand_over_shows_no_preview_again() -> None:
    made, encoder, denoiser, decoder = passing()
    job = submit_ahead(made)
    shown = previewed(job)
    hand_over(encoder.tickets[0], 1)
    denoiser.tickets[0].show(10, 20, b"png")
    hand_over(denoiser.tickets[0], 2)
    decoder.answer(outcome=WireError("checksum mismatch"))
    denoiser.tickets[0].show(10, 20, b"png")
    assert shown == [10]


def test_the_previews_of_two_loops_in_one_segment_are_all_shown() -> None:
    denoiser = Passing("denoiser", D)
    made, job = router(denoiser), Job()
    shown: list[tuple[int, int]] = []
    job.listen(
        lambda event: shown.append((event.details["step"], event.details["steps"])) if event.kind == "preview" else None
    )
    made.submit(job, Handover(D, 0), {"num_inference_steps": 1, "height": 8, "width": 8, "prompt": "fox"})
    for step in ((20, 40), (40, 40), (1, 3), (3, 3)):
        denoiser.tickets[0].show(*step, b"png")
    assert shown == [(20, 40), (40, 40), (1, 3), (3, 3)]


def test_a_suspect_does_not_wait_for_what_its_replica_was_given_ahead() -> None:
    encoder, decoder = Passing("encoder", E), Passing("decoder", C)
    denoisers = Passing("a", D), Passing("b", D)
    made = router(encoder, decoder, *denoisers)
    long = submit_ahead(made)
    hand_over(encoder.tickets[0], 1)
    suspect = Job(beside=BESIDE)
    made.submit(suspect, Handover(E, 0), {"num_inference_steps": 1, "height": 8, "width": 8, "prompt": "fox"})
    hand_over(encoder.tickets[0], 1)
    (slow,), (quick,) = (each.tickets for each in sorted(denoisers, key=lambda each: each.tickets[0].job is suspect))
    assert [ticket.job for ticket in decoder.tickets] == [long]
    hand_over(quick, 2)
    assert [ticket.job for ticket in decoder.tickets] == [suspect], "the long one is far from being decoded"
    hand_over(slow, 2, handed=False)
    assert [ticket.job for ticket in decoder.tickets] == [suspect]
    hand_over(decoder.tickets[0], 3)
    hand_over(decoder.tickets[0], 3)
    assert (suspect.status, long.status) == ("done", "done")
    assert (suspect.lost, long.lost) == ([], [])
