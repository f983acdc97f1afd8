"""The settings of one rollout, the only list of them: checked before any model runs, and without torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from wan_autoregressive.configs.choices import (
    KV_DTYPES,
    OUTPUT_TYPES,
    POSITION_MODES,
    RECACHE_SINKS,
    SINK_UPDATES,
    KVDtype,
    OutputType,
    PositionMode,
    RecacheSink,
    SinkUpdateMode,
)
from wan_autoregressive.configs.registry import SAMPLERS, SOLVERS, SWITCH_POLICIES


class RolloutSettings(TypedDict, total=False):
    """The fields of [`RolloutConfig`] as keywords of a call, where sizes may be left to the pipeline."""

    height: int | None
    width: int | None
    num_frames: int | None
    chunk_frames: int
    first_chunk_frames: int | None
    window_frames: int | None
    sink_frames: int
    memory_bank_frames: int
    given_in_chunk: bool
    sampler: str
    sampler_options: Mapping[str, Any]
    solver: str
    num_inference_steps: int | None
    denoising_steps: tuple[float, ...] | list[float] | None
    first_chunk_steps: tuple[float, ...] | list[float] | None
    guidance_scale: float
    context_noise: float
    clean_pass: bool
    strength: float | None
    position_mode: PositionMode
    sink_update: SinkUpdateMode
    sink_decay: float
    kv_dtype: KVDtype | None
    switch_policy: str
    recache_sink: RecacheSink
    flush_frames: int
    cut_jump_frames: int
    blend_chunks: int
    switch_options: Mapping[str, Any]
    park_vae_state: bool
    max_sequence_length: int
    output_type: OutputType


@dataclass(frozen=True)
class RolloutConfig:
    """Settings that hold for a whole video.

    `num_frames`, `height` and `width` are pixel frames and pixels; everything else that counts frames counts latent
    frames: 1 pixel frame for the first, 4 for each later one.

    Raises:
        ValueError: a value outside its range, or values that cannot work together.
    """

    height: int
    """Pixels, a multiple of what VAE and patch make together (16 for Wan 2.1, 32 for Wan2.2-5B)."""
    width: int
    """Pixels, a multiple as `height`."""
    num_frames: int | None = None
    """Pixel frames, given ones included; `None` does not end."""

    chunk_frames: int = 3
    """Latent frames denoised together."""
    first_chunk_frames: int | None = None
    """Latent frames of the first chunk if it differs; 1 is an independent first frame."""
    window_frames: int | None = None
    """Latent frames in the KV cache at most, sink and current chunk included; `None` keeps the whole video."""
    sink_frames: int = 0
    """First latent frames that are never evicted."""
    memory_bank_frames: int = 0
    """Latent frames at most out of the whole video that stay in view beside sink and window, chosen by the prompt
    (MemFlow). For `sampler="memory_bank"`, 0 otherwise."""
    given_in_chunk: bool = False
    """Given frames that end inside of a chunk stay in it, at timestep 0, while its other frames are made around them
    (LongLive 2.0's image to video). Off, they are a chunk of their own."""

    sampler: str = "chunkwise"
    """In which order frames are denoised: `chunkwise` finishes one chunk after the other (Self-Forcing, LongLive),
    `memory_bank` does so with frames of the whole video in view that have to do with the prompt (MemFlow), `rolling`
    denoises a window of chunks at rising noise (Rolling Forcing), `recompute` makes the past anew for every chunk
    (Krea Realtime), `stream_batch` has a cache for each denoising step (StreamDiffusionV2). See `docs/SAMPLERS.md`."""
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of that sampler alone, by name."""
    solver: str = "renoise"
    """How a chunk goes from step to step: `renoise` predicts the clean chunk and noises it anew (Self-Forcing);
    `unipc` is a multistep solver without noise between steps, for evenly spaced steps (LongLive 2.0)."""
    num_inference_steps: int | None = None
    """Evenly spaced denoising steps per chunk, instead of the scheduler's list."""
    denoising_steps: tuple[float, ...] | None = None
    """Denoising steps of a chunk, descending from at most 1000, instead of the scheduler's list."""
    first_chunk_steps: tuple[float, ...] | None = None
    """Denoising steps of the first generated chunk, if they differ."""
    guidance_scale: float = 1.0
    """Above 1, classifier-free guidance with a second cache: twice the work. Distilled models are made for 1."""
    context_noise: float = 0.0
    """Timestep of the context pass, which writes a finished chunk to the cache; 0 is clean."""
    clean_pass: bool = True
    """Off, there is no context pass: the keys and values of a chunk's last step stay in the cache. A forward less per
    chunk, for a noisy past, for which few models are trained."""
    strength: float | None = None
    """Video to video: the share of the denoising steps that are made, above 0 (the source) to 1 (all new)."""

    position_mode: PositionMode = "absolute"
    """Rotary position of a frame: `absolute` counts from the start of the video and ends at 1024 latent frames,
    `relative` is the place in the window, without end; `sink_relative` gives the same attention for nearly nothing.
    All are equal until the first eviction."""
    sink_update: SinkUpdateMode = "static"
    """`moving_average` folds evicted frames into the sink (Reward-Forcing). Needs relative positions."""
    sink_decay: float = 0.999
    """Share of itself that a moving-average sink keeps each time."""
    kv_dtype: KVDtype | None = None
    """`int8` keeps the past as int8, in about half of bfloat16's memory; `None` in the model's dtype."""

    switch_policy: str = "recache"
    """What happens to the past when the prompt changes: `recache` rebuilds the window's keys and values under the new
    prompt (LongLive); `cross_attention` only changes the text; `flush` keeps the sink and the newest `flush_frames`
    frames, `cut` does so and jumps `cut_jump_frames` ahead in time (Infinity-RoPE); `blend` interpolates the
    embeddings over `blend_chunks` chunks; `scene_cut` begins a shot with first frames of its own beside the sink
    (LongLive 2.0), its parameters are `switch_options`."""
    recache_sink: RecacheSink = "keep"
    """Whether a re-cache keeps the sink's keys and values of the old prompt, or `refresh`: the oldest frames of the
    window become the new sink."""
    flush_frames: int = 2
    """Newest latent frames that a flush or a cut keeps, beside the sink."""
    cut_jump_frames: int = 42
    """Latent frames that a cut jumps ahead in time."""
    blend_chunks: int = 4
    """Chunks that a blend takes from the old prompt to the new one."""
    switch_options: Mapping[str, Any] = field(default_factory=dict)
    """Parameters by name, of a switch policy that has no fields here: `position_offset`, `pin`, `clean_recache` and
    `words` of `scene_cut`, and those of other packages."""

    park_vae_state: bool = False
    """Keep the VAE decoder's state in CPU memory between chunks: less GPU memory for two transfers per chunk."""
    max_sequence_length: int = 512
    """Text tokens of a prompt, padding included."""
    output_type: OutputType = "np"
    """Form of the frames: `np` and `pt` floats in [0, 1], `pil` images, `uint8` NumPy arrays made on the device (a
    quarter of the bytes of `np`), `latent` for no decoding."""

    def __post_init__(self) -> None:
        for name in ("denoising_steps", "first_chunk_steps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name in ("sink_frames", "memory_bank_frames", "flush_frames", "cut_jump_frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 0")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: must be a finite number, got {value}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale is {self.guidance_scale:g}; it must be at least 0")
        if not 0 <= self.sink_decay <= 1:
            raise ValueError(f"sink_decay is {self.sink_decay:g}; it must be between 0 and 1")
        if self.num_inference_steps is not None and self.denoising_steps is not None:
            raise ValueError("num_inference_steps is a count and denoising_steps a list of the same steps; give one")
        for name in ("denoising_steps", "first_chunk_steps"):
            check_steps(name, getattr(self, name))
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; it must be above 0 (the source) and at most 1 (all new)")
        if not 0 <= self.context_noise <= 1000:
            raise ValueError(f"context_noise is {self.context_noise}; it is a timestep, 0 (clean) to 1000")
        for name, allowed in _CLOSED_CHOICES:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(map(str, allowed))}")
        SAMPLERS.check(self.sampler)
        SOLVERS.check(self.solver)
        SWITCH_POLICIES.check(self.switch_policy)
        check_window(self.window_frames, self.sink_frames, self.largest_chunk_frames)
        check_sink_update(self.sink_update, self.sink_frames, self.position_mode, self.kv_dtype)

    def changed(self, **settings: Any) -> RolloutConfig:
        """These settings with others for a video under way.

        Raises:
            ValueError: a setting that a video cannot change, or a value that cannot work.
        """
        fixed = sorted(set(settings) - CHANGEABLE)
        if fixed:
            raise ValueError(
                f"{', '.join(fixed)} cannot change while a video is made; what can is {', '.join(sorted(CHANGEABLE))}"
            )
        for name, other in (("denoising_steps", "num_inference_steps"), ("num_inference_steps", "denoising_steps")):
            if name in settings:
                settings.setdefault(other, None)
        changed = replace(self, **settings)
        if changed.do_classifier_free_guidance != self.do_classifier_free_guidance:
            raise ValueError(
                f"guidance_scale cannot change from {self.guidance_scale} to {changed.guidance_scale} while a video "
                "is made: above 1 there is a second cache, which has to see the video from its start"
            )
        return changed

    @property
    def largest_chunk_frames(self) -> int:
        """Latent frames of the longest chunk."""
        return max(self.chunk_frames, self.first_chunk_frames or 0)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether there is a second branch, for the negative prompt."""
        return self.guidance_scale > 1.0

    @property
    def num_branches(self) -> int:
        """Forwards of every step: under the prompt, and with guidance under the negative one."""
        return 2 if self.do_classifier_free_guidance else 1

    def num_source_steps(self, num_steps: int) -> int:
        """Of `num_steps` denoising steps, the last ones that are made on a noised source video, at least 1."""
        return num_steps if self.strength is None else max(1, min(num_steps, round(num_steps * self.strength)))

    @property
    def highest_position(self) -> int | None:
        """Frames that the positions of the video span; `None` if they grow without end."""
        if self.position_mode == "absolute" or self.window_frames is None:
            return None
        return self.window_frames + (self.cut_jump_frames if self.switch_policy == "cut" else 0)


CHANGEABLE = frozenset(
    {
        *("num_inference_steps", "denoising_steps", "guidance_scale", "context_noise", "clean_pass"),
        *("switch_policy", "recache_sink", "flush_frames", "cut_jump_frames", "blend_chunks", "switch_options"),
    }
)
"""Settings that a video under way can change at a chunk boundary: sizes, the cache and the sampler stay."""

_POSITIVE = (
    *("height", "width", "num_frames", "chunk_frames", "first_chunk_frames", "window_frames"),
    *("max_sequence_length", "blend_chunks"),
)
_CLOSED_CHOICES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("output_type", OUTPUT_TYPES),
    ("recache_sink", RECACHE_SINKS),
    ("position_mode", POSITION_MODES),
    ("sink_update", SINK_UPDATES),
    ("kv_dtype", (None, *KV_DTYPES)),
)


def check_steps(name: str, steps: Sequence[float] | None, last: int = 1000) -> None:
    """Raise `ValueError` for a list of timesteps that is empty, leaves 0 to `last`, or does not descend."""
    if steps is None:
        return
    if not steps:
        raise ValueError(f"{name} is empty; it needs at least one step")
    if not all(isinstance(step, int | float) and 0 <= step <= last for step in steps):
        raise ValueError(f"{name}: every step must be a number from 0 to {last}, got {_listed(steps)}")
    if any(later >= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"{name} must descend, got {_listed(steps)}")


def _listed(steps: Sequence[float]) -> str:
    words = [f"{step:g}" if isinstance(step, int | float) else repr(step) for step in steps[:10]]
    return ", ".join(words) + (", …" if len(steps) > 10 else "")


def check_window(window_frames: int | None, sink_frames: int, chunk_frames: int) -> None:
    """Raise `ValueError` if a window does not hold its sink and a chunk, or if there is a sink without a window.

    Args:
        chunk_frames: Of the largest chunk. All are latent frames; `window_frames=None` keeps the whole past.
    """
    if window_frames is None:
        if sink_frames:
            raise ValueError(
                f"sink_frames is {sink_frames} but window_frames is not set: nothing is ever evicted, so a sink has "
                "no effect. Set window_frames or leave the sink out"
            )
        return
    if window_frames < sink_frames + chunk_frames:
        raise ValueError(
            f"window_frames is {window_frames}, which does not hold a sink of {sink_frames} and a chunk of "
            f"{chunk_frames} latent frames; it must be at least {sink_frames + chunk_frames}"
        )


def check_sink_update(sink_update: str, sink_frames: int, position_mode: str, kv_dtype: str | None) -> None:
    """Raise `ValueError` if a sink could not be updated so."""
    if sink_update == "static":
        return
    if position_mode != "relative" or not sink_frames:
        raise ValueError(
            f"sink_update {sink_update!r} averages keys without rotary embedding; it needs position_mode 'relative' "
            f"and sink_frames, got {position_mode!r} and {sink_frames}"
        )
    if kv_dtype is not None:
        raise ValueError(
            f"sink_update {sink_update!r} changes the sink by less than the rounding of kv_dtype {kv_dtype!r}; leave "
            "out one of them"
        )
