"""Weight names and checkpoint files: what they become, what is missed, and what is damaged or harmful."""

from __future__ import annotations

import functools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from wan_autoregressive.models.checkpoint_files import load_checkpoint
from wan_autoregressive.models.conversion import check_state_dict, convert_wan_state_dict

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "weights" / "tiny_self_forcing.pt"
CONFIG = {"num_attention_heads": 4, "attention_head_dim": 20, "text_dim": 32, "freq_dim": 64, "ffn_dim": 192}


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture(scope="module")
def original(golden: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in golden["generator_ema"].items()}


def skeleton(**config: Any) -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(**{**CONFIG, "num_layers": 3, **config})


def assert_same_objects(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(got[name] is expected[name] for name in expected)


# Names


NAMES = {
    "patch_embedding.weight": "patch_embedding.weight",
    "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
    "text_embedding.2.bias": "condition_embedder.text_embedder.linear_2.bias",
    "time_embedding.0.weight": "condition_embedder.time_embedder.linear_1.weight",
    "time_projection.1.bias": "condition_embedder.time_proj.bias",
    "blocks.2.modulation": "blocks.2.scale_shift_table",
    "blocks.2.self_attn.q.weight": "blocks.2.attn1.to_q.weight",
    "blocks.2.self_attn.k.bias": "blocks.2.attn1.to_k.bias",
    "blocks.2.self_attn.norm_q.weight": "blocks.2.attn1.norm_q.weight",
    "blocks.2.cross_attn.v.weight": "blocks.2.attn2.to_v.weight",
    "blocks.2.cross_attn.o.bias": "blocks.2.attn2.to_out.0.bias",
    "blocks.2.cross_attn.norm_k.weight": "blocks.2.attn2.norm_k.weight",
    "blocks.2.norm3.bias": "blocks.2.norm2.bias",
    "blocks.2.ffn.0.weight": "blocks.2.ffn.net.0.proj.weight",
    "blocks.2.ffn.2.weight": "blocks.2.ffn.net.2.weight",
    "head.modulation": "scale_shift_table",
    "head.head.weight": "proj_out.weight",
}


def test_every_weight_gets_its_name(original: dict[str, torch.Tensor]) -> None:
    """Those that have the shape of another are written down here; shapes tell the rest apart."""
    converted = convert_wan_state_dict(original)
    assert converted.keys() == skeleton().state_dict().keys()
    assert all(converted[new] is original[old] for old, new in NAMES.items())
    assert [id(tensor) for tensor in converted.values()] == [id(tensor) for tensor in original.values()]
    check_state_dict(converted, skeleton())


def test_image_to_video_names(original: dict[str, torch.Tensor]) -> None:
    """Wan2.1 image-to-video adds an image embedder and a second key and value to every cross-attention."""
    image = {f"img_emb.proj.{i}.{leaf}": torch.zeros(1) for i in (0, 1, 3, 4) for leaf in ("weight", "bias")}
    for block in range(3):
        attention = f"blocks.{block}.cross_attn"
        image |= {f"{attention}.{kv}_img.{leaf}": torch.zeros(1) for kv in "kv" for leaf in ("weight", "bias")}
        image[f"{attention}.norm_k_img.weight"] = torch.zeros(1)
    state_dict = {**original, **image}
    converted = convert_wan_state_dict(state_dict)
    assert converted["blocks.1.attn2.add_k_proj.weight"] is image["blocks.1.cross_attn.k_img.weight"]
    assert converted["blocks.1.attn2.norm_added_k.weight"] is image["blocks.1.cross_attn.norm_k_img.weight"]
    assert converted["condition_embedder.image_embedder.norm1.weight"] is image["img_emb.proj.0.weight"]
    assert converted["condition_embedder.image_embedder.ff.net.2.weight"] is image["img_emb.proj.3.weight"]
    assert converted.keys() == skeleton(image_dim=24, added_kv_proj_dim=80).state_dict().keys()

    # First-and-last-frame models add positions.
    converted = convert_wan_state_dict({**state_dict, "img_emb.emb_pos": torch.zeros(1)})
    expected = skeleton(image_dim=24, added_kv_proj_dim=80, pos_embed_seq_len=514).state_dict()
    assert converted.keys() == expected.keys()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"model.{name}",
        lambda name: f"module.model.{name}",
        lambda name: f"model.diffusion_model.{name}",
        lambda name: f"model._fsdp_wrapped_module.{name}",
        lambda name: f"_orig_mod.model.{name}",
        lambda name: "_fsdp_wrapped_module." + name.replace("ffn.", "_checkpoint_wrapped_module.ffn."),
        lambda name: name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._orig_mod."),
    ],
)
def test_prefixes_of_wrappers_are_dropped(wrap: Any, original: dict[str, torch.Tensor]) -> None:
    wrapped = {wrap(name): tensor for name, tensor in original.items()}
    assert wrapped.keys() != original.keys()
    assert_same_objects(convert_wan_state_dict(wrapped), convert_wan_state_dict(original))


