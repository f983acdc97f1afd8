"""The flags of `wan-ar generate`, made from the fields of `GenerateConfig`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from wan_autoregressive.configs import GenerateConfig, load_preset, preset_names, resolve_config
from wan_autoregressive.configs.prompt_times import split_timed_prompts
from wan_autoregressive.demo import DEMO

# Flags with a shorter name than their field has in Python, and what they take where the type does not say it.
_SHORT_FLAGS = {"denoising_steps": "--steps"}
_METAVARS = {"denoising_steps": "N|T,T,…", "device": "NAME"}


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and a flag per field; a flag that is not given leaves no trace in the parsed arguments."""
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help=f"settings to start from: {', '.join(preset_names())}, or a yaml file; flags come on top",
    )
    for name, field in GenerateConfig.model_fields.items():
        flags = [f"--{name.replace('_', '-')}"]
        if name in _SHORT_FLAGS:
            flags.insert(0, _SHORT_FLAGS[name])
        kinds = _kinds(field.annotation)
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(field)}
        if bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        elif name == "prompt":
            options |= {"action": "append", "metavar": "TEXT|TIME: TEXT"}
        else:
            # The words go to pydantic as they are: one place that converts, one wording of what is wrong.
            options["metavar"] = _METAVARS.get(name) or _metavar(kinds)
        parser.add_argument(*flags, **options)


def add_resume_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--checkpoint-every` and `--resume`, which say how a video is made and not which one."""
    parser.add_argument(
        "--checkpoint-every",
        type=_count,
        metavar="N",
        help="save what is done every N chunks in OUTPUT.resume, so that --resume can go on after a crash or Ctrl-C",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an earlier run of the same command was cut off"
    )


def add_decode_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--decode-alongside`, which changes when the work is done and no pixel."""
    parser.add_argument(
        "--decode-alongside",
        action="store_true",
        help="decode a chunk while the next one is denoised; the same video, and not always a faster one on a CPU",
    )


def config_from_args(args: argparse.Namespace) -> GenerateConfig:
    """Resolve defaults < yaml < flags.

    Raises:
        ValueError: in one line, what is unknown, missing or out of range.
    """
    flags = {name: value for name, value in vars(args).items() if name in GenerateConfig.model_fields}
    if "prompt" in flags:
        flags["prompt"], changes = split_timed_prompts(flags["prompt"])
        if changes:
            flags["prompt_changes"] = changes | flags.get("prompt_changes", {})
    settings = load_preset(args.config) if args.config is not None else {}
    model = flags.get("model", settings.get("model", DEMO))
    # The demo makes small videos only: its settings are the defaults where nothing else is said.
    return resolve_config(load_preset(DEMO) if str(model) == DEMO else {}, settings, flags)


def _kinds(annotation: Any) -> set[type]:
    """The types that an annotation allows, through unions, tuples and Annotated."""
    parts = get_args(annotation)
    if not parts:
        return {annotation} if isinstance(annotation, type) else set()
    return set().union(*(_kinds(part) for part in parts))


def _metavar(kinds: set[type]) -> str:
    names = ((Path, "PATH"), (int, "N"), (float, "X"), (str, "TEXT"))
    return next((name for kind, name in names if kind in kinds), "NAME")


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    if field.default is None or field.default is False or field.is_required():
        return text
    return (
        f"{text} (default: {field.default:g})"
        if isinstance(field.default, float)
        else f"{text} (default: {field.default})"
    )


def _count(word: str) -> int:
    """A flag's value as a whole number of at least 1."""
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {word[:40]!r}")
    return value
