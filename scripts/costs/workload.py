"""A rollout to be measured or computed: its flags, checked before anything is built."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan_autoregressive.configs.choices import KV_DTYPES, POSITION_MODES
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.scripts.costs.sizes import PRESETS, ModelSizes

DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_FORMATS = ("int8", "float8", "q8_0", "q5_0", "q4_0")
"""Of the transformer: torchao's int8, layerwise casting to float8, GGUF files with all matrices of the blocks so."""
_ROLLOUT_FLAGS = ("chunk_frames", "window_frames", "sink_frames", "position_mode", "kv_dtype")
_SAMPLER_FLAGS = ("sampler", "sampler_options", "memory_bank_frames")


@dataclass(frozen=True)
class Workload:
    """One rollout of `chunks` chunks on a model of these sizes.

    Raises:
        ValueError: a value outside its range, or values that cannot work together.
    """

    model: ModelSizes
    rollout: RolloutConfig
    chunks: int = 6
    with_vae: bool = True
    tiny_vae: bool = False
    """Decode with the tiny VAE of the same latents."""
    preview_vae: bool = False
    """Decode every chunk with the tiny VAE first, for a live view."""
    vae_tiling: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"the dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}")
        if self.tiny_vae and self.vae_tiling:
            raise ValueError("vae_tiling and tiny_vae do not go together: a tiny VAE needs no tiles; leave one out")
        if self.preview_vae and (self.tiny_vae or not self.with_vae):
            raise ValueError("preview_vae is a tiny VAE beside the full one; with tiny_vae alone leave it out")
        if (self.tiny_vae or self.preview_vae) and self.model.tiny_vae is None:
            raise ValueError(f"no tiny VAE is known for the latents of {self.model.name}; leave it out")
        for name in ("chunks", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        positions, frames = self.model.transformer["rope_max_seq_len"], self.chunks * self.rollout.chunk_frames
        if self.rollout.position_mode == "absolute" and frames > positions:
            raise ValueError(
                f"{self.chunks} chunks of {self.rollout.chunk_frames} are {frames} latent frames; absolute positions "
                f"end at {positions}, so take fewer or relative positions"
            )
        self.model.latent_size(self.rollout.height, self.rollout.width)

    @property
    def steps(self) -> int:
        """Denoising steps of a chunk, to which the clean pass comes."""
        return self.rollout.num_inference_steps or 0

    @property
    def tokens_per_frame(self) -> int:
        return self.model.tokens_per_frame(self.rollout.height, self.rollout.width)

    @property
    def chunk_tokens(self) -> int:
        return self.rollout.chunk_frames * self.tokens_per_frame

    @property
    def window_tokens(self) -> int | None:
        """Most keys that a query sees, its own chunk included; `None` without a window."""
        frames = self.rollout.window_frames
        return None if frames is None else frames * self.tokens_per_frame

    @property
    def chunks_to_fill(self) -> int:
        """Chunks after which the window is full, so that every later chunk costs the same. Needs a window."""
        if self.rollout.window_frames is None:
            raise ValueError("without a window every chunk costs more than the last; set --window-frames")
        return -(-self.rollout.window_frames // self.rollout.chunk_frames)

    @property
    def latents_shape(self) -> tuple[int, int, int, int, int]:
        """Of one chunk: `(batch, channels, frames, height, width)`."""
        height, width = self.model.latent_size(self.rollout.height, self.rollout.width)
        return 1, self.model.channels, self.rollout.chunk_frames, height, width

    @property
    def _sampling(self) -> str:
        if self.rollout.sampler == "chunkwise":
            return f"{self.steps} steps and a clean pass per chunk"
        return f"{self.steps} steps per chunk with sampler {self.rollout.sampler}"

    def with_rollout(self, **changes: Any) -> Workload:
        """The same with other settings of the rollout."""
        return replace(self, rollout=replace(self.rollout, **changes))

    @property
    def of_preview(self) -> Workload:
        """The same decoded by the preview VAE alone."""
        return replace(self, tiny_vae=True, preview_vae=False, vae_tiling=False)

    def describe(self) -> str:
        """Model, size, chunk, window and dtypes in two lines."""
        rollout = self.rollout
        window = "no window" if rollout.window_frames is None else f"window {rollout.window_frames}"
        pair = "two transformers of " if self.model.experts == 2 else ""
        return (
            f"{self.model.name}: {pair}{self.model.layers} layers of {self.model.dim}, "
            f"{rollout.height}x{rollout.width}, {self.tokens_per_frame} tokens per latent frame, "
            f"chunk {rollout.chunk_frames}, {window}, sink {rollout.sink_frames}, {self._sampling}\n"
            f"{self.dtype}"
            + ("" if rollout.kv_dtype is None else f", K/V {rollout.kv_dtype}")
            + (", tiny VAE" if self.tiny_vae else "")
            + (", preview VAE" if self.preview_vae else "")
        )


def make_workload(
    model: ModelSizes | None = None,
    layers: int | None = None,
    height: int | None = None,
    width: int | None = None,
    chunk_frames: int = 3,
    window_frames: int | None = 9,
    sink_frames: int | None = None,
    position_mode: str = "absolute",
    kv_dtype: str | None = None,
    sampler: str = "chunkwise",
    sampler_options: Mapping[str, Any] | None = None,
    memory_bank_frames: int = 0,
    steps: int = 4,
    chunks: int = 6,
    **others: Any,
) -> Workload:
    """The workload of these flags. Without a window the video has an end, so that its cache is allocated at once.

    Args:
        model: Of the demo checkpoint by default.
        window_frames: The sink and the current chunk included; `None` keeps the whole past.
        others: Further fields of `Workload`.
    """
    model = model or ModelSizes.of_preset("demo")
    if layers is not None:
        model = model.with_layers(layers)
    num_frames = None
    if window_frames is None:
        num_frames = (max(chunks, 1) * chunk_frames - 1) * model.temporal_factor + 1
    if sink_frames is None:
        sink_frames = 0 if window_frames is None else 3
    rollout = RolloutConfig(
        height=model.height if height is None else height,
        width=model.width if width is None else width,
        num_frames=num_frames,
        chunk_frames=chunk_frames,
        window_frames=window_frames,
        sink_frames=sink_frames,
        position_mode=position_mode,  # type: ignore[arg-type]  # checked by it
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        sampler=sampler,
        sampler_options=sampler_options or {},
        memory_bank_frames=memory_bank_frames,
        switch_policy="cross_attention" if sampler in ("recompute", "stream_batch") else "recache",
        num_inference_steps=steps,
    )
    return Workload(model, rollout, chunks, **others)


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `workload_of` reads."""
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=PRESETS, default="demo", help="sizes of the model (default: demo)")
    model.add_argument("--model", type=Path, metavar="DIR", help="take the sizes of this checkpoint folder")
    add("--layers", type=int, metavar="N", help="transformer blocks (default: the model's)")
    add("--height", type=int, metavar="PX", help="pixels (default: the preset's; of a folder 480)")
    add("--width", type=int, metavar="PX", help="pixels (default: the preset's; of a folder 832)")
    add("--chunk-frames", type=int, default=3, metavar="N", help="latent frames per chunk (default: 3)")
    add("--window-frames", type=_frames_or_none, default=9, metavar="N", help="or `none` (default: 9)")
    add("--sink-frames", type=int, metavar="N", help="default: 3, or 0 without a window")
    add("--position-mode", choices=POSITION_MODES, default="absolute", help="default: absolute")
    add("--kv-dtype", choices=KV_DTYPES, help="how the past is kept (default: in --dtype)")
    add("--steps", type=int, default=4, metavar="N", help="denoising steps per chunk (default: 4)")
    add("--chunks", type=int, default=6, metavar="N", help="chunks of the rollout (default: 6)")
    add("--vae", action=argparse.BooleanOptionalAction, default=True, help="decode as well (default: yes)")
    add("--tiny-vae", action="store_true", help="decode with the tiny VAE")
    add("--vae-tiling", action="store_true", help="decode in tiles")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `workload_of` reads as well where it is there."""
    add = parser.add_argument
    add("--sampler", default="chunkwise", metavar="NAME", help="see docs/SAMPLERS.md (default: chunkwise)")
    add("--sampler-options", type=_options, default={}, metavar="JSON", help="its parameters by name")
    add("--memory-bank-frames", type=int, default=0, metavar="N", help="of sampler memory_bank (default: 0)")


def workload_of(args: argparse.Namespace, **others: Any) -> Workload:
    """The workload that the flags ask for; ValueError for values that cannot work."""
    return make_workload(
        ModelSizes.of_preset(args.preset) if args.model is None else ModelSizes.of_folder(args.model),
        layers=args.layers,
        height=args.height,
        width=args.width,
        **{name: getattr(args, name) for name in (*_ROLLOUT_FLAGS, *_SAMPLER_FLAGS) if hasattr(args, name)},
        steps=args.steps,
        chunks=args.chunks,
        with_vae=args.vae,
        tiny_vae=args.tiny_vae,
        vae_tiling=args.vae_tiling,
        dtype=args.dtype,
        **others,
    )


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as {{"attended_frames": 12}}')
    return options


def _frames_or_none(word: str) -> int | None:
    return None if word == "none" else int(word)
