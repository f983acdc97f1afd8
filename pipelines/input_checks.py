"""Whether what was asked for can work with a pipeline's components; all before any model runs."""

from typing import Any

import torch

from wan_autoregressive.configs.registry import SAMPLERS, SWITCH_POLICIES
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.prompts import Prompt, check_prompt
from wan_autoregressive.schedulers.self_forcing_scheduler import Generators


def check_extensions(config: RolloutConfig) -> None:
    """Raise `ValueError` for settings that the sampler or the switch policy they name cannot work with."""
    SAMPLERS.load(config.sampler).check(config)
    SWITCH_POLICIES.load(config.switch_policy).from_config(config)


def check_experts(components: WanComponents, config: RolloutConfig) -> None:
    """Raise `ValueError` for two transformers that do not go together, or settings that they cannot work with."""
    check_pair(components)
    if components.transformer_2 is None:
        return
    if not SAMPLERS.load(config.sampler).denoises_by_chunk:
        raise ValueError(
            f"sampler {config.sampler!r} does not take a chunk through its steps by itself, as two transformers need "
            "it; use 'chunkwise'"
        )
    if not config.clean_pass:
        raise ValueError(
            "clean_pass is off, but this pipeline has two transformers, of which the first never sees a chunk with "
            "little noise; leave the context pass on"
        )


def check_pair(components: WanComponents) -> None:
    """Raise `ValueError` for a second transformer without a boundary, the other way round, or of another size."""
    second, ratio = components.transformer_2, components.boundary_ratio
    if second is None and ratio is None:
        return
    if second is None:
        raise ValueError(
            f"boundary_ratio is {ratio}, but there is no transformer_2 for the steps below it; add it, or set "
            "boundary_ratio to None for one transformer"
        )
    if ratio is None or not 0 < ratio < 1:
        raise ValueError(
            f"boundary_ratio is {ratio}; with a transformer_2 it must be above 0 and below 1, 0.875 for "
            "Wan2.2-T2V-A14B"
        )
    first = components.transformer
    pairs = {name: (first.config[name], second.config[name]) for name in _SHARED_BY_EXPERTS}
    for name, (one, other) in {**pairs, "dtype": (first.dtype, second.dtype)}.items():
        if one != other:
            raise ValueError(f"transformer and transformer_2 must have the same {name}, got {one} and {other}")


_SHARED_BY_EXPERTS = (
    *("patch_size", "in_channels", "out_channels", "num_layers", "num_attention_heads", "attention_head_dim"),
    *("text_dim", "image_dim", "rope_max_seq_len"),
)
"""What latents, keys and values and the text of a video depend on."""


