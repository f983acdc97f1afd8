"""Batches for training the transformer: what is clean, what is noisy, and what the answer is."""

import dataclasses

import torch

from examples.train_demo import world
from examples.train_demo.latent_pool import CHUNK_FRAMES, CLIP_CHUNKS, SHAPES_SEEN, LatentPool
from examples.train_demo.sampling import DENOISING_STEPS

SHAPE_WEIGHT = 1.5  # additional loss weight, on average, of latents that depend on the shape
CONTEXT_NOISE = 0.15  # largest noise on clean context, an augmentation
OTHER_PAST = 0.15  # share of clips whose past is another scene's
MIXED_PAST = 0.25  # share of clips whose past is a blend with another shape
LARGEST_BLEND = 0.6


@dataclasses.dataclass
class Targets:
    """What the transformer shall produce.

    `latents`, `weight`: (B, 16, F, 8, 8), `weight` 0 where there is no right answer. `text`: (B, tokens, dim).
    `noise`: first noise, tied to the start position, or None where any will do. `context`: clean latents
    (B, 16, F', 8, 8) that come before, or None for first chunks.
    """

    latents: torch.Tensor
    weight: torch.Tensor
    text: torch.Tensor
    noise: torch.Tensor | None = None
    context: torch.Tensor | None = None


def tied_noise(starts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise (B, 16, 3, 8, 8) of a first chunk, whose sums say where the shape starts.

    Where a shape starts is random, so without this the best answer to pure noise is a blur of all places. The
    position, uniform in its box, is mapped through the inverse normal distribution onto the sums of channels 0-7 (x)
    and 8-15 (y) of the first frame. Over all clips the noise is still exactly standard normal, so that plain noise
    works at sampling time, and each noise has one answer.
    """
    noise = torch.randn(len(starts), 16, CHUNK_FRAMES, 8, 8, generator=generator)
    uniform = (starts - world.SIZE / 2) / (2 * world.START_SPREAD) + 0.5
    wanted = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))  # (B, 2), standard normal
    halves = noise[:, :, 0].unflatten(1, (2, 8))  # a view, (B, 2, 8, 8, 8)
    count = halves[0, 0].numel()
    halves += ((count**0.5 * wanted - halves.sum((2, 3, 4))) / count)[:, :, None, None, None]
    return noise


def first_chunk_targets(pool: LatentPool, text: torch.Tensor, batch: int, generator: torch.Generator) -> Targets:
    """First chunks, with noise tied to their start positions. `text`: embeddings of all training scenes."""
    entry = torch.randint(len(pool), (batch,), generator=generator)
    shape = torch.randint(SHAPES_SEEN, (batch,), generator=generator)
    same = pool.latents[entry].float()
    return Targets(
        latents=same[torch.arange(batch), shape],
        weight=_shape_weight(same),
        text=text[pool.scenes[entry, shape]],
        noise=tied_noise(pool.starts[entry], generator),
    )


def clip_targets(pool: LatentPool, text: torch.Tensor, batch: int, generator: torch.Generator) -> Targets:
    """Chunks 1, 2, ... of whole clips with the clean chunks before them, some of which are another scene's."""
    entry = torch.randint(len(pool), (batch,), generator=generator)
    shape = torch.randint(SHAPES_SEEN, (batch,), generator=generator)
    rows = torch.arange(batch)
    same = pool.latents[entry].float()
    clip, weight = same[rows, shape], _shape_weight(same)
    context = clip.clone()
    assert pool.past is not None
    assert pool.cut is not None
    for row in rows.tolist():
        chance = float(torch.rand((), generator=generator))
        frames = CHUNK_FRAMES * int(pool.cut[entry[row]])
        if chance < OTHER_PAST:
            context[row, :, :frames] = pool.past[entry[row], :, :frames]
            weight[row, :, :frames] = 0  # the two scenes meet at the cut, not before it
        elif chance < OTHER_PAST + MIXED_PAST:
            share = LARGEST_BLEND * float(torch.rand((), generator=generator))
            other = same[row, int(torch.randint(SHAPES_SEEN, (), generator=generator))]
            context[row, :, :frames] = torch.lerp(clip[row, :, :frames], other[:, :frames], share)
    level = CONTEXT_NOISE * torch.rand(batch, 1, 1, 1, 1, generator=generator) ** 2
    context = context + level * torch.randn(context.shape, generator=generator)
    return Targets(
        latents=clip[:, :, CHUNK_FRAMES:],
        weight=weight[:, :, CHUNK_FRAMES:],
        text=text[pool.scenes[entry, shape]],
        context=context[:, :, :-CHUNK_FRAMES],
    )


def clip_visibility(
    window_chunks: int, copies: int, clip_chunks: int = CLIP_CHUNKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (N,) and visibility (N, N) of clean chunks 0, 1, ... followed by `copies` of noisy chunks 1, 2, ...

    A clean chunk sees itself and the `window_chunks` - 1 before it; a noisy one itself and the clean ones before it,
    as with a KV cache whose window is `window_chunks` chunks.
    """
    clean = torch.arange(clip_chunks - 1)
    noisy = torch.arange(1, clip_chunks).repeat(copies)
    chunk = torch.cat([clean, noisy])
    is_clean = torch.arange(len(chunk)) < len(clean)
    distance = chunk[:, None] - chunk[None]
    past = is_clean[None] & (distance > 0) & (distance < window_chunks)
    visible = past | torch.eye(len(chunk), dtype=torch.bool)
    frames = (chunk[:, None] * CHUNK_FRAMES + torch.arange(CHUNK_FRAMES)).flatten()
    return frames, visible.repeat_interleave(CHUNK_FRAMES, 0).repeat_interleave(CHUNK_FRAMES, 1)


def random_sigmas(
    shape: tuple[int, ...], on_steps: float, generator: torch.Generator, start_share: float = 0.0
) -> torch.Tensor:
    """Noise levels: with probability `on_steps` one of the sampling steps', else uniform in 0.02..1.

    A share `start_share` of them is made pure noise.
    """
    steps = torch.tensor(DENOISING_STEPS) / 1000
    chosen = steps[torch.randint(len(steps), shape, generator=generator)]
    anywhere = 0.02 + 0.98 * torch.rand(shape, generator=generator)
    sigmas = torch.where(torch.rand(shape, generator=generator) < on_steps, chosen, anywhere)
    return torch.where(torch.rand(shape, generator=generator) < start_share, 1.0, sigmas)


def _shape_weight(same: torch.Tensor) -> torch.Tensor:
    """Loss weights (B, 16, F, 8, 8), mean about 1, from the same clips with each shape (B, 3, 16, F, 8, 8)."""
    variance = same.var(1).mean(1, keepdim=True)
    relative = (variance / variance.mean((1, 2, 3, 4), keepdim=True)).clamp(max=8)
    return ((1 + SHAPE_WEIGHT * relative) / (1 + SHAPE_WEIGHT)).repeat(1, same.shape[2], 1, 1, 1)
