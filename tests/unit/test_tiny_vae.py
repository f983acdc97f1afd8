"""The tiny VAE on whole videos, against its convolutions written out in three dimensions; loading, sizes, refusals."""

import functools
import inspect
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from wan_autoregressive.models import AutoencoderTinyWan
from wan_autoregressive.models.streaming_vae import denormalize_latents, normalize_latents
from wan_autoregressive.models.tiny_vae_costs import tiny_vae_decode_flops
from wan_autoregressive.models.tiny_vae_layers import MemoryBlock, SuperMemoryBlock, TimeGrowth, TimePool

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NARROW = {"z_dim": 4, "encoder_width": 5, "decoder_widths": [7, 6, 5, 4], "blocks_per_stage": 2}
KINDS = {
    "wan21": NARROW,
    "wan22": NARROW | {"patch_size": 2, "scale_factor_spatial": 16},
    "super": NARROW | {"patch_size": 2, "scale_factor_spatial": 16, "decoder_type": "super"},
    # other stages, other places of the time layers
    "flat": NARROW
    | {"patch_size": 4, "encoder_time_pools": [4], "decoder_time_growths": [4], "decoder_widths": [6, 5]},
    "early": NARROW | {"encoder_time_pools": [1, 2, 2], "decoder_time_growths": [2, 2, 1], "blocks_per_stage": 1},
}
BOUND = 1e-5

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@functools.cache
def make_vae(kind):
    torch.manual_seed(0)
    vae = AutoencoderTinyWan(**KINDS[kind]).eval()
    for parameter in vae.parameters():  # so that all layers matter: by default the signal dies away
        parameter.data *= 1.7
    return vae


def random_latents(vae, frames=5, batch=2, height=3, width=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator)


def random_video(vae, frames=17, batch=2, height=3, width=2, seed=1):
    ratio, generator = vae.config.scale_factor_spatial, torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height * ratio, width * ratio, generator=generator) * 2 - 1


# --- the oracle: one pass over the whole video, memory as causal 3-D convolutions ----------------------------------


def per_frame(function, x):
    out = function(x.transpose(1, 2).flatten(0, 1))
    return out.unflatten(0, (len(x), -1)).transpose(1, 2)


def causal_conv(x, weight_now, weight_past, bias=None, groups=1):
    pad = weight_now.shape[-1] // 2
    kernel = torch.stack([weight_past, weight_now], dim=2)
    return F.conv3d(F.pad(x, (pad, pad, pad, pad, 1, 0)), kernel, bias, groups=groups)


