"""Clips as rows of frames, in one PNG that a person can look at."""

from pathlib import Path

import torch

from wan_autoregressive.media import contact_sheet


def save_contact_sheet(clips: torch.Tensor, path: Path, columns: int = 12, scale: int = 2) -> None:
    """Write clips (B, 3, F, height, width) in -1..1 as B rows of `columns` frames, spread evenly over each clip."""
    columns = min(columns, clips.shape[2])
    chosen = torch.linspace(0, clips.shape[2] - 1, columns).round().long()
    pixels = ((clips[:, :, chosen].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    frames = pixels.permute(0, 2, 3, 4, 1).flatten(0, 1)
    contact_sheet.save_contact_sheet(frames.numpy(), path, columns, scale)
