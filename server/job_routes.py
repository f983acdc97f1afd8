"""`/v1/videos`, as OpenAI's video API has it: videos to wait for instead of to watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from wan_autoregressive.server.bodies import TooLargeError, read_body
from wan_autoregressive.server.engine import Engine
from wan_autoregressive.server.guard import error_response
from wan_autoregressive.server.images import MAX_BYTES, read_upload
from wan_autoregressive.server.jobs import VideoJobs
from wan_autoregressive.server.limits import QueueFullError
from wan_autoregressive.server.prompt_text import Prompt

_RETRY_S = 10
_FORM_BYTES = 2**16  # beside the picture
_KINDS = {"video": "video/mp4", "thumbnail": "image/webp"}


class VideoRequest(BaseModel):
    """The body of `POST /v1/videos`, as a form or as JSON. Unknown fields are refused, not passed over."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Prompt
    model: str | None = None
    """Whatever it names: there is one model."""
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    size: str | None = None
    """Of the model's videos, `256x256` say; it has no other."""
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    """Drawn when not given."""


def job_routes(engine: Engine, jobs: VideoJobs) -> list[Route]:
    """The five of them."""
    routes, one = _JobRoutes(engine, jobs), "/v1/videos/{id:str}"
    return [
        Route("/v1/videos", routes.create, methods=["POST"]),
        Route("/v1/videos", routes.list),
        Route(one, routes.retrieve),
        Route(one, routes.delete, methods=["DELETE"]),
        Route(one + "/content", routes.content),
    ]


class _JobRoutes:
    def __init__(self, engine: Engine, jobs: VideoJobs) -> None:
        self._engine, self._jobs = engine, jobs

    async def create(self, request: Request) -> Response:
        """Line a video up; a form may hold the picture that it starts from, as the file `input_reference`."""
        try:
            wanted, picture = await self._read(request)
            image = None if picture is None else await asyncio.to_thread(self._image, picture)
            job = await asyncio.to_thread(self._jobs.create, wanted.prompt, wanted.seconds, wanted.seed, image)
        except TooLargeError as error:
            return error_response(413, "too_large", str(error))
        except QueueFullError as error:
            return error_response(429, "queue_full", str(error), {"Retry-After": str(_RETRY_S)})
        except OSError as error:
            return error_response(507, "disk", f"there is no room for a video: {error}")
        except ValueError as error:
            return error_response(400, "bad_request", str(error))
        return JSONResponse(job.as_openai())

    async def retrieve(self, request: Request) -> Response:
        """How far a video is."""
        try:
            return JSONResponse(self._jobs.get(request.path_params["id"]).as_openai())
        except KeyError:
            return _no_video()

    async def list(self, request: Request) -> Response:
        """Videos, the newest first (`order`), `limit` of them, those that come `after` one."""
        query = request.query_params
        limit = query.get("limit", "20")
        if not limit.isdecimal() or not 1 <= int(limit) <= 100 or query.get("order", "desc") not in ("asc", "desc"):
            return error_response(400, "bad_request", "limit is 1 to 100, order asc or desc")
        jobs = self._jobs.all()
        if query.get("order", "desc") == "desc":
            jobs.reverse()
        keys = [job.id for job in jobs]
        if (after := query.get("after")) is not None:
            jobs = jobs[keys.index(after) + 1 :] if after in keys else []
        page = [job.as_openai() for job in jobs[: int(limit)]]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": page, "has_more": len(jobs) > len(page), **ends})

    async def delete(self, request: Request) -> Response:
        """Forget a video; one that is being made ends."""
        key = request.path_params["id"]
        try:
            await asyncio.to_thread(self._jobs.delete, key)
        except KeyError:
            return _no_video()
        return JSONResponse({"id": key, "object": "video.deleted", "deleted": True})

    async def content(self, request: Request) -> Response:
        """The mp4 of a video, or its thumbnail (`variant`)."""
        variant = request.query_params.get("variant", "video")
        if variant not in _KINDS:
            return error_response(400, "bad_request", f"variant is {' or '.join(_KINDS)}, got '{variant[:40]}'")
        try:
            job = self._jobs.get(request.path_params["id"])
        except KeyError:
            return _no_video()
        if job.status != "completed":
            return error_response(409, "not_ready", f"the video is {job.status.replace('_', ' ')}")
        return FileResponse(self._jobs.path(job, variant), media_type=_KINDS[variant])  # type: ignore[arg-type]

    async def _read(self, request: Request) -> tuple[VideoRequest, bytes | None]:
        """What is asked for, and the picture to begin with; `ValueError` in words."""
        body = await read_body(request, MAX_BYTES + _FORM_BYTES)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        picture = None
        try:
            if kind == "multipart/form-data":
                values, picture = await _read_form(request, body)
                wanted = VideoRequest.model_validate(values)
            else:
                wanted = VideoRequest.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(": ".join((*map(str, first["loc"]), first["msg"]))) from error
        model, most = self._engine.model, self._engine.limits.max_seconds
        if wanted.seconds > most:
            raise ValueError(f"seconds: a video may have {most:g}, got {wanted.seconds:g}")
        if wanted.size not in (None, model.size):
            raise ValueError(f"size: this model makes videos of {model.size}")
        return wanted, picture

    def _image(self, picture: bytes) -> Image.Image:
        return read_upload(picture, self._engine.model.height, self._engine.model.width)


async def _read_form(request: Request, body: bytes) -> tuple[dict[str, Any], bytes | None]:
    """Fields, and the file `input_reference`; a text of that name would be a path or an address, and is refused."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=16, max_part_size=_FORM_BYTES)
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise ValueError(f"the form cannot be read: {error}") from error
    values = {name: value for name, value in form.items() if isinstance(value, str)}
    file = form.get("input_reference")
    picture = await file.read() if isinstance(file, UploadFile) else None
    await form.close()
    return values, picture


def _no_video() -> Response:
    return error_response(404, "not_found", "there is no such video")
