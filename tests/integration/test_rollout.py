"""Rollouts: stream == call, interleaved == alone, chunk by chunk == whole, and what a step may not do."""

import gc
import itertools
import threading
import weakref

import numpy as np
import pytest
import torch

from wan_autoregressive import WanKVCache
from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel

SIZE = {"height": 32, "width": 32}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frames_of(chunks) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in chunks], axis=1)


@pytest.fixture
def count_forwards(monkeypatch):
    """Forwards of the transformer as (frame_offset, frames, timestep, mode)."""
    calls, offsets = [], []
    forward, plan_forward = CausalWanTransformer3DModel.forward, CausalWanTransformer3DModel.plan_forward

    def planning(self, *args, frame_offset, **kwargs):
        offsets.append(frame_offset)
        return plan_forward(self, *args, frame_offset=frame_offset, **kwargs)

    def counting(self, hidden_states, timestep, *args, **kwargs):
        mode = kwargs["attention_kwargs"]["kv_cache"]._mode
        calls.append((offsets[-1], hidden_states.shape[2], float(timestep[0, 0]), mode))
        return forward(self, hidden_states, timestep, *args, **kwargs)

    monkeypatch.setattr(CausalWanTransformer3DModel, "plan_forward", planning)
    monkeypatch.setattr(CausalWanTransformer3DModel, "forward", counting)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 17},
        {"num_frames": 18, "chunk_frames": 2, "first_chunk_frames": 1},
        {"num_frames": 29, "window_frames": 5, "sink_frames": 2},
        {"num_frames": 13, "guidance_scale": 3.0, "negative_prompt": "gray"},
        {"num_frames": 1},
    ],
)
def test_stream_equals_call(pipe, options):
    arguments = {"prompt": "a red circle", **SIZE, **options}
    whole = pipe(**arguments, generator=generator()).frames
    chunks = list(pipe.stream(**arguments, generator=generator()))
    assert whole.shape == (1, options["num_frames"], 32, 32, 3)
    assert np.array_equal(frames_of(chunks), whole)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.start_frame for chunk in chunks] == [
        0,
        *itertools.accumulate(chunk.latents.shape[2] for chunk in chunks[:-1]),
    ]
    assert [chunk.start_pixel_frame for chunk in chunks] == [
        0,
        *itertools.accumulate(chunk.frames.shape[1] for chunk in chunks[:-1]),
    ]


def test_frames_equal_one_decode_of_all_latents(pipe):
    arguments = {"prompt": "a red circle", **SIZE, "num_frames": 17}
    latents = pipe(**arguments, generator=generator(), output_type="latent").frames
    frames = pipe(**arguments, generator=generator(), output_type="np").frames
    assert np.array_equal(pipe.decode_latents(latents, "np"), frames)


def test_a_negative_prompt_may_be_embeddings(pipe):
    options = {"prompt": "a red circle", **SIZE, "num_frames": 9, "guidance_scale": 3.0, "output_type": "latent"}
    embeds = pipe.wan_components().encode_prompt("gray", batch_size=1).embeds
    expected = pipe(**options, negative_prompt="gray", generator=generator()).frames
    assert torch.equal(pipe(**options, negative_prompt_embeds=embeds, generator=generator()).frames, expected)


def test_interleaved_rollouts_equal_each_alone(pipe):
    options = [
        {"prompt": "a red circle", **SIZE, "num_frames": 25, "window_frames": 6},
        {"prompt": ["one", "two"], "height": 16, "width": 32, "num_frames": 21, "guidance_scale": 2.0},
        {"prompt": "a blue cross", **SIZE, "num_frames": 25, "window_frames": 6},
    ]
    alone = [list(pipe.stream(**o, generator=generator(i))) for i, o in enumerate(options)]
    together = itertools.zip_longest(*(pipe.stream(**o, generator=generator(i)) for i, o in enumerate(options)))
    for i, chunks in enumerate(zip(*together, strict=True)):
        chunks = [chunk for chunk in chunks if chunk is not None]
        assert len(chunks) == len(alone[i])
        for chunk, expected in zip(chunks, alone[i], strict=True):
            assert torch.equal(chunk.latents, expected.latents)
            assert np.array_equal(chunk.frames, expected.frames)


