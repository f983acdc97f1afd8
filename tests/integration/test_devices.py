"""Models on devices of their own, the device `meta` standing for one that does nothing."""

import pytest
import torch
from saved_rollouts import noise, start

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.configs import resolve_config
from wan_autoregressive.scripts import load_pipeline as loading


@pytest.fixture
def parts(tiny_checkpoint) -> WanAutoregressivePipeline:
    return WanAutoregressivePipeline.from_pretrained(tiny_checkpoint)


def test_a_rollout_is_where_the_transformer_is_and_not_the_text_encoder(parts):
    embeds = noise(1, 16, 32)
    expected = start(parts, prompt=None, prompt_embeds=embeds, output_type="latent").step().latents
    parts.text_encoder.to("meta")
    assert parts._execution_device.type == "meta"  # diffusers goes by the first model
    rollout = start(parts, prompt=None, prompt_embeds=embeds, output_type="latent")
    assert rollout.device.type == "cpu"
    assert torch.equal(rollout.step().latents, expected)


def test_latents_go_to_where_the_vae_is(parts):
    expected = start(parts).step()
    parts.vae.to("meta")
    rollout = start(parts, output_type="latent")
    assert rollout.components.codec_device.type == "meta"
    assert torch.equal(rollout.step().latents, expected.latents)
    decoded = rollout.components.codec.decoder().decode(expected.latents.to("meta"))
    assert (decoded.device.type, decoded.shape[2]) == ("meta", expected.frames.shape[1])


def test_the_command_puts_the_vae_on_a_device_of_its_own(tiny_checkpoint, monkeypatch):
    config = resolve_config({"model": tiny_checkpoint, "device": "cpu", "vae_device": "cuda:1"})
    if torch.cuda.device_count() < 2:
        with pytest.raises(ValueError, match="device 'cuda:1' is not there"):
            loading.load_pipeline(config)
    monkeypatch.setattr(loading, "_pick_device", lambda name: torch.device("cpu" if name == "cpu" else "meta"))
    pipe = loading.load_pipeline(config)
    assert (pipe.transformer.device.type, pipe.vae.device.type) == ("cpu", "meta")
