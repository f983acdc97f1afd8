"""A video as one picture."""

import numpy as np
import pytest
from PIL import Image

from wan_autoregressive.media.contact_sheet import GAP_PIXELS, save_contact_sheet, write_contact_sheet
from wan_autoregressive.media.video_writer import VideoWriter


@pytest.mark.parametrize(
    ("frames", "shown", "grid"), [(40, 8, (4, 2)), (5, 5, (4, 2)), (3, 3, (3, 1)), (1, 1, (1, 1))]
)
def test_shows_frames_from_start_to_end(tmp_path, frames, shown, grid):
    levels = np.linspace(0, 250, frames).astype(np.uint8)
    with VideoWriter(tmp_path / "a.mp4", fps=8) as writer:
        writer.write(np.broadcast_to(levels[:, None, None, None], (frames, 16, 32, 3)))
    assert write_contact_sheet(tmp_path / "a.mp4", tmp_path / "a.png", columns=4, rows=2, width=32) == shown
    sheet = np.asarray(Image.open(tmp_path / "a.png").convert("L")).astype(int)
    columns, rows = grid
    assert sheet.shape == (rows * 16 + (rows + 1) * GAP_PIXELS, columns * 32 + (columns + 1) * GAP_PIXELS)
    every = -(-frames // 8)
    for cell in range(shown):
        row, column = divmod(cell, columns)
        top, left = GAP_PIXELS + row * (16 + GAP_PIXELS), GAP_PIXELS + column * (32 + GAP_PIXELS)
        assert abs(sheet[top + 8, left + 16] - int(levels[cell * every])) <= 4


def test_frames_in_memory_are_laid_out_the_same(tmp_path):
    frames = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)
    save_contact_sheet(frames, tmp_path / "a.png", columns=3, scale=2)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert (sheet[::2, ::2] == sheet[1::2, 1::2]).all()
    sheet = sheet[::2, ::2]
    assert sheet.shape == (3 * GAP_PIXELS + 2 * 2, 4 * GAP_PIXELS + 3 * 3, 3)
    inner = [sheet[top : top + 2, left : left + 3] for top in (2, 6) for left in (2, 7, 12)]
    assert np.array_equal(np.stack(inner[:5]), frames)
    assert (inner[5] == sheet[0, 0]).all()


def test_refuses_what_is_no_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable video"):
        write_contact_sheet(tmp_path / "a.mp4", tmp_path / "a.png")
    with VideoWriter(tmp_path / "b.mp4", fps=8) as writer:
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"missing/b\.png"):
        write_contact_sheet(tmp_path / "b.mp4", tmp_path / "missing" / "b.png")
