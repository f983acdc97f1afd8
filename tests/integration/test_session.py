"""A rollout driven by commands: the chunks of a plain rollout, whoever drives and whenever commands come."""

import threading
import time

import numpy as np
import pytest
from saved_rollouts import assert_same, noise, start

from wan_autoregressive.pipelines.session import RolloutSession, SessionClosedError

OPTIONS = {"num_frames": 61, "window_frames": 6, "sink_frames": 1, "num_inference_steps": 1}  # 6 chunks


def chunks_of(session) -> list:
    return [made.chunk for made in session]


def test_makes_the_chunks_of_a_plain_rollout(pipe):
    with RolloutSession(start(pipe, **OPTIONS)) as session:
        assert_same(chunks_of(session), list(start(pipe, **OPTIONS)))
        assert session.get() is None


def test_a_session_alone_and_sessions_in_turns_on_one_thread_are_the_same(pipe):
    prompts = ["a red circle", "a blue cross", "rain"]
    expected = [list(start(pipe, prompt=prompt, **OPTIONS)) for prompt in prompts]
    sessions = [RolloutSession(start(pipe, prompt=prompt, **OPTIONS), max_ahead=9) for prompt in prompts]
    while any([session.advance() for session in sessions]):
        pass
    for session, chunks in zip(sessions, expected, strict=True):
        assert_same(chunks_of(session), chunks)


def test_is_never_further_ahead_than_it_may(pipe):
    with RolloutSession(start(pipe, **OPTIONS), max_ahead=2) as session:
        for taken in range(1, 7):
            assert session.get(60).chunk.index == taken - 1
            time.sleep(0.2)
            assert session.num_ready <= 2
            assert session.num_chunks <= taken + 2


def test_prompts_and_settings_are_taken_at_chunk_boundaries(pipe):
    new = noise(1, 512, 32)
    plain = start(pipe, **OPTIONS)
    expected = [plain.step(), plain.step(prompt=new)]
    plain.change(num_inference_steps=3, switch_policy="flush")
    expected += [plain.step(prompt="rain"), plain.step()]

    session = RolloutSession(start(pipe, **OPTIONS), max_ahead=9)
    session.advance()
    session.set_prompt(new)
    session.advance()
    session.change(num_inference_steps=3, switch_policy="flush")
    session.set_prompt("rain")
    session.advance()
    session.advance()
    session.close()
    assert_same(chunks_of(session), expected)


def test_a_seek_starts_a_branch_from_the_same_bits(pipe):
    session = RolloutSession(start(pipe, **OPTIONS), max_ahead=9, snapshots=2)
    for _ in range(4):
        session.advance()
    assert session.snapshots == [0, 3, 4]
    branch = session.seek(3)
    session.advance()
    assert branch.result(0) == 1
    assert [(made.chunk.index, made.branch) for made in session._ready] == [(0, 0), (1, 0), (2, 0), (3, 1)]
    while session.advance():
        pass
    assert_same(chunks_of(session), list(start(pipe, **OPTIONS)))
    # From the start too, with another prompt.
    session.seek(0, prompt="a blue cross")
    while session.advance():
        pass
    assert_same(chunks_of(session), list(start(pipe, prompt="a blue cross", **OPTIONS)))
    refused = session.seek(2)
    session.advance()
    with pytest.raises(ValueError, match=r"no snapshot after 2 chunks; there are some after \[0, 5, 6\]"):
        refused.result(0)


def test_forks_go_on_alone(pipe, tmp_path):
    session = RolloutSession(start(pipe, **OPTIONS), max_ahead=9, snapshots=1)
    session.advance()
    twin, saved = session.fork(), session.call(lambda rollout: rollout.save(tmp_path))
    session.advance()
    expected = list(start(pipe, **OPTIONS))
    assert saved.result(0) is None
    assert_same(list(twin.result(0)), expected[1:])
    assert_same(list(pipe.resume(tmp_path)), expected[1:])
    assert_same(list(session.close()), expected[2:])  # the rollout is the caller's again


