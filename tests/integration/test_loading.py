"""From a folder and to a folder: ours, a stock Wan folder, and back into stock diffusers."""

import json
import shutil

import accelerate
import numpy as np
import pytest
import torch
from aligned_weights import align_weights
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline

ARGUMENTS = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 21}


def render(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**ARGUMENTS, generator=torch.Generator().manual_seed(0)).frames


@pytest.fixture
def stock_folder(tiny_checkpoint, tmp_path):
    """The layout of Wan2.1-T2V-1.3B-Diffusers, saved by diffusers itself."""
    stock = WanPipeline.from_pretrained(tiny_checkpoint)
    stock.register_modules(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    )
    stock.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def test_a_saved_pipeline_loads_and_renders_the_same(pipe, tmp_path):
    expected = render(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = WanAutoregressivePipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is CausalWanTransformer3DModel
    assert type(loaded.scheduler) is SelfForcingScheduler
    assert loaded.scheduler.config.denoising_steps == list(pipe.scheduler.config.denoising_steps)
    assert np.array_equal(render(loaded), expected)


def test_a_saved_index_names_only_what_the_hub_accepts(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    entries = [entry for entry in index.values() if isinstance(entry, list) and entry != [None, None]]
    assert {entry[0] for entry in entries} == {"diffusers", "transformers"}
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]


def test_a_saved_pipeline_loads_in_stock_wan_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    stock = WanPipeline.from_pretrained(tmp_path)
    assert type(stock.transformer) is WanTransformer3DModel
    stock.set_progress_bar_config(disable=True)
    frames = stock("x", height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=1.0).frames
    assert frames.shape == (1, 5, 32, 32, 3)
    for name, parameter in stock.transformer.state_dict().items():
        assert torch.equal(parameter, pipe.transformer.state_dict()[name])


def test_a_stock_folder_loads_into_our_classes(stock_folder, pipe, caplog):
    index = json.loads((stock_folder / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert "transformer_2" in index
    loaded = WanAutoregressivePipeline.from_pretrained(stock_folder)
    assert type(loaded.transformer) is CausalWanTransformer3DModel
    assert type(loaded.scheduler) is SelfForcingScheduler
    assert loaded.scheduler.config.shift == 3.0
    loaded.scheduler = SelfForcingScheduler.from_config(pipe.scheduler.config)
    assert np.array_equal(render(loaded), render(pipe))


def test_loads_in_another_dtype(tiny_checkpoint):
    loaded = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float16)
    assert loaded.transformer.dtype == torch.float16
    assert loaded.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


def test_takes_stock_components_and_pipelines(pipe, tiny_checkpoint):
    stock = WanPipeline.from_pretrained(tiny_checkpoint)
    taken = WanAutoregressivePipeline(
        stock.tokenizer, stock.text_encoder, stock.transformer, stock.vae, UniPCMultistepScheduler(flow_shift=7.0)
    )
    assert taken.transformer is stock.transformer
    assert taken.scheduler.config.shift == 7.0
    stock = WanPipeline.from_pretrained(tiny_checkpoint)
    from_pipe = WanAutoregressivePipeline.from_pipe(stock)
    from_pipe.scheduler = SelfForcingScheduler.from_config(pipe.scheduler.config)
    assert np.array_equal(render(from_pipe), render(pipe))


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("transformer", ["diffusers", "FluxTransformer2DModel"], "transformer is a FluxTransformer2DModel"),
        ("vae", ["diffusers", "AutoencoderKL"], "vae is a AutoencoderKL"),
        ("transformer_2", ["diffusers", "FluxTransformer2DModel"], "transformer_2 is a FluxTransformer2DModel"),
        ("boundary_ratio", 0.9, "boundary_ratio is 0.9, but there is no transformer_2"),
    ],
)
def test_a_folder_of_another_model_is_refused(tiny_checkpoint, tmp_path, name, entry, message):
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, name: entry}))
    with pytest.raises(ValueError, match=message):
        WanAutoregressivePipeline.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offload_gives_the_same_frames(tiny_checkpoint, offload):
    """accelerate's and diffusers' hooks, with the CPU as execution device as well."""
    expected = render(align_weights(WanAutoregressivePipeline.from_pretrained(tiny_checkpoint)))
    hooked = align_weights(WanAutoregressivePipeline.from_pretrained(tiny_checkpoint))
    if offload == "model":
        hooked.enable_model_cpu_offload(device="cpu")
    elif offload == "sequential":
        # What enable_sequential_cpu_offload does; called directly because that insists on a device number.
        for component in (hooked.transformer, hooked.vae, hooked.text_encoder):
            accelerate.cpu_offload(component, torch.device("cpu"), offload_buffers=True)
    else:
        hooked.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
        hooked.vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert np.array_equal(render(hooked), expected)
