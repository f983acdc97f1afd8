"""What a KV cache holds, as tensors and plain values, and a cache filled from them again."""

import dataclasses
from typing import Any

import torch

from wan_autoregressive.cache.block_cache import WanKVBlockCache
from wan_autoregressive.cache.kv_cache import WanKVCache
from wan_autoregressive.cache.sliding_positions import SlidingPositions
from wan_autoregressive.cache.token_window import WindowState

SAVED_ATTRIBUTES = ("_mode", "jump_frames")
"""What a cache holds beside its blocks and the sizes that it was made with."""


def cache_state(cache: WanKVCache) -> dict[str, Any]:
    """The state of a cache between two forwards.

    Returns:
        Plain values and, for each block under `key` and `value`, views `(batch, valid_tokens, heads, head_dim)` in
        slot order: the order in which attention adds up, so that what follows is the same to the bit.
    """
    return {
        "sliding_positions": dataclasses.asdict(cache.sliding_positions),
        "attributes": {name: getattr(cache, name) for name in SAVED_ATTRIBUTES},
        "blocks": [_block_state(block) for block in cache.block_caches],
    }


def load_cache_state(cache: WanKVCache, state: dict[str, Any], device: torch.device) -> None:
    """Fill an empty cache, made with the same sizes, with what `cache_state` gave. Tensors are copied to `device`.

    Raises:
        ValueError: the state is of a cache with another number of blocks.
    """
    if len(state["blocks"]) != cache.num_blocks:
        raise ValueError(f"the saved cache has {len(state['blocks'])} blocks, this model has {cache.num_blocks}")
    for block, saved in zip(cache.block_caches, state["blocks"], strict=True):
        block.window.state = WindowState(**saved["window"])
        block._key = _buffer(saved["key"], saved["capacity"], device)
        block._value = _buffer(saved["value"], saved["capacity"], device)
        written = saved["written_sink_key"]
        block._written_sink_key = None if written is None else written.to(device, copy=True)
    cache.sliding_positions = SlidingPositions(**state["sliding_positions"])
    for name, value in state["attributes"].items():
        setattr(cache, name, value)


def _block_state(block: WanKVBlockCache) -> dict[str, Any]:
    length = block.window.state.length
    empty = block._key is None or block._value is None or length == 0
    return {
        "window": dataclasses.asdict(block.window.state),
        "capacity": 0 if block._key is None else block._key.shape[1],
        "key": None if empty else block._key[:, :length],  # type: ignore[index]
        "written_sink_key": block._written_sink_key,
        "value": None if empty else block._value[:, :length],  # type: ignore[index]
    }


def _buffer(valid: torch.Tensor | None, capacity: int, device: torch.device) -> torch.Tensor | None:
    """A buffer of `capacity` tokens that starts with the valid ones; None for an empty one, allocated at first use."""
    if valid is None:
        return None
    batch, length, heads, head_dim = valid.shape
    # As large as it was, so that the strides that attention sees are the same too.
    buffer = torch.empty(batch, capacity, heads, head_dim, dtype=valid.dtype, device=device)
    buffer[:, :length] = valid
    return buffer