def test_an_error_comes_after_the_chunks_before_it_and_a_seek_goes_on(pipe, monkeypatch):
    rollout = start(pipe, **OPTIONS)
    step = type(rollout).step

    def failing(self):
        if self.chunks_done == 2 and not mended:
            raise ZeroDivisionError("the card caught fire")
        return step(self)

    mended = []
    monkeypatch.setattr(type(rollout), "step", failing)
    with RolloutSession(rollout, snapshots=1) as session:
        assert [session.get(60).chunk.index for _ in range(2)] == [0, 1]
        with pytest.raises(ZeroDivisionError, match="caught fire"):
            session.get(60)
        mended.append(True)
        session.seek(2).result(60)
        assert session.get(60).chunk.index == 2


def test_a_command_that_fails_leaves_the_video_alone(pipe):
    session = RolloutSession(start(pipe, **OPTIONS), max_ahead=9)
    refused = session.change(window_frames=9)
    bad_prompt = session.set_prompt(noise(1, 512, 7))
    while session.advance():
        pass
    with pytest.raises(ValueError, match="window_frames cannot change while a video is made"):
        refused.result(0)
    with pytest.raises(ValueError, match=r"prompt embeddings are torch\.float32 of shape"):
        bad_prompt.result(0)
    assert_same(chunks_of(session), list(start(pipe, **OPTIONS)))


def test_pause_and_resume(pipe):
    with RolloutSession(start(pipe, **OPTIONS), max_ahead=9) as session:
        session.pause()
        paused_at = session.fork().result(60).chunks_done
        for _ in range(paused_at):
            session.get(0)
        with pytest.raises(TimeoutError, match=r"no chunk within 0\.3 s"):
            session.get(0.3)
        assert session.num_chunks == paused_at
        session.resume()
        assert len(chunks_of(session)) == 6 - paused_at


def test_closes_cleanly_while_nobody_takes_chunks(pipe):
    session = RolloutSession(start(pipe, **OPTIONS), max_ahead=1).start()
    assert session.get(60).chunk.index == 0
    assert session.close().chunks_done >= 1
    with pytest.raises(SessionClosedError):
        session.set_prompt("rain")
    list(session)
    assert session.get() is None
    assert "wan-session" not in {thread.name for thread in threading.enumerate()}
    at_once = RolloutSession(start(pipe, **OPTIONS)).start()
    assert at_once.close(at_once=True).interrupted


def test_no_prompt_that_another_thread_sets_is_lost(pipe):
    """Each is either shown or replaced by a later one, and the last one is always shown."""
    rollout = start(pipe, num_frames=None, window_frames=3, num_inference_steps=1, output_type="latent")
    embeds = rollout.prompt.embeds
    given = [embeds + number for number in range(200)]
    done = threading.Event()

    def set_all():
        for prompt in given:
            rollout.set_prompt(prompt)
        done.set()

    thread = threading.Thread(target=set_all)
    seen = []
    thread.start()
    while not done.is_set():
        rollout.step()
        seen.append(float(rollout.prompt.embeds[0, 0, 0] - embeds[0, 0, 0]))
    thread.join()
    rollout.step()
    assert np.array_equal(rollout.prompt.embeds.numpy(), given[-1].numpy())
    assert seen == sorted(seen)


def test_refuses_what_cannot_work(pipe):
    with pytest.raises(ValueError, match="max_ahead is 0"):
        RolloutSession(start(pipe), max_ahead=0)
    session = RolloutSession(start(pipe)).start()
    with pytest.raises(RuntimeError, match="is or was driven by a thread"):
        session.start()
    session.close()


def test_a_source_video_ends_the_session(pipe):
    clip = np.random.default_rng(0).random((25, 32, 32, 3), np.float32)
    options = {"video": iter(clip), "strength": 0.6, "num_frames": None, "num_inference_steps": 2}
    with RolloutSession(start(pipe, **options)) as session:
        assert len(chunks_of(session)) == 3
        assert session.snapshots == []
