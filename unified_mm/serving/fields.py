"""The fields of each request, as a form with files or as JSON."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)


def _from_base64(value: Any) -> Any:
    """Decodes the base64 of a picture in JSON; the bytes of a form's file pass unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            "a picture is a form's file, or in JSON its bytes in base64 (never a path or a URL)"
        ) from error


def _is_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no text") from error
    return value


def _schema(format: str, what: str) -> WithJsonSchema:
    what = f"{what}: a form's file, in JSON base64."
    return WithJsonSchema({"type": "string", "format": format, "description": what})


Picture = Annotated[
    bytes, BeforeValidator(_from_base64), _schema("picture", "A JPEG, PNG, WebP, GIF or BMP")
]
Item = Annotated[
    bytes, BeforeValidator(_from_base64), _schema("item", "What the modality of `of` reads")
]
Text = Annotated[str, AfterValidator(_is_text)]
Said = Annotated[str, Field(min_length=1), AfterValidator(_is_text)]


class Fields(BaseModel):
    """The fields of a request; a field that nothing reads is an error."""

    model_config = ConfigDict(extra="forbid")


class Writing(Fields):
    """A picture to write a text about, and how tokens are chosen: by default greedily."""

    image: Picture
    tokens: int | None = Field(None, ge=1, le=4096, description="Written at most.")
    temperature: float = Field(0.0, ge=0, le=10, description="0: always the likeliest token.")
    top_k: int = Field(0, ge=0, le=1_000_000, description="Only the k likeliest; 0: all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Only the likeliest of that probability.")
    seed: int = Field(0, ge=0, lt=2**31, description="Equal seeds write equal texts.")
    stream: bool = Field(False, description="Answer with text/event-stream, piece by piece.")


DECODING = Writing.model_fields.keys() - {"image", "stream"}  # what `Decoding` has too


class Caption(Writing):
    """A picture to write a caption for."""

    prompt: Text = Field("", description="What the caption begins with.")


class Answer(Writing):
    """A picture and a question about it."""

    question: Text = Field(min_length=1)


class OfItems(Fields):
    """Fields with items of a modality that is named."""

    of: Text = Field("image", description="The modality of what is given as an item.")

    @model_validator(mode="after")
    def _is_read(self) -> OfItems:
        given = getattr(self, "items", None) or getattr(self, "item", None) is not None
        if "of" in self.model_fields_set and not given:
            raise ValueError("`of` names the modality of items, and none is given")
        return self


class Embed(OfItems):
    """Pictures, texts and items of another modality, at least one of either."""

    images: list[Picture] = Field(default_factory=list)
    texts: list[Text] = Field(
        default_factory=list, description="Cut at the length that the model reads."
    )
    items: list[Item] = Field(default_factory=list)
    objective: Text = Field(
        "", description="The contrast in whose space vectors lie, where several were trained."
    )


class Search(OfItems):
    """What to look for: a text, a picture, an item of another modality, or several together."""

    text: Said | None = None
    image: Picture | None = None
    item: Item | None = None
    count: int = Field(12, ge=1)
    kind: Text = Field(
        "", description="What is to be found: 'text', or by default what the index is of."
    )


class Classify(OfItems):
    """A picture, or an item of another modality, and names of the classes that it may be of."""

    image: Picture | None = None
    item: Item | None = None
    classes: list[Said] = Field(min_length=1)
    templates: list[Text] | None = Field(
        None, min_length=1, description="Sentences with one {} for the class; averaged."
    )


class Attention(Fields):
    """A picture, and a text about it (such as its caption) whose words look at it."""

    image: Picture
    text: Text = Field(min_length=1)
    prompt: Text = Field("", description="What the text was written after.")


def documented(asked: type[Fields]) -> dict[str, Any]:
    """Returns the request body of a route for its OpenAPI document."""
    as_json = asked.model_json_schema()
    as_form = {**as_json, "properties": {}}
    for name, schema in as_json["properties"].items():
        as_form["properties"][name] = _in_form(schema)
    content = {
        "multipart/form-data": {"schema": as_form},
        "application/json": {"schema": as_json},
    }
    return {"requestBody": {"required": True, "content": content}}


def _in_form(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema that a JSON field has in a form.

    A form leaves out what JSON may call null, and its pictures are files.
    """
    if "anyOf" in schema:
        options = [each for each in schema["anyOf"] if each != {"type": "null"}]
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        schema = {**options[0], **rest}
    if "items" in schema:
        return {**schema, "items": _in_form(schema["items"])}
    is_file = schema.get("format") in ("picture", "item")
    return {**schema, "format": "binary"} if is_file else schema
