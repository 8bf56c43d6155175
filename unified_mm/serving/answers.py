"""The fields of each answer, as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Problem(BaseModel):
    """Why a request was not served."""

    status: int
    error: str = Field(description="One word for programs.")
    message: str = Field(description="What was wrong, and what to do.")


class Written(BaseModel):
    """What the model wrote."""

    text: str


class Vectors(BaseModel):
    """Unit vectors: their inner products say how well pictures and texts fit."""

    images: list[list[float]]
    texts: list[list[float]]
    items: list[list[float]] = Field(default=[], description="Of the modality that was named.")


class Hit(BaseModel):
    """Something found."""

    picture: int = Field(
        description="Number of the item, a picture to be seen at `/pictures/{number}`; the text's."
    )
    name: str = Field(description="The item's file, within the folder that was indexed.")
    score: float = Field(description="The cosine with what was asked.")
    text: str | None = Field(description="None where items were looked for.")


class Hits(BaseModel):
    """What was found, best first."""

    kind: str = Field(description="'text', or the modality that the index is of.")
    results: list[Hit]


class Class(BaseModel):
    """A class and how well the picture fits it."""

    name: str
    similarity: float = Field(description="The cosine; comparable within one request.")


class Classes(BaseModel):
    """The classes that were given, the best first."""

    classes: list[Class]


class Maps(BaseModel):
    """Where attention lay over the picture's patches while each word was written."""

    words: list[str]
    maps: list[list[list[float]]] = Field(description="For each word rows of patches; sums to 1.")
    fit: str = Field(
        description="'squash': the patches cover the whole picture; otherwise its central square."
    )


class Health(BaseModel):
    """Whether the server takes requests, and what for."""

    status: Literal["ok", "draining", "failed"]
    fusion: str
    step: int = Field(description="Of the run's training.")
    state: Literal["last", "best"] = Field(description="Which state of the run that is.")
    routes: list[str]
    missing: dict[str, str] = Field(description="By route, why it cannot be had here.")
    pictures: int = Field(description="In the index.")
    files: dict[str, list[str]] = Field(
        description="By modality, the suffixes of files that can be searched by."
    )
    limits: dict[str, float]


# By status, for every route that reads a body.
_REFUSALS = {
    400: "The body is not well formed.",
    408: "The body came too slowly.",
    413: "Too many bytes, or too many pixels.",
    415: "Neither a form nor JSON, or no picture that is read here.",
    422: "Wrong fields, a broken picture, a text that is too long.",
    429: "The queue is full; see Retry-After.",
    504: "No answer in time.",
}
_ALWAYS = {
    401: "No token, or a wrong one.",
    403: "A page of another site asks.",
    429: "Too many requests are under way; see Retry-After.",
    503: "The server is stopping, or must be started again.",
}


def refusals(*, body: bool) -> dict[int | str, dict[str, Any]]:
    """Returns the error responses of a route by status, for its OpenAPI document.

    Args:
      body: whether the route reads a body.
    """
    said = {**_ALWAYS, **(_REFUSALS if body else {})}
    return {
        status: {"model": Problem, "description": what} for status, what in sorted(said.items())
    }
