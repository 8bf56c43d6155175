"""A search index on disk: vectors of items of one modality and of captions, and what they are of.

    index.json      what it was made of: the model, modality and folder, what was left out
    rows.json       names and sizes of the items; the texts, and the item of each
    image.npy       vectors of the items, by their modality; with image.usearch where they are many
    text.npy        vectors of the texts, if there are any; with text.usearch likewise
    SHA256SUMS      of all files, written last

`unified_mm.search.index_writer` makes one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from unified_mm.files import naming, read_json, user_path, write_json
from unified_mm.inference.loaded import LoadedModel
from unified_mm.runs.seal import broken_files, is_sealed, tree_checksums, write_seal
from unified_mm.search.nearest import Nearest

FORMAT = 1  # of the files above
_HEADER, _ROWS = "index.json", "rows.json"
_SWAPS = 10  # successors that may take an index's name while it is opened
_AGAIN = "make it again with python -m unified_mm.index --run=RUN --images=DIR --out=NEW"


@dataclass(frozen=True)
class Rows:
    """The items and texts that the vectors are of, in the order of the vectors.

    Attributes:
      names: the items' files within the folder.
      sizes: the sizes of these files in bytes.
      texts: the captions.
      owners: the number of each text's item.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    texts: Sequence[str]
    owners: Sequence[int]


@dataclass(frozen=True)
class Hit:
    """An item or text that was found.

    Attributes:
      number: of the item or text in the index; it does not reveal where the files lie.
      score: cosine similarity with the query.
      name: the item's file within its folder, or the text.
      picture: number of the item that this is, or that the text is of.
    """

    number: int
    score: float
    name: str
    picture: int


@dataclass(frozen=True)
class SearchIndex:
    """An opened index; threads may share it.

    Attributes:
      path: the index's own folder.
      header: what index.json holds.
      rows: what the vectors are of.
      pictures: the folder that the names are within.
      nearest: the vectors by kind: the items' modality and, where there are texts, 'text'.
    """

    path: Path
    header: Mapping[str, Any]
    rows: Rows
    pictures: Path
    nearest: Mapping[str, Nearest]

    @property
    def of(self) -> str:
        """The items' modality; earlier versions indexed images alone."""
        return str(self.header.get("of", "image"))

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, pictures: str | os.PathLike[str] | None = None
    ) -> SearchIndex:
        """Opens an index, and checks every byte (about a second a gigabyte).

        Args:
          path: the index's folder.
          pictures: where the items lie now; by default, where they lay when it was made.

        Raises:
          FileNotFoundError: no index there.
          ValueError: a damaged one (the message names the files), or one of another format.
        """
        folder = user_path(path, "the index")
        for _ in range(_SWAPS):
            before = _identity(folder)
            try:
                found = cls._open(folder, pictures)
            except (OSError, ValueError):
                if _identity(folder) == before:
                    raise
            else:
                if _identity(folder) == before:
                    return found
        return cls._open(folder, pictures)

    @classmethod
    def _open(cls, folder: Path, pictures: str | os.PathLike[str] | None) -> SearchIndex:
        """Opens what has the index's name now; a successor may take it meanwhile."""
        if not os.path.lexists(folder) and (before := replaced_folder(folder.absolute())).is_dir():
            folder = before  # its successor was killed just before it took the name
        if not (folder / _HEADER).is_file() and not is_sealed(folder):
            begun = work_folder(folder.absolute()).is_dir()
            goes_on = "; it was begun, and the command that makes it goes on" if begun else ""
            raise FileNotFoundError(f"{folder} is no search index (it has no {_HEADER}){goes_on}")
        with naming(folder):
            broken = broken_files(folder) if is_sealed(folder) else ("SHA256SUMS",)
        if broken:
            raise ValueError(
                f"the index {folder} is damaged: {', '.join(broken)} is not as it was written; "
                f"{_AGAIN}"
            )
        header = read_json(folder / _HEADER)
        if header["format"] != FORMAT:
            raise ValueError(
                f"the index {folder} has format {header['format']}, and this version reads "
                f"{FORMAT}: {_AGAIN}"
            )
        rows = Rows(**read_json(folder / _ROWS))
        of = header.get("of", "image")
        kinds = (of, "text") if rows.texts else (of,)
        nearest = {kind: Nearest.open(folder, kind) for kind in kinds}
        return cls(folder, header, rows, Path(pictures or header["folder"]), nearest)

    def check_model(self, model: LoadedModel) -> None:
        """Raises ValueError unless the vectors are this model's."""
        made, asked = self.header["model"], model_identity(model)
        if made != asked:
            raise ValueError(
                f"the index {self.path} was made with another model: {_told(made)}; this run has "
                f"{_told(asked)}. Give the run and checkpoint it was made with, or {_AGAIN}"
            )

    def space(self, model: LoadedModel) -> str:
        """Returns the contrastive objective in whose space the vectors lie, by its name."""
        return self.header.get("objective") or model.predictor.task.space_of(self.of).name

    def embed(self, model: LoadedModel, items: Iterable[Any], of: str) -> Float[np.ndarray, "B Z"]:
        """Returns the unit vectors of queries: items as `LoadedModel.embed` takes them.

        Raises:
          ValueError: as there, and for a modality that the space has not.
        """
        return model.embed(items, of, self.space(model))

    def search(self, vector: Float[np.ndarray, " Z"], count: int, kind: str = "") -> list[Hit]:
        """Returns the `count` nearest to a vector, best first, or all where there are fewer.

        Args:
          vector: of `embed` or `mixed`; its length does not matter.
          count: 1 or more.
          kind: what is looked for: 'text', or by default items.

        Raises:
          ValueError: a vector that is no direction or of another width, a count below 1, or no
            texts in the index.
        """
        nearest = self._of(kind)
        width = nearest.vectors.shape[1]
        if np.shape(vector) != (width,):
            raise ValueError(f"a query has shape [{width}] here; got {list(np.shape(vector))}")
        if count < 1:
            raise ValueError(f"count={count}: must be 1 or more")
        found = nearest.search(_unit(np.asarray(vector, np.float32))[None], count)
        return [
            self._hit(int(number), float(score), kind)
            for number, score in zip(found.numbers[0], found.scores[0], strict=True)
        ]

    def vector(self, number: int, kind: str = "") -> Float[np.ndarray, " Z"]:
        """Returns the vector of an item or text.

        Raises:
          IndexError: there is no such number.
          ValueError: there are no texts in the index.
        """
        vectors = self._of(kind).vectors
        return np.array(vectors[_within(number, len(vectors), kind or self.of)])

    def read_picture(self, number: Any) -> bytes:
        """Returns the bytes of a picture's file, which shows it without taking or revealing a path.

        Raises:
          IndexError: there is no such number, or it is no number.
          FileNotFoundError: its file is gone, or has another size than when it was embedded.
        """
        number = _within(number, len(self.rows.names), self.of)
        changed = FileNotFoundError(f"picture {number} is not there as it was indexed")
        try:
            with open(self.pictures / self.rows.names[number], "rb") as file:
                content = file.read(self.rows.sizes[number] + 1)
        except OSError:
            raise changed from None
        if len(content) != self.rows.sizes[number]:
            raise changed
        return content

    def _of(self, kind: str) -> Nearest:
        kind = kind or self.of
        if kind not in self.nearest:
            raise ValueError(
                f"the index {self.path} holds no {kind!r}, but {', '.join(self.nearest)}: texts "
                "are the captions of a COCO set"
            )
        return self.nearest[kind]

    def _hit(self, number: int, score: float, kind: str) -> Hit:
        if kind == "text":
            return Hit(number, score, self.rows.texts[number], self.rows.owners[number])
        return Hit(number, score, self.rows.names[number], number)


