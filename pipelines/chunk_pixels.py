"""The last part of a chunk: from clean latents to pixels, by a VAE that carries its state from chunk to chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from diffusers.utils.torch_utils import get_module_execution_device

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.codec import ChunkDecoder, VideoCodec
from wan_autoregressive.pipelines.chunk_in_flight import ChunkInFlight
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.finite_check import check_finite
from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.samplers import Sampler
from wan_autoregressive.pipelines.video_frames import pixels_as


class ChunkPixels:
    """The decoders of one video: of the VAE, and of the preview VAE that is to be seen before it.

    Args:
        needs_vae: Whether anybody wants the pixels of the VAE.
    """

    def __init__(self, components: WanComponents, config: RolloutConfig, needs_vae: bool) -> None:
        self._components = components
        park = config.park_vae_state
        self.vae_decoder = new_decoder(components.codec, park) if needs_vae else None
        preview = components.preview_codec
        self.preview_decoder = None if preview is None else new_decoder(preview, park)

    @torch.no_grad()
    def decode(
        self,
        in_flight: ChunkInFlight,
        config: RolloutConfig,
        sampler: Sampler,
        on_preview: Callable[[WanVideoChunk], Any] | None,
    ) -> WanVideoChunk:
        """Make the pixels of a chunk whose latents are made.

        Args:
            sampler: Is handed the pixels, which it may need for the next chunk.
            on_preview: Called with the chunk once its preview is made.

        Raises:
            RuntimeError: latents of a step, or pixels, are not finite.
        """
        chunk, output_type = in_flight.chunk, config.output_type
        pixels_finite = None
        first_frame = self._components.geometry.pixel_frames(chunk.start)
        num_frames = None if config.num_frames is None else config.num_frames - first_frame
        made = WanVideoChunk(
            frames=None,
            latents=in_flight.latents,
            index=chunk.index,
            start_frame=chunk.start,
            start_pixel_frame=first_frame,
            given=chunk.given,
            prompt=in_flight.prompt_text,
            timings=in_flight.timings,
        )
        if self.preview_decoder is not None and (codec := self._components.preview_codec) is not None:
            device = get_module_execution_device(codec.vae)
            with in_flight.timings.stage("preview", device):
                pixels = self.preview_decoder.decode(in_flight.latents.to(device))[:, :, :num_frames]
                preview = pixels_as("np" if output_type == "latent" else output_type, pixels)
            made = dataclasses.replace(made, preview=preview)
            if on_preview is not None:
                on_preview(made)
        if self.vae_decoder is not None:
            device = self._components.codec_device
            with in_flight.timings.stage("decode", device):
                pixels = self.vae_decoder.decode(in_flight.latents.to(device))
                sampler.take_pixels(chunk, pixels)
                pixels = pixels[:, :, :num_frames]
                pixels_finite = pixels.isfinite().all()
                if output_type != "latent":
                    made = dataclasses.replace(made, frames=pixels_as(output_type, pixels))
        check_finite(in_flight.steps_finite, pixels_finite, chunk)  # last: it waits for the device, as pixels do
        return made

    def reset(self) -> None:
        """Forget the video."""
        for decoder in self._decoders():
            decoder.reset()

    def fork(self) -> Self:
        """A copy whose state goes on on its own."""
        twin = object.__new__(type(self))
        twin._components = self._components
        twin.vae_decoder = None if self.vae_decoder is None else self.vae_decoder.fork()
        twin.preview_decoder = None if self.preview_decoder is None else self.preview_decoder.fork()
        return twin

    @property
    def nbytes(self) -> int:
        """Of the state between chunks."""
        return sum(decoder.state_bytes for decoder in self._decoders())

    def state_dict(self) -> dict[str, Any]:
        return {
            "vae_decoder": None if self.vae_decoder is None else self.vae_decoder.state_dict(),
            "preview_decoder": None if self.preview_decoder is None else self.preview_decoder.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises `ValueError` where a preview has no state to go on from."""
        if self.vae_decoder is not None:
            self.vae_decoder.load_state_dict(state["vae_decoder"])
        if self.preview_decoder is not None:
            if state.get("preview_decoder") is None:
                raise ValueError("this video was made without a preview VAE until now; leave out preview_vae")
            self.preview_decoder.load_state_dict(state["preview_decoder"])

    def _decoders(self) -> list[ChunkDecoder]:
        return [decoder for decoder in (self.vae_decoder, self.preview_decoder) if decoder is not None]


def new_decoder(codec: VideoCodec | None, park: bool) -> ChunkDecoder:
    """At the beginning of a video; `park` keeps its state on the CPU between chunks."""
    assert codec is not None
    # On a CPU the state is where it would be parked.
    parked = park and get_module_execution_device(codec.vae).type != "cpu"
    return codec.decoder(parking_device="cpu" if parked else None)
