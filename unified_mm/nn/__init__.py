"""The parts of models: layers, transformers, attention and its rules.

Exported here is what embedders and heads from outside the package need.
"""

from unified_mm.nn.attention.masks import block_mask
from unified_mm.nn.attention.patterns import First, NearInSpace, RandomBlocks, Sparse
from unified_mm.nn.attention.rules import (
    AttentionRule,
    NearInTime,
    Past,
    Predicate,
    ScoreTerm,
    Window,
)
from unified_mm.nn.layers import Dense, Norm, PerModality, partitioned
from unified_mm.nn.sow import sow_auxiliary
from unified_mm.nn.tokens import (
    Group,
    TokenMetadata,
    Tokens,
    blank,
    concatenate,
    single_document,
)

__all__ = [
    "AttentionRule",
    "Dense",
    "First",
    "Group",
    "NearInSpace",
    "NearInTime",
    "Norm",
    "Past",
    "PerModality",
    "Predicate",
    "RandomBlocks",
    "ScoreTerm",
    "Sparse",
    "TokenMetadata",
    "Tokens",
    "Window",
    "blank",
    "block_mask",
    "concatenate",
    "partitioned",
    "single_document",
    "sow_auxiliary",
]
