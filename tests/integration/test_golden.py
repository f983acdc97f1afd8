"""Parity with the original Self-Forcing and LongLive: latents, every x0, keys and values."""

import pytest
import torch
from golden import CASES, golden_transformer, load_case

from wan_autoregressive import SelfForcingScheduler, WanAutoregressivePipeline, WanKVCache
from wan_autoregressive.schedulers import self_forcing_scheduler

TOLERANCE = {torch.float32: 1e-4, torch.float64: 2e-5}


def as_set_of_frames(tokens: torch.Tensor, tokens_per_frame: int) -> torch.Tensor:
    """`(frames, values)` in an order that depends on the values alone; the cache keeps frames in ring order."""
    frames = tokens.unflatten(1, (-1, tokens_per_frame)).transpose(0, 1).flatten(1)  # (frames, values)
    return frames[torch.argsort(frames[:, 0])]


class Recorder:
    """What a rollout computes, at the places where the original was recorded."""

    def __init__(self, case, monkeypatch) -> None:
        self.x0: list[torch.Tensor] = []
        self.key_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.layer = case.meta["kv_layer"]
        self._monkeypatch_noise(case, monkeypatch)
        self._monkeypatch_x0(monkeypatch)
        self._monkeypatch_forwards(monkeypatch)

    def _monkeypatch_noise(self, case, monkeypatch) -> None:
        self.draws = iter([case.tensors[key] for key in sorted(case.tensors) if key.startswith("renoise")])
        monkeypatch.setattr(self_forcing_scheduler, "randn_tensor", lambda *args, **kwargs: next(self.draws))

    def _monkeypatch_x0(self, monkeypatch) -> None:
        step = SelfForcingScheduler.step

        def recording_step(scheduler, *args, **kwargs):
            output = step(scheduler, *args, **kwargs)
            self.x0.append(output.pred_original_sample)
            return output

        monkeypatch.setattr(SelfForcingScheduler, "step", recording_step)

    def _monkeypatch_forwards(self, monkeypatch) -> None:
        end_forward = WanKVCache.end_forward

        def recording_end(cache):
            end_forward(cache)
            block = cache.block_caches[self.layer]
            self.key_values[len(self.key_values)] = (block.cached_key.clone(), block.cached_value.clone())

        monkeypatch.setattr(WanKVCache, "end_forward", recording_end)


@pytest.mark.parametrize("sinusoid_dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(name, sinusoid_dtype, monkeypatch):
    case, tolerance = load_case(name), TOLERANCE[sinusoid_dtype]
    transformer = golden_transformer()
    transformer.set_sinusoid_dtype(sinusoid_dtype)
    recorder = Recorder(case, monkeypatch)
    pipe = WanAutoregressivePipeline(None, None, transformer, None, SelfForcingScheduler())
    pipe.set_progress_bar_config(disable=True)

    latents = pipe(**case.rollout_arguments, output_type="latent").frames

    assert next(recorder.draws, None) is None, "re-noise was drawn fewer times than in the original"
    torch.testing.assert_close(latents, case.tensors["latents"], rtol=0, atol=tolerance)
    expected_x0 = [case.tensors[key] for key in sorted(case.tensors) if key.startswith("x0.")]
    assert len(recorder.x0) == len(expected_x0)
    for got, expected in zip(recorder.x0, expected_x0, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    compare_key_values(case, recorder, tolerance)


def compare_key_values(case, recorder, tolerance) -> None:
    """Our forwards are the original's without what changes nothing: the clean pass before a re-cache or at the end."""
    forwards = case.meta["forwards"]
    needless = [
        i
        for i, forward in enumerate(forwards)
        if forward["kind"] == "context" and (i + 1 == len(forwards) or forwards[i + 1]["kind"] == "recache")
    ]
    ours = [forward for i, forward in enumerate(forwards) if i not in needless]
    assert len(recorder.key_values) == len(ours)
    for forward, key_values in zip(ours, recorder.key_values.values(), strict=True):
        if "kv_snapshot" not in forward:
            continue
        for got, name in zip(key_values, ("k", "v"), strict=True):
            expected = case.tensors[f"{forward['kv_snapshot']}.{name}"]
            got_frames, expected_frames = (as_set_of_frames(t, case.tokens_per_frame) for t in (got, expected))
            torch.testing.assert_close(got_frames, expected_frames, rtol=0, atol=tolerance)


# Deliberate mistakes must be far outside the bound, or the comparison would show nothing.
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("a_t2v_chunk3", {"chunk_frames": 7}),
        ("a_t2v_chunk3", {"window_frames": 6}),
        ("a_t2v_chunk3", {"context_noise": 100}),
        ("a_t2v_chunk3", {"denoising_steps": (1000, 750, 500, 251)}),
        ("c_window6_sink0", {"window_frames": 9}),
        ("c_window6_sink0", {"window_frames": 7, "sink_frames": 1}),
        ("d_window9_sink3", {"sink_frames": 0}),
        ("d_window9_sink3", {"sink_frames": 2}),
        ("ll_switch_window9_sink3_keep", {"recache_sink": "refresh"}),
        ("ll_switch_window9_sink3_keep", {"switch_policy": "cross_attention"}),
    ],
)
def test_a_mistake_is_seen(name, mistake, monkeypatch):
    case = load_case(name)
    draws = [case.tensors[key] for key in sorted(case.tensors) if key.startswith("renoise")]
    noise = torch.cat(draws, dim=2)

    def matching_draw(shape, **kwargs):
        return noise[:, :, : shape[2]]

    if "chunk_frames" not in mistake:
        remaining = iter(draws)
        monkeypatch.setattr(self_forcing_scheduler, "randn_tensor", lambda *args, **kwargs: next(remaining))
    else:
        monkeypatch.setattr(self_forcing_scheduler, "randn_tensor", matching_draw)
    transformer = golden_transformer()
    transformer.set_sinusoid_dtype(torch.float64)
    pipe = WanAutoregressivePipeline(None, None, transformer, None, SelfForcingScheduler())
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(**{**case.rollout_arguments, **mistake}, output_type="latent").frames
    assert (latents - case.tensors["latents"]).abs().max() > 1e-3