def test_noise_is_drawn_per_chunk_and_step(pipe):
    """The documented order: the same draws by hand, given as `latents` and through the generator, agree."""
    draws = generator(7)
    initial, channels = [], pipe.transformer.config.in_channels
    for _ in range(2):  # chunks
        initial.append(torch.randn(1, channels, 3, 4, 4, generator=draws))
        for _ in range(3):  # re-noise
            torch.randn(1, channels, 3, 4, 4, generator=draws)
    rollout = pipe.rollout("a red circle", **SIZE, num_frames=21, generator=generator(7), output_type="latent")
    for expected in initial:
        chunk = rollout.grid.chunk(rollout.chunks_done, rollout.frames_done)
        assert torch.equal(rollout.noise.fork().initial(chunk.start, chunk.num_frames), expected)
        rollout.step()


def test_generator_lists_make_videos_independent_of_their_batch(pipe):
    prompts = ["a red circle", "a blue cross"]
    both = pipe(prompts, **SIZE, num_frames=21, generator=[generator(1), generator(2)], output_type="latent").frames
    for i, seed in enumerate((1, 2)):
        alone = pipe(prompts[i], **SIZE, num_frames=21, generator=[generator(seed)], output_type="latent").frames
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-5)


def test_forwards_of_a_chunk(pipe, count_forwards):
    pipe("x", **SIZE, num_frames=25, chunk_frames=3, output_type="latent", context_noise=7)
    timesteps = pipe.scheduler.timesteps.tolist()
    expected = []
    for start, frames in ((0, 3), (3, 3), (6, 1)):
        expected += [(start, frames, t, "append" if i == 0 else "overwrite") for i, t in enumerate(timesteps)]
        expected.append((start, frames, 7.0, "overwrite"))
    # Nothing follows the last chunk, so its clean pass is not made.
    assert count_forwards == expected[:-1]


def test_without_a_clean_pass_the_last_steps_keys_and_values_stay(pipe, count_forwards):
    options = {**SIZE, "num_frames": 25, "output_type": "latent"}
    rollout = pipe.rollout("x", **options, clean_pass=False, generator=generator())
    rollout.step()
    left = rollout.cache.block_caches[-1].cached_key.clone()
    count_forwards.clear()
    rollout.step()
    assert [mode for _, _, _, mode in count_forwards] == ["append"] + ["overwrite"] * 3
    assert torch.equal(rollout.cache.block_caches[-1].cached_key[:, : left.shape[1]], left)
    with_pass = pipe.rollout("x", **options, generator=generator())
    chunks = list(with_pass)
    assert torch.equal(chunks[0].latents, rollout.history.last(6)[:, :, :3])
    assert not torch.equal(chunks[1].latents, rollout.history.last(3))


def test_the_plan_counts_what_is_done(pipe, count_forwards):
    for options in (
        {"num_frames": 25},
        {"num_frames": 25, "guidance_scale": 2.0},
        {"num_frames": 25, "clean_pass": False},
        {"num_frames": 30, "window_frames": 4, "sink_frames": 1},
        {"num_frames": 30, "window_frames": 4, "sink_frames": 1, "position_mode": "sink_relative", "kv_dtype": "int8"},
    ):
        count_forwards.clear()
        plan = pipe.plan(**SIZE, **options)
        rollout = pipe.rollout("x", **SIZE, **options, generator=generator())
        chunks = list(rollout)
        assert plan.chunks == len(chunks)
        assert plan.latent_frames == rollout.frames_done
        assert plan.forwards == len(count_forwards)
        assert plan.kv_cache_bytes == rollout.denoiser.kv_cache_bytes
        assert plan.text_kv_bytes == rollout.conditions.text_kv_bytes > 0
        assert plan.vae_state_bytes == rollout.vae_decoder.state_bytes


@pytest.mark.slow
def test_without_end_memory_is_flat(pipe):
    options = {"window_frames": 4, "sink_frames": 1, "chunk_frames": 1, "position_mode": "sink_relative"}
    rollout = pipe.rollout("x", height=16, width=16, **options, num_inference_steps=1)
    held = []
    for _ in range(300):
        rollout.step()
        held.append((rollout.cache.allocated_bytes, rollout.vae_decoder.state_bytes, rollout.history.nbytes))
    assert not rollout.done
    assert set(held[19:]) == {held[-1]}


def test_a_stream_without_end_goes_on_until_the_caller_stops(pipe):
    stream = pipe.stream("x", **SIZE, window_frames=4, generator=generator())
    chunks = list(itertools.islice(stream, 4))
    stream.close()
    expected = pipe("x", **SIZE, window_frames=4, num_frames=45, generator=generator()).frames
    assert np.array_equal(frames_of(chunks), expected)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("position_mode", ["absolute", "relative", "sink_relative"])
