"""Everything that one `wan-ar generate` run depends on, checked before a model is loaded.

The names in `SETTING_NAMES` are at the same time the keys of a yaml file and the flags of the command: the fields of
`GenerateConfig`, and in the place of its `rollout` those of `RolloutConfig`, whatever that has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from wan_autoregressive.configs.choices import OutputType
from wan_autoregressive.configs.messages import error_line
from wan_autoregressive.configs.prompt_times import latent_frame_at, read_changes
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.demo import DEMO

SIZE_MULTIPLE = 16  # pixels: 8 per latent of the Wan 2.1 VAE, times a patch of 2
TABLE_STEPS = 1000  # training timesteps of every Wan model
MOST_FRAMES = 10_000_000  # pixel frames, a week at 16 per second; chunks are counted one by one before a run
FRAME_TYPE: OutputType = "uint8"
"""The form in which the command asks for frames."""

# What the command sets where a rollout leaves it open or does not end.
_ROLLOUT_DEFAULTS = {"height": 480, "width": 832, "num_frames": 81, "output_type": FRAME_TYPE}
_ROLLOUT_NAMES = tuple(field.name for field in fields(RolloutConfig))


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


FilePath = Annotated[Path, BeforeValidator(_parse_path)]


class GenerateConfig(BaseModel):
    """One run of `wan-ar generate`.

    Build it with `resolve_config`, which takes the settings of the rollout beside the others and turns every problem
    into a one-line ValueError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: FilePath = Path(DEMO)
    """Folder of the checkpoint (diffusers layout), a name that `wan-ar pull` got, or `demo`, the packaged one."""
    prompt: Annotated[str | None, BeforeValidator(_parse_text)] = None
    """What the video shows; repeat as '0: a fox', '5s: it snows' to change it (30: latent frame)."""
    prompts: FilePath | None = None
    """Text file with a prompt per line, each rendered to its own mp4."""
    prompt_changes: Annotated[dict[str, str] | None, BeforeValidator(read_changes)] = None
    """Later prompts by time (5s, or a latent frame), a yaml or JSON file; see also prompt."""
    negative_prompt: str | None = None
    """What to avoid; matters when guidance-scale is above 1."""
    output: FilePath | None = None
    """The mp4 to write; with prompts the folder to write them to."""
    image: FilePath | None = None
    """Image that becomes the first frame."""
    video: FilePath | None = None
    """Clip whose frames come first and are continued; with strength the source, made anew as far as num-frames."""

    fps: Annotated[float, Field(gt=0, le=1000)] = 16.0
    """Frames per second of the mp4."""
    scale: Annotated[int, Field(ge=1, le=64)] = 1
    """Repeat every pixel so many times in the mp4, to see small videos."""
    contact_sheet: bool = False
    """Also write a PNG with frames from start to end beside the mp4."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Drawn and noted in the report when not given."""

    shift: Annotated[float, Field(gt=0)] | None = None
    """Timestep shift; the model's own when not given."""
    warp: bool | None = None
    """Look the steps up in the shifted table; the model's own when not given."""

    device: Annotated[str, BeforeValidator(_parse_device)] = "auto"
    """auto, cpu, cuda, cuda:1, mps or xpu; auto takes a GPU if there is one."""
    vae_device: Annotated[str | None, BeforeValidator(_parse_device)] = None
    """Device of the VAE, if it has one of its own: with decode-alongside it decodes while the other denoises."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    vae_tiling: bool = False
    """Decode in tiles: less memory, slower."""
    tiny_vae: FilePath | None = None
    """Tiny VAE (TAEHV) to use instead of the checkpoint's own: a folder, or a published .pth or .safetensors."""
    tiny_vae_latents: Literal["normalised", "raw"] = "normalised"
    """What the latents of a tiny VAE in a single file are; raw for LightTAE, which the file does not tell."""

    rollout: RolloutConfig
    """Settings of the video itself."""

    @model_validator(mode="before")
    @classmethod
    def _gather_rollout(cls, values: Any) -> Any:
        """Move the rollout's settings to where they belong."""
        if not isinstance(values, Mapping) or "rollout" in values:
            return values
        rollout = _ROLLOUT_DEFAULTS | {name: value for name, value in values.items() if name in _ROLLOUT_NAMES}
        for name in ("denoising_steps", "first_chunk_steps"):
            rollout[name] = _parse_steps(name, rollout.get(name))
        return {name: value for name, value in values.items() if name not in _ROLLOUT_NAMES} | {"rollout": rollout}

    @model_serializer(mode="wrap")
    def _as_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As in a yaml file: one level."""
        values: dict[str, Any] = dump(self)
        rollout = values.pop("rollout")
        return values | rollout

    @model_validator(mode="after")
    def _check_together(self) -> GenerateConfig:
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("give one of prompt and prompts (a file with one per line), got both")
        if self.image is not None and self.video is not None:
            raise ValueError("a video starts from an image or from a clip, got both image and video; leave one out")
        if self.rollout.strength is not None and self.video is None:
            raise ValueError("strength makes a video anew from another; give that as video")
        if self.output is not None and self.prompts is None and self.output.suffix.lower() != ".mp4":
            raise ValueError(f"output must be a file name that ends in .mp4, got '{self.output}'")
        self.prompt_schedule()
        _check_numbers(self.rollout)
        for name in ("height", "width"):
            if getattr(self.rollout, name) * self.scale > 16384:
                raise ValueError(
                    f"{name} {getattr(self.rollout, name)} times scale {self.scale} is more than the 16384 pixels "
                    "H.264 allows"
                )
        return self

    def prompt_schedule(self) -> dict[int, str]:
        """Later prompts by latent frame. Raises `ValueError` for a time that cannot be read or is not later."""
        schedule: dict[int, str] = {}
        for time, prompt in (self.prompt_changes or {}).items():
            frame = latent_frame_at(time, self.fps)
            if frame == 0 or frame in schedule or not prompt.strip():
                raise ValueError(f"prompt_changes at {time!r}: it must have a text and a time of its own, after 0")
            schedule[frame] = prompt
        return schedule

    def rollout_settings(self) -> dict[str, Any]:
        """The settings of the rollout as keywords of the pipeline."""
        return {name: getattr(self.rollout, name) for name in _ROLLOUT_NAMES}


SETTING_NAMES = (*(name for name in GenerateConfig.model_fields if name != "rollout"), *_ROLLOUT_NAMES)


def _parse_steps(name: str, value: Any) -> Any:
    """Turn `4` into 1000, 750, 500, 250 and `1000,757,522` into a list; leave the rest to pydantic."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        if len(parts) == 1 and parts[0].isdecimal() and len(parts[0]) < 10:
            value = int(parts[0])
        else:
            return [part for part in parts if part]
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= TABLE_STEPS:
            raise ValueError(f"{name}: a count of steps must be between 1 and {TABLE_STEPS}, got {value}")
        return [round(TABLE_STEPS * (value - index) / value) for index in range(value)]
    return value


