"""Treatments: changes of gradients before the optimizer, with a state that goes from step to step.

Gradient modulation between modalities, a teacher that follows the parameters, biases of a router:
each is a class from outside the package, named in `train.treatment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from unified_mm.registry import resolve


@runtime_checkable
class Treatment(Protocol):
    """A change of the gradient before the optimizer, with a state of its own.

    The state lies in `TrainState.treatment`: it is saved, restored and divided over devices as the
    optimizer's state is, and a step that is not finite leaves it as it was.
    """

    @classmethod
    def from_config(cls, train: Mapping[str, Any]) -> Treatment:
        """Returns the treatment that `config.train` asks for, with fields of its own there."""

    def init(self, params: Any) -> Any:
        """Returns the state before the first step, a tree of arrays."""

    def __call__(
        self, kept: Any, gradient: Any, params: Any, metrics: Mapping[str, Any], step: Any
    ) -> tuple[Any, Any]:
        """Returns the state after a step, and the gradient that the optimizer gets.

        Args:
          kept: the state after the step before.
          gradient: by the trained parameters, None where they are frozen.
          params: all of them, before the step.
          metrics: losses and metrics of the batch, (sum, count) by name.
          step: int32 [], how many steps were done before.
        """


def treatment_of(train: Any) -> Treatment | None:
    """Returns the treatment of `config.train`, None without any.

    Raises:
      ValueError: there is none of that name, or it is no treatment.
    """
    if not train.treatment:
        return None
    found = resolve("treatment", train.treatment, {}).from_config(train)
    if not isinstance(found, Treatment):
        raise ValueError(f"train.treatment={train.treatment!r} has no `init` or cannot be called")
    return found
