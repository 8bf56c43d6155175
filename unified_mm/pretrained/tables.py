"""Tables from another project's tensors to our parameters, and the driver that walks them.

A table says for each tensor of theirs which parameter of ours it is and how the numbers are laid
out there. The same table goes both ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

Array = np.ndarray
Arrays = tuple[Array, ...]


@dataclass(frozen=True)
class Transform:
    """How their arrays become ours and back: as many in as `Entry` names, as many out."""

    to_ours: Callable[..., Arrays]
    to_theirs: Callable[..., Arrays] | None


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
      theirs: names of their tensors; `{layer}` stands for a number.
      ours: paths of our parameters, of one layer; `{block}` and `{layer}` stand for numbers.
      transform: between the two.
      layers: how many layers the line is repeated for; 0 is once.
      blocks: of a period, where our layers are stacked: layer l is block `l % blocks` of period
        `l // blocks`; 0 where each layer has parameters of its own.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform
    layers: int = 0
    blocks: int = 0

    def lines(self) -> Iterator[tuple[list[str], list[str], int | None]]:
        """For each layer: their names, our paths, and the period it is of."""
        if not self.layers:
            yield list(self.theirs), list(self.ours), None
        for layer in range(self.layers):
            block = layer % self.blocks if self.blocks else layer
            yield (
                [name.format(layer=layer) for name in self.theirs],
                [path.format(layer=layer, block=block) for path in self.ours],
                layer // self.blocks if self.blocks else None,
            )


@dataclass(frozen=True)
class Table:
    """All lines of a model.

    Attributes:
      entries: the lines.
      ignored: pattern of their names -> why these have no place.
      copies: a name of theirs -> the one that it must equal, where it is there at all.
      starts: path of ours -> the number that it starts from, as theirs has no such thing.
    """

    entries: Sequence[Entry]
    ignored: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    starts: Mapping[str, float] = field(default_factory=dict)


def repeated(
    entries: Sequence[Entry], theirs: str, ours: str, layers: int, blocks: int = 1
) -> list[Entry]:
    """Lines of one layer under the prefixes of each layer."""
    return [
        replace(
            entry,
            theirs=tuple(f"{theirs}.{name}" for name in entry.theirs),
            ours=tuple(f"{ours}/{path}" for path in entry.ours),
            layers=layers,
            blocks=blocks,
        )
        for entry in entries
    ]


def to_ours(
    table: Table,
    names: frozenset[str],
    read: Callable[[str], Array],
    places: Mapping[str, tuple[int, ...]],
    where: str,
) -> tuple[dict[str, Array], dict[str, tuple[str, ...]]]:
    """Their tensors at our places.

    Args:
      table: of their model.
      names: of all tensors that there are.
      read: one of them.
      places: the shape of each of our parameters, by path.
      where: the tensors are from, for messages.

    Returns:
      Parameters float32 by path, and the names passed over by reason.

    Raises:
      ValueError: a tensor without a place, a place without a tensor, or one that does not fit.
    """
    found: dict[str, Array] = {}
    used: set[str] = set()
    for entry in table.entries:
        for theirs, ours, period in entry.lines():
            _refuse_missing(theirs, ours, names, places, where)
            arrays = [read(name) for name in theirs]
            shapes = [places[path] if period is None else places[path][1:] for path in ours]
            made = _fitted(entry.transform, arrays, theirs, ours, shapes, where)
            for path, array in zip(ours, made, strict=True):
                if period is None:
                    found[path] = np.asarray(array, np.float32, order="C")
                else:
                    found.setdefault(path, np.empty(places[path], np.float32))[period] = array
            used.update(theirs)
    found |= {path: np.full(places[path], x, np.float32) for path, x in table.starts.items()}
    without = sorted(set(places) - set(found))
    if without:
        raise ValueError(f"{where}: no tensor for our {_some(without)}")
    return found, _passed_over(table, names - used, read, where)


def to_theirs(table: Table, ours: Mapping[str, Array]) -> dict[str, Array]:
    """Our parameters as their tensors.

    Raises:
      ValueError: a parameter that has no place among theirs.
    """
    found: dict[str, Array] = {}
    used: set[str] = set()
    for entry in table.entries:
        for theirs, paths, period in entry.lines():
            missing = [path for path in paths if path not in ours]
            if missing:
                raise ValueError(f"the run has no parameter {_some(missing)}")
            if entry.transform.to_theirs is None:
                raise ValueError(f"{_some(paths)} cannot be written back")
            arrays = [ours[path] if period is None else ours[path][period] for path in paths]
            made = entry.transform.to_theirs(*arrays)
            found |= {
                name: np.asarray(array, order="C") for name, array in zip(theirs, made, strict=True)
            }
            used.update(paths)
    without = sorted(set(ours) - used)
    if without:
        raise ValueError(f"the run's {_some(without)}: has no place in that family's weights")
    return found


def _refuse_missing(
    theirs: Sequence[str],
    ours: Sequence[str],
    names: frozenset[str],
    places: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    missing = [name for name in theirs if name not in names]
    if missing:
        raise ValueError(f"{where}: has no {_some(missing)}, for our {_some(ours)}")
    unknown = [path for path in ours if path not in places]
    if unknown:
        raise ValueError(f"{where}: {_some(theirs)} has no place in our model ({_some(unknown)})")


def _fitted(
    transform: Transform,
    arrays: Sequence[Array],
    theirs: Sequence[str],
    ours: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    where: str,
) -> Arrays:
    try:
        made = transform.to_ours(*arrays)
        fits = [array.shape for array in made] == list(shapes)
    except ValueError:  # NumPy's, of a reshape that cannot be
        fits = False
    if not fits:
        there = ", ".join(
            f"{name} {list(array.shape)}" for name, array in zip(theirs, arrays, strict=True)
        )
        here = ", ".join(f"{path} {list(shape)}" for path, shape in zip(ours, shapes, strict=True))
        raise ValueError(f"{where}: {there} does not fit our {here}, which config.json asks for")
    return made


def _passed_over(
    table: Table, left: frozenset[str], read: Callable[[str], Array], where: str
) -> dict[str, tuple[str, ...]]:
    reasons: dict[str, list[str]] = {}
    unplaced = []
    for name in sorted(left):
        if name in table.copies:
            other = table.copies[name]
            if not np.array_equal(read(name), read(other)):
                raise ValueError(
                    f"{where}: {name} differs from {other}, though config.json ties them"
                )
            reasons.setdefault(f"the same as {other}", []).append(name)
            continue
        reason = next((r for p, r in table.ignored.items() if re.fullmatch(p, name)), None)
        if reason is None:
            unplaced.append(name)
        else:
            reasons.setdefault(reason, []).append(name)
    if unplaced:
        raise ValueError(f"{where}: no place in our model for {_some(unplaced)}")
    return {reason: tuple(some) for reason, some in reasons.items()}


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# Transforms. Their dense maps are (out, in) as torch keeps them; ours are [in, out].


def reshaped(theirs: Sequence[int], ours: Sequence[int]) -> Transform:
    """The same numbers in the same order."""
    return Transform(lambda x: (_exactly(x, theirs).reshape(ours),), lambda x: (x.reshape(theirs),))


def _exactly(x: Array, shape: Sequence[int]) -> Array:
    if x.shape != tuple(shape):
        raise ValueError(f"shape {x.shape} is not {tuple(shape)}")
    return x


SAME = Transform(lambda x: (x,), lambda x: (x,))
TRANSPOSED = Transform(lambda x: (x.T,), lambda x: (x.T,))
SCALAR = reshaped((1,), ())


def into_heads(heads: int, width: int) -> Transform:
    """(H A, D) -> [D, H, A]."""
    return Transform(
        lambda x: (x.T.reshape(-1, heads, width),),
        lambda x: (x.reshape(-1, heads * width).T,),
    )


def out_of_heads(heads: int, width: int) -> Transform:
    """(D, H A) -> [H, A, D]."""
    return Transform(
        lambda x: (x.T.reshape(heads, width, -1),),
        lambda x: (x.reshape(heads * width, -1).T,),
    )


def packed(parts: int, axis: int, each: Transform) -> Transform:
    """Several arrays side by side on an axis of theirs, each transformed by itself."""

    def apart(x: Array) -> Arrays:
        return tuple(each.to_ours(part)[0] for part in np.split(x, parts, axis))

    def together(*arrays: Array) -> Arrays:
        assert each.to_theirs is not None
        return (np.concatenate([each.to_theirs(x)[0] for x in arrays], axis),)

    return Transform(apart, together)


def patches(size: int, channels: int = 3) -> Transform:
    """A convolution (D, C, p, p) -> [p p C, D], as our patches are cut: rows, columns, channels."""
    return Transform(
        lambda x: (x.transpose(2, 3, 1, 0).reshape(size * size * channels, -1),),
        lambda x: (x.reshape(size, size, channels, -1).transpose(3, 2, 0, 1),),
    )


def grid(side: int) -> Transform:
    """Positions (N, D) of patches, row by row -> [side, side, D]."""
    return Transform(
        lambda x: (x.reshape(side, side, x.shape[-1]),), lambda x: (x.reshape(-1, x.shape[-1]),)
    )


def first_and_grid(side: int, leading: tuple[int, ...] = ()) -> Transform:
    """Positions (*leading, 1 + N, D) of the class token and the patches -> [D], [side, side, D]."""

    def apart(x: Array) -> Arrays:
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        return rows[0], rows[1:].reshape(side, side, width)

    def together(first: Array, rest: Array) -> Arrays:
        rows = np.concatenate([first[None], rest.reshape(-1, len(first))])
        return (rows.reshape(*leading, *rows.shape),)

    return Transform(apart, together)


def padded_rows(total: int, *, multiple: int) -> Transform:
    """Tables of `total` rows (rows, D) one below the other, then zeros up to a multiple of rows.

    Back it goes as one table.
    """

    def join(*tables: Array) -> Arrays:
        whole = np.concatenate(tables)
        room = np.zeros((-total % multiple, whole.shape[1]), np.float32)
        return (np.concatenate([_exactly(whole, (total, whole.shape[1])), room]),)

    return Transform(join, lambda table: (table[:total],))


def row(number: int) -> Transform:
    """One row of a table, whose others are left behind."""

    def pick(table: Array) -> Arrays:
        return (table[number],)

    return Transform(pick, None)
