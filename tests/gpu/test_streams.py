"""Two streams that decode and denoise at once, with the delays that a forgotten wait would show at."""

import dataclasses
import time

import pytest
import torch
from saved_rollouts import assert_same, start

from wan_autoregressive.pipelines.rollout import WanRollout

OPTIONS = {
    "window": {"window_frames": 5, "sink_frames": 1},
    "other prompts": {"window_frames": 6, "prompt_schedule": {3: "a blue cross", 9: "rain"}},
    "guidance": {"window_frames": 5, "guidance_scale": 2.0, "negative_prompt": "gray"},
    "int8": {"window_frames": 5, "kv_dtype": "int8"},
    "parked": {"window_frames": 5, "park_vae_state": True},
    "on the device": {"window_frames": 5, "output_type": "pt"},
}
_CYCLES = 20_000_000
"""About 10 ms of a GPU, many times what a tiny model's work takes."""


def delay(device: torch.device) -> None:
    """Keep the current stream busy; on a CPU, which has none, the thread."""
    if device.type == "cuda":
        torch.cuda._sleep(_CYCLES)
    else:
        time.sleep(0.005)


@pytest.mark.parametrize("slow", ["make_latents", "decode_chunk"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_alongside_is_the_same_video_whoever_is_late(pipe, device, monkeypatch, options, slow):
    expected = list(start(pipe, **options))
    method = getattr(WanRollout, slow)

    def late(self, in_flight):
        delay(device)
        made = method(self, in_flight)
        delay(device)
        return made

    monkeypatch.setattr(WanRollout, slow, late)
    chunks = list(start(pipe, **options).chunks(decode_alongside=True))
    assert_same(on_the_host(chunks), on_the_host(expected))


def test_alongside_in_a_stream_of_the_callers(pipe, cuda):
    expected = list(start(pipe, **OPTIONS["on the device"]))
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        delay(cuda)
        chunks = list(start(pipe, **OPTIONS["on the device"]).chunks(decode_alongside=True))
        assert_same(on_the_host(chunks), on_the_host(expected))
    torch.cuda.current_stream(cuda).wait_stream(stream)


def test_two_rollouts_in_turns_disturb_each_other_in_no_stream(pipe, device):
    options = [OPTIONS["window"], OPTIONS["other prompts"]]
    expected = [list(start(pipe, **own)) for own in options]
    rollouts = [start(pipe, **own).chunks(decode_alongside=True) for own in options]
    for pair, wanted in zip(zip(*rollouts, strict=True), zip(*expected, strict=True), strict=True):
        assert_same(pair, wanted)


def on_the_host(chunks):
    """The same with frames that numpy can compare."""
    if not isinstance(chunks[0].frames, torch.Tensor):
        return chunks
    return [dataclasses.replace(chunk, frames=chunk.frames.cpu()) for chunk in chunks]
