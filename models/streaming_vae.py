"""Decode and encode video with a Wan VAE piece by piece, with the state in the caller's hands.

`AutoencoderKLWan.decode` clears its temporal cache on entry and exit, so calling it once per chunk gives seams and too
few frames. Inside, however, it works one latent frame at a time and carries a plain list of features from frame to
frame. The classes here drive the same submodules (`vae.decoder`, `vae.encoder` and the 1x1x1 convolutions beside them)
with lists of their own. The result is that of the whole `vae.decode` / `vae.encode` for every split into chunks, the
VAE stays untouched, and any number of streams can share it.

Which bits are the same: everything but the 1x1x1 convolution beside the encoder or decoder is computed by the same
calls on the same shapes as upstream, frame by frame, and so to the bit. That convolution runs over all frames at once
upstream and over those of one call here: a matrix product with fewer columns (frames x height x width of the latents),
for which a library may take another kernel that rounds differently. In float32 on CPU, MKL does so for a single column
where it uses AVX-512, and where it uses AVX2 for numbers that are no multiple of 16; pixels and moments then differ by
less than 3e-5. Chunks of the same lengths give the same bits on one machine with one number of threads. With tiling
upstream convolves frame by frame too, and nothing differs.

The submodules replace the entries of such a list and never write into a cached tensor. Copying the list is therefore
enough for a rollback point or for a fork.

Memory: between calls a stream holds `state_bytes`. During a call the old state is kept until the new one is complete,
so that a failed call changes nothing: up to twice as much, beside the activations. With a `parking_device` it lies
there between calls; see `VaeStream`.

Gradients flow within one call and not into the calls before it; wrap calls in `torch.no_grad()` for inference.
"""

from __future__ import annotations

from collections import Counter

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook

from wan_autoregressive.models.vae_stream import FeatureCache, VaeStream, cache_bytes, empty_cache
from wan_autoregressive.models.vae_tiles import TileGrid, decode_grid, encode_grid

_ENCODE_STEP_FRAMES = 4  # pixel frames per encoder call after the first frame; a constant in AutoencoderKLWan._encode


