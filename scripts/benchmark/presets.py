"""Model sizes: those of the published checkpoints, cut down to a layer or whole. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """Shapes of a transformer and of its latents.

    `height` and `width` are the default pixels; `spatial_factor` is pixels per latent cell, before patching. `vae`
    names the layout in `build.py`.
    """

    name: str
    heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    text_dim: int
    freq_dim: int
    channels: int
    spatial_factor: int
    height: int
    width: int
    vae: str
    text_tokens: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def transformer_config(self, layers: int) -> dict[str, Any]:
        """Arguments of `WanTransformer3DModel`."""
        return {
            "patch_size": self.patch_size,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": layers,
        }

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent height and width; ValueError if the pixels are not whole patches."""
        unit = self.spatial_factor * self.patch_size[1]
        if height < unit or width < unit or height % unit or width % unit:
            raise ValueError(f"the size is {height}x{width}; {self.name} takes positive multiples of {unit} pixels")
        return height // self.spatial_factor, width // self.spatial_factor

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame."""
        rows, columns = self.latent_size(height, width)
        return (rows // self.patch_size[1]) * (columns // self.patch_size[2])


_LAYERS = (
    Geometry("demo", 4, 32, 512, 5, 64, 128, 16, 8, 64, 64, vae="demo"),
    Geometry("1.3b-layer", 12, 128, 8960, 1, 4096, 256, 16, 8, 240, 416, vae="wan2.1"),
    Geometry("5b-layer", 24, 128, 14336, 1, 4096, 256, 48, 16, 480, 832, vae="wan2.2"),
    Geometry("14b-layer", 40, 128, 13824, 1, 4096, 256, 16, 8, 240, 416, vae="wan2.1"),
)
_demo, _1_3b, _5b, _14b = _LAYERS
_WHOLE = (
    replace(_1_3b, name="1.3b", layers=30, height=480, width=832),
    replace(_5b, name="5b", layers=30, height=704, width=1280),
    replace(_14b, name="14b", layers=40, height=480, width=832),
)
PRESETS: dict[str, Geometry] = {geometry.name: geometry for geometry in (*_LAYERS, *_WHOLE)}
