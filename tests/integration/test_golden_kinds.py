"""How recorded cases are read whose fields their readmes do not spell out."""

import pytest
import torch
from golden_kinds import krea, memflow, recording, sdv2

META = {"num_frame_per_block": 3, "text_len": 4, "batch": 1}


@pytest.mark.parametrize(
    ("recorded", "counts"),
    [
        ({"2": 3}, (3, 4)),
        ({"2": ["p1", 3]}, (3, 4)),
        ({"c02": [1, 3]}, (3, 1, 4)),
        ({"2": {"prompt": 1, "interpolation_steps": 3}}, (3, 1, 4)),
        ([{"chunk": 2, "prompt": 1, "chunks": 3}], (3, 1, 2, 4)),
        ([[2, 3]], (3, 4)),
        ({"2": "p1"}, (4,)),
    ],
)
def test_a_prompt_change_of_krea_is_found_with_the_chunks_that_it_may_take(recorded, counts):
    (change,) = krea.prompt_changes({"prompt_switches": recorded})
    assert change.chunk == 2
    assert change.counts[0] == counts[0]
    assert set(change.counts) == set(counts)


def test_a_prompt_change_that_names_no_chunk_is_refused():
    with pytest.raises(ValueError, match=r"does not find the chunk in the prompt change {'prompt': 1}"):
        krea.prompt_changes({"prompt_switches": [{"prompt": 1}]})


def test_a_new_prompt_of_krea_comes_in_from_the_old_one_and_stays():
    videos = {f"prompt_embeds.{i}_unpadded": torch.full((1, 4, 2), float(i)) for i in range(3)}
    videos["latents"] = torch.zeros(1, 16, 24, 4, 4)
    meta = META | {"prompt_switches": {"1": {"interpolation_steps": 3}, "3": {"interpolation_steps": 2}}}
    schedule = krea.prompt_schedules(meta, videos)[0]
    weights = {frame: prompt.embeds.mean().item() for frame, prompt in schedule.items()}
    assert weights == {0: 0, 3: 0, 6: 0.5, 9: 0.5, 12: 2}  # the second change begins before the first is over


def test_prompts_of_krea_may_be_recorded_by_the_chunk():
    videos = {f"prompt_embeds.c0{i}_unpadded": torch.full((1, 4, 2), float(i)) for i in (0, 2)}
    videos["initial_latent"] = torch.zeros(1, 16, 3, 4, 4)
    (schedule,) = krea.prompt_schedules(META, videos)
    assert {frame: prompt.embeds.mean().item() for frame, prompt in schedule.items()} == {0: 0, 9: 2}


@pytest.mark.parametrize("names", [("0", "1", "2", "3"), ("p0", "p1", "p2", "p3"), ("old0", "old1", "new0", "new1")])
def test_prompts_of_a_batch_may_be_recorded_apart(names):
    videos = {f"prompt_embeds.{name}_unpadded": torch.full((1, 3, 2), float(i)) for i, name in enumerate(names)}
    first, second = recording.prompts_of(videos, META | {"batch": 2}, 2)
    assert [first[i, 0, 0].item() for i in range(2)] == [0, 1]
    assert [second[i, 0, 0].item() for i in range(2)] == [2, 3]
    with pytest.raises(ValueError, match=r"there are 4 prompts, .* for 3"):
        recording.prompts_of(videos, META, 3)


def test_a_full_bank_of_memflow_that_a_new_prompt_left_in_its_order_is_noticed():
    def forward(chunk, *frames):
        return {"chunk": chunk, "bank_after_per_layer": [[*frames]] * 2}

    meta = META | {"bank_size": 3, "switch_frame_indices": [3, 9, 12]}
    forwards = [
        *(forward(0, "0@0", "empty", "empty"), forward(1, "0@0", "3@0", "empty")),  # not full
        *(forward(2, "0@0", "3@0", "6@0"), forward(3, "0@0", "3@0", "9@0"), forward(3, "0@0", "3@0", "9@0")),
        forward(4, "3@0", "9@0", "12@0"),  # another order
    ]
    assert memflow._chunks_with_ties(meta | {"forwards": forwards}) == {3}


def test_chunks_of_a_stream_are_as_large_as_what_enters():
    noise = {"noise.prepare": torch.zeros(1, 16, 3, 4, 4), "noise.call004": torch.zeros(1, 16, 2, 4, 4)}
    assert sdv2._chunk_frames({"num_frame_per_block": 1}, noise) == 2
    assert sdv2._chunk_frames({"num_frame_per_block": 3}, {"noise.prepare": noise["noise.prepare"]}) == 3
