"""Attention written out in float64, and plans of attention run as layers do it."""

from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from unified_mm.nn.attention import attention

WIDTH = 4  # of a head
# float32 against float64; gradients add up more terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLOSE_GRADIENTS = {"rtol": 1e-4, "atol": 2e-5}


def heads_of(queries, keys, seed, heads=4, key_value_heads=2, width=WIDTH):
    """Queries, keys, values, and what is backpropagated."""
    rng = np.random.default_rng(seed)
    rows, columns = queries.valid.shape[1], keys.valid.shape[1]
    sizes = [(rows, heads), (columns, key_value_heads), (columns, key_value_heads), (rows, heads)]
    shape = [(queries.valid.shape[0], length, count, width) for length, count in sizes]
    return [rng.normal(size=each).astype(np.float32) for each in shape]


def written_out(query, key, value, cotangent, mask, bias=0.0):
    """Attention and its gradients by formula; a query that sees nothing gives zero."""
    query, key, value, cotangent = (np.float64(x) for x in (query, key, value, cotangent))
    shared = query.shape[2] // key.shape[2]
    wide = [np.repeat(x, shared, axis=2) for x in (key, value)]
    scale = query.shape[-1] ** -0.5
    scores = np.einsum("bqha,bkha->bhqk", query, wide[0]) * scale + bias
    weights = np.where(mask[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    by_weight = np.einsum("bqha,bkha->bhqk", cotangent, wide[1])
    by_score = weights * (by_weight - (weights * by_weight).sum(-1, keepdims=True)) * scale

    def narrow(x):
        return x.reshape(*x.shape[:2], -1, shared, x.shape[-1]).sum(3)

    return np.einsum("bhqk,bkha->bqha", weights, wide[1]), (
        np.einsum("bhqk,bkha->bqha", by_score, wide[0]),
        narrow(np.einsum("bhqk,bqha->bkha", by_score, query)),
        narrow(np.einsum("bhqk,bqha->bkha", weights, cotangent)),
    )


class Attending(nn.Module):
    """Attention of queries to keys and values, as layers do it under a plan."""

    plan: Any

    @nn.compact
    def __call__(self, *arrays):
        return attention.attend(self, *arrays, self.plan)


def attended(plan, attend, *arrays):
    """Attention under a plan, each call by `attend` instead of its backend's function."""
    changed = [each and each.replace(attend=attend) for each in (*plan.masks, plan.at_once)]
    plan = plan.replace(masks=tuple(changed[:-1]), at_once=changed[-1])
    return Attending(plan).apply({}, *arrays)


@contextmanager
def on(platform):
    """Plans as on another platform."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: platform)
        yield


def agree(run, arrays, mask, bias=0.0):
    """Values and gradients of `run` are those written out."""
    *inputs, cotangent = arrays
    expected, expected_gradients = written_out(*arrays, np.asarray(mask), bias)

    @jax.jit
    def both(inputs, cotangent):
        found, pull = jax.vjp(run, *inputs)
        return found, pull(cotangent)

    found, gradients = both(inputs, cotangent)
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert (np.asarray(found)[~np.asarray(mask).any(-1)] == 0).all()
    for each, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(each, other, **CLOSE_GRADIENTS)
