"""Makes the demo checkpoint from nothing, on a CPU, in stages that resume.

    python -m examples.train_demo.train --output DIR

Stages: VAE, latent pool, causal flow matching by teacher forcing, few-step stage, self-rollout. Training state, log
and sample pictures go to `OUTPUT/training`, the checkpoint itself to `OUTPUT/checkpoint`. Run the same command again
to go on after an interruption.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from examples.train_demo import world
from examples.train_demo.card import write_card
from examples.train_demo.export import save_checkpoint
from examples.train_demo.images import save_contact_sheet
from examples.train_demo.latent_pool import PoolSettings, load_or_encode
from examples.train_demo.sampling import decode_normalized, generate_latents
from examples.train_demo.score import score_video, summarize
from examples.train_demo.text import create_text_encoder, create_tokenizer, embed_prompts
from examples.train_demo.train_flow import FlowSettings, create_transformer, train_transformer
from examples.train_demo.train_vae import VaeSettings, held_out_psnr, train_vae
from examples.train_demo.training_loop import Acceleration, Worker, log_line

SAMPLES = 12  # held-out prompts that are rendered and scored on the way


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Everything that decides what comes out of a run."""

    seed: int = 0
    vae: VaeSettings = dataclasses.field(default_factory=VaeSettings)
    pool: PoolSettings = dataclasses.field(default_factory=PoolSettings)
    flow: FlowSettings = dataclasses.field(default_factory=FlowSettings)


def smoke_settings() -> DemoSettings:
    """Every stage, for seconds each: losses fall, nothing is learned that one would want to see."""
    return DemoSettings(
        vae=VaeSettings(base_dim=4, steps=30, decoder_steps=4, phases=((1.0, 5, 2),), decoder_frames=5),
        pool=PoolSettings(clips=4, first_chunks=16),
        flow=FlowSettings(
            heads=2,
            head_dim=24,
            ffn_dim=96,
            layers=2,
            first_batch=8,
            clip_batch=2,
            flow_steps=40,
            few_step_steps=4,
            rollout_steps=2,
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the arguments of the command line; exits with 2 for wrong ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run; resumes in it")
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each (default: 2)")
    parser.add_argument("--smoke", action="store_true", help="a minute of every stage, to see that all of it runs")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}; it must be at least 1")
    folder = args.output / "training"
    folder.mkdir(parents=True, exist_ok=True)
    settings = smoke_settings() if args.smoke else DemoSettings()
    fast = Acceleration() if args.smoke else Acceleration.detect()
    workers = 1 if args.smoke else args.workers
    if workers == 1:
        train_worker(0, 1, args.output, settings, fast, "")
    else:
        with tempfile.TemporaryDirectory() as meeting_place:
            arguments = (workers, args.output, settings, fast, f"file://{meeting_place}/store")
            torch.multiprocessing.spawn(train_worker, arguments, nprocs=workers)
    print(f"checkpoint in {args.output / 'checkpoint'}, log and samples in {folder}")


def train_worker(
    rank: int, count: int, output: Path, settings: DemoSettings, fast: Acceleration, meeting_place: str
) -> None:
    """Run all stages as worker `rank` of `count`; the first worker writes the checkpoint at the end."""
    torch.set_num_threads(1)
    worker, folder = Worker(rank, count), output / "training"
    if count > 1:
        torch.distributed.init_process_group("gloo", init_method=meeting_place, rank=rank, world_size=count)
    tokenizer, text_encoder = create_tokenizer(), create_text_encoder(settings.seed)
    text = embed_prompts(tokenizer, text_encoder, [scene.prompt for scene in world.training_scenes()])
    held_out = world.spread(world.held_out_scenes(), SAMPLES)
    held_out_text = embed_prompts(tokenizer, text_encoder, [scene.prompt for scene in held_out])

    vae = train_vae(folder, settings.vae, worker, fast, settings.seed)
    pools = load_or_encode(vae, folder, settings.pool, worker, fast, settings.seed)
    transformer = create_transformer(settings.flow, settings.seed)

    def sample(step: int) -> dict[str, float]:
        sheet = folder / f"sample_{len(list(folder.glob('sample_*.png'))):03d}_step_{step:05d}.png"
        return render_samples(transformer, vae, held_out, held_out_text, sheet)

    train_transformer(transformer, vae, text, pools, folder, settings.flow, worker, fast, settings.seed, sample)
    if worker.is_first:
        checkpoint = output / "checkpoint"
        save_checkpoint(checkpoint, tokenizer, text_encoder, transformer, vae)
        figures = render_samples(transformer, vae, held_out, held_out_text, folder / "final.png")
        figures["vae_psnr_db"] = held_out_psnr(vae)
        write_card(checkpoint, figures, f"{SAMPLES} held-out prompts, one seed, four chunks, at the end of training:")
        log_line(folder, stage="done")


def render_samples(
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    scenes: list[world.Scene],
    text: torch.Tensor,
    sheet: Path,
    chunks: int = 4,
) -> dict[str, float]:
    """Generate one short video per scene, save them as a contact sheet, and return their figures for the log."""
    latents = generate_latents(transformer, text, chunks, torch.Generator().manual_seed(1))
    clips = decode_normalized(vae, latents)
    save_contact_sheet(clips, sheet)
    videos = (clips.clamp(-1, 1) + 1) / 2
    scores = [score_video(video.permute(1, 2, 3, 0), scene) for video, scene in zip(videos, scenes, strict=True)]
    return {key: value for key, value in summarize(scores).items() if value is not None}


if __name__ == "__main__":
    main()
