"""The tests of this folder run on CUDA with the mark `gpu`, and on a CPU as far as they make sense there.

On a CPU they show that the tests themselves work; what they say of a CPU other tests say as well.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from wan_autoregressive import WanAutoregressivePipeline

ON_A_CPU = pytest.param("cpu", marks=pytest.mark.slow)
ON_CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is either device; `cuda` is for what only CUDA has."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [ON_A_CPU, ON_CUDA], indirect=True)
    elif "cuda" in metafunc.fixturenames:
        metafunc.parametrize("cuda", [ON_CUDA], indirect=True)


@pytest.fixture
def device(request) -> torch.device:
    return torch.empty(0, device=request.param).device  # by its index


@pytest.fixture
def cuda(request) -> torch.device:
    return torch.empty(0, device=request.param).device


@pytest.fixture(scope="session")
def pipes(tiny_checkpoint) -> Callable[[torch.device], WanAutoregressivePipeline]:
    """One pipeline of the tiny checkpoint for each device."""

    @functools.cache
    def pipe_on(device: torch.device) -> WanAutoregressivePipeline:
        pipe = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return pipe_on


@pytest.fixture
def pipe(pipes, request) -> WanAutoregressivePipeline:
    """On the device of the test."""
    return pipes(request.getfixturevalue("device" if "device" in request.fixturenames else "cuda"))
