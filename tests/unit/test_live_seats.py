"""Slots of the live server follow the chunks that were made last, and never take a seat away. No model."""

import threading
from types import SimpleNamespace

import pytest

from wan_autoregressive.server.limits import QueueFullError
from wan_autoregressive.server.live_session import LiveSession
from wan_autoregressive.server.messages import Start
from wan_autoregressive.server.pace import Pace
from wan_autoregressive.server.seats import Seats


class FakeTimeline:
    branch, chunks = 0, ()

    def branch_path(self):
        return []


def arrive(seats: Seats, name: str) -> LiveSession:
    """A viewer, and what it was told last as `told`."""
    video = SimpleNamespace(timeline=FakeTimeline(), lock=threading.Lock(), seed=0, stop_frame=None)
    session = LiveSession(name, video, 0.1)
    session.told = []
    session.attach(lambda message, body: session.told.append(message), Start(prompt="x"))
    seats.take(session)
    return session


def test_fewer_slots_leave_those_who_watch_where_they_are():
    seats = Seats(slots=3, queue=2)
    watching = [arrive(seats, name) for name in "abc"]
    seats.resize(1)
    waiting = [arrive(seats, name) for name in "de"]
    with pytest.raises(QueueFullError, match="all 1 slots are taken and 2 viewers wait"):
        seats.check_room()
    assert [session.state for session in watching] == ["active"] * 3
    for left in range(2):
        seats.leave(watching[left])
        assert [session.state for session in waiting] == ["waiting"] * 2
    seats.leave(watching[2])
    assert [session.state for session in waiting] == ["active", "waiting"]
    assert [session.told[-1].type for session in waiting] == ["started", "queued"]


def test_more_slots_let_those_who_wait_in_at_once_and_in_order():
    seats = Seats(slots=1, queue=3)
    viewers = [arrive(seats, name) for name in "abcd"]
    seats.resize(3)
    assert [session.state for session in viewers] == ["active", "active", "active", "waiting"]
    assert (viewers[2].told[-1].type, viewers[3].told[-1].position) == ("started", 1)


def test_the_pace_is_that_of_the_last_chunks():
    pace = Pace(step_s=0.2, video_s=0.75)
    assert pace.viewers == 3
    pace.measured(30.0, 0.75)  # somebody else had the machine for a moment
    assert pace.viewers == 3
    for _ in range(20):
        pace.measured(0.5, 0.75)
    assert pace.viewers == 1
    for _ in range(20):
        pace.measured(9.0, 0.75)  # slower than real time: still one
    assert pace.viewers == 1
    for _ in range(20):
        pace.measured(0.1, 1.0)
    assert pace.viewers == 10
