"""A rollout as a folder, as a rollout again, and as two.

What a rollout holds is packed into plain values and tensors; `state_folder` keeps them. A state is bound to the
weights and the config of its models: with others the video would go on as another one without a word.
"""

import copy
import dataclasses
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from wan_autoregressive._version import __version__
from wan_autoregressive.cache.cache_state import cache_state, load_cache_state
from wan_autoregressive.cache.fixed_memory import FixedMemory
from wan_autoregressive.configs.rollout_config import RolloutConfig
from wan_autoregressive.models.conditions import ConditionMemory
from wan_autoregressive.pipelines.model_identity import check_same_model, model_identity
from wan_autoregressive.pipelines.state_folder import read_state, write_state
from wan_autoregressive.pipelines.state_values import pack, unpack
from wan_autoregressive.schedulers.self_forcing_scheduler import Generators

if TYPE_CHECKING:
    from wan_autoregressive.pipelines.pipeline_wan_autoregressive import WanAutoregressivePipeline
    from wan_autoregressive.pipelines.rollout import StepCallback, WanRollout

PACKED = (
    "prompt",
    "negative_prompt_embeds",
    "_prompt_schedule",
    "_next_prompt",
    # Whole, also where they are used up: reset() starts from them again.
    "_initial_noise",
    "given_latents",
    "_attention_kwargs",
    "_seconds_before",
    "chunks_done",
    "frames_done",
    "steps_done",
    "interrupted",
    "_newest_block_frames",
    "_clean_pass_due",
    "_position_shift",
    "blend",
)
"""Attributes of a rollout that are saved as they are: numbers, texts, tensors, prompts, lists and dicts of such."""

SAVED_APART = ("config", "scheduler", "generator", "cache", "negative_cache", "history", "vae_decoder")
MADE_ANEW = (
    *("pipe", "batch_size", "device", "grid", "latent_height", "latent_width", "tokens_per_frame", "first_scheduler"),
    *("_lock", "_failed", "on_progress", "_on_step_end", "source"),
    *("conditions", "_inputs"),
)


def save_rollout(rollout: "WanRollout", folder: str | os.PathLike[str], notes: dict[str, Any] | None = None) -> None:
    """Save a rollout between two steps; see [`WanRollout.save`].

    Args:
        notes: JSON values of the caller's, kept with the state as one unit; `read_content(folder)["notes"]`.
    """
    with _between_steps(rollout, "save"):
        tensors: dict[str, torch.Tensor] = {}
        content = {
            "package_version": __version__,
            "model": model_identity(rollout.pipe, with_vae=rollout.vae_decoder is not None),
            "rollout": pack(_contents(rollout), tensors),
            "notes": notes,
        }
        write_state(folder, content, tensors)


def resume_rollout(
    pipe: "WanAutoregressivePipeline",
    folder: str | os.PathLike[str],
    generator_device: torch.device | str | None = None,
    on_step_end: "StepCallback | None" = None,
) -> "WanRollout":
    """Go on with a saved rollout; see [`WanAutoregressivePipeline.resume`]."""
    from wan_autoregressive.pipelines.rollout import WanRollout

    content, tensors = read_state(folder)
    check_same_model(content["model"], model_identity(pipe, with_vae="vae" in content["model"]), folder)
    device = pipe._execution_device
    saved = unpack(content["rollout"], tensors, device)
    try:
        config = RolloutConfig(**saved["config"])
    except TypeError as error:
        raise ValueError(
            f"the state in '{folder}' was saved by version {content['package_version']}, whose settings this version "
            f"({__version__}) does not know: {error}"
        ) from error
    attributes = saved["attributes"]
    rollout = WanRollout(
        pipe=pipe,
        config=config,
        # Its own, not the pipeline's present one: step lists and shift belong to the video.
        schedulers=pipe.chunk_schedulers(config, saved["scheduler"]),
        prompt=attributes["prompt"],
        negative_prompt_embeds=attributes["negative_prompt_embeds"],
        generator=_load_generators(saved["generator"], generator_device),
        video_latents=attributes["given_latents"],
        on_step_end=on_step_end,
    )
    for name, value in attributes.items():
        setattr(rollout, name, value)
    for name in ("cache", "negative_cache"):
        if saved[name] is not None:
            load_cache_state(getattr(rollout, name), saved[name], device)
    for latents in saved["history"]:
        rollout.history.append(latents)
    if rollout.vae_decoder is not None:
        rollout.vae_decoder.load_state_dict(saved["vae_decoder"])
    return rollout


