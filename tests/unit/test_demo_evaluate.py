"""The judge of the demo: right videos pass, and every kind of wrong video fails for its own reason."""

import dataclasses
import json

import imageio.v3
import pytest
import torch

from examples.train_demo import evaluate, world
from examples.train_demo.score import chunk_ranges, score_video, summarize
from examples.train_demo.world import Scene

SCENE = Scene("red", "square", "right", "navy")
FRAMES = 45  # four chunks


def video_of(scene: Scene, frames: int = FRAMES, start: tuple[float, float] = (50.0, 20.0)) -> torch.Tensor:
    """The right video of a scene, (F, 64, 64, 3) in 0..1."""
    return (world.render([scene], torch.tensor([start]), frames)[0].permute(1, 2, 3, 0) + 1) / 2


def figures_of(video: torch.Tensor, scene: Scene = SCENE) -> dict:
    return summarize([score_video(video, scene)])


@pytest.mark.parametrize("scene", world.all_scenes()[::13], ids=lambda scene: scene.prompt)
def test_rendered_truth_is_right(scene):
    figures = figures_of(video_of(scene), scene)
    for name in ("background", "color", "shape", "direction", "intact_at_end"):
        assert figures[name] == 1, name
    assert figures["speed"] == pytest.approx(world.SPEED, rel=0.02)
    assert figures["overlap"] > 0.95
    assert figures["worst_chunk"] > 0.98
    assert abs(figures["drift"]) < 0.02
    assert figures["flicker"] == pytest.approx(1, abs=0.1)


def test_bytes_and_floats_are_judged_alike():
    video = video_of(SCENE)
    as_bytes = (video * 255).round().to(torch.uint8)
    assert figures_of(as_bytes)["overlap"] == pytest.approx(figures_of(video)["overlap"], abs=1e-3)


@pytest.mark.parametrize(
    ("word", "value", "figure"),
    [
        ("color", "purple", "color"),
        ("background", "black", "background"),
        ("direction", "left", "direction"),
        ("direction", "up", "direction"),
        ("shape", "circle", "shape"),
        ("shape", "cross", "shape"),
    ],
)
def test_one_wrong_word_fails_only_its_own_figure(word, value, figure):
    figures = figures_of(video_of(dataclasses.replace(SCENE, **{word: value})))
    for name in ("background", "color", "shape", "direction"):
        assert figures[name] == (0 if name == figure else 1), name


@pytest.mark.parametrize("shape", world.SHAPES)
def test_each_shape_is_told_from_each_other(shape):
    for other in world.SHAPES:
        video = video_of(dataclasses.replace(SCENE, shape=other))
        right = figures_of(video, dataclasses.replace(SCENE, shape=shape))["shape"]
        assert right == float(shape == other), (shape, other)


def test_a_shape_that_stands_still_has_no_direction():
    video = video_of(SCENE)[:1].repeat(FRAMES, 1, 1, 1)
    figures = figures_of(video)
    assert figures["direction"] == 0
    assert figures["speed"] == pytest.approx(0, abs=1e-3)


def test_half_speed_is_measured():
    video = video_of(SCENE, 2 * FRAMES).unfold(0, 1, 1)[..., 0]
    slow = video[torch.arange(FRAMES) // 2]
    assert figures_of(slow)["speed"] == pytest.approx(world.SPEED / 2, rel=0.05)


def test_a_shape_that_vanishes_is_not_intact():
    video = video_of(SCENE)
    video[-20:] = video[0, 0, 0]
    figures = figures_of(video)
    assert figures["intact_at_end"] == 0
    assert figures["worst_chunk"] < 0.1
    assert figures["drift"] < -0.3


def test_two_shapes_are_not_intact():
    video = video_of(SCENE)
    double = video_of(SCENE, start=(20.0, 52.0))
    background = video[0, 0, 0]
    video = torch.where((double - background).abs().sum(-1, keepdim=True) > 0.01, double, video)
    assert figures_of(video)["intact_at_end"] == 0


def test_a_change_of_colour_at_the_end_is_not_intact():
    video = torch.cat([video_of(SCENE)[:33], video_of(dataclasses.replace(SCENE, color="green"))[33:]])
    figures = figures_of(video)
    assert figures["color"] == 0.75
    assert figures["intact_at_end"] == 0


def test_a_jump_at_a_boundary_is_flicker():
    jumped = torch.cat([video_of(SCENE)[:21], video_of(SCENE, start=(62.0, 20.0))[21:]])
    assert figures_of(jumped)["flicker"] > 1.3


def test_noise_is_nothing():
    noise = torch.rand(FRAMES, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    figures = figures_of(noise)
    assert figures["shape"] == figures["intact_at_end"] == 0


def test_chunks_are_counted_in_latent_frames():
    assert [len(chunk) for chunk in chunk_ranges(45)] == [9, 12, 12, 12]
    assert [len(chunk) for chunk in chunk_ranges(30)] == [9, 12, 9]
    assert [len(chunk) for chunk in chunk_ranges(25, 3, 1)] == [1, 12, 12]


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 32, 32, 3\)"):
        score_video(torch.zeros(2, 32, 32, 3), SCENE)
    with pytest.raises(ValueError, match="at least 2"):
        score_video(torch.zeros(1, 64, 64, 3), SCENE)


def test_the_command_judges_a_video_file(tmp_path, capsys):
    path, report = tmp_path / "video.mp4", tmp_path / "report.json"
    frames = (video_of(SCENE) * 255).round().to(torch.uint8).numpy()
    imageio.v3.imwrite(path, frames, fps=world.FPS, codec="libx264", output_params=["-crf", "10"])
    evaluate.main(["--video", str(path), "--prompt", SCENE.prompt, "--output", str(report)])
    printed = json.loads(capsys.readouterr().out)
    assert printed["shape"] == printed["color"] == printed["direction"] == printed["background"] == 1
    assert len(json.loads(report.read_text())["per_video"][0]["chunks"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "x.mp4"], "--video needs --prompt"),
        (["--model", "nowhere"], "there is no checkpoint in 'nowhere'"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--video", "no.mp4", "--prompt", SCENE.prompt], "cannot read the video 'no.mp4'"),
    ],
)
def test_the_command_refuses_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        evaluate.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err
