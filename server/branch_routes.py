"""HTTP for what can be taken home of a branch, and for schedules: beside the mp4 that `app` gives."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from wan_autoregressive.server.bodies import TooLargeError, read_body
from wan_autoregressive.server.chunk_files import images_of_mp4
from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.guard import error_response
from wan_autoregressive.server.schedule import MAX_BYTES, describe_making, export_schedule, import_schedule
from wan_autoregressive.server.video_folder import IMAGE_NAME

_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def branch_routes(engine: Engine, session: str) -> list[Route]:
    """Routes below the path `session`, which has a parameter of that name, and `/v1/schedules`."""
    routes = _BranchRoutes(engine)
    return [
        Route(session + "/chunks/{chunk:int}.images", routes.images),
        Route(session + "/schedule.yaml", routes.schedule),
        Route(session + "/video.json", routes.making),
        Route(session + "/" + IMAGE_NAME, routes.start_image),
        Route("/v1/schedules", routes.read_schedule, methods=["POST"]),
    ]


class _BranchRoutes:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def images(self, request: Request) -> Response:
        """The frames of a chunk as images, for browsers without H.264."""
        key, chunk = request.path_params["session"], request.path_params["chunk"]
        values = await self._describe(request)
        if values is None or all(entry["id"] != chunk for entry in values["chunks"]):
            return _missing("there is no such chunk")
        made, video = (self._engine.chunk_path(key, chunk, kind) for kind in ("images", "mp4"))
        try:
            if made.is_file():
                body = await asyncio.to_thread(made.read_bytes)
            else:
                body = await asyncio.to_thread(
                    images_of_mp4, video, self._engine.model.height, self._engine.model.width
                )
        except (OSError, ValueError):
            return _missing(f"chunk {chunk} is not there yet")
        return Response(body, media_type="application/octet-stream", headers=_HEADERS)

    async def schedule(self, request: Request) -> Response:
        """A branch as a settings file."""
        values, branch = await self._describe(request), _branch(request)
        try:
            if values is None:
                raise KeyError
            text = await asyncio.to_thread(export_schedule, values, branch, self._engine.model)
        except KeyError:
            return _missing("there is no such branch")
        except ValueError as error:
            return error_response(409, "no_schedule", str(error))
        return PlainTextResponse(text, media_type="application/yaml", headers=_attachment("video.yaml"))

    async def making(self, request: Request) -> Response:
        """How a branch was made."""
        values, branch = await self._describe(request), _branch(request)
        try:
            if values is None:
                raise KeyError
            making = describe_making(values, branch, self._engine.model)
        except KeyError:
            return _missing("there is no such branch")
        return JSONResponse(making, headers=_attachment("video.json"))

    async def start_image(self, request: Request) -> Response:
        """The picture that the video starts from, of the size that is generated."""
        if await self._describe(request) is None:
            return _missing("there is no such session")
        path = self._engine.image_path(request.path_params["session"])
        if not path.is_file():
            return _missing("this video starts from no picture")
        return FileResponse(path, media_type="image/png", headers=_attachment(IMAGE_NAME))

    async def read_schedule(self, request: Request) -> Response:
        """A settings file as the body; what a start message takes from it as the answer."""
        try:
            data = await read_body(request, MAX_BYTES)
            return JSONResponse(import_schedule(data.decode(), self._engine.model))
        except TooLargeError as error:
            return error_response(413, "too_large", str(error))
        except ValueError as error:  # no UTF-8 too
            return error_response(400, "bad_schedule", str(error))

    async def _describe(self, request: Request) -> dict[str, Any] | None:
        try:
            return await asyncio.to_thread(self._engine.describe, request.path_params["session"])
        except ValueError:
            return None


def _branch(request: Request) -> int | None:
    """Raises nothing: what is no number is no branch either."""
    branch = request.query_params.get("branch", "")
    return (int(branch) if branch.isdecimal() and len(branch) < 10 else -1) if branch else None


def _missing(message: str) -> Response:
    return error_response(404, "not_found", message)


def _attachment(name: str) -> dict[str, str]:
    return {**_HEADERS, "Content-Disposition": f'attachment; filename="{name}"'}
