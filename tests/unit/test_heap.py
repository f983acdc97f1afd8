"""When the process gives free memory back."""

import platform

import pytest

from wan_autoregressive.pipelines.heap import HEAP, HeapWatch
from wan_autoregressive.resident_memory import resident_bytes


def test_memory_is_given_back_where_the_process_has_grown_and_only_then():
    resident, given_back = [1000], []

    def give_back():
        given_back.append(resident[0])
        resident[0] = 600

    watch = HeapWatch(lambda: resident[0], give_back)
    for grown in (1000, 1100, 1250):
        resident[0] = grown
        watch.look()
    assert given_back == []
    resident[0] = 1251
    watch.look()
    assert given_back == [1251]
    resident[0] = 900  # what the next step took again
    watch.look()
    for grown in (1000, 1125):
        resident[0] = grown
        watch.look()
    assert given_back == [1251]
    resident[0] = 1126
    watch.look()
    assert given_back == [1251, 1126]


def test_a_smaller_process_is_the_new_measure():
    resident, given_back = [1000], []
    watch = HeapWatch(lambda: resident[0], lambda: given_back.append(resident[0]))
    for now in (1000, 500, 650):  # sessions ended: 650 is much again
        resident[0] = now
        watch.look()
    assert given_back == [650]


def test_what_a_video_leaves_is_given_back_at_the_next_look():
    resident, given_back = [1000], []
    watch = HeapWatch(lambda: resident[0], lambda: given_back.append(resident[0]))
    watch.look()
    watch.expect_less()
    watch.look()
    assert given_back == [1000]
    watch.look()
    watch.look()
    assert given_back == [1000]


def test_where_nothing_is_held_back_nothing_is_done():
    given_back = []
    watch = HeapWatch(lambda: 0, lambda: given_back.append(0))
    for _ in range(3):
        watch.look()
    watch.expect_less()
    watch.look()
    assert given_back == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries hold nothing back")
def test_this_process_gives_back():
    held = [bytes(1000) + bytes([number % 256]) for number in range(300_000)]
    before, kept = resident_bytes(), held[::1000]
    del held
    HEAP.expect_less()
    HEAP.look()
    assert len(kept) == 300
    assert resident_bytes() < before - 100 * 2**20
