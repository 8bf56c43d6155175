"""unified_mm: how modalities should meet, compared in one codebase.

`unified_mm.load("runs/first")` gives a trained run's model.
"""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Late, so that importing a part of the package (the world's renderer, say) brings no jax.
    if name == "load":
        from unified_mm.inference.loaded import load

        return load
    raise AttributeError(f"module 'unified_mm' has no attribute {name!r}")
