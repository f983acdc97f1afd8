"""Prompts that change in the middle of a video: `0: a fox`, `5s: it snows`, `30: night falls`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from wan_autoregressive.configs.read_yaml import read_yaml

LATENT_PIXEL_FRAMES = 4  # pixel frames of every latent frame but the first, in all Wan VAEs

_TIME = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(s?)")
_TIMED = re.compile(r"\s*(\d+(?:\.\d+)?s?)\s*:\s+(.*)", re.DOTALL)


def split_timed_prompts(prompts: list[str]) -> tuple[str, dict[str, str]]:
    """The first prompt and the changes, by time, of several `TIME: text` entries; one plain text has no changes.

    Raises:
        ValueError: several entries of which one has no time, none starts at 0, or two have the same time.
    """
    timed = [_TIMED.fullmatch(prompt) for prompt in prompts]
    if len(prompts) == 1 and timed[0] is None:
        return prompts[0], {}
    changes: dict[str, str] = {}
    for prompt, match in zip(prompts, timed, strict=True):
        if match is None:
            raise ValueError(
                f"prompt {prompt!r} has no time; with several, each says when: '0: a fox', '5s: it snows' (seconds) "
                "or '30: night falls' (latent frames)"
            )
        time, text = match.groups()
        if time in changes:
            raise ValueError(f"two prompts start at {time}: {changes[time]!r} and {text!r}")
        changes[time] = text
    first = [time for time in changes if float(time.rstrip("s")) == 0]
    if not first:
        raise ValueError(f"no prompt starts at 0; the first of {', '.join(changes)} would come too late")
    return changes.pop(first[0]), changes


def read_changes(value: Any) -> Any:
    """A mapping of times to prompts as it is, or read from a yaml or JSON file."""
    if not isinstance(value, str | Path):
        return value
    content = read_yaml(Path(value), "prompt changes")
    if not isinstance(content, dict):
        raise ValueError(
            f"'{value}' must hold times and prompts, such as '5s: it snows', got {type(content).__name__}"
        )
    return {str(time): prompt for time, prompt in content.items()}


def latent_frame_at(time: str, fps: float) -> int:
    """The latent frame at a time: `5s` in seconds, a plain whole number in latent frames.

    Raises:
        ValueError: it is neither.
    """
    match = _TIME.fullmatch(time.strip())
    if match is None or (not match[2] and "." in match[1]):
        raise ValueError(f"time {time!r} is neither seconds, as in 5s or 2.5s, nor a whole number of latent frames")
    if not match[2]:
        return int(match[1])
    return latent_frame_of(round(float(match[1]) * fps))


def latent_frame_of(pixel_frame: int) -> int:
    """The first latent frame that begins at a pixel frame or later."""
    return -(-pixel_frame // LATENT_PIXEL_FRAMES)
