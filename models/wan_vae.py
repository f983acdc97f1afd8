"""Wan's own VAE as a codec: streaming decode and encode on the transformer's scale."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan

from wan_autoregressive.models.codec import register_codec
from wan_autoregressive.models.streaming_vae import (
    StreamingVaeDecoder,
    StreamingVaeEncoder,
    denormalize_latents,
    normalize_latents,
    vae_state_bytes,
)


class WanVaeDecoder(StreamingVaeDecoder):
    """A [`StreamingVaeDecoder`] for latents on the transformer's scale, in any dtype."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(denormalize_latents(self.vae, latents.to(self.vae.dtype)))


class WanVaeEncoder:
    """A [`StreamingVaeEncoder`] that gives latents on the transformer's scale, in float32."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._stream = StreamingVaeEncoder(vae)

    @property
    def latent_frames_done(self) -> int:
        return self._stream.latent_frames_done

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        vae = self._stream.vae
        return normalize_latents(vae, self._stream.encode(video.to(vae.dtype)).mode()).float()

    def state(self) -> list[torch.Tensor]:
        return [tensor for name, tensor in self._stream.state_dict().items() if name != "meta"]


class WanVaeCodec:
    """The codec of diffusers' `AutoencoderKLWan`, of Wan 2.1 and of Wan2.2-5B."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self.latent_channels: int = vae.config["z_dim"]
        self.scale_factor_spatial: int = vae.config["scale_factor_spatial"]
        self.scale_factor_temporal: int = vae.config["scale_factor_temporal"]

    def decoder(self, parking_device: torch.device | str | None = None) -> WanVaeDecoder:
        return WanVaeDecoder(self.vae, parking_device)

    def encoder(self) -> WanVaeEncoder:
        return WanVaeEncoder(self.vae)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(denormalize_latents(self.vae, latents.to(self.vae.dtype)), return_dict=False)[0]

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        return denormalize_latents(self.vae, latents)

    def state_bytes(self, batch_size: int, height: int, width: int) -> int:
        return vae_state_bytes(self.vae, batch_size, height, width, self.vae.dtype)

    def settings(self) -> dict[str, Any]:
        # diffusers has no accessor for them.
        names = [name for name in vars(self.vae) if name.startswith(("use_slicing", "use_tiling", "tile_sample_"))]
        return {name: getattr(self.vae, name) for name in sorted(names)}


register_codec(AutoencoderKLWan, WanVaeCodec)
