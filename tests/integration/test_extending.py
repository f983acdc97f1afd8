"""What a package outside of this one can add: a sampler, a switch policy and a codec, each used to make a video."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from saved_rollouts import SIZE, assert_same, generator, start

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.configs.registry import SAMPLERS, SWITCH_POLICIES
from wan_autoregressive.models import register_codec
from wan_autoregressive.pipelines.denoiser import Window
from wan_autoregressive.pipelines.samplers import Sampler
from wan_autoregressive.pipelines.switching import SwitchPolicy

SHORT = {**SIZE, "num_frames": 37, "window_frames": 6, "num_inference_steps": 2}  # 10 latent frames in 4 chunks


# [sampler]
class SharedNoiseSampler(Sampler):
    """Euler steps without fresh noise, each chunk starting from the noise of the first one, blended with its own."""

    def __init__(self, context, share: float = 0.5) -> None:
        super().__init__(context)
        self.share, self.first_noise = share, None

    def next_chunk(self, chunk):
        context = self.context
        scheduler, noise = context.scheduler_of(chunk), context.noise.initial(chunk.start, chunk.num_frames)
        self.first_noise = noise if self.first_noise is None else self.first_noise
        latents = (1 - self.share**2) ** 0.5 * noise + self.share * self.first_noise[:, :, : chunk.num_frames]
        timesteps = scheduler.timesteps.tolist()
        for timestep, change in zip(timesteps, scheduler.sigmas.diff(), strict=True):
            flow = context.denoiser.predict(latents, Window(chunk.frames, (timestep,)))
            latents = context.observer.step_done(chunk, timestep, latents + change * flow)
        context.denoiser.cache_context(latents, Window(chunk.frames, (0.0,)))
        return latents

    def reset(self):
        self.first_noise = None

    def state_dict(self):
        return {"first_noise": self.first_noise}

    def load_state_dict(self, state):
        self.first_noise = state["first_noise"]


SAMPLERS.register("shared_noise", SharedNoiseSampler)
# [end]


# [policy]
@dataclass
class Fade(SwitchPolicy):
    """Forget one frame of the past more with every chunk after a switch, until `frames` are left."""

    frames: int = 1
    left: int | None = None

    def switch(self, past, old):
        self.left = past.config.window_frames

    def begin_chunk(self, past):
        if self.left is not None:
            self.left = max(self.frames, self.left - 1)
            past.denoiser.keep_newest(self.left)

    def reset(self):
        self.left = None

    def state_dict(self):
        return {"left": self.left}

    def load_state_dict(self, state):
        self.left = state["left"]


SWITCH_POLICIES.register("fade", Fade)
# [end]


# [codec]
class NearestVae(ModelMixin, ConfigMixin):
    """No VAE at all: three latent channels are red, green and blue, 8 x 8 pixels each."""

    @register_to_config
    def __init__(self, z_dim: int = 16, scale_factor_spatial: int = 8, scale_factor_temporal: int = 4) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))


class NearestCodec:
    def __init__(self, vae: NearestVae) -> None:
        self.vae, self.latent_channels = vae, vae.config.z_dim
        self.scale_factor_spatial, self.scale_factor_temporal = 8, 4

    def decoder(self, parking_device=None):
        return NearestDecoder(self)

    def decode(self, latents):
        return NearestDecoder(self).decode(latents)

    def state_bytes(self, batch_size, height, width):
        return 0

    def settings(self):
        return {}


class NearestDecoder:
    state_bytes = 0

    def __init__(self, codec, started: bool = False) -> None:
        self.codec, self.started = codec, started

    def decode(self, latents):
        pixels = (latents[:, :3] * self.codec.vae.gain).clamp(-1, 1).repeat_interleave(4, dim=2)
        pixels = pixels if self.started else pixels[:, :, 3:]
        self.started = True
        return pixels.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)

    def reset(self):
        self.started = False

    def fork(self):
        return NearestDecoder(self.codec, self.started)

    def state_dict(self):
        return {"started": torch.tensor(self.started)}

    def load_state_dict(self, state):
        self.started = bool(state["started"])


register_codec(NearestVae, NearestCodec)
# [end]


def test_the_page_shows_this_code():
    page = (Path(__file__).parents[2] / "docs" / "EXTENDING.md").read_text()
    regions = re.findall(r"# \[(?:sampler|policy|codec)\]\n(.*?)\n*# \[end\]", Path(__file__).read_text(), re.DOTALL)
    assert re.findall(r"```python\n(.*?)\n```", page, re.DOTALL) == [region.rstrip() for region in regions]
    assert max(len([line for line in region.splitlines() if line.strip()]) for region in regions) < 40


def resumed_and_forked(pipe, tmp_path, **options):
    """A video in one go, and its second half from a saved state and from a fork."""
    rollout = start(pipe, **SHORT, **options)
    rollout.step()
    rollout.step(prompt="a blue cross")
    rollout.save(tmp_path)
    resumed, fork = pipe.resume(tmp_path), rollout.fork()
    expected = list(rollout)
    assert_same(list(resumed), expected)
    assert_same(list(fork), expected)
    return expected


def test_a_sampler(pipe, tmp_path):
    options = {"sampler": "shared_noise", "sampler_options": {"share": 0.3}}
    video = pipe("a red circle", **SHORT, **options, generator=generator()).frames
    assert video.shape == (1, 37, 32, 32, 3)
    chunks = resumed_and_forked(pipe, tmp_path, **options)
    other = resumed_and_forked(pipe, tmp_path, sampler="shared_noise", sampler_options={"share": 0.0})
    assert not torch.equal(chunks[0].latents, other[0].latents)
    with pytest.raises(ValueError, match=r"sampler_options do not fit sampler 'shared_noise': .*'shares'"):
        start(pipe, sampler="shared_noise", sampler_options={"shares": 0.3})
    assert pipe.estimate(**SHORT, sampler="shared_noise").forwards is None


def test_a_switch_policy(pipe, tmp_path):
    options = {"switch_policy": "fade", "switch_options": {"frames": 2}}
    resumed_and_forked(pipe, tmp_path, **options)
    rollout = start(pipe, **SHORT, **options)
    rollout.step()
    rollout.step(prompt="rain")
    held = [rollout.cache.num_tokens // rollout.components.tokens_per_frame(rollout.config)]
    held += [rollout.step() and rollout.cache.num_tokens // 4 for _ in range(2)]
    assert held == [6, 6, 4]
    with pytest.raises(ValueError, match="switch_options do not fit 'fade'"):
        start(pipe, switch_policy="fade", switch_options={"frame": 2})


def test_a_codec(pipe, tmp_path):
    nearest = WanAutoregressivePipeline(
        pipe.tokenizer, pipe.text_encoder, pipe.transformer, NearestVae(), pipe.scheduler
    )
    nearest.set_progress_bar_config(disable=True)
    chunks = resumed_and_forked(nearest, tmp_path)
    assert [chunk.frames.shape for chunk in chunks] == [(1, 12, 32, 32, 3), (1, 4, 32, 32, 3)]
    video = nearest("a red circle", **SHORT, generator=generator(), output_type="latent").frames
    whole = nearest("a red circle", **SHORT, generator=generator()).frames
    expected = (video[:, :3, -1] * 0.5 * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert (whole[:, -1, ::8, ::8] == expected).all()
    with torch.no_grad():
        nearest.vae.gain.add_(1)
    with pytest.raises(ValueError, match="is of a vae with other weights"):
        nearest.resume(tmp_path)
