"""The share of a GPU's memory that jax takes, by the environment variables that say it."""

from __future__ import annotations

import math
from collections.abc import Mapping

# Today's name, and an older one: jax reads either, and refuses both together.
NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
UNSAID = 0.75


def said(variables: Mapping[str, str]) -> bool:
    """Returns whether variables say a share."""
    return any(variables.get(name) for name in NAMES)


def memory_share(variables: Mapping[str, str]) -> float:
    """Returns the share that jax takes under variables.

    Raises:
      ValueError: what they say is no share.
    """
    for name in NAMES:
        if value := variables.get(name):
            try:
                share = float(value)
            except ValueError:
                share = math.nan
            if not 0 < share <= 1:
                raise ValueError(
                    f"{name}={value}: must be a share of a GPU's memory, above 0 and at most 1"
                )
            return share
    return UNSAID


def with_share(variables: Mapping[str, str], share: float) -> dict[str, str]:
    """Returns variables that say another share, and else what the given ones do."""
    others = {name: value for name, value in variables.items() if name not in NAMES}
    return others | {NAMES[0]: f"{share:.3g}"}
