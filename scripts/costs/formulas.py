"""Exact costs of forwards and chunks, from the shapes alone: the yardstick for what is done. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wan_autoregressive.scripts.costs.workload import Workload

_ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StageCosts:
    """What one stage of one chunk does. Keys and values in bytes of the cache; each forward's reads count once."""

    flops: int = 0
    kv_written_bytes: int = 0
    kv_read_bytes: int = 0


def costs_per_chunk(workload: Workload, index: int) -> dict[str, StageCosts]:
    """Of the stages `denoise` and `clean_pass` of chunk `index`: its clean pass is the one of the chunk before."""
    config, tokens, window = workload.model.transformer, workload.chunk_tokens, workload.window_tokens
    text_tokens, experts = workload.rollout.max_sequence_length, workload.model.experts
    image_tokens = workload.model.image_tokens
    flops = flops_per_chunk(
        config, index, tokens, window, workload.steps, text_tokens, experts=experts, image_tokens=image_tokens
    )
    item, scale = _ITEM_SIZES[workload.dtype], 0
    if workload.rollout.kv_dtype == "int8":
        item, scale = 1, item
    written = kv_bytes_written(config, tokens, item, scale_bytes=scale)
    read = kv_bytes_read(config, attended_tokens(index, tokens, window), item, scale_bytes=scale)
    costs = {"denoise": StageCosts(flops["denoise"], workload.steps * written, workload.steps * read)}
    if index == 0:
        return costs | {"clean_pass": StageCosts()}
    read = kv_bytes_read(
        config, attended_tokens(index - 1, tokens, window), item, keys_values_only=True, scale_bytes=scale
    )
    return costs | {"clean_pass": StageCosts(flops["clean_pass"], experts * written, experts * read)}


def attended_tokens(index: int, chunk_tokens: int, window_tokens: int | None) -> int:
    """Keys that each query of chunk `index` sees, its own chunk included."""
    tokens = (index + 1) * chunk_tokens
    return tokens if window_tokens is None else min(window_tokens, tokens)


