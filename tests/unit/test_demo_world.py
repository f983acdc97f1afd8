"""The toy world: prompts, the held-out split, and what is rendered."""

import itertools

import pytest
import torch

from examples.train_demo import world
from examples.train_demo.world import Scene


def test_prompts_are_read_as_they_are_written():
    for scene in world.all_scenes():
        assert world.parse_prompt(scene.prompt) == scene


def test_prompt_spelling_is_forgiven_where_the_words_are_right():
    assert world.parse_prompt(" A red  circle moving left on a Navy background. ") == Scene(
        "red", "circle", "left", "navy"
    )


@pytest.mark.parametrize(
    "prompt",
    ["", "a cat", "a red circle moving left", "a pink circle moving left on a navy background"],
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="demo world"):
        world.parse_prompt(prompt)


def test_a_quarter_of_the_combinations_is_held_out_and_every_pair_of_words_is_trained():
    training, held_out = world.training_scenes(), world.held_out_scenes()
    assert (len(training), len(held_out)) == (288, 96)
    assert not set(training) & set(held_out)

    def pairs(scenes):
        words = [(s.color, s.shape, s.direction, s.background) for s in scenes]
        return {(i, j, w[i], w[j]) for w in words for i, j in itertools.combinations(range(4), 2)}

    assert pairs(training) == pairs(world.all_scenes())


@pytest.mark.parametrize("shape", world.SHAPES)
def test_shapes_fill_their_bounding_box_at_full_colour(shape):
    scene = Scene("green", shape, "left", "white")
    frame = world.render([scene], torch.tensor([[32.0, 32.0]]), 1)[0, :, 0]
    mask = world.coverage(shape, torch.tensor([32.0, 32.0]))
    assert mask.max() == 1
    assert mask[:, 18].sum() == mask[18].sum() == 0  # 14 pixels from the centre: outside
    assert mask[:, 21].sum() > 0  # 11 pixels: inside
    inside = frame[:, mask == 1].T
    assert torch.allclose(inside, torch.tensor(world.COLORS["green"]) / 127.5 - 1, atol=1e-6)
    assert torch.allclose(frame[:, 0, 0], torch.tensor(world.BACKGROUNDS["white"]) / 127.5 - 1, atol=1e-6)


def test_edges_are_antialiased():
    mask = world.coverage("square", torch.tensor([32.25, 32.0]))
    assert mask.sum().item() == pytest.approx((2 * world.RADIUS) ** 2, rel=1e-4)
    assert ((mask > 0) & (mask < 1)).any()


@pytest.mark.parametrize(
    ("direction", "shift"), [("left", (-3, 0)), ("right", (3, 0)), ("up", (0, -3)), ("down", (0, 3))]
)
def test_shapes_move_with_constant_speed_and_wrap_around(direction, shift):
    scene = Scene("red", "cross", direction, "black")
    clip = world.render([scene], torch.tensor([[5.0, 60.0]]), 60)[0]
    for frame in (0, 20, 57):  # two frames are three pixels
        moved = clip[:, frame].roll((shift[1], shift[0]), dims=(1, 2))
        assert torch.allclose(clip[:, frame + 2], moved, atol=1e-5)


def test_a_clip_can_be_rendered_in_parts():
    scene = Scene("blue", "triangle", "up", "gray")
    start = torch.tensor([[20.0, 40.0]])
    whole = world.render([scene], start, 12)
    assert torch.equal(whole[:, :, 5:], world.render([scene], start, 7, first_frame=5))
