"""Models and settings that do not go together: refused in one line, with what to do, before any model runs."""

import json
import shutil

import pytest
import torch
from saved_rollouts import SIZE
from test_tiny_codec import small_vae
from wan22_folder import make_a14b_folder, make_wan22_folder

from wan_autoregressive import WanAutoregressivePipeline
from wan_autoregressive.scripts import cli


@pytest.fixture
def wan22(tmp_path_factory) -> WanAutoregressivePipeline:
    return WanAutoregressivePipeline.from_pretrained(make_wan22_folder(tmp_path_factory.mktemp("wan22") / "stock"))


def refuses(pipe, monkeypatch, message: str, **settings) -> None:
    def fail(*_, **__):
        raise AssertionError("a model ran")

    with monkeypatch.context() as patch:
        for name in ("text_encoder", "transformer", "transformer_2", "vae"):
            for module in () if getattr(pipe, name) is None else getattr(pipe, name).modules():
                patch.setattr(module, "forward", fail)
        for begin in (lambda **own: pipe.rollout("x", **own), lambda **own: pipe("x", **own), pipe.estimate):
            with pytest.raises(ValueError, match=message) as caught:
                begin(**{**SIZE, "num_frames": 25, **settings})
            assert "\n" not in str(caught.value)


def with_vae(pipe, vae) -> WanAutoregressivePipeline:
    return WanAutoregressivePipeline(**{**pipe.components, "vae": vae})


@pytest.mark.slow
def test_the_vae_of_another_model(pipe, wan22, monkeypatch):
    message = "the VAE has {} latent channels and the transformer {}: they are of different models .* load the VAE"
    refuses(with_vae(pipe, wan22.vae), monkeypatch, message.format(48, 16))
    refuses(with_vae(wan22, pipe.vae), monkeypatch, message.format(16, 48))
    of_wan22 = small_vae(z_dim=48, patch_size=2, scale_factor_spatial=16)
    refuses(with_vae(pipe, of_wan22), monkeypatch, message.format(48, 16))
    refuses(with_vae(wan22, small_vae()), monkeypatch, message.format(16, 48))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "unipc", "sampler": "rolling"}, "works with solver 'renoise', got 'unipc'"),
        ({"solver": "unipc", "sampler": "stream_batch"}, "works with solver 'renoise', got 'unipc'"),
        ({"solver": "unipc", "denoising_steps": (1000, 400)}, "solver 'unipc' takes evenly spaced steps"),
        ({"sampler": "rolling", "given_in_chunk": True}, "given_in_chunk does not work with sampler 'rolling'"),
        ({"memory_bank_frames": 2}, "use sampler 'memory_bank' or leave it out"),
    ],
)
def test_a_solver_and_a_sampler(pipe, monkeypatch, settings, message):
    refuses(pipe, monkeypatch, message, **settings)


@pytest.mark.slow
def test_the_command_refuses_them_in_a_line(tiny_checkpoint, tmp_path, capsys):
    small_vae(z_dim=48, patch_size=2, scale_factor_spatial=16).save_pretrained(tmp_path / "tiny48")
    pair = make_a14b_folder(tmp_path / "pair")
    half = tmp_path / "half"
    shutil.copytree(pair, half)
    shutil.rmtree(half / "transformer_2")
    lonely = tmp_path / "lonely"
    shutil.copytree(tiny_checkpoint, lonely)
    index = json.loads((lonely / "model_index.json").read_text())
    (lonely / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    output = tmp_path / "out" / "x.mp4"
    output.parent.mkdir()
    common = ["generate", "--prompt", "x", "--height", "32", "--width", "32", "--num-frames", "9", "--device", "cpu"]
    capsys.readouterr()
    for words, message in (
        (["--model", tiny_checkpoint, "--tiny-vae", tmp_path / "tiny48"], "48 latent channels and the transformer 16"),
        (["--model", half], "there is no folder 'transformer_2' in it"),
        (["--model", lonely], "boundary_ratio is 0.875, but there is no transformer_2"),
        (["--model", tiny_checkpoint, "--solver", "unipc", "--sampler", "rolling"], "works with solver 'renoise'"),
        (["--model", pair, "--denoising-steps", "1000,950"], "two transformers share them"),
    ):
        assert cli.main([*common, *map(str, words), "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert list(output.parent.iterdir()) == []


@pytest.mark.slow
def test_latents_of_another_model(pipe, wan22):
    with pytest.raises(ValueError, match=r"video_latents has shape .*this video needs \(1, 16, 1, 4, 4\)"):
        pipe.rollout("x", video_latents=torch.zeros(1, 48, 1, 4, 4))
    with pytest.raises(ValueError, match=r"latents has shape .*this video needs \(1, 48, 3, 4, 4\)"):
        wan22.rollout("x", latents=torch.zeros(1, 16, 3, 4, 4))