def test_steps_in_and_out_of_inference_mode_go_together(pipe, position_mode, kv_dtype):
    """What a step leaves behind in that mode can be written outside of it, and the other way round."""
    options = {**SIZE, "num_frames": 45, "chunk_frames": 2, "window_frames": 5, "sink_frames": 1}
    options |= {"position_mode": position_mode, "kv_dtype": kv_dtype}
    expected = list(pipe.rollout("a red circle", **options, generator=generator()))
    rollout, chunks = pipe.rollout("a red circle", **options, generator=generator()), []
    while not rollout.done:
        with torch.inference_mode(rollout.chunks_done % 2 == 0):
            chunks.append(rollout.step())
    assert np.array_equal(frames_of(chunks), frames_of(expected))


def test_reset_makes_the_same_video_again(pipe):
    rollout = pipe.rollout("a red circle", **SIZE, num_frames=21, window_frames=4, generator=generator(3))
    first = list(rollout)
    assert rollout.done
    with pytest.raises(RuntimeError, match="the video is complete with 6 latent frames"):
        rollout.step()
    rollout.reset()
    rollout.noise.generator.manual_seed(3)
    for chunk, expected in zip(rollout, first, strict=True):
        assert np.array_equal(chunk.frames, expected.frames)


def test_reset_keeps_the_current_prompt(pipe):
    rollout = pipe.rollout("a red circle", **SIZE, num_frames=21, generator=generator(3))
    rollout.step()
    assert rollout.step(prompt="a blue cross").prompt == ["a blue cross"]
    rollout.reset()
    rollout.noise.generator.manual_seed(3)
    again = list(rollout)
    expected = list(pipe.stream("a blue cross", **SIZE, num_frames=21, generator=generator(3)))
    for chunk, other in zip(again, expected, strict=True):
        assert torch.equal(chunk.latents, other.latents)


@pytest.mark.parametrize("policy", ["recache", "cross_attention"])
def test_a_prompt_switch_leaves_earlier_chunks_alone(pipe, policy):
    arguments = {**SIZE, "num_frames": 41, "window_frames": 6, "sink_frames": 1, "switch_policy": policy}
    plain = list(pipe.stream("a red circle", **arguments, generator=generator()))
    switched = list(
        pipe.stream("a red circle", **arguments, prompt_schedule={4: "a blue cross"}, generator=generator())
    )
    by_hand = pipe.rollout("a red circle", **arguments, generator=generator())
    stepped = [by_hand.step(prompt="a blue cross" if i == 2 else None) for i in range(4)]
    for i in range(4):
        # The switch at frame 4 takes effect at the next boundary, frame 6, chunk 2.
        assert torch.equal(switched[i].latents, plain[i].latents) == (i < 2)
        assert torch.equal(switched[i].latents, stepped[i].latents)
        assert switched[i].prompt == (["a red circle"] if i < 2 else ["a blue cross"])


def test_recache_equals_a_cache_that_always_had_the_new_prompt(pipe):
    """After a re-cache in one pass, K/V of the window are those of the new prompt and nothing of the old one."""
    arguments = {**SIZE, "num_frames": 45, "window_frames": 6, "output_type": "latent"}
    switched = pipe.rollout("a red circle", **arguments, generator=generator())
    for _ in range(3):
        switched.step()
    latents = switched.history.last(6)
    switched.step(prompt="a blue cross")

    blue = pipe.wan_components().encode_prompt("a blue cross", 1).embeds
    cache = WanKVCache(len(pipe.transformer.blocks))
    with torch.no_grad():
        pipe.transformer(
            latents,
            torch.zeros(1, 6),
            blue,
            frame_offset=3,
            attention_kwargs={"kv_cache": cache},
        )
    expected, got = cache.block_caches[-1].cached_key, switched.cache.block_caches[-1].cached_key
    tokens = expected.shape[1] // 6
    torch.testing.assert_close(got[:, : 3 * tokens], expected[:, 3 * tokens :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sink", ["keep", "refresh"])
def test_a_recache_keeps_or_refreshes_the_sink(pipe, sink):
    """Refreshed, the window's oldest frames are the new sink and stay; kept, the sink is still the first frames'."""
    options = {**SIZE, "window_frames": 6, "sink_frames": 2, "recache_sink": sink, "chunk_frames": 2}
    rollout = pipe.rollout("a red circle", **options, generator=generator(), output_type="latent")
    for _ in range(5):
        rollout.step()
    frames = 2 * rollout.components.tokens_per_frame(rollout.config)
    old_sink = rollout.cache.block_caches[-1].cached_key[:, :frames].clone()
    latents = rollout.history.last(6)  # frames 4 to 9
    rollout.step(prompt="a blue cross")

    blue = pipe.wan_components().encode_prompt("a blue cross", 1).embeds
    cache = WanKVCache(len(pipe.transformer.blocks))
    with torch.no_grad():
        pipe.transformer(latents, torch.zeros(1, 6), blue, frame_offset=4, attention_kwargs={"kv_cache": cache})
    refreshed = cache.block_caches[-1].cached_key[:, :frames]
    for _ in range(3):
        got = rollout.cache.block_caches[-1].cached_key[:, :frames]
        expected = old_sink if sink == "keep" else refreshed
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        rollout.step()


def test_given_latents_come_first(pipe, count_forwards):
    given = torch.randn(1, 16, 4, 4, 4, generator=generator(5))
    chunks = list(pipe.stream("x", **SIZE, num_frames=33, video_latents=given, generator=generator()))
    assert [(chunk.start_frame, chunk.latents.shape[2], chunk.given) for chunk in chunks] == [
        (0, 3, True),
        (3, 1, True),
        (4, 2, False),
        (6, 3, False),
    ]
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks if chunk.given], dim=2), given)
    assert count_forwards[:2] == [(0, 3, 0.0, "append"), (3, 1, 0.0, "append")]
    assert frames_of(chunks).shape[1] == 33


