"""torch.compile over a whole rollout: no graph break, few graphs, the same latents."""

import pytest
import torch

from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline

NUM_LAYERS = 2
CHUNKS = 20


def rollout_latents(model, **options) -> torch.Tensor:
    pipe = WanAutoregressivePipeline(None, None, model, None, SelfForcingScheduler())
    pipe.set_progress_bar_config(disable=True)
    prompts = [torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return pipe(
        prompt_embeds=prompts[0],
        prompt_schedule={12: prompts[1]},
        height=32,
        width=32,
        num_frames=4 * (3 * CHUNKS - 1) + 1,
        window_frames=9,
        sink_frames=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).frames


@pytest.mark.parametrize("position_mode", ["absolute", "relative", "sink_relative"])
def test_compiled_blocks_settle_on_a_few_graphs(position_mode):
    """20 chunks with a window, a sink and a prompt switch; bookkeeping stays outside of the graphs."""
    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CausalWanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=20, ffn_dim=32, num_layers=NUM_LAYERS, text_dim=16, freq_dim=32
        ).eval()
    expected = rollout_latents(model, position_mode=position_mode)

    graphs = []

    def count_graphs(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model.compile_repeated_blocks(fullgraph=True, backend=count_graphs)
    compiled = rollout_latents(model, position_mode=position_mode)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)
    assert 0 < len(graphs) <= 4 * NUM_LAYERS
