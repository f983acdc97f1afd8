"""Batches, guidance, int8 keys and values, and LoRA with every sampler."""

import pytest
import torch
from peft import LoraConfig
from saved_rollouts import assert_same, generator

from wan_autoregressive import WanAutoregressivePipeline

SIZE = {"height": 32, "width": 32, "num_frames": 37, "chunk_frames": 2}  # 5 chunks
SAMPLERS = {
    "memory_bank": {"window_frames": 5, "sink_frames": 1, "memory_bank_frames": 2},
    "rolling": {"window_frames": 9, "sampler_options": {"attended_frames": 8}},
    "recompute": {
        **{"window_frames": 5, "switch_policy": "cross_attention"},
        "sampler_options": {"keep_first_frame": True},
    },
    "stream_batch": {"window_frames": 5, "sink_frames": 1, "switch_policy": "cross_attention"},
}
BOUND = 1e-4

each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def latents_of(pipe, sampler, prompt="a red circle", **options):
    settings = {**SIZE, **SAMPLERS[sampler], "sampler": sampler, "output_type": "latent", "generator": generator()}
    return pipe(prompt, **{**settings, **options}).frames


@each_sampler
def test_videos_of_a_batch_are_each_alone(pipe, sampler):
    prompts = ["a red circle", "a blue cross"]
    both = latents_of(pipe, sampler, prompts, generator=[generator(1), generator(2)])
    alone = [latents_of(pipe, sampler, prompt, generator=generator(1 + i)) for i, prompt in enumerate(prompts)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=BOUND)


@each_sampler
def test_guidance_goes_away_from_the_negative_prompt(pipe, sampler):
    plain = latents_of(pipe, sampler)
    by_itself = latents_of(pipe, sampler, guidance_scale=3.0, negative_prompt="a red circle")
    torch.testing.assert_close(by_itself, plain, rtol=0, atol=BOUND)
    guided = latents_of(pipe, sampler, guidance_scale=3.0, negative_prompt="a blue cross")
    assert (guided - plain).abs().max() > 100 * BOUND


@pytest.mark.slow
@each_sampler
def test_int8_is_near_and_goes_on_as_saved(pipe, sampler, tmp_path):
    """Root mean square of the difference under half a percent of the latents' standard deviation."""
    exact, got = latents_of(pipe, sampler), latents_of(pipe, sampler, kv_dtype="int8")
    assert 0 < (got - exact).square().mean().sqrt() / exact.std() < 5e-3
    settings = {**SIZE, **SAMPLERS[sampler], "sampler": sampler, "output_type": "latent", "kv_dtype": "int8"}
    rollout = pipe.rollout("a red circle", **settings, generator=generator())
    for _ in range(3):
        rollout.step()
    rollout.save(tmp_path)
    assert_same(list(rollout), list(pipe.resume(tmp_path)))


@pytest.mark.slow
@each_sampler
def test_an_adapter_takes_effect_at_its_scale(tiny_checkpoint, pipe, sampler):
    adapted = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    adapted.set_progress_bar_config(disable=True)
    targets = ["to_q", "to_k", "to_v", "ffn.net.2"]
    adapted.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    plain = latents_of(pipe, sampler)
    off = latents_of(adapted, sampler, attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(off, plain, rtol=0, atol=BOUND)
    assert (latents_of(adapted, sampler, attention_kwargs={"scale": 1.0}) - plain).abs().max() > 10 * BOUND
