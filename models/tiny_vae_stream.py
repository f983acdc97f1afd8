"""Decode and encode video with the tiny autoencoder piece by piece, with the state in the caller's hands.

A call works on all of its frames in parallel and carries on from what the call before left, so any split of a video
into calls gives what one whole `decode` or `encode` gives, within rounding. The model stays untouched; any number of
streams can share it. A state's tensors are replaced and never written to, so a fork costs nothing.

Memory: between calls a stream holds `state_bytes`. During a call the old state is kept until the new one is complete,
so that a failed call changes nothing.

Gradients flow within one call and not into the calls before it; wrap calls in `torch.no_grad()` for inference.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.vae import IdentityDistribution
from diffusers.utils.torch_utils import get_module_execution_device

from wan_autoregressive.models.stream_state import (
    check_tensors,
    copied_to,
    pack_meta,
    read_meta,
    through_json,
    wait_for_copies,
)
from wan_autoregressive.models.tiny_vae import (
    AutoencoderTinyWan,
    check_latents,
    check_video,
    decode_part,
    encode_part,
)
from wan_autoregressive.models.tiny_vae_layers import Memory

_CONFIG_KEYS = (
    "z_dim",
    "patch_size",
    "encoder_width",
    "decoder_widths",
    "blocks_per_stage",
    "encoder_time_pools",
    "decoder_time_growths",
    "decoder_type",
)
_META_KEYS = {"kind", "vae", "layout", "steps_done", "finished", "tensors"}
_LAST_FRAME = "last_frame"  # in an encoder's memory, beside what its layers hold

Stream = TypeVar("Stream", bound="_TinyVaeStream")


class _TinyVaeStream:
    """What one stream holds for its next call, and what must stay the same until then.

    Args:
        vae: shared, never changed.
        parking_device: Where the state is kept between two calls, such as "cpu" for a model on a GPU; None leaves it
            where it is used. A call then copies `state_bytes` to the model's device before and back after it, on CUDA
            from and to pinned memory without waiting.
    """

    _kind: str

    def __init__(self, vae: AutoencoderTinyWan, parking_device: torch.device | str | None = None) -> None:
        self.vae = vae
        self.parking_device = None if parking_device is None else torch.device(parking_device)
        self.reset()

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors held for the next call."""
        return sum(tensor.nbytes for tensor in self._memory.values())

    def reset(self) -> None:
        """Forget everything; the next call starts a new stream, of any size."""
        self._memory: Memory = {}
        self._layout: dict[str, Any] | None = None
        self._steps_done = 0  # decoder: latent frames; encoder: video frames, with those of the padding
        self._finished = False

    def fork(self: Stream) -> Stream:
        """A second stream that goes on from here on its own. Costs no memory until the two move on."""
        return copy.copy(self)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on later, as a flat dict that `safetensors.torch.save_file` takes as it is.

        Returns:
            The held tensors under `memory.<layer>` (do not write into them) and `meta`, a small JSON text as a uint8
            tensor on the CPU.
        """
        if self.parking_device is not None:
            wait_for_copies(self.vae)
        state = {f"memory.{name}": tensor.contiguous() for name, tensor in self._memory.items()}
        meta = {
            "kind": self._kind,
            "vae": self._architecture(),
            "layout": self._layout,
            "steps_done": self._steps_done,
            "finished": self._finished,
            "tensors": sorted(state),
        }
        return state | {"meta": pack_meta(meta)}

    def load_state_dict(self, state: dict[str, torch.Tensor], device: torch.device | str | None = None) -> None:
        """Replace this stream's state by one that `state_dict` gave.

        Args:
            state: the dict; tensors already on `device` are kept, not copied.
            device: where the next call will be computed; None is the device on which the model executes. A stream
                with a parking device keeps copies there instead.

        Raises:
            ValueError: `state` is not a whole state of this kind of stream for this model. The stream is unchanged
                then.
        """
        meta = read_meta(state, _META_KEYS, of="tiny VAE stream")
        if meta["kind"] != self._kind:
            raise ValueError(f"this is the state of a {meta['kind']}, not of a {self._kind}")
        if meta["vae"] != self._architecture():
            raise ValueError(f"this state is of another tiny VAE: {meta['vae']} instead of {self._architecture()}")
        check_tensors(state, meta["tensors"])
        device = self.parking_device or device or get_module_execution_device(self.vae)
        memory = {name.removeprefix("memory."): state[name].to(device) for name in meta["tensors"]}
        self._commit(memory, meta["layout"], meta["steps_done"], meta["finished"])

    def _architecture(self) -> dict[str, Any]:
        return through_json({key: self.vae.config[key] for key in _CONFIG_KEYS})

    def _begin(self, x: torch.Tensor) -> tuple[dict[str, Any], Memory]:
        """Check `x` against the stream; give its layout and the memory to go on from, on the device of `x`."""
        names = ("batch", "height", "width", "dtype")
        dtype = str(x.dtype).removeprefix("torch.")
        layout = dict(zip(names, (x.shape[0], x.shape[-2], x.shape[-1], dtype), strict=True))
        for name, was in (self._layout or {}).items():
            if layout[name] != was:
                raise ValueError(
                    f"{name} {layout[name]} in a stream that started with {was}: keep it, or reset() first"
                )
        return layout, self._memory if self.parking_device is None else _copied(self._memory, x.device)

    def _commit(self, memory: Memory, layout: dict[str, Any] | None, steps_done: int, finished: bool = False) -> None:
        # Detached: with gradients on, a held tensor would otherwise keep the graph of the whole stream alive.
        memory = {name: tensor.detach() for name, tensor in memory.items()}
        self._memory = memory if self.parking_device is None else _copied(memory, self.parking_device)
        self._layout, self._steps_done, self._finished = layout, steps_done, finished


class TinyVaeDecoder(_TinyVaeStream):
    """Latents in, frames out, in chunks of any length; equal to one `vae.decode` over all of them, within rounding."""

    _kind = "tiny VAE decoder"

    @property
    def latent_frames_done(self) -> int:
        """Latent frames that were decoded since the stream started."""
        return self._steps_done

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode the next latent frames of the stream, all in parallel.

        Args:
            latents: (batch, z_dim, latent_frames, height, width) in the model's latent space, as `vae.decode` takes
                them; in its dtype and on its device. At least one frame.

        Returns:
            Frames (batch, 3, frames, pixel_height, pixel_width) in [-1, 1], new memory. The first latent frame of the
            stream gives one frame, every later one `scale_factor_temporal` (4).

        Raises:
            ValueError: the latents have another shape or dtype than the model or the stream takes.
            After any exception the stream is as it was before the call.
        """
        check_latents(self.vae, latents)
        layout, memory = self._begin(latents)
        frames, memory = decode_part(self.vae, latents, memory)
        if self._steps_done == 0:
            frames = frames[:, :, self.vae.config["scale_factor_temporal"] - 1 :]
        self._commit(memory, layout, self._steps_done + latents.shape[2])
        return frames


