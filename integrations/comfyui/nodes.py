"""Load, settings, prompts, generate, extend.

ComfyUI keeps what a node returned and gives it to every node that is linked to it, so nothing that comes in is
changed: a video is extended on a copy of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from wan_autoregressive.configs import GenerateConfig, load_preset, preset_names, resolve_config
from wan_autoregressive.configs.checkpoints import published_checkpoints, pulled_folder
from wan_autoregressive.configs.messages import unknown_key_line
from wan_autoregressive.configs.prompt_times import split_timed_prompts
from wan_autoregressive.configs.read_yaml import parse_yaml
from wan_autoregressive.configs.registry import SAMPLERS
from wan_autoregressive.configs.rollout_config import RolloutSettings
from wan_autoregressive.demo import DEMO
from wan_autoregressive.integrations.comfyui.chunks import make_chunks
from wan_autoregressive.pipelines import WanAutoregressivePipeline, WanRollout
from wan_autoregressive.scripts.load_pipeline import load_pipeline, model_folder, set_scheduler

OF_PRESET = "of the preset"
MODEL, SETTINGS, PROMPTS, VIDEO = "WAN_AR_MODEL", "WAN_AR_SETTINGS", "WAN_AR_PROMPTS", "WAN_AR_VIDEO"
_OF_GENERATE = {"num_frames", "output_type", "strength"}
MORE = sorted(RolloutSettings.__annotations__.keys() - _OF_GENERATE | {"negative_prompt", "shift", "warp", "fps"})
Types = dict[str, dict[str, tuple[Any, ...]]]


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline, and the preset that the checkpoint is published with."""

    pipe: WanAutoregressivePipeline
    preset: str | None


class WanNode:
    """What ComfyUI asks of a class: `INPUT_TYPES`, names and types of what it returns, and which method runs."""

    CATEGORY = "Wan autoregressive"
    FUNCTION = "run"
    RETURN_TYPES: ClassVar[tuple[str, ...]]
    RETURN_NAMES: ClassVar[tuple[str, ...]]


