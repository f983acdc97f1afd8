"""The memory that a rollout of a given size takes, computed on torch's meta device: tensors have shapes and no data.

What is held is summed up; what is made and freed again is counted operation by operation, as PyTorch runs them one
after another. Neither has scratch memory inside a kernel, the rounding of an allocator, or a device's own context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import UMT5Config, UMT5EncoderModel

from wan_autoregressive.models.streaming_vae import StreamingVaeDecoder
from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts.benchmark.build import (
    build_pipeline,
    cast_weights,
    rollout_settings,
    start_rollout,
    weights_bytes,
)
from wan_autoregressive.scripts.benchmark.costs import flops_per_chunk
from wan_autoregressive.scripts.benchmark.counting import AllocationMode, StageCounts, flop_counter
from wan_autoregressive.scripts.benchmark.report import describe_dtype, describe_rollout, table
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings
from wan_autoregressive.scripts.run_report import human_bytes, versions

_UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one video, and floating-point operations of a steady chunk (without a window: of the last one)."""

    settings: BenchmarkSettings
    transformer_bytes: int
    vae_bytes: int
    text_encoder_bytes: int
    """0 for a model whose text encoder is not UMT5-XXL."""
    kv_cache_bytes: int
    text_kv_bytes: int
    vae_state_bytes: int
    latents_bytes: int
    """Of the window, which a re-cache starts from, and of the chunk in the making."""
    input_bytes: int
    """What forwards read beside weights, keys and values: rotary tables above all."""
    forward_peak_bytes: int
    """Most that one forward of the transformer has at once beside all of the above."""
    decode_peak_bytes: int
    """Most that decoding one chunk has at once beside all of the above; the decoder's next state is in it."""
    flops: dict[str, int]
    """By stage; a multiply-add counts as 2."""

    @property
    def held_bytes(self) -> int:
        """What lives as long as the video."""
        keys_values = self.kv_cache_bytes + self.text_kv_bytes
        return keys_values + self.vae_state_bytes + self.latents_bytes + self.input_bytes

    @property
    def most_bytes(self) -> dict[str, int]:
        """Most at once, by what is on the device."""
        models = self.transformer_bytes + self.vae_bytes
        forward, decode = self.forward_peak_bytes, self.decode_peak_bytes
        without_text = models + self.held_bytes + max(forward, decode)
        return {
            "all_models": without_text + self.text_encoder_bytes,
            "without_text_encoder": without_text,
            "decode_alongside": models + self.held_bytes + forward + decode,
            "transformer_alone": self.transformer_bytes + self.held_bytes + forward,
            "vae_alone": self.vae_bytes + self.held_bytes + decode,
        }

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        figures = {name: value for name, value in vars(self).items() if name != "settings"}
        return {
            "versions": versions(),
            "settings": dataclasses.asdict(self.settings),
            **figures,
            "held_bytes": self.held_bytes,
            "most_bytes": self.most_bytes,
        }


@torch.no_grad()
def plan_memory(settings: BenchmarkSettings) -> MemoryPlan:
    """Compute the memory of a rollout, whatever `settings.device` is; takes seconds, and memory for no tensor.

    Raises:
        ValueError: sizes that the model cannot take.
    """
    settings = dataclasses.replace(settings, device="meta")
    pipe = build_pipeline(settings)
    plan = pipe.plan(**rollout_settings(pipe, settings))
    windowed = settings.window_frames is not None
    steady_chunk = settings.chunks_to_fill + 1 if windowed else settings.chunks - 1
    flops = flops_per_chunk(
        settings.geometry.transformer_config(settings.num_layers),
        steady_chunk,
        settings.chunk_tokens,
        settings.attended_tokens(steady_chunk) if windowed else None,
        settings.steps,
        settings.geometry.text_tokens,
    )
    decode = _count_decode(pipe, settings) if pipe.vae is not None else StageCounts()
    rollout, forward = _count_forward(settings, steady_chunk)
    return MemoryPlan(
        settings=settings,
        transformer_bytes=weights_bytes(pipe.transformer),
        vae_bytes=weights_bytes(pipe.vae),
        text_encoder_bytes=_text_encoder_bytes(settings),
        kv_cache_bytes=plan.kv_cache_bytes or 0,
        text_kv_bytes=plan.text_kv_bytes,
        vae_state_bytes=plan.vae_state_bytes or 0,
        latents_bytes=rollout.history.nbytes + _latents(settings).nbytes,
        input_bytes=rollout.input_bytes,
        forward_peak_bytes=forward.peak_bytes,
        decode_peak_bytes=decode.peak_bytes,
        flops=flops | {"decode": decode.flops},
    )


