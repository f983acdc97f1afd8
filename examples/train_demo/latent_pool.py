"""Stage 2 of the demo checkpoint: clips encoded once, so that the transformer trains on latents in memory.

An entry is one start position, direction, colour and background. It holds the same clip with each of the shapes that
training may show there, which tells the loss where in the latents the shape's word matters; and a clip of another
scene that leads to the same place, to be the past of this one: so the transformer learns to follow its prompt and not
only its context.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from examples.train_demo import world
from examples.train_demo.training_loop import Acceleration, Worker
from examples.train_demo.vae_clip import encode_clip

CHUNK_FRAMES = 3  # latent frames
SHAPES_SEEN = 3  # of the four: one shape of each colour, direction and background is held out
CLIP_CHUNKS = 4


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """How much is encoded: entries of whole clips (4 chunks) and of first chunks alone."""

    clips: int = 1200
    first_chunks: int = 4000


@dataclasses.dataclass
class LatentPool:
    """Normalised latents of E entries, float16.

    `latents`: (E, 3, 16, F, 8, 8), the same clip with each shape. `scenes`: (E, 3), index into the training scenes.
    `starts`: (E, 2), pixels. For whole clips also: `past` (E, 16, F, 8, 8), the clip of another scene, whose shape
    stands where this one's does when chunk `cut` (E,) begins.
    """

    latents: torch.Tensor
    scenes: torch.Tensor
    starts: torch.Tensor
    past: torch.Tensor | None = None
    cut: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a clip that starts at frame 0."""
    return 4 * latent_frames - 3


@torch.no_grad()
def encode_normalized(vae: AutoencoderKLWan, clips: torch.Tensor, fast: Acceleration) -> torch.Tensor:
    """Clips (B, 3, 1 + 4n, 64, 64) -> latents (B, 16, 1 + n, 8, 8), zero mean and unit variance per channel."""
    with fast.autocast():
        latents = encode_clip(vae, clips.contiguous(memory_format=torch.channels_last_3d))[0].float()
    mean, std = latent_statistics(vae)
    return (latents - mean) / std


def latent_statistics(vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the VAE's latents, each (1, 16, 1, 1, 1)."""
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def load_or_encode(
    vae: AutoencoderKLWan, folder: Path, settings: PoolSettings, worker: Worker, fast: Acceleration, seed: int
) -> tuple[LatentPool, LatentPool]:
    """The pools of whole clips and of first chunks. Each worker encodes its share; all of them get everything."""
    clips = load_or_encode_kind("clips", settings.clips, vae, folder, worker, fast, seed)
    return clips, load_or_encode_kind("first", settings.first_chunks, vae, folder, worker, fast, seed)


def load_or_encode_kind(
    kind: Literal["clips", "first"],
    count: int,
    vae: AutoencoderKLWan,
    folder: Path,
    worker: Worker,
    fast: Acceleration,
    seed: int,
) -> LatentPool:
    """One of the two pools, with `count` entries."""
    path = folder / f"pool_{kind}_{worker.rank}.pt"
    if not path.is_file():
        pool = _encode_pool(vae, _scene_groups(), count // worker.count, kind == "clips", worker, fast, seed)
        torch.save(vars(pool), path)
    worker.wait()
    return _load(folder, kind)


def _scene_groups() -> torch.Tensor:
    """Training scenes that differ in their shape only: (96, 3) indices into `world.training_scenes()`."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for index, scene in enumerate(world.training_scenes()):
        groups.setdefault((scene.color, scene.direction, scene.background), []).append(index)
    return torch.tensor(list(groups.values()))


def _encode_pool(
    vae: AutoencoderKLWan,
    groups: torch.Tensor,
    count: int,
    whole: bool,
    worker: Worker,
    fast: Acceleration,
    seed: int,
) -> LatentPool:
    generator = worker.generator(seed, 3, int(whole))
    scenes = groups[torch.randint(len(groups), (count,), generator=generator)]
    starts = world.random_starts(count, generator)
    cut = torch.randint(1, CLIP_CHUNKS, (count,), generator=generator)
    frames = pixel_frames(CHUNK_FRAMES * (CLIP_CHUNKS if whole else 1))
    training = world.training_scenes()
    latents, past = [], []
    for index in tqdm(range(count), f"pool of {'clips' if whole else 'first chunks'}", disable=not worker.is_first):
        own = [training[number] for number in scenes[index]]
        clips = world.render(own, starts[index].expand(len(own), 2), frames)
        if whole:
            other = training[int(torch.randint(len(training), (), generator=generator))]
            other_clip = _leading_to(own[0], other, starts[index], int(cut[index]), frames)
            encoded = encode_normalized(vae, torch.cat([clips, other_clip]), fast).half()
            latents.append(encoded[:-1])
            past.append(encoded[-1])
        else:
            latents.append(encode_normalized(vae, clips, fast).half())
    if not whole:
        return LatentPool(torch.stack(latents), scenes, starts)
    return LatentPool(torch.stack(latents), scenes, starts, torch.stack(past), cut)


def _leading_to(scene: world.Scene, other: world.Scene, start: torch.Tensor, cut: int, frames: int) -> torch.Tensor:
    """The clip of `other` whose shape reaches, at the first pixel frame of chunk `cut`, the place of `scene`'s."""
    frame = pixel_frames(CHUNK_FRAMES * cut)
    meeting = world.positions([scene], start[None], 1, frame)[:, 0]
    return world.render([other], 2 * meeting - world.positions([other], meeting, 1, frame)[:, 0], frames)


def _load(folder: Path, kind: str) -> LatentPool:
    parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"pool_{kind}_*.pt"))]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if parts[0][key] is not None}
    return LatentPool(**joined)
