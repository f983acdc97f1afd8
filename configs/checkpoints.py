"""Published checkpoints by name: what `wan-ar pull` gets, and where it puts it. Without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wan_autoregressive.configs.messages import error_line, nearest, one_line
from wan_autoregressive.configs.presets import CHECKPOINTS_FILE, load_preset
from wan_autoregressive.configs.read_yaml import parse_yaml
from wan_autoregressive.configs.rollout_config import RolloutConfig

CACHE_VARIABLE = "WAN_AUTOREGRESSIVE_CACHE"
"""The environment variable that names the folder of pulled checkpoints."""


class WanBase(BaseModel):
    """A Wan model that checkpoints were trained from, of which tokenizer, text encoder and VAE are taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    license: str
    bytes: int = Field(gt=0)


class PublishedCheckpoint(BaseModel):
    """One entry of `checkpoints.yaml`, whose head says what each key means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    repo: str = Field(pattern=r"^[^/\s]+/[^/\s]+$")
    file: str
    second: str | None = None
    """Of the second transformer, where the base has two."""
    weights: str = "auto"
    lora: str | None = None
    lora_scale: float = 1.0
    second_lora: str | None = None
    second_lora_scale: float = 1.0
    base: str
    base_model: WanBase
    preset: str | None = None
    license: str
    non_commercial: bool = False
    bytes: int | None = Field(default=None, gt=0)
    needs: str | None = None
    unchecked: str | None = None

    @model_validator(mode="after")
    def _check_usable(self) -> PublishedCheckpoint:
        if self.needs is None and (self.preset is None or self.bytes is None):
            raise ValueError("it must say preset and bytes, or what it needs")
        check_loras(self.second, self.lora, self.second_lora)
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """All that is downloaded of `repo`."""
        named = dict.fromkeys((self.file, self.second, self.lora, self.second_lora))
        return tuple(path for path in named if path is not None)

    @property
    def sampler(self) -> str | None:
        """That of its preset."""
        if self.preset is None:
            return None
        return str(load_preset(self.preset).get("sampler", RolloutConfig.sampler))

    @property
    def download_bytes(self) -> int | None:
        """Of the checkpoint and what is taken of its base model, if known."""
        return None if self.bytes is None else self.bytes + self.base_model.bytes

    @property
    def license_text(self) -> str:
        """The licence, with a mark where it excludes commercial use."""
        return f"{self.license} (non-commercial)" if self.non_commercial else self.license

    @property
    def size_text(self) -> str:
        """The size of the download in words."""
        return "unknown" if self.download_bytes is None else f"about {gigabytes(self.download_bytes)}"

    def check_supported(self) -> None:
        """Raise `ValueError` for a checkpoint that this package cannot run."""
        if self.needs is not None:
            raise ValueError(f"'{self.name}' cannot be used yet: it needs {self.needs}")


def check_loras(second: object, lora: object, second_lora: object) -> None:
    """Raise `ValueError` unless it is clear which of the given files goes into which transformer."""
    if second_lora is not None and second is None:
        raise ValueError("a second LoRA goes into the weights of a second transformer, and none are given; use lora")
    if second is not None and lora is not None and second_lora is None:
        raise ValueError(
            "the LoRA would go into the first of two transformers alone; name one for the other with second_lora "
            "(--second-lora), the same file if it is for both, or with second_lora_scale 0 if it is for the first"
        )


def checkpoint_folder(name: str) -> Path:
    """Folder of a checkpoint that `wan-ar pull` got, for `WanAutoregressivePipeline.from_pretrained`.

    Raises:
        ValueError: no checkpoint has this name (the nearest is named), it needs what this package lacks, or it is not
            there yet; then the message has the command that gets it, the size of the download and the licence.
    """
    entry = published_checkpoint(name)
    entry.check_supported()
    folder = pulled_folder(name)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"'{name}' is not in '{folder.parent}'; get it with `wan-ar pull {name}`: {entry.size_text}, licence "
            f"{entry.license_text}"
        )
    return folder


def pulled_folder(name: str) -> Path:
    """Where `wan-ar pull` puts a checkpoint unless it is told otherwise."""
    parent = os.environ.get(CACHE_VARIABLE) or "~/.cache/wan-autoregressive"
    return Path(parent).expanduser() / name


def published_checkpoint(name: str) -> PublishedCheckpoint:
    """The entry of a name. Raises `ValueError` for an unknown one, with the nearest."""
    entries = published_checkpoints()
    if name in entries:
        return entries[name]
    near = nearest_checkpoint(name)
    hint = f"did you mean '{near}'? " if near else ""
    raise ValueError(f"unknown checkpoint '{one_line(name)}'; {hint}known are {', '.join(entries)}")


def nearest_checkpoint(name: str) -> str | None:
    """The known name that `name` most likely means."""
    by_preset_spelling = {known.replace("-", "_"): known for known in published_checkpoints()}
    return by_preset_spelling.get(nearest(name, by_preset_spelling) or "")


@cache
def published_checkpoints() -> Mapping[str, PublishedCheckpoint]:
    """All entries of the packaged `checkpoints.yaml`, in its order."""
    text = (files("wan_autoregressive.configs") / CHECKPOINTS_FILE).read_text(encoding="utf-8")
    return read_checkpoints(text, CHECKPOINTS_FILE)


def read_checkpoints(text: str, origin: str) -> dict[str, PublishedCheckpoint]:
    """Read a list of checkpoints.

    Raises:
        ValueError: in one line: it is no such list, or a key (with the nearest) or value is not allowed.
    """
    content = parse_yaml(text, origin)
    if not isinstance(content, dict) or content.keys() != {"bases", "checkpoints"}:
        raise ValueError(f"'{origin}' must hold the two mappings bases and checkpoints")
    keys = [key for key in PublishedCheckpoint.model_fields if key not in ("name", "base_model")]
    entries = {}
    for name, values in content["checkpoints"].items():
        if not isinstance(values, dict) or values.get("base") not in content["bases"]:
            raise ValueError(f"'{origin}': {name}: it must name one of the bases {', '.join(content['bases'])}")
        given = values | {"name": name, "base_model": content["bases"][values["base"]]}
        try:
            entries[name] = PublishedCheckpoint.model_validate(given)
        except ValidationError as error:
            raise ValueError(f"'{origin}': {name}: {error_line(error, keys)}") from error
    return entries


def gigabytes(count: int) -> str:
    """`5.68 GB`, in the decimal units that the Hub shows."""
    return f"{count / 1e9:.3g} GB"
