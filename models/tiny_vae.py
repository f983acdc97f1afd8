"""The tiny autoencoder for Wan's latents (TAEHV) as a diffusers model: `taew2_1`, `taew2_2`, LightTAE.

It stands in for `AutoencoderKLWan`: same latents, same frames and frame counts, a small part of the work, slightly
softer pictures. https://github.com/madebyollin/taehv
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from wan_autoregressive.models.checkpoint_files import load_checkpoint
from wan_autoregressive.models.tiny_vae_layers import (
    Memory,
    make_decoder,
    make_encoder,
    make_super_decoder,
    run_layers,
)
from wan_autoregressive.models.tiny_vae_layout import WAN_LATENT_STATISTICS, layout_of

LatentSpace = Literal["normalised", "raw"]

# Latent frames that go through the whole `decode` and `encode` together: activations at full size are what counts in
# memory, and more frames at once are hardly faster.
_STEP_LATENT_FRAMES = 3


class AutoencoderTinyWan(ModelMixin, ConfigMixin):
    """A tiny autoencoder for the latents of Wan 2.1 (16 channels) or of Wan 2.2's 5B model (48 channels).

    Which latents it takes is part of its weights and cannot be seen in them:

    - `"normalised"` (`taew2_1`, `taew2_2`, `taew2_2_super`): the latents that the transformer works on. `decode` takes
      them as they are; `latents_mean` and `latents_std` in the config are zeros and ones, so code that denormalises by
      the config, such as `WanPipeline`, does the right thing.
    - `"raw"` (LightTAE): the latents of `AutoencoderKLWan`, which are `latents * latents_std + latents_mean`. The
      config holds these statistics, `decode` takes raw latents and `encode` gives them, as `AutoencoderKLWan` does.

    So in both cases whoever calls converts by the config's `latents_mean` and `latents_std`, and this class does not.

    Two more things do not show in a file: HunyuanVideo's `taehv` has the shapes of `taew2_1`, and the LightTAE for
    HunyuanVideo 1.5 uses a LeakyReLU. Both load and give wrong pictures; this class is for Wan.

    Args:
        z_dim: channels of the latents.
        patch_size: pixels, height and width, that are folded into channels; None is 1. As in `AutoencoderKLWan`.
        encoder_width: channels of the encoder.
        decoder_widths: channels of the decoder's stages, and of its last convolution. Each stage doubles the size.
        blocks_per_stage: memory blocks in each stage, encoder and decoder.
        encoder_time_pools: how many frames each stage of the encoder makes one of. Each stage halves the size.
        decoder_time_growths: how many frames each stage of the decoder makes of one.
        decoder_type: `"plain"`, or `"super"` for the decoder of `taew2_2_super`.
        latent_space: see above.
        latents_mean, latents_std: of a raw latent space, one number per channel. None takes Wan's for 16 and 48
            channels.
        scale_factor_spatial, scale_factor_temporal: pixels per latent in height and width, frames per latent; as in
            `AutoencoderKLWan`, and they must be what the stages give.

    Raises:
        ValueError: the arguments contradict one another.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 16,
        patch_size: int | None = None,
        encoder_width: int = 64,
        decoder_widths: Sequence[int] = (256, 128, 64, 64),
        blocks_per_stage: int = 3,
        encoder_time_pools: Sequence[int] = (2, 2, 1),
        decoder_time_growths: Sequence[int] = (1, 2, 2),
        decoder_type: Literal["plain", "super"] = "plain",
        latent_space: LatentSpace = "normalised",
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        scale_factor_spatial: int = 8,
        scale_factor_temporal: int = 4,
    ) -> None:
        super().__init__()
        if decoder_type not in ("plain", "super"):
            raise ValueError(f"decoder_type is {decoder_type!r}; allowed are 'plain' and 'super'")
        mean, std = _latent_statistics(z_dim, latent_space, latents_mean, latents_std)
        self.register_to_config(latents_mean=mean, latents_std=std)
        if len(decoder_widths) != len(decoder_time_growths) + 1:
            raise ValueError(
                f"decoder_widths has {len(decoder_widths)} entries; {len(decoder_time_growths)} decoder_time_growths "
                "need one more than that"
            )
        patch = patch_size or 1
        for name, stated, built in (
            ("scale_factor_spatial", scale_factor_spatial, patch * 2 ** len(encoder_time_pools)),
            ("scale_factor_spatial", scale_factor_spatial, patch * 2 ** len(decoder_time_growths)),
            ("scale_factor_temporal", scale_factor_temporal, math.prod(encoder_time_pools)),
            ("scale_factor_temporal", scale_factor_temporal, math.prod(decoder_time_growths)),
        ):
            if stated != built:
                raise ValueError(f"{name} is {stated}, but patch_size and the stages give {built}")
        channels = 3 * patch**2
        self.encoder = make_encoder(channels, encoder_width, z_dim, encoder_time_pools, blocks_per_stage)
        make = make_decoder if decoder_type == "plain" else make_super_decoder
        self.decoder = make(z_dim, decoder_widths, channels, decoder_time_growths, blocks_per_stage)

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        latent_space: LatentSpace = "normalised",
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
    ) -> AutoencoderTinyWan:
        """Load a published `.pth` or `.safetensors` file; all sizes are read off its tensors.

        Args:
            path: such as `taew2_1.pth`, `taew2_2.pth`, `taew2_2_super.pth`, `lighttaew2_1.pth`.
            latent_space: `"raw"` for LightTAE files; the file does not say.
            latents_mean, latents_std: see the class.
            dtype: None keeps the file's.

        Raises:
            ValueError: one line; there is no such file, it holds code, or it is no TAEHV.
        """
        state_dict = load_checkpoint(os.fspath(path))
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        statistics = {"latents_mean": latents_mean, "latents_std": latents_std}
        try:
            layout = layout_of(shapes)
            with torch.device("meta"):
                model = cls(**layout, latent_space=latent_space, **statistics)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if shapes != expected:
            name = min(name for name in {**shapes, **expected} if shapes.get(name) != expected.get(name))
            raise ValueError(
                f"{os.fspath(path)}: not a TAEHV checkpoint: {name} is {shapes.get(name, 'absent')}, expected "
                f"{expected.get(name, 'nothing of this name')}"
            )
        model.load_state_dict(state_dict, assign=True)
        if dtype is not None:
            nn.Module.to(model, dtype)  # the model's own `to` warns about dtypes
        return model.eval()

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[IdentityDistribution]:
        """Encode a whole video.

        Args:
            x: (batch, 3, frames, height, width) in [-1, 1]. Where `scale_factor_temporal` (4) does not divide the
                frames, the last one is repeated at the end until it does: 1 + 4n frames give 1 + n latents.

        Returns:
            Like `AutoencoderKLWan.encode`: `.latent_dist.mode()` are the latents (batch, z_dim, latent frames, height
            / scale_factor_spatial, width / scale_factor_spatial). Nothing is random: `.sample()` are the same.

        Raises:
            ValueError: the video has another shape.
        """
        check_video(self, x)
        factor = self.config["scale_factor_temporal"]
        memory: Memory = {}
        latents = []
        padding = x[:, :, -1:].expand(-1, -1, -x.shape[2] % factor, -1, -1)
        for part in torch.cat([x, padding], dim=2).split(_STEP_LATENT_FRAMES * factor, dim=2):
            part_latents, memory = encode_part(self, part, memory)
            latents.append(part_latents)
        distribution = IdentityDistribution(torch.cat(latents, dim=2))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode a whole video.

        Args:
            z: (batch, z_dim, latent frames, height, width) in this model's latent space: as the transformer made
                them, unless the config's `latent_space` is `"raw"`.

        Returns:
            Like `AutoencoderKLWan.decode`: `.sample` are the frames (batch, 3, frames, height, width) in [-1, 1], one
            for the first latent frame and `scale_factor_temporal` (4) for each later one.

        Raises:
            ValueError: the latents have another shape.
        """
        check_latents(self, z)
        memory: Memory = {}
        frames = []
        for part in z.split(_STEP_LATENT_FRAMES, dim=2):
            part_frames, memory = decode_part(self, part, memory)
            frames.append(part_frames)
        # The first latent stands for one frame; the ones that the decoder makes before it belong to no video.
        sample = torch.cat(frames, dim=2)[:, :, self.config["scale_factor_temporal"] - 1 :]
        return DecoderOutput(sample=sample) if return_dict else (sample,)


# The hook brings a CPU-offloaded model to its device before its layers are called; it looks at the first argument.
@apply_forward_hook
def decode_part(vae: AutoencoderTinyWan, latents: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
    """The frames of the next latents of a video, `scale_factor_temporal` for each of them, also for the first.

    Args:
        latents: (batch, z_dim, latent frames, height, width).
        memory: what the part before gave, empty at the start; it is not changed.

    Returns:
        Frames (batch, 3, frames, height, width) in [-1, 1], and the memory for the next part.
    """
    frames, memory = run_layers(vae.decoder, latents.transpose(1, 2), memory)
    if (patch := vae.config["patch_size"] or 1) > 1:
        frames = F.pixel_shuffle(frames, patch)
    return (frames.clamp(0, 1) * 2 - 1).transpose(1, 2), memory


@apply_forward_hook
def encode_part(vae: AutoencoderTinyWan, video: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
    """The latents that are complete with the next frames of a video; possibly none.

    Args:
        video: (batch, 3, frames, height, width) in [-1, 1].
        memory: what the part before gave, empty at the start; it is not changed.

    Returns:
        Latents (batch, z_dim, latent frames, height, width), and the memory for the next part.
    """
    frames = (video.transpose(1, 2) + 1) / 2
    if (patch := vae.config["patch_size"] or 1) > 1:
        frames = F.pixel_unshuffle(frames, patch)
    latents, memory = run_layers(vae.encoder, frames, memory)
    return latents.transpose(1, 2), memory


def check_latents(vae: AutoencoderTinyWan, latents: torch.Tensor) -> None:
    """Raise ValueError unless `vae` can decode them."""
    _check(latents, "latents", vae.config["z_dim"])


def check_video(vae: AutoencoderTinyWan, video: torch.Tensor) -> None:
    """Raise ValueError unless `vae` can encode it."""
    _check(video, "video", 3)
    ratio = vae.config["scale_factor_spatial"]
    if video.shape[-2] % ratio or video.shape[-1] % ratio:
        raise ValueError(f"video is {video.shape[-2]}x{video.shape[-1]} pixels; both must be multiples of {ratio}")


def _check(x: torch.Tensor, name: str, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape (batch, {channels}, frames, height, width) without empty "
            f"dimensions, got {x.dtype} of shape {tuple(x.shape)}"
        )


def _latent_statistics(
    z_dim: int, latent_space: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel that lead from the transformer's latents to this model's."""
    if latent_space not in ("normalised", "raw"):
        raise ValueError(f"latent_space is {latent_space!r}; allowed are 'normalised' and 'raw'")
    if (mean is None) != (std is None):
        raise ValueError("latents_mean and latents_std must be given together, or neither")
    identity: tuple[Any, Any] = ([0.0] * z_dim, [1.0] * z_dim)
    if mean is None or std is None:
        if latent_space == "normalised":
            return identity
        if z_dim not in WAN_LATENT_STATISTICS:
            raise ValueError(f"a raw latent space of {z_dim} channels needs latents_mean and latents_std")
        return WAN_LATENT_STATISTICS[z_dim]
    if (len(mean), len(std)) != (z_dim, z_dim):
        raise ValueError(f"latents_mean and latents_std have {len(mean)} and {len(std)} numbers; z_dim is {z_dim}")
    if latent_space == "normalised" and (list(mean), list(std)) != identity:
        raise ValueError("latents_mean and latents_std other than zeros and ones need latent_space='raw'")
    return list(mean), list(std)
