"""What the tensors of a published tiny autoencoder tell, its sizes, and what they do not: Wan's latent statistics."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# Per channel, mean and standard deviation of the latents of Wan's own VAEs, from their configs in diffusers format:
# Wan2.1-T2V-1.3B-Diffusers (16 channels) and Wan2.2-TI2V-5B-Diffusers (48 channels).
# fmt: off
WAN_LATENT_STATISTICS: dict[int, tuple[list[float], list[float]]] = {
    16: (
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    ),
    48: (
        [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
         -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
         -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
         -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
         0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
         0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
         0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
         0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
         0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
    ),
}
# fmt: on


def layout_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The sizes of a tiny autoencoder, as arguments of `AutoencoderTinyWan`.

    Args:
        shapes: names and shapes of its state dict.

    Raises:
        ValueError: these are not the names of a TAEHV. (Fitting names with other shapes than the sizes ask for are
            left to whoever builds the model.)
    """
    encoder_convs = _in_order(shapes, r"encoder\.(\d+)\.weight")
    decoder_convs = _in_order(shapes, r"decoder\.(\d+)\.weight")
    pools = _in_order(shapes, r"encoder\.(\d+)\.conv\.weight")
    growths = _in_order(shapes, r"decoder\.(\d+)\.conv\.weight")
    blocks = _in_order(shapes, r"decoder\.(\d+)\.conv\.0\.weight")
    convolutions = [*encoder_convs, *decoder_convs, *pools, *growths]
    if (
        not (pools and growths)
        or min(len(encoder_convs), len(decoder_convs)) < 2
        or any(len(shape) != 4 or 0 in shape for shape in convolutions)
    ):
        raise ValueError("not a TAEHV checkpoint: expected 2-D convolutions under encoder.N and decoder.N")
    patch = math.isqrt(encoder_convs[0][1] // 3)
    pool_strides = [shape[1] // shape[0] for shape in pools]
    return {
        "z_dim": encoder_convs[-1][0],
        "patch_size": patch if patch > 1 else None,
        "encoder_width": encoder_convs[0][0],
        "decoder_widths": [shape[1] for shape in decoder_convs[1:]],
        "blocks_per_stage": len(blocks) // len(growths),
        "encoder_time_pools": pool_strides,
        "decoder_time_growths": [shape[0] // shape[1] for shape in growths],
        "decoder_type": "super" if "decoder.0.weight" in shapes else "plain",
        "scale_factor_spatial": max(patch, 1) * 2 ** len(pools),
        "scale_factor_temporal": math.prod(pool_strides),
    }


def _in_order(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> list[tuple[int, ...]]:
    """The shapes of all names of this form, by the number in the name."""
    found = {int(match[1]): shape for name, shape in shapes.items() if (match := re.fullmatch(pattern, name))}
    return [found[index] for index in sorted(found)]