def check_sizes(components: WanComponents, config: RolloutConfig, given_frames: int) -> None:
    """Raise `ValueError` for sizes, counts or a kind of transformer that cannot work."""
    model, geometry = components.transformer.config, components.geometry
    mask_and_image = geometry.scale_factor_temporal + model.out_channels
    if components.condition_channels not in (0, mask_and_image) or model.patch_size[0] != 1:
        raise ValueError(
            f"this transformer takes {model.in_channels} and gives {model.out_channels} channels with patches of "
            f"{model.patch_size[0]} frames; allowed are 1-frame patches with equal channels (text to video) or "
            f"{mask_and_image} more for a mask and an image (image to video)"
        )
    if components.condition_channels and not SAMPLERS.load(config.sampler).counts_video_frames(config):
        raise ValueError(
            f"sampler {config.sampler!r} numbers frames anew, which a transformer conditioned on an image cannot "
            "follow; use 'chunkwise', 'rolling', 'memory_bank', or 'stream_batch' without restart_positions"
        )
    if components.codec is not None and geometry.latent_channels != model.out_channels:
        raise ValueError(
            f"the VAE has {geometry.latent_channels} latent channels and the transformer {model.out_channels}: they "
            "are of different models (Wan 2.1 and Wan2.2-A14B have 16, Wan2.2-TI2V-5B 48); load the VAE of this one"
        )
    sizes = (("height", config.height), ("width", config.width))
    for (name, size), multiple in zip(sizes, geometry.size_multiples, strict=True):
        if size % multiple:
            nearest = max(size // multiple, 1) * multiple
            raise ValueError(f"{name} is {size}; it must be divisible by {multiple}, such as {nearest}")
    total = components.frame_grid(config).total_frames
    if total is not None and total <= given_frames:
        raise ValueError(
            f"num_frames is {config.num_frames} ({total} latent frames) but {given_frames} latent frames are "
            "given and count in it: nothing would be generated"
        )
    if (config.highest_position or 0) > model.rope_max_seq_len:
        raise ValueError(
            f"window_frames {config.window_frames} (and cut_jump_frames) make positions up to "
            f"{config.highest_position}; the rotary table ends at {model.rope_max_seq_len}"
        )
    endless = SWITCH_POLICIES.load(config.switch_policy).has_endless_positions
    if not endless and total is not None and (config.highest_position or total) > model.rope_max_seq_len:
        longest = geometry.pixel_frames(model.rope_max_seq_len)
        raise ValueError(
            f"num_frames is {config.num_frames} ({total} latent frames); absolute positions end at "
            f"{model.rope_max_seq_len} latent frames, {longest} pixel frames. Set position_mode='relative' and "
            "window_frames to go on"
        )


def check_preview(components: WanComponents) -> None:
    """Raise `ValueError` for a preview VAE of other latents than the transformer's."""
    codec, geometry = components.preview_codec, components.geometry
    names = "latent_channels", "scale_factor_spatial", "scale_factor_temporal"
    for name in names if codec is not None else ():
        got, needed = getattr(codec, name), getattr(geometry, name)
        if got != needed:
            raise ValueError(
                f"the preview VAE has {name} {got} and the video {needed}: it is of another model; load the one of "
                "this one (taew2_1 for Wan 2.1 and Wan2.2-A14B, taew2_2 for Wan2.2-TI2V-5B)"
            )


def check_image(components: WanComponents, image: Any) -> None:
    """Raise `ValueError` unless there is an image where the transformer is conditioned on one, and what encodes it."""
    if not components.condition_channels:
        return
    config = components.transformer.config
    if image is None:
        raise ValueError(
            f"this transformer is conditioned on an image ({config.in_channels} input and {config.out_channels} "
            "output channels); pass image"
        )
    if components.codec is None:
        raise ValueError("the image has to be encoded, and this pipeline has no VAE; add it")
    if config.pos_embed_seq_len is not None:
        raise ValueError(
            "this transformer is conditioned on a first and a last frame, and a video that grows has no last one; use "
            "one for image to video"
        )
    if components.attends_to_image and components.image_encoder is None:
        raise ValueError(
            "this transformer attends to the image, and this pipeline lacks the image_encoder or the image_processor "
            "for it; load the whole folder, or add them"
        )


def check_tensors(
    components: WanComponents,
    config: RolloutConfig,
    batch_size: int,
    given_frames: int,
    latents: torch.Tensor | None,
    video_latents: torch.Tensor | None,
    generator: Generators,
) -> None:
    """Raise `ValueError` for noise, given latents or generators that do not fit the video."""
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"got {len(generator)} generators for {batch_size} videos; pass one for each, or only one")
    grid = components.frame_grid(config, given_frames)
    total = grid.total_frames
    for name, tensor, frames in (
        ("latents", latents, None if total is None else total - grid.first_generated_frame),
        ("video_latents", video_latents, given_frames),
    ):
        if tensor is None:
            continue
        geometry = components.geometry
        expected = (batch_size, geometry.latent_channels, frames, *geometry.latent_size(config.height, config.width))
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this video needs {expected}")


def check_prompts(
    components: WanComponents, config: RolloutConfig, prompts: list[Prompt], switch_frames: list[int]
) -> None:
    """Raise `ValueError` for prompts, embeddings or switch times that cannot be used, and for a missing VAE."""
    for prompt in prompts:
        check_prompt(prompt, components.transformer.config.text_dim)
    for frame in switch_frames:
        if not isinstance(frame, int) or frame < 0:
            raise ValueError(f"prompt_schedule has the key {frame!r}; keys are latent frames, 0 or more")
    if config.strength is not None and components.codec is None:
        raise ValueError("video to video needs a VAE, which this pipeline does not have")
    if config.output_type != "latent" and components.codec is None:
        raise ValueError(f"output_type is {config.output_type!r} but this pipeline has no VAE; use 'latent'")
    if SAMPLERS.load(config.sampler).needs_pixels(config) and components.codec is None:
        raise ValueError(f"sampler {config.sampler!r} needs a VAE, which this pipeline does not have")
