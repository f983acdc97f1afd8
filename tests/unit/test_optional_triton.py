"""Without Triton its kernels can be imported, and say what is missing."""

import importlib.util
import sys
from pathlib import Path

import pytest


def test_without_triton_the_kernels_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # import raises ImportError
    path = Path(__file__).parents[2] / "models" / "triton_kernels.py"
    spec = importlib.util.spec_from_file_location("kernels_without_triton", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    with pytest.raises(ValueError, match="Triton is not installed"):
        kernels.use_triton_kernels(None)
