"""Tables from another project's tensors to our parameters, and the conversion by such a table.

"Theirs" are the tensors of the other project, "ours" the parameters of our model. A table says
which parameter each tensor becomes, and how its layout changes. The same table serves both
directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from einops import EinopsError, rearrange

Array = np.ndarray
Arrays = tuple[Array, ...]


@dataclass(frozen=True)
class Transform:
    """A conversion of the arrays that an `Entry` names.

    Attributes:
      to_ours: maps their tensors to our parameters, both in the order of the entry.
      to_theirs: maps our parameters back to their tensors; None where that is not possible.
    """

    to_ours: Callable[..., Arrays]
    to_theirs: Callable[..., Arrays] | None


@dataclass(frozen=True)
class Entry:
    """One entry of a table: some of their tensors, and our parameters that they become.

    Attributes:
      theirs: names of their tensors; `{layer}` stands for a number.
      ours: paths of our parameters; `{block}` and `{layer}` stand for numbers.
      transform: conversion between the two, for one layer.
      layers: number of layers that the entry is repeated for; 0 for an entry outside the layers.
      blocks: blocks in a period, the part of our stack that is repeated, where our layers are
        stacked: layer l is block `l % blocks` of period `l // blocks`; 0 where each layer has
        parameters of its own.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform
    layers: int = 0
    blocks: int = 0

    def lines(self) -> Iterator[tuple[list[str], list[str], int | None]]:
        """Yields for each layer their names, our paths and its period, None if not stacked."""
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
    """The table of a whole model.

    Attributes:
      entries: the entries of the table.
      ignored: pattern of their names -> the reason why these tensors are ignored.
      copies: name of a tensor of theirs -> the tensor that it must equal, if it is there at all.
      starts: path of a parameter that they do not have -> the number that it starts from.
    """

    entries: Sequence[Entry]
    ignored: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    starts: Mapping[str, float] = field(default_factory=dict)


def repeated(
    entries: Sequence[Entry], theirs: str, ours: str, layers: int, blocks: int = 1
) -> list[Entry]:
    """Returns the entries of one layer, repeated under the prefixes of all layers."""
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
    """Converts their tensors to our parameters.

    Args:
      table: table of the model.
      names: names of all their tensors.
      read: returns the tensor of a name.
      places: shape of each of our parameters, by path.
      where: where the tensors are from, for error messages.

    Returns:
      Our parameters in float32 by path, and the names of the tensors left out by reason.

    Raises:
      ValueError: if a tensor has no parameter, a parameter has no tensor, or shapes do not fit.
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
    """Converts our parameters to their tensors.

    Raises:
      ValueError: if a parameter is missing, or cannot be written as a tensor of theirs.
    """
    found: dict[str, Array] = {}
    used: set[str] = set(table.starts)
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
    except (ValueError, EinopsError):  # of a reshape that cannot be
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
            reason: str | None = f"the same as {other}"
        else:
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


# Transforms. Their kernels are (out, in) as torch keeps them; ours are [in, out].


def rearranged(theirs: str, ours: str, **sizes: int) -> Transform:
    """Returns the transform between two layouts of one array, written as einops takes them."""
    return Transform(
        lambda x: (rearrange(x, f"{theirs} -> {ours}", **sizes),),
        lambda x: (rearrange(x, f"{ours} -> {theirs}", **sizes),),
    )


def packed(theirs: str, ours: str, **sizes: int) -> Transform:
    """Returns the transform of one tensor into several parameters, the first axis of `ours`."""
    return Transform(
        lambda x: tuple(rearrange(x, f"{theirs} -> {ours}", **sizes)),
        lambda *parts: (rearrange(np.stack(parts), f"{ours} -> {theirs}", **sizes),),
    )


SAME = Transform(lambda x: (x,), lambda x: (x,))
TRANSPOSED = rearranged("outputs inputs", "inputs outputs")
SCALAR = rearranged("1", "")


def transposed_first(transform: Transform) -> Transform:
    """Returns the transform of a kernel that is (in, out) there already."""
    back = transform.to_theirs
    assert back is not None
    return Transform(
        lambda x: transform.to_ours(x.T), lambda *parts: tuple(x.T for x in back(*parts))
    )


def first_and_grid(side: int, theirs: str) -> Transform:
    """Returns the transform of positions, `theirs` of tokens and D, into [D], [side, side, D].

    The positions are those of the class token and of the patches, row by row.
    """

    def apart(x: Array) -> Arrays:
        first, *rest = rearrange(x, f"{theirs} -> tokens d")
        return first, np.reshape(rest, (side, side, -1))

    def together(first: Array, rest: Array) -> Arrays:
        rows = np.concatenate([first[None], rest.reshape(-1, len(first))])
        return (rearrange(rows, f"tokens d -> {theirs}"),)

    return Transform(apart, together)


def padded_rows(total: int, *, multiple: int) -> Transform:
    """Returns the transform of embeddings (rows, D) into one table padded with rows of zeros.

    Their tables, of `total` rows together, are put one below the other; ours has as many rows as
    the next multiple of `multiple`. The way back gives one table without padding.
    """

    def join(*tables: Array) -> Arrays:
        whole = np.concatenate(tables)
        if len(whole) != total:
            raise ValueError(f"{len(whole)} rows are not {total}")
        return (np.pad(whole, ((0, -total % multiple), (0, 0))),)

    return Transform(join, lambda table: (table[:total],))


def row(number: int) -> Transform:
    """Returns the transform that takes one row of a table; there is no way back."""
    return Transform(lambda table: (table[number],), None)
