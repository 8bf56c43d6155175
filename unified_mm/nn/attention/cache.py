"""The cache of keys and values of earlier tokens, as one explicit value; optionally in 8 bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from unified_mm.nn.tokens import Group, TokenMetadata, lengthen, single_document, with_places

# Each [B, G, K, A]: an array, or the same in 8 bits. The heads come first, so that the products of
# attention take the slots as they lie; else every written token would copy the whole cache.
LayerKV = tuple[Any, Any]


@struct.dataclass
class Int8:
    """Vectors in 8 bits: `values * scale`, with one scale for each token and head.

    The quantization is symmetric, so that zero stays zero; the largest error is half a step,
    `scale / 2` (Dettmers et al. 2022, "LLM.int8()", equation 1, by rows).

    Attributes:
      values: int8 [..., A].
      scale: float32 [..., 1].
    """

    values: Any
    scale: Any


def as_int8(x: Float[Array, "... A"]) -> Int8:
    """Quantizes vectors to 8 bits."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1, keepdims=True) / 127
    return Int8(jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


def write_slots(slots: Any, new: Float[Array, "B N G A"], at: Int[Array, ""]) -> Any:
    """Writes new vectors into slots [B, G, K, A] from slot `at` on, in the type of the slots."""
    new = jnp.swapaxes(new, 1, 2)
    given = as_int8(new) if isinstance(slots, Int8) else new
    return jax.tree.map(
        lambda old, more: jax.lax.dynamic_update_slice_in_dim(old, more, at, axis=2), slots, given
    )


def read_slots(slots: Any, dtype: Any) -> Float[Array, "B K G A"]:
    """Returns the contents of slots in the layout of attention; 8 bits become `dtype`."""
    if isinstance(slots, Int8):
        slots = (slots.values.astype(jnp.float32) * slots.scale).astype(dtype)
    return jnp.swapaxes(slots, 1, 2)


def take_rows(layers: Any, rows: Int[Array, " rows"]) -> Any:
    """Returns the examples `rows` of cached arrays, each [*periods, B, G, K, A]."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), layers)


def put_rows(layers: Any, rows: Int[Array, " rows"], others: Any) -> Any:
    """Returns cached arrays with the examples `rows` replaced by those of `others`."""
    return jax.tree.map(lambda x, y: x.at[..., rows, :, :, :].set(y), layers, others)


@struct.dataclass
class Cache:
    """The keys and values of earlier tokens, for every layer; a plain value, never mutated.

    Attributes:
      layers: by name of the layer within a period, its keys and values, each
        [periods, B, G, K, A]; or a tuple by period, each [B, G, K, A].
      metadata: of the K slots; an empty slot is not valid.
      length: int32 [], the number of slots written, where new tokens go.
      memory: what gated cross-attention attends to (`nn.attention.cross_attention.Memory`), or
        None.
    """

    layers: Any
    metadata: TokenMetadata
    length: Any
    memory: Any = None

    @property
    def slots(self) -> int:
        """The number of slots, K."""
        return int(self.metadata.valid.shape[1])

    def reserve(self, group: Group) -> Cache:
        """Returns the cache with empty slots for `group.length` more tokens.

        They are part of the last group where that has the name of `group`.
        """
        batch = self.metadata.valid.shape[0]
        empty = single_document(jnp.zeros((batch, group.length), bool), group)
        room = ((0, group.length), (0, 0))
        return self.replace(  # type: ignore[attr-defined]
            layers=jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 2) + room), self.layers),
            metadata=lengthen(self.metadata, empty),
        )

    def select(self, rows: Int[Array, " rows"]) -> Cache:
        """Returns the examples `rows` of the batch, for mined negatives or for beams."""
        return self.replace(  # type: ignore[attr-defined]
            layers=take_rows(self.layers, rows),
            metadata=jax.tree.map(lambda x: x[rows], self.metadata),
            memory=self.memory and self.memory.select(rows),
        )

    def put(self, rows: Int[Array, " rows"], other: Cache) -> Cache:
        """Returns the cache with the examples `rows` replaced by those of `other`."""
        return self.replace(  # type: ignore[attr-defined]
            layers=put_rows(self.layers, rows, other.layers),
            metadata=jax.tree.map(lambda x, y: x.at[rows].set(y), self.metadata, other.metadata),
            memory=self.memory and self.memory.put(rows, other.memory),
        )

    def in_int8(self) -> Cache:
        """Returns the cache in 8 bits, in which later tokens are written too."""
        small = self.replace(layers=jax.tree.map(as_int8, self.layers))  # type: ignore[attr-defined]
        if self.memory is None:
            return small
        layers = jax.tree.map(as_int8, self.memory.layers)
        return small.replace(memory=self.memory.replace(layers=layers))

    def write_metadata(self, new: TokenMetadata) -> TokenMetadata:
        """Returns the slots' metadata after tokens `new` [B, N] are written at `length`."""

        def put(slots: Array, values: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, values, self.length, axis=1)

        kept, written = with_places([self.metadata, new])
        same_groups = written.replace(groups=kept.groups)  # type: ignore[attr-defined]
        return jax.tree.map(put, kept, same_groups)
