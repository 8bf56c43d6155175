"""Checks of what only the device can show: the fused kernel, donation, and offloaded products."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.accelerator.scale import Setting, config_of
from experiments.accelerator.schedule import Row, Rows
from experiments.accelerator.trainer import Trainer
from unified_mm.benchmarks.timing import fused_attention
from unified_mm.nn.attention.attention import attend, plan_attention
from unified_mm.nn.attention.rules import RULES, MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, TokenMetadata

EXAMPLES = 4
HEADS = ((8, 8, 64), (8, 2, 128))  # of queries, of keys, and their width
# How much further from the reference than plain attention in bfloat16 a kernel may be.
FURTHER = 2.0
LEAST = 2e-3  # of the largest number, below which a difference is rounding of any order


def checks(setting: Setting) -> Rows:
    """Returns a row for each attention rule, and for donation and offloading."""
    rules = {f"rule {rule}": partial(parity, rule, setting.scale.lengths) for rule in RULES}
    return {**rules, "donation": partial(donation, setting), "offload": partial(offload, setting)}


def parity(rule: str, lengths: tuple[int, int]) -> Row:
    """Compares the fused kernel and plain attention, in bfloat16, with a float32 reference.

    Values and gradients are compared; `further` is how much further the kernel is than plain
    attention, at worst.

    Raises:
      ValueError: the kernel is too far from the reference, or refuses the rule.
    """
    fused = fused_attention()
    found: Row = {"backend": fused}
    worst = 0.0
    kinds = (("xla", jnp.float32), ("xla", jnp.bfloat16), (fused, jnp.bfloat16))

    @jax.jit  # one program: to compile takes longer than all else
    def all_kinds(drawn: Any, metadata: TokenMetadata) -> Any:
        return [[attended(rule, *kind, each, metadata) for kind in kinds] for each in drawn]

    metadata = metadata_of(rule, lengths)
    groupings = jax.device_get(all_kinds([drawn(*each, lengths) for each in HEADS], metadata))
    for (heads, key_heads, width), (reference, *others) in zip(HEADS, groupings, strict=True):
        plain, kernel = (distance(other, reference) for other in others)
        found[f"{heads}/{key_heads} heads of {width}"] = {"plain": plain, "fused": kernel}
        further = [k / max(p, LEAST) for k, p in zip(kernel, plain, strict=True)]
        worst = float(np.max([worst, *further]))  # NaN, where any is
    if not worst < FURTHER:
        raise ValueError(f"rule {rule}: {fused} is {worst} times as far as plain: {found}")
    return {**found, "further": round(worst, 3)}


def drawn(heads: int, key_heads: int, width: int, lengths: tuple[int, int]) -> list[Any]:
    """Returns queries, keys, values and what is backpropagated, as bfloat16 holds them."""
    rng = np.random.default_rng(0)
    shapes = [(EXAMPLES, sum(lengths), count, width) for count in (heads, key_heads, key_heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (*shapes, shapes[0])]


def metadata_of(rule: str, lengths: tuple[int, int]) -> TokenMetadata:
    """Returns pictures and padded texts; for interleaved rules in an order that is data."""
    image, text = lengths
    places = np.arange(image + text)
    position = np.tile(places, (EXAMPLES, 1))
    segment = np.zeros_like(position)
    ends = np.arange(EXAMPLES)[:, None] * (text // (2 * EXAMPLES))
    valid = places < image + text - ends
    start: int | None = 0
    if rule.startswith("interleaved"):  # half of the text comes before the picture
        first = np.where(places < image, places + text // 2, places - image)
        late = places >= image + text // 2
        position = np.tile(np.where(late, places, first), (EXAMPLES, 1))
        segment = np.tile(((places < image) | late).astype(int), (EXAMPLES, 1))
        start = None
    return TokenMetadata(
        position=jnp.asarray(position, jnp.int32),
        segment=jnp.asarray(segment, jnp.int32),
        document=jnp.zeros(position.shape, jnp.int32),
        valid=jnp.asarray(valid),
        groups=(
            Group("image", "image", image, start),
            Group("text", "text", text, None if start is None else image),
        ),
    )


def attended(
    rule: str, backend: str, dtype: Any, arrays: list[Any], metadata: TokenMetadata
) -> list[Array]:
    """Returns what queries see under a rule, and the gradients by queries, keys and values.

    What pads is zero. In float32 products are those of float32, on tensor cores too.
    """
    query, key, value, pull = (each.astype(dtype) for each in arrays)
    _, _, heads, width = query.shape
    options = TransformerOptions(
        heads * width, 1, heads, 8,
        key_value_heads=key.shape[2], attention=backend, dtype=jnp.dtype(dtype),
    )  # fmt: skip
    plan = plan_attention(options, MaskTable((View("text", rule),)), metadata, metadata)
    own = metadata.valid[:, :, None, None]

    def seen(*inputs: Any) -> Any:
        return Attending(plan).apply({}, *inputs)

    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        found, back = jax.vjp(seen, query, key, value)
        results = found, *back(jnp.where(own, pull, 0))
    return [jnp.where(own, each.astype(jnp.float32), 0) for each in results]


class Attending(nn.Module):
    """Attention of queries to keys and values, as layers do it under a plan."""

    plan: Any

    @nn.compact
    def __call__(self, query: Array, key: Array, value: Array) -> Any:
        return attend(self, query, key, value, self.plan)


def distance(found: list[np.ndarray], reference: list[np.ndarray]) -> list[float]:
    """Returns how far arrays are at most, each relative to the reference's largest number."""
    return [
        round(float(np.abs(one - other).max() / np.abs(other).max()), 6)
        for one, other in zip(found, reference, strict=True)
    ]


def donation(setting: Setting) -> Row:
    """Checks that a step writes its state where the old one was.

    Raises:
      ValueError: it does not.
    """
    changes = {**setting.scale.base, "train.batch_size": setting.scale.ladder_batch}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*donated buffers.*")
        trainer = Trainer(config_of("base", changes, dtype="bfloat16"))
        trainer.begin()
        before = jax.tree.leaves(trainer.state)
        trainer.loss()
    kept = [leaf.shape for leaf in before if not leaf.is_deleted()]
    aliased = trainer.compiled.memory_analysis().alias_size_in_bytes
    if kept or aliased < trainer.of_state:
        raise ValueError(f"{kept} outlive the step; {aliased:,} of {trainer.of_state:,} bytes")
    return {"aliased_bytes": aliased, "state_bytes": trainer.of_state, "leaves": len(before)}


def offload(setting: Setting) -> Row:
    """Compares training that keeps products in the host's memory with training that keeps all.

    Raises:
      ValueError: losses differ, or the step holds no less of the device's memory.
    """
    changes = {**setting.scale.base, "train.batch_size": setting.scale.ladder_batch}
    found = {}
    for remat in ("none", "offload"):
        trainer = Trainer(config_of("base", changes, dtype="float32", remat=remat), batches=1)
        trainer.begin()
        losses = [trainer.loss() for _ in range(3)]
        found[remat] = {
            "held_bytes": trainer.held,
            "losses": losses,
            "host_bytes": trainer.compiled.memory_analysis().host_temp_size_in_bytes,
            "step_seconds": round(trainer.seconds(setting.scale.steps), 5),
        }
    kept, moved = found["none"], found["offload"]
    if not np.allclose(kept["losses"], moved["losses"], rtol=1e-3):
        raise ValueError(f"losses differ: {found}")
    if moved["held_bytes"] >= kept["held_bytes"]:
        raise ValueError(f"nothing is gained: {found}")
    return found
