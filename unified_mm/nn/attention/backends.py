"""The backends of attention: each block call gets one by name, or by device, shape and rule.

| backend | what it is | where |
| --- | --- | --- |
| `xla` | plain attention with a dense mask | everywhere |
| `chunked` | blocks of queries, recomputed in the backward pass | everywhere |
| `blocks` | the same, with the blocks of keys alone that they see | everywhere |
| `cudnn` | cuDNN's fused kernel | NVIDIA GPUs, 16 bits |
| `splash` | jax's fused kernel | TPUs |
| `auto` | the device's kernel where it can, else `xla`; where a call is long, `blocks` if the rule
  leaves out half of them, else `chunked` | |

A backend refuses what it cannot do, and what `auto` chose is said. Neither kernel has been run yet:
`splash` was checked interpreted, and compiled for three TPUs; `cudnn` was compiled for three GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from unified_mm.nn.attention import blocked, cudnn, splash
from unified_mm.nn.attention.masks import BlockCall, BlockMask, KeySlice, cut, has_keys
from unified_mm.nn.attention.rules import ALL
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import TokenMetadata
from unified_mm.registry import resolve

# Scores (queries x keys) of a call above which 'auto' works in blocks: from there on these are
# faster too (on a CPU; `bench --sweep`).
LONG = 2**19
# Kernels, each with a device of its own, and listed blocks. A backend from outside the package is
# an object, or a module, of the same two functions: `refusal`, which says what it cannot do, and
# `attend`; with `ZEROES_UNSEEN` it sees itself to queries that see no key; with `AT_ONCE` it
# computes all block calls of a pass of at most so many tokens together, `joined` in their mask.
KERNELS: dict[str, Any] = {"blocks": blocked, "cudnn": cudnn, "splash": splash}
PLAIN = ("auto", "xla", "chunked")
KERNEL_OF = {"gpu": "cudnn", "tpu": "splash"}
SCOPE = re.compile(r"attention_(\w+?)_(\d+)x(\d+)")


def is_kernel(name: str) -> bool:
    """Returns whether a backend may refuse a call: a kernel, or one from outside the package."""
    return name not in PLAIN


def kernel_mask(
    options: TransformerOptions,
    name: str,
    call: BlockCall,
    queries: TokenMetadata,
    keys: TokenMetadata,
    platform: str,
) -> BlockMask | None:
    """Returns the mask of a block call for a kernel; None where 'auto' must do without it.

    Args:
      options: of the stack.
      name: of the kernel.
      call: its slices count among all of `queries` and `keys`.
      queries, keys: metadata of whole sequences.
      platform: that the program runs on.

    Raises:
      ValueError: there is no such kernel, or it is asked for by name and cannot compute this call.
    """
    kernel = resolve("attention backend (model.attention)", name, KERNELS)
    call, queries, keys = cut(call, queries, keys)
    why = kernel.refusal(options, call, queries, keys, platform)
    if why and options.attention != "auto":
        raise ValueError(f"model.attention={name!r} {why}")
    if why:
        return None
    zeroes = getattr(kernel, "ZEROES_UNSEEN", False)
    sees = None if zeroes else has_keys(call, queries, keys)
    own: dict[str, Any] = {
        "queries": queries,
        "keys": keys,
        "has_keys": sees,
        "counted": options.counted,
    }
    return BlockMask(call, name, kernel.attend, **own)


def mask_at_once(
    masks: Sequence[BlockMask],
    calls: tuple[BlockCall, ...],
    queries: TokenMetadata,
    keys: TokenMetadata,
) -> BlockMask | None:
    """Returns one mask for all block calls of a pass; None where they are computed one by one.

    A kernel that pads what it gets then does so once, and keys of several calls are read once.

    Args:
      masks: of the block calls.
      calls: the block calls.
      queries, keys: metadata of whole sequences.
    """
    length, seen = queries.valid.shape[1], keys.valid.shape[1]
    if len(masks) < 2 or sum(stop - start for start, stop in (c.queries for c in calls)) < length:
        return None
    if len({each.backend for each in masks}) > 1 or masks[0].backend in PLAIN:
        return None
    kernel = resolve("attention backend (model.attention)", masks[0].backend, KERNELS)
    if max(length, seen) > getattr(kernel, "AT_ONCE", 0):
        return None
    alone = getattr(kernel, "ZEROES_UNSEEN", False)
    return BlockMask(
        BlockCall((0, length), (KeySlice(0, seen, ALL),)),
        masks[0].backend,
        masks[0].attend,
        queries=queries,
        keys=keys,
        has_keys=None if alone else jnp.concatenate([each.has_keys for each in masks], axis=1),
        joined=calls,
    )
