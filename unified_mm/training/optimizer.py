"""AdamW with warm-up, cosine, clipping, and rules for rates, decay and freezing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unified_mm.training.rules import match_rules


@dataclass(frozen=True)
class Optimizer:
    """Turns gradients into new parameters; what is frozen has no state and keeps its bits.

    Attributes:
      transform: of the trained parameters' gradients, before decay and rate.
      schedule: the learning rate by step since `start`.
      trained: for each parameter, whether it is.
      rates, decays: factors of the learning rate and of the weights' decay, None where frozen.
      start: the step at which the schedule begins.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    trained: Any
    rates: Any
    decays: Any
    start: int = 0

    def init(self, params: Any) -> Any:
        """The first state."""
        return self.transform.init(self.part(params))

    def part(self, params: Any) -> Any:
        """The trained parameters, with None for the others (which jax takes as no leaf)."""
        return select(params, self.trained)

    def whole(self, part: Any, params: Any) -> Any:
        """All parameters: those of `part`, and of `params` what is frozen."""
        return jax.tree.map(
            lambda new, old: old if new is None else new, part, params, is_leaf=lambda x: x is None
        )

    def rate(self, step: Any) -> Any:
        """The learning rate of a step."""
        return self.schedule(step - self.start)

    def update(self, gradient: Any, state: Any, params: Any, step: Any) -> tuple[Any, Any]:
        """The parameters and the state after a step.

        Args:
          gradient: of the trained part.
          state: as `init` or the step before gave it.
          params: all of them.
          step: how many steps were done before.
        """
        part = self.part(params)
        updates, state = self.transform.update(gradient, state, part)
        size = self.rate(step)
        new = jax.tree.map(
            lambda p, u, rate, decay: p - size * rate * (u + decay * p),
            part,
            updates,
            self.rates,
            self.decays,
        )
        return self.whole(new, params), state


MOMENTS = ("float32", "bfloat16")
# Field of `config.train` -> what it must be, as a test and in words.
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda x: 0 < x < math.inf, "above 0 and finite"),
    "warmup_steps": (lambda x: x >= 0, "at least 0"),
    "final_rate": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "b1": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "b2": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "epsilon": (lambda x: 0 < x < math.inf, "above 0"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "at least 0"),
    "clip_norm": (lambda x: x > 0, "above 0"),
    "scale_patience": (lambda x: x >= 1, "at least 1"),
    "average_decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
}


def check_numbers(options: Any) -> None:
    """Numbers of `config.train` that make sense.

    Raises:
      ValueError: naming the field.
    """
    for name, (fits, words) in NUMBERS.items():
        if not fits(options[name]):
            raise ValueError(f"train.{name}={options[name]}: must be {words}")


def _floats_as(tree: Any, dtype: str) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def select(tree: Any, chosen: Any) -> Any:
    """The same tree with None for what is not chosen."""
    return jax.tree.map(lambda leaf, take: leaf if take else None, tree, chosen)


def kept_as(transform: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """The same transform, its state kept as `dtype` between steps and worked on in float32.

    Raises:
      ValueError: another dtype than float32 or bfloat16.
    """
    if dtype not in MOMENTS:
        raise ValueError(f"train.moments_dtype={dtype!r}: must be one of {', '.join(MOMENTS)}")
    if dtype == "float32":
        return transform

    def init(params: Any) -> Any:
        return _floats_as(transform.init(params), dtype)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = transform.update(gradient, _floats_as(state, "float32"), params)
        return updates, _floats_as(new, dtype)

    return optax.GradientTransformation(init, update)


def learning_rate_schedule(options: Any, steps: int) -> optax.Schedule:
    """Linear warm-up to `train.learning_rate`, then a cosine to `final_rate` of it.

    Args:
      options: `config.train`.
      steps: of the whole run.
    """
    warmup = min(int(options.warmup_steps), max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else options.learning_rate,
        peak_value=options.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=options.learning_rate * options.final_rate,
    )


def make_optimizer(options: Any, steps: int, params: Any, start: int = 0) -> Optimizer:
    """AdamW by a config (Loshchilov & Hutter 2019), for parameters of these paths.

    The gradient's norm is clipped (Pascanu et al. 2013) over what is trained alone.

    Args:
      options: `config.train`.
      steps: that its schedule spans.
      params: the tree, or its shapes.
      start: the step at which it begins.

    Raises:
      ValueError: a rule that covers nothing, a parameter that no rule covers, or nothing to train.
    """
    check_numbers(options)
    rates = match_rules("train.learning_rate_rules", options.learning_rate_rules, params)
    decays = match_rules("train.weight_decay_rules", options.weight_decay_rules, params)
    frozen = match_rules("train.freeze_rules", options.freeze_rules, params)
    trained = jax.tree.map(lambda freeze: not freeze, frozen)
    if not any(jax.tree.leaves(trained)):
        raise ValueError("train.freeze_rules leave nothing to train")
    adam = optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.epsilon)
    transform = optax.chain(
        optax.clip_by_global_norm(options.clip_norm), kept_as(adam, options.moments_dtype)
    )
    return Optimizer(
        transform=transform,
        schedule=learning_rate_schedule(options, steps),
        trained=trained,
        rates=select(jax.tree.map(float, rates), trained),
        decays=select(jax.tree.map(lambda d: options.weight_decay * d, decays), trained),
        start=start,
    )
