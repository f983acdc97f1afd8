"""What everything else is measured on: device, versions, and the rates that bound it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_kit.peaks import measure_peaks
from benchmarks.gpu_kit.setting import Record, Setting
from wan_autoregressive.scripts.run_report import describe_device, human_bytes, versions

# Beside those that the library always has: what attention and compilers may use.
_OPTIONAL = ("triton", "flash-attn", "sageattention", "xformers", "peft")


def measure(setting: Setting, record: Record) -> None:
    """Write down the machine, then its rates in each dtype."""
    device = setting.device
    facts = {"device": describe_device(device), "system": platform.platform(), "CPU cores": os.cpu_count()}
    if device.type == "cuda":
        facts |= _cuda_facts(device)
    facts |= versions() | {name: _version(name) for name in _OPTIONAL}
    for what, value in facts.items():
        record.row("machine", what=what, value=value)
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,):
        peaks = measure_peaks(device, dtype, setting.is_tiny)
        record.row(
            "rates",
            dtype=str(dtype).removeprefix("torch."),
            matrix_products_in_TFLOP_per_s=peaks.flops_per_s / 1e12,
            copies_in_GB_per_s=peaks.bytes_per_s / 1e9,
        )


def _cuda_facts(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "memory": f"{human_bytes(total)}, {human_bytes(free)} of it free",
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "float32 products in TF32": torch.backends.cuda.matmul.allow_tf32,
        "float32 convolutions in TF32": torch.backends.cudnn.allow_tf32,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