class StreamingVaeDecoder(VaeStream):
    """Latents in, pixels out, in chunks of any length; equal to one `vae.decode` over all of them (see the module).

    Follows the VAE's `use_tiling` and `use_slicing` as they are when the stream starts.
    """

    _kind = "decoder"

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode the next latent frames of the stream.

        Args:
            latents: (batch, z_dim, latent_frames, height, width) as `vae.decode` takes them, on the VAE's scale (see
                `denormalize_latents`), in the VAE's dtype and on its device. At least one frame.

        Returns:
            Pixels (batch, 3, pixel_frames, pixel_height, pixel_width) in [-1, 1], new memory. The first latent frame
            of the stream gives one pixel frame, every later one `scale_factor_temporal` (4).

        Raises:
            ValueError: the latents have another shape or dtype than the VAE or the stream takes.
            RuntimeError: tiling or slicing of the VAE was changed while the stream runs.
            After any exception the stream is as it was before the call.
        """
        _check_video(latents, "latents", self.vae.config["z_dim"])
        grid = decode_grid(self.vae, *latents.shape[-2:])
        layout, lanes = self._begin(latents, tiles=len(grid) if grid else 1)
        pixels = _decode_chunk(self.vae, latents, lanes, grid, starts=self._latent_frames_done == 0)
        self._commit(layout, lanes, self._latent_frames_done + latents.shape[2])
        return pixels


class StreamingVaeEncoder(VaeStream):
    """Pixels in, latents out, chunk by chunk; equal to one `vae.encode` over all of them (see the module).

    Follows the VAE's `use_tiling` and `use_slicing` as they are when the stream starts.
    """

    _kind = "encoder"

    def encode(self, video: torch.Tensor) -> DiagonalGaussianDistribution:
        """Encode the next pixel frames of the stream.

        Args:
            video: (batch, 3, pixel_frames, pixel_height, pixel_width) in [-1, 1], in the VAE's dtype and on its
                device. The first call takes 1 + 4k frames, every later one 4k with k > 0.

        Returns:
            What `vae.encode(video).latent_dist` is: `.mode()` or `.sample(generator)` give latents (batch, z_dim,
            latent_frames, height, width) on the VAE's scale, `.parameters` the raw moments. Concatenated over calls,
            modes and moments are those of the whole video.

        Raises:
            ValueError: the video has another shape or dtype than the VAE or the stream takes.
            RuntimeError: tiling or slicing of the VAE was changed while the stream runs.
            After any exception the stream is as it was before the call.
        """
        starts = self._latent_frames_done == 0
        _check_video(video, "video", self.vae.config["in_channels"] // (self.vae.config["patch_size"] or 1) ** 2)
        if (video.shape[2] - int(starts)) % _ENCODE_STEP_FRAMES:
            # diffusers drops the surplus frames without a word; in a stream that would shift all that follows.
            allowed = "1 + 4k frames in the first call of a stream" if starts else "4k frames after the first call"
            raise ValueError(f"video has {video.shape[2]} frames, the VAE takes {allowed}")
        grid = encode_grid(self.vae, *video.shape[-2:])
        layout, lanes = self._begin(video, tiles=len(grid) if grid else 1)
        moments = _encode_chunk(self.vae, video, lanes, grid, starts=starts)
        self._commit(layout, lanes, self._latent_frames_done + int(starts) + video.shape[2] // _ENCODE_STEP_FRAMES)
        return DiagonalGaussianDistribution(moments)


# The hook brings a CPU-offloaded VAE to its device before its submodules are called; it looks at the first argument.
@apply_forward_hook
def _decode_chunk(
    vae: AutoencoderKLWan, latents: torch.Tensor, lanes: list[FeatureCache], grid: TileGrid | None, starts: bool
) -> torch.Tensor:
    """Pixels of `latents`; `lanes` are moved on in place."""
    slices = latents.split(1) if vae.use_slicing else (latents,)
    tiles = len(lanes) // len(slices)
    return _cat([_decode_slice(vae, z, lanes[i * tiles :][:tiles], grid, starts) for i, z in enumerate(slices)], dim=0)


def _decode_slice(
    vae: AutoencoderKLWan, latents: torch.Tensor, lanes: list[FeatureCache], grid: TileGrid | None, starts: bool
) -> torch.Tensor:
    # Where upstream projects all frames at once and where frame by frame is kept: the calls are then the same ones.
    hidden = vae.post_quant_conv(latents) if grid is None else latents
    frames = []
    for k, frame in enumerate(hidden.split(1, dim=2)):
        first_chunk = starts and k == 0
        if grid is None:
            out = vae.decoder(frame, feat_cache=lanes[0], feat_idx=[0], first_chunk=first_chunk)
        else:
            out = grid.stitch(
                vae,
                [
                    vae.decoder(vae.post_quant_conv(tile), feat_cache=lane, feat_idx=[0], first_chunk=first_chunk)
                    for tile, lane in zip(grid.cut(frame), lanes, strict=True)
                ],
            )
        if vae.config["patch_size"] is not None:
            out = unpatchify(out, patch_size=vae.config["patch_size"])
        frames.append(torch.clamp(out, min=-1.0, max=1.0))
    return _cat(frames, dim=2)


@apply_forward_hook
def _encode_chunk(
    vae: AutoencoderKLWan, video: torch.Tensor, lanes: list[FeatureCache], grid: TileGrid | None, starts: bool
) -> torch.Tensor:
    """Moments of `video`; `lanes` are moved on in place."""
    if vae.config["patch_size"] is not None:
        video = patchify(video, patch_size=vae.config["patch_size"])
    slices = video.split(1) if vae.use_slicing else (video,)
    tiles = len(lanes) // len(slices)
    return _cat([_encode_slice(vae, x, lanes[i * tiles :][:tiles], grid, starts) for i, x in enumerate(slices)], dim=0)


def _encode_slice(
    vae: AutoencoderKLWan, video: torch.Tensor, lanes: list[FeatureCache], grid: TileGrid | None, starts: bool
) -> torch.Tensor:
    first, rest = video[:, :, : int(starts)], video[:, :, int(starts) :]
    steps = ([first] if starts else []) + (list(rest.split(_ENCODE_STEP_FRAMES, dim=2)) if rest.shape[2] else [])
    if grid is None:
        return vae.quant_conv(_cat([vae.encoder(step, feat_cache=lanes[0], feat_idx=[0]) for step in steps], dim=2))
    moments = []
    for step in steps:
        cut = zip(grid.cut(step), lanes, strict=True)
        tiles = [vae.quant_conv(vae.encoder(tile, feat_cache=lane, feat_idx=[0])) for tile, lane in cut]
        moments.append(grid.stitch(vae, tiles))
    return _cat(moments, dim=2)


def normalize_latents(vae: ConfigMixin, latents: torch.Tensor) -> torch.Tensor:
    """Latents (batch, z_dim, frames, height, width) from the VAE's scale to the transformer's; new memory.

    The arithmetic of `WanImageToVideoPipeline.prepare_latents` in diffusers, to the bit.
    """
    mean, inverse_std = _latent_statistics(vae, latents)
    return (latents - mean) * inverse_std


def denormalize_latents(vae: ConfigMixin, latents: torch.Tensor) -> torch.Tensor:
    """Latents (batch, z_dim, frames, height, width) from the transformer's scale to the VAE's; new memory.

    The arithmetic of `WanPipeline.__call__` in diffusers, to the bit: it divides by the rounded inverse.
    """
    mean, inverse_std = _latent_statistics(vae, latents)
    return latents / inverse_std + mean


def vae_state_bytes(vae: AutoencoderKLWan, batch_size: int, height: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that a `StreamingVaeDecoder` will hold between calls, known without running or allocating anything.

    Exact: a copy of the VAE without weights decodes two latent frames (after which the state no longer grows) of every
    distinct tile on the meta device. Counts the VAE's present tiling, which makes the state larger, not smaller: tiles
    overlap, and all of them are kept. Slicing does not change the sum.

    Args:
        vae: only its config and its tile settings are read; it may be anywhere, or offloaded.
        batch_size: videos decoded together.
        height, width: of the video, in pixels.
        dtype: of the latents and of the VAE.

    Raises:
        ValueError: sizes are not positive multiples of the VAE's spatial ratio, or the batch is empty.
    """
    ratio = vae.config["scale_factor_spatial"]
    if batch_size < 1 or min(height, width) < ratio or height % ratio or width % ratio:
        raise ValueError(
            f"batch_size {batch_size}, height {height}, width {width}: need at least 1 video and positive "
            f"multiples of {ratio} pixels"
        )
    with torch.device("meta"):
        decoder = AutoencoderKLWan.from_config(vae.config).decoder.to(dtype)
        frame = torch.empty(batch_size, vae.config["z_dim"], 1, height // ratio, width // ratio, dtype=dtype)
    grid = decode_grid(vae, *frame.shape[-2:])
    total = 0
    for shape, count in Counter(tile.shape for tile in (grid.cut(frame) if grid else [frame])).items():
        lane = empty_cache(decoder)
        with torch.no_grad():
            for first_chunk in (True, False):
                decoder(frame.new_empty(shape), feat_cache=lane, feat_idx=[0], first_chunk=first_chunk)
        total += count * cache_bytes(lane)
    return total


def _latent_statistics(vae: ConfigMixin, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_video(latents, "latents", vae.config["z_dim"])
    shape = (1, vae.config["z_dim"], 1, 1, 1)
    # Asynchronous copies: a plain one would wait for the device, once per chunk.
    mean, std = (
        torch.tensor(vae.config[name], dtype=torch.float32)
        .view(shape)
        .to(latents.device, latents.dtype, non_blocking=True)
        for name in ("latents_mean", "latents_std")
    )
    return mean, 1.0 / std


def _check_video(x: torch.Tensor, name: str, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape (batch, {channels}, frames, height, width) without empty "
            f"dimensions, got {x.dtype} of shape {tuple(x.shape)}"
        )


def _cat(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
