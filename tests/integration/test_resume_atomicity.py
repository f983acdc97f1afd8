"""Saving is all or nothing, and the fingerprint of weights notices what it must."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from saved_rollouts import assert_same, start

from wan_autoregressive.models.weights_fingerprint import weights_fingerprint
from wan_autoregressive.pipelines import state_folder
from wan_autoregressive.pipelines.state_folder import read_content


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
    start(pipe).save(tmp_path, notes={"segments": [1, 2]})
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
    with pytest.raises(RuntimeError, match="a step of it failed"):
        rollout.step()
