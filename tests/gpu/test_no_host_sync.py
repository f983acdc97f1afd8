"""CUDA's own word that making a chunk never waits for the device: its debug mode raises where the host would.

`tests/integration/test_no_sync.py` looks at the operations on any machine. Here the runtime does.
"""

from contextlib import contextmanager

import pytest
import torch
from saved_rollouts import generator, noise, start

from wan_autoregressive.pipelines import chunk_pixels

WINDOW = {"num_frames": 45, "window_frames": 6, "sink_frames": 1, "chunk_frames": 2}  # 6 chunks
OPTIONS = {
    "plain": {},
    "int8": {"kv_dtype": "int8"},
    "relative positions": {"position_mode": "relative"},
    "a sink that moves along": {"position_mode": "sink_relative"},
    "guidance": {"guidance_scale": 2.0, "negative_prompt": "gray"},
    "noise of the CPU": {"generator": generator()},
    "no generator": {"generator": None},
    "parked": {"park_vae_state": True},
}


@contextmanager
def no_sync():
    """RuntimeError where the host would wait for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_no_chunk_waits(pipe, cuda, monkeypatch, options):
    # The one wait per chunk that is meant, when all of it has been queued.
    monkeypatch.setattr(chunk_pixels, "check_finite", lambda steps_finite, pixels_finite, chunk: None)
    seeded = torch.Generator(cuda).manual_seed(0)
    rollout = start(pipe, **{**WINDOW, "generator": seeded, "output_type": "pt", **options})
    new_embeds = noise(*rollout.prompt.embeds.shape).to(cuda)
    made = []
    while not rollout.done:
        with no_sync():
            if rollout.chunks_done == 4:
                rollout.set_prompt(new_embeds)
            made.append(rollout.step())
    assert len(made) == 6
    assert all(chunk.frames.device == cuda and bool(chunk.frames.isfinite().all()) for chunk in made)


@pytest.mark.parametrize("look", [torch.Tensor.item, bool, torch.nonzero, torch.Tensor.cpu])
def test_a_wait_is_found(cuda, look):
    """The test above can fail."""
    one = torch.ones(1, device=cuda)
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        look(one)
