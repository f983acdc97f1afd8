"""Dynamic dimensions: one graph for tensors of any length, where torch.compile would make one for each."""

import torch
import torch._dynamo


def mark_dynamic(*tensors: torch.Tensor, dim: int = 1) -> None:
    """A block compiled after this makes no assumption on the size of `dim`, if it can do without."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
