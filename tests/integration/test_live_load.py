"""Many viewers: nothing is lost, nobody is passed, and nothing is left of those who went."""

import asyncio
import gc
import os
import threading

import pytest
from live_viewer import RED, Viewer, new_engine, until
from live_web import running

from benchmarks.live_load import load
from benchmarks.live_process import rss_bytes
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.server.live_session import LiveSession
from wan_autoregressive.server.live_video import LiveVideo

MOST_GROWN = 24 * 2**20
"""Bytes. A session of this model pins about 1 MB; were it kept, 80 of them would be far more."""


def visit(engine, seed: int) -> None:
    viewer = Viewer(engine, prompt=RED, seed=seed, ahead=1)
    viewer.watch(1)
    engine.forget(viewer.session.id)


def num_alive() -> dict[str, int]:
    gc.collect()
    kinds = (WanRollout, LiveSession, LiveVideo)
    held = [type(held) for held in gc.get_objects()]
    alive = {kind.__name__: held.count(kind) for kind in kinds}
    return {**alive, "threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}


def test_nothing_is_left_of_sessions_that_went(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    visit(engine, 0)
    before = None
    for seed in range(1, 5):
        visit(engine, seed)
        until(lambda: engine.figures()["active"] == 0)
        visit(engine, seed)
        before = before or num_alive()
    until(lambda: num_alive() == before, 10)
    assert before["LiveSession"] <= 1  # the one that a thread may still have in its hands
    assert list((tmp_path / "state").iterdir()) in ([tmp_path / "state" / "jobs"], [])
    engine.shutdown()


@pytest.mark.slow
def test_memory_is_flat_after_a_hundred_sessions(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    for seed in range(20):
        visit(engine, seed)
    before = rss_bytes(os.getpid())
    for seed in range(80):
        visit(engine, seed)
    assert rss_bytes(os.getpid()) - before < MOST_GROWN
    engine.shutdown()


@pytest.mark.slow
def test_fourteen_clients_at_three_slots_lose_nothing_and_wait_in_order(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=3, queue=14)
    with running(engine, per_address=0) as port:
        result = asyncio.run(load(f"http://127.0.0.1:{port}", clients=14, seconds=8, watched=3))
    assert result.visits >= 14
    assert (result.gaps, result.unfair, result.refused) == (0, 0, 0)
    assert result.chunks == 3 * result.visits
