"""Yaml without aliases: with them a file of 300 bytes describes more values than any memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from wan_autoregressive.configs.messages import one_line


def parse_yaml(text: str, origin: str) -> Any:
    """The value that `text` (yaml or JSON) describes. Raises `ValueError` in one line that names `origin`."""
    try:
        return yaml.load(text, Loader=_NoAliasLoader)
    # Besides its own errors PyYAML lets those of value constructors (an impossible date) and of the stack through.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"'{origin}' is not valid yaml: {one_line(str(error))}") from error


def read_yaml(path: Path, kind: str) -> Any:
    """As `parse_yaml`, of a file. `kind` says in the message what the file is."""
    return parse_yaml(read_text(path, kind), str(path))


def read_text(path: Path, kind: str) -> str:
    """The text of a UTF-8 file. Raises `ValueError` in one line that says what kind of file it is."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"cannot read the {kind} '{path}': {reason}") from error


class _NoAliasLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, f"aliases (*{event.anchor}) are not taken", event.start_mark)
        return super().compose_node(parent, index)
