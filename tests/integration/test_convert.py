"""`wan-ar convert`, from the recorded checkpoint to folders that stock diffusers loads, and what it refuses."""

from __future__ import annotations

import argparse
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from tiny_checkpoint import make_tiny_checkpoint

from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.scripts import convert
from wan_autoregressive.scripts.convert import add_parser, convert_checkpoint

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "weights" / "tiny_self_forcing.pt"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan folder whose transformer config is that of the recorded checkpoint, without transformer weights."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "wan", seed=5)
    config_path = folder / "transformer" / "config.json"
    config = json.loads(config_path.read_text()) | {"ffn_dim": 192, "num_layers": 3}
    shutil.rmtree(folder / "transformer")
    config_path.parent.mkdir()
    config_path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def published() -> dict[str, Weights]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture(scope="module")
def expected(published: dict[str, Weights]) -> dict[str, Weights]:
    """Entry -> weights in diffusers names, by diffusers' own converter."""
    return {
        entry: convert_wan_transformer_to_diffusers({k.removeprefix("model."): v for k, v in weights.items()})
        for entry, weights in published.items()
    }


def wan_ar(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["convert", *map(str, arguments)])
    return args.run(args)


def assert_weights(folder: Path, weights: Weights) -> None:
    stored = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    assert len(stored) == 96
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)


