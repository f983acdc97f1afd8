"""One rollout, timed chunk by chunk, and a second one of the same shapes, counted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.pipelines.frame_grid import pixel_frames_of
from wan_autoregressive.scripts.benchmark.build import prompt_embeds, start_rollout, weights_bytes
from wan_autoregressive.scripts.benchmark.clock import timed
from wan_autoregressive.scripts.benchmark.counting import STAGES, StageCounts, count_step
from wan_autoregressive.scripts.benchmark.fit import LineFit, fit_line
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings

# Without a window every chunk has counts of its own; counting runs them a second time, so it stops early.
_COUNTED_WITHOUT_WINDOW = 3
# A slope per 100 chunks over fewer is noise.
_LEAST_CHUNKS_TO_FIT = 10


@dataclass
class ChunkMeasure:
    """One chunk: seconds of the timed rollout, counts of the counted one."""

    index: int
    pixel_frames: int
    wall_s: float
    cpu_s: float
    """CPU seconds of the process, all threads together."""
    stage_s: dict[str, float]
    probe_s: float | None = None
    """A fixed forward without a cache, timed after the chunk: how fast the machine is at the moment. In CPU seconds
    on a CPU with a single thread, else in wall seconds. `None` in a rollout that is too short for a fit."""
    counts: dict[str, StageCounts] | None = None
    """By stage; `None` if this chunk was not counted."""


@dataclass
class RolloutMeasure:
    """A whole rollout."""

    first_frame_latency_s: float
    """From the call with ready embeddings to the first chunk's frames."""
    chunks: list[ChunkMeasure]
    chunks_to_fill: int
    """Chunks before every chunk costs the same; all of them without a window."""
    kv_cache_bytes: int
    vae_state_bytes: int
    weights_bytes: int
    device_peak_bytes: int | None
    """Of the timed rollout, by CUDA's allocator; `None` elsewhere."""
    fit: LineFit | None = None
    """Of wall seconds over the steady chunks."""
    cpu_time_fit: LineFit | None = None
    """Of CPU seconds, which other work on the machine disturbs less; only for a CPU with a single thread."""
    relative_fit: LineFit | None = None
    """Of chunk times divided by the probe's, so in forwards instead of seconds: what slows the machine for a while
    slows both."""
    steady: list[ChunkMeasure] = field(default_factory=list)
    """The chunks that medians are taken over: those behind a full window, or all but the first."""

    def median_s(self, *stages: str) -> float:
        """Median over steady chunks of the seconds of these stages together."""
        return statistics.median(sum(chunk.stage_s[stage] for stage in stages) for chunk in self.steady)

    def frames_per_second(self, with_vae: bool) -> float:
        """Pixel frames per second of a steady chunk."""
        stages = ("clean_pass", "denoise", "decode") if with_vae else ("clean_pass", "denoise")
        return self.steady[-1].pixel_frames / self.median_s(*stages)

    def as_dict(self) -> dict[str, Any]:
        return {
            "first_frame_latency_s": self.first_frame_latency_s,
            "frames_per_second_without_vae": self.frames_per_second(with_vae=False),
            "frames_per_second_with_vae": (self.frames_per_second(with_vae=True) if self.vae_state_bytes else None),
            "steady_stage_s": {stage: self.median_s(stage) for stage in STAGES},
            "kv_cache_bytes": self.kv_cache_bytes,
            "vae_state_bytes": self.vae_state_bytes,
            "weights_bytes": self.weights_bytes,
            "device_peak_bytes": self.device_peak_bytes,
            "fit": None if self.fit is None else asdict(self.fit),
            "cpu_time_fit": None if self.cpu_time_fit is None else asdict(self.cpu_time_fit),
            "relative_fit": None if self.relative_fit is None else asdict(self.relative_fit),
            "chunks": [asdict(chunk) for chunk in self.chunks],
        }


