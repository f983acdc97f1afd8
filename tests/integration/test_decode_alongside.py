"""Decoding alongside == one after the other, to the bit; and what may not happen to a thread that runs ahead."""

import gc
import subprocess
import sys
import threading
import time
from contextlib import closing, nullcontext

import accelerate
import numpy as np
import pytest
import torch
from peft import LoraConfig
from saved_rollouts import assert_same, generator, noise, start, state_of

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.models.streaming_vae import StreamingVaeDecoder
from wan_autoregressive.pipelines import decode_alongside
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.pipelines.samplers.chunkwise import ChunkwiseSampler

SIZE = {"height": 32, "width": 32}


def stream(pipe, alongside: bool = True, **options):
    options = {"prompt": "a red circle", **SIZE, "num_inference_steps": 2, "generator": generator(), **options}
    return pipe.stream(**options, decode_alongside=alongside)


def denoising_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("wan-denoise")]


@pytest.fixture(autouse=True)
def no_threads_left():
    yield
    gc.collect()
    assert denoising_threads() == []


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Chunks whose latents are made, in order."""
    made = []
    make = WanRollout.make_latents

    def counting(self, in_flight):
        make(self, in_flight)
        made.append(in_flight.chunk.index)

    monkeypatch.setattr(WanRollout, "make_latents", counting)
    return made


def fail_at_frame(monkeypatch, frame: int, error: BaseException) -> None:
    next_chunk = ChunkwiseSampler.next_chunk

    def failing(self, chunk):
        if chunk.start == frame:
            raise error
        return next_chunk(self, chunk)

    monkeypatch.setattr(ChunkwiseSampler, "next_chunk", failing)


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 37, "window_frames": 6, "sink_frames": 1},
        {"num_frames": 30, "chunk_frames": 2, "first_chunk_frames": 1, "output_type": "pt"},
        {"num_frames": 41, "window_frames": 6, "prompt_schedule": {3: "a blue cross", 7: "rain"}},
        {"num_frames": 25, "guidance_scale": 3.0, "negative_prompt": "gray", "window_frames": 5},
        {"num_frames": 25, "output_type": "latent"},
        {"num_frames": 33, "video_latents": noise(1, 16, 4, 4, 4)},
        {"video": np.random.default_rng(0).random((40, 32, 32, 3), np.float32), "strength": 0.6},
        {"num_frames": 1},
    ],
    ids=["window", "first chunk of 1", "prompts", "guidance", "latents", "given", "source", "one frame"],
)
def test_the_same_bits(pipe, options):
    expected = list(stream(pipe, alongside=False, **options))
    chunks = list(stream(pipe, **options))
    assert_same(chunks, expected)


def test_the_same_bits_in_one_call(pipe):
    settings = {**SIZE, "num_frames": 25, "num_inference_steps": 2}
    whole = pipe("a red circle", **settings, generator=generator())
    again = pipe("a red circle", **settings, generator=generator(), decode_alongside=True)
    assert np.array_equal(again.frames, whole.frames)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_the_callers_thread_hold_in_the_other(pipe, mode):
    with mode():
        expected = list(stream(pipe, alongside=False, num_frames=25, window_frames=4))
        chunks = list(stream(pipe, num_frames=25, window_frames=4))
    assert_same(chunks, expected)


def test_decoding_and_denoising_overlap(pipe, monkeypatch):
    """While chunk 0 is decoded, the latents of chunk 1 are made: without a second thread this waits in vain."""
    ready = {index: threading.Event() for index in range(3)}
    make, decode = WanRollout.make_latents, WanRollout.decode_chunk

    def making(self, in_flight):
        make(self, in_flight)
        ready[in_flight.chunk.index].set()

    def decoding(self, in_flight):
        assert in_flight.chunk.index == 2 or ready[in_flight.chunk.index + 1].wait(60)
        return decode(self, in_flight)

    monkeypatch.setattr(WanRollout, "make_latents", making)
    monkeypatch.setattr(WanRollout, "decode_chunk", decoding)
    assert [chunk.index for chunk in stream(pipe, num_frames=33)] == [0, 1, 2]


def test_streams_wait_for_what_they_need_and_for_nothing_else(pipe, monkeypatch):
    """On a device with streams, by stand-ins: who waits for whom, between which works."""
    log, caller = [], threading.current_thread()

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            assert threading.current_thread() is caller
            log.append(f"{self.name} waits for all of {other.name}")

        def record_event(self) -> str:
            return f"{self.name} so far"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    def record_stream(tensor, stream: Stream) -> None:
        log.append(f"{stream.name} uses {'latents' if tensor.ndim == 5 else 'embeds'}")

    entered = []
    monkeypatch.setattr(decode_alongside, "_denoising_stream", lambda device: Stream("own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("caller's"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(entered.append(stream.name)))
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    decode = WanRollout.decode_chunk
    monkeypatch.setattr(WanRollout, "decode_chunk", lambda *args: log.append("decode") or decode(*args))
    rollout = start(pipe, num_frames=21, guidance_scale=2.0)
    for chunk in rollout.chunks(decode_alongside=True):
        log.append(f"chunk {chunk.index}")
    begin = ["own waits for all of caller's", "own uses embeds", "own uses embeds"]
    finish = ["caller's waits for own so far", "caller's uses latents"]
    left = "caller's waits for all of own"
    assert log == [*begin, *finish, *begin, "decode", "chunk 0", *finish, "decode", left, "chunk 1"]
    assert entered == ["own", "own"]


def test_a_chunk_does_not_wait_for_the_next_one(pipe, monkeypatch):
    handed_out = threading.Event()
    make = WanRollout.make_latents

    def waiting(self, in_flight):
        assert self.chunks_done == 0 or handed_out.wait(60)
        make(self, in_flight)

    monkeypatch.setattr(WanRollout, "make_latents", waiting)
    chunks = stream(pipe, num_frames=21)
    next(chunks)
    assert len(denoising_threads()) == 1
    handed_out.set()
    assert next(chunks).index == 1
    assert list(chunks) == []


def test_never_more_than_one_chunk_ahead(pipe, made):
    with closing(stream(pipe, window_frames=4)) as chunks:
        for index in range(4):
            assert next(chunks).index == index
            deadline = time.monotonic() + 60
            while len(made) < index + 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)  # would be enough for further ones
            assert made == list(range(index + 2))


def test_two_streams_side_by_side(tiny_checkpoint, monkeypatch):
    """With LoRA scales, which are set on the layers that both streams use: only one may denoise at a time."""
    active, most, make = [], [], WanRollout.make_latents

    def counting(self, in_flight):
        active.append(in_flight)
        most.append(len(active))
        time.sleep(0.2)  # longer than decoding, so that without turns both would be at it
        make(self, in_flight)
        active.remove(in_flight)

    pipe = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    options = [
        {"num_frames": 33, "window_frames": 4, "generator": generator(i), "attention_kwargs": {"scale": 0.4 + i}}
        for i in range(2)
    ]
    alone = [list(stream(pipe, alongside=False, **{**o, "generator": generator(i)})) for i, o in enumerate(options)]
    monkeypatch.setattr(WanRollout, "make_latents", counting)
    together = list(zip(*(stream(pipe, **o) for o in options), strict=True))
    for chunks, expected in zip(zip(*together, strict=True), alone, strict=True):
        assert_same(chunks, expected)
    assert max(most) == 1


def test_an_error_in_denoising_comes_after_the_chunks_before_it(pipe, monkeypatch):
    error = ZeroDivisionError("the card caught fire")
    fail_at_frame(monkeypatch, 6, error)
    chunks = stream(pipe, num_frames=45)
    assert [next(chunks).index, next(chunks).index] == [0, 1]
    with pytest.raises(ZeroDivisionError) as caught:
        next(chunks)
    assert caught.value is error
    assert list(chunks) == []


def test_an_error_in_decoding_comes_after_the_chunks_before_it(pipe, monkeypatch, made):
    error, decode = ZeroDivisionError("the card caught fire"), StreamingVaeDecoder.decode

    def failing(self, latents):
        if self.latent_frames_done == 6:
            raise error
        return decode(self, latents)

    monkeypatch.setattr(StreamingVaeDecoder, "decode", failing)
    rollout = start(pipe)
    chunks = rollout.chunks(decode_alongside=True)
    assert [next(chunks).index, next(chunks).index] == [0, 1]
    with pytest.raises(ZeroDivisionError) as caught:
        next(chunks)
    assert caught.value is error
    assert len(made) <= 4
    with pytest.raises(RuntimeError, match="a step of it failed"):
        rollout.step()
    monkeypatch.undo()
    rollout.reset()
    rollout.noise.generator.manual_seed(0)
    assert_same(list(rollout.chunks(decode_alongside=True)), list(start(pipe)))


def test_latents_that_are_no_numbers(pipe, monkeypatch):
    def poison(rollout, block, step, timestep, latents):
        return latents * float("nan") if block.index == 1 else latents

    chunks = stream(pipe, num_frames=45, on_step_end=poison)
    assert next(chunks).index == 0
    with pytest.raises(RuntimeError, match="the latents of chunk 1"):
        next(chunks)


@pytest.mark.parametrize("ending", ["close", "drop", "exception", "interrupt in the thread"])
def test_an_iterator_that_is_left_stops_within_a_step(pipe, monkeypatch, ending):
    steps = []
    in_second = threading.Event()

    def watch(rollout, block, step, timestep, latents):
        steps.append(step)
        if block.index == 1 and ending == "interrupt in the thread":
            raise KeyboardInterrupt
        if block.index == 1:
            in_second.set()
            deadline = time.monotonic() + 60
            while not rollout.interrupted and time.monotonic() < deadline:
                time.sleep(0.001)
        return latents

    rollout = start(pipe, num_inference_steps=4, on_step_end=watch)
    chunks = rollout.chunks(decode_alongside=True)
    assert next(chunks).index == 0
    if ending == "interrupt in the thread":
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
        return
    assert in_second.wait(60)
    if ending == "close":
        chunks.close()
    elif ending == "drop":
        del chunks
    else:
        with pytest.raises(KeyboardInterrupt):
            chunks.throw(KeyboardInterrupt)
    assert steps == [0, 1, 2, 3, 4]
    assert denoising_threads() == []
    with pytest.raises(RuntimeError, match="an iterator that ran ahead was closed"):
        rollout.step()


def test_an_iterator_may_be_collected_in_the_other_thread(pipe):
    """It cannot wait for itself there; that must neither hang nor be reported."""
    reports, dropped = [], threading.Event()

    def collect(rollout, block, step, timestep, latents):
        if block.index == 1:
            assert dropped.wait(60)
            gc.collect()
        return latents

    circle = {"chunks": start(pipe, on_step_end=collect).chunks(decode_alongside=True)}
    circle["circle"] = circle
    next(circle["chunks"])
    (thread,) = denoising_threads()
    hook, sys.unraisablehook = sys.unraisablehook, reports.append
    gc.disable()
    try:
        del circle
        dropped.set()
        thread.join(60)
    finally:
        gc.enable()
        sys.unraisablehook = hook
    assert not thread.is_alive()
    assert reports == []


@pytest.mark.slow
def test_a_program_may_end_with_an_open_iterator(tiny_checkpoint):
    code = (
        "import sys, torch; from wan_autoregressive import WanAutoregressivePipeline\n"
        "pipe = WanAutoregressivePipeline.from_pretrained(sys.argv[1])\n"
        "chunks = pipe.stream('x', height=32, width=32, window_frames=4, decode_alongside=True)\n"
        "next(chunks); keep = [chunks]; keep.append(keep)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint)], check=True, timeout=120)


def test_while_it_runs_ahead_the_rollout_is_left_alone(pipe, tmp_path):
    rollout = start(pipe)
    chunks = rollout.chunks(decode_alongside=True)
    assert state_of(rollout) == state_of(start(pipe)), "nothing is done before the first chunk is asked for"
    next(chunks)
    actions = {"save": lambda: rollout.save(tmp_path), "fork": rollout.fork, "reset": rollout.reset}
    for verb, action in {**actions, "step": rollout.step}.items():
        with pytest.raises(
            RuntimeError,
            match=f"cannot {verb} this rollout while it is in use; .* decodes alongside may still be open",
        ):
            action()
    assert_same(list(chunks), list(start(pipe))[1:])


def test_stopped_it_can_be_saved_and_go_on(pipe, tmp_path):
    expected = list(start(pipe, window_frames=5))
    rollout = start(pipe, window_frames=5)
    chunks = list(rollout.chunks(decode_alongside=True, stop=lambda: rollout.chunks_done >= 2))
    rollout.save(tmp_path)
    by_hand = start(pipe, window_frames=5)
    by_hand.step(), by_hand.step()
    assert state_of(rollout) == state_of(by_hand)
    chunks += rollout.chunks(stop=lambda: True)
    chunks += rollout.chunks(decode_alongside=True)
    assert_same(chunks, expected)
    assert_same(list(pipe.resume(tmp_path).chunks(decode_alongside=True)), expected[2:])


def test_a_prompt_shows_two_chunks_after_the_one_it_follows(pipe, made):
    rollout = start(pipe, num_frames=61, window_frames=6)
    chunks = []
    for chunk in rollout.chunks(decode_alongside=True):
        chunks.append(chunk)
        if chunk.index == 1:
            rollout.set_prompt("rain")
    by_hand = start(pipe, num_frames=61, window_frames=6)
    expected = [by_hand.step("rain" if index == 3 else None) for index in range(len(chunks))]
    assert_same(chunks, expected)
    assert chunks[3].timings.text_s > 0


def test_interrupt_lets_one_more_chunk_come(pipe):
    rollout = start(pipe, num_frames=None, window_frames=4)
    seen = []
    for chunk in rollout.chunks(decode_alongside=True):
        seen.append(chunk.index)
        if chunk.index == 2:
            rollout.interrupt()
    assert seen == [0, 1, 2, 3]
    assert rollout.done


def test_timings_and_progress(pipe):
    rollout, steps = start(pipe, num_frames=21), []
    rollout.on_progress = lambda: steps.append(1)
    first, second = rollout.chunks(decode_alongside=True)
    assert len(steps) == 4
    assert first.timings.text_s > 0
    assert min(second.timings.clean_pass_s, second.timings.denoise_s, second.timings.decode_s) > 0


def test_a_callback_is_called_in_the_callers_thread(pipe):
    threads = set()

    def callback(pipeline, step, timestep, tensors):
        threads.add(threading.current_thread())
        return tensors

    pipe("x", **SIZE, num_frames=9, callback_on_step_end=callback, decode_alongside=True)
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize("offload", ["model", "sequential", "group", "group of the VAE"])
def test_offloaded_models_are_refused_before_any_runs(tiny_checkpoint, offload, monkeypatch):
    hooked = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint)
    monkeypatch.setattr(WanRollout, "make_latents", None)
    if offload == "model":
        hooked.enable_model_cpu_offload(device="cpu")
    elif offload == "sequential":
        accelerate.cpu_offload(hooked.transformer, torch.device("cpu"), offload_buffers=True)
    else:
        model = hooked.vae if "VAE" in offload else hooked.transformer
        model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    name = "vae" if "VAE" in offload else "transformer"
    for call in (hooked, hooked.stream):
        with pytest.raises(ValueError, match=f"the {name} is offloaded between its uses; leave decode_alongside out"):
            call("x", **SIZE, num_frames=5, decode_alongside=True)
    with pytest.raises(ValueError, match="is offloaded"):
        hooked.rollout(prompt_embeds=torch.zeros(1, 8, 32), **SIZE).chunks(decode_alongside=True)
