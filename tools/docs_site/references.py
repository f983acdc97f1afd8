"""Docstrings name classes as diffusers does, [`WanRollout`]; on the site that is a link where the API has the name."""

# pyright: reportMissingImports=false
# Only `make docs` installs what these import.

import re
from pathlib import Path
from typing import Any

import griffe

REFERENCE = re.compile(r"\[`([\w.]+)`\]")
DOCUMENTED = re.compile(r"^::: (\S+)", re.MULTILINE)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "API.md"


class References(griffe.Extension):
    """Turns [`Name`] into a link, or into plain code where the API does not have the name."""

    def __init__(self) -> None:
        self._places = {path.rpartition(".")[2]: path for path in DOCUMENTED.findall(PAGE.read_text(encoding="utf-8"))}

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = REFERENCE.sub(self._link, obj.docstring.value)

    def _link(self, match: "re.Match[str]") -> str:
        name, _, member = match[1].partition(".")
        if name not in self._places:
            return f"`{match[1]}`"
        return f"[`{match[1]}`][{self._places[name]}{'.' + member if member else ''}]"
