"""NaN and infinity in latents, found once per chunk."""

import torch

from wan_autoregressive.pipelines.frame_grid import FrameBlock


def check_finite(steps_finite: list[torch.Tensor], block: FrameBlock) -> None:
    """Raise `RuntimeError`, naming chunk and step, unless all steps of a chunk gave finite latents.

    Waits for the device, once; call it where that is due anyway.

    Args:
        steps_finite: a boolean scalar for each step of the chunk.
    """
    finite = torch.stack(steps_finite).tolist() if steps_finite else []
    if not all(finite):
        raise RuntimeError(
            f"the latents of chunk {block.index} (latent frames {block.start} to {block.stop - 1}) hold NaN or "
            f"infinite values from denoising step {finite.index(False) + 1} of {len(finite)} on; damaged weights do "
            "this, and so does float16, which overflows where bfloat16 and float32 do not"
        )
