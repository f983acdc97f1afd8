"""A LoRA merged by `wan-ar convert`: peft's own merge is the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_tiny_checkpoint
from wan22_folder import make_a14b_folder

from wan_autoregressive.configs.checkpoints import read_checkpoints
from wan_autoregressive.models.checkpoint_files import load_checkpoint
from wan_autoregressive.models.conversion import convert_wan_state_dict
from wan_autoregressive.models.lora import load_lora
from wan_autoregressive.scripts.cli import main
from wan_autoregressive.scripts.convert import convert_checkpoint

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "weights" / "tiny_self_forcing.pt"
# diffusers' names of the layers that are trained, and the original ones
LAYERS = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
RANK, ALPHA = 4, 10
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "wan", seed=5)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 192, "num_layers": 3}))
    return folder


def trained(base: Path) -> PeftModel:
    """The recorded transformer with a LoRA whose factors are random."""
    config = WanTransformer3DModel.load_config(base, subfolder="transformer")
    model = WanTransformer3DModel.from_config(config)
    model.load_state_dict(convert_wan_state_dict(load_checkpoint(GOLDEN)))
    return with_random_lora(model)


def with_random_lora(model: WanTransformer3DModel, seed: int = 0) -> PeftModel:
    lora = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS)))
    torch.manual_seed(seed)
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return lora


@pytest.fixture(scope="module")
def factors(base: Path) -> Weights:
    found = {name: tensor.detach() for name, tensor in get_peft_model_state_dict(trained(base)).items()}
    assert len(found) == 2 * (6 * 3 + 2)
    return found


@pytest.fixture(scope="module")
def merged(base: Path) -> Weights:
    return trained(base).merge_and_unload().state_dict()


def original(name: str) -> str:
    """A name in the scheme that training scripts use."""
    for ours, theirs in LAYERS.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def as_longlive(factors: Weights, path: Path) -> Path:
    """Beside the critic's, in one pickle, in original names with the adapter's; nothing says what alpha is."""
    generator = {original(name).replace(".weight", ".default.weight"): tensor for name, tensor in factors.items()}
    assert "base_model.model.blocks.1.self_attn.q.lora_A.default.weight" in generator
    torch.save({"generator_lora": generator, "critic_lora": {"a": torch.zeros(1)}}, path / "lora.pt")
    return path / "lora.pt"


def with_alphas(factors: Weights, path: Path) -> Path:
    """As other trainers write it: other words, alpha in the file."""
    words = {"base_model.model.": "diffusion_model.", "lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = {}
    for name, tensor in factors.items():
        name = original(name)
        for old, new in words.items():
            name = name.replace(old, new)
        renamed[name] = tensor.contiguous()
        renamed[name.split(".lora_")[0] + ".alpha"] = torch.tensor(float(ALPHA))
    save_file(renamed, path / "lora.safetensors")
    return path / "lora.safetensors"


def as_peft_folder(factors: Weights, path: Path) -> Path:
    """Diffusers names, alpha in the config beside them."""
    save_file({name: tensor.contiguous() for name, tensor in factors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": RANK, "use_dora": False}))
    return path


@pytest.mark.parametrize(("save", "scale"), [(as_longlive, ALPHA / RANK), (with_alphas, 1.0), (as_peft_folder, 1.0)])
def test_equals_the_merge_of_peft(
    save: Callable[[Weights, Path], Path],
    scale: float,
    base: Path,
    factors: Weights,
    merged: Weights,
    tmp_path: Path,
) -> None:
    lora = save(factors, tmp_path)
    convert_checkpoint(GOLDEN, base, tmp_path / "out", lora=lora, lora_scale=scale, max_shard_size="300KB")
    stored = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer").state_dict()
    assert stored.keys() == merged.keys()
    assert all(torch.equal(stored[name], merged[name]) for name in merged)


NAMES = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_a14b_folder(tmp_path_factory.mktemp("pair") / "wan")


def lora_of(model: WanTransformer3DModel, seed: int, folder: Path) -> Path:
    """A LoRA of random factors, which is then merged into the model."""
    lora = with_random_lora(model, seed)
    folder.mkdir()
    saved = as_peft_folder({name: tensor.detach() for name, tensor in get_peft_model_state_dict(lora).items()}, folder)
    lora.merge_and_unload()
    return saved


def convert_pair(pair: Path, output: Path, *words: str) -> int:
    own = ["convert", str(pair / "transformer"), "--second", str(pair / "transformer_2"), "--base", str(pair)]
    return main([*own, "--output", str(output), *words])


def test_each_of_a_pair_has_its_own(pair: Path, tmp_path: Path) -> None:
    models = [WanTransformer3DModel.from_pretrained(pair, subfolder=name) for name in NAMES]
    plain = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    first, second = (lora_of(model, seed, tmp_path / str(seed)) for seed, model in enumerate(models))

    def stored(*words: str) -> list[Weights]:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        assert convert_pair(pair, output, *words) == 0
        return [WanTransformer3DModel.from_pretrained(output, subfolder=name).state_dict() for name in NAMES]

    def assert_equal(made: list[Weights], expected: list[Weights]) -> None:
        for one, other in zip(made, expected, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)

    both = ["--lora", str(first), "--second-lora", str(second)]
    merged = [model.state_dict() for model in models]
    assert_equal(stored(*both), merged)
    assert_equal(stored(*both, "--second-lora-scale", "0"), [merged[0], plain[1]])
    assert_equal(stored("--second-lora", str(second)), [plain[0], merged[1]])


def test_it_must_be_clear_which_of_a_pair_has_it(base: Path, pair: Path, tmp_path: Path, capsys) -> None:
    def refused(match: str, code: int) -> None:
        error = capsys.readouterr().err
        assert code == 2
        assert match in error
        assert len(error.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()

    lora = str(tmp_path / "lora.safetensors")
    refused("into the first of two transformers alone", convert_pair(pair, tmp_path / "out", "--lora", lora))
    refused("and no LoRA is given", convert_pair(pair, tmp_path / "out", "--second-lora-scale", "0.5"))
    words = ["convert", str(GOLDEN), "--base", str(base), "--output", str(tmp_path / "out")]
    refused("a second transformer, and none are given; use lora", main([*words, "--second-lora", lora]))
    refused("and no LoRA is given", main([*words, "--lora-scale", "0.5"]))
    entry = {
        **{"title": "x", "repo": "a/b", "file": "x.pt", "second": "y.pt", "lora": "z.pt"},
        **{"base": "c/d", "preset": "fastvideo_a14b", "license": "MIT", "bytes": 1},
    }
    bases = {"c/d": {"license": "MIT", "bytes": 1}}
    text = json.dumps({"bases": bases, "checkpoints": {"x": entry}})
    with pytest.raises(ValueError, match="x: the LoRA would go into the first of two transformers alone"):
        read_checkpoints(text, "list")
    text = json.dumps({"bases": bases, "checkpoints": {"x": {**entry, "second_lora": "z.pt"}}})
    assert read_checkpoints(text, "list")["x"].files == ("x.pt", "y.pt", "z.pt")


def test_a_strength_of_zero_changes_nothing_and_of_a_half_half(base: Path, factors: Weights, tmp_path: Path) -> None:
    lora, weights = as_peft_folder(factors, tmp_path), {}
    for scale in (0.0, 0.5, 1.0):
        convert_checkpoint(GOLDEN, base, tmp_path / str(scale), lora=lora, lora_scale=scale)
        weights[scale] = load_file(tmp_path / str(scale) / "transformer" / "diffusion_pytorch_model.safetensors")
    plain = convert_wan_state_dict(load_checkpoint(GOLDEN))
    for name, tensor in plain.items():
        assert torch.equal(weights[0.0][name], tensor)
        torch.testing.assert_close(2 * (weights[0.5][name] - tensor), weights[1.0][name] - tensor, rtol=0, atol=1e-6)


def test_no_more_than_a_shard_is_held(base: Path, factors: Weights, tmp_path: Path, monkeypatch) -> None:
    """Each weight is merged when its file is written, not before."""
    from wan_autoregressive.models import lora, sharded_weights

    order = []
    merge, save = lora.LoraFactors.merged_into, sharded_weights.save_file
    monkeypatch.setattr(lora.LoraFactors, "merged_into", lambda *args: order.append("merge") or merge(*args))
    monkeypatch.setattr(sharded_weights, "save_file", lambda *a, **k: order.append("save") or save(*a, **k))
    saved = as_peft_folder(factors, tmp_path)
    convert_checkpoint(GOLDEN, base, tmp_path / "out", lora=saved, max_shard_size="300KB")
    files = sorted((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert order.count("save") == len(files) > 3
    assert "merge" in order[order.index("save") :]
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_what_does_not_fit_is_refused(base: Path, factors: Weights, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    first = "base_model.model.blocks.0.attn1.to_q.lora_A.weight"

    def refused(match: str, tensors: Weights, scale: float = 1.0) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        with pytest.raises(ValueError, match=match) as caught:
            convert_checkpoint(GOLDEN, base, tmp_path / "out", lora=path, lora_scale=scale)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused(
        "has only a part of what blocks.0.attn1.to_q.weight needs", {k: v for k, v in factors.items() if k != first}
    )
    refused("does not fit the model: blocks.0.attn1.to_q.weight has factors", factors | {first: torch.zeros(RANK, 81)})
    refused("no factors of a LoRA .*lora_B.bias", factors | {"blocks.0.x.lora_B.bias": torch.zeros(3)})
    refused("holds no factors", {})
    beyond = {name.replace("blocks.0.", "blocks.7."): tensor for name, tensor in factors.items()}
    refused("weights that the model does not have .blocks.7", beyond)
    refused("strength of the LoRA is nan", factors, float("nan"))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4, "use_dora": true}')
    refused("asks for use_dora; only plain LoRA", factors)
    (tmp_path / "adapter_config.json").write_text("[]")
    refused("adapter_config.json' is damaged", factors)
    with pytest.raises(ValueError, match="does not exist"):
        load_lora(tmp_path / "none.pt")
