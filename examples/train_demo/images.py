"""Contact sheets: clips as rows of frames, in one PNG that a person can look at."""

from pathlib import Path

import torch
from PIL import Image

from examples.train_demo.world import SIZE

GAP = 2  # pixels between two frames


def save_contact_sheet(clips: torch.Tensor, path: Path, columns: int = 12, scale: int = 2) -> None:
    """Write clips (B, 3, F, SIZE, SIZE) in -1..1 as B rows of `columns` frames, spread evenly over each clip."""
    rows, _, frames = clips.shape[:3]
    columns = min(columns, frames)
    chosen = torch.linspace(0, frames - 1, columns).round().long()
    cell = SIZE + GAP
    sheet = torch.full((3, rows * cell + GAP, columns * cell + GAP), 90, dtype=torch.uint8)
    pixels = ((clips[:, :, chosen].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = GAP + row * cell, GAP + column * cell
            sheet[:, top : top + SIZE, left : left + SIZE] = pixels[row, :, column]
    image = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)
