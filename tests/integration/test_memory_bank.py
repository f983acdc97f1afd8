"""MemFlow's sampler against a video whose keys and values are lists of frames."""

from dataclasses import dataclass, field

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from naive_video import CHANNELS, TEXT_DIM, NaiveTransformer, attention, randn, rotated
from saved_rollouts import generator

from wan_autoregressive import CausalWanTransformer3DModel

BOUND = 1e-4  # float32; deliberate mistakes in what is seen are off by more than 1e-2
STEPS = (1000, 500)


@dataclass
class NaiveMemFlow:
    """One branch of guidance: lists of what every layer has of every frame, `(key, value)` by its number."""

    transformer: NaiveTransformer
    prompt: int = 0
    window: int = 6
    sink: int = 1
    bank_frames: int = 2
    interval: int = 2
    every_chunk: bool = True
    shot: int | None = None
    """First frame of a chunk whose first frames stay in view from the next chunk on, as many as the sink has."""
    frames: list[list] = field(default_factory=list)
    bank: list[list] = field(default_factory=list)

    def __post_init__(self) -> None:
        layers = range(len(self.transformer.stock.blocks))
        self.frames, self.bank, self.candidate = [[] for _ in layers], [[] for _ in layers], [None for _ in layers]
        self.chunks, self.start, self.written = 0, 0, None

    @torch.no_grad()
    def flow(self, latents: torch.Tensor, timestep: float, start: int, written: list | None = None) -> torch.Tensor:
        """Keys and values go to `written`, a list for each layer."""
        self.start, self.written, stock = start, written, self.transformer.stock
        for layer, block in enumerate(stock.blocks):
            block.attn1.set_processor(_SelfAttention(self, layer))
            block.attn2.set_processor(WanAttnProcessor())
        tokens = latents.shape[2] * latents.shape[3] * latents.shape[4] // 4
        timesteps = torch.full((latents.shape[0], tokens), timestep)
        return stock(latents, timesteps, self.transformer.prompts[self.prompt], return_dict=False)[0]

    def seen(self, layer: int, num_own: int) -> list:
        """Of sink, bank and the newest frames before `start`; a frame may be there twice."""
        past = self.frames[layer][: self.start]
        kept = list(range(min(self.sink, len(past))))
        if self.shot is not None and self.start > self.shot:
            kept += range(self.shot, self.shot + self.sink)
        others = [number for number in range(len(past)) if number not in kept]
        newest = others[max(0, len(others) - (self.window - len(kept) - num_own)) :]
        return [past[number] for number in (*kept, *newest)] + self.bank[layer]

    def cache(self, latents: torch.Tensor, start: int) -> None:
        written: list[list] = [[] for _ in self.frames]
        self.flow(latents, 0.0, start, written)
        for layer, new in enumerate(written):
            self.frames[layer][start:] = new
            if self.every_chunk or self.chunks % self.interval == 0:
                self.candidate[layer] = new[0]
        self.chunks += 1

    def let_candidate_in(self) -> None:
        length = (self.chunks - 1) // self.interval + 1
        for layer, bank in enumerate(self.bank):
            if length > self.bank_frames:
                bank[:] = self._best(layer)
            else:
                del bank[length - 1 :]
            bank.append(self.candidate[layer])

    def _best(self, layer: int) -> list:
        stock, attn, bank = self.transformer.stock, self.transformer.stock.blocks[layer].attn2, self.bank[layer]
        with torch.no_grad():
            text = stock.condition_embedder.text_embedder(self.transformer.prompts[self.prompt])
            text = attn.norm_k(attn.to_k(text)).unflatten(2, (attn.heads, -1))
        videos = []
        for video, words in enumerate(text):
            scores = [torch.einsum("thd,nhd->thn", words, key[video]).mean().item() for key, _ in bank]
            order = sorted(range(len(bank)), key=lambda place: -scores[place])[: self.bank_frames - 1]
            videos.append([[part[video] for part in bank[place]] for place in order])
        return [tuple(map(torch.stack, zip(*frames, strict=True))) for frames in zip(*videos, strict=True)]