def test_given_frames_may_be_longer_than_the_window(pipe):
    """Two videos at once; the cache rolls while the given frames are written, as if they had been generated."""
    given = torch.randn(2, 16, 10, 4, 4, generator=generator(5))
    options = {"window_frames": 6, "sink_frames": 1, "output_type": "latent"}
    rollout = pipe.rollout(
        ["one", "two"], **SIZE, num_frames=49, video_latents=given, generator=generator(), **options
    )
    chunks = list(rollout)
    assert [(chunk.start_frame, chunk.given) for chunk in chunks] == [
        *((0, True), (3, True), (6, True), (9, True)),
        *((10, False), (12, False)),
    ]
    for i, prompt in enumerate(("one", "two")):
        cache = WanKVCache(len(pipe.transformer.blocks), rollout.cache.window_size, rollout.cache.sink_size)
        embeds = pipe.wan_components().encode_prompt(prompt, 1).embeds
        for start, stop in ((0, 3), (3, 6), (6, 9), (9, 10)):
            with torch.no_grad():
                pipe.transformer(
                    given[i : i + 1, :, start:stop],
                    torch.zeros(1),
                    embeds,
                    frame_offset=start,
                    attention_kwargs={"kv_cache": cache},
                )
        # Frames 8 and 9 are still in the window at the end, before the generated ones.
        per_frame = rollout.components.tokens_per_frame(rollout.config)
        got = rollout.cache.block_caches[-1].cached_key[i : i + 1, per_frame : 2 * per_frame]
        expected = cache.block_caches[-1].cached_key[:, -2 * per_frame : -per_frame]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_starts_from_an_image_and_from_a_clip(pipe):
    clip = np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)
    from_image = list(
        pipe.stream("x", **SIZE, num_frames=17, image=clip[0], first_chunk_frames=1, generator=generator())
    )
    assert [chunk.given for chunk in from_image] == [True, False, False]
    from_clip = list(pipe.stream("x", **SIZE, num_frames=25, video=clip, generator=generator()))
    assert sum(chunk.latents.shape[2] for chunk in from_clip if chunk.given) == 3  # 9 of 10 frames, 1 + 4 + 4
    encoded = pipe.encode_video(clip[:9], 32, 32)
    assert torch.equal(from_clip[0].latents, encoded)
    batch = pipe.encode_video(np.stack([clip, clip[::-1]]), 32, 32, batch_size=2)
    torch.testing.assert_close(batch[:1], encoded, rtol=0, atol=1e-5)


