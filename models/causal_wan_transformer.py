"""Wan's transformer with a KV cache, a frame offset and per-frame timesteps, as a subclass of diffusers' own.

Only what must differ is written again here; parameters, loading, LoRA, offload and attention backends are upstream's.
Without a cache the output is bitwise equal to upstream's (`tests/integration/test_causal_wan_transformer.py`).
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks the base class up in this module
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.utils import apply_lora_scale

from wan_autoregressive.cache import LaneBlock, LaneCaches, WanKVBlockCache, WanKVCache
from wan_autoregressive.cache.dynamic_dims import mark_dynamic
from wan_autoregressive.cache.positions import FramePositions
from wan_autoregressive.cache.rotary import RotaryEmbedding
from wan_autoregressive.models.causal_wan_block import (
    CausalWanAttnProcessor,
    CausalWanCrossAttnProcessor,
    CausalWanTransformerBlock,
    modulate,
)
from wan_autoregressive.models.causal_wan_embeddings import (
    CausalWanRotaryPosEmbed,
    CausalWanTimesteps,
    CausalWanTimeTextImageEmbedding,
)
from wan_autoregressive.models.conditions import ConditionMemory, TimeConditions
from wan_autoregressive.models.forward_plan import ForwardPlan, PastFrames
from wan_autoregressive.models.in_place_layers import InPlaceGELU, InPlaceRMSNorm
from wan_autoregressive.models.sequence_parallel import SequenceParallel


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """`WanTransformer3DModel` that generates a video chunk by chunk; loads the same checkpoints."""

    _no_split_modules = ["CausalWanTransformerBlock"]  # noqa: RUF012 - read by diffusers under these names
    _repeated_blocks = ["CausalWanTransformerBlock"]  # noqa: RUF012
    # Offload hooks must neither copy nor move the cache.
    _skip_keys = ["kv_cache", "attention_kwargs"]  # noqa: RUF012
    _cp_plan = None  # upstream's would split tokens behind the cache, see `enable_parallelism`

    parallel: SequenceParallel | None = None
    """What this rank does of every forward; `None` without others."""

    # diffusers reads the config's keys off this signature.
    @functools.wraps(WanTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _make_causal(self)

    @classmethod
    def from_wan(cls, transformer: WanTransformer3DModel) -> "CausalWanTransformer3DModel":
        """Turn a loaded `WanTransformer3DModel` into a causal one in place: no parameter, LoRA or hook is touched."""
        transformer.__class__ = cls
        _make_causal(transformer)
        return transformer

    def set_sinusoid_dtype(self, dtype: torch.dtype) -> None:
        """Precision of the sinusoidal timestep embedding: float32 as diffusers (default), float64 as the original."""
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the sinusoid can be torch.float32 or torch.float64, got {dtype}")
        self.condition_embedder.timesteps_proj.sinusoid_dtype = dtype

    def set_sequence_parallel(self, group: dist.ProcessGroup | None) -> None:
        """Share every forward among the ranks of `group`, all of which make it with the same inputs (Ulysses); `None`
        ends it. A rank's caches then hold its own heads only: a cache serves under one setting from its first chunk to
        its last.

        The flow that every rank gets is that of a single process but for the last bits, and the same on all ranks.

        Raises:
            ValueError: fewer heads than ranks, or this process is not in the group.
        """
        self.parallel = None if group is None else SequenceParallel(group, self.config.num_attention_heads)
        for block in self.blocks:
            block.attn1.processor.parallel = self.parallel

    def enable_parallelism(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for this model. Raises `ValueError`."""
        raise ValueError(
            "enable_parallelism would exchange keys and values behind the KV cache, which then holds some tokens of "
            "all heads: wrong for a sink that is no whole chunk. Call set_sequence_parallel(group), which exchanges "
            "before the cache"
        )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        frame_offset: int = 0,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the flow of one chunk.

        Args:
            hidden_states: `(batch, channels, frames, height, width)`. Noisy latents, and behind them those of a
                condition where the model has more input than output channels.
            timestep: `(batch,)`, or `(batch, n)` with n = 1, one per frame, or one per token (counted after patching).
            encoder_hidden_states: `(batch, text_tokens, text_dim)`. Prompt embeddings. Zero padding is attended to, as
                in Wan.
            encoder_hidden_states_image: `(batch, image_tokens, image_dim)`. Of the image, for a model that attends to
                one. Without a plan there must be 512 text tokens, as upstream.
            attention_kwargs: `kv_cache` is the [`WanKVCache`] to attend through and to write, in its current mode;
                `plan` a [`ForwardPlan`] that [`plan_forward`] made for that cache; `scale` the LoRA scale.
            frame_offset: Position of the chunk's first frame in the video, in latent frames after patching. A cache
                with relative positions makes its own, and a plan has it.

        Returns:
            [`~models.modeling_outputs.Transformer2DModelOutput`] or a tuple with the flow, shaped as `hidden_states`;
            with `None` after a plan with `keys_values_only` or `reads_text_only`.

        Raises:
            ValueError: a timestep of another shape, a position past the rotary table, a chunk that the cache refuses,
                or a cache together with diffusers' block-skipping caches.
        """
        attention_kwargs = attention_kwargs or {}
        kv_cache: WanKVCache | None = attention_kwargs.get("kv_cache")
        plan: ForwardPlan | None = attention_kwargs.get("plan")
        is_own_plan = plan is None
        if plan is None:
            plan = self.plan_forward(hidden_states, kv_cache, frame_offset)
        batch_size, _, num_frames, height, width = hidden_states.shape
        p_t, p_h, p_w = self.config.patch_size
        frames, rows, columns = num_frames // p_t, height // p_h, width // p_w  # after patching
        timestep = self._grouped_timestep(timestep, batch_size, frames, frames * rows * columns)

        # 1. Patches
        hidden_states = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()

        # 2. Conditions: temb (batch, groups, dim), modulation (batch, groups, 6, dim), text where it is not known yet
        time, text = plan.time or TimeConditions(), plan.text
        needs_text = text is None or (text.projected is None and not text.is_complete)
        temb, modulation, embedded_text = self.condition_embedder(
            timestep if time.modulation is None else None,
            encoder_hidden_states if needs_text else None,
            encoder_hidden_states_image,
            hidden_states.dtype,
        )
        if modulation is not None:
            time.temb, time.modulation = temb, modulation
        if text is not None:
            text.projected = embedded_text = embedded_text if needs_text else text.projected
        num_tokens, temb, modulation, parallel = hidden_states.shape[1], time.temb, time.modulation, self.parallel
        if parallel is not None:
            assert temb is not None
            assert modulation is not None
            hidden_states = parallel.shard(hidden_states)
            temb, modulation = (parallel.shard_groups(x, num_tokens) for x in (temb, modulation))

        # 3. Blocks, each with its own part of the cache
        block_texts = [None] * len(self.blocks) if text is None else text.blocks
        dynamic = (0, 1) if len(plan.rotary_emb[0]) > 1 else (1,)  # tokens or groups, and rows where they are lanes
        for dim in dynamic:
            mark_dynamic(modulation, dim=dim)
        for block, block_cache, block_text in zip(self.blocks, plan.block_caches, block_texts, strict=True):
            is_end = plan.keys_values_only and block is self.blocks[-1]
            needs_text = block_text is not None and not block_text.is_filled and not is_end
            if needs_text and (plan.reads_text_only or _reads_text_apart(block)):
                block(None, embedded_text, text=block_text)
            if plan.reads_text_only:
                continue
            for dim in dynamic:
                mark_dynamic(hidden_states, dim=dim)
            inputs: tuple[Any, ...] = (hidden_states, embedded_text, modulation, plan.rotary_emb)
            inputs += (block_cache, plan.key_rotary_emb, block_text, is_end)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden_states = block(*inputs)
        if text is not None and text.is_complete:
            text.projected = None
        if is_own_plan and kv_cache is not None:
            kv_cache.end_forward()
        if plan.keys_values_only or plan.reads_text_only:
            return Transformer2DModelOutput(sample=None) if return_dict else (None,)

        # 4. Output norm, projection and unpatchify
        assert temb is not None
        table = self.scale_shift_table.unsqueeze(0).to(temb.device)
        shift, scale = (table + temb.unsqueeze(2)).unbind(dim=2)
        shift, scale = shift.to(hidden_states.device), scale.to(hidden_states.device)
        hidden_states = modulate(self.norm_out(hidden_states.float()), scale, shift).type_as(hidden_states)
        hidden_states = self.proj_out(hidden_states)
        if parallel is not None:
            hidden_states = parallel.gather(hidden_states, num_tokens)
        hidden_states = hidden_states.reshape(batch_size, frames, rows, columns, p_t, p_h, p_w, -1)
        hidden_states = hidden_states.permute(0, 7, 1, 4, 2, 5, 3, 6)
        sample = hidden_states.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # (batch, channels, frames, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def plan_forward(
        self,
        hidden_states: torch.Tensor,
        kv_cache: WanKVCache | LaneCaches | None = None,
        frame_offset: int | Sequence[int] = 0,
        keys_values_only: bool = False,
        memory: ConditionMemory | None = None,
        timestep: Hashable = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_image: torch.Tensor | None = None,
        keep_frames: int | None = None,
        view: PastFrames | None = None,
    ) -> ForwardPlan:
        """Settle positions and cache slots of the next forward, and look up what earlier ones have computed.

        A forward with a cache and no plan makes its own. A caller that makes it calls `kv_cache.end_forward()` once
        the forward has succeeded; a compiled forward then holds tensors only.

        Args:
            hidden_states: The forward's, for its shape and device.
            kv_cache, frame_offset: Of [`LaneCaches`] one offset for each lane that is used.
            keys_values_only: End with the last block's keys and values in the cache; there is no flow then.
            memory: Of the video, with `timestep` (one for the whole chunk, or a tuple with one per frame) and the
                encoder's hidden states as they will be passed to the forward.
            keep_frames: Frames of the chunk, from the first on, that the cache holds afterwards; all by default. With
                0 the cache is left as it is.
            view: What the chunk sees of the past; all that is held by default.

        Raises:
            ValueError: a position past the rotary table, a chunk that the cache refuses, a cache of another model or
                together with diffusers' block-skipping caches, or `keys_values_only` without a cache.
        """
        if keys_values_only and kv_cache is None:
            raise ValueError("keys_values_only without a kv_cache leaves nothing to compute")
        frames, height, width = (n // p for n, p in zip(hidden_states.shape[2:], self.config.patch_size, strict=True))
        heads, head_dim = self.config.num_attention_heads, self.config.attention_head_dim
        like = hidden_states.new_empty(hidden_states.shape[0], 0, heads, head_dim)
        block_caches: Sequence[WanKVBlockCache | LaneBlock | None] = [None] * len(self.blocks)
        positions = [FramePositions(frame_offset)] if isinstance(frame_offset, int) else []
        if kv_cache is not None:
            self._check_kv_cache(kv_cache)
            size = height * width
            keep = None if keep_frames is None else keep_frames * size
            past = None if view is None else view.in_tokens(size)
            block_caches = kv_cache.begin_forward(frames * size, self.of_own_heads(like), keep, past)
            geometry = frames, size, self.rope.max_seq_len, self.rope.rotation
            if isinstance(kv_cache, LaneCaches):
                assert not isinstance(frame_offset, int)
                positions = kv_cache.plan_positions(frame_offset, *geometry)
            else:
                assert isinstance(frame_offset, int)
                positions = [kv_cache.plan_positions(frame_offset, *geometry)]

        def tables(name: Hashable, runs: Sequence[Sequence[tuple[float, float]]]) -> RotaryEmbedding:
            """Of every lane's runs of positions; of one lane the same for the whole batch."""

            def make() -> RotaryEmbedding:
                each = zip(*(self.rope.at(of_lane, height, width) for of_lane in runs), strict=True)
                cos, sin = (torch.cat(of_lanes).to(hidden_states.device) for of_lanes in each)
                repeats = 1 if len(runs) == 1 else len(hidden_states) // len(runs)
                return cos.repeat_interleave(repeats, dim=0), sin.repeat_interleave(repeats, dim=0)

            made_for = tuple(map(tuple, runs)), len(hidden_states), height, width, hidden_states.device
            made = make() if memory is None else memory.rotary(name, made_for, make)
            mark_dynamic(*made)
            if len(runs) > 1:
                mark_dynamic(*made, dim=0)
            return made

        lanes = len(positions)
        rotary_emb = tables(("chunk", frames, lanes), [[(at.start, at.start + frames)] for at in positions])
        plan = ForwardPlan(block_caches, rotary_emb, keys_values_only=keys_values_only)
        keys = [at.keys for at in positions if at.keys is not None]
        if keys:
            plan.key_rotary_emb = tables(("cached", lanes), keys)
        if memory is not None and timestep is not None:
            plan.time = memory.time(timestep)
        if memory is not None and encoder_hidden_states is not None:
            plan.text = memory.text(encoder_hidden_states, len(self.blocks), like, encoder_hidden_states_image)
        return plan

    def of_own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """What a cache of this rank holds of `(batch, tokens, heads, head_dim)`: all heads, or those that other ranks
        do not have."""
        return x if self.parallel is None else self.parallel.of_own_heads(x)

    def kv_cache_bytes(self, num_tokens: int, batch_size: int = 1, kv_cache: WanKVCache | None = None) -> int:
        """Bytes that keys and values of `num_tokens` tokens take over all blocks, of several ranks on this one.

        Args:
            kv_cache: Those that this cache will take; one with a window holds that.
        """
        kv_cache = kv_cache or WanKVCache(num_blocks=self.config.num_layers)
        heads = self.config.num_attention_heads if self.parallel is None else self.parallel.own_heads
        return kv_cache.expected_bytes(batch_size, heads, self.config.attention_head_dim, self.dtype, num_tokens)

    def _check_kv_cache(self, kv_cache: WanKVCache | LaneCaches) -> None:
        if kv_cache.num_blocks != len(self.blocks):
            raise ValueError(f"the cache has {kv_cache.num_blocks} blocks but this model has {len(self.blocks)}")
        if self.is_cache_enabled:
            raise ValueError(
                f"{type(self._cache_config).__name__} skips blocks, which would leave their keys and values stale; "
                "call disable_cache() before using a KV cache"
            )

    @staticmethod
    def _grouped_timestep(timestep: torch.Tensor, batch_size: int, frames: int, tokens: int) -> torch.Tensor:
        """`(batch, groups)` from any accepted shape."""
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1)
        if timestep.ndim != 2 or timestep.shape[0] != batch_size or timestep.shape[1] not in (1, frames, tokens):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; allowed are ({batch_size},), ({batch_size}, 1), "
                f"({batch_size}, {frames}) per frame and ({batch_size}, {tokens}) per token"
            )
        return timestep


