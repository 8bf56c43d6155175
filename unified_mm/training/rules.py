"""Rules over parameter paths: regular expressions, the first that matches wins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax

from unified_mm.parallel.sharding import path_of

Rules = Sequence[Sequence[Any]]  # pairs of pattern and value


def match_rules(field: str, rules: Rules, tree: Any) -> Any:
    """The value of the first rule whose pattern is found in each leaf's whole path.

    Args:
      field: of the config that the rules come from, for messages.
      rules: (regular expression, value); a pattern must match the whole path.
      tree: of parameters.

    Raises:
      ValueError: a parameter that no rule covers, or a rule that covers none.
    """
    used = set()

    def one(key_path: Any, leaf: Any) -> Any:
        path = path_of(key_path)
        for pattern, value in rules:
            if re.fullmatch(pattern, path):
                used.add(pattern)
                return value
        raise ValueError(f"{field}: no rule covers parameter {path!r}; end with ('.*', value)")

    values = jax.tree_util.tree_map_with_path(one, tree)
    for pattern, _ in rules[:-1]:
        if pattern not in used:
            raise ValueError(f"{field}: no parameter is left for the rule {pattern!r}")
    return values
