"""The application: the routes that this model can serve, the page, and errors as JSON."""

from __future__ import annotations

from functools import partial
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from unified_mm.serving.gate import Gate, Traffic
from unified_mm.serving.limits import BROKEN, Json, Refusal, answer
from unified_mm.serving.metrics import Metrics
from unified_mm.serving.routes import always, asking, path_of
from unified_mm.serving.security import Authenticator
from unified_mm.serving.service import Service

PAGES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
}


def make_app(
    service: Service, *, traffic: Traffic, token: str | None = None, host: str = "127.0.0.1"
) -> ASGIApp:
    """Builds the whole application: gate, routes and page.

    Args:
      traffic: shared with whoever stops the server: the requests under way, and whether it drains.
      token: the bearer token that requests must carry; None for none.
      host: the address that the server will listen at.
    """
    app = FastAPI(
        title="unified_mm",
        description="Captions, answers, embeddings, search and zero-shot classes of a trained run.",
        version="1",
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    metrics = Metrics()
    metrics.watch("unified_mm_under_way", "Requests being answered.", lambda: traffic.under_way)
    service.watch(metrics)
    app.state.service, app.state.traffic, app.state.metrics = service, traffic, metrics
    app.include_router(always)
    here = APIRouter()
    here.routes += [route for route in asking.routes if path_of(route) not in service.missing]
    app.include_router(here)
    for path, (name, kind) in PAGES.items():
        app.add_api_route(path, partial(_page, *_file(name, kind)), include_in_schema=False)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    app.openapi = partial(_document, app, token is not None)  # type: ignore[method-assign]
    return Gate(app, Authenticator(token, host), service.limits, traffic, metrics)


async def _refused(request: Request, refusal: Any) -> Response:
    return answer(refusal)


async def _not_found(request: Request, error: Any) -> Response:
    """Answers a request whose path does not exist, or does not take its method."""
    missing = request.app.state.service.missing
    path = request.url.path
    if error.status_code == 405:
        refusal = Refusal(405, "wrong_method", f"{path} takes no {request.method}")
    elif path in missing:
        refusal = Refusal(404, "not_here", missing[path])
    else:
        refusal = Refusal(404, "no_such_path", "there is nothing here; see /docs")
    return Json(refusal.body, error.status_code, dict(error.headers or {}))


async def _invalid(request: Request, error: Any) -> Response:
    """Answers a request whose path parameters FastAPI refuses, such as `/pictures/x`."""
    return answer(Refusal(422, "wrong_fields", "; ".join(each["msg"] for each in error.errors())))


async def _failed(request: Request, error: Exception) -> Response:
    return answer(BROKEN)  # the error itself goes to the log alone


async def _page(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind)


def _document(app: FastAPI, with_token: bool) -> dict[str, Any]:
    """Returns FastAPI's OpenAPI document, with the bearer token where one is required."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        if with_token:
            schemes = {"token": {"type": "http", "scheme": "bearer"}}
            document.setdefault("components", {})["securitySchemes"] = schemes
            document["security"] = [{"token": []}]
            document["paths"]["/healthz"]["get"]["security"] = []
        app.openapi_schema = document
    return app.openapi_schema


def _file(name: str, kind: str) -> tuple[bytes, str]:
    return resources.files("unified_mm.serving").joinpath("static", name).read_bytes(), kind