class WanARLoad(WanNode):
    """A checkpoint in diffusers' layout, with the preset of its name."""

    DESCRIPTION = "`demo`, a name that `wan-ar pull` got, or the folder of a checkpoint in diffusers' layout."
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Types:  # noqa: N802
        here = [name for name in published_checkpoints() if (pulled_folder(name) / "model_index.json").is_file()]
        return {
            "required": {"checkpoint": ([DEMO, *here], {"default": DEMO})},
            "optional": {
                "folder": ("STRING", {"default": "", "tooltip": "Instead of a name: the folder of a checkpoint."}),
                "dtype": (["auto", "float32", "bfloat16", "float16"],),
                "device": ("STRING", {"default": "auto"}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, checkpoint: str, folder: str = "", **_: str) -> float:  # noqa: N802
        """Load again once the checkpoint was written anew."""
        index = model_folder(resolve_config({"model": folder.strip() or checkpoint})) / "model_index.json"
        return index.stat().st_mtime if index.is_file() else float("nan")

    def run(self, checkpoint: str, folder: str = "", dtype: str = "auto", device: str = "auto") -> tuple[LoadedModel]:
        name = folder.strip() or checkpoint
        published = published_checkpoints().get(name)
        preset = DEMO if name == DEMO else published.preset if published else None
        config = resolve_config(
            load_preset(preset) if preset else {}, {"model": name, "dtype": dtype, "device": device}
        )
        return (LoadedModel(load_pipeline(config), preset),)


class WanARSettings(WanNode):
    """How a video is made: a preset, and what differs from it."""

    DESCRIPTION = "Without this node a video is made with the preset of its checkpoint."
    RETURN_TYPES, RETURN_NAMES = (SETTINGS,), ("settings",)

    @classmethod
    def INPUT_TYPES(cls) -> Types:  # noqa: N802
        size = (
            "INT",
            {"default": 0, "min": 0, "max": 16384, "step": 16, "tooltip": "Pixels; 0 is that of the preset."},
        )
        return {
            "required": {
                "preset": (["of the checkpoint", *preset_names()],),
                "height": size,
                "width": size,
                "window_frames": (
                    "INT",
                    {"default": 0, "min": 0, "max": 4096, "tooltip": "Latent; 0: as the preset."},
                ),
                "sampler": ([OF_PRESET, *SAMPLERS.names],),
                "more": ("STRING", {"default": "", "multiline": True, "tooltip": "Settings as in a yaml file."}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, more: str) -> bool | str:  # noqa: N802
        try:
            _more(more)
        except ValueError as error:
            return str(error)
        return True

    def run(
        self, preset: str, height: int, width: int, window_frames: int, sampler: str, more: str
    ) -> tuple[dict[str, Any]]:
        given = {"height": height, "width": width, "window_frames": window_frames}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value}
        if sampler != OF_PRESET:
            changes["sampler"] = sampler
        settings = {"preset": preset if preset in preset_names() else None, "changes": changes | _more(more)}
        return (settings,)


class WanARPrompts(WanNode):
    """One prompt, or several with their times."""

    DESCRIPTION = "A prompt; or a line for each: `0: a fox`, `5s: it snows`, `30: night falls` (latent frames)."
    RETURN_TYPES, RETURN_NAMES = (PROMPTS,), ("prompts",)

    @classmethod
    def INPUT_TYPES(cls) -> Types:  # noqa: N802
        return {"required": {"text": ("STRING", {"default": "", "multiline": True, "dynamicPrompts": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, text: str) -> bool | str:  # noqa: N802
        try:
            _prompts(text)
        except ValueError as error:
            return str(error)
        return True

    def run(self, text: str) -> tuple[dict[str, Any]]:
        return (_prompts(text),)


class WanARGenerate(WanNode):
    """A video from its start."""

    DESCRIPTION = "Makes so many chunks (3 latent frames, 12 pixel frames, unless settings say otherwise)."
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", VIDEO), ("frames", "video")

    @classmethod
    def INPUT_TYPES(cls) -> Types:  # noqa: N802
        return {
            "required": {
                "model": (MODEL,),
                "prompts": (PROMPTS,),
                "chunks": ("INT", {"default": 7, "min": 1, "max": 100_000}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
            },
            "optional": {"settings": (SETTINGS,), "image": ("IMAGE",)},
        }

    def run(
        self,
        model: LoadedModel,
        prompts: Mapping[str, Any],
        chunks: int,
        seed: int,
        settings: Mapping[str, Any] | None = None,
        image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, WanRollout]:
        """`image` is `(1, height, width, 3)` in [0, 1]; frames come as `(frames, height, width, 3)`."""
        config = _config(model, settings, prompts)
        pipe = WanAutoregressivePipeline(**model.pipe.components, boundary_ratio=model.pipe.config.boundary_ratio)
        set_scheduler(pipe, config)
        rollout = pipe.rollout(
            config.prompt,
            negative_prompt=config.negative_prompt,
            prompt_schedule=config.prompt_schedule(),
            image=None if image is None else image[:1].movedim(-1, 1),
            generator=torch.Generator("cpu").manual_seed(seed),
            **config.rollout_settings() | {"num_frames": None, "output_type": "pt"},
        )
        return make_chunks(rollout, chunks), rollout


class WanARExtend(WanNode):
    """More of a video, from where it is."""

    DESCRIPTION = "Makes so many chunks more, under another prompt if there is one. Returns the new frames."
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", VIDEO), ("new frames", "video")

    @classmethod
    def INPUT_TYPES(cls) -> Types:  # noqa: N802
        return {
            "required": {"video": (VIDEO,), "chunks": ("INT", {"default": 7, "min": 1, "max": 100_000})},
            "optional": {"prompt": ("STRING", {"default": "", "multiline": True, "dynamicPrompts": True})},
        }

    def run(self, video: WanRollout, chunks: int, prompt: str = "") -> tuple[torch.Tensor, WanRollout]:
        rollout = video.fork()
        if prompt.strip():
            rollout.set_prompt(prompt.strip())
        return make_chunks(rollout, chunks), rollout


def _prompts(text: str) -> dict[str, Any]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("the prompt is empty; say what the video shows")
    first, changes = split_timed_prompts(lines)
    return {"prompt": first, "prompt_changes": changes or None}


def _more(text: str) -> dict[str, Any]:
    """Lines `key: value`. Raises `ValueError` for a key that is no setting of a video, with the nearest that is."""
    settings = parse_yaml(text, "more") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"more takes lines such as `sink_frames: 3`, got {text.strip()!r}")
    if unknown := [unknown_key_line(key, MORE) for key in settings if key not in MORE]:
        raise ValueError("; ".join(unknown))
    return settings


def _config(model: LoadedModel, settings: Mapping[str, Any] | None, prompts: Mapping[str, Any]) -> GenerateConfig:
    """The checkpoint's preset or the chosen one, then what differs from it, then the prompts."""
    settings = settings or {"preset": None, "changes": {}}
    preset = settings["preset"] or model.preset
    return resolve_config(load_preset(preset) if preset else {}, settings["changes"], dict(prompts))


_NODES = {
    "WanARLoad": (WanARLoad, "Load (Wan autoregressive)"),
    "WanARSettings": (WanARSettings, "Settings (Wan autoregressive)"),
    "WanARPrompts": (WanARPrompts, "Prompts (Wan autoregressive)"),
    "WanARGenerate": (WanARGenerate, "Generate (Wan autoregressive)"),
    "WanARExtend": (WanARExtend, "Extend (Wan autoregressive)"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in _NODES.items()}
