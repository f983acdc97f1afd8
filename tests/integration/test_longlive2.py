"""LongLive 2.0 on a folder of Wan2.2-TI2V-5B: sizes, pixels, presets' settings, and all of it at once."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from saved_rollouts import assert_same, generator, noise, state_of
from wan22_folder import make_wan22_folder

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.configs.rollout_config import RolloutConfig, RolloutSettings

PRESETS = ("longlive2", "longlive2_2step", "longlive2_i2v")
SMALL = {"height": 64, "width": 96, "chunk_frames": 2, "window_frames": 6, "sink_frames": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_wan22_folder(tmp_path_factory.mktemp("wan22") / "stock")


@pytest.fixture(scope="module")
def wan22(folder) -> WanAutoregressivePipeline:
    pipe = WanAutoregressivePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings_of(preset: str) -> dict:
    """Those of a rollout; a preset has more, such as frames per second."""
    text = (files("wan_autoregressive.configs") / f"{preset}.yaml").read_text(encoding="utf-8")
    return {key: value for key, value in yaml.safe_load(text).items() if key in RolloutSettings.__annotations__}


def picture() -> Image.Image:
    pixels = (np.random.default_rng(0).random((64, 96, 3)) * 255).astype(np.uint8)
    return Image.fromarray(pixels)


def test_the_folder_is_that_of_the_published_model(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["expand_timesteps"] is True
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    vae = json.loads((folder / "vae" / "config.json").read_text())
    assert (vae["z_dim"], vae["patch_size"], vae["is_residual"], vae["scale_factor_spatial"]) == (48, 2, True, 16)
    assert vae["base_dim"] != vae["decoder_base_dim"]


def test_it_loads_with_its_shift_and_streams_the_pixels_of_a_whole_decode(wan22):
    assert wan22.scheduler.config.shift == 5.0
    chunks = list(wan22.rollout("a fox", num_frames=17, solver="unipc", **SMALL, generator=generator()))
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    assert latents.shape == (1, 48, 5, 4, 6)
    frames = np.concatenate([chunk.frames for chunk in chunks], axis=1)
    assert frames.shape == (1, 17, 64, 96, 3)
    np.testing.assert_allclose(frames, wan22.decode_latents(latents), atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("height", 48), ("width", 80)])
def test_sizes_are_multiples_of_32(wan22, name, size):
    with pytest.raises(ValueError, match=f"{name} is {size}; it must be divisible by 32"):
        wan22.rollout("a fox", **{**SMALL, name: size})


def test_an_image_stays_the_first_frame_of_its_chunk(wan22):
    image = picture()
    rollout = wan22.rollout("a fox", image=image, given_in_chunk=True, solver="unipc", num_frames=13, **SMALL)
    chunks = list(rollout)
    assert [chunk.latents.shape[2] for chunk in chunks] == [2, 2]
    assert torch.equal(chunks[0].latents[:, :, :1], wan22.encode_video([image], 64, 96))
    assert sum(chunk.frames.shape[1] for chunk in chunks) == 13


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_published_settings(preset):
    settings = settings_of(preset)
    config = RolloutConfig(**settings)
    assert (config.chunk_frames, config.window_frames, config.sink_frames, config.solver) == (8, 32, 8, "unipc")
    assert (config.height // 16, config.width // 16, (config.num_frames - 1) // 4 + 1) == (44, 80, 128)
    assert (config.switch_policy, config.switch_options) == ("scene_cut", {"position_offset": 8.0})
    assert config.given_in_chunk == (preset == "longlive2_i2v")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_makes_a_video(wan22, preset):
    size = {"height": 64, "width": 64, "num_frames": 85, "output_type": "latent"}
    image = picture() if preset == "longlive2_i2v" else None
    rollout = wan22.rollout("a fox", image=image, prompt_schedule={8: "a cat"}, **{**settings_of(preset), **size})
    timesteps = {"longlive2_2step": [999, 833]}.get(preset, [999, 937, 833, 624])
    assert [rollout._context.new_solver(chunk).timesteps for chunk in rollout.grid] == [timesteps] * 3
    assert wan22.estimate(given_frames=int(image is not None), **{**settings_of(preset), **size}).forwards == (
        3 * len(timesteps) + 2
    )
    assert torch.cat([chunk.latents for chunk in rollout], dim=2).shape == (1, 48, 22, 4, 4)


def everything() -> dict:
    return {
        **SMALL,
        "prompt": ["a fox", "a cat"],
        "negative_prompt": "gray",
        "guidance_scale": 3.0,
        "video_latents": noise(2, 48, 1, 4, 6),
        "given_in_chunk": True,
        "num_frames": 49,
        "solver": "unipc",
        "num_inference_steps": 3,
        "context_noise": 20.0,
        "switch_policy": "scene_cut",
        "switch_options": {"position_offset": 2.5, "clean_recache": True},
        "prompt_schedule": {4: ["rain", "snow"], 6: "fog", 10: "a red circle"},
        "generator": [generator(1), generator(2)],
    }


@pytest.mark.slow
def test_everything_at_once_resumed_and_forked_equals_uninterrupted(wan22, tmp_path):
    rollout, expected = wan22.rollout(**everything()), []
    for index in range(7):
        rollout.save(tmp_path / str(index))
        expected.append(rollout.step())
    assert rollout.done
    for index in (1, 4, 6):
        resumed = wan22.resume(tmp_path / str(index))
        twin = resumed.fork()
        assert_same([resumed.step() for _ in range(index, 7)], expected[index:])
        assert_same([twin.step() for _ in range(index, 7)], expected[index:])
        assert state_of(resumed) == state_of(rollout)


def test_a_video_of_a_batch_is_as_alone(wan22):
    together = wan22.rollout(**everything(), output_type="latent")
    alone = wan22.rollout(
        **{
            **everything(),
            "prompt": "a cat",
            "video_latents": everything()["video_latents"][1:],
            "prompt_schedule": {4: "snow", 6: "fog", 10: "a red circle"},
            "generator": generator(2),
        },
        output_type="latent",
    )
    for both, one in zip(together, alone, strict=True):
        # Products of one and of two rows are rounded differently, which grows over the chunks (1.1e-4 by torch's
        # kernels without vector instructions).
        torch.testing.assert_close(both.latents[1:], one.latents, rtol=0, atol=5e-4)
        assert (both.latents[:1] - one.latents).abs().max() > 0.1


def test_relative_positions_know_no_offset(wan22):
    arguments = {**everything(), "position_mode": "relative", "output_type": "latent"}
    near, far = (
        wan22.rollout(**{**arguments, "switch_options": {"position_offset": offset}, "generator": generator()})
        for offset in (0, 40.5)
    )
    assert_same(list(near), list(far))
