"""Where a joint forward of the rolling sampler goes wrong, at each noise level and in each frame.

    python -m examples.train_demo.rolling_errors [--model DIR]

Right clips of held-out scenes are noised as the sampler has them in flight, behind right finished frames, so that what
is printed is the model's own mistake: the root mean square of its clean latents less the right ones, which have unit
variance. Beside it what the same chunk gives alone behind a right past, as `sampler="chunkwise"` has it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from examples.train_demo import world
from examples.train_demo.flow_loss import per_frame
from examples.train_demo.latent_pool import CHUNK_FRAMES, encode_normalized, pixel_frames
from examples.train_demo.rolling_videos import RollingVideos
from examples.train_demo.rolling_window import STEPS, JointForward, Sight, Tick
from examples.train_demo.text import embed_prompts
from examples.train_demo.training_loop import Acceleration
from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint

FINISHED = 5  # chunks before the window
CHUNKWISE = Sight(attended_frames=4 * CHUNK_FRAMES, sink_frames=0)


@torch.no_grad()
def errors_by_frame(model_folder: Path, scenes: int, sight: Sight) -> dict[str, list[float]]:
    """Errors of the frames in flight, oldest and cleanest first, by who sees whom."""
    pipe = WanAutoregressivePipeline.from_pretrained(model_folder, dtype=torch.float32)
    model = WanTransformer3DModel.from_pretrained(model_folder / "transformer", dtype=torch.float32)
    chosen = world.spread(world.held_out_scenes(), scenes)
    generator = torch.Generator().manual_seed(0)
    starts = world.random_starts(scenes, generator)
    pixels = world.render(chosen, starts, pixel_frames(CHUNK_FRAMES * (FINISHED + STEPS)))
    clips = encode_normalized(pipe.vae, pixels, Acceleration())
    text = embed_prompts(pipe.tokenizer, pipe.text_encoder, [scene.prompt for scene in chosen])
    window = Tick(range(FINISHED, FINISHED + STEPS), STEPS - 1)
    noise = torch.randn(clips[:, :, window.frames].shape, generator=generator)

    def errors(tick: Tick, seen: Sight, own_noise: torch.Tensor) -> list[float]:
        _, clean = RollingVideos.right(tick, clips, text, own_noise).loss(tick, JointForward(model, seen))
        return (clean - clips[:, :, tick.frames]).square().mean((0, 1, 3, 4)).sqrt().tolist()

    alone = [Tick(range(chunk, chunk + 1), step) for chunk, step in zip(window.chunks, window.steps, strict=True)]
    parts = zip(alone, noise.split(CHUNK_FRAMES, dim=2), strict=True)
    return {
        "alone": [error for tick, own_noise in parts for error in errors(tick, CHUNKWISE, own_noise)],
        "joint": errors(window, sight, noise),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print errors with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the packaged demo)")
    parser.add_argument("--limit", type=int, default=12, help="held-out prompts, spread evenly (default: 12)")
    args = parser.parse_args(argv)
    timesteps = per_frame(1000 * Tick(range(STEPS), STEPS - 1).sigmas[None])[0]
    rows = {"timestep": [f"{t:.0f}" for t in timesteps.tolist()]}
    for name, errors in errors_by_frame(args.model or demo_checkpoint(), args.limit, Sight()).items():
        rows[name] = [f"{error:.3f}" for error in errors]
    for name, values in rows.items():
        print(f"{name:>8}", *(f"{value:>5}" for value in values))


if __name__ == "__main__":
    main()
