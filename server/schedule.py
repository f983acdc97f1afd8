"""A live video as a settings file of `wan-ar generate`, which renders the same frames, and such a file as a start."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from wan_autoregressive.configs import load_preset, resolve_config
from wan_autoregressive.configs.messages import one_line
from wan_autoregressive.configs.prompt_times import latent_frame_of
from wan_autoregressive.configs.read_yaml import parse_yaml
from wan_autoregressive.demo import DEMO, demo_checkpoint
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.live_settings import check_settings
from wan_autoregressive.server.made_by import check_made_by
from wan_autoregressive.server.messages import LiveSettings
from wan_autoregressive.server.timeline import Timeline
from wan_autoregressive.server.video_folder import IMAGE_NAME

MAX_BYTES = 64 * 1024
_WITHOUT_MEANING = {"num_frames", "output_type", "park_vae_state", "strength"}
"""Settings of a rollout that do not have to agree with the server's."""
NOT_TAKEN = ("prompts", "video", "strength")
"""Of a settings file: a live video has none of these."""


def export_schedule(values: dict[str, Any], branch: int | None, model: LiveModel) -> str:
    """The yaml of a branch.

    Args:
        values: What `LiveVideo.describe` gave.

    Raises:
        KeyError: there is no branch of that number.
        ValueError: it has no chunk yet, or something was done that no settings file can say.
    """
    path, model = Timeline.from_dict(values).branch_path(branch), _model_of(values, model)
    if not path:
        raise ValueError("there is no chunk yet")
    if "made_by" in values:  # it is not open here, and may be from another time
        check_made_by(values["made_by"], model)
    if values.get("from_camera"):
        raise ValueError("a video from the camera cannot be rendered again")
    for chunk in path:
        if chunk.new_seed is not None and chunk.index:
            raise ValueError(f"the noise was begun anew at {chunk.start_frame / model.fps:g} s, which no file can say")
        if chunk.near:
            raise ValueError(f"the past was made anew at {chunk.start_frame / model.fps:g} s, nearly as it was")
        if chunk.new_settings and chunk.index:
            raise ValueError(f"settings changed at {chunk.start_frame / model.fps:g} s, which no file can say")
    settings = {**values["settings"], **(path[0].new_settings or {})}
    layer: dict[str, Any] = {"prompt": path[0].prompt}
    layer["prompt_changes"] = {
        str(latent_frame_of(chunk.start_frame)): chunk.new_prompt for chunk in path[1:] if chunk.new_prompt is not None
    }
    layer["seed"] = values["seed"] if path[0].new_seed is None else path[0].new_seed
    layer["num_frames"] = path[-1].stop_frame
    layer |= {"fps": model.fps, "scale": model.scale}
    layer |= _rollout_keys(model, settings)
    if values["from_image"]:
        layer["image"] = IMAGE_NAME
    return _head(model, values["from_image"]) + yaml.safe_dump(layer, sort_keys=False, allow_unicode=True, width=100)


def import_schedule(text: str, model: LiveModel) -> dict[str, Any]:
    """What a start message has to hold for a settings file: `prompt`, `prompt_changes`, `seed`, `settings`; and
    `image`, the name of the picture that is still to be sent.

    Raises:
        ValueError: it is no settings file, or asks for what this server does not make.
    """
    given = parse_yaml(text, "the schedule")
    if not isinstance(given, dict):
        raise ValueError(f"a schedule holds `key: value` lines, got a {type(given).__name__}")
    changes = given.get("prompt_changes")
    if not isinstance(changes, dict | None):  # a name of a file would be one of the server's
        raise ValueError("prompt_changes must be times and prompts, such as '5s: it snows'")
    for name in NOT_TAKEN:
        if given.get(name) is not None:
            raise ValueError(f"{name} cannot be used here; take it out of the file")
    given = {**given, "prompt_changes": {str(time): prompt for time, prompt in (changes or {}).items()} or None}
    config = resolve_config(_baseline(model), given)
    if config.prompt is None:
        raise ValueError("the file has no prompt")
    if (config.fps, config.negative_prompt or None) != (model.fps, None):
        raise ValueError(f"this server makes {model.fps:g} frames per second and takes no negative_prompt")
    settings = {name: getattr(config.rollout, name) for name in LiveSettings.model_fields if name != "strength"}
    settings = {name: value for name, value in settings.items() if value is not None}
    own = check_settings(model, settings)
    for field in dataclasses.fields(own):
        name, asked, made = field.name, getattr(config.rollout, field.name), getattr(own, field.name)
        if name == "denoising_steps" and settings.get("num_inference_steps") is None:
            asked, made = asked or _steps(model), made or _steps(model)
        if name not in _WITHOUT_MEANING and asked != made:
            raise ValueError(f"{name} is {asked} in the file, and this server makes videos with {made}")
    return {
        "prompt": config.prompt,
        "prompt_changes": config.prompt_changes,
        "seed": config.seed,
        "settings": settings,
        "image": None if config.image is None else config.image.name,
    }


def describe_making(values: dict[str, Any], branch: int | None, model: LiveModel) -> dict[str, Any]:
    """How a branch was made, for the JSON beside its mp4. `KeyError` if there is none of that number."""
    path, model = Timeline.from_dict(values).branch_path(branch), _model_of(values, model)
    return {
        **{name: values[name] for name in ("session", "model", "fps", "seed", "from_image")},
        "from_camera": values.get("from_camera", False),
        "settings": _plain(dataclasses.asdict(check_settings(model, values["settings"]))),
        "frames": path[-1].stop_frame if path else 0,
        "chunks": [dataclasses.asdict(chunk) for chunk in path],
    }


def _model_of(values: dict[str, Any], model: LiveModel) -> LiveModel:
    """With the settings that it had when the video was begun."""
    return model.with_settings(values["server_settings"]) if "server_settings" in values else model


def _rollout_keys(model: LiveModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that differ from what the command takes by itself, and the sizes in any case."""
    config, baseline = check_settings(model, settings), resolve_config(_baseline(model))
    keys = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in _WITHOUT_MEANING
        and (name in ("height", "width", *LiveSettings.model_fields) or value != getattr(baseline.rollout, name))
    }
    keys = {name: value for name, value in keys.items() if value is not None}
    if config.num_inference_steps is None:
        keys["denoising_steps"] = config.denoising_steps or _steps(model)
    scheduler = model.pipe.scheduler.config
    return _plain({**keys, "shift": float(scheduler.shift), "warp": bool(scheduler.warp)})


def _steps(model: LiveModel) -> tuple[float, ...]:
    return tuple(float(step) for step in model.pipe.scheduler.config.denoising_steps)


def _baseline(model: LiveModel) -> dict[str, Any]:
    return load_preset(DEMO) if model.name == demo_checkpoint().name else {}


def _head(model: LiveModel, from_image: bool) -> str:
    lines = ["wan-ar generate --config THIS_FILE --output video.mp4"]
    if model.name != demo_checkpoint().name:
        lines[0] += f" --model {one_line(model.name)}"
    if from_image:
        lines.append(f"The picture that it starts from comes along as {IMAGE_NAME}.")
    return "".join(f"# {line}\n" for line in lines)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Tuples and mappings as yaml and JSON have them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
