"""Points: groups of neighbours in a cloud become tokens (Yu et al. 2022, Point-BERT, 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from unified_mm.config import build_options, option
from unified_mm.data import shapes
from unified_mm.data.records import Record
from unified_mm.nn.layers import Dense, partitioned
from unified_mm.nn.tokens import Group, Tokens, blank, single_document

MEASURED = 500  # shapes that the unit is taken from, spread over the data


@dataclass(frozen=True)
class PointsModality:
    """Clouds of points, and meshes, from whose surface points are drawn.

    Training draws other points of a shape each time, evaluation always the same. A cloud of fewer
    points is read as it is.

    Attributes:
      name: its key under `config.model.modalities`.
      points: of a shape, the most.
      groups: tokens of a shape.
      group: points of a token: a centre and its nearest.
      colours: whether colours are read beside places.
      hidden: width of the map that reads the points of a group; after its first maximum twice that.
      unit: the length, in units of the data, by which sizes are told; 0 takes the mean distance of
        points from the centre of their cloud in the training data, and the run keeps it.
      positions: 'centre', a learned map of where a group is and how large the whole, or 'none'.
      modality_embedding: whether a learned embedding of the modality is added.
      up: the axis about which training turns shapes.
      turn: the most degrees by which it does.
      stretch: the most by which it makes them larger or smaller: 1.25 is to 0.8 or 1.25 times.
      mirror: whether it mirrors them in the first of the two other axes, where no text of the
        record names a side.
    """

    suffixes: ClassVar[frozenset[str]] = shapes.SUFFIXES
    from_data: ClassVar[tuple[str, ...]] = ("unit",)

    name: str
    points: int = option(1024, least=shapes.LEAST, most=100_000)
    groups: int = option(64, least=1)
    group: int = option(32, least=1)
    colours: bool = False
    hidden: int = option(128, least=1)
    unit: float = option(0.0, least=0)
    positions: str = option("centre", choices=("centre", "none"))
    modality_embedding: bool = True
    up: str = option("z", choices=("x", "y", "z"))
    turn: float = option(0.0, least=0, most=180)
    stretch: float = option(1.0, least=1)
    mirror: bool = False

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any], resources: Any) -> PointsModality:
        where = f"model.modalities.{name}"
        built: PointsModality = build_options(cls, options, where, name=name)
        if max(built.groups, built.group) > built.points:
            raise ValueError(
                f"{where}.points={built.points} cannot make {where}.groups={built.groups} of "
                f"{where}.group={built.group}: neither may be more"
            )
        return built

    def prepare(self, record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if self.name not in record.parts:
            return self.absent()
        return self.arrays(shapes.read(record.parts[self.name]), rng, record.mirrorable)

    def read(self, content: bytes) -> dict[str, np.ndarray]:
        return self.arrays(shapes.read(content), None)

    def arrays(
        self, shape: shapes.Shape, rng: np.random.Generator | None, mirrorable: bool = True
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a shape; `rng` draws its points and how it is moved."""
        found = shapes.sample(shape, self.points, rng or np.random.default_rng(0))
        if rng is not None:
            found[:, :3] @= self._movement(rng, mirrorable).astype(np.float32)
        values = self.absent()["points"]
        values[: len(found)] = found[:, : values.shape[1]]
        length = np.array(len(found), np.int32)
        return {"points": values, "length": length, "present": np.array(True)}

    def _movement(self, rng: np.random.Generator, mirrorable: bool) -> Float[np.ndarray, "3 3"]:
        """Returns the matrix of a drawn turn, mirroring and size."""
        up = "xyz".index(self.up)
        one, other = (axis for axis in range(3) if axis != up)
        angle = np.deg2rad(rng.uniform(-self.turn, self.turn))
        moved = np.eye(3)
        moved[one, one] = moved[other, other] = np.cos(angle)
        moved[one, other], moved[other, one] = np.sin(angle), -np.sin(angle)
        if self.mirror and rng.random() < 0.5 and mirrorable:
            moved[one] *= -1
        return moved * self.stretch ** rng.uniform(-1, 1)

    def absent(self) -> dict[str, np.ndarray]:
        return {
            "points": np.zeros((self.points, 6 if self.colours else 3), np.float32),
            "length": np.array(0, np.int32),
            "present": np.array(False),
        }

    def measure(self, records: Sequence[Record]) -> dict[str, Any]:
        """Returns the mean distance of points from the centres of `MEASURED` clouds.

        Raises:
          ValueError: no record has one, or all their points lie at one place.
        """
        there = [record for record in records if self.name in record.parts]
        if not there:
            raise ValueError(
                f"model.modalities.{self.name}: no example has it, so that its unit cannot be "
                "taken from the data"
            )
        places = np.linspace(0, len(there) - 1, min(len(there), MEASURED), dtype=int)
        distances = []
        for place in places:
            arrays = self.prepare(there[place], None)
            points = arrays["points"][: int(arrays["length"]), :3].astype(np.float64)
            distances.append(np.linalg.norm(points - points.mean(0), axis=1).mean())
        if not np.mean(distances) > 0:
            raise ValueError(f"model.modalities.{self.name}: all shapes are single places")
        return {"unit": float(np.float32(np.mean(distances)))}

    def embedder(self, width: int, dtype: Any) -> nn.Module:
        if not self.unit:
            raise ValueError(
                f"model.modalities.{self.name}.unit=0: the command takes it from the training "
                "data; elsewhere, give it"
            )
        return PointsEmbedder(self, width, dtype)


