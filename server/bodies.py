"""Bodies of requests, counted as they come: what is too large is never held."""

from __future__ import annotations

from starlette.requests import Request


class TooLargeError(ValueError):
    """A body has more bytes than are taken."""


async def read_body(request: Request, most: int) -> bytes:
    """All of it. Raises `TooLargeError` as soon as it is known to have more than `most` bytes."""
    problem = f"a body may have {_size(most)}"
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise TooLargeError(problem)
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise TooLargeError(problem)
    return bytes(data)


def _size(count: int) -> str:
    return f"{count / 2**20:.3g} MB" if count >= 2**20 else f"{count >> 10} KB"
