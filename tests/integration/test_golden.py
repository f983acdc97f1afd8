"""Parity with the originals: latents, every x0, keys and values. And that the comparison sees what is wrong."""

import json
import shutil

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file

FOLDER = golden.REPOSITORY_CASES / "open"
CASES = {path.stem: path for path in golden.find_cases(FOLDER)}
# With the original's time embedding what is left is rounding.
BOUNDS = {torch.float32: golden.BOUND, torch.float64: 2e-5}


@pytest.mark.parametrize("sinusoid_dtype", BOUNDS, ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(name, sinusoid_dtype):
    found = golden.differences(CASES[name], sinusoid_dtype=sinusoid_dtype)
    assert {"latents", "x0"} <= set(found)
    assert max(found.values()) <= BOUNDS[sinusoid_dtype], found


def doubled(meta, tensors):
    """Two videos of the same."""
    meta |= {"batch": 2, "prompt_of_chunk": 2 * meta["prompt_of_chunk"]}
    return {name: t if name.startswith("prompt") else torch.cat([t, t]) for name, t in tensors.items()}


def guided_by_itself(meta, tensors):
    """Against a negative prompt that is the prompt guidance changes nothing."""
    meta |= {"guidance_scale": 3.0, "negative_prompt": "p0"}
    twins = [{**forward, "branch": "uncond"} for forward in meta["forwards"]]
    meta["forwards"] = [twin for pair in zip(meta["forwards"], twins, strict=True) for twin in pair]
    return tensors


def extended(meta, tensors):
    """Given its first chunk a video is what it was: clean latents are cached alike."""
    meta["prompt_of_chunk"] = [prompts[1:] for prompts in meta["prompt_of_chunk"]]
    meta["forwards"] = meta["forwards"][meta["schedule"]["steps"] :]  # the clean pass caches the given chunk
    tensors |= {"initial_latent": tensors["latents"][:, :8], "noise": tensors["noise"][:, 8:]}
    numbered = {name: t for name, t in tensors.items() if name.startswith(("x0.", "input."))}
    for name, tensor in numbered.items():
        del tensors[name]
        kind, chunk, step = name.split(".")
        if chunk != "c00":
            tensors[f"{kind}.c{int(chunk[1:]) - 1:02}.{step}"] = tensor
    return tensors


@pytest.mark.parametrize("change", [doubled, guided_by_itself, extended])
def test_equals_the_original_where_a_change_makes_no_difference(change):
    path = CASES["ll2_t2v_48f"]
    meta, tensors = golden.load_case(path)
    tensors = {name: tensor.contiguous() for name, tensor in change(meta, tensors).items()}
    kind = golden.kind_of(path, meta)
    found = kind.differences(meta, tensors, golden.weights_folder_of(path, meta, kind))
    assert set(found) == {"latents", "x0", "inputs", "kv"}
    assert max(found.values()) <= golden.BOUND, found


# Deliberate mistakes must be far outside the bound, or the comparison would show nothing.
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("a_t2v_chunk3", {"chunk_frames": 7}),
        ("a_t2v_chunk3", {"window_frames": 6}),
        ("a_t2v_chunk3", {"context_noise": 100}),
        ("a_t2v_chunk3", {"denoising_steps": (1000, 750, 500, 251)}),
        ("c_window6_sink0", {"window_frames": 9}),
        ("c_window6_sink0", {"window_frames": 7, "sink_frames": 1}),
        ("d_window9_sink3", {"sink_frames": 0}),
        ("d_window9_sink3", {"sink_frames": 2}),
        ("ll_switch_window9_sink3_keep", {"recache_sink": "refresh"}),
        ("ll_switch_window9_sink3_keep", {"switch_policy": "cross_attention"}),
        ("ll2_t2v_48f", {"window_frames": 40}),
        ("ll2_t2v_48f", {"sink_frames": 0}),
        ("ll2_t2v_48f", {"context_noise": 100}),
        ("ll2_t2v_48f", {"num_inference_steps": 5}),
        ("ll2_t2v_48f", {"position_mode": "relative"}),
        ("ll2_shots_56f", {"switch_policy": "cross_attention", "switch_options": {}}),
        ("ll2_shots_56f", {"switch_policy": "recache", "switch_options": {}}),
        *(
            ("ll2_shots_56f", {"switch_options": {"words": "The scene transitions. ", **wrong}})
            for wrong in ({"words": ""}, {"pin": False}, {"position_offset": 7.5}, {"clean_recache": True})
        ),
    ],
)
def test_a_mistake_is_seen(name, mistake):
    assert golden.differences(CASES[name], **mistake)["latents"] > 1e-3


def copied(name: str, folder):
    for path in (CASES[name], CASES[name].with_suffix(".safetensors")):
        shutil.copy(path, folder)
    return folder / f"{name}.json"


def test_the_command_runs_the_cases_of_any_folder(tmp_path, capsys):
    copied("g_batch2", tmp_path)
    copied("e_extension6", tmp_path)
    (tmp_path / "no_case.json").write_text("{}")
    assert golden.main([str(tmp_path), "--only", "g_"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("ok     g_batch2  latents ")
    assert lines[1].startswith("1 of 1 within 0.0001; the worst is g_batch2 with ")


@pytest.mark.parametrize("key", ["latents", "x0.c01.s2", "kv.initial.c01.v"])
def test_the_command_fails_for_a_difference_anywhere(key, tmp_path, capsys):
    path = copied("e_extension6", tmp_path).with_suffix(".safetensors")
    tensors = load_file(path)
    tensors[key].view(-1)[7] += 2e-4
    save_file(tensors, path)
    assert golden.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith("FAILED e_extension6  latents ")


def test_the_command_fails_for_what_it_cannot_run(tmp_path, capsys):
    path = copied("e_extension6", tmp_path)
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "upstream": "somebody/else"}))
    copied("g_batch2", tmp_path)
    assert golden.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAILED e_extension6: ValueError: no kind knows it")
    assert lines[1].startswith("ok     g_batch2")
    assert lines[2].startswith("1 of 2 within 0.0001; the worst is e_extension6 with inf")
    assert golden.main([str(tmp_path), "--only", "z"]) == 1
