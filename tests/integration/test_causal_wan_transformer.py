"""The causal transformer: bitwise upstream's without a cache, and with one equal to recomputation from scratch."""

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, WanTransformer3DModel

from wan_autoregressive import CausalWanTransformer3DModel, WanKVCache

pytestmark = pytest.mark.usefixtures("short_tiles")

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 20,
    "ffn_dim": 192,
    "num_layers": 3,
    "text_dim": 16,
    "freq_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
}
HEIGHT, WIDTH = 6, 4
TOKENS_PER_FRAME = (HEIGHT // 2) * (WIDTH // 2)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models() -> tuple[WanTransformer3DModel, CausalWanTransformer3DModel]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        upstream = WanTransformer3DModel(**CONFIG).eval()
    causal = CausalWanTransformer3DModel(**CONFIG).eval()
    causal.load_state_dict(upstream.state_dict())
    return upstream, causal


@pytest.fixture
def model(models) -> CausalWanTransformer3DModel:
    return models[1]


@pytest.mark.parametrize("layout", ["batch", "token", "one"])
@torch.no_grad()
def test_without_a_cache_bitwise_equal_to_upstream(models, layout):
    upstream, causal = models
    frames, batch = 3, 2
    latents, text = randn(batch, 4, frames, HEIGHT, WIDTH), randn(batch, 7, 16, seed=1)
    per_video = randn(batch, seed=2).abs() * 500
    per_token = randn(batch, frames * TOKENS_PER_FRAME, seed=3).abs() * 500
    timestep = {"batch": per_video, "one": per_video[:, None], "token": per_token}[layout]
    known = timestep if layout == "token" else per_video  # upstream knows [B] and [B, tokens] only
    expected = upstream(latents, known, text, return_dict=False)[0]
    assert torch.equal(causal(latents, timestep, text, return_dict=False)[0], expected)
    assert torch.equal(causal(latents, timestep, text).sample, expected)


@torch.no_grad()
def test_timesteps_of_frames_are_those_of_their_tokens(models):
    """Close and not equal: the time embedding is a product with fewer rows, for which another kernel may be taken."""
    upstream, causal = models
    latents, text = randn(2, 4, 3, HEIGHT, WIDTH), randn(2, 7, 16, seed=1)
    per_frame = randn(2, 3, seed=2).abs() * 500
    expected = upstream(latents, per_frame.repeat_interleave(TOKENS_PER_FRAME, dim=1), text, return_dict=False)[0]
    found = causal(latents, per_frame, text, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    others = causal(latents, per_frame.roll(1, dims=1), text, return_dict=False)[0]
    assert (others - expected).abs().max() > 1e-2


@torch.no_grad()
def test_outputs_that_a_hook_of_diffusers_keeps_stay_whole(models):
    """Pyramid Attention Broadcast hands out the same attention output in several forwards."""
    outputs = []
    for model in models:
        model.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                cross_attention_block_skip_range=3,
                spatial_attention_timestep_skip_range=(100, 800),
                cross_attention_timestep_skip_range=(100, 800),
                current_timestep_callback=lambda: 500,
            )
        )
        text = randn(1, 7, 16)
        outputs.append(
            [model(randn(1, 4, 2, HEIGHT, WIDTH, seed=s), torch.tensor([500.0]), text)[0] for s in range(6)]
        )
        model.disable_cache()
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    fresh = models[0](randn(1, 4, 2, HEIGHT, WIDTH, seed=3), torch.tensor([500.0]), randn(1, 7, 16))[0]
    assert not torch.equal(fresh, outputs[0][3])


@torch.no_grad()
def test_an_upgrade_in_place_keeps_the_parameters(models):
    upstream, causal = models
    plain = WanTransformer3DModel(**CONFIG).eval()
    plain.load_state_dict(upstream.state_dict())
    plain.fuse_qkv_projections()
    before = {name: id(parameter) for name, parameter in plain.named_parameters()}
    upgraded = CausalWanTransformer3DModel.from_wan(plain)
    assert upgraded is plain
    assert {name: id(parameter) for name, parameter in upgraded.named_parameters()} == before
    arguments = (randn(1, 4, 2, HEIGHT, WIDTH), torch.tensor([[300.0, 0.0]]), randn(1, 7, 16))
    assert torch.allclose(upgraded(*arguments).sample, causal(*arguments).sample, atol=1e-6)


