"""One WebSocket: messages in, messages and chunks out, a session between."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from wan_autoregressive.server.engine import Engine, QueueFullError
from wan_autoregressive.server.images import ImageShelf
from wan_autoregressive.server.live_session import LiveSession
from wan_autoregressive.server.messages import (
    PROTOCOL,
    ClientMessage,
    Close,
    Error,
    Hello,
    ServerMessage,
    Start,
    pack,
    parse_message,
)

_NORMAL, _QUEUE_FULL, _BAD_MESSAGE, _IDLE = 1000, 1013, 4400, 4408


class LiveSocket:
    """The endpoint `/v1/live`."""

    def __init__(self, engine: Engine, shelf: ImageShelf, idle_s: float) -> None:
        self._engine, self._shelf, self._idle_s = engine, shelf, idle_s

    async def serve(self, socket: WebSocket) -> None:
        """Talk to a viewer until one of both ends it."""
        await socket.accept()
        await _Conversation(socket, self._engine, self._shelf, self._idle_s).hold()


class _Conversation:
    def __init__(self, socket: WebSocket, engine: Engine, shelf: ImageShelf, idle_s: float) -> None:
        self._socket, self._engine, self._shelf, self._idle_s = socket, engine, shelf, idle_s
        self._loop = asyncio.get_running_loop()
        self._outgoing: asyncio.Queue[tuple[ServerMessage, bytes | None]] = asyncio.Queue()
        self._session: LiveSession | None = None

    async def hold(self) -> None:
        model, limits = self._engine.model, self._engine.limits
        self._emit(
            Hello(
                model=model.name,
                fps=model.fps,
                width=model.width * model.scale,
                height=model.height * model.scale,
                max_seconds=limits.max_seconds,
            ),
            None,
        )
        sender = asyncio.create_task(self._send_all())
        code: int | None = None
        try:
            code = await self._receive_all()
        # When a send notices first that the viewer has left, receiving raises a RuntimeError.
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            if self._session is not None:
                self._engine.leave(self._session, self._emit)
            if code is not None:
                with suppress(TimeoutError, RuntimeError, WebSocketDisconnect):
                    await asyncio.wait_for(self._outgoing.join(), 5)
            sender.cancel()
            if code is not None:
                with suppress(RuntimeError, WebSocketDisconnect):
                    await self._socket.close(code)

    async def _receive_all(self) -> int:
        """Take messages until the conversation ends; gives the code to close with."""
        while True:
            try:
                received = await asyncio.wait_for(self._receive(), self._idle_s)
            except TimeoutError:
                if self._session is not None and self._session.state == "waiting":
                    continue
                self._emit(Error(code="idle", message=f"nothing was heard for {self._idle_s:g} s"), None)
                return _IDLE
            try:
                if isinstance(received, bytes):
                    self._take_frame(received)
                    continue
                message = parse_message(received)
                if isinstance(message, Close):
                    self._forget()
                    return _NORMAL
                await self._act(message)
            except QueueFullError as error:
                self._emit(Error(code="queue_full", message=str(error)), None)
                return _QUEUE_FULL
            except ValueError as error:
                self._emit(Error(code="bad_message", message=str(error)), None)
                return _BAD_MESSAGE

    async def _receive(self) -> str | bytes:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text: str | None = message.get("text")
        return message["bytes"] if text is None else text

    def _take_frame(self, image: bytes) -> None:
        if self._session is None:
            raise ValueError("the first message has to be start")
        if self._session.emit == self._emit:
            self._engine.camera_frame(self._session, image)

    async def _act(self, message: ClientMessage) -> None:
        session = self._session
        if session is not None and session.emit != self._emit:  # it failed, or goes on in another window
            session = self._session = None
            if not isinstance(message, Start):
                return
        if isinstance(message, Start):
            if session is not None:
                raise ValueError("this connection has a video already")
            if message.protocol != PROTOCOL:
                raise ValueError(f"protocol {message.protocol} is asked for, this server speaks {PROTOCOL}")
            image = None if message.image is None else self._shelf.take(message.image)
            self._session = await asyncio.to_thread(self._engine.open, message, self._emit, image)
        elif session is None:
            raise ValueError("the first message has to be start")
        elif not isinstance(message, Close):
            self._engine.command(session, message)

    def _forget(self) -> None:
        if self._session is not None and self._session.emit == self._emit:
            self._engine.forget(self._session.id)
        self._session = None

    def _emit(self, message: ServerMessage, body: bytes | None) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._outgoing.put_nowait, (message, body))

    async def _send_all(self) -> None:
        while True:
            message, body = await self._outgoing.get()
            if body is None:
                await self._socket.send_text(message.as_text())
            else:
                await self._socket.send_bytes(pack(message, body))
                if self._session is not None:
                    self._engine.sent(self._session)
            self._outgoing.task_done()
