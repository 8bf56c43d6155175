"""cuDNN's fused attention on NVIDIA GPUs (Dao et al. 2022, FlashAttention), through jax.nn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unified_mm.costs.chips import GPUS
from unified_mm.nn.attention.masks import (
    BlockCall,
    BlockMask,
    block_mask,
    one_document,
    static_mask,
    unknown_to_kernels,
    widen,
)
from unified_mm.nn.options import TransformerOptions
from unified_mm.nn.tokens import TokenMetadata

HALF = ("bfloat16", "float16")


def refusal(
    options: TransformerOptions,
    call: BlockCall,
    queries: TokenMetadata,
    keys: TokenMetadata,
    platform: str,
) -> str:
    """Returns why cuDNN cannot compute a block call, and what to set instead; '' where it can."""
    if platform != "gpu":
        return f"needs an NVIDIA GPU, and this runs on {platform}: set model.attention='auto'"
    if why := unknown_to_kernels(call):
        return why
    dtype = jnp.dtype(options.dtype).name
    if dtype not in HALF:
        return f"computes in {' or '.join(HALF)}, not in {dtype}: set model.dtype='bfloat16'"
    most = widest_head()
    if options.head_dim % 8 or options.head_dim > most:
        return (
            f"takes heads whose width is a multiple of 8 up to {most} here, not "
            f"{options.head_dim}: set model.head_width"
        )
    rows, columns = queries.valid.shape[1], keys.valid.shape[1]
    if not by_length(call, queries, keys) and (rows % 2 or columns % 2):
        return (
            f"takes a mask over even lengths alone, not {rows} x {columns}: change the number "
            "of tokens by one, or set model.attention='auto'"
        )
    return ""


def widest_head() -> int:
    """Returns the largest head width of the kernel on the GPU compiled for: 256 from Hopper on.

    That is the GPU of the current mesh, which this machine need not have, or this machine's.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind
    known = [gpu.capability[0] for gpu in GPUS.values() if gpu.kind == kind]
    here = getattr(jax.local_devices()[0], "compute_capability", "0.0")
    generation = known[0] if known else int(str(here).split(".")[0])
    return 256 if generation >= 9 else 128


def by_length(call: BlockCall, queries: TokenMetadata, keys: TokenMetadata) -> bool:
    """Returns whether queries see all valid keys, so that lengths replace a mask."""
    mask = static_mask(call, queries, keys)
    return mask is not None and bool(mask.all()) and one_document(queries, keys)


def attend(
    query: Float[Array, "B Q H A"],
    key: Float[Array, "B K G A"],
    value: Float[Array, "B K G A"],
    seen_by: BlockMask,
) -> Float[Array, "B Q H A"]:
    """Computes attention of a block call.

    Args:
      query, key, value: of the block call.
      seen_by: with `queries` and `keys`.
    """
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        # The kernel is divided by heads only where all three have the same.
        key, value = widen(key, query.shape[2]), widen(value, query.shape[2])
    if by_length(seen_by.call, seen_by.queries, seen_by.keys):
        if len(seen_by.keys.groups) > 1 or not seen_by.keys.groups[0].valid_first:
            key, value = valid_first(key, value, seen_by.keys.valid)
        # At least one: the kernel takes no empty rows, and their output is set to zero anyway.
        lengths = jnp.maximum(seen_by.keys.valid.sum(1, dtype=jnp.int32), 1)
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    mask = block_mask(seen_by.call, seen_by.queries, seen_by.keys)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


def valid_first(
    key: Float[Array, "B K G A"], value: Float[Array, "B K G A"], valid: Bool[Array, "B K"]
) -> tuple[Array, Array]:
    """Returns keys and values with the valid ones first, so that any gaps become a length.

    Attention does not depend on the order of its keys.
    """
    order = jnp.argsort(~valid, axis=1, stable=True)[:, :, None, None]
    return jnp.take_along_axis(key, order, axis=1), jnp.take_along_axis(value, order, axis=1)
