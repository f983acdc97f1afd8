"""What a rollout costs: the formulas, the counters they are held against, sizes and workloads."""

import dataclasses
import math

import pytest
import torch

from wan_autoregressive import CausalWanTransformer3DModel, WanKVCache, demo_checkpoint
from wan_autoregressive.scripts.costs.allocations import AllocationCounts, AllocationMode, flop_counter
from wan_autoregressive.scripts.costs.formulas import (
    attended_tokens,
    flops_per_forward,
    kv_bytes_read,
    kv_bytes_written,
)
from wan_autoregressive.scripts.costs.sizes import ModelSizes
from wan_autoregressive.scripts.costs.workload import make_workload
from wan_autoregressive.scripts.run_report import human_bytes

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "ffn_dim": 72,
    "num_layers": 2,
    "text_dim": 24,
    "freq_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
}
WIDE = {**SMALL, "num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 3, "ffn_dim": 50}
UNEVEN = {**SMALL, "in_channels": 6, "out_channels": 2, "patch_size": (1, 1, 2), "text_dim": 10}


def measured_flops(model, frames, height, width, text_tokens, batch, groups, cache=None, offset=0) -> int:
    latents = torch.zeros(batch, model.config.in_channels, frames, height, width)
    text = torch.zeros(batch, text_tokens, model.config.text_dim)
    with torch.no_grad(), flop_counter() as counter:
        model(
            latents,
            torch.zeros(batch, groups),
            text,
            frame_offset=offset,
            attention_kwargs=None if cache is None else {"kv_cache": cache},
        )
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [SMALL, WIDE, UNEVEN], ids=["small", "wide", "uneven"])
@pytest.mark.parametrize(("batch", "frames", "height", "width", "text_tokens"), [(1, 3, 4, 6, 7), (2, 1, 8, 4, 5)])
def test_flops_of_a_real_forward_are_those_of_the_formula(config, batch, frames, height, width, text_tokens):
    model = CausalWanTransformer3DModel(**config).eval()
    config = dict(model.config)
    tokens = frames * height * width // math.prod(config["patch_size"])
    shapes = (frames, height, width, text_tokens, batch)
    for groups in (1, frames, tokens):
        expected = flops_per_forward(config, tokens, 0, text_tokens, batch, groups)
        assert measured_flops(model, *shapes, groups) == expected

    window = 2 * tokens + tokens // frames  # the third chunk evicts
    cache = WanKVCache(len(model.blocks), window_size=window)
    for chunk, cached in enumerate((0, tokens, window - tokens)):
        for step in range(3):  # the last one stands for the clean pass, which costs the same
            cache.enable_append_mode() if step == 0 else cache.enable_overwrite_mode()
            measured = measured_flops(model, *shapes, frames, cache, offset=chunk * frames)
            assert measured == flops_per_forward(config, tokens, cached, text_tokens, batch, frames)


def test_work_that_is_not_done_again_is_left_out_of_the_formula():
    model = CausalWanTransformer3DModel(**SMALL)
    config, tokens, text, dim = dict(model.config), 18, 7, 40
    whole = flops_per_forward(config, tokens, 6, text, groups=3)
    text_part = 2 * text * (24 * dim + dim * dim) + 2 * 4 * text * dim * dim
    time_part = 2 * 3 * (32 * dim + 7 * dim * dim)
    assert whole - flops_per_forward(config, tokens, 6, text, groups=3, text_ready=True) == text_part
    assert whole - flops_per_forward(config, tokens, 6, text, groups=3, time_ready=True) == time_part
    one_layer = flops_per_forward({**config, "num_layers": 1}, tokens, 6, text, groups=3)
    head, last_keys_values = 2 * tokens * dim * 16, 4 * tokens * dim * dim
    stopped = flops_per_forward(config, tokens, 6, text, groups=3, keys_values_only=True)
    assert stopped == one_layer - head + last_keys_values
    assert kv_bytes_written(config, tokens, 4, batch=2) == 2 * 2 * 2 * tokens * dim * 4
    assert kv_bytes_read(config, 24, 2) == 2 * 2 * 24 * dim * 2
    assert kv_bytes_read(config, 24, 2, keys_values_only=True) == 2 * 24 * dim * 2


