"""The layers of TAEHV, the tiny autoencoder for video by Ollin Boer Bohan (https://github.com/madebyollin/taehv).

Everything is a 2-D convolution. Time enters in three places only: a memory block sees its own input of one frame
before, a time pool joins frames that follow one another, a time growth makes several frames of one. `run_layers` works
on all frames of a call at once and carries what the next call needs, so any split of a video gives the same frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

Memory = dict[str, torch.Tensor]
"""What the layers hold from call to call, by their place in the `nn.Sequential`: a memory block its last input (batch,
channels, height, width), a time pool the frames that still wait (batch, frames, channels, height, width)."""

_LATENT_BOUND = 3.0  # the decoder bends latents smoothly into +- this


def _conv3(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


class LatentClamp(nn.Module):
    """`3 tanh(x / 3)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / _LATENT_BOUND) * _LATENT_BOUND


class MemoryBlock(nn.Module):
    """A residual block that sees its input of this frame and of the one before; both (N, channels, height, width)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv3(2 * channels, channels),
            nn.ReLU(inplace=True),
            _conv3(channels, channels),
            nn.ReLU(inplace=True),
            _conv3(channels, channels),
        )

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.conv(torch.cat([x, past], dim=1)) + x)


class SuperMemoryBlock(nn.Module):
    """The memory block of the "super" decoder: a depthwise 7x7 convolution, then two of 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, 7, padding=3, groups=2 * channels, bias=False),
            nn.Conv2d(2 * channels, 4 * channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([x, past], dim=1)) + x


class TimePool(nn.Module):
    """Makes one frame of `stride`, which lie in the channels, earlier first: (N, stride * channels, height, width)."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * channels, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class TimeGrowth(nn.Module):
    """Makes `stride` frames of each: (N, channels, height, width) to (N * stride, channels, height, width)."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, stride * channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


def make_encoder(inputs: int, width: int, z_dim: int, time_pools: Sequence[int], blocks: int) -> nn.Sequential:
    """Frames of `inputs` channels to latents; one stage per time pool, each halves height and width."""
    layers: list[nn.Module] = [_conv3(inputs, width), nn.ReLU(inplace=True)]
    for stride in time_pools:
        layers += [TimePool(width, stride), _conv3(width, width, stride=2, bias=False)]
        layers += [MemoryBlock(width) for _ in range(blocks)]
    return nn.Sequential(*layers, _conv3(width, z_dim))


def make_decoder(
    z_dim: int, widths: Sequence[int], outputs: int, time_growths: Sequence[int], blocks: int
) -> nn.Sequential:
    """Latents to frames of `outputs` channels; one stage per time growth, each doubles height and width."""
    layers: list[nn.Module] = [LatentClamp(), _conv3(z_dim, widths[0]), nn.ReLU(inplace=True)]
    for width, next_width, stride in zip(widths, widths[1:], time_growths, strict=False):
        layers += [MemoryBlock(width) for _ in range(blocks)]
        layers += [nn.Upsample(scale_factor=2), TimeGrowth(width, stride), _conv3(width, next_width, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), _conv3(widths[-1], outputs))


def make_super_decoder(
    z_dim: int, widths: Sequence[int], outputs: int, time_growths: Sequence[int], blocks: int
) -> nn.Sequential:
    """As `make_decoder`, in the architecture of the checkpoint `taew2_2_super`."""
    layers: list[nn.Module] = [nn.Conv2d(z_dim, widths[0], 1, bias=False)]
    for width, next_width, stride in zip(widths, widths[1:], time_growths, strict=False):
        layers += [SuperMemoryBlock(width) for _ in range(blocks)]
        layers += [_conv3(width, 4 * next_width), nn.ReLU(inplace=True), nn.PixelShuffle(2)]
        layers += [TimeGrowth(next_width, stride)]
    return nn.Sequential(*layers, _conv3(widths[-1], outputs))


def run_layers(layers: nn.Sequential, video: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
    """All frames of `video` through `layers`, in parallel, going on from `memory`.

    Args:
        video: (batch, frames, channels, height, width).
        memory: what the call before gave; empty at the start of a video. Neither it nor its tensors are changed.

    Returns:
        The output (batch, frames, channels, height, width), which has no frames while the time pools wait, and the
        memory for the next call, new tensors that share nothing with the output.
    """
    batch, after = len(video), Memory()
    x = video.flatten(0, 1)
    for index, layer in enumerate(layers):
        held = memory.get(str(index))
        if isinstance(layer, MemoryBlock | SuperMemoryBlock):
            past, after[str(index)] = _one_frame_earlier(x.unflatten(0, (batch, len(x) // batch)), held)
            x = layer(x, past.flatten(0, 1))
        elif isinstance(layer, TimePool):
            groups, waiting = _groups(x.unflatten(0, (batch, len(x) // batch)), held, layer.stride)
            if waiting.shape[1]:
                after[str(index)] = waiting
            x = layer(groups.flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, len(x) // batch)), after


def _one_frame_earlier(frames: torch.Tensor, last: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The frame before each of `frames`, zeros before the first of a video; and the last of them all, copied."""
    if last is None:
        last = frames.new_zeros(frames.shape[0], *frames.shape[2:])
    with_past = torch.cat([last.unsqueeze(1), frames], dim=1)
    return with_past[:, :-1], with_past[:, -1].clone()


def _groups(frames: torch.Tensor, waiting: torch.Tensor | None, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each `stride` frames joined in the channels, and the frames, copied, that do not fill a group yet."""
    if waiting is not None:
        frames = torch.cat([waiting, frames], dim=1)
    whole = frames.shape[1] // stride
    groups = frames[:, : whole * stride].unflatten(1, (whole, stride)).flatten(2, 3)
    return groups, frames[:, whole * stride :].clone()
