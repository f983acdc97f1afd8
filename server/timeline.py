"""What a live video is made of: chunks in a tree, since a viewer may go back and go on otherwise. Pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Decisions:
    """What is decided right before a chunk; everything else stays as it is."""

    prompt: str | None = None
    seed: int | None = None
    """To start the noise anew with."""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TimelineChunk:
    """A chunk, and the decisions before it: with those of its ancestors it can be made again to the bit."""

    id: int
    """Its own in the session; never used again."""
    parent: int | None
    """The chunk before it; None at the start of the video."""
    branch: int
    """On which it was made. Later branches may share it."""
    index: int
    """Chunks before it."""
    start_frame: int
    """First pixel frame."""
    frames: int
    """Pixel frames."""
    prompt: str
    new_prompt: str | None
    """Prompt that was set right before it."""
    new_seed: int | None
    """Seed that the noise was started anew with right before it."""
    new_settings: dict[str, Any] | None = None
    """Settings that were changed right before it."""
    near: bool = False
    """Right before it the past was made anew from latents: near to what it was, not the same."""

    @property
    def decisions(self) -> Decisions:
        """Made right before it."""
        return Decisions(self.new_prompt, self.new_seed, dict(self.new_settings or {}))

    @property
    def stop_frame(self) -> int:
        return self.start_frame + self.frames


@dataclass
class Timeline:
    """All chunks of a session that are kept, and which of them are the video now. Not safe between threads."""

    chunks: dict[int, TimelineChunk] = field(default_factory=dict)
    tips: dict[int, int | None] = field(default_factory=lambda: {0: None})
    """Last chunk of every branch; None before the first one."""
    branch: int = 0
    """That the video goes on with."""
    next_id: int = 0
    next_branch: int = 1

    @property
    def tip(self) -> int | None:
        return self.tips[self.branch]

    @property
    def total_frames(self) -> int:
        """Pixel frames of all chunks, of all branches."""
        return sum(chunk.frames for chunk in self.chunks.values())

    def append(
        self, start_frame: int, frames: int, prompt: str, decided: Decisions, near: bool = False
    ) -> TimelineChunk:
        """Lengthen the present branch by a chunk."""
        parent = self.tip
        chunk = TimelineChunk(
            id=self.next_id,
            parent=parent,
            branch=self.branch,
            index=0 if parent is None else self.chunks[parent].index + 1,
            start_frame=start_frame,
            frames=frames,
            prompt=prompt,
            new_prompt=decided.prompt,
            new_seed=decided.seed,
            new_settings=decided.settings or None,
            near=near,
        )
        self.chunks[chunk.id] = chunk
        self.tips[self.branch] = chunk.id
        self.next_id += 1
        return chunk

    def path(self, last: int | None) -> list[TimelineChunk]:
        """The chunks from the start of the video to `last`. `KeyError` if that is not kept."""
        path = []
        while last is not None:
            path.append(self.chunks[last])
            last = self.chunks[last].parent
        return path[::-1]

    def branch_path(self, branch: int | None = None) -> list[TimelineChunk]:
        """The chunks of a branch, by default the present one. `KeyError` if there is none of that number."""
        return self.path(self.tips[self.branch if branch is None else branch])

    def go_on_after(self, chunk: int | None) -> None:
        """Go on after a chunk: with the branch that it is the end of, or else with a new one. Nothing is lost.

        Raises:
            KeyError: the chunk is not kept.
        """
        if chunk is not None and chunk not in self.chunks:
            raise KeyError(chunk)
        left, left_tip = self.branch, self.tip
        if left_tip != chunk:
            self.branch = next((branch for branch, tip in self.tips.items() if tip == chunk), self.next_branch)
            if self.branch == self.next_branch:
                self.tips[self.branch] = chunk
                self.next_branch += 1
            if left_tip is None or self.chunks[left_tip].branch != left:  # one on which nothing was made
                del self.tips[left]

    def cut_after(self, chunk: int | None) -> list[int]:
        """Forget what the present branch has after one of its chunks; gives the ids. Other branches keep theirs."""
        others = [tip for branch, tip in self.tips.items() if branch != self.branch]
        kept = set(_ids(part for tip in others for part in self.path(tip))) | set(_ids(self.path(chunk)))
        dropped = [part for part in _ids(self.branch_path()) if part not in kept]
        for part in dropped:
            del self.chunks[part]
        self.tips[self.branch] = chunk
        return dropped

    def remove(self, chunks: Iterable[int]) -> None:
        """Forget chunks and all that follows them, on every branch; branches end before them then."""
        gone = set(chunks)
        for chunk in sorted(self.chunks):  # parents first
            if self.chunks[chunk].parent in gone:
                gone.add(chunk)
        for branch, tip in self.tips.items():
            while tip in gone:
                tip = self.chunks[tip].parent
            self.tips[branch] = tip
        for chunk in gone & self.chunks.keys():
            del self.chunks[chunk]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "branch": self.branch,
            "next_id": self.next_id,
            "next_branch": self.next_branch,
            "branches": [{"branch": branch, "tip": tip} for branch, tip in self.tips.items()],
            "chunks": [dataclasses.asdict(chunk) for chunk in self.chunks.values()],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Timeline:
        """What `as_dict` gave."""
        return cls(
            chunks={chunk["id"]: TimelineChunk(**chunk) for chunk in values["chunks"]},
            tips={entry["branch"]: entry["tip"] for entry in values["branches"]},
            branch=values["branch"],
            next_id=values["next_id"],
            next_branch=values["next_branch"],
        )


def _ids(chunks: Iterable[TimelineChunk]) -> list[int]:
    return [chunk.id for chunk in chunks]
