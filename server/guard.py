"""Who may come in: checked for every request and every socket before anything else is."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from dataclasses import dataclass
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "wan_ar"
OPEN_PATHS = ("/health",)
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Door:
    """The rules.

    Args:
        host: Address that is listened on.
        token: What a visitor has to know. Made where none is given, except on loopback, which is open.
        allow_hosts: Further names that the server is called by, of a proxy say.
        allow_origins: Pages of other origins that may use it, `https://example.org`.
    """

    host: str = "127.0.0.1"
    token: str | None = None
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.token is None and not self.on_loopback:
            object.__setattr__(self, "token", secrets.token_urlsafe(24))

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine gets here."""
        address = _address(self.host)
        return self.host == "localhost" if address is None else address.is_loopback

    def knows_host(self, name: str) -> bool:
        """Whether a browser that thinks it talks to `name` is to be served.

        A foreign page whose name was pointed at this machine would pass for our own otherwise (DNS rebinding). It
        cannot do that with an address, so beyond loopback any address will do.
        """
        if name in (*_LOOPBACK_NAMES, self.host, *self.allow_hosts):
            return True
        return not self.on_loopback and _address(name.strip("[]")) is not None

    def knows_token(self, given: list[str]) -> bool:
        """Whether one of them is the token, or none is needed."""
        token = self.token
        return token is None or any(hmac.compare_digest(word.encode(), token.encode()) for word in given)


class Guard:
    """ASGI middleware that turns away unknown hosts, foreign origins and visitors without the token."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = None if scope["type"] == "lifespan" else self._problem(scope)
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the visitor sees 403
        else:
            status, code, message = problem
            headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            await error_response(status, code, message, headers)(scope, receive, send)

    def _problem(self, scope: Scope) -> tuple[int, str, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._door.knows_host(_without_port(host)):
            return 421, "host", "this server is not known by that name; start it with --allow-host NAME"
        origin = headers.get("origin")
        if origin is not None and origin not in self._door.allow_origins and origin.split("://", 1)[-1] != host:
            return 403, "origin", "a page of another origin asks; start with --allow-origin ORIGIN"
        if scope["path"] not in OPEN_PATHS and not self._door.knows_token(_tokens(scope, headers)):
            return 401, "token", "open the link that was printed when the server started"
        return None


def error_response(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in the shape that OpenAI's clients read."""
    content = {"error": {"type": "invalid_request_error", "code": code, "message": message}}
    return JSONResponse(content, status, headers)


def _tokens(scope: Scope, headers: Headers) -> list[str]:
    given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
    kind, _, word = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        given.append(word)
    given.append(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""))
    return [word for word in given if word]


def _without_port(host: str) -> str:
    return host if host.endswith("]") or ":" not in host else host.rsplit(":", 1)[0]


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
