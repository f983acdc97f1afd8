"""Saved and resumed == never interrupted; a fork and its parent go their own ways; nothing damaged is accepted."""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.cache.cache_state import SAVED_ATTRIBUTES
from wan_autoregressive.models.weights_fingerprint import weights_fingerprint
from wan_autoregressive.pipelines import rollout_state, state_folder
from wan_autoregressive.pipelines.state_folder import read_content

SIZE = {"height": 32, "width": 32}
SHORT = {**SIZE, "num_frames": 49, "num_inference_steps": 2}  # 13 latent frames: chunks of 3, 3, 3, 3, 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def start(pipe, **options):
    options = {"prompt": "a red circle", **SHORT, "generator": generator(), **options}
    return pipe.rollout(**options)


def assert_same(chunks, expected) -> None:
    assert len(chunks) == len(expected)
    for chunk, other in zip(chunks, expected, strict=True):
        assert torch.equal(chunk.latents, other.latents)
        assert (chunk.index, chunk.start_frame, chunk.given) == (other.index, other.start_frame, other.given)
        assert chunk.prompt == other.prompt
        if other.frames is not None:
            assert np.array_equal(chunk.frames, other.frames)


def state_of(rollout) -> dict:
    """Everything of a rollout that is saved, with tensors as bytes, to be compared."""
    tensors: dict[str, torch.Tensor] = {}
    values = rollout_state.pack(rollout_state._contents(rollout), tensors)
    values["attributes"].pop("_seconds_before")
    return {"values": values, "tensors": {name: tensor.clone().numpy().tobytes() for name, tensor in tensors.items()}}


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
    rollout = start(pipe, **options())
    expected = []
    for index in range(5):
        rollout.save(tmp_path / str(index))
        expected.append(rollout.step())
    rollout.save(tmp_path / "5")
    for index in range(6):
        resumed = pipe.resume(tmp_path / str(index))
        assert resumed.done == (index == 5 and rollout.done)
        assert_same([resumed.step() for _ in range(index, 5)], expected[index:])
        assert state_of(resumed) == state_of(rollout)
        assert resumed.cache.allocated_bytes == rollout.cache.allocated_bytes


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
    resumed.generator.manual_seed(0)
    assert_same(list(resumed), expected)


def test_one_generator_for_two_videos_stays_one(pipe, tmp_path):
    shared = generator()
    rollout = start(pipe, prompt=["one", "two"], generator=[shared, shared])
    rollout.step()
    rollout.save(tmp_path)
    resumed, fork = pipe.resume(tmp_path), rollout.fork()
    assert resumed.generator[0] is resumed.generator[1]
    assert fork.generator[0] is fork.generator[1] is not shared
    expected = list(rollout)
    assert_same(list(resumed), expected)
    assert_same(list(fork), expected)


def test_without_a_generator_the_global_state_is_used(pipe, tmp_path):
    rollout = start(pipe, generator=None)
    rollout.save(tmp_path)
    resumed = pipe.resume(tmp_path)
    assert resumed.generator is None
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


def test_a_fork_shares_no_buffer(pipe):
    parent = start(pipe, window_frames=5)
    parent.step()
    fork = parent.fork()
    for mine, theirs in zip(parent.cache.block_caches, fork.cache.block_caches, strict=True):
        assert mine._key.data_ptr() != theirs._key.data_ptr()
        assert mine._value.data_ptr() != theirs._value.data_ptr()
    assert fork.pipe is parent.pipe
    assert fork._lock is not parent._lock


# What cannot be saved or resumed.


