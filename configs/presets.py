"""Named sets of generation settings, one per published recipe, and the yaml files of users."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from wan_autoregressive.configs.generate_config import SETTING_NAMES
from wan_autoregressive.configs.messages import nearest, unknown_key_line
from wan_autoregressive.configs.read_yaml import parse_yaml, read_text

CHECKPOINTS_FILE = "checkpoints.yaml"
"""The one yaml file beside the presets that is none."""


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package, sorted."""
    folder = files("wan_autoregressive.configs")
    names = {entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")} - {CHECKPOINTS_FILE}
    return sorted(Path(name).stem for name in names)


def is_settings_file(name_or_path: str) -> bool:
    """Whether this is the path of a yaml file (`mine.yaml`, `folder/mine`) and not the name of a preset."""
    return name_or_path.endswith((".yaml", ".yml")) or len(Path(name_or_path).parts) != 1


def load_preset(name_or_path: str) -> dict[str, Any]:
    """Read the settings of a packaged preset (`longlive`) or of a yaml file (`mine.yaml`, `folder/mine.yaml`).

    Only the keys are checked here; values are when `resolve_config` merges them with the rest.

    Raises:
        ValueError: no such preset or file, not readable as a yaml mapping, or an unknown key (the nearest is named).
    """
    if is_settings_file(name_or_path):
        text = read_text(Path(name_or_path), "config file")
    elif name_or_path in preset_names():
        text = (files("wan_autoregressive.configs") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        near = nearest(name_or_path, preset_names())
        hint = f"did you mean '{near}'? " if near else ""
        raise ValueError(
            f"unknown preset '{name_or_path}'; {hint}known are {', '.join(preset_names())}, "
            "and a file of your own is given by a name that ends in .yaml"
        )
    content = parse_yaml(text, name_or_path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"'{name_or_path}' must hold `key: value` lines, got a {type(content).__name__}")
    unknown = [unknown_key_line(key, SETTING_NAMES) for key in content if key not in SETTING_NAMES]
    if unknown:
        raise ValueError(f"'{name_or_path}': {'; '.join(unknown)}")
    return content
