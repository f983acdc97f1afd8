"""What decoding with the tiny autoencoder costs, known from its sizes alone."""

from __future__ import annotations

import torch
from torch import nn

from wan_autoregressive.models.tiny_vae import AutoencoderTinyWan
from wan_autoregressive.models.tiny_vae_layers import TimeGrowth
from wan_autoregressive.models.tiny_vae_stream import TinyVaeDecoder


def tiny_vae_state_bytes(vae: AutoencoderTinyWan, batch_size: int, height: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that a `TinyVaeDecoder` will hold between calls, known without running or allocating anything.

    Exact: a copy of the model without weights decodes one latent frame on the meta device, after which the state no
    longer grows.

    Args:
        vae: only its config is read; it may be anywhere, or offloaded.
        batch_size: videos decoded together.
        height, width: of the video, in pixels.
        dtype: of the latents and of the model.

    Raises:
        ValueError: sizes are not positive multiples of the model's spatial factor, or the batch is empty.
    """
    _check_sizes(vae, batch_size, height, width)
    ratio = vae.config["scale_factor_spatial"]
    with torch.device("meta"), torch.no_grad():
        blank = AutoencoderTinyWan.from_config(vae.config)
        stream = TinyVaeDecoder(nn.Module.to(blank, dtype))  # the model's own `to` warns about dtypes
        stream.decode(torch.empty(batch_size, vae.config["z_dim"], 1, height // ratio, width // ratio, dtype=dtype))
    return stream.state_bytes


def tiny_vae_decode_flops(vae: AutoencoderTinyWan, batch_size: int, height: int, width: int) -> int:
    """Floating-point operations of the convolutions in decoding one latent frame, whichever it is; exact.

    A multiplication and an addition count as two, as in `torch.utils.flop_counter`.

    Args:
        vae: only its layers' shapes are read.
        batch_size: videos decoded together.
        height, width: of the video, in pixels.

    Raises:
        ValueError: sizes are not positive multiples of the model's spatial factor, or the batch is empty.
    """
    _check_sizes(vae, batch_size, height, width)
    ratio = vae.config["scale_factor_spatial"]
    positions, flops = batch_size * (height // ratio) * (width // ratio), 0
    for layer in vae.decoder:
        if isinstance(layer, nn.Upsample | nn.PixelShuffle):
            positions *= 4
        flops += sum(2 * positions * conv.weight.numel() for conv in layer.modules() if isinstance(conv, nn.Conv2d))
        if isinstance(layer, TimeGrowth):
            positions *= layer.stride
    return flops


def _check_sizes(vae: AutoencoderTinyWan, batch_size: int, height: int, width: int) -> None:
    """Raise ValueError unless these are sizes of a video, in pixels, that `vae` can decode."""
    ratio = vae.config["scale_factor_spatial"]
    if batch_size < 1 or min(height, width) < ratio or height % ratio or width % ratio:
        raise ValueError(
            f"batch_size {batch_size}, height {height}, width {width}: need at least 1 video and positive "
            f"multiples of {ratio} pixels"
        )
