"""Parity with the original TAEHV: frames, latents, and what its streaming coder holds on the way."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wan_autoregressive.models import AutoencoderTinyWan
from wan_autoregressive.models.tiny_vae_layout import layout_of
from wan_autoregressive.models.tiny_vae_stream import TinyVaeDecoder, TinyVaeEncoder

FOLDER = Path(__file__).parents[1] / "data" / "golden" / "tiny_vae"
CASES = sorted(path.stem for path in FOLDER.glob("taehv*.json"))
BOUND = 1e-4

each_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@functools.cache
def load(name):
    """The case's json, its tensors, video as (batch, channels, frames, height, width), and the model."""
    meta = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = load_file(FOLDER / f"{name}.safetensors")
    tensors = {key: t.transpose(1, 2) if t.ndim == 5 else t for key, t in tensors.items()}
    return meta, tensors, AutoencoderTinyWan.from_single_file(FOLDER / Path(meta["weights"]["file"]).name)


def check(what, got, expected):
    difference = (got - expected).abs().max().item()
    print(f"{what}: maximal difference {difference:.3g}")
    torch.testing.assert_close(got, expected, rtol=0, atol=BOUND)


@each_case
def test_whole_video_equals_the_original(name):
    _, tensors, vae = load(name)
    check("frames", vae.decode(tensors["latents"]).sample / 2 + 0.5, tensors["frames"])
    check("encoded", vae.encode(tensors["frames"] * 2 - 1).latent_dist.mode(), tensors["encoded"])


@each_case
def test_stream_equals_the_original_frame_by_frame(name):
    meta, tensors, vae = load(name)
    decoder = TinyVaeDecoder(vae)
    frames = [decoder.decode(latent) for latent in tensors["latents"].split(1, dim=2)]
    assert [part.shape[2] for part in frames] == meta["streaming_decode_frames_per_latent"]
    check("frames", torch.cat(frames, dim=2) / 2 + 0.5, tensors["frames"])

    encoder = TinyVaeEncoder(vae)
    latents = [encoder.encode(frame).mode() for frame in (tensors["frames"] * 2 - 1).split(1, dim=2)]
    assert [part.shape[2] for part in latents] == meta["streaming_encode_latents_per_frame"]
    latents.append(encoder.finish().mode())
    assert latents[-1].shape[2] == meta["streaming_flush_latents"]
    check("encoded", torch.cat(latents, dim=2), tensors["encoded"])


@each_case
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_streaming_state_equals_the_original(name, part):
    _, tensors, vae = load(name)
    recorded = {key: value for key, value in tensors.items() if key.startswith(f"{part}_memory")}
    (after,) = {int(key.split(".")[1].removeprefix("after")) for key in recorded}
    stream = TinyVaeDecoder(vae) if part == "decoder" else TinyVaeEncoder(vae)
    if part == "decoder":
        stream.decode(tensors["latents"][:, :, :after])
    else:
        stream.encode(tensors["frames"][:, :, :after] * 2 - 1)
    state = {key: value for key, value in stream.state_dict().items() if key not in ("meta", "memory.last_frame")}
    for key, expected in recorded.items():
        layer, *pool = key.split(".b")[1].split(".pool")
        held = state.pop(f"memory.{int(layer)}")
        check(key, held[:, int(pool[0])] if pool else held, expected)
    assert not state, "more is held than in the original"


@pytest.mark.parametrize("name", ["taew2_1", "taew2_2"])
def test_full_width_has_the_published_names_and_shapes(name):
    shapes = {key: tuple(s) for key, s in json.loads((FOLDER / f"{name}_state_dict_shapes.json").read_text()).items()}
    with torch.device("meta"):
        read_off = AutoencoderTinyWan(**layout_of(shapes))
        by_default = AutoencoderTinyWan(
            **({"z_dim": 48, "patch_size": 2, "scale_factor_spatial": 16} if "2_2" in name else {})
        )
    for model in (read_off, by_default):
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


# Deliberate mistakes must be far outside the bound, or the comparison would show nothing.
@each_case
def test_a_mistake_is_seen(name):
    _, tensors, vae = load(name)
    latents, frames = tensors["latents"], tensors["frames"]
    decoder = TinyVaeDecoder(vae)
    forgetful = torch.cat(
        [decoder.decode(latents[:, :, :3]), TinyVaeDecoder(vae).decode(latents[:, :, 2:])[:, :, 1:]], 2
    )
    assert (forgetful / 2 + 0.5 - frames).abs().max() > 1e-2
    padded_in_front = torch.cat([frames[:, :, :1]] * 3 + [frames], dim=2)
    encoded = vae.encode(padded_in_front * 2 - 1).latent_dist.mode()
    assert (encoded - tensors["encoded"]).abs().max() > 1e-2
