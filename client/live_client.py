"""The client that waits: the one that awaits, on an event loop of its own in a thread, where pings are answered."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, Self, TypeVar

from wan_autoregressive.client.async_client import AsyncLiveClient
from wan_autoregressive.client.conversation import Conversation, LiveChunk

_Result = TypeVar("_Result")


class LiveClient:
    """A video on a live server.

    ```python
    with LiveClient("http://127.0.0.1:8000") as live:
        live.start("a red circle moving right on a navy background", seed=7)
        for chunk in live:
            show(chunk.mp4)
            if chunk.index == 3:
                live.set_prompt("a green cross moving left on a navy background")
            if chunk.index == 8:
                break
        live.download("video.mp4")
    ```

    Arguments and methods are those of [`AsyncLiveClient`], which says more.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout_s: float = 120.0,
        reconnects: int = 60,
    ) -> None:
        self._live = AsyncLiveClient(url, token, timeout_s, reconnects)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wan-client", daemon=True)

    @property
    def video(self) -> Conversation:
        """Session, seed, branch, place in the queue; what the server says of itself."""
        return self._live.video

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._wait(self._live.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._wait(self._live.__aexit__(*error))
        finally:
            self._end()

    def start(
        self,
        prompt: str | None = None,
        seed: int | None = None,
        image: bytes | None = None,
        resume: str | None = None,
        ahead: int = 2,
        settings: Mapping[str, Any] | None = None,
        prompt_changes: Mapping[str, str] | None = None,
        camera: bool = False,
    ) -> None:
        self._wait(self._live.start(prompt, seed, image, resume, ahead, settings, prompt_changes, camera))

    def set_prompt(self, prompt: str, playhead: float | None = None) -> None:
        self._wait(self._live.set_prompt(prompt, playhead))

    def change(self, **settings: Any) -> None:
        self._wait(self._live.change(**settings))

    def fork(
        self,
        chunk: int | None,
        prompt: str | None = None,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._wait(self._live.fork(chunk, prompt, seed, settings))

    def camera_frame(self, image: bytes) -> None:
        self._wait(self._live.camera_frame(image))

    def pause(self) -> None:
        self._wait(self._live.pause())

    def resume(self) -> None:
        self._wait(self._live.resume())

    def forget(self) -> None:
        self._wait(self._live.forget())

    def next_chunk(self) -> LiveChunk:
        return self._wait(self._live.next_chunk())

    def __iter__(self) -> Iterator[LiveChunk]:
        while True:
            yield self.next_chunk()

    def upload(self, image: bytes) -> str:
        return self._wait(self._live.upload(image))

    def describe(self) -> dict[str, Any]:
        return self._wait(self._live.describe())

    def download(self, path: str | os.PathLike[str], branch: int | None = None) -> None:
        self._wait(self._live.download(path, branch))

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
