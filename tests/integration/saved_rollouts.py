"""Small rollouts to save and resume, and what it means for two to be the same."""

import numpy as np
import torch

from wan_autoregressive.pipelines.state_values import pack

SIZE = {"height": 32, "width": 32}
SHORT = {**SIZE, "num_frames": 49, "num_inference_steps": 2}  # 13 latent frames: chunks of 3, 3, 3, 3, 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def start(pipe, **options):
    options = {"prompt": "a red circle", **SHORT, "generator": generator(), **options}
    return pipe.rollout(**options)


def assert_same(chunks, expected) -> None:
    assert len(chunks) == len(expected)
    for chunk, other in zip(chunks, expected, strict=True):
        assert torch.equal(chunk.latents, other.latents)
        assert (chunk.index, chunk.start_frame, chunk.given) == (other.index, other.start_frame, other.given)
        assert chunk.prompt == other.prompt
        if other.frames is not None:
            assert np.array_equal(chunk.frames, other.frames)


def state_of(rollout) -> dict:
    """Everything of a rollout that is saved, with tensors as bytes, to be compared."""
    tensors: dict[str, torch.Tensor] = {}
    values = pack(rollout.state_dict(), tensors)
    values.pop("seconds_before")
    return {"values": values, "tensors": {name: tensor.clone().numpy().tobytes() for name, tensor in tensors.items()}}
