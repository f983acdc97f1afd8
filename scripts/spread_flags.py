"""The flags of `wan-ar generate` that say who makes the videos of a list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wan_autoregressive.configs import GenerateConfig


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Who makes the videos of a list: this run alone, any number of runs, or workers of this run.

    Args:
        share: Any number of runs of this command, on any machines, make the list between them; one that dies is taken
            over. Needs --prompts and --seed; all of them have to be started with it.
        workers: Processes that make the videos of --prompts, on this machine or a cluster; needs --seed.
        engine: What starts workers: ray (pip install 'wan-autoregressive[ray]').
        ray_address: A running Ray cluster, host:port or auto; without it one is started here, for this run alone.
        gpus_per_video: GPUs of a worker, on one machine; 1 by default where there are any, more share each video.
    """

    share: bool = False
    workers: int | None = None
    engine: Literal["ray"] = "ray"
    ray_address: str | None = None
    gpus_per_video: int | None = None

    @property
    def is_used(self) -> bool:
        """Whether others make videos of the list as well."""
        return self.share or self.workers is not None

    def check(self, config: GenerateConfig) -> None:
        """Raise `ValueError` for what does not go together."""
        if self.workers is None:
            for name in ("ray_address", "gpus_per_video"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} says where workers run; give --workers as well")
        elif self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        if self.gpus_per_video is not None and self.gpus_per_video < 0:
            raise ValueError(f"--gpus-per-video must not be negative, got {self.gpus_per_video}")
        if not self.is_used:
            return
        flag = "--share" if self.share else "--workers"
        if self.share and self.workers is not None:
            raise ValueError("--share and --workers both say who makes the videos of a list; give one of them")
        if config.prompts is None:
            raise ValueError(f"{flag} is for a list of videos; give --prompts")
        if config.seed is None:
            raise ValueError(f"{flag} needs --seed: a video has to be the same whoever makes it or goes on with it")
