"""LIMoE's entropies of a batch against their definition, token by token."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unified_mm.nn.experts import ROUTING, Routed, statistics
from unified_mm.objectives.objective import Embedded, mean
from unified_mm.objectives.routing import Routing

ROWS, EXPERTS, TOKENS = 6, 4, {"image": 5, "text": 3}


@pytest.fixture(scope="module")
def drawn():
    """Of each modality: logits of tokens that are alike within an example, and which are valid."""
    rng = np.random.default_rng(0)
    return {
        name: (
            (4 * rng.normal(size=(ROWS, 1, EXPERTS)) + rng.normal(size=(ROWS, size, EXPERTS))),
            rng.random((ROWS, size)) < 0.7,
        )
        for name, size in TOKENS.items()
    }


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def left(drawn):
    """What one layer leaves of these tokens, [groups, periods, ...] by path."""
    found = {}
    for name, (logits, valid) in drawn.items():
        logits, p = jnp.float32(logits), jnp.float32(softmax(logits))
        chosen, valid = p == p.max(-1, keepdims=True), jnp.asarray(valid)
        routed = Routed(p, valid, logits, p, p, chosen, name, "place", 1, 0.0)
        found[name] = statistics(routed, chosen & valid[..., None], None)[:, None]
    found[""] = sum(found.values())
    return {f"layer/{ROUTING}:all:{name}": x for name, x in found.items()}


def test_entropies_are_those_of_all_tokens_of_a_modality(drawn):
    none = {"balance": 0.0, "z": 0.0}
    own = Routing("routing", **none, local_entropy=0.3, global_entropy=0.7, least_share=1.0)
    outcome = own.compare(tiny.task().model, Embedded(left(drawn), ()))
    expected = 0.0
    for name, (logits, valid) in drawn.items():
        assert valid.any(1).all()  # each example has tokens of it
        p = softmax(logits)[valid]
        expected += 0.7 * (np.log(EXPERTS) - entropy(p.mean(0)))
        expected += 0.3 * entropy(p).mean() * (name == "text")
        used = np.bincount(p.argmax(-1), minlength=EXPERTS) / len(p)
        effective = np.exp(entropy(np.maximum(used, 1e-30)))
        np.testing.assert_allclose(
            mean(outcome.metrics[f"experts_{name}"]), effective, rtol=1e-5, err_msg=name
        )
    np.testing.assert_allclose(mean(outcome.loss), expected, rtol=1e-5)
