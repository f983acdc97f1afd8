"""The WebSocket of a client, which comes back by itself as that of the page does (`server/page/connection.js`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

LOST = frozenset({1001, 1005, 1006, 1011, 1012})
"""Codes of connections that ended for no reason of the video's: it can be gone on with."""
FIRST_WAIT_S, MOST_WAIT_S = 0.25, 4.0
"""Between two tries to come back; twice as long each time."""
_MOST_CHUNK_BYTES = 256 * 2**20
_NO_CODE = 1006
_REASONS = {1012: "it restarts; come back with resume", 1013: "its queue is full", 4408: "nothing was said for long"}


class LiveError(RuntimeError):
    """The server says that something did not work. `code` is that of `docs/API_LIVE.md`, or `closed`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Args:
        url: As the server prints it, `http://host:8000/`, with or without its `?token=`.
        token: Instead of the one in `url`.
    """

    url: str
    token: str | None = None

    @property
    def http(self) -> str:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"the address of a server looks like http://127.0.0.1:8000, got '{self.url}'")
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def live(self) -> str:
        return "ws" + self.http.removeprefix("http") + "/v1/live"

    @property
    def headers(self) -> dict[str, str]:
        given = parse_qs(urlsplit(self.url).query).get("token", [None])[0]
        token = self.token or given
        return {} if token is None else {"Authorization": f"Bearer {token}"}


class Connection:
    """For any number of tasks: whoever finds it lost first brings it back, the others wait for that.

    Args:
        timeout_s: Seconds to wait for a message.
        reconnects: Tries in a row to come back; 0 for none.
        returning: Gives what to say first on a new connection, None where there is nothing to go on with.
    """

    def __init__(
        self, address: Address, timeout_s: float, reconnects: int, returning: Callable[[], str | None]
    ) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._reconnects, self._returning = reconnects, returning
        self._socket: ClientConnection | None = None
        self._mending = asyncio.Lock()
        self._tries = 0

    async def open(self) -> None:
        """Raises `LiveError` where the server lets nobody in, `OSError` where there is none."""
        try:
            self._socket = await connect(
                self._address.live, additional_headers=self._address.headers, max_size=_MOST_CHUNK_BYTES
            )
        except InvalidStatus as error:
            told = f"the server answers {error.response.status_code}; is the token the one that it printed?"
            raise LiveError("not_let_in", told) from error

    async def close(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            await socket.close()

    async def send(self, message: str | bytes) -> None:
        """Raises `LiveError` as `receive`."""
        while True:
            socket = self._present
            try:
                return await socket.send(message)
            except ConnectionClosed as closed:
                await self._mend(socket, closed)

    async def receive(self) -> str | bytes:
        """Wait for the next message.

        Raises:
            LiveError: the server hung up for good, or did not come back.
            TimeoutError: nothing came.
        """
        while True:
            socket = self._present
            try:
                return await asyncio.wait_for(socket.recv(), self._timeout_s)
            except ConnectionClosed as closed:
                await self._mend(socket, closed)

    async def lose(self) -> None:
        """Begin anew with the next message: what comes beside it was lost on the way."""
        if self._socket is not None:
            await self._socket.close(1001)

    def is_back(self) -> None:
        """The video goes on: tries are counted from here."""
        self._tries = 0

    @property
    def _present(self) -> ClientConnection:
        if self._socket is None:
            raise RuntimeError("there is no connection; use the client in an `async with` block")
        return self._socket

    async def _mend(self, lost: ClientConnection, closed: ConnectionClosed) -> None:
        async with self._mending:
            if self._socket is not lost:  # somebody else has, or it was closed
                return
            code = _NO_CODE if closed.rcvd is None else closed.rcvd.code
            message = self._returning() if code in LOST and self._reconnects else None
            if message is None:
                raise LiveError("closed", _why(code)) from closed
            while self._tries < self._reconnects:
                await asyncio.sleep(min(MOST_WAIT_S, FIRST_WAIT_S * 2**self._tries))
                self._tries += 1
                if await self._returned(message):
                    return
            told = f"the connection was lost, and {self._reconnects} tries to come back failed"
            raise LiveError("closed", told) from closed

    async def _returned(self, message: str) -> bool:
        """Whether there is a new connection. Raises `LiveError` for a server that lets nobody in."""
        try:
            await self.open()
            await self._present.send(message)
        except LiveError as error:
            cause = error.__cause__
            if isinstance(cause, InvalidStatus) and cause.response.status_code >= 500:  # it starts, or a proxy says so
                return False
            raise
        except (OSError, EOFError, InvalidHandshake, ConnectionClosed):
            return False
        return True


def _why(code: int) -> str:
    return f"the server ended the connection: {_REASONS.get(code, f'code {code}')}"
