"""Names that settings choose from, and what goes together. Without torch, so that a command refuses at once."""

from typing import Literal, get_args

PositionMode = Literal["absolute", "relative", "sink_relative"]
KVDtype = Literal["int8"]
SinkUpdateMode = Literal["static", "moving_average"]
SwitchPolicy = Literal["recache", "cross_attention", "flush", "cut", "blend"]
RecacheSink = Literal["keep", "refresh"]

POSITION_MODES: tuple[str, ...] = get_args(PositionMode)
KV_DTYPES: tuple[str, ...] = get_args(KVDtype)
SINK_UPDATES: tuple[str, ...] = get_args(SinkUpdateMode)
SWITCH_POLICIES: tuple[str, ...] = get_args(SwitchPolicy)
RECACHE_SINKS: tuple[str, ...] = get_args(RecacheSink)


def check_window(window_frames: int | None, sink_frames: int, chunk_frames: int) -> None:
    """Raise `ValueError` if a window does not hold its sink and a chunk, or if there is a sink without a window.

    Args:
        chunk_frames: Of the largest chunk. All are latent frames; `window_frames=None` keeps the whole past.
    """
    if window_frames is None:
        if sink_frames:
            raise ValueError(
                f"sink_frames is {sink_frames} but window_frames is not set: nothing is ever evicted, so a sink has "
                "no effect. Set window_frames or leave the sink out"
            )
        return
    if window_frames < sink_frames + chunk_frames:
        raise ValueError(
            f"window_frames is {window_frames}, which does not hold a sink of {sink_frames} and a chunk of "
            f"{chunk_frames} latent frames; it must be at least {sink_frames + chunk_frames}"
        )


def check_sink_update(sink_update: str, sink_frames: int, position_mode: str, kv_dtype: str | None) -> None:
    """Raise `ValueError` if a sink could not be updated so."""
    if sink_update == "static":
        return
    if position_mode != "relative" or not sink_frames:
        raise ValueError(
            f"sink_update {sink_update!r} averages keys without rotary embedding; it needs position_mode 'relative' "
            f"and sink_frames, got {position_mode!r} and {sink_frames}"
        )
    if kv_dtype is not None:
        raise ValueError(
            f"sink_update {sink_update!r} changes the sink by less than the rounding of kv_dtype {kv_dtype!r}; leave "
            "out one of them"
        )
