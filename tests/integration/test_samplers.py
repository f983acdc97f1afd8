"""What holds for every way to sample: streamed == whole, resumed == uninterrupted, each rollout on its own."""

import pytest
import torch
from naive_video import randn
from saved_rollouts import assert_same, generator, state_of

from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel

SIZE = {"height": 32, "width": 32, "num_frames": 53, "chunk_frames": 2, "output_type": "latent"}  # 7 chunks
ROLLING = {**SIZE, "sampler": "rolling", "window_frames": 9, "sink_frames": 2, "position_mode": "sink_relative"}
MEMORY_BANK = {**SIZE, "sampler": "memory_bank", "window_frames": 5, "sink_frames": 1, "memory_bank_frames": 2}
RECOMPUTE = {**SIZE, "sampler": "recompute", "window_frames": 5, "switch_policy": "blend", "blend_chunks": 3}
STREAM_BATCH = {**SIZE, "sampler": "stream_batch", "switch_policy": "cross_attention"}
SAMPLERS = {
    "chunkwise": {**SIZE, "window_frames": 5},
    "rolling": {**ROLLING, "sampler_options": {"attended_frames": 8}},
    "rolling as the original draws": {
        **ROLLING,
        "sampler_options": {"attended_frames": 8, "reference_draws": True},
    },
    "memory_bank": {**MEMORY_BANK, "sampler_options": {"bank_interval": 2}},
    "memory_bank, a candidate now and then": {
        **MEMORY_BANK,
        "sampler_options": {"bank_interval": 2, "bank_candidates": "every_interval"},
    },
    "recompute": {**RECOMPUTE, "denoising_steps": (1000, 500, 0)},
    "recompute, first frame kept": {**RECOMPUTE, "sampler_options": {"keep_first_frame": True}},
    "stream_batch": {**STREAM_BATCH, "window_frames": 5},
    "stream_batch, no window": STREAM_BATCH,
    "stream_batch, moved sink": {
        **STREAM_BATCH,
        "window_frames": 5,
        "sink_frames": 1,
        "position_mode": "sink_relative",
    },
    "stream_batch, adaptive sink": {
        **STREAM_BATCH,
        **{"num_frames": 41, "chunk_frames": 1, "first_chunk_frames": 2, "window_frames": 5, "sink_frames": 3},
        "sampler_options": {"adaptive_sink": 0.9},
    },
    "stream_batch, no lanes": {**STREAM_BATCH, "window_frames": 5, "sampler_options": {"sequential": True}},
}

SLOW = (
    *("rolling as the original draws", "memory_bank, a candidate now and then"),
    *("stream_batch, no window", "stream_batch, moved sink", "stream_batch, no lanes"),
)

each_sampler = pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, settings in SAMPLERS.items()
    ],
)


def start(pipe, settings, **options):
    return pipe.rollout("a red circle", **{**settings, "generator": generator(), **options})


@each_sampler
def test_a_stream_equals_a_call_with_and_without_pixels(pipe, settings):
    latents = [chunk.latents for chunk in start(pipe, settings, output_type="np")]
    whole = pipe("a red circle", **settings, generator=generator()).frames
    assert torch.equal(torch.cat(latents, dim=2), whole)


@each_sampler
@pytest.mark.parametrize(("done", "output_type"), [(1, "latent"), (4, "np"), (6, "latent")])
def test_resumed_and_forked_rollouts_go_on_as_one_that_was_not(pipe, tmp_path, settings, done, output_type):
    """With a prompt that changes after the second chunk."""

    def chunks_of(rollout):
        rollout.set_prompt("a blue cross")
        return list(rollout)

    settings = {**settings, "output_type": output_type}
    whole = start(pipe, settings)
    expected = [whole.step() for _ in range(done)] + chunks_of(whole)
    rollout = start(pipe, settings)
    for _ in range(done):
        rollout.step()
    rollout.save(tmp_path)
    before, twin = state_of(rollout), rollout.fork()
    assert_same(chunks_of(twin), expected[done:])
    assert state_of(rollout) == before
    assert_same(chunks_of(pipe.resume(tmp_path)), expected[done:])
    assert_same(chunks_of(rollout), expected[done:])


@each_sampler
def test_resumed_while_a_prompt_change_is_under_way(pipe, tmp_path, settings):
    rollout = start(pipe, settings)
    rollout.step()
    rollout.step(prompt="a blue cross")
    rollout.save(tmp_path)
    expected = list(rollout)
    assert_same(list(pipe.resume(tmp_path)), expected)


@each_sampler
def test_interleaved_rollouts_equal_each_alone(pipe, settings):
    prompts = ("a red circle", ["one", "two"])
    alone = [list(pipe.rollout(prompt, **settings, generator=generator())) for prompt in prompts]
    together = zip(*(pipe.rollout(prompt, **settings, generator=generator()) for prompt in prompts), strict=True)
    for both, expected in zip(together, zip(*alone, strict=True), strict=True):
        assert_same(both, expected)


@each_sampler
def test_a_reset_starts_anew(pipe, settings):
    rollout = start(pipe, settings)
    for _ in range(3):
        rollout.step()
    rollout.reset()
    rollout.noise.generator.manual_seed(0)
    assert_same(list(rollout), list(start(pipe, settings)))


@each_sampler
@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, 0),
        ({"num_frames": 9}, 0),
        ({"guidance_scale": 2.0}, 0),
        ({"first_chunk_frames": 1}, 0),
        ({}, 3),
    ],
)
def test_forwards_and_steps_are_counted_before(pipe, monkeypatch, settings, options, given):
    calls, steps = [], []
    forward = CausalWanTransformer3DModel.forward
    monkeypatch.setattr(
        CausalWanTransformer3DModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    settings = {**settings, **options}
    latents = randn(1, 16, given, 4, 4) if given else None
    rollout = start(pipe, settings, video_latents=latents, output_type="latent")
    rollout.on_progress = lambda: steps.append(1)
    expected = pipe.estimate(given, **settings)
    assert len(list(rollout)) == expected.chunks
    assert len(calls) == expected.forwards
    assert len(steps) == rollout.num_steps


@each_sampler
def test_bytes_are_those_of_what_is_held(pipe, settings):
    rollout = start(pipe, settings, output_type="latent")
    rollout.step()
    without = rollout.nbytes - rollout.sampler.nbytes
    tensors = state_of(rollout)["tensors"]
    held = sum(len(data) for name, data in tensors.items() if name.startswith("sampler."))
    assert rollout.sampler.nbytes == held
    assert without > 0
