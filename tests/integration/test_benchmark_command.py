"""`wan-ar benchmark` from the flags to its JSON. Costs are exact; no second is ever compared with another."""

import json
import math

import pytest
import torch

from benchmarks.counting import count_step
from wan_autoregressive.scripts.cli import main
from wan_autoregressive.scripts.costs.build import build_pipeline, start_rollout
from wan_autoregressive.scripts.costs.formulas import costs_per_chunk
from wan_autoregressive.scripts.costs.memory import count_decode
from wan_autoregressive.scripts.costs.workload import make_workload


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="window"),
        pytest.param({"window_frames": None, "chunks": 4}, id="no window", marks=pytest.mark.slow),
        pytest.param({"kv_dtype": "int8"}, id="int8", marks=pytest.mark.slow),
    ],
)
def test_costs_are_those_of_a_real_rollout(changes):
    workload = make_workload(layers=2, steps=2, **changes)
    _, decode_flops = count_decode(workload)
    rollout = start_rollout(build_pipeline(workload), workload)
    for index in range(4):
        counted, costs = count_step(rollout), costs_per_chunk(workload, index)
        assert counted["decode"].flops == decode_flops[min(index, 1)] > 0
        assert counted["denoise"].forwards == 2
        assert counted["clean_pass"].forwards == min(index, 1)
        for stage in ("denoise", "clean_pass"):
            for name, figure in vars(costs[stage]).items():
                assert getattr(counted[stage], name) == figure, (index, stage, name)


@pytest.mark.slow
def test_the_report_has_all_its_parts(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["benchmark", "--layers", "2", "--steps", "2", "--chunks", "14", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "demo: 2 layers of 192, 64x64" in printed
    assert "8 chunks are only in the JSON" in printed
    report = json.loads(path.read_text())
    assert report["workload"]["rollout"]["height"] == 64
    assert {"torch", "diffusers", "device", "threads", "cores"} <= set(report["conditions"])
    rollout = report["rollout"]
    assert [chunk["pixel_frames"] for chunk in rollout["chunks"]] == [9] + [12] * 13
    assert rollout["steady_chunks"] == 11
    assert rollout["kv_cache_bytes"] == 2 * 2 * 9 * 16 * 192 * 4
    assert 0 < rollout["frames_per_second"] < rollout["frames_per_second_without_vae"]
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in rollout["steady_stage_s"].values())
    assert rollout["first_frame_latency_s"] >= rollout["chunks"][0]["wall_s"]


def test_frames_of_a_chunk_are_those_that_it_hands_out(tmp_path):
    path = tmp_path / "report.json"
    flags = ["--layers", "1", "--steps", "1", "--chunk-frames", "2", "--window-frames", "none", "--chunks", "3"]
    assert main(["benchmark", *flags, "--no-vae", "--json", str(path)]) == 0
    rollout = json.loads(path.read_text())["rollout"]
    workload = make_workload(layers=1, steps=1, chunk_frames=2, window_frames=None, chunks=3)
    chunks = start_rollout(build_pipeline(workload), workload).chunks()
    assert [chunk["pixel_frames"] for chunk in rollout["chunks"]] == [chunk.frames.shape[1] for chunk in chunks]
    assert rollout["frames_per_second"] is None
    assert rollout["vae_state_bytes"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_as_in_a_loaded_checkpoint(dtype):
    state = torch.random.get_rng_state()
    pipe = build_pipeline(make_workload(layers=1, dtype=dtype))
    assert torch.equal(torch.random.get_rng_state(), state)
    transformer = pipe.transformer
    assert transformer.dtype == transformer.blocks[0].ffn.net[0].proj.weight.dtype == getattr(torch, dtype)
    assert transformer.blocks[0].norm2.weight.dtype == torch.float32 if transformer.config.cross_attn_norm else True
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window-frames", "4"], "must be at least 6"),
        (["--window-frames", "many"], "argument --window-frames"),
        (["--json", "no/such/folder/x.json"], "the folder of no/such/folder/x.json does not exist"),
        (["--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
        (["--threads", "0"], "threads is 0"),
        (["--layers", "0"], "layers is 0"),
        (["--model", "nowhere"], "there is no checkpoint in 'nowhere'"),
        (["--model", "x", "--preset", "5b"], "not allowed with argument"),
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
