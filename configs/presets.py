"""Named sets of generation settings, one per published recipe, and the yaml files of users."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from wan_autoregressive.configs.generate_config import GenerateConfig
from wan_autoregressive.configs.messages import nearest, unknown_key_line


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package, sorted."""
    folder = files("wan_autoregressive.configs")
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name_or_path: str) -> dict[str, Any]:
    """Read the settings of a packaged preset (`longlive`) or of a yaml file (`mine.yaml`, `folder/mine.yaml`).

    Only the keys are checked here; values are when `resolve_config` merges them with the rest.

    Raises:
        ValueError: no such preset or file, not readable as a yaml mapping, or an unknown key (the nearest is named).
    """
    looks_like_path = name_or_path.endswith((".yaml", ".yml")) or len(Path(name_or_path).parts) != 1
    if looks_like_path:
        text = _read_file(Path(name_or_path))
    elif name_or_path in preset_names():
        text = (files("wan_autoregressive.configs") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        near = nearest(name_or_path, preset_names())
        hint = f"did you mean '{near}'? " if near else ""
        raise ValueError(
            f"unknown preset '{name_or_path}'; {hint}known are {', '.join(preset_names())}, "
            "and a file of your own is given by a name that ends in .yaml"
        )
    return _parse(text, name_or_path)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"cannot read the config file '{path}': {reason}") from error


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    # Besides its own errors PyYAML lets those of value constructors (an impossible date) and of the stack through.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"'{origin}' is not valid yaml: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"'{origin}' must hold `key: value` lines, got a {type(content).__name__}")
    known = list(GenerateConfig.model_fields)
    unknown = [unknown_key_line(key, known) for key in content if key not in known]
    if unknown:
        raise ValueError(f"'{origin}': {'; '.join(unknown)}")
    return content
