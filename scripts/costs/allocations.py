"""What operations of torch cost, counted as they run: new memory and floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class AllocationCounts:
    """New memory. Scratch memory inside a kernel is not seen."""

    allocations: int = 0
    """New tensor storages."""
    allocated_bytes: int = 0
    """Of those storages together."""
    peak_bytes: int = 0
    """Most bytes alive at once, of all storages that were made since counting began."""


class AllocationMode(TorchDispatchMode):
    """Counts the storages that operations make: an output whose storage is none of the inputs' is new memory."""

    def __init__(
        self, counts: AllocationCounts, on_operation: Callable[[Any, tuple[Any, ...]], None] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts
        self._on_operation = on_operation
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._live_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._on_operation is not None:
            self._on_operation(func, args)
        self._forget_dead()
        inputs = {_storage_id(x) for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        output = func(*args, **kwargs)
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor) and _storage_id(tensor) not in inputs:
                self._add(tensor.untyped_storage())
        return output

    def start_stage(self, counts: AllocationCounts) -> None:
        """Account to `counts` from now on."""
        self.counts = counts
        self._forget_dead()
        counts.peak_bytes = max(counts.peak_bytes, self._live_bytes)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._live or storage.nbytes() == 0:
            return
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live_bytes += storage.nbytes()
        self.counts.allocations += 1
        self.counts.allocated_bytes += storage.nbytes()
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._live_bytes)

    def _forget_dead(self) -> None:
        for key in [key for key, (reference, _) in self._live.items() if reference.expired()]:
            self._live_bytes -= self._live.pop(key)[1]


def flop_counter() -> FlopCounterMode:
    """A counter that knows the CPU's fused attention, which torch's own passes over."""

    def attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    return FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: attention_flops})


class FusedAttention(TorchFunctionMode):
    """Attention as one kernel, as devices have it; on the meta device PyTorch would write all scores to memory."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    return _CPU_ATTENTION(query, key, value)[0]


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