class _SelfAttention:
    def __init__(self, video: NaiveMemFlow, layer: int) -> None:
        self.video, self.layer = video, layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        video, size = self.video, 4  # tokens of a frame of 4 x 4 latents
        parts = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        query, key, value = (part.unflatten(2, (attn.heads, -1)).split(size, dim=1) for part in parts)
        query, key = ([rotated(t, video.start + i, 2) for i, t in enumerate(frames)] for frames in (query, key))
        own = list(zip(key, value, strict=True))
        keys, values = zip(*video.seen(self.layer, len(own)), *own, strict=True)
        if video.written is not None:
            video.written[self.layer] = own
        return attn.to_out[0](attention(torch.cat(query, dim=1), torch.cat(keys, dim=1), torch.cat(values, dim=1)))


def make(branches: list[NaiveMemFlow], chunks: list[int], switch: int | None = None, recache=False, given=None):
    """The video; from chunk `switch` on under the second prompt."""
    main, batch, source, scale = branches[0], branches[0].transformer.prompts[0].shape[0], generator(), 3.0
    scheduler = main.transformer.pipeline(STEPS).scheduler
    timesteps, sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
    done = torch.zeros(batch, CHANNELS, 0, 4, 4) if given is None else given
    newest = 0
    for number, size in enumerate(chunks):
        start = done.shape[2]
        for branch in branches:
            if number == 0:
                for first in range(0, start, 2):
                    if first:
                        branch.let_candidate_in()
                    branch.cache(done[:, :, first : first + 2], first)
            else:
                branch.cache(done[:, :, newest:], newest)
        if number == switch:
            main.prompt = 1
            if recache:
                rebuild(main, done)
        for branch in branches:
            if start:
                branch.let_candidate_in()
        latents = torch.randn(batch, CHANNELS, size, 4, 4, generator=source)
        for step, timestep in enumerate(timesteps):
            flow = branches[0].flow(latents, timestep, start)
            if len(branches) == 2:
                negative = branches[1].flow(latents, timestep, start)
                flow = negative + scale * (flow - negative)
            latents = (latents.double() - sigmas[step] * flow.double()).float()
            if step + 1 < len(timesteps):
                drawn = torch.randn(batch, CHANNELS, size, 4, 4, generator=source)
                latents = (1 - sigmas[step + 1]) * latents + sigmas[step + 1] * drawn
        newest, done = start, torch.cat([done, latents], dim=2)
    return done


def rebuild(video: NaiveMemFlow, done: torch.Tensor) -> None:
    """The window anew under the new prompt, behind sink and bank, which stay as they are."""
    total = done.shape[2]
    start = total - (video.window - video.sink) if total > video.window else 0
    written: list[list] = [[] for _ in video.frames]
    frames = video.frames
    video.frames = [layer[: video.sink] if start else [] for layer in frames]
    video.flow(done[:, :, start:], 0.0, start, written)
    video.frames = [layer[:start] + new for layer, new in zip(frames, written, strict=True)]


def transformer(batch: int = 1, prompts: int = 1) -> NaiveTransformer:
    return NaiveTransformer(prompts=[randn(batch, 5, TEXT_DIM, seed=70 + i) for i in range(prompts)])


def settings(video: NaiveMemFlow, frames: int, **options):
    """Arguments of the rollout that makes the same video."""
    candidates = "every_chunk" if video.every_chunk else "every_interval"
    return {
        "sampler": "memory_bank",
        "sampler_options": {"bank_interval": video.interval, "bank_candidates": candidates},
        "memory_bank_frames": video.bank_frames,
        "height": 32,
        "width": 32,
        "num_frames": 4 * (frames - 1) + 1,
        "chunk_frames": 2,
        "window_frames": video.window,
        "sink_frames": video.sink,
        "prompt_embeds": video.transformer.prompts[0],
        "output_type": "latent",
        "generator": generator(),
        **options,
    }


def without_inputs(options):
    """The settings among the arguments."""
    return {k: v for k, v in options.items() if k not in ("prompt_embeds", "video_latents", "generator")}


