"""Making a chunk never waits for the device.

It runs on torch's meta device, which has no numbers to hand out, and under a mode that looks at every operation.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wan_autoregressive.pipelines import chunk_pixels
from wan_autoregressive.scripts.costs.build import build_pipeline, prompt_embeds
from wan_autoregressive.scripts.costs.workload import make_workload

SETTINGS = make_workload(layers=2, device="meta")
WINDOW = {"num_frames": 45, "window_frames": 6, "sink_frames": 1, "chunk_frames": 2}  # 6 chunks
NEW_PROMPT_AT = 3

aten = torch.ops.aten
# Operations whose result, or the size of it, is needed on the host.
SYNCING = (
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive),
)
INDEXING = (aten.index, aten.index_put, aten.index_put_)
MASKS = (torch.bool, torch.uint8)
COPIES = (aten._to_copy, aten.copy_)


class SyncError(Exception):
    pass


class NoSync(TorchDispatchMode):
    """Raise `SyncError` at an operation that waits for the device of its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operation, devices = func.overloadpacket, {str(arg.device) for arg in args if isinstance(arg, torch.Tensor)}
        if operation in COPIES:
            devices |= {str(kwargs["device"])} if kwargs.get("device") else set()
            waits = len(devices) > 1 and not (kwargs.get("non_blocking") or args[2:] == (True,))
        elif operation in INDEXING:
            waits = any(index is not None and index.dtype in MASKS for index in args[1])
        else:
            waits = operation in SYNCING
        if waits and devices != {"cpu"}:
            raise SyncError(f"{func} on {', '.join(sorted(devices))}")
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def meta_pipe():
    return build_pipeline(SETTINGS)


def run(pipe, monkeypatch, **options) -> None:
    """A rollout whose prompt changes; it has a first chunk, clean passes and evictions."""
    # The one wait per chunk that is meant, when all of it has been queued.
    monkeypatch.setattr(chunk_pixels, "check_finite", lambda steps_finite, pixels_finite, chunk: None)
    options = {**WINDOW, "generator": torch.Generator().manual_seed(0), "output_type": "latent", **options}
    embeds, new_embeds = prompt_embeds(SETTINGS), prompt_embeds(SETTINGS)
    negative = prompt_embeds(SETTINGS) if "guidance_scale" in options else None
    rollout = pipe.rollout(
        prompt_embeds=embeds, negative_prompt_embeds=negative, height=64, width=64, num_inference_steps=2, **options
    )
    with NoSync():
        while not rollout.done:
            if rollout.chunks_done == NEW_PROMPT_AT:
                rollout.set_prompt(new_embeds)
            assert rollout.step().latents.device.type == "meta"
    assert rollout.chunks_done == 6


@pytest.mark.parametrize("position_mode", ["absolute", "relative", "sink_relative"])
@pytest.mark.parametrize(
    "options",
    [{"switch_policy": "recache"}, {"guidance_scale": 3.0, "kv_dtype": "int8", "switch_policy": "cut"}],
    ids=["recache", "guidance, int8, cut"],
)
def test_no_chunk_waits(meta_pipe, monkeypatch, position_mode, options):
    run(meta_pipe, monkeypatch, position_mode=position_mode, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"recache_sink": "refresh"},
        {"switch_policy": "flush", "kv_dtype": "int8"},
        {"switch_policy": "blend", "guidance_scale": 3.0},
        {"generator": None},
    ],
    ids=["new sink", "flush, int8", "blend, guidance", "global noise"],
)
def test_nor_does_one_with_another_setting(meta_pipe, monkeypatch, options):
    run(meta_pipe, monkeypatch, **options)


def test_no_decoding_waits_if_pixels_stay_on_the_device(meta_pipe, monkeypatch):
    run(meta_pipe, monkeypatch, output_type="pt")


def test_a_moving_average_sink_does_not_wait(meta_pipe, monkeypatch):
    run(meta_pipe, monkeypatch, sink_update="moving_average", position_mode="relative")


@pytest.mark.parametrize(
    "look",
    [
        lambda latents: latents.mean().item(),
        lambda latents: float(latents[0, 0, 0, 0, 0]),
        lambda latents: bool(latents.isfinite().all()),
        lambda latents: latents.nonzero(),
        lambda latents: latents[latents > 0],
        lambda latents: latents.equal(latents + 1),
        lambda latents: latents.to("cpu"),
        lambda latents: latents + torch.ones(1).to(latents.device),
        lambda latents: latents.copy_(torch.zeros(latents.shape)),
        lambda latents: latents.tolist(),
        lambda latents: latents.numpy(),
    ],
)
def test_a_callback_that_waits_is_found(meta_pipe, monkeypatch, look):
    def callback(rollout, block, step, timestep, latents):
        look(latents)
        return latents

    # Beside the mode's error: torch's own, for a tensor without numbers.
    with pytest.raises((SyncError, NotImplementedError, TypeError)):
        run(meta_pipe, monkeypatch, on_step_end=callback)