def naive(layers, x):
    """Video (batch, channels, frames, height, width) through `layers`."""
    for layer in layers:
        channels = x.shape[1]
        if isinstance(layer, MemoryBlock):
            first = layer.conv[0]
            hidden = causal_conv(x, first.weight[:, :channels], first.weight[:, channels:], first.bias)
            x = (per_frame(layer.conv[1:], hidden) + x).relu()
        elif isinstance(layer, SuperMemoryBlock):
            now, past = layer.conv[0].weight.split(channels)
            zero = torch.zeros_like(now)
            hidden = [causal_conv(x, now, zero, groups=channels), causal_conv(x, zero, past, groups=channels)]
            x = per_frame(layer.conv[1:], torch.cat(hidden, dim=1)) + x
        elif isinstance(layer, TimePool):
            kernel = layer.conv.weight.unflatten(1, (layer.stride, channels)).transpose(1, 2)
            x = F.conv3d(x, kernel, stride=(layer.stride, 1, 1))
        elif isinstance(layer, TimeGrowth):
            x = per_frame(layer.conv, x).unflatten(1, (layer.stride, channels)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        else:
            x = per_frame(layer, x)
    return x


@each_kind
def test_decode_equals_the_oracle(kind):
    vae = make_vae(kind)
    latents = 2 * random_latents(vae, 5)
    frames = per_frame(lambda x: F.pixel_shuffle(x, vae.config.patch_size or 1), naive(vae.decoder, latents))[:, :, 3:]
    assert (frames < 0).any(), "nothing is clamped: the clamp would go unchecked"
    got = vae.decode(latents).sample
    assert got.shape == (2, 3, 17, *(size * vae.config.scale_factor_spatial for size in (3, 2)))
    torch.testing.assert_close(got, frames.clamp(0, 1) * 2 - 1, rtol=0, atol=BOUND)
    assert got.std() > 0.05, "a constant picture would compare nothing"
    assert torch.equal(vae.decode(latents, return_dict=False)[0], got)


@each_kind
@pytest.mark.parametrize("frames", [1, 8, 17])
def test_encode_equals_the_oracle(kind, frames):
    vae = make_vae(kind)
    video = random_video(vae, frames)
    padded = torch.cat([video] + [video[:, :, -1:]] * (-frames % 4), dim=2)
    patches = per_frame(lambda x: F.pixel_unshuffle(x, vae.config.patch_size or 1), padded / 2 + 0.5)
    got = vae.encode(video).latent_dist.mode()
    assert got.shape == (2, 4, -(-frames // 4), 3, 2)
    torch.testing.assert_close(got, naive(vae.encoder, patches), rtol=0, atol=BOUND)
    assert torch.equal(vae.encode(video).latent_dist.sample(), got)
    assert torch.equal(vae.encode(video, return_dict=False)[0].mode(), got)


@each_kind
def test_decode_flops_are_those_that_torch_counts(kind):
    vae = make_vae(kind)
    ratio = vae.config.scale_factor_spatial
    for frames in (1, 4):
        with FlopCounterMode(display=False) as counter:
            vae.decode(random_latents(vae, frames))
        assert frames * tiny_vae_decode_flops(vae, 2, 3 * ratio, 2 * ratio) == counter.get_total_flops()
    with pytest.raises(ValueError, match=f"multiples of {ratio}"):
        tiny_vae_decode_flops(vae, 2, 3 * ratio + 1, 2 * ratio)


# --- latent space --------------------------------------------------------------------------------------------------


def test_normalised_latents_pass_through_denormalising():
    """What `WanPipeline` does before it decodes leaves them as they are."""
    vae = make_vae("wan21")
    latents = random_latents(vae)
    assert torch.equal(denormalize_latents(vae, latents), latents)
    assert torch.equal(normalize_latents(vae, latents), latents)


def test_raw_latents_have_the_statistics_of_wan():
    stock = inspect.signature(AutoencoderKLWan).parameters
    vae = AutoencoderTinyWan(latent_space="raw", **NARROW | {"z_dim": 16})
    assert vae.config.latents_mean == list(stock["latents_mean"].default)
    assert vae.config.latents_std == list(stock["latents_std"].default)
    five_b = AutoencoderTinyWan(latent_space="raw", **NARROW | {"z_dim": 48})
    assert {len(five_b.config.latents_mean), len(five_b.config.latents_std)} == {48}
    assert min(five_b.config.latents_std) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_space": "normalized"}, "allowed are 'normalised' and 'raw'"),
        ({"latent_space": "raw"}, "raw latent space of 4 channels needs latents_mean"),
        ({"latent_space": "raw", "latents_mean": [0.0] * 4}, "together"),
        ({"latent_space": "raw", "latents_mean": [0.0] * 4, "latents_std": [1.0] * 3}, "4 and 3 numbers; z_dim is 4"),
        ({"latents_mean": [0.5] * 4, "latents_std": [1.0] * 4}, "need latent_space='raw'"),
        ({"decoder_type": "big"}, "allowed are 'plain' and 'super'"),
        ({"decoder_widths": [4, 4]}, "2 entries; 3 decoder_time_growths"),
        ({"patch_size": 2}, "scale_factor_spatial is 8, but patch_size and the stages give 16"),
        ({"encoder_time_pools": [2, 2]}, "scale_factor_spatial is 8, but patch_size and the stages give 4"),
        ({"encoder_time_pools": [2, 2, 2]}, "scale_factor_temporal is 4, but patch_size and the stages give 8"),
        ({"decoder_time_growths": [1, 1, 2]}, "scale_factor_temporal is 4, but patch_size and the stages give 2"),
    ],
)
def test_contradicting_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderTinyWan(**NARROW | arguments)


# --- files ---------------------------------------------------------------------------------------------------------


@each_kind
def test_saved_and_loaded_is_the_same(kind, tmp_path):
    vae = make_vae(kind)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderTinyWan.from_pretrained(tmp_path)
    ours, theirs = ({k: v for k, v in model.config.items() if not k.startswith("_")} for model in (vae, loaded))
    assert theirs == {k: list(v) if isinstance(v, tuple) else v for k, v in ours.items()}
    assert torch.equal(loaded.decode(random_latents(vae)).sample, vae.decode(random_latents(vae)).sample)


def test_raw_statistics_survive_saving(tmp_path):
    arguments = NARROW | {
        "latent_space": "raw",
        "latents_mean": [0.1, 0.2, 0.3, 0.4],
        "latents_std": [1.0, 2.0, 3.0, 4.0],
    }
    AutoencoderTinyWan(**arguments).save_pretrained(tmp_path)
    loaded = AutoencoderTinyWan.from_pretrained(tmp_path)
    assert (loaded.config.latent_space, loaded.config.latents_mean) == ("raw", arguments["latents_mean"])
    latents = random_latents(loaded)
    expected = latents * torch.tensor(arguments["latents_std"]).view(1, 4, 1, 1, 1) + torch.tensor(
        arguments["latents_mean"]
    ).view(1, 4, 1, 1, 1)
    torch.testing.assert_close(denormalize_latents(loaded, latents), expected)


@pytest.mark.parametrize(
    ("name", "z_dim", "patch", "decoder_type"),
    [("taew2_1", 16, None, "plain"), ("taew2_2", 48, 2, "plain"), ("taew2_2_super", 48, 2, "super")],
)
def test_a_published_file_tells_its_sizes(name, z_dim, patch, decoder_type):
    path = GOLDEN / "tiny_vae" / f"{name}_tiny.pth"
    vae = AutoencoderTinyWan.from_single_file(path)
    published = torch.load(path, weights_only=True)
    assert {key: value.shape for key, value in vae.state_dict().items()} == {k: v.shape for k, v in published.items()}
    assert all(torch.equal(value, published[key]) for key, value in vae.state_dict().items())
    assert not vae.training
    config = vae.config
    assert (config.z_dim, config.patch_size, config.decoder_type) == (z_dim, patch, decoder_type)
    assert (config.scale_factor_spatial, config.scale_factor_temporal) == (8 * (patch or 1), 4)
    assert vae.decode(random_latents(vae, 2)).sample.shape == (2, 3, 5, 24 * (patch or 1), 16 * (patch or 1))


def test_the_super_file_decodes_as_the_oracle():
    vae = AutoencoderTinyWan.from_single_file(GOLDEN / "tiny_vae" / "taew2_2_super_tiny.pth")
    latents = random_latents(vae, 4)
    frames = per_frame(lambda x: F.pixel_shuffle(x, 2), naive(vae.decoder, latents))[:, :, 3:]
    torch.testing.assert_close(vae.decode(latents).sample, frames.clamp(0, 1) * 2 - 1, rtol=0, atol=1e-4)


def test_a_light_tae_in_half_precision(tmp_path):
    """Same names and shapes as taew2_1, other latents: only the caller can know."""
    weights = torch.load(GOLDEN / "tiny_vae" / "taew2_1_tiny.pth", weights_only=True)
    save_file({key: value.half() for key, value in weights.items()}, tmp_path / "lighttaew2_1.safetensors")
    vae = AutoencoderTinyWan.from_single_file(tmp_path / "lighttaew2_1.safetensors", latent_space="raw")
    assert vae.dtype == torch.float16
    assert (vae.config.latent_space, len(vae.config.latents_std)) == ("raw", 16)
    assert (
        AutoencoderTinyWan.from_single_file(tmp_path / "lighttaew2_1.safetensors", dtype=torch.float32).dtype
        == torch.float32
    )


def broken_files():
    weights = torch.load(GOLDEN / "tiny_vae" / "taew2_1_tiny.pth", weights_only=True)
    yield "an image model", {"encoder.0.weight": torch.zeros(8, 3, 3, 3), "decoder.1.weight": torch.zeros(8, 16, 3, 3)}
    yield "a transformer", {"blocks.0.weight": torch.zeros(4, 4)}
    yield "vectors", {key: value.flatten() for key, value in weights.items()}
    yield "without its decoder", {key: value for key, value in weights.items() if key.startswith("encoder")}
    yield "without a bias", {key: value for key, value in weights.items() if key != "decoder.22.bias"}
    yield "with more", weights | {"head.weight": torch.zeros(4)}
    yield "cut in width", weights | {"encoder.9.conv.2.weight": torch.zeros(8, 7, 3, 3)}
    yield "pooling of nothing", weights | {"encoder.2.conv.weight": torch.zeros(8, 4, 1, 1)}
    yield "growth of nothing", weights | {"decoder.13.conv.weight": torch.zeros(4, 16, 1, 1)}
    yield "four channels", weights | {"encoder.0.weight": torch.zeros(8, 4, 3, 3)}
    yield "one channel", weights | {"encoder.0.weight": torch.zeros(8, 1, 3, 3)}


@pytest.mark.parametrize(
    ("name", "state_dict"), list(broken_files()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_no_tiny_vae_is_refused_in_one_line(name, state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth") as error:
        AutoencoderTinyWan.from_single_file(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)


class Harmful:
    def __reduce__(self):
        return print, ("code was run",)


def test_files_are_never_run(tmp_path, capsys):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"encoder.0.weight": Harmful()}, protocol=2))
    with pytest.raises(ValueError, match=r"weights\.pth"):
        AutoencoderTinyWan.from_single_file(tmp_path / "weights.pth")
    assert "code was run" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not exist"):
        AutoencoderTinyWan.from_single_file(tmp_path / "absent.pth")


# --- input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(4, 2, 3, 2), (1, 3, 2, 3, 2), (1, 4, 0, 3, 2), (0, 4, 1, 3, 2), (1, 4, 1, 3, 2, 1)]
)
def test_decode_refuses_wrong_shapes(shape):
    with pytest.raises(ValueError, match=r"latents must be .*\(batch, 4, frames, height, width\)"):
        make_vae("wan21").decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 12, 1, 16, 16), r"video must be .*\(batch, 3, frames"),
        ((1, 3, 0, 16, 16), "without empty"),
        ((1, 3, 1, 24, 16), "video is 24x16 pixels; both must be multiples of 16"),
        ((1, 3, 1, 16, 17), "video is 16x17 pixels; both must be multiples of 16"),
    ],
)
def test_encode_refuses_wrong_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        make_vae("wan22").encode(torch.zeros(shape))


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"floating point.*torch\.uint8"):
        make_vae("wan21").encode(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))