@pytest.mark.parametrize("entry", ["generator_ema", "generator"])
def test_published_checkpoint_to_stock_diffusers(
    entry: str, base: Path, expected: dict[str, Weights], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    before = snapshot(base)
    assert wan_ar(GOLDEN, "--base", base, "--output", output, "--weights", entry) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert snapshot(base) == before
    assert_weights(output, expected[entry])

    pipe = WanPipeline.from_pretrained(output)
    assert type(pipe.transformer) is WanTransformer3DModel
    assert pipe.scheduler.config.shift == 5.0
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a cat", height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=1.0).frames
    assert frames.shape == (1, 5, 32, 32, 3)
    for component in ("tokenizer", "text_encoder", "vae"):
        assert contents(output / component) == contents(base / component)


def test_default_entry_recipe_and_shards(base: Path, expected: dict[str, Weights], tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    assert (
        wan_ar(GOLDEN, "--base", base, "--output", output, "--steps", "1000,757,522", "--shift", "8", "--no-warp") == 0
    )
    scheduler = SelfForcingScheduler.from_pretrained(output, subfolder="scheduler")
    assert (list(scheduler.config.denoising_steps), scheduler.config.shift) == ([1000, 757, 522], 8.0)
    assert scheduler.config.warp is False
    assert_weights(output, expected["generator_ema"])

    convert_checkpoint(GOLDEN, base, tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*-of-*.safetensors"))) > 1
    assert_weights(tmp_path / "sharded", expected["generator_ema"])
    # Its own output is a checkpoint too, in diffusers names.
    convert_checkpoint(tmp_path / "sharded", base, tmp_path / "again")
    assert_weights(tmp_path / "again", expected["generator_ema"])


def test_dtype(base: Path, expected: dict[str, Weights], tmp_path: Path) -> None:
    assert wan_ar(GOLDEN, "--base", base, "--output", tmp_path / "out", "--dtype", "bfloat16") == 0
    from safetensors.torch import load_file

    path = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert path.stat().st_mode == path.with_name("config.json").stat().st_mode  # others may read it, too
    stored = load_file(path)
    model = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer", dtype=torch.bfloat16)
    loaded = model.state_dict()
    for name, tensor in expected["generator_ema"].items():
        # What diffusers keeps in float32 is stored so: the dtype of the file is the dtype after loading in bfloat16.
        assert stored[name].dtype == loaded[name].dtype
        assert torch.equal(stored[name], tensor.to(stored[name].dtype))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float32}
    assert stored["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert stored["blocks.0.scale_shift_table"].dtype == torch.float32


def test_views_of_one_buffer(base: Path, published: dict[str, Weights], tmp_path: Path) -> None:
    """Flat FSDP parameters are saved as views of one buffer; safetensors alone would refuse them."""
    weights = published["generator_ema"]
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    pieces = flat.split([tensor.numel() for tensor in weights.values()])
    views = {k: piece.view(weights[k].shape) for k, piece in zip(weights, pieces, strict=True)}
    torch.save(views, tmp_path / "x.pt")
    convert_checkpoint(tmp_path / "x.pt", base, tmp_path / "out")
    names = convert_wan_transformer_to_diffusers({k.removeprefix("model."): v for k, v in weights.items()})
    assert_weights(tmp_path / "out", names)


def test_large_files_are_linked_and_configs_copied(base: Path, tmp_path: Path) -> None:
    convert_checkpoint(GOLDEN, base, tmp_path / "out")
    weights, config = Path("vae/diffusion_pytorch_model.safetensors"), Path("vae/config.json")
    assert (tmp_path / "out" / weights).samefile(base / weights)
    assert not (tmp_path / "out" / config).samefile(base / config)


def test_hub_style_links_and_no_hard_links(
    base: Path, expected: dict[str, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = tmp_path / "snapshot"
    for source in base.rglob("*.*"):
        if source.is_file():
            target = linked / source.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    convert_checkpoint(GOLDEN, linked, tmp_path / "a")
    monkeypatch.setattr(convert.os, "link", raises(OSError(errno.EXDEV, "cross-device link")))
    convert_checkpoint(GOLDEN, linked, tmp_path / "b")
    for output in (tmp_path / "a", tmp_path / "b"):
        assert not any(path.is_symlink() for path in output.rglob("*"))
        assert contents(output / "vae") == contents(base / "vae")
        assert_weights(output, expected["generator_ema"])


# What it refuses: nothing may appear, nothing may change.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snapshot(folder: Path) -> dict[str, Any]:
    """Every path under `folder` (hidden ones too), with the content of files."""
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise error

    return function


def refused(tmp_path: Path, match: str, *arguments: str | Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=match) as caught:
        wan_ar(*arguments)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


def test_damaged_and_foreign_checkpoints(base: Path, published: dict[str, Weights], tmp_path: Path) -> None:
    path, output = tmp_path / "x.pt", ("--base", base, "--output", tmp_path / "deep" / "out")
    path.write_bytes(GOLDEN.read_bytes()[:700_000])
    refused(tmp_path, "damaged", path, *output)
    torch.save({"generator": {"a": Path("x")}}, path)
    refused(tmp_path, "refused", path, *output)
    safetensors = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, safetensors)
    safetensors.write_bytes(safetensors.read_bytes()[:-1])
    refused(tmp_path, "damaged", safetensors, *output)
    refused(tmp_path, "does not exist", tmp_path / "nowhere.pt", *output)
    refused(tmp_path, "no weights 'ema'", GOLDEN, *output, "--weights", "ema")


def test_weights_that_do_not_fit(base: Path, published: dict[str, Weights], tmp_path: Path) -> None:
    path, output = tmp_path / "x.pt", ("--base", base, "--output", tmp_path / "out")
    weights = published["generator_ema"]

    def save(change: Weights, drop: str = "") -> Path:
        torch.save({"generator": {k: v for k, v in (weights | change).items() if k != drop}}, path)
        return path

    refused(tmp_path, r"1 missing \(proj_out\.bias\)", save({}, "model.head.head.bias"), *output)
    refused(tmp_path, r"1 extra \(blocks\.9\.x\)", save({"model.blocks.9.x": torch.zeros(1)}), *output)
    misshapen = {"model.head.head.bias": torch.zeros(3)}
    refused(tmp_path, r"1 misshapen \(proj_out\.bias is \[3\], expected \[64\]\)", save(misshapen), *output)
    refused(tmp_path, "hold the weight", save({"head.head.bias": torch.zeros(64)}), *output)


def test_bad_bases(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    arguments = (GOLDEN, "--base", broken, "--output", tmp_path / "out")

    def with_index(**changes: Any) -> None:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(base, broken)
        index = json.loads((base / "model_index.json").read_text())
        (broken / "model_index.json").write_text(json.dumps(index | changes))

    refused(tmp_path, "is not a folder", *arguments)
    with_index(vae=[None, None])
    refused(tmp_path, "has no vae", *arguments)
    with_index(transformer_2=["diffusers", "WanTransformer3DModel"])
    refused(tmp_path, "give the weights of the second with --second", *arguments)
    with_index()
    refused(tmp_path, "has one transformer; leave out --second", *arguments, "--second", GOLDEN)
    with_index()
    shutil.rmtree(broken / "text_encoder")
    refused(tmp_path, "has no text_encoder", *arguments)
    with_index()
    (broken / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    refused(tmp_path, "transformer is a FluxTransformer2DModel", *arguments)
    (broken / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel", "num_layers": "x"}')
    refused(tmp_path, "describes no Wan model", *arguments)
    config = json.loads((base / "transformer" / "config.json").read_text()) | {"num_layers": 1_000_000}
    (broken / "transformer" / "config.json").write_text(json.dumps(config))  # to build them would take minutes
    refused(tmp_path, "says num_layers is 1000000, and there are weights for 3", *arguments)
    (broken / "model_index.json").write_text("{")
    refused(tmp_path, "cannot read .*model_index", *arguments)


def test_bad_recipes(base: Path, tmp_path: Path) -> None:
    arguments = (GOLDEN, "--base", base, "--output", tmp_path / "out")
    for recipe in (["--steps", "250,500"], ["--steps", "2000"], ["--shift", "0"], ["--shift", "nan"]):
        refused(tmp_path, ".", *arguments, *recipe)
    with pytest.raises(SystemExit):
        wan_ar(*arguments, "--steps", "many")


def test_existing_outputs(base: Path, expected: dict[str, Weights], tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    arguments = (GOLDEN, "--base", base, "--output", output)
    assert wan_ar(*arguments) == 0  # an empty folder is free
    refused(tmp_path, "not empty; name another or pass --overwrite", *arguments, "--weights", "generator")
    assert_weights(output, expected["generator_ema"])
    refused(tmp_path, "no weights 'x'", *arguments, "--overwrite", "--weights", "x")  # the old one survives
    assert wan_ar(*arguments, "--overwrite", "--weights", "generator") == 0
    assert_weights(output, expected["generator"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Replacing the folder would delete what is read.
    refused(tmp_path, "lies in the output", output / "transformer", *arguments[1:], "--overwrite")


def test_base_is_never_written(base: Path) -> None:
    refused(base.parent, "lies in the output", GOLDEN, "--base", base, "--output", base, "--overwrite")
    refused(base.parent, "lies in the base", GOLDEN, "--base", base, "--output", base / "vae" / "out")


def test_failure_half_way_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(GOLDEN, base, tmp_path / "old")
    before = snapshot(tmp_path)
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        monkeypatch.setattr(convert.shutil, "copytree", raises(error))
        with pytest.raises(type(error)):
            convert_checkpoint(GOLDEN, base, tmp_path / "a" / "b" / "new")
        with pytest.raises(type(error)):
            convert_checkpoint(GOLDEN, base, tmp_path / "old", overwrite=True)
        assert snapshot(tmp_path) == before
