"""The settings of one rollout, checked before any model runs."""

from dataclasses import dataclass

from wan_autoregressive.choices import (
    KV_DTYPES,
    POSITION_MODES,
    RECACHE_SINKS,
    SINK_UPDATES,
    SWITCH_POLICIES,
    KVDtype,
    PositionMode,
    RecacheSink,
    SinkUpdateMode,
    SwitchPolicy,
    check_sink_update,
    check_window,
)

OUTPUT_TYPES = ("np", "pil", "pt", "latent")


@dataclass(frozen=True)
class RolloutConfig:
    """Settings that hold for a whole video.

    `num_frames`, `height` and `width` are pixels and pixel frames; everything else that counts frames counts latent
    frames. `window_frames` includes the sink and the chunk that is being denoised.

    Raises:
        ValueError: a value outside its range, or values that cannot work together.
    """

    height: int
    width: int
    num_frames: int | None = None
    chunk_frames: int = 3
    first_chunk_frames: int | None = None
    window_frames: int | None = None
    sink_frames: int = 0
    context_noise: float = 0.0
    clean_pass: bool = True
    guidance_scale: float = 1.0
    num_inference_steps: int | None = None
    denoising_steps: tuple[float, ...] | None = None
    first_chunk_steps: tuple[float, ...] | None = None
    position_mode: PositionMode = "absolute"
    sink_update: SinkUpdateMode = "static"
    sink_decay: float = 0.999
    kv_dtype: KVDtype | None = None
    switch_policy: SwitchPolicy = "recache"
    recache_sink: RecacheSink = "keep"
    flush_frames: int = 2
    cut_jump_frames: int = 42
    blend_chunks: int = 4
    park_vae_state: bool = False
    max_sequence_length: int = 512
    strength: float | None = None
    output_type: str = "np"

    def __post_init__(self) -> None:
        for name in (
            "height",
            "width",
            "chunk_frames",
            "num_frames",
            "first_chunk_frames",
            "window_frames",
            "max_sequence_length",
            "blend_chunks",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name in ("sink_frames", "flush_frames", "cut_jump_frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 0")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; it must be above 0 (the source) and at most 1 (all new)")
        if not 0 <= self.context_noise <= 1000:
            raise ValueError(f"context_noise is {self.context_noise}; it is a timestep, 0 (clean) to 1000")
        for name, allowed in (
            ("output_type", OUTPUT_TYPES),
            ("switch_policy", SWITCH_POLICIES),
            ("recache_sink", RECACHE_SINKS),
            ("position_mode", POSITION_MODES),
            ("sink_update", SINK_UPDATES),
            ("kv_dtype", (None, *KV_DTYPES)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(map(str, allowed))}")
        check_window(self.window_frames, self.sink_frames, self.largest_chunk_frames)
        check_sink_update(self.sink_update, self.sink_frames, self.position_mode, self.kv_dtype)

    @property
    def largest_chunk_frames(self) -> int:
        return max(self.chunk_frames, self.first_chunk_frames or 0)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale > 1.0

    def num_source_steps(self, num_steps: int) -> int:
        """Of `num_steps` denoising steps, the last ones that are made on a noised source video, at least 1."""
        return num_steps if self.strength is None else max(1, min(num_steps, round(num_steps * self.strength)))

    @property
    def highest_position(self) -> int | None:
        """Frames that the positions of the video span; `None` if they grow without end."""
        if self.position_mode == "absolute" or self.window_frames is None:
            return None
        return self.window_frames + (self.cut_jump_frames if self.switch_policy == "cut" else 0)