def _check_numbers(rollout: RolloutConfig) -> None:
    """Raise `ValueError` for what an mp4 cannot be made of, or what a Wan model would refuse once it is loaded."""
    if rollout.num_frames is None:
        raise ValueError("num_frames is not set; an mp4 has an end, so say how many frames it has")
    if rollout.num_frames > MOST_FRAMES:
        raise ValueError(f"num_frames is {rollout.num_frames}; it must be at most {MOST_FRAMES}")
    if rollout.output_type not in ("np", "uint8"):
        raise ValueError(f"output_type is {rollout.output_type!r}; an mp4 is made of np or uint8 frames")
    for name in ("height", "width"):
        size = getattr(rollout, name)
        if size % SIZE_MULTIPLE:
            below = size - size % SIZE_MULTIPLE
            near = f"{below} and {below + SIZE_MULTIPLE}" if below else f"{SIZE_MULTIPLE}"
            raise ValueError(f"{name} must be a multiple of {SIZE_MULTIPLE} pixels, got {size}; the nearest: {near}")


# Of each pair only one makes sense, so giving one in a later layer replaces the other of an earlier one.
_EXCLUSIVE = (("prompt", "prompts"), ("image", "video"), ("denoising_steps", "num_inference_steps"))


def resolve_config(*layers: dict[str, Any]) -> GenerateConfig:
    """Merge layers of keys (say a yaml file, then flags), later ones winning, over the defaults.

    Raises:
        ValueError: one line that names each problem: unknown keys (with the nearest known), values out of range.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for pair in _EXCLUSIVE:
            for key, other in (pair, pair[::-1]):
                if key in layer and other not in layer:
                    merged.pop(other, None)
        merged |= layer
    try:
        return GenerateConfig.model_validate(merged)
    except ValidationError as error:
        raise ValueError(error_line(error, SETTING_NAMES)) from error
