"""The engine of the live server: every viewer gets the video that the same decisions give alone, to the bit."""

import json
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from live_viewer import GREEN, RED, Viewer, alone, live_model, new_engine, until

from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.limits import EngineLimits, QueueFullError, UnknownSessionError
from wan_autoregressive.server.messages import ChangePrompt, Fork, Pause, Resume


@pytest.fixture
def engine(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=8)
    yield engine
    engine.shutdown()


@pytest.mark.slow
def test_eight_sessions_in_turns_are_each_as_alone(engine, pipe):
    starts = [(f"{RED} {number}", number) for number in range(8)]
    expected = [alone(pipe, prompt, seed, 5) for prompt, seed in starts]
    viewers = [Viewer(engine, prompt=prompt, seed=seed) for prompt, seed in starts]
    with ThreadPoolExecutor(8) as threads:
        watched = list(threads.map(lambda viewer: viewer.watch(5), viewers))
    assert watched == expected
    assert len({part for parts in watched for part in parts}) == 40
    for viewer in viewers:
        assert {message.session for message, _ in viewer.chunks.values()} == {viewer.session.id}


def test_a_viewer_who_does_not_play_is_not_generated_for(engine):
    viewer = Viewer(engine, prompt=RED, ahead=2)
    for expected in (2, 3, 4):
        while len(viewer.chunks) < expected:
            viewer.wait_for("chunk")
        with pytest.raises(queue.Empty):
            viewer.wait_for("chunk", 0.3)
        assert engine.figures()["steps"] == expected
        viewer.play(expected - 2)
    viewer.wait_for("chunk")
    viewer.play(10**6)  # a chunk that there is not counts for nothing
    with pytest.raises(queue.Empty):
        viewer.wait_for("chunk", 0.3)


def test_nor_is_one_whose_socket_takes_nothing(engine):
    viewer = Viewer(engine, prompt=RED, ahead=2)
    for chunk in range(5):
        until(lambda chunk=chunk: viewer.messages.qsize() > chunk or engine.figures()["steps"] == 2)
        viewer.play(chunk)
    assert engine.figures()["steps"] == 2


def test_a_new_prompt_drops_what_was_made_ahead_and_not_what_is_on_screen(engine, pipe):
    viewer = Viewer(engine, prompt=RED, seed=3, ahead=6)
    for _ in range(6):
        viewer.wait_for("chunk")
    engine.command(viewer.session, Pause())  # what is played makes room for no seventh
    viewer.play(1)
    viewer.session.cost_s = 0.1  # whatever this machine takes: the boundary after the chunk on screen can be reached
    playhead = (viewer.chunks[1][0].start_frame + 1) / 16
    engine.command(viewer.session, ChangePrompt(prompt=GREEN, playhead=playhead))
    cut = viewer.wait_for("cut")
    assert (cut.after, cut.dropped) == (1, [2, 3, 4, 5])
    engine.command(viewer.session, Resume())
    assert not any(engine.chunk_path(viewer.session.id, chunk, "mp4").exists() for chunk in cut.dropped)
    made = viewer.wait_for("chunk")
    assert (made.parent, made.index, made.prompt) == (cut.after, cut.after + 1, GREEN)
    expected = alone(pipe, RED, 3, made.index + 1, {made.index: GREEN})
    assert [viewer.chunks[part][1] for part in (*range(cut.after + 1), made.chunk)] == expected


