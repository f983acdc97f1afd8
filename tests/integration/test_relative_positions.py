"""Positions by place in the window, and sinks that move: against keys kept in a list and rotated anew every time."""

import pytest
import torch

from wan_autoregressive import CausalWanTransformer3DModel, WanKVCache
from wan_autoregressive.cache import MovingAverageSink
from wan_autoregressive.cache.rotary import apply_rotary_emb

HEIGHT, WIDTH = 4, 4
TOKENS_PER_FRAME = 4
TEXT_DIM = 16


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CausalWanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=20,
            ffn_dim=32,
            num_layers=2,
            text_dim=TEXT_DIM,
            freq_dim=32,
            in_channels=4,
            out_channels=4,
        ).eval()


class NaiveFrames:
    """Keys and values of one block, frame by frame in lists; nothing is rotated before it is used."""

    def __init__(self, model, window: int, sink: int, decay: float | None = None) -> None:
        self.rope, self.window, self.sink, self.decay = model.rope, window, sink, decay
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.newest, self.append = 0, True

    def attend(self, attn, query, key, value):
        keys, values = list(key.split(TOKENS_PER_FRAME, 1)), list(value.split(TOKENS_PER_FRAME, 1))
        for old, new in ((self.keys, keys), (self.values, values)):
            if not self.append:
                del old[-self.newest :]
            for number in range(max(0, len(old) + len(new) - self.window)):
                evicted, slot = old.pop(self.sink), number % max(self.sink, 1)
                if self.decay is not None:
                    old[slot] = self.decay * old[slot] + (1 - self.decay) * evicted
            old += new
        self.newest = len(keys)
        places = [self.rope.at([(place, place + 1)], HEIGHT // 2, WIDTH // 2) for place in range(len(self.keys))]
        rotated = [apply_rotary_emb(k, *place) for k, place in zip(self.keys, places, strict=True)]
        query_places = places[-len(keys) :]
        query = torch.cat(
            [
                apply_rotary_emb(q, *place)
                for q, place in zip(query.split(TOKENS_PER_FRAME, 1), query_places, strict=True)
            ],
            dim=1,
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", query, torch.cat(rotated, 1)) / query.shape[-1] ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), torch.cat(self.values, 1)).flatten(2)


class NaiveProcessor:
    def __init__(self, frames: NaiveFrames) -> None:
        self.frames = frames

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, rotary_emb=None, **_):
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        return attn.to_out[0](self.frames.attend(attn, query, key, value))


def compare_with_naive(model, chunks: list[int], window: int, sink: int, decay: float | None, mode: str = "relative"):
    naive_model = CausalWanTransformer3DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    naive_model.load_state_dict(model.state_dict())
    naive = [NaiveFrames(model, window, sink, decay) for _ in model.blocks]
    for block, frames in zip(naive_model.blocks, naive, strict=True):
        block.attn1.set_processor(NaiveProcessor(frames))
    cache = WanKVCache(
        len(model.blocks),
        window_size=window * TOKENS_PER_FRAME,
        sink_size=sink * TOKENS_PER_FRAME,
        position_mode=mode,
        sink_update=None if decay is None else MovingAverageSink(decay),
    )
    text, worst = randn(1, 5, TEXT_DIM), 0.0
    for number, frames in enumerate(chunks):
        for append in (True, False):
            latents = randn(1, 4, frames, HEIGHT, WIDTH, seed=2 * number + append)
            timestep = torch.tensor([700.0 if append else 0.0])
            for block in naive:
                block.append = append
            if append:
                cache.enable_append_mode()
            else:
                cache.enable_overwrite_mode()
            offset = sum(chunks[:number])
            got = model(latents, timestep, text, attention_kwargs={"kv_cache": cache}, frame_offset=offset).sample
            expected = naive_model(latents, timestep, text).sample
            worst = max(worst, float((got - expected).abs().max()))
    return worst


MODES = [("relative", None), ("relative", 0.9), ("sink_relative", None)]


@pytest.mark.parametrize(("mode", "decay"), MODES)
@pytest.mark.parametrize(
    ("chunks", "window", "sink"),
    [([3] * 6, 9, 3), ([3] * 6, 7, 1), ([1] * 9, 4, 1), ([2, 4, 1, 3, 2, 4, 3], 7, 2), ([4] * 4, 8, 3)],
)
@torch.no_grad()
def test_equals_keys_rotated_anew_at_every_call(model, chunks, window, sink, mode, decay):
    assert compare_with_naive(model, chunks, window, sink, decay, mode) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "decay"), MODES)
@torch.no_grad()
def test_does_not_drift_over_500_chunks(model, mode, decay):
    """1,500 frames: the rotary table ends on the way."""
    assert compare_with_naive(model, [3] * 500, 9, 3, decay, mode) < 1e-5


