"""What earlier runs of `wan-ar generate` left: whether it was made with the same settings as are asked for now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wan_autoregressive.configs import SETTING_NAMES, GenerateConfig, resolve_config
from wan_autoregressive.configs.messages import shown

# Where a video goes, what computes it and in which form frames come to the encoder do not make it another video.
_BESIDE_THE_POINT = {"output", "device", "vae_device", "prompts", "output_type"}


def first_difference(
    earlier: dict[str, Any], config: GenerateConfig, ignore: frozenset[str] = frozenset()
) -> str | None:
    """Say in words the first setting that differs from those of an earlier run; None when they are the same.

    Args:
        earlier: `GenerateConfig.model_dump(mode="json")` of that run.
        ignore: settings that may differ, beside where the output goes and which device computes it.
    """
    present, defaults = config.model_dump(mode="json"), resolve_config({}).model_dump(mode="json")
    for name in SETTING_NAMES:
        if name in _BESIDE_THE_POINT or name in ignore:
            continue
        # A run of an older version does not know newer settings: it had what is their default now.
        was = earlier.get(name, defaults[name])
        now = present[name]
        if name in ("model", "image", "video") and isinstance(was, str) and now is not None:
            was, now = str(Path(was).resolve()), str(Path(now).resolve())
        if was != now:
            return f"{name.replace('_', '-')} was {_shown(was)} and is {_shown(now)} now"
    return None


def finished_seed(output: Path, config: GenerateConfig) -> int | None:
    """The seed of the video at `output` if it is there and its report says that it was made with these settings.

    Args:
        config: of this one video, with the model's own settings filled in; any seed will do if it has none.
    """
    if not output.is_file():
        return None
    try:
        report = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
        seed, earlier = report["seed"], report["config"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(seed, int) or not isinstance(earlier, dict):
        return None
    ignore = frozenset() if config.seed is not None else frozenset({"seed"})
    return None if first_difference(earlier, config, ignore) else seed


def _shown(value: Any) -> str:
    return "not given" if value is None else shown(value)
