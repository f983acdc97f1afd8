"""Keys and values as int8: bounds of the error, what attention gets, and bytes against their formula."""

import pytest
import torch

from wan_autoregressive import WanKVCache
from wan_autoregressive.cache import MovingAverageSink
from wan_autoregressive.cache.int8_buffer import dequantize, quantize
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.scripts.costs.allocations import AllocationCounts, AllocationMode

BATCH, HEADS, HEAD_DIM, CHUNK = 2, 3, 64, 12
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(tokens: int = CHUNK, seed: int = 0, dtype=torch.float32, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_an_outlier(dtype) -> torch.Tensor:
    tokens = randn(dtype=dtype)
    tokens[..., 5] = 3e4
    return tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: randn(dtype=dtype),
        with_an_outlier,
        lambda dtype: randn(dtype=dtype) * 1e-4,
        lambda dtype: torch.full((1, 2, HEADS, HEAD_DIM), -1 / 3, dtype=dtype),
    ],
    ids=["random", "outlier", "small", "constant"],
)
def test_a_number_comes_back_within_half_a_scale(make, dtype):
    tokens = make(dtype)
    values, scales = quantize(tokens)
    assert (values.dtype, scales.dtype, scales.shape) == (torch.int8, dtype, (*tokens.shape[:3], 1))
    back = dequantize(values, scales)
    assert back.dtype == dtype
    assert values.double().abs().max() <= 127
    error = (back.double() - tokens.double()).abs()
    # The last term is the rounding of the product to the dtype, and in float32 that of the quotient.
    bound = scales.double() / 2 + torch.finfo(dtype).eps / 2 * torch.maximum(back.abs(), tokens.abs()).double()
    assert (error <= bound).all()


def test_the_bound_is_reached():
    values, scales = quantize(randn())
    error = ((dequantize(values, scales) - randn()).abs() / scales).max()
    assert 0.45 < error <= 0.5001


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_stay_zeros(dtype):
    tokens = randn(dtype=dtype)
    tokens[:, 3] = 0
    values, scales = quantize(tokens)
    assert (scales > 0).all()  # 0 / 0 as int8 is whatever the machine makes of it
    back = dequantize(values, scales)
    assert back.isfinite().all()
    assert back[:, 3].count_nonzero() == 0
    assert back[:, 2].count_nonzero() > 0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(number):
    tokens = randn()
    tokens[0, 1, 2, 3] = number
    back = dequantize(*quantize(tokens))
    assert back[0, 1, 2].isnan().all()
    assert back[0, 1, :2].isfinite().all()


