"""Pinned copies between host and device: noise, and the VAE's state that is parked."""

import pytest
import torch
from saved_rollouts import assert_same, generator, start

from wan_autoregressive.schedulers.self_forcing_scheduler import draw_noise

OPTIONS = {"window_frames": 5, "sink_frames": 1}


def test_noise_arrives_whole_behind_a_busy_stream(device):
    """A host buffer that were used again before its copy is done would show."""
    if device.type == "cuda":
        torch.cuda._sleep(50_000_000)
    shape, drawn_from, wanted_from = (1, 16, 3, 40, 40), generator(1), generator(1)
    drawn = [draw_noise(shape, drawn_from, device, torch.float32) for _ in range(20)]
    for noise in drawn:
        assert torch.equal(noise.cpu(), torch.randn(shape, generator=wanted_from))


def held(decoder) -> list[torch.Tensor]:
    state = decoder.state_dict()
    return [tensor for name, tensor in state.items() if name != "meta"]


def test_a_parked_state_is_in_pinned_memory_and_nowhere_else(pipe, cuda):
    plain, parked = start(pipe, **OPTIONS), start(pipe, **OPTIONS, park_vae_state=True)
    for _ in range(3):
        assert_same([parked.step()], [plain.step()])
        assert all(tensor.device == cuda for tensor in held(plain.vae_decoder))
        lanes = parked.vae_decoder._lanes
        tensors = [entry for lane in lanes for entry in lane if isinstance(entry, torch.Tensor)]
        assert tensors
        assert all(tensor.is_pinned() for tensor in tensors)
    assert parked.vae_decoder.state_bytes == plain.vae_decoder.state_bytes > 0
    for here, there in zip(held(parked.vae_decoder), held(plain.vae_decoder), strict=True):
        assert torch.equal(here, there.cpu())


def test_a_parked_state_leaves_the_device(pipe, cuda):
    """What a rollout holds on the device beside what it holds without pixels: the state, or next to nothing."""

    def held_bytes(**options) -> int:
        before = torch.cuda.memory_allocated(cuda)
        rollout = start(pipe, **OPTIONS, **options)
        rollout.step()
        torch.cuda.synchronize(cuda)
        return torch.cuda.memory_allocated(cuda) - before

    start(pipe, **OPTIONS).step()  # workspaces that stay
    measured = start(pipe, **OPTIONS)
    measured.step()
    state_bytes = measured.vae_decoder.state_bytes
    without = held_bytes(output_type="latent")
    assert held_bytes() - without >= state_bytes  # the allocator rounds each tensor up
    assert held_bytes(park_vae_state=True) - without < state_bytes / 4


@pytest.mark.parametrize("alongside", [False, True])
def test_parked_is_the_same_video(pipe, device, alongside):
    expected = list(start(pipe, **OPTIONS))
    assert_same(list(start(pipe, **OPTIONS, park_vae_state=True).chunks(alongside)), expected)
