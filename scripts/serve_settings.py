"""The flags of `wan-ar serve` that say how videos are made: those of `wan-ar generate`, as far as they fit."""

from __future__ import annotations

import argparse
from typing import Any, get_args, get_type_hints

from docstring_parser import parse_from_object

from wan_autoregressive.configs import GenerateConfig, load_preset, preset_names, resolve_config
from wan_autoregressive.configs.messages import one_line
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.demo import DEMO
from wan_autoregressive.scripts.generate_flags import settings_of_model

# What a live video has of its own, what comes from the viewer, and what is no single word.
_NOT_HERE = ("num_frames", "output_type", "strength", "sampler_options", "switch_options")
_VAE = ("vae_tiling", "tiny_vae", "tiny_vae_latents")
_OF_GENERATE = (
    "model",
    "fps",
    "scale",
    "shift",
    "warp",
    "device",
    "dtype",
    "vae_tiling",
    "tiny_vae",
    "tiny_vae_latents",
)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting, without a default: what is not given stays as preset and model have it."""
    rollout = [name for name in RolloutConfig.__dataclass_fields__ if name not in _NOT_HERE]
    for title, part, names in (("model", GenerateConfig, _OF_GENERATE), ("videos", RolloutConfig, rollout)):
        group = parser.add_argument_group(title)
        hints = get_type_hints(part)
        texts = {entry.arg_name: entry.description or "" for entry in parse_from_object(part).params}
        if part is GenerateConfig:
            group.add_argument(
                *("--config", "--preset"),
                metavar="NAME",
                help=f"settings to start from: {', '.join(preset_names())}, or a yaml file; flags come on top",
            )
        for name in names:
            flags = ["--steps", "--denoising-steps"] if name == "denoising_steps" else [_flag(name)]
            is_bool = hints[name] is bool or bool in get_args(hints[name])
            kind: Any = {"action": argparse.BooleanOptionalAction} if is_bool else {"metavar": "VALUE"}
            help_text = one_line(texts.get(name, "")).replace("%", "%%")
            group.add_argument(*flags, dest=name, default=None, help=help_text, **kind)


def read_settings(args: argparse.Namespace) -> GenerateConfig:
    """Defaults, those of the model, the preset, the flags; later ones win.

    Raises:
        ValueError: one line for each problem.
    """
    flags = {name: getattr(args, name) for name in (*_OF_GENERATE, *RolloutConfig.__dataclass_fields__)
             if getattr(args, name, None) is not None}  # fmt: skip
    file = {} if args.config is None else load_preset(args.config)
    model = str(flags.get("model", file.get("model")) or DEMO)
    return resolve_config(settings_of_model(model, args.config), file, flags)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
