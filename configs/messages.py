"""Turn what pydantic found into one line that a user can act on."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import ValidationError

# Words that users of the command or of other projects would write, and what they are called here.
SYNONYMS = {
    "steps": "denoising_steps",
    "denoising_step_list": "denoising_steps",
    "timestep_shift": "shift",
    "flow_shift": "shift",
    "warp_denoising_step": "warp",
    "num_frame_per_block": "chunk_frames",
    "local_attn_size": "window_frames",
    "sink_size": "sink_frames",
    "frames": "num_frames",
    "cfg": "guidance_scale",
}

_shortened = reprlib.Repr()  # a value can be small in memory and without end in print
_shortened.maxlevel = 2
_shortened.maxstring = _shortened.maxother = 60


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` most likely means, or None."""
    if word in SYNONYMS:
        return SYNONYMS[word]
    matches = get_close_matches(word.replace("-", "_").lower(), list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_key_line(key: object, known: Iterable[str]) -> str:
    """Say that `key` is not a setting and which one is nearest."""
    near = nearest(str(key), known)
    return f"unknown key {one_line(shown(str(key)))}" + (f"; did you mean '{near}'?" if near else "")


def error_line(error: ValidationError, known: Iterable[str]) -> str:
    """Join all problems of a validation error into one line, each with the key, the rule and the value got."""
    known = list(known)
    problems: dict[str, None] = {}  # a set that keeps the order
    for item in error.errors(include_url=False):
        path = item["loc"][1:] if item["loc"][:1] == ("rollout",) else item["loc"]
        key = ".".join(str(part) for part in path if part not in ("function-before", "str"))
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems[unknown_key_line(key, known)] = None
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
            problems[f"{key}: {message}" if key else message] = None
        else:
            rule = item["msg"].replace("Input should be", "must be").replace("greater than or equal to", "at least")
            rule = rule.replace("less than or equal to", "at most").removeprefix("Value error, ")
            problems[f"{key}: {rule}, got {shown(item['input'])}"] = None
    return one_line("; ".join(problems))


def one_line(text: str) -> str:
    """The text with every run of white space, line breaks of all alphabets included, as one space."""
    return " ".join(text.split())


def shown(value: object) -> str:
    """A value as a message shows it: at most 60 characters, however large it is."""
    text = _shortened.repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
