"""The backends of attention: each block call gets one by name, or by device, shape and rule.

| backend | what it is | where |
| --- | --- | --- |
| `xla` | plain attention with a dense mask | everywhere |
| `chunked` | blocks of queries, recomputed in the backward pass | everywhere |
| `cudnn` | cuDNN's fused kernel | NVIDIA GPUs, 16 bits |
| `splash` | jax's fused kernel | TPUs |
| `auto` | the device's kernel where it can, else `xla`, or `chunked` where a call is long | |

A backend refuses what it cannot do, and what `auto` chose is said. `cudnn` has not been run yet;
`splash` was checked interpreted, and compiled for a v5e.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jaxtyping import Array, Float

from unified_mm.nn.attention import chunked, cudnn, splash
from unified_mm.nn.attention.masks import (
    BlockMask,
    block_bias,
    block_mask,
    has_keys,
    masked_attention,
    of_call,
    rebase,
    zero_unattended,
)
from unified_mm.nn.attention.rules import BlockCall
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import TokenMetadata
from unified_mm.parallel.mesh import platform
from unified_mm.registry import resolve

# Scores (queries x keys) of a call above which 'auto' works in blocks: from there on these are
# faster too (on a CPU; `bench --sweep`).
LONG = 2**19
# Kernels, each with a device of its own. A backend from outside the package is an object, or a
# module, of the same two functions: `refusal`, which says what it cannot do, and `attend`.
KERNELS: dict[str, Any] = {"cudnn": cudnn, "splash": splash}
PLAIN = ("auto", "xla", "chunked")
KERNEL_OF = {"gpu": "cudnn", "tpu": "splash"}
SCOPE = re.compile(r"attention_(\w+?)_(\d+)x(\d+)")


def prepare_block(
    options: TransformerOptions, call: BlockCall, queries: TokenMetadata, keys: TokenMetadata
) -> BlockMask:
    """Returns the mask of a block call in the form that its backend needs.

    Args:
      options: with the backend asked for.
      call: its slices count among all of `queries` and `keys`.
      queries, keys: metadata of whole sequences.

    Raises:
      ValueError: the backend is asked for by name and cannot compute this call.
    """
    queries, keys = of_call(call, queries, keys)
    call = rebase(call)
    name = choose(options, call, queries, keys, platform())
    if name == "xla":
        mask = block_mask(call, queries, keys)
        bias = block_bias(call, queries, keys)
        return BlockMask(mask, None, None, mask.any(-1), bias, call, name)
    sees = has_keys(call, queries, keys) if is_kernel(name) else None
    return BlockMask(None, queries, keys, sees, None, call, name)


def choose(
    options: TransformerOptions,
    call: BlockCall,
    queries: TokenMetadata,
    keys: TokenMetadata,
    platform: str,
) -> str:
    """Returns the backend of a call, whose slices count among its own queries and keys.

    Raises:
      ValueError: the backend is asked for by name and cannot compute this call.
    """
    asked = options.attention
    kernel = KERNEL_OF.get(platform, "") if asked == "auto" else asked
    if is_kernel(kernel):
        why = kernel_of(kernel).refusal(options, call, queries, keys, platform)
        if not why:
            return kernel
        if asked != "auto":
            raise ValueError(f"model.attention={asked!r} {why}")
    if asked != "auto":
        return asked
    return "chunked" if queries.valid.shape[1] * keys.valid.shape[1] > LONG else "xla"


def is_kernel(name: str) -> bool:
    """Returns whether a backend may refuse a call: a kernel, or one from outside the package."""
    return bool(name) and name not in PLAIN


def kernel_of(name: str) -> Any:
    """Returns a backend by its name, or `package.module:NAME`.

    Raises:
      ValueError: there is none of that name.
    """
    return resolve("attention backend (model.attention)", name, KERNELS)


def attend(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    seen_by: BlockMask,
) -> Float[Array, "B Q H A"]:
    """Computes attention of a block call by its backend; a query that sees no key gets zero."""
    name = re.sub(r"\W.*", "", seen_by.backend)
    with jax.named_scope(f"attention_{name}_{query.shape[1]}x{key.shape[1]}"):
        if seen_by.backend == "chunked":
            return chunked.attend(query, key, value, seen_by)
        if is_kernel(seen_by.backend):
            found: Array = kernel_of(seen_by.backend).attend(query, key, value, seen_by)
            return found
        seen = masked_attention(query, key, value, seen_by.dense, seen_by.bias)
        return zero_unattended(seen, seen_by.has_keys)
