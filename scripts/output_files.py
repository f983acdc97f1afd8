"""The files of one video, all named after its mp4, and whether they may be written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wan_autoregressive.atomic_file import check_replaceable
from wan_autoregressive.media.video_writer import check_video_target, part_path_of


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
        return part_path_of(self.video)

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

    @property
    def lease(self) -> Path:
        """The lock of runs that share a list; its age counts."""
        return self.video.with_name(f".{self.part.name}.lease")

    @property
    def deaths(self) -> Path:
        """What runs that share a list leave of those that died at this video."""
        return self.video.with_name(f".{self.part.name}.deaths")


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
    check_video_target(output)
    written = {"report": files.report, "file for joining": files.joining}
    if contact_sheet:
        written["contact sheet"] = files.contact_sheet
    for path in written.values():
        check_replaceable(path)
    folder = files.resume_folder
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"'{folder}', where an unfinished '{output}' is kept, is a link or a file; move it away")
    for source in inputs:
        for kind, path in ({"video": output, "part": files.part} | written).items():
            if path.exists() and source.exists() and path.samefile(source):
                raise ValueError(f"the {kind} would be written over the input '{source}'; give another output")
        if folder.exists() and folder.resolve() in source.resolve().parents:
            raise ValueError(f"the input '{source}' lies in '{folder}', which this run empties; give another output")
    if files.report.exists() and not _is_report(files.report):
        raise ValueError(
            f"'{files.report}' is no report of this command, and that of '{output}' would replace it; give another "
            "output or move it away"
        )


def _is_report(path: Path) -> bool:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return "config" in report and "wan-autoregressive" in report["versions"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
