"""Pipelines with random weights of a given size: speed does not depend on what the weights are."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from wan_autoregressive.configs.choices import OutputType
from wan_autoregressive.models.causal_wan_transformer import CausalWanTransformer3DModel
from wan_autoregressive.models.codec import codec_of
from wan_autoregressive.models.tiny_vae import AutoencoderTinyWan
from wan_autoregressive.pipelines import WanAutoregressivePipeline
from wan_autoregressive.pipelines.image_condition import blank_image_condition
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.rollout import WanRollout
from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.scripts.costs.workload import Workload

Model = TypeVar("Model", bound=nn.Module)


def build_pipeline(workload: Workload) -> WanAutoregressivePipeline:
    """A pipeline without text encoder, its weights made on the device. The global random state is left as it was.

    As in a loaded checkpoint, what diffusers keeps in float32 (norms, time embedding, modulation) stays float32.

    Raises:
        ValueError: the device is not there.
    """
    device = usable_device(workload.device)
    cuda_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices), device:
        torch.manual_seed(workload.seed)
        transformers = [
            _as_loaded(CausalWanTransformer3DModel.from_config(dict(workload.model.transformer)), workload)
            for _ in range(workload.model.experts)
        ]
        vae = build_vae(workload) if workload.with_vae else None
        image_encoder = _build_image_encoder(workload)
    second = {"transformer_2": transformers[1], "boundary_ratio": 0.875} if len(transformers) == 2 else {}
    pipe = WanAutoregressivePipeline(
        None, None, transformers[0], vae, SelfForcingScheduler(), image_encoder=image_encoder, **second
    )
    pipe.image_processor = None if image_encoder is None else object()  # a blank image needs no processing
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_vae(workload: Workload) -> AutoencoderKLWan | AutoencoderTinyWan:
    """The one that decodes, on torch's default device."""
    if workload.tiny_vae:
        assert workload.model.tiny_vae is not None
        return _as_loaded(AutoencoderTinyWan.from_config(dict(workload.model.tiny_vae)), workload)
    vae = _as_loaded(AutoencoderKLWan.from_config(dict(workload.model.vae)), workload)
    if workload.vae_tiling:
        vae.enable_tiling()
    return vae


def _build_image_encoder(workload: Workload) -> CLIPVisionModel | None:
    config = workload.model.image_encoder
    return None if config is None else _as_loaded(CLIPVisionModel(CLIPVisionConfig(**config)), workload)


def _as_loaded(model: Model, workload: Workload) -> Model:
    kept: Any = model._keep_in_fp32_modules
    cast_weights(model.eval().requires_grad_(False), getattr(torch, workload.dtype), kept)
    return model


def usable_device(name: str) -> torch.device:
    """The device of that name; ValueError if this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def prompt_embeds(workload: Workload) -> torch.Tensor:
    """Random text `(1, text_tokens, text_dim)`; its padding would be attended to all the same."""
    generator = torch.Generator().manual_seed(workload.seed)
    shape = (1, workload.rollout.max_sequence_length, workload.model.transformer["text_dim"])
    return torch.randn(shape, generator=generator).to(workload.device, getattr(torch, workload.dtype))


def start_rollout(pipe: WanAutoregressivePipeline, workload: Workload, decode: bool = True) -> WanRollout:
    """The rollout of this workload, with random text and noise, and a blank image where there has to be one."""
    output_type: OutputType = "pt" if decode and pipe.vae is not None else "latent"
    components, config = pipe.wan_components(), dataclasses.replace(workload.rollout, output_type=output_type)
    if workload.preview_vae:
        with components.device:
            preview = build_vae(workload.of_preview)
        components = dataclasses.replace(components, preview_codec=codec_of(preview))
    return pipe.rollouts(
        components,
        config,
        PromptState(prompt_embeds(workload)),
        generator=torch.Generator().manual_seed(workload.seed),
        image=blank_image_condition(components, config, 1, components.device),
    )


def cast_weights(model: nn.Module, dtype: torch.dtype, keep: Collection[str] | None = None) -> None:
    """Cast all parameters in place but those of the modules named in `keep`."""
    kept = set(keep or ())
    for name, parameter in model.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def weights_bytes(*models: nn.Module | None) -> int:
    """Bytes of the parameters of all models that are there."""
    return sum(parameter.nbytes for model in models if model is not None for parameter in model.parameters())
