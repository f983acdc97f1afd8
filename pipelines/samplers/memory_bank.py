"""Chunk after chunk with a memory bank: single frames of the whole video that have to do with the prompt (MemFlow).

After KlingTeam/MemFlow (`pipeline/causal_inference.py`). Beside sink and window every forward sees the frames in the
bank, with the keys and values that they were written with.
"""

from typing import Any, Literal, get_args

import torch

from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.pipelines.frame_grid import Chunk, FrameGrid
from wan_autoregressive.pipelines.samplers.base import SamplingContext
from wan_autoregressive.pipelines.samplers.chunkwise import ChunkwiseSampler

BankCandidates = Literal["every_chunk", "every_interval"]


class MemoryBankSampler(ChunkwiseSampler):
    """Finishes one chunk before it begins the next, which sees up to `memory_bank_frames` frames more.

    The first frame of a chunk is a candidate, with what the context pass wrote of it. It enters before the next chunk
    begins: into the newest place while the bank is not full, and then behind those that have most to do with the
    prompt of that next chunk.

    Args:
        bank_interval: Chunks after which the bank gets a place more, until it is full; within them a candidate takes
            the place of the one before.
        bank_candidates: Chunks that give a candidate. With `every_interval` it is the first of every `bank_interval`
            chunks, and a full bank takes in the same candidate again before each chunk, as the interactive pipeline of
            the original does.
    """

    fills_memory_bank = True

    def __init__(
        self,
        context: SamplingContext,
        bank_interval: int = 3,
        bank_candidates: BankCandidates = "every_chunk",
    ) -> None:
        super().__init__(context)
        self._interval = bank_interval
        self._candidates = bank_candidates
        self._chunks_cached = 0
        self._is_due = False
        """Whether a candidate is to enter before the next chunk."""

    @classmethod
    def check(cls, config: RolloutConfig) -> None:
        super().check(config)
        options = cls.options(config)
        interval, candidates = options["bank_interval"], options["bank_candidates"]
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"bank_interval is {interval!r}; it must be a whole number of at least 1 chunk")
        if candidates not in get_args(BankCandidates):
            allowed = ", ".join(get_args(BankCandidates))
            raise ValueError(f"bank_candidates is {candidates!r}; allowed are {allowed}")
        if not config.memory_bank_frames:
            raise ValueError("sampler 'memory_bank' needs memory_bank_frames of at least 1; MemFlow has 3")
        if config.position_mode != "absolute":
            raise ValueError(
                f"sampler 'memory_bank' keeps frames at the positions that they were written with; it needs "
                f"position_mode 'absolute', got {config.position_mode!r}"
            )
        if not config.clean_pass:
            raise ValueError(
                "sampler 'memory_bank' has frames in its bank as the clean pass wrote them; leave out clean_pass"
            )

    def cache_past(self, skip_prompt: bool = False) -> None:
        if self.due is not None:
            super().cache_past()  # under the prompt as well, where a re-cache follows: the candidate is from here
            self._chunk_is_cached()

    def cache_given(self, chunk: Chunk, latents: torch.Tensor) -> None:
        self._let_candidate_in()
        super().cache_given(chunk, latents)
        self._chunk_is_cached()

    def next_chunk(self, chunk: Chunk) -> torch.Tensor:
        self._let_candidate_in()
        return super().next_chunk(chunk)

    @classmethod
    def chunks_to_settle(cls, config: RolloutConfig, steps: int) -> int:
        return config.memory_bank_frames * int(cls.options(config)["bank_interval"])

    @classmethod
    def num_forwards(
        cls, config: RolloutConfig, grid: FrameGrid, steps: tuple[int, int], experts: int = 1
    ) -> int | None:
        forwards = super().num_forwards(config, grid, steps, experts)
        given = grid.num_given_chunks
        assert forwards is not None
        if _bank_length(given, cls.options(config)["bank_interval"]) <= config.memory_bank_frames:
            return forwards
        # Given frames fill the bank before any step has read the prompt: a forward of its own does.
        return forwards + config.num_branches

    def _let_candidate_in(self) -> None:
        if self._is_due:
            self.context.denoiser.add_to_bank(_bank_length(self._chunks_cached, self._interval))
            self._is_due = False

    def _chunk_is_cached(self) -> None:
        if self._candidates == "every_chunk" or self._chunks_cached % self._interval == 0:
            self.context.denoiser.propose_to_bank()
        self._chunks_cached += 1
        self._is_due = True

    def reset(self) -> None:
        super().reset()
        self._chunks_cached, self._is_due = 0, False

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "chunks_cached": self._chunks_cached, "is_due": self._is_due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._chunks_cached, self._is_due = state["chunks_cached"], state["is_due"]


def _bank_length(chunks_cached: int, interval: int) -> int:
    """Frames that the bank would hold before the next chunk if it had no end."""
    return (chunks_cached - 1) // interval + 1
