"""How much may go on in the live server."""

from __future__ import annotations

from dataclasses import dataclass


class QueueFullError(RuntimeError):
    """There is no place left, not even to wait in."""


class UnknownSessionError(ValueError):
    """There is no session of that name."""


class PromptError(ValueError):
    """The model cannot take this prompt; everything else is as it was."""


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of what the engine does and holds."""

    slots: int | None = 1
    """Sessions that are watched at the same time; None for as many as the model is fast enough for."""
    queue: int = 8
    """Sessions that may wait."""
    max_seconds: float = 600.0
    """Video of one session, all branches together."""
    snapshots: int = 8
    """Places of a video, beside its start, that are held in memory to go back to at once."""
    parked: int = 64
    """Videos without a viewer that are kept on the disk."""
    checkpoint_every: int = 0
    """Chunks after which a session is saved, so that it outlives a crash; 0 saves only when its viewer leaves."""
