"""Decode a rollout's chunks while the next ones are denoised.

The thread that asks for chunks decodes them, so that each is handed out the moment it is ready; a second thread
denoises, on CUDA in a second stream. It begins a chunk only when the one before it is taken to be decoded, so that it
is never more than one ahead. This module knows nothing of how latents or pixels are made.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from wan_autoregressive.pipelines.chunk_in_flight import ChunkInFlight
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.offload import is_offloaded
from wan_autoregressive.pipelines.outputs import WanVideoChunk
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.source_video import SourceEndedError

# A LoRA scale is set on the transformer's layers for the time of a forward: rollouts that share it take turns.
_TURNS: WeakKeyDictionary[torch.nn.Module, threading.Lock] = WeakKeyDictionary()


class OverlappedRollout(Protocol):
    """What is needed of a rollout: its stages one by one."""

    components: WanComponents
    device: torch.device
    interrupted: bool

    @property
    def done(self) -> bool: ...
    @property
    def prompt(self) -> PromptState: ...
    @property
    def negative_prompt_embeds(self) -> torch.Tensor | None: ...
    def stepping(self) -> AbstractContextManager[None]: ...
    def begin_chunk(self) -> ChunkInFlight: ...
    def make_latents(self, in_flight: ChunkInFlight) -> None: ...
    def decode_chunk(self, in_flight: ChunkInFlight) -> WanVideoChunk: ...


def check_decode_alongside(components: WanComponents) -> None:
    """Raise `ValueError` if a transformer or a VAE is offloaded, whole or in parts."""
    models: dict[str, Any] = {"transformer": components.transformer, "transformer_2": components.transformer_2}
    for name, codec in (("vae", components.codec), ("preview_vae", components.preview_codec)):
        models[name] = None if codec is None else codec.vae
    for name, model in models.items():
        if model is not None and is_offloaded(model):
            raise ValueError(
                f"decode_alongside runs the transformer and the VAE at the same time, but the {name} is offloaded "
                "between its uses; leave decode_alongside out, or keep both on their devices with pipe.to(device)"
            )


def chunks_decoded_alongside(rollout: OverlappedRollout, stop: Callable[[], bool]) -> Iterator[WanVideoChunk]:
    """The chunks to come; see [`WanRollout.chunks`]."""
    if rollout.done:
        return
    try:
        with rollout.stepping(), _AheadOfCaller(rollout) as ahead:
            ahead.begin()
            in_flight = ahead.finish()
            while not (rollout.done or stop()):
                ahead.begin()
                yield rollout.decode_chunk(in_flight)
                in_flight = ahead.finish()
            last = rollout.decode_chunk(in_flight)
    except SourceEndedError:
        return
    yield last  # out here the rollout is whole and free again: closing the iterator now costs nothing


class _AheadOfCaller:
    """A thread, and on CUDA a stream, that makes the latents of one chunk at a time."""

    def __init__(self, rollout: OverlappedRollout) -> None:
        self._rollout = rollout
        self._stream = _denoising_stream(rollout.device)
        self._turn = _TURNS.setdefault(rollout.components.transformer, threading.Lock())
        self._ahead: Future[ChunkInFlight] | None = None
        self._made: torch.cuda.Event | None = None

    def __enter__(self) -> "_AheadOfCaller":
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="wan-denoise")
        self._thread = self._pool.submit(threading.get_ident).result()
        return self

    def __exit__(self, *error: object) -> None:
        interrupted = self._rollout.interrupted
        self._rollout.interrupted = interrupted or self._ahead is not None  # nobody waits for that chunk any more
        # The garbage collection that closes a forgotten iterator may run in the very thread to wait for.
        self._pool.shutdown(wait=threading.get_ident() != self._thread)
        self._rollout.interrupted = interrupted
        if self._stream is not None:
            self._callers_stream().wait_stream(self._stream)

    def begin(self) -> None:
        """Start on the next chunk."""
        in_flight = self._rollout.begin_chunk()
        if self._stream is not None:
            # From here and not from the other thread, where it would wait for the decoding that is to come as well.
            self._stream.wait_stream(self._callers_stream())
            new = None if in_flight.next_prompt is None else in_flight.next_prompt.embeds
            for embeds in (self._rollout.prompt.embeds, self._rollout.negative_prompt_embeds, new):
                if embeds is not None:
                    embeds.record_stream(self._stream)  # they may be dropped for others while they are still read
        self._ahead = self._pool.submit(self._make, in_flight, _modes_of_this_thread(self._rollout.device.type))

    def finish(self) -> ChunkInFlight:
        """Wait for that chunk's latents. What was raised in making them is raised here."""
        assert self._ahead is not None
        in_flight = self._ahead.result()
        self._ahead = None
        if self._made is not None:
            self._callers_stream().wait_event(self._made)
            in_flight.latents.record_stream(self._callers_stream())
        return in_flight

    def _make(self, in_flight: ChunkInFlight, modes: Callable[[], AbstractContextManager[object]]) -> ChunkInFlight:
        with self._turn, modes(), torch.cuda.stream(self._stream):
            self._rollout.make_latents(in_flight)
            if self._stream is not None:
                self._made = self._stream.record_event()
        return in_flight

    def _callers_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._rollout.device)


@functools.cache
def _denoising_stream(device: torch.device) -> torch.cuda.Stream | None:
    # One for all rollouts: memory that a stream has used is kept for that stream.
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _modes_of_this_thread(device_type: str) -> Callable[[], AbstractContextManager[object]]:
    """What enters the caller's inference mode and autocast in another thread, where they are off at first."""
    inference = torch.is_inference_mode_enabled()
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else None

    def enter() -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        if autocast:
            stack.enter_context(torch.autocast(device_type, dtype))
        return stack

    return enter
