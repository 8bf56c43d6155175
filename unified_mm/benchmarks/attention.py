"""Cost of attention by backend and length, and of compilation by depth: `bench --sweep`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from unified_mm.analysis.figures import as_svg, subplots
from unified_mm.benchmarks.timing import provenance, times_of
from unified_mm.nn.attention.attention import Attention, plan_attention
from unified_mm.nn.attention.backends import KERNELS, PLAIN
from unified_mm.nn.attention.rules import MaskTable, View
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import (
    Group,
    TokenMetadata,
    join_metadata,
    offset_positions,
    single_document,
)
from unified_mm.nn.transformer import Transformer
from unified_mm.parallel.sharding import without_names

LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = (1, 2, 4, 8, 16)
REPEATS = 5
# Text that reads a context, both without gaps: rule 'prefix'.
RULE = MaskTable((View("text", "prefix", autoregressive=True),))


def sweep(
    options: TransformerOptions,
    say: Callable[[str], None],
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[int] = DEPTHS,
) -> dict[str, Any]:
    """Measures a transformer stack of one shape on this device.

    Args:
      options: shape and dtype of the layers; the batch is one example.
      say: called with each line of progress.
      lengths: numbers of tokens, a quarter of them context.
      depths: numbers of layers.

    Returns:
      `attention`, a row for each backend and length with the seconds (the best of several) and
      bytes of one layer's forward and backward pass; `left_out`, why a backend could not be
      measured; `compile`, a row for each depth with the seconds to compile a scanned and an
      unrolled stack; and the settings and versions of the measurement.
    """
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for backend in (*PLAIN[1:], *KERNELS):
        chosen = replace(options, attention=backend, remat="none")
        try:
            for length in lengths:
                rows.append({"backend": backend, **layer_costs(chosen, length)})
                say(
                    "{backend:<8} {tokens:>6} tokens {seconds:9.4f} s {bytes:>14,} B".format(
                        **rows[-1]
                    )
                )
        except ValueError as error:
            left_out[backend] = str(error)
            say(f"{backend:<8} left out: {error}")
    compiled = []
    for depth in depths:
        compiled.append(compile_costs(replace(options, layers=depth, attention="xla")))
        say(
            "{layers:>3} layers compile in {scanned:6.2f} s scanned, {unrolled:6.2f} s "
            "unrolled".format(**compiled[-1])
        )
    return {
        "attention": rows,
        "left_out": left_out,
        "compile": compiled,
        "width": options.width,
        "heads": options.heads,
        "key_value_heads": options.num_kv_heads,
        "dtype": jnp.dtype(options.dtype).name,
        "rule": "prefix",
        **provenance(),
    }


def sequence(length: int) -> TokenMetadata:
    """Returns one example, a quarter context and the rest text, without padding."""
    sizes = {"image": length // 4, "text": length - length // 4}
    parts = [
        single_document(jnp.ones((1, size), bool), Group(name, name, size))
        for name, size in sizes.items()
    ]
    image, text = parts
    return join_metadata([image, offset_positions(text, {}, length // 4)])


def layer_costs(options: TransformerOptions, length: int) -> dict[str, Any]:
    """Measures the seconds and the temporary bytes of one attention layer and its gradients.

    Raises:
      ValueError: the backend does not support this layer or length.
    """
    layer = Attention(options)
    metadata = sequence(length)
    x = jax.random.normal(jax.random.key(0), (1, length, options.width), options.dtype)
    plan = plan_attention(options, RULE, metadata, metadata)
    params = without_names(jax.jit(layer.init)(jax.random.key(1), x, plan, None))

    def total(params: Any, x: Any, metadata: TokenMetadata) -> Any:
        plan = plan_attention(options, RULE, metadata, metadata)
        return jnp.square(layer.apply(params, x, plan, None)[0].astype(jnp.float32)).sum()  # type: ignore[index]

    program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(params, x, metadata).compile()
    memory: Any = program.memory_analysis()
    times = times_of(lambda: program(params, x, metadata), REPEATS + 1)
    return {
        "tokens": length,
        "seconds": round(min(times[1:]), 5),
        "bytes": int(memory.temp_size_in_bytes),
    }


def compile_costs(options: TransformerOptions, length: int = 64) -> dict[str, Any]:
    """Measures the seconds to compile a stack's forward and backward pass, scanned and unrolled."""
    metadata = sequence(length)
    x = jax.ShapeDtypeStruct((1, length, options.width), options.dtype)

    def seconds(unroll: int) -> float:
        chosen = replace(options, unroll=unroll)
        stack = Transformer(chosen)

        def total(params: Any, x: Any) -> Any:
            plan = plan_attention(chosen, RULE, metadata, metadata)
            return jnp.square(stack.apply(params, x, plan)[0].astype(jnp.float32)).sum()  # type: ignore[index]

        plan = plan_attention(chosen, RULE, metadata, metadata)
        params = without_names(jax.eval_shape(stack.init, jax.random.key(0), x, plan))
        lowered = jax.jit(jax.grad(total)).lower(params, x)
        with without_compile_cache():
            return round(times_of(lowered.compile, 1)[0], 3)

    return {"layers": options.layers, "scanned": seconds(1), "unrolled": seconds(options.layers)}


@contextmanager
def without_compile_cache() -> Iterator[None]:
    """Turns off JAX's persistent compilation cache inside the `with` block."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def draw(result: dict[str, Any]) -> str:
    """Returns plots of time and memory over length, and of compile time over depth, as SVG."""
    figure, panels = subplots(10, 3.2, columns=3)
    time_axes, memory_axes, compile_axes = panels
    for backend in dict.fromkeys(row["backend"] for row in result["attention"]):
        rows = [row for row in result["attention"] if row["backend"] == backend]
        tokens = [row["tokens"] for row in rows]
        time_axes.plot(tokens, [row["seconds"] for row in rows], marker="o", label=backend)
        megabytes = [row["bytes"] / 1e6 for row in rows]
        memory_axes.plot(tokens, megabytes, marker="o", label=backend)
    for axes, what in ((time_axes, "seconds"), (memory_axes, "MB held meanwhile")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=f"one layer: {what}")
        _ticks(axes, sorted({row["tokens"] for row in result["attention"]}))
    layers = [row["layers"] for row in result["compile"]]
    for kind in ("scanned", "unrolled"):
        seconds = [row[kind] for row in result["compile"]]
        compile_axes.plot(layers, seconds, marker="o", label=kind)
    compile_axes.set(xscale="log", xlabel="layers", title="a stack: seconds to compile")
    compile_axes.set_ylim(bottom=0)
    _ticks(compile_axes, layers)
    for axes in panels:
        axes.legend(fontsize="small")
    return as_svg(figure)


def _ticks(axes: Any, values: Sequence[int]) -> None:
    """Sets a tick at each measured value and no other."""
    axes.set_xticks(values, [str(value) for value in values], minor=False)
    axes.set_xticks([], minor=True)
