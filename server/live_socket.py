"""One WebSocket: messages in, messages and chunks out, a session between."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect

from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.images import ImageShelf
from wan_autoregressive.server.limits import PromptError, QueueFullError
from wan_autoregressive.server.live_session import LiveSession
from wan_autoregressive.server.message_rate import MessageRate
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

_NORMAL, _TOO_SLOW, _NO_ROOM, _QUEUE_FULL, _BAD_MESSAGE, _IDLE, _TOO_MANY = 1000, 1008, 1011, 1013, 4400, 4408, 4429
_MESSAGES_PER_S, _MESSAGES_AT_ONCE = 50.0, 200
_MOST_OUTGOING = 256  # chunks among them are bounded by what the viewer plays


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
        self._outgoing: asyncio.Queue[tuple[ServerMessage, bytes | None]] = asyncio.Queue(_MOST_OUTGOING)
        self._session: LiveSession | None = None
        self._opening: asyncio.Task[LiveSession] | None = None
        self._rate = MessageRate(_MESSAGES_PER_S, _MESSAGES_AT_ONCE)
        self._is_slow = asyncio.Event()

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
            code = await self._until_end_or_slow()
        # When a send notices first that the viewer has left, receiving raises a RuntimeError.
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            if self._opening is not None:  # a thread is at it: nobody would leave the session that comes
                with suppress(ValueError, QueueFullError, OSError):
                    self._session = await self._opening
            if self._session is not None:
                self._engine.leave(self._session, self._emit)
            if code not in (None, _TOO_SLOW):
                with suppress(TimeoutError, RuntimeError, WebSocketDisconnect):
                    await asyncio.wait_for(self._outgoing.join(), 5)
            sender.cancel()
            if code is not None:
                with suppress(TimeoutError, RuntimeError, WebSocketDisconnect):
                    await asyncio.wait_for(self._socket.close(code), 5)

    async def _until_end_or_slow(self) -> int:
        """Take messages until the conversation ends, or the viewer lets too much lie; gives the code to close with."""
        receiver, slow = asyncio.create_task(self._receive_all()), asyncio.create_task(self._is_slow.wait())
        try:
            await asyncio.wait((receiver, slow), return_when=asyncio.FIRST_COMPLETED)
            return receiver.result() if receiver.done() else _TOO_SLOW
        finally:
            receiver.cancel()
            slow.cancel()

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
            if not self._rate.take():
                told = f"at most {_MESSAGES_PER_S:g} messages a second are taken"
                self._emit(Error(code="too_many_messages", message=told), None)
                return _TOO_MANY
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
            except PromptError as error:
                self._emit(Error(code="prompt", message=str(error)), None)
            except OSError as error:
                self._emit(Error(code="disk", message=f"there is no room for a video: {error}"), None)
                return _NO_ROOM
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
            self._opening = asyncio.create_task(asyncio.to_thread(self._engine.open, message, self._emit, image))
            self._session = await asyncio.shield(self._opening)
            self._opening = None
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
            self._loop.call_soon_threadsafe(self._line_up, message, body)

    def _line_up(self, message: ServerMessage, body: bytes | None) -> None:
        try:
            self._outgoing.put_nowait((message, body))
        except asyncio.QueueFull:
            self._is_slow.set()

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
