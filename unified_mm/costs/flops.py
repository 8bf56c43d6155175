"""Model FLOPs, counted on the traced program: every matrix product, including those in loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from unified_mm.costs.kernels import cudnn_flops, repeats


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the operations (2 per multiply-add) of all matrix products in `function(*args)`.

    `args` may be shapes. The body of a scan counts as often as it runs; the compiler's own count
    takes it once. The body of a `while`, whose length is unknown, counts once. For attention's
    kernels see `costs.kernels`.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yields every equation of a traced program, including those of the programs within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner_programs(equation.params):
            yield from equations(inner)


def _count(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _dot_flops(equation)
            continue
        total += cudnn_flops(equation) or repeats(equation) * sum(
            _count(inner) for inner in _inner_programs(equation.params)
        )
    return total


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _inner_programs(params: dict[str, Any]) -> list[Jaxpr]:
    found: list[Jaxpr] = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
