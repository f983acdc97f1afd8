"""The gallery: what is on it, and that it can be made."""

import re

import pytest
import torch

from tools import gallery
from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint
from wan_autoregressive.configs import preset_names
from wan_autoregressive.configs.registry import SAMPLERS, SWITCH_POLICIES
from wan_autoregressive.media.ffmpeg import count_video_frames

ENTRIES = list(gallery.entries())
SHOWN = [entry for entry in ENTRIES if isinstance(entry, gallery.Entry)]


@pytest.fixture(scope="module")
def demo():
    pipe = WanAutoregressivePipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_sampler_policy_and_preset_is_shown_or_left_out_with_a_reason():
    names = {entry.name for entry in ENTRIES}
    assert {*SAMPLERS.names, *SWITCH_POLICIES.names, *preset_names()} <= names
    assert all(entry.reason for entry in ENTRIES if isinstance(entry, gallery.LeftOut))


@pytest.mark.slow
@pytest.mark.parametrize("entry", SHOWN, ids=lambda entry: f"{entry.group}-{entry.name}".replace(" ", "-"))
def test_the_settings_work_together(demo, entry):
    length = {} if "strength" in entry.settings else {"num_frames": gallery.NUM_FRAMES}
    demo.rollout(**length, **entry.settings, **entry.inputs)  # checks all of them


@pytest.mark.slow
def test_the_page_has_the_videos_that_it_names(tmp_path):
    gallery.main([str(tmp_path), "--only", "recache"])
    page = (tmp_path / "index.html").read_text()
    (name,) = re.findall(r"<video src='([^']+)'", page)
    (frames,) = re.findall(r"(\d+) frames; first chunk", page)
    assert count_video_frames(tmp_path / name) == int(frames) == gallery.NUM_FRAMES
