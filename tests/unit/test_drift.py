"""`benchmarks.drift` on clips whose drift is known."""

import csv

import numpy as np
import pytest
from PIL import Image

from benchmarks import drift
from benchmarks.drift_measures import DriftMeasures, boundary_ratio, measure_drift
from wan_autoregressive.media.video_writer import VideoWriter

FRAMES, HEIGHT, WIDTH = 57, 48, 64
STARTS = [9, 21, 33, 45]  # chunks of 3 latent frames


def steady_clip(seed: int = 0) -> np.ndarray:
    """A coloured texture that moves two pixels a frame and never comes back: `(frames, height, width, 3)` floats."""
    rng = np.random.default_rng(seed)
    texture = rng.random((HEIGHT // 4, (WIDTH + 2 * FRAMES) // 4 + 1, 3)).repeat(4, axis=0).repeat(4, axis=1)
    texture = 0.2 + 0.6 * texture
    return np.stack([texture[:, 2 * index : 2 * index + WIDTH] for index in range(FRAMES)])


def blurred(frames: np.ndarray) -> np.ndarray:
    for axis in (1, 2):
        frames = (np.roll(frames, 1, axis) + frames + np.roll(frames, -1, axis)) / 3
    return frames


def measured(frames: np.ndarray) -> DriftMeasures:
    return measure_drift((frames.clip(0, 1) * 255).round().astype(np.uint8))


def changes(frames: np.ndarray) -> dict[str, float]:
    """Of each measure from the start to the end, as a share of what it is over the steady clip."""
    found, steady = measured(frames), measured(steady_clip())
    return {
        name: float(np.subtract(*drift.ends_of(getattr(found, name))[::-1]) / np.nanmean(getattr(steady, name)))
        for name in ("brightness", "contrast", "colourfulness", "sharpness", "motion")
    }


def over_time(start: float, stop: float) -> np.ndarray:
    return np.linspace(start, stop, FRAMES)[:, None, None, None]


GRAY = steady_clip().mean(axis=(1, 2, 3), keepdims=True)
SAME_LUMA = (steady_clip() @ np.array([0.2126, 0.7152, 0.0722]))[..., None]


@pytest.mark.parametrize(
    ("clip", "down"),
    [
        (steady_clip() * over_time(1, 0.6), {"brightness", "contrast", "colourfulness", "motion"}),
        (GRAY + (steady_clip() - GRAY) * over_time(1, 0.4), {"contrast", "colourfulness", "motion"}),
        (SAME_LUMA + (steady_clip() - SAME_LUMA) * over_time(1, 0.2), {"colourfulness"}),
        (steady_clip() * over_time(1, 0) + blurred(steady_clip()) * over_time(0, 1), {"sharpness"}),
    ],
    ids=["darker", "flatter", "paler", "softer"],
)
def test_a_drift_shows_where_it_belongs(clip, down):
    found = changes(clip)
    assert {name for name, change in found.items() if change < -0.25} == down
    # A blur takes some contrast and motion along, which are measured in the same light.
    assert all(abs(change) < 0.25 for name, change in found.items() if name not in down), found


def test_a_steady_clip_does_not_drift():
    assert all(abs(change) < 0.2 for change in changes(steady_clip()).values())
    found = measured(steady_clip())
    assert found.colour_shift.max() < 0.02
    assert 0.7 < boundary_ratio(found.motion, STARTS) < 1.4


def test_measures_are_what_they_say():
    clip = np.zeros((3, 32, 32, 3))
    clip[1], clip[2, :, :16, 0] = 1, 1
    found = measure_drift((clip * 255).astype(np.uint8), chunk_frames=1)
    assert found.brightness == pytest.approx([0, 1, 0.1063], abs=1e-6)  # half of red's 0.2126
    assert found.contrast == pytest.approx([0, 0, 0.1063], abs=1e-6)
    assert found.motion[1:] == pytest.approx([1, 0.8937], abs=1e-6)
    assert found.brightness_step[1:] == pytest.approx([1, 0.8937], abs=1e-6)
    assert np.isnan([found.motion[0], found.brightness_step[0], found.repetition[0]]).all()
    # Half of the frame has the opponents 1 and 0.5: standard deviations of half of that, and half of it as means.
    assert found.colourfulness == pytest.approx([0, 0, 1.3 * np.hypot(0.5, 0.25)], abs=1e-6)
    assert found.sharpness[:2] == pytest.approx([0, 0])
    # The edge is in 2 of the 30 inner columns: Laplacians of +1 and -1, in 256 / 4 of the variance that 0 and 1 have.
    assert found.sharpness[2] == pytest.approx(4 * 2 / 30, rel=1e-5)


def test_a_colour_that_moves_off_is_seen_and_light_alone_is_not():
    redder = steady_clip() + over_time(0, 0.15) * np.array([1.0, 0, 0])
    shift = measured(redder).colour_shift
    assert shift[-1] > 0.08 > 0.02 > shift[:12].max()
    assert measured(steady_clip() + over_time(0, 0.1)).colour_shift.max() < 0.02


def test_a_step_at_each_boundary_is_seen():
    clip = steady_clip()
    for index, start in enumerate(STARTS):
        clip[start:] += 0.05 * (-1) ** index
    found = measured(clip)
    assert boundary_ratio(found.brightness_step, STARTS) > 5
    assert boundary_ratio(found.brightness_step, [start + 5 for start in STARTS]) < 1


def test_boundaries_without_figures():
    assert np.isnan(boundary_ratio(np.array([np.nan, 1, 1], np.float32), []))
    assert np.isnan(boundary_ratio(np.zeros(5, np.float32), [2]))
    assert boundary_ratio(np.array([0, 0, 1, 0], np.float32), [2, 99]) == np.inf
    assert boundary_ratio(np.array([np.nan, 2, 3, 4], np.float32), [0, 2]) == 1


def test_what_comes_back_is_repetition():
    clip = steady_clip()
    loop = np.concatenate([clip[:20], clip[:20], clip[:17]])
    found = measured(loop).repetition
    assert np.isnan(found[:12]).all()
    assert found[20:].min() == 1
    assert found[12:20].max() < 0.6
    assert np.nanmax(measured(clip).repetition) < 0.6
    assert measured(np.repeat(clip[:1], FRAMES, axis=0)).repetition[12:].min() == 1  # a still as well


def test_chunks_begin_where_their_pixels_do():
    assert drift.chunk_starts(57, 3) == STARTS
    assert drift.chunk_starts(30, 3, first_chunk_frames=1) == [1, 13, 25]
    assert drift.chunk_starts(9, 3) == []
    with pytest.raises(ValueError, match="each must have at least 1"):
        drift.chunk_starts(9, 0)


@pytest.mark.parametrize("shape", [(0, 48, 64, 3), (4, 48, 64), (4, 8, 64, 3), (4, 48, 64, 4)])
def test_other_frames_are_refused(shape):
    with pytest.raises(ValueError, match="the frames are"):
        measure_drift(np.zeros(shape, np.uint8))


def test_the_command_reads_a_file_and_writes_csv_and_plot(tmp_path, capsys):
    clip = (steady_clip() * over_time(1, 0.5) * 255).astype(np.uint8)
    with VideoWriter(tmp_path / "clip.mp4", fps=16) as writer:
        writer.write(clip)
    files = ["--csv", str(tmp_path / "drift.csv"), "--plot", str(tmp_path / "drift.png")]
    drift.main([str(tmp_path / "clip.mp4"), "--height", str(HEIGHT), "--width", str(WIDTH), *files])
    with (tmp_path / "drift.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["frame"]) for row in rows if int(row["chunk_starts"])] == STARTS
    found = measure_drift(clip)
    # The file is compressed.
    assert [float(row["brightness"]) for row in rows] == pytest.approx(found.brightness.tolist(), abs=0.02)
    assert rows[0]["motion"] == ""
    with Image.open(tmp_path / "drift.png") as image:
        assert image.format == "PNG"
    shown = capsys.readouterr().out
    assert "57 frames, 4 boundaries" in shown
    assert all(name.replace("_", " ") in shown for name in DriftMeasures.names())


def test_the_command_refuses_what_is_no_video(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        drift.main([str(tmp_path / "nothing.mp4")])
    assert left.value.code == 2
    assert "does not exist" in capsys.readouterr().err
