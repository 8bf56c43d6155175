"""Reading a request's body into its fields, and saying what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, get_origin

from fastapi import Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from unified_mm.serving.fields import Fields
from unified_mm.serving.limits import Limits, Refusal

Asked = TypeVar("Asked", bound=Fields)
FORM, JSON = "multipart/form-data", "application/json"


def body_of(asked: type[Asked]) -> Callable[[Request], Awaitable[Asked]]:
    """Returns a FastAPI dependency that reads a request's body as these fields.

    Raises:
      Refusal: by the dependency: 415 neither form nor JSON, 400 not well formed, 422 wrong fields
        or over a limit.
    """

    async def read(request: Request) -> Asked:
        limits: Limits = request.app.state.service.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == FORM:
            values = await _form(request, asked, limits)
        elif kind == JSON:
            values = _parsed(await request.body())
        else:
            said = f"{kind!r:.100}" if kind else "nothing"
            message = f"the body must be {FORM} or {JSON}; its content-type says {said}"
            raise Refusal(415, "content_type", message)
        try:
            # A form's values are all text; JSON knows its types.
            fields = asked.model_validate(values, strict=kind == JSON)
        except ValidationError as error:
            raise Refusal(422, "wrong_fields", _said(error)) from error
        check_limits(fields, limits)
        return fields

    return read


def check_limits(fields: Fields, limits: Limits) -> None:
    """Raises Refusal for texts that are too long, and for too many of anything."""
    sent = 0  # files, of all fields
    for name in type(fields).model_fields:
        value = getattr(fields, name)
        each = value if isinstance(value, list) else [value]
        files = any(isinstance(item, bytes) for item in each)
        sent += len(each) * files
        count, most = (sent, limits.pictures) if files else (len(each), limits.texts)
        if count > most:
            raise Refusal(422, "too_many", f"{name}: {count} given, at most {most} are taken")
        longest = max((len(item) for item in each if isinstance(item, str)), default=0)
        if longest > limits.characters:
            message = f"{name}: {longest} characters, at most {limits.characters} are read"
            raise Refusal(422, "too_long", message)
    count = getattr(fields, "count", 0)
    if count > limits.results:
        raise Refusal(422, "too_many", f"count: {count} asked, at most {limits.results} are given")


async def _form(request: Request, asked: type[Fields], limits: Limits) -> dict[str, Any]:
    """Returns the form's fields by name; those that are lists may come several times."""
    await _check_ends(request)
    try:
        form = await request.form(
            max_files=limits.pictures + 1,  # one more is too many, and is told so by its field
            max_fields=2 * limits.texts + 16,
            max_part_size=limits.upload_bytes,
        )
    except HTTPException as error:
        raise Refusal(400, "malformed", f"the form is not well formed: {error.detail}") from error
    values: dict[str, Any] = {}
    try:
        for name in form:
            given = [
                await item.read() if isinstance(item, UploadFile) else item
                for item in form.getlist(name)
            ]
            field = asked.model_fields.get(name)
            if field is not None and _is_list(field.annotation):
                values[name] = given
            elif len(given) > 1:
                message = f"{name!r:.100}: given {len(given)} times, once is expected"
                raise Refusal(422, "wrong_fields", message)
            else:
                values[name] = given[0]
    finally:
        await form.close()
    return values


async def _check_ends(request: Request) -> None:
    """Raises Refusal for a form that ends too early, which its parser would accept."""
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary")
    if boundary and b"--" + boundary + b"--" not in await request.body():
        raise Refusal(400, "malformed", "the form is not well formed: it breaks off")


def _is_list(annotation: Any) -> bool:
    options = getattr(annotation, "__args__", ()) if get_origin(annotation) is not list else ()
    return get_origin(annotation) is list or any(get_origin(each) is list for each in options)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        # A parser's words for bytes that are no text or nested too deep are of no use.
        what = error if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise Refusal(400, "malformed", f"the body is no JSON: {what}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _said(error: ValidationError) -> str:
    """Returns each wrong field with its error; the values that were given are not repeated."""
    lines = []
    for each in error.errors(include_url=False, include_input=False, include_context=False)[:10]:
        place = ".".join(str(part)[:60] for part in each["loc"]) or "the body"
        lines.append(f"{place}: {each['msg'][:300]}")
    return "; ".join(lines)
