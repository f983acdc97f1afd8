"""The memory that `wan-ar estimate` computes is the memory that a real rollout takes, to the byte."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.counting import count_step
from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.scripts.cli import main
from wan_autoregressive.scripts.costs.allocations import AllocationCounts, AllocationMode
from wan_autoregressive.scripts.costs.build import build_pipeline, start_rollout, weights_bytes
from wan_autoregressive.scripts.costs.memory import estimate_memory
from wan_autoregressive.scripts.costs.sizes import ModelSizes
from wan_autoregressive.scripts.costs.workload import make_workload

VARIANTS = {
    "window": {},
    "no window": {"window_frames": None, "sink_frames": 0, "chunks": 3},
    "bfloat16": {"dtype": "bfloat16"},
    "more layers": {"layers": 5, "height": 128, "width": 96},
    "int8": {"kv_dtype": "int8"},
    "relative": {"position_mode": "relative"},
    "sink_relative": {"position_mode": "sink_relative"},
    "memory_bank": {"sampler": "memory_bank", "memory_bank_frames": 2, "sampler_options": {"bank_interval": 1}},
    "rolling": {
        **{"sampler": "rolling", "sink_frames": 0, "window_frames": 9, "position_mode": "sink_relative"},
        "sampler_options": {"attended_frames": 9},
    },
    "recompute": {"sampler": "recompute", "sink_frames": 0, "window_frames": 6},
    "recompute, bfloat16": {"sampler": "recompute", "sink_frames": 0, "window_frames": 6, "dtype": "bfloat16"},
    "recompute, first frame kept": {
        **{"sampler": "recompute", "sink_frames": 0, "window_frames": 6},
        "sampler_options": {"keep_first_frame": True},
    },
    "stream_batch": {"sampler": "stream_batch"},
    "tiles": {"vae_tiling": True, "height": 288, "window_frames": 6},
    "tiny VAE": {"tiny_vae": True},
    "preview VAE": {"preview_vae": True},
}
DEMO = ModelSizes.of_preset("demo")
CLIP = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
SEES_IMAGE = {**DEMO.transformer, "in_channels": DEMO.transformer["in_channels"] + 4 + DEMO.channels}
SEES_CLIP = {**SEES_IMAGE, "image_dim": 24, "added_kv_proj_dim": DEMO.dim}
SEEING = replace(DEMO, transformer=SEES_CLIP, image_encoder={**CLIP, "image_size": 28, "patch_size": 14})
VARIANTS |= {
    "image": {"model": SEEING},
    "image, no window": {"model": SEEING, "window_frames": None, "sink_frames": 0, "chunks": 3},
    "image, memory_bank": {**VARIANTS["memory_bank"], "model": SEEING},
    "image, stream_batch": {"model": SEEING, "sampler": "stream_batch"},
    "pair": {"steps": 4, "model": replace(DEMO, experts=2)},
    "image, pair": {"steps": 4, "model": replace(DEMO, transformer=SEES_IMAGE, experts=2)},
}
QUICK = ("window", "tiny VAE", "image")


CHUNKS_MORE = {"memory_bank": 2, "rolling": 3, "stream_batch": 2}
"""That a sampler takes longer until every chunk costs the same."""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, changes in VARIANTS.items()
    ],
)
def test_the_estimate_is_what_a_rollout_takes(changes, monkeypatch):
    workload = make_workload(**{"layers": 2, "steps": 2, "height": 64, "width": 64, **changes})
    estimate = estimate_memory(workload)
    pipe = build_pipeline(workload)
    models = pipe.transformer, pipe.vae, pipe.image_encoder
    weights = [weights_bytes(model) for model in models]
    assert (pipe.transformer_2 is None) == (estimate.experts == 1)
    assert weights == [estimate.transformer_bytes, estimate.vae_bytes, estimate.image_encoder_bytes]

    rollout, counted = start_rollout(pipe, workload), start_rollout(pipe, workload)
    last = workload.chunks - 1 if workload.window_tokens is None else workload.chunks_to_fill + 1
    last += CHUNKS_MORE.get(workload.rollout.sampler, 0)
    for _ in range(last):
        rollout.step()
        counted.step()
    assert {stage: counts.flops for stage, counts in count_step(counted).items()} == estimate.flops
    peaks: dict[str, list[int]] = {"predict": [], "predict_lanes": [], "decode": []}
    count_peaks(monkeypatch, rollout.denoiser, "predict", peaks)
    count_peaks(monkeypatch, rollout.denoiser, "predict_lanes", peaks)
    codec, preview = rollout.components.codec, rollout.components.preview_codec
    for one in (codec, preview):
        if one is not None:
            count_peaks(monkeypatch, type(one.decoder()), "decode", peaks)
    latents_bytes = rollout.history.nbytes + rollout.sampler.nbytes + rollout.step().latents.nbytes

    assert rollout.denoiser.kv_cache_bytes == estimate.kv_cache_bytes
    assert rollout.denoiser.text_kv_bytes == estimate.text_kv_bytes
    assert rollout.vae_decoder.state_bytes == estimate.vae_state_bytes
    assert latents_bytes == estimate.latents_bytes
    assert rollout.denoiser.input_bytes == estimate.input_bytes
    assert weights_bytes(None if preview is None else preview.vae) == estimate.preview_vae_bytes
    states = estimate.vae_state_bytes + estimate.preview_state_bytes
    others = estimate.kv_cache_bytes + estimate.text_kv_bytes + estimate.input_bytes
    assert rollout.nbytes == others + states + rollout.history.nbytes + rollout.sampler.nbytes
    assert max(peaks["decode"]) == estimate.decode_peak_bytes
    assert max(peaks["predict"] + peaks["predict_lanes"]) == estimate.forward_peak_bytes


def count_peaks(monkeypatch, holder, name, peaks):
    """Note the most bytes alive at once of all that each call makes."""
    method = getattr(holder, name)

    def counted(*args, **kwargs):
        counts = AllocationCounts()
        with AllocationMode(counts):
            result = method(*args, **kwargs)
        peaks[name].append(counts.peak_bytes)
        return result

    monkeypatch.setattr(holder, name, counted)


@pytest.mark.parametrize(
    ("preset", "parameters", "size"),
    [("1.3b", 1_418_996_800, (480, 832)), ("5b", 4_999_787_712, (704, 1280)), ("14b", 14_288_491_584, (480, 832))],
)
def test_whole_models_have_the_published_parameters(preset, parameters, size):
    workload = make_workload(ModelSizes.of_preset(preset), device="meta")
    assert (workload.rollout.height, workload.rollout.width) == size
    assert sum(p.numel() for p in build_pipeline(workload).transformer.parameters()) == parameters


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_text_encoder_is_counted_as_it_is_loaded(dtype, tiny_checkpoint):
    pipe = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=getattr(torch, dtype))
    sizes = ModelSizes.of_folder(tiny_checkpoint)
    estimate = estimate_memory(make_workload(sizes, height=64, width=64, dtype=dtype, with_vae=False))
    for part in ("transformer", "text_encoder"):
        weights = sum(parameter.nbytes for parameter in getattr(pipe, part).parameters())
        assert getattr(estimate, f"{part}_bytes") == weights
    assert estimate.vae_bytes == estimate.vae_state_bytes == estimate.decode_peak_bytes == 0
    assert estimate.flops["decode"] == 0


@pytest.mark.slow
def test_the_command_prints_a_table_and_json(capsys):
    arguments = ["estimate", "--preset", "1.3b", "--layers", "2", "--dtype", "bfloat16", "--kv-dtype", "int8"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1.3b: 2 layers of 1536, 480x832" in printed
    assert "bfloat16, K/V int8" in printed
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["workload"]["model"]["transformer"]["num_layers"] == 2
    assert figures["text_kv_bytes"] == 2 * 2 * 512 * 1536 * 2
    assert figures["kv_cache_bytes"] == 2 * 2 * 9 * 1560 * 12 * (128 + 2)
    assert figures["text_encoder_bytes"] == 5_680_910_336 * 2
    models = figures["transformer_bytes"] + figures["vae_bytes"] + figures["text_encoder_bytes"]
    most = models + figures["held_bytes"] + figures["decode_peak_bytes"]
    assert figures["most_bytes"]["all_models"] == most


def test_a_checkpoint_folder_gives_the_sizes(tiny_checkpoint, capsys):
    assert main(["estimate", "--model", str(tiny_checkpoint), "--height", "64", "--width", "64"]) == 0
    assert "tiny: 2 layers of 80, 64x64" in capsys.readouterr().out
    assert main(["estimate", "--model", str(tiny_checkpoint / "vae")]) == 2
    assert "transformer/config.json is missing" in capsys.readouterr().err
    for words in (["--preset", "2b"], ["--sampler-options", "{"], ["--sampler-options", "3"]):
        with pytest.raises(SystemExit):
            main(["estimate", *words])
    assert "'3' is no JSON object such as" in capsys.readouterr().err
