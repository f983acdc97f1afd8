"""The command as its own process."""

from benchmarks.live_process import ServerProcess

__all__ = ["ServerProcess"]
