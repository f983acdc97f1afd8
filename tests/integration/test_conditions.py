"""Nothing is computed twice: text once per prompt, time once per timestep, rotary tables once per chunk; and what a
rollout remembers is never stale."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.models.causal_wan_embeddings import CausalWanRotaryPosEmbed
from wan_autoregressive.models.conditions import ConditionMemory

LIKE = torch.empty(1, 0, 2, 6)
SIZE = {"height": 32, "width": 32}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def calls(pipe, monkeypatch):
    """How often the layers of interest run, by name."""
    counts: Counter[str] = Counter()
    transformer = pipe.transformer
    embedder = transformer.condition_embedder
    layers = {
        "text": embedder.text_embedder,
        "time": embedder.time_embedder,
        "modulation": embedder.time_proj,
        "first_key": transformer.blocks[0].attn2.to_k,
        "last_value": transformer.blocks[-1].attn2.to_v,
        "last_attention": transformer.blocks[-1].attn1.to_out[0],
        "last_feed_forward": transformer.blocks[-1].ffn,
        "head": transformer.proj_out,
    }
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: counts.update([name])) for name, layer in layers.items()
    ]
    at = CausalWanRotaryPosEmbed.at
    monkeypatch.setattr(CausalWanRotaryPosEmbed, "at", lambda *args: counts.update(["tables"]) or at(*args))
    yield counts
    for hook in hooks:
        hook.remove()


def test_each_is_computed_once(pipe, calls):
    steps = len(pipe.scheduler.timesteps)
    list(pipe.rollout("x", **SIZE, num_frames=4 * (5 * 3 - 1) + 1, window_frames=9, output_type="latent"))
    assert calls.pop("time") == calls.pop("modulation") == steps + 1  # the clean pass's as well
    assert calls.pop("text") == calls.pop("first_key") == calls.pop("last_value") == 1
    # Five chunks of `steps` forwards: their clean passes reach none of these.
    assert {calls.pop(name) for name in ("last_attention", "last_feed_forward", "head")} == {5 * steps}
    assert calls == {"tables": 5}


def test_a_new_prompt_is_computed_once_more(pipe, calls):
    rollout = pipe.rollout("x", **SIZE, num_frames=4 * (6 * 3 - 1) + 1, window_frames=9, output_type="latent")
    for prompt in (None, None, "y", None, "x", None):
        rollout.step(prompt)
    assert calls["text"] == calls["first_key"] == calls["last_value"] == 3


def test_guidance_keeps_both_prompts_and_shares_the_timesteps(pipe, calls):
    steps = len(pipe.scheduler.timesteps)
    list(pipe.rollout("x", **SIZE, num_frames=33, guidance_scale=2.0, negative_prompt="y", output_type="latent"))
    assert calls["text"] == calls["first_key"] == 2
    assert calls["time"] == steps + 1
    assert calls["tables"] == 3


@pytest.mark.parametrize("position_mode", ["relative", "sink_relative"])
def test_relative_positions_make_their_tables_once_per_chunk(pipe, calls, position_mode):
    options = {"window_frames": 9, "sink_frames": 3, "position_mode": position_mode, "output_type": "latent"}
    list(pipe.rollout("x", **SIZE, num_frames=4 * (8 * 3 - 1) + 1, **options))
    assert calls["tables"] <= 2 * 8  # the chunk's and the cached keys', or the rotation of the sink


def test_written_embeddings_are_computed_anew():
    memory, embeds = ConditionMemory(), torch.zeros(1, 4, 8)
    first = memory.text(embeds, 2, LIKE)
    assert memory.text(embeds, 2, LIKE) is first
    embeds[0, 0] = 1
    assert memory.text(embeds, 2, LIKE) is not first


def test_the_least_recently_used_prompt_goes():
    memory = ConditionMemory(num_prompts=2)
    a, b, c = torch.zeros(3, 1, 4, 8).unbind()
    kept, dropped = memory.text(a, 1, LIKE), memory.text(b, 1, LIKE)
    assert memory.text(a, 1, LIKE) is kept
    newest = memory.text(c, 1, LIKE)
    assert newest.blocks[0].key.data_ptr() == dropped.blocks[0].key.data_ptr()  # takes over its memory
    assert newest.blocks[0].key.data_ptr() != kept.blocks[0].key.data_ptr()
    assert memory.text(a, 1, LIKE) is kept
    assert memory.text(b, 1, LIKE) is not dropped


def test_another_adapter_in_the_middle_of_a_video_takes_effect(tiny_checkpoint):
    """The same latents as of a rollout that remembers nothing."""
    made = []
    for forgetful in (False, True):
        pipe = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint)
        pipe.set_progress_bar_config(disable=True)
        targets = ["to_k", "to_v", "time_proj"]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name in ("first", "second"):
                config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
                pipe.transformer.add_adapter(config, adapter_name=name)
        rollout = pipe.rollout("x", **SIZE, num_frames=33, output_type="latent", generator=generator())
        latents = []
        for change in (
            lambda pipe=pipe: pipe.transformer.set_adapter("first"),
            lambda pipe=pipe: pipe.transformer.set_adapters(["first", "second"], [0.5, 2.0]),
            lambda pipe=pipe: pipe.transformer.disable_adapters(),
        ):
            change()
            if forgetful:
                rollout.conditions.forget()
            latents.append(rollout.step().latents)
        made.append(torch.cat(latents, dim=2))
    assert torch.equal(*made)


def test_forget_takes_up_weights_that_were_changed_in_place(pipe):
    rollout = pipe.rollout("x", **SIZE, num_frames=33, output_type="latent", generator=generator())
    rollout.step()
    before = rollout.conditions.time(1000.0)
    rollout.conditions.forget()
    assert rollout.conditions.time(1000.0) is not before
    assert rollout.conditions.time(1000.0).modulation is None


def test_timesteps_that_never_come_again_are_dropped():
    memory = ConditionMemory()
    for timestep in range(1000):
        memory.time(float(timestep)).temb = torch.zeros(1)
    assert memory.nbytes == 64 * 4
    first = memory.time(999.0)
    for timestep in range(63):
        memory.time(float(timestep))
    assert memory.time(999.0) is first  # the least recently used go first
