"""Which of its parameters a run is scored and used with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def keeps_average(train: Mapping[str, Any]) -> bool:
    """Whether checkpoints of a run with this `config.train` hold averaged parameters.

    These are then what is scored and used.
    """
    return train["ema_decay"] > 0 or train["optimizer"] == "schedule_free"
