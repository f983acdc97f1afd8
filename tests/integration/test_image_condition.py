"""Transformers that are conditioned on an image, against diffusers' own pipeline and its transformer."""

import itertools
import json
import shutil
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanImageToVideoPipeline
from naive_video import CHANNELS, TEXT_DIM, Frame, NaiveTransformer, randn
from PIL import Image
from saved_rollouts import assert_same, generator, start, state_of
from saved_runs import frames_of
from test_tiny_codec import small_vae
from wan22_folder import make_i2v_a14b_folder, make_i2v_folder

from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models import codec_of
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.image_condition import ImageCondition, encode_image_condition
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.scripts import cli
from wan_autoregressive.scripts.costs.allocations import flop_counter
from wan_autoregressive.scripts.costs.memory import estimate_memory
from wan_autoregressive.scripts.costs.sizes import ModelSizes
from wan_autoregressive.scripts.costs.workload import make_workload
from wan_autoregressive.scripts.load_pipeline import check_model_folder

BOUND = 1e-4  # float32
FOLDERS = {"i2v": make_i2v_folder, "i2v-a14b": make_i2v_a14b_folder}
CONDITION_CHANNELS = 4 + CHANNELS
GUIDANCE = 3.0
ENDS = (1, 4, 7)  # of chunks


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("vae", ["full", "tiny"])
def test_far_from_the_image_the_condition_stays_the_same(i2v, vae):
    components, image = i2v.wan_components(), picture()
    if vae == "tiny":
        components = replace(components, codec=codec_of(small_vae()))
    endless = encode_image_condition(components, image, 32, 32, 1, None)
    known = endless.channels.shape[2]
    assert 3 < known < 64  # it was found to be steady, and not at once
    pixels = components.preprocess_pixels([image], 32, 32)
    video = torch.cat([pixels, pixels.new_zeros(1, 3, 4 * (known + 5), 32, 32)], dim=2)
    whole, made = components.encode_pixels(video), endless.of(range(known + 6))[:, 4:]
    first = 1 if vae == "tiny" else 0  # which looks ahead, and here sees the image alone
    torch.testing.assert_close(made[:, :, first:], whole[:, :, first:], rtol=0, atol=1e-5)
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

    transformer: NaiveTransformer
    condition: torch.Tensor
    window: int | None = None
    sink: int = 0
    switch: int | None = None
    """First frame of the second prompt; all before it were then rebuilt under that, in sight of each other."""
    finished: list[torch.Tensor] = field(default_factory=list)

    def make(self, noise: torch.Tensor, sigmas: list[float], source: torch.Generator) -> torch.Tensor:
        for first, end in itertools.pairwise((0, *ENDS)):
            x = noise[:, :, first:end]
            for sigma, following in zip(sigmas, [*sigmas[1:], None], strict=True):
                wanted, negative = (self._flow(x, sigma, prompt, end) for prompt in (0, 2))
                x = x - sigma * (negative + GUIDANCE * (wanted - negative))
                if following is not None:
                    x = (1 - following) * x + following * torch.randn(x.shape, generator=source)
            self.finished += x.split(1, dim=2)
        return torch.cat(self.finished, dim=2)

    def _flow(self, x: torch.Tensor, sigma: float, prompt: int, end: int) -> torch.Tensor:
        done, rebuilt = len(self.finished), 0
        if prompt == 0 and self.switch is not None and done >= self.switch:
            prompt, rebuilt = 1, self.switch
        frames = []
        for number, latents in enumerate([*self.finished, *x.split(1, dim=2)]):
            own_end = next(stop for stop in ENDS if number < stop)
            sees = self._seen(max(rebuilt, own_end) if number < done else end)
            latents = torch.cat([latents, self.condition[:, :, number : number + 1]], dim=1)
            frames.append(Frame(latents, 0.0 if number < done else 1000 * sigma, number, sees, prompt))
        return self.transformer.flow(frames)[:, :, done:]

    def _seen(self, end: int) -> dict[int, int]:
        first = 0 if self.window is None else max(0, end - (self.window - self.sink))
        return {number: number for number in (*range(min(self.sink, first)), *range(first, end))}


