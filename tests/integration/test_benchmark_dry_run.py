"""The memory that `wan-ar benchmark --dry-run` computes is the memory that a real rollout takes, to the byte."""

import dataclasses
import json

import pytest
import torch

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.scripts.benchmark.build import build_pipeline, start_rollout
from wan_autoregressive.scripts.benchmark.counting import AllocationMode, StageCounts, count_step
from wan_autoregressive.scripts.benchmark.memory import plan_memory
from wan_autoregressive.scripts.benchmark.presets import PRESETS
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings
from wan_autoregressive.scripts.cli import main

SMALL = BenchmarkSettings(layers=2, steps=2)
VARIANTS = {
    "window": {},
    "no window": {"window_frames": None, "sink_frames": 0, "chunks": 3},
    "bfloat16": {"dtype": "bfloat16"},
    "more layers": {"layers": 5},
    "int8": {"kv_dtype": "int8"},
    "relative": {"position_mode": "relative"},
    "sink_relative": {"position_mode": "sink_relative"},
    "tiles": {"vae_tiling": True, "height": 288, "window_frames": 6},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_plan_is_what_a_rollout_takes(changes, monkeypatch):
    settings = dataclasses.replace(SMALL, **changes)
    plan = plan_memory(settings)
    pipe = build_pipeline(settings)
    weights = [sum(p.nbytes for p in model.parameters()) for model in (pipe.transformer, pipe.vae)]
    assert weights == [plan.transformer_bytes, plan.vae_bytes]

    rollout, counted = start_rollout(pipe, settings), start_rollout(pipe, settings)
    last = settings.chunks - 1 if settings.window_frames is None else settings.chunks_to_fill + 1
    for _ in range(last):
        rollout.step()
        counted.step()
    assert {stage: counts.flops for stage, counts in count_step(counted).items()} == plan.flops
    peaks: dict[str, list[int]] = {"_forward": [], "decode": []}
    count_peaks(monkeypatch, rollout, "_forward", peaks)
    count_peaks(monkeypatch, rollout.vae_decoder, "decode", peaks)
    latents_bytes = rollout.history.nbytes + rollout.step().latents.nbytes

    assert rollout.cache.allocated_bytes == plan.kv_cache_bytes
    assert rollout.conditions.text_kv_bytes == plan.text_kv_bytes
    assert rollout.vae_decoder.state_bytes == plan.vae_state_bytes
    assert latents_bytes == plan.latents_bytes
    assert rollout.input_bytes == plan.input_bytes
    assert peaks["decode"] == [plan.decode_peak_bytes]
    assert max(peaks["_forward"]) == plan.forward_peak_bytes


def count_peaks(monkeypatch, holder, name, peaks):
    """Note the most bytes alive at once of all that each call makes."""
    method = getattr(holder, name)

    def counted(*args, **kwargs):
        counts = StageCounts()
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
    settings = BenchmarkSettings(preset=preset, device="meta")
    assert settings.pixels == size
    assert sum(p.numel() for p in build_pipeline(settings).transformer.parameters()) == parameters


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_text_encoder_is_counted_as_it_is_loaded(dtype, tiny_checkpoint, monkeypatch):
    pipe = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=getattr(torch, dtype))
    config = pipe.text_encoder.config
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
    monkeypatch.setattr(
        "wan_autoregressive.scripts.benchmark.memory._UMT5_XXL", {name: getattr(config, name) for name in names}
    )
    monkeypatch.setitem(PRESETS, "demo", dataclasses.replace(PRESETS["demo"], text_dim=config.d_model))
    plan = plan_memory(dataclasses.replace(SMALL, dtype=dtype, with_vae=False))
    assert plan.text_encoder_bytes == sum(p.nbytes for p in pipe.text_encoder.parameters())
    assert plan.vae_bytes == plan.vae_state_bytes == plan.decode_peak_bytes == plan.flops["decode"] == 0


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = ["benchmark", "--dry-run", "--preset", "1.3b", "--layers", "2", "--dtype", "bfloat16"]
    assert main([*arguments, "--kv-dtype", "int8", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert "1.3b: 2 layers of 1536, 480x832" in printed
    assert "bfloat16, K/V int8" in printed
    assert figures["text_kv_bytes"] == 2 * 2 * 512 * 1536 * 2
    assert figures["kv_cache_bytes"] == 2 * 2 * 9 * 1560 * 12 * (128 + 2)
    assert figures["text_encoder_bytes"] == 5_680_910_336 * 2
    models = figures["transformer_bytes"] + figures["vae_bytes"] + figures["text_encoder_bytes"]
    most = models + figures["held_bytes"] + figures["decode_peak_bytes"]
    assert figures["most_bytes"]["all_models"] == most
    with pytest.raises(SystemExit):
        main(["benchmark", "--dry-run", "--preset", "2b"])


@pytest.mark.parametrize(
    "flag",
    [["--roofline"], ["--sweep", "window"], ["--plot", "x.png"], ["--decode-alongside"], ["--compile", "blocks"]],
)
def test_a_dry_run_measures_nothing(flag, capsys):
    assert main(["benchmark", "--dry-run", *flag]) == 2
    assert f"--dry-run measures nothing; leave out {flag[0]}" in capsys.readouterr().err
