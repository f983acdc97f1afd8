"""Join mp4 files of one kind to a single one without encoding anew."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from wan_autoregressive.atomic_file import replaced_file
from wan_autoregressive.media.ffmpeg import count_video_frames, file_url, run_ffmpeg, time_limit_s
from wan_autoregressive.media.video_writer import VideoWriteError, check_video_target

# Frames are stored ahead of their time by up to two places (B-frames of B-frames), by fewer in very short segments.
# Left as they are the times of storage jump where such segments meet, and players repeat and drop frames there.
_EVEN_DTS = r"setts=pts=PTS:dts=if(eq(N\,0)\,PTS-2*DURATION\,PREV_OUTDTS+DURATION)"


def join_segments(paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> int:
    """Write the frames of `paths`, one after another and bit for bit as they are encoded, to `output`.

    The segments must come from writers with the same settings (size, rate, quality). Nothing appears under the name
    of `output`, and what is there is not touched, until the new file is whole and holds every frame.

    Returns:
        The number of frames.

    Raises:
        ValueError: there are no segments, one is not a readable video, or the name of the output does not end in .mp4.
        VideoWriteError: ffmpeg failed or lost frames. The segments are as they were.
        OSError: the output cannot be written.
    """
    target = check_video_target(output)
    segments = [Path(path).absolute() for path in paths]
    if not segments:
        raise ValueError(f"there are no segments to make '{target}' of")
    expected = sum(count_video_frames(path) for path in segments)
    with replaced_file(target, part=target.with_name(f"{target.stem}.joining.mp4")) as part:
        problem = _concatenate(segments, part)
        found = 0 if problem else count_video_frames(part)
        if problem is None and found != expected:
            problem = f"the segments hold {expected} frames and {found} are in the file"
        if problem is not None:
            raise VideoWriteError(f"could not join {len(segments)} segments to '{target}': {problem}")
    return expected


def _concatenate(segments: list[Path], part: Path) -> str | None:
    """Run ffmpeg; return what went wrong, or None."""
    listing = "ffconcat version 1.0\n" + "".join(f"file {_quoted(file_url(segment))}\n" for segment in segments)
    words = ["-y", "-f", "concat", "-safe", "0", "-protocol_whitelist", "file,pipe", "-i", "pipe:0"]
    words += ["-map", "0:v:0", "-c", "copy", "-bsf:v", _EVEN_DTS, "-f", "mp4", file_url(part)]
    return run_ffmpeg(words, time_limit_s(*segments), given=os.fsencode(listing))[1]


def _quoted(name: str) -> str:
    """A name as ffmpeg's lists take it."""
    return "'" + name.replace("'", r"'\''") + "'"
