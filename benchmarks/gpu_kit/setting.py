"""What a part is asked to measure on, and where it writes down what it finds."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.experiment import Bench
    from wan_autoregressive.scripts.costs.workload import Workload


@dataclass(frozen=True)
class Setting:
    """The device, and whether everything is as small as can be: to try the kit, not to measure."""

    device_name: str
    is_tiny: bool = False

    @property
    def device(self) -> torch.device:
        """The device by its index, as tensors have it; ValueError if this machine has none of that name."""
        import torch

        from wan_autoregressive.scripts.costs.build import usable_device

        return torch.empty(0, device=usable_device(self.device_name)).device

    def workload(self, preset: str, height: int, width: int, **changes: Any) -> Workload:
        """A rollout of a published size in bfloat16, with a window of 21 latent frames and a sink of 3, long enough
        for some steady chunks. Tiny it is one of the demo checkpoint's sizes in float32.

        Args:
            changes: Of the flags of `make_workload`.
        """
        from wan_autoregressive.scripts.costs.sizes import ModelSizes
        from wan_autoregressive.scripts.costs.workload import make_workload

        shared = {"device": str(self.device), "chunks": 12}
        if self.is_tiny:
            tiny = {"layers": 2, "steps": 2, "window_frames": 6, "chunks": 4}
            return make_workload(**{**shared, **tiny, **changes})
        sizes = {"model": ModelSizes.of_preset(preset), "height": height, "width": width, "dtype": "bfloat16"}
        return make_workload(**{**shared, **sizes, "window_frames": 21, "sink_frames": 3, **changes})

    def bench(self, workload: Workload, repeats: int) -> Bench:
        """What the experiments of `benchmarks/` take."""
        from benchmarks.experiment import Bench
        from wan_autoregressive.scripts.costs.build import build_pipeline

        return Bench(argparse.Namespace(repeats=repeats), workload, build_pipeline(workload))


class Record:
    """Tables of figures in a JSON file, which is whole after every row.

    Args:
        path: Of the file; its folder is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def row(self, table: str, /, **cells: Any) -> None:
        """Add a row to a table: numbers, text, or None for what there is not; names are the columns' titles."""
        self.tables.setdefault(table, []).append({name.replace("_", " "): value for name, value in cells.items()})
        whole = self._path.with_suffix(".part")
        whole.write_text(json.dumps(self.tables), encoding="utf-8")
        os.replace(whole, self._path)
