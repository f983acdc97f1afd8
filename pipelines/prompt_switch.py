"""What happens to the past when the prompt changes: one function per policy.

All run at a chunk boundary with the past's clean keys and values written, except those that a re-cache replaces.
"""

from typing import TYPE_CHECKING

import torch

from wan_autoregressive.pipelines.prompts import PromptState

if TYPE_CHECKING:
    from wan_autoregressive.pipelines.rollout import WanRollout


def switch_prompt(rollout: "WanRollout", prompt: PromptState) -> None:
    """Take over a prompt; at the start of a video there is no past to deal with."""
    old_prompt, policy = rollout.prompt, rollout.config.switch_policy
    rollout.prompt, rollout.blend = prompt, None
    if rollout.frames_done == 0:
        return
    if policy == "recache":
        recache(rollout)
    elif policy in ("flush", "cut"):
        flush(rollout)
        if policy == "cut":
            rollout.jump(rollout.config.cut_jump_frames)
    elif policy == "blend":
        rollout.blend = {"old": old_prompt, "new": prompt, "chunks_done": 0}


def recache(rollout: "WanRollout") -> None:
    """Rebuild the window's keys and values from clean latents under the current prompt, in one pass.

    As LongLive does (`pipeline/interactive_causal_inference.py`). The sink keeps the old prompt's under
    `recache_sink="keep"`, unless the video is still within the window; frames that the kept sink hides from attention
    are not computed. With `"refresh"` the oldest frames of the window become the new sink.
    """
    config, frames_done = rollout.config, rollout.frames_done
    window = config.window_frames or frames_done
    keep_sink = config.recache_sink == "keep" and frames_done > window
    num_frames = min(window, frames_done) - (config.sink_frames if keep_sink else 0)
    rollout.cache.enable_rewrite_mode(keep_sink=keep_sink)
    latents = rollout.history.last(num_frames)
    rollout.write_past(latents, config.context_noise, frames_done - num_frames, rollout.cache, rollout.prompt.embeds)


def flush(rollout: "WanRollout") -> None:
    """Keep the sink and the newest `flush_frames` frames, under every prompt (Infinity-RoPE's KV flush)."""
    for cache, _ in rollout.branches():
        cache.keep_newest(rollout.config.flush_frames * rollout.tokens_per_frame)


def advance_blend(rollout: "WanRollout") -> None:
    """Move the embeddings one chunk further from the old prompt to the new one."""
    if rollout.blend is None:
        return
    old, new = rollout.blend["old"], rollout.blend["new"]
    rollout.blend["chunks_done"] += 1
    weight = rollout.blend["chunks_done"] / rollout.config.blend_chunks
    if weight >= 1:
        rollout.prompt, rollout.blend = new, None
    else:
        rollout.prompt = PromptState(torch.lerp(old.embeds, new.embeds, weight), new.text)
