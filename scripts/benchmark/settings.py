"""What is measured, checked before anything is built. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from wan_autoregressive.configs.choices import KV_DTYPES, KVDtype, PositionMode
from wan_autoregressive.configs.rollout_config import check_window
from wan_autoregressive.scripts.benchmark.presets import PRESETS, Geometry

DTYPES = ("float32", "bfloat16", "float16")
CompiledPart = Literal["blocks", "model"]
COMPILED_PARTS: tuple[str, ...] = get_args(CompiledPart)
SWEEPS = ("window", "resolution", "chunk", "position", "kv-dtype")
_ABSOLUTE_POSITIONS = 1024  # `rope_max_seq_len` of every Wan checkpoint


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of one rollout to measure. Frames are latent frames, `height` and `width` pixels.

    `window_frames` counts the sink and the current chunk, `None` keeps the whole past; `steps` are denoising steps
    per chunk, to which the clean pass comes.

    Raises:
        ValueError: a value outside its range, or values that cannot work together.
    """

    preset: str = "demo"
    layers: int | None = None
    height: int | None = None
    width: int | None = None
    chunk_frames: int = 3
    window_frames: int | None = 9
    sink_frames: int = 3
    position_mode: PositionMode = "absolute"
    kv_dtype: KVDtype | None = None
    steps: int = 4
    chunks: int = 6
    repeats: int = 3
    with_vae: bool = True
    vae_tiling: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"the preset is {self.preset!r}; allowed are {', '.join(PRESETS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"the dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}")
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise ValueError(f"kv_dtype is {self.kv_dtype!r}; allowed are None and {', '.join(KV_DTYPES)}")
        for name in ("num_layers", "chunk_frames", "steps", "chunks", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_window(self.window_frames, self.sink_frames, self.chunk_frames)
        if self.position_mode == "absolute" and self.chunks * self.chunk_frames > _ABSOLUTE_POSITIONS:
            raise ValueError(
                f"{self.chunks} chunks of {self.chunk_frames} are {self.chunks * self.chunk_frames} latent frames; "
                f"absolute positions end at {_ABSOLUTE_POSITIONS}, so take fewer or relative positions"
            )
        self.geometry.latent_size(*self.pixels)

    @property
    def geometry(self) -> Geometry:
        return PRESETS[self.preset]

    @property
    def num_layers(self) -> int:
        return self.geometry.layers if self.layers is None else self.layers

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width."""
        return self.height or self.geometry.height, self.width or self.geometry.width

    @property
    def tokens_per_frame(self) -> int:
        return self.geometry.tokens_per_frame(*self.pixels)

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_frames * self.tokens_per_frame

    @property
    def chunks_to_fill(self) -> int:
        """Chunks after which the window is full, so that every later chunk costs the same. Needs a window."""
        if self.window_frames is None:
            raise ValueError("without a window every chunk costs more than the last; set --window-frames")
        return -(-self.window_frames // self.chunk_frames)

    def attended_tokens(self, chunk_index: int) -> int:
        """Keys that each query of a chunk sees, its own chunk included."""
        tokens = (chunk_index + 1) * self.chunk_tokens
        return tokens if self.window_frames is None else min(tokens, self.window_frames * self.tokens_per_frame)
