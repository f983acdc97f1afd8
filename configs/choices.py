"""Names that settings choose from, where the choice is closed. What packages can add to is in `registry`."""

from typing import Literal, get_args

PositionMode = Literal["absolute", "relative", "sink_relative"]
KVDtype = Literal["int8"]
SinkUpdateMode = Literal["static", "moving_average"]
RecacheSink = Literal["keep", "refresh"]
OutputType = Literal["np", "pil", "pt", "uint8", "latent"]

POSITION_MODES: tuple[str, ...] = get_args(PositionMode)
KV_DTYPES: tuple[str, ...] = get_args(KVDtype)
SINK_UPDATES: tuple[str, ...] = get_args(SinkUpdateMode)
RECACHE_SINKS: tuple[str, ...] = get_args(RecacheSink)
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)