def as_text(plan: MemoryPlan) -> str:
    """The plan as a table for a terminal."""
    settings, most = plan.settings, plan.most_bytes
    frames = settings.window_frames or settings.chunks * settings.chunk_frames
    figures = {
        "weights: transformer": plan.transformer_bytes,
        "weights: VAE": plan.vae_bytes,
        "weights: text encoder": plan.text_encoder_bytes,
        f"held: K/V of {frames} latent frames": plan.kv_cache_bytes,
        "held: K/V of the text": plan.text_kv_bytes,
        "held: VAE decoder state": plan.vae_state_bytes,
        "held: latents": plan.latents_bytes,
        "held: inputs of a forward": plan.input_bytes,
        "for a while: one forward": plan.forward_peak_bytes,
        "for a while: decoding a chunk": plan.decode_peak_bytes,
        "most at once: all models": most["all_models"],
        "most at once: without text encoder": most["without_text_encoder"],
        "most at once: the same, decoding alongside": most["decode_alongside"],
        "most at once: transformer alone, denoising": most["transformer_alone"],
        "most at once: VAE alone, decoding": most["vae_alone"],
    }
    rows = [("computed", "")] + [(name, human_bytes(count)) for name, count in figures.items()]
    rows += [(f"a chunk: {stage}", f"{flops / 1e12:.4g} TFLOP") for stage, flops in plan.flops.items()]
    torch_version = versions()["torch"]
    return f"{describe_rollout(settings)}\n{describe_dtype(settings)}, torch {torch_version}\n\n{table(rows)}"


def _latents(settings: BenchmarkSettings) -> torch.Tensor:
    """Of a chunk, in float32 as a rollout has them."""
    size = settings.geometry.latent_size(*settings.pixels)
    return torch.empty(1, settings.geometry.channels, settings.chunk_frames, *size, device=settings.device)


def _text_encoder_bytes(settings: BenchmarkSettings) -> int:
    """As transformers loads it, which keeps `wo` in float32 where the rest is float16."""
    if settings.geometry.text_dim != _UMT5_XXL["d_model"]:
        return 0
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**_UMT5_XXL, feed_forward_proj="gated-gelu"))
    kept = encoder._keep_in_fp32_modules if settings.dtype == "float16" else ()
    cast_weights(encoder, getattr(torch, settings.dtype), kept)
    return weights_bytes(encoder)


def _count_forward(settings: BenchmarkSettings, chunk_index: int) -> tuple[WanRollout, StageCounts]:
    """Of the first forward of a chunk, with the rollout that is then at that chunk.

    Two layers have the peak of all: a layer leaves nothing but what is held.
    """
    settings = dataclasses.replace(settings, layers=min(settings.num_layers, 2), with_vae=False)
    rollout, latents = start_rollout(build_pipeline(settings), settings), _latents(settings)

    def forward(timestep: float, index: int) -> None:
        rollout.flow(latents, timestep, index * settings.chunk_frames, rollout.cache, rollout.prompt.embeds)

    timesteps = [*rollout.schedulers[1].timesteps.tolist(), rollout.config.context_noise]
    with _FusedAttention():
        for index in range(chunk_index):
            rollout.cache.enable_append_mode()
            for timestep in timesteps if index == 0 else timesteps[:1]:  # each is embedded once
                forward(timestep, index)
                rollout.cache.enable_overwrite_mode()
            rollout.history.append(latents)
    rollout.cache.enable_append_mode()
    with _counting() as counts:
        forward(timesteps[0], chunk_index)
    return rollout, counts


def _count_decode(pipe: WanAutoregressivePipeline, settings: BenchmarkSettings) -> StageCounts:
    """Of a chunk after the first."""
    decoder, latents = StreamingVaeDecoder(pipe.vae), _latents(settings).to(pipe.vae.dtype)
    with _FusedAttention():
        decoder.decode(latents)
    with _counting() as counts:
        decoder.decode(latents)
    return counts


@contextmanager
def _counting() -> Iterator[StageCounts]:
    counts = StageCounts()
    with _FusedAttention(), flop_counter() as counter, AllocationMode(counts):
        yield counts
    counts.flops = counter.get_total_flops()


class _FusedAttention(TorchFunctionMode):
    """Attention as one kernel, as devices have it; on the meta device PyTorch would write all scores to memory."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
