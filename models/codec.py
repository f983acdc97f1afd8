"""What a rollout asks of a VAE: latents in and frames out, chunk by chunk, with the state in the rollout's hands.

A codec takes and gives latents on the transformer's scale; whether its VAE has another one is its own business. A VAE
class gets its codec by `register_codec`.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch


class ChunkDecoder(Protocol):
    """The decoder's state of one video."""

    @property
    def state_bytes(self) -> int:
        """Bytes held for the next call."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The next latents `(batch, latent_channels, latent_frames, height, width)` as pixels in [-1, 1], `(batch, 3,
        frames, height, width)`: 1 frame for the video's first latent, `scale_factor_temporal` for each later one. A
        call that failed changes nothing."""

    def reset(self) -> None:
        """Begin another video."""

    def fork(self) -> Self:
        """A copy that goes on alone."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that the next call depends on."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave."""


class ChunkEncoder(Protocol):
    """The encoder's state of one video."""

    @property
    def latent_frames_done(self) -> int: ...

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """The next pixels in [-1, 1], `(batch, 3, frames, height, width)`, as latents: `1 + k *
        scale_factor_temporal` frames in the first call, `k * scale_factor_temporal` in later ones."""

    def state(self) -> list[torch.Tensor]:
        """What later latents depend on beside their pixels. Not to be written to."""


class VideoCodec(Protocol):
    """A VAE as a rollout sees it."""

    @property
    def vae(self) -> torch.nn.Module:
        """The module, for its weights, device and dtype."""

    latent_channels: int
    scale_factor_spatial: int
    scale_factor_temporal: int

    def decoder(self, parking_device: torch.device | str | None = None) -> ChunkDecoder:
        """For one video. Its state is kept on `parking_device` between calls if one is given."""

    def encoder(self) -> ChunkEncoder:
        """For one video."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """A whole video at once, see [`ChunkDecoder.decode`]."""

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents on the transformer's scale as they are on the VAE's."""

    def state_bytes(self, batch_size: int, height: int, width: int) -> int:
        """Bytes that a decoder will hold for videos of `height` x `width` pixels, without running anything."""

    def settings(self) -> dict[str, Any]:
        """What changes pixels beside config and weights, as JSON: tiling, say."""


_CODECS: dict[type, Callable[[Any], VideoCodec]] = {}


def register_codec(vae_class: type, codec: Callable[[Any], VideoCodec]) -> None:
    """Make `codec(vae)` the codec of VAEs of a class and of its subclasses."""
    _CODECS[vae_class] = codec


def codec_of(vae: Any) -> VideoCodec:
    """The codec of a VAE. Raises `ValueError` for a class that has none."""
    for vae_class in type(vae).__mro__:
        if vae_class in _CODECS:
            return _CODECS[vae_class](vae)
    raise ValueError(f"the VAE is a {type(vae).__name__}; allowed are {', '.join(codec_names())}")


def codec_names() -> list[str]:
    """Names of the VAE classes that have a codec."""
    return [vae_class.__name__ for vae_class in _CODECS]