def fork_rollout(rollout: "WanRollout") -> "WanRollout":
    """A second rollout that goes on from here on its own; see [`WanRollout.fork`]."""
    with _between_steps(rollout, "fork"):
        twin = copy.copy(rollout)
        twin.generator = _load_generators(_generator_states(rollout.generator), None)
        twin.cache, twin.negative_cache = copy.deepcopy((rollout.cache, rollout.negative_cache))
        # Tensors in here are replaced, never written to: new containers are enough.
        twin.history = copy.copy(rollout.history)
        twin.history._chunks = list(rollout.history._chunks)
        for name in PACKED:
            setattr(twin, name, copy.copy(value) if isinstance(value := getattr(rollout, name), dict) else value)
        twin.conditions = ConditionMemory(num_prompts=len(rollout.branches()))
        twin._inputs = FixedMemory()
        twin.vae_decoder = None if rollout.vae_decoder is None else rollout.vae_decoder.fork()
        twin._lock = threading.Lock()
        twin.on_progress = None
        return twin


@contextmanager
def _between_steps(rollout: "WanRollout", verb: str) -> Iterator[None]:
    """Hold the rollout still. Raises `RuntimeError` where there is nothing whole to take."""
    if rollout.source is not None:
        raise RuntimeError(f"cannot {verb} this rollout: its source video is a stream and cannot be read twice")
    with rollout.held_still(verb):
        if rollout._failed:
            raise RuntimeError(f"cannot {verb} this rollout: a step failed and left it half-written")
        yield


def _contents(rollout: "WanRollout") -> dict[str, Any]:
    """Everything of the rollout that is saved, not packed yet."""
    scheduler_config = {name: value for name, value in rollout.scheduler.config.items() if not name.startswith("_")}
    return {
        "config": dataclasses.asdict(rollout.config),
        "scheduler": scheduler_config,
        "attributes": {name: getattr(rollout, name) for name in PACKED},
        "generator": _generator_states(rollout.generator),
        "cache": cache_state(rollout.cache),
        "negative_cache": None if rollout.negative_cache is None else cache_state(rollout.negative_cache),
        "history": list(rollout.history._chunks),
        "vae_decoder": None if rollout.vae_decoder is None else rollout.vae_decoder.state_dict(),
    }


# Generators.


def _generator_states(generators: Generators) -> dict[str, Any] | None:
    """States by distinct generator: one that stands in a list twice goes on as one."""
    if generators is None:
        return None
    listed = generators if isinstance(generators, list) else [generators]
    distinct = {id(generator): generator for generator in listed}
    order = list(distinct)
    return {
        "states": [generator.get_state() for generator in distinct.values()],
        "devices": [str(generator.device) for generator in distinct.values()],
        "order": [order.index(id(generator)) for generator in listed],
        "is_list": isinstance(generators, list),
    }


def _load_generators(saved: dict[str, Any] | None, device: torch.device | str | None) -> Generators:
    if saved is None:
        return None
    made = []
    for state, was in zip(saved["states"], saved["devices"], strict=True):
        wanted = torch.device(was if device is None else device)
        if wanted.type != torch.device(was).type:
            raise ValueError(
                f"generator_device is {str(device)!r}, but the saved generator is of a {torch.device(was).type} "
                "device: kinds of devices draw different numbers"
            )
        generator = torch.Generator(wanted)
        generator.set_state(state.cpu())
        made.append(generator)
    generators = [made[index] for index in saved["order"]]
    return generators if saved["is_list"] else generators[0]
