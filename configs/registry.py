"""Names that a setting chooses from, each with the class behind it, imported when it is first used.

Without torch, so that a command refuses an unknown name at once. A package of its own adds to the names by an entry
point in the registry's group; a script by `register`.
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any


class Registry:
    """The implementations of one seam by name.

    Args:
        setting: The setting that names one, for messages.
        builtin: Name to `module:class`.
    """

    def __init__(self, setting: str, builtin: Mapping[str, str]) -> None:
        self._setting = setting
        self._targets: dict[str, Any] = dict(builtin)
        self._outside: dict[str, Any] | None = None

    def register(self, name: str, implementation: type) -> None:
        """Make `implementation` available as `name`. Raises `ValueError` for a name that another class has."""
        if self._targets.get(name, implementation) is not implementation:
            raise ValueError(f"{self._setting} {name!r} is taken; register {implementation.__name__} under another")
        self._targets[name] = implementation

    @property
    def names(self) -> tuple[str, ...]:
        """All names, built-in ones first."""
        if self._outside is None:
            self._outside = {entry.name: entry for entry in entry_points(group=f"wan_autoregressive.{self._setting}")}
        return tuple({**self._targets, **self._outside})

    def check(self, name: str) -> None:
        """Raise `ValueError` for a name that is not there."""
        if name not in self.names:
            raise ValueError(f"{self._setting} is {name!r}; allowed are {', '.join(self.names)}")

    def load(self, name: str) -> Any:
        """The class behind a name. Raises `ValueError` for one that is not there."""
        self.check(name)
        target = self._targets.get(name)
        if target is None:
            assert self._outside is not None
            target = self._outside[name].load()
        elif isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
        self._targets[name] = target
        return target


_SAMPLERS = "wan_autoregressive.pipelines.samplers"
SAMPLERS = Registry(
    "sampler",
    {
        "chunkwise": f"{_SAMPLERS}.chunkwise:ChunkwiseSampler",
        "rolling": f"{_SAMPLERS}.rolling:RollingSampler",
        "memory_bank": f"{_SAMPLERS}.memory_bank:MemoryBankSampler",
        "recompute": f"{_SAMPLERS}.recompute:RecomputeSampler",
        "stream_batch": f"{_SAMPLERS}.stream_batch:StreamBatchSampler",
    },
)

_SOLVERS = "wan_autoregressive.schedulers.step_solver"
SOLVERS = Registry("solver", {"renoise": f"{_SOLVERS}:RenoiseSolver", "unipc": f"{_SOLVERS}:UniPCSolver"})

_SWITCHING = "wan_autoregressive.pipelines.switching"
SWITCH_POLICIES = Registry(
    "switch_policy",
    {
        "recache": f"{_SWITCHING}:Recache",
        "cross_attention": f"{_SWITCHING}:CrossAttentionOnly",
        "flush": f"{_SWITCHING}:Flush",
        "cut": f"{_SWITCHING}:Cut",
        "blend": f"{_SWITCHING}:Blend",
        "scene_cut": "wan_autoregressive.pipelines.scene_cut:SceneCut",
    },
)
