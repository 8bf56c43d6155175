"""Attention rules as a user would write them: predicates and score terms with parameters."""

from dataclasses import dataclass

import jax.numpy as jnp

from unified_mm.nn import AttentionRule, Predicate, ScoreTerm


@dataclass(frozen=True)
class Window(Predicate):
    """A token sees those that are fewer than `size` positions away, before or after."""

    size: int

    def __call__(self, query, key):
        return abs(query["position"] - key["position"]) < self.size


@dataclass(frozen=True)
class Fading(ScoreTerm):
    """What is further away counts less (Press et al. 2022, ALiBi, section 3)."""

    slope: float

    def __call__(self, query, key):
        return -self.slope * abs(query["position"] - key["position"]).astype(jnp.float32)


WINDOWED = AttentionRule.of(
    "windowed",
    {
        ("written", "written"): Window(2),
        ("written", "read"): Window(3),
        ("read", "written"): "none",
        ("read", "same"): Window(2),
    },
)
FADED = AttentionRule.of(
    "faded",
    {("written", "written"): "causal", ("written", "read"): "all", ("read", "same"): "all"},
    {("written", "*"): Fading(0.5)},
)
LEAKY = AttentionRule.of("leaky", {("*", "*"): Window(2)})
# The image sees nothing, not even itself.
BLIND = AttentionRule.of("blind", {("written", "written"): "causal", ("written", "read"): "all"})
