"""Reading what a video starts from: covers the size, crops at the centre, refuses what is damaged."""

import struct
import subprocess
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_autoregressive.media import ffmpeg, reading
from wan_autoregressive.media.reading import load_image, load_video
from wan_autoregressive.media.video_writer import VideoWriter


def thirds(height: int, width: int) -> np.ndarray:
    """Red, green and blue side by side: a crop that is off centre shows red or blue."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : width // 3, 0] = frame[:, width // 3 : -(width // 3), 1] = frame[:, -(width // 3) :, 2] = 255
    return frame


@pytest.mark.parametrize("scale", [1, 3])
def test_a_wide_image_is_cropped_at_the_centre(tmp_path: Path, scale: int) -> None:
    Image.fromarray(thirds(32 * scale, 96 * scale)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", height=32, width=32)
    assert image.shape == (1, 32, 32, 3)
    assert image.dtype == np.uint8
    assert np.abs(image[0, 2:-2, 2:-2].astype(int) - (0, 255, 0)).max() <= 5  # the filter rings a little


def test_a_tall_image_is_cropped_at_the_centre(tmp_path: Path) -> None:
    Image.fromarray(thirds(48, 96).transpose(1, 0, 2).copy()).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", height=16, width=48)[0, 2:-2] == (0, 255, 0)).all()


def test_an_image_of_the_right_size_is_unchanged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", 32, 48)[0] == pixels).all()


def test_transparency_is_laid_over_white_and_orientation_applied(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png", 16, 16) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(thirds(16, 48)).save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png", 48, 16)[0]
    assert (turned[1, :] == (255, 0, 0)).all()
    assert (turned[-2, :] == (0, 0, 255)).all()


def _clip(path: Path, frames: int = 8, fps: float = 8) -> np.ndarray:
    levels = np.linspace(0, 255, frames).astype(np.uint8)
    pixels = np.broadcast_to(levels[:, None, None, None], (frames, 32, 64, 3))
    with VideoWriter(path, fps=fps, crf=0) as writer:
        writer.write(pixels)
    return levels


def test_a_clip_is_read_whole_or_up_to_a_count(tmp_path: Path) -> None:
    levels = _clip(tmp_path / "a.mp4").astype(int)
    whole = load_video(tmp_path / "a.mp4", height=16, width=16)
    assert whole.shape == (8, 16, 16, 3)
    assert np.abs(whole.mean(axis=(1, 2, 3)) - levels).max() <= 3
    whole[0] = 0  # the caller owns the memory
    part = load_video(tmp_path / "a.mp4", height=16, width=32, max_frames=3)
    assert part.shape == (3, 16, 32, 3)
    assert np.abs(part.mean(axis=(1, 2, 3)) - levels[:3]).max() <= 3


@pytest.mark.parametrize(("fps", "frames"), [(4, 4), (16, 16), (8, 8)])
def test_a_clip_can_be_resampled_to_another_rate(tmp_path: Path, fps: float, frames: int) -> None:
    _clip(tmp_path / "a.mp4")
    assert len(load_video(tmp_path / "a.mp4", 16, 16, fps=fps)) == frames


def test_a_gap_of_a_day_is_filled_no_further_than_is_read(tmp_path: Path) -> None:
    """Left to itself ffmpeg fills all of it at once, which takes minutes and gigabytes."""
    levels = _clip(tmp_path / "a.mp4", frames=60).astype(int)
    command = [ffmpeg.ffmpeg_executable(), "-v", "error", "-i", str(tmp_path / "a.mp4"), "-c", "copy"]
    subprocess.run(
        [*command, "-bsf:v", r"setts=ts=if(gt(N\,3)\,TS+1e5/TB\,TS)", str(tmp_path / "gap.mp4")], check=True
    )
    clip = load_video(tmp_path / "gap.mp4", 16, 16, max_frames=40, fps=16)
    shown = np.minimum(np.arange(40) // 2, 3)
    assert np.abs(clip.mean(axis=(1, 2, 3)) - levels[shown]).max() <= 3


def test_a_clip_read_without_a_limit_must_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _clip(tmp_path / "a.mp4")
    monkeypatch.setattr(reading, "MOST_CLIP_BYTES", 8 * 16 * 16 * 3)
    assert len(load_video(tmp_path / "a.mp4", 16, 16)) == 8
    with pytest.raises(ValueError, match="more than 8 frames; give max_frames"):
        load_video(tmp_path / "a.mp4", 16, 16, fps=16)


def test_an_ffmpeg_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _clip(tmp_path / "a.mp4")
    (tmp_path / "hangs").write_text("#!/bin/sh\ntrap '' TERM INT\nwhile :; do sleep 1; done\n")
    (tmp_path / "hangs").chmod(0o755)
    monkeypatch.setattr(ffmpeg, "ffmpeg_executable", lambda: str(tmp_path / "hangs"))
    monkeypatch.setattr(reading, "time_limit_s", lambda path: 0.2)
    with pytest.raises(ValueError, match=r"was not done after 0 seconds and was killed"):
        load_video(tmp_path / "a.mp4", 16, 16)


def test_a_list_of_files_is_no_clip(tmp_path: Path) -> None:
    """What it names would be read in its place."""
    _clip(tmp_path / "a.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    with pytest.raises(ValueError, match=r"none of the containers that are read \(mov, mp4, matroska") as caught:
        load_video(tmp_path / "list.mp4", 16, 16)
    assert "\n" not in str(caught.value)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """By what its header claims; there is nothing behind it here, so that decoding would fail otherwise."""

    def claim(width: int, height: int) -> Path:
        png = b"\x89PNG\r\n\x1a\n"
        for kind, content in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
            png += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        (tmp_path / "a.png").write_bytes(png)
        return tmp_path / "a.png"

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's would stand beside the message
        for size in ((8192, 8193), (10_000, 10_000)):
            with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} pixels, the most that is read is 67,108,864"):
                load_image(claim(*size), 16, 16)
        with pytest.raises(ValueError, match=r"cannot read .*a\.png"):
            load_image(claim(100_000, 100_000), 16, 16)


@pytest.mark.parametrize("name", ["a:b.mp4", "-x.mp4"])
def test_names_that_ffmpeg_could_mistake(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _clip(Path(name))
    assert len(load_video(name, 16, 16)) == 8


@pytest.mark.parametrize("load", [load_image, load_video])
def test_missing_empty_and_foreign_files_are_one_line_errors(tmp_path: Path, load) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello\n" * 100)
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(5000))
    for name in ("missing", "empty", "text", "noise", "."):
        with pytest.raises(ValueError, match="cannot read") as caught:
            load(tmp_path / name, 16, 16)
        assert "\n" not in str(caught.value)


def test_truncated_files_are_errors(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="cannot read"):
            load_image(tmp_path / name, 16, 16)
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8))
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot read"):
        load_video(tmp_path / "a.mp4", 16, 16)


def test_damage_in_the_middle_of_a_clip_is_an_error(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8))
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read"):
        load_video(tmp_path / "a.mp4", 16, 16)
