"""Many viewers: nothing is lost, nobody is passed, and nothing is left of those who went."""

import asyncio
import gc
import os
import threading
import weakref

import pytest
from live_viewer import RED, Viewer, new_engine, until
from live_web import running

from benchmarks.live_load import load
from wan_autoregressive.resident_memory import resident_bytes

MOST_GROWN = 24 * 2**20
"""Bytes. 80 sessions of this model that are kept are about 100 MB."""


def visit(engine, seed: int) -> tuple[weakref.ref, weakref.ref]:
    """Watch a chunk and go; gives what must not live on."""
    viewer = Viewer(engine, prompt=RED, seed=seed, ahead=1)
    viewer.watch(1)
    engine.forget(viewer.session.id)
    return weakref.ref(viewer.session), weakref.ref(viewer.session.video)


def num_open() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_of_sessions_that_went(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    visit(engine, 0)
    before = num_open()
    held = [reference for seed in range(1, 6) for reference in visit(engine, seed)]
    gc.collect()
    # The last one may still be in the hands of the model's thread and of an encoder.
    assert not any(reference() for reference in held[:-2])
    assert num_open() == before
    until(lambda: not list((tmp_path / "state").iterdir()))
    engine.shutdown()


@pytest.mark.slow
def test_memory_is_flat_after_a_hundred_sessions(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    for seed in range(20):
        visit(engine, seed)
    before = resident_bytes()
    for seed in range(80):
        visit(engine, seed)
    assert resident_bytes() - before < MOST_GROWN
    engine.shutdown()


@pytest.mark.slow
def test_fourteen_clients_at_three_slots_lose_nothing_and_wait_in_order(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=3, queue=14)
    with running(engine, per_address=0) as port:
        result = asyncio.run(load(f"http://127.0.0.1:{port}", clients=14, seconds=8, watched=3))
    assert result.visits >= 14
    assert (result.gaps, result.unfair, result.refused) == (0, 0, 0)
    assert result.chunks == 3 * result.visits
