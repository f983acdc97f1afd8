"""Blocks for diffusers' `ModularPipeline`, to be mixed with Wan's own and with anybody's."""

from wan_autoregressive.integrations.modular_diffusers.blocks import (
    WanAutoregressiveBlocks,
    WanAutoregressiveDecodeStep,
    WanAutoregressiveDenoiseStep,
    WanAutoregressivePrepareStep,
    WanAutoregressiveTextEncoderStep,
    WanKeepLatentsStep,
)

__all__ = [
    "WanAutoregressiveBlocks",
    "WanAutoregressiveDecodeStep",
    "WanAutoregressiveDenoiseStep",
    "WanAutoregressivePrepareStep",
    "WanAutoregressiveTextEncoderStep",
    "WanKeepLatentsStep",
]
