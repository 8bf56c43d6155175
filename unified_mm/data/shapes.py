"""Shapes: points, of any file of points or of a mesh, from whose surface they are drawn."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from unified_mm.data.arrays import read_array
from unified_mm.data.records import Source, content_of

SUFFIXES = frozenset({".npz", ".npy", ".ply", ".off", ".obj", ".glb"})
MOST = 2_000_000  # points, and faces, of a file: what an upload may make of little
LEAST = 4  # points of a cloud: fewer span no space
NAMES = {  # what the arrays of an npz are called
    "points": ("points", "xyz", "vertices", "pos", "pc", "data", "arr_0"),
    "colours": ("colours", "colors", "rgb", "color"),
}


class ShapeError(ValueError):
    """The error that a shape cannot be used.

    Attributes:
      what: the fault, without the file's name.
    """

    def __init__(self, what: str, name: str = "") -> None:
        super().__init__(f"{name}: {what}" if name else what)
        self.what = what


class MissingExtra(ValueError):
    """The error that a library is not installed; no file is to blame."""


@dataclass(frozen=True)
class Shape:
    """The points of a cloud, or a mesh.

    Attributes:
      points: all finite.
      faces: three numbers of points each; none of a cloud.
      colours: of the points, red, green and blue in 0..1; grey where a file tells none.
      conversion: what was changed; '' for nothing.
    """

    points: Float[np.ndarray, "points 3"]
    faces: Int[np.ndarray, "faces 3"]
    colours: Float[np.ndarray, "points 3"]
    conversion: str = ""


def sample(
    shape: Shape, count: int, rng: np.random.Generator
) -> Float32[np.ndarray, "points coordinates"]:
    """Returns at most `count` points, x, y, z and red, green, blue.

    Of a mesh they lie anywhere on its surface; of a cloud they are some of its own, or all that it
    has, and the order in which the file has them changes nothing.
    """
    values = np.concatenate([shape.points, shape.colours], axis=1)
    if not len(shape.faces):
        if len(values) > count:
            values = values[np.lexsort(values.T[::-1])][rng.permutation(len(values))[:count]]
        return values.astype(np.float32)
    areas = _areas(shape.points, shape.faces)
    chosen = shape.faces[rng.choice(len(areas), count, p=areas / areas.sum())]
    # Osada et al. 2002 ("Shape distributions", section 3.1).
    along, across = np.sqrt(rng.random(count)), rng.random(count)
    weights = np.stack([1 - along, along * (1 - across), along * across], axis=1)
    return np.einsum("nc,ncv->nv", weights, values[chosen]).astype(np.float32)


def check(source: Source) -> str:
    """Reads a file completely, and returns what was converted; '' for nothing.

    Raises:
      ShapeError: as `read` does.
    """
    return read(source).conversion


def read(source: Source) -> Shape:
    """Returns the shape of a file, by what it holds and not by its name.

    Points that are not finite are left out, with their faces; of a mesh without a surface its
    points are taken.

    Args:
      source: a file, or what it holds.

    Raises:
      ShapeError: it cannot be read, is too large, or holds too few points.
    """
    name = "" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else content_of(source)
        if not content.strip():
            raise ShapeError("empty")
        of_mesh, parts = _parts(content)
        return _whole(of_mesh, *parts)
    except ShapeError as error:
        raise ShapeError(error.what, name) from error
    except OSError as error:
        raise ShapeError(f"unreadable: {error.strerror}", name) from error
    except MissingExtra:
        raise
    except Exception as error:  # whatever their parsers meet
        raise ShapeError(f"no shape that can be read: {error}", name) from error


Parts = tuple[Any, Any, Any]  # points, faces and colours, which may be None


def _parts(content: bytes) -> tuple[bool, Parts]:
    """Returns whether a file should hold a mesh, and what it holds."""
    if content.startswith(b"PK\x03\x04"):
        return False, _npz(content)
    if content.startswith(b"\x93NUMPY"):
        values = read_array(io.BytesIO(content), _check_array)
        return False, (values[..., :3], None, values[..., 3:6] if values.shape[-1] >= 6 else None)
    if content.startswith(b"ply"):
        return False, _ply(content)
    if content.startswith(b"glTF"):
        _check_glb(content)
        return True, _mesh(content, "glb")
    lines = [line for line in content.splitlines() if line.strip() and not line.startswith(b"#")]
    if lines and b"OFF" in lines[0][:4]:
        return True, _off(content)
    if not any(line.startswith((b"v ", b"v\t")) for line in lines):
        raise ShapeError("no shape that can be read")
    _limit(len(lines))
    return True, _mesh(content, "obj")


def _whole(of_mesh: bool, points: Any, faces: Any, colours: Any) -> Shape:
    """Returns a shape without what cannot be used.

    Raises:
      ShapeError: too little is left.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ShapeError(f"points of the shape {list(points.shape)}, not [points, 3]")
    _limit(len(points))
    faces = np.zeros((0, 3), int) if faces is None else np.asarray(faces, int).reshape(-1, 3)
    _limit(len(faces))
    if len(faces) and not 0 <= faces.min() <= faces.max() < len(points):
        raise ShapeError("faces of points that are not there")
    if colours is None:
        colours = np.full(points.shape, 0.5)
    elif np.shape(colours) != points.shape:
        raise ShapeError(f"{len(points)} points, but colours of {list(np.shape(colours))}")
    else:
        colours = np.asarray(colours)
        whole = np.issubdtype(colours.dtype, np.integer) or np.nanmax(colours, initial=0) > 1
        largest = 65535.0 if colours.dtype == np.uint16 else 255.0
        colours = colours.astype(np.float64) / (largest if whole else 1.0)
    said = []
    good = np.isfinite(np.concatenate([points, colours], axis=1)).all(1)
    good &= (np.abs(points) < 1e18).all(1)  # squares of more are not finite in float32
    if not good.all():
        said.append("points that are not finite left out")
        faces = (np.cumsum(good) - 1)[faces[good[faces].all(1)]]
        points, colours = points[good], colours[good]
    if of_mesh and not len(faces):
        said.append("no faces: its points are taken")
    elif len(faces) and not _areas(points, faces).sum() > 0:
        said.append("faces without area: its points are taken")
        faces = faces[:0]
    if not len(faces) and len(points) < LEAST:
        raise ShapeError(f"{len(points)} points, and {LEAST} are the fewest")
    return Shape(points, faces, colours, ", ".join(said))


