"""A codec whose videos are decoded on another rank, so that the ranks that denoise go on meanwhile.

The rank that asks waits for the pixels, as for those of its own VAE; with `decode_alongside` it denoises the next
chunk in the meantime. The state of a video is where it is decoded, and comes back to be saved.
"""

import dataclasses
import itertools
import weakref
from typing import Any

import torch
import torch.distributed as dist

from wan_autoregressive.models.codec import ChunkDecoder, ChunkEncoder, VideoCodec
from wan_autoregressive.models.weights_fingerprint import weights_fingerprint
from wan_autoregressive.pipelines.ranks import RankGroup, Ranks


class RemoteCodec:
    """On the rank that asks: everything but decoding chunk by chunk is done by `codec` here.

    Args:
        pair: Two ranks, of which the second is a [`DecoderServer`].
    """

    def __init__(self, codec: VideoCodec, pair: RankGroup) -> None:
        self._codec, self.ranks, self.group = codec, pair.ranks, pair.group
        self.latent_channels = codec.latent_channels
        self.scale_factor_spatial = codec.scale_factor_spatial
        self.scale_factor_temporal = codec.scale_factor_temporal
        self.numbers = itertools.count()
        self.gone: list[int] = []
        """Numbers of decoders that are there no more."""

    @property
    def vae(self) -> torch.nn.Module:
        return self._codec.vae

    def decoder(self, parking_device: torch.device | str | None = None) -> "RemoteDecoder":
        decoder = RemoteDecoder(self)
        with decoder.turn("new", parking_device=parking_device):
            return decoder

    def encoder(self) -> ChunkEncoder:
        return self._codec.encoder()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._codec.decode(latents)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        return self._codec.denormalize(latents)

    def state_bytes(self, batch_size: int, height: int, width: int) -> int:
        """None on this rank."""
        return 0

    def settings(self) -> dict[str, Any]:
        return self._codec.settings()


class RemoteDecoder:
    """The decoder's state of one video, on another rank."""

    state_bytes = 0

    def __init__(self, codec: RemoteCodec) -> None:
        self._codec, self._number = codec, next(codec.numbers)
        weakref.finalize(self, codec.gone.append, self._number)

    def turn(self, verb: str, **arguments: Any) -> Any:
        """Have the other rank do something with its decoder, and do the own part within the block."""
        gone, self._codec.gone[:] = list(self._codec.gone), []
        return self._codec.ranks.turn(verb, self._number, arguments, gone)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        group, latents = self._codec.group, latents.contiguous()
        with self.turn("decode", shape=latents.shape, dtype=latents.dtype):
            dist.send(latents, group=group, group_dst=1)
            shape, dtype = self._codec.ranks.share(None, source=1)
            pixels = torch.empty(shape, dtype=dtype, device=latents.device)
            dist.recv(pixels, group=group, group_src=1)
        return pixels

    def reset(self) -> None:
        with self.turn("reset"):
            pass

    def fork(self) -> "RemoteDecoder":
        twin = RemoteDecoder(self._codec)
        with self.turn("fork", twin=twin._number):
            return twin

    def state_dict(self) -> dict[str, torch.Tensor]:
        """On the CPU."""
        with self.turn("state_dict"):
            state: dict[str, torch.Tensor] = self._codec.ranks.share(None, source=1)
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        with self.turn("load_state_dict", state={name: tensor.cpu() for name, tensor in state.items()}):
            pass


class DecoderServer:
    """On the rank that decodes: what a [`RemoteCodec`] asks for, until it ends.

    Args:
        device: Where `codec` runs.
    """

    def __init__(self, codec: VideoCodec, device: torch.device, pair: RankGroup) -> None:
        self._codec, self._device, self._ranks, self._group = codec, device, pair.ranks, pair.group
        self._decoders: dict[int, ChunkDecoder] = {}

    @torch.no_grad()
    def serve(self) -> None:
        """Raises `RankFailedError` when the other rank is gone."""
        for verb, number, arguments, gone in self._ranks.orders():
            for other in gone:
                self._decoders.pop(other, None)
            with self._ranks.together():
                getattr(self, f"_{verb}")(number, **arguments)

    def _new(self, number: int, parking_device: torch.device | str | None) -> None:
        self._decoders[number] = self._codec.decoder(parking_device)

    def _decode(self, number: int, shape: torch.Size, dtype: torch.dtype) -> None:
        latents = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(latents, group=self._group, group_src=0)
        pixels = self._decoders[number].decode(latents).contiguous()
        self._ranks.share((pixels.shape, pixels.dtype), source=1)
        dist.send(pixels, group=self._group, group_dst=0)

    def _reset(self, number: int) -> None:
        self._decoders[number].reset()

    def _fork(self, number: int, twin: int) -> None:
        self._decoders[twin] = self._decoders[number].fork()

    def _state_dict(self, number: int) -> None:
        self._ranks.share({name: x.cpu() for name, x in self._decoders[number].state_dict().items()}, source=1)

    def _load_state_dict(self, number: int, state: dict[str, torch.Tensor]) -> None:
        self._decoders[number].load_state_dict(state)


def check_same_codec(codec: VideoCodec, ranks: Ranks) -> None:
    """Raise `ValueError` on both ranks unless their VAEs have the same weights and settings."""
    weights = dataclasses.asdict(weights_fingerprint(codec.vae))
    ranks.check_same({"vae": repr((type(codec.vae).__name__, weights, codec.settings()))})
