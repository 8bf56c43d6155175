"""The HTTP routes: what each reads and what it answers."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import Response, StreamingResponse

from unified_mm.inference.decoding import Decoding
from unified_mm.search.items import shown
from unified_mm.serving import answers, fields
from unified_mm.serving.bodies import body_of
from unified_mm.serving.limits import BROKEN, Json, Refusal
from unified_mm.serving.metrics import CONTENT_TYPE
from unified_mm.serving.service import Service

log = logging.getLogger(__name__)
EVENTS = "text/event-stream"

always = APIRouter()
asking = APIRouter()
read = partial(asking.post, responses=answers.refusals(body=True))
written = partial(
    asking.post,
    response_model=answers.Written,
    responses={200: {"content": {EVENTS: {}}}, **answers.refusals(body=True)},
)


def path_of(route: Any) -> str:
    """Returns a route's path, as `Service.missing` names it."""
    return str(route.path)


def _service(request: Request) -> Service:
    return request.app.state.service


Asked = Annotated[Service, Depends(_service)]


@written("/caption", openapi_extra=fields.documented(fields.Caption))
async def caption(
    service: Asked,
    body: Annotated[fields.Caption, Depends(body_of(fields.Caption))],
) -> Response:
    """Writes a caption for a picture; with `stream`, as events whose data has `text` or `error`."""
    return await _written(service, body, body.prompt)


@written("/answer", openapi_extra=fields.documented(fields.Answer))
async def answer_question(
    service: Asked,
    body: Annotated[fields.Answer, Depends(body_of(fields.Answer))],
) -> Response:
    """Answers a question about a picture; with `stream`, as `/caption` does."""
    return await _written(service, body, body.question)


@read("/embed", response_model=answers.Vectors, openapi_extra=fields.documented(fields.Embed))
async def embed(
    service: Asked, body: Annotated[fields.Embed, Depends(body_of(fields.Embed))]
) -> Response:
    """Embeds pictures, texts and items of another modality, into one space."""
    if not (body.images or body.texts or body.items):
        raise Refusal(422, "wrong_fields", "give images, texts or both; or items")
    space = service.space(body.of if body.items else "image", body.objective)
    found = {}
    for name, of in (("images", "image"), ("texts", "text"), ("items", body.of)):
        items = {f"{name}[{i}]": each for i, each in enumerate(getattr(body, name))}
        found[name] = (await service.embed(of, items, space)).tolist() if items else []
    return Json(found)


@read("/search", response_model=answers.Hits, openapi_extra=fields.documented(fields.Search))
async def search(
    service: Asked, body: Annotated[fields.Search, Depends(body_of(fields.Search))]
) -> Response:
    """Finds what is nearest to a text, a picture, an item, or several (their mean direction)."""
    asked = [("text", body.text), ("image", body.image), (body.of, body.item)]
    given = [(of, each) for of, each in asked if each is not None]
    if not given:
        raise Refusal(422, "wrong_fields", "give text, image or both; or an item")
    assert service.index is not None
    kind = body.kind or service.index.of
    found = await service.search(given, body.count, kind)
    results = [
        {
            "picture": hit.picture,
            "name": shown(service.index.rows.names[hit.picture]),
            "score": hit.score,
            "text": hit.name if kind == "text" else None,
        }
        for hit in found
    ]
    return Json({"kind": kind, "results": results})


@read("/classify", response_model=answers.Classes, openapi_extra=fields.documented(fields.Classify))
async def classify(
    service: Asked, body: Annotated[fields.Classify, Depends(body_of(fields.Classify))]
) -> Response:
    """Says which of the named classes a picture, or another item, fits best (zero-shot)."""
    asked = [("image", body.image), (body.of, body.item)]
    given = [(of, each) for of, each in asked if each is not None]
    if len(given) != 1:
        raise Refusal(422, "wrong_fields", "give one picture as image, or one item")
    scores = await service.similarities(*given[0], body.classes, body.templates)
    order = np.argsort(-scores, kind="stable")
    ranked = [{"name": body.classes[i], "similarity": float(scores[i])} for i in order]
    return Json({"classes": ranked})


@read("/attention", response_model=answers.Maps, openapi_extra=fields.documented(fields.Attention))
async def attention(
    service: Asked, body: Annotated[fields.Attention, Depends(body_of(fields.Attention))]
) -> Response:
    """Returns maps of attention over a picture's patches, one for each word of a text about it."""
    view = await service.view(body.image, "image")
    words, maps = await service.attention(view, body.prompt, body.text)
    fit = service.model.task.modalities["image"].fit
    return Json({"words": words, "maps": np.round(maps.astype(float), 6).tolist(), "fit": fit})


@asking.get(
    "/pictures/{number}",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {}}, "description": "The picture, made smaller."},
        404: {"model": answers.Problem, "description": "No picture has this number."},
        422: {"model": answers.Problem, "description": "No number."},
        **answers.refusals(body=False),
    },
)
async def picture(
    service: Asked, number: Annotated[str, Path(pattern="^[0-9]{1,12}$")]
) -> Response:
    """Returns a picture of the index, by the number that `/search` gives."""
    return Response(await service.picture(int(number)), media_type="image/jpeg")


@always.get("/healthz", response_model=answers.Health, responses={503: {"model": answers.Health}})
async def health(request: Request, service: Asked) -> Response:
    """Says whether the server takes requests (200) or not (503), and what it can do."""
    status = "draining" if request.app.state.traffic.draining else "ok"
    status = "failed" if service.failed else status
    paths = [path_of(route) for route in asking.routes]
    content = {
        "status": status,
        "fusion": service.model.config.model.fusion,
        "step": service.model.step,
        "state": service.model.state,
        "routes": [path for path in paths if path not in service.missing],
        "missing": service.missing,
        "pictures": 0 if service.index is None else len(service.index.rows.names),
        "files": service.searched_by(),
        "limits": vars(service.limits),
    }
    return Json(content, 200 if status == "ok" else 503)


@always.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **answers.refusals(body=False)},
)
async def metrics(request: Request) -> Response:
    """Returns counts and times, for Prometheus."""
    return Response(request.app.state.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def _written(service: Service, body: fields.Writing, prompt: str) -> Response:
    view = await service.view(body.image, "image")
    try:
        decoding = Decoding(**body.model_dump(include=fields.DECODING))
    except ValueError as error:
        raise Refusal(422, "wrong_fields", str(error)) from error
    writing = service.begin(view, prompt, decoding)
    pieces = service.pieces(writing)
    if body.stream:
        return StreamingResponse(_events(pieces), media_type=EVENTS)
    async with aclosing(pieces):
        return Json({"text": "".join([piece async for piece in pieces])})


async def _events(pieces: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """Yields server-sent events: pieces of text, then `done` with all of it, or `failed`."""
    text = ""
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                text += piece
                yield _event("message", {"text": piece})
        except Refusal as refusal:
            yield _event("failed", refusal.body)
        except Exception:
            log.exception("a text broke off")
            yield _event("failed", BROKEN.body)
        else:
            yield _event("done", {"text": text})


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
