"""The causal transformer and the streaming VAE."""

from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel

__all__ = ["CausalWanTransformer3DModel"]
