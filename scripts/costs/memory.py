"""The memory that a rollout of a given size takes, computed on torch's meta device: tensors have shapes and no data.

What is held is summed up; what is made and freed again is counted operation by operation, as PyTorch runs them one
after another. Neither has scratch memory inside a kernel, the rounding of an allocator, or a device's own context.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import UMT5Config, UMT5EncoderModel

from wan_autoregressive.configs.registry import SAMPLERS
from wan_autoregressive.models.codec import codec_of
from wan_autoregressive.pipelines.chunk_in_flight import ChunkInFlight
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts.costs.allocations import AllocationCounts, AllocationMode, FusedAttention, flop_counter
from wan_autoregressive.scripts.costs.build import (
    build_pipeline,
    build_vae,
    cast_weights,
    start_rollout,
    weights_bytes,
)
from wan_autoregressive.scripts.costs.encoding import context_flops, image_flops
from wan_autoregressive.scripts.costs.formulas import StageCosts, costs_per_chunk
from wan_autoregressive.scripts.costs.sampler_costs import steady_costs
from wan_autoregressive.scripts.costs.weight_formats import formatted_bytes, unpacked_bytes
from wan_autoregressive.scripts.costs.workload import Workload


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one video, and floating-point operations of a steady chunk (without a window: of the last one)."""

    transformer_bytes: int
    """Of each of a pair."""
    experts: int
    vae_bytes: int
    text_encoder_bytes: int
    """0 for a checkpoint without one."""
    image_encoder_bytes: int
    """0 for a transformer that attends to no image."""
    kv_cache_bytes: int
    text_kv_bytes: int
    """Of an image that is attended to as well."""
    image_condition_bytes: int
    """Of what a transformer is conditioned on beside the prompt, at most; 0 for one that sees no image."""
    vae_state_bytes: int
    latents_bytes: int
    """Of the window, which a re-cache starts from, of the chunk in the making and of others in flight; and of pixel
    frames that the sampler keeps."""
    input_bytes: int
    """What forwards read beside weights, keys and values: rotary tables above all."""
    forward_peak_bytes: int
    """Most that one forward of the transformer has at once beside all of the above; weights in fewer bits are scaled
    back layer by layer, of which the largest is in it."""
    preview_vae_bytes: int
    """0 without one."""
    preview_state_bytes: int
    decode_peak_bytes: int
    """Most that decoding one chunk has at once beside all of the above; the decoder's next state is in it."""
    flops: dict[str, int]
    """By stage; a multiply-add counts as 2."""
    image_flops: dict[str, int]
    """Of encoding the image before the first chunk, by model, at most."""

    @property
    def held_bytes(self) -> int:
        """What lives as long as the video."""
        conditions = self.text_kv_bytes + self.image_condition_bytes + self.input_bytes
        states = self.vae_state_bytes + self.preview_state_bytes
        return self.kv_cache_bytes + conditions + states + self.latents_bytes

    @property
    def most_bytes(self) -> dict[str, int]:
        """Most at once, by what is on the device."""
        models = self.experts * self.transformer_bytes + self.vae_bytes + self.image_encoder_bytes
        forward, decode = self.forward_peak_bytes, self.decode_peak_bytes
        beside = self.held_bytes + self.preview_vae_bytes  # which no offload moves
        without_text = models + beside + max(forward, decode)
        return {
            "all_models": without_text + self.text_encoder_bytes,
            "without_text_encoder": without_text,
            "decode_alongside": models + beside + forward + decode,
            "transformer_alone": self.transformer_bytes + beside + forward,
            "vae_alone": self.vae_bytes + beside + decode,
        }


@torch.no_grad()
def estimate_memory(workload: Workload, weights: str | None = None) -> MemoryEstimate:
    """Compute the memory of a rollout, whatever `workload.device` is; takes seconds, and memory for no tensor.

    Args:
        weights: One of `WEIGHT_FORMATS` that the transformer is held in; all is computed in the workload's dtype.

    Raises:
        ValueError: sizes that the model cannot take.
    """
    workload = dataclasses.replace(workload, device="meta")
    pipe = build_pipeline(workload)
    sampler = workload.rollout.sampler
    if SAMPLERS.load(sampler).needs_pixels(workload.rollout) and pipe.vae is None:
        raise ValueError(f"sampler {sampler!r} needs a VAE with these sampler_options; leave out --no-vae")
    held = pipe.estimate(**dataclasses.asdict(workload.rollout))
    steady_chunk = _steady_chunk(workload)
    decode, decode_flops = count_decode(workload)
    rollout, forward, latents_bytes = _count_forward(workload, steady_chunk)
    transformer_bytes, unpacked = weights_bytes(pipe.transformer), 0
    if weights is not None:
        transformer_bytes = formatted_bytes(pipe.transformer, weights)
        unpacked = unpacked_bytes(pipe.transformer, weights)
    flops = {stage: costs.flops for stage, costs in _costs(workload, steady_chunk).items()}
    flops |= {"clean_pass": flops["clean_pass"] + context_flops(pipe, workload), "decode": decode_flops[1]}
    preview_bytes = preview_state_bytes = preview_peak_bytes = 0
    if workload.preview_vae:
        preview_bytes, preview_state_bytes, preview_peak_bytes, flops["preview"] = _count_preview(workload.of_preview)
    return MemoryEstimate(
        transformer_bytes=transformer_bytes,
        experts=workload.model.experts,
        vae_bytes=weights_bytes(pipe.vae),
        text_encoder_bytes=_text_encoder_bytes(workload),
        image_encoder_bytes=weights_bytes(pipe.image_encoder),
        kv_cache_bytes=held.kv_cache_bytes or 0,
        text_kv_bytes=held.text_kv_bytes,
        image_condition_bytes=held.image_condition_bytes,
        vae_state_bytes=held.vae_state_bytes or 0,
        latents_bytes=latents_bytes,
        input_bytes=rollout.denoiser.input_bytes,
        forward_peak_bytes=forward.peak_bytes + unpacked,
        preview_vae_bytes=preview_bytes,
        preview_state_bytes=preview_state_bytes,
        decode_peak_bytes=max(decode.peak_bytes, preview_peak_bytes),
        flops=flops,
        image_flops=image_flops(pipe, workload),
    )


