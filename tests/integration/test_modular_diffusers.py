"""Blocks of `ModularPipeline`, tested as diffusers tests its own, and against the pipeline."""

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks, WanModularPipeline
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from diffusers.modular_pipelines.wan.encoders import WanTextEncoderStep
from saved_rollouts import SIZE, generator

from wan_autoregressive.integrations.modular_diffusers import WanAutoregressiveBlocks, WanAutoregressiveDecodeStep

INPUTS = {**SIZE, "num_frames": 23, "window_frames": 6, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def load(tiny_checkpoint):
    def loaded(blocks: ModularPipelineBlocks | None = None, folder=tiny_checkpoint):
        blocks = blocks or WanAutoregressiveBlocks()
        blocks.sub_blocks["denoise"].set_progress_bar_config(disable=True)
        pipeline = blocks.init_pipeline(str(folder))
        pipeline.load_components(dtype=torch.float32)
        return pipeline

    return loaded


@pytest.fixture(scope="module")
def modular(load):
    return load()


def run(pipeline, output="videos", **inputs):
    return pipeline(**{"prompt": "a red circle", **INPUTS, "generator": generator(), **inputs}, output=output)


def test_call_signature(modular):
    names = {
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "num_frames",
        "image",
        "video",
        "window_frames",
        "sampler",
    }
    assert isinstance(modular, WanModularPipeline)
    assert names <= set(modular.blocks.input_names)
    optional = {"num_inference_steps", "num_videos_per_prompt", "latents", "output_type", "generator"}
    assert optional <= set(modular.default_call_parameters)
    assert modular.blocks.output_names == ["videos"]


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        pytest.param(
            {"prompt": ["a red circle", "a blue square"], "num_videos_per_prompt": 2}, marks=pytest.mark.slow
        ),
        pytest.param({"guidance_scale": 2.0, "negative_prompt": "a blue square"}, marks=pytest.mark.slow),
        {"output_type": "pt", "image": torch.rand(1, 3, 32, 32, generator=generator(3))},
        {"sampler": "rolling", "position_mode": "sink_relative", "window_frames": 24},
    ],
    ids=["text", "batch", "guidance", "image", "rolling"],
)
def test_same_frames_as_the_pipeline(modular, pipe, inputs):
    expected = pipe(**{"prompt": "a red circle", **INPUTS, "generator": generator(), **inputs}).frames
    assert np.array_equal(run(modular, **inputs), expected)


@pytest.mark.slow
def test_batch_equals_single(modular):
    single = run(modular, output_type="pt")
    prompts, generators = ["a red circle", "a blue square"], [generator(0), generator(1)]
    both = run(modular, output_type="pt", prompt=prompts, generator=generators)
    assert both.shape[0] == 2
    torch.testing.assert_close(both[:1], single, atol=1e-4, rtol=0)


def test_saved_and_loaded(modular, load, tmp_path):
    modular.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    assert np.array_equal(run(load(folder=tmp_path)), run(modular))


def test_wans_own_text_encoder_and_decoder_fit(modular, load):
    blocks = WanAutoregressiveBlocks()
    blocks.sub_blocks["text_encoder"] = WanTextEncoderStep()
    blocks.sub_blocks["decode"] = WanVaeDecoderStep()
    mixed = load(blocks)
    assert torch.equal(run(mixed, "latents"), run(modular, "latents"))
    frames = run(mixed, num_frames=21)
    np.testing.assert_allclose(frames, run(modular, num_frames=21), atol=1e-5)


class ChangePromptStep(ModularPipelineBlocks):
    """A block of one's own in the loop: another prompt after the first chunk, and the end after the third."""

    model_name = "wan"

    def __call__(self, components, block_state, k):
        if k == 0:
            block_state.rollout.set_prompt(block_state.rollout.prompt.embeds.flip(1))
        if k == 2:
            block_state.rollout.interrupt()
        return components, block_state


def test_a_block_of_ones_own_runs_after_each_chunk(modular, load):
    blocks = WanAutoregressiveBlocks()
    blocks.sub_blocks["denoise"].sub_blocks.insert("change_prompt", ChangePromptStep(), 1)
    steered, plain = (run(pipeline, "latents", num_frames=61) for pipeline in (load(blocks), modular))
    assert (steered.shape[2], plain.shape[2]) == (9, 16)
    assert torch.equal(steered[:, :, :3], plain[:, :, :3])
    assert not torch.equal(steered[:, :, 3:6], plain[:, :, 3:6])


def test_latents_of_any_block_are_decoded(modular, pipe, tiny_checkpoint):
    latents = torch.randn(1, 16, 7, 4, 4, generator=generator())
    decode = WanAutoregressiveDecodeStep().init_pipeline(str(tiny_checkpoint))
    decode.load_components(dtype=torch.float32)
    np.testing.assert_allclose(decode(latents=latents, output="videos"), pipe.decode_latents(latents), atol=1e-5)


def test_wrong_inputs_are_named_before_a_model_runs(modular):
    with pytest.raises(ValueError, match="height"):
        run(modular, height=33)
