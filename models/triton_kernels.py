"""Passes over memory that are several in PyTorch, as one Triton kernel each: norm and modulation, gate, rotary, int8.

    use_triton_kernels(pipe.transformer)

Off unless asked for: in bfloat16 they read and write each tensor once instead of going through float32 copies, and
round only at the end, so a video is not bit for bit the one without. They have run in Triton's interpreter only, never
on a GPU. Needs the package `triton`, which PyTorch's CUDA builds bring along. `torch.compile` fuses the same and more.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch

from wan_autoregressive.cache import int8_buffer
from wan_autoregressive.cache.int8_buffer import Int8Buffer
from wan_autoregressive.models.causal_wan_block import CausalWanAttnProcessor, CausalWanTransformerBlock
from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:  # whoever asks for the kernels is told
    triton, tl = None, SimpleNamespace(constexpr=int)


def use_triton_kernels(transformer: CausalWanTransformer3DModel) -> None:
    """Let the cached forwards of a transformer work through the kernels, and every int8 cache of the process, which
    they change by no bit.

    Raises:
        ValueError: Triton is not installed, the transformer is compiled, or it is on another device than CUDA.
    """
    if triton is None:
        raise ValueError("Triton is not installed, which CUDA builds of PyTorch bring along; `pip install triton`")
    if any(module._compiled_call_impl is not None for module in transformer.modules()):
        raise ValueError("the transformer is compiled, which fuses the same passes; use one or the other")
    if not _runs_on(transformer.device):
        raise ValueError(f"the transformer is on {transformer.device}; Triton's kernels run on CUDA, so move it first")
    for block in transformer.blocks:
        block.__class__ = TritonWanTransformerBlock
        block.attn1.processor.__class__ = TritonWanAttnProcessor
    Int8Buffer.decode = staticmethod(_decode)


class TritonWanTransformerBlock(CausalWanTransformerBlock):
    """Norm, modulation and gate in one pass each."""

    def norm_and_modulate(
        self, norm: torch.nn.LayerNorm, hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        if norm.elementwise_affine:
            return super().norm_and_modulate(norm, hidden_states, scale, shift)
        return norm_and_modulate(hidden_states, scale, shift, norm.eps)

    def add_gated(self, hidden_states: torch.Tensor, output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return add_gated(hidden_states, output, gate)


class TritonWanAttnProcessor(CausalWanAttnProcessor):
    """Rotary embedding in one pass."""

    def rotate(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate_pairs(hidden_states, cos, sin)

    rotate_own = rotate


# What the kernels compute, with the arguments of what they stand in for.


def norm_and_modulate(
    hidden_states: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    """Layer norm without weights, times `1 + scale`, plus `shift`, in float32: new `(batch, tokens, dim)` in the dtype
    of `hidden_states`. Scale and shift are `(batch, groups, dim)`, each group being consecutive tokens."""
    hidden_states, scale, shift = hidden_states.contiguous(), _with_even_rows(scale), _with_even_rows(shift)
    batch, tokens, dim = hidden_states.shape
    out = torch.empty_like(hidden_states)
    _launch(
        *(_norm_and_modulate_kernel, (batch * tokens,), dim),
        *(hidden_states, scale, shift, out, tokens // scale.shape[1], scale.stride(1), shift.stride(1), dim, eps),
    )
    return out


def add_gated(hidden_states: torch.Tensor, output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`hidden_states + output * gate` in float32: new `(batch, tokens, dim)` in the dtype of `hidden_states`, with a
    gate `(batch, groups, dim)`."""
    hidden_states, output, gate = hidden_states.contiguous(), output.contiguous(), _with_even_rows(gate)
    batch, tokens, dim = hidden_states.shape
    out = torch.empty_like(hidden_states)
    _launch(
        *(_add_gated_kernel, (batch * tokens,), dim),
        *(hidden_states, output, gate, out, tokens // gate.shape[1], gate.stride(1), dim),
    )
    return out


def rotate_pairs(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`cache.rotary.rotate_pairs`: new `(batch, tokens, heads, head_dim)` with tables `(batch or 1, tokens or 1, 1,
    head_dim)` in which the first of a pair has -sin."""
    hidden_states = _with_whole_tokens(hidden_states)
    batch, tokens, heads, head_dim = hidden_states.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    _launch(
        *(_rotate_kernel, (tokens, batch), heads * head_dim),
        *(hidden_states, cos, sin, out, *hidden_states.stride()[:2], *out.stride()[:2]),
        *(0 if side == 1 else stride for side, stride in zip(cos.shape[:2], cos.stride()[:2], strict=True)),
        *(heads * head_dim, head_dim),
    )
    return out


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`cache.int8_buffer.dequantize` to the bit: int8 `(batch, tokens, heads, head_dim)` by scales `(…, 1)`; new, in
    the dtype of the scales."""
    values, scales = _with_whole_tokens(values), _with_whole_tokens(scales)
    batch, tokens, heads, head_dim = values.shape
    out = torch.empty(values.shape, dtype=scales.dtype, device=values.device)
    _launch(
        *(_dequantize_kernel, (tokens, batch), heads * head_dim),
        *(values, scales, out, *values.stride()[:2], *scales.stride()[:2], *out.stride()[:2]),
        *(heads * head_dim, head_dim),
    )
    return out


def _decode(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """For caches wherever they are."""
    return dequantize(values, scales) if _runs_on(values.device) else int8_buffer.dequantize(values, scales)


def _runs_on(device: torch.device) -> bool:
    """Triton's interpreter, which is for tests, runs on CPU tensors."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


def _launch(kernel: Any, grid: tuple[int, ...], row: int, *arguments: Any) -> None:
    """A program for each row of `row` numbers, on the device of the first argument."""
    if not math.prod(grid):
        return
    block = triton.next_power_of_2(row)
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, block=block, num_warps=min(max(block // 256, 1), 8))


def _with_even_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`(batch, groups, dim)` whose rows are equally far apart, as those of one of several modulations are."""
    is_even = tensor.stride(2) == 1 and (
        tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    )
    return tensor if is_even else tensor.contiguous()


def _with_whole_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """`(batch, tokens, heads, head_dim)` whose tokens have their numbers side by side, as a view of a buffer has."""
    is_whole = tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3]
    return tensor if is_whole else tensor.contiguous()


# The kernels. A program works on one row, in float32. Offsets have 64 bits: a batch of windows passes 2**31 numbers.

# Their arguments are pointers and numbers of Triton's, which have no types here.
# mypy: disable-error-code="no-untyped-def"
_jit: Any = (lambda function: function) if triton is None else triton.jit


@_jit
def _norm_and_modulate_kernel(
    x, scale, shift, out, group_tokens, scale_stride, shift_stride, dim, eps, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    group = row // group_tokens
    columns = tl.arange(0, block)
    inside = columns < dim
    numbers = tl.load(x + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, numbers - tl.sum(numbers, axis=0) / dim, 0.0)
    variance = tl.sum(centred * centred, axis=0) / dim
    factor = 1 + tl.load(scale + group * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    summand = tl.load(shift + group * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    result = centred / tl.sqrt(variance + eps) * factor + summand
    tl.store(out + row * dim + columns, result.to(out.dtype.element_ty), mask=inside)


@_jit
def _add_gated_kernel(x, output, gate, out, group_tokens, gate_stride, dim, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < dim
    numbers = tl.load(x + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(output + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + (row // group_tokens) * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * dim + columns, (added * factor + numbers).to(out.dtype.element_ty), mask=inside)


@_jit
def _rotate_kernel(
    x, cos, sin, out, x_batch, x_token, out_batch, out_token, t_batch, t_token, row, head_dim, block: tl.constexpr
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < row
    start = x + batch * x_batch + token * x_token
    numbers = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
    partners = tl.load(start + (columns ^ 1), mask=inside, other=0.0).to(tl.float32)
    place = batch * t_batch + token * t_token + columns % head_dim
    cosines = tl.load(cos + place, mask=inside, other=0.0).to(tl.float32)
    sines = tl.load(sin + place, mask=inside, other=0.0).to(tl.float32)
    result = numbers * cosines + partners * sines
    tl.store(out + batch * out_batch + token * out_token + columns, result.to(out.dtype.element_ty), mask=inside)


@_jit
def _dequantize_kernel(
    values, scales, out, x_batch, x_token, s_batch, s_token, out_batch, out_token, row, head_dim, block: tl.constexpr
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < row
    levels = tl.load(values + batch * x_batch + token * x_token + columns, mask=inside, other=0).to(tl.float32)
    place = scales + batch * s_batch + token * s_token + columns // head_dim
    result = levels * tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + batch * out_batch + token * out_token + columns, result.to(out.dtype.element_ty), mask=inside)
