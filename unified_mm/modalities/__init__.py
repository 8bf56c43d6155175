"""Modalities, which turn raw data into tokens: one file for each."""

from unified_mm.modalities.modality import Modality, build_modalities
from unified_mm.nn.tokens import Group, TokenMetadata, Tokens, blank, concatenate, single_document

__all__ = [
    "Group",
    "Modality",
    "TokenMetadata",
    "Tokens",
    "blank",
    "build_modalities",
    "concatenate",
    "single_document",
]