@pytest.mark.parametrize(
    ("sees_clip", "case"),
    [(True, {}), (True, {"switch": 4}), (False, {"switch": 1}), (False, {"window": 5, "sink": 1})],
    ids=["plain", "switch at 4", "no CLIP, switch at 1", "no CLIP, window"],
)
def test_cached_equals_recomputed(sees_clip, case):
    prompts = [randn(2, 6, TEXT_DIM, seed=seed) for seed in (1, 2, 3)]
    sizes = {"in_channels": CHANNELS + CONDITION_CHANNELS}
    sizes |= {"image_dim": 8, "added_kv_proj_dim": 40} if sees_clip else {}
    embeds = randn(2, 5, 8, seed=6) if sees_clip else None
    naive = NaiveTransformer(prompts=prompts, sizes=sizes, image=embeds)
    condition, noise = randn(2, CONDITION_CHANNELS, 7, 4, 4, seed=7), randn(2, CHANNELS, 7, 4, 4, seed=4)
    condition[:, :, 6:] = condition[:, :, 5:6]  # as far from the image
    scheduler = SelfForcingScheduler(denoising_steps=(1000, 700, 300), shift=3.0)
    scheduler.set_timesteps()
    sigmas = scheduler.sigmas[:3].tolist()
    expected = NaiveImageVideo(naive, condition, **case).make(noise, sigmas, generator(5))

    window = {"window_frames": case.get("window"), "sink_frames": case.get("sink", 0)}
    config = RolloutConfig(32, 32, 25, first_chunk_frames=1, guidance_scale=GUIDANCE, output_type="latent", **window)
    rollout = WanRollout(
        WanComponents(naive.causal, scheduler),
        config,
        PromptState(prompts[0]),
        prompts[2],
        prompt_schedule={case["switch"]: PromptState(prompts[1])} if "switch" in case else {},
        generator=generator(5),
        latents=noise,
        image=ImageCondition(condition[:, :, :6], embeds),
    )
    made = torch.cat([chunk.latents for chunk in rollout], dim=2)
    torch.testing.assert_close(made, expected, rtol=0, atol=BOUND)


# Saved, forked, begun again.


def options(seed: int = 0) -> dict:
    own = {"first_chunk_frames": 1, "window_frames": 6, "sink_frames": 1, "guidance_scale": 2.0}
    return {**own, "num_frames": 37, "prompt_schedule": {4: "rain"}, "generator": generator(seed)}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["chunkwise", "rolling", "memory_bank", "stream_batch"])
def test_resumed_and_forked_equal_uninterrupted(i2v, name, sampler, tmp_path):
    settings = {"chunkwise": {}, "rolling": {"first_chunk_frames": None, "window_frames": 15, "sink_frames": 0}}
    settings["stream_batch"] = {"switch_policy": "cross_attention", "chunk_frames": 2}
    settings["memory_bank"] = {"memory_bank_frames": 1, "window_frames": 6, "sink_frames": 1}
    own = {**settings[sampler], "sampler": sampler}
    if name == "i2v-a14b" and sampler in ("rolling", "stream_batch"):
        pytest.skip("two transformers take chunk after chunk")
    expected = list(begin(i2v, **options() | own))
    rollout = begin(i2v, **options() | own)
    for _ in range(2):
        rollout.step()
    rollout.save(tmp_path / "state")
    resumed, twin = i2v.resume(tmp_path / "state"), rollout.fork()
    if sampler == "chunkwise":
        assert state_of(resumed) == state_of(rollout)
    assert_same(list(resumed), expected[2:])
    assert_same(list(twin), expected[2:])


@pytest.mark.slow
def test_begun_again_it_is_the_same_video_and_of_another_image_another(i2v):
    fixed = {"latents": randn(1, CHANNELS, 7, 4, 4), "denoising_steps": (1000, 850, 300), "num_frames": 25}
    fixed |= {"num_inference_steps": None, "solver": "renoise", "first_chunk_frames": 1}
    rollout = begin(i2v, **fixed, generator=generator())
    first = list(rollout)
    other = list(begin(i2v, **fixed, generator=generator(), image=picture(seed=1)))
    assert not any(torch.equal(one.latents, two.latents) for one, two in zip(first, other, strict=True))
    rollout.reset()
    rollout.noise.generator.manual_seed(0)
    assert_same(list(rollout), first)


