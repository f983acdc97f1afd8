"""Scene cuts against a rollout that keeps every frame's keys and values in a list and rotates by its own formula."""

from dataclasses import dataclass, field

import pytest
import torch

from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline

CHANNELS, TEXT_DIM = 4, 16
HEAD_DIM, ROTARY_DIMS = 20, (8, 6, 6)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipe() -> WanAutoregressivePipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = CausalWanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=HEAD_DIM,
            ffn_dim=32,
            num_layers=2,
            text_dim=TEXT_DIM,
            freq_dim=32,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
        ).eval()
    pipe = WanAutoregressivePipeline(None, None, transformer, None, SelfForcingScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Shots:
    """A video: its sizes in latent frames, its prompts by chunk and what a cut does."""

    chunk: int
    sink: int
    window: int
    cuts: tuple[int, ...]
    """Chunks that begin a shot."""
    chunks: int = 9
    offset: float = 7.5
    recache: bool = False
    pin: bool = True
    relative: bool = False
    batch: int = 1
    size: tuple[int, int] = (4, 4)
    """Of the latents; a token has 2 x 2."""
    given: int = 0
    """Frames of the first chunk, which is made around them."""
    guidance: float = 1.0

    @property
    def tokens(self) -> int:
        """Of a frame."""
        return self.size[0] * self.size[1] // 4

    @property
    def columns(self) -> int:
        """Tokens of a row."""
        return self.size[1] // 2

    def arguments(self) -> dict:
        schedule = {index * self.chunk: prompt(index, self.batch) for index in self.cuts}
        given = {"video_latents": self.given_latents(), "given_in_chunk": True} if self.given else {}
        return given | {
            "guidance_scale": self.guidance,
            "negative_prompt_embeds": None if self.guidance == 1 else prompt(-1, self.batch),
            "height": 8 * self.size[0],
            "width": 8 * self.size[1],
            "prompt_embeds": prompt(0, self.batch),
            "prompt_schedule": schedule,
            "latents": self.noise(),
            "chunk_frames": self.chunk,
            "sink_frames": self.sink,
            "window_frames": self.window,
            "solver": "unipc",
            "num_inference_steps": 2,
            "position_mode": "relative" if self.relative else "absolute",
            "switch_policy": "scene_cut",
            "switch_options": {
                "position_offset": self.offset,
                "clean_recache": self.recache,
                "pin": self.pin,
            },
        }

    def noise(self) -> torch.Tensor:
        return randn(self.batch, CHANNELS, self.chunks * self.chunk, *self.size, seed=1)

    def given_latents(self) -> torch.Tensor:
        return randn(self.batch, CHANNELS, self.given, *self.size, seed=2)


def prompt(index: int, batch: int = 1) -> torch.Tensor:
    return randn(batch, 5, TEXT_DIM, seed=100 + index)


def rotated(x: torch.Tensor, time: float, columns: int) -> torch.Tensor:
    """`(batch, tokens, heads, head_dim)` of a frame, every pair of channels turned as a complex number."""
    angles = []
    for token in range(x.shape[1]):
        for place, dim in zip((time, token // columns, token % columns), ROTARY_DIMS, strict=True):
            angles += [place / 10000 ** (2 * i / dim) for i in range(dim // 2)]
    turn = torch.tensor(angles, dtype=torch.float64).view(1, x.shape[1], 1, HEAD_DIM // 2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn)).flatten(-2).to(x.dtype)


@dataclass
class Frame:
    key: torch.Tensor
    """Without rotary embedding."""
    value: torch.Tensor
    time: float
    pinned: bool = False


@dataclass
class NaiveAttention:
    """The self-attention of one block, with its past in a list, and with guidance in another one."""

    shots: Shots
    pasts: list[list[Frame]] = field(default_factory=lambda: [[], []])
    branch: int = 0
    """Which of them the forward to come sees."""
    times: list[float] = field(default_factory=list)
    """Of the frames of the forward to come."""
    overwrites: bool = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, rotary_emb=None, **_):
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        past, size, columns = self.pasts[self.branch], self.shots.tokens, self.shots.columns
        own = [
            Frame(k, v, time) for k, v, time in zip(key.split(size, 1), value.split(size, 1), self.times, strict=True)
        ]
        if self.overwrites:
            del past[-len(own) :]
        while len(past) + len(own) > self.shots.window:
            free = [i for i, frame in enumerate(past) if i >= self.shots.sink and not frame.pinned]
            del past[free[0]]
        past += own
        times = list(range(len(past))) if self.shots.relative else [frame.time for frame in past]
        keys = torch.cat([rotated(frame.key, time, columns) for frame, time in zip(past, times, strict=True)], dim=1)
        values = torch.cat([frame.value for frame in past], dim=1)
        own_times = zip(query.split(size, 1), times[-len(own) :], strict=True)
        query = torch.cat([rotated(part, time, columns) for part, time in own_times], dim=1)
        weights = (torch.einsum("bqhd,bkhd->bhqk", query, keys) / HEAD_DIM**0.5).softmax(-1)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, values).flatten(2))


@torch.no_grad()
def naive_video(pipe, shots: Shots) -> torch.Tensor:
    """x0 of two Euler steps (UniPC's), chunk by chunk."""
    model = CausalWanTransformer3DModel(**{k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")})
    model.load_state_dict(pipe.transformer.state_dict())
    blocks = [NaiveAttention(shots) for _ in model.blocks]
    for block, attention in zip(model.blocks, blocks, strict=True):
        block.attn1.set_processor(attention)
    sigmas = [5 * s / (1 + 4 * s) for s in (0.999, 0.4995)]
    video, text, offset = [], prompt(0, shots.batch), 0.0
    for index, latents in enumerate(shots.noise().split(shots.chunk, dim=2)):
        if index in shots.cuts:
            text, offset = prompt(index, shots.batch), offset + shots.offset
        first = index * shots.chunk

        given = shots.given if index == 0 else 0

        def forward(latents, timestep, overwrites, first=first, text=text, offset=offset, given=given):
            times = torch.full((shots.batch, shots.chunk), timestep)
            times[:, :given] = 0
            flows = []
            embeds_of = [text] if shots.guidance == 1 else [text, prompt(-1, shots.batch)]
            for branch, embeds in enumerate(embeds_of):
                for attention in blocks:
                    attention.branch, attention.overwrites = branch, overwrites
                    attention.times = [first + i + offset for i in range(shots.chunk)]
                flows.append(model(latents, times, embeds, return_dict=False)[0])
            return flows[-1] + shots.guidance * (flows[0] - flows[-1])

        def around_given(latents, given=given):
            return torch.cat([shots.given_latents()[:, :, :given], latents[:, :, given:]], dim=2)

        latents = around_given(latents)
        latents = around_given(latents + (sigmas[1] - sigmas[0]) * forward(latents, 999.0, overwrites=False))
        latents = around_given(latents - sigmas[1] * forward(latents, 833.0, overwrites=True))
        pasts = [past for attention in blocks for past in attention.pasts]
        if index in shots.cuts and shots.recache:
            for past in pasts:
                kept, own = past[: shots.sink], past[-shots.chunk :]
                past[:] = kept + [frame for frame in own if all(frame is not other for other in kept)]
        forward(latents, 0.0, overwrites=True)
        if index in shots.cuts and shots.pin:
            for past in pasts:
                for frame in past:
                    frame.pinned = False
                for frame in past[-shots.chunk :][: shots.sink]:
                    frame.pinned = True
        video.append(latents)
    return torch.cat(video, dim=2)


VIDEOS = {
    "aligned": Shots(chunk=2, sink=2, window=8, cuts=(3,)),
    "the original loses its pin": Shots(chunk=3, sink=2, window=10, cuts=(2,)),
    "chunks smaller than the sink": Shots(chunk=2, sink=3, window=9, cuts=(3, 6)),
    "just enough room": Shots(chunk=3, sink=2, window=7, cuts=(2, 5)),
    "cuts in a row": Shots(chunk=2, sink=1, window=6, cuts=(2, 3, 4, 7)),
    "a cut inside of the sink": Shots(chunk=2, sink=3, window=9, cuts=(1, 5)),
    "whole offset": Shots(chunk=2, sink=2, window=7, cuts=(3,), offset=8),
    "no pins": Shots(chunk=3, sink=2, window=8, cuts=(2, 5), pin=False),
    "no sink": Shots(chunk=2, sink=0, window=5, cuts=(2, 5)),
    "clean re-cache": Shots(chunk=3, sink=2, window=10, cuts=(2, 4), recache=True),
    "clean re-cache, inside of the sink": Shots(chunk=2, sink=3, window=9, cuts=(1, 5), recache=True),
    "relative positions": Shots(chunk=3, sink=2, window=10, cuts=(2, 6), relative=True),
    "relative positions, clean re-cache": Shots(chunk=2, sink=3, window=8, cuts=(3, 7), relative=True, recache=True),
    "two videos": Shots(chunk=2, sink=1, window=6, cuts=(2,), batch=2),
    "a given frame": Shots(chunk=3, sink=2, window=8, cuts=(2, 4), chunks=6, given=1, size=(4, 6)),
    "a given frame, guidance": Shots(chunk=3, sink=2, window=10, cuts=(2,), chunks=6, given=1, guidance=3.0),
    "guidance, clean re-cache": Shots(chunk=2, sink=1, window=7, cuts=(1, 4), recache=True, guidance=2.0, batch=2),
    "all of it": Shots(
        **{"chunk": 3, "sink": 2, "window": 8, "cuts": (1, 3), "chunks": 6, "recache": True},
        **{"batch": 2, "size": (6, 4), "given": 2, "guidance": 3.0},
    ),
}


SLOW = ("a given frame, guidance", "guidance, clean re-cache")


@pytest.mark.parametrize(
    "shots",
    [pytest.param(v, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, v in VIDEOS.items()],
)
def test_equals_a_list_of_frames(pipe, shots):
    latents = pipe(**shots.arguments(), output_type="latent").frames
    torch.testing.assert_close(latents, naive_video(pipe, shots), rtol=0, atol=2e-5)


def test_the_list_sees_what_a_pin_changes(pipe):
    shots = VIDEOS["the original loses its pin"]
    arguments = shots.arguments()
    arguments["switch_options"]["pin"] = False
    latents = pipe(**arguments, output_type="latent").frames
    assert (latents - naive_video(pipe, shots)).abs().max() > 1e-3


def rollout_of(pipe, shots: Shots, **options):
    return pipe.rollout(**{**shots.arguments(), "output_type": "latent", **options})


def test_a_full_window_is_the_sink_the_start_of_the_shot_and_the_newest_frames(pipe):
    shots = Shots(chunk=2, sink=2, window=8, cuts=(3,))
    rollout, keys = rollout_of(pipe, shots), []
    for _ in range(8):
        rollout.step()
        keys.append(rollout.cache.block_caches[0].cached_key.clone())
    # The first forward of chunk 4 comes after chunk 3's clean keys.
    size = shots.tokens
    shot = keys[4][:, -4 * size : -2 * size]
    assert torch.equal(keys[7][:, 2 * size : 4 * size], shot)


def test_nothing_moves_in_memory(pipe):
    rollout = rollout_of(pipe, VIDEOS["cuts in a row"])
    addresses = set()
    for _ in rollout:
        for block in rollout.cache.block_caches:
            addresses |= {block._key.parts[0].data_ptr(), block._value.parts[0].data_ptr()}
    assert len(addresses) == 4


@pytest.mark.parametrize("name", ["cuts in a row", "clean re-cache", "relative positions"])
def test_resumed_and_forked_at_any_boundary_equal_uninterrupted(pipe, tmp_path, name):
    shots = VIDEOS[name]
    expected = list(rollout_of(pipe, shots))
    rollout = rollout_of(pipe, shots)
    for index in range(len(expected)):
        rollout.save(tmp_path / str(index))
        fork, resumed = rollout.fork(), pipe.resume(tmp_path / str(index))
        for twin in (fork, resumed):
            for chunk in expected[index:][:3]:
                assert torch.equal(twin.step().latents, chunk.latents)
        assert torch.equal(rollout.step().latents, expected[index].latents)


def test_guidance_pins_in_both_caches(pipe):
    # Under the negative prompt of the prompt itself guidance changes nothing; its cache must hold the same frames.
    shots = Shots(chunk=3, sink=2, window=10, cuts=(2,))
    options = {"guidance_scale": 3.0, "negative_prompt_embeds": prompt(0)}
    rollout = rollout_of(pipe, shots, **options)
    for _ in rollout:
        first, second = rollout.denoiser.experts[0].caches
        assert first.block_caches[1].window.state == second.block_caches[1].window.state
        assert first.positions == second.positions
    assert first.block_caches[1].window.state.pins["shot"]


def test_words_tell_a_cut_from_a_new_text(pipe):
    shots = Shots(chunk=2, sink=1, window=6, cuts=(2,))
    options = {"switch_options": {"words": "The scene transitions. "}}
    # Embeddings have no text, so this is a new text and nothing else.
    new_text = list(rollout_of(pipe, shots, **options))
    expected = list(rollout_of(pipe, shots, switch_policy="cross_attention", switch_options={}))
    for chunk, other in zip(new_text, expected, strict=True):
        torch.testing.assert_close(chunk.latents, other.latents, rtol=0, atol=1e-5)


def test_positions_have_no_end(pipe):
    shots = Shots(chunk=2, sink=1, window=6, cuts=(1, 2, 3), offset=1e4)
    assert all(chunk.latents.isfinite().all() for chunk in rollout_of(pipe, shots))
    long = {"num_frames": 4 * 1099 + 1, "latents": None}
    assert rollout_of(pipe, shots, **long).grid.total_frames == 1100
    with pytest.raises(ValueError, match="absolute positions end at 1024"):
        rollout_of(pipe, shots, **long, switch_policy="cut", switch_options={})


def test_computed_positions_are_those_of_the_table(pipe):
    rope = pipe.transformer.rope
    for computed, looked_up in zip(rope.at([(37.0, 41.0)], 2, 2), rope.at([(37, 41)], 2, 2), strict=True):
        assert torch.equal(computed, looked_up)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_frames": 7}, "window_frames is 7; scene_cut needs 8 for a sink of 2, 2 pinned frames and a chunk"),
        ({"position_mode": "sink_relative"}, "'sink_relative' would leave behind; use 'relative'"),
        ({"switch_options": {"position_offset": -1}}, "position_offset is -1; it must be latent frames, 0 or more"),
        ({"switch_options": {"offset": 3}}, "switch_options do not fit 'scene_cut'"),
    ],
)
def test_what_cannot_work_is_refused(pipe, options, words):
    with pytest.raises(ValueError, match=words):
        rollout_of(pipe, Shots(chunk=4, sink=2, window=10, cuts=(2,)), **options)
