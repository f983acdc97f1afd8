"""What a CUDA graph needs: tensors that outlive a forward stay where they are."""

import pytest
import torch
from saved_rollouts import noise, start

from wan_autoregressive.cache import WanKVBlockCache

WINDOW = {"num_frames": 93, "window_frames": 6, "sink_frames": 1, "chunk_frames": 2}  # 12 chunks


def addresses(rollout) -> dict[str, int]:
    """Where keys, values and conditions are."""
    tensors: dict[str, torch.Tensor] = {}
    for index, block in enumerate(rollout.cache.block_caches):
        for kind, buffer in (("key", block._key), ("value", block._value)):
            tensors |= {f"block {index} {kind} {part}": tensor for part, tensor in enumerate(buffer.parts)}
    for prompt, (_, text) in rollout.conditions._texts.items():
        for index, block in enumerate(text.blocks):
            tensors |= {f"text {prompt} {index} key": block.key, f"text {prompt} {index} value": block.value}
    for timestep, time in rollout.conditions._times.items():
        tensors |= {f"time {timestep} temb": time.temb, f"time {timestep} modulation": time.modulation}
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("position_mode", ["absolute", "relative", "sink_relative"])
def test_nothing_moves_after_the_first_chunk(pipe, monkeypatch, position_mode, kv_dtype):
    attended: dict[WanKVBlockCache, set[tuple[int, int]]] = {}
    write = WanKVBlockCache.write

    def watched(self, key, value):
        key, value = write(self, key, value)
        attended.setdefault(self, set()).add((key.data_ptr(), value.data_ptr()))
        return key, value

    monkeypatch.setattr(WanKVBlockCache, "write", watched)
    rollout = start(pipe, **WINDOW, position_mode=position_mode, kv_dtype=kv_dtype, output_type="latent")
    rollout.step()
    before = addresses(rollout)
    # Keys and values of both, text of both, and two time tensors for each of the two steps.
    blocks = len(rollout.cache.block_caches)
    assert len(before) == blocks * 2 * (1 if kv_dtype is None else 2) + blocks * 2 + 2 * 2
    for _ in rollout:
        now = addresses(rollout)
        assert before.items() <= now.items()
        before = now
    assert f"time {rollout.config.context_noise} temb" in before
    if kv_dtype is None:  # int8 is scaled back into new memory
        own = [(block._key.parts[0].data_ptr(), block._value.parts[0].data_ptr()) for block in attended]
        assert list(attended.values()) == [{pair} for pair in own]
        assert len(own) == blocks


def test_a_window_that_grows_does_move(pipe):
    """Without a window and an end the buffers double: the test above can fail."""
    rollout = start(pipe, num_frames=None, output_type="latent")
    rollout.step()
    before = addresses(rollout)
    rollout.step()
    assert not before.items() <= addresses(rollout).items()


def test_another_prompt_leaves_keys_and_values_in_place(pipe):
    rollout = start(pipe, **WINDOW, output_type="latent")
    for _ in range(3):
        rollout.step()
    before = addresses(rollout)
    rollout.step(prompt=noise(*rollout.prompt.embeds.shape))
    kept = {name: place for name, place in before.items() if not name.startswith("text")}
    assert kept.items() <= addresses(rollout).items()
