"""Streams through the tiny VAE against the whole video, and against one another, whose state is their own."""

import functools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wan_autoregressive.models import AutoencoderTinyWan
from wan_autoregressive.models.tiny_vae_costs import tiny_vae_state_bytes
from wan_autoregressive.models.tiny_vae_layers import MemoryBlock, SuperMemoryBlock
from wan_autoregressive.models.tiny_vae_stream import TinyVaeDecoder, TinyVaeEncoder

NARROW = {"z_dim": 4, "encoder_width": 5, "decoder_widths": [7, 6, 5, 4], "blocks_per_stage": 2}
KINDS = {
    "wan21": NARROW,
    "wan22": NARROW | {"patch_size": 2, "scale_factor_spatial": 16},
    "super": NARROW | {"patch_size": 2, "scale_factor_spatial": 16, "decoder_type": "super"},
    "early": NARROW | {"encoder_time_pools": [1, 2, 2], "decoder_time_growths": [2, 2, 1]},
}
BOUND = 1e-5  # in another split, convolutions over more or fewer frames round differently
both_streams = pytest.mark.parametrize("stream_class", [TinyVaeDecoder, TinyVaeEncoder])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@functools.cache
def make_vae(kind):
    torch.manual_seed(0)
    vae = AutoencoderTinyWan(**KINDS[kind]).eval()
    for parameter in vae.parameters():  # so that the past matters: by default the signal dies away
        parameter.data *= 1.7
    return vae


def random_latents(vae, frames=5, seed=1, height=3, width=2, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vae.config.z_dim, frames, height, width, generator=generator)


def random_video(vae, frames=17, seed=1, height=3, width=2, batch=2):
    ratio, generator = vae.config.scale_factor_spatial, torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height * ratio, width * ratio, generator=generator) * 2 - 1


def data_for(stream, frames, seed=1):
    if isinstance(stream, TinyVaeDecoder):
        return random_latents(stream.vae, frames, seed)
    return random_video(stream.vae, frames, seed)


def step(stream, part):
    return stream.decode(part) if isinstance(stream, TinyVaeDecoder) else stream.encode(part).mode()


def held_by(stream):
    return dict(stream._memory)


