"""Checks of what only the device can show: the fused kernel, donation, and offloaded products."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.accelerator.scale import Setting, config_of
from experiments.accelerator.schedule import Row, Rows
from experiments.accelerator.trainer import Trainer
from unified_mm.benchmarks.timing import fused_attention
from unified_mm.nn.attention.attention import plan_attention
from unified_mm.nn.attention.rules import RULES, MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import Group, TokenMetadata

EXAMPLES = 4
HEADS = ((8, 8, 64), (8, 2, 128))  # of queries, of keys, and their width
# As far from the reference as plain attention in bfloat16 is, and half as far again.
FURTHER = 1.5
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
    for heads, key_heads, width in HEADS:
        arrays = drawn(heads, key_heads, width, lengths)
        reference = computed(rule, "xla", jnp.float32, arrays, lengths)
        plain = distance(computed(rule, "xla", jnp.bfloat16, arrays, lengths), reference)
        kernel = distance(computed(rule, fused, jnp.bfloat16, arrays, lengths), reference)
        found[f"{heads}/{key_heads} heads of {width}"] = {"plain": plain, "fused": kernel}
        further = [k / max(p, LEAST) for k, p in zip(kernel, plain, strict=True)]
        worst = max(worst, *further)
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


def computed(
    rule: str, backend: str, dtype: Any, arrays: list[Any], lengths: tuple[int, int]
) -> list[np.ndarray]:
    """Returns what queries see of a rule, and the gradients by queries, keys and values."""
    query, key, value, pull = (each.astype(dtype) for each in arrays)
    _, _, heads, width = query.shape
    options = TransformerOptions(
        heads * width, 1, heads, 8,
        key_value_heads=key.shape[2], attention=backend, dtype=jnp.dtype(dtype),
    )  # fmt: skip
    table = MaskTable((View("text", rule),))

    @jax.jit
    def both(inputs: Any, pull: Any, metadata: TokenMetadata) -> Any:
        plan = plan_attention(options, table, metadata, metadata)

        def seen(query: Any, key: Any, value: Any) -> Any:
            return attended(plan, query, key, value)

        found, back = jax.vjp(seen, *inputs)
        return found, *back(pull)

    metadata = metadata_of(rule, lengths)
    pull = pull * metadata.valid[:, :, None, None].astype(pull.dtype)  # what pads is not asked
    found = jax.device_get(both((query, key, value), pull, metadata))
    own = np.asarray(metadata.valid)[:, :, None, None]
    return [np.where(own, np.float32(each), 0) for each in found]


def attended(plan: Any, query: Any, key: Any, value: Any) -> Any:
    """Returns attention of all block calls, as layers put it together."""
    from unified_mm.nn.attention.masks import slice_keys

    seen = jnp.zeros_like(query)
    for call, by in zip(plan.calls, plan.masks, strict=True):
        rows = query[:, slice(*call.queries)]
        part = by.attend(rows, slice_keys(key, call), slice_keys(value, call), by)
        if by.has_keys is not None:
            part = jnp.where(by.has_keys[:, :, None, None], part, 0)
        seen = seen.at[:, slice(*call.queries)].set(part)
    return seen


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
