"""Rolling Forcing against a video made with lists of frames."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from naive_video import CHANNELS, TEXT_DIM, Frame, NaiveTransformer, randn
from saved_rollouts import generator

BOUND = 1e-4  # float32; deliberate mistakes in what is seen, and where, are off by more than 1e-2
STEPS = (1000, 700, 400)


@dataclass
class NaiveRolling:
    """The video as frames in lists. `draw(frames)` is asked for noise in the documented order."""

    transformer: NaiveTransformer
    chunks: list[int]
    """Frames of each chunk to generate."""
    attended: int
    window: int | None = None
    sink: int = 0
    steps: tuple[int, ...] = STEPS
    context_noise: float = 0.0
    given: list[int] = field(default_factory=list)
    """Frames of each given chunk."""
    prompt_of_chunk: dict[int, int] = field(default_factory=dict)
    """Numbers of generated chunks from which another prompt holds."""

    def make(self, draw, given: torch.Tensor | None = None) -> torch.Tensor:
        pipe = self.transformer.pipeline(self.steps)
        timesteps, sigmas = pipe.scheduler.timesteps.tolist(), pipe.scheduler.sigmas.tolist()
        finished = [] if given is None else list(given.split(1, dim=2))
        ends = list(itertools.accumulate([*self.given, *self.chunks]))
        starts = [0, *ends]
        done_prompts: list[int] = [0] * len(finished)
        flying: list[list] = []  # chunk number, latents, steps done
        entered, prompt = 0, 0
        while len(finished) < ends[-1]:
            prompt = self.prompt_of_chunk.get(flying[0][0] if flying else entered, prompt)
            if entered < len(self.chunks):
                flying.append([entered, draw(self.chunks[entered], None), 0])
                entered += 1
            start = starts[len(self.given) + flying[0][0]]
            assert start == len(finished)
            sizes = [self.chunks[number] for number, _, _ in flying]
            frames = self._past(finished, ends, done_prompts)
            frames += self._window(start, flying, sizes, timesteps, prompt)
            flow = self.transformer.flow(frames)[:, :, start:]
            own = flow.split(sizes, dim=2)
            for i, entry in enumerate(flying):
                x0 = (entry[1].double() - sigmas[entry[2]] * own[i].double()).float()
                entry[2] += 1
                if entry[2] < len(timesteps):
                    window = (sum(sizes[:i]), sum(sizes))
                    noise = draw(sizes[i], window)
                    x0 = (1 - sigmas[entry[2]]) * x0 + sigmas[entry[2]] * noise
                entry[1] = x0
            if flying[0][2] == len(timesteps):
                _, latents, _ = flying.pop(0)
                finished += latents.split(1, dim=2)
                done_prompts += [prompt] * latents.shape[2]
        return torch.cat(finished, dim=2)

    def _held(self, end: int) -> list[int]:
        """Frames in the cache once the one before `end` has been appended."""
        if self.window is None:
            return list(range(end))
        return [frame for frame in range(end) if frame < self.sink or frame >= end - (self.window - self.sink)]

    def _past(self, finished, ends, prompts) -> list[Frame]:
        """Every finished frame as its context pass saw it: the newest frames, at their own positions."""
        frames = []
        for number, latents in enumerate(finished):
            end = next(end for end in ends if end > number)
            seen = self._held(end)[-self.attended :]
            noise = 0.0 if number < sum(self.given) else self.context_noise
            frames.append(Frame(latents, noise, number, {other: other for other in seen}, prompts[number]))
        return frames

    def _window(self, start, flying, sizes, timesteps, prompt) -> list[Frame]:
        total = sum(sizes)
        room = max(0, self.attended - self.sink - total)
        if self.window is not None:
            room = min(room, self.window - self.sink - sizes[0])
        newest = list(range(max(0, start - room), start))
        sink = [frame for frame in range(min(self.sink, start)) if frame not in newest]
        before = start - len(newest) - len(sink)
        sees = {frame: before + place for place, frame in enumerate(sink)}
        sees |= {frame: frame for frame in (*newest, *range(start, start + total))}
        frames, number = [], start
        for _, latents, step in flying:
            for single in latents.split(1, dim=2):
                frames.append(Frame(single, timesteps[step], number, sees, prompt))
                number += 1
        return frames


def drawing(shape, seed=0):
    source = generator(seed)
    batch, height, width = shape
    return lambda frames, window: torch.randn(batch, CHANNELS, frames, height, width, generator=source)


def drawing_as_the_original(shape, total, seed=0):
    """All initial noise in one go, then for each re-noise as much as the window has frames; frames before channels."""
    source = generator(seed)
    batch, height, width = shape

    def draw(frames):
        return torch.randn(batch, frames, CHANNELS, height, width, generator=source).transpose(1, 2)

    initial = draw(total)
    used = 0

    def drawn(frames, window):
        nonlocal used
        if window is None:
            used += frames
            return initial[:, :, used - frames : used]
        start, whole = window
        return draw(whole)[:, :, start : start + frames]

    return drawn


def settings(naive: NaiveRolling, shape=(1, 4, 4), **options):
    """Arguments of the rollout that makes the same video."""
    frames = sum(naive.given) + sum(naive.chunks)
    return {
        "sampler": "rolling",
        "sampler_options": {"attended_frames": naive.attended},
        "position_mode": "sink_relative",
        "height": 8 * shape[1],
        "width": 8 * shape[2],
        "num_frames": 4 * (frames - 1) + 1,
        "chunk_frames": max(naive.chunks),
        "window_frames": naive.window,
        "sink_frames": naive.sink,
        "context_noise": naive.context_noise,
        "prompt_embeds": naive.transformer.prompts[0],
        "output_type": "latent",
        **options,
    }


def transformer(batch: int = 1, prompts: int = 1, **options) -> NaiveTransformer:
    return NaiveTransformer(prompts=[randn(batch, 5, TEXT_DIM, seed=70 + i) for i in range(prompts)], **options)


CASES = {
    "a sink and frames left out": ([3] * 6, {"attended": 12, "window": 15, "sink": 3}, {}, (1, 4, 4)),
    "pairs, two wide videos": ([2] * 7, {"attended": 10, "window": 12, "sink": 2}, {}, (2, 4, 6)),
    "fewer chunks than steps": ([3] * 2, {"attended": 21, "steps": (1000, 800, 600, 400, 200)}, {}, (1, 4, 4)),
    "one chunk": ([2], {"attended": 21}, {}, (1, 4, 4)),
    "neither window nor sink": ([2] * 6, {"attended": 8}, {}, (1, 4, 4)),
    "a small cache: context passes see the sink": (
        *([2] * 8, {"attended": 12, "window": 8, "sink": 2, "context_noise": 20.0}, {}, (1, 4, 4)),
    ),
    "a sink larger than a chunk": ([2] * 8, {"attended": 9, "window": 11, "sink": 3}, {}, (1, 4, 4)),
    "chunks of other sizes": (
        *([1, 3, 3, 3, 3, 2], {"attended": 12, "window": 13, "sink": 1}, {"first_chunk_frames": 1}, (1, 4, 4)),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("position_mode", ["sink_relative", "relative"])
def test_equals_lists_of_frames(name, position_mode):
    chunks, parts, options, shape = CASES[name]
    naive = NaiveRolling(transformer(shape[0]), chunks, **parts)
    if position_mode == "relative" and naive.window and naive.window - naive.sink < naive.attended:
        pytest.skip("context passes see the sink, which by its place in the window is never far away")
    expected = naive.make(drawing(shape))
    pipe = naive.transformer.pipeline(naive.steps)
    options = {**settings(naive, shape), "position_mode": position_mode, **options}
    latents = pipe(**options, generator=generator()).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


def test_given_frames_come_first():
    """Also where they end inside of a chunk."""
    naive = NaiveRolling(transformer(2), [2, 3, 3, 3], attended=12, window=14, sink=3, given=[3, 1])
    given = randn(2, CHANNELS, 4, 4, 4, seed=5)
    expected = naive.make(drawing((2, 4, 4)), given)
    pipe = naive.transformer.pipeline(naive.steps)
    latents = pipe(**settings(naive), video_latents=given, generator=generator()).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


def test_draws_as_the_original():
    naive = NaiveRolling(transformer(2), [3] * 5, attended=12, window=15, sink=3)
    expected = naive.make(drawing_as_the_original((2, 4, 4), 15))
    options = settings(naive)
    options["sampler_options"]["reference_draws"] = True
    pipe = naive.transformer.pipeline(naive.steps)
    torch.testing.assert_close(pipe(**options, generator=generator()).frames, expected, rtol=0, atol=BOUND)


def test_a_prompt_changes_between_two_ticks():
    """What is finished stays as it was read; what is in flight goes on under the new prompt."""
    naive = NaiveRolling(transformer(prompts=2), [3] * 6, attended=12, window=15, sink=3, prompt_of_chunk={3: 1})
    expected = naive.make(drawing((1, 4, 4)))
    pipe = naive.transformer.pipeline(naive.steps)
    options = settings(naive, switch_policy="cross_attention")
    for schedule in ({9: naive.transformer.prompts[1]}, None):
        rollout = pipe.rollout(**options, prompt_schedule=schedule, generator=generator())
        chunks = []
        for number in range(6):
            set_now = schedule is None and number == 3
            chunks.append(rollout.step(prompt=naive.transformer.prompts[1] if set_now else None).latents)
        torch.testing.assert_close(torch.cat(chunks, dim=2), expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize("policy", ["cross_attention", "recache"])
def test_the_end_of_the_rotary_table_is_not_seen(policy):
    """Positions start again when they reach it, also where a re-cache then looks back over the whole window."""
    videos = []
    for length in (1024, 24):
        naive = NaiveRolling(transformer(prompts=2, rope_max_seq_len=length), [2] * 20, attended=10, window=13, sink=2)
        pipe = naive.transformer.pipeline(naive.steps)
        options = settings(naive, switch_policy=policy, num_frames=None)
        rollout = pipe.rollout(**options, prompt_schedule={22: naive.transformer.prompts[1]}, generator=generator())
        videos.append(torch.cat([rollout.step().latents for _ in range(20)], dim=2))
    torch.testing.assert_close(videos[0], videos[1], rtol=0, atol=BOUND)


# With the tiny checkpoint.

SMALL = {"sampler": "rolling", "sampler_options": {"attended_frames": 8}, "position_mode": "sink_relative"}
SMALL |= {"height": 32, "width": 32, "num_frames": 53, "chunk_frames": 2, "window_frames": 10, "sink_frames": 2}


def start(pipe, **options):
    return pipe.rollout("a red circle", **{**SMALL, "generator": generator(), **options})


def test_a_chunk_comes_out_of_every_tick_and_a_stream_equals_a_call(pipe):
    rollout = start(pipe)
    counts = []
    rollout.on_progress = lambda: counts.append(rollout.chunks_done)
    chunks = list(rollout)
    assert [chunk.start_frame for chunk in chunks] == [0, 2, 4, 6, 8, 10, 12]
    # 4 steps: 1 + 2 + 3 + 4 of the chunks in flight until the first one is done, then 4 for each chunk, then fewer.
    assert [counts.count(done) for done in range(7)] == [10, 4, 4, 4, 3, 2, 1]
    assert len(counts) == rollout.num_steps == 28
    whole = pipe("a red circle", **SMALL, generator=generator(), output_type="latent").frames
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks], dim=2), whole)


def test_interrupted_while_the_first_chunk_is_not_done(pipe):
    rollout = start(pipe)
    rollout.on_progress = rollout.interrupt
    chunk = rollout.step()
    assert (chunk.start_frame, chunk.latents.shape[2]) == (0, 2)
    assert rollout.done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler_options": {"attended": 3}}, "sampler_options do not fit sampler 'rolling'"),
        ({"sampler_options": {"attended_frames": 1}}, "attended_frames is 1; it must be .* a chunk of 2"),
        ({"first_chunk_steps": (1000,)}, "leave out strength, first_chunk_steps and clean_pass"),
        ({"clean_pass": False}, "leave out strength, first_chunk_steps and clean_pass"),
        ({"position_mode": "absolute"}, "set position_mode='sink_relative'"),
        ({"num_frames": None, "sampler_options": {"reference_draws": True}}, "has no end"),
        ({"num_frames": None, "window_frames": 9}, "needs window_frames of at least 10"),
    ],
)
def test_refuses_what_it_cannot_do(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        start(pipe, **options)
