"""The rolling KV cache of a causal Wan transformer: one object per video (two with guidance)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from wan_autoregressive.cache.block_cache import WanKVBlockCache
from wan_autoregressive.cache.memory_bank import MemoryBank
from wan_autoregressive.cache.positions import POSITION_POLICIES, FramePositions, PlannedFrames, PositionPolicy
from wan_autoregressive.cache.rotary import RotaryEmbedding
from wan_autoregressive.cache.sink_update import SinkUpdate
from wan_autoregressive.cache.static_buffers import StaticBuffers
from wan_autoregressive.cache.token_window import PastView, WriteMode
from wan_autoregressive.configs.choices import KV_DTYPES, KVDtype, PositionMode


class WanKVCache:
    """Self-attention keys and values of the chunks generated so far.

    The contract is that of the rolling cache proposed for diffusers (pull request 13681): the first forward of a
    chunk runs in append mode, every later one (further denoising steps, the clean pass) in overwrite mode.

    ```python
    cache = WanKVCache(num_blocks=len(transformer.blocks), window_size=12 * tokens_per_frame)
    for index, chunk in enumerate(chunks):
        for step, timestep in enumerate(timesteps):
            cache.enable_append_mode() if step == 0 else cache.enable_overwrite_mode()
            transformer(chunk, timestep, prompt_embeds, frame_offset=3 * index, attention_kwargs={"kv_cache": cache})
    cache.reset()  # between videos
    ```

    Eviction happens when a chunk is appended, before its attention: with `n` new tokens the oldest
    `max(0, length + n - window_size)` tokens behind the sink go. So every forward of a chunk sees the same window,
    as in Self-Forcing (`pipeline/causal_inference.py`) and LongLive. Sizes are tokens; a multiple of the tokens per
    frame makes eviction frame-exact.

    Args:
        num_blocks: Transformer blocks.
        window_size: Tokens held per block at most, sink and newest chunk included; -1 keeps the whole prefix.
        sink_size: First tokens of the video that are never evicted (LongLive's frame sink).
        max_tokens: Without a window, the tokens to allocate at once if the length of the video is known; otherwise
            buffers double when full. With a window it must not be given.
        position_mode: What the position of a cached frame is. Until the first eviction all modes are the same;
            afterwards the two relative ones give the same attention, without end. `absolute`: its number in the video,
            up to the end of the rotary table. `relative`: its place in the window; keys are kept without rotary
            embedding and rotated at every use (Infinity-RoPE, Reward-Forcing). `sink_relative`: as absolute, but the
            sink is moved up to the window, once per chunk, and all positions start again from the beginning of the
            table when they reach its end; nearly free.
        sink_update: How the sink takes up what is evicted, e.g. a [`MovingAverageSink`]. Needs
            `position_mode="relative"`, since averages of rotated keys mean nothing.
        kv_dtype: `"int8"` keeps keys and values as int8 with a scale per token and head, instead of in the dtype of
            the model.
        bank_frames: Frames at most in the memory bank of every block, which all forwards see beside what is held, see
            [`MemoryBank`]. Needs `position_mode="absolute"`, under which a key keeps the position that it was written
            with.
        bank_frame_size: Tokens of one of them.

    With int8 the peak is `2 * batch * window * heads * (head_dim + itemsize)` bytes for every block, its values and
    scales (`itemsize` of the model's dtype), and `2 * batch * window * heads * head_dim * itemsize` for the one block
    that is attending, its keys and values in the model's dtype. What else a forward allocates is as without int8, such
    as the rotated keys of `relative`. Attention sees the newest chunk as it was computed and the past within half a
    scale, `max |x| / 254` of each token and head. A token is rounded when it is written and never again, but for keys
    under `sink_relative`: a sink's are rounded once more when they move, always from how they were written, and the
    window's when positions start again, which meets a key at most once if the window is shorter than half the table.
    A sink cannot be updated: 0.001 of a frame is less than the rounding.

    Raises:
        ValueError: sizes that cannot work together, a chunk that does not fit, an overwrite without a chunk of the
            same size, a batch, head or dtype that changes. Always before anything is written.
    """

    def __init__(
        self,
        num_blocks: int,
        window_size: int = -1,
        sink_size: int = 0,
        max_tokens: int | None = None,
        position_mode: PositionMode = "absolute",
        sink_update: SinkUpdate | None = None,
        kv_dtype: KVDtype | None = None,
        bank_frames: int = 0,
        bank_frame_size: int = 0,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a cache needs at least 1 block")
        if max_tokens is not None and (window_size != -1 or max_tokens < 1):
            raise ValueError(
                f"max_tokens is {max_tokens} with window_size {window_size}; it must be at least 1 and is only for "
                "a cache without a window"
            )
        if position_mode not in POSITION_POLICIES:
            raise ValueError(f"position_mode is {position_mode!r}; allowed are {', '.join(POSITION_POLICIES)}")
        if sink_update is not None and not (position_mode == "relative" and sink_size):
            raise ValueError(
                f"a sink_update needs a sink and position_mode 'relative'; got sink_size {sink_size} and "
                f"{position_mode!r}"
            )
        if kv_dtype is not None and kv_dtype not in KV_DTYPES:
            raise ValueError(
                f"kv_dtype is {kv_dtype!r}; allowed are None (the dtype of the model) and {', '.join(KV_DTYPES)}"
            )
        if kv_dtype is not None and sink_update is not None:
            raise ValueError(
                f"a sink_update changes the sink by less than the rounding of kv_dtype {kv_dtype!r}; leave out one of "
                "them"
            )
        if bank_frames and position_mode != "absolute":
            raise ValueError(
                f"a memory bank keeps keys at the positions that they were written with; it needs position_mode "
                f"'absolute', got {position_mode!r}"
            )
        self.slots = StaticBuffers()
        """The numbers of the newest chunk's slots, for each size of a chunk."""
        self.block_caches = [
            WanKVBlockCache(
                *(window_size, sink_size, max_tokens, sink_update, kv_dtype, self.slots),
                bank=MemoryBank(bank_frames, bank_frame_size),
            )
            for _ in range(num_blocks)
        ]
        self.position_mode = position_mode
        self.positions: PositionPolicy = POSITION_POLICIES[position_mode]()
        self.window_size = window_size
        self.sink_size = sink_size
        self.max_tokens = max_tokens
        self._mode: WriteMode = "append"

    # The mode of the forwards to come.

    def enable_append_mode(self) -> None:
        """The next forward adds a chunk; once the window is full the oldest tokens behind the sink are evicted."""
        self._mode = "append"

    def enable_overwrite_mode(self) -> None:
        """The next forward replaces the newest chunk in place. It must have as many tokens."""
        self._mode = "overwrite"

    def enable_rewrite_mode(self, keep_sink: bool = True) -> None:
        """The next forward replaces everything held with its own tokens, in one pass; the sink stays if `keep_sink`.

        For rebuilding the past under another prompt (LongLive's re-cache).
        """
        self._mode = "rewrite" if keep_sink else "rewrite_all"

    @property
    def overwrite_newest(self) -> bool:
        """Whether the next forward overwrites the newest chunk."""
        return self._mode == "overwrite"

    # One block at a time, for a caller with an attention of its own.

    def update(self, block_idx: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge the current chunk of one block and return the keys and values to attend over.

        Args:
            block_idx: The block, 0 to `num_blocks - 1`.
            key, value: `(batch, chunk_tokens, heads, head_dim)`. Key after normalisation and rotary embedding.

        Returns:
            `(batch, valid_tokens, heads, head_dim)`, views into the buffers that are valid until the next update; with
            int8 copies.
        """
        if not 0 <= block_idx < len(self.block_caches):
            raise ValueError(f"block_idx is {block_idx}; this cache has blocks 0 to {len(self.block_caches) - 1}")
        block = self.block_caches[block_idx]
        block.plan(key.shape[1], self._mode)
        attended = block.write(key, value)
        block.commit()
        return attended

    # All blocks of one forward: integers before and after, tensors in between.

    def begin_forward(
        self,
        num_tokens: int,
        like: torch.Tensor | None = None,
        keep: int | None = None,
        view: PastView | None = None,
    ) -> list[WanKVBlockCache]:
        """Plan the write of a chunk in every block; the blocks then call `write`. Forgets nothing that is held.

        Args:
            like: Of any length, `(batch, tokens, heads, head_dim)`, as keys will be. With it the blocks make room now,
                so that `write` does nothing but write.
            keep: Tokens of the chunk, from the first on, that are held afterwards; all by default. With 0 the cache is
                left as it is.
            view: What the chunk sees of the past; all that is held by default.
        """
        for block in self.block_caches:
            block.plan(num_tokens, self._mode, keep, view)
        slots = None
        if like is not None:
            for block in self.block_caches:
                slots = block.open(like, slots)
        return self.block_caches

    def end_forward(self) -> None:
        """Commit what `begin_forward` planned, once every block has written."""
        if self.block_caches[0].planned_kept:
            self.positions.commit(self._begins_chunk)
        for block in self.block_caches:
            block.commit()

    def plan_positions(
        self,
        start_frame: int,
        num_frames: int,
        tokens_per_frame: int,
        max_positions: int,
        rotation: Callable[[float], RotaryEmbedding],
    ) -> FramePositions:
        """After `begin_forward`: rotary positions of the chunk, having moved the keys that have to move for them.

        Args:
            start_frame, num_frames: The chunk, in frames of the video.
            max_positions: Rows of the rotary table.
            rotation: cos and sin of a rotation by some frames, negative ones too.

        Raises:
            ValueError: relative positions with a window, sink or chunk that is not a whole number of frames.
        """
        replaces_sink = self._mode == "rewrite_all"
        block = self.block_caches[0]
        planned = PlannedFrames(
            start=start_frame,
            num_frames=num_frames,
            places=block.planned_places,
            tokens_per_frame=tokens_per_frame,
            begins_chunk=self._begins_chunk,
            replaces_sink=replaces_sink,
            max_positions=max_positions,
            num_held=block.planned_held // tokens_per_frame,
            sink=block.planned_sink,
        )
        positions = self.positions.plan(planned)
        window_rotation = rotation(positions.window_shift) if positions.window_shift else None
        moves_sink = positions.sink_shift is not None and self.sink_size
        sink_rotation = rotation(positions.sink_shift or 0) if moves_sink else None
        for block in self.block_caches:
            if replaces_sink:
                block.forget_sink()
            if window_rotation is not None:
                block.move_window(window_rotation)
            if sink_rotation is not None:
                block.move_sink(sink_rotation)
        return positions

    def pin_newest(self, name: str, num_tokens: int) -> None:
        """Protect the first `num_tokens` of the newest chunk from eviction as the sink is (LongLive 2.0's shot sink),
        in the place of what was pinned under `name`. They go when everything but the sink goes.

        Raises:
            ValueError: the newest chunk has fewer tokens, or a position mode that would move the sink up and leave
                them behind.
        """
        if self.position_mode == "sink_relative":
            raise ValueError("position_mode 'sink_relative' moves only the sink; pin under 'absolute' or 'relative'")
        for block in self.block_caches:
            block.window.pin(name, num_tokens)

    def unpin(self, name: str) -> None:
        """Let what was pinned under `name` be evicted like any other token. Raises `KeyError` for an unknown name."""
        for block in self.block_caches:
            block.window.unpin(name)

    def propose_to_bank(self) -> None:
        """Let the first frame of the newest chunk be the next to enter the memory bank."""
        for block in self.block_caches:
            block.propose_to_bank()

    def add_to_bank(
        self,
        length: int,
        text_keys: Sequence[torch.Tensor] | None = None,
        total: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Let the proposed frame into the memory bank, which then holds `length` frames if it can.

        Args:
            text_keys: Of each block's cross-attention, `(batch, text_tokens, heads, head_dim)`; a full bank keeps the
                frames that have most to do with them.
            total: Adds up what several ranks with some of the heads each found, see [`MemoryBank.add`].
        """
        keys: Sequence[torch.Tensor | None] = [None] * self.num_blocks if text_keys is None else text_keys
        for block, text_key in zip(self.block_caches, keys, strict=True):
            block.bank.add(length, text_key, total)

    def keep_newest(self, num_tokens: int) -> None:
        """Forget all but the sink and the newest `num_tokens` tokens (Infinity-RoPE's flush at a prompt switch).

        If the whole newest chunk is among them, it can still be overwritten.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens is {num_tokens}; it must be 0 or more")
        for block in self.block_caches:
            block.keep_newest(num_tokens)

    def reset(self) -> None:
        """Clear all blocks between videos: no tokens, append mode. Buffers are kept for reuse."""
        for block in self.block_caches:
            block.reset()
        self._start_anew()

    def release(self) -> None:
        """Clear all blocks and free their memory."""
        for block in self.block_caches:
            block.release()
        self.slots.clear()
        self._start_anew()

    def state_dict(self) -> dict[str, Any]:
        """The state between two forwards: plain values, and views of the blocks' tensors."""
        return {
            "positions": asdict(self.positions),  # type: ignore[call-overload]
            "mode": self._mode,
            "blocks": [block.state_dict() for block in self.block_caches],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over the state of a cache made with the same sizes, positions and `kv_dtype`, copied to `device`.

        Raises:
            ValueError: the state is of a cache with another number of blocks.
        """
        if len(state["blocks"]) != self.num_blocks:
            raise ValueError(f"the saved cache has {len(state['blocks'])} blocks, this model has {self.num_blocks}")
        for block, saved in zip(self.block_caches, state["blocks"], strict=True):
            block.load_state_dict(saved, device)
        self.positions = POSITION_POLICIES[self.position_mode](**state["positions"])
        self._mode = state["mode"]

    def fork(self) -> "WanKVCache":
        """A copy with memory of its own."""
        return copy.deepcopy(self)

    def twin(self) -> "WanKVCache":
        """A copy whose keys and values are in the same memory, for a caller that gives it other memory."""
        buffers = [buffer for block in self.block_caches for buffer in block.buffers or ()]
        twin = copy.deepcopy(self, {id(buffer): buffer for buffer in buffers})
        for block in twin.block_caches:
            if block.buffers is not None:
                block.use_buffers(*(copy.copy(buffer) for buffer in block.buffers))
        return twin

    @property
    def _begins_chunk(self) -> bool:
        return self._mode != "overwrite"

    def _start_anew(self) -> None:
        self._mode = "append"
        self.positions = POSITION_POLICIES[self.position_mode]()

    @property
    def num_blocks(self) -> int:
        """Transformer blocks whose keys and values are held."""
        return len(self.block_caches)

    @property
    def num_tokens(self) -> int:
        """Tokens held per block."""
        return self.block_caches[0].window.state.length

    @property
    def newest_tokens(self) -> int:
        """Tokens of the newest chunk, which an overwrite replaces; 0 if there is none."""
        return self.block_caches[0].window.state.newest_size

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all buffers, 0 before the first write."""
        return sum(block.allocated_bytes for block in self.block_caches)

    def expected_bytes(
        self, batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, num_tokens: int | None = None
    ) -> int:
        """Bytes that the buffers will take, before anything is allocated; with the copy of a sink that is moved.

        Args:
            num_tokens: Tokens of the whole video, needed without window and `max_tokens`.
        """
        capacity = self.window_size if self.window_size != -1 else self.max_tokens or num_tokens
        if capacity is None:
            raise ValueError("a cache without window_size and max_tokens grows with the video: pass num_tokens")
        slot_bytes = self.block_caches[0]._buffer_type.slot_bytes(head_dim, dtype)
        moved_sink = self.sink_size if self.position_mode == "sink_relative" else 0  # keys as they were written
        bank = self.block_caches[0].bank.expected_bytes(batch_size, num_heads, head_dim, dtype)
        return self.num_blocks * (batch_size * (2 * capacity + moved_sink) * num_heads * slot_bytes + bank)
