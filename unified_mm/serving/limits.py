"""The limits of requests, and the answer to a request that is not served."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response


@dataclass(frozen=True)
class Limits:
    """The limits of one request, and of all requests together.

    Attributes:
      upload_bytes: bytes of a whole body, counted as it is read.
      pixels: pixels of one picture, read from its header before it is decoded.
      characters: characters of one text.
      texts: texts in one request.
      pictures: pictures in one request.
      sentences: sentences that the classes and templates of one request make together.
      results: results that a search returns.
      requests: requests under way at a time; more are answered with 429.
      waiting: embedding jobs that wait for the model at a time.
      upload_seconds: seconds until the whole body must be there.
      seconds: seconds from the whole body to the answer.
    """

    upload_bytes: int = 16 * 1024 * 1024
    pixels: int = 32 * 1024 * 1024
    characters: int = 2000
    texts: int = 256
    pictures: int = 16
    sentences: int = 2048
    results: int = 100
    requests: int = 128
    waiting: int = 64
    upload_seconds: float = 20.0
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"the limit {name}={value} must be above 0")


class Refusal(Exception):
    """An error answer, raised where a request is not served.

    Attributes:
      status: the HTTP status.
      error: one word for programs, such as 'too_many_pixels'.
      message: for people: what was wrong and what to do.
      headers: added to the answer's.
    """

    def __init__(
        self, status: int, error: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, error, message, headers)  # as args: so it survives pickling
        self.status, self.error, self.message = status, error, message
        self.headers = headers or {}

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The fields of the answer's JSON."""
        return {"status": self.status, "error": self.error, "message": self.message}


BROKEN = Refusal(500, "failed", "the server failed at this; its log says how")


class Json(Response):
    """A response of JSON in ASCII, which can hold any text that a request held."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


def answer(refusal: Refusal) -> Json:
    """Returns the response to a request that is not served."""
    return Json(refusal.body, refusal.status, refusal.headers)


def busy(what: str, seconds: int = 1) -> Refusal:
    """Returns the refusal (429) for a full queue, which asks the client to try again."""
    message = f"{what}; try again in {seconds} s"
    return Refusal(429, "busy", message, {"Retry-After": str(seconds)})