class TinyVaeEncoder(_TinyVaeStream):
    """Frames in, latents out, in pieces of any length; equal to one `vae.encode` over all of them, within rounding.

    Unlike Wan's own VAE, the tiny one looks ahead: latent k is made of the video frames 4k to 4k + 3 and those before,
    so it comes out only with frame 4k + 3. A video of 1 + 4n frames has n latents before its end; `finish` gives the
    last one, for which it repeats the last frame three times. A single image is `encode`, then `finish`. For a look at
    the latent that is under way, without ending the stream, finish a fork of it.
    """

    _kind = "tiny VAE encoder"

    @property
    def latent_frames_done(self) -> int:
        """Latent frames that came out since the stream started."""
        return self._steps_done // self.vae.config["scale_factor_temporal"]

    def encode(self, video: torch.Tensor) -> IdentityDistribution:
        """Encode the next frames of the stream, all in parallel.

        Args:
            video: (batch, 3, frames, pixel_height, pixel_width) in [-1, 1], in the model's dtype and on its device. At
                least one frame, any number.

        Returns:
            `.mode()` and `.sample()` are the latents that these frames complete (batch, z_dim, latent_frames, height,
            width), as `vae.encode` gives them; possibly none, `latent_frames` is 0 then.

        Raises:
            ValueError: the video has another shape or dtype than the model or the stream takes.
            RuntimeError: the stream was finished.
            After any exception the stream is as it was before the call.
        """
        self._check_unfinished()
        check_video(self.vae, video)
        layout, memory = self._begin(video)
        latents, memory = encode_part(self.vae, video, memory)
        memory[_LAST_FRAME] = video[:, :, -1:].clone()
        self._commit(memory, layout, self._steps_done + video.shape[2])
        return IdentityDistribution(latents)

    def finish(self) -> IdentityDistribution:
        """End the stream: the last latent frame, made of what waits and of the last frame repeated.

        Returns:
            As `encode`. `latent_frames` is 1, or 0 if the frames so far were a multiple of `scale_factor_temporal`.

        Raises:
            RuntimeError: the stream was finished before, or has had no frame.
            After any exception the stream is as it was before the call.
        """
        self._check_unfinished()
        if self._steps_done == 0:
            raise RuntimeError("there is nothing to finish: encode at least one frame first")
        last_frame = self._memory[_LAST_FRAME]
        if self.parking_device is not None:
            last_frame = last_frame.to(get_module_execution_device(self.vae))
        missing = -self._steps_done % self.vae.config["scale_factor_temporal"]
        layout, memory = self._begin(last_frame)
        if missing:
            latents, _ = encode_part(self.vae, last_frame.expand(-1, -1, missing, -1, -1), memory)
        else:
            ratio = self.vae.config["scale_factor_spatial"]
            height, width = last_frame.shape[-2] // ratio, last_frame.shape[-1] // ratio
            latents = last_frame.new_empty(len(last_frame), self.vae.config["z_dim"], 0, height, width)
        self._commit({}, layout, self._steps_done + missing, finished=True)
        return IdentityDistribution(latents)

    def _check_unfinished(self) -> None:
        if self._finished:
            raise RuntimeError("this stream was finished: reset() it for another video")


def _copied(memory: Memory, device: torch.device) -> Memory:
    return {name: copied_to(tensor, device) for name, tensor in memory.items()}
