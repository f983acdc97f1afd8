"""Saved and resumed == never interrupted; a fork and its parent go their own ways."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from saved_rollouts import assert_same, generator, noise, start, state_of

from wan_autoregressive import WanAutoregressivePipeline

OPTIONS = {
    "plain": dict,
    "without an end": lambda: {"num_frames": None, "window_frames": 4},
    "window and sink": lambda: {"window_frames": 5, "sink_frames": 1},
    "ring turned, chunks of 2 after 1": lambda: {"window_frames": 4, "chunk_frames": 2, "first_chunk_frames": 1},
    "guidance": lambda: {"guidance_scale": 3.0, "negative_prompt": "gray", "window_frames": 5},
    "two videos, two generators": lambda: {"prompt": ["one", "two"], "generator": [generator(1), generator(2)]},
    "prompt schedule": lambda: {"prompt_schedule": {2: "rain", 7: noise(1, 512, 32)}, "window_frames": 6},
    "given latents": lambda: {"video_latents": noise(1, 16, 4, 4, 4), "window_frames": 5, "sink_frames": 2},
    "own noise": lambda: {"latents": noise(1, 16, 13, 4, 4), "num_frames": None},
    "latents only": lambda: {"output_type": "latent", "context_noise": 3.0},
    "relative positions": lambda: {"window_frames": 5, "sink_frames": 1, "position_mode": "relative"},
    "a sink that moves along": lambda: {"window_frames": 5, "sink_frames": 1, "position_mode": "sink_relative"},
    "moving-average sink": lambda: {
        **{"window_frames": 5, "sink_frames": 1, "position_mode": "relative", "sink_update": "moving_average"},
        "sink_decay": 0.5,
    },
    "int8": lambda: {"window_frames": 5, "sink_frames": 1, "kv_dtype": "int8", "guidance_scale": 2.0},
    "int8, no window": lambda: {"kv_dtype": "int8", "prompt_schedule": {5: "rain"}},
    "int8, relative positions": lambda: {"window_frames": 5, "kv_dtype": "int8", "position_mode": "relative"},
    "int8, a sink that moves along": lambda: {
        **{"window_frames": 5, "sink_frames": 1, "kv_dtype": "int8", "position_mode": "sink_relative"},
        **{"switch_policy": "flush", "prompt_schedule": {9: "rain"}},
    },
    "cut": lambda: {
        **{"window_frames": 5, "sink_frames": 1, "position_mode": "relative", "switch_policy": "cut"},
        "prompt_schedule": {3: "rain", 9: "snow"},
    },
    "blend, other first steps": lambda: {
        **{"switch_policy": "blend", "blend_chunks": 3, "prompt_schedule": {3: "rain"}, "window_frames": 6},
        "first_chunk_steps": (1000, 700, 300),
    },
    "own steps": lambda: {"num_inference_steps": None, "denoising_steps": (1000, 400), "output_type": "pt"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_resumed_at_any_boundary_equals_uninterrupted(pipe, tmp_path, options):
    """One chunk after each resume: as the whole state is then that of the other, so is all that follows."""
    rollout = start(pipe, **options())
    for index in range(5):
        rollout.save(tmp_path / str(index))
        resumed = pipe.resume(tmp_path / str(index))
        assert state_of(resumed) == state_of(rollout)
        assert_same([resumed.step()], [rollout.step()])
        assert state_of(resumed) == state_of(rollout)
        assert resumed.done == rollout.done
        assert resumed.cache.allocated_bytes == rollout.cache.allocated_bytes
    rollout.save(tmp_path / "5")
    assert state_of(pipe.resume(tmp_path / "5")) == state_of(rollout)


def test_saving_changes_nothing(pipe, tmp_path):
    saved, alone = start(pipe, window_frames=5), start(pipe, window_frames=5)
    for _ in range(3):
        before = state_of(saved)
        saved.save(tmp_path / "state")
        assert state_of(saved) == before
        assert_same([saved.step()], [alone.step()])


def test_a_chain_of_resumes_into_the_same_folder(pipe, tmp_path):
    expected = list(start(pipe, window_frames=5, sink_frames=1))
    rollout, chunks = start(pipe, window_frames=5, sink_frames=1), []
    while not rollout.done:
        chunks.append(rollout.step())
        rollout.save(tmp_path)
        rollout = pipe.resume(tmp_path)
    assert_same(chunks, expected)
    assert len(list(tmp_path.iterdir())) == 2  # one state, nothing of the ones before


def test_prompts_set_by_hand_survive(pipe, tmp_path):
    rollout = start(pipe, window_frames=6)
    rollout.step()
    rollout.step(prompt="rain")
    rollout.set_prompt("snow")
    rollout.save(tmp_path)
    resumed = pipe.resume(tmp_path)
    chunks = list(resumed)
    assert [chunk.prompt for chunk in chunks] == [["snow"]] * 3
    assert_same(chunks, list(rollout))


def test_reset_after_a_resume_starts_the_same_video_anew(pipe, tmp_path):
    given = {"video_latents": noise(1, 16, 3, 4, 4), "latents": noise(1, 16, 10, 4, 4), "num_frames": None}
    rollout = start(pipe, **given)
    expected = list(rollout)
    rollout.save(tmp_path)
    resumed = pipe.resume(tmp_path)
    resumed.reset()
    resumed.noise.generator.manual_seed(0)
    assert_same(list(resumed), expected)


def test_one_generator_for_two_videos_stays_one(pipe, tmp_path):
    shared = generator()
    rollout = start(pipe, prompt=["one", "two"], generator=[shared, shared])
    rollout.step()
    rollout.save(tmp_path)
    resumed, fork = pipe.resume(tmp_path), rollout.fork()
    assert resumed.noise.generator[0] is resumed.noise.generator[1]
    assert fork.noise.generator[0] is fork.noise.generator[1] is not shared
    expected = list(rollout)
    assert_same(list(resumed), expected)
    assert_same(list(fork), expected)


def test_without_a_generator_the_global_state_is_used(pipe, tmp_path):
    rollout = start(pipe, generator=None)
    rollout.save(tmp_path)
    resumed = pipe.resume(tmp_path)
    assert resumed.noise.generator is None
    torch.manual_seed(3)
    expected = rollout.step()
    torch.manual_seed(3)
    assert_same([resumed.step()], [expected])


def test_the_video_keeps_its_scheduler(pipe, tiny_checkpoint, tmp_path):
    rollout = start(pipe)
    rollout.step()
    rollout.save(tmp_path)
    other = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    assert_same(list(other.resume(tmp_path)), list(rollout))


IN_ANOTHER_PROCESS = """
import sys, torch
from safetensors.torch import save_file
from wan_autoregressive import WanAutoregressivePipeline
torch.set_num_threads(1)
pipe = WanAutoregressivePipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
chunks = list(pipe.resume(sys.argv[2]))
frames = torch.cat([torch.from_numpy(chunk.frames) for chunk in chunks], dim=1)
save_file({"latents": torch.cat([chunk.latents for chunk in chunks], dim=2), "frames": frames}, sys.argv[3])
"""


@pytest.mark.slow
def test_in_a_new_process(pipe, tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file

    rollout = start(pipe, window_frames=5, sink_frames=1, guidance_scale=2.0, prompt_schedule={3: "rain", 9: "snow"})
    rollout.step()
    rollout.step()
    rollout.save(tmp_path / "state")
    expected = list(rollout)
    words = [str(tiny_checkpoint), str(tmp_path / "state"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, *words], check=True, capture_output=True, cwd=tmp_path)
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["latents"], torch.cat([chunk.latents for chunk in expected], dim=2))
    assert np.array_equal(found["frames"].numpy(), np.concatenate([chunk.frames for chunk in expected], axis=1))


# Forks.


def test_a_fork_and_its_parent_are_equal_and_independent(pipe):
    options = {"window_frames": 5, "sink_frames": 1, "guidance_scale": 2.0, "prompt_schedule": {9: "snow"}}
    expected = list(start(pipe, **options))
    parent = start(pipe, **options)
    parent.step()
    parent.step()
    fork, other = parent.fork(), parent.fork()
    other.set_prompt("a blue cross")
    forked, changed = [], []
    for _ in range(3):  # in turns, so that each would notice what the other writes
        changed.append(other.step())
        forked.append(fork.step())
    assert_same(forked, expected[2:])
    assert_same(list(parent), expected[2:])
    assert not any(torch.equal(a.latents, b.latents) for a, b in zip(forked, changed, strict=True))
    assert changed[0].prompt == ["a blue cross"]
    fork.reset()
    assert parent.done


def written_memory(rollout) -> set[int]:
    """Where the tensors are that a rollout writes in place."""
    blocks = rollout.cache.block_caches
    tensors = [part for block in blocks for buffer in (block._key, block._value) for part in buffer.parts]
    for memory in (
        rollout.denoiser.experts[0]._inputs,
        rollout.conditions._static,
        rollout.conditions._text_kv,
        rollout.cache.slots,
    ):
        assert memory.nbytes
        tensors += memory._memory.values()
    return {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_fork_shares_no_memory_that_is_written(pipe, kv_dtype):
    parent = start(pipe, window_frames=5, kv_dtype=kv_dtype)
    parent.step()
    fork = parent.fork()
    fork.step()
    assert not written_memory(parent) & written_memory(fork)
    assert fork.components is parent.components
    assert fork._guard is not parent._guard
