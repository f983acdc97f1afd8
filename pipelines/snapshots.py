"""Places of one video that are held in memory as forks, to go back to at once and to the bit."""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from wan_autoregressive.pipelines.heap import HEAP
from wan_autoregressive.pipelines.rollout import WanRollout

Place = TypeVar("Place", bound=Hashable)


class Snapshots(Generic[Place]):
    """The start of a video, once it was kept, and the newest other places. Each holds a copy of the keys and values.

    Args:
        start: What the start of the video is called. It holds no keys and values, stays, and does not count.
        most: Other places at most.
    """

    def __init__(self, start: Place, most: int) -> None:
        self._start, self._most = start, most
        self._forks: dict[Place, WanRollout] = {}

    def __contains__(self, place: object) -> bool:
        return place in self._forks

    @property
    def places(self) -> list[Place]:
        """All that are held, those kept last at the end."""
        return list(self._forks)

    def keep(self, place: Place, rollout: WanRollout) -> None:
        """Hold a copy of a rollout as it is now, and drop the oldest where that is one too many."""
        if place != self._start and not self._most:
            return
        self._forks.pop(place, None)
        self._forks[place] = rollout.fork()
        others = [held for held in self._forks if held != self._start]
        self.drop(others[: max(0, len(others) - self._most)])
        HEAP.look()

    def fork(self, place: Place) -> WanRollout:
        """A rollout of its own that goes on from there. `KeyError` if it is not held."""
        return self._forks[place].fork()

    def drop(self, places: Iterable[Place]) -> None:
        """Hold these no more, as far as they are."""
        for place in places:
            self._forks.pop(place, None)
