"""Seeds that a failure can be repeated with; a complete small random checkpoint, and a fresh pipeline on it."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch
from tiny_checkpoint import make_tiny_checkpoint

from wan_autoregressive import WanAutoregressivePipeline

# Small tensors gain nothing from threads, and on a busy machine they lose by an order of magnitude: one, unless
# OMP_NUM_THREADS says otherwise, for the commands that tests start as well.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# A failing example of hypothesis is printed as a decorator that repeats it.
hypothesis.settings.register_profile("printed", print_blob=True)
hypothesis.settings.load_profile("printed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-seed", type=int, default=0, help="global seed of torch before every test (default: 0)")


def pytest_report_header(config: pytest.Config) -> str:
    seed, kernels = config.getoption("--torch-seed"), torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {kernels} kernels, --torch-seed {seed}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test draws the same numbers alone and among others, as do the fixtures that are made for it."""
    torch.manual_seed(item.config.getoption("--torch-seed"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Folder with tokenizer, text encoder, transformer, VAE and scheduler, under 2 MB."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint) -> WanAutoregressivePipeline:
    pipe = WanAutoregressivePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
