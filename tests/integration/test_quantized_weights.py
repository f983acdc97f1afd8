"""Weights in fewer bits by diffusers' own quantizers: whole rollouts, saved and resumed, with a LoRA on top.

The oracle is a plain model whose weights are the quantised ones, scaled back. How far a format takes the video from
that of the unquantised weights is the relative L2 difference of the latents.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from aligned_weights import align_weights
from diffusers import GGUFQuantizationConfig, PipelineQuantizationConfig, TorchAoConfig
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from saved_rollouts import assert_same, start, state_of
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wan_autoregressive import CausalWanTransformer3DModel, WanAutoregressivePipeline
from wan_autoregressive.models.conversion import convert_wan_state_dict, load_checkpoint
from wan_autoregressive.models.weights_fingerprint import weights_fingerprint
from wan_autoregressive.scripts.costs.weight_formats import formatted_bytes

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "weights" / "tiny_self_forcing.pt"


def has(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def plain(folder: Path) -> WanAutoregressivePipeline:
    return WanAutoregressivePipeline.from_pretrained(folder, dtype=torch.float32)


def with_torchao(folder: Path, kind: str) -> WanAutoregressivePipeline:
    from torchao import quantization

    config = TorchAoConfig(getattr(quantization, kind)())
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    return WanAutoregressivePipeline.from_pretrained(folder, dtype=torch.float32, quantization_config=mapping)


def original_names() -> dict[str, str]:
    """Those of Wan's own code, in which most files are published, by diffusers' names."""
    names: dict[str, Any] = {name: name.removeprefix("model.") for name in load_checkpoint(GOLDEN)}
    return convert_wan_state_dict(names)


def with_gguf(
    folder: Path, kind: str, file: str | None = None, names: Mapping[str, str] | None = None
) -> WanAutoregressivePipeline:
    """As published files are: matrices of the blocks in blocks of 32 numbers, all else in float32."""
    import gguf

    path = folder.with_name(f"{file or kind}.gguf")
    if not path.exists():
        writer = gguf.GGUFWriter(path, "wan")
        for name, tensor in plain(folder).transformer.state_dict().items():
            values, form = tensor.numpy(), gguf.GGMLQuantizationType.F32
            if name.startswith("blocks.") and values.ndim == 2 and values.shape[1] % 32 == 0:
                form = gguf.GGMLQuantizationType[kind]
                values = gguf.quants.quantize(values, form)
            writer.add_tensor(name if names is None else names[name], values, raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    own = {"config": str(folder), "subfolder": "transformer", "dtype": torch.float32}
    transformer = CausalWanTransformer3DModel.from_single_file(path, quantization_config=config, **own)
    return WanAutoregressivePipeline.from_pretrained(folder, transformer=transformer)


def stored_in_float8(folder: Path) -> WanAutoregressivePipeline:
    pipe = plain(folder)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return pipe


@dataclass
class Format:
    load: Callable[[Path], WanAutoregressivePipeline]
    furthest: float
    """Relative L2 difference of the latents from those of the unquantised weights."""
    rounds_activations: bool = False
    """So that no plain weights give the same."""


FORMATS = {
    "int8": Format(partial(with_torchao, kind="Int8WeightOnlyConfig"), 0.05),
    "int8 dynamic": Format(
        partial(with_torchao, kind="Int8DynamicActivationInt8WeightConfig"), 0.08, rounds_activations=True
    ),
    "float8": Format(stored_in_float8, 0.15),
    "Q8_0": Format(partial(with_gguf, kind="Q8_0"), 0.01),
    "Q4_0": Format(partial(with_gguf, kind="Q4_0"), 0.15),
}
MARKS = {
    "int8": [has("torchao")],
    "int8 dynamic": [has("torchao"), pytest.mark.slow],
    "float8": [pytest.mark.slow],
    "Q8_0": [has("gguf"), pytest.mark.slow],
    "Q4_0": [has("gguf"), pytest.mark.slow],
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS.get(name, ())) for name in FORMATS])
def form(request) -> Format:
    return FORMATS[request.param]


@pytest.fixture(scope="module")
def quantized(form, tiny_checkpoint) -> WanAutoregressivePipeline:
    return form.load(tiny_checkpoint)


def latents_of(pipe: WanAutoregressivePipeline) -> torch.Tensor:
    """Of a video with a window, a prompt change and guidance."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"window_frames": 5, "sink_frames": 1, "guidance_scale": 2.0, "prompt_schedule": {6: "rain"}}
    return torch.cat([chunk.latents for chunk in start(pipe, output_type="latent", **settings)], dim=2)


def difference(latents: torch.Tensor, other: torch.Tensor) -> float:
    return float((latents - other).norm() / other.norm())


def scaled_back(weight: torch.Tensor) -> torch.Tensor:
    if hasattr(weight, "quant_type"):
        return dequantize_gguf_tensor(weight).float()
    return (weight.dequantize() if is_traceable_wrapper_subclass(weight) else weight).float()


def test_a_rollout_is_that_of_the_weights_scaled_back(form, quantized, tiny_checkpoint, pipe):
    weights, unquantised = quantized.transformer.state_dict(), pipe.transformer.state_dict()
    with torch.no_grad():
        back = {name: scaled_back(weight) for name, weight in weights.items()}
    assert any(not torch.equal(back[name], weight) for name, weight in unquantised.items())
    made, reference = latents_of(quantized), latents_of(pipe)
    assert 0 < difference(made, reference) < form.furthest
    if not form.rounds_activations:
        same = plain(tiny_checkpoint)
        same.transformer.load_state_dict(back)
        torch.testing.assert_close(made, latents_of(same), rtol=0, atol=1e-4)


