"""Rollouts whose VAE state is parked between chunks make the same video."""

import numpy as np
import pytest
import torch
import yaml
from saved_rollouts import assert_same, start, state_of

from wan_autoregressive.pipelines import chunk_pixels
from wan_autoregressive.scripts.cli import main

OPTIONS = {"window_frames": 5, "sink_frames": 1}


@pytest.fixture
def parks_on_a_cpu(monkeypatch) -> None:
    """Copy the state between chunks as if the VAE were on a GPU."""
    new = chunk_pixels.new_decoder

    def new_decoder(codec, park):
        decoder = new(codec, park)
        assert decoder.parking_device is None
        if park:
            decoder.parking_device = torch.device("cpu")
        return decoder

    monkeypatch.setattr(chunk_pixels, "new_decoder", new_decoder)


@pytest.mark.parametrize("alongside", [False, True])
def test_the_same_bits(pipe, parks_on_a_cpu, alongside):
    expected = list(start(pipe, **OPTIONS))
    assert_same(list(start(pipe, **OPTIONS, park_vae_state=True).chunks(alongside)), expected)


def test_saved_forked_and_reset_as_without(pipe, parks_on_a_cpu, tmp_path):
    plain, parked = start(pipe, **OPTIONS), start(pipe, **OPTIONS, park_vae_state=True)
    for _ in range(2):
        plain.step()
        parked.step()
    parked.save(tmp_path / "state")
    assert state_of(parked)["tensors"] == state_of(plain)["tensors"]
    resumed, twin = pipe.resume(tmp_path / "state"), parked.fork()
    assert resumed.vae_decoder.parking_device == twin.vae_decoder.parking_device == torch.device("cpu")
    expected = list(plain)
    for each in (resumed, twin, parked):
        assert_same(list(each), expected)
    parked.reset()
    plain.reset()
    assert np.array_equal(parked.step().frames, plain.step().frames)


@pytest.mark.parametrize(("device", "parking_device"), [("cpu", None), ("cuda", torch.device("cpu"))])
def test_only_a_vae_on_another_device_than_the_cpu_parks(pipe, monkeypatch, device, parking_device):
    monkeypatch.setattr(chunk_pixels, "get_module_execution_device", lambda vae: torch.device(device))
    assert start(pipe, park_vae_state=True).vae_decoder.parking_device == parking_device
    assert start(pipe).vae_decoder.parking_device is None


def test_the_flag_reaches_the_rollout(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["generate", "--model", str(tiny_checkpoint), "--prompt", "rain", "--output", str(tmp_path / "x.mp4")]
    arguments += ["--height", "32", "--width", "32", "--num-frames", "1", "--steps", "1", "--park-vae-state"]
    assert main([*arguments, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["config"]["park_vae_state"] is True
    seen = []
    new = chunk_pixels.new_decoder
    monkeypatch.setattr(chunk_pixels, "new_decoder", lambda codec, park: seen.append(park) or new(codec, park))
    assert main(arguments) == 0
    assert seen == [True]
