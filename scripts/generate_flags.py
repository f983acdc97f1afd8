"""The flags of `wan-ar generate`: one per setting in `SETTING_NAMES`, and those that say how a run is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter
from docstring_parser import parse_from_object

from wan_autoregressive.configs import GenerateConfig, load_preset, preset_names, resolve_config
from wan_autoregressive.configs.checkpoints import published_checkpoints
from wan_autoregressive.configs.generate_config import SETTING_NAMES
from wan_autoregressive.configs.messages import one_line
from wan_autoregressive.configs.presets import is_settings_file
from wan_autoregressive.configs.prompt_times import read_changes, split_timed_prompts
from wan_autoregressive.configs.read_yaml import parse_yaml
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.demo import DEMO
from wan_autoregressive.scripts.spread_flags import Spread

_EVERYDAY = ("prompt", "output", "model", "num_frames", "height", "width", "seed", "image", "video")  # and --config
_FIRST, _RUN, _LIST, _FILE, _ROLLOUT = (
    Group(name, sort_key=number)
    for number, name in enumerate(
        ("Everyday", "This run", "Many videos, many machines", "Inputs, file and machine", "Rollout")
    )
)


@dataclass(frozen=True)
class GenerateArguments:
    """What the command line says."""

    config: GenerateConfig
    inputs: tuple[Path, ...]
    """Files that it reads."""
    model_given: bool
    """Whether a flag or a file names the model."""
    print_config: bool
    dry_run: bool
    checkpoint_every: int | None
    """Chunks between two saved states."""
    resume: bool
    decode_alongside: bool
    spread: Spread
    decode_rank: bool
    """Of several ranks the last one only decodes."""
    rank_timeout: float
    """Seconds that a rank waits for another one."""


def parse_flags(words: Sequence[str]) -> GenerateArguments | None:
    """Resolve defaults < `--config` < flags; None once the help was printed.

    Raises:
        ValueError: in one line, what is unknown or out of range.
    """
    app = App(
        name="wan-ar generate",
        help="Render a video from a prompt. Settings come from the defaults, then --config, then the flags.",
        help_format="plaintext",
        version_flags=(),
        default_parameter=Parameter(negative_iterable=(), negative_none=(), allow_repeating=True, show_default=False),
        result_action="return_value",
    )
    app["--help"].group = _RUN
    app.default(_read)
    try:
        arguments: GenerateArguments | None = app(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise ValueError(f"{one_line(str(error))} (see wan-ar generate --help)") from error
    return arguments


def _flag(name: str, annotation: Any, help_text: str, default: Any) -> Any:
    """A setting as cyclopts takes it. Numbers, paths and texts stay words: pydantic converts them, in one wording."""
    choices = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    kind: Any = str
    if name == "prompt":
        kind = list[str]
    elif annotation is bool or bool in get_args(annotation):
        kind = bool
    elif choices:
        kind = choices[0]
    elif get_origin(annotation) is Mapping:
        kind = dict[str, Any]
    if not (default is None or isinstance(default, bool) or default == {}):
        help_text += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
    group = _FIRST if name in _EVERYDAY else _ROLLOUT if name in RolloutConfig.__dataclass_fields__ else _FILE
    names = ["--steps", "--denoising-steps"] if name == "denoising_steps" else None
    return Annotated[kind, Parameter(name=names, help=one_line(help_text), group=group)]


def _settings_type() -> Any:
    hints = get_type_hints(RolloutConfig) | get_type_hints(GenerateConfig)
    texts = {
        parameter.arg_name: parameter.description or ""
        for part in (RolloutConfig, GenerateConfig)
        for parameter in parse_from_object(part).params
    }
    defaults = resolve_config({}).model_dump()
    names = sorted(SETTING_NAMES, key=lambda name: _EVERYDAY.index(name) if name in _EVERYDAY else len(_EVERYDAY))
    flags = {name: _flag(name, hints[name], texts[name], defaults[name]) for name in names}
    return TypedDict("Settings", flags, total=False)  # type: ignore[operator]


Settings: Any = _settings_type()
_CONFIG_HELP = f"Settings to start from: {', '.join(preset_names())}, or a yaml file; flags come on top."


def _read(
    *,
    settings: Annotated[Settings, Parameter(name="*")] = None,
    config: Annotated[str | None, Parameter(group=_FIRST, help=_CONFIG_HELP)] = None,
    dry_run: Annotated[bool, Parameter(group=_RUN, negative="")] = False,
    print_config: Annotated[bool, Parameter(group=_RUN, negative="")] = False,
    checkpoint_every: Annotated[int | None, Parameter(group=_RUN)] = None,
    resume: Annotated[bool, Parameter(group=_RUN, negative="")] = False,
    decode_alongside: Annotated[bool, Parameter(group=_RUN, negative="")] = False,
    decode_rank: Annotated[bool, Parameter(group=_RUN, negative="")] = False,
    rank_timeout: Annotated[float, Parameter(group=_RUN)] = 300.0,
    debug: Annotated[bool, Parameter(group=_RUN, negative="")] = False,
    spread: Annotated[Spread | None, Parameter(name="*", group=_LIST, negative="")] = None,
) -> GenerateArguments:
    """Read the flags.

    Args:
        dry_run: Print the settings and what they will take, and render nothing.
        print_config: Print the settings as a yaml file for --config, and end.
        checkpoint_every: Save what is done every so many chunks, so that --resume can go on after a crash or a stop.
        resume: Go on where an earlier run of the same command was cut off.
        decode_alongside: Decode a chunk while the next one is denoised: the same video; on a CPU not always faster.
        decode_rank: Under torchrun, which makes one video on several devices: let the last one only decode.
        rank_timeout: Under torchrun: seconds that a process waits for another before it calls it gone (default: 300).
        debug: Show the traceback of an error.
    """
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every must be at least 1, got {checkpoint_every}")
    if resume and checkpoint_every is None:
        raise ValueError("--resume goes on from checkpoints; give --checkpoint-every as well")
    file = {} if config is None else load_preset(config)
    flags = dict(settings or {})
    model = flags.get("model", file.get("model"))
    resolved = resolve_config(settings_of_model(str(model or DEMO), config), file, _as_layer(flags))
    files: list[Any] = [config if config is not None and is_settings_file(config) else None]
    files += [layer.get("prompt_changes") for layer in (file, flags)]
    files += [resolved.image, resolved.video, resolved.prompts]
    spread = spread or Spread()
    spread.check(resolved)
    inputs = tuple(Path(name) for name in files if isinstance(name, str | Path))
    return GenerateArguments(
        resolved,
        inputs,
        model_given=model is not None,
        print_config=print_config,
        dry_run=dry_run,
        checkpoint_every=checkpoint_every,
        resume=resume,
        decode_alongside=decode_alongside,
        spread=spread,
        decode_rank=decode_rank,
        rank_timeout=rank_timeout,
    )


def settings_of_model(model: str, config: str | None) -> dict[str, Any]:
    """The defaults that come with a model: the demo makes small videos only, a published checkpoint has its preset."""
    if model == DEMO:
        return load_preset(DEMO)
    entry = published_checkpoints().get(model)
    if entry is None or entry.preset is None or config is not None or Path(model).exists():
        return {}
    return load_preset(entry.preset)


def _as_layer(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings among the flags as a yaml file would have them."""
    layer = dict(flags)
    for name, value in flags.items():
        if isinstance(value, dict):
            layer[name] = {key: _value(word, f"--{name}.{key}") for key, word in value.items()}
    if "prompt" in flags:
        layer["prompt"], changes = split_timed_prompts(flags["prompt"])
        if changes:
            layer["prompt_changes"] = changes | (read_changes(flags.get("prompt_changes")) or {})
    return layer


def _value(word: Any, flag: str) -> Any:
    """What an option means that is none of our settings: as in a yaml file, `6` is a number and `true` a truth."""
    return parse_yaml(word, flag) if isinstance(word, str) else word
