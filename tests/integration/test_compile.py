"""torch.compile over a whole rollout: no graph break, few graphs, the same latents."""

import itertools

import pytest
import torch

from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline

pytestmark = pytest.mark.usefixtures("short_tiles")

NUM_LAYERS = 3
CHUNKS = 20


def tiny_model() -> CausalWanTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CausalWanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=20, ffn_dim=32, num_layers=NUM_LAYERS, text_dim=16, freq_dim=32
        ).eval()


def rollout_latents(model, num_frames=4 * (3 * CHUNKS - 1) + 1, switch_frame=12, **options) -> torch.Tensor:
    pipe = WanAutoregressivePipeline(None, None, model, None, SelfForcingScheduler())
    pipe.set_progress_bar_config(disable=True)
    prompts = [torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return pipe(
        prompt_embeds=prompts[0],
        prompt_schedule={switch_frame: prompts[1]},
        height=32,
        width=32,
        num_frames=num_frames,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **{"window_frames": 9, "sink_frames": 3, **options},
    ).frames


def count_graphs_by_block(model) -> dict[int, set[int]]:
    """Compile every block; the graphs that each of them runs are filled in as it does."""
    ran: dict[int, set[int]] = {index: set() for index in range(len(model.blocks))}
    current = 0
    numbers = itertools.count()

    def backend(graph, example_inputs):
        number = next(numbers)

        def run(*inputs):
            ran[current].add(number)
            return graph.forward(*inputs)

        return run

    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    for index, block in enumerate(model.blocks):
        compiled = block._compiled_call_impl

        def call(*args, index=index, compiled=compiled, **kwargs):
            nonlocal current
            current = index
            return compiled(*args, **kwargs)

        block._compiled_call_impl = call
    return ran


@pytest.mark.slow
@pytest.mark.parametrize(
    ("position_mode", "kv_dtype"),
    [(mode, dtype) for mode in ("absolute", "relative", "sink_relative") for dtype in (None, "int8")],
)
def test_compiled_blocks_settle_on_a_few_graphs(position_mode, kv_dtype):
    """20 chunks with a window, a sink and a prompt switch; bookkeeping stays outside of the graphs."""
    torch._dynamo.reset()
    model = tiny_model()
    expected = rollout_latents(model, position_mode=position_mode, kv_dtype=kv_dtype)

    graphs_of_block = count_graphs_by_block(model)
    compiled = rollout_latents(model, position_mode=position_mode, kv_dtype=kv_dtype)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)
    # The prompt is read, a chunk runs; the last block also ends at its keys and values.
    assert [len(graphs) for graphs in graphs_of_block.values()] == [2] * (NUM_LAYERS - 1) + [3]
    # Blocks share them: however many there are, torch's limit of recompilations is not reached.
    assert len(set.union(*graphs_of_block.values())) == 3


ROLLING = {
    **{"sampler": "rolling", "position_mode": "sink_relative", "window_frames": 12},
    "sampler_options": {"attended_frames": 15},
}
GIVEN = {"video_latents": torch.randn(1, 16, 6, 4, 4, generator=torch.Generator().manual_seed(3))}
SAMPLERS = {
    "memory_bank": {"sampler": "memory_bank", "memory_bank_frames": 2},
    "memory_bank, refreshed sink": {"sampler": "memory_bank", "memory_bank_frames": 2, "recache_sink": "refresh"},
    "rolling": ROLLING,
    "rolling, given frames": {**ROLLING, **GIVEN},
    "recompute": {
        **{"sampler": "recompute", "window_frames": 6, "sink_frames": 0, "switch_policy": "cross_attention"},
        "sampler_options": {"keep_first_frame": True},
    },
    "stream_batch": {"sampler": "stream_batch", "switch_policy": "cross_attention"},
    "stream_batch, adaptive sink": {
        **{"sampler": "stream_batch", "switch_policy": "cross_attention", "num_frames": 4 * 44 + 1},
        **{"chunk_frames": 1, "first_chunk_frames": 2, "sampler_options": {"adaptive_sink": 0.5}},
    },
}


def most_graphs(**options) -> int:
    """Of any block, over a video that must be the one of eager blocks."""
    torch._dynamo.reset()
    model = tiny_model()
    expected = rollout_latents(model, **options, switch_frame=33)
    graphs_of_block = count_graphs_by_block(model)
    compiled = rollout_latents(model, **options, switch_frame=33)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)
    return max(len(graphs) for graphs in graphs_of_block.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_4_graphs_for_each_block(name):
    """From the first forward on, with frames that are evicted and a new prompt. All of them together stay below
    torch's limit of recompilations, or it would raise."""
    assert most_graphs(**SAMPLERS[name]) <= 4


@pytest.mark.slow
def test_rolling_over_single_frames_runs_7_graphs_for_each_block():
    """A size of 1 is compiled apart: one frame or several, with a past or without, kept or not."""
    with torch._dynamo.config.patch(recompile_limit=16):
        assert most_graphs(**ROLLING, chunk_frames=1) <= 7


@pytest.mark.slow
def test_the_whole_model_compiles_without_a_break():
    torch._dynamo.reset()
    model = tiny_model()
    expected = rollout_latents(model)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(rollout_latents(model), expected, rtol=0, atol=1e-5)
    # With text, time or both to be computed or ready; a chunk or its clean pass; the re-cache.
    assert 0 < len(graphs) <= 7


@pytest.mark.slow
def test_inductor_makes_the_same_video():
    """Real kernels: the blocks of a tiny model over a rollout with eviction and a prompt switch."""
    torch._dynamo.reset()
    model = tiny_model()
    options = {"num_frames": 4 * (3 * 6 - 1) + 1, "switch_frame": 9}
    expected = rollout_latents(model, **options)
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(rollout_latents(model, **options), expected, rtol=0, atol=1e-5)
