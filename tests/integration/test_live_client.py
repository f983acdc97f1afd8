"""The Python client against a server with real sockets: the video of the same decisions made alone."""

import asyncio
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from live_viewer import GREEN, RED, alone, live_model, new_engine, until
from live_web import running
from PIL import Image
from saved_runs import frames_of

from wan_autoregressive.client import AsyncLiveClient, LiveClient, LiveError
from wan_autoregressive.server.chunk_files import encode_mp4
from wan_autoregressive.server.guard import Door

ROOT = Path(__file__).parents[2]
TOKEN = "a good token"


@pytest.fixture(scope="module")
def engine(pipe, tmp_path_factory):
    return new_engine(pipe, tmp_path_factory.mktemp("client") / "state", slots=2, queue=1)


@pytest.fixture(scope="module")
def link(engine):
    with running(engine, Door(token=TOKEN), idle_s=5) as port:
        yield f"http://127.0.0.1:{port}/?token={TOKEN.replace(' ', '%20')}"


def test_a_video_with_a_change_and_a_fork(link, pipe, tmp_path):
    with LiveClient(link) as live:
        live.start(RED, seed=3, ahead=1)
        chunks = [live.next_chunk()]
        live.set_prompt(GREEN)
        chunks.append(live.next_chunk())
        assert [chunk.mp4 for chunk in chunks] == alone(pipe, RED, 3, 2, {1: GREEN})
        live.pause()
        live.fork(0, prompt="rain")
        live.resume()
        branched = next(chunk for chunk in live if chunk.branch == 1)
        assert branched.mp4 == alone(pipe, RED, 3, 2, {1: "rain"})[1]
        assert (live.video.branch, live.video.seed, live.video.hello["fps"]) == (1, 3, 16.0)
        live.download(tmp_path / "video.mp4", branch=0)
        assert len(frames_of(tmp_path / "video.mp4")) >= 21
        assert {0, 1} <= {branch["branch"] for branch in live.describe()["branches"]}
        session = live.video.session
    with LiveClient(link) as live:
        live.start(resume=session)
        assert live.next_chunk().parent == branched.chunk
        live.forget()
        with pytest.raises(LiveError, match="ended the connection"):
            list(live)


def test_settings_and_planned_prompts(link, pipe):
    settings = {"num_inference_steps": 2, "window_frames": 9}
    with LiveClient(link) as live:
        live.start(RED, seed=3, ahead=1, settings=settings, prompt_changes={"3": GREEN})
        chunks = [live.next_chunk(), live.next_chunk()]
        live.change(num_inference_steps=1)
        chunks += [live.next_chunk(), live.next_chunk()]
        made = live.describe()["chunks"]
        with pytest.raises(ValueError, match="Extra inputs"):
            live.change(frames=3)
        live.forget()
    rollout, expected = live_model(pipe).start(RED, 3, settings=settings), []
    for chunk in made[:4]:
        rollout.change(**(chunk["new_settings"] or {}))
        expected.append(encode_mp4(rollout.step(prompt=chunk["new_prompt"]).frames[0], 16.0, 8))
    assert [chunk.mp4 for chunk in chunks] == expected
    assert made[1]["prompt"] == GREEN
    assert {"num_inference_steps": 1} in [chunk["new_settings"] for chunk in made]


def test_a_fork_with_other_settings(link, pipe):
    with LiveClient(link) as live:
        live.start(RED, seed=3, ahead=1)
        live.next_chunk(), live.next_chunk()
        live.fork(0, settings={"num_inference_steps": 2})
        branched = next(chunk for chunk in live if chunk.branch == 1)
        with pytest.raises(ValueError, match="Extra inputs"):
            live.fork(0, settings={"frames": 3})
        live.forget()
    rollout = live_model(pipe).start(RED, 3)
    rollout.step()
    rollout.change(num_inference_steps=2)
    assert branched.mp4 == encode_mp4(rollout.step().frames[0], 16.0, 8)


def test_a_video_from_a_camera(link, pipe):
    frames = [np.full((32, 32, 3), 10 * number, np.uint8) for number in range(12)]
    with LiveClient(link) as live:
        live.start(RED, seed=3, ahead=1, camera=True, settings={"strength": 0.5})
        for frame in frames:  # as many as the largest chunk takes; the first one needs 9
            live.camera_frame(as_png(Image.fromarray(frame)))
        made = live.next_chunk()
        with pytest.raises(ValueError, match="may have 65536 bytes, this one has 65537"):
            live.camera_frame(bytes(65537))
        live.forget()
    rollout = live_model(pipe).start(RED, 3, settings={"strength": 0.5}, source=iter(frames))
    assert made.mp4 == encode_mp4(rollout.step().frames[0], 16.0, 8)


@pytest.mark.slow
def test_many_at_once_with_asyncio(link, pipe, engine):
    async def watch(seed: int, count: int) -> list[bytes]:
        async with AsyncLiveClient(link) as live:
            await live.start(RED, seed=seed)
            watched = []
            async for chunk in live:
                watched.append(chunk.mp4)
                if len(watched) == count:
                    return watched

    async def both():
        return await asyncio.gather(watch(1, 3), watch(2, 3))

    assert asyncio.run(both()) == [alone(pipe, RED, seed, 3) for seed in (1, 2)]
    until(lambda: engine.figures()["active"] == 0)


def test_says_what_does_not_work(link):
    with pytest.raises(ValueError, match="looks like http"), LiveClient("127.0.0.1:8000"):
        pass
    with pytest.raises(LiveError, match="is the token the one"), LiveClient(link, token="a bad one"):
        pass
    with LiveClient(link) as live:
        live.start(RED, image=as_png(Image.new("RGB", (64, 64), "red")))
        assert live.next_chunk().frames == 1
        live.fork(99)
        with pytest.raises(LiveError, match="there is no chunk 99") as error:
            list(live)
        assert error.value.code == "no_such_chunk"
        live.next_chunk()  # the video goes on
    with LiveClient(link) as live:
        live.start(resume="A" * 22)
        with pytest.raises(LiveError, match="there is no session"):
            list(live)
    with pytest.raises(RuntimeError, match="in an `async with` block"):
        asyncio.run(AsyncLiveClient(link).start(RED))


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_the_example_runs_and_stands_in_the_docs(tmp_path, engine, link):
    source = ROOT / "examples" / "live_client.py"
    done = subprocess.run([sys.executable, source, link, tmp_path / "video.mp4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prompts = [line.rsplit(", ", 1)[1] for line in done.stdout.splitlines()]
    assert len(prompts) == 7
    assert ("red" in prompts[0], "green" in prompts[-1]) == (True, True)
    assert len(frames_of(tmp_path / "video.mp4")) >= 81
    code = source.read_text().split('"""\n\n', 1)[1]
    assert code.strip() in re.sub(r"```\w*\n", "", (ROOT / "docs" / "API_LIVE.md").read_text())