def caches(**sizes) -> tuple[WanKVCache, WanKVCache]:
    return WanKVCache(1, **sizes), WanKVCache(1, **sizes, kv_dtype="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_differs_by_little(dtype):
    """Root mean square of the difference against that of the output: half a scale is 1 % of a standard deviation."""
    plain, int8 = caches(window_size=8 * CHUNK, sink_size=CHUNK)
    for number in range(12):
        chunk = randn(seed=2 * number, dtype=dtype), randn(seed=2 * number + 1, dtype=dtype)
        exact, got = plain.update(0, *chunk), int8.update(0, *chunk)
    query = randn(seed=99, dtype=dtype)
    outputs = []
    for key, value in (exact, got):
        heads_first = (x.transpose(1, 2).double() for x in (query, key, value))
        outputs.append(torch.nn.functional.scaled_dot_product_attention(*heads_first))
    assert got[0].dtype == dtype
    relative = (outputs[0] - outputs[1]).square().mean().sqrt() / outputs[0].square().mean().sqrt()
    assert 1e-3 < relative < 1.2e-2


def test_attention_gets_the_newest_chunk_itself_and_the_past_as_it_is_kept():
    _, cache = caches(window_size=2 * CHUNK + 5, sink_size=3)
    for number in range(6):
        chunk = randn(seed=number), randn(seed=-number)
        for mode in ("append", "overwrite"):
            getattr(cache, f"enable_{mode}_mode")()
            got = cache.update(0, *chunk)
            block = cache.block_caches[0]
            kept = block.cached_key, block.cached_value
            for attended, exact, held in zip(got, chunk, kept, strict=True):
                newest = torch.zeros(attended.shape[1], dtype=torch.bool)
                for start, stop in block.window.state.newest:
                    newest[start:stop] = True
                assert torch.equal(held[:, -CHUNK:], dequantize(*quantize(exact)))
                past = held[:, :-CHUNK].sort(dim=1).values
                assert torch.equal(attended[:, ~newest].sort(dim=1).values, past)
                assert torch.equal(attended[:, newest].sort(dim=1).values, exact.sort(dim=1).values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [{"window_size": 8 * CHUNK, "sink_size": CHUNK}, {"max_tokens": 8 * CHUNK}])
def test_bytes_and_their_peak_are_those_of_the_formula(dtype, sizes):
    """Six blocks of int8 and scales, one block's keys and values in the model's dtype, the chunk's slot numbers."""
    blocks, slots, slot_numbers = 6, 2 * BATCH * 8 * CHUNK * HEADS, 8 * CHUNK
    chunks = [(randn(seed=number, dtype=dtype), randn(seed=-number, dtype=dtype)) for number in range(8)]
    peaks = {}
    for kv_dtype in (None, "int8"):
        cache, counts = WanKVCache(blocks, **sizes, kv_dtype=kv_dtype), AllocationCounts()
        with AllocationMode(counts):
            for chunk in chunks:
                for step in range(2):
                    cache.enable_append_mode() if step == 0 else cache.enable_overwrite_mode()
                    for block in range(blocks):
                        cache.update(block, *chunk)
        assert cache.allocated_bytes == cache.expected_bytes(BATCH, HEADS, HEAD_DIM, dtype)
        peaks[kv_dtype] = counts.peak_bytes
    itemsize = dtype.itemsize
    assert cache.allocated_bytes == blocks * slots * (HEAD_DIM + itemsize)
    assert peaks["int8"] == cache.allocated_bytes + slots * HEAD_DIM * itemsize + slot_numbers
    assert peaks[None] == blocks * slots * HEAD_DIM * itemsize + slot_numbers
    assert peaks["int8"] < (0.45 if itemsize == 4 else 0.7) * peaks[None]


def test_buffers_that_grow_keep_what_they_hold():
    cache = WanKVCache(1, kv_dtype="int8")
    for number in range(9):
        cache.update(0, randn(seed=number), randn(seed=number))
    expected = torch.cat([dequantize(*quantize(randn(seed=number))) for number in range(9)], dim=1)
    assert torch.equal(cache.block_caches[0].cached_key, expected)
    assert cache.allocated_bytes == WanKVCache(1, kv_dtype="int8").expected_bytes(
        BATCH, HEADS, HEAD_DIM, torch.float32, num_tokens=16 * CHUNK
    )
    cache.release()
    assert cache.allocated_bytes == 0


def quarter_turns(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.tensor(number * 0.7).expand(1, 1, 1, HEAD_DIM)
    return angle.cos(), angle.sin() * torch.tensor([-1.0, 1.0]).repeat(HEAD_DIM // 2)


def test_a_sink_that_moves_is_rounded_twice_however_often():
    plain, int8 = caches(window_size=3 * CHUNK, sink_size=CHUNK, position_mode="sink_relative")
    chunk = randn(), randn(seed=1)
    errors = []
    for cache in (plain, int8):
        cache.update(0, *chunk)
    for number in range(200):
        for cache in (plain, int8):
            cache.block_caches[0].move_sink(quarter_turns(number))
        errors.append((plain.block_caches[0].cached_key - int8.block_caches[0].cached_key).abs().max())
    half_scale = float(chunk[0].abs().max()) / 254
    # Turned in pairs of channels, an error is longer by the root of 2 at most, and so is the largest number.
    assert 0 < max(errors) <= 2 * 2**0.5 * half_scale


def test_refusals():
    with pytest.raises(ValueError, match="kv_dtype is 'int4'; allowed are None"):
        WanKVCache(1, kv_dtype="int4")
    sink = {"window_size": 4, "sink_size": 1, "position_mode": "relative"}
    with pytest.raises(ValueError, match="less than the rounding of kv_dtype 'int8'"):
        WanKVCache(1, **sink, sink_update=MovingAverageSink(), kv_dtype="int8")
    frames = {"height": 32, "width": 32, "window_frames": 4, "sink_frames": 1, "position_mode": "relative"}
    with pytest.raises(ValueError, match="less than the rounding of kv_dtype 'int8'"):
        RolloutConfig(**frames, sink_update="moving_average", kv_dtype="int8")
    with pytest.raises(ValueError, match="kv_dtype is 'fp8'; allowed are None, int8"):
        RolloutConfig(**frames, kv_dtype="fp8")
    cache = WanKVCache(1, kv_dtype="int8")
    cache.update(0, randn(), randn())
    with pytest.raises(ValueError, match=r"the cache holds .* torch\.float32.* but got .*torch\.bfloat16"):
        cache.update(0, randn(dtype=torch.bfloat16), randn(dtype=torch.bfloat16))