def mixed(
    vectors: Float[np.ndarray, "vectors Z"], weights: Sequence[float]
) -> Float[np.ndarray, " Z"]:
    """Returns one query from several: the weighted mean of unit vectors, renormalised.

    A weight below 0 leads away from its vector.

    Raises:
      ValueError: the numbers of weights and vectors differ, or the vectors cancel out.
    """
    if len(vectors) != len(weights):
        raise ValueError(f"{len(vectors)} vectors and {len(weights)} weights: give as many")
    return _unit(np.asarray(weights, np.float32) @ vectors)


def work_folder(index: Path) -> Path:
    """Returns where an index lies while it is being made; `index` is absolute."""
    return index.with_name(f".{index.name}.indexing")


def replaced_folder(index: Path) -> Path:
    """Returns where an index lies while a newer one takes its name; `index` is absolute."""
    return index.with_name(f".{index.name}.replaced")


def write_metadata(folder: Path, header: Mapping[str, Any], rows: Rows) -> None:
    """Writes all of an index but its vectors, which must be there, and the seal last."""
    write_json(folder / _ROWS, vars(rows))
    write_json(folder / _HEADER, {"format": FORMAT, **header})
    write_seal(folder)


def read_header(folder: Path) -> dict[str, Any]:
    """Returns what index.json holds; {} where there is none, or none that can be read."""
    try:
        header = read_json(folder / _HEADER)
    except (FileNotFoundError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _told(identity: Mapping[str, Any]) -> str:
    return f"step {identity['step']}, parameters {identity['parameters'][:12]}"


def _within(number: Any, count: int, kind: str) -> int:
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not whole or not 0 <= number < count:
        raise IndexError(f"there is no {kind} {number!r}: numbers go from 0 to {count - 1}")
    return int(number)


def _unit(vector: Float[np.ndarray, " Z"]) -> Float[np.ndarray, " Z"]:
    """Returns a vector scaled to length 1.

    Raises:
      ValueError: the vector has no direction.
    """
    length = np.linalg.norm(vector)
    if not np.isfinite(length) or length < 1e-6:
        raise ValueError("the query has no direction: its vectors cancel out, or are not finite")
    return (vector / length).astype(np.float32)


def _identity(folder: Path) -> tuple[int | None, ...]:
    """Returns which folders have the name of an index, and of the one that it replaces."""
    names = (folder, replaced_folder(folder.absolute()))
    return tuple(os.stat(name).st_ino if name.is_dir() else None for name in names)


def model_identity(model: LoadedModel) -> dict[str, Any]:
    """Returns what makes a model's vectors comparable: its parameters, and how it reads inputs.

    Where the run lies does not matter.
    """
    parameters = hashlib.sha256()
    params = model.params
    sums = tree_checksums(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parameters.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
    for leaf in jax.tree.leaves(sums):
        parameters.update(np.asarray(leaf).tobytes())
    config = model.saved  # an index stays its model's when later versions name fields otherwise
    reads = {
        "modalities": config["model"]["modalities"],
        "image_size": config["data"]["image_size"],
        "special_tokens": config["data"]["special_tokens"],
        "tokenizer": model.task.tokenizer.as_json(),
    }
    if (reader := model.task.tokenizer.reader) is not None:
        reads["reader"] = [config["model"]["reader"], reader.as_json()]
    reading = hashlib.sha256(json.dumps(reads, sort_keys=True).encode())
    return {
        "step": model.step,
        "parameters": parameters.hexdigest(),
        "reading": reading.hexdigest(),
    }