def test_its_bytes_are_those_of_the_estimate(form, quantized, pipe):
    name = next(name for name, other in FORMATS.items() if other is form).removesuffix(" dynamic").lower()
    held = sum(bytes_of(weight) for weight in quantized.transformer.state_dict().values())
    assert held == formatted_bytes(pipe.transformer, name)


def bytes_of(weight: torch.Tensor) -> int:
    if is_traceable_wrapper_subclass(weight):
        return sum(getattr(weight, part).nbytes for part in weight.__tensor_flatten__()[0])
    return weight.as_subclass(torch.Tensor).nbytes


@has("gguf")
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_gguf_file_in_wans_own_names(prefix, tiny_checkpoint):
    names = {name: prefix + original for name, original in original_names().items()}
    assert "self_attn.q" in names["blocks.0.attn1.to_q.weight"]
    expected = with_gguf(tiny_checkpoint, "Q4_0").transformer
    made = with_gguf(tiny_checkpoint, "Q4_0", f"named {prefix}", names).transformer
    assert weights_fingerprint(made) == weights_fingerprint(expected)  # formats too
    for name, weight in expected.state_dict().items():
        numbers = (one.as_subclass(torch.Tensor) for one in (weight, made.state_dict()[name]))
        assert torch.equal(*numbers)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(quantized, tmp_path):
    expected = list(start(quantized))
    rollout = start(quantized)
    rollout.step()
    rollout.save(tmp_path / "state")
    resumed = quantized.resume(tmp_path / "state")
    assert state_of(resumed) == state_of(rollout)
    assert_same(list(resumed), expected[1:])


def test_a_state_knows_the_format_of_its_weights(form, quantized, tiny_checkpoint, pipe, tmp_path):
    start(quantized).save(tmp_path / "state")
    form.load(tiny_checkpoint).resume(tmp_path / "state")
    with pytest.raises(ValueError, match=r"is of another transformer|other weights: their (names|values)"):
        pipe.resume(tmp_path / "state")
    start(pipe).save(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"is of another transformer|other weights: their (names|values)"):
        quantized.resume(tmp_path / "plain")


@pytest.mark.parametrize("kind", [pytest.param(name, marks=MARKS[name]) for name in ("int8", "int8 dynamic")])
def test_a_saved_folder_gives_the_same_video(kind, tiny_checkpoint, tmp_path):
    """To the bit, once no weight is where a file happens to have it; loaded in the dtype that it was made in."""
    made = FORMATS[kind].load(tiny_checkpoint)
    start(made).save(tmp_path / "state")  # before diffusers rewrites its config
    made.save_pretrained(tmp_path / "folder")
    again = plain(tmp_path / "folder")
    now, before = (weights_fingerprint(pipe.transformer) for pipe in (again, made))
    assert now == before
    torch.testing.assert_close(latents_of(again), latents_of(made), rtol=0, atol=1e-4)
    assert torch.equal(latents_of(align_weights(again)), latents_of(align_weights(made)))
    for pipe in (made, again):
        pipe.resume(tmp_path / "state")
    with_another_dtype = WanAutoregressivePipeline.from_pretrained(tmp_path / "folder")
    assert with_another_dtype.transformer.dtype == torch.bfloat16  # as docs/MEMORY.md warns
    with pytest.raises(ValueError, match=r"is of another transformer|other weights"):
        with_another_dtype.resume(tmp_path / "state")


@pytest.mark.slow
def test_the_fingerprint_sees_one_changed_number(quantized, form, tiny_checkpoint):
    other = form.load(tiny_checkpoint).transformer
    weight = other.state_dict()["blocks.0.attn1.to_q.weight"]
    numbers = getattr(weight, "qdata", weight)
    if hasattr(numbers, "quant_type"):  # operations on it would scale it back
        numbers = numbers.as_subclass(torch.Tensor)
    numbers.view(torch.uint8)[0, 0] ^= 1
    now, before = weights_fingerprint(other), weights_fingerprint(quantized.transformer)
    assert now.layout == before.layout
    assert now.values != before.values


@pytest.mark.slow
def test_a_lora_on_top(form, tiny_checkpoint, quantized, pipe):
    """It moves the video as it moves that of the unquantised weights."""
    layers = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn1.to_q", "ffn.net.2")]
    lora = {}
    for layer in layers:
        linear = pipe.transformer.get_submodule(layer)
        lora[f"transformer.{layer}.lora_A.weight"] = 0.1 * torch.randn(4, linear.in_features)
        lora[f"transformer.{layer}.lora_B.weight"] = 0.1 * torch.randn(linear.out_features, 4)
    reference = plain(tiny_checkpoint)
    reference.load_lora_weights(dict(lora))
    expected = latents_of(reference)
    if form is FORMATS["float8"]:  # first the LoRA, since peft takes over the dtype of the weights
        adapted = plain(tiny_checkpoint)
        adapted.load_lora_weights(dict(lora))
        adapted.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    else:
        adapted = form.load(tiny_checkpoint)
        adapted.load_lora_weights(dict(lora))
    made = latents_of(adapted)
    assert difference(made, expected) < form.furthest
    assert difference(made, latents_of(quantized)) > form.furthest
