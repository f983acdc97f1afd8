"""A server that is started with other settings on the videos of an earlier one."""

import dataclasses

import pytest
from live_viewer import RED, SETTINGS, Viewer, alone, live_model, new_engine
from starlette.testclient import TestClient

from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.server.app import build_app
from wan_autoregressive.server.chunk_files import encode_mp4
from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.guard import Door
from wan_autoregressive.server.limits import EngineLimits
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.live_video import LiveVideo
from wan_autoregressive.server.messages import Fork

OTHERS = [{"window_frames": 12, "num_inference_steps": 2}, {"chunk_frames": 2, "sampler": "rolling", "sink_frames": 0}]


def model_with(pipe, **settings) -> LiveModel:
    own = live_model(pipe)
    return dataclasses.replace(own, settings={**own.settings, **settings})


def mp4(model: LiveModel, made) -> bytes:
    return encode_mp4(made.frames, model.fps, model.scale)


@pytest.mark.parametrize("other", OTHERS)
def test_an_old_video_goes_on_as_it_was_begun_and_a_new_one_as_the_server_says(pipe, tmp_path, other):
    engine = new_engine(pipe, tmp_path / "state")
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    viewer.watch(2)
    engine.shutdown()
    engine = Engine(model_with(pipe, **other), tmp_path / "state", EngineLimits(snapshots=0, slots=2), cost_s=0.05)
    again = Viewer(engine, resume=viewer.session.id, ahead=1)
    again.wait_for("chunk")
    made, body = again.chunks[max(again.chunks)]
    whole = alone(pipe, RED, 9, made.index + 1)
    assert body == whole[-1]
    for place in (None, 0):  # from the start anew, and one that has to be made again
        engine.command(again.session, Fork(chunk=place))
        again.wait_for("cut")
        again.wait_for("chunk")
        while again.chunks[max(again.chunks)][0].parent != place:
            again.wait_for("chunk")
        made, body = again.chunks[max(again.chunks)]
        assert body == whole[made.index]
        again.play(made.chunk)
    fresh = Viewer(engine, prompt=RED, seed=9, ahead=1)
    assert fresh.watch(1)[0] == mp4(engine.model, LiveVideo(engine.model, tmp_path / "fresh", RED, 9).advance())
    assert fresh.chunks[0][1] != whole[0]
    engine.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
def test_a_place_long_ago_is_run_up_as_it_was_begun(pipe, tmp_path, other):
    model = live_model(pipe)
    video = LiveVideo(model, tmp_path / "video", RED, 4, snapshots=1)
    for _ in range(13):
        video.folder.chunk_path(video.advance().entry.id, "mp4").touch()  # else it would be left out
    video.save()
    parts = []
    for loading in (model, model_with(pipe, **other)):
        again = LiveVideo.load(loading, tmp_path / "video", snapshots=0)
        again.fork(10)
        assert again.is_near
        while (made := again.advance()) is None:
            pass
        parts.append(mp4(model, made))
    assert parts[0] == parts[1]


def test_what_a_video_cannot_bring_along_is_said_in_a_line_and_the_video_can_still_be_watched(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state")
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    viewer.watch(1)
    key = viewer.session.id
    engine.shutdown()
    usual = pipe.scheduler
    for change, told in (
        ({"fps": 8.0}, "made with fps 16.0, and this server has fps 8.0; it can be watched and downloaded"),
        ({"scale": 2}, "made with scale 8, and this server has scale 2"),
        ({"settings": {**SETTINGS, "height": 48}}, "made with height 32, and this server has height 48"),
        ({"shift": 3.0}, "and this server has shift 3.0"),
    ):
        if "shift" in change:
            pipe.scheduler = SelfForcingScheduler.from_config(usual.config, **change)
            change = {}
        engine = Engine(dataclasses.replace(live_model(pipe), **change), tmp_path / "state", EngineLimits())
        with TestClient(build_app(engine, Door()), base_url="http://127.0.0.1:8000") as client:
            with pytest.raises(ValueError, match=told):
                Viewer(engine, resume=key)
            session = f"/v1/sessions/{key}"
            assert client.get(f"{session}/video.mp4").status_code == 200
            assert client.get(session).json()["chunks"][0]["prompt"] == RED
            assert "made_by" not in client.get(session).json()
            assert client.get(f"{session}/video.json").status_code == 200
            assert told.split(";")[0] in client.get(f"{session}/schedule.yaml").json()["error"]["message"]
        pipe.scheduler = usual
