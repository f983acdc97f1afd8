"""Stages 3 to 5 of the demo checkpoint: the transformer.

- `flow`: causal flow matching by teacher forcing, at random and at the sampling noise levels.
- `few_step`: at the sampling levels only; half of the inputs come from the model's own previous step, so that it
  learns to repair what it does.
- `rollout`: `few_step` on chunks that follow its own rollouts (`self_rollout`), together with real clips.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from examples.train_demo.flow_batches import (
    Targets,
    clip_targets,
    clip_visibility,
    first_chunk_targets,
    random_sigmas,
)
from examples.train_demo.flow_loss import flow_loss, mix, per_frame, spread
from examples.train_demo.latent_pool import CHUNK_FRAMES, LatentPool
from examples.train_demo.packed import PackedLayout, make_layout, packed_flow
from examples.train_demo.sampling import DENOISING_STEPS
from examples.train_demo.self_rollout import RolloutPool
from examples.train_demo.text import TEXT_DIM
from examples.train_demo.training_loop import Acceleration, Schedule, Worker, train

FIRST_CHUNK_START_SHARE = 0.25  # of the first chunks begin at pure noise, beyond those that do so by chance


@dataclasses.dataclass(frozen=True)
class FlowSettings:
    """Sizes of the transformer and of its training; batches are per worker."""

    heads: int = 4
    head_dim: int = 48
    ffn_dim: int = 640
    layers: int = 5
    first_batch: int = 32
    clip_batch: int = 4
    copies: int = 2  # noisy copies of each clip in one packed forward
    flow_steps: int = 1600
    few_step_steps: int = 1000
    rollout_steps: int = 200
    flow_rate: float = 3e-3
    few_step_rate: float = 2e-3
    rollout_rate: float = 8e-4


def create_transformer(settings: FlowSettings, seed: int) -> WanTransformer3DModel:
    """A small `WanTransformer3DModel` whose cross-attention starts loud enough to be heard above the padding."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=settings.ffn_dim,
        num_layers=settings.layers,
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attn2.to_v.weight *= 10
            block.attn2.norm_k.weight *= 2
        model.proj_out.weight *= 0.1
    return model


