"""Optimizers (AdamW and others) with clipping, and rules for rates, decay and freezing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from unified_mm.config import build_options
from unified_mm.default_config import TrainOptions
from unified_mm.parallel.sharding import path_of
from unified_mm.registry import resolve
from unified_mm.training.muon import AxisNames, scale_by_muon_or
from unified_mm.training.schedule_free import ScheduleFree
from unified_mm.training.update import Optimizer, select


def _floats_as(tree: Any, dtype: str) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def rounded_at_random(x: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
    """Rounds float32 to one of the two neighbours in bfloat16, such that the mean is the value."""
    # bfloat16 is the upper half of float32: what is drawn for the lower half carries into it as
    # often as that half is large.
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + drawn
    upper = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), upper, x).astype(jnp.bfloat16)


def _floats_at_random(tree: Any, step: Any) -> Any:
    """Returns the tree in bfloat16; what is drawn is a function of step and leaf alone."""
    key = jax.random.fold_in(jax.random.key(0), step)
    leaves, structure = jax.tree.flatten(tree)
    rounded = (
        rounded_at_random(leaf, jax.random.fold_in(key, number))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for number, leaf in enumerate(leaves)
    )
    return jax.tree.unflatten(structure, rounded)


def kept_as(
    transform: optax.GradientTransformation, dtype: str, rounding: str = "nearest"
) -> optax.GradientTransformation:
    """Returns Adam's scaling with its state stored as `dtype` between steps, used in float32."""
    if dtype == "float32":
        return transform

    def init(params: Any) -> Any:
        return _floats_as(transform.init(params), dtype)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = transform.update(gradient, _floats_as(state, "float32"), params)
        if rounding == "stochastic":
            return updates, _floats_at_random(new, new.count)
        return updates, _floats_as(new, dtype)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    options: Any, steps: int, params: Any, start: int = 0, names: AxisNames | None = None
) -> Optimizer:
    """Returns the optimizer of a config; AdamW by default (Loshchilov & Hutter 2019).

    The gradient's norm is clipped (Pascanu et al. 2013) over what is trained alone.

    Args:
      options: `config.train`.
      steps: steps that its schedule spans.
      params: the parameters, or their shapes.
      start: the step at which it begins.
      names: the logical axis names of each parameter, by its path; Muon needs them.

    Raises:
      ValueError: an option outside its range, an unknown optimizer, options that it has not, a rule
        that covers nothing, a parameter that no rule covers, or nothing to train.
    """
    build_options(TrainOptions, options, "train")
    rates, decays, frozen = (
        match_rules(f"train.{name}", options[name], params)
        for name in ("learning_rate_rules", "weight_decay_rules", "freeze_rules")
    )
    trained = jax.tree.map(lambda freeze: not freeze, frozen)
    if not any(jax.tree.leaves(trained)):
        raise ValueError("train.freeze_rules leave nothing to train")
    if options.ema_warmup and not options.ema_decay:
        raise ValueError("train.ema_warmup=True needs train.ema_decay above 0")
    kind, scale = scaling(options, select(params, trained), names or {})
    transform = optax.chain(
        *adaptive_clip(options.adaptive_clip),
        optax.clip_by_global_norm(options.clip_norm),
        kept_as(scale, options.moments_dtype, options.moments_rounding),
    )
    return kind(
        transform=transform,
        schedule=learning_rate_schedule(options, steps),
        trained=trained,
        rates=select(jax.tree.map(float, rates), trained),
        decays=select(jax.tree.map(lambda d: options.weight_decay * d, decays), trained),
        start=start,
    )


def adaptive_clip(share: float) -> list[optax.GradientTransformation]:
    """Returns the clipping of a stem's gradients, unit by unit; nothing where the share is 0."""

    def of_stems(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "/stem/" in path_of(path), params)

    return [optax.masked(optax.adaptive_grad_clip(share), of_stems)] if share else []


def scaling(
    options: Any, params: Any, names: AxisNames
) -> tuple[Callable[..., Optimizer], optax.GradientTransformation]:
    """Returns what `train.optimizer` names: its class, and its scaling of gradients.

    Rate and decay come after the scaling.

    Args:
      options: `config.train`.
      params: what is trained.
      names: as in `make_optimizer`.

    Raises:
      ValueError: an unknown optimizer, or options that do not go with it.
    """
    name = options.optimizer
    made = resolve("train.optimizer", name, OPTIMIZERS)(options, params)
    if name != "adamw" and options.moments_dtype != "float32":
        raise ValueError(
            f"train.moments_dtype={options.moments_dtype!r} is for train.optimizer='adamw'"
        )
    if options.moments_rounding != "nearest" and options.moments_dtype == "float32":
        raise ValueError(
            f"train.moments_rounding={options.moments_rounding!r} is for "
            "train.moments_dtype='bfloat16': in float32 nothing is rounded"
        )
    if isinstance(made, ByAxes):
        made = made.make(names)
    return (made.kind, made.transform) if isinstance(made, Averaging) else (Optimizer, made)


