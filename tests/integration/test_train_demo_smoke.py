"""Training of the demo checkpoint: its forward passes are the models' own, and a short run passes every stage."""

import json

import pytest
import torch
from diffusers import WanPipeline

from examples.train_demo import flow_batches, train, world
from examples.train_demo.packed import make_layout, packed_flow
from examples.train_demo.text import TEXT_DIM, pad_embeddings
from examples.train_demo.train_flow import FlowSettings, create_transformer
from examples.train_demo.train_vae import create_vae
from examples.train_demo.vae_clip import decode_clip, encode_clip
from wan_autoregressive import WanAutoregressivePipeline, WanKVCache
from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel

TINY = FlowSettings(heads=2, head_dim=24, ffn_dim=64, layers=2)
TOKENS_PER_FRAME = 16


@pytest.fixture
def transformer():
    return create_transformer(TINY, seed=0).eval()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def test_packed_forward_equals_the_models_own(transformer, generator):
    latents = torch.randn(2, 16, 3, 8, 8, generator=generator)
    text = torch.randn(2, 10, TEXT_DIM, generator=generator)
    timesteps = torch.tensor([1000.0, 250.0])
    layout = make_layout(transformer, torch.arange(3), torch.ones(3, 3, dtype=torch.bool), 8, 8)
    packed = packed_flow(
        transformer, latents, timesteps[:, None].expand(2, 3), text, layout.cos, layout.sin, layout.bias
    )
    own = transformer(latents, timesteps, pad_embeddings(text), return_dict=False)[0]
    torch.testing.assert_close(packed, own, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 3, 4])
def test_packed_forward_equals_the_cached_path(transformer, generator, window):
    """Each noisy chunk of the packed forward is what the chunk gives behind a rolling cache of the clean ones."""
    clean = torch.randn(1, 16, 9, 8, 8, generator=generator)
    noisy = torch.randn(1, 16, 9, 8, 8, generator=generator)
    text = torch.randn(1, 10, TEXT_DIM, generator=generator)
    sigmas = torch.tensor([[1000.0, 750.0, 250.0]]).repeat_interleave(3, 1)
    layout = make_layout(transformer, *flow_batches.clip_visibility(window, copies=1), 8, 8)
    timesteps = torch.cat([torch.zeros(1, 9), sigmas], 1)
    packed = packed_flow(
        transformer, torch.cat([clean, noisy], 2), timesteps, text, layout.cos, layout.sin, layout.bias
    )

    causal = CausalWanTransformer3DModel(**transformer.config).eval()
    causal.load_state_dict(transformer.state_dict())
    cache = WanKVCache(num_blocks=2, window_size=window * 3 * TOKENS_PER_FRAME)

    def forward(latents, timestep, chunk):
        return causal(
            latents,
            timestep,
            pad_embeddings(text),
            frame_offset=3 * chunk,
            attention_kwargs={"kv_cache": cache},
            return_dict=False,
        )[0]

    for chunk in range(4):
        rows = slice(3 * (chunk - 1), 3 * chunk)
        cache.enable_append_mode()
        if chunk > 0:
            cached = forward(noisy[:, :, rows], sigmas[:, rows], chunk)
            torch.testing.assert_close(packed[:, :, 9:][:, :, rows], cached, atol=1e-5, rtol=0)
            cache.enable_overwrite_mode()
        if chunk < 3:
            forward(clean[:, :, 3 * chunk : 3 * chunk + 3], torch.zeros(1, 3), chunk)


@torch.no_grad()
def test_whole_clip_vae_equals_the_chunked_one(generator):
    torch.manual_seed(0)
    vae = create_vae(base_dim=4)
    clip = world.render(world.all_scenes()[:2], world.random_starts(2, generator), 13)
    mean, _ = encode_clip(vae, clip)
    torch.testing.assert_close(mean, vae.encode(clip).latent_dist.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(decode_clip(vae, mean).clamp(-1, 1), vae.decode(mean).sample, atol=1e-5, rtol=0)


def test_tied_noise_is_standard_normal_and_tells_the_start(generator):
    starts = world.random_starts(4000, generator)
    noise = flow_batches.tied_noise(starts, generator)
    assert abs(noise.mean().item()) < 5e-3
    assert noise.std().item() == pytest.approx(1, abs=5e-3)
    sums = noise[:, :8, 0].sum((1, 2, 3)) / 512**0.5  # of the channels that say x
    assert sums.std().item() == pytest.approx(1, abs=0.05)
    uniform = torch.special.ndtr(sums)
    expected = (starts[:, 0] - world.SIZE / 2) / (2 * world.START_SPREAD) + 0.5
    torch.testing.assert_close(uniform, expected, atol=2e-3, rtol=0)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    train.main(["--output", str(folder), "--smoke"])
    return folder


def losses_of(folder, stage):
    lines = [json.loads(line) for line in (folder / "training" / "train_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "flow"])
def test_losses_fall(smoke_run, stage):
    losses = losses_of(smoke_run, stage)
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.slow
def test_every_stage_leaves_its_state_and_a_picture(smoke_run):
    names = {path.name for path in (smoke_run / "training").iterdir()}
    assert {"vae.pt", "vae_decoder.pt", "flow.pt", "few_step.pt", "rollout.pt"} <= names
    assert any(name.startswith("sample_") for name in names)
    assert any(name.startswith("vae_") and name.endswith(".png") for name in names)


@pytest.mark.slow
def test_the_checkpoint_renders_here_and_in_stock_diffusers(smoke_run):
    folder = str(smoke_run / "checkpoint")
    pipe = WanAutoregressivePipeline.from_pretrained(folder)
    assert list(pipe.scheduler.config.denoising_steps) == [1000, 750, 500, 250]
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    prompt = world.held_out_scenes()[0].prompt
    frames = pipe(prompt, num_frames=21, height=64, width=64, generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape == (1, 21, 64, 64, 3)
    stock = WanPipeline.from_pretrained(folder)
    output = stock(prompt, num_frames=9, height=64, width=64, num_inference_steps=1, output_type="latent")
    assert output.frames.shape == (1, 16, 3, 8, 8)


@pytest.mark.slow
def test_a_finished_run_resumes_without_training_again(smoke_run):
    before = len(losses_of(smoke_run, "flow"))
    train.main(["--output", str(smoke_run), "--smoke"])
    assert len(losses_of(smoke_run, "flow")) == before