def _areas(points: np.ndarray, faces: np.ndarray) -> Float[np.ndarray, " faces"]:
    one, two, three = (points[faces[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(two - one, three - one), axis=1)


def _limit(count: int) -> None:
    if count > MOST:
        raise ShapeError(f"{count:,} points or faces, and {MOST:,} are the most: thin it out")


def _check_array(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in "fiu" or len(shape) != 2:
        raise ShapeError(f"an array of {dtype} of the shape {list(shape)}, not numbers [points, 3]")
    _limit(shape[0] * shape[1] // 3)


def _npz(content: bytes) -> Parts:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        there = {name.removesuffix(".npy"): name for name in archive.namelist()}

        def array(names: Sequence[str]) -> np.ndarray | None:
            name = next((there[each] for each in names if each in there), "")
            if not name:
                return None
            with archive.open(name) as file:
                return read_array(file, _check_array)

        points = array(NAMES["points"])
        if points is None:
            raise ShapeError(f"an npz of {', '.join(there) or 'nothing'}, without points")
        colours = points[:, 3:6] if points.shape[1] >= 6 else None
        named = array(NAMES["colours"])
        return points[:, :3], array(("faces",)), colours if named is None else named


def _table(lines: Sequence[str], count: int, width: int, what: str) -> Float[np.ndarray, "n m"]:
    """Returns the numbers of `count` lines, of which the first `width` are read."""
    _limit(count)
    if len(lines) < count:
        raise ShapeError(f"cut short: {len(lines)} of {count} {what} are there")
    rows = [line.split()[:width] for line in lines[:count]]
    return np.array(rows, np.float64).reshape(count, -1)


def _triangles(lines: Sequence[str], count: int) -> Int[np.ndarray, "faces 3"]:
    """Returns the faces of lines `corners, numbers...`; polygons become fans."""
    if len(lines) < count:
        raise ShapeError(f"cut short: {len(lines)} of {count} faces are there")
    found = []
    for line in lines[:count]:
        corners, *numbers = line.split()
        ring = [int(each) for each in numbers[: int(corners)]]
        if len(ring) < int(corners):
            raise ShapeError("cut short: a face lacks corners")
        found += [(ring[0], *pair) for pair in zip(ring[1:-1], ring[2:], strict=True)]
    return np.array(found, int).reshape(-1, 3)


def _off(content: bytes) -> Parts:
    """Reads OFF; some of ModelNet's files have the counts in the first line, behind the word."""
    text = (line.partition("#")[0].strip() for line in content.decode("latin-1").splitlines())
    lines = [line for line in text if line]
    word, _, rest = lines[0].partition("OFF")
    lines = [rest, *lines[1:]] if rest.strip() else lines[1:]
    points, faces = (int(each) for each in lines[0].split()[:2])
    _limit(max(points, faces))
    where = 3 * ("N" in word)  # normals stand before colours
    table = _table(lines[1:], points, 6 + where, "points")
    coloured = "C" in word and table.shape[1] == 6 + where
    colours = table[:, 3 + where :] if coloured else None
    return table[:, :3], _triangles(lines[1 + points :], faces), colours


def _ply(content: bytes) -> Parts:
    head, _, body = content.partition(b"end_header")
    elements: list[tuple[str, int, list[str]]] = []
    kind = ""
    for line in head.decode("latin-1").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            kind = words[1]
        elif words[:1] == ["element"]:
            elements.append((words[1], int(words[2]), []))
            _limit(int(words[2]))
        elif words[:1] == ["property"]:
            elements[-1][2].append(words[-1])
    if kind != "ascii":
        return _mesh(content, "ply")
    lines = [line for line in body.decode("latin-1").splitlines() if line.strip()]
    found: dict[str, Any] = {}
    for name, count, properties in elements:
        if name == "vertex":
            table = _table(lines, count, len(properties), "points")
            found |= dict(zip(properties, table.T, strict=True))
        elif name == "face":
            found["faces"] = _triangles(lines, count)
        lines = lines[count:]
    colours = None
    if all(each in found for each in ("red", "green", "blue")):
        colours = np.stack([found[each] for each in ("red", "green", "blue")], axis=1)
    return np.stack([found[each] for each in "xyz"], axis=1), found.get("faces"), colours


def _check_glb(content: bytes) -> None:
    """Refuses what would become far larger than it is: accessors of zeros, nodes used twice."""
    length, kind = struct.unpack("<I4s", content[12:20])
    if kind != b"JSON" or len(content) < 20 + length:
        raise ShapeError("cut short")
    scene: Mapping[str, Any] = json.loads(content[20 : 20 + length])
    _limit(sum(int(each["count"]) for each in scene.get("accessors", ())) // 4)
    below = [child for node in scene.get("nodes", ()) for child in node.get("children", ())]
    if len(below) != len(set(below)):
        raise ShapeError("a node with two parents")


def _mesh(content: bytes, kind: str) -> Parts:
    """Reads what trimesh reads, all its meshes at their places; images beside it are left alone.

    Raises:
      ShapeError: it cannot be read.
      MissingExtra: as `_library` does.
    """
    trimesh = _library()
    try:
        scene = trimesh.load_scene(
            io.BytesIO(content), file_type=kind, skip_materials=True, process=False
        )
        placed = [scene.geometry[scene.graph[node][1]] for node in scene.graph.nodes_geometry]
        _limit(sum(len(each.vertices) for each in placed))
        found = [each for each in scene.dump() if hasattr(each, "vertices")]
    except ShapeError:
        raise
    except Exception as error:  # whatever its parsers meet
        raise ShapeError(f"no shape that can be read: {error}") from error
    if not found:
        raise ShapeError("no points")
    faces, start = [], 0
    for each in found:
        faces.append(np.asarray(getattr(each, "faces", np.zeros((0, 3), int))) + start)
        start += len(each.vertices)
    points = np.concatenate([np.asarray(each.vertices) for each in found])
    return points, np.concatenate(faces), np.concatenate([_colours(each) for each in found])


def _colours(part: Any) -> Float[np.ndarray, "points 3"]:
    visual = getattr(part, "visual", None)
    colours = visual.vertex_colors if visual is not None and visual.kind == "vertex" else None
    colours = getattr(part, "colors", None) if visual is None else colours
    if colours is None or len(colours) != len(part.vertices):
        return np.full((len(part.vertices), 3), 0.5)
    return np.asarray(colours)[:, :3] / 255.0


def _library() -> Any:
    """Returns trimesh, which is imported where meshes are met that NumPy alone does not read.

    Raises:
      MissingExtra: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module("trimesh")
    except ImportError as error:
        raise MissingExtra(
            "obj, glb and binary ply need trimesh, of the extra 'points': "
            "pip install 'unified_mm[points]'"
        ) from error
