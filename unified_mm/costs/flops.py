"""Model FLOPs, counted on the traced program: matrix products and convolutions, also in loops.

What a program computes may depend on its data. A conditional counts as its most expensive branch,
and a `while` is refused, unless what was measured is given, by the name of a `jax.named_scope`
around it: shares of the branches, or how often the body runs. So a counted cost (the most that can
be) stands beside an expected one. What no result needs counts nothing: compilers leave it out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from unified_mm.costs.kernels import cudnn_flops, repeats

Measured = Mapping[str, Any]  # by the name of a scope
Flops = int | float  # whole, but where shares were measured


def matmul_flops(
    function: Callable[..., Any],
    *args: Any,
    shares: Mapping[str, Sequence[Flops]] | None = None,
    steps: Mapping[str, Flops] | None = None,
) -> int:
    """Returns the operations (2 per multiply-add) of all matrix products in `function(*args)`.

    Convolutions are products too; what would be multiplied by padding is not counted.

    The body of a scan counts as often as it runs; the compiler's own count takes it once. For
    attention's kernels see `costs.kernels`.

    Args:
      function: what is counted.
      args: its arguments, or their shapes.
      shares: of the conditionals in a scope, how often each branch is taken, in the order of
        `lax.switch` (of `lax.cond`: false, true); they add up to 1. Without them the most
        expensive branch counts.
      steps: of the `while` loops in a scope, how often the body runs.

    Raises:
      ValueError: a `while` with matrix products whose number of steps is not given, shares that do
        not fit a conditional, or a scope that is given and holds none.
    """
    counter = _Counter(shares or {}, steps or {})
    total = counter.count(jax.make_jaxpr(function)(*args).jaxpr, ())
    for name in {**counter.shares, **counter.steps}:
        if name not in counter.used:
            raise ValueError(f"{name!r}: the program has no conditional or loop in such a scope")
    return round(total)


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yields every equation of a traced program, including those of the programs within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner_programs(equation.params):
            yield from equations(inner)


class _Counter:
    """Counts programs, by what was measured of their conditionals and loops.

    Attributes:
      used: the scopes that a conditional or a loop was found in.
    """

    def __init__(self, shares: Measured, steps: Measured) -> None:
        self.shares, self.steps = shares, steps
        self.used: set[str] = set()

    def count(self, jaxpr: Jaxpr, around: Sequence[str]) -> Flops:
        """Returns the FLOPs of a program that lies in the scopes `around`, the outermost first."""
        live, _ = dce_jaxpr(jaxpr, True)  # again in each, as it does not look into all of them
        return sum(self._equation(equation, around) for equation in live.eqns)

    def _equation(self, equation: Any, around: Sequence[str]) -> Flops:
        kind, params = equation.primitive.name, equation.params
        if kind == "dot_general":
            return _dot_flops(equation)
        if kind == "ragged_dot_general":
            return _ragged_flops(equation)
        if kind == "conv_general_dilated":
            return _convolution_flops(equation)
        if kernel := cudnn_flops(equation):
            return kernel
        # A derivative's scopes are written as `transpose(jvp(name))`.
        scopes = [*around, *re.split(r"[/()]", str(equation.source_info.name_stack))]
        inner = [self.count(each, scopes) for each in _inner_programs(params)]
        if kind == "cond":
            return self._branches(inner, self._measured(self.shares, scopes))
        if kind == "while" and any(inner):
            times = self._measured(self.steps, scopes)
            if times is None:
                raise ValueError(
                    "a `while` of unknown length holds matrix products (in scope "
                    f"{'/'.join(filter(None, scopes)) or 'none'}): run it in a jax.named_scope, "
                    "and give how often its body runs as `steps`, by the name of the scope"
                )
            return times * sum(inner)
        return repeats(equation) * sum(inner)

    def _branches(self, costs: Sequence[Flops], shares: Any) -> Flops:
        if shares is None:
            return max(costs)
        if len(shares) != len(costs) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
            raise ValueError(
                f"shares {tuple(shares)} of a conditional with {len(costs)} branches: give one for "
                "each, at least 0, that add up to 1"
            )
        return sum(cost * share for cost, share in zip(costs, shares, strict=True))

    def _measured(self, given: Measured, scopes: Sequence[str]) -> Any:
        """Returns what is given for the innermost of the scopes, or None."""
        name = next((each for each in reversed(scopes) if each in given), None)
        if name is None:
            return None
        self.used.add(name)
        return given[name]


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _ragged_flops(equation: Any) -> int:
    """Returns the FLOPs of a product by groups of rows: each row is multiplied once."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    left, right = (each.aval.shape for each in equation.invars[:2])
    return 2 * math.prod(left) * math.prod(n for i, n in enumerate(right) if i not in shared)


def _convolution_flops(equation: Any) -> int:
    """Returns the FLOPs of a convolution: of each place the kernel's parts that lie on its input.

    Padding, and the zeros between what a gradient spreads out, need no product.
    """
    params, numbers = equation.params, equation.params["dimension_numbers"]
    image, kernel, out = (each.aval.shape for each in (*equation.invars, *equation.outvars))
    pairs = 1
    for axis, (low, _) in enumerate(params["padding"]):
        places, parts = (
            np.arange(shape[spec[2 + axis]])
            for shape, spec in ((out, numbers.out_spec), (kernel, numbers.rhs_spec))
        )
        steps = params["window_strides"][axis], params["rhs_dilation"][axis]
        met = places[:, None] * steps[0] + parts * steps[1] - low
        spread = params["lhs_dilation"][axis]
        last = (image[numbers.lhs_spec[2 + axis]] - 1) * spread
        pairs *= int(((met >= 0) & (met <= last) & (met % spread == 0)).sum())
    rows, features = (out[axis] for axis in numbers.out_spec[:2])
    return 2 * rows * features * kernel[numbers.rhs_spec[1]] * pairs


def _inner_programs(params: dict[str, Any]) -> list[Jaxpr]:
    found: list[Jaxpr] = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
