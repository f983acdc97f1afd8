"""When to give a video up at which one process after the other dies: what kills them may be the video itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from wan_autoregressive.atomic_file import write_text
from wan_autoregressive.scripts.output_files import OutputFiles
from wan_autoregressive.scripts.output_lock import StillHeld
from wan_autoregressive.scripts.resumable_render import count_segments

MOST_DEATHS = 3
"""In a row, with no checkpoint between them. A video that gets on may lose any number: machines can be lent ones."""


@dataclass(frozen=True)
class Deaths:
    """Those at one video since it last got on, and the segments that it had then."""

    count: int = 0
    segments: int = 0

    def one_more(self, output: Path) -> Self:
        segments = count_segments(output)
        return dataclasses.replace(self, count=1 if segments > self.segments else self.count + 1, segments=segments)

    @property
    def too_many(self) -> bool:
        return self.count >= MOST_DEATHS


@contextmanager
def note_deaths(output: Path, still_held: StillHeld) -> Iterator[None]:
    """Leave a file beside a video that only a death within the block leaves there, for whoever goes on with it.

    Raises:
        RuntimeError: too many have died at it.
    """
    path = OutputFiles(output).deaths
    before = _read(path)
    deaths = Deaths(segments=count_segments(output)) if before is None else before.one_more(output)
    if deaths.too_many:
        raise RuntimeError(f"{deaths.count} runs in a row died at it; delete '{path}' to try it again")
    write_text(path, json.dumps(dataclasses.asdict(deaths)))
    try:
        yield
    finally:
        still_held()
        path.unlink(missing_ok=True)


def _read(path: Path) -> Deaths | None:
    try:
        return Deaths(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Deaths()  # cut off: a death all the same
