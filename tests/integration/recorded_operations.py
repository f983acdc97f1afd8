"""The operations of a piece of work, to be compared or done again: what a CUDA graph is, on any device."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Recording(TorchDispatchMode):
    """The operations under it and their arguments: tensors that were there before by their address.

    `replay` is what a CUDA graph does: the same operations again, on the same memory and with no Python in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self._made: set[int] = set()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations.append((str(func), *tree_leaves(tree_map(self._described, (args, kwargs)))))
        before = {_memory(arg) for arg in tree_leaves((args, kwargs)) if isinstance(arg, torch.Tensor)}
        result = func(*args, **kwargs)
        self._made |= {_memory(out) for out in tree_leaves(result) if isinstance(out, torch.Tensor)} - before
        self._calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, recorded in self._calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and _memory(old) != _memory(new):
                    old.copy_(new)

    def _described(self, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return repr(arg)
        address = "made here" if _memory(arg) in self._made else arg.data_ptr()
        return repr((address, arg.dtype, tuple(arg.shape), arg.stride()))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record_to_replay(run: Callable[[], torch.Tensor | None]) -> tuple[Callable[[], None], torch.Tensor | None]:
    """In the place of `benchmarks.gpu_kit.captured_forwards.capture_graph`."""
    with Recording() as recording:
        result = run()
    return recording.replay, result
