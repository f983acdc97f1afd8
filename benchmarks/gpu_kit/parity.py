"""The recordings of the original implementations in `tests/data`, on the device instead of the CPU.

In float32 (without TF32) the bound is that of the CPU. In bfloat16 it is stated here: twice the largest
difference that bfloat16 makes on a CPU (`--device cpu`), since a device adds up in another order.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_kit.run_parts import ROOT
from benchmarks.gpu_kit.setting import Record, Setting
from wan_autoregressive.scripts.costs.build import cast_weights

BFLOAT16_BOUND = 0.12
"""Largest absolute difference of latents, x0, keys and values, which reach up to 7."""


def measure(setting: Setting, record: Record) -> None:
    """Write down every case in both dtypes; RuntimeError if one is outside its bound."""
    sys.path.append(str(ROOT / "tests" / "integration"))
    import golden

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)  # on a CPU tensors are too small for more
    folder = golden.REPOSITORY_CASES
    cases = golden.find_cases(folder / "open")
    failed = []
    for dtype, bound in ((torch.float32, golden.BOUND), (torch.bfloat16, BFLOAT16_BOUND)):
        for path in cases[:1] if setting.is_tiny else cases:
            found = _differences(golden, path, setting.device, dtype)
            is_within = max(found.values()) <= bound
            failed += [] if is_within else [path.stem]
            name = str(dtype).removeprefix("torch.")
            record.row("largest differences", case=path.stem, dtype=name, **found, bound=bound, within=is_within)
    if failed:
        raise RuntimeError(f"outside the bound: {', '.join(failed)}")


def _differences(golden: Any, path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """As `golden.differences`, with the case's model and tensors on the device, model and prompts in `dtype`."""
    meta, tensors = golden.load_case(path)
    kind = golden.kind_of(path, meta)
    transformer_of = kind.transformer_of

    def placed(*args: Any) -> Any:
        model = copy.deepcopy(transformer_of(*args))  # its own, since golden keeps one for all cases of a size
        cast_weights(model, dtype, model._keep_in_fp32_modules)
        return model.to(device)

    tensors = {
        name: tensor.to(device, dtype if name.startswith("prompt_embeds") else None)
        for name, tensor in tensors.items()
    }
    with patch.object(kind, "transformer_of", placed):
        return kind.differences(meta, tensors, golden.weights_folder_of(path, meta, kind))
