"""The web side of the live server: routes, and what a start and an end do."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route, WebSocketRoute

from wan_autoregressive.media.segments import join_segments
from wan_autoregressive.media.video_writer import VideoWriteError
from wan_autoregressive.server.bodies import TooLargeError, read_body
from wan_autoregressive.server.branch_routes import branch_routes
from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.guard import COOKIE, Door, Guard, error_response
from wan_autoregressive.server.images import FORMATS, MAX_BYTES, ImageShelf, read_upload
from wan_autoregressive.server.job_routes import job_routes
from wan_autoregressive.server.jobs import VideoJobs
from wan_autoregressive.server.limits import UnknownSessionError
from wan_autoregressive.server.live_settings import describe_settings
from wan_autoregressive.server.live_socket import LiveSocket
from wan_autoregressive.server.messages import PROTOCOL
from wan_autoregressive.server.metrics import metrics_text
from wan_autoregressive.server.openapi import openapi_routes
from wan_autoregressive.server.prompt_text import MAX_PROMPT_LENGTH
from wan_autoregressive.server.quick_prompts import quick_prompts
from wan_autoregressive.server.timeline import Timeline

_PAGE = files("wan_autoregressive.server.page")
_PAGE_KINDS = {".css": "text/css", ".js": "text/javascript", ".html": "text/html"}
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_FILE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=31536000, immutable"}


def build_app(engine: Engine, door: Door, idle_s: float = 120.0, page: bool = True) -> Starlette:
    """The ASGI application. It shuts the engine down, and so saves all videos, when it ends.

    Args:
        idle_s: Seconds without a message after which a viewer with a slot has to leave it.
        page: Whether there is a page, or only the API.
    """
    routes, jobs = _Routes(engine, door), VideoJobs(engine)
    socket = LiveSocket(engine, routes.shelf, idle_s)
    session = "/v1/sessions/{session:str}"

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(jobs.close)
        await asyncio.to_thread(engine.shutdown)

    api = [
        Route("/health", routes.health),
        Route("/metrics", routes.metrics),
        Route("/v1/model", routes.model),
        Route("/v1/images", routes.upload, methods=["POST"]),
        WebSocketRoute("/v1/live", socket.serve),
        Route(session, routes.session),
        Route(session, routes.forget, methods=["DELETE"]),
        *branch_routes(engine, session),
        Route(session + "/chunks/{chunk:int}.{kind:str}", routes.chunk),
        Route(session + "/video.mp4", routes.video),
        *job_routes(engine, jobs),
    ]
    pages = [Route("/", routes.page), Route("/{name:str}", routes.page_file)] if page else []
    return Starlette(
        lifespan=lifespan,
        middleware=[Middleware(Guard, door=door)],
        routes=[*api, *openapi_routes(api), *pages],
    )


class _Routes:
    """What is answered over HTTP. Slow things run on threads; the event loop only passes messages on."""

    def __init__(self, engine: Engine, door: Door) -> None:
        self.shelf = ImageShelf()
        self._engine, self._door = engine, door
        self._joining = asyncio.Semaphore(1)  # one download at a time is made

    async def page(self, request: Request) -> Response:
        if self._door.token is not None and "token" in request.query_params:  # from now on a cookie
            answer = RedirectResponse("/", 303)
            secure = request.url.scheme == "https"
            answer.set_cookie(COOKIE, self._door.token, httponly=True, samesite="strict", secure=secure)
            return answer
        return _page_file("page.html")

    async def page_file(self, request: Request) -> Response:
        name = request.path_params["name"]
        return _page_file(name) if name in _page_names() else error_response(404, "not_found", "there is no such page")

    async def health(self, request: Request) -> Response:
        """Whether it runs, and how many sessions there are; needs no token."""
        figures = self._engine.figures()
        return JSONResponse({"status": "ok", **{name: figures[name] for name in ("active", "queued", "parked")}})

    async def metrics(self, request: Request) -> Response:
        """Figures for Prometheus."""
        return PlainTextResponse(metrics_text(self._engine.figures()))

    async def model(self, request: Request) -> Response:
        """Sizes, frames per second, limits, settings that a viewer may choose, prompts to begin with."""
        model, limits, slots = self._engine.model, self._engine.limits, self._engine.slots
        return JSONResponse(
            {
                "protocol": PROTOCOL,
                "model": model.name,
                "fps": model.fps,
                "width": model.width * model.scale,
                "height": model.height * model.scale,
                "slots": slots,
                "max_seconds": limits.max_seconds,
                "max_prompt_length": MAX_PROMPT_LENGTH,
                "max_prompt_tokens": model.most_tokens,
                "max_image_bytes": MAX_BYTES,
                "image_formats": FORMATS,
                "pixel_scale": model.scale,
                "settings": describe_settings(model),
                "quick_prompts": quick_prompts(model),
            }
        )

    async def upload(self, request: Request) -> Response:
        """Take a picture (PNG, JPEG or WebP as the raw body) to start a video from; gives its id, to be used once."""
        model = self._engine.model
        try:
            data = await read_body(request, MAX_BYTES)
            image = await asyncio.to_thread(read_upload, data, model.height, model.width)
        except TooLargeError as error:
            return error_response(413, "too_large", str(error))
        except ValueError as error:
            return error_response(400, "bad_image", str(error))
        key = secrets.token_urlsafe(16)
        self.shelf.put(key, image)
        return JSONResponse({"id": key}, 201)

    async def session(self, request: Request) -> Response:
        """The timeline of a session: chunks, branches, prompts, seeds."""
        values = await self._describe(request)
        if values is None:
            return _no_session()
        return JSONResponse({name: value for name, value in values.items() if name != "made_by"})

    async def forget(self, request: Request) -> Response:
        """Forget a session and its files."""
        try:
            await asyncio.to_thread(self._engine.forget, request.path_params["session"])
        except UnknownSessionError:
            return _no_session()
        return Response(status_code=204)

    async def chunk(self, request: Request) -> Response:
        """A chunk (mp4, ranges allowed) or its thumbnail (webp)."""
        key, chunk, kind = (request.path_params[name] for name in ("session", "chunk", "kind"))
        values = await self._describe(request)
        if values is None or kind not in ("mp4", "webp"):
            return _no_session()
        path = self._engine.chunk_path(key, chunk, kind)
        if all(entry["id"] != chunk for entry in values["chunks"]) or not path.is_file():
            return error_response(404, "not_found", f"there is no chunk {chunk} in this session")
        return FileResponse(path, media_type="video/mp4" if kind == "mp4" else "image/webp", headers=_FILE_HEADERS)

    async def video(self, request: Request) -> Response:
        """All chunks of a branch as one file, as they were encoded."""
        values = await self._describe(request)
        branch = request.query_params.get("branch", "")
        if values is None or (branch and not branch.isdecimal()):
            return _no_session()
        timeline, key = Timeline.from_dict(values), request.path_params["session"]
        try:
            path = timeline.branch_path(int(branch) if branch else None)
        except KeyError:
            return error_response(404, "not_found", f"there is no branch {branch} in this session")
        parts = [self._engine.chunk_path(key, chunk.id, "mp4") for chunk in path]
        while parts and not parts[-1].is_file():  # still being encoded
            parts.pop()
        if not parts:
            return error_response(409, "empty", "there is nothing to download yet")
        target = parts[0].parent / f"download-{secrets.token_hex(8)}.mp4"
        try:
            async with self._joining:
                await asyncio.to_thread(join_segments, parts, target)
        except (OSError, ValueError, VideoWriteError) as error:
            return error_response(500, "download", f"the chunks could not be joined: {error}")
        return FileResponse(
            target, media_type="video/mp4", filename="video.mp4", background=BackgroundTask(_remove, target)
        )

    async def _describe(self, request: Request) -> dict[str, Any] | None:
        try:
            return await asyncio.to_thread(self._engine.describe, request.path_params["session"])
        except ValueError:
            return None


def _no_session() -> Response:
    return error_response(404, "not_found", "there is no such session")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _page_names() -> set[str]:
    return {path.name for path in _PAGE.iterdir() if path.name.endswith(tuple(_PAGE_KINDS))}


def _page_file(name: str) -> Response:
    kind = _PAGE_KINDS["." + name.rsplit(".", 1)[1]]
    return Response((_PAGE / name).read_bytes(), media_type=kind, headers=_PAGE_HEADERS)
