"""What a rollout will take, known before anything runs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.streaming_vae import vae_state_bytes
from wan_autoregressive.pipelines.input_checks import check_sizes

if TYPE_CHECKING:
    from wan_autoregressive.pipelines.pipeline_wan_autoregressive import WanAutoregressivePipeline


@dataclass(frozen=True)
class RolloutPlan:
    """Chunks and latent frames (given ones included), transformer forwards, and bytes that are held between steps.

    A video without end has no counts; without a window its cache grows and `kv_cache_bytes` is `None` as well.
    `text_kv_bytes` are the cross-attention keys and values of a prompt of `max_sequence_length` tokens, and with
    guidance of the negative one, in the model's dtype.
    """

    chunks: int | None
    latent_frames: int | None
    forwards: int | None
    kv_cache_bytes: int | None
    text_kv_bytes: int
    vae_state_bytes: int | None


def plan_rollout(
    pipe: "WanAutoregressivePipeline", config: RolloutConfig, given_frames: int, batch_size: int
) -> RolloutPlan:
    """Count without running anything. Raises `ValueError` as the rollout itself would."""
    check_sizes(pipe, config, given_frames)
    first_steps, steps = (
        config.num_source_steps(scheduler.num_inference_steps) for scheduler in pipe.chunk_schedulers(config)
    )
    branches = 2 if config.do_classifier_free_guidance else 1
    grid = pipe.frame_grid(config, given_frames)
    chunks = forwards = cache_bytes = vae_bytes = None
    if grid.total_frames is not None:
        blocks = list(grid)
        chunks = len(blocks)
        generated = sum(not block.given for block in blocks)
        clean_passes = generated - 1 if config.clean_pass else 0
        forwards = branches * (chunks - generated + (generated - 1) * steps + first_steps + clean_passes)
    cached_frames = config.window_frames or grid.total_frames
    if cached_frames is not None:
        tokens = cached_frames * pipe.tokens_per_frame(config)
        cache = pipe.new_kv_cache(config, grid.total_frames)
        cache_bytes = branches * pipe.transformer.kv_cache_bytes(tokens, batch_size, cache)
    # As many numbers per token as the self-attention has.
    text_bytes = branches * pipe.transformer.kv_cache_bytes(config.max_sequence_length, batch_size)
    if pipe.vae is not None:
        vae_bytes = vae_state_bytes(pipe.vae, batch_size, config.height, config.width, pipe.vae.dtype)
    return RolloutPlan(chunks, grid.total_frames, forwards, cache_bytes, text_bytes, vae_bytes)
