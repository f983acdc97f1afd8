"""Chunk-by-chunk, endless video generation with Wan models on stock diffusers."""

import importlib
from typing import TYPE_CHECKING, Any

from wan_autoregressive._version import __version__
from wan_autoregressive.demo import demo_checkpoint

if TYPE_CHECKING:
    from wan_autoregressive.cache import WanKVCache
    from wan_autoregressive.configs.checkpoints import checkpoint_folder
    from wan_autoregressive.models import AutoencoderTinyWan, CausalWanTransformer3DModel
    from wan_autoregressive.pipelines import WanAutoregressivePipeline, WanRollout, WanVideoChunk
    from wan_autoregressive.schedulers import SelfForcingScheduler

# Imported on first use, so that `wan-ar --help` does not wait for torch.
_PUBLIC = {
    "AutoencoderTinyWan": "models",
    "CausalWanTransformer3DModel": "models",
    "SelfForcingScheduler": "schedulers",
    "WanAutoregressivePipeline": "pipelines",
    "WanKVCache": "cache",
    "WanRollout": "pipelines",
    "WanVideoChunk": "pipelines",
    "checkpoint_folder": "configs.checkpoints",
}

__all__ = [
    "AutoencoderTinyWan",
    "CausalWanTransformer3DModel",
    "SelfForcingScheduler",
    "WanAutoregressivePipeline",
    "WanKVCache",
    "WanRollout",
    "WanVideoChunk",
    "__version__",
    "checkpoint_folder",
    "demo_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
