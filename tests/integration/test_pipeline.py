"""`__call__` as a diffusers user expects it, and its refusals."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import WanPipeline

from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline

SIZE = {"height": 32, "width": 32}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_output_types(pipe):
    arguments = {"prompt": "x", **SIZE, "num_frames": 10}
    array = pipe(**arguments, generator=generator()).frames
    tensor = pipe(**arguments, generator=generator(), output_type="pt").frames
    images = pipe(**arguments, generator=generator(), output_type="pil").frames
    latents = pipe(**arguments, generator=generator(), output_type="latent").frames
    (from_tuple,) = pipe(**arguments, generator=generator(), return_dict=False)
    assert array.shape == (1, 10, 32, 32, 3)
    assert array.min() >= 0
    assert array.max() <= 1
    assert tensor.shape == (1, 10, 3, 32, 32)
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    assert len(images[0]) == 10
    assert isinstance(images[0][0], PIL.Image.Image)
    assert np.array_equal(np.asarray(images[0][3]), (array[0, 3] * 255).round().astype("uint8"))
    assert latents.shape == (1, 16, 4, 4, 4)
    assert np.array_equal(from_tuple, array)


def test_prompts_and_seeds_matter_and_repeat(pipe):
    def video(prompt, seed):
        return pipe(prompt, **SIZE, num_frames=9, generator=generator(seed)).frames

    base = video("a red circle", 0)
    assert np.array_equal(video("a red circle", 0), base)
    assert np.abs(video("a red circle", 1) - base).mean() > 0.01
    assert np.abs(video("a blue cross", 0) - base).mean() > 0.001


def test_batches(pipe):
    frames = pipe(["one", "two"], **SIZE, num_frames=5, num_videos_per_prompt=2, generator=generator()).frames
    assert frames.shape == (4, 5, 32, 32, 3)
    embeds = pipe.wan_components().encode_prompt(["one", "two"], 2).embeds
    from_embeds = pipe(
        prompt_embeds=embeds, **SIZE, num_frames=5, num_videos_per_prompt=2, generator=generator()
    ).frames
    np.testing.assert_allclose(from_embeds, frames, atol=1e-5)


def test_text_is_encoded_as_in_wan_pipeline(pipe):
    stock = WanPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        scheduler=pipe.scheduler,
        transformer=pipe.transformer,
    )
    with torch.no_grad():
        expected, _ = stock.encode_prompt("a red circle", do_classifier_free_guidance=False, max_sequence_length=512)
    embeds = pipe.wan_components().encode_prompt("a red circle", 1).embeds
    assert torch.equal(embeds, expected)
    assert embeds.shape[1] == 512
    assert embeds[:, 100:].abs().max() == 0


def test_guidance(pipe):
    arguments = {"prompt": "a red circle", **SIZE, "num_frames": 21, "output_type": "latent"}
    plain = pipe(**arguments, generator=generator()).frames
    barely = pipe(**arguments, generator=generator(), guidance_scale=1.0001, negative_prompt="gray").frames
    guided = pipe(**arguments, generator=generator(), guidance_scale=4.0, negative_prompt="gray").frames
    other = pipe(**arguments, generator=generator(), guidance_scale=4.0, negative_prompt="black").frames
    assert (barely - plain).abs().max() < 0.05 < (guided - plain).abs().max()
    assert not torch.equal(guided, other)


def test_initial_noise(pipe):
    noise = torch.randn(1, 16, 6, 4, 4, generator=generator(5))
    frames = pipe("x", latents=noise, generator=generator()).frames  # size and length follow from the noise
    assert frames.shape == (1, 21, 32, 32, 3)
    zero = pipe("x", latents=torch.zeros_like(noise), generator=generator()).frames
    assert not np.array_equal(zero, frames)


def test_denoising_steps(pipe):
    arguments = {"prompt": "x", **SIZE, "num_frames": 5, "output_type": "latent"}
    by_count = pipe(**arguments, num_inference_steps=2, generator=generator()).frames
    by_list = pipe(**arguments, denoising_steps=(1000, 500), generator=generator()).frames
    assert torch.equal(by_count, by_list)
    assert pipe.num_timesteps == 2
    assert pipe.scheduler.timesteps.numel() == 4, "a call must not change the pipeline's scheduler"


def test_callback_sees_and_changes_the_whole_video(pipe):
    seen = []

    def zero_at_the_end(pipeline, step, timestep, tensors):
        assert set(tensors) == {"latents", "prompt_embeds"}
        assert tensors["latents"].shape == (1, 16, 6, 4, 4)
        seen.append((step, timestep))
        if step == pipeline.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    latents = pipe(
        "x",
        **SIZE,
        num_frames=21,
        output_type="latent",
        callback_on_step_end=zero_at_the_end,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).frames
    assert latents.abs().sum() == 0
    assert [step for step, _ in seen] == list(range(8))
    assert [timestep for _, timestep in seen] == pipe.scheduler.timesteps.tolist() * 2


def test_a_callback_that_changes_nothing_changes_nothing(pipe):
    arguments = {"prompt": "x", **SIZE, "num_frames": 18}
    given = torch.randn(1, 16, 2, 4, 4, generator=generator(5))
    plain = pipe(**arguments, video_latents=given, generator=generator()).frames
    watched = pipe(
        **arguments, video_latents=given, generator=generator(), callback_on_step_end=lambda *args: args[-1]
    ).frames
    assert np.array_equal(plain, watched)


def test_interrupt_ends_after_the_step(pipe):
    seen = []

    def interrupt_in_second_chunk(pipeline, step, timestep, tensors):
        seen.append(step)
        if step == 5:
            pipeline._interrupt = True
        return tensors

    latents = pipe(
        "x", **SIZE, num_frames=33, output_type="latent", callback_on_step_end=interrupt_in_second_chunk
    ).frames
    assert seen == [0, 1, 2, 3, 4, 5]
    assert latents.shape[2] == 6
    assert pipe("x", **SIZE, num_frames=33, output_type="latent").frames.shape[2] == 9


def test_vae_tiling_and_slicing(pipe):
    arguments = {"prompt": ["one", "two"], "height": 64, "width": 64, "num_frames": 9}
    plain = pipe(**arguments, generator=generator()).frames
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling(32, 32, 24, 24)
    try:
        chunked = pipe(**arguments, generator=generator()).frames
        latents = pipe(**arguments, generator=generator(), output_type="latent").frames
        assert np.array_equal(chunked, pipe.decode_latents(latents, "np"))
    finally:
        pipe.vae.disable_slicing()
        pipe.vae.disable_tiling()
    assert not np.array_equal(plain, chunked)


def test_lora_scale_reaches_the_layers(pipe, tiny_checkpoint):
    from peft import LoraConfig

    adapted = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint)
    adapted.set_progress_bar_config(disable=True)
    arguments = {"prompt": "x", **SIZE, "num_frames": 5, "output_type": "latent"}
    plain = adapted(**arguments, generator=generator()).frames
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    full = adapted(**arguments, generator=generator()).frames
    off = adapted(**arguments, generator=generator(), attention_kwargs={"scale": 0.0}).frames
    assert (full - plain).abs().max() > 1e-3
    torch.testing.assert_close(off, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "pass exactly one of prompt, prompt_embeds; got neither"),
        ({"prompt": "x", "prompt_embeds": torch.zeros(1, 8, 32)}, "got prompt and prompt_embeds"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": []}, "prompt is \\[\\]"),
        ({"prompt": None, "prompt_embeds": torch.zeros(8, 32)}, r"shape \(8, 32\); they must be"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 8, 33)}, r"shape \(1, 8, 33\); they must be .* 32\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 8, 32, dtype=torch.int64)}, "are torch.int64 of shape"),
        ({"height": 30}, "height is 30; it must be divisible by 16"),
        ({"width": 8}, "width is 8; it must be divisible by 16, such as 16"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_frames": 4.0}, "num_frames is 4.0"),
        ({"num_frames": 4096}, "absolute positions end at 1024 latent frames, 4093 pixel frames"),
        ({"chunk_frames": 0}, "chunk_frames is 0"),
        ({"window_frames": 2}, "must be at least 3"),
        ({"window_frames": 5, "sink_frames": 3}, "must be at least 6"),
        ({"window_frames": 5, "first_chunk_frames": 6}, "must be at least 6"),
        ({"sink_frames": 1}, "window_frames is not set"),
        ({"sink_frames": -1}, "sink_frames is -1"),
        ({"context_noise": -1}, "context_noise is -1"),
        ({"output_type": "gif"}, "output_type is 'gif'"),
        ({"switch_policy": "jump"}, "switch_policy is 'jump'"),
        ({"prompt_schedule": {-1: "y"}}, "has the key -1"),
        ({"prompt_schedule": {3: 4}}, "prompt is 4"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"denoising_steps": (250, 500)}, "descend"),
        ({"latents": torch.zeros(1, 16, 3, 4, 4)}, "latents has shape"),
        ({"video_latents": torch.zeros(1, 16, 1, 5, 4)}, "video_latents has shape"),
        ({"video_latents": torch.zeros(16, 1, 4, 4)}, "video_latents has shape"),
        ({"video_latents": torch.zeros(1, 16, 5, 4, 4)}, "nothing would be generated"),
        ({"image": np.zeros((4, 4, 3)), "video": np.zeros((1, 4, 4, 3))}, "at most one of image, video"),
        ({"generator": [torch.Generator()] * 2}, "got 2 generators for 1 videos"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"has \['noise'\]; allowed are"),
    ],
)
def test_refuses_before_any_forward(pipe, arguments, message, monkeypatch):
    def forward(*args, **kwargs):
        raise AssertionError("a model ran")

    for model in (pipe.transformer, pipe.vae.decoder, pipe.vae.encoder, pipe.text_encoder):
        monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "x", **SIZE, "num_frames": 17, **arguments})


def test_components_that_are_missing_are_named(pipe):
    bare = WanAutoregressivePipeline(None, None, pipe.transformer, None, SelfForcingScheduler())
    with pytest.raises(ValueError, match="no text encoder"):
        bare("x", **SIZE, num_frames=5, output_type="latent")
    embeds = pipe.wan_components().encode_prompt("x", 1).embeds
    with pytest.raises(ValueError, match="no VAE; use 'latent'"):
        bare(prompt_embeds=embeds, **SIZE, num_frames=5)
    with pytest.raises(ValueError, match="no VAE: pass video_latents"):
        bare(prompt_embeds=embeds, **SIZE, num_frames=5, output_type="latent", image=np.zeros((32, 32, 3)))


def test_a_transformer_conditioned_on_an_image_needs_one():
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 1, "text_dim": 8}
    model = CausalWanTransformer3DModel(**config, freq_dim=8, in_channels=36, out_channels=16)
    pipe = WanAutoregressivePipeline(None, None, model, None, SelfForcingScheduler())
    with pytest.raises(ValueError, match=r"conditioned on an image .36 input and 16 output channels.; pass image"):
        pipe(prompt_embeds=torch.zeros(1, 4, 8), **SIZE, num_frames=5, output_type="latent")
