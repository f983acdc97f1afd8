"""A live video leaves as a settings file that the command renders to the same frames, and comes back as one."""

import numpy as np
import pytest
import yaml
from live_viewer import live_model
from PIL import Image

from wan_autoregressive.configs import load_preset, resolve_config
from wan_autoregressive.scripts import cli, render_job
from wan_autoregressive.scripts.load_pipeline import load_pipeline, model_folder
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.live_settings import check_settings
from wan_autoregressive.server.live_video import LiveVideo
from wan_autoregressive.server.messages import Start
from wan_autoregressive.server.schedule import export_schedule, import_schedule
from wan_autoregressive.server.video_plan import VideoPlan

RED, GREEN = "a red circle moving right on a navy background", "a green cross moving left on a navy background"


@pytest.fixture(scope="module")
def demo() -> LiveModel:
    config = resolve_config(load_preset("demo"))
    settings = config.rollout_settings()
    return LiveModel(load_pipeline(config), settings, config.fps, config.scale, model_folder(config).name)


@pytest.fixture
def rendered(monkeypatch, tmp_path):
    """Runs `wan-ar generate --config` on a text and gives the frames that it hands to the encoder."""
    monkeypatch.chdir(tmp_path)

    def render(text: str) -> np.ndarray:
        frames = []

        class Recorder(render_job.VideoWriter):
            def write(self, part):
                frames.extend(np.array(part))
                super().write(part)

        monkeypatch.setattr(render_job, "VideoWriter", Recorder)
        (tmp_path / "live.yaml").write_text(text)
        assert cli.main(["generate", "--config", "live.yaml", "--output", "live.mp4"]) == 0
        return np.stack(frames)

    return render


def watch(video: LiveVideo, count: int) -> list[np.ndarray]:
    """The frames of the next new chunks; some may have to be made again on the way."""
    made: list[np.ndarray] = []
    while len(made) < count:
        if (chunk := video.advance()) is not None:
            made.append(chunk.frames)
    return made


def from_schedule(model: LiveModel, folder, text: str, image=None) -> LiveVideo:
    """As an import of the page starts it."""
    plan = import_schedule(text, model)
    named = plan.pop("image")
    assert (named is None) == (image is None)
    start = Start.model_validate({name: value for name, value in plan.items() if value is not None})
    return LiveVideo(model, folder, start.prompt, start.seed, image, plan=VideoPlan.from_start(model, start))


@pytest.mark.slow
def test_the_command_renders_the_frames_that_were_watched(demo, rendered, tmp_path):
    settings = {"window_frames": 9, "num_inference_steps": 3, "switch_policy": "cross_attention"}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    video = LiveVideo(demo, tmp_path / "state", RED, 5, picture, plan=VideoPlan(settings))
    parts = watch(video, 2)
    video.change_prompt(GREEN, after=video.timeline.tip)
    parts += watch(video, 2)
    text = export_schedule(video.describe(), None, demo)
    assert list(yaml.safe_load(text)["prompt_changes"].values()) == [GREEN]
    picture.save(tmp_path / "image.png")
    watched = np.concatenate(parts)
    np.testing.assert_array_equal(rendered(text), watched)

    again = from_schedule(demo, tmp_path / "again", text, picture)
    np.testing.assert_array_equal(np.concatenate(watch(again, 4)), watched)
    assert export_schedule(again.describe(), None, demo) == text


def test_a_branch_leaves_with_its_own_past(pipe, tmp_path):
    model = live_model(pipe)
    video = LiveVideo(model, tmp_path / "state", RED, 5)
    first = watch(video, 2)
    video.change_prompt(GREEN, after=1)
    watch(video, 1)
    video.fork(0, GREEN)
    other = watch(video, 2)
    text = export_schedule(video.describe(), 1, model)
    again = from_schedule(model, tmp_path / "again", text)
    np.testing.assert_array_equal(np.concatenate(watch(again, 3)), np.concatenate([first[0], *other]))
    with pytest.raises(KeyError):
        export_schedule(video.describe(), 2, model)


def test_a_prompt_by_hand_ends_the_schedule(pipe, tmp_path):
    model = live_model(pipe)
    start = Start(prompt=RED, seed=1, prompt_changes={"3": GREEN, "1s": "rain", "9": "snow"})
    video = LiveVideo(model, tmp_path / "state", RED, 1, None, plan=VideoPlan.from_start(model, start))
    watch(video, 3)
    video.change_prompt("fog", after=video.timeline.tip)
    watch(video, 2)
    assert [chunk.prompt for chunk in video.timeline.branch_path()] == [RED, GREEN, "rain", "fog", "fog"]


