"""Stage 1 of the demo checkpoint: the VAE.

First the whole VAE, on clips that grow from five frames to thirteen; then the decoder alone, on latents with more
noise and on spliced latents, so that it stays sharp on what a transformer generates and across a prompt switch.
"""

import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from examples.train_demo import world
from examples.train_demo.images import save_contact_sheet
from examples.train_demo.training_loop import Acceleration, Schedule, Worker, train
from examples.train_demo.vae_clip import decode_clip, encode_clip

LATENT_NOISE = 0.1  # standard deviation of the posterior, the same for every latent
LATENT_WEIGHT = 1e-4  # of the mean square of the latents: the KL term of a posterior with a fixed variance
EDGE_WEIGHT = 3.0  # additional weight of pixels where the picture changes from one pixel to the next
SPLICE_PROBABILITY = 0.2


@dataclasses.dataclass(frozen=True)
class VaeSettings:
    """Sizes of the VAE and of its training. `phases`: (share of the steps, clip frames, clips per batch)."""

    base_dim: int = 16
    steps: int = 1600
    decoder_steps: int = 600
    learning_rate: float = 3e-3
    phases: tuple[tuple[float, int, int], ...] = ((0.15, 5, 16), (1.0, 13, 4))
    decoder_frames: int = 13
    decoder_batch: int = 4
    decoder_noise: float = 0.25  # largest noise on the latents, in units of their standard deviation


def create_vae(base_dim: int) -> AutoencoderKLWan:
    """A small Wan 2.2 style VAE: 2x2 pixel patches, then 4x in space and 4x in time; 16 latent channels."""
    vae = AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=16,
        dim_mult=[1, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    for parameter in vae.parameters():  # twice as fast in CPU convolutions
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():  # the posterior's variance is a constant
        vae.quant_conv.weight[16:] = 0
        vae.quant_conv.bias[16:] = 2 * torch.tensor(LATENT_NOISE).log()
    return vae


def random_clips(count: int, frames: int, generator: torch.Generator) -> tuple[list[world.Scene], torch.Tensor]:
    """Random training scenes and their clips (count, 3, frames, 64, 64); the shapes stand anywhere."""
    scenes = world.training_scenes()
    chosen = [scenes[index] for index in torch.randint(len(scenes), (count,), generator=generator)]
    starts = world.SIZE * torch.rand(count, 2, generator=generator)
    return chosen, world.render(chosen, starts, frames).contiguous(memory_format=torch.channels_last_3d)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 plus L2, with more weight on edges; both tensors (B, 3, F, H, W)."""
    edges = torch.zeros_like(target[:, :1])
    edges[..., :-1] += (target[..., 1:] - target[..., :-1]).abs().amax(1, keepdim=True)
    edges[..., :-1, :] += (target[..., 1:, :] - target[..., :-1, :]).abs().amax(1, keepdim=True)
    weight = 1 + EDGE_WEIGHT * torch.nn.functional.max_pool3d(edges, (1, 3, 3), 1, (0, 1, 1)).clamp(max=1)
    error = output.float() - target
    return (weight * (error.abs() + error.square())).mean()


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB of pictures in -1..1."""
    mean_square = (output.clamp(-1, 1).float() - target).square().mean().item() / 4
    return -10 * torch.tensor(mean_square).log10().item()


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKLWan, sheet: Path | None = None, count: int = 16, frames: int = 17) -> float:
    """PSNR in dB over clips of held-out scenes, through the VAE's own chunked encode and decode."""
    generator = torch.Generator().manual_seed(77)
    scenes = world.spread(world.held_out_scenes(), count)
    clips = world.render(scenes, world.SIZE * torch.rand(count, 2, generator=generator), frames)
    output = vae.decode(vae.encode(clips).latent_dist.mean).sample
    if sheet is not None:
        save_contact_sheet(torch.stack([clips[:6], output[:6]], 1).flatten(0, 1), sheet, columns=9)
    return psnr(output, clips)


def train_vae(folder: Path, settings: VaeSettings, worker: Worker, fast: Acceleration, seed: int) -> AutoencoderKLWan:
    """Train the VAE (or load it, if the stages have been finished) and return it, its latent statistics set."""
    torch.manual_seed(seed)
    vae = create_vae(settings.base_dim)
    encode, decode = fast.compile(encode_clip), fast.compile(decode_clip)
    # The variance half of `quant_conv` stays as it was set.
    vae.quant_conv.weight.register_hook(lambda gradient: gradient * _mean_half(gradient))
    vae.quant_conv.bias.register_hook(lambda gradient: gradient * _mean_half(gradient))

    def joint(step: int) -> dict[str, torch.Tensor]:
        generator = worker.generator(seed, 1, step)
        frames, batch = next((f, b) for share, f, b in settings.phases if step < share * settings.steps)
        _, clips = random_clips(batch, frames, generator)
        with fast.autocast():
            mean, _ = encode(vae, clips)
            output = decode(vae, mean + LATENT_NOISE * torch.randn(mean.shape, generator=generator))
        reconstruction = reconstruction_loss(output, clips)
        size = mean.float().square().mean()
        return {"loss": reconstruction + LATENT_WEIGHT * size, "reconstruction": reconstruction, "latent": size}

    def sample(step: int) -> dict[str, float]:
        return {"psnr": held_out_psnr(vae, folder / f"vae_{step:05d}.png")}

    train("vae", vae, Schedule(settings.steps, settings.learning_rate), joint, folder, worker, sample)
    set_latent_statistics(vae, seed)

    for module in (vae.encoder, vae.quant_conv):
        module.requires_grad_(False)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    def decoder_only(step: int) -> dict[str, torch.Tensor]:
        generator = worker.generator(seed, 2, step)
        clips, latents = _spliced(vae, settings, generator)
        level = settings.decoder_noise * torch.rand(len(clips), 1, 1, 1, 1, generator=generator) ** 2
        latents = latents + std * level * torch.randn(latents.shape, generator=generator)
        with fast.autocast():
            output = decode(vae, latents)
        return {"loss": reconstruction_loss(output, clips)}

    schedule = Schedule(settings.decoder_steps, settings.learning_rate / 2)
    train("vae_decoder", vae, schedule, decoder_only, folder, worker, sample)
    return vae.requires_grad_(False)


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, seed: int) -> None:
    """Measure mean and standard deviation of each latent channel over 64 clips and put them into the config."""
    _, clips = random_clips(64, 17, torch.Generator().manual_seed(seed))
    latents = torch.cat([encode_clip(vae, part)[0] for part in clips.split(8)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def _mean_half(gradient: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(len(gradient), *[1] * (gradient.ndim - 1))
    keep[len(gradient) // 2 :] = 0
    return keep


@torch.no_grad()
def _spliced(
    vae: AutoencoderKLWan, settings: VaeSettings, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips and latents, some of which change their scene between two latent frames as a prompt switch does."""
    count, frames = settings.decoder_batch, settings.decoder_frames
    _, clips = random_clips(count, frames, generator)
    latents = encode_clip(vae, clips)[0]
    if torch.rand((), generator=generator) < SPLICE_PROBABILITY * 2:
        half = count // 2
        cut = int(torch.randint(1, latents.shape[2], (), generator=generator))
        clips[:half, :, 1 + 4 * (cut - 1) :] = clips[half : 2 * half, :, 1 + 4 * (cut - 1) :]
        latents[:half, :, cut:] = latents[half : 2 * half, :, cut:]
    return clips, latents
