"""Learning rates over the steps of a run: a warm-up, then one of a few shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

FALLING = 0.2  # share of the steps that `constant_then_linear` falls in


def learning_rate_schedule(options: Any, steps: int) -> optax.Schedule:
    """Linear warm-up to `train.learning_rate`, then by `train.schedule` to `final_rate` of it.

    Args:
      options: `config.train`.
      steps: of the whole run.

    Raises:
      ValueError: an unknown schedule.
    """
    if options.schedule not in SCHEDULES:
        raise ValueError(
            f"train.schedule={options.schedule!r}: must be one of {', '.join(SCHEDULES)}"
        )
    warmup = min(int(options.warmup_steps), max(steps - 1, 0))
    shape = SCHEDULES[options.schedule](options, max(steps, warmup + 1) - warmup)
    if not warmup:
        return shape
    rising = optax.linear_schedule(0.0, options.learning_rate, warmup)
    return optax.join_schedules([rising, shape], [warmup])


def cosine(options: Any, steps: int) -> optax.Schedule:
    """Half a cosine (Loshchilov & Hutter 2017, SGDR, equation 5)."""
    return optax.cosine_decay_schedule(options.learning_rate, steps, options.final_rate)


def linear(options: Any, steps: int) -> optax.Schedule:
    """A line."""
    end = options.learning_rate * options.final_rate
    return optax.linear_schedule(options.learning_rate, end, steps)


def constant(options: Any, steps: int) -> optax.Schedule:
    """No fall at all, as schedule-free training wants it."""
    return optax.constant_schedule(options.learning_rate)


def constant_then_linear(options: Any, steps: int) -> optax.Schedule:
    """Constant, and over the last fifth a line (Haegele et al. 2024, section 3)."""
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