def _reads_text_apart(block: torch.nn.Module) -> bool:
    """Whether a prompt is read by a call of its own. A compiled block needs no second graph of every kind for it then;
    hooks of offloading reckon with one call for each forward."""
    return block._compiled_call_impl is not None and not hasattr(block, "_diffusers_hook")


def _make_causal(model: WanTransformer3DModel) -> None:
    if model._parallel_config is not None:
        raise ValueError(
            "a transformer with enable_parallelism splits tokens behind the KV cache; load it without, and call "
            "set_sequence_parallel(group)"
        )
    model.rope.__class__ = CausalWanRotaryPosEmbed
    model.condition_embedder.__class__ = CausalWanTimeTextImageEmbedding
    model.condition_embedder.timesteps_proj.__class__ = CausalWanTimesteps
    for block in model.blocks:
        block.__class__ = CausalWanTransformerBlock
        block.ffn.net[0].__class__ = InPlaceGELU
        for norm in (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q, block.attn2.norm_k):
            norm.__class__ = InPlaceRMSNorm
        for attention, processor in (
            (block.attn1, CausalWanAttnProcessor()),
            (block.attn2, CausalWanCrossAttnProcessor()),
        ):
            processor._attention_backend = attention.processor._attention_backend
            attention.set_processor(processor)
