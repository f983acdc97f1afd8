"""The client that awaits."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self

import httpx2
from pydantic import BaseModel

from wan_autoregressive.client.connection import Address, Connection
from wan_autoregressive.client.conversation import Conversation, LiveChunk
from wan_autoregressive.server.messages import (
    MAX_MESSAGE_BYTES,
    ChangePrompt,
    ChangeSettings,
    Close,
    Fork,
    LiveSettings,
    Pause,
    Resume,
    Start,
)


class AsyncLiveClient:
    """A video on a live server.

    ```python
    async with AsyncLiveClient("http://127.0.0.1:8000") as live:
        await live.start("a red circle moving right on a navy background", seed=7)
        async for chunk in live:
            ...
    ```

    Asking for the next chunk says that the last one has been seen: the server stays `ahead` chunks in front of that.
    A connection that is lost (the network, a restart of the server) is opened anew, and what was made meanwhile comes
    before what is made then. What a killed server had not saved is made again, as chunks of new numbers.

    Args:
        url: As the server prints it, with or without its token.
        token: Instead of the one in `url`.
        timeout_s: Seconds to wait for a message of the server.
        reconnects: Tries in a row to come back, 0.25 s to 4 s after one another; 0 raises where it is lost.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout_s: float = 120.0,
        reconnects: int = 60,
    ) -> None:
        self.video = Conversation()
        """Session, seed, branch, place in the queue; what the server says of itself."""
        self._address, self._timeout_s = Address(url, token), timeout_s
        self._connection = Connection(self._address, timeout_s, reconnects, self.video.returning)
        self._missed: deque[LiveChunk] = deque()

    async def __aenter__(self) -> Self:
        await self._connection.open()
        address = self._address
        self._http = httpx2.AsyncClient(base_url=address.http, headers=address.headers, timeout=self._timeout_s)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connection.close()
        await self._http.aclose()

    async def start(
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
        """Begin a video, or go on with that of a session.

        Args:
            image: A PNG, JPEG or WebP to start from.
            resume: A session, instead of a new video.
            settings: Instead of the server's own, see `LiveSettings`: `{"num_inference_steps": 2}`.
            prompt_changes: Later prompts by time, `{"5s": "it snows"}`.
            camera: Make the video from what `camera_frame` sends; `settings` may say how far from it, `strength`.

        Raises:
            ValueError: a setting of that name or kind there is not.
        """
        name = None if image is None else await self.upload(image)
        self.video.ahead = ahead
        await self._say(
            Start(
                prompt=prompt,
                seed=seed,
                image=name,
                settings=LiveSettings(**settings or {}),
                prompt_changes=None if prompt_changes is None else dict(prompt_changes),
                camera=camera,
                resume=resume,
                ahead=ahead,
            )
        )

    async def set_prompt(self, prompt: str, playhead: float | None = None) -> None:
        """Go on with another prompt; from `playhead` (seconds) on as soon as can be, else behind what is made."""
        await self._say(ChangePrompt(prompt=prompt, playhead=playhead))

    async def change(self, **settings: Any) -> None:
        """Use other settings from the next chunk that is made on. Raises `ValueError` as `start`."""
        await self._say(ChangeSettings(settings=LiveSettings(**settings)))

    async def fork(
        self,
        chunk: int | None,
        prompt: str | None = None,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Go on after a chunk of any branch; None is the start. What follows is the same but for what is given.

        Raises:
            ValueError: a setting of that name or kind there is not.
        """
        await self._say(Fork(chunk=chunk, prompt=prompt, seed=seed, settings=LiveSettings(**settings or {})))

    async def camera_frame(self, image: bytes) -> None:
        """Send a frame of the camera as a PNG, JPEG or WebP, at the video's rate; the server keeps the newest.

        Raises:
            ValueError: it has more bytes than the server takes.
        """
        if len(image) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a frame may have {MAX_MESSAGE_BYTES} bytes, this one has {len(image)}; make it smaller")
        await self._connection.send(image)

    async def pause(self) -> None:
        await self._say(Pause())

    async def resume(self) -> None:
        await self._say(Resume())

    async def forget(self) -> None:
        """End the video and remove it from the server."""
        await self._say(Close())

    async def next_chunk(self) -> LiveChunk:
        """Wait for it.

        Raises:
            LiveError: the server says that something did not work, or hung up.
            TimeoutError: nothing came.
        """
        if (played := self.video.played()) is not None:
            await self._connection.send(played)
        while True:
            if self._missed:
                made = self.video.take_chunk(self._missed.popleft())
            else:
                made = self.video.take(await self._connection.receive())
            if made is not None:
                return made
            if self.video.lacks_chunks:
                await self._catch_up()

    async def __aiter__(self) -> AsyncIterator[LiveChunk]:
        while True:
            yield await self.next_chunk()

    async def upload(self, image: bytes) -> str:
        """Send a picture; gives its name for a start."""
        answer = await self._http.post("/v1/images", content=image)
        return str(answer.raise_for_status().json()["id"])

    async def describe(self) -> dict[str, Any]:
        """The timeline of the video: its chunks and branches, prompts and seeds."""
        answer = await self._http.get(f"/v1/sessions/{self.video.session}")
        described: dict[str, Any] = answer.raise_for_status().json()
        return described

    async def download(self, path: str | os.PathLike[str], branch: int | None = None) -> None:
        """Write the chunks of a branch, by default the present one, as one mp4."""
        query = {} if branch is None else {"branch": branch}
        answer = await self._http.get(f"/v1/sessions/{self.video.session}/video.mp4", params=query)
        Path(path).write_bytes(answer.raise_for_status().content)

    async def _say(self, message: BaseModel) -> None:
        await self._connection.send(message.model_dump_json())

    async def _catch_up(self) -> None:
        """Get what was made while nobody was there. What is still being encoded comes as a message."""
        self._connection.is_back()
        try:
            for chunk in self.video.lacking(await self.describe()):
                answer = await self._http.get(f"/v1/sessions/{self.video.session}/chunks/{chunk.id}.mp4")
                if answer.status_code == 404:
                    break
                self._missed.append(self.video.fetched(chunk, answer.raise_for_status().content))
        except httpx2.TransportError:
            await self._connection.lose()
