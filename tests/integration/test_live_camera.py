"""A video that is made from the frames of a viewer's camera: the newest count, and nothing waits for them."""

import io

import numpy as np
import pytest
from live_viewer import RED, Viewer, live_model, new_engine, until
from PIL import Image

from wan_autoregressive.server.live_source import LiveSource
from wan_autoregressive.server.live_video import LiveVideo
from wan_autoregressive.server.messages import ChangePrompt, Fork
from wan_autoregressive.server.video_plan import VideoPlan


def picture(level: int, size: int = 32, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (level, level, level)).save(file, kind)
    return file.getvalue()


def level(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def test_the_newest_frames_win_and_the_last_one_stays():
    source = LiveSource(32, 32, chunk_frames=3)
    with pytest.raises(ValueError, match="no frame of the camera"):
        next(source)
    for number in range(100):
        assert source.ready == (number >= 12)
        source.put(picture(number))
    assert [level(next(source)) for _ in range(14)] == [*range(88, 100), 99, 99]
    assert not source.ready


@pytest.mark.parametrize("data", [b"", b"GIF89a", picture(1)[:40], picture(1, 1100)])
def test_what_is_no_small_picture_is_refused(data):
    source = LiveSource(32, 32, 3)
    source.put(data)
    with pytest.raises(ValueError, match="not a picture that can be used"):
        next(source)


def test_the_same_frames_give_the_video_that_they_give_as_a_clip(pipe, tmp_path):
    model = live_model(pipe)
    clip = [picture(10 * number) for number in range(21)]
    source = LiveSource(32, 32, 3)
    video = LiveVideo(model, tmp_path / "state", RED, 3, plan=VideoPlan({"strength": 0.5}, source=source))
    for image in clip[:9]:
        source.put(image)
    parts = [video.advance().frames]
    for image in clip[9:]:
        source.put(image)
    parts.append(video.advance().frames)
    frames = [np.asarray(Image.open(io.BytesIO(image))) for image in clip]
    rollout = model.start(RED, 3, settings={"strength": 0.5}, source=iter(frames))
    expected = [rollout.step().frames[0] for _ in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(expected))


def test_no_frames_no_chunks_and_nobody_else_waits(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    camera = Viewer(engine, prompt=RED, camera=True)
    other = Viewer(engine, prompt=RED)
    assert len(other.watch(3)) == 3
    assert camera.messages.qsize() == 1  # started
    for number in range(30):
        engine.camera_frame(camera.session, picture(number))
    camera.play(camera.wait_for("chunk").chunk)
    assert len(camera.chunks) == 1
    with pytest.raises(ValueError, match="camera: true"):
        engine.camera_frame(other.session, picture(0))

    # Prompts change where the frames are; there is no way back, since they are gone.
    engine.command(camera.session, ChangePrompt(prompt="rain", playhead=0.0))
    assert camera.wait_for("cut").dropped == []
    for number in range(30):
        engine.camera_frame(camera.session, picture(number))
    camera.wait_for("chunk")
    assert [message.prompt for message, _ in camera.chunks.values()] == [RED, "rain"]
    engine.command(camera.session, Fork(chunk=0))
    assert camera.wait_for("error").code == "camera"
    key = camera.session.id
    camera.leave()
    until(lambda: engine.figures()["parked"] == 1)
    assert not list((tmp_path / "state" / key).rglob("*.latents"))  # nothing would read them
    assert engine.describe(key)["from_camera"]
    with pytest.raises(ValueError, match="it can be watched, and not go on"):
        Viewer(engine, resume=key)
    engine.shutdown()


def test_a_frame_that_is_none_ends_its_own_video_alone(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=2)
    camera, other = Viewer(engine, prompt=RED, camera=True), Viewer(engine, prompt=RED)
    for _ in range(12):
        engine.camera_frame(camera.session, b"no picture")
    assert "not a picture" in camera.wait_for("error").message
    assert len(other.watch(3)) == 3
    engine.shutdown()