def test_diffusers_names_pass_through(original: dict[str, torch.Tensor]) -> None:
    converted = convert_wan_state_dict(original)
    assert_same_objects(convert_wan_state_dict(converted), converted)
    assert_same_objects(convert_wan_state_dict({f"model.{k}": v for k, v in converted.items()}), converted)
    names = skeleton(image_dim=24, added_kv_proj_dim=80, pos_embed_seq_len=514).state_dict()
    assert_same_objects(convert_wan_state_dict(names), names)


def test_two_names_for_one_weight(original: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"'head\.head\.bias' and 'model\.head\.head\.bias' hold .*'proj_out\.bias'"):
        convert_wan_state_dict({**original, "model.head.head.bias": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"'head\.head\.bias' and 'proj_out\.bias' hold"):
        convert_wan_state_dict({**original, "proj_out.bias": torch.zeros(64)})


def test_mixed_schemes() -> None:
    mixed = {"patch_embedding.bias": torch.zeros(1), "blocks.0.ffn.0.bias": torch.zeros(1)}
    convert_wan_state_dict(mixed)  # a name of both schemes beside one of them is no mixture
    for name in ("blocks.1.ffn.net.2.bias", "scale_shift_table", "blocks.0.norm2.weight"):
        with pytest.raises(ValueError, match=rf"mixes original .*'blocks\.0\.ffn\.0\.bias'.*'{name}'"):
            convert_wan_state_dict({**mixed, name: torch.zeros(1)})


# Check


def test_check_lists_what_does_not_fit(original: dict[str, torch.Tensor]) -> None:
    weights = convert_wan_state_dict(original)
    del weights["proj_out.bias"]
    weights["blocks.0.attn1.to_q.weight"] = torch.zeros(80, 81)
    weights["blocks.0.attn1.to_k.bias"] = torch.zeros(80, dtype=torch.int8)
    weights |= {f"critic.{i}": torch.zeros(1) for i in range(7)}
    with pytest.raises(ValueError, match="do not fit the model of 96 tensors") as caught:
        check_state_dict(weights, skeleton())
    message = str(caught.value)
    assert "1 missing (proj_out.bias)" in message
    assert "7 extra (critic.0, critic.1, critic.2, critic.3, critic.4, and 2 more)" in message
    assert "1 misshapen (blocks.0.attn1.to_q.weight is [80, 81], expected [80, 80])" in message
    assert "1 not floating point (blocks.0.attn1.to_k.bias is torch.int8)" in message
    assert "\n" not in message


def test_check_takes_shapes() -> None:
    check_state_dict({"a": torch.zeros(2, 3)}, {"a": (2, 3)})
    with pytest.raises(ValueError, match="1 misshapen"):
        check_state_dict({"a": torch.zeros(3, 2)}, {"a": torch.Size([2, 3])})


# Files


def equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


def one_line_error(path: Path, *words: str, weights: str = "auto") -> None:
    with pytest.raises(ValueError, match=r"^The (checkpoint|index|folder) ") as caught:
        load_checkpoint(path, weights)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in (*words, str(path.name)):
        assert word in message


def test_entry_of_a_published_checkpoint(golden: dict[str, dict[str, torch.Tensor]]) -> None:
    assert not equal(golden["generator"], golden["generator_ema"])
    assert equal(load_checkpoint(GOLDEN), golden["generator_ema"])
    assert equal(load_checkpoint(GOLDEN, "generator_ema"), golden["generator_ema"])
    assert equal(load_checkpoint(GOLDEN, "generator"), golden["generator"])
    one_line_error(GOLDEN, "'critic'", "generator, generator_ema", weights="critic")


def test_entries_by_name(tmp_path: Path) -> None:
    first, second = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    path = tmp_path / "x.pt"
    torch.save({"model": first, "optimizer": {"state": {}}, "step": 7}, path)
    assert equal(load_checkpoint(path), first)
    torch.save({"generator": first, "generator_ema": None}, path)
    assert equal(load_checkpoint(path), first)
    torch.save({"student": first, "teacher": second}, path)
    assert equal(load_checkpoint(path, "teacher"), second)
    one_line_error(path, "student, teacher", "--weights")


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin"])
@pytest.mark.parametrize("zip_format", [True, False])
def test_bare_state_dict(name: str, zip_format: bool, tmp_path: Path, original: dict[str, torch.Tensor]) -> None:
    torch.save(original, tmp_path / name, _use_new_zipfile_serialization=zip_format)
    assert equal(load_checkpoint(tmp_path / name), original)
    assert equal(load_checkpoint(tmp_path), original)
    one_line_error(tmp_path / name, "bare state dict", weights="generator")


def test_safetensors_single_sharded_and_folders(tmp_path: Path, original: dict[str, torch.Tensor]) -> None:
    single = tmp_path / "single.safetensors"
    save_file({name: tensor.clone() for name, tensor in original.items()}, single)
    assert equal(load_checkpoint(single), original)
    one_line_error(single, "bare state dict", weights="generator")

    model = WanTransformer3DModel(**CONFIG, num_layers=3)
    expected = model.state_dict()
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="300KB")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    index = tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    for path in (index, index.parent, tmp_path / "pipeline"):
        assert equal(load_checkpoint(path), expected)
    index.unlink()
    assert equal(load_checkpoint(index.parent), expected)  # shards alone


