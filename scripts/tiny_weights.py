"""Random weights for the tiny checkpoint, scaled so that every input of the models is visible in the output.

With default initialisation a small Wan is nearly blind: the 512 zero-padded text tokens outvote the prompt, the
gates let a tenth of each attention through, and a VAE decoder turns everything into flat gray. The scales below
were found by looking at videos; `tests/unit/test_tiny_checkpoint.py` holds what they must achieve.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

# Taps of a causal temporal kernel, oldest frame first. Mostly the current frame, so that motion stays smooth, with
# enough of the past that a decoder which loses its state draws other pixels.
_TEMPORAL_TAPS = (0.15, 0.35, 1.0)

_CROSS_ATTENTION_GAIN = 3.0
# Second convolution of a residual block: a quiet branch, so that the latents and not the blocks draw the picture.
_RESIDUAL_GAIN = 0.4
_LATENT_GAIN = 2.0
_PIXEL_STD = 0.4


@torch.no_grad()
def init_text_encoder(encoder: UMT5EncoderModel, generator: torch.Generator) -> None:
    """Unit-variance embeddings and variance-keeping layers: tokens stay apart through both blocks."""
    for name, parameter in encoder.named_parameters():
        if "layer_norm" in name:
            parameter.fill_(1.0)
        elif "shared" in name or "relative_attention_bias" in name:
            _normal(parameter, 1.0, generator)
        else:
            _normal(parameter, parameter.shape[1] ** -0.5, generator)


@torch.no_grad()
def init_transformer(transformer: WanTransformer3DModel, generator: torch.Generator) -> None:
    """Blocks that speak as loudly as their input, and a text path that the padding cannot drown.

    All biases are zero, so a zero-padded text token has value 0 and attention logit 0; norm weights of 2 on both
    sides of the cross-attention then let the few real tokens win against hundreds of padded ones.
    """
    for name, parameter in transformer.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("scale_shift_table"):
            _normal(parameter, 0.2, generator)
            if parameter.shape[1] == 6:  # shift, scale, gate of self-attention, then of the feed-forward
                parameter[:, [2, 5]] += 1.0
        elif ".norm_" in name:
            parameter.fill_(2.0 if ".attn2." in name else 1.5)
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            gain = _CROSS_ATTENTION_GAIN if ".attn2.to_out." in name else 1.0
            _normal(parameter, gain * parameter[0].numel() ** -0.5, generator)
    # Reading the patch back with the transposed embedding makes the flow resemble its input, so the clean
    # prediction (input minus flow) is mostly what the blocks, and with them the prompt, have added.
    patch_embedding = transformer.patch_embedding.weight
    channels_first = patch_embedding.flatten(2).permute(2, 1, 0)  # (patch, channels, dim)
    transformer.proj_out.weight.copy_(channels_first.flatten(0, 1) * math.sqrt(0.8))


@torch.no_grad()
def init_vae(vae: AutoencoderKLWan, generator: torch.Generator) -> None:
    """Image-first convolutions with smooth spatial kernels; latents with the statistics the config states."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            _init_convolution(module, name.rsplit(".", 1)[-1], generator)
        elif hasattr(module, "gamma"):
            module.gamma.fill_(1.0)
    z_dim = vae.config["z_dim"]
    mean, std = torch.tensor(vae.config["latents_mean"]), torch.tensor(vae.config["latents_std"])
    vae.quant_conv.weight[:z_dim] *= std.view(-1, 1, 1, 1, 1)
    _bias(vae.quant_conv)[:z_dim] = mean
    vae.quant_conv.weight[z_dim:] *= 0.1
    _bias(vae.quant_conv)[z_dim:] = -5.0  # log-variance: a narrow posterior
    weight = vae.post_quant_conv.weight
    weight /= std.view(1, -1, 1, 1, 1)
    _bias(vae.post_quant_conv).copy_(-(weight.flatten(1) @ mean))
    _init_pixels(vae, generator)


def _init_pixels(vae: AutoencoderKLWan, generator: torch.Generator) -> None:
    """Centres and spreads the pixels of random latents over [-1, 1], each colour by itself.

    Pixels drawn at one position get nearly one colour: output channels are ordered colour first, then the place in
    the patch (`unpatchify` of diffusers). Measured values are rounded, so that the last bits of a convolution, which
    differ between machines, do not reach the weights.
    """
    conv_out = vae.decoder.conv_out
    per_patch = (vae.config["patch_size"] or 1) ** 2
    if per_patch > 1:
        colour = conv_out.weight[::per_patch].repeat_interleave(per_patch, dim=0)
        conv_out.weight.copy_(colour + 0.1 * conv_out.weight)
    conv_out.weight *= 0.1  # decoding clamps to [-1, 1]; what is measured must stay far inside
    mean, std = torch.tensor(vae.config["latents_mean"]), torch.tensor(vae.config["latents_std"])
    latents = torch.randn(1, vae.config["z_dim"], 3, 6, 6, generator=generator)
    latents = latents * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)
    pixels = vae._decode(latents, return_dict=False)[0]  # (1, 3, frames, height, width)
    within_frame = pixels.std(dim=(3, 4)).mean(dim=(0, 2))
    for colour_index in range(3):
        channels = slice(colour_index * per_patch, (colour_index + 1) * per_patch)
        gain = _PIXEL_STD / max(float(within_frame[colour_index]), 0.001)
        conv_out.weight[channels] *= round(gain, 1)
        _bias(conv_out)[channels] = -round(gain * float(pixels[:, colour_index].mean()), 1)


def _init_convolution(module: nn.Conv2d | nn.Conv3d, kind: str, generator: torch.Generator) -> None:
    """Random channel mixing times a fixed smooth kernel; `time_conv` of an upsampler first repeats the frame."""
    weight = module.weight  # (out, in, *kernel)
    _bias(module).zero_()
    mixing = torch.randn(weight.shape[:2], generator=generator) * weight.shape[1] ** -0.5
    if kind == "time_conv":
        identity = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
        mixing = identity + 0.2 * mixing
    elif weight.shape[-1] == 3:
        # SiLU outputs are positive on average; without this every layer adds a constant tint.
        mixing = mixing - mixing.mean(dim=1, keepdim=True)
    mixing = mixing * {"conv2": _RESIDUAL_GAIN, "conv_in": _LATENT_GAIN}.get(kind, 1.0)
    weight.copy_(mixing[(...,) + (None,) * (weight.ndim - 2)] * _smooth_kernel(weight.shape[2:]))


def _smooth_kernel(size: torch.Size) -> torch.Tensor:
    """Kernel of shape `size` (time, height, width) or (height, width): causal in time, binomial in space."""
    binomial = {1: torch.ones(1), 3: torch.tensor([0.25, 0.5, 0.25])}
    kernel = torch.outer(binomial[size[-2]], binomial[size[-1]])
    kernel = kernel / kernel.norm()
    if len(size) == 2:
        return kernel
    taps = torch.tensor(_TEMPORAL_TAPS[-size[0] :])
    return (taps / taps.sum()).view(-1, 1, 1) * kernel


def _bias(module: nn.Conv2d | nn.Conv3d) -> torch.Tensor:
    """The bias of a convolution; every convolution of a Wan VAE has one, which its type does not say."""
    assert module.bias is not None
    return module.bias


def _normal(parameter: nn.Parameter, std: float, generator: torch.Generator) -> None:
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
