"""Who may change a rollout, and when: one thing at a time, and nothing after a step that failed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class RolloutGuard:
    """Refuses what would find a rollout in use or half-written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failed = False

    @contextmanager
    def held(self, verb: str) -> Iterator[None]:
        """Keep others from changing the rollout. Raises `RuntimeError` while something else does."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"cannot {verb} this rollout while it is in use; do it between two steps (a thread may be in step(), "
                "save() or fork(), or an iterator that decodes alongside may still be open)"
            )
        try:
            yield
        finally:
            self._lock.release()

    def check_whole(self, verb: str) -> None:
        """Raise `RuntimeError` if a step has left the rollout half-written."""
        if self._failed:
            raise RuntimeError(
                f"cannot {verb} this rollout: a step of it failed, or an iterator that ran ahead was closed, and left "
                "it half-written; reset() starts anew"
            )

    @contextmanager
    def writing(self, harmless: type[Exception]) -> Iterator[None]:
        """The rollout is half-written until the block ends, by itself or by an error of the `harmless` kind."""
        self._failed = True
        try:
            yield
        except harmless:
            self._failed = False
            raise
        self._failed = False

    def mend(self) -> None:
        """All of the rollout was made anew."""
        self._failed = False
