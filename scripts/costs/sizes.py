"""Sizes of models: those of the published checkpoints, or read from a checkpoint folder. No torch in here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan_autoregressive.demo import demo_checkpoint


@dataclass(frozen=True)
class ModelSizes:
    """What the weights' shapes follow from, and the pixels of a video unless others are asked for."""

    name: str
    transformer: Mapping[str, Any]
    """Config of `WanTransformer3DModel`."""
    vae: Mapping[str, Any]
    """Config of `AutoencoderKLWan`."""
    text_encoder: Mapping[str, Any] | None
    """Config of `UMT5EncoderModel`; `None` for a folder without one."""
    height: int
    width: int
    experts: int = 1
    """Transformers of this size; 2 share the steps and cache every chunk each."""
    tiny_vae: Mapping[str, Any] | None = None
    """Config of `AutoencoderTinyWan` for the same latents; `None` where none is known."""
    image_encoder: Mapping[str, Any] | None = None
    """Config of `CLIPVisionModel`, for a transformer that attends to an image."""

    @classmethod
    def of_preset(cls, name: str) -> ModelSizes:
        """One of `PRESETS`; ValueError for another name."""
        if name not in PRESETS:
            raise ValueError(f"the preset is {name!r}; allowed are {', '.join(PRESETS)}")
        if name == "demo":
            return replace(cls.of_folder(demo_checkpoint()), name=name, height=64, width=64)
        return _PUBLISHED[name]

    @classmethod
    def of_folder(cls, folder: str | Path) -> ModelSizes:
        """Read from the configs of a checkpoint in diffusers' layout.

        Raises:
            ValueError: there is none, its transformers differ, one of them is missing, or it is conditioned on a last
                frame as well.
        """
        folder = Path(folder)
        transformer, experts = _config(folder, "transformer"), 1
        if (folder / "transformer_2").is_dir():
            experts = 2
            if _config(folder, "transformer_2") != transformer:
                raise ValueError(f"the two transformers in '{folder}' have other sizes each; a pair is of one size")
        elif _is_of_a_pair(folder):
            raise ValueError(f"'{folder}' is of a model with two transformers, and there is no transformer_2 in it")
        if transformer.get("pos_embed_seq_len") is not None:
            raise ValueError(
                f"the transformer in '{folder}' is conditioned on a first and a last frame, and a video that grows "
                "has no last one; use one for image to video"
            )
        image_encoder = _config(folder, "image_encoder") if transformer.get("image_dim") is not None else None
        text_encoder = _config(folder, "text_encoder") if (folder / "text_encoder").is_dir() else None
        vae = _config(folder, "vae")
        if (folder / "tiny_vae").is_dir():
            tiny_vae: Mapping[str, Any] | None = _config(folder, "tiny_vae")
        else:
            tiny_vae = _TINY_VAES.get((vae.get("z_dim", 16), vae["scale_factor_spatial"]))
        return cls(folder.name, transformer, vae, text_encoder, 480, 832, experts, tiny_vae, image_encoder)

    def with_layers(self, layers: int) -> ModelSizes:
        """The same with another number of transformer blocks."""
        if layers < 1:
            raise ValueError(f"layers is {layers}; it must be at least 1")
        return replace(self, transformer={**self.transformer, "num_layers": layers})

    @property
    def layers(self) -> int:
        return int(self.transformer["num_layers"])

    @property
    def dim(self) -> int:
        return int(self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"])

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.transformer["out_channels"])

    @property
    def image_tokens(self) -> int:
        """That the cross-attention sees of an image: one for each patch, and one for the whole."""
        if self.image_encoder is None:
            return 0
        return int((self.image_encoder["image_size"] // self.image_encoder["patch_size"]) ** 2 + 1)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, before patching."""
        return int(self.vae["scale_factor_spatial"])

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return int(self.vae["scale_factor_temporal"])

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent height and width; ValueError if the pixels are not whole patches."""
        _, *patch = self.transformer["patch_size"]
        units = [self.spatial_factor * side for side in patch]
        if min(height, width) < 1 or height % units[0] or width % units[1]:
            raise ValueError(
                f"the size is {height}x{width}; {self.name} takes positive multiples of {units[0]}x{units[1]} pixels"
            )
        return height // self.spatial_factor, width // self.spatial_factor

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame."""
        rows, columns = self.latent_size(height, width)
        _, patch_height, patch_width = self.transformer["patch_size"]
        return int((rows // patch_height) * (columns // patch_width))


def _config(folder: Path, part: str) -> dict[str, Any]:
    path = folder / part / "config.json"
    if not path.is_file():
        raise ValueError(f"there is no checkpoint in '{folder}': {part}/config.json is missing")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _is_of_a_pair(folder: Path) -> bool:
    """By the model index, where there is one."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return index.get("boundary_ratio") is not None or any(index.get("transformer_2") or ())


def _transformer(heads: int, ffn_dim: int, layers: int, channels: int = 16) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
        "rope_max_seq_len": 1024,
    }


# What differs from the defaults of `AutoencoderKLWan`, and the factors.
_WAN21_VAE = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}
_WAN22_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_CLIP_VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
}
_SEES_IMAGE = {"in_channels": 36}  # the noise, the image's latents and a mask of 4
_SEES_CLIP = {"image_dim": 1280, "added_kv_proj_dim": 5120}
# The defaults of `AutoencoderTinyWan` are `taew2_1`; `taew2_2` differs so. By latent channels and pixels per latent.
_TINY_VAES: dict[tuple[int, int], dict[str, Any]] = {
    (16, 8): {},
    (48, 16): {"z_dim": 48, "patch_size": 2, "scale_factor_spatial": 16},
}


def _published(
    name: str, transformer: dict[str, Any], vae: dict[str, Any], height: int, width: int, experts: int = 1
) -> ModelSizes:
    tiny_vae = _TINY_VAES[transformer["out_channels"], vae["scale_factor_spatial"]]
    image_encoder = _CLIP_VIT_H if "image_dim" in transformer else None
    return ModelSizes(name, transformer, vae, _UMT5_XXL, height, width, experts, tiny_vae, image_encoder)


_PUBLISHED = {
    "1.3b": _published("1.3b", _transformer(12, 8960, 30), _WAN21_VAE, 480, 832),
    "5b": _published("5b", _transformer(24, 14336, 30, channels=48), _WAN22_VAE, 704, 1280),
    "14b": _published("14b", _transformer(40, 13824, 40), _WAN21_VAE, 480, 832),
    "a14b": _published("a14b", _transformer(40, 13824, 40), _WAN21_VAE, 480, 832, experts=2),
    "i2v-14b": _published("i2v-14b", _transformer(40, 13824, 40) | _SEES_IMAGE | _SEES_CLIP, _WAN21_VAE, 480, 832),
    "i2v-a14b": _published("i2v-a14b", _transformer(40, 13824, 40) | _SEES_IMAGE, _WAN21_VAE, 480, 832, experts=2),
}
PRESETS = ("demo", *_PUBLISHED)
