"""The state of one stream through a Wan VAE: what it holds, how it is checked, saved, loaded and forked.

`AutoencoderKLWan`'s encoder and decoder carry a plain list of features from step to step. They replace the entries of
such a list and never write into a cached tensor, so copying the list is enough for a rollback point or for a fork.
This module knows nothing of how a step is computed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d
from diffusers.utils.torch_utils import get_module_execution_device

from wan_autoregressive.models.stream_state import (
    check_tensors,
    copied_to,
    pack_meta,
    read_meta,
    through_json,
    wait_for_copies,
)

# What upstream keeps per causal convolution: nothing yet, the last frames of its input (at most two), or the marker
# "Rep" (the first frame has passed through a temporal upsampler and has no predecessor to interpolate with).
FeatureCache = list[Any]

_CONFIG_KEYS = (
    "base_dim",
    "decoder_base_dim",
    "z_dim",
    "dim_mult",
    "num_res_blocks",
    "temperal_downsample",
    "is_residual",
    "patch_size",
)
_META_KEYS = {"kind", "vae", "layout", "lanes", "latent_frames_done", "tensors", "markers"}

Stream = TypeVar("Stream", bound="VaeStream")


def empty_cache(coder: torch.nn.Module) -> FeatureCache:
    """A feature cache for `vae.encoder` or `vae.decoder` before its first step: one empty slot per convolution."""
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in coder.modules())


def cache_bytes(*lanes: FeatureCache) -> int:
    """Bytes of the tensors in these caches."""
    return sum(entry.nbytes for lane in lanes for entry in lane if isinstance(entry, torch.Tensor))


@dataclass(frozen=True)
class _Layout:
    """What must not change while a stream runs, because its feature caches were cut to it."""

    batch: int
    height: int
    width: int
    dtype: str
    slicing: bool
    tiling: tuple[int, ...] | None

    @classmethod
    def of(cls, vae: AutoencoderKLWan, x: torch.Tensor) -> _Layout:
        tiling = (
            int(vae.tile_sample_min_height),
            int(vae.tile_sample_min_width),
            int(vae.tile_sample_stride_height),
            int(vae.tile_sample_stride_width),
        )
        batch, _, _, height, width = x.shape
        dtype = str(x.dtype).removeprefix("torch.")
        return cls(batch, height, width, dtype, bool(vae.use_slicing), tiling if vae.use_tiling else None)

    def check_same(self, now: _Layout) -> None:
        """Raise ValueError for other input, RuntimeError for other VAE settings than the stream started with."""
        for name in ("batch", "height", "width", "dtype"):
            was, got = getattr(self, name), getattr(now, name)
            if was != got:
                raise ValueError(f"{name} {got} in a stream that started with {was}: keep it, or reset() first")
        for name in ("slicing", "tiling"):
            was, got = getattr(self, name), getattr(now, name)
            if was != got:
                raise RuntimeError(
                    f"vae {name} was changed from {was} to {got} while the stream runs: set it back, or reset() first"
                )


class VaeStream:
    """One stream's feature caches and what they were cut to. Subclasses add the direction.

    Args:
        parking_device: Where the feature caches are kept between two calls, such as "cpu" for a VAE on a GPU; None
            leaves them where they are used. A call then copies `state_bytes` to the VAE's device before and back
            after it, on CUDA from and to pinned memory without waiting. In return the VAE's device holds nothing
            between calls, and in a call the state once instead of twice.
    """

    _kind: str  # "decoder" or "encoder": the submodule whose features are cached

    def __init__(self, vae: AutoencoderKLWan, parking_device: torch.device | str | None = None) -> None:
        self.vae = vae
        self.parking_device = None if parking_device is None else torch.device(parking_device)
        self._empty = empty_cache(getattr(vae, self._kind))
        self.reset()

    @property
    def latent_frames_done(self) -> int:
        """Latent frames that went through since the stream started."""
        return self._latent_frames_done

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors held for the next call: 0 at first, constant from the second latent frame on."""
        return cache_bytes(*self._lanes)

    def reset(self) -> None:
        """Forget everything; the next call starts a new stream, of any size."""
        self._layout: _Layout | None = None
        self._lanes: list[FeatureCache] = []  # one per tile, tiles of one batch slice after another
        self._latent_frames_done = 0

    def fork(self: Stream) -> Stream:
        """A second stream that goes on from here on its own. Costs no memory until the two move on."""
        return copy.copy(self)  # what it holds is replaced, never written to

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on later, as a flat dict that `safetensors.torch.save_file` takes as it is.

        Returns:
            The cached tensors under `lane.<i>.slot.<j>` (the ones held, copied only where they are not contiguous; do
            not write into them) and `meta`, a small JSON text as a uint8 tensor on the CPU.
        """
        if self.parking_device is not None:
            wait_for_copies(self.vae)
        state, markers = {}, {}
        for i, lane in enumerate(self._lanes):
            for j, entry in enumerate(lane):
                if isinstance(entry, torch.Tensor):
                    state[f"lane.{i}.slot.{j}"] = entry.contiguous()
                elif entry is not None:
                    markers[f"lane.{i}.slot.{j}"] = entry
        meta = {
            "kind": self._kind,
            "vae": self._fingerprint(),
            "layout": vars(self._layout) if self._layout else None,
            "lanes": len(self._lanes),
            "latent_frames_done": self._latent_frames_done,
            "tensors": sorted(state),
            "markers": markers,
        }
        state["meta"] = pack_meta(meta)
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor], device: torch.device | str | None = None) -> None:
        """Replace this stream's state by one that `state_dict` gave.

        Args:
            state: the dict; tensors already on `device` are kept, not copied.
            device: where the next chunk will be computed; None is the device on which the VAE executes. A stream with
                a parking device keeps copies there instead.

        Raises:
            ValueError: `state` is not a whole state of this kind of stream for this VAE. The stream is unchanged then.
        """
        meta = read_meta(state, _META_KEYS, of="VAE stream")
        if meta["kind"] != self._kind:
            raise ValueError(f"this is the state of a VAE {meta['kind']}, not of a VAE {self._kind}")
        if meta["vae"] != self._fingerprint():
            raise ValueError(f"this state is of another VAE: {meta['vae']} instead of {self._fingerprint()}")
        check_tensors(state, meta["tensors"])
        device = self.parking_device or device or get_module_execution_device(self.vae)
        lanes: list[FeatureCache] = [list(self._empty) for _ in range(meta["lanes"])]
        tensors = {name: state[name].to(device) for name in meta["tensors"]}
        for name, entry in (tensors | meta["markers"]).items():
            _, i, _, j = name.split(".")
            lanes[int(i)][int(j)] = entry
        layout = meta["layout"]
        if layout is not None:
            layout = _Layout(**layout | {"tiling": layout["tiling"] and tuple(layout["tiling"])})
        self._commit(layout, lanes, meta["latent_frames_done"])

    def _fingerprint(self) -> dict[str, Any]:
        config = {key: self.vae.config[key] for key in _CONFIG_KEYS}
        return through_json(config | {"slots": len(self._empty)})

    def _begin(self, x: torch.Tensor, tiles: int) -> tuple[_Layout, list[FeatureCache]]:
        """Check x, cut into so many tiles, against the stream; hand out caches to work on, which `_commit` keeps."""
        layout = _Layout.of(self.vae, x)
        if self._layout is not None:
            self._layout.check_same(layout)
            parked = self.parking_device is not None
            return layout, [_copied(lane, x.device) if parked else list(lane) for lane in self._lanes]
        slices = layout.batch if layout.slicing else 1
        return layout, [list(self._empty) for _ in range(slices * tiles)]

    def _commit(self, layout: _Layout | None, lanes: list[FeatureCache], latent_frames_done: int) -> None:
        """Keep new lists of the tensors in `lanes`."""
        # Detached: with gradients on, a cached tensor would otherwise keep the graph of the whole stream alive.
        lanes = [[e.detach() if isinstance(e, torch.Tensor) else e for e in lane] for lane in lanes]
        if self.parking_device is not None:
            lanes = [_copied(lane, self.parking_device) for lane in lanes]
        self._lanes = lanes
        self._layout = layout
        self._latent_frames_done = latent_frames_done


def _copied(lane: FeatureCache, device: torch.device) -> FeatureCache:
    """The cache with copies of its tensors on `device`."""
    return [copied_to(entry, device) if isinstance(entry, torch.Tensor) else entry for entry in lane]