@pytest.mark.parametrize("snapshots", [1, 8])
def test_any_chunk_can_be_gone_back_to_to_the_bit(pipe, tmp_path, snapshots):
    """Whether a snapshot holds it, or the way to it has to be made again."""
    engine = new_engine(pipe, tmp_path / "state", slots=2, snapshots=snapshots)
    viewer = Viewer(engine, prompt=RED, seed=5, ahead=1)
    viewer.watch(2)
    engine.command(viewer.session, ChangePrompt(prompt=GREEN))
    until(lambda: viewer.wait_for("cut"))
    first = viewer.watch(4)
    assert len(viewer.chunks) >= 5
    tip = max(viewer.chunks)

    engine.command(viewer.session, Pause())
    engine.command(viewer.session, Fork(chunk=1, prompt="rain"))
    cut = viewer.wait_for("cut")
    assert (cut.after, cut.dropped, cut.branch) == (1, [], 1)
    assert (cut.repeating > 0) == (snapshots == 1)
    engine.command(viewer.session, Resume())
    made = viewer.wait_for("chunk")
    assert (made.parent, made.branch, made.prompt) == (1, 1, "rain")
    assert viewer.chunks[made.chunk][1] == alone(pipe, RED, 5, 3, {2: "rain"})[2]

    # The branch that was left goes on where it ended.
    engine.command(viewer.session, Fork(chunk=tip))
    while (cut := viewer.wait_for("cut")).branch != 0:
        pass
    until(lambda: viewer.wait_for("chunk").parent == tip)
    switched = next(message.index for message, _ in viewer.chunks.values() if message.prompt == GREEN)
    count = viewer.chunks[max(viewer.chunks)][0].index + 1
    path = {message.index: body for message, body in viewer.chunks.values() if message.branch == 0}
    assert [path[index] for index in range(count)] == alone(pipe, RED, 5, count, {switched: GREEN})
    assert len(first) == 4

    # And the start, with another seed, is another video.
    engine.command(viewer.session, Fork(chunk=None, seed=6))
    until(lambda: viewer.wait_for("chunk").parent is None)
    assert viewer.chunks[max(viewer.chunks)][1] == alone(pipe, RED, 6, 1)[0]
    engine.command(viewer.session, Fork(chunk=999))
    assert viewer.wait_for("error").code == "no_such_chunk"
    engine.shutdown()


def test_waiting_viewers_are_told_their_place(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=1, queue=2)
    first = Viewer(engine, prompt=RED)
    first.wait_for("started")
    second, third = Viewer(engine, prompt=GREEN), Viewer(engine, prompt="rain")
    assert (second.wait_for("queued").position, third.wait_for("queued").position) == (1, 2)
    with pytest.raises(QueueFullError, match="all 1 slots are taken and 2 viewers wait"):
        Viewer(engine, prompt="snow")
    first.leave()
    second.wait_for("started")
    assert third.wait_for("queued").position == 1
    assert second.wait_for("chunk").prompt == GREEN
    second.leave()
    third.wait_for("chunk")
    engine.shutdown()


@pytest.mark.slow
def test_slots_follow_the_time_that_chunks_take_now(pipe, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, step=0.2, monotonic=time.monotonic)

    def perf_counter() -> float:
        clock.now += clock.step
        return clock.now

    clock.perf_counter = perf_counter
    monkeypatch.setattr("wan_autoregressive.server.model_thread.time", clock)
    engine = Engine(live_model(pipe), tmp_path / "state", EngineLimits(slots=None), cost_s=0.2, chunk_s=0.75)
    watching = [Viewer(engine, prompt=RED, ahead=1) for _ in range(3)]
    clock.step = 9.0
    while engine.figures()["slots"] > 1:
        watching[0].watch(1)
    late = Viewer(engine, prompt=GREEN, ahead=1)
    assert late.wait_for("queued").position == 1
    for viewer in watching:  # nobody is sent away
        assert len(viewer.watch(2)) == 2
    assert engine.figures()["active"] == 3
    clock.step = 0.1
    while engine.figures()["slots"] < 4:
        watching[1].watch(1)
    late.wait_for("started")
    engine.shutdown()


def test_a_viewer_who_comes_back_goes_on_to_the_bit(engine, pipe):
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    watched = viewer.watch(2)
    viewer.leave()
    until(lambda: engine.figures()["parked"] == 1)
    again = Viewer(engine, resume=viewer.session.id, ahead=1)
    assert again.wait_for("started").num_chunks in (2, 3)
    missed = [
        engine.chunk_path(viewer.session.id, chunk, "mp4").read_bytes() for chunk in range(2, again.session.made + 1)
    ]
    rest = again.watch(2)
    assert [*watched, *missed, *rest] == alone(pipe, RED, 9, 4 + len(missed))


