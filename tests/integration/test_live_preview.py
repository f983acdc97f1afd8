"""A preview VAE in the live server: its frames are shown at once, those of the full VAE are what is kept."""

import pytest
import torch
from live_viewer import GREEN, RED, Viewer, alone, live_model, until
from test_tiny_codec import small_vae

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.server.chunk_files import encode_images, encode_mp4
from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.limits import EngineLimits
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.live_video import LiveVideo
from wan_autoregressive.server.messages import ChangePrompt, Fork


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return small_vae()


@pytest.fixture(scope="module")
def previewed_alone(pipe, tiny):
    """What the tiny VAE makes in place of the full one."""
    other = WanAutoregressivePipeline(pipe.tokenizer, pipe.text_encoder, pipe.transformer, tiny, pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    return other


def engine_with_preview(pipe, tiny, folder) -> Engine:
    plain = live_model(pipe)
    model = LiveModel(pipe, plain.settings, plain.fps, plain.scale, plain.name, preview_vae=tiny)
    return Engine(model, folder, EngineLimits(), cost_s=0.05)


def kept(engine: Engine, viewer: Viewer, count: int) -> list[bytes]:
    """The files of the first chunks of the present branch."""
    path = viewer.session.video.timeline.branch_path()[:count]
    files = [engine.chunk_path(viewer.session.id, chunk.id, "mp4") for chunk in path]
    until(lambda: all(file.is_file() for file in files) and not viewer.session.encoding)
    return [file.read_bytes() for file in files]


def test_the_preview_is_shown_and_the_full_frames_are_kept(pipe, tiny, previewed_alone, tmp_path):
    engine = engine_with_preview(pipe, tiny, tmp_path / "state")
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    assert viewer.watch(2) == alone(previewed_alone, RED, 9, 2)
    assert kept(engine, viewer, 2) == alone(pipe, RED, 9, 2)
    assert all(message.preview and message.timings["preview_s"] > 0 for message, _ in viewer.chunks.values())
    assert all(message.timings["decode_s"] == 0 for message, _ in viewer.chunks.values())
    engine.shutdown()


@pytest.mark.slow
def test_with_another_prompt_and_from_an_earlier_place_both_stay_two_views_of_one_video(
    pipe, tiny, previewed_alone, tmp_path
):
    engine = engine_with_preview(pipe, tiny, tmp_path / "state")
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    viewer.watch(2)
    engine.command(viewer.session, ChangePrompt(prompt=GREEN))
    while viewer.chunks[max(viewer.chunks)][0].prompt == RED:
        viewer.watch(1)
    change = viewer.chunks[max(viewer.chunks)][0].index
    assert kept(engine, viewer, change + 1) == alone(pipe, RED, 9, change + 1, {change: GREEN})
    engine.command(viewer.session, Fork(chunk=0, prompt=GREEN))
    until(lambda: viewer.wait_for("chunk").parent == 0)
    assert viewer.chunks[max(viewer.chunks)][1] == alone(previewed_alone, RED, 9, 2, {1: GREEN})[1]
    assert kept(engine, viewer, 2) == alone(pipe, RED, 9, 2, {1: GREEN})
    engine.shutdown()


def test_the_preview_does_not_wait_for_the_full_frames(pipe, tiny, tmp_path, monkeypatch):
    engine = engine_with_preview(pipe, tiny, tmp_path / "state")
    shown = []
    step = LiveVideo.advance

    def advance(video, on_preview):
        made = step(video, on_preview)
        until(lambda: shown)  # the viewer has it while the step is still under way
        return made

    monkeypatch.setattr(LiveVideo, "advance", advance)
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    shown.append(viewer.wait_for("chunk"))
    key = viewer.session.id
    assert len(engine.describe(key)["chunks"]) == 1
    engine.shutdown()


def test_images_for_browsers_without_h264(pipe, tiny, previewed_alone, tmp_path):
    engine = engine_with_preview(pipe, tiny, tmp_path / "state")
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1, transport="images")
    viewer.wait_for("chunk")
    assert kept(engine, viewer, 1) == alone(pipe, RED, 9, 1)
    for by, images in (
        (previewed_alone, viewer.chunks[0][1]),
        (pipe, engine.chunk_path(viewer.session.id, 0, "images").read_bytes()),
    ):
        assert images == encode_images(live_model(by).start(RED, 9).step().frames[0])
    engine.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("had_preview", [False, True])
def test_a_video_goes_on_with_a_preview_if_it_had_one(pipe, tiny, previewed_alone, tmp_path, had_preview):
    """As after a restart with the flag."""
    folder = tmp_path / "state"
    if had_preview:
        engine = engine_with_preview(pipe, tiny, folder)
    else:
        engine = Engine(live_model(pipe), folder, EngineLimits(), cost_s=0.05)
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    viewer.watch(1)
    engine.shutdown()
    engine = engine_with_preview(pipe, tiny, folder)
    viewer = Viewer(engine, resume=viewer.session.id, ahead=1)
    viewer.wait_for("chunk")
    made, body = viewer.chunks[max(viewer.chunks)]
    shown = alone(previewed_alone if had_preview else pipe, RED, 9, made.index + 1)
    assert (made.preview, body) == (had_preview, shown[-1])
    engine.shutdown()


def test_a_chunk_of_which_only_the_preview_was_shown_leaves_no_number_behind(pipe, tiny, tmp_path):
    """As where a server is killed while the full VAE works."""
    engine = engine_with_preview(pipe, tiny, tmp_path / "state")
    viewer = Viewer(engine, prompt=RED, seed=9, ahead=1)
    viewer.watch(2)
    engine.shutdown()
    video = LiveVideo.load(engine.model, viewer.session.video.folder.path)
    shown = []

    def die(preview):
        shown.append(preview.entry.id)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.advance(die)
    again = LiveVideo.load(engine.model, viewer.session.video.folder.path)
    assert shown[0] not in again.timeline.chunks
    assert again.timeline.next_id > shown[0]
    made = again.advance()
    assert encode_mp4(made.frames, 16.0, 8) == alone(pipe, RED, 9, made.entry.index + 1)[-1]
