"""A rollout on several ranks: what rank 0 calls of it, the others do as well.

It begins with its state on rank 0, which the others get, and a comparison of what all of them then have. For each
chunk rank 0 sends one order, with the prompt if that changes, and for each denoising step one int, whether to stop.
What is saved is one state, as a single process writes it, and goes on on any number of ranks.
"""

import dataclasses
import itertools
import os
import weakref
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch

from wan_autoregressive.cache.cache_heads import ChangeHeads, change_heads
from wan_autoregressive.configs.registry import SAMPLERS
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.sequence_parallel import SequenceParallel
from wan_autoregressive.pipelines.chunk_in_flight import ChunkInFlight
from wan_autoregressive.pipelines.components import WanComponents
from wan_autoregressive.pipelines.frame_grid import Chunk
from wan_autoregressive.pipelines.prompts import PromptState
from wan_autoregressive.pipelines.ranks import Ranks
from wan_autoregressive.pipelines.remote_codec import RemoteCodec
from wan_autoregressive.pipelines.rollout import StepCallback, WanRollout
from wan_autoregressive.pipelines.rollout_digests import rollout_digests
from wan_autoregressive.pipelines.rollout_state import read_rollout_state
from wan_autoregressive.pipelines.shared_source import SharedSource
from wan_autoregressive.pipelines.source_video import SourceEndedError
from wan_autoregressive.pipelines.state_values import pack, unpack


class ParallelRollout(WanRollout):
    """A [`WanRollout`] on several ranks: what rank 0 calls of it, the others do as well."""

    _wish = _agreed = _in_chunk = False

    def join(self, all_of_them: "ParallelRollouts", number: int) -> None:
        """Be one with the rollouts of this number on the other ranks."""
        self._all, self._ranks, self._number = all_of_them, all_of_them.ranks, number

    def _turn(self, verb: str, **arguments: Any) -> AbstractContextManager[None]:
        """On rank 0: have the others call this of theirs, and do the own part within the block."""
        return self._ranks.turn(verb, self._number, arguments, harmless=(SourceEndedError,))

    # An interruption counts from the step on at which all ranks have heard of it.

    @property
    def interrupted(self) -> bool:
        """Whether the chunk under way ends early, or the video has ended."""
        return self._agreed

    @interrupted.setter
    def interrupted(self, wish: bool) -> None:
        self._wish = wish
        if not self._in_chunk:
            self._agreed = wish

    def step_done(self, chunk: Chunk, timestep: float, latents: torch.Tensor) -> torch.Tensor:
        latents = super().step_done(chunk, timestep, latents)
        if self._ranks.agree(self._wish):
            self._agreed = True
        return latents

    # What is done by all ranks at the same time.

    def make_latents(self, in_flight: ChunkInFlight) -> None:
        prompt = in_flight.next_prompt
        told = None if prompt is None else PromptState(prompt.embeds.cpu(), prompt.text)
        with self._turn("follow_chunk", prompt=told):
            self._in_chunk = True
            try:
                super().make_latents(in_flight)
            finally:
                self._in_chunk = False
            self._agreed = self._agreed or self._wish

    def follow_chunk(self, prompt: PromptState | None) -> None:
        """The part of another rank in the next chunk, from `prompt` on if there is one."""
        if prompt is not None:
            self.switching.set_next(PromptState(prompt.embeds.to(self.device), prompt.text))
        with suppress(SourceEndedError), self.stepping():
            in_flight = self.begin_chunk()
            self.make_latents(in_flight)
            if self.vae_decoder is not None:  # whose pixels the next chunk needs
                self.decode_chunk(in_flight)

    def state_dict(self) -> dict[str, Any]:
        """The whole state on rank 0; what the others get is theirs and means nothing without rank 0's."""
        with self._turn("state_dict"):
            state = super().state_dict()
            _change_heads(state, _parallel(self.components).join_heads)
        return state

    # What each rank does for itself, once it has succeeded on rank 0.

    def change(self, **settings: Any) -> None:
        super().change(**settings)
        with self._turn("change", **settings):
            pass

    def reset(self) -> None:
        super().reset()
        with self._turn("reset"):
            pass

    def fork(self) -> Self:
        twin = super().fork()
        with self._turn("fork"):
            self._all.add(twin)
        return twin


