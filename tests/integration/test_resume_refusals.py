"""States that cannot be saved or must not be resumed: every one is refused with its reason."""

import json
import random
import threading
from pathlib import Path

import pytest
import torch
from saved_rollouts import start

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.pipelines import state_folder


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
    assert [text.partition(";")[0] for text in said] == [
        f"cannot {verb} this rollout while it is in use" for verb in ("save", "fork")
    ]
    monkeypatch.setattr(rollout.schedulers[1], "step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout.step()
    for take in (lambda: rollout.save(tmp_path), rollout.fork):
        with pytest.raises(RuntimeError, match="a step of it failed"):
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
        with pytest.raises(RuntimeError, match="while it is in use"):
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
    with pytest.raises(ValueError, match=r"attention_kwargs\.hook holds a function, which cannot be saved"):
        start(pipe, attention_kwargs={"hook": lambda: None}).save(tmp_path)
    start(pipe, attention_kwargs={"scale": 0.5}).save(tmp_path)
    assert pipe.resume(tmp_path).state_dict()["denoiser"]["experts"][0]["attention_kwargs"] == {"scale": 0.5}


@pytest.mark.parametrize("damage", [lambda state: state.pop("noise"), lambda state: state["counters"].clear()])
def test_a_whole_folder_with_an_odd_state_is_refused_in_one_line(pipe, copied, damage):
    content, tensors = state_folder.read_state(copied)
    damage(content["rollout"])
    state_folder.write_state(copied, content, tensors)
    with pytest.raises(ValueError, match=r"is not a whole rollout of this version: KeyError"):
        pipe.resume(copied)


def tensor_file(folder: Path) -> Path:
    (path,) = folder.glob("state-*.safetensors")
    return path


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
    assert pipe.resume(saved, generator_device="cpu").noise.generator.device.type == "cpu"
    with pytest.raises(ValueError, match="generator_device is 'cuda', but the saved generator is of a cpu device"):
        pipe.resume(saved, generator_device="cuda")


def test_nothing_there(pipe, tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="there is no saved state in"):
            pipe.resume(folder)
    assert list(tmp_path.iterdir()) == []


def test_another_format_is_refused(pipe, copied):
    index = copied / "state.json"
    document = json.loads(index.read_text()) | {"format": 1, "package_version": "0.1.0"}
    index.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"has format 1, written by version '0.1.0'; this version reads format 2"):
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


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 2}'])
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