def test_during_a_step_and_after_a_failed_one(pipe, tmp_path, monkeypatch):
    said = []

    def save(rollout, block, step, timestep, latents):
        for take in (lambda: rollout.save(tmp_path), rollout.fork):
            try:
                take()
            except RuntimeError as error:
                said.append(str(error))
        return latents

    rollout = start(pipe, on_step_end=save, num_inference_steps=1)
    rollout.step()
    assert said == [f"cannot {verb} this rollout during a step; do it between two steps" for verb in ("save", "fork")]
    monkeypatch.setattr(rollout.scheduler, "step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout.step()
    for take in (lambda: rollout.save(tmp_path), rollout.fork):
        with pytest.raises(RuntimeError, match="a step failed and left it half-written"):
            take()
    assert list(tmp_path.iterdir()) == []


def test_another_thread_in_a_step(pipe, tmp_path):
    entered, release = threading.Event(), threading.Event()

    def wait(rollout, block, step, timestep, latents):
        entered.set()
        release.wait(10)
        return latents

    rollout = start(pipe, on_step_end=wait, num_inference_steps=1)
    thread = threading.Thread(target=rollout.step)
    thread.start()
    entered.wait(10)
    try:
        with pytest.raises(RuntimeError, match="during a step"):
            rollout.save(tmp_path)
    finally:
        release.set()
        thread.join()
    rollout.save(tmp_path)
    assert pipe.resume(tmp_path).chunks_done == 1


def test_a_function_is_given_again(pipe, tmp_path):
    seen = []

    def record(rollout, block, step, timestep, latents):
        seen.append(step)
        return latents

    rollout = start(pipe, on_step_end=record)
    rollout.step()
    rollout.save(tmp_path)
    pipe.resume(tmp_path, on_step_end=record).step()
    assert seen == [0, 1, 2, 3]


def test_attention_kwargs_that_cannot_be_saved(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"_attention_kwargs\.hook holds a function, which cannot be saved"):
        start(pipe, attention_kwargs={"hook": lambda: None}).save(tmp_path)
    start(pipe, attention_kwargs={"scale": 0.5}).save(tmp_path)
    assert pipe.resume(tmp_path)._attention_kwargs == {"scale": 0.5}


def test_every_attribute_has_a_place_in_a_state(pipe):
    """A new attribute of a rollout or a cache must be saved or be known to need no saving."""
    rollout = start(pipe)
    rollout.step()
    known = {*rollout_state.PACKED, *rollout_state.SAVED_APART, *rollout_state.MADE_ANEW}
    assert vars(rollout).keys() <= known
    made_anew = {"block_caches", "window_size", "sink_size", "max_tokens", "position_mode", "sliding_positions"}
    assert vars(rollout.cache).keys() <= {*SAVED_ATTRIBUTES, *made_anew}
    block = {"window", "_key", "_value", "_initial_capacity", "_plan", "_sink_update", "_written_sink_key"}
    assert vars(rollout.cache.block_caches[0]).keys() <= block


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    """A state after two chunks. Tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "state"
    rollout = start(pipe, window_frames=5)
    rollout.step()
    rollout.step()
    rollout.save(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def tensor_file(folder: Path) -> Path:
    (path,) = folder.glob("state-*.safetensors")
    return path


@pytest.fixture
def other_pipe(tiny_checkpoint) -> WanAutoregressivePipeline:
    return WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_other_weights_are_refused(saved, other_pipe, component):
    assert other_pipe.resume(saved).chunks_done == 2
    weight = max(getattr(other_pipe, component).parameters(), key=torch.Tensor.numel)
    with torch.no_grad():
        weight.add_(1e-3)
    with pytest.raises(ValueError, match=f"is of a {component} with other weights: their values differ"):
        other_pipe.resume(saved)


def test_another_model_is_refused_by_name(saved, other_pipe, tiny_checkpoint):
    other_pipe.transformer.set_sinusoid_dtype(torch.float64)
    with pytest.raises(ValueError, match=r"another transformer: sinusoid_dtype was 'torch.float32' and is"):
        other_pipe.resume(saved)
    other_pipe.transformer.set_sinusoid_dtype(torch.float32)
    other_pipe.vae.enable_tiling()
    with pytest.raises(ValueError, match=r"another vae: tiling.use_tiling was False and is True now"):
        other_pipe.resume(saved)
    other_pipe.vae.disable_tiling()
    half = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"another transformer: dtype was 'float32' and is 'bfloat16' now"):
        half.resume(saved)
    without = WanAutoregressivePipeline(None, None, other_pipe.transformer, None, other_pipe.scheduler)
    with pytest.raises(ValueError, match="needs a vae; this pipeline has none"):
        without.resume(saved)
    other_pipe.transformer.register_to_config(num_layers=3)
    with pytest.raises(ValueError, match=r"another transformer: config.num_layers was 2 and is 3 now"):
        other_pipe.resume(saved)


def test_a_generator_cannot_change_its_kind_of_device(pipe, saved):
    assert pipe.resume(saved, generator_device="cpu").generator.device.type == "cpu"
    with pytest.raises(ValueError, match="generator_device is 'cuda', but the saved generator is of a cpu device"):
        pipe.resume(saved, generator_device="cuda")


def test_nothing_there(pipe, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="there is no saved state in"):
            pipe.resume(folder)
    assert list(tmp_path.iterdir()) == []


def test_another_format_is_refused(pipe, copied):
    index = copied / "state.json"
    document = json.loads(index.read_text()) | {"format": 2, "package_version": "9.9"}
    index.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"has format 2, written by version '9.9'; this version reads format 1"):
        pipe.resume(copied)


def test_settings_of_another_version_are_refused(pipe, copied):
    content, tensors = state_folder.read_state(copied)
    content["rollout"]["config"]["turbo"] = True
    content["package_version"] = "9.9"
    state_folder.write_state(copied, content, tensors)
    with pytest.raises(
        ValueError, match=r"saved by version 9.9, whose settings this version .* does not know: .*turbo"
    ):
        pipe.resume(copied)


def test_an_edited_json_is_refused(pipe, copied):
    index = copied / "state.json"
    index.write_text(index.read_text().replace('"chunks_done": 2', '"chunks_done": 1'))
    with pytest.raises(ValueError, match="is damaged or was edited: its checksum does not match"):
        pipe.resume(copied)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_anything_else_in_the_json_is_refused(pipe, copied, content):
    (copied / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        pipe.resume(copied)


def test_missing_and_cut_tensors_are_refused(pipe, copied):
    path = tensor_file(copied)
    content = path.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is cut off or damaged"):
            pipe.resume(copied)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="is cut off or damaged"):
        pipe.resume(copied)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        pipe.resume(copied)


def test_every_flipped_bit_is_found(pipe, copied):
    """In the tensors all of them; in the JSON all but those that leave the content as it was (space to tab)."""
    dice = random.Random(0)
    for path, tries in ((tensor_file(copied), 40), (copied / "state.json", 200)):
        whole = path.read_bytes()
        for _ in range(tries):
            at, bit = dice.randrange(len(whole)), dice.randrange(8)
            broken = bytearray(whole)
            broken[at] ^= 1 << bit
            path.write_bytes(broken)
            if path.name == "state.json" and _same_json(whole, bytes(broken)):
                continue
            with pytest.raises(ValueError, match=r"."):
                pipe.resume(copied)
        path.write_bytes(whole)
    assert pipe.resume(copied).chunks_done == 2


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


# Atomicity.


class Crash(BaseException):
    """Stands in for the end of the process."""


@pytest.mark.parametrize("crash_at", range(8))
def test_a_crash_leaves_the_old_or_the_new_state(pipe, copied, monkeypatch, crash_at):
    rollout = pipe.resume(copied)
    expected = [rollout.step()]
    calls = [0]

    def crashing(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == crash_at + 1:
                raise Crash
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, crashing(getattr(os, name)))
        patch.setattr(state_folder, "save_file", crashing(state_folder.save_file))
        patch.setattr(Path, "unlink", crashing(Path.unlink))
        try:
            rollout.save(copied)
        except Crash:
            pass
        else:
            pytest.fail("every save takes more calls than this")
    resumed = pipe.resume(copied)
    assert resumed.chunks_done in (2, 3)
    if resumed.chunks_done == 2:
        assert_same([resumed.step()], expected)
    assert_same(list(resumed), list(rollout))
    # The next save clears what the crash left.
    rollout.save(copied)
    assert len(list(copied.iterdir())) == 2
    assert pipe.resume(copied).done


def test_the_first_save_is_whole_or_not_there(pipe, tmp_path, monkeypatch):
    rollout = start(pipe)
    monkeypatch.setattr(state_folder, "_checksum", lambda document: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout.save(tmp_path)
    with pytest.raises(ValueError, match="there is no saved state"):
        pipe.resume(tmp_path)


def test_a_folder_with_other_things_in_it(pipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "state-of-the-art.safetensors").write_text("mine too")
    rollout = start(pipe)
    for _ in range(2):
        rollout.step()
        rollout.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "state-of-the-art.safetensors").read_text() == "mine too"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_the_old_state(pipe, tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        rollout = start(pipe, **{"height": 16, "width": 16})
        rollout.step()
        rollout.save(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        (tmp_path / "filler").write_bytes(bytes(max(0, 280_000 - sum(map(len, before.values())))))
        rollout.step()
        with pytest.raises(OSError, match="No space left") as full:
            rollout.save(tmp_path)
        assert full.value.errno == 28
        (tmp_path / "filler").unlink()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Weights.


def test_the_fingerprint_is_made_once_and_notices_changes(other_pipe, monkeypatch):
    from wan_autoregressive.models import weights_fingerprint as module

    made = []
    digest = module._digest_values
    monkeypatch.setattr(module, "_digest_values", lambda tensors: made.append(1) or digest(tensors))
    transformer = other_pipe.transformer
    first = weights_fingerprint(transformer)
    assert weights_fingerprint(transformer) == first
    assert len(made) == 1
    bias = transformer.proj_out.bias
    with torch.no_grad():
        bias[0] += 1
    second = weights_fingerprint(transformer)
    assert (second.layout, len(made)) == (first.layout, 2)
    assert second.values != first.values
    with torch.no_grad():
        bias[0] -= 1
    assert weights_fingerprint(transformer).values in (first.values, second.values)
    assert weights_fingerprint(transformer.to(torch.bfloat16)).layout != first.layout
    assert weights_fingerprint(transformer.to("meta")).values is None


def test_an_adapter_is_other_weights(other_pipe):
    from peft import LoraConfig

    transformer = other_pipe.transformer
    before = weights_fingerprint(transformer)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="a")
    full = weights_fingerprint(transformer)
    assert full.layout != before.layout
    transformer.set_adapters("a", weights=0.5)
    assert weights_fingerprint(transformer).layout != full.layout


def test_notes_are_kept(pipe, tmp_path):
    rollout_state.save_rollout(start(pipe), tmp_path, notes={"segments": [1, 2]})
    assert read_content(tmp_path)["notes"] == {"segments": [1, 2]}


# Not a number.


@pytest.mark.parametrize(("bad", "step"), [(float("nan"), 1), (float("inf"), 2)])
def test_latents_that_are_no_numbers_stop_the_video(pipe, tmp_path, bad, step):
    def spoil(rollout, block, done, timestep, latents):
        return latents.clone().index_fill_(2, torch.tensor([0]), bad) if done == 2 * 1 + step - 1 else latents

    rollout = start(pipe, on_step_end=spoil)
    rollout.step()
    message = (
        rf"the latents of chunk 1 \(latent frames 3 to 5\) hold NaN or infinite values from denoising step {step}"
    )
    with pytest.raises(RuntimeError, match=message):
        rollout.step()
    with pytest.raises(RuntimeError, match="a step of this rollout failed"):
        rollout.step()
