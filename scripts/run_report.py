"""What a run took and what it was made with: the JSON beside the mp4 and the answer of `--dry-run`."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from wan_autoregressive._version import __version__
from wan_autoregressive.atomic_file import write_text
from wan_autoregressive.configs import GenerateConfig

STAGES = ("load", "text", "given", "denoise", "clean_pass", "decode", "encode")
# What a chunk's timings call the stages that they know; their `encode` is of the VAE, ours of the mp4.
_TIMING_OF_STAGE = {
    "text": "text_s",
    "given": "encode_s",
    "denoise": "denoise_s",
    "clean_pass": "clean_pass_s",
    "decode": "decode_s",
}


@dataclasses.dataclass
class RunTimes:
    """Seconds of one video, and when its frames came.

    `stages` holds: `load` (checkpoint to device, shared by all videos of a run), `text` (prompt encoding), `given`
    (VAE encoding of given frames), `denoise`, `clean_pass`, `decode` (VAE) and `encode` (writing the mp4).
    """

    stages: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    total_s: float = 0.0
    """From the call to the finished mp4, without loading."""
    first_chunk_s: float | None = None
    """From the call to the first frames, without loading."""
    chunks: int = 0
    first_chunk_frames: int = 0
    """Pixel frames of the first chunk."""
    frames: int = 0
    """Pixel frames."""

    def add_chunk(self, timings: Any, frames: int, elapsed_s: float) -> None:
        """Account for a chunk that came `elapsed_s` after the call."""
        for stage, name in _TIMING_OF_STAGE.items():
            self.stages[stage] += float(getattr(timings, name))
        if self.first_chunk_s is None:
            self.first_chunk_s, self.first_chunk_frames = elapsed_s, frames
        self.chunks += 1
        self.frames += frames

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] += time.perf_counter() - start

    @property
    def frames_per_second(self) -> float:
        """Pixel frames by `total_s`: everything but loading."""
        return self.frames / self.total_s if self.total_s else 0.0

    @property
    def steady_frames_per_second(self) -> float | None:
        """Pixel frames per second after the first chunk; None when there is only one."""
        if self.first_chunk_s is None or self.frames == self.first_chunk_frames:
            return None
        return (self.frames - self.first_chunk_frames) / (self.total_s - self.first_chunk_s)


def write_chunk(chunk: Any, writer: Any, times: RunTimes, start: float, bar: Any) -> None:
    """Write a chunk's frames to the mp4, account for its time and move the bar on.

    Args:
        start: `time.perf_counter()` when the video began.
    """
    frames = chunk.frames[0]
    times.add_chunk(chunk.timings, len(frames), time.perf_counter() - start)
    with times.measure("encode"):
        writer.write(frames)
    bar.set_postfix_str(f"{times.frames / (time.perf_counter() - start):.2f} frames/s", refresh=False)
    bar.update()


def write_report(
    path: Path, config: GenerateConfig, device: str, dtype: str, times: RunTimes, decode_alongside: bool = False
) -> None:
    """Write the JSON for one video atomically; OSError when it cannot be written.

    Args:
        decode_alongside: whether decoding overlapped with denoising, so that the stages' seconds add up to more than
            the total; of the last run, where a video was resumed.
    """
    report = {
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "versions": versions(),
        "device": device,
        "dtype": dtype,
        "decode_alongside": decode_alongside,
        "chunks": times.chunks,
        "frames": times.frames,
        "seconds": {stage: round(seconds, 6) for stage, seconds in times.stages.items()},
        "seconds_total_without_load": round(times.total_s, 6),
        "first_frame_latency_s": None if times.first_chunk_s is None else round(times.first_chunk_s, 6),
        "frames_per_second": round(times.frames_per_second, 4),
        "steady_frames_per_second": _rounded(times.steady_frames_per_second),
    }
    write_text(path, json.dumps(report, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, of Python, this package and the libraries that do the work."""
    found = {"python": platform.python_version(), "wan-autoregressive": __version__}
    for name in ("torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def describe_device(device: Any) -> str:
    """Name a torch device as a person would, such as `cuda:0 (NVIDIA H100)`."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()})" if device.type == "cpu" else str(device)


def dry_run_text(config: GenerateConfig, plan: Any, videos: int) -> str:
    """Return the resolved config and what each video will take, as yaml."""
    lines = [yaml.safe_dump({"config": config.model_dump(mode="json")}, sort_keys=False, allow_unicode=True).rstrip()]
    lines += [f"videos: {videos}", "each_video:"]
    for name, value in dataclasses.asdict(plan).items():
        shown = "null" if value is None else str(value)
        comment = f"  # {human_bytes(value)}" if name.endswith("_bytes") and value is not None else ""
        lines.append(f"  {name}: {shown}{comment}")
    return "\n".join(lines)


def human_bytes(count: int) -> str:
    """`1.5 MiB` for 1572864."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
