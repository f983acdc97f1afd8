"""Fine-tunes the demo checkpoint for `sampler="rolling"`: chunks at rising noise, denoised together.

    python -m examples.train_demo.finetune_rolling --output DIR

The model makes whole videos as the sampler does, tick by tick, and learns at each tick from the right clip. What is in
flight and what is finished come at first from the right latents, later as often from what the model itself made of
them. Training state, log and sample pictures go to `OUTPUT/training`, the checkpoint itself to `OUTPUT/checkpoint`.
Run the same command again to go on after an interruption.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from examples.train_demo import world
from examples.train_demo.evaluate import evaluate_pipeline
from examples.train_demo.export import save_checkpoint
from examples.train_demo.flow_batches import first_chunk_targets, tied_noise
from examples.train_demo.latent_pool import (
    CHUNK_FRAMES,
    LatentPool,
    encode_normalized,
    load_or_encode_kind,
    pixel_frames,
)
from examples.train_demo.rolling_videos import RollingVideos
from examples.train_demo.rolling_window import JointForward, Sight, Tick, video_ticks
from examples.train_demo.score import summarize
from examples.train_demo.text import embed_prompts
from examples.train_demo.training_loop import Acceleration, Schedule, Worker, log_line, train
from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint

STAGE = "rolling"


@dataclasses.dataclass(frozen=True)
class RollingSettings:
    """How long, how fast and on what the model is fine-tuned."""

    steps: int = 450
    learning_rate: float = 2e-3
    videos: int = 8  # that go through their ticks together, a training step for each tick
    groups: int = 4  # of such videos, in turns, so that neighbouring steps differ
    chunks: int = 9  # of a video
    past_chunks: int = 2  # finished ones that are there beside the sink, see `JointForward`
    first_pool: int = 200  # entries of the pool of first chunks
    first_batch: int = 16  # first chunks beside the videos in each step: they are hard, and videos show few
    own_share: float = 0.5  # of the chunks go on from what the model made of them; reached after half of the steps
    samples: int = 6  # held-out prompts that are rendered and scored on the way
    sample_chunks: int = 8


class RollingTrainer:
    """Losses of one transformer on the ticks of videos.

    Args:
        model: trained in place.
        text: embeddings (scenes, tokens, dim) of all training scenes.
        firsts: pool of first chunks.
    """

    def __init__(
        self,
        model: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        text: torch.Tensor,
        firsts: LatentPool,
        settings: RollingSettings,
        worker: Worker,
        seed: int,
    ) -> None:
        self.vae, self.text, self.firsts = vae, text, firsts
        self.settings, self.worker, self.seed = settings, worker, seed
        self.joint = JointForward(model, Sight(), settings.past_chunks)
        self.ticks = video_ticks(settings.chunks)
        self._groups: dict[int, RollingVideos] = {}

    def losses(self, step: int) -> dict[str, torch.Tensor]:
        """Of training step `step`: the next tick of the group of videos whose turn it is."""
        settings, count = self.settings, len(self.ticks)
        generator = self.worker.generator(self.seed, 8, step)
        turn, group = divmod(step, settings.groups)
        number = (turn + group * count // settings.groups) % count
        tick, videos = self.ticks[number], self._groups.pop(group, None)
        if videos is None:  # at the start of a video, or of a run
            videos = self._begin(tick, generator)
        loss, clean = videos.loss(tick, self.joint)
        if number + 1 < count:
            following = self.ticks[number + 1]
            own_share = settings.own_share * min(1.0, 2 * step / settings.steps)
            is_own = torch.rand(videos.is_own.shape, generator=generator) < own_share
            noise = torch.randn(videos.clips[:, :, following.frames].shape, generator=generator)
            self._groups[group] = videos.after(tick, following, clean, is_own, noise)
        first = self._first_chunk_loss(generator)
        return {"loss": loss + first, "first": first, f"tick_{number}": loss}

    def _first_chunk_loss(self, generator: torch.Generator) -> torch.Tensor:
        targets = first_chunk_targets(self.firsts, self.text, self.settings.first_batch, generator)
        assert targets.noise is not None
        videos = RollingVideos.right(self.ticks[0], targets.latents, targets.text, targets.noise)
        return videos.loss(self.ticks[0], self.joint)[0]

    @torch.no_grad()
    def _begin(self, tick: Tick, generator: torch.Generator) -> RollingVideos:
        """New videos. First noise is tied to where a shape starts, see `tied_noise`."""
        count, scenes = self.settings.videos, world.training_scenes()
        chosen = torch.randint(len(scenes), (count,), generator=generator)
        starts = world.random_starts(count, generator)
        frames = pixel_frames(CHUNK_FRAMES * self.settings.chunks)
        pixels = world.render([scenes[index] for index in chosen], starts, frames)
        clips = encode_normalized(self.vae, pixels, Acceleration())
        if tick == self.ticks[0]:
            noise = tied_noise(starts, generator)
        else:
            noise = torch.randn(clips[:, :, tick.frames].shape, generator=generator)
        return RollingVideos.right(tick, clips, self.text[chosen], noise)


def smoke_settings() -> RollingSettings:
    """A few steps, to see that all of it runs."""
    return RollingSettings(
        steps=6, videos=1, groups=2, chunks=2, first_pool=2, first_batch=2, samples=1, sample_chunks=2
    )


def finetune(output: Path, settings: RollingSettings, seed: int = 0) -> None:
    """Fine-tune the demo checkpoint with its training state in `output`; goes on from there."""
    folder = output / "training"
    folder.mkdir(parents=True, exist_ok=True)
    pipe = WanAutoregressivePipeline.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    model = WanTransformer3DModel.from_pretrained(demo_checkpoint() / "transformer", dtype=torch.float32)
    text = embed_prompts(pipe.tokenizer, pipe.text_encoder, [scene.prompt for scene in world.training_scenes()])
    firsts = load_or_encode_kind("first", settings.first_pool, pipe.vae, folder, Worker(), Acceleration(), seed)
    trainer = RollingTrainer(model, pipe.vae, text, firsts, settings, Worker(), seed)
    held_out = world.spread(world.held_out_scenes(), settings.samples)

    def sample(step: int) -> dict[str, float]:
        pipe.transformer.load_state_dict(model.state_dict())
        sheet = folder / f"sample_{step:05d}.png"
        scores = evaluate_pipeline(
            pipe, held_out, chunks=settings.sample_chunks, sheet=sheet, **Sight().sampler_settings
        )
        return {key: value for key, value in summarize(scores).items() if value is not None}

    schedule = Schedule(settings.steps, settings.learning_rate, decay_fraction=0.7)
    train(STAGE, model, schedule, trainer.losses, folder, Worker(), sample, sample_every=200)
    save_checkpoint(output / "checkpoint", pipe.tokenizer, pipe.text_encoder, model, pipe.vae)
    log_line(folder, stage="done")


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune with the arguments of the command line; exits with 2 for wrong ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run; resumes in it")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that all of it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    finetune(args.output, smoke_settings() if args.smoke else RollingSettings())
    print(f"checkpoint in {args.output / 'checkpoint'}, log and samples in {args.output / 'training'}")


if __name__ == "__main__":
    main()