def test_a_step_that_fails_says_so_and_stays_failed(pipe, monkeypatch):
    rollout = pipe.rollout("x", **SIZE, num_frames=21)
    rollout.step()
    monkeypatch.setattr(rollout.schedulers[1], "step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout.step()
    with pytest.raises(RuntimeError, match="a step of it failed"):
        rollout.step()
    monkeypatch.undo()
    rollout.reset()
    assert len(list(rollout)) == 2


def test_two_threads_in_one_rollout_are_refused(pipe):
    entered, release = threading.Event(), threading.Event()

    def wait(rollout, block, step, timestep, latents):
        entered.set()
        release.wait(10)
        return latents

    rollout = pipe.rollout("x", **SIZE, num_frames=9, on_step_end=wait)
    thread = threading.Thread(target=rollout.step)
    thread.start()
    entered.wait(10)
    try:
        with pytest.raises(RuntimeError, match="while it is in use"):
            rollout.step()
    finally:
        release.set()
        thread.join()
    assert rollout.done


def test_timings_and_progress(pipe):
    rollout = pipe.rollout("x", **SIZE, num_frames=21)
    steps = []
    rollout.on_progress = lambda: steps.append(1)
    first, second = rollout.step(), rollout.step()
    assert len(steps) == 8
    assert first.timings.text_s > 0
    assert first.timings.clean_pass_s < first.timings.denoise_s
    assert min(second.timings.clean_pass_s, second.timings.denoise_s, second.timings.decode_s) > 0
    assert second.timings.text_s == second.timings.encode_s == 0
    assert set(second.timings.as_dict()) == {"text_s", "encode_s", "denoise_s", "clean_pass_s", "decode_s"}


def held_frames(rollout) -> int:
    return rollout.cache.num_tokens // rollout.components.tokens_per_frame(rollout.config)


def newest_jump(rollout) -> int:
    """Frames that the newest chunk has been moved away from the past, or with absolute positions the whole video."""
    positions = rollout.cache.positions
    return positions.newest_jump if rollout.cache.position_mode == "relative" else positions.shift


@pytest.mark.parametrize("position_mode", ["absolute", "relative"])
@pytest.mark.parametrize(("policy", "jump"), [("flush", 0), ("cut", 42)])
def test_flush_and_cut_keep_the_sink_and_the_newest_frames(pipe, count_forwards, policy, jump, position_mode):
    rollout = pipe.rollout(
        "a red circle",
        **SIZE,
        window_frames=9,
        sink_frames=1,
        switch_policy=policy,
        position_mode=position_mode,
        generator=generator(),
    )
    for _ in range(4):
        rollout.step()
    assert held_frames(rollout) == 9
    rollout.step(prompt="a blue cross")
    assert held_frames(rollout) == 1 + 2 + 3
    absolute_jump = jump if position_mode == "absolute" else 0
    assert newest_jump(rollout) == jump
    assert count_forwards[-1][0] == 12
    rollout.step()
    assert held_frames(rollout) == 9
    assert newest_jump(rollout) == absolute_jump
    assert count_forwards[-1][0] == 15


def test_a_blend_moves_the_embeddings_over_some_chunks(pipe):
    rollout = pipe.rollout("a red circle", **SIZE, window_frames=6, switch_policy="blend", blend_chunks=4)
    old = rollout.prompt.embeds
    new = pipe.wan_components().encode_prompt("a blue cross", 1).embeds
    rollout.step()
    rollout.set_prompt("a blue cross")
    for weight in (0.25, 0.5, 0.75, 1.0, 1.0):
        rollout.step()
        torch.testing.assert_close(rollout.prompt.embeds, old + weight * (new - old), rtol=0, atol=1e-6)
    assert torch.equal(rollout.prompt.embeds, new)


def test_the_first_chunk_may_have_steps_of_its_own(pipe, count_forwards):
    options = {**SIZE, "num_frames": 21, "first_chunk_steps": (1000, 500), "denoising_steps": (1000,)}
    pipe("x", **options, output_type="latent")
    shapes = [(start, mode) for start, _, _, mode in count_forwards]
    assert shapes == [(0, "append"), (0, "overwrite"), (0, "overwrite"), (3, "append")]
    assert pipe.plan(**options).forwards == 4
    assert pipe.num_timesteps == 3


def test_past_the_trained_length_a_window_is_suggested(pipe, caplog):
    options = {"height": 16, "width": 16, "num_frames": 121, "num_inference_steps": 1, "output_type": "latent"}
    pipe("x", **options, window_frames=9)
    assert "set window_frames" not in caplog.text
    pipe("x", **options)
    assert caplog.text.count("set window_frames") == 1


@pytest.mark.parametrize("sampler", ["chunkwise", "rolling"])
def test_what_nobody_holds_is_freed_at_once(pipe, sampler):
    """A circle of references would keep keys and values until Python collects garbage, whatever a GPU has left."""
    options = {**SIZE, "num_frames": 13, "num_inference_steps": 2, "sampler": sampler, "window_frames": 6}
    gc.collect()
    gc.disable()
    try:
        rollout = pipe.rollout("x", **options)
        rollout.step()
        fork = rollout.fork()
        fork.step()
        caches = [weakref.ref(one.cache) for one in (rollout, fork)]
        del rollout, fork
        assert [cache() for cache in caches] == [None, None]
    finally:
        gc.enable()
