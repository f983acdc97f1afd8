"""Cutting a video into chunks."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from wan_autoregressive.pipelines.frame_grid import FrameGrid, latent_frames_of, pixel_frames_of


def spans(grid: FrameGrid) -> list[tuple[int, int, bool]]:
    return [(block.start, block.stop, block.given) for block in grid]


def test_the_last_chunk_takes_the_remainder():
    assert spans(FrameGrid(3, 3, total_frames=7)) == [(0, 3, False), (3, 6, False), (6, 7, False)]


def test_an_independent_first_frame():
    assert spans(FrameGrid(3, 1, given_frames=1, total_frames=7)) == [(0, 1, True), (1, 4, False), (4, 7, False)]


def test_given_frames_fill_the_grid_from_its_start():
    expected = [(0, 3, True), (3, 4, True), (4, 6, False), (6, 9, False)]
    assert spans(FrameGrid(3, 3, given_frames=4, total_frames=9)) == expected


def test_a_chunk_is_generated_around_given_frames():
    grid = FrameGrid(3, 3, given_frames=4, total_frames=9, split_at_given=False)
    assert spans(grid) == [(0, 3, True), (3, 6, False), (6, 9, False)]
    assert [chunk.fixed_frames for chunk in grid] == [0, 1, 0]
    assert grid.first_generated_frame == 3


def test_without_end():
    blocks = list(itertools.islice(FrameGrid(2, 5), 4))
    assert [(block.index, block.start, block.stop) for block in blocks] == [
        (0, 0, 5),
        (1, 5, 7),
        (2, 7, 9),
        (3, 9, 11),
    ]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 20), st.integers(1, 40), st.booleans())
def test_blocks_cover_every_frame_once(chunk, first, given_frames, generated, split):
    total = given_frames + generated
    grid = FrameGrid(chunk, first, given_frames, total, split)
    blocks = list(grid)
    assert [frame for block in blocks for frame in range(block.start, block.stop)] == list(range(total))
    given_blocks = sum(block.num_frames for block in blocks if block.given)
    assert given_blocks == grid.first_generated_frame
    assert given_blocks + sum(block.fixed_frames for block in blocks) == given_frames
    assert not split or given_blocks == given_frames
    assert max(block.num_frames for block in blocks) <= max(chunk, first)
    assert [block.index for block in blocks] == list(range(len(blocks)))


def test_pixel_frames():
    assert [latent_frames_of(n, 4) for n in (1, 2, 5, 6, 80, 81, 82)] == [1, 2, 2, 3, 21, 21, 22]
    assert [pixel_frames_of(n, 4) for n in (1, 2, 21)] == [1, 5, 81]
