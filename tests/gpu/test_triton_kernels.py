"""Triton's kernels against what they stand in for. On a CPU under Triton's interpreter: `make test-kernels`."""

import pytest
import torch
from saved_rollouts import start

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.cache import int8_buffer, rotary
from wan_autoregressive.models.causal_wan_block import add_gated, norm_then_modulate

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("wan_autoregressive.models.triton_kernels")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Rows that are no power of two, and that are longer than a block of threads.
SHAPES = pytest.mark.parametrize(("batch", "groups", "dim"), [(1, 1, 80), (2, 3, 80), (1, 2, 1536)])


@pytest.fixture(autouse=True)
def interpreted_on_a_cpu(device):
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1 in the environment")


@pytest.fixture
def random(device):
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(device, dtype)


def modulations(random, batch, groups, dim) -> tuple[torch.Tensor, ...]:
    """As a block has them: views of all six, float32."""
    return random(batch, groups, 6, dim).unbind(dim=2)


@DTYPES
@SHAPES
def test_norm_and_modulation(random, dtype, batch, groups, dim):
    x, (shift, scale, *_) = random(batch, 4 * groups, dim, dtype=dtype), modulations(random, batch, groups, dim)
    norm = torch.nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
    expected = norm_then_modulate(norm, x.double(), scale, shift)
    found = kernels.norm_and_modulate(3 * x + 100, scale, shift, norm.eps)
    # A mean far from zero, which a variance by squares alone would lose.
    shifted = norm_then_modulate(norm, (3 * x + 100).float(), scale, shift)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), shifted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-3)
    torch.testing.assert_close(kernels.norm_and_modulate(x, scale, shift, norm.eps), expected.to(dtype))


@DTYPES
@SHAPES
def test_gate(random, dtype, batch, groups, dim):
    x, output = (random(batch, 4 * groups, dim, dtype=dtype) for _ in range(2))
    gate = modulations(random, batch, groups, dim)[2]
    before = output.clone()
    found = kernels.add_gated(x, output, gate)
    assert torch.equal(output, before)
    assert found.dtype == dtype
    torch.testing.assert_close(found, add_gated(x.float(), output.float(), gate).to(dtype), rtol=1e-2, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("table", [(1, 6), (1, 1), (2, 6)], ids=["of a chunk", "one rotation", "of each video"])
@pytest.mark.parametrize("is_view", [False, True])
def test_rotary(random, dtype, table, is_view):
    batch, tokens, heads, head_dim = 2, 6, 3, 20
    angles = random(*table, 1, head_dim // 2)
    cos = angles.cos().repeat_interleave(2, dim=-1)
    sin = angles.sin().repeat_interleave(2, dim=-1)
    sin[..., ::2].neg_()
    x = random(batch, tokens + (5 if is_view else 0), heads, head_dim, dtype=dtype)[:, :tokens]
    before = x.clone()
    found = kernels.rotate_pairs(x, cos, sin)
    assert torch.equal(x, before)
    assert found.is_contiguous()
    torch.testing.assert_close(found, rotary.rotate_pairs(x.float(), cos, sin).to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_view", [False, True])
def test_int8_is_read_to_the_bit(random, dtype, is_view):
    values, scales = int8_buffer.quantize(random(2, 11, 3, 20, dtype=dtype))
    if is_view:
        values, scales = values[:, 2:8], scales[:, 2:8]
    found = kernels.dequantize(values, scales)
    assert found.dtype == dtype
    expected = int8_buffer.dequantize(values, scales)
    if dtype == torch.bfloat16 and not values.is_cuda:  # the interpreter cuts off where devices round
        exact = values.float() * scales.float()
        expected = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    assert torch.equal(found, expected)
    assert kernels.dequantize(values[:, :0], scales[:, :0]).shape == (2, 0, 3, 20)


@pytest.fixture
def own_pipe(tiny_checkpoint, device, monkeypatch):
    """A pipeline to be changed, and caches that are as they were afterwards."""
    monkeypatch.setattr(int8_buffer.Int8Buffer, "decode", int8_buffer.Int8Buffer.__dict__["decode"])
    pipe = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_dtype": "int8"}, {"position_mode": "relative"}],
    ids=["plain", "int8", "relative positions"],
)
def test_a_video_is_the_same_within_rounding(own_pipe, monkeypatch, options):
    options = {"window_frames": 4, "sink_frames": 1, "num_frames": 25, "output_type": "latent", **options}
    expected = list(start(own_pipe, **options))
    launched, launch = [], kernels._launch
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, *args: launched.append(kernel.__name__) or launch(kernel, *args)
    )
    kernels.use_triton_kernels(own_pipe.transformer)
    chunks = list(start(own_pipe, **options))
    for chunk, other in zip(chunks, expected, strict=True):
        torch.testing.assert_close(chunk.latents, other.latents, rtol=0, atol=1e-3 if "kv_dtype" in options else 1e-4)
    used = {"_norm_and_modulate_kernel", "_add_gated_kernel", "_rotate_kernel"}
    assert set(launched) == used | ({"_dequantize_kernel"} if "kv_dtype" in options else set())


def test_a_compiled_transformer_is_refused(own_pipe):
    own_pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="compiled, which fuses the same"):
        kernels.use_triton_kernels(own_pipe.transformer)


def test_without_a_cache_nothing_changes(own_pipe, random):
    """Upstream's operations, to the bit."""
    transformer = own_pipe.transformer
    inputs = random(1, 16, 2, 4, 4), torch.ones(1, device=own_pipe.device), random(1, 8, 32)
    with torch.no_grad():
        before = transformer(*inputs).sample
        kernels.use_triton_kernels(transformer)
        assert torch.equal(transformer(*inputs).sample, before)


def test_the_part_of_the_gpu_kit_runs(device, tmp_path, monkeypatch):
    from benchmarks.gpu_kit import kernels as part
    from benchmarks.gpu_kit.setting import Record, Setting

    monkeypatch.setattr(part, "_CHUNKS", 1)
    monkeypatch.setattr(int8_buffer.Int8Buffer, "decode", int8_buffer.Int8Buffer.__dict__["decode"])
    record = Record(tmp_path / "record.json")
    part.measure(Setting(str(device), is_tiny=True), record)
    rows = record.tables["one pass"]
    assert [row["of"] for row in rows] == ["norm and modulation", "gate", "rotary embedding", "reading int8"]
    assert all(row["difference"] < 1e-5 for row in rows)
    assert [row["K V"] for row in record.tables["a chunk, without VAE"]] == ["model", "int8"]