def test_damaged_indexes(tmp_path: Path) -> None:
    index = tmp_path / "x.safetensors.index.json"
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    for weight_map, words in [
        ({"a": "1.safetensors", "b": "2.safetensors"}, "2.safetensors"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "do not hold: b"),
        ({"a": "../1.safetensors"}, "outside its folder"),
        ([], "weight_map"),
        ({"a": 3}, "weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        one_line_error(index, words)
    index.write_text('{"weight_map": {')
    one_line_error(index, "weight_map")


@pytest.mark.parametrize("kept", [0, 1, 3, 100, 5_000, 0.3, 0.9, 0.999999])
@pytest.mark.parametrize("kind", ["zip.pt", "legacy.pt", "x.safetensors"])
def test_truncated_files(kept: float, kind: str, tmp_path: Path, original: dict[str, torch.Tensor]) -> None:
    path = tmp_path / kind
    if kind == "x.safetensors":
        save_file(original, path)
    else:
        torch.save(original, path, _use_new_zipfile_serialization=kind == "zip.pt")
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    one_line_error(path, "damaged")


class Call:
    """Unpickled without care, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [Path.touch, os.mkfifo, os.popen, eval, open, functools.partial])
@pytest.mark.parametrize("writer", ["torch", "torch legacy", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(
    writer: str, function: Callable[..., Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path, target = tmp_path / "x.pt", tmp_path / "touched"
    argument = target if function is Path.touch else f"open({str(target)!r}, 'w')" if function is eval else str(target)
    content = {"generator": {"a": torch.zeros(1), "b": Call(function, argument)}}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    one_line_error(path, "refused, because reading them could run code")
    assert not target.exists()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "type list"),
        (torch.zeros(1), "type Tensor"),
        ({}, "an empty dict"),
        ({"a": torch.zeros(1), "b": 3}, "type int under 'b'"),
        ({"generator": {"a": "text"}}, "type str under 'a'"),
        ({"generator": {3: torch.zeros(1)}}, "under 3"),
    ],
)
def test_contents_that_are_no_state_dict(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    one_line_error(tmp_path / "x.pt", words)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    one_line_error(tmp_path / "nowhere.pt", "does not exist")
    one_line_error(tmp_path, "holds no weights")
    (tmp_path / "x.ckpt").touch()
    one_line_error(tmp_path / "x.ckpt", ".safetensors")
    for name in ("a.pt", "b.pt"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
    one_line_error(tmp_path, "holds 2 checkpoints (a.pt, b.pt)")
