"""Every part of `benchmarks.gpu` at tiny sizes on a CPU: what it writes down, and that the command runs it."""

import functools
import importlib
import json

import pytest
from recorded_operations import record_to_replay

from benchmarks import gpu
from benchmarks.gpu_kit import graphs
from benchmarks.gpu_kit.captured_forwards import CapturedForwards
from benchmarks.gpu_kit.parts import PARTS
from benchmarks.gpu_kit.setting import Record, Setting

pytestmark = pytest.mark.slow

# Tiny ones of the same function are all alike.
ON_A_CPU = {part.function: part for part in PARTS if not part.needs_cuda}.values()


def tables_of(part, folder) -> dict[str, list[dict]]:
    module, _, name = part.function.partition(":")
    record = Record(folder / "record.json")
    getattr(importlib.import_module(module), name)(Setting("cpu", is_tiny=True), record, **part.arguments)
    written = json.loads((folder / "record.json").read_text())
    assert written == record.tables
    return written


def column(rows, title) -> list:
    return [row[title] for row in rows if title in row]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The tables of all parts that run on a CPU, by the part's name."""
    return {part.name: tables_of(part, tmp_path_factory.mktemp(part.name)) for part in ON_A_CPU}


def test_rates_are_those_of_this_machine(found):
    (rates,) = found["machine"]["rates"]
    assert rates["dtype"] == "float32"
    assert min(rates["matrix products in TFLOP per s"], rates["copies in GB per s"]) > 0
    assert {"device", "torch", "diffusers"} <= set(column(found["machine"]["machine"], "what"))


def test_a_rollout_has_rates_stages_and_memory(found):
    (name,) = (name for name in found if "x" in name)
    tables = found[name]
    full, tiny = tables["frames per second of steady chunks"]
    assert (full["VAE"], tiny["VAE"]) == ("full", "tiny")
    assert full["without VAE"] == tiny["without VAE"]
    assert all(row["with VAE"] < row["without VAE"] for row in (full, tiny))
    stages = {row["stage"]: row for row in tables["a steady chunk by stage"]}
    assert set(stages) == {"clean_pass", "denoise", "decode", "decode with the tiny VAE"}
    seconds = sum(stages[stage]["s"] for stage in ("clean_pass", "denoise", "decode"))
    assert full["with VAE"] == pytest.approx(12 / seconds)  # of two steady chunks medians add up
    (memory,) = tables["memory with the full VAE, in GiB"]
    assert memory["peak computed"] > memory["weights"] + memory["keys and values"] + memory["VAE state"]
    assert memory["peak measured"] is None


def test_parity_is_within_its_bounds(found):
    rows = found["parity"]["largest differences"]
    assert column(rows, "dtype") == ["float32", "bfloat16"]
    assert all(row["within"] and row["latents"] <= row["bound"] for row in rows)
    assert rows[0]["latents"] < rows[1]["latents"]


def test_the_tests_are_listed_one_by_one(found):
    rows = found["tests"]["tests"]
    assert set(column(rows, "outcome")) == {"passed"}
    assert len(set(column(rows, "test"))) == len(rows) > 1


def test_ways_are_compared(found):
    (roofline,) = found["roofline"]["transformer, without VAE"]
    assert roofline["bare by pipeline"] > 0
    alongside = found["alongside"]["seconds between chunks, and of a rollout"]
    assert column(alongside, "VAE") == ["full", "tiny"]
    full, int8 = found["int8"]["transformer, without VAE"]
    assert int8["bytes"] < full["bytes"] / 2
    (compiled,) = found["compile"]["transformer, without VAE"]
    assert compiled["graphs"] == 3
    assert compiled["largest difference"] < 1e-5


def test_attention_backends_are_exact_or_say_why_they_are_not_there(found):
    (rows,) = found["attention"].values()
    native = next(row for row in rows if row["backend"] == "native")
    assert native["difference"] == 0
    assert all(("why not" in row) != ("difference" in row) for row in rows)
    assert any("why not" in row for row in rows)


def test_graphs_are_compared_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "CapturedForwards", functools.partial(CapturedForwards, capture=record_to_replay))
    (part,) = (part for part in PARTS if part.name == "graphs")
    (row,) = tables_of(part, tmp_path)["steady chunks, without VAE"]
    # A clean pass and 2 steps in each of 6 chunks, of which the first of either kind are captured.
    assert (row["graphs"], row["replays"], row["bit equal"]) == (2, 3 * 6 - 2, True)


def test_graphs_that_are_not_the_same_fail_the_part(tmp_path, monkeypatch):
    def once(run):
        result = run()
        return (lambda: None), result

    monkeypatch.setattr(graphs, "CapturedForwards", functools.partial(CapturedForwards, capture=once))
    record = Record(tmp_path / "record.json")
    with pytest.raises(RuntimeError, match="differ from eager ones"):
        graphs.measure(Setting("cpu", is_tiny=True), record)
    assert record.tables["steady chunks, without VAE"][0]["bit equal"] is False


def test_the_command_runs_parts_on_a_cpu(tmp_path, capsys):
    only = ["machine", "graphs"]
    words = ["--output", str(tmp_path), "--device", "cpu", "--tiny", "--minutes", "30", "--only", *only]
    assert gpu.main(words) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [(part["name"], part["state"]) for part in parts] == list(zip(only, ["ok", "needs CUDA"], strict=True))
    assert parts[0]["tables"]


def test_a_device_that_is_not_there_is_named(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path), "--device", "cuda:99", "--minutes", "30", "--only", "machine"]) == 1
    assert "the device 'cuda:99' cannot be used" in (tmp_path / "gpu.md").read_text()