def in_order(
    points: Float[Array, "B points coordinates"], there: Bool[Array, "B points"]
) -> Float[Array, "B points coordinates"]:
    """Returns points by their first coordinate, then by the next; those that are not there last."""
    keys = [jnp.where(there, points[..., i], jnp.inf) for i in range(points.shape[-1])]
    order = jnp.lexsort(tuple(jax.lax.stop_gradient(keys[::-1])), axis=-1)
    return jnp.take_along_axis(points, order[..., None], axis=1)


def centres_and_nearest(
    places: Float[Array, "B points 3"], there: Bool[Array, "B points"], groups: int, group: int
) -> tuple[Int[Array, "B N"], Int[Array, "B N group"], Bool[Array, "B N group"]]:
    """Returns the numbers of farthest points, and of the points nearest to each.

    The first is the farthest from the mean; each further one is the farthest from those before (Qi
    et al. 2017, PointNet++, section 3.2). Of equally far ones the first is taken, as of equally
    near.

    Args:
      places: in an order of their own, as `in_order` gives.
      there: which of them are; the first ones.
      groups: how many are taken, N.
      group: how many are near, the centre itself among them.

    Returns:
      The numbers of centres, those of their neighbours, and which neighbours are there.
    """

    def distance(place: Float[Array, "B 3"]) -> Float[Array, "B points"]:
        return jnp.square(places - place[:, None]).sum(-1)

    def farthest(distances: Float[Array, "B points"]) -> Int[Array, " B"]:
        return jnp.where(there, distances, -1.0).argmax(-1)

    def next_centre(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Any]:
        nearest, centre = state
        found = jnp.take_along_axis(places, centre[:, None, None], axis=1)[:, 0]
        distances = jnp.where(there, distance(found), jnp.inf)
        nearest = jnp.minimum(nearest, distances)
        return (nearest, farthest(nearest)), (centre, distances)

    def next_near(distances: Float[Array, "N B points"], _: None) -> tuple[Array, Any]:
        least, last = distances.min(-1, keepdims=True), distances.shape[-1] - 1
        numbers = jnp.arange(last + 1)
        near = jnp.where(distances == least, numbers, last).min(-1, keepdims=True)
        left = jnp.where(numbers == near, jnp.inf, distances)
        return left, (near[..., 0], least[..., 0] < jnp.inf)

    first = farthest(distance(_mean(places, there)))
    start = jnp.full(there.shape, jnp.inf), first
    _, (centre, distances) = jax.lax.scan(next_centre, start, length=groups)
    # Not `top_k`, for which each device of a CPU would take the rows of all, nor a sort, which is
    # almost five times as slow there.
    _, (near, real) = jax.lax.scan(next_near, distances, length=group)
    return jnp.moveaxis(centre, 0, 1), near.transpose(2, 1, 0), real.transpose(2, 1, 0)


