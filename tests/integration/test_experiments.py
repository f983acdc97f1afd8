"""The experiments of `benchmarks/` from the flags to their JSON. No second is ever compared with another."""

import argparse
import functools
import json
import statistics

import pytest
import torch
import torch._inductor.config
from PIL import Image

from benchmarks import alongside, baselines, compiled, long_rollout, roofline, stream_batch, sweep
from benchmarks.counting import count_step
from benchmarks.experiment import Bench
from wan_autoregressive.scripts.costs.build import build_pipeline, start_rollout
from wan_autoregressive.scripts.costs.formulas import costs_per_chunk, flops_per_forward
from wan_autoregressive.scripts.costs.workload import make_workload

STEPS, CHUNK_TOKENS, TOKENS_PER_FRAME = 2, 48, 16
FLAGS = ["--layers", "2", "--steps", str(STEPS), "--threads", "1", "--repeats", "2"]

FOREIGN_BASELINE = """
def make_nothing(setup):
    return lambda index: setup.latents_shape
"""


def figures_of(experiment, folder, *flags) -> dict:
    experiment.main([*flags, *FLAGS, "--json", str(folder / "figures.json")])
    figures = json.loads((folder / "figures.json").read_text())
    assert {"conditions", "workload"} < set(figures)
    return figures


def bench_of(repeats=1, **flags) -> Bench:
    workload = make_workload(**{"layers": 2, "steps": STEPS, "window_frames": 6, **flags})
    return Bench(argparse.Namespace(repeats=repeats), workload, build_pipeline(workload))


def steady_flops() -> int:
    workload = make_workload(layers=2, steps=STEPS)
    return sum(costs.flops for costs in costs_per_chunk(workload, 4).values())


def test_the_roofline_does_the_pipelines_products_and_nothing_else(tmp_path):
    result = figures_of(roofline, tmp_path)["roofline"]
    assert result["flops"] == steady_flops()
    # Self and cross in two layers; a clean pass has none in its last.
    assert result["attention_calls"] == STEPS * 2 * 2 + 2
    assert len(result["bare_s"]) == len(result["pipeline_s"]) == 2
    assert min(result["efficiency"], result["cpu_time_efficiency"], result["bare_tflops_per_s"]) > 0


def test_lanes_are_compared_with_chunks_one_by_one(tmp_path):
    results = figures_of(stream_batch, tmp_path, "--no-vae", "--chunk-sizes", "1", "3")["stream_batch"]
    assert [(result["chunk_frames"], result["rows"]) for result in results] == [(1, STEPS), (3, STEPS)]
    for result in results:
        assert len(result["chunkwise_s"]) == len(result["stream_batch_s"]) == 2
        assert result["latency_ratio"] == pytest.approx(STEPS / result["throughput_ratio"])


def test_a_baseline_without_a_cache_does_more_work(tmp_path, monkeypatch):
    (tmp_path / "foreign_baseline.py").write_text(FOREIGN_BASELINE)
    monkeypatch.syspath_prepend(tmp_path)
    results = figures_of(baselines, tmp_path, "recompute", "concat", "foreign_baseline:make_nothing")["baselines"]
    recompute, concat, foreign = results
    config = make_workload(layers=2).model.transformer
    assert recompute["flops"] == STEPS * flops_per_forward(config, 9 * TOKENS_PER_FRAME, groups=1)
    per_token = flops_per_forward(config, CHUNK_TOKENS, 6 * TOKENS_PER_FRAME, groups=CHUNK_TOKENS)
    assert concat["flops"] == (STEPS + 1) * per_token > steady_flops()
    assert foreign["flops"] == 0
    for result in results:
        assert result["ratio"] > 0
        assert len(result["seconds"]) == len(result["pipeline_seconds"]) == 2


@pytest.mark.parametrize("name", ["concat", "fused-qkv"])
def test_a_baseline_with_a_cache_makes_the_pipelines_latents(name):
    bench = bench_of(sink_frames=0, with_vae=False)
    rollout = start_rollout(bench.pipe, bench.workload)
    with torch.no_grad():
        make_chunk = baselines.resolve_baseline(name)(baselines.baseline_setup(bench))
        for index in range(4):
            torch.testing.assert_close(make_chunk(index), rollout.step().latents, rtol=0, atol=1e-5)


def test_a_sweep_has_a_row_for_each_value(tmp_path):
    rows = figures_of(sweep, tmp_path, "chunk", "--values", "1,3")["sweep"]
    assert [row["value"] for row in rows] == ["1", "3"]
    assert [row["chunk_tokens"] for row in rows] == [16, 48]
    assert rows[0]["flops"] < rows[1]["flops"] == steady_flops()
    assert rows[0]["kv_cache_bytes"] == rows[1]["kv_cache_bytes"] == 2 * 2 * 9 * TOKENS_PER_FRAME * 192 * 4


