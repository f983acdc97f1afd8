"""What a CUDA graph needs: forwards of a kind are the same operations on the same memory, however long the video."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from saved_rollouts import assert_same, noise, start
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from wan_autoregressive import CausalWanTransformer3DModel
from wan_autoregressive.models.forward_plan import ForwardPlan

WINDOW = {"num_frames": 93, "window_frames": 6, "sink_frames": 1, "chunk_frames": 2}  # 12 chunks
CHUNKS_TO_FILL = 3

SIZE = {"num_frames": None, "chunk_frames": 2, "window_frames": 6, "output_type": "latent"}
STREAM_BATCH = {**SIZE, "sampler": "stream_batch", "switch_policy": "cross_attention"}
SAMPLERS = {
    "memory_bank": {**SIZE, "sampler": "memory_bank", "sink_frames": 1, "memory_bank_frames": 2},
    "rolling": {
        **SIZE,
        **{"sampler": "rolling", "sink_frames": 1, "window_frames": 9, "position_mode": "sink_relative"},
        "sampler_options": {"attended_frames": 8},
    },
    "recompute": {
        **SIZE,
        **{"sampler": "recompute", "switch_policy": "cross_attention"},
        "sampler_options": {"context_frames": 3, "keep_first_frame": True},
    },
    "stream_batch": {**STREAM_BATCH, "sink_frames": 1},
    "stream_batch, relative": {**STREAM_BATCH, "sink_frames": 1, "position_mode": "relative"},
    "stream_batch, moved sink": {**STREAM_BATCH, "sink_frames": 1, "position_mode": "sink_relative"},
    "stream_batch, int8": {**STREAM_BATCH, "kv_dtype": "int8"},
    "stream_batch, adaptive sink": {
        **STREAM_BATCH,
        **{"chunk_frames": 1, "sink_frames": 3, "sampler_options": {"adaptive_sink": 0.9}},
    },
}
CONTEXT = {
    "memory_bank": [(True, 2, 4, 1)],
    "rolling": [(True, 2, 4, 1)],
    "recompute": [(True, 1, 4, 1), (True, 2, 4, 1)],
}
STEPS = {"memory_bank": (2, 8), "rolling": (4, 4), "recompute": (2, 8), "stream_batch, adaptive sink": (1, 4)}
CHUNKS_TO_SETTLE = 9

Kind = tuple[bool, int, int]
"""Whether a forward ends with the last keys and values, its latent frames, and its cache."""


class Recording(TorchDispatchMode):
    """The operations under it and their arguments: tensors that were there before by their address.

    `replay` is what a CUDA graph does: the same operations again, on the same memory and with no Python in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self._made: set[int] = set()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operations.append((str(func), *tree_leaves(tree_map(self._described, (args, kwargs)))))
        before = {_memory(arg) for arg in tree_leaves((args, kwargs)) if isinstance(arg, torch.Tensor)}
        result = func(*args, **kwargs)
        self._made |= {_memory(out) for out in tree_leaves(result) if isinstance(out, torch.Tensor)} - before
        self._calls.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, recorded in self._calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and _memory(old) != _memory(new):
                    old.copy_(new)

    def _described(self, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return repr(arg)
        address = "made here" if _memory(arg) in self._made else arg.data_ptr()
        return repr((address, arg.dtype, tuple(arg.shape), arg.stride()))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_ready(plan: ForwardPlan) -> bool:
    """Whether the forward computes neither text nor time on the way, which happens once for each."""
    return plan.time.modulation is not None and plan.text.is_complete


@pytest.fixture
def forwards(monkeypatch) -> dict[Kind, list[list[Any]]]:
    """The operations of every forward that is ready, by what can share a graph."""
    recorded: dict[Kind, list[list[Any]]] = defaultdict(list)
    forward = CausalWanTransformer3DModel.forward

    def record(self, hidden_states, *args, attention_kwargs, **kwargs):
        cache, plan = attention_kwargs["kv_cache"], attention_kwargs["plan"]
        was_ready = is_ready(plan)
        with Recording() as recording:
            result = forward(self, hidden_states, *args, attention_kwargs=attention_kwargs, **kwargs)
        if was_ready:
            recorded[plan.keys_values_only, hidden_states.shape[2], id(cache)].append(recording.operations)
        return result

    monkeypatch.setattr(CausalWanTransformer3DModel, "forward", record)
    return recorded


def counted(forwards: dict[Kind, list[list[Any]]]) -> list[tuple[bool, int, int, int]]:
    """For each kind: whether it ends early, its frames, how many forwards there were and how many different ones."""
    return sorted(
        (ends_early, frames, len(operations), len({tuple(each) for each in operations}))
        for (ends_early, frames, _), operations in forwards.items()
    )


def last_of_each(forwards: dict[Kind, list[list[Any]]]) -> dict[Kind, list[Any]]:
    return {kind: operations[-1] for kind, operations in forwards.items()}


def filled_rollout(pipe, forwards, **options):
    """A rollout whose window is full, with nothing recorded yet."""
    rollout = start(pipe, **{**WINDOW, "output_type": "latent", **options})
    for _ in range(CHUNKS_TO_FILL):
        rollout.step()
    forwards.clear()
    return rollout


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("position_mode", ["absolute", "relative", "sink_relative"])
def test_every_step_is_the_same_operations_on_the_same_memory(pipe, forwards, position_mode, kv_dtype):
    list(filled_rollout(pipe, forwards, position_mode=position_mode, kv_dtype=kv_dtype))
    assert counted(forwards) == [(False, 2, 2 * 9, 1), (True, 2, 9, 1)]  # 2 steps and a clean pass for 9 chunks


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("position_mode", ["absolute", "relative", "sink_relative"])
def test_forwards_that_were_captured_make_the_rest_of_the_video(pipe, monkeypatch, position_mode, kv_dtype):
    """One forward of either kind is captured; all others, a new prompt's as well, are replays of it."""
    options = {**WINDOW, "position_mode": position_mode, "kv_dtype": kv_dtype, "output_type": "latent"}
    options |= {"prompt_schedule": {12: noise(*start(pipe).prompt.embeds.shape)}}
    expected = list(start(pipe, **options))

    captured: dict[bool, tuple[Recording, torch.Tensor | None]] = {}
    replays = 0
    forward = CausalWanTransformer3DModel.forward

    def capture_or_replay(self, *args, attention_kwargs, **kwargs):
        nonlocal replays
        plan = attention_kwargs["plan"]
        if rollout.chunks_done < CHUNKS_TO_FILL or not is_ready(plan):
            return forward(self, *args, attention_kwargs=attention_kwargs, **kwargs)
        if plan.keys_values_only not in captured:
            with Recording() as recording:
                (flow,) = forward(self, *args, attention_kwargs=attention_kwargs, **kwargs)
            captured[plan.keys_values_only] = recording, flow
        else:
            replays += 1
            captured[plan.keys_values_only][0].replay()
        flow = captured[plan.keys_values_only][1]
        return (None if flow is None else flow.clone(),)

    monkeypatch.setattr(CausalWanTransformer3DModel, "forward", capture_or_replay)
    rollout = start(pipe, **options)
    assert_same(list(rollout), expected)
    # Of 9 chunks of 2 steps and a clean pass. A new prompt's first step is computed, and the re-cache replaces a pass.
    assert replays == (2 * 9 - 1 - 1) + (9 - 1 - 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_the_same_operations_on_the_same_memory(pipe, forwards, name):
    """In 4 chunks of 2 steps; lanes take both at once."""
    rollout = start(pipe, **SAMPLERS[name])
    for _ in range(CHUNKS_TO_SETTLE):
        rollout.step()
    forwards.clear()
    for _ in range(4):
        rollout.step()
    frames, count = STEPS.get(name, (2, 4))
    assert counted(forwards) == [(False, frames, count, 1), *CONTEXT.get(name, [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_captured_forwards_make_the_rest_of_a_video_with_every_sampler(pipe, monkeypatch, name):
    rollout, expected = (start(pipe, **SAMPLERS[name]) for _ in range(2))
    for _ in range(CHUNKS_TO_SETTLE):
        assert_same([rollout.step()], [expected.step()])
    expected = [expected.step() for _ in range(5)]
    captured: dict[tuple[bool, int], tuple[Recording, torch.Tensor | None]] = {}
    forward = CausalWanTransformer3DModel.forward

    def capture_or_replay(self, hidden_states, *args, attention_kwargs, **kwargs):
        kind = attention_kwargs["plan"].keys_values_only, hidden_states.shape[2]
        if kind not in captured:
            with Recording() as recording:
                (flow,) = forward(self, hidden_states, *args, attention_kwargs=attention_kwargs, **kwargs)
            captured[kind] = recording, flow
        else:
            captured[kind][0].replay()
        flow = captured[kind][1]
        return (None if flow is None else flow.clone(),)

    monkeypatch.setattr(CausalWanTransformer3DModel, "forward", capture_or_replay)
    assert_same([rollout.step() for _ in range(5)], expected)


def test_guidance_has_its_own_memory_for_either_prompt(pipe, forwards):
    list(filled_rollout(pipe, forwards, guidance_scale=2.0, negative_prompt="blurry"))
    assert counted(forwards) == [(False, 2, 2 * 9, 1)] * 2 + [(True, 2, 9, 1)] * 2


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [("recache", 1), ("cross_attention", 1), ("blend", 1), ("flush", 2), ("cut", 2)],
)
def test_another_prompt_moves_nothing(pipe, forwards, policy, kinds):
    """A re-cache has more frames than a chunk; a blend has new text in every chunk; the last two leave a window that
    is shorter for a chunk."""
    rollout = filled_rollout(pipe, forwards, switch_policy=policy)
    rollout.step()
    before = last_of_each(forwards)
    rollout.step(prompt=noise(*rollout.prompt.embeds.shape))
    list(rollout)
    assert [kind[-1] for kind in counted(forwards)] == [kinds, kinds]
    assert last_of_each(forwards) == before


def test_reset_moves_nothing(pipe, forwards):
    """Even where the first chunk of a video has another size."""
    rollout = filled_rollout(pipe, forwards, first_chunk_frames=1)
    rollout.step()
    before = last_of_each(forwards)
    rollout.reset()
    for _ in range(CHUNKS_TO_FILL + 1):
        rollout.step()
    assert last_of_each(forwards).items() >= before.items()


def test_a_video_without_a_window_differs_in_every_chunk(pipe, forwards):
    """The tests above can fail."""
    rollout = start(pipe, num_frames=None, output_type="latent")
    for _ in range(4):
        rollout.step()
    # The first chunk computes text and time; the newest has had no clean pass yet.
    assert counted(forwards) == [(False, 3, 2 * 3, 3), (True, 3, 2, 2)]
