"""Videos that are made tick by tick, as the rolling sampler makes them, beside the clips that they should become."""

import dataclasses

import torch

from examples.train_demo.flow_loss import flow_loss, mix, spread
from examples.train_demo.latent_pool import CHUNK_FRAMES
from examples.train_demo.rolling_window import JointForward, Tick


@dataclasses.dataclass(frozen=True)
class RollingVideos:
    """B videos just before a tick.

    `clips`: the right latents (B, 16, F, 8, 8) of the whole videos. `text`: (B, tokens, dim). `finished`: latents
    (B, 16, f, 8, 8) from frame 0 on. `in_flight`: what the tick denoises. `is_own`: (B, chunks in flight), whether a
    chunk was noised from what the model made of it and not from the right latents.
    """

    clips: torch.Tensor
    text: torch.Tensor
    finished: torch.Tensor
    in_flight: torch.Tensor
    is_own: torch.Tensor

    @classmethod
    def right(cls, tick: Tick, clips: torch.Tensor, text: torch.Tensor, noise: torch.Tensor) -> "RollingVideos":
        """Videos in which everything is right before `tick`. `noise`: as large as what is in flight."""
        sigmas = tick.sigmas.expand(len(clips), -1)
        in_flight = mix(clips[:, :, tick.frames], noise, sigmas)
        return cls(clips, text, clips[:, :, : tick.start], in_flight, torch.zeros(sigmas.shape, dtype=torch.bool))

    def loss(self, tick: Tick, joint: JointForward) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a tick, and what the model takes for the clean latents in flight (without gradient)."""
        noisy, sigmas = self.in_flight, tick.sigmas.expand(len(self.clips), -1)
        flow = joint.flow(tick, self.finished, noisy, self.text)
        right = self.clips[:, :, tick.frames]
        loss = flow_loss(flow, noisy, right, torch.ones_like(noisy), sigmas, self.is_own)
        return loss, noisy - spread(sigmas, noisy) * flow.detach()

    def after(
        self, before: Tick, tick: Tick, clean: torch.Tensor, is_own: torch.Tensor, noise: torch.Tensor
    ) -> "RollingVideos":
        """The same videos at the next tick.

        Args:
            before, tick: the tick that is done and the one to come.
            clean: what the model takes for the clean latents of `before`.
            is_own: (B, chunks of `before`), which of them go on from that and not from the right latents.
            noise: as large as what `tick` has in flight.
        """
        clean = torch.where(spread(is_own, clean), clean, self.clips[:, :, before.frames])
        done, stay = clean.tensor_split([tick.start - before.start], dim=2)
        entering = noise.shape[2] - stay.shape[2]
        # What enters is pure noise, so that it does not matter what is noised.
        stay = torch.nn.functional.pad(stay, (0, 0, 0, 0, 0, entering))
        is_own = is_own[:, tick.chunks.start - before.chunks.start :]
        return dataclasses.replace(
            self,
            finished=torch.cat([self.finished, done], dim=2),
            in_flight=mix(stay, noise, tick.sigmas.expand(len(clean), -1)),
            is_own=torch.nn.functional.pad(is_own, (0, entering // CHUNK_FRAMES)),
        )
