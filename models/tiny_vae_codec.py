"""The tiny VAE as a codec: decoding in a fraction of the time and memory of Wan's own."""

from typing import Any

import torch

from wan_autoregressive.models.codec import register_codec
from wan_autoregressive.models.streaming_vae import denormalize_latents, normalize_latents
from wan_autoregressive.models.tiny_vae import AutoencoderTinyWan
from wan_autoregressive.models.tiny_vae_costs import tiny_vae_state_bytes
from wan_autoregressive.models.tiny_vae_stream import TinyVaeDecoder, TinyVaeEncoder


class TinyChunkDecoder(TinyVaeDecoder):
    """A [`TinyVaeDecoder`] for latents on the transformer's scale, in any dtype."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(_to_vae(self.vae, latents))


class TinyChunkEncoder:
    """Latents on the transformer's scale, in float32, on Wan's grid of 1 + 4k frames and then 4k at a time.

    The tiny encoder makes latent k of the frames up to 4k + 3, three more than Wan's. So the last latent of every call
    is made with the last frame repeated three times; all others are those of one encoding of the whole video.
    """

    def __init__(self, vae: AutoencoderTinyWan) -> None:
        self._vae = vae
        self._stream = TinyVaeEncoder(vae)
        self._done = 0

    @property
    def latent_frames_done(self) -> int:
        return self._done

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        made_early = 1 if self._done else 0  # the last call's last latent comes once more, now with all its frames
        complete = self._stream.encode(video.to(self._vae.dtype)).mode()
        latents = torch.cat([complete, self._stream.fork().finish().mode()], dim=2)[:, :, made_early:]
        self._done += latents.shape[2]
        return normalize_latents(self._vae, latents).float()

    def state(self) -> list[torch.Tensor]:
        return [tensor for name, tensor in self._stream.state_dict().items() if name != "meta"]


class TinyVaeCodec:
    """The codec of [`AutoencoderTinyWan`]."""

    def __init__(self, vae: AutoencoderTinyWan) -> None:
        self.vae = vae
        self.latent_channels: int = vae.config["z_dim"]
        self.scale_factor_spatial: int = vae.config["scale_factor_spatial"]
        self.scale_factor_temporal: int = vae.config["scale_factor_temporal"]

    def decoder(self, parking_device: torch.device | str | None = None) -> TinyChunkDecoder:
        return TinyChunkDecoder(self.vae, parking_device)

    def encoder(self) -> TinyChunkEncoder:
        return TinyChunkEncoder(self.vae)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(_to_vae(self.vae, latents), return_dict=False)[0]

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        return denormalize_latents(self.vae, latents)

    def state_bytes(self, batch_size: int, height: int, width: int) -> int:
        return tiny_vae_state_bytes(self.vae, batch_size, height, width, self.vae.dtype)

    def settings(self) -> dict[str, Any]:
        return {}


def _to_vae(vae: AutoencoderTinyWan, latents: torch.Tensor) -> torch.Tensor:
    return denormalize_latents(vae, latents.to(vae.dtype))


register_codec(AutoencoderTinyWan, TinyVaeCodec)
