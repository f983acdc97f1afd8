"""Rollouts whose past is kept as int8: near those in full precision, and not the same."""

import json

import pytest
import torch
import yaml
from saved_rollouts import SIZE, generator, start

from benchmarks.counting import count_step
from wan_autoregressive import (
    CausalWanTransformer3DModel,
    SelfForcingScheduler,
    WanAutoregressivePipeline,
    WanKVCache,
    demo_checkpoint,
)
from wan_autoregressive.scripts.cli import main
from wan_autoregressive.scripts.costs.allocations import AllocationCounts, AllocationMode
from wan_autoregressive.scripts.costs.build import build_pipeline, start_rollout
from wan_autoregressive.scripts.costs.formulas import kv_bytes_read, kv_bytes_written
from wan_autoregressive.scripts.costs.workload import make_workload

LATENTS = (1, 16, 3, 4, 4)
TOKENS_PER_FRAME = 4
SINK = {"window_frames": 6, "sink_frames": 2, "chunk_frames": 2}
CHANGES = {"prompt_schedule": {4: "rain", 8: "a blue cross"}}
OPTIONS = {
    "no window": {},
    "guidance": {"guidance_scale": 3.0},
    "window and sink": SINK,
    "relative": SINK | {"position_mode": "relative"},
    "sink that moves": SINK | {"position_mode": "sink_relative"},
    "recache": SINK | CHANGES,
    "recache, new sink": SINK | CHANGES | {"recache_sink": "refresh", "position_mode": "sink_relative"},
    "cross-attention": SINK | CHANGES | {"switch_policy": "cross_attention"},
    "flush": SINK | CHANGES | {"switch_policy": "flush"},
    "cut": SINK | CHANGES | {"switch_policy": "cut", "position_mode": "relative"},
    "blend": SINK | CHANGES | {"switch_policy": "blend"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_latents_are_near_those_of_full_precision(pipe, options):
    """Root mean square of the difference under half a percent of the latents' standard deviation."""
    exact = torch.cat([chunk.latents for chunk in start(pipe, **options)], dim=2)
    rollout = start(pipe, **options, kv_dtype="int8")
    got = torch.cat([chunk.latents for chunk in rollout], dim=2)
    frames = options.get("chunk_frames", 3)
    assert torch.equal(got[:, :, :frames], exact[:, :, :frames])  # nothing lies behind the first chunk
    error = (got - exact)[:, :, frames:].square().mean().sqrt() / exact[:, :, frames:].std()
    # Guidance takes the difference of two flows `scale` times and adds one of them: so many errors.
    assert 0 < error < 5e-3 * (2 * options.get("guidance_scale", 1.0) - 1)


def small_model(num_layers: int = 2, positions: int = 1024) -> CausalWanTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CausalWanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            ffn_dim=32,
            num_layers=num_layers,
            text_dim=16,
            freq_dim=32,
            rope_max_seq_len=positions,
        ).eval()


@pytest.mark.parametrize("mode", ["absolute", "relative", "sink_relative"])
@torch.no_grad()
def test_errors_do_not_accumulate(mode):
    """200 chunks. With `sink_relative` the sink moves 198 times and positions start again 10 times."""
    model = small_model(positions=600 if mode == "absolute" else 64)
    sizes = {"window_size": 9 * TOKENS_PER_FRAME, "sink_size": 3 * TOKENS_PER_FRAME, "position_mode": mode}
    caches = WanKVCache(2, **sizes), WanKVCache(2, **sizes, kv_dtype="int8")
    text, errors = torch.randn(1, 5, 16, generator=generator()), []
    for number in range(200):
        latents = torch.randn(LATENTS, generator=generator(number))
        exact, got = (
            model(
                latents, torch.tensor([300.0]), text, frame_offset=3 * number, attention_kwargs={"kv_cache": cache}
            ).sample
            for cache in caches
        )
        errors.append(float((got - exact).square().mean().sqrt() / exact.std()))
    assert errors[0] == 0
    assert 0 < max(errors) < 1e-3
    assert max(errors[-20:]) < 2 * max(errors[3:23])


def test_the_estimate_knows_its_bytes(pipe):
    for options in ({}, SINK, {"guidance_scale": 2.0}):
        rollout = start(pipe, **options, kv_dtype="int8")
        rollout.step()
        estimate = pipe.estimate(**SIZE, num_frames=49, **options, kv_dtype="int8")
        assert estimate.kv_cache_bytes == rollout.denoiser.kv_cache_bytes
        assert estimate.kv_cache_bytes < pipe.estimate(**SIZE, num_frames=49, **options).kv_cache_bytes


def test_a_dry_run_knows_its_bytes(tmp_path, capsys):
    words = ["generate", "--prompt", "a red circle moving right on a navy background", "--dry-run"]
    words += ["--output", str(tmp_path / "x.mp4")]
    bytes_held = []
    for more in ([], ["--kv-dtype", "int8"]):
        assert main([*words, *more]) == 0
        shown = yaml.safe_load(capsys.readouterr().out)
        bytes_held.append(shown["each_video"]["kv_cache_bytes"])
    assert shown["config"]["kv_dtype"] == "int8"
    config = json.loads((demo_checkpoint() / "transformer" / "config.json").read_text())
    head_dim = config["attention_head_dim"]
    assert bytes_held[1] * 4 * head_dim == bytes_held[0] * (head_dim + 4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_of_a_rollout_is_lower_by_what_int8_saves(dtype):
    """Six layers and a window of 48 frames. Beside the cache int8 may take one layer's window in the model's dtype."""
    model, window, peaks, held = small_model(num_layers=6).to(dtype), 48, {}, {}
    pipe = WanAutoregressivePipeline(None, None, model, None, SelfForcingScheduler())
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 4, 16, generator=generator())
    for kv_dtype in (None, "int8"):
        rollout = pipe.rollout(
            prompt_embeds=text,
            **SIZE,
            window_frames=window,
            kv_dtype=kv_dtype,
            num_inference_steps=1,
            output_type="latent",
            generator=generator(),
        )
        counts = AllocationCounts()
        with AllocationMode(counts):
            for _ in range(18):
                rollout.step()
        peaks[kv_dtype], held[kv_dtype] = counts.peak_bytes, rollout.cache.allocated_bytes
    one_layer = 2 * window * TOKENS_PER_FRAME * 2 * 32 * dtype.itemsize
    assert held[None] == 6 * one_layer
    assert held["int8"] == 6 * 2 * window * TOKENS_PER_FRAME * 2 * (32 + dtype.itemsize)
    everything_else = peaks[None] - held[None]
    assert peaks["int8"] <= held["int8"] + one_layer + everything_else
    assert peaks["int8"] < peaks[None] - 0.9 * (held[None] - held["int8"] - one_layer)


def test_the_benchmark_counts_bytes_of_the_cache():
    workload = make_workload(layers=2, steps=2, window_frames=6, sink_frames=0, with_vae=False, kv_dtype="int8")
    pipe = build_pipeline(workload)
    rollout = start_rollout(pipe, workload)
    count_step(rollout)
    counts, config = count_step(rollout)["denoise"], pipe.transformer.config
    tokens = workload.chunk_tokens
    assert rollout.cache.allocated_bytes == kv_bytes_written(config, 2 * tokens, itemsize=1, scale_bytes=4)
    assert counts.kv_written_bytes == 2 * kv_bytes_written(config, tokens, itemsize=1, scale_bytes=4)
    assert counts.kv_read_bytes == 2 * kv_bytes_read(config, 2 * tokens, itemsize=1, scale_bytes=4)
    with pytest.raises(ValueError, match="kv_dtype is 'int4'"):
        make_workload(kv_dtype="int4")
