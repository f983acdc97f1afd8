"""The files of one video, all named after its mp4, and whether they may be written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wan_autoregressive.media.video_writer import check_video_target


@dataclass(frozen=True)
class OutputFiles:
    """Where everything of the video `x.mp4` lies."""

    video: Path

    @property
    def report(self) -> Path:
        return self.video.with_suffix(".json")

    @property
    def contact_sheet(self) -> Path:
        return self.video.with_suffix(".png")

    @property
    def part(self) -> Path:
        """What is done of an unfinished video, playable."""
        return self.video.with_name(f"{self.video.stem}.part.mp4")

    @property
    def joining(self) -> Path:
        """The video while it is put together from segments."""
        return self.video.with_name(f"{self.video.stem}.joining.mp4")

    @property
    def resume_folder(self) -> Path:
        """Segments and the state that goes on from them."""
        return self.video.with_name(f"{self.video.stem}.resume")

    @property
    def lock(self) -> Path:
        """Named after the part, which `x.mp4` and `x.MP4` share."""
        return self.video.with_name(f".{self.part.name}.lock")


def check_output_files(output: Path, inputs: Iterable[Path], contact_sheet: bool) -> None:
    """Check that a video and all that comes with it can be written without harm, touching nothing.

    Args:
        inputs: files that the run reads.
        contact_sheet: whether there will be one.

    Raises:
        ValueError: a file that would be lost: one of `inputs`, or what this command did not write.
        OSError: something is in the way, or a name is too long.
    """
    files = OutputFiles(output)
    _check_name_length(files)
    check_video_target(output)
    written = {"report": files.report, "part": files.part, "file for joining": files.joining}
    if contact_sheet:
        written["contact sheet"] = files.contact_sheet
    for kind, path in written.items():
        # A link would lead to a file elsewhere, and a pipe that nobody reads would keep us waiting.
        if path.is_symlink() or (path.exists() and not path.is_file()):
            state = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "no plain file"
            raise FileExistsError(f"the {kind} of '{output}' would be '{path}', which is {state}; move it away")
    folder = files.resume_folder
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"'{folder}', where an unfinished '{output}' is kept, is a link or a file; move it away")
    for source in inputs:
        for kind, path in ({"video": output} | written).items():
            if path.exists() and source.exists() and path.samefile(source):
                raise ValueError(f"the {kind} would be written over the input '{source}'; give another output")
        if folder.exists() and folder.resolve() in source.resolve().parents:
            raise ValueError(f"the input '{source}' lies in '{folder}', which this run empties; give another output")
    if files.report.exists() and not _is_report(files.report):
        raise ValueError(
            f"'{files.report}' is no report of this command, and that of '{output}' would replace it; give another "
            "output or move it away"
        )


def _check_name_length(files: OutputFiles) -> None:
    """The longest name is that of the report while it is written."""
    longest = f".{files.report.name}.12345678.part"
    try:
        limit = os.pathconf(files.video.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        limit = 255
    excess = len(os.fsencode(longest)) - limit
    if excess > 0:
        raise ValueError(
            f"the output's name '{files.video.name[:20]}…' is too long for the files beside it; shorten it by {excess}"
        )


def _is_report(path: Path) -> bool:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return "config" in report and "wan-autoregressive" in report["versions"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
