"""Transformers that are conditioned on an image, against diffusers' own pipeline and its transformer."""

import json
import shutil
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from naive_video import CHANNELS, TEXT_DIM, Frame, NaiveTransformer, randn
from PIL import Image
from saved_rollouts import assert_same, generator, start, state_of
from wan22_folder import make_i2v_a14b_folder, make_i2v_folder

from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline
from wan_autoregressive.pipelines.image_condition import ImageCondition, encode_image_condition
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts import cli
from wan_autoregressive.scripts.load_pipeline import check_model_folder

BOUND = 1e-4  # float32
FOLDERS = {"i2v": make_i2v_folder, "i2v-a14b": make_i2v_a14b_folder}
CONDITION_CHANNELS = 4 + CHANNELS


def picture(height: int = 40, width: int = 56, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("folders")
    return {name: make(place / name) for name, make in FOLDERS.items()}


def loaded(folder) -> WanAutoregressivePipeline:
    pipe = WanAutoregressivePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=FOLDERS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def i2v(folders, name) -> WanAutoregressivePipeline:
    return loaded(folders[name])


def begin(pipe, **options) -> WanRollout:
    return start(pipe, **{"image": picture(), "num_inference_steps": 4, **options})


# What the condition is.


def test_the_condition_is_that_of_diffusers(i2v, folders, name):
    stock, image = WanImageToVideoPipeline.from_pretrained(folders[name]), picture()
    condition = begin(i2v, num_frames=49, prompt=["a red circle", "rain"]).denoiser.image
    pixels = stock.video_processor.preprocess(image, height=32, width=32)
    _, expected = stock.prepare_latents(pixels, 2, CHANNELS, 32, 32, 49, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(condition.channels, expected, rtol=0, atol=1e-5)
    assert torch.equal(condition.channels[:, :4], expected[:, :4])
    if name == "i2v":
        embeds = stock.encode_image(image).repeat(2, 1, 1)
        assert embeds.shape == (2, 5, 24)
        assert torch.equal(condition.embeds, embeds)
    else:
        assert condition.embeds is None


def test_one_step_is_that_of_the_stock_transformer(i2v, folders, name):
    stock = WanImageToVideoPipeline.from_pretrained(folders[name])
    noise = randn(1, CHANNELS, 3, 4, 4)
    one_step = {"denoising_steps": (1000,), "num_inference_steps": None}
    pipe = i2v
    if name == "i2v-a14b":  # both experts need a step
        pipe = WanAutoregressivePipeline(**{**i2v.components, "transformer_2": None}, boundary_ratio=None)
    rollout = begin(pipe, latents=noise, num_frames=9, output_type="latent", **one_step)
    condition = rollout.denoiser.image
    with torch.no_grad():
        flow = stock.transformer(
            torch.cat([noise, condition.of(range(3))], dim=1),
            torch.tensor([1000.0]),
            rollout.prompt.embeds,
            condition.embeds,
            return_dict=False,
        )[0]
    torch.testing.assert_close(rollout.step().latents, noise - flow, rtol=0, atol=BOUND)


def test_far_from_the_image_the_condition_stays_the_same(i2v):
    components, image = i2v.wan_components(), picture()
    endless = encode_image_condition(components, image, 32, 32, 1, None)
    known = endless.channels.shape[2]
    assert 3 < known < 64  # it was found to be steady, and not at once
    pixels = components.preprocess_pixels([image], 32, 32)
    video = torch.cat([pixels, pixels.new_zeros(1, 3, 4 * (known + 5), 32, 32)], dim=2)
    whole = components.encode_pixels(video)
    torch.testing.assert_close(endless.of(range(known + 6))[:, 4:], whole, rtol=0, atol=1e-5)
    assert torch.equal(endless.of(range(known + 2, known + 4))[:, :, 0], endless.channels[:, :, -1])


def test_the_frames_of_a_condition():
    channels = randn(1, 2, 3, 1, 1)
    condition = ImageCondition(channels)
    for frames in (range(0, 2), range(1, 3), range(2, 5), range(3, 4), range(7, 9)):
        expected = torch.stack([channels[:, :, min(frame, 2)] for frame in frames], dim=2)
        assert torch.equal(condition.of(frames), expected)


# Cached equals recomputed.


@dataclass
class NaiveImageVideo:
    """Every forward runs all frames so far, past ones at t = 0, each with its part of the condition."""

    experts: list[NaiveTransformer]
    condition: torch.Tensor
    window: int | None = None
    sink: int = 0
    switch: int | None = None
    """First frame of the second prompt; all before it were then rebuilt under that, in sight of each other."""
    chunks: tuple[int, ...] = (1, 3, 3, 2)
    finished: list[torch.Tensor] = field(default_factory=list)

    def make(self, noise: torch.Tensor, sigmas: list[float], guidance: float) -> torch.Tensor:
        """One step of Euler for each sigma: with one transformer what solver `unipc` of order 1 would do."""
        ends = np.cumsum(self.chunks)
        for start, end in zip([0, *ends], ends, strict=False):
            x = noise[:, :, start:end]
            for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
                wanted, negative = (self._flow(x, sigma, prompt, end) for prompt in (0, 2))
                flow = negative + guidance * (wanted - negative)
                x = self._stepped(x, flow, sigma, following)
            self.finished += x.split(1, dim=2)
        return torch.cat(self.finished, dim=2)

    @staticmethod
    def _stepped(x: torch.Tensor, flow: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        fresh = torch.zeros_like(x)  # the noise source of the test
        return (1 - following) * (x - sigma * flow) + following * fresh

    def _flow(self, x: torch.Tensor, sigma: float, prompt: int, end: int) -> torch.Tensor:
        done = len(self.finished)
        rebuilt = 0
        if prompt == 0 and self.switch is not None and done >= self.switch:
            prompt, rebuilt = 1, self.switch
        frames = []
        for number, latents in enumerate([*self.finished, *x.split(1, dim=2)]):
            chunk_end = int(next(stop for stop in np.cumsum(self.chunks) if number < stop))
            sees = self._seen(max(rebuilt, chunk_end) if number < done else end)
            latents = torch.cat([latents, self.condition[:, :, number : number + 1]], dim=1)
            frames.append(Frame(latents, 0.0 if number < done else 1000 * sigma, number, sees, prompt))
        return self.experts[0].flow(frames)[:, :, done:]

    def _seen(self, end: int) -> dict[int, int]:
        first = 0 if self.window is None else max(0, end - (self.window - self.sink))
        return {number: number for number in (*range(min(self.sink, first)), *range(first, end))}


@pytest.mark.parametrize(
    "case",
    [{}, {"switch": 4}, {"switch": 1}, {"window": 5, "sink": 1}, {"clip": False, "window": 4}],
    ids=lambda case: str(case) or "plain",
)
def test_cached_equals_recomputed(case, monkeypatch):
    case = dict(case)
    clip = {"image_dim": 8, "added_kv_proj_dim": 40} if case.pop("clip", True) else {}
    prompts = [randn(2, 6, TEXT_DIM, seed=seed) for seed in (1, 2, 3)]
    image = randn(2, 5, 8, seed=6) if clip else None
    naive = NaiveTransformer(
        prompts=prompts, sizes={"in_channels": CHANNELS + CONDITION_CHANNELS, **clip}, image=image
    )
    condition = randn(2, CONDITION_CHANNELS, 9, 4, 4, seed=7)
    noise = randn(2, CHANNELS, 9, 4, 4, seed=4)
    scheduler = SelfForcingScheduler(denoising_steps=(1000, 700, 300), shift=3.0)
    sigmas = [float(sigma) for sigma in scheduler.sigmas[:3]]
    expected = NaiveImageVideo([naive], condition, **case).make(noise, sigmas, guidance=3.0)

    zeros = "wan_autoregressive.schedulers.self_forcing_scheduler.draw_noise"
    monkeypatch.setattr(zeros, lambda shape, generator, device, dtype: torch.zeros(shape, dtype=dtype))
    pipe = naive.pipeline((1000, 700, 300))
    pipe.scheduler = scheduler
    monkeypatch.setattr("wan_autoregressive.pipelines.input_checks.check_image", lambda *_: None)
    monkeypatch.setattr("wan_autoregressive.pipelines.pipeline_wan_autoregressive.check_image", lambda *_: None)
    monkeypatch.setattr(
        "wan_autoregressive.pipelines.pipeline_wan_autoregressive.encode_image_condition",
        lambda *_: ImageCondition(condition[:, :, :9], image),
    )
    rollout = pipe.rollout(
        image=picture(),
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[2],
        guidance_scale=3.0,
        latents=noise,
        first_chunk_frames=1,
        window_frames=case.get("window"),
        sink_frames=case.get("sink", 0),
        output_type="latent",
        prompt_schedule=None if "switch" not in case else {case["switch"]: prompts[1]},
    )
    made = torch.cat([chunk.latents for chunk in rollout], dim=2)
    torch.testing.assert_close(made, expected, rtol=0, atol=BOUND)
