"""Whole videos over several ranks: what is run on each of them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import parallel_models
import torch
import torch.distributed as dist
from ranks import PEER_TIMEOUT

from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint
from wan_autoregressive.pipelines.parallel_pipeline import parallel_rollouts
from wan_autoregressive.pipelines.parallel_rollout import ParallelRollout
from wan_autoregressive.pipelines.ranks import RankFailedError
from wan_autoregressive.pipelines.state_folder import read_content

PROMPT, OTHER = "a red circle moving right on a navy background", "a green square moving up on a black background"
SIZE = {"height": 32, "width": 32, "num_inference_steps": 2}
WINDOW = {"num_frames": 45, "window_frames": 7, "sink_frames": 2}  # 12 latent frames
TEXT_ONLY = {"switch_policy": "cross_attention"}
SWITCH = {**WINDOW, "prompt_schedule": {6: OTHER}}


def source() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (37, 32, 32, 3), dtype=np.uint8))


VIDEOS: dict[str, dict[str, Any]] = {
    "absolute": WINDOW,
    "relative": {**WINDOW, "position_mode": "relative"},
    "sink_relative": {**WINDOW, "position_mode": "sink_relative"},
    "moving average sink": {**WINDOW, "position_mode": "relative", "sink_update": "moving_average"},
    "int8, sink_relative": {**WINDOW, "position_mode": "sink_relative", "kv_dtype": "int8"},
    "guidance": {**WINDOW, "guidance_scale": 2.0, "negative_prompt": "gray"},
    "recache": SWITCH,
    "cross_attention": {**SWITCH, **TEXT_ONLY},
    "cut": {**SWITCH, "switch_policy": "cut", "position_mode": "relative"},
    "blend": {**SWITCH, "switch_policy": "blend"},
    "flush": {**SWITCH, "switch_policy": "flush"},
    "chunks of 1": {**WINDOW, "num_frames": 21, "window_frames": 4, "chunk_frames": 1, "height": 48, "width": 48},
    "no window": {"num_frames": 33},
    "given frames": {**WINDOW, "video": source()[:9]},
    "video to video": {"window_frames": 7, "video": source(), "strength": 0.7},
    "rolling": {**WINDOW, "sampler": "rolling", "sink_frames": 3, "position_mode": "sink_relative"},
    "recompute": {**TEXT_ONLY, "num_frames": 45, "sampler": "recompute", "window_frames": 6},
    "memory_bank": {**WINDOW, "sampler": "memory_bank", "memory_bank_frames": 2},
    "stream_batch": {**WINDOW, **TEXT_ONLY, "sampler": "stream_batch"},
    "stream_batch, video to video": {
        **{**TEXT_ONLY, "sampler": "stream_batch", "window_frames": 7, "video": source(), "strength": 0.7}
    },
}


def start(pipe: WanAutoregressivePipeline, **options: Any) -> Any:
    return pipe.rollout(**{"prompt": PROMPT, **SIZE, "generator": generator(), "output_type": "uint8", **options})


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def demo() -> WanAutoregressivePipeline:
    pipe = WanAutoregressivePipeline.from_pretrained(demo_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(rollout: Any, **chunks: Any) -> dict[str, Any]:
    """All chunks to come."""
    found = list(rollout.chunks(**chunks))
    return {
        "latents": torch.cat([chunk.latents for chunk in found], dim=2),
        "frames": np.concatenate([chunk.frames for chunk in found], axis=1),
        "cache_bytes": rollout.cache.allocated_bytes,
        "steps": rollout.steps_done,
    }


def videos(names: list[str], pipe: WanAutoregressivePipeline | None = None) -> dict[str, dict[str, Any]]:
    pipe = pipe or demo()
    return {name: made(start(pipe, **VIDEOS[name])) for name in names}


def video_launch(names: list[str]) -> dict[str, Any]:
    """On rank 0."""
    pipe = demo()
    with parallel_rollouts(pipe, timeout_s=PEER_TIMEOUT) as leads:
        return videos(names, pipe) if leads else {}


def short_launch(names: list[str], folder: Path) -> dict[str, Any]:
    """Some forwards, and a video that is saved."""
    found: dict[str, Any] = {"models": parallel_models.model_launch(names)}
    pipe = demo()
    with parallel_rollouts(pipe, timeout_s=PEER_TIMEOUT) as leads:
        if leads:
            found["saved"] = _saved(start(pipe, **SAVED), folder)
    return found


def _saved(rollout: Any, folder: Path) -> dict[str, Any]:
    """Three chunks of a video that is saved then, and how it and a copy go on under another prompt."""
    first = [rollout.step() for _ in range(3)]
    rollout.save(folder / "ranks")
    forked = made(_with_prompt(rollout.fork()))
    saved = torch.cat([chunk.latents for chunk in first], dim=2)
    return {"saved": saved, "forked": forked, "went on": made(_with_prompt(rollout))}


def verbs_launch(folder: Path) -> dict[str, Any]:
    """Every verb of a rollout on rank 0; see the tests for what they are compared with."""
    pipe = demo()
    with parallel_rollouts(pipe, timeout_s=PEER_TIMEOUT) as leads:
        return _verbs(pipe, folder) if leads else {}


def _verbs(pipe: WanAutoregressivePipeline, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"refused": [_refusal(pipe, generator=None), _refusal(pipe, on_step_end=print)]}

    # Decoded alongside; stopped in the middle of a chunk; a state on the way, resumed and forked
    found["alongside"] = made(start(pipe, **SAVED), decode_alongside=True)
    stopped = start(pipe, **SAVED)
    stopped.on_progress = lambda: stopped.interrupt() if stopped.steps_done == 5 else None
    found["stopped"] = made(stopped)
    rollout = start(pipe, **SAVED)
    found |= _saved(rollout, folder)
    found["resumed"] = made(_with_prompt(pipe.resume(folder / "ranks")))
    found["resumed from one"] = made(_with_prompt(pipe.resume(folder / "one")))

    # Started again, with other settings
    rollout.reset()
    rollout.change(switch_policy="cross_attention")
    found["started again"] = made(rollout)
    return found


def expected_of_verbs(pipe: WanAutoregressivePipeline, folder: Path) -> dict[str, dict[str, Any]]:
    """What one process makes of the same; its state after three chunks is in `folder / "one"`."""
    rollout = start(pipe, **SAVED)
    for _ in range(3):
        rollout.step()
    rollout.save(folder / "one")
    went_on = made(_with_prompt(rollout))
    stopped = start(pipe, **SAVED)
    stopped.on_progress = lambda: stopped.interrupt() if stopped.steps_done == 5 else None
    found = {name: went_on for name in ("forked", "went on", "resumed", "resumed from one")}
    found |= {"alongside": made(start(pipe, **SAVED)), "stopped": made(stopped)}
    rollout.reset()
    rollout.change(switch_policy="cross_attention")
    return found | {"started again": made(rollout)}


def check_saved_as_one(pipe: WanAutoregressivePipeline, found: dict[str, Any], folder: Path) -> None:
    """The state that ranks saved in `folder / "ranks"` is one that one process goes on with as they did; and where
    latents have the same bits it is the one that one process saves."""
    alone = start(pipe, **SAVED)
    first = torch.cat([alone.step().latents for _ in range(3)], dim=2)
    alone.save(folder / "alone")
    resumed = pipe.resume(folder / "ranks")
    assert resumed.cache.allocated_bytes == alone.cache.allocated_bytes
    went_on = made(_with_prompt(resumed))
    torch.testing.assert_close(went_on["latents"], found["went on"]["latents"], rtol=0, atol=1e-3)
    states = [read_content(folder / name) for name in ("ranks", "alone")]
    assert [state.keys() for state in states] == [states[0].keys()] * 2
    if torch.equal(first, found["saved"]):
        assert states[0]["tensors"]["sha256"] == states[1]["tensors"]["sha256"]


SAVED = {**WINDOW, "position_mode": "sink_relative", "kv_dtype": "int8", "guidance_scale": 2.0}


def _with_prompt(rollout: Any) -> Any:
    rollout.set_prompt(OTHER)
    return rollout


def _refusal(pipe: WanAutoregressivePipeline, **options: Any) -> str:
    try:
        start(pipe, **WINDOW, **options)
    except ValueError as error:
        return str(error)
    return ""


def decode_launch(folder: Path) -> dict[str, Any]:
    """The last rank decodes."""
    pipe = demo()
    with parallel_rollouts(pipe, decode_on_last=True, timeout_s=PEER_TIMEOUT) as leads:
        if not leads:
            return {}
        found = {"alongside": made(start(pipe, **SAVED), decode_alongside=True)}
        rollout = start(pipe, **SAVED)
        for _ in range(3):
            rollout.step()
        rollout.save(folder)
        found["forked"] = made(rollout.fork())
        found["went on"] = made(rollout)
        found["resumed"] = made(pipe.resume(folder))
        rollout.reset()
        found["recompute"] = made(start(pipe, **VIDEOS["recompute"]))
        return found


FAILS_AT = 3
"""The chunk in which a rank fails."""


def failure_launch(failing: int, how: str, folder: Path, timeout_s: float) -> dict[str, Any]:
    """One rank fails in the middle of a chunk. Of rank 0: what it was told, and what the video then refuses."""
    pipe, rank = demo(), dist.get_rank()
    if how == "other weights" and rank == failing:
        pipe.transformer.proj_out.bias.data[0] += 1e-3

    def step_done(self, chunk, timestep, latents):
        if rank == failing and chunk.index == FAILS_AT and how != "other weights":
            if how == "raise":
                raise ValueError("the card caught fire")
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return _STEP_DONE(self, chunk, timestep, latents)

    ParallelRollout.step_done = step_done  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    with parallel_rollouts(pipe, timeout_s=timeout_s) as leads:
        if leads:
            rollout = start(pipe, **WINDOW)
            try:
                while not rollout.done:
                    rollout.step()
                    rollout.save(folder)
            except RankFailedError as error:
                found["told"] = str(error)
            found["refused"] = [_error_of(rollout.step), _error_of(lambda: rollout.save(folder))]
    return found


_STEP_DONE = ParallelRollout.step_done


def _error_of(verb: Callable[[], Any]) -> str:
    try:
        verb()
    except RuntimeError as error:
        return str(error)
    return ""
