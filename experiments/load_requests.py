"""Requests of the load test: good ones with the model's own answers, and broken ones."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

import unified_mm
from unified_mm.analysis.attention_maps import attention_over_patches
from unified_mm.data.images import decode
from unified_mm.search.search_index import SearchIndex

QUESTIONS = ("what colour is the cube?", "how many objects are there?", "is there a sphere?")
QUERIES = ("a large red cube left of a blue sphere", "a small shiny cylinder", "two green things")
CLASSES = ("a cube", "a sphere", "a cylinder", "something red")
Check = Callable[[httpx.Response], str]
CLOSE = 1e-4  # of cosines and vectors: batches of other sizes add up in another order


@dataclass(frozen=True)
class Asked:
    """A request, and how its answer is checked.

    Attributes:
      kind: the kind of request, for counting.
      path: the path of the URL.
      check: a function that returns what is wrong with an answer, '' for nothing.
      options: keyword arguments of `httpx.Client.request`.
      method: the HTTP method.
      weight: the relative frequency of the request.
    """

    kind: str
    path: str
    check: Check
    options: dict[str, Any] = field(default_factory=dict)
    method: str = "POST"
    weight: float = 1.0

    @property
    def broken(self) -> bool:
        """Returns whether the server must refuse the request."""
        return self.kind.startswith("broken")


def good_requests(run: str, pictures: Path, index: Path) -> list[Asked]:
    """Returns good requests of every kind, with the model's own output as the right answer."""
    model, opened = unified_mm.load(run), SearchIndex.open(index)
    paths = [pictures / name for name in opened.rows.names]
    files = [path.read_bytes() for path in paths]
    captions = model.caption(paths)
    vectors, texts = model.embed_images(paths), model.embed_texts(QUERIES)
    classes = model.classify(paths, CLASSES)
    found: list[Asked] = []

    def add(kind: str, check: Check, weight: float = 1, **options: Any) -> None:
        path = "/" + kind.partition(",")[0]
        found.append(Asked(kind, path, check, options, weight=weight))

    for file, caption, vector, scores in zip(files, captions, vectors, classes, strict=True):
        image = {"image": file}
        add("caption", _says(caption), 3, files=image)
        add("caption, streamed", _streams(caption), files=image, data={"stream": "true"})
        about = caption or "nothing"
        attended = _attends(*attention_over_patches(model, decode(file), "", about))
        add("attention", attended, files=image, data={"text": about})
        add("embed", _embeds(vector), 2, files=[("images", file)])
        add("classify", _classifies(scores), files=image, data={"classes": list(CLASSES)})
        for text, query in zip(texts, QUERIES, strict=True):
            hits = _finds(opened, (text + vector) / 2)
            both = {"text": query, "count": "5"}
            add("search, both", hits, 1 / len(QUERIES), files=image, data=both)
    for question in QUESTIONS:
        answers = model.answer(paths, [question] * len(paths))
        for file, answer in zip(files, answers, strict=True):
            asked = {"question": question}
            add("answer", _says(answer), 2 / len(QUESTIONS), files={"image": file}, data=asked)
    for text, query in zip(texts, QUERIES, strict=True):
        weight = 2 * len(files) / len(QUERIES)
        add("search", _finds(opened, text), weight, json={"text": query, "count": 5})
    return found


def broken_requests() -> list[Asked]:
    """Returns requests of every kind that the server must refuse."""
    whole = _jpeg()

    def broken(kind: str, path: str, method: str = "POST", **options: Any) -> Asked:
        return Asked(f"broken: {kind}", path, _refused, options, method)

    files = {
        "garbage bytes": np.random.default_rng(0).bytes(5000),
        "truncated JPEG": whole[: len(whole) // 2],
        "200 megapixels": two_hundred_megapixels(),
        "nothing": b"",
    }
    long = {"question": "what " * 300}
    return [
        *(broken(kind, "/caption", files={"image": each}) for kind, each in files.items()),
        broken("wrong types", "/embed", json={"texts": [1, None]}),
        broken("wrong types", "/search", json={"text": ["a"], "count": "many"}),
        broken("wrong types", "/classify", json=[1, 2, 3]),
        broken("huge prompt", "/search", json={"text": "cube " * 100_000}),
        broken("huge prompt", "/answer", files={"image": whole}, data=long),
        broken("path tricks", "/caption", json={"image": "/etc/passwd"}),
        broken("path tricks", "/caption", json={"image": "file:///etc/passwd"}),
        broken("path tricks", "/pictures/..%2f..%2f..%2fetc%2fpasswd", "GET"),
        broken("path tricks", "/pictures/99999999", "GET"),
        broken("path tricks", "/%2e%2e/%2e%2e/etc/passwd", "GET"),
    ]


def two_hundred_megapixels() -> bytes:
    """Returns a PNG of 20,000 x 10,000 black pixels in about 25 kB."""
    return _file(Image.new("1", (20_000, 10_000)), "PNG")


def _jpeg() -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    return _file(Image.fromarray(pixels), "JPEG")


def _file(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def _says(text: str) -> Check:
    return _gives(text, lambda said: said["text"])


def _streams(text: str) -> Check:
    def check(response: httpx.Response) -> str:
        data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        pieces = [json.loads(each)["text"] for each in data]
        right = response.status_code == 200 and pieces[-1] == text == "".join(pieces[:-1])
        return "" if right else f"expected {text!r}; got {response.status_code} {response.text}"

    return check


def _embeds(vector: np.ndarray) -> Check:
    return _gives(vector, lambda said: said["images"][0])


def _classifies(scores: np.ndarray) -> Check:
    def given(said: Any) -> list[float]:
        by_name = {each["name"]: each["similarity"] for each in said["classes"]}
        return [by_name[name] for name in CLASSES]

    return _gives(scores, given)


def _attends(words: list[str], maps: np.ndarray) -> Check:
    return _gives(
        maps, lambda said: said["maps"] if said["words"] == words else np.zeros_like(maps)
    )


def _finds(index: SearchIndex, vector: np.ndarray) -> Check:
    scores = np.array([each.score for each in index.search(vector, 5)])
    return _gives(scores, lambda said: [each["score"] for each in said["results"]])


def _gives(right: Any, read: Callable[[Any], Any]) -> Check:
    """Returns a check of what `read` takes from an answer; numbers may differ by `CLOSE`."""

    def check(response: httpx.Response) -> str:
        if response.status_code != 200:
            return f"{response.status_code}: {response.text[:200]}"
        got = read(response.json())
        same = got == right if isinstance(right, str) else np.allclose(got, right, atol=CLOSE)
        return "" if same else f"expected {right!r}; got {got!r}"

    return check


def _refused(response: httpx.Response) -> str:
    said = response.json() if response.headers["content-type"] == "application/json" else {}
    right = 400 <= response.status_code < 500 and said.get("message")
    return "" if right else f"{response.status_code}: {response.text[:200]}"
