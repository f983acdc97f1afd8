"""The rolling KV cache: which tokens are kept, and where."""

from wan_autoregressive.cache.adaptive_sink import AdaptiveSink
from wan_autoregressive.cache.block_cache import WanKVBlockCache
from wan_autoregressive.cache.kv_cache import WanKVCache
from wan_autoregressive.cache.lane_caches import LaneBlock, LaneCaches
from wan_autoregressive.cache.sink_update import MovingAverageSink, SinkUpdate
from wan_autoregressive.cache.token_window import PastView, TokenWindow

__all__ = [
    "AdaptiveSink",
    "LaneBlock",
    "LaneCaches",
    "MovingAverageSink",
    "PastView",
    "SinkUpdate",
    "TokenWindow",
    "WanKVBlockCache",
    "WanKVCache",
]
