"""Videos on the disk that nobody watches now: the newest few, also those of an earlier server."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

from wan_autoregressive.server.video_folder import VideoFolder

_ID = re.compile(r"[A-Za-z0-9_-]{22}")


class ParkedVideos:
    """Their folders by session, the one that was parked last at the end. Guarded by the engine's lock."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._parked: OrderedDict[str, None] = OrderedDict()
        for name in self._found():
            for old in self.put(name):
                old.remove()

    def __contains__(self, key: object) -> bool:
        return key in self._parked

    def __len__(self) -> int:
        return len(self._parked)

    def folder(self, key: str) -> VideoFolder:
        """Where a session is, parked or not."""
        return VideoFolder(self._folder / key)

    def put(self, key: str) -> list[VideoFolder]:
        """Park a session that was saved; gives those that are one too many now, which the caller removes."""
        self._parked[key] = None
        oldest = [self._parked.popitem(last=False)[0] for _ in range(len(self._parked) - self._most)]
        return [self.folder(name) for name in oldest]

    def remove(self, key: str) -> None:
        """Not parked any more; its files stay."""
        self._parked.pop(key, None)

    def _found(self) -> list[str]:
        """Sessions that can be taken up, by age; what a crash left of others is removed. Only the engine's names."""
        sessions = [VideoFolder(path) for path in self._folder.iterdir() if _ID.fullmatch(path.name)]
        ages = {session.path.name: session.saved_at for session in sessions if session.is_one}
        for name, saved_at in ages.items():
            if saved_at is None:
                self.folder(name).remove()
        return [name for name, at in sorted(ages.items(), key=lambda item: item[1] or 0) if at is not None]
