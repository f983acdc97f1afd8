"""The mp4 writer: what is decoded again is what was given, and no failure leaves a file under the final name."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from wan_autoregressive.media import video_writer
from wan_autoregressive.media.ffmpeg import count_video_frames, ffmpeg_executable, has_hybrid_fragmented
from wan_autoregressive.media.video_writer import VideoWriteError, VideoWriter

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 60, 20)]


def flat_frames(height: int = 32, width: int = 48) -> np.ndarray:
    """One frame per colour, so that frames cannot be swapped, lost or recoloured unseen."""
    return np.broadcast_to(np.array(COLOURS, np.uint8)[:, None, None], (len(COLOURS), height, width, 3)).copy()


def noise(frames: int, size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)


def top_level_boxes(path: Path) -> list[str]:
    """The box types of an mp4, outermost level only."""
    content, at, kinds = path.read_bytes(), 0, []
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        kinds.append(content[at + 4 : at + 8].decode())
        at += size
    return kinds


def write_then(target: Path, then: Callable[[VideoWriter], object], chunks: int = 1) -> None:
    """Write chunks of four noisy frames, run `then` on the open writer, and close it."""
    with VideoWriter(target) as writer:
        for seed in range(chunks):
            writer.write(noise(4, seed=seed))
        then(writer)


def kill_encoder(writer: VideoWriter) -> None:
    assert writer._process is not None
    os.kill(writer._process.pid, signal.SIGKILL)


def test_uint8_frames_reach_ffmpeg_without_a_copy(tmp_path: Path) -> None:
    """What is written to ffmpeg's input is the caller's own memory, whole and in order; strided frames are copied."""
    frames, given = noise(6), []

    class Recording:
        def __init__(self, pipe: IO[bytes]) -> None:
            self.pipe = pipe

        def write(self, data: memoryview) -> int:
            written = self.pipe.write(data[: 64 * 64 * 2])  # in parts, as a full pipe takes them
            given.append(np.frombuffer(data[:written], np.uint8))
            return written

        def close(self) -> None:
            self.pipe.close()

    def record(writer: VideoWriter) -> None:
        assert writer._process is not None
        writer._process.stdin = Recording(writer._process.stdin)  # type: ignore[assignment,arg-type]
        for batch in (frames[:4], frames[4:, :, ::-1]):
            given.clear()
            writer.write(batch)
            assert np.array_equal(np.concatenate(given), batch.ravel())
            assert all(np.shares_memory(part, frames) == (batch.base is frames and len(batch) == 4) for part in given)

    write_then(tmp_path / "x.mp4", record)


def test_tensors_on_the_cpu_are_taken_as_they_are(tmp_path: Path) -> None:
    frames = noise(6)
    for name, batch in (("array", frames), ("uint8", torch.from_numpy(frames))):
        with VideoWriter(tmp_path / f"{name}.mp4") as writer:
            writer.write(batch)
            assert np.shares_memory(np.asarray(batch), frames)
    with VideoWriter(tmp_path / "float.mp4") as writer:
        writer.write(torch.from_numpy(frames) / 255)
        for odd in (torch.zeros(1, 64, 64, 3, dtype=torch.bfloat16), torch.zeros(1, 64, 64, 3, requires_grad=True)):
            with pytest.raises(ValueError, match="cannot be read as a NumPy array"):
                writer.write(odd)
    array, integers, floats = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("array", "uint8", "float"))
    assert array == integers == floats


def test_frames_come_back_in_order_with_their_size_rate_and_colour(tmp_path: Path) -> None:
    target = tmp_path / "x.mp4"
    frames = flat_frames()
    with VideoWriter(target, fps=10) as writer:
        writer.write(frames[:1])
        assert not target.exists()
        writer.write(frames[1:].astype(np.float32) / 255)
        writer.write(frames[:0])
    decoded = iio.imread(target, plugin="FFMPEG")
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).max() <= 4
    assert iio.immeta(target, plugin="FFMPEG")["fps"] == 10
    assert sorted(tmp_path.iterdir()) == [target]
    assert writer.frames_written == len(frames)


def test_a_regular_mp4_in_420_comes_out(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4") as writer:
        writer.write(noise(20))
    meta = iio.immeta(tmp_path / "x.mp4", plugin="FFMPEG")
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    if has_hybrid_fragmented(ffmpeg_executable()):
        assert "moof" not in top_level_boxes(tmp_path / "x.mp4")


def test_fragments_are_the_fallback_of_an_older_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_writer, "has_hybrid_fragmented", lambda executable: False)
    with VideoWriter(tmp_path / "x.mp4") as writer:
        writer.write(noise(20))
    assert count_video_frames(tmp_path / "x.mp4") == 20
    assert "moof" in top_level_boxes(tmp_path / "x.mp4")


def test_scale_repeats_pixels(tmp_path: Path) -> None:
    frame = np.zeros((1, 4, 4, 3), np.uint8)
    frame[0, :2, :2] = 255
    with VideoWriter(tmp_path / "x.mp4", scale=16, crf=0) as writer:
        writer.write(frame)
    decoded = iio.imread(tmp_path / "x.mp4", plugin="FFMPEG")
    assert np.abs(decoded.astype(int) - frame.repeat(16, 1).repeat(16, 2)).max() <= 2


@pytest.mark.parametrize("target", ["plain.mp4", "mp4:a.mp4", "two words.mp4", "-y.mp4", "50%d.mp4", "ü.MP4"])
def test_any_file_name_works(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(target) as writer:
        writer.write(noise(2))
    assert os.listdir(tmp_path) == [target]


def test_floats_are_rounded_and_clamped() -> None:
    values = np.array([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 1.7], np.float32)
    assert video_writer._to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((32, 32, 3), np.uint8), r"\(frames, height, width, 3\), got \(32, 32, 3\)"),
        (np.zeros((1, 32, 32, 4), np.uint8), "got \\(1, 32, 32, 4\\)"),
        (np.zeros((1, 32, 32, 3), np.int64), "got int64"),
        (np.full((1, 32, 32, 3), np.nan, np.float32), "frame 0 holds NaN"),
        (np.zeros((1, 31, 32, 3), np.uint8), "even width and height, got 32x31"),
        (np.zeros((1, 0, 32, 3), np.uint8), "at least one pixel"),
    ],
)
def test_bad_frames_are_refused_and_leave_nothing(tmp_path: Path, frames: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message), VideoWriter(tmp_path / "x.mp4") as writer:
        writer.write(frames)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_changes_is_refused_and_a_bad_chunk_writes_none_of_its_frames(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4") as writer:
        writer.write(noise(3))
        with pytest.raises(ValueError, match=r"must be 64x64.*got 32x32"):
            writer.write(noise(1, size=32))
        bad = noise(2).astype(np.float32) / 255
        bad[1, 0, 0, 0] = np.inf
        with pytest.raises(ValueError, match="frame 4 holds NaN or infinite"):
            writer.write(bad)
    assert count_video_frames(tmp_path / "x.mp4") == 3


@pytest.mark.parametrize(
    "options",
    [{"fps": 0}, {"fps": float("nan")}, {"scale": 0}, {"crf": 52}, {"width": 32}, {"width": 33, "height": 32}],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VideoWriter(tmp_path / "x.mp4", **options)
    assert list(tmp_path.iterdir()) == []


def test_targets_that_cannot_be_written_are_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"ends in \.mp4"):
        VideoWriter(tmp_path / "x.avi")
    with pytest.raises(ValueError, match="line break"):
        VideoWriter(tmp_path / "two\nlines.mp4")
    with pytest.raises(OSError, match="is a folder"):
        VideoWriter(tmp_path / "folder.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(OSError, match="is a pipe, a device or a socket"):
        VideoWriter(tmp_path / "pipe.mp4")
    with pytest.raises(OSError, match="File name too long"):
        VideoWriter(tmp_path / f"{'x' * 240}.mp4")
    with pytest.raises(OSError, match="does not exist"):
        VideoWriter(tmp_path / "missing" / "x.mp4")
    with pytest.raises(OSError, match="is not a folder"):
        VideoWriter(tmp_path / "file" / "x.mp4")
    if Path("/proc/self").is_dir():
        with pytest.raises(OSError, match="cannot write to the output folder '/proc'"):
            VideoWriter("/proc/x.mp4")


@pytest.mark.parametrize("kind", ["link", "dead link", "pipe", "folder"])
def test_what_stands_where_frames_go_first_is_neither_followed_nor_waited_for(tmp_path: Path, kind: str) -> None:
    part, precious = tmp_path / "x.part.mp4", tmp_path / "precious"
    precious.write_bytes(b"precious")
    if kind == "pipe":
        os.mkfifo(part)
    elif kind == "folder":
        part.mkdir()
    else:
        part.symlink_to(precious if kind == "link" else tmp_path / "nothing")
    with pytest.raises(OSError, match=r"x\.part\.mp4', where frames go at first, is a link, a folder, a pipe"):
        VideoWriter(tmp_path / "x.mp4")
    assert precious.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "x.part.mp4"]


def test_a_link_at_the_target_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "x.mp4").symlink_to(tmp_path / "precious")
    write_then(tmp_path / "x.mp4", lambda writer: None)
    assert not (tmp_path / "x.mp4").is_symlink()
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_part_that_another_process_left_is_not_written_into(tmp_path: Path) -> None:
    """Its ffmpeg may still have it open."""
    (tmp_path / "x.part.mp4").write_bytes(b"of another")
    with open(tmp_path / "x.part.mp4", "rb") as other:
        write_then(tmp_path / "x.mp4", lambda writer: None)
        assert other.read() == b"of another"
    assert count_video_frames(tmp_path / "x.mp4") == 4


def test_an_ffmpeg_that_cannot_be_started_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_writer, "ffmpeg_executable", lambda: "/bin/true")
    with VideoWriter(tmp_path / "x.mp4") as writer:
        writer._executable = str(tmp_path / "missing")
        monkeypatch.setattr(video_writer, "has_hybrid_fragmented", lambda executable: True)
        with pytest.raises(VideoWriteError, match=r"could not write .*ffmpeg could not be started: .*missing"):
            writer.write(noise(1))
    assert list(tmp_path.iterdir()) == []


def test_no_frame_leaves_no_file_and_an_older_video_alone(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"older")
    with VideoWriter(tmp_path / "x.mp4"):
        pass
    assert (tmp_path / "x.mp4").read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


def test_writing_after_close_is_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4") as writer:
        writer.write(noise(1))
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        writer.write(noise(1))


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
def test_an_exception_in_the_block_goes_on_unchanged_and_keeps_a_playable_part(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    (tmp_path / "x.mp4").write_bytes(b"older")

    def fail(writer: VideoWriter) -> None:
        raise kind("boom")

    with pytest.raises(kind, match="boom") as caught:
        write_then(tmp_path / "x.mp4", fail)
    assert caught.value.__notes__ == [f"4 of 4 frames are kept in '{tmp_path / 'x.part.mp4'}'"]
    assert count_video_frames(tmp_path / "x.part.mp4") == 4
    assert (tmp_path / "x.mp4").read_bytes() == b"older"


def test_an_ffmpeg_killed_on_the_way_is_an_error_and_no_final_file(tmp_path: Path) -> None:
    def go_on(writer: VideoWriter) -> None:
        kill_encoder(writer)
        for seed in range(100):
            writer.write(noise(8, seed=seed))

    with pytest.raises(VideoWriteError, match=r"could not write '.*x\.mp4': ffmpeg was killed by SIGKILL"):
        write_then(tmp_path / "x.mp4", go_on)
    assert not (tmp_path / "x.mp4").exists()


def test_an_ffmpeg_killed_after_the_last_frame_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VideoWriteError, match="SIGKILL"):
        write_then(tmp_path / "x.mp4", kill_encoder)
    assert not (tmp_path / "x.mp4").exists()


def test_lost_frames_are_an_error(tmp_path: Path) -> None:
    def pretend_one_more(writer: VideoWriter) -> None:
        writer.frames_written += 1

    with pytest.raises(VideoWriteError, match="5 frames were given and 4 are in the file; 4 of 5 frames are kept"):
        write_then(tmp_path / "x.mp4", pretend_one_more)
    assert [p.name for p in tmp_path.iterdir()] == ["x.part.mp4"]


def _run_child(body: str, tmp_path: Path, **options: object) -> subprocess.Popen:
    head = """
        import sys, numpy as np
        from pathlib import Path
        from wan_autoregressive.media.video_writer import VideoWriter, VideoWriteError
        rng = np.random.default_rng(0)
        noise = lambda n: rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8)
        target = Path(sys.argv[1]) / "x.mp4"
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_file_that_may_not_grow_is_an_error(tmp_path: Path) -> None:
    """A limit on the file size stands in for a full disk where no small file system can be mounted."""
    body = """
        try:
            with VideoWriter(target) as writer:
                for _ in range(60):
                    writer.write(noise(4))
        except VideoWriteError as error:
            print(error)
            sys.exit(7)
    """
    child = _run_child(
        body, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    )
    out, err = child.communicate(timeout=60)
    assert child.returncode == 7, err
    assert "could not write" in out
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(VideoWriteError, match="No space left on device"):
            write_then(tmp_path / "x.mp4", lambda writer: None, chunks=60)
        assert [p.name for p in tmp_path.iterdir()] == ["x.part.mp4"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_kill_of_writer_and_encoder_together_costs_one_frame(tmp_path: Path) -> None:
    """The last, which is stored when the next one comes. The chunks are of the size of a model's."""
    body = """
        import time
        writer = VideoWriter(target)
        for chunk in (9, 12, 12):
            writer.write(noise(chunk))
        print(writer._process.pid, flush=True)
        time.sleep(60)
    """
    child = _run_child(body, tmp_path)
    assert child.stdout is not None
    encoder = int(child.stdout.readline())
    part = tmp_path / "x.part.mp4"
    assert _wait_for_frames(part, 32) == 32
    os.killpg(encoder, signal.SIGKILL)
    child.kill()
    child.communicate()
    assert len(iio.imread(part, plugin="FFMPEG")) == 32
    assert not (tmp_path / "x.mp4").exists()


def test_a_kill_of_the_writer_alone_costs_nothing(tmp_path: Path) -> None:
    """The encoder finishes the part file when its input ends."""
    child = _run_child("VideoWriter(target).write(noise(21)); import os, signal; os.kill(os.getpid(), 9)", tmp_path)
    child.communicate()
    assert _wait_for_frames(tmp_path / "x.part.mp4", 21) == 21
    assert not (tmp_path / "x.mp4").exists()


def _wait_for_frames(path: Path, wanted: int) -> int:
    """Give the encoder time to encode what it was given, and to finish a file that its writer left."""
    for _ in range(100):
        with contextlib.suppress(ValueError):  # there is nothing yet
            if (found := count_video_frames(path)) >= wanted:
                return found
        time.sleep(0.1)
    raise AssertionError(f"{path} never held {wanted} frames")
