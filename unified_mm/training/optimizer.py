"""AdamW with warm-up, cosine, clipping, and rules for rates, decay and freezing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from unified_mm.training.rules import match_rules

FROZEN = "frozen"


class Optimizer(NamedTuple):
    """What turns gradients into updates, and the learning rate by step, for the record."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


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


def make_optimizer(options: Any, steps: int, params: Any) -> Optimizer:
    """The optimizer of a config, for parameters of these paths (Loshchilov & Hutter 2019).

    Frozen parameters get neither updates nor optimizer state; the gradient's norm is clipped over
    the others alone.

    Args:
      options: `config.train`.
      steps: of the whole run.
      params: the tree, or its shapes.

    Raises:
      ValueError: a rule that covers nothing, or a parameter that no rule covers.
    """
    rates = match_rules("train.learning_rate_rules", options.learning_rate_rules, params)
    decays = match_rules("train.weight_decay_rules", options.weight_decay_rules, params)
    frozen = match_rules("train.freeze_rules", options.freeze_rules, params)
    schedule = learning_rate_schedule(options, steps)

    labels = jax.tree.map(
        # 1 and 1.0 are one label.
        lambda rate, decay, freeze: FROZEN if freeze else (float(rate), float(decay)),
        rates,
        decays,
        frozen,
    )
    kinds = {label for label in jax.tree.leaves(labels, is_leaf=_is_label) if label != FROZEN}

    def adamw(rate: float, decay: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.epsilon),
            optax.add_decayed_weights(options.weight_decay * decay),
            optax.scale_by_learning_rate(lambda count: rate * schedule(count)),
        )

    transforms = {str(kind): adamw(*kind) for kind in kinds} | {FROZEN: optax.set_to_zero()}
    names = jax.tree.map(str, labels, is_leaf=_is_label)
    transform = optax.chain(
        clip_trained(options.clip_norm, frozen), optax.partition(transforms, names)
    )
    return Optimizer(transform, schedule)


def clip_trained(norm: float, frozen: Any) -> optax.GradientTransformation:
    """Clip the gradient of what is trained to a global norm (Pascanu et al. 2013)."""
    trained = jax.tree.map(lambda freeze: not freeze, frozen)
    return optax.masked(optax.clip_by_global_norm(norm), trained)


def _is_label(node: Any) -> bool:
    return isinstance(node, (str, tuple))