def test_the_13b_model_is_counted_as_published():
    """30 layers at 480x832, 21 latent frames: the known 1.3B size, and about what its papers say of a forward."""
    sizes = ModelSizes.of_preset("1.3b")
    tokens = 21 * sizes.tokens_per_frame(480, 832)
    assert tokens == 32760
    assert flops_per_forward(sizes.transformer, tokens) == pytest.approx(2.8e14, rel=0.05)
    assert ModelSizes.of_preset("5b").tokens_per_frame(704, 1280) == 880
    assert ModelSizes.of_preset("14b").dim == 5120


def test_the_demo_is_the_shipped_checkpoint():
    demo = ModelSizes.of_preset("demo")
    assert demo == dataclasses.replace(ModelSizes.of_folder(demo_checkpoint()), name="demo", height=64, width=64)
    transformer = CausalWanTransformer3DModel.from_pretrained(demo_checkpoint(), subfolder="transformer")
    assert demo.dim == transformer.config.num_attention_heads * transformer.config.attention_head_dim
    assert demo.layers == len(transformer.blocks)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no checkpoint in '.*': transformer/config\.json is missing"):
        ModelSizes.of_folder(tmp_path)
    with pytest.raises(ValueError, match=r"the preset is '2b'; allowed are demo, 1\.3b, 5b, 14b, a14b"):
        ModelSizes.of_preset("2b")


def test_allocations_are_storages_that_an_operation_makes():
    counts, later = AllocationCounts(), AllocationCounts()
    held = torch.zeros(4, 8)
    with AllocationMode(counts) as mode:
        view = held.transpose(0, 1)[2:]
        view.add_(1)
        assert counts.allocations == 0
        first = held + 1  # 128 bytes
        second = first.double()  # 256
        assert (counts.allocations, counts.allocated_bytes, counts.peak_bytes) == (2, 384, 384)
        del first
        third = second[0] * 2  # 64; the 128 are free again
        assert (counts.allocations, counts.allocated_bytes, counts.peak_bytes) == (3, 448, 384)
        mode.start_stage(later)
        torch.empty(2)
    assert counts.allocations == 3
    assert third.numel() == 8
    assert (later.allocations, later.allocated_bytes, later.peak_bytes) == (1, 8, 328)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "the dtype is 'int8'; allowed are float32"),
        ({"chunks": 0}, "chunks is 0; it must be at least 1"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"window_frames": 5}, "a sink of 3 and a chunk of 3 latent frames; it must be at least 6"),
        ({"window_frames": None, "sink_frames": 3}, "sink_frames is 3 but window_frames is not set"),
        ({"chunks": 400}, "400 chunks of 3 are 1200 latent frames; absolute positions end at 1024"),
        ({"height": 72}, "the size is 72x64; demo takes positive multiples of 16x16 pixels"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_workload(**changes)


def test_the_window_is_full_after_as_many_chunks_as_it_holds():
    workload = make_workload(window_frames=7, sink_frames=1)
    assert workload.chunks_to_fill == 3
    tokens = [attended_tokens(index, workload.chunk_tokens, workload.window_tokens) for index in range(4)]
    assert [count // 16 for count in tokens] == [3, 6, 7, 7]
    assert make_workload(chunks=400, position_mode="relative").chunks == 400
    with pytest.raises(ValueError, match="every chunk costs more than the last"):
        _ = make_workload(window_frames=None).chunks_to_fill


def test_bytes_are_written_for_people():
    assert [human_bytes(n) for n in (0, 1536, 3 * 2**20, 5 * 2**30)] == ["0 B", "1.5 KiB", "3 MiB", "5 GiB"]