@torch.no_grad()
def test_saves_and_loads_with_all_its_config(models, tmp_path):
    _, causal = models
    causal.save_pretrained(tmp_path)
    loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in CONFIG} == CONFIG
    stock = WanTransformer3DModel.from_pretrained(tmp_path)
    arguments = (randn(1, 4, 2, HEIGHT, WIDTH), torch.tensor([300.0]), randn(1, 7, 16))
    assert torch.equal(loaded(*arguments).sample, causal(*arguments).sample)
    assert torch.equal(stock(*arguments).sample, causal(*arguments).sample)


class MaskedAttentionProcessor:
    """Self-attention over a whole video under an explicit mask: the slow definition of what the cache does."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **_):
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        cos, sin = (table[..., ::2] for table in rotary_emb)  # (1, tokens, 1, head_dim / 2)
        rotation = torch.complex(cos, sin)

        def rotate(x):
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)

        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(query), rotate(key)) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~self.mask, float("-inf")).softmax(dim=-1)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))


def block_causal_mask(chunks: list[int], window: int | None, sink: int) -> torch.Tensor:
    """`(tokens, tokens)`: a chunk sees itself, the sink, and the newest frames before it that fit in the window."""
    total = sum(chunks)
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for frames in chunks:
        stop = start + frames
        oldest = 0 if window is None else max(0, stop - window + min(sink, start))
        mask[start:stop, oldest:stop] = True
        mask[start:stop, : min(sink, stop)] = True
        start = stop
    return mask.repeat_interleave(TOKENS_PER_FRAME, 0).repeat_interleave(TOKENS_PER_FRAME, 1)


@pytest.mark.parametrize(
    ("chunks", "window", "sink"),
    [
        ([3, 3, 3], None, 0),
        ([1, 1, 1, 1], None, 0),
        ([1, 3, 3, 2], None, 0),
        ([3, 3, 3, 3], 6, 0),
        ([3, 3, 3, 3, 3], 9, 3),
        ([3, 3, 3, 3, 3], 7, 1),
        ([2, 4, 1, 3, 2, 4], 6, 1),
        ([4, 4, 4], 4, 0),
    ],
)
@torch.no_grad()
def test_cached_equals_recomputed_under_a_block_causal_mask(models, chunks, window, sink):
    upstream, causal = models
    total = sum(chunks)
    latents, text = randn(2, 4, total, HEIGHT, WIDTH), randn(2, 7, 16, seed=1)
    timesteps = torch.cat([torch.full((2, n), 900.0 / (i + 1)) for i, n in enumerate(chunks)], dim=1)

    reference = WanTransformer3DModel(**CONFIG).eval()
    reference.load_state_dict(upstream.state_dict())
    processor = MaskedAttentionProcessor(block_causal_mask(chunks, window, sink))
    for block in reference.blocks:
        block.attn1.set_processor(processor)
    per_token = timesteps.repeat_interleave(TOKENS_PER_FRAME, dim=1)
    expected = reference(latents, per_token, text, return_dict=False)[0]

    window_tokens = -1 if window is None else window * TOKENS_PER_FRAME
    cache = WanKVCache(len(causal.blocks), window_size=window_tokens, sink_size=sink * TOKENS_PER_FRAME)
    start = 0
    for frames in chunks:
        stop = start + frames
        arguments = {
            "timestep": timesteps[:, start:stop],
            "encoder_hidden_states": text,
            "frame_offset": start,
            "attention_kwargs": {"kv_cache": cache},
            "return_dict": False,
        }
        # An earlier, other content of the chunk must leave no trace once it is overwritten.
        cache.enable_append_mode()
        causal(randn(2, 4, frames, HEIGHT, WIDTH, seed=start + 5), **arguments)
        cache.enable_overwrite_mode()
        got = causal(latents[:, :, start:stop], **arguments)[0]
        torch.testing.assert_close(got, expected[:, :, start:stop], rtol=0, atol=2e-6)
        start = stop


@torch.no_grad()
def test_the_first_step_of_a_chunk_sees_what_later_steps_see(model):
    cache = WanKVCache(len(model.blocks), window_size=6 * TOKENS_PER_FRAME)
    arguments = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": randn(1, 7, 16)}
    for start in range(0, 12, 3):
        latents = randn(1, 4, 3, HEIGHT, WIDTH, seed=start)
        kwargs = {**arguments, "frame_offset": start, "attention_kwargs": {"kv_cache": cache}}
        cache.enable_append_mode()
        first = model(latents, **kwargs).sample
        cache.enable_overwrite_mode()
        assert torch.equal(model(latents, **kwargs).sample, first)


@torch.no_grad()
def test_frame_offset_is_a_position(model):
    arguments = (randn(1, 4, 2, HEIGHT, WIDTH), torch.tensor([500.0]), randn(1, 7, 16))
    # Without other frames only relative positions count ...
    assert torch.allclose(model(*arguments).sample, model(*arguments, frame_offset=7).sample, atol=1e-5)
    cos_0, _ = model.rope(arguments[0], 0)
    cos_7, _ = model.rope(arguments[0], 7)
    assert not torch.equal(cos_0, cos_7)
    # ... and the table has an end.
    model(*arguments, frame_offset=1022)
    with pytest.raises(ValueError, match="frames 1023 to 1024 leave the rotary table of 1024"):
        model(*arguments, frame_offset=1023)
    with pytest.raises(ValueError, match="frames -1 to 0"):
        model(*arguments, frame_offset=-1)


@torch.no_grad()
def test_a_failed_forward_changes_no_bookkeeping(model):
    cache = WanKVCache(len(model.blocks))
    kwargs = {
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": randn(1, 7, 16),
        "attention_kwargs": {"kv_cache": cache},
    }
    model(randn(1, 4, 3, HEIGHT, WIDTH), **kwargs)
    with pytest.raises(RuntimeError):
        model(randn(1, 4, 3, HEIGHT, WIDTH), **{**kwargs, "encoder_hidden_states": randn(1, 7, 17)}, frame_offset=3)
    assert cache.num_tokens == 3 * TOKENS_PER_FRAME


@torch.no_grad()
def test_refusals(model):
    latents, text = randn(1, 4, 3, HEIGHT, WIDTH), randn(1, 7, 16)
    with pytest.raises(ValueError, match=r"timestep has shape \(1, 2\); allowed are"):
        model(latents, torch.zeros(1, 2), text)
    with pytest.raises(ValueError, match="the cache has 2 blocks but this model has 3"):
        model(latents, torch.zeros(1), text, attention_kwargs={"kv_cache": WanKVCache(2)})
    with pytest.raises(ValueError, match=r"torch\.float32 or torch\.float64"):
        model.set_sinusoid_dtype(torch.float16)
    model.enable_cache(
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    )
    try:
        with pytest.raises(ValueError, match="PyramidAttentionBroadcastConfig skips blocks"):
            model(latents, torch.zeros(1), text, attention_kwargs={"kv_cache": WanKVCache(3)})
    finally:
        model.disable_cache()


@torch.no_grad()
def test_the_float64_sinusoid_is_near_the_float32_one(models):
    _, causal = models
    arguments = (randn(1, 4, 2, HEIGHT, WIDTH), torch.tensor([833.3333]), randn(1, 7, 16))
    single = causal(*arguments).sample
    causal.set_sinusoid_dtype(torch.float64)
    double = causal(*arguments).sample
    causal.set_sinusoid_dtype(torch.float32)
    assert not torch.equal(single, double)
    assert torch.allclose(single, double, atol=1e-4)


def test_modulation_is_not_blown_up_per_token(model):
    """The largest tensor with a per-frame timestep must be an activation, not a (tokens, 6, dim) modulation."""
    shapes = []

    class Shapes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                shapes.append(tuple(output.shape))
            return output

    with torch.no_grad(), Shapes():
        model(randn(1, 4, 3, HEIGHT, WIDTH), torch.tensor([[9.0, 8.0, 7.0]]), randn(1, 7, 16))
    tokens, dim = 3 * TOKENS_PER_FRAME, 80
    assert (1, 3, 6, dim) in shapes
    assert (1, tokens, 6, dim) not in shapes
    assert (1, tokens, 6 * dim) not in shapes


def test_kv_cache_bytes_are_known_before_allocation(model):
    cache = WanKVCache(len(model.blocks), window_size=6 * TOKENS_PER_FRAME)
    with torch.no_grad():
        model(
            randn(2, 4, 3, HEIGHT, WIDTH),
            torch.tensor([5.0, 5.0]),
            randn(2, 7, 16),
            attention_kwargs={"kv_cache": cache},
        )
    assert model.kv_cache_bytes(6 * TOKENS_PER_FRAME, batch_size=2) == cache.allocated_bytes
