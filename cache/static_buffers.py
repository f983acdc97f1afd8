"""Static buffers: tensors that take new values in place, so that a captured CUDA graph finds them where they were."""

import math
from collections.abc import Hashable, Sequence

import torch


class StaticBuffers:
    """One buffer for each name, which every tensor of that name is written to.

    A tensor starts where the last one of its name did, as long as the buffer is large enough and of the same dtype and
    device; what was read there before is overwritten. Tensors that must not overwrite each other need names of their
    own, so a size that comes and goes belongs in the name.
    """

    def __init__(self) -> None:
        self._memory: dict[Hashable, torch.Tensor] = {}

    def empty(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor whose values are for the caller to write.

        Args:
            device: As tensors have it, with its index: `cuda` is another one than their `cuda:0`.
        """
        size, memory = math.prod(shape), self._memory.get(name)
        if memory is None or (memory.dtype, memory.device) != (dtype, device) or memory.numel() < size:
            with torch.inference_mode(False):  # to be written outside of that mode as well
                memory = self._memory[name] = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(*shape).data  # no view to torch.compile, which would take an interest in the buffer

    def copy_in(self, name: Hashable, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy of `tensor` in its buffer, in `dtype` if that is given."""
        return self.empty(name, tensor.shape, dtype or tensor.dtype, tensor.device).copy_(tensor)

    def clear(self) -> None:
        """Free all buffers."""
        self._memory.clear()

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self._memory.values())