def test_what_no_file_can_say_is_refused_in_words(pipe, tmp_path):
    model = live_model(pipe)
    video = LiveVideo(model, tmp_path / "state", RED, 5)
    with pytest.raises(ValueError, match="there is no chunk yet"):
        export_schedule(video.describe(), None, model)
    watch(video, 1)
    video.fork(0, None, 7)
    video.change_settings({"switch_policy": "flush"})
    watch(video, 1)
    with pytest.raises(ValueError, match=r"noise was begun anew at 0\.5625 s"):
        export_schedule(video.describe(), None, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "got a list"),
        ("prompt: [", "not valid yaml"),
        ("seed: 1", "the file has no prompt"),
        ("prompt: a\nprompt_changes: /etc/passwd", "prompt_changes must be times and prompts"),
        ("prompts: /etc/passwd", "prompts cannot be used here"),
        ("prompt: a\nwindow: 4", "window"),
        ("prompt: a\nheight: 48\nwidth: 32", "height is 48 in the file, and this server makes videos with 32"),
        ("prompt: a\nheight: 32\nwidth: 32\nwindow_frames: 1000", "at most 18"),
    ],
)
def test_files_that_do_not_fit(pipe, text, message):
    with pytest.raises(ValueError, match=message):
        import_schedule(text, live_model(pipe))


def test_settings_that_change_are_part_of_a_place(pipe, tmp_path):
    """Frames after a way back are those of the same decisions without one."""
    model = live_model(pipe)
    straight = LiveVideo(model, tmp_path / "straight", RED, 5)
    watch(straight, 1)
    straight.change_settings({"num_inference_steps": 2})
    expected = watch(straight, 3)
    video = LiveVideo(model, tmp_path / "state", RED, 5, snapshots=1)
    watch(video, 1)
    video.change_settings({"num_inference_steps": 2})
    watch(video, 2)
    video.fork(0)
    assert not np.array_equal(watch(video, 1)[0], expected[0])
    video.fork(2)
    assert video.num_to_repeat > 0
    assert video.settings == {"num_inference_steps": 2}
    np.testing.assert_array_equal(watch(video, 1)[0], expected[2])

    # Dropped with the chunk before which they were changed, they still hold.
    video.change_prompt(GREEN, after=0)
    assert video.settings == {"num_inference_steps": 2}
    with pytest.raises(ValueError, match="cannot change while a video is made"):
        video.change_settings({"window_frames": 9})
    watch(video, 1)
    video.change_settings({"num_inference_steps": 3})
    watch(video, 1)
    video.change_prompt("rain", after=0)
    assert video.settings == {"num_inference_steps": 3}


@pytest.mark.parametrize("has_rollout", [True, False])
def test_settings_and_plans_outlive_a_restart(pipe, tmp_path, has_rollout):
    """A video that is saved and taken up goes on as one that never stopped, if need be from its start."""
    model = live_model(pipe)
    start = Start(prompt=RED, seed=3, settings={"window_frames": 9}, prompt_changes={"9": GREEN, "12": "rain"})

    def begun(name: str) -> LiveVideo:
        video = LiveVideo(model, tmp_path / name, RED, 3, plan=VideoPlan.from_start(model, start))
        watch(video, 2)
        video.change_settings({"num_inference_steps": 2})
        return video

    straight, stopped = begun("straight"), begun("stopped")
    stopped.save()
    for chunk in stopped.timeline.chunks:
        stopped.folder.chunk_path(chunk, "mp4").touch()  # as if it could be shown
    if not has_rollout:
        stopped.folder.remove_rollouts(but=None)
    again = LiveVideo.load(model, tmp_path / "stopped")
    assert again.settings == {"window_frames": 9, "num_inference_steps": 2}
    np.testing.assert_array_equal(watch(again, 3), watch(straight, 3))
    assert again.describe() == straight.describe()
    assert [chunk.prompt for chunk in again.timeline.branch_path()] == [RED, RED, RED, GREEN, "rain"]


def test_settings_of_a_viewer_are_bounded(pipe):
    model = live_model(pipe)
    assert check_settings(model, {"window_frames": 18}).window_frames == 18
    for settings, message in (
        ({"window_frames": 19}, "at most 18"),
        ({"num_inference_steps": 51}, "at most 50"),
        ({"sampler": "nothing"}, "allowed are"),
        ({"sampler": "memory_bank"}, "needs memory_bank_frames"),
        ({"sink_frames": 5}, "does not hold a sink"),
    ):
        with pytest.raises(ValueError, match=message):
            check_settings(model, settings)
