"""`wan-ar benchmark` from the flags to its JSON. Counts are exact; no second is ever compared with another."""

import functools
import json
import math
import statistics

import pytest
import torch
import torch._inductor.config
from PIL import Image

from wan_autoregressive.scripts.benchmark import compiled
from wan_autoregressive.scripts.benchmark.baselines import baseline_setup, resolve_baseline
from wan_autoregressive.scripts.benchmark.build import build_pipeline, start_rollout
from wan_autoregressive.scripts.benchmark.costs import (
    flops_per_chunk,
    flops_per_forward,
    kv_bytes_read,
    kv_bytes_written,
)
from wan_autoregressive.scripts.benchmark.counting import count_step
from wan_autoregressive.scripts.benchmark.presets import PRESETS
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings
from wan_autoregressive.scripts.cli import main

STEPS, CHUNK_TOKENS, TOKENS_PER_FRAME = 2, 48, 16


FOREIGN_BASELINE = """
def make_nothing(setup):
    return lambda index: setup.latents_shape
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = ["--layers", "2", "--steps", str(STEPS), "--chunks", "14", "--threads", "1", "--repeats", "2"]
    arguments += ["--roofline", "--baseline", "recompute", "--baseline", "concat"]
    arguments += ["--baseline", "foreign_baseline:make_nothing"]
    arguments += ["--decode-alongside", "--compile", "blocks", "--sweep", "chunk", "--sweep-values", "1,3"]
    arguments += ["--json", str(folder / "report.json"), "--plot", str(folder / "plot.png")]
    threads = torch.get_num_threads()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "foreign_baseline.py").write_text(FOREIGN_BASELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(elsewhere)
        # Inductor's kernels take a minute to be built.
        without_kernels = functools.partial(compiled.measure_compiled, backend="eager")
        patch.setattr(compiled, "measure_compiled", without_kernels)
        assert main(["benchmark", *arguments]) == 0
    assert torch.get_num_threads() == threads
    with Image.open(folder / "plot.png") as image:
        assert image.format == "PNG"
    assert sorted(path.name for path in folder.iterdir()) == ["plot.png", "report.json"]
    return json.loads((folder / "report.json").read_text())


def demo_config() -> dict:
    return PRESETS["demo"].transformer_config(2)


def test_counts_of_every_chunk_are_those_of_the_formulas(report):
    config = demo_config()
    for chunk in report["rollout"]["chunks"]:
        attended = min(9 * TOKENS_PER_FRAME, (chunk["index"] + 1) * CHUNK_TOKENS)
        before = min(9 * TOKENS_PER_FRAME, chunk["index"] * CHUNK_TOKENS)
        denoise, clean_pass = chunk["counts"]["denoise"], chunk["counts"]["clean_pass"]
        flops = flops_per_chunk(config, chunk["index"], CHUNK_TOKENS, 9 * TOKENS_PER_FRAME, STEPS)
        assert {"denoise": denoise["flops"], "clean_pass": clean_pass["flops"]} == flops
        assert denoise["forwards"] == STEPS
        assert denoise["kv_written_bytes"] == STEPS * kv_bytes_written(config, CHUNK_TOKENS, 4)
        assert denoise["kv_read_bytes"] == STEPS * kv_bytes_read(config, attended, 4)
        if chunk["index"] == 0:
            assert set(clean_pass.values()) == {0}
            continue
        assert clean_pass["forwards"] == 1
        assert clean_pass["kv_written_bytes"] == kv_bytes_written(config, CHUNK_TOKENS, 4)
        assert clean_pass["kv_read_bytes"] == kv_bytes_read(config, before, 4, keys_values_only=True)


def test_a_steady_chunk_always_allocates_the_same(report):
    chunks = report["rollout"]["chunks"]
    assert all(chunk["counts"] == chunks[3]["counts"] for chunk in chunks[3:])
    for stage in ("denoise", "decode"):
        counts = [chunk["counts"][stage] for chunk in chunks]
        memory_for_known_times = 2 if stage == "denoise" else 0  # embedding and modulation, once one is used again
        assert counts[1]["allocations"] - memory_for_known_times == counts[2]["allocations"] > 0
        assert counts[2]["allocations"] == counts[3]["allocations"]
        assert all(0 < count["peak_bytes"] <= count["allocated_bytes"] for count in counts)
    # Only the first chunk makes the cache's buffers: two per layer.
    first, second = chunks[0]["counts"]["denoise"], chunks[1]["counts"]["denoise"]
    assert first["allocations"] - second["allocations"] >= 4
    assert report["rollout"]["kv_cache_bytes"] == 2 * 2 * 9 * TOKENS_PER_FRAME * 128 * 4


def test_the_report_has_all_its_parts(report):
    assert report["settings"]["height"] == 64
    assert report["geometry"]["tokens_per_frame"] == TOKENS_PER_FRAME
    assert {"torch", "diffusers", "device", "threads", "cores"} <= set(report["conditions"])
    rollout = report["rollout"]
    assert [chunk["pixel_frames"] for chunk in rollout["chunks"]] == [9] + [12] * 13
    assert rollout["fit"]["chunks"] == rollout["cpu_time_fit"]["chunks"] == rollout["relative_fit"]["chunks"] == 11
    assert all(math.isfinite(rollout["relative_fit"][name]) for name in rollout["relative_fit"])
    assert 0 < rollout["frames_per_second_with_vae"] < rollout["frames_per_second_without_vae"]
    positive = [rollout["first_frame_latency_s"], report["roofline"]["efficiency"]]
    positive += [report["roofline"]["bare_tflops_per_s"], *report["roofline"]["pipeline_s"]]
    for baseline in report["baselines"]:
        positive += [baseline["ratio"], baseline["median_s"]]
        assert len(baseline["seconds"]) == len(baseline["pipeline_seconds"]) == 2
    assert all(math.isfinite(figure) and figure > 0 for figure in positive)
    assert len(report["baselines"]) == 3


def test_the_roofline_does_the_pipelines_products_and_nothing_else(report):
    steady = report["rollout"]["chunks"][-1]["counts"]
    roofline = report["roofline"]
    assert roofline["flops"] == steady["denoise"]["flops"] + steady["clean_pass"]["flops"]
    # Self and cross in two layers; a clean pass has none in its last.
    assert roofline["attention_calls"] == STEPS * 2 * 2 + 2
    assert len(roofline["bare_s"]) == len(roofline["pipeline_s"]) == 2


def test_a_baseline_without_a_cache_does_more_work(report):
    steady = report["rollout"]["chunks"][-1]["counts"]
    ours = steady["denoise"]["flops"] + steady["clean_pass"]["flops"]
    by_name = {baseline["name"]: baseline for baseline in report["baselines"]}
    window = flops_per_forward(demo_config(), 9 * TOKENS_PER_FRAME, groups=1)
    assert by_name["recompute"]["flops"] == STEPS * window
    per_token = flops_per_forward(demo_config(), CHUNK_TOKENS, 6 * TOKENS_PER_FRAME, groups=CHUNK_TOKENS)
    assert by_name["concat"]["flops"] == (STEPS + 1) * per_token > ours


def test_a_sweep_has_a_row_for_each_value(report):
    rows = report["sweep"]
    assert [row["value"] for row in rows] == ["1", "3"]
    assert [row["chunk_tokens"] for row in rows] == [16, 48]
    assert rows[0]["flops"] < rows[1]["flops"]
    assert rows[0]["kv_cache_bytes"] == rows[1]["kv_cache_bytes"]


def test_decoding_alongside_is_measured_in_turns(report):
    result = report["decode_alongside"]
    for way in ("one_after_the_other", "alongside"):
        assert len(result[way]["total_s"]) == len(result[way]["interval_s"]) == 2
        assert all(0 < i < t for i, t in zip(result[way]["interval_s"], result[way]["total_s"], strict=True))
    for name in ("total", "interval"):
        medians = {way: statistics.median(result[way][f"{name}_s"]) for way in ("alongside", "one_after_the_other")}
        assert result[f"{name}_ratio"] == medians["alongside"] / medians["one_after_the_other"]
    assert result["torch_threads"] == 1


def test_compiling_is_measured_in_turns_behind_the_warm_up(report):
    result = report["compiled"]
    assert result["part"] == "blocks"
    assert len(result["eager_s"]) == len(result["compiled_s"]) == 2
    assert result["ratio"] == statistics.median(result["compiled_s"]) / statistics.median(result["eager_s"])
    assert result["warm_up_chunks"] == 4  # a window of 3 chunks, and one that evicts
    assert 0 < result["compile_s"] < result["warm_up_s"]
    # Text to be computed or ready; the last block also ends at the keys and values of a clean pass.
    assert result["graphs"] == 3
    assert result["largest_difference"] < 1e-5


@pytest.mark.parametrize("part", ["blocks", "model"])
def test_what_is_compiled_is_a_copy_on_the_same_weights(part):
    settings = BenchmarkSettings(layers=1, steps=1, window_frames=6, with_vae=False, repeats=1)
    pipe = build_pipeline(settings)
    before = {name: tensor.data_ptr() for name, tensor in pipe.transformer.state_dict().items()}
    made = []

    def backend(graph, example_inputs):
        made.append(graph)
        return graph.forward

    result = compiled.measure_compiled(pipe, settings, part, backend)
    assert result.graphs == len(made) > 0
    assert all(module._compiled_call_impl is None for module in pipe.transformer.modules())
    assert {name: tensor.data_ptr() for name, tensor in pipe.transformer.state_dict().items()} == before
    start_rollout(pipe, settings).step()
    assert result.graphs == len(made)


def test_without_a_compiler_the_command_says_so(capsys):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert main(["benchmark", "--compile", "model"]) == 2
    captured = capsys.readouterr()
    assert "needs a C++ compiler" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("name", ["concat", "fused-qkv"])
def test_a_baseline_with_a_cache_makes_the_pipelines_latents(name):
    settings = BenchmarkSettings(layers=2, steps=STEPS, window_frames=6, sink_frames=0, with_vae=False)
    pipe = build_pipeline(settings)
    rollout = start_rollout(pipe, settings)
    with torch.no_grad():
        make_chunk = resolve_baseline(name)(baseline_setup(pipe, settings))
        for index in range(4):
            torch.testing.assert_close(make_chunk(index), rollout.step().latents, rtol=0, atol=1e-5)


def test_counting_changes_nothing_and_leaves_no_hooks():
    settings = BenchmarkSettings(layers=1, steps=STEPS, window_frames=None, sink_frames=0, chunks=3)
    pipe = build_pipeline(settings)
    counted, plain = start_rollout(pipe, settings), start_rollout(pipe, settings)
    for _ in range(2):
        counts = count_step(counted)
        plain.step()
    assert torch.equal(counted.step().frames, plain.step().frames)
    assert counts["denoise"].kv_read_bytes == STEPS * kv_bytes_read({**demo_config(), "num_layers": 1}, 96, 4)
    modules = [*pipe.transformer.modules(), *pipe.vae.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_as_in_a_loaded_checkpoint(dtype):
    state = torch.random.get_rng_state()
    pipe = build_pipeline(BenchmarkSettings(layers=1, dtype=dtype))
    assert torch.equal(torch.random.get_rng_state(), state)
    transformer = pipe.transformer
    assert transformer.dtype == transformer.blocks[0].ffn.net[0].proj.weight.dtype == getattr(torch, dtype)
    assert transformer.blocks[0].norm2.weight.dtype == torch.float32 if transformer.config.cross_attn_norm else True
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window-frames", "none", "--roofline"], "need --window-frames"),
        (["--window-frames", "none", "--compile", "blocks"], "need --window-frames"),
        (["--compile", "everything"], "argument --compile"),
        (["--window-frames", "4"], "must be at least 6"),
        (["--json", "no/such/folder/x.json"], "the folder of no/such/folder/x.json does not exist"),
        (["--decode-alongside", "--no-vae"], "needs --vae and at least 2"),
        (["--decode-alongside", "--chunks", "1"], "needs --vae and at least 2"),
        (["--baseline", "nothing"], "the baseline is 'nothing'"),
        (["--sweep-values", "3"], "--sweep-values needs --sweep"),
        (["--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
        (["--threads", "0"], "threads is 0"),
        (["--window-frames", "many"], "argument --window-frames"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_is_measured(arguments, message, capsys):
    try:
        code = main(["benchmark", *arguments])
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
