"""How much of anything a request may ask for, and how one that asks for too much is answered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
      upload_bytes: of a whole body, counted as it is read.
      pixels: of one picture, read from its header before it is decoded.
      characters: of one text.
      texts, pictures: in one request.
      sentences: that the classes and templates of one request make together.
      results: that a search returns.
      requests: under way at a time; more are told to come back.
      waiting: embeddings that wait for the model at a time.
      upload_seconds: until the body must be there.
      seconds: until the answer must be there, from the whole body on.
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
    """A request that is not served.

    Attributes:
      status: HTTP's.
      error: one word for programs, such as 'too_many_pixels'.
      message: for people: what was wrong and what to do.
      headers: of the answer.
    """

    def __init__(
        self, status: int, error: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.error, self.message = status, error, message
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """What the answer says."""
        return {"status": self.status, "error": self.error, "message": self.message}


BROKEN = Refusal(500, "failed", "the server failed at this; its log says how")


class Json(Response):
    """JSON in ASCII: whatever a request held, its answer can be written."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


def answer(refusal: Refusal) -> Json:
    """The response that says why."""
    return Json(refusal.body, refusal.status, refusal.headers)


def busy(what: str, seconds: int = 1) -> Refusal:
    """For a queue that is full: come back."""
    message = f"{what}; try again in {seconds} s"
    return Refusal(429, "busy", message, {"Retry-After": str(seconds)})
