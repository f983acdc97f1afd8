"""Chunks that follow the model's own rollouts, for the last training stage.

A rollout is generated through the KV cache, decoded and looked at: where its shape really stands at the end of a
chunk, the right continuation is rendered. The transformer then learns to go on correctly from what it makes, which
teacher forcing never shows it.
"""

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from examples.train_demo import measure, world
from examples.train_demo.flow_batches import Targets
from examples.train_demo.latent_pool import CHUNK_FRAMES, CLIP_CHUNKS, encode_normalized, pixel_frames
from examples.train_demo.sampling import decode_normalized, generate_latents
from examples.train_demo.training_loop import Acceleration, Worker

REFRESH_STEPS = 100  # training steps until the rollouts are generated anew
ROLLOUTS = 12  # per worker
CHUNKS = (4, 8, 12)  # lengths; the last four chunks are used
LEAST_AREA = 0.4  # of the template's: below it nothing can be located


class RolloutPool:
    """Rollouts of the model as it is, renewed every `REFRESH_STEPS` steps.

    Args:
        model: the transformer in training; read when the rollouts are renewed.
        text: embeddings (scenes, tokens, dim) of all training scenes.
    """

    def __init__(
        self,
        model: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        text: torch.Tensor,
        worker: Worker,
        fast: Acceleration,
        seed: int,
    ) -> None:
        self.model, self.vae, self.text, self.worker, self.fast, self.seed = model, vae, text, worker, fast, seed
        self._round = -1
        self._targets: Targets | None = None

    def targets(self, step: int, batch: int, generator: torch.Generator) -> Targets:
        """A batch for training step `step`: own chunks as context, the right continuations as targets."""
        if self._targets is None or step // REFRESH_STEPS != self._round:
            self._round = step // REFRESH_STEPS
            self._targets = self._generate(self.worker.generator(self.seed, 7, self._round))
        every = self._targets
        assert every.context is not None
        rows = torch.randint(len(every.latents), (batch,), generator=generator)
        return Targets(every.latents[rows], every.weight[rows], every.text[rows], context=every.context[rows])

    @torch.no_grad()
    def _generate(self, generator: torch.Generator) -> Targets:
        scenes = world.training_scenes()
        chosen = torch.randint(len(scenes), (ROLLOUTS,), generator=generator)
        text, own = self.text[chosen], [scenes[index] for index in chosen]
        length = CHUNKS[self._round % len(CHUNKS)]
        latents = generate_latents(self.model, text, length, generator)
        clips = decode_normalized(self.vae, latents)
        first = length - CLIP_CHUNKS
        targets, weights = [], []
        for chunk in range(1, CLIP_CHUNKS):
            last_pixel = pixel_frames(CHUNK_FRAMES * (first + chunk)) - 1
            centers, visible = self._locate(clips[:, :, last_pixel], own)
            targets.append(self._continuations(own, centers, chunk))
            weights.append(visible.float().view(-1, 1, 1, 1, 1).expand_as(targets[-1]))
        context = latents[:, :, CHUNK_FRAMES * first : CHUNK_FRAMES * (length - 1)]
        return Targets(torch.cat(targets, 2), torch.cat(weights, 2), text, context=context)

    def _locate(self, frames: torch.Tensor, scenes: list[world.Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres (B, 2) of the shapes in frames (B, 3, SIZE, SIZE) in -1..1, and whether they can be seen (B,)."""
        measures = measure.measure_frames((frames.permute(0, 2, 3, 1) + 1) * 127.5)
        rows = range(len(scenes))
        centers = torch.stack([measure.shape_center(measures, scenes[row].shape)[row] for row in rows])
        middle = torch.tensor([world.SIZE / 2, world.SIZE / 2])
        areas = torch.stack([world.coverage(scene.shape, middle).sum() for scene in scenes])
        return centers, measures.area > LEAST_AREA * areas

    def _continuations(self, scenes: list[world.Scene], centers: torch.Tensor, chunk: int) -> torch.Tensor:
        """Latents (B, 16, 3, 8, 8) of chunk `chunk` of clips whose shapes stand at `centers` just before it."""
        frames = pixel_frames(CHUNK_FRAMES * (chunk + 1))
        before = pixel_frames(CHUNK_FRAMES * chunk) - 1
        travelled = world.positions(scenes, torch.zeros_like(centers), 1, before)[:, 0]
        clips = world.render(scenes, centers - travelled, frames)
        return encode_normalized(self.vae, clips, self.fast)[:, :, -CHUNK_FRAMES:]
