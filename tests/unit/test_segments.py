"""Joined segments: every frame once, in order and in time, and nothing half-made under the final name."""

import re
import subprocess
import tempfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from wan_autoregressive.media import segments
from wan_autoregressive.media.ffmpeg import count_video_frames, ffmpeg_executable
from wan_autoregressive.media.segments import join_segments
from wan_autoregressive.media.video_writer import VideoWriteError, VideoWriter


def write(path: Path, first: int, count: int, fps: float = 16) -> np.ndarray:
    """Frames that say which they are: a bar that moves 2 pixels a frame."""
    frames = np.zeros((count, 32, 48, 3), np.uint8)
    for i in range(count):
        frames[i, :, 2 * (first + i) % 48 :][:, :2] = 255
    with VideoWriter(path, fps=fps) as writer:
        writer.write(frames)
    return frames


def frame_times_s(path: Path) -> list[float]:
    command = [ffmpeg_executable(), "-i", str(path), "-vf", "showinfo", "-f", "null", "-"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [float(found) for found in re.findall(r"pts_time:(\S+)", said)]


@pytest.mark.parametrize(("counts", "fps"), [((9, 12, 12, 3), 16), ((1, 2, 1, 20, 1), 23.976), ((1,), 7.5)])
def test_every_frame_once_in_order_and_evenly_in_time(tmp_path: Path, counts: tuple[int, ...], fps: float) -> None:
    paths, frames = [], []
    for number, count in enumerate(counts):
        paths.append(tmp_path / f"it's {number}.mp4")  # a quote, which ffmpeg's lists would trip over
        frames.append(write(paths[-1], sum(counts[:number]), count, fps))
    total = sum(counts)
    assert join_segments(paths, tmp_path / "x.mp4") == total
    found, wanted = iio.imread(tmp_path / "x.mp4", plugin="FFMPEG").astype(int), np.concatenate(frames)
    assert found.shape == wanted.shape  # this reader repeats and drops frames where times are uneven
    assert np.abs(found - wanted).mean(axis=(1, 2, 3)).max() < 8
    assert np.diff(frame_times_s(tmp_path / "x.mp4")) == pytest.approx([1 / fps] * (total - 1), abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["x.mp4", *(path.name for path in paths)])


def test_nothing_is_encoded_anew(tmp_path: Path) -> None:
    """The decoded frames are those of the segments to the bit, which no second encoding would leave them."""

    def digests(path: Path) -> list[str]:
        command = [ffmpeg_executable(), "-v", "error", "-i", str(path), "-f", "framemd5", "-"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [line.split(",")[-1].strip() for line in said.splitlines() if not line.startswith("#")]

    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for number, path in enumerate(paths):
        write(path, 10 * number, 10)
    join_segments(paths, tmp_path / "x.mp4")
    assert digests(tmp_path / "x.mp4") == digests(paths[0]) + digests(paths[1])


def test_a_part_file_can_be_joined(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", 0, 10)
    writer = VideoWriter(tmp_path / "b.mp4", fps=16)
    writer.write(np.zeros((5, 32, 48, 3), np.uint8))
    writer.abort()
    assert join_segments([tmp_path / "a.mp4", tmp_path / "b.part.mp4"], tmp_path / "x.part.mp4") == 15


def test_an_older_file_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "a.mp4", 0, 5)
    write(tmp_path / "b.mp4", 5, 5)
    (tmp_path / "x.mp4").write_bytes(b"older")
    with pytest.raises(ValueError, match="is not a readable video"):
        join_segments([tmp_path / "a.mp4", tmp_path / "none.mp4"], tmp_path / "x.mp4")
    with pytest.raises(ValueError, match="there are no segments"):
        join_segments([], tmp_path / "x.mp4")
    with pytest.raises(ValueError, match=r"ends in \.mp4"):
        join_segments([tmp_path / "a.mp4"], tmp_path / "x.avi")
    with pytest.raises(NotADirectoryError, match="does not exist"):
        join_segments([tmp_path / "a.mp4"], tmp_path / "none" / "x.mp4")
    with monkeypatch.context() as patch:
        counts = iter((5, 5, 9))
        patch.setattr(segments, "count_video_frames", lambda path: next(counts))
        with pytest.raises(VideoWriteError, match="the segments hold 10 frames and 9 are in the file"):
            join_segments([tmp_path / "a.mp4", tmp_path / "b.mp4"], tmp_path / "x.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(segments, "_EVEN_DTS", "no_such_filter")
        with pytest.raises(VideoWriteError, match=r"could not join 2 segments .* exit code"):
            join_segments([tmp_path / "a.mp4", tmp_path / "b.mp4"], tmp_path / "x.mp4")
    assert (tmp_path / "x.mp4").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "x.mp4"]
    assert join_segments([tmp_path / "a.mp4", tmp_path / "b.mp4"], tmp_path / "x.mp4") == 10
    assert count_video_frames(tmp_path / "x.mp4") == 10


def test_segments_of_an_encoder_that_stores_frames_ahead_of_their_time_are_joined(tmp_path: Path) -> None:
    """As versions before wrote them: with B-frames, whose times of storage jump where such segments meet."""
    paths, wanted = [], []
    for number in range(2):
        frames = write(tmp_path / "plain.mp4", 10 * number, 10)
        paths.append(tmp_path / f"{number}.mp4")
        command = [ffmpeg_executable(), "-v", "error", "-i", str(tmp_path / "plain.mp4"), "-c:v", "libx264"]
        subprocess.run([*command, "-bf", "3", "-b_strategy", "0", str(paths[-1])], check=True)
        wanted.append(frames)
    assert join_segments(paths, tmp_path / "x.mp4") == 20
    found = iio.imread(tmp_path / "x.mp4", plugin="FFMPEG").astype(int)
    assert np.abs(found - np.concatenate(wanted)).mean(axis=(1, 2, 3)).max() < 8
    assert np.diff(frame_times_s(tmp_path / "x.mp4")) == pytest.approx([1 / 16] * 19, abs=1e-3)


def test_joining_needs_no_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.mp4", 0, 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    assert join_segments([tmp_path / "a.mp4"] * 2, tmp_path / "x.mp4") == 4
