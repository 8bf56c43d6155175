"""Parts of models and of training as a user would write them: nothing in the package is edited."""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from unified_mm.nn import Dense, block_mask, sow_auxiliary
from unified_mm.objectives import ObjectiveOutput, PairLoss, masked_metric


class Summing(nn.Module):
    """A feed-forward that leaves the mean of what it puts out, over the tokens that are there."""

    options: Any
    widen: int = 2
    slope: float = 0.1

    @nn.compact
    def __call__(self, x, plan):
        up = Dense((self.widen * x.shape[-1],), ("embed",), ("feed_forward",), name="up")(x)
        down = Dense(x.shape[-1:], ("feed_forward",), ("embed",), scale=0.1, name="down")
        y = down(jnp.where(up > 0, up, self.slope * up))
        there = plan.valid[..., None].astype(jnp.float32)
        total = (y.astype(jnp.float32) * there).sum((1, 2))
        sow_auxiliary(self, "mean", total / jnp.maximum(there.sum((1, 2)) * x.shape[-1], 1.0))
        return y


class Doubled(nn.Module):
    """A block without attention: two maps, and no keys and values."""

    options: Any
    deterministic: bool
    factor: float = 0.5
    unused: tuple = ()

    @nn.compact
    def __call__(self, x, plan, cached):
        o = self.options
        y = Dense(x.shape[-1:], ("embed",), ("embed_out",), dtype=o.dtype, name="map")(x)
        rows = x.shape[0]
        nothing = jnp.zeros((rows, o.num_kv_heads, plan.keep[1], o.head_dim), o.dtype)
        return x + self.factor * y, (nothing, nothing)


@dataclass(frozen=True)
class Calm:
    """An auxiliary loss: the squares of what `Summing` left, with noise, less as steps go by."""

    name: str
    weight: float
    noise: float

    kind: ClassVar[str] = ""
    auxiliary: ClassVar[bool] = True
    rngs: ClassVar[tuple[str, ...]] = ("noise",)

    @classmethod
    def from_config(cls, name, options):
        return cls(name, float(options["weight"]), float(options["noise"]))

    def needs(self):
        return ()

    def views(self):
        return ()

    def reads(self, contexts):
        return ()

    def head(self):
        return None

    def __call__(self, model, encoded, batch, context, *, deterministic):
        left = [x for path, x in context.auxiliary.items() if path.endswith("/mean")]
        squares = jnp.square(jnp.concatenate(left)).mean(0)
        drawn = jax.random.normal(model.make_rng("noise"), squares.shape)
        values = squares + self.noise * drawn / (1.0 + jnp.asarray(context.step, jnp.float32))
        there = jnp.ones(values.shape, bool)
        return ObjectiveOutput(masked_metric(values, there), {}, {})


def sign(options, params):
    """An optimizer that goes by the gradient's sign."""
    return optax.scale_by_sign()


def falling(options, steps):
    """A learning rate that falls by a half each step."""
    return lambda step: options.learning_rate * 0.5**step


def largest(x, valid):
    """A pool: the largest value of each feature."""
    return jnp.where(valid[..., None], x, -1e9).max(1)


def half(step, steps):
    """A weight that stays at a half."""
    return 0.5 + 0.0 * step


@dataclass(frozen=True)
class Counting:
    """A treatment that counts its steps, follows the parameters, and halves every gradient."""

    pace: float

    @classmethod
    def from_config(cls, train):
        return cls(train.pace)

    def init(self, params):
        return {"steps": jnp.zeros((), jnp.int32), "slow": jax.tree.map(jnp.copy, params)}

    def __call__(self, kept, gradient, params, metrics, step):
        slow = optax.incremental_update(params, kept["slow"], self.pace)
        halved = jax.tree.map(lambda g: 0.5 * g, gradient)
        return {"steps": kept["steps"] + 1, "slow": slow}, halved


class Written:
    """An attention backend: softmax written out, for any rule without score terms."""

    @staticmethod
    def refusal(options, call, queries, keys, platform):
        return "adds nothing to scores" if call.has_terms else ""

    @staticmethod
    def attend(query, key, value, seen_by):
        mask = block_mask(seen_by.call, seen_by.queries, seen_by.keys)
        shared = query.shape[2] // key.shape[2]
        key, value = jnp.repeat(key, shared, axis=2), jnp.repeat(value, shared, axis=2)
        scores = jnp.einsum("bqha,bkha->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e9), axis=-1)
        weights = jnp.where(mask[:, None], weights, 0.0)
        return jnp.einsum("bhqk,bkha->bqha", weights, value)


def hinge(seen, logits, paired, block):
    """What each row lacks of a margin of 1 to every other column that counts, added up."""
    own = jnp.arange(logits.shape[0])[:, None] == block.number[None, :]
    counts = paired[:, None] & block.paired[None, :] & ~own
    return seen + jnp.where(counts, jax.nn.relu(1.0 + logits), 0.0).sum(1), jnp.zeros_like(
        block.own
    )


MARGIN = PairLoss(0.0, hinge, lambda rows, own, columns: rows - own, 1.0)
