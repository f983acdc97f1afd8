"""Steady forwards as CUDA graphs (on a CPU as lists of operations) make the bits of eager ones."""

import pytest
from recorded_operations import record_to_replay
from saved_rollouts import assert_same, noise, start

from benchmarks.gpu_kit.captured_forwards import CapturedForwards, capture_graph

# 6 chunks, of which the third fills the window; a new prompt comes with the fifth.
WINDOW = {"num_frames": 45, "window_frames": 6, "sink_frames": 1, "chunk_frames": 2, "output_type": "latent"}


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("position_mode", ["absolute", "relative", "sink_relative"])
def test_captured_forwards_make_the_same_video(pipe, device, position_mode, kv_dtype):
    options = {**WINDOW, "position_mode": position_mode, "kv_dtype": kv_dtype}
    options |= {"prompt_schedule": {8: noise(*start(pipe).prompt.embeds.shape)}}
    expected = list(start(pipe, **options))
    capture = capture_graph if device.type == "cuda" else record_to_replay
    with CapturedForwards(pipe.transformer, capture) as forwards:
        rollout = start(pipe, **options)
        assert_same(list(rollout), expected)
        captured = forwards.graphs
        assert captured == 2  # a step, and a clean pass
        # Of 4 chunks from the third on: 2 steps each but the captured one and the new prompt's first; 3 clean passes
        # but the captured one and the one that the re-cache replaces.
        assert forwards.replays == (2 * 4 - 1 - 1) + (3 - 1 - 1)


def test_a_second_video_has_graphs_of_its_own(pipe, device):
    expected = list(start(pipe, **WINDOW))
    capture = capture_graph if device.type == "cuda" else record_to_replay
    with CapturedForwards(pipe.transformer, capture) as forwards:
        for videos in (1, 2):
            assert_same(list(start(pipe, **WINDOW)), expected)
            assert forwards.graphs == 2 * videos


def test_with_guidance_either_prompt_has_its_graphs(pipe, device):
    options = {**WINDOW, "guidance_scale": 2.0, "negative_prompt": "blurry"}
    expected = list(start(pipe, **options))
    capture = capture_graph if device.type == "cuda" else record_to_replay
    with CapturedForwards(pipe.transformer, capture) as forwards:
        assert_same(list(start(pipe, **options)), expected)
    assert forwards.graphs == 4
