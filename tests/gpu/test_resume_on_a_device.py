"""On one device: saved and resumed == never interrupted, a fork == its parent, whatever device drew the noise."""

import pytest
import torch
from saved_rollouts import assert_same, generator, start

OPTIONS = {
    "plain": {},
    "int8": {"kv_dtype": "int8"},
    "relative positions": {"position_mode": "relative"},
    "a sink that moves along": {"position_mode": "sink_relative"},
    "guidance, another prompt": {"guidance_scale": 2.0, "negative_prompt": "gray", "prompt_schedule": {6: "rain"}},
    "parked": {"park_vae_state": True},
}
WINDOW = {"window_frames": 5, "sink_frames": 1}
SAVED_AFTER = 3
"""Chunks of 5: the window is full and has evicted."""


@pytest.mark.parametrize("drawn_on", ["cpu", "the device"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_resumed_and_forked_equal_uninterrupted(pipe, device, tmp_path, options, drawn_on):
    noise_device = torch.device("cpu") if drawn_on == "cpu" else device

    def new_rollout():
        seeded = torch.Generator(noise_device).manual_seed(0)
        return start(pipe, **{**WINDOW, **options, "generator": seeded})

    expected = list(new_rollout())
    rollout = new_rollout()
    for _ in range(SAVED_AFTER):
        rollout.step()
    rollout.save(tmp_path / "state")
    resumed, fork = pipe.resume(tmp_path / "state"), rollout.fork()
    assert resumed.noise.generator.device == fork.noise.generator.device == noise_device
    for going_on in (resumed, fork, rollout):
        assert_same(list(going_on), expected[SAVED_AFTER:])


def test_a_seed_on_the_cpu_is_the_same_noise_everywhere(pipe, device):
    rollout = start(pipe, generator=generator(3))
    drawn = rollout.noise.draw(2)
    assert drawn.device == device
    assert torch.equal(drawn.cpu(), torch.randn(drawn.shape, generator=generator(3)))


def test_noise_of_the_device_cannot_go_on_elsewhere(pipe, cuda, tmp_path):
    rollout = start(pipe, generator=torch.Generator(cuda).manual_seed(0))
    rollout.step()
    rollout.save(tmp_path / "state")
    with pytest.raises(ValueError, match="kinds of devices draw different numbers"):
        pipe.resume(tmp_path / "state", generator_device="cpu")