def measure_rollout(pipe: WanAutoregressivePipeline, settings: BenchmarkSettings) -> RolloutMeasure:
    """Time `settings.chunks` chunks, count as many as differ, and fit a line through the steady ones."""
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    rollout = start_rollout(pipe, settings)
    probe = _probe(pipe, settings) if settings.chunks >= _LEAST_CHUNKS_TO_FIT else None
    chunks: list[ChunkMeasure] = []
    latency = 0.0
    for index in range(settings.chunks):
        chunk_started, cpu_started = time.perf_counter(), time.process_time()
        chunk = rollout.step()
        stage_s = {stage: float(getattr(chunk.timings, f"{stage}_s")) for stage in STAGES}  # waits for a GPU
        now = time.perf_counter()
        latency = latency or now - started
        frames = (index + 1) * settings.chunk_frames
        pixels = pixel_frames_of(frames, pipe.vae_scale_factor_temporal)
        chunks.append(
            ChunkMeasure(
                index=index,
                pixel_frames=pixels - sum(c.pixel_frames for c in chunks),
                wall_s=now - chunk_started,
                cpu_s=time.process_time() - cpu_started,
                stage_s=stage_s,
            )
        )
        if probe is not None:
            chunks[-1].probe_s = probe()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    measure = RolloutMeasure(
        first_frame_latency_s=latency,
        chunks=chunks,
        chunks_to_fill=settings.chunks if settings.window_frames is None else settings.chunks_to_fill,
        kv_cache_bytes=rollout.cache.allocated_bytes,
        vae_state_bytes=0 if rollout.vae_decoder is None else rollout.vae_decoder.state_bytes,
        weights_bytes=weights_bytes(pipe.transformer, pipe.vae),
        device_peak_bytes=peak,
    )
    _pick_steady(measure, settings)
    _add_counts(measure, pipe, settings)
    return measure


def _pick_steady(measure: RolloutMeasure, settings: BenchmarkSettings) -> None:
    # The chunk that fills the window still follows a shorter clean pass.
    first = 1 if settings.window_frames is None else settings.chunks_to_fill
    measure.steady = measure.chunks[first:] or measure.chunks[-1:]
    if len(measure.steady) >= _LEAST_CHUNKS_TO_FIT:
        indices = [c.index for c in measure.steady]
        measure.fit = fit_line(indices, [c.wall_s for c in measure.steady])
        times = [c.wall_s for c in measure.steady]
        if _counts_cpu_time(settings):
            times = [c.cpu_s for c in measure.steady]
            measure.cpu_time_fit = fit_line(indices, times)
        probes = [c.probe_s for c in measure.steady if c.probe_s]
        measure.relative_fit = fit_line(indices, [t / p for t, p in zip(times, probes, strict=True)])


def _probe(pipe: WanAutoregressivePipeline, settings: BenchmarkSettings) -> Callable[[], float]:
    """A forward over one chunk that never changes; returns its seconds."""
    device, dtype = torch.device(settings.device), pipe.transformer.dtype
    geometry = settings.geometry
    shape = (1, geometry.channels, settings.chunk_frames, *geometry.latent_size(*settings.pixels))
    latents, timestep = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(1, device=device)
    embeds = prompt_embeds(settings)

    @torch.no_grad()
    def run() -> float:
        started = time.process_time()
        wall_s = timed(lambda: pipe.transformer(latents, timestep, embeds), device)
        return time.process_time() - started if _counts_cpu_time(settings) else wall_s

    run()
    return run


def _counts_cpu_time(settings: BenchmarkSettings) -> bool:
    """Whether CPU seconds of the process are those of the work: threads that wait for others use them too."""
    return settings.device == "cpu" and torch.get_num_threads() == 1


def _add_counts(measure: RolloutMeasure, pipe: WanAutoregressivePipeline, settings: BenchmarkSettings) -> None:
    """Count on a rollout of its own: counting slows every operation down."""
    windowed = settings.window_frames is not None
    distinct = settings.chunks_to_fill + 1 if windowed else _COUNTED_WITHOUT_WINDOW
    rollout = start_rollout(pipe, settings)
    for chunk in measure.chunks:
        if chunk.index < distinct:
            chunk.counts = count_step(rollout)
        elif windowed:
            chunk.counts = measure.chunks[distinct - 1].counts