@pytest.mark.slow
def test_the_image_is_encoded_once(i2v, monkeypatch):
    """And what it takes is what the estimate says."""
    calls = []
    encode = i2v.vae.encoder.forward
    monkeypatch.setattr(i2v.vae.encoder, "forward", lambda *a, **k: calls.append(1) or encode(*a, **k))
    rollout = begin(i2v, **options())
    encoded = len(calls)
    assert encoded == 10  # latent frames
    list(rollout)
    assert len(calls) == encoded
    settings = {key: value for key, value in options().items() if key not in ("prompt_schedule", "generator")}
    estimate = i2v.estimate(height=32, width=32, num_inference_steps=4, **settings)
    assert rollout.denoiser.text_kv_bytes == estimate.text_kv_bytes
    assert rollout.denoiser.kv_cache_bytes == estimate.kv_cache_bytes
    assert rollout.nbytes > rollout.denoiser.image.nbytes


@pytest.mark.slow
def test_a_clip_is_gone_on_with_under_its_image(i2v):
    """Given latents of a video that was made are cached as its own chunks were."""
    noise = randn(1, CHANNELS, 7, 4, 4)
    fixed = {"solver": "unipc", "output_type": "latent", "num_frames": 25, "first_chunk_frames": 1}
    first, *others = begin(i2v, **fixed, latents=noise)
    given = begin(i2v, **fixed, latents=noise[:, :, 1:], video_latents=first.latents)
    for chunk, expected in zip(list(given)[1:], others, strict=True):
        assert torch.equal(chunk.latents, expected.latents)


# Folders and the command.


@pytest.mark.slow
def test_a_folder_is_saved_as_it_was(i2v, folders, name, tmp_path):
    i2v.save_pretrained(tmp_path)
    check_model_folder(tmp_path)
    again = loaded(tmp_path)
    assert type(again.transformer) is CausalWanTransformer3DModel
    expected, made = (torch.cat([c.latents for c in begin(pipe, **options())], 2) for pipe in (i2v, again))
    assert torch.equal(made, expected)
    stock = WanImageToVideoPipeline.from_pretrained(tmp_path)
    assert (stock.image_encoder is None) == (name == "i2v-a14b")
    from_pipe = WanAutoregressivePipeline.from_pipe(WanImageToVideoPipeline.from_pretrained(folders[name]))
    made = torch.cat([chunk.latents for chunk in begin(from_pipe, **options())], 2)
    assert torch.equal(made, expected)


@pytest.mark.slow
def test_the_command_makes_a_video_from_an_image(folders, name, tmp_path, capsys):
    picture().save(tmp_path / "x.png")
    words = ["--model", str(folders[name]), "--prompt", "a red circle", "--height", "32", "--width", "32"]
    words += ["--num-frames", "13", "--num-inference-steps", "4", "--device", "cpu", "--seed", "0"]
    assert cli.main(["generate", *words, "--output", str(tmp_path / "no.mp4")]) == 2
    assert "conditioned on an image (36 input and 16 output channels); pass image" in capsys.readouterr().err
    words += ["--image", str(tmp_path / "x.png"), "--output", str(tmp_path / "x.mp4")]
    assert cli.main(["generate", *words, "--dry-run"]) == 0
    assert "latent_frames: 4" in capsys.readouterr().out
    assert cli.main(["generate", *words]) == 0
    assert len(frames_of(tmp_path / "x.mp4")) == 13


# Refusals, before any model runs.


def test_what_cannot_work_is_refused(i2v, folders, name, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model ran")

    pipe = loaded(folders[name])
    for model in (pipe.text_encoder, pipe.transformer, pipe.vae.encoder, pipe.image_encoder):
        if model is not None:
            monkeypatch.setattr(model, "forward", fail)
    cases = [({"image": None}, "pass image"), ({"image": None, "video_latents": randn(1, CHANNELS, 1, 4, 4)}, "pass")]
    cases += [({"sampler": "recompute", "window_frames": 6, "switch_policy": "blend"}, "numbers frames anew")] * (
        name == "i2v"
    )
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            begin(pipe, **settings)
    vae, encoder = pipe.vae, pipe.image_encoder
    pipe.vae = None
    with pytest.raises(ValueError, match="has no VAE"):
        begin(pipe, output_type="latent")
    pipe.vae = vae
    if encoder is None:  # one that nobody asks is not run
        monkeypatch.undo()
        pipe.image_encoder, pipe.image_processor = torch.nn.Identity(), object()
        assert begin(pipe).denoiser.image.embeds is None
    else:
        pipe.image_encoder = None
        with pytest.raises(ValueError, match="lacks the image_encoder or the image_processor"):
            begin(pipe)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 33}, "takes 33 and gives 16 channels .* or 20 more for a mask and an image"),
        ({"in_channels": 36, "pos_embed_seq_len": 10, "image_dim": 24}, "a first and a last frame"),
    ],
)
def test_transformers_that_are_conditioned_otherwise(pipe, config, message):
    transformer = CausalWanTransformer3DModel.from_config({**pipe.transformer.config, **config})
    other = WanAutoregressivePipeline(**{**pipe.components, "transformer": transformer})
    with pytest.raises(ValueError, match=message):
        begin(other)


