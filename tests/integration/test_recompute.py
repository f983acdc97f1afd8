"""Krea Realtime's sampler against a video made with lists of frames."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from naive_video import CHANNELS, TEXT_DIM, Frame, NaiveTransformer, randn
from saved_rollouts import generator

from wan_autoregressive.models.streaming_vae import denormalize_latents, normalize_latents

BOUND = 1e-4  # float32; deliberate mistakes in what is seen, and where, are off by more than 1e-2
STEPS = (1000, 500, 0)


@dataclass
class NaiveRecompute:
    """The video as frames in a list; the whole of it is decoded again for every chunk."""

    transformer: NaiveTransformer
    vae: torch.nn.Module
    chunks: list[int]
    context: int = 3
    chunk_frames: int = 3
    keep_first: bool = False
    context_noise: float = 0.0
    steps: tuple[int, ...] = STEPS
    prompts: tuple[tuple[int, int], ...] = ()
    """Of each generated chunk: the prompt of its context and its own; the first one by default."""

    def make(self, draw, given: torch.Tensor | None = None, source: torch.Tensor | None = None) -> torch.Tensor:
        scheduler = self.transformer.pipeline(self.steps).scheduler
        timesteps, sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
        done = [] if given is None else list(given.split(1, dim=2))
        for number, size in enumerate(self.chunks):
            read = self.prompts[number] if self.prompts else (0, 0)
            context = self._context(done)
            latents = draw(size)
            if source is not None:
                clip = source[:, :, len(done) : len(done) + size]
                latents = (1 - sigmas[0]) * clip + sigmas[0] * latents
            for step, timestep in enumerate(timesteps):
                frames = self._frames(context, latents, timestep, read)
                flow = self.transformer.flow(frames)[:, :, len(context) :]
                latents = (latents.double() - sigmas[step] * flow.double()).float()
                if step + 1 < len(timesteps):
                    latents = (1 - sigmas[step + 1]) * latents + sigmas[step + 1] * draw(size)
            done += latents.split(1, dim=2)
        return torch.cat(done, dim=2)

    def _context(self, done: list[torch.Tensor]) -> list[torch.Tensor]:
        if len(done) <= self.context:
            return list(done)
        oldest = len(done) - self.context
        if self.keep_first:
            first = done[0]
        else:
            raw = denormalize_latents(self.vae, torch.cat(done, dim=2))
            pixels = self.vae.decode(raw, return_dict=False)[0][:, :, 4 * oldest : 4 * oldest + 1]
            first = normalize_latents(self.vae, self.vae.encode(pixels).latent_dist.mode())
        return [first, *done[oldest + 1 :]]

    def _frames(self, context, latents, timestep, read) -> list[Frame]:
        frames = []
        for place, frame in enumerate(context):
            end = min(len(context), (place // self.chunk_frames + 1) * self.chunk_frames)
            sees = {other: other for other in range(end)}
            frames.append(Frame(frame, self.context_noise, place, sees, read[0]))
        total = len(context) + latents.shape[2]
        for place, frame in enumerate(latents.split(1, dim=2), start=len(context)):
            frames.append(Frame(frame, timestep, place, {other: other for other in range(total)}, read[1]))
        return frames


@pytest.fixture(scope="module")
def vae(pipe):
    return pipe.vae


def drawing(batch=1, height=4, width=4):
    source = generator()
    return lambda frames: torch.randn(batch, CHANNELS, frames, height, width, generator=source)


def transformer(batch: int = 1, prompts: int = 1) -> NaiveTransformer:
    return NaiveTransformer(prompts=[randn(batch, 5, TEXT_DIM, seed=70 + i) for i in range(prompts)])


def settings(naive: NaiveRecompute, given: int = 0, height: int = 4, width: int = 4, **options):
    """Arguments of the rollout that makes the same video."""
    sampler_options = {"context_frames": naive.context, "keep_first_frame": naive.keep_first}
    return {
        "sampler": "recompute",
        "sampler_options": {**sampler_options, **options.pop("sampler_options", {})},
        "height": 8 * height,
        "width": 8 * width,
        "num_frames": 4 * (given + sum(naive.chunks) - 1) + 1,
        "chunk_frames": naive.chunk_frames,
        "window_frames": naive.context + naive.chunk_frames,
        "switch_policy": "cross_attention",
        "context_noise": naive.context_noise,
        "prompt_embeds": naive.transformer.prompts[0],
        "output_type": "latent",
        **options,
    }


CASES = {
    "as published": {"chunks": [3] * 4},
    "two chunks of context": {"chunks": [3] * 5, "context": 6},
    "part of a chunk of context": {"chunks": [3] * 4, "context": 4, "context_noise": 30.0},
    "one frame of context": {"chunks": [3] * 3, "context": 1},
    "first frame kept": {"chunks": [3] * 4, "context": 4, "keep_first": True},
    "pairs": {"chunks": [2] * 5, "chunk_frames": 2, "context": 3},
    "frame by frame": {"chunks": [1] * 5, "chunk_frames": 1, "context": 2},
    "the end inside of a chunk": {"chunks": [3, 3, 2]},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_lists_of_frames(vae, name):
    naive = NaiveRecompute(transformer(), vae, **CASES[name])
    expected = naive.make(drawing())
    latents = naive.transformer.pipeline(STEPS, vae)(**settings(naive), generator=generator()).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("position_mode", ["relative", "sink_relative"])
def test_two_wide_videos_under_any_positions(vae, position_mode):
    naive = NaiveRecompute(transformer(2), vae, [3] * 4)
    expected = naive.make(drawing(2, 4, 6))
    options = settings(naive, width=6, position_mode=position_mode)
    latents = naive.transformer.pipeline(STEPS, vae)(**options, generator=generator()).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize(("given", "chunks"), [(3, [3] * 3), (5, [1, 3, 3])])
@pytest.mark.parametrize("keep_first", [False, True])
def test_given_frames_are_the_context_of_the_first_chunk(vae, given, chunks, keep_first):
    naive = NaiveRecompute(transformer(), vae, chunks, keep_first=keep_first)
    start = randn(1, CHANNELS, given, 4, 4, seed=5)
    expected = naive.make(drawing(), start)
    pipe = naive.transformer.pipeline(STEPS, vae)
    latents = pipe(**settings(naive, given), video_latents=start, generator=generator()).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize(("context_prompt", "of_context"), [("old", 0), ("new", 1)])
def test_the_context_of_a_changed_prompt(vae, context_prompt, of_context):
    prompts = ((0, 0), (0, 0), (of_context, 1), (1, 1))
    naive = NaiveRecompute(transformer(prompts=2), vae, [3] * 4, prompts=prompts)
    expected = naive.make(drawing())
    options = settings(naive, sampler_options={"context_prompt": context_prompt})
    schedule = {6: naive.transformer.prompts[1]}
    latents = naive.transformer.pipeline(STEPS, vae)(**options, prompt_schedule=schedule, generator=generator()).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


def test_a_blended_prompt_moves_chunk_by_chunk(vae):
    made = transformer(prompts=2)
    old, new = made.prompts
    made.prompts = [old, torch.lerp(old, new, 0.5), new]
    naive = NaiveRecompute(made, vae, [3] * 4, prompts=((0, 0), (0, 1), (1, 2), (2, 2)))
    expected = naive.make(drawing())
    options = settings(naive, switch_policy="blend", blend_chunks=2)
    latents = made.pipeline(STEPS, vae)(**options, prompt_schedule={3: new}, generator=generator()).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize(("strength", "steps"), [(0.6, (600, 300, 0)), (1.0, (1000, 500, 0))])
def test_video_to_video_makes_every_step_of_a_list_that_starts_at_its_strength(vae, strength, steps):
    clip = np.random.default_rng(0).integers(0, 255, (33, 32, 32, 3), dtype=np.uint8)
    naive = NaiveRecompute(transformer(), vae, [3] * 3, steps=steps)
    pipe = naive.transformer.pipeline(STEPS, vae)
    expected = naive.make(drawing(), source=pipe.encode_video(clip, 32, 32))
    options = {**settings(naive), "num_frames": None}
    rollout = pipe.rollout(**options, video=list(clip), strength=strength, generator=generator())
    latents = torch.cat([chunk.latents for chunk in rollout], dim=2)
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)
    assert rollout.steps_done == rollout.num_steps


def test_positions_and_the_cache_do_not_grow(vae):
    naive = NaiveRecompute(transformer(), vae, [3] * 4)
    options = {**settings(naive), "num_frames": None}
    rollout = naive.transformer.pipeline(STEPS, vae).rollout(**options, generator=generator())
    sizes = []
    for _ in range(6):
        rollout.step()
        sizes.append((rollout.cache.num_tokens, rollout.denoiser.kv_cache_bytes))
    assert [tokens // 4 for tokens, _ in sizes] == [3, 6, 6, 6, 6, 6]
    assert len({allocated for _, allocated in sizes}) == 1


def test_pixels_are_those_that_are_handed_out(vae):
    """With a video that ends inside of a latent, and whatever form the frames are asked for in."""
    naive = NaiveRecompute(transformer(), vae, [3] * 3)
    pipe = naive.transformer.pipeline(STEPS, vae)
    options = {**settings(naive), "num_frames": 31}
    latents = pipe(**options, generator=generator()).frames
    frames = pipe(**{**options, "output_type": "np"}, generator=generator()).frames
    assert frames.shape[1] == 31
    assert np.array_equal(frames, pipe.decode_latents(latents, "np")[:, :31])


def test_decoding_alongside_is_refused_unless_no_pixels_are_needed(vae):
    naive = NaiveRecompute(transformer(), vae, [3] * 3)
    pipe = naive.transformer.pipeline(STEPS, vae)
    options = {**settings(naive), "output_type": "np"}
    with pytest.raises(ValueError, match="sampler 'recompute' begins a chunk from the pixels of the one before"):
        pipe(**options, decode_alongside=True)
    options["sampler_options"]["keep_first_frame"] = True
    alone = pipe(**options, generator=generator()).frames
    assert np.array_equal(pipe(**options, generator=generator(), decode_alongside=True).frames, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler_options": {"frames": 3}}, "sampler_options do not fit sampler 'recompute'"),
        ({"sampler_options": {"context_frames": 0}}, "context_frames is 0; it must be"),
        ({"sampler_options": {"context_prompt": "both"}}, "context_prompt is 'both'; allowed are old, new"),
        ({"window_frames": None}, "set window_frames=6"),
        ({"window_frames": 5}, "set window_frames=6"),
        ({"window_frames": 9, "sink_frames": 3}, "leave out sink_frames"),
        ({"switch_policy": "recache"}, "use 'cross_attention' or 'blend'"),
        ({"clean_pass": False}, "has no clean pass"),
    ],
)
def test_refuses_what_it_cannot_do(vae, options, message):
    naive = NaiveRecompute(transformer(), vae, [3] * 3)
    with pytest.raises(ValueError, match=message):
        naive.transformer.pipeline(STEPS, vae).rollout(**{**settings(naive), **options})


def test_needs_a_vae_unless_the_first_frame_is_kept():
    naive = NaiveRecompute(transformer(), None, [3] * 2)
    with pytest.raises(ValueError, match="sampler 'recompute' needs a VAE"):
        naive.transformer.pipeline(STEPS).rollout(**settings(naive))
    naive.keep_first = True
    assert len(list(naive.transformer.pipeline(STEPS).rollout(**settings(naive)))) == 2
