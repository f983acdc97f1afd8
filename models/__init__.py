"""The causal transformer, the codecs and the tiny VAE."""

from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.models.codec import VideoCodec, codec_of, register_codec
from wan_autoregressive.models.tiny_vae import AutoencoderTinyWan
from wan_autoregressive.models.tiny_vae_codec import TinyVaeCodec
from wan_autoregressive.models.wan_vae import WanVaeCodec

__all__ = [
    "AutoencoderTinyWan",
    "CausalWanTransformer3DModel",
    "TinyVaeCodec",
    "VideoCodec",
    "WanVaeCodec",
    "codec_of",
    "register_codec",
]
