"""Everything that one `wan-ar generate` run depends on, checked before a model is loaded.

The fields of `GenerateConfig` are at the same time the keys of a yaml file and the flags of the command.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from wan_autoregressive.configs.choices import KVDtype, PositionMode, RecacheSink, SinkUpdateMode
from wan_autoregressive.configs.messages import error_line
from wan_autoregressive.configs.prompt_times import latent_frame_at, read_changes
from wan_autoregressive.configs.registry import SWITCH_POLICIES
from wan_autoregressive.configs.rollout_config import check_sink_update, check_window
from wan_autoregressive.demo import DEMO

SIZE_MULTIPLE = 16  # pixels: 8 per latent of the Wan 2.1 VAE, times a patch of 2
TABLE_STEPS = 1000  # training timesteps of every Wan model


def _parse_steps(value: Any) -> Any:
    """Turn `4` into 1000, 750, 500, 250 and `1000,757,522` into a list; leave the rest to pydantic."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        if len(parts) == 1 and parts[0].isdecimal():
            value = int(parts[0])
        else:
            return [part for part in parts if part]
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= TABLE_STEPS:
            raise ValueError(f"a count of steps must be between 1 and {TABLE_STEPS}, got {value}")
        return [round(TABLE_STEPS * (value - index) / value) for index in range(value)]
    return value


