"""What the benchmark counts and computes, apart from seconds."""

import math

import pytest
import torch
from PIL import Image

from wan_autoregressive import CausalWanTransformer3DModel, WanKVCache
from wan_autoregressive.scripts.benchmark.baselines import resolve_baseline
from wan_autoregressive.scripts.benchmark.clock import interleaved, median_ratio
from wan_autoregressive.scripts.benchmark.costs import flops_per_forward, kv_bytes_read, kv_bytes_written
from wan_autoregressive.scripts.benchmark.counting import AllocationMode, StageCounts, flop_counter
from wan_autoregressive.scripts.benchmark.fit import fit_line
from wan_autoregressive.scripts.benchmark.plot import draw_chunk_times, nice_step
from wan_autoregressive.scripts.benchmark.presets import PRESETS
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings
from wan_autoregressive.scripts.benchmark.sweep import sweep_settings
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


def test_real_13b_layers_are_counted_as_published():
    """30 layers at 480x832, 21 latent frames: the known 1.3B size, and about what its papers say of a forward."""
    config = {**PRESETS["1.3b-layer"].transformer_config(30)}
    tokens = 21 * PRESETS["1.3b-layer"].tokens_per_frame(480, 832)
    assert tokens == 32760
    assert flops_per_forward(config, tokens) == pytest.approx(2.8e14, rel=0.05)
    assert PRESETS["5b-layer"].tokens_per_frame(704, 1280) == 880
    assert PRESETS["14b-layer"].dim == 5120


def test_allocations_are_storages_that_an_operation_makes():
    counts, later = StageCounts(), StageCounts()
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


def test_a_line_is_found_again():
    fit = fit_line(range(10, 110), [2.0 + 0.002 * index for index in range(10, 110)])
    assert fit.slope_s_per_chunk == pytest.approx(0.002)
    assert fit.intercept_s == pytest.approx(2.0)
    assert fit.percent_per_100_chunks == pytest.approx(100 * 0.2 / fit.mean_s)
    assert fit.standard_error_percent == pytest.approx(0, abs=1e-6)
    noisy = fit_line(range(50), [1.0 + 0.1 * (-1) ** index for index in range(50)])
    assert abs(noisy.percent_per_100_chunks) < 3 * noisy.standard_error_percent
    with pytest.raises(ValueError, match="got 2 and 2"):
        fit_line([0, 1], [1.0, 1.0])


def test_rounds_take_turns():
    order = []

    def work(name):
        return lambda: order.append(name) or float(len(order))

    seconds = interleaved({"a": work("a"), "b": work("b"), "c": work("c")}, 3)
    assert "".join(order) == "abcbcacab"
    assert seconds == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 1.0]) == 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "2b"}, "the preset is '2b'; allowed are demo, 1.3b-layer"),
        ({"dtype": "int8"}, "the dtype is 'int8'; allowed are float32"),
        ({"layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"window_frames": 5}, "a sink of 3 and a chunk of 3 latent frames; it must be at least 6"),
        ({"window_frames": None}, "sink_frames is 3 but window_frames is not set"),
        ({"chunks": 400}, "400 chunks of 3 are 1200 latent frames; absolute positions end at 1024"),
        ({"height": 72}, "the size is 72x64; demo takes positive multiples of 16 pixels"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**changes)


def test_the_window_is_full_after_as_many_chunks_as_it_holds():
    settings = BenchmarkSettings(window_frames=7, sink_frames=1)
    assert settings.chunks_to_fill == 3
    assert [settings.attended_tokens(index) // 16 for index in range(4)] == [3, 6, 7, 7]
    assert BenchmarkSettings(chunks=400, position_mode="relative").chunks == 400
    with pytest.raises(ValueError, match="every chunk costs more than the last"):
        _ = BenchmarkSettings(window_frames=None, sink_frames=0).chunks_to_fill


def test_sweep_values_become_settings():
    settings = BenchmarkSettings()
    assert [p.window_frames for p in sweep_settings(settings, "window", None).values()] == [6, 9, 12, 18]
    assert {v: p.pixels for v, p in sweep_settings(settings, "resolution", ["32x48"]).items()} == {"32x48": (32, 48)}
    chunk = sweep_settings(settings, "chunk", ["1", "8"])
    assert [(p.chunk_frames, p.window_frames) for p in chunk.values()] == [(1, 9), (8, 11)]
    kept = sweep_settings(settings, "kv-dtype", None)
    assert {value: point.kv_dtype for value, point in kept.items()} == {"model": None, "int8": "int8"}
    modes = sweep_settings(settings, "position", None)
    assert {value: point.position_mode for value, point in modes.items()} == {mode: mode for mode in modes}
    assert list(sweep_settings(settings, "resolution", None)) == ["32x32", "48x48", "64x64", "96x96"]
    for kind, value in (("resolution", "64"), ("window", "x"), ("chunk", "0"), ("chunk", "2x2")):
        with pytest.raises(ValueError, match=f"the sweep value is '{value}'"):
            sweep_settings(settings, kind, [value])


def test_baselines_are_found_by_name_or_as_module_and_function():
    assert resolve_baseline("concat").__name__ == "concat"
    assert resolve_baseline("math:sqrt") is math.sqrt
    with pytest.raises(ValueError, match="allowed are recompute, concat, fused-qkv and module:function"):
        resolve_baseline("unknown")
    with pytest.raises(ValueError, match="cannot be imported"):
        resolve_baseline("math:nothing")
    with pytest.raises(ValueError, match="is a float, not a function"):
        resolve_baseline("math:pi")


def test_the_plot_is_a_png_and_ticks_are_round_numbers(tmp_path):
    seconds = [0.5 + 0.001 * index for index in range(30)]
    draw_chunk_times(tmp_path / "plot.png", seconds, "title", fit_line(range(10, 30), seconds[10:]))
    draw_chunk_times(tmp_path / "one.png", [0.5], "a single chunk")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        colours = {colour for _, colour in image.getcolors(maxcolors=100_000)}
    assert {(31, 119, 180), (214, 39, 40)} <= colours
    assert [nice_step(least) for least in (0.03, 0.2, 1, 3, 700)] == pytest.approx([0.05, 0.2, 1, 5, 1000])
    with pytest.raises(ValueError, match="no chunks"):
        draw_chunk_times(tmp_path / "none.png", [], "")


def test_bytes_are_written_for_people():
    assert [human_bytes(n) for n in (0, 1536, 3 * 2**20, 5 * 2**30)] == ["0 B", "1.5 KiB", "3 MiB", "5 GiB"]
