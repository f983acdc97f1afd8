"""StreamDiffusionV2's lanes against lanes that are lists of frames, each computed alone."""

import dataclasses
import itertools
from dataclasses import dataclass, field

import golden
import numpy as np
import pytest
import torch
from naive_video import CHANNELS, TEXT_DIM, Frame, NaiveTransformer, randn
from saved_rollouts import generator

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.image_condition import ImageCondition
from wan_autoregressive.pipelines.input_checks import check_sizes
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.rollout import WanRollout

BOUND = 1e-4  # float32; deliberate mistakes in what is seen, and where, are off by more than 1e-2
STEPS = (1000, 700, 400)
OPEN_CASE = golden.REPOSITORY_CASES / "open" / "sdv2_v2v_4steps.json"
ADAPTIVE_CASE = golden.REPOSITORY_CASES / "open" / "sdv2_adaptive_sink.json"


@dataclass
class NaiveStream:
    """A video of lanes, each a list of the frames that its forwards have seen."""

    transformer: NaiveTransformer
    chunks: list[int]
    """Frames of each chunk to generate."""
    window: int | None = None
    sink: int = 0
    given: list[int] = field(default_factory=list)
    """Frames of each given chunk."""
    prompt_of_chunk: dict[int, int] = field(default_factory=dict)
    """Numbers of generated chunks from which another prompt holds, when they are handed out."""
    restart: int | None = None
    steps: tuple[int, ...] = STEPS
    sequential: bool = False
    condition: torch.Tensor | None = None
    """Channels of an image beside the latents, of all frames."""

    def make(self, draw, given: torch.Tensor | None = None) -> torch.Tensor:
        scheduler = self.transformer.pipeline(self.steps).scheduler
        self.timesteps, self.sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
        self.ends = list(itertools.accumulate([*self.given, *self.chunks]))
        self.positions = self._positions()
        past: list[Frame] = []
        for number, size in enumerate(self.given):
            stop = self.ends[number]
            past += self._frames(given[:, :, stop - size : stop], 0.0, stop - size, 0)
        # The first chunk, step by step. What its last step saw and was is the start of every lane.
        latents = draw(self.chunks[0])
        for step in range(len(self.steps)):
            entered, latents = self._step(past, latents, step, 0, 0, draw)
        done = [latents]
        for number in range(1, len(self.chunks) if self.sequential else 0):
            past, latents = [*past, *entered], draw(self.chunks[number])
            for step in range(len(self.steps)):
                entered, latents = self._step(past, latents, step, number, 0, draw)
            done.append(latents)
        if self.sequential:
            return torch.cat(done, dim=2)
        lanes = [[*past, *entered] for _ in self.steps]
        flying: list[list] = []  # number of the chunk, latents; oldest first
        for handed_out in range(1, len(self.chunks)):
            prompt = max((p for first, p in self.prompt_of_chunk.items() if first <= handed_out), default=0)
            finished = None
            while finished is None:
                entering = flying[-1][0] + 1 if flying else handed_out
                if entering < len(self.chunks):
                    flying.append([entering, draw(self.chunks[entering]), 0])
                for chunk in flying:
                    number, latents, lane = chunk
                    entered, chunk[1] = self._step(lanes[lane], latents, lane, number, prompt, draw)
                    lanes[lane] += entered
                    chunk[2] += 1
                if flying[0][2] == len(self.steps):
                    finished = flying.pop(0)[1]
            done.append(finished)
        return torch.cat([*([] if given is None else [given]), *done], dim=2)

    def _step(self, past, latents, step, number, prompt, draw):
        """The frames of a forward, and their latents after the step."""
        start = self.ends[len(self.given) + number] - latents.shape[2]
        frames = self._frames(latents, self.timesteps[step], start, prompt)
        assert len(past) == start
        flow = self.transformer.flow([*past, *frames])[:, :, start:]
        x0 = (latents.double() - self.sigmas[step] * flow.double()).float()
        if step + 1 < len(self.steps):
            sigma = self.sigmas[step + 1]
            x0 = (1 - sigma) * x0 + sigma * draw(latents.shape[2])
        return frames, x0

    def _frames(self, latents, timestep, start, prompt) -> list[Frame]:
        end = start + latents.shape[2]
        held = range(end)
        if self.window is not None:
            held = [frame for frame in held if frame < self.sink or frame >= end - (self.window - self.sink)]
        sees = {frame: self.positions[frame] for frame in held}
        if self.condition is not None:
            latents = torch.cat([latents, self.condition[:, :, start:end]], dim=1)
        single = latents.split(1, dim=2)
        return [Frame(frame, timestep, self.positions[start + i], sees, prompt) for i, frame in enumerate(single)]

    def _positions(self) -> list[int]:
        positions: list[int] = []
        following = 0
        for size in (*self.given, *self.chunks):
            if self.restart is not None and following >= self.restart:
                following = self.window - 1
            positions += range(following, following + size)
            following += size
        return positions


