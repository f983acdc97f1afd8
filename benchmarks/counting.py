"""Exact counts of one chunk of a real rollout: FLOPs, allocations, bytes of keys and values, stage by stage.

The same on every run, unlike seconds. The formulas of `wan_autoregressive.scripts.costs` are held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from wan_autoregressive.pipelines import WanRollout
from wan_autoregressive.scripts.costs.allocations import AllocationCounts, AllocationMode, flop_counter

STAGES = ("clean_pass", "denoise", "decode")


@dataclass
class StageCounts(AllocationCounts):
    """What one stage of one chunk did."""

    forwards: int = 0
    """Of the transformer."""
    flops: int = 0
    kv_written_bytes: int = 0
    kv_read_bytes: int = 0
    """Keys and values that the self-attentions attended to, each forward's counted once. Both in bytes of the cache,
    which int8 makes fewer than attention's."""


class _StageCounter:
    """Follows one `step()` from stage to stage, by what the models are called with.

    A step begins with the clean pass of the chunk before it, if there is one, which is a forward of each transformer;
    then comes denoising; a call of the VAE, or first of the preview's, ends it.
    """

    def __init__(self, rollout: WanRollout, on_operation: Callable[[str, Any, tuple[Any, ...]], None] | None) -> None:
        preview = () if rollout.components.preview_codec is None else ("preview",)
        self.stages = {name: StageCounts() for name in (*STAGES, *preview)}
        self._rollout = rollout
        self._stage = "clean_pass" if rollout.chunks_done else "denoise"
        self._attending_blocks: list[int] = []
        self._flop_counter = flop_counter()
        self._flops_before = 0
        listener = None if on_operation is None else lambda func, args: on_operation(self._stage, func, args)
        self._allocations = AllocationMode(self.stages[self._stage], listener)

    @contextmanager
    def counting(self) -> Iterator[None]:
        components, hooks = self._rollout.components, []
        with ExitStack() as stack:
            for transformer in components.transformers:
                hooks += [
                    transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                    transformer.register_forward_hook(self._after_forward, with_kwargs=True),
                ]
                for index, block in enumerate(transformer.blocks):
                    hooks.append(block.attn1.to_out[0].register_forward_pre_hook(self._note_attention(index)))
            for stage, codec in (("preview", components.preview_codec), ("decode", components.codec)):
                for module in () if codec is None else _first_to_decode(codec.vae):
                    hooks.append(module.register_forward_pre_hook(lambda *_, of=stage: self._enter(of)))
            for hook in hooks:
                stack.callback(hook.remove)
            stack.enter_context(self._flop_counter)
            stack.enter_context(self._allocations)
            yield
            self._enter(self._stage)

    def _enter(self, stage: str) -> None:
        flops = self._flop_counter.get_total_flops()
        self.stages[self._stage].flops += flops - self._flops_before
        self._flops_before = flops
        if stage != self._stage:
            self._stage = stage
            self._allocations.start_stage(self.stages[stage])

    def _note_attention(self, index: int) -> Callable[..., None]:
        # The output projection runs exactly when a block has attended, which the end of a clean pass does not.
        return lambda *_: self._attending_blocks.append(index)

    def _before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._enter("clean_pass" if kwargs["attention_kwargs"]["plan"].keys_values_only else "denoise")
        self._attending_blocks.clear()

    def _after_forward(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        block_caches = kwargs["attention_kwargs"]["plan"].block_caches
        counts, per_token = self.stages[self._stage], block_caches[0].bytes_per_token
        counts.forwards += 1
        counts.kv_written_bytes += per_token * sum(cache.planned_kept for cache in block_caches)
        attended = (place for i in self._attending_blocks for place in block_caches[i].planned_places)
        counts.kv_read_bytes += per_token * sum(stop - start for start, stop in attended)
        self._enter("denoise")


def _first_to_decode(vae: Any) -> tuple[Any, ...]:
    """The modules of which one is called first, in Wan's VAE or in the tiny one, which has its layers called."""
    if hasattr(vae, "post_quant_conv"):
        return vae.post_quant_conv, vae.decoder
    return (vae.decoder[0],)


def count_step(
    rollout: WanRollout, on_operation: Callable[[str, Any, tuple[Any, ...]], None] | None = None
) -> dict[str, StageCounts]:
    """Make the next chunk of a rollout and count what each stage does.

    Args:
        on_operation: Called with the stage, the operator and its arguments before every operation.

    Returns:
        Counts by stage: `clean_pass` (of the chunk before), `denoise`, `decode`, and `preview` where there is one.
    """
    counter = _StageCounter(rollout, on_operation)
    with counter.counting():
        rollout.step()
    return counter.stages
