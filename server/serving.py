"""How uvicorn runs the application: its limits."""

from __future__ import annotations

import uvicorn
from starlette.types import ASGIApp

from wan_autoregressive.server.bounded_http import BODY_S, HEADER_S, bounded_http
from wan_autoregressive.server.messages import MAX_MESSAGE_BYTES

_PING_S = 20.0


def web_server(
    app: ASGIApp,
    per_address: int = 32,
    header_s: float = HEADER_S,
    body_s: float = BODY_S,
    ping_s: float = _PING_S,
) -> uvicorn.Server:
    """A server whose `run(sockets=[…])` ends with SIGTERM, after the application has saved all videos.

    Args:
        per_address: Connections of one address; 0 for any number.
        header_s, body_s: Seconds until a request's header and its body have to be there.
        ping_s: Seconds between two pings of a WebSocket, and until each has to be answered.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=bounded_http(per_address, header_s, body_s),
            log_level="warning",
            access_log=False,  # paths hold tokens
            server_header=False,
            limit_concurrency=200,
            timeout_graceful_shutdown=5,
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            ws_ping_interval=ping_s,
            ws_ping_timeout=ping_s,
        )
    )
