"""Videos on the disk that nobody watches now: the newest few, also those of an earlier server."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from wan_autoregressive.server.video_folder import VideoFolder

ID_LENGTH = 22  # of 16 random bytes; whoever knows a session's id may see it


class ParkedVideos:
    """Their folders by session, the one that was parked last at the end. Guarded by the engine's lock."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._parked: OrderedDict[str, None] = OrderedDict((name, None) for name in self._saved())

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

    def _saved(self) -> list[str]:
        """Sessions that can be taken up, by age; only under names that the engine gives."""
        named = [path for path in self._folder.iterdir() if len(path.name) == ID_LENGTH]
        saved = [path for path in named if (path / "session.json").is_file()]
        return [path.name for path in sorted(saved, key=lambda path: (path / "session.json").stat().st_mtime)]
