"""The forwards that are named for each sampler are the ones that a long video takes, and cost what is said."""

import pytest
import torch
from naive_video import TEXT_DIM, NaiveTransformer, randn
from saved_rollouts import generator

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.scripts.costs.allocations import flop_counter
from wan_autoregressive.scripts.costs.sampler_costs import steady_costs, steady_forwards

STEPS = (1000, 700, 400)
SIZE = {"height": 32, "width": 48, "chunk_frames": 2, "output_type": "latent", "switch_policy": "cross_attention"}
SAMPLERS = {
    "chunkwise": {"window_frames": 6, "sink_frames": 1},
    "chunkwise without a context pass": {"window_frames": 6, "clean_pass": False},
    "memory_bank": {"window_frames": 6, "sink_frames": 1, "memory_bank_frames": 2},
    "rolling": {
        **{"window_frames": 14, "sink_frames": 2, "position_mode": "sink_relative"},
        "sampler_options": {"attended_frames": 12},
    },
    "rolling with little in sight": {
        **{"window_frames": 8, "sink_frames": 2, "position_mode": "sink_relative"},
        "sampler_options": {"attended_frames": 6},
    },
    "recompute": {"window_frames": 5, "sampler_options": {"keep_first_frame": True}},
    "stream_batch": {"window_frames": 6, "sink_frames": 1},
    "stream_batch, sequential": {"window_frames": 6, "sampler_options": {"sequential": True}},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_steady_chunk_takes_these_forwards_and_flops(name, monkeypatch):
    settings = {**SIZE, **SAMPLERS[name], "sampler": name.split()[0].strip(",")}
    pipe = NaiveTransformer(prompts=[randn(1, 5, TEXT_DIM)]).pipeline(STEPS)
    rollout = pipe.rollout(prompt_embeds=randn(1, 5, TEXT_DIM), **settings, generator=generator())
    for _ in range(9):
        rollout.step()
    taken = []
    forward = CausalWanTransformer3DModel.forward

    def noted(self, hidden_states, *args, **kwargs):
        rows, frames = hidden_states.shape[0], hidden_states.shape[2]
        taken.append((frames, rows, kwargs["attention_kwargs"]["plan"].keys_values_only))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(CausalWanTransformer3DModel, "forward", noted)
    with torch.no_grad(), flop_counter() as counter:
        rollout.step()

    config = RolloutConfig(**settings, max_sequence_length=5)
    named = steady_forwards(config, len(STEPS))
    forwards = [*named["clean_pass"], *named["denoise"]]
    assert taken == [(one.frames, one.rows, one.keys_values_only) for one in forwards]
    costs = steady_costs(dict(pipe.transformer.config), config, len(STEPS), 2 * 3, itemsize=4)
    assert counter.get_total_flops() == sum(of_stage.flops for of_stage in costs.values())
    kept = sum(one.rows * one.kept for one in forwards)
    per_frame = 2 * 2 * (2 * 3) * 2 * 20 * 4  # keys and values, blocks, tokens, heads, head_dim, bytes
    assert sum(of_stage.kv_written_bytes for of_stage in costs.values()) == kept * per_frame


def test_without_a_window_or_a_formula_there_is_no_answer():
    with pytest.raises(ValueError, match="set window_frames"):
        steady_forwards(RolloutConfig(height=32, width=32), 3)
