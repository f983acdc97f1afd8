"""The tiny VAE of the demo checkpoint: trained to do what its full VAE does, in minutes on one core.

The decoder learns the full VAE's frames of latents that are partly noised and spliced, as generated ones are; the
encoder learns its latents. Both work on normalised latents, the ones of the transformer.

    python -m examples.train_demo.train_tiny_vae --output DIR              trains into DIR/tiny_vae
    python -m examples.train_demo.train_tiny_vae --measure [--sheet PNG]   measures the one that is shipped
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn

from examples.train_demo import world
from examples.train_demo.images import save_contact_sheet
from examples.train_demo.sampling import decode_normalized
from examples.train_demo.train_vae import psnr, random_clips, reconstruction_loss
from examples.train_demo.training_loop import Schedule, Worker, train
from examples.train_demo.vae_clip import decode_clip, encode_clip
from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint
from wan_autoregressive.models.streaming_vae import StreamingVaeDecoder, denormalize_latents, normalize_latents
from wan_autoregressive.models.tiny_vae import AutoencoderTinyWan
from wan_autoregressive.models.tiny_vae_layers import run_layers
from wan_autoregressive.models.tiny_vae_stream import TinyVaeDecoder

FOLDER = "tiny_vae"
LATENT_NOISE = 0.25  # largest noise on the latents that the decoder learns from, in units of their deviation
SPLICED = 0.25  # share of clips that change their scene between two latent frames, as a prompt switch does
MOTION_WEIGHT = 2.0  # of differences between frames, beside those of the frames themselves
CHUNK_FRAMES = 3  # latent frames per call when decoding is timed


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the training, on clips of one length."""

    steps: int
    learning_rate: float
    frames: int
    clips: int  # made once and drawn from again and again
    batch: int = 4


@dataclasses.dataclass(frozen=True)
class TinyVaeSettings:
    """Sizes of the tiny VAE and its training: short clips first, which are cheap, then long ones, a steady state."""

    encoder_width: int = 24
    decoder_widths: tuple[int, ...] = (56, 32, 24)
    blocks: int = 2
    phases: tuple[Phase, ...] = (
        Phase(steps=3600, learning_rate=3e-3, frames=13, clips=640),
        Phase(steps=2000, learning_rate=1.5e-3, frames=45, clips=160, batch=2),
        Phase(steps=1000, learning_rate=1.5e-3, frames=45, clips=400, batch=2),
    )


@dataclasses.dataclass
class Lessons:
    """What is learned from, computed once: E clips with their latents, and latents with their frames.

    `clips`: (E, 3, F, 64, 64) in -1..1, `clip_latents`: the full VAE's, normalised (E, 16, n, 8, 8). `latents`:
    noised and spliced ones, `frames`: the full VAE's of these (E, 3, F, 64, 64).
    """

    clips: torch.Tensor
    clip_latents: torch.Tensor
    latents: torch.Tensor
    frames: torch.Tensor


def create_tiny_vae(full: AutoencoderKLWan, settings: TinyVaeSettings, seed: int) -> AutoencoderTinyWan:
    """An untrained tiny VAE in the geometry of `full`: 2 x 2 pixel patches, two stages of 2 x in space and in time."""
    torch.manual_seed(seed)
    return AutoencoderTinyWan(
        z_dim=full.config.z_dim,
        patch_size=full.config.patch_size,
        encoder_width=settings.encoder_width,
        decoder_widths=settings.decoder_widths,
        blocks_per_stage=settings.blocks,
        encoder_time_pools=(2, 2),
        decoder_time_growths=(2, 2),
        scale_factor_spatial=full.config.scale_factor_spatial,
        scale_factor_temporal=full.config.scale_factor_temporal,
    )


@torch.no_grad()
def make_lessons(full: AutoencoderKLWan, phase: Phase, generator: torch.Generator) -> Lessons:
    parts = []
    for _ in range(0, phase.clips, 8):
        _, clips = random_clips(8, phase.frames, generator)
        clip_latents = normalize_latents(full, encode_clip(full, clips)[0])
        latents = clip_latents.clone()
        for index in range(round(8 * SPLICED)):
            cut = int(torch.randint(1, latents.shape[2], (), generator=generator))
            latents[index, :, cut:] = clip_latents[-1 - index, :, cut:]
        level = LATENT_NOISE * torch.rand(8, 1, 1, 1, 1, generator=generator) ** 2
        latents += level * torch.randn(latents.shape, generator=generator)
        frames = decode_clip(full, denormalize_latents(full, latents)).clamp(-1, 1)
        parts.append((clips, clip_latents, latents, frames))
    return Lessons(*(torch.cat(tensors).contiguous() for tensors in zip(*parts, strict=True)))


def decode_for_training(vae: AutoencoderTinyWan, latents: torch.Tensor) -> torch.Tensor:
    """As `vae.decode`, without the clamp, through which no gradient flows."""
    frames, _ = run_layers(vae.decoder, latents.transpose(1, 2), {})
    frames = F.pixel_shuffle(frames, vae.config.patch_size).transpose(1, 2)
    return frames[:, :, vae.config.scale_factor_temporal - 1 :] * 2 - 1


def train_tiny_vae(full: AutoencoderKLWan, folder: Path, settings: TinyVaeSettings, seed: int) -> AutoencoderTinyWan:
    """Train a tiny VAE for the latents of `full`; goes on from the training state in `folder` if there is one."""
    vae = create_tiny_vae(full, settings, seed)
    for number, phase in enumerate(settings.phases):
        _train_phase(vae, full, f"tiny_vae_{number}", phase, folder, seed + number)
    return vae.eval().requires_grad_(False)


