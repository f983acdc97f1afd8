"""What a KV cache holds, as tensors and plain values, and a cache filled from them again."""

import dataclasses
from typing import Any

import torch

from wan_autoregressive.cache.block_cache import WanKVBlockCache
from wan_autoregressive.cache.kv_cache import WanKVCache
from wan_autoregressive.cache.sliding_positions import SlidingPositions
from wan_autoregressive.cache.token_buffer import TokenBuffer
from wan_autoregressive.cache.token_window import WindowState

SAVED_ATTRIBUTES = ("_mode", "jump_frames")
"""What a cache holds beside its blocks and the sizes that it was made with."""


def cache_state(cache: WanKVCache) -> dict[str, Any]:
    """The state of a cache between two forwards.

    Returns:
        Plain values and, for each block under `key` and `value`, views of what is kept, `(batch, valid_tokens, heads,
        …)` in slot order: the order in which attention adds up, so that what follows is the same to the bit.
    """
    return {
        "sliding_positions": dataclasses.asdict(cache.sliding_positions),
        "attributes": {name: getattr(cache, name) for name in SAVED_ATTRIBUTES},
        "blocks": [_block_state(block) for block in cache.block_caches],
    }


def load_cache_state(cache: WanKVCache, state: dict[str, Any], device: torch.device) -> None:
    """Fill an empty cache, made with the same sizes and `kv_dtype`, with what `cache_state` gave, copied to `device`.

    Raises:
        ValueError: the state is of a cache with another number of blocks.
    """
    if len(state["blocks"]) != cache.num_blocks:
        raise ValueError(f"the saved cache has {len(state['blocks'])} blocks, this model has {cache.num_blocks}")
    for block, saved in zip(cache.block_caches, state["blocks"], strict=True):
        block.window.state = WindowState(**saved["window"])
        capacity, written = saved["capacity"], saved["written_sink_key"]
        block._key = _buffer(block, saved["key"], capacity, device)
        block._value = _buffer(block, saved["value"], capacity, device)
        block._written_sink_key = _buffer(block, written, block.window.sink_size, device)
    cache.sliding_positions = SlidingPositions(**state["sliding_positions"])
    for name, value in state["attributes"].items():
        setattr(cache, name, value)


def _block_state(block: WanKVBlockCache) -> dict[str, Any]:
    length = block.window.state.length
    return {
        "window": dataclasses.asdict(block.window.state),
        "capacity": 0 if block._key is None else block._key.capacity,
        "key": _parts(block._key, length),
        "written_sink_key": _parts(block._written_sink_key, block.window.sink_size),
        "value": _parts(block._value, length),
    }


def _parts(buffer: TokenBuffer | None, length: int) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """What is kept in the first slots; a tensor by itself where that is all."""
    if buffer is None or length == 0:
        return None
    parts = tuple(part[:, :length] for part in buffer.parts)
    return parts[0] if len(parts) == 1 else parts


def _buffer(
    block: WanKVBlockCache,
    parts: torch.Tensor | tuple[torch.Tensor, ...] | None,
    capacity: int,
    device: torch.device,
) -> TokenBuffer | None:
    """A buffer of `capacity` slots that starts with what `_parts` gave; None for none, allocated at first use."""
    if parts is None:
        return None
    buffer = block._buffer_type(tuple(part.to(device) for part in (parts if isinstance(parts, tuple) else (parts,))))
    # As large as it was, so that the strides that attention sees are the same too.
    buffer.grow(capacity)
    return buffer
