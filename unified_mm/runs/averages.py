"""The parameters that a run is scored and used with: the newest, or averaged over steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def keeps_average(train: Mapping[str, Any]) -> bool:
    """Returns whether checkpoints of a run with this `config.train` hold averaged parameters.

    The averages are then what is scored and used.
    """
    return train["ema_decay"] > 0 or train["optimizer"] == "schedule_free"
