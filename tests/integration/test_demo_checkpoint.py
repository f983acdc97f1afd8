"""The trained demo: right on prompts it never saw, and worse with every mistake that a rollout could make."""

from dataclasses import replace

import pytest
import torch

from examples.train_demo import world
from examples.train_demo.evaluate import evaluate_pipeline
from examples.train_demo.score import summarize
from wan_autoregressive import CausalWanTransformer3DModel, WanAutoregressivePipeline, WanKVCache, demo_checkpoint
from wan_autoregressive.pipelines.denoiser import Denoiser
from wan_autoregressive.pipelines.samplers.chunkwise import ChunkwiseSampler

CHUNKS = 6


@pytest.fixture(scope="module")
def demo_pipe() -> WanAutoregressivePipeline:
    pipe = WanAutoregressivePipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def figures(pipe, chunks: int = CHUNKS, **options) -> dict[str, float]:
    scenes = world.spread(world.held_out_scenes(), 6)
    return summarize(evaluate_pipeline(pipe, scenes, chunks=chunks, batch=6, **options))


@pytest.fixture(scope="module")
def right(demo_pipe) -> dict[str, float]:
    return figures(demo_pipe)


@pytest.mark.slow
def test_is_right_on_prompts_held_out_from_training(right):
    assert right["background"] >= 0.98
    assert right["color"] >= 0.98
    assert right["direction"] >= 0.97
    assert right["shape"] >= 0.9
    assert 1.35 <= right["speed"] <= 1.65
    assert right["worst_chunk"] >= 0.9
    assert right["flicker"] <= 1.1
    assert right["intact_at_end"] >= 0.95


@pytest.mark.slow
def test_int8_keys_and_values_reach_the_same_scores(demo_pipe, right):
    """The window is full after 4 of the 6 chunks."""
    int8 = figures(demo_pipe, kv_dtype="int8")
    for name in ("background", "color", "direction", "shape", "intact_at_end"):
        assert int8[name] == pytest.approx(right[name], abs=1 / 36), name  # one chunk of them all
    for name in ("overlap", "speed", "worst_chunk", "flicker"):
        assert int8[name] == pytest.approx(right[name], rel=0.02), name
    assert int8 != right


def test_fits_in_the_package():
    files = [path for path in demo_checkpoint().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert (demo_checkpoint() / "README.md").is_file()
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def no_clean_pass(monkeypatch) -> None:
    monkeypatch.setattr(ChunkwiseSampler, "cache_past", lambda self, skip_prompt=False: None)


def append_and_overwrite_swapped(monkeypatch) -> None:
    append, overwrite = WanKVCache.enable_append_mode, WanKVCache.enable_overwrite_mode
    monkeypatch.setattr(WanKVCache, "enable_overwrite_mode", append)
    # The very first forward has nothing that it could overwrite.
    monkeypatch.setattr(
        WanKVCache, "enable_append_mode", lambda cache: overwrite(cache) if cache.num_tokens else append(cache)
    )


def forget_the_past(monkeypatch) -> None:
    append = WanKVCache.enable_append_mode

    def forgetful(cache):
        cache.keep_newest(0)
        append(cache)

    monkeypatch.setattr(WanKVCache, "enable_append_mode", forgetful)


def wrong_frame_offset(monkeypatch) -> None:
    plan = CausalWanTransformer3DModel.plan_forward

    def at_the_start(self, latents, cache, frame_offset, **options):
        return plan(self, latents, cache, 0, **options)

    monkeypatch.setattr(CausalWanTransformer3DModel, "plan_forward", at_the_start)


def wrong_timestep(monkeypatch) -> None:
    predict = Denoiser.predict

    def halved(self, latents, window):
        return predict(self, latents, replace(window, timesteps=tuple(t / 2 for t in window.timesteps)))

    monkeypatch.setattr(Denoiser, "predict", halved)


def overall(values: dict[str, float]) -> float:
    """Overlap with the prompted shape, for chunks in which all else is right, too."""
    return values["overlap"] * values["direction"] * values["color"] * values["background"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake", [no_clean_pass, append_and_overwrite_swapped, forget_the_past, wrong_frame_offset, wrong_timestep]
)
def test_a_mistake_lowers_the_score(demo_pipe, right, mistake, monkeypatch):
    mistake(monkeypatch)
    wrong = figures(demo_pipe)
    monkeypatch.undo()
    assert overall(wrong) < overall(right) - 0.02 or wrong["flicker"] > right["flicker"] + 0.1
