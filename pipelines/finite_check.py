"""NaN and infinity in latents and pixels, found once per chunk."""

import torch

from wan_autoregressive.pipelines.frame_grid import Chunk


def check_finite(steps_finite: list[torch.Tensor], pixels_finite: torch.Tensor | None, chunk: Chunk) -> None:
    """Raise `RuntimeError`, naming chunk and step, unless all steps of a chunk gave finite latents and the VAE finite
    pixels.

    Waits for the device, once; call it where that is due anyway.

    Args:
        steps_finite: a boolean scalar for each step of the chunk.
        pixels_finite: one for its pixels, `None` if there are none.
    """
    finite = torch.stack(steps_finite).tolist() if steps_finite else []
    where = f"chunk {chunk.index} (latent frames {chunk.start} to {chunk.stop - 1})"
    why = "damaged weights do this, and so does float16, which overflows where bfloat16 and float32 do not"
    if not all(finite):
        raise RuntimeError(
            f"the latents of {where} hold NaN or infinite values from denoising step {finite.index(False) + 1} of "
            f"{len(finite)} on; {why}"
        )
    if pixels_finite is not None and not pixels_finite:
        raise RuntimeError(f"the pixels of {where} hold NaN from the VAE, though its latents are finite; {why}")
