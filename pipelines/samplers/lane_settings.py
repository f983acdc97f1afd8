"""Which settings lanes can work with, and how many forwards they take."""

import itertools

from wan_autoregressive.configs.rollout_config import RolloutConfig


def forwards_in_lanes(sizes: list[int], held: float, lanes: int, window: float, has_stand_ins: bool) -> int:
    """Forwards for chunks of these sizes behind the first one; lanes that hold equally much run together.

    Args:
        held: Frames in every lane at the start.
        has_stand_ins: Whether lanes that no chunk has reached yet run as well, on a stand-in for the first of these.
    """
    forwards = 0
    held_in, newest = [min(held, window)] * lanes, [-1] * lanes
    for tick in range(len(sizes) + lanes - 1 if sizes else 0):
        kinds = []
        for lane in range(lanes):
            chunk = tick - lane
            if chunk >= len(sizes) or (chunk < 0 and not has_stand_ins):
                continue
            chunk = max(chunk, 0)
            after = held_in[lane] + (0 if newest[lane] == chunk else sizes[chunk])
            kinds.append((sizes[chunk], held_in[lane], after))
            held_in[lane], newest[lane] = min(after, window), chunk
        forwards += sum(1 for _ in itertools.groupby(kinds))
    return forwards


def check_restart(config: RolloutConfig) -> None:
    """Raise `ValueError` for a `restart_positions` at which positions cannot start again."""
    restart = config.sampler_options.get("restart_positions")
    if restart is None:
        return
    if config.window_frames is None or config.position_mode != "absolute":
        raise ValueError("restart_positions needs window_frames and position_mode 'absolute'; leave it out")
    smallest = config.window_frames + config.chunk_frames
    if not isinstance(restart, int) or restart < smallest:
        raise ValueError(
            f"restart_positions is {restart!r}; positions start again at window_frames - 1, so it must be a whole "
            f"number of at least {smallest}"
        )


def check_adaptive_sink(config: RolloutConfig) -> None:
    """Raise `ValueError` for settings in which no sink can give up frames."""
    threshold = config.sampler_options.get("adaptive_sink")
    if threshold is None:
        return
    if not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
        raise ValueError(f"adaptive_sink is {threshold!r}; it is a cosine, -1 (never) to 1 (always)")
    if config.sampler_options.get("sequential") or not config.sink_frames or config.chunk_frames != 1:
        raise ValueError(
            f"adaptive_sink compares a new frame with those in the sink of its lane; it needs sink_frames and "
            f"chunk_frames=1, and no 'sequential', got sink_frames {config.sink_frames} and chunk_frames "
            f"{config.chunk_frames}"
        )
    if config.position_mode != "absolute":
        raise ValueError(
            f"adaptive_sink keeps frames in the order in which they are given up; it needs position_mode 'absolute', "
            f"got {config.position_mode!r}"
        )
