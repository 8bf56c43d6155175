"""The registry: names in a config become classes.

A name is a built-in one, or `package.module:attribute` of a class outside this package.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

# Modules of this package that have another name than when runs were made with them.
MOVED = {
    "unified_mm.models.flamingo": "unified_mm.models.gated",
    "unified_mm.data.world.build": "unified_mm.world.build",
}


def moved(path: str) -> str:
    """Returns a path `package.module:attribute` with today's name of the module."""
    module, colon, attribute = path.partition(":")
    return f"{MOVED[module]}:{attribute}" if colon and module in MOVED else path


def resolve(kind: str, name: str, built_in: Mapping[str, Any]) -> Any:
    """Returns the object that `name` stands for.

    Args:
      kind: what is looked up ("modality", "objective", ...), for messages.
      name: a key of `built_in`, or the path `package.module:attribute` of anything importable, so
        that users add a modality or an objective without a change of this package.
      built_in: the built-in names, each with its path, or with the object itself.

    Raises:
      ValueError: if the name is unknown, or its path cannot be imported.
    """
    path = built_in.get(name, name)
    if not isinstance(path, str):
        return path
    if ":" not in path:
        near = difflib.get_close_matches(name, built_in, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown {kind} {name!r}.{hint} Built in: {', '.join(sorted(built_in))}; "
            "anything else is given as 'package.module:attribute'."
        )
    module_name, attribute = path.split(":", 1)
    if module_name in MOVED:
        raise ValueError(f"{kind} {name!r}: it is called {moved(path)!r} now")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{kind} {name!r}: cannot import {path!r}: {error}") from error