def test_after_a_restart_all_goes_on_to_the_bit(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    viewer.watch(3)
    assert engine.shutdown() == 1
    (tmp_path / "state" / "not-a-session").mkdir()
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    assert engine.figures()["parked"] == 1
    again = Viewer(engine, resume=viewer.session.id)
    again.wait_for("chunk")
    made, body = again.chunks[max(again.chunks)]
    assert body == alone(pipe, RED, 9, made.index + 1)[-1]
    # What was before the restart can be gone back to as well, by making it again.
    engine.command(again.session, Fork(chunk=0, prompt=GREEN))
    until(lambda: again.wait_for("chunk").prompt == GREEN)
    assert again.chunks[max(again.chunks)][1] == alone(pipe, RED, 9, 2, {1: GREEN})[1]
    engine.shutdown()


def test_a_session_that_fails_says_so_and_the_others_go_on(engine, pipe, monkeypatch):
    step = type(live_model(pipe).start(RED, 0)).step

    def failing(self, prompt=None):
        if prompt == "fire":
            raise ZeroDivisionError("the card caught fire")
        return step(self, prompt)

    monkeypatch.setattr("wan_autoregressive.pipelines.rollout.WanRollout.step", failing)
    bad, good = Viewer(engine, prompt=RED, seed=1), Viewer(engine, prompt=GREEN, seed=2)
    bad.watch(1)
    engine.command(bad.session, ChangePrompt(prompt="fire"))
    error = bad.wait_for("error")
    assert error.code == "failed"
    assert "the card caught fire" in error.message
    assert good.watch(3) == alone(pipe, GREEN, 2, 3)
    until(lambda: engine.figures()["active"] == 1)


def test_a_session_has_an_end(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", max_seconds=1.0)  # 9 + 12 frames are more
    viewer = Viewer(engine, prompt=RED, ahead=4)
    assert viewer.wait_for("error").code == "limit"
    assert engine.figures()["steps"] == 2
    engine.shutdown()


def test_what_is_forgotten_leaves_no_file(engine, tmp_path):
    viewer = Viewer(engine, prompt=RED)
    viewer.watch(1)
    assert (tmp_path / "state" / viewer.session.id).stat().st_mode & 0o777 == 0o700
    engine.forget(viewer.session.id)
    until(lambda: not (tmp_path / "state" / viewer.session.id).exists())
    with pytest.raises(UnknownSessionError):
        engine.describe(viewer.session.id)
    with pytest.raises(UnknownSessionError):
        Viewer(engine, resume=viewer.session.id)


def test_a_flood_of_prompts_ends_with_the_last(engine):
    viewer = Viewer(engine, prompt=RED, ahead=1)
    for number in range(500):
        engine.command(viewer.session, ChangePrompt(prompt=f"{GREEN} {number}"))
    assert len(viewer.session.commands) <= 1
    until(lambda: viewer.wait_for("cut").prompt.endswith(" 499"))


def test_only_so_many_videos_without_viewer_are_kept(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=3, parked=1)
    viewers = [Viewer(engine, prompt=RED, seed=seed) for seed in range(3)]
    for viewer in viewers:
        viewer.watch(1)
        viewer.leave()
        until(lambda: engine.figures()["leaving"] == 0)
    assert engine.figures()["parked"] == 1
    newest = viewers[-1].session.id
    until(lambda: [path.name for path in (tmp_path / "state").iterdir()] == [newest])
    assert json.loads((tmp_path / "state" / newest / "session.json").read_text())["seed"] == 2
    engine.shutdown()


def test_ends_its_threads(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state")
    Viewer(engine, prompt=RED).watch(1)
    engine.shutdown()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("wan-")]
