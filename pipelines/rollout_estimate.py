"""What a rollout will take, known before anything runs."""

from dataclasses import dataclass

from wan_autoregressive.configs.registry import SAMPLERS
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.image_condition import blank_image_condition
from wan_autoregressive.pipelines.input_checks import check_experts, check_extensions, check_sizes


@dataclass(frozen=True)
class RolloutEstimate:
    """Chunks and latent frames (given ones included), transformer forwards, and bytes that are held between steps.

    A video without end has no counts; without a window its cache grows and `kv_cache_bytes` is `None` as well.
    `text_kv_bytes` are the cross-attention keys and values of a prompt of `max_sequence_length` tokens, and with
    guidance of the negative one, and of an image that is attended to, in the model's dtype. Keys and values are those
    of all transformers together. `image_condition_bytes` are those of what a transformer is conditioned on beside the
    prompt, at most; 0 for one that sees no image.
    """

    chunks: int | None
    latent_frames: int | None
    forwards: int | None
    kv_cache_bytes: int | None
    text_kv_bytes: int
    image_condition_bytes: int
    vae_state_bytes: int | None


def estimate_rollout(
    components: WanComponents, config: RolloutConfig, given_frames: int, batch_size: int
) -> RolloutEstimate:
    """Count without running anything. Raises `ValueError` as the rollout itself would."""
    check_extensions(config)
    check_experts(components, config)
    check_sizes(components, config, given_frames)
    sampler = SAMPLERS.load(config.sampler)
    first, later = (sampler.num_steps(config, own.num_inference_steps) for own in components.schedulers(config))
    grid = components.frame_grid(config, given_frames)
    transformer, codec, experts = components.transformer, components.codec, len(components.transformers)
    chunks = forwards = cache_bytes = vae_bytes = None
    if grid.total_frames is not None:
        chunks = grid.num_given_chunks + grid.num_generated_chunks
        forwards = sampler.num_forwards(config, grid, (first, later), experts)
    cached_frames = config.window_frames or grid.total_frames
    if cached_frames is not None:
        tokens = cached_frames * components.tokens_per_frame(config)
        cache = components.new_kv_cache(config, grid.total_frames)
        caches = experts * config.num_branches * sampler.num_caches(config, later)
        cache_bytes = caches * transformer.kv_cache_bytes(tokens, batch_size, cache)
    # As many numbers per token as the self-attention has. An image's are the same under both prompts.
    text_bytes = experts * config.num_branches * transformer.kv_cache_bytes(config.max_sequence_length, batch_size)
    if components.attends_to_image and components.image_encoder is not None:
        text_bytes += experts * transformer.kv_cache_bytes(components.image_encoder.num_tokens, batch_size)
    image = blank_image_condition(components, config, batch_size, "meta")
    if codec is not None:
        vae_bytes = codec.state_bytes(batch_size, config.height, config.width)
    return RolloutEstimate(
        chunks=chunks,
        latent_frames=grid.total_frames,
        forwards=forwards,
        kv_cache_bytes=cache_bytes,
        text_kv_bytes=text_bytes,
        image_condition_bytes=0 if image is None else image.nbytes,
        vae_state_bytes=vae_bytes,
    )