def _steady_chunk(workload: Workload) -> int:
    """From which on every chunk costs the same; without a window the last one."""
    rollout = workload.rollout
    if rollout.window_frames is None:
        return workload.chunks - 1
    settles: int = SAMPLERS.load(rollout.sampler).chunks_to_settle(rollout, workload.steps)
    return workload.chunks_to_fill + 1 + settles


def _costs(workload: Workload, chunk_index: int) -> dict[str, StageCosts]:
    if workload.rollout.sampler == "chunkwise":
        return costs_per_chunk(workload, chunk_index)
    rollout, model = workload.rollout, workload.model
    return steady_costs(
        model.transformer,
        rollout,
        workload.steps,
        workload.tokens_per_frame,
        itemsize=1,
        image_tokens=model.image_tokens,
    )


@torch.no_grad()
def count_decode(workload: Workload) -> tuple[AllocationCounts, tuple[int, int]]:
    """Memory of decoding a chunk after the first; floating-point operations of the first and of any later one."""
    if not workload.with_vae:
        return AllocationCounts(), (0, 0)
    workload = dataclasses.replace(workload, device="meta")
    decoder, latents = codec_of(_vae(workload)).decoder(), _latents(workload)
    flops = []
    for _ in ("first", "later"):
        counts = AllocationCounts()
        with FusedAttention(), flop_counter() as counter, AllocationMode(counts):
            decoder.decode(latents)
        flops.append(counter.get_total_flops())
    return counts, (flops[0], flops[1])


def _count_preview(workload: Workload) -> tuple[int, int, int, int]:
    """Bytes of the preview VAE, of its state and of its peak, and its operations for a chunk."""
    vae, rollout = _vae(workload), workload.rollout
    counts, flops = count_decode(workload)
    state_bytes = codec_of(vae).state_bytes(1, rollout.height, rollout.width)
    return weights_bytes(vae), state_bytes, counts.peak_bytes, flops[1]


def _vae(workload: Workload) -> torch.nn.Module:
    with torch.device("meta"):
        return build_vae(workload)


def _pixels(rollout: WanRollout, made: ChunkInFlight) -> torch.Tensor:
    """Of a chunk, as its decoder gives them."""
    components, config, chunk = rollout.components, rollout.config, made.chunk
    assert components.codec is not None
    frames = components.geometry.pixel_frames(chunk.stop) - components.geometry.pixel_frames(chunk.start)
    dtype = next(components.codec.vae.parameters()).dtype
    return torch.empty(1, 3, frames, config.height, config.width, dtype=dtype, device=rollout.device)


def _latents(workload: Workload) -> torch.Tensor:
    """Of a chunk, in float32 as a rollout has them."""
    return torch.empty(workload.latents_shape, device=workload.device)


def _text_encoder_bytes(workload: Workload) -> int:
    """As transformers loads it, which keeps `wo` in float32 where the rest is float16."""
    if workload.model.text_encoder is None:
        return 0
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**workload.model.text_encoder))
    kept = encoder._keep_in_fp32_modules if workload.dtype == "float16" else ()
    cast_weights(encoder, getattr(torch, workload.dtype), kept)
    return weights_bytes(encoder)


def _count_forward(workload: Workload, chunk_index: int) -> tuple[WanRollout, AllocationCounts, int]:
    """Of the largest forward of a chunk, with the rollout that has made that chunk, and the bytes of its latents.

    Two layers have the peak of all: a layer leaves nothing but what is held.
    """
    model = workload.model.with_layers(min(workload.model.layers, 2))
    needs_pixels = SAMPLERS.load(workload.rollout.sampler).needs_pixels(workload.rollout)
    workload = dataclasses.replace(workload, model=model, with_vae=needs_pixels, preview_vae=False)
    rollout, counts = start_rollout(build_pipeline(workload), workload), AllocationCounts()
    with FusedAttention():
        for _ in range(chunk_index):
            made = rollout.begin_chunk()
            rollout.make_latents(made)
            if workload.with_vae:
                rollout.sampler.take_pixels(made.chunk, _pixels(rollout, made))
        latents_bytes = rollout.history.nbytes + rollout.sampler.nbytes + _latents(workload).nbytes
        for name in ("predict", "predict_lanes", "cache_context"):
            setattr(rollout.denoiser, name, _counted(getattr(rollout.denoiser, name), counts))
        rollout.make_latents(rollout.begin_chunk())
    return rollout, counts, latents_bytes


def _counted(forward: Any, most: AllocationCounts) -> Any:
    """A forward that leaves the most that it ever had at once in `most`."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts = AllocationCounts()
        with AllocationMode(counts):
            result = forward(*args, **kwargs)
        most.peak_bytes = max(most.peak_bytes, counts.peak_bytes)
        return result

    return counted