class ParallelRollouts:
    """The rollouts of a group of ranks: makes them on rank 0, in the place of [`WanRollout`], and on the others."""

    codec: RemoteCodec | None = None
    """On rank 0, if another rank decodes."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._numbers = itertools.count()
        self._known: dict[int, ParallelRollout] = {}
        """On the other ranks, as long as they live on rank 0."""
        self._gone: list[int] = []
        """On rank 0, those of which the others do not know yet."""

    # On rank 0.

    def __call__(self, components: WanComponents, config: RolloutConfig, **parts: Any) -> ParallelRollout:
        """As [`WanRollout`].

        Raises:
            ValueError: no generator, since every rank would draw other noise, or a function that is called after each
                step, since the others would not get what it returns. On all ranks: one of them has other models.
        """
        _check_fit(parts.get("generator"), parts.get("on_step_end"))
        components = self._decoded_elsewhere(components)
        if parts.get("source") is not None:
            parts["source"] = SharedSource(self.ranks, components.device, parts["source"])
        rollout = ParallelRollout(components, config, **parts)
        state = WanRollout.state_dict(rollout)
        with self._turn(config, state, rollout.source is not None):
            self._add_checked(rollout)
        return rollout

    def load(
        self,
        components: WanComponents,
        folder: str | os.PathLike[str],
        generator_device: torch.device | str | None = None,
        on_step_end: StepCallback | None = None,
    ) -> ParallelRollout:
        """As [`WanRollout.load`]; no other rank reads the folder."""
        components = self._decoded_elsewhere(components)
        config, state = read_rollout_state(folder, components)
        _check_fit(state["noise"]["generator"], on_step_end)
        with self._turn(config, state):
            rollout = self._of_state(components, config, state, generator_device)
        return rollout

    def _decoded_elsewhere(self, components: WanComponents) -> WanComponents:
        return components if self.codec is None else dataclasses.replace(components, codec=self.codec)

    def _turn(
        self, config: RolloutConfig, state: dict[str, Any], has_source: bool = False
    ) -> AbstractContextManager[None]:
        """Have the others start a rollout with this state, and do the own part within the block. Of keys and values
        the order has the shapes only."""
        gone, self._gone = self._gone, []
        tensors: dict[str, torch.Tensor] = {}
        told = _without_caches(state)
        if not SAMPLERS.load(config.sampler).needs_pixels(config):
            told["vae_decoder"] = None
        packed = pack(told, tensors)
        caches = [[change_heads(cache, lambda x, dim: x.to("meta")) for cache in of] for of in _caches(state)]
        order = _Start(gone, packed, {name: x.cpu() for name, x in tensors.items()}, caches, has_source)
        return self.ranks.turn("start", None, {"order": order})

    # On the others.

    def follow(self, components: WanComponents) -> None:
        """Do this rank's part of what rank 0 does, until it ends."""
        for verb, number, arguments in self.ranks.orders():
            with self.ranks.together():
                if number is None:
                    self._start(components, **arguments)
                else:
                    getattr(self._known[number], verb)(**arguments)

    def _start(self, components: WanComponents, order: "_Start") -> None:
        for number in order.gone:
            self._known.pop(number, None)
        state = unpack(order.packed, order.tensors, components.device)
        for expert, caches in zip(state["denoiser"]["experts"], order.caches, strict=True):
            expert["caches"] = caches
        config = dataclasses.replace(RolloutConfig(**state["config"]), output_type="latent")
        saved = state["noise"]["generator"]["devices"]
        kinds = {torch.device(device).type for device in saved}
        own = components.device if kinds == {components.device.type} else None
        source = SharedSource(self.ranks, components.device) if order.has_source else None
        self._of_state(components, config, state, own, source=source)

    # On all.

    def _of_state(
        self,
        components: WanComponents,
        config: RolloutConfig,
        state: dict[str, Any],
        generator_device: torch.device | str | None,
        **parts: Any,
    ) -> ParallelRollout:
        """A rollout that goes on from a state, whose keys and values are whole on rank 0."""
        parallel = _parallel(components)
        _change_heads(state, lambda x, dim: parallel.split_heads(x, dim, components.device))
        rollout = ParallelRollout.from_state(components, config, state, generator_device, **parts)
        self._add_checked(rollout)
        return rollout

    def _add_checked(self, rollout: ParallelRollout) -> None:
        self.add(rollout)
        self.ranks.check_same(rollout_digests(rollout.components, WanRollout.state_dict(rollout)))

    def add(self, rollout: ParallelRollout) -> None:
        """Give a rollout the number by which orders name it: all ranks count the same ones."""
        number = next(self._numbers)
        rollout.join(self, number)
        if self.ranks.leads:
            weakref.finalize(rollout, self._gone.append, number)
        else:
            self._known[number] = rollout


@dataclass(frozen=True)
class _Start:
    """The order to start a rollout."""

    gone: list[int]
    """Numbers of rollouts that are there no more."""
    packed: Any
    tensors: dict[str, torch.Tensor]
    caches: list[list[dict[str, Any]]]
    """Of each expert, one for each branch; of keys and values the shapes."""
    has_source: bool


def _parallel(components: WanComponents) -> SequenceParallel:
    parallel = components.transformer.parallel
    assert parallel is not None
    return parallel


def _caches(state: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [expert["caches"] for expert in state["denoiser"]["experts"]]


def _without_caches(state: dict[str, Any]) -> dict[str, Any]:
    denoiser = state["denoiser"]
    experts = [{name: value for name, value in expert.items() if name != "caches"} for expert in denoiser["experts"]]
    return {**state, "denoiser": {**denoiser, "experts": experts}}


def _change_heads(state: dict[str, Any], change: ChangeHeads) -> None:
    """Put other heads into the caches of a rollout's state."""
    for expert in state["denoiser"]["experts"]:
        expert["caches"] = [change_heads(cache, change) for cache in expert["caches"]]
        for lanes in expert["lanes"]:  # beside the first one, which is the cache
            lanes["lanes"] = [change_heads(cache, change) for cache in lanes["lanes"]]


def _check_fit(generator: Any, on_step_end: StepCallback | None) -> None:
    if generator is None:
        raise ValueError(
            "a video on several ranks needs a generator with a seed: without one every rank draws other noise"
        )
    if on_step_end is not None:
        raise ValueError(
            "on_step_end (callback_on_step_end) runs on rank 0 only, and the other ranks would not get the latents "
            "that it returns; leave it out for a video on several ranks"
        )