def _train_phase(
    vae: AutoencoderTinyWan, full: AutoencoderKLWan, name: str, phase: Phase, folder: Path, seed: int
) -> None:
    worker = Worker()

    @functools.cache  # not made at all for a phase that is finished
    def lessons() -> Lessons:
        return make_lessons(full, phase, worker.generator(seed, 11))

    def losses(step: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(phase.clips, (phase.batch,), generator=worker.generator(seed, 12, step))
        decoded, target = decode_for_training(vae, lessons().latents[chosen]), lessons().frames[chosen]
        decoder = reconstruction_loss(decoded, target)
        # What a viewer sees first: a jump from the last frame of one latent to the first of the next.
        motion = (decoded.diff(dim=2) - target.diff(dim=2)).abs().mean()
        encoded = vae.encode(lessons().clips[chosen]).latent_dist.mode()
        encoder = (encoded - lessons().clip_latents[chosen]).square().mean()
        loss = decoder + MOTION_WEIGHT * motion + encoder
        return {"loss": loss, "decoder": decoder, "motion": motion, "encoder": encoder}

    train(name, vae, Schedule(phase.steps, phase.learning_rate), losses, folder, worker)


def save_half(vae: AutoencoderTinyWan, folder: Path) -> None:
    """Save weights in float16; `vae` stays as it is."""
    half = AutoencoderTinyWan.from_config(vae.config)
    half.load_state_dict(vae.state_dict())
    nn.Module.to(half, torch.float16).save_pretrained(folder)  # the model's own `to` warns about dtypes


@torch.no_grad()
def measure(full: AutoencoderKLWan, tiny: AutoencoderTinyWan, sheet: Path | None, count: int = 16) -> dict[str, float]:
    """Figures on `count` clips of held-out scenes, and on latents that the demo transformer generates for them.

    PSNR in dB; times are medians for one video on one thread, in ms per latent frame, the two VAEs taking turns.
    """
    scenes = world.spread(world.held_out_scenes(), count)
    starts = world.SIZE * torch.rand(count, 2, generator=torch.Generator().manual_seed(77))
    clips = world.render(scenes, starts, 45)
    latents = normalize_latents(full, full.encode(clips).latent_dist.mode())
    encoded = tiny.encode(clips).latent_dist.mode()
    generated = generate_for(scenes)
    by_full, by_tiny = decode_normalized(full, latents), tiny.decode(latents).sample
    generated_full, generated_tiny = decode_normalized(full, generated), tiny.decode(generated).sample
    if sheet is not None:
        rows = [clips[:3], by_full[:3], by_tiny[:3], generated_full[:3], generated_tiny[:3]]
        save_contact_sheet(torch.stack(rows, dim=1).flatten(0, 1), sheet)
    figures = {
        "full decode against true frames, dB": psnr(by_full, clips),
        "tiny decode against true frames, dB": psnr(by_tiny, clips),
        "tiny decode against full decode, dB": psnr(by_tiny, by_full),
        "the same on generated latents, dB": psnr(generated_tiny, generated_full),
        "the same, worst video, dB": min(map(psnr, generated_tiny, generated_full)),
        "tiny encode, full decode against true frames, dB": psnr(decode_normalized(full, encoded), clips),
        "tiny encode and decode against true frames, dB": psnr(tiny.decode(encoded).sample, clips),
        "tiny latents against full latents, RMS in units of their deviation": (encoded - latents)
        .square()
        .mean()
        .item()
        ** 0.5,
    }
    return figures | _times(full, tiny, latents[:1])


def generate_for(scenes: list[world.Scene]) -> torch.Tensor:
    """What the demo transformer makes of the scenes' prompts: latents (B, 16, 12, 8, 8), normalised."""
    pipe = WanAutoregressivePipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        [scene.prompt for scene in scenes],
        height=world.SIZE,
        width=world.SIZE,
        num_frames=45,
        window_frames=12,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).frames


def _times(full: AutoencoderKLWan, tiny: AutoencoderTinyWan, latents: torch.Tensor) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def in_chunks(stream: StreamingVaeDecoder | TinyVaeDecoder) -> None:
        for chunk in latents.split(CHUNK_FRAMES, dim=2):
            stream.decode(chunk)

    tasks: dict[str, Callable[[], object]] = {
        "full whole": lambda: full.decode(latents),
        "tiny whole": lambda: tiny.decode(latents),
        "full in chunks": lambda: in_chunks(StreamingVaeDecoder(full)),
        "tiny in chunks": lambda: in_chunks(TinyVaeDecoder(tiny)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(8):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    # The first round warms up.
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {f"{name}, ms per latent frame": 1000 * s / latents.shape[2] for name, s in medians.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--output", type=Path, metavar="DIR", help="train; state and log go to DIR, too, and it resumes")
    task.add_argument("--measure", action="store_true", help="measure the tiny VAE of the demo checkpoint")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="where --measure saves pictures")
    args = parser.parse_args(arguments)
    full = AutoencoderKLWan.from_pretrained(demo_checkpoint() / "vae", dtype=torch.float32)
    if args.measure:
        tiny = AutoencoderTinyWan.from_pretrained(demo_checkpoint() / FOLDER, dtype=torch.float32)
        for name, value in measure(full, tiny, args.sheet).items():
            print(f"{value:8.3f}  {name}")
        return
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    save_half(train_tiny_vae(full, args.output, TinyVaeSettings(), seed=0), args.output / FOLDER)
    print(f"tiny VAE in {args.output / FOLDER}")


if __name__ == "__main__":
    main()
