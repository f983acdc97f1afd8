"""A live video is taken back to places that nothing in memory holds: to the bit, or nearly and it says so."""

import numpy as np
import pytest
import torch
from live_viewer import GREEN, RED, live_model
from PIL import Image
from wan22_folder import make_i2v_folder

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.server.live_video import LiveVideo
from wan_autoregressive.server.schedule import export_schedule
from wan_autoregressive.server.video_plan import VideoPlan


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


@pytest.mark.slow
def test_a_place_long_ago_is_gone_back_to_nearly(pipe, tmp_path):
    """Keys and values from the latents of three chunks: not the bits, but the same video, unlike another seed's."""
    model, plain = live_model(pipe), live_model(pipe).start(RED, 4)
    video = LiveVideo(model, tmp_path / "video", RED, 4, snapshots=1)
    exact = [(video.advance(), plain.step())[1].frames[0] for _ in range(14)]
    video.fork(10)
    assert (video.is_near, video.num_to_repeat) == (True, 3)
    near = [made for _ in range(5) if (made := video.advance())]
    assert [(made.entry.start_frame, made.entry.near) for made in near] == [(129, True), (141, False)]
    other = model.start(RED, 5)
    differing = [other.step().frames[0] for _ in range(13)]
    for made, index in zip(near, (11, 12), strict=True):
        assert 0 < mean_difference(made.frames, exact[index]) < 0.5 * mean_difference(differing[index], exact[index])

    with pytest.raises(ValueError, match=r"the past was made anew at 8\.0625 s"):
        export_schedule(video.describe(), None, model)

    # Behind a near chunk all is exact again: held, made again, or taken up.
    tip = near[-1].entry.id
    video.fork(None)
    video.fork(tip)
    video.save()
    for chunk in video.timeline.chunks:
        video.folder.chunk_path(chunk, "mp4").touch()  # as if it could be shown
    again = LiveVideo.load(model, tmp_path / "video", snapshots=1)
    expected = [video.advance() for _ in range(video.num_to_repeat + 1)][-1]
    found = [again.advance() for _ in range(again.num_to_repeat + 5)]
    assert (next(made for made in found if made).frames == expected.frames).all()


def test_few_chunks_are_made_again_to_the_bit(pipe, tmp_path):
    video = LiveVideo(live_model(pipe), tmp_path / "video", RED, 4, snapshots=1)
    made = [video.advance() for _ in range(8)]
    video.fork(6)
    assert (video.is_near, video.num_to_repeat) == (False, 7)
    again = [video.advance() for _ in range(8)]
    assert again[:-1] == [None] * 7
    assert (again[-1].frames == made[7].frames).all()


def assert_far_is_exact(video: LiveVideo, exact: list[np.ndarray]) -> None:
    """Farther back than is repeated elsewhere, all of it is made again."""
    for _ in range(12):
        video.advance()
    video.fork(10)
    assert (video.is_near, video.num_to_repeat) == (False, 11)
    made = [video.advance() for _ in range(12)]
    assert made[:-1] == [None] * 11
    assert (made[-1].frames == exact[11]).all()


@pytest.mark.slow
def test_a_sampler_that_cannot_begin_behind_latents_is_repeated_to_the_bit(pipe, tmp_path):
    model, settings = live_model(pipe), {"sampler": "rolling", "sink_frames": 0}
    plain = model.start(RED, 4, settings=settings)
    exact = [plain.step().frames[0] for _ in range(12)]
    video = LiveVideo(model, tmp_path / "video", RED, 4, snapshots=1, plan=VideoPlan(settings))
    assert_far_is_exact(video, exact)


@pytest.mark.slow
def test_a_place_long_ago_is_run_up_with_its_own_settings_and_planned_prompts(pipe, tmp_path):
    model = live_model(pipe)
    plan = VideoPlan({"window_frames": 9, "num_inference_steps": 2}, {9: GREEN, 36: "rain"})
    video = LiveVideo(model, tmp_path / "video", RED, 4, snapshots=1, plan=plan)
    made = [video.advance() for _ in range(4)]
    video.change_settings({"num_inference_steps": 3})
    made += [video.advance() for _ in range(8)]
    video.change_settings({"num_inference_steps": 1})
    made += [video.advance() for _ in range(3)]
    video.fork(11)
    assert (video.is_near, video.settings) == (True, {"window_frames": 9, "num_inference_steps": 3})
    near = [chunk for _ in range(5) if (chunk := video.advance())]
    assert [chunk.entry.prompt for chunk in near] == ["rain", "rain"]

    latents = torch.cat([chunk.chunk.latents for chunk in made[8:12]], dim=2)
    frames = model.run_up_frames({})
    noise = video.folder.read_latents([11])[1]
    rollout = model.start_behind(latents[:, :, -frames:], noise, GREEN, video.settings)
    while rollout.frames_done < frames:
        rollout.step()
    expected = rollout.step(prompt="rain").frames[0], rollout.step().frames[0]
    assert all((chunk.frames == other).all() for chunk, other in zip(near, expected, strict=True))


def test_a_model_that_is_told_of_the_first_frame_is_repeated_to_the_bit(tmp_path):
    pipe = WanAutoregressivePipeline.from_pretrained(make_i2v_folder(tmp_path / "model"))
    pipe.set_progress_bar_config(disable=True)
    model, picture = live_model(pipe), Image.new("RGB", (32, 32), "red")
    plain = model.start(RED, 4, picture)
    exact = [plain.step().frames[0] for _ in range(12)]
    video = LiveVideo(model, tmp_path / "video", RED, 4, picture, snapshots=1)
    assert_far_is_exact(video, exact)