@pytest.mark.parametrize("mode", ["relative", "sink_relative"])
@torch.no_grad()
def test_equals_absolute_positions_until_the_first_eviction(model, mode):
    text = randn(1, 5, TEXT_DIM)
    absolute = WanKVCache(2, window_size=9 * TOKENS_PER_FRAME, sink_size=3 * TOKENS_PER_FRAME)
    relative = WanKVCache(2, window_size=9 * TOKENS_PER_FRAME, sink_size=3 * TOKENS_PER_FRAME, position_mode=mode)
    for start in range(0, 12, 3):
        latents = randn(1, 4, 3, HEIGHT, WIDTH, seed=start)
        outputs = [
            model(
                latents, torch.tensor([700.0]), text, frame_offset=start, attention_kwargs={"kv_cache": cache}
            ).sample
            for cache in (absolute, relative)
        ]
        difference = (outputs[0] - outputs[1]).abs().max()
        assert difference < 1e-6 if start < 9 else difference > 1e-4


@torch.no_grad()
def test_without_a_sink_only_distances_count(model):
    """Without a sink all distances are those of absolute positions, and so is the result."""
    text = randn(1, 5, TEXT_DIM)
    modes = ("absolute", "relative")
    caches = [WanKVCache(2, window_size=6 * TOKENS_PER_FRAME, position_mode=mode) for mode in modes]
    for start in range(0, 30, 3):
        latents = randn(1, 4, 3, HEIGHT, WIDTH, seed=start)
        kwargs = {"frame_offset": start}
        a, b = (
            model(latents, torch.tensor([700.0]), text, attention_kwargs={"kv_cache": cache}, **kwargs).sample
            for cache in caches
        )
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"position_mode": "relative"},
        {"position_mode": "relative", "sink_update": "moving_average"},
        {"position_mode": "sink_relative"},
    ],
)
def test_runs_past_the_rotary_table(pipe, options):
    """1,200 latent frames, where absolute positions end at 1,024."""
    rollout = pipe.rollout(
        "x",
        height=16,
        width=16,
        window_frames=12,
        sink_frames=3,
        chunk_frames=8,
        num_inference_steps=1,
        output_type="latent",
        **options,
    )
    highest = []
    at = pipe.transformer.rope.at

    def watch(positions, *args):
        highest.append(max(stop for _, stop in positions))
        return at(positions, *args)

    pipe.transformer.rope.at = watch
    try:
        while rollout.frames_done < 1200:
            chunk = rollout.step()
    finally:
        del pipe.transformer.rope.at
    assert max(highest) <= (12 if options["position_mode"] == "relative" else 1024)
    assert chunk.latents.isfinite().all()


def test_absolute_positions_end_with_the_table(pipe):
    rollout = pipe.rollout(
        "x", height=16, width=16, window_frames=32, chunk_frames=32, num_inference_steps=1, output_type="latent"
    )
    for _ in range(32):
        rollout.step()
    with pytest.raises(ValueError, match="leave the rotary table of 1024 positions"):
        rollout.step()


def test_a_jump_moves_only_the_newest_chunk(model):
    cache = WanKVCache(2, window_size=6 * TOKENS_PER_FRAME, sink_size=TOKENS_PER_FRAME, position_mode="relative")
    key = randn(1, 2 * TOKENS_PER_FRAME, 2, 20)
    for number in range(4):
        if number == 3:
            cache.positions.jump(40)
        blocks = cache.begin_forward(2 * TOKENS_PER_FRAME)
        planned = cache.plan_positions(2 * number, 2, TOKENS_PER_FRAME, 1024, model.rope.rotation)
        positions = [frame for run in planned.keys for frame in range(*run)]
        for block in blocks:
            block.write(key, key)
        cache.end_forward()
    assert sorted(positions) == [0, 1, 2, 3, 44, 45]
    assert planned.start == 44


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sink_update": MovingAverageSink()}, "needs a sink and position_mode"),
        ({"sink_update": MovingAverageSink(), "window_size": 8, "sink_size": 4}, "needs a sink and position_mode"),
    ],
)
def test_refuses_averages_of_rotated_keys(arguments, message):
    with pytest.raises(ValueError, match=message):
        WanKVCache(1, **arguments)
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        MovingAverageSink(1.5)


@torch.no_grad()
def test_refuses_parts_of_frames(model):
    cache = WanKVCache(2, window_size=4 * TOKENS_PER_FRAME - 1, position_mode="relative")
    arguments = (randn(1, 4, 3, HEIGHT, WIDTH), torch.zeros(1), randn(1, 5, TEXT_DIM))
    model(*arguments, attention_kwargs={"kv_cache": cache})
    with pytest.raises(ValueError, match="whole frames of 4 tokens"):
        model(*arguments, attention_kwargs={"kv_cache": cache})
