"""The loss of flow matching on noised latents, and how latents are noised."""

import torch

from examples.train_demo.latent_pool import CHUNK_FRAMES

FIRST_STEP_WEIGHT = 2.0  # loss weight of pure noise, where the layout of the chunk is decided
OWN_INPUT_SIGMA = 0.5


def flow_loss(
    flow: torch.Tensor,
    noisy: torch.Tensor,
    latents: torch.Tensor,
    weight: torch.Tensor,
    sigmas: torch.Tensor,
    is_own: torch.Tensor,
) -> torch.Tensor:
    """Weighted square error of the flow that leads from `noisy` to `latents`.

    Where `noisy` is made from an own prediction, its mistakes count 1 / sigma^2 in the flow; at low noise that would
    drown everything else, so it is limited to what it is at `OWN_INPUT_SIGMA`.
    """
    error = (flow - (noisy - latents) / spread(sigmas, noisy)).square()
    level = torch.where(sigmas > 0.98, FIRST_STEP_WEIGHT, 1.0)
    level = torch.where(is_own, (sigmas / sigmas.clamp(min=OWN_INPUT_SIGMA)).square(), level)
    return (error * weight * spread(level, noisy)).mean()


def mix(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    sigmas = spread(sigmas, latents)
    return (1 - sigmas) * latents + sigmas * noise


def spread(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Values (B,) or per chunk (B, chunks) -> a shape that broadcasts over latents (B, C, F, H, W)."""
    if values.ndim == 1:
        return values[:, None, None, None, None]
    return per_frame(values)[:, None, :, None, None]


def per_frame(values: torch.Tensor) -> torch.Tensor:
    return values.repeat_interleave(CHUNK_FRAMES, dim=1)
