"""uvicorn's connections with further bounds: how many an address has, and how long a request may take to come.

Without them a few hundred connections that say nothing, or say it byte by byte, keep everybody else out.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0
BODY_S = 60.0


class BoundedHTTP(H11Protocol):
    """A connection of a visitor, until it becomes a WebSocket: uvicorn watches over those with pings."""

    most_per_address: ClassVar[int] = 0
    """Connections of one address, WebSockets included; 0 for any number."""
    header_s: ClassVar[float] = HEADER_S
    """Seconds until a request's header has to be there."""
    body_s: ClassVar[float] = BODY_S
    """Seconds until its body has to be there."""

    _deadline: asyncio.TimerHandle | None = None
    _awaited: str | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.most_per_address and self._num_of_address() > self.most_per_address:
            transport.abort()
        else:
            self._await("header")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_protocol() is not self:  # a WebSocket now
            self._await(None)
        elif self.conn.their_state is h11.SEND_BODY:
            self._await("body")
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._await("header")
        else:
            self._await(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        super().connection_lost(exc)

    def _await(self, part: str | None) -> None:
        """Set the time until which a part of a request has to be there; more of the same part does not move it."""
        if part == self._awaited:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._awaited, self._deadline = part, None
        if part is not None:
            seconds = self.header_s if part == "header" else self.body_s
            self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _num_of_address(self) -> int:
        address = self.client and self.client[0]
        others = [getattr(other, "client", None) for other in self.connections]
        return sum(other is not None and other[0] == address for other in others)


def bounded_http(most_per_address: int, header_s: float = HEADER_S, body_s: float = BODY_S) -> type[BoundedHTTP]:
    """The class with these bounds, as `uvicorn.Config(http=…)` takes it."""
    bounds = {"most_per_address": most_per_address, "header_s": header_s, "body_s": body_s}
    return type("BoundedHTTP", (BoundedHTTP,), bounds)
