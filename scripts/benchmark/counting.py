"""Exact counts of one chunk: FLOPs, allocations, bytes of keys and values. The same on every run, unlike seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from wan_autoregressive.pipelines.rollout import WanRollout

STAGES = ("clean_pass", "denoise", "decode")
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class StageCounts:
    """What one stage of one chunk did."""

    forwards: int = 0
    """Of the transformer."""
    flops: int = 0
    allocations: int = 0
    """New tensor storages; scratch memory inside a kernel is not seen."""
    allocated_bytes: int = 0
    """Of those storages together."""
    peak_bytes: int = 0
    """Most bytes alive at once, of all storages that were made since the chunk began."""
    kv_written_bytes: int = 0
    kv_read_bytes: int = 0
    """Keys and values that the self-attentions attended to, each forward's counted once. Both in bytes of the cache,
    which int8 makes fewer than attention's."""


class AllocationMode(TorchDispatchMode):
    """Counts the storages that operations make: an output whose storage is none of the inputs' is new memory."""

    def __init__(
        self, counts: StageCounts, on_operation: Callable[[Any, tuple[Any, ...]], None] | None = None
    ) -> None:
        super().__init__()
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

    def start_stage(self, counts: StageCounts) -> None:
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


class _StageCounter:
    """Follows one `step()` from stage to stage, by what the models are called with.

    A step begins with the clean pass of the chunk before it, if there is one, which is a single forward; then comes
    denoising, which begins with a forward in append mode; a call of the VAE ends it.
    """

    def __init__(self, rollout: WanRollout, on_operation: Callable[[str, Any, tuple[Any, ...]], None] | None) -> None:
        self.stages = {name: StageCounts() for name in STAGES}
        self._rollout = rollout
        self._stage = "clean_pass" if rollout.chunks_done else "denoise"
        self._attending_blocks: list[int] = []
        self._flop_counter = flop_counter()
        self._flops_before = 0
        listener = None if on_operation is None else lambda func, args: on_operation(self._stage, func, args)
        self._allocations = AllocationMode(self.stages[self._stage], listener)

    @contextmanager
    def counting(self) -> Iterator[None]:
        transformer, vae = self._rollout.pipe.transformer, self._rollout.pipe.vae
        with ExitStack() as stack:
            hooks = [
                transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                transformer.register_forward_hook(self._after_forward, with_kwargs=True),
            ]
            for index, block in enumerate(transformer.blocks):
                hooks.append(block.attn1.to_out[0].register_forward_pre_hook(self._note_attention(index)))
            for module in (vae.post_quant_conv, vae.decoder) if vae is not None else ():
                hooks.append(module.register_forward_pre_hook(lambda *_: self._enter("decode")))
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
        if not kwargs["attention_kwargs"]["plan"].keys_values_only:
            self._enter("denoise")
        self._attending_blocks.clear()

    def _after_forward(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        block_caches = kwargs["attention_kwargs"]["plan"].block_caches
        counts, per_token = self.stages[self._stage], block_caches[0].bytes_per_token
        counts.forwards += 1
        counts.kv_written_bytes += per_token * sum(cache.planned_tokens for cache in block_caches)
        counts.kv_read_bytes += per_token * sum(block_caches[i].planned_length for i in self._attending_blocks)
        self._enter("denoise")


def count_step(
    rollout: WanRollout, on_operation: Callable[[str, Any, tuple[Any, ...]], None] | None = None
) -> dict[str, StageCounts]:
    """Make the next chunk of a rollout and count what each stage does.

    Args:
        on_operation: Called with the stage, the operator and its arguments before every operation.

    Returns:
        Counts by stage: `clean_pass` (of the chunk before), `denoise`, `decode`.
    """
    counter = _StageCounter(rollout, on_operation)
    with counter.counting():
        rollout.step()
    return counter.stages


def flop_counter() -> FlopCounterMode:
    """A counter that knows the CPU's fused attention, which torch's own passes over."""

    def attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    return FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: attention_flops})


def _storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
