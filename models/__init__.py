"""The causal transformer, the streaming VAE and the tiny VAE."""

from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.models.tiny_vae import AutoencoderTinyWan

__all__ = ["AutoencoderTinyWan", "CausalWanTransformer3DModel"]
