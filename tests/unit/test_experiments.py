"""What the experiments compute, apart from seconds."""

import math

import pytest

from benchmarks.baselines import resolve_baseline
from benchmarks.clock import interleaved, median_ratio
from benchmarks.long_rollout import fit_line
from benchmarks.sweep import sweep_workloads
from wan_autoregressive.scripts.costs.workload import make_workload


def test_a_line_is_found_again():
    fit = fit_line(range(10, 110), [2.0 + 0.002 * index for index in range(10, 110)])
    assert fit.slope == pytest.approx(0.002)
    assert fit.intercept == pytest.approx(2.0)
    assert fit.percent_per_100_chunks == pytest.approx(100 * 0.2 / fit.mean)
    assert fit.standard_error_percent == pytest.approx(0, abs=1e-6)
    noisy = fit_line(range(50), [1.0 + 0.1 * (-1) ** index for index in range(50)])
    assert abs(noisy.percent_per_100_chunks) < 3 * noisy.standard_error_percent


def test_rounds_take_turns():
    order = []

    def work(name):
        return lambda: order.append(name) or float(len(order))

    seconds = interleaved({"a": work("a"), "b": work("b"), "c": work("c")}, 3)
    assert "".join(order) == "abcbcacab"
    assert seconds == {"a": [1.0, 6.0, 8.0], "b": [2.0, 4.0, 9.0], "c": [3.0, 5.0, 7.0]}
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 1.0]) == 4.0


def test_sweep_values_become_workloads():
    def rollouts(kind, values=None):
        return {value: point.rollout for value, point in sweep_workloads(make_workload(), kind, values).items()}

    assert [rollout.window_frames for rollout in rollouts("window").values()] == [6, 9, 12, 18]
    assert {v: (r.height, r.width) for v, r in rollouts("resolution", ["32x48"]).items()} == {"32x48": (32, 48)}
    assert [(r.chunk_frames, r.window_frames) for r in rollouts("chunk", ["1", "8"]).values()] == [(1, 9), (8, 11)]
    assert {value: r.kv_dtype for value, r in rollouts("kv-dtype").items()} == {"model": None, "int8": "int8"}
    modes = rollouts("position")
    assert {value: r.position_mode for value, r in modes.items()} == {mode: mode for mode in modes}
    assert list(rollouts("resolution")) == ["32x32", "48x48", "64x64", "96x96"]
    for kind, value in (("resolution", "64"), ("window", "x"), ("chunk", "0"), ("chunk", "2x2"), ("kv-dtype", "x")):
        with pytest.raises(ValueError, match=f"the sweep value is '{value}'"):
            rollouts(kind, [value])
    with pytest.raises(ValueError, match="position_mode is 'x'"):
        rollouts("position", ["x"])


def test_baselines_are_found_by_name_or_as_module_and_function():
    assert resolve_baseline("concat").__name__ == "concat"
    assert resolve_baseline("math:sqrt") is math.sqrt
    with pytest.raises(ValueError, match="allowed are recompute, concat, fused-qkv and module:function"):
        resolve_baseline("unknown")
    with pytest.raises(ValueError, match="cannot be imported"):
        resolve_baseline("math:nothing")
    with pytest.raises(ValueError, match="is a float, not a function"):
        resolve_baseline("math:pi")