def _mean(values: Float[Array, "B points 3"], there: Bool[Array, "B points"]) -> Any:
    count = jnp.maximum(there.sum(1), 1).astype(values.dtype)
    return blank(values, there).sum(1) / count[:, None]


def _largest(x: Float[Array, "B N group D"], real: Bool[Array, "B N group"]) -> Any:
    """Returns the maximum over the real points of each group, 0 of none."""
    found = jnp.where(real[..., None], x, jnp.finfo(x.dtype).min).max(2)
    return blank(found, real.any(2))


class PointsEmbedder(nn.Module):
    """Groups of points through a mini PointNet, plus where they are, and how large the whole.

    Places are told twice: within the cloud, whose own size is one, and as the three sizes of the
    whole in units of the data. The order of the points changes nothing.
    """

    points: PointsModality
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, Array]) -> Tokens:
        """Embeds `points`, float32 [B, points, 3 or 6], `length` and `present` [B]."""
        p = self.points
        length = jnp.where(batch["present"], batch["length"], 0)
        there = jnp.arange(batch["points"].shape[1])[None] < length[:, None]
        points = in_order(blank(batch["points"].astype(jnp.float32), there), there)
        places = points[..., :3]
        frozen = jax.lax.stop_gradient(places)
        centre, near, real = centres_and_nearest(frozen, there, p.groups, p.group)
        valid = jnp.arange(p.groups)[None] < length[:, None]
        real &= valid[..., None]
        centres = jnp.take_along_axis(places, centre[..., None], axis=1)
        members = jnp.take_along_axis(points, near.reshape(len(near), -1, 1), axis=1)
        members = members.reshape(*near.shape, -1)

        middle = _mean(places, there)[:, None]
        squares = blank(jnp.square(places - middle).sum(-1), there).max(1)
        size = jnp.sqrt(jnp.maximum(squares, (1e-6 * p.unit) ** 2))[:, None, None]
        local = (members[..., :3] - centres[:, :, None]) / size[..., None]
        # As far as so many of all points reach on a surface.
        local = local / (p.group / p.points) ** 0.5
        x = blank(jnp.concatenate([local, 2 * members[..., 3:] - 1], axis=-1), real)
        x = self._pointnet(x.astype(self.dtype), real)
        if p.positions != "none":
            high = jnp.where(there[..., None], places, -jnp.inf).max(1, keepdims=True)
            low = jnp.where(there[..., None], places, jnp.inf).min(1, keepdims=True)
            sizes = blank(high - low, length > 0) / p.unit
            where = [(centres - middle) / size, jnp.log(jnp.maximum(sizes, 1e-3))]
            where = [jnp.broadcast_to(each, centres.shape) for each in where]
            found = nn.gelu(self._dense("place_hidden", jnp.concatenate(where, -1), p.hidden))
            x = x + self._dense("place", found, self.width, "embed")
        if p.modality_embedding:
            vector = partitioned(nn.initializers.normal(0.02), "embed"), (self.width,)
            x = x + self.param("modality", *vector).astype(self.dtype)
        group = Group(p.name, p.name, p.groups, valid_first=True)
        placed = single_document(
            valid, group, jnp.zeros(p.groups, jnp.float32), blank(centres, valid)
        )
        return Tokens(blank(x, valid), placed)

    def _pointnet(
        self, x: Float[Array, "B N group values"], real: Bool[Array, "B N group"]
    ) -> Float[Array, "B N D"]:
        """Returns a vector a group by the maximum of its points (Qi et al. 2017, PointNet)."""
        hidden = self.points.hidden
        x = self._dense("second", nn.gelu(self._dense("first", x, hidden)), 2 * hidden)
        # A map of both side by side, of which the whole's part is taken once a group.
        whole = self._dense("third_whole", _largest(x, real), 4 * hidden)
        x = nn.gelu(self._dense("third", x, 4 * hidden) + whole[:, :, None])
        return _largest(self._dense("tokens", x, self.width, "embed"), real)

    def _dense(self, name: str, x: Array, width: int, axis: str | None = None) -> Array:
        found: Array = Dense((width,), (None,), (axis,), dtype=self.dtype, name=name)(x)
        return found
