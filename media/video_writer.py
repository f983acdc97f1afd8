"""Write an mp4 frame by frame; nothing appears under the final name until the file is whole.

ffmpeg is driven by an own process rather than through imageio's writer, which ignores ffmpeg's exit code: a killed
encoder or a full disk would end in silence and in a file that does not play.
This module knows nothing of models; it takes pixels.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from wan_autoregressive.atomic_file import check_replaceable, sync_file
from wan_autoregressive.media.ffmpeg import (
    QUIET,
    count_video_frames,
    describe_exit,
    ffmpeg_executable,
    file_url,
    has_hybrid_fragmented,
)

_CLOSE_LIMIT_S = 120  # ffmpeg has nothing left to encode then, only an index to write
_KEYFRAME_EVERY_S = 4


class VideoWriteError(RuntimeError):
    """The video could not be written; the message says why and where the part that was written lies."""


def check_video_target(path: str | os.PathLike[str]) -> Path:
    """Check that an mp4 can be written at `path`, touching nothing that is there.

    Raises:
        ValueError: the name does not end in `.mp4`, or has a line break in it.
        OSError: the folder is missing or cannot be written to; `path` is a folder, a pipe or a device; the name is
            too long; what stands under the name of the part file is no regular file (links are not followed).
    """
    target = Path(path)
    if target.suffix.lower() != ".mp4":
        raise ValueError(f"the output must be a file name that ends in .mp4, got '{target}'")
    if len(str(target.absolute()).splitlines()) != 1:  # ffmpeg's lists of segments cannot name it
        raise ValueError(f"the output's name must have no line break in it, got {str(target)!r}")
    if target.is_dir():
        raise IsADirectoryError(f"the output '{target}' is a folder; give the name of an mp4 file")
    check_writable_folder(target.parent)
    check_replaceable(target)
    part = part_path_of(target)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(part.lstat().st_mode):
            raise OSError(f"'{part}', where frames go at first, is a link, a folder, a pipe or a device; remove it")
    return target


def part_path_of(target: Path) -> Path:
    """Where the frames of the video `target` are until it is whole."""
    return target.with_name(f"{target.stem}.part.mp4")


def check_writable_folder(folder: Path) -> None:
    """Raise OSError unless a file can be made in `folder`."""
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist; create it first"
        raise NotADirectoryError(f"the output folder '{folder}' {state}")
    try:
        # Trying is the only sure way: permission bits say nothing of read-only mounts, quotas or a root user.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"cannot write to the output folder '{folder}': {error.strerror or error}") from error


class VideoWriter:
    """Encode frames to H.264 in an mp4 as they come, with flat memory.

    Frames go to `x.part.mp4` beside the target `x.mp4`. A clean `close()` (or end of the `with` block) checks ffmpeg's
    exit code and the number of frames in the file and only then moves it to the final name, replacing what was there.
    After a failure the part file stays, with all complete frames in it, and `part_path` says where; no part file is
    left when not a single frame was written.

    The part file plays at any time, also when this process and ffmpeg are killed together: every frame is a fragment
    of its own, and the encoder holds none back. What is lost is the last frame that was written (it is stored when
    the next one comes or the file is closed) and what ffmpeg had not encoded yet. A power cut can cost more: the part
    is not synced. The price, over an encoder that looks ahead, is a file of 0.7 to 1.25 times the size, as measured
    on synthetic clips at the same `crf`.

    Args:
        path: the target, ending in `.mp4`, in a folder that exists.
        fps: pixel frames per second.
        width, height: size of the frames in pixels; taken from the first frames when not given.
        crf: x264's constant rate factor, 0 (lossless) to 51 (worst).
        scale: integer factor by which every pixel is repeated, so that a very small video can be looked at.

    Raises:
        ValueError: an argument out of range.
        OSError: `path` cannot be written.
        VideoWriteError: from `write` and `close`, when ffmpeg fails.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float = 16.0,
        *,
        width: int | None = None,
        height: int | None = None,
        crf: int = 18,
        scale: int = 1,
    ) -> None:
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a positive number, got {fps}")
        if scale < 1 or scale != int(scale):
            raise ValueError(f"scale must be a whole number of at least 1, got {scale}")
        if not 0 <= crf <= 51:
            raise ValueError(f"crf must be between 0 (lossless) and 51, got {crf}")
        if (width is None) != (height is None):
            raise ValueError(f"give both width and height or neither, got width={width}, height={height}")
        self._executable = ffmpeg_executable()
        self.path = check_video_target(path)
        self.part_path = part_path_of(self.path)
        self.fps = float(fps)
        self.crf = crf
        self.scale = int(scale)
        self.frames_written = 0
        self._size: tuple[int, int] | None = None  # (height, width) in pixels, before scaling
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._closed = False
        if width is not None and height is not None:
            self._set_size(height, width)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            # The caller's exception is the news: it goes on as it is, with a note of what was kept.
            kept = self.abort()
            if kept is not None:
                error.__notes__ = [*getattr(error, "__notes__", []), kept]  # add_note, also before Python 3.11

    def write(self, frames: npt.ArrayLike) -> None:
        """Append frames of shape (frames, height, width, 3), uint8 as they are or float in [0, 1] (rounded, clamped).

        Takes NumPy arrays, tensors on the CPU and sequences of frames. Contiguous uint8 is not copied. A chunk is
        checked as a whole before its first frame is written. Zero frames are allowed and do nothing.

        Raises:
            ValueError: wrong shape or dtype, a size that changed, odd size, NaN or infinite values, or a tensor that
                NumPy cannot look into (on another device, in bfloat16, with gradients).
            VideoWriteError: ffmpeg stopped; the frames it completed are in `part_path`.
        """
        if self._closed:
            raise RuntimeError(f"the writer of '{self.path}' is closed; make a new one")
        try:
            batch = np.asarray(frames)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"frames cannot be read as a NumPy array: {str(error).splitlines()[0]}") from error
        if batch.ndim != 4 or batch.shape[-1] != 3:
            raise ValueError(f"frames must have shape (frames, height, width, 3), got {batch.shape}")
        is_float = np.issubdtype(batch.dtype, np.floating)
        if not is_float and batch.dtype != np.uint8:
            raise ValueError(f"frames must be uint8, or float in [0, 1], got {batch.dtype}")
        if is_float and not np.isfinite(batch).all():
            bad = int(np.flatnonzero(~np.isfinite(batch).all(axis=(1, 2, 3)))[0])
            raise ValueError(f"frame {self.frames_written + bad} holds NaN or infinite values")
        if batch.shape[0] == 0:
            return
        self._set_size(batch.shape[1], batch.shape[2])
        for frame in batch:
            self._write_frame(_to_uint8(frame))

    def close(self) -> None:
        """Finish the file and move it to its final name; does nothing when closed before or when nothing was written.

        Raises:
            VideoWriteError: ffmpeg failed or lost frames; nothing was put under the final name.
        """
        if self._closed or self._process is None:
            self._closed = True
            return
        problem = self._finish()
        if problem is None:
            problem = self._publish()
        if problem is not None:
            raise self._failure(problem)

    def abort(self) -> str | None:
        """Stop without making the final file; return a line on where the frames written so far are, None without."""
        if self._closed or self._process is None:
            self._closed = True
            return None
        self._finish()
        return self._kept()

    def _set_size(self, height: int, width: int) -> None:
        if self._size is None:
            if height < 1 or width < 1:
                raise ValueError(f"frames must have at least one pixel, got width {width} and height {height}")
            if width * self.scale % 2 or height * self.scale % 2:
                raise ValueError(
                    f"H.264 in yuv420p needs an even width and height, got {width}x{height} times scale {self.scale}; "
                    "crop or pad the frames to even sizes"
                )
            self._size = (height, width)
        elif (height, width) != self._size:
            raise ValueError(
                f"all frames of '{self.path}' must be {self._size[1]}x{self._size[0]} (width x height), "
                f"got {width}x{height}"
            )

    def _command(self, height: int, width: int) -> list[str]:
        if has_hybrid_fragmented(self._executable):
            fragments = "+hybrid_fragmented+frag_every_frame"
        else:
            fragments = "+frag_every_frame+empty_moov+default_base_moof"
        # One matrix, said in the file: left to themselves players guess it from the size and shift the colours.
        filters = "scale=out_color_matrix=bt709:out_range=tv"
        if self.scale > 1:
            filters = f"scale=iw*{self.scale}:ih*{self.scale}:flags=neighbor:out_color_matrix=bt709:out_range=tv"
        return [
            *(self._executable, *QUIET, "-y"),
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{self.fps:.6g}", "-i", "-"),
            *("-an", "-vf", filters, "-pix_fmt", "yuv420p", "-c:v", "libx264", "-crf", str(self.crf)),
            *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
            # No frame waits in the encoder or in a buffer: see what the class promises of the part file.
            *("-tune", "zerolatency", "-flush_packets", "1", "-movflags", fragments),
            *("-g", str(max(1, round(_KEYFRAME_EVERY_S * self.fps))), "-f", "mp4", file_url(self.part_path)),
        ]

    def _start(self) -> subprocess.Popen[bytes]:
        assert self._size is not None
        try:
            # A new file: the ffmpeg of a process that was killed may still write to the old one.
            self.part_path.unlink(missing_ok=True)
            # stderr goes to a file, because a pipe that nobody reads would stop ffmpeg once it is full.
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in _finish)
            return subprocess.Popen(
                self._command(*self._size),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for us; ffmpeg ends when its input does
            )
        except OSError as error:
            self._closed = True
            raise VideoWriteError(f"could not write '{self.path}': ffmpeg could not be started: {error}") from error

    def _write_frame(self, frame: npt.NDArray[np.uint8]) -> None:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        rest = np.ascontiguousarray(frame).data.cast("B")
        try:
            while rest:
                rest = rest[self._process.stdin.write(rest) :]
        except OSError as error:
            raise self._failure(self._finish() or str(error)) from error
        self.frames_written += 1

    def _finish(self) -> str | None:
        """End ffmpeg's input and wait for it; return what went wrong, or None."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._stderr is not None
        self._closed = True
        with contextlib.suppress(OSError):  # ffmpeg may be gone; its exit code says more
            self._process.stdin.close()
        try:
            returncode = self._process.wait(timeout=_CLOSE_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return f"ffmpeg did not end {_CLOSE_LIMIT_S} seconds after the last frame and was killed"
        with self._stderr as file:
            file.seek(0)
            return None if returncode == 0 else describe_exit(returncode, file.read())

    def _publish(self) -> str | None:
        """Move the part file to the final name if it holds every frame; return what went wrong, or None."""
        try:
            found = count_video_frames(self.part_path)
            if found != self.frames_written:
                return f"{self.frames_written} frames were given and {found} are in the file"
            sync_file(self.part_path)
            os.replace(self.part_path, self.path)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _kept(self) -> str | None:
        """Say what the part file holds; None when there is none, and an empty one is removed."""
        if self.frames_written == 0 or not self.part_path.is_file() or self.part_path.stat().st_size == 0:
            self.part_path.unlink(missing_ok=True)
            return None
        try:
            found = str(count_video_frames(self.part_path))
        except ValueError:
            found = "no whole frame"
        return f"{found} of {self.frames_written} frames are kept in '{self.part_path}'"

    def _failure(self, problem: str) -> VideoWriteError:
        parts = [f"could not write '{self.path}': {problem}", self._kept()]
        return VideoWriteError("; ".join(part for part in parts if part))


def _to_uint8(frame: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Convert one frame of float values in [0, 1] to uint8; uint8 passes unchanged."""
    if frame.dtype == np.uint8:
        return frame
    return np.rint(np.clip(frame.astype(np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)