CASES = {
    "full and selected": {},
    "a place more with every chunk": {"interval": 1, "bank_frames": 3},
    "one frame": {"bank_frames": 1, "interval": 1},
    "candidates now and then": {"every_chunk": False, "bank_frames": 3, "interval": 2},
    "no sink": {"sink": 0, "window": 4},
    "a window for sink and chunk alone": {"sink": 2, "window": 4},
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_equals_lists_of_frames(name, batch):
    video = NaiveMemFlow(transformer(batch), **CASES[name])
    expected = make([video], [2] * 9 + [1])
    latents = video.transformer.pipeline(STEPS)(**settings(video, 19)).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


def test_equals_lists_of_frames_with_the_whole_video_in_view():
    video = NaiveMemFlow(transformer(), sink=0, window=99)
    expected = make([video], [2] * 8)
    latents = video.transformer.pipeline(STEPS)(**settings(video, 16, window_frames=None)).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("switch", [2, 7])
@pytest.mark.parametrize("policy", ["cross_attention", "recache"])
def test_a_new_prompt_selects_for_its_first_chunk(policy, switch):
    """Before the video has outgrown its window, and after."""
    video = NaiveMemFlow(transformer(prompts=2))
    expected = make([video], [2] * 9, switch, recache=policy == "recache")
    schedule = {2 * switch: video.transformer.prompts[1]}
    options = settings(video, 18, switch_policy=policy, prompt_schedule=schedule)
    latents = video.transformer.pipeline(STEPS)(**options).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


def test_the_first_frames_of_a_shot_stay_beside_the_bank():
    video = NaiveMemFlow(transformer(prompts=2), shot=8)
    expected = make([video], [2] * 9, switch=4)
    shots = {"switch_policy": "scene_cut", "switch_options": {"position_offset": 0.0}}
    options = settings(video, 18, prompt_schedule={8: video.transformer.prompts[1]}, **shots)
    pipe = video.transformer.pipeline(STEPS)
    torch.testing.assert_close(pipe(**options).frames, expected, rtol=0, atol=BOUND)
    unpinned = {**shots, "switch_options": {"position_offset": 0.0, "pin": False}}
    without = pipe(**{**options, **unpinned, "generator": generator()}).frames
    assert (without - expected).abs().max() > 1e-2


def test_with_guidance_each_cache_has_a_bank_of_its_own():
    made = transformer(prompts=2)
    branches = [NaiveMemFlow(made), NaiveMemFlow(made, prompt=1)]
    expected = make(branches, [2] * 8)
    options = settings(branches[0], 16, guidance_scale=3.0, negative_prompt_embeds=made.prompts[1])
    latents = made.pipeline(STEPS)(**options).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize(("given_frames", "chunks"), [(3, [1] + [2] * 5), (10, [2] * 3)])
def test_given_frames_are_chunks_with_candidates(monkeypatch, given_frames, chunks):
    """Few of them, and so many that the bank is full before any prompt was read."""
    calls = []
    forward = CausalWanTransformer3DModel.forward
    monkeypatch.setattr(
        CausalWanTransformer3DModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    video, given = NaiveMemFlow(transformer()), randn(1, CHANNELS, given_frames, 4, 4, seed=5)
    expected = make([video], chunks, given=given)
    options = settings(video, expected.shape[2], video_latents=given)
    pipe = video.transformer.pipeline(STEPS)
    torch.testing.assert_close(pipe(**options).frames, expected, rtol=0, atol=BOUND)
    assert len(calls) == pipe.estimate(given_frames, **without_inputs(options)).forwards


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory_bank_frames": 0}, "needs memory_bank_frames of at least 1"),
        ({"position_mode": "relative"}, "needs position_mode 'absolute', got 'relative'"),
        ({"position_mode": "sink_relative"}, "needs position_mode 'absolute', got 'sink_relative'"),
        ({"clean_pass": False}, "leave out clean_pass"),
        ({"sampler_options": {"bank_interval": 0}}, "bank_interval is 0"),
        ({"sampler_options": {"bank_candidates": "all"}}, "allowed are every_chunk, every_interval"),
        ({"sampler": "chunkwise", "sampler_options": {}}, "memory_bank_frames is 2, which sampler 'chunkwise'"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    video = NaiveMemFlow(transformer())
    with pytest.raises(ValueError, match=message):
        video.transformer.pipeline(STEPS)(**{**settings(video, 8), **wrong})


def test_the_bank_counts_as_memory_and_is_known_before():
    video = NaiveMemFlow(transformer())
    pipe = video.transformer.pipeline(STEPS)
    options = settings(video, 8)
    rollout = pipe.rollout(**options)
    rollout.step()
    assert pipe.estimate(**without_inputs(options)).kv_cache_bytes == rollout.denoiser.kv_cache_bytes
