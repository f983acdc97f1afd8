"""What the server answers, as an OpenAPI document and as a page to read. `docs/API_LIVE.md` explains more."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

from pydantic import BaseModel, TypeAdapter
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from wan_autoregressive._version import __version__
from wan_autoregressive.configs import GenerateConfig
from wan_autoregressive.server.job_routes import VideoRequest
from wan_autoregressive.server.messages import ClientMessage, ServerMessage
from wan_autoregressive.server.schedule import NOT_TAKEN

_TYPES = {"int": "integer", "str": "string"}
_SCHEMAS = "#/components/schemas/"
_BODIES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "/v1/images": (None, ("image/png", "image/jpeg", "image/webp")),
    "/v1/schedules": ("SettingsFile", ("application/yaml",)),
    "/v1/videos": ("VideoRequest", ("multipart/form-data", "application/json")),
}
"""Of what is posted: the name of its schema, and its media types."""


def openapi_routes(routes: Iterable[BaseRoute]) -> list[Route]:
    """`/openapi.json` and the page `/api`, which describe `routes`."""
    document = openapi_document(routes)
    html = openapi_page(document)

    async def as_json(request: Request) -> Response:
        return JSONResponse(document)

    async def as_page(request: Request) -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"})

    return [Route("/openapi.json", as_json), Route("/api", as_page)]


def openapi_document(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """OpenAPI 3.1 of the routes: their docstrings, and the messages of the WebSocket as schemas."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if isinstance(route, Route):
            for method in (route.methods or set()) - {"HEAD"}:
                paths.setdefault(_path(route.path), {})[method.lower()] = _operation(route, method)
        elif isinstance(route, WebSocketRoute):
            paths[_path(route.path)] = {
                "get": {
                    "summary": "WebSocket: ClientMessage there, ServerMessage back, a chunk with its mp4 behind it",
                    "responses": {"101": {"description": "it is open"}},
                }
            }
    return {
        "openapi": "3.1.0",
        "info": {"title": "wan-autoregressive live server", "version": __version__},
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(),
            "responses": {"Error": {"description": "error: type, code, message"}},
        },
    }


def openapi_page(document: dict[str, Any]) -> str:
    """The document as HTML without styles or scripts."""
    rows = [
        f"<dt><code>{method.upper()} {escape(path)}</code></dt><dd>{escape(operation['summary'])}</dd>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    title = escape(document["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>'
        f'<p>The same for programs: <a href="/openapi.json">openapi.json</a></p><dl>{"".join(rows)}</dl></html>'
    )


def _operation(route: Route, method: str) -> dict[str, Any]:
    text = (route.endpoint.__doc__ or "").strip()
    operation: dict[str, Any] = {
        "summary": text.splitlines()[0] if text else route.name,
        "parameters": [
            {
                "name": name,
                "in": "path",
                "required": True,
                "schema": {"type": "integer" if kind == "int" else "string"},
            }
            for name, kind in re.findall(r"{(\w+):(\w+)}", route.path)
        ],
        "responses": {"200": {"description": "as it says"}, "4XX": {"$ref": "#/components/responses/Error"}},
    }
    if method == "POST" and route.path in _BODIES:
        name, kinds = _BODIES[route.path]
        content = {} if name is None else {"schema": {"$ref": _SCHEMAS + name}}
        operation["requestBody"] = {"required": True, "content": dict.fromkeys(kinds, content)}
    return operation


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    client = TypeAdapter(ClientMessage).json_schema(ref_template=_SCHEMAS + "{model}")
    schemas.update(client.pop("$defs"))
    schemas["ClientMessage"] = client
    server = ServerMessage.__subclasses__()
    models: list[type[BaseModel]] = [*server, VideoRequest]
    for model in models:
        schemas[model.__name__] = model.model_json_schema(ref_template=_SCHEMAS + "{model}")
    schemas["SettingsFile"] = _settings_file()
    schemas["ServerMessage"] = {"oneOf": [{"$ref": _SCHEMAS + model.__name__} for model in server]}
    return schemas


def _settings_file() -> dict[str, Any]:
    """What `wan-ar generate --config` takes and a live video can have, all on one level."""
    described = GenerateConfig.model_json_schema()
    rollout = described["$defs"][described["properties"].pop("rollout")["$ref"].rsplit("/", 1)[1]]
    properties = {**described["properties"], **rollout["properties"]}
    return {
        "type": "object",
        "title": "SettingsFile",
        "description": "As yaml; what differs from the server's own is refused where no viewer may choose it.",
        "properties": {name: value for name, value in properties.items() if name not in NOT_TAKEN},
        "required": ["prompt"],
        "additionalProperties": False,
    }


def _path(path: str) -> str:
    return re.sub(r"{(\w+):\w+}", r"{\1}", path)