class ByAxes(NamedTuple):
    """An optimizer that asks what the parameters' axes are: logical axis names -> its scaling."""

    make: Callable[[AxisNames], optax.GradientTransformation]


class Averaging(NamedTuple):
    """An optimizer that has an average of its own: its transformation and its class."""

    transform: optax.GradientTransformation
    kind: Callable[..., Optimizer]


def adamw(options: Any, params: Any) -> optax.GradientTransformation:
    """Returns Adam's scaling (Kingma & Ba 2015); decay is applied beside it."""
    return optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.epsilon)


def muon(options: Any, params: Any) -> ByAxes:
    """Returns Muon's scaling for matrices within layers, Adam's for all else."""
    return ByAxes(partial(scale_by_muon_or, adamw(options, params), params))


def schedule_free(options: Any, params: Any) -> Averaging:
    """Returns Adam without its first moment, whose place schedule-free averaging takes.

    Raises:
      ValueError: options that do not go with it.
    """
    if options.ema_decay:
        raise ValueError(
            "train.optimizer='schedule_free' keeps an average of its own: set train.ema_decay to 0"
        )
    if not options.b1:
        raise ValueError("train.optimizer='schedule_free' needs train.b1 above 0")
    plain = optax.scale_by_adam(b1=0.0, b2=options.b2, eps=options.epsilon)
    return Averaging(plain, partial(ScheduleFree, b1=options.b1))


# By name: (`config.train`, what is trained) -> what gradients become before rate and decay.
OPTIMIZERS: dict[str, Callable[[Any, Any], Any]] = {
    "adamw": adamw,
    "muon": muon,
    "schedule_free": schedule_free,
}


Rules = Sequence[Sequence[Any]]  # pairs of pattern and value


def match_rules(field: str, rules: Rules, tree: Any) -> Any:
    """Returns for each leaf the value of the first rule whose pattern matches its whole path.

    Args:
      field: the config field that the rules come from, for messages.
      rules: (regular expression, value).
      tree: the parameters.

    Raises:
      ValueError: a parameter that no rule covers, or a rule but the last that covers none.
    """
    used = set()

    def one(key_path: Any, leaf: Any) -> Any:
        path = path_of(key_path)
        for pattern, value in rules:
            if re.fullmatch(pattern, path):
                used.add(pattern)
                return value
        raise ValueError(f"{field}: no rule covers parameter {path!r}; end with ('.*', value)")

    values = jax.tree_util.tree_map_with_path(one, tree)
    for pattern, _ in rules[:-1]:
        if pattern not in used:
            raise ValueError(f"{field}: no parameter is left for the rule {pattern!r}")
    return values


FALLING = 0.2  # share of the steps that `constant_then_linear` falls in


def learning_rate_schedule(options: Any, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: a linear warm-up, then `train.schedule`.

    Args:
      options: `config.train`.
      steps: steps that the schedule spans, the warm-up included.

    Raises:
      ValueError: an unknown schedule.
    """
    schedule = resolve("train.schedule", options.schedule, SCHEDULES)
    warmup = min(int(options.warmup_steps), max(steps - 1, 0))
    shape: optax.Schedule = schedule(options, max(steps, warmup + 1) - warmup)
    if not warmup:
        return shape
    rising = optax.linear_schedule(0.0, options.learning_rate, warmup)
    return optax.join_schedules([rising, shape], [warmup])


def cosine(options: Any, steps: int) -> optax.Schedule:
    """Returns half a cosine (Loshchilov & Hutter 2017, SGDR, equation 5)."""
    return optax.cosine_decay_schedule(options.learning_rate, steps, options.final_rate)


def linear(options: Any, steps: int) -> optax.Schedule:
    """Returns a linear decay."""
    end = options.learning_rate * options.final_rate
    return optax.linear_schedule(options.learning_rate, end, steps)


def constant(options: Any, steps: int) -> optax.Schedule:
    """Returns a constant rate, as schedule-free training wants it."""
    return optax.constant_schedule(options.learning_rate)


def constant_then_linear(options: Any, steps: int) -> optax.Schedule:
    """Returns a constant rate with a linear decay over the last fifth.

    Haegele et al. 2024, section 3.
    """
    falling = max(1, round(FALLING * steps))
    return optax.join_schedules(
        [constant(options, steps), linear(options, falling)], [steps - falling]
    )


SCHEDULES: dict[str, Callable[[Any, int], optax.Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "constant_then_linear": constant_then_linear,
}
