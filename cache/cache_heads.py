"""Heads in the state of a [`WanKVCache`]: who shares them with others takes them apart here, and joins them."""

from collections.abc import Callable
from typing import Any

import torch

ChangeHeads = Callable[[torch.Tensor, int], torch.Tensor]
"""Another tensor in the place of one, with other heads along the dimension that is named."""


def change_heads(state: dict[str, Any], change: ChangeHeads) -> dict[str, Any]:
    """What `state_dict` of a cache gave, with other heads in every block; all else as it is."""
    return {**state, "blocks": [_change_block(block, change) for block in state["blocks"]]}


def _change_block(block: dict[str, Any], change: ChangeHeads) -> dict[str, Any]:
    """Keys and values are `(batch, tokens, heads, …)`, in parts where they are kept as int8; in the bank `(batch,
    frames, frame_size, heads, head_dim)`."""

    def changed(held: Any, dim: int = 2) -> Any:
        if isinstance(held, tuple):
            return tuple(change(part, dim) for part in held)
        return None if held is None else change(held, dim)

    new = {name: changed(block[name]) for name in ("key", "value", "written_sink_key")}
    if block["bank"] is not None:
        new["bank"] = block["bank"] | {name: changed(block["bank"][name], 3) for name in ("key", "value")}
    return block | new