# --- equal to the whole --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2)),
    seed=st.integers(0, 99),
)
def test_any_split_decodes_to_the_whole(kind, lengths, size, seed):
    vae = make_vae(kind)
    latents = 2 * random_latents(vae, sum(lengths), seed, *size)
    stream = TinyVaeDecoder(vae)
    parts = [stream.decode(part) for part in latents.split(lengths, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (k == 0) for k, n in enumerate(lengths)]
    assert stream.latent_frames_done == sum(lengths)
    torch.testing.assert_close(torch.cat(parts, dim=2), vae.decode(latents).sample, rtol=0, atol=BOUND)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2)),
    seed=st.integers(0, 99),
)
def test_any_split_encodes_to_the_whole(kind, lengths, size, seed):
    vae = make_vae(kind)
    video = random_video(vae, sum(lengths), seed, *size)
    stream, done, parts = TinyVaeEncoder(vae), 0, []
    for part in video.split(lengths, dim=2):
        parts.append(stream.encode(part).mode())
        done += part.shape[2]
        assert stream.latent_frames_done == done // 4
    parts.append(stream.finish().mode())
    assert parts[-1].shape[2] == (done % 4 > 0)
    assert stream.latent_frames_done == -(-done // 4)
    torch.testing.assert_close(torch.cat(parts, dim=2), vae.encode(video).latent_dist.mode(), rtol=0, atol=BOUND)


def test_an_image_is_one_latent():
    vae = make_vae("wan21")
    stream, image = TinyVaeEncoder(vae), random_video(vae, 1)
    assert stream.encode(image).mode().shape == (2, 4, 0, 3, 2)
    torch.testing.assert_close(stream.finish().mode(), vae.encode(image).latent_dist.mode(), rtol=0, atol=BOUND)


def test_finishing_a_fork_looks_ahead():
    vae = make_vae("wan21")
    video = random_video(vae, 9)
    stream = TinyVaeEncoder(vae)
    first = stream.encode(video[:, :, :5]).mode()
    ahead = stream.fork().finish().mode()
    whole = vae.encode(video[:, :, :5]).latent_dist.mode()
    torch.testing.assert_close(torch.cat([first, ahead], dim=2), whole, rtol=0, atol=BOUND)
    rest = [stream.encode(video[:, :, 5:]).mode(), stream.finish().mode()]
    whole = vae.encode(video).latent_dist.mode()
    torch.testing.assert_close(torch.cat([first, *rest], dim=2), whole, rtol=0, atol=BOUND)


def test_a_finished_stream_takes_no_more():
    stream = TinyVaeEncoder(make_vae("wan21"))
    with pytest.raises(RuntimeError, match="nothing to finish"):
        stream.finish()
    video = random_video(stream.vae, 4)
    expected = stream.encode(video).mode()
    assert stream.finish().mode().shape[2] == 0
    assert (stream.state_bytes, stream.latent_frames_done) == (0, 1)
    resumed = TinyVaeEncoder(stream.vae)
    resumed.load_state_dict(stream.state_dict())
    for ended in (stream, resumed):
        with pytest.raises(RuntimeError, match="was finished: reset"):
            ended.encode(video)
        with pytest.raises(RuntimeError, match="was finished: reset"):
            ended.finish()
        ended.reset()
        assert torch.equal(ended.encode(video).mode(), expected)


@pytest.mark.parametrize("kind", ["wan21", "super"])
def test_bfloat16(kind):
    vae = AutoencoderTinyWan.from_config(make_vae(kind).config)
    vae.load_state_dict(make_vae(kind).state_dict())
    torch.nn.Module.to(vae, torch.bfloat16)
    decoder, encoder = TinyVaeDecoder(vae), TinyVaeEncoder(vae)
    latents, video = random_latents(vae, 3).bfloat16(), random_video(vae, 8).bfloat16()
    frames = torch.cat([decoder.decode(part) for part in latents.split([1, 2], dim=2)], dim=2)
    encoded = torch.cat([encoder.encode(part).mode() for part in video.split([3, 5], dim=2)], dim=2)
    assert frames.dtype == encoded.dtype == torch.bfloat16
    # A split may round differently in each of some twenty layers; one rounding is 2**-8 of the value.
    torch.testing.assert_close(frames, vae.decode(latents).sample, rtol=0, atol=2**-4)
    torch.testing.assert_close(encoded, vae.encode(video).latent_dist.mode(), rtol=2**-4, atol=2**-4)


# --- the state belongs to the stream -------------------------------------------------------------------------------


@both_streams
@pytest.mark.parametrize("kind", KINDS)
def test_interleaved_and_forked_streams_go_their_own_way(kind, stream_class):
    vae = make_vae(kind)
    left, right, alone = stream_class(vae), stream_class(vae), stream_class(vae)
    ours, theirs = data_for(left, 12, seed=1), data_for(left, 12, seed=2)
    expected = [step(alone, part) for part in ours.split(3, dim=2)]
    for k, (our_part, their_part) in enumerate(zip(ours.split(3, dim=2), theirs.split(3, dim=2), strict=True)):
        twin = left.fork()
        assert twin.latent_frames_done == left.latent_frames_done
        step(twin, their_part)
        step(right, their_part)
        assert torch.equal(step(left, our_part), expected[k])
        assert torch.equal(step(right.fork(), our_part), step(right.fork(), our_part))


@both_streams
@pytest.mark.parametrize("done", [0, 1, 6])
def test_saved_and_loaded_goes_on_to_the_bit(stream_class, done, tmp_path):
    vae = make_vae("wan22")
    stream = stream_class(vae)
    data = data_for(stream, done + 5)
    if done:
        step(stream, data[:, :, :done])
    save_file(stream.state_dict(), tmp_path / "state")
    resumed = stream_class(vae)
    resumed.load_state_dict(load_file(tmp_path / "state"))
    assert (resumed.state_bytes, resumed.latent_frames_done) == (stream.state_bytes, stream.latent_frames_done)
    assert torch.equal(step(resumed, data[:, :, done:]), step(stream, data[:, :, done:]))
    if stream_class is TinyVaeEncoder:
        assert torch.equal(resumed.finish().mode(), stream.finish().mode())


def test_load_refuses_what_is_not_a_state_for_this_stream():
    vae = make_vae("wan21")
    stream, latents = TinyVaeDecoder(vae), random_latents(make_vae("wan21"), 4)
    stream.decode(latents[:, :, :2])
    state, twin = stream.state_dict(), stream.fork()
    with pytest.raises(ValueError, match="no readable 'meta'"):
        stream.load_state_dict({})
    with pytest.raises(ValueError, match="no readable 'meta'"):
        stream.load_state_dict(state | {"meta": state["meta"][:-3]})
    with pytest.raises(ValueError, match="'meta' must hold"):
        stream.load_state_dict({"meta": torch.tensor(list(b"{}"), dtype=torch.uint8)})
    with pytest.raises(ValueError, match="of a tiny VAE decoder, not of a tiny VAE encoder"):
        TinyVaeEncoder(vae).load_state_dict(state)
    with pytest.raises(ValueError, match="of another tiny VAE"):
        TinyVaeDecoder(make_vae("wan22")).load_state_dict(state)
    with pytest.raises(ValueError, match=r"missing from or unknown to this state: memory\.8"):
        stream.load_state_dict({key: value for key, value in state.items() if key != "memory.8"})
    assert torch.equal(stream.decode(latents[:, :, 2:]), twin.decode(latents[:, :, 2:]))


class BoomError(Exception):
    pass


@both_streams
@pytest.mark.parametrize("done", [0, 5])
def test_a_failed_call_leaves_the_stream_as_it_was(stream_class, done):
    vae = make_vae("wan21")
    stream, undisturbed = stream_class(vae), stream_class(vae)
    data = data_for(stream, done + 6)
    if done:
        step(stream, data[:, :, :done])
        step(undisturbed, data[:, :, :done])

    def fail(*args):
        raise BoomError

    last = (vae.decoder if stream_class is TinyVaeDecoder else vae.encoder)[-1]
    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(BoomError):
        step(stream, data[:, :, done:])
    handle.remove()
    assert (stream.state_bytes, stream.latent_frames_done) == (undisturbed.state_bytes, undisturbed.latent_frames_done)
    assert torch.equal(step(stream, data[:, :, done:]), step(undisturbed, data[:, :, done:]))


@both_streams
def test_held_tensors_are_never_written_to_and_share_nothing(stream_class):
    """What rollback, fork and state_dict without copies rest on."""
    vae = make_vae("wan21")
    stream = stream_class(vae)
    for k in range(3):
        held = held_by(stream)
        before = {name: (tensor.clone(), tensor._version) for name, tensor in held.items()}
        data = data_for(stream, 5, seed=k)
        out = step(stream, data)
        for name, (value, version) in before.items():
            assert torch.equal(held[name], value)
            assert held[name]._version == version
        for tensor in held_by(stream).values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "more memory is kept alive than is counted"
            assert tensor.untyped_storage().data_ptr() not in (out.untyped_storage().data_ptr(), data.data_ptr())


@both_streams
def test_a_parked_state_is_a_copy_of_the_same(stream_class):
    vae = make_vae("super")
    plain, parked = stream_class(vae), stream_class(vae, parking_device="cpu")
    for frames in (1, 3, 2):
        data = data_for(plain, frames, seed=frames)
        assert torch.equal(step(parked, data), step(plain, data))
        assert parked.state_bytes == plain.state_bytes
    loaded = stream_class(vae, parking_device="cpu")
    loaded.load_state_dict(parked.state_dict())
    if stream_class is TinyVaeEncoder:
        expected = plain.finish().mode()
        assert all(torch.equal(stream.fork().finish().mode(), expected) for stream in (parked, loaded))
    else:
        data = random_latents(vae, 2, seed=9)
        expected = plain.decode(data)
        assert all(torch.equal(stream.fork().decode(data), expected) for stream in (parked, loaded))


@both_streams
def test_a_stream_keeps_its_layout(stream_class):
    stream = stream_class(make_vae("wan21"))
    data = data_for(stream, 4)
    step(stream, data)
    expected = step(stream.fork(), data)
    ratio = 1 if stream_class is TinyVaeDecoder else 8
    for other, message in (
        (data[:1], "batch 1 in a stream that started with 2"),
        (data[..., :ratio, :], f"height {ratio} in a stream that started with {3 * ratio}"),
        (data[..., :ratio], f"width {ratio} in a stream that started with {2 * ratio}"),
        (data.double(), "dtype float64"),
    ):
        with pytest.raises(ValueError, match=message):
            step(stream, other)
    assert torch.equal(step(stream, data), expected)


def test_input_is_checked():
    vae = make_vae("wan22")
    with pytest.raises(ValueError, match=r"latents must be .*\(batch, 4, frames"):
        TinyVaeDecoder(vae).decode(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(ValueError, match=r"video must be .*\(batch, 3, frames"):
        TinyVaeEncoder(vae).encode(torch.zeros(1, 12, 1, 16, 16))
    with pytest.raises(ValueError, match="multiples of 16"):
        TinyVaeEncoder(vae).encode(torch.zeros(1, 3, 1, 16, 8))


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_flat_and_known_before(kind):
    vae = make_vae(kind)
    ratio = vae.config.scale_factor_spatial
    rng = torch.get_rng_state()
    expected = tiny_vae_state_bytes(vae, 2, 3 * ratio, 2 * ratio, torch.float32)
    assert torch.equal(rng, torch.get_rng_state()), "asking for a size must not change what is drawn next"
    stream = TinyVaeDecoder(vae)
    assert stream.state_bytes == 0
    for frames in (1, 2, 1):
        stream.decode(random_latents(vae, frames))
        assert stream.state_bytes == expected
    assert len(held_by(stream)) == sum(isinstance(layer, MemoryBlock | SuperMemoryBlock) for layer in vae.decoder)
    stream.reset()
    assert (stream.state_bytes, stream.latent_frames_done) == (0, 0)


def test_state_bytes_follow_the_dtype_and_need_no_weights():
    vae = AutoencoderTinyWan.from_config(make_vae("wan22").config)
    full, half = (tiny_vae_state_bytes(vae, 1, 64, 32, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert full == 2 * half
    assert tiny_vae_state_bytes(vae.to("meta"), 1, 64, 32, torch.float32) == full
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny_vae_state_bytes(vae, 1, 64, 40, torch.float32)
    with pytest.raises(ValueError, match="batch_size 0"):
        tiny_vae_state_bytes(vae, 0, 64, 64, torch.float32)


def test_encoder_state_returns_to_its_size_with_each_latent():
    stream = TinyVaeEncoder(make_vae("wan21"))
    sizes = []
    for frame in random_video(stream.vae, 12).split(1, dim=2):
        stream.encode(frame)
        sizes.append(stream.state_bytes)
    assert sizes[:4] == sizes[4:8] == sizes[8:]
    assert min(sizes) == sizes[3], "nothing waits after a whole latent"


@both_streams
def test_state_holds_no_graph_when_gradients_are_on(stream_class):
    vae = make_vae("wan21")
    stream = stream_class(vae)
    with torch.enable_grad():
        step(stream, data_for(stream, 4))
        assert not any(tensor.requires_grad for tensor in held_by(stream).values())
        step(stream, data_for(stream, 4)).sum().backward()
    assert (vae.decoder if stream_class is TinyVaeDecoder else vae.encoder)[-1].weight.grad is not None
    vae.zero_grad()


# --- offload -------------------------------------------------------------------------------------------------------


class RecordingHook(ModelHook):
    def __init__(self):
        super().__init__()
        self.modules = []

    def pre_forward(self, module, *args, **kwargs):
        self.modules.append(module)
        return args, kwargs


def test_offload_hook_of_the_model_is_called_before_its_layers():
    vae = AutoencoderTinyWan.from_config(make_vae("wan21").config)
    hook = RecordingHook()
    add_hook_to_module(vae, hook)
    decoder, encoder = TinyVaeDecoder(vae), TinyVaeEncoder(vae)
    calls = (
        lambda: decoder.decode(random_latents(vae, 1)),
        lambda: encoder.encode(random_video(vae, 1)),
        encoder.finish,
        lambda: vae.decode(random_latents(vae, 1)),
        lambda: vae.encode(random_video(vae, 1)),
    )
    for count, call in enumerate(calls, start=1):
        call()
        assert hook.modules == [vae] * count