@pytest.mark.slow
def test_decoding_alongside_is_measured_in_turns(tmp_path):
    result = figures_of(alongside, tmp_path)["decode_alongside"]
    for way in ("one_after_the_other", "alongside"):
        assert len(result[way]["total_s"]) == len(result[way]["interval_s"]) == 2
        assert all(0 < i < t for i, t in zip(result[way]["interval_s"], result[way]["total_s"], strict=True))
    for name in ("total", "interval"):
        medians = {way: statistics.median(result[way][f"{name}_s"]) for way in ("alongside", "one_after_the_other")}
        assert result[f"{name}_ratio"] == medians["alongside"] / medians["one_after_the_other"]
    assert result["torch_threads"] == 1


@pytest.mark.slow
def test_compiling_is_measured_in_turns_behind_the_warm_up(tmp_path, monkeypatch):
    # Inductor's kernels take a minute to be built.
    monkeypatch.setattr(compiled, "measure_compiled", functools.partial(compiled.measure_compiled, backend="eager"))
    result = figures_of(compiled, tmp_path, "blocks")["compiled"]
    assert result["part"] == "blocks"
    assert len(result["eager_s"]) == len(result["compiled_s"]) == 2
    assert result["ratio"] == statistics.median(result["compiled_s"]) / statistics.median(result["eager_s"])
    assert result["warm_up_chunks"] == 4  # a window of 3 chunks, and one that evicts
    assert 0 < result["compile_s"] < result["warm_up_s"]
    # Text to be computed or ready; the last block also ends at the keys and values of a clean pass.
    assert result["graphs"] == 3
    assert result["largest_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("part", compiled.COMPILED_PARTS)
def test_what_is_compiled_is_a_copy_on_the_same_weights(part):
    bench = bench_of(layers=1, steps=1, with_vae=False)
    pipe = bench.pipe
    before = {name: tensor.data_ptr() for name, tensor in pipe.transformer.state_dict().items()}
    made = []

    def backend(graph, example_inputs):
        made.append(graph)
        return graph.forward

    result = compiled.measure_compiled(bench, part, backend)
    assert result.graphs == len(made) > 0
    assert all(module._compiled_call_impl is None for module in pipe.transformer.modules())
    assert {name: tensor.data_ptr() for name, tensor in pipe.transformer.state_dict().items()} == before
    start_rollout(pipe, bench.workload).step()
    assert result.graphs == len(made)


@pytest.mark.slow
def test_a_long_rollout_is_fitted_behind_the_full_window(tmp_path):
    plot = tmp_path / "plot.png"
    result = figures_of(long_rollout, tmp_path, "--chunks", "14", "--plot", str(plot))["long_rollout"]
    assert result["first_steady"] == 3
    assert len(result["chunk_s"]) == len(result["probe_s"]) == 14
    assert result["seconds"]["mean"] == pytest.approx(statistics.mean(result["chunk_s"][3:]))
    ratios = [chunk / probe for chunk, probe in zip(result["chunk_s"][3:], result["probe_s"][3:], strict=True)]
    assert result["in_probes"]["mean"] == pytest.approx(statistics.mean(ratios))
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_counting_changes_nothing_and_leaves_no_hooks():
    workload = make_workload(layers=1, steps=STEPS, window_frames=None, chunks=3)
    pipe = build_pipeline(workload)
    counted, plain = start_rollout(pipe, workload), start_rollout(pipe, workload)
    for _ in range(2):
        count_step(counted)
        plain.step()
    assert torch.equal(counted.step().frames, plain.step().frames)
    modules = [*pipe.transformer.modules(), *pipe.vae.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


@pytest.mark.slow
def test_a_steady_chunk_always_allocates_the_same():
    bench = bench_of(window_frames=9)
    rollout = start_rollout(bench.pipe, bench.workload)
    chunks = [count_step(rollout) for _ in range(6)]
    assert chunks[3] == chunks[4] == chunks[5]
    for stage in ("denoise", "decode"):
        counts = [chunk[stage] for chunk in chunks]
        memory_for_known_times = 2 if stage == "denoise" else 0  # embedding and modulation, once one is used again
        assert counts[1].allocations - memory_for_known_times == counts[2].allocations > 0
        assert counts[2].allocations == counts[3].allocations
        assert all(0 < count.peak_bytes <= count.allocated_bytes for count in counts)
    # Only the first chunk makes the cache's buffers: two per layer.
    assert chunks[0]["denoise"].allocations - chunks[1]["denoise"].allocations >= 4


@pytest.mark.parametrize(
    ("experiment", "arguments", "message"),
    [
        (roofline, ["--window-frames", "none"], "need a window; set --window-frames"),
        (roofline, ["--repeats", "0"], "repeats is 0"),
        (compiled, ["everything"], "argument part"),
        (alongside, ["--no-vae"], "needs --vae and at least 2"),
        (alongside, ["--chunks", "1"], "needs --vae and at least 2"),
        (baselines, ["nothing"], "the baseline is 'nothing'"),
        (long_rollout, ["--chunks", "12"], "a line needs at least 13"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_measured(experiment, arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        experiment.main(arguments)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_without_a_compiler_the_command_says_so(capsys):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(SystemExit):
        compiled.main(["model"])
    assert "compiling needs a C++ compiler" in capsys.readouterr().err
