"""Nodes for ComfyUI in a stand-in of its executor, against the pipeline."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from comfy_stand_in import Comfy, InterruptProcessingException

from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint

NODES = Path(__file__).parents[2] / "integrations" / "comfyui"
PROMPT, LATER = "a red circle moving right on a navy background", "a green cross moving right on a navy background"


@pytest.fixture
def new_comfy(tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(NODES, target_is_directory=True)
    return Comfy(tmp_path / "linked", monkeypatch)


@pytest.fixture(scope="module")
def kept_model():
    return {}


@pytest.fixture
def comfy(new_comfy, kept_model):
    """One that has loaded the model before."""
    new_comfy.kept.update(kept_model)
    new_comfy.execute(graph(), "load")
    kept_model.update(new_comfy.kept)
    return new_comfy


def chunks_of_the_pipeline(count, **options):
    """As the pipeline makes them with the demo's preset, `(frames, 64, 64, 3)` each."""
    pipe = WanAutoregressivePipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    preset = {"height": 64, "width": 64, "window_frames": 12, "position_mode": "sink_relative", "output_type": "pt"}
    generator = torch.Generator().manual_seed(3)
    rollout = pipe.rollout(PROMPT, generator=generator, prompt_schedule={6: LATER}, **preset, **options)
    return [rollout.step().frames[0].movedim(1, -1) for _ in range(count)]


@pytest.fixture(scope="module")
def expected():
    return chunks_of_the_pipeline(4)


def graph(chunks=2, extra=2, extend_prompt="", **settings):
    widgets = {"preset": "of the checkpoint", "height": 0, "width": 0, "window_frames": 0}
    widgets |= {"sampler": "of the preset", "more": ""} | settings
    return {
        "load": ("WanARLoad", {"checkpoint": "demo", "dtype": "float32", "device": "cpu", "folder": ""}),
        "settings": ("WanARSettings", widgets),
        "prompts": ("WanARPrompts", {"text": f"0: {PROMPT}\n6: {LATER}\n"}),
        "generate": (
            "WanARGenerate",
            {
                "model": ("link", "load", 0),
                "prompts": ("link", "prompts", 0),
                "settings": ("link", "settings", 0),
                "chunks": chunks,
                "seed": 3,
            },
        ),
        "extend": ("WanARExtend", {"video": ("link", "generate", 1), "chunks": extra, "prompt": extend_prompt}),
    }


def test_frames_are_those_of_the_pipeline_also_when_extended(comfy, expected):
    frames, _ = comfy.execute(graph(), "generate")
    assert frames.dtype == torch.float32
    assert torch.equal(frames, torch.cat(expected[:2]))
    more, _ = comfy.execute(graph(), "extend")
    assert torch.equal(more, torch.cat(expected[2:]))


def test_what_is_kept_stays_as_it_was(comfy, expected):
    first, _ = comfy.execute(graph(extra=1), "extend")
    assert comfy.ran == ["prompts", "settings", "generate", "extend"]
    other, _ = comfy.execute(graph(extra=1, extend_prompt=LATER.replace("green", "blue")), "extend")
    assert comfy.ran == ["extend"]
    again, _ = comfy.execute(graph(extra=2), "extend")
    assert comfy.ran == ["extend"]
    assert torch.equal(first, expected[2])
    assert torch.equal(again, torch.cat(expected[2:]))
    assert not torch.equal(other, first)


def test_each_chunk_is_shown(comfy, expected):
    comfy.execute(graph(), "generate")
    assert [(value, total) for value, total, _ in comfy.previews] == [(1, 2), (2, 2)]
    for (_, _, (kind, image, _)), chunk in zip(comfy.previews, expected[:2], strict=True):
        assert (kind, image.size) == ("JPEG", (64, 64))
        assert image.getpixel((5, 9)) == tuple((chunk[-1, 9, 5] * 255).round().int().tolist())


def test_cancel_stops_between_steps_and_leaves_nothing_half_made(comfy, expected):
    comfy.cancel_after = 7
    with pytest.raises(InterruptProcessingException):
        comfy.execute(graph(), "generate")
    assert comfy.checks == 8
    assert len(comfy.previews) == 1
    comfy.cancel_after = None
    assert torch.equal(comfy.execute(graph(), "generate")[0], torch.cat(expected[:2]))


def test_an_image_comes_first(comfy):
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    comfy.nodes["Image"] = type(
        "Image",
        (),
        {
            "RETURN_TYPES": ("IMAGE",),
            "RETURN_NAMES": ("image",),
            "FUNCTION": "run",
            "INPUT_TYPES": classmethod(lambda cls: {"required": {}}),
            "run": lambda self: (image,),
        },
    )
    whole = graph(chunks=2)
    whole["image"] = ("Image", {})
    whole["generate"][1]["image"] = ("link", "image", 0)
    frames, _ = comfy.execute(whole, "generate")
    assert torch.equal(frames, torch.cat(chunks_of_the_pipeline(2, image=image.movedim(-1, 1))))


def test_settings_differ_from_the_preset(comfy):
    _, video = comfy.execute(graph(chunks=1, window_frames=6, more="sink_frames: 3\nshift: 3.0"), "generate")
    assert (video.config.window_frames, video.config.sink_frames) == (6, 3)
    assert (video.config.height, video.config.position_mode) == (64, "sink_relative")  # of the demo's preset
    assert video.schedulers[1].config.shift == 3.0
    _, plain = comfy.execute(graph(chunks=1), "generate")
    assert plain.schedulers[1].config.shift == 1.0


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        ("settings", {"more": "sink_frame: 3"}, "sink_frames"),
        ("settings", {"more": "seed: 3"}, "seed"),
        ("settings", {"more": "just words"}, "sink_frames: 3"),
        ("prompts", {"text": "0: a fox\na wolf"}, "no time"),
        ("prompts", {"text": " \n"}, "empty"),
    ],
)
def test_wrong_widgets_are_named_before_anything_runs(comfy, node, inputs, message):
    wrong = graph()
    wrong[node][1].update(inputs)
    with pytest.raises(ValueError, match=message):
        comfy.execute(wrong, "generate")
    assert comfy.ran == []


def test_a_checkpoint_that_was_written_anew_is_loaded_anew(new_comfy, tmp_path):
    comfy = new_comfy
    folder = tmp_path / "model"
    shutil.copytree(demo_checkpoint(), folder)
    os.utime(folder / "model_index.json", (1, 1))
    here = graph(chunks=1)
    here["load"][1]["folder"] = str(folder)
    comfy.execute(here, "load")
    comfy.execute(here, "load")
    assert comfy.ran == []
    os.utime(folder / "model_index.json", (2, 2))
    comfy.execute(here, "load")
    assert comfy.ran == ["load"]


def test_every_node_has_a_title_and_says_what_it_does(comfy):
    assert comfy.titles.keys() == comfy.nodes.keys()
    for node in comfy.nodes.values():
        assert node.DESCRIPTION
        assert node.CATEGORY == "Wan autoregressive"
