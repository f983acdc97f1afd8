"""Fixtures: a complete small random checkpoint, and a fresh pipeline on it."""

import os
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import make_tiny_checkpoint

from wan_autoregressive import WanAutoregressivePipeline

# Small tensors gain nothing from threads, and on a busy machine they lose by an order of magnitude.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start


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