def flops_per_forward(
    config: Mapping[str, Any],
    chunk_tokens: int,
    cached_tokens: int = 0,
    text_tokens: int = 512,
    batch: int = 1,
    groups: int = 1,
    text_ready: bool = False,
    time_ready: bool = False,
    keys_values_only: bool = False,
    image_tokens: int = 0,
) -> int:
    """Floating-point operations of matrix products and attentions in one forward; a multiply-add counts as 2.

    With D = heads * head_dim, F = ffn_dim, N layers, T chunk tokens, K = T + cached tokens, L text tokens, G groups of
    the timestep, P = in_channels * patch volume, P' = out_channels * patch volume, E = text_dim, Q = freq_dim:

        patches    2 T P D
        time       2 G (Q D + D D + 6 D D)
        text       2 L (E D + D D)
        a layer    8 T D D + 4 T K D                   self-attention: q, k, v, out; scores and mix
                 + 4 T D D + 4 L D D + 4 T L D         cross-attention: q, out; k, v; scores and mix
                 + 4 T D F                             feed-forward
        head       2 T D P'

        batch * (patches + time + text + N * layer + head)

    An image of I tokens that is attended to beside the text, with J = image_dim, adds

        image      2 I (J J + J D)
        a layer    4 I D D + 4 T I D                   k, v; scores and mix

    That is what `torch.utils.flop_counter.FlopCounterMode` counts: norms, modulation, rotary embedding and activation
    are passes over memory and count nothing.

    Args:
        config: Of a `WanTransformer3DModel`.
        chunk_tokens: T, after patching.
        cached_tokens: Tokens of the past that are attended to beside the chunk.
        groups: G; 1, frames of the chunk, or tokens of the chunk.
        text_ready: Projection and cross-attention keys and values of text and image were computed before.
        time_ready: The time embedding was computed before.
        keys_values_only: The forward ends with the last layer's keys and values, as a clean pass may: that layer
            costs 4 T D D, and there is no head.
        image_tokens: I, 0 for a transformer that attends to no image.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    ffn_dim, layers = config["ffn_dim"], config["num_layers"]
    patch_volume = math.prod(config["patch_size"])
    tokens, keys, text = chunk_tokens, chunk_tokens + cached_tokens, text_tokens

    patches = 2 * tokens * config["in_channels"] * patch_volume * dim
    time = 0 if time_ready else 2 * groups * (config["freq_dim"] * dim + 7 * dim * dim)
    projections = 2 * text * (config["text_dim"] * dim + dim * dim)
    if image_tokens:
        projections += 2 * image_tokens * (config["image_dim"] ** 2 + config["image_dim"] * dim)
    projections = 0 if text_ready else projections
    self_attention = 8 * tokens * dim * dim + 4 * tokens * keys * dim
    cross_attention = 4 * tokens * dim * dim + 4 * tokens * (text + image_tokens) * dim
    cross_keys_values = 0 if text_ready else 4 * (text + image_tokens) * dim * dim
    layer = self_attention + cross_attention + cross_keys_values + 4 * tokens * dim * ffn_dim
    head = 2 * tokens * dim * (config["out_channels"] or config["in_channels"]) * patch_volume
    tail = 4 * tokens * dim * dim - layer if keys_values_only else head
    return batch * (patches + time + projections + layers * layer + tail)


def flops_per_chunk(
    config: Mapping[str, Any],
    index: int,
    chunk_tokens: int,
    window_tokens: int | None,
    steps: int,
    text_tokens: int = 512,
    batch: int = 1,
    experts: int = 1,
    image_tokens: int = 0,
) -> dict[str, int]:
    """Floating-point operations of chunk `index` of a rollout, by stage.

    With S steps, K(k) = min(window, (k + 1) T) tokens attended to by chunk k, and `forward` as above with text and
    time ready:

        denoise(k)     S forward(T, K(k) - T);                           for k = 0 also text, cross k, v, and S time
        clean_pass(k)  forward(T, K(k - 1) - T) up to its last k, v;     for k = 1 also time; none for k = 0

    Two transformers that share the steps have a text and a clean pass each. An image that is attended to counts with
    the text.

    Nothing else is ever computed: text and its keys and values come once per prompt, time once per timestep, and the
    last chunk has no clean pass, since the one of chunk k runs as part of chunk k + 1.

    Args:
        window_tokens: Tokens held at most, the chunk included; `None` for all.
        steps: S, each at a timestep of its own, none of them the clean pass's.
    """

    def forward(k: int, **ready: bool) -> int:
        cached = attended_tokens(k, chunk_tokens, window_tokens) - chunk_tokens
        return flops_per_forward(config, chunk_tokens, cached, text_tokens, batch, image_tokens=image_tokens, **ready)

    denoise = steps * forward(index, text_ready=True, time_ready=True)
    if index == 0:
        text = forward(0, time_ready=True) - forward(0, text_ready=True, time_ready=True)
        time = forward(0, text_ready=True) - forward(0, text_ready=True, time_ready=True)
        return {"denoise": denoise + experts * text + steps * time, "clean_pass": 0}
    clean_pass = forward(index - 1, text_ready=True, time_ready=index > 1, keys_values_only=True)
    return {"denoise": denoise, "clean_pass": experts * clean_pass}


def kv_bytes_written(
    config: Mapping[str, Any], chunk_tokens: int, itemsize: int, batch: int = 1, scale_bytes: int = 0
) -> int:
    """Bytes of keys and values that one forward writes to the cache, over all layers.

    Args:
        itemsize: Bytes of a number in the cache; 1 for int8.
        scale_bytes: Of the scale of a token and head, which int8 has in the model's dtype.
    """
    return config["num_layers"] * batch * chunk_tokens * _kv_bytes_per_token(config, itemsize, scale_bytes)


def kv_bytes_read(
    config: Mapping[str, Any],
    attended_tokens: int,
    itemsize: int,
    batch: int = 1,
    keys_values_only: bool = False,
    scale_bytes: int = 0,
) -> int:
    """Bytes of keys and values that one forward's self-attentions read, each counted once, its own chunk included."""
    layers = config["num_layers"] - keys_values_only
    return layers * batch * attended_tokens * _kv_bytes_per_token(config, itemsize, scale_bytes)


def _kv_bytes_per_token(config: Mapping[str, Any], itemsize: int, scale_bytes: int) -> int:
    """Of one layer's key and value together."""
    return 2 * config["num_attention_heads"] * (config["attention_head_dim"] * itemsize + scale_bytes)
