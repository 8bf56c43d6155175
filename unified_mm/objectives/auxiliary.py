"""What objectives have in common that read only what layers leave for them (`nn.sow`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn

from unified_mm.config import check_options, option, read_options
from unified_mm.nn.attention.rules import View


@dataclass(frozen=True)
class Auxiliary:
    """An objective without a pass, a head or data of its own.

    Attributes:
      name: its key under `config.objectives`.
      weight: of its loss in the total.
    """

    name: str
    weight: float = option(0.0, least=0)

    kind: ClassVar[str] = ""
    auxiliary: ClassVar[bool] = True

    @classmethod
    def from_config(cls, name: str, options: Mapping[str, Any]) -> Any:
        """Returns the objective of `config.objectives.<name>`: its fields are its options.

        Raises:
          ValueError: an option is none of its fields, or its value is not allowed.
        """
        own = {key: options[key] for key in options if key not in ("type", "weight_schedule")}
        built = cls(name=name, **read_options(cls, own, f"objectives.{name}"))
        check_options(built, f"objectives.{name}")
        return built

    def needs(self) -> tuple[str, ...]:
        return ()

    def views(self) -> tuple[View, ...]:
        return ()

    def reads(self, contexts: Sequence[str]) -> tuple[str, ...]:
        return ()

    def head(self) -> nn.Module | None:
        return None
