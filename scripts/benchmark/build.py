"""Pipelines with random weights of a given size: speed does not depend on what the weights are."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.scripts.benchmark.settings import BenchmarkSettings

# Arguments of `AutoencoderKLWan` that differ from its defaults, which are Wan 2.1's.
_VAES: dict[str, dict[str, Any]] = {
    "wan2.1": {},
    "wan2.2": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
    "demo": {
        "base_dim": 16,
        "z_dim": 16,
        "dim_mult": [1, 4, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
    },
}


def build_pipeline(settings: BenchmarkSettings) -> WanAutoregressivePipeline:
    """A pipeline without text encoder, its weights made on the device. The global random state is left as it was.

    As in a loaded checkpoint, what diffusers keeps in float32 (norms, time embedding, modulation) stays float32.

    Raises:
        ValueError: the device is not there.
    """
    device, dtype = usable_device(settings.device), getattr(torch, settings.dtype)
    cuda_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices), device:
        torch.manual_seed(settings.seed)
        transformer = CausalWanTransformer3DModel(**settings.geometry.transformer_config(settings.num_layers))
        vae = AutoencoderKLWan(**_VAES[settings.geometry.vae]) if settings.with_vae else None
    for model in (transformer, vae):
        if model is not None:
            cast_weights(model.eval().requires_grad_(False), dtype, model._keep_in_fp32_modules)
    if vae is not None and settings.vae_tiling:
        vae.enable_tiling()
    pipe = WanAutoregressivePipeline(None, None, transformer, vae, SelfForcingScheduler())
    pipe.vae_scale_factor_spatial = settings.geometry.spatial_factor  # unknown to a pipeline without a VAE
    pipe.set_progress_bar_config(disable=True)
    return pipe


def usable_device(name: str) -> torch.device:
    """The device of that name; ValueError if this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def prompt_embeds(settings: BenchmarkSettings) -> torch.Tensor:
    """Random text `(1, text_tokens, text_dim)`; its padding would be attended to all the same."""
    generator = torch.Generator().manual_seed(settings.seed)
    embeds = torch.randn(1, settings.geometry.text_tokens, settings.geometry.text_dim, generator=generator)
    return embeds.to(settings.device, getattr(torch, settings.dtype))


def start_rollout(pipe: WanAutoregressivePipeline, settings: BenchmarkSettings, decode: bool = True) -> WanRollout:
    """The rollout of these settings, with random text and noise."""
    return pipe.rollout(
        **rollout_settings(pipe, settings),
        prompt_embeds=prompt_embeds(settings),
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="pt" if decode and pipe.vae is not None else "latent",
    )


def rollout_settings(pipe: WanAutoregressivePipeline, settings: BenchmarkSettings) -> dict[str, Any]:
    """Arguments of a `RolloutConfig` without end, or of `settings.chunks` if there is no window, so that the cache is
    then allocated at once."""
    height, width = settings.pixels
    num_frames = None
    if settings.window_frames is None:
        num_frames = (settings.chunks * settings.chunk_frames - 1) * pipe.vae_scale_factor_temporal + 1
    return {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "chunk_frames": settings.chunk_frames,
        "window_frames": settings.window_frames,
        "sink_frames": settings.sink_frames,
        "position_mode": settings.position_mode,
        "kv_dtype": settings.kv_dtype,
        "num_inference_steps": settings.steps,
    }


def copy_on_the_same_weights(transformer: CausalWanTransformer3DModel) -> CausalWanTransformer3DModel:
    """Modules of its own, to be changed, with the very parameters and buffers."""
    shared = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in shared})


def cast_weights(model: nn.Module, dtype: torch.dtype, keep: Collection[str] | None = None) -> None:
    """Cast all parameters in place but those of the modules named in `keep`."""
    kept = set(keep or ())
    for name, parameter in model.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def weights_bytes(*models: nn.Module | None) -> int:
    """Bytes of the parameters of all models that are there."""
    return sum(parameter.nbytes for model in models if model is not None for parameter in model.parameters())
