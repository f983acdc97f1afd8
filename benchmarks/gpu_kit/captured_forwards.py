"""Forwards of a rollout as CUDA graphs: each kind is captured once, all later ones are replays of it.

Behind a full window a forward of a kind is the same operations on the same memory as the last one
(`tests/integration/test_static_addresses.py`), so that a replay of it does what it would have done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from wan_autoregressive import CausalWanTransformer3DModel
from wan_autoregressive.models.forward_plan import ForwardPlan

Flow = torch.Tensor | None
"""`(batch, channels, frames, height, width)`; None of a forward that only leaves keys and values."""
Run = Callable[[], Flow]
Capture = Callable[[Run], tuple[Callable[[], None], Flow]]
"""Does the work once. Returns what does it again, and the memory that the result is in each time."""


def capture_graph(run: Run) -> tuple[Callable[[], None], Flow]:
    """Capture the work as a CUDA graph, for work that may be done twice."""
    device_stream, warm_up_stream = torch.cuda.current_stream(), torch.cuda.Stream()
    # Once without capturing: it loads kernels and makes workspaces, which a capture may not.
    warm_up_stream.wait_stream(device_stream)
    with torch.cuda.stream(warm_up_stream):
        run()
    device_stream.wait_stream(warm_up_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    graph.replay()  # a capture computes nothing
    return graph.replay, result


class CapturedForwards:
    """While it is entered, steady forwards of a transformer are captured and replayed; it may be entered again.

    For the sampler `chunkwise`. Weights and LoRA adapters stay what they were at the capture.

    Args:
        capture: Of a forward; another one than CUDA's is for machines without.
    """

    def __init__(self, transformer: CausalWanTransformer3DModel, capture: Capture = capture_graph) -> None:
        self._transformer = transformer
        self._forward = transformer.forward
        self._capture = capture
        self._captured: dict[Any, tuple[Callable[[], None], Flow]] = {}
        self.replays = 0

    def __enter__(self) -> Self:
        self._transformer.forward = self._captured_forward  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self._transformer.forward

    @property
    def graphs(self) -> int:
        return len(self._captured)

    def _captured_forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Flow]:
        plan, cache = kwargs["attention_kwargs"]["plan"], kwargs["attention_kwargs"]["kv_cache"]

        def run() -> Flow:
            flow: Flow = self._forward(hidden_states, *args, **kwargs)[0]
            return flow

        if not _is_steady(plan, cache.window_size):
            return (run(),)
        # What forwards differ in by their operations or their memory.
        kind = plan.keys_values_only, tuple(hidden_states.shape), cache
        if kind in self._captured:
            self._captured[kind][0]()
            self.replays += 1
        else:
            self._captured[kind] = self._capture(run)
        flow = self._captured[kind][1]
        return (None if flow is None else flow.clone(),)


def _is_steady(plan: ForwardPlan, window_size: int) -> bool:
    """Whether the window is full, and neither text nor time is computed on the way, as happens once for each."""
    block = plan.block_caches[0]
    assert block is not None
    assert plan.time is not None
    assert plan.text is not None
    return block.planned_held == window_size and plan.time.modulation is not None and plan.text.is_complete
