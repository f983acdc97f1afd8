"""Everything at once against videos made the slow way: two videos, guidance, given frames that end inside of a chunk,
a new prompt, and a rollout that is forked or resumed in the middle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive_video import CHANNELS, TEXT_DIM, NaiveTransformer, randn
from saved_rollouts import generator
from test_memory_bank import NaiveMemFlow
from test_memory_bank import make as make_with_a_bank
from test_recompute import NaiveRecompute
from test_rolling import NaiveRolling
from test_stream_batch import NaiveStream

BOUND = 1e-4  # float32; deliberate mistakes in what is seen are off by more than 1e-2
GUIDANCE = 3.0
GIVEN, CHUNKS, SWITCH = 3, [1, 2, 2, 2, 1], 2
"""Of pairs: frames that are given, those of each chunk to generate, and the chunk that a new prompt begins."""
NEGATIVE = 2
SIZE = {"height": 32, "width": 32, "chunk_frames": 2, "num_frames": 4 * (GIVEN + sum(CHUNKS) - 1) + 1}


def drawing() -> Callable[..., torch.Tensor]:
    source = generator()
    return lambda frames, window=None: torch.randn(2, CHANNELS, frames, 4, 4, generator=source)


def rolling(made: NaiveTransformer, given: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    parts = {"attended": 9, "window": 10, "sink": 1, "context_noise": 25.0, "prompt_of_chunk": {SWITCH: 1}}
    video = NaiveRolling(made, CHUNKS, given=[2, 1], steps=(1000, 500), **parts).make(drawing(), given)
    settings = {"sampler_options": {"attended_frames": 9}, "window_frames": 10, "sink_frames": 1}
    return video, {**settings, "position_mode": "sink_relative", "context_noise": 25.0}


def recompute(made: NaiveTransformer, given: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    prompts = ((0, 0), (0, 0), (0, 1), (1, 1), (1, 1))
    naive = NaiveRecompute(made, None, CHUNKS, chunk_frames=2, keep_first=True, steps=(1000, 500), prompts=prompts)
    return naive.make(drawing(), given), {"window_frames": 5, "sampler_options": {"keep_first_frame": True}}


def stream_batch(made: NaiveTransformer, given: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    parts = {"window": 5, "sink": 1, "given": [2, 1], "prompt_of_chunk": {SWITCH: 1}, "steps": (1000, 500)}
    video = NaiveStream(made, CHUNKS, **parts).make(drawing(), given)
    return video, {"window_frames": 5, "sink_frames": 1}


def memory_bank(made: NaiveTransformer, given: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    branches = [NaiveMemFlow(made, prompt=prompt) for prompt in (0, NEGATIVE)]
    options = {"sampler_options": {"bank_interval": 2}, "memory_bank_frames": 2, "window_frames": 6, "sink_frames": 1}
    return make_with_a_bank(branches, CHUNKS, SWITCH, given=given), options


@pytest.mark.parametrize("make", [rolling, recompute, stream_batch, memory_bank])
@pytest.mark.parametrize("done", [1, 4])
def test_equals_the_slow_way_and_goes_on_alike_in_a_fork_and_from_a_file(tmp_path, make, done):
    prompts = [randn(2, 5, TEXT_DIM, seed=70 + i) for i in range(3)]
    made = NaiveTransformer(prompts=prompts, guidance=(GUIDANCE, NEGATIVE))
    given = randn(2, CHANNELS, GIVEN, 4, 4, seed=5)
    expected, settings = make(made, given)
    own = made.pipeline((1000, 500))
    rollout = own.rollout(
        **{**SIZE, **settings, "sampler": make.__name__, "switch_policy": "cross_attention"},
        prompt_embeds=prompts[0],
        prompt_schedule={GIVEN + sum(CHUNKS[:SWITCH]): prompts[1]},
        guidance_scale=GUIDANCE,
        negative_prompt_embeds=prompts[NEGATIVE],
        video_latents=given,
        output_type="latent",
        generator=generator(),
    )
    begun = [rollout.step().latents for _ in range(done)]
    rollout.save(tmp_path)
    for twin in (rollout.fork(), own.resume(tmp_path), rollout):
        latents = torch.cat([*begun, *(chunk.latents for chunk in twin)], dim=2)
        torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)