def _parse_path(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("the name is empty")
    return value


def _parse_text(value: Any) -> Any:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("it is empty; say what the video shows")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError("it is not valid text (UTF-8)") from error
    return value


def _parse_device(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", value):
        raise ValueError(f"must be auto, cpu, cuda, cuda:1, mps or xpu, got {value!r}")
    return value


def _check_switch_policy(name: str) -> str:
    SWITCH_POLICIES.check(name)
    return name


_ROLLOUT_FIELDS = (
    *("height", "width", "num_frames", "chunk_frames", "first_chunk_frames", "first_chunk_steps", "window_frames"),
    *("sink_frames", "sink_update", "sink_decay", "kv_dtype", "position_mode", "context_noise", "clean_pass"),
    *("guidance_scale", "switch_policy", "recache_sink", "max_sequence_length", "park_vae_state"),
)

Steps = Annotated[tuple[Annotated[float, Field(gt=0, le=TABLE_STEPS)], ...], BeforeValidator(_parse_steps)]
FilePath = Annotated[Path, BeforeValidator(_parse_path)]


class GenerateConfig(BaseModel):
    """One run of `wan-ar generate`. Frames are pixel frames in `num_frames`, latent frames in `*_frames` otherwise.

    Build it with `resolve_config`, which turns every problem into a one-line ValueError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: FilePath = Field(
        Path(DEMO), description="folder of the checkpoint (diffusers layout), or 'demo', which comes with the package"
    )
    prompt: Annotated[str | None, BeforeValidator(_parse_text)] = Field(
        None,
        description="what the video shows; repeat as '0: a fox', '5s: it snows' to change it (30: latent frame)",
    )
    prompts: FilePath | None = Field(
        None, description="text file with a prompt per line, each rendered to its own mp4"
    )
    prompt_changes: Annotated[dict[str, str] | None, BeforeValidator(read_changes)] = Field(
        None, description="later prompts by time (5s, or a latent frame), a yaml or JSON file; see also prompt"
    )
    switch_policy: Annotated[str, AfterValidator(_check_switch_policy)] = Field(
        "recache", description="what happens to the past when the prompt changes"
    )
    recache_sink: RecacheSink = Field(
        "keep", description="whether a re-cache keeps the sink or makes the window's oldest frames the new one"
    )
    negative_prompt: str | None = Field(None, description="what to avoid; matters when guidance-scale is above 1")
    output: FilePath = Field(description="the mp4 to write; with --prompts the folder to write them to")
    image: FilePath | None = Field(None, description="image that becomes the first frame")
    video: FilePath | None = Field(None, description="clip whose frames come first and are continued")

    height: int = Field(480, ge=SIZE_MULTIPLE, le=16384, description="height in pixels")
    width: int = Field(832, ge=SIZE_MULTIPLE, le=16384, description="width in pixels")
    num_frames: int = Field(81, ge=1, le=10_000_000, description="length in pixel frames, given ones included")
    fps: float = Field(16.0, gt=0, le=1000, description="frames per second of the mp4")
    scale: int = Field(1, ge=1, le=64, description="repeat every pixel so many times in the mp4, to see small videos")
    contact_sheet: bool = Field(False, description="also write a PNG with frames from start to end beside the mp4")
    seed: int | None = Field(None, ge=0, lt=2**63, description="drawn and noted in the report when not given")

    denoising_steps: Steps | None = Field(
        None, description="a count, or descending timesteps such as 1000,750,500,250; the model's own when not given"
    )
    first_chunk_steps: Steps | None = Field(
        None, description="steps of the first chunk; as the other chunks' when not given"
    )
    shift: float | None = Field(None, gt=0, description="timestep shift; the model's own when not given")
    warp: bool | None = Field(
        None, description="look the steps up in the shifted table; the model's own when not given"
    )
    guidance_scale: float = Field(
        1.0, ge=0, description="classifier-free guidance; 1 is off, above 1 doubles the work"
    )
    chunk_frames: int = Field(3, ge=1, le=1024, description="latent frames denoised together")
    first_chunk_frames: int | None = Field(
        None, ge=1, le=1024, description="latent frames of the first chunk; as chunk-frames when not given"
    )
    window_frames: int | None = Field(
        None, ge=1, description="latent frames attended to, sink and chunk included; everything when not given"
    )
    sink_frames: int = Field(0, ge=0, description="first latent frames that never leave the window")
    sink_update: SinkUpdateMode = Field("static", description="whether frames that leave the window change the sink")
    sink_decay: float = Field(0.999, ge=0, le=1, description="share of itself that a moving-average sink keeps")
    kv_dtype: KVDtype | None = Field(
        None, description="int8 keeps the past in about half of bfloat16's memory; the model's own when not given"
    )
    position_mode: PositionMode = Field(
        "absolute", description="count frames from the start (ends at 1024 latent frames) or by place in the window"
    )
    context_noise: float = Field(0.0, ge=0, le=TABLE_STEPS, description="timestep at which finished chunks are cached")
    clean_pass: bool = Field(
        True, description="cache finished chunks by a pass of their own; without it as their last step left them"
    )
    max_sequence_length: int = Field(512, ge=1, le=65536, description="longest prompt in tokens")

    device: Annotated[str, BeforeValidator(_parse_device)] = Field(
        "auto", description="auto, cpu, cuda, cuda:1, mps or xpu; auto takes a GPU if there is one"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto is bfloat16 on a GPU and float32 on a CPU"
    )
    vae_tiling: bool = Field(False, description="decode in tiles: less memory, slower")
    park_vae_state: bool = Field(
        False, description="keep the VAE decoder's state in CPU memory between chunks: less GPU memory, slower"
    )

    @model_validator(mode="after")
    def _check_together(self) -> GenerateConfig:
        self._check_inputs()
        self.prompt_schedule()
        self._check_sizes()
        check_window(self.window_frames, self.sink_frames, max(self.chunk_frames, self.first_chunk_frames or 0))
        check_sink_update(self.sink_update, self.sink_frames, self.position_mode, self.kv_dtype)
        return self

    def rollout_settings(self) -> dict[str, Any]:
        """What decides how a video is made and what it takes, under the pipeline's names."""
        return {name: getattr(self, name) for name in _ROLLOUT_FIELDS}

    def prompt_schedule(self) -> dict[int, str]:
        """Later prompts by latent frame. Raises `ValueError` for a time that cannot be read or is not later."""
        schedule: dict[int, str] = {}
        for time, prompt in (self.prompt_changes or {}).items():
            frame = latent_frame_at(time, self.fps)
            if frame == 0 or frame in schedule or not prompt.strip():
                raise ValueError(f"prompt_changes at {time!r}: it must have a text and a time of its own, after 0")
            schedule[frame] = prompt
        return schedule

    def _check_inputs(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            state = "both" if self.prompt is not None else "neither"
            raise ValueError(f"give one of prompt and prompts (a file with one per line), got {state}")
        if self.image is not None and self.video is not None:
            raise ValueError("a video starts from an image or from a clip, got both image and video; leave one out")
        if self.prompt is not None and self.output.suffix.lower() != ".mp4":
            raise ValueError(f"output must be a file name that ends in .mp4, got '{self.output}'")

    def _check_sizes(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if value % SIZE_MULTIPLE:
                below = value - value % SIZE_MULTIPLE
                raise ValueError(
                    f"{name} must be a multiple of {SIZE_MULTIPLE} pixels, got {value}; "
                    f"the nearest are {below} and {below + SIZE_MULTIPLE}"
                )
            if value * self.scale > 16384:
                raise ValueError(f"{name} {value} times scale {self.scale} is more than the 16384 pixels H.264 allows")
        for name in ("denoising_steps", "first_chunk_steps"):
            steps = getattr(self, name)
            if steps is not None and (not steps or any(a <= b for a, b in itertools.pairwise(steps))):
                raise ValueError(f"{name} must descend, got {', '.join(f'{step:g}' for step in steps) or 'none'}")


# Of each pair only one makes sense, so giving one in a later layer replaces the other of an earlier one.
_EXCLUSIVE = {"prompt": "prompts", "prompts": "prompt", "image": "video", "video": "image"}


def resolve_config(*layers: dict[str, Any]) -> GenerateConfig:
    """Merge layers of keys (say a yaml file, then flags), later ones winning, over the defaults.

    Raises:
        ValueError: one line that names each problem: unknown keys (with the nearest known), values out of range.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, other in _EXCLUSIVE.items():
            if key in layer and other not in layer:
                merged.pop(other, None)
        merged |= layer
    try:
        return GenerateConfig(**merged)
    except ValidationError as error:
        raise ValueError(error_line(error, list(GenerateConfig.model_fields))) from error
