"""TAEHV, the tiny autoencoder: whole and frame by frame, with what its streaming coder holds on the way."""

from pathlib import Path
from typing import Any

import torch

from golden_kinds.recording import channels_first
from wan_autoregressive.models import AutoencoderTinyWan
from wan_autoregressive.models.tiny_vae_stream import TinyVaeDecoder, TinyVaeEncoder

KIND = "taehv"


def matches(name: str, meta: dict[str, Any]) -> bool:
    return str(meta.get("upstream")).startswith("madebyollin/taehv")


@torch.no_grad()
def differences(
    meta: dict[str, Any], tensors: dict[str, torch.Tensor], weights_folder: Path, **changes: Any
) -> dict[str, float]:
    """Args:
    changes: Arguments of `AutoencoderTinyWan.from_single_file`.
    """
    videos = channels_first(tensors)
    vae = AutoencoderTinyWan.from_single_file(weights_folder / Path(meta["weights"]["file"]).name, **changes)
    latents, frames = videos["latents"], videos["frames"]
    clip = frames[:, :, : meta["encode_frames"]] * 2 - 1
    decoder, encoder = TinyVaeDecoder(vae), TinyVaeEncoder(vae)
    streamed = torch.cat([decoder.decode(latent) for latent in latents.split(1, dim=2)], dim=2)
    encoded = [encoder.encode(frame).mode() for frame in clip.split(1, dim=2)] + [encoder.finish().mode()]
    found = {
        "frames": _largest(vae.decode(latents).sample / 2 + 0.5, frames),
        "streamed": _largest(streamed / 2 + 0.5, frames),
        "encoded": _largest(vae.encode(clip).latent_dist.mode(), videos["encoded"]),
        "stream encoded": _largest(torch.cat(encoded, dim=2), videos["encoded"]),
    }
    for part in ("decoder", "encoder"):
        recorded = {key: value for key, value in tensors.items() if key.startswith(f"{part}_memory")}
        found[f"{part} memory"] = max((_memory(vae, part, latents, clip, recorded)), default=0.0)
    return found


def _memory(
    vae: AutoencoderTinyWan, part: str, latents: torch.Tensor, clip: torch.Tensor, recorded: dict[str, torch.Tensor]
) -> list[float]:
    """Differences of the states, in units of their largest number, since they reach far beyond 1."""
    found = []
    for after in sorted({int(key.split(".")[1].removeprefix("after")) for key in recorded}):
        stream = TinyVaeDecoder(vae) if part == "decoder" else TinyVaeEncoder(vae)
        stream.decode(latents[:, :, :after]) if part == "decoder" else stream.encode(clip[:, :, :after])
        state = stream.state_dict()
        for key, expected in recorded.items():
            if f".after{after:02}." not in key:
                continue
            layer, *pool = key.split(".b")[1].split(".pool")
            held = state[f"memory.{int(layer)}"]
            got = held[:, int(pool[0])] if pool else held
            found.append(_largest(got, expected) / max(1.0, expected.abs().max().item()))
    return found


def _largest(got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        raise ValueError(f"got {tuple(got.shape)}, recorded was {tuple(expected.shape)}")
    return (got - expected).abs().max().item()
