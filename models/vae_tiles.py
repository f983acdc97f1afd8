"""How a Wan VAE cuts one frame into overlapping tiles and puts the results together again.

`AutoencoderKLWan.tiled_decode` and `tiled_encode` (diffusers) compute the geometry and loop over it in one function,
tiles outside and frames inside, so they cannot be used frame by frame. This module holds the same geometry and the
same blending for a single step in time. It knows nothing of caches or streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one frame, in raster order.

    `tops`, `lefts`, `height` and `width` are in the units of the input of `vae.decoder` or `vae.encoder` (latent or
    pixel positions, pixels already patchified); all other sizes are in the units of its output. A tile that starts
    near the lower or right edge is smaller than `height` x `width`.
    """

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    height: int
    width: int
    keep_height: int
    keep_width: int
    blend_height: int
    blend_width: int
    out_height: int
    out_width: int

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def cut(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the tiles of x (batch, channels, frames, height, width) row by row, as views."""
        for top in self.tops:
            for left in self.lefts:
                yield x[..., top : top + self.height, left : left + self.width]

    def stitch(self, vae: AutoencoderKLWan, tiles: list[torch.Tensor]) -> torch.Tensor:
        """Blend processed tiles into one tensor (batch, channels, frames, out_height, out_width).

        Args:
            vae: lends its `blend_v` and `blend_h`.
            tiles: one tensor per tile in the order of `cut`. They are overwritten: a blended tile is the upper or left
                neighbour of the ones that follow, so the order of the blends is part of the result.
        """
        columns = len(self.lefts)
        rows = []
        for i in range(len(self.tops)):
            kept = []
            for j in range(columns):
                tile = tiles[i * columns + j]
                if i > 0:
                    tile = vae.blend_v(tiles[(i - 1) * columns + j], tile, self.blend_height)
                if j > 0:
                    tile = vae.blend_h(tiles[i * columns + j - 1], tile, self.blend_width)
                kept.append(tile[..., : self.keep_height, : self.keep_width])
            rows.append(torch.cat(kept, dim=-1))
        return torch.cat(rows, dim=-2)[..., : self.out_height, : self.out_width]


def decode_grid(vae: AutoencoderKLWan, height: int, width: int) -> TileGrid | None:
    """Tiles that `vae.tiled_decode` uses for latents of `height` x `width`; None where the VAE decodes them whole.

    Raises:
        ValueError: the VAE's tile strides are smaller than one latent.
    """
    ratio = vae.config["scale_factor_spatial"]
    tile_height, tile_width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    if not vae.use_tiling or (width <= tile_width and height <= tile_height):
        return None
    stride_height, stride_width = vae.tile_sample_stride_height // ratio, vae.tile_sample_stride_width // ratio
    _check_strides(vae, stride_height, stride_width)
    # The decoder's output is still patchified: its sizes are in patches, not pixels.
    patch = vae.config["patch_size"] or 1
    keep_height, keep_width = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
    return TileGrid(
        tops=tuple(range(0, height, stride_height)),
        lefts=tuple(range(0, width, stride_width)),
        height=tile_height,
        width=tile_width,
        keep_height=keep_height,
        keep_width=keep_width,
        blend_height=vae.tile_sample_min_height // patch - keep_height,
        blend_width=vae.tile_sample_min_width // patch - keep_width,
        out_height=height * ratio // patch,
        out_width=width * ratio // patch,
    )


def encode_grid(vae: AutoencoderKLWan, height: int, width: int) -> TileGrid | None:
    """Tiles that `vae.tiled_encode` uses for a video of `height` x `width` pixels; None where it is encoded whole.

    With `patch_size` the tiles are cut from the patchified video but keep their size in numbers, as in diffusers: a
    tile of 256 spans 256 patches.

    Raises:
        ValueError: the VAE's tile strides are smaller than one latent.
    """
    if not vae.use_tiling or (width <= vae.tile_sample_min_width and height <= vae.tile_sample_min_height):
        return None
    patch = vae.config["patch_size"] or 1
    ratio = vae.config["scale_factor_spatial"] // patch
    height, width = height // patch, width // patch
    keep_height, keep_width = vae.tile_sample_stride_height // ratio, vae.tile_sample_stride_width // ratio
    _check_strides(vae, keep_height, keep_width)
    return TileGrid(
        tops=tuple(range(0, height, vae.tile_sample_stride_height)),
        lefts=tuple(range(0, width, vae.tile_sample_stride_width)),
        height=vae.tile_sample_min_height,
        width=vae.tile_sample_min_width,
        keep_height=keep_height,
        keep_width=keep_width,
        blend_height=vae.tile_sample_min_height // ratio - keep_height,
        blend_width=vae.tile_sample_min_width // ratio - keep_width,
        out_height=height // ratio,
        out_width=width // ratio,
    )


def _check_strides(vae: AutoencoderKLWan, stride_height: int, stride_width: int) -> None:
    if min(stride_height, stride_width) < 1:
        raise ValueError(
            f"tile strides of {vae.tile_sample_stride_height} x {vae.tile_sample_stride_width} pixels are smaller "
            f"than one latent ({vae.config['scale_factor_spatial']} pixels): pass larger ones to vae.enable_tiling()"
        )