def drawing(shape, seed=0):
    source = generator(seed)
    batch, height, width = shape
    return lambda frames: torch.randn(batch, CHANNELS, frames, height, width, generator=source)


def transformer(batch: int = 1, prompts: int = 1) -> NaiveTransformer:
    return NaiveTransformer(prompts=[randn(batch, 5, TEXT_DIM, seed=70 + i) for i in range(prompts)])


def settings(naive: NaiveStream, shape=(1, 4, 4), **options):
    frames = sum(naive.given) + sum(naive.chunks)
    return {
        "sampler": "stream_batch",
        "sampler_options": {"restart_positions": naive.restart, "sequential": naive.sequential},
        "switch_policy": "cross_attention",
        "height": 8 * shape[1],
        "width": 8 * shape[2],
        "num_frames": 4 * (frames - 1) + 1,
        "chunk_frames": naive.chunks[1] if len(naive.chunks) > 1 else naive.chunks[0],
        "first_chunk_frames": (*naive.given, *naive.chunks)[0],
        "window_frames": naive.window,
        "sink_frames": naive.sink,
        "prompt_embeds": naive.transformer.prompts[0],
        "output_type": "latent",
        **options,
    }


CASES = {
    "as published": ([2] + [1] * 8, {"window": 6, "sink": 3}, (1, 4, 4)),
    "pairs, two wide videos": ([2] * 5, {"window": 6, "sink": 1}, (2, 4, 6)),
    "all steps in one cache": ([2] + [1] * 8, {"window": 4, "sink": 1, "restart": 6, "sequential": True}, (2, 4, 4)),
    "no window": ([3, 2, 2, 1], {}, (1, 4, 4)),
    "fewer chunks than steps": ([2, 1], {"window": 6, "sink": 3, "steps": (1000, 800, 600, 400)}, (1, 4, 4)),
    "one chunk": ([2], {"window": 6}, (1, 4, 4)),
    "one step": ([2] + [1] * 4, {"window": 4, "sink": 1, "steps": (700,)}, (1, 4, 4)),
    "positions that start again in every other chunk": ([2] + [1] * 9, {"window": 4, "restart": 5}, (1, 4, 4)),
    "positions that start again": ([2] + [1] * 16, {"window": 4, "sink": 1, "restart": 7}, (1, 4, 4)),
    "positions of pairs that start again": ([1] + [2] * 9, {"window": 5, "sink": 1, "restart": 10}, (1, 4, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_lanes_of_frames(name):
    chunks, parts, shape = CASES[name]
    naive = NaiveStream(transformer(shape[0]), chunks, **parts)
    expected = naive.make(drawing(shape))
    latents = naive.transformer.pipeline(naive.steps)(**settings(naive, shape), generator=generator()).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


@pytest.mark.parametrize(
    ("chunks", "parts", "sees_clip"),
    [
        ([2] + [1] * 8, {"window": 4, "sink": 1}, True),
        ([2] * 5, {"window": 4}, False),
        ([2] * 4, {}, False),
        ([1] * 5, {"window": 4, "sequential": True}, True),
    ],
)
def test_an_image_is_seen_in_every_lane(chunks, parts, sees_clip):
    """Each lane has the channels of its own frames, of two videos."""
    condition = randn(2, 20, sum(chunks), 4, 4, seed=7)
    condition[:, :, -1:] = condition[:, :, -2:-1]  # as far from the image
    sizes = {"in_channels": CHANNELS + 20} | ({"image_dim": 8, "added_kv_proj_dim": 40} if sees_clip else {})
    image = randn(2, 6, 8, seed=6) if sees_clip else None
    naive = NaiveStream(
        NaiveTransformer(prompts=[randn(2, 5, TEXT_DIM)], sizes=sizes, image=image),
        chunks,
        **parts,
        condition=condition,
    )
    expected = naive.make(drawing((2, 4, 4)))
    options = settings(naive, (2, 4, 4))
    prompt = PromptState(options.pop("prompt_embeds"))
    pipe, seen = naive.transformer.pipeline(naive.steps), ImageCondition(condition[:, :, :-1], image)
    components, config = pipe.wan_components(), RolloutConfig(**options)
    check_sizes(components, config, given_frames=0)
    rollout = WanRollout(components, config, prompt, generator=generator(), image=seen)
    latents = torch.cat([chunk.latents for chunk in rollout], dim=2)
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)
    again = dataclasses.replace(config, sampler_options={"restart_positions": 9})
    with pytest.raises(ValueError, match="numbers frames anew"):
        check_sizes(components, again, given_frames=0)


def test_given_frames_come_first():
    naive = NaiveStream(transformer(), [1] * 6, window=5, sink=1, given=[2, 1])
    given = randn(1, CHANNELS, 3, 4, 4, seed=5)
    expected = naive.make(drawing((1, 4, 4)), given)
    pipe = naive.transformer.pipeline(naive.steps)
    latents = pipe(**settings(naive), video_latents=given, generator=generator()).frames
    torch.testing.assert_close(latents, expected, rtol=0, atol=BOUND)


def test_a_prompt_holds_in_every_lane_from_the_next_tick_on():
    naive = NaiveStream(transformer(prompts=2), [2] + [1] * 7, window=6, sink=3, prompt_of_chunk={4: 1})
    expected = naive.make(drawing((1, 4, 4)))
    rollout = naive.transformer.pipeline(naive.steps).rollout(**settings(naive), generator=generator())
    chunks = [rollout.step(naive.transformer.prompts[1] if number == 4 else None).latents for number in range(8)]
    torch.testing.assert_close(torch.cat(chunks, dim=2), expected, rtol=0, atol=BOUND)


# Deliberate mistakes must be far outside of the bound of the recordings.
@pytest.mark.parametrize(
    "mistake",
    [
        {"strength": 0.7},
        {"window_frames": 5},
        {"sink_frames": 1},
        {"denoising_steps": (700, 500, 400, 201)},
        {"sampler_options": {"restart_positions": 8}},
    ],
)
def test_a_mistake_is_seen(mistake):
    assert golden.differences(OPEN_CASE, **mistake)["latents"] > 1e-2


@pytest.mark.parametrize("threshold", [-1, 0.2, 0.8])
def test_a_mistake_with_an_adaptive_sink_is_seen(threshold):
    mistake = {"sampler_options": {"adaptive_sink": threshold}}
    assert golden.differences(ADAPTIVE_CASE, **mistake)["latents"] > 1e-2


# With the tiny checkpoint.

SMALL = {"sampler": "stream_batch", "switch_policy": "cross_attention", "height": 32, "width": 32}
SMALL |= {"chunk_frames": 1, "first_chunk_frames": 2, "window_frames": 6, "sink_frames": 3}


def start(pipe, **options):
    return pipe.rollout("a red circle", **{**SMALL, "num_frames": 29, "generator": generator(), **options})


@pytest.fixture
def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (29, 32, 32, 3), dtype=np.uint8)


def test_the_last_chunks_leave_the_lanes_one_after_the_other(pipe):
    rollout = start(pipe, output_type="latent")
    counts = []
    rollout.on_progress = lambda: counts.append(rollout.chunks_done)
    assert [chunk.start_frame for chunk in rollout] == [0, 2, 3, 4, 5, 6, 7]
    # 4 steps: the first chunk alone, then 1 + 2 + 3 + 4 until the second one is done, 4 for each, then fewer.
    assert [counts.count(done) for done in range(7)] == [4, 10, 4, 4, 3, 2, 1]
    assert rollout.sampler.nbytes == 0


def test_lanes_of_a_full_window_run_as_one_forward(pipe, monkeypatch):
    rows = []
    forward = type(pipe.transformer).forward
    monkeypatch.setattr(
        type(pipe.transformer),
        "forward",
        lambda *args, **kwargs: rows.append(len(kwargs["hidden_states"])) or forward(*args, **kwargs),
    )
    rollout = pipe.rollout(["one", "two"], **SMALL, num_frames=57, output_type="latent", generator=generator())
    for chunk in rollout:
        if chunk.start_frame == 7:
            rows.clear()
    assert rows == [2 * 4] * 4 + [
        2 * 3,
        2 * 2,
        2 * 1,
    ]  # the window of 6 is full in all lanes; then the lanes run empty


def test_two_videos_in_lanes_are_each_alone(pipe):
    """With an adaptive sink, which decides for each video."""
    options = {**SMALL, "num_frames": 37, "sampler_options": {"adaptive_sink": 0.9}, "output_type": "latent"}
    both = pipe(["one", "two"], **options, generator=[generator(3), generator(4)]).frames
    for index, prompt in enumerate(["one", "two"]):
        alone = pipe(prompt, **options, generator=generator(3 + index)).frames
        torch.testing.assert_close(both[index : index + 1], alone, rtol=0, atol=BOUND)


def test_interrupted_with_chunks_in_the_lanes(pipe):
    rollout = start(pipe, output_type="latent")
    rollout.step()
    rollout.on_progress = rollout.interrupt
    assert rollout.step().start_frame == 2
    assert rollout.done


def test_the_steps_of_a_video_cannot_become_more(pipe):
    rollout = start(pipe, output_type="latent")
    rollout.step()
    rollout.change(denoising_steps=(1000, 500))
    with pytest.raises(ValueError, match=r"has 4 lanes.* cannot change to 2"):
        rollout.step()


@pytest.mark.parametrize(("length", "frames"), [(29, 29), (28, 25), (12, 9), (5, 5), (2, 1)])
def test_video_to_video_ends_with_the_source(pipe, clip, length, frames):
    videos = []
    for source in (clip[:length], iter(clip[:length])):
        options = {**SMALL, "video": source, "strength": 0.8, "generator": generator()}
        videos.append(np.concatenate([chunk.frames for chunk in pipe.stream("x", **options)], axis=1))
    assert videos[0].shape[1] == frames
    assert np.array_equal(*videos)


def test_a_source_is_read_as_far_ahead_as_there_are_lanes(pipe, clip):
    taken = []
    frames = (taken.append(1) or frame for frame in itertools.cycle(clip))
    chunks = pipe.stream("x", **SMALL, video=frames, strength=0.8)
    counts = []
    for _ in range(4):
        next(chunks)
        counts.append(len(taken))
    assert counts == [5, 5 + 4 * 4, 5 + 5 * 4, 5 + 6 * 4]  # 4 steps


@pytest.mark.parametrize("normalized", [True, False])
def test_the_source_is_on_the_scale_that_is_asked_for(pipe, clip, normalized):
    options = {"sampler_options": {"normalized_source": normalized}, "video": clip, "num_frames": None}
    rollout = start(pipe, **options, strength=0.8, output_type="latent")
    inputs = []
    rollout.denoiser.predict, predict = (
        lambda latents, window: inputs.append(latents.clone()) or predict(latents, window),
        rollout.denoiser.predict,
    )
    rollout.step()
    source = pipe.encode_video(clip[:5], 32, 32)
    if not normalized:
        mean, std = (torch.tensor(pipe.vae.config[of]).view(1, -1, 1, 1, 1) for of in ("latents_mean", "latents_std"))
        source = source * std + mean
    noise = torch.randn(1, CHANNELS, 2, 4, 4, generator=generator())
    torch.testing.assert_close(inputs[0], 0.8 * noise + 0.2 * source, rtol=0, atol=1e-5)


def test_motion_lowers_the_noise(pipe):
    """By the formula of the original, on pixels in [-1, 1]."""
    brightness = [0.0] * 5 + [0.0] * 4 + [0.043] * 4 + [0.9] * 4 + [0.9] * 4
    video = [np.full((32, 32, 3), value, dtype=np.float32) for value in brightness]
    rollout = start(pipe, num_frames=None, video=video, strength=0.8, output_type="latent")
    told = []
    rollout.denoiser.predict_lanes, predict = (
        lambda latents, windows, first: told.append((first, windows[0].timesteps)) or predict(latents, windows, first),
        rollout.denoiser.predict_lanes,
    )
    list(rollout)
    rate, expected = 0.8, []
    for motion in (0.0, 0.086 / 0.2, 1.0, 0.0):
        rate = 0.9 * (0.8 - 0.1 * motion) + 0.1 * rate
        expected.append((int(1000 * rate) - 100,))
    assert [timesteps for lane, timesteps in told if lane == 0] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler_options": {"lanes": 3}}, "sampler_options do not fit sampler 'stream_batch'"),
        ({"first_chunk_steps": (1000,)}, "leave out first_chunk_steps"),
        ({"clean_pass": False}, "leave out first_chunk_steps, clean_pass and context_noise"),
        ({"context_noise": 20.0}, "leave out first_chunk_steps, clean_pass and context_noise"),
        ({"switch_policy": "recache"}, "use 'cross_attention' or 'blend'"),
        ({"strength": 0.2, "video": np.zeros((5, 32, 32, 3))}, "strength is 0.2; .* above 0.2"),
        ({"solver": "unipc"}, "works with solver 'renoise'"),
        ({"given_in_chunk": True}, "given_in_chunk does not work"),
        ({"sampler_options": {"restart_positions": 6}}, "restart_positions is 6.* at least 7"),
        ({"sampler_options": {"restart_positions": 50}, "position_mode": "relative"}, "position_mode 'absolute'"),
        ({"sampler_options": {"adaptive_sink": 2}}, "adaptive_sink is 2; it is a cosine"),
        ({"sampler_options": {"adaptive_sink": 0.2}, "chunk_frames": 2}, "chunk_frames=1, .* chunk_frames 2"),
        ({"sampler_options": {"adaptive_sink": 0.2, "sequential": True}}, "no 'sequential'"),
        ({"sampler_options": {"adaptive_sink": 0.2}, "position_mode": "relative"}, "position_mode 'absolute'"),
    ],
)
def test_refuses_what_it_cannot_do(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        start(pipe, **options)
