"""`examples/ray_serve_live.py`: a session goes on to the same pixels, whatever becomes of its replica."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ray_cluster import assert_on_the_loopback_alone, import_ray, local_ray

ray = import_ray()
pytestmark = pytest.mark.slow

OPTIONS = {"height": 32, "width": 48, "window_frames": 4, "chunk_frames": 1, "denoising_steps": (1000.0, 500.0)}
PROMPTS = {0: "a red fox", 2: "rain", 6: "snow"}
NUM_CHUNKS, KILL_AFTER = 8, 4


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path, tmp_path_factory) -> Iterator[str]:
    from ray import serve
    from ray_sessions import LoopbackSessions

    from examples.ray_serve_live import live_app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with local_ray(num_cpus=4):
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            states = tmp_path_factory.mktemp("states")
            serve.run(live_app(str(tiny_checkpoint), str(states), OPTIONS, sessions=LoopbackSessions), name="live")
            yield f"http://127.0.0.1:{port}/"
        finally:
            serve.shutdown()


@pytest.fixture(scope="module")
def whole(pipe) -> list[np.ndarray]:
    """The chunks of one rollout that nothing happens to."""
    rollout = pipe.rollout(PROMPTS[0], generator=torch.Generator().manual_seed(5), output_type="uint8", **OPTIONS)
    return [rollout.step(PROMPTS.get(index) if index else None).frames for index in range(NUM_CHUNKS)]


def watch(url: str, session: str, have: int = 0) -> Iterator[tuple[np.ndarray, str]]:
    from examples import ray_serve_live

    return ray_serve_live.watch(url, session, PROMPTS, seed=5, have=have, patience_s=120)


def test_a_replica_is_killed_within_a_session(url: str, whole: list[np.ndarray]) -> None:
    seen, replicas = [], []
    for frames, replica in islice(watch(url, "broken"), NUM_CHUNKS):
        seen.append(frames)
        replicas.append(replica)
        if len(seen) == KILL_AFTER:
            os.kill(int(replica), signal.SIGKILL)
    assert all(np.array_equal(frames, wanted) for frames, wanted in zip(seen, whole, strict=True))
    assert len(set(replicas[:KILL_AFTER])) == 1
    assert replicas[0] not in replicas[KILL_AFTER:]
    assert_on_the_loopback_alone(os.getpid())


def test_an_answer_that_was_lost_is_given_again(url: str, whole: list[np.ndarray]) -> None:
    seen = [frames for frames, _ in islice(watch(url, "lost"), 3)]
    for have in (2, 2, 3, 3):  # the newest chunk, and one more, twice each
        frames, _ = next(watch(url, "lost", have))
        assert np.array_equal(frames, whole[have])
    assert np.array_equal(seen[2], whole[2])
    with pytest.raises(ValueError, match="session 'lost' has 4 chunks by now; have=2 is long past"):
        next(watch(url, "lost", have=2))
    with pytest.raises(ValueError, match="there is no saved state in"):
        next(watch(url, "nobody", have=3))


def test_a_session_that_moves_and_comes_back_has_one_history(url: str, whole: list[np.ndarray]) -> None:
    import io

    import requests
    from ray import serve

    def ask(have: int, routed_as: str) -> tuple[np.ndarray, str]:
        asked = {"session": "moved", "have": have, "seed": 5} | ({"prompt": PROMPTS[have]} if have in PROMPTS else {})
        answer = requests.get(url, params=asked, headers={"x-session-id": routed_as}, timeout=120)
        assert answer.status_code == 200, answer.text
        return np.load(io.BytesIO(answer.content)), answer.headers["x-replica"]

    deadline = time.monotonic() + 120  # one may be on its way back from an earlier test
    while serve.status().applications["live"].deployments["live"].replica_states.get("RUNNING") != 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    replicas = []
    for have in range(NUM_CHUNKS):
        frames, replica = ask(have, routed_as=f"{have % 5}")
        assert np.array_equal(frames, whole[have])
        replicas.append(replica)
    assert len(set(replicas)) == 2
    moves = sum(one != other for one, other in pairwise(replicas))
    assert moves >= 2  # there and back
