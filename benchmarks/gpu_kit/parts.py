"""Which parts there are, in the order in which they run: what others build on first, what may take long last.

Nothing is imported here: the list is there even if torch is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """One part of the kit."""

    name: str
    title: str
    function: str
    """`module:function`, called as `function(setting, record, **arguments)`."""
    share: float
    """Of the time for all parts, in percent. What a part leaves over is shared by those behind it."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs_cuda: bool = False


def _rollout(preset: str, height: int, width: int, share: float) -> Part:
    return Part(
        name=f"{preset}-{height}x{width}",
        title=f"A rollout of the {preset.upper()} model at {height}x{width}",
        function="benchmarks.gpu_kit.rollouts:measure",
        share=share,
        arguments={"preset": preset, "height": height, "width": width},
    )


PARTS = (
    Part("machine", "The machine", "benchmarks.gpu_kit.machine:measure", 4),
    Part("tests", "Tests of `tests/gpu`", "benchmarks.gpu_kit.gpu_tests:measure", 11),
    Part("parity", "Parity with recordings of the originals", "benchmarks.gpu_kit.parity:measure", 8),
    _rollout("1.3b", 480, 832, share=11),
    Part("graphs", "CUDA graphs", "benchmarks.gpu_kit.graphs:measure", 6, needs_cuda=True),
    _rollout("5b", 704, 1280, share=11),
    _rollout("5b", 480, 832, share=8),
    _rollout("1.3b", 704, 1280, share=12),
    Part("roofline", "Against bare matrix products and attentions", "benchmarks.gpu_kit.ways:roofline", 4),
    Part("alongside", "Decoding alongside", "benchmarks.gpu_kit.ways:alongside", 6),
    Part("int8", "Keys and values as int8", "benchmarks.gpu_kit.ways:int8", 4),
    Part("attention", "Attention backends", "benchmarks.gpu_kit.attention:measure", 3),
    Part("kernels", "Triton kernels", "benchmarks.gpu_kit.kernels:measure", 3, needs_cuda=True),
    Part("compile", "torch.compile", "benchmarks.gpu_kit.ways:compiled", 9),
)