def test_a_folder_without_its_image_encoder(folders, tmp_path):
    shutil.copytree(folders["i2v"], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "image_encoder")
    with pytest.raises(ValueError, match="there is no folder 'image_encoder' in it"):
        check_model_folder(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"image_encoder/config\.json is missing"):
        ModelSizes.of_folder(tmp_path / "copy")


@pytest.mark.slow
def test_the_estimate_of_a_folder_is_what_its_image_takes(folders, name, i2v, tmp_path, capsys):
    sizes = {"height": 32, "width": 32, "window_frames": None, "sink_frames": 0, "chunks": 3}
    workload = make_workload(ModelSizes.of_folder(folders[name]), **sizes)
    estimate = estimate_memory(workload)
    settings = {key: value for key, value in vars(workload.rollout).items() if key != "output_type"}
    with flop_counter() as counter:
        rollout = i2v.rollout(
            prompt_embeds=randn(1, 512, i2v.transformer.config.text_dim), image=picture(), **settings
        )
    assert counter.get_total_flops() == sum(estimate.image_flops.values())
    assert rollout.denoiser.image.nbytes == estimate.image_condition_bytes
    encoder = i2v.image_encoder
    weights = 0 if encoder is None else sum(parameter.nbytes for parameter in encoder.parameters())
    assert weights == estimate.image_encoder_bytes

    endless = estimate_memory(make_workload(ModelSizes.of_folder(folders[name]), height=32, width=32))
    seen = begin(i2v, window_frames=9).denoiser.image
    assert estimate.image_condition_bytes < seen.nbytes <= endless.image_condition_bytes

    words = ["--model", str(folders[name]), "--height", "32", "--width", "32"]
    assert cli.main(["estimate", *words, "--window-frames", "none", "--chunks", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    words += ["--prompt", "a red circle", "--num-frames", "33", "--num-inference-steps", "4", "--device", "cpu"]
    picture().save(tmp_path / "x.png")
    assert cli.main(["generate", *words, "--image", str(tmp_path / "x.png"), "--dry-run"]) == 0
    each = yaml.safe_load(capsys.readouterr().out)["each_video"]
    for held in ("kv_cache_bytes", "text_kv_bytes", "image_condition_bytes", "vae_state_bytes"):
        assert each[held] == figures[held] == getattr(estimate, held) > 0


@pytest.mark.slow
def test_a_state_keeps_its_image_and_fits_no_other_model(i2v, pipe, tmp_path):
    rollout = begin(i2v, **options())
    rollout.save(tmp_path / "seen")
    image = i2v.resume(tmp_path / "seen").denoiser.image
    assert torch.equal(image.channels, rollout.denoiser.image.channels)
    with pytest.raises(ValueError, match=r"config\.(added_kv_proj_dim was 80|in_channels was 36)"):
        pipe.resume(tmp_path / "seen")


@pytest.mark.slow
def test_a_converted_checkpoint_sees_its_image(folders, name, i2v, tmp_path):
    """The folder of the Wan model gives what encodes the image; the weights are new."""
    words = [
        "--base",
        str(folders[name]),
        "--output",
        str(tmp_path / "out"),
        "--steps",
        "1000,950,300",
        "--shift",
        "3",
    ]
    if name == "i2v-a14b":
        words += ["--second", str(folders[name] / "transformer_2")]
    assert cli.main(["convert", str(folders[name] / "transformer"), *words]) == 0
    check_model_folder(tmp_path / "out")
    assert WanImageToVideoPipeline.from_pretrained(tmp_path / "out").transformer.config.in_channels == 36
    made, fixed = loaded(tmp_path / "out"), {**options(), "num_inference_steps": None}
    fixed["denoising_steps"] = (1000, 950, 300)
    made.scheduler = i2v.scheduler
    expected, latents = (
        torch.cat([chunk.latents for chunk in begin(pipe, **fixed | {"generator": generator()})], 2)
        for pipe in (i2v, made)
    )
    assert torch.equal(latents, expected)
