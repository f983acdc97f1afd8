"""Settings of a rollout that a viewer may choose, each with what it means; all others are the server's."""

from __future__ import annotations

from functools import cache
from typing import Any

from docstring_parser import parse_from_object

from wan_autoregressive.configs.messages import one_line
from wan_autoregressive.configs.registry import SAMPLERS, SWITCH_POLICIES
from wan_autoregressive.configs.rollout_config import CHANGEABLE, RolloutConfig
from wan_autoregressive.pipelines.input_checks import check_experts, check_extensions
from wan_autoregressive.server.live_model import LiveModel
from wan_autoregressive.server.messages import LiveSettings

_MOST_WINDOWS = 3
"""A viewer's window is at most so many times the server's own: it decides what a session costs in memory."""
_MOST_STEPS = 50


def check_settings(model: LiveModel, settings: dict[str, Any]) -> RolloutConfig:
    """The whole of what a video with these settings is made with.

    Raises:
        ValueError: a value that cannot work, or costs more than a viewer may.
    """
    most = most_of(model)
    for name, value in settings.items():
        if name in most and value > most[name]:
            raise ValueError(f"{name} is {value}; this server allows at most {most[name]}")
    config = model.config(settings)
    check_extensions(config)
    check_experts(model.pipe.wan_components(), config)
    return config


def most_of(model: LiveModel) -> dict[str, int]:
    """The largest values that are allowed."""
    window = int(model.settings["window_frames"]) * _MOST_WINDOWS
    return {"window_frames": window, "sink_frames": window, "num_inference_steps": _MOST_STEPS}


def describe_settings(model: LiveModel) -> list[dict[str, Any]]:
    """For a form: name, value, bounds or choices, meaning, and whether a video under way can change it."""
    config = model.config({})
    values = {name: getattr(config, name) for name in LiveSettings.model_fields}
    if config.num_inference_steps is None:
        values["num_inference_steps"] = len(model.pipe.scheduler.config.denoising_steps)
    choices = {
        name: [choice for choice in registry.names if _works(model, {name: choice})]
        for name, registry in (("sampler", SAMPLERS), ("switch_policy", SWITCH_POLICIES))
    }
    least = {"window_frames": 2, "sink_frames": 0, "num_inference_steps": 1}
    most, meanings = most_of(model), _meanings()
    return [
        {
            "name": name,
            "value": value,
            "choices": choices.get(name),
            "least": least.get(name),
            "most": most.get(name),
            "changeable": name in CHANGEABLE,
            "meaning": meanings[name],
        }
        for name, value in values.items()
    ]


def _works(model: LiveModel, settings: dict[str, Any]) -> bool:
    try:
        check_settings(model, settings)
    except ValueError:
        return False
    return True


@cache
def _meanings() -> dict[str, str]:
    params = parse_from_object(RolloutConfig).params
    return {param.arg_name: one_line(param.description or "").replace("`", "") for param in params}