class FlowTrainer:
    """Losses of one transformer on first chunks and on clips.

    Args:
        model: trained in place.
        text: embeddings (scenes, tokens, dim) of all training scenes.
    """

    def __init__(self, model: WanTransformer3DModel, text: torch.Tensor, copies: int, fast: Acceleration) -> None:
        self.model, self.text, self.copies, self.fast = model, text, copies, fast
        self.packed_flow = fast.compile(packed_flow)
        everything = torch.ones(CHUNK_FRAMES, CHUNK_FRAMES, dtype=torch.bool)
        self.first_layout = make_layout(model, torch.arange(CHUNK_FRAMES), everything, 8, 8)
        self.clip_layouts: dict[tuple[int, bool], PackedLayout] = {}
        for window in (2, 3, 4):
            for with_first_frame in (True, False):
                frames, visible = clip_visibility(window, copies)
                if not with_first_frame:  # as when the window has rolled past the start of the video
                    visible[1:, 0] = False
                self.clip_layouts[window, with_first_frame] = make_layout(model, frames, visible, 8, 8)

    def first_chunk_loss(
        self, targets: Targets, on_steps: float, own: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Loss on first chunks; a share `own` of the inputs is made from the model's own previous step."""

        def predict(noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
            return self._flow(noisy, sigmas[:, None].expand(-1, CHUNK_FRAMES), targets.text, self.first_layout)

        sigmas = random_sigmas((len(targets.latents),), on_steps, generator, start_share=FIRST_CHUNK_START_SHARE)
        base, is_own = self._base(targets.latents, sigmas, own, generator, targets.noise, predict)
        noisy = mix(base, _noise(targets, sigmas, generator), sigmas)
        return flow_loss(predict(noisy, sigmas), noisy, targets.latents, targets.weight, sigmas, is_own)

    def clip_loss(self, targets: Targets, on_steps: float, own: float, generator: torch.Generator) -> torch.Tensor:
        """Loss on continuation chunks, each at its own noise level, `copies` times per clip."""
        assert targets.context is not None
        window = int(torch.randint(2, 5, (), generator=generator))
        layout = self.clip_layouts[window, bool(torch.rand((), generator=generator) < 0.7)]
        context, batch = targets.context, len(targets.context)
        latents = targets.latents.repeat(1, 1, self.copies, 1, 1)
        weight = targets.weight.repeat(1, 1, self.copies, 1, 1)
        chunks = latents.shape[2] // CHUNK_FRAMES

        def predict(noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
            frames = torch.cat([torch.zeros(batch, context.shape[2]), per_frame(sigmas)], dim=1)
            packed = torch.cat([context, noisy], dim=2)
            return self._flow(packed, frames, targets.text, layout)[:, :, context.shape[2] :]

        sigmas = random_sigmas((batch, chunks), on_steps, generator)
        base, is_own = self._base(latents, sigmas, own, generator, None, predict)
        noisy = mix(base, torch.randn(latents.shape, generator=generator), sigmas)
        return flow_loss(predict(noisy, sigmas), noisy, latents, weight, sigmas, is_own)

    def _base(
        self,
        latents: torch.Tensor,
        sigmas: torch.Tensor,
        own: float,
        generator: torch.Generator,
        first_noise: torch.Tensor | None,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is noised: the right latents, or what the model makes of them one sampling step earlier; and which."""
        if own == 0:
            return latents, torch.zeros(sigmas.shape, dtype=torch.bool)
        steps = torch.tensor(DENOISING_STEPS) / 1000
        earlier = torch.where(steps > sigmas[..., None] + 1e-3, steps, 2.0).amin(-1)  # the next higher step
        has_earlier = earlier <= 1
        earlier = earlier.clamp(max=1)
        noise = torch.randn(latents.shape, generator=generator)
        if first_noise is not None:
            noise = torch.where(spread(earlier == 1, latents), first_noise, noise)
        with torch.no_grad():
            noisy = mix(latents, noise, earlier)
            predicted = noisy - spread(earlier, latents) * predict(noisy, earlier)
        use = has_earlier & (torch.rand(sigmas.shape, generator=generator) < own)
        return torch.where(spread(use, latents), predicted, latents), use

    def _flow(
        self, latents: torch.Tensor, sigmas: torch.Tensor, text: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor:
        with self.fast.autocast():
            return self.packed_flow(self.model, latents, 1000 * sigmas, text, layout.cos, layout.sin, layout.bias)


def train_transformer(
    model: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    text: torch.Tensor,
    pools: tuple[LatentPool, LatentPool],
    folder: Path,
    settings: FlowSettings,
    worker: Worker,
    fast: Acceleration,
    seed: int,
    sample: Callable[[int], dict[str, float]],
) -> None:
    """Run the three stages on `model`, in place. `pools`: whole clips and first chunks. `sample`: see `train`."""
    clips, firsts = pools
    trainer = FlowTrainer(model, text, settings.copies, fast)

    def losses(stage: int, on_steps: float, own: float, rollouts: RolloutPool | None = None) -> Callable:
        def at(step: int) -> dict[str, torch.Tensor]:
            generator = worker.generator(seed, stage, step)
            if rollouts is not None and step % 2:
                continued = rollouts.targets(step, settings.clip_batch, generator)
            else:
                continued = clip_targets(clips, text, settings.clip_batch, generator)
            later = trainer.clip_loss(continued, on_steps, own, generator)
            started = first_chunk_targets(firsts, text, settings.first_batch, generator)
            first = trainer.first_chunk_loss(started, on_steps, own, generator)
            return {"loss": first + later, "first": first, "later": later}

        return at

    flow = Schedule(settings.flow_steps, settings.flow_rate, decay_fraction=0.02)
    train("flow", model, flow, losses(4, 0.75, 0.0), folder, worker, sample)
    few_step = Schedule(settings.few_step_steps, settings.few_step_rate, decay_fraction=0.7)
    train("few_step", model, few_step, losses(5, 0.95, 0.5), folder, worker, sample)
    if settings.rollout_steps:
        rollouts = RolloutPool(model, vae, text, worker, fast, seed)
        rollout = Schedule(settings.rollout_steps, settings.rollout_rate, decay_fraction=0.9)
        train("rollout", model, rollout, losses(6, 0.95, 0.5, rollouts), folder, worker, sample)


def _noise(targets: Targets, sigmas: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fresh noise, but the tied noise for first steps: later steps are re-noised with plain noise when sampling."""
    fresh = torch.randn(targets.latents.shape, generator=generator)
    if targets.noise is None:
        return fresh
    return torch.where(spread(sigmas > 0.98, fresh), targets.noise, fresh)
