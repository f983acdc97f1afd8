"""The streaming VAE against its oracle: one whole `vae.decode` or `vae.encode` by diffusers, bit by bit.

Latents are 4 x 4: for a multiple of 16 positions the 1x1x1 convolutions round the same over one frame and over many,
whatever the CPU. Other sizes are compared to the bit with a loop that convolves the same chunks.
"""

import functools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wan_autoregressive.models.streaming_vae import (
    StreamingVaeDecoder,
    StreamingVaeEncoder,
    denormalize_latents,
    normalize_latents,
    vae_state_bytes,
)

WAN21 = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WAN21 |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.8184, 0.7, 1.0]}
# As in Wan2.2-TI2V-5B, but narrow.
WAN22 = WAN21 | {"decoder_base_dim": 5, "temperal_downsample": [False, True, True], "is_residual": True}
WAN22 |= {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
# temporal downsampling in other places than Wan's: the cache markers sit elsewhere
EARLY = WAN21 | {"temperal_downsample": [True, True, False], "dim_mult": [1, 2, 2, 2]}
CONFIGS = {"wan21": WAN21, "wan22": WAN22, "early": EARLY}
MODES = ["whole", "sliced", "tiled", "tiled sliced"]
CASES = [(kind, mode) for kind in ("wan21", "wan22") for mode in ("whole", "tiled", "tiled sliced")] + [
    ("early", "tiled")
]
BATCH, FRAMES = 2, 4

both_kinds = pytest.mark.parametrize("kind", ["wan21", "wan22"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Convolutions this small only lose by more threads, on a busy machine minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@functools.cache
def weights(kind):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIGS[kind]).eval()
    for parameter in vae.parameters():  # gains and biases too: at their defaults, errors in them would not show
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vae


def make_vae(kind, mode="whole"):
    """A VAE in one of MODES. Tiles are 2 latents apart and 3 long, so that there are partial ones at the edges."""
    vae = AutoencoderKLWan.from_config(weights(kind).config).eval()
    vae.load_state_dict(weights(kind).state_dict())
    if "tiled" in mode:
        ratio = vae.spatial_compression_ratio
        vae.enable_tiling(3 * ratio, 3 * ratio, 2 * ratio, 2 * ratio)
    if "sliced" in mode:
        vae.enable_slicing()
    return vae


def random_latents(vae, frames=FRAMES, seed=1, height=4, width=4, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator)


def random_video(vae, latent_frames=3, seed=1, height=4, width=4, batch=BATCH):
    ratio, generator = vae.spatial_compression_ratio, torch.Generator().manual_seed(seed)
    shape = (batch, 3, 1 + 4 * (latent_frames - 1), height * ratio, width * ratio)
    return torch.rand(shape, generator=generator) * 2 - 1


def decode_in(stream, latents, lengths):
    return torch.cat([stream.decode(chunk) for chunk in latents.split(lengths, dim=2)], dim=2)


def encode_in(stream, video, latent_lengths):
    lengths = [4 * length for length in latent_lengths]
    if stream.latent_frames_done == 0:
        lengths[0] -= 3
    parts = [stream.encode(chunk) for chunk in video.split(lengths, dim=2)]
    return torch.cat([part.parameters for part in parts], dim=2)


def decode_loop(vae, latents, lengths):
    """What `vae.decode` does without tiles, in its own cache, with the first convolution chunk by chunk."""

    def one(latents):
        vae.clear_cache()
        frames = []
        for frame in torch.cat([vae.post_quant_conv(z) for z in latents.split(lengths, dim=2)], dim=2).split(1, dim=2):
            vae._conv_idx = [0]
            cache = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx}
            frames.append(vae.decoder(frame, **cache, first_chunk=not frames))
        vae.clear_cache()
        pixels = torch.cat(frames, dim=2)
        return pixels if vae.config.patch_size is None else unpatchify(pixels, vae.config.patch_size)

    return torch.cat([one(z) for z in latents.split(1 if vae.use_slicing else len(latents))]).clamp(-1, 1)


def encode_loop(vae, video, latent_lengths):
    """What `vae.encode` does without tiles, in its own cache, with the last convolution chunk by chunk."""

    def one(video):
        vae.clear_cache()
        hidden = []
        for step in video.split([1] + [4] * (video.shape[2] // 4), dim=2):
            vae._enc_conv_idx = [0]
            hidden.append(vae.encoder(step, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
        vae.clear_cache()
        chunks = torch.cat(hidden, dim=2).split(latent_lengths, dim=2)
        return torch.cat([vae.quant_conv(chunk) for chunk in chunks], dim=2)

    if vae.config.patch_size is not None:
        video = patchify(video, vae.config.patch_size)
    return torch.cat([one(x) for x in video.split(1 if vae.use_slicing else len(video))])


def tensors_of(stream):
    return [entry for lane in stream._lanes for entry in lane if isinstance(entry, torch.Tensor)]


def addresses_of(cache):
    return {entry.untyped_storage().data_ptr() for entry in cache if isinstance(entry, torch.Tensor)}


# --- equal to diffusers, bit by bit --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_decode_equals_whole_decode(kind, mode):
    vae = make_vae(kind, mode)
    latents = 2 * random_latents(vae, width=5 if "tiled" in mode else 4)
    whole = vae.decode(latents).sample
    assert (whole.abs() == 1).any(), "nothing is clamped: the clamp would go unchecked"
    stream = StreamingVaeDecoder(vae)
    assert torch.equal(decode_in(stream, latents, [1, 2, 1]), whole)
    assert stream.latent_frames_done == FRAMES


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_encode_equals_whole_encode(kind, mode):
    vae = make_vae(kind, mode)
    video = random_video(vae, width=5 if "tiled" in mode else 4)
    whole = vae.encode(video).latent_dist.parameters
    stream = StreamingVaeEncoder(vae)
    assert torch.equal(encode_in(stream, video, [1, 2]), whole)
    assert stream.latent_frames_done == 3


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["wan21", "wan22"]),
    mode=st.sampled_from(MODES),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_any_size_and_any_split(kind, mode, lengths, size, seed):
    vae, area = make_vae(kind, mode), size[0] * size[1]
    is_tiled = "tiled" in mode and max(size) > 3
    latents, video = random_latents(vae, sum(lengths), seed, *size), random_video(vae, sum(lengths), seed, *size)
    pixels = decode_in(StreamingVaeDecoder(vae), latents, lengths)
    moments = encode_in(StreamingVaeEncoder(vae), video, lengths)
    wholes = vae.decode(latents).sample, vae.encode(video).latent_dist.parameters
    loops = wholes if is_tiled else (decode_loop(vae, latents, lengths), encode_loop(vae, video, lengths))
    for got, whole, loop in zip((pixels, moments), wholes, loops, strict=True):
        # Up to 1.4e-5 by torch's kernels without vector instructions (Wan2.2's VAE), 6e-6 by those with them.
        torch.testing.assert_close(got, whole, rtol=0, atol=3e-5)
        assert torch.equal(got, loop)
        assert torch.equal(got, whole) or area % 16


@pytest.mark.parametrize(("kind", "mode"), [("wan21", "tiled"), ("wan22", "whole")])
def test_bfloat16_equals_whole(kind, mode):
    vae = make_vae(kind, mode).to(torch.bfloat16)
    latents = random_latents(vae, 3, batch=1).bfloat16()
    assert torch.equal(decode_in(StreamingVaeDecoder(vae), latents, [1, 2]), vae.decode(latents).sample)
    video = random_video(vae, 2, batch=1).bfloat16()
    whole = vae.encode(video).latent_dist.parameters
    assert torch.equal(encode_in(StreamingVaeEncoder(vae), video, [1, 1]), whole)


@both_kinds
def test_tiles_that_do_not_overlap(kind):
    vae = make_vae(kind)
    ratio = vae.spatial_compression_ratio
    vae.enable_tiling(2 * ratio, 2 * ratio, 2 * ratio, 2 * ratio)
    latents = random_latents(vae, 2)
    assert torch.equal(decode_in(StreamingVaeDecoder(vae), latents, [1, 1]), vae.decode(latents).sample)


def test_frames_no_larger_than_a_tile_are_decoded_whole():
    vae = make_vae("wan21")
    ratio = vae.spatial_compression_ratio
    vae.enable_tiling(4 * ratio, 4 * ratio, 2 * ratio, 2 * ratio)
    latents = random_latents(vae, 2)
    assert torch.equal(decode_in(StreamingVaeDecoder(vae), latents, [1, 1]), vae.decode(latents).sample)


def test_encode_gives_the_distribution_of_diffusers():
    vae = make_vae("wan21")
    video = random_video(vae, 2)
    ours, whole = StreamingVaeEncoder(vae).encode(video), vae.encode(video).latent_dist
    assert torch.equal(ours.mode(), whole.mode())
    draws = [part.sample(torch.Generator().manual_seed(3)) for part in (ours, whole)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_scale_is_that_of_the_diffusers_pipelines(dtype):
    vae = make_vae("wan21")
    latents = random_latents(vae).to(dtype)
    mean = torch.tensor(vae.config.latents_mean).view(1, 4, 1, 1, 1).to(dtype)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, 4, 1, 1, 1).to(dtype)
    assert torch.equal(denormalize_latents(vae, latents), latents / inverse_std + mean)
    assert torch.equal(normalize_latents(vae, latents), (latents - mean) * inverse_std)


# --- the state belongs to the stream -------------------------------------------------------------------------------


@both_kinds
def test_two_interleaved_streams_equal_each_alone(kind):
    vae = make_vae(kind)
    left, right = random_latents(vae, seed=1), random_latents(vae, seed=2)
    streams = StreamingVaeDecoder(vae), StreamingVaeDecoder(vae)
    outs = ([], [])
    for k in range(FRAMES):
        for stream, latents, out in zip(streams, (left, right), outs, strict=True):
            out.append(stream.decode(latents[:, :, k : k + 1]))
            vae.decode(left[:, :, :1])  # the VAE's own decode must not disturb a stream either
    assert torch.equal(torch.cat(outs[0], dim=2), vae.decode(left).sample)
    assert torch.equal(torch.cat(outs[1], dim=2), vae.decode(right).sample)


# After no frame there is nothing, after one there are markers, after two everything is a tensor.
@pytest.mark.parametrize(
    ("kind", "mode", "done"),
    [("wan21", "whole", 0), ("wan22", "whole", 1), ("wan21", "whole", 2), ("wan21", "tiled", 1)],
)
def test_fork_goes_its_own_way(kind, mode, done):
    vae = make_vae(kind, mode)
    common, left, right = random_latents(vae, 2)[:, :, :done], random_latents(vae, 1, 2), random_latents(vae, 1, 3)
    stream = StreamingVaeDecoder(vae)
    if done:
        stream.decode(common)
    twin = stream.fork()
    assert twin.latent_frames_done == done
    first, second = stream.decode(left), twin.decode(right)
    skip = max(0, 1 + 4 * (done - 1)) if done else 0
    assert torch.equal(first, vae.decode(torch.cat([common, left], dim=2)).sample[:, :, skip:])
    assert torch.equal(second, vae.decode(torch.cat([common, right], dim=2)).sample[:, :, skip:])


# --- parked between calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mode"), [("wan22", "whole"), ("wan21", "tiled sliced")])
def test_a_parked_state_is_a_copy_of_the_same(kind, mode, monkeypatch):
    """On one device: equal to the bit, in memory that no call works on, also after a fork, a save and a failure."""
    vae = make_vae(kind, mode)
    plain, parked = StreamingVaeDecoder(vae), StreamingVaeDecoder(vae, parking_device="cpu")
    worked_on, whole = [], vae.decoder.forward  # all held, so that no address is used twice

    def watched(x, feat_cache, **kwargs):
        worked_on.extend(feat_cache)
        out = whole(x, feat_cache=feat_cache, **kwargs)
        worked_on.extend(feat_cache)
        return out

    for frames in (1, 2, 1):
        latents = random_latents(vae, frames, seed=frames)
        expected = plain.decode(latents)
        with monkeypatch.context() as patch:
            patch.setattr(vae.decoder, "forward", watched)
            assert torch.equal(parked.decode(latents), expected)
        assert addresses_of(worked_on).isdisjoint(addresses_of(tensors_of(parked)))
        assert all(tensor.device == parked.parking_device for tensor in tensors_of(parked))
        assert all(map(torch.equal, tensors_of(parked), tensors_of(plain)))
        assert parked.state_bytes == plain.state_bytes
    twin, loaded = parked.fork(), StreamingVaeDecoder(vae, parking_device="cpu")
    assert addresses_of(tensors_of(twin)) == addresses_of(tensors_of(parked))
    loaded.load_state_dict(parked.state_dict())
    latents = random_latents(vae, 2, seed=9)
    with pytest.raises(ValueError, match="width 7"):
        parked.decode(random_latents(vae, 1, width=7))
    expected = plain.decode(latents)
    assert all(torch.equal(stream.decode(latents), expected) for stream in (parked, twin, loaded))


@pytest.mark.parametrize(("kind", "mode"), [("wan21", "tiled"), ("wan22", "whole")])
def test_upstream_never_writes_into_a_cached_tensor(kind, mode):
    """What rollback, fork and state_dict without copies rest on."""
    vae = make_vae(kind, mode)
    decoder, encoder = StreamingVaeDecoder(vae), StreamingVaeEncoder(vae)
    for frames in range(1, 4):
        held = tensors_of(decoder) + tensors_of(encoder)
        before = [tensor.clone() for tensor in held]
        versions = [tensor._version for tensor in held]
        decoder.decode(random_latents(vae, frames))
        encoder.encode(random_video(vae, 3)[:, :, -4:] if encoder.latent_frames_done else random_video(vae, 2))
        assert versions == [tensor._version for tensor in held]
        assert all(map(torch.equal, held, before))


@pytest.mark.parametrize(
    ("kind", "mode", "done"),
    [("wan21", "whole", 0), ("wan22", "whole", 1), ("wan21", "whole", 2), ("wan22", "tiled sliced", 1)],
)
def test_saved_and_loaded_goes_on_to_the_bit(tmp_path, kind, mode, done):
    vae = make_vae(kind, mode)
    latents, video = random_latents(vae, 3), random_video(vae, 3)
    decoder, encoder = StreamingVaeDecoder(vae), StreamingVaeEncoder(vae)
    if done:
        decoder.decode(latents[:, :, :done])
        encoder.encode(video[:, :, : 4 * done - 3])
    resumed = StreamingVaeDecoder(make_vae(kind, mode)), StreamingVaeEncoder(make_vae(kind, mode))
    for name, stream, other in zip(("dec", "enc"), (decoder, encoder), resumed, strict=True):
        save_file(stream.state_dict(), tmp_path / name)
        other.load_state_dict(load_file(tmp_path / name))
        assert other.state_bytes == stream.state_bytes
        assert other.latent_frames_done == done
    assert torch.equal(resumed[0].decode(latents[:, :, done:]), decoder.decode(latents[:, :, done:]))
    rest = video[:, :, max(0, 4 * done - 3) :]
    assert torch.equal(resumed[1].encode(rest).parameters, encoder.encode(rest).parameters)
    with pytest.raises(ValueError, match="width 7 in a stream that started with 4"):
        resumed[0].decode(random_latents(vae, 1, width=7))


def test_load_refuses_what_is_not_a_state_for_this_stream():
    vae = make_vae("wan21")
    stream = StreamingVaeDecoder(vae)
    latents = random_latents(vae)
    stream.decode(latents[:, :, :2])
    state = stream.state_dict()
    with pytest.raises(ValueError, match="no readable 'meta'"):
        stream.load_state_dict({})
    with pytest.raises(ValueError, match="no readable 'meta'"):
        stream.load_state_dict(state | {"meta": state["meta"][:-3]})
    with pytest.raises(ValueError, match="'meta' must hold"):
        stream.load_state_dict({"meta": torch.tensor(list(b"{}"), dtype=torch.uint8)})
    with pytest.raises(ValueError, match="of a VAE decoder, not of a VAE encoder"):
        StreamingVaeEncoder(vae).load_state_dict(state)
    with pytest.raises(ValueError, match="of another VAE"):
        StreamingVaeDecoder(make_vae("wan22")).load_state_dict(state)
    with pytest.raises(ValueError, match=r"missing from or unknown to this state: lane\.0\.slot\.0"):
        stream.load_state_dict({key: value for key, value in state.items() if key != "lane.0.slot.0"})
    whole = vae.decode(latents).sample
    assert torch.equal(stream.decode(latents[:, :, 2:]), whole[:, :, 5:]), "a refused state changed the stream"


class BoomError(Exception):
    pass


@pytest.mark.parametrize(("kind", "mode"), [("wan21", "whole"), ("wan22", "tiled sliced")])
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_failed_call_leaves_the_stream_as_it_was(kind, mode, part):
    vae = make_vae(kind, mode)
    if part == "decoder":
        stream, data, first = StreamingVaeDecoder(vae), random_latents(vae, 3), 1
        step, whole = stream.decode, vae.decode(data).sample
    else:
        stream, data, first = StreamingVaeEncoder(vae), random_video(vae, 3), 1
        whole = vae.encode(data).latent_dist.parameters

        def step(chunk):
            return stream.encode(chunk).parameters

    calls = 0

    def fail_at_the_second(module, args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise BoomError

    def failing_step(chunk):
        nonlocal calls
        calls = 0
        # deep inside: by then most features of the second step are already replaced
        handle = getattr(vae, part).conv_out.register_forward_pre_hook(fail_at_the_second)
        with pytest.raises(BoomError):
            step(chunk)
        handle.remove()

    failing_step(data)
    assert stream.state_bytes == stream.latent_frames_done == 0
    out = [step(data[:, :, :first])]
    held = stream.state_bytes, stream.latent_frames_done
    failing_step(data[:, :, first:])
    assert (stream.state_bytes, stream.latent_frames_done) == held
    out.append(step(data[:, :, first:]))
    assert torch.equal(torch.cat(out, dim=2), whole)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mode"), [("wan21", "tiled"), ("wan22", "whole"), ("wan22", "tiled sliced")])
def test_state_is_flat_and_known_before(kind, mode):
    vae = make_vae(kind, mode)
    ratio = vae.spatial_compression_ratio
    stream = StreamingVaeDecoder(vae)
    rng = torch.get_rng_state()
    expected = vae_state_bytes(vae, BATCH, 4 * ratio, 5 * ratio, torch.float32)
    assert torch.equal(rng, torch.get_rng_state()), "asking for a size must not change what is drawn next"
    assert stream.state_bytes == 0
    for k in range(3):
        stream.decode(random_latents(vae, 1, width=5))
        assert (stream.state_bytes == expected) == (k > 0)
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(stream)) == stream.state_bytes
    stream.reset()
    assert (stream.state_bytes, stream.latent_frames_done) == (0, 0)


def test_state_bytes_follow_the_dtype_and_need_no_weights():
    vae = make_vae("wan22")
    full, half = (vae_state_bytes(vae, 1, 64, 64, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert full == 2 * half
    assert vae_state_bytes(vae.to("meta"), 1, 64, 64, torch.float32) == full
    with pytest.raises(ValueError, match="multiples of 16"):
        vae_state_bytes(vae, 1, 64, 40, torch.float32)
    with pytest.raises(ValueError, match="batch_size 0"):
        vae_state_bytes(vae, 0, 64, 64, torch.float32)


def test_encoder_state_is_flat():
    vae = make_vae("wan21", "tiled")
    stream = StreamingVaeEncoder(vae)
    sizes = []
    for k in range(4):
        stream.encode(random_video(vae, 2)[:, :, 1 if k else 4 :])
        sizes.append(stream.state_bytes)
    assert 0 < sizes[0] <= sizes[1] == sizes[2] == sizes[3]


def test_state_holds_no_graph_when_gradients_are_on():
    vae = make_vae("wan21")
    stream = StreamingVaeDecoder(vae)
    with torch.enable_grad():
        pixels = stream.decode(random_latents(vae, 2))
        assert not any(tensor.requires_grad for tensor in tensors_of(stream))
        stream.decode(random_latents(vae, 1)).sum().backward()
    assert pixels.requires_grad
    assert vae.decoder.conv_in.weight.grad is not None


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(4, 2, 4, 5), (2, 3, 2, 4, 5), (2, 4, 0, 4, 5), (0, 4, 2, 4, 5), (2, 4, 2, 4, 0), (2, 4, 2, 4, 5, 1)]
)
def test_decode_refuses_wrong_shapes(shape):
    with pytest.raises(ValueError, match="latents must be"):
        StreamingVaeDecoder(make_vae("wan21")).decode(torch.zeros(shape))


def test_decode_refuses_integers():
    with pytest.raises(ValueError, match=r"floating point.*torch\.int64"):
        StreamingVaeDecoder(make_vae("wan21")).decode(torch.zeros(1, 4, 1, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda z: z[:1], "batch 1 in a stream that started with 2"),
        (lambda z: z[..., :3, :], "height 3"),
        (lambda z: z[..., :2], "width 2"),
        (lambda z: z.double(), "dtype float64"),
    ],
)
def test_a_stream_keeps_its_layout(change, name):
    vae = make_vae("wan21")
    latents = random_latents(vae, 2)
    stream = StreamingVaeDecoder(vae)
    stream.decode(latents[:, :, :1])
    with pytest.raises(ValueError, match=name):
        stream.decode(change(latents[:, :, 1:]))
    assert torch.equal(stream.decode(latents[:, :, 1:]), vae.decode(latents).sample[:, :, 1:])


def test_vae_settings_must_stay_while_a_stream_runs():
    vae = make_vae("wan21")
    latents = random_latents(vae, 2)
    stream = StreamingVaeDecoder(vae)
    stream.decode(latents[:, :, :1])
    vae.enable_slicing()
    with pytest.raises(RuntimeError, match="slicing was changed from False to True"):
        stream.decode(latents[:, :, 1:])
    vae.disable_slicing()
    vae.enable_tiling(16, 16, 8, 8)
    with pytest.raises(RuntimeError, match="tiling was changed from None"):
        stream.decode(latents[:, :, 1:])
    stream.reset()
    stream.decode(latents[:, :, :1])
    vae.enable_tiling(tile_sample_stride_width=16)
    with pytest.raises(RuntimeError, match="tiling was changed from"):
        stream.decode(latents[:, :, 1:])


def test_tile_strides_below_one_latent_are_refused():
    vae = make_vae("wan21")
    vae.enable_tiling(16, 16, 4, 4)
    with pytest.raises(ValueError, match="smaller than one latent"):
        StreamingVaeDecoder(vae).decode(random_latents(vae, 1))


@pytest.mark.parametrize(("first", "frames"), [(True, 4), (True, 3), (False, 5), (False, 1)])
def test_encode_refuses_frame_counts_that_upstream_would_cut(first, frames):
    vae = make_vae("wan21")
    stream = StreamingVaeEncoder(vae)
    video = random_video(vae, 2)
    if not first:
        stream.encode(video)
    with pytest.raises(ValueError, match=f"video has {frames} frames, the VAE takes {'1 ' if first else ''}.*4k"):
        stream.encode(video[:, :, :frames])


def test_encode_takes_pixels_not_patches():
    with pytest.raises(ValueError, match=r"video must be .*\(batch, 3, frames"):
        StreamingVaeEncoder(make_vae("wan22")).encode(torch.zeros(1, 12, 1, 32, 32))


# --- offload -------------------------------------------------------------------------------------------------------


class RecordingHook(ModelHook):
    def __init__(self):
        super().__init__()
        self.modules = []

    def pre_forward(self, module, *args, **kwargs):
        self.modules.append(module)
        return args, kwargs


def test_offload_hook_of_the_vae_is_called_before_its_parts():
    vae = make_vae("wan21")
    decoder, encoder = StreamingVaeDecoder(vae), StreamingVaeEncoder(vae)
    hook = RecordingHook()
    add_hook_to_module(vae, hook)
    decoder.decode(random_latents(vae, 1))
    assert hook.modules == [vae]
    encoder.encode(random_video(vae, 1))
    assert hook.modules == [vae, vae]
